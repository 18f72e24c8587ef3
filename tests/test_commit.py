"""`commit_tokens` equals a loop that sorts each row, for any scores, ties and borders."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from utils import cumulative

from dkv.kernels import commit, commit_tokens, pack_positions
from dkv.kernels.configs import CommitConfig

IMPLS = ["triton", "reference"]
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module", autouse=True)
def poison_bool_outputs():
    """Bytes that are neither False nor True, so that unwritten entries show."""
    allocate = torch.empty

    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.dtype == torch.bool:
            tensor.view(torch.uint8).fill_(7)
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", allocate_poisoned)
        yield


def choose_by_a_loop(rows, rule, value):
    """The chosen entries of each row of float32 scores; `value`: the threshold or factor, or a list of one per row."""
    chosen = []
    for row, scores in enumerate(rows):
        scores = np.array([-INF if math.isnan(score) else score for score in scores], dtype=np.float32)
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        picked = set()
        for rank, i in enumerate(order):
            if rule == "counts":
                enough = rank < value[row]
            else:
                limit = np.float32(value[row] if isinstance(value, list) else value)
                if rule == "factor":
                    limit = np.float32(1) - limit / np.float32(rank + 2)
                enough = rank == 0 or scores[i] >= limit
            if not enough:
                break
            picked.add(i)
        chosen += [i in picked for i in range(len(scores))]
    return chosen


def inputs(rows, *, padding=0, seqlen=None, device="cpu", dtype=torch.float32):
    """x, tokens, scores, slots, cu_seqlens: entries of the given scores at random columns, in order of column."""
    lengths = [len(row) for row in rows]
    total = sum(lengths) + padding
    seqlen = max([*lengths, 1]) + 3 if seqlen is None else seqlen
    generator = torch.Generator().manual_seed(total)
    slots = []
    for row, length in enumerate(lengths):
        columns = torch.randperm(seqlen, generator=generator)[:length].sort().values
        slots += (row * seqlen + columns).tolist()
    x = torch.randint(0, 1000, (len(rows), seqlen), generator=generator)
    tokens = torch.randint(1000, 2000, (total,), generator=generator)
    # the values of padding entries must not matter
    scores = torch.tensor([score for row in rows for score in row] + [INF] * padding, dtype=dtype)
    slots = torch.tensor(slots + [-1] * padding, dtype=torch.int64)
    return [t.to(device) for t in (x, tokens, scores, slots, cumulative(lengths))]


def check(rows, rule, value, impl, *, padding=0, device="cpu", count_dtype=torch.int64, **options):
    args = inputs(rows, padding=padding, device=device, **options)
    before = [t.clone() for t in args]
    x, tokens, _, slots, _ = args
    if rule == "counts":
        chosen = commit_tokens(*args, torch.tensor(value, dtype=count_dtype, device=device), impl=impl)
    else:
        limit = torch.tensor(value, dtype=torch.float32, device=device) if isinstance(value, list) else value
        chosen = commit_tokens(*args, None, **{rule: limit}, impl=impl)

    expected = choose_by_a_loop(rows, rule, value) + [False] * padding
    assert chosen.dtype == torch.bool and chosen.view(torch.uint8).tolist() == [int(c) for c in expected]
    expected_x = before[0].flatten().tolist()
    for slot, token, is_chosen in zip(slots.tolist(), tokens.tolist(), expected, strict=True):
        if is_chosen:
            expected_x[slot] = token
    assert x.flatten().tolist() == expected_x
    assert all(torch.equal(a, b) for a, b in zip(args[3:], before[3:], strict=True))


def random_rows(*lengths, ties=False):
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.rand(length, generator=generator) for length in lengths]
    return [((row * 8).round() / 8 if ties else row).tolist() for row in rows]


@pytest.fixture
def small_tiles(monkeypatch):
    """Several blocks of entries per row, each compared with several tiles."""
    monkeypatch.setattr(commit, "commit_config", lambda device: CommitConfig(block_m=16, block_n=32, num_warps=1))


RULES = [("counts", [3, 0, 99, 1]), ("threshold", 0.75), ("factor", 0.6)]
LIMITS = [("threshold", [0.9, 0.5, NAN, -INF]), ("factor", [0.6, 50.0, 1e-3, NAN])]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule, value", RULES, ids=["counts", "threshold", "factor"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("padding", [0, 1, 70])
def test_ragged_rows(device, small_tiles, impl, rule, value, ties, padding):
    check(random_rows(20, 50, 7, 33, ties=ties), rule, value, impl, padding=padding, device=device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule, values", LIMITS, ids=["threshold", "factor"])
def test_limits_of_rows(device, small_tiles, impl, rule, values):
    """Each row has its own limit; NaN chooses only the highest entry. Equal limits act like a float."""
    rows = random_rows(20, 50, 7, 33)
    check(rows, rule, values, impl, padding=9, device=device)
    check(random_rows(0, 5, 0, 3), rule, values, impl, device=device)
    check([], rule, [], impl, padding=2, device=device)
    for value in (0.9, 0.3):  # not float32
        args = inputs([[*row, value] for row in rows], device=device)
        limits = torch.full((4,), value, device=device)
        chosen = commit_tokens(*args, None, **{rule: limits}, impl=impl)
        assert torch.equal(chosen, commit_tokens(*args, None, **{rule: value}, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule, value", [("counts", [700, 2, 1]), ("threshold", 0.5), ("factor", 3.0)])
def test_long_rows(device, impl, rule, value):
    check(random_rows(1500, 0, 300, ties=True), rule, value, impl, padding=4, device=device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule, value", RULES, ids=["counts", "threshold", "factor"])
@pytest.mark.parametrize(
    "lengths", [(0, 5, 0, 3), (5, 0, 0, 0), (0, 0, 0, 0), (1, 0, 1, 1)], ids=["gaps", "first", "none", "ones"]
)
def test_rows_without_entries(device, impl, rule, value, lengths):
    for padding in (0, 9):
        check(random_rows(*lengths), rule, value, impl, padding=padding, device=device)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_there(device, impl):
    check([], "counts", [], impl, device=device)
    check([], "counts", [], impl, padding=5, device=device)
    check([[], []], "factor", 1.0, impl, padding=5, seqlen=0, device=device)


@pytest.mark.parametrize("impl", IMPLS)
def test_more_padding_than_columns(device, small_tiles, impl):
    """A row has fewer blocks than the padding."""
    check(random_rows(2, 1), "counts", [1, 1], impl, padding=300, seqlen=2, device=device)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_minus_infinity_and_ranks_last(device, impl):
    row = [NAN, 0.5, -INF, NAN, INF, 0.0, -0.0, -INF]
    for count in range(10):
        check([row, row[::-1]], "counts", [count, 9 - count], impl, device=device)
    check([row, [NAN, NAN], [-INF]], "threshold", 0.1, impl, device=device)
    check([row, [NAN, NAN], [-INF]], "factor", 0.9, impl, device=device)
    chosen = commit_tokens(*inputs([[NAN, -INF, -3e38]], device=device), torch.tensor([2], device=device), impl=impl)
    assert chosen.tolist() == [True, False, True]


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_on_the_border_are_enough(device, impl):
    threshold = 0.9  # float32 rounds it down: compared in float64, its own value would not reach it
    border = np.float32(threshold)
    row = [1.0, float(np.nextafter(border, np.float32(0))), float(border)]
    check([row], "threshold", threshold, impl, device=device)
    for factor in (0.3, 0.7, 1.0, 1.9):
        limits = [np.float32(1) - np.float32(factor) / np.float32(rank + 2) for rank in range(40)]
        row = [1.0] * 40
        for rank in (1, 2, 3, 9, 39):
            row[rank] = float(limits[rank])
            check([row, row[:3]], "factor", factor, impl, device=device)
            row[rank] = float(np.nextafter(limits[rank], np.float32(-1)))
            check([row, row[:3]], "factor", factor, impl, device=device)
            row[rank] = 1.0


@pytest.mark.parametrize("impl", IMPLS)
def test_counts_dtypes(device, impl):
    for dtype in (torch.int32, torch.int64):
        check(random_rows(4, 6), "counts", [2, -1], impl, count_dtype=dtype, device=device)


@pytest.mark.parametrize("impl", IMPLS)
def test_positions_beyond_the_capacity_do_not_exist(device, impl):
    """`cu_seqlens` of `pack_positions` counts them, so rows are cut off at the last entry."""
    candidates = torch.ones(3, 6, dtype=torch.bool, device=device)
    slots, cu_seqlens = pack_positions(candidates, 8)
    tokens, scores = torch.arange(100, 108, device=device), torch.arange(8.0, device=device)
    x = torch.zeros(3, 6, dtype=torch.int64, device=device)
    chosen = commit_tokens(x, tokens, scores, slots, cu_seqlens, torch.tensor([1, 4, 4], device=device), impl=impl)
    assert chosen.view(torch.uint8).tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert x.tolist() == [[0, 0, 0, 0, 0, 105], [106, 107, 0, 0, 0, 0], [0] * 6]


def test_float64_scores(device):
    """They are ranked in float64, although equal in float32."""
    args = inputs([[1.0, 1.0 + 1e-12, 1.0]], dtype=torch.float64, device=device)
    assert commit_tokens(*args, torch.tensor([1], device=device)).tolist() == [False, True, False]
    # so are their limits
    for dtype, expected in ((torch.float64, [False, True, False]), (torch.float32, [True, True, True])):
        limit = torch.tensor([1.0 + 1e-12], dtype=dtype, device=device)
        assert commit_tokens(*args, None, threshold=limit).tolist() == expected
    args = inputs([[1.0, 0.5 - 1e-12]], dtype=torch.float64, device=device)
    for more, expected in ((0.0, [True, False]), (1e-11, [True, True])):
        limit = torch.tensor([1.5 + more], dtype=torch.float64, device=device)
        assert commit_tokens(*args, None, factor=limit).tolist() == expected
    with pytest.raises(NotImplementedError, match="no float64 kernels; use impl='reference'"):
        commit_tokens(*args, torch.tensor([1], device=device), impl="triton")


SCORES = st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1, width=32)
RULE = st.sampled_from(["counts", "threshold", "factor"])


@given(data=st.data())
def test_any_scores(device, data):
    rows = data.draw(st.lists(st.lists(SCORES, max_size=40), max_size=4))
    rule = data.draw(RULE)
    if rule == "counts":
        value = [data.draw(st.integers(0, len(row) + 2)) for row in rows]
    elif rule == "threshold":
        value = data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0, *[s for row in rows for s in row if 0 <= s <= 1]]))
    else:
        value = data.draw(st.floats(0.01, 50))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "commit_config", lambda device: CommitConfig(block_m=16, block_n=16, num_warps=1))
        for impl in IMPLS:
            check(rows, rule, value, impl, padding=data.draw(st.integers(0, 3)), device=device)


NAMES = ("x", "tokens", "scores", "slots", "cu_seqlens")


def call(device, **changes):
    arguments = dict(zip(NAMES, inputs([[0.1, 0.2], [0.3]], seqlen=4, device=device), strict=True))
    return commit_tokens(**(arguments | {"counts": torch.ones(2, dtype=torch.int64, device=device)} | changes))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        pytest.param(changes, error, message, id=name)
        for name, changes, error, message in [
            ("x dtype", dict(x=torch.zeros(2, 4, dtype=torch.int32)), TypeError, "x must be int64, got torch.int32"),
            ("x rank", dict(x=torch.zeros(8, dtype=torch.int64)), ValueError, r"x must have shape \(batch, seqlen\)"),
            (
                "x rows",
                dict(x=torch.zeros(2, 8, dtype=torch.int64)[:, :4]),
                ValueError,
                r"x must be contiguous, got strides \(8, 1\) for shape \(2, 4\); pass x\.contiguous\(\) and keep that",
            ),
            (
                "x columns",
                dict(x=torch.zeros(4, 2, dtype=torch.int64).T),
                ValueError,
                r"last dim of x must be contiguous",
            ),
            ("tokens dtype", dict(tokens=torch.zeros(3)), TypeError, "tokens must be int64, got torch.float32"),
            ("tokens rank", dict(tokens=torch.zeros(3, 1).long()), ValueError, r"tokens must have shape \(total,\)"),
            ("scores dtype", dict(scores=torch.zeros(3).half()), TypeError, "scores must be float32 or float64"),
            ("scores shape", dict(scores=torch.zeros(4)), ValueError, r"scores must have shape \(total,\) = \(3\)"),
            ("slots dtype", dict(slots=torch.zeros(3).int()), TypeError, "slots must be int64, got torch.int32"),
            ("slots stride", dict(slots=torch.zeros(3, 2).long()[:, 0]), ValueError, "slots must be contiguous"),
            ("cu dtype", dict(cu_seqlens=torch.zeros(3)), TypeError, "cu_seqlens must be int32 or int64"),
            (
                "cu shape",
                dict(cu_seqlens=torch.zeros(2).int()),
                ValueError,
                r"cu_seqlens must have shape \(batch \+ 1,\)",
            ),
            ("counts dtype", dict(counts=torch.zeros(2)), TypeError, "counts must be int64 or int32"),
            ("counts shape", dict(counts=torch.zeros(2, 1).long()), ValueError, r"counts must have shape \(batch,\)"),
            ("no rule", dict(counts=None), ValueError, "counts must be a tensor if neither threshold nor factor"),
            ("both", dict(threshold=0.9, factor=1.0), ValueError, "threshold and factor exclude each other"),
            ("factor 0", dict(factor=0), ValueError, "factor must be positive, got 0"),
            ("factor nan", dict(factor=NAN), ValueError, "factor must be positive, got nan"),
            ("limit shape", dict(threshold=torch.ones(3)), ValueError, r"threshold must have shape \(batch,\) = \(2\)"),
            (
                "limit rank",
                dict(factor=torch.ones(())),
                ValueError,
                r"factor must have shape \(batch,\) = \(2\), got \(\)",
            ),
            (
                "limit dtype",
                dict(factor=torch.ones(2).double()),
                TypeError,
                "factor must be float32, got torch.float64",
            ),
            ("limit grad", dict(factor=torch.ones(2, requires_grad=True)), ValueError, "but factor requires grad"),
            ("both limits", dict(threshold=torch.ones(2), factor=1.0), ValueError, "exclude each other"),
            ("impl", dict(impl="torch"), ValueError, "impl must be one of"),
            ("grad", dict(scores=torch.zeros(3, requires_grad=True)), ValueError, "but scores requires grad"),
        ]
    ],
)
def test_bad_input(changes, error, message):
    call("cpu")
    with pytest.raises(error, match=message):
        call("cpu", **changes)


@pytest.mark.parametrize("name", [*NAMES[1:], "counts", "threshold"])
def test_all_tensors_are_on_one_device(device, name):
    arguments = dict(zip(NAMES, inputs([[0.1, 0.2], [0.3]], seqlen=4), strict=True))
    arguments |= {"counts": torch.ones(2).long(), "threshold": torch.ones(2)}
    with pytest.raises(ValueError, match=f"{name} must be on the device of the other tensors, {device}.*got meta"):
        call(device, **{name: arguments[name].to("meta")})


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr("dkv.kernels.checks.InterpretedFunction", ())
    with pytest.raises(NotImplementedError, match="impl='triton' needs CUDA tensors, got cpu"):
        call("cpu", impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(device, impl):
    args = inputs(random_rows(4, 7), padding=2, device=device)
    counts = torch.tensor([2, 3], device=device)
    limits = torch.tensor([0.9, 0.5], device=device)
    for rule in ((counts, None, None, None, None), (None, 0.9, None, None, None), (None, None, None, limits, None)):
        torch.library.opcheck(torch.ops.dkv.commit_tokens, (*args, *rule, impl))
    for rule in ((None, None, 1.0, None, None), (None, None, None, None, limits)):
        torch.library.opcheck(torch.ops.dkv.commit_tokens, (*args, *rule, impl))


def test_compiles_without_a_graph_break(device):
    args = inputs(random_rows(4, 7), padding=2, device=device)
    counts = torch.tensor([2, 3], device=device)
    expected_x = args[0].clone()
    expected = commit_tokens(expected_x, *args[1:], counts)
    compiled = torch.compile(lambda x, tokens, *rest: ~commit_tokens(x, tokens + 0, *rest), fullgraph=True)
    assert torch.equal(~compiled(*args, counts), expected)
    assert torch.equal(args[0], expected_x)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """The host decides nothing: a recorded call commits by the scores and counts at its replay."""
    args = inputs(random_rows(60, 200), padding=20, device="cuda")
    counts = torch.tensor([2, 3], device="cuda")
    commit_tokens(*args, counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = commit_tokens(*args, counts)
    for k in range(3):
        rows = random_rows(60 + k, 200 - k)
        args[2][:260] = torch.tensor([score for row in rows for score in row], device="cuda")
        args[4].copy_(cumulative([60 + k, 200 - k]))
        counts.fill_(5 * k)
        graph.replay()
        assert chosen.tolist() == choose_by_a_loop(rows, "counts", [5 * k] * 2) + [False] * 20


@pytest.mark.sanitizer
@pytest.mark.parametrize("rule, value", RULES, ids=["counts", "threshold", "factor"])
def test_small_run_for_the_sanitizer(device, rule, value):
    check(random_rows(20, 0, 70, 5), rule, value, "triton", padding=6, device=device)
