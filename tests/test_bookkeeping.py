"""The bookkeeping of a step (`active`, `advance`, `packing`): kernels and twins agree, step by step."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, POLICIES, Alternating
from tiny import MASK_ID as MASK
from utils import pairwise

import dkv
from dkv.active import rule_of, write_active
from dkv.kernels import reference
from dkv.kernels.direct import TRITON
from dkv.kernels.noise import noise_key
from dkv.kernels.rows import Counter, Size
from dkv.sampling import Sampler, write_order
from dkv.schedule import Schedule
from dkv.state import State

END, PAD = 7, 9


class Books:
    """A run without a model: tokens come from a generator, everything else from one implementation."""

    def __init__(
        self, ops, family, policy, *, prompt, gen_length, block_length, device, ordered=None, commits=None, of_rows=()
    ):
        """of_rows: arguments of `State.start` that differ by row."""
        batch, shifted = len(prompt), family == "dream"
        seqlen = prompt.shape[1] + gen_length
        self.policy, self.commits, self.foresee = policy, None, False
        self.schedule = Schedule(
            steps=gen_length, gen_length=gen_length, block_length=block_length, time_steps=shifted, eps=1e-3
        )
        self.state = State(
            batch, seqlen, mask_id=MASK, shifted=shifted, ops=ops, device=device, ordered=ordered is not None
        )
        self.ids = torch.full((batch, seqlen), MASK, device=device)
        self.ids[:, : prompt.shape[1]] = prompt
        valid = self.ids != PAD
        options = {"first_generated": prompt.shape[1], "block_length": block_length, "gen_length": gen_length}
        options["seed"] = torch.arange(batch, device=device) * 2**30 + 5
        self.state.start(self.ids, valid, **options | dict(of_rows))
        masks = (prompt == MASK).sum(1).tolist()
        if ordered:
            sampler = SimpleNamespace(
                config=SimpleNamespace(remasking=ordered),
                priority=lambda state, order: Sampler.priority(None, state, order),
            )
            write_order(sampler, self.schedule, self.state, None, masks)
        else:
            self.commits = self.schedule.commits(masks).to(device) if commits is None else commits
        self.active = torch.zeros(batch, seqlen, dtype=torch.bool, device=device)
        self.sizes = torch.full((batch, len(Size)), -1, dtype=torch.int32, device=device)
        self.totals = torch.zeros(batch, 2, dtype=torch.int64, device=device)
        self.end_ids = torch.tensor([END, 251], device=device)
        self.advance()

    def advance(self):
        self.state.advance(commits=self.commits, end_ids=self.end_ids, pad_id=PAD)
        write_active(self.policy, self.state, self.active, self.sizes, self.totals, foresee=self.foresee)

    def everything(self):
        state = self.state
        return [state.x, state.decoded_step, state.counters, state.candidates, state.counts] + [
            self.active,
            self.sizes,
            self.totals,
        ]


def prompts(lengths, device, *, masks=0):
    """Left-padded prompts with some masks inside."""
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(10, 200, (len(lengths), max(lengths)), generator=generator)
    for row, length in enumerate(lengths):
        ids[row, : max(lengths) - length] = PAD
        if length > 1:
            ids[row, max(lengths) - length + torch.randperm(length, generator=generator)[:masks]] = MASK
    return ids.to(device)


def commit(books, generator):
    """Decodes a random part of the candidates, the same in all books."""
    candidates = books[0].state.candidates
    chosen = candidates & (torch.rand(candidates.shape, generator=generator).to(candidates.device) < 0.5)
    tokens = torch.randint(0, 20, candidates.shape, generator=generator).to(candidates.device)
    for each in books:
        each.state.x.copy_(torch.where(chosen, tokens, each.state.x))


def assert_same(one, other, step):
    for index, (a, b) in enumerate(zip(one.everything(), other.everything(), strict=True)):
        assert torch.equal(a, b), f"step {step}, tensor {index}:\n{a}\n{b}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "policy, masks",
    [*((policy, 0) for policy in [*POLICIES, "one of the user's"]), ("Decode", 2), ("DualCache", 2), ("Greedy", 2)],
)
def test_kernels_keep_the_books_as_their_twins(family, policy, masks, device):
    policy = POLICIES[policy](family) if policy in POLICIES else Alternating()
    ordered = ("random" if masks else "origin") if policy.needs_order else None
    options = {"gen_length": 7, "block_length": 4, "device": device, "ordered": ordered}
    prompt = prompts([4, 1], device, masks=masks)
    books = [Books(ops, family, policy, prompt=prompt, **options) for ops in (TRITON, reference)]
    for each in books:
        each.foresee = rule_of(policy, family == "dream") is not None and not policy.needs_order
    generator = torch.Generator().manual_seed(3)
    for step in range(5):
        assert_same(*books, step)
        commit(books, generator)
        for each in books:
            each.advance()
    assert_same(*books, "last")


@settings(max_examples=10)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from(FAMILIES),
    st.sampled_from(list(POLICIES)),
    st.integers(0, 2),
)
def test_any_shape(device, lengths, gen_length, block_length, family, policy, masks):
    policy = POLICIES[policy](family)
    options = {"gen_length": gen_length, "block_length": min(block_length, gen_length), "device": device}
    options["ordered"] = "random" if policy.needs_order else None
    prompt = prompts(lengths, device, masks=masks)
    books = [Books(ops, family, policy, prompt=prompt, **options) for ops in (TRITON, reference)]
    generator = torch.Generator().manual_seed(gen_length)
    for step in range(3):
        assert_same(*books, step)
        commit(books, generator)
        for each in books:
            each.advance()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", [p for p in POLICIES if not p.startswith("Greedy")])
def test_what_is_foreseen_is_enough(family, policy, device):
    """LATER bounds the positions that the next step in the same block recomputes; under Decode it is exact."""
    policy = POLICIES[policy](family)
    books = Books(
        reference, family, policy, prompt=prompts([6, 1, 4], device), gen_length=13, block_length=5, device=device
    )
    books.foresee = True
    books.end_ids = None
    generator = torch.Generator().manual_seed(4)
    compared = 0
    for _ in range(16):
        block, later = books.state.block.clone(), books.sizes[:, Size.LATER].clone()
        commit([books], generator)
        books.advance()
        same = ((books.state.block == block) & books.state.running)[:, 0] & (books.state.step[:, 0] > 1)
        active = books.sizes[:, Size.ACTIVE]
        assert (active <= later)[same].all()
        if isinstance(policy, dkv.Decode) and policy.delay == 1 and policy.shift in (None, "un_right"):
            assert torch.equal(active[same], later[same])
        compared += int(same.sum())
    assert compared > 10


def packed_by_hand(books, positions, capacity, copies):
    """The lists of a step, one position at a time."""
    state, active = books.state, books.active
    found = {name: [] for name in ("slots", "ids", "positions", "places", "keys", "wanted slots", "wanted positions")}
    ends, wanted_ends = [0], [0]
    for row in range(len(active) * copies):
        own = row % len(active)
        first = int(state.first_column[own])
        places = {}
        for column in range(active.shape[1]):
            if active[own, column]:
                places[column] = len(found["slots"])
                found["slots"].append(row * active.shape[1] + column)
                found["ids"].append(int(books.ids[own, column]))
                found["positions"].append(int(positions[row, column]))
        for column in range(active.shape[1]):
            if state.candidates[own, column]:
                predictor = max(column - 1, first) if state.shifted else column
                counters = state.counters[own]
                key = noise_key(
                    *(int(counters[c]) for c in (Counter.SEED, Counter.REQUEST, Counter.STEP)), column - first
                )
                found["wanted slots"].append(row * active.shape[1] + column)
                found["wanted positions"].append(int(positions[row, predictor]))
                found["places"].append(min(places[predictor], capacity - 1))
                found["keys"].append(key)
        ends.append(len(found["slots"]))
        wanted_ends.append(len(found["wanted slots"]))
    return found, ends, wanted_ends


# capacities of the two lists and per row: roomy, too small, too small for a row
@pytest.mark.parametrize("ops", [TRITON, reference], ids=["triton", "reference"])
@pairwise("family, copies, room", FAMILIES, [1, 2], [(200, 90, 30), (31, 7, 30), (200, 90, 9)])
def test_a_step_is_packed(ops, family, copies, room, device):
    books = Books(
        ops,
        family,
        dkv.Decode(3),
        prompt=prompts([6, 1, 4], device, masks=1),
        gen_length=13,
        block_length=5,
        device=device,
    )
    generator = torch.Generator().manual_seed(5)
    positions = torch.randint(0, 99, (3 * copies, books.ids.shape[1]), generator=generator).to(device)
    excess = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(2):
        books.ids = books.state.x.clone()
        packed, wanted = ops.pack_step(
            books.active,
            books.state.candidates,
            books.sizes,
            books.ids.repeat(copies, 1),
            positions,
            books.state.counters,
            excess.zero_(),
            capacity=room[0],
            candidate_capacity=room[1],
            per_row=room[2],
            shifted=family == "dream",
            noisy=True,
        )
        found, ends, wanted_ends = packed_by_hand(books, positions, room[0], copies)
        lists = {"slots": packed.slots, "ids": packed.ids, "positions": packed.positions}
        lists |= {"wanted slots": wanted.slots, "wanted positions": wanted.positions}
        lists |= {"places": wanted.logits_indices, "keys": wanted.keys}
        for name, got in lists.items():
            want = found[name][: len(got)]
            assert got[: len(want)].tolist() == want, name
            if "slots" in name:
                assert (got[len(want) :] == -1).all()
        assert packed.cu_seqlens.tolist() == ends and wanted.cu_seqlens.tolist() == wanted_ends
        of_a_row = max(end - start for ends_ in (ends, wanted_ends) for start, end in itertools.pairwise(ends_))
        assert int(excess) == max(0, ends[-1] - room[0], wanted_ends[-1] - room[1], of_a_row - room[2])
        commit([books], generator)
        books.advance()


@pytest.mark.parametrize("ops", [TRITON, reference], ids=["triton", "reference"])
def test_rows_are_at_steps_of_their_own(ops, device):
    """Two rows with different lengths and blocks, started at different times, act as each does alone."""
    prompt = prompts([5, 5], device)

    numbers = {"first_generated": [5, 6], "block_length": [4, 3], "gen_length": [8, 6], "seed": [3, 4]}
    numbers = {name: torch.tensor(value, device=device) for name, value in numbers.items()}
    commits = torch.arange(2 * 3 * 4, device=device).view(2, 3, 4)

    def books_of(rows):
        options = {"gen_length": 8, "block_length": 4, "device": device, "commits": commits[rows].contiguous()}
        options["of_rows"] = {name: value[rows] for name, value in numbers.items()}
        return Books(ops, "llada", dkv.Decode(4, scope="block"), prompt=prompt[rows], **options)

    together, early, late = books_of(slice(0, 2)), books_of(slice(0, 1)), books_of(slice(1, 2))
    generator = torch.Generator().manual_seed(6)
    for _ in range(3):
        commit([early], generator)
        early.advance()
    for whole, first, second in zip(together.everything(), early.everything(), late.everything(), strict=True):
        whole[0], whole[1] = first[0], second[0]
    for _ in range(6):
        commit([together], generator)
        early.state.x.copy_(together.state.x[:1])
        late.state.x.copy_(together.state.x[1:])
        for each in (together, early, late):
            each.advance()
        for whole, first, second in zip(together.everything(), early.everything(), late.everything(), strict=True):
            assert torch.equal(whole, torch.cat((first, second)))


@pytest.mark.sanitizer
def test_small_run_for_the_sanitizer(device):
    options = {"gen_length": 6, "block_length": 3, "device": device}
    books = Books(TRITON, "dream", dkv.Decode(3), prompt=prompts([4, 1], device, masks=1), **options)
    ids = books.state.x.clone()
    excess = torch.zeros((), dtype=torch.int64, device=device)
    lists = (books.active, books.state.candidates, books.sizes, ids, ids, books.state.counters, excess)
    TRITON.pack_step(*lists, capacity=9, candidate_capacity=2, per_row=9, shifted=True, noisy=True)
    greedy = Books(TRITON, "llada", dkv.Greedy(4, 2), prompt=prompts([4], device), ordered="random", **options)
    for each in (books, greedy):
        each.state.x.copy_(torch.where(each.state.candidates, 5, each.state.x))
        each.advance()
        assert int(each.sizes[0, Size.ACTIVE]) > 0
