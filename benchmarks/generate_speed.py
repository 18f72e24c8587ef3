"""How fast are whole generations: every policy of `dkv.generate`, the families' own loops, and other people's code.

    python benchmarks/generate_speed.py             LLaDA-8B and Dream-7B in bfloat16 on a GPU, a scaled-down pair on a
                                                    CPU; within --budget seconds, in order of importance
    python benchmarks/generate_speed.py --quick     a short look
    python benchmarks/generate_speed.py --points LLaDA:1:256:128,Dream:4:256:128 --policies NoCache,Decode
                                                    whole runs at these points (family:batch:prompt:generated) alone
    python benchmarks/generate_speed.py --profile   also where the time of a full and of a cached step goes, by kernel
    python benchmarks/generate_speed.py --once      one sample of each, and no run without CUDA graphs
    ... --peer official=FOLDER --peer dkv-cache=FOLDER --peer fast-dllm=FOLDER --peer-python PYTHON
                                                    also their code, from clones of yours (see peer.py), in its own
                                                    interpreter (NAME=PYTHON: of one of them) on the same device

Weights are random, so the tokens mean nothing; what a step costs does not depend on them. Three kinds of rows:

    run        whole generations in fixed steps, one token a step
    steps      short generations in a quarter of the steps, at more shapes, for the time of a full and a cached step
    threshold  whole generations that commit what is confident enough, at first a quarter of a block

`floor` is the time that bytes and operations of this policy's steps take at least, at the ceilings measured on this
device (roofline.py); `speedup` the time of the family's own uncached loop over this one's; `cap` what the operation
counts of the policy allow: those of the uncached loop, which computes all positions and all logits, over those of the
active positions and of the candidates' logits. What the last layer leaves out besides can pass it.
Where systems decode by the same rule, their tokens are compared; in float32 they must agree, or the exit status is 1.

A table goes to stdout, with one JSON object as its last line; JSON, CSV and a picture to benchmarks/results/<device>/.
"""

import argparse
import contextlib
import json
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

# importing PyTorch is part of the time that a run takes
START = time.monotonic()
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import common  # noqa: E402
import plots  # noqa: E402
import step_profile  # noqa: E402
import torch  # noqa: E402
from checkpoints import FAMILIES, SCALED_DOWN, TRUE_SIZE, make_model  # noqa: E402
from common import say  # noqa: E402
from peer import PEERS  # noqa: E402
from study import LABELS, Point, Study  # noqa: E402
from systems import Failed, Ours, Peer, PlainLoop  # noqa: E402

SEED = 0


@dataclass(frozen=True)
class Plan:
    """What is measured of each family, in order of importance.

    Attributes:
        points: whole runs; every policy at the first one, `few` at the others.
        grid: points where steps are timed.
        samples: of each whole run at most.
    """

    points: tuple
    grid: tuple = ()
    few: tuple = ("NoCache", "Decode", "Decode block", "DualCache")
    with_threshold: tuple = ("NoCache", "Decode", "PrefixCache", "DualCache")
    samples: int = 3


GPU = Plan(
    points=(
        Point(1, 128, 128, "one question"),
        Point(8, 512, 128, "batch"),
        Point(1, 2048, 128, "long prompt"),
        Point(32, 256, 128, "many questions"),
    ),
    # where there is time for one run only
    few=("Decode", "NoCache", "Decode block", "DualCache"),
    # but for 32 x 4096, whose K/V, 73 GB of LLaDA's, do not fit beside the weights
    grid=tuple(
        Point(batch, prompt, 32)
        for prompt in (512, 128, 1024, 2048, 4096)
        for batch in (1, 8, 32, 4)
        if batch * prompt < 32 * 4096
    ),
)
CPU = Plan(
    points=(
        Point(1, 256, 128, "one question"),
        Point(4, 128, 64, "batch"),
        Point(1, 640, 64, "long prompt"),
        Point(8, 64, 32, "many questions"),
    ),
    grid=tuple(Point(batch, prompt, 32) for prompt in (128, 512, 1024) for batch in (1, 4)),
)
QUICK = Plan(points=(Point(1, 128, 32, "one question"),), with_threshold=(), samples=1)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--points", type=parse_points, metavar="FAMILY:BATCH:PROMPT:GENERATED,...")
    parser.add_argument("--policies", type=parse_labels, metavar="LABEL,...", help="; ".join(LABELS))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--once", action="store_true", help="one sample of each, and no run without CUDA graphs")
    parser.add_argument("--no-plot", action="store_true", help="write no picture")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER", help=", ".join(PEERS))
    parser.add_argument("--peer-python", action="append", default=[], metavar="[NAME=]PYTHON")
    parser.add_argument("--budget", type=float, default=600, metavar="SECONDS", help="no run is begun after them")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    arguments = parser.parse_args(argv)
    try:
        arguments.peers = parse_peers(arguments.peer, arguments.peer_python)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def parse_points(text):
    """[(family, Point)] of "LLaDA:1:256:128,..."."""
    points = []
    for part in text.split(","):
        family, *numbers = part.split(":")
        if family not in FAMILIES or len(numbers) != 3 or not all(n.isdecimal() and int(n) for n in numbers):
            raise argparse.ArgumentTypeError(f"{part!r} is not FAMILY:BATCH:PROMPT:GENERATED, such as LLaDA:1:256:128")
        points.append((family, Point(*map(int, numbers))))
    return points


def parse_labels(text):
    labels = text.split(",")
    unknown = [label for label in labels if label not in LABELS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(LABELS)}")
    return labels


def parse_peers(folders, pythons):
    """[(name, folder, python)] of the arguments."""
    interpreters = dict(p.split("=", 1) if p.split("=")[0] in PEERS else ("", p) for p in pythons)
    peers = []
    for text in folders:
        name, _, folder = text.partition("=")
        if name not in PEERS or not Path(folder).is_dir():
            raise ValueError(f"--peer must be NAME=FOLDER with a name of {', '.join(PEERS)}, got {text!r}.")
        python = interpreters.get(name) or interpreters.get("") or sys.executable
        peers.append((name, folder, python))
    return peers


def plan_of(arguments):
    """[(family, Plan)] of the arguments."""
    if arguments.points:
        families = [family for family in FAMILIES if family in dict(arguments.points)]
        return [(f, Plan(points=tuple(p for g, p in arguments.points if g == f), with_threshold=())) for f in families]
    plan = QUICK if arguments.quick else GPU if torch.cuda.is_available() else CPU
    return [(family, plan) for family in FAMILIES]


class Bench:
    """One run of this script."""

    def __init__(self, arguments):
        self.arguments, self.device = arguments, common.device()
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.ceilings = common.measure_ceilings()
        self.rows, self.mismatches, self.profiles, self.not_run, self.error = [], [], [], [], None

    def measure_all(self, plans, clock):
        """Measures family after family; a signal to stop ends it in good order."""
        try:
            for i, (family, plan) in enumerate(plans):
                self.measure(family, plan, common.Clock(clock.left / (len(plans) - i)))
        except KeyboardInterrupt:
            self.not_run.append("whatever is not above: stopped by a signal")
        except Exception as error:  # what was measured until then is written
            traceback.print_exc()
            self.error = common.described(error)
            self.not_run.append(f"whatever is not above: {self.error}")

    def measure(self, family, plan, clock):
        """Measures a family within the clock's time."""
        name, config = (TRUE_SIZE if self.cuda else SCALED_DOWN)[family]
        model = make_model(config, seed=SEED, dtype=self.dtype, device=self.device)
        study = Study(family, name, model, self.ceilings, self.rows, self.mismatches)
        say(f"\n{name}: {describe(study.sizes)}")
        groups = self.groups(family, config, model)
        for i, group in enumerate(groups):
            share = common.Clock(clock.left / (len(groups) - i))
            with contextlib.ExitStack() as stack:
                systems = []
                for start in group:
                    try:
                        systems.append(start())
                    except Failed as failure:
                        self.not_run.append(f"{name}: {failure}")
                    else:
                        stack.callback(systems[-1].close)
                if i == 0 and not any(system.name == "official" for system in systems):
                    systems.append(PlainLoop(model))
                if systems:
                    self.run_tasks(self.tasks(study, plan, systems), study, share)

    def groups(self, family, config, model):
        """Lists of functions that start systems: those in memory at the same time, since a GPU has no room for all."""
        settings = {"family": family, "config": config, "seed": SEED, "dtype": self.dtype, "device": self.device}

        def starter(peer):
            return lambda: Peer(*peer, **settings)

        ours = [lambda: Ours(model)]
        if self.cuda and not self.arguments.once:
            ours.append(lambda: Ours(model, cuda_graphs=False))
        peers = self.arguments.peers
        # what the others are compared with comes first
        first = ours + [starter(peer) for peer in peers if peer[0] == "official"]
        others = [starter(peer) for peer in peers if peer[0] != "official"]
        return [first, *([other] for other in others)] if self.cuda else [first + others]

    def run_tasks(self, tasks, study, clock):
        for i, (weight, title, task) in enumerate(tasks):
            if clock.left > 0 or i == 0:
                task(clock.left * weight / sum(weight for weight, _, _ in tasks[i:]))
            else:
                self.not_run.append(f"{study.name}: {title}")

    def tasks(self, study, plan, systems):
        """[(share of the time, title, function of the seconds it may take)], in order of importance."""
        labels, samples = self.arguments.policies, 1 if self.arguments.once else plan.samples
        tasks = []

        def add(weight, kind, point, labels, **options):
            def task(seconds):
                known = len(study.rows)
                try:
                    study.compare(systems, point, labels, seconds=seconds, kind=kind, **options)
                finally:
                    print_table(f"{study.name}, {point}: {KINDS[kind]}", study.rows[known:])

            tasks.append((weight, f"{point}, {kind}", task))

        for i, point in enumerate(plan.points):
            chosen = labels or (plan.few if i or plan is QUICK else LABELS)
            add(3 if i else 9, "run", point, chosen, samples=samples)
        first = plan.points[0]
        if self.arguments.profile and isinstance(systems[0], Ours):

            def profile(seconds):
                say(f"\n{study.name}, {first}, Decode: where the time of a step goes")
                for found in step_profile.profile(study.model, study.job("Decode", first), self.ceilings):
                    self.profiles.append({"model": study.name, **found})
                    say("\n".join(step_profile.table(found)))

            tasks.insert(1, (1, "profile", profile))
        if plan.with_threshold:
            add(2, "threshold", first, plan.with_threshold, samples=samples, threshold=study.threshold(first))
        for point in plan.grid:
            add(1, "steps", point, ("Decode",), samples=samples, steps=point.gen_length // 4)
        return tasks


def describe(sizes):
    return (
        f"hidden {sizes.hidden}, MLP {sizes.mlp}, {sizes.layers} layers, {sizes.nheads} heads ({sizes.nheads_k} K/V), "
        f"vocabulary {sizes.vocabulary}, random weights"
    )


# ---- the table

KINDS = {
    "run": "one token a step",
    "steps": "four tokens a step",
    "threshold": "what is confident enough",
}
COLUMNS = (
    ("s/run", 9, lambda row: f"{row['seconds']:.3f}"),
    ("tokens/s", 9, lambda row: f"{row['tokens_per_s']:.1f}"),
    ("steps", 6, lambda row: f"{row['steps']}"),
    ("ms full", 9, lambda row: f"{row['ms_full_step']:.2f}"),
    ("floor", 8, lambda row: f"{row['floor_ms_full_step']:.2f}"),
    ("cached", 8, lambda row: f"{row['ms_cached_step']:.2f}"),
    ("floor", 8, lambda row: f"{row['floor_ms_cached_step']:.2f}"),
    ("of floor", 9, lambda row: f"{row['fraction_of_floor']:.0%}"),
    ("stable", 7, lambda row: f"{row['cache_ratio']:.0%}"),
    ("peak GB", 8, lambda row: f"{row['peak_bytes'] / 1e9:.3f}"),
    ("speedup", 8, lambda row: f"{row['speedup']:.2f}x"),
    ("cap", 7, lambda row: f"{row['cap']:.2f}x"),
    ("of cap", 7, lambda row: f"{row['fraction_of_cap']:.0%}"),
    ("tokens", 7, lambda row: "same" if row["same_tokens"] == 1 else f"{row['same_tokens']:.0%}"),
)


def print_table(title, rows):
    say(f"\n{title}")
    say(f"{'system':<12}{'policy':<16}" + "".join(f"{head:>{width}}" for head, width, _ in COLUMNS))
    for row in rows:
        cells = [text_of(row, text).rjust(width) for _, width, text in COLUMNS]
        say(f"{row['system']:<12}{row['label']:<16}" + (f"  {row['failure']}" if row["failure"] else "".join(cells)))
    for row in rows:
        if row["system"] in PEERS and row["times_ours"]:
            say(f"  {row['label']}: dkv is {row['times_ours']:.2f}x as fast as {row['system']}")


def text_of(row, text):
    try:
        return text(row)
    except TypeError:  # of what is None
        return "-"


def main(argv=None, start=None):
    arguments = parse_arguments(argv)
    clock = common.Clock(arguments.budget, start)
    bench = Bench(arguments)
    environment = common.environment()
    impl = "Triton kernels" if bench.cuda else "PyTorch implementation"
    dtype = str(bench.dtype).removeprefix("torch.")
    say(f"{environment['device']}, {impl}, {dtype}, commit {environment['commit']}")
    say(common.describe(bench.ceilings))
    bench.measure_all(plan_of(arguments), clock)
    for line in bench.not_run:
        say(f"not run: {line}")
    for line in bench.mismatches:
        say(f"tokens differ: {line}")
    record = {**environment, "impl": impl, "dtype": dtype, "ceilings": bench.ceilings, "rows": bench.rows}
    record |= {"profiles": bench.profiles, "not_run": bench.not_run, "mismatches": bench.mismatches}
    if arguments.out or not arguments.quick:
        out = arguments.out or common.RESULTS / common.device_slug()
        stem = out / ("generate_speed_points" if arguments.points else "generate_speed")
        common.write_json(stem.with_suffix(".json"), record)
        common.write_csv(stem.with_suffix(".csv"), bench.rows)
        if not arguments.no_plot:
            plots.generation(bench.rows, environment, stem.with_suffix(".png"))
    print(json.dumps(common.rounded(record)))
    return 1 if bench.mismatches or bench.error else 0


def stop(*_):
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main(start=START))
