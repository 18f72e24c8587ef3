"""Measures what the cache costs in accuracy: two small trained models answer problems under every policy.

    python benchmarks/quality.py            4,000 problems for NoCache and Decode(8), 250 for each other row
    python benchmarks/quality.py --quick    a short look: four rows on 48 problems

The models (benchmarks/small/, made by train_small.py) answer running sums, where one wrong digit makes all later ones
wrong (harness/running_sums.py). Every policy answers the same held-out problems as no cache, with the same decoding:

    confidence      the family's own rule, one token a step; LLaDA in blocks of 32, Dream in one block
    blocks          the same in blocks of 32, for Dream
    left to right   the order is given, because Greedy must know it
    threshold       in blocks of 32, every token whose probability reaches 0.9

`exact_match` is the share of answers that are right as a whole, `token_accuracy` the share of right tokens. `slips` is
the mean number of tokens that break the rule given the tokens before them. `agreement` is the share of tokens that are
the same without a cache. `difference` is the exact match minus that without a cache on the same problems, `ci95` its
95 % bootstrap interval.

A table goes to stdout, then the claims of the dKV-Cache paper with the verdicts; the last line is one JSON object.
JSON, CSV and pictures go to benchmarks/results/<device>/.
"""

import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dkv
from benchmarks.harness import claims, common, plots, running_sums
from benchmarks.harness.common import say
from benchmarks.harness.running_sums import ANSWER, LAG

FAMILIES = ("llada", "dream")
BATCH, RESAMPLES, THRESHOLD, BLOCK = 32, 10_000, 0.9, 32
INTERVALS = (1, 2, 4, 8, 16, None)
WINDOWS = range(7)
CLAIM_KEYS = ("claim", "verdict", "figures")
# settings that a policy may have; in a row the others are None
SETTINGS = ("refresh_interval", "delay", "shift", "scope", "window", "window_kind")


@dataclass(frozen=True)
class QualityCase:
    """A policy with a decoding; `main` cases answer all problems."""

    policy: dkv.Policy
    decoding: str = "confidence"
    main: bool = False

    @property
    def name(self) -> str:
        return type(self.policy).__name__

    def settings(self) -> dict[str, Any]:
        """The policy's settings; "never" is a Decode without refresh."""
        found = {name: getattr(self.policy, name, None) for name in SETTINGS}
        if hasattr(self.policy, "refresh_interval") and self.policy.refresh_interval is None:
            found["refresh_interval"] = "never"
        return found


def cases(family: str) -> list[QualityCase]:
    """Every case of a family; NoCache is the first of each decoding."""
    shifts = ("un", "right", "un_right") if family == "dream" else (None,)
    in_blocks = "blocks" if family == "dream" else "confidence"
    found = [QualityCase(dkv.NoCache(), main=True)]
    found += [
        QualityCase(dkv.Decode(interval, shift=shift), main=(interval, shift) == (8, shifts[-1]))
        for shift in shifts
        for interval in INTERVALS
        if interval != 1 or shift == shifts[-1]
    ]
    found += [QualityCase(dkv.Decode(interval, delay=0, shift=shifts[-1])) for interval in INTERVALS[1:]]
    found += [QualityCase(dkv.Prefill())] + [QualityCase(dkv.PrefillDecode(interval)) for interval in (4, 8, None)]
    if in_blocks != "confidence":
        found += [QualityCase(dkv.NoCache(), in_blocks)]
    policies = (dkv.Decode(8, scope="block"), dkv.PrefixCache(), dkv.DualCache())
    found += [QualityCase(policy, in_blocks) for policy in policies]
    found += [QualityCase(dkv.NoCache(), "left to right"), QualityCase(dkv.Decode(8), "left to right")]
    found += [
        QualityCase(dkv.Greedy(interval, window, window_kind=kind), "left to right")
        for interval, windows in ((2, WINDOWS), (8, (0, 4)))
        for kind in ("nearest_masked", "contiguous")
        for window in windows
    ]
    policies = (dkv.NoCache(), dkv.Decode(8), dkv.PrefixCache(), dkv.DualCache())
    return found + [QualityCase(policy, "threshold") for policy in policies]


def quick_cases(family: str) -> list[QualityCase]:
    """The main cases, and two of the default Decode: without refresh, and without delay."""
    chosen = [(8, 0), (None, 1)]
    found = [case for case in cases(family) if not case.main and case.decoding == "confidence"]
    found = [c for c in found if (s := c.settings())["scope"] == "all" and s["shift"] in plots.SHIFTS]
    found = [c for c in found if (c.policy.refresh_interval, c.policy.delay) in chosen]
    return [case for case in cases(family) if case.main] + found


def arguments_of(decoding: str, family: str, rows: int) -> dict[str, Any]:
    """The arguments of `dkv.generate` for a decoding of `rows` problems."""
    blocks = {"block_length": BLOCK} if family == "llada" or decoding in ("blocks", "threshold") else {}
    if decoding == "left to right":
        return blocks | {"remasking": "random", "order": torch.arange(ANSWER).expand(rows, -1)}
    return blocks | ({"threshold": THRESHOLD} if decoding == "threshold" else {})


@dataclass
class Answers:
    """The answers of a case: sequences (problems, 96), all seconds, mean steps and mean cache ratio."""

    sequences: Tensor
    seconds: float
    steps: float
    cache_ratio: float


def answer(model: nn.Module, family: str, case: QualityCase, prompts: Tensor) -> Answers:
    """Generates the answers to prompts (problems, 32), a batch at a time."""
    sequences, ratios, steps, begin = [], 0.0, 0, time.perf_counter()
    parts = prompts.split(BATCH)
    for part in parts:
        arguments = arguments_of(case.decoding, family, len(part))
        output = dkv.generate(
            model,
            part.to(model.device),
            gen_length=ANSWER,
            policy=case.policy,
            **{name: v.to(model.device) if isinstance(v, Tensor) else v for name, v in arguments.items()},
        )
        sequences.append(output.sequences.cpu())
        ratios += output.stats.cache_ratio * len(part)
        steps += output.stats.steps
    seconds = time.perf_counter() - begin
    return Answers(torch.cat(sequences), seconds, steps / len(parts), ratios / len(prompts))


def row_of(family: str, case: QualityCase, answers: Answers, baseline: Answers) -> dict[str, Any]:
    """A row of the table; baseline: the answers without a cache, to at least as many problems."""
    count = len(answers.sequences)
    right, other = (running_sums.right(a.sequences[:count]) for a in (answers, baseline))
    exact, other_exact = right.all(1), other.all(1)
    same = (answers.sequences == baseline.sequences[:count])[:, LAG:]
    return {
        "model": family,
        "policy": case.name,
        "decoding": case.decoding,
        **case.settings(),
        "problems": count,
        "exact_match": exact.double().mean().item(),
        "difference": (exact.double() - other_exact.double()).mean().item(),
        "ci95": paired_interval(exact, other_exact),
        "token_accuracy": right.double().mean().item(),
        "slips": running_sums.slips(answers.sequences).double().sum(1).mean().item(),
        "agreement": same.double().mean().item(),
        "cache_ratio": answers.cache_ratio,
        "steps": answers.steps,
        "seconds": answers.seconds,
    }


def paired_interval(exact: Tensor, baseline: Tensor) -> list[float]:
    """[low, high]: 95 % bootstrap interval of the mean difference of two (problems,) bool tensors, paired.

    A problem's difference is -1, 0 or 1, so a resample is a draw of three counts.
    """
    differences = exact.int() - baseline.int()
    count = len(differences)
    shares = [(differences == value).sum().item() / count for value in (-1, 0, 1)]
    lost, _, won = numpy.random.default_rng(0).multinomial(count, shares, size=RESAMPLES).T
    return [float(q) for q in numpy.quantile((won - lost) / count, (0.025, 0.975))]


# ---- the run

INTERVAL = "{:+.2f} [{:+.2f}, {:+.2f}]"
COLUMNS = (
    ("problems", 9, lambda r: str(r["problems"])),
    ("exact", 8, lambda r: f"{100 * r['exact_match']:.1f} %"),
    ("against no cache", 27, lambda r: INTERVAL.format(*(100 * v for v in (r["difference"], *r["ci95"])))),
    ("tokens", 8, lambda r: f"{100 * r['token_accuracy']:.1f} %"),
    ("slips", 7, lambda r: f"{r['slips']:.2f}"),
    ("agree", 8, lambda r: f"{100 * r['agreement']:.1f} %"),
    ("cached", 7, lambda r: f"{100 * r['cache_ratio']:.0f} %"),
    ("steps", 6, lambda r: f"{r['steps']:.0f}"),
    ("seconds", 8, lambda r: f"{r['seconds']:.1f}"),
)


def label_of(row: dict[str, Any]) -> str:
    """The policy as one would write it, without its defaults."""
    shown = [str(row["refresh_interval"])] if row["refresh_interval"] is not None else []
    shown += [f"window={row['window']}"] if row["window"] is not None else []
    shown += [row["window_kind"]] if row["window_kind"] == "contiguous" else []
    shown += [row["shift"]] if row["shift"] else []
    shown += ["delay=0"] if row["delay"] == 0 else []
    shown += ["scope=block"] if row["scope"] == "block" else []
    return f"{row['policy']}({', '.join(shown)})"


def line_of(row: dict[str, Any]) -> str:
    return f"{label_of(row):<34}{row['decoding']:<14}{common.cells(COLUMNS, row)}"


def load(family: str) -> nn.Module:
    return dkv.from_pretrained(common.SMALL_MODELS / family, device=common.device())


def one_history(family: str) -> dkv.GenerateOutput:
    """The generation of one answer, with its history, for the map."""
    prompt = running_sums.problems(1, running_sums.held_out_stream())[:, :LAG].to(common.device())
    arguments = arguments_of("confidence", family, 1)
    return dkv.generate(load(family), prompt, gen_length=ANSWER, policy=dkv.Decode(8), output_history=True, **arguments)


def measure(family: str, chosen: list[QualityCase], counts: list[int]) -> list[dict[str, Any]]:
    """The rows of a family; counts: problems of main cases and of the others. Prints each row as it is measured."""
    model = load(family)
    prompts = running_sums.problems(max(counts), running_sums.held_out_stream())[:, :LAG]
    say(f"\n{family}\n{'policy':<34}{'decoding':<14}{common.heads(COLUMNS)}")
    # no row pays for merged weights and first calls
    answer(model, family, chosen[0], prompts[:BATCH])
    baselines, rows = {}, []
    for case in common.progress(chosen, family):
        answers = answer(model, family, case, prompts[: counts[0] if case.main else counts[1]])
        baseline = baselines.setdefault(case.decoding, answers)
        rows.append(row_of(family, case, answers, baseline))
        say(line_of(rows[-1]))
    return rows


def parse_arguments(argv: list[str] | None) -> Namespace:
    parser = common.argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a short look")
    parser.add_argument("--problems", type=int, nargs=2, metavar=("MAIN", "OTHER"), help="default: 4000 250")
    common.add_folder(parser)
    arguments = parser.parse_args(argv)
    arguments.problems = arguments.problems or ((48, 48) if arguments.quick else (4000, 250))
    if not arguments.problems[0] >= arguments.problems[1] >= 1:
        parser.error("--problems must be two positive numbers, MAIN at least OTHER: the others are a part of them.")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    environment = common.environment()
    say(f"{environment['device']}, commit {environment['commit']}, answers of {ANSWER} tokens, {BATCH} at a time")
    rows = []
    for family in FAMILIES:
        rows += common.rounded(measure(family, (quick_cases if arguments.quick else cases)(family), arguments.problems))
    found = [] if arguments.quick else claims.claims(rows)
    if found:
        say("\nThe claims of the dKV-Cache paper, on these two models:")
    for claim, outcome, figures in found:
        say(f"{outcome}: {claim}\n    {figures}")
    record = {**environment, "claims": [dict(zip(CLAIM_KEYS, claim, strict=True)) for claim in found]}
    stem = common.results_folder(arguments.out) / "quality" if arguments.out or not arguments.quick else None
    common.finish(record, rows, stem)
    if stem:
        plots.accuracy(rows, environment, stem.with_suffix(".png"))
        titles = {f"{plots.NAMES[family]}: one problem under Decode(8)": one_history(family) for family in FAMILIES}
        plots.maps(titles, stem.with_name("quality_maps.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
