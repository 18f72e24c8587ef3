"""The recorded trajectories of `tests/data/oracle`, `dkv.generate` on their cases, and the comparison of both."""

import functools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import dkv

DATA = Path(__file__).parent / "data" / "oracle"
MASK_ID = 255


@functools.cache
def cases(family):
    """The cases of "llada" or "dream" that do not depend on a random stream, on a bug or on a near-tie, by name."""
    listed = json.loads((DATA / f"{family}_trajectories.json").read_text())["cases"]
    return {c["name"]: c for c in listed if not (c.get("rng") or c["official_bug"] or c["fragile"])}


@functools.cache
def tensors(family):
    return load_file(DATA / f"{family}_trajectories.safetensors")


def recorded(family, name, field):
    """One tensor of a case as int64, bool for masks, or None."""
    tensor = tensors(family).get(f"{name}.{field}")
    if tensor is None or tensor.is_floating_point():
        return tensor
    return tensor.bool() if field in ("computed_mask", "attention_mask") else tensor.long()


def weights_path(name):
    return DATA / "weights" / name


@functools.cache
def model(name, device, dtype=torch.float32):
    return dkv.from_pretrained(weights_path(name), dtype=dtype, device=device)


def policy(case):
    """The policy of a case."""
    interval, shift = case.get("interval"), case.get("shift_type")
    return {
        "vanilla": lambda: dkv.NoCache(),
        "dkv-decode": lambda: dkv.Decode(interval),
        "dkv-greedy": lambda: dkv.Greedy(interval, case["window"]),
        "dkv-decoded": lambda: dkv.Decode(interval, shift=shift),
        "dkv-prefill": lambda: dkv.Prefill(),
        "dkv-pd": lambda: dkv.PrefillDecode(interval, shift=shift),
    }[case["kind"]]()


def run(family, name, device, *, dtype=torch.float32, **options):
    """`dkv.generate` as in a case, with its history."""
    case = cases(family)[name]
    prompt = recorded(family, name, "prompt").to(device)
    if family == "llada":
        options |= {"gen_length": case["gen_length"], "block_length": case["block_length"]}
        if case["kind"] == "dkv-greedy":
            blocks = range(case["gen_length"] // case["block_length"])
            orders = [recorded(family, name, f"order{block}")[:, : case["block_length"]] for block in blocks]
            options |= {"remasking": "random", "order": torch.cat(orders, dim=1) - prompt.shape[1]}
    else:
        options |= {"gen_length": case["max_new_tokens"], "remasking": case["alg"], "top_k": case["top_k"]}
        mask = recorded(family, name, "attention_mask")
        options |= {"attention_mask": None if mask is None else mask.to(device), "eps": case["eps"]}
    return dkv.generate(
        model(case["weights"], device, dtype),
        prompt,
        steps=case["steps"],
        policy=policy(case),
        output_history=True,
        **options,
    )


def assert_same_trajectory(family, name, xs, actives, first_steps=None):
    """Tokens after every step and computed positions of every step (or of the first ones), padding aside."""
    want_x, want_active = recorded(family, name, "x"), recorded(family, name, "computed_mask")
    real = recorded(family, name, "attention_mask")
    if real is not None:
        generated = torch.ones(real.shape[0], want_x.shape[2] - real.shape[1], dtype=torch.bool)
        want_active = want_active & torch.cat((real, generated), dim=1)
    assert len(xs) == (first_steps or len(want_x))
    for step, (x, active) in enumerate(zip(xs, actives, strict=True)):
        assert torch.equal(active.cpu(), want_active[step]), f"{name}: other positions are computed at step {step}"
        assert torch.equal(x.cpu(), want_x[step]), f"{name}: other tokens after step {step}"
