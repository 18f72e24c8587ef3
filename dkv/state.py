"""What is known of a denoising run before each step: the sequence, when each position was decoded, block and step."""

import torch

from dkv.kernels import reference
from dkv.kernels.rows import MASKED, PROMPT, Counter


def _counter(counter, meaning):
    return property(lambda self: self.counters[:, counter, None], doc=f"(batch, 1) int64: {meaning}")


class State:
    """The state a policy reads; everything is a tensor on the model's device, one row per sequence.

    The tensors are allocated once and change in place, so that a recorded step can be replayed on them. Rows are
    independent of each other: each has its own step, block and lengths.

    Attributes:
        x: (batch, seqlen) int64, the sequence before this step.
        valid: (batch, seqlen) bool, False for padding, which is on the left.
        decoded_step: (batch, seqlen) int32, the step after which a position was decoded; `PROMPT` and `MASKED` of
            `dkv.kernels.rows` for positions decoded from the start and for masked ones.
        candidates: (batch, seqlen) bool, the masks that this step may decode: those of the current block, or what the
            order says.
        columns: (1, seqlen) int64, 0 .. seqlen - 1.
        counters: (batch, len(Counter)) int64, the numbers of each row; the properties below are its columns.
        counts: (batch,) int64, how many tokens this step commits; as many as there are where nothing limits it.
        shifted: bool, whether the output at column j - 1 predicts column j (Dream) rather than that at j (LLaDA).
        rank: (batch, seqlen) int32, where the order of decoding is known, the place of each mask in that of its block,
            and due: (batch, seqlen) int32, the step of the block that decodes it; else None.
    """

    step = _counter(Counter.STEP, "steps done so far; the step about to run has this number")
    block = _counter(Counter.BLOCK, "the block of the row's first mask")
    block_step = _counter(Counter.BLOCK_STEP, "the steps done since that block was reached")
    block_start = _counter(Counter.BLOCK_START, "the first column of the block")
    block_end = _counter(Counter.BLOCK_END, "the column behind the block")
    masks = _counter(Counter.MASKS, "masks of the row that are left")
    first_column = _counter(Counter.FIRST_COLUMN, "the first column that is not padding")
    first_generated = _counter(Counter.FIRST_GENERATED, "the column that blocks are counted from")

    def __init__(self, batch, seqlen, *, mask_id, shifted, ops, device, prompt_masks_wait=True, ordered=False):
        """Allocates; `start` begins a run.

        Args:
            ops: the operators of `dkv.kernels.direct`.
            prompt_masks_wait: whether a row stays at its first block until the masks in front of it are decoded; else
                they may stay, as in the unconditional rows of guidance, and only those behind count for the block.
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

    def start(self, x, valid, *, first_generated, block_length, gen_length, seed=0):
        """Begins a run of the same shape in the same memory; `advance` then takes it to its first step.

        Args:
            x, valid: as above; what is masked in x and not padding will be decoded.
            first_generated, block_length, gen_length, seed: ints, or integer tensors (batch,), of each row.
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

    def advance(self, **schedule):
        """Takes `x` after a step's commit and moves on to the next step; schedule: as of `reference.advance_rows`."""
        self.ops.advance_rows(
            self.x,
            self.decoded_step,
            self.counters,
            self.candidates,
            mask_id=self.mask_id,
            prompt_masks_wait=self.prompt_masks_wait,
            counts=self.counts,
            due=self.due,
            **schedule,
        )

    @property
    def masked(self):
        """(batch, seqlen) bool: which positions hold the mask token."""
        return self.decoded_step == MASKED

    @property
    def decoded(self):
        return self.decoded_step != MASKED

    def decoded_before(self, steps):
        """(batch, seqlen) bool: decoded after the step that is `steps` before this one; 1 is the present state."""
        return self.decoded_step <= self.step - steps

    @property
    def prompt(self):
        """(batch, seqlen) bool: decoded before the first step (padding included)."""
        return self.decoded_step == PROMPT

    @property
    def running(self):
        """(batch, 1) bool: whether the row has masks left."""
        return self.masks > 0

    @property
    def in_block(self):
        """(batch, seqlen) bool: the masks of the current block; those inside the prompt belong to the first one."""
        return self.masked & (self.columns < self.block_end)

    @property
    def to_decode(self):
        """(batch, seqlen) bool: what this step will decode, where the order is known beforehand; else None."""
        return None if self.due is None else self.candidates

    def recomputed(self, rule):
        """(batch, seqlen) bool: a policy's choice by its `dkv.kernels.rows.Rule`, without what a step needs besides."""
        return reference.recomputed(
            self.decoded_step,
            self.counters,
            rule,
            shifted=self.shifted,
            candidates=self.candidates,
            rank=self.rank,
        )
