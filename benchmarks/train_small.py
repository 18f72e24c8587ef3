"""Trains a small LLaDA or Dream from scratch on running sums, for benchmarks that need right and wrong answers.

    python benchmarks/train_small.py llada
    python benchmarks/train_small.py dream

Each takes less than an hour of one CPU thread. The same command with as many threads on the same machine gives the same
weights bit for bit. An interrupted training continues from its last saved state, in benchmarks/.training/.
benchmarks/small/FAMILY/ gets the checkpoint in the official layout, training.json and training.png.

A digit says nothing without both of its summands: while no head attends to one of them, there is nothing to learn from
the other. So the first prompts are mostly zeros, where a sum mostly repeats the token before it, and little is masked.
Once the zeros are gone, more and more is masked; half of the rows are masked as in decoding, at the end of the answer.
"""

import dataclasses
import json
import math
import os
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dkv
import dkv.models
from benchmarks.harness import common, models, plots, running_sums
from benchmarks.harness.common import say
from benchmarks.harness.running_sums import ANSWER, LAG, LENGTH, MASK

STATES = common.ROOT / "benchmarks" / ".training"
SIZE = {"layers": 4, "heads": 4, "vocabulary": running_sums.VOCABULARY, "mask": MASK, "eos": running_sums.EOS}
# with a small theta, more of the 16 frequencies tell neighbours apart
ROPE = {"rope_theta": 10000.0}
CONFIGS = {
    "llada": models.llada(hidden=128, mlp=512, **SIZE) | ROPE,
    # a wider MLP uses what fewer key/value heads save
    "dream": models.dream(hidden=128, mlp=544, kv_heads=2, **SIZE) | ROPE,
}
# the options of `dkv.generate`
DECODING = {"llada": {"block_length": 32}, "dream": {}}
LEFT_TO_RIGHT = {"remasking": "random", "order": torch.arange(ANSWER)}
HELD_OUT = 1000
CURVE_POINTS = 200


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on, besides the model's config.

    Prompt digits are zeroed during the first `curriculum` steps, and all mask ratios occur after as many again. The
    committed records have these names.
    """

    steps: int = 2500
    batch: int = 32
    lr: float = 2e-3
    warmup: int = 100
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    curriculum: int = 400
    zeros: float = 0.8
    least_masked: float = 0.02
    first_most_masked: float = 0.3
    # share of the rows that are masked as in decoding, and the maximum share of decoded tokens in their masked ends
    shaped: float = 0.5
    decoded_ahead: float = 0.1
    seed: int = 0


def batch_of(recipe: Recipe, step: int) -> tuple[Tensor, Tensor]:
    """The problems of a step, (batch, 96) int64, and their masked tokens, bool: only tokens of the answers."""
    stream = running_sums.training_stream(recipe.seed, step)
    x = running_sums.problems(recipe.batch, stream, recipe.zeros * max(0, 1 - step / recipe.curriculum))

    def uniform(columns=1):
        return torch.rand(recipe.batch, columns, generator=stream)

    widened = min(1, max(0, step / recipe.curriculum - 1))
    max_masked = recipe.first_most_masked + (1 - recipe.first_most_masked) * widened
    scattered = uniform(LENGTH) < recipe.least_masked + (max_masked - recipe.least_masked) * uniform()

    column = torch.arange(LENGTH)
    decoded = torch.randint(LAG, LENGTH, (recipe.batch, 1), generator=stream)
    end = (column >= decoded) & (uniform(LENGTH) >= recipe.decoded_ahead * uniform())

    as_in_decoding = (uniform() < recipe.shaped) & (step >= recipe.curriculum)
    return x, torch.where(as_in_decoding, end, scattered) & (column >= LAG)


def loss_of(model: nn.Module, x: Tensor, masked: Tensor) -> Tensor:
    """Mean cross entropy of a row's masked tokens, averaged over the rows: LLaDA's weights 1/t, up to rounding."""
    logits = model(x.masked_fill(masked, MASK)).logits
    if isinstance(model, dkv.models.Dream):
        logits = logits.roll(1, dims=1)
    loss = F.cross_entropy(logits.transpose(1, 2), x, reduction="none") * masked
    return (loss.sum(1) / masked.sum(1).clamp(min=1)).mean()


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up times a cosine down to zero."""
    return recipe.lr * min(1, (step + 1) / recipe.warmup) * (1 + math.cos(math.pi * step / recipe.steps)) / 2


def train(
    config: models.Config,
    recipe: Recipe,
    folder: Path,
    *,
    save_every: int = 100,
    device: torch.device | str | None = None,
) -> tuple[nn.Module, list[float], float]:
    """Trains a model, from the state in `folder` if there is one; returns it with the losses and the seconds it took.

    Raises:
        ValueError: the state in the folder belongs to another recipe or config.
    """
    device = common.device() if device is None else device
    model = dkv.models.from_config(config, seed=recipe.seed, device=device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, betas=recipe.betas)
    made_with = {"config": config, "recipe": dataclasses.asdict(recipe)}
    losses, seconds, path = [], 0.0, folder / "state.pt"
    if path.exists():
        state = torch.load(path, map_location=device)
        if state["made_with"] != made_with:
            raise ValueError(
                f"{path} is the state of another training; remove it, or train with its {state['made_with']}."
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses, seconds = state["losses"], state["seconds"]
        say(f"continues from {path}, after {len(losses)} of {recipe.steps} steps")
    begin = time.monotonic() - seconds
    for step in common.progress(range(len(losses), recipe.steps), "steps"):
        x, masked = (tensor.to(device) for tensor in batch_of(recipe, step))
        loss = loss_of(model, x, masked)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % save_every == 0 or len(losses) == recipe.steps:
            seconds = time.monotonic() - begin
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "made_with": made_with}
            save(state | {"losses": losses, "seconds": seconds}, path)
            mean = statistics.fmean(losses[-save_every:])
            say(f"{len(losses)} steps, {seconds:.0f} s: mean loss of the last {save_every}: {mean:.4f}")
    return model.eval(), losses, seconds


def save(state: dict[str, Any], path: Path) -> None:
    """Writes a new file and renames it: an interrupt leaves the old state or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def accuracy(model: nn.Module, prompts: Tensor, **decoding: Any) -> dict[str, float]:
    """Shares of right answers and of right tokens without a cache, one token a step."""
    order = decoding.pop("order", None)
    found = []
    for part in common.progress(prompts.split(100), "batches"):
        part_order = None if order is None else order.to(model.device).expand(len(part), -1)
        output = dkv.generate(
            model, part.to(model.device), gen_length=ANSWER, policy=dkv.NoCache(), order=part_order, **decoding
        )
        found.append(running_sums.right(output.sequences))
    right = torch.cat(found)
    return {"exact_match": right.all(1).float().mean().item(), "token_accuracy": right.float().mean().item()}


def thinned(losses: list[float]) -> list[list[float]]:
    """At most `CURVE_POINTS` pairs of a step and the mean loss since the previous pair."""
    stride = math.ceil(len(losses) / CURVE_POINTS)
    parts = [losses[i : i + stride] for i in range(0, len(losses), stride)]
    return [[i * stride + len(part), statistics.fmean(part)] for i, part in enumerate(parts)]


def draw(record: dict[str, Any], path: Path) -> None:
    plt = plots.load_pyplot()
    if plt is None:
        return
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axis.plot(*zip(*record["loss_curve"], strict=True), color=plots.STYLES["ours"]["color"], linewidth=1.6)
    axis.axhline(math.log(10), color="#555555", linestyle=":", linewidth=1.2)
    axis.annotate("guessing: ln 10", (0, math.log(10)), xytext=(0, 3), textcoords="offset points", fontsize=9)
    curriculum = record["recipe"]["curriculum"]
    for step, text in ((curriculum, "no more zeroed digits,\nmasks widen"), (2 * curriculum, "all mask ratios")):
        axis.axvline(step, color="#1d6fa3", linewidth=0.8, alpha=0.6)
        axis.annotate(text, (step, 1), xytext=(4, -4), textcoords="offset points", va="top", fontsize=9)
    axis.set_ylim(0, None)
    axis.set_xlabel("step")
    axis.set_ylabel("cross entropy of masked tokens")
    axis.grid(True, alpha=0.3)
    exact = record["held_out"]["default"]["exact_match"]
    axis.set_title(
        f"{record['family']}, {record['parameters']:,} parameters: {exact:.1%} of {record['held_out']['problems']} "
        f"held-out answers right\n{record['device']}, {record['date'][:10]}",
        fontsize=11,
    )
    plots.save(figure, path)


def main() -> None:
    parser = common.argument_parser(__doc__)
    parser.add_argument("family", choices=CONFIGS)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; the last bits of the weights depend on them"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/small/FAMILY")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out = arguments.out or common.SMALL_MODELS / arguments.family
    recipe = Recipe(steps=arguments.steps, seed=arguments.seed)
    model, losses, seconds = train(CONFIGS[arguments.family], recipe, STATES / arguments.family)
    model.save_pretrained(out)
    say(f"{out} has the checkpoint; now {HELD_OUT} held-out problems, twice")
    prompts = running_sums.problems(HELD_OUT, running_sums.held_out_stream())[:, :LAG]
    decoding = DECODING[arguments.family]
    held_out = {
        "problems": HELD_OUT,
        "policy": "NoCache(), one token a step",
        "default": accuracy(model, prompts, **decoding),
        "left_to_right": accuracy(model, prompts, **decoding, **LEFT_TO_RIGHT),
    }
    environment = common.environment()
    record = {
        "family": arguments.family,
        "command": shlex.join(["python", "benchmarks/train_small.py", *sys.argv[1:]]),
        "seed": recipe.seed,
        "recipe": dataclasses.asdict(recipe) | {"optimizer": "Adam", "schedule": "linear warm-up, cosine to 0"},
        "data": running_sums.__doc__,
        "loss": loss_of.__doc__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{name: environment[name] for name in ("device", "threads", "torch", "python", "date")},
        "seconds": seconds,
        "held_out": held_out,
        "loss_curve": thinned(losses),
    }
    common.write_json(out / "training.json", record)
    draw(record, out / "training.png")
    say(json.dumps(common.rounded(held_out)))


if __name__ == "__main__":
    main()
