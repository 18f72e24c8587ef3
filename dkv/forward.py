"""One forward pass of packed active tokens over the cache: the layers of a `Decoder` in fused operators."""

from collections import Counter

import torch
from torch import nn

from dkv.guard import Fingerprint
from dkv.kernels.direct import direct
from dkv.kernels.product import like_products
from dkv.linear import Projection, is_plain, linear
from dkv.memory import setting_up, storages_of

# norms of this kind: weight * rounded(x / rms(x)); the attribute that holds their eps
NORM_EPS = {"RMSNorm": "eps", "RMSLayerNorm": "eps", "DreamRMSNorm": "variance_epsilon"}


class Forward:
    """The layers and the final norm of a `Decoder`, ready to run: merged projections, fused norms, RoPE tables.

    Args:
        decoder: `dkv.decoder.Decoder`.
        length: the number of RoPE positions.
        impl: as in `dkv.kernels`.
    """

    def __init__(self, decoder, length, impl):
        self.decoder, self.impl, self.ops = decoder, impl, direct(impl, decoder.weight)
        self.cos, self.sin = decoder.rope_tables(length, decoder.weight.device)
        with setting_up():
            shared = _shared(decoder)
            self.layers = [
                (layer, *(Projection(modules, shared) for modules in _of_one_input(layer))) for layer in decoder.layers
            ]
            # values may change: a pass reads them anew
            self._fingerprint, self._kinds = Fingerprint(decoder.called, values=False), _kinds(decoder)

    def __call__(self, active, cache, max_seqlen, wanted=None):
        """Recomputes the active positions, whose K/V in the cache are replaced.

        Args:
            active: `Packed` of `dkv.kernels.reference`, with ids.
            cache: `KVCache` of the same rows; its valid columns are attended.
            max_seqlen: int, an upper bound of the positions of one row, active or wanted.
            wanted: `Packed` with places among the active positions: those whose outputs are wanted. None: all.

        Returns:
            hidden (rows, hidden_size) after the final norm; without meaning where a place is padding.
        """
        decoder = self.decoder
        tokens, x, h = active, like_products(decoder.embed(active.ids)), None
        for index, (layer, qkv, gate_up) in enumerate(self.layers):
            k_cache, v_cache = cache.k[index], cache.v[index]
            normed = self._norm(layer.attn_norm, h, x)
            if index < len(self.layers) - 1 or wanted is None:
                q, k, v = self._heads(qkv(normed), decoder.nheads, decoder.nheads_k, decoder.nheads_k)
                q = self._rope(q, k, v, tokens, k_cache, v_cache)
            else:
                # of the last layer only K and V are needed everywhere
                k, v = self._heads(qkv(normed, first=1), decoder.nheads_k, decoder.nheads_k)
                self._rope(k[:, :0], k, v, tokens, k_cache, v_cache)
                x, tokens = like_products(x[wanted.places]), wanted
                (q,) = self._heads(qkv(normed[wanted.places], last=1), decoder.nheads)
                q = self._rope(q, q[:, :0], q[:, :0], tokens, k_cache[:, :, :0], v_cache[:, :, :0])
            attended = self.ops.delayed_attention(
                q,
                k_cache,
                v_cache,
                tokens.cu_seqlens,
                max_seqlen_q=max_seqlen,
                cache_leftpad=cache.leftpad,
                key_mask=cache.key_mask,
            )
            normed = self._norm(layer.mlp_norm, linear(layer.o, attended.flatten(1)), x)
            h = linear(layer.down, self.ops.swiglu(gate_up(normed)))
        return self._norm(decoder.final_norm, h, x).contiguous()

    def _heads(self, projected, *heads):
        """(rows, heads, headdim) each, of a projection's outputs beside each other."""
        projected = projected.contiguous().unflatten(-1, (-1, self.decoder.headdim))
        return projected.split(heads, dim=1)

    def _rope(self, q, k, v, tokens, k_cache, v_cache):
        return self.ops.rope_cache_update(q, k, v, self.cos, self.sin, tokens.positions, tokens.slots, k_cache, v_cache)

    def _norm(self, norm, h, x):
        """The norm of x + h, which x becomes; h may be None."""
        if _is_plain_norm(norm, x.dtype):
            added, residual = (x, None) if h is None else (h, x)
            return self.ops.add_rms_norm(added, residual, norm.weight, _eps(norm))
        # norms in float32 of a model in half precision return float32, which its products take under autocast only
        return norm(x if h is None else x.add_(h)).to(x.dtype)

    def storages(self):
        """The storages of all weights."""
        tensors = [p for module in self.decoder.called for p in module.parameters(recurse=False)]
        return [storage for tensor in tensors for storage in storages_of(tensor)]

    def is_current(self, decoder):
        """Whether `decoder`, read just now, has the modules, parameters and RoPE that this was built from, unmoved."""
        with setting_up():
            same = self._fingerprint.covers(decoder.called) and self._fingerprint.holds()
        return same and (decoder.rope_theta, _kinds(decoder)) == (self.decoder.rope_theta, self._kinds)

    @property
    def can_be_recorded(self):
        """Whether a pass is nothing but known launches on a GPU, which stay right for as long as it is current.

        The PyTorch twins read from the device, and float64 has no kernels.
        """
        weight = self.decoder.weight
        has_kernels = weight.is_cuda and weight.dtype != torch.float64 and self.impl != "reference"
        return has_kernels and all(plain for plain, _ in self._kinds)


def _of_one_input(layer):
    return (layer.q, layer.k, layer.v), (layer.gate, layer.up)


def _shared(decoder):
    """Ids of the storages that several parameters of the merged layers lie in, or other processes."""
    modules = [module for layer in decoder.layers for modules in _of_one_input(layer) for module in modules]
    storages = [s for module in modules for p in module.parameters(recurse=False) for s in storages_of(p)]
    times = Counter(map(id, storages))
    return {id(s) for s in storages if times[id(s)] > 1 or (s.device.type == "cpu" and s.is_shared())}


def _kinds(decoder):
    """(whether it is plain, the eps of a norm) for every module that runs."""
    dtype = decoder.weight.dtype
    return [
        (is_plain(module, (nn.Linear, nn.Embedding)) or _is_plain_norm(module, dtype), _eps(module))
        for module in decoder.called
    ]


def _eps(norm):
    return getattr(norm, NORM_EPS.get(type(norm).__name__, ""), None)


def _is_plain_norm(norm, dtype):
    return (
        isinstance(_eps(norm), float)
        and not isinstance(norm, nn.RMSNorm)
        and is_plain(norm, (type(norm),))
        and norm.weight.dtype == dtype
    )
