"""The bookkeeping after a step's commit: the decoding step of each position, each row's block, the next candidates.

For each row, with `step` the step just done and a mask a position that was not decoded before it:

    decoded_step[j] = step for each mask j that now holds a token;  step += 1
    block = (first mask - first_generated) // block_length, at least 0;  block_step = 0 in a new block, else += 1
    candidates[j] = j is a mask before the end of that block, and due if the order is known (due[j] <= block_step)
    counts = commits[block, block_step]

Layouts: x, decoded_step, candidates (batch, seqlen) contiguous; `counters` in the order of `dkv.kernels.rows.Counter`.
Each program holds one row in registers; it is bound by latency, at some 17 bytes per column. (The order of commits and
the blocks are those of Nie et al., LLaDA, arXiv 2502.09992.)
"""

from torch import Tensor

from dkv.kernels import checks, rows
from dkv.kernels.configs import row_config
from dkv.kernels.language import tl, triton
from dkv.kernels.rows import (
    BLOCK,
    BLOCK_END,
    BLOCK_LENGTH,
    BLOCK_START,
    BLOCK_STEP,
    COUNTERS,
    FIRST_GENERATED,
    GENERATED,
    MASKS,
    STEP,
)

MASKED = tl.constexpr(rows.MASKED)


@triton.jit(do_not_specialize=["seqlen", "mask_id", "pad_id", "ends", "blocks", "block_steps"])
def _advance_rows_kernel(
    # pointers
    x_ptr,
    decoded_step_ptr,
    counters_ptr,
    candidates_ptr,
    commits_ptr,
    counts_ptr,
    due_ptr,
    end_ids_ptr,
    # sizes
    seqlen,
    ends,
    blocks,
    block_steps,
    # scalars
    mask_id,
    pad_id,
    # constants
    PROMPT_MASKS_WAIT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    counters_ptr += row * COUNTERS
    # [COLUMNS]
    columns = tl.arange(0, COLUMNS)
    in_row = columns < seqlen
    # scalar bases in 64 bits, offsets within the row in 32
    first = row * seqlen
    x_ptrs, decoded_step_ptrs = x_ptr + first + columns, decoded_step_ptr + first + columns
    x = tl.load(x_ptrs, mask=in_row, other=0)
    decoded_step = tl.load(decoded_step_ptrs, mask=in_row, other=0)
    step = tl.load(counters_ptr + STEP)
    first_generated = tl.load(counters_ptr + FIRST_GENERATED)

    was_masked = decoded_step == MASKED
    masked = was_masked & (x == mask_id)
    if end_ids_ptr is not None:
        # an end token with no mask before it ends the row
        is_end = columns < 0
        for i in range(ends):
            is_end |= x == tl.load(end_ids_ptr + i)
        first_mask = tl.min(tl.where(masked, columns, COLUMNS), 0)
        is_end &= in_row & (columns >= first_generated) & (columns < first_mask)
        if tl.max(is_end.to(tl.int32), 0) > 0:
            tl.store(x_ptrs, tl.zeros_like(x) + pad_id, mask=masked)
            masked = columns < 0
    tl.store(decoded_step_ptrs, tl.zeros_like(decoded_step) + step.to(tl.int32), mask=was_masked & ~masked)

    findable = masked if PROMPT_MASKS_WAIT else masked & (columns >= first_generated)
    first_mask = tl.min(tl.where(findable, columns, COLUMNS), 0)
    block_length = tl.maximum(tl.load(counters_ptr + BLOCK_LENGTH), 1)
    old_block = tl.load(counters_ptr + BLOCK)
    block = tl.where(first_mask < COLUMNS, tl.maximum(first_mask - first_generated, 0) // block_length, old_block)
    entered = block != old_block
    block_step = tl.where(entered, 0, tl.load(counters_ptr + BLOCK_STEP) + 1)
    block_start = first_generated + block * block_length
    generated_end = first_generated + tl.load(counters_ptr + GENERATED)
    block_end = tl.minimum(block_start + block_length, generated_end)
    in_block = masked & (columns < block_end)
    tl.store(counters_ptr + STEP, step + 1)
    tl.store(counters_ptr + BLOCK, block)
    tl.store(counters_ptr + BLOCK_STEP, block_step)
    tl.store(counters_ptr + BLOCK_START, block_start)
    tl.store(counters_ptr + BLOCK_END, block_end)
    tl.store(counters_ptr + MASKS, tl.sum(masked.to(tl.int64), 0))

    if due_ptr is not None:
        in_block &= tl.load(due_ptr + first + columns, mask=in_block, other=0) <= block_step
    tl.store(candidates_ptr + first + columns, in_block, mask=in_row)
    if commits_ptr is not None:
        # a row without blocks keeps -1
        place = tl.minimum(tl.maximum(block, 0), blocks - 1) * block_steps
        place += tl.minimum(tl.maximum(block_step, 0), block_steps - 1)
        tl.store(counts_ptr + row, tl.load(commits_ptr + row * blocks * block_steps + place))


def _launch(
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
    batch, seqlen = x.shape
    config = row_config(seqlen)
    _, blocks, block_steps = (0, 1, 1) if commits is None else commits.shape
    with checks.device_guard(x):
        _advance_rows_kernel[(batch,)](
            x_ptr=x,
            decoded_step_ptr=decoded_step,
            counters_ptr=counters,
            candidates_ptr=candidates,
            commits_ptr=commits,
            counts_ptr=counts,
            due_ptr=due,
            end_ids_ptr=end_ids,
            seqlen=seqlen,
            ends=0 if end_ids is None else end_ids.shape[0],
            blocks=blocks,
            block_steps=block_steps,
            mask_id=mask_id,
            pad_id=pad_id,
            PROMPT_MASKS_WAIT=prompt_masks_wait,
            COLUMNS=config.block,
            num_warps=config.num_warps,
        )
