"""The systems that generate_speed compares: ours, a plain loop on our model, and other people's code."""

import contextlib
import dataclasses
import itertools
import json
import select
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from peer import Outcome, measured
from roofline import Step

import dkv
from dkv.generation import prepare
from dkv.rooms import LARGEST_GRAPH
from dkv.run import needed

# a peer that is silent for so long is given up, seconds
PATIENCE = 900
# what is also run eagerly where there are graphs, in whole runs of fixed steps
WITHOUT_GRAPHS = ("NoCache", "Decode")
# peers that commit by confidence
WITH_THRESHOLD = ("fast-dllm",)


@dataclass(frozen=True)
class Job:
    """A generation to be timed.

    Attributes:
        label: the policy's name in the tables, by which peers know it; policy: a `dkv.Policy`.
        prompt: (batch, prompt_length) int64 on the device.
        block_length: at most gen_length.
        steps: None with a threshold.
    """

    label: str
    policy: dkv.Policy
    prompt: torch.Tensor
    gen_length: int
    block_length: int
    steps: int | None
    threshold: float | None = None

    @property
    def seqlen(self):
        return self.prompt.shape[1] + self.gen_length

    @property
    def positions(self):
        """Of a full step, over all rows."""
        return self.prompt.shape[0] * self.seqlen

    def shortened(self):
        """The same in an eighth of the steps, which still go through all numbers of masks."""
        least = self.gen_length // self.block_length
        return dataclasses.replace(self, steps=self.steps and max(least, self.steps // 8))


class Failed(Exception):
    """A system did not do a job; the message says why."""


@contextlib.contextmanager
def memory_failures():
    try:
        yield
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        raise Failed("out of memory") from None


def start(model, job, *, cuda_graphs):
    """Our run of a job, at its first step."""
    return prepare(
        model,
        job.prompt,
        gen_length=job.gen_length,
        steps=job.steps,
        block_length=job.block_length,
        policy=job.policy,
        remasking="random" if job.policy.needs_order else None,
        threshold=job.threshold,
        generator=torch.Generator().manual_seed(0),
        cuda_graphs=cuda_graphs,
    )


class Ours:
    """`dkv.generate`. After a run, `work` has a `roofline.Step` for each of its steps."""

    def __init__(self, model, *, cuda_graphs=True):
        self.model, self.device, self.cuda_graphs = model, model.device, cuda_graphs
        self.name = "dkv" if cuda_graphs else "dkv, eager"
        self.work = None
        # the first run merges weights, whose memory is not the next one's
        dkv.generate(model, torch.zeros(1, 1, dtype=torch.int64, device=self.device), gen_length=1)

    def has(self, job):
        return self.cuda_graphs or (job.label in WITHOUT_GRAPHS and job.steps == job.gen_length)

    def warm_up(self, job):
        """Returns the peak memory in bytes."""
        dkv.reset(self.model)
        # graphs are recorded for one number of steps; of large full steps there are none
        records = self.device.type == "cuda" and self.cuda_graphs
        whole = records and (job.label != "NoCache" or job.positions <= LARGEST_GRAPH)
        return self.run(job if whole else job.shortened(), with_peak=True).peak_bytes

    @memory_failures()
    @torch.no_grad()
    def run(self, job, *, with_peak=False):
        """Generates; returns an `Outcome`."""
        sizes = []

        def generate(stopwatch):
            with start(self.model, job, cuda_graphs=self.cuda_graphs) as run:
                while run.running():
                    sizes.append(run.sizes.clone())
                    stopwatch.step(0)
                    run.step()
                return run.finish().sequences

        outcome = measured(generate, self.model, self.device, with_peak)
        needs = [needed(step.tolist()) for step in sizes]
        self.work = [Step(job.prompt.shape[0], job.seqlen, need.positions, need.candidates) for need in needs]
        steps = [(work.active, ms) for work, (_, ms) in zip(self.work, outcome.steps, strict=True)]
        return dataclasses.replace(outcome, steps=steps)

    def close(self):
        dkv.reset(self.model)


class PlainLoop:
    """The family's loop on the native model's own forward: all positions, and all logits, at every step."""

    name = "plain loop"

    def __init__(self, model):
        self.model, self.device = model, model.device

    def has(self, job):
        return job.label == "NoCache" and job.threshold is None

    def warm_up(self, job):
        dkv.reset(self.model)
        return self.run(job.shortened(), with_peak=True).peak_bytes

    @memory_failures()
    def run(self, job, *, with_peak=False):
        return measured(lambda stopwatch: plain_loop(self.model, job, stopwatch), self.model, self.device, with_peak)

    def close(self):
        pass


@torch.no_grad()
def plain_loop(model, job, stopwatch):
    """LLaDA's and Dream's own loops, for steps that their block lengths divide; returns (batch, seqlen) int64."""
    view = dkv.models.view_of(model)
    shifted, mask_id = view.family.shifted, view.mask_id
    batch, prompt_length = job.prompt.shape
    x = torch.nn.functional.pad(job.prompt, (0, job.gen_length), value=mask_id)
    blocks = job.gen_length // job.block_length
    steps = job.steps // blocks
    times = torch.linspace(1, 1e-3, steps + 1)
    columns = torch.arange(job.seqlen, device=x.device)
    for block, i in itertools.product(range(blocks), range(steps)):
        stopwatch.step(x.numel())
        logits = model(x).logits
        logits[..., mask_id] = float("-inf")
        if shifted:
            logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)
        probabilities = logits.softmax(-1)
        confidence, tokens = probabilities.max(-1)
        if shifted:
            confidence = (probabilities * (probabilities + 1e-10).log()).sum(-1)
        masked = (x == mask_id) & (columns < prompt_length + (block + 1) * job.block_length)
        masks = int(masked[0].sum())
        count = -(-masks // (steps - i))
        if shifted and i < steps - 1:
            count = int(masks * (1 - times[i + 1] / times[i]))
        chosen = confidence.masked_fill(~masked, float("-inf")).topk(count, dim=1).indices
        x.scatter_(1, chosen, tokens.gather(1, chosen))
    return x


class Peer:
    """Someone else's code, run by peer.py in a process and an interpreter of its own, for one family."""

    def __init__(self, name, folder, python, *, family, config, seed, dtype, device):
        self.name = name
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [python, str(Path(__file__).with_name("peer.py")), name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )
        settings = {"family": family, "config": config, "seed": seed}
        try:
            answer = self._ask(settings | {"dtype": str(dtype).removeprefix("torch."), "device": str(device)})
        except Failed:
            self.close()
            raise
        self.policies, self.transformers = answer["policies"], answer["transformers"]

    def has(self, job):
        return job.label in self.policies and (job.threshold is None or self.name in WITH_THRESHOLD)

    def warm_up(self, job):
        return self.run(job.shortened(), with_peak=True).peak_bytes

    def run(self, job, *, with_peak=False):
        request = {name: getattr(job, name) for name in ("gen_length", "block_length", "steps", "threshold")}
        if job.threshold is not None:
            # a bound that its loop asks for
            request["steps"] = job.gen_length
        interval = getattr(job.policy, "refresh_interval", None)
        request |= {"policy": job.label, "prompt": job.prompt.tolist(), "interval": interval, "with_peak": with_peak}
        answer = self._ask(request)
        return Outcome(**answer)

    def _ask(self, request):
        try:
            self.process.stdin.write((json.dumps(request) + "\n").encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            self.process.kill()
            self.log.seek(0)
            last = self.log.read().strip().splitlines()[-1:]
            raise Failed(": ".join(["it ended" if ready else f"it was silent for {PATIENCE} s", *last]))
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def close(self):
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
