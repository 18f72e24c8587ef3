"""Pictures of quality.py: accuracy against what is cached and against time, and maps of single generations."""

import plots

import dkv

# family of rows -> (colour, marker)
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
# what Decode has by default
SHIFTS = (None, "un_right")


def group_of(row):
    if row["policy"] == "NoCache":
        return "no cache"
    if row["policy"] != "Decode":
        return next((group for group in GROUPS if row["policy"] in group), None)
    if row["delay"] == 0:
        return "Decode, no delay"
    if row["scope"] == "block":
        return "Decode, scope block"
    return "Decode" if row["shift"] in SHIFTS else "Decode, shift un or right"


def accuracy(rows, env, path):
    """Exact match over cache ratio and over time, a line of panels for each model; returns the path."""
    plt = plots.load_pyplot()
    if plt is None:
        return None
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(len(models), 2, figsize=(13, 4.6 * len(models)), squeeze=False, layout="constrained")
    for model, line in zip(models, axes, strict=True):
        shown = [r for r in rows if r["model"] == model and r["decoding"] != "threshold"]
        for axis, key, label in zip(
            line,
            ("cache_ratio", "ms"),
            ("share of positions read from the cache", "milliseconds a problem"),
            strict=True,
        ):
            _panel(axis, [row | {"ms": 1e3 * row["seconds"] / row["problems"]} for row in shown], key)
            axis.set(xlabel=label, ylabel="exact match (%)", title=model)
    figure.legend(*axes[-1][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(
        f"Running sums, one token a step: right answers under every policy, {env['date'][:10]}\n{env['device']}",
        fontsize=13,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _panel(axis, rows, key):
    for group, (color, marker) in GROUPS.items():
        found = sorted((row for row in rows if group_of(row) == group), key=lambda row: row[key])
        if found:
            line = "-" if group in ("Decode", "Decode, no delay") else ""
            x, y = [row[key] for row in found], [100 * row["exact_match"] for row in found]
            axis.plot(x, y, color=color, marker=marker, linestyle=line, markersize=7, alpha=0.85, label=group)
    axis.set_ylim(-3, 103)
    axis.grid(True, alpha=0.3)


def maps(outputs, path):
    """`dkv.plot_history` of one generation each; outputs: {title: GenerateOutput with history}; returns the path."""
    plt = plots.load_pyplot()
    if plt is None:
        return None
    figure, axes = plt.subplots(1, len(outputs), figsize=(9 * len(outputs), 5.6), squeeze=False, layout="constrained")
    for axis, (title, output) in zip(axes[0], outputs.items(), strict=True):
        dkv.plot_history(output, ax=axis)
        axis.set_title(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
