"""step_speed counts what a step launches and computes; few launches and hardly a row are wasted."""

import pytest
import step_speed


@pytest.mark.parametrize(
    "point, most", [("LLaDA:1:1024:32", 340), ("Dream:8:1024:32", 300), ("LLaDA:8:1024:16", 340)], ids=lambda p: p
)
def test_no_row_or_launch_of_a_step_is_wasted(point, most, unpoisoned):
    ((family, batch, length, active),) = step_speed.parse_points(point)
    row = step_speed.count_point(family, batch, length, active)
    assert row["launches"] <= most and row["bookkeeping"] <= 12
    assert row["rows_needed"] == batch * active and row["rows_computed"] <= 1.1 * row["rows_needed"]
    assert sum(row["purposes"].values()) == row["launches"]


@pytest.mark.parametrize("case", [("LLaDA", 1, 300, "Decode(8)"), ("Dream", 3, 600, "Decode(8)")], ids=str)
def test_no_row_of_a_run_is_wasted(case):
    row = step_speed.count_run(*case)
    assert 0 < row["rows_needed_full"] <= row["rows_computed_full"] <= 1.06 * row["rows_needed_full"]
    assert 0 < row["rows_needed_cached"] <= row["rows_computed_cached"] <= 1.1 * row["rows_needed_cached"]
    assert 2 <= row["graphs"] <= 16
