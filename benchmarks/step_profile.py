"""Where the time of a step of `dkv.generate` goes: full and cached steps, by groups of kernels, beside their floors."""

import collections
import contextlib
import functools
import re
import statistics
import time
from unittest import mock

import roofline
import torch
from systems import start

import dkv.layers
from dkv.kernels import reference
from dkv.run import needed

# steps of each kind, evenly over a run
STEPS = 8
# kernels that are listed by name
LISTED = 12
REST = "policy, bookkeeping"
# a GPU's kernels by name: the first pattern that is found in it counts
KERNELS = (
    ("attention", r"delayed_attention|merge_splits|flash|fmha|attention"),
    # ours too, with what they do around a product
    ("linear", r"linear_(rope_cache|swiglu|add_norm)|gemm|gemv|nvjet|xmma|cutlass|cublas|splitk"),
    ("rope, cache write", r"rope"),
    ("norms", r"rms_norm|deferred_norm"),
    ("activation", r"swiglu"),
    ("head", r"lm_head|merge_confidence"),
    ("packing, commit", r"pack_positions|commit_tokens"),
    # PyTorch's elementwise kernels, sums and copies
    (REST, r""),
)
# on a CPU the operators, where they are called: (group, owner, name)
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
def profile(model, job, ceilings):
    """Profiles steps of a run of the job; returns a record for its full steps and one for its cached steps.

    On a GPU these are the times of kernels, without the gaps between them; on a CPU all time is in some group.
    """
    measure = gpu_kernels if model.device.type == "cuda" else operators
    sizes = roofline.Sizes.of(model)
    work = [step for step, _ in steps_of(model, job)]
    wanted = {}
    for full in (True, False):
        indices = [i for i, step in enumerate(work) if step.full == full]
        wanted[full] = indices[:: -(-len(indices) // STEPS)] if indices else []
    found = {True: [], False: []}
    for i, (step, run) in enumerate(steps_of(model, job)):
        if i in wanted[step.full]:
            found[step.full].append((step, measure(run.step)))
    return [record("full" if full else "cached", found[full], sizes, ceilings) for full in found if found[full]]


def steps_of(model, job):
    """Runs the job; yields (`roofline.Step`, run) before each step, which is done then unless the caller has."""
    with start(model, job, cuda_graphs=False) as run:
        while run.running():
            done = run.steps
            need = needed(run.sizes.tolist())
            yield roofline.Step(job.prompt.shape[0], job.seqlen, need.positions, need.candidates), run
            if run.steps == done:
                run.step()


def operators(step):
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


def gpu_kernels(step):
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


def group_of(kernel):
    return next(group for group, pattern in KERNELS if re.search(pattern, kernel, re.IGNORECASE))


def record(kind, profiled, sizes, ceilings):
    """Medians of times over the profiled steps, means of the rest."""
    times = {}
    for key in dict.fromkeys(key for _, found in profiled for key in found):
        samples = [found.get(key, (0.0, 0)) for _, found in profiled]
        times[key] = statistics.median(ms for ms, _ in samples), statistics.fmean(calls for _, calls in samples)
    floors = [roofline.floors(sizes, step, ceilings) for step, _ in profiled]
    floors = {group: 1e3 * statistics.fmean(floor[group] for floor in floors) for group in roofline.GROUPS}
    groups = {
        group: {"ms": sum(ms for (g, _), (ms, _) in times.items() if g == group), "floor_ms": floors.get(group, 0.0)}
        for group in GROUPS
    }
    longest = sorted(times.items(), key=lambda item: -item[1][0])[:LISTED]
    return {
        "step": kind,
        "positions": statistics.fmean(step.active for step, _ in profiled),
        "candidates": statistics.fmean(step.candidates for step, _ in profiled),
        "ms": sum(group["ms"] for group in groups.values()),
        "floor_ms": sum(floors.values()),
        "groups": groups,
        "kernels": [{"group": g, "name": name, "ms": ms, "calls": calls} for (g, name), (ms, calls) in longest],
    }


def table(found):
    """The lines of a table of one record."""
    whole = found["ms"]
    yield (
        f"{found['step']} steps, mean of {found['positions']:.0f} positions and {found['candidates']:.0f} candidates: "
        f"{whole:.3f} ms, floor {found['floor_ms']:.3f} ms"
    )
    yield f"  {'group':<22}{'ms':>9}{'share':>8}{'floor':>9}{'above it':>10}"
    for name, group in found["groups"].items():
        ms, floor = group["ms"], group["floor_ms"]
        yield f"  {name:<22}{ms:9.3f}{ms / whole if whole else 0:8.0%}{floor:9.3f}{ms - floor:10.3f}"
