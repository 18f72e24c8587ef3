"""How much room the steps of a run get: few sizes, so that few graphs are recorded, and little of it padding."""

import bisect
from typing import NamedTuple

import torch

TILE = 16  # rows of the smallest tile of a matrix product
LARGEST_GRAPH = 2048  # rows of the model's batch; with more, launches cost nothing beside the work
CACHED_SIZES = 13  # with full steps and uneven rows, at most 16 graphs a run


class Room(NamedTuple):
    """Positions that a step needs, or has room for: in all, in any one row, and of candidates."""

    positions: int
    per_row: int
    candidates: int


class Rooms:
    """Finds the room for what a step needs, among few sizes.

    The sizes of cached steps lie evenly below the largest one: over a run whose steps get shorter and shorter that is
    the least padding. What is larger, as a full step, gets at most a 16th more.

    Args:
        batch: int.
        most: a `Room`: no cached step needs more positions, in all or in a row, and no step at all more candidates.
        positions: the needs of all cached steps, where they are known.
        copies: int, how often the model computes each position, 2 with guidance.
    """

    def __init__(self, batch, most, positions=None, copies=1):
        self.batch, self.most, self.largest_graph = batch, most, LARGEST_GRAPH // copies
        largest = min(most.positions, self.largest_graph)
        unit = round_up(-(-largest // CACHED_SIZES), TILE)
        # where the needs are known, no size is larger than the largest of those that it is for
        needs = [*range(unit, largest, unit), largest] if positions is None else positions
        needs = sorted(n for n in needs if n <= self.largest_graph)
        self.sizes = sorted({-(-n // unit): round_up(n, TILE) for n in needs}.values())

    def of(self, need):
        """The room for a need; for one that is not recorded, it is the need itself."""
        if not self.records(need):
            return need
        index = bisect.bisect_left(self.sizes, need.positions)
        if index < len(self.sizes):
            positions = self.sizes[index]
            # rows take part about evenly, or it is for the worst case
            per_row = min(power_of_two(-(-positions // self.batch)), positions)
            per_row = per_row if need.per_row <= per_row else max(self.most.per_row, need.per_row)
        else:
            positions, per_row = padded(need.positions), round_up(need.per_row, 4 * TILE)
        # the same room for all numbers of candidates, or there would be more sizes
        candidates = min(self.most.candidates, positions)
        if need.candidates > candidates:
            candidates = padded(need.candidates)
        return Room(positions, per_row, candidates)

    def records(self, room):
        """Whether a step of this size is worth a CUDA graph."""
        return room.positions <= self.largest_graph

    def every(self):
        """All rooms that `of` gives to cached steps, of even rows and of uneven ones."""
        for size in self.sizes:
            yield self.of(Room(size, 1, 1))
            yield self.of(Room(size, self.most.per_row, 1))


def round_up(count, unit):
    """The next multiple of unit, at least one."""
    return max(-(-count // unit), 1) * unit


def power_of_two(count):
    """The next power of two, at least a tile."""
    return max(TILE, 1 << (count - 1).bit_length())


def padded(count):
    """The next multiple of a 32nd to a 16th of count, and of a tile."""
    return round_up(count, max(TILE, power_of_two(count) // 32))


class LateSizes:
    """Sizes of steps that a GPU has found, read by the host a step later, when it need not wait for them.

    Before it launches a step, the host reads what was found before the last one, which the GPU may still be doing: it
    never runs out of work.
    """

    def __init__(self, like):
        """like: a tensor of the shape, dtype and device of the sizes."""
        self._copies = [
            torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda) for _ in range(2)
        ]
        self._events = [torch.cuda.Event() if like.is_cuda else None for _ in range(2)]

    def post(self, sizes):
        """Asks for a copy of the sizes, a tensor, as they are once all that was launched is done."""
        self._copies.reverse()
        self._events.reverse()
        self._copies[0].copy_(sizes, non_blocking=True)
        if self._events[0] is not None:
            self._events[0].record(torch.cuda.current_stream(sizes.device))

    def take(self):
        """The sizes of the post before the last one, as nested lists."""
        if self._events[1] is not None:
            self._events[1].synchronize()
        return self._copies[1].tolist()
