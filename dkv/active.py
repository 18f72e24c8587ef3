"""The positions that a step recomputes: those of the policy, and those whose outputs the step needs."""

import torch
from torch import Tensor

from dkv.kernels.rows import Rule
from dkv.policy import Policy
from dkv.state import State


def rule_of(policy: Policy, shifted: bool) -> Rule | None:
    """The `Rule` that is the whole policy; None if its class defines an `active` of its own."""
    return policy.rule(shifted) if type(policy).active is Policy.active else None


def write_active(
    policy: Policy,
    state: State,
    active: Tensor,
    sizes: Tensor,
    totals: Tensor | None = None,
    *,
    foresee: bool = False,
) -> None:
    """Writes the positions that the next step recomputes: the policy's choice and the predictors of all candidates.

    The first step recomputes everything, whatever the policy says, because the cache holds nothing of this run.

    Args:
        active, sizes, totals, foresee: as in `dkv.kernels.reference.active_positions`.
    """
    rule = rule_of(policy, state.shifted)
    state.ops.active_positions(
        state.decoded_step,
        state.valid,
        state.candidates,
        state.counters,
        active,
        sizes,
        totals,
        shifted=state.shifted,
        rule=rule,
        chosen=_chosen(policy, state) if rule is None else None,
        rank=state.rank,
        foresee=foresee,
    )


def _chosen(policy, state):
    active = policy.active(state)
    if not isinstance(active, Tensor) or active.dtype != torch.bool:
        raise TypeError(f"{type(policy).__name__}.active must return a bool tensor, got {active!r}.")
    try:
        return active.expand_as(state.valid).contiguous()
    except RuntimeError:
        raise ValueError(
            f"{type(policy).__name__}.active must return shape (batch, seqlen) = {tuple(state.valid.shape)} or one "
            f"that broadcasts to it, got {tuple(active.shape)}."
        ) from None
