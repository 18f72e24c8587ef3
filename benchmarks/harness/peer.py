"""Runs someone else's code on our weights, prompts and device, in its own interpreter and transformers version.

    PYTHON benchmarks/harness/peer.py NAME FOLDER      started by generate_speed.py; none of their code is in this
                                                       repository

NAME is one of `PEERS`, FOLDER the user's copy of it:

    official     copies of the hub's files: llada_v2/ with modeling_llada.py and configuration_llada.py,
                 llada_generate.py (LLaDA's generate.py), dream/ with modeling_dream.py, configuration_dream.py and
                 generation_utils.py
    dkv-cache    a clone of the dKV-Cache authors' repository
    fast-dllm    a clone of the Fast-dLLM repository

They need PyTorch and transformers: the hub's files 4.46 to 4.57, dkv-cache 4.46, fast-dllm 4.46 or 4.49 and einops.
This file imports nothing of ours, because their interpreter need not have dkv.

The process reads one JSON object a line and answers each with one:

    {"family", "config", "seed", "dtype", "device"}         builds the model; the answer is {"policies", "transformers"}
    {"policy", "prompt", "gen_length", "block_length", "steps", "threshold", "interval", "with_peak"}
                                                            generates; the answer is the fields of an `Outcome`
    {"error": message}                                      is the answer to a request that fails

Their code runs unchanged but for two things: weights are those of `fill_random`, and the mask token's logit is minus
infinity, as in `dkv.generate`, because with random weights it would win now and then.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import sys
import time
import types
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

Request = dict[str, Any]
Policies = dict[str, Callable[[nn.Module, Request], Tensor]]


@dataclass(frozen=True)
class Outcome:
    """One whole generation.

    Attributes:
        seconds: the time of the whole run.
        sequences: token ids of each row, prompt and generated.
        steps: (positions, milliseconds) of each step: positions that it put through the model, over all rows, and the
            time from its start to the next one's.
        peak_bytes: the peak memory of tensors during the run, weights included; None: not measured.
    """

    seconds: float
    sequences: list[list[int]]
    steps: list[tuple[int, float]]
    peak_bytes: int | None = None


class Stopwatch:
    """Times a run and its steps; the host does not wait for a GPU before the end."""

    def __init__(self, device: torch.device):
        self.cuda, self.marks, self.counts = device.type == "cuda", [], []

    def __enter__(self):
        if self.cuda:
            torch.cuda.synchronize()
        self.begin = time.perf_counter()
        return self

    def __exit__(self, *exception):
        self._mark()
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.begin

    def step(self, positions: int) -> None:
        """Marks the start of a step that puts so many positions through the model."""
        self.counts.append(positions)
        self._mark()

    def _mark(self):
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def steps(self) -> list[tuple[int, float]]:
        """[(positions, milliseconds)] of all steps."""
        times = zip(self.marks, self.marks[1:], strict=False)
        if self.cuda:
            times = [begin.elapsed_time(end) for begin, end in times]
        else:
            times = [1e3 * (end - begin) for begin, end in times]
        return list(zip(self.counts, times, strict=True))


class PeakMemory:
    """The peak memory of tensors in bytes, those of the model included.

    On a CPU PyTorch's profiler counts them, which takes longer than the run: do not time such a run.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.cuda = device.type == "cuda"
        if not self.cuda:
            # above its highest level libkineto no longer reports every start, and missing GPUs, to stderr
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
            self.held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.profile.__enter__()
        return self

    def __exit__(self, *exception):
        if self.cuda:
            self.bytes = torch.cuda.max_memory_allocated()
            return
        self.profile.__exit__(*exception)
        events = [event for event in self.profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        self.bytes = self.held + peak


def measured(run: Callable[[Stopwatch], Tensor], model: nn.Module, device: torch.device, with_peak: bool) -> Outcome:
    """The `Outcome` of run(stopwatch), which returns sequences (batch, seqlen)."""
    stopwatch = Stopwatch(device)
    memory = PeakMemory(model, device) if with_peak else None
    with memory or contextlib.nullcontext(), stopwatch:
        sequences = run(stopwatch)
    return Outcome(stopwatch.seconds, sequences.tolist(), stopwatch.steps(), memory and memory.bytes)


def fill_random(model: nn.Module, seed: int) -> nn.Module:
    """Gives all parameters random values that depend on their names, shapes, dtype and device only; returns the model.

    Matrices are normal. Their standard deviation is the usual 0.02 at hidden size 4096 and larger in smaller models, so
    that attention and predictions are about as far from uniform. Biases become 0, norms 1.
    """
    hidden = next(parameter.shape[1] for parameter in model.parameters() if parameter.dim() == 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                generator = torch.Generator(parameter.device).manual_seed(seed + zlib.crc32(name.encode()))
                parameter.normal_(std=0.02 * (4096 / hidden) ** 0.5, generator=generator)
            else:
                parameter.fill_(0 if name.endswith("bias") else 1)
    return model


# ---- the peers


class Peer:
    """Someone else's system in the user's folder, for one family."""

    def __init__(self, folder: str, family: str):
        self.folder, self.family = Path(folder).resolve(), family

    def classes(self) -> tuple[type, type]:
        """The classes of the model and of its config."""
        raise NotImplementedError

    def policies(self) -> Policies:
        """label -> function of (model, request) that generates with this policy and returns sequences."""
        raise NotImplementedError

    def load(self, module: str, below: str = "") -> types.ModuleType:
        """Imports one of their modules from a path below the folder."""
        path = str(self.folder / below)
        if path not in sys.path:
            sys.path.insert(0, path)
        return importlib.import_module(module)


class Official(Peer):
    def classes(self) -> tuple[type, type]:
        below, stem = ("llada_v2", "llada") if self.family == "LLaDA" else ("dream", "dream")
        # their files import one another relatively
        package = sys.modules["official"] = types.ModuleType("official")
        package.__path__ = [str(self.folder / below)]
        modeling = self.load(f"official.modeling_{stem}")
        if self.family == "LLaDA":
            return modeling.LLaDAModelLM, modeling.LLaDAConfig
        return modeling.DreamModel, modeling.DreamConfig

    def policies(self) -> Policies:
        if self.family == "Dream":
            return {"NoCache": dream_generate}
        generate = self.load("llada_generate").generate
        return {"NoCache": lambda model, request: generate(model, request["prompt"], **llada_arguments(model, request))}


class DKVCache(Peer):
    def classes(self) -> tuple[type, type]:
        if self.family == "LLaDA":
            modeling = self.load("models.modeling_llada_dkv_cache_decode")
            return modeling.LLaDAModelLM, modeling.LLaDAConfig
        modeling = self.load("models.modeling_dream")
        return modeling.DreamModel, modeling.DreamConfig

    def policies(self) -> Policies:
        if self.family == "Dream":
            return {"Decode": self._dream("decoded"), "Prefill": self._dream("prefill")}
        generate = self.load("generation_utils.llada_dkv_cache_decode").generate

        def decode(model, request):
            arguments = llada_arguments(model, request) | {"cache_reloading_step": request["interval"]}
            return generate(model, None, request["prompt"], enable_cache=True, **arguments)

        return {"Decode": decode}

    @staticmethod
    def _dream(kind):
        def run(model, request):
            cache = {"use_cache": True, "cache_type": kind, "cache_steps": request["interval"], "shift_type": "un"}
            return dream_generate(model, request, **cache)

        return run


class FastDLLM(Peer):
    def classes(self) -> tuple[type, type]:
        if self.family == "LLaDA":
            modeling = self.load("model.modeling_llada", below="llada")
            return modeling.LLaDAModelLM, modeling.LLaDAConfig
        modeling = self.load("model.modeling_dream", below="dream")
        mixin = self.load("model.generation_utils_block", below="dream").DreamGenerationMixin
        # as their evaluation does
        modeling.DreamModel.diffusion_generate = mixin.diffusion_generate
        modeling.DreamModel._sample = mixin._sample
        return modeling.DreamModel, modeling.DreamConfig

    def policies(self) -> Policies:
        if self.family == "Dream":
            return {"PrefixCache": self._dream(dual=False), "DualCache": self._dream(dual=True)}
        loops = self.load("generate", below="llada")
        return {
            "PrefixCache": self._llada(loops.generate_with_prefix_cache),
            "DualCache": self._llada(loops.generate_with_dual_cache),
        }

    @staticmethod
    def _llada(loop):
        def run(model, request):
            arguments = llada_arguments(model, request) | {"threshold": request["threshold"]}
            return loop(model, one_sequence(request["prompt"]), **arguments)[0]

        return run

    @staticmethod
    def _dream(dual):
        def run(model, request):
            one_sequence(request["prompt"])
            options = {"block_length": request["block_length"], "dual_cache": dual}
            if request["threshold"] is not None:
                options |= {"threshold": request["threshold"], "alg": "confidence_threshold"}
            return dream_generate(model, request, **options)

        return run


PEERS = {"official": Official, "dkv-cache": DKVCache, "fast-dllm": FastDLLM}


def one_sequence(prompt: Tensor) -> Tensor:
    if len(prompt) > 1:
        raise ValueError(f"it generates one sequence at a time, not {len(prompt)}.")
    return prompt


def llada_arguments(model: nn.Module, request: Request) -> dict[str, Any]:
    """The arguments that LLaDA's own loop shares with the loops made from it."""
    names = ("gen_length", "block_length", "steps")
    return {name: request[name] for name in names} | {"mask_id": model.config.mask_token_id, "temperature": 0.0}


def dream_generate(model: nn.Module, request: Request, **options: Any) -> Tensor:
    # transformers 4 replaces omitted options by defaults, such as top_k 50
    settings = {"temperature": 0.0, "top_p": None, "top_k": None, "alg": "entropy", "alg_temp": 0.0}
    settings |= {"max_new_tokens": request["gen_length"], "steps": request["steps"]}
    return model.diffusion_generate(request["prompt"], return_dict_in_generate=True, **settings | options).sequences


def build(
    classes: tuple[type, type], config: dict, *, seed: int, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Their model, filled, on its device in its dtype. It is not initialised first, which would take minutes."""
    model_class, config_class = classes
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(device)
            for layer in (nn.Linear, nn.Embedding):
                stack.enter_context(mock.patch.object(layer, "reset_parameters", lambda self: None))
            stack.enter_context(mock.patch.object(model_class, "_init_weights", lambda self, module: None))
            model = model_class(config_class(**config))
    finally:
        torch.set_default_dtype(default)
    # not to(dtype): buffers, such as RoPE frequencies, stay in float32
    return fill_random(model.to(device).eval(), seed)


def exclude(token_id: int, head: nn.Module, inputs: tuple, logits: Tensor) -> None:
    """A forward hook of the head: the token's logit becomes minus infinity."""
    logits[..., token_id] = float("-inf")


class Driver:
    """Answers requests."""

    def __init__(self, name: str, folder: str):
        self.name, self.folder = name, folder
        self.stopwatch = None

    def answer(self, request: Request) -> dict[str, Any]:
        return dataclasses.asdict(self.generate(request)) if "prompt" in request else self.set_up(request)

    def set_up(self, request: Request) -> dict[str, Any]:
        self.device = torch.device(request["device"])
        peer = PEERS[self.name](self.folder, request["family"])
        model = build(
            peer.classes(),
            request["config"],
            seed=request["seed"],
            dtype=getattr(torch, request["dtype"]),
            device=self.device,
        )
        mask_id = request["config"]["mask_token_id"]
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.out_features == request["config"]["vocab_size"]:
                module.register_forward_hook(functools.partial(exclude, mask_id))
        model.register_forward_pre_hook(self._on_forward, with_kwargs=True)
        self.model, self.policies = model, peer.policies()
        return {"policies": list(self.policies), "transformers": sys.modules["transformers"].__version__}

    def _on_forward(self, module, inputs, arguments):
        ids = arguments["input_ids"] if "input_ids" in arguments else inputs[0]
        self.stopwatch.step(ids.numel())

    def generate(self, request: Request) -> Outcome:
        request["prompt"] = torch.tensor(request["prompt"], device=self.device)
        loop = self.policies[request["policy"]]

        def run(stopwatch):
            self.stopwatch = stopwatch
            return loop(self.model, request)

        return measured(run, self.model, self.device, request["with_peak"])


def main(name: str, folder: str) -> None:
    # their modules have such names too: none of this folder may be imported in their place
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    sys.dont_write_bytecode = True
    answers = os.fdopen(os.dup(1), "w")
    # their prints must not mix with the answers
    os.dup2(2, 1)
    driver = Driver(name, folder)
    for line in sys.stdin:
        try:
            answer = driver.answer(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
