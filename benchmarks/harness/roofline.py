"""The floor of a denoising step: the time of its necessary bytes and operations at the measured ceilings.

Counted, whatever code runs the step:

    linear      the weights of the layers, read once; a multiplication and an addition per weight and token. The last
                layer needs keys and values of all active positions, but queries, output projection and MLP only of
                those whose outputs predict a candidate.
    attention   K and V of all positions read once, K and V of the active ones written, queries read, outputs written
    head        its weight read once; a product for each candidate. Logits need not reach memory.

Norms, rotation, the choice of tokens and all other activations count nothing, because they could stay on the chip.
Kernels run one after another, so the floor is the sum over the groups, each bound by its bytes or by its operations.
"""

from dataclasses import dataclass
from typing import Any

from dkv.models.layout import ModelConfig

GROUPS = ("linear", "attention", "head")


@dataclass(frozen=True)
class Sizes:
    """A model's sizes; element_size: bytes of a number in weights, activations and cache."""

    model: ModelConfig
    element_size: int

    @classmethod
    def of(cls, model: Any) -> "Sizes":
        """The sizes of a native model."""
        return cls(model.model_config, model.dtype.itemsize)

    @property
    def kv_weights(self) -> int:
        """Weights of a layer's projections to keys and values."""
        return 2 * self.model.hidden_size * self.model.nheads_k * self.model.headdim

    @property
    def layer_weights(self) -> int:
        model = self.model
        return model.hidden_size * (2 * model.nheads * model.headdim + 3 * model.mlp_size) + self.kv_weights


@dataclass(frozen=True)
class Work:
    """The work of one step, in positions over all rows.

    Attributes:
        batch, seqlen: rows, and the positions that each active one attends to.
        active: positions that go through the model.
        candidates: positions whose outputs the last layer and the head need.
    """

    batch: int
    seqlen: int
    active: int
    candidates: int

    @property
    def full(self) -> bool:
        return self.active == self.batch * self.seqlen


def parts(sizes: Sizes, work: Work, whole_last_layer: bool = False) -> list[tuple[str, int, int]]:
    """[(group, bytes, operations)] of a step, the last layer apart; operations: multiplications and additions.

    whole_last_layer: as if the last layer computed all active positions, as the layers before it do.
    """
    n, element, model = work.active, sizes.element_size, sizes.model
    last = n if whole_last_layer else work.candidates
    q, kv = model.nheads * model.headdim, 2 * model.nheads_k * model.headdim
    keys = work.batch * work.seqlen
    found = []
    for layers, queries in ((model.layers - 1, n), (1, last)):
        products = sizes.kv_weights * n + (sizes.layer_weights - sizes.kv_weights) * queries
        found.append(("linear", layers * sizes.layer_weights * element, layers * 2 * products))
        moved = (keys + n) * kv + 2 * queries * q
        found.append(("attention", layers * moved * element, layers * 4 * queries * work.seqlen * q))
    head = model.vocab_size * model.hidden_size
    found.append(("head", head * element, 2 * head * work.candidates))
    return found


def operations(sizes: Sizes, works: list[Work]) -> int:
    """Multiplications and additions of a run that puts its active positions through all layers."""
    return sum(operations for work in works for _, _, operations in parts(sizes, work, whole_last_layer=True))


def floors(sizes: Sizes, work: Work, ceilings: dict[str, float]) -> dict[str, float]:
    """The minimum seconds of each group; ceilings: of `common.measure_ceilings`."""
    seconds = dict.fromkeys(GROUPS, 0.0)
    for group, moved, operations in parts(sizes, work):
        seconds[group] += max(moved / ceilings["bandwidth"], operations / ceilings["flops"])
    return seconds


def floor(sizes: Sizes, work: Work, ceilings: dict[str, float]) -> float:
    """The minimum seconds of a step."""
    return sum(floors(sizes, work, ceilings).values())
