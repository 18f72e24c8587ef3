"""No values of their arguments make the kernels touch memory outside of their tensors, and their twins agree with them.

Every tensor, also those that the launchers allocate, lies in a buffer of its own with a fence around and between what
belongs to it; and under Triton's interpreter every address of every load and store is compared with the elements of the
tensors that the kernel was given.
"""

import itertools
import random
import sys
from collections import Counter as Tally
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

import dkv.kernels
from dkv.kernels import DeferredNorm, commit, gate_up, packing, qkv, reference, residual
from dkv.kernels.configs import BlockConfig, CommitConfig, ProductConfig
from dkv.kernels.direct import TRITON
from dkv.kernels.reference import Packed
from dkv.kernels.rows import MASKED, PROMPT, Counter, Rule, Size

FENCE = 64


def foreign(dtype):
    """Values of the fences, which show wherever they are read."""
    return float("nan") if dtype.is_floating_point else dtype == torch.bool or 77


class Fences:
    """Tensors in buffers of their own; `check` raises if the memory around them has changed."""

    def __init__(self):
        self.buffers = []

    def allocate(self, shape, dtype, device, *, strided=False):
        """A tensor of foreign values, contiguous or with gaps in each of its dims."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if strided:
            buffer = torch.full([size + 3 for size in shape], foreign(dtype), dtype=dtype, device=device)
            inside = tuple(slice(1, 1 + size) for size in shape)
            self.buffers.append((buffer, lambda whole: whole[inside]))
        else:
            count = int(np.prod(shape, dtype=np.int64))
            buffer = torch.full((count + 2 * FENCE,), foreign(dtype), dtype=dtype, device=device)
            self.buffers.append((buffer, lambda whole: whole[FENCE : FENCE + count].view(shape)))
        return self.buffers[-1][1](buffer)

    def copy(self, value, *, strided=False):
        if isinstance(value, DeferredNorm):
            return DeferredNorm(self.copy(value.weighted, strided=strided), self.copy(value.square_sums))
        if not isinstance(value, torch.Tensor):
            return value
        return self.allocate(value.shape, value.dtype, value.device, strided=strided).copy_(value)

    def check(self):
        for buffer, inside in self.buffers:
            outside = torch.ones_like(buffer, dtype=torch.bool)
            inside(outside).fill_(False)
            values = buffer[outside]
            intact = values.isnan() if values.is_floating_point() else values == foreign(values.dtype)
            assert intact.all(), f"written outside of a tensor of shape {tuple(inside(buffer).shape)}"


class Watch:
    """Counts the accesses of interpreted kernels, and blocks those outside of their tensors."""

    def __init__(self, patch):
        self.accesses, self.outside = 0, Tally()
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        run, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
        atomic = builder.create_atomic_rmw
        patch.setattr(executor, "__call__", lambda *args, **kwargs: self._run(run, *args, **kwargs))
        patch.setattr(
            builder,
            "create_masked_load",
            lambda self_, ptrs, mask, *rest: load(self_, ptrs, self._checked("load", ptrs, mask), *rest),
        )
        patch.setattr(
            builder,
            "create_masked_store",
            lambda self_, ptrs, value, mask, *rest: store(
                self_, ptrs, value, self._checked("store", ptrs, mask), *rest
            ),
        )
        patch.setattr(
            builder,
            "create_atomic_rmw",
            lambda self_, kind, ptrs, value, mask, *rest: atomic(
                self_, kind, ptrs, value, self._checked("atomic", ptrs, mask), *rest
            ),
        )

    def _run(self, run, executor, *args, **kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        self.elements = np.unique(np.concatenate([addresses(tensor) for tensor in tensors]))
        return run(executor, *args, **kwargs)

    def _checked(self, kind, ptrs, mask):
        places = np.searchsorted(self.elements, ptrs.data)
        known = self.elements[np.minimum(places, len(self.elements) - 1)] == ptrs.data
        self.accesses += int(mask.data.sum())
        self.outside[kind] += int((mask.data & ~known).sum())
        return interpreter.TensorHandle(mask.data & known, mask.dtype)


def addresses(tensor):
    offsets = np.zeros((), dtype=np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(size) * stride
    return (tensor.data_ptr() + offsets * tensor.element_size()).ravel().astype(np.uint64)


@pytest.fixture(scope="module")
def watch():
    """Small tiles besides, so that a few entries take several programs and turns of the loops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "commit_config", lambda device: CommitConfig(block_m=16, block_n=16, num_warps=1))
        patch.setattr(packing, "PACK", BlockConfig(block=16, num_warps=1))
        for product in (gate_up, qkv, residual):
            patch.setattr(product, "product_config", small_product)
        yield Watch(patch)


def small_product(device, dtype, kind, rows, shape, tiles=None):
    """Tiles of 16 rows and one part of the square sums, or two; one to three splits."""
    block_n, splits = 64 * (1 + shape[0] % 2), 1 + rows % 3
    return ProductConfig(block_n, 16, 64, num_warps=4, num_stages=2, splits=splits)


@dataclass
class Call:
    """An operator and its arguments.

    Attributes:
        mutated: names of the arguments that it writes to; strided: of those that may have gaps.
        defined: whether the kernel and its twin must agree.
    """

    name: str
    arguments: dict
    mutated: tuple = ()
    strided: tuple = ()
    defined: bool = True

    def run(self, impl):
        """Its results and the tensors that it has written, flat."""
        fences = Fences()
        arguments = {name: fences.copy(v, strided=name in self.strided) for name, v in self.arguments.items()}
        public = getattr(dkv.kernels, self.name, None)
        direct = getattr(TRITON if impl == "triton" else reference, self.name)
        with pytest.MonkeyPatch.context() as patch:
            fence_allocations(patch, fences)
            found = partial(public, impl=impl)(**arguments) if public else direct(**arguments)
        fences.check()
        for name, value in self.arguments.items():
            if isinstance(value, torch.Tensor | DeferredNorm) and name not in self.mutated:
                assert all(map(torch.equal, flat(arguments[name]), flat(value))), f"{name} has changed"
        return list(flat(found)) + [arguments[name] for name in self.mutated]


def fence_allocations(patch, fences):
    """Fences allocations of dkv.kernels too, and fills them with foreign values."""
    empty, new_empty, zeros = torch.empty, torch.Tensor.new_empty, torch.zeros

    def is_ours(frame):
        return frame.f_globals.get("__name__", "").startswith("dkv.kernels.")

    def fenced(shape, *rest, dtype=torch.float32, device=None, **options):
        if is_ours(sys._getframe(1)):
            return fences.allocate(shape, dtype, device)
        return empty(shape, *rest, dtype=dtype, device=device, **options)

    def new_fenced(like, shape, *rest, dtype=None, **options):
        if is_ours(sys._getframe(1)):
            return fences.allocate(shape, dtype or like.dtype, like.device)
        return new_empty(like, shape, *rest, dtype=dtype, **options)

    def fenced_zeros(shape, *rest, dtype=torch.float32, device=None, **options):
        if is_ours(sys._getframe(1)):
            return fences.allocate(shape, dtype, device).zero_()
        return zeros(shape, *rest, dtype=dtype, device=device, **options)

    patch.setattr(torch, "empty", fenced)
    patch.setattr(torch, "zeros", fenced_zeros)
    patch.setattr(torch.Tensor, "new_empty", new_fenced)


def flat(found):
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, Packed):
        # entries beside a slot of -1 are undefined
        yield from found[:2]
        yield from (each.masked_fill(found.slots < 0, 0) for each in found[2:] if each is not None)
    elif found is not None:
        for each in found:
            yield from flat(each)


class Random:
    """Random arguments of every operator, the values of indices and counters anywhere."""

    def __init__(self, seed, device):
        self.rng, self.device = random.Random(seed), device
        self.generator = torch.Generator().manual_seed(seed)
        # the share of the indices of a call that are out of range
        self.odd_share = self.rng.choice((0.0, 0.2, 0.5, 1.0))

    def size(self, low, high):
        return self.rng.randint(low, high)

    def flip(self):
        return self.rng.random() < 0.5

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.device)

    def flags(self, *shape):
        return (torch.rand(shape, generator=self.generator) < self.rng.random()).to(self.device)

    def tensor(self, values, dtype):
        return torch.tensor(values, dtype=dtype, device=self.device)

    def odd(self, limit, dtype):
        """Just outside of 0 .. limit - 1, far outside, or inside but for bits that int32 has no room for."""
        info, inside = torch.iinfo(dtype), self.size(0, max(limit - 1, 0))
        values = [-1, -2, -limit, limit, limit + 1, 2 * limit + 1, 1000, -1000, info.min, info.max]
        values += [2**31 - 1, -(2**31), 2**31, 2**32 + inside, 5 * 2**32 + inside, inside - 2**32, 2**62 + inside]
        return self.rng.choice([value for value in values if info.min <= value <= info.max])

    def indices(self, count, limit, dtype=None):
        dtype = dtype or self.rng.choice((torch.int32, torch.int64))
        odd = [limit == 0 or self.rng.random() < self.odd_share for _ in range(count)]
        return self.tensor([self.odd(limit, dtype) if o else self.size(0, limit - 1) for o in odd], dtype)

    def slots(self, count, limit, dtype=None):
        """Existing ones, at most once each."""
        slots = self.indices(count, limit, dtype)
        seen = set()
        for i, slot in enumerate(slots.tolist()):
            if slot in seen:
                slots[i] = -1
            seen.add(slot)
        return slots

    def bounds(self, rows, total):
        """cu_seqlens of rows with entries before and after them, and then anything."""
        bounds = sorted(self.size(0, total) for _ in range(rows + 1))
        if self.flip():
            bounds[0] = 0
        odd = [self.rng.random() < self.odd_share for _ in bounds]
        bounds = [self.odd(total, torch.int32) if o else bound for o, bound in zip(odd, bounds, strict=True)]
        rising = all(a <= b for a, b in itertools.pairwise(min(max(bound, 0), total) for bound in bounds))
        return self.tensor(bounds, torch.int32), rising

    def counters(self, batch, seqlen):
        return self.indices(batch * len(Counter), seqlen, torch.int64).view(batch, -1)

    def decoded_step(self, batch, seqlen):
        steps = [self.rng.choice((PROMPT, MASKED, *range(6))) for _ in range(batch * seqlen)]
        return self.tensor(steps, torch.int32).view(batch, seqlen)

    def rope_cache_update(self):
        batch, seqlen, total, headdim = self.size(1, 3), self.size(0, 6), self.size(0, 20), 16
        nheads_k, group, length = self.size(1, 2), self.size(1, 2), self.size(1, 8)
        cache = (batch, seqlen, nheads_k, headdim)
        arguments = {
            "q": self.normal(total, nheads_k * group, headdim),
            "k": self.normal(total, nheads_k, headdim),
            "v": self.normal(total, nheads_k, headdim),
            "cos": self.normal(length, headdim // 2),
            "sin": self.normal(length, headdim // 2),
            "positions": self.indices(total, length),
            "slots": self.slots(total, batch * seqlen),
            "k_cache": self.normal(*cache),
            "v_cache": self.normal(*cache),
        }
        strided = ("q", "k", "v", "cos", "sin", "k_cache", "v_cache") if self.flip() else ()
        return Call("rope_cache_update", arguments, ("k_cache", "v_cache"), strided)

    def delayed_attention(self):
        batch, seqlen, total, headdim = self.size(1, 2), self.size(1, 90), self.size(1, 12), 16
        nheads_k, group, max_keys = self.size(1, 2), self.size(1, 2), self.size(0, 70)
        bounds, rising = self.bounds(batch, total)
        bound = self.rng.choice((None, None, total, 2**31, 2**62, 0, 1))
        options = {
            "max_seqlen_q": bound,
            "cache_leftpad": self.indices(batch, seqlen, torch.int32),
            "cache_seqlens": self.indices(batch, seqlen + 1, torch.int32),
            "key_mask": self.flags(batch, seqlen),
            "key_index": self.indices(batch * max_keys, seqlen, torch.int32).view(batch, max_keys),
            "num_splits": self.rng.choice((1, 2, 3, 2**62)) if self.rng.random() < 0.2 else 1,
        }
        arguments = {
            "q": self.normal(total, nheads_k * group, headdim),
            "k_cache": self.normal(batch, seqlen, nheads_k, headdim),
            "v_cache": self.normal(batch, seqlen, nheads_k, headdim),
            "cu_seqlens_q": bounds,
            "return_softmax_lse": True,
            **{name: value for name, value in options.items() if self.flip()},
        }
        strided = ("q", "k_cache", "v_cache", "key_mask", "key_index") if self.flip() else ()
        # a row with more queries than max_seqlen_q may have NaN
        enough = arguments.get("max_seqlen_q") not in (0, 1)
        return Call("delayed_attention", arguments, (), strided, defined=rising and enough)

    def commit_tokens(self):
        batch, seqlen, total = self.size(1, 3), self.size(0, 9), self.size(0, 60)
        bounds, rising = self.bounds(batch, total)
        arguments = {
            "x": torch.full((batch, seqlen), 5, device=self.device),
            "tokens": torch.arange(100, 100 + total, device=self.device),
            "scores": self.normal(total).sigmoid(),
            "slots": self.slots(total, batch * seqlen, torch.int64),
            "cu_seqlens": bounds,
            "counts": self.indices(batch, 9),
        }
        rule = self.rng.choice(("counts", "threshold", "factor"))
        if rule != "counts":
            arguments[rule] = self.normal(batch).sigmoid() if self.flip() else 0.6
        return Call("commit_tokens", arguments, ("x",), defined=rising)

    def lm_head_confidence(self):
        rows, hidden, vocab = self.size(0, 6), 16, self.size(3, 40)
        options = {
            "logit_scale": self.normal(rows).sigmoid(),
            "noise_scale": self.normal(rows).sigmoid() if self.flip() else 1.0,
            "exclude_ids": [0, vocab - 1],
            "cu_seqlens": self.bounds(2, rows)[0],
        }
        arguments = {
            "hidden": self.normal(rows, hidden),
            "weight": self.normal(vocab, hidden),
            "noise_key": self.indices(rows, 100, torch.int64),
            **{name: value for name, value in options.items() if self.flip()},
        }
        return Call("lm_head_confidence", arguments, (), ("hidden", "weight") if self.flip() else ())

    def pack_positions(self):
        shape = (self.size(0, 5), self.size(0, 40))
        arguments = {"active": self.flags(*shape), "capacity": self.size(0, shape[0] * shape[1] + 3)}
        return Call("pack_positions", arguments, (), ("active",) if self.flip() else ())

    def pack_step(self):
        batch, seqlen, copies = self.size(1, 2), self.size(1, 20), self.size(1, 2)
        active = self.flags(batch, seqlen)
        candidates = self.flags(batch, seqlen)
        sizes = torch.stack((active.sum(1), candidates.sum(1), *[active.sum(1)] * (len(Size) - 2)), dim=1).int()
        # sums of larger values overflow, which the interpreter refuses
        lies = self.indices(batch * len(Size), seqlen, torch.int32).view(batch, -1).clamp(-(2**28), 2**28)
        false = self.flip()
        rows = batch * copies
        arguments = {
            "active": active,
            "candidates": candidates,
            "sizes": torch.where(self.flags(batch, len(Size)), lies, sizes) if false else sizes,
            "ids": torch.arange(rows * seqlen, device=self.device).view(rows, seqlen),
            "positions": torch.arange(rows * seqlen, device=self.device).view(rows, seqlen) + 1000,
            "counters": self.counters(batch, seqlen),
            "excess": self.tensor(0, torch.int64) if self.flip() else None,
            "capacity": self.size(0, rows * seqlen + 2),
            "candidate_capacity": self.size(0, rows * seqlen + 2),
            "per_row": self.size(0, seqlen),
            "shifted": self.flip(),
            "noisy": self.flip(),
        }
        return Call("pack_step", arguments, ("excess",) if arguments["excess"] is not None else (), defined=not false)

    def active_positions(self):
        batch, seqlen, shifted = self.size(1, 3), self.size(1, 20), self.flip()
        stable = self.rng.choice(("nothing", "decoded", "next", "both", "others"))
        rule = Rule(
            warmup=self.size(0, 2),
            interval=self.rng.choice((None, 1, 3)),
            stable=stable,
            delay=self.size(0, 2),
            frozen_prompt=self.flip(),
            from_block_start=self.flip(),
            until_block_end=self.flip(),
            window=self.size(0, 4),
            contiguous=self.flip(),
        )
        given = self.rng.random() < 0.2
        arguments = {
            "decoded_step": self.decoded_step(batch, seqlen),
            "valid": self.flags(batch, seqlen),
            "candidates": self.flags(batch, seqlen),
            "counters": self.counters(batch, seqlen),
            "active": torch.zeros(batch, seqlen, dtype=torch.bool, device=self.device),
            "sizes": torch.zeros(batch, len(Size), dtype=torch.int32, device=self.device),
            "totals": self.tensor([[3, 4]] * batch, torch.int64) if self.flip() else None,
            "shifted": shifted,
            "rule": None if given else rule,
            "chosen": self.flags(batch, seqlen) if given else None,
            "rank": self.indices(batch * seqlen, seqlen, torch.int32).view(batch, seqlen),
            "foresee": self.flip() and stable != "others" and not given,
        }
        mutated = ("active", "sizes") + (("totals",) if arguments["totals"] is not None else ())
        # an order of decoding is a permutation
        return Call("active_positions", arguments, mutated, defined=given or stable != "others" or rule.contiguous)

    def advance_rows(self):
        batch, seqlen, blocks, steps = self.size(1, 3), self.size(1, 20), self.size(1, 3), self.size(1, 4)
        counted = self.flip()
        arguments = {
            "x": torch.randint(0, 4, (batch, seqlen), generator=self.generator).to(self.device),
            "decoded_step": self.decoded_step(batch, seqlen),
            "counters": self.counters(batch, seqlen),
            "candidates": self.flags(batch, seqlen),
            "mask_id": self.rng.choice((1, -1, 2**40)),
            "prompt_masks_wait": self.flip(),
            "commits": torch.arange(batch * blocks * steps, device=self.device).view(batch, blocks, steps),
            "counts": self.tensor([0] * batch, torch.int64),
            "due": self.indices(batch * seqlen, seqlen, torch.int32).view(batch, seqlen) if self.flip() else None,
            "end_ids": self.tensor([2, 3], torch.int64) if self.flip() else None,
            "pad_id": self.rng.choice((0, -1, 2**40)),
        }
        if not counted:
            arguments |= {"commits": None, "counts": None}
        mutated = ("x", "decoded_step", "counters", "candidates") + (("counts",) if counted else ())
        return Call("advance_rows", arguments, mutated)

    def add_rms_norm(self):
        rows, size = self.size(0, 4), self.size(1, 40)
        arguments = {"x": self.normal(rows, size), "weight": self.normal(size), "eps": 1e-5}
        arguments["residual"] = self.normal(rows, size) if self.flip() else None
        mutated = ("residual",) if arguments["residual"] is not None else ()
        return Call("add_rms_norm", arguments, mutated, ("x", "residual") if self.flip() else ())

    def deferred_norm(self):
        arguments = {"x": self.normal(self.size(0, 4), size := self.size(1, 150)), "weight": self.normal(size)}
        return Call("deferred_norm", arguments, (), ("x",) if self.flip() else ())

    def in_features(self):
        """Up to three steps, the last one possibly partial."""
        return self.size(1, 150) if self.flip() else 64 * self.size(1, 3)

    def normed(self, rows, size):
        return reference.deferred_norm(self.normal(rows, size), self.normal(size))

    def linear_weight(self, out_features, in_features):
        return self.normal(out_features, in_features) / in_features**0.5

    def linear_rope_cache_update(self):
        batch, seqlen, rows, headdim = self.size(0, 3), self.size(0, 6), self.size(0, 20), 16
        nheads_k, group, in_features, length = self.size(0, 1), self.size(0, 2), self.in_features(), self.size(1, 8)
        nheads = max(nheads_k, 1) * group
        out_features, cache = (nheads + 2 * nheads_k) * headdim, (batch, seqlen, nheads_k, headdim)
        arguments = {
            "normed": self.normed(rows, in_features),
            "eps": 1e-5,
            "weight": self.linear_weight(out_features, in_features),
            "bias": self.normal(out_features) if self.flip() else None,
            "cos": self.normal(length, headdim // 2),
            "sin": self.normal(length, headdim // 2),
            "positions": self.indices(rows, length),
            "slots": self.slots(rows, batch * seqlen),
            "k_cache": self.normal(*cache),
            "v_cache": self.normal(*cache),
        }
        strided = ("normed", "weight", "cos", "sin", "k_cache", "v_cache") if self.flip() else ()
        return Call("linear_rope_cache_update", arguments, ("k_cache", "v_cache"), strided)

    def linear_swiglu(self):
        rows, size, in_features = self.size(0, 20), self.size(1, 70), self.in_features()
        weight = self.linear_weight(2 * size, in_features)
        arguments = {"normed": self.normed(rows, in_features), "eps": 1e-5, "weight": weight}
        return Call("linear_swiglu", arguments, (), ("normed", "weight") if self.flip() else ())

    def linear_add_norm(self):
        rows, size, in_features = self.size(0, 20), self.size(1, 70), self.in_features()
        arguments = {
            "x": self.normal(rows, in_features),
            "weight": self.linear_weight(size, in_features),
            "residual": self.normal(rows, size),
            "norm_weight": self.normal(size),
        }
        return Call("linear_add_norm", arguments, ("residual",), ("x", "weight", "residual") if self.flip() else ())

    def swiglu(self):
        rows, size = self.size(0, 4), self.size(1, 40)
        return Call("swiglu", {"gate_up": self.normal(rows, 2 * size)}, (), ("gate_up",) if self.flip() else ())


OPERATORS = sorted(vars(TRITON))


def check(name, seed, device, watch):
    """One random call of an operator; both implementations agree where results are defined."""
    call = getattr(Random(seed, device), name)()
    watch.outside.clear()
    found = call.run("triton")
    assert not any(watch.outside.values()), f"seed {seed}: outside of all tensors are {dict(watch.outside)}"
    for ours, twins in zip(found, call.run("reference"), strict=True):
        if call.defined:
            ours, twins = (each.view(torch.uint8) if each.dtype == torch.bool else each for each in (ours, twins))
            torch.testing.assert_close(ours, twins, rtol=1e-4, atol=1e-5, msg=lambda text: f"seed {seed}: {text}")


@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_outside_of_the_tensors_is_touched(name, device, watch):
    watch.accesses = 0
    for seed in range(15):
        check(name, seed, device, watch)
    assert watch.accesses > 100 or torch.cuda.is_available()


@pytest.mark.full
@pytest.mark.parametrize("name", OPERATORS)
def test_of_many_calls_none_touches_what_is_outside(name, device, watch):
    for seed in range(15, 350):
        check(name, seed, device, watch)


@triton.jit
def _shift_kernel(x_ptr, out_ptr, count, by, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs + by, mask=offs < count), mask=offs < count + by)
    tl.atomic_add(out_ptr + count - 1 + by, 1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted here")
@pytest.mark.parametrize("by, outside", [(0, {}), (1, {"load": 1, "store": 1, "atomic": 1}), (-2, {"load": 2})])
@pytest.mark.parametrize("strided", [False, True])
def test_the_watch_counts_what_lies_outside(watch, by, outside, strided):
    fences = Fences()
    x, out = (fences.allocate((5,), torch.float32, "cpu", strided=strided) for _ in "xo")
    watch.outside.clear()
    _shift_kernel[(1,)](x, out, 5, by, BLOCK=16)
    assert {kind: count for kind, count in watch.outside.items() if count} == outside
    fences.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("strided", [False, True])
def test_a_fence_shows_what_was_written_to_it(device, dtype, strided):
    fences = Fences()
    tensor = fences.allocate((2, 3), dtype, device, strided=strided)
    tensor.zero_()
    fences.check()
    tensor.as_strided((1,), (1,), tensor.storage_offset() + 2 * tensor.stride(0)).zero_()
    with pytest.raises(AssertionError, match=r"outside of a tensor of shape \(2, 3\)"):
        fences.check()


IMPLS = ["triton", "reference"]


@pytest.mark.sanitizer
@pytest.mark.parametrize("impl", IMPLS)
def test_slots_that_the_cache_does_not_have_are_padding(device, impl):
    """Also those whose low 32 bits are a slot's; positions beyond the table take its nearest row."""
    generator = torch.Generator().manual_seed(0)
    slots = [3, -1, 12, 2**32 + 5, 5 - 2**32, -(2**63), 2**63 - 1, 2**31, 11]
    positions = [-7, 0, 0, 0, 0, 0, 0, 0, 2**40]
    q, k, v = torch.randn(3, len(slots), 2, 16, generator=generator).to(device)
    cos, sin = torch.randn(2, 4, 8, generator=generator).to(device)
    k_cache, v_cache = torch.full((2, 2, 6, 2, 16), 9.0, device=device)
    rest = (torch.tensor(positions, device=device), torch.tensor(slots, device=device))
    q_rotated = dkv.kernels.rope_cache_update(q, k, v, cos, sin, *rest, k_cache, v_cache, impl=impl)

    expected_k, expected_v = torch.full((2, 2, 6, 2, 16), 9.0, device=device)
    kept, rest = [0, 8], (torch.tensor([0, 3], device=device), torch.tensor([3, 11], device=device))
    some = dkv.kernels.rope_cache_update(q[kept], k[kept], v[kept], cos, sin, *rest, expected_k, expected_v, impl=impl)
    assert torch.equal(q_rotated[kept], some) and (q_rotated[1:8] == 0).all()
    assert torch.equal(k_cache, expected_k) and torch.equal(v_cache, expected_v)
    assert int((v_cache != 9).all(-1).all(-1).sum()) == 2


@pytest.mark.sanitizer
@pytest.mark.parametrize("impl", IMPLS)
def test_entries_that_cannot_be_committed(device, impl, watch):
    """Before the rows, after them, beyond the columns of a row, or without a place in x."""
    x = torch.zeros(3, 4, dtype=torch.int64, device=device)
    slots = torch.tensor([0, 1, 2, -1, 12, 2**32 + 7, 3, 8, 9, 10, 11, 4, 5, 6], device=device)
    tokens = torch.arange(100, 114, device=device)
    scores = torch.tensor([0.9] * 14, device=device)
    bounds = torch.tensor([2, 7, 7, 12], device=device).int()
    counts = torch.tensor([4, 2**31, 9], device=device)
    chosen = dkv.kernels.commit_tokens(x, tokens, scores, slots, bounds, counts, impl=impl)
    # row 0 has five entries, of which four count: one of them has a place; row 2 has five, too
    assert chosen.view(torch.uint8).tolist() == [0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0]
    assert x.tolist() == [[0, 0, 102, 0], [0, 0, 0, 0], [107, 108, 109, 110]]


@pytest.mark.sanitizer
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("bounds", [[2, 5, 7], [-5, 5, 2**31 - 1], [-(2**31), 9, 9], [9, 9, 9]])
def test_queries_of_no_row_are_padding(device, impl, num_splits, bounds):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(9, 2, 16, generator=generator).to(device)
    k_cache, v_cache = torch.randn(2, 2, 20, 2, 16, generator=generator).to(device)
    out, lse = dkv.kernels.delayed_attention(
        q,
        k_cache,
        v_cache,
        torch.tensor(bounds, device=device).int(),
        cache_seqlens=torch.tensor([2**31 - 1, 20], device=device).int(),
        cache_leftpad=torch.tensor([-(2**31), 0], device=device).int(),
        num_splits=num_splits,
        return_softmax_lse=True,
        impl=impl,
    )
    bounds = [min(max(bound, 0), 9) for bound in bounds]
    expected, expected_lse = torch.zeros_like(out), torch.full_like(lse, float("-inf"))
    for row, (start, end) in enumerate(itertools.pairwise(bounds)):
        scores = torch.einsum("ahd, nhd -> han", q[start:end], k_cache[row]) / 4
        expected[start:end] = torch.einsum("han, nhd -> ahd", scores.softmax(-1), v_cache[row])
        expected_lse[:, start:end] = scores.logsumexp(-1)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "name, output", [("rope_cache_update", "k_cache"), ("rope_cache_update", "v_cache"), ("add_rms_norm", "residual")]
)
def test_expanded_outputs_are_refused(device, impl, name, output):
    """Two of their elements would share one place."""
    arguments = {"eps": 1e-5, "weight": torch.ones(16), "x": torch.ones(3, 16), "residual": torch.ones(3, 16)}
    if name == "rope_cache_update":
        arguments = {token: torch.ones(3, 1, 16) for token in "qkv"} | {
            "cos": torch.ones(2, 8),
            "sin": torch.ones(2, 8),
        }
        arguments |= {"positions": torch.zeros(3).int(), "slots": torch.arange(3)}
        arguments |= {cache: torch.ones(1, 4, 1, 16) for cache in ("k_cache", "v_cache")}
    arguments = {key: each.to(device) if isinstance(each, torch.Tensor) else each for key, each in arguments.items()}
    getattr(dkv.kernels, name)(**arguments, impl=impl)
    arguments[output] = arguments[output][:, :1].expand(arguments[output].shape)
    arguments[output] = arguments[output] if output != "residual" else torch.ones(16, device=device).expand(3, 16)
    with pytest.raises(ValueError, match=f"{output} is written in place and must not be expanded, got strides"):
        getattr(dkv.kernels, name)(**arguments, impl=impl)


def test_expanded_sequences_are_refused(device):
    x = torch.zeros(4, dtype=torch.int64, device=device).expand(2, 4)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    bounds = torch.tensor([0, 1, 1], device=device).int()
    with pytest.raises(ValueError, match="x must be contiguous"):
        dkv.kernels.commit_tokens(x, one, one.float(), one, bounds, one.repeat(2))


def test_a_table_without_a_position_is_refused(device):
    q, cache = torch.ones(1, 1, 16, device=device), torch.ones(1, 4, 1, 16, device=device)
    table, zero = torch.ones(0, 8, device=device), torch.zeros(1, device=device).int()
    with pytest.raises(ValueError, match="cos and sin must have a row for each position, at least one"):
        dkv.kernels.rope_cache_update(q, q, q, table, table, zero, zero, cache, cache)
