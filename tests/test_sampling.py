"""`Sampler`: tokens and scores of the remasking rules, on logits that are given."""

import typing
from types import SimpleNamespace

import pytest
import torch
from tiny import FAMILIES, IdentityHead
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dkv
from dkv.config import RULES, Remasking
from dkv.kernels import reference
from dkv.kernels.reference import LOGITS_AT_A_TIME
from dkv.sampling import Sampler, filter_top_k, filter_top_p


def predict(logits, keys=None, *, fused=False, divides_logits=False, excluded_ids=(), unconfident_ids=(), **options):
    """Tokens and scores of a `Sampler` for logits (rows, vocab)."""
    config = dkv.GenerateConfig(**{"remasking": "low_confidence"} | options)
    sampler = Sampler(config, divides_logits, excluded_ids, unconfident_ids)
    return sampler.predict(IdentityHead(logits.shape[1], fused), logits, keys, reference)


def test_every_rule_has_a_name():
    assert set(RULES) == set(typing.get_args(Remasking))


def test_unconfident_ids_are_committed_last():
    logits = torch.tensor([[0.0, 1.0, 2.0, 9.0], [3.0, 1.0, 2.0, 2.0]])
    token, score = predict(logits, unconfident_ids=(3,))
    assert token.tolist() == [3, 0] and score[0] == float("-inf")
    torch.testing.assert_close(score[1], logits[1, :3].log_softmax(-1)[0])


@pytest.mark.parametrize("rule", RULES)
def test_unconfident_ids_are_last_under_every_rule(rule):
    """Also where nothing else is left: the score is -inf, never NaN."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 9.0], [3.0, 1.0, 2.0, 2.0]])
    token, score = predict(logits, remasking=rule, top_k=1, unconfident_ids=(3,))
    assert token.tolist() == [3, 0] and score[0] == float("-inf") and score[1].isfinite()


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "temperature": 0.7}, {"unconfident_ids": (3,)}], ids=str)
def test_a_step_without_candidates(options):
    token, score = predict(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64), **options)
    assert token.shape == score.shape == (0,) and token.dtype == torch.int64 and score.dtype == torch.float32


@pytest.mark.parametrize("fused", [False, True])
def test_confident_rows_keep_their_order(fused):
    """Where a float32 softmax ties at 1, the scores still rank."""
    logits = torch.zeros(3, 50)
    logits[:, 7] = torch.tensor([40.0, 60.0, 50.0])
    _, score = predict(logits, fused=fused)
    assert (logits.softmax(-1)[:, 7] == 1).all() and score.argsort(descending=True).tolist() == [1, 2, 0]


@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("fused", [False, True])
def test_scores_by_their_formulas(scale, fused):
    """Each rule's score in float32 against float64 formulas; -inf logits count nothing."""
    z = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)) * scale
    kept = z.double()
    kept[:, 7] = float("-inf")
    probs = kept.softmax(-1)
    top = probs.topk(2).values
    expected = {
        "entropy": (probs * (probs + 1e-300).log()).sum(-1),
        "low_confidence": top[:, 0].log(),
        "maskgit_plus": top[:, 0].log(),
        "topk_margin": top[:, 0] - top[:, 1],
    }
    for rule, want in expected.items():
        token, score = predict(z, fused=fused, remasking=rule, excluded_ids=(7,))
        assert torch.equal(token, kept.argmax(-1))
        torch.testing.assert_close(score.double(), want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("divides_logits", [False, True], ids=FAMILIES)
@pytest.mark.parametrize("fused", [False, True])
def test_sampled_tokens_follow_the_distribution(divides_logits, fused):
    """40,000 draws at temperature 0.7 against softmax(z / 0.7), within 5 standard errors."""
    logits = torch.tensor([1.0, 5.0, 0.5, -1.0, 0.0])
    draws, top_k = 40_000, None if fused else 3
    token, _ = predict(
        logits.repeat(draws, 1),
        torch.arange(draws) * 7919,
        fused=fused,
        remasking="maskgit_plus",
        temperature=0.7,
        top_k=top_k,
        divides_logits=divides_logits,
        excluded_ids=(1,),
    )
    kept = torch.tensor([1.0, float("-inf"), 0.5, -1.0 if fused else float("-inf"), 0.0])
    expected = (kept / 0.7).softmax(-1)
    frequency = torch.bincount(token, minlength=5) / draws
    assert ((frequency - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-12).all()


def test_top_p_keeps_the_token_that_passes_it():
    z = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert filter_top_p(z, 0.6).isfinite().tolist() == [[True, True, False, False]]
    assert filter_top_p(z, 0.01).isfinite().tolist() == [[True, False, False, False]]
    assert filter_top_p(z, 1.0).isfinite().all()
    assert filter_top_k(z, 3).isfinite().tolist() == [[True, True, True, False]]
    assert filter_top_k(z, 9).isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_sampling_holds_a_bounded_number_of_logits(temperature):
    """(rows, vocab) would be 32 million: no tensor that is made is larger than what is allowed at a time."""
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t is not weight]
            largest = max([largest, *(t.numel() for t in made)])
            return result

    hidden, weight = torch.randn(512, 4), torch.randn(65536, 4)
    config = dkv.GenerateConfig(remasking="low_confidence", temperature=temperature)
    sampler = Sampler(config, divides_logits=True, excluded_ids=(3,), unconfident_ids=())
    with Largest():
        token, _ = sampler.predict(SimpleNamespace(head_weight=weight), hidden, torch.arange(512), reference)
    assert token.shape == (512,) and largest <= LOGITS_AT_A_TIME
