"""Native models as transformers models: every way to load an official folder, and what wraps, trains and saves them."""

import copy
import json
import shutil
from types import SimpleNamespace

import official
import oracle
import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import MASK_ID, prompts, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import dkv
from dkv.models import Dream, LLaDA, native

FAMILIES = {"llada": LLaDA, "dream": Dream}
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
DTYPE = "dtype" if VERSION >= (4, 56) else "torch_dtype"  # transformers' keyword


@pytest.fixture(autouse=True, scope="module")
def registered():
    dkv.register()
    known = dict(AutoModel._model_mapping._extra_content)
    dkv.register()
    assert AutoModel._model_mapping._extra_content == known


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """Not to be written to."""
    folder = tmp_path_factory.mktemp("official")
    official.FOLDERS[family](folder)
    return folder


WAYS = {
    "from_pretrained": lambda folder: dkv.from_pretrained(folder, device="cpu"),
    "AutoModel": AutoModel.from_pretrained,
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "with remote code": lambda folder: AutoModel.from_pretrained(folder, trust_remote_code=True),
    "on a device": lambda folder: AutoModel.from_pretrained(folder, device_map="cpu"),
    "by its class": lambda folder: FAMILIES[AutoConfig.from_pretrained(folder).model_type.lower()].from_pretrained(
        folder
    ),
}


def tokenized(folder, *texts):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=True)
    chats = [[{"role": "user", "content": text}] for text in texts]
    options = {"add_generation_prompt": True, "padding": True, "return_dict": True, "return_tensors": "pt"}
    return tokenizer.apply_chat_template(chats, **options)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_load_gives_the_same_model(way, family, folder):
    if way == "on a device":
        pytest.importorskip("accelerate")
    if way == "with remote code" and VERSION < (5, 17):
        pytest.skip("older releases run the code of the folder then")
    model, want = WAYS[way](folder), tiny_model(family)
    assert type(model) is FAMILIES[family] and not model.training and model.dtype == torch.float32
    assert all(map(torch.equal, model.parameters(), want.parameters()))


@pytest.mark.parametrize("way", ["from_pretrained", "AutoModel"])
def test_an_official_folder_generates_and_saves(way, family, folder, tmp_path):
    model, batch = WAYS[way](folder), tokenized(folder, "one", "and another one")
    got, want = model.generate(**batch, max_new_tokens=8), dkv.generate(tiny_model(family), batch, gen_length=8)
    assert torch.equal(got.sequences, want.sequences) and got.stats == want.stats
    dkv.replace_attention(model)
    with torch.no_grad():
        inputs = batch["input_ids"], batch["attention_mask"]
        cached, own = model(*inputs).logits, dkv.restore_attention(model)(*inputs).logits
    valid = batch["attention_mask"].bool()  # padding is not computed
    torch.testing.assert_close(cached[valid], own[valid], rtol=1e-4, atol=1e-4)

    for name, value in {"max_new_tokens": 4, "block_length": 2, "policy": "DualCache"}.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}
    config, before = (json.loads((path / "config.json").read_text()) for path in (tmp_path, folder))
    assert all(config[name] == before[name] for name in ("architectures", "auto_map", "model_type", "mask_token_id"))
    again, batch = WAYS[way](tmp_path), tokenized(tmp_path, "one")
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    got = again.generate(**batch).sequences
    assert torch.equal(got, dkv.generate(model, batch, gen_length=4, block_length=2, policy="DualCache").sequences)
    assert again.generate(**batch, max_new_tokens=6).sequences.shape[1] == got.shape[1] + 2


def test_the_dtype_is_as_asked():
    folder = oracle.weights_path("llada_mha_s0")
    assert AutoModel.from_pretrained(folder, **{DTYPE: torch.bfloat16}).dtype == torch.bfloat16
    assert AutoModel.from_pretrained(folder, **{DTYPE: "auto"}).dtype == torch.float32
    for name in ("dtype", "torch_dtype"):
        assert dkv.from_pretrained(folder, **{name: "bfloat16"}).dtype == torch.bfloat16
        assert dkv.from_pretrained(folder, **{name: "auto"}).dtype == torch.float32
    with pytest.raises(TypeError, match="dtype and torch_dtype are the same"):
        dkv.from_pretrained(folder, dtype="bfloat16", torch_dtype="bfloat16")


def test_a_keyword_that_only_transformers_has_names_the_way():
    with pytest.raises(TypeError, match=r"no device_map, trust_remote_code: .*dkv.register\(\) and then transformers"):
        dkv.from_pretrained("nowhere", device_map="cpu", trust_remote_code=True)


def test_a_model_of_the_same_type_and_another_structure_is_refused(tmp_path):
    moe = {"model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "hidden_size": 64, "num_experts": 4}
    (tmp_path / "config.json").write_text(json.dumps(moe))
    with pytest.raises(ValueError, match="DreamConfig needs model_type 'Dream', got 'llada'; use AutoModel"):
        Dream.from_pretrained(tmp_path)
    for auto in (AutoConfig, AutoModel):
        with pytest.raises(
            ValueError, match=r"LLaDAMoEModelLM.* another structure. dkv.register\(\) .* a process that does not"
        ):
            auto.from_pretrained(tmp_path)


def test_the_config_has_the_usual_names(family, folder):
    config = AutoConfig.from_pretrained(folder)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [getattr(config, name) for name in sizes] == [64, 128, 3, 4, 4 if family == "llada" else 2]
    assert config.max_position_embeddings == 512 and config.tie_word_embeddings is False and config.vocab_size == 256
    assert config.get("hidden_size") == 64 and config.get("nothing") is None and config.get("nothing", 5) == 5
    assert "mask_token_id" in config and "nothing" not in config
    assert config.to_dict()["d_model" if family == "llada" else "hidden_size"] == 64
    assert AutoConfig.from_pretrained(folder, use_cache=False).use_cache is False
    assert type(copy.deepcopy(config)) is type(config) and config.__class__(**config.to_dict()).get("hidden_size") == 64


def test_the_usual_methods(family):
    model = tiny_model(family)
    assert model.num_parameters() == sum(p.numel() for p in model.parameters()) and model.can_generate()
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (256, 64)
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    assert len(layers) == 3 and sum(p.numel() for layer in layers for p in layer.parameters()) > 10_000


@torch.no_grad()
def test_outputs_are_as_asked(family):
    model, (ids, valid) = tiny_model(family), prompts(9, 5)
    output = model(ids, valid.long(), output_hidden_states=True)
    assert torch.equal(output["logits"], output.logits) and torch.equal(output.logits, model(ids, valid.long())[0])
    assert len(output.hidden_states) == 4 and torch.equal(output.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.get_output_embeddings()(output.hidden_states[-1]), output.logits)
    for asked in ({"return_dict": False}, {}):
        model.config.return_dict = bool(asked)
        row = model(ids, valid.long(), **asked)
        assert isinstance(row, tuple) and torch.equal(row[0], output.logits)
    # the padding is hidden: a row's logits are those of the row by itself, at its own positions
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    model.config.return_dict = True
    alone = model(ids[1:, 4:]).logits
    torch.testing.assert_close(model(ids, valid.long(), positions).logits[1:, 4:], alone, rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_cross_entropy_of_the_labels(family):
    model, (ids, _) = tiny_model(family), prompts(9, 9)
    labels = torch.where(torch.arange(9) % 3 == 0, ids, -100)
    output = model(ids, labels=labels)
    logits = output.logits
    if family == "dream":  # column j - 1 predicts column j
        logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)
    want = F.cross_entropy(logits[labels >= 0], labels[labels >= 0])
    torch.testing.assert_close(output.loss, want)
    assert torch.equal(model(ids, labels=labels, return_dict=False)[0], output.loss)


def test_gradient_checkpointing_gives_the_same_gradients(family, monkeypatch):
    model, (ids, _) = tiny_model(family).train(), prompts(9, 9)
    calls, forward = [], native.DecoderLayer.forward
    monkeypatch.setattr(native.DecoderLayer, "forward", lambda *args: calls.append(1) or forward(*args))
    gradients = []
    for checkpointing in (True, False):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        assert model.is_gradient_checkpointing == checkpointing
        calls.clear()
        model(ids, labels=ids).loss.backward()
        assert len(calls) == (6 if checkpointing else 3)
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [300, 320])
def test_resized_embeddings_save_and_load(rows, tied, family, tmp_path):
    model = tiny_model(family, **{"weight_tying" if family == "llada" else "tie_word_embeddings": tied})
    before = model.get_output_embeddings().weight.detach().clone()
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(tmp_path)
    for again in (dkv.from_pretrained(tmp_path, device="cpu"), AutoModel.from_pretrained(tmp_path)):
        weights = again.get_input_embeddings().weight, again.get_output_embeddings().weight
        assert (weights[0] is weights[1]) == tied and weights[0].shape == weights[1].shape == (rows, 64)
        assert torch.equal(weights[1][:256], before)
        assert again.config.vocab_size == rows
        assert again.generate(prompts(5)[0], max_new_tokens=4).sequences.shape == (1, 9)


def test_a_random_model_has_initial_weights(family, folder):
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1)
        else:
            assert bool((parameter == (0 if name.endswith("bias") else 1)).all())


def test_generate_takes_the_names_of_transformers(family):
    model, (ids, valid) = tiny_model(family), prompts(9, 5)
    want = dkv.generate(model, ids, valid, gen_length=8, steps=4, policy="NoCache").sequences
    for options in ({"max_new_tokens": 8, "max_denoising_steps": 4}, {"gen_length": 8, "steps": 4}):
        assert torch.equal(model.generate(ids, valid, **options, policy="NoCache").sequences, want)
        batch = transformers.BatchEncoding({"input_ids": ids, "attention_mask": valid, "token_type_ids": 0 * ids})
        assert torch.equal(model.generate(batch, **options, policy="NoCache").sequences, want)
        assert torch.equal(
            model.generate(inputs=ids, attention_mask=valid, **options, policy="NoCache").sequences, want
        )
        assert torch.equal(model.generate(**batch, **options, policy="NoCache").sequences, want)
    config = transformers.GenerationConfig(max_new_tokens=8, steps=4, policy="NoCache", eos_token_id=7, top_k=None)
    assert torch.equal(model.generate(ids, valid, generation_config=config).sequences, want)
    assert torch.equal(model.generate(ids, valid, steps=4, policy="NoCache", max_new_tokens=8).sequences, want)
    got = model.generate(ids, valid, alg="maskgit_plus", max_new_tokens=8, policy="NoCache").sequences
    assert torch.equal(
        got, dkv.generate(model, ids, valid, remasking="maskgit_plus", gen_length=8, policy="NoCache").sequences
    )
    with pytest.raises(TypeError, match="max_new_tokens is another name of gen_length, got both"):
        model.generate(ids, valid, max_new_tokens=8, gen_length=8)
    with pytest.raises(TypeError, match="'seed'.*generator="):
        model.generate(ids, valid, seed=1)
    with pytest.raises(TypeError, match="must be a transformers.GenerationConfig, got dict"):
        model.generate(ids, valid, generation_config={"steps": 4})
    config.policy = dkv.NoCache()
    with pytest.raises(TypeError, match=r"generation_config.policy must be a name, .* got NoCache\(\); pass policy="):
        model.generate(ids, valid, generation_config=config)


def test_peft_wraps_trains_merges_and_saves(family, tmp_path):
    peft = pytest.importorskip("peft", exc_type=ImportError)
    model, (ids, valid) = tiny_model(family), prompts(9, 5)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    wrapped.enable_input_require_grads()
    wrapped(input_ids=ids, attention_mask=valid.long(), labels=ids).loss.backward()
    wrapped.disable_input_require_grads()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    wrapped.eval()
    got = wrapped.generate(input_ids=ids, attention_mask=valid, max_new_tokens=8)
    assert torch.equal(got.sequences, dkv.generate(wrapped.get_base_model(), ids, valid, gen_length=8).sequences)
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = copy.deepcopy(wrapped).merge_and_unload()
    assert type(merged) is FAMILIES[family]
    merged.save_pretrained(tmp_path / "merged")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
    with torch.no_grad():
        want = wrapped(ids).logits
        assert not torch.allclose(want, model(ids).logits, atol=1e-2)
        for other in (merged, loaded, dkv.from_pretrained(tmp_path / "merged", device="cpu")):
            torch.testing.assert_close(other(ids).logits, want, rtol=1e-4, atol=1e-4)


def test_the_trainer_keeps_its_columns_and_saves(family, folder, tmp_path):
    pytest.importorskip("accelerate")
    model, (ids, valid) = dkv.from_pretrained(folder, device="cpu"), prompts(9, 9, 9, 9)
    noisy = torch.where(torch.arange(9) % 2 == 0, MASK_ID, ids)
    columns = {"input_ids": noisy, "attention_mask": valid.long(), "labels": torch.where(noisy == ids, -100, ids)}
    rows = [{name: column[i].tolist() for name, column in columns.items()} | {"text": "left out"} for i in range(4)]
    options = {"use_cpu": True, "report_to": [], "max_steps": 2, "save_strategy": "no", "disable_tqdm": True}
    arguments = transformers.TrainingArguments(str(tmp_path / "run"), gradient_checkpointing=True, **options)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    before = model.get_output_embeddings().weight.detach().clone()
    seen = trainer._signature_columns or trainer._set_signature_columns_if_needed() or trainer._signature_columns
    assert {"input_ids", "attention_mask", "position_ids", "labels"} <= set(seen) and "text" not in seen
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert not torch.equal(model.get_output_embeddings().weight, before)
    again = dkv.from_pretrained(tmp_path / "saved", device="cpu")
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def test_the_working_folder_is_not_a_source(family, folder, tmp_path, monkeypatch):
    """Neither for a model that comes from no folder, nor for one whose folder was named from elsewhere."""
    (tmp_path / "secret.py").touch()
    monkeypatch.chdir(tmp_path)
    tiny_model(family).save_pretrained("one")
    assert not list((tmp_path / "one").glob("*.py"))
    shutil.copytree(folder, "there")
    monkeypatch.chdir("there")
    models = dkv.from_pretrained(".", device="cpu"), AutoModel.from_pretrained(".")
    monkeypatch.chdir(tmp_path)
    for name, model in zip(("two", "three"), models, strict=True):
        model.save_pretrained(name)
        assert {path.name for path in (tmp_path / name).iterdir()} == {path.name for path in folder.iterdir()}


def test_saving_leaves_what_it_does_not_replace(family, folder, tmp_path):
    """Another variant of the weights, and another tokenizer, which must not get files of ours."""
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "model.fp16.safetensors").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer_config.json").write_text("{}")
    (other / "train.py").touch()
    model.save_pretrained(other)
    assert [path.name for path in other.glob("tokenizer*")] == ["tokenizer_config.json"]
    assert {path.name for path in folder.glob("*.py")} <= {path.name for path in other.iterdir()}


def test_all_files_are_pushed(family, folder, tmp_path, monkeypatch):
    pushed = []

    class Hub:
        def __init__(self, token):
            assert token == "secret"

        def create_repo(self, name, private, exist_ok):
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, repo_id, folder_path, allow_patterns, **commit):
            pushed.append((repo_id, {*allow_patterns}, {path.name for path in folder_path.iterdir()}, commit))

    monkeypatch.setattr(native, "HfApi", Hub)
    model = AutoModel.from_pretrained(folder)
    (tmp_path / "notes.txt").touch()
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="name", token="secret", commit_message="first")
    files = {path.name for path in folder.iterdir()}
    assert pushed == [("me/name", files, files | {"notes.txt"}, {"commit_message": "first"})]


def test_a_generation_config_samples_with_do_sample_only(family):
    model, (ids, valid) = tiny_model(family), prompts(9, 5)

    def generated(**options):
        return model.generate(
            ids, valid, max_new_tokens=8, generator=torch.Generator().manual_seed(0), **options
        ).sequences

    greedy, sampled = generated(), generated(temperature=1.0)
    assert not torch.equal(greedy, sampled)
    for options, want in (
        ({"temperature": 1.0}, greedy),
        ({"temperature": 0.7, "top_p": 0.5}, greedy),
        ({"do_sample": True}, sampled),
        ({"do_sample": True, "top_k": 50}, sampled),
        ({"do_sample": True, "temperature": 1.0}, sampled),
        ({"do_sample": True, "temperature": 0.7}, generated(temperature=0.7)),
    ):
        assert torch.equal(generated(generation_config=transformers.GenerationConfig(**options)), want)
    assert torch.equal(generated(do_sample=True), sampled) and torch.equal(generated(do_sample=False), greedy)
    with pytest.raises(ValueError, match="temperature must be 0 with do_sample=False, got 0.7; leave out one"):
        generated(do_sample=False, temperature=0.7)


def test_a_saved_adapter_loads(family, folder, tmp_path):
    peft = pytest.importorskip("peft", exc_type=ImportError)
    model, ids = AutoModel.from_pretrained(folder), prompts(9)[0]
    try:
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    except (ImportError, ValueError) as error:
        if "PEFT" not in str(error):  # transformers' words for a release of PEFT that does not fit
            raise
        pytest.skip(str(error))
    # transformers looks for the model in the folder that it was loaded from
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


class Wrapped(torch.nn.Module):
    """An adapter of the user's, which does not say its sizes."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return 2 * self.linear(x)


def test_a_wrapper_need_not_say_its_sizes(family):
    model, (ids, valid) = tiny_model(family), prompts(9, 5)
    for module in [module for module in model.modules() if hasattr(module, "q_proj")]:
        module.q_proj = Wrapped(module.q_proj)
    got = model.generate(ids, valid, max_new_tokens=8, policy="NoCache").sequences
    for module in [module for module in model.modules() if hasattr(module, "q_proj")]:
        module.q_proj = module.q_proj.linear
        for parameter in module.q_proj.parameters():
            parameter.data *= 2
    assert torch.equal(got, model.generate(ids, valid, max_new_tokens=8, policy="NoCache").sequences)
