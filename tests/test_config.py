"""The options of `generate`, over all they can be given; and what surrounds a call: dtypes, empty prompts, infilling."""

import dataclasses
import functools
import inspect
import math
import sys
import warnings
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dkv
from dkv.generation import prepare
from dkv.schedule import Schedule

MASK, PAD = tiny.MASK_ID, tiny.EOS_ID
FAMILIES = ["llada", "dream"]
PER_CALL = {"model", "input_ids", "attention_mask", "order", "generator", "output_history", "show_progress"}
NAN, INF, HUGE = math.nan, math.inf, 10**400


@functools.cache
def model(family):
    return tiny.tiny_model(family)


def prompts(*lengths, masks=(), seed=0):
    """Left-padded random prompts and their attention mask; masks: (row, column) of those inside, from the right."""
    ids = torch.randint(0, 200, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    real = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    for row, column in masks:
        ids[row, -column] = MASK
    return torch.where(real, ids, PAD), real


def generate(family, ids, real=None, **options):
    options = {"output_history": True, "generator": torch.Generator().manual_seed(0)} | options
    return dkv.generate(model(family), ids, real, **options)


# ---- the one list


def test_generate_has_the_options_of_the_config():
    """The same names, types and defaults; and each value arrives under its own name."""
    parameters = {n: p for n, p in inspect.signature(dkv.generate).parameters.items() if n not in PER_CALL}
    options = dataclasses.fields(dkv.GenerateConfig)
    assert {n: (p.annotation, p.default) for n, p in parameters.items()} == {
        o.name: (o.type, o.default) for o in options
    }
    values, passed = {name: object() for name in parameters}, {}

    def note(*args, **kwargs):
        passed.update(kwargs)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sys.modules["dkv.generation"], "prepare", note)
        dkv.generate(None, None, order=1, generator=2, **values)
    assert passed == values | {"order": 1, "generator": 2}


def test_a_config_is_a_value():
    one, other = (dkv.GenerateConfig(policy=dkv.Decode(4), eos_token_id=[3, 5], temperature=0) for _ in range(2))
    assert one == other and hash(one) == hash(other) and one != dataclasses.replace(one, steps=4)
    assert dkv.GenerateConfig() == dkv.GenerateConfig(policy=dkv.Decode())
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.steps = 3


@pytest.mark.parametrize("make", [dkv.GenerateConfig, lambda **o: prepare(model("llada"), prompts(3)[0], **o)])
def test_a_wrong_name(make):
    with pytest.raises(TypeError, match="unexpected keyword argument 'genlength'"):
        make(genlength=8)


# ---- values

NOT_INTS = [True, False, np.True_, torch.tensor(True), 8.0, "8", NAN, INF, np.float64(8), torch.tensor(8.0), [8], 1j]
NOT_INTS += [torch.tensor([3, 4]), torch.tensor(3, device="meta"), object]
NO_NUMBERS = [True, np.True_, torch.tensor(True), "0.5", b"1", [0.5], 1j, torch.tensor([0.5, 0.5]), object]
NO_SCALES = [NAN, INF, -INF, -1, -1e-320, 1e-320, 1e-21, 1e21, 1e38, 1e39, HUGE, -HUGE, np.float32(INF)]
NO_FRACTIONS = [NAN, INF, -INF, 0, -0.0, -1e-320, -1, 1 + 1e-15, 2, HUGE, torch.tensor(NAN)]
ODD = {  # option -> values that are a TypeError, values that are a ValueError
    "gen_length": ([*NOT_INTS, None], [-1, -(2**62), np.int64(-1), torch.tensor(-1)]),
    "steps": (NOT_INTS, [0, -1, 2**24 + 1, 2**62, HUGE]),
    "block_length": (NOT_INTS, [0, -1, -(2**62)]),
    "policy": (["Decode", dkv.Decode, 8, NAN], []),
    "remasking": ([], ["lowest", "", 3, True, ["random"], torch.tensor(1), np.array(["random", "origin"])]),
    "temperature": ([*NO_NUMBERS, None], NO_SCALES),
    "top_p": (NO_NUMBERS, NO_FRACTIONS),
    "top_k": (NOT_INTS, [0, -1, -(2**62)]),
    "alg_temp": ([*NO_NUMBERS, None], NO_SCALES),
    "eps": ([*NO_NUMBERS, None], [*NO_FRACTIONS, 1]),
    "cfg_scale": ([*NO_NUMBERS, None], NO_SCALES),
    "threshold": (NO_NUMBERS, NO_FRACTIONS),
    "factor": (NO_NUMBERS, [*NO_SCALES, 0, -0.0]),
    "eos_token_id": ([*NOT_INTS[:-5], 1j, [1, "2"], [[3]], [None]], [-1, [3, -1], [], ()]),
    "mask_id": (NOT_INTS, [-1, -(2**62)]),
    "impl": ([], ["cuda", None, 0, ["auto"]]),
}
SWITCHES = ["logits_eos_inf", "confidence_eos_eot_inf", "eos_early_stop", "cuda_graphs"]
NO_SWITCHES = [0, 1, "false", "", NAN, [True], torch.tensor([True, True])]
ODD |= {name: ([*NO_SWITCHES, None], []) for name in SWITCHES} | {"fused_products": (NO_SWITCHES, [])}


@pytest.mark.parametrize("name", [option.name for option in dataclasses.fields(dkv.GenerateConfig)])
def test_odd_values_are_refused_in_the_users_words(name):
    for error, values in zip((TypeError, ValueError), ODD[name], strict=True):
        for value in values:
            with pytest.raises(error, match=f"^{name} must be ") as found:
                dkv.GenerateConfig(**{name: value})
            assert type(found.value) is error, value


@pytest.mark.parametrize(
    "name, value, want",
    [(name, value, 8) for name in ("gen_length", "steps", "top_k") for value in (8, np.int8(8), torch.tensor(8))]
    + [(name, value, 0.5) for name in ("temperature", "alg_temp", "cfg_scale", "top_p", "eps", "factor") for value in (
        0.5, np.float16(0.5), torch.tensor(0.5, dtype=torch.bfloat16), Fraction(1, 2), Decimal("0.5"))]
    + [(name, value, 0.0) for name in ("temperature", "alg_temp", "cfg_scale") for value in (0, -0.0, np.int64(0))]
    + [(name, value, value) for name in ("temperature", "alg_temp", "cfg_scale", "factor") for value in (1e-20, 1e20)]
    + [(name, value, value) for name in ("top_p", "threshold", "eps") for value in (1e-320, 1 - 2**-53)]
    + [("steps", 2**24, 2**24), ("gen_length", 0, 0), ("block_length", 2**62, 2**62), ("threshold", 1, 1.0)]
    + [("eos_token_id", value, (3, 5)) for value in ([3, 5], (3, np.int64(5)), [torch.tensor(3), 5])]
    + [("eos_token_id", 3, (3,)), ("mask_id", torch.tensor(7), 7)]
    + [(name, value, True) for name in SWITCHES for value in (np.True_, torch.tensor(True), True)],
)  # fmt: skip
def test_scalars_of_every_kind(name, value, want):
    found = getattr(dkv.GenerateConfig(**{name: value}), name)
    assert found == want and type(found) is type(want) and math.copysign(1, found if want == 0.0 else 1) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threshold": 0.5, "factor": 1.0}, "threshold and factor exclude each other"),
        ({"threshold": 0.5, "steps": 4}, "steps must be None with threshold or factor"),
        ({"factor": 0.5, "remasking": "random"}, "threshold and factor need remasking"),
        ({"alg_temp": 0.5, "remasking": "origin"}, "alg_temp needs a fixed number of commits"),
        ({"alg_temp": 0.5, "threshold": 0.5}, "alg_temp needs a fixed number of commits"),
        ({"policy": dkv.Greedy(), "remasking": "entropy"}, "must know what a step will decode.*'entropy'"),
    ],
)
def test_options_that_exclude_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        dkv.GenerateConfig(**options)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_limits_can_be_computed_with(family):
    """At each end of a range all masks are filled, and none by the mask token."""
    ids, real = prompts(3, 2)
    ends = [{"temperature": 1e20}, {"cfg_scale": 1e20}, {"cfg_scale": 1e-20}, {"factor": 1e20}, {"factor": 1e-20}]
    ends += [{"temperature": 0.7, "alg_temp": t} for t in (1e-20, 1e20)] + [{"threshold": 1e-320}, {"eps": 1e-320}]
    ends += [{"eps": 1 - 2**-53}, {"top_p": 1e-320}, {"top_k": 2**62}, {"block_length": 2**62}]
    for options in ends:
        assert not (generate(family, ids, real, gen_length=2, **options).sequences == MASK).any(), options
    cold = generate(family, ids, real, gen_length=2, temperature=1e-20).sequences
    assert torch.equal(cold, generate(family, ids, real, gen_length=2).sequences)


@pytest.mark.parametrize("gen_length", [2**62, 2**31, 507])
def test_more_tokens_than_positions(gen_length):
    with pytest.raises(ValueError, match=rf"512 positions, got 6 \+ {gen_length}; shorten the prompt or gen_length"):
        dkv.generate(model("llada"), prompts(6)[0], gen_length=gen_length)


def test_many_steps():
    """LLaDA's blocks end with their masks; Dream takes every step."""
    ids, options = prompts(3)[0], {"gen_length": 2, "policy": dkv.Prefill(), "output_history": False}
    assert generate("llada", ids, steps=10**5, **options).stats.steps == 2
    assert generate("dream", ids, steps=20, **options).stats.steps == 20


# ---- default dtypes


class NoTensorOf(TorchDispatchMode):
    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.made = dtype, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        assert self.dtype not in {t.dtype for t in tensors}, f"{func} made a tensor of the default dtype"
        self.made += len(tensors)
        return result


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"steps": 3, "policy": dkv.Decode(3)},
        {"steps": 3, "remasking": "origin", "policy": dkv.Greedy(3, 2), "cfg_scale": 1.0},
        {"threshold": 0.3, "temperature": 0.7, "top_p": 0.9, "top_k": 40},
        {"steps": 2, "temperature": 0.7, "alg_temp": 0.5, "confidence_eos_eot_inf": True, "eos_early_stop": True},
    ],
    ids=["Decode", "Greedy and guidance", "threshold", "noise"],
)
def test_the_default_dtype_changes_nothing(family, options, default_dtype):
    ids, real = prompts(5, 4)
    want = generate(family, ids, real, gen_length=4, block_length=2, **options)
    dkv.reset(model(family))
    # a kind of its own, which nothing of a float32 model has
    default_dtype(torch.bfloat16)
    with NoTensorOf(torch.bfloat16) as mode:
        found = generate(family, ids, real, gen_length=4, block_length=2, **options)
    assert torch.equal(found.history, want.history) and torch.equal(found.active, want.active) and mode.made > 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_default_dtype_and_schedules(dtype, default_dtype):
    def commits():
        options = {"gen_length": 256, "block_length": 128, "eps": 1e-3}
        return [
            Schedule(steps=256, time_steps=time_steps, **options).commits([0, 3]) for time_steps in (True, False)
        ] + [
            Schedule(steps=None, time_steps=True, gen_length=0, block_length=1, eps=1e-3).commits([40, 100])
        ]  # fmt: skip

    want = commits()
    default_dtype(dtype)
    assert all(map(torch.equal, commits(), want))


# ---- infilling and unconditional text


@torch.no_grad()
def by_a_plain_loop(family, x, ends, steps_of_blocks, order=None):
    """What an uncached run makes of one sequence, from logits of the model's own forward.

    ends: the columns behind the blocks; order: columns, the first that are masked are decoded. None: the surest.
    """
    for end, steps in zip(ends, steps_of_blocks, strict=True):
        masks = int((x[:, :end] == MASK).sum())
        times = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float32)
        for step in range(steps):
            logits = model(family)(x).logits.double()
            left = int((x[:, :end] == MASK).sum())
            count = masks // steps + (step < masks % steps)
            if family == "dream":
                logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)
                count = left if step == steps - 1 else int(left * (1 - times[step + 1] / times[step]))
            logits[..., MASK] = -INF
            score, token = logits.log_softmax(-1).max(-1)
            if family == "dream":
                score = -torch.distributions.Categorical(logits=logits).entropy()
            columns = [c for c in score[0].argsort(descending=True).tolist() if order is None or c in order]
            columns = [c for c in order or columns if c < end and x[0, c] == MASK][:count]
            x = x.clone()
            x[0, columns] = token[0, columns]
    return x


INFILLING = prompts(9, 5, 8, masks=[(0, 1), (0, 5), (0, 9), (1, 3), (2, 2), (2, 4), (2, 5), (2, 7)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [None, 1, 2, 7])
def test_infilling_is_a_plain_loop(family, steps):
    """Without steps, one for each mask."""
    ids = INFILLING[0][2:, 1:]
    found = generate(family, ids, gen_length=0, steps=steps, policy=dkv.NoCache())
    assert torch.equal(found.sequences, by_a_plain_loop(family, ids, [ids.shape[1]], [steps or 4]))
    assert found.stats.steps == (steps or 4 if family == "dream" else min(steps or 4, 4))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block_length, steps, each", [(None, None, [8]), (4, 4, [2, 2]), (3, 4, [2, 1, 1])])
def test_unconditional_text_is_a_plain_loop(family, block_length, steps, each):
    """In an order: of masks alone all outputs are the same, and none is surer."""
    order = torch.tensor([[4, 2, 0, 7, 1, 3, 6, 5], [7, 6, 5, 4, 3, 2, 1, 0]])
    options = {"gen_length": 8, "block_length": block_length, "steps": steps, "policy": dkv.NoCache()}
    empty = torch.zeros(2, 0, dtype=torch.int64)
    found = generate(family, empty, torch.ones(2, 0), remasking="random", order=order, **options)
    ends = {None: [8], 4: [4, 8], 3: [3, 6, 8]}[block_length]
    for row in range(2):
        want = by_a_plain_loop(family, torch.full((1, 8), MASK), ends, each, order[row].tolist())
        assert torch.equal(found.sequences[row], want[0])


POLICIES = {
    "NoCache": dkv.NoCache(),
    "Decode": dkv.Decode(3),
    "Decode block": dkv.Decode(4, scope="block"),
    "Greedy": dkv.Greedy(3, 2),
    "Greedy contiguous": dkv.Greedy(3, 2, window_kind="contiguous"),
    "Prefill": dkv.Prefill(),
    "PrefillDecode": dkv.PrefillDecode(2),
    "PrefixCache": dkv.PrefixCache(),
    "DualCache": dkv.DualCache(),
}
MORE = {"plain": {}, "steps": {"steps": 3}, "threshold": {"threshold": 0.3}, "guidance": {"cfg_scale": 1.0}}
MORE |= {"ends": {"eos_early_stop": True, "eos_token_id": list(range(100))}, "blocks": {"block_length": 3}}
MORE |= {"origin": {"remasking": "origin"}, "noise": {"temperature": 0.7}}


def options_of(policy, more):
    """Options of both, or None where they exclude each other."""
    policy = POLICIES[policy]
    if policy.needs_order and more == "threshold":
        return None
    return {"policy": policy} | ({"remasking": "random"} if policy.needs_order else {}) | MORE[more]


def check_infilling(family, policy, more):
    """Masks are filled and nothing else changes; each row is its own run (its noise is by its number: the first's)."""
    options, (ids, real) = options_of(policy, more), INFILLING
    if options is None:
        return 0
    found = generate(family, ids, real, gen_length=0, **options)
    assert found.sequences.shape == ids.shape and not (found.sequences == MASK).any()
    assert torch.equal(found.sequences[ids != MASK], ids[ids != MASK])
    drawn = "remasking" in options or "temperature" in options
    for row in range(1 if drawn else 3):
        start = int((~real[row]).sum())
        alone = generate(family, ids[row : row + 1, start:], gen_length=0, **options)
        steps = len(alone.history)
        assert torch.equal(found.history[:steps, row, start:], alone.history[:, 0]), (policy, more, row)
        assert torch.equal(found.active[:steps, row, start:], alone.active[:, 0]), (policy, more, row)
        assert not found.active[steps:, row].any()
    return 1


def check_unconditional(family, policy, more):
    """It is filled; and in a known order each row is its own run."""
    options = options_of(policy, more)
    if options is None:
        return 0
    order = torch.tensor([[4, 2, 0, 1, 3, 5], [5, 4, 3, 2, 1, 0]])
    ordered = more in ("plain", "steps", "guidance", "ends", "blocks")
    if ordered:
        options |= {"remasking": "random", "order": order}
    found = generate(family, torch.zeros(2, 0, dtype=torch.int64), gen_length=6, **options)
    assert found.sequences.shape == (2, 6) and not (found.sequences == MASK).any()
    for row in range(2 if ordered else 0):
        alone = options | {"order": order[row : row + 1]}
        alone = generate(family, torch.zeros(1, 0, dtype=torch.int64), gen_length=6, **alone)
        steps = len(alone.history)
        assert torch.equal(found.history[:steps, row], alone.history[:, 0]), (policy, more, row)
        assert torch.equal(found.active[:steps, row], alone.active[:, 0]), (policy, more, row)
    return 1


SAMPLE = {
    "llada": [("Decode", "guidance"), ("Greedy", "plain"), ("DualCache", "threshold")],
    "dream": [("Greedy contiguous", "origin"), ("PrefillDecode", "blocks"), ("PrefixCache", "ends")],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("check", [check_infilling, check_unconditional])
def test_every_row_is_its_own_run(family, check):
    assert sum(check(family, *case) for case in SAMPLE[family]) == 3


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("check", [check_infilling, check_unconditional])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_row_is_its_own_run_everywhere(family, check, policy):
    assert sum(check(family, policy, more) for more in MORE) == len(MORE) - POLICIES[policy].needs_order


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="these models are the CPU's")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["Decode", "Greedy", "DualCache"])
def test_kernels_give_the_same_tokens(family, policy):
    order = torch.tensor([[1, 0, 2]])
    empty = {"gen_length": 3, "remasking": "random", "order": order, "policy": POLICIES[policy]}
    infilling = options_of(policy, "plain") | {"gen_length": 0}
    for ids, real, options in ((*INFILLING, infilling), (torch.zeros(1, 0, dtype=torch.int64), None, empty)):
        found, want = (generate(family, ids, real, impl=impl, **options) for impl in ("triton", "reference"))
        assert torch.equal(found.history, want.history) and torch.equal(found.active, want.active)


def test_infilling_leaves_rows_without_masks_alone():
    ids, real = prompts(6, 6, masks=[(1, 2)])
    found = generate("llada", ids, real, gen_length=0)
    assert torch.equal(found.sequences[0], ids[0]) and found.stats.steps == 1 and not found.active[:, 0].any()


@pytest.mark.parametrize("ids", [prompts(6)[0], torch.zeros(1, 0, dtype=torch.int64)], ids=["no mask", "empty"])
def test_nothing_to_do(ids):
    with pytest.raises(ValueError, match="with gen_length=0 the prompts must hold masks to fill in"):
        dkv.generate(model("llada"), ids, gen_length=0)


def test_the_memory_of_infilling_serves_the_next():
    """However many masks there are."""
    ids, real = INFILLING
    fewer = ids.clone()
    fewer[2, 2] = 5
    assert (fewer == MASK).sum() < (ids == MASK).sum()
    assert len({prepare(model("dream"), each, real, gen_length=0).key for each in (ids, fewer)}) == 1


# ---- pad tokens without an attention mask


@pytest.mark.parametrize(
    "row, masked, warns",
    [
        ([PAD, PAD, 1, 2], False, True),
        ([1, 2, 3, PAD], False, True),
        ([PAD], False, True),
        ([1, PAD, PAD, 2], False, False),
        ([PAD, PAD, 1, 2], True, False),
        ([], False, False),
    ],
    ids=["left", "right", "only", "inside", "with a mask", "empty"],
)
def test_pad_tokens_without_an_attention_mask(row, masked, warns):
    ids = torch.tensor([[1] * len(row), row], dtype=torch.int64)
    mask = ids != PAD if masked else None
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        dkv.generate(model("llada"), ids, mask, gen_length=1)
    assert [w.category for w in found] == [UserWarning] * warns
    message = f"begins or ends with the pad token, {PAD}, in some row and there is no attention_mask"
    assert all(message in str(w.message) and w.filename == __file__ for w in found)


def test_what_a_call_is_given_stays_as_it_is():
    """Also where a policy raises in the middle of it."""

    class Failing(dkv.Policy):
        def active(self, state):
            if int(state.step[0]) == 2:
                raise KeyError("mine")
            return torch.ones_like(state.masked)

    (ids, real), config = INFILLING, SimpleNamespace(ids=INFILLING[0].clone(), real=INFILLING[1].clone())
    for gen_length in (0, 4):
        with pytest.raises(KeyError, match="mine"):
            dkv.generate(model("llada"), ids, real, gen_length=gen_length, policy=Failing())
    assert torch.equal(ids, config.ids) and torch.equal(real, config.real)


@pytest.mark.parametrize("kind", ["contiguous", "nearest_masked"])
def test_a_window_wider_than_any_row(kind):
    """It has the columns that there are, and ends."""
    llm, ids = tiny.tiny_model("llada"), torch.arange(6)[None]
    options = {"gen_length": 4, "remasking": "random", "output_history": True}
    found = []
    for window in (20, 2**30):
        generator = torch.Generator().manual_seed(0)
        policy = dkv.Greedy(3, window, window_kind=kind)
        found.append(dkv.generate(llm, ids, policy=policy, generator=generator, **options))
    assert torch.equal(found[0].active, found[1].active) and torch.equal(found[0].sequences, found[1].sequences)
