"""Measures the attention part of one layer: `dkv.kernels` against the alternatives, at the models' true shapes.

    python benchmarks/attn_speed.py                                  the whole grid
    python benchmarks/attn_speed.py --quick                          a small part of it
    python benchmarks/attn_speed.py --points LLaDA-8B:8:2048:32      MODEL:BATCH:LENGTH:ACTIVE[:ragged], comma-separated

A GPU runs in bfloat16: replays of CUDA graphs over rotated buffers. A CPU runs in float32, where `dkv.kernels` is its
PyTorch implementation, so that such a run compares algorithms, not kernels. harness/attention.py has the providers.
Each is checked against a float64 oracle before it is timed; one that fails is not timed, and the exit status is 1.

A table goes to stdout, with one JSON object as its last line; JSON, CSV and a plot go to benchmarks/results/<device>/.
In a row, `gbps` and `tflops` count the necessary bytes and flops of the job. `fraction_of_ceiling` is the time that
these need at the ceilings measured in the same run, over the measured time. `ratio_to_best` is the time of the best
provider that is not ours over this one's: above 1, it beats them all.
"""

import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import attention, common, plots
from benchmarks.harness.attention import AttentionPoint, Canvas, LayerCase, Provider
from benchmarks.harness.common import say
from benchmarks.harness.models import MODELS

ACTIVES = (1, 8, 32, 64, 128, 256, "all")
FAMILIES = ("full recompute", "authors' way", "cheap fix")
Rows = list[dict]


@dataclass(frozen=True)
class Grid:
    """The measurements of a run.

    Attributes:
        groups: (batch, length, actives), the most important first.
        ragged: the same, of ragged batches.
        flex: (batch, length, active) with FlexAttention.
        budget: seconds.
        timing_share: the part of the budget that the points share for timing; the rest is for making and checking data.
        samples: at least and at most, of each provider.
        longest_call: seconds; a call that must take longer at the measured ceiling is skipped.
    """

    groups: tuple
    ragged: tuple
    flex: tuple
    budget: float
    timing_share: float
    samples: tuple[int, int]
    longest_call: float


FEW = (1, 32, 128)
GPU = Grid(
    groups=(
        *((b, n, ACTIVES) for n in (2048, 512) for b in (8, 1, 32, 4)),
        *((b, 8192, ACTIVES) for b in (1, 8, 4, 32)),
        *((b, n, FEW) for n in (1024, 4096) for b in (8, 1, 32, 4)),
    ),
    ragged=((8, 2048, (8, 32, 128)), (32, 1024, (32,))),
    flex=((8, 2048, 32),),
    budget=225,
    timing_share=0.6,
    samples=(5, 50),
    longest_call=0.5,
)
GPU_QUICK = replace(
    GPU,
    groups=((8, 2048, (*FEW, "all")), (1, 1024, (*FEW, "all"))),
    ragged=((8, 2048, (32,)),),
    flex=(),
    budget=55,
    timing_share=0.3,
)
# below a length of 1024, a batch of one measures the interpreter more than the attention
CPU = Grid(
    groups=(
        (1, 1024, ACTIVES),
        (8, 512, (1, 8, 32, 64, "all")),
        (4, 1024, (1, 8, 32, 128)),
        (1, 8192, FEW),
        (1, 2048, ACTIVES[:-1]),
        (32, 512, FEW[:-1]),
    ),
    ragged=((8, 512, (8, 32)),),
    flex=(),
    budget=140,
    timing_share=0.42,
    samples=(5, 60),
    longest_call=0.6,
)
CPU_QUICK = replace(
    CPU,
    groups=((1, 1024, FEW), (1, 512, ("all",))),
    ragged=((4, 512, (16,)),),
    budget=21,
    samples=(5, 40),
    longest_call=0.3,
)


def points_of(grid: Grid) -> Iterator[list[AttentionPoint]]:
    """Groups of points that share their data. A full step comes first, because a full recompute is measured there."""
    shapes = [(group, False) for group in grid.groups]
    shapes[2:2] = [(group, True) for group in grid.ragged]
    for (batch, seqlen, actives), ragged in shapes:
        numbers = sorted({seqlen if a == "all" else a for a in actives if a == "all" or a < seqlen}, reverse=True)
        for model in MODELS:
            yield [AttentionPoint(model, batch, seqlen, active, ragged) for active in numbers]


class AttentionBench:
    """One run: measures points, and keeps the rows and what was skipped, refused or not reached."""

    def __init__(self, grid: Grid, ceilings: dict, clock: common.Clock, *, seconds_per_point: float):
        self.grid, self.ceilings, self.clock, self.seconds_per_point = grid, ceilings, clock, seconds_per_point
        self.device, self.device_name = common.device(), common.device_name()
        self.on_gpu = self.device.type == "cuda"
        self.dtype = common.dtype()
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        # points with their rows, all rows, and what was left out
        self.measured, self.rows, self.skipped, self.refused, self.not_run = [], [], [], [], []

    def measure_all(self, groups: list[list[AttentionPoint]]) -> None:
        """Measures group after group; a signal to stop keeps what was measured until then."""
        for i, points in enumerate(common.progress(groups, "groups")):
            try:
                for point, rows in self.measure_group(points):
                    self.measured.append((point, rows))
                    say(table_line(point, rows))
            except KeyboardInterrupt:
                self.not_run += self.missing(groups[i:])
                say("stopped by a signal: the rest is what was measured until then")
                return
            except Exception as error:
                traceback.print_exc()
                reason = {"provider": "every provider", "reason": common.described(error)}
                self.refused += [{"point": point} | reason for point in self.missing([points])]

    def missing(self, groups: list[list[AttentionPoint]]) -> list[str]:
        done = {point for point, _ in self.measured}
        return [str(point) for points in groups for point in points if point not in done]

    def measure_group(self, points: list[AttentionPoint]) -> Iterator[tuple[AttentionPoint, Rows]]:
        """Measures points of one (model, batch, length), which share their data; yields each point and its rows."""
        canvas, full_recompute = None, None
        for point in points:
            if self.clock.left < 0:
                self.not_run.append(str(point))
                continue
            if self.too_slow(attention.necessary_flops(point)):
                self.skip(point, "every provider", "too slow here")
                continue
            try:
                canvas = canvas or self.canvas(point)
                rows = self.measure(LayerCase(canvas, point), with_full=full_recompute is None)
            except torch.OutOfMemoryError:
                self.skip(point, "every provider", "does not fit this device's memory")
                continue
            # a full recompute takes the same time whatever is active, so a group measures it once
            if full_recompute is None:
                full_recompute = [row for row in rows if row["family"] == "full recompute"]
            else:
                rows += [{**row, **self.achieved(point, row["ms"]), "active": point.active} for row in full_recompute]
            best = min((row["ms"] for row in rows if row["family"] in FAMILIES), default=None)
            for row in rows:
                row["ratio_to_best"] = best and best / row["ms"]
            self.rows += rows
            yield point, rows

    def canvas(self, point: AttentionPoint) -> Canvas:
        """Data for a group: as many sets as a cold L2 needs and the memory can hold.

        Raises:
            torch.OutOfMemoryError: not even one fits.
        """
        one = Canvas.bytes_per_set(point, self.dtype.itemsize)
        if self.on_gpu:
            torch.cuda.empty_cache()
            free, l2 = torch.cuda.mem_get_info()[0], torch.cuda.get_device_properties(0).L2_cache_size
            sets = 1 + int(3 * l2 / Canvas.cache_bytes(point, self.dtype.itemsize))
        else:
            free, sets = common.available_memory(), 3
        # beside the data there are the copies of all keys that the authors' way makes
        sets = min(sets, int((0.9 * free - 3 * one) / one))
        if sets < 1:
            raise torch.OutOfMemoryError(f"{point}: no room for its data")
        return Canvas(point, sets=sets, device=self.device, dtype=self.dtype)

    def measure(self, case: LayerCase, *, with_full: bool) -> Rows:
        """Checks all providers at one point, times those that pass, and returns their rows."""
        point = case.point
        if with_full and self.too_slow(attention.full_recompute_flops(point)):
            self.skip(point, "full recompute", "too slow here")
            with_full = False
        flex = {
            "cache": (point.batch, point.seqlen, point.active) in self.grid.flex,
            "full": not point.ragged and (point.batch, point.seqlen) in {shape[:2] for shape in self.grid.flex},
        }
        contestants = [attention.ours(case), *attention.rivals(case, with_full=with_full, flex=flex)]
        if self.on_gpu:
            contestants.append(attention.ours(case, attention_alone=True))
        timers = self.checked_timers(case, contestants)
        common.interleave([t for _, t, _ in timers], seconds=self.seconds_per_point, samples=self.grid.samples)
        rows = []
        for provider, timer, error in timers:
            samples = timer.milliseconds()
            p20, ms, p80 = common.quantiles(samples)
            if provider.family == "part":
                # ours was first: its row is there unless it was refused
                alone = self.achieved(point, ms, attention_alone=True) | {"ms": ms}
                keys = ("ms", "gbps", "fraction_of_ceiling")
                for row in rows:
                    row |= {f"attention_{key}": alone[key] for key in keys} if row["family"] == "ours" else {}
                continue
            rows.append(
                {
                    **asdict(point),
                    "provider": provider.name,
                    "family": provider.family,
                    "impl": provider.impl,
                    "device": self.device_name,
                    "dtype": self.dtype_name,
                    "ms": ms,
                    "ms_p20": p20,
                    "ms_p80": p80,
                    "samples": len(samples),
                    **self.achieved(point, ms),
                    "relative_error": error,
                    "attention_ms": None,
                    "attention_gbps": None,
                    "attention_fraction_of_ceiling": None,
                }
            )
        return rows

    def checked_timers(self, case: LayerCase, contestants: list[Provider]) -> list[tuple]:
        """(provider, timer, relative error) of each provider that agrees with the oracle; notes the others."""
        pool, sets = None, len(case.canvas.q)
        chosen, expected = case.oracle()
        timers = []
        for provider in contestants:
            restore = None
            if self.on_gpu and not timers:
                # a new one after a failed graph: PyTorch retires a pool for good once all of its graphs are gone
                pool = torch.cuda.graph_pool_handle()
            try:
                timer = common.make_timer(provider.run, sets, pool)
                # the part of ours that writes no cache gets the right one
                restore = case.poison() if provider.family != "part" else None
                error = attention.relative_error(provider.unpack(timer.output()), chosen, expected)
            except Exception as problem:
                # such as no kernel for these shapes, or not enough memory
                reason = common.described(problem)
                if provider.family in ("ours", "part"):
                    self.refuse(case.point, provider, reason)
                else:
                    self.skip(case.point, provider.name, reason)
                continue
            finally:
                if restore:
                    restore()
            if error <= attention.TOLERANCES[self.dtype]:
                timers.append((provider, timer, error))
            else:
                self.refuse(case.point, provider, f"relative error {error:.1e} against float64")
        return timers

    def achieved(self, point: AttentionPoint, ms: float, *, attention_alone: bool = False) -> dict[str, float]:
        moved = attention.necessary_bytes(point, self.dtype.itemsize, attention_alone=attention_alone)
        flops = attention.necessary_flops(point)
        floor = 1e3 * max(moved / self.ceilings["bandwidth"], flops / self.ceilings["flops"])
        return {
            "gbps": moved / ms / 1e6,
            "tflops": flops / ms / 1e9,
            "floor_ms": floor,
            "fraction_of_ceiling": floor / ms,
        }

    def too_slow(self, flops: int) -> bool:
        return flops / self.ceilings["flops"] > self.grid.longest_call

    def skip(self, point: AttentionPoint, provider: str, reason: str) -> None:
        self.skipped.append({"point": str(point), "provider": provider, "reason": reason})

    def refuse(self, point: AttentionPoint, provider: Provider, reason: str) -> None:
        self.refused.append({"point": str(point), "provider": provider.name, "reason": reason})
        say(f"REFUSED, not timed: {provider.name} at {point}: {reason}")


# ---- the table

COLUMNS = (
    ("batch", 5, lambda row: f"{row['batch']}"),
    ("length", 7, lambda row: f"{row['seqlen']}"),
    ("active", 7, lambda row: f"{row['active']}{'r' if row['ragged'] else ' '}"),
    ("device", 7, lambda row: "CPU" if row["device"].startswith("CPU") else "GPU"),
    ("impl", 8, lambda row: "PyTorch" if row["device"].startswith("CPU") else "Triton"),
    ("ms", 10, lambda row: f"{row['ms']:.4g}"),
    ("20 .. 80 %", 18, lambda row: f"{row['ms_p20']:.4g} .. {row['ms_p80']:.4g}"),
    ("attn ms", 9, lambda row: f"{row['attention_ms']:.4g}"),
    ("GB/s", 8, lambda row: f"{row['gbps']:.1f}"),
    ("TFLOP/s", 9, lambda row: f"{row['tflops']:.3f}"),
    # a share of the ceiling says little if the floor is shorter than a launch
    ("ceiling", 8, lambda row: f"{row['fraction_of_ceiling']:.0%}"),
    ("floor ms", 10, lambda row: f"{row['floor_ms']:.4g}"),
    ("| full", 10, lambda row: f"{row['faster'][0]:.2f}x"),
    ("authors", 9, lambda row: f"{row['faster'][1]:.2f}x"),
    ("cheap fix", 10, lambda row: f"{row['faster'][2]:.2f}x"),
    ("best", 8, lambda row: f"{row['faster'][3]:.2f}x"),
)
HEADER = f"{'| times faster than':>{sum(width for _, width, _ in COLUMNS) - 5}}\n{'model':9}{common.heads(COLUMNS)}"


def table_line(point: AttentionPoint, rows: Rows) -> str:
    """One line of the table: ours, and how many times faster it is than the best provider of each family."""
    ours = next((row for row in rows if row["family"] == "ours"), None)
    if ours is None:
        return f"{point}: not timed"
    faster = [faster_than(rows, family) for family in (*FAMILIES, None)]
    return f"{point.model:9}{common.cells(COLUMNS, ours | {'faster': faster})}"


def faster_than(rows: Rows, family: str | None = None) -> float | None:
    """How many times faster ours is than the best provider of a family (None: of all) at one point."""
    ours = [row["ms"] for row in rows if row["family"] == "ours"]
    others = [row["ms"] for row in rows if row["family"] in ((family,) if family else FAMILIES)]
    return min(others) / ours[0] if ours and others else None


def summarise(points: list[tuple[AttentionPoint, Rows]]) -> dict:
    """How many times faster ours is: {scope: {family or "best alternative": {"geomean", "least", "points"}}}."""
    summary = {}
    for scope in ("active < length / 4", "all points"):
        inside = [rows for point, rows in points if scope == "all points" or point.active < point.seqlen / 4]
        summary[scope] = {}
        for family in (*FAMILIES, None):
            ratios = [ratio for rows in inside if (ratio := faster_than(rows, family))]
            summary[scope][family or "best alternative"] = {
                "geomean": common.geomean(ratios),
                "least": min(ratios, default=None),
                "points": len(ratios),
            }
    return summary


def print_summary(summary: dict) -> None:
    say("\ntimes faster than (geometric mean, minimum, number of points):")
    say(f"{'':20}" + "".join(f"{scope:>30}" for scope in summary))
    for family in (*FAMILIES, "best alternative"):
        cells = [scope[family] for scope in summary.values()]
        text = [f"{c['geomean']:.2f}x   {c['least']:.2f}x   {c['points']:3d}" if c["points"] else "-" for c in cells]
        say(f"{family:20}" + "".join(f"{cell:>30}" for cell in text))


# ---- the run


def print_environment(env: dict, ceilings: dict, bench: AttentionBench) -> None:
    say(f"attention of one layer (RoPE, cache write, attention), {bench.dtype_name}, on {env['device']}")
    say(", ".join(f"{key} {env[key]}" for key in ("torch", "triton", "commit", "threads", "date")))
    if not bench.on_gpu:
        say("no GPU: every provider here is PyTorch on a CPU, dkv.kernels too; nothing below is a GPU figure")
        if env["load"] > 0.5 * env["threads"]:
            say(f"other programs keep this machine busy (load {env['load']}): expect noise")
    say(common.describe(ceilings))


def print_left_out(bench: AttentionBench) -> None:
    skipped = {}
    for entry in bench.skipped:
        skipped.setdefault((entry["provider"], entry["reason"]), []).append(entry["point"])
    for (provider, reason), points in skipped.items():
        more = f" and {len(points) - 4} more" * (len(points) > 4)
        say(f"skipped: {provider}, {reason}: {'; '.join(points[:4])}{more}")
    if bench.not_run:
        say(f"not run, the budget was used up: {'; '.join(bench.not_run)}")


def parse_arguments(argv: list[str] | None) -> Namespace:
    parser = common.argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a small part of the grid")
    parser.add_argument("--points", type=attention.parse_points, metavar="POINT,...", help="instead of the grid")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no point after this time")
    parser.add_argument("--no-plot", action="store_true", help="write no picture")
    common.add_folder(parser)
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if torch.cuda.is_available():
        grid = GPU_QUICK if arguments.quick else GPU
    else:
        grid = CPU_QUICK if arguments.quick else CPU
    clock = common.Clock(arguments.budget or grid.budget)
    points = arguments.points
    groups = [[point] for point in points] if points else list(points_of(grid))
    env, ceilings = common.environment(), common.measure_ceilings()
    seconds_per_point = grid.timing_share * clock.left / sum(map(len, groups))
    bench = AttentionBench(grid, ceilings, clock, seconds_per_point=seconds_per_point)
    print_environment(env, ceilings, bench)
    say(HEADER)
    bench.measure_all(groups)
    print_left_out(bench)
    summary = summarise(bench.measured)
    print_summary(summary)
    record = {
        **{key: env[key] for key in ("device", "torch", "triton", "commit")},
        "impl": attention.our_impl(bench.device),
        "dtype": bench.dtype_name,
        "geomean_vs_best": summary["all points"]["best alternative"]["geomean"],
        "seconds": clock.spent,
        "summary": summary,
        "ceilings": ceilings,
        "environment": env,
        "refused": bench.refused,
        "not_run": bench.not_run,
        "skipped": bench.skipped,
    }
    kind = "_points" if points else "_quick" if arguments.quick else ""
    stem = common.results_folder(arguments.out) / f"attn_speed{kind}"
    common.finish(record, bench.rows, stem)
    if not arguments.no_plot and bench.rows:
        plots.attention(bench.rows, env, stem.with_suffix(".png"))
    return 1 if bench.refused or not bench.measured else 0


if __name__ == "__main__":
    common.stop_on_sigterm()
    sys.exit(main())
