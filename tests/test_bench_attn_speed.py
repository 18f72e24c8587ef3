"""attn_speed measures what it says: counts, checks that can fail, samples, the form of the results, budgets."""

import contextlib
import csv
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from utils import run_python

from benchmarks import attn_speed
from benchmarks.harness import attention, common, plots
from benchmarks.harness.attention import AttentionPoint, Canvas, LayerCase

ROOT = Path(__file__).resolve().parent.parent

TINY = "LLaDA-8B:1:48:4,Dream-7B:3:48:5:ragged"
ROW_KEYS = {"model", "batch", "seqlen", "active", "provider", "ms", "gbps", "tflops", "fraction_of_ceiling"}


def make_case(model, batch, seqlen, active, ragged=False, device="cpu"):
    point = AttentionPoint(model, batch, seqlen, active, ragged)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return LayerCase(Canvas(point, sets=2, device=device, dtype=dtype), point)


def error_of(provider, case):
    restore = case.poison()
    error = attention.relative_error(provider.unpack(provider.run(0)), *case.oracle())
    restore()
    return error


# ---- counts


def test_counts_by_hand():
    # one row, 10 keys, 2 queries; K and V 2 * 32 * 128 = 8192 numbers a position, q and the output 4096 each
    llada = AttentionPoint("LLaDA-8B", 1, 10, 2)
    assert attention.necessary_bytes(llada, 4) == 4 * (10 * 8192 + 2 * 8192 + 2 * 4096 + 2 * 4096)
    assert attention.necessary_bytes(llada, 4, attention_alone=True) == 4 * (10 * 8192 + 2 * 2 * 4096)
    assert attention.necessary_flops(llada) == 2 * (2 * 10 * 128 + 2 * 10 * 128) * 32
    assert attention.full_recompute_flops(llada) == 5 * attention.necessary_flops(llada)
    # 4 K/V heads: 1024 numbers a position; 28 query heads: 3584
    dream = AttentionPoint("Dream-7B", 3, 16, 4)
    assert attention.necessary_bytes(dream, 2) == 2 * 3 * (16 * 1024 + 4 * 1024 + 2 * 4 * 3584)
    assert attention.necessary_flops(dream) == 3 * 4 * 4 * 16 * 3584


def test_ragged_rows_by_hand():
    point = AttentionPoint("Dream-7B", 4, 16, 2, ragged=True)
    assert point.lengths == [4, 8, 12, 16]
    assert point.leftpads == [0, 8, 0, 0]
    assert sorted(point.counts) == [1, 2, 3, 4]
    assert attention.necessary_bytes(point, 2) == 2 * (40 * 1024 + 10 * 1024 + 2 * 10 * 3584)
    pairs = sum(a * n for a, n in zip(point.counts, (4, 8, 12, 16), strict=True))
    assert attention.necessary_flops(point) == 4 * pairs * 3584
    # no more active positions than keys
    assert max(AttentionPoint("Dream-7B", 4, 16, 16, ragged=True).counts) <= 16


def test_summary_by_hand():
    def rows(ours, cheap, authors):
        families = {"ours": ours, "cheap fix": cheap, "authors' way": authors}
        return [{"family": family, "ms": ms} for family, ms in families.items()]

    few, many = AttentionPoint("LLaDA-8B", 1, 512, 1), AttentionPoint("LLaDA-8B", 1, 512, 256)
    summary = attn_speed.summarise([(few, rows(1.0, 2.0, 8.0)), (many, rows(1.0, 0.5, 2.0))])
    assert summary["active < length / 4"]["cheap fix"] == {"geomean": 2.0, "least": 2.0, "points": 1}
    assert summary["all points"]["best alternative"] == {"geomean": 1.0, "least": 0.5, "points": 2}
    assert summary["all points"]["authors' way"]["geomean"] == pytest.approx(4.0)
    assert summary["all points"]["full recompute"] == {"geomean": None, "least": None, "points": 0}


# ---- checks


SHAPES = [("LLaDA-8B", 1, 40, 3), ("Dream-7B", 2, 40, 5), ("LLaDA-8B", 3, 32, 4, True), ("Dream-7B", 2, 24, 24)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_provider_agrees_with_the_oracle(shape, device):
    case = make_case(*shape, device=device)
    math = attention.sdpa(case.canvas.model, torch.nn.attention.SDPBackend.MATH)
    contestants = [
        attention.ours(case),
        *attention.rivals(case, with_full=True),
        attention.cheap_fix(case, math, "our write", fused=True),
        attention.full_recompute(case, math, "our RoPE", fused=True),
        attention.full_recompute(case, attention.sdpa(case.canvas.model, repeat=True), "repeated heads"),
    ]
    assert {"ours", "cheap fix", "full recompute"} <= {provider.family for provider in contestants}
    for provider in contestants:
        try:
            error = error_of(provider, case)
        except RuntimeError:
            assert device == "cuda" and provider.family != "ours", "only a GPU backend may refuse a shape"
            continue
        assert error <= attention.TOLERANCES[case.canvas.dtype], provider.name
    alone = attention.ours(case, attention_alone=True)
    assert attention.relative_error(alone.run(0), *case.oracle()) <= attention.TOLERANCES[case.canvas.dtype]


ours = attention.ours


def without_cache_write(case):
    right = ours(case)
    return dataclasses.replace(right, run=ours(case, attention_alone=True).run)


def without_padding(case):
    case.canvas.seqlens = case.canvas.leftpad = None
    return ours(case)


def without_rotation(case):
    case.positions = torch.zeros_like(case.positions)
    return ours(case)


def with_one_query_missing(case):
    right = ours(case)

    def run(i):
        out = right.run(i)
        out[-1] = 0
        return out

    return dataclasses.replace(right, run=run)


BREAKS = [without_cache_write, without_padding, without_rotation, with_one_query_missing]


@pytest.mark.parametrize("broken", BREAKS, ids=lambda function: function.__name__)
def test_a_broken_provider_fails_the_check(broken):
    case = make_case("Dream-7B", 3, 32, 4, ragged=True)
    assert not error_of(broken(case), case) <= attention.TOLERANCES[torch.float32]


def test_a_broken_provider_is_not_timed(monkeypatch, capsys, tmp_path, standing_clock):
    monkeypatch.setattr(attention, "ours", without_cache_write)
    arguments = ["--points", TINY, "--no-plot", "--budget", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert attn_speed.main(arguments) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {entry["provider"] for entry in result["refused"]} == {"ours"}
    assert len(result["refused"]) == 2
    assert result["rows"] and not any(row["provider"] == "ours" for row in result["rows"])
    assert result["geomean_vs_best"] is None


def test_a_graph_that_fails_takes_no_pool_with_it(monkeypatch):
    """PyTorch takes a pool back for good once all of its graphs are gone, so the next one gets another."""
    pools = iter(range(9))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    bench = attn_speed.AttentionBench(attn_speed.CPU, None, None, seconds_per_point=0)
    bench.on_gpu, given = True, []

    def timer(run, sets, pool):
        given.append(pool)
        if len(given) in (1, 2, 4):
            raise RuntimeError("no kernel")
        return common.HostTimer(run, sets)

    monkeypatch.setattr(common, "make_timer", timer)
    case = make_case("LLaDA-8B", 1, 48, 4)
    timers = bench.checked_timers(case, [attention.ours(case)] * 5)
    # the fourth fails, but the pool keeps the graphs of the third
    assert given == [0, 1, 2, 2, 2] and len(timers) == 2


# ---- timing


def test_an_error_at_one_point_keeps_the_others(monkeypatch, tmp_path, standing_clock):
    rivals = attention.rivals

    def broken(case, **options):
        if case.point.active == 4:
            raise ZeroDivisionError("no mask for that")
        return rivals(case, **options)

    monkeypatch.setattr(attention, "rivals", broken)
    points = "LLaDA-8B:1:32:4,LLaDA-8B:1:32:8"
    arguments = ["--points", points, "--budget", "1", "--no-plot", "--out", str(tmp_path)]
    assert attn_speed.main(arguments) == 1
    result = json.loads((tmp_path / "attn_speed_points.json").read_text())
    assert {row["active"] for row in result["rows"]} == {8}
    (refused,) = result["refused"]
    assert refused["reason"] == "ZeroDivisionError: no mask for that"
    assert refused["point"] == str(AttentionPoint("LLaDA-8B", 1, 32, 4, False))


def test_interleaved_samples_are_bounded_and_spread(monkeypatch):
    """And fewer on a machine that turns out slower than expected."""
    now, passes = 0.0, 0.0

    class Timer:
        def __init__(self, name, cost):
            self.name, self.cost = name, cost

        def tick(self):
            nonlocal now
            now += passes
            order.append(self.name)

    monkeypatch.setattr(common, "time", SimpleNamespace(monotonic=lambda: now))
    order = []
    common.interleave([Timer("fast", 1e-3), Timer("slow", 1.0)], seconds=0.1, samples=(5, 20))
    assert order.count("fast") == 20 and order.count("slow") == 5
    first, last = order.index("slow"), len(order) - 1 - order[::-1].index("slow")
    assert first < 8 and last > 15
    order, passes = [], 1.0
    common.interleave([Timer("fast", 1e-3), Timer("slow", 1.0)], seconds=0.1, samples=(5, 20))
    assert 2 <= order.count("slow") < 5 and order.count("fast") < 20


@pytest.mark.parametrize(
    "call_ms, sets, calls", [(0.02, 1, 50), (0.02, 3, 51), (1e-4, 1, 64), (5.0, 1, 1), (5.0, 4, 4), (0.02, 100, 100)]
)
def test_a_graph_holds_a_millisecond_of_calls(monkeypatch, call_ms, sets, calls):
    """The stand-in for CUDA counts the calls that the graph in use recorded."""
    current = {"recorded": 0, "clock": 0.0}

    class CountedGraph:
        users = {}  # pool -> number of its graphs, as PyTorch counts them

        def capture_begin(self, pool, **options):
            assert self.users.get(pool, 1) > 0, "use_count > 0 INTERNAL ASSERT FAILED"
            self.pool, self.users[pool] = pool, self.users.get(pool, 0) + 1
            current["recorded"] = 0

        def __del__(self):
            self.users[self.pool] -= 1

        def capture_end(self):
            self.calls = current["recorded"]

        def replay(self):
            current["clock"] += self.calls * call_ms

    class Event:
        def __init__(self, **options):
            self.time = None

        def record(self):
            self.time = current["clock"]

        def elapsed_time(self, end):
            return end.time - self.time

    stand_ins = {
        "CUDAGraph": CountedGraph,
        "Event": Event,
        "Stream": lambda *a, **k: mock.Mock(),
        "stream": lambda s: contextlib.nullcontext(),
    }
    stand_ins |= dict.fromkeys(("current_stream", "synchronize", "empty_cache"), mock.Mock())
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    used = []

    def run(i):
        current["recorded"] += 1
        used.append(i)
        return torch.zeros(1)

    timer = common.GraphTimer(run, sets, pool=(0, 1))
    assert timer.calls == timer.graph.calls == calls and used[-calls:] == [i % sets for i in range(calls)]
    timer.output()
    timer.tick()
    assert timer.milliseconds() == pytest.approx([call_ms]) and timer.cost == pytest.approx(calls * call_ms / 1e3)


def test_quantiles():
    assert common.quantiles([3.0]) == (3.0, 3.0, 3.0)
    assert common.quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)


# ---- runs


def check_result(result):
    for key in ("device", "impl", "torch", "triton", "commit"):
        assert isinstance(result[key], str) and result[key]
    assert result["device"].startswith("CPU") and result["impl"] == "reference (PyTorch)"
    assert result["geomean_vs_best"] > 0 and not result["refused"] and not result["not_run"]
    families = {"ours", "cheap fix", "authors' way", "full recompute"}
    for batch in (1, 3):
        rows = [row for row in result["rows"] if row["batch"] == batch]
        assert {row["provider"] for row in rows} == families
        best = min(row["ms"] for row in rows if row["provider"] != "ours")
        for row in rows:
            assert row.keys() >= ROW_KEYS | {"ratio_to_best"}
            assert row["ms"] > 0 and row["gbps"] > 0 and row["tflops"] > 0 and row["fraction_of_ceiling"] > 0
            assert row["ratio_to_best"] == pytest.approx(best / row["ms"], rel=1e-3)


def test_a_run_from_elsewhere_writes_everything(tmp_path):
    options = ("--points", TINY, "--budget", "1e6", "--out", tmp_path / "out")
    run = run_python(ROOT / "benchmarks" / "attn_speed.py", *options, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    check_result(json.loads(run.stdout.splitlines()[-1]))
    assert "nothing below is a GPU figure" in run.stdout

    stem = tmp_path / "out" / "attn_speed_points"
    record = json.loads(stem.with_suffix(".json").read_text())
    with stem.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(record["rows"]) == 8
    assert {row["device"] for row in rows} == {record["device"]}
    assert {row["impl"] for row in rows} == {"reference (PyTorch)", "PyTorch"}
    assert stem.with_suffix(".png").stat().st_size > 10_000


def test_without_budget_it_says_what_was_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(common.Clock, "left", -1.0)
    options = ("--points", TINY, "--no-plot", "--out", str(tmp_path))
    assert attn_speed.main(options) == 1
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])
    assert len(result["not_run"]) == 2 and result["rows"] == []
    assert "the budget was used up" in output


def test_a_stopped_run_keeps_what_it_has(tmp_path):
    """Started as a module."""
    points = ",".join(["LLaDA-8B:1:48:4", *(f"Dream-7B:1:128:{active}" for active in range(1, 128))])
    command = [sys.executable, "-m", "benchmarks.attn_speed", "--no-plot", "--budget", "1e6"]
    command += ["--out", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [*command, "--points", points], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("Dream-7B"):
                break
        process.send_signal(signal.SIGTERM)
        *_, last = process.stdout
    result = json.loads(last)
    assert result["rows"] and result["not_run"]
    assert (tmp_path / "attn_speed_points.json").exists()


@pytest.mark.gpu
def test_a_run_on_the_gpu(tmp_path):
    options = ("--points", "LLaDA-8B:2:256:8,Dream-7B:3:256:5:ragged", "--no-plot", "--out", str(tmp_path))
    command = [sys.executable, "benchmarks/attn_speed.py", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads((tmp_path / "attn_speed_points.json").read_text())
    assert result["impl"] == "triton" and not result["refused"]
    for batch in (2, 3):
        rows = {row["provider"]: row for row in result["rows"] if row["batch"] == batch}
        assert rows["ours"]["attention_ms"] < rows["ours"]["ms"]
        assert {"cheap fix", "authors' way", "cheap fix, our write + efficient"} < rows.keys()


def test_bad_points_are_refused(capsys):
    for text in ("GPT:1:48:4", "LLaDA-8B:1:48:4:ragged", "LLaDA-8B:1:48", "LLaDA-8B:1:48:0", "LLaDA-8B:1:48:49"):
        with pytest.raises(SystemExit):
            attn_speed.parse_arguments(["--points", text])
        assert "MODEL:BATCH:LENGTH:ACTIVE" in capsys.readouterr().err
    (full,) = attn_speed.parse_arguments(["--points", "Dream-7B:2:48:all:ragged"]).points
    assert full == AttentionPoint("Dream-7B", 2, 48, 48, ragged=True)


@pytest.mark.parametrize("grid", [attn_speed.GPU, attn_speed.GPU_QUICK, attn_speed.CPU, attn_speed.CPU_QUICK])
def test_no_point_of_a_grid_comes_twice(grid):
    """And the points of FlexAttention are among them: a full step is the first of its group."""
    groups = list(attn_speed.points_of(grid))
    points = [point for group in groups for point in group]
    assert len(set(points)) == len(points)
    assert set(grid.flex) <= {(p.batch, p.seqlen, p.active) for p in points}
    assert all(group[0].active == max(p.active for p in group) for group in groups)


def test_labels_of_the_picture_stay_inside_their_panels(monkeypatch, tmp_path):
    """Many points or a single one, lines far apart or on top of each other, also at the upper edge."""
    Text = pytest.importorskip("matplotlib.text").Text
    monkeypatch.setattr(plots, "save", lambda figure, path: figure)
    shapes = {"LLaDA-8B": [1, 8, 64, 2048], "Dream-7B": [32, 64], "single": [32]}
    rows = [
        {"model": model, "batch": 1, "seqlen": 2048, "ragged": False, "dtype": "float32", "family": family}
        | {"active": active, "ms": ms, "ms_p20": ms, "ms_p80": ms, "floor_ms": 1.0}
        for model, actives in shapes.items()
        for active in actives
        for i, family in enumerate(plots.STYLES)
        for ms in [{"LLaDA-8B": 1 + i * active, "Dream-7B": 1 + i / 1000, "single": 100 + i}[model]]
    ]
    figure = plots.attention(rows, {"device": "CPU: x", "date": "2026-11-25 21:32 UTC"}, tmp_path)
    figure.canvas.draw()
    for axis in figure.axes:
        assert len(axis.texts) == 1 + len(plots.STYLES)
        boxes = [Text.get_window_extent(text) for text in axis.texts]  # of an annotation without its arrow
        for box in boxes:
            assert axis.bbox.x0 < box.x0 and axis.bbox.y0 < box.y0 and box.x1 < axis.bbox.x1 and box.y1 < axis.bbox.y1
            first = axis.transData.transform((min(shapes[axis.get_title().split(",")[0]]), 1))
            assert box.x1 < first[0]
        boxes.sort(key=lambda box: box.y0)
        assert all(below.y1 < above.y0 + 2 for below, above in itertools.pairwise(boxes))


def test_without_matplotlib_there_is_a_message(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plots.attention([{}], {}, tmp_path / "x.png") is None
    assert "matplotlib is not installed" in capsys.readouterr().err
