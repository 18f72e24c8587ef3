"""`dkv.generate`: the denoising loop of LLaDA and Dream over a delayed cache."""

import contextlib
import warnings
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkv.active import rule_of
from dkv.config import GenerateConfig, Remasking
from dkv.guard import check_containers
from dkv.inputs import check_names, checked_order, eos_ids_of, ids_and_mask, in_vocabulary, left_padded, stacklevel
from dkv.kernels.checks import Impl
from dkv.models import view_of
from dkv.models.view import ModelView
from dkv.policy import Policy, PolicyName
from dkv.run import GenerateStats, Run, RunKey, StreamStep, capacity_for, take_run
from dkv.sampling import Sampler

_OF_GENERATE = {"output_history", "show_progress", "callback"}

__all__ = ["GenerateOutput", "GenerateStats", "StreamStep", "generate", "prepare", "stream"]


@dataclass
class GenerateOutput:
    """The result of `generate`.

    Attributes:
        sequences: (batch, seqlen) int64, prompts (left-padded) and generated tokens.
        stats: `GenerateStats`.
        history: (steps, batch, seqlen) int64, the sequences after every step, or None.
        active: (steps, batch, seqlen) bool, the positions recomputed at every step, or None.
        decoded_step: (batch, seqlen) int64, the step that committed each position, -1 for the prompt; or None.
    """

    sequences: Tensor
    stats: GenerateStats
    history: Tensor | None = None
    active: Tensor | None = None
    decoded_step: Tensor | None = None


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: Tensor | Mapping[str, Tensor],
    attention_mask: Tensor | None = None,
    *,
    gen_length: int = 128,
    steps: int | None = None,
    block_length: int | None = None,
    policy: Policy | PolicyName | None = None,
    remasking: Remasking | None = None,
    temperature: float | None = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg_temp: float | None = 0.0,
    eps: float = 1e-3,
    cfg_scale: float | None = 0.0,
    threshold: float | None = None,
    factor: float | None = None,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    eos_early_stop: bool = False,
    eos_token_id: int | list[int] | tuple[int, ...] | None = None,
    mask_id: int | None = None,
    order: Tensor | None = None,
    generator: torch.Generator | None = None,
    impl: Impl = "auto",
    cuda_graphs: bool = True,
    fused_products: bool | None = None,
    output_history: bool = False,
    show_progress: bool = False,
    callback: Callable[[StreamStep], object] | None = None,
    **unknown: NoReturn,  # so that type checkers still refuse wrong names
) -> GenerateOutput:
    """Generates `gen_length` tokens after each prompt by iterative unmasking, over a delayed K/V cache.

    By default it decodes one token per step, `gen_length` steps in all, as LLaDA does; pass `steps`, `threshold` or
    `factor` for more tokens per step. Masks inside a prompt are filled in with the first block; gen_length=0 fills in
    only those. An empty prompt gives unconditional text.

    Mutates the model: the first call moves the weights of layers that share an input (Q, K and V; gate and up) next to
    each other, and meanwhile no other thread may run the model's own forward. The model still computes, saves and
    moves as before, and any number of threads may call this function on it. The memory of a run is kept for the next
    run of the same kind; `dkv.reset(model)` frees it.

    Args:
        model: a model of `dkv.from_pretrained`, or Hugging Face's remote-code LLaDA or Dream, in eval mode.
        input_ids: (batch, prompt_length) int64 on the model's device; prompt_length may be 0. Or what a tokenizer
            returns: a mapping with "input_ids", perhaps "attention_mask", and "token_type_ids", which is ignored.
        attention_mask: (batch, prompt_length) bool or 0/1, zeros on one side of a row only. None: the mapping's, or no
            padding.
        gen_length: the number of tokens to generate, `max_new_tokens` in transformers; 0 only fills in the masks of the
            prompts.
        steps: denoising steps, at most 2**24; None: gen_length or, if that is 0, one for each mask of a row. Every
            block gets one step, and a share of the remaining ones in proportion to its length.
        block_length: blocks are decoded from left to right; the last one may be shorter. None: one block.
        policy: the positions that a step recomputes: a `dkv.Policy`, or the name of one for its default settings. None:
            `dkv.Decode()`, which is almost lossless; `dkv.NoCache()` is exact.
        remasking: the rule that chooses the predictions to commit: "low_confidence" (LLaDA's default), "entropy"
            (Dream's), "random", "topk_margin", "maskgit_plus" or "origin".
        temperature: 0 or None takes the most likely token. LLaDA scales the noise with it, Dream divides the logits by
            it. temperature, alg_temp, cfg_scale and factor are in 1e-20 .. 1e20, the range that float32 can compute
            with, or 0 or None for off (a factor: None).
        top_p, top_k: keep only the most likely ids. None (or top_p=1, top_k=0): all.
        alg_temp: randomness of the choice of commits, as in Dream.
        eps: the last time of Dream's schedule.
        cfg_scale: the scale of classifier-free guidance, as in LLaDA; 0: none.
        threshold: commits every candidate whose confidence reaches it, at least one per step; the number of steps
            follows from it.
        factor: commits the n most confident candidates, for the largest n whose n-th confidence is at least
            1 - factor / (n + 1), and at least one.
        logits_eos_inf: LLaDA's switch that excludes the end of text.
        confidence_eos_eot_inf: LLaDA's switch that commits ends of text and of turn last.
        eos_early_stop: ends a row once an end of text has no mask before it; the remaining masks become padding.
        eos_token_id: an int or a list, the ends that the three switches above are about; None: the family's end of text
            and end of turn.
        mask_id: None: the model's.
        order: (batch, gen_length) int64, the decoding order for "random": indices into the generated part.
        generator: on any device; seeds the noise and the random order. None: PyTorch's default generator.
        impl: "auto", "triton" or "reference", see `dkv.kernels`.
        cuda_graphs: on a GPU, record steps as CUDA graphs and replay them; False: launch every kernel of every step.
        fused_products: True: steps of up to 256 positions, of all rows together, use dkv's own matrix products, which
            include norm, RoPE, cache write, activation and residual. False: they use the GPU's library. None: they use
            dkv's where measurements on such a GPU have shown that they are faster. dkv's round less often, so near
            ties may be decided differently.
        output_history: also return the sequences and the active positions of every step, see `dkv.plot_history`.
        show_progress: show a progress bar over the masks.
        callback: called with the `StreamStep` of each step, after it; what it returns is ignored. To end early, leave a
            `stream` instead.

    Returns:
        `GenerateOutput`. All sequences are left-padded, even if the prompts were right-padded.

    Raises:
        ValueError, TypeError: unsuitable arguments, names that are no options (but token_type_ids is ignored), or an
            unsupported model.
        RuntimeError: the logits of a token to predict hold NaN, +inf, or nothing above -inf. The host notices when it
            next reads from the device, which on a GPU with known counts is at the end. Or a policy of your own breaks
            its contract.

    Warns:
        UserWarning: rows begin or end with the pad token, but there is no attention_mask; steps has another number of
            steps than can be taken; a policy that caches read nothing from the cache, for the given steps.

    Source: Nie et al., LLaDA (arXiv 2502.09992); Ye et al., Dream (arXiv 2508.15487); Ma et al., dKV-Cache (arXiv
    2505.15781); Wu et al., Fast-dLLM (arXiv 2505.22618), for threshold and factor.

    Example:
        >>> model = dkv.from_pretrained("GSAI-ML/LLaDA-8B-Instruct")
        >>> output = dkv.generate(model, input_ids, gen_length=128, block_length=32, policy=dkv.Decode(8))
        >>> text = tokenizer.batch_decode(output.sequences[:, input_ids.shape[1]:])
    """
    if not (callback is None or callable(callback)):
        raise TypeError(f"callback must be a function that takes a StreamStep, or None, got {callback!r}.")
    run = prepare(
        model,
        input_ids,
        attention_mask,
        order=order,
        generator=generator,
        gen_length=gen_length,
        steps=steps,
        block_length=block_length,
        policy=policy,
        remasking=remasking,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        alg_temp=alg_temp,
        eps=eps,
        cfg_scale=cfg_scale,
        threshold=threshold,
        factor=factor,
        logits_eos_inf=logits_eos_inf,
        confidence_eos_eot_inf=confidence_eos_eot_inf,
        eos_early_stop=eos_early_stop,
        eos_token_id=eos_token_id,
        mask_id=mask_id,
        impl=impl,
        cuda_graphs=cuda_graphs,
        fused_products=fused_products,
        **unknown,
    )
    history, actives = [], []
    with run:
        progress = _progress_bar(int(run.state.masked.sum())) if show_progress else None
        while run.running():
            if output_history:
                actives.append(run.trimmed(run.active))
            run.step()
            if output_history:
                history.append(run.trimmed(run.state.x))
            if callback is not None:
                callback(run.last_step())
            if progress is not None:
                progress.update(progress.total - progress.n - int(run.state.masked.sum()))
        if progress is not None:
            progress.close()
        output = GenerateOutput(*_finish(run))
        if output_history:
            output.history, output.active = torch.stack(history), torch.stack(actives)
            output.decoded_step = run.trimmed(run.state.decoded_step).long().clamp(min=-1)
    return output


def stream(
    model: nn.Module,
    input_ids: Tensor | Mapping[str, Tensor],
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Generator[StreamStep, None, GenerateOutput]:
    """`generate`, one step at a time: yields what each step left, to show the text as it forms.

    The steps and the last sequences are those of `generate` with the same arguments. It waits for the GPU only where
    `generate` does: with a fixed number of commits the wait is your `.tolist()`, and whoever does not read every step
    waits less often. An iterator that is dropped before its end, or closed, gives its memory back to the model.

    Args:
        model, input_ids, attention_mask: as in `generate`.
        options: those of `generate`, except output_history, show_progress and callback.

    Returns:
        A generator of `StreamStep`: step, sequences, and prefix, the number of leading tokens that are final. Its own
        return value (of `yield from`) is the `GenerateOutput`.

    Raises:
        ValueError, TypeError, RuntimeError: as `generate`; for unsuitable arguments at once, not at the first step.

    Example:
        >>> for step in dkv.stream(model, input_ids, gen_length=128, block_length=32):
        ...     print(tokenizer.decode(step.sequences[0, input_ids.shape[1]:]))
    """
    steps = _stream(model, input_ids, attention_mask, options)
    next(steps)
    return steps


def _stream(model, input_ids, attention_mask, options):
    with prepare(model, input_ids, attention_mask, **options) as run:
        yield  # the arguments are checked; from here on, an iterator that is dropped leaves the `with`
        while run.running():
            run.step()
            yield run.last_step()
        return GenerateOutput(*_finish(run))


def _finish(run):
    sequences, stats = run.finish()
    rule = rule_of(run.policy, run.shifted)
    caches = rule is None or rule.interval != 1
    took_all = not run.config.by_probability and stats.steps >= run.max_steps  # it did not end early
    if caches and took_all and stats.cache_ratio == 0 and stats.steps > 1:
        warnings.warn(
            f"{run.policy!r} read nothing from the cache: all {stats.steps} steps were full ones. Blocks begin with "
            "full steps: take more steps or longer blocks, or a policy with fewer of them, such as DualCache().",
            stacklevel=stacklevel(),
        )
    return sequences, stats


@torch.no_grad()
def prepare(
    model: nn.Module,
    input_ids: Tensor | Mapping[str, Tensor],
    attention_mask: Tensor | None = None,
    *,
    order: Tensor | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Run:
    """The `dkv.run.Run` of a call of `generate`, before its first step, for loops that look at each step.

    options: those of `GenerateConfig`; token_type_ids is ignored.
    """
    options.pop("token_type_ids", None)
    for name in _OF_GENERATE & options.keys():
        raise TypeError(f"{name} is an option of dkv.generate alone; leave it out.")
    check_names(options, [option.name for option in fields(GenerateConfig)])
    config = GenerateConfig(**options)
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}.")
    view = view_of(model)
    check_containers(model, view.called, runs_forward=False)
    if model.training:
        raise ValueError("generate needs the model in eval mode, got training mode; call model.eval() first.")
    input_ids, valid = left_padded(*ids_and_mask(input_ids, attention_mask), view)
    batch, prompt_length = input_ids.shape
    seqlen = prompt_length + config.gen_length
    if seqlen > view.max_positions:
        raise ValueError(
            f"prompt and generated tokens must fit the model's {view.max_positions} positions, got "
            f"{prompt_length} + {config.gen_length}; shorten the prompt or gen_length."
        )
    config = resolved(config, view)
    prompt_masks = ((input_ids == config.mask_id) & valid).sum(1).tolist()
    if config.gen_length == 0 and not any(prompt_masks):
        raise ValueError(
            f"with gen_length=0 the prompts must hold masks to fill in, but input_ids has no token {config.mask_id} "
            "that is not padding; put some in, or pass a gen_length of at least 1."
        )
    _check_steps(config, masks=config.gen_length + max(prompt_masks))
    order = checked_order(
        order,
        input_ids,
        gen_length=config.gen_length,
        remasking=config.remasking,
        has_prompt_masks=any(prompt_masks),
    )
    key = run_key(config, view, batch=batch, seqlen=seqlen, has_prompt_masks=any(prompt_masks))
    x = F.pad(input_ids, (0, config.gen_length), value=config.mask_id)
    valid = F.pad(valid, (0, config.gen_length), value=True)
    lengths = valid.sum(1).tolist()
    seed = 0
    if config.noisy or (config.ordered and order is None):
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device if generator else "cpu"))
    with contextlib.ExitStack() as stack:
        # if `start` fails the memory goes back to the model; otherwise the caller's `with` returns it
        run = stack.enter_context(take_run(model, key, view))
        run.start(
            x,
            valid,
            lengths=lengths,
            prompt_masks=prompt_masks,
            forecasts=run.schedule.forecasts(max(lengths), run.shifted) if key.has_forecasts else None,
            first_generated=prompt_length,
            seed=seed,
            order=order,
        )
        stack.pop_all()
    return run


def _check_steps(config, masks):
    blocks, steps = max(-(-config.gen_length // config.block_length), 1), config.steps
    problem = None
    if steps is not None and steps > masks:
        problem = f"at most the masks of a row, {masks}, got {steps}: no more steps can decode something."
    elif steps is not None and steps < blocks:
        problem = f"at least the blocks, {blocks}, got {steps}: each block takes a step."
    if problem:
        warnings.warn(f"steps should be {problem}", stacklevel=stacklevel())


def resolved(config: GenerateConfig, view: ModelView) -> GenerateConfig:
    """The config with the model's remasking and mask_id in place of None, and the actual length of a block."""
    family, columns = view.family, max(config.gen_length, 1)
    remasking = family.remasking_by_probability if config.by_probability else family.remasking
    return replace(
        config,
        remasking=config.remasking or remasking,
        mask_id=in_vocabulary("mask_id", view.mask_id if config.mask_id is None else config.mask_id, view),
        block_length=min(config.block_length or columns, columns),
    )


def run_key(config: GenerateConfig, view: ModelView, *, batch: int, seqlen: int, has_prompt_masks: bool) -> RunKey:
    """The `RunKey` of a batch of sequences (prompts and generated tokens) for a config that is `resolved`."""
    config.policy.check(view.family.shifted)
    eos_ids = eos_ids_of(config.eos_token_id, view)
    end_of_text = view.eos_ids if config.eos_token_id is None else eos_ids
    sampler = Sampler(
        config,
        divides_logits=view.family.divides_logits,
        excluded_ids=view.predictable((config.mask_id, *(end_of_text if config.logits_eos_inf else ()))),
        unconfident_ids=view.predictable(eos_ids) if config.confidence_eos_eot_inf else (),
    )
    counts_are_known = not (config.by_probability or config.remasking == "origin" or config.eos_early_stop)
    return RunKey(
        batch=batch,
        capacity=capacity_for(seqlen),
        sampler=sampler,
        pad_id=view.pad_token_id,
        eos_ids=tuple(eos_ids) if config.eos_early_stop else (),
        has_forecasts=counts_are_known and not has_prompt_masks,
    )


def _progress_bar(total):
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="unmasking", unit="token")
