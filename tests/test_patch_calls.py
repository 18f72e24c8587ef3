"""Foreign loops ask for anything: whatever the call, a patched model answers as the unpatched one, or says what it left out."""

import contextlib
import copy
import functools
import inspect
import pickle
import random
import warnings
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

import dkv
from dkv.memory import memory_of
from dkv.models import view_of

MASK, SEQLEN, LOWEST = tiny.MASK_ID, 10, torch.finfo(torch.float32).min
NAMES = ["llada", "llada remote", "dream", "dream remote"]


class Remote(tiny.Lookalike):
    """Also what Hugging Face's code returns on request: a tuple, hidden states; and an argument of a finetune."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        num_logits_to_keep=0,
        temperature=1.0,
        **loss_kwargs,
    ):
        output = super().forward(input_ids, attention_mask, position_ids)
        logits = output.logits / temperature
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if not (self.config.return_dict if return_dict is None else return_dict):
            return (logits,) if self.config.model_type == "Dream" else (logits, None, None)
        return SimpleNamespace(logits=logits, hidden_states=(logits,) if hidden else None)


@functools.cache
def original(name):
    family = name.split()[0]
    native = tiny.tiny_model(family, **{"llada": {"n_layers": 2}, "dream": {"num_hidden_layers": 2}}[family])
    if "remote" not in name:
        return native
    remote = Remote(native)
    vars(remote.config).update(return_dict=True, output_hidden_states=False, output_attentions=False)
    return remote


def load(name):
    """A model of the test's own: "llada", "dream": native; "llada remote", "dream remote": as Hugging Face's code."""
    return copy.deepcopy(original(name))


@pytest.fixture(params=NAMES)
def model(request):
    return load(request.param)


@pytest.fixture(params=["llada remote", "dream remote"])
def remote(request):
    return load(request.param)


def is_dream(model):
    return view_of(model).family.shifted


def sequence(*prompt, length=SEQLEN):
    return torch.tensor([[*prompt, *[MASK] * (length - len(prompt))]])


@contextlib.contextmanager
def told():
    """The warnings of a block, as a list of their texts."""
    texts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    found = [warning for warning in caught if issubclass(warning.category, UserWarning)]
    assert all(warning.filename == __file__ for warning in found), "they point at the caller"
    texts += [str(warning.message) for warning in found]


def call(model, *args, **kwargs):
    """The output or the error of a call without grad mode."""
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:  # noqa: BLE001
        return type(error)


class Story:
    """Random calls as loops make them: two sequences in turn, masks that become tokens or come back, other masks."""

    def __init__(self, seed, dream):
        self.random, self.dream = random.Random(seed), dream
        self.generator = torch.Generator().manual_seed(seed)
        self.sequences = [self.fresh(), self.fresh()]
        self.options = {}

    def integers(self, low, high, *shape):
        return torch.randint(low, high, shape, generator=self.generator)

    def fresh(self):
        x = self.integers(0, 250, self.random.choice((1, 2, 2, 2)), SEQLEN)
        x[:, 3:] = MASK
        return x

    def __iter__(self):
        while True:
            which = self.random.randrange(2) if self.random.random() < 0.3 else 0
            self.sequences[which] = x = self.step(self.sequences[which].clone())
            if self.random.random() < 0.4:
                self.options = self.others(x)
            fits = all(len(value) in (1, len(x)) for value in self.options.values() if isinstance(value, torch.Tensor))
            yield x, self.options if fits else {}

    def step(self, x):
        kind = self.random.choice(("fill", "fill", "fill", "same", "finish a row", "put back", "new prompt", "fresh"))
        masked = (x == MASK).nonzero()
        row = self.random.randrange(len(x))
        if kind == "fill":
            for row, column in masked[: self.random.randrange(1, 4)].tolist():
                x[row, column] = self.random.randrange(1, 250)
        elif kind == "finish a row":
            x[row] = torch.where(x[row] == MASK, 7, x[row])
        elif kind == "put back":
            x[row, self.random.randrange(SEQLEN)] = MASK
        elif kind == "new prompt":
            x[row, self.random.randrange(3)] = self.random.randrange(250)
        elif kind == "fresh":
            x = self.fresh()
        return x

    def others(self, x):
        """attention_mask and position_ids of all kinds, served or not."""
        options, batch = {}, len(x)
        real = torch.ones(batch, SEQLEN, dtype=torch.bool)
        real[-1, : self.random.randrange(3)] = False
        if self.random.random() < 0.3:
            real[0, -1] = False
        square = real[:, None, None] & real[:, None, :, None]
        causal = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).tril()[None, None]
        masks = [None, real, real.long()]
        if self.dream:
            masks += ["full", square, real[:, None, None], causal, (square | causal)[:1]]
            # added to the scores
            masks += [torch.zeros(batch, 1, SEQLEN, SEQLEN), square.float(), causal.float()]
            for low in (LOWEST, -1e4, float("-inf")):
                masks.append(torch.zeros(batch, 1, 1, SEQLEN).masked_fill(~real[:, None, None], low))
            masks.append(torch.zeros(1, 1, SEQLEN, SEQLEN).masked_fill(~causal, LOWEST))
            columns = torch.arange(SEQLEN)[None]
            positions = [None, columns, columns.int(), columns + 5, columns - 4, columns + 10**6, columns + 0.5]
            positions += [self.integers(0, 40, batch, SEQLEN), self.integers(-(2**40), 2**40, batch, SEQLEN)]
            options["position_ids"] = self.random.choice(positions)
        else:
            masks += [real.float(), real.half()]
        options["attention_mask"] = self.random.choice(masks)
        return options


def check_no_cache(name, seed, calls):
    model = load(name)
    patched = dkv.replace_attention(copy.deepcopy(model), dkv.NoCache())
    with told() as texts:
        for (x, options), _ in zip(Story(seed, is_dream(model)), range(calls), strict=False):
            expected, got = call(model, x, **options), call(patched, x, **options)
            if isinstance(expected, type):
                assert got is expected
            else:
                assert torch.equal(got.logits.nan_to_num(7), expected.logits.nan_to_num(7)), options
    assert not texts, "which is what was asked for"


def check_cached(name, seed, calls):
    """Decode(1) recomputes what runs: where it has logits they are the unpatched model's; uncached calls are its own."""
    model = load(name)
    patched, served = dkv.replace_attention(copy.deepcopy(model), dkv.Decode(1)), 0
    with told() as texts:
        for (x, options), _ in zip(Story(seed, is_dream(model)), range(calls), strict=False):
            before = sum(dkv.stats(patched).original.values())
            expected, got = call(model, x, **options), call(patched, x, **options)
            if isinstance(expected, type):
                assert got is expected, options
            elif sum(dkv.stats(patched).original.values()) > before:
                assert torch.equal(got.logits.nan_to_num(7), expected.logits.nan_to_num(7)), options
            else:
                served += 1
                computed = ~got.logits.isnan().any(-1)
                needed = x == MASK
                mask = options.get("attention_mask")
                if isinstance(mask, torch.Tensor):
                    kept = mask >= 0 if is_dream(model) and mask.is_floating_point() else mask.bool()
                    needed = needed & (kept if mask.dim() == 2 else kept[:, 0].any(1))
                assert (computed | ~needed).all(), options
                torch.testing.assert_close(got.logits[computed], expected.logits[computed], atol=2e-4, rtol=2e-4)
    assert len(texts) == len(set(texts)) == len(dkv.stats(patched).original), "each reason once"
    return served, sum(dkv.stats(patched).original.values())


@pytest.mark.parametrize("name", NAMES)
def test_no_cache_is_the_unpatched_model(name):
    """Bit for bit and for any calls in any order, rows without masks included."""
    check_no_cache(name, 0, 25)


@pytest.mark.parametrize("name", NAMES)
def test_any_call_is_answered_as_the_unpatched_model_would(name):
    served, own = check_cached(name, 0, 40)
    assert served > 15 and (own > 5 or "llada" in name)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_many_calls(name):
    for seed in range(1, 12):
        check_no_cache(name, seed, 100)
        check_cached(name, seed, 100)


def test_likelihoods_of_texts_that_fill_up():
    """The masks of the second sample are some of the first's, as if a loop had gone on: a row without any keeps its logits."""
    model = load("llada")
    first = torch.cat((sequence(5, 6, 7), sequence(8, 9, 10)))
    second = first.clone()
    second[0] = torch.arange(SEQLEN)
    expected = [call(model, x).logits for x in (first, second, second)]
    dkv.replace_attention(model, dkv.NoCache())
    assert all(
        torch.equal(call(model, x).logits, want) for x, want in zip((first, second, second), expected, strict=True)
    )


# ---- positions


def test_positions_are_angles_and_not_places_in_a_table():
    model, x = load("dream"), torch.cat((sequence(1, 2), sequence(3)))
    expected, columns = call(model, x).logits, torch.arange(SEQLEN)
    for positions in (columns[None], columns.int()[None], columns.expand(2, -1), columns.double()[None]):
        assert torch.equal(call(model, x, None, positions).logits, expected)
    # RoPE is relative; float32 angles tell such positions apart to within 1e-5
    for shift in (-5, -100, 50):
        torch.testing.assert_close(call(model, x, None, columns[None] + shift).logits, expected, atol=1e-2, rtol=1e-2)
    far = columns[None] + 2**40
    assert call(model, x, None, far).logits.isfinite().all()
    assert max(len(cos) for cos, _ in view_of(model)._tables.values()) == SEQLEN, "no table of the far positions"


def test_angles_are_those_of_the_tables():
    """To the bit, and so are their cosines, whatever the shape."""
    view = view_of(load("dream"))
    for length in (1, 7, 64, 1001):
        cos, sin = view.rope_tables(length, torch.device("cpu"))
        for positions in (torch.arange(length), torch.randperm(length)[None].expand(2, -1)):
            angles = view.rope_angles(positions)
            assert torch.equal(angles.cos(), cos[positions]) and torch.equal(angles.sin(), sin[positions])


@pytest.mark.parametrize("name", ["dream", "dream remote"])
def test_positions_that_no_cache_serves(name):
    model, x, columns = load(name), sequence(1, 2), torch.arange(SEQLEN)[None]
    longest = view_of(model).max_positions
    cases = {
        "served": [columns, columns.int(), columns.to(torch.uint8), columns + longest - SEQLEN],
        "uncached": [columns - 1, columns + longest, columns + 2**62, columns + 0.5, columns[0], columns.tolist()],
    }
    for kind, positions in [(kind, positions) for kind, values in cases.items() for positions in values]:
        dkv.restore_attention(model)
        expected = call(model, x, position_ids=positions)
        dkv.replace_attention(model, dkv.Decode(8))
        with told() as texts:
            got = call(model, x, position_ids=positions)
        if kind == "served":
            torch.testing.assert_close(got.logits, expected.logits, atol=2e-4, rtol=2e-4)
            assert memory_of(model).sessions.kept and not texts
        elif isinstance(expected, type):
            assert got is expected
        else:
            assert torch.equal(got.logits, expected.logits) and not memory_of(model).sessions.kept
            assert len(texts) == 1 and "position_ids are not (batch, seqlen) integers in the model's range" in texts[0]


# ---- masks


def padded(*leftpads):
    return torch.arange(SEQLEN) >= torch.tensor(leftpads)[:, None]


def added(kept, low=LOWEST):
    return torch.zeros(kept.shape).masked_fill(~kept, low)


REAL = padded(0, 3)
SQUARE, KEYS = REAL[:, None, None] & REAL[:, None, :, None], REAL[:, None, None]
CAUSAL = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).tril()[None, None]


@pytest.mark.parametrize(
    "mask, served",
    [
        (SQUARE, True),
        (KEYS, True),
        (KEYS.expand(-1, -1, SEQLEN, -1), True),
        (added(SQUARE), True),
        (added(KEYS), True),
        (added(KEYS, float("-inf")), True),
        (added(KEYS, torch.finfo(torch.bfloat16).min), True),
        (torch.zeros(2, 1, SEQLEN, SEQLEN), True),
        (torch.zeros(1, 1, SEQLEN, SEQLEN), True),
        (added(KEYS, -1000.0), False),
        (SQUARE.float(), False),
        (torch.ones(2, 1, SEQLEN, SEQLEN), False),
        (added(KEYS, float("nan")), False),
        (CAUSAL, False),
        (added(CAUSAL), False),
        (SQUARE | CAUSAL, False),
    ],
)
def test_masks_of_dream(mask, served):
    """Floats are added to the scores: a mask is served if it leaves columns out, and does nothing else."""
    model = load("dream remote")
    x = torch.cat((sequence(1, 2, 3, 4), sequence(1, 2, 3, 5)))
    later = x.clone()
    later[:, -1] = 9
    expected = [call(model, step, mask).logits for step in (x, later)]
    dkv.replace_attention(model, dkv.Decode(None, warmup_steps=1))
    with told() as texts:
        got = [call(model, step, mask.clone()).logits for step in (x, later)]
    if not served:
        assert all(torch.equal(g.nan_to_num(7), e.nan_to_num(7)) for g, e in zip(got, expected, strict=True))
        assert len(texts) == 1 and "attention_mask does more than hide columns" in texts[0]
    else:
        kept = torch.ones_like(REAL) if mask.all() or not mask.any() else REAL
        torch.testing.assert_close(got[0][kept], expected[0][kept], atol=2e-4, rtol=2e-4)
        assert got[1].isnan().any() and not texts, "a cached step"


def test_equal_numbers_of_another_dtype_are_another_mask():
    """The ones of a bool mask keep, those of floats are added."""
    model, x = load("dream remote"), sequence(1, 2, 3, 4)
    mask = padded(2)[:, None, None] & padded(2)[:, None, :, None]
    expected = call(model, x, mask.float()).logits
    dkv.replace_attention(model, dkv.Decode(8))
    call(model, x, mask)
    assert torch.equal(call(model, x, mask.float()).logits, expected)


@pytest.mark.parametrize("mask", [REAL, REAL.long(), REAL.to(torch.uint8), torch.ones_like(REAL)])
@pytest.mark.parametrize("name", ["llada", "dream"])
def test_native_models_take_masks_of_padding(name, mask):
    """(batch, seqlen): each row is the row alone, and as Dream's pipeline has it where that says which queries are padding."""
    model, real = load(name), mask.bool()
    x = torch.cat((sequence(1, 2, 3, 4), sequence(5, 6, 7, 8)))
    got = call(model, x, mask).logits
    for row, first in enumerate((~real).sum(1).tolist()):
        alone = call(model, x[row : row + 1, first:]).logits
        torch.testing.assert_close(got[row : row + 1, first:], alone, atol=1e-3, rtol=1e-3)
    if name == "dream":
        square = call(model, x, real[:, None, None] & real[:, None, :, None]).logits
        torch.testing.assert_close(got[real], square[real], atol=1e-5, rtol=1e-5)
    assert torch.equal(call(dkv.replace_attention(model, dkv.NoCache()), x, mask).logits, got)
    served = call(dkv.replace_attention(model, dkv.Decode(8)), x, mask).logits
    torch.testing.assert_close(served[real], got[real], atol=2e-4, rtol=2e-4)
    assert not dkv.stats(model).original


@pytest.mark.parametrize(
    "mask", [REAL.float(), REAL[:1], REAL.T, SQUARE.long(), SQUARE[:, 0], "none", [[1] * SEQLEN] * 2]
)
def test_other_masks_are_refused_by_the_native_dream(mask):
    with pytest.raises(ValueError, match="attention_mask must be None, 'full', bool or integers of shape"):
        load("dream")(torch.cat((sequence(1), sequence(2))), mask)


# ---- what is returned, and what is said


def test_the_signature_is_the_models_own(model):
    expected = inspect.signature(model.forward)
    assert "input_ids" in expected.parameters
    dkv.replace_attention(model)
    for patched in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert inspect.signature(patched.forward) == expected
        assert patched.forward.args == (patched,) and not call(patched, sequence(1)).logits.isnan().any()
    assert inspect.signature(dkv.restore_attention(model).forward) == expected


def test_output_is_what_the_config_says(remote):
    x = sequence(1, 2)
    for setting in ({}, {"return_dict": False}, {"output_hidden_states": True}, {"torchscript": False}):
        vars(remote.config).update({"return_dict": True, "output_hidden_states": False} | setting)
        for options in ({}, {"return_dict": True}, {"return_dict": False}, {"output_hidden_states": False}):
            dkv.restore_attention(remote)
            expected = call(remote, x, **options)
            got = call(dkv.replace_attention(remote), x, **options)
            if isinstance(expected, tuple):
                assert type(got) is tuple and len(got) == len(expected) and got[1:] == expected[1:]
                torch.testing.assert_close(got[0], expected[0], atol=2e-4, rtol=2e-4)
            else:
                torch.testing.assert_close(got.logits, expected.logits, atol=2e-4, rtol=2e-4)
                assert (got.hidden_states is None) == (expected.hidden_states is None)
            asked = "output_hidden_states" in setting and "output_hidden_states" not in options
            assert ([*dkv.stats(remote).original] == ["config.output_hidden_states is set"]) == asked


def test_what_cannot_be_cached_is_told_once(remote):
    x = sequence(1, 2)
    reasons = {
        "labels is passed": {"labels": x},
        "use_cache is passed": {"use_cache": True},
        "output_hidden_states is passed": {"output_hidden_states": True},
        "num_logits_to_keep is passed": {"num_logits_to_keep": 1},
        "temperature is passed": {"temperature": 2.0},
        "loss_kwargs is passed": {"num_items_in_batch": 3},
        "attention_mask does more than hide columns": {"attention_mask": torch.full((1, SEQLEN), 2)},
    }
    expected = {reason: call(remote, x, **options) for reason, options in reasons.items()}
    dkv.replace_attention(remote)
    for again in (False, True):
        for reason, options in reasons.items():
            with told() as texts:
                assert not isinstance(call(remote, x, **options), type) and not memory_of(remote).sessions.kept
                assert torch.equal(call(remote, x, **options).logits, expected[reason].logits)
            name = type(remote).__name__
            said = [f"a patched {name} ran its own forward, without the cache, as it will whenever {reason}."]
            assert texts == ([] if again else said)
    assert dkv.stats(remote).original == dict.fromkeys(reasons, 4)
    with told() as texts:
        call(dkv.replace_attention(remote), x, **reasons["labels is passed"])
    assert len(texts) == 1, "patched anew, told anew"


def test_arguments_that_ask_for_nothing_are_cached(remote):
    off = {
        "use_cache": False,
        "output_attentions": None,
        "num_logits_to_keep": 0,
        "temperature": float("1.0"),
        "labels": None,
    }
    with told() as texts:
        call(dkv.replace_attention(remote, dkv.Decode(None, warmup_steps=1)), sequence(1, 2), **off)
        assert call(remote, sequence(1, 2, 3), **off).logits.isnan().any()
    assert not texts


def test_grad_mode_is_told_and_training_is_not(model):
    dkv.replace_attention(model)
    call(model, sequence(1))
    model.train()
    with told() as texts:
        for _ in range(3):
            model(sequence(1)).logits.sum().backward()
        call(model, sequence(1))
    assert not texts and not memory_of(model).sessions.kept
    assert dkv.stats(model).original == {"the model is in training mode": 4}
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    with told() as texts:
        for _ in range(3):
            assert model(sequence(1)).logits.requires_grad
    assert len(texts) == 1 and texts[0].endswith("whenever grad mode is on (torch.no_grad() turns it off).")


def test_ids_of_any_integers(model):
    x = sequence(1, 2)
    expected = call(model, x).logits
    dkv.replace_attention(model)
    torch.testing.assert_close(call(model, x.int()).logits, expected, atol=2e-4, rtol=2e-4)
    assert not dkv.stats(model).original


# ---- torch.compile


class Wrapper(nn.Module):
    """As distributed training has it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def compiled(model):
    return torch.compile(model, backend="eager")


def run(model, batch=2):
    """A loop of 7 steps: its sequence, and how many positions each step left out."""
    x, left_out = torch.cat([sequence(1, 2, row) for row in range(batch)]), []
    for column in range(3, SEQLEN):
        logits = call(model, x).logits
        left_out.append(logits.isnan().any(-1).sum().item())
        x = x.clone()
        x[:, column] = logits[:, column - 1].argmax(-1) if left_out[-1] == 0 else column
    return x, left_out


@pytest.mark.parametrize("wrap", [compiled, lambda m: compiled(Wrapper(m))], ids=["alone", "in another"])
def test_a_patched_model_that_is_compiled_caches_as_before(wrap):
    model = dkv.replace_attention(load("llada"), dkv.Decode(4))
    x, left_out = run(model)
    assert sum(count > 0 for count in left_out) >= 3
    again, found = run(wrap(model))
    assert torch.equal(again, x) and found == left_out
    assert torch.equal(run(wrap(model), batch=1)[0], x[:1]), "of other shapes too"


@pytest.mark.full
def test_many_patched_models_that_are_compiled():
    """More than torch.compile makes versions of a function for."""
    for _ in range(20):
        model = dkv.replace_attention(load("llada"), dkv.Decode(4))
        assert run(compiled(model))[1] == run(model)[1]


def test_one_graph_of_a_patched_model_is_refused():
    model = dkv.replace_attention(load("llada"))
    for _ in range(2):
        with torch.no_grad(), pytest.raises(Exception, match="fullgraph|disable"):
            torch.compile(model, backend="eager", fullgraph=True)(sequence(1))
    assert any(run(model)[1])


# ---- what wraps a model


class LoraModel(nn.Module):
    """As peft's models are built: attributes are looked up in what they hold."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)


class PeftModel(nn.Module):
    def __init__(self, base_model):
        super().__init__()
        self.base_model = base_model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)

    def get_base_model(self):
        return getattr(self.base_model, "model", self.base_model)


USES = [
    lambda model: dkv.generate(model, sequence(1, 2), gen_length=2),
    dkv.replace_attention,
    dkv.restore_attention,
    dkv.reset,
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "wrap, inner",
    [
        (nn.DataParallel, "model.module"),
        (Wrapper, "model.module"),
        (lambda model: PeftModel(LoraModel(model)), r"model.get_base_model\(\)"),
        (PeftModel, r"model.get_base_model\(\)"),  # virtual tokens: the model itself is inside
        (lambda model: torch.compile(Wrapper(model), backend="eager"), "model.module"),
    ],
)
def test_wrappers_are_refused_with_what_to_pass(use, wrap, inner, model):
    wrapped = wrap(dkv.replace_attention(model))
    message = f"{type(wrapped).__name__} wraps the model that dkv runs: pass {inner}"
    if isinstance(wrapped, torch._dynamo.OptimizedModule) and use is dkv.replace_attention:
        message = "compiled: pass the one that torch.compile was given, model._orig_mod"
    with pytest.raises(ValueError, match=message):
        use(wrapped)
    assert "_dkv" in vars(model)


def test_a_compiled_model():
    model = load("llada")
    expected = dkv.generate(model, sequence(1, 2), gen_length=4).sequences
    wrapped = torch.compile(model, backend="eager")
    assert torch.equal(dkv.generate(wrapped, sequence(1, 2), gen_length=4).sequences, expected)
    dkv.reset(wrapped), dkv.restore_attention(wrapped)
    dkv.replace_attention(model)
    for undo in (dkv.reset, dkv.restore_attention):
        with pytest.raises(ValueError, match="pass the patched one, model._orig_mod"):
            undo(wrapped)
    with pytest.raises(ValueError, match="Linear is not supported"):
        dkv.generate(torch.compile(nn.Linear(2, 2)), sequence(1))


def offload(module):
    """As accelerate's hooks leave modules: no weights, and a forward that fetches them."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.to("meta")))
            part._hf_hook, part.forward = SimpleNamespace(offload=True), part.forward


def move_when_called(model):
    model._hf_hook, model.forward = SimpleNamespace(prev_module_hook=None, execution_device=0), model.forward


OFFLOADS = {
    "all": (offload, "on the one device that it computes on, but they are on meta; load the model without offloading"),
    "head": (lambda model: offload(view_of(model).head), r"on \S+ and meta"),
    "norm": (lambda model: offload(view_of(model).final_norm), r"on \S+ and meta"),
    "layer": (lambda model: offload(view_of(model).layers[1].q), r"on \S+ and meta"),
    "whole, when called": (move_when_called, "moved when the model is called"),
}


@pytest.mark.parametrize("use", USES[:2])
@pytest.mark.parametrize("change, words", OFFLOADS.values(), ids=OFFLOADS)
def test_offloaded_models_are_refused(use, change, words, model):
    change(model)
    with pytest.raises(ValueError, match=words):
        use(model)


@pytest.mark.parametrize("use", USES[:2])
def test_models_of_peft_and_accelerate(use, remote):
    peft, accelerate = pytest.importorskip("peft"), pytest.importorskip("accelerate")
    lora = peft.get_peft_model(remote, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"pass model.get_base_model\(\)"):
        use(lora)
    with pytest.raises(ValueError, match="without offloading"):
        use(accelerate.cpu_offload(copy.deepcopy(remote), torch.device("cpu")))
