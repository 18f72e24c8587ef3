"""Detects changes to a model: cached K/V are invalid once a weight, module or hook has changed."""

import weakref

from dkv.memory import storage_of


class Fingerprint:
    """The modules, hooks, parameters and buffers of a model at this moment.

    Objects are known by identity and held weakly, the storages of tensors too: memory that was freed and is used again
    is not taken for the old one, and nothing is kept alive. Changes of values in place are seen as far as PyTorch
    counts them: not those through `.data`, nor those of inference tensors; nor are switches that are plain attributes,
    such as an adapter's: `dkv.reset` after those.

    Args:
        modules: nn.Modules.
        values: whether changes in place count.
    """

    def __init__(self, modules, *, values):
        self._values, self._modules = values, [weakref.ref(module) for module in modules]
        self._states = []
        for module in modules:
            objects, facts = _state(module, values)
            self._states.append(([None if each is None else weakref.ref(each) for each in objects], facts))

    def covers(self, modules):
        """Whether it was made of these modules."""
        return [known() for known in self._modules] == list(modules)

    def holds(self):
        """Whether nothing has changed since."""
        return all(self._is_what_it_was(*each) for each in zip(self._modules, self._states, strict=True))

    def _is_what_it_was(self, known, state):
        module, (references, facts) = known(), state
        if module is None:
            return False
        objects, facts_now = _state(module, self._values)
        if facts_now != facts or len(objects) != len(references):
            return False
        return all(new is None if old is None else old() is new for old, new in zip(references, objects, strict=True))


def _state(module, values):
    """The objects that a module consists of, to be compared by identity, and facts, by value."""
    objects = [module.__dict__.get("forward"), *module._modules.values()]
    facts = [type(module), *module._forward_pre_hooks, *module._forward_hooks]
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None:
                objects += tensor, storage_of(tensor)
                facts += tensor.data_ptr(), tensor.dtype, tensor.shape, _version(tensor) if values else None
    return objects, facts


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
    called = set(map(id, called))

    def contains_called(module, path):
        if id(module) in called:
            return True
        found = [contains_called(child, f"{path}.{name}") for name, child in module.named_children()]
        hooked = module._forward_pre_hooks or module._forward_hooks
        # what replace_attention puts on the model is a replaced forward too
        replaced = "forward" in module.__dict__ and "_orig_mod" not in module._modules  # as torch.compile does
        changed = not runs_forward and hooked if module is model else hooked or replaced
        if any(found) and changed:
            raise ValueError(
                f"{path.removeprefix('.') or 'the model'} ({type(module).__name__}) has a hook or a replaced forward, "
                "which dkv would pass over: it calls the linear layers, norms, embedding and head itself. Remove it, "
                "or put it on one of those."
            )
        return any(found)

    contains_called(model, "")
