"""Rotary position embedding of new queries and keys, and the write into a position-indexed K/V cache, in one launch.

With x = (x1, x2) the two halves of a head and the angles of the token's position:

    rotated(x) = (x1 cos - x2 sin, x2 cos + x1 sin)          (half-split RoPE, Su et al., arXiv 2104.09864)

Keys are stored rotated: a position never changes, so a stable key is never rotated again. Layouts: q (total, nheads,
headdim), k and v (total, nheads_k, headdim), caches (batch, seqlen_cache, nheads_k, headdim), any strides with the last
dim contiguous. Each program handles a few heads of one token; it is memory-bound, at 2 * (q + k + v) bytes.
"""

import torch
from torch import Tensor

from dkv.kernels import checks, reference
from dkv.kernels.configs import rope_config
from dkv.kernels.language import tl, triton
from dkv.kernels.operators import operator


@triton.jit
def _rotate(x_ptrs, valid, cos, sin, HALF: tl.constexpr):
    """Both halves of some heads, rotated in float32; x_ptrs points at the first half."""
    x1 = tl.load(x_ptrs, mask=valid, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptrs + HALF, mask=valid, other=0.0).to(tl.float32)
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


@triton.jit(do_not_specialize=["total", "seqlen_cache", "num_slots", "max_position"])
def _rope_cache_kernel(
    # pointers
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    k_cache_ptr,
    v_cache_ptr,
    q_rotated_ptr,
    # strides
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_angle,
    stride_k_cache_row,
    stride_k_cache_column,
    stride_k_cache_head,
    stride_v_cache_row,
    stride_v_cache_column,
    stride_v_cache_head,
    # sizes
    total,
    seqlen_cache,
    num_slots,
    max_position,
    # constants
    NHEADS: tl.constexpr,
    NHEADS_K: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    Q_BLOCKS: tl.constexpr = (NHEADS + BLOCK_H - 1) // BLOCK_H
    # tiles are [BLOCK_T, BLOCK_H, HALF]: tokens, heads, one half of a head
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :, None]
    offs_d = tl.arange(0, HALF)[None, None, :]
    in_range = tokens < total

    # padding entries have no position and write nothing to the cache
    slots = tl.load(slots_ptr + tokens, mask=in_range, other=-1)
    written = (slots >= 0) & (slots < num_slots)
    # narrow integers divide fast; checked slots fit
    slots = slots.to(num_slots.dtype)
    positions = tl.load(positions_ptr + tokens, mask=written, other=0)
    positions = tl.minimum(tl.maximum(positions, 0), max_position - 1).to(tl.int64)
    # [BLOCK_T, 1, HALF]
    cos = tl.load(cos_ptr + positions * stride_angle + offs_d)
    sin = tl.load(sin_ptr + positions * stride_angle + offs_d)

    if tl.program_id(1) < Q_BLOCKS:
        valid = (heads < NHEADS) & (offs_d < HALF)
        q_ptrs = q_ptr + tokens * stride_q_token + heads * stride_q_head + offs_d
        q1, q2 = _rotate(q_ptrs, valid & written, cos, sin, HALF)
        q_rotated_ptrs = q_rotated_ptr + (tokens * NHEADS + heads) * (2 * HALF) + offs_d
        tl.store(q_rotated_ptrs, q1.to(q_rotated_ptr.dtype.element_ty), mask=valid & in_range)
        tl.store(q_rotated_ptrs + HALF, q2.to(q_rotated_ptr.dtype.element_ty), mask=valid & in_range)
    else:
        heads -= Q_BLOCKS * BLOCK_H
        valid = (heads < NHEADS_K) & (offs_d < HALF) & written
        rows = (slots // seqlen_cache).to(tl.int64)
        columns = (slots % seqlen_cache).to(tl.int64)
        k_ptrs = k_ptr + tokens * stride_k_token + heads * stride_k_head + offs_d
        k1, k2 = _rotate(k_ptrs, valid, cos, sin, HALF)
        k_cache_ptrs = k_cache_ptr + rows * stride_k_cache_row + columns * stride_k_cache_column
        k_cache_ptrs += heads * stride_k_cache_head + offs_d
        tl.store(k_cache_ptrs, k1.to(k_cache_ptr.dtype.element_ty), mask=valid)
        tl.store(k_cache_ptrs + HALF, k2.to(k_cache_ptr.dtype.element_ty), mask=valid)
        v_ptrs = v_ptr + tokens * stride_v_token + heads * stride_v_head + offs_d
        v_cache_ptrs = v_cache_ptr + rows * stride_v_cache_row + columns * stride_v_cache_column
        v_cache_ptrs += heads * stride_v_cache_head + offs_d
        tl.store(v_cache_ptrs, tl.load(v_ptrs, mask=valid, other=0.0), mask=valid)
        tl.store(v_cache_ptrs + HALF, tl.load(v_ptrs + HALF, mask=valid, other=0.0), mask=valid)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    total, nheads, headdim = q.shape
    nheads_k = k.shape[1]
    q_rotated = torch.empty((total, nheads, headdim), dtype=q.dtype, device=q.device)
    if total == 0:
        return q_rotated
    config = rope_config(q.device, headdim)
    head_blocks = triton.cdiv(nheads, config.block_h) + triton.cdiv(nheads_k, config.block_h)
    with checks.device_guard(q):
        _rope_cache_kernel[(triton.cdiv(total, config.block_t), head_blocks)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            cos_ptr=cos,
            sin_ptr=sin,
            positions_ptr=positions,
            slots_ptr=slots,
            k_cache_ptr=k_cache,
            v_cache_ptr=v_cache,
            q_rotated_ptr=q_rotated,
            stride_q_token=q.stride(0),
            stride_q_head=q.stride(1),
            stride_k_token=k.stride(0),
            stride_k_head=k.stride(1),
            stride_v_token=v.stride(0),
            stride_v_head=v.stride(1),
            stride_angle=cos.stride(0),
            stride_k_cache_row=k_cache.stride(0),
            stride_k_cache_column=k_cache.stride(1),
            stride_k_cache_head=k_cache.stride(2),
            stride_v_cache_row=v_cache.stride(0),
            stride_v_cache_column=v_cache.stride(1),
            stride_v_cache_head=v_cache.stride(2),
            total=total,
            # a cache without columns gets no write, but the kernel divides by their number
            seqlen_cache=max(k_cache.shape[1], 1),
            num_slots=k_cache.shape[0] * k_cache.shape[1],
            max_position=cos.shape[0],
            NHEADS=nheads,
            NHEADS_K=nheads_k,
            HALF=headdim // 2,
            BLOCK_T=config.block_t,
            BLOCK_H=config.block_h,
            num_warps=config.num_warps,
        )
    return q_rotated


def _fake(q, **_):
    return q.new_empty(q.shape)


_operator = operator(
    "rope_cache_update", _launch, reference.rope_cache_update, fake=_fake, mutates=("k_cache", "v_cache")
)


def rope_cache_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    impl: checks.Impl = "auto",
) -> Tensor:
    """Rotates packed queries and keys by their positions and writes keys and values into their cache slots.

    Mutates k_cache and v_cache in place, at the given slots only. Distinct tokens must have distinct slots.

    Args:
        q: (total, nheads, headdim), float16, bfloat16 or float32 (float64: impl "reference" only), any strides with
            the last dim contiguous. headdim is 16, 32, 64 or 128.
        k, v: (total, nheads_k, headdim), the dtype of q. nheads is a multiple of nheads_k. Either may be 0: with nheads
            0 only keys and values are written, with nheads_k 0 only queries are rotated.
        cos, sin: (max_position, headdim // 2) float32, of the half-split RoPE.
        positions: (total,) int32 or int64: the RoPE position of each token, clamped to 0 .. max_position - 1.
        slots: (total,) int32 or int64: row * seqlen_cache + column of each token's K/V (vLLM's slot_mapping). A slot
            that the cache does not have, such as -1, marks padding: nothing is written, and the rotated query is zero.
        k_cache, v_cache: (batch, seqlen_cache, nheads_k, headdim), the dtype of q, any strides with the last dim
            contiguous, not expanded.
        impl: "auto" (Triton for CUDA tensors, PyTorch otherwise), "triton" or "reference".

    Returns:
        q_rotated (total, nheads, headdim), contiguous; rotated in float32 and rounded once.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or strides that do not fit together.
        NotImplementedError: another headdim, an implementation that cannot run here.

    Source: Su et al., RoFormer (arXiv 2104.09864).

    Example:
        >>> slots = row * k_cache.shape[1] + positions
        >>> q_rotated = rope_cache_update(q, k, v, cos, sin, positions, slots, k_cache, v_cache)
        >>> out = delayed_attention(q_rotated, k_cache, v_cache, cu_seqlens_q)
    """
    checks.check_no_grad(q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    checks.check_floating("q", q)
    checks.check_shape("q", q, (None, None, None), "(total, nheads, headdim)")
    total, nheads, headdim = q.shape
    checks.check_headdim(headdim)
    checks.check_shape("k", k, (total, None, headdim), "(total, nheads_k, headdim)")
    checks.check_shape("v", v, k.shape, "(total, nheads_k, headdim)")
    nheads_k = k.shape[1]
    if nheads > 0 and nheads_k > 0:
        checks.check_heads(nheads, nheads_k)
    cache_shape = "(batch, seqlen_cache, nheads_k, headdim)"
    checks.check_shape("k_cache", k_cache, (None, None, nheads_k, headdim), cache_shape)
    checks.check_shape("v_cache", v_cache, k_cache.shape, cache_shape)
    checks.check_same("q", q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    checks.check_rope(cos, sin, headdim, q)
    checks.check_tensor("positions", positions, q, (total,), "(total,)", torch.int32, torch.int64)
    checks.check_tensor("slots", slots, q, (total,), "(total,)", torch.int32, torch.int64)
    checks.check_last_dim_contiguous(q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    checks.check_not_expanded(k_cache=k_cache, v_cache=v_cache)
    return _operator(
        q=q,
        k=k,
        v=v,
        cos=cos,
        sin=sin,
        positions=positions,
        slots=slots,
        k_cache=k_cache,
        v_cache=v_cache,
        impl=checks.resolve_impl(impl, _rope_cache_kernel, q),
    )
