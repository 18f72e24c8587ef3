"""From hidden states to scored tokens: the remasking rules of LLaDA and Dream, and confidence-parallel decoding."""

import itertools
from dataclasses import dataclass

import torch

from dkv.kernels import lm_head_confidence, reference
from dkv.kernels.noise import gumbel, noise_key, uniform
from dkv.kernels.reference import LOGITS_AT_A_TIME

ORDERED = ("random", "origin")  # what a step decodes is known before its outputs
BY_PROBABILITY = ("low_confidence", "maskgit_plus", "topk_margin")
RULES = ("low_confidence", "random", "entropy", "topk_margin", "maskgit_plus", "origin")


@dataclass(frozen=True)
class Sampler:
    """How tokens are chosen and which of them are committed; the arguments of `dkv.generate` of the same names.

    Attributes:
        divides_logits: as in `Family`.
        excluded_ids: their logits are -inf.
        unconfident_ids: a token among them has the confidence -inf, and the others are normalised without them.
    """

    remasking: str
    temperature: float
    top_p: float | None
    top_k: int | None
    alg_temp: float
    threshold: float | None
    factor: float | None
    divides_logits: bool
    excluded_ids: tuple[int, ...]
    unconfident_ids: tuple[int, ...]

    @property
    def ordered(self):
        return self.remasking in ORDERED

    @property
    def by_probability(self):
        """Whether confidences, not a count, decide how many tokens are committed."""
        return self.threshold is not None or self.factor is not None

    @property
    def noisy(self):
        """Whether noise keys are needed."""
        return self.temperature > 0 or self.alg_temp > 0

    @property
    def _scales(self):
        """What logits and noise are multiplied by."""
        if self.temperature == 0:
            return 1.0, 0.0
        return (1 / self.temperature, 1.0) if self.divides_logits else (1.0, self.temperature)

    def predict(self, decoder, hidden, keys, impl):
        """Tokens and their scores by the remasking rule; higher is committed first.

        Args:
            decoder: `dkv.decoder.Decoder`, for its head.
            hidden: (rows, hidden_size), after the final norm.
            keys: (rows,) int64, the noise key of each row; None where the sampler is not noisy.
            impl: as in `dkv.kernels`.

        Returns:
            token (rows,) int64, score (rows,) float32 or float64.
        """
        logit_scale, noise_scale = self._scales
        keys = keys if noise_scale else None
        if decoder.head_weight is not None and self.top_p is None and self.top_k is None and not self.unconfident_ids:
            found = lm_head_confidence(
                hidden,
                decoder.head_weight,
                logit_scale=logit_scale,
                noise_scale=noise_scale,
                noise_key=keys,
                exclude_ids=self.excluded_ids,
                impl=impl,
            )
            return found.token, self._score(found)
        rows = max(1, LOGITS_AT_A_TIME // decoder.vocab_size)
        chunks = zip(hidden.split(rows), itertools.repeat(None) if keys is None else keys.split(rows), strict=False)
        parts = [self._predict_logits(decoder.logits(h), k) for h, k in chunks]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def _predict_logits(self, logits, keys):
        """The same from logits (rows, vocab), which may be changed."""
        logit_scale, noise_scale = self._scales
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        z = z if logit_scale == 1 else z * logit_scale
        for excluded in self.excluded_ids:
            z[:, excluded] = float("-inf")
        z = filter_top_k(filter_top_p(z, self.top_p), self.top_k)
        found = reference.confidence_of_logits(z, noise_scale=noise_scale, noise_key=keys)
        if not self.unconfident_ids:
            return found.token, self._score(found)
        token, unconfident = found.token, torch.zeros_like(found.token, dtype=torch.bool)
        for i in self.unconfident_ids:
            unconfident |= token == i
            z[:, i] = float("-inf")
        found = reference.confidence_of_logits(z)
        best = z.gather(1, found.token[:, None])[:, 0]
        found = found._replace(log_prob=found.log_prob + (z.gather(1, token[:, None])[:, 0] - best))
        return token, self._score(found).masked_fill(unconfident, float("-inf"))

    def _score(self, found):
        if self.remasking == "entropy":
            return -found.entropy
        return found.margin if self.remasking == "topk_margin" else found.log_prob

    def ranking(self, score, keys):
        """What decides the commits: probabilities for threshold and factor, else the score, with noise for alg_temp."""
        if self.by_probability:
            return score if self.remasking == "topk_margin" else score.exp()
        return score / self.alg_temp + gumbel(keys).to(score.dtype) if self.alg_temp > 0 else score

    def priority(self, state, order, seed):
        """(batch, seqlen) float64: positions of higher priority are decoded first, for the ordered rules.

        order: (batch, gen_length) int64 or None: the order given by the user; seed: () int64.
        """
        if order is not None:
            columns = order + state.first_generated
            ranks = torch.arange(order.shape[1], device=order.device, dtype=torch.float64).expand(order.shape)
            return torch.zeros(state.x.shape, dtype=torch.float64, device=order.device).scatter(1, columns, -ranks)
        rows = torch.arange(state.x.shape[0], device=state.x.device)[:, None]
        # the position within the row, so that padding does not change the draw
        return uniform(noise_key(seed, rows, torch.full_like(rows, -1), state.columns - state.first_column))


def descending_ranks(score):
    """(batch, seqlen) int64: 0 for the largest of the row; ties in order of columns."""
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def filter_top_p(z, top_p):
    """-inf but for the smallest set of most likely ids whose probability passes top_p."""
    if top_p is None or top_p >= 1:
        return z
    values, ids = z.sort(dim=-1, descending=True)
    before = values.softmax(-1).cumsum(-1) - values.softmax(-1)
    return z.masked_fill((before > top_p).scatter(1, ids, before > top_p), float("-inf"))


def filter_top_k(z, top_k):
    """-inf but for the top_k largest (and those equal to the last of them)."""
    if top_k is None or top_k >= z.shape[1]:
        return z
    return z.masked_fill(z < z.topk(top_k).values[:, -1:], float("-inf"))
