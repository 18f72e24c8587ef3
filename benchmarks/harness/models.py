"""The models of the benchmarks: LLaDA and Dream at true size and at a size that a CPU can run, with random weights.

Their sizes are written here and nowhere else.
"""

from types import ModuleType, SimpleNamespace
from typing import Any

import torch

import dkv.models
from benchmarks.harness.peer import fill_random
from dkv.models.layout import ModelConfig

Config = dict[str, Any]  # a config.json

BLOCK = 32
FAMILIES = ("LLaDA", "Dream")


def llada(*, hidden: int, mlp: int, layers: int, heads: int, vocabulary: int, mask: int, eos: int) -> Config:
    """config.json of a LLaDA; complete, so that the official code adds no defaults of its own."""
    return {
        "model_type": "llada",
        "activation_type": "silu",
        "alibi": False,
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": hidden,
        "embedding_dropout": 0.0,
        "embedding_size": vocabulary,
        "eos_token_id": eos,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "mask_token_id": mask,
        "max_sequence_length": 8192,
        "mlp_hidden_size": mlp,
        "n_heads": heads,
        "n_kv_heads": heads,
        "n_layers": layers,
        "pad_token_id": eos,
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "use_cache": False,
        "vocab_size": vocabulary,
        "weight_tying": False,
    }


def dream(
    *, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, mask: int, eos: int
) -> Config:
    """config.json of a Dream."""
    return {
        "model_type": "Dream",
        "attention_dropout": 0.0,
        "bos_token_id": eos,
        "eos_token_id": eos,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "mask_token_id": mask,
        "max_position_embeddings": 8192,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": eos,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": vocabulary,
    }


LLADA_8B = llada(hidden=4096, mlp=12288, layers=32, heads=32, vocabulary=126464, mask=126336, eos=126081)
DREAM_7B = dream(hidden=3584, mlp=18944, layers=28, heads=28, kv_heads=4, vocabulary=152064, mask=151666, eos=151643)
SMALL = {"hidden": 512, "mlp": 1536, "layers": 8, "heads": 8, "vocabulary": 8192, "mask": 8191, "eos": 8190}
TINY = {"hidden": 32, "mlp": 32, "layers": 1, "heads": 2, "vocabulary": 64, "mask": 63, "eos": 62}
# family -> (name, config)
TRUE_SIZE = {"LLaDA": ("LLaDA-8B", LLADA_8B), "Dream": ("Dream-7B", DREAM_7B)}
SCALED_DOWN = {"LLaDA": ("LLaDA-small", llada(**SMALL)), "Dream": ("Dream-small", dream(**SMALL, kv_heads=2))}


def tiny(family: str) -> Config:
    """A config whose steps cost nothing, for results that do not depend on the model's size."""
    return llada(**TINY) if family == "LLaDA" else dream(**TINY, kv_heads=1)


def with_layers(config: Config, layers: int) -> Config:
    """The same config with another number of layers."""
    return config | {"n_layers" if "n_layers" in config else "num_hidden_layers": layers}


def family_of(config: Config) -> ModuleType:
    """The module of the config's family in `dkv.models`."""
    return dkv.models.llada if config["model_type"] == "llada" else dkv.models.dream


def model_config(config: Config) -> ModelConfig:
    """The same config in the terms that both families share."""
    return family_of(config).read_model_config(SimpleNamespace(**config), "config")


# name -> ModelConfig
MODELS = {name: model_config(config) for name, config in TRUE_SIZE.values()}


def make_model(config: Config, *, seed: int, dtype: torch.dtype, device: torch.device | str) -> torch.nn.Module:
    """A native model with the weights that `fill_random` gives any model of this config."""
    return fill_random(dkv.models.from_config(config, seed=seed, dtype=dtype, device=device), seed)
