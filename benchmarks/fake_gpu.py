"""A GPU that is not there: tensors of any size on it have no values, and what would be launched is written down.

Whatever works in here never waits for the GPU: there is none, and fake tensors hold no values to read.
"""

import contextlib
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import dkv.models  # noqa: E402
from dkv import guard, linear, run  # noqa: E402
from dkv.generation import resolved, run_key  # noqa: E402
from dkv.kernels import (  # noqa: E402
    checks,
    configs,
    lm_head,
)
from dkv.kernels.rows import Size  # noqa: E402
from dkv.models import view_of  # noqa: E402
from dkv.schedule import Schedule  # noqa: E402

# operators that allocate, and launch nothing
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# what a launch is for: by the name of the kernel or of PyTorch's operator; all others keep the books
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
class Architecture:
    """What bounds the blocks that one streaming multiprocessor holds; shared memory in KiB."""

    num_sms: int
    shared_per_block: int
    shared_per_processor: int
    warps: int
    blocks: int


ARCHITECTURES = {
    80: Architecture(108, 163, 164, 64, 32),
    86: Architecture(84, 99, 100, 48, 16),
    89: Architecture(128, 99, 100, 48, 24),
    90: Architecture(132, 227, 228, 64, 32),
    100: Architecture(148, 227, 228, 64, 32),
    120: Architecture(170, 99, 100, 48, 24),
}


@dataclass(frozen=True)
class PointerArgument:
    """Stands for a tensor where Triton specialises: its dtype, and its address in an allocation aligned by 16 bytes."""

    dtype: torch.dtype
    address: int
    elements: int

    def data_ptr(self):
        return self.address


@dataclass(frozen=True)
class Launch:
    """One recorded launch of a Triton kernel; tensors among the arguments have become PointerArguments."""

    kernel: object
    grid: tuple
    arguments: dict

    @property
    def name(self):
        """The name of the kernel function without its marks."""
        return self.kernel.fn.__name__.strip("_").removesuffix("_kernel")


@dataclass(frozen=True)
class Operator:
    """One recorded call of an operator of PyTorch's that launches something."""

    name: str


@contextlib.contextmanager
def recording(arch):
    """Makes tensors fake, and Triton's launches a list of `Launch`, which is yielded, as on a GPU of `arch`.

    Reads of values and copies between devices are errors in here.
    """
    with _recorded_kernels(arch) as launches, FakeTensorMode(), OnlyOnTheDevice():
        yield launches


@contextlib.contextmanager
def fake_gpu(arch=90):
    """The same for whole runs of `dkv`: the list has every `Launch` and every `Operator`.

    Reads are errors; copies between devices are not, since the host sets up a run.
    """
    with contextlib.ExitStack() as stack:
        launches = stack.enter_context(_recorded_kernels(arch))
        for context in (
            mock.patch.multiple(torch.cuda, empty_cache=mock.DEFAULT, synchronize=mock.DEFAULT),
            mock.patch.object(guard, "_read", lambda modules, values: ([], [], [])),
            mock.patch.object(linear, "merge", merged),
            mock.patch.object(run, "LateSizes", NothingLater),
            mock.patch.object(run, "Schedule", RealSchedule),
            FakeTensorMode(allow_non_fake_inputs=True),
            Operators(launches),
        ):
            stack.enter_context(context)
        yield launches


@contextlib.contextmanager
def _recorded_kernels(arch):
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                address = value.storage_offset() * value.element_size()
                arguments[name] = PointerArgument(value.dtype, address, value.numel())
        launches.append(Launch(kernel, grid, arguments))

    with contextlib.ExitStack() as stack:
        for context in (
            mock.patch.object(JITFunction, "run", record),
            mock.patch.object(InterpretedFunction, "run", record),
            mock.patch.multiple(torch.Tensor, **METHODS),
            mock.patch.object(checks, "device_guard", lambda tensor: contextlib.nullcontext()),
            mock.patch.dict(lm_head._EXCLUDED, clear=True),
            on_gpu(arch),
        ):
            stack.enter_context(context)
        yield launches


def on_gpu(arch):
    """A context in which the tables of dkv.kernels.configs take every CUDA device for one of `arch`."""
    major, minor = divmod(arch, 10)
    num_sms = ARCHITECTURES[arch].num_sms
    properties = SimpleNamespace(major=major, minor=minor, multi_processor_count=num_sms)
    return mock.patch.object(configs, "_properties", lambda index: properties)


class Operators(TorchDispatchMode):
    """Writes down PyTorch's operators that launch something."""

    def __init__(self, launches):
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        launches = func.namespace == "aten" and not func.is_view and name not in ALLOCATIONS
        if launches and "cuda" in devices_of(result, args):
            self.launches.append(Operator(name))
        return result


class OnlyOnTheDevice(TorchDispatchMode):
    """Refuses tensors on the CPU: copies to and from the device too. (Reads are refused by fake tensors themselves.)"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if devices_of(result, args, kwargs) - {"cuda"}:
            raise RuntimeError(f"{func} touches the CPU.")
        return result


def merged(parameters):
    """In place of `dkv.memory.merge`: fake tensors share no memory."""
    tensor = torch.cat(list(parameters))
    return lambda: tensor


def devices_of(*values):
    return {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}


class RealSchedule(Schedule):
    """The schedule is the host's, whose numbers are real."""

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
    """In place of `LateSizes`: nothing is known but the bounds."""

    def __init__(self, like):
        row = [-1 if size == Size.NAN_STEP else 2**30 for size in Size]
        self.rows = [row] * like.shape[0]

    def post(self, sizes):
        pass

    def take(self):
        return self.rows


def _setitem(x, index, value):
    part = _getitem(x, index)
    part.copy_(value) if isinstance(value, torch.Tensor) else part.fill_(value)


def _getitem(x, index):
    """x[index] by operators."""
    dim, gathered, items = 0, [], list(index if isinstance(index, tuple) else (index,))
    if any(item is ... for item in items):
        others = len([item for item in items if item is not None and item is not ...])
        place = [item is ... for item in items].index(True)
        items[place : place + 1] = [slice(None)] * (x.dim() - others)
    for item in items:
        if isinstance(item, int):
            x = x.select(dim, item)
            continue
        if item is None:
            x = x.unsqueeze(dim)
        elif isinstance(item, slice):
            x = torch.ops.aten.slice(x, dim, item.start, item.stop, item.step or 1)
        gathered.append(item if isinstance(item, torch.Tensor) else None)
        dim += 1
    return x if all(item is None for item in gathered) else torch.ops.aten.index(x, gathered)


# a build of PyTorch without CUDA refuses a few methods even for fake tensors: the operators behind them
METHODS = {
    "__getitem__": _getitem,
    "__setitem__": _setitem,
    "__invert__": lambda x: torch.ops.aten.bitwise_not.default(x),
    "copy_": lambda x, source: torch.ops.aten.copy_.default(x, source),
    "contiguous": lambda x: x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format),
}


def fake_model(config, dtype=torch.bfloat16, device="cuda"):
    """A native model of this config on the fake GPU, or of memory that nobody writes on another device."""
    native = dkv.models.LLaDA if config["model_type"] == "llada" else dkv.models.Dream
    model = native(SimpleNamespace(**config)).eval()
    for name, parameter in list(model.named_parameters()):
        model._set_parameter(name, torch.empty(parameter.shape, dtype=dtype, device=device))
    return model


def fake_run(model, policy, *, batch, prompt, gen_length, cuda_graphs=False, **options):
    """A `Run` of ours on the fake GPU, at its first step: `dkv.generate.prepare` without what reads from the prompt.

    Args:
        model: of `fake_model`.
        batch, prompt: ints, rows and their length.
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


def counted(launches):
    """{purpose: launches}."""
    return dict(Counter(PURPOSES.get(launch.name, "bookkeeping") for launch in launches))
