"""`lm_head_confidence`: tokens and confidences against float64, for any tiles, ties, exclusions and noise."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.backends.debugging import aot_eager
from utils import DTYPES, cumulative

from dkv.kernels import Confidence, lm_head, lm_head_confidence, reference
from dkv.kernels.configs import LM_HEAD_INTERPRETER, LMHeadConfig, LMHeadMergeConfig
from dkv.kernels.noise import gumbel
from dkv.kernels.noise import noise_key as keys_of

IMPLS = ["triton", "reference"]
INF = math.inf


def inputs(rows, vocab=300, hidden_size=70, *, spread=2.0, dtype=torch.float32, device="cpu"):
    """Hidden states and a head whose logits have the standard deviation `spread`."""
    # the same on every device, unless that would be slow on a CPU
    source = device if vocab > 10_000 else "cpu"
    generator = torch.Generator(source).manual_seed(rows * 1000 + vocab)
    hidden = torch.randn(rows, hidden_size, generator=generator, device=source)
    weight = torch.randn(vocab, hidden_size, generator=generator, device=source) * (spread / hidden_size**0.5)
    return hidden.to(dtype).to(device), weight.to(dtype).to(device)


def product(hidden, weight, dtype):
    if dtype == torch.float32 and hidden.is_cuda and hidden.dtype.itemsize == 2:
        # by the tensor cores, as in the kernel
        return torch.mm(hidden, weight.T, out_dtype=dtype)
    return hidden.to(dtype) @ weight.to(dtype).T


def by_row(scale):
    """A float, or a tensor (rows,) that multiplies (rows, vocab)."""
    return scale[:, None] if isinstance(scale, torch.Tensor) else scale


def from_logits(hidden, weight, dtype, token=None, *, logit_scale=1.0, exclude_ids=None, round_logits=False):
    """z in `dtype`, and (log_prob, margin, entropy) of softmax(z) by PyTorch's own functions."""
    z = product(hidden, weight, dtype)
    if round_logits:
        z = z.to(hidden.dtype).to(dtype)
    z = z * by_row(logit_scale)
    z[:, list(exclude_ids or ())] = -INF
    log_probs = z.log_softmax(-1)
    token = z.argmax(-1) if token is None else token
    probs = log_probs.exp()
    two = torch.nn.functional.pad(probs, (0, 1)).topk(2).values
    entropy = -(probs * log_probs.clamp(min=-1e9)).sum(-1)
    return z, (log_probs.gather(1, token[:, None])[:, 0], two[:, 0] - two[:, 1], entropy)


def check(hidden, weight, impl="triton", *, noise_scale=0.0, noise_key=None, **options):
    """One call against float64; returns it."""
    found = lm_head_confidence(hidden, weight, noise_scale=noise_scale, noise_key=noise_key, impl=impl, **options)
    assert isinstance(found, Confidence) and found.token.dtype == torch.int64
    assert ((0 <= found.token) & (found.token < weight.shape[0])).all()
    z, oracles = from_logits(hidden, weight, torch.float64, found.token, **options)
    noisy = z
    if noise_key is not None:
        ids = torch.arange(weight.shape[0], device=hidden.device)
        noisy = z + by_row(noise_scale) * gumbel(keys_of(noise_key[:, None], ids))
    torch_z, same_dtype = from_logits(hidden, weight, torch.float32, found.token, **options)
    largest = z[z.isfinite()].abs().max().item()
    # the largest, up to rounding
    tolerance = 4 * (torch_z - z)[z.isfinite()].abs().max().item() + 1e-5 * (1 + largest)
    assert (noisy.gather(1, found.token[:, None])[:, 0] >= noisy.amax(-1) - tolerance).all()

    # the error budget of the other operators, over all statistics, whose roundings are those of the logits
    torch_error = max((x - oracle).abs().max().item() for x, oracle in zip(same_dtype, oracles, strict=True))
    budget = 2 * torch_error + 2 * torch.finfo(torch.float32).eps * max(largest, *(x.abs().max() for x in oracles))
    for result, oracle in zip(found[1:], oracles, strict=True):
        assert result.dtype == torch.promote_types(hidden.dtype, torch.float32)
        error = (result - oracle).abs().max().item()
        assert error <= budget, f"error {error:.3e} exceeds the budget {budget:.3e}; PyTorch's own is {torch_error:.3e}"
    return found


def keys_for(rows, device="cpu", seed=0):
    return keys_of(seed, torch.arange(rows, device=device))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 13, 40, 130])
def test_both_orientations(device, impl, dtype, rows):
    check(*inputs(rows, dtype=dtype, device=device), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise(device, impl, dtype):
    hidden, weight = inputs(13, dtype=dtype, device=device)
    found = check(hidden, weight, impl, noise_scale=1.0, noise_key=keys_for(13, device))
    assert not torch.equal(found.token, lm_head_confidence(hidden, weight, impl=impl).token)
    assert torch.equal(found.margin, lm_head_confidence(hidden, weight, impl=impl).margin)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(device, impl):
    found = lm_head_confidence(*inputs(0, device=device), impl=impl)
    assert [tensor.shape for tensor in found] == [(0,)] * 4
    assert [tensor.dtype for tensor in found] == [torch.int64] + [torch.float32] * 3
    keys = keys_for(0, device)
    assert lm_head_confidence(*inputs(0, device=device), noise_scale=1.0, noise_key=keys, impl=impl).token.shape == (0,)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("vocab, hidden_size", [(128, 64), (384, 64), (129, 1), (1, 5), (2, 65)])
def test_sizes(device, impl, rows, vocab, hidden_size):
    found = check(*inputs(rows, vocab, hidden_size, device=device), impl)
    if vocab == 1:
        assert (found.log_prob == 0).all() and (found.margin == 1).all() and (found.entropy == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [3, 40])
def test_ties_go_to_the_lowest_id(device, impl, rows):
    """Across parts, tiles and programs; small integers are exact in every order of summation."""
    hidden = torch.ones(rows, 64, device=device)
    weight = torch.zeros(700, 64, device=device)
    for ids in ([5, 70, 200, 699], [200, 699], [640, 641], [127, 128]):
        weight.zero_()
        weight[ids] = 1.0
        found = check(hidden, weight, impl)
        assert (found.token == ids[0]).all()
        assert (found.margin == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("noise_scale", [0.0, 0.7])
def test_excluded_ids(device, impl, rows, noise_scale):
    """As if these ids did not exist, even if a tile has no other id, or they are the likeliest."""
    hidden, weight = inputs(rows, 130, device=device)
    likeliest = (hidden @ weight.T).argmax(-1)
    exclude_ids = (129, 128, int(likeliest[0]), int(likeliest[1]), 128)
    keys = keys_for(rows, device) if noise_scale else None
    found = check(hidden, weight, impl, exclude_ids=exclude_ids, noise_scale=noise_scale, noise_key=keys)
    assert not torch.isin(found.token, torch.tensor(exclude_ids, device=device)).any()
    if noise_scale == 0:
        kept = torch.tensor([i for i in range(130) if i not in exclude_ids], device=device)
        without = lm_head_confidence(hidden, weight[kept], impl=impl)
        assert torch.equal(found.token, kept[without.token])
        torch.testing.assert_close(found.log_prob, without.log_prob)
    check(hidden, weight, impl, exclude_ids=())


@pytest.mark.parametrize("impl", IMPLS)
def test_one_id_left(device, impl):
    hidden, weight = inputs(3, 5, device=device)
    found = check(hidden, weight, impl, exclude_ids=[0, 1, 3, 4], noise_scale=9.0, noise_key=keys_for(3, device))
    assert (found.token == 2).all()
    assert (found.log_prob == 0).all() and (found.margin == 1).all() and (found.entropy == 0).all()
    hidden, weight = inputs(3, 300, device=device)
    found = check(hidden, weight, impl, exclude_ids=[i for i in range(300) if i != 130])
    assert (found.token == 130).all() and (found.log_prob == 0).all()


def test_excluded_ids_reach_the_device_once(device, monkeypatch):
    """They stay there, because CUDA graphs keep their addresses; no launch depends on their number."""
    monkeypatch.setattr(lm_head, "_EXCLUDED", {})
    hidden, weight = inputs(3, device=device)
    for exclude_ids in ([], [3], [9, 3, 9], [3, 9], [9, 3]):
        lm_head_confidence(hidden, weight, exclude_ids=exclude_ids, impl="triton")
    assert {ids: tensor.tolist() for (ids, _), tensor in lm_head._EXCLUDED.items()} == {
        (): [],
        (3,): [3],
        (3, 9): [3, 9],
    }
    # a launcher is called without checks
    expected = lm_head_confidence(hidden, weight, exclude_ids=[3, 9], impl="triton")
    found = lm_head._launch(hidden, weight, exclude_ids=(9, 3, 9))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [30, 60])
def test_very_confident_rows_keep_their_order(device, impl, rows):
    """A plain softmax in float32 would be 1 for all of them."""
    gaps = torch.linspace(24, 80, rows, device=device)
    hidden = torch.zeros(rows, 64, device=device)
    hidden[:, 0] = gaps
    weight = torch.zeros(300, 64, device=device)
    weight[77, 0] = 1.0
    assert (hidden @ weight.T).softmax(-1).amax(-1).unique().numel() == 1
    found = lm_head_confidence(hidden, weight, impl=impl)
    assert (found.token == 77).all()
    assert (found.log_prob.diff() > 0).all() and (found.entropy.diff() < 0).all()
    others = 299 * torch.exp(-gaps.double())
    torch.testing.assert_close(found.log_prob.double(), -torch.log1p(others), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(
        found.entropy.double(), torch.log1p(others) + gaps * others / (1 + others), rtol=1e-5, atol=0.0
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_logit_scale(device, impl):
    hidden, weight = inputs(5, device=device)
    keys = keys_for(5, device)
    found = check(hidden, weight, impl, logit_scale=2.5, noise_scale=1.0, noise_key=keys)
    scaled = lm_head_confidence(hidden, weight * 2.5, noise_scale=1.0, noise_key=keys, impl=impl)
    assert torch.equal(found.token, scaled.token)
    # the same softmax the other way round: dividing the logits is multiplying the noise
    other = lm_head_confidence(hidden, weight, noise_scale=1 / 2.5, noise_key=keys, impl=impl)
    assert torch.equal(found.token, other.token)


def test_scales_may_be_any_number(device):
    hidden, weight = torch.randn(2, 16, device=device), torch.randn(9, 16, device=device)
    whole, part = (lm_head_confidence(hidden, weight, logit_scale=s, impl="reference") for s in (Fraction(1, 2), 0.5))
    assert all(map(torch.equal, whole, part))


@pytest.mark.parametrize("impl", IMPLS)
def test_round_logits(device, impl):
    """Logits that differ by less than a rounding tie; float32 is not rounded."""
    hidden = torch.ones(5, 2, dtype=torch.float16, device=device)
    weight = torch.zeros(200, 2, dtype=torch.float16, device=device)
    weight[50] = torch.tensor([16.0, 0.0])
    weight[150] = torch.tensor([16.0, 2**-8])
    assert (check(hidden, weight, impl).token == 150).all()
    found = check(hidden, weight, impl, round_logits=True)
    assert (found.token == 50).all() and (found.margin == 0).all()
    assert (check(hidden.float(), weight.float(), impl, round_logits=True).token == 150).all()
    # products that are exact in float32 before they are rounded
    hidden, weight = inputs(5, device=device)
    hidden, weight = hidden.round().half(), ((weight * 1024).round() / 1024).half()
    assert not torch.equal(product(hidden, weight, torch.float32).half(), product(hidden, weight, torch.float64))
    check(hidden, weight, impl, round_logits=True, logit_scale=0.5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [5, 40])
def test_strided_rows(device, impl, rows):
    hidden, weight = inputs(rows, device=device)
    wide_hidden, wide_weight = torch.full((rows, 99), INF, device=device), torch.full((600, 77), INF, device=device)
    wide_hidden[:, 3:73], wide_weight[::2, :70] = hidden, weight
    found = check(wide_hidden[:, 3:73], wide_weight[::2, :70], impl)
    for one, other in zip(found, lm_head_confidence(hidden, weight, impl=impl), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [5, 40])
def test_a_row_of_nan_is_loud_and_alone(device, impl, rows):
    hidden, weight = inputs(rows, device=device)
    expected = lm_head_confidence(hidden, weight, impl=impl)
    hidden[3] = math.nan
    found = lm_head_confidence(hidden, weight, impl=impl)
    others = torch.arange(rows, device=device) != 3
    assert 0 <= found.token[3] < 300
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[others], other[others])
        assert one.dtype == torch.int64 or one[3].isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_noise_depends_on_the_key_alone(device, impl):
    """Not on other rows, nor on the tiles that their number selects."""
    hidden, weight = inputs(45, device=device)
    keys = keys_for(45, device)
    options = dict(noise_scale=1.0, impl=impl)
    found = lm_head_confidence(hidden, weight, noise_key=keys, **options)
    few = lm_head_confidence(hidden[30:33], weight, noise_key=keys[30:33], **options)
    assert torch.equal(found.token[30:33], few.token)
    assert not torch.equal(found.token, lm_head_confidence(hidden, weight, noise_key=keys.flip(0), **options).token)


@pytest.mark.parametrize("impl, samples", [("triton", 256), ("reference", 40_000)])
def test_samples_follow_the_softmax(device, impl, samples):
    z = torch.linspace(-2, 1, 12, device=device)
    hidden, weight = torch.ones(samples, 1, device=device), z[:, None]
    for logit_scale, noise_scale in ((1.0, 0.5), (2.0, 1.0)):
        found = lm_head_confidence(
            hidden,
            weight,
            logit_scale=logit_scale,
            noise_scale=noise_scale,
            noise_key=keys_for(samples, device, seed=4),
            impl=impl,
        )
        expected = samples * (z.double() * logit_scale / noise_scale).softmax(0)
        statistic = ((found.token.bincount(minlength=12) - expected) ** 2 / expected).sum()
        assert statistic < 11 + 5 * math.sqrt(22)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [6, 40])
def test_scales_of_rows(device, impl, rows):
    """Equal scales act like a float; a row with its own scale acts as if alone; a noise scale of 0 is no noise."""
    hidden, weight = inputs(rows, 130, device=device)
    hidden[2] = 0.0
    keys = keys_for(rows, device)

    def same(one, other):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))

    def scales(*values):
        return torch.tensor(values, device=device).repeat(rows // len(values) + 1)[:rows]

    options = dict(exclude_ids=[7], impl=impl)
    found = check(hidden, weight, logit_scale=scales(0.5), noise_scale=scales(1.0), noise_key=keys, **options)
    same(found, lm_head_confidence(hidden, weight, logit_scale=0.5, noise_scale=1.0, noise_key=keys, **options))
    found = check(hidden, weight, logit_scale=scales(0.5), **options)
    same(found, lm_head_confidence(hidden, weight, logit_scale=0.5, **options))
    found = check(hidden, weight, noise_scale=scales(0.0), noise_key=keys, **options)
    same(found, lm_head_confidence(hidden, weight, **options))

    logit_scale, noise_scale = scales(1.0, 0.25, 4.0, 2.0), scales(1.0, 0.5, 0.0)
    found = check(hidden, weight, logit_scale=logit_scale, noise_scale=noise_scale, noise_key=keys, **options)
    assert found.token[2] == 0
    for row in (0, 2, 5):
        alone = lm_head_confidence(
            hidden[row : row + 1],
            weight,
            logit_scale=logit_scale[row].item(),
            noise_scale=noise_scale[row].item(),
            noise_key=keys[row : row + 1],
            **options,
        )
        assert found.token[row] == alone.token[0]
        torch.testing.assert_close(found.log_prob[row], alone.log_prob[0])


def tiles_of(monkeypatch, *, merge=None, num_sms=3, **sizes):
    """Small tiles, so that a few rows have several blocks, on a GPU of `num_sms` SMs that hold one block each."""
    launch = LMHeadConfig(
        **(dict(block_r=16, block_v=64, block_d=64) | sizes), num_warps=4, num_stages=2, blocks_per_sm=1
    )
    monkeypatch.setattr(lm_head, "lm_head_config", lambda *arguments: launch)
    monkeypatch.setattr(lm_head, "num_sms", lambda device: num_sms)
    if merge is not None:
        monkeypatch.setattr(lm_head, "lm_head_merge_config", lambda device: merge)


@pytest.mark.parametrize("impl", IMPLS)
def test_padding(device, monkeypatch, impl):
    """Whatever padding holds, valid rows are those of a call without it, and padding has defined results."""
    tiles_of(monkeypatch)
    hidden, weight = inputs(20, 100, device=device)
    keys, scale = keys_for(20, device), torch.linspace(0.5, 2, 20, device=device)

    def call(rows, noisy, **options):
        if noisy:
            options |= dict(noise_scale=0.5, noise_key=keys[:rows])
        return lm_head_confidence(
            hidden[:rows], weight, logit_scale=scale[:rows], exclude_ids=[7], impl=impl, **options
        )

    whole_blocks = {(rows, noisy): call(rows, noisy) for rows in (16, 20) for noisy in (False, True)}
    # around the ends of blocks, each with noise and without
    for count in (20, 19, 18, 17, 16, 15, 2, 1, 0, -1, -(2**31)):
        real = max(count, 0)
        hidden[real:], scale[real:] = math.nan, math.nan
        noisy = count % 2 == 1
        found = call(20, noisy, cu_seqlens=torch.tensor([0, 99, count], dtype=torch.int32, device=device))
        expected = whole_blocks[16 if real <= 16 else 20, noisy]
        for one, other, of_padding in zip(found, expected, (0, -INF, 0, 0), strict=True):
            assert one.shape == (20,) and (one[real:] == of_padding).all()
            if impl == "triton":
                assert torch.equal(one[:real], other[:real])
            else:
                # the number of rows changes how PyTorch sums
                torch.testing.assert_close(one[:real], other[:real])


@pytest.mark.parametrize("impl", IMPLS)
def test_counts_beyond_the_rows(device, monkeypatch, impl):
    tiles_of(monkeypatch)
    hidden, weight = inputs(20, device=device)
    expected = check(hidden, weight, impl)
    for count in (20, 21, 2**31 - 1):
        found = lm_head_confidence(hidden, weight, cu_seqlens=cumulative([count], device), impl=impl)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    none = cumulative([], device)
    assert lm_head_confidence(hidden, weight, cu_seqlens=none, impl=impl).token.tolist() == [0] * 20
    assert lm_head_confidence(hidden[:0], weight, cu_seqlens=none, impl=impl).token.shape == (0,)


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter")
def test_padding_costs_no_tile(monkeypatch):
    """It is not read or multiplied, and the programs of its blocks take an even share of the work."""
    tiles_of(monkeypatch, num_sms=4)
    hidden, weight = inputs(60, 300)
    tiles, add_tile = [], lm_head._add_tile

    def watched(state, z, first_id, *rest):
        assert not np.isnan(z.handle.data).any()
        tiles.append(first_id)
        return add_tile(state, z, first_id, *rest)

    monkeypatch.setattr(lm_head, "_add_tile", watched)
    for count in (60, 48, 17, 16, 1, 0):
        hidden[count:] = math.nan
        tiles.clear()
        lm_head_confidence(hidden, weight, cu_seqlens=cumulative([count]), impl="triton")
        assert sorted(tiles) == sorted([0, 64, 128, 192, 256] * math.ceil(count / 16))


@pytest.mark.parametrize("count", [16, 40])
def test_no_more_slices_than_the_merge_has_room_for(device, monkeypatch, count):
    """If few of many blocks have valid rows, each of them would get more programs than that."""
    tiles_of(monkeypatch, merge=LMHeadMergeConfig(block_m=4, max_slices=2, num_warps=1))
    hidden, weight = inputs(70, device=device)
    found = lm_head_confidence(hidden, weight, cu_seqlens=cumulative([count], device), impl="triton")
    for one, other in zip(found, check(hidden[:count], weight, "reference"), strict=True):
        torch.testing.assert_close(one[:count], other)


@pytest.mark.parametrize("rows, noise_scale", [(13, 1.0), (40, 0.0)])
def test_any_number_of_programs(device, monkeypatch, rows, noise_scale):
    """Partial results merge to the same, up to rounding."""
    hidden, weight = inputs(rows, 600, device=device)
    keys = keys_for(rows, device) if noise_scale else None
    expected = None
    for processors in (0, 1, 9):
        monkeypatch.setattr(lm_head, "num_sms", lambda device, count=processors: count)
        found = check(hidden, weight, noise_scale=noise_scale, noise_key=keys)
        assert expected is None or torch.equal(found.token, expected)
        expected = found.token


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("block_r", [16, 64])
def test_parts_of_a_tile(device, monkeypatch, block_r, parts):
    tiles_of(monkeypatch, block_r=block_r, block_d=32, parts=parts)
    check(*inputs(20, 130, 40, device=device), noise_scale=0.5, noise_key=keys_for(20, device), exclude_ids=[9, 70])


@given(data=st.data())
def test_anything(device, data):
    rows = data.draw(st.sampled_from([1, 2, 7, 33]))
    vocab, hidden_size = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 100))
    exclude_ids = data.draw(st.lists(st.integers(0, vocab - 1), max_size=min(3, vocab - 1)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    hidden, weight = inputs(rows, vocab, hidden_size, spread=data.draw(st.sampled_from([0.0, 1.0, 20.0])), dtype=dtype)
    noise_scale = data.draw(st.sampled_from([0.0, 0.3]))
    check(
        hidden.to(device),
        weight.to(device),
        data.draw(st.sampled_from(IMPLS)),
        exclude_ids=exclude_ids,
        logit_scale=data.draw(st.sampled_from([1.0, 0.5])),
        noise_scale=noise_scale,
        noise_key=keys_for(rows, device) if noise_scale else None,
    )


def test_the_reference_works_in_float64_and_by_chunks(device, monkeypatch):
    hidden, weight = inputs(20, 128 * 3, dtype=torch.float64, device=device)
    keys = keys_for(20, device)
    options = dict(noise_scale=0.5, noise_key=keys, exclude_ids=[7])
    whole = check(hidden, weight, "reference", **options)
    largest = max(z.numel() for z in logits_made(monkeypatch, lambda: lm_head_confidence(hidden, weight, **options)))
    assert largest == 20 * 128 * 3
    monkeypatch.setattr(reference, "LOGITS_AT_A_TIME", 128 * 3 * 7)
    monkeypatch.setattr(reference, "NOISE_AT_A_TIME", 128 * 3 * 3)
    made = logits_made(monkeypatch, lambda: lm_head_confidence(hidden, weight, **options))
    assert max(z.numel() for z in made) == 128 * 3 * 7
    for one, other in zip(lm_head_confidence(hidden, weight, **options), whole, strict=True):
        torch.testing.assert_close(one, other)
    # 16-bit weights are converted in parts too
    halves = hidden.half(), weight.half()
    torch.testing.assert_close(
        lm_head_confidence(*halves).log_prob, lm_head_confidence(halves[0].float(), halves[1].float()).log_prob
    )


def test_the_reference_finds_maxima_in_blocks(device):
    """The maximum of many logits in two levels is the same, with the lowest of tied ids."""
    z = torch.randint(0, 40, (130, 640), generator=torch.Generator().manual_seed(0)).float().to(device)
    z[7, [130, 500]], z[8, [127, 128]] = 99.0, 99.0
    assert z.numel() >= 2**16
    for one, other in zip(reference._largest(z), z.max(-1), strict=True):
        assert torch.equal(one, other)
    check(z[:, :64], torch.eye(640, 64, device=device), "reference")
    z[9, 300] = math.nan
    assert reference._largest(z)[0][9].isnan() and reference._largest(z)[1][9] == 300


def logits_made(monkeypatch, call):
    """The logits that the reference computes during a call."""
    made, make = [], reference._logits
    with monkeypatch.context() as patch:
        patch.setattr(reference, "_logits", lambda *arguments: made.append(make(*arguments)) or made[-1])
        call()
    return made


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [256, 300])
def test_confidence_of_logits(device, dtype, vocab):
    """The confidences of given logits, some of them -inf, which are left unchanged."""
    hidden, weight = inputs(6, vocab, device=device)
    z = (hidden @ weight.T).to(dtype)
    z[:, 3], z[0, 5:] = -INF, -INF
    before, keys = z.clone(), keys_for(6, device)
    found = reference.confidence_of_logits(z, noise_scale=0.5, noise_key=keys)
    assert torch.equal(z, before)
    ids = torch.arange(vocab, device=device)
    assert torch.equal(found.token, (z.double() + 0.5 * gumbel(keys_of(keys[:, None], ids))).argmax(-1))
    identity = torch.eye(vocab, dtype=torch.float64, device=device)
    _, expected = from_logits(z.double().clamp(min=-1e30), identity, torch.float64, found.token)
    for result, oracle in zip(found[1:], expected, strict=True):
        assert result.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(result.double(), oracle, atol=1e-5, rtol=1e-5)
    assert torch.equal(reference.confidence_of_logits(z).token, z.argmax(-1))


def call(**changes):
    hidden, weight = inputs(4)
    return lm_head_confidence(**(dict(hidden=hidden, weight=weight) | changes))


def zeros(*shape, dtype=torch.float32, **kw):
    return torch.zeros(shape, dtype=dtype, **kw)


KEY = zeros(4, dtype=torch.int64)
ERRORS = [
    ("hidden rank", dict(hidden=zeros(1, 4, 70)), ValueError, r"hidden must have shape \(rows, hidden_size\).*got \(1, 4, 70\)"),
    ("hidden dtype", dict(hidden=zeros(4, 70, dtype=torch.int32)), TypeError, "hidden must be float16.*got torch.int32"),
    ("weight shape", dict(weight=zeros(300, 71)), ValueError, r"weight must have shape \(vocab, hidden_size\) = \(\*, 70\), got \(300, 71\)"),
    ("weight dtype", dict(weight=zeros(300, 70).half()), TypeError, "weight must have the dtype of hidden"),
    ("device", dict(weight=zeros(300, 70, device="meta")), ValueError, "weight must be on the device of hidden, cpu"),
    ("hidden stride", dict(hidden=zeros(70, 4).T), ValueError, r"last dim of hidden must be contiguous.*\.contiguous"),
    ("weight stride", dict(weight=zeros(70, 300).T), ValueError, "last dim of weight must be contiguous"),
    ("grad", dict(weight=zeros(300, 70, requires_grad=True)), ValueError, "inference only, but weight requires grad"),
    ("logit_scale", dict(logit_scale=0.0), ValueError, "logit_scale must be positive and finite, got 0.0"),
    ("infinite scale", dict(logit_scale=INF), ValueError, "logit_scale must be positive and finite, got inf"),
    ("noise_scale", dict(noise_scale=-0.5), ValueError, "noise_scale must be at least 0 and finite, got -0.5"),
    ("nan", dict(noise_scale=math.nan), ValueError, "noise_scale must be at least 0 and finite, got nan"),
    ("no key", dict(noise_scale=1.0), ValueError, "noise_scale > 0, or a tensor, needs noise_key; pass"),
    ("no keys", dict(noise_scale=zeros(4)), ValueError, "noise_scale > 0, or a tensor, needs noise_key; pass"),
    ("scale dtype", dict(logit_scale=zeros(4).double()), TypeError, "logit_scale must be float32, got torch.float64"),
    ("scale rank", dict(logit_scale=zeros()), ValueError, r"logit_scale must have shape \(rows,\) = \(4\), got \(\)"),
    ("noise shape", dict(noise_scale=zeros(4, 1)), ValueError, r"noise_scale must have shape \(rows,\) = \(4\), got \(4, 1\)"),
    ("scale stride", dict(logit_scale=zeros(4, 2)[:, 0]), ValueError, "last dim of logit_scale must be contiguous"),
    ("scale device", dict(logit_scale=zeros(4, device="meta")), ValueError, "logit_scale must be on the device"),
    ("scale grad", dict(noise_scale=zeros(4, requires_grad=True)), ValueError, "but noise_scale requires grad"),
    ("counts dtype", dict(cu_seqlens=KEY.float()), TypeError, "cu_seqlens must be int32 or int64, got torch.f"),
    ("counts rank", dict(cu_seqlens=KEY.int()[None]), ValueError, r"cu_seqlens must have shape \(batch \+ 1,\)"),
    ("no counts", dict(cu_seqlens=KEY.int()[:0]), ValueError, r"cu_seqlens must have shape \(batch \+ 1,\), at least one element"),
    ("counts device", dict(cu_seqlens=KEY.int().to("meta")), ValueError, "cu_seqlens must be on the device"),
    ("key dtype", dict(noise_key=KEY.int()), TypeError, "noise_key must be int64, got torch.int32"),
    ("key shape", dict(noise_key=KEY[:3]), ValueError, r"noise_key must have shape \(rows,\) = \(4\), got \(3,\)"),
    ("key device", dict(noise_key=KEY.to("meta")), ValueError, "noise_key must be on the device"),
    ("ids tensor", dict(exclude_ids=KEY), TypeError, "exclude_ids must be a sequence of ints, got tensor"),
    ("ids bool", dict(exclude_ids=[True]), TypeError, r"exclude_ids must be a sequence of ints, got \[True\]"),
    ("ids high", dict(exclude_ids=[5, 300]), ValueError, r"exclude_ids must lie in 0 .. vocab - 1 = 299, got \[5, 300\]"),
    ("ids negative", dict(exclude_ids=(-1,)), ValueError, r"exclude_ids must lie in 0 .. vocab - 1 = 299, got \(-1,\)"),
    ("all ids", dict(exclude_ids=list(range(300))), ValueError, "at least one id must be left.*vocab 300 and 300 excluded"),
    ("no vocabulary", dict(weight=zeros(0, 70)), ValueError, "at least one id must be left.*vocab 0"),
    ("impl", dict(impl="cuda"), ValueError, "impl must be one of .*got 'cuda'"),
    ("float64", dict(hidden=zeros(4, 70).double(), weight=zeros(300, 70).double(), impl="triton"), NotImplementedError, "no float64 kernels"),
]  # fmt: skip


@pytest.mark.parametrize("changes, error, message", [pytest.param(*case[1:], id=case[0]) for case in ERRORS])
def test_bad_input(changes, error, message):
    call()
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(device, impl):
    hidden, weight = inputs(4, 40, 16, device=device)
    operator = torch.ops.dkv.lm_head_confidence
    torch.library.opcheck(operator, (hidden, weight, 1.0, 0.0, None, [], False, None, None, None, impl))
    keys, count = keys_for(4, device), cumulative([1, 2], device)
    torch.library.opcheck(operator, (hidden, weight, 0.5, 1.0, keys, [3, 9], True, count, None, None, impl))
    scales = torch.ones(4, device=device), torch.zeros(4, device=device)
    torch.library.opcheck(operator, (hidden, weight, None, None, keys, [3], False, None, *scales, impl))


def test_compiles_without_a_graph_break(device):
    hidden, weight = inputs(4, device=device)
    keys = keys_for(4, device)

    def head(hidden, noise_scale, cu_seqlens=None):
        options = dict(noise_scale=noise_scale, noise_key=keys, exclude_ids=(3, 9), cu_seqlens=cu_seqlens)
        found = lm_head_confidence(hidden * 1.0, weight, **options)
        return found.token + 1, found.log_prob.exp()

    code = []

    def backend(graph, arguments):
        code.append(graph.code)
        return aot_eager(graph, arguments)

    for options in ((0.5,), (torch.linspace(0, 1, 4, device=device), cumulative([1, 2], device))):
        with torch.no_grad():
            compiled = torch.compile(head, fullgraph=True, backend=backend)(hidden, *options)
        assert "torch.ops.dkv.lm_head_confidence" in code.pop()
        for one, other in zip(compiled, head(hidden, *options), strict=True):
            torch.testing.assert_close(one, other)


def test_the_interpreter_tries_both_orientations():
    """The launcher puts the vocabulary first in tiles of up to 32 rows."""
    assert {config.block_r <= 32 for config in LM_HEAD_INTERPRETER} == {True, False}


@pytest.mark.gpu
@pytest.mark.parametrize("vocab, hidden_size", [(126464, 4096), (152064, 3584)], ids=["llada", "dream"])
@pytest.mark.parametrize("rows", [1, 17, 64, 100, 300])
@pytest.mark.parametrize("noise_scale", [0.0, 1.0])
def test_true_sizes(vocab, hidden_size, rows, noise_scale):
    hidden, weight = inputs(rows, vocab, hidden_size, spread=4.0, dtype=torch.bfloat16, device="cuda")
    keys = keys_for(rows, "cuda") if noise_scale else None
    found = check(hidden, weight, exclude_ids=[vocab - 128], noise_scale=noise_scale, noise_key=keys)
    again = lm_head_confidence(hidden, weight, exclude_ids=[vocab - 128], noise_scale=noise_scale, noise_key=keys)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.gpu
def test_offsets_beyond_int32():
    """Rows of the weight whose element offsets pass 2^31."""
    hidden, weight = inputs(3, 200, 64, dtype=torch.bfloat16, device="cuda")
    storage = torch.zeros(200 * 2**24, dtype=torch.bfloat16, device="cuda")
    far = storage.as_strided((200, 64), (2**24, 1))
    far.copy_(weight)
    check(hidden, far)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """A recorded call computes as many rows as there are when it is replayed."""
    hidden, weight = inputs(40, dtype=torch.bfloat16, device="cuda")
    options = dict(exclude_ids=[7], cu_seqlens=cumulative([40], "cuda"))
    lm_head_confidence(hidden, weight, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = lm_head_confidence(hidden, weight, **options)
    for count in (40, 3, 0, 17):
        options["cu_seqlens"][-1] = count
        graph.replay()
        expected = lm_head_confidence(hidden, weight, **options)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.sanitizer
def test_small_run_for_the_sanitizer(device):
    hidden, weight = inputs(5, dtype=torch.float16, device=device)
    noise = dict(noise_scale=torch.ones(5, device=device), noise_key=keys_for(5, device))
    check(hidden, weight, exclude_ids=[3], **noise)
    lm_head_confidence(hidden, weight, exclude_ids=[3], cu_seqlens=cumulative([2], device), impl="triton", **noise)
