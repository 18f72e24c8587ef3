"""The gated activation of a feed-forward layer, on the output of its fused gate and up projections.

    out = round(silu(gate)) * up, silu(x) = x / (1 + exp(-x))          (SwiGLU, Shazeer, arXiv 2002.05202)

silu is computed in float32 and rounded to the dtype before the product, as `F.silu(gate) * up` does. Layouts: gate_up
(rows, 2 * size), gate first, any strides; out (rows, size), contiguous. Each program handles some columns of one row;
it is memory-bound, at 3 * rows * size elements.
"""

import torch
from torch import Tensor

from dkv.kernels import checks, reference
from dkv.kernels.configs import swiglu_config
from dkv.kernels.language import tl, triton
from dkv.kernels.operators import operator


@triton.jit
def _swiglu_kernel(
    # pointers
    gate_up_ptr,
    out_ptr,
    # strides
    stride_row,
    stride_column,
    stride_up,
    # sizes
    size,
    # constants
    BLOCK: tl.constexpr,
):
    # neighbouring programs read neighbouring memory
    program = tl.program_id(0)
    blocks = tl.cdiv(size, BLOCK)
    row = (program // blocks).to(tl.int64)
    # [BLOCK]
    columns = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = columns < size
    gate_ptrs = gate_up_ptr + row * stride_row + columns * stride_column
    gate = tl.load(gate_ptrs, mask=valid, other=0.0)
    up = tl.load(gate_ptrs + stride_up, mask=valid, other=0.0)
    g = gate.to(tl.float32)
    out = (g / (1.0 + tl.exp(-g))).to(gate.dtype) * up
    tl.store(out_ptr + row * size + columns, out, mask=valid)


def _launch(gate_up: Tensor) -> Tensor:
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() == 0:
        return out
    config = swiglu_config(gate_up.dtype)
    with checks.device_guard(gate_up):
        _swiglu_kernel[(rows * triton.cdiv(size, config.block),)](
            gate_up_ptr=gate_up,
            out_ptr=out,
            stride_row=gate_up.stride(0),
            stride_column=gate_up.stride(1),
            stride_up=size * gate_up.stride(1),
            size=size,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
    return out


def _fake(gate_up, **_):
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


_operator = operator("swiglu", _launch, reference.swiglu, fake=_fake)


def swiglu(gate_up: Tensor, *, impl: checks.Impl = "auto") -> Tensor:
    """Computes silu(gate) * up of the two halves of each row.

    Mutates nothing.

    Args:
        gate_up: (rows, 2 * size), gate first, float16, bfloat16 or float32 (float64: impl "reference" only), any
            strides.
        impl: "auto" (Triton for CUDA tensors, PyTorch otherwise), "triton" or "reference".

    Returns:
        (rows, size), contiguous (impl "reference": the layout of gate_up), the dtype of gate_up. silu is computed in
        float32 and rounded, then multiplied by up and rounded again.

    Raises:
        ValueError, TypeError: a wrong shape or dtype.
        NotImplementedError: an implementation that cannot run here.

    Source: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202).

    Example:
        >>> weight = torch.cat((gate.weight, up.weight))
        >>> h = swiglu(x @ weight.T)
        >>> out = h @ down.weight.T
    """
    checks.check_no_grad(gate_up=gate_up)
    checks.check_floating("gate_up", gate_up)
    checks.check_shape("gate_up", gate_up, (None, None), "(rows, 2 * size)")
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must have shape (rows, 2 * size), an even second size, got {tuple(gate_up.shape)}.")
    return _operator(gate_up=gate_up, impl=checks.resolve_impl(impl, _swiglu_kernel, gate_up))
