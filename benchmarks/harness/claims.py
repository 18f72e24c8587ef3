"""The claims of the dKV-Cache paper (arXiv 2505.15781) about its policies, checked against the rows of quality.py.

A verdict rests on the 95 % interval of the paired difference to no cache: a policy loses if all of it is below zero,
and is lossless if all of it is above -1 point. A claim that the interval neither confirms nor refutes is undecided.
"""

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
Claim = tuple[str, str, str]

LOSSLESS = -0.01
COLLAPSE = -0.10
# mean exact matches of two shifts that differ by less count as equal
MARGIN = 0.01


def claims(rows: list[Row]) -> list[Claim]:
    """[(claim, verdict, figures)] from the rows of a whole run, model by model."""
    models = dict.fromkeys(row["model"] for row in rows)
    return [
        (f"{model}: {claim}", outcome, figures)
        for model in models
        for claim, outcome, figures in _Rows([row for row in rows if row["model"] == model]).claims()
    ]


def verdict(holds: bool, fails: bool) -> str:
    return "confirmed" if holds else "refuted" if fails else "undecided"


class _Rows:
    """The rows of one model."""

    def __init__(self, rows: list[Row]):
        self.rows = rows
        # the default of a family that has shifts
        self.shift = "un_right" if any(row["shift"] for row in rows) else None
        decode = [row for row in self.find("Decode", shift=self.shift, scope="all") if row["delay"] == 1]
        self.delayed = {row["refresh_interval"]: row for row in decode}

    def find(self, policy: str, decoding: str = "confidence", **settings: Any) -> list[Row]:
        wanted = {"policy": policy, "decoding": decoding} | settings
        return [row for row in self.rows if all(row[name] == value for name, value in wanted.items())]

    def claims(self) -> Iterator[Claim]:
        yield self.lossless()
        yield self.delay()
        yield self.greedy()
        if self.shift:
            yield self.shifts()
        yield self.refreshes()

    def lossless(self) -> Claim:
        row = self.delayed[8]
        figures = ", ".join(f"{interval}: {points(r)}" for interval, r in self.delayed.items())
        outcome = verdict(row["ci95"][0] > LOSSLESS, row["ci95"][1] < LOSSLESS)
        return "Decode is nearly lossless up to a long interval (8)", outcome, f"by interval: {figures}"

    def delay(self) -> Claim:
        rows = self.find("Decode", shift=self.shift, scope="all", delay=0)
        figures = ", ".join(
            f"{r['refresh_interval']}: {percent(r)} ({percent(r, 'token_accuracy')} of the tokens) "
            f"at {100 * r['cache_ratio']:.0f} % cached, delayed {percent(self.delayed[r['refresh_interval']])}"
            for r in rows
        )
        worst, delayed = rows[-1], self.delayed[rows[-1]["refresh_interval"]]
        collapses = worst["ci95"][1] < min(COLLAPSE, delayed["ci95"][0]) and falls(rows)
        outcome = verdict(collapses, worst["ci95"][0] > COLLAPSE)
        return "without the delay accuracy collapses as the cache ratio grows", outcome, f"by interval: {figures}"

    def greedy(self) -> Claim:
        rows = self.find("Greedy", "left to right", refresh_interval=2, window_kind="nearest_masked")
        first, last = rows[0], rows[-1]
        figures = ", ".join(f"{r['window']}: {points(r)}" for r in rows)
        outcome = verdict(
            first["ci95"][1] < 0 and last["difference"] > first["difference"],
            first["ci95"][0] > LOSSLESS or last["difference"] <= first["difference"],
        )
        return "Greedy loses some and the window wins some back", outcome, f"interval 2, by window: {figures}"

    def shifts(self) -> Claim:
        means = {}
        for shift in ("un", "right", "un_right"):
            rows = [r for r in self.find("Decode", shift=shift, delay=1, scope="all") if r["refresh_interval"] != 1]
            means[shift] = sum(row["exact_match"] for row in rows) / len(rows)
        others = max(mean for shift, mean in means.items() if shift != "un_right")
        outcome = verdict(means["un_right"] > others + MARGIN, means["un_right"] < others - MARGIN)
        figures = ", ".join(f"{shift}: {100 * mean:.1f} %" for shift, mean in means.items())
        return "un_right is the best shift", outcome, f"exact match, mean over the intervals: {figures}"

    def refreshes(self) -> Claim:
        rows = [self.delayed[4], self.delayed[8]]
        figures = ", ".join(f"{r['refresh_interval']}: {points(r)}" for r in rows)
        outcome = verdict(all(r["ci95"][0] > LOSSLESS for r in rows), any(r["ci95"][1] < LOSSLESS for r in rows))
        return "a refresh every 4 to 8 steps suffices", outcome, f"by interval: {figures}"


def falls(rows: list[Row]) -> bool:
    """Whether the row with the fewest right tokens has a higher cache ratio than the one with the most."""
    by_accuracy = sorted(rows, key=lambda row: row["token_accuracy"])
    return by_accuracy[0]["cache_ratio"] > by_accuracy[-1]["cache_ratio"]


def percent(row: Row, name: str = "exact_match") -> str:
    return f"{100 * row[name]:.1f} %"


def points(row: Row) -> str:
    low, high = row["ci95"]
    return f"{100 * row['difference']:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}]"
