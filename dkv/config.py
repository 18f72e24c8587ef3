"""The options of `dkv.generate` as data: the one list of their types, defaults and checks."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Literal, get_args

from dkv.inputs import fraction, one_of, scale, switch, token_id, token_ids, whole
from dkv.kernels.checks import IMPLS, Impl
from dkv.policy import Decode, Policy, checked_policy

Remasking = Literal["low_confidence", "random", "entropy", "topk_margin", "maskgit_plus", "origin"]
RULES = get_args(Remasking)
ORDERED = ("random", "origin")  # what a step decodes is known before its outputs
BY_PROBABILITY = ("low_confidence", "maskgit_plus", "topk_margin")
MAX_STEPS = 2**24  # more would have equal times in float32, in which Dream's schedule counts


def _option(default, check, **limits):
    """A field whose value, unless it is a default of None, is what check(name, value, **limits) makes of it."""
    return field(default=default, metadata={"check": partial(check, **limits)})


@dataclass(frozen=True)
class GenerateConfig:
    """The options of `dkv.generate`, which says what they mean; `order` and `generator` belong to one call.

    Every check that needs neither a model nor a prompt is done here. Scalars of NumPy and PyTorch become Python's,
    eos_token_id a tuple, and a policy of None `dkv.Decode()`; where the others are None, the model or the prompt
    decides.

    Raises:
        ValueError, TypeError: a value out of range or of another type, values that exclude each other; each names the
            option.

    Example:
        >>> config = GenerateConfig(gen_length=256, block_length=32, policy=dkv.Decode(8))
        >>> dataclasses.replace(config, steps=128)
    """

    gen_length: int = _option(128, whole, least=0)
    steps: int | None = _option(None, whole, least=1, most=MAX_STEPS)
    block_length: int | None = _option(None, whole, least=1)
    policy: Policy | None = _option(None, checked_policy)
    remasking: Remasking | None = _option(None, one_of, allowed=RULES)
    temperature: float = _option(0.0, scale)
    top_p: float | None = _option(None, fraction)
    top_k: int | None = _option(None, whole, least=1)
    alg_temp: float = _option(0.0, scale)
    eps: float = _option(1e-3, fraction, closed=False)
    cfg_scale: float = _option(0.0, scale)
    threshold: float | None = _option(None, fraction)
    factor: float | None = _option(None, scale, positive=True)
    logits_eos_inf: bool = _option(False, switch)
    confidence_eos_eot_inf: bool = _option(False, switch)
    eos_early_stop: bool = _option(False, switch)
    eos_token_id: int | Sequence[int] | None = _option(None, token_ids)
    mask_id: int | None = _option(None, token_id)
    impl: Impl = _option("auto", one_of, allowed=IMPLS)
    cuda_graphs: bool = _option(True, switch)
    fused_products: bool | None = _option(None, switch)

    def __post_init__(self):
        for option in fields(self):
            value = getattr(self, option.name)
            if value is not None or option.default is not None:
                object.__setattr__(self, option.name, option.metadata["check"](option.name, value))
        if self.policy is None:
            object.__setattr__(self, "policy", Decode())
        if self.threshold is not None and self.factor is not None:
            raise ValueError("threshold and factor exclude each other; pass one of them.")
        if self.by_probability and self.steps is not None:
            raise ValueError("steps must be None with threshold or factor: they take as many steps as they need.")
        if self.alg_temp > 0 and (self.ordered or self.by_probability):
            raise ValueError("alg_temp needs a fixed number of commits chosen by confidence.")
        if self.remasking is None:
            return
        if self.by_probability and self.remasking not in BY_PROBABILITY:
            got = self.remasking
            raise ValueError(f"threshold and factor need remasking to be one of {BY_PROBABILITY}, got {got!r}.")
        if self.policy.needs_order and not self.ordered:
            raise ValueError(
                f"{self.policy!r} must know what a step will decode; use remasking='random' (order= may fix its "
                f"order) or 'origin', got remasking={self.remasking!r}."
            )

    @property
    def ordered(self) -> bool:
        """Whether what a step decodes is known before its outputs."""
        return self.remasking in ORDERED

    @property
    def by_probability(self) -> bool:
        """Whether confidences, not a count, decide how many tokens are committed."""
        return self.threshold is not None or self.factor is not None

    @property
    def noisy(self) -> bool:
        """Whether noise is drawn for tokens or for the choice of commits."""
        return self.temperature > 0 or self.alg_temp > 0
