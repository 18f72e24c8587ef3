"""A projection added to the residual stream, and the beginning of the next norm, in one kernel.

    s = round(residual + x w^T), the new residual                weighted = round(s * norm_weight)
    square_sums[part] = sum of s^2 over the 64 columns of a part

weighted and square_sums are a deferred norm for the next product. Products and sums are in float32. Layouts: x (rows,
in_features), weight (size, in_features), residual and weighted (rows, size), square_sums (parts, rows). Each program
computes some columns of a block of rows; the weight's rows are the long side of its product. For few rows it is
memory-bound, at one read of the weight: size * in_features elements, for 2 * rows * size * in_features operations.
"""

from torch import Tensor

from dkv.kernels import checks, reference
from dkv.kernels.configs import ProductConfig, product_config
from dkv.kernels.language import gdc_launch_dependents, gdc_wait, tl, triton
from dkv.kernels.operators import operator
from dkv.kernels.skinny import (
    PART,
    empty_deferred,
    is_last_to_arrive,
    keep_partial,
    load_tile,
    options_of,
    prefetch_into_l2,
    scratch,
    share_of,
    sum_of_partials,
)


@triton.jit(do_not_specialize=["rows", "row_blocks"])
def _linear_add_norm_kernel(
    # pointers
    x_ptr,
    weight_ptr,
    residual_ptr,
    norm_weight_ptr,
    weighted_ptr,
    square_sums_ptr,
    partial_ptr,
    semaphore_ptr,
    # strides
    stride_x,
    stride_weight,
    stride_residual,
    # sizes
    rows,
    row_blocks,
    in_features,
    size,
    # constants
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
    valid = columns < size
    offs_n = tl.minimum(columns, size - 1)
    weight_ptrs = weight_ptr + offs_n.to(tl.int64) * stride_weight
    if PDL:
        prefetch_into_l2(weight_ptrs, first, in_features, BLOCK_K)
        gdc_wait()
    offs_r = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    in_range = offs_r < rows
    x_ptrs = x_ptr + tl.minimum(offs_r, rows - 1).to(tl.int64) * stride_x
    written = valid[:, None] & in_range[None, :]
    residual_ptrs = residual_ptr + offs_r.to(tl.int64)[None, :] * stride_residual + columns[:, None]
    residual = tl.load(residual_ptrs, mask=written, other=0.0)
    norm_weight = tl.load(norm_weight_ptr + columns, mask=valid, other=0.0)
    acc = tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32)
    for step in range(first, last):
        x = load_tile(x_ptrs, step, in_features, BLOCK_K, MASK_K).T
        acc = tl.dot(load_tile(weight_ptrs, step, in_features, BLOCK_K, MASK_K), x, acc, input_precision="ieee")
    if PDL:
        gdc_launch_dependents()
    if SPLITS > 1:
        keep_partial(partial_ptr, output * SPLITS + split, acc)
        if not is_last_to_arrive(semaphore_ptr + output, SPLITS):
            return
        acc = sum_of_partials(partial_ptr, output * SPLITS, acc, SPLITS, 1)

    s = (residual.to(tl.float32) + acc).to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptrs, s, mask=written)
    s = tl.where(written, s.to(tl.float32), 0.0)
    weighted_ptrs = weighted_ptr + offs_r.to(tl.int64)[None, :] * size + columns[:, None]
    tl.store(weighted_ptrs, (s * norm_weight.to(tl.float32)[:, None]).to(weighted_ptr.dtype.element_ty), mask=written)
    # [BLOCK_N // PART, BLOCK_R]
    square_sums = tl.sum((s * s).reshape(BLOCK_N // PART, PART, BLOCK_R), 1)
    parts = tile * (BLOCK_N // PART) + tl.arange(0, BLOCK_N // PART)
    exists = (parts < tl.cdiv(size, PART))[:, None] & in_range[None, :]
    tl.store(square_sums_ptr + parts[:, None] * rows + offs_r[None, :], square_sums, mask=exists)


def _launch(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    *,
    semaphores: Tensor | None = None,
    config: ProductConfig | None = None,
) -> reference.DeferredNorm:
    rows, in_features = x.shape
    size = weight.shape[0]
    weighted, square_sums = normed = empty_deferred(residual)
    if weighted.numel() == 0:
        return normed
    config = config or product_config(x.device, x.dtype, "residual", rows, weight.shape)
    tiles, row_blocks = triton.cdiv(size, config.block_n), triton.cdiv(rows, config.block_r)
    splits = config.splits_of(in_features)
    partial, semaphores = scratch(x, tiles * row_blocks, splits, config.block_n * config.block_r, semaphores)
    with checks.device_guard(x):
        _linear_add_norm_kernel[(tiles * row_blocks * splits,)](
            x_ptr=x,
            weight_ptr=weight,
            residual_ptr=residual,
            norm_weight_ptr=norm_weight,
            weighted_ptr=weighted,
            square_sums_ptr=square_sums,
            partial_ptr=partial,
            semaphore_ptr=semaphores,
            stride_x=x.stride(0),
            stride_weight=weight.stride(0),
            stride_residual=residual.stride(0),
            rows=rows,
            row_blocks=row_blocks,
            in_features=in_features,
            size=size,
            BLOCK_N=config.block_n,
            **options_of(config, in_features, x.device),
        )
    return normed


def _fake(residual, **_):
    return empty_deferred(residual)


_operator = operator("linear_add_norm", _launch, reference.linear_add_norm, fake=_fake, mutates=("residual",))


def linear_add_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    *,
    impl: checks.Impl = "auto",
) -> reference.DeferredNorm:
    """Adds a projection of rows to the residual stream, and begins the RMS norm of the sum.

    Mutates residual in place: residual += x weight^T, computed in float32 and rounded to its dtype. Made for up to 256
    rows. If it splits the channels, a small launch clears semaphores first.

    Args:
        x: (rows, in_features), float16, bfloat16 or float32 (float64: impl "reference" only), any row stride with the
            last dim contiguous.
        weight: (size, in_features), the dtype of x; any row stride with the last dim contiguous.
        residual: (rows, size), the dtype of x, any row stride with the last dim contiguous, not expanded, and sharing
            no memory with the other tensors.
        norm_weight: (size,), the dtype of x, contiguous.
        impl: "auto" (Triton for CUDA tensors, PyTorch otherwise), "triton" or "reference".

    Returns:
        `DeferredNorm` of the sum; `linear_swiglu` or `linear_rope_cache_update` finishes it.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or strides that do not fit together.
        NotImplementedError: an implementation that cannot run here.

    Source: Graef et al., FlashNorm (arXiv 2407.09577).

    Example:
        >>> attended = delayed_attention(q, k_cache, v_cache, cu_seqlens_q)
        >>> normed = linear_add_norm(attended.flatten(1), o.weight, x, mlp_norm.weight)
    """
    checks.check_no_grad(x=x, weight=weight, residual=residual, norm_weight=norm_weight)
    checks.check_floating("x", x)
    checks.check_shape("x", x, (None, None), "(rows, in_features)")
    checks.check_shape("weight", weight, (None, x.shape[1]), "(size, in_features)")
    if x.shape[1] == 0:
        raise ValueError("x must have at least one column, got none.")
    size = weight.shape[0]
    checks.check_shape("residual", residual, (x.shape[0], size), "(rows, size)")
    checks.check_shape("norm_weight", norm_weight, (size,), "(size,)")
    checks.check_same("x", x, weight=weight, residual=residual, norm_weight=norm_weight)
    checks.check_last_dim_contiguous(x=x, weight=weight, residual=residual, norm_weight=norm_weight)
    checks.check_not_expanded(residual=residual)
    return _operator(
        x=x,
        weight=weight,
        residual=residual,
        norm_weight=norm_weight,
        impl=checks.resolve_impl(impl, _linear_add_norm_kernel, x),
    )
