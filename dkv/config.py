"""The options of `dkv.generate` as data: the one list of their types, defaults and checks, and the remasking rules."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dkv.inputs import fraction, one_of, scale, switch, token_id, token_ids, whole
from dkv.kernels import Confidence, checks
from dkv.policy import Decode, Policy, PolicyName, checked_policy

Remasking = Literal["low_confidence", "maskgit_plus", "topk_margin", "entropy", "random", "origin"]
MAX_STEPS = 2**24  # with more, neighbouring times of Dream's schedule would be equal in float32


class RemaskingRule(NamedTuple):
    """How a step chooses, among its candidates, the tokens that it commits.

    Attributes:
        score: the candidates with the highest scores are committed; NaN where there is no answer.
        probability: a score as the probability that threshold and factor are about; None: the rule excludes them.
        ordered: whether the order is known beforehand: the candidates are then the masks whose turn it is, see
            `dkv.sampling.write_order`.
    """

    score: Callable[[Confidence], Tensor]
    probability: Callable[[Tensor], Tensor] | None = None
    ordered: bool = False


RULES: dict[Remasking, RemaskingRule] = {
    "low_confidence": RemaskingRule(lambda found: found.log_prob, probability=torch.exp),
    "maskgit_plus": RemaskingRule(lambda found: found.log_prob, probability=torch.exp),
    "topk_margin": RemaskingRule(lambda found: found.margin, probability=lambda score: score),
    "entropy": RemaskingRule(lambda found: -found.entropy),
    "random": RemaskingRule(lambda found: found.log_prob, ordered=True),
    "origin": RemaskingRule(lambda found: found.log_prob, ordered=True),
}


def _option(default, check, **limits):
    """A field whose value becomes check(name, value, **limits); a default of None stays None."""
    return field(default=default, metadata={"check": partial(check, **limits)})


@dataclass(frozen=True)
class GenerateConfig:
    """The options of `dkv.generate`, documented there, except `order` and `generator`, which belong to one call.

    The constructor does every check that needs neither a model nor a prompt. It turns scalars of NumPy and PyTorch into
    Python's, eos_token_id into a tuple, and policy, by name or None, into a `dkv.Policy`. The values that switch an
    option off become one: 0.0 for temperature, alg_temp and cfg_scale, None for top_p and top_k. Any other None is for
    the model or the prompt to decide.

    Raises:
        ValueError, TypeError: a value out of range or of the wrong type, or values that exclude each other; the message
            names the option.

    Example:
        >>> config = GenerateConfig(gen_length=256, block_length=32, policy=dkv.Decode(8))
        >>> dataclasses.replace(config, steps=128)
    """

    gen_length: int = _option(128, whole, minimum=0)
    steps: int | None = _option(None, whole, minimum=1, maximum=MAX_STEPS)
    block_length: int | None = _option(None, whole, minimum=1)
    policy: Policy | PolicyName | None = _option(None, checked_policy)
    remasking: Remasking | None = _option(None, one_of, allowed=tuple(RULES))
    temperature: float | None = _option(0.0, scale)
    top_p: float | None = _option(None, fraction)
    top_k: int | None = _option(None, whole, minimum=0)
    alg_temp: float | None = _option(0.0, scale)
    eps: float = _option(1e-3, fraction, closed=False)
    cfg_scale: float | None = _option(0.0, scale)
    threshold: float | None = _option(None, fraction)
    factor: float | None = _option(None, scale, positive=True)
    logits_eos_inf: bool = _option(False, switch)
    confidence_eos_eot_inf: bool = _option(False, switch)
    eos_early_stop: bool = _option(False, switch)
    eos_token_id: int | list[int] | tuple[int, ...] | None = _option(None, token_ids)
    mask_id: int | None = _option(None, token_id)
    impl: checks.Impl = _option("auto", one_of, allowed=checks.IMPLS)
    cuda_graphs: bool = _option(True, switch)
    fused_products: bool | None = _option(None, switch)

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if value is not None or option.default is not None:
                object.__setattr__(self, option.name, option.metadata["check"](option.name, value))
        if self.policy is None:
            object.__setattr__(self, "policy", Decode())
        for name, off in (("top_p", 1), ("top_k", 0)):
            if getattr(self, name) == off:
                object.__setattr__(self, name, None)
        if self.threshold is not None and self.factor is not None:
            raise ValueError("threshold and factor exclude each other; pass one of them.")
        if self.by_probability and self.steps is not None:
            raise ValueError("steps must be None with threshold or factor: they take as many steps as they need.")
        if self.alg_temp > 0 and (self.ordered or self.by_probability):
            raise ValueError("alg_temp needs a fixed number of commits chosen by confidence.")
        if self.remasking is None:
            return
        if self.by_probability and self.rule.probability is None:
            allowed = tuple(name for name, rule in RULES.items() if rule.probability)
            raise ValueError(f"threshold and factor need remasking to be one of {allowed}, got {self.remasking!r}.")
        if self.policy.needs_order and not self.ordered:
            raise ValueError(
                f"{self.policy!r} must know which masks a step will decode; use remasking='random' (order= may fix its "
                f"order) or 'origin', got remasking={self.remasking!r}."
            )

    @property
    def rule(self) -> RemaskingRule:
        """The rule of `remasking`, which must not be None."""
        return RULES[self.remasking]

    @property
    def ordered(self) -> bool:
        """Whether the masks that a step decodes are known before its outputs."""
        return self.remasking is not None and self.rule.ordered

    @property
    def by_probability(self) -> bool:
        """Whether confidences, not a schedule, decide how many tokens a step commits."""
        return self.threshold is not None or self.factor is not None

    @property
    def noisy(self) -> bool:
        """Whether noise is drawn for tokens or for the choice of commits."""
        return self.temperature > 0 or self.alg_temp > 0
