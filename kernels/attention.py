"""Bidirectional attention of a few packed queries over a position-indexed K/V cache.

For query i of row b and head h, with S = the valid columns of row b and h_k = h // (nheads / nheads_k):

    out[i, h] = sum_{j in S} softmax_j(softmax_scale * q[i, h] . k_cache[b, j, h_k]) v_cache[b, j, h_k]

Layouts: q (total, nheads, headdim) packed by row as `cu_seqlens_q` says; caches (batch, seqlen_cache, nheads_k,
headdim), any strides with the last dim contiguous. The query heads that share a K/V head are rows of the same tile, so
K and V are read once for all of them. A few rows over many keys would leave most of a GPU idle: then the keys are
split, each split writes a normalised partial result, and a second kernel merges these by their log-sum-exp (Dao et al.,
"Flash-Decoding for long-context inference", 2023).
"""

from typing import Any

import torch
from torch import Tensor

from dkv.kernels import checks, reference
from dkv.kernels.configs import (
    MAX_SPLITS,
    attention_config,
    merge_config,
    num_sms,
    num_splits_heuristic,
    uses_pdl,
)
from dkv.kernels.language import gdc_launch_dependents, gdc_wait, tl, triton
from dkv.kernels.operators import operator
from dkv.kernels.packing import load_bound

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend_tile(
    q,
    k_ptrs,
    v_ptrs,
    valid,
    acc,
    row_max,
    row_sum,
    scale_log2,
    MASKED: tl.constexpr,
):
    """One online-softmax step over a tile of keys; scores are in units of log2(e)."""
    if MASKED:
        # [HEADDIM, BLOCK_N]
        k = tl.load(k_ptrs, mask=valid[None, :], other=0.0)
    else:
        k = tl.load(k_ptrs)
    # [BLOCK_M, BLOCK_N]
    scores = tl.dot(q, k, input_precision="ieee") * scale_log2
    if MASKED:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # a row without a valid key so far keeps -inf; a finite pivot avoids exp2(-inf - -inf) = NaN
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
    probs = tl.exp2(scores - pivot[:, None])
    rescale = tl.exp2(row_max - pivot)
    row_sum = row_sum * rescale + tl.sum(probs, 1)
    if MASKED:
        # [BLOCK_N, HEADDIM], zeros where invalid: the memory may hold NaN, and 0 * NaN is NaN
        v = tl.load(v_ptrs, mask=valid[:, None], other=0.0)
    else:
        v = tl.load(v_ptrs)
    acc = tl.dot(probs.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, row_sum


@triton.jit
def _load_lanes(ptr, count, OTHER: tl.constexpr, BLOCK_N: tl.constexpr):
    """Loads BLOCK_N entries, OTHER from `count` on, one per lane in two tensors, so that every warp has all of them.

    Up to 32 entries fit one tensor, which is then returned twice.
    """
    tl.static_assert(BLOCK_N <= 64)
    LANES: tl.constexpr = min(BLOCK_N, 32)
    lanes = tl.arange(0, LANES)
    low = tl.load(ptr + lanes, mask=lanes < count, other=OTHER)
    high = low
    if BLOCK_N > LANES:
        high = tl.load(ptr + lanes + LANES, mask=lanes + LANES < count, other=OTHER)
    return low, high


@triton.jit
def _join_lanes(low, high, BLOCK_N: tl.constexpr):
    """[BLOCK_N] truth values from two tensors of `_load_lanes`.

    They pass through the bits of scalars. Otherwise the compiler would load them again for each layout: the scores have
    a different one from K and V.
    """
    LANES: tl.constexpr = min(BLOCK_N, 32)
    lanes = tl.arange(0, LANES)
    offs_n = tl.arange(0, BLOCK_N)
    bits = tl.sum(low.to(tl.int32) << lanes, 0)
    if BLOCK_N > LANES:
        bits = tl.where(offs_n < LANES, bits, tl.sum(high.to(tl.int32) << lanes, 0))
    return (bits >> (offs_n % LANES)) & 1 != 0


@triton.jit(do_not_specialize=["batch", "total", "blocks", "seqlen_cache", "max_keys", "splits"])
def _delayed_attention_kernel(
    # pointers
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    leftpad_ptr,
    seqlens_ptr,
    mask_ptr,
    index_ptr,
    # strides
    stride_q_token,
    stride_q_head,
    stride_k_row,
    stride_k_column,
    stride_k_head,
    stride_v_row,
    stride_v_column,
    stride_v_head,
    stride_mask_row,
    stride_index_row,
    # sizes
    batch,
    total,
    blocks,
    seqlen_cache,
    max_keys,
    splits,
    # scalars
    softmax_scale,
    # constants
    GROUP: tl.constexpr,
    NHEADS_K: tl.constexpr,
    HEADDIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_LEFTPAD: tl.constexpr,
    HAS_SEQLENS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    FULL_TILES_FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
    # the query blocks of one (row, K/V head) are neighbours, so all but the first find K and V in the L2
    block = tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks // NHEADS_K
    head_k = tl.program_id(0) // blocks % NHEADS_K
    split = tl.program_id(1)
    NHEADS: tl.constexpr = GROUP * NHEADS_K
    offs_d = tl.arange(0, HEADDIM)

    # programs of row `batch` exist in unsplit launches only: they clear the padding queries before the first row and
    # after the last one
    if row == batch:
        in_front = load_bound(cu_seqlens_q_ptr, 0, total)
        end = load_bound(cu_seqlens_q_ptr, batch, total)
        count = in_front + total - end
        for start in range(block * BLOCK_M, count, blocks * BLOCK_M):
            padding = start + tl.arange(0, BLOCK_M)
            tokens = tl.where(padding < in_front, padding, padding - in_front + end).to(tl.int64)
            for group in range(GROUP):
                head = head_k * GROUP + group
                out_ptrs = out_ptr + (tokens[:, None] * NHEADS + head) * HEADDIM + offs_d[None, :]
                zeros = tl.zeros([BLOCK_M, HEADDIM], dtype=out_ptr.dtype.element_ty)
                tl.store(out_ptrs, zeros, mask=(padding < count)[:, None])
                tl.store(lse_ptr + head * total.to(tl.int64) + tokens, float("-inf"), mask=padding < count)
        return

    query_start = load_bound(cu_seqlens_q_ptr, row, total)
    queries = load_bound(cu_seqlens_q_ptr, row + 1, total) - query_start
    if block * BLOCK_M >= queries * GROUP:
        return

    # scalar bases in 64 bits, offsets within the row in 32; tile row r is query r // GROUP, query head r % GROUP
    first_token = query_start.to(tl.int64)
    first_head = head_k.to(tl.int64) * GROUP
    q_base = q_ptr + first_token * stride_q_token + first_head * stride_q_head
    first_out = split.to(tl.int64) * total * NHEADS
    out_base = out_ptr + (first_out + first_token * NHEADS + first_head) * HEADDIM
    lse_base = lse_ptr + first_out + first_head * total + first_token

    # queries beyond the caller's max_seqlen_q have no program: NaN shows the mistake
    if block == blocks - 1:
        for start in range((block + 1) * BLOCK_M, queries * GROUP, BLOCK_M):
            beyond = start + tl.arange(0, BLOCK_M)
            nans = tl.full([BLOCK_M, HEADDIM], float("nan"), dtype=tl.float32).to(out_ptr.dtype.element_ty)
            offs_out = beyond // GROUP * NHEADS + beyond % GROUP
            out_ptrs = out_base + offs_out[:, None] * HEADDIM + offs_d[None, :]
            tl.store(out_ptrs, nans, mask=(beyond < queries * GROUP)[:, None])
            tl.store(lse_base + beyond % GROUP * total + beyond // GROUP, float("nan"), mask=beyond < queries * GROUP)

    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    in_range = offs_m < queries * GROUP
    # [BLOCK_M, HEADDIM]
    q_ptrs = q_base + (offs_m // GROUP * stride_q_token + offs_m % GROUP * stride_q_head)[:, None] + offs_d[None, :]
    q = tl.load(q_ptrs, mask=in_range[:, None], other=0.0)

    first_key = 0
    if HAS_LEFTPAD:
        first_key = tl.maximum(tl.load(leftpad_ptr + row), 0)
    end_key = seqlen_cache
    if HAS_SEQLENS:
        end_key = tl.maximum(tl.minimum(tl.load(seqlens_ptr + row), seqlen_cache), 0)
    # the loop walks columns, or entries of the key index
    loop_start = first_key
    loop_end = end_key
    if HAS_INDEX:
        loop_start = 0
        loop_end = max_keys
    if IS_SPLIT:
        tiles_per_split = tl.cdiv(tl.cdiv(loop_end - loop_start, BLOCK_N), splits)
        loop_start += split * tiles_per_split * BLOCK_N
        loop_end = tl.minimum(loop_end, loop_start + tiles_per_split * BLOCK_N)

    row64 = row.to(tl.int64)
    k_base = k_ptr + row64 * stride_k_row + head_k.to(tl.int64) * stride_k_head
    v_base = v_ptr + row64 * stride_v_row + head_k.to(tl.int64) * stride_v_head
    scale_log2 = softmax_scale * LOG2_E
    acc = tl.zeros([BLOCK_M, HEADDIM], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

    tail_start = loop_start
    if FULL_TILES_FIRST:
        # full tiles without a mask, then one masked tail: fewer registers if wgmma holds the scores
        tail_start = loop_start + tl.maximum(loop_end - loop_start, 0) // BLOCK_N * BLOCK_N
        for start in range(loop_start, tail_start, BLOCK_N):
            columns = (start + offs_n).to(tl.int64)
            k_ptrs = k_base + columns[None, :] * stride_k_column + offs_d[:, None]
            v_ptrs = v_base + columns[:, None] * stride_v_column + offs_d[None, :]
            acc, row_max, row_sum = _attend_tile(
                q, k_ptrs, v_ptrs, columns, acc, row_max, row_sum, scale_log2, MASKED=False
            )
    # a tile's columns and mask are loaded one tile ahead, so that its K and V need not wait for them
    if HAS_INDEX:
        index_row = index_ptr + row64 * stride_index_row
        next_columns = tl.load(index_row + tail_start + offs_n, mask=offs_n < loop_end - tail_start, other=-1)
        low, high = _load_lanes(index_row + tail_start, loop_end - tail_start, OTHER=-1, BLOCK_N=BLOCK_N)
    if HAS_MASK:
        mask_row = mask_ptr + row64 * stride_mask_row
        if not HAS_INDEX:
            low, high = _load_lanes(mask_row + tail_start, loop_end - tail_start, OTHER=0, BLOCK_N=BLOCK_N)
    for start in range(tail_start, loop_end, BLOCK_N):
        columns = start + offs_n
        valid = columns < loop_end
        if HAS_INDEX:
            columns = next_columns
            ahead = start + BLOCK_N
            next_columns = tl.load(index_row + ahead + offs_n, mask=offs_n < loop_end - ahead, other=-1)
            low_valid = (low >= first_key) & (low < end_key)
            high_valid = (high >= first_key) & (high < end_key)
            if HAS_MASK:
                low_valid = low_valid & (tl.load(mask_row + low, mask=low_valid, other=0) != 0)
                high_valid = high_valid & (tl.load(mask_row + high, mask=high_valid, other=0) != 0)
            valid = _join_lanes(low_valid, high_valid, BLOCK_N=BLOCK_N)
            low, high = _load_lanes(index_row + ahead, loop_end - ahead, OTHER=-1, BLOCK_N=BLOCK_N)
        elif HAS_MASK:
            valid = _join_lanes(low != 0, high != 0, BLOCK_N=BLOCK_N)
            low, high = _load_lanes(mask_row + start + BLOCK_N, loop_end - start - BLOCK_N, OTHER=0, BLOCK_N=BLOCK_N)
        columns = columns.to(tl.int64)
        if HAS_INDEX:
            # K in the layout of V, so that the index is loaded once for both
            k_ptrs = tl.trans(k_base + columns[:, None] * stride_k_column + offs_d[None, :])
        else:
            k_ptrs = k_base + columns[None, :] * stride_k_column + offs_d[:, None]
        v_ptrs = v_base + columns[:, None] * stride_v_column + offs_d[None, :]
        acc, row_max, row_sum = _attend_tile(q, k_ptrs, v_ptrs, valid, acc, row_max, row_sum, scale_log2, MASKED=True)

    if PDL:
        gdc_launch_dependents()
    # no valid key: zeros and lse = -inf
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    acc = acc / row_sum[:, None]
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
    offs_out = offs_m // GROUP * NHEADS + offs_m % GROUP
    out_ptrs = out_base + offs_out[:, None] * HEADDIM + offs_d[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=in_range[:, None])
    tl.store(lse_base + offs_m % GROUP * total + offs_m // GROUP, lse, mask=in_range)


@triton.jit(do_not_specialize=["batch", "total", "splits"])
def _merge_splits_kernel(
    # pointers
    partial_out_ptr,
    partial_lse_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    # sizes
    batch,
    total,
    splits,
    # constants
    NHEADS: tl.constexpr,
    HEADDIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merges the partial results of up to SPLITS splits; a tile row is one query of one head."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, HEADDIM)
    offs_s = tl.arange(0, SPLITS)
    rows = total.to(tl.int64) * NHEADS
    in_range = offs_m < rows
    # lse is laid out (nheads, total), out (total, nheads, headdim)
    tokens = offs_m // NHEADS
    offs_lse = (offs_m % NHEADS).to(tl.int64) * total + tokens
    offs_out = offs_m.to(tl.int64)[:, None] * HEADDIM + offs_d[None, :]

    # one trip to memory: all loads are issued before the first wait, large ones first
    valid = (offs_s < splits)[:, None] & in_range[None, :]
    # [SPLITS, BLOCK_M, HEADDIM]
    partial_ptrs = partial_out_ptr + (offs_s * (rows * HEADDIM))[:, None, None] + offs_out[None, :, :]
    partial = tl.load(partial_ptrs, mask=valid[:, :, None], other=0.0)
    # [SPLITS, BLOCK_M]
    lse_ptrs = partial_lse_ptr + (offs_s * rows)[:, None] + offs_lse[None, :]
    lse = tl.load(lse_ptrs, mask=valid, other=float("-inf"))
    # the first and the last bound in one load: with two, one would wait
    ends = tl.load(cu_seqlens_q_ptr + tl.arange(0, 2) * batch)

    max_lse = tl.max(lse, 0)
    pivot = tl.where(max_lse == float("-inf"), 0.0, max_lse)
    weights = tl.exp2((lse - pivot[None, :]) * LOG2_E)
    weight_sum = tl.sum(weights, 0)
    # no valid key; or a padding query, whose partial results were never written
    first, last = tl.sum(tl.where(tl.arange(0, 2) == 0, ends, 0)), tl.sum(tl.where(tl.arange(0, 2) == 1, ends, 0))
    empty = (weight_sum == 0.0) | (tokens < first) | (tokens >= last)
    weight_sum = tl.where(empty, 1.0, weight_sum)
    # [BLOCK_M, HEADDIM]
    out = tl.sum(partial * weights[:, :, None], 0) / weight_sum[:, None]
    out = tl.where(empty[:, None], 0.0, out)
    lse = tl.where(empty, float("-inf"), pivot + tl.log2(weight_sum) * LN_2)
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=in_range[:, None])
    tl.store(lse_ptr + offs_lse, lse, mask=in_range)


def _launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    *,
    max_seqlen_q: int | None = None,
    cache_leftpad: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_index: Tensor | None = None,
    softmax_scale: float | None = None,
    num_splits: int | None = None,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    total, nheads, headdim = q.shape
    batch, seqlen_cache, nheads_k, _ = k_cache.shape
    group = nheads // nheads_k
    out = q.new_empty((total, nheads, headdim))
    lse = q.new_empty((nheads, total), dtype=torch.float32)
    if total == 0:
        return (out, lse) if return_softmax_lse else out

    max_rows = (total if max_seqlen_q is None else max_seqlen_q) * group
    max_keys = seqlen_cache if key_index is None else key_index.shape[1]
    config = attention_config(q.device, q.dtype, max_rows)
    # at least one block: it clears the padding queries if no row has a query
    blocks = max(-(-max_rows // config.block_m), 1)
    if num_splits is None:
        num_splits = num_splits_heuristic(
            programs=blocks * batch * nheads_k,
            keys=max_keys,
            block_n=config.block_n,
            rows=max_rows,
            row_groups=batch * nheads_k,
            headdim=headdim,
            num_sms=num_sms(q.device),
        )
    num_splits = min(num_splits, MAX_SPLITS)
    partial_out, partial_lse = out, lse
    if num_splits > 1:
        partial_out = q.new_empty((num_splits, total, nheads, headdim), dtype=torch.float32)
        partial_lse = q.new_empty((num_splits, nheads, total), dtype=torch.float32)

    stride_q_token, stride_q_head, _ = q.stride()
    stride_k_row, stride_k_column, stride_k_head, _ = k_cache.stride()
    stride_v_row, stride_v_column, stride_v_head, _ = v_cache.stride()
    # an unsplit launch has an extra row, which clears the padding queries; with splits the merge clears them
    grid = (blocks * (batch + (num_splits == 1)) * nheads_k, num_splits)
    pdl = uses_pdl(q.device)
    with checks.device_guard(q):
        _delayed_attention_kernel[grid](
            q_ptr=q,
            k_ptr=k_cache,
            v_ptr=v_cache,
            out_ptr=partial_out,
            lse_ptr=partial_lse,
            cu_seqlens_q_ptr=cu_seqlens_q,
            leftpad_ptr=cache_leftpad,
            seqlens_ptr=cache_seqlens,
            mask_ptr=None if key_mask is None else key_mask.view(torch.uint8),
            index_ptr=key_index,
            stride_q_token=stride_q_token,
            stride_q_head=stride_q_head,
            stride_k_row=stride_k_row,
            stride_k_column=stride_k_column,
            stride_k_head=stride_k_head,
            stride_v_row=stride_v_row,
            stride_v_column=stride_v_column,
            stride_v_head=stride_v_head,
            stride_mask_row=0 if key_mask is None else key_mask.stride(0),
            stride_index_row=0 if key_index is None else key_index.stride(0),
            batch=batch,
            total=total,
            blocks=blocks,
            seqlen_cache=seqlen_cache,
            max_keys=max_keys,
            splits=num_splits,
            softmax_scale=headdim**-0.5 if softmax_scale is None else softmax_scale,
            GROUP=group,
            NHEADS_K=nheads_k,
            HEADDIM=headdim,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            IS_SPLIT=num_splits > 1,
            HAS_LEFTPAD=cache_leftpad is not None,
            HAS_SEQLENS=cache_seqlens is not None,
            HAS_MASK=key_mask is not None,
            HAS_INDEX=key_index is not None,
            FULL_TILES_FIRST=config.full_tiles_first and key_mask is None and key_index is None,
            PDL=pdl,
            launch_pdl=pdl,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if num_splits > 1:
            merge = merge_config(q.device)
            _merge_splits_kernel[(-(-total * nheads // merge.block),)](
                partial_out_ptr=partial_out,
                partial_lse_ptr=partial_lse,
                out_ptr=out,
                lse_ptr=lse,
                cu_seqlens_q_ptr=cu_seqlens_q,
                batch=batch,
                total=total,
                splits=num_splits,
                NHEADS=nheads,
                HEADDIM=headdim,
                BLOCK_M=merge.block,
                SPLITS=MAX_SPLITS,
                PDL=pdl,
                launch_pdl=pdl,
                num_warps=merge.num_warps,
            )
    return (out, lse) if return_softmax_lse else out


def _fake(q, *, return_softmax_lse, **_):
    out = q.new_empty(q.shape)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return (out, q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype)) if return_softmax_lse else out


_operator = operator("delayed_attention", _launch, reference.delayed_attention, fake=_fake)


def delayed_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    *,
    max_seqlen_q: int | None = None,
    cache_leftpad: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_index: Tensor | None = None,
    softmax_scale: float | None = None,
    num_splits: int | None = None,
    return_softmax_lse: bool = False,
    impl: checks.Impl = "auto",
) -> Tensor | Any:
    """Attends packed queries over all valid columns of their row of a position-indexed K/V cache, without causal mask.

    Mutates nothing. Write the K/V of the active tokens first, with `rope_cache_update`.

    Args:
        q: (total, nheads, headdim), float16, bfloat16 or float32 (float64: impl "reference" only). Rotated queries,
            packed by batch row; the last dim contiguous. headdim is 16, 32, 64 or 128.
        k_cache, v_cache: (batch, seqlen_cache, nheads_k, headdim), the dtype of q, any strides with the last dim
            contiguous. nheads is a multiple of nheads_k: query head h reads K/V head h // (nheads / nheads_k).
        cu_seqlens_q: (batch + 1,) int32 or int64, non-decreasing; values beyond total are clamped. The queries of row b
            are cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1 (a row may be empty). Queries of no row are padding: they get
            zeros and lse -inf.
        max_seqlen_q: an upper bound, known on the host, of the number of queries of any row. None: total. If a row has
            more, some of its queries get NaN.
        cache_leftpad, cache_seqlens: (batch,) int32. The valid columns of row b are cache_leftpad[b] ..
            cache_seqlens[b] - 1. None: 0 and seqlen_cache.
        key_mask: (batch, seqlen_cache) bool, False for columns that are not valid either.
        key_index: (batch, max_keys) int32, distinct columns padded with -1. Only the valid columns among them are read.
        softmax_scale: a float; None: headdim ** -0.5.
        num_splits: number of parts into which the keys of a row are split; above 16 counts as 16. None: chosen for the
            GPU.
        return_softmax_lse: whether to return the log-sum-exp of the scaled scores too.
        impl: "auto" (Triton for CUDA tensors, PyTorch otherwise), "triton" or "reference".

    Returns:
        out (total, nheads, headdim) in q's dtype; with return_softmax_lse also softmax_lse (nheads, total) float32
        (float64 for float64), natural logarithm. A query with no valid key gets zeros and -inf.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or strides that do not fit together.
        NotImplementedError: another headdim, an implementation that cannot run here.

    Source: Dao et al., FlashAttention (arXiv 2205.14135) and Flash-Decoding; the terms are FlashAttention's.

    Example:
        >>> q_rotated = rope_cache_update(q, k, v, cos, sin, positions, slots, k_cache, v_cache)
        >>> out = delayed_attention(q_rotated, k_cache, v_cache, cu_seqlens_q)
    """
    checks.check_no_grad(q=q, k_cache=k_cache, v_cache=v_cache)
    checks.check_floating("q", q)
    checks.check_shape("q", q, (None, None, None), "(total, nheads, headdim)")
    total, nheads, headdim = q.shape
    checks.check_headdim(headdim)
    cache_shape = "(batch, seqlen_cache, nheads_k, headdim)"
    checks.check_shape("k_cache", k_cache, (None, None, None, headdim), cache_shape)
    checks.check_shape("v_cache", v_cache, k_cache.shape, cache_shape)
    batch, seqlen_cache, nheads_k, _ = k_cache.shape
    checks.check_heads(nheads, nheads_k, seqlen_cache)
    checks.check_same("q", q, k_cache=k_cache, v_cache=v_cache)
    checks.check_last_dim_contiguous(q=q, k_cache=k_cache, v_cache=v_cache)
    checks.check_tensor("cu_seqlens_q", cu_seqlens_q, q, (batch + 1,), "(batch + 1,)", torch.int32, torch.int64)
    checks.check_tensor("cache_leftpad", cache_leftpad, q, (batch,), "(batch,)")
    checks.check_tensor("cache_seqlens", cache_seqlens, q, (batch,), "(batch,)")
    checks.check_tensor("key_index", key_index, q, (batch, None), "(batch, max_keys)")
    checks.check_tensor("key_mask", key_mask, q, (batch, seqlen_cache), "(batch, seqlen_cache)", torch.bool)
    if max_seqlen_q is None or checks.check_count("max_seqlen_q", max_seqlen_q, 0) > total:
        max_seqlen_q = total
    if num_splits is not None:
        checks.check_count("num_splits", num_splits, 1)
    return _operator(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        cache_leftpad=cache_leftpad,
        cache_seqlens=cache_seqlens,
        key_mask=key_mask,
        key_index=key_index,
        softmax_scale=headdim**-0.5 if softmax_scale is None else float(softmax_scale),
        num_splits=num_splits,
        return_softmax_lse=return_softmax_lse,
        impl=checks.resolve_impl(impl, _delayed_attention_kernel, q),
    )
