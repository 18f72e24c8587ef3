"""Products of token rows and a weight on a CPU, where the order of the factors decides the speed; elsewhere PyTorch's.

Of few rows PyTorch's own order (rows first) reaches half to nine tenths of the speed of the other one (weight first),
whose result is a transposed view: memory in which one feature of all tokens lies together. The next such product takes
it as it is, and elementwise operators keep it.
"""

import torch
import torch.nn.functional as F

# Rows for which the weight comes first; rows for which oneDNN multiplies, which PyTorch does not call by itself for
# float32, and which spends 0.5 ms on every new pair of a weight's shape and a number of rows, so that it is for few
# numbers; and the unit of rows of which the first kind is fast: 63 rows take 1.5 times as long as 64.
# Measured in float32 on 2 cores each of an AMD EPYC (AVX2) and of Intel Xeons (AVX512).
if torch.backends.cpu.get_cpu_capability() == "AVX2":
    WEIGHT_FIRST_ROWS, ONEDNN_ROWS, ROW_MULTIPLE = range(16, 513), range(1, 16), 8
else:
    WEIGHT_FIRST_ROWS, ONEDNN_ROWS, ROW_MULTIPLE = range(8, 33), range(0), 1


def padded_rows(count):
    """The number of rows, at least `count`, that products on a CPU should have: padding costs less than it saves."""
    return -(-count // ROW_MULTIPLE) * ROW_MULTIPLE if count in WEIGHT_FIRST_ROWS else count


def linear(x, weight, bias=None):
    """x weight^T + bias.

    Args:
        x: (rows, in_features), any strides, or of more dimensions.
        weight: (out_features, in_features).
        bias: (out_features,) or None.

    Returns:
        (rows, out_features); a transposed view where the weight comes first.
    """
    if _is_weight_first(x):
        y = torch.mm(weight, x.t()).t()
        return y if bias is None else y.add_(bias)
    if _is_inference_on_cpu(x) and x.shape[0] in ONEDNN_ROWS and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def feature_major(x):
    """x (rows, features) in the layout that products of so many rows have, so that sums with them take no copies."""
    return x.t().contiguous().t() if _is_weight_first(x) else x


def _is_weight_first(x):
    return _is_inference_on_cpu(x) and x.shape[0] in WEIGHT_FIRST_ROWS


def _is_inference_on_cpu(x):
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 2 and not torch.is_grad_enabled()
