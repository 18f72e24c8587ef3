"""The batch of a tokenizer as input of `generate`, and hints for the names of other libraries."""

import inspect
import re

import pytest
import torch
from tiny import model, prompts
from transformers import BatchEncoding

import dkv
from dkv.generation import prepare
from dkv.inputs import HINTS
from dkv.policy import POLICIES

IDS, REAL = prompts(6, 4)
BATCH = {"input_ids": IDS, "attention_mask": REAL.long(), "token_type_ids": torch.zeros_like(IDS)}
OPTIONS = {"gen_length": 2, "policy": dkv.NoCache()}


@pytest.fixture(scope="module")
def want():
    sequences = dkv.generate(model("llada"), IDS, REAL, **OPTIONS).sequences
    unmasked = dkv.generate(model("llada"), IDS, torch.ones_like(IDS), **OPTIONS).sequences
    assert not torch.equal(sequences, unmasked), "the mask makes no difference here"
    return sequences


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_the_batch_of_a_tokenizer(kind, want):
    """Whole, as keywords and without the mask; in `prepare` too."""
    batch, llm = kind(BATCH), model("llada")
    assert torch.equal(dkv.generate(llm, batch, **OPTIONS).sequences, want)
    assert torch.equal(dkv.generate(llm, **batch, **OPTIONS).sequences, want)
    assert dict(batch) == BATCH, "the batch has changed"
    for mask in ({}, {"attention_mask": None}):
        ids_only = kind({"input_ids": IDS} | mask)
        assert torch.equal(dkv.generate(llm, ids_only, REAL, **OPTIONS).sequences, want)
    with prepare(llm, batch, **OPTIONS) as run, prepare(llm, **batch, **OPTIONS) as other:
        for each in (run, other):
            while each.running():
                each.step()
            assert torch.equal(each.finish()[0], want)


@pytest.mark.parametrize(
    "batch, error, message",
    [
        (BATCH | {"labels": IDS}, ValueError, "must hold nothing but .*, got 'labels'; leave it out"),
        ({"inputs": IDS}, ValueError, r"must hold 'input_ids', got \['inputs'\]"),
        ({"input_ids": IDS.tolist()}, TypeError, 'tensor, got list; pass .* or return_tensors="pt" to the tokenizer'),
        ({"input_ids": IDS[0]}, ValueError, r"got \(6,\); pass input_ids\[None\]"),
    ],
    ids=["another key", "no input_ids", "lists", "one dimension"],
)
@pytest.mark.parametrize("call", [dkv.generate, prepare])
def test_unsuitable_batches(call, batch, error, message):
    with pytest.raises(error, match=message):
        call(model("llada"), batch)


@pytest.mark.parametrize("call", [dkv.generate, prepare])
def test_two_attention_masks(call):
    with pytest.raises(ValueError, match="attention_mask must be given once, got it in the mapping and as an argument"):
        call(model("llada"), BATCH, REAL)


@pytest.mark.parametrize("call", [dkv.generate, prepare])
@pytest.mark.parametrize(
    "name, hint",
    [
        ("alg", "pass remasking"),
        ("genlength", "correct its name or leave it out"),
    ],
)
def test_a_wrong_name_is_answered_by_the_right_one(call, name, hint):
    with pytest.raises(TypeError) as found:
        call(model("llada"), IDS, **{name: 1})
    assert str(found.value) == f"got an unexpected keyword argument {name!r}; {hint}."


def test_every_hint_leads_to_something_that_exists():
    """It is for a name that `generate` does not have, and says which option to pass, with which policy, or none."""
    options = inspect.signature(dkv.generate).parameters.keys()
    for name, hint in HINTS.items():
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'; {re.escape(hint)}\\.$"):
            dkv.generate(model("llada"), IDS, **{name: 1})
        assert options & set(re.findall(r"\w+", hint)) or hint.startswith("leave it out; "), name
        assert set(re.findall(r"'(\w+)'", hint)) <= POLICIES.keys(), name
