"""The points of step_speed.py, which are steps of true runs, and the ways to do their products."""

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple
from unittest import mock

import torch
from torch import nn

import dkv
from benchmarks.harness.fake_gpu import fake_run
from benchmarks.harness.models import BLOCK, FAMILIES
from dkv.generation import prepare
from dkv.kernels import configs
from dkv.run import Run

POINTS = (
    "LLaDA:1:1024:32,LLaDA:8:1024:32,LLaDA:1:256:32,LLaDA:1:1024:16,LLaDA:1:1024:128,LLaDA:1:2048:32,LLaDA:8:1024:16,"
    "LLaDA:4:1024:64,LLaDA:1:1024:all,LLaDA:8:1024:all,LLaDA:32:1024:16,"
    "Dream:1:1024:32,Dream:8:1024:32,Dream:1:1024:16,Dream:1:1024:all,Dream:8:1024:all"
)
DECODE = dkv.Decode(8)


class StepPoint(NamedTuple):
    """A step that recomputes `active` positions of each row; "all": a full step."""

    family: str
    batch: int
    length: int
    active: int | Literal["all"]

    def __str__(self) -> str:
        return ":".join(map(str, self))

    @property
    def beginning(self) -> tuple[int, int]:
        """(tokens to generate, steps before): a run that comes to this step."""
        if self.active == "all":
            return BLOCK, 0
        # LLaDA's third step is its first cached one; active are the positions that were masked before the second.
        # Dream's second step is its first cached one; active are the masked positions and the one before them
        return (self.active + 1, 2) if self.family == "LLaDA" else (self.active - 1, 1)


def parse_points(text: str) -> list[StepPoint]:
    """The points of "LLaDA:1:1024:32,..."."""
    points = []
    for part in text.split(","):
        family, *numbers = part.split(":")
        if family not in FAMILIES or len(numbers) != 3 or not all(n.isdecimal() and int(n) for n in numbers[:2]):
            raise argparse.ArgumentTypeError(f"{part!r} is not FAMILY:BATCH:LENGTH:ACTIVE, such as LLaDA:1:1024:32")
        batch, length, active = numbers
        if active != "all" and not (active.isdecimal() and 1 < int(active) < int(length)):
            raise argparse.ArgumentTypeError(f'{part!r}: ACTIVE is "all" or a number above 1 and below the length')
        points.append(StepPoint(family, int(batch), int(length), active if active == "all" else int(active)))
    return points


@dataclass(frozen=True)
class Way:
    """A way to do the products of a step: with our own kernels or the library's, with PDL or without."""

    name: str
    fused: bool = False
    pdl: bool = False

    @contextlib.contextmanager
    def of(self, current: Run) -> Iterator[None]:
        """A context in which the steps of a run, made with fused_products=True, go this way."""
        fused = current.runner.fused if self.fused else None
        with mock.patch.object(current.runner, "fused", fused), mock.patch.object(configs, "PDL", self.pdl):
            yield


LIBRARY, FUSED, PDL = Way("library"), Way("fused", fused=True), Way("fused, PDL", fused=True, pdl=True)


def ways(arch: int | None) -> tuple[Way, ...]:
    """All ways of a GPU of a compute capability (90 for 9.0), or of a CPU (None)."""
    return (LIBRARY, FUSED, PDL) if (arch or 0) >= 90 else (LIBRARY, FUSED)


def at_step(model: nn.Module, point: StepPoint) -> Run:
    """A run on the model's device whose next step is that of the point."""
    gen_length, steps = point.beginning
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 50, (point.batch, point.length - gen_length), generator=generator).to(model.device)
    current = prepare(model, prompt, gen_length=gen_length, policy=DECODE, cuda_graphs=False, fused_products=True)
    with LIBRARY.of(current):
        for _ in range(steps):
            current.step()
    return current


def fake_at_step(model: nn.Module, point: StepPoint) -> tuple[Run, int]:
    """(run on the fake GPU, the number of the point's step)."""
    gen_length, steps = point.beginning
    sizes = {"batch": point.batch, "prompt": point.length - gen_length, "gen_length": gen_length}
    return fake_run(model, DECODE, **sizes, fused_products=True), steps
