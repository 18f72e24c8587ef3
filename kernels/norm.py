"""Residual addition and RMS normalisation of token rows, in one launch.

With s the sum x + residual, rounded to the dtype (x itself where there is no residual):

    normed = weight * round(s * rsqrt(mean(s^2) + eps))          (RMSNorm, Zhang and Sennrich, arXiv 1910.07467)

s is normalised in float32 and rounded to the dtype before the weight is applied, as in LLaDA and Dream. Layouts: x and
residual (rows, size), any strides; weight (size,). Each program holds one row in registers, so every value is read
once; it is memory-bound, at 4 * rows * size elements. A deferred norm stops at round(s * weight) and the sums of
squares; the next product applies the scale (skinny.py).
"""

import torch
from torch import Tensor

from dkv.kernels import checks, reference
from dkv.kernels.configs import norm_config
from dkv.kernels.language import tl, triton
from dkv.kernels.operators import operator
from dkv.kernels.skinny import PART, empty_deferred


@triton.jit
def _add_rms_norm_kernel(
    # pointers
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    # strides
    stride_x_row,
    stride_x_column,
    stride_residual_row,
    stride_residual_column,
    # scalars
    eps,
    # constants
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # [BLOCK]
    offs = tl.arange(0, BLOCK)
    valid = offs < SIZE
    weight = tl.load(weight_ptr + offs, mask=valid, other=0.0)
    columns = offs.to(tl.int64)
    x = tl.load(x_ptr + row * stride_x_row + columns * stride_x_column, mask=valid, other=0.0)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + row * stride_residual_row + columns * stride_residual_column
        residual = tl.load(residual_ptrs, mask=valid, other=0.0)
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
        tl.store(residual_ptrs, x, mask=valid)
    s = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(s * s, 0) / SIZE + eps)
    normed = (s * scale).to(x.dtype) * weight
    tl.store(normed_ptr + row * SIZE + offs, normed, mask=valid)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    rows, size = x.shape
    normed = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    if normed.numel() == 0:
        return normed
    config = norm_config(x.dtype, size)
    residual_strides = (0, 0) if residual is None else residual.stride()
    with checks.device_guard(x):
        _add_rms_norm_kernel[(rows,)](
            x_ptr=x,
            residual_ptr=residual,
            weight_ptr=weight,
            normed_ptr=normed,
            stride_x_row=x.stride(0),
            stride_x_column=x.stride(1),
            stride_residual_row=residual_strides[0],
            stride_residual_column=residual_strides[1],
            eps=eps,
            SIZE=size,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
    return normed


@triton.jit(do_not_specialize=["rows"])
def _deferred_norm_kernel(
    # pointers
    x_ptr,
    weight_ptr,
    weighted_ptr,
    square_sums_ptr,
    # strides
    stride_x_row,
    stride_x_column,
    # sizes
    rows,
    size,
    # constants
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # [BLOCK]
    offs = tl.arange(0, BLOCK)
    valid = offs < size
    weight = tl.load(weight_ptr + offs, mask=valid, other=0.0).to(tl.float32)
    s = tl.load(x_ptr + row * stride_x_row + offs.to(tl.int64) * stride_x_column, mask=valid, other=0.0).to(tl.float32)
    tl.store(weighted_ptr + row * size + offs, (s * weight).to(weighted_ptr.dtype.element_ty), mask=valid)
    # [BLOCK // PART]
    parts = tl.arange(0, BLOCK // PART)
    square_sums = tl.sum((s * s).reshape(BLOCK // PART, PART), 1)
    tl.store(square_sums_ptr + parts.to(tl.int64) * rows + row, square_sums, mask=parts < tl.cdiv(size, PART))


def _launch_deferred_norm(x: Tensor, weight: Tensor) -> reference.DeferredNorm:
    rows, size = x.shape
    weighted, square_sums = normed = empty_deferred(x)
    if weighted.numel() == 0:
        return normed
    config = norm_config(x.dtype, max(size, reference.PART))
    with checks.device_guard(x):
        _deferred_norm_kernel[(rows,)](
            x_ptr=x,
            weight_ptr=weight,
            weighted_ptr=weighted,
            square_sums_ptr=square_sums,
            stride_x_row=x.stride(0),
            stride_x_column=x.stride(1),
            rows=rows,
            size=size,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
    return normed


def _launch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _launch(x, None, weight, eps)


def _fake(x, **_):
    return x.new_empty(x.shape)


_add_rms_norm = operator("add_rms_norm", _launch, reference.add_rms_norm, fake=_fake, mutates=("residual",))
# an operator of its own, because torch.compile does not take one that writes to an optional tensor
_rms_norm = operator(
    "rms_norm",
    _launch_rms_norm,
    lambda x, weight, eps: reference.add_rms_norm(x, None, weight, eps),
    fake=_fake,
)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, impl: checks.Impl = "auto"
) -> Tensor:
    """Adds token rows to the residual stream and returns the RMS norm of the sum.

    Mutates residual in place: residual += x, rounded to its dtype. Without a residual it returns the norm of x.

    Args:
        x: (rows, size), float16, bfloat16 or float32 (float64: impl "reference" only), any strides.
        residual: like x, not expanded and sharing no memory with x, or None.
        weight: (size,), the dtype of x, contiguous.
        eps: added to the mean of the squares.
        impl: "auto" (Triton for CUDA tensors, PyTorch otherwise), "triton" or "reference".

    Returns:
        normed (rows, size), contiguous (impl "reference": the layout of x). It is normalised in float32 and rounded,
        then multiplied by weight and rounded again.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or strides that do not fit together.
        NotImplementedError: an implementation that cannot run here.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467).

    Example:
        >>> h = add_rms_norm(attended, residual, mlp_norm.weight, 1e-5)
        >>> mlp = swiglu(h @ gate_up.T) @ down.T
        >>> h = add_rms_norm(mlp, residual, next_attn_norm.weight, 1e-5)
    """
    checks.check_no_grad(x=x, residual=residual, weight=weight)
    checks.check_floating("x", x)
    checks.check_shape("x", x, (None, None), "(rows, size)")
    checks.check_shape("weight", weight, (x.shape[1],), "(size,)")
    checks.check_same("x", x, weight=weight)
    checks.check_last_dim_contiguous(weight=weight)
    if residual is not None:
        checks.check_shape("residual", residual, tuple(x.shape), "(rows, size)")
        checks.check_same("x", x, residual=residual)
        checks.check_not_expanded(residual=residual)
    impl = checks.resolve_impl(impl, _add_rms_norm_kernel, x)
    if residual is None:
        return _rms_norm(x=x, weight=weight, eps=eps, impl=impl)
    return _add_rms_norm(x=x, residual=residual, weight=weight, eps=eps, impl=impl)


_deferred_norm = operator(
    "deferred_norm", _launch_deferred_norm, reference.deferred_norm, fake=lambda x, **_: empty_deferred(x)
)


def deferred_norm(x: Tensor, weight: Tensor, *, impl: checks.Impl = "auto") -> reference.DeferredNorm:
    """Begins the RMS norm of token rows; the next product finishes it by scaling its rows.

    Mutates nothing.

    Args:
        x: (rows, size), float16, bfloat16 or float32 (float64: impl "reference" only), any strides.
        weight: (size,), the dtype of x, contiguous.
        impl: "auto" (Triton for CUDA tensors, PyTorch otherwise), "triton" or "reference".

    Returns:
        `DeferredNorm`: x times weight, rounded, and the sums of squares in float32. Products that overflow the dtype
        (float16 ends at 65504) become infinite, and so do results computed from them.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or strides that do not fit together.
        NotImplementedError: an implementation that cannot run here.

    Source: Graef et al., FlashNorm (arXiv 2407.09577).

    Example:
        >>> normed = deferred_norm(embed(ids), attn_norm.weight)
        >>> q = linear_rope_cache_update(normed, 1e-5, qkv_weight, None, cos, sin, positions, slots, k_cache, v_cache)
    """
    checks.check_no_grad(x=x, weight=weight)
    checks.check_floating("x", x)
    checks.check_shape("x", x, (None, None), "(rows, size)")
    checks.check_shape("weight", weight, (x.shape[1],), "(size,)")
    checks.check_same("x", x, weight=weight)
    checks.check_last_dim_contiguous(weight=weight)
    return _deferred_norm(x=x, weight=weight, impl=checks.resolve_impl(impl, _deferred_norm_kernel, x))
