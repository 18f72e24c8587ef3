"""Times systems against one another at one point: samples in turn, medians, floors, caps, and token agreement."""

import argparse
import statistics
import traceback
from dataclasses import dataclass, field

import torch
from torch import nn

import dkv
from benchmarks.harness import common, roofline
from benchmarks.harness.models import BLOCK, FAMILIES
from benchmarks.harness.roofline import Work
from benchmarks.harness.systems import Failed, Job, Ours, PeerProcess, PlainLoop

System = Ours | PlainLoop | PeerProcess

INTERVAL = 8
# label of a row -> (policy, whether Dream decodes in blocks with it), the most important first
POLICIES = {
    "NoCache": (dkv.NoCache(), False),
    "Decode": (dkv.Decode(INTERVAL), False),
    "Decode block": (dkv.Decode(INTERVAL, scope="block"), True),
    "DualCache": (dkv.DualCache(), True),
    "PrefixCache": (dkv.PrefixCache(), True),
    "Prefill": (dkv.Prefill(), False),
    "PrefillDecode": (dkv.PrefillDecode(4), False),
    "Greedy": (dkv.Greedy(2, 4), False),
}
# Dream: only "un" runs in batches in the authors' code
DREAM_POLICIES = {
    "Decode": (dkv.Decode(INTERVAL, shift="un"), False),
    "Decode un_right": (dkv.Decode(INTERVAL, shift="un_right"), False),
}
LABELS = (*POLICIES, "Decode un_right")
# systems whose tokens must be ours for the same label; Fast-dLLM's Dream has a schedule of its own
SAME_RULE = {
    "LLaDA": ("dkv, eager", "plain loop", "official", "dkv-cache", "fast-dllm"),
    "Dream": ("dkv, eager", "plain loop", "official", "dkv-cache"),
}
# fields that are None in a run that was not measured
MEASURES = (
    *("steps", "seconds", "seconds_min", "seconds_max", "tokens_per_s", "ms_full_step", "ms_cached_step"),
    *("cache_ratio", "peak_bytes", "floor_ms", "floor_ms_full_step", "floor_ms_cached_step", "fraction_of_floor"),
    *("speedup", "cap", "fraction_of_cap", "times_ours", "same_tokens"),
)


def policy_of(family: str, label: str) -> tuple[dkv.Policy, bool] | None:
    """(policy, whether it decodes in blocks) of a label; None if the family has no such policy."""
    policy, in_blocks = (POLICIES | (DREAM_POLICIES if family == "Dream" else {})).get(label, (None, False))
    return policy and (policy, in_blocks or family == "LLaDA")


@dataclass(frozen=True)
class GenerationPoint:
    """Prompts and how many tokens are generated after them; `name` says what the point stands for."""

    batch: int
    prompt: int
    gen_length: int
    name: str = ""

    def __str__(self):
        name = f" ({self.name})" if self.name else ""
        return f"batch {self.batch}, prompt {self.prompt} + {self.gen_length} tokens{name}"


def parse_points(text: str) -> list[tuple[str, GenerationPoint]]:
    """[(family, point)] of "LLaDA:1:256:128,..."."""
    points = []
    for part in text.split(","):
        family, *numbers = part.split(":")
        if family not in FAMILIES or len(numbers) != 3 or not all(n.isdecimal() and int(n) for n in numbers):
            raise argparse.ArgumentTypeError(f"{part!r} is not FAMILY:BATCH:PROMPT:GENERATED, such as LLaDA:1:256:128")
        points.append((family, GenerationPoint(*map(int, numbers))))
    return points


def parse_labels(text: str) -> list[str]:
    """The labels of "NoCache,Decode,..."."""
    labels = text.split(",")
    unknown = [label for label in labels if label not in LABELS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(LABELS)}")
    return labels


@dataclass(eq=False)
class Entry:
    """One system at one job.

    Attributes:
        peak_bytes: as in `peer.Outcome`.
        work: the `Work` of each step of our run.
        failure: why there are no samples, or None.
    """

    system: System
    job: Job
    outcomes: list = field(default_factory=list)
    peak_bytes: int | None = None
    work: list[Work] | None = None
    failure: str | None = None

    def take_sample(self) -> None:
        if self.failure:
            return
        try:
            if not self.outcomes:
                self.peak_bytes = self.system.warm_up(self.job)
            self.outcomes.append(self.system.run(self.job))
            self.work = getattr(self.system, "work", None)
        except Failed as failure:
            self.failure = str(failure)
        except Exception as error:  # the others are still measured
            traceback.print_exc()
            self.failure = common.described(error)

    @property
    def seconds(self) -> float:
        return statistics.median(outcome.seconds for outcome in self.outcomes)

    def step_ms(self, *, full: bool) -> float | None:
        """Median milliseconds of the full steps of all samples, or of the cached ones; None if there are none."""
        steps = [step for outcome in self.outcomes for step in outcome.steps]
        times = [ms for positions, ms in steps if (positions >= self.job.positions) == full]
        return statistics.median(times) if times else None

    def measures(self) -> dict[str, float | None]:
        """The fields of the row that need nothing but the samples."""
        seconds = [outcome.seconds for outcome in self.outcomes]
        steps = self.outcomes[0].steps
        return {
            "steps": len(steps),
            "seconds": self.seconds,
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "tokens_per_s": self.job.prompt.shape[0] * self.job.gen_length / self.seconds,
            "ms_full_step": self.step_ms(full=True),
            "ms_cached_step": self.step_ms(full=False),
            "cache_ratio": 1 - sum(positions for positions, _ in steps) / (len(steps) * self.job.positions),
            "peak_bytes": self.peak_bytes,
        }


class Study:
    """Measures one family; appends to `rows`, and to `mismatches` where tokens differ that must not."""

    def __init__(
        self, family: str, name: str, model: nn.Module, ceilings: dict[str, float], rows: list, mismatches: list
    ):
        self.family, self.name, self.model, self.ceilings = family, name, model, ceilings
        self.rows, self.mismatches = rows, mismatches
        self.sizes = roofline.Sizes.of(model)
        self._known = {}

    def job(
        self, label: str, point: GenerationPoint, *, steps: int | None = None, threshold: float | None = None
    ) -> Job | None:
        """The `Job` of a label, of one token a step unless `steps` says otherwise.

        None if the family has no such policy.
        """
        found = policy_of(self.family, label)
        if found is None:
            return None
        policy, in_blocks = found
        settings = self.model.model_config
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(
            0, min(settings.mask_id, settings.eos_token_id), (point.batch, point.prompt), generator=generator
        )
        in_blocks = in_blocks or threshold is not None
        return Job(
            label=label,
            policy=policy,
            prompt=prompt.to(self.model.device),
            gen_length=point.gen_length,
            block_length=min(BLOCK, point.gen_length) if in_blocks else point.gen_length,
            steps=(steps or point.gen_length) if threshold is None else None,
            threshold=threshold,
        )

    @torch.no_grad()
    def threshold(self, point: GenerationPoint) -> float:
        """The confidence that a quarter of the first block's candidates reach at the first step."""
        prompt, mask_id = self.job("NoCache", point).prompt, self.model.model_config.mask_id
        shift = 1 if self.family == "Dream" else 0
        logits = self.model(torch.nn.functional.pad(prompt, (0, point.gen_length), value=mask_id)).logits
        logits = logits[:, point.prompt - shift : point.prompt - shift + BLOCK].double()
        logits[..., mask_id] = float("-inf")
        return logits.softmax(-1).amax(-1).quantile(0.75).item()

    def compare(
        self,
        systems: list[System],
        point: GenerationPoint,
        labels: list[str],
        *,
        samples: int,
        seconds: float,
        kind: str = "run",
        steps: int | None = None,
        threshold: float | None = None,
    ) -> None:
        """Times every system with every policy that it has, in about `seconds`; appends the rows."""
        jobs = [self.job(label, point, steps=steps, threshold=threshold) for label in labels]
        entries = [Entry(system, job) for job in jobs if job for system in systems if system.has(job)]
        known = self._known.setdefault((point, steps, threshold), [])
        known += entries
        try:
            take_samples(entries, samples, seconds, interleaved=self.model.device.type == "cpu")
        finally:  # a run that is stopped has rows too
            self.rows += [self._row(entry, known, point, kind) for entry in entries]

    def _row(self, entry, known, point, kind):
        job, system = entry.job, entry.system
        row = {
            "model": self.name,
            "system": system.name,
            "label": job.label,
            "policy": repr(job.policy),
            "kind": kind,
            "batch": point.batch,
            "prompt": point.prompt,
            "gen_length": point.gen_length,
            "block_length": job.block_length,
            "threshold": job.threshold,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": common.device_name(),
            "samples": len(entry.outcomes),
            "failure": entry.failure or (None if entry.outcomes else "not run: the budget is used up"),
            **dict.fromkeys(MEASURES),
        }
        if not entry.outcomes:
            return row
        row |= entry.measures()
        ours = find(known, ("dkv",), job.label)
        baseline = find(known, ("official", "plain loop"), "NoCache")
        if baseline:
            row["speedup"] = baseline.seconds / entry.seconds
        if ours:
            row |= self._limits(ours.work, row)
            row["times_ours"] = entry.seconds / ours.seconds
        if ours and ours is not entry and system.name in SAME_RULE[self.family]:
            row["same_tokens"] = self._same_tokens(entry, ours, point)
        return row

    def _limits(self, works: list[Work], row: dict) -> dict[str, float]:
        """Floors and caps of a run whose steps did this work."""

        def floor_ms(some):
            return 1e3 * sum(roofline.floor(self.sizes, work, self.ceilings) for work in some)

        found = {"floor_ms": floor_ms(works), "fraction_of_floor": floor_ms(works) / (1e3 * row["seconds"])}
        for name, full in (("full", True), ("cached", False)):
            some = [work for work in works if work.full == full]
            found[f"floor_ms_{name}_step"] = floor_ms(some) / len(some) if some else None
        if row["speedup"] is not None:
            batch, seqlen = works[0].batch, works[0].seqlen
            everything = Work(batch, seqlen, active=batch * seqlen, candidates=batch * seqlen)
            uncached = len(works) * roofline.operations(self.sizes, [everything])
            found["cap"] = uncached / roofline.operations(self.sizes, works)
            found["fraction_of_cap"] = row["speedup"] / found["cap"]
        return found

    def _same_tokens(self, entry, ours, point):
        """The share of generated tokens that equal ours; below float32, rounding decides between near ties."""
        one, other = (torch.tensor(e.outcomes[0].sequences)[:, point.prompt :] for e in (entry, ours))
        share = (one == other).double().mean().item()
        if share < 1 and self.model.dtype == torch.float32:
            self.mismatches.append(f"{self.name}, {point}, {entry.job.label}: {entry.system.name} {share:.1%} as dkv")
        return share


def find(entries: list[Entry], systems: tuple[str, ...], label: str) -> Entry | None:
    """The first measured entry of one of these systems with a policy, or None."""
    return next((e for e in entries if e.outcomes and e.system.name in systems and e.job.label == label), None)


def take_samples(entries: list[Entry], samples: int, seconds: float, *, interleaved: bool) -> None:
    """Takes up to `samples` of each entry, at least one of the first, and no more than fit into `seconds`.

    Interleaved, drift affects all entries alike; one entry after another can reuse its recorded graphs, and each gets a
    share of the time.
    """
    clock = common.Clock(seconds)
    if interleaved:
        turns = [(entry, round_) for round_ in range(samples) for entry in entries]
        for entry, round_ in common.progress(turns, "runs"):
            if clock.left > 0 or (entry is entries[0] and round_ == 0):
                entry.take_sample()
        return
    for i, entry in enumerate(common.progress(entries, "systems")):
        share = common.Clock(clock.left / (len(entries) - i))
        for _ in range(samples):
            if share.left > 0 or (i == 0 and not entry.outcomes):
                entry.take_sample()
