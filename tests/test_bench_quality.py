"""quality.py: the cases, what a row says of given answers, intervals, verdicts that can fall either way, the whole run."""

import json
from pathlib import Path

import pytest
import torch

import dkv
from benchmarks import quality
from benchmarks.harness import claims, plots, running_sums

ROOT = Path(__file__).resolve().parent.parent

FAMILIES = ("llada", "dream")
KEYS = {"model", "policy", "decoding", *quality.SETTINGS, "problems", "exact_match", "difference", "ci95"} | {
    "token_accuracy",
    "slips",
    "agreement",
    "cache_ratio",
    "steps",
    "seconds",
}
COMMITTED = sorted(ROOT.glob("benchmarks/results/*/quality.json"))


# ---- the cases


def settings(family, policy, decoding="confidence"):
    return [c.settings() for c in quality.cases(family) if (c.name, c.decoding) == (policy, decoding)]


@pytest.mark.parametrize("family", FAMILIES)
def test_cases_cover_what_the_paper_varies(family):
    shifts = {"un", "right", "un_right"} if family == "dream" else {None}
    blocks = "blocks" if family == "dream" else "confidence"
    decode = [s for s in settings(family, "Decode") if s["scope"] == "all"]
    for shift in shifts:
        delayed = {s["refresh_interval"] for s in decode if s["shift"] == shift and s["delay"] == 1}
        assert delayed >= {2, 4, 8, 16, "never"}
    default = "un_right" if family == "dream" else None
    for delay, least in ((1, 1), (0, 2)):
        found = {s["refresh_interval"] for s in decode if s["shift"] == default and s["delay"] == delay}
        assert found == {n for n in (1, 2, 4, 8, 16, "never") if n == "never" or n >= least}
    greedy = settings(family, "Greedy", "left to right")
    for kind in ("nearest_masked", "contiguous"):
        assert {s["window"] for s in greedy if s["window_kind"] == kind} == set(range(7))
    assert settings(family, "Prefill") and len(settings(family, "PrefillDecode")) == 3
    assert settings(family, "PrefixCache", blocks) and settings(family, "DualCache", blocks)
    assert [s for s in settings(family, "Decode", blocks) if s["scope"] == "block"]
    threshold = {c.name for c in quality.cases(family) if c.decoding == "threshold"}
    assert threshold == {"NoCache", "Decode", "PrefixCache", "DualCache"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_has_its_baseline_first_and_is_there_once(family):
    cases = quality.cases(family)
    assert len(set(map(repr, cases))) == len(cases)
    for decoding in {c.decoding for c in cases}:
        first = next(c for c in cases if c.decoding == decoding)
        assert isinstance(first.policy, dkv.NoCache)
    # the baseline of main rows answers as many problems as they do
    assert [c.name for c in cases if c.main] == ["NoCache", "Decode"]
    assert next(c for c in cases if c.main and c.name == "Decode").policy.refresh_interval == 8
    quick = quality.quick_cases(family)
    assert quick[0].name == "NoCache" and {repr(c.policy) for c in quick} <= {repr(c.policy) for c in cases}


def test_what_a_decoding_means():
    assert quality.arguments_of("confidence", "llada", 3) == {"block_length": 32}
    assert quality.arguments_of("confidence", "dream", 3) == {}
    assert quality.arguments_of("blocks", "dream", 3) == {"block_length": 32}
    assert quality.arguments_of("threshold", "dream", 3) == {"block_length": 32, "threshold": 0.9}
    given = quality.arguments_of("left to right", "dream", 3)
    assert given["remasking"] == "random" and given["order"].tolist() == 3 * [list(range(64))]


# ---- a row


def answers_of(sequences, **fields):
    return quality.Answers(sequences, **({"seconds": 2.0, "steps": 64.0, "cache_ratio": 0.5} | fields))


def test_row_by_hand():
    x = running_sums.problems(4, running_sums.held_out_stream())
    baseline, cached = x.clone(), x[:3].clone()
    # the baseline fails problem 1 at the last token; the cached run problem 0 at the last two and 1 as the baseline
    baseline[1, 95] = (x[1, 95] + 1) % 10
    cached[0, 94:] = (x[0, 94:] + 1) % 10
    cached[1, 95] = baseline[1, 95]
    case = quality.QualityCase(dkv.Decode(8, delay=0))
    row = quality.row_of("llada", case, answers_of(cached), answers_of(baseline))
    assert set(row) == KEYS
    assert (row["model"], row["policy"], row["decoding"]) == ("llada", "Decode", "confidence")
    assert (row["refresh_interval"], row["delay"], row["window"]) == (8, 0, None)
    assert row["problems"] == 3 and row["exact_match"] == pytest.approx(1 / 3)
    assert row["difference"] == pytest.approx(-1 / 3) and row["ci95"][0] <= row["difference"] <= row["ci95"][1]
    assert row["token_accuracy"] == pytest.approx(1 - 3 / 192) and row["agreement"] == pytest.approx(1 - 2 / 192)
    # 94 breaks the rule, 95 = 94 + 63 follows it again; 95 of problem 1 breaks it
    assert row["slips"] == pytest.approx(2 / 3)
    assert (row["cache_ratio"], row["steps"], row["seconds"]) == (0.5, 64, 2)


def test_a_policy_without_refresh_and_one_without_settings():
    assert quality.QualityCase(dkv.Decode(None)).settings()["refresh_interval"] == "never"
    assert set(quality.QualityCase(dkv.NoCache()).settings().values()) == {None}
    greedy = quality.QualityCase(dkv.Greedy(2, 3, window_kind="contiguous")).settings()
    assert (greedy["refresh_interval"], greedy["window"], greedy["window_kind"]) == (2, 3, "contiguous")


def test_interval_of_a_resampling_by_index():
    """Drawing counts is drawing problems: the same quantiles as the bootstrap that resamples problems one by one."""
    generator = torch.Generator().manual_seed(0)
    exact, baseline = torch.rand(300, generator=generator) < 0.8, torch.rand(300, generator=generator) < 0.9
    low, high = quality.paired_interval(exact, baseline)
    drawn = torch.randint(300, (10_000, 300), generator=generator)
    means = (exact.double() - baseline.double())[drawn].mean(1)
    expected = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    # the counts behind a quantile move by one or two between two sets of resamples
    assert [low, high] == pytest.approx(expected, abs=2 / 300)
    assert low < (exact.double() - baseline.double()).mean() < high


def test_interval_without_differences_and_with_nothing_else():
    right, wrong = torch.ones(50, dtype=torch.bool), torch.zeros(50, dtype=torch.bool)
    assert quality.paired_interval(right, right) == [0, 0]
    assert quality.paired_interval(wrong, right) == [-1, -1]
    assert quality.paired_interval(right, wrong) == [1, 1]
    # pairing counts: as many won as lost is no difference on average, but an uncertain one
    half = torch.arange(50) < 25
    low, high = quality.paired_interval(half, ~half)
    assert low < -0.2 and high > 0.2


# ---- the claims


def rows_that_confirm(family):
    """A row for every case of a family, as the paper would have them."""
    rows = []
    for case in quality.cases(family):
        row = {"model": family, "policy": case.name, "decoding": case.decoding, **case.settings()}
        interval = row["refresh_interval"]
        cached = 0.9 if interval == "never" else 0.8 * (1 - 1 / (interval or 1))
        loss = 0.0
        if row["policy"] == "Greedy":
            loss = 0.2 - 0.02 * row["window"]
        if row["delay"] == 0:
            loss = cached
        if row["shift"] in ("un", "right"):
            loss = 0.1
        rows.append(row | fields(-loss) | {"cache_ratio": cached})
    return rows


def fields(difference):
    return {
        "exact_match": 1 + difference,
        "token_accuracy": 1 + difference,
        "difference": difference,
        "ci95": [difference - 0.005, difference + 0.005],
    }


def outcomes(rows):
    return {claim.split(": ")[1].split(" ")[0]: outcome for claim, outcome, _ in claims.claims(rows)}


@pytest.mark.parametrize("family", FAMILIES)
def test_claims_are_confirmed_and_have_figures(family):
    found = claims.claims(rows_that_confirm(family))
    assert len(found) == (5 if family == "dream" else 4)
    for claim, outcome, figures in found:
        assert claim.startswith(family) and outcome == "confirmed" and ("%" in figures or "points" in figures), claim


def changed(family, condition, difference):
    return [row | fields(difference) if condition(row) else row for row in rows_that_confirm(family)]


@pytest.mark.parametrize(
    "claim, condition, difference, outcome",
    [
        ("Decode", lambda r: r["refresh_interval"] == 8 and r["delay"] == 1, -0.03, "refuted"),
        ("Decode", lambda r: r["refresh_interval"] == 8 and r["delay"] == 1, -0.01, "undecided"),
        ("Decode", lambda r: r["refresh_interval"] == 16 and r["delay"] == 1, -0.03, "confirmed"),
        ("a", lambda r: r["refresh_interval"] == 4 and r["delay"] == 1, -0.03, "refuted"),
        ("a", lambda r: r["refresh_interval"] == 4 and r["delay"] == 1, -0.01, "undecided"),
        ("without", lambda r: r["delay"] == 0, -0.01, "refuted"),
        # the delayed one falls as far
        ("without", lambda r: r["refresh_interval"] == "never", -0.9, "undecided"),
        ("Greedy", lambda r: r["policy"] == "Greedy", 0.0, "refuted"),
        ("Greedy", lambda r: r["policy"] == "Greedy", -0.2, "refuted"),
        ("Greedy", lambda r: r["policy"] == "Greedy" and r["window"] == 0, -0.001, "refuted"),
        ("un_right", lambda r: r["shift"] == "right", 0.0, "undecided"),
        ("un_right", lambda r: r["shift"] == "un_right" and r["delay"] == 1, -0.2, "refuted"),
    ],
)
def test_claims_can_fail(claim, condition, difference, outcome):
    assert outcomes(rows_that_confirm("dream"))[claim] == "confirmed"
    assert outcomes(changed("dream", condition, difference))[claim] == outcome


# ---- the run


def one_of_a_kind(answer):
    """`quality.answer` of the first case of each policy and decoding, and its answers for the others."""
    known = {}

    def answer_of_the_first(model, family, case, prompts):
        kind = case.name, case.decoding, case.settings()["refresh_interval"] == 1, len(prompts)
        if kind not in known:
            known[kind] = answer(model, family, case, prompts)
        return known[kind]

    return answer_of_the_first


@pytest.mark.parametrize("answered", ["one of a kind", pytest.param("every", marks=pytest.mark.full)])
def test_a_whole_run(answered, tmp_path, capsys, monkeypatch):
    """The cases of one model on two problems, the claims, the files, one JSON object as the last line."""
    monkeypatch.setattr(quality, "FAMILIES", ("dream",))
    if answered != "every":
        monkeypatch.setattr(quality, "answer", one_of_a_kind(quality.answer))
    assert quality.main(["--problems", "2", "1", "--out", str(tmp_path)]) == 0
    *_, last = capsys.readouterr().out.strip().splitlines()
    record = json.loads(last)
    rows, cases = record["rows"], quality.cases("dream")
    assert all(set(row) == KEYS for row in rows)
    assert [(row["policy"], row["decoding"]) for row in rows] == [(c.name, c.decoding) for c in cases]
    for row, case in zip(rows, cases, strict=True):
        assert row["problems"] == (2 if case.main else 1) and row["seconds"] > 0
        assert row["steps"] == 64 or (row["decoding"] == "threshold" and 1 < row["steps"] < 64)
        assert (row["cache_ratio"] == 0) == (case.name == "NoCache" or row["refresh_interval"] == 1)
        assert 0 <= row["exact_match"] <= row["token_accuracy"] <= 1 and 0 < row["agreement"] <= 1
        if case.name == "NoCache" or row["refresh_interval"] == 1:
            assert row["agreement"] == 1 or row["decoding"] == "threshold"
    assert [set(claim) for claim in record["claims"]] == 5 * [{"claim", "verdict", "figures"}]
    assert json.loads((tmp_path / "quality.json").read_text())["rows"] == rows
    header, *lines = (tmp_path / "quality.csv").read_text().splitlines()
    assert set(header.split(",")) >= KEYS - {"ci95"} and len(lines) == len(rows)
    if plots.load_pyplot() is not None:
        assert all((tmp_path / name).stat().st_size > 10_000 for name in ("quality.png", "quality_maps.png"))


def test_rows_of_the_plot():
    groups = {plots.group_of(row) for row in rows_that_confirm("dream")}
    assert groups == set(plots.GROUPS)


def test_the_picture_shows_differences_with_their_intervals(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "save", lambda figure, path: figure)
    rows = json.loads(COMMITTED[0].read_text())["rows"]
    figure = plots.accuracy(rows, {"device": "CPU: x", "date": "2026-11-25 21:32 UTC"}, tmp_path)
    assert [axis.get_title() for axis in figure.axes] == ["LLaDA", "LLaDA", "Dream", "Dream"]
    dream = [row for row in rows if row["model"] == "dream" and row["decoding"] != "threshold"]
    drawn = {
        (x, y, *bar[:, 1])
        for points, _, (bars,) in figure.axes[2].containers
        for x, y, bar in zip(*points.get_data(), bars.get_segments(), strict=True)
    }
    expected = {(row["cache_ratio"], *(100 * v for v in (row["difference"], *row["ci95"]))) for row in dream}
    for found, want in zip(sorted(drawn), sorted(expected), strict=True):
        assert found == pytest.approx(want)


@pytest.mark.parametrize("argv", [["--problems", "2", "3"], ["--problems", "0", "0"], ["--problems", "2"]])
def test_wrong_numbers_of_problems(argv, capsys):
    with pytest.raises(SystemExit):
        quality.parse_arguments(argv)
    assert "--problems" in capsys.readouterr().err


def test_committed_results_are_of_these_cases():
    """The committed rows are those that the command gives, and the claims those of the rows."""
    assert COMMITTED
    for path in COMMITTED:
        record = json.loads(path.read_text())
        expected = [(f, c.name, c.decoding, c.settings()) for f in FAMILIES for c in quality.cases(f)]
        rows = record["rows"]
        found = [(r["model"], r["policy"], r["decoding"], {k: r[k] for k in quality.SETTINGS}) for r in rows]
        assert found == expected
        assert [tuple(claim.values()) for claim in record["claims"]] == claims.claims(rows)
        for row in rows:
            if (row["policy"], row["decoding"]) == ("NoCache", "confidence"):
                assert row["problems"] >= 4000 and row["exact_match"] >= 0.95
