"""Measures the products of a layer, by the library and by our own kernels, and writes kernels/fused_products.json.

    python benchmarks/warm.py --sweep                                   compiles all candidates beforehand
    python benchmarks/product_sweep.py --table kernels/fused_products.json    measures them, and writes the table
    python benchmarks/product_sweep.py --library                        the library's products alone
    ... [--rows 16,32] [--budget SECONDS] [--out FILE]                  FILE: each measurement as a JSON line

The models are LLaDA-8B and Dream-7B. All calls are timed in turn, as graphs, and find their weights in memory, not in a
cache. On a GPU the library runs with each of three settings: PyTorch's own choice, cuBLASLt with a workspace of 32 MiB,
and partial sums in float32 alone.

A sweep times the four products of a layer at several numbers of rows. The library's way is F.linear and the launch
behind it (RoPE and cache write, SwiGLU, or residual and norm: over the four, each launch of a layer but attention's
once). Our kernel does the same; each candidate launch is first compared with its PyTorch twin, on poisoned outputs. One
that is wrong or fails is reported and left out, and the exit status is 1, as it is if nothing was measured.

The table has the best launch of either way for each number of rows at which all four products of a model were measured,
and the rows of the old table for other compute capabilities. It is written after each such number, so that a budget may
end at any time. Without a GPU all of this is a rehearsal, with small weights and twins in place of kernels: its table
says nothing about a GPU and applies to none.

--library times F.linear by itself, for these four products and the head. `floor` is the time of the bytes (weight,
inputs, outputs) or of the operations at the measured ceilings, whichever is longer.
"""

import itertools
import math
import os
import sys
import traceback
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import common
from benchmarks.harness.common import Clock, say
from benchmarks.harness.models import SCALED_DOWN, TRUE_SIZE, model_config
from benchmarks.harness.products import (
    KINDS,
    ROWS_CPU,
    ROWS_GPU,
    SETTINGS,
    Product,
    cases,
    cold_copies,
    library_setting,
    parse_rows,
    shapes,
)
from dkv.kernels import configs

KEPT = ("device", "date", "torch", "triton", "commit")
# random rows of a weight, repeated to make it quickly; the number divides all shapes
WEIGHT_ROWS = 64

Found = list[tuple[dict[str, Any], float]]


class Sweep:
    """One run on this device."""

    def __init__(self, arguments: Namespace, clock: Clock):
        self.arguments, self.clock, self.device = arguments, clock, common.device()
        self.cuda = self.device.type == "cuda"
        self.dtype = common.dtype()
        self.settings = tuple(SETTINGS) if self.cuda else ("default",)
        self.models = {
            name: model_config(config) for name, config in (TRUE_SIZE if self.cuda else SCALED_DOWN).values()
        }
        self.rows = arguments.rows or (ROWS_GPU if self.cuda else ROWS_CPU)
        self.environment = common.environment()
        common.write_line(arguments.out, self.environment, "w")
        say(f"{self.environment['device']}, commit {self.environment['commit']}")

    def pool(self) -> tuple[int, int] | None:
        return torch.cuda.graph_pool_handle() if self.cuda else None

    # ---- both ways

    def run(self) -> int:
        """Measures, prints and writes the table; returns the exit status."""
        arch, table, wrong = configs.architecture(self.device), [], False
        measured_with = {key: self.environment[key] for key in KEPT}
        others = [row for row in configs.read_products() if row["arch"] != arch]
        header = f"{'model':12}{'product':10}{'rows':>5}{'library us':>12}{'ours us':>10}{'ours/library':>14}"
        say(header + "  setting; config")
        for rows, (name, model) in itertools.product(self.rows, self.models.items()):
            entries = []
            copies = None if self.cuda else 2
            for product, case, candidates in cases(model, rows, device=self.device, dtype=self.dtype, copies=copies):
                if self.clock.left < 0:
                    say(f"{name:12}{product:10}{rows:5}  not run, the budget is used up")
                    return 1 if wrong or not table else 0
                entry, failed = self.compare({"model": name, "product": product, "rows": rows}, case, candidates)
                wrong |= failed
                entries += [entry] if entry else []
            if len(entries) == len(KINDS):
                table += [row | measured_with for row in entries]
                if self.arguments.table:
                    common.write_json(self.arguments.table, {"products": others + table})
        return 1 if wrong or not table else 0

    def compare(self, names: dict[str, Any], case: Product, candidates: list) -> tuple[dict[str, Any] | None, bool]:
        """(the row of the table, None if a way has no result; whether a launch or setting failed) of a product."""
        title = f"{names['model']:12}{names['product']:10}{names['rows']:5}"
        found, failed = measure(case, candidates, self.settings, self.pool())
        for tried, microseconds in found:
            common.write_line(self.arguments.out, names | tried | {"us": microseconds})
        for tried, error in failed:
            common.write_line(self.arguments.out, names | tried | {"error": error})
            say(f"{title}  {tried}: {error}")
        ways = [[row for row in found if key in row[0]] for key in ("setting", "config")]
        if not all(ways):
            return None, bool(failed)
        (setting, library_us), (config, us) = (min(way, key=lambda row: row[1]) for way in ways)
        text = ", ".join(map(str, config["config"].values()))
        say(f"{title}{library_us:12.1f}{us:10.1f}{us / library_us:14.2f}  {setting['setting']}; {text}")
        row = {"arch": configs.architecture(self.device), "kind": case.kind}
        row |= dict(zip(("out_features", "in_features"), case.shape, strict=True)) | {"rows": names["rows"]}
        return row | config | {"us": us, "library_us": library_us}, bool(failed)

    # ---- the library alone

    def run_library(self) -> int:
        """Measures, prints and writes the library's products; returns the exit status."""
        ceilings = common.measure_ceilings()
        say(common.describe(ceilings))
        header = (
            f"{'model':12}{'product':10}{'weight':>16}{'rows':>6}{'us':>11}{'floor':>10}{'of floor':>10}{'GB/s':>8}"
        )
        say(header + "  setting")
        # the models alternate, so that a short budget leaves out neither
        todo = [(product, name) for product in (*KINDS, "head") for name in self.models]
        for i, (product, name) in enumerate(common.progress(todo, "weights")):
            if self.clock.left < 0 and i:
                say(f"not run, the budget is used up: {name}, {product}")
                continue
            shape = shapes(self.models[name])[product]
            seconds = self.clock.left / (len(todo) - i)
            for (setting, rows), ms in self.library_milliseconds(shape, seconds).items():
                moved = self.dtype.itemsize * (math.prod(shape) + rows * sum(shape))
                operations = 2 * rows * math.prod(shape)
                floor = 1e3 * max(moved / ceilings["bandwidth"], operations / ceilings["flops"])
                names = {"model": name, "product": product, "rows": rows, "setting": setting}
                row = {
                    "us": 1e3 * ms,
                    "floor_us": 1e3 * floor,
                    "fraction_of_floor": floor / ms,
                    "gbps": moved / ms / 1e6,
                }
                common.write_line(self.arguments.out, names | row)
                say(
                    f"{name:12}{product:10}{'{} x {}'.format(*shape):>16}{rows:6}{row['us']:11.1f}"
                    f"{row['floor_us']:10.1f}{row['fraction_of_floor']:10.0%}{row['gbps']:8.0f}  {setting}"
                )
        return 0

    def library_milliseconds(self, shape: tuple[int, int], seconds: float) -> dict[tuple[str, int], float]:
        """{(setting, rows): median milliseconds} of products with a weight of this shape."""
        like, copies = {"device": self.device, "dtype": self.dtype}, cold_copies(shape, self.dtype)
        weights = torch.randn(1, WEIGHT_ROWS, shape[1], **like).repeat(copies, shape[0] // WEIGHT_ROWS, 1)
        timers, pool = {}, self.pool()
        for setting, rows in itertools.product(self.settings, self.rows):
            x = torch.randn(rows, shape[1], **like)
            with library_setting(setting):
                timer = common.make_timer(lambda i, x=x: F.linear(x, weights[i]), copies, pool)
                timer.output()
            timers[setting, rows] = timer
        common.interleave(list(timers.values()), seconds=seconds, samples=(3, 30))
        return {key: common.quantiles(timer.milliseconds())[1] for key, timer in timers.items()}


def measure(
    case: Product, candidates: list[configs.ProductConfig], settings: tuple[str, ...], pool: tuple[int, int] | None
) -> tuple[Found, list[tuple[dict[str, Any], str]]]:
    """([(tried, microseconds)], [(tried, error)]) of both ways; tried: {"setting": ...} or {"config": ...}."""
    timers, failed, copies = [], [], case.weights.shape[0]

    def attempt(tried, run, config=None):
        try:
            if config:
                case.check(config)
            timer = common.make_timer(run, copies, pool)
            if not timer.output().isfinite().all():
                raise RuntimeError("leaves something that is not finite")
            timers.append((tried, timer))
        except Exception as error:  # the others are still measured
            traceback.print_exc()
            failed.append((tried, common.described(error)))

    for setting in settings:
        with library_setting(setting):
            attempt({"setting": setting}, case.library)
    for config in candidates:
        attempt({"config": asdict(config)}, lambda i, config=config: case.ours(i, config), config)
    seconds = 0.02 * (len(candidates) + len(SETTINGS))
    common.interleave([timer for _, timer in timers], seconds=seconds, samples=(3, 20))
    return [(tried, 1e3 * common.quantiles(timer.milliseconds())[1]) for tried, timer in timers], failed


def main(argv: list[str] | None = None) -> int:
    parser = common.argument_parser(__doc__)
    parser.add_argument("--library", action="store_true", help="time the library's products alone")
    parser.add_argument("--rows", type=parse_rows, metavar="N,...")
    parser.add_argument("--budget", type=float, default=60, metavar="SECONDS", help="start no product after this time")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines, each as soon as it is known")
    parser.add_argument("--table", type=Path, metavar="FILE", help="kernels/fused_products.json, or a candidate for it")
    arguments = parser.parse_args(argv)
    # read once, when cuBLASLt is first used; in KiB
    os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "32768")
    torch.manual_seed(0)
    with torch.no_grad():
        sweep = Sweep(arguments, Clock(arguments.budget))
        return sweep.run_library() if arguments.library else sweep.run()


if __name__ == "__main__":
    sys.exit(main())
