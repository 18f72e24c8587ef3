"""The points of step_speed.py: steps of true runs, and the ways in which their products are done."""

import argparse
import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch  # noqa: E402
from checkpoints import BLOCK, FAMILIES  # noqa: E402
from fake_gpu import fake_run  # noqa: E402

import dkv  # noqa: E402
from dkv.generation import prepare  # noqa: E402
from dkv.kernels import configs  # noqa: E402

POINTS = (
    "LLaDA:1:1024:32,LLaDA:8:1024:32,LLaDA:1:256:32,LLaDA:1:1024:16,LLaDA:1:1024:128,LLaDA:1:2048:32,LLaDA:8:1024:16,"
    "LLaDA:4:1024:64,LLaDA:1:1024:all,LLaDA:8:1024:all,LLaDA:32:1024:16,"
    "Dream:1:1024:32,Dream:8:1024:32,Dream:1:1024:16,Dream:1:1024:all,Dream:8:1024:all"
)
DECODE = dkv.Decode(8)


@dataclass(frozen=True)
class Way:
    """How the products of a step are done: by our own kernels or not, and those with PDL or without."""

    name: str
    fused: bool = False
    pdl: bool = False

    @contextlib.contextmanager
    def of(self, current):
        """The steps of a run, of fused_products=True, go this way in here."""
        fused = current.runner.fused if self.fused else None
        with mock.patch.object(current.runner, "fused", fused), mock.patch.object(configs, "PDL", self.pdl):
            yield


LIBRARY, FUSED, PDL = Way("library"), Way("fused", fused=True), Way("fused, PDL", fused=True, pdl=True)


def ways(arch):
    """All that a GPU of a compute capability (90 for 9.0; None: a CPU) can go."""
    return (LIBRARY, FUSED, PDL) if (arch or 0) >= 90 else (LIBRARY, FUSED)


def parse_points(text):
    """[(family, batch, length, active)] of "LLaDA:1:1024:32,..."."""
    points = []
    for part in text.split(","):
        family, *numbers = part.split(":")
        if family not in FAMILIES or len(numbers) != 3 or not all(n.isdecimal() and int(n) for n in numbers[:2]):
            raise argparse.ArgumentTypeError(f"{part!r} is not FAMILY:BATCH:LENGTH:ACTIVE, such as LLaDA:1:1024:32")
        batch, length, active = numbers
        if active != "all" and not (active.isdecimal() and 1 < int(active) < int(length)):
            raise argparse.ArgumentTypeError(f'{part!r}: ACTIVE is "all" or a number above 1 and below the length')
        points.append((family, int(batch), int(length), active if active == "all" else int(active)))
    return points


def way_to(family, active):
    """(tokens to generate, steps before): the beginning of a run whose next step has so many active positions a row."""
    if active == "all":
        return BLOCK, 0
    # LLaDA's first cached step is its third: what was masked before the second is active. Dream's is its second: what
    # is masked, and the position before it
    return (active + 1, 2) if family == "LLaDA" else (active - 1, 1)


def at_step(model, family, batch, length, active):
    """A run on the model's device whose next step is that of the point."""
    gen_length, steps = way_to(family, active)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 50, (batch, length - gen_length), generator=generator).to(model.device)
    current = prepare(model, prompt, gen_length=gen_length, policy=DECODE, cuda_graphs=False, fused_products=True)
    with LIBRARY.of(current):
        for _ in range(steps):
            current.step()
    return current


def fake_at_step(model, family, batch, length, active):
    """(run on the fake GPU, the number of the point's step)."""
    gen_length, steps = way_to(family, active)
    sizes = {"batch": batch, "prompt": length - gen_length, "gen_length": gen_length}
    return fake_run(model, DECODE, **sizes, fused_products=True), steps


def named(point):
    return ":".join(map(str, point))
