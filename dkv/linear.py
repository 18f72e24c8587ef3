"""Linear layers of a step: those of one input as one product of merged weights."""

import weakref

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dkv.kernels import product

# the first of several modules -> parameter name -> the tensor that its and the others' are parts of, and references
_MERGED = weakref.WeakKeyDictionary()


def linear(module, x):
    """module(x) for x (rows, in_features), whatever kind of module it is."""
    return product.linear(x, module.weight, module.bias) if is_plain(module) else module(x)


def is_plain(module, kinds=(nn.Linear,)):
    """Whether calling it is nothing but what its kind does: no subclass, no hook, no replaced forward or weight."""
    return (
        type(module) in kinds
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
        and isinstance(module.weight, nn.Parameter)
        and not is_traceable_wrapper_subclass(module.weight)
    )


class Projection:
    """Linear layers of one input as one product, where all are plain; else each is called as it is.

    Their weights become views of one tensor, in place of their own memory: names, values and the `nn.Parameter` objects
    stay. What has been given other memory since (`module.to`, a swapped `.data`) is merged anew.
    """

    def __init__(self, modules):
        self.modules = modules
        self.ends = [0]
        for module in modules:
            self.ends.append(self.ends[-1] + module.out_features)
        self.weight = self.bias = None
        if all(map(is_plain, modules)) and len({(m.weight.dtype, m.weight.device) for m in modules}) == 1:
            self.weight = _merged(modules, "weight")
            if any(m.bias is not None for m in modules):
                if all(m.bias is not None for m in modules):
                    self.bias = _merged(modules, "bias")
                else:
                    self.weight = None

    def __call__(self, x, first=0, last=None):
        """(rows, sum of out_features): the outputs of modules[first:last] beside each other, x (rows, in_features)."""
        if self.weight is None:
            parts = [linear(module, x) for module in self.modules[first:last]]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        part = slice(self.ends[first], self.ends[len(self.modules) if last is None else last])
        return product.linear(x, self.weight[part], None if self.bias is None else self.bias[part])


def separate(model):
    """Gives all parameters of the model that were merged memory of their own again."""
    for module in model.modules():
        for _, parameters in _MERGED.pop(module, {}).values():
            for parameter in (p for p in (reference() for reference in parameters) if p is not None):
                with torch.inference_mode(False), torch.no_grad():
                    parameter.data = parameter.data.clone()


def _merged(modules, name):
    parameters = [getattr(module, name) for module in modules]
    known = _MERGED.setdefault(modules[0], {})
    if name not in known or not _are_parts(parameters, known[name][0]):
        known.pop(name, None)
        # tensors made under inference mode could not be trained later
        with torch.inference_mode(False), torch.no_grad():
            merged = torch.cat([parameter.detach() for parameter in parameters])
            for parameter, part in zip(parameters, _parts(parameters, merged), strict=True):
                parameter.data = part
        known[name] = merged, [weakref.ref(parameter) for parameter in parameters]
        if merged.is_cuda:
            # the pieces left behind are too small for the next layer's: back to the device, or all layers exist twice
            torch.cuda.empty_cache()
    return known[name][0]


def _parts(parameters, merged):
    return merged.split([parameter.shape[0] for parameter in parameters])


def _are_parts(parameters, merged):
    if sum(parameter.shape[0] for parameter in parameters) != merged.shape[0]:
        return False
    return all(p.is_set_to(part) for p, part in zip(parameters, _parts(parameters, merged), strict=True))
