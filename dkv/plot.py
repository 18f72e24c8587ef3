"""A picture of one generation: the steps at which each position was computed, committed and read from the cache."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dkv.generation import GenerateOutput

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# name and colour; the last kind that applies counts
KINDS = (
    ("padding", "#ffffff"),
    ("token, from the cache", "#dfe7ef"),
    ("token, refreshed in a full step", "#9db8d2"),
    ("token, recomputed", "#3d6f9e"),
    ("mask, from the cache", "#f3e3c3"),
    ("mask, recomputed", "#e0a93b"),
    ("committed", "#b3261e"),
)


def step_map(output: GenerateOutput, row: int = 0) -> Tensor:
    """(steps, seqlen) uint8: for each step and position of one sequence, the index of its kind in `KINDS`.

    Args:
        output: of a run with output_history=True.
        row: the sequence of the batch.
    """
    if output.history is None:
        raise ValueError("there is no history to show: call dkv.generate with output_history=True.")
    if not 0 <= row < output.sequences.shape[0]:
        raise ValueError(f"row must be in 0 .. {output.sequences.shape[0] - 1}, got {row}.")
    active, decoded_step = output.active[:, row].cpu(), output.decoded_step[row].cpu()
    # the first step computes everything except padding
    valid = active[0]
    steps = torch.arange(active.shape[0], device=active.device)[:, None]
    masked = decoded_step >= steps
    full = (active | ~valid).all(1, keepdim=True)
    kinds = torch.where(masked, 4 + active.int(), torch.where(full & active, 2, 1 + 2 * active.int()))
    kinds = torch.where(decoded_step == steps, 6, kinds)
    return torch.where(valid, kinds, 0).to(torch.uint8)


def plot_history(output: GenerateOutput, row: int = 0, ax: "Axes | None" = None) -> "Axes":
    """Draws a generation as a map of positions by steps: masked, recomputed, read from the cache, committed.

    Args:
        output: of `dkv.generate(..., output_history=True)`.
        row: the sequence of the batch to draw.
        ax: the axes to draw on; None: those of a new figure.

    Returns:
        The Axes; save with `ax.figure.savefig(...)`.

    Raises:
        ValueError: a run without history, or a row that does not exist.
        ImportError: matplotlib is not installed (`pip install matplotlib`).

    Example:
        >>> output = dkv.generate(model, input_ids, policy=dkv.Decode(8), output_history=True)
        >>> dkv.plot_history(output).figure.savefig("history.png")
    """
    try:
        from matplotlib import pyplot
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("plot_history draws with matplotlib; run: pip install matplotlib") from error
    kinds = step_map(output, row)
    if ax is None:
        _, ax = pyplot.subplots(figsize=(9, 5), layout="constrained")
    colours = ListedColormap([colour for _, colour in KINDS])
    ax.imshow(kinds.numpy(), cmap=colours, vmin=0, vmax=len(KINDS) - 1, aspect="auto", interpolation="nearest")
    ax.set(xlabel="position", ylabel="step")
    shown = [Patch(color=colour, label=name) for i, (name, colour) in enumerate(KINDS) if i and (kinds == i).any()]
    ax.legend(handles=shown, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    return ax
