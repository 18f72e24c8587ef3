"""Masks inside a prompt, with and without text after it, and text after an empty prompt."""

import math

import pytest
import torch
from tiny import FAMILIES, POLICIES, generate, model, prompts
from tiny import MASK_ID as MASK

import dkv
from dkv.generation import prepare


@torch.no_grad()
def by_a_plain_loop(family, x, ends, steps_of_blocks, order=None):
    """An uncached run of one sequence, from logits of the model's own forward.

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
            logits[..., MASK] = -math.inf
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


MORE = {"plain": {}, "steps": {"steps": 3}, "threshold": {"threshold": 0.3}, "guidance": {"cfg_scale": 1.0}}
MORE |= {"ends": {"eos_early_stop": True, "eos_token_id": list(range(100))}, "blocks": {"block_length": 3}}
MORE |= {"origin": {"remasking": "origin"}, "noise": {"temperature": 0.7}}


def options_of(family, policy, more):
    """Options of both, or None where they exclude each other."""
    policy = POLICIES[policy](family)
    if policy.needs_order and more == "threshold":
        return None
    return {"policy": policy} | ({"remasking": "random"} if policy.needs_order else {}) | MORE[more]


def check_infilling(family, policy, more):
    """Masks are filled and nothing else changes; each row is its own run (its noise is by its number: the first's)."""
    options, (ids, real) = options_of(family, policy, more), INFILLING
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
    options = options_of(family, policy, more)
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
    assert sum(check(family, policy, more) for more in MORE) == len(MORE) - POLICIES[policy](family).needs_order


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="these models are the CPU's")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["Decode", "Greedy", "DualCache"])
def test_kernels_give_the_same_tokens(family, policy):
    order = torch.tensor([[1, 0, 2]])
    empty = {"gen_length": 3, "remasking": "random", "order": order, "policy": POLICIES[policy](family)}
    infilling = options_of(family, policy, "plain") | {"gen_length": 0}
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
