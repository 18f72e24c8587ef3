"""The projections of queries, keys and values, their rotary embedding, and the write into the K/V cache, in one kernel.

For a deferred norm of rows x, s = rsqrt(mean(x^2) + eps), and a head of the merged weight, w1 and w2 its two halves:

    h1, h2 = s * (x * norm_weight) w1^T + bias1, s * (x * norm_weight) w2^T + bias2
    queries and keys: (h1 cos - h2 sin, h2 cos + h1 sin)    values: (h1, h2)    (RoPE, Su et al., arXiv 2104.09864)

in float32, rounded once. Layouts: rows (rows, in_features), weight ((nheads + 2 * nheads_k) * headdim, in_features):
queries, keys, values; caches (batch, seqlen_cache, nheads_k, headdim). Each program computes one head of a block of
rows; the weight's rows are the long side of its product. For few rows it is memory-bound, at one read of the weight:
out_features * in_features elements, for 2 * rows * out_features * in_features operations.
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


@triton.jit
def _store_halves(ptrs, first_half, second_half, valid):
    """Stores one head of each row; ptrs (rows,) point at its first element."""
    HALF: tl.constexpr = first_half.shape[0]
    first_ptrs = ptrs[None, :] + tl.arange(0, HALF)[:, None]
    tl.store(first_ptrs, first_half.to(ptrs.dtype.element_ty), mask=valid[None, :])
    tl.store(first_ptrs + HALF, second_half.to(ptrs.dtype.element_ty), mask=valid[None, :])


@triton.jit(do_not_specialize=["rows", "row_blocks", "parts", "seqlen_cache", "num_slots", "max_position"])
def _linear_rope_cache_kernel(
    # pointers
    x_ptr,
    square_sums_ptr,
    weight_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    q_rotated_ptr,
    partial_ptr,
    semaphore_ptr,
    # strides
    stride_x,
    stride_weight,
    stride_angle,
    stride_k_cache_row,
    stride_k_cache_column,
    stride_k_cache_head,
    stride_v_cache_row,
    stride_v_cache_column,
    stride_v_cache_head,
    # sizes
    rows,
    row_blocks,
    in_features,
    parts,
    seqlen_cache,
    num_slots,
    max_position,
    # scalars
    eps,
    # constants
    NHEADS: tl.constexpr,
    NHEADS_K: tl.constexpr,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    HEADS: tl.constexpr = NHEADS + 2 * NHEADS_K
    head, row_block, output, split, first, last = share_of(HEADS, row_blocks, in_features, SPLITS, BLOCK_K)
    # tiles are [HALF, BLOCK_R]: one half of a head by rows
    offs_d = tl.arange(0, HALF)
    features = head * (2 * HALF) + offs_d
    a_ptrs = weight_ptr + features.to(tl.int64) * stride_weight
    b_ptrs = a_ptrs + HALF * tl.cast(stride_weight, tl.int64)
    if PDL:
        prefetch_into_l2(a_ptrs, first, in_features, BLOCK_K)
        prefetch_into_l2(b_ptrs, first, in_features, BLOCK_K)
        gdc_wait()
    # rows beyond the last one repeat it, and are not written
    offs_r = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    in_range = offs_r < rows
    offs_r = tl.minimum(offs_r, rows - 1)
    square_sums = load_square_sums(square_sums_ptr, offs_r, rows, parts, PARTS)
    slots = tl.load(slots_ptr + offs_r)
    positions = tl.load(positions_ptr + offs_r)
    x_ptrs = x_ptr + offs_r.to(tl.int64) * stride_x
    a, b = two_products(x_ptrs, a_ptrs, b_ptrs, first, last, in_features, BLOCK_K, MASK_K)
    if PDL:
        gdc_launch_dependents()
    if SPLITS > 1:
        keep_partial(partial_ptr, 2 * (output * SPLITS + split), a)
        keep_partial(partial_ptr, 2 * (output * SPLITS + split) + 1, b)
        if not is_last_to_arrive(semaphore_ptr + output, SPLITS):
            return
        a = sum_of_partials(partial_ptr, 2 * output * SPLITS, a, SPLITS, 2)
        b = sum_of_partials(partial_ptr, 2 * output * SPLITS + 1, b, SPLITS, 2)

    scales = row_scales(square_sums, in_features, eps)
    a = a * scales[None, :]
    b = b * scales[None, :]
    if bias_ptr is not None:
        a += tl.load(bias_ptr + features).to(tl.float32)[:, None]
        b += tl.load(bias_ptr + features + HALF).to(tl.float32)[:, None]
    # padding entries have no position and write nothing to the cache
    written = in_range & (slots >= 0) & (slots < num_slots)
    # narrow integers divide fast; checked slots fit
    slots = tl.where(written, slots, 0).to(num_slots.dtype)
    cache_rows = (slots // seqlen_cache).to(tl.int64)
    cache_columns = (slots % seqlen_cache).to(tl.int64)
    if head < NHEADS + NHEADS_K:
        positions = tl.minimum(tl.maximum(positions, 0), max_position - 1).to(tl.int64)
        offs_angle = positions[None, :] * stride_angle + offs_d[:, None]
        cos = tl.load(cos_ptr + offs_angle)
        sin = tl.load(sin_ptr + offs_angle)
        a, b = a * cos - b * sin, b * cos + a * sin
        if head < NHEADS:
            a = tl.where(written[None, :], a, 0.0)
            b = tl.where(written[None, :], b, 0.0)
            q_ptrs = q_rotated_ptr + (offs_r.to(tl.int64) * NHEADS + head) * (2 * HALF)
            _store_halves(q_ptrs, a, b, in_range)
        else:
            k_ptrs = k_cache_ptr + cache_rows * stride_k_cache_row + cache_columns * stride_k_cache_column
            _store_halves(k_ptrs + (head - NHEADS).to(tl.int64) * stride_k_cache_head, a, b, written)
    else:
        v_ptrs = v_cache_ptr + cache_rows * stride_v_cache_row + cache_columns * stride_v_cache_column
        _store_halves(v_ptrs + (head - NHEADS - NHEADS_K).to(tl.int64) * stride_v_cache_head, a, b, written)


def _launch(
    normed: reference.DeferredNorm,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    semaphores: Tensor | None = None,
    config: ProductConfig | None = None,
) -> Tensor:
    x, square_sums = normed
    rows, in_features = x.shape
    nheads_k, headdim = k_cache.shape[2:]
    heads = weight.shape[0] // headdim
    nheads = heads - 2 * nheads_k
    q_rotated = torch.empty((rows, nheads, headdim), dtype=x.dtype, device=x.device)
    if rows == 0 or heads == 0:
        return q_rotated
    config = config or product_config(x.device, x.dtype, "qkv", rows, weight.shape)
    row_blocks, splits = triton.cdiv(rows, config.block_r), config.splits_of(in_features)
    partial, semaphores = scratch(x, heads * row_blocks, splits, headdim * config.block_r, semaphores)
    with checks.device_guard(x):
        _linear_rope_cache_kernel[(heads * row_blocks * splits,)](
            x_ptr=x,
            square_sums_ptr=square_sums,
            weight_ptr=weight,
            bias_ptr=bias,
            cos_ptr=cos,
            sin_ptr=sin,
            positions_ptr=positions,
            slots_ptr=slots,
            k_cache_ptr=k_cache,
            v_cache_ptr=v_cache,
            q_rotated_ptr=q_rotated,
            partial_ptr=partial,
            semaphore_ptr=semaphores,
            stride_x=x.stride(0),
            stride_weight=weight.stride(0),
            stride_angle=cos.stride(0),
            stride_k_cache_row=k_cache.stride(0),
            stride_k_cache_column=k_cache.stride(1),
            stride_k_cache_head=k_cache.stride(2),
            stride_v_cache_row=v_cache.stride(0),
            stride_v_cache_column=v_cache.stride(1),
            stride_v_cache_head=v_cache.stride(2),
            rows=rows,
            row_blocks=row_blocks,
            in_features=in_features,
            parts=square_sums.shape[0],
            # a cache without columns gets no write, but the kernel divides by their number
            seqlen_cache=max(k_cache.shape[1], 1),
            num_slots=k_cache.shape[0] * k_cache.shape[1],
            max_position=cos.shape[0],
            eps=eps,
            NHEADS=nheads,
            NHEADS_K=nheads_k,
            HALF=headdim // 2,
            PARTS=triton.next_power_of_2(square_sums.shape[0]),
            **options_of(config, in_features, x.device),
        )
    return q_rotated


def _fake(normed, weight, k_cache, **_):
    nheads_k, headdim = k_cache.shape[2:]
    return normed.weighted.new_empty((normed.weighted.shape[0], weight.shape[0] // headdim - 2 * nheads_k, headdim))


_operator = operator(
    "linear_rope_cache_update",
    _launch,
    reference.linear_rope_cache_update,
    fake=_fake,
    mutates=("k_cache", "v_cache"),
)


def linear_rope_cache_update(
    normed: reference.DeferredNorm,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    impl: checks.Impl = "auto",
) -> Tensor:
    """Projects rows to queries, keys and values, rotates, and writes keys and values into their cache slots.

    Mutates k_cache and v_cache in place, at the given slots only. Distinct rows must have distinct slots. Made for up
    to 256 rows. If it splits the channels, a small launch clears semaphores first.

    Args:
        normed: `DeferredNorm` of (rows, in_features), float16, bfloat16 or float32 (float64: impl "reference" only).
        eps: the norm's, added to the mean of the squares.
        weight: ((nheads + 2 * nheads_k) * headdim, in_features), the dtype of the rows: queries, keys, values in this
            order; any row stride with the last dim contiguous. headdim is 16, 32, 64 or 128, nheads a multiple of
            nheads_k.
        bias: ((nheads + 2 * nheads_k) * headdim,), contiguous, or None.
        cos, sin: (max_position, headdim // 2) float32, of the half-split RoPE.
        positions: (rows,) int32 or int64: the RoPE position of each row, clamped to 0 .. max_position - 1.
        slots: (rows,) int32 or int64: row * seqlen_cache + column of each one's K/V. A slot that the cache does not
            have, such as -1, marks padding: nothing is written, and the rotated query is zero.
        k_cache, v_cache: (batch, seqlen_cache, nheads_k, headdim), the dtype of the rows, any strides with the last dim
            contiguous, not expanded.
        impl: "auto" (Triton for CUDA tensors, PyTorch otherwise), "triton" or "reference".

    Returns:
        q_rotated (rows, nheads, headdim), contiguous. Everything is computed in float32 and rounded once; separate
        norm, projection and rotation round four times.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or strides that do not fit together.
        NotImplementedError: another headdim, an implementation that cannot run here.

    Source: Su et al., RoFormer (arXiv 2104.09864); Graef et al., FlashNorm (arXiv 2407.09577).

    Example:
        >>> normed = deferred_norm(x, attn_norm.weight)
        >>> q = linear_rope_cache_update(normed, 1e-5, qkv_weight, None, cos, sin, positions, slots, k_cache, v_cache)
        >>> attended = delayed_attention(q, k_cache, v_cache, cu_seqlens_q)
    """
    x = checks.check_deferred(normed)
    checks.check_no_grad(weight=weight, bias=bias, k_cache=k_cache, v_cache=v_cache)
    rows, in_features = x.shape
    cache_shape = "(batch, seqlen_cache, nheads_k, headdim)"
    checks.check_shape("k_cache", k_cache, (None, None, None, None), cache_shape)
    checks.check_shape("v_cache", v_cache, k_cache.shape, cache_shape)
    nheads_k, headdim = k_cache.shape[2:]
    checks.check_headdim(headdim)
    checks.check_shape("weight", weight, (None, in_features), "((nheads + 2 * nheads_k) * headdim, in_features)")
    heads = weight.shape[0] // headdim
    nheads = heads - 2 * nheads_k
    if weight.shape[0] % headdim or nheads < 0:
        heads_first = checks.heads_first_hint(heads - 2 * k_cache.shape[1], k_cache.shape[1])
        raise ValueError(
            f"weight must have (nheads + 2 * nheads_k) * headdim rows, for caches of {nheads_k} heads of {headdim} "
            f"each, got {weight.shape[0]}{heads_first}."
        )
    if nheads > 0 and nheads_k > 0:
        checks.check_heads(nheads, nheads_k)
    checks.check_same("normed.weighted", x, weight=weight, k_cache=k_cache, v_cache=v_cache)
    if bias is not None:
        checks.check_shape("bias", bias, (weight.shape[0],), "((nheads + 2 * nheads_k) * headdim,)")
        checks.check_same("normed.weighted", x, bias=bias)
        checks.check_last_dim_contiguous(bias=bias)
    checks.check_rope(cos, sin, headdim, x)
    checks.check_tensor("positions", positions, x, (rows,), "(rows,)", torch.int32, torch.int64)
    checks.check_tensor("slots", slots, x, (rows,), "(rows,)", torch.int32, torch.int64)
    checks.check_last_dim_contiguous(weight=weight, k_cache=k_cache, v_cache=v_cache)
    checks.check_not_expanded(k_cache=k_cache, v_cache=v_cache)
    return _operator(
        normed=normed,
        eps=eps,
        weight=weight,
        bias=bias,
        cos=cos,
        sin=sin,
        positions=positions,
        slots=slots,
        k_cache=k_cache,
        v_cache=v_cache,
        impl=checks.resolve_impl(impl, _linear_rope_cache_kernel, x),
    )
