"""Several sequences in turn on one patched model, and loops whose tokens rest on logits that nobody computed."""

import copy
import gc
import random
import threading
import weakref
from unittest import mock

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import EOS_ID as EOS
from tiny import MASK_ID as MASK
from tiny import llada_loop, model, prompts

import dkv
from dkv.memory import memory_of
from dkv.sessions import MAX_SESSIONS


class Loop:
    """One sequence of a LLaDA loop, a step at a time: blocks, one token a step, perhaps updated in place."""

    def __init__(self, ids, *, gen_length=16, block_length=8, in_place=False):
        self.x, self.start = F.pad(ids, (0, gen_length), value=MASK), ids.shape[1]
        self.block_length, self.in_place, self.history = block_length, in_place, []

    def running(self):
        return bool((self.x == MASK).any())

    def logits(self, llm):
        return llm(self.x).logits

    @torch.no_grad()
    def step(self, llm):
        logits = self.logits(llm)
        first = (self.x[:, self.start :] == MASK).int().argmax(1).min().item()
        end = self.start + (first // self.block_length + 1) * self.block_length
        confidence, token = logits.softmax(-1).max(-1)
        confidence[:, end:] = -1
        best = torch.where(self.x == MASK, confidence, -1).argmax(1, keepdim=True)
        if not self.in_place:
            self.x = self.x.clone()
        self.x.scatter_(1, best, token.gather(1, best))
        self.history.append(self.x.clone())


class Guided(Loop):
    """Guidance by two calls a step."""

    def __init__(self, ids, *, cond_first, **options):
        super().__init__(ids, **options)
        self.is_prompt, self.cond_first = self.x != MASK, cond_first

    def logits(self, llm):
        blanked = torch.where(self.is_prompt, MASK, self.x)
        calls = [self.x, blanked] if self.cond_first else [blanked, self.x]
        both = [llm(x).logits for x in calls]
        cond, uncond = both if self.cond_first else both[::-1]
        return uncond + 2 * (cond - uncond)


def run(llm, *loops):
    """The loops in turn, a step each; the sequences after every step of each."""
    while any(loop.running() for loop in loops):
        for loop in loops:
            if loop.running():
                loop.step(llm)
    return [torch.stack(loop.history) for loop in loops]


@pytest.fixture
def llm(device):
    return copy.deepcopy(model("llada", device))


POLICIES = [dkv.Decode(3), dkv.Decode(None, scope="block"), dkv.DualCache()]


@pytest.mark.parametrize("policy, in_place", [(dkv.Decode(3), True), (dkv.DualCache(), False)], ids=repr)
def test_sequences_in_turn_are_each_cached(llm, policy, in_place, device):
    """Four at once, two of them with the same prompt and one of another length: each as it is alone."""
    inputs = [prompts(9, seed=0), prompts(9, seed=1), prompts(9, 9, seed=2), prompts(12, seed=3)]
    inputs = [ids.to(device) for ids, _ in inputs]
    alone = []
    for ids in inputs:
        dkv.replace_attention(llm, policy, block_length=8)
        alone += run(llm, Loop(ids, in_place=in_place))
        full = dkv.stats(llm).full
    dkv.replace_attention(llm, policy, block_length=8)
    found = run(llm, *(Loop(ids, in_place=in_place) for ids in inputs))
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    stats = dkv.stats(llm)
    assert (stats.calls, stats.full, stats.cached) == (64, 4 * full, 64 - 4 * full) and not stats.original
    assert f"calls: {4 * full} full, {64 - 4 * full} cached, 0 original" in repr(llm)
    assert stats.cache_ratio > 0.3 and stats.seconds > 0


def test_best_of_n(llm, device):
    """The same prompt three times: one session until the sequences part, then one for each."""
    ids = prompts(9, device=device)[0]
    dkv.replace_attention(llm, dkv.Decode(None, warmup_steps=1))

    class Sampled(Loop):
        def logits(self, llm):
            logits = super().logits(llm)
            logits[..., len(self.history) + 20 * self.number] += 100
            return logits

    loops = [Sampled(ids) for _ in range(3)]
    for number, loop in enumerate(loops):
        loop.number = number
    run(llm, *loops)
    stats = dkv.stats(llm)
    assert stats.calls == 48 and stats.full == 3


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_guidance_by_two_calls_is_cached_as_in_one(llm, policy, device):
    """The unconditional sequence, whose prompt is masked, is at the block of the other."""
    ids = prompts(9, 9, device=device)[0]
    dkv.replace_attention(llm, policy, block_length=8)
    together = llada_loop(llm, ids, gen_length=16, block_length=8, steps=16, cfg_scale=1.0)
    one = dkv.stats(llm)
    dkv.replace_attention(llm, policy, block_length=8)
    assert torch.equal(run(llm, Guided(ids, cond_first=True))[0], together)
    two = dkv.stats(llm)
    assert (two.calls, two.full, two.cached) == (2 * one.calls, 2 * one.full, 2 * one.cached)


@pytest.mark.parametrize("cond_first", [True, False])
def test_guidance_by_two_calls_without_a_cache(llm, cond_first, device):
    ids = prompts(9, 9, device=device)[0]
    plain = run(llm, Guided(ids, cond_first=cond_first))[0]
    dkv.replace_attention(llm, dkv.Decode(1), block_length=8)
    assert torch.equal(run(llm, Guided(ids, cond_first=cond_first))[0], plain)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("prompt", [9, 12])
def test_guidance_in_the_other_order_runs(llm, policy, prompt, device):
    """The unconditional sequence's blocks are unknown: if they matter, it is computed whole, and no error comes of it."""
    ids = prompts(prompt, device=device)[0]
    ids[0, 4] = 0  # comes in place of a mask of the other sequence, but not from NaN
    dkv.replace_attention(llm, policy, block_length=8)
    found = run(llm, Guided(ids, cond_first=False))[0][-1]
    assert not (found == MASK).any() and torch.equal(found[:, :prompt], ids)
    assert dkv.stats(llm).cached >= 8


def test_guidance_may_leave_a_part_of_the_prompt(llm, device):
    """The blocks are those of the conditional sequence, not where the masks begin."""
    dkv.replace_attention(llm, dkv.DualCache(), block_length=8)
    loop = Guided(prompts(12, device=device)[0], cond_first=True)
    loop.is_prompt[:, 0] = False
    run(llm, loop)
    assert dkv.stats(llm).full == 4 and dkv.stats(llm).cached == 28


def test_a_prompt_in_place_of_masks_of_guidance_is_a_new_sequence(llm, device):
    """The unconditional sequence keeps its masked prompt, so what fills it is another one's prompt."""
    dkv.replace_attention(llm, dkv.DualCache(), block_length=8)
    guided = Guided(prompts(9, device=device)[0], cond_first=True)
    guided.step(llm)
    other = Loop(prompts(5, seed=1, device=device)[0], gen_length=20)
    other.step(llm)
    assert (dkv.stats(llm).full, dkv.stats(llm).cached) == (3, 0)
    run(llm, other, guided)


def random_order(llm, loops, seed=0):
    order = random.Random(seed)
    while left := [loop for loop in loops if loop.running()]:
        order.choice(left).step(llm)


class FromBothEnds(Loop):
    """It decodes the first token of a block, then the others from the right: its masks begin where no block does."""

    def logits(self, llm):
        logits, offset = super().logits(llm), torch.arange(self.x.shape[1], device=self.x.device) - self.start
        blocks = offset // self.block_length
        current = blocks[(self.x == MASK).any(0)].min()
        assert not logits[:, blocks == current][self.x[:, blocks == current] == MASK].isnan().any()
        priority = torch.where(offset % self.block_length == 0, self.block_length, offset % self.block_length)
        logits = torch.zeros_like(logits)
        logits[..., 5] = priority
        return logits


@pytest.mark.parametrize("policy", POLICIES[1:], ids=repr)
def test_a_sequence_whose_session_was_dropped_keeps_its_blocks(llm, policy, device):
    """Its next session begins in the middle of a block: more sequences than sessions, and a call that ends all."""
    dkv.replace_attention(llm, policy, block_length=8)
    loops = [FromBothEnds(prompts(9, seed=seed, device=device)[0]) for seed in range(MAX_SESSIONS + 2)]
    random_order(llm, loops)
    assert all((loop.x != MASK).all() for loop in loops) and dkv.stats(llm).cached > 16
    loop = FromBothEnds(prompts(9, seed=99, device=device)[0])
    while loop.running():
        loop.step(llm)
        if len(loop.history) % 3 == 0:
            likelihood(llm)
    assert (loop.x != MASK).all()


@pytest.mark.parametrize("policy", POLICIES[1:], ids=repr)
def test_without_a_prompt_blocks_begin_at_the_first_column(llm, policy, device):
    dkv.replace_attention(llm, policy, block_length=8)
    loop = FromBothEnds(prompts(9, device=device)[0][:, :0])
    run(llm, loop)
    assert (dkv.stats(llm).full, dkv.stats(llm).cached) == (
        2 if policy == dkv.DualCache() else 4,
        14 if policy == dkv.DualCache() else 12,
    )


def test_a_mask_that_is_put_back_leaves_the_blocks(llm, device):
    dkv.replace_attention(llm, dkv.DualCache(), block_length=8)
    loop = FromBothEnds(prompts(9, device=device)[0])
    while loop.running():
        loop.step(llm)
        if len(loop.history) in (3, 7, 12):
            again = (loop.x[0, 9:] != MASK).nonzero()[0, 0]
            loop.x[0, 9 + again] = MASK
    assert len(loop.history) == 19


def test_a_buffer_may_be_used_again(llm, device):
    """For the same prompt, after a generation that was left: the earlier session knows the same tokens."""
    ids = prompts(9, device=device)[0]
    dkv.replace_attention(llm, dkv.DualCache(), block_length=8)
    buffer = F.pad(ids, (0, 16), value=MASK)
    with torch.no_grad():
        for steps in (9, 16):
            buffer[:, 9:] = MASK
            for step in range(steps):
                llm(buffer[:])
                buffer[0, 9 + step] = 0
    dkv.stats(llm)
    next_prompt(llm)


def test_one_generation_after_another_takes_one_memory(llm, device):
    """In place or not, with one token a step or several: a session that is over serves the next one of its shape."""
    dkv.replace_attention(llm, dkv.Decode(3), block_length=8)
    run(llm, Loop(prompts(9, device=device)[0]))
    (first,) = memory_of(llm).sessions.kept
    for seed in (1, 2):
        run(llm, Loop(prompts(9, seed=seed, device=device)[0], in_place=seed == 1))
        assert memory_of(llm).sessions.kept == [first]
    for seed in (3, 4):
        x = F.pad(prompts(9, seed=seed, device=device)[0], (0, 16), value=MASK)
        with torch.no_grad():
            llm(x)
        x[:, 9:] = 5  # in one step
    llada_loop(llm, prompts(9, seed=5, device=device)[0], gen_length=16, block_length=8, steps=4)
    assert memory_of(llm).sessions.kept == [first]
    ended = weakref.ref(first)
    del first
    run(llm, Loop(prompts(11, device=device)[0]))
    gc.collect()
    assert ended() is None, "another shape needs other memory"


def test_the_oldest_of_too_many_go(llm, device):
    dkv.replace_attention(llm, dkv.Decode(None, warmup_steps=1))
    loops = [Loop(prompts(9, seed=seed, device=device)[0]) for seed in range(MAX_SESSIONS + 1)]
    for loop in loops:
        loop.step(llm)
    kept = memory_of(llm).sessions.kept
    assert len(kept) == MAX_SESSIONS
    loops[1].step(llm)
    assert dkv.stats(llm).cached == 1
    loops[0].step(llm)
    assert dkv.stats(llm).cached == 1, "its session went to the last loop"


def test_caches_take_a_quarter_of_the_free_memory(llm, device, monkeypatch):
    """The oldest go first; the one that is needed stays, however little there is."""
    dkv.replace_attention(llm, dkv.Decode(None, warmup_steps=1))
    loops = [Loop(prompts(9, seed=seed, device=device)[0]) for seed in range(4)]
    loops[0].step(llm)
    (only,) = memory_of(llm).sessions.kept
    size = only.cache.nbytes
    free = 11 * size

    def left(asked):
        assert asked == loops[0].x.device
        return free - sum(each.cache.nbytes for each in memory_of(llm).sessions.kept)

    monkeypatch.setattr("dkv.sessions.free_memory", left)
    for loop in loops[1:]:
        loop.step(llm)
    assert len(memory_of(llm).sessions.kept) == 2
    loops[3].step(llm)
    loops[2].step(llm)
    assert dkv.stats(llm).cached == 2
    free = 0
    loops[0].step(llm)
    assert len(memory_of(llm).sessions.kept) == 1 and dkv.stats(llm).full == 5


def lost(llm, device, *, in_place=True, patched=False):
    """A loop whose last step takes all tokens that are left, on a model that computes blocks of 4."""
    if not patched:
        dkv.replace_attention(llm, dkv.DualCache(), block_length=4)
    x = F.pad(prompts(9, device=device)[0], (0, 16), value=MASK)
    with torch.no_grad():
        for end in (10, 25):
            token = llm(x).logits.argmax(-1)
            x = x if in_place else x.clone()
            x[:, 9:end] = torch.where(x == MASK, token, x)[:, 9:end]
    assert not (x == MASK).any() and (x[:, 9:] == 0).sum() == 12
    return x


def restored(llm):
    dkv.restore_attention(llm)


def next_prompt(llm):
    with torch.no_grad():
        llm(F.pad(prompts(9, seed=1, device=llm.device)[0], (0, 16), value=MASK))


def likelihood(llm):
    with torch.no_grad():
        llm(prompts(9, device=llm.device)[0], output_hidden_states=True)


@pytest.mark.parametrize("look", [next_prompt, likelihood, dkv.stats, dkv.reset, restored, dkv.replace_attention])
def test_tokens_from_nan_in_the_last_step_are_told(llm, look, device):
    """Once, and what was asked for is done all the same."""
    x = lost(llm, device)
    with pytest.raises(RuntimeError, match=r"put token 0 in place of 12 masks whose logits were not computed"):
        look(llm)
    assert ("_dkv" in vars(llm)) == (look is not restored)
    look(llm)
    assert memory_of(llm).sessions is None or all(each.last_input is not x for each in memory_of(llm).sessions.kept)


def test_a_lost_sequence_is_not_told_to_another(llm, device):
    """Which goes on; the next new one is told."""
    dkv.replace_attention(llm, dkv.DualCache(), block_length=4)
    other = Loop(prompts(9, seed=4, device=device)[0], block_length=4)
    other.step(llm)
    lost(llm, device, patched=True)
    other.step(llm)
    assert memory_of(llm).sessions.stats().cached == 2
    with pytest.raises(RuntimeError, match="put token 0 in place of 12 masks"):
        next_prompt(llm)
    other.step(llm)
    assert dkv.stats(llm).cached == 3


def test_where_zero_is_padding_it_proves_nothing(device):
    llm = tiny.tiny_model("llada", pad_token_id=0).to(device)
    lost(llm, device)
    next_prompt(llm)
    dkv.stats(llm)


def test_what_the_loop_does_not_show_is_not_told(llm, device):
    """A new tensor at each step; or the old one, used for something else."""
    lost(llm, device, in_place=False)
    dkv.stats(llm)
    x = lost(llm, device)
    x.zero_()  # the prompt too
    dkv.stats(llm)
    x = lost(llm, device)
    x.resize_(3)
    dkv.stats(llm)
    next_prompt(llm)


def blocks(llm, *commits, policy=None, length=16):
    """Calls with the tokens of each dict put in, by column behind the prompt; the last call's logits."""
    dkv.replace_attention(llm, policy or dkv.DualCache(), block_length=4)
    x = F.pad(prompts(9, 9, device=llm.device)[0], (0, length), value=MASK)
    with torch.no_grad():
        logits = llm(x).logits
        for tokens in commits:
            x = x.clone()
            for (row, column), token in tokens.items():
                x[row, 9 + column] = token
            logits = llm(x).logits
    return logits


def test_a_token_behind_an_unfinished_block_proves_another_block_length(llm):
    message = "put 1 tokens behind a block that still has masks: the block_length of replace_attention, 4, must be the"
    with pytest.raises(RuntimeError, match=message):
        blocks(llm, {(0, 0): 5}, {(1, 7): 5})
    assert not blocks(llm).isnan().any()
    for policy in (dkv.Decode(8), dkv.Prefill(), dkv.PrefixCache()):
        blocks(llm, {(0, 6): 5}, policy=policy)  # computes all masks


def test_blocks_that_begin_elsewhere_are_right_where_all_masks_are_computed(llm, device):
    """A mask inside the prompt: the loop's blocks do not begin there."""
    ids = prompts(9, 9, device=device)[0]
    ids[:, 3] = MASK
    plain = run(llm, Loop(ids))[0]
    dkv.replace_attention(llm, dkv.Decode(1), block_length=8)
    assert torch.equal(run(llm, Loop(ids))[0], plain)
    dkv.replace_attention(llm, dkv.Decode(4), block_length=8)
    run(llm, Loop(ids))
    assert dkv.stats(llm).cached > 4


def test_an_end_of_text_may_be_put_anywhere(llm):
    """Loops fill what is behind it, with whatever they take for padding."""
    for padding in (EOS, 3):
        commits = {(0, 1): EOS} | {(0, column): padding for column in range(2, 16)}
        assert blocks(llm, commits).isnan().any()


def test_whole_blocks_are_another_sequence(llm):
    """One that begins like the session: it is computed whole; then it goes on in its own block."""
    ahead = {(row, column): 5 for row in (0, 1) for column in range(6)}
    assert not blocks(llm, {(0, 0): 5}, ahead).isnan().any()
    assert blocks(llm, {(0, 0): 5}, ahead, {(0, 6): 7}).isnan().any()


def test_masks_that_become_a_block_and_zeros_are_no_other_sequence(llm):
    """The zeros come from NaN."""
    commits = {(0, column): 5 for column in range(1, 4)} | {(0, column): 0 for column in range(4, 8)}
    with pytest.raises(RuntimeError, match="in place of 4 masks whose logits were not computed"):
        blocks(llm, {(0, 0): 5}, commits)


def test_a_prompt_that_begins_like_another_has_blocks_of_its_own(llm, device):
    """It is no sequence with its prompt masked, although the longer one has tokens where it has masks."""
    longer = Loop(prompts(12, device=device)[0], gen_length=16)
    shorter = Loop(prompts(12, device=device)[0][:, :9], gen_length=19)
    dkv.replace_attention(llm, dkv.DualCache(), block_length=8)
    alone = run(llm, copy.deepcopy(shorter))[0]
    full = dkv.stats(llm).full
    dkv.replace_attention(llm, dkv.DualCache(), block_length=8)
    longer.step(llm), longer.step(llm)
    assert torch.equal(run(llm, shorter)[0], alone) and dkv.stats(llm).full == full + 1


def test_other_streams_wait_for_the_last_call(llm, monkeypatch):
    """Before they compare anything with its session, or drop it."""
    dkv.replace_attention(llm, dkv.Decode(None))
    loops = [Loop(prompts(9, seed=seed, device=llm.device)[0]) for seed in range(MAX_SESSIONS + 1)]
    loops[0].step(llm)
    (first,) = memory_of(llm).sessions.kept
    streams = [mock.Mock(), mock.Mock()]
    first.done, first.home, first.stream = mock.Mock(), streams[0], streams[0]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[0])
    loops[1].step(llm)
    assert not first.done.method_calls
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[1])
    loops[1].step(llm)
    first.done.synchronize.assert_called_once_with()
    sessions = memory_of(llm).sessions
    first.done.reset_mock()
    for _ in range(MAX_SESSIONS - 1):
        sessions.put(copy.copy(sessions.kept[1]))
    assert first not in sessions.kept and len(sessions.kept) == MAX_SESSIONS
    first.done.synchronize.assert_called_once_with()


def test_threads_share_the_sessions(llm, device):
    """Each thread's sequence is its own, whatever the others do, and every step but the first can be cached."""
    dkv.replace_attention(llm, dkv.Decode(3), block_length=8)
    inputs = [prompts(9, seed=seed, device=device)[0] for seed in range(3)]
    alone = [run(llm, Loop(ids))[0] for ids in inputs]
    full = dkv.stats(llm).full
    dkv.replace_attention(llm, dkv.Decode(3), block_length=8)
    found = [None] * 3

    def work(index):
        found[index] = run(llm, Loop(inputs[index]))[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    assert dkv.stats(llm).full == full and dkv.stats(llm).calls == 48


def test_a_session_of_old_weights_does_not_come_back(llm, device):
    """One that was serving a call while another thread ended all sessions."""
    dkv.replace_attention(llm, dkv.Decode(None, warmup_steps=1))
    loop = Loop(prompts(9, device=device)[0])
    loop.step(llm)
    sessions = memory_of(llm).sessions
    taken = sessions.next_step(loop.x, None, None)
    with torch.no_grad():
        next(llm.parameters()).mul_(1.01)
    Loop(prompts(9, seed=1, device=device)[0]).step(llm)
    sessions.put(taken)
    assert len(sessions.kept) == 1 and sessions.kept[0] is not taken


def test_a_policy_that_fails_ends_its_session_alone(llm, device):
    class Failing(dkv.Policy):
        fails = False

        def active(self, state):
            if self.fails:
                raise KeyError("mine")
            return state.masked

    policy = Failing()
    dkv.replace_attention(llm, policy)
    loops = [Loop(prompts(9, seed=seed, device=device)[0]) for seed in range(2)]
    for loop in loops:
        loop.step(llm)
    policy.fails = True
    with pytest.raises(KeyError):
        loops[0].step(llm)
    policy.fails = False
    for loop in loops:
        loop.step(llm)
    assert (dkv.stats(llm).full, dkv.stats(llm).cached) == (3, 1)


def test_statistics_name_every_reason(llm):
    with pytest.raises(ValueError, match="stats needs a model of dkv.replace_attention; dkv.generate returns its own"):
        dkv.stats(llm)
    x = F.pad(prompts(9, device=llm.device)[0], (0, 4), value=MASK)
    dkv.replace_attention(llm, "NoCache")
    with torch.no_grad():
        llm(x), llm(x)
    assert dkv.stats(llm).original == {"the policy is NoCache()": 2}
    dkv.replace_attention(llm)
    assert dkv.stats(llm) == dkv.PatchStats() and dkv.stats(llm).calls == 0 and "calls" not in repr(llm)
    with pytest.warns(UserWarning, match="grad mode is on"):
        llm(x)
    with torch.no_grad():
        llm(x)
        dkv.reset(llm)
        llm(x)
    found = dkv.stats(llm)
    assert (found.calls, found.full, found.cached, found.cache_ratio) == (3, 2, 0, 0.0)
    assert list(found.original.values()) == [1] and "grad mode" in next(iter(found.original))


def test_a_row_that_has_ended_was_not_cached(llm, device):
    """Nothing of it needs to be computed."""
    dkv.replace_attention(llm, dkv.Decode(1))
    x = F.pad(prompts(9, 9, device=device)[0], (0, 4), value=MASK)
    with torch.no_grad():
        for filled in range(3):
            x = x.clone()
            x[0, 9:], x[1, 9 : 9 + filled] = 5, 5
            llm(x)
    found = dkv.stats(llm)
    assert (found.full, found.cached, found.cache_ratio) == (3, 0, 0.0)
