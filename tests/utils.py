"""Shared by the tests: inputs, the error budget for results, and samples of large grids."""

import collections
import importlib.util
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
]


def example(name):
    """The module of examples/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def thinned(cases, features):
    """Parameters of a test for all cases. The default run takes a few of them, `make test-full` the others.

    Any two features that meet in a case meet in one of the few; features(case) are strings or tuples.
    """
    given = [sorted(features(case)) for case in cases]
    found = [set(itertools.combinations(each, 2)) for each in given]
    missing, chosen, taken = set().union(*found), set(), collections.Counter()
    while missing:
        # the case with the largest number of missing pairs; on ties, the one with the rarest features
        best = max(range(len(cases)), key=lambda i: (len(found[i] & missing), -sum(taken[f] for f in given[i])))
        chosen.add(best)
        missing -= found[best]
        taken.update(given[best])
    return [pytest.param(*case, marks=() if index in chosen else pytest.mark.full) for index, case in enumerate(cases)]


def pairwise(names, *values, where=lambda *case: True):
    """Parametrizes a test with all combinations; the default run takes a few, in which every pair of values occurs."""
    cases = [case for case in itertools.product(*map(enumerate, values)) if where(*(value for _, value in case))]
    few = thinned(cases, lambda case: [(place, index) for place, (index, _) in enumerate(case)])
    params = [pytest.param(*(value for _, value in param.values), marks=param.marks) for param in few]
    return pytest.mark.parametrize(names, params)


def assert_within_error_budget(result, oracle, same_dtype):
    """The error against float64 may be twice that of PyTorch in the same dtype, plus two roundings of the largest value.

    Args:
        result: what is tested.
        oracle: the float64 result for the same rounded inputs.
        same_dtype: PyTorch's result in the dtype of `result`.
    """
    assert result.shape == oracle.shape == same_dtype.shape
    assert not result.isnan().any(), "some outputs are NaN or were never written"
    finite = oracle.isfinite()
    assert torch.equal(result.isfinite(), finite) and torch.equal(result[~finite].double(), oracle[~finite])
    if not finite.any():
        return
    oracle = oracle[finite]
    error = (result[finite].double() - oracle).abs().max().item()
    torch_error = (same_dtype[finite].double() - oracle).abs().max().item()
    budget = 2 * torch_error + 2 * torch.finfo(result.dtype).eps * oracle.abs().max().item()
    assert error <= budget, (
        f"error {error:.3e} exceeds the budget {budget:.3e}; PyTorch's own error is {torch_error:.3e}"
    )


def cumulative(counts, device="cpu"):
    """cu_seqlens of a list of counts."""
    return torch.tensor([0, *counts], device=device).cumsum(0).int()


@dataclass
class AttentionCase:
    """Random inputs of `delayed_attention`; `counts` are the queries of each row, `padding` the queries behind them."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    cu_seqlens_q: torch.Tensor

    @classmethod
    def random(cls, counts, *, seqlen, nheads_k=2, group=1, headdim=32, padding=0, dtype=torch.float32, device="cpu"):
        generator = torch.Generator().manual_seed(len(counts) * 1000 + seqlen)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(dtype).to(device)

        cache = (len(counts), seqlen, nheads_k, headdim)
        q = normal(sum(counts) + padding, nheads_k * group, headdim)
        return cls(q, normal(*cache), normal(*cache), cumulative(counts, device))

    def tensors(self, dtype=None):
        dtype = dtype or self.q.dtype
        return self.q.to(dtype), self.k_cache.to(dtype), self.v_cache.to(dtype), self.cu_seqlens_q


def rope_tables(headdim, length=64, device="cpu"):
    inverse_frequency = 1e4 ** (-torch.arange(0, headdim, 2, dtype=torch.float64) / headdim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), inverse_frequency)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def rope_inputs(slots, *, batch=2, seqlen=20, nheads=4, nheads_k=2, headdim=32, dtype=torch.float32, device="cpu"):
    """Random arguments of `rope_cache_update` that write into these slots."""
    generator = torch.Generator().manual_seed(seqlen)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    total = len(slots)
    q, k, v = normal(total, nheads, headdim), normal(total, nheads_k, headdim), normal(total, nheads_k, headdim)
    positions = torch.randint(0, 64, (total,), generator=generator).to(device)
    caches = normal(batch, seqlen, nheads_k, headdim), normal(batch, seqlen, nheads_k, headdim)
    return [q, k, v, *rope_tables(headdim, device=device), positions, torch.tensor(slots, device=device).int(), *caches]


def run_python(*arguments, cwd=ROOT):
    """Runs Python in a process of its own, without a GPU; returns the finished process with its output."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
