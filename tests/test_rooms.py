"""`dkv.rooms`: few sizes of steps, with little padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dkv.rooms import CACHED_SIZES, TILE, LateSizes, Room, Rooms, padded, power_of_two, round_up


@given(st.integers(1, 33), st.integers(1, 2500), st.integers(1, 300), st.booleans())
def test_rooms_have_room(batch, per_row, candidates, known):
    """For any need up to the largest, known beforehand or not; and there are few of them."""
    largest = Room(batch * per_row, per_row, batch * candidates)
    needs = [Room(batch * n, n, batch * min(n, candidates)) for n in range(1, per_row + 1)]
    rooms = Rooms(batch, largest, [need.positions for need in needs] if known else None)
    uneven = [need._replace(per_row=min(per_row, 3 * need.per_row)) for need in needs]
    found = {}
    for need in needs + uneven:
        room = rooms.of(need)
        assert all(has >= needed for has, needed in zip(room, need, strict=True))
        if rooms.records(need):
            found[need] = room
        else:
            assert room == need
    even = {found[need] for need in needs if need in found}
    assert len(even) <= CACHED_SIZES
    assert even <= set(rooms.every())
    if known:
        # over a run that needs every size once
        computed = sum(found[need].positions for need in needs if need in found)
        needed = sum(round_up(need.positions, TILE) for need in needs if need in found)
        assert computed <= 1.1 * needed


@pytest.mark.parametrize("count", [1, 16, 17, 300, 512, 513, 1025, 1800, 2048, 2049, 5120])
def test_a_full_step_gets_at_most_a_16th_more(count):
    assert count <= padded(count) <= 1.06 * round_up(count, TILE)
    assert power_of_two(count) >= count and power_of_two(count) & (power_of_two(count) - 1) == 0


def test_late_sizes_are_those_before_the_last():
    sizes = torch.zeros(2, 3, dtype=torch.int32)
    late = LateSizes(sizes)
    for step in range(4):
        late.post(sizes.fill_(step))
        if step:
            assert late.take() == [[step - 1] * 3] * 2
