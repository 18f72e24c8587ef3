"""How long is one step of `dkv.generate`: a full or a cached one, by itself, and what it computes and launches.

    python benchmarks/step_speed.py                 LLaDA-8B and Dream-7B in bfloat16 on a GPU, a small pair on a CPU
    python benchmarks/step_speed.py --profile       also every kernel of a replay, with its time (GPU)
    python benchmarks/step_speed.py --points LLaDA:1:1024:32,Dream:8:1024:all
                                                    FAMILY:BATCH:LENGTH:ACTIVE; ACTIVE "all": a full step
    python benchmarks/step_speed.py --count         needs no GPU: the launches and rows of each step at true size, and
                                                    the rows of whole runs

A point is a step under Decode(8) that recomputes ACTIVE positions of each row, recorded as a CUDA graph where
`generate` records it; before every replay the state is put back, so that each does the same work. `floor` is the least
time of its bytes and operations (roofline.py). One JSON object a point goes to --out as soon as it is known, and with
--profile, when all are timed, another one with its kernels.

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
import json
import statistics
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import common  # noqa: E402
import roofline  # noqa: E402
import step_profile  # noqa: E402
import torch  # noqa: E402
from checkpoints import BLOCK, FAMILIES, SCALED_DOWN, TRUE_SIZE, make_model, tiny  # noqa: E402
from common import say  # noqa: E402
from fake_gpu import OnlyOnTheDevice, counted, fake_gpu, fake_model, fake_run  # noqa: E402

import dkv  # noqa: E402
from dkv import run  # noqa: E402
from dkv.generate import prepare  # noqa: E402
from dkv.graphs import RecordingStream, recording  # noqa: E402
from dkv.rooms import TILE, round_up  # noqa: E402

POINTS = (
    "LLaDA:1:1024:32,LLaDA:8:1024:32,LLaDA:1:256:32,LLaDA:1:1024:16,LLaDA:1:1024:128,LLaDA:1:2048:32,LLaDA:8:1024:16,"
    "LLaDA:4:1024:64,LLaDA:1:1024:all,LLaDA:8:1024:all,LLaDA:32:1024:16,"
    "Dream:1:1024:32,Dream:8:1024:32,Dream:1:1024:16,Dream:1:1024:all,Dream:8:1024:all"
)
GENERATED = 128
DECODE = dkv.Decode(8)
POLICIES = {
    "Decode(8)": DECODE,
    'Decode(8, scope="block")': dkv.Decode(8, scope="block"),
    "DualCache()": dkv.DualCache(),
}
# (family, batch, length, policy) of whole runs, one token a step
SHAPES = ((1, 300), (3, 600), (4, 320), (4, 384), (6, 300), (7, 290), (8, 160), (1, 640), (4, 640), (8, 640))
RUNS = (
    *((family, *shape, "Decode(8)") for family in FAMILIES for shape in SHAPES),
    ("LLaDA", 32, 384, 'Decode(8, scope="block")'),
    ("Dream", 8, 640, "DualCache()"),
    ("Dream", 32, 384, "DualCache()"),
)
REPLAYS = 30


def parse_points(text):
    """[(family, batch, length, active)] of "LLaDA:1:1024:32,..."."""
    points = []
    for part in text.split(","):
        family, *numbers = part.split(":")
        if family not in FAMILIES or len(numbers) != 3 or not all(n.isdecimal() and int(n) for n in numbers[:2]):
            raise argparse.ArgumentTypeError(f"{part!r} is not FAMILY:BATCH:LENGTH:ACTIVE, such as LLaDA:1:1024:32")
        batch, length, active = numbers
        if active != "all" and not (active.isdecimal() and 1 < int(active) < int(length)):
            raise argparse.ArgumentTypeError(f'{part!r}: ACTIVE is "all" or a number above 1 and below the length')
        points.append((family, int(batch), int(length), active if active == "all" else int(active)))
    return points


def way_to(family, active):
    """(tokens to generate, steps before): the beginning of a run whose next step has so many active positions a row."""
    if active == "all":
        return BLOCK, 0
    # LLaDA's first cached step is its third: what was masked before the second is active. Dream's is its second: what
    # is masked, and the position before it
    return (active + 1, 2) if family == "LLaDA" else (active - 1, 1)


def at_step(model, family, batch, length, active):
    """A run on the model's device whose next step is that of the point."""
    gen_length, steps = way_to(family, active)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 50, (batch, length - gen_length), generator=generator).to(model.device)
    current = prepare(model, prompt, gen_length=gen_length, policy=DECODE, cuda_graphs=False)
    for _ in range(steps):
        current.step()
    return current


# ---- times


def measure(current, ceilings):
    """A row of the next step of a run: milliseconds of its replays, and its floor."""
    need, room = run.needed(current.sizes.tolist()), current.next_room()
    step, restore, seconds_to_record = repeatable(current)
    samples = milliseconds(step, restore, current.sizes.is_cuda)
    sizes, batch = roofline.Sizes.of(current.model()), current.plan.batch
    work = roofline.Step(batch, current.longest, need.positions, need.candidates)
    floor = 1e3 * roofline.floor(sizes, work, ceilings)
    row = {"ms": statistics.median(samples), "ms_min": min(samples), "ms_max": max(samples)}
    row |= {"floor_ms": floor, "of_floor": floor / row["ms"], "seconds_to_record": seconds_to_record}
    return row | {"rows_needed": round_up(need.positions, TILE), "rows_computed": room.positions}


def repeatable(current):
    """(step, restore, seconds): functions that do the next step of a run and put its state back, as often as wanted.

    The step is a replay where `generate` records one, which took so many seconds; else the seconds are None.
    """
    room = current.next_room()
    kept = [(tensor, tensor.clone()) for tensor in tensors_of(current)]

    def restore():
        for tensor, value in kept:
            tensor.copy_(value)

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
    """Prints a row of each point, and writes it down at once; returns {name of the point: row}.

    Kernels are looked at when all points are timed: a profiler may slow down what comes after it.
    """
    ceilings, environment = common.measure_ceilings(), common.environment()
    write_line(arguments.out, environment | {"ceilings": ceilings}, "w")
    say(f"{environment['device']}, commit {environment['commit']}, {common.describe(ceilings)}")
    say(f"{'point':24}{'ms':>9}{'floor':>9}{'of floor':>10}{'rows':>7}{'needed':>8}")
    rows = {}
    for name, row in each_point(arguments, clock, lambda current: measure(current, ceilings)):
        rows[name] = row
        if "error" not in row:
            say(
                f"{name:24}{row['ms']:9.3f}{row['floor_ms']:9.3f}{row['of_floor']:10.0%}{row['rows_computed']:7}"
                f"{row['rows_needed']:8}"
            )
    if arguments.profile and common.device().type == "cuda":
        for name, row in each_point(arguments, clock, kernels_of):
            rows[name] = rows.get(name, {}) | {key: value for key, value in row.items() if key != "kernels"}
            if "error" not in row:
                say(f"{name}: {row['launches']} launches, {row['busy_us']:.0f} us busy of {row['span_us']:.0f} us")
            for group, microseconds in row.get("groups", {}).items():
                say(f"    {group:22}{microseconds:9.1f} us")
    return rows


def each_point(arguments, clock, measure):
    """Yields (name, row) of each point that there is time for, with what `measure` says of a run at its step."""
    cuda, known, model = common.device().type == "cuda", None, None
    for point in arguments.points:
        name = ":".join(map(str, point))
        if clock.left < 0:
            say(f"{name:24} not run, the budget is used up")
            continue
        try:
            if point[0] != known:
                model = None
                config = (TRUE_SIZE if cuda else SCALED_DOWN)[point[0]][1]
                dtype = torch.bfloat16 if cuda else torch.float32
                model, known = make_model(config, seed=0, dtype=dtype, device=common.device()), point[0]
            with torch.no_grad():
                row = measure(at_step(model, *point))
        except Exception as error:  # the others are measured all the same
            traceback.print_exc()
            row = {"error": common.described(error)}
        write_line(arguments.out, {"point": name} | row)
        yield name, row


def write_line(path, record, mode="a"):
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode) as file:
            file.write(json.dumps(common.rounded(record)) + "\n")


# ---- counts


def fake_at_step(model, family, batch, length, active):
    """(run on the fake GPU, the number of the point's step)."""
    gen_length, steps = way_to(family, active)
    return fake_run(model, DECODE, batch=batch, prompt=length - gen_length, gen_length=gen_length), steps


@torch.no_grad()
def count_point(family, batch, length, active):
    """What the step of a point launches and computes at true size."""
    state = at_step(make_model(tiny(family), seed=0, dtype=torch.float32, device="cpu"), family, batch, length, active)
    need = run.needed(state.sizes.tolist())
    with fake_gpu() as launches:
        current, steps = fake_at_step(fake_model(TRUE_SIZE[family][1]), family, batch, length, active)
        current.steps = steps
        room = current.next_room()
        # the first step makes what all later ones use
        current.compute(room)
        launches.clear()
        with OnlyOnTheDevice():
            current.compute(room)
        (head,) = (launch.arguments for launch in launches if launch.name == "lm_head")
        rows = max(launch.grid[0] for launch in launches if launch.name == "add_rms_norm")
    purposes = counted(launches)
    return {
        "point": ":".join(map(str, (family, batch, length, active))),
        "launches": len(launches),
        "bookkeeping": purposes.get("bookkeeping", 0),
        "rows_needed": round_up(need.positions, TILE),
        "rows_computed": rows,
        "candidates_needed": need.candidates,
        "candidates_computed": round_up(need.candidates, head["BLOCK_R"]),
        "purposes": purposes,
    }


@torch.no_grad()
def count_run(family, batch, length, policy):
    """The rows of a whole run: those its steps need, and those that they get where sizes are bounded, as on a GPU."""
    model = make_model(tiny(family), seed=0, dtype=torch.float32, device="cpu")
    prompt = torch.randint(0, 50, (batch, length - GENERATED), generator=torch.Generator().manual_seed(0))
    blocks = family == "LLaDA" or POLICIES[policy].needs_blocks
    options = {"gen_length": GENERATED, "block_length": BLOCK if blocks else GENERATED, "policy": POLICIES[policy]}
    rows, graphs = dict.fromkeys(("needed_full", "computed_full", "needed_cached", "computed_cached"), 0), set()
    with mock.patch.object(run, "reads_sizes", lambda device: False):
        current = prepare(model, prompt, **options)
        while current.running():
            need, room = run.needed(current.sizes.tolist()), current.next_room()
            kind = "full" if need.positions == batch * length else "cached"
            rows[f"needed_{kind}"] += round_up(need.positions, TILE)
            rows[f"computed_{kind}"] += room.positions
            if current.rooms.records(room):
                graphs.add(room)
            current.step()
        current.finish()
    name = f"{family}:{batch}:{length - GENERATED}+{GENERATED}"
    return {"run": name, "policy": policy, **{f"rows_{k}": n for k, n in rows.items()}, "graphs": len(graphs)}


def count(points):
    """Prints the counts of points and of whole runs; returns them."""
    say(f"{'point':24}{'launches':>9}{'bookkeeping':>13}{'rows':>7}{'needed':>8}{'candidates':>12}{'needed':>8}  what")
    found = {"points": [], "runs": []}
    for point in common.progress(points, "points"):
        row = count_point(*point)
        found["points"].append(row)
        launched = ", ".join(f"{n} {purpose}" for purpose, n in row["purposes"].items() if purpose != "bookkeeping")
        say(
            f"{row['point']:24}{row['launches']:9}{row['bookkeeping']:13}{row['rows_computed']:7}{row['rows_needed']:8}"
            f"{row['candidates_computed']:12}{row['candidates_needed']:8}  {launched}"
        )
    say(f"\n{'run':20}{'full':>8}{'needed':>8}{'ratio':>7}{'cached':>8}{'needed':>8}{'ratio':>7}{'graphs':>8}  policy")
    for case in common.progress(RUNS, "runs"):
        row = count_run(*case)
        found["runs"].append(row)
        cells = ""
        for kind in ("full", "cached"):
            computed, needed = row[f"rows_computed_{kind}"], row[f"rows_needed_{kind}"]
            cells += f"{computed:8}{needed:8}{computed / needed if needed else 1:7.3f}"
        say(f"{row['run']:20}{cells}{row['graphs']:8}  {row['policy']}")
    return found


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
    print(json.dumps(common.rounded({"points": [{"point": name} | row for name, row in rows.items()]})))
    return 1 if not rows or any("error" in row for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
