"""One step of a run: which positions are recomputed, and where the outputs of the candidates are found."""

import torch
import torch.nn.functional as F


def predictors(candidates, state):
    """(batch, seqlen) bool: the positions whose outputs predict the candidates."""
    if not state.shifted:
        return candidates
    # a mask in the first column is predicted by its own output
    first = candidates & (state.columns == state.first_column)
    return F.pad((candidates & ~first)[:, 1:], (0, 1)) | first


def active_positions(policy, state, candidates):
    """(batch, seqlen) bool: what this step recomputes; the policy's choice and the predictors of all candidates."""
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
    return (active | predictors(candidates, state)) & state.real & state.running


def packed_rows(active, candidates, state):
    """(candidates,) int64: the row of the packed hidden states that predicts each candidate, in order of position."""
    rows, columns = candidates.nonzero(as_tuple=True)
    if state.shifted:
        columns = torch.maximum(columns - 1, state.first_column[rows, 0])
    packed = active.flatten().cumsum(0) - 1
    return packed[rows * active.shape[1] + columns]
