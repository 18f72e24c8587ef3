"""`dkv.generate` against the authors' own code: tokens after every step, and which positions every step recomputes."""

import functools

import oracle
import pytest
import torch
from utils import thinned

import dkv


@functools.cache
def model(name, device):
    return dkv.from_pretrained(oracle.weights_path(name), dtype=torch.float32, device=device)


def policy(case):
    interval, shift = case.get("interval"), case.get("shift_type")
    return {
        "vanilla": lambda: dkv.NoCache(),
        "dkv-decode": lambda: dkv.Decode(interval),
        "dkv-greedy": lambda: dkv.Greedy(interval, case["window"]),
        "dkv-decoded": lambda: dkv.Decode(interval, shift=shift),
        "dkv-prefill": lambda: dkv.Prefill(),
        "dkv-pd": lambda: dkv.PrefillDecode(interval, shift=shift),
    }[case["kind"]]()


def run(family, name, device, **options):
    case = oracle.cases(family)[name]
    prompt = oracle.recorded(family, name, "prompt").to(device)
    if family == "llada":
        options |= {"gen_length": case["gen_length"], "block_length": case["block_length"]}
        if case["kind"] == "dkv-greedy":
            blocks = range(case["gen_length"] // case["block_length"])
            orders = [oracle.recorded(family, name, f"order{block}")[:, : case["block_length"]] for block in blocks]
            options |= {"remasking": "random", "order": torch.cat(orders, dim=1) - prompt.shape[1]}
    else:
        options |= {"gen_length": case["max_new_tokens"], "remasking": case["alg"], "top_k": case["top_k"]}
        mask = oracle.recorded(family, name, "attention_mask")
        options |= {"attention_mask": None if mask is None else mask.to(device), "eps": case["eps"]}
    return dkv.generate(
        model(case["weights"], device),
        prompt,
        steps=case["steps"],
        policy=policy(case),
        output_history=True,
        **options,
    )


# a name says weights, batch, lengths, steps, rules and policy, with dots between them
@pytest.mark.parametrize(
    "family, name",
    thinned(
        [(family, name) for family in ("llada", "dream") for name in oracle.cases(family)],
        lambda case: [case[0], *case[1].split(".")],
    ),
)
def test_trajectory(family, name, device):
    output = run(family, name, device)
    oracle.assert_same_trajectory(family, name, output.history, output.active)
    assert torch.equal(output.history[-1], output.sequences)
