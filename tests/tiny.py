"""Tiny models, ours and not ours, and what the tests run them on: prompts, policies, `generate`, and users' own loops."""

import copy
import functools
from types import SimpleNamespace

import oracle
import torch
import torch.nn.functional as F
from torch import nn

import dkv
from benchmarks.harness import models
from dkv.models import from_config, view_of

MASK_ID, EOS_ID = 255, 254
FAMILIES = ["llada", "dream"]
SIZES = {"hidden": 64, "mlp": 128, "layers": 3, "heads": 4, "vocabulary": 256, "mask": MASK_ID, "eos": EOS_ID}


def llada_config(**changes):
    """config.json of a LLaDA with hidden size 64, 3 layers, 4 heads of 16, and 256 tokens, as a dict."""
    official = {"architectures": ["LLaDAModelLM"], "init_device": "meta", "max_sequence_length": 512}
    return models.llada(**SIZES) | official | changes


def dream_config(**changes):
    """config.json of a Dream of the same size, with 2 key/value heads, as a dict."""
    official = {"architectures": ["DreamModel"], "max_position_embeddings": 512}
    return models.dream(**SIZES, kv_heads=2) | official | changes


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
        self.config = SimpleNamespace(**native.config.to_dict())
        for name, child in copy.deepcopy(native).named_children():
            self.add_module(name, child)
        self.eval()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, return_dict=None):
        parts = view_of(self)
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


@functools.cache
def model(family, device="cpu"):
    """The native model of the recorded trajectories."""
    name = {"llada": "llada_mha_s0", "dream": "dream_gqa_s0"}[family]
    return dkv.from_pretrained(oracle.weights_path(name), dtype=torch.float32, device=device)


def prompts(*lengths, masks=(), seed=0, device="cpu"):
    """Left-padded random prompts and their attention mask; masks: (row, column from the right) of those inside."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 200, (len(lengths), max(lengths)), generator=generator)
    for row, column in masks:
        ids[row, -column] = MASK_ID
    real = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return torch.where(real, ids, EOS_ID).to(device), real.to(device)


def generate(family, ids, real=None, device="cpu", **options):
    """`dkv.generate` of `model(family)`, with its history; the same noise every time unless a generator is given."""
    options = {"generator": torch.Generator().manual_seed(0), "output_history": True} | options
    return dkv.generate(model(family, device), ids, real, **options)


class IdentityHead:
    """Stands for a `ModelView` whose logits are the hidden states; `fused`: by the operator that keeps none in memory."""

    def __init__(self, vocab_size, fused=False):
        self.vocab_size, self.head_weight = vocab_size, torch.eye(vocab_size) if fused else None

    def logits(self, hidden):
        return hidden.clone()


POLICIES = {
    "NoCache": lambda family: dkv.NoCache(),
    "Decode": lambda family: dkv.Decode(4),
    "Decode never": lambda family: dkv.Decode(None),
    "Decode block": lambda family: dkv.Decode(3, scope="block"),
    "Decode delay 0": lambda family: dkv.Decode(4, delay=0),
    "Decode delay 2": lambda family: dkv.Decode(5, delay=2),
    "Decode un": lambda family: dkv.Decode(4, shift="un" if family == "dream" else None),
    "Decode right": lambda family: dkv.Decode(4, shift="right" if family == "dream" else None),
    "Greedy": lambda family: dkv.Greedy(3, 2),
    "Greedy contiguous": lambda family: dkv.Greedy(4, 3, window_kind="contiguous"),
    "Prefill": lambda family: dkv.Prefill(),
    "PrefillDecode": lambda family: dkv.PrefillDecode(4),
    "PrefixCache": lambda family: dkv.PrefixCache(),
    "DualCache": lambda family: dkv.DualCache(),
}


class Alternating(dkv.Policy):
    """A policy of the user's."""

    def active(self, state):
        return (state.step % 2 == 0) | state.masked


@torch.no_grad()
def llada_loop(model, prompt, attention_mask=None, *, gen_length, block_length, steps, cfg_scale=0.0):
    """A plain LLaDA loop as users write it; returns the sequence after every step."""
    x = F.pad(prompt, (0, gen_length), value=MASK_ID)
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (0, gen_length), value=1)
    is_prompt, history = x != MASK_ID, []
    for start in range(prompt.shape[1], x.shape[1], block_length):
        for _ in range(steps * block_length // gen_length):
            if cfg_scale:
                blanked = torch.where(is_prompt, MASK_ID, x)
                both = None if attention_mask is None else torch.cat((attention_mask, attention_mask))
                cond, uncond = model(torch.cat((x, blanked)), attention_mask=both).logits.chunk(2)
                logits = uncond + (cfg_scale + 1) * (cond - uncond)
            else:
                logits = model(x, attention_mask=attention_mask).logits
            confidence, token = logits.softmax(-1).max(-1)
            confidence[:, start + block_length :] = -1
            confidence = torch.where(x == MASK_ID, confidence, -1)
            chosen = confidence.topk(gen_length // steps, dim=1).indices
            x = x.scatter(1, chosen, token.gather(1, chosen))
            history.append(x)
    return torch.stack(history)


@torch.no_grad()
def dream_loop(model, prompt, attention_mask=None, *, gen_length, steps):
    """A plain Dream loop with the maskgit_plus rule, one token less certain at a time."""
    x, history = F.pad(prompt, (0, gen_length), value=MASK_ID), []
    mask, positions = "full", None
    if attention_mask is not None:
        real = F.pad(attention_mask.bool(), (0, gen_length), value=True)
        positions = (real.long().cumsum(1) - 1).masked_fill(~real, 1)
        mask = real[:, None, None, :] & real[:, None, :, None]
    for _ in range(steps):
        logits = model(x, mask, positions).logits
        logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)
        confidence, token = logits.softmax(-1).max(-1)
        confidence = torch.where(x == MASK_ID, confidence, -1)
        chosen = confidence.topk(gen_length // steps, dim=1).indices
        x = x.scatter(1, chosen, token.gather(1, chosen))
        history.append(x)
    return torch.stack(history)
