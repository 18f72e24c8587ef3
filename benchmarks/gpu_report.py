"""GPU tests and benchmarks within a budget of seconds, with the Python at hand: nothing is installed or downloaded.

    python benchmarks/gpu_report.py [--budget 540] [--out DIR]        what `make gpu-report` runs
    ... --peer official=FOLDER --peer dkv-cache=FOLDER --peer fast-dllm=FOLDER --peer-python PYTHON
                                                    also other people's code, as in generate_speed.py

The steps run in the order of their importance, each in a process of its own that may use its share of what is left of
the budget. What was not reached says "not run", what did not finish "timed out"; either way the output until then is
kept. DIR (benchmarks/results/<device> unless given) gets report.json, report.log with all output, and the files of the
benchmarks: at most eight.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import common  # noqa: E402
import generate_speed  # noqa: E402
import torch  # noqa: E402
from peer import PEERS  # noqa: E402

TAIL_LINES = 60
# no step is started with less than this
LEAST_SECONDS = 5
# after the signal to stop, for writing what there is
GRACE_SECONDS = 12


@dataclass(frozen=True)
class Step:
    """A command, and how large its share is of the time left to it and the steps behind it.

    "{seconds}" in the command is replaced by the seconds that the step has; `statuses` give exit statuses a meaning.
    """

    name: str
    share: float
    command: tuple
    env: dict = field(default_factory=dict)
    statuses: dict = field(default_factory=dict)
    unavailable: str = ""


def steps(out, peers=(), *, rehearse):
    """The steps on a GPU, or stand-ins of the same form that a CPU finishes in seconds.

    peers: arguments of generate_speed.py.
    """
    here, python = common.ROOT / "benchmarks", sys.executable
    attention = (python, str(here / "attn_speed.py"), "--out", str(out), "--budget", "{seconds}")
    generation = (
        python,
        str(here / "generate_speed.py"),
        "--out",
        str(out),
        "--budget",
        "{seconds}",
        "--profile",
        *peers,
    )
    linear = (python, str(here / "linear_speed.py"), "--budget", "{seconds}")
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    if rehearse:
        return [
            Step("environment", 1, (python, str(here / "gpu_report.py"), "--environment")),
            Step("tests", 3, (*pytest, "--collect-only", "tests/test_imports.py")),
            Step("attention speed", 6, (*attention, "--points", "LLaDA-8B:1:64:8", "--no-lint", "--no-plot")),
            Step("generation speed", 8, (*generation, "--points", "Dream:1:16:8", "--policies", "Decode")),
            Step("linear speed", 2, (python, str(here / "linear_speed.py"), "--budget", "0", "--rows", "1")),
            Step("memcheck", 1, (python, "-c", "print('stands for compute-sanitizer')")),
            Step("racecheck", 1, (python, "-c", "print('stands for compute-sanitizer')")),
        ]
    # most of the time goes into compiling
    workers = ("-n", str(min(12, os.cpu_count())), "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    found = [
        Step("environment", 1, (python, str(here / "gpu_report.py"), "--environment")),
        # a worker would start a process per core for torch.compile
        Step("tests", 10, (*pytest, *workers, "tests"), env={"TORCHINDUCTOR_COMPILE_THREADS": "1"}),
        Step("attention speed", 8, attention),
        Step("generation speed", 10, generation),
        Step("linear speed", 2, linear),
    ]
    for tool in ("memcheck", "racecheck"):
        found.append(
            Step(
                tool,
                2,
                (sanitizer or "", "--tool", tool, "--error-exitcode", "99", *pytest, "-m", "sanitizer", "tests"),
                # the caching allocator would hide accesses outside a tensor
                env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                statuses={5: "not run: no test is marked sanitizer", 99: "failed: the sanitizer found errors"},
                unavailable="" if sanitizer else "compute-sanitizer is not installed",
            )
        )
    return found


def run_step(step, seconds):
    """Runs one step for at most `seconds`; returns its record, with the end of its output, and the whole output."""
    record = {"step": step.name, "status": "", "seconds": 0.0, "limit_seconds": round(seconds, 1), "output": ""}
    if step.unavailable:
        return record | {"status": f"not run: {step.unavailable}"}, ""
    if seconds < LEAST_SECONDS:
        return record | {"status": "not run: the budget is used up"}, ""
    # a program with a budget of its own gets less, so that it ends by itself
    command = [part.replace("{seconds}", str(int(max(1, 0.85 * seconds - 5)))) for part in step.command]
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=common.ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | step.env,
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
        output.seek(0)
        # the last line of a benchmark is one JSON object of all its rows, which its own file holds too
        lines = [line if len(line) <= 500 else f"{line[:500]} ..." for line in output.read().splitlines()]
    tail = "\n".join(lines[-TAIL_LINES:])
    return record | {"status": status, "seconds": round(time.monotonic() - begin, 1), "output": tail}, "\n".join(lines)


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


def run_steps(todo, budget, report, out):
    """Runs the steps one by one within `budget` seconds; after each, the report so far is written into folder `out`."""
    clock, log = common.Clock(budget), []
    for i, step in enumerate(todo):
        seconds = (clock.left - GRACE_SECONDS) * step.share / sum(later.share for later in todo[i:])
        record, output = run_step(step, seconds)
        report["steps"].append(record)
        log.append(f"==== {step.name}: {record['status']}\n{output}\n")
        report["seconds"] = round(clock.spent, 1)
        print(f"{step.name:18} {record['status']:45} {record['seconds']:6.1f} s", flush=True)
        common.write_json(out / "report.json", report)
        (out / "report.log").write_text("\n".join(log))


def print_environment():
    """The first step: what this machine is, and what it reaches at best."""
    env = common.environment()
    ceilings = common.measure_ceilings()
    print(json.dumps(common.rounded(env | ceilings), indent=1))
    if torch.cuda.is_available():
        print(common.output_of("nvidia-smi", "-q", "--id=0", "-d", "CLOCK,POWER,TEMPERATURE,ECC"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="default: 540")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER", help=", ".join(PEERS))
    parser.add_argument("--peer-python", action="append", default=[], metavar="[NAME=]PYTHON")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: small stand-ins of the steps")
    parser.add_argument("--environment", action="store_true", help="only print the environment and the ceilings")
    arguments = parser.parse_args(argv)
    try:
        generate_speed.parse_peers(arguments.peer, arguments.peer_python)
    except ValueError as error:
        parser.error(str(error))
    if arguments.environment:
        print_environment()
        return 0
    if not (torch.cuda.is_available() or arguments.rehearse):
        print(
            "gpu_report needs a CUDA GPU and PyTorch built for it; `make test` and `make bench` run without one, and "
            "--rehearse runs small stand-ins of the steps",
            file=sys.stderr,
        )
        return 2
    out = (arguments.out or common.RESULTS / common.device_slug()).resolve()
    out.mkdir(parents=True, exist_ok=True)
    report = {"rehearsal": arguments.rehearse, **common.environment(), "budget_seconds": arguments.budget}
    report |= {"seconds": 0.0, "steps": []}
    peers = [f"--peer={peer}" for peer in arguments.peer] + [f"--peer-python={path}" for path in arguments.peer_python]
    run_steps(steps(out, peers, rehearse=arguments.rehearse), arguments.budget, report, out)
    print(f"report: {out / 'report.json'}")
    return 1 if any(step["status"].startswith("failed") for step in report["steps"]) else 0


if __name__ == "__main__":
    sys.exit(main())
