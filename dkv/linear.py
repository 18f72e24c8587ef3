"""Linear layers of a few rows, which are most of a cached step."""

import torch
from torch import nn

# with fewer or more rows PyTorch's own order is as fast; between, on 2 cores of a Xeon, it takes twice as long
CPU_SKINNY_ROWS = range(9, 49)


def linear(module, x):
    """module(x) for x (rows, in_features), whatever kind of module it is; a plain nn.Linear of few rows is faster.

    On a CPU a product of few rows runs at the speed of reading the weight only if the weight is its left factor. The
    result is then a transposed view, which the next such product takes as it is.
    """
    if x.device.type == "cpu" and x.shape[0] in CPU_SKINNY_ROWS and _is_plain(module):
        y = torch.mm(module.weight, x.t()).t()
        return y if module.bias is None else y.add_(module.bias)
    return module(x)


def _is_plain(module):
    """Whether calling it is nothing but a product: no subclass, no hook, no replaced forward."""
    return (
        type(module) is nn.Linear
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
    )
