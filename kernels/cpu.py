"""CPU only: fast products of few token rows and a weight. On any other device these functions are PyTorch's own.

For few rows, PyTorch's `x @ W.T` reaches 50 to 90 % of the speed of `(W @ x.T).T`. The result of the latter is a
transposed view, in whose memory each feature of all tokens lies together. The next such product takes it as it is, and
elementwise operators keep the layout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# WEIGHT_FIRST_ROWS: numbers of rows for which the weight comes first.
# ONEDNN_ROWS: numbers of rows for which oneDNN multiplies. PyTorch does not call it by itself for float32. It spends
# 0.5 ms on every new pair of a weight's shape and a number of rows, so it serves few numbers.
# ROW_MULTIPLE: the weight-first order is fast for multiples of it; 63 rows take 1.5 times as long as 64.
# Measured in float32 on 2 cores each of an AMD EPYC (AVX2) and of Intel Xeons (AVX512).
if torch.backends.cpu.get_cpu_capability() == "AVX2":
    WEIGHT_FIRST_ROWS, ONEDNN_ROWS, ROW_MULTIPLE = range(16, 513), range(1, 16), 8
else:
    WEIGHT_FIRST_ROWS, ONEDNN_ROWS, ROW_MULTIPLE = range(8, 33), range(0), 1


def padded_rows(count: int) -> int:
    """The number of rows, `count` or more, that a product should have: padding costs less than it saves."""
    return -(-count // ROW_MULTIPLE) * ROW_MULTIPLE if count in WEIGHT_FIRST_ROWS else count


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias.

    Args:
        x: (..., in_features), any strides; only (rows, in_features) has fast paths.
        weight: (out_features, in_features).
        bias: (out_features,) or None.

    Returns:
        (..., out_features); a transposed view if the weight comes first.
    """
    if _is_weight_first(x):
        y = torch.mm(weight, x.t()).t()
        return y if bias is None else y.add_(bias)
    if _is_inference_on_cpu(x) and x.shape[0] in ONEDNN_ROWS and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def feature_major(x: Tensor) -> Tensor:
    """x (rows, features) in the layout of the results of `linear` for as many rows: adding the two needs no copy."""
    return x.t().contiguous().t() if _is_weight_first(x) else x


def _is_weight_first(x):
    return _is_inference_on_cpu(x) and x.shape[0] in WEIGHT_FIRST_ROWS


def _is_inference_on_cpu(x):
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 2 and not torch.is_grad_enabled()
