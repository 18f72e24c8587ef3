"""Linear layers of a step: those of one input as one product of merged weights."""

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dkv.kernels import cpu
from dkv.memory import merge


def linear(module, x):
    """module(x) for x (rows, in_features), whatever kind of module it is."""
    if not is_plain(module):
        return module(x)
    # a bias may be of another dtype, as autocast takes it
    return cpu.linear(x, module.weight, None if module.bias is None else module.bias.to(module.weight.dtype))


def is_plain(module, kinds=(nn.Linear,)):
    """Whether calling it is nothing but what its kind does: no subclass, no hook, no replaced forward or weight.

    And whether kernels can read its weight, whose features must lie together.
    """
    return (
        type(module) in kinds
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
        and isinstance(module.weight, nn.Parameter)
        and not is_traceable_wrapper_subclass(module.weight)
        and module.weight.is_contiguous()
    )


class MergedLinear:
    """Linear layers of one input as one product, where all are plain; else each is called as it is.

    Their weights are merged, as `dkv.memory.merge` says, and kept alive by the modules alone.

    Args:
        modules: of one input.
        shared: ids of storages that must stay where they are, since something else lies there too.
    """

    def __init__(self, modules, shared=frozenset()):
        self.modules = modules
        self.ends = [0]
        for module in modules:
            self.ends.append(self.ends[-1] + module.out_features)
        self._weight = self._bias = None
        if all(map(is_plain, modules)):
            weights = [module.weight for module in modules]
            biases = [module.bias for module in modules if module.bias is not None]
            alike = len({(tensor.dtype, tensor.device) for tensor in weights + biases}) == 1
            alone = not any(id(tensor.untyped_storage()) in shared for tensor in weights + biases)
            if alike and alone and len(biases) in (0, len(modules)):
                self._weight = merge(weights)
                self._bias = merge(biases) if biases else None

    def __call__(self, x, first=0, last=None):
        """(rows, sum of out_features): the outputs of modules[first:last] beside each other, x (rows, in_features)."""
        if self._weight is None:
            parts = [linear(module, x) for module in self.modules[first:last]]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        part = slice(self.ends[first], self.ends[len(self.modules) if last is None else last])
        return cpu.linear(x, self.weight[part], None if self._bias is None else self.bias[part])

    @property
    def weight(self):
        """(sum of out_features, in_features): the merged weights, or None."""
        return _alive(self._weight)

    @property
    def bias(self):
        """(sum of out_features,): the merged biases, or None."""
        return _alive(self._bias)


def _alive(merged):
    if merged is None:
        return None
    tensor = merged()
    if tensor is None:
        raise RuntimeError("the model's weights were moved or replaced while it generated; call generate again.")
    return tensor
