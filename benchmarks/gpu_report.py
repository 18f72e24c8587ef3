"""Runs GPU tests and benchmarks in stages of a few minutes, with the Python at hand; installs and downloads nothing.

    python benchmarks/gpu_report.py --stage first [--out DIR]     the same as `make gpu-report STAGE=first`
    ... --peer official=FOLDER --peer dkv-cache=FOLDER --peer-python PYTHON
                                                                  other people's code too, in the second stage, as in
                                                                  generate_speed.py

    first     does it run, is it right, how long is a step: compiles, tests each kernel once, times single steps, then
              tests the kernels
    second    how fast is it beside others: the library's products, attention, whole generations
    third     is the rest right: tests of the engine, then the sanitizers
    sweep     which launches of our own products are the fastest, and when they beat the library: its
              fused_products.json is a candidate for kernels/fused_products.json on such a GPU

Every step of a stage has a limit of seconds, and gets the unused time of the steps before it. Its output goes to
report-STAGE.log as it comes, its record to report-STAGE.json when it ends. A step that did not finish "timed out", and
what it wrote until then is kept. A stage writes at most eight files to DIR (by default benchmarks/results/<device>).

Compiled kernels are in .triton in the checkout. The first stage packs them into triton.tgz. Every stage but the third
begins with .warm/triton.tgz, if there is one. Where there is no git repository, --commit names the commit.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import common
from benchmarks.harness.systems import add_peers

STAGES = ("first", "second", "third", "sweep")
KERNEL_TESTS = ("attention", "lm_head", "rope_cache", "norm_activation", "products", "commit", "packing", "bookkeeping")
SANITIZED_TESTS = (*KERNEL_TESTS, "bounds")
ENGINE_TESTS = ("cuda_graphs", "run", "layers", "patch", "generation", "policy", "minimal", "operators")
# the one test that needs a GPU in a file of tests for the CPU
LOADING_TEST = "tests/test_models.py::test_loading_to_a_gpu_holds_the_weights_once"
PRODUCT_ROWS = "16,32,64,128,256,512"
ATTENTION_POINTS = (
    "LLaDA-8B:1:1024:32,LLaDA-8B:8:2048:32,Dream-7B:1:2048:32,Dream-7B:8:2048:32,LLaDA-8B:1:256:32,LLaDA-8B:8:1024:32,"
    "LLaDA-8B:1:2048:1,LLaDA-8B:8:2048:128,LLaDA-8B:8:2048:all,Dream-7B:8:2048:all,LLaDA-8B:8:2048:32:ragged,"
    "Dream-7B:8:2048:32:ragged"
)
GENERATION_POINTS, LABELS = "LLaDA:1:128:128,LLaDA:8:512:64,Dream:1:128:128", "NoCache,Decode,DualCache"
# for a program with a budget of its own
BUDGET = ("--budget", "{seconds}")
TAIL_LINES = 60
# no step starts with less
MIN_SECONDS = 5
# for writing results after the signal to stop
GRACE_SECONDS = 12


@dataclass(frozen=True)
class StageStep:
    """A command with a limit of seconds.

    Attributes:
        command: "{seconds}" in it becomes the budget for a program that has one.
        statuses: meanings of exit statuses.
        min_seconds: the step does not start with less.
        unavailable: why it cannot run, if it cannot.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    statuses: dict[int, str] = field(default_factory=dict)
    min_seconds: float = 0
    unavailable: str = ""


def steps(stage: str, out: Path, peers: list[str] = (), *, rehearse: bool = False) -> list[StageStep]:
    """The steps of a stage.

    Args:
        peers: arguments for generate_speed.py.
        rehearse: the same steps with little to do, which a CPU finishes in seconds.
    """
    environment = StageStep("environment", 40, script("gpu_report.py", "--environment"))
    jobs = ("--steps", "--attention", ATTENTION_POINTS, "--generation", GENERATION_POINTS, "--policies", LABELS)
    unpack = ("--unpack", common.ROOT / ".warm" / "triton.tgz", *(("--limit", "1") if rehearse else ()))
    warm = script("warm.py", *jobs, *unpack)
    if stage == "first":
        timed = (*BUDGET, "--out", out / "steps.jsonl", *(("--points", "Dream:1:64:8") if rehearse else ()))
        return [
            environment,
            StageStep("warm", 55, (*warm, "--pack", str(out / "triton.tgz"))),
            StageStep("smoke", 40, tests(KERNEL_TESTS, "-x", "-m", "sanitizer", *some(rehearse))),
            StageStep("steps", 95, script("step_speed.py", "--profile", *timed)),
            StageStep("tests", 85, tests(KERNEL_TESTS, *workers(out, stage), *some(rehearse))),
        ]
    if stage == "second":
        products = ("--budget", "0", "--rows", "1") if rehearse else (*BUDGET, "--rows", PRODUCT_ROWS)
        products = ("--library", *products, "--out", out / "products.jsonl")
        attention = "LLaDA-8B:1:64:8" if rehearse else ATTENTION_POINTS
        points, labels = ("Dream:1:16:8", "Decode") if rehearse else (GENERATION_POINTS, LABELS)
        generation = ("--points", points, "--policies", labels, "--once", *peers)
        written = ("--no-plot", "--out", out)
        return [
            environment,
            StageStep("warm", 20, warm),
            StageStep("products", 45, script("product_sweep.py", *products)),
            StageStep("attention", 80, script("attn_speed.py", *BUDGET, "--points", attention, *written)),
            StageStep("generation", 100, script("generate_speed.py", *BUDGET, *generation, *written)),
        ]
    if stage == "sweep":
        rows = ("1",) if rehearse else ()
        swept = (*(("--rows", *rows) if rows else ()), "--out", out / "sweep.jsonl")
        return [
            environment,
            StageStep("warm", 90, script("warm.py", "--sweep", *rows, *unpack)),
            StageStep("sweep", 80, script("product_sweep.py", *BUDGET, *swept, "--table", out / "fused_products.json")),
        ]
    return [
        StageStep("tests", 100, tests(ENGINE_TESTS, *workers(out, stage), *some(rehearse), LOADING_TEST)),
        sanitizer("memcheck", 120, SANITIZED_TESTS, rehearse),
        sanitizer("racecheck", 120, ("commit", "packing", "bookkeeping"), rehearse),
    ]


def script(name: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, str(common.ROOT / "benchmarks" / name), *map(str, arguments))


def tests(names: tuple[str, ...], *options: str) -> tuple[str, ...]:
    """pytest on some test files; a test that hangs ends after a minute."""
    timeout = ("--timeout", "60") if importlib.util.find_spec("pytest_timeout") else ()
    files = [f"tests/test_{name}.py" for name in names]
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *timeout, *options, *files)


def workers(out: Path, stage: str) -> tuple[str, ...]:
    """pytest's options for several processes, an XML report, and an early end if many tests fail."""
    parallel = ("-n", str(min(12, os.cpu_count())), "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    return (*parallel, "--maxfail", "40", "-rfE", f"--junitxml={out / f'tests-{stage}.xml'}")


def sanitizer(tool: str, seconds: float, names: tuple[str, ...], rehearse: bool) -> StageStep:
    """The tests marked `sanitizer` under compute-sanitizer, where importing PyTorch alone takes half a minute."""
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    prefix = (found or "compute-sanitizer", "--tool", tool, "--error-exitcode", "99")
    if tool == "memcheck":
        # PyTorch and Triton query functions that a driver may lack
        prefix += ("--report-api-errors", "no")
    return StageStep(
        tool,
        seconds,
        (*(() if rehearse else prefix), *tests(names, "-m", "sanitizer", *some(rehearse))),
        # the caching allocator would hide accesses outside a tensor
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        statuses={5: "not run: no test is marked sanitizer", 99: "failed: the sanitizer found errors"},
        min_seconds=0 if rehearse else seconds,
        unavailable="" if found or rehearse else "compute-sanitizer is not installed",
    )


def some(rehearse: bool) -> tuple[str, ...]:
    return ("-k", "small_run or two_runs or grad_mode") if rehearse else ()


def run_step(step: StageStep, seconds: float, log: TextIO) -> dict[str, Any]:
    """Runs one step for at most `seconds`, with its output in the file `log`; returns its record."""
    record = {"step": step.name, "status": "", "seconds": 0.0, "limit_seconds": round(seconds, 1), "output": ""}
    if step.unavailable:
        return record | {"status": f"not run: {step.unavailable}"}
    if seconds < max(step.min_seconds, MIN_SECONDS):
        return record | {"status": f"not run: {seconds:.0f} s are left"}
    # a program with a budget of its own gets less, so that it ends by itself
    command = [part.replace("{seconds}", str(int(max(1, 0.85 * seconds - 5)))) for part in step.command]
    begin, start = time.monotonic(), log.seek(0, os.SEEK_END)
    process = subprocess.Popen(
        command,
        cwd=common.ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | step.env,
        # so that its children can be stopped too
        start_new_session=True,
    )
    try:
        code = process.wait(timeout=seconds)
        status = step.statuses.get(code, "passed" if code == 0 else f"failed: exit status {code}")
    except subprocess.TimeoutExpired:
        status = f"timed out after {seconds:.0f} s"
        stop(process)
    except KeyboardInterrupt:
        stop(process)
        raise
    log.seek(start)
    # the last line of a benchmark is one JSON object of all its rows, which a file holds too
    lines = [line if len(line) <= 500 else f"{line[:500]} ..." for line in log.read().splitlines()]
    output = "\n".join(lines[-TAIL_LINES:])
    return record | {"status": status, "seconds": round(time.monotonic() - begin, 1), "output": output}


def stop(process: subprocess.Popen) -> None:
    """Asks the process group to end, as Ctrl-C does (pytest sums up, a benchmark writes), then forces it."""
    for number, patience in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGTERM, 1), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=patience)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def run_steps(todo: list[StageStep], report: dict[str, Any], out: Path) -> None:
    """Runs the steps one by one, each with the unused seconds of those before; writes the report after each."""
    begin, spare = time.monotonic(), 0.0
    with (out / f"report-{report['stage']}.log").open("w+", errors="replace") as log:
        for step in todo:
            log.seek(0, os.SEEK_END)
            log.write(f"==== {step.name}\n")
            log.flush()
            record = run_step(step, step.seconds + spare, log)
            spare += step.seconds - record["seconds"]
            report["steps"].append(record)
            report["seconds"] = round(time.monotonic() - begin, 1)
            common.write_json(out / f"report-{report['stage']}.json", report)
            print(f"{step.name:18} {record['status']:45} {record['seconds']:6.1f} s", flush=True)
            for line in record["output"].splitlines()[-12:]:
                print(f"    {line}", flush=True)


def print_environment() -> None:
    """The first step: prints this machine's environment and ceilings."""
    env = common.environment()
    print(json.dumps(common.rounded(env), indent=1), flush=True)
    print(json.dumps(common.rounded(common.measure_ceilings()), indent=1))
    if torch.cuda.is_available():
        print(common.output_of("nvidia-smi", "-q", "--id=0", "-d", "CLOCK,POWER,TEMPERATURE,ECC"))


def main(argv: list[str] | None = None) -> int:
    parser = common.argument_parser(__doc__)
    parser.add_argument("--stage", choices=STAGES, default="first")
    parser.add_argument("--commit", help="the commit, where there is no git repository; or set GIT_COMMIT")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: the same steps, with little to do")
    parser.add_argument("--environment", action="store_true", help="only print the environment and the ceilings")
    add_peers(parser)
    common.add_folder(parser)
    arguments = parser.parse_args(argv)
    if arguments.commit:
        os.environ["GIT_COMMIT"] = arguments.commit
    if arguments.environment:
        print_environment()
        return 0
    if not (torch.cuda.is_available() or arguments.rehearse):
        print(
            "gpu_report needs a CUDA GPU and PyTorch built for it; `make test` and `make bench` run without one, and "
            "--rehearse runs the steps with little to do",
            file=sys.stderr,
        )
        return 2
    if common.commit() == "unknown":
        print("there is no git repository here: name the commit by --commit or GIT_COMMIT", file=sys.stderr)
        return 2
    out = common.results_folder(arguments.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRITON_CACHE_DIR", str(common.ROOT / ".triton"))
    # a worker would start a process per core for torch.compile
    os.environ |= {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    os.environ.pop("TRITON_INTERPRET", None)
    report = {"stage": arguments.stage, "rehearsal": arguments.rehearse, **common.environment()}
    report |= {"seconds": 0.0, "steps": []}
    peers = [f"--peer={name}={folder}" for name, folder in arguments.peer]
    peers += [f"--peer-python={path}" for path in arguments.peer_python]
    run_steps(steps(arguments.stage, out, peers, rehearse=arguments.rehearse), report, out)
    print(f"report: {out / f'report-{arguments.stage}.json'}")
    return 1 if any(step["status"].startswith("failed") for step in report["steps"]) else 0


if __name__ == "__main__":
    sys.exit(main())
