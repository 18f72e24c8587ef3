"""Residual addition and RMS normalisation of token rows, in one launch.

With s the sum x + residual, rounded to the dtype (x itself where there is no residual):

    normed = weight * round(s * rsqrt(mean(s^2) + eps))          (RMSNorm, Zhang and Sennrich, arXiv 1910.07467)

s is normalised in float32 and rounded to the dtype before the weight is applied, as LLaDA and Dream do. Layouts: x and
residual (rows, size), any strides; weight (size,). Each program holds one row in registers, so every value is read
once; it is memory-bound, at 4 * rows * size elements. The deferred norm leaves round(s * weight) and sums of squares;
the next product applies the scale (skinny.py).
"""

import torch

from dkv.kernels import checks, reference
from dkv.kernels.configs import norm_config
from dkv.kernels.language import tl, triton
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


def _launch(x, residual, weight, eps):
    rows, size = x.shape
    normed = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    if normed.numel() == 0:
        return normed
    launch = norm_config(x.dtype, size)
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
            BLOCK=launch.block,
            num_warps=launch.num_warps,
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


def _launch_deferred(x, weight):
    rows, size = x.shape
    weighted, square_sums = normed = empty_deferred(x)
    if weighted.numel() == 0:
        return normed
    launch = norm_config(x.dtype, max(size, reference.PART))
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
            BLOCK=launch.block,
            num_warps=launch.num_warps,
        )
    return normed


def _add_rms_norm(x, residual, weight, eps, impl):
    return (_launch if impl == "triton" else reference.add_rms_norm)(x, residual, weight, eps)


def _rms_norm(x, weight, eps, impl):
    return _add_rms_norm(x, None, weight, eps, impl)


@torch.library.custom_op("dkv::add_rms_norm", mutates_args=("residual",))
def _operator(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, impl: str
) -> torch.Tensor:
    return _add_rms_norm(x, residual, weight, eps, impl).contiguous()


@_operator.register_fake
def _(x, residual, weight, eps, impl):
    return x.new_empty(x.shape)


# of its own: torch.compile does not take an operator that may change what is not there
@torch.library.custom_op("dkv::rms_norm", mutates_args=())
def _operator_alone(x: torch.Tensor, weight: torch.Tensor, eps: float, impl: str) -> torch.Tensor:
    return _rms_norm(x, weight, eps, impl).contiguous()


@_operator_alone.register_fake
def _(x, weight, eps, impl):
    return x.new_empty(x.shape)


def add_rms_norm(x, residual, weight, eps, *, impl="auto"):
    """Adds token rows to the residual stream and returns the RMS norm of the sum.

    Mutates residual in place: residual += x, rounded to its dtype. Without a residual it is the norm of x alone.

    Args:
        x: (rows, size), float16, bfloat16 or float32 (float64: impl "reference" only), any strides.
        residual: like x, in memory of its own and not expanded, or None.
        weight: (size,), the dtype of x, contiguous.
        eps: added to the mean of the squares.
        impl: "auto" (Triton for CUDA tensors, PyTorch otherwise), "triton" or "reference".

    Returns:
        normed (rows, size), contiguous (impl "reference": laid out as x is): normalised in float32, rounded, then times
        weight and rounded again.

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
        return checks.pick(torch.ops.dkv.rms_norm, _rms_norm)(x, weight, eps, impl)
    return checks.pick(torch.ops.dkv.add_rms_norm, _add_rms_norm)(x, residual, weight, eps, impl)


def _deferred_norm(x: torch.Tensor, weight: torch.Tensor, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple((_launch_deferred if impl == "triton" else reference.deferred_norm)(x, weight))


_deferred_operator = torch.library.custom_op("dkv::deferred_norm", mutates_args=())(_deferred_norm)


@_deferred_operator.register_fake
def _(x, weight, impl):
    return empty_deferred(x)


def deferred_norm(x: torch.Tensor, weight: torch.Tensor, *, impl: checks.Impl = "auto") -> reference.DeferredNorm:
    """Begins the RMS norm of token rows, which the next product finishes by scaling its rows.

    Mutates nothing.

    Args:
        x: (rows, size), float16, bfloat16 or float32 (float64: impl "reference" only), any strides.
        weight: (size,), the dtype of x, contiguous.
        impl: "auto" (Triton for CUDA tensors, PyTorch otherwise), "triton" or "reference".

    Returns:
        `DeferredNorm`: x times weight, rounded, and the sums of squares in float32. What x times weight does not hold
        in its dtype (float16 ends at 65504) is infinite, and so is what comes of it.

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
    impl = checks.resolve_impl(impl, _deferred_norm_kernel, x)
    run = checks.pick(torch.ops.dkv.deferred_norm, _deferred_norm)
    return reference.DeferredNorm(*run(x, weight, impl))
