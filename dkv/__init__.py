"""Diffusion language models (LLaDA, Dream), fast: the delayed KV cache in fused Triton kernels."""

from dkv.config import GenerateConfig
from dkv.generation import GenerateOutput, GenerateStats, StreamStep, generate, stream
from dkv.models import from_pretrained, register
from dkv.patch import replace_attention, reset, restore_attention, stats
from dkv.plot import plot_history
from dkv.policy import Decode, DualCache, Greedy, NoCache, Policy, Prefill, PrefillDecode, PrefixCache
from dkv.sessions import PatchStats
from dkv.texts import generate_texts

__all__ = [
    "Decode",
    "DualCache",
    "GenerateConfig",
    "GenerateOutput",
    "GenerateStats",
    "Greedy",
    "NoCache",
    "PatchStats",
    "Policy",
    "Prefill",
    "PrefillDecode",
    "PrefixCache",
    "StreamStep",
    "from_pretrained",
    "generate",
    "generate_texts",
    "plot_history",
    "register",
    "replace_attention",
    "reset",
    "restore_attention",
    "stats",
    "stream",
]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    # kernels is public too, but not for `from dkv import *`
    return [*__all__, "kernels"]
