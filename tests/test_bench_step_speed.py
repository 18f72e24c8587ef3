"""step_speed counts what a step launches and computes, and times it in every way, those alone that compute the same."""

import json

import pytest
import torch

from benchmarks import step_speed
from benchmarks.harness import common, step_counts, step_points, step_replay
from benchmarks.harness.fake_gpu import fake_gpu, fake_model
from benchmarks.harness.launches import Launch
from benchmarks.harness.models import FAMILIES, TRUE_SIZE, tiny, with_layers
from benchmarks.harness.step_points import StepPoint
from dkv.kernels import configs, reference

WAYS = {way.name: way for way in step_points.ways(90)}


@pytest.mark.parametrize(
    "point, way, max_launches",
    [
        ("LLaDA:1:1024:32", "library", 340),
        ("Dream:8:1024:32", "library", 300),
        ("LLaDA:8:1024:16", "library", 340),
        ("LLaDA:1:1024:32", "fused", 220),
        ("Dream:8:1024:32", "fused", 160),
    ],
)
def test_no_row_or_launch_of_a_step_is_wasted(point, way, max_launches, unpoisoned):
    (point,) = step_points.parse_points(point)
    row = step_counts.count_point(point, WAYS[way])
    assert row["launches"] <= max_launches and row["bookkeeping"] <= 12 and row["way"] == way
    assert row["rows_needed"] == point.batch * point.active and row["rows_computed"] <= 1.1 * row["rows_needed"]
    assert sum(row["purposes"].values()) == row["launches"]
    # four of a layer; and in the last one those of the wanted rows apart, by the library
    layers = {"LLaDA": 32, "Dream": 28}[point.family]
    assert row["purposes"]["product"] == 4 * layers + (way == "library")


def test_both_ways_are_counted_where_there_are_both(monkeypatch, capsys, unpoisoned):
    monkeypatch.setattr(step_counts, "RUNS", ())
    sizes = {family: (name, with_layers(config, 2)) for family, (name, config) in TRUE_SIZE.items()}
    monkeypatch.setattr(step_counts, "TRUE_SIZE", sizes)
    assert step_speed.main(["--count", "--points", "Dream:1:64:16,Dream:1:300:all"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    counted = [(row["point"], row["way"]) for row in json.loads(last)["points"]]
    assert counted == [("Dream:1:64:16", "library"), ("Dream:1:64:16", "fused"), ("Dream:1:300:all", "library")]
    assert [" fused " in line for line in lines[1:4]] == [False, True, False]


@torch.no_grad()
def test_steps_use_pdl_where_a_gpu_can(unpoisoned):
    """Everything of a layer but what only PyTorch or a norm does; in no other way anything."""
    assert [way.name for way in step_points.ways(None)] == [way.name for way in step_points.ways(89)]
    assert [way.name for way in step_points.ways(89)] == ["library", "fused"]
    assert [way.name for way in step_points.ways(100)] == ["library", "fused", "fused, PDL"]
    with_pdl = {}
    with fake_gpu(90) as launches:
        model = fake_model(with_layers(TRUE_SIZE["LLaDA"][1], 2))
        for way in WAYS.values():
            current, current.steps = step_points.fake_at_step(model, StepPoint("LLaDA", 1, 1024, 32))
            launches.clear()
            with way.of(current):
                current.compute(current.next_room())
            ours = [launch for launch in launches if isinstance(launch, Launch)]
            with_pdl[way.name] = {launch.name for launch in ours if launch.arguments.get("launch_pdl")}
    products = {"linear_rope_cache", "linear_add_norm", "linear_swiglu"}
    assert with_pdl == {
        "library": set(),
        "fused": set(),
        "fused, PDL": products | {"delayed_attention", "merge_splits"},
    }
    assert configs.PDL is False


@pytest.fixture
def small(monkeypatch, standing_clock):
    """Models of two layers that cost nothing, on a CPU."""
    sizes = {family: (family, with_layers(tiny(family), 2)) for family in FAMILIES}
    monkeypatch.setattr(step_speed, "SCALED_DOWN", sizes)
    monkeypatch.setattr(common, "measure_ceilings", lambda: {"bandwidth": 1e10, "flops": 1e11})
    monkeypatch.setattr(common.torch.cuda, "is_available", lambda: False)


def measured(path, points, status=0):
    """The rows that step_speed writes for these points, in order."""
    assert step_speed.main(["--points", points, "--out", str(path)]) == status
    environment, *rows = map(json.loads, path.read_text().splitlines())
    assert environment["ceilings"]["bandwidth"] == 1e10
    return rows


def test_steps_are_timed_in_all_ways_that_they_have(tmp_path, capsys, small):
    """The library's of all points comes first; it is alone with steps of many rows, and else beside the other way."""
    rows = measured(tmp_path / "steps.jsonl", "LLaDA:2:40:12,Dream:1:64:8,Dream:1:300:all")
    three, two = ["LLaDA:2:40:12", "Dream:1:64:8", "Dream:1:300:all"], ["LLaDA:2:40:12", "Dream:1:64:8"]
    assert [row["point"] for row in rows] == three + [point for point in two for _ in range(2)]
    assert [row["way"] for row in rows] == ["library"] * 3 + ["library", "fused"] * 2
    assert all(row["ms"] > 0 for row in rows)
    # other sums of the same products: not the same path twice
    assert all(("deviation" in row) == (row["way"] == "fused") for row in rows)
    assert all(0 < row.get("deviation", 1e-5) < 1e-4 for row in rows)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["points"]
    for point in two:
        (library, fused) = (row for row in result if row["point"] == point)
        assert library["of_library"] == 1
        assert fused["of_library"] == pytest.approx(fused["ms"] / library["ms"], rel=1e-3)


@pytest.mark.parametrize("fault", ["queries", "caches", "residual", "one row", "activation"])
def test_a_wrong_kernel_is_not_timed(fault, tmp_path, small, monkeypatch):
    """Its point has an error in that way; the library's time stays."""
    update, add, swiglu = reference.linear_rope_cache_update, reference.linear_add_norm, reference.linear_swiglu

    def unrotated(normed, eps, weight, bias, cos, sin, *rest, **options):
        right = update(normed, eps, weight, bias, cos, sin, *rest, **options)
        return right.flip(-1)

    def unwritten(*arguments, **options):
        *others, k_cache, v_cache = arguments
        return update(*others, k_cache.clone(), v_cache.clone(), **options)

    def unadded(x, weight, residual, norm_weight, **options):
        return add(x, weight, residual.clone(), norm_weight, **options)

    def one_row(normed, *arguments, **options):
        out = swiglu(normed, *arguments, **options)
        out[-1] = out[0]
        return out

    def without_gate(*arguments, **options):
        return swiglu(*arguments, **options).abs()

    name, wrong = {
        "queries": ("linear_rope_cache_update", unrotated),
        "caches": ("linear_rope_cache_update", unwritten),
        "residual": ("linear_add_norm", unadded),
        "one row": ("linear_swiglu", one_row),
        "activation": ("linear_swiglu", without_gate),
    }[fault]
    monkeypatch.setattr(reference, name, wrong)
    _, library, fused = measured(tmp_path / "steps.jsonl", "Dream:1:64:8", status=1)
    assert library["ms"] > 0 and "ms" not in fused
    assert fused["way"] == "fused" and "off the library's" in fused["error"]


@torch.no_grad()
def test_a_step_with_pdl_must_leave_what_it_leaves_without(small):
    config = step_speed.SCALED_DOWN["Dream"][1]
    model = step_speed.make_model(config, seed=0, dtype=torch.float32, device="cpu")
    current = step_points.at_step(model, StepPoint("Dream", 1, 64, 8))
    step, restore, _ = step_replay.repeatable(current)
    step_replay.check_overlapping(current, step, restore)

    def with_a_race():
        step()
        current.cache.v[0][current.active] *= 1 + 1e-6

    for faulty in (lambda: None, with_a_race):
        with pytest.raises(RuntimeError, match="with PDL a step leaves something else"):
            step_replay.check_overlapping(current, faulty, restore)


@pytest.mark.parametrize("case", [("LLaDA", 1, 300, "Decode(8)"), ("Dream", 3, 600, "Decode(8)")], ids=str)
def test_no_row_of_a_run_is_wasted(case):
    row = step_counts.count_run(*case)
    assert 0 < row["rows_needed_full"] <= row["rows_computed_full"] <= 1.06 * row["rows_needed_full"]
    assert 0 < row["rows_needed_cached"] <= row["rows_computed_cached"] <= 1.1 * row["rows_needed_cached"]
    assert 2 <= row["graphs"] <= 16
