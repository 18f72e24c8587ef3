"""Runs of `dkv` on a GPU that is not there: tensors have true sizes and no values, and launches are written down."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock
from unittest.mock import DEFAULT

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import dkv
from benchmarks.harness.launches import Launch, devices_of, recorded_kernels
from benchmarks.harness.models import Config, family_of
from dkv import guard, linear, run
from dkv.generation import resolved, run_key
from dkv.kernels.rows import Size
from dkv.models import loader, view_of
from dkv.schedule import Schedule

# operators that allocate and launch nothing
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# the purpose of a launch by the name of the kernel or of PyTorch's operator; all others are bookkeeping
PURPOSES = {
    "mm": "product",
    "addmm": "product",
    "linear_rope_cache": "product",
    "linear_add_norm": "product",
    "linear_swiglu": "product",
    "add_rms_norm": "norm",
    "deferred_norm": "norm",
    "rope_cache": "rope",
    "delayed_attention": "attention",
    "merge_splits": "merge",
    "swiglu": "swiglu",
    "lm_head": "head",
    "merge_confidence": "head",
    "pack_positions": "packing",
    "commit_tokens": "commit",
}


@dataclass(frozen=True)
class Operator:
    """One recorded call of a PyTorch operator that launches something."""

    name: str


@contextlib.contextmanager
def fake_gpu(arch: int = 90) -> Iterator[list[Launch | Operator]]:
    """Yields a list that gets every launch of whole runs of `dkv`, as on a GPU of `arch` (90 for 9.0).

    Reads are errors; copies between devices are not, because the host sets up a run.
    """
    with contextlib.ExitStack() as stack:
        launches = stack.enter_context(recorded_kernels(arch))
        for context in (
            mock.patch.multiple(torch.cuda, empty_cache=DEFAULT, synchronize=DEFAULT, current_stream=DEFAULT),
            mock.patch.object(guard, "_read", lambda modules, values: ([], [], [])),
            mock.patch.object(linear, "merge", merged),
            mock.patch.object(run, "LateSizes", NothingLater),
            mock.patch.object(run, "Schedule", RealSchedule),
            FakeTensorMode(allow_non_fake_inputs=True),
            Operators(launches),
        ):
            stack.enter_context(context)
        yield launches


class Operators(TorchDispatchMode):
    """Records PyTorch's operators that launch something."""

    def __init__(self, launches: list[Launch | Operator]):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        launches = func.namespace == "aten" and not func.is_view and name not in ALLOCATIONS
        if launches and "cuda" in devices_of(result, args):
            self.launches.append(Operator(name))
        return result


def merged(parameters: Iterable[Tensor]) -> Callable[[], Tensor]:
    """Replaces `dkv.memory.merge`: fake tensors share no memory."""
    tensor = torch.cat(list(parameters))
    return lambda: tensor


class RealSchedule(Schedule):
    """The schedule is computed on the host, with real numbers."""

    def __init__(self, **options):
        with unset_fake_temporarily():
            super().__init__(**options)

    def commits(self, prompt_masks):
        with unset_fake_temporarily():
            return super().commits(prompt_masks)

    def forecasts(self, length, shifted):
        with unset_fake_temporarily():
            return super().forecasts(length, shifted)


class NothingLater:
    """Replaces `LateSizes`: only the bounds are known."""

    def __init__(self, like):
        row = [-1 if size == Size.NAN_STEP else 2**30 for size in Size]
        self.rows = [row] * like.shape[0]

    def post(self, sizes):
        pass

    def take(self):
        return self.rows


def fake_model(config: Config, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> nn.Module:
    """A native model of this config on the fake GPU, or on another device with unwritten weights."""
    model = loader.empty(family_of(config), config).eval()
    for name, parameter in list(model.named_parameters()):
        loader.set_parameter(model, name, torch.empty(parameter.shape, dtype=dtype, device=device))
    return model


def fake_run(
    model: nn.Module,
    policy: dkv.Policy,
    *,
    batch: int,
    prompt: int,
    gen_length: int,
    cuda_graphs: bool = False,
    **options: Any,
) -> run.Run:
    """Our `Run` on the fake GPU, at its first step: `dkv.generation.prepare` without its reads of the prompt.

    Args:
        model: of `fake_model`.
        batch, prompt: rows and their length.
        gen_length, cuda_graphs, options: of `dkv.GenerateConfig`.
    """
    view = view_of(model)
    options = {"remasking": "random" if policy.needs_order else None} | options
    config = dkv.GenerateConfig(policy=policy, gen_length=gen_length, cuda_graphs=cuda_graphs, **options)
    key = run_key(resolved(config, view), view, batch=batch, seqlen=prompt + gen_length, has_prompt_masks=False)
    current = run.take_run(model, key, view)
    x = torch.empty(batch, prompt + gen_length, dtype=torch.int64, device="cuda")
    lengths = [prompt + gen_length] * batch
    current.start(
        x,
        torch.empty_like(x, dtype=torch.bool),
        lengths=lengths,
        prompt_masks=[0] * batch,
        forecasts=current.schedule.forecasts(max(lengths), current.shifted) if key.has_forecasts else None,
        first_generated=prompt,
        seed=0,
        order=None,
    )
    return current


def counted(launches: list[Launch | Operator]) -> dict[str, int]:
    """Launches by their purpose."""
    return dict(Counter(PURPOSES.get(launch.name, "bookkeeping") for launch in launches))
