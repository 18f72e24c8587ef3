"""The task with verifiable answers, the training that makes the committed models, and those models."""

import json
from pathlib import Path

import pytest
import torch

import dkv
from benchmarks import train_small
from benchmarks.harness import models, running_sums
from benchmarks.train_small import Recipe

ROOT = Path(__file__).resolve().parent.parent

FAMILIES = ("llada", "dream")
TINY_SIZE = train_small.SIZE | {"hidden": 32, "mlp": 32, "layers": 1, "heads": 2}
TINY = {"llada": models.llada(**TINY_SIZE), "dream": models.dream(**TINY_SIZE, kv_heads=1)}


def held_out(count):
    return running_sums.problems(count, running_sums.held_out_stream())


# ---- the task


def test_answer_by_hand():
    prompt = torch.zeros(1, 32, dtype=torch.long)
    prompt[0, 1], prompt[0, 31] = 4, 8
    # x[32] = x[31] + x[0] = 8, x[33] = 8 + 4 = 2, then 2 until x[63] = x[62] + x[31] = 2 + 8 = 0
    first = [8] + 30 * [2] + [0]
    # x[64] = x[63] + x[32] = 8, x[65] = 8 + 2 = 0, and 2 more each time until x[95] = x[94] + x[63]
    second = [8] + [2 * i % 10 for i in range(30)] + [58 % 10]
    assert running_sums.solve(prompt)[0, 32:].tolist() == first + second


def test_the_rule_token_by_token():
    for x in held_out(5).tolist():
        assert len(x) == running_sums.LENGTH and all(0 <= digit <= 9 for digit in x)
        assert all(x[i] == (x[i - 1] + x[i - 32]) % 10 for i in range(32, 96))


def test_a_wrong_digit_is_noticed():
    x = held_out(3)
    assert running_sums.right(x).all() and not running_sums.slips(x).any()
    x[1, 40] = (x[1, 40] + 3) % 10
    wrong = ~running_sums.right(x)
    assert wrong.nonzero().tolist() == [[1, 40 - 32]]
    # it also breaks the rule of the two tokens that it is a summand of
    assert running_sums.slips(x).nonzero().tolist() == [[1, 40 - 32], [1, 41 - 32], [1, 72 - 32]]
    # the mask is no digit
    x[2, 95] = running_sums.MASK
    assert not running_sums.right(x)[2, -1] and running_sums.slips(x)[2, -1]


def test_an_error_that_later_tokens_follow_is_one_slip():
    (x,) = held_out(1).tolist()
    x[50] = (x[50] + 1) % 10
    for i in range(51, 96):
        x[i] = (x[i - 1] + x[i - 32]) % 10
    x = torch.tensor([x])
    assert running_sums.slips(x).sum() == 1
    assert not running_sums.right(x)[0, 50 - 32 : 81 - 32].any()


def test_training_never_sees_a_held_out_problem():
    held = {tuple(prompt) for prompt in held_out(200)[:, :32].tolist()}
    trained = [train_small.batch_of(Recipe(), step)[0][:, :32] for step in (*range(20), *range(1000, 1020))]
    trained = {tuple(prompt) for prompt in torch.cat(trained).tolist()}
    assert len(held) == 200 and len(trained) == 40 * Recipe.batch and not held & trained
    seeds = [running_sums.training_stream(seed, step).initial_seed() for seed in (0, 1) for step in range(100)]
    assert len(set(seeds)) == 200
    assert running_sums.held_out_stream().initial_seed() not in {seed % 2**32 for seed in seeds}


# ---- training


def test_what_is_masked():
    recipe = Recipe(batch=400)
    x, early = train_small.batch_of(recipe, 0)
    assert not early[:, :32].any() and early.float().sum(1).max() < 0.6 * 64
    assert (x[:, :32] == 0).float().mean() > recipe.zeros
    x, late = train_small.batch_of(recipe, 2 * recipe.curriculum)
    assert not late[:, :32].any() and late[:, 32:].all(1).any()
    assert 0.05 < (x[:, :32] == 0).float().mean() < 0.15
    # as in decoding: what is before the first mask is decoded, and hardly anything after it
    after = late.int().cummax(1).values.bool()
    shaped = (late.sum(1) / after.sum(1)) > 0.85
    assert 0.4 < shaped.float().mean() < 0.7


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_of_masked_tokens_in_their_columns(family):
    model = dkv.models.from_config(TINY[family], device="cpu")
    x, masked = train_small.batch_of(Recipe(batch=3), 900)
    logits = model(x.masked_fill(masked, running_sums.MASK)).logits.log_softmax(-1)
    shift = 1 if family == "dream" else 0
    rows = []
    for b in range(3):
        columns = masked[b].nonzero()[:, 0].tolist()
        rows.append(sum(-logits[b, j - shift, x[b, j]] for j in columns) / len(columns))
    torch.testing.assert_close(train_small.loss_of(model, x, masked), sum(rows) / 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_interrupted_training_ends_with_the_same_weights(family, tmp_path, monkeypatch, capsys):
    recipe = Recipe(steps=8, batch=4, warmup=2, curriculum=3)

    def train(folder):
        return train_small.train(TINY[family], recipe, folder, save_every=3, device="cpu")

    whole, losses, _ = train(tmp_path / "whole")
    loss_of, calls = train_small.loss_of, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss_of(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_small, "loss_of", interrupted)
        train(tmp_path / "parts")
    capsys.readouterr()
    resumed, losses_resumed, _ = train(tmp_path / "parts")
    assert "after 3 of 8 steps" in capsys.readouterr().out
    assert losses_resumed == losses and len(losses) == 8
    before = dkv.models.from_config(TINY[family], device="cpu")
    for a, b, c in zip(whole.parameters(), resumed.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
    with pytest.raises(ValueError, match="another training"):
        train_small.train(TINY[family], Recipe(steps=9), tmp_path / "parts", device="cpu")


def test_the_loss_curve_is_thinned():
    assert train_small.thinned([1.0, 2.0]) == [[1, 1.0], [2, 2.0]]
    curve = train_small.thinned([float(i) for i in range(401)])
    assert len(curve) <= 200 and curve[0] == [3, 1.0] and curve[-1] == [401, 399.5]


# ---- the committed models


@pytest.mark.parametrize("family", FAMILIES)
def test_the_committed_model_solves_held_out_problems(family):
    model = dkv.from_pretrained(ROOT / "benchmarks" / "small" / family, device="cpu")
    found = train_small.accuracy(model, held_out(8)[:, :32], **train_small.DECODING[family])
    assert found["exact_match"] == 1, found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_committed_record(family):
    folder = ROOT / "benchmarks" / "small" / family
    record = json.loads((folder / "training.json").read_text())
    model = dkv.from_pretrained(folder, device="cpu")
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert 1.0e6 <= record["parameters"] <= 2.5e6
    assert (folder / "model.safetensors").stat().st_size < 12e6
    assert record["command"] == f"python benchmarks/train_small.py {family}"
    # the command trains what is committed
    assert record["recipe"].items() >= json.loads(json.dumps(vars(Recipe()))).items()
    config = json.loads((folder / "config.json").read_text())
    assert all(config[name] == value for name, value in train_small.CONFIGS[family].items())
    assert record["data"] == running_sums.__doc__ and record["loss"] and record["seconds"] > 0
    assert all(record[name] for name in ("device", "threads", "torch", "date"))
    curve = record["loss_curve"]
    assert 50 <= len(curve) <= 200 and curve[-1][0] == record["recipe"]["steps"] and curve[-1][1] < curve[0][1]
    assert record["held_out"]["problems"] == 1000
    for decoding in ("default", "left_to_right"):
        assert record["held_out"][decoding]["exact_match"] >= 0.95
        assert record["held_out"][decoding]["token_accuracy"] >= record["held_out"][decoding]["exact_match"]
    assert (folder / "training.png").exists()
