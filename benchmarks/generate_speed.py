"""Measures whole generations: every policy of `dkv.generate`, the families' own loops, and other people's code.

    python benchmarks/generate_speed.py             LLaDA-8B and Dream-7B in bfloat16 on a GPU, a scaled-down pair on a
                                                    CPU; within --budget seconds, the most important first
    python benchmarks/generate_speed.py --quick     a short look
    python benchmarks/generate_speed.py --points LLaDA:1:256:128,Dream:4:256:128 --policies NoCache,Decode
                                                    only whole runs at these points (family:batch:prompt:generated)
    python benchmarks/generate_speed.py --profile   also the time of a full and of a cached step, by kernel
    python benchmarks/generate_speed.py --once      one sample of each, and no run without CUDA graphs
    ... --peer official=FOLDER --peer dkv-cache=FOLDER --peer fast-dllm=FOLDER --peer-python PYTHON
                                                    also their code, from your clones (see harness/peer.py), in its own
                                                    interpreter (NAME=PYTHON: for one of them) on the same device

Weights are random: the tokens mean nothing, but the cost of a step does not depend on them. Three kinds of rows:

    run        whole generations in fixed steps, one token a step
    steps      short generations in a quarter of the steps, at more shapes, for the time of a full and a cached step
    threshold  whole generations that commit every confident token, at first a quarter of a block

`floor` is the minimum time of the policy's steps at the ceilings measured on this device (harness/roofline.py).
`speedup` is the time of the family's own uncached loop over this one's. `cap` is the speed-up that the policy's
operation count allows: the operations of the uncached loop, which computes all positions and all logits, over those of
the active positions and the candidates' logits. The last layer leaves out more than that, so a run can pass its cap.
Systems that decode by the same rule must agree on the tokens in float32; otherwise the exit status is 1.

A table goes to stdout, with one JSON object as its last line; JSON, CSV and a picture to benchmarks/results/<device>/.
"""

import contextlib
import sys
import traceback
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import common, plots, step_profile
from benchmarks.harness.common import Clock, say
from benchmarks.harness.generation import LABELS, GenerationPoint, Study, parse_labels, parse_points
from benchmarks.harness.models import FAMILIES, SCALED_DOWN, TRUE_SIZE, make_model
from benchmarks.harness.peer import PEERS
from benchmarks.harness.systems import Failed, Ours, PeerProcess, PlainLoop, add_peers, peers_of
from dkv.models import loader  # noqa: F401  imports transformers now, outside the time budgets
from dkv.models.layout import ModelConfig

SEED = 0


@dataclass(frozen=True)
class Agenda:
    """The measurements of each family, the most important first.

    Attributes:
        points: whole runs, with every policy at the first one, with `few` at the others.
        grid: points where steps are timed.
        with_threshold: labels of the runs that commit by confidence, at the first point.
        samples: the maximum of each whole run.
    """

    points: tuple[GenerationPoint, ...]
    grid: tuple[GenerationPoint, ...] = ()
    few: tuple[str, ...] = ("NoCache", "Decode", "Decode block", "DualCache")
    with_threshold: tuple[str, ...] = ("NoCache", "Decode", "PrefixCache", "DualCache")
    samples: int = 3


GPU = Agenda(
    points=(
        GenerationPoint(1, 128, 128, "one question"),
        GenerationPoint(8, 512, 128, "batch"),
        GenerationPoint(1, 2048, 128, "long prompt"),
        GenerationPoint(32, 256, 128, "many questions"),
    ),
    # there may be time for one run only
    few=("Decode", "NoCache", "Decode block", "DualCache"),
    # without 32 x 4096: 73 GB of K/V do not fit beside LLaDA's weights
    grid=tuple(
        GenerationPoint(batch, prompt, 32)
        for prompt in (512, 128, 1024, 2048, 4096)
        for batch in (1, 8, 32, 4)
        if batch * prompt < 32 * 4096
    ),
)
CPU = Agenda(
    points=(
        GenerationPoint(1, 256, 128, "one question"),
        GenerationPoint(4, 128, 64, "batch"),
        GenerationPoint(1, 640, 64, "long prompt"),
        GenerationPoint(8, 64, 32, "many questions"),
    ),
    grid=tuple(GenerationPoint(batch, prompt, 32) for prompt in (128, 512, 1024) for batch in (1, 4)),
)
QUICK = Agenda(points=(GenerationPoint(1, 128, 32, "one question"),), with_threshold=(), samples=1)


def parse_arguments(argv: list[str] | None) -> Namespace:
    parser = common.argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a short look")
    parser.add_argument("--points", type=parse_points, metavar="FAMILY:BATCH:PROMPT:GENERATED,...")
    parser.add_argument("--policies", type=parse_labels, metavar="LABEL,...", help="; ".join(LABELS))
    parser.add_argument("--profile", action="store_true", help="the time of a step by kernel")
    parser.add_argument("--once", action="store_true", help="one sample of each, and no run without CUDA graphs")
    parser.add_argument("--no-plot", action="store_true", help="write no picture")
    parser.add_argument("--budget", type=float, default=600, metavar="SECONDS", help="start no run after this time")
    add_peers(parser)
    common.add_folder(parser)
    arguments = parser.parse_args(argv)
    arguments.peers = peers_of(arguments)
    return arguments


def agendas_of(arguments: Namespace) -> dict[str, Agenda]:
    """family -> agenda."""
    if arguments.points:
        chosen = {f: tuple(point for g, point in arguments.points if g == f) for f in FAMILIES}
        return {family: Agenda(points, with_threshold=()) for family, points in chosen.items() if points}
    return dict.fromkeys(FAMILIES, QUICK if arguments.quick else GPU if torch.cuda.is_available() else CPU)


class GenerationBench:
    """One run of this script."""

    def __init__(self, arguments: Namespace):
        self.arguments, self.device = arguments, common.device()
        self.cuda = self.device.type == "cuda"
        self.dtype = common.dtype()
        self.ceilings = common.measure_ceilings()
        self.rows, self.mismatches, self.profiles, self.not_run, self.error = [], [], [], [], None

    def measure_all(self, agendas: dict[str, Agenda], clock: Clock) -> None:
        """Measures family after family; a signal or an error ends it, and keeps what was measured until then."""
        try:
            for i, (family, agenda) in enumerate(agendas.items()):
                self.measure(family, agenda, Clock(clock.left / (len(agendas) - i)))
        except KeyboardInterrupt:
            self.not_run.append("whatever is not above: stopped by a signal")
        except Exception as error:
            traceback.print_exc()
            self.error = common.described(error)
            self.not_run.append(f"whatever is not above: {self.error}")

    def measure(self, family: str, agenda: Agenda, clock: Clock) -> None:
        """Measures a family within the clock's time."""
        name, config = (TRUE_SIZE if self.cuda else SCALED_DOWN)[family]
        model = make_model(config, seed=SEED, dtype=self.dtype, device=self.device)
        study = Study(family, name, model, self.ceilings, self.rows, self.mismatches)
        say(f"\n{name}: {describe(model.model_config)}")
        groups = self.groups(family, config, model)
        for i, group in enumerate(groups):
            share = Clock(clock.left / (len(groups) - i))
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
                    self.run_tasks(self.tasks(study, agenda, systems), study, share)

    def groups(self, family: str, config: dict, model: torch.nn.Module) -> list[list]:
        """Lists of functions that start systems: one list at a time is in memory, because a GPU has no room for all."""
        settings = {"family": family, "config": config, "seed": SEED}
        settings |= {"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)}

        def starter(peer):
            return lambda: PeerProcess(*peer, settings)

        ours = [lambda: Ours(model)]
        if self.cuda and not self.arguments.once:
            ours.append(lambda: Ours(model, cuda_graphs=False))
        peers = self.arguments.peers
        # the others are compared with the official loop
        first = ours + [starter(peer) for peer in peers if peer[0] == "official"]
        others = [starter(peer) for peer in peers if peer[0] != "official"]
        return [first, *([other] for other in others)] if self.cuda else [first + others]

    def run_tasks(self, tasks: list[tuple], study: Study, clock: Clock) -> None:
        for i, (weight, title, task) in enumerate(tasks):
            if clock.left > 0 or i == 0:
                task(clock.left * weight / sum(weight for weight, _, _ in tasks[i:]))
            else:
                self.not_run.append(f"{study.name}: {title}")

    def tasks(self, study: Study, agenda: Agenda, systems: list) -> list[tuple]:
        """[(share of the time, title, function of the seconds it may take)], the most important first."""
        labels, samples = self.arguments.policies, 1 if self.arguments.once else agenda.samples
        tasks = []

        def add(weight, kind, point, labels, **options):
            def task(seconds):
                known = len(study.rows)
                try:
                    study.compare(systems, point, labels, seconds=seconds, kind=kind, **options)
                finally:
                    print_table(f"{study.name}, {point}: {KINDS[kind]}", study.rows[known:])

            tasks.append((weight, f"{point}, {kind}", task))

        for i, point in enumerate(agenda.points):
            chosen = labels or (agenda.few if i or agenda is QUICK else LABELS)
            add(3 if i else 9, "run", point, chosen, samples=samples)
        first = agenda.points[0]
        if self.arguments.profile and isinstance(systems[0], Ours):

            def profile(seconds):
                say(f"\n{study.name}, {first}, Decode: where the time of a step goes")
                for found in step_profile.profile(study.model, study.job("Decode", first), self.ceilings):
                    self.profiles.append({"model": study.name, **found})
                    say("\n".join(step_profile.table(found)))

            tasks.insert(1, (1, "profile", profile))
        if agenda.with_threshold:
            add(2, "threshold", first, agenda.with_threshold, samples=samples, threshold=study.threshold(first))
        for point in agenda.grid:
            add(1, "steps", point, ("Decode",), samples=samples, steps=point.gen_length // 4)
        return tasks


def describe(model: ModelConfig) -> str:
    return (
        f"hidden {model.hidden_size}, MLP {model.mlp_size}, {model.layers} layers, {model.nheads} heads "
        f"({model.nheads_k} K/V), vocabulary {model.vocab_size}, random weights"
    )


# ---- the table

KINDS = {
    "run": "one token a step",
    "steps": "four tokens a step",
    "threshold": "every confident token",
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


def print_table(title: str, rows: list[dict]) -> None:
    say(f"\n{title}")
    say(f"{'system':<12}{'policy':<16}{common.heads(COLUMNS)}")
    for row in rows:
        cells = f"  {row['failure']}" if row["failure"] else common.cells(COLUMNS, row)
        say(f"{row['system']:<12}{row['label']:<16}{cells}")
    for row in rows:
        if row["system"] in PEERS and row["times_ours"]:
            say(f"  {row['label']}: dkv is {row['times_ours']:.2f}x as fast as {row['system']}")


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    clock, bench, environment = Clock(arguments.budget), GenerationBench(arguments), common.environment()
    impl = "Triton kernels" if bench.cuda else "PyTorch implementation"
    dtype = str(bench.dtype).removeprefix("torch.")
    say(f"{environment['device']}, {impl}, {dtype}, commit {environment['commit']}")
    say(common.describe(bench.ceilings))
    bench.measure_all(agendas_of(arguments), clock)
    for line in bench.not_run:
        say(f"not run: {line}")
    for line in bench.mismatches:
        say(f"tokens differ: {line}")
    record = {**environment, "impl": impl, "dtype": dtype, "ceilings": bench.ceilings, "profiles": bench.profiles}
    record |= {"not_run": bench.not_run, "mismatches": bench.mismatches}
    stem = None
    if arguments.out or not arguments.quick:
        stem = common.results_folder(arguments.out) / f"generate_speed{'_points' * bool(arguments.points)}"
    common.finish(record, bench.rows, stem)
    if stem and not arguments.no_plot:
        plots.generation(bench.rows, environment, stem.with_suffix(".png"))
    return 1 if bench.mismatches or bench.error else 0


if __name__ == "__main__":
    common.stop_on_sigterm()
    sys.exit(main())
