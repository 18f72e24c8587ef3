"""Records launches of Triton kernels without a GPU, and compiles them as Triton's JIT would.

Tensors are fake: they have a size, but no values. So whatever is recorded here never waits for the GPU.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

from dkv.kernels import checks, configs, lm_head


@dataclass(frozen=True)
class Architecture:
    """The limits of a GPU and of each of its streaming multiprocessors (SMs); shared memory in KiB."""

    num_sms: int
    shared_per_block: int
    shared_per_sm: int
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
    """Stands for a tensor where Triton specialises: its dtype, and its offset in an allocation aligned to 16 bytes."""

    dtype: torch.dtype
    address: int
    elements: int

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class Launch:
    """One recorded launch of a Triton kernel; tensors among the arguments have become PointerArguments."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the kernel function without `_` and `_kernel`."""
        return self.kernel.fn.__name__.strip("_").removesuffix("_kernel")


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Yields a list that launches are appended to instead of running, as on a GPU of `arch` (90 for 9.0).

    Tensors are fake. Reads of values and copies between devices are errors.
    """
    with recorded_kernels(arch) as launches, FakeTensorMode(), OnlyOnTheDevice():
        yield launches


@contextlib.contextmanager
def recorded_kernels(arch: int) -> Iterator[list]:
    """Only the kernels: without fake tensors."""
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        for name, value in arguments.items():
            if isinstance(value, Tensor):
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


def on_gpu(arch: int) -> contextlib.AbstractContextManager:
    """A context in which the tables of dkv.kernels.configs take every CUDA device for one of `arch`."""
    major, minor = divmod(arch, 10)
    num_sms = ARCHITECTURES[arch].num_sms
    properties = SimpleNamespace(major=major, minor=minor, multi_processor_count=num_sms)
    return mock.patch.object(configs, "_properties", lambda index: properties)


class OnlyOnTheDevice(TorchDispatchMode):
    """Refuses tensors on the CPU, and so copies to and from the device. (Fake tensors refuse reads by themselves.)"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if devices_of(result, args, kwargs) - {"cuda"}:
            raise RuntimeError(f"{func} touches the CPU.")
        return result


def devices_of(*values: Any) -> set[str]:
    """The types of the devices of all tensors in nested values."""
    return {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


def _setitem(x, index, value):
    part = _getitem(x, index)
    part.copy_(value) if isinstance(value, Tensor) else part.fill_(value)


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
        gathered.append(item if isinstance(item, Tensor) else None)
        dim += 1
    return x if all(item is None for item in gathered) else torch.ops.aten.index(x, gathered)


# without CUDA, PyTorch refuses a few methods even for fake tensors: these call the operators behind them
METHODS = {
    "__getitem__": _getitem,
    "__setitem__": _setitem,
    "__invert__": lambda x: torch.ops.aten.bitwise_not.default(x),
    "copy_": lambda x, source: torch.ops.aten.copy_.default(x, source),
    "contiguous": lambda x: x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format),
}


def specialised(launch: Launch, arch: int) -> tuple[ASTSource, GPUTarget, Any]:
    """(source, target, options) that Triton's JIT would compile for a recorded launch."""
    kernel, target = launch.kernel, GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    arguments = dict(launch.arguments, debug=False, instrumentation_mode="")
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(**arguments)
    options, signature, constexprs, attrs = kernel._pack_args(backend, arguments, bound, specialization, options)
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs), target, options


def key_of(source: ASTSource, options: Any) -> str:
    """Identifies a compiled kernel: different kernels have different keys."""
    return " ".join(map(str, (source.name, source.signature, source.constants, source.attrs, options)))


def compile_launch(launch: Launch, arch: int) -> CompiledKernel:
    """Compiles a recorded launch as Triton's JIT would at run time."""
    source, target, options = specialised(launch, arch)
    return triton.compile(source, target=target, options=dict(options.__dict__))
