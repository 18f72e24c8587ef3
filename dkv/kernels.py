"""Fused Triton kernels of the delayed KV cache, and `reference`, their PyTorch twins.

The modules lie in the folder `kernels/` at the top of the repository, which has no `__init__.py`, so that it can never
be imported in place of Hugging Face's package `kernels`. This module takes the place of that `__init__.py` under our
own name: its `__path__` says where the folder is, beside `dkv/` in a checkout and inside it in a wheel.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(_here / "kernels" if (_here / "kernels").is_dir() else _here.parent / "kernels")]

from dkv.kernels import reference  # noqa: E402
from dkv.kernels.attention import delayed_attention  # noqa: E402
from dkv.kernels.rope_cache import rope_cache_update  # noqa: E402

__all__ = ["delayed_attention", "reference", "rope_cache_update"]
