"""Tiny random models: configs in the official form, and models of the official structure that are not ours."""

import copy
from types import SimpleNamespace

import torch
from torch import nn

from dkv.models import find_decoder, from_config

MASK_ID, EOS_ID = 255, 254


def llada_config(**changes):
    """config.json of a LLaDA with hidden size 64, 3 layers, 4 heads of 16, and 256 tokens, as a dict."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "activation_type": "silu",
        "alibi": False,
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": 64,
        "embedding_dropout": 0.0,
        "embedding_size": 256,
        "eos_token_id": EOS_ID,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_device": "meta",
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "mask_token_id": MASK_ID,
        "max_sequence_length": 512,
        "mlp_hidden_size": 128,
        "n_heads": 4,
        "n_kv_heads": 4,
        "n_layers": 3,
        "pad_token_id": EOS_ID,
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "use_cache": False,
        "vocab_size": 256,
        "weight_tying": False,
    } | changes


def dream_config(**changes):
    """config.json of a Dream of the same size, with 2 key/value heads, as a dict."""
    return {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "attention_dropout": 0.0,
        "bos_token_id": EOS_ID,
        "eos_token_id": EOS_ID,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 128,
        "mask_token_id": MASK_ID,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "pad_token_id": EOS_ID,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": 256,
    } | changes


CONFIGS = {"llada": llada_config, "dream": dream_config}


def tiny_model(family, *, seed=0, scale=5.0, dtype=torch.float32, device="cpu", **changes):
    """A native model whose predictions are not nearly uniform: its matrices are `scale` times the usual size."""
    model = from_config(CONFIGS[family](**changes), seed=seed, dtype=dtype, device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= scale
            else:  # norms that are not 1 and biases that are not 0
                parameter += 0.1 * torch.arange(parameter.numel(), device=device).sin().to(dtype)
    return model


class Lookalike(nn.Module):
    """The module paths and weights of a native model under a forward of its own, as remote code has it.

    The forward is eager and independent of ours. It takes the arguments of the official code's, and honours a mask
    as (batch, seqlen) or (batch, 1, seqlen, seqlen), True where a key may be attended to.
    """

    def __init__(self, native):
        super().__init__()
        self.config = SimpleNamespace(**vars(native.config))
        for name, child in copy.deepcopy(native).named_children():
            self.add_module(name, child)
        self.eval()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, return_dict=None):
        parts = find_decoder(self)
        x = parts.embed(input_ids)
        batch, seqlen = input_ids.shape
        headdim, half = parts.headdim, parts.headdim // 2
        frequency = parts.rope_theta ** (-torch.arange(half, device=x.device) / half)
        positions = torch.arange(seqlen, device=x.device)[None] if position_ids is None else position_ids
        angles = (positions[..., None] * frequency).repeat(1, 1, 2)[:, None]

        def heads(projected):
            return projected.reshape(batch, seqlen, -1, headdim).transpose(1, 2)

        def rotate(t):
            return t * angles.cos() + torch.cat((-t[..., half:], t[..., :half]), dim=-1) * angles.sin()

        for layer in parts.layers:
            h = layer.attn_norm(x)
            q, k, v = (heads(project(h)) for project in (layer.q, layer.k, layer.v))
            k, v = (t.repeat_interleave(parts.nheads // parts.nheads_k, dim=1) for t in (rotate(k), v))
            scores = rotate(q) @ k.transpose(-1, -2) / headdim**0.5
            if (
                isinstance(attention_mask, torch.Tensor)
                and attention_mask.dim() == 4
                and attention_mask.is_floating_point()
            ):
                scores = scores + attention_mask
            elif isinstance(attention_mask, torch.Tensor):
                real = attention_mask.bool()
                real = real[:, None, None] if real.dim() == 2 else real
                scores = scores.masked_fill(~real, torch.finfo(scores.dtype).min)
            x = x + layer.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, seqlen, -1))
            h = layer.mlp_norm(x)
            x = x + layer.down(nn.functional.silu(layer.gate(h)) * layer.up(h))
        return SimpleNamespace(logits=parts.logits(parts.final_norm(x)))
