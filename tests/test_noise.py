"""Counter-based noise: tensors and kernels draw the same numbers, of the right distribution, without inf or NaN."""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dkv.kernels import noise
from dkv.kernels.noise import gumbel, noise_key, uniform

EXTREME_HASHES = [0, 1, 2, 255, 2**23, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2**8, 2**32 - 2, 2**32 - 1]


def key_of_hash(h):
    """The key that `uniform` mixes to h: the mixer is a bijection, undone step by step."""
    h ^= h >> 16
    h = h * pow(0xC2B2AE35, -1, 2**32) % 2**32
    h ^= h >> 13 ^ h >> 26
    h = h * pow(0x85EBCA6B, -1, 2**32) % 2**32
    return h ^ h >> 16


@triton.jit
def _draw_kernel(keys_ptr, counters_ptr, hashes_ptr, gumbel_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keys = tl.load(keys_ptr + offs, mask=offs < n, other=0).to(tl.uint32)
    counters = tl.load(counters_ptr + offs, mask=offs < n, other=0).to(tl.uint32)
    h = noise.draw(keys, counters)
    tl.store(hashes_ptr + offs, h.to(tl.int64), mask=offs < n)
    tl.store(gumbel_ptr + offs, noise.gumbel_of(h), mask=offs < n)


def draw(keys, counters):
    """Hashes and Gumbel variates as a kernel draws them."""
    hashes, variates = torch.empty_like(keys), torch.empty(keys.shape, device=keys.device)
    grid = (triton.cdiv(keys.numel(), 4096),)
    _draw_kernel[grid](keys, counters, hashes, variates, keys.numel(), BLOCK=4096)
    return hashes, variates


def some_keys(shape, device):
    return torch.randint(0, 2**32, shape, generator=torch.Generator().manual_seed(0)).to(device)


def test_kernels_draw_the_same(device):
    """Hashes bit for bit; variates to one rounding of float32, in both tails too."""
    keys = some_keys((50_000,), device)
    counters = torch.arange(50_000, device=device) % 1000 + torch.tensor([0, 151_000], device=device).repeat(25_000)
    extremes = torch.tensor([key_of_hash(h) for h in EXTREME_HASHES], device=device)
    # undo the mixing of the counter 0, which is 0, and the constant added to it
    first = torch.tensor([(key_of_hash(k) - 0x9E3779B9) % 2**32 for k in extremes.tolist()], device=device)
    keys, counters = torch.cat((keys, first)), torch.cat((counters, torch.zeros_like(first)))

    hashes, variates = draw(keys, counters)
    expected = noise_key(keys, counters)
    assert torch.equal(hashes[-len(EXTREME_HASHES) :].cpu(), torch.tensor(EXTREME_HASHES))
    assert torch.equal(hashes, (uniform(expected) * 2**32 - 0.5).long())
    oracle = gumbel(expected)
    assert variates.isfinite().all() and oracle.isfinite().all()
    # a GPU's division and logarithms are not rounded correctly
    assert ((variates - oracle).abs() <= 4e-7 * (1 + oracle.abs())).all()


def test_the_mixer_is_that_of_murmurhash3():
    hashes = [round(uniform(torch.tensor(key)).item() * 2**32 - 0.5) for key in (0, 1, 2)]
    assert hashes == [0, 0x514E28B7, 0x30F4C306]


def test_variates_of_extreme_hashes(device):
    keys = torch.tensor([key_of_hash(h) for h in EXTREME_HASHES], device=device)
    u = uniform(keys)
    assert u.dtype == torch.float64 and (0 < u).all() and (u < 1).all()
    assert u.tolist() == [(h + 0.5) / 2**32 for h in EXTREME_HASHES]
    variates = gumbel(keys)
    assert variates.dtype == torch.float64
    # large variates come from small hashes
    assert (variates.diff() < 0).all() and 22.8 < variates[0] < 22.9 and -3.2 < variates[-1] < -3.1


def test_keys_are_functions_of_their_counters(device):
    seed, rows, positions = 2**40 + 12345, torch.arange(3, device=device)[:, None], torch.arange(5, device=device)
    keys = noise_key(seed, rows, 7, positions)
    assert keys.shape == (3, 5) and keys.dtype == torch.int64 and (0 <= keys).all() and (keys < 2**32).all()
    assert len(set(keys.flatten().tolist())) == 15
    assert torch.equal(keys[2:, 1:], noise_key(torch.tensor(seed, device=device), 2, 7, positions[1:].int())[None])
    assert keys[1, 4].item() == noise_key(seed, 1, 7, 4)
    assert not (keys == noise_key(seed, rows, 8, positions)).any()
    assert not (keys == noise_key(seed + 1, rows, 7, positions)).any()
    assert noise_key(seed, 1, 2) != noise_key(seed, 2, 1)


def test_arguments_are_left_as_they_are(device):
    keys, counters = some_keys((9,), device), torch.arange(9, device=device)
    before = keys.clone(), counters.clone()
    gumbel(noise_key(keys, counters))
    uniform(keys)
    assert torch.equal(keys, before[0]) and torch.equal(counters, before[1])


class RefuseOtherDevices(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.device.type == "cuda" for tensor in tensors), func
        return result


@pytest.mark.parametrize("seed_is_tensor", [False, True])
def test_nothing_leaves_the_device(seed_is_tensor):
    """Noise can be drawn inside a CUDA graph."""
    with FakeTensorMode(), RefuseOtherDevices():
        rows = torch.empty((4, 1), dtype=torch.int64, device="cuda")
        seed = torch.empty((), dtype=torch.int64, device="cuda") if seed_is_tensor else 5
        assert gumbel(noise_key(seed, rows, 3, torch.empty(6, dtype=torch.int32, device="cuda"))).shape == (4, 6)


def test_moments(device):
    """Mean Euler's constant, variance pi^2 / 6; rows, steps and ids are not correlated."""
    rows, ids = torch.arange(64, device=device)[:, None], torch.arange(8192, device=device)
    noise_of_step = [gumbel(noise_key(noise_key(3, rows, step), ids)) for step in (0, 1)]
    g = noise_of_step[0]
    n = g.numel()
    assert abs(g.mean() - 0.5772156649) < 5 * math.sqrt(math.pi**2 / 6 / n)
    assert abs(g.var() / (math.pi**2 / 6) - 1) < 5 * math.sqrt(4.4 / n)
    for other in (noise_of_step[1], g.roll(1, dims=0), g.roll(1, dims=1)):
        correlation = torch.corrcoef(torch.stack((g.flatten(), other.flatten())))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(n)


def chi_square(counts, probabilities):
    """Distance of the statistic from its mean, in standard deviations."""
    expected = probabilities * counts.sum()
    degrees = counts.numel() - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees)


def test_uniform_fills_its_bins(device):
    keys = noise_key(1, torch.arange(1000, device=device)[:, None], torch.arange(1000, device=device))
    counts = (uniform(keys).flatten() * 1024).long().bincount(minlength=1024)
    assert abs(chi_square(counts, torch.full((1024,), 1 / 1024, dtype=torch.float64, device=device))) < 5


def test_the_argmax_samples_from_the_softmax(device):
    z = torch.linspace(-3, 2, 40, dtype=torch.float64, device=device)
    keys = noise_key(11, torch.arange(100_000, device=device))
    tokens = (z + gumbel(noise_key(keys[:, None], torch.arange(40, device=device)))).argmax(-1)
    assert abs(chi_square(tokens.bincount(minlength=40), z.softmax(0))) < 5
