"""What is known of a denoising run before each step: the sequence, when each position was decoded, block and step."""

import torch

PROMPT = -(2**30)  # decoded_step of positions that were decoded before the first step
MASKED = 2**30  # decoded_step of positions that are still masked


class State:
    """The state a policy reads; everything is a tensor on the model's device, one row per sequence.

    The tensors are allocated once and change in place, so that a recorded step can be replayed on them.

    Attributes:
        x: (batch, seqlen) int64, the sequence before this step.
        masked, decoded: (batch, seqlen) bool, which positions hold the mask token, and which do not.
        real: (batch, seqlen) bool, False for padding, which is on the left.
        decoded_step: (batch, seqlen) int32, the step after which a position was decoded; `PROMPT` and `MASKED` are its
            values for positions decoded from the start and for masked ones.
        step: () int64, steps done so far; the step about to run has this number.
        block, block_step: (batch, 1) int64, the block of a row's first mask, and the steps done since it was reached.
        block_start, block_end: (batch, 1) int64, the first column of that block and the one behind it.
        block_masks: (batch, 1) int64, masks of the block when it was reached.
        running: (batch, 1) bool, whether the row has masks left.
        columns: (1, seqlen) int64, 0 .. seqlen - 1.
        first_column: (batch, 1) int64, the first column that is not padding.
        shifted: bool, whether the output at column j - 1 predicts column j (Dream) rather than that at j (LLaDA).
        to_decode: (batch, seqlen) bool, what this step will decode, where the order is known beforehand; else None.
        to_decode_columns: (batch, n) int64, the same as columns in decoding order, -1 padded; else None.
    """

    def __init__(self, x, *, mask_id, real, first_generated, block_length, shifted, prompt_masks_wait=True):
        """Begins a run with x and real, which are as above.

        Args:
            first_generated: (batch, 1) int64, where blocks are counted from.
            block_length: int, None: one block.
            prompt_masks_wait: whether a row stays at its first block until the masks in front of it are decoded; else
                they may stay, as in the unconditional rows of guidance, and only those behind count for the block.
        """
        self.mask_id, self.shifted, self.prompt_masks_wait = mask_id, shifted, prompt_masks_wait
        self.block_length = block_length or x.shape[1]
        self.columns = torch.arange(x.shape[1], device=x.device)[None]
        self.x, self.real, self.masked = torch.empty_like(x), torch.empty_like(real), torch.empty_like(real)
        self.decoded_step = torch.empty(x.shape, dtype=torch.int32, device=x.device)
        self.step = torch.zeros((), dtype=torch.int64, device=x.device)
        self.first_generated, self.first_column = torch.empty_like(first_generated), torch.empty_like(first_generated)
        self.running = torch.empty_like(first_generated, dtype=torch.bool)
        self.block, self.block_step, self.block_masks = (torch.empty_like(first_generated) for _ in range(3))
        self.block_start, self.block_end = (torch.empty_like(first_generated) for _ in range(2))
        self.to_decode = self.to_decode_columns = None
        self.start(x, real, first_generated)

    def start(self, x, real, first_generated):
        """Begins a run: a new sequence of the same shape in the same memory."""
        self.x.copy_(x)
        self.real.copy_(real)
        self.first_generated.copy_(first_generated)
        self.first_column.copy_(real.int().argmax(1, keepdim=True))
        self.masked.copy_((x == self.mask_id) & real)
        self.decoded_step.fill_(PROMPT).masked_fill_(self.masked, MASKED)
        self.step.zero_()
        self.block.fill_(-1)
        self.block_step.zero_()
        self.block_masks.zero_()
        self._find_blocks()

    @property
    def decoded(self):
        return ~self.masked

    def decoded_before(self, steps):
        """(batch, seqlen) bool: decoded after the step that is `steps` before this one; 1 is the present state."""
        return self.decoded_step <= self.step - steps

    @property
    def prompt(self):
        """(batch, seqlen) bool: decoded before the first step (padding included)."""
        return self.decoded_step == PROMPT

    @property
    def in_block(self):
        """(batch, seqlen) bool: the masks of the current block; those inside the prompt belong to the first one."""
        return self.masked & (self.columns < self.block_end)

    def advance(self, x):
        """Takes the sequence after this step's commit, which may be `self.x`, and moves on to the next step."""
        if x is not self.x:
            self.x.copy_(x)
        newly_decoded = self.masked & (self.x != self.mask_id)
        self.decoded_step.copy_(torch.where(newly_decoded, self.step, self.decoded_step))
        self.masked.masked_fill_(newly_decoded, False)
        self.step.add_(1)
        self.block_step.add_(1)
        self._find_blocks()

    def _find_blocks(self):
        self.running.copy_(self.masked.any(1, keepdim=True))
        masked = self.masked if self.prompt_masks_wait else self.masked & (self.columns >= self.first_generated)
        first_mask = masked.int().argmax(1, keepdim=True)
        block = (first_mask - self.first_generated).clamp(min=0) // self.block_length
        block = torch.where(masked.any(1, keepdim=True), block, self.block)
        entered = block != self.block
        self.block.copy_(block)
        torch.add(self.first_generated, block, alpha=self.block_length, out=self.block_start)
        torch.add(self.block_start, self.block_length, out=self.block_end)
        self.block_step.masked_fill_(entered, 0)
        self.block_masks.copy_(torch.where(entered, self.in_block.sum(1, keepdim=True), self.block_masks))
