"""Finding the parts of a model by structure: what its config says, where its modules lie, and whether both fit."""

import sys
from dataclasses import dataclass
from reprlib import repr as shown

import torch
from torch import nn

from dkv.memory import memory_of
from dkv.models.view import Layer, ModelView

_REQUIRED = object()
_TOO_MANY = 2**30  # for a size: the bytes of a matrix of two smaller ones can still be counted in 64 bits
NORMS = ("attn_norm", "mlp_norm")  # of the roles of `dkv.models.view.Layer`; the others are linear


@dataclass(frozen=True)
class Layout:
    """Dotted paths of a family's modules, which are the names of its official tensors too.

    Attributes:
        embed, layers, final_norm, head: paths from the model; `layers` is a list of modules.
        layer: `Layer` role -> path from one of the layers.
        layers_field, tied_field: the config's names of `ModelConfig.layers` and `ModelConfig.tied`.
    """

    embed: str
    layers: str
    final_norm: str
    head: str
    layer: dict[str, str]
    layers_field: str
    tied_field: str


@dataclass(frozen=True)
class ModelConfig:
    """What a config says, in one language for all families.

    Attributes:
        vocab_size: rows of the embedding.
        eos_ids: the tokens that end a text, one at least.
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
    eos_ids: tuple[int, ...]
    pad_token_id: int
    tied: bool
    biased: tuple[str, ...] = ()

    @property
    def headdim(self):
        return self.hidden_size // self.nheads

    @property
    def eos_token_id(self):
        return self.eos_ids[0]

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
    """Reads the fields of a config; its errors name the owner, a model's class or a file, and the field.

    A default is what a missing field means to the official code, and a legal value whatever its kind.
    """

    def __init__(self, config, owner):
        self.config, self.owner = config, owner

    def get(self, name, default=_REQUIRED):
        value = getattr(self.config, name, default)
        if value is _REQUIRED:
            raise ValueError(f"{self.owner}: the config has no {name}; add it.")
        return value

    def count(self, name, default=_REQUIRED):
        value = self.get(name, default)
        return value if value is default else self.check_count(name, value)

    def check_count(self, name, value):
        if type(value) is not int or not 0 < value < _TOO_MANY:
            raise ValueError(f"{self.owner}: {name} must be a positive int, below {_TOO_MANY}, got {shown(value)}.")
        return value

    def positive(self, name, default):
        return self.check_positive(name, self.get(name, default))

    def check_positive(self, name, value):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise ValueError(f"{self.owner}: {name} must be a positive number, got {shown(value)}.")
        return float(value)

    def switch(self, name, default):
        value = self.get(name, default)
        if value is not default and type(value) is not bool:
            raise ValueError(f"{self.owner}: {name} must be true or false, got {shown(value)}.")
        return value

    def must_be(self, name, supported, default=_REQUIRED):
        value = self.get(name, default)
        # True is no 1; a str may be an enum's
        same_kind = isinstance(value, type(supported)) and isinstance(value, bool) == isinstance(supported, bool)
        if not same_kind or value != supported:
            raise ValueError(f"{self.owner}: dkv supports {name}={supported!r} only, got {shown(value)}.")

    def heads(self, hidden_size, nheads, nheads_k, default=None):
        """hidden_size, nheads and nheads_k from the fields of these names; without the last, `default` or nheads."""
        sizes = [self.count(hidden_size), self.count(nheads)]
        sizes.append(self.count(nheads_k, None) or default or sizes[1])
        if sizes[0] % (2 * sizes[1]) or sizes[1] % sizes[2]:
            raise ValueError(
                f"{self.owner}: {hidden_size} must be an even multiple of {nheads}, and that one a multiple of "
                f"{nheads_k}, got {', '.join(map(str, sizes))}."
            )
        return dict(zip(("hidden_size", "nheads", "nheads_k"), sizes, strict=True))

    def token_ids(self, vocab_size):
        """mask_id, eos_ids and pad_token_id; without a pad token, null or -1, the first end of text pads."""
        (mask_id,) = self._ids("mask_token_id", vocab_size)
        eos_ids = self._ids("eos_token_id", vocab_size, several=True)
        pad = self.get("pad_token_id", None)
        has_pad = pad is not None and not (type(pad) is int and pad == -1)
        (pad,) = self._ids("pad_token_id", vocab_size) if has_pad else eos_ids[:1]
        return {"mask_id": mask_id, "eos_ids": eos_ids, "pad_token_id": pad}

    def _ids(self, name, vocab_size, several=False):
        value = self.get(name)
        ids = value if several and isinstance(value, list | tuple) else (value,)
        if not ids or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            kind = "an int or a list of ints" if several else "an int"
            raise ValueError(f"{self.owner}: {name} must be {kind} in 0 .. {vocab_size - 1}, got {shown(value)}.")
        return tuple(ids)


def module_at(root, path):
    """The module at a dotted path, or None."""
    for name in path.split("."):
        root = getattr(root, name, None)
    return root


def read_view(model, layout, settings, **what_differs):
    """The `ModelView` of a model whose config has been read.

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
    # quantised modules may define `bias` as a method
    if isinstance(getattr(head, "bias", None), torch.Tensor):
        raise ValueError(f"{owner}: {layout.head} has a bias, which dkv does not support.")
    _check_norm(owner, layout.final_norm, final_norm)
    rows, predicted = len(embed.weight), getattr(head, "out_features", 0)
    if predicted > rows:
        raise ValueError(
            f"{owner}: {layout.head} predicts {predicted} ids, but {layout.embed} has {rows} rows; resize both."
        )
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
        # quantised modules may define `weight` as a method
        weights = [module.weight for module in roles.values() if isinstance(getattr(module, "weight", 0), torch.Tensor)]
        device = next((w.device for w in weights if w.device != embed.weight.device), None)
        if device is not None:
            raise ValueError(
                f"{owner}: dkv runs a model on one device, but {layout.embed} is on {embed.weight.device} and "
                f"{prefix}* on {device}; load it without offloading and without a device_map."
            )
        layers.append(Layer(**roles))
    return ModelView(
        embed=embed,
        layers=tuple(layers),
        final_norm=final_norm,
        head=head,
        nheads=settings.nheads,
        nheads_k=settings.nheads_k,
        headdim=settings.headdim,
        rope_theta=settings.rope_theta,
        vocab_size=rows,
        max_positions=settings.max_positions,
        mask_id=settings.mask_id,
        eos_ids=settings.eos_ids,
        pad_token_id=settings.pad_token_id,
        # a `ModelView` is read anew at each call, its tables are kept
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
