"""The least time that a denoising step can take: bytes that must move, operations that must be done, at the ceilings.

What counts, whatever code runs the step:

    linear      the weights of the layers, read once; a multiplication and an addition per weight and token. In the
                last layer only the keys and values of all active positions are needed: queries, output projection and
                MLP of those alone whose outputs predict a candidate.
    attention   K and V of all positions read once, K and V of the active ones written, queries read and outputs written
    head        its weight read once; a product for each candidate. Logits need not reach memory.

Norms, rotation, the choice of tokens and all other activations could stay on the chip: they count nothing. Kernels run
one after another, so that the floor is the sum over the groups, each of them bound by its bytes or its operations.
"""

from dataclasses import dataclass

GROUPS = ("linear", "attention", "head")


@dataclass(frozen=True)
class Sizes:
    """A model's sizes; element_size: bytes of a number of weights, activations and cache."""

    hidden: int
    mlp: int
    layers: int
    nheads: int
    nheads_k: int
    headdim: int
    vocabulary: int
    element_size: int

    @classmethod
    def of(cls, model):
        """The sizes of a native model."""
        s = model.model_config
        return cls(
            hidden=s.hidden_size,
            mlp=s.mlp_size,
            layers=s.layers,
            nheads=s.nheads,
            nheads_k=s.nheads_k,
            headdim=s.headdim,
            vocabulary=s.vocab_size,
            element_size=model.dtype.itemsize,
        )

    @property
    def kv_weights(self):
        """Weights of a layer's projections to keys and values."""
        return 2 * self.hidden * self.nheads_k * self.headdim

    @property
    def layer_weights(self):
        return 2 * self.hidden * self.nheads * self.headdim + self.kv_weights + 3 * self.hidden * self.mlp


@dataclass(frozen=True)
class Step:
    """What one step recomputes: numbers of positions, over all rows.

    Attributes:
        batch, seqlen: rows, and the positions that each active one attends to.
        active: positions that go through the model.
        candidates: positions whose outputs are needed in the end; those of the last layer and of the head.
    """

    batch: int
    seqlen: int
    active: int
    candidates: int

    @property
    def full(self):
        return self.active == self.batch * self.seqlen


def parts(sizes, step, whole_last_layer=False):
    """[(group, bytes, operations)] of a step, the last layer apart; operations: multiplications and additions.

    whole_last_layer: as if the last layer computed all active positions, as the layers before it do.
    """
    n, element = step.active, sizes.element_size
    last = n if whole_last_layer else step.candidates
    q, kv = sizes.nheads * sizes.headdim, 2 * sizes.nheads_k * sizes.headdim
    keys = step.batch * step.seqlen
    found = []
    for layers, queries in ((sizes.layers - 1, n), (1, last)):
        products = sizes.kv_weights * n + (sizes.layer_weights - sizes.kv_weights) * queries
        found.append(("linear", layers * sizes.layer_weights * element, layers * 2 * products))
        moved = (keys + n) * kv + 2 * queries * q
        found.append(("attention", layers * moved * element, layers * 4 * queries * step.seqlen * q))
    head = sizes.vocabulary * sizes.hidden
    found.append(("head", head * element, 2 * head * step.candidates))
    return found


def operations(sizes, steps):
    """Multiplications and additions of a run that puts its active positions through all layers."""
    return sum(operations for step in steps for _, _, operations in parts(sizes, step, whole_last_layer=True))


def floors(sizes, step, ceilings):
    """Seconds of each group at least; ceilings: bytes and operations a second, of `common.measure_ceilings`."""
    seconds = dict.fromkeys(GROUPS, 0.0)
    for group, moved, operations in parts(sizes, step):
        seconds[group] += max(moved / ceilings["bandwidth"], operations / ceilings["flops"])
    return seconds


def floor(sizes, step, ceilings):
    """Seconds of a step at least."""
    return sum(floors(sizes, step, ceilings).values())
