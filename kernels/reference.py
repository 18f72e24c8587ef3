"""The PyTorch twins of the kernels: their specification, and the implementation for CPUs, with a few fast paths.

Each function has the signature of its kernel's operator (without `impl`) and accepts float64, in which the tests
compute the results to expect. Some read small index tensors on the host, so they synchronise on a GPU; the Triton
kernels never do.
"""

import itertools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dkv.kernels import noise
from dkv.kernels.cpu import linear
from dkv.kernels.rows import MASKED, PROMPT, Counter, Rule

PART = 64  # columns of a row for each sum of squares of a `DeferredNorm`


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split RoPE, computed in float32 or float64 and rounded once.

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
) -> Tensor:
    """Twin of `dkv.kernels.rope_cache_update`; q, k, v may be float32: all results have the dtype of the caches."""
    num_slots = k_cache.shape[0] * k_cache.shape[1]
    min_slot, max_slot = _extremes(slots)
    written = slice(None)
    if min_slot < 0 or max_slot >= num_slots:
        written = (slots >= 0) & (slots < num_slots)
        count = int(written.sum())
        # padding is mostly at the end
        written = slice(count) if bool(written[:count].all()) else written
    positions = positions[written].clamp(0, cos.shape[0] - 1)
    cos, sin = cos.index_select(0, positions)[:, None], sin.index_select(0, positions)[:, None]
    k_rotated, v = rotate_half_split(k[written], cos, sin).to(k_cache.dtype), v[written].to(v_cache.dtype)
    slots = slots[written].long()
    if k_cache.shape[0] == 1:
        k_cache[0].index_copy_(0, slots, k_rotated)
        v_cache[0].index_copy_(0, slots, v)
    else:
        rows, columns = slots // max(k_cache.shape[1], 1), slots % max(k_cache.shape[1], 1)
        k_cache[rows, columns] = k_rotated
        v_cache[rows, columns] = v
    rotated = rotate_half_split(q[written], cos, sin).to(k_cache.dtype)
    if rotated.shape[0] == q.shape[0]:
        return rotated
    q_rotated = torch.zeros(q.shape, dtype=rotated.dtype, device=q.device)
    q_rotated[written] = rotated
    return q_rotated


def _extremes(indices):
    """Minimum and maximum in one pass, where comparisons would take several; 0 and -1 if there are no indices."""
    if indices.shape[0] == 0:
        return 0, -1
    min_index, max_index = indices.aminmax()
    return min_index.item(), max_index.item()


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
) -> Tensor | tuple[Tensor, Tensor]:
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
            folded = _fold_heads(q[queries], k_rows)
            scores = folded.to(lse_dtype) @ rearrange(k_rows, "b n h d -> b h d n").to(lse_dtype) * scale
            group = q.shape[1] // k_cache.shape[2]
            lse[:, queries] = rearrange(scores.logsumexp(-1), "b h (a g) -> (h g) (b a)", g=group)
    return (out, lse.float() if q.dtype != torch.float64 else lse) if return_softmax_lse else out


def _fold_heads(q, k_rows):
    """Makes the query heads of a K/V head further queries of it, so K and V are not copied for grouped queries."""
    return rearrange(q, "(b a) (h g) d -> b h (a g) d", b=k_rows.shape[0], h=k_rows.shape[2])


def _attend(q, k_rows, v_rows, scale):
    """Attends the queries (b * a, nheads, d) over all keys (b, n, nheads_k, d) of their row."""
    folded = _fold_heads(q, k_rows)
    out = F.scaled_dot_product_attention(folded, k_rows.transpose(1, 2), v_rows.transpose(1, 2), scale=scale)
    return rearrange(out, "b h (a g) d -> (b a) (h g) d", g=q.shape[1] // k_rows.shape[2])


def _groups(q, k_cache, cu_seqlens_q, cache_leftpad, cache_seqlens, key_mask, key_index):
    """Yields (rows, queries, keys): slices of batch rows and of packed queries that share one set of key columns.

    `keys` is a slice, or a 1-D index tensor if the valid columns are not contiguous. Rows without queries or without
    valid keys are left out: their output is right already.
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


def pack_positions(active: Tensor, capacity: int | None = None) -> tuple[Tensor, Tensor]:
    """Twin of `dkv.kernels.pack_positions`."""
    cu_seqlens = F.pad(active.sum(1).cumsum(0), (1, 0)).int()
    slots = active.flatten().nonzero()[:capacity, 0]
    if capacity is not None:
        slots = F.pad(slots, (0, capacity - slots.shape[0]), value=-1)
    return slots, cu_seqlens


def pack_step(
    active: Tensor,
    candidates: Tensor,
    sizes: Tensor,
    ids: Tensor,
    positions: Tensor,
    counters: Tensor,
    excess: Tensor | None = None,
    *,
    capacity: int,
    candidate_capacity: int,
    per_row: int,
    shifted: bool,
    noisy: bool = False,
) -> tuple["Packed", "Packed"]:
    """Packs the active positions of a step and its candidates; the launcher of `dkv.kernels.packing` is its twin.

    Mutates excess.

    Args:
        active, candidates: (batch, seqlen) bool.
        sizes: (batch, len(Size)) int32, the number of both in each row.
        ids: (rows, seqlen) int64, the tokens of the model's rows. rows is a multiple of batch: the rows beyond the
            batch, the unconditional ones of guidance, repeat the flags of the first ones.
        positions: (rows, seqlen) int64, for RoPE.
        counters: (batch, len(Counter)) int64.
        excess: () int64, raised to the number of entries that did not fit, if that is larger; None: not counted.
        capacity, candidate_capacity: lengths of the two lists.
        per_row: the maximum number of entries that fit from one row.
        shifted: whether the output at column j - 1 predicts column j.
        noisy: whether noise keys are needed.

    Returns:
        Two `Packed`; positions and logits_indices of the second are those of the predictors.
    """
    if ids.shape[0] > active.shape[0]:
        copies = ids.shape[0] // active.shape[0]
        active, counters = active.repeat(copies, 1), counters.repeat(copies, 1)
        candidates = candidates.repeat(copies, 1)
    slots, cu_seqlens = pack_positions(active, capacity)
    at = slots.clamp(min=0)
    packed = Packed(slots, cu_seqlens, positions.flatten()[at], ids=ids.flatten()[at])
    slots, cu_seqlens = pack_positions(candidates, candidate_capacity)
    if excess is not None:
        for ends, length in ((packed.cu_seqlens, capacity), (cu_seqlens, candidate_capacity)):
            found = torch.maximum(ends[-1] - length, ends.diff().max() - per_row)
            torch.maximum(excess, found, out=excess)
    at = slots.clamp(min=0)
    keys = None
    if noisy or shifted:
        rows = at // active.shape[1]
        columns, first_column = at - rows * active.shape[1], counters[rows, Counter.FIRST_COLUMN]
    if noisy:
        row = counters[rows]
        keys = noise.noise_key(
            row[:, Counter.SEED], row[:, Counter.REQUEST], row[:, Counter.STEP], columns - first_column
        )
    if shifted:
        # a mask in the first column is predicted by its own output
        at = at.add(columns > first_column.clamp(min=0), alpha=-1)
    logits_indices = (active.flatten().cumsum(0)[at] - 1).clamp(0, max(capacity - 1, 0))
    return packed, Packed(slots, cu_seqlens, positions.flatten()[at], logits_indices=logits_indices, keys=keys)


def recomputed(
    decoded_step: Tensor,
    counters: Tensor,
    rule: Rule,
    *,
    shifted: bool,
    candidates: Tensor | None = None,
    rank: Tensor | None = None,
) -> Tensor:
    """(batch, seqlen) bool: the positions that a `Rule` recomputes, before those that a step needs anyway.

    The arguments are those of `active_positions`; only the rule "others" needs candidates and rank.
    """
    columns = torch.arange(decoded_step.shape[1], device=decoded_step.device)
    step, block_step = counters[:, Counter.STEP, None], counters[:, Counter.BLOCK_STEP, None]
    following = torch.cat((decoded_step[:, 1:], decoded_step[:, -1:]), dim=1)
    limit = step - 1 - rule.delay
    if rule.stable == "nothing":
        active = torch.ones_like(decoded_step, dtype=torch.bool)
    elif rule.stable == "others":
        active = _window(decoded_step, decoded_step == step - 1, candidates, rank, rule)
    elif not shifted:
        active = decoded_step > limit
    else:
        if rule.stable == "decoded":
            active = decoded_step > limit
        elif rule.stable == "next":
            # the last column has no next: it takes the first one
            first_column = counters[:, Counter.FIRST_COLUMN, None].clamp(0, decoded_step.shape[1] - 1)
            first = decoded_step.gather(1, first_column)
            active = torch.cat((decoded_step[:, 1:], first), dim=1) > limit
        else:
            active = torch.maximum(decoded_step, following) > limit
            # the last column takes the one before it
            active[:, -1] = active[:, max(active.shape[1] - 2, 0)]
        # the first cached step of a block knows only what was decoded before the block
        active = torch.where(block_step == 1, following > step - 2, active)
    if rule.from_block_start:
        # masks inside the prompt belong to the first block
        of_first_block = (counters[:, Counter.BLOCK, None] == 0) & (decoded_step != PROMPT)
        active = active & ((columns >= counters[:, Counter.BLOCK_START, None]) | of_first_block)
    if rule.until_block_end:
        active = active & (columns < counters[:, Counter.BLOCK_END, None])
    active = active | (block_step < rule.warmup)
    if rule.interval is not None:
        active = active | (block_step % rule.interval == 0)
    if rule.frozen_prompt:
        # a shifted model recomputes the prompt's last token: its output is needed
        active = active & ((following if shifted else decoded_step) != PROMPT)
    return active


def _window(decoded_step, just_decoded, to_decode, rank, rule):
    """Positions just decoded, those about to be, and the rule's window around them."""
    active, seqlen = just_decoded | to_decode, decoded_step.shape[1]
    if rule.contiguous:
        # a wider window covers the whole row too
        window = min(rule.window, 2 * seqlen)
        for offset in range(-((window + 1) // 2), window // 2 + 1):
            active |= _shifted_columns(just_decoded, offset)
        return active
    columns = torch.arange(seqlen, device=decoded_step.device)
    ranks, centres = torch.where(to_decode, rank, seqlen).sort(dim=1)
    for n in range(int(to_decode.sum(1).max()) if rule.window else 0):
        centre = centres[:, n : n + 1]
        # outward from it, left first at each distance, over masks not yet active
        distance = columns - centre
        order = 2 * distance.abs() - (distance < 0).long()
        free = (decoded_step == MASKED) & ~active & (ranks[:, n : n + 1] < seqlen)
        order = order.masked_fill(~free, torch.iinfo(torch.int64).max)
        chosen = order.topk(min(rule.window, seqlen), dim=1, largest=False).indices
        active = active.scatter(1, chosen, free.gather(1, chosen) | active.gather(1, chosen))
    return active


def _shifted_columns(flags, offset):
    """flags moved `offset` columns to the right, filled up with False."""
    moved = torch.zeros_like(flags)
    length = flags.shape[1]
    if abs(offset) < length:
        moved[:, max(offset, 0) : length + min(offset, 0)] = flags[:, max(-offset, 0) : length - max(offset, 0)]
    return moved


def predictors(candidates: Tensor, first_column: Tensor, *, shifted: bool) -> Tensor:
    """(batch, seqlen) bool: the positions whose outputs predict the candidates.

    Args:
        candidates: (batch, seqlen) bool.
        first_column: (batch, 1) int64, the first column that is not padding.
        shifted: whether the output at column j - 1 predicts column j.
    """
    if not shifted:
        return candidates
    columns = torch.arange(candidates.shape[1], device=candidates.device)
    # a mask in the first column is predicted by its own output
    first = candidates & (columns <= first_column.clamp(min=0))
    # nothing rolls over the edge: a candidate in column 0 is in `first`
    return (candidates ^ first).roll(-1, dims=1) | first


def active_positions(
    decoded_step: Tensor,
    valid: Tensor,
    candidates: Tensor,
    counters: Tensor,
    active: Tensor,
    sizes: Tensor,
    totals: Tensor | None = None,
    *,
    shifted: bool,
    rule: Rule | None = None,
    chosen: Tensor | None = None,
    rank: Tensor | None = None,
    foresee: bool = False,
) -> None:
    """Writes the positions that the next step recomputes; the launcher of `dkv.kernels.active` is its twin.

    Mutates active and sizes, and adds to totals.

    Args:
        decoded_step: (batch, seqlen) int32, the step that decoded a position, or PROMPT or MASKED.
        valid, candidates: (batch, seqlen) bool: positions that are not padding; masks that may be committed.
        counters: (batch, len(Counter)) int64.
        active: (batch, seqlen) bool.
        sizes: (batch, len(Size)) int32.
        totals: (batch, 2) int64, recomputed and computable positions of all steps, or None.
        shifted: whether the output at column j - 1 predicts column j.
        rule: a `Rule`; None: `chosen` takes its place.
        chosen: (batch, seqlen) bool, the positions that a policy recomputes.
        rank: (batch, seqlen) int32, the order in which a block is decoded; for a rule with a window of nearest masks.
        foresee: whether the rule decides sizes[:, LATER] (any rule but "others"); otherwise all computable positions
            count there.
    """
    masks = counters[:, Counter.MASKS, None]
    computable = valid & (masks > 0)
    needed = predictors(candidates, counters[:, Counter.FIRST_COLUMN, None], shifted=shifted)
    later = computable
    if rule is not None:
        chosen = recomputed(decoded_step, counters, rule, shifted=shifted, candidates=candidates, rank=rank)
        if foresee:
            next_counters = counters.clone()
            next_counters[:, Counter.STEP : Counter.BLOCK_STEP + 1] += 1
            later = (recomputed(decoded_step, next_counters, rule, shifted=shifted) | needed) & computable
    torch.logical_and(chosen | needed | (counters[:, Counter.STEP, None] == 0), computable, out=active)
    count = active.sum(1)
    nan_step = counters[:, Counter.NAN_STEP]
    sizes.copy_(torch.stack((count, candidates.sum(1), masks[:, 0], later.sum(1), nan_step), dim=1))
    if totals is not None:
        totals[:, 0] += count
        totals[:, 1] += computable.sum(1)


def advance_rows(
    x: Tensor,
    decoded_step: Tensor,
    counters: Tensor,
    candidates: Tensor,
    *,
    mask_id: int,
    prompt_masks_wait: bool = True,
    commits: Tensor | None = None,
    counts: Tensor | None = None,
    due: Tensor | None = None,
    end_ids: Tensor | None = None,
    pad_id: int = 0,
) -> None:
    """Records the commit of a step and finds the next candidates; the launcher of `dkv.kernels.advance` is its twin.

    Mutates decoded_step, counters, candidates and counts, and x where a row ends.

    Args:
        x: (batch, seqlen) int64, the sequences after the commit.
        decoded_step: (batch, seqlen) int32, the step that decoded a position, or PROMPT or MASKED.
        counters: (batch, len(Counter)) int64.
        candidates: (batch, seqlen) bool, gets the masks that the next step may commit.
        mask_id, pad_id: the tokens of a mask and of padding.
        prompt_masks_wait: whether a row stays at its first block until the masks before that block are decoded.
        commits: (batch, blocks, steps of a block) int64, the number of tokens that each step commits; None: no counts.
        counts: (batch,) int64, gets the number of the next step.
        due: (batch, seqlen) int32, the step of its block that decodes a position, if that is known beforehand.
        end_ids: (n,) int64, tokens that end a text: a row with one that has no mask before it gets pad_id in place of
            its masks. None: rows do not end early.
    """
    columns = torch.arange(x.shape[1], device=x.device)
    step, block_step, old_block = (counters[:, c, None] for c in (Counter.STEP, Counter.BLOCK_STEP, Counter.BLOCK))
    first_generated = counters[:, Counter.FIRST_GENERATED, None]
    block_length = counters[:, Counter.BLOCK_LENGTH, None].clamp(min=1)
    was_masked = decoded_step == MASKED
    masked = was_masked & (x == mask_id)
    if end_ids is not None:
        ends = torch.isin(x, end_ids) & (columns >= first_generated)
        ended = (ends & (masked.int().cumsum(1) == 0)).any(1, keepdim=True)
        x.masked_fill_(masked & ended, pad_id)
        masked = masked & ~ended
    decoded_step.copy_(torch.where(was_masked & ~masked, step, decoded_step))

    findable = masked if prompt_masks_wait else masked & (columns >= first_generated)
    block = (findable.int().argmax(1, keepdim=True) - first_generated).clamp(min=0) // block_length
    block = torch.where(findable.any(1, keepdim=True), block, old_block)
    entered = block != old_block
    step.add_(1)
    block_step.add_(1).masked_fill_(entered, 0)
    old_block.copy_(block)
    block_start = first_generated + block * block_length
    block_end = torch.minimum(block_start + block_length, first_generated + counters[:, Counter.GENERATED, None])
    in_block = masked & (columns < block_end)
    counters[:, Counter.BLOCK_START, None].copy_(block_start)
    counters[:, Counter.BLOCK_END, None].copy_(block_end)
    torch.sum(masked, 1, out=counters[:, Counter.MASKS])
    candidates.copy_(in_block if due is None else in_block & (due <= block_step))
    if commits is not None:
        _, blocks, block_steps = commits.shape
        place = block.clamp(0, blocks - 1) * block_steps + block_step.clamp(0, block_steps - 1)
        counts.copy_(commits.flatten(1).gather(1, place)[:, 0])


def commit_tokens(
    x: Tensor,
    tokens: Tensor,
    scores: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    counts: Tensor | None,
    *,
    threshold: float | Tensor | None = None,
    factor: float | Tensor | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """Twin of `dkv.kernels.commit_tokens`; counters (batch, len(Counter)) int64 get the step of the first NaN."""
    total = tokens.shape[0]
    ends = cu_seqlens.tolist()
    if ends[0] < 0 or ends[-1] > total or ends != sorted(ends):
        # a row whose bounds fall is empty
        cu_seqlens = cu_seqlens.clamp(0, total).cummax(0).values
        ends = cu_seqlens.tolist()
    first, last, (rows, seqlen) = ends[0], ends[-1], x.shape
    columns = torch.arange(max(map(operator.sub, ends[1:], ends), default=0), device=x.device)
    # one line per row, its entries first; a view if all rows have the same number
    in_row = None
    if last - first == rows * columns.shape[0]:
        scores = scores[first:last].view(rows, columns.shape[0])
    else:
        in_row = columns < cu_seqlens.diff().unsqueeze(1)
        padded = torch.full(in_row.shape, float("-inf"), dtype=scores.dtype, device=x.device)
        scores = padded.masked_scatter_(in_row, scores[first:] if first else scores)
    if counters is not None and scores.isnan().any():
        step, nan_step = counters[:, Counter.STEP], counters[:, Counter.NAN_STEP]
        nan_step.copy_(torch.where(scores.isnan().any(1) & (nan_step < 0), step, nan_step))
    scores = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    # entries beyond the columns of a row are padding
    if columns.shape[0] > seqlen:
        scores[:, seqlen:] = float("-inf")
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, columns.expand_as(order))
    threshold, factor = (v[:, None] if isinstance(v, Tensor) else v for v in (threshold, factor))
    if threshold is not None:
        chosen = (scores >= threshold) | (ranks == 0)
    elif factor is not None:
        # scores fall and limits rise with the rank, so all entries before one that passes pass too
        limits = 1 - torch.zeros_like(scores).add_(factor) / (ranks + 2)
        chosen = (scores >= limits) | (ranks == 0)
    else:
        chosen = ranks < counts.unsqueeze(1)
    if columns.shape[0] > seqlen:
        chosen[:, seqlen:] = False
    lines, chosen = chosen, torch.zeros(total, dtype=torch.bool, device=x.device)
    if in_row is None:
        chosen[first:last] = lines.flatten()
    else:
        torch.masked_select(lines, in_row, out=chosen[first:last])
    chosen &= (slots >= 0) & (slots < x.numel())
    entries = chosen.nonzero().squeeze(1)
    x.view(-1).index_copy_(0, slots.index_select(0, entries), tokens.index_select(0, entries))
    return chosen


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Twin of `dkv.kernels.add_rms_norm`."""
    if residual is not None:
        x = residual.add_(x)
    s = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = s.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (s * scale).to(x.dtype).mul_(weight)


def swiglu(gate_up: Tensor) -> Tensor:
    """Twin of `dkv.kernels.swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class DeferredNorm(NamedTuple):
    """Rows of an unfinished RMSNorm: the next product scales its result by rsqrt(mean of squares + eps).

    Attributes:
        weighted: (rows, size), the rows times the weight of the norm, rounded.
        square_sums: (ceil(size / 64), rows) float32 (float64 for float64), contiguous: sums of squares over 64 columns
            of each row.
    """

    weighted: Tensor
    square_sums: Tensor


def deferred_norm(x: Tensor, weight: Tensor) -> DeferredNorm:
    """Twin of `dkv.kernels.deferred_norm`."""
    s = x.to(torch.promote_types(x.dtype, torch.float32))
    parts = -(-x.shape[1] // PART)
    squares = F.pad(s.square(), (0, parts * PART - x.shape[1])).unflatten(1, (parts, PART))
    weighted = (s * weight.to(s.dtype)).to(x.dtype).contiguous()
    return DeferredNorm(weighted, squares.sum(-1).t().contiguous())


def linear_add_norm(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, *, semaphores: Tensor | None = None
) -> DeferredNorm:
    """Twin of `dkv.kernels.linear_add_norm`; `semaphores` change nothing here."""
    h = _product(x, weight)
    residual.copy_(h.add_(residual))
    return deferred_norm(residual, norm_weight)


def linear_swiglu(normed: DeferredNorm, eps: float, weight: Tensor, *, semaphores: Tensor | None = None) -> Tensor:
    """Twin of `dkv.kernels.linear_swiglu`; `semaphores` change nothing here."""
    gate, up = _normed_product(normed, eps, weight).chunk(2, dim=-1)
    return F.silu(gate).mul_(up).to(normed.weighted.dtype).contiguous()


def linear_rope_cache_update(
    normed: DeferredNorm,
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
) -> Tensor:
    """Twin of `dkv.kernels.linear_rope_cache_update`; `semaphores` change nothing here."""
    nheads_k, headdim = k_cache.shape[2:]
    heads = _normed_product(normed, eps, weight)
    if bias is not None:
        heads += bias
    heads = heads.unflatten(-1, (weight.shape[0] // headdim, headdim))
    q, k, v = heads.tensor_split((heads.shape[1] - 2 * nheads_k, heads.shape[1] - nheads_k), dim=1)
    return rope_cache_update(q, k, v, cos, sin, positions, slots, k_cache, v_cache)


def _product(x, weight):
    """x weight^T in float32 or float64, so that nothing is rounded before its last use."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return linear(x.to(dtype), weight.to(dtype))


def _normed_product(normed, eps, weight):
    """The same for the rows of a deferred norm."""
    mean = normed.square_sums.sum(0) / weight.shape[1]
    return _product(normed.weighted, weight).mul_((mean + eps).rsqrt()[:, None])


class Packed(NamedTuple):
    """Some positions of every row of a batch, packed by row.

    Attributes:
        slots: (total,) int64, row * seqlen + column (vLLM's slot_mapping); -1: padding behind the last row.
        cu_seqlens: (rows + 1,) int32, where each row begins.
        positions: (total,) int64, for RoPE.
        ids: (total,) int64, tokens, or None.
        logits_indices: (total,) int64, the index of each one's predictor among the active positions, or None.
        keys: (total,) int64, noise keys, or None.
    """

    slots: Tensor
    cu_seqlens: Tensor
    positions: Tensor
    ids: Tensor | None = None
    logits_indices: Tensor | None = None
    keys: Tensor | None = None


class Confidence(NamedTuple):
    """The result of `dkv.kernels.lm_head_confidence`, each (rows,): token int64, the others floating point."""

    token: Tensor
    log_prob: Tensor
    margin: Tensor
    entropy: Tensor


LOGITS_AT_A_TIME = 2**22  # 16 MiB of float32
NOISE_AT_A_TIME = 2**20  # takes several int64 tensors of that size
LOWEST = -1e30  # in place of -inf: inf - inf would be NaN


def first_allowed(exclude_ids: Sequence[int] | None) -> int:
    """The lowest id that is not excluded."""
    return next(i for i in itertools.count() if i not in (exclude_ids or ()))


def lm_head_confidence(
    hidden: Tensor,
    weight: Tensor,
    *,
    logit_scale: float | Tensor = 1.0,
    noise_scale: float | Tensor = 0.0,
    noise_key: Tensor | None = None,
    exclude_ids: Sequence[int] | None = None,
    round_logits: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Confidence:
    """Twin of `dkv.kernels.lm_head_confidence`; it keeps a bounded number of logits at a time."""
    rows = hidden.shape[0]
    num_valid = rows if cu_seqlens is None else min(max(int(cu_seqlens[-1]), 0), rows)
    at_a_time = max(1, LOGITS_AT_A_TIME // weight.shape[0])
    of_rows = (_parts(value, num_valid, at_a_time) for value in (logit_scale, noise_scale, noise_key))
    parts = []
    for hidden_part, z_scale, *noise_part in zip(hidden[:num_valid].split(at_a_time), *of_rows, strict=False):
        z = _logits(hidden_part, weight, round_logits)
        if isinstance(z_scale, Tensor):
            z.mul_(z_scale[:, None])
        elif z_scale != 1:
            z.mul_(z_scale)
        for excluded in exclude_ids or ():
            z[:, excluded] = LOWEST
        parts.append(_confidence(z.clamp_(min=LOWEST), *noise_part, first_allowed(exclude_ids)))
    found = map(torch.cat, zip(*parts, strict=True))
    if num_valid < rows:
        of_padding = Confidence(0, float("-inf"), 0.0, 0.0)
        found = (F.pad(values, (0, rows - num_valid), value=v) for values, v in zip(found, of_padding, strict=True))
    return Confidence(*found)


def _parts(value, rows, at_a_time):
    """Parts of a tensor of rows; a value for all rows is repeated."""
    return value[:rows].split(at_a_time) if isinstance(value, Tensor) else itertools.repeat(value)


def _logits(hidden, weight, rounded):
    """(rows, vocab) in float32 or float64; those of 16-bit tensors are `rounded` to their dtype first, or not."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if rounded or hidden.dtype == dtype:
        return linear(hidden, weight).contiguous().to(dtype)
    hidden, ids = hidden.to(dtype), max(1, LOGITS_AT_A_TIME // weight.shape[1])
    z = torch.empty((hidden.shape[0], weight.shape[0]), dtype=dtype, device=hidden.device)
    for z_part, weight_part in zip(z.split(ids, dim=1), weight.split(ids), strict=True):
        z_part.copy_(hidden @ weight_part.to(dtype).T)
    return z


def confidence_of_logits(
    z: Tensor,
    *,
    noise_scale: float | Tensor = 0.0,
    noise_key: Tensor | None = None,
    exclude_ids: Sequence[int] | None = None,
) -> Confidence:
    """The result of `lm_head_confidence` from its z: (rows, vocab), any float dtype, -inf for the excluded ids."""
    z = z.to(torch.promote_types(z.dtype, torch.float32)).clamp(min=LOWEST)
    return _confidence(z, noise_scale, noise_key, first_allowed(exclude_ids))


def _confidence(z, noise_scale, noise_key, first_id):
    """The same for z of float32 or float64, no less than LOWEST. Overwrites z; reads nothing on the host."""
    top, best = _largest(z)
    answered = top.abs() < -LOWEST
    best = token = best[:, None]
    if isinstance(noise_scale, Tensor) or noise_scale > 0:
        noisy, token = _noisiest(z, noise_scale, noise_key)
        # a row whose scale is NaN has no noisy maximum
        answered &= noisy > float("-inf")
    shifted = z.sub_(top[:, None])
    # without the largest term: it is exactly 1, and tiny ones added to it would be lost
    weights = shifted.exp().scatter_(1, best, 0.0)
    others, second = torch.where(answered, weights.sum(-1), float("nan")), weights.amax(-1)
    log_sum, top_prob = others.log1p(), 1 / (1 + others)
    log_prob = shifted.gather(1, token)[:, 0] - log_sum
    entropy = log_sum - weights.mul_(shifted).sum(-1) * top_prob
    return Confidence(torch.where(answered, token[:, 0], first_id), log_prob, (1 - second) * top_prob, entropy)


def _noisiest(z, noise_scale, noise_key):
    """The largest z plus noise of each row (rows,), and its id (rows, 1); LOWEST gets no noise."""
    ids = torch.arange(z.shape[1], device=z.device)
    rows = max(1, NOISE_AT_A_TIME // z.shape[1])
    parts = []
    scales = noise_scale[:, None] if isinstance(noise_scale, Tensor) else noise_scale
    of_rows = (_parts(value, z.shape[0], rows) for value in (scales, noise_key[:, None]))
    for z_part, scale_part, key_part in zip(z.split(rows), *of_rows, strict=False):
        noisy = noise.gumbel(noise.noise_key(key_part, ids)).mul_(scale_part).add_(z_part)
        parts.append(_largest(noisy.masked_fill_(z_part <= LOWEST, float("-inf"))))
    noisy, token = map(torch.cat, zip(*parts, strict=True))
    return noisy, token[:, None]


def _largest(z):
    """z.max(-1), in two levels if that pays: on a CPU only a maximum without its index is vectorised."""
    if z.shape[1] % 128 or z.numel() < 2**16:
        return z.max(-1)
    blocks = z.unflatten(1, (-1, 128))
    top, block = blocks.amax(-1).max(-1)
    within = blocks.gather(1, block[:, None, None].expand(-1, 1, 128))[:, 0].argmax(-1)
    return top, block * 128 + within
