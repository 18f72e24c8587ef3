"""Detects changes to a model. Cached K/V are invalid once a weight, module or hook has changed."""

import operator
import weakref

from torch import Tensor, nn

from dkv.memory import storages_of

UNKNOWN = -1
_SHAPE_AND_DTYPE = operator.attrgetter("shape", "dtype")
_SIMPLE = (nn.Parameter, Tensor)  # have one storage; other subclasses may consist of several tensors


class Fingerprint:
    """The modules, hooks, parameters and buffers of a model at this moment.

    It compares modules and the storages of tensors by identity through weak references, so it keeps nothing alive and
    does not mistake memory that was freed and is used again for the old one. It sees changes of values in place if
    PyTorch counts them: not changes through `.data` or of inference tensors. It does not see plain attributes, such as
    the switch of an adapter. Call `dkv.reset` after those.

    Args:
        values: whether changes of values in place count.
    """

    def __init__(self, modules: list[nn.Module], *, values: bool):
        self._values, self._modules = values, [weakref.ref(module) for module in modules]
        self._facts, storages, forwards = _read(modules, values)
        self._storages = [weakref.ref(storage) for storage in storages]
        self._forwards = [_reference(forward) for forward in forwards]

    def covers(self, modules: list[nn.Module]) -> bool:
        """Whether it was made of these modules."""
        return [known() for known in self._modules] == modules

    def unchanged(self) -> bool:
        """Whether nothing has changed since it was made."""
        modules = [known() for known in self._modules]
        if any(module is None for module in modules):
            return False
        facts, storages, forwards = _read(modules, self._values)
        # equal ids mean the same modules and storages, because the old ones are still alive
        return (
            facts == self._facts
            and all(known() is storage for known, storage in zip(self._storages, storages, strict=True))
            and all(
                known is None or known() is forward for known, forward in zip(self._forwards, forwards, strict=True)
            )
        )


def _read(modules, values):
    """Facts to compare by value, and the storages and replaced forwards to compare by identity."""
    facts, tensors, forwards = [*map(type, modules)], [], []
    for module in modules:
        facts += map(id, module._modules.values())
        tensors += module._parameters.values()
        tensors += module._buffers.values()
        if module._forward_pre_hooks or module._forward_hooks:
            facts += *module._forward_pre_hooks, *module._forward_hooks
        if "forward" in module.__dict__:
            forwards.append(module.__dict__["forward"])
    tensors = [tensor for tensor in tensors if tensor is not None]
    simple = [tensor for tensor in tensors if type(tensor) in _SIMPLE]
    storages = [*map(Tensor.untyped_storage, simple)]
    facts += map(Tensor.data_ptr, simple)
    facts += map(Tensor.stride, simple)
    if len(simple) < len(tensors):
        storages += [each for tensor in tensors if type(tensor) not in _SIMPLE for each in storages_of(tensor)]
    facts += map(id, (*tensors, *storages, *forwards))
    facts += map(_SHAPE_AND_DTYPE, tensors)
    if values:
        facts += map(version_of, tensors)
    return facts, storages, forwards


def _reference(forward):
    try:
        return weakref.ref(forward)
    except TypeError:  # its class does not support weak references: the id has to do
        return None


def version_of(tensor: Tensor) -> int:
    """PyTorch's count of the changes in place, or `UNKNOWN`."""
    try:
        return tensor._version
    except RuntimeError:  # inference tensors have none
        return UNKNOWN


def check_containers(model: nn.Module, called: list[nn.Module], *, runs_forward: bool) -> None:
    """Refuses hooks and replaced forwards that dkv would skip, because it calls the modules below them itself.

    Args:
        called: the modules that dkv calls.
        runs_forward: whether model.forward runs, with the model's own hooks.

    Raises:
        ValueError: the model, or a module between it and a called one, has a hook or a replaced forward.
    """
    _contains_called(model, "", set(map(id, called)), runs_forward)


def _contains_called(module, path, called, runs_forward):
    if id(module) in called:
        return True
    found = [_contains_called(child, f"{path}.{name}", called, runs_forward) for name, child in module.named_children()]
    hooked = module._forward_pre_hooks or module._forward_hooks
    # allowed: what torch.compile, accelerate (the class's own forward, bound again) and replace_attention put there
    forward = getattr(module.__dict__.get("forward"), "__func__", module.__dict__.get("forward"))
    replaced = forward not in (None, type(module).forward) and "_orig_mod" not in module._modules
    changed = not runs_forward and hooked if path == "" else hooked or replaced
    if any(found) and changed:
        raise ValueError(
            f"{path.removeprefix('.') or 'the model'} ({type(module).__name__}) has a hook or a replaced forward, "
            "which dkv would skip: it calls the linear layers, norms, embedding and head itself. Remove it, "
            "or put it on one of those."
        )
    return any(found)
