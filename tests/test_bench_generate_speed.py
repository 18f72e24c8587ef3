"""generate_speed measures what it says: the plain loop, peers, counts, floors, the order of samples, rows and statuses."""

import csv
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import hub
import pytest
import tiny
import torch
from utils import run_python

import dkv
from benchmarks import generate_speed
from benchmarks.harness import common, generation, models, peer, plots, products, roofline, step_profile, systems
from benchmarks.harness.generation import GenerationPoint, Study
from benchmarks.harness.roofline import Sizes, Work
from benchmarks.harness.systems import Job, Ours, PlainLoop

ROOT = Path(__file__).resolve().parent.parent

CEILINGS = {"bandwidth": 1e9, "flops": 1e10}
CONFIG = SimpleNamespace(hidden_size=8, mlp_size=16, layers=3, nheads=4, nheads_k=2, headdim=2, vocab_size=32)
SIZES = Sizes(CONFIG, element_size=4)


def tiny_study(family):
    name, model = family, tiny.tiny_model(family.lower())
    return Study(family, name, model, CEILINGS, [], [])


# ---- counts and floors


def test_operations_by_hand():
    # Q and output 8 x 8, K and V 8 x 4 each, three of the MLP 8 x 16
    assert SIZES.kv_weights == 64 and SIZES.layer_weights == 64 + 64 + 64 + 384
    everything = Work(batch=2, seqlen=5, active=10, candidates=10)
    linear, attention, head = 3 * 2 * 10 * 576, 3 * 4 * 10 * 5 * 8, 2 * 10 * 8 * 32
    assert roofline.operations(SIZES, [everything]) == linear + attention + head
    assert everything.full
    cached = Work(batch=2, seqlen=5, active=3, candidates=1)
    assert roofline.operations(SIZES, [cached]) == 3 * (2 * 3 * 576 + 4 * 3 * 5 * 8) + 2 * 8 * 32
    assert roofline.operations(SIZES, [cached, cached]) == 2 * roofline.operations(SIZES, [cached])
    assert not cached.full


def test_floors_by_hand():
    step = Work(batch=2, seqlen=5, active=3, candidates=1)
    bytes_alone = roofline.floors(SIZES, step, {"bandwidth": 1.0, "flops": float("inf")})
    keys = 2 * 5 + 3  # read and written; K and V of a position are 8 numbers, queries and outputs 8 each
    assert bytes_alone["attention"] == 4 * (3 * keys * 8 + 2 * 8 * (2 * 3 + 1))
    assert bytes_alone["linear"] == 4 * 3 * 576 and bytes_alone["head"] == 4 * 32 * 8
    operations_alone = roofline.floors(SIZES, step, {"bandwidth": float("inf"), "flops": 1.0})
    # the last layer: K and V of three positions, the rest of one
    linear, attention = 2 * 2 * 3 * 576 + 2 * (3 * 64 + 1 * 512), 4 * 5 * 8 * (2 * 3 + 1)
    assert operations_alone == {"linear": linear, "attention": attention, "head": 2 * 8 * 32}
    assert (
        roofline.floor(SIZES, step, CEILINGS) < sum(bytes_alone.values()) / 1e9 + sum(operations_alone.values()) / 1e10
    )


def test_sizes_of_the_true_models():
    sizes = Sizes.of(SimpleNamespace(model_config=models.MODELS["LLaDA-8B"], dtype=torch.bfloat16))
    weights = 32 * sizes.layer_weights + 2 * sizes.model.vocab_size * sizes.model.hidden_size
    assert weights == pytest.approx(8.02e9, rel=0.01)
    # the floor of a cached step of one row: its weights but for the embedding, at 3 TB/s
    floor = roofline.floor(sizes, Work(1, 1024, 32, 32), {"bandwidth": 3e12, "flops": 800e12})
    assert floor == pytest.approx(5.2e-3, rel=0.05)
    shapes = products.shapes(models.MODELS["Dream-7B"])
    assert shapes["Q, K, V"] == (4608, 3584) and shapes["gate, up"] == (37888, 3584)


# ---- systems


JOBS = [("LLaDA", 8, 24, 24), ("LLaDA", 8, 16, 8), ("Dream", 16, 16, 16), ("Dream", 16, 16, 6), ("Dream", 8, 16, 16)]


@pytest.mark.parametrize("family, block_length, gen_length, steps", JOBS)
def test_the_plain_loop_is_no_cache(family, block_length, gen_length, steps):
    model = tiny_study(family).model
    prompt = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    job = Job("NoCache", dkv.NoCache(), prompt, gen_length, block_length, steps)
    ours, plain = Ours(model).run(job), PlainLoop(model).run(job)
    assert ours.sequences == plain.sequences
    assert [positions for positions, _ in plain.steps] == [2 * (9 + gen_length)] * steps


@pytest.mark.parametrize("family", ["LLaDA", "Dream"])
@pytest.mark.parametrize("label", generation.POLICIES)
def test_the_work_of_a_run_is_what_it_did(family, label):
    job = tiny_study(family).job(label, GenerationPoint(2, 12, 12))
    system = Ours(tiny_study(family).model)
    outcome = system.run(job)
    output = dkv.generate(
        system.model,
        job.prompt,
        gen_length=12,
        block_length=job.block_length,
        policy=job.policy,
        remasking="random" if job.policy.needs_order else None,
        generator=torch.Generator().manual_seed(0),
        output_history=True,
    )
    assert outcome.sequences == output.sequences.tolist()
    assert [step.active for step in system.work] == output.active.sum((1, 2)).tolist()
    assert [positions for positions, _ in outcome.steps] == [step.active for step in system.work]
    committed = 2 * 12 - (output.history == system.model.model_config.mask_id).sum((1, 2))
    first_of_step = torch.cat((torch.zeros(1, dtype=torch.int64), committed[:-1]))
    if label == "Greedy":
        assert [step.candidates for step in system.work] == (committed - first_of_step).tolist()
    elif job.block_length == 12:
        assert [step.candidates for step in system.work] == (2 * 12 - first_of_step).tolist()


def test_peak_memory_is_counted():
    model = torch.nn.Linear(1000, 1000, bias=False)

    def run(stopwatch):
        a = torch.ones(1000, 1000)
        b = a + 1
        del a
        return (b + b)[:1, :1]

    outcome = peer.measured(run, model, torch.device("cpu"), with_peak=True)
    assert outcome.peak_bytes == pytest.approx(12e6, rel=0.01)
    assert peer.measured(run, model, torch.device("cpu"), with_peak=False).peak_bytes is None


def test_random_weights_depend_on_names_alone():
    native = tiny.tiny_model("dream")
    other = tiny.Lookalike(native)
    one, two = (dict(peer.fill_random(model, 3).named_parameters()) for model in (native, other))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], one["model.embed_tokens.weight"])


# ---- peers: a stand-in for the hub's files, of the same layout

MODELING = """
import sys
sys.path.insert(0, {root!r})
import torch
from types import SimpleNamespace

class PretrainedConfig:
    output_hidden_states, return_dict = False, True

    def __init__(self, **fields):
        vars(self).update(fields)

class PreTrainedModel(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def post_init(self):
        self.apply(self._init_weights)

# the import of the real one would take as long as everything else
classes = dict(PretrainedConfig=PretrainedConfig, PreTrainedModel=PreTrainedModel, GenerationMixin=type("GenerationMixin", (), {{}}))
sys.modules["transformers"] = SimpleNamespace(__version__="4.57.6", GenerationConfig=object, **classes)
sys.modules["transformers.modeling_outputs"] = SimpleNamespace(CausalLMOutputWithPast=SimpleNamespace)
from dkv.models.native import LLaDA, LLaDAConfig

print("their noise must not reach the answers")

class LLaDAModelLM(LLaDA):
    def _init_weights(self, module):
        raise AssertionError("weights are not initialised")
"""
LOOP = """
import torch

@torch.no_grad()
def generate(model, prompt, steps, gen_length, block_length, temperature, mask_id):
    x = torch.nn.functional.pad(prompt, (0, gen_length), value=mask_id)
    for step in range(steps):
        confidence, tokens = model(x).logits.softmax(-1).max(-1)
        end = prompt.shape[1] + (step // block_length + 1) * block_length
        confidence[x != mask_id] = -1
        confidence[:, end:] = -1
        chosen = confidence.argmax(-1, keepdim=True)
        x.scatter_(1, chosen, tokens.gather(1, chosen) {error})
    return x
"""


DECODE_LOOP = LOOP.replace("(model, prompt,", "(model, tokenizer, prompt,").replace(
    "mask_id):", "mask_id, enable_cache, cache_reloading_step):"
)


def write_stand_in(folder, files):
    """files: path -> text; returns the folder."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


@pytest.fixture
def peers(tmp_path):
    """Arguments that name stand-ins: one of the same tokens, one of other tokens, and one that cannot start."""
    modeling = MODELING.format(root=str(ROOT))
    files = {"llada_v2/modeling_llada.py": modeling, "llada_generate.py": LOOP.format(error="")}
    official = write_stand_in(tmp_path / "hub", files)
    files = {"models/modeling_llada_dkv_cache_decode.py": modeling}
    files["generation_utils/llada_dkv_cache_decode.py"] = DECODE_LOOP.format(error="+ 1")
    authors = write_stand_in(tmp_path / "authors", files)
    (tmp_path / "empty").mkdir()
    folders = f"official={official}", f"dkv-cache={authors}", f"fast-dllm={tmp_path / 'empty'}"
    return [part for folder in folders for part in ("--peer", folder)]


@pytest.fixture
def bench(monkeypatch, capsys, tmp_path, standing_clock):
    """Runs generate_speed here, on tiny models; returns (exit status, what it printed, the JSON of its last line)."""
    tiny_models = {family: (f"{family}-tiny", tiny.CONFIGS[family.lower()]()) for family in models.FAMILIES}
    monkeypatch.setattr(generate_speed, "SCALED_DOWN", tiny_models)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(common, "measure_ceilings", lambda: CEILINGS)

    def run(*arguments):
        status = generate_speed.main([*map(str, arguments), "--out", str(tmp_path)])
        output = capsys.readouterr().out
        return status, output, json.loads(output.splitlines()[-1])

    return run


POINT = ("--points", "LLaDA:2:16:8", "--policies", "NoCache,Decode", "--budget", "1")


def test_peers(bench, peers):
    """Each in a process of its own: one of the same tokens, and one of others, which fails the run."""
    status, output, result = bench(*POINT, *peers[:4])
    assert status == 1 and "tokens differ: LLaDA-tiny" in output
    assert len(result["mismatches"]) == 1 and "Decode: dkv-cache" in result["mismatches"][0]
    assert not result["not_run"]
    rows = {(row["system"], row["label"]): row for row in result["rows"]}
    assert rows.keys() == {("dkv", "NoCache"), ("dkv", "Decode"), ("official", "NoCache"), ("dkv-cache", "Decode")}
    assert all(row["seconds"] for row in result["rows"]), "everything is shown all the same"
    theirs = rows["official", "NoCache"]
    assert theirs["same_tokens"] == 1 and theirs["steps"] == 8 and theirs["samples"] == 3
    assert theirs["peak_bytes"] > 0 and theirs["cache_ratio"] == 0 and theirs["ms_full_step"] > 0
    assert theirs["speedup"] == 1 and theirs["times_ours"] > 0
    assert rows["dkv", "Decode"]["speedup"] > 0
    assert "as fast as official" in output


def test_on_a_gpu_peers_take_turns(bench, peers, monkeypatch):
    """One in memory at a time; here they answer in this process."""
    alive = []

    class Watched(systems.PeerProcess):
        def __init__(self, name, folder, *rest):
            self.driver = peer.Driver(name, folder)
            super().__init__(name, folder, *rest)
            alive.append(name)
            assert alive == [name], "one at a time"

        def _ask(self, request):
            try:
                return json.loads(json.dumps(self.driver.answer(request)))
            except Exception as error:
                raise systems.Failed(common.described(error)) from None

        def close(self):
            super().close()
            alive.clear()

    class OnGPU(generate_speed.GenerationBench):
        def __init__(self, arguments):
            super().__init__(arguments)
            self.cuda, self.dtype = True, torch.float32

    monkeypatch.setattr(systems, "subprocess", SimpleNamespace(Popen=mock.Mock(), PIPE=None))
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(generate_speed, "TRUE_SIZE", generate_speed.SCALED_DOWN)
    monkeypatch.setattr(generate_speed, "PeerProcess", Watched)
    monkeypatch.setattr(generate_speed, "GenerationBench", OnGPU)
    for name in ("transformers", "transformers.modeling_outputs"):  # the stand-ins replace them
        monkeypatch.setitem(sys.modules, name, None)
    status, output, result = bench(*POINT, *peers)
    assert status == 1 and len(result["mismatches"]) == 1 and "Decode: dkv-cache" in result["mismatches"][0]
    assert len(result["not_run"]) == 1 and "No module named" in result["not_run"][0]
    rows = {(row["system"], row["label"]): row for row in result["rows"]}
    assert {system for system, _ in rows} == {"dkv", "dkv, eager", "official", "dkv-cache"}
    assert rows["dkv, eager", "Decode"]["same_tokens"] == rows["official", "NoCache"]["same_tokens"] == 1
    theirs = rows["dkv-cache", "Decode"]
    assert theirs["speedup"] > 0 and theirs["cap"] == rows["dkv", "Decode"]["cap"] and theirs["times_ours"] > 0


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_official_loops_agree(bench, family):
    if hub.skip_reason():
        pytest.skip(hub.skip_reason())
    official = f"official={os.environ['DKV_HUB_CODE']}"
    status, output, result = bench("--points", f"{family}:2:12:32", "--policies", "NoCache", "--peer", official)
    assert status == 0, output
    assert [row["same_tokens"] for row in result["rows"]] == [None, 1]


def test_a_peer_that_dies_says_so(tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'the last words' >&2\n")
    program.chmod(0o755)
    with pytest.raises(systems.Failed, match="it ended: the last words"):
        systems.PeerProcess("official", tmp_path, str(program), {})


# ---- order, rows, arguments


class Timed:
    """An entry that only notes its turns."""

    def __init__(self, name, order):
        self.name, self.order, self.outcomes = name, order, []

    def take_sample(self):
        self.order.append(self.name)
        self.outcomes.append(None)


def test_samples_are_interleaved_or_one_after_the_other():
    for interleaved, expected in ((True, "ababab"), (False, "aaabbb")):
        order = []
        entries = [Timed(name, order) for name in "ab"]
        generation.take_samples(entries, 3, 60, interleaved=interleaved)
        assert "".join(order) == expected
    # without time the first alone
    for interleaved in (True, False):
        order = []
        generation.take_samples([Timed(name, order) for name in "ab"], 3, -1, interleaved=interleaved)
        assert order == ["a"]


def test_every_policy_and_kind(bench, tmp_path, monkeypatch):
    points = (GenerationPoint(1, 16, 8, "one"), GenerationPoint(2, 8, 8, "two"))
    agenda = generate_speed.Agenda(points=points, grid=(GenerationPoint(2, 16, 8),), samples=1)
    monkeypatch.setattr(generate_speed, "CPU", agenda)
    status, output, result = bench("--profile", "--budget", "1")
    assert status == 0 and not result["mismatches"] and not result["not_run"], output
    kinds = {kind: [row for row in result["rows"] if row["kind"] == kind] for kind in ("run", "steps", "threshold")}
    assert {row["label"] for row in kinds["run"]} == set(generation.LABELS)
    assert {row["label"] for row in kinds["run"] if row["batch"] == 2} == set(agenda.few)
    for row in result["rows"]:
        assert row["seconds"] > 0 and row["tokens_per_s"] > 0 and row["peak_bytes"] > 1e5 and row["ms_full_step"] > 0
        assert row["floor_ms"] > 0 and row["fraction_of_floor"] > 0 and row["floor_ms_full_step"] > 0
        assert (row["ms_cached_step"] is None) == (row["cache_ratio"] == 0)
    for row in kinds["run"]:
        assert row["speedup"] > 0 and row["cap"] >= 1 and row["steps"] == 8
        assert row["same_tokens"] == (1 if row["system"] == "plain loop" else None)
    assert kinds["steps"] and all(row["steps"] == 2 and row["label"] == "Decode" for row in kinds["steps"])
    assert kinds["threshold"]
    assert all(row["threshold"] > 0 and row["steps"] <= 8 and row["cap"] is None for row in kinds["threshold"])
    decode = next(row for row in kinds["run"] if row["label"] == "Decode")
    assert decode["cap"] > 1.2 and decode["floor_ms_cached_step"] < decode["floor_ms_full_step"]

    assert {(p["model"], p["step"]) for p in result["profiles"]} == {
        (f"{family}-tiny", step) for family in models.FAMILIES for step in ("full", "cached")
    }
    for profile in result["profiles"]:
        groups = profile["groups"]
        assert groups.keys() == set(step_profile.GROUPS)
        assert sum(group["ms"] for group in groups.values()) == pytest.approx(profile["ms"], rel=1e-3)
        assert all(groups[name]["ms"] > 0 for name in ("linear", "head", "attention", "norms", step_profile.REST))

    with (tmp_path / "generate_speed.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(result["rows"])
    assert json.loads((tmp_path / "generate_speed.json").read_text())["rows"] == result["rows"]
    assert (tmp_path / "generate_speed.png").stat().st_size > 10_000


def test_a_run_from_elsewhere(tmp_path):
    options = ("--points", "Dream:1:8:8", "--policies", "Decode", "--budget", "0", "--no-plot")
    run = run_python(ROOT / "benchmarks" / "generate_speed.py", *options, "--out", tmp_path / "out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "profiler" not in run.stderr and "ERROR" not in run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["impl"] == "PyTorch implementation" and result["device"].startswith("CPU")
    assert [row["policy"] for row in result["rows"]] == [repr(dkv.Decode(8, shift="un"))]
    assert (tmp_path / "out" / "generate_speed_points.json").exists()


def test_without_time_it_says_what_was_not_run(bench):
    status, _, result = bench("--points", "LLaDA:1:8:8,LLaDA:2:8:8", "--budget", "0")
    assert status == 0
    assert [row["label"] for row in result["rows"] if not row["failure"]] == ["NoCache"]
    assert {row["failure"] for row in result["rows"]} == {None, "not run: the budget is used up"}
    assert result["not_run"] == ["LLaDA-tiny: batch 2, prompt 8 + 8 tokens, run"]


def test_what_fails_is_a_row_and_the_rest_is_measured(bench, monkeypatch):
    run = Ours.run

    def failing(self, job, **options):
        if job.label == "Decode":
            raise RuntimeError("no such kernel\nand details")
        return run(self, job, **options)

    monkeypatch.setattr(Ours, "run", failing)
    _, output, result = bench("--points", "LLaDA:1:8:8", "--policies", "NoCache,Decode,DualCache", "--budget", "1")
    failures = {row["label"]: row["failure"] for row in result["rows"] if row["system"] == "dkv"}
    assert failures == {"NoCache": None, "Decode": "RuntimeError: no such kernel", "DualCache": None}
    assert "RuntimeError: no such kernel" in output


def test_an_error_of_the_benchmark_keeps_what_it_has(bench, monkeypatch):
    def broken(model, job, ceilings):
        raise ZeroDivisionError("nothing was profiled")

    monkeypatch.setattr(generate_speed.step_profile, "profile", broken)
    arguments = ("--points", "LLaDA:1:8:8", "--policies", "NoCache", "--budget", "1", "--profile")
    status, _, result = bench(*arguments)
    assert status == 1 and result["not_run"] == ["whatever is not above: ZeroDivisionError: nothing was profiled"]
    assert [row["system"] for row in result["rows"] if row["seconds"]] == ["dkv", "plain loop"]


def test_a_stopped_run_keeps_what_it_has(bench, monkeypatch):
    run, calls = Ours.run, []

    def stopped_at_the_fourth(self, job, **options):
        calls.append(job.label)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(self, job, **options)

    monkeypatch.setattr(Ours, "run", stopped_at_the_fourth)
    status, output, result = bench("--points", "LLaDA:1:8:8", "--policies", "NoCache,Decode", "--budget", "1")
    assert status == 0 and result["not_run"] == ["whatever is not above: stopped by a signal"]
    assert [(row["system"], row["label"]) for row in result["rows"] if row["seconds"]] == [
        ("dkv", "NoCache"),
        ("plain loop", "NoCache"),
    ]
    assert "plain loop  NoCache" in output


def test_bad_arguments_are_refused(tmp_path, capsys):
    for arguments, message in (
        (["--points", "GPT:1:2:3"], "FAMILY:BATCH:PROMPT:GENERATED"),
        (["--points", "LLaDA:1:0:3"], "FAMILY:BATCH:PROMPT:GENERATED"),
        (["--policies", "NoCache,Fast"], "'Fast' is none of NoCache, Decode"),
        (["--peer", f"llama={tmp_path}"], "official, dkv-cache, fast-dllm"),
        (["--peer", f"official={tmp_path / 'missing'}"], "NAME=FOLDER"),
    ):
        with pytest.raises(SystemExit):
            generate_speed.parse_arguments(arguments)
        assert message in capsys.readouterr().err
    peers = ["--peer", f"official={tmp_path}", "--peer", f"fast-dllm={tmp_path}"]
    peers += ["--peer-python", "some/python", "--peer-python", "fast-dllm=other/python"]
    found = generate_speed.parse_arguments(peers).peers
    assert [(name, python) for name, _, python in found] == [("official", "some/python"), ("fast-dllm", "other/python")]


@pytest.mark.parametrize("agenda", [generate_speed.GPU, generate_speed.CPU, generate_speed.QUICK])
def test_an_agenda_names_policies_that_there_are(agenda):
    assert {*agenda.few, *agenda.with_threshold} <= set(generation.LABELS)
    assert len(set(agenda.grid)) == len(agenda.grid)


def test_kernels_of_a_gpu_find_their_group():
    for kernel, group in (
        ("_delayed_attention_kernel", "attention"),
        ("_merge_splits_kernel", "attention"),
        ("_rope_cache_kernel", "rope, cache write"),
        ("_add_rms_norm_kernel", "norms"),
        ("_deferred_norm_kernel", "norms"),
        ("_linear_rope_cache_kernel", "linear"),
        ("_linear_swiglu_kernel", "linear"),
        ("_linear_add_norm_kernel", "linear"),
        ("_lm_head_kernel", "head"),
        ("_commit_tokens_kernel", "packing, commit"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "linear"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "linear"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", step_profile.REST),
    ):
        assert step_profile.group_of(kernel) == group


def test_no_picture_without_runs(tmp_path):
    assert plots.generation([], {}, tmp_path / "x.png") is None
