"""`plot_history`: the map of a run that is known in every cell, and the drawing of it."""

import sys

import pytest
import torch
from tiny import generate, model, prompts

import dkv
from dkv.generation import GenerateOutput, GenerateStats
from dkv.plot import KINDS, step_map

PADDING, CACHED, REFRESHED, RECOMPUTED, MASK_CACHED, MASK, COMMITTED = range(len(KINDS))


def test_map_by_hand():
    """One row: padding, a prompt token, three generated ones; a full step, a cached one, one of a single position."""
    active = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 0]], dtype=torch.bool)
    output = GenerateOutput(
        torch.zeros(1, 5, dtype=torch.int64),
        GenerateStats(),
        history=torch.zeros(3, 1, 5, dtype=torch.int64),
        active=active[:, None],
        decoded_step=torch.tensor([[-1, -1, 0, 2, 3]]),
    )
    assert step_map(output).tolist() == [
        [PADDING, REFRESHED, COMMITTED, MASK, MASK],
        [PADDING, CACHED, RECOMPUTED, MASK, MASK],
        [PADDING, CACHED, CACHED, COMMITTED, MASK_CACHED],
    ]


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_map_of_a_run(family, device):
    ids, real = prompts(9, 5, device=device)
    output = generate(family, ids, real, gen_length=8, policy=dkv.Decode(4), device=device)
    kinds = step_map(output, row=1)
    assert kinds.shape == (8, 17) and (kinds[:, :4] == PADDING).all() and (kinds[:, 4:] != PADDING).all()
    assert (kinds == COMMITTED).sum() == 8
    assert torch.equal((kinds == COMMITTED).int().argmax(0)[9:], output.decoded_step[1, 9:].cpu())
    read = (kinds == CACHED) | (kinds == MASK_CACHED) | (kinds == PADDING)
    assert torch.equal(~read, output.active[:, 1].cpu() | (kinds == COMMITTED))


def test_the_legend_names_the_kinds_in_the_map(device, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    output = generate("llada", prompts(9, device=device)[0], gen_length=8, policy=dkv.Decode(4), device=device)
    axes = dkv.plot_history(output)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [KINDS[i][0] for i in (CACHED, REFRESHED, RECOMPUTED, MASK, COMMITTED)]
    axes.figure.savefig(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 5000
    _, mine = matplotlib.pyplot.subplots()
    assert dkv.plot_history(output, ax=mine) is mine
    matplotlib.pyplot.close("all")


def test_without_matplotlib_the_error_says_what_to_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib$"):
        dkv.plot_history(None)


def test_bad_input(device):
    output = dkv.generate(model("llada", device), prompts(5, device=device)[0], gen_length=2)
    with pytest.raises(ValueError, match="call dkv.generate with output_history=True"):
        dkv.plot_history(output)
    output = generate("llada", prompts(5, device=device)[0], gen_length=2, device=device)
    with pytest.raises(ValueError, match=r"row must be in 0 \.\. 0, got 1"):
        dkv.plot_history(output, row=1)
