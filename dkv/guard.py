"""What a model was when its modules were taken: once a weight, module or hook is another, cached K/V are void."""


class Snapshot:
    """The modules, hooks, parameters and buffers of a model at this moment.

    Changes in place are seen as far as PyTorch counts them: not those through `.data`, nor those of inference tensors;
    nor are switches that are plain attributes, such as an adapter's: `dkv.reset` after those.
    """

    def __init__(self, model):
        self._modules = list(model.modules())
        self._states = list(map(_state, self._modules))

    def holds(self):
        """Whether nothing has changed since."""
        return all(_state(module) == state for module, state in zip(self._modules, self._states, strict=True))


def _state(module):
    return (
        tuple(module._modules.values()),
        [(p.data_ptr(), _version(p)) for p in module._parameters.values() if p is not None],
        [(b.data_ptr(), _version(b)) for b in module._buffers.values() if b is not None],
        (*module._forward_pre_hooks, *module._forward_hooks, module.__dict__.get("forward")),
    )


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
