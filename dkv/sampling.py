"""From logits to committed tokens: the remasking rules of LLaDA and Dream, and confidence-parallel decoding."""

from dataclasses import dataclass

import torch

from dkv.noise import gumbel, noise_key, uniform

ORDERED = ("random", "origin")  # what a step decodes is known before its outputs
BY_PROBABILITY = ("low_confidence", "maskgit_plus", "topk_margin")
RULES = ("low_confidence", "random", "entropy", "topk_margin", "maskgit_plus", "origin")
CHUNK_ELEMENTS = 2**22  # logits at a time: 16 MiB of float32
NEGLIGIBLE = -1e4  # a logit so far below the largest counts nothing


@dataclass(frozen=True)
class Sampler:
    """How tokens are chosen and which of them are committed; the arguments of `dkv.generate` of the same names.

    Attributes:
        seed: int, of the noise.
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
    seed: int
    divides_logits: bool
    excluded_ids: tuple[int, ...]
    unconfident_ids: tuple[int, ...]

    @property
    def ordered(self):
        return self.remasking in ORDERED

    def predict(self, logits, keys):
        """Tokens and their scores by the remasking rule; higher is committed first.

        Args:
            logits: (rows, vocab), any float dtype.
            keys: (rows,) int64, the noise key of each row; None without temperature.

        Returns:
            token (rows,) int64, score (rows,) float32 or float64.
        """
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        for excluded in self.excluded_ids:
            z[:, excluded] = float("-inf")
        if self.temperature > 0 and self.divides_logits:
            z = z / self.temperature
        z = filter_top_k(filter_top_p(z, self.top_p), self.top_k)
        top, best = z.max(-1)
        token = best
        if self.temperature > 0:
            ids = torch.arange(z.shape[1], device=z.device)
            noise = gumbel(noise_key(0, keys[:, None], ids[None]))
            token = (z + (1.0 if self.divides_logits else self.temperature) * noise).argmax(-1)
        if not self.unconfident_ids:
            return token, self._score(z, token, top, best)
        unconfident = torch.zeros_like(token, dtype=torch.bool)
        for i in self.unconfident_ids:
            unconfident |= token == i
            z[:, i] = float("-inf")
        score = self._score(z, token, *z.max(-1))
        return token, score.masked_fill(unconfident, float("-inf"))

    def _score(self, z, token, top, best):
        if self.remasking == "topk_margin":
            two = z.softmax(-1).topk(2).values
            return two[:, 0] - two[:, 1]
        # relative to the largest, whose own term is exact: keeps the rank order of very confident rows, where a plain
        # softmax would tie at 1
        shifted = (z - top[:, None]).clamp_(min=NEGLIGIBLE)
        weights = shifted.exp()
        others = weights.scatter(1, best[:, None], 0.0).sum(-1)
        if self.remasking == "entropy":
            mean = torch.bmm(weights[:, None], shifted[:, :, None])[:, 0, 0] / (1 + others)
            return mean - others.log1p()
        return z.gather(1, token[:, None])[:, 0] - top - others.log1p()

    @property
    def noisy(self):
        """Whether noise keys are needed."""
        return self.temperature > 0 or self.alg_temp > 0

    def probability(self, score):
        """What threshold and factor are compared with."""
        return score if self.remasking == "topk_margin" else score.exp()

    def priority(self, state, order):
        """(batch, seqlen) float64: positions of higher priority are decoded first, for the ordered rules.

        order: (batch, gen_length) int64 or None: the order given by the user.
        """
        if order is not None:
            columns = order + state.first_generated
            ranks = torch.arange(order.shape[1], device=order.device, dtype=torch.float64).expand(order.shape)
            return torch.zeros(state.x.shape, dtype=torch.float64, device=order.device).scatter(1, columns, -ranks)
        rows = torch.arange(state.x.shape[0], device=state.x.device)[:, None]
        # the position within the row, so that padding does not change the draw
        return uniform(noise_key(self.seed, rows, torch.full_like(rows, -1), state.columns - state.first_column))

    def choose(self, score, candidates, counts, keys=None):
        """(batch, seqlen) bool: which candidates are committed.

        Args:
            score: (batch, seqlen) float.
            candidates: (batch, seqlen) bool.
            counts: (batch, 1) int64, how many to commit (fixed steps).
            keys: (batch, seqlen) int64 noise keys, for alg_temp > 0.
        """
        if self.alg_temp > 0:
            score = score / self.alg_temp + gumbel(keys)
        lowest = torch.finfo(score.dtype).min
        score = torch.where(candidates, score.clamp(min=lowest), float("-inf"))
        ranks = descending_ranks(score)
        if self.threshold is not None:
            chosen = (self.probability(score) >= self.threshold) | (ranks == 0)
        elif self.factor is not None:
            # the n-th most confident needs 1 - factor / (n + 1), and all before it theirs; the first needs nothing
            enough = (self.probability(score) >= 1 - self.factor / (ranks + 2)) | (ranks == 0)
            first_short = torch.where(enough, ranks.shape[1], ranks).amin(1, keepdim=True)
            chosen = ranks < first_short
        else:
            chosen = ranks < counts
        return chosen & candidates


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
