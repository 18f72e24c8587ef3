"""PyTorch twins of every operator of `dkv.kernels`: the specification, and what runs without a GPU.

Each function has the signature of its Triton twin (without `impl`) and works for float64, which the tests use as the
oracle. They read small index tensors on the host, so on a GPU they synchronise; the Triton kernels do not.
"""

import torch
import torch.nn.functional as F
from einops import rearrange


def rotate_half_split(x, cos, sin):
    """Half-split RoPE, computed in float32 at least and rounded once.

    Args:
        x: (total, nheads, headdim).
        cos, sin: (total, 1, headdim // 2) float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x1, x2 = x.to(dtype).chunk(2, dim=-1)
    cos, sin = cos.to(dtype), sin.to(dtype)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def rope_cache_update(q, k, v, cos, sin, positions, slots, k_cache, v_cache, *, k_descale=None, v_descale=None):
    """Twin of `dkv.kernels.rope_cache_update`."""
    written = slots >= 0
    if bool(written.all()):
        cos, sin = cos[positions, None], sin[positions, None]
        q_rotated, k_rotated = rotate_half_split(q, cos, sin), rotate_half_split(k, cos, sin)
    else:
        q_rotated = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        positions, slots, k, v = positions[written], slots[written], k[written], v[written]
        cos, sin = cos[positions, None], sin[positions, None]
        q_rotated[written], k_rotated = rotate_half_split(q[written], cos, sin), rotate_half_split(k, cos, sin)
    rows, columns = slots.long() // k_cache.shape[1], slots.long() % k_cache.shape[1]
    k_cache[rows, columns] = k_rotated
    v_cache[rows, columns] = v
    return q_rotated


def delayed_attention(
    q,
    k_cache,
    v_cache,
    cu_seqlens_q,
    *,
    max_seqlen_q=None,
    cache_leftpad=None,
    cache_seqlens=None,
    key_mask=None,
    key_index=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    num_splits=None,
    return_softmax_lse=False,
):
    """Twin of `dkv.kernels.delayed_attention`; `max_seqlen_q` and `num_splits` change nothing here."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full(q.shape[1::-1], float("-inf"), dtype=lse_dtype, device=q.device) if return_softmax_lse else None
    for rows, queries, keys in _groups(q, k_cache, cu_seqlens_q, cache_leftpad, cache_seqlens, key_mask, key_index):
        q_rows = q[queries]
        k_rows, v_rows = (_select(cache, rows, keys) for cache in (k_cache, v_cache))
        # the query heads of one K/V head are further queries of it: no copy of K or V for grouped-query attention
        packing = "(b a) (h g) d -> b h (a g) d"
        sizes = {"b": rows.stop - rows.start, "h": k_cache.shape[2]}
        q_packed = rearrange(q_rows, packing, **sizes)
        out_packed = F.scaled_dot_product_attention(
            q_packed, k_rows.transpose(1, 2), v_rows.transpose(1, 2), scale=scale
        )
        unpacking = "b h (a g) d -> (b a) (h g) d"
        out[queries] = rearrange(out_packed, unpacking, g=q.shape[1] // k_cache.shape[2])
        if return_softmax_lse:
            scores = q_packed.to(lse_dtype) @ rearrange(k_rows, "b n h d -> b h d n").to(lse_dtype) * scale
            packing_lse = "b h (a g) -> (h g) (b a)"
            lse[:, queries] = rearrange(scores.logsumexp(-1), packing_lse, g=q.shape[1] // k_cache.shape[2])
    return (out, lse.float() if q.dtype != torch.float64 else lse) if return_softmax_lse else out


def _groups(q, k_cache, cu_seqlens_q, cache_leftpad, cache_seqlens, key_mask, key_index):
    """Yields (rows, queries, keys): slices of batch rows and of packed queries that share one set of key columns.

    `keys` is a slice, or a 1-D index tensor where the valid columns are not contiguous. Rows without queries or
    without valid keys are left out: their output is already what it must be.
    """
    batch, seqlen_cache = k_cache.shape[:2]
    bounds = [min(max(int(n), 0), q.shape[0]) for n in cu_seqlens_q]
    starts = [0] * batch if cache_leftpad is None else [max(int(n), 0) for n in cache_leftpad]
    ends = [seqlen_cache] * batch if cache_seqlens is None else [min(int(n), seqlen_cache) for n in cache_seqlens]
    counts = [bounds[b + 1] - bounds[b] for b in range(batch)]

    contiguous = key_mask is None and key_index is None
    if contiguous and len({*zip(starts, ends, counts, strict=True)}) == 1:
        if counts[0] > 0 and ends[0] > starts[0]:
            yield slice(0, batch), slice(bounds[0], bounds[-1]), slice(starts[0], ends[0])
        return
    for b in range(batch):
        if counts[b] <= 0 or ends[b] <= starts[b]:
            continue
        keys = slice(starts[b], ends[b])
        if not contiguous:
            keys = _valid_columns(b, starts[b], ends[b], key_mask, key_index, k_cache.device)
            if keys.numel() == 0:
                continue
        yield slice(b, b + 1), slice(bounds[b], bounds[b + 1]), keys


def _valid_columns(row, start, end, key_mask, key_index, device):
    if key_index is None:
        columns = torch.arange(start, end, device=device)
    else:
        columns = key_index[row].long()
        columns = columns[(columns >= start) & (columns < end)]
    return columns if key_mask is None else columns[key_mask[row, columns]]


def _select(cache, rows, keys):
    return cache[rows, keys] if isinstance(keys, slice) else cache[rows].index_select(1, keys)
