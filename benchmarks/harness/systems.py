"""The systems that generate_speed.py compares: ours, a plain loop on our model, and other people's code."""

import contextlib
import dataclasses
import itertools
import json
import select
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dkv
from benchmarks.harness import peer
from benchmarks.harness.peer import PEERS, Outcome, Stopwatch, measured
from benchmarks.harness.roofline import Work
from dkv.generation import prepare
from dkv.rooms import LARGEST_GRAPH
from dkv.run import Run, needed

# seconds after which a silent peer is given up
PATIENCE = 900
# policies that also run without CUDA graphs, in whole runs of fixed steps
WITHOUT_GRAPHS = ("NoCache", "Decode")
# peers that commit by confidence
WITH_THRESHOLD = ("fast-dllm",)


@dataclass(frozen=True)
class Job:
    """A generation to be timed.

    Attributes:
        label: the policy's name in the tables, and for peers.
        prompt: (batch, prompt_length) int64 on the device.
        block_length: at most gen_length.
        steps: None with a threshold.
    """

    label: str
    policy: dkv.Policy
    prompt: Tensor
    gen_length: int
    block_length: int
    steps: int | None
    threshold: float | None = None

    @property
    def seqlen(self) -> int:
        return self.prompt.shape[1] + self.gen_length

    @property
    def positions(self) -> int:
        """Positions of a full step, over all rows."""
        return self.prompt.shape[0] * self.seqlen

    def shortened(self) -> "Job":
        """The same in an eighth of the steps, which still go through all numbers of masks."""
        min_steps = self.gen_length // self.block_length
        return dataclasses.replace(self, steps=self.steps and max(min_steps, self.steps // 8))


class Failed(Exception):
    """A system did not do a job; the message says why."""


@contextlib.contextmanager
def memory_failures() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        raise Failed("out of memory") from None


def start(model: nn.Module, job: Job, *, cuda_graphs: bool) -> Run:
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
    """`dkv.generate`. After a run, `work` has the `Work` of each of its steps."""

    def __init__(self, model: nn.Module, *, cuda_graphs: bool = True):
        self.model, self.device, self.cuda_graphs = model, model.device, cuda_graphs
        self.name = "dkv" if cuda_graphs else "dkv, eager"
        self.work = None
        # the first run merges weights, which takes memory that later runs do not
        dkv.generate(model, torch.zeros(1, 1, dtype=torch.int64, device=self.device), gen_length=1)

    def has(self, job: Job) -> bool:
        return self.cuda_graphs or (job.label in WITHOUT_GRAPHS and job.steps == job.gen_length)

    def warm_up(self, job: Job) -> int:
        """Returns the peak memory in bytes."""
        dkv.reset(self.model)
        # a graph belongs to one number of steps; large full steps have none
        records = self.device.type == "cuda" and self.cuda_graphs
        whole = records and (job.label != "NoCache" or job.positions <= LARGEST_GRAPH)
        return self.run(job if whole else job.shortened(), with_peak=True).peak_bytes

    @memory_failures()
    @torch.no_grad()
    def run(self, job: Job, *, with_peak: bool = False) -> Outcome:
        sizes = []

        def generate(stopwatch):
            with start(self.model, job, cuda_graphs=self.cuda_graphs) as run:
                while run.running():
                    sizes.append(run.sizes.clone())
                    stopwatch.step(0)
                    run.step()
                return run.finish()[0]

        outcome = measured(generate, self.model, self.device, with_peak)
        needs = [needed(step.tolist()) for step in sizes]
        self.work = [Work(job.prompt.shape[0], job.seqlen, need.positions, need.candidates) for need in needs]
        steps = [(work.active, ms) for work, (_, ms) in zip(self.work, outcome.steps, strict=True)]
        return dataclasses.replace(outcome, steps=steps)

    def close(self) -> None:
        dkv.reset(self.model)


class PlainLoop:
    """The family's loop on the native model's own forward: all positions and all logits at every step."""

    name = "plain loop"

    def __init__(self, model: nn.Module):
        self.model, self.device = model, model.device

    def has(self, job: Job) -> bool:
        return job.label == "NoCache" and job.threshold is None

    def warm_up(self, job: Job) -> int:
        dkv.reset(self.model)
        return self.run(job.shortened(), with_peak=True).peak_bytes

    @memory_failures()
    def run(self, job: Job, *, with_peak: bool = False) -> Outcome:
        return measured(lambda stopwatch: plain_loop(self.model, job, stopwatch), self.model, self.device, with_peak)

    def close(self) -> None:
        pass


@torch.no_grad()
def plain_loop(model: nn.Module, job: Job, stopwatch: Stopwatch) -> Tensor:
    """LLaDA's and Dream's own loops, for steps that the block length divides; returns (batch, seqlen) int64."""
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


class PeerProcess:
    """Someone else's code, run by peer.py in a process and an interpreter of its own, for one family."""

    def __init__(self, name: str, folder: Path | str, python: str, settings: dict[str, Any]):
        """settings: the request that builds the model, see peer.py."""
        self.name = name
        self.log = tempfile.TemporaryFile("w+")
        command = [python, peer.__file__, name, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)
        try:
            self.policies = self._ask(settings)["policies"]
        except Failed:
            self.close()
            raise

    def has(self, job: Job) -> bool:
        return job.label in self.policies and (job.threshold is None or self.name in WITH_THRESHOLD)

    def warm_up(self, job: Job) -> int:
        return self.run(job.shortened(), with_peak=True).peak_bytes

    def run(self, job: Job, *, with_peak: bool = False) -> Outcome:
        request = {name: getattr(job, name) for name in ("gen_length", "block_length", "steps", "threshold")}
        if job.threshold is not None:
            # a bound that its loop requires
            request["steps"] = job.gen_length
        interval = getattr(job.policy, "refresh_interval", None)
        request |= {"policy": job.label, "prompt": job.prompt.tolist(), "interval": interval, "with_peak": with_peak}
        return Outcome(**self._ask(request))

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

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def add_peers(parser: ArgumentParser) -> None:
    """Adds --peer and --peer-python."""
    names = ", ".join(PEERS)
    parser.add_argument("--peer", type=parse_peer, action="append", default=[], metavar="NAME=FOLDER", help=names)
    parser.add_argument("--peer-python", action="append", default=[], metavar="[NAME=]PYTHON")


def parse_peer(text: str) -> tuple[str, str]:
    """(name, folder) of "NAME=FOLDER"."""
    name, _, folder = text.partition("=")
    if name not in PEERS or not Path(folder).is_dir():
        names = ", ".join(PEERS)
        raise ArgumentTypeError(f"must be NAME=FOLDER, with one of {names} and a folder that exists, got {text!r}")
    return name, str(Path(folder).resolve())


def peers_of(arguments: Namespace) -> list[tuple[str, str, str]]:
    """[(name, folder, python)] of --peer and --peer-python."""
    pythons = dict(text.split("=", 1) if text.split("=")[0] in PEERS else ("", text) for text in arguments.peer_python)
    fallback = pythons.get("", sys.executable)
    return [(name, folder, pythons.get(name, fallback)) for name, folder in arguments.peer]
