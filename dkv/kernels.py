"""Fused Triton kernels of the delayed KV cache, and `reference`, their PyTorch twins.

The modules lie in the folder `kernels/`: at the top of the repository, and inside `dkv/` in a wheel. It has no
`__init__.py`, so that a checkout can never be imported in place of Hugging Face's package `kernels`. This module stands
for that `__init__.py`: its `__path__` says where the folder is. Type checkers read `kernels/__init__.pyi` instead; in a
checkout they find it through the link `dkv/kernels`.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
# a checkout on a system without symbolic links has a file in place of the link
__path__ = [str((_here / "kernels" if (_here / "kernels").is_dir() else _here.parent / "kernels").resolve())]
del Path, _here

from dkv.kernels import reference
from dkv.kernels.activation import swiglu
from dkv.kernels.attention import delayed_attention
from dkv.kernels.commit import commit_tokens
from dkv.kernels.gate_up import linear_swiglu
from dkv.kernels.lm_head import lm_head_confidence
from dkv.kernels.norm import add_rms_norm, deferred_norm
from dkv.kernels.packing import pack_positions
from dkv.kernels.qkv import linear_rope_cache_update
from dkv.kernels.reference import Confidence, DeferredNorm
from dkv.kernels.residual import linear_add_norm
from dkv.kernels.rope_cache import rope_cache_update

__all__ = [
    "Confidence",
    "DeferredNorm",
    "add_rms_norm",
    "commit_tokens",
    "deferred_norm",
    "delayed_attention",
    "linear_add_norm",
    "linear_rope_cache_update",
    "linear_swiglu",
    "lm_head_confidence",
    "pack_positions",
    "reference",
    "rope_cache_update",
    "swiglu",
]


def __dir__() -> list[str]:
    return __all__
