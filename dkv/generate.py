"""`dkv.generate`: the denoising loop of LLaDA and Dream over a delayed cache."""

import contextlib

import torch
import torch.nn.functional as F

from dkv.decoder import find_decoder
from dkv.guard import check_containers
from dkv.inputs import checked_order, count, eos_ids_of, fraction, left_padded, token_id
from dkv.kernels.checks import IMPLS
from dkv.policy import Decode, Policy
from dkv.run import GenerateOutput, GenerateStats, Plan, capacity_for, take_run
from dkv.sampling import BY_PROBABILITY, ORDERED, RULES, Sampler

__all__ = ["GenerateOutput", "GenerateStats", "generate", "prepare"]


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

    The model computes, saves and moves as before, but the weights of its layers with the same input (Q, K and V; gate
    and up) come to lie next to each other: the first call moves them, so no other thread may then run the model itself.
    Threads may share a model after that, and may call this function at any time. The memory of a run is kept for the
    next one of the same kind, `dkv.reset(model)` frees it. Mask tokens inside a prompt are filled in with the first
    block.

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
        logits_eos_inf, confidence_eos_eot_inf: LLaDA's switches against early ends: no end of text at all; ends of text
            and of turn last.
        eos_early_stop: a row ends once an end of text has no mask before it; what is masked then becomes padding.
        eos_token_id: an int or a list, which the three switches above are about; None: the family's end of text and end
            of turn.
        mask_id: None: the model's.
        order: (batch, gen_length) int64, the decoding order for "random": indices into the generated part.
        generator: a torch.Generator that seeds the noise and the random order; None: PyTorch's default one.
        impl: "auto", "triton" or "reference", see `dkv.kernels`.
        cuda_graphs: on a GPU, record steps as CUDA graphs and replay them; False: launch every kernel of every step.
        output_history: also return the sequence and the active positions of every step, see `dkv.plot_history`.
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
    settings = dict(locals())
    output_history, show_progress = settings.pop("output_history"), settings.pop("show_progress")
    history, actives = [], []
    with prepare(**settings) as run:
        progress = _progress_bar(int(run.state.masked.sum())) if show_progress else None
        while run.running():
            if output_history:
                actives.append(run.trimmed(run.active))
            run.step()
            if output_history:
                history.append(run.trimmed(run.state.x))
            if progress is not None:
                progress.update(progress.total - progress.n - int(run.state.masked.sum()))
        if progress is not None:
            progress.close()
        output = run.finish()
        if output_history:
            output.history, output.active = torch.stack(history), torch.stack(actives)
            output.decoded_step = run.trimmed(run.state.decoded_step).long().clamp(min=-1)
    return output


@torch.no_grad()
def prepare(
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
):
    """The `dkv.run.Run` of a call of `generate`, started but no step done: for loops that look at each step."""
    decoder = find_decoder(model)
    check_containers(model, decoder.called, runs_forward=False)
    if model.training:
        raise ValueError("generate needs the model in eval mode, got training mode; call model.eval() first.")
    family = decoder.family
    mask_id = token_id("mask_id", decoder.mask_id if mask_id is None else mask_id, decoder)
    eos_ids = eos_ids_of(eos_token_id, decoder)
    end_of_text = decoder.eos_ids if eos_token_id is None else eos_ids
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
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}.")

    input_ids, real = left_padded(input_ids, attention_mask, decoder)
    batch, prompt_length = input_ids.shape
    seqlen = prompt_length + gen_length
    if seqlen > decoder.max_positions:
        raise ValueError(
            f"prompt and generated tokens must fit the model's {decoder.max_positions} positions, got "
            f"{prompt_length} + {gen_length}; shorten the prompt or gen_length."
        )
    sampler = _sampler(
        family,
        remasking=remasking,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        alg_temp=alg_temp,
        threshold=threshold,
        factor=factor,
        excluded_ids=decoder.predictable((mask_id, *(end_of_text if logits_eos_inf else ()))),
        unconfident_ids=decoder.predictable(eos_ids) if confidence_eos_eot_inf else (),
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

    prompt_masks = ((input_ids == mask_id) & real).sum(1).tolist()
    order = checked_order(order, sampler, input_ids, gen_length, any(prompt_masks))
    counts_are_known = not (sampler.by_probability or sampler.remasking == "origin" or eos_early_stop)
    plan = Plan(
        batch=batch,
        capacity=capacity_for(seqlen),
        policy=policy,
        sampler=sampler,
        gen_length=gen_length,
        block_length=block_length,
        steps=steps,
        eps=eps,
        mask_id=mask_id,
        pad_id=decoder.pad_token_id,
        eos_ids=tuple(eos_ids) if eos_early_stop else (),
        cfg_scale=float(cfg_scale),
        impl=impl,
        cuda_graphs=bool(cuda_graphs),
        has_forecasts=counts_are_known and not any(prompt_masks),
    )
    x = torch.full((batch, seqlen), mask_id, device=input_ids.device)
    x[:, :prompt_length] = input_ids
    real = F.pad(real, (0, gen_length), value=True)
    lengths = real.sum(1).tolist()
    seed = 0
    if sampler.noisy or (sampler.ordered and order is None):
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device if generator else "cpu"))
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(take_run(model, plan, decoder))
        run.start(
            x,
            real,
            lengths=lengths,
            prompt_masks=prompt_masks,
            forecasts=run.schedule.forecasts(max(lengths), family.shifted) if plan.has_forecasts else None,
            first_generated=prompt_length,
            seed=seed,
            order=order,
        )
        stack.pop_all()
    return run


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
