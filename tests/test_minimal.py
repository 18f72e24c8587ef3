"""`examples/minimal.py` decodes LLaDA and Dream token for token as the dKV-Cache authors' code.

It uses the kernels and nothing else of dkv, so this tests their contract by use.
"""

import itertools

import oracle
import pytest
import torch
import torch.nn.functional as F
from utils import example, thinned

minimal = example("minimal")
FOLDERS = {"llada": "llada_mha_s0", "dream": "dream_gqa_s0"}


def steps_of(family, name, impl, device):
    """Iterates over (x, active) of the steps of a recorded case."""
    case, prompt = oracle.cases(family)[name], oracle.recorded(family, name, "prompt").to(device)
    gen_length = case["gen_length"] if family == "llada" else case["max_new_tokens"]
    x = F.pad(prompt, (0, gen_length), value=oracle.MASK_ID)
    valid = torch.ones_like(x, dtype=torch.bool)
    attention_mask = oracle.recorded(family, name, "attention_mask")
    if attention_mask is not None:
        valid[:, : prompt.shape[1]] = attention_mask
    model = minimal.CachedModel(oracle.weights_path(FOLDERS[family]), valid.int().argmax(1), x.shape[1], impl=impl)
    options = {"steps": case["steps"], "refresh_interval": case.get("interval") or 1}
    if family == "llada":
        return minimal.decode_llada(model, x, gen_length=gen_length, block_length=case["block_length"], **options)
    shift = case.get("shift_type") or "un_right"  # none was recorded without a cache
    return minimal.decode_dream(model, x, remasking=case["alg"], shift=shift, eps=case["eps"], **options)


@torch.no_grad()
def check(family, name, impl, device, first_steps=None):
    steps = itertools.islice(steps_of(family, name, impl, device), first_steps)
    oracle.assert_same_trajectory(family, name, *zip(*steps, strict=True), first_steps)


def names(family, *kinds):
    chosen = [name for name, case in oracle.cases(family).items() if case["kind"] in kinds]
    chosen = [(name,) for name in chosen if not name.endswith("topk50")]
    return thinned(chosen, lambda case: case[0].split("."))


@pytest.mark.parametrize("name", names("llada", "vanilla", "dkv-decode"))
def test_llada(name, device):
    check("llada", name, "auto", device)


@pytest.mark.parametrize("name", names("dream", "vanilla", "dkv-decoded"))
def test_dream(name, device):
    check("dream", name, "auto", device)


# in the interpreter a step takes a third of a second: two full and two cached ones, then the next block or refresh
@pytest.mark.parametrize(
    "family, name",
    [
        ("llada", "w0.B1.g24.b8.s12.decode.i4"),
        ("dream", "w0.B1.g24.s12.topk_margin.decoded.un_right.i4"),
        ("dream", "w0.B2p.g24.s12.topk_margin.decoded.un.i4"),
    ],
)
def test_on_the_kernels(family, name, device):
    check(family, name, "triton", device, first_steps=None if device == "cuda" else 5)


def test_the_script_solves_its_sums(capsys):
    minimal.main()
    assert capsys.readouterr().out.count("8 of 8 answers are right") == 2
