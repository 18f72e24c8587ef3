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
    cos, sin = cos.to(dtype), sin.to(dtype)
    x1, x2 = x.to(dtype).chunk(2, dim=-1)
    rotated = torch.empty(x.shape, dtype=dtype, device=x.device)
    rotated1, rotated2 = rotated.chunk(2, dim=-1)
    torch.mul(x1, cos, out=rotated1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=rotated2).addcmul_(x1, sin)
    return rotated.to(x.dtype)


def rope_cache_update(q, k, v, cos, sin, positions, slots, k_cache, v_cache, *, k_descale=None, v_descale=None):
    """Twin of `dkv.kernels.rope_cache_update`."""
    if slots.numel() and int(slots.min()) < 0:
        written = slots >= 0
        q_rotated = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        q_rotated[written] = rope_cache_update(
            q[written], k[written], v[written], cos, sin, positions[written], slots[written], k_cache, v_cache
        )
        return q_rotated
    cos, sin = cos.index_select(0, positions)[:, None], sin.index_select(0, positions)[:, None]
    k_rotated = rotate_half_split(k, cos, sin)
    if k_cache.shape[0] == 1:
        k_cache[0].index_copy_(0, slots.long(), k_rotated)
        v_cache[0].index_copy_(0, slots.long(), v)
    else:
        rows, columns = slots.long() // k_cache.shape[1], slots.long() % k_cache.shape[1]
        k_cache[rows, columns] = k_rotated
        v_cache[rows, columns] = v
    return rotate_half_split(q, cos, sin)


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
    groups = list(_groups(q, k_cache, cu_seqlens_q, cache_leftpad, cache_seqlens, key_mask, key_index))
    if len(groups) == 1 and groups[0][1] == slice(0, q.shape[0]) and not return_softmax_lse:
        (rows, _, keys) = groups[0]
        return _attend(q, _select(k_cache, rows, keys), _select(v_cache, rows, keys), scale)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full(q.shape[1::-1], float("-inf"), dtype=lse_dtype, device=q.device) if return_softmax_lse else None
    for rows, queries, keys in groups:
        k_rows, v_rows = (_select(cache, rows, keys) for cache in (k_cache, v_cache))
        out[queries] = _attend(q[queries], k_rows, v_rows, scale)
        if return_softmax_lse:
            q_packed = _pack(q[queries], k_rows)
            scores = q_packed.to(lse_dtype) @ rearrange(k_rows, "b n h d -> b h d n").to(lse_dtype) * scale
            packing_lse = "b h (a g) -> (h g) (b a)"
            lse[:, queries] = rearrange(scores.logsumexp(-1), packing_lse, g=q.shape[1] // k_cache.shape[2])
    return (out, lse.float() if q.dtype != torch.float64 else lse) if return_softmax_lse else out


def _pack(q, k_rows):
    """(b * a, h * g, d) -> (b, h, a * g, d): the query heads of one K/V head are further queries of it.

    So K and V are not copied for grouped-query attention.
    """
    batch, _, nheads_k, headdim = k_rows.shape
    grouped = q.reshape(batch, -1, nheads_k, q.shape[1] // nheads_k, headdim)
    return grouped.transpose(1, 2).reshape(batch, nheads_k, -1, headdim)


def _attend(q, k_rows, v_rows, scale):
    """The queries `q` (b * a, nheads, d) over all of the keys (b, n, nheads_k, d) of their row."""
    batch, _, nheads_k, headdim = k_rows.shape
    packed = _pack(q, k_rows)
    out = F.scaled_dot_product_attention(packed, k_rows.transpose(1, 2), v_rows.transpose(1, 2), scale=scale)
    return out.view(batch, nheads_k, -1, q.shape[1] // nheads_k, headdim).transpose(1, 2).reshape(q.shape)


def _groups(q, k_cache, cu_seqlens_q, cache_leftpad, cache_seqlens, key_mask, key_index):
    """Yields (rows, queries, keys): slices of batch rows and of packed queries that share one set of key columns.

    `keys` is a slice, or a 1-D index tensor where the valid columns are not contiguous. Rows without queries or
    without valid keys are left out: their output is already what it must be.
    """
    batch, seqlen_cache = k_cache.shape[:2]
    bounds = [min(max(n, 0), q.shape[0]) for n in cu_seqlens_q.tolist()]
    starts = [0] * batch if cache_leftpad is None else [max(n, 0) for n in cache_leftpad.tolist()]
    ends = [seqlen_cache] * batch if cache_seqlens is None else [min(n, seqlen_cache) for n in cache_seqlens.tolist()]
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
    if not isinstance(keys, slice):
        return cache[rows].index_select(1, keys)
    return cache if (rows, keys) == (slice(0, cache.shape[0]), slice(0, cache.shape[1])) else cache[rows, keys]
