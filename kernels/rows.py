"""The state of each row of a denoising run, and the rules that choose the positions to recompute.

Every row of a batch is at its own step and in its own block: one row of `counters`, a tensor (batch, len(Counter))
int64, holds its numbers in the order of `Counter`.
"""

from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Literal

from dkv.kernels.language import tl

PROMPT = -(2**30)  # decoded_step of positions that were decoded before the first step
MASKED = 2**30  # decoded_step of positions that are still masked


class Counter(IntEnum):
    """A column of `counters`.

    Attributes:
        STEP: steps done so far, which is the number of the step about to run.
        BLOCK_STEP: steps done since the block was reached.
        BLOCK: the block of the first mask; BLOCK_START, BLOCK_END: its first column and its end (exclusive).
        MASKS: masks left in the row.
        FIRST_COLUMN: the first column that is not padding; FIRST_GENERATED: the first column of block 0.
        GENERATED, BLOCK_LENGTH: columns to generate, and columns of a block.
        SEED, REQUEST: the noise of the row is drawn from these, the step and the position.
        NAN_STEP: the first step with a candidate whose score was NaN, so it had no answer; -1: none.
    """

    STEP = 0
    BLOCK_STEP = auto()
    BLOCK = auto()
    BLOCK_START = auto()
    BLOCK_END = auto()
    MASKS = auto()
    FIRST_COLUMN = auto()
    FIRST_GENERATED = auto()
    GENERATED = auto()
    BLOCK_LENGTH = auto()
    SEED = auto()
    REQUEST = auto()
    NAN_STEP = auto()


class Size(IntEnum):
    """A column of `sizes` (batch, len(Size)) int32: the sizes of a row's next step.

    Attributes:
        ACTIVE: positions to recompute. CANDIDATES: masks that may become tokens. MASKS: masks left.
        LATER: an upper bound of ACTIVE one step later, if that step is in the same block.
        NAN_STEP: the counter of this name.
    """

    ACTIVE = 0
    CANDIDATES = auto()
    MASKS = auto()
    LATER = auto()
    NAN_STEP = auto()


# the same numbers for the kernels
COUNTERS, SIZES = tl.constexpr(len(Counter)), tl.constexpr(len(Size))
STEP, BLOCK_STEP = tl.constexpr(int(Counter.STEP)), tl.constexpr(int(Counter.BLOCK_STEP))
BLOCK, BLOCK_LENGTH = tl.constexpr(int(Counter.BLOCK)), tl.constexpr(int(Counter.BLOCK_LENGTH))
BLOCK_START, BLOCK_END = tl.constexpr(int(Counter.BLOCK_START)), tl.constexpr(int(Counter.BLOCK_END))
MASKS, FIRST_COLUMN = tl.constexpr(int(Counter.MASKS)), tl.constexpr(int(Counter.FIRST_COLUMN))
FIRST_GENERATED, GENERATED = tl.constexpr(int(Counter.FIRST_GENERATED)), tl.constexpr(int(Counter.GENERATED))
SEED, REQUEST = tl.constexpr(int(Counter.SEED)), tl.constexpr(int(Counter.REQUEST))
NAN_STEP, SIZE_NAN_STEP = tl.constexpr(int(Counter.NAN_STEP)), tl.constexpr(int(Size.NAN_STEP))
SIZE_ACTIVE, SIZE_CANDIDATES = tl.constexpr(int(Size.ACTIVE)), tl.constexpr(int(Size.CANDIDATES))
SIZE_MASKS, SIZE_LATER = tl.constexpr(int(Size.MASKS)), tl.constexpr(int(Size.LATER))


@dataclass(frozen=True)
class Rule:
    """Which positions a step recomputes: all of them in a refresh, otherwise those that are not stable.

    Stable positions are read from the cache. A position counts as decoded if a step before the last `delay` ones
    decoded it.

    Attributes:
        warmup, interval: the first `warmup` steps of a block are refreshes, and so is every `interval`-th step of it
            (None: no other).
        stable: "nothing"; positions that are "decoded"; those whose "next" position is decoded; those of which "both"
            are; or all "others" than those just decoded, those about to be, and a window around them.
        delay: number of steps for which a position is still recomputed after the step that decoded it.
        frozen_prompt: the prompt is stable even in a refresh, except where its outputs are needed.
        from_block_start, until_block_end: positions before or after the current block are stable.
        window: for "others", the number of nearest masks for each position about to be decoded; if `contiguous`, the
            width of the range around each position decoded at the previous step.
    """

    warmup: int = 0
    interval: int | None = None
    stable: Literal["nothing", "decoded", "next", "both", "others"] = "nothing"
    delay: int = 1
    frozen_prompt: bool = False
    from_block_start: bool = False
    until_block_end: bool = False
    window: int = 0
    contiguous: bool = False

    def refreshes(self, block_step: int) -> bool:
        """Whether this step of a block is a refresh."""
        return block_step < self.warmup or (self.interval is not None and block_step % self.interval == 0)

    def is_foreseen(self, shifted: bool) -> bool:
        """Whether the number of masks alone decides how much is recomputed, and not their places."""
        return not shifted or self.stable not in ("decoded", "both")
