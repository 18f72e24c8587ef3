"""The README is true: its snippets run, its figures are the committed ones, its paths and links lead somewhere."""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import tiny
from official import dream_folder, llada_folder
from utils import ROOT

import dkv

README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text()
RESULTS = "benchmarks/results/cpu-intel-xeon"
LLADA, DREAM = "GSAI-ML/LLaDA-8B-Instruct", "Dream-org/Dream-v0-Instruct-7B"


def test_snippets_run_as_printed(tmp_path):
    """For a LLaDA and for a Dream, on tiny checkpoints that lie where the README looks for the real ones."""
    for repository, make in ((LLADA, llada_folder), (DREAM, dream_folder)):
        (tmp_path / repository).mkdir(parents=True)
        make(tmp_path / repository)
    quick_start, *others = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert f'repo = "{LLADA}"' in quick_start and DREAM in quick_start and len(others) == 2
    llada = "\n".join((quick_start, *others))
    (tmp_path / "readme.py").write_text(llada + llada.replace(f'repo = "{LLADA}"', f'repo = "{DREAM}"'))
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_HOME": str(tmp_path / "hub")}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "readme.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert "UserWarning" not in run.stderr
    assert run.stdout.count("GenerateStats(steps=128") == 2 and run.stdout.count(", 4, 32])") == 2
    assert "<end>" not in run.stdout


def test_links_are_absolute():
    """They work on a package index, too."""
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    assert links and all(link.startswith("https://") for link in links)


def paths(text):
    """What looks like a path of the repository in code, and the paths of the trees."""
    code = [
        path for path in re.findall(r"`([\w./*-]+)`", text) if re.match(r"(\w+|\.\w+)/|[\w-]+\.(md|cff|toml)$", path)
    ]
    yield from (path for path in code if path not in (LLADA, DREAM))
    folder = ""
    for line in text.splitlines():
        if match := re.match(r"    (  )?([\w.-]+/|[\w.-]+\.\w+)   *\S", line):
            folder = folder if match[1] else match[2]
            yield folder + match[2] if match[1] else folder


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/TUNING.md"])
def test_paths_exist(document):
    """Named from the top of the repository, or from where the document is; NAME stands for any."""
    document = ROOT / document
    found = [path.replace("NAME", "*") for path in paths(document.read_text())]
    assert found and not [path for path in found if not any(list(top.glob(path)) for top in (ROOT, document.parent))]


def test_every_policy_is_in_the_table():
    assert not [name for name in dkv.policy.POLICIES if not re.search(rf"^\| [^|]*`{name}\(", README, re.M)]


def test_policy_of_contributing_runs():
    (ids, _), model = tiny.prompts(9), tiny.tiny_model("llada")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    names = {"dkv": dkv, "model": model, "prompt": ids}
    exec(block, names)
    assert names["output"].stats.steps == 32 and 0 < names["output"].stats.cache_ratio < 0.5


def test_relative_links_of_the_benchmarks_lead_somewhere():
    folder = ROOT / "benchmarks"
    links = re.findall(r"\]\(([^)\s]+)\)", (folder / "README.md").read_text())
    relative = [link for link in links if not link.startswith("https://")]
    assert relative and all((folder / link).exists() for link in relative)


def record(name):
    """A committed record; that in the working tree may be of a `make bench` since."""
    path = f"{RESULTS}/{name}.json"
    show = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True)
    return json.loads(show.stdout if show.returncode == 0 else (ROOT / path).read_text())


def results(name):
    return record(name)["rows"]


def generations():
    """(model, batch, label) -> system -> row of the committed runs, in the order of the tables."""
    found = {}
    for row in sorted(results("generate_speed_batch_1") + results("generate_speed_batch_4"), key=lambda r: r["batch"]):
        found.setdefault((row["model"].removesuffix("-small"), row["batch"], row["label"]), {})[row["system"]] = row
    return dict(sorted(found.items(), key=lambda item: item[0][0] == "Dream"))


LABELS = {
    "NoCache": "`NoCache()`",
    "Decode": "`Decode(8)`",
    "Decode block": "`Decode(8, scope='block')`",
    "DualCache": "`DualCache()`",
}


def cell(systems, name):
    return f"{systems[name]['seconds']:.1f} s" if name in systems else ""


def generation_rows():
    """The lines of the README's table of whole generations."""
    runs = generations()
    for (model, batch, label), systems in runs.items():
        if label == "Decode" or (model, label) == ("LLaDA", "DualCache"):
            cells = model, str(batch), LABELS[label], cell(runs[model, batch, "NoCache"], "official")
            cells += cell(systems, "dkv-cache"), cell(systems, "dkv"), f"{systems['dkv']['speedup']:.2f}x"
            yield f"| {' | '.join(cells)} |"


def all_generation_rows():
    """The lines of the table in benchmarks/README.md."""
    for (model, batch, label), systems in generations().items():
        cells = model, str(batch), LABELS[label], *(cell(systems, name) for name in ("official", "dkv-cache", "dkv"))
        cells += tuple(f"{systems['dkv'][key]:.2f}x" for key in ("speedup", "cap"))
        yield f"| {' | '.join(cells)} |"


def attention_rows():
    """The lines of the table of one layer's attention in benchmarks/README.md."""
    points = {}
    for row in results("attn_speed"):
        point = row["model"], row["batch"], row["ragged"], row["seqlen"], row["active"]
        points.setdefault(point, {})[row["family"]] = row["ms"]
    shapes = [(1, False, 1024), (1, False, 2048), (8, False, 512), (8, True, 512)]
    for model, (batch, ragged, seqlen) in itertools.product(("LLaDA-8B", "Dream-7B"), shapes):
        ms = points[model, batch, ragged, seqlen, 32]
        ratios = (ms[name] / ms["ours"] for name in ("full recompute", "authors' way", "cheap fix"))
        cells = model, f"{batch}{', ragged' * ragged}", str(seqlen), "32", f"{ms['ours']:.2f} ms"
        cells += tuple(f"{ratio:.{digits}f}x" for ratio, digits in zip(ratios, (1, 1, 2), strict=True))
        yield f"| {' | '.join(cells)} |"


def chart():
    """The bars of one layer's attention."""
    point = {"model": "LLaDA-8B", "batch": 8, "seqlen": 512, "active": 32, "ragged": False}
    rows = [row for row in results("attn_speed") if all(row[key] == value for key, value in point.items())]
    labels = {"full recompute": "no cache", "authors' way": "authors' way", "cheap fix": "static cache", "ours": "dkv"}
    times = {row["provider"]: row["ms"] for row in rows}
    for provider, label in labels.items():
        eighths = round(8 * 50 * times[provider] / max(times.values()))
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        yield f"    {label:<14}{bar} {times[provider]:.1f} ms"


@pytest.mark.parametrize(
    "document, make",
    [
        (README, generation_rows),
        (README, chart),
        (BENCHMARKS, attention_rows),
        (BENCHMARKS, all_generation_rows),
    ],
)
def test_figures_are_the_committed_ones(document, make):
    lines = "\n".join(make())
    assert lines in document, f"it must have these lines:\n{lines}"


def test_quality_figures_are_the_committed_ones():
    """Each row of the table, found in the record by its policy and its way of decoding."""
    rows = results("quality")

    def printed(family, policy, decoding):
        settings = {name: value for name, value in vars(policy).items() if name in rows[0]}
        if hasattr(policy, "refresh_interval"):
            settings["refresh_interval"] = policy.refresh_interval or "never"
        if (family, type(policy), settings.get("scope")) == ("dream", dkv.Decode, "all"):
            settings["shift"] = policy.shift or "un_right"
        decoding = "confidence" if (family, decoding) == ("llada", "blocks") else decoding or "confidence"
        wanted = settings | {"model": family, "policy": type(policy).__name__, "decoding": decoding}
        row = next(row for row in rows if all(row[key] == value for key, value in wanted.items()))
        difference = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * v for v in (row["difference"], *row["ci95"])))
        cached = f"{100 * row['cache_ratio']:.0f} %"
        return cached, f"{100 * row['exact_match']:.1f} %", "" if row["policy"] == "NoCache" else difference

    table = re.findall(
        r"^\| `(\w+\([^`]*\))`[,:]? ?([^|]*) \| (\d+ %) \|(.*) \|(.*) \|(.*) \|(.*) \|$", BENCHMARKS, re.M
    )
    assert len(table) == 15
    for policy, how, cached, *cells in table:
        policy, cells = eval(f"dkv.{policy}"), [text.strip() for text in cells]
        decoding = how if how in ("blocks", "left to right") else ""
        dream = printed("dream", policy, decoding)
        llada = printed("llada", policy, decoding) if cells[0] else (dream[0], "", "")
        assert (cached, *cells) == (llada[0], *llada[1:], *dream[1:]), policy


def test_sentences_with_figures_are_true():
    speedups = [s["dkv"]["speedup"] for (*_, label), s in generations().items() if label != "NoCache"]
    assert f"{min(speedups):.1f}x to {max(speedups):.1f}x as fast as the families' own loops" in " ".join(
        README.split()
    )
    summary = record("attn_speed")["summary"]["all points"]["cheap fix"]
    assert f"The worst of {summary['points']} points is {summary['least']:.2f}x" in README


def test_cache_ratios_are_what_generate_reports():
    """The columns of few steps, and the README's sentence about them."""
    model, (ids, _) = tiny.tiny_model("llada"), tiny.prompts(256)
    for policy in ("Decode(8)", "Decode(8, warmup_steps=1)", "DualCache()"):
        row = re.search(rf"^\| `{re.escape(policy)}` \|((?: 0\.\d\d \|){{5}})$", BENCHMARKS, re.M)
        *_, at_32, at_16 = row[1].rstrip("|").split("|")
        for steps, printed in ((32, at_32), (16, at_16)):
            settings = {"gen_length": 256, "block_length": 32, "steps": steps}
            output = dkv.generate(model, ids, policy=eval(f"dkv.{policy}"), **settings)
            assert f"{output.stats.cache_ratio:.2f}" == printed.strip()
    decode, dual = (
        re.search(rf"`{name}` \|([\d. |]+)\|$", BENCHMARKS, re.M)[1] for name in (r"Decode\(8\)", r"DualCache\(\)")
    )
    decode, dual = ([round(100 * float(ratio)) for ratio in row.split("|")] for row in (decode, dual))
    sentence = (
        f"`Decode(8)` reads {decode[0]} % of the positions from the cache and `DualCache()` {dual[0]} %; "
        f"with 8 tokens, {decode[3]} % and {dual[3]} %; with 16, none and {dual[4]} %"
    )
    assert sentence in " ".join(README.split()) and decode[4] == 0
    model, (ids, _) = tiny.tiny_model("dream"), tiny.prompts(256)
    ratio = dkv.generate(model, ids, gen_length=256, steps=32, policy=dkv.Decode(8)).stats.cache_ratio
    assert abs(ratio - 0.6) < 0.02 and "in one block stays at about 60 %" in " ".join(README.split())
