"""Reads a model by its structure: the fields of its config, the paths of its modules, and checks that both fit."""

import sys
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any

from torch import Tensor, nn

from dkv.memory import memory_of
from dkv.models.view import Layer, ModelView

_REQUIRED: Any = object()
_TOO_MANY = 2**30  # for a size: the bytes of a matrix of two smaller sizes still fit in 64 bits
NORMS = ("attn_norm", "mlp_norm")  # roles of `dkv.models.view.Layer`; the others are linear


@dataclass(frozen=True)
class Layout:
    """Dotted paths of a family's modules; the official tensors have the same names.

    Attributes:
        embed, layers, final_norm, head: paths from the model; `layers` is a list of modules.
        layer: `Layer` role -> path from a layer.
        layers_field, tied_field: the names of `ModelConfig.layers` and `ModelConfig.tied` in a config.json.
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
    """The fields of a config.json, under the same names for all families.

    Attributes:
        vocab_size: rows of the embedding.
        eos_ids: the tokens that end a text, at least one.
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
    def headdim(self) -> int:
        return self.hidden_size // self.nheads

    @property
    def eos_token_id(self) -> int:
        return self.eos_ids[0]

    def features(self, role: str) -> tuple[int, int]:
        """(in_features, out_features) of a layer's linear module by its role."""
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

    A default is the official code's value of a missing field; it is legal, whatever its type.
    """

    def __init__(self, config: Any, owner: str):
        self.config, self.owner = config, owner

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        value = getattr(self.config, name, default)
        if value is _REQUIRED:
            raise ValueError(f"{self.owner}: the config has no {name}; add it.")
        return value

    def count(self, name: str, default: int | None = _REQUIRED) -> int | None:
        value = self.get(name, default)
        return value if value is default else self.check_count(name, value)

    def check_count(self, name: str, value: Any) -> int:
        if type(value) is not int or not 0 < value < _TOO_MANY:
            raise ValueError(f"{self.owner}: {name} must be a positive int, below {_TOO_MANY}, got {shown(value)}.")
        return value

    def positive(self, name: str, default: float) -> float:
        return self.check_positive(name, self.get(name, default))

    def check_positive(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise ValueError(f"{self.owner}: {name} must be a positive number, got {shown(value)}.")
        return float(value)

    def switch(self, name: str, default: bool | None) -> bool | None:
        value = self.get(name, default)
        if value is not default and type(value) is not bool:
            raise ValueError(f"{self.owner}: {name} must be true or false, got {shown(value)}.")
        return value

    def must_be(self, supported: dict[str, tuple[Any, Any]]) -> None:
        """Raises ValueError for a field with another value than the supported one.

        supported: field -> (value, default); with the default None, a missing or null field is supported too.
        """
        for name, (wanted, default) in supported.items():
            value = self.get(name, default)
            # True == 1, so compare the types too; remote code may have a string enum for a str
            same_kind = isinstance(value, type(wanted)) and isinstance(value, bool) == isinstance(wanted, bool)
            if not (value is default is None or (same_kind and value == wanted)):
                raise ValueError(f"{self.owner}: dkv supports {name}={wanted!r} only, got {shown(value)}.")

    def heads(self, hidden_size: str, nheads: str, nheads_k: str, default: int | None = None) -> dict[str, int]:
        """hidden_size, nheads and nheads_k from the fields of these names; nheads_k defaults to `default` or nheads."""
        sizes = [self.count(hidden_size), self.count(nheads)]
        sizes.append(self.count(nheads_k, None) or default or sizes[1])
        if sizes[0] % (2 * sizes[1]) or sizes[1] % sizes[2]:
            raise ValueError(
                f"{self.owner}: {hidden_size} must be an even multiple of {nheads}, and {nheads} a multiple of "
                f"{nheads_k}, got {', '.join(map(str, sizes))}."
            )
        return dict(zip(("hidden_size", "nheads", "nheads_k"), sizes, strict=True))

    def token_ids(self, vocab_size: int) -> dict[str, Any]:
        """mask_id, eos_ids and pad_token_id; a pad token that is missing, null or -1 is the first end of text."""
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


def module_at(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, or None."""
    for name in path.split("."):
        root = getattr(root, name, None)
    return root


def read_view(model: nn.Module, layout: Layout, config: ModelConfig, **family_fields: Any) -> ModelView:
    """The `ModelView` of a model whose config has been read.

    Args:
        family_fields: the fields of `ModelView` that a family decides: family, make_output, honours_attention_mask.

    Raises:
        ValueError: a module is missing, its shape is not the config's, or dkv does not run modules of its kind.
    """
    owner = type(model).__name__

    def find(path):
        module = module_at(model, path)
        if module is None:
            raise ValueError(f"{owner}: {path} is missing; dkv supports the module structure of the official models.")
        return module

    embed, final_norm = find(layout.embed), find(layout.final_norm)
    head = module_at(model, layout.head)
    if head is None and not config.tied:
        find(layout.head)
    if head is not None and getattr(head, "weight", None) is embed.weight:
        head = None
    # quantised modules may define `bias` as a method
    if isinstance(getattr(head, "bias", None), Tensor):
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
                _check_linear(owner, prefix + layout.layer[role], module, config.features(role))
        attention = prefix + layout.layer["q"].removesuffix("q_proj")
        if module_at(model, attention + "q_norm") is not None or module_at(model, attention + "k_norm") is not None:
            raise ValueError(f"{owner}: {attention}q_norm and k_norm (QK normalisation) are not supported by dkv.")
        layers.append(Layer(**roles))
    return ModelView(
        embed=embed,
        layers=tuple(layers),
        final_norm=final_norm,
        head=head,
        nheads=config.nheads,
        nheads_k=config.nheads_k,
        headdim=config.headdim,
        rope_theta=config.rope_theta,
        vocab_size=rows,
        max_positions=config.max_positions,
        mask_id=config.mask_id,
        eos_ids=config.eos_ids,
        pad_token_id=config.pad_token_id,
        # the tables outlive the view, which is read again at each call of dkv
        _tables=memory_of(model).rope_tables.setdefault((config.headdim, config.rope_theta), {}),
        **family_fields,
    )


def _check_linear(owner, path, module, features):
    got = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if got not in (features, (None, None)):  # wrappers of adapters need not say
        raise ValueError(
            f"{owner}: {path} must be linear with (in_features, out_features) = {features} by the config, got {got}."
        )


def _check_norm(owner, path, module):
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    if not isinstance(weight, Tensor) or bias is not None or isinstance(module, nn.LayerNorm):
        raise ValueError(f"{owner}: {path} must be an RMSNorm with a weight and no bias, got {module}.")
