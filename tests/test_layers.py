"""`dkv.layers.Fused`: models on our own products give the tokens of `Library`, in `generate` and in a user's loop."""

from types import SimpleNamespace
from unittest import mock

import oracle
import pytest
import tiny
import torch
from tiny import FAMILIES, POLICIES, generate, prompts
from torch import nn
from utils import assert_within_error_budget, pairwise

import dkv
from benchmarks.harness.fake_gpu import fake_gpu, fake_model, fake_run
from dkv import model_runner
from dkv.generation import prepare
from dkv.kernels import configs, reference
from dkv.kernels.direct import TRITON
from dkv.layers import NORM_EPS, Fused
from dkv.models import view_of
from dkv.sampling import Sampler

CASES = [(family, name) for family in ("llada", "dream") for name in oracle.cases(family)]
PRODUCTS = ("deferred_norm", "linear_rope_cache_update", "linear_add_norm", "linear_swiglu")
# float16 moves the scores of the recorded models, whose logits are about 5, by this much
TIE = 0.02


def few(cases, count):
    """Parameters for all cases; the default run takes `count` of them."""
    every = len(cases) // count
    return [
        pytest.param(*case, marks=() if i % every == every // 2 else pytest.mark.full) for i, case in enumerate(cases)
    ]


@pytest.mark.parametrize("family, name", few(CASES, 6))
def test_tokens_are_those_of_the_authors_code(family, name, device):
    """In float32."""
    output = oracle.run(family, name, device, fused_products=True)
    oracle.assert_same_trajectory(family, name, output.history, output.active)


@pytest.mark.full
@pytest.mark.parametrize(
    "family, name", [case for case in CASES if len(oracle.recorded(*case, "x")) <= 12], ids=lambda value: value
)
def test_half_precision_tokens_are_those_of_the_library(family, name, device, monkeypatch):
    """Up to the first tie; the kernels of the products run in float16."""
    monkeypatch.setattr(model_runner, "direct", only_products_by_kernels)
    # no graphs, because the twins synchronise with the device
    ways = [scored(family, name, device, fused_products=fused, cuda_graphs=False) for fused in (True, False)]
    (fused, fused_scores), (library, library_scores) = ways
    assert torch.equal(fused.active[0], library.active[0])
    for step, (one, other) in enumerate(zip(fused_scores, library_scores, strict=True)):
        # infinite ones are equal
        assert torch.all((one == other) | ((one - other).abs() <= TIE)), f"step {step}"
        if not torch.equal(fused.history[step], library.history[step]):
            break


def only_products_by_kernels(impl, tensor):
    return SimpleNamespace(**vars(reference) | {name: vars(TRITON)[name] for name in PRODUCTS})


def scored(family, name, device, **options):
    """(output, scores of the candidates at each step) of a case in float16."""
    scores, predict = [], Sampler.predict

    def recorded(self, *args, **options):
        found = predict(self, *args, **options)
        scores.append(found[1].cpu())
        return found

    with mock.patch.object(Sampler, "predict", recorded):
        return oracle.run(family, name, device, dtype=torch.float16, **options), scores


TWO_LAYERS = {"llada": {"n_layers": 2}, "dream": {"num_hidden_layers": 2}}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_pass_is_within_the_error_budget(family, device, monkeypatch):
    """The hidden states of its candidates, and the cache of its last layer."""
    monkeypatch.setattr(model_runner, "direct", only_products_by_kernels)
    passes, forward = [], model_runner.ModelRunner.__call__

    def recorded(self, active, cache, max_seqlen, wanted):
        hidden = forward(self, active, cache, max_seqlen, wanted)
        passes.append((hidden.clone(), wanted))
        return hidden

    monkeypatch.setattr(model_runner.ModelRunner, "__call__", recorded)
    ids, valid = prompts(9, 6, device=device)
    tokens, found = {}, {}
    for name, dtype, fused in (
        ("fused", torch.float16, True),
        ("library", torch.float16, False),
        ("exact", torch.float64, False),
    ):
        llm = tiny.tiny_model(family, dtype=torch.float16, device=device, **TWO_LAYERS[family]).to(dtype)
        for layer in view_of(llm).layers:
            for norm, eps in zip(layer.norms, (0.1, 0.3), strict=True):
                setattr(norm, NORM_EPS[type(norm).__name__], eps)
        options = {"gen_length": 6, "policy": dkv.Decode(8), "remasking": "random", "fused_products": fused}
        options |= {"generator": torch.Generator().manual_seed(0), "cuda_graphs": False}
        with torch.no_grad(), prepare(llm, ids, valid, **options) as run:
            for _ in range(3):
                run.step()
                # all runs go on from the tokens of the first
                run.state.x.copy_(tokens.setdefault(run.steps, run.state.x.clone()))
        hidden, wanted = passes[-1]
        # the columns of the shorter row
        caches = [cache[:, -12:] for cache in (run.cache.k[-1], run.cache.v[-1])]
        found[name] = [hidden[: int(wanted.cu_seqlens[-1])], *caches]
    for fused, exact, library in zip(found["fused"], found["exact"], found["library"], strict=True):
        assert_within_error_budget(fused, exact, library)


@pairwise(
    "family, policy, options",
    FAMILIES,
    ["NoCache", "Decode", "Greedy", "DualCache"],
    [{}, {"cfg_scale": 1.5, "temperature": 0.7}, {"steps": None, "threshold": 0.02}, {"eos_early_stop": True}],
    where=lambda family, policy, options: not ("Greedy" in policy and ("threshold" in options)),
)
def test_tokens_are_those_of_the_library(family, policy, options, device):
    """In float32, for a ragged batch."""
    ids, valid = prompts(9, 4, 7, device=device)
    chosen = POLICIES[policy](family)
    options = {"gen_length": 12, "block_length": 6, "policy": chosen} | options
    options["remasking"] = "random" if chosen.needs_order else None
    fused, library = (generate(family, ids, valid, device, fused_products=way, **options) for way in (True, False))
    assert torch.equal(fused.history, library.history) and torch.equal(fused.active, library.active)


@pytest.mark.parametrize("family, loop", [("llada", tiny.llada_loop), ("dream", tiny.dream_loop)])
def test_the_table_decides_for_how_many_rows_products_are_fused(family, loop, device, monkeypatch):
    """In `generate` and in a user's loop."""
    asked = []

    def pays(device, dtype, rows, products):
        asked.append(rows)
        return rows < 40

    monkeypatch.setattr(configs, "fused_products_pay", pays)
    ids, valid = prompts(16, 16, device=device)
    options = {"gen_length": 8, "policy": dkv.Decode(3)}
    chosen, library = (generate(family, ids, valid, device, fused_products=way, **options) for way in (None, False))
    assert torch.equal(chosen.history, library.history)
    assert {rows < 40 for rows in asked} == {True, False}

    asked.clear()
    llm, options = tiny.tiny_model(family, device=device), {"gen_length": 8, "steps": 8}
    options |= {"block_length": 8} if family == "llada" else {}
    dkv.replace_attention(llm, dkv.Decode(3))
    history = loop(llm, ids, **options)
    assert {rows < 40 for rows in asked} == {True, False}
    monkeypatch.undo()
    dkv.reset(llm)
    assert torch.equal(history, loop(llm, ids, **options))


def test_only_products_of_few_rows_are_fused():
    view = view_of(tiny.tiny_model("llada"))
    asked, left_to_the_table, refused = (model_runner.ModelRunner(view, 64, "auto", way) for way in (True, None, False))
    rows = configs.MAX_PRODUCT_ROWS
    assert isinstance(asked.way_for(rows), Fused) and asked.way_for(rows + 1) is asked.library
    # no GPU has shown anything for float32
    assert left_to_the_table.way_for(1) is left_to_the_table.library and refused.way_for(1) is refused.library


def add_bias(*names):
    def change(layers):
        for name in names:
            module = getattr(layers[0], name)
            module.bias = nn.Parameter(torch.zeros(module.out_features))

    return change


def transpose(layers):
    layers[0].down.weight = nn.Parameter(layers[0].down.weight.detach().t().contiguous().t())


def share(layers):
    layers[0].q.weight = layers[1].q.weight


UNSUPPORTED = {
    "o with a bias": add_bias("o"),
    "down with a bias": add_bias("down"),
    "gate and up with biases": add_bias("gate", "up"),
    "another dtype": lambda layers: layers[1].o.double(),
    "a weight that is not contiguous": transpose,
    "shared weights": share,
    "a hook on a linear layer": lambda layers: layers[0].o.register_forward_hook(print),
    "a hook on a norm": lambda layers: layers[1].mlp_norm.register_forward_hook(print),
}


@pytest.mark.parametrize("change", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_layers_are_refused_or_left_to_the_library(change):
    """Refused with fused_products=True, left to the library otherwise."""
    llm = tiny.tiny_model("llada")
    model_runner.ModelRunner(view_of(llm), 64, "auto", True)
    change(view_of(llm).layers)
    assert_refused(view_of(llm))


def test_a_headdim_without_kernels_is_refused():
    assert_refused(view_of(tiny.tiny_model("llada", d_model=96)))


def assert_refused(view):
    with pytest.raises(ValueError, match="fused_products=True needs, in every layer, plain nn.Linear"):
        model_runner.ModelRunner(view, 64, "auto", True)
    assert model_runner.ModelRunner(view, 64, "auto", None).fused is None


@pytest.mark.parametrize("arch, pdl", [(90, False), (90, True), (80, True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_of_a_layer_waits_for_the_one_in_front(family, arch, pdl, monkeypatch):
    """By PDL, on GPUs that have it, from the first product to the last."""
    monkeypatch.setattr(configs, "PDL", pdl)
    with fake_gpu(arch) as launches, torch.no_grad():
        llm = fake_model(CONFIGS[family]())
        run = fake_run(llm, dkv.Decode(8), batch=1, prompt=48, gen_length=16, fused_products=True)
        run.steps = 3
        launches.clear()
        run.compute(run.next_room())
    kernels = [one for one in launches if hasattr(one, "arguments")]
    names = [one.name for one in kernels]
    first = names.index("linear_rope_cache")
    last = len(names) - 1 - names[::-1].index("linear_add_norm")
    assert {one.arguments.get("launch_pdl") for one in kernels[first : last + 1]} == {pdl and arch >= 90}
    assert {one.arguments["PDL"] for one in kernels[first : last + 1]} == {pdl and arch >= 90}
    assert not any(one.arguments.get("launch_pdl") for one in kernels[:first] + kernels[last + 1 :])


CONFIGS = {
    "llada": lambda: tiny.llada_config(d_model=256, n_heads=2, n_kv_heads=2),
    "dream": lambda: tiny.dream_config(hidden_size=256, num_attention_heads=2, num_key_value_heads=1),
}
