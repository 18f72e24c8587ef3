"""From hidden states to scored tokens: the remasking rules of LLaDA and Dream, and confidence-parallel decoding."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dkv.config import GenerateConfig
from dkv.kernels import reference
from dkv.kernels.noise import gumbel, noise_key, uniform
from dkv.kernels.rows import Counter
from dkv.models.view import ModelView
from dkv.schedule import Schedule
from dkv.state import State


@dataclass(frozen=True)
class Sampler:
    """Chooses tokens, and scores them by the remasking rule.

    Attributes:
        config: with remasking set.
        divides_logits: as in `dkv.models.view.Family`.
        excluded_ids: ids whose logits are -inf.
        unconfident_ids: ids that have the confidence -inf; all others are normalised without them.
    """

    config: GenerateConfig
    divides_logits: bool
    excluded_ids: tuple[int, ...]
    unconfident_ids: tuple[int, ...]

    @property
    def scales(self) -> tuple[float, float]:
        """The factors of the logits and of the noise."""
        temperature = self.config.temperature
        if temperature == 0:
            return 1.0, 0.0
        return (1 / temperature, 1.0) if self.divides_logits else (1.0, temperature)

    def row_options(self, batch: int, weight: Tensor) -> "RowOptions":
        """This sampler's options for each of `batch` rows, in at least float32 and on the device of weight."""
        dtype = torch.promote_types(weight.dtype, torch.float32)

        def of_rows(value):
            return None if value is None else torch.full((batch,), value, dtype=dtype, device=weight.device)

        scales = self.scales if self.config.temperature else (None, None)
        return RowOptions(*map(of_rows, (self.config.threshold, self.config.factor, *scales)))

    def predict(
        self,
        view: ModelView,
        hidden: Tensor,
        keys: Tensor | None,
        ops: Any,
        scales: tuple[Tensor | float, Tensor | float] | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens and their scores by the remasking rule; higher scores are committed first.

        Args:
            view: for its head.
            hidden: (rows, hidden_size), after the final norm.
            keys: (rows,) int64, the noise key of each row; None if the sampler is not noisy.
            ops: the operators of `dkv.kernels.direct`.
            scales: the factors of the logits and of the noise, each a float or (rows,), float32 or float64; None: the
                sampler's own.
            cu_seqlens: (batch + 1,) int32; rows from cu_seqlens[-1] on are padding; None: no padding.

        Returns:
            token (rows,) int64, score (rows,) float32 or float64. The score is NaN where the logits hold no answer, see
            `dkv.kernels.lm_head_confidence`.
        """
        logit_scale, noise_scale = self.scales if scales is None else scales
        keys = keys if self.config.temperature else None
        needs_logits = self.config.top_p is not None or self.config.top_k is not None or self.unconfident_ids
        if view.head_weight is not None and not needs_logits:
            found = ops.lm_head_confidence(
                hidden,
                view.head_weight,
                logit_scale=logit_scale,
                noise_scale=noise_scale,
                noise_key=keys,
                exclude_ids=self.excluded_ids,
                cu_seqlens=cu_seqlens,
            )
            return found.token, self.config.rule.score(found)
        rows = max(1, reference.LOGITS_AT_A_TIME // view.vocab_size)
        parts = []
        for start in range(0, max(len(hidden), 1), rows):
            own = [v[start : start + rows] if isinstance(v, Tensor) else v for v in (keys, logit_scale, noise_scale)]
            parts.append(self._predict_logits(view.logits(hidden[start : start + rows]), *own))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def _predict_logits(self, logits, keys, logit_scale, noise_scale):
        """`predict` from logits (rows, vocab), which may be changed in place."""
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if keys is not None:
            z = z * (logit_scale[:, None] if isinstance(logit_scale, Tensor) else logit_scale)
        for excluded in self.excluded_ids:
            z[:, excluded] = float("-inf")
        z = filter_top_k(filter_top_p(z, self.config.top_p), self.config.top_k)
        found = reference.confidence_of_logits(
            z, noise_scale=noise_scale, noise_key=keys, exclude_ids=self.excluded_ids
        )
        if not self.unconfident_ids:
            return found.token, self.config.rule.score(found)
        token, unanswered = found.token, found.log_prob.isnan()
        unconfident = torch.zeros_like(unanswered)
        for i in self.unconfident_ids:
            unconfident |= token == i
            z[:, i] = float("-inf")
        found = reference.confidence_of_logits(z)
        best = z.gather(1, found.token[:, None])[:, 0]
        found = found._replace(log_prob=found.log_prob + (z.gather(1, token[:, None])[:, 0] - best))
        score = self.config.rule.score(found).masked_fill(unconfident, float("-inf"))
        return token, score.masked_fill(unanswered, float("nan"))

    def ranking(self, score: Tensor, keys: Tensor | None) -> Tensor:
        """The scores that decide the commits: as probabilities for threshold and factor, with noise for alg_temp."""
        config = self.config
        if config.by_probability:
            return config.rule.probability(score)
        return score / config.alg_temp + gumbel(keys).to(score.dtype) if config.alg_temp > 0 else score

    def priority(self, state: State, order: Tensor | None) -> Tensor:
        """(batch, seqlen) float64 for the ordered rules: positions of higher priority are decoded first.

        order: (batch, gen_length) int64, the user's; None: a random one.
        """
        if order is not None:
            columns = order + state.first_generated
            ranks = torch.arange(order.shape[1], device=order.device, dtype=torch.float64).expand(order.shape)
            return torch.zeros(state.x.shape, dtype=torch.float64, device=order.device).scatter(1, columns, -ranks)
        seed, request = state.counters[:, Counter.SEED, None], state.counters[:, Counter.REQUEST, None]
        # from the position within the row, so that padding does not change the draw
        return uniform(noise_key(seed, request, torch.full_like(seed, -1), state.columns - state.first_column))


@dataclass(frozen=True)
class RowOptions:
    """The options of each row of a batch; tensors are float32 or float64, on the model's device.

    Attributes:
        threshold, factor: (batch,) or None.
        logit_scale, noise_scale: (batch,); None if no noise is drawn.
    """

    threshold: Tensor | None
    factor: Tensor | None
    logit_scale: Tensor | None
    noise_scale: Tensor | None


def write_order(
    sampler: Sampler, schedule: Schedule, state: State, order: Tensor | None, prompt_masks: list[int]
) -> None:
    """Writes into the state, at the start of a run, the rank of each mask in its block and the step that decodes it.

    Args:
        sampler: with an ordered rule.
        order: as in `Sampler.priority`.
        prompt_masks: the masks inside the prompt of each row.
    """
    priority, masked = sampler.priority(state, order), state.masked
    # masks inside the prompt belong to the first block
    block = (state.columns - state.first_generated).clamp(min=0) // state.counters[:, Counter.BLOCK_LENGTH, None]
    by_priority = priority.argsort(dim=1, descending=True, stable=True)
    in_order = torch.where(masked, block, len(schedule.lengths)).gather(1, by_priority).argsort(dim=1, stable=True)
    place = torch.empty_like(block).scatter_(1, by_priority.gather(1, in_order), state.columns.expand_as(block))
    commits, (_, times) = schedule.commits(prompt_masks).to(block.device), schedule.table(prompt_masks)
    ends = commits.sum(-1).cumsum(-1)
    block.clamp_(max=len(schedule.lengths) - 1)
    state.rank.copy_(place - (ends - commits.sum(-1)).gather(1, block))
    state.due.zero_()
    decoded, remaining = commits.cumsum(-1), times[..., 1:].to(block.device).expand(commits.shape)
    for step in range(commits.shape[-1]):
        if sampler.config.remasking == "origin":
            state.due.add_(priority < remaining[..., step].gather(1, block))
        else:
            state.due.add_(state.rank >= decoded[..., step].gather(1, block))


def filter_top_p(z: Tensor, top_p: float | None) -> Tensor:
    """-inf except for the smallest set of most likely ids whose probability exceeds top_p."""
    if top_p is None or top_p >= 1:
        return z
    values, ids = z.sort(dim=-1, descending=True)
    before = values.softmax(-1).cumsum(-1) - values.softmax(-1)
    return z.masked_fill((before > top_p).scatter(1, ids, before > top_p), float("-inf"))


def filter_top_k(z: Tensor, top_k: int | None) -> Tensor:
    """-inf except for the top_k largest (and any that equal the last of these)."""
    if top_k is None or top_k >= z.shape[1]:
        return z
    return z.masked_fill(z < z.topk(top_k).values[:, -1:], float("-inf"))
