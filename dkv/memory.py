"""What dkv keeps for a model between calls, and nothing after it: merged weights, RoPE tables, the memory of runs."""

import contextlib
import threading
import weakref
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.dlpack import from_dlpack, to_dlpack

from dkv.cuda_graphs import nobody_records

_MEMORIES = weakref.WeakKeyDictionary()  # model -> `Memory`
_MERGED = weakref.WeakKeyDictionary()  # storage of a part of a merged tensor -> weak reference to that tensor
_SETUP = threading.RLock()  # one for all models: they may share modules


class Memory:
    """What the next call on a model can use; whoever takes it has it alone until it is given back.

    Attributes:
        run: the `dkv.run.Run` that was given back last, or None; session: the `dkv.patch.Session` of a patched model.
        rope_tables: (headdim, theta) -> device -> cos and sin, of `dkv.models.view.ModelView.rope_tables`.
    """

    def __init__(self):
        self.run = self.session = None
        self.rope_tables = {}

    def take(self, name: Literal["run", "session"]):
        """The "run" or the "session", which is then nobody else's: no other thread's, nor the next call's; or None."""
        with _SETUP:
            kept = getattr(self, name)
            setattr(self, name, None)
        return kept


def memory_of(model: nn.Module) -> Memory:
    """The model's own; a copy of the model has another one. While torch.compile traces, nothing is kept."""
    if torch.compiler.is_compiling():
        return Memory()
    with _SETUP:
        return _MEMORIES.setdefault(model, Memory())


def setting_up():
    """A context in which no other thread sets up a model: weights are merged and tables made once, then only read."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _SETUP


def wait_for(tensor: Tensor) -> None:
    """Waits for what made a tensor that other streams will read, or that takes another's place; at set-up only."""
    if tensor.is_cuda:
        with nobody_records():
            torch.cuda.synchronize(tensor.device)


def merge(parameters: list[nn.Parameter]) -> weakref.ref:
    """Gives parameters memory next to each other, as the parts of one tensor.

    Names, values and `nn.Parameter` objects stay. Each parameter still has a storage of its own, of its own size: that
    is how programs that save or move a model tell tensors apart. The storages together keep the merged memory alive;
    dkv does not.

    Args:
        parameters: of one dtype and device, whose shapes differ in the first dim only.

    Returns:
        A weak reference to the merged tensor, the parameters one after the other along the first dim; dead once none of
        them uses that memory any more.
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
                    parameter.data = with_own_storage(part)
                    _MERGED[parameter.untyped_storage()] = weakref.ref(merged)
            if merged.is_cuda:
                # the old pieces are too small to be reused: free them, or all layers exist twice
                with nobody_records():
                    torch.cuda.empty_cache()
        return weakref.ref(merged)


def with_own_storage(part: Tensor) -> Tensor:
    """The same memory under a storage that begins and ends with it; it keeps the whole memory alive."""
    return from_dlpack(to_dlpack(part))


def storages_of(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storage of a tensor; of a subclass that consists of other tensors, theirs."""
    if is_traceable_wrapper_subclass(tensor):
        return [storage for name in tensor.__tensor_flatten__()[0] for storage in storages_of(getattr(tensor, name))]
    return [tensor.untyped_storage()]


def _merged(parameters):
    """The tensor that the parameters are, one after the other, or None."""
    known = _MERGED.get(parameters[0].untyped_storage())
    merged = None if known is None else known()
    if merged is None:
        return None
    # an address says something, because the merged tensor is alive
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
