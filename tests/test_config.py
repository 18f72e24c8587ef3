"""`GenerateConfig`: the options of `generate`, over all the values they can be given, and their limits in a run."""

import dataclasses
import inspect
import math
import sys
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import tiny
import torch
from tiny import FAMILIES, generate, model, prompts
from tiny import MASK_ID as MASK

import dkv
from dkv.generation import prepare

PER_CALL = {"model", "input_ids", "attention_mask", "order", "generator", "output_history"}
PER_CALL |= {"show_progress", "callback", "unknown"}
NAN, INF, HUGE = math.nan, math.inf, 10**400


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
def test_an_unknown_option_is_a_type_error(make):
    with pytest.raises(TypeError, match="unexpected keyword argument 'genlength'"):
        make(genlength=8)


NOT_INTS = [True, False, np.True_, torch.tensor(True), 8.0, "8", NAN, INF, np.float64(8), torch.tensor(8.0), [8], 1j]
NOT_INTS += [torch.tensor([3, 4]), torch.tensor(3, device="meta"), object]
NO_NUMBERS = [True, np.True_, torch.tensor(True), "0.5", b"1", [0.5], 1j, torch.tensor([0.5, 0.5]), object]
NO_SCALES = [NAN, INF, -INF, -1, -1e-320, 1e-320, 1e-21, 1e21, 1e38, 1e39, HUGE, -HUGE, np.float32(INF)]
NO_FRACTIONS = [NAN, INF, -INF, 0, -0.0, -1e-320, -1, 1 + 1e-15, 2, HUGE, torch.tensor(NAN)]
ODD = {  # option -> values that are a TypeError, values that are a ValueError
    "gen_length": ([*NOT_INTS, None], [-1, -(2**62), np.int64(-1), torch.tensor(-1)]),
    "steps": (NOT_INTS, [0, -1, 2**24 + 1, 2**62, HUGE]),
    "block_length": (NOT_INTS, [0, -1, -(2**62)]),
    "policy": ([dkv.Decode, 8, NAN], ["decode", "", "Policy"]),
    "remasking": ([], ["lowest", "", 3, True, ["random"], torch.tensor(1), np.array(["random", "origin"])]),
    "temperature": (NO_NUMBERS, NO_SCALES),
    "top_p": (NO_NUMBERS, NO_FRACTIONS),
    "top_k": (NOT_INTS, [-1, -(2**62)]),
    "alg_temp": (NO_NUMBERS, NO_SCALES),
    "eps": ([*NO_NUMBERS, None], [*NO_FRACTIONS, 1]),
    "cfg_scale": (NO_NUMBERS, NO_SCALES),
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


def test_values_that_switch_an_option_off():
    """As others write them; the configs are equal, so they share memory and graphs."""
    off = dkv.GenerateConfig(temperature=None, alg_temp=None, cfg_scale=None, top_p=1.0, top_k=0)
    assert off == dkv.GenerateConfig() and off.temperature == 0.0 and off.top_k is None and off.top_p is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threshold": 0.5, "factor": 1.0}, "threshold and factor exclude each other"),
        ({"threshold": 0.5, "steps": 4}, "steps must be None with threshold or factor"),
        ({"factor": 0.5, "remasking": "random"}, "threshold and factor need remasking"),
        ({"alg_temp": 0.5, "remasking": "origin"}, "alg_temp needs a fixed number of commits"),
        ({"alg_temp": 0.5, "threshold": 0.5}, "alg_temp needs a fixed number of commits"),
        ({"policy": dkv.Greedy(), "remasking": "entropy"}, "must know which masks a step will decode.*'entropy'"),
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


def test_more_steps_than_masks():
    """LLaDA's blocks end with their masks; Dream takes every step."""
    ids, options = prompts(3)[0], {"gen_length": 2, "policy": dkv.Prefill(), "output_history": False}
    with pytest.warns(UserWarning, match="steps should be at most the masks of a row, 2, got 100000: no more"):
        assert generate("llada", ids, steps=10**5, **options).stats.steps == 2
    with pytest.warns(UserWarning, match="steps should be at most the masks of a row, 2, got 20"):
        assert generate("dream", ids, steps=20, **options).stats.steps == 20


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_that_give_nothing_are_told(family):
    ids, options = prompts(3)[0], {"gen_length": 8, "output_history": False}
    with pytest.warns(
        UserWarning, match="steps should be at least the blocks, 4, got 3: each block takes a step"
    ) as told:
        assert generate(family, ids, steps=3, block_length=2, policy="NoCache", **options).stats.steps == 4
    assert [warning.filename for warning in told] == [tiny.__file__]
    with pytest.warns(UserWarning, match=r"DualCache\(\) read nothing from the cache: all 4 steps were full ones"):
        generate(family, ids, steps=4, block_length=2, policy="DualCache", **options)
    with pytest.warns(UserWarning, match="all 4 steps were full ones"):
        generate(family, ids, steps=4, block_length=2, policy="DualCache", eos_early_stop=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(family, ids, policy="Decode", eos_early_stop=True, eos_token_id=list(range(250)), **options)
        asked_for = ("NoCache", dkv.Decode(1), dkv.PrefillDecode(1))
        for policy in asked_for:
            generate(family, ids, steps=4, policy=policy, **options)
        generate(family, ids, steps=1, policy="Decode", **options)
        generate(family, ids, threshold=1e-6, policy="Decode", **options)
        dkv.generate(model(family), ids[:, :0], gen_length=8, policy="Prefill")
        ids[0, 1] = MASK
        generate(family, ids, steps=9, policy="Decode", **options)
