"""What every benchmark shares: the record of the environment, ceilings, interleaved timing, and the files written."""

import csv
import datetime
import functools
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from dkv.cuda_graphs import RecordingStream, recording

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# a graph of fewer or shorter calls would show the gaps between replays
CALLS_PER_GRAPH = 64
SECONDS_PER_GRAPH = 1e-3


def environment():
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


def device():
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def device_name():
    """The GPU's name, or "CPU: ..." so that no figure can be mistaken."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU: {cpu_name()}"


def device_slug():
    """The device's name as a folder of benchmarks/results."""
    name = re.sub(r"\((r|tm)\)|\bprocessor\b|\bcpu\b(?!:)|@.*", " ", device_name().lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit():
    """Short hash of the checkout, with "-dirty" if it has changes; "unknown" outside a git repository.

    The variable GIT_COMMIT says it for a copy of the files without one.
    """
    if given := os.environ.get("GIT_COMMIT"):
        return given
    head = output_of("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if head == "unknown":
        return head
    changes = output_of("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", empty="")
    return head + "-dirty" * bool(changes)


def output_of(*command, empty="unknown"):
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (result.stdout.strip() or empty) if result.returncode == 0 else "unknown"


def available_memory():
    """Bytes of host memory that programs can still get."""
    meminfo = Path("/proc/meminfo")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines()) if meminfo.exists() else {}
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else 4 * 2**30


def measure_ceilings():
    """What this device reaches at best: {"bandwidth": bytes/s, "flops": flop/s}, the best of several tries each.

    Bandwidth: a large copy, bytes read plus bytes written; on a CPU, which also reads what it overwrites, a sum if that
    is faster. Arithmetic: a large square matrix product of random numbers, bfloat16 on a GPU, float32 on a CPU.
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


def describe(ceilings):
    """`measure_ceilings` in words."""
    return f"ceilings measured: {ceilings['bandwidth'] / 1e9:.0f} GB/s, {ceilings['flops'] / 1e12:.3g} Tflop/s"


def seconds_of(call, tries):
    """Times single calls, after one that is not timed; for calls that are long against a kernel launch."""
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
    """Times single calls of `run(i)` by the host's clock, on one set of buffers after the other."""

    def __init__(self, run, sets):
        self.run, self.sets, self.seconds, self.cost = run, sets, [], None

    def output(self):
        """The result on set 0, for a check; also warms up, takes the first sample, and sets `cost`, its seconds."""
        out = self.run(0)
        self.tick()
        self.cost = self.seconds[0]
        return out

    def tick(self):
        """Takes one sample."""
        i = (len(self.seconds) + 1) % self.sets
        begin = time.perf_counter()
        self.run(i)
        self.seconds.append(time.perf_counter() - begin)

    def milliseconds(self):
        """All samples, per call."""
        return [1e3 * s for s in self.seconds]


def described(error):
    """The kind and the first line of an exception."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


class GraphTimer:
    """Times replays of a CUDA graph of many calls, which go through all sets of buffers, so that the L2 stays cold.

    `pool` is shared by the graphs of one comparison: they never run at the same time.
    """

    def __init__(self, run, sets, *, pool):
        self.run, self.sets, self.events, self.cost = run, sets, [], None
        self.stream = RecordingStream(device())
        with self.stream.taking_turns_with(torch.cuda.current_stream()):
            run(0)
            # while it records, the allocator gives nothing back
            torch.cuda.empty_cache()
            # a call by itself would take as long as the host needs for it
            self._record(sets, pool)
            self.tick()
            self.tick()
            calls = min(CALLS_PER_GRAPH, math.ceil(1e3 * SECONDS_PER_GRAPH / self.milliseconds()[-1]))
            if calls > self.calls:
                self._record(math.ceil(calls / sets) * sets, pool)
        self.events.clear()

    def _record(self, calls, pool):
        self.graph, self.calls = torch.cuda.CUDAGraph(), calls
        # the one before stays too: PyTorch takes a pool back for good once all of its graphs are gone
        self.stream.graphs[calls] = self.graph
        with recording(self.graph, pool):
            self.first_output = self.run(0)
            for i in range(1, calls):
                self.run(i % self.sets)

    def output(self):
        """What the graph's first call leaves, for a check of the very thing that is timed; also sets `cost`."""
        self.first_output.fill_(float("nan"))
        self.tick()
        self.cost = self.milliseconds()[0] * self.calls / 1e3
        self.events.clear()
        return self.first_output

    def tick(self):
        """Takes one sample, a replay of all calls; the host does not wait for it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        self.events.append((start, end))

    def milliseconds(self):
        """All samples, per call."""
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / self.calls for start, end in self.events]


def interleave(timers, *, seconds, least, most):
    """Takes samples of all timers in turn, in a new order each round, so that drift and noise meet all alike.

    Each timer gets an equal share of `seconds`, and as many samples, evenly spread over the rounds, as it can take in
    its share: at least `least`, at most `most`. On a machine that turns out slower than expected it ends earlier.
    """
    if not timers:
        return
    wanted = [max(least, min(most, int(seconds / len(timers) / timer.cost))) for timer in timers]
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


def quantiles(samples):
    """(20 %, median, 80 %) of the samples."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return low, statistics.median(samples), high


def geomean(values):
    """Geometric mean; None of nothing."""
    values = list(values)
    return math.exp(statistics.fmean(map(math.log, values))) if values else None


class Clock:
    """Seconds since the start of a benchmark (now, or a reading of time.monotonic()), and what its budget leaves."""

    def __init__(self, budget, start=None):
        self.start, self.budget = time.monotonic() if start is None else start, budget

    @property
    def spent(self):
        return time.monotonic() - self.start

    @property
    def left(self):
        return self.budget - self.spent


def progress(items, label):
    """A progress bar around `items` on a terminal, if tqdm is there."""
    try:
        from tqdm import tqdm
    except ImportError:
        print("no progress bar: tqdm is not installed (it comes with `pip install 'dkv[bench]'`)", file=sys.stderr)
        return items
    return tqdm(items, desc=label, disable=None, leave=False)


def say(line=""):
    """Prints a line without tearing a progress bar."""
    tqdm = sys.modules.get("tqdm")
    (tqdm.tqdm.write if tqdm else print)(line)
    sys.stdout.flush()


def rounded(value, digits=5):
    """Floats cut to significant digits, in nested lists and dicts; not a number becomes None, as JSON wants it."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def write_json(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(record), indent=1) + "\n")


def write_line(path, record, mode="a"):
    """Appends a record to a file of JSON lines; to none if path is None."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode) as file:
            file.write(json.dumps(rounded(record)) + "\n")


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rounded(rows))
