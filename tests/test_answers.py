"""Logits that hold no answer (NaN, +inf, nothing above -inf): no excluded id is chosen, and `generate` says where."""

import contextlib
import math

import numpy as np
import pytest
import torch
from tiny import EOS_ID, FAMILIES, MASK_ID, IdentityHead, tiny_model
from triton.runtime import interpreter
from utils import cumulative

import dkv
from dkv.generation import prepare
from dkv.kernels import commit, lm_head_confidence, reference
from dkv.kernels.configs import CommitConfig
from dkv.kernels.direct import TRITON
from dkv.kernels.noise import gumbel
from dkv.kernels.noise import noise_key as key_of
from dkv.kernels.reference import LOWEST
from dkv.kernels.rows import Counter
from dkv.sampling import Sampler

NAN, INF = math.nan, math.inf
IMPLS = ["triton", "reference"]

# NumPy's maximum in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value", "ignore:overflow")


class Cases:
    """Random inputs of `lm_head_confidence`: of hidden size 1, so that every implementation has the same logits."""

    LOW = [-INF, -1e30, -1.5e30, -3e38, 0.0]
    ODD = [*LOW, NAN, INF, 1e30, 1.5e30, 3e38]

    def __init__(self, seed, device):
        self.generator, self.device = torch.Generator().manual_seed(seed), device

    def pick(self, *values):
        return values[int(torch.randint(len(values), (), generator=self.generator))]

    def numbers(self, count, dtype, odd):
        """Normal ones, and any share of odd ones."""
        values = 3 * torch.randn(count, generator=self.generator)
        odd = torch.tensor(odd)[torch.randint(len(odd), (count,), generator=self.generator)]
        share = self.pick(0.0, 0.02, 0.1, 0.5)
        return torch.where(torch.rand(count, generator=self.generator) < share, odd, values).to(dtype)

    def scales(self, rows, *odd):
        """A float, or one of each row, some of which are odd."""
        if self.pick(True, False):
            return self.pick(1.0, 0.3, 1e28)
        chosen = torch.randint(6 + len(odd), (rows,), generator=self.generator)
        return torch.tensor([1.0, 0.3, 2.0, 0.1, 3.0, 1e25, *odd])[chosen].to(self.device)

    def make(self):
        """hidden (rows, 1), weight (vocab, 1), options."""
        rows, vocab = self.pick(1, 6, 40), self.pick(1, 2, 5, 130, 300)
        dtype = self.pick(torch.float32, torch.float16)
        hidden, weight = self.numbers(rows, dtype, self.ODD), self.numbers(vocab, dtype, self.pick(self.LOW, self.ODD))
        if self.pick(True, False):
            hidden.fill_(1.0)
        options = {"logit_scale": self.scales(rows, NAN, INF, 0.0)}
        few = torch.randperm(vocab, generator=self.generator)[: self.pick(0, 1, vocab // 2, vocab - 1)].tolist()
        options["exclude_ids"] = few[: vocab - 1]
        if self.pick(True, False):
            options["noise_key"] = torch.randint(2**32, (rows,), generator=self.generator).to(self.device)
            options["noise_scale"] = self.pick(3e38, self.scales(rows, NAN, INF, -INF, 3e38, 0.0))
        return hidden[:, None].to(self.device), weight[:, None].to(self.device), options


def expected(hidden, weight, *, logit_scale, exclude_ids, noise_scale=0.0, noise_key=None):
    """z, what is drawn from (float64, -inf where nothing can be) and whether there is an answer, by their definition."""

    def by_row(scale):
        return scale[:, None] if isinstance(scale, torch.Tensor) else scale

    z = hidden.float() * weight.float()[:, 0] * by_row(logit_scale)
    allowed = torch.ones(len(weight), dtype=torch.bool, device=z.device)
    allowed[exclude_ids] = False
    largest = torch.where(allowed & ~z.isnan(), z, -INF).amax(1)
    answered = ~(z.isnan() & allowed).any(1) & (largest < -LOWEST) & (largest > LOWEST)
    noisy = z.double()
    if noise_key is not None:
        noisy = noisy + by_row(noise_scale) * gumbel(key_of(noise_key[:, None], torch.arange(len(weight)).to(z.device)))
    noisy = torch.where(allowed & (z > LOWEST), noisy, -INF)
    return z, noisy, answered & (noisy.amax(1) > -INF)


def check(hidden, weight, options):
    """Both implementations by the definition, and against each other; returns how many rows have an answer."""
    z, noisy, answered = expected(hidden, weight, **options)
    first = min(set(range(len(weight))) - set(options["exclude_ids"]))
    results = [lm_head_confidence(hidden, weight, impl=impl, **options) for impl in IMPLS]
    for found in results:
        assert not torch.isin(found.token, torch.tensor(options["exclude_ids"], device=z.device)).any()
        assert (found.token[~answered] == first).all()
        for values in found[1:]:
            assert values[~answered].isnan().all() and values[answered].isfinite().all()
        top, token = noisy[answered].max(1)
        short = top - noisy[answered].gather(1, found.token[answered][:, None])[:, 0]
        # float32 noise may hide what is so close
        assert ((found.token[answered] == token) | (short <= 1e-5 * top.abs())).all()
    one, other = results
    same = one.token == other.token
    torch.testing.assert_close(one.log_prob[same], other.log_prob[same], rtol=1e-4, atol=1e-4, equal_nan=True)
    for name in ("margin", "entropy"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-4, equal_nan=True)
    return int(answered.sum())


def check_many(seeds, device):
    rows, answered = 0, 0
    for seed in seeds:
        case = Cases(seed, device).make()
        rows += len(case[0])
        answered += check(*case)
    assert 0.1 * rows < answered < 0.9 * rows


@pytest.fixture(params=["keeps NaN", "drops NaN"])
def maximum(request, monkeypatch):
    """The maximum of NaN depends on the device; only one that is told to keep NaN does so for certain."""
    if request.param == "keeps NaN":
        monkeypatch.setattr(np, "nanmax", np.max)
    else:
        operation = lambda self, one, other: self.binary_op(one, other, np.fmax)  # noqa: E731
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_maxnumf", operation)


EXAMPLES = [  # logits, excluded ids, the token or None
    ([1.0, -INF, 2.0, 0.0], [], 2),
    ([-INF, -2e30, 2.0, -3e38], [], 2),
    ([NAN, 1.0, 2.0], [0], 2),
    ([1.0, INF, 2.0], [1], 2),
    ([1.0, 9e29], [], 1),
    ([-9e29, -3e38, -INF], [0], None),
    ([2.0, 1.0, NAN], [], None),
    ([NAN, NAN], [], None),
    ([INF, 1.0], [], None),
    ([INF, INF], [], None),
    ([1.0, 1e30], [], None),
    ([-INF, -INF, -INF], [1], None),
    ([-1.6e30, -2.4e30, -3.2e30], [0], None),
    ([5.0, NAN, 1.0, -INF], [0, 3], None),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("maximum, apart", [("keeps NaN", 1), ("drops NaN", 60)], indirect=["maximum"])
def test_examples_by_hand(device, maximum, impl, apart):
    """In one tile of the vocabulary, and in several."""
    for logits, excluded, token in EXAMPLES:
        weight = torch.full((len(logits) * apart, 1), -INF, device=device)
        weight[::apart, 0] = torch.tensor(logits, device=device)
        allowed = [place for place in range(len(logits)) if place not in excluded]
        options = {"exclude_ids": [place * apart for place in excluded], "impl": impl}
        found = lm_head_confidence(torch.ones(1, 1, device=device), weight, **options)
        if token is None:
            assert found.token == min({*range(len(weight))} - {*options["exclude_ids"]})
            assert found.log_prob.isnan() and found.margin.isnan() and found.entropy.isnan()
            continue
        likely = torch.tensor(logits, dtype=torch.float64)[allowed]
        likely = likely[likely > LOWEST]
        probs = likely.softmax(0)
        assert found.token == token * apart
        two = torch.nn.functional.pad(probs, (0, 1)).topk(2).values.float()
        torch.testing.assert_close(found.margin.cpu(), two[:1] - two[1:])
        torch.testing.assert_close(found.entropy.cpu(), torch.special.entr(probs).sum()[None].float())
        torch.testing.assert_close(found.log_prob.cpu(), probs.amax()[None].log().float())


@pytest.mark.parametrize("impl", IMPLS)
def test_noise_of_any_scale(device, impl):
    """Nothing gets infinite, and neither an excluded id nor one of -inf wins by it."""
    weight = torch.tensor([5.0, -INF, 9e29, -2e30, *[1.0] * 40], device=device)[:, None]
    hidden, keys, kept = torch.ones(8, 1, device=device), torch.arange(8, device=device), [2, *range(4, 44)]
    found = lm_head_confidence(hidden, weight, noise_scale=3e38, noise_key=keys, exclude_ids=[0], impl=impl)
    draws = gumbel(key_of(keys[:, None], torch.tensor(kept, device=device)))
    assert found.token.tolist() == [kept[place] for place in draws.argmax(1).tolist()]
    scales = torch.full((8,), NAN, device=device)
    found = lm_head_confidence(hidden, weight, noise_scale=scales, noise_key=keys, exclude_ids=[0], impl=impl)
    assert (found.token == 1).all() and found.log_prob.isnan().all()


def test_rows_without_an_answer(device, maximum):
    check_many(range(6), device)


@pytest.mark.full
def test_many_rows_without_an_answer(device, maximum):
    check_many(range(6, 300), device)


OPTIONS = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.7, "divides_logits": True},
    {"top_p": 0.6},
    {"top_k": 2, "temperature": 1.0},
    {"unconfident_ids": (1, 3)},
    {"unconfident_ids": (1, 3), "temperature": 1.0, "top_p": 0.9},
]


@pytest.mark.parametrize("remasking", ["low_confidence", "entropy", "topk_margin"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_in_memory(device, remasking, options, dtype):
    """The same where the logits are materialised: odd ones in single places of a row."""
    generator = torch.Generator().manual_seed(0)
    odd = torch.tensor([NAN, INF, -INF, 3e38, -3e38])
    logits = 2 * torch.randn(200, 9, generator=generator)
    is_odd = torch.rand(200, 9, generator=generator) < torch.rand(200, 1, generator=generator) ** 3
    logits[is_odd] = odd[torch.randint(5, (int(is_odd.sum()),), generator=generator)]
    logits, excluded = logits.to(dtype).to(device), (0, 4)
    options = dict(divides_logits=False, unconfident_ids=()) | options
    of_sampler = {name: options.pop(name) for name in ("divides_logits", "unconfident_ids")}
    config = dkv.GenerateConfig(remasking=remasking, **options)
    sampler = Sampler(config, excluded_ids=excluded, **of_sampler)
    keys = torch.arange(200, device=device) if config.noisy else None
    token, score = sampler.predict(IdentityHead(9), logits, keys, reference)
    z = logits.float()
    z[:, excluded] = -INF
    largest = z.amax(1)
    answered = (largest < -LOWEST) & (largest > LOWEST)
    assert 40 < answered.sum() < 160
    assert torch.equal(score.isnan(), ~answered)
    assert (token[~answered] == 1).all() and not torch.isin(token, torch.tensor(excluded, device=device)).any()
    assert (z.gather(1, token[:, None])[answered] > LOWEST).all()
    unconfident = torch.isin(token, torch.tensor(sampler.unconfident_ids, device=device))
    assert torch.equal(score.isinf(), answered & unconfident)


def committed(ops, rows, before, padding):
    """Counters (batch, len(Counter)) after a commit of scores; each row is at step 10 + its number."""
    counters = torch.full((len(rows), len(Counter)), -5)
    counters[:, Counter.STEP] = torch.arange(len(rows)) + 10
    counters[:, Counter.NAN_STEP] = torch.tensor(before)
    scores = torch.tensor([score for row in rows for score in row] + [NAN] * padding)
    x = torch.zeros(len(rows), 60, dtype=torch.int64)
    slots = [row * 60 + place for row, row_scores in enumerate(rows) for place in range(len(row_scores))]
    slots, tokens = torch.tensor(slots + [-1] * padding), torch.ones(len(scores), dtype=torch.int64)
    counts = torch.full((len(rows),), 1)
    ops.commit_tokens(x, tokens, scores, slots, cumulative(map(len, rows)), counts, counters=counters)
    # a score that counts as -inf is still committed where nothing is better
    assert x.sum(1).tolist() == [min(len(row), 1) for row in rows]
    return counters


@pytest.mark.parametrize("ops", [TRITON, reference], ids=IMPLS)
def test_the_first_nan_of_a_row_is_kept(ops, monkeypatch):
    """By whichever program finds it; not that of padding, nor of other rows."""
    monkeypatch.setattr(commit, "commit_config", lambda device: CommitConfig(block_m=16, block_n=32, num_warps=1))
    many = [0.5] * 50
    rows = [many, [NAN], [], [*many, NAN], [NAN] * 40, [NAN, *many], [-INF, INF]]
    found = committed(ops, rows, [-1, -1, -1, -1, 4, 0, -1], padding=40)
    assert found[:, Counter.NAN_STEP].tolist() == [-1, 11, -1, 13, 4, 0, -1]
    unchanged = [counter for counter in Counter if counter not in (Counter.STEP, Counter.NAN_STEP)]
    assert (found[:, unchanged] == -5).all()
    assert found[:, Counter.STEP].tolist() == list(range(10, 17))


def shallow(family, **changes):
    return tiny_model(family, **{"llada": {"n_layers": 1}, "dream": {"num_hidden_layers": 1}}[family], **changes)


@contextlib.contextmanager
def nan_embedding(model, token):
    """The embedding of a token is NaN."""
    row = next(p for name, p in model.named_parameters() if "wte" in name or "embed_tokens" in name).data[token]
    kept = row.clone()
    row.fill_(NAN)
    try:
        yield
    finally:
        row.copy_(kept)


def prompts():
    """Two rows, the second one padded."""
    ids = torch.randint(0, 200, (2, 7), generator=torch.Generator().manual_seed(1))
    ids[1, :3] = EOS_ID
    return ids, torch.arange(7) >= torch.tensor([[0], [3]])


def generate(model, **options):
    settings = {"gen_length": 5, "generator": torch.Generator().manual_seed(0)} | options
    return dkv.generate(model, *prompts(), output_history=True, **settings)


def first_uses(output):
    """{token: (step, rows)}: when a generated token, that is not in the prompts, is first an input, and of which rows."""
    uses = {}
    for row, (x, steps) in enumerate(zip(output.sequences.tolist(), output.decoded_step.tolist(), strict=True)):
        for token, step in zip(x, steps, strict=True):
            step = 0 if step < 0 else step + 1
            uses.setdefault(token, {}).setdefault(step, set()).add(row)
    return {token: (min(steps), sorted(steps[min(steps)])) for token, steps in uses.items()}


def assert_raises_where_a_token_is_nan(model, want, **options):
    """want: the output without NaN. Takes the token that is used last but before the last step."""
    uses = [(use, token) for token, use in first_uses(want).items() if 0 < use[0] < len(want.history)]
    (step, rows), token = max(uses)
    with nan_embedding(model, token):
        with pytest.raises(RuntimeError, match=rf"step {step}: the logits of rows \{rows} .*NaN.*float16"):
            generate(model, **options)


GENERATE_OPTIONS = [
    {},
    {"remasking": "low_confidence", "steps": 4},
    {"remasking": "entropy"},
    {"remasking": "topk_margin", "block_length": 3},
    {"remasking": "maskgit_plus", "alg_temp": 0.3},
    {"remasking": "random"},
    {"remasking": "origin"},
    {"temperature": 0.8},
    {"top_p": 0.8, "temperature": 0.8},
    {"top_k": 3},
    {"cfg_scale": 0.7},
    {"threshold": 0.9},
    {"factor": 0.4, "temperature": 0.5},
    {"eos_early_stop": True, "eos_token_id": [253]},
    {"confidence_eos_eot_inf": True},
    {"policy": dkv.NoCache()},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_says_which_step_of_which_rows(family):
    """Under every rule; the next run of the model is right again."""
    model = shallow(family)
    first = generate(model)
    for options in GENERATE_OPTIONS:
        assert_raises_where_a_token_is_nan(model, generate(model, **options), **options)
    assert torch.equal(generate(model).history, first.history)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"policy": dkv.Decode(3, shift="un")}, {"threshold": 0.9}], ids=str)
def test_without_a_read_at_each_step(family, options, sized_as_on_a_gpu):
    """Where the host reads late or only what is left in the end, it hears of the same step."""
    if family == "llada" and "policy" in options:
        options = {"policy": dkv.Greedy(2, 1), "remasking": "random"}
    sized_as_on_a_gpu()
    model = shallow(family)
    want = generate(model, **options)
    assert_raises_where_a_token_is_nan(model, want, **options)
    assert torch.equal(generate(model, **options).history, want.history)


def test_sizes_that_are_read_late_end_a_run_early(sized_as_on_a_gpu):
    sized_as_on_a_gpu()
    model = shallow("dream")
    current = prepare(model, prompts()[0], gen_length=5)
    with nan_embedding(model, MASK_ID), pytest.raises(RuntimeError, match="step 0: "):
        while current.running():
            current.step()
    # those of a step are read when the next one has been launched
    assert current.steps == 2


def test_the_end_of_a_run_is_one_read(monkeypatch):
    current = prepare(shallow("llada"), prompts()[0], gen_length=2)
    while current.running():
        current.step()
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or tolist(self))
    for name in ("__int__", "__bool__", "item"):
        monkeypatch.setattr(torch.Tensor, name, lambda self: pytest.fail("another read"))
    current.finish()
    assert len(reads) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="these models are the CPU's")
def test_the_kernels_say_it_too():
    model = shallow("llada")
    options = {"gen_length": 2, "threshold": 1.0}
    assert_raises_where_a_token_is_nan(model, generate(model, **options), impl="triton", **options)


@pytest.mark.parametrize("options", [{}, {"threshold": 0.9}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_computed_may_be_nan(family, options):
    """The tokens of a row that has ended, and padding."""
    model = shallow(family)
    options = {"block_length": 1, "temperature": 1.0, **options}
    end = int(generate(model, **options).sequences[0, 7])
    options |= {"eos_early_stop": True, "eos_token_id": [end]}
    want = generate(model, **options)
    assert len(want.history) == 5 and want.sequences[0, 8:].tolist() == [EOS_ID] * 4
    assert not torch.isin(want.sequences[1, 3:], torch.tensor([end, EOS_ID])).any()
    with nan_embedding(model, end), nan_embedding(model, EOS_ID):
        assert torch.equal(generate(model, **options).history, want.history)


def test_float16_that_overflows():
    model = tiny_model("llada", dtype=torch.float16)
    with torch.no_grad():
        for parameter in model.model.transformer.blocks[0].parameters():
            parameter *= 2000
    with pytest.raises(RuntimeError, match=r"step 0: the logits of rows \[0, 1\] give no answer \(NaN"):
        generate(model)


def test_no_mask_decodes_into_itself():
    """The mask has the id that a row of NaN might lead to; with a threshold that would go on for ever."""
    model = shallow("llada", mask_token_id=0)
    torch.nn.init.constant_(model.model.transformer.ln_f.weight, NAN)
    for options in ({"threshold": 0.9}, {"eos_early_stop": True}):
        with pytest.raises(RuntimeError, match="step 0: "):
            generate(model, temperature=1.0, **options)


class Hiding(dkv.Policy):
    """Takes the candidates away."""

    def active(self, state):
        state.candidates.zero_()
        return state.valid


class Undoing(dkv.Policy):
    """Masks what was decoded, in one row after the other."""

    def active(self, state):
        row = int(state.step[0]) % 2
        state.x[row, -5:] = state.mask_id
        state.decoded_step[row, -5:] = 2**30
        state.candidates[row, -5:] = True
        state.counters[row, Counter.MASKS] = 5
        return state.valid


@pytest.mark.parametrize("policy", [Hiding(), Undoing()], ids=repr)
@pytest.mark.parametrize(
    "options, message, steps",
    [
        (
            {"threshold": 0.9},
            r"step \d must decode a mask of each unfinished row, but \[.*\] masks are left in rows",
            3,
        ),
        ({"eos_early_stop": True}, "step 4 must be the last one of the schedule, but", 5),
        ({"remasking": "origin", "steps": 2}, "step 1 must be the last one of the schedule, but", 2),
    ],
)
def test_no_policy_makes_a_run_endless(policy, options, message, steps):
    current = prepare(shallow("llada"), *prompts(), gen_length=5, policy=policy, **options)
    with pytest.raises(RuntimeError, match=message + ".*policy must not change the state"):
        for _ in range(steps + 1):
            assert current.running()
            current.step()
    assert current.steps <= steps


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_that_commit_nothing(family):
    """A schedule with more steps than masks, which ends all the same."""
    for options in ({"remasking": "origin"}, {"eos_early_stop": True, "eos_token_id": [253]}):
        output = generate(shallow(family), steps=12, **options)
        found = {int(step) for step in output.decoded_step[0, 7:]}
        assert len(output.history) <= 12 and output.decoded_step[:, 7:].min() >= 0
        if family == "dream":
            assert len(found) < len(output.history)
