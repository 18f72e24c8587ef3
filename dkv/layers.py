"""What a decoder layer does besides attention, in one of two ways with the same methods.

`Library`: products by the library at hand, with launches of our own around them. `Fused`: products of few rows by our
own kernels, which do what is around them too. What `first_norm` and `add_norm` return as a norm, normed rows or a
`dkv.kernels.DeferredNorm`, is for the other methods of the same way alone.
"""

from typing import NamedTuple

import torch
from torch import nn

from dkv.kernels import checks, configs
from dkv.kernels.cpu import feature_major
from dkv.linear import MergedLinear, is_plain, linear

# norms of this kind: weight * rounded(x / rms(x)); the attribute that holds their eps
NORM_EPS = {"RMSNorm": "eps", "RMSLayerNorm": "eps", "DreamRMSNorm": "variance_epsilon"}


class MergedLayer(NamedTuple):
    """The modules of a decoder layer in the order in which they run, those of one input as one.

    Attributes:
        next_norm: the next layer's attn_norm, or the model's final norm.
    """

    attn_norm: nn.Module
    qkv: MergedLinear
    o: nn.Module
    mlp_norm: nn.Module
    gate_up: MergedLinear
    down: nn.Module
    next_norm: nn.Module


class Library:
    """Products by the library at hand, for any modules and any number of rows."""

    def __init__(self, view, ops, angles):
        self.view, self.ops, self.angles = view, ops, angles

    def first_norm(self, norm, x):
        """(x, which the residual stream becomes, and its norm)."""
        x = feature_major(x)
        return x, self._norm(norm, None, x)

    def qkv(self, layer, normed, tokens, caches):
        """Rotated queries (rows, nheads, headdim); keys and values go into the caches."""
        nheads, nheads_k = self.view.nheads, self.view.nheads_k
        q, k, v = self._heads(layer.qkv(normed), nheads, nheads_k, nheads_k)
        return self._rope(q, k, v, tokens, *caches)

    def last_qkv(self, layer, normed, x, tokens, wanted, caches):
        """The queries of `wanted` alone, and their rows of x; keys and values of all go into the caches."""
        k, v = self._heads(layer.qkv(normed, first=1), self.view.nheads_k, self.view.nheads_k)
        self._rope(k[:, :0], k, v, tokens, *caches)
        (q,) = self._heads(layer.qkv(normed[wanted.logits_indices], last=1), self.view.nheads)
        q = self._rope(q, q[:, :0], q[:, :0], wanted, *(cache[:, :, :0] for cache in caches))
        return q, feature_major(x[wanted.logits_indices])

    def add_norm(self, module, h, x, norm):
        """The norm of x + module(h), which x becomes."""
        return self._norm(norm, linear(module, h), x)

    def gate_up(self, layer, normed):
        """The gated activation."""
        return self.ops.swiglu(layer.gate_up(normed))

    def last_norm(self, norm, normed, x):
        """The norm of x, of which `normed` is what `add_norm` returned."""
        return normed.contiguous()

    def _heads(self, projected, *heads):
        """(rows, heads, headdim) each, of a projection's outputs beside each other."""
        projected = projected.contiguous().unflatten(-1, (-1, self.view.headdim))
        return projected.split(heads, dim=1)

    def _rope(self, q, k, v, tokens, k_cache, v_cache):
        return self.ops.rope_cache_update(q, k, v, *self.angles, tokens.positions, tokens.slots, k_cache, v_cache)

    def _norm(self, norm, h, x):
        """The norm of x + h, which x becomes; h may be None."""
        if is_plain_norm(norm, x.dtype):
            added, residual = (x, None) if h is None else (h, x)
            return self.ops.add_rms_norm(added, residual, norm.weight, norm_eps(norm))
        # norms in float32 of a model in half precision return float32, which its products take under autocast only
        return norm(x if h is None else x.add_(h)).to(x.dtype)


class Fused:
    """Products of up to `dkv.kernels.configs.MAX_PRODUCT_ROWS` rows by our kernels, for layers as `can_run` says."""

    def __init__(self, view, ops, angles):
        self.ops, self.angles = ops, angles
        self.semaphores = torch.zeros(configs.SEMAPHORES, dtype=torch.int32, device=view.weight.device)

    @staticmethod
    def can_run(layers, view):
        """Whether nothing but plain layers of one dtype is there, biases with queries, keys and values alone."""
        dtype = view.weight.dtype
        projections = [projection for layer in layers for projection in (layer.qkv, layer.gate_up)]
        modules = [module for layer in layers for module in (layer.o, layer.down)]
        norms = [norm for layer in layers for norm in (layer.attn_norm, layer.mlp_norm, layer.next_norm)]
        return (
            view.headdim in checks.HEADDIMS
            and all(projection.weight is not None for projection in projections)
            and all(is_plain(module) and module.bias is None for module in modules)
            and all(layer.gate_up.bias is None for layer in layers)
            and {part.weight.dtype for part in (*projections, *modules)} == {dtype}
            and all(is_plain_norm(norm, dtype) for norm in norms)
        )

    @staticmethod
    def pays(layer, device, dtype, rows):
        """Whether a GPU has shown that it is the faster way for layers like this one and so many rows."""
        kinds = {"qkv": layer.qkv, "gate_up": layer.gate_up}
        products = [(kind, tuple(projection.weight.shape)) for kind, projection in kinds.items()]
        products += [("residual", tuple(module.weight.shape)) for module in (layer.o, layer.down)]
        return configs.fused_products_pay(device, dtype, rows, products)

    def first_norm(self, norm, x):
        """(x, which the residual stream becomes, and its norm)."""
        return x, self.ops.deferred_norm(x, norm.weight)

    def qkv(self, layer, normed, tokens, caches):
        """Rotated queries (rows, nheads, headdim); keys and values go into the caches."""
        return self.ops.linear_rope_cache_update(
            normed,
            norm_eps(layer.attn_norm),
            layer.qkv.weight,
            layer.qkv.bias,
            *self.angles,
            tokens.positions,
            tokens.slots,
            *caches,
            semaphores=self.semaphores,
        )

    def last_qkv(self, layer, normed, x, tokens, wanted, caches):
        """The queries of `wanted` alone, and their rows of x; keys and values of all go into the caches."""
        # for few rows, those of all cost no more: the weight is read once
        return self.qkv(layer, normed, tokens, caches)[wanted.logits_indices], x[wanted.logits_indices]

    def add_norm(self, module, h, x, norm):
        """The norm of x + module(h), which x becomes."""
        return self.ops.linear_add_norm(h, module.weight, x, norm.weight, semaphores=self.semaphores)

    def gate_up(self, layer, normed):
        """The gated activation."""
        return self.ops.linear_swiglu(
            normed, norm_eps(layer.mlp_norm), layer.gate_up.weight, semaphores=self.semaphores
        )

    def last_norm(self, norm, normed, x):
        """The norm of x, of which `normed` is what `add_norm` returned."""
        return self.ops.add_rms_norm(x, None, norm.weight, norm_eps(norm))


def norm_eps(norm):
    return getattr(norm, NORM_EPS.get(type(norm).__name__, ""), None)


def is_plain_norm(norm, dtype):
    return (
        isinstance(norm_eps(norm), float)
        and not isinstance(norm, nn.RMSNorm)
        and is_plain(norm, (type(norm),))
        and norm.weight.dtype == dtype
    )
