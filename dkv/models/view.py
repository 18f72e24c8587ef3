"""`ModelView`: a model by the roles of its modules, with the numbers that its config gives."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkv.cache import KVCache
from dkv.linear import is_plain, linear
from dkv.memory import setting_up, wait_for


@dataclass(frozen=True)
class Layer:
    """The modules of a decoder layer by their roles, the same for every family."""

    attn_norm: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    mlp_norm: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        return self.attn_norm, self.mlp_norm

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        return self.q, self.k, self.v, self.o, self.gate, self.up, self.down


@dataclass(frozen=True)
class Family:
    """The differences between LLaDA and Dream: one instance for each family, in `dkv.models`.

    Attributes:
        shifted: whether the output at column j - 1 predicts column j.
        remasking: the default rule.
        remasking_by_probability: the default rule of threshold and factor decoding.
        divides_logits: whether the temperature divides the logits before the confidence is taken (Dream), or only
            scales the noise (LLaDA).
        time_steps: whether the number of commits follows Dream's time steps, or LLaDA's even split.
        end_of_turn_id: the token that ends a turn, besides the end of text.
    """

    name: str
    shifted: bool
    remasking: str
    remasking_by_probability: str
    divides_logits: bool
    time_steps: bool
    end_of_turn_id: int


@dataclass(frozen=True, eq=False)
class ModelView:
    """A LLaDA or Dream, native or of Hugging Face's remote code, by the roles of its modules.

    Attributes:
        head: None if the embedding's weight is the head (tied).
        vocab_size: rows of the embedding; the head may have fewer, see `predictable`.
        max_positions: the length that the model was made for.
        mask_id, eos_ids, pad_token_id: token ids below vocab_size.
        make_output: makes the output of the model's own forward from logits.
        honours_attention_mask: whether the model's own forward applies its attention_mask (the first revision of
            LLaDA's file ignores it).
    """

    family: Family
    embed: nn.Module
    layers: tuple[Layer, ...]
    final_norm: nn.Module
    head: nn.Module | None
    nheads: int
    nheads_k: int
    headdim: int
    rope_theta: float
    vocab_size: int
    max_positions: int
    mask_id: int
    eos_ids: tuple[int, ...]
    pad_token_id: int
    make_output: Callable[..., Any]
    honours_attention_mask: bool = True
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def eos_token_id(self) -> int:
        """The first token that ends a text."""
        return self.eos_ids[0]

    def predictable(self, ids: Iterable[int]) -> tuple[int, ...]:
        """The ids that the head has a row for; LLaDA's embedding can be resized without its head."""
        rows = getattr(self.head, "out_features", self.vocab_size)
        return tuple(i for i in ids if i < rows)

    @property
    def called(self) -> list[nn.Module]:
        """The modules that dkv calls, or whose weights it reads instead."""
        others = [self.embed, self.final_norm, *([] if self.head is None else [self.head])]
        return [module for layer in self.layers for module in (*layer.linears, *layer.norms)] + others

    @property
    def weight(self) -> Tensor:
        """The embedding's weight, whose device and dtype are the model's."""
        return self.embed.weight

    def new_cache(
        self, batch: int, seqlen: int, leftpad: Tensor | None = None, key_mask: Tensor | None = None
    ) -> KVCache:
        """A `KVCache` for `batch` rows of `seqlen` columns."""
        return KVCache(
            len(self.layers),
            batch,
            seqlen,
            self.nheads_k,
            self.headdim,
            leftpad=leftpad,
            key_mask=key_mask,
            dtype=self.weight.dtype,
            device=self.weight.device,
        )

    def cache_bytes(self, batch: int, seqlen: int) -> int:
        """The bytes of a `new_cache`."""
        return 2 * len(self.layers) * batch * seqlen * self.nheads_k * self.headdim * self.weight.element_size()

    def rope_angles(self, positions: Tensor) -> Tensor:
        """The angles of the half-split RoPE, (..., headdim // 2) float32, at any positions (...).

        Frequencies and angles are computed in float32, as both models do.
        """
        exponents = torch.arange(0, self.headdim, 2, dtype=torch.float32, device=positions.device) / self.headdim
        return positions.float()[..., None] * (1 / self.rope_theta**exponents)

    def rope_tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of the columns' angles, (at least length, headdim // 2) float32; kept, and grown by doubling."""
        with setting_up():
            known = self._tables.get(device)
            if known is None or known[0].shape[0] < length:
                # tables made under inference mode could not be used in training later
                with torch.inference_mode(False), torch.no_grad():
                    length = length if known is None else max(length, 2 * known[0].shape[0])
                    angles = self.rope_angles(torch.arange(length, device=device))
                    known = angles.cos(), angles.sin()
                    wait_for(known[1])
                self._tables[device] = known
        return known

    @property
    def head_weight(self) -> Tensor | None:
        """The weight (vocab, hidden_size) whose product with the hidden state is the logits; None: call the head."""
        if self.head is None:
            return self.weight if self.weight.is_contiguous() else None
        return self.head.weight if is_plain(self.head) else None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (rows, vocab) of hidden states after the final norm."""
        return F.linear(hidden, self.weight) if self.head is None else linear(self.head, hidden)
