"""GPU tests and benchmarks in stages of a few minutes, with the Python at hand: nothing is installed or downloaded.

    python benchmarks/gpu_report.py --stage first [--out DIR]     what `make gpu-report STAGE=first` runs
    ... --peer official=FOLDER --peer dkv-cache=FOLDER --peer-python PYTHON
                                                                  in the second stage other people's code too, as in
                                                                  generate_speed.py

    first     does it run, is it right, how long is a step: compiles, tests each kernel once, times single steps, then
              tests the kernels
    second    how fast is it beside others: matrix products, attention, whole generations
    third     is the rest right: tests of the engine, then the sanitizers
    sweep     which launches of our own products are the fastest, and from where on they beat the library's: its
              fused_products.json is what kernels/fused_products.json should be on such a GPU

Every step of a stage has a limit of seconds, and gets besides what the steps before it left over. Its output goes to
report-STAGE.log as it comes, its record to report-STAGE.json when it ends; what did not finish "timed out", and what it
wrote until then is kept. A stage writes at most eight files to DIR (benchmarks/results/<device> unless given), as many
as are easy to carry.

Compiled kernels lie in .triton in the checkout. The first stage packs them into triton.tgz; the others begin with
.warm/triton.tgz, if there is one. Where there is no git repository, --commit says what is run.
"""

import argparse
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

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import common  # noqa: E402
import generate_speed  # noqa: E402
import torch  # noqa: E402
from peer import PEERS  # noqa: E402

STAGES = ("first", "second", "third", "sweep")
KERNEL_TESTS = ("attention", "lm_head", "rope_cache", "norm_activation", "products", "commit", "packing", "bookkeeping")
SANITIZED_TESTS = (*KERNEL_TESTS, "bounds")
ENGINE_TESTS = ("graphs", "run", "fused", "patch", "generate", "minimal", "operators")
# the one test of a file for the CPU that needs a GPU
LOADING_TEST = "tests/test_models.py::test_loading_to_a_gpu_holds_the_weights_once"
PRODUCT_ROWS = "16,32,64,128,256,512"
ATTENTION_POINTS = (
    "LLaDA-8B:1:1024:32,LLaDA-8B:8:2048:32,Dream-7B:1:2048:32,Dream-7B:8:2048:32,LLaDA-8B:1:256:32,LLaDA-8B:8:1024:32,"
    "LLaDA-8B:1:2048:1,LLaDA-8B:8:2048:128,LLaDA-8B:8:2048:all,Dream-7B:8:2048:all,LLaDA-8B:8:2048:32:ragged,"
    "Dream-7B:8:2048:32:ragged"
)
GENERATION_POINTS, LABELS = "LLaDA:1:128:128,LLaDA:8:512:64,Dream:1:128:128", "NoCache,Decode,DualCache"
TAIL_LINES = 60
# no step is started with less than this
LEAST_SECONDS = 5
# after the signal to stop, for writing what there is
GRACE_SECONDS = 12


@dataclass(frozen=True)
class Step:
    """A command with a limit of seconds; it is not started with less than `least` of them.

    "{seconds}" in the command is replaced by what a program with a budget of its own should be told; `statuses` give
    exit statuses a meaning.
    """

    name: str
    seconds: float
    command: tuple
    env: dict = field(default_factory=dict)
    statuses: dict = field(default_factory=dict)
    least: float = 0
    unavailable: str = ""


def steps(stage, out, peers=(), *, rehearse=False):
    """The steps of a stage; to rehearse it, the same with little to do, which a CPU finishes in seconds.

    peers: arguments of generate_speed.py.
    """
    jobs = ("--steps", "--attention", ATTENTION_POINTS, "--generation", GENERATION_POINTS, "--policies", LABELS)
    unpack = ("--unpack", common.ROOT / ".warm" / "triton.tgz", *few(rehearse))
    warm = script("warm.py", *jobs, *unpack)
    if stage == "first":
        points = ["--points", "Dream:1:64:8"] if rehearse else []
        return [
            Step("environment", 40, script("gpu_report.py", "--environment")),
            Step("warm", 55, (*warm, "--pack", str(out / "triton.tgz"))),
            Step("smoke", 40, tests(KERNEL_TESTS, "-x", "-m", "sanitizer", *some(rehearse))),
            Step("steps", 95, script("step_speed.py", "--profile", *budget(), "--out", out / "steps.jsonl", *points)),
            Step("tests", 85, tests(KERNEL_TESTS, *workers(out, stage), *some(rehearse))),
        ]
    if stage == "second":
        products = ("--budget", "0", "--rows", "1") if rehearse else (*budget(), "--rows", PRODUCT_ROWS)
        attention = "LLaDA-8B:1:64:8" if rehearse else ATTENTION_POINTS
        generation = ("Dream:1:16:8", "Decode") if rehearse else (GENERATION_POINTS, LABELS)
        generation = ("--points", generation[0], "--policies", generation[1], "--once", *peers)
        written = ("--no-plot", "--out", out)
        return [
            Step("environment", 40, script("gpu_report.py", "--environment")),
            Step("warm", 20, warm),
            Step("products", 45, script("linear_speed.py", *products, "--out", out / "linear_speed.json")),
            Step("attention", 80, script("attn_speed.py", *budget(), "--points", attention, "--no-lint", *written)),
            Step("generation", 100, script("generate_speed.py", *budget(), *generation, *written)),
        ]
    if stage == "sweep":
        rows = ("1",) if rehearse else ()
        written = ("--out", out / "sweep.jsonl", "--table", out / "fused_products.json")
        return [
            Step("environment", 40, script("gpu_report.py", "--environment")),
            Step("warm", 90, script("warm.py", "--sweep", *rows, *unpack)),
            Step("sweep", 80, script("product_sweep.py", *budget(), *(("--rows", *rows) if rows else ()), *written)),
        ]
    return [
        Step("tests", 100, tests(ENGINE_TESTS, *workers(out, stage), *some(rehearse), LOADING_TEST)),
        sanitizer("memcheck", 120, SANITIZED_TESTS, rehearse),
        sanitizer("racecheck", 120, ("commit", "packing", "bookkeeping"), rehearse),
    ]


def script(name, *arguments):
    return (sys.executable, str(common.ROOT / "benchmarks" / name), *map(str, arguments))


def budget():
    return "--budget", "{seconds}"


def tests(names, *options):
    """pytest on some test files; a test that hangs ends after a minute."""
    timeout = ("--timeout", "60") if importlib.util.find_spec("pytest_timeout") else ()
    files = [f"tests/test_{name}.py" for name in names]
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *timeout, *options, *files)


def workers(out, stage):
    """Several processes, a record for machines, and an end to a run that only fails."""
    parallel = ("-n", str(min(12, os.cpu_count())), "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    return (*parallel, "--maxfail", "40", "-rfE", f"--junitxml={out / f'tests-{stage}.xml'}")


def sanitizer(tool, seconds, names, rehearse):
    """The tests marked `sanitizer` under compute-sanitizer; importing PyTorch alone takes half a minute in there."""
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    prefix = (found or "compute-sanitizer", "--tool", tool, "--error-exitcode", "99")
    if tool == "memcheck":
        # PyTorch and Triton ask for functions that a driver may lack
        prefix += ("--report-api-errors", "no")
    return Step(
        tool,
        seconds,
        (*(() if rehearse else prefix), *tests(names, "-m", "sanitizer", *some(rehearse))),
        # the caching allocator would hide accesses outside a tensor
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        statuses={5: "not run: no test is marked sanitizer", 99: "failed: the sanitizer found errors"},
        least=0 if rehearse else seconds,
        unavailable="" if found or rehearse else "compute-sanitizer is not installed",
    )


def few(rehearse):
    return ("--limit", "1") if rehearse else ()


def some(rehearse):
    return ("-k", "small_run or two_runs or grad_mode") if rehearse else ()


def run_step(step, seconds, log):
    """Runs one step for at most `seconds`, its output into the file `log`; returns its record."""
    record = {"step": step.name, "status": "", "seconds": 0.0, "limit_seconds": round(seconds, 1), "output": ""}
    if step.unavailable:
        return record | {"status": f"not run: {step.unavailable}"}
    if seconds < max(step.least, LEAST_SECONDS):
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
        # its children too can be stopped then
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


def stop(process):
    """Asks the process group to end, as Ctrl-C does (pytest then sums up, a benchmark writes), and then makes it."""
    for number, patience in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGTERM, 1), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=patience)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def run_steps(todo, report, out):
    """Runs the steps one by one; what one leaves of its seconds is the next one's. Writes the report after each."""
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


def print_environment():
    """The first step: what this machine is, and what it reaches at best."""
    env = common.environment()
    print(json.dumps(common.rounded(env), indent=1), flush=True)
    print(json.dumps(common.rounded(common.measure_ceilings()), indent=1))
    if torch.cuda.is_available():
        print(common.output_of("nvidia-smi", "-q", "--id=0", "-d", "CLOCK,POWER,TEMPERATURE,ECC"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, default="first")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER", help=", ".join(PEERS))
    parser.add_argument("--peer-python", action="append", default=[], metavar="[NAME=]PYTHON")
    parser.add_argument("--commit", help="what is run, where there is no git repository; or the variable GIT_COMMIT")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: the same steps, with little to do")
    parser.add_argument("--environment", action="store_true", help="only print the environment and the ceilings")
    arguments = parser.parse_args(argv)
    try:
        generate_speed.parse_peers(arguments.peer, arguments.peer_python)
    except ValueError as error:
        parser.error(str(error))
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
        print("there is no git repository here: say what is run by --commit or GIT_COMMIT", file=sys.stderr)
        return 2
    out = (arguments.out or common.RESULTS / common.device_slug()).resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRITON_CACHE_DIR", str(common.ROOT / ".triton"))
    # a worker would start a process per core for torch.compile
    os.environ |= {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    os.environ.pop("TRITON_INTERPRET", None)
    report = {"stage": arguments.stage, "rehearsal": arguments.rehearse, **common.environment()}
    report |= {"seconds": 0.0, "steps": []}
    peers = [f"--peer={peer}" for peer in arguments.peer] + [f"--peer-python={path}" for path in arguments.peer_python]
    run_steps(steps(arguments.stage, out, peers, rehearse=arguments.rehearse), report, out)
    print(f"report: {out / f'report-{arguments.stage}.json'}")
    return 1 if any(step["status"].startswith("failed") for step in report["steps"]) else 0


if __name__ == "__main__":
    sys.exit(main())
