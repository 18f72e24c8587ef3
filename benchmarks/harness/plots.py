"""Draws benchmark results. matplotlib is optional: without it there is a message and no picture."""

import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import dkv

Rows = list[dict[str, Any]]

# (batch, length) of the attention that is drawn, by preference
PANEL_SHAPES = ((8, 2048), (1, 2048), (4, 1024), (8, 512), (1, 1024))
STYLES = {
    "ours": {"color": "#c1121f", "linewidth": 2.6, "marker": "o", "zorder": 3},
    "cheap fix": {"color": "#1d6fa3", "linewidth": 1.6, "marker": "s"},
    "authors' way": {"color": "#7a5195", "linewidth": 1.6, "marker": "^"},
    "full recompute": {"color": "#555555", "linewidth": 1.6, "marker": "D"},
}
LABELS = {
    "ours": "dkv",
    "cheap fix": "static cache + PyTorch attention",
    "authors' way": "dKV-Cache authors' way:\nconcatenate, re-order, re-rotate",
    "full recompute": "no cache: recompute everything",
}


def load_pyplot() -> ModuleType | None:
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed; run: pip install matplotlib", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> Path:
    """Writes and closes a figure; returns the path."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


# ---- attn_speed.py


def attention(rows: Rows, env: dict[str, Any], path: Path) -> Path | None:
    """Time per layer over active positions: a panel for each model, the best provider of each family."""
    plt = load_pyplot()
    if plt is None:
        return None
    panels = _attention_shapes(rows)
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(7.2 * len(panels), 5.4), squeeze=False, layout="constrained")
    for axis, (model, (batch, seqlen)) in zip(axes[0], panels, strict=True):
        shape = (model, batch, seqlen, False)
        _attention_panel(axis, [r for r in rows if (r["model"], r["batch"], r["seqlen"], r["ragged"]) == shape])
        axis.set_title(f"{model}, batch {batch}, {seqlen} positions", fontsize=12)
    on_cpu = env["device"].startswith("CPU")
    figure.suptitle(
        f"Attention of one layer (RoPE + cache write + attention), {rows[0]['dtype']}, {env['date'][:10]}\n"
        f"{env['device']}{', PyTorch implementation of every method' * on_cpu}",
        fontsize=13,
    )
    figure.supxlabel("lines: medians; bands: 20 % to 80 % of the samples; lower is faster", fontsize=9)
    return save(figure, path)


def _attention_shapes(rows):
    """[(model, (batch, length))]: the shape with the most points of each model, if possible the same for all."""
    actives = {}
    for row in rows:
        if row["family"] == "ours" and not row["ragged"]:
            shapes = actives.setdefault(row["model"], {})
            shapes.setdefault((row["batch"], row["seqlen"]), set()).add(row["active"])
    rank = {shape: -i for i, shape in enumerate(PANEL_SHAPES)}

    def worth(shapes, shape):
        shared = min(len(other.get(shape, ())) for other in actives.values())
        return shared, len(shapes[shape]), rank.get(shape, -len(rank)), shape

    return [(model, max(shapes, key=functools.partial(worth, shapes))) for model, shapes in actives.items()]


def _attention_panel(axis, rows):
    actives = sorted({row["active"] for row in rows})
    ends = []
    for family, style in STYLES.items():
        best = {}
        for row in rows:
            if row["family"] == family:
                best[row["active"]] = min(best.get(row["active"], row), row, key=lambda r: r["ms"])
        if not best:
            continue
        x = sorted(best)
        y = [best[a]["ms"] for a in x]
        axis.plot(x, y, markersize=5, **style)
        low, high = [best[a]["ms_p20"] for a in x], [best[a]["ms_p80"] for a in x]
        axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        ends.append((y[0], LABELS[family], style["color"]))
    floor = {row["active"]: row["floor_ms"] for row in rows}
    axis.plot(actives, [floor[a] for a in actives], color="#2a9d3a", linestyle=":", linewidth=1.6)
    ends.append((floor[actives[0]], "floor: what bytes and flops need\nat the measured ceilings", "#2a9d3a"))

    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(actives, [str(a) for a in actives])
    axis.minorticks_off()
    axis.set_xlabel("active positions per row" + " (last point: all)" * (actives[-1] == rows[0]["seqlen"]))
    axis.set_ylabel("time per layer (milliseconds)")
    axis.grid(True, which="major", alpha=0.3)
    _milliseconds(axis)
    # labels are left of the first point, each beside its line, in about 40 % of the width
    span = max(2.0, actives[-1] / actives[0])
    axis.set_xlim(actives[0] / span**0.75, actives[-1] * span**0.05)
    _label(axis, actives[0], actives[0] / span**0.04, ends)


def _milliseconds(axis):
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))


def _label(axis, x, right, ends):
    """Writes each label at the left end of its line, up to `right`; labels that would overlap move apart."""
    low, high = axis.get_ylim()
    # on a log axis a label of two lines takes about 8 % of the height
    gap = (high / low) ** 0.085
    position = low
    for y, text, color in sorted(ends):
        position = max(y, position * gap)
        axis.annotate(
            text,
            (x, y),
            xytext=(right, position),
            ha="right",
            va="center",
            fontsize=9.5,
            color=color,
            arrowprops={"arrowstyle": "-", "relpos": (1, 0.5), "color": color, "linewidth": 0.6, "alpha": 0.5},
        )
    axis.set_ylim(low, max(high, position * gap))


# ---- generate_speed.py

SYSTEM_COLORS = {
    "dkv": "#c1121f",
    "dkv, eager": "#e58a90",
    "official": "#555555",
    "plain loop": "#555555",
    "dkv-cache": "#7a5195",
    "fast-dllm": "#1d6fa3",
}


def generation(rows: Rows, env: dict[str, Any], path: Path) -> Path | None:
    """Seconds of whole runs beside their floors: a panel for each model and point, two points at most."""
    plt = load_pyplot()
    measured = [row for row in rows if row["kind"] == "run" and row["seconds"]]
    if plt is None or not measured:
        return None
    models = list(dict.fromkeys(row["model"] for row in measured))
    panels = {model: _points(measured, model)[:2] for model in models}
    columns = max(map(len, panels.values()))
    heights = [1 + max(len(_of(measured, model, point)) for point in panels[model]) for model in models]
    figure, axes = plt.subplots(
        len(models),
        columns,
        figsize=(7.2 * columns, 1.5 + 0.34 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for model, line in zip(models, axes, strict=True):
        for point, axis in zip(panels[model], line, strict=False):
            axis.set_visible(True)
            _bars(axis, _of(measured, model, point))
            axis.set_title("{}, batch {}, prompt {} + {} tokens".format(model, *point), fontsize=12)
    on_cpu = env["device"].startswith("CPU")
    figure.suptitle(
        f"Whole generations, one token a step, {measured[0]['dtype']}, {env['date'][:10]}\n"
        f"{env['device']}{', PyTorch implementation of every system' * on_cpu}",
        fontsize=13,
    )
    figure.supxlabel(
        "seconds, medians; x: against the family's own loop; green: floor of the same steps at the measured ceilings",
        fontsize=9,
    )
    return save(figure, path)


def _points(rows, model):
    return list(dict.fromkeys((r["batch"], r["prompt"], r["gen_length"]) for r in rows if r["model"] == model))


def _of(rows, model, point):
    """The rows of a panel, slowest first."""
    found = [r for r in rows if (r["model"], r["batch"], r["prompt"], r["gen_length"]) == (model, *point)]
    return sorted(found, key=lambda row: -row["seconds"])


def _bars(axis, rows):
    names = [f"{row['system']}: {row['label']}" for row in rows]
    axis.barh(names, [row["seconds"] for row in rows], color=[SYSTEM_COLORS[row["system"]] for row in rows], height=0.7)
    for i, row in enumerate(rows):
        speedup = f"  {row['speedup']:.2f}x" if row["speedup"] else ""
        axis.text(row["seconds"], i, f" {row['seconds']:.3g} s{speedup}", va="center", fontsize=9)
        if row["floor_ms"]:
            axis.plot([row["floor_ms"] / 1e3] * 2, [i - 0.35, i + 0.35], color="#2a9d3a", linewidth=2.5)
    axis.set_xlim(0, 1.25 * max(row["seconds"] for row in rows))
    axis.grid(True, axis="x", alpha=0.3)
    axis.tick_params(labelsize=9.5)


# ---- quality.py

NAMES = {"llada": "LLaDA", "dream": "Dream"}
# group of rows -> (colour, marker)
GROUPS = {
    "no cache": ("#222222", "*"),
    "Decode": ("#c1121f", "o"),
    "Decode, no delay": ("#e58a90", "x"),
    "Decode, shift un or right": ("#c1121f", "v"),
    "Decode, scope block": ("#f4a259", "P"),
    "Greedy": ("#2a9d3a", "^"),
    "Prefill, PrefillDecode": ("#7a5195", "D"),
    "PrefixCache, DualCache": ("#1d6fa3", "s"),
}
# the default of Decode
SHIFTS = (None, "un_right")


def group_of(row: dict[str, Any]) -> str | None:
    """The group of GROUPS that a row is drawn in."""
    if row["policy"] == "NoCache":
        return "no cache"
    if row["policy"] != "Decode":
        return next((group for group in GROUPS if row["policy"] in group), None)
    if row["delay"] == 0:
        return "Decode, no delay"
    if row["scope"] == "block":
        return "Decode, scope block"
    return "Decode" if row["shift"] in SHIFTS else "Decode, shift un or right"


def accuracy(rows: Rows, env: dict[str, Any], path: Path) -> Path | None:
    """What a policy costs, in exact match, over cache ratio and over time: a line of panels for each model."""
    plt = load_pyplot()
    if plt is None:
        return None
    models = list(dict.fromkeys(row["model"] for row in rows))
    size = (13, 4.6 * len(models))
    figure, axes = plt.subplots(len(models), 2, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for model, line in zip(models, axes, strict=True):
        shown = [r for r in rows if r["model"] == model and r["decoding"] != "threshold"]
        for axis, key, label in zip(
            line,
            ("cache_ratio", "ms"),
            ("share of positions read from the cache", "milliseconds a problem"),
            strict=True,
        ):
            _accuracy_panel(axis, [row | {"ms": 1e3 * row["seconds"] / row["problems"]} for row in shown], key)
            axis.set(xlabel=label, title=NAMES[model])
        line[0].set_ylabel("exact match against no cache\n(percentage points)")
    figure.legend(*axes[-1][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(
        "Running sums, one token a step: right answers lost or won by every policy, "
        f"{env['date'][:10]}, {env['device']}\n"
        "bars: 95 % bootstrap intervals, paired by problem; no bar where no problem changes, or all change alike",
        fontsize=12,
    )
    return save(figure, path)


def _accuracy_panel(axis, rows, key):
    for group, (color, marker) in GROUPS.items():
        found = sorted((row for row in rows if group_of(row) == group), key=lambda row: row[key])
        if found:
            line = "-" if group in ("Decode", "Decode, no delay") else ""
            x, y = [row[key] for row in found], [100 * row["difference"] for row in found]
            bars = [[100 * abs(row["ci95"][end] - row["difference"]) for row in found] for end in (0, 1)]
            style = {"color": color, "marker": marker, "linestyle": line, "markersize": 7, "alpha": 0.85}
            # the default in front
            axis.errorbar(x, y, bars, **style, elinewidth=1.2, capsize=3, label=group, zorder=2 + (group == "Decode"))
    # losses may be of a tenth of a point, or of all answers
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(-150, 10)
    ticks = (-100, -30, -10, -3, -1, -0.5, 0, 0.5, 1, 3, 10)
    axis.set_yticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    axis.minorticks_off()
    axis.grid(True, alpha=0.3)


def maps(outputs: dict[str, dkv.GenerateOutput], path: Path) -> Path | None:
    """`dkv.plot_history` of generations with a history, by title."""
    plt = load_pyplot()
    if plt is None:
        return None
    figure, axes = plt.subplots(1, len(outputs), figsize=(9 * len(outputs), 5.6), squeeze=False, layout="constrained")
    for axis, (title, output) in zip(axes[0], outputs.items(), strict=True):
        dkv.plot_history(output, ax=axis)
        axis.set_title(title)
    return save(figure, path)
