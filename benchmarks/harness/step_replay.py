"""Repeats one step of a run as often as wanted: to time it, to profile it, and to compare the ways of its products."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness import step_profile
from benchmarks.harness.step_points import FUSED, LIBRARY, PDL, Way
from dkv.cuda_graphs import RecordingStream, recording
from dkv.run import Run

REPLAYS = 30
# as a share of a row's length; the roundings of 32 layers come to 0.07 in bfloat16 and to 1e-5 in float32
TOLERANCE = {torch.bfloat16: 0.15, torch.float32: 1e-4}

Step = Callable[[], Any]


def repeatable(current: Run) -> tuple[Step, Step, float | None]:
    """(step, restore, seconds): does the next step of a run, and puts its state back.

    The step is a replay where `generate` records one; recording it took so many seconds. Otherwise they are None.
    """
    room, restore = current.next_room(), restorer(current)
    step = partial(current.compute, room)
    step()
    restore()
    if not (current.sizes.is_cuda and current.rooms.records(room)):
        return step, restore, None
    begin = time.perf_counter()
    graph, stream = torch.cuda.CUDAGraph(), RecordingStream(current.sizes.device)
    with stream.taking_turns_with(torch.cuda.current_stream()), recording(graph, torch.cuda.graph_pool_handle()):
        step()
    seconds = time.perf_counter() - begin
    # the stream must outlive the graph
    stream.graphs["step"] = graph
    return lambda: stream.graphs["step"].replay(), restore, seconds


def restorer(current: Run) -> Step:
    """A function that puts the state of a run back to what it is now."""
    kept = [(tensor, tensor.clone()) for tensor in tensors_of(current)]

    def restore():
        for tensor, value in kept:
            tensor.copy_(value)

    return restore


def tensors_of(current: Run) -> list[Tensor]:
    """Everything that a step of the run changes, except the K/V cache."""
    owned = [value for owner in (current.state, current) for value in vars(owner).values()]
    return list({id(value): value for value in owned if isinstance(value, Tensor)}.values())


def milliseconds(step: Step, restore: Step, cuda: bool) -> list[float]:
    """Times several steps; on a GPU the host does not wait in between, so that no launch is part of them."""
    if not cuda:
        samples = []
        for _ in range(5):
            restore()
            begin = time.perf_counter()
            step()
            samples.append(1e3 * (time.perf_counter() - begin))
        return samples
    events = []
    for _ in range(REPLAYS):
        restore()
        events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        events[-1][0].record()
        step()
        events[-1][1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def kernels_of(current: Run) -> dict[str, Any]:
    """Profiles the next step of a run: (name, microseconds, calls) of its kernels, the longest first, and sums."""
    step, _, _ = repeatable(current)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not events:
        raise RuntimeError("the profiler saw no kernel")
    found, groups = {}, {}
    for event in events:
        elapsed, group = event.time_range.elapsed_us(), step_profile.group_of(event.name)
        microseconds, calls = found.get(event.name, (0.0, 0))
        found[event.name] = microseconds + elapsed, calls + 1
        groups[group] = groups.get(group, 0.0) + elapsed
    ranked = sorted(((name[:120], *value) for name, value in found.items()), key=lambda kernel: -kernel[1])
    span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    return {
        "launches": len(events),
        "span_us": span,
        "busy_us": sum(microseconds for _, microseconds, _ in ranked),
        "groups": groups,
        "kernels": ranked,
    }


# ---- the ways compared


def checked_deviation(current: Run, way: Way) -> float:
    """The largest deviation of a row of the next step's outputs from the library's, as a share of its length.

    Raises:
        RuntimeError: it is larger than roundings explain.
    """
    restore, (expected, got) = restorer(current), [outputs_of(current, each) for each in (LIBRARY, way)]
    restore()
    pairs = [(a.float(), b.float()) for a, b in zip(expected, got, strict=True)]
    deviation = torch.stack([((b - a).norm(dim=1) / a.norm(dim=1)).max() for a, b in pairs]).max().item()
    tolerance = TOLERANCE[expected[0].dtype]
    if not deviation <= tolerance:  # NaN too
        raise RuntimeError(f"{way.name}: a row is {deviation:.2g} of its length off the library's, above {tolerance:g}")
    return deviation


def outputs_of(current: Run, way: Way) -> list[Tensor]:
    """(rows, size) of the next step of a run: queries, keys and values of every layer, and the last hidden rows."""
    found, attend = [], current.runner._attend

    def look(q, caches, tokens, *rest):
        valid = tokens.slots >= 0
        slots = tokens.slots[valid]
        places = slots // caches[0].shape[1], slots % caches[0].shape[1]
        found.extend(rows.flatten(1) for rows in (q[valid], *(memory[places] for memory in caches)))
        return attend(q, caches, tokens, *rest)

    forget(current)
    with way.of(current), mock.patch.object(current.runner, "_attend", look):
        hidden, wanted = current._hidden(current.next_room())
    return [*found, hidden[wanted.slots >= 0]]


def check_overlapping(current: Run, step: Step, restore: Step) -> None:
    """Raises RuntimeError unless a step with PDL, where kernels overlap, leaves exactly what it leaves without."""
    left = []
    for way, run_step in ((FUSED, partial(current.compute, current.next_room())), (PDL, step)):
        forget(current)
        with way.of(current):
            run_step()
        slots = [memory[current.active] for memory in (*current.cache.k, *current.cache.v)]
        left.append([tensor.clone() for tensor in (*slots, *tensors_of(current))])
        restore()
    if not all(map(torch.equal, *left)):
        raise RuntimeError("with PDL a step leaves something else than without")


def forget(current: Run) -> None:
    """Overwrites the cache's active slots with NaN, so that a step which does not write them is noticed."""
    for memory in (*current.cache.k, *current.cache.v):
        memory[current.active] = float("nan")
