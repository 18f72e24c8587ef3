"""Linear layers, and `MergedLinear`: those with the same input as one matrix product."""

import itertools

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dkv.kernels import cpu
from dkv.memory import merge


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) for x (rows, in_features) and any kind of linear module."""
    if not is_plain(module):
        return module(x)
    # under autocast, a bias may have another dtype
    return cpu.linear(x, module.weight, None if module.bias is None else module.bias.to(module.weight.dtype))


def is_plain(module: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> bool:
    """Whether a module is of one of these kinds, not a subclass, without hooks, replaced forward or special weight.

    Its weight must also be contiguous, because the kernels read it.
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
    """Linear layers with the same input as one product if all are plain; otherwise each is called by itself.

    `dkv.memory.merge` merges their weights, and only the modules keep them alive.

    Args:
        modules: the layers.
        shared: ids of storages that must stay where they are, because other tensors use them too.
    """

    def __init__(self, modules: tuple[nn.Module, ...], shared: set[int] | frozenset[int] = frozenset()):
        self.modules = modules
        self._weight = self._bias = None
        if all(map(is_plain, modules)):
            self.ends = [0, *itertools.accumulate(module.out_features for module in modules)]
            weights = [module.weight for module in modules]
            biases = [module.bias for module in modules if module.bias is not None]
            alike = len({(tensor.dtype, tensor.device) for tensor in weights + biases}) == 1
            alone = not any(id(tensor.untyped_storage()) in shared for tensor in weights + biases)
            if alike and alone and len(biases) in (0, len(modules)):
                self._weight = merge(weights)
                self._bias = merge(biases) if biases else None

    def __call__(self, x: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """The outputs of modules[first:last] for x (rows, in_features), concatenated: (rows, sum of out_features)."""
        if self._weight is None:
            parts = [linear(module, x) for module in self.modules[first:last]]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        part = slice(self.ends[first], self.ends[len(self.modules) if last is None else last])
        return cpu.linear(x, self.weight[part], None if self._bias is None else self.bias[part])

    @property
    def weight(self) -> Tensor | None:
        """The merged weights (sum of out_features, in_features), or None."""
        return _alive(self._weight)

    @property
    def bias(self) -> Tensor | None:
        """The merged biases (sum of out_features,), or None."""
        return _alive(self._bias)


def _alive(merged):
    if merged is None:
        return None
    tensor = merged()
    if tensor is None:
        raise RuntimeError("the model's weights were moved or replaced while it generated; call generate again.")
    return tensor
