"""Fused Triton kernels of the delayed KV cache, and `reference`, their PyTorch twins.

The modules lie in the folder `kernels/` at the top of the repository, which has no `__init__.py`, so that it can never
be imported in place of Hugging Face's package `kernels`. This module takes the place of that `__init__.py` under our
own name: its `__path__` says where the folder is, beside `dkv/` in a checkout and inside it in a wheel.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(_here / "kernels" if (_here / "kernels").is_dir() else _here.parent / "kernels")]

from dkv.kernels import reference  # noqa: E402
from dkv.kernels.activation import swiglu  # noqa: E402
from dkv.kernels.attention import delayed_attention  # noqa: E402
from dkv.kernels.commit import commit_tokens  # noqa: E402
from dkv.kernels.gate_up import linear_swiglu  # noqa: E402
from dkv.kernels.lm_head import Confidence, lm_head_confidence  # noqa: E402
from dkv.kernels.norm import add_rms_norm, deferred_norm  # noqa: E402
from dkv.kernels.packing import pack_positions  # noqa: E402
from dkv.kernels.qkv import linear_rope_cache_update  # noqa: E402
from dkv.kernels.reference import DeferredNorm  # noqa: E402
from dkv.kernels.residual import linear_add_norm  # noqa: E402
from dkv.kernels.rope_cache import rope_cache_update  # noqa: E402

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
