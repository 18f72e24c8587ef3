"""`delayed_attention` against float64, its invariants, and its edges."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from utils import DTYPES, AttentionCase, assert_within_error_budget, cumulative

from dkv.kernels import attention, configs, delayed_attention


def check(case, **options):
    """Runs the kernel and compares its output and log-sum-exp with the float64 oracle."""
    splits = options.pop("num_splits", None)
    out, lse = delayed_attention(*case.tensors(), num_splits=splits, return_softmax_lse=True, impl="triton", **options)
    oracle_out, oracle_lse = delayed_attention(
        *case.tensors(torch.float64), return_softmax_lse=True, impl="reference", **options
    )
    torch_out, torch_lse = delayed_attention(*case.tensors(), return_softmax_lse=True, impl="reference", **options)
    assert out.dtype == case.q.dtype and lse.dtype == torch.float32
    assert_within_error_budget(out, oracle_out, torch_out)
    assert_within_error_budget(lse, oracle_lse, torch_lse)
    return out, lse


def dense_attention(case, row, columns):
    """Plain softmax attention of one row in float64, written out, over the given columns."""
    start, end = case.cu_seqlens_q[row : row + 2].tolist()
    q = case.q[start:end].double()
    group = q.shape[1] // case.k_cache.shape[2]
    k = case.k_cache[row, columns].double().repeat_interleave(group, dim=1)
    v = case.v_cache[row, columns].double().repeat_interleave(group, dim=1)
    scores = torch.einsum("ahd,nhd->han", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("han,nhd->ahd", scores.softmax(-1), v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("headdim", [16, 32, 64, 128])
@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_headdims_and_groups(device, dtype, headdim, group):
    nheads_k = 2 if group < 4 else 1
    check(
        AttentionCase.random(
            [3, 0, 9], seqlen=70, nheads_k=nheads_k, group=group, headdim=headdim, dtype=dtype, device=device
        )
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen", [1, 63, 64, 65, 257])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_lengths_and_splits(device, dtype, seqlen, num_splits):
    check(AttentionCase.random([1, 17], seqlen=seqlen, dtype=dtype, device=device), num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_padded_rows(device, num_splits):
    case = AttentionCase.random([5, 2, 8, 4], seqlen=130, device=device)
    leftpad = torch.tensor([0, 17, 64, 90], dtype=torch.int32, device=device)
    seqlens = torch.tensor([130, 64, 129, 91], dtype=torch.int32, device=device)
    out, _ = check(case, cache_leftpad=leftpad, cache_seqlens=seqlens, num_splits=num_splits)
    for row in range(4):
        start, end = case.cu_seqlens_q[row : row + 2].tolist()
        expected = dense_attention(case, row, slice(leftpad[row], seqlens[row]))
        torch.testing.assert_close(out[start:end].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_key_mask_and_key_index(device, num_splits):
    case = AttentionCase.random([5, 2, 8], seqlen=150, group=2, device=device)
    generator = torch.Generator().manual_seed(0)
    key_mask = (torch.rand(3, 150, generator=generator) < 0.4).to(device)
    key_mask[0, :64] = False  # a whole tile without a key
    key_index = torch.stack([torch.randperm(150, generator=generator)[:100] for _ in range(3)]).int().to(device)
    key_index[1, 30:] = -1
    leftpad = torch.tensor([0, 3, 11], dtype=torch.int32, device=device)
    check(case, key_mask=key_mask, num_splits=num_splits)
    check(case, key_index=key_index, num_splits=num_splits)
    check(case, key_index=key_index, key_mask=key_mask, cache_leftpad=leftpad, num_splits=num_splits)


@pytest.mark.parametrize("block_n", [16, 32])
def test_key_mask_and_key_index_in_short_tiles(device, block_n):
    """The GPU tables have tiles with fewer keys than the interpreter's."""
    case = AttentionCase.random([3, 2], seqlen=75, nheads_k=1, headdim=16, device=device)
    generator = torch.Generator().manual_seed(0)
    key_mask = (torch.rand(2, 75, generator=generator) < 0.4).to(device)
    key_index = torch.stack([torch.randperm(75, generator=generator)[:50] for _ in range(2)]).int().to(device)
    tile = configs.AttentionConfig(16, block_n, num_warps=4, num_stages=2)
    with mock.patch.object(attention, "attention_config", lambda *arguments: tile):
        for options in ({"key_mask": key_mask}, {"key_index": key_index}):
            check(case, num_splits=2, **options)
        check(case, key_mask=key_mask, key_index=key_index)


def test_key_index_outside_the_cache_is_ignored(device):
    case = AttentionCase.random([4], seqlen=40, device=device)
    inside = torch.tensor([[3, 9, 27]], dtype=torch.int32, device=device)
    beyond = torch.tensor([[3, -1, 9, 40, -7, 27]], dtype=torch.int32, device=device)
    out = delayed_attention(*case.tensors(), key_index=beyond, impl="triton")
    expected = delayed_attention(*case.tensors(), key_index=inside, impl="triton")
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("empty", ["key_mask", "key_index", "cache_seqlens", "cache_leftpad"])
def test_queries_without_keys_get_zeros(device, empty, num_splits):
    case = AttentionCase.random([3, 4], seqlen=66, device=device)
    full = {
        "key_mask": torch.ones(2, 66, dtype=torch.bool, device=device),
        "key_index": torch.arange(66, dtype=torch.int32, device=device).repeat(2, 1),
        "cache_seqlens": torch.full((2,), 66, dtype=torch.int32, device=device),
        "cache_leftpad": torch.zeros(2, dtype=torch.int32, device=device),
    }
    options = {empty: full[empty].clone()}
    options[empty][1] = {"key_mask": False, "key_index": -1, "cache_seqlens": 0, "cache_leftpad": 66}[empty]
    out, lse = check(case, num_splits=num_splits, **options)
    assert (out[3:] == 0).all() and (lse[:, 3:] == float("-inf")).all()
    assert (out[:3] != 0).all() and lse[:, :3].isfinite().all()


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("padding", [1, 40])
def test_padding_queries_get_zeros(device, padding, num_splits):
    case = AttentionCase.random([2, 3], seqlen=64, group=2, padding=padding, device=device)
    out, lse = check(case, max_seqlen_q=3, num_splits=num_splits)
    assert (out[5:] == 0).all() and (lse[:, 5:] == float("-inf")).all()


@pytest.mark.parametrize("counts", [[0, 0], [0]])
def test_no_query_at_all(device, counts):
    case = AttentionCase.random(counts, seqlen=32, padding=4, device=device)
    out, lse = check(case)
    assert (out == 0).all() and (lse == float("-inf")).all()
    empty = AttentionCase.random(counts, seqlen=32, device=device)
    assert delayed_attention(*empty.tensors(), impl="triton").shape == (0, 2, 32)


@pytest.mark.parametrize("num_splits", [None, 1, 2])
def test_a_bound_of_zero_queries(device, num_splits):
    """All queries are padding, and the host knows it."""
    case = AttentionCase.random([0, 0], seqlen=32, padding=20, device=device)
    out, lse = check(case, max_seqlen_q=0, num_splits=num_splits)
    assert (out == 0).all() and (lse == float("-inf")).all()


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_masked_and_invalid_columns_are_never_read(device, garbage):
    """Columns that are not valid may hold anything, even NaN from a freed buffer."""
    case = AttentionCase.random([6, 6], seqlen=100, device=device)
    valid = torch.zeros(2, 100, dtype=torch.bool, device=device)
    valid[0, 10:71] = True
    valid[1, 5:6] = True
    for cache in (case.k_cache, case.v_cache):
        cache[~valid] = garbage
    bounds = {
        "cache_leftpad": torch.tensor([10, 5], dtype=torch.int32, device=device),
        "cache_seqlens": torch.tensor([71, 6], dtype=torch.int32, device=device),
    }
    columns = torch.arange(100, dtype=torch.int32, device=device)
    every = torch.stack([columns.flip(0), columns])
    listed = torch.where(valid, columns, -1).flip(1)
    for options in (
        bounds,
        {"key_mask": valid},
        {"key_index": listed},
        {"key_index": every, "key_mask": valid},
        {"key_index": every, **bounds},
    ):
        for num_splits in (1, 2):
            check(case, num_splits=num_splits, **options)


def test_queries_beyond_the_bound_are_nan(device, monkeypatch):
    """A max_seqlen_q that is too small must not leave stale memory in the output, here zeros."""
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    case = AttentionCase.random([70, 3], seqlen=32, nheads_k=1, device=device)
    for num_splits in (1, 2):
        out = delayed_attention(*case.tensors(), max_seqlen_q=2, num_splits=num_splits, impl="triton")
        tile = configs.attention_config(torch.device(device), torch.float32, 2).block_m
        assert out[tile:70].isnan().all() and not out[:tile].isnan().any() and not out[70:].isnan().any()


def test_strided_cache_and_queries(device):
    """Heads-first cache, every second column, queries cut out of a fused QKV tensor."""
    case = AttentionCase.random([5, 7], seqlen=64, group=2, headdim=32, device=device)
    expected = delayed_attention(*case.tensors(), impl="triton")
    heads_first = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in (case.k_cache, case.v_cache)]
    assert not heads_first[0].is_contiguous()
    assert torch.equal(delayed_attention(case.q, *heads_first, case.cu_seqlens_q, impl="triton"), expected)
    spread = [torch.full((2, 128, 2, 32), float("nan"), device=device) for _ in range(2)]
    for wide, cache in zip(spread, (case.k_cache, case.v_cache), strict=True):
        wide[:, ::2] = cache
    every_second = [wide[:, ::2] for wide in spread]
    assert torch.equal(delayed_attention(case.q, *every_second, case.cu_seqlens_q, impl="triton"), expected)
    fused = torch.cat((case.q, torch.full((12, 5, 32), float("nan"), device=device)), dim=1)
    out = delayed_attention(fused[:, :4], case.k_cache, case.v_cache, case.cu_seqlens_q, impl="triton")
    assert torch.equal(out, expected)


def test_all_active_is_plain_attention(device):
    case = AttentionCase.random([48, 48], seqlen=48, group=2, device=device)
    out, _ = check(case, max_seqlen_q=48)
    q = case.q.view(2, 48, 4, 32).transpose(1, 2)
    k, v = (c.transpose(1, 2).repeat_interleave(2, dim=1) for c in (case.k_cache, case.v_cache))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(96, 4, 32)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_order_of_keys_does_not_matter(device):
    case = AttentionCase.random([9], seqlen=90, device=device)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1)).to(device)
    out = delayed_attention(*case.tensors(), impl="triton")
    case.k_cache, case.v_cache = case.k_cache[:, order], case.v_cache[:, order]
    torch.testing.assert_close(delayed_attention(*case.tensors(), impl="triton"), out, atol=1e-6, rtol=1e-6)


def test_parts_merge_by_their_log_sum_exp(device):
    """Attention over two halves of the keys, merged by hand, is attention over all of them."""
    case = AttentionCase.random([7, 2], seqlen=120, device=device)
    whole, whole_lse = delayed_attention(*case.tensors(), return_softmax_lse=True, impl="triton")
    middle = torch.tensor([50, 50], dtype=torch.int32, device=device)
    halves = [
        delayed_attention(*case.tensors(), return_softmax_lse=True, impl="triton", **{bound: middle})
        for bound in ("cache_seqlens", "cache_leftpad")
    ]
    lse = torch.stack([part[1] for part in halves])
    weights = lse.softmax(0).transpose(1, 2)[..., None]
    merged = weights[0] * halves[0][0] + weights[1] * halves[1][0]
    torch.testing.assert_close(merged, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.logsumexp(0), whole_lse, atol=1e-5, rtol=1e-5)


def test_rows_are_independent(device):
    """A row of a ragged padded batch is bit for bit the row alone."""
    case = AttentionCase.random([5, 0, 11], seqlen=96, group=2, device=device)
    leftpad = torch.tensor([4, 0, 30], dtype=torch.int32, device=device)
    seqlens = torch.tensor([90, 96, 77], dtype=torch.int32, device=device)
    out = delayed_attention(
        *case.tensors(), cache_leftpad=leftpad, cache_seqlens=seqlens, max_seqlen_q=11, num_splits=1, impl="triton"
    )
    for row in (0, 2):
        start, end = case.cu_seqlens_q[row : row + 2].tolist()
        alone = delayed_attention(
            case.q[start:end],
            case.k_cache[row : row + 1, leftpad[row] : seqlens[row]],
            case.v_cache[row : row + 1, leftpad[row] : seqlens[row]],
            cumulative([end - start], device),
            max_seqlen_q=11,
            num_splits=1,
            impl="triton",
        )
        torch.testing.assert_close(out[start:end], alone, atol=1e-6, rtol=1e-6)


def test_the_launcher_alone(device):
    case = AttentionCase.random([2, 3], seqlen=20, padding=1, device=device)
    expected = delayed_attention(*case.tensors(), return_softmax_lse=True, impl="triton")
    out, lse = attention._launch(*case.tensors(), return_softmax_lse=True)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert torch.equal(attention._launch(*case.tensors()), out)
    empty = AttentionCase.random([0], seqlen=20, device=device)
    assert attention._launch(*empty.tensors()).shape == (0, 2, 32)
    assert attention._launch(*empty.tensors(), return_softmax_lse=True)[1].shape == (2, 0)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_eager_calls_do_not_pass_through_the_operator(device, impl):
    class Recorder(TorchDispatchMode):
        called = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.called.add(func.namespace)
            return func(*args, **(kwargs or {}))

    case = AttentionCase.random([2], seqlen=20, device=device)
    with Recorder() as recorder:
        delayed_attention(*case.tensors(), impl=impl)
        assert recorder.called == {"aten"}
        torch.ops.dkv.delayed_attention(*case.tensors(), 2, None, None, None, None, 1.0, None, False, impl)
    assert "dkv" in recorder.called, "the check above cannot fail"


def test_deterministic(device):
    case = AttentionCase.random([20, 9], seqlen=200, device=device)
    first = delayed_attention(*case.tensors(), num_splits=3, impl="triton")
    assert torch.equal(delayed_attention(*case.tensors(), num_splits=3, impl="triton"), first)


@pytest.mark.parametrize("scale", [0.0, 0.5, -1.0])
def test_softmax_scale(device, scale):
    check(AttentionCase.random([6], seqlen=70, device=device), softmax_scale=scale)


def test_large_scores_do_not_overflow(device):
    case = AttentionCase.random([6], seqlen=70, device=device)
    case.q *= 300
    check(case)


@settings(max_examples=12)
@given(data=st.data())
def test_any_shape(device, data):
    """Random raggedness, padding, groups, masks and splits."""
    draw = data.draw
    counts = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4), label="counts")
    seqlen = draw(st.integers(1, 140), label="seqlen")
    case = AttentionCase.random(
        counts,
        seqlen=seqlen,
        nheads_k=draw(st.integers(1, 2), label="nheads_k"),
        group=draw(st.integers(1, 8), label="group"),
        headdim=draw(st.sampled_from([16, 32, 64]), label="headdim"),
        padding=draw(st.integers(0, 5), label="padding"),
        dtype=draw(st.sampled_from([torch.float32, torch.float16]), label="dtype"),
        device=device,
    )
    options = {}
    if draw(st.booleans(), label="bounds"):
        ends = [draw(st.integers(0, seqlen)) for _ in counts]
        starts = [draw(st.integers(0, seqlen)) for _ in counts]
        options["cache_leftpad"] = torch.tensor(starts, dtype=torch.int32, device=device)
        options["cache_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=device)
    if draw(st.booleans(), label="mask"):
        generator = torch.Generator().manual_seed(seqlen)
        options["key_mask"] = (torch.rand(len(counts), seqlen, generator=generator) < 0.5).to(device)
    if draw(st.booleans(), label="index"):
        generator = torch.Generator().manual_seed(seqlen + 1)
        index = torch.stack([torch.randperm(seqlen + 9, generator=generator) for _ in counts])
        options["key_index"] = torch.where(index % 5 > 0, index, -1).int().to(device)
    if draw(st.booleans(), label="bound"):
        options["max_seqlen_q"] = max(counts) + draw(st.integers(0, 3))
    check(case, num_splits=draw(st.integers(1, 4), label="splits"), **options)


# the partial results of padding queries are unwritten memory, which is NaN here
@pytest.mark.filterwarnings("ignore:All-NaN slice")
@settings(max_examples=8)
@given(
    num_splits=st.integers(1, 40),
    seqlen=st.integers(1, 200),
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=2),
    padding=st.integers(0, 3),
    headdim=st.sampled_from([16, 32, 64, 128]),
    empty=st.booleans(),
)
def test_any_number_of_splits(device, num_splits, seqlen, counts, padding, headdim, empty):
    """Partial results merge to the same, with more splits than tiles, more than 16, or a last row without keys."""
    case = AttentionCase.random(
        counts, seqlen=seqlen, nheads_k=1, group=2, headdim=headdim, padding=padding, device=device
    )
    seqlens = torch.full((len(counts),), seqlen, dtype=torch.int32, device=device)
    seqlens[-1] *= not empty
    check(case, num_splits=num_splits, cache_seqlens=seqlens)


def test_more_than_16_splits_are_taken_for_16(device):
    case = AttentionCase.random([3], seqlen=17 * 64, nheads_k=1, headdim=16, device=device)
    out, _ = check(case, num_splits=17)
    assert torch.equal(delayed_attention(*case.tensors(), num_splits=16, impl="triton"), out)


@pytest.mark.gpu
@pytest.mark.parametrize("stride", ["row", "column", "head"])
def test_offsets_beyond_int32(stride):
    """Row, column and head strides that pass 2^31 elements."""
    shape, big = (2, 5, 2, 64), 2**31 // 4
    strides = {"row": (2**31, 128, 64, 1), "column": (640, big, 64, 1), "head": (640, 64, 2**31, 1)}[stride]
    needed = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    storage = torch.zeros(needed, dtype=torch.bfloat16, device="cuda")
    small = AttentionCase.random([3, 4], seqlen=5, headdim=64, dtype=torch.bfloat16, device="cuda")
    expected = delayed_attention(*small.tensors(), impl="triton")
    k_cache = storage.as_strided(shape, strides)
    k_cache.copy_(small.k_cache)
    out = delayed_attention(small.q, k_cache, small.v_cache, small.cu_seqlens_q, impl="triton")
    assert torch.equal(out, expected)


@pytest.mark.sanitizer
def test_small_run_for_the_sanitizer(device):
    """Small enough for compute-sanitizer: ragged, split and unsplit."""
    case = AttentionCase.random(
        [3, 0, 5], seqlen=70, group=7, headdim=32, padding=2, dtype=torch.float16, device=device
    )
    for num_splits in (1, 2):
        check(case, num_splits=num_splits)


HEADS = {"LLaDA": (32, 32), "Dream": (28, 4)}


def splits(model, batch, queries, seqlen, num_sms=132):
    """Splits that the launcher gets from the heuristic for bfloat16 on a Hopper GPU."""
    nheads, nheads_k = HEADS[model]
    rows = queries * nheads // nheads_k
    table = configs.attention_table(90, torch.bfloat16)
    tile = next((tile for tile in table if tile.block_m >= rows), table[-1])
    return configs.num_splits_heuristic(
        programs=-(-rows // tile.block_m) * batch * nheads_k,
        keys=seqlen,
        block_n=tile.block_n,
        rows=rows,
        row_groups=batch * nheads_k,
        headdim=128,
        num_sms=num_sms,
    )


@pytest.mark.parametrize(
    "model, batch, queries, expected",
    [
        # columns: 64, 256, 512, 1024, 2048, 8192
        ("LLaDA", 1, 1, [1, 1, 4, 4, 4, 4]),
        ("LLaDA", 1, 32, [1, 1, 4, 4, 4, 4]),
        ("LLaDA", 1, 128, [1, 1, 1, 2, 4, 4]),
        ("LLaDA", 2, 32, [1, 1, 1, 2, 2, 2]),
        ("LLaDA", 4, 32, [1, 1, 1, 1, 1, 1]),
        ("LLaDA", 8, 32, [1, 1, 1, 1, 1, 1]),
        ("LLaDA", 1, 1024, [1, 1, 1, 1, 1, 1]),
        ("Dream", 1, 1, [1, 1, 8, 16, 16, 16]),
        ("Dream", 1, 32, [1, 1, 8, 8, 8, 9]),
        ("Dream", 4, 32, [1, 1, 1, 2, 2, 4]),
        ("Dream", 8, 32, [1, 1, 1, 1, 2, 2]),
        ("Dream", 1, 1024, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_splits_of_real_shapes(model, batch, queries, expected):
    assert [splits(model, batch, queries, seqlen) for seqlen in (64, 256, 512, 1024, 2048, 8192)] == expected


@given(
    model=st.sampled_from(list(HEADS)),
    batch=st.integers(1, 16),
    queries=st.integers(0, 300),
    seqlen=st.integers(0, 10_000),
    num_sms=st.integers(1, 200),
)
def test_bounds_of_the_split_rule(model, batch, queries, seqlen, num_sms):
    count = splits(model, batch, queries, seqlen, num_sms)
    assert 1 <= count <= min(configs.MAX_SPLITS, max(1, -(-seqlen // 64)))
    if seqlen <= 256 or batch * HEADS[model][1] > num_sms // 2:
        assert count == 1, "a short row, or a grid that fills the GPU"
    assert splits(model, batch + 1, queries, seqlen, num_sms) <= count
    assert splits(model, batch, queries, seqlen, num_sms + 1) >= count
