"""What a step recomputes: what the policy says, and what the step needs besides."""

import torch

from dkv.policy import Policy


def rule_of(policy, shifted):
    """The `dkv.kernels.rows.Rule` that says all of a `Policy`, or None where it has an `active` of its own.

    shifted: bool, as of `State`.
    """
    return policy.rule(shifted) if type(policy).active is Policy.active else None


def write_active(policy, state, active, sizes, totals=None, *, foresee=False):
    """Writes what the next step recomputes: the policy's choice and the predictors of all candidates.

    The first step recomputes everything, whatever the policy says: the cache holds nothing of this run.

    Args:
        active, sizes, totals, foresee: as of `dkv.kernels.reference.active_positions`.
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
    if not isinstance(active, torch.Tensor) or active.dtype != torch.bool:
        raise TypeError(f"{type(policy).__name__}.active must return a bool tensor, got {active!r}.")
    try:
        return active.expand_as(state.valid).contiguous()
    except RuntimeError:
        raise ValueError(
            f"{type(policy).__name__}.active must return shape (batch, seqlen) = {tuple(state.valid.shape)} or one "
            f"that broadcasts to it, got {tuple(active.shape)}."
        ) from None
