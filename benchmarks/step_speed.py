"""How long is one step of `dkv.generate`: a full or a cached one, by itself, and what it computes and launches.

    python benchmarks/step_speed.py                 LLaDA-8B and Dream-7B in bfloat16 on a GPU, a small pair on a CPU
    python benchmarks/step_speed.py --profile       also every kernel of a replay, with its time (GPU)
    python benchmarks/step_speed.py --points LLaDA:1:1024:32,Dream:8:1024:all
                                                    FAMILY:BATCH:LENGTH:ACTIVE; ACTIVE "all": a full step
    python benchmarks/step_speed.py --count         needs no GPU: the launches and rows of each step at true size, and
                                                    the rows of whole runs

A point is a step under Decode(8) that recomputes ACTIVE positions of each row, recorded as a CUDA graph where
`generate` records it; before every replay the state is put back, so that each does the same work. `floor` is the least
time of its bytes and operations (roofline.py).

A step of up to 256 rows is done in several ways: its products by the GPU's library, fused (our own kernels), and those
with PDL (programmatic dependent launch, from compute capability 9.0 on). All points are timed in one way before any is
in the next, which then goes side by side with it. What another way computes is first compared with the library's, from
the same state: rotated queries, keys and values of every layer, and the last hidden rows; a row of either that is
further off than TOLERANCE makes an error, not a time. What a recorded step leaves with PDL, where kernels overlap, must
be exactly what it leaves without. `/library` is the time over that of the library.

One JSON object a point and way goes to --out as soon as it is known, and with --profile, when all are timed, another
one with its kernels.

Counts: launches and sizes come from fake CUDA tensors at true size, needed rows from the state of the same run with a
tiny model on the CPU. Rows are positions that go through the model; those needed are rounded up to 16 a step, the
height of a tile; those computed are what a norm is launched for. Candidates computed are the rows of the tiles that the
LM head multiplies, which deals its programs by the number of candidates on the device. `bookkeeping` are launches that
are neither product, norm, RoPE, attention, merge, SwiGLU, head, packing nor commit. `graphs` are the sizes of a run's
steps, each of which is recorded when it comes up again. Tokens are the most likely ones; a temperature, a threshold or
guidance adds launches of PyTorch's.

A table goes to stdout, with one JSON object as its last line.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import common  # noqa: E402
import roofline  # noqa: E402
import step_profile  # noqa: E402
import torch  # noqa: E402
from checkpoints import SCALED_DOWN, TRUE_SIZE, make_model  # noqa: E402
from common import say  # noqa: E402
from step_counts import count  # noqa: E402
from step_points import FUSED, LIBRARY, PDL, POINTS, at_step, named, parse_points, ways  # noqa: E402

from dkv import run  # noqa: E402
from dkv.cuda_graphs import RecordingStream, recording  # noqa: E402
from dkv.kernels import configs  # noqa: E402
from dkv.rooms import TILE, round_up  # noqa: E402

REPLAYS = 30
# of a row's length; the roundings of 32 layers in bfloat16 come to 0.07, those in float32 to 1e-5
TOLERANCE = {torch.bfloat16: 0.15, torch.float32: 1e-4}


def measure(current, way, ceilings):
    """A row of the next step of a run: milliseconds of its replays, and its floor."""
    need, room = run.needed(current.sizes.tolist()), current.next_room()
    deviation = {} if way is LIBRARY else {"deviation": checked_deviation(current, way)}
    step, restore, seconds_to_record = repeatable(current)
    if way is PDL:
        check_overlapping(current, step, restore)
    samples = milliseconds(step, restore, current.sizes.is_cuda)
    sizes, batch = roofline.Sizes.of(current.model()), current.key.batch
    work = roofline.Step(batch, current.longest, need.positions, need.candidates)
    floor = 1e3 * roofline.floor(sizes, work, ceilings)
    row = {"ms": statistics.median(samples), "ms_min": min(samples), "ms_max": max(samples)}
    row |= {"floor_ms": floor, "of_floor": floor / row["ms"], "seconds_to_record": seconds_to_record} | deviation
    return row | {"rows_needed": round_up(need.positions, TILE), "rows_computed": room.positions}


def checked_deviation(current, way):
    """How far a row of `outputs_of` the next step of a run is at most from the library's, as a share of its length.

    Raises:
        RuntimeError: further than roundings explain.
    """
    restore, (expected, got) = restorer(current), [outputs_of(current, each) for each in (LIBRARY, way)]
    restore()
    pairs = [(a.float(), b.float()) for a, b in zip(expected, got, strict=True)]
    worst = torch.stack([((b - a).norm(dim=1) / a.norm(dim=1)).max() for a, b in pairs]).max().item()
    most = TOLERANCE[expected[0].dtype]
    # NaN is no less than anything
    if not worst <= most:
        raise RuntimeError(f"{way.name}: a row is {worst:.2g} of its length off the library's, more than {most:g}")
    return worst


def outputs_of(current, way):
    """[(rows, size)] of the next step of a run: queries, keys and values of every layer, and the last hidden rows."""
    found, attend = [], current.runner._attend

    def look(q, caches, tokens, *rest):
        there = tokens.slots >= 0
        slots = tokens.slots[there]
        places = slots // caches[0].shape[1], slots % caches[0].shape[1]
        found.extend(rows.flatten(1) for rows in (q[there], *(memory[places] for memory in caches)))
        return attend(q, caches, tokens, *rest)

    forget(current)
    with way.of(current), mock.patch.object(current.runner, "_attend", look):
        hidden, wanted = current._hidden(current.next_room())
    return [*found, hidden[wanted.slots >= 0]]


def check_overlapping(current, step, restore):
    """Raises RuntimeError unless a step leaves exactly what it does without PDL: only there do kernels overlap."""
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


def forget(current):
    """What the next step must write is not what the one before wrote."""
    for memory in (*current.cache.k, *current.cache.v):
        memory[current.active] = float("nan")


def restorer(current):
    """A function that puts the state of a run back, as it is now."""
    kept = [(tensor, tensor.clone()) for tensor in tensors_of(current)]

    def restore():
        for tensor, value in kept:
            tensor.copy_(value)

    return restore


def repeatable(current):
    """(step, restore, seconds): functions that do the next step of a run and put its state back, as often as wanted.

    The step is a replay where `generate` records one, which took so many seconds; else the seconds are None.
    """
    room, restore = current.next_room(), restorer(current)
    step = lambda: current.compute(room)
    step()
    restore()
    if current.sizes.is_cuda and current.rooms.records(room):
        begin = time.perf_counter()
        graph, stream = torch.cuda.CUDAGraph(), RecordingStream(current.sizes.device)
        with stream.taking_turns_with(torch.cuda.current_stream()), recording(graph, torch.cuda.graph_pool_handle()):
            step()
        seconds = time.perf_counter() - begin
        # it goes before its stream does
        stream.graphs["step"] = graph

        def replay():
            stream.graphs["step"].replay()

        return replay, restore, seconds
    return step, restore, None


def milliseconds(step, restore, cuda):
    """Of several steps; on a GPU the host does not wait in between, so that no launch is part of them."""
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


def tensors_of(current):
    """Everything that a step of the run changes, but for the K/V cache."""
    owned = [value for owner in (current.state, current) for value in vars(owner).values()]
    return list({id(value): value for value in owned if isinstance(value, torch.Tensor)}.values())


def kernels_of(current):
    """Every kernel of the next step of a run: (name, microseconds, calls), the longest first, busy time and span."""
    step, _, _ = repeatable(current)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not events:
        raise RuntimeError("the profiler saw no kernel")
    found = {}
    for event in events:
        microseconds, calls = found.get(event.name, (0.0, 0))
        found[event.name] = microseconds + event.time_range.elapsed_us(), calls + 1
    groups = {}
    for name, (microseconds, _) in found.items():
        group = step_profile.group_of(name)
        groups[group] = groups.get(group, 0.0) + microseconds
    ranked = sorted(((name[:120], *value) for name, value in found.items()), key=lambda kernel: -kernel[1])
    span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    busy = sum(microseconds for _, microseconds, _ in ranked)
    return {"launches": len(events), "span_us": span, "busy_us": busy, "groups": groups, "kernels": ranked}


def measure_points(arguments, clock):
    """Prints a row of each point and way, and writes it down at once; returns {(point, way): row}.

    What one way can tell comes before the next one begins, which goes side by side with it, for points of few rows.
    """
    ceilings, environment = common.measure_ceilings(), common.environment()
    common.write_line(arguments.out, environment | {"ceilings": ceilings}, "w")
    say(f"{environment['device']}, commit {environment['commit']}, {common.describe(ceilings)}")
    say(f"{'point':24}{'way':13}{'ms':>9}{'/library':>10}{'floor':>9}{'of floor':>10}{'rows':>7}{'needed':>8}")
    rows, every = {}, ways(configs.architecture(common.device()))
    profiles = arguments.profile and common.device().type == "cuda"

    def measure_in(points, of_these):
        timed = partial(measure, ceilings=ceilings)
        for (name, way), row in each_point(points, of_these, arguments.out, clock, timed):
            rows[name, way] = row
            if "error" not in row:
                row["of_library"] = row["ms"] / rows[name, LIBRARY.name].get("ms", math.nan)
                say(
                    f"{name:24}{way:13}{row['ms']:9.3f}{row['of_library']:10.3f}{row['floor_ms']:9.3f}"
                    f"{row['of_floor']:10.0%}{row['rows_computed']:7}{row['rows_needed']:8}"
                )

    def look_into(points, of_these):
        profiled = lambda current, way: kernels_of(current)
        for (name, way), row in each_point(points, of_these, arguments.out, clock, profiled):
            rows[name, way] = rows.get((name, way), {}) | {key: row[key] for key in row if key != "kernels"}
            if "error" not in row:
                times = f"{row['busy_us']:.0f} us busy of {row['span_us']:.0f} us"
                say(f"{name}, {way}: {row['launches']} launches, {times}")
            for group, microseconds in row.get("groups", {}).items():
                say(f"    {group:22}{microseconds:9.1f} us")

    measure_in(arguments.points, (LIBRARY,))
    if profiles:
        look_into(arguments.points, (LIBRARY,))
    few = [point for point in arguments.points if is_for_our_products(rows, point)]
    measure_in(few, (LIBRARY, FUSED))
    if profiles:
        # not with PDL, where the time of a kernel holds its wait
        look_into(few, (FUSED,))
    if PDL in every:
        measure_in(few, (FUSED, PDL))
    return rows


def is_for_our_products(rows, point):
    """Whether the step of a point was timed with the library's products, and has few enough rows for ours."""
    return rows.get((named(point), LIBRARY.name), {}).get("rows_computed", math.inf) <= configs.MAX_PRODUCT_ROWS


def each_point(points, of_these, out, clock, measure):
    """Yields ((point, way), row) of what there is time for, with what measure(run, way) says of a run at its step."""
    cuda, known, model = common.device().type == "cuda", None, None
    for point, way in itertools.product(points, of_these):
        name = named(point)
        if clock.left < 0:
            say(f"{name:24}{way.name:13} not run, the budget is used up")
            continue
        try:
            if point[0] != known:
                model = None
                config = (TRUE_SIZE if cuda else SCALED_DOWN)[point[0]][1]
                dtype = torch.bfloat16 if cuda else torch.float32
                model, known = make_model(config, seed=0, dtype=dtype, device=common.device()), point[0]
            with torch.no_grad():
                current = at_step(model, *point)
                with way.of(current):
                    row = measure(current, way)
        except Exception as error:  # the others are measured all the same
            traceback.print_exc()
            row = {"error": common.described(error)}
        common.write_line(out, {"point": name, "way": way.name} | row)
        yield (name, way.name), row


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=parse_points, default=parse_points(POINTS), metavar="POINT,...")
    parser.add_argument("--profile", action="store_true", help="every kernel of a replay")
    parser.add_argument("--count", action="store_true", help="count launches and rows; needs no GPU")
    parser.add_argument("--budget", type=float, default=120, metavar="SECONDS", help="no point is begun after them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a JSON line a point, as soon as it is known")
    arguments = parser.parse_args(argv)
    if arguments.count:
        print(json.dumps(count(arguments.points)))
        return 0
    rows = measure_points(arguments, common.Clock(arguments.budget))
    points = [{"point": point, "way": way} | row for (point, way), row in rows.items()]
    print(json.dumps(common.rounded({"points": points})))
    return 1 if not rows or any("error" in row for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
