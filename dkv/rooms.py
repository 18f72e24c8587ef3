"""The sizes that the steps of a run are padded to: few, so that few CUDA graphs are recorded, with little padding."""

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 16  # rows of the smallest tile of a matrix product
LARGEST_GRAPH = 2048  # positions in a pass of the model; with more, launches cost nothing beside the work
CACHED_SIZES = 13  # with full steps and uneven rows, at most 16 graphs a run


class Room(NamedTuple):
    """The size of a step: what it needs, or what it has room for.

    Attributes:
        positions: recomputed positions of all rows together.
        per_row: the maximum of them in one row.
        candidates: masks of all rows together that may become tokens.
    """

    positions: int
    per_row: int
    candidates: int


class Rooms:
    """Finds the room for the need of a step, among few sizes.

    The sizes of cached steps lie evenly below the largest one, which pads least over a run whose steps get shorter.
    Larger steps, such as full ones, get at most a 16th more than they need.

    Args:
        batch: rows, without those of guidance.
        max_need: no cached step needs more positions, in total or in a row, and no step more candidates.
        positions: the positions that each cached step needs; None: they are not known.
        rows_per_sequence: rows of the model's batch for each sequence, 2 with guidance.
    """

    def __init__(
        self, batch: int, max_need: Room, positions: Sequence[int] | None = None, rows_per_sequence: int = 1
    ) -> None:
        self.batch, self.max_need, self.largest_graph = batch, max_need, LARGEST_GRAPH // rows_per_sequence
        largest = min(max_need.positions, self.largest_graph)
        unit = round_up(-(-largest // CACHED_SIZES), TILE)
        # if the needs are known, each size is the largest need that it serves
        needs = [*range(unit, largest, unit), largest] if positions is None else positions
        needs = sorted(n for n in needs if n <= self.largest_graph)
        self.sizes = sorted({-(-n // unit): round_up(n, TILE) for n in needs}.values())

    def of(self, need: Room) -> Room:
        """The room for a need; a step that is not recorded gets just what it needs."""
        if not self.records(need):
            return need
        index = bisect.bisect_left(self.sizes, need.positions)
        if index < len(self.sizes):
            positions = self.sizes[index]
            # either the rows are about even, or the room is for the worst case
            per_row = min(power_of_two(-(-positions // self.batch)), positions)
            per_row = per_row if need.per_row <= per_row else max(self.max_need.per_row, need.per_row)
        else:
            positions, per_row = padded(need.positions), round_up(need.per_row, 4 * TILE)
        # one number of candidates for all steps, because every extra size would be another graph
        candidates = min(self.max_need.candidates, positions)
        if need.candidates > candidates:
            candidates = padded(need.candidates)
        return Room(positions, per_row, candidates)

    def records(self, room: Room) -> bool:
        """Whether a step of this size is worth a CUDA graph."""
        return room.positions <= self.largest_graph

    def every(self) -> Iterator[Room]:
        """All rooms that `of` gives to cached steps, with even rows and with uneven ones."""
        for size in self.sizes:
            yield self.of(Room(size, 1, 1))
            yield self.of(Room(size, self.max_need.per_row, 1))


def round_up(count: int, unit: int) -> int:
    """The next multiple of unit, at least one unit."""
    return max(-(-count // unit), 1) * unit


def power_of_two(count: int) -> int:
    """The next power of two, at least a tile."""
    return max(TILE, 1 << (count - 1).bit_length())


def padded(count: int) -> int:
    """The next multiple of a unit, which is a 32nd to a 16th of count and at least a tile."""
    return round_up(count, max(TILE, power_of_two(count) // 32))


class LateSizes:
    """Sizes of steps that the GPU computes and the host reads one step later, without waiting.

    Before the host launches a step, it reads the sizes that were posted before the previous step. The GPU may still be
    busy with that step, so it never runs out of work.
    """

    def __init__(self, like: Tensor) -> None:
        """like: a tensor of the shape, dtype and device of the sizes."""
        self._copies = [
            torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda) for _ in range(2)
        ]
        self._events = [torch.cuda.Event() if like.is_cuda else None for _ in range(2)]

    def post(self, sizes: Tensor) -> None:
        """Starts a copy of the sizes to the host, as they are after everything launched so far."""
        self._copies.reverse()
        self._events.reverse()
        self._copies[0].copy_(sizes, non_blocking=True)
        if self._events[0] is not None:
            self._events[0].record(torch.cuda.current_stream(sizes.device))

    def take(self) -> list[list[int]]:
        """The sizes of the post before the last one."""
        if self._events[1] is not None:
            self._events[1].synchronize()
        return self._copies[1].tolist()
