"""Measures one step of `dkv.generate`, full or cached: its time, its floor, and the launches and rows that it needs.

    python benchmarks/step_speed.py                 LLaDA-8B and Dream-7B in bfloat16 on a GPU, a small pair on a CPU
    python benchmarks/step_speed.py --profile       also every kernel of a replay, with its time (GPU)
    python benchmarks/step_speed.py --points LLaDA:1:1024:32,Dream:8:1024:all
                                                    FAMILY:BATCH:LENGTH:ACTIVE; ACTIVE "all": a full step
    python benchmarks/step_speed.py --count         needs no GPU: the launches and rows of each step at true size, and
                                                    the rows of whole runs

A point is a step under Decode(8) that recomputes ACTIVE positions of each row, recorded as a CUDA graph where
`generate` records it. Its state is put back before every replay, so that each does the same work. `floor` is the
minimum time of its bytes and operations (harness/roofline.py).

The products of a step of up to 256 rows are done in several ways: by the GPU's library, by our own kernels ("fused"),
and by these with PDL (programmatic dependent launch, from compute capability 9.0 on). All points are timed in one way
before the next way begins, which is timed beside it. First, the outputs of the new way are compared with the library's,
from the same state: rotated queries, keys and values of every layer, and the last hidden rows. A row that is off by
more than a tolerance makes an error, not a time. With PDL, where kernels overlap, a step must leave exactly what it
leaves without. `/library` is the time over that of the library.

One JSON object for each point and way goes to --out as soon as it is known; --profile adds others with the kernels.

Counts: launches and sizes come from fake CUDA tensors at true size, needed rows from the same run of a tiny model on
the CPU. Rows are positions that go through the model. Needed rows are rounded up to 16 a step, the height of a tile;
computed rows are those of a norm's launch. Computed candidates are the rows of the LM head's tiles, which it deals to
its programs by the number of candidates on the device. `bookkeeping` counts the launches of other kernels than
products, norms, RoPE, attention, merge, SwiGLU, head, packing and commit. `graphs` counts the sizes of a run's steps,
each of which is recorded when it comes up again. Tokens are the most likely ones; a temperature, a threshold or
guidance adds launches of PyTorch's.

A table goes to stdout, with one JSON object as its last line.
"""

import itertools
import json
import math
import statistics
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import common, roofline, step_replay
from benchmarks.harness.common import Clock, say
from benchmarks.harness.models import SCALED_DOWN, TRUE_SIZE, make_model
from benchmarks.harness.step_counts import count
from benchmarks.harness.step_points import FUSED, LIBRARY, PDL, POINTS, StepPoint, Way, at_step, parse_points, ways
from dkv import run
from dkv.kernels import configs
from dkv.rooms import TILE, round_up

Row = dict[str, Any]


def measure(current: run.Run, way: Way, ceilings: dict[str, float]) -> Row:
    """Times the next step of a run, after the checks of the way."""
    need, room = run.needed(current.sizes.tolist()), current.next_room()
    deviation = {} if way is LIBRARY else {"deviation": step_replay.checked_deviation(current, way)}
    step, restore, seconds_to_record = step_replay.repeatable(current)
    if way is PDL:
        step_replay.check_overlapping(current, step, restore)
    samples = step_replay.milliseconds(step, restore, current.sizes.is_cuda)
    work = roofline.Work(current.key.batch, current.longest, need.positions, need.candidates)
    floor = 1e3 * roofline.floor(roofline.Sizes.of(current.model()), work, ceilings)
    row = {"ms": statistics.median(samples), "ms_min": min(samples), "ms_max": max(samples)}
    row |= {"floor_ms": floor, "of_floor": floor / row["ms"], "seconds_to_record": seconds_to_record} | deviation
    return row | {"rows_needed": round_up(need.positions, TILE), "rows_computed": room.positions}


def each_point(
    points: list[StepPoint], chosen: tuple[Way, ...], out: Path | None, clock: Clock, row_of: Callable
) -> Iterator[tuple[str, Way, Row]]:
    """Yields and writes (point, way, row) within the clock's time; row_of(run, way) measures it."""
    cuda, known, model = common.device().type == "cuda", None, None
    for point, way in itertools.product(points, chosen):
        if clock.left < 0:
            say(f"{point!s:24}{way.name:13} not run, the budget is used up")
            continue
        try:
            if point.family != known:
                model = None
                config = (TRUE_SIZE if cuda else SCALED_DOWN)[point.family][1]
                model = make_model(config, seed=0, dtype=common.dtype(), device=common.device())
                known = point.family
            with torch.no_grad():
                current = at_step(model, point)
                with way.of(current):
                    row = row_of(current, way)
        except Exception as error:  # the others are still measured
            traceback.print_exc()
            row = {"error": common.described(error)}
        common.write_line(out, {"point": str(point), "way": way.name} | row)
        yield str(point), way, row


def measure_points(arguments: Namespace, clock: Clock) -> dict[tuple[str, str], Row]:
    """Prints and writes a row for each point and way; returns {(point, way): row}."""
    ceilings, environment = common.measure_ceilings(), common.environment()
    common.write_line(arguments.out, environment | {"ceilings": ceilings}, "w")
    say(f"{environment['device']}, commit {environment['commit']}, {common.describe(ceilings)}")
    say(f"{'point':24}{'way':13}{'ms':>9}{'/library':>10}{'floor':>9}{'of floor':>10}{'rows':>7}{'needed':>8}")
    rows = {}

    def time_steps(points, *chosen):
        timed = partial(measure, ceilings=ceilings)
        for point, way, row in each_point(points, chosen, arguments.out, clock, timed):
            rows[point, way.name] = row
            if "error" not in row:
                row["of_library"] = row["ms"] / rows[point, LIBRARY.name].get("ms", math.nan)
                say(
                    f"{point:24}{way.name:13}{row['ms']:9.3f}{row['of_library']:10.3f}{row['floor_ms']:9.3f}"
                    f"{row['of_floor']:10.0%}{row['rows_computed']:7}{row['rows_needed']:8}"
                )

    def profile_steps(points, *chosen):
        if not arguments.profile or common.device().type != "cuda":
            return
        profiled = lambda current, way: step_replay.kernels_of(current)
        for point, way, row in each_point(points, chosen, arguments.out, clock, profiled):
            rows[point, way.name] = rows.get((point, way.name), {}) | {k: v for k, v in row.items() if k != "kernels"}
            if "error" not in row:
                times = f"{row['busy_us']:.0f} us busy of {row['span_us']:.0f} us"
                say(f"{point}, {way.name}: {row['launches']} launches, {times}")
            for group, microseconds in row.get("groups", {}).items():
                say(f"    {group:22}{microseconds:9.1f} us")

    def few_rows(point):
        timed = rows.get((str(point), LIBRARY.name), {})
        return timed.get("rows_computed", math.inf) <= configs.MAX_PRODUCT_ROWS

    time_steps(arguments.points, LIBRARY)
    profile_steps(arguments.points, LIBRARY)
    few = list(filter(few_rows, arguments.points))
    time_steps(few, LIBRARY, FUSED)
    # with PDL, the time of a kernel would include its wait
    profile_steps(few, FUSED)
    if PDL in ways(configs.architecture(common.device())):
        time_steps(few, FUSED, PDL)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = common.argument_parser(__doc__)
    parser.add_argument("--points", type=parse_points, default=parse_points(POINTS), metavar="POINT,...")
    parser.add_argument("--profile", action="store_true", help="every kernel of a replay")
    parser.add_argument("--count", action="store_true", help="count launches and rows; needs no GPU")
    parser.add_argument("--budget", type=float, default=120, metavar="SECONDS", help="start no point after this time")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines, each as soon as it is known")
    arguments = parser.parse_args(argv)
    if arguments.count:
        print(json.dumps(count(arguments.points)))
        return 0
    rows = measure_points(arguments, Clock(arguments.budget))
    points = [{"point": point, "way": way} | row for (point, way), row in rows.items()]
    print(json.dumps(common.rounded({"points": points})))
    return 1 if not rows or any("error" in row for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
