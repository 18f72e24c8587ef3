"""How fast are the linear layers of a cached step: products of few rows against the time of reading their weights.

    python benchmarks/linear_speed.py [--rows 1,8,32] [--budget SECONDS] [--out FILE]

F.linear for the weight shapes of LLaDA-8B and Dream-7B, with Q, K and V, and gate and up, as one product each, as in
`dkv.generate`. Every product finds its weight in memory, not in a cache: it goes through several copies. `floor` is the
time of the bytes (weight, inputs, outputs) or operations at the measured ceilings, whichever is longer. On a GPU under
each of SETTINGS: PyTorch's own choice, cuBLASLt with a workspace of 32 MiB, and partial sums in float32 alone.

A table goes to stdout, with one JSON object as its last line, and to FILE.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import common  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from checkpoints import TRUE_SIZE, settings_of  # noqa: E402
from common import say  # noqa: E402

# name -> (library, whether partial sums may be rounded to bfloat16)
SETTINGS = {"default": ("default", True), "cublaslt": ("cublaslt", True), "float32 sums": ("default", False)}
ROWS_GPU = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
ROWS_CPU = (1, 8, 16, 32, 64)
# larger than any cache
COLD_BYTES = 2**28
# rows of a weight that are repeated; divides all shapes
TILE = 64


def shapes(settings):
    """name -> (out_features, in_features) of the products of a layer, and of the head."""
    hidden, q = settings.hidden_size, settings.nheads * settings.headdim
    return {
        "Q, K, V": (q + 2 * settings.nheads_k * settings.headdim, hidden),
        "output": (hidden, q),
        "gate, up": (2 * settings.mlp_size, hidden),
        "down": (hidden, settings.mlp_size),
        "head": (settings.vocab_size, hidden),
    }


def time_shape(shape, all_rows, *, device, dtype, seconds):
    """{(setting, rows): median milliseconds} of products with a weight of this shape."""
    sets = max(2, math.ceil(COLD_BYTES / (math.prod(shape) * dtype.itemsize)))
    # a few random rows over and over: that is as good here, and quick on a CPU
    weights = torch.randn(1, TILE, shape[1], device=device, dtype=dtype).repeat(sets, shape[0] // TILE, 1)
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    timers = {}
    for setting in SETTINGS if pool else ("default",):
        for rows in all_rows:
            x = torch.randn(rows, shape[1], device=device, dtype=dtype)

            def run(i, x=x):
                return F.linear(x, weights[i])

            with chosen(setting):
                timer = common.GraphTimer(run, sets, pool=pool) if pool else common.HostTimer(run, sets)
                timer.output()
            timers[setting, rows] = timer
    common.interleave(list(timers.values()), seconds=seconds, least=3, most=30)
    return {key: common.quantiles(timer.milliseconds())[1] for key, timer in timers.items()}


@contextlib.contextmanager
def chosen(setting):
    """PyTorch's products under one of SETTINGS, as far as they are recorded in here."""
    if not torch.cuda.is_available():
        yield
        return
    matmul, library = torch.backends.cuda.matmul, torch.backends.cuda.preferred_blas_library()
    rounded = matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.preferred_blas_library(SETTINGS[setting][0])
    matmul.allow_bf16_reduced_precision_reduction = SETTINGS[setting][1]
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(library)
        matmul.allow_bf16_reduced_precision_reduction = rounded


def parse_rows(text):
    rows = [int(part) for part in text.split(",") if part.isdecimal()]
    if not rows or min(rows) < 1 or len(rows) != text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers, such as 1,8,32")
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=parse_rows, metavar="N,...")
    parser.add_argument("--budget", type=float, default=60, metavar="SECONDS")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON object of the last line")
    arguments = parser.parse_args(argv)
    # read once, when cuBLASLt is first used; in KiB
    os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "32768")
    clock = common.Clock(arguments.budget)
    environment, device = common.environment(), common.device()
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    all_rows = arguments.rows or (ROWS_GPU if cuda else ROWS_CPU)
    ceilings = common.measure_ceilings()
    dtype_name = str(dtype).removeprefix("torch.")
    say(f"{environment['device']}, {dtype_name}, {common.describe(ceilings)}")
    header = f"{'model':10}{'product':10}{'weight':>16}{'rows':>6}{'us':>11}{'floor':>10}{'of floor':>10}{'GB/s':>8}"
    say(header + "  setting")
    named = {name: shapes(settings_of(config)) for name, config in TRUE_SIZE.values()}
    # both models by turns, so that a short budget leaves out neither
    todo = [(model, name, named[model][name]) for name in next(iter(named.values())) for model in named]
    rows, not_run = [], []
    for i, (model, name, shape) in enumerate(common.progress(todo, "weights")):
        if clock.left < 0 and i:
            not_run.append(f"{model}, {name}")
            continue
        seconds = clock.left / (len(todo) - i)
        for (setting, n), ms in time_shape(shape, all_rows, device=device, dtype=dtype, seconds=seconds).items():
            moved = dtype.itemsize * (math.prod(shape) + n * sum(shape))
            floor = 1e3 * max(moved / ceilings["bandwidth"], 2 * n * math.prod(shape) / ceilings["flops"])
            row = {"model": model, "product": name, "out_features": shape[0], "in_features": shape[1], "rows": n}
            row |= {
                "setting": setting,
                "ms": ms,
                "floor_ms": floor,
                "fraction_of_floor": floor / ms,
                "gbps": moved / ms / 1e6,
            }
            rows.append(row | {"dtype": dtype_name, "device": environment["device"]})
            say(
                f"{model:10}{name:10}{'{} x {}'.format(*shape):>16}{n:6}{1e3 * ms:11.1f}{1e3 * floor:10.1f}"
                f"{floor / ms:10.0%}{moved / ms / 1e6:8.0f}  {setting}"
            )
    for line in not_run:
        say(f"not run, the budget is used up: {line}")
    record = {**environment, "ceilings": ceilings, "rows": rows, "not_run": not_run}
    if arguments.out:
        common.write_json(arguments.out, record)
    print(json.dumps(common.rounded(record)))


if __name__ == "__main__":
    main()
