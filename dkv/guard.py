"""Detects changes to a model: cached K/V are invalid once a weight, module or hook has changed."""

import operator
import weakref

import torch

from dkv.memory import storages_of

_SHAPE_AND_DTYPE = operator.attrgetter("shape", "dtype")
_SIMPLE = (torch.nn.Parameter, torch.Tensor)  # tensors that are no subclasses


class Fingerprint:
    """The modules, hooks, parameters and buffers of a model at this moment.

    Modules and the storages of tensors are known by identity and held weakly: memory that was freed and is used again
    is not taken for the old one, and nothing is kept alive. Changes of values in place are seen as far as PyTorch
    counts them: not those through `.data`, nor those of inference tensors; nor are switches that are plain attributes,
    such as an adapter's: `dkv.reset` after those.

    Args:
        modules: nn.Modules.
        values: whether changes in place count.
    """

    def __init__(self, modules, *, values):
        self._values, self._modules = values, [weakref.ref(module) for module in modules]
        self._facts, storages, forwards = _read(modules, values)
        self._storages = [weakref.ref(storage) for storage in storages]
        self._forwards = [_reference(forward) for forward in forwards]

    def covers(self, modules):
        """Whether it was made of these modules."""
        return [known() for known in self._modules] == list(modules)

    def unchanged(self):
        """Whether nothing has changed since."""
        modules = [known() for known in self._modules]
        if any(module is None for module in modules):
            return False
        facts, storages, forwards = _read(modules, self._values)
        # modules and storages of the same id are the same, since the old ones are alive
        return (
            facts == self._facts
            and all(known() is storage for known, storage in zip(self._storages, storages, strict=True))
            and all(
                known is None or known() is forward for known, forward in zip(self._forwards, forwards, strict=True)
            )
        )


def _read(modules, values):
    """Facts to be compared by value, and the storages and replaced forwards that must be the same objects."""
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
    storages = [*map(torch.Tensor.untyped_storage, simple)]
    facts += map(torch.Tensor.data_ptr, simple)
    facts += map(torch.Tensor.stride, simple)
    if len(simple) < len(tensors):
        storages += [each for tensor in tensors if type(tensor) not in _SIMPLE for each in storages_of(tensor)]
    facts += map(id, (*tensors, *storages, *forwards))
    facts += map(_SHAPE_AND_DTYPE, tensors)
    if values:
        facts += map(_version, tensors)
    return facts, storages, forwards


def _reference(forward):
    try:
        return weakref.ref(forward)
    except TypeError:  # of a class without room for one: the id has to do
        return None


def _version(tensor):
    try:
        return tensor._version
    except RuntimeError:  # those made under inference mode have none
        return 0


def check_containers(model, called, *, runs_forward):
    """Refuses hooks and replaced forwards that would be passed over, since dkv calls the modules below them itself.

    Args:
        called: the modules that dkv calls.
        runs_forward: whether model.forward runs, with the model's own hooks.

    Raises:
        ValueError: the model, or a module between it and those, has such.
    """
    _contains_called(model, "", set(map(id, called)), runs_forward)


def _contains_called(module, path, called, runs_forward):
    if id(module) in called:
        return True
    found = [_contains_called(child, f"{path}.{name}", called, runs_forward) for name, child in module.named_children()]
    hooked = module._forward_pre_hooks or module._forward_hooks
    # what replace_attention puts on the model is a replaced forward too
    replaced = "forward" in module.__dict__ and "_orig_mod" not in module._modules  # as torch.compile does
    changed = not runs_forward and hooked if path == "" else hooked or replaced
    if any(found) and changed:
        raise ValueError(
            f"{path.removeprefix('.') or 'the model'} ({type(module).__name__}) has a hook or a replaced forward, "
            "which dkv would pass over: it calls the linear layers, norms, embedding and head itself. Remove it, "
            "or put it on one of those."
        )
    return any(found)
