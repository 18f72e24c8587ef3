"""`dkv.generate`: the denoising loop of LLaDA and Dream over a delayed cache."""

import dataclasses
import itertools
from dataclasses import dataclass

import torch

from dkv.decoder import find_decoder
from dkv.engine import active_positions, packed_rows
from dkv.inputs import checked_order, count, eos_ids_of, fraction, left_padded, token_id
from dkv.kernels.checks import IMPLS
from dkv.noise import noise_key
from dkv.policy import Decode, Policy
from dkv.sampling import BY_PROBABILITY, CHUNK_ELEMENTS, ORDERED, RULES, Sampler, descending_ranks
from dkv.schedule import Schedule
from dkv.state import State


@dataclass
class GenerateStats:
    """What a run did.

    Attributes:
        steps: denoising steps.
        forward_passes: passes of a sequence batch through the model: one a step, two with guidance.
        recomputed_tokens: positions put through the model, over all steps and rows.
        cache_ratio: the mean share of positions read from the cache instead.
        peak_cache_bytes: bytes of the K/V cache.
    """

    steps: int = 0
    forward_passes: int = 0
    recomputed_tokens: int = 0
    cache_ratio: float = 0.0
    peak_cache_bytes: int = 0


@dataclass
class GenerateOutput:
    """The result of `generate`.

    Attributes:
        sequences: (batch, seqlen) int64, prompts (left-padded) and generated tokens.
        stats: `GenerateStats`.
        history: (steps, batch, seqlen) int64, the sequence after every step, or None.
        active: (steps, batch, seqlen) bool, the positions recomputed at every step, or None.
    """

    sequences: torch.Tensor
    stats: GenerateStats
    history: torch.Tensor | None = None
    active: torch.Tensor | None = None


@torch.no_grad()
def generate(
    model,
    input_ids,
    attention_mask=None,
    *,
    gen_length=128,
    steps=None,
    block_length=None,
    policy=None,
    remasking=None,
    temperature=0.0,
    top_p=None,
    top_k=None,
    alg_temp=0.0,
    eps=1e-3,
    cfg_scale=0.0,
    threshold=None,
    factor=None,
    logits_eos_inf=False,
    confidence_eos_eot_inf=False,
    eos_early_stop=False,
    eos_token_id=None,
    mask_id=None,
    order=None,
    generator=None,
    impl="auto",
    cuda_graphs=True,
    output_history=False,
    show_progress=False,
):
    """Generates `gen_length` tokens after each prompt by iterative unmasking, over a delayed K/V cache.

    The model is not changed. Mask tokens inside a prompt are filled in with the first block.

    Args:
        model: a model of `dkv.from_pretrained`, or Hugging Face's remote-code LLaDA or Dream, in eval mode.
        input_ids: (batch, prompt_length) int64 on the model's device.
        attention_mask: (batch, prompt_length) bool or 0/1, zeros on one side of a row only. None: no padding.
        gen_length: tokens to generate.
        steps: denoising steps; None: gen_length. Every block gets one, and the others in proportion to its length.
        block_length: blocks are decoded from left to right; the last one may be shorter. None: one block.
        policy: which positions are recomputed, see `dkv.Policy`. None: `dkv.Decode()`.
        remasking: which predictions are committed: "low_confidence" (LLaDA's default), "entropy" (Dream's), "random",
            "topk_margin", "maskgit_plus" or "origin".
        temperature: 0 takes the most likely token. LLaDA scales the noise with it, Dream divides the logits by it.
        top_p, top_k: keep the most likely ids only.
        alg_temp: randomness of the choice of commits, as in Dream.
        eps: the last time of Dream's schedule.
        cfg_scale: classifier-free guidance, as in LLaDA; 0: none.
        threshold: commits every candidate whose confidence reaches it, at least one; takes as many steps as it takes.
        factor: commits the n most confident candidates, the n-th of which has a confidence of 1 - factor / (n + 1).
        logits_eos_inf, confidence_eos_eot_inf: LLaDA's switches against early ends of text.
        eos_early_stop: a row ends once an end of text has no mask before it; what is masked then becomes padding.
        eos_token_id: an int or a list; None: the family's end of text and end of turn.
        mask_id: None: the model's.
        order: (batch, gen_length) int64, the decoding order for "random": indices into the generated part.
        generator: a torch.Generator that seeds the noise; None: PyTorch's default one.
        impl: "auto", "triton" or "reference", see `dkv.kernels`.
        cuda_graphs: reserved; every step runs eagerly so far.
        output_history: also return the sequence and the active positions of every step.
        show_progress: a progress bar over the masks.

    Returns:
        `GenerateOutput`. Right-padded prompts come back left-padded.

    Raises:
        ValueError, TypeError: arguments that do not fit, an unsupported model.

    Source: Nie et al., LLaDA (arXiv 2502.09992); Ye et al., Dream (arXiv 2508.15487); Ma et al., dKV-Cache (arXiv
    2505.15781); Wu et al., Fast-dLLM (arXiv 2505.22618), for threshold and factor.

    Example:
        >>> model = dkv.from_pretrained("GSAI-ML/LLaDA-8B-Instruct")
        >>> output = dkv.generate(model, input_ids, gen_length=128, block_length=32, policy=dkv.Decode(8))
        >>> text = tokenizer.batch_decode(output.sequences[:, input_ids.shape[1]:])
    """
    decoder = find_decoder(model)
    if model.training:
        raise ValueError("generate needs the model in eval mode, got training mode; call model.eval() first.")
    family = decoder.family
    mask_id = token_id("mask_id", decoder.mask_id if mask_id is None else mask_id, decoder)
    eos_ids = eos_ids_of(eos_token_id, decoder)
    gen_length = count("gen_length", gen_length)
    block_length = min(count("block_length", gen_length if block_length is None else block_length), gen_length)
    if (threshold is not None or factor is not None) and steps is not None:
        raise ValueError("steps must be None with threshold or factor: they take as many steps as they need.")
    steps = count("steps", gen_length if steps is None else steps)
    fraction("eps", eps, closed=False)
    if not cfg_scale >= 0:
        raise ValueError(f"cfg_scale must be at least 0, got {cfg_scale}.")
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}.")

    input_ids, real = left_padded(input_ids, attention_mask, decoder)
    batch, prompt_length = input_ids.shape
    seqlen = prompt_length + gen_length
    if seqlen > decoder.max_positions:
        raise ValueError(
            f"prompt and generated tokens must fit the model's {decoder.max_positions} positions, got "
            f"{prompt_length} + {gen_length}; shorten the prompt or gen_length."
        )
    end_ids = [decoder.eos_token_id, family.end_of_turn_id]
    sampler = _sampler(
        family,
        remasking=remasking,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        alg_temp=alg_temp,
        threshold=threshold,
        factor=factor,
        seed=int(torch.randint(2**31, (), generator=generator, device=generator.device if generator else "cpu")),
        excluded_ids=(mask_id, decoder.eos_token_id) if logits_eos_inf else (mask_id,),
        unconfident_ids=tuple(i for i in end_ids if i < decoder.vocab_size) if confidence_eos_eot_inf else (),
    )
    policy = Decode() if policy is None else policy
    if not isinstance(policy, Policy):
        raise TypeError(f"policy must be a dkv.Policy such as dkv.Decode(8), got {policy!r}.")
    policy.check(family.shifted)
    if policy.needs_order and not sampler.ordered:
        raise ValueError(
            f"{policy!r} must know what a step will decode; use remasking='random' (or 'origin' with Dream) or order=, "
            f"got remasking={sampler.remasking!r}."
        )

    device = input_ids.device
    x = torch.cat((input_ids, torch.full((batch, gen_length), mask_id, device=device)), dim=1)
    real = torch.cat((real, torch.ones((batch, gen_length), dtype=torch.bool, device=device)), dim=1)
    state = State(
        x,
        mask_id=mask_id,
        real=real,
        first_generated=torch.full((batch, 1), prompt_length, device=device),
        block_length=block_length,
        shifted=family.shifted,
    )
    order = checked_order(order, sampler, state, prompt_length)
    run = _Run(
        decoder=decoder,
        policy=policy,
        sampler=sampler,
        state=state,
        schedule=Schedule(
            steps=steps,
            gen_length=gen_length,
            block_length=block_length,
            time_steps=family.time_steps,
            eps=eps,
            device=device,
        ),
        priority=sampler.priority(state, order) if sampler.ordered else None,
        cfg_scale=float(cfg_scale),
        eos_ids=torch.tensor(eos_ids, device=device) if eos_early_stop else None,
        impl=impl,
    )
    return run.to_the_end(output_history, show_progress)


class _Run:
    """One call of `generate`, checked and set up."""

    def __init__(self, *, decoder, policy, sampler, state, schedule, priority, cfg_scale, eos_ids, impl):
        self.decoder, self.policy, self.sampler, self.state = decoder, policy, sampler, state
        self.schedule, self.priority, self.eos_ids = schedule, priority, eos_ids
        self.cfg_scale, self.impl = cfg_scale, impl
        self.copies = 2 if cfg_scale else 1  # rows of the model's batch per sequence
        leftpad = state.first_column[:, 0].repeat(self.copies)
        self.cache = decoder.new_cache(leftpad.shape[0], state.x.shape[1], leftpad)
        self.positions = (state.columns - state.first_column).clamp(min=0)

    def to_the_end(self, output_history, show_progress):
        state = self.state
        stats = GenerateStats(peak_cache_bytes=self.cache.nbytes)
        # counted on the device, read once at the end
        history, actives, recomputed, positions = [], [], 0, 0
        progress = _progress_bar(int(state.masked.sum())) if show_progress else None
        while bool(state.running.any()):
            masks = state.masked
            positions = positions + (state.real & state.running).sum()
            active = self.step()
            stats.steps += 1
            stats.forward_passes += self.copies
            recomputed = recomputed + active.sum()
            if output_history:
                history.append(state.x)
                actives.append(active)
            if progress is not None:
                progress.update(int((masks & ~state.masked).sum()))
        if progress is not None:
            progress.close()
        stats.recomputed_tokens = int(recomputed) * self.copies
        stats.cache_ratio = 1 - int(recomputed) / int(positions)
        output = GenerateOutput(state.x, stats)
        if output_history:
            output = dataclasses.replace(output, history=torch.stack(history), active=torch.stack(actives))
        return output

    def step(self):
        """Predicts, commits, and moves the state on; returns the active positions."""
        state, sampler = self.state, self.sampler
        counts = self.schedule.counts(state)
        candidates = state.in_block
        if sampler.ordered:
            self._plan(counts)
            candidates = state.to_decode
        active = active_positions(self.policy, state, candidates)
        hidden = self._hidden(active, candidates)

        keys = self._keys() if sampler.noisy else None
        tokens, scores = self._predict(hidden, None if keys is None else keys[candidates])
        x = state.x.clone()
        if sampler.ordered:
            x[candidates] = tokens
        else:
            score = torch.zeros(x.shape, dtype=scores.dtype, device=x.device)
            score[candidates] = scores
            predicted = x.clone()
            predicted[candidates] = tokens
            x = torch.where(sampler.choose(score, candidates, counts, keys), predicted, x)
        if self.eos_ids is not None:
            x = self._end_rows(x)
        state.advance(x)
        return active

    def _plan(self, counts):
        """Writes down in the state what this step will decode."""
        state = self.state
        priority = self.priority.masked_fill(~state.in_block, float("-inf"))
        ranks = descending_ranks(priority)
        if self.sampler.remasking == "origin":
            state.to_decode = state.in_block & (priority >= self.schedule.remaining_after(state))
        else:
            state.to_decode = state.in_block & (ranks < counts)
        ranks = torch.where(state.to_decode, ranks, ranks.shape[1])
        most = int(state.to_decode.sum(1).max())
        ranks, columns = ranks.sort(dim=1)
        state.to_decode_columns = torch.where(ranks < ranks.shape[1], columns, -1)[:, :most]

    def _hidden(self, active, candidates):
        """(candidates, hidden_size): the final hidden states that predict the candidates."""
        state, decoder = self.state, self.decoder
        ids, positions, rows = state.x, self.positions, packed_rows(active, candidates, state)
        if self.copies == 1:
            return decoder.final_norm(decoder.step(ids, active, positions, self.cache, self.impl)[rows])
        # the unconditional rows see masks in place of the prompt, which count as prompt all the same
        blanked = torch.where(state.prompt & state.real, state.mask_id, ids)
        both = [torch.cat((a, b)) for a, b in ((ids, blanked), (active, active), (positions, positions))]
        hidden = decoder.step(*both, self.cache, self.impl)
        cond, uncond = (decoder.final_norm(half[rows]) for half in hidden.chunk(2))
        guided = (self.cfg_scale + 1) * cond.float() - self.cfg_scale * uncond.float()
        return guided.to(cond.dtype)

    def _predict(self, hidden, keys):
        """Tokens and scores of the candidates, a bounded number of logits at a time."""
        rows = max(1, CHUNK_ELEMENTS // self.decoder.vocab_size)
        key_parts = itertools.repeat(None) if keys is None else keys.split(rows)
        parts = [
            self.sampler.predict(self.decoder.logits(h), k) for h, k in zip(hidden.split(rows), key_parts, strict=False)
        ]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def _keys(self):
        """(batch, seqlen) int64: the noise key of each position at this step."""
        state = self.state
        rows = torch.arange(state.x.shape[0], device=state.x.device)[:, None]
        return noise_key(self.sampler.seed, rows, torch.full_like(rows, state.step), self.positions)

    def _end_rows(self, x):
        """Fills with padding the masks behind an end of text that has no mask before it."""
        state = self.state
        masked = (x == state.mask_id) & state.real
        ends = torch.isin(x, self.eos_ids) & (state.columns >= state.first_generated)
        no_mask_before = masked.int().cumsum(1) == 0
        ended = (ends & no_mask_before).any(1, keepdim=True)
        return torch.where(masked & ended, self.decoder.pad_token_id, x)


def _sampler(family, *, remasking, threshold, factor, temperature, top_p, top_k, alg_temp, **settings):
    by_probability = threshold is not None or factor is not None
    if remasking is None:
        remasking = family.remasking_by_probability if by_probability else family.remasking
    if remasking not in RULES:
        raise ValueError(f"remasking must be one of {RULES}, got {remasking!r}.")
    if threshold is not None and factor is not None:
        raise ValueError("threshold and factor exclude each other; pass one of them.")
    if by_probability and remasking not in BY_PROBABILITY:
        raise ValueError(f"threshold and factor need remasking to be one of {BY_PROBABILITY}, got {remasking!r}.")
    if threshold is not None:
        fraction("threshold", threshold)
    if factor is not None and not factor > 0:
        raise ValueError(f"factor must be positive, got {factor}.")
    for name, value in (("temperature", temperature), ("alg_temp", alg_temp)):
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}.")
    if alg_temp > 0 and (remasking in ORDERED or by_probability):
        raise ValueError("alg_temp needs a fixed number of commits chosen by confidence.")
    if top_p is not None:
        fraction("top_p", top_p)
    if top_k is not None:
        count("top_k", top_k)
    return Sampler(
        remasking=remasking,
        temperature=float(temperature),
        top_p=top_p,
        top_k=top_k,
        alg_temp=float(alg_temp),
        threshold=threshold,
        factor=factor,
        divides_logits=family.divides_logits,
        **settings,
    )


def _progress_bar(total):
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="unmasking", unit="token")
