"""Profiles full and cached steps of `dkv.generate` by groups of kernels, beside their floors."""

import collections
import contextlib
import functools
import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

import dkv.layers
from benchmarks.harness import roofline
from benchmarks.harness.roofline import Work
from benchmarks.harness.systems import Job, start
from dkv.kernels import reference
from dkv.run import Run, needed

# steps of each kind, spread evenly over a run
STEPS = 8
# kernels that are listed by name
LISTED = 12
REST = "policy, bookkeeping"
# a GPU's kernels by name: the first matching pattern counts
KERNELS = (
    ("attention", r"delayed_attention|merge_splits|flash|fmha|attention"),
    # our fused products too
    ("linear", r"linear_(rope_cache|swiglu|add_norm)|gemm|gemv|nvjet|xmma|cutlass|cublas|splitk"),
    ("rope, cache write", r"rope"),
    ("norms", r"rms_norm|deferred_norm"),
    ("activation", r"swiglu"),
    ("head", r"lm_head|merge_confidence"),
    ("packing, commit", r"pack_positions|commit_tokens"),
    # PyTorch's elementwise kernels, sums and copies
    (REST, r""),
)
# a CPU's operators where they are called: (group, owner, name)
OPERATORS = (
    ("attention", reference, "delayed_attention"),
    ("rope, cache write", reference, "rope_cache_update"),
    ("norms", reference, "add_rms_norm"),
    ("activation", reference, "swiglu"),
    ("head", reference, "lm_head_confidence"),
    ("packing, commit", reference, "pack_step"),
    ("packing, commit", reference, "commit_tokens"),
    ("linear", dkv.layers, "linear"),
    ("linear", dkv.layers.MergedLinear, "__call__"),
)
GROUPS = tuple(group for group, _ in KERNELS)


@torch.no_grad()
def profile(model: nn.Module, job: Job, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Profiles steps of a run of the job; returns a record for its full steps and one for its cached steps.

    On a GPU the times are those of kernels, without the gaps between them; on a CPU every moment is in some group.
    """
    measure = gpu_kernels if model.device.type == "cuda" else operators
    sizes = roofline.Sizes.of(model)
    works = [work for work, _ in steps_of(model, job)]
    wanted = {}
    for full in (True, False):
        indices = [i for i, work in enumerate(works) if work.full == full]
        wanted[full] = indices[:: -(-len(indices) // STEPS)] if indices else []
    found = {True: [], False: []}
    for i, (work, run) in enumerate(steps_of(model, job)):
        if i in wanted[work.full]:
            found[work.full].append((work, measure(run.step)))
    return [record("full" if full else "cached", found[full], sizes, ceilings) for full in found if found[full]]


def steps_of(model: nn.Module, job: Job) -> Iterator[tuple[Work, Run]]:
    """Runs the job; yields (work, run) before each step, and takes the step afterwards unless the caller did."""
    with start(model, job, cuda_graphs=False) as run:
        while run.running():
            done = run.steps
            need = needed(run.sizes.tolist())
            yield Work(job.prompt.shape[0], job.seqlen, need.positions, need.candidates), run
            if run.steps == done:
                run.step()


def operators(step: Callable[[], None]) -> dict:
    """{(group, name): [milliseconds, calls]} of a step on a CPU."""
    found = collections.defaultdict(lambda: [0.0, 0])

    def timed(key, function):
        @functools.wraps(function)
        def call(*arguments, **options):
            begin = time.perf_counter()
            result = function(*arguments, **options)
            found[key][0] += 1e3 * (time.perf_counter() - begin)
            found[key][1] += 1
            return result

        return call

    with contextlib.ExitStack() as stack:
        for group, owner, name in OPERATORS:
            function = getattr(owner, name)
            stack.enter_context(mock.patch.object(owner, name, timed((group, function.__qualname__), function)))
        begin = time.perf_counter()
        step()
        whole = 1e3 * (time.perf_counter() - begin)
    found[REST, REST] = [whole - sum(ms for ms, _ in found.values()), 1]
    return found


def gpu_kernels(step: Callable[[], None]) -> dict:
    """{(group, name): [milliseconds, calls]} of a step on a GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    found = {}
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[group_of(event.key), event.key] = [event.self_device_time_total / 1e3, event.count]
    return found


def group_of(kernel: str) -> str:
    return next(group for group, pattern in KERNELS if re.search(pattern, kernel, re.IGNORECASE))


def record(kind: str, profiled: list[tuple[Work, dict]], sizes: roofline.Sizes, ceilings: dict) -> dict[str, Any]:
    """Medians of times over the profiled steps, means of the rest."""
    times = {}
    for key in dict.fromkeys(key for _, found in profiled for key in found):
        samples = [found.get(key, (0.0, 0)) for _, found in profiled]
        times[key] = statistics.median(ms for ms, _ in samples), statistics.fmean(calls for _, calls in samples)
    floors = [roofline.floors(sizes, work, ceilings) for work, _ in profiled]
    floors = {group: 1e3 * statistics.fmean(floor[group] for floor in floors) for group in roofline.GROUPS}
    groups = {
        group: {"ms": sum(ms for (g, _), (ms, _) in times.items() if g == group), "floor_ms": floors.get(group, 0.0)}
        for group in GROUPS
    }
    longest = sorted(times.items(), key=lambda item: -item[1][0])[:LISTED]
    return {
        "step": kind,
        "positions": statistics.fmean(work.active for work, _ in profiled),
        "candidates": statistics.fmean(work.candidates for work, _ in profiled),
        "ms": sum(group["ms"] for group in groups.values()),
        "floor_ms": sum(floors.values()),
        "groups": groups,
        "kernels": [{"group": g, "name": name, "ms": ms, "calls": calls} for (g, name), (ms, calls) in longest],
    }


def table(found: dict[str, Any]) -> Iterator[str]:
    """The lines of one record's table."""
    whole = found["ms"]
    yield (
        f"{found['step']} steps, mean of {found['positions']:.0f} positions and {found['candidates']:.0f} candidates: "
        f"{whole:.3f} ms, floor {found['floor_ms']:.3f} ms"
    )
    yield f"  {'group':<22}{'ms':>9}{'share':>8}{'floor':>9}{'above it':>10}"
    for name, group in found["groups"].items():
        ms, floor = group["ms"], group["floor_ms"]
        yield f"  {name:<22}{ms:9.3f}{ms / whole if whole else 0:8.0%}{floor:9.3f}{ms - floor:10.3f}"
