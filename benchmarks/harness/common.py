"""Shared by all benchmarks: the environment's record, ceilings, interleaved timing, and the files they write."""

import argparse
import csv
import datetime
import functools
import json
import math
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from dkv.cuda_graphs import RecordingStream, recording

ROOT = Path(__file__).resolve().parents[2]
SMALL_MODELS = ROOT / "benchmarks" / "small"
# with fewer or shorter calls in a graph, the gaps between replays would show
CALLS_PER_GRAPH = 64
SECONDS_PER_GRAPH = 1e-3


# ---- the command line


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Adds --out, the folder of the results."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")


def stop_on_sigterm() -> None:
    """From now on SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that a script writes what it has."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


# ---- the machine


def environment() -> dict[str, Any]:
    """Device, versions, commit and date of this run, as a dict of strings and numbers."""
    import triton

    record = {
        "device": device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "num_sms": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        }
    return record


def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def dtype() -> torch.dtype:
    """The dtype of the benchmarks on this device."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def device_name() -> str:
    """The GPU's name, or "CPU: ..." so that no figure can be mistaken."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU: {cpu_name()}"


def results_folder(out: Path | None) -> Path:
    """The folder that --out names; by default that of this device in benchmarks/results."""
    name = re.sub(r"\((r|tm)\)|\bprocessor\b|\bcpu\b(?!:)|@.*", " ", device_name().lower())
    return out or ROOT / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checkout, with "-dirty" if it has changes; "unknown" outside a git repository.

    The environment variable GIT_COMMIT overrides it, for a copy of the files without a repository.
    """
    described = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*")
    return os.environ.get("GIT_COMMIT") or output_of(*described)


def output_of(*command: str) -> str:
    """Standard output of a command; "unknown" if it fails or prints nothing."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (result.returncode == 0 and result.stdout.strip()) or "unknown"


def available_memory() -> int:
    """Free host memory in bytes."""
    meminfo = Path("/proc/meminfo")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines()) if meminfo.exists() else {}
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else 4 * 2**30


def measure_ceilings() -> dict[str, float]:
    """The best of several tries on this device: {"bandwidth": bytes/s, "flops": flop/s}.

    Bandwidth: a large copy, bytes read plus bytes written. A CPU also reads what it overwrites, so there a sum counts
    if it is faster. Arithmetic: a large square matrix product of random numbers, bfloat16 on a GPU, float32 on a CPU.
    """
    if torch.cuda.is_available():
        elements, size, dtype, tries = 2**29, 8192, torch.bfloat16, 20
    else:
        elements, size, dtype, tries = 2**25, 1536, torch.float32, 6
    source = torch.empty(elements, device=device(), dtype=dtype).uniform_()
    target = torch.empty_like(source)
    bandwidth = 2 * elements * dtype.itemsize / min(seconds_of(functools.partial(target.copy_, source), tries))
    if not torch.cuda.is_available():
        bandwidth = max(bandwidth, elements * dtype.itemsize / min(seconds_of(source.sum, tries)))
    del source, target
    a, b = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
    product = min(seconds_of(functools.partial(torch.matmul, a, b), tries))
    return {"bandwidth": bandwidth, "flops": 2 * size**3 / product}


def describe(ceilings: dict[str, float]) -> str:
    """The result of `measure_ceilings` in words."""
    return f"ceilings measured: {ceilings['bandwidth'] / 1e9:.0f} GB/s, {ceilings['flops'] / 1e12:.3g} Tflop/s"


# ---- timing


def seconds_of(call: Callable[[], Any], tries: int) -> list[float]:
    """Times single calls after an untimed one. The calls must be much longer than a kernel launch."""
    call()
    seconds = []
    for _ in range(tries):
        if torch.cuda.is_available():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
    return seconds


class HostTimer:
    """Times single calls of `run(i)` by the host's clock, on one set of buffers after another."""

    def __init__(self, run: Callable[[int], Tensor], sets: int):
        self.run, self.sets, self.seconds, self.cost = run, sets, [], None

    def output(self) -> Tensor:
        """The result on set 0, for a check; also warms up, takes the first sample and sets `cost`, its seconds."""
        out = self.run(0)
        self.tick()
        self.cost = self.seconds[0]
        return out

    def tick(self) -> None:
        """Takes one sample."""
        i = (len(self.seconds) + 1) % self.sets
        begin = time.perf_counter()
        self.run(i)
        self.seconds.append(time.perf_counter() - begin)

    def milliseconds(self) -> list[float]:
        """All samples, per call."""
        return [1e3 * s for s in self.seconds]


class GraphTimer:
    """Times replays of a CUDA graph of many calls, which rotate through all sets of buffers so that the L2 stays cold.

    The graphs of one comparison share `pool`: they never run at the same time.
    """

    def __init__(self, run: Callable[[int], Tensor], sets: int, *, pool: tuple[int, int]):
        self.run, self.sets, self.events, self.cost = run, sets, [], None
        self.stream = RecordingStream(device())
        with self.stream.taking_turns_with(torch.cuda.current_stream()):
            run(0)
            # while it records, the allocator gives nothing back
            torch.cuda.empty_cache()
            # outside a graph, a call takes as long as the host needs to launch it
            self._record(sets, pool)
            self.tick()
            self.tick()
            calls = min(CALLS_PER_GRAPH, math.ceil(1e3 * SECONDS_PER_GRAPH / self.milliseconds()[-1]))
            if calls > self.calls:
                self._record(math.ceil(calls / sets) * sets, pool)
        self.events.clear()

    def _record(self, calls, pool):
        self.graph, self.calls = torch.cuda.CUDAGraph(), calls
        # the previous graph stays alive: PyTorch retires a pool for good once all of its graphs are gone
        self.stream.graphs[calls] = self.graph
        with recording(self.graph, pool):
            self.first_output = self.run(0)
            for i in range(1, calls):
                self.run(i % self.sets)

    def output(self) -> Tensor:
        """The result of the graph's first call, to check the very thing that is timed; also sets `cost`."""
        self.first_output.fill_(float("nan"))
        self.tick()
        self.cost = self.milliseconds()[0] * self.calls / 1e3
        self.events.clear()
        return self.first_output

    def tick(self) -> None:
        """Takes one sample, a replay of all calls; the host does not wait for it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        self.events.append((start, end))

    def milliseconds(self) -> list[float]:
        """All samples, per call."""
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / self.calls for start, end in self.events]


def make_timer(run: Callable[[int], Tensor], sets: int, pool: tuple[int, int] | None) -> GraphTimer | HostTimer:
    """A timer of CUDA graphs that share `pool`, or of a CPU's calls if it is None."""
    return HostTimer(run, sets) if pool is None else GraphTimer(run, sets, pool=pool)


def interleave(timers: Sequence[GraphTimer | HostTimer], *, seconds: float, samples: tuple[int, int]) -> None:
    """Takes samples of all timers in turn, in a new order each round, so that drift and noise affect all alike.

    Each timer gets an equal share of `seconds`, and as many samples as fit in its share, evenly spread over the rounds;
    `samples` are the minimum and the maximum. On a machine that is slower than expected it ends earlier.
    """
    if not timers:
        return
    min_samples, max_samples = samples
    wanted = [max(min_samples, min(max_samples, int(seconds / len(timers) / timer.cost))) for timer in timers]
    rounds = max(wanted)
    shuffle = random.Random(0).shuffle
    begin = time.monotonic()
    for r in range(rounds):
        if time.monotonic() - begin > 2 * seconds and (r + 1) * min(wanted) // rounds > 2:
            break
        due = [timer for timer, n in zip(timers, wanted, strict=True) if (r + 1) * n // rounds > r * n // rounds]
        shuffle(due)
        for timer in due:
            timer.tick()


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median and the 80th percentile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return low, statistics.median(samples), high


def geomean(values: Iterable[float]) -> float | None:
    """Geometric mean; None if there are no values."""
    values = list(values)
    return math.exp(statistics.fmean(map(math.log, values))) if values else None


class Clock:
    """Counts down a budget of seconds from now."""

    def __init__(self, budget: float):
        self.start, self.budget = time.monotonic(), budget

    @property
    def spent(self) -> float:
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        return self.budget - self.spent


# ---- output


def described(error: Exception) -> str:
    """The type and the first line of an exception."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def progress(items: Iterable, label: str) -> Iterable:
    """A progress bar around `items` on a terminal."""
    return tqdm(items, desc=label, disable=None, leave=False)


def say(line: str = "") -> None:
    """Prints a line without breaking a progress bar."""
    tqdm.write(line)
    sys.stdout.flush()


Columns = Sequence[tuple[str, int, Callable[[dict[str, Any]], str]]]


def heads(columns: Columns) -> str:
    """The header of a table with columns (head, width, function of a row)."""
    return "".join(head.rjust(width) for head, width, _ in columns)


def cells(columns: Columns, row: dict[str, Any]) -> str:
    """A line of such a table; "-" where a value is None."""

    def text(function):
        try:
            return function(row)
        except TypeError:
            return "-"

    return "".join(text(function).rjust(width) for _, width, function in columns)


def rounded(value: Any, digits: int = 5) -> Any:
    """Rounds floats to significant digits in nested lists and dicts; NaN and infinity become None, for JSON."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def finish(record: dict[str, Any], rows: list[dict[str, Any]], stem: Path | None) -> None:
    """Ends a benchmark: writes `stem`.json and `stem`.csv (None: no files), and prints the JSON as the last line."""
    record = record | {"rows": rows}
    if stem:
        write_json(stem.with_suffix(".json"), record)
        with stem.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rounded(rows))
        say(f"\nwritten: {stem}.json, .csv")
    print(json.dumps(rounded(record)), flush=True)


def write_json(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(record), indent=1) + "\n")


def write_line(path: Path | None, record: dict[str, Any], mode: Literal["a", "w"] = "a") -> None:
    """Appends a record to a file of JSON lines, or begins one; does nothing if path is None."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode) as file:
            file.write(json.dumps(rounded(record)) + "\n")
