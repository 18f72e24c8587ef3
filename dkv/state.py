"""The state of a denoising run before each step: the sequence, when each position was decoded, block and step."""

from typing import Any

import torch
from torch import Tensor

from dkv.kernels import reference
from dkv.kernels.rows import MASKED, PROMPT, Counter, Rule


def _counter(counter: Counter, meaning: str) -> Any:
    return property(lambda self: self.counters[:, counter, None], doc=f"(batch, 1) int64: {meaning}")


class State:
    """The state that a policy reads; everything is a tensor on the model's device, one row per sequence.

    The tensors are allocated once and change in place, so that a recorded step can be replayed on them. Rows are
    independent of each other: each has its own step, block and lengths.

    Attributes:
        x: (batch, seqlen) int64, the sequence before this step.
        valid: (batch, seqlen) bool, False for padding, which is on the left.
        decoded_step: (batch, seqlen) int32, the step that decoded a position. It is `PROMPT` of `dkv.kernels.rows` for
            positions decoded from the start, and `MASKED` for masked ones.
        candidates: (batch, seqlen) bool, the masks that this step may decode: those of the current block or, in a known
            order, those whose turn it is.
        columns: (1, seqlen) int64, 0 .. seqlen - 1.
        counters: (batch, len(Counter)) int64, the numbers of each row; step, block and the other properties are its
            columns.
        counts: (batch,) int64, the number of tokens that this step commits; where nothing limits it, all candidates.
        shifted: bool, whether the output at column j - 1 predicts column j (Dream), or that at column j (LLaDA).
        rank: (batch, seqlen) int32, the place of each mask in the decoding order of its block; None if no order is
            known.
        due: (batch, seqlen) int32, the step of the block that decodes a mask; None if no order is known.
    """

    step: Tensor = _counter(Counter.STEP, "the number of the step about to run, from 0")
    block: Tensor = _counter(Counter.BLOCK, "the block of the row's first mask")
    block_step: Tensor = _counter(Counter.BLOCK_STEP, "the steps done since the row reached that block")
    block_start: Tensor = _counter(Counter.BLOCK_START, "the first column of the block")
    block_end: Tensor = _counter(Counter.BLOCK_END, "the column after the block")
    masks: Tensor = _counter(Counter.MASKS, "the masks that are left in the row")
    first_column: Tensor = _counter(Counter.FIRST_COLUMN, "the first column that is not padding")
    first_generated: Tensor = _counter(Counter.FIRST_GENERATED, "the column that blocks are counted from")

    def __init__(
        self,
        batch: int,
        seqlen: int,
        *,
        mask_id: int,
        shifted: bool,
        ops: Any,
        device: torch.device,
        prompt_masks_wait: bool = True,
        ordered: bool = False,
    ) -> None:
        """Allocates; `start` begins a run.

        Args:
            ops: the operators of `dkv.kernels.direct`.
            prompt_masks_wait: whether a row stays at its first block until the masks in front of it are decoded. False:
                those may stay masked, as in the unconditional rows of guidance, and do not count for the block.
            ordered: whether the order of decoding is known beforehand.
        """
        self.mask_id, self.shifted, self.prompt_masks_wait, self.ops = mask_id, shifted, prompt_masks_wait, ops

        def zeros(*shape, dtype=torch.int64):
            return torch.zeros(shape, dtype=dtype, device=device)

        self.columns = torch.arange(seqlen, device=device)[None]
        self.x, self.decoded_step = zeros(batch, seqlen), zeros(batch, seqlen, dtype=torch.int32)
        self.valid, self.candidates = (zeros(batch, seqlen, dtype=torch.bool) for _ in range(2))
        self.rank, self.due = (zeros(batch, seqlen, dtype=torch.int32) if ordered else None for _ in range(2))
        self.counters, self.counts = zeros(batch, len(Counter)), zeros(batch)

    def start(
        self,
        x: Tensor,
        valid: Tensor,
        *,
        first_generated: int | Tensor,
        block_length: int | Tensor,
        gen_length: int | Tensor,
        seed: int | Tensor = 0,
    ) -> None:
        """Begins a run of the same shape in the same memory; `advance` then takes it to its first step.

        Args:
            x, valid: copied into the attributes; the masks in x that are not padding will be decoded.
            first_generated, block_length, gen_length, seed: ints, or integer tensors (batch,) with one for each row.
        """
        self.x.copy_(x)
        self.valid.copy_(valid)
        self.decoded_step.fill_(PROMPT).masked_fill_((x == self.mask_id) & valid, MASKED)
        self.counters.fill_(-1)
        self.counters[:, Counter.FIRST_COLUMN] = valid.int().argmax(1)
        self.counters[:, Counter.FIRST_GENERATED] = first_generated
        self.counters[:, Counter.BLOCK_LENGTH] = block_length
        self.counters[:, Counter.GENERATED] = gen_length
        self.counters[:, Counter.SEED] = seed
        self.counters[:, Counter.REQUEST] = torch.arange(len(x), device=x.device)

    def advance(self, *, commits: Tensor | None = None, end_ids: Tensor | None = None, pad_id: int = 0) -> None:
        """Takes `x` after the commit of a step and moves on to the next step.

        commits, end_ids, pad_id: as in `dkv.kernels.reference.advance_rows`.
        """
        self.ops.advance_rows(
            self.x,
            self.decoded_step,
            self.counters,
            self.candidates,
            mask_id=self.mask_id,
            prompt_masks_wait=self.prompt_masks_wait,
            commits=commits,
            counts=self.counts,
            due=self.due,
            end_ids=end_ids,
            pad_id=pad_id,
        )

    @property
    def masked(self) -> Tensor:
        """(batch, seqlen) bool: the positions that hold the mask token."""
        return self.decoded_step == MASKED

    @property
    def decoded(self) -> Tensor:
        """(batch, seqlen) bool: all other positions, padding included."""
        return self.decoded_step != MASKED

    def decoded_before(self, steps: int) -> Tensor:
        """(batch, seqlen) bool: the positions decoded at least `steps` steps ago; 1 includes the previous step's."""
        return self.decoded_step <= self.step - steps

    @property
    def prompt(self) -> Tensor:
        """(batch, seqlen) bool: the positions decoded before the first step, padding included."""
        return self.decoded_step == PROMPT

    @property
    def running(self) -> Tensor:
        """(batch, 1) bool: whether the row has masks left."""
        return self.masks > 0

    @property
    def in_block(self) -> Tensor:
        """(batch, seqlen) bool: the masks of the current block; masks inside the prompt belong to the first block."""
        return self.masked & (self.columns < self.block_end)

    @property
    def to_decode(self) -> Tensor | None:
        """(batch, seqlen) bool: the masks that this step decodes; None if no order is known beforehand."""
        return None if self.due is None else self.candidates

    def recomputed(self, rule: Rule) -> Tensor:
        """(batch, seqlen) bool: the choice of a policy by its rule, without the positions that a step needs anyway."""
        return reference.recomputed(
            self.decoded_step,
            self.counters,
            rule,
            shifted=self.shifted,
            candidates=self.candidates,
            rank=self.rank,
        )
