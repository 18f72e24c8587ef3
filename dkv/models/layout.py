"""Finding the parts of a model by structure: what its config says, where its modules lie, and whether both fit."""

from dataclasses import dataclass

import torch
from torch import nn

from dkv.decoder import Decoder, Layer
from dkv.memory import memory_of

_REQUIRED = object()
NORMS = ("attn_norm", "mlp_norm")  # of the roles of `dkv.decoder.Layer`; the others are linear


@dataclass(frozen=True)
class Layout:
    """Dotted paths of a family's modules, which are the names of its official tensors too.

    Attributes:
        embed, layers, final_norm, head: paths from the model; `layers` is a list of modules.
        layer: `Layer` role -> path from one of the layers.
    """

    embed: str
    layers: str
    final_norm: str
    head: str
    layer: dict[str, str]


@dataclass(frozen=True)
class Settings:
    """What a config says, in one language for all families.

    Attributes:
        vocab_size: rows of the embedding.
        tied: whether the embedding's weight is the head.
        biased: the `Layer` roles that have a bias.
    """

    hidden_size: int
    mlp_size: int
    layers: int
    nheads: int
    nheads_k: int
    rope_theta: float
    eps: float
    vocab_size: int
    max_positions: int
    mask_id: int
    eos_token_id: int
    pad_token_id: int
    tied: bool
    biased: tuple[str, ...] = ()

    @property
    def headdim(self):
        return self.hidden_size // self.nheads

    def features(self, role):
        """(in_features, out_features) of a linear role of a layer."""
        kv_size = self.nheads_k * self.headdim
        return {
            "k": (self.hidden_size, kv_size),
            "v": (self.hidden_size, kv_size),
            "gate": (self.hidden_size, self.mlp_size),
            "up": (self.hidden_size, self.mlp_size),
            "down": (self.mlp_size, self.hidden_size),
        }.get(role, (self.hidden_size, self.hidden_size))


class Fields:
    """Reads the fields of a config; its errors name the owner, a model's class or a file."""

    def __init__(self, config, owner):
        self.config, self.owner = config, owner

    def get(self, name, default=_REQUIRED):
        value = getattr(self.config, name, default)
        if value is _REQUIRED:
            raise ValueError(f"{self.owner}: the config has no {name}; add it.")
        return value

    def count(self, name, default=_REQUIRED):
        value = self.get(name, default)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.owner}: {name} must be a positive int, got {value!r}.")
        return value

    def positive(self, name, default):
        return self.check_positive(name, self.get(name, default))

    def check_positive(self, name, value):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"{self.owner}: {name} must be a positive number, got {value!r}.")
        return float(value)

    def must_be(self, name, supported, default=_REQUIRED):
        """`default`: what a missing field means to the official code."""
        value = self.get(name, default)
        if value != supported:
            raise ValueError(f"{self.owner}: dkv supports {name}={supported!r} only, got {value!r}.")

    def heads(self, hidden_size, nheads, nheads_k):
        if hidden_size % (2 * nheads) or nheads % nheads_k:
            raise ValueError(
                f"{self.owner}: the hidden size must be an even multiple of the number of heads, and that one a "
                f"multiple of the number of key/value heads, got {hidden_size}, {nheads} and {nheads_k}."
            )
        return {"hidden_size": hidden_size, "nheads": nheads, "nheads_k": nheads_k}

    def token_ids(self, vocab_size):
        """mask_id, eos_token_id and pad_token_id; without a pad token, the end of text pads."""
        eos = self.get("eos_token_id")
        pad = self.get("pad_token_id", None)
        ids = {"mask_token_id": self.get("mask_token_id"), "eos_token_id": eos}
        ids["pad_token_id"] = eos if pad is None else pad
        for name, value in ids.items():
            if not isinstance(value, int) or not 0 <= value < vocab_size:
                raise ValueError(f"{self.owner}: {name} must be an int in 0 .. {vocab_size - 1}, got {value!r}.")
        ids["mask_id"] = ids.pop("mask_token_id")
        return ids


def module_at(root, path):
    """The module at a dotted path, or None."""
    for name in path.split("."):
        root = getattr(root, name, None)
    return root


def read_decoder(model, layout, settings, **what_differs):
    """The `Decoder` of a model whose config has been read.

    Raises:
        ValueError: a module is missing, of another shape than the config says, or of a kind the engine does not run.
    """
    owner = type(model).__name__

    def find(path):
        module = module_at(model, path)
        if module is None:
            raise ValueError(f"{owner}: {path} is missing; dkv supports the module structure of the official models.")
        return module

    embed, final_norm = find(layout.embed), find(layout.final_norm)
    head = module_at(model, layout.head)
    if head is None and not settings.tied:
        find(layout.head)
    if head is not None and getattr(head, "weight", None) is embed.weight:
        head = None
    # of a quantised module it may be a method
    if isinstance(getattr(head, "bias", None), torch.Tensor):
        raise ValueError(f"{owner}: {layout.head} has a bias, which dkv does not support.")
    _check_norm(owner, layout.final_norm, final_norm)
    layers = []
    for index in range(len(find(layout.layers))):
        prefix = f"{layout.layers}.{index}."
        roles = {role: find(prefix + path) for role, path in layout.layer.items()}
        for role, module in roles.items():
            if role in NORMS:
                _check_norm(owner, prefix + layout.layer[role], module)
            else:
                _check_linear(owner, prefix + layout.layer[role], module, settings.features(role))
        attention = prefix + layout.layer["q"].removesuffix("q_proj")
        if module_at(model, attention + "q_norm") is not None or module_at(model, attention + "k_norm") is not None:
            raise ValueError(f"{owner}: {attention}q_norm and k_norm (QK normalisation) are not supported by dkv.")
        # that of a quantised module may be a method
        weights = [module.weight for module in roles.values() if isinstance(getattr(module, "weight", 0), torch.Tensor)]
        device = next((w.device for w in weights if w.device != embed.weight.device), None)
        if device is not None:
            raise ValueError(
                f"{owner}: dkv runs a model on one device, but {layout.embed} is on {embed.weight.device} and "
                f"{prefix}* on {device}; load it without a device_map."
            )
        layers.append(Layer(**roles))
    return Decoder(
        embed=embed,
        layers=tuple(layers),
        final_norm=final_norm,
        head=head,
        nheads=settings.nheads,
        nheads_k=settings.nheads_k,
        headdim=settings.headdim,
        rope_theta=settings.rope_theta,
        vocab_size=embed.weight.shape[0],
        max_positions=settings.max_positions,
        mask_id=settings.mask_id,
        eos_token_id=settings.eos_token_id,
        pad_token_id=settings.pad_token_id,
        # a `Decoder` is read anew at each call, its tables are kept
        _tables=memory_of(model).rope_tables.setdefault((settings.headdim, settings.rope_theta), {}),
        **what_differs,
    )


def _check_linear(owner, path, module, features):
    got = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if got != features:
        raise ValueError(
            f"{owner}: {path} must be linear with (in_features, out_features) = {features} by the config, got {got}."
        )


def _check_norm(owner, path, module):
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    if not isinstance(weight, torch.Tensor) or bias is not None or isinstance(module, nn.LayerNorm):
        raise ValueError(f"{owner}: {path} must be an RMSNorm with a weight and no bias, got {module}.")
