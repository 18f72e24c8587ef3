"""LLaDA and Dream in the Language Model Evaluation Harness, under the name "dkv".

    python -m dkv.lm_eval --model dkv --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct,policy=Decode --tasks gsm8k ...

is the harness's own command line with this model added; in Python, importing this module adds it. With

    torchrun --nproc_per_node 8 -m dkv.lm_eval --model dkv ...

in place of `python` (or with `accelerate launch`), eight processes share the documents, each on a GPU of its own.
"""

import functools
import inspect
import logging
import os
import time
from dataclasses import fields, replace
from datetime import timedelta
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dkv
from dkv.inputs import HINTS, one_of, renamed, whole
from dkv.models import view_of
from dkv.policy import POLICIES, Policy, PolicyName
from dkv.texts import batches, check_for_model, continuations, encode

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    if error.name.partition(".")[0] != "lm_eval":
        raise
    raise ModuleNotFoundError("dkv.lm_eval needs the evaluation harness; run: pip install lm_eval") from error

__all__ = ["DiffusionLM", "sample_masks"]

logger = logging.getLogger("lm_eval.models.dkv")  # a child of the harness's logger, whose level its users set

_SETTINGS = {name: tuple(inspect.signature(kind).parameters) for name, kind in POLICIES.items()}  # of each policy
_GENERATE = {option.name for option in fields(dkv.GenerateConfig)} - {"policy"}
_ALIASES = {  # names in the scripts of LLaDA, Dream and Fast-dLLM that mean just what ours do
    "model_path": "pretrained",
    "max_new_tokens": "gen_length",
    "cfg": "cfg_scale",
    "alg": "remasking",
    "is_check_greedy": "check_greedy",
}
_HINTS = HINTS | {
    "show_speed": "leave it out, the speed is always logged",
    "save_dir": "use the harness's own --use_cache to resume",
    "parallelize": "use torchrun --nproc_per_node N to share the documents among GPUs",
    "seed": "use the harness's own --seed",
}


def _with_aliases(init):
    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        init(self, *args, **renamed(kwargs, _ALIASES))

    return wrapped


@register_model("dkv")
class DiffusionLM(TemplateLM):
    """A LLaDA or Dream for the harness: `dkv.generate` with a policy writes its texts, its likelihoods use no cache.

    Prompts run in left-padded batches. A text ends at its first end of text or end of turn, or before the first of the
    task's stop strings. A row that has ended is not computed further, unless `eos_early_stop=False`.

    The likelihood of a continuation is the masked diffusion bound, estimated with `mc_num` samples of `sample_masks`.
    The samples depend only on PyTorch's seed, which the harness sets, and on the length of the continuation. So a
    repeated run, another batch size or another policy gives the same figures, and choices of equal length are compared
    under the same masks.

    Under torchrun or `accelerate launch`, each process loads the model and evaluates its share of the documents, and
    the first process reports the scores of all.

    Args:
        pretrained: an argument of `dkv.from_pretrained`, or a model that `dkv.generate` runs. A model evaluates all
            documents in its process, however many processes there are.
        policy: the name of a policy, whose settings are arguments too (refresh_interval=4), or a `dkv.Policy`.
        gen_length: tokens to generate. None: the task's max_gen_toks, or 256 if it has none.
        steps, block_length: as in `dkv.generate`, including None.
        batch_size: prompts per batch; for likelihoods, masked sequences of equal length per batch.
        dtype, device: as in `dkv.from_pretrained`; but without a GPU, "cuda" means the CPU, and each of several
            processes takes the GPU of its local rank, unless device is "cpu".
        tokenizer: a name, a folder or a tokenizer. None: that of pretrained, unless pretrained is a model.
        max_length: prompts are cut on the left so that prompt and continuation fit. None: the model's positions.
        add_bos_token: whether a prompt begins with the tokenizer's BOS even if the tokenizer does not add it.
        trust_remote_code: for the tokenizer; Dream's needs it. The model never runs remote code.
        mc_num: samples of a likelihood. Equal samples are computed once, so a continuation of one token costs one pass.
        check_greedy: whether likelihoods also say if the continuation is the greedy text (without a cache), which costs
            one pass per token. False: they always say no, and metrics that use it, such as LAMBADA's acc, are not
            valid.
        settings: other arguments of `dkv.generate`, such as remasking, temperature, top_p and threshold. Without them,
            temperature and top_p are the task's. Names from other scripts are taken for pretrained (model_path),
            gen_length (max_new_tokens), cfg_scale (cfg), remasking (alg) and check_greedy (is_check_greedy).

    Raises:
        ValueError, TypeError: an unknown policy or setting, a setting that the policy does not have, values out of
            range.
        ModuleNotFoundError: several processes without accelerate.

    Source: Nie et al., LLaDA (arXiv 2502.09992), equation 6, for the likelihood.

    Example:
        >>> from lm_eval import simple_evaluate
        >>> model = DiffusionLM("GSAI-ML/LLaDA-8B-Instruct", policy="Decode", refresh_interval=8)
        >>> simple_evaluate(model, tasks=["gsm8k"], apply_chat_template=True)
    """

    @_with_aliases
    def __init__(
        self,
        pretrained: str | os.PathLike[str] | nn.Module,
        *,
        policy: PolicyName | Policy = "Decode",
        gen_length: int | None = None,
        steps: int | None = None,
        block_length: int | None = None,
        batch_size: int | str = 1,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        add_bos_token: bool = False,
        trust_remote_code: bool = False,
        mc_num: int = 128,
        check_greedy: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        # checked before the weights are read, because a wrong setting should not cost minutes
        self.settings = {"eos_early_stop": True, "steps": steps, "block_length": block_length}
        self.settings |= {name: settings.pop(name) for name in _GENERATE & settings.keys()}
        self.policy = _make_policy(policy, settings)
        self.gen_length = None if gen_length is None else whole("gen_length", gen_length, minimum=1)
        self.config = dkv.GenerateConfig(policy=self.policy, **self.settings)
        if not str(batch_size).isdecimal():
            raise ValueError(f"batch_size must be a number, there is no automatic choice, got {batch_size!r}; pass 8.")
        self.batch_size = whole("batch_size", int(batch_size), minimum=1)
        self.mc_num = whole("mc_num", mc_num, minimum=1)
        self.add_bos_token, self.check_greedy = add_bos_token, check_greedy

        if isinstance(pretrained, nn.Module):
            self.model = pretrained
            if tokenizer is None:
                raise ValueError(
                    "tokenizer must be given if pretrained is a model; pass a name, a folder or a tokenizer."
                )
            if "_dkv" in vars(pretrained):
                raise ValueError("likelihoods need a model without a cache; call dkv.restore_attention(model) first.")
            if _processes() > 1:
                logger.warning(
                    "pretrained is a model, so this process evaluates all documents; pass a folder or a repository to "
                    "share them among the processes."
                )
        else:
            if "cuda" in str(device) and not torch.cuda.is_available():
                logger.warning(f"device={device}: there is no CUDA device, so the model runs on the CPU.")
                device = "cpu"
            if _processes() > 1:
                self.accelerator = _accelerator(cpu=str(device) == "cpu")
                self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
                device = self.accelerator.device
            self.model = dkv.from_pretrained(pretrained, dtype=dtype, device=device)
        self.view = view_of(self.model)
        check_for_model(self.config, self.view)
        self.max_length = self.view.max_positions if max_length is None else whole("max_length", max_length, minimum=1)
        self.tokenizer = pretrained if tokenizer is None else tokenizer
        if not hasattr(self.tokenizer, "decode"):
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer, trust_remote_code=trust_remote_code)

    @property
    def device(self) -> torch.device:
        return self.view.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.view.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token in place of an empty prompt."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, one after the other."""
        return self.accelerator.gather(tensor) if self.world_size > 1 else tensor

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes, on process `dst`."""
        if self.world_size == 1:
            return [obj]
        objects = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, objects, dst)
        return objects

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world_size > 1:
            self.accelerator.wait_for_everyone()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a string; the BOS of a chat template is not doubled."""
        ids = encode(self.tokenizer, string, add_special_tokens)
        missing = self.add_bos_token and add_special_tokens is not False and ids[:1] != [self.prefix_token_id]
        return [self.prefix_token_id] * missing + ids

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text of each request, whose args are (prompt, kwargs of the task)."""
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        texts, tokens, start = [None] * len(requests), 0, time.perf_counter()

        def task_kwargs(i):
            return repr(sorted(requests[i].args[1].items()))

        progress = tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm or self.rank > 0)
        for _, group in groupby(sorted(range(len(requests)), key=task_kwargs), key=task_kwargs):
            group = list(group)
            kwargs = requests[group[0]].args[1]
            until = kwargs.get("until") or []
            until = [until] if isinstance(until, str) else until
            config = self._config(kwargs)
            fitting = [self._fitting(prompts[i], config.gen_length) for i in group]
            for batch in continuations(self.model, fitting, self.batch_size, config):
                for place, ids in batch:
                    i = group[place]
                    texts[i] = self._text(ids, until)
                    tokens += len(ids)
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                progress.update(len(batch))
        progress.close()
        seconds = time.perf_counter() - start
        process = f", process {self.rank} of {self.world_size}" if self.world_size > 1 else ""
        speed = f"{seconds:.1f} s, {tokens / seconds:.2f} tokens/s"
        logger.info(f"{self.policy!r}{process}: {tokens} tokens before ends of text, {speed}")
        return texts

    def _config(self, kwargs):
        """The config with what the task says and the user does not."""
        changes = {"gen_length": self.gen_length or kwargs.get("max_gen_toks") or kwargs.get("max_new_tokens") or 256}
        for name in {"temperature", "top_p"} - self.settings.keys():
            if kwargs.get("do_sample", True) and kwargs.get(name) is not None:
                changes[name] = kwargs[name]
        return replace(self.config, **changes)

    def _fitting(self, prompt, length):
        """The end of a prompt that leaves room for `length` tokens."""
        room = self.max_length - length
        if room < 1:
            raise ValueError(
                f"{length} tokens and a prompt must fit max_length={self.max_length}; make gen_length smaller."
            )
        if len(prompt) > room:
            logger.warning(f"a prompt of {len(prompt)} tokens is cut to its last {room}: max_length={self.max_length}.")
        return prompt[-room:]

    def _text(self, ids, until):
        """The text before the first stop string. Stop strings may be special tokens, which are removed afterwards."""
        text = self.tokenizer.decode(ids)
        text = text[: min((text.find(stop) for stop in until if stop and stop in text), default=None)]
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return text

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """(log-likelihood, whether it is the greedy text) of each (texts, context ids, continuation ids)."""
        if not self.check_greedy:
            logger.info("check_greedy=False: metrics about the greedy text, such as LAMBADA's acc, are not valid.")
        if self.config.cfg_scale > 0:
            logger.warning(f"cfg_scale={self.config.cfg_scale} is for texts only: likelihoods have no guidance.")
        pairs = [(self._fitting(context, len(target)), target) for _, context, target in requests]
        order = sorted(range(len(pairs)), key=lambda i: (sum(map(len, pairs[i])), pairs[i]))
        progress = tqdm(order, desc="loglikelihood", disable=disable_tqdm or self.rank > 0)
        samples = ((i, *sample) for i in progress for sample in self._samples(*pairs[i]))
        totals = [0.0] * len(pairs)
        # batches of one length need no padding
        for _, group in groupby(samples, key=lambda sample: len(sample[1])):
            for batch in batches(group, self.batch_size):
                indices, tokens, masked, weights = zip(*batch, strict=True)
                log_probs = self._log_probs(torch.stack(tokens), torch.stack(masked))
                for i, weight, log_prob in zip(indices, weights, log_probs, strict=True):
                    totals[i] += weight * log_prob
        return [(total, self._is_greedy(*pair)) for total, pair in zip(totals, pairs, strict=True)]

    def _samples(self, context, target):
        """(tokens (seqlen,), masked (seqlen,) bool, weight) of each sample of a likelihood."""
        generator = torch.Generator("cpu").manual_seed(torch.initial_seed())
        tokens = torch.tensor(context + target, device="cpu")
        if target:
            masks, weights = sample_masks(len(target), self.mc_num, generator)
            for masked, weight in zip(F.pad(masks, (len(context), 0)), weights.tolist(), strict=True):
                yield tokens, masked, weight

    @torch.no_grad()
    def _log_probs(self, tokens, masked):
        """Summed log-probabilities of the masked tokens of each row; tokens, masked (batch, seqlen) -> batch floats."""
        # choices of one token have the same masked input, whose logits are computed once
        inputs, source = tokens.masked_fill(masked, self.view.mask_id).unique(dim=0, return_inverse=True)
        logits = self.model(inputs.to(self.device)).logits
        row, column = masked.nonzero(as_tuple=True)
        logits = logits[source[row], (column - int(self.view.family.shifted)).clamp(min=0)]
        losses = F.cross_entropy(logits.float(), tokens[row, column].to(self.device), reduction="none")
        sums = torch.zeros(len(tokens), dtype=torch.float64, device="cpu")
        return sums.index_add_(0, row, -losses.double().cpu()).tolist()

    def _is_greedy(self, context, target):
        if not (self.check_greedy and target):
            return False
        prompt = torch.tensor([context], device=self.device)
        # with a mask, because a prompt may begin with the end of text, which is also the pad token
        mask = torch.ones_like(prompt)
        output = dkv.generate(self.model, prompt, mask, gen_length=len(target), policy=dkv.NoCache())
        return output.sequences[0, len(context) :].tolist() == target

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not available."""
        raise NotImplementedError(
            "a masked diffusion model bounds the likelihood of a continuation, but has none for each next token; "
            "leave out perplexity tasks such as wikitext."
        )


def _processes():
    """How many processes torchrun or `accelerate launch` has started."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def _accelerator(cpu):
    """What connects the processes: accelerate's `Accelerator`, which older releases of the harness use directly."""
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("several processes need accelerate; run: pip install accelerate") from error
    # a process that is done may wait for hours
    return Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=52))])


def _make_policy(policy, settings):
    """The `Policy` of a name and a dict of its settings; a `Policy` is returned as it is, and takes no settings."""
    is_named = not isinstance(policy, Policy)
    policy = {name.lower(): name for name in POLICIES}.get(str(policy).lower(), policy)
    name = one_of("policy", policy, tuple(POLICIES)) if is_named else repr(policy)
    known = _SETTINGS[name] if is_named else ()
    for unknown in sorted(settings.keys() - set(known)):
        others = [f"policy={other}" for other, names in _SETTINGS.items() if unknown in names]
        if others:
            raise ValueError(
                f"{unknown} must be a setting of the policy, but {name} has {', '.join(known) or 'none'}; "
                f"leave it out or use {' or '.join(others)}."
            )
        if unknown in _HINTS:
            raise ValueError(f"{unknown} is no argument of this model; {_HINTS[unknown]}.")
        raise ValueError(
            f"{unknown!r} must be an argument of the model, of dkv.generate ({', '.join(sorted(_GENERATE))}) or of the "
            f"policy {name} ({', '.join(known) or 'none'}); correct its name or leave it out."
        )
    return POLICIES[name](**settings) if is_named else policy


def sample_masks(length: int, mc_num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws the masks of `mc_num` samples of a likelihood of `length` tokens, and merges equal samples.

    The number of masks is uniform on 1 .. length, with draws spread evenly over the samples; their places are uniform.

    Returns:
        masks (samples, length) bool, all different, and weights (samples,) float64. The log-likelihood is estimated by
        the sum, over the samples, of the weight times the log-probabilities of the masked tokens.
    """
    levels = torch.arange(mc_num, dtype=torch.float64, device="cpu")
    levels = (levels + torch.rand((), generator=generator, dtype=torch.float64, device="cpu")) / mc_num
    counts = 1 + (levels * length).long().clamp(max=length - 1)
    draws = torch.rand((mc_num, length), generator=generator, dtype=torch.float32, device="cpu")
    ranks = draws.argsort(1).argsort(1)
    masks, repeats = (ranks < counts[:, None]).unique(dim=0, return_counts=True)
    return masks, repeats.double() / mc_num * length / masks.sum(1)


if __name__ == "__main__":
    cli_evaluate()
