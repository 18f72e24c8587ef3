"""LLaDA: LLaDA-8B Base and Instruct, LLaDA-1.5, and models of the same structure."""

from typing import Any

import torch
from torch import Tensor, nn

from dkv.models.layout import Fields, Layout, ModelConfig, module_at, read_view
from dkv.models.view import Family, ModelView

FAMILY = Family(
    name="LLaDA",
    shifted=False,
    remasking="low_confidence",
    remasking_by_probability="low_confidence",
    divides_logits=False,
    time_steps=False,
    end_of_turn_id=126348,
)

LAYOUT = Layout(
    embed="model.transformer.wte",
    layers="model.transformer.blocks",
    final_norm="model.transformer.ln_f",
    head="model.transformer.ff_out",
    layer={
        "attn_norm": "attn_norm",
        "q": "q_proj",
        "k": "k_proj",
        "v": "v_proj",
        "o": "attn_out",
        "mlp_norm": "ff_norm",
        "gate": "ff_proj",
        "up": "up_proj",
        "down": "ff_out",
    },
    layers_field="n_layers",
    tied_field="weight_tying",
)

SUPPORTED = {  # field of config.json -> (the only value that dkv runs, the official code's default)
    "block_type": ("llama", "sequential"),
    "block_group_size": (1, 1),
    "layer_norm_type": ("rms", "default"),
    "layer_norm_with_affine": (True, True),
    "include_bias": (False, False),
    "bias_for_layer_norm": (False, None),  # None: as include_bias
    "attention_layer_norm": (False, False),
    "activation_type": ("silu", "swiglu"),
    "rope": (True, False),
    "alibi": (False, False),
    "input_emb_norm": (False, False),
    "scale_logits": (False, False),
    "clip_qkv": (None, None),
}

ATTRIBUTE_MAP = {  # transformers' names -> those of config.json
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_sequence_length",
    "tie_word_embeddings": "weight_tying",
}


def describes(config: Any) -> bool:
    """Whether a config.json is of this family; LLaDA-MoE calls itself "llada" too, but has no d_model."""
    return getattr(config, "model_type", None) == "llada" and hasattr(config, "d_model")


def read_model_config(config: Any, owner: str, rows: int | None = None) -> ModelConfig:
    """The `ModelConfig` of a config; ValueError naming the owner for a missing or unsupported field.

    rows: the rows of the model's embedding, which may have been resized without its config.
    """
    fields = Fields(config, owner)
    fields.must_be(SUPPORTED)
    nheads_k = 1 if fields.switch("multi_query_attention", None) else None
    heads = fields.heads("d_model", "n_heads", "n_kv_heads", default=nheads_k)
    vocab_size = fields.count("vocab_size", None)
    rows = rows or fields.count("embedding_size", None) or vocab_size or fields.count("vocab_size")
    mlp_size = fields.count("mlp_hidden_size", None)
    if mlp_size is None:
        mlp_size = fields.check_count("mlp_ratio * d_model", fields.count("mlp_ratio", 4) * heads["hidden_size"])
    return ModelConfig(
        **heads,
        **fields.token_ids(rows),
        mlp_size=mlp_size,
        layers=fields.count("n_layers"),
        rope_theta=fields.positive("rope_theta", 10000.0),
        eps=fields.positive("rms_norm_eps", 1e-5),
        vocab_size=rows,
        max_positions=fields.count("max_sequence_length", 1024),
        tied=fields.switch("weight_tying", True),
        biased=("q", "k", "v") if fields.switch("include_qkv_bias", False) else (),
    )


def find(model: nn.Module) -> ModelView | None:
    """The `ModelView` of a LLaDA, native or of Hugging Face's remote code; None for a model of another structure."""
    embed = module_at(model, LAYOUT.embed)
    if embed is None:
        return None
    inner = model.model
    # the official file's first revision builds a mask and does not use it; its methods tell the revisions apart
    ignores_mask = hasattr(inner, "get_alibi_attention_bias") and not hasattr(inner, "get_bidirectional_attention_bias")
    return read_view(
        model,
        LAYOUT,
        read_model_config(getattr(model, "config", None), type(model).__name__, rows=len(embed.weight)),
        family=FAMILY,
        make_output=make_output,
        honours_attention_mask=not ignores_mask,
    )


def make_output(
    logits: Tensor,
    return_dict: bool = True,
    *,
    loss: Tensor | None = None,
    hidden_states: tuple[Tensor, ...] | None = None,
) -> Any:
    """The output of the model's forward, as transformers' class or as a tuple."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    if not return_dict:  # the second is for K/V
        return (*(() if loss is None else (loss,)), logits, None, hidden_states)
    return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=hidden_states)


def sdpa_mask(mask: Tensor, x: Tensor) -> Tensor | None:
    """The mask of `F.scaled_dot_product_attention` for an attention_mask and embeddings x (batch, seqlen, hidden_size).

    It must be (batch, seqlen), 0 or False where a key is padding: no query attends to it, but its own query attends to
    the other keys. A row without any key attends to all equally, as in the official code.
    """
    if not isinstance(mask, Tensor) or mask.shape != x.shape[:2]:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(f"attention_mask must have shape (batch, seqlen) = {tuple(x.shape[:2])}, got {got}.")
    valid = mask.bool()[:, None, None]
    if not torch.compiler.is_compiling() and bool(valid.all()):  # the compiler cannot read it
        return None
    # the smallest finite value: with -inf, rows without keys would be NaN
    return torch.zeros_like(valid, dtype=x.dtype).masked_fill(~valid, torch.finfo(x.dtype).min)
