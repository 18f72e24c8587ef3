"""Which launches of our own products are the fastest, and do they beat the library: kernels/fused_products.json.

    python benchmarks/warm.py --sweep                                   compiles all candidates beforehand
    python benchmarks/product_sweep.py --table kernels/fused_products.json    measures them, and writes the table
    ... [--rows 16,32] [--budget SECONDS] [--out FILE]                  FILE: each measurement as a JSON line

For the four products of a layer of LLaDA-8B and Dream-7B, by numbers of rows: the library's way, which is F.linear and
the launch behind it (RoPE and cache write, SwiGLU, or residual and norm: over the four, each launch of a layer but
attention's once), under each of linear_speed.SETTINGS; and our kernel, which does the same, with each of `candidates`.
A candidate is first compared with its PyTorch twin, outputs poisoned; one that is wrong or fails is reported and left
out. All are timed by turns, as graphs whose calls find their weights in memory, not in a cache.

The table has the best of either way for each number of rows that all four products of a model were measured for, and
what kernels/fused_products.json has of GPUs of another compute capability. It is written whenever there is another such
number, so that a budget may end anywhere. The exit status is 1 where a candidate was left out, or nothing was measured.
Without a GPU all of this is a rehearsal, with small weights and twins for kernels; the table of one says nothing about
a GPU, nor does it apply to one.
"""

import argparse
import itertools
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import common  # noqa: E402
import torch  # noqa: E402
from checkpoints import SCALED_DOWN, TRUE_SIZE  # noqa: E402
from common import say  # noqa: E402
from linear_speed import SETTINGS, chosen, parse_rows  # noqa: E402
from product_cases import KINDS, ROWS_CPU, ROWS_GPU, cases  # noqa: E402

from dkv.kernels import configs  # noqa: E402

KEPT = ("device", "date", "torch", "triton", "commit")


def measure(case, launches, seconds):
    """([(what, microseconds)], [(what, error)]) of a `Product` in both ways; what: {"setting": ...} or {"config": ...}.

    seconds: that the samples may take, of all together.
    """
    cuda = case.x.is_cuda
    pool, copies = torch.cuda.graph_pool_handle() if cuda else None, case.weights.shape[0]
    timers, failed = [], []

    def attempt(what, run, launch=None):
        try:
            if launch:
                case.check(launch)
            timer = common.GraphTimer(run, copies, pool=pool) if cuda else common.HostTimer(run, copies)
            if not timer.output().isfinite().all():
                raise RuntimeError("leaves something that is not finite")
            timers.append((what, timer))
        except Exception as error:  # the others are measured all the same
            traceback.print_exc()
            failed.append((what, common.described(error)))

    for setting in SETTINGS if cuda else ("default",):
        with chosen(setting):
            attempt({"setting": setting}, case.library)
    for launch in launches:
        attempt({"config": asdict(launch)}, lambda i, launch=launch: case.ours(i, launch), launch)
    common.interleave([timer for _, timer in timers], seconds=seconds, least=3, most=20)
    return [(what, 1e3 * common.quantiles(timer.milliseconds())[1]) for what, timer in timers], failed


def entry(case, rows, found):
    """(a row of the table, the setting that the library was best under) from what `measure` found; None of one way."""
    ways = [[row for row in found if key in row[0]] for key in ("setting", "config")]
    if not all(ways):
        return None
    (setting, library_us), (launch, us) = (min(way, key=lambda row: row[1]) for way in ways)
    (out_features, in_features), arch = case.shape, configs.architecture(case.x.device)
    row = {"arch": arch, "kind": case.kind, "out_features": out_features, "in_features": in_features, "rows": rows}
    return row | launch | {"us": us, "library_us": library_us}, setting["setting"]


def sweep(arguments, clock, device):
    """Measures, prints and writes down; returns (the rows of the table, whether a candidate was left out)."""
    cuda = device.type == "cuda"
    models, copies, dtype = (TRUE_SIZE, None, torch.bfloat16) if cuda else (SCALED_DOWN, 2, torch.float32)
    environment, table, wrong = common.environment(), [], False
    measured_with, arch = {key: environment[key] for key in KEPT}, configs.architecture(device)
    others = [row for row in configs.read_products() if row["arch"] != arch]
    common.write_line(arguments.out, environment, "w")
    say(f"{environment['device']}, commit {environment['commit']}")
    say(f"{'model':12}{'product':10}{'rows':>5}{'library us':>12}{'ours us':>10}{'ours/library':>14}  setting; launch")
    all_rows = arguments.rows or (ROWS_GPU if cuda else ROWS_CPU)
    for rows, (model, config) in itertools.product(all_rows, models.values()):
        entries = []
        for name, case, launches in cases(config, rows, device=device, dtype=dtype, copies=copies):
            title, names = f"{model:12}{name:10}{rows:5}", {"model": model, "product": name, "rows": rows}
            if clock.left < 0:
                say(f"{title}  not run, the budget is used up")
                return table, wrong
            found, failed = measure(case, launches, seconds=0.02 * (len(launches) + len(SETTINGS)))
            for what, microseconds in found:
                common.write_line(arguments.out, names | what | {"us": microseconds})
            for what, error in failed:
                common.write_line(arguments.out, names | what | {"error": error})
                say(f"{title}  {what}: {error}")
            wrong |= bool(failed)
            if best := entry(case, rows, found):
                row, setting = best
                entries.append(row)
                us, library_us, launch = row["us"], row["library_us"], ", ".join(map(str, row["config"].values()))
                say(f"{title}{library_us:12.1f}{us:10.1f}{us / library_us:14.2f}  {setting}; {launch}")
        if len(entries) == len(KINDS):
            table += [row | measured_with for row in entries]
            if arguments.table:
                common.write_json(arguments.table, {"products": others + table})
    return table, wrong


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=parse_rows, metavar="N,...")
    parser.add_argument("--budget", type=float, default=60, metavar="SECONDS", help="no product is begun after them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a JSON line a measurement, as soon as it is known")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="kernels/fused_products.json, or what should become it"
    )
    arguments = parser.parse_args(argv)
    # read once, when cuBLASLt is first used; in KiB
    os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "32768")
    torch.manual_seed(0)
    with torch.no_grad():
        table, wrong = sweep(arguments, common.Clock(arguments.budget), common.device())
    return 1 if wrong or not table else 0


if __name__ == "__main__":
    sys.exit(main())
