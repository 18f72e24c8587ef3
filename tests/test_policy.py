"""Policies: by name, with settings that are refused, and a user's own."""

import typing

import pytest
import torch
from tiny import Alternating, generate, prompts, tiny_model

import dkv
from dkv.policy import POLICIES, PolicyName


@pytest.mark.parametrize("name", typing.get_args(PolicyName))
def test_a_policy_by_name_has_its_default_settings(name):
    policy = getattr(dkv, name)()
    remasking = "random" if policy.needs_order else None
    assert dkv.GenerateConfig(policy=name, remasking=remasking).policy == policy == POLICIES[name]()


def test_every_policy_has_a_name():
    exported = {name for name in dkv.__all__ if isinstance(getattr(dkv, name), type)}
    exported = {name for name in exported if issubclass(getattr(dkv, name), dkv.Policy)} - {"Policy"}
    assert set(POLICIES) == set(typing.get_args(PolicyName)) == exported


BAD_POLICIES = [
    (lambda: dkv.Decode(0), ValueError, "refresh_interval must be at least 1, got 0"),
    (lambda: dkv.Decode(-3), ValueError, "refresh_interval must be at least 1, got -3"),
    (lambda: dkv.Decode(2.5), TypeError, "refresh_interval must be an int, got 2.5"),
    (lambda: dkv.Decode(True), TypeError, "refresh_interval must be an int, got True"),
    (lambda: dkv.Decode(4, delay=-1), ValueError, "delay must be at least 0, got -1"),
    (lambda: dkv.Decode(4, warmup_steps=0), ValueError, "warmup_steps must be at least 1, got 0"),
    (lambda: dkv.Decode(4, shift="left"), ValueError, "shift must be one of .*got 'left'"),
    (lambda: dkv.Decode(4, scope="row"), ValueError, "scope must be one of .*got 'row'"),
    (lambda: dkv.Greedy(None), TypeError, "refresh_interval must be an int, got None"),
    (lambda: dkv.Greedy(2, -1), ValueError, "window must be at least 0, got -1"),
    (lambda: dkv.Greedy(2, 2**31), ValueError, "window must be at most 1073741824, got 2147483648"),
    (lambda: dkv.Decode(2**70), ValueError, "refresh_interval must be at most"),
    (lambda: dkv.Greedy(2, 4, window_kind="nearest"), ValueError, "window_kind must be one of .*got 'nearest'"),
    (lambda: dkv.PrefillDecode(0), ValueError, "refresh_interval must be at least 1, got 0"),
]


@pytest.mark.parametrize("make, error, message", BAD_POLICIES)
def test_bad_settings_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


class OwnDecode(dkv.Decode):
    """LLaDA's Decode(4) by what a policy of the user's is shown."""

    def active(self, state):
        refresh = (state.block_step < 2) | (state.block_step % 4 == 0)
        return refresh | ~state.decoded_before(2)


def test_a_policy_of_the_users_is_as_good_as_ours(device):
    ids, real = prompts(9, 6, device=device)
    options = {"gen_length": 16, "block_length": 8, "device": device}
    ours, own = (generate("llada", ids, real, policy=policy, **options) for policy in (dkv.Decode(4), OwnDecode(4)))
    assert torch.equal(own.history, ours.history) and torch.equal(own.active, ours.active)


def test_a_policy_without_a_rule(device):
    ids, _ = prompts(9, device=device)
    run = generate("dream", ids, gen_length=8, policy=Alternating(), device=device)
    assert run.active[::2].all() and not run.active[1::2].all(-1).any()


@pytest.mark.parametrize(
    "result, error", [(torch.ones(3, dtype=torch.bool), ValueError), (torch.ones(1, 17), TypeError), (True, TypeError)]
)
def test_active_must_return_flags(result, error, device):
    class Broken(dkv.Policy):
        def active(self, state):
            return result

    with pytest.raises(error, match="Broken.active must return"):
        generate("llada", prompts(9)[0], gen_length=8, policy=Broken())


@pytest.mark.parametrize("kind", ["contiguous", "nearest_masked"])
def test_a_window_wider_than_any_row(kind):
    """It has the columns that there are, and ends."""
    llm, ids = tiny_model("llada"), torch.arange(6)[None]
    options = {"gen_length": 4, "remasking": "random", "output_history": True}
    found = []
    for window in (20, 2**30):
        generator = torch.Generator().manual_seed(0)
        policy = dkv.Greedy(3, window, window_kind=kind)
        found.append(dkv.generate(llm, ids, policy=policy, generator=generator, **options))
    assert torch.equal(found[0].active, found[1].active) and torch.equal(found[0].sequences, found[1].sequences)
