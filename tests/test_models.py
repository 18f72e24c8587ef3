"""`dkv.models`: finding models by structure, loading and saving native ones, and the logits of the official code."""

import contextlib
import copy
import functools
import json
import pickle
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace

import hub
import oracle
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, EOS_ID, MASK_ID, Lookalike, tiny_model
from torch import nn

import dkv
import dkv.models.loader
from dkv.models import from_config, from_pretrained, view_of

WEIGHTS = {"llada": oracle.weights_path("llada_mha_s0"), "dream": oracle.weights_path("dream_gqa_s0")}
FAMILIES = list(WEIGHTS)


@functools.cache
def native(family, device="cpu"):
    return from_pretrained(WEIGHTS[family], dtype=torch.float32, device=device)


def random_ids(batch=2, seqlen=19, seed=0):
    return torch.randint(0, 250, (batch, seqlen), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, *args, **kwargs):
    return model(*args, **kwargs).logits


def loaded_both_ways(folder):
    """By dkv's own loader, and by transformers'."""
    dkv.register()
    yield from_pretrained(folder, device="cpu")
    yield transformers.AutoModel.from_pretrained(folder)


def fields_of(model):
    """The fields of the config that say what the model is."""
    unlike = ("dtype", "torch_dtype", "_name_or_path", "transformers_version", "_attn_implementation_autoset")
    return {name: value for name, value in model.config.to_dict().items() if name not in unlike}


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def recorded_names(family):
    return sorted({name.rpartition(".")[0] for name in oracle.tensors(family) if ".logits" in name})


@pytest.mark.parametrize("family, name", [(family, name) for family in FAMILIES for name in recorded_names(family)])
def test_logits_are_those_recorded_from_the_authors_code(family, name, device):
    """At every step that computed all positions."""
    tensors, prompt = oracle.tensors(family), oracle.recorded(family, name, "prompt")
    after = oracle.recorded(family, name, "x")
    before = torch.cat((F.pad(prompt, (0, after.shape[2] - prompt.shape[1]), value=MASK_ID)[None], after))
    checked = 0
    for step in range(len(after)):
        want = tensors[f"{name}.logits{step}"]
        if want.shape[1] == after.shape[2]:
            assert_close(logits(native(family, device), before[step].to(device)).cpu(), want)
            checked += 1
    assert checked >= 1


def llada_mask(seqlen, *leftpads):
    return (torch.arange(seqlen) >= torch.tensor(leftpads)[:, None]).long()


def dream_mask(valid):
    """Mask and positions as Dream's own loop passes them: key and query are valid; positions start at the first valid one."""
    valid = valid.bool()
    positions = (valid.long().cumsum(1) - 1).masked_fill(~valid, 1)
    return (valid[:, None, :] & valid[:, :, None])[:, None], positions


HUB_CASES = {
    "llada": {
        "recorded": None,
        "grouped": {"n_kv_heads": 2},
        "multi-query": {"n_kv_heads": None, "multi_query_attention": True},
        "biased": {"include_qkv_bias": True},
        "mlp ratio": {"mlp_hidden_size": None, "mlp_ratio": 2},
        "padded vocabulary": {"vocab_size": 250},
        "theta": {"rope_theta": 10000.0, "rms_norm_eps": 1e-3},
    },
    "dream": {
        "recorded": None,
        "ungrouped": {"num_key_value_heads": 4},
        "theta": {"rope_theta": 10000.0, "rms_norm_eps": 1e-3},
        "tied": {"tie_word_embeddings": True},
    },
}


def hub_pair(kind, case, folder):
    """The official model and ours on the same weights."""
    family = kind.split("_")[0]
    changes = HUB_CASES[family][case]
    if changes is None:
        folder = WEIGHTS[family]
    else:
        tiny_model(family, **changes).save_pretrained(folder)
    return hub.load(kind, folder), from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind, case", [(kind, case) for kind in hub.KINDS for case in HUB_CASES[kind.split("_")[0]]])
def test_logits_are_those_of_the_official_code(kind, case, tmp_path):
    official, ours = hub_pair(kind, case, tmp_path)
    ids = random_ids(3, 23)
    assert_close(logits(ours, ids), logits(official, ids))
    assert_close(logits(ours, ids, attention_mask=None), logits(official, ids, attention_mask=None))
    embedded = torch.randn(3, 23, 64, generator=torch.Generator().manual_seed(1))
    got = logits(ours, inputs_embeds=embedded)
    want = logits(official, **({"input_ids": None} if kind != "dream" else {}), inputs_embeds=embedded)
    assert_close(got, want)


@pytest.mark.parametrize("kind", ["llada_v1", "llada_v2"])
def test_padding_means_what_it_means_to_llada(kind, tmp_path):
    official, ours = hub_pair(kind, "grouped", tmp_path)
    ids = random_ids(4, 17)
    left, ones = llada_mask(17, 0, 3, 9, 16), torch.ones(4, 17, dtype=torch.long)
    holes = (torch.arange(17) % 5 != 2).expand(4, 17)
    nothing = left * torch.tensor([1, 1, 0, 1])[:, None]
    for mask in (left, left.flip(1), left.bool(), left.float(), holes, nothing, ones):
        got, want = logits(ours, ids, attention_mask=mask), logits(official, ids, attention_mask=mask)
        if kind == "llada_v2":
            assert_close(got, want)
        else:  # the first revision builds a mask and does not use it
            assert torch.equal(want, logits(official, ids))
    assert torch.equal(logits(ours, ids, attention_mask=ones), logits(ours, ids))


def test_padding_means_what_it_means_to_dream():
    official, ours = hub_pair("dream", "recorded", None)
    ids = random_ids(3, 17)
    mask, positions = dream_mask(llada_mask(17, 0, 3, 9))
    for args in ((mask, positions), (mask, None), ("full", None), ("full", positions), (None, positions + 40)):
        assert_close(logits(ours, ids, *args), logits(official, ids, *args))
    assert not logits(ours, ids, mask, positions).isnan().any()


def test_low_precision_stays_near_the_official_code(tmp_path):
    """RMSNorm and RoPE round where the official code does, so in bfloat16 it is nearer to that than to float32."""
    for kind in hub.KINDS:
        official, ours = hub_pair(kind, "recorded", tmp_path)
        ids = random_ids(2, 29)
        exact = logits(ours, ids)
        want, got = logits(official.bfloat16(), ids).float(), logits(copy.deepcopy(ours).bfloat16(), ids).float()
        assert (got - want).abs().mean() <= (want - exact).abs().mean()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"rope_theta": 10000.0}])
def test_logits_of_an_independent_eager_forward(family, changes, device):
    ours = tiny_model(family, device=device, **changes)
    theirs, ids = Lookalike(ours), random_ids(3, 21).to(device)
    assert_close(logits(ours, ids), logits(theirs, ids))
    valid = llada_mask(21, 0, 5, 11).to(device)
    if family == "llada":
        assert_close(logits(ours, ids, attention_mask=valid), logits(theirs, ids, attention_mask=valid))
    else:
        mask, positions = dream_mask(valid)
        got, want = logits(ours, ids, mask, positions), logits(theirs, ids, mask, positions)
        assert_close(got[valid.bool()], want[valid.bool()])


def test_a_query_without_keys_gets_zeros():
    model, ids = native("dream"), random_ids(2, 8)
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    mask[1, :, 3] = False
    got = {}
    first = model.model.layers[0].self_attn.o_proj
    handle = first.register_forward_pre_hook(lambda module, args: got.update(attended=args[0]))
    logits(model, ids, mask)
    handle.remove()
    zero = (got["attended"] == 0).all(-1)
    assert zero[1, 3] and zero.sum() == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_differentiable(family):
    model = tiny_model(family, n_layers=1) if family == "llada" else tiny_model(family, num_hidden_layers=1)
    F.cross_entropy(model(random_ids()).logits.flatten(0, 1), random_ids(seed=1).flatten()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_model_that_ran_in_inference_mode_can_be_trained():
    model = tiny_model("llada")
    with torch.inference_mode():
        model(random_ids())
    model(random_ids()).logits.sum().backward()


def count_finds(monkeypatch, model):
    """A list that grows each time the model's modules are found."""
    found, find = [], model.family.find
    monkeypatch.setattr(model.family, "find", lambda model: found.append(model) or find(model))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_finds_its_modules_once(family, monkeypatch):
    model = tiny_model(family)
    found, optimizer = count_finds(monkeypatch, model), torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        model(random_ids()).logits.sum().backward()
        optimizer.step()
    assert len(found) == 1


class Adapted(nn.Module):
    """A linear layer with an adapter beside it."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.linear, self.adapter = linear, copy.deepcopy(linear)

    def forward(self, x):
        return self.linear(x) + self.adapter(x)


def adapt(model):
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)


def resize(model):
    model.model.embed_tokens, model.lm_head = nn.Embedding(300, 64), nn.Linear(64, 300, bias=False)


def untie(model):
    model.lm_head = nn.Linear(64, 256, bias=False)


def untie_weight(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)


def tie(model):
    model.lm_head.weight = model.model.embed_tokens.weight


CHANGES = {
    "a replaced layer": lambda model: setattr(model.model.layers[1].mlp, "gate_proj", nn.Linear(64, 128, bias=False)),
    "an adapter": adapt,
    "resized embeddings": resize,
    "a tied weight": tie,
    "rope_theta": lambda model: setattr(model.config, "rope_theta", 1e4),
    "a parameter of the RoPE": lambda model: model.config.rope_parameters.update(rope_theta=1e4),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_counts_from_the_next_forward_on(change):
    config = CONFIGS["dream"](rope_theta=None, rope_parameters={"rope_theta": 1e6})
    model, ids = tiny_model("dream", **config), random_ids()
    before = logits(model, ids)
    change(model)
    after = logits(model, ids)
    assert after.shape != before.shape or not torch.allclose(after, before, atol=0.01)
    assert_close(after, logits(Lookalike(model), ids))


@pytest.mark.parametrize("change", [untie, untie_weight])
def test_a_head_that_is_tied_no_longer_is_used(change):
    model, ids = tiny_model("dream", tie_word_embeddings=change is untie), random_ids()
    if change is untie_weight:
        tie(model)
    before = logits(model, ids)
    change(model)
    after = logits(model, ids)
    assert not torch.allclose(after, before, atol=0.01)
    assert_close(after, logits(Lookalike(model), ids))


def test_a_config_that_is_no_longer_supported_is_refused():
    model, ids = tiny_model("llada"), random_ids()
    logits(model, ids)
    model.config.alibi = True
    with pytest.raises(ValueError, match="alibi"):
        model(ids)


def test_a_config_may_hold_anything():
    model, ids = tiny_model("llada"), random_ids()
    model.config.extra = {"values": torch.arange(3.0), "lock": threading.Lock()}
    assert torch.equal(logits(model, ids), logits(model, ids))


def test_reset_frees_replaced_modules():
    model = tiny_model("dream")
    logits(model, random_ids())
    replaced = weakref.ref(model.model.layers[0].mlp.gate_proj)
    model.model.layers[0].mlp.gate_proj = nn.Linear(64, 128, bias=False)
    dkv.reset(model)
    assert replaced() is None


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_runs_its_own_modules(copied):
    model, ids = tiny_model("llada"), random_ids()
    size, before = len(pickle.dumps(model)), logits(model, ids)
    assert len(pickle.dumps(model)) == size, "a forward pass leaves nothing that is pickled"
    other = copied(model)
    with torch.no_grad():
        other.model.transformer.ff_out.weight *= 2
    assert_close(logits(other, ids), 2 * before)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_refuses_what_it_does_not_do(family):
    model, ids = native(family), random_ids()
    for arguments in ({"use_cache": True}, {"past_key_values": [1]}):
        with pytest.raises(ValueError, match="has no cache"):
            model(ids, **arguments)
    model(ids, use_cache=False, past_key_values=None)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(ids, inputs_embeds=torch.zeros(2, 19, 64))
    with pytest.raises(ValueError, match="attention_mask must"):
        model(ids, attention_mask=torch.ones(2, 18, dtype=torch.bool))
    if family == "dream":
        with pytest.raises(ValueError, match="attention_mask must"):  # as the official code, which fails on it
            model(ids, attention_mask=torch.ones(2, 19))
        with pytest.raises(ValueError, match="attention_mask must"):
            model(ids, attention_mask="causal")
        with pytest.raises(ValueError, match="position_ids must"):
            model(ids, position_ids=torch.zeros(2, 3, dtype=torch.long))


def check_parts(view, family, model):
    """Every role is the module at the official path."""
    paths = {
        "llada": "attn_norm q_proj k_proj v_proj attn_out ff_norm ff_proj up_proj ff_out",
        "dream": "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
        "post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj",
    }[family].split()
    roles = ("attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down")
    if family == "llada":
        layers, rest = model.model.transformer.blocks, model.model.transformer
        ends = (rest.wte, rest.ln_f, rest.ff_out)
    else:
        layers = model.model.layers
        ends = (model.model.embed_tokens, model.model.norm, model.lm_head)
    assert (view.embed, view.final_norm, view.head) == ends
    assert len(view.layers) == len(layers) == 3
    for layer, module in zip(view.layers, layers, strict=True):
        assert all(getattr(layer, role) is module.get_submodule(path) for role, path in zip(roles, paths, strict=True))
    assert view.family.name.lower() == family and view.family.shifted == (family == "dream")
    assert (view.nheads, view.nheads_k, view.headdim) == (4, 2 if family == "dream" else 4, 16)
    assert view.rope_theta == (1e6 if family == "dream" else 5e5)
    assert (view.vocab_size, view.max_positions) == (256, 512)
    assert (view.mask_id, view.eos_token_id, view.pad_token_id) == (MASK_ID, EOS_ID, EOS_ID)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_native_models_and_lookalikes(family):
    model = native(family)
    check_parts(view_of(model), family, model)
    assert type(view_of(model).make_output(torch.zeros(1))) is type(model(random_ids()))
    theirs = Lookalike(model)
    check_parts(view_of(theirs), family, theirs)
    assert view_of(theirs).honours_attention_mask and view_of(model).honours_attention_mask
    copied = copy.deepcopy(model)
    check_parts(view_of(copied), family, copied)
    assert view_of(copied).embed is not view_of(model).embed
    assert view_of(model).rope_tables(8, "cpu")[0] is view_of(model).rope_tables(4, "cpu")[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_output_of_remote_code_is_transformers_own(family):
    transformers = pytest.importorskip("transformers")
    output = view_of(Lookalike(native(family))).make_output(torch.zeros(1, 2, 3))
    name = "MaskedLMOutput" if family == "dream" else "CausalLMOutputWithPast"
    assert isinstance(output, getattr(transformers.modeling_outputs, name)) and output.logits.shape == (1, 2, 3)


@pytest.mark.parametrize("kind", hub.KINDS)
def test_parts_of_the_official_models(kind):
    family = kind.split("_")[0]
    model = hub.load(kind, WEIGHTS[family])
    view = view_of(model)
    check_parts(view, family, model)
    assert view.honours_attention_mask == (kind != "llada_v1")
    assert type(view.make_output(torch.zeros(1))) is type(model(random_ids()))

    class Finetune(hub.model_class(kind)):
        pass

    assert view_of(Finetune(model.config)).family.name.lower() == family


def test_head_of_a_tied_model_is_the_embedding():
    for family, name in (("llada", "weight_tying"), ("dream", "tie_word_embeddings")):
        model = tiny_model(family, **{name: True})
        view, ids = view_of(model), random_ids()
        assert view.head is None and model.get_output_embeddings().weight is view.embed.weight
        assert_close(logits(model, ids), logits(Lookalike(model), ids))
    model.lm_head = nn.Linear(64, 256, bias=False)
    assert view_of(model).head is model.lm_head  # untied since
    model.lm_head.weight = model.model.embed_tokens.weight
    assert view_of(model).head is None


def test_head_of_an_official_tied_llada_is_the_embedding():
    """There `ff_out` is the embedding module itself."""
    cls = hub.model_class("llada_v2")
    model = cls(cls.config_class(**CONFIGS["llada"](weight_tying=True)))
    model.tie_weights()
    assert view_of(model).head is None


def test_the_vocabulary_is_that_of_a_resized_embedding():
    model = tiny_model("dream")
    model.model.embed_tokens, model.lm_head = nn.Embedding(300, 64), nn.Linear(64, 300, bias=False)
    assert view_of(model).vocab_size == 300


UNSUPPORTED = {
    "llada": {
        "block_type": "sequential",
        "block_group_size": 3,
        "layer_norm_type": "gemma_rms",
        "layer_norm_with_affine": False,
        "bias_for_layer_norm": True,
        "include_bias": True,
        "attention_layer_norm": True,
        "activation_type": "swiglu",
        "rope": False,
        "alibi": True,
        "input_emb_norm": True,
        "scale_logits": True,
        "clip_qkv": 8.0,
        "d_model": 60,
        "n_layers": 0,
        "n_kv_heads": 3,
        "mask_token_id": 256,
        "eos_token_id": None,
    },
    "dream": {
        "hidden_act": "gelu",
        "rope_scaling": {"type": "yarn", "factor": 4.0},
        "use_sliding_window": True,
        "use_mrope": True,
        "hidden_size": 66,
        "num_attention_heads": None,
        "mask_token_id": None,
        "pad_token_id": 300,
    },
}


@pytest.mark.parametrize("family, field", [(family, field) for family in FAMILIES for field in UNSUPPORTED[family]])
def test_unsupported_config_is_named(family, field):
    value = UNSUPPORTED[family][field]
    with pytest.raises(ValueError, match=field):
        from_config(CONFIGS[family](**{field: value}))
    theirs = Lookalike(native(family))
    setattr(theirs.config, field, value)
    with pytest.raises(ValueError, match=f"Lookalike.*{field}"):
        view_of(theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_with_official_defaults_may_be_missing(family):
    optional = {"dream": "rope_scaling use_sliding_window hidden_act tie_word_embeddings pad_token_id rms_norm_eps"}
    optional["llada"] = "alibi block_group_size bias_for_layer_norm input_emb_norm pad_token_id embedding_size"
    config = {name: value for name, value in CONFIGS[family]().items() if name not in optional[family].split()}
    assert view_of(from_config(config)).pad_token_id == EOS_ID
    for name in ("mask_token_id", "d_model" if family == "llada" else "hidden_size"):
        theirs = Lookalike(native(family))
        delattr(theirs.config, name)
        with pytest.raises(ValueError, match=f"Lookalike: the config has no {name}"):
            view_of(theirs)


def test_rope_theta_may_lie_in_the_rope_parameters_of_transformers_5():
    config = CONFIGS["dream"]()
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    assert view_of(from_config(config)).rope_theta == 1e6
    with pytest.raises(ValueError, match="default RoPE"):
        from_config(config | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}})


def replaced(family, path, module):
    model = Lookalike(native(family))
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return model


@pytest.mark.parametrize(
    "family, path, module, message",
    [
        ("llada", "model.transformer.blocks.1.up_proj", None, "blocks.1.up_proj is missing"),
        ("llada", "model.transformer.ff_out", None, "transformer.ff_out is missing"),
        ("llada", "model.transformer.blocks.1.q_norm", nn.Identity(), "QK normalisation"),
        ("llada", "model.transformer.blocks.2.k_proj", nn.Linear(64, 32), r"must be linear.*\(64, 64\).*\(64, 32\)"),
        ("llada", "model.transformer.blocks.2.ff_norm", nn.LayerNorm(64), "RMSNorm"),
        ("llada", "model.transformer.ln_f", nn.Identity(), "RMSNorm"),
        ("llada", "model.transformer.ff_out", nn.Linear(64, 256), "has a bias"),
        ("dream", "model.layers.0.self_attn.k_norm", nn.Identity(), "QK normalisation"),
        ("dream", "model.layers.0.mlp.gate_proj", None, "gate_proj is missing"),
        ("dream", "model.layers.0.mlp.experts", nn.Identity(), None),
        ("dream", "model.layers.2.self_attn.q_proj", nn.Linear(64, 64, device="meta"), "one device"),
    ],
)
def test_unsupported_structure_is_named(family, path, module, message):
    model = replaced(family, path, module)
    if message is None:  # further modules may hang below, as of adapters
        view_of(model)
        return
    with pytest.raises(ValueError, match=f"Lookalike: .*{message}"):
        view_of(model)


class LLaDAMoEModelLM(nn.Module):
    """Its model_type is "llada" too, but it has experts and other paths."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(model_type="llada", mask_token_id=MASK_ID, hidden_size=64)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(256, 64)
        self.model.layers = nn.ModuleList([nn.Module()])
        self.model.layers[0].mlp = nn.ModuleDict({"experts": nn.ModuleList()})


def test_other_models_are_refused_by_name():
    for model in (LLaDAMoEModelLM(), nn.Linear(2, 2), object()):
        with pytest.raises(ValueError, match=f"{type(model).__name__} is not supported: dkv runs LLaDA .* and Dream"):
            view_of(model)


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Qwen2"])
def test_causal_models_of_transformers_are_refused_by_name(name):
    """Llama and Qwen2 have Dream's very modules."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 256}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2} if name != "GPT2" else {"num_attention_heads": 4}
    config = getattr(transformers, f"{name}Config")(**sizes)
    cls = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    with pytest.raises(ValueError, match=f"{cls.__name__} is not supported"):
        view_of(cls(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_has_the_weights_of_its_file(family):
    stored = load_file(WEIGHTS[family] / "model.safetensors")
    model = from_pretrained(str(WEIGHTS[family]), dtype="float32", device="cpu")
    state = model.state_dict()
    assert state.keys() == stored.keys() and all(torch.equal(state[name], stored[name]) for name in stored)
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert model.config.mask_token_id == MASK_ID
    half = from_pretrained(WEIGHTS[family], dtype=torch.float16, device="cpu").state_dict()
    assert all(torch.equal(half[name], stored[name].half()) for name in stored)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype", None])
def test_default_dtype_is_the_configs_else_the_files(key, tmp_path):
    tiny_model("llada", dtype=torch.float16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    saved = [name for name in ("torch_dtype", "dtype") if name in config]  # by the version of transformers
    assert len(saved) == 1 and config.pop(saved[0]) == "float16"
    (tmp_path / "config.json").write_text(json.dumps(config | ({key: "bfloat16"} if key else {})))
    model = from_pretrained(tmp_path, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if key else torch.float16}
    model.save_pretrained(tmp_path / "again")
    assert from_pretrained(tmp_path / "again", device="cpu").dtype == model.dtype


def test_the_head_in_the_file_of_a_tied_model_must_be_the_embedding(tmp_path):
    model = tiny_model("dream", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": head.double()}, tmp_path / "model.safetensors")
    again = from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert view_of(again).head is None and all(map(torch.equal, again.parameters(), model.parameters()))
    for other in (head + 1, head[:-1].clone()):
        save_file(tensors | {"lm_head.weight": other}, tmp_path / "model.safetensors")
        with pytest.raises(
            ValueError, match="config.json: tie_word_embeddings is true, but lm_head.weight in model.saf"
        ):
            from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize("rope", ["linear", {"full_attention": {"rope_theta": 1e6}}])
def test_a_rope_of_another_kind_is_refused(rope):
    with pytest.raises(ValueError, match="the default RoPE only"):
        tiny_model("dream", rope_scaling=rope)


@pytest.mark.parametrize("field", ["rope_theta", "rms_norm_eps"])
@pytest.mark.parametrize("value", [0, -1.0, "1e4", float("nan")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_number_that_cannot_be_is_named(family, field, value):
    with pytest.raises(ValueError, match=f"{field} must be a positive number"):
        tiny_model(family, **{field: value})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_saved_as_tied_as_it_is(family, tied, tmp_path):
    """Whatever the config said when the model was made."""
    model = tiny_model(family, **{"weight_tying" if family == "llada" else "tie_word_embeddings": not tied})
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    head.weight = embed.weight if tied else nn.Parameter(2 * embed.weight.detach())
    model.save_pretrained(tmp_path)
    for again in loaded_both_ways(tmp_path):
        assert torch.equal(again.get_input_embeddings().weight, embed.weight)
        assert torch.equal(again.get_output_embeddings().weight, head.weight)
        assert (view_of(again).head is None) == tied


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_size", [None, 200_000, 1])
def test_a_saved_model_loads_again(family, max_shard_size, tmp_path):
    model = native(family)
    model.save_pretrained(tmp_path, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    files = sorted(path.name for path in tmp_path.iterdir())
    want = model.state_dict()
    for again in loaded_both_ways(tmp_path):
        got = again.state_dict()
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
        assert fields_of(again) == fields_of(model)
        assert torch.equal(logits(again, random_ids()), logits(model, random_ids()))
    if max_shard_size is None:
        assert files == ["config.json", "generation_config.json", "model.safetensors"]
        return
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == want.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in want.values())
    shards = sorted(set(index["weight_map"].values()))
    assert files == ["config.json", "generation_config.json", *shards, "model.safetensors.index.json"]
    if max_shard_size == 1:
        assert len(shards) == len(want)
    else:
        assert 1 < len(shards) < len(want)
        assert all(sum(t.nbytes for t in load_file(tmp_path / s).values()) <= max_shard_size for s in shards)
    with safe_open(tmp_path / shards[0], "pt") as f:
        assert f.metadata() == {"format": "pt"}  # transformers insists on it
    if family == "llada" and max_shard_size == 200_000:
        assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"


def test_a_model_can_be_saved_over_its_own_checkpoint(tmp_path):
    """On the CPU its parameters are memory-mapped from that file."""
    tiny_model("llada").save_pretrained(tmp_path, max_shard_size=200_000)
    model = from_pretrained(tmp_path, device="cpu")
    with torch.no_grad():
        model.model.transformer.wte.weight *= 2
    want = {name: t.clone() for name, t in model.state_dict().items()}
    for max_shard_size in (100_000, 2**30):
        model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
        assert all(torch.equal(t, want[name]) for name, t in model.state_dict().items())
        again = from_pretrained(tmp_path, device="cpu").state_dict()
        assert all(torch.equal(again[name], want[name]) for name in want)
    files = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files


@pytest.mark.parametrize("family", FAMILIES)
def test_official_code_loads_what_we_save(family, tmp_path):
    kind = "llada_v2" if family == "llada" else family
    tiny_model(family).save_pretrained(tmp_path, max_shard_size=200_000)
    model = hub.load(kind, tmp_path)
    model.config.save_pretrained(tmp_path / "theirs")  # the model's own save fails for Dream with transformers 4.57
    save_file(model.state_dict(), tmp_path / "theirs" / "model.safetensors")
    ours = from_pretrained(tmp_path / "theirs")
    assert ours.dtype == torch.float32
    assert_close(logits(ours, random_ids()), logits(model, random_ids()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_never_held_twice(dtype, tmp_path, monkeypatch):
    """At any time, only the parameters and one tensor that is being converted are alive."""
    tiny_model("llada").save_pretrained(tmp_path, max_shard_size=100_000)
    alive, peak = {}, 0

    @contextlib.contextmanager
    def counting_open(*args, **kwargs):
        def get_tensor(name):
            nonlocal peak
            tensor = file.get_tensor(name)
            alive[name] = tensor.nbytes
            weakref.finalize(tensor, alive.pop, name)
            peak = max(peak, sum(alive.values()))
            return tensor

        with safe_open(*args, **kwargs) as file:
            yield SimpleNamespace(keys=file.keys, get_slice=file.get_slice, get_tensor=get_tensor)

    monkeypatch.setattr(dkv.models.loader, "safe_open", counting_open)
    allocated = []

    def recording(make):
        def make_and_record(*args, **kwargs):
            allocated.append(make(*args, **kwargs))
            return allocated[-1]

        return make_and_record

    for name in ("empty", "zeros", "ones"):
        monkeypatch.setattr(torch, name, recording(getattr(torch, name)))
    model = from_pretrained(tmp_path, dtype=dtype, device="cpu")
    monkeypatch.undo()
    total = sum(p.numel() * 4 for p in model.parameters())
    largest = max(p.numel() * 4 for p in model.parameters())
    assert peak <= (largest * 2 if dtype == torch.bfloat16 else total)
    assert allocated and all(tensor.device.type == "meta" for tensor in allocated)


@pytest.mark.gpu
def test_loading_to_a_gpu_holds_the_weights_once(tmp_path):
    sizes = {"d_model": 1024, "mlp_hidden_size": 4096, "n_heads": 8, "n_kv_heads": 8, "embedding_size": 32768}
    from_config(CONFIGS["llada"](**sizes), dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size=2**26)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = from_pretrained(tmp_path)
    assert model.device.type == "cuda"
    nbytes = [p.nbytes for p in model.parameters()]
    assert torch.cuda.max_memory_allocated() - before <= sum(nbytes) + max(nbytes)


def edited(folder, edit):
    """A checkpoint whose tensors `edit` has changed."""
    tiny_model("llada").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_weights_must_fit_the_config(tmp_path):
    name = "model.transformer.blocks.0.q_proj.weight"

    def missing(tensors):
        for key in [key for key in tensors if "blocks.1" in key]:
            del tensors[key]

    with pytest.raises(ValueError, match="missing: model.transformer.blocks.1.attn_norm.*, .*, .* and 6 more"):
        from_pretrained(edited(tmp_path, missing))
    with pytest.raises(ValueError, match="unexpected: surplus"):
        from_pretrained(edited(tmp_path, lambda tensors: tensors.update(surplus=torch.zeros(1))))
    with pytest.raises(ValueError, match=r"wrongly shaped: .*q_proj.weight \(2, 2\) instead of \(64, 64\)"):
        from_pretrained(edited(tmp_path, lambda tensors: tensors.update({name: torch.zeros(2, 2)})))
    with pytest.raises(ValueError, match="q_proj.weight is 'I8'; .* quantised"):
        whole = torch.zeros(64, 64, dtype=torch.int8)
        from_pretrained(edited(tmp_path, lambda tensors: tensors.update({name: whole})))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        from_pretrained(tmp_path)
    for path in (tmp_path / "nowhere", "nowhere", "./here/there", "a/b/c", ""):
        with pytest.raises(ValueError, match="neither a folder nor a repository|has no config.json"):
            from_pretrained(path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llada"]()))
    with pytest.raises(ValueError, match="lacks model.safetensors; the weights must be safetensors"):
        from_pretrained(tmp_path)
    tiny_model("llada").save_pretrained(tmp_path, max_shard_size=100_000)
    next(tmp_path.glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="lacks model-00002-of-.*.safetensors"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "hidden_size": 8}, "LLaDAMoEModelLM"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"model_type": "llada2_moe"}, "model_type 'llada2_moe'"),
        ({}, "model_type None"),
    ],
)
def test_other_checkpoints_are_refused_by_name(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{message} is not supported: dkv loads LLaDA .* and Dream"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["float31", torch.int8, "int8", "float8_e4m3fn", 16, "nn"])
def test_dtype_must_be_floating(dtype):
    with pytest.raises(ValueError, match="dtype must be one of"):
        from_pretrained(WEIGHTS["llada"], dtype=dtype)


def test_a_repository_is_downloaded_as_asked(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot_download(repo, **options):
        asked.append((repo, options))
        return str(WEIGHTS["llada"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    options = {"revision": "v1", "token": "secret", "cache_dir": "cache", "local_files_only": True}
    model = from_pretrained("GSAI-ML/LLaDA-8B-Instruct", device="cpu", **options)
    assert model.config.model_type == "llada" and model.name_or_path == "GSAI-ML/LLaDA-8B-Instruct"
    ((repo, got),) = asked
    assert repo == "GSAI-ML/LLaDA-8B-Instruct" and not any(name.endswith(".bin") for name in got.pop("allow_patterns"))
    assert got == options


def test_dkv_imports_nothing_that_only_some_need():
    code = """
import sys
import dkv
dkv.NoCache(), dkv.GenerateConfig(), dkv.kernels.swiglu, dkv.generate, dkv.register, dkv.from_pretrained
assert not {"transformers", "huggingface_hub", "matplotlib", "tokenizers"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600, cwd=oracle.DATA.parents[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_decides_the_weights_of_a_random_model(family, device):
    options = {"dtype": torch.bfloat16, "device": device}
    model, same, other = (from_config(CONFIGS[family](), seed=seed, **options) for seed in (0, 0, 1))
    assert model.dtype == torch.bfloat16 and model.device.type == device and not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
        if parameter.dim() == 2:
            assert parameter.float().std().item() == pytest.approx(0.02, rel=0.1)
            assert not torch.equal(parameter, other.get_parameter(name))
        else:
            assert bool((parameter == (0 if name.endswith("bias") else 1)).all())
    config = SimpleNamespace(**CONFIGS[family]())
    assert view_of(from_config(config)).family.name.lower() == family
    assert native(family).state_dict().keys() == model.state_dict().keys()
