"""`pack_positions` equals a loop over all positions, for any strides and capacity."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dkv.kernels import pack_positions, packing
from dkv.kernels.configs import BlockConfig

IMPLS = ["triton", "reference"]


def pack_by_a_loop(active, capacity):
    slots, cu_seqlens = [], [0]
    for row, line in enumerate(active.tolist()):
        slots += [row * len(line) + column for column, is_active in enumerate(line) if is_active]
        cu_seqlens.append(len(slots))
    capacity = len(slots) if capacity is None else capacity
    return (slots + [-1] * capacity)[:capacity], cu_seqlens


def check(active, capacity, impl):
    before = active.clone()
    slots, cu_seqlens = pack_positions(active, capacity, impl=impl)
    expected_slots, expected_cu_seqlens = pack_by_a_loop(active, capacity)
    assert slots.dtype == torch.int64 and cu_seqlens.dtype == torch.int32
    assert slots.is_contiguous() and slots.device == cu_seqlens.device == active.device
    assert slots.tolist() == expected_slots and cu_seqlens.tolist() == expected_cu_seqlens
    assert torch.equal(active, before)


def random_active(*shape, device, density=0.3):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))) < density).to(device)


@pytest.fixture
def small_blocks(monkeypatch):
    """Both loops of the kernel, over columns and over earlier rows, take several turns."""
    monkeypatch.setattr(packing, "PACK", BlockConfig(block=16, num_warps=1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (37, 5), (2, 1500)], ids=str)
@pytest.mark.parametrize("capacity", [None, 0, 1, 7, 2000])
def test_shapes_and_capacities(device, impl, shape, capacity):
    check(random_active(*shape, device=device), capacity, impl)


@pytest.mark.parametrize("shape", [(37, 5), (3, 50), (4, 16), (16, 17)], ids=str)
@pytest.mark.parametrize("capacity", [None, 20, 300])
def test_blocks_of_rows_and_columns(device, small_blocks, shape, capacity):
    check(random_active(*shape, device=device), capacity, "triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("capacity", [None, 0, 5])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)], ids=str)
def test_nothing_there(device, impl, shape, capacity):
    check(torch.ones(shape, dtype=torch.bool, device=device), capacity, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [(), (0,), (2,), (0, 1, 2, 3)], ids=str)
def test_rows_without_active_positions(device, impl, rows):
    active = torch.zeros(4, 30, dtype=torch.bool, device=device)
    active[list(rows)] = True
    for capacity in (None, 40, 130):
        check(active, capacity, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_capacity_around_the_count(device, impl):
    active = random_active(3, 50, device=device)
    for capacity in range(int(active.sum()) - 1, int(active.sum()) + 2):
        check(active, capacity, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides(device, impl):
    active = random_active(6, 40, device=device)
    for view in (active.T, active[::2, 1::3], active[1:4, 5:7], active[0].expand(5, 40), active[:, :1].expand(6, 9)):
        assert not view.is_contiguous()
        check(view, None, impl)
        check(view, 30, impl)


@given(data=st.data())
def test_any_positions(device, data):
    batch, seqlen = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 40))
    bits = data.draw(st.lists(st.booleans(), min_size=batch * seqlen, max_size=batch * seqlen))
    active = torch.tensor(bits, dtype=torch.bool, device=device).view(batch, seqlen)
    capacity = data.draw(st.none() | st.integers(0, batch * seqlen + 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PACK", BlockConfig(block=16, num_warps=1))
        for impl in IMPLS:
            check(active, capacity, impl)


@pytest.mark.parametrize(
    "active, options, error, message",
    [
        (torch.ones(2, 3), {}, TypeError, r"active must be bool, got torch.float32; cast it with \.to\(torch\.bool\)"),
        (torch.ones(6, dtype=torch.bool), {}, ValueError, r"active must have shape \(batch, seqlen\).*got \(6,\)"),
        (torch.ones(2, 3, dtype=torch.bool), {"capacity": -1}, ValueError, "capacity must be at least 0, got -1"),
        (torch.ones(2, 3, dtype=torch.bool), {"capacity": 2.0}, TypeError, "capacity must be an int, got float"),
        (torch.ones(2, 3, dtype=torch.bool), {"impl": "cuda"}, ValueError, "impl must be one of"),
    ],
    ids=["dtype", "shape", "negative capacity", "capacity type", "impl"],
)
def test_bad_input(active, options, error, message):
    with pytest.raises(error, match=message):
        pack_positions(active, **options)


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr("dkv.kernels.checks.InterpretedFunction", ())
    with pytest.raises(NotImplementedError, match="impl='triton' needs CUDA tensors, got cpu"):
        pack_positions(torch.ones(2, 3, dtype=torch.bool), impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(device, impl):
    torch.library.opcheck(torch.ops.dkv.pack_positions, (random_active(3, 20, device=device), 12, impl))


def test_compiles_without_a_graph_break(device):
    active = random_active(3, 20, device=device)
    compiled = torch.compile(lambda a: pack_positions(~a, 30), fullgraph=True)
    for result, expected in zip(compiled(active), pack_positions(~active, 30), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """The host decides nothing: a recorded call packs the values at its replay."""
    active = random_active(8, 700, device="cuda")
    pack_positions(active, 2000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slots, cu_seqlens = pack_positions(active, 2000)
    for density in (0.0, 0.1, 1.0):
        active.copy_(random_active(8, 700, device="cuda", density=density))
        graph.replay()
        assert (slots.tolist(), cu_seqlens.tolist()) == pack_by_a_loop(active, 2000)


@pytest.mark.sanitizer
def test_small_run_for_the_sanitizer(device):
    for capacity in (None, 10, 200):
        check(random_active(5, 90, device=device), capacity, "triton")
