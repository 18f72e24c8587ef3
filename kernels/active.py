"""The positions that the next step recomputes, chosen by a `Rule` of `dkv.kernels.rows` or by the caller's flags.

For each row, with `chosen` the choice of the rule or the caller:

    active[j] = (chosen[j], or the output of j predicts a candidate, or this is the first step), and j is not padding,
                and the row has masks

It also counts: `sizes` gets the columns of `dkv.kernels.rows.Size`, and `totals` grows by the recomputed and by the
computable positions. Layouts: all flags and decoded_step (batch, seqlen) contiguous. Each program holds one row in
registers; it is bound by latency, at some 8 bytes per column. (The rules are those of Ma et al., dKV-Cache, arXiv
2505.15781, and Wu et al., Fast-dLLM, arXiv 2505.22618.)
"""

from torch import Tensor

from dkv.kernels import checks, rows
from dkv.kernels.configs import row_config
from dkv.kernels.language import tl, triton
from dkv.kernels.rows import (
    BLOCK,
    BLOCK_END,
    BLOCK_START,
    BLOCK_STEP,
    COUNTERS,
    FIRST_COLUMN,
    MASKS,
    NAN_STEP,
    SIZE_ACTIVE,
    SIZE_CANDIDATES,
    SIZE_LATER,
    SIZE_MASKS,
    SIZE_NAN_STEP,
    SIZES,
    STEP,
)

MASKED, PROMPT = tl.constexpr(rows.MASKED), tl.constexpr(rows.PROMPT)


@triton.jit
def _is_unstable(
    decoded_ptr,
    decoded_step,
    columns,
    seqlen,
    first_column,
    step,
    block_step,
    delay,
    SHIFTED: tl.constexpr,
    STABLE: tl.constexpr,
):
    """The positions that a step without a refresh recomputes, by the step that decoded them."""
    limit = step - 1 - delay
    if not SHIFTED:
        return decoded_step > limit
    # the last column has no next: it takes its own step, or that of the column before it
    next_step = tl.load(decoded_ptr + tl.minimum(columns + 1, seqlen - 1))
    if STABLE == "decoded":
        unstable = decoded_step > limit
    elif STABLE == "next":
        first_step = tl.load(decoded_ptr + tl.minimum(tl.maximum(first_column, 0), seqlen - 1))
        unstable = tl.where(columns == seqlen - 1, first_step, next_step) > limit
    else:
        this_step = tl.load(decoded_ptr + tl.maximum(tl.minimum(columns, seqlen - 2), 0))
        unstable = (this_step > limit) | (next_step > limit)
    # the first cached step of a block knows only what was decoded before the block
    return tl.where(block_step == 1, next_step > step - 2, unstable)


@triton.jit
def _window_of_nearest(decoded_step, active, to_decode, rank, columns, window, COLUMNS: tl.constexpr):
    """For each position about to be decoded, the nearest masks that are not active yet, left ones first."""
    free = (decoded_step == MASKED) & ~active
    found = columns < 0
    first = tl.min(tl.where(to_decode, rank, COLUMNS), 0)
    for i in range(tl.sum(to_decode.to(tl.int32), 0)):
        distance = columns - tl.sum(tl.where(to_decode & (rank == first + i), columns, 0), 0)
        order = 2 * tl.abs(distance) - (distance < 0).to(tl.int32)
        for _ in range(window):
            # at most one column: no two have the same place in the order
            nearest = free & (order == tl.min(tl.where(free, order, 4 * COLUMNS), 0))
            found |= nearest
            free &= ~nearest
    return found


@triton.jit(do_not_specialize=["seqlen", "warmup_steps", "interval", "delay", "window"])
def _active_positions_kernel(
    # pointers
    decoded_step_ptr,
    valid_ptr,
    candidates_ptr,
    counters_ptr,
    active_ptr,
    sizes_ptr,
    totals_ptr,
    chosen_ptr,
    rank_ptr,
    # sizes
    seqlen,
    # scalars
    warmup_steps,
    interval,
    delay,
    window,
    # constants
    SHIFTED: tl.constexpr,
    STABLE: tl.constexpr,
    FROZEN_PROMPT: tl.constexpr,
    FROM_BLOCK_START: tl.constexpr,
    UNTIL_BLOCK_END: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    FORESEE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    counters_ptr += row * COUNTERS
    # [COLUMNS]
    columns = tl.arange(0, COLUMNS)
    in_row = columns < seqlen
    # scalar bases in 64 bits, offsets within the row in 32
    first = row * seqlen
    valid = tl.load(valid_ptr + first + columns, mask=in_row, other=0) != 0
    candidates = tl.load(candidates_ptr + first + columns, mask=in_row, other=0) != 0
    step = tl.load(counters_ptr + STEP)
    block_step = tl.load(counters_ptr + BLOCK_STEP)
    masks = tl.load(counters_ptr + MASKS)
    first_column = tl.load(counters_ptr + FIRST_COLUMN)
    nan_step = tl.load(counters_ptr + NAN_STEP)

    needed = candidates
    if SHIFTED:
        next_is_candidate = tl.load(candidates_ptr + first + columns + 1, mask=columns + 1 < seqlen, other=0) != 0
        # a mask in the first column is predicted by its own output
        first_valid = tl.maximum(first_column, 0)
        needed = (next_is_candidate & (columns + 1 > first_valid)) | (candidates & (columns <= first_valid))

    if chosen_ptr is not None:
        active = tl.load(chosen_ptr + first + columns, mask=in_row, other=0) != 0
        later = in_row
    else:
        decoded_ptr = decoded_step_ptr + first
        # columns beyond the row are not valid, whatever is loaded for them
        decoded_step = tl.load(decoded_ptr + columns, mask=in_row, other=PROMPT)
        refresh = (block_step < warmup_steps) | ((interval > 0) & (block_step % tl.maximum(interval, 1) == 0))
        refresh_later = (block_step + 1 < warmup_steps) | (
            (interval > 0) & ((block_step + 1) % tl.maximum(interval, 1) == 0)
        )
        active = in_row
        later = in_row
        if STABLE == "others":
            active = (decoded_step == step - 1) | candidates
            if CONTIGUOUS:
                for offset in range(-((window + 1) // 2), window // 2 + 1):
                    centres = columns - offset
                    in_reach = (centres >= 0) & (centres < seqlen)
                    active |= tl.load(decoded_ptr + centres, mask=in_reach, other=PROMPT) == step - 1
            else:
                rank = tl.load(rank_ptr + first + columns, mask=in_row, other=0)
                active |= _window_of_nearest(decoded_step, active, candidates, rank, columns, window, COLUMNS)
        elif STABLE != "nothing":
            active = _is_unstable(
                decoded_ptr, decoded_step, columns, seqlen, first_column, step, block_step, delay, SHIFTED, STABLE
            )
            if FORESEE:
                later = _is_unstable(
                    decoded_ptr,
                    decoded_step,
                    columns,
                    seqlen,
                    first_column,
                    step + 1,
                    block_step + 1,
                    delay,
                    SHIFTED,
                    STABLE,
                )
        inside = in_row
        if FROM_BLOCK_START:
            # masks inside the prompt belong to the first block
            in_front = columns < tl.load(counters_ptr + BLOCK_START)
            inside = ~in_front | ((tl.load(counters_ptr + BLOCK) == 0) & (decoded_step != PROMPT))
        if UNTIL_BLOCK_END:
            inside &= columns < tl.load(counters_ptr + BLOCK_END)
        active = refresh | (active & inside)
        later = refresh_later | (later & inside)
        if FROZEN_PROMPT:
            # a shifted model recomputes the prompt's last token: its output is needed
            place = tl.minimum(columns + 1, seqlen - 1) if SHIFTED else columns
            thawed = tl.load(decoded_ptr + place, mask=in_row, other=PROMPT) != PROMPT
            active &= thawed
            later &= thawed

    if not FORESEE:
        later = in_row
    computable = valid & (masks > 0)
    active = (active | needed | (step == 0)) & computable
    count = tl.sum(active.to(tl.int32), 0)
    tl.store(active_ptr + first + columns, active, mask=in_row)
    sizes_ptr += row * SIZES
    tl.store(sizes_ptr + SIZE_ACTIVE, count)
    tl.store(sizes_ptr + SIZE_CANDIDATES, tl.sum(candidates.to(tl.int32), 0))
    tl.store(sizes_ptr + SIZE_MASKS, masks.to(tl.int32))
    tl.store(sizes_ptr + SIZE_LATER, tl.sum(((later | needed) & computable).to(tl.int32), 0))
    tl.store(sizes_ptr + SIZE_NAN_STEP, nan_step.to(tl.int32))
    if totals_ptr is not None:
        totals_ptr += 2 * row
        tl.store(totals_ptr, tl.load(totals_ptr) + count)
        tl.store(totals_ptr + 1, tl.load(totals_ptr + 1) + tl.sum(computable.to(tl.int64), 0))


def _launch(
    decoded_step: Tensor,
    valid: Tensor,
    candidates: Tensor,
    counters: Tensor,
    active: Tensor,
    sizes: Tensor,
    totals: Tensor | None = None,
    *,
    shifted: bool,
    rule: rows.Rule | None = None,
    chosen: Tensor | None = None,
    rank: Tensor | None = None,
    foresee: bool = False,
) -> None:
    batch, seqlen = decoded_step.shape
    config = row_config(seqlen)
    rule = rows.Rule() if rule is None else rule
    with checks.device_guard(decoded_step):
        _active_positions_kernel[(batch,)](
            decoded_step_ptr=decoded_step,
            valid_ptr=valid,
            candidates_ptr=candidates,
            counters_ptr=counters,
            active_ptr=active,
            sizes_ptr=sizes,
            totals_ptr=totals,
            chosen_ptr=chosen,
            rank_ptr=rank,
            seqlen=seqlen,
            warmup_steps=rule.warmup,
            interval=rule.interval or 0,
            delay=rule.delay,
            # a wider window covers the whole row too
            window=min(rule.window, 2 * seqlen),
            SHIFTED=shifted,
            STABLE=rule.stable,
            FROZEN_PROMPT=rule.frozen_prompt,
            FROM_BLOCK_START=rule.from_block_start,
            UNTIL_BLOCK_END=rule.until_block_end,
            CONTIGUOUS=rule.contiguous,
            FORESEE=foresee,
            COLUMNS=config.block,
            num_warps=config.num_warps,
        )
