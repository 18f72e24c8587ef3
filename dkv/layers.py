"""The parts of a decoder layer in three ways: `Library` and `Fused` for a cache, `Modules` for training.

`Library` calls PyTorch's matrix products, with kernels of our own around them. `Fused` has kernels for products of few
rows that do the work around them too. Both have the same methods and are for packed tokens; their attention is in
`dkv.model_runner`. `Modules` calls the modules, for whole sequences. `after_attention` serves all three.

The norms that `first_norm` and `add_norm` return, normed rows or a `dkv.kernels.DeferredNorm`, are only for the other
methods of the same way.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkv.kernels import checks, configs, cpu
from dkv.kernels.reference import DeferredNorm, Packed
from dkv.linear import MergedLinear, is_plain, linear
from dkv.models.view import Layer, ModelView

# class of a norm that computes weight * rounded(x / rms(x)) -> the attribute that holds its eps
NORM_EPS = {"RMSNorm": "eps", "RMSLayerNorm": "eps", "DreamRMSNorm": "variance_epsilon"}


class MergedLayer(NamedTuple):
    """The modules of a decoder layer in the order in which they run; linear layers with the same input are merged.

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


def after_attention(
    way: "Library | Fused | Modules",
    layer: "MergedLayer | Layer",
    attended: Tensor,
    x: Tensor,
    next_norm: nn.Module | None,
) -> tuple[Tensor, Any]:
    """The rest of a layer: the output projection and the MLP, each added to x. Returns x and its next norm.

    Args:
        layer: a `Layer` for `Modules`, otherwise a `MergedLayer`.
        attended: (rows, nheads * headdim).
        x: (rows, hidden_size), the residual stream.
        next_norm: only `Modules` takes None, for no norm.
    """
    x, normed = way.add_norm(layer.o, attended, x, layer.mlp_norm)
    return way.add_norm(layer.down, way.gate_up(layer, normed), x, next_norm)


class Library:
    """PyTorch's matrix products, for any modules and any number of rows.

    Args:
        ops: the operators of `dkv.kernels.direct.direct`.
        angles: cos and sin of `ModelView.rope_tables`.
    """

    def __init__(self, view: ModelView, ops: Any, angles: tuple[Tensor, Tensor]):
        self.view, self.ops, self.angles = view, ops, angles

    def first_norm(self, norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream, made from x (rows, hidden_size), and its norm."""
        x = cpu.feature_major(x)
        return x, self._norm(norm, None, x)

    def qkv(self, layer: MergedLayer, normed: Tensor, tokens: Packed, caches: tuple[Tensor, Tensor]) -> Tensor:
        """Rotated queries (rows, nheads, headdim); writes keys and values into the caches."""
        nheads, nheads_k = self.view.nheads, self.view.nheads_k
        q, k, v = self._heads(layer.qkv(normed), nheads, nheads_k, nheads_k)
        return self._rope(q, k, v, tokens, *caches)

    def last_qkv(
        self,
        layer: MergedLayer,
        normed: Tensor,
        x: Tensor,
        tokens: Packed,
        wanted: Packed,
        caches: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The queries of `wanted` alone, and their rows of x; writes keys and values of all tokens into the caches."""
        # the operator takes any number of heads, even none: without queries here, without keys and values below
        k, v = self._heads(layer.qkv(normed, first=1), self.view.nheads_k, self.view.nheads_k)
        self._rope(k[:, :0], k, v, tokens, *caches)
        (q,) = self._heads(layer.qkv(normed[wanted.logits_indices], last=1), self.view.nheads)
        q = self._rope(q, q[:, :0], q[:, :0], wanted, *(cache[:, :, :0] for cache in caches))
        return q, cpu.feature_major(x[wanted.logits_indices])

    def add_norm(self, module: nn.Module, h: Tensor, x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """Adds module(h) to x in place; returns x and its norm."""
        return x, self._norm(norm, linear(module, h), x)

    def gate_up(self, layer: MergedLayer, normed: Tensor) -> Tensor:
        """The gated activation (rows, mlp_size)."""
        return self.ops.swiglu(layer.gate_up(normed))

    def last_norm(self, norm: nn.Module, normed: Tensor, x: Tensor) -> Tensor:
        """The norm of x (rows, hidden_size); `normed` is the last result of `add_norm`."""
        return normed.contiguous()

    def _heads(self, projected, *heads):
        """Splits the outputs of a merged projection: (rows, heads, headdim) for each number of heads."""
        projected = projected.contiguous().unflatten(-1, (-1, self.view.headdim))
        return projected.split(heads, dim=1)

    def _rope(self, q, k, v, tokens, k_cache, v_cache):
        return self.ops.rope_cache_update(q, k, v, *self.angles, tokens.positions, tokens.slots, k_cache, v_cache)

    def _norm(self, norm, h, x):
        """Adds h, if it is not None, to x in place; returns the norm of the sum."""
        if is_plain_norm(norm, x.dtype):
            added, residual = (x, None) if h is None else (h, x)
            return self.ops.add_rms_norm(added, residual, norm.weight, norm_eps(norm))
        # a float32 norm of a model in half precision returns float32, which its products accept under autocast only
        return norm(x if h is None else x.add_(h)).to(x.dtype)


class Fused:
    """Our own matrix products, for up to `dkv.kernels.configs.MAX_PRODUCT_ROWS` rows and layers that `can_run` accepts.

    The arguments are those of `Library`.
    """

    def __init__(self, view: ModelView, ops: Any, angles: tuple[Tensor, Tensor]):
        self.ops, self.angles = ops, angles
        self.semaphores = torch.zeros(configs.SEMAPHORES, dtype=torch.int32, device=view.weight.device)

    @staticmethod
    def can_run(layers: list[MergedLayer], view: ModelView) -> bool:
        """Whether all modules are plain and of one dtype, and only queries, keys and values have biases."""
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
    def pays(layer: MergedLayer, device: torch.device, dtype: torch.dtype, rows: int) -> bool:
        """Whether this way has been measured to be faster on such a GPU, for layers of these shapes and `rows` rows."""
        products = (("qkv", layer.qkv), ("gate_up", layer.gate_up), ("residual", layer.o), ("residual", layer.down))
        shapes = [(kind, tuple(module.weight.shape)) for kind, module in products]
        return configs.fused_products_pay(device, dtype, rows, shapes)

    def first_norm(self, norm: nn.Module, x: Tensor) -> tuple[Tensor, DeferredNorm]:
        """The residual stream, made from x (rows, hidden_size), and its norm."""
        return x, self.ops.deferred_norm(x, norm.weight)

    def qkv(self, layer: MergedLayer, normed: DeferredNorm, tokens: Packed, caches: tuple[Tensor, Tensor]) -> Tensor:
        """Rotated queries (rows, nheads, headdim); writes keys and values into the caches."""
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

    def last_qkv(
        self,
        layer: MergedLayer,
        normed: DeferredNorm,
        x: Tensor,
        tokens: Packed,
        wanted: Packed,
        caches: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The queries of `wanted` alone, and their rows of x; writes keys and values of all tokens into the caches."""
        # the queries of all tokens cost no more, because few rows read the weight once
        return self.qkv(layer, normed, tokens, caches)[wanted.logits_indices], x[wanted.logits_indices]

    def add_norm(self, module: nn.Module, h: Tensor, x: Tensor, norm: nn.Module) -> tuple[Tensor, DeferredNorm]:
        """Adds module(h) to x in place; returns x and its norm."""
        return x, self.ops.linear_add_norm(h, module.weight, x, norm.weight, semaphores=self.semaphores)

    def gate_up(self, layer: MergedLayer, normed: DeferredNorm) -> Tensor:
        """The gated activation (rows, mlp_size)."""
        return self.ops.linear_swiglu(
            normed, norm_eps(layer.mlp_norm), layer.gate_up.weight, semaphores=self.semaphores
        )

    def last_norm(self, norm: nn.Module, normed: DeferredNorm, x: Tensor) -> Tensor:
        """The norm of x (rows, hidden_size); `normed` is the last result of `add_norm`."""
        return self.ops.add_rms_norm(x, None, norm.weight, norm_eps(norm))


class Modules:
    """The modules as they are, for x (batch, seqlen, hidden_size): differentiable, for any mask, without a cache.

    Args:
        angles: cos and sin, (batch or 1, seqlen, headdim // 2) float32.
        attn_mask: as that of `F.scaled_dot_product_attention`.
    """

    def __init__(self, view: ModelView, angles: tuple[Tensor, Tensor], attn_mask: Tensor | None = None):
        self.view, self.angles, self.attn_mask = view, angles, attn_mask

    def attend(self, layer: Layer, normed: Tensor) -> Tensor:
        """(batch, seqlen, nheads * headdim): attention over the whole sequence."""
        groups = self.view.nheads // self.view.nheads_k
        cos, sin = (table[:, :, None].to(normed.device) for table in self.angles)
        q, k, v = (project(normed).unflatten(-1, (-1, self.view.headdim)) for project in (layer.q, layer.k, layer.v))
        # in float32 as LLaDA does; Dream's own code rotates in the model's dtype, where half precision rounds more
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        mask = None if self.attn_mask is None else self.attn_mask.to(normed.device)
        return _attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2).flatten(2)

    def add_norm(self, module: nn.Module, h: Tensor, x: Tensor, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
        """x + module(h) and its norm."""
        x = x + module(h)
        return x, None if norm is None else norm(x)

    def gate_up(self, layer: Layer, normed: Tensor) -> Tensor:
        """The gated activation (batch, seqlen, mlp_size)."""
        return F.silu(layer.gate(normed)) * layer.up(normed)


def _rotate(x, cos, sin):
    """Half-split RoPE in float32 at least, rounded once; differentiable, unlike that of dkv.kernels."""
    x1, x2 = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def _attention(q, k, v, attn_mask):
    """(batch, nheads, seqlen, headdim); zeros on every backend for a query to which a bool mask leaves no key."""
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
    empty = ~attn_mask.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask | empty).masked_fill(empty, 0)


def norm_eps(norm: nn.Module) -> float | None:
    """The eps of an RMSNorm of a class in `NORM_EPS`; None for any other module."""
    return getattr(norm, NORM_EPS.get(type(norm).__name__, ""), None)


def is_plain_norm(norm: nn.Module, dtype: torch.dtype) -> bool:
    """Whether it is an RMSNorm of a class in `NORM_EPS`, in this dtype, and plain as in `dkv.linear.is_plain`."""
    return (
        isinstance(norm_eps(norm), float)
        and not isinstance(norm, nn.RMSNorm)
        and is_plain(norm, (type(norm),))
        and norm.weight.dtype == dtype
    )
