"""Diffusion language models (LLaDA, Dream), fast: the delayed KV cache in fused Triton kernels."""

from dkv.config import GenerateConfig
from dkv.generation import GenerateOutput, GenerateStats, generate
from dkv.models import from_pretrained, register
from dkv.patch import replace_attention, reset, restore_attention
from dkv.plot import plot_history
from dkv.policy import Decode, DualCache, Greedy, NoCache, Policy, Prefill, PrefillDecode, PrefixCache

__all__ = [
    "Decode",
    "DualCache",
    "GenerateConfig",
    "GenerateOutput",
    "GenerateStats",
    "Greedy",
    "NoCache",
    "Policy",
    "Prefill",
    "PrefillDecode",
    "PrefixCache",
    "from_pretrained",
    "generate",
    "plot_history",
    "register",
    "replace_attention",
    "reset",
    "restore_attention",
]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    # kernels is public too, but not for `from dkv import *`
    return [*__all__, "kernels"]
