"""The benchmarks measure what they say: counts, checks that can fail, the form of the results, budgets."""

import contextlib
import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import attn_speed  # noqa: E402
import common  # noqa: E402
import generate_speed  # noqa: E402
import gpu_report  # noqa: E402
import plots  # noqa: E402
import providers  # noqa: E402
import step_speed  # noqa: E402
import warm  # noqa: E402
from providers import Canvas, Case, Point  # noqa: E402

# the steps of each stage, and the files that they leave beside the report
REHEARSED = {
    "first": ("environment", "warm", "smoke", "steps", "tests"),
    "second": ("environment", "warm", "products", "attention", "generation"),
    "third": ("tests", "memcheck", "racecheck"),
}
FILES = {
    "first": {"triton.tgz", "steps.jsonl", "tests-first.xml"},
    "second": {
        "products.json",
        *(f"{name}_speed_points.{kind}" for name in ("attn", "generate") for kind in ("json", "csv")),
    },
    "third": {"tests-third.xml"},
}
TINY = "LLaDA-8B:1:48:4,Dream-7B:3:48:5:ragged"
ROW_KEYS = {"model", "batch", "seqlen", "active", "provider", "ms", "gbps", "tflops", "fraction_of_ceiling"}


def make_case(model, batch, seqlen, active, ragged=False, device="cpu"):
    point = Point(model, batch, seqlen, active, ragged)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return Case(Canvas(point, sets=2, device=device, dtype=dtype), point)


def error_of(provider, case):
    restore = case.poison()
    error = providers.relative_error(provider.unpack(provider.run(0)), *case.oracle())
    restore()
    return error


def run_python(*arguments, cwd=ROOT, timeout=100):
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


# ---- counts


def test_counts_by_hand():
    # one row, 10 keys, 2 queries; K and V 2 * 32 * 128 = 8192 numbers a position, q and the output 4096 each
    llada = Point("LLaDA-8B", 1, 10, 2)
    assert providers.necessary_bytes(llada, 4) == 4 * (10 * 8192 + 2 * 8192 + 2 * 4096 + 2 * 4096)
    assert providers.necessary_bytes(llada, 4, attention_alone=True) == 4 * (10 * 8192 + 2 * 2 * 4096)
    assert providers.necessary_flops(llada) == 2 * (2 * 10 * 128 + 2 * 10 * 128) * 32
    assert providers.full_recompute_flops(llada) == 5 * providers.necessary_flops(llada)
    # 4 K/V heads: 1024 numbers a position; 28 query heads: 3584
    dream = Point("Dream-7B", 3, 16, 4)
    assert providers.necessary_bytes(dream, 2) == 2 * 3 * (16 * 1024 + 4 * 1024 + 2 * 4 * 3584)
    assert providers.necessary_flops(dream) == 3 * 4 * 4 * 16 * 3584


def test_ragged_rows_by_hand():
    point = Point("Dream-7B", 4, 16, 2, ragged=True)
    assert point.lengths == [4, 8, 12, 16]
    assert point.leftpads == [0, 8, 0, 0]
    assert sorted(point.counts) == [1, 2, 3, 4]
    assert providers.necessary_bytes(point, 2) == 2 * (40 * 1024 + 10 * 1024 + 2 * 10 * 3584)
    pairs = sum(a * n for a, n in zip(point.counts, (4, 8, 12, 16), strict=True))
    assert providers.necessary_flops(point) == 4 * pairs * 3584
    # no more active positions than keys
    assert max(Point("Dream-7B", 4, 16, 16, ragged=True).counts) <= 16


def test_summary_by_hand():
    def rows(ours, cheap, authors):
        families = {"ours": ours, "cheap fix": cheap, "authors' way": authors}
        return [{"family": family, "ms": ms} for family, ms in families.items()]

    few, many = Point("LLaDA-8B", 1, 512, 1), Point("LLaDA-8B", 1, 512, 256)
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
    math = providers.sdpa(case.canvas.model, torch.nn.attention.SDPBackend.MATH)
    contestants = [
        providers.ours(case),
        *providers.rivals(case, with_full=True),
        providers.cheap_fix(case, math, "our write", fused=True),
        providers.full_recompute(case, math, "our RoPE", fused=True),
        providers.full_recompute(case, providers.sdpa(case.canvas.model, repeat=True), "repeated heads"),
    ]
    assert {"ours", "cheap fix", "full recompute"} <= {provider.family for provider in contestants}
    for provider in contestants:
        try:
            error = error_of(provider, case)
        except RuntimeError:
            assert device == "cuda" and provider.family != "ours", "only a GPU backend may refuse a shape"
            continue
        assert error <= providers.TOLERANCES[case.canvas.dtype], provider.name
    alone = providers.ours_attention_alone(case)
    assert providers.relative_error(alone.run(0), *case.oracle()) <= providers.TOLERANCES[case.canvas.dtype]


ours = providers.ours


def without_cache_write(case):
    right = ours(case)
    return dataclasses.replace(right, run=providers.ours_attention_alone(case).run)


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
    assert not error_of(broken(case), case) <= providers.TOLERANCES[torch.float32]


def test_a_broken_provider_is_not_timed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(providers, "ours", without_cache_write)
    arguments = ["--points", TINY, "--no-lint", "--no-plot", "--budget", "20", "--out", str(tmp_path)]
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
    bench = attn_speed.Bench(attn_speed.CPU, None, None, seconds_per_point=0)
    bench.on_gpu, given = True, []

    def timer(run, sets, pool):
        given.append(pool)
        if len(given) in (1, 2, 4):
            raise RuntimeError("no kernel")
        return common.HostTimer(run, sets)

    monkeypatch.setattr(bench, "timer", timer)
    case = make_case("LLaDA-8B", 1, 48, 4)
    timers = bench.checked_timers(case, [providers.ours(case)] * 5)
    # of the fourth the third one's graphs are left
    assert given == [0, 1, 2, 2, 2] and len(timers) == 2


# ---- timing


def test_an_error_at_one_point_keeps_the_others(monkeypatch, tmp_path):
    rivals = providers.rivals

    def broken(case, **options):
        if case.point.active == 4:
            raise ZeroDivisionError("no mask for that")
        return rivals(case, **options)

    monkeypatch.setattr(providers, "rivals", broken)
    points = "LLaDA-8B:1:32:4,LLaDA-8B:1:32:8"
    arguments = ["--points", points, "--budget", "30", "--no-lint", "--no-plot", "--out", str(tmp_path)]
    assert attn_speed.main(arguments) == 1
    result = json.loads((tmp_path / "attn_speed_points.json").read_text())
    assert {row["active"] for row in result["rows"]} == {8}
    (refused,) = result["refused"]
    assert refused["reason"] == "ZeroDivisionError: no mask for that"
    assert refused["point"] == str(Point("LLaDA-8B", 1, 32, 4, False))


def test_interleaved_samples_are_bounded_and_spread():
    class Timer:
        def __init__(self, name, cost):
            self.name, self.cost = name, cost

        def tick(self):
            order.append(self.name)

    order = []
    common.interleave([Timer("fast", 1e-3), Timer("slow", 1.0)], seconds=0.1, least=5, most=20)
    assert order.count("fast") == 20 and order.count("slow") == 5
    first, last = order.index("slow"), len(order) - 1 - order[::-1].index("slow")
    assert first < 8 and last > 15


@pytest.mark.parametrize(
    "call_ms, sets, calls", [(0.02, 1, 50), (0.02, 3, 51), (1e-4, 1, 64), (5.0, 1, 1), (5.0, 4, 4), (0.02, 100, 100)]
)
def test_a_graph_holds_a_millisecond_of_calls(monkeypatch, call_ms, sets, calls):
    """The stand-in for CUDA counts the calls that the graph in use recorded."""
    current = {"recorded": 0, "clock": 0.0}

    class Graph:
        users = {}  # of a pool, as PyTorch counts them

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
        "CUDAGraph": Graph,
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
    options = ("--points", TINY, "--no-lint", "--budget", "20", "--out", tmp_path / "out")
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


def test_a_run_as_a_module_without_budget_says_what_was_not_run(tmp_path):
    options = ("--points", TINY, "--no-lint", "--no-plot", "--budget", "0.001", "--out", tmp_path)
    run = run_python("-m", "benchmarks.attn_speed", *options)
    result = json.loads(run.stdout.splitlines()[-1])
    assert run.returncode == 1
    assert len(result["not_run"]) == 2 and result["rows"] == []
    assert "the budget was used up" in run.stdout


def test_a_stopped_run_keeps_what_it_has(tmp_path):
    points = ",".join(["LLaDA-8B:1:48:4", *(f"Dream-7B:1:128:{active}" for active in range(1, 128))])
    command = [sys.executable, "benchmarks/attn_speed.py", "--no-lint", "--no-plot", "--out", str(tmp_path)]
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
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads((tmp_path / "attn_speed_points.json").read_text())
    assert result["impl"] == "triton" and not result["refused"]
    for batch in (2, 3):
        rows = {row["provider"]: row for row in result["rows"] if row["batch"] == batch}
        assert rows["ours"]["attention_ms"] < rows["ours"]["ms"]
        assert {"cheap fix", "authors' way", "cheap fix, our write + efficient"} < rows.keys()


def test_bad_points_are_refused(capsys):
    for text in ("GPT:1:48:4", "LLaDA-8B:1:48:4:ragged"):
        with pytest.raises(SystemExit):
            attn_speed.parse_arguments(["--points", text])
        assert "MODEL:BATCH:LENGTH:ACTIVE" in capsys.readouterr().err


def test_the_grids_are_what_they_say():
    points = [point for group in attn_speed.points_of(attn_speed.GPU, providers.MODELS) for point in group]
    assert {p.batch for p in points} == {1, 4, 8, 32}
    assert {p.seqlen for p in points} == {512, 1024, 2048, 4096, 8192}
    assert {1, 8, 32, 64, 128, 256} <= {p.active for p in points}
    assert any(p.ragged for p in points) and any(p.active == p.seqlen for p in points)
    assert len(set(points)) == len(points)
    assert set(attn_speed.GPU.flex) <= {(p.batch, p.seqlen, p.active) for p in points}


def test_without_the_bench_extra_there_are_messages(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert list(common.progress([1, 2], "points")) == [1, 2]
    common.say("a line")
    assert plots.attention([{}], {}, tmp_path / "x.png") is None
    captured = capsys.readouterr()
    assert captured.out == "a line\n"
    assert "tqdm is not installed" in captured.err and "matplotlib is not installed" in captured.err


# ---- steps


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


# ---- report


def python(code):
    return (sys.executable, "-c", code)


def test_the_report_keeps_to_its_limits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_report, "LEAST_SECONDS", 0.2)
    monkeypatch.setattr(gpu_report, "GRACE_SECONDS", 0.5)
    steps = [
        gpu_report.Step("good", 20, python("print('x' * 1000); print('fine')")),
        gpu_report.Step("bad", 20, python("raise SystemExit(7)")),
        gpu_report.Step("known", 20, python("raise SystemExit(5)"), statuses={5: "not run: nothing to do"}),
        gpu_report.Step("missing", 20, (), unavailable="the tool is not installed"),
        gpu_report.Step("late", -1000, python("print('never')")),
        gpu_report.Step("too little", 2000, python("print('never')"), least=3000),
    ]
    report = {"stage": "first", "steps": []}
    gpu_report.run_steps(steps, report, tmp_path)
    status = {step["step"]: step["status"] for step in report["steps"]}
    assert status["good"] == "passed"
    assert status["bad"] == "failed: exit status 7"
    assert status["known"] == "not run: nothing to do"
    assert status["missing"] == "not run: the tool is not installed"
    assert status["late"].startswith("not run: -") and status["too little"].startswith("not run: ")
    limits = {step["step"]: step["limit_seconds"] for step in report["steps"]}
    assert limits["good"] == 20 and limits["bad"] > 30, "what is left over is the next one's"
    output = {step["step"]: step["output"] for step in report["steps"]}
    assert output["good"].splitlines()[-1] == "fine" and len(output["good"]) < 600
    assert json.loads((tmp_path / "report-first.json").read_text()) == report
    log = (tmp_path / "report-first.log").read_text()
    assert "==== late" in log and "x" * 1000 in log
    assert "late" in capsys.readouterr().out


def test_a_step_that_does_not_end_is_ended(tmp_path, monkeypatch):
    """With its children; what it wrote is kept."""
    monkeypatch.setattr(gpu_report, "LEAST_SECONDS", 0)
    monkeypatch.setattr(gpu_report, "GRACE_SECONDS", 0.5)
    sleeping = f"import subprocess; open({str(tmp_path / 'began')!r}, 'w'); subprocess.run(['sleep', '600'])"
    waits, wait = [], subprocess.Popen.wait

    def wait_until_begun(process, timeout=None):
        while not waits and not (tmp_path / "began").exists():
            time.sleep(0.01)
        waits.append(timeout)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_until_begun)
    with (tmp_path / "report-first.log").open("w+") as log:
        record = gpu_report.run_step(gpu_report.Step("endless", 0.3, python(sleeping)), 0.3, log)
    assert record["status"].startswith("timed out after 0 s") and 0.3 <= record["seconds"]


def test_what_a_step_prints_is_written_as_it_comes(tmp_path, monkeypatch):
    """Before the step ends: the last one may be cut off by whoever runs the report."""
    reading = f"print('first', flush=True); print('seen' if 'first' in open({str(tmp_path / 'report-first.log')!r}).read() else '')"
    report = {"stage": "first", "steps": []}
    gpu_report.run_steps([gpu_report.Step("reader", 60, python(reading))], report, tmp_path)
    assert report["steps"][0]["output"].splitlines() == ["first", "seen"]


@pytest.mark.rehearsal
@pytest.mark.parametrize("stage, names", REHEARSED.items())
def test_every_stage_can_be_rehearsed(stage, names, tmp_path):
    run = run_python(
        "benchmarks/gpu_report.py", "--stage", stage, "--rehearse", "--commit", "abc", "--out", tmp_path, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / f"report-{stage}.json").read_text())
    assert report["rehearsal"] is True and report["stage"] == stage and report["commit"] == "abc"
    assert [(step["step"], step["status"]) for step in report["steps"]] == [(name, "passed") for name in names]
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {f"report-{stage}.json", f"report-{stage}.log", *FILES[stage]} and len(files) <= 8


@mock.patch.dict(os.environ)
def test_the_report_needs_a_gpu_and_a_commit(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_report.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    monkeypatch.setattr(common, "output_of", lambda *command, **options: "unknown")
    assert gpu_report.main(["--rehearse"]) == 2
    assert "--commit" in capsys.readouterr().err


@mock.patch.dict(os.environ)
def test_other_peoples_code_in_the_report(tmp_path, monkeypatch, capsys):
    """The peers reach generate_speed as they were given; a wrong one is noticed before anything runs."""
    taken = []
    monkeypatch.setattr(gpu_report, "run_steps", lambda todo, *rest: taken.extend(todo))
    peers = ["--peer", f"official={tmp_path}", "--peer", f"dkv-cache={tmp_path}", "--peer-python", "official=python3"]
    stage = ["--rehearse", "--stage", "second", "--out", str(tmp_path / "out")]
    assert gpu_report.main([*stage, *peers]) == 0
    (command,) = (step.command for step in taken if step.name == "generation")
    found = generate_speed.parse_arguments([part for part in command[2:] if part != "{seconds}" and part != "--budget"])
    folder = str(tmp_path)
    assert found.peers == [("official", folder, "python3"), ("dkv-cache", folder, sys.executable)]
    with pytest.raises(SystemExit):
        gpu_report.main(["--rehearse", "--peer", "official=/nowhere"])
    assert "--peer must be NAME=FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize("stage", gpu_report.STAGES)
def test_the_steps_of_a_gpu(stage, monkeypatch, tmp_path):
    """They are those that are rehearsed, of files that exist, and their options are understood."""
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name: None)
    steps, rehearsed = (gpu_report.steps(stage, tmp_path, rehearse=rehearse) for rehearse in (False, True))
    assert [step.name for step in steps] == [step.name for step in rehearsed]
    assert sum(step.seconds for step in steps) <= 340
    for step in steps:
        assert bool(step.unavailable) == (step.name in ("memcheck", "racecheck"))
        # importing PyTorch under a sanitizer alone takes half a minute
        assert step.least == (step.seconds if step.unavailable else 0) and (not step.unavailable or step.least >= 120)
        files = [Path(part) for part in step.command if part.endswith(".py")]
        assert files and all((ROOT / file).exists() for file in files)
        cpu_only = {
            "test_benchmarks.py",
            "test_generation_speed.py",
            "test_quality.py",
            "test_models.py",
            "test_oracle.py",
        }
        assert not cpu_only & {file.name for file in files}
    parsers = {"attn_speed.py": attn_speed.parse_arguments, "generate_speed.py": generate_speed.parse_arguments}
    parsers |= {"warm.py": warm.parse_arguments}
    for step in steps:
        parse = parsers.get(Path(step.command[1]).name)
        if parse:
            parse([part.replace("{seconds}", "10") for part in step.command[2:]])


def test_what_needs_a_gpu_is_in_a_stage():
    """But for the test of a benchmark, which the stages run."""
    by_file = {path.stem.removeprefix("test_"): path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    marked = {name for name, text in by_file.items() if "\n@pytest.mark.gpu\n" in text}
    assert "graphs" in marked and marked - {*gpu_report.KERNEL_TESTS, *gpu_report.ENGINE_TESTS} == {
        "benchmarks",
        "models",
    }
    file, test = gpu_report.LOADING_TEST.removeprefix("tests/test_").split(".py::")
    assert by_file[file].count("@pytest.mark.gpu") == 1 and f"@pytest.mark.gpu\ndef {test}(" in by_file[file]
    sanitized = {name for name, text in by_file.items() if "\n@pytest.mark.sanitizer\n" in text}
    assert sanitized <= set(gpu_report.KERNEL_TESTS)


@pytest.mark.rehearsal
def test_a_worker_that_met_a_cuda_error_is_replaced(tmp_path):
    """The tests behind the one that failed run in a process of their own."""
    (tmp_path / "conftest.py").write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('ours', {str(ROOT / 'tests' / 'conftest.py')!r})\n"
        "ours = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(ours)\n"
        "pytest_runtest_logreport = ours.pytest_runtest_logreport\n"
    )
    (tmp_path / "test_gpu.py").write_text(
        "broken = False\n"
        "def test_error():\n"
        "    global broken\n"
        "    broken = True\n"
        "    raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_behind():\n"
        "    assert not broken\n"
    )
    run = run_python("-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", "--junitxml=found.xml", cwd=tmp_path)
    assert "1 passed" in run.stdout and "CUDA error: an illegal memory access" in run.stdout, run.stdout
    assert "test_error" in (tmp_path / "found.xml").read_text()
    alone = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", cwd=tmp_path)
    assert "CUDA is unusable after test_gpu.py::test_error" in alone.stdout and "passed" not in alone.stdout
