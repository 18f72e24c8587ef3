"""`replace_attention` under a user's own loop: on native models, and on the hub's own files where they are at hand."""

import copy
import functools

import hub
import oracle
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import MASK_ID as MASK
from tiny import dream_loop, llada_loop, prompts

import dkv
from dkv.memory import memory_of
from dkv.models import view_of

LLADAS, DREAMS = ["LLaDA", "llada_lookalike", "llada_v1", "llada_v2"], ["Dream", "dream_lookalike", "dream"]
NAMES = LLADAS + DREAMS
WEIGHTS = {"llada": oracle.weights_path("llada_mha_s0"), "dream": oracle.weights_path("dream_gqa_s0")}


def load(name):
    """LLaDA, Dream: native; lookalikes of the hub's; the others: the hub's own files, or the test is skipped."""
    weights = WEIGHTS[name.split("_")[0].lower()]
    if name in hub.KINDS:
        return hub.load(name, weights)
    native = dkv.from_pretrained(weights, dtype=torch.float32, device="cpu")
    return tiny.Lookalike(native) if name.endswith("lookalike") else native


def shifted(model):
    return view_of(model).family.shifted


@pytest.fixture
def model(request):
    """A model of the name that the test is parametrised with, unpatched before and after."""
    model = cached(request.param)
    yield model
    dkv.restore_attention(model)


cached = functools.cache(load)
each = functools.partial(pytest.mark.parametrize, "model", indirect=True)


LLADA_RUN = {"gen_length": 16, "block_length": 8, "steps": 8}
DREAM_RUN = {"gen_length": 12, "steps": 6}


@each(LLADAS)
@pytest.mark.parametrize(
    "policy",
    [
        dkv.Decode(1),
        dkv.Decode(3),
        dkv.Decode(None, scope="block"),
        dkv.Prefill(),
        dkv.PrefillDecode(2),
        dkv.PrefixCache(),
        dkv.DualCache(),
    ],
    ids=repr,
)
def test_llada_loop_is_generate(model, policy):
    """The user's loop on the patched model: the tokens of `dkv.generate` with the same policy."""
    ids, _ = prompts(9, 9)
    expected = dkv.generate(model, ids, policy=policy, output_history=True, **LLADA_RUN)
    dkv.replace_attention(model, policy, block_length=8)
    assert torch.equal(llada_loop(model, ids, **LLADA_RUN), expected.history)


@each(DREAMS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "policy",
    [
        dkv.Decode(1),
        dkv.Decode(3),
        dkv.Decode(4, shift="un"),
        dkv.Decode(4, shift="right"),
        dkv.Prefill(),
        dkv.PrefillDecode(2),
    ],
    ids=repr,
)
def test_dream_loop_recomputes_what_it_reads(model, policy, padded):
    """Every shifted logit of a mask is of this step: no NaN reaches the loop, and interval rules are generate's."""
    ids, real = prompts(9, 5) if padded else (prompts(9, 9)[0], None)
    dkv.replace_attention(model, policy)
    history = dream_loop(model, ids, real, **DREAM_RUN)
    assert not (history[-1] == MASK).any()
    options = {"gen_length": 8, "remasking": "maskgit_plus", "output_history": True, "threshold": 1.0}
    dkv.restore_attention(model)
    if policy == dkv.Decode(1):
        assert torch.equal(history, dream_loop(model, ids, real, **DREAM_RUN))
    one_at_a_time = dkv.generate(model, ids, real, policy=policy, **options)
    dkv.replace_attention(model, policy)
    loop = dream_loop(model, ids, real, gen_length=8, steps=8)
    assert torch.equal(loop, one_at_a_time.history)


@each(NAMES)
@pytest.mark.parametrize("policy", [dkv.NoCache(), dkv.Decode(1)], ids=repr)
def test_no_cache_is_the_model_itself(model, policy):
    ids, real = prompts(9, 9)[0], None
    loop = (
        functools.partial(dream_loop, **DREAM_RUN)
        if "ream" in type(model).__name__
        else functools.partial(llada_loop, **LLADA_RUN)
    )
    expected = loop(model, ids, real)
    assert torch.equal(loop(dkv.replace_attention(model, policy), ids, real), expected)


@each(LLADAS)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.2])
def test_llada_padding_as_the_wrapped_file_has_it(model, cfg_scale):
    """The first revision ignores attention_mask, the second honours it; uncached and patched alike, with guidance too."""
    ids, real = prompts(9, 5)
    ids[1, :4] = torch.tensor([1, 2, 3, 4])
    run = LLADA_RUN | {"cfg_scale": cfg_scale}
    with_mask = llada_loop(model, ids, real.long(), **run)
    honoured = not torch.equal(with_mask, llada_loop(model, ids, **run))
    assert honoured == ("llada_v1" not in type(model).__module__) == view_of(model).honours_attention_mask
    dkv.replace_attention(model, dkv.Decode(1))
    assert torch.equal(llada_loop(model, ids, real.long(), **run), with_mask)
    right = torch.flip(real, (1,))
    dkv.restore_attention(model)
    expected = llada_loop(model, ids, right.long(), **run)
    dkv.replace_attention(model, dkv.Decode(1))
    assert torch.equal(llada_loop(model, ids, right.long(), **run), expected)
    dkv.replace_attention(model, dkv.Decode(4), block_length=8)
    cached_run = llada_loop(model, ids, real.long(), **run)
    assert not (cached_run[-1] == MASK).any()
    dkv.restore_attention(model)
    if honoured and not cfg_scale:
        ours = dkv.generate(model, ids, real, policy=dkv.Decode(4), output_history=True, **run)
        assert torch.equal(cached_run, ours.history)


def is_full(logits):
    return not logits.isnan().any()


@each(NAMES)
def test_anything_but_the_next_step_is_a_full_step(model):
    """A changed prompt under the same shape, a mask put back, another batch, mask, dtype or a finished run: never stale."""
    ids, real = prompts(12, 12, seed=3)
    x = F.pad(ids, (0, 8), value=MASK)
    step1 = x.clone()
    step1[:, 13] = 7
    step2 = step1.clone()
    step2[:, 14] = 9
    other_prompt = step2.clone()
    other_prompt[1, 2] = (other_prompt[1, 2] + 1) % 200
    remasked = step2.clone()
    remasked[0, 13] = MASK
    retold = step2.clone()
    retold[0, 13] = 8
    done = step2.clone()
    done[done == MASK] = 5

    def call(x):
        with torch.no_grad():
            return model(x).logits

    for changed in (other_prompt, remasked, retold, step2[:1], step2[:, :-1], x, done):
        expected = call(changed)
        dkv.replace_attention(model, dkv.Decode(None, warmup_steps=1))
        assert is_full(call(x)) and not is_full(call(step1)) and not is_full(call(step2))
        got = call(changed)
        assert is_full(got)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        dkv.reset(model)
        assert is_full(call(step2))
        dkv.restore_attention(model)


@each(["LLaDA", "llada_lookalike", *DREAMS])
def test_a_changed_attention_mask_is_a_full_step(model):
    ids, real = prompts(12, 7)
    x = F.pad(ids, (0, 8), value=MASK)
    masks = [F.pad(real, (0, 8), value=True) for _ in range(2)]
    masks[1] = masks[1].clone()
    masks[1][1, 5] = False
    if shifted(model):
        masks = [m[:, None, None] & m[:, None, :, None] for m in masks]
    later = x.clone()
    later[:, 14] = 3
    dkv.replace_attention(model, dkv.Decode(None, warmup_steps=1))
    with torch.no_grad():
        assert is_full(model(x, masks[0]).logits[0])
        assert not is_full(model(later, masks[0].clone()).logits[0]), "an equal mask is the same mask"
        assert is_full(model(later, masks[1]).logits[0])


@each(NAMES)
def test_undo_is_complete(model):
    """Nothing of ours stays on the instance, and nothing ever was on the class or anywhere global."""
    attributes, names = dict(model.__dict__), [name for name, _ in model.named_modules()]
    tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    class_attributes = dict(type(model).__dict__)
    assert dkv.replace_attention(model, dkv.Decode(8), block_length=4) is model
    assert "dkv=Decode(refresh_interval=8" in repr(model) and "block_length=4" in repr(model)
    dkv.replace_attention(model, "NoCache")
    assert repr(model).count("dkv=") == 1 and "dkv=NoCache()" in repr(model)
    assert [name for name, _ in model.named_modules()] == names and dict(type(model).__dict__) == class_attributes
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == tensors
    assert dkv.restore_attention(model) is model and dict(model.__dict__) == attributes
    assert dkv.restore_attention(model) is model and "dkv=" not in repr(model)
    dkv.reset(model)
    with pytest.raises(ValueError, match="Linear is not supported"):
        dkv.reset(torch.nn.Linear(2, 2))


@each(NAMES)
def test_merged_weights_are_the_models_own(model, tmp_path, monkeypatch):
    """While patched, Q, K, V and gate, up lie next to each other: the same objects, names and values; then separate."""
    parameters = dict(model.named_parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = F.pad(prompts(6)[0], (0, 4), value=MASK)
    dkv.replace_attention(model, dkv.Decode(8))
    with torch.no_grad():
        model(x)
    q, k = (getattr(view_of(model).layers[0], name).weight for name in "qk")
    assert q.data_ptr() + q.nbytes == k.data_ptr(), "nothing was merged"
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    state = model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)
    if hasattr(model, "save_pretrained"):
        # transformers 4.57 passes an argument that the file of Dream does not know
        monkeypatch.setattr(type(model.generation_config), "validate", lambda *args, **options: None)
        model.save_pretrained(tmp_path)
        saved = {}
        for file in tmp_path.glob("*.safetensors"):
            saved |= load_file(file)
        assert all(torch.equal(saved[name], before[name]) for name in before)
    dkv.restore_attention(model)
    assert all(p is parameters[name] and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert q.data_ptr() + q.nbytes != k.data_ptr()


@each(NAMES)
@pytest.mark.parametrize("change", ["data", "moved", "in place", "hook"])
def test_stale_merged_weights_are_noticed(model, change):
    """Each way to change weights between two runs: the second run computes with the new ones."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    ids, _ = prompts(6)
    options = {"gen_length": 4, "policy": dkv.NoCache(), "output_history": True}
    calls, before = [], dkv.generate(model, ids, **options).sequences
    k = view_of(model).layers[1].k
    if change == "data":
        k.weight.data = torch.randn_like(k.weight) * 3
    elif change == "in place":
        with torch.no_grad():
            k.weight.copy_(torch.randn_like(k.weight) * 3)
    elif change == "hook":
        k.register_forward_hook(lambda module, args, output: calls.append(1) or output + torch.randn_like(output) * 3)
    else:
        model.double().float()
        k.weight.data.normal_(std=3)
    torch.manual_seed(0)
    x = torch.cat((ids, torch.full((1, 4), MASK)), dim=1)
    with torch.no_grad():
        expected = model(x).logits
    calls.clear()
    torch.manual_seed(0)
    dkv.replace_attention(model, dkv.Decode(1))
    with torch.no_grad():
        got = model(x).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert len(calls) == (change == "hook")
    dkv.restore_attention(model)
    # and in a run that would take over the memory of the first
    fresh = copy.deepcopy(model)
    torch.manual_seed(0)
    again = dkv.generate(model, ids, **options).sequences
    torch.manual_seed(0)
    assert torch.equal(again, dkv.generate(fresh, ids, **options).sequences) and again.shape == before.shape


@each(["LLaDA", "Dream"])
def test_calls_for_more_than_logits_run_the_original(model):
    x = F.pad(prompts(6)[0], (0, 4), value=MASK)
    expected = model(x).logits
    dkv.replace_attention(model, dkv.Decode(8))
    assert model(x).logits.requires_grad, "under grad mode the model's own forward runs"
    with torch.no_grad():
        model(x)
        assert memory_of(model).sessions.kept
        embeds = model.get_submodule("model.transformer.wte" if "LLaDA" in repr(model) else "model.embed_tokens")(x)
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected)
        assert not memory_of(model).sessions.kept, "and the session ends"
        model(x)
        model.train()
        torch.testing.assert_close(model(x).logits, expected)
        model.eval()
        assert not memory_of(model).sessions.kept
        with pytest.raises(ValueError, match="use_cache"):
            model(x, use_cache=True)


@each([name for name in NAMES if not name.endswith("lookalike")])
def test_return_type_and_fresh_logits(model):
    x = F.pad(prompts(6)[0], (0, 4), value=MASK)
    with torch.no_grad():
        kind = type(model(x))
        dkv.replace_attention(model, dkv.Decode(1))
        first = model(x)
        assert type(first) is kind
        logits = first.logits.clone()
        first.logits.fill_(float("nan"))
        assert torch.equal(model(x).logits, logits)


def test_several_models_at_once():
    """Interleaved calls, each with its own session; a deep copy is a patched model of its own."""
    ids, _ = prompts(9, 9)
    llada, dream = load("LLaDA"), load("Dream")
    alone = llada_loop(dkv.replace_attention(llada, dkv.Decode(3), block_length=8), ids, **LLADA_RUN)
    dkv.replace_attention(dream, dkv.Decode(3))
    twin = copy.deepcopy(llada)
    assert twin.forward.args == (twin,) and twin._dkv is not llada._dkv
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    x = F.pad(ids, (0, 16), value=MASK)

    class Interleaved:
        def __call__(self, x_now, **kwargs):
            dream(x)
            twin(x_now)
            return llada(x_now, **kwargs)

    assert torch.equal(llada_loop(Interleaved(), ids, **LLADA_RUN), alone)
    dkv.restore_attention(twin)
    assert not torch.equal(llada_loop(twin, ids, **LLADA_RUN), alone)


def test_weights_that_change_between_sessions_are_seen():
    """Nothing of the weights is kept: other dtypes, swapped tensors and replaced modules count from the next call."""
    model = dkv.replace_attention(load("LLaDA"), dkv.Decode(8))
    x = F.pad(prompts(6)[0], (0, 4), value=MASK)
    with torch.no_grad():
        before = model(x).logits
        block = model.get_submodule("model.transformer.blocks.0")
        block.q_proj = torch.nn.Linear(64, 64, bias=False)
        dkv.reset(model)
        changed = model(x).logits
        assert not torch.equal(changed, before)
        dkv.restore_attention(model)
        torch.testing.assert_close(changed, model(x).logits, atol=1e-5, rtol=1e-5)
        dkv.replace_attention(model, dkv.Decode(8))
        model(x)
        model.half()
        assert model(x).logits.dtype == torch.float16


def test_adapted_linears_work():
    """A LoRA-like wrapper around a projection is called as it is, in generate and under the user's loop."""

    class LowRank(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight = base, base.weight
            self.in_features, self.out_features = base.in_features, base.out_features
            self.low = torch.nn.Parameter(0.1 * torch.randn(base.out_features, base.in_features))

        def forward(self, x):
            return self.base(x) + F.linear(x, self.low)

    model = load("LLaDA")
    ids, _ = prompts(9, 9)
    plain = llada_loop(model, ids, **LLADA_RUN)
    for block in model.get_submodule("model.transformer.blocks"):
        block.q_proj, block.ff_out = LowRank(block.q_proj), LowRank(block.ff_out)
    adapted = llada_loop(model, ids, **LLADA_RUN)
    assert not torch.equal(adapted, plain)
    generated = dkv.generate(model, ids, policy=dkv.NoCache(), **LLADA_RUN)
    assert torch.equal(generated.sequences, adapted[-1])
    dkv.replace_attention(model, dkv.Decode(1))
    assert torch.equal(llada_loop(model, ids, **LLADA_RUN), adapted)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(policy="decode"), ValueError, "policy must be one of .*'Decode'.* got 'decode'"),
        (dict(policy=dkv.Decode), TypeError, "policy must be a dkv.Policy"),
        (dict(policy=dkv.Greedy()), ValueError, "a foreign loop does not say; use dkv.generate"),
        (dict(policy=dkv.DualCache()), ValueError, r"DualCache\(\) depends on blocks: pass the block_length"),
        (dict(policy=dkv.PrefixCache()), ValueError, "pass the block_length"),
        (dict(policy=dkv.Decode(8, scope="block")), ValueError, "pass the block_length"),
        (dict(policy=dkv.Decode(8, shift="un")), ValueError, "shift is about Dream's"),
        (dict(block_length=0), ValueError, "block_length must be at least 1, got 0"),
        (dict(block_length=8.0), TypeError, "block_length must be an int, got 8.0"),
        (dict(impl="fast"), ValueError, "impl must be one of"),
    ],
)
def test_bad_input(options, error, message):
    model = cached("LLaDA")
    with pytest.raises(error, match=message):
        dkv.replace_attention(model, **options)
    assert "_dkv" not in model.__dict__


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="Linear is not supported: dkv runs LLaDA"):
        dkv.replace_attention(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["llada_v1", "llada_v2"])
@pytest.mark.parametrize("case", ["plain", "mask", "guidance"])
def test_lladas_own_generate(name, case):
    """ML-GSAI's generate.py, unchanged, on the hub's file: uncached as it was, cached as `dkv.generate`."""
    model = load(name)
    ids, real = prompts(9, 9)
    generate = functools.partial(
        hub.module("llada_generate.py").generate, gen_length=16, block_length=8, steps=8, mask_id=MASK
    )
    options = {
        "mask": {"attention_mask": real.long()},
        "guidance": {"attention_mask": real.long(), "cfg_scale": 0.8},
    }.get(case, {})
    expected = generate(model, ids, **options)
    dkv.replace_attention(model, dkv.NoCache(), block_length=8)
    assert torch.equal(generate(model, ids, **options), expected)
    dkv.replace_attention(model, dkv.Decode(3), block_length=8)
    cached_tokens = generate(model, ids, **options)
    assert not (cached_tokens == MASK).any()
    if case != "guidance":
        dkv.restore_attention(model)
        ours = dkv.generate(model, ids, policy=dkv.Decode(3), **LLADA_RUN)
        assert torch.equal(cached_tokens, ours.sequences)


@pytest.mark.parametrize("padded", [False, True])
def test_dreams_own_diffusion_generate(padded):
    """diffusion_generate with its hooks, unchanged, on the hub's file."""
    model = load("dream")
    ids, real = prompts(9, 5 if padded else 9)
    seen = []

    def tokens_hook(step, x, logits):
        seen.append(step)
        return x

    def logits_hook(step, x, logits):
        assert not logits[x == MASK].isnan().any(), "the loop reads logits that were not recomputed"
        return logits

    def generate(**options):
        seen.clear()
        return model.diffusion_generate(
            ids,
            attention_mask=real.long(),
            max_new_tokens=16,
            steps=8,
            alg="entropy",
            temperature=0.0,
            top_k=None,
            top_p=None,
            generation_tokens_hook_func=tokens_hook,
            generation_logits_hook_func=logits_hook,
            **options,
        )

    expected = generate()
    dkv.replace_attention(model, dkv.NoCache())
    assert torch.equal(generate(), expected) and seen == [None, *range(8)]
    for policy in (dkv.Decode(4), dkv.Decode(4, shift="un"), dkv.Prefill(), dkv.PrefillDecode(4)):
        dkv.replace_attention(model, policy)
        cached_tokens = generate()
        dkv.restore_attention(model)
        ours = dkv.generate(model, ids, real, gen_length=16, steps=8, policy=policy)
        assert torch.equal(cached_tokens, ours.sequences)


@each(["LLaDA", "Dream"])
def test_attention_is_told_how_many_queries_a_row_has(model, monkeypatch):
    """Not how many all rows have together: on a GPU that decides the tiles."""
    from dkv.kernels import reference

    attend, bounds = reference.delayed_attention, []

    def told(q, *arguments, **options):
        bounds.append((options["max_seqlen_q"], q.shape[0]))
        return attend(q, *arguments, **options)

    monkeypatch.setattr(reference, "delayed_attention", told)
    dkv.replace_attention(model, dkv.Decode(8))
    prompt = prompts(20, 20, 20, 20)[0]
    if shifted(model):
        dream_loop(model, prompt, gen_length=8, steps=8)
    else:
        llada_loop(model, prompt, gen_length=8, block_length=8, steps=8)
    assert bounds[0] == (28, 4 * 28)
    cached = [(most, total) for most, total in bounds if total < 4 * 28]
    assert cached and all(total / 4 <= most <= min(9, total) for most, total in cached)
