"""A decoder layer of your own over a delayed cache, in five calls.

    python examples/custom_layer.py

A full step of three layers fills their caches. Then a few active tokens go through the layers, and the result is
compared with plain PyTorch over all tokens. On a GPU this runs the Triton kernels, on a CPU their PyTorch twins.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkv.kernels import (
    DeferredNorm,
    add_rms_norm,
    deferred_norm,
    delayed_attention,
    linear_add_norm,
    linear_rope_cache_update,
    linear_swiglu,
    pack_positions,
)

EPS = 1e-5


class Tokens(NamedTuple):
    """The active tokens of all rows, packed: RoPE tables and positions, cache slots, and where each row begins."""

    cos: Tensor
    sin: Tensor
    positions: Tensor
    slots: Tensor
    cu_seqlens: Tensor


class Layer(nn.Module):
    """A LLaMA layer: grouped heads, RoPE, SwiGLU, an RMSNorm before the attention and one before the MLP."""

    def __init__(self, dim: int, nheads: int, nheads_k: int, mlp: int):
        super().__init__()
        self.heads, self.headdim = (nheads, nheads_k, nheads_k), dim // nheads
        self.attn_norm, self.mlp_norm = (nn.Parameter(1 + 0.1 * torch.randn(dim)) for _ in range(2))
        self.qkv = nn.Linear(dim, sum(self.heads) * self.headdim)
        self.out = nn.Linear(dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * mlp, bias=False)
        self.down = nn.Linear(mlp, dim, bias=False)

    def cached(self, x: Tensor, normed: DeferredNorm, next_norm: Tensor, tokens: Tokens, cache: tuple) -> DeferredNorm:
        """The layer for the active tokens alone; all other keys and values come from the cache.

        Args:
            x: (total, dim), the residual stream, updated in place.
            normed: attn_norm of x.
            next_norm: (dim,), the weight of the norm that follows the layer.
            cache: k_cache and v_cache, updated in place.

        Returns:
            The next norm of x, for the next layer.
        """
        *rope_and_slots, cu_seqlens = tokens
        q = linear_rope_cache_update(normed, EPS, self.qkv.weight, self.qkv.bias, *rope_and_slots, *cache)
        attended = delayed_attention(q, *cache, cu_seqlens)
        normed = linear_add_norm(attended.flatten(1), self.out.weight, x, self.mlp_norm)
        h = linear_swiglu(normed, EPS, self.gate_up.weight)
        return linear_add_norm(h, self.down.weight, x, next_norm)

    def plain(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The layer for all tokens, x (batch, seqlen, dim), without a cache."""

        def rotated(heads):
            first, second = heads.chunk(2, dim=-1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

        qkv = self.qkv(F.rms_norm(x, x.shape[-1:], self.attn_norm, EPS)).unflatten(-1, (-1, self.headdim))
        q, k, v = qkv.transpose(1, 2).split(self.heads, dim=1)
        attended = F.scaled_dot_product_attention(rotated(q), rotated(k), v, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(F.rms_norm(x, x.shape[-1:], self.mlp_norm, EPS)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


@torch.no_grad()
def main() -> float:
    """Returns the largest difference between the cached and the plain output of the active tokens."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, seqlen, dim, nheads, nheads_k = 2, 48, 256, 4, 2
    layers = nn.ModuleList(Layer(dim, nheads, nheads_k, 512) for _ in range(3)).to(device)
    final_norm = torch.ones(dim, device=device)
    headdim = dim // nheads
    angles = torch.outer(torch.arange(seqlen), 10000.0 ** (-torch.arange(0, headdim, 2) / headdim)).to(device)
    cos, sin = angles.cos(), angles.sin()
    caches = [tuple(torch.zeros(2, batch, seqlen, nheads_k, headdim, device=device)) for _ in layers]

    def step(x, active):
        """Recomputes the active tokens of x (batch, seqlen, dim); returns (total, dim), and their slots."""
        slots, cu_seqlens = pack_positions(active)
        tokens = Tokens(cos, sin, slots % seqlen, slots, cu_seqlens)
        x = x.flatten(0, 1)[slots]
        normed = deferred_norm(x, layers[0].attn_norm)
        norms = [*(layer.attn_norm for layer in layers[1:]), final_norm]
        for layer, next_norm, cache in zip(layers, norms, caches, strict=True):
            normed = layer.cached(x, normed, next_norm, tokens, cache)
        return add_rms_norm(x, None, final_norm, EPS), slots

    x = torch.randn(batch, seqlen, dim, device=device)
    step(x, torch.ones(batch, seqlen, dtype=torch.bool, device=device))  # a full step fills the caches
    got, slots = step(x, torch.rand(batch, seqlen, device=device) < 0.1)  # a cached step recomputes a tenth

    for layer in layers:
        x = layer.plain(x, cos, sin)
    expected = F.rms_norm(x, (dim,), final_norm, EPS).flatten(0, 1)[slots]
    return (got - expected).abs().max().item()


if __name__ == "__main__":
    print(f"largest difference from plain PyTorch: {main():.1e}")
