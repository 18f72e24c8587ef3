"""Dream: Dream-v0 Base and Instruct, Dream-Coder, DiffuCoder, and models of the same structure."""

from reprlib import repr as shown
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dkv.models.layout import Fields, Layout, ModelConfig, module_at, read_view
from dkv.models.view import Family, ModelView

FAMILY = Family(
    name="Dream",
    shifted=True,
    remasking="entropy",
    remasking_by_probability="maskgit_plus",
    divides_logits=True,
    time_steps=True,
    end_of_turn_id=151645,
)

LAYOUT = Layout(
    embed="model.embed_tokens",
    layers="model.layers",
    final_norm="model.norm",
    head="lm_head",
    layer={
        "attn_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    layers_field="num_hidden_layers",
    tied_field="tie_word_embeddings",
)

SUPPORTED = {  # field of config.json -> (the only value that dkv runs, the official code's default)
    "hidden_act": ("silu", "silu"),
    "use_sliding_window": (False, False),
    "use_mrope": (False, False),
}

ATTRIBUTE_MAP: dict[str, str] = {}  # config.json has transformers' names


def describes(config: Any) -> bool:
    """Whether a config is of this family; its modules do not tell, as Llama and Qwen2 have the same but are causal."""
    return str(getattr(config, "model_type", None)).lower() == "dream"


def read_model_config(config: Any, owner: str, rows: int | None = None) -> ModelConfig:
    """The `ModelConfig` of a config; ValueError naming the owner for a missing or unsupported field.

    rows: the rows of the model's embedding, which may have been resized without its config.
    """
    fields = Fields(config, owner)
    fields.must_be(SUPPORTED)
    # transformers 5 keeps the parameters of the plain RoPE in rope_parameters; its rope_scaling is an alias that warns
    name = "rope_parameters" if vars(config).get("rope_parameters") is not None else "rope_scaling"
    rope = vars(config).get(name)
    rope = {} if rope is None else rope
    is_plain = isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values())
    if not is_plain or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{owner}: dkv supports the default RoPE only, got {name}={shown(rope)}.")
    rope_theta = fields.get("rope_theta", None)
    rope_theta = fields.check_positive("rope_theta", rope.get("rope_theta", 1e4) if rope_theta is None else rope_theta)
    rows = rows or fields.count("vocab_size")
    return ModelConfig(
        **fields.heads("hidden_size", "num_attention_heads", "num_key_value_heads"),
        **fields.token_ids(rows),
        mlp_size=fields.count("intermediate_size"),
        layers=fields.count("num_hidden_layers"),
        rope_theta=rope_theta,
        eps=fields.positive("rms_norm_eps", 1e-6),
        vocab_size=rows,
        max_positions=fields.count("max_position_embeddings", 32768),
        tied=fields.switch("tie_word_embeddings", False),
        biased=("q", "k", "v"),
    )


def find(model: nn.Module) -> ModelView | None:
    """The `ModelView` of a Dream, native or of Hugging Face's remote code; None for any other model."""
    embed = module_at(model, LAYOUT.embed)
    if embed is None or not describes(getattr(model, "config", None)):
        return None
    return read_view(
        model,
        LAYOUT,
        read_model_config(model.config, type(model).__name__, rows=len(embed.weight)),
        family=FAMILY,
        make_output=make_output,
    )


def make_output(
    logits: Tensor,
    return_dict: bool = True,
    *,
    loss: Tensor | None = None,
    hidden_states: tuple[Tensor, ...] | None = None,
) -> Any:
    """The output of the model's forward, as transformers' class or as a tuple."""
    from transformers.modeling_outputs import MaskedLMOutput

    output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=hidden_states)
    return output if return_dict else output.to_tuple()


def sdpa_mask(mask: Tensor | Literal["full"], x: Tensor) -> Tensor | None:
    """The mask of `F.scaled_dot_product_attention` for an attention_mask and embeddings x (batch, seqlen, hidden_size).

    It must be "full", which hides nothing; or (batch, seqlen), bool or integers, 0 where a key is padding, which no
    query attends to; or (batch or 1, 1, seqlen or 1, seqlen), either bool, True where the query attends to the key, or
    floats, which are added to the scores. A query without any key gets zeros.
    """
    if isinstance(mask, str) and mask == "full":
        return None
    shape, dtype = getattr(mask, "shape", None), getattr(mask, "dtype", None)
    batch, seqlen = x.shape[:2]
    if shape == (batch, seqlen) and not (mask.is_floating_point() or mask.is_complex()):
        return (mask != 0)[:, None, None]
    shapes = [(rows, 1, queries, seqlen) for rows in (1, batch) for queries in (1, seqlen)]
    if shape not in shapes or not (dtype == torch.bool or mask.is_floating_point()):
        got = repr(mask) if shape is None else f"{tuple(shape)} of {dtype}"
        raise ValueError(
            f"attention_mask must be None, 'full', bool or integers of shape (batch, seqlen) = {(batch, seqlen)}, or "
            f"bool or floats of shape (batch, 1, seqlen, seqlen) = {(batch, 1, seqlen, seqlen)}, got {got}."
        )
    return mask
