"""The operators without argument checks, for callers whose arguments are right by construction.

Names and signatures are those of the PyTorch twins, which serve `impl` "reference". A call costs no more than the
launch itself.
"""

from types import ModuleType, SimpleNamespace

from torch import Tensor

from dkv.kernels import (
    activation,
    active,
    advance,
    attention,
    checks,
    commit,
    gate_up,
    lm_head,
    norm,
    packing,
    qkv,
    reference,
    residual,
    rope_cache,
)

TRITON = SimpleNamespace(
    active_positions=active._launch,
    add_rms_norm=norm._launch,
    advance_rows=advance._launch,
    commit_tokens=commit._launch,
    deferred_norm=norm._launch_deferred_norm,
    delayed_attention=attention._launch,
    linear_add_norm=residual._launch,
    linear_rope_cache_update=qkv._launch,
    linear_swiglu=gate_up._launch,
    lm_head_confidence=lm_head._launch,
    pack_positions=packing._launch,
    pack_step=packing._launch_pack_step,
    rope_cache_update=rope_cache._launch,
    swiglu=activation._launch,
)


def direct(impl: checks.Impl, tensor: Tensor) -> SimpleNamespace | ModuleType:
    """The operators that `impl` means for tensors of the device and dtype of `tensor`."""
    return TRITON if checks.resolve_impl(impl, norm._add_rms_norm_kernel, tensor) == "triton" else reference
