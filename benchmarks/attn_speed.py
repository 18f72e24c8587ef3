"""How fast is the attention part of one layer: `dkv.kernels` against the alternatives, at the models' true shapes.

    python benchmarks/attn_speed.py                                  the whole grid
    python benchmarks/attn_speed.py --quick                          a small part of it
    python benchmarks/attn_speed.py --points LLaDA-8B:8:2048:32      MODEL:BATCH:LENGTH:ACTIVE[:ragged], comma-separated

On a GPU in bfloat16, by replays of CUDA graphs over rotated buffers; without one in float32, where `dkv.kernels` is its
PyTorch implementation: such a run compares algorithms, not kernels. providers.py says what each provider does. Every
provider is checked against a float64 oracle before it is timed; one that fails is not timed, and the exit status is 1.

A table goes to stdout, with one JSON object as its last line; JSON, CSV and a plot go to benchmarks/results/<device>/.
In a row, `gbps` and `tflops` are of the necessary bytes and flops of the job, `fraction_of_ceiling` is the time that
these need at the ceilings measured in the same run over the measured time, and `ratio_to_best` is the time of the best
provider which is not ours over this one's: above 1, it beats them all.
"""

import argparse
import json
import signal
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

# importing PyTorch is part of the time that a run takes
START = time.monotonic()
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import common  # noqa: E402
import providers  # noqa: E402
import torch  # noqa: E402
from common import say  # noqa: E402
from providers import MODELS, Canvas, Case, Point  # noqa: E402

ACTIVES = (1, 8, 32, 64, 128, 256, "all")
FAMILIES = ("full recompute", "authors' way", "cheap fix")
# the keys of a row in the last line of stdout; the files have them all
SHORT_ROW = (
    "model",
    "batch",
    "seqlen",
    "active",
    "ragged",
    "provider",
    "ms",
    "gbps",
    "tflops",
    "fraction_of_ceiling",
    "ratio_to_best",
)


@dataclass(frozen=True)
class Plan:
    """What a run measures: (batch, length, actives) in the order of their importance, and how long it takes for it."""

    groups: tuple
    ragged: tuple
    flex: tuple
    budget: float
    # each point gets an equal share of this part of the budget, the rest is for making data and checking
    timing_share: float
    samples: tuple
    # a call that must take longer than this at the measured ceiling is skipped
    longest_call: float


FEW = (1, 32, 128)
GPU = Plan(
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
# float32 on a few cores; below a length of 1024 a batch of one measures the interpreter more than the attention
CPU = Plan(
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


def points_of(plan, models):
    """Groups of points that share their data; in each the full step first, where a full recompute is measured too."""
    shapes = [(group, False) for group in plan.groups]
    shapes[2:2] = [(group, True) for group in plan.ragged]
    for (batch, seqlen, actives), ragged in shapes:
        numbers = sorted({seqlen if a == "all" else a for a in actives if a == "all" or a < seqlen}, reverse=True)
        for model in models:
            yield [Point(model, batch, seqlen, active, ragged) for active in numbers]


class Bench:
    """One run: measures points and keeps the rows, and what was skipped, refused or not reached."""

    def __init__(self, plan, ceilings, clock, *, seconds_per_point):
        self.plan, self.ceilings, self.clock, self.seconds_per_point = plan, ceilings, clock, seconds_per_point
        self.device, self.device_name = common.device(), common.device_name()
        self.on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.rows, self.skipped, self.refused, self.not_run = [], [], [], []

    def measure_group(self, points):
        """Measures points of one (model, batch, length), which share their data; yields each point and its rows."""
        canvas, full_recompute = None, None
        for point in points:
            if self.clock.left < 0:
                self.not_run.append(str(point))
                continue
            if self.too_slow(providers.necessary_flops(point)):
                self.skip(point, "every provider", "too slow here")
                continue
            try:
                if canvas is None:
                    canvas = self.canvas(point)
                if canvas is None:
                    self.skip(point, "every provider", "does not fit this device's memory")
                    continue
                rows = self.measure(Case(canvas, point), with_full=full_recompute is None)
            except torch.OutOfMemoryError:
                self.skip(point, "every provider", "does not fit this device's memory")
                continue
            # a full recompute takes the same time whatever is active: measured once in a group
            if full_recompute is None:
                full_recompute = [row for row in rows if row["family"] == "full recompute"]
            else:
                rows += [{**row, **self.achieved(point, row["ms"]), "active": point.active} for row in full_recompute]
            best = min((row["ms"] for row in rows if row["family"] in FAMILIES), default=None)
            for row in rows:
                row["ratio_to_best"] = best and best / row["ms"]
            self.rows += rows
            yield point, rows

    def canvas(self, point):
        """Data for a group: as many sets as a cold L2 demands and the memory bears; None if not even one fits."""
        one = Canvas.bytes_per_set(point, self.dtype.itemsize)
        if self.on_gpu:
            torch.cuda.empty_cache()
            free, l2 = torch.cuda.mem_get_info()[0], torch.cuda.get_device_properties(0).L2_cache_size
            sets = 1 + int(3 * l2 / Canvas.cache_bytes(point, self.dtype.itemsize))
        else:
            free, sets = common.available_memory(), 3
        # beside the data: the copies of all keys that the authors' way makes
        sets = min(sets, int((0.9 * free - 3 * one) / one))
        return Canvas(point, sets=sets, device=self.device, dtype=self.dtype) if sets > 0 else None

    def measure(self, case, *, with_full):
        """Checks all providers at one point, times those that pass, and returns their rows."""
        point = case.point
        if with_full and self.too_slow(providers.full_recompute_flops(point)):
            self.skip(point, "full recompute", "too slow here")
            with_full = False
        flex = {"cache": (point.batch, point.seqlen, point.active) in self.plan.flex}
        flex["full"] = not point.ragged and (point.batch, point.seqlen) in {shape[:2] for shape in self.plan.flex}
        contestants = [providers.ours(case), *providers.rivals(case, with_full=with_full, flex=flex)]
        if self.on_gpu:
            contestants.append(providers.ours_attention_alone(case))
        timers = self.checked_timers(case, contestants)
        least, most = self.plan.samples
        common.interleave([timer for _, timer, _ in timers], seconds=self.seconds_per_point, least=least, most=most)
        rows = []
        for provider, timer, error in timers:
            samples = timer.milliseconds()
            p20, ms, p80 = common.quantiles(samples)
            if provider.family == "part":
                # ours comes first, so its row is there unless it was refused
                alone = self.achieved(point, ms, attention_alone=True) | {"ms": ms}
                keys = ("ms", "gbps", "fraction_of_ceiling")
                for row in rows:
                    row |= {f"attention_{key}": alone[key] for key in keys} if row["family"] == "ours" else {}
                continue
            rows.append(
                {
                    "model": point.model,
                    "batch": point.batch,
                    "seqlen": point.seqlen,
                    "active": point.active,
                    "ragged": point.ragged,
                    "provider": provider.name,
                    "family": provider.family,
                    "impl": provider.impl,
                    "device": self.device_name,
                    "dtype": str(self.dtype).removeprefix("torch."),
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

    def checked_timers(self, case, contestants):
        """(provider, timer, relative error) of each provider that agrees with the oracle; the others are recorded."""
        pool, sets = None, len(case.canvas.q)
        chosen, expected = case.oracle()
        timers = []
        for provider in contestants:
            restore = None
            if self.on_gpu and not timers:
                # another one where a graph failed: PyTorch takes a pool back for good once all of its graphs are gone
                pool = torch.cuda.graph_pool_handle()
            try:
                timer = self.timer(provider.run, sets, pool)
                # what comes without a cache write is given the right cache
                restore = case.poison() if provider.family != "part" else None
                error = providers.relative_error(provider.unpack(timer.output()), chosen, expected)
            except Exception as problem:
                # no kernel for these shapes, or not enough memory
                reason = common.described(problem)
                if provider.family in ("ours", "part"):
                    self.refuse(case.point, provider, reason)
                else:
                    self.skip(case.point, provider.name, reason)
                continue
            finally:
                if restore:
                    restore()
            if error <= providers.TOLERANCES[self.dtype]:
                timers.append((provider, timer, error))
            else:
                self.refuse(case.point, provider, f"relative error {error:.1e} against float64")
        return timers

    def timer(self, run, sets, pool):
        return common.GraphTimer(run, sets, pool=pool) if self.on_gpu else common.HostTimer(run, sets)

    def achieved(self, point, ms, *, attention_alone=False):
        moved = providers.necessary_bytes(point, self.dtype.itemsize, attention_alone=attention_alone)
        flops = providers.necessary_flops(point)
        floor = 1e3 * max(moved / self.ceilings["bandwidth"], flops / self.ceilings["flops"])
        return {
            "gbps": moved / ms / 1e6,
            "tflops": flops / ms / 1e9,
            "floor_ms": floor,
            "fraction_of_ceiling": floor / ms,
        }

    def too_slow(self, flops):
        return flops / self.ceilings["flops"] > self.plan.longest_call

    def skip(self, point, provider, reason):
        self.skipped.append({"point": str(point), "provider": provider, "reason": reason})

    def refuse(self, point, provider, reason):
        self.refused.append({"point": str(point), "provider": provider.name, "reason": reason})
        say(f"REFUSED, not timed: {provider.name} at {point}: {reason}")


# ---- what is printed


COLUMNS = (
    f"{'model':9} {'batch':>5} {'length':>6} {'active':>6} {'device':6} {'impl':8} "
    f"{'ms':>9} {'20 .. 80 %':>17} {'attn ms':>8} {'GB/s':>7} {'TFLOP/s':>8} {'ceiling':>7} {'us':>9} {'floor':>8} |"
)
HEADER = (
    f"{'ours':>{len(COLUMNS) - 2}} | times faster than\n"
    f"{COLUMNS} {'full':>8} {'authors':>8} {'cheap fix':>9} {'best':>6}"
)


def table_line(point, rows):
    """One line of the table: ours, and how many times faster it is than the best provider of each family."""
    ours = next((row for row in rows if row["family"] == "ours"), None)
    if ours is None:
        return f"{point}: not timed"
    device, impl = ("CPU", "PyTorch") if ours["device"].startswith("CPU") else ("GPU", "Triton")
    cells = [f"{ratio:.2f}x" if (ratio := faster_than(rows, family)) else "-" for family in (*FAMILIES, None)]
    spread = f"{ours['ms_p20']:.4g} .. {ours['ms_p80']:.4g}"
    alone = f"{ours['attention_ms']:.4g}" if ours["attention_ms"] else "-"
    # a share of the ceiling says little where the floor is shorter than a launch
    us, floor = 1e3 * ours["ms"], 1e3 * ours["ms"] * ours["fraction_of_ceiling"]
    return (
        f"{point.model:9} {point.batch:5} {point.seqlen:6} {point.active:5}{'r' if point.ragged else ' '} "
        f"{device:6} {impl:8} {ours['ms']:9.4g} {spread:>17} {alone:>8} {ours['gbps']:7.1f} {ours['tflops']:8.3f} "
        f"{ours['fraction_of_ceiling']:7.0%} {us:9.1f} {floor:8.1f} | "
        f"{cells[0]:>8} {cells[1]:>8} {cells[2]:>9} {cells[3]:>6}"
    )


def faster_than(rows, family=None):
    """How many times faster ours is than the best provider of a family (None: of all) among the rows of one point."""
    ours = [row["ms"] for row in rows if row["family"] == "ours"]
    others = [row["ms"] for row in rows if row["family"] in ((family,) if family else FAMILIES)]
    return min(others) / ours[0] if ours and others else None


def summarise(points):
    """How many times ours is faster: {scope: {family or "best alternative": {"geomean", "least", "points"}}}."""
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


def print_summary(summary):
    say("\nours is so many times faster (geometric mean, least, number of points):")
    say(f"{'':20}" + "".join(f"{scope:>30}" for scope in summary))
    for family in (*FAMILIES, "best alternative"):
        cells = [scope[family] for scope in summary.values()]
        text = [f"{c['geomean']:.2f}x   {c['least']:.2f}x   {c['points']:3d}" if c["points"] else "-" for c in cells]
        say(f"{family:20}" + "".join(f"{cell:>30}" for cell in text))


def print_lint(quick):
    """The registers, shared memory and spills of the kernels as compiled for GPUs: what a run without one can say."""
    import kernel_lint

    cases = kernel_lint.tuned_cases((90,), ("LLaDA",))
    rows = kernel_lint.run_cases(cases[::3] if quick else cases)
    say("\nno GPU was measured above; what the compiler says of the Triton kernels:")
    say(kernel_lint.table(rows))
    return rows


# ---- the run


def measure_all(bench, groups, results):
    """Measures group after group into `results`, a list of (point, rows); a signal to stop ends it in good order."""
    for i, points in enumerate(common.progress(groups, "groups")):
        try:
            for point, rows in bench.measure_group(points):
                results.append((point, rows))
                say(table_line(point, rows))
        except KeyboardInterrupt:
            done = {point for point, _ in results}
            bench.not_run += [str(point) for group in groups[i:] for point in group if point not in done]
            say("stopped by a signal: what follows is what was measured until then")
            return
        except Exception as error:
            traceback.print_exc()
            done = {point for point, _ in results}
            bench.refused += [
                {"point": str(point), "provider": "every provider", "reason": common.described(error)}
                for point in points
                if point not in done
            ]


def parse_points(text):
    points = []
    for item in text.split(","):
        model, batch, seqlen, active, *ragged = item.split(":")
        if model not in MODELS or ragged not in ([], ["ragged"]) or (ragged and int(batch) < 2):
            raise argparse.ArgumentTypeError(
                f"a point is MODEL:BATCH:LENGTH:ACTIVE[:ragged] with MODEL one of {', '.join(MODELS)}, "
                f"and a batch of at least 2 if ragged; got {item!r}"
            )
        seqlen = int(seqlen)
        points.append(Point(model, int(batch), seqlen, seqlen if active == "all" else int(active), bool(ragged)))
    return [[point] for point in points]


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small part of the grid")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: both")
    parser.add_argument("--points", type=parse_points, metavar="POINT,...", help="these points, in place of the grid")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no point after this time")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    parser.add_argument("--no-lint", action="store_true", help="without a GPU: do not compile the kernels")
    parser.add_argument("--no-plot", action="store_true", help="write no picture")
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv=None, start=None):
    arguments = parse_arguments(argv)
    if torch.cuda.is_available():
        plan = GPU_QUICK if arguments.quick else GPU
    else:
        plan = CPU_QUICK if arguments.quick else CPU
    clock = common.Clock(arguments.budget or plan.budget, start)
    groups = arguments.points or list(points_of(plan, arguments.models))
    number = sum(map(len, groups))

    env, ceilings = common.environment(), common.measure_ceilings()
    bench = Bench(plan, ceilings, clock, seconds_per_point=plan.timing_share * clock.left / number)
    dtype = str(bench.dtype).removeprefix("torch.")
    say(f"attention of one layer (RoPE, cache write, attention), {dtype}, on {env['device']}")
    say(", ".join(f"{key} {env[key]}" for key in ("torch", "triton", "commit", "threads", "date")))
    if not bench.on_gpu:
        say("no GPU: every provider here is PyTorch on a CPU, dkv.kernels too; nothing below is a GPU figure")
        if env["load"] > 0.5 * env["threads"]:
            say(f"other programs keep this machine busy (load {env['load']}): expect noise")
    bandwidth, flops = ceilings["bandwidth"], ceilings["flops"]
    say(f"ceilings measured now: copy {bandwidth / 1e9:.1f} GB/s, matrix product {flops / 1e12:.3g} TFLOP/s")
    say(HEADER)

    results = []
    measure_all(bench, groups, results)
    skipped = {}
    for entry in bench.skipped:
        skipped.setdefault((entry["provider"], entry["reason"]), []).append(entry["point"])
    for (provider, reason), points in skipped.items():
        say(
            f"skipped: {provider}, {reason}: {'; '.join(points[:4])}"
            + f" and {len(points) - 4} more" * (len(points) > 4)
        )
    if bench.not_run:
        say(f"not run, the budget was used up: {'; '.join(bench.not_run)}")
    summary = summarise(results)
    print_summary(summary)
    lint = None
    if not (bench.on_gpu or arguments.no_lint):
        lint = print_lint(arguments.quick)

    record = {
        "device": env["device"],
        "impl": providers.our_impl(bench.device),
        "torch": env["torch"],
        "triton": env["triton"],
        "commit": env["commit"],
        "dtype": dtype,
        "geomean_vs_best": summary["all points"]["best alternative"]["geomean"],
        "seconds": clock.spent,
        "summary": summary,
        "ceilings": ceilings,
        "refused": bench.refused,
        "not_run": bench.not_run,
    }
    kind = "_points" if arguments.points else "_quick" if arguments.quick else ""
    stem = (arguments.out or common.RESULTS / common.device_slug()) / f"attn_speed{kind}"
    common.write_json(
        stem.with_suffix(".json"),
        record | {"environment": env, "skipped": bench.skipped, "rows": bench.rows, "compile_lint": lint},
    )
    common.write_csv(stem.with_suffix(".csv"), bench.rows)
    say(f"\nwritten: {stem}.json, .csv ({clock.spent:.0f} s)")
    if not arguments.no_plot and bench.rows:
        import plots

        plots.attention(bench.rows, env, stem.with_suffix(".png"))
    short = [{key: row[key] for key in SHORT_ROW} for row in bench.rows]
    print(json.dumps(common.rounded(record | {"rows": short})), flush=True)
    return 1 if bench.refused or not results else 0


def stop(*_):
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main(start=START))
