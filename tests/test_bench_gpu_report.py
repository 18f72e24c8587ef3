"""gpu_report keeps to its limits, its stages can be rehearsed, and what needs a GPU is in one of them."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from utils import run_python

from benchmarks import attn_speed, generate_speed, gpu_report, warm
from benchmarks.harness import common

ROOT = Path(__file__).resolve().parent.parent

# the steps of each stage, and the files that they leave beside the report
REHEARSED = {
    "first": ("environment", "warm", "smoke", "steps", "tests"),
    "second": ("environment", "warm", "products", "attention", "generation"),
    "third": ("tests", "memcheck", "racecheck"),
    "sweep": ("environment", "warm", "sweep"),
}
FILES = {
    "first": {"triton.tgz", "steps.jsonl", "tests-first.xml"},
    "second": {
        "products.jsonl",
        *(f"{name}_speed_points.{kind}" for name in ("attn", "generate") for kind in ("json", "csv")),
    },
    "third": {"tests-third.xml"},
    "sweep": {"fused_products.json", "sweep.jsonl"},
}


def python(code):
    return (sys.executable, "-c", code)


def test_the_report_keeps_to_its_limits(tmp_path, monkeypatch, capsys):
    # every look at the clock is a second later; the limits of processes are real, and far away
    monkeypatch.setattr(gpu_report, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    steps = [
        gpu_report.StageStep("good", 1000, python("print('x' * 1000); print('fine')")),
        gpu_report.StageStep("bad", 1000, python("raise SystemExit(7)")),
        gpu_report.StageStep("known", 1000, python("raise SystemExit(5)"), statuses={5: "not run: nothing to do"}),
        gpu_report.StageStep("missing", 1000, (), unavailable="the tool is not installed"),
        gpu_report.StageStep("late", -3993, python("print('never')")),
        gpu_report.StageStep("too little", 2000, python("print('never')"), min_seconds=2005),
    ]
    report = {"stage": "first", "steps": []}
    gpu_report.run_steps(steps, report, tmp_path)
    status = {step["step"]: step["status"] for step in report["steps"]}
    assert status["good"] == "passed"
    assert status["bad"] == "failed: exit status 7"
    assert status["known"] == "not run: nothing to do"
    assert status["missing"] == "not run: the tool is not installed"
    limits = {step["step"]: step["limit_seconds"] for step in report["steps"]}
    assert [limits[name] for name in ("good", "bad", "known", "missing")] == [1000, 1999, 2998, 3997]
    # three steps took a second each
    assert limits["late"] == 4 and status["late"] == "not run: 4 s are left"
    assert limits["too little"] == 2004 and status["too little"] == "not run: 2004 s are left"
    output = {step["step"]: step["output"] for step in report["steps"]}
    assert output["good"].splitlines()[-1] == "fine" and len(output["good"]) < 600
    assert json.loads((tmp_path / "report-first.json").read_text()) == report
    log = (tmp_path / "report-first.log").read_text()
    assert "==== late" in log and "x" * 1000 in log
    assert "late" in capsys.readouterr().out


def test_a_step_that_does_not_end_is_ended(tmp_path, monkeypatch):
    """With its children; what it wrote is kept."""
    monkeypatch.setattr(gpu_report, "MIN_SECONDS", 0)
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
        record = gpu_report.run_step(gpu_report.StageStep("endless", 0.3, python(sleeping)), 0.3, log)
    assert record["status"].startswith("timed out after 0 s") and 0.3 <= record["seconds"]


def test_what_a_step_prints_is_written_as_it_comes(tmp_path, monkeypatch):
    """Before the step ends: the last one may be cut off by whoever runs the report."""
    reading = f"print('first', flush=True); print('seen' if 'first' in open({str(tmp_path / 'report-first.log')!r}).read() else '')"
    report = {"stage": "first", "steps": []}
    gpu_report.run_steps([gpu_report.StageStep("reader", 600, python(reading))], report, tmp_path)
    assert report["steps"][0]["output"].splitlines() == ["first", "seen"]


@pytest.mark.rehearsal
@pytest.mark.parametrize("stage, names", REHEARSED.items())
def test_every_stage_can_be_rehearsed(stage, names, tmp_path):
    run = run_python("benchmarks/gpu_report.py", "--stage", stage, "--rehearse", "--commit", "abc", "--out", tmp_path)
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
    assert "--peer: must be NAME=FOLDER" in capsys.readouterr().err


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
        assert step.min_seconds == (step.seconds if step.unavailable else 0) and (
            not step.unavailable or step.min_seconds >= 120
        )
        files = [Path(part) for part in step.command if part.endswith(".py")]
        assert files and all((ROOT / file).exists() for file in files)
        names = {file.stem for file in files}
        assert not {name for name in names if name.startswith("test_bench_")} | names & {"test_models", "test_oracle"}
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
    assert "cuda_graphs" in marked and marked - {*gpu_report.KERNEL_TESTS, *gpu_report.ENGINE_TESTS} == {
        "bench_attn_speed",
        "models",
    }
    file, test = gpu_report.LOADING_TEST.removeprefix("tests/test_").split(".py::")
    assert by_file[file].count("@pytest.mark.gpu") == 1 and f"@pytest.mark.gpu\ndef {test}(" in by_file[file]
    sanitized = {name for name, text in by_file.items() if "\n@pytest.mark.sanitizer\n" in text}
    assert sanitized == set(gpu_report.SANITIZED_TESTS)


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
