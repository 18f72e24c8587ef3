"""`ModelRunner`: a forward pass of packed active tokens over the cache, through fused operators.

The forward pass of a native model, in `dkv.models.native`, runs the same layers without a cache.
"""

from collections import Counter

import torch
from torch import Tensor, nn

from dkv.cache import KVCache
from dkv.guard import Fingerprint
from dkv.kernels import checks, configs, reference
from dkv.kernels.direct import direct
from dkv.layers import Fused, Library, MergedLayer, after_attention, is_plain_norm, norm_eps
from dkv.linear import MergedLinear, is_plain
from dkv.memory import setting_up, storages_of
from dkv.models.view import ModelView


class ModelRunner:
    """The layers and the final norm of a `ModelView`, ready to run: merged projections, fused norms, RoPE tables.

    Args:
        length: the number of RoPE positions.
        impl: as in `dkv.kernels`.
        fused_products: whether passes of few rows run on our own products. None: where they have been measured to be
            faster.

    Raises:
        ValueError: fused_products=True for layers that they cannot run.
    """

    def __init__(self, view: ModelView, length: int, impl: checks.Impl, fused_products: bool | None = None):
        self.view, self.impl, self.ops = view, impl, direct(impl, view.weight)
        angles = view.rope_tables(length, view.weight.device)
        with setting_up():
            self.layers = _merged_layers(view)
            # without values: every pass reads the weights again
            self._fingerprint, self._kinds = Fingerprint(view.called, values=False), _kinds(view)
        self.library, self.fused, self.fused_products = Library(view, self.ops, angles), None, fused_products
        if fused_products is not False and Fused.can_run(self.layers, view):
            self.fused = Fused(view, self.ops, angles)
        elif fused_products:
            raise ValueError(
                "fused_products=True needs, in every layer, plain nn.Linear and RMSNorm modules of the embedding's "
                "dtype, weights that share no memory, biases for queries, keys and values only, and a headdim of 16, "
                f"32, 64 or 128 (got {view.headdim}); pass fused_products=None for this model."
            )

    def __call__(
        self, active: reference.Packed, cache: KVCache, max_seqlen: int, wanted: reference.Packed | None = None
    ) -> Tensor:
        """Recomputes the active positions and replaces their K/V in the cache.

        Args:
            active: with ids.
            cache: of the same rows; its valid columns are attended.
            max_seqlen: an upper bound of the active positions of one row, and of the wanted ones.
            wanted: with logits_indices, the active positions whose outputs are wanted. None: all.

        Returns:
            hidden (rows, hidden_size) after the final norm; undefined for rows that are padding.
        """
        way = self.way_for(active.ids.shape[0])
        tokens, last = active, len(self.layers) - 1
        x, normed = way.first_norm(self.layers[0].attn_norm, self.view.embed(active.ids))
        for index, layer in enumerate(self.layers):
            caches = cache.k[index], cache.v[index]
            if index < last or wanted is None:
                q = way.qkv(layer, normed, tokens, caches)
            else:
                # the last layer needs only the K and V of the other positions
                q, x = way.last_qkv(layer, normed, x, tokens, wanted, caches)
                tokens = wanted
            attended = self._attend(q, caches, tokens, cache, max_seqlen)
            x, normed = after_attention(way, layer, attended, x, layer.next_norm)
        return way.last_norm(self.view.final_norm, normed, x)

    def way_for(self, rows: int) -> Library | Fused:
        """The way in which a pass of `rows` rows goes through the layers."""
        if self.fused is None or rows > configs.MAX_PRODUCT_ROWS:
            return self.library
        weight = self.view.weight
        pays = self.fused_products or self.fused.pays(self.layers[0], weight.device, weight.dtype, rows)
        return self.fused if pays else self.library

    def _attend(self, q, caches, tokens, cache, max_seqlen):
        """(rows, nheads * headdim): attention over all valid columns of the cache."""
        attended = self.ops.delayed_attention(
            q,
            *caches,
            tokens.cu_seqlens,
            max_seqlen_q=max_seqlen,
            cache_leftpad=cache.leftpad,
            key_mask=cache.key_mask,
        )
        return attended.flatten(1)

    def storages(self) -> list[torch.UntypedStorage]:
        """The storages of all weights."""
        tensors = [p for module in self.view.called for p in module.parameters(recurse=False)]
        return [storage for tensor in tensors for storage in storages_of(tensor)]

    def is_current(self, view: ModelView) -> bool:
        """Whether a view, read just now, has the modules, parameters and RoPE that this was built from, unmoved."""
        with setting_up():
            same = self._fingerprint.covers(view.called) and self._fingerprint.unchanged()
        return same and (view.rope_theta, _kinds(view)) == (self.view.rope_theta, self._kinds)

    @property
    def can_be_recorded(self) -> bool:
        """Whether a pass only launches known kernels on a GPU, so its CUDA graph is right while `is_current`.

        The PyTorch twins synchronise with the device, and float64 has no kernels.
        """
        weight = self.view.weight
        has_kernels = weight.is_cuda and weight.dtype != torch.float64 and self.impl != "reference"
        return has_kernels and all(plain for plain, _ in self._kinds)


def _merged_layers(view):
    modules = [module for layer in view.layers for module in (layer.q, layer.k, layer.v, layer.gate, layer.up)]
    storages = [s for module in modules for p in module.parameters(recurse=False) for s in storages_of(p)]
    times = Counter(map(id, storages))
    # storages that several parameters, or several processes, share must not move
    shared = {id(s) for s in storages if times[id(s)] > 1 or (s.device.type == "cpu" and s.is_shared())}
    norms = [layer.attn_norm for layer in view.layers] + [view.final_norm]
    return [
        MergedLayer(
            attn_norm=layer.attn_norm,
            qkv=MergedLinear((layer.q, layer.k, layer.v), shared),
            o=layer.o,
            mlp_norm=layer.mlp_norm,
            gate_up=MergedLinear((layer.gate, layer.up), shared),
            down=layer.down,
            next_norm=next_norm,
        )
        for layer, next_norm in zip(view.layers, norms[1:], strict=True)
    ]


def _kinds(view):
    """(whether it is plain, its eps if it is a norm) for every module that runs."""
    dtype = view.weight.dtype
    return [
        (is_plain(module, (nn.Linear, nn.Embedding)) or is_plain_norm(module, dtype), norm_eps(module))
        for module in view.called
    ]
