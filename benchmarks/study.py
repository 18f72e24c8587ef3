"""Timing systems against one another at one point: samples in turn, medians, floors, caps, and whether tokens agree."""

import statistics
import traceback
from dataclasses import dataclass, field

import common
import roofline
import torch
from checkpoints import BLOCK
from systems import Failed, Job

import dkv

INTERVAL = 8
# label of a row -> (policy, whether Dream decodes in blocks with it), in order of importance
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
# of Dream: the authors' choice is the only one that their code runs in batches
DREAM_POLICIES = {
    "Decode": (dkv.Decode(INTERVAL, shift="un"), False),
    "Decode un_right": (dkv.Decode(INTERVAL, shift="un_right"), False),
}
LABELS = (*POLICIES, "Decode un_right")
# systems that decode by the rule of ours of the same label; Fast-dLLM's Dream has a schedule of its own
SAME_RULE = {
    "LLaDA": ("dkv, eager", "plain loop", "official", "dkv-cache", "fast-dllm"),
    "Dream": ("dkv, eager", "plain loop", "official", "dkv-cache"),
}
# what a run that was not measured has nothing of
MEASURES = (
    *("steps", "seconds", "seconds_min", "seconds_max", "tokens_per_s", "ms_full_step", "ms_cached_step"),
    *("cache_ratio", "peak_bytes", "floor_ms", "floor_ms_full_step", "floor_ms_cached_step", "fraction_of_floor"),
    *("speedup", "cap", "fraction_of_cap", "times_ours", "same_tokens"),
)


def policy_of(family, label):
    """(policy, whether it decodes in blocks) of a label; None if the family has no such policy."""
    policy, in_blocks = (POLICIES | (DREAM_POLICIES if family == "Dream" else {})).get(label, (None, False))
    return policy and (policy, in_blocks or family == "LLaDA")


@dataclass(frozen=True)
class Point:
    """Prompts, and how many tokens are generated after them; `name` says what the point stands for."""

    batch: int
    prompt: int
    gen_length: int
    name: str = ""

    def __str__(self):
        name = f" ({self.name})" if self.name else ""
        return f"batch {self.batch}, prompt {self.prompt} + {self.gen_length} tokens{name}"


@dataclass(eq=False)
class Entry:
    """One system at one job.

    Attributes:
        peak_bytes: as in `peer.Outcome`.
        work: a `roofline.Step` for each step, of a run of ours.
        failure: why there are no samples, or None.
    """

    system: object
    job: Job
    outcomes: list = field(default_factory=list)
    peak_bytes: int | None = None
    work: list | None = None
    failure: str | None = None

    def take_sample(self):
        if self.failure:
            return
        try:
            if not self.outcomes:
                self.peak_bytes = self.system.warm_up(self.job)
            self.outcomes.append(self.system.run(self.job))
            self.work = getattr(self.system, "work", None)
        except Failed as failure:
            self.failure = str(failure)
        except Exception as error:  # whatever it is, the others are measured
            traceback.print_exc()
            self.failure = common.described(error)

    @property
    def seconds(self):
        return statistics.median(outcome.seconds for outcome in self.outcomes)

    def step_ms(self, *, full):
        """Median milliseconds of the full steps of all samples, or of the others; None: there are none."""
        steps = [step for outcome in self.outcomes for step in outcome.steps]
        times = [ms for positions, ms in steps if (positions >= self.job.positions) == full]
        return statistics.median(times) if times else None

    def measures(self):
        """Fields of the row that the samples alone give."""
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
    """What is measured of one family; appends to lists of rows and of mismatches, where tokens differ that must not."""

    def __init__(self, family, name, model, ceilings, rows, mismatches):
        self.family, self.name, self.model, self.ceilings = family, name, model, ceilings
        self.rows, self.mismatches = rows, mismatches
        self.sizes = roofline.Sizes.of(model)
        self._known = {}

    def job(self, label, point, *, steps=None, threshold=None):
        """The `Job` of a label; steps: None: one token a step; None if the family has no such policy."""
        if policy_of(self.family, label) is None:
            return None
        policy, in_blocks = policy_of(self.family, label)
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
    def threshold(self, point):
        """The confidence that a quarter of the first block's candidates have at the first step."""
        prompt, mask_id = self.job("NoCache", point).prompt, self.model.model_config.mask_id
        shift = 1 if self.family == "Dream" else 0
        logits = self.model(torch.nn.functional.pad(prompt, (0, point.gen_length), value=mask_id)).logits
        logits = logits[:, point.prompt - shift : point.prompt - shift + BLOCK].double()
        logits[..., mask_id] = float("-inf")
        return logits.softmax(-1).amax(-1).quantile(0.75).item()

    def compare(self, systems, point, labels, *, samples, seconds, kind="run", steps=None, threshold=None):
        """Times every system at every policy that it has, in about `seconds`; appends the rows."""
        jobs = [self.job(label, point, steps=steps, threshold=threshold) for label in labels]
        entries = [Entry(system, job) for job in jobs if job for system in systems if system.has(job)]
        known = self._known.setdefault((point, steps, threshold), [])
        known += entries
        try:
            take_samples(entries, samples, seconds, interleaved=self.model.device.type == "cpu")
        finally:  # of a run that is stopped there are rows too
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

    def _limits(self, work, row):
        """Floors and caps of a run whose steps did this work."""

        def floor_ms(steps):
            return 1e3 * sum(roofline.floor(self.sizes, step, self.ceilings) for step in steps)

        found = {"floor_ms": floor_ms(work), "fraction_of_floor": floor_ms(work) / (1e3 * row["seconds"])}
        for name, full in (("full", True), ("cached", False)):
            steps = [step for step in work if step.full == full]
            found[f"floor_ms_{name}_step"] = floor_ms(steps) / len(steps) if steps else None
        if row["speedup"] is not None:
            positions = work[0].batch * work[0].seqlen
            everything = roofline.Step(work[0].batch, work[0].seqlen, positions, positions)
            uncached = len(work) * roofline.operations(self.sizes, [everything])
            found["cap"] = uncached / roofline.operations(self.sizes, work)
            found["fraction_of_cap"] = row["speedup"] / found["cap"]
        return found

    def _same_tokens(self, entry, ours, point):
        """The share of generated tokens that are ours; below float32, rounding decides between near ties."""
        one, other = (torch.tensor(e.outcomes[0].sequences)[:, point.prompt :] for e in (entry, ours))
        share = (one == other).double().mean().item()
        if share < 1 and self.model.dtype == torch.float32:
            self.mismatches.append(f"{self.name}, {point}, {entry.job.label}: {entry.system.name} {share:.1%} as dkv")
        return share


def find(entries, systems, label):
    """The first measured entry of one of these systems at a policy, or None."""
    return next((e for e in entries if e.outcomes and e.system.name in systems and e.job.label == label), None)


def take_samples(entries, samples, seconds, *, interleaved):
    """Up to `samples` of each entry: in rounds, so that drift meets all alike, or one entry after the other, which can
    use again what it recorded. Every entry gets a first one before the time is up; the first entry in any case."""
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
