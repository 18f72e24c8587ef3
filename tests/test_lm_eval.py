"""`dkv.lm_eval` in the evaluation harness itself: a tiny checkpoint, two tiny tasks on local files, no network."""

import importlib.util
import itertools
import json
import math
import os
import re
import string
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import dkv
import dkv.texts

ROOT = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("needs the evaluation harness: make test-eval installs it", allow_module_level=True)

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
BOS_ID = 253
# lengths differ, so that the batches are ragged
QUESTIONS = ["add 17 and 25", "a kernel?", "", "name three colours", "2 + 2 =", "why", "say it again, please"]
CHOICES = [["yes", "no!"], ["a", "b", "c"], ["one", "three", "12"], ["x y", "x"], [" t", " f"]]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[it]{% endif %}"
GENERATION_TASK = """
task: tiny_generation
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["q", "<mask>"], max_gen_toks: 12, do_sample: false, temperature: 0.7}
metric_list: [{metric: exact_match}]
"""
CHOICE_TASK = """
task: tiny_choice
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def harness():
    """`dkv.lm_eval`, imported offline."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OFFLINE.items():
            patch.setenv(name, value)
        import dkv.lm_eval

        yield dkv.lm_eval


def save_tokenizer(folder):
    """One token a character, of which a text can be made that says what its ids were."""
    from transformers import PreTrainedTokenizerFast

    special = {"<unk>": 252, "<begin>": BOS_ID, "<end>": tiny.EOS_ID, "<mask>": tiny.MASK_ID}
    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(252)} | special, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    names = {"unk_token": "<unk>", "bos_token": "<begin>", "eos_token": "<end>", "mask_token": "<mask>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folders = {}
    for family in ("llada", "dream"):
        folders[family] = tmp_path_factory.mktemp(family) / "tiny"
        tiny.tiny_model(family).save_pretrained(folders[family])
        save_tokenizer(folders[family])
    return folders


def encode(text):
    return [ord(character) for character in text]


def decode(ids):
    return "".join(chr(i) for i in ids if i < 252)


def generated(model, text, until=(), **settings):
    """The output of `dkv.generate` for one prompt alone, as a text up to its end of text or stop string."""
    ids = encode(text) or [BOS_ID]
    settings = {"gen_length": 12} | settings
    ids = dkv.generate(model, torch.tensor([ids]), **settings).sequences[0, len(ids) :].tolist()
    text = decode(ids[: ids.index(tiny.EOS_ID)] if tiny.EOS_ID in ids else ids)
    return re.split("|".join(map(re.escape, until)), text)[0] if until else text


def direct_log_likelihood(model, context, target, weighted_masks):
    """Sample after sample, in float64, on a model that is not ours; weighted_masks: (positions in target, weight)."""
    lookalike = tiny.Lookalike(model).double().requires_grad_(False)
    shifted = type(model).__name__ == "Dream"
    total = 0.0
    for masked, weight in weighted_masks:
        x = torch.tensor([context + target])
        columns = [len(context) + i for i in masked]
        x[0, columns] = tiny.MASK_ID
        log_probs = lookalike(x).logits[0].log_softmax(-1)
        total += weight * sum(log_probs[column - shifted, target[i]] for column, i in zip(columns, masked, strict=True))
    return float(total)


def every_mask(length):
    """All samples there are, with their probabilities and the factor of the bound: what the estimate converges to."""
    for masks in range(1, length + 1):
        for masked in itertools.combinations(range(length), masks):
            yield masked, length / masks / length / math.comb(length, masks)


def log_likelihoods(lm, pairs):
    torch.manual_seed(1234)
    return lm.loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)


def texts(lm, prompts, **kwargs):
    return lm.generate_until([SimpleNamespace(args=(prompt, kwargs)) for prompt in prompts], disable_tqdm=True)


@pytest.fixture(scope="module")
def tasks(checkpoints, tmp_path_factory):
    """A folder of tasks that LLaDA solves but for one document each, and the texts that are right."""
    folder = tmp_path_factory.mktemp("tasks")
    model = dkv.from_pretrained(checkpoints["llada"], device="cpu")
    answers = [generated(model, text, until=["q", "<mask>"], policy=dkv.Decode(3)) for text in QUESTIONS]
    answers[1] += "?"
    golds = []
    for text, choices in zip(QUESTIONS, CHOICES, strict=False):
        context = encode(text) or [BOS_ID]
        scores = [direct_log_likelihood(model, context, encode(c), every_mask(len(c))) for c in choices]
        golds.append(scores.index(max(scores)))
    golds[0] = 1 - golds[0]
    documents = {
        "tiny_generation": [{"text": t, "answer": a} for t, a in zip(QUESTIONS, answers, strict=True)],
        "tiny_choice": [
            {"text": t, "choices": c, "gold": g} for t, c, g in zip(QUESTIONS, CHOICES, golds, strict=False)
        ],
    }
    for (name, rows), task in zip(documents.items(), (GENERATION_TASK, CHOICE_TASK), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
        (folder / f"{name}.yaml").write_text(
            f"{task}dataset_path: json\ntest_split: test\ndataset_kwargs: {json.dumps(files)}\n"
        )
    return folder, answers


@pytest.fixture(scope="module")
def evaluate(harness, tasks):
    from lm_eval import evaluator, simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks[0]), include_defaults=False)

    def evaluate(names, **settings):
        return simple_evaluate(tasks=names, task_manager=manager, bootstrap_iters=0, device="cpu", **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "add_env_info", lambda storage: None)  # it asks pip for all packages
        yield evaluate


def answers_of(results, task):
    return [sample["resps"] for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])]


def test_the_harness_scores_what_generate_gives(evaluate, checkpoints, tasks, monkeypatch):
    calls = []

    def spy(model, input_ids, attention_mask, generate=dkv.texts.generate, **settings):
        calls.append(settings | {"batch": len(input_ids), "ragged": not attention_mask.bool().all()})
        return generate(model, input_ids, attention_mask, **settings)

    monkeypatch.setattr(dkv.texts, "generate", spy)
    arguments = f"pretrained={checkpoints['llada']},policy=Decode,refresh_interval=3"
    results = evaluate(["tiny_generation"], model="dkv", model_args=arguments, batch_size=3)
    assert results["results"]["tiny_generation"]["exact_match,none"] == pytest.approx(6 / 7)
    right = [answer.removesuffix("?") if i == 1 else answer for i, answer in enumerate(tasks[1])]
    assert answers_of(results, "tiny_generation") == [[[text]] for text in right]
    assert [call["batch"] for call in calls] == [3, 3, 1] and any(call["ragged"] for call in calls)
    for call in calls:
        assert call["policy"] == dkv.Decode(3) and call["gen_length"] == 12
        assert call["temperature"] == 0  # the task does not sample


def test_choices_are_ranked_without_a_cache(evaluate, checkpoints):
    scores = []
    for policy in ("policy=NoCache", "policy=DualCache,block_length=4"):
        arguments = f"pretrained={checkpoints['llada']},{policy},mc_num=2000"
        results = evaluate(["tiny_choice"], model="dkv", model_args=arguments, batch_size=4)
        assert results["results"]["tiny_choice"]["acc,none"] == pytest.approx(4 / 5)
        scores.append(answers_of(results, "tiny_choice"))
    assert scores[0] == scores[1]


@pytest.mark.parametrize("processes", [1, 2])
def test_command_line(checkpoints, tasks, tmp_path, processes):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "dkv.lm_eval", "--model", "dkv", "--tasks", "tiny_generation,tiny_choice", "--log_samples"]
    command += ["--model_args", f"pretrained={checkpoints['llada']},policy=Decode,refresh_interval=3,mc_num=2000"]
    command += ["--include_path", str(tasks[0]), "--batch_size", "3", "--device", "cpu", "--output_path", str(tmp_path)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | OFFLINE | {"PYTHONPATH": path, "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    (results,) = tmp_path.rglob("results*.json")
    results = json.loads(results.read_text())["results"]
    assert results["tiny_generation"]["exact_match,none"] == pytest.approx(6 / 7)
    assert results["tiny_choice"]["acc,none"] == pytest.approx(4 / 5)
    speeds = re.findall(r"Decode\(refresh_interval=3.*?\)(.*): .* tokens/s", run.stderr + run.stdout)
    assert sorted(speeds) == ([""] if processes == 1 else [", process 0 of 2", ", process 1 of 2"])
    for task, documents in (("tiny_generation", 7), ("tiny_choice", 5)):
        (samples,) = tmp_path.rglob(f"samples_{task}*.jsonl")
        samples = [json.loads(line) for line in samples.read_text().splitlines()]
        assert sorted(sample["doc_id"] for sample in samples) == list(range(documents))
        # of two processes, the one with fewer requests repeats its last one
        repeats = [len(responses) for sample in samples for responses in sample["resps"]]
        assert repeats.count(1) >= len(repeats) - (processes - 1)


@pytest.mark.parametrize(
    "family, settings, policy",
    [
        ("llada", {"policy": "PrefillDecode", "refresh_interval": 2}, dkv.PrefillDecode(2)),
        ("llada", {"policy": "Greedy", "window": 2, "remasking": "random"}, dkv.Greedy(2, 2)),
        ("dream", {"policy": "NoCache"}, dkv.NoCache()),
        ("dream", {"policy": "Decode", "refresh_interval": None, "shift": "un"}, dkv.Decode(None, shift="un")),
        (
            "dream",
            {"policy": dkv.Decode(scope="block"), "block_length": 4, "steps": 6},
            dkv.Decode(scope="block"),
        ),
    ],
)
def test_a_ragged_batch_is_its_rows(harness, checkpoints, family, settings, policy):
    given = {name: settings[name] for name in ("remasking", "block_length", "steps") if name in settings}
    # the noise of a random order depends on the place in the batch
    batch_size = 1 if "remasking" in settings else 4
    lm = harness.DiffusionLM(checkpoints[family], batch_size=batch_size, gen_length=10, **settings)
    assert lm.policy == policy
    prompts = QUESTIONS[:4]
    torch.manual_seed(0)
    got = texts(lm, prompts, max_gen_toks=5, until="z")
    torch.manual_seed(0)
    longest_first = sorted(prompts, key=len, reverse=True)
    wanted = {
        text: generated(lm.model, text, until=["z"], gen_length=10, policy=policy, **given) for text in longest_first
    }
    assert got == [wanted[text] for text in prompts]


def test_ends_of_text_and_stop_strings(harness, checkpoints):
    lm = harness.DiffusionLM(checkpoints["llada"], batch_size=7, gen_length=12)
    whole = texts(lm, QUESTIONS)
    end = whole[0][5]
    cut = [text.split(end)[0] for text in whole]
    assert cut != whole
    assert texts(lm, QUESTIONS, until=end) == texts(lm, QUESTIONS, until=["", end]) == cut
    assert texts(lm, QUESTIONS, until=[whole[0][7:9], whole[0][5:7]])[0] == whole[0][:5]
    for early in (True, False):
        other = harness.DiffusionLM(
            lm.model,
            tokenizer=lm.tokenizer,
            batch_size=7,
            gen_length=12,
            eos_token_id=[tiny.EOS_ID, ord(end)],
            eos_early_stop=early,
        )
        assert texts(other, QUESTIONS) == cut
    # special tokens can be stop strings, and are no text
    ids = [*encode("ab"), BOS_ID, *encode("cd"), tiny.MASK_ID, *encode("ef")]
    assert lm._text(ids, ["<mask>"]) == "abcd"
    assert lm._text(ids, ["e", "<begin>"]) == "ab"


def test_what_the_task_says_and_what_the_user_says(harness, checkpoints, monkeypatch):
    calls = []

    def spy(model, input_ids, attention_mask, **settings):
        calls.append(settings)
        return SimpleNamespace(sequences=torch.zeros(1, 40, dtype=torch.long))

    monkeypatch.setattr(dkv.texts, "generate", spy)
    task = {"do_sample": True, "temperature": 0.2, "top_p": 0.9, "max_gen_toks": 7}
    texts(harness.DiffusionLM(checkpoints["llada"]), ["a"], **task)
    texts(harness.DiffusionLM(checkpoints["llada"], temperature=0.0, gen_length=9, steps=3), ["a"], **task)
    texts(harness.DiffusionLM(checkpoints["llada"]), ["a"], **task | {"do_sample": False})
    first, second, third = calls
    assert (first["temperature"], first["top_p"], first["gen_length"], first["steps"]) == (0.2, 0.9, 7, None)
    assert (second["temperature"], second["top_p"], second["gen_length"], second["steps"]) == (0.0, 0.9, 9, 3)
    assert third["temperature"] == 0 and third["top_p"] is None


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_likelihoods(harness, checkpoints, family):
    pairs = [("add 17 and 25", " 42"), ("add 17 and 25", " 43"), ("why", "x"), ("why", "y"), ("", "ab"), ("why", "")]
    lm = harness.DiffusionLM(checkpoints[family], batch_size=3, mc_num=5, policy="Prefill")
    got = log_likelihoods(lm, pairs)
    assert got == log_likelihoods(lm, pairs)
    assert all(greedy is False for _, greedy in got) and got[-1][0] == 0
    for (context, target), (value, _) in zip(pairs, got, strict=True):
        # the prompt's last space belongs to the continuation, and an empty prompt is the BOS
        masks, weights = harness.sample_masks(max(len(target), 1), 5, torch.Generator().manual_seed(1234))
        samples = [(mask.nonzero()[:, 0].tolist(), weight) for mask, weight in zip(masks, weights, strict=True)]
        wanted = direct_log_likelihood(lm.model, encode(context) or [BOS_ID], encode(target), samples if target else [])
        assert value == pytest.approx(wanted, rel=1e-4)
    # whatever the batches are
    for batch_size in (1, 64):
        lm.batch_size = batch_size
        assert [value for value, _ in log_likelihoods(lm, pairs[::-1])][::-1] == pytest.approx(
            [value for value, _ in got], rel=1e-5
        )


def test_likelihoods_converge(harness, checkpoints):
    lm = harness.DiffusionLM(checkpoints["llada"], mc_num=20000, batch_size=8)
    ((value, _),) = log_likelihoods(lm, [("why", "not")])
    assert value == pytest.approx(
        direct_log_likelihood(lm.model, encode("why"), encode("not"), every_mask(3)), rel=5e-3
    )
    # one token: all samples are the same pass, and the tokens of the vocabulary share one probability
    calls = []
    lm.model.register_forward_hook(lambda module, arguments, output: calls.append(len(arguments[0])))
    lm.batch_size, lm.mc_num = 252, 128
    values = [value for value, _ in log_likelihoods(lm, [("why", chr(i)) for i in range(252)])]
    assert calls == [1]
    assert 0.5 < sum(map(math.exp, values)) < 1


def test_masks_of_the_samples(harness):
    masks, weights = harness.sample_masks(7, 70000, torch.Generator().manual_seed(0))
    assert len(masks) == 2**7 - 1 and masks.any(1).all()
    chance = weights * masks.sum(1) / 7
    for level in range(1, 8):  # every number of masks equally often, every place as well
        assert chance[masks.sum(1) == level].sum().item() == pytest.approx(1 / 7, rel=1e-3)
    assert torch.allclose((weights[:, None] * masks).sum(0), torch.ones(7, dtype=torch.float64), rtol=0.05)
    for length, mc_num in ((1, 1), (1, 128), (300, 1), (300, 128)):
        masks, weights = harness.sample_masks(length, mc_num, torch.Generator().manual_seed(0))
        assert masks.any(1).all() and (weights * masks.sum(1)).sum().item() == pytest.approx(length)


def test_greedy_continuations(harness, checkpoints):
    lm = harness.DiffusionLM(checkpoints["llada"], check_greedy=True, mc_num=2, policy="PrefixCache")
    text = decode(
        dkv.generate(lm.model, torch.tensor([encode("why")]), gen_length=4, policy=dkv.NoCache()).sequences[0]
    )
    other = text[3:6] + ("a" if text[6] != "a" else "b")
    assert [greedy for _, greedy in log_likelihoods(lm, [("why", text[3:]), ("why", other)])] == [True, False]


def test_chat_template(evaluate, harness, checkpoints):
    lm = harness.DiffusionLM(checkpoints["dream"], gen_length=4)
    results = evaluate(["tiny_generation"], model=lm, apply_chat_template=True)
    (sample,) = [sample for sample in results["samples"]["tiny_generation"] if sample["doc_id"] == 4]
    prompt = sample["arguments"][0][0]
    assert prompt == f"<begin>[user]{QUESTIONS[4]}[it]"
    ids = lm.tok_encode(prompt)
    assert ids == [BOS_ID, *encode(f"[user]{QUESTIONS[4]}[it]")]
    assert lm.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=False) == "<begin>[user]hi"
    assert "/" not in lm.tokenizer_name
    begun = harness.DiffusionLM(lm.model, tokenizer=lm.tokenizer, add_bos_token=True)
    assert begun.tok_encode(prompt) == ids and begun.tok_encode("a") == [BOS_ID, ord("a")]
    assert lm.tok_encode("a") == begun.tok_encode("a", add_special_tokens=False) == [ord("a")]
    # of a tokenizer that adds the BOS itself
    begin = processors.TemplateProcessing("<begin> $A", special_tokens=[("<begin>", BOS_ID)])
    lm.tokenizer.backend_tokenizer.post_processor = begin
    assert lm.tok_encode(prompt) == begun.tok_encode(prompt) == ids
    assert lm.tok_encode("a") == begun.tok_encode("a") == [BOS_ID, ord("a")]


def test_long_prompts_keep_their_ends(harness, checkpoints):
    lm = harness.DiffusionLM(checkpoints["llada"], gen_length=4, max_length=10)
    long = string.ascii_letters
    assert texts(lm, [long]) == texts(lm, [long[-6:]])
    assert log_likelihoods(lm, [(long, "abc")]) == log_likelihoods(lm, [(long[-7:], "abc")])
    with pytest.raises(ValueError, match="10 tokens and a prompt must fit max_length=10"):
        log_likelihoods(lm, [("a", long[:10])])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"policy": "decoded"}, ValueError, "policy must be one of .*'NoCache', 'Decode', .* got 'decoded'"),
        ({"policy": None}, ValueError, "policy must be one of .* got None"),
        (
            {"policy": "Prefill", "refresh_interval": 4},
            ValueError,
            r"refresh_interval .* but Prefill has none; .* use policy=Decode or policy=Greedy or policy=PrefillDecode\.",
        ),
        (
            {"policy": "Decode", "window": 4},
            ValueError,
            "window .* Decode has refresh_interval, delay, .*policy=Greedy",
        ),
        ({"policy": dkv.Decode(2), "delay": 0}, ValueError, r"delay .* but Decode\(refresh_interval=2, .* has none"),
        ({"refresh_interval": 0}, ValueError, "refresh_interval must be at least 1"),
        ({"shift": "un"}, ValueError, "shift .* must be None for LLaDA"),
        ({"genlength": 4}, ValueError, "'genlength' must be an argument of the model, of dkv.generate .*cfg_scale"),
        ({"batch_size": "auto"}, ValueError, "batch_size must be a number.* got 'auto'; pass 8"),
        ({"dtype": "bf16"}, ValueError, "dtype must be .*bfloat16"),
        ({"use_cache": True}, ValueError, "use_cache is no argument of this model; pass policy='NoCache' for False"),
        ({"show_speed": True}, ValueError, "the speed is always logged"),
        ({"diffusion_steps": 8}, ValueError, "pass steps"),
        ({"cfg": 1, "cfg_scale": 1}, TypeError, "cfg is another name of cfg_scale, got both; pass one of them"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"gen_length": "many"}, TypeError, "gen_length must be an int"),
        ({"mc_num": 0}, ValueError, "mc_num must be at least 1"),
        ({"pretrained": "nowhere"}, ValueError, "neither a folder nor a repository"),
    ],
)
def test_bad_arguments_are_refused(harness, checkpoints, arguments, error, message):
    with pytest.raises(error, match=message):
        harness.DiffusionLM(**({"pretrained": checkpoints["llada"]} | arguments))


def test_names_of_other_scripts(harness, checkpoints, caplog):
    arguments = "cfg=0.5,alg=entropy,max_new_tokens=9,is_check_greedy=True,policy=DUALcache,block_length=4"
    lm = harness.DiffusionLM.create_from_arg_string(f"model_path={checkpoints['llada']},{arguments}")
    assert (lm.config.cfg_scale, lm.config.remasking, lm.gen_length, lm.check_greedy) == (0.5, "entropy", 9, True)
    assert lm.policy == dkv.DualCache()
    log_likelihoods(lm, [("why", "x")])
    assert "likelihoods have no guidance" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_harnesss_default_device_may_be_missing(harness, checkpoints, caplog):
    lm = harness.DiffusionLM(checkpoints["llada"], device="cuda:0")
    assert lm.device == torch.device("cpu") and "no CUDA device" in caplog.text


def test_several_processes_need_accelerate_and_a_name(harness, checkpoints, monkeypatch, caplog):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ModuleNotFoundError, match="run: pip install accelerate"):
        harness.DiffusionLM(checkpoints["llada"])
    model = dkv.from_pretrained(checkpoints["llada"], device="cpu")
    lm = harness.DiffusionLM(model, tokenizer=checkpoints["llada"])
    assert lm.world_size == 1 and "this process evaluates all documents" in caplog.text


def test_what_the_model_cannot_do_is_refused(harness, checkpoints):
    model = dkv.from_pretrained(checkpoints["llada"], device="cpu")
    lm = harness.DiffusionLM(model, tokenizer=checkpoints["llada"])
    with pytest.raises(NotImplementedError, match="leave out perplexity tasks"):
        lm.loglikelihood_rolling([])
    with pytest.raises(ValueError, match="tokenizer must be given if pretrained is a model"):
        harness.DiffusionLM(model)
    dkv.replace_attention(model)
    with pytest.raises(ValueError, match="without a cache; call dkv.restore_attention"):
        harness.DiffusionLM(model, tokenizer=checkpoints["llada"])
