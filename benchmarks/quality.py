"""Does the cache keep the answers: accuracy of two small trained models under every policy.

    python benchmarks/quality.py            4,000 problems for NoCache and Decode(8), 250 for each other row
    python benchmarks/quality.py --quick    a short look: four rows on 48 problems

The models (benchmarks/small/, made by train_small.py) answer running sums, where one wrong digit makes all that follow
wrong (running_sums.py). Every policy answers the same held-out problems as no cache does under the same decoding:

    confidence      the family's own rule, one token a step; LLaDA in blocks of 32, Dream in one block
    blocks          the same in blocks of 32, for Dream
    left to right   the order is given: Greedy must know it
    threshold       in blocks of 32, every token whose probability reaches 0.9

`exact_match` is the share of wholly right answers, `token_accuracy` that of right tokens, `slips` the mean number of
tokens that break the rule given what stands before them, `agreement` the share of tokens that are those without a
cache, `difference` the exact match minus that without a cache on the same problems, `ci95` its 95 % bootstrap interval.

A table goes to stdout, then the claims of the dKV-Cache paper with what was found here; the last line is one JSON
object. JSON, CSV and pictures go to benchmarks/results/<device>/.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import common  # noqa: E402
import numpy  # noqa: E402
import quality_claims  # noqa: E402
import quality_plots  # noqa: E402
import running_sums  # noqa: E402
import torch  # noqa: E402
from common import say  # noqa: E402
from running_sums import ANSWER, LAG  # noqa: E402
from train_small import FOLDER as BENCHMARKS  # noqa: E402

import dkv  # noqa: E402

FAMILIES = ("llada", "dream")
BATCH, RESAMPLES, THRESHOLD, BLOCK = 32, 10_000, 0.9, 32
INTERVALS = (1, 2, 4, 8, 16, None)
WINDOWS = range(7)
CLAIM_KEYS = ("claim", "verdict", "figures")
# what a policy may have; others are None in a row
SETTINGS = ("refresh_interval", "delay", "shift", "scope", "window", "window_kind")


@dataclass(frozen=True)
class Case:
    """A policy under a decoding; `main` rows answer all problems."""

    policy: dkv.Policy
    decoding: str = "confidence"
    main: bool = False

    @property
    def name(self):
        return type(self.policy).__name__

    def settings(self):
        """The policy's settings; "never" is a Decode without refresh."""
        found = {name: getattr(self.policy, name, None) for name in SETTINGS}
        if hasattr(self.policy, "refresh_interval") and self.policy.refresh_interval is None:
            found["refresh_interval"] = "never"
        return found


def cases(family):
    """Every case of a family; without a cache first in each decoding."""
    shifts = ("un", "right", "un_right") if family == "dream" else (None,)
    in_blocks = "blocks" if family == "dream" else "confidence"
    found = [Case(dkv.NoCache(), main=True)]
    found += [
        Case(dkv.Decode(interval, shift=shift), main=(interval, shift) == (8, shifts[-1]))
        for shift in shifts
        for interval in INTERVALS
        if interval != 1 or shift == shifts[-1]
    ]
    found += [Case(dkv.Decode(interval, delay=0, shift=shifts[-1])) for interval in INTERVALS[1:]]
    found += [Case(dkv.Prefill())] + [Case(dkv.PrefillDecode(interval)) for interval in (4, 8, None)]
    if in_blocks != "confidence":
        found += [Case(dkv.NoCache(), in_blocks)]
    found += [Case(policy, in_blocks) for policy in (dkv.Decode(8, scope="block"), dkv.PrefixCache(), dkv.DualCache())]
    found += [Case(dkv.NoCache(), "left to right"), Case(dkv.Decode(8), "left to right")]
    found += [
        Case(dkv.Greedy(interval, window, window_kind=kind), "left to right")
        for interval, windows in ((2, WINDOWS), (8, (0, 4)))
        for kind in ("nearest_masked", "contiguous")
        for window in windows
    ]
    policies = (dkv.NoCache(), dkv.Decode(8), dkv.PrefixCache(), dkv.DualCache())
    return found + [Case(policy, "threshold") for policy in policies]


def quick_cases(family):
    """The main rows, and of Decode as it is by default: no refresh, and no delay."""
    chosen = [(8, 0), (None, 1)]
    found = [case for case in cases(family) if not case.main and case.decoding == "confidence"]
    found = [c for c in found if (s := c.settings())["scope"] == "all" and s["shift"] in quality_plots.SHIFTS]
    found = [c for c in found if (c.policy.refresh_interval, c.policy.delay) in chosen]
    return [case for case in cases(family) if case.main] + found


def arguments_of(decoding, family, rows):
    """The arguments of `dkv.generate` that a decoding means, for `rows` problems."""
    blocks = {"block_length": BLOCK} if family == "llada" or decoding in ("blocks", "threshold") else {}
    if decoding == "left to right":
        return blocks | {"remasking": "random", "order": torch.arange(ANSWER).expand(rows, -1)}
    return blocks | ({"threshold": THRESHOLD} if decoding == "threshold" else {})


@dataclass
class Answers:
    """What a case answered: sequences (problems, 96), and sums over its runs."""

    sequences: torch.Tensor
    seconds: float
    steps: float
    cache_ratio: float


def answer(model, family, case, prompts):
    """Generates the answers of prompts (problems, 32), a batch at a time."""
    sequences, ratios, steps, begin = [], 0.0, 0, time.perf_counter()
    parts = prompts.split(BATCH)
    for part in parts:
        arguments = arguments_of(case.decoding, family, len(part))
        output = dkv.generate(
            model,
            part.to(model.device),
            gen_length=ANSWER,
            policy=case.policy,
            **{name: v.to(model.device) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()},
        )
        sequences.append(output.sequences.cpu())
        ratios += output.stats.cache_ratio * len(part)
        steps += output.stats.steps
    seconds = time.perf_counter() - begin
    return Answers(torch.cat(sequences), seconds, steps / len(parts), ratios / len(prompts))


def row_of(family, case, answers, baseline):
    """A row of the table; baseline: the answers without a cache, of at least as many problems."""
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


def paired_interval(exact, baseline, resamples=RESAMPLES):
    """[low, high]: 95 % bootstrap interval of the mean difference of two (problems,) bool tensors, paired.

    A problem's difference is -1, 0 or 1, so that a resample is a draw of three counts.
    """
    differences = exact.int() - baseline.int()
    count = len(differences)
    shares = [(differences == value).sum().item() / count for value in (-1, 0, 1)]
    lost, _, won = numpy.random.default_rng(0).multinomial(count, shares, size=resamples).T
    return [float(q) for q in numpy.quantile((won - lost) / count, (0.025, 0.975))]


# ---- the run

COLUMNS = (
    ("problems", 9, lambda r: str(r["problems"])),
    ("exact", 8, lambda r: f"{100 * r['exact_match']:.1f} %"),
    ("against no cache", 27, lambda r: "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * v for v in interval_of(r)))),
    ("tokens", 8, lambda r: f"{100 * r['token_accuracy']:.1f} %"),
    ("slips", 7, lambda r: f"{r['slips']:.2f}"),
    ("agree", 8, lambda r: f"{100 * r['agreement']:.1f} %"),
    ("cached", 7, lambda r: f"{100 * r['cache_ratio']:.0f} %"),
    ("steps", 6, lambda r: f"{r['steps']:.0f}"),
    ("seconds", 8, lambda r: f"{r['seconds']:.1f}"),
)


def interval_of(row):
    return row["difference"], *row["ci95"]


def label_of(row):
    """The policy as one would write it, without what is its default."""
    shown = [str(row["refresh_interval"])] if row["refresh_interval"] is not None else []
    shown += [f"window={row['window']}"] if row["window"] is not None else []
    shown += [row["window_kind"]] if row["window_kind"] == "contiguous" else []
    shown += [row["shift"]] if row["shift"] else []
    shown += ["delay=0"] if row["delay"] == 0 else []
    shown += ["scope=block"] if row["scope"] == "block" else []
    return f"{row['policy']}({', '.join(shown)})"


def line_of(row):
    return f"{label_of(row):<34}{row['decoding']:<14}" + "".join(text(row).rjust(w) for _, w, text in COLUMNS)


def load(family):
    return dkv.from_pretrained(BENCHMARKS / "small" / family, device=common.device())


def one_history(family):
    """The generation of one problem, with its history, for the map."""
    prompt = running_sums.problems(1, running_sums.held_out_stream())[:, :LAG].to(common.device())
    arguments = arguments_of("confidence", family, 1)
    return dkv.generate(load(family), prompt, gen_length=ANSWER, policy=dkv.Decode(8), output_history=True, **arguments)


def measure(family, chosen, counts):
    """The rows of a family; counts: problems of main rows and of the others. Prints each row when it is there."""
    model = load(family)
    prompts = running_sums.problems(max(counts), running_sums.held_out_stream())[:, :LAG]
    say(f"\n{family}\n{'policy':<34}{'decoding':<14}" + "".join(head.rjust(w) for head, w, _ in COLUMNS))
    # so that no row pays for what is done once: merged weights, the first calls
    answer(model, family, chosen[0], prompts[:BATCH])
    baselines, rows = {}, []
    for case in common.progress(chosen, family):
        answers = answer(model, family, case, prompts[: counts[0] if case.main else counts[1]])
        baseline = baselines.setdefault(case.decoding, answers)
        rows.append(row_of(family, case, answers, baseline))
        say(line_of(rows[-1]))
    return rows


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--problems", type=int, nargs=2, metavar=("MAIN", "OTHER"), help="default: 4000 250")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<device>")
    arguments = parser.parse_args(argv)
    arguments.problems = arguments.problems or ((48, 48) if arguments.quick else (4000, 250))
    if not arguments.problems[0] >= arguments.problems[1] >= 1:
        parser.error("--problems must be two positive numbers, MAIN at least OTHER: the others are a part of them.")
    return arguments


def main(argv=None):
    arguments = parse_arguments(argv)
    environment = common.environment()
    say(f"{environment['device']}, commit {environment['commit']}, answers of {ANSWER} tokens, {BATCH} at a time")
    rows = []
    for family in FAMILIES:
        rows += common.rounded(measure(family, (quick_cases if arguments.quick else cases)(family), arguments.problems))
    found = [] if arguments.quick else quality_claims.claims(rows)
    if found:
        say("\nThe claims of the dKV-Cache paper, on these two models:")
    for claim, outcome, figures in found:
        say(f"{outcome}: {claim}\n    {figures}")
    record = {**environment, "rows": rows, "claims": [dict(zip(CLAIM_KEYS, c, strict=True)) for c in found]}
    if arguments.out or not arguments.quick:
        out = arguments.out or common.RESULTS / common.device_slug()
        common.write_json(out / "quality.json", record)
        common.write_csv(out / "quality.csv", rows)
        quality_plots.accuracy(rows, environment, out / "quality.png")
        titles = {f"{family}: one problem under Decode(8)": one_history(family) for family in FAMILIES}
        quality_plots.maps(titles, out / "quality_maps.png")
    print(json.dumps(common.rounded(record)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
