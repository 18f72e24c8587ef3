"""`Memory`: merged weights, RoPE tables and runs that dkv keeps for a model between calls, and frees with the model."""

import contextlib
import sys
import threading
import weakref
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.dlpack import from_dlpack, to_dlpack

from dkv.cuda_graphs import nobody_records

_MEMORIES = weakref.WeakKeyDictionary()  # model -> `Memory`
_MERGED = weakref.WeakKeyDictionary()  # storage of a part of a merged tensor -> weak reference to that tensor
_SETUP = threading.RLock()  # one for all models: they may share modules


class Memory:
    """The things of a model that its next call can use again.

    Attributes:
        run: the `dkv.run.Run` that was given back last, or None.
        sessions: the `dkv.sessions.Sessions` of a patched model, or None.
        rope_tables: (headdim, theta) -> device -> cos and sin, of `dkv.models.view.ModelView.rope_tables`.
    """

    def __init__(self):
        self.run = self.sessions = None
        self.rope_tables = {}

    def take(self, name: Literal["run", "sessions"]) -> Any:
        """Removes the "run" or "sessions" and returns it, or None: no other thread or call can take it as well."""
        with _SETUP:
            kept = getattr(self, name)
            setattr(self, name, None)
        return kept


def memory_of(model: nn.Module) -> Memory:
    """The model's own `Memory`; a copy of the model has another one. While torch.compile traces, nothing is kept."""
    if torch.compiler.is_compiling():
        return Memory()
    with _SETUP:
        return _MEMORIES.setdefault(model, Memory())


def setting_up() -> contextlib.AbstractContextManager:
    """A context in which no other thread sets up a model: weights are merged and tables made once, then only read."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _SETUP


def free_memory(device: torch.device) -> int:
    """The bytes that can still be allocated on a device, PyTorch's unused ones included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return sys.maxsize


def wait_for(tensor: Tensor) -> None:
    """Waits until a tensor is computed, because other streams will read it or it replaces another; only at set-up."""
    if tensor.is_cuda:
        with nobody_records():
            torch.cuda.synchronize(tensor.device)


def merge(parameters: list[nn.Parameter]) -> weakref.ref:
    """Moves parameters next to each other in memory, as the parts of one tensor.

    Names, values and `nn.Parameter` objects stay. Each parameter still has a storage of its own and of its own size,
    because programs that save or move a model tell tensors apart by their storages. Only these storages keep the merged
    memory alive.

    Args:
        parameters: of one dtype and device; their shapes differ in the first dim only.

    Returns:
        A weak reference to the merged tensor: the parameters concatenated along the first dim. It is dead once no
        parameter uses that memory.
    """
    with _SETUP:
        merged = _merged(parameters)
        if merged is None:
            # tensors made under inference mode could not be trained later
            with torch.inference_mode(False), torch.no_grad():
                merged = torch.cat([parameter.detach() for parameter in parameters])
                wait_for(merged)
                parts = merged.split([parameter.shape[0] for parameter in parameters])
                for parameter, part in zip(parameters, parts, strict=True):
                    # the same memory in a storage of the part's size, which keeps the whole tensor alive
                    parameter.data = from_dlpack(to_dlpack(part))
                    _MERGED[parameter.untyped_storage()] = weakref.ref(merged)
            if merged.is_cuda:
                # free the old pieces, which are too small to be reused; otherwise all layers exist twice
                with nobody_records():
                    torch.cuda.empty_cache()
        return weakref.ref(merged)


def storages_of(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storage of a tensor; for a subclass that consists of other tensors, their storages."""
    if is_traceable_wrapper_subclass(tensor):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return [storage for part in parts if isinstance(part, Tensor) for storage in storages_of(part)]
    return [tensor.untyped_storage()]


def _merged(parameters):
    """The merged tensor whose consecutive parts the parameters are, or None."""
    known = _MERGED.get(parameters[0].untyped_storage())
    merged = None if known is None else known()
    if merged is None:
        return None
    # addresses can be compared, because the merged tensor is alive
    address = merged.data_ptr()
    for parameter in parameters:
        like = parameter.dtype == merged.dtype and parameter.shape[1:] == merged.shape[1:]
        if not like or not parameter.is_contiguous() or parameter.data_ptr() != address:
            return None
        address += parameter.nbytes
    return merged if address == merged.data_ptr() + merged.nbytes else None


def separate(model: nn.Module) -> None:
    """Undoes the merge: every parameter of the model gets its own memory again."""
    with _SETUP, torch.inference_mode(False), torch.no_grad():
        for parameter in model.parameters():
            if any(storage in _MERGED for storage in storages_of(parameter)):
                own = parameter.data.clone()
                wait_for(own)
                parameter.data = own
