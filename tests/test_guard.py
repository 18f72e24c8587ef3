"""A patched model that changes, fails or is shared in the middle of a session never returns stale logits."""

import copy
import functools
import io
import pickle
import threading
from types import SimpleNamespace

import oracle
import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import EOS_ID as EOS
from tiny import FAMILIES, llada_loop, model, prompts
from tiny import MASK_ID as MASK

import dkv
from dkv.guard import Fingerprint
from dkv.memory import memory_of
from dkv.models import view_of

# products of other numbers of rows round otherwise
assert_close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)


@pytest.fixture(params=FAMILIES)
def llm(request, device):
    """A model of the test's own."""
    return copy.deepcopy(model(request.param, device))


def call(llm, *, filled=0, seed=0, **options):
    """Logits of prompts and 8 masks, the first `filled` of which are filled in."""
    x = F.pad(prompts(9, 9, seed=seed, device=next(llm.parameters()).device)[0], (0, 8), value=MASK)
    x[:, 9 : 9 + filled] = 5
    with torch.no_grad():
        return llm(x, **options).logits


def untouched(llm):
    """A copy with the same weights and hooks that recomputes everything."""
    return dkv.restore_attention(copy.deepcopy(llm))


def scale_in_place(llm):
    with torch.no_grad():
        view_of(llm).layers[0].o.weight.mul_(1.5)


def load_in_place(llm):
    llm.load_state_dict({name: 1.1 * value for name, value in llm.state_dict().items()})


def assign(llm):
    llm.load_state_dict({name: 1.1 * value for name, value in llm.state_dict().items()}, assign=True)


def swap_data(llm):
    view_of(llm).layers[1].q.weight.data = 1.5 * view_of(llm).layers[1].q.weight.data


def swap_module(llm):
    view = view_of(llm)
    (path,) = (name for name, module in llm.named_modules() if module is view.layers[0].down)
    parent, _, name = path.rpartition(".")
    module = torch.nn.Linear(view.layers[0].down.in_features, view.layers[0].down.out_features, bias=False)
    setattr(llm.get_submodule(parent), name, module.to(llm.device))


def hook(llm):
    view_of(llm).layers[0].k.register_forward_hook(lambda module, args, output: 1.5 * output)


def pre_hook(llm):
    view_of(llm).layers[0].o.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))


CHANGES = [scale_in_place, load_in_place, assign, swap_data, swap_module, hook, pre_hook]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("filled", [0, 1], ids=["same sequence", "next step"])
def test_a_change_between_two_steps_is_seen(llm, change, filled):
    dkv.replace_attention(llm)
    call(llm), call(llm)
    change(llm)
    assert_close(call(llm, filled=filled), call(untouched(llm), filled=filled))


def test_a_change_of_a_buffer_is_seen(llm):
    norm = view_of(llm).layers[0].mlp_norm
    norm.register_buffer("scale", torch.tensor(1.0, device=llm.device))
    norm.register_forward_hook(lambda module, args, output: output * module.scale)
    dkv.replace_attention(llm)
    call(llm), call(llm)
    norm.scale.mul_(2)
    assert_close(call(llm, filled=1), call(untouched(llm), filled=1))


def test_steps_go_on_while_nothing_changes(llm):
    """Otherwise the tests above would prove nothing."""
    dkv.replace_attention(llm)
    call(llm)
    fingerprint = Fingerprint(list(llm.modules()), values=True)
    cached = [bool(call(llm, filled=filled).isnan().any()) for filled in range(1, 6)]
    assert fingerprint.unchanged() and any(cached)


@pytest.mark.parametrize("policy", [dkv.Decode(), dkv.Prefill()], ids=repr)
@pytest.mark.parametrize("failing", [0, 3], ids=["the first step", "a cached step"])
def test_after_a_failure_everything_is_computed(llm, policy, failing):
    expected = [call(llm, filled=filled) for filled in range(5)]
    calls = []

    def interrupt(module, args):
        calls.append(module)
        if len(calls) == failing + 1:
            raise KeyboardInterrupt

    view_of(llm).layers[1].up.register_forward_pre_hook(interrupt)
    dkv.replace_attention(llm, policy)
    for filled in range(failing):
        call(llm, filled=filled)
    with pytest.raises(KeyboardInterrupt):
        call(llm, filled=failing)
    assert_close(call(llm, filled=failing), expected[failing])


def test_two_threads_on_a_patched_model_get_the_right_logits(llm):
    """Each call is a step of the session or a full pass."""
    seeds = range(2)
    expected = [call(llm, seed=seed) for seed in seeds]
    dkv.replace_attention(llm, dkv.Decode(1))
    wrong, errors = [], []

    def loop(seed):
        try:
            for _ in range(12):
                if not torch.allclose(call(llm, seed=seed), expected[seed], atol=1e-4):
                    wrong.append(seed)
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=loop, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not errors


def pickled(llm):
    return pickle.loads(pickle.dumps(llm))


def saved(llm):
    file = io.BytesIO()
    torch.save(llm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_copy_in_the_middle_of_a_session_is_a_patched_model_of_its_own(llm, copied):
    dkv.replace_attention(llm, dkv.Decode(4), block_length=4)
    call(llm), call(llm, filled=1), call(llm, filled=2)
    other = copied(llm)
    told = "dkv=Decode(refresh_interval=4"
    assert memory_of(other).sessions is None and told in repr(other) and told in repr(llm)
    assert dkv.stats(llm).calls == 3 and dkv.stats(other).calls == 0, "it counts its own calls"
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    assert_close(call(other), call(untouched(other)))
    assert call(llm, filled=3).isnan().any(), "the session of the model goes on"
    assert "dkv=" not in repr(dkv.restore_attention(other))


def test_a_hook_that_would_be_skipped_is_an_error(llm):
    looped, ids = tiny.Lookalike(llm), prompts(9, device=llm.device)[0]
    name, block = next((n, m) for n, m in looped.named_modules() if n.endswith(".1"))
    expected = dkv.generate(looped, ids, gen_length=4).sequences
    dkv.replace_attention(looped)
    handle = block.register_forward_hook(lambda module, args, output: output)
    for attempt in (call, lambda llm: dkv.generate(llm, ids, gen_length=4)):
        with pytest.raises(ValueError, match=rf"{name} \(.*has a hook"):
            attempt(looped)
    handle.remove()
    block.forward = block.forward  # as accelerate leaves it
    assert torch.equal(dkv.generate(looped, ids, gen_length=4).sequences, expected)
    block.forward = functools.partial(type(block).forward, block)
    for attempt in (call, lambda llm: dkv.generate(llm, ids, gen_length=4)):
        with pytest.raises(ValueError, match=rf"{name} \(.*a replaced forward"):
            attempt(looped)
    del block.forward
    assert not call(looped).isnan().any()
    assert torch.equal(dkv.generate(looped, ids, gen_length=4).sequences, expected)


def test_a_hook_on_the_model_itself_runs_only_under_replace_attention(llm):
    """`generate` never calls the model, and refuses it."""
    seen, ids = [], prompts(9, device=llm.device)[0]
    llm.register_forward_hook(lambda *args: seen.append(args))
    with pytest.raises(ValueError, match=r"the model \(.*has a hook"):
        dkv.generate(llm, ids, gen_length=4)
    call(dkv.replace_attention(llm))
    assert len(seen) == 1


class Quantised(torch.nn.Module):
    """As libraries have it: integers and a scale; weight and bias are methods."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("qweight", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.linear_bias = None if linear.bias is None else linear.bias.detach()

    def weight(self):
        return self.qweight * self.scale

    def bias(self):
        return self.linear_bias

    def forward(self, x):
        return F.linear(x, self.weight(), self.bias())


def test_quantised_layers_and_head_are_called(llm):
    view = view_of(llm)
    chosen = {id(m) for layer in view.layers for m in layer.linears} | {id(view.head)}
    for path in [name for name, module in llm.named_modules() if id(module) in chosen]:
        parent, _, name = path.rpartition(".")
        setattr(llm.get_submodule(parent), name, Quantised(llm.get_submodule(path)))
    expected = [call(llm, filled=filled) for filled in range(3)]
    dkv.replace_attention(llm, dkv.Decode(1))
    for filled in range(3):
        assert_close(call(llm, filled=filled), expected[filled])


def test_autocast_does_not_apply(llm):
    ids = prompts(9, device=llm.device)[0]
    expected = dkv.generate(llm, ids, gen_length=8).sequences
    dkv.replace_attention(llm)
    logits = call(llm, filled=2)
    with torch.autocast(llm.device.type, dtype=torch.bfloat16):
        assert torch.equal(dkv.generate(llm, ids, gen_length=8).sequences, expected)
        dkv.reset(llm)
        assert torch.equal(call(llm, filled=2), logits)


def test_another_default_device_changes_nothing(llm):
    ids = prompts(9, device=llm.device)[0]
    expected = dkv.generate(llm, ids, gen_length=8).sequences
    dkv.reset(llm)
    try:
        torch.set_default_device("meta")
        found = dkv.generate(llm, ids, gen_length=8).sequences
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)


def test_a_forward_that_came_later_is_not_lost(llm):
    dkv.replace_attention(llm)
    patched = llm.forward
    llm.forward = lambda *args, **kwargs: patched(*args, **kwargs)
    with pytest.raises(ValueError, match="undo that first"):
        dkv.restore_attention(llm)
    del llm.forward
    dkv.restore_attention(llm)
    assert not call(llm).isnan().any()


def test_a_compiled_model_is_not_patched(llm):
    with pytest.raises(ValueError, match="the one that torch.compile was given"):
        dkv.replace_attention(torch.compile(llm, backend="eager"))


@pytest.mark.parametrize("mask", ["causal", [[1] * 17] * 2, torch.ones(2, 1, 1, 17), torch.ones(2, 16), torch.ones(17)])
def test_masks_of_other_kinds_are_left_to_the_model(llm, mask):
    """It refuses or computes them as without a patch."""
    if isinstance(mask, torch.Tensor):
        mask = mask.to(llm.device)
    results = []
    for _ in range(2):
        try:
            results.append(call(llm, attention_mask=mask))
        except Exception as error:  # noqa: BLE001
            results.append(repr(error))
        dkv.replace_attention(llm)
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        assert_close(results[0], results[1])


def test_one_mask_may_serve_all_rows():
    llm = copy.deepcopy(model("dream"))
    x = F.pad(prompts(9, 9)[0], (0, 8), value=MASK)
    valid = torch.arange(17) >= 3
    mask = (valid[:, None] & valid)[None, None]
    with torch.no_grad():
        expected = llm(x, attention_mask=mask).logits[:, 3:]
        found = dkv.replace_attention(llm)(x, attention_mask=mask).logits[:, 3:]
    assert_close(found, expected)


@pytest.mark.parametrize("policy", [dkv.DualCache(), dkv.Decode(8, scope="block"), dkv.PrefixCache()], ids=repr)
def test_the_logits_that_a_loop_with_guidance_reads_are_computed(policy, device):
    """The prompt of its unconditional rows is masked, but they are at the block of the others."""
    llm = copy.deepcopy(model("llada", device))
    seen = []

    def checked(x, **options):
        logits = llm(x, **options).logits
        end = 9 + 8 * (1 + len(seen) // 8)
        needed = (x == MASK) & (torch.arange(x.shape[1], device=device) < end)
        seen.append(logits[needed].isnan().any() | (len(seen) % 8 == 7 and not logits.isnan().any()))
        return SimpleNamespace(logits=logits)

    dkv.replace_attention(llm, policy, block_length=8)
    llada_loop(checked, prompts(9, 9, device=device)[0], gen_length=24, block_length=8, steps=24, cfg_scale=1.0)
    assert len(seen) == 24 and not any(seen)


def test_a_row_that_is_behind_goes_on_in_its_own_block(llm):
    alone = copy.deepcopy(llm)
    for patched in (llm, alone):
        dkv.replace_attention(patched, dkv.DualCache(), block_length=4)
    x = F.pad(prompts(9, 9, device=llm.device)[0], (0, 8), value=MASK)
    with torch.no_grad():
        for filled in ((0, 0), (4, 1), (5, 2), (6, 3), (7, 4), (7, 5)):
            x = x.clone()
            for row, count in enumerate(filled):
                x[row, 9 : 9 + count] = 5
            logits, slow = llm(x).logits[1:], alone(x[1:]).logits
            assert_close(logits, slow, equal_nan=True)


def test_a_model_loaded_under_inference_mode_can_be_patched(device):
    with torch.inference_mode():
        llm = dkv.from_pretrained(oracle.weights_path("llada_mha_s0"), device=device)
        expected = call(llm, filled=1)
        dkv.replace_attention(llm, dkv.Decode(1))
        call(llm)
        assert_close(call(llm, filled=1), expected)


def test_blocks_that_are_compiled_are_no_hooks(llm):
    looped, ids = tiny.Lookalike(llm), prompts(9, device=llm.device)[0]
    expected = dkv.generate(looped, ids, gen_length=4).sequences
    path = next(name for name, _ in looped.named_modules() if name.endswith(".1"))
    parent, _, name = path.rpartition(".")
    looped.get_submodule(parent)[int(name)] = torch.compile(looped.get_submodule(path), backend="eager")
    assert torch.equal(dkv.generate(looped, ids, gen_length=4).sequences, expected)


def test_a_loop_that_commits_a_token_that_was_not_computed_gets_an_error(llm):
    """It would not notice by itself, because NaN is the largest number to argmax and topk."""
    dkv.replace_attention(llm, dkv.DualCache(), block_length=4)
    call(llm)
    x = F.pad(prompts(9, 9, device=llm.device)[0], (0, 8), value=MASK)
    x[:, 9] = 5
    with torch.no_grad():
        llm(x)
        x = x.clone()
        x[1, 16] = EOS
        logits = llm(x).logits[1]
        assert logits.isnan().any(), "an end of text from elsewhere is no reason"
        column = 14 if view_of(llm).family.shifted else 15
        assert logits[column].isnan().all()
        x = x.clone()
        x[1, 15] = logits[column].argmax()
        with pytest.raises(RuntimeError, match="in place of 1 masks whose logits were not computed"):
            llm(x)
        assert not llm(x).logits.isnan().any(), "and after that everything is computed"
