"""What a denoising run knows of each row, and the rules by which its positions are recomputed: names for the kernels.

A row of a batch is at a step and in a block of its own: all its numbers stand in one row of `counters`, a tensor
(batch, len(Counter)) int64, in the order of `Counter`.
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
        STEP: steps done so far; the step about to run has this number. BLOCK_STEP: those since the block was reached.
        BLOCK: the block of the first mask; BLOCK_START, BLOCK_END: its first column, and the one behind it.
        MASKS: masks of the row that are left.
        FIRST_COLUMN: the first column that is not padding; FIRST_GENERATED: where blocks are counted from.
        GENERATED, BLOCK_LENGTH: columns to generate, and columns of a block.
        SEED, REQUEST: what the noise of the row is drawn from, besides step and position.
        NAN_STEP: the first step with a candidate whose score is NaN, for want of an answer; -1: there was none.
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
    """A column of `sizes` (batch, len(Size)) int32: what a step is about to do with a row.

    Attributes:
        ACTIVE: positions that are recomputed. CANDIDATES: masks that may become tokens. MASKS: masks that are left.
        LATER: at most so many are recomputed at the step after it, if that is in the same block.
        NAN_STEP: the counter of this name.
    """

    ACTIVE = 0
    CANDIDATES = auto()
    MASKS = auto()
    LATER = auto()
    NAN_STEP = auto()


# the columns, for kernels
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
    """Which positions a step recomputes: in a refresh all of them, else those that the attributes do not make stable.

    Attributes:
        warmup, interval: the first `warmup` steps of a block refresh, and every `interval`-th one (None: no other).
        stable: what is read from the cache, with "decoded" meaning decoded before the last `delay` steps: nothing, a
            position that is decoded ("decoded"), one whose next is ("next"), one of which both are ("both"), or all
            but what was just decoded, what is about to be and a window around it ("others").
        delay: steps that a position is recomputed after the one that decoded it.
        frozen_prompt: the prompt is stable even in a refresh, but for the outputs that are needed.
        from_block_start, until_block_end: what lies in front of or behind the current block is stable.
        window: of "others": for each position about to be decoded, so many of the nearest masks; or, `contiguous`, the
            range of that width around each position decoded at the step before.
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
        """Whether the step with this number in its block is a refresh."""
        return block_step < self.warmup or (self.interval is not None and block_step % self.interval == 0)

    def is_foreseen(self, shifted: bool) -> bool:
        """Whether the numbers of masks decide how much is recomputed; else it depends on where the masks are."""
        return not shifted or self.stable not in ("decoded", "both")
