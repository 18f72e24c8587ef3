"""Every public name as a user's type checker sees it: `make lint` runs mypy on this file, nothing executes it."""

from collections.abc import Iterator

from torch import Tensor, nn
from typing_extensions import assert_type

import dkv
from dkv import kernels
from dkv.kernels.noise import noise_key
from dkv.models import LLaDA, NativeModel
from dkv.schedule import Forecast
from dkv.state import State


class EveryOther(dkv.Policy):
    def active(self, state: State) -> Tensor:
        return state.masked | (state.step % 2 == 0)

    def max_active(self, forecast: Forecast) -> int:
        return forecast.length if forecast.step % 2 == 0 else forecast.masks_before(0)


def generation(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> None:
    policies: list[dkv.Policy] = [
        dkv.NoCache(),
        dkv.Decode(8, delay=1, warmup_steps=1, shift="un", scope="block"),
        dkv.Greedy(2, 4, window_kind="contiguous"),
        dkv.Prefill(),
        dkv.PrefillDecode(4, shift="right"),
        dkv.PrefixCache(),
        dkv.DualCache(),
        EveryOther(),
    ]
    config = dkv.GenerateConfig(gen_length=64, policy=policies[0], remasking="entropy")
    assert_type(config.steps, int | None)
    output = dkv.generate(model, input_ids, attention_mask, gen_length=64, policy="DualCache", block_length=32)
    assert_type(output, dkv.GenerateOutput)
    dkv.generate(model, {"input_ids": input_ids, "attention_mask": attention_mask})
    dkv.generate(model, input_ids, genlength=64)  # type: ignore[arg-type]
    assert_type(output.sequences, Tensor)
    assert_type(output.history, Tensor | None)
    stats: dkv.GenerateStats = output.stats
    assert_type(stats.cache_ratio, float)
    assert_type(stats.tokens_per_second, float)
    dkv.plot_history(output)


def streaming(model: nn.Module, input_ids: Tensor) -> None:
    def show(step: dkv.StreamStep) -> None:
        assert_type(step.prefix, Tensor)

    dkv.generate(model, input_ids, callback=show)
    steps = dkv.stream(model, input_ids, gen_length=64)
    assert_type(next(steps), dkv.StreamStep)
    steps.close()


def texts(model: nn.Module, tokenizer: object) -> None:
    prompts: list[str | list[dict[str, str]]] = ["a", [{"role": "user", "content": "b"}]]
    assert_type(dkv.generate_texts(model, tokenizer, prompts, batch_size=4, gen_length=64), Iterator[str])
    assert_type(dkv.generate_texts(model, tokenizer, prompts, ordered=False), Iterator[tuple[int, str]])
    dkv.generate_texts(model, tokenizer, None)  # type: ignore[call-overload]


def own_loop(model: nn.Module, ids: Tensor) -> None:
    dkv.register()
    native = dkv.from_pretrained("folder", dtype="bfloat16", device="cpu", revision="main", local_files_only=True)
    dkv.from_pretrained("folder", device_map="cuda")  # type: ignore[arg-type]
    assert_type(native, NativeModel)
    assert_type(dkv.replace_attention(native, dkv.Decode(8), block_length=32, impl="auto"), NativeModel)
    assert_type(dkv.replace_attention(model), nn.Module)
    assert_type(dkv.restore_attention(native), NativeModel)
    dkv.reset(model)
    stats: dkv.PatchStats = dkv.stats(model)
    assert_type(stats.original, dict[str, int])
    assert isinstance(native, LLaDA)
    assert_type(native.generate({"input_ids": ids}, max_new_tokens=8), dkv.GenerateOutput)


def attention(q: Tensor, k: Tensor, cos: Tensor, active: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    slots, cu_seqlens = kernels.pack_positions(active, capacity=32, impl="reference")
    q = assert_type(kernels.rope_cache_update(q, k, k, cos, cos, slots, slots, k_cache, v_cache), Tensor)
    # one tensor or two, an int or a tensor: neither use of the results needs a check
    attended = kernels.delayed_attention(q, k_cache, v_cache, cu_seqlens, key_mask=active)  # type: ignore[misc]
    rows(attended, q, q, noise_key(0, slots), slots, k_cache)  # type: ignore[misc]


def rows(x: Tensor, residual: Tensor, weight: Tensor, ids: Tensor, slots: Tensor, cache: Tensor) -> None:
    assert_type(kernels.add_rms_norm(x, residual, weight, 1e-5), Tensor)
    assert_type(kernels.add_rms_norm(x, None, weight, 1e-5), Tensor)
    assert_type(kernels.swiglu(x), Tensor)
    found = kernels.lm_head_confidence(x, weight, logit_scale=2.0, noise_scale=x, noise_key=ids, exclude_ids=range(2))
    assert_type(found, kernels.Confidence)
    assert_type(found.log_prob, Tensor)
    assert_type(kernels.commit_tokens(ids, found.token, found.log_prob, slots, slots, slots, threshold=0.9), Tensor)
    normed = kernels.deferred_norm(x, weight)
    assert_type(normed, kernels.DeferredNorm)
    assert_type(kernels.linear_swiglu(normed, 1e-5, weight), Tensor)
    assert_type(kernels.linear_add_norm(x, weight, residual, weight), kernels.DeferredNorm)
    q = kernels.linear_rope_cache_update(normed, 1e-5, weight, None, x, x, ids, slots, cache, cache)
    assert_type(q, Tensor)
    assert_type(kernels.reference.swiglu(x), Tensor)
