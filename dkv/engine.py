"""One step of a run: which positions are recomputed, and where the outputs of the candidates are found."""

import torch


def predictors(candidates, state):
    """(batch, seqlen) bool: the positions whose outputs predict the candidates."""
    if not state.shifted:
        return candidates
    # a mask in the first column is predicted by its own output
    first = candidates & (state.columns == state.first_column)
    # nothing rolls over the edge: what is in column 0 is first or padding
    return (candidates & ~first).roll(-1, dims=1) | first


def active_positions(policy, state, candidates):
    """(batch, seqlen) bool: what this step recomputes; the policy's choice and the predictors of all candidates.

    The first step recomputes everything, whatever the policy says: the cache holds nothing of this run.
    """
    active = policy.active(state)
    if not isinstance(active, torch.Tensor) or active.dtype != torch.bool:
        raise TypeError(f"{type(policy).__name__}.active must return a bool tensor, got {active!r}.")
    try:
        active = active.expand_as(state.masked)
    except RuntimeError:
        raise ValueError(
            f"{type(policy).__name__}.active must return shape (batch, seqlen) = {tuple(state.masked.shape)} or one "
            f"that broadcasts to it, got {tuple(active.shape)}."
        ) from None
    return (active | predictors(candidates, state) | (state.step == 0)) & state.real & state.running


def output_places(active, candidate_slots, state, capacity):
    """(candidates,) int64: where, among the `capacity` packed active positions, the output for each candidate is.

    active: (copies * batch, seqlen) bool; candidate_slots: (candidates,) int64, -1 padded, of the same rows.
    """
    slots = candidate_slots.clamp(min=0)
    if state.shifted:
        rows, columns = slots // active.shape[1], slots % active.shape[1]
        first = state.first_column[rows % state.first_column.shape[0], 0]
        slots = rows * active.shape[1] + torch.maximum(columns - 1, first)
    return (active.flatten().cumsum(0)[slots] - 1).clamp(0, max(capacity - 1, 0))
