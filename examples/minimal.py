"""LLaDA and Dream with a delayed cache, in one file, on three functions of `dkv.kernels`.

    python examples/minimal.py

Nothing else of dkv is used: no policies, no model classes, no CUDA graphs. A step computes the active positions and
reads the keys and values of all others from caches that are indexed by position. The two loops are the families' own,
with the rule of dKV-Cache-Decode (arXiv 2505.15781) for what is active. `tests/test_minimal.py` compares them, token
for token, with the paper's code. Run as a script, it solves running sums with the two small models of the benchmarks.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from dkv.kernels import delayed_attention, pack_positions, rope_cache_update

# the names of the official checkpoints: fields of the config, a layer, its parts, and embedding, final norm and head
NAMES = {
    "llada": {
        "sizes": "n_layers n_heads",
        "layer": "model.transformer.blocks.{}.",
        "parts": "attn_norm q_proj k_proj v_proj attn_out ff_norm ff_proj up_proj ff_out",
        "ends": "model.transformer.wte model.transformer.ln_f model.transformer.ff_out",
    },
    "dream": {
        "sizes": "num_hidden_layers num_attention_heads",
        "layer": "model.layers.{}.",
        "parts": "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
        "post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj",
        "ends": "model.embed_tokens model.norm lm_head",
    },
}


class CachedModel:
    """The model of a checkpoint's folder; it computes only the active positions.

    `first_column` (batch,) is the first column of each row that is not padding.
    """

    def __init__(self, folder: Path, first_column: Tensor, seqlen: int, *, impl: str = "auto"):
        self.first_column, self.seqlen, self.impl, device = first_column, seqlen, impl, first_column.device
        config = json.loads((folder / "config.json").read_text())
        self.names = NAMES[config["model_type"].lower()]
        self.mask_id, self.eps = config["mask_token_id"], config["rms_norm_eps"]
        self.weights = {}
        for file in folder.glob("*.safetensors"):
            self.weights |= load_file(file, device=str(device))
        layers, nheads = (config[name] for name in self.names["sizes"].split())
        prefix, (_, q, k, *_) = self.names["layer"].format(0), self.names["parts"].split()
        q, k = (self.weights[f"{prefix}{part}.weight"] for part in (q, k))
        self.headdim = headdim = len(q) // nheads
        angles = torch.outer(torch.arange(seqlen), config["rope_theta"] ** (-torch.arange(0, headdim, 2) / headdim))
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)
        # NaN, so that a slot that is read before it is written shows
        shape = layers, 2, len(first_column), seqlen, len(k) // headdim, headdim
        self.caches = [(k, v) for k, v in k.new_full(shape, float("nan"))]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[name + ".weight"], self.eps)

    def __call__(self, x: Tensor, active: Tensor) -> Tensor:
        """Logits (batch, seqlen, vocab) of x (batch, seqlen); NaN where `active` (batch, seqlen) is False."""
        slots, cu_seqlens = pack_positions(active, impl=self.impl)
        row, column = slots // self.seqlen, slots % self.seqlen
        positions, leftpad = column - self.first_column[row], self.first_column.int()
        embed, final_norm, head = self.names["ends"].split()
        hidden = self.weights[embed + ".weight"][x[row, column]]
        for layer, cache in enumerate(self.caches):
            prefix = self.names["layer"].format(layer)
            norm1, q, k, v, out, norm2, gate, up, down = (prefix + part for part in self.names["parts"].split())
            normed = self.norm(hidden, norm1)
            q, k, v = (self.linear(normed, name).unflatten(-1, (-1, self.headdim)) for name in (q, k, v))
            q = rope_cache_update(q, k, v, self.cos, self.sin, positions, slots, *cache, impl=self.impl)
            attended = delayed_attention(q, *cache, cu_seqlens, cache_leftpad=leftpad, impl=self.impl)
            hidden = hidden + self.linear(attended.flatten(1), out)
            normed = self.norm(hidden, norm2)
            hidden = hidden + self.linear(F.silu(self.linear(normed, gate)) * self.linear(normed, up), down)
        computed = self.linear(self.norm(hidden, final_norm), head)
        logits = computed.new_full((*x.shape, computed.shape[-1]), float("nan"))
        logits[row, column] = computed
        return logits


def commit(x: Tensor, logits: Tensor, candidates: Tensor, confidence: Tensor, counts: list[int]) -> None:
    """Writes the most likely tokens into the `counts` most confident candidates of each row of x."""
    confidence = confidence.masked_fill(~candidates, float("-inf"))
    for row, count in enumerate(counts):
        chosen = confidence[row].topk(count).indices
        x[row, chosen] = logits[row, chosen].argmax(-1)


def decode_llada(
    model: CachedModel, x: Tensor, *, gen_length: int, block_length: int, steps: int, refresh_interval: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """LLaDA's blocks from left to right; yields x and the active positions after each step.

    A step of a block is full if it is one of the first two or `refresh_interval` divides it. Otherwise the active
    positions are the masks and the tokens of the step before: a token is computed once more after its commit, so that
    its cached keys and values are those of the token and not of the mask. refresh_interval=1: no cache.
    """
    x, steps = x.clone(), steps * block_length // gen_length
    for end in range(x.shape[1] - gen_length + block_length, x.shape[1] + 1, block_length):
        decoded = [x != model.mask_id]
        for step in range(steps):
            full = step < 2 or step % refresh_interval == 0
            active = torch.ones_like(decoded[0]) if full else ~decoded[step - 1]
            logits = model(x, active)
            candidates = x == model.mask_id
            candidates[:, end:] = False
            count = block_length // steps + (step < block_length % steps)
            commit(x, logits, candidates, logits.double().softmax(-1).amax(-1), [count] * len(x))
            decoded.append(x != model.mask_id)
            yield x.clone(), active


def decode_dream(
    model: CachedModel,
    x: Tensor,
    *,
    steps: int,
    refresh_interval: int,
    remasking: str = "entropy",
    shift: str = "un_right",
    eps: float = 1e-3,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Dream's loop: one block, its schedule of times, and the output at column j - 1 predicts column j; as above."""
    x, decoded = x.clone(), [x != model.mask_id]
    valid = torch.arange(x.shape[1], device=x.device) >= model.first_column[:, None]
    times = torch.linspace(1, eps, steps + 1)
    for step in range(steps):
        if step % refresh_interval == 0:
            active = valid
        elif step == 1:  # the prompt is cached at once, except its last token, which predicts the first mask
            active = ~torch.cat((decoded[0][:, 1:], decoded[0][:, -1:]), dim=1) & valid
        else:
            active = ~stable(decoded[step - 1], shift) & valid
        outputs = model(x, active)
        logits = torch.cat((outputs[:, :1], outputs[:, :-1]), dim=1)
        probs = logits.softmax(-1)
        first, second = probs.topk(2).values.unbind(-1)
        entropy = -(probs * (probs + 1e-10).log()).sum(-1)
        confidence = {"maskgit_plus": first, "topk_margin": first - second, "entropy": -entropy}[remasking]
        candidates = x == model.mask_id
        masks = candidates.sum(1)
        counts = masks if step == steps - 1 else masks * (1 - times[step + 1] / times[step])
        commit(x, logits, candidates, confidence, counts.int().tolist())
        decoded.append(x != model.mask_id)
        yield x.clone(), active


def stable(decoded: Tensor, shift: str) -> Tensor:
    """Which columns Dream reads from the cache: "right": decoded; "un": the next one is; "un_right": both are."""
    if shift == "right":
        return decoded
    following = decoded.roll(-1, dims=1)
    if shift == "un":
        return following
    both = decoded & following
    return torch.cat((both[:, :-1], both[:, -2:-1]), dim=1)  # the last column has no next one


@torch.no_grad()
def main() -> None:
    """Decodes eight prompts with each model, and prints how many answers are right and how much was computed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lag, gen_length = 32, 64  # x[i] = (x[i - 1] + x[i - 32]) mod 10; one wrong digit makes all later ones wrong
    prompt = torch.randint(10, (8, lag), generator=torch.Generator().manual_seed(1)).to(device)
    for family, decode in (
        ("llada", partial(decode_llada, gen_length=gen_length, block_length=32)),
        ("dream", decode_dream),
    ):
        folder = Path(__file__).parent.parent / "benchmarks" / "small" / family
        model = CachedModel(folder, torch.zeros(len(prompt), dtype=torch.long, device=device), lag + gen_length)
        x = F.pad(prompt, (0, gen_length), value=model.mask_id)
        steps = list(decode(model, x, steps=gen_length, refresh_interval=8))
        x = steps[-1][0]
        right = (x[:, lag:] == (x[:, lag - 1 : -1] + x[:, :-lag]) % 10).all(1).sum()
        share = torch.stack([active for _, active in steps]).float().mean()
        print(f"{family}: {right} of {len(x)} answers are right, {share:.0%} of the positions were computed")


if __name__ == "__main__":
    main()
