"""A decoder layer of your own over a delayed cache, in five calls.

    python examples/custom_layer.py

The caches of a stack of layers hold all tokens of two rows. A few active tokens go through the stack, and the result is
compared with the same layers in plain PyTorch over all tokens. On a GPU this runs the Triton kernels, on a CPU their
PyTorch twins.
"""

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
)

EPS = 1e-5


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

    def cached(self, x: Tensor, normed: DeferredNorm, next_norm: Tensor, tokens: dict, caches: tuple) -> DeferredNorm:
        """The layer for the active tokens alone; all other keys and values come from the caches.

        Args:
            x: (total, dim), the residual stream, updated in place.
            normed: attn_norm of x.
            next_norm: (dim,), the weight of the norm that follows the layer.
            tokens: RoPE tables, positions, slots and cu_seqlens_q of the active tokens.
            caches: k_cache and v_cache, updated in place.

        Returns:
            The next norm of x, for the next layer.
        """
        rope = tokens["cos"], tokens["sin"], tokens["positions"]
        q = linear_rope_cache_update(normed, EPS, self.qkv.weight, self.qkv.bias, *rope, tokens["slots"], *caches)
        attended = delayed_attention(q, *caches, tokens["cu_seqlens_q"])
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
    caches = [tuple(torch.zeros(batch, seqlen, nheads_k, headdim, device=device) for _ in "kv") for _ in layers]

    def step(x, columns):
        """Recomputes columns (batch, active) of each row from their embeddings x (batch, active, dim)."""
        active = columns.shape[1]
        tokens = {"cos": cos, "sin": sin, "positions": columns.flatten()}
        tokens["slots"] = (torch.arange(batch, device=device)[:, None] * seqlen + columns).flatten()
        tokens["cu_seqlens_q"] = torch.arange(0, batch * active + 1, active, dtype=torch.int32, device=device)
        x = x.flatten(0, 1).clone()
        normed = deferred_norm(x, layers[0].attn_norm)
        norms = [*(layer.attn_norm for layer in layers[1:]), final_norm]
        for layer, next_norm, cache in zip(layers, norms, caches, strict=True):
            normed = layer.cached(x, normed, next_norm, tokens, cache)
        return add_rms_norm(x, None, final_norm, EPS).unflatten(0, (batch, active))

    x = torch.randn(batch, seqlen, dim, device=device)
    everything = torch.arange(seqlen, device=device).expand(batch, seqlen)
    step(x, everything)  # a full step fills the caches
    # a cached step recomputes five columns of each row
    columns = torch.stack([torch.randperm(seqlen, device=device)[:5] for _ in range(batch)])
    got = step(x.gather(1, columns[..., None].expand(-1, -1, dim)), columns)

    for layer in layers:
        x = layer.plain(x, cos, sin)
    expected = F.rms_norm(x, (dim,), final_norm, EPS).gather(1, columns[..., None].expand(-1, -1, dim))
    return (got - expected).abs().max().item()


if __name__ == "__main__":
    print(f"largest difference from plain PyTorch: {main():.1e}")
