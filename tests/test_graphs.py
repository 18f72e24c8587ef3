"""Rooms and graphs of steps, as far as they need no GPU: few sizes, little padding, and no stream for two."""

import gc
import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dkv import cuda_graphs
from dkv.rooms import CACHED_SIZES, TILE, LateSizes, Room, Rooms, padded, power_of_two, round_up


@given(st.integers(1, 33), st.integers(1, 2500), st.integers(1, 300), st.booleans())
def test_rooms_have_room(batch, per_row, candidates, known):
    """For any need up to the largest, known beforehand or not; and there are few of them."""
    most = Room(batch * per_row, per_row, batch * candidates)
    needs = [Room(batch * n, n, batch * min(n, candidates)) for n in range(1, per_row + 1)]
    rooms = Rooms(batch, most, [need.positions for need in needs] if known else None)
    uneven = [need._replace(per_row=min(per_row, 3 * need.per_row)) for need in needs]
    found = {}
    for need in needs + uneven:
        room = rooms.of(need)
        assert all(has >= needed for has, needed in zip(room, need, strict=True))
        if rooms.records(need):
            found[need] = room
        else:
            assert room == need
    even = {found[need] for need in needs if need in found}
    assert len(even) <= CACHED_SIZES
    assert even <= set(rooms.every())
    if known:
        # over a run that needs every size once
        computed = sum(found[need].positions for need in needs if need in found)
        needed = sum(round_up(need.positions, TILE) for need in needs if need in found)
        assert computed <= 1.1 * needed


@pytest.mark.parametrize("count", [1, 16, 17, 300, 512, 513, 1025, 1800, 2048, 2049, 5120])
def test_a_full_step_gets_at_most_a_16th_more(count):
    assert count <= padded(count) <= 1.06 * round_up(count, TILE)
    assert power_of_two(count) >= count and power_of_two(count) & (power_of_two(count) - 1) == 0


def test_late_sizes_are_those_before_the_last():
    sizes = torch.zeros(2, 3, dtype=torch.int32)
    late = LateSizes(sizes)
    for step in range(4):
        late.post(sizes.fill_(step))
        if step:
            assert late.take() == [[step - 1] * 3] * 2


@pytest.fixture
def streams(monkeypatch):
    """PyTorch's pools of streams, without a GPU: two that go round."""
    pools = {priority: itertools.cycle(range(32)) for priority in (0, -1)}

    def stream(device, priority=0):
        handle = 1000 * (2 + priority) + next(pools[priority])
        return SimpleNamespace(device_index=0, cuda_stream=handle)

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(cuda_graphs, "_TAKEN", set())


def handles(sets):
    return [one._stream.stream.cuda_stream for one in sets]


def test_no_two_living_sets_of_graphs_share_a_stream(streams):
    sets = [cuda_graphs.StepGraphs(torch.device("cuda", 0)) for _ in range(64)]
    assert len(set(handles(sets))) == 64
    with pytest.raises(RuntimeError, match=r"64 sets of CUDA graphs are alive.*dkv.reset\(model\)"):
        cuda_graphs.StepGraphs(torch.device("cuda", 0))
    freed = handles(sets[10:12])
    # a cycle of garbage does not keep its stream
    sets[10].itself = sets[10]
    del sets[10:12]
    new = [cuda_graphs.StepGraphs(torch.device("cuda", 0)) for _ in range(2)]
    assert sorted(handles(new)) == sorted(freed)


def test_a_stream_is_free_only_when_its_graphs_are_gone(streams):
    one = cuda_graphs.StepGraphs(torch.device("cuda", 0))
    (handle,) = handles([one])
    taken_when_graphs_end = []

    class Graph:
        def __del__(self):
            taken_when_graphs_end.append((0, handle) in cuda_graphs._TAKEN)

    one._graphs["key"] = Graph(), None
    del one
    gc.collect()
    assert taken_when_graphs_end == [True] and not cuda_graphs._TAKEN


def test_too_many_graphs_are_dropped_together(streams, monkeypatch):
    """From PyTorch 2.12 on the end of one graph frees the workspace of all that were recorded on its stream."""
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 3)
    pools = iter(range(100))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    one = cuda_graphs.StepGraphs(torch.device("cuda", 0))
    monkeypatch.setattr(one, "_capture", lambda function: (mock.Mock(), (function(), one.pool)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: mock.MagicMock())
    for key in range(5):
        assert one.run(key, lambda key=key: key) == key
    kept = []
    for key in range(5):
        result, pool = one.run(key, lambda key=key: key)
        assert result == key
        kept.append((len(one._graphs), pool))
    # a pool all of whose graphs are gone is not used again
    assert kept == [(1, 0), (2, 0), (3, 0), (1, 1), (2, 1)]


@pytest.mark.gpu
def test_graphs_outlive_those_of_others(device):
    """More sets of graphs than PyTorch has streams in a pool; the first ones are dropped, and their memory is reused."""
    weight = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    x, bias = torch.randn(16, 4096, device=device, dtype=torch.bfloat16), weight[0].clone()
    wanted = torch.nn.functional.linear(x, weight), torch.nn.functional.linear(x, weight, bias)
    found = [tuple(map(torch.empty_like, wanted)) for _ in range(36)]

    def products(outputs):
        outputs[0].copy_(torch.nn.functional.linear(x, weight))
        outputs[1].copy_(torch.nn.functional.linear(x, weight, bias))

    sets = [cuda_graphs.StepGraphs(torch.device(device, 0)) for _ in found]
    for _ in range(2):  # eagerly, then recorded
        for one, outputs in zip(sets, found, strict=True):
            one.run("products", lambda outputs=outputs: products(outputs))
    del one, sets[:4]
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    garbage = [torch.full((2**22,), float("nan"), device=device) for _ in range(64)]
    for one, outputs in zip(sets, found[4:], strict=True):
        for output in outputs:
            output.fill_(float("nan"))
        one.run("products", lambda: None)
        for output, want in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(output, want)
    del garbage
