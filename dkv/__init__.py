"""Diffusion language models, fast: the delayed KV cache in fused Triton kernels."""

__version__ = "0.1.0"
