"""Counter-based random numbers: the same for the same key, whatever the batch, the tiling or the order."""

import torch

_LOW = 0xFFFFFFFF


def _mix(h):
    """The finaliser of MurmurHash3 on 32-bit values held in int64."""
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _LOW
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _LOW
    return h ^ (h >> 16)


def noise_key(seed, *counters):
    """A 32-bit key from the seed and integer tensors that broadcast against each other, int64."""
    key = torch.as_tensor(seed, dtype=torch.int64) & _LOW
    for counter in counters:
        key = _mix((key ^ _mix(counter.long() & _LOW)) + 0x9E3779B9 & _LOW)
    return key


def uniform(key):
    """float64 in the open interval (0, 1) for each key."""
    return (_mix(key) + 0.5) / 2.0**32


def gumbel(key):
    """A standard Gumbel variate for each key, float64."""
    return -torch.log(-torch.log(uniform(key)))
