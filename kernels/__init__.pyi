"""The exports of `dkv.kernels` for type checkers and editors; Python itself runs `dkv/kernels.py`."""

from dkv.kernels import reference as reference
from dkv.kernels.activation import swiglu as swiglu
from dkv.kernels.attention import delayed_attention as delayed_attention
from dkv.kernels.commit import commit_tokens as commit_tokens
from dkv.kernels.gate_up import linear_swiglu as linear_swiglu
from dkv.kernels.lm_head import lm_head_confidence as lm_head_confidence
from dkv.kernels.norm import add_rms_norm as add_rms_norm
from dkv.kernels.norm import deferred_norm as deferred_norm
from dkv.kernels.packing import pack_positions as pack_positions
from dkv.kernels.qkv import linear_rope_cache_update as linear_rope_cache_update
from dkv.kernels.reference import Confidence as Confidence
from dkv.kernels.reference import DeferredNorm as DeferredNorm
from dkv.kernels.residual import linear_add_norm as linear_add_norm
from dkv.kernels.rope_cache import rope_cache_update as rope_cache_update
