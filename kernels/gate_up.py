"""The gate and up projections of a feed-forward layer and its gated activation, in one kernel.

For a deferred norm of rows x, s = rsqrt(mean(x^2) + eps):

    gate, up = s * (x * norm_weight) w_gate^T, s * (x * norm_weight) w_up^T
    out = gate / (1 + exp(-gate)) * up                                      (SwiGLU, Shazeer, arXiv 2002.05202)

in float32, rounded once. Layouts: rows (rows, in_features), weight (2 * size, in_features), gate first; out (rows,
size). Each program computes some columns of a block of rows; the weight's rows are the long side of its two products.
For few rows it is memory-bound, at one read of the weight: 2 * size * in_features elements, for 4 * rows * size *
in_features operations. The projections stay on the chip.
"""

import torch
from torch import Tensor

from dkv.kernels import checks, reference
from dkv.kernels.configs import ProductConfig, product_config
from dkv.kernels.language import gdc_launch_dependents, gdc_wait, tl, triton
from dkv.kernels.operators import operator
from dkv.kernels.skinny import (
    is_last_to_arrive,
    keep_partial,
    load_square_sums,
    options_of,
    prefetch_into_l2,
    row_scales,
    scratch,
    share_of,
    sum_of_partials,
    two_products,
)


@triton.jit(do_not_specialize=["rows", "row_blocks", "parts"])
def _linear_swiglu_kernel(
    # pointers
    x_ptr,
    square_sums_ptr,
    weight_ptr,
    out_ptr,
    partial_ptr,
    semaphore_ptr,
    # strides
    stride_x,
    stride_weight,
    # sizes
    rows,
    row_blocks,
    in_features,
    size,
    parts,
    # scalars
    eps,
    # constants
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    tiles = tl.cdiv(size, BLOCK_N)
    tile, row_block, output, split, first, last = share_of(tiles, row_blocks, in_features, SPLITS, BLOCK_K)
    # tiles are [BLOCK_N, BLOCK_R]: output columns by rows; an index beyond the last one repeats it
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = tl.minimum(columns, size - 1)
    gate_ptrs = weight_ptr + offs_n.to(tl.int64) * stride_weight
    up_ptrs = gate_ptrs + tl.cast(size, tl.int64) * stride_weight
    if PDL:
        prefetch_into_l2(gate_ptrs, first, in_features, BLOCK_K)
        prefetch_into_l2(up_ptrs, first, in_features, BLOCK_K)
        gdc_wait()
    offs_r = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    written = (columns < size)[:, None] & (offs_r < rows)[None, :]
    offs_r = tl.minimum(offs_r, rows - 1)
    square_sums = load_square_sums(square_sums_ptr, offs_r, rows, parts, PARTS)
    x_ptrs = x_ptr + offs_r.to(tl.int64) * stride_x
    gate, up = two_products(x_ptrs, gate_ptrs, up_ptrs, first, last, in_features, BLOCK_K, MASK_K)
    if PDL:
        gdc_launch_dependents()
    if SPLITS > 1:
        keep_partial(partial_ptr, 2 * (output * SPLITS + split), gate)
        keep_partial(partial_ptr, 2 * (output * SPLITS + split) + 1, up)
        if not is_last_to_arrive(semaphore_ptr + output, SPLITS):
            return
        gate = sum_of_partials(partial_ptr, 2 * output * SPLITS, gate, SPLITS, 2)
        up = sum_of_partials(partial_ptr, 2 * output * SPLITS + 1, up, SPLITS, 2)

    scales = row_scales(square_sums, in_features, eps)[None, :]
    gate = gate * scales
    out = gate / (1.0 + tl.exp(-gate)) * (up * scales)
    out_ptrs = out_ptr + offs_r.to(tl.int64)[None, :] * size + columns[:, None]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=written)


def _launch(
    normed: reference.DeferredNorm,
    eps: float,
    weight: Tensor,
    *,
    semaphores: Tensor | None = None,
    config: ProductConfig | None = None,
) -> Tensor:
    x, square_sums = normed
    rows, in_features = x.shape
    size = weight.shape[0] // 2
    out = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    config = config or product_config(x.device, x.dtype, "gate_up", rows, weight.shape)
    tiles, row_blocks = triton.cdiv(size, config.block_n), triton.cdiv(rows, config.block_r)
    splits = config.splits_of(in_features)
    partial, semaphores = scratch(x, tiles * row_blocks, splits, 2 * config.block_n * config.block_r, semaphores)
    with checks.device_guard(x):
        _linear_swiglu_kernel[(tiles * row_blocks * splits,)](
            x_ptr=x,
            square_sums_ptr=square_sums,
            weight_ptr=weight,
            out_ptr=out,
            partial_ptr=partial,
            semaphore_ptr=semaphores,
            stride_x=x.stride(0),
            stride_weight=weight.stride(0),
            rows=rows,
            row_blocks=row_blocks,
            in_features=in_features,
            size=size,
            parts=square_sums.shape[0],
            eps=eps,
            PARTS=triton.next_power_of_2(square_sums.shape[0]),
            BLOCK_N=config.block_n,
            **options_of(config, in_features, x.device),
        )
    return out


def _fake(normed, weight, **_):
    return normed.weighted.new_empty((normed.weighted.shape[0], weight.shape[0] // 2))


_operator = operator("linear_swiglu", _launch, reference.linear_swiglu, fake=_fake)


def linear_swiglu(normed: reference.DeferredNorm, eps: float, weight: Tensor, *, impl: checks.Impl = "auto") -> Tensor:
    """Projects rows to gate and up, and computes silu(gate) * up.

    Mutates nothing. Made for up to 256 rows. If it splits the channels, a small launch clears semaphores first.

    Args:
        normed: `DeferredNorm` of (rows, in_features), float16, bfloat16 or float32 (float64: impl "reference" only).
        eps: the norm's, added to the mean of the squares.
        weight: (2 * size, in_features), the dtype of the rows, gate first; any row stride with the last dim contiguous.
        impl: "auto" (Triton for CUDA tensors, PyTorch otherwise), "triton" or "reference".

    Returns:
        (rows, size), contiguous. Everything is computed in float32 and rounded once; separate norm, projection and
        activation round five times.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or strides that do not fit together.
        NotImplementedError: an implementation that cannot run here.

    Source: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202); Graef et al., FlashNorm (arXiv 2407.09577).

    Example:
        >>> normed = linear_add_norm(attended, o.weight, x, mlp_norm.weight)
        >>> h = linear_swiglu(normed, 1e-5, torch.cat((gate.weight, up.weight)))
        >>> normed = linear_add_norm(h, down.weight, x, next_attn_norm.weight)
    """
    x = checks.check_deferred(normed)
    checks.check_no_grad(weight=weight)
    checks.check_shape("weight", weight, (None, x.shape[1]), "(2 * size, in_features)")
    if weight.shape[0] % 2:
        raise ValueError(f"weight must have shape (2 * size, in_features), an even first size, got {weight.shape[0]}.")
    checks.check_same("normed.weighted", x, weight=weight)
    checks.check_last_dim_contiguous(weight=weight)
    return _operator(normed=normed, eps=eps, weight=weight, impl=checks.resolve_impl(impl, _linear_swiglu_kernel, x))
