"""Counter-based random numbers: the same for any batch, tiling and device.

A key is a 32-bit hash of a seed and any counters: request, step, position. The draw for one more counter, v, is

    h = mix(noise_key(key, v)),    u = (h + 1/2) / 2^32,    Gumbel = -log(-log1p(-u))

with `mix` the finaliser of MurmurHash3, a bijection of 32-bit words. Large Gumbel variates, which decide an argmax over
many ids, come from small u, where floating point is finest. The functions for tensors hold the words in int64. The
`triton.jit` functions compute the same hash in uint32, and the variate in float32 without losing either tail.
"""

from typing import Any

from torch import Tensor

from dkv.kernels.language import tl, triton

MIX_1 = tl.constexpr(0x85EBCA6B)
MIX_2 = tl.constexpr(0xC2B2AE35)
GOLDEN = tl.constexpr(0x9E3779B9)
ALL_BITS = tl.constexpr(0xFFFFFFFF)


def _word(counter):
    """The low 32 bits of an int or of an integer tensor."""
    return (counter.long() if isinstance(counter, Tensor) else counter) & ALL_BITS.value


def _mix(h):
    # a new tensor, which the rest updates in place
    h = h ^ (h >> 16)
    h *= MIX_1.value
    h &= ALL_BITS.value
    h ^= h >> 13
    h *= MIX_2.value
    h &= ALL_BITS.value
    h ^= h >> 16
    return h


def noise_key(seed: int | Tensor, *counters: int | Tensor) -> Tensor | Any:
    """A 32-bit key from a seed or another key, and counters.

    Args:
        seed: an int or an integer tensor.
        counters: ints or integer tensors. All tensors are on one device and broadcast against each other.

    Returns:
        int64 of the broadcast shape, 0 .. 2^32 - 1; an int if no argument is a tensor.

    Example:
        >>> keys = noise_key(seed, rows, step, positions)
        >>> noise = gumbel(noise_key(keys[..., None], torch.arange(vocab, device=keys.device)))
    """
    key = _word(seed)
    for counter in counters:
        key = key ^ _mix(_word(counter))
        key += GOLDEN.value
        key &= ALL_BITS.value
        key = _mix(key)
    return key


def uniform(key: Tensor) -> Tensor:
    """float64 in the open interval (0, 1) for each key of an int64 tensor."""
    return _mix(key).double().add_(0.5).mul_(2.0**-32)


def gumbel(key: Tensor) -> Tensor:
    """A standard Gumbel variate, float64, for each key of an int64 tensor; between -3.2 and 22.9."""
    return uniform(key).neg_().log1p_().neg_().log_().neg_()


@triton.jit
def mix(h):
    h = (h ^ (h >> 16)) * MIX_1
    h = (h ^ (h >> 13)) * MIX_2
    return h ^ (h >> 16)


@triton.jit
def key_of(key, counter):
    """`noise_key` of uint32 keys and counters that broadcast."""
    return mix((key ^ mix(counter)) + GOLDEN)


@triton.jit
def draw(key, counter):
    """The hash h of uint32 keys and counters that broadcast."""
    return mix(key_of(key, counter))


@triton.jit
def gumbel_of(h):
    """The Gumbel variate of a hash in float32, as precise as `gumbel` rounded.

    It works on u or, in the upper half, on 1 - u: the smaller of the two has the finer floating point.
    """
    upper = h > 0x7FFFFFFF
    small = (tl.where(upper, h ^ ALL_BITS, h).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # w = 1 - u is rounded, but the error cancels in log(w) * u / (1 - w) (after Kahan); never 0 / 0
    w = tl.where(upper, small, 1.0 - small)
    exponential = -tl.log(w) * tl.where(upper, 1.0, small / tl.maximum(1.0 - w, 1e-8))
    return -tl.log(tl.where(w == 1.0, small, exponential))


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 in float32, precise for small x by the same means."""
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * (x / tl.maximum(w - 1.0, 1e-8)))
