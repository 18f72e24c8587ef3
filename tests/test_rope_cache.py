"""`rope_cache_update`: rotation against float64, cache writes by equality."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from utils import DTYPES, assert_within_error_budget
from utils import rope_inputs as inputs

from dkv.kernels import rope_cache_update


def rotate_by_complex_numbers(x, cos, sin, positions):
    """Half-split RoPE in float64 by complex numbers: each pair from the two halves is one, and is turned."""
    x1, x2 = x.double().chunk(2, dim=-1)
    turned = torch.complex(x1, x2) * torch.complex(cos.double(), sin.double())[positions.long(), None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def check(args, impl="triton"):
    q, k, v, cos, sin, positions, slots, k_cache, v_cache = args
    before = k_cache.clone(), v_cache.clone()
    twin = [t.clone() for t in (k_cache, v_cache)]
    q_torch = rope_cache_update(*args[:7], *twin, impl="reference")
    q_rotated = rope_cache_update(*args, impl=impl)

    kept = slots >= 0
    assert (q_rotated[~kept] == 0).all()
    if kept.any():
        oracle = rotate_by_complex_numbers(q[kept], cos, sin, positions[kept])
        assert_within_error_budget(q_rotated[kept], oracle, q_torch[kept])
        rows, columns = slots[kept].long() // k_cache.shape[1], slots[kept].long() % k_cache.shape[1]
        oracle = rotate_by_complex_numbers(k[kept], cos, sin, positions[kept])
        assert_within_error_budget(k_cache[rows, columns], oracle, twin[0][rows, columns])
        assert torch.equal(v_cache[rows, columns], v[kept])
        for cache, old in zip((k_cache, v_cache), before, strict=True):
            old[rows, columns] = cache[rows, columns]
    for cache, old in zip((k_cache, v_cache), before, strict=True):
        assert torch.equal(cache, old), "a slot that was not named has changed"


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("headdim", [16, 32, 64, 128])
@pytest.mark.parametrize("heads", [(2, 2), (14, 2), (9, 9)], ids=["mha", "gqa7", "more heads than a block"])
def test_rotation_and_write(device, impl, dtype, headdim, heads):
    check(inputs([3, 39, 0, 20], nheads=heads[0], nheads_k=heads[1], headdim=headdim, dtype=dtype, device=device), impl)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_queries_or_keys_alone(device, impl):
    """Without key heads only the queries are rotated, without query heads only keys and values are written."""
    q, k, v, *rest, k_cache, v_cache = inputs([3, -1, 39], device=device)
    both = [k_cache.clone(), v_cache.clone()]
    q_rotated = rope_cache_update(q, k, v, *rest, *both, impl=impl)
    empty, empty_cache = q[:, :0], k_cache[:, :, :0]
    assert torch.equal(rope_cache_update(q, empty, empty, *rest, empty_cache, empty_cache, impl=impl), q_rotated)
    assert rope_cache_update(empty, k, v, *rest, k_cache, v_cache, impl=impl).shape == (3, 0, 32)
    assert torch.equal(k_cache, both[0]) and torch.equal(v_cache, both[1])


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("slots", [[-1, 0, -1, 25], [-1, -1], [0], []], ids=str)
def test_padding_entries_are_skipped(device, impl, slots):
    """Positions and values of padding entries are not read, and slot 0 is unchanged."""
    args = inputs(slots, device=device)
    if -1 in slots:
        padding = args[6] < 0
        args[5][padding] = -(10**6)
        for x in args[:3]:
            x[padding] = float("nan")
    check(args, impl)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_strided_tensors(device, impl):
    """Queries, keys and values cut from one QKV tensor; caches with heads first, and every second column of a larger one."""
    args = inputs([7, 30, 2], device=device)
    fused = torch.cat(args[:3], dim=1)
    args[:3] = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    args[7] = args[7].transpose(1, 2).contiguous().transpose(1, 2)
    args[8] = torch.zeros(2, 40, 2, 32, device=device)[:, ::2]
    assert not (args[7].is_contiguous() or args[8].is_contiguous() or args[1].is_contiguous())
    check(args, impl)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_dtypes(device, dtype):
    args = inputs([7, 30, 2], device=device)
    args[5], args[6] = args[5].to(dtype), args[6].to(dtype)
    check(args)


def test_rotation_by_position_zero_is_the_identity(device):
    args = inputs([4, 9], device=device)
    args[5].zero_()
    assert torch.equal(rope_cache_update(*args, impl="triton"), args[0])
    assert torch.equal(args[7].view(-1, 2, 32)[[4, 9]], args[1])


def test_scores_depend_on_distance_only(device):
    """The purpose of RoPE: moving a query and a key by the same distance does not change their product."""
    args = inputs([0, 1], device=device)
    products = []
    for shift in (0, 11):
        args[5] = torch.tensor([5, 9], device=device) + shift
        q_rotated = rope_cache_update(*args, impl="triton")
        products.append((q_rotated[0, 0] * args[7][0, 1, 0]).sum())
    torch.testing.assert_close(*products, atol=1e-5, rtol=1e-5)


@given(data=st.data())
def test_any_slots(device, data):
    batch, seqlen = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    slots = data.draw(st.lists(st.integers(0, batch * seqlen - 1), unique=True, max_size=6))
    slots = data.draw(st.permutations(slots + [-1] * data.draw(st.integers(0, 2))))
    group, nheads_k = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 3))
    check(
        inputs(
            slots,
            batch=batch,
            seqlen=seqlen,
            nheads=group * nheads_k,
            nheads_k=nheads_k,
            headdim=data.draw(st.sampled_from([16, 32, 64])),
            device=device,
        )
    )


@pytest.mark.gpu
def test_offsets_beyond_int32():
    """A slot whose byte and element offsets pass 2^31."""
    args = inputs([3, 39, 0, 20], headdim=64, dtype=torch.bfloat16, device="cuda")
    storage = torch.zeros(2**31 + 2**13, dtype=torch.bfloat16, device="cuda")
    args[7] = storage.as_strided((2, 20, 2, 64), (2**31, 128, 64, 1))
    check(args)


@pytest.mark.sanitizer
def test_small_run_for_the_sanitizer(device):
    check(inputs([3, -1, 39, 0], nheads=14, dtype=torch.float16, device=device))
