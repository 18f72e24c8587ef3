"""Shared by the tests: inputs, and the error budget that decides whether a result is right."""

from dataclasses import dataclass

import pytest
import torch

DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
]


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
