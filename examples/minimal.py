"""LLaDA and Dream with a delayed cache, in one file, on three functions of `dkv.kernels`.

    python examples/minimal.py

Nothing else of dkv is used: no policies, no model classes, no CUDA graphs. The model computes the active positions of a
step and reads the keys and values of all others from caches that are indexed by position; the two loops are the
families' own, with the rule of dKV-Cache-Decode (arXiv 2505.15781) for what is active. `tests/test_minimal.py` compares
both, token for token, with the paper's code. Run as a script, it decodes with small random models.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dkv.kernels import delayed_attention, pack_positions, rope_cache_update

# tensor names of the official checkpoints: of the parts of a layer, and of embedding, final norm and head
LLADA = {
    "layer": "model.transformer.blocks.{}.",
    "parts": "attn_norm q_proj k_proj v_proj attn_out ff_norm ff_proj up_proj ff_out",
    "ends": "model.transformer.wte model.transformer.ln_f model.transformer.ff_out",
}
DREAM = {
    "layer": "model.layers.{}.",
    "parts": "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    "post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj",
    "ends": "model.embed_tokens model.norm lm_head",
}


class CachedModel:
    """A transformer that computes only the active positions.

    `first_column` (batch,) is the first column of each row that is not padding.
    """

    def __init__(
        self,
        names: dict[str, str],
        weights: dict[str, Tensor],
        first_column: Tensor,
        seqlen: int,
        *,
        layers: int,
        headdim: int,
        rope_theta: float,
        eps: float,
        impl: str = "auto",
    ):
        self.names, self.weights, self.headdim, self.eps, self.impl = names, weights, headdim, eps, impl
        self.first_column, self.seqlen = first_column, seqlen
        device = first_column.device
        frequency = rope_theta ** (-torch.arange(0, headdim, 2) / headdim)
        angles = torch.outer(torch.arange(seqlen), frequency)
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)
        nheads_k = len(weights[names["layer"].format(0) + names["parts"].split()[2] + ".weight"]) // headdim
        # NaN, so that a slot that is read before it is written shows
        cache = torch.full((layers, 2, len(first_column), seqlen, nheads_k, headdim), float("nan"), device=device)
        self.caches = [tuple(layer) for layer in cache]

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
    model: CachedModel,
    x: Tensor,
    *,
    mask_id: int,
    gen_length: int,
    block_length: int,
    steps: int,
    refresh_interval: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """LLaDA's blocks from left to right; yields x and the active positions after each step.

    A step of a block is full if it is one of the first two or `refresh_interval` divides it. Otherwise the active
    positions are the masks and the tokens of the step before: a token is computed once more after its commit, so that
    its cached keys and values are those of the token and not of the mask. refresh_interval=1 is decoding without a
    cache.
    """
    x, steps = x.clone(), steps * block_length // gen_length
    for start in range(x.shape[1] - gen_length, x.shape[1], block_length):
        decoded = [x != mask_id]
        for step in range(steps):
            full = step < 2 or step % refresh_interval == 0
            active = torch.ones_like(decoded[0]) if full else ~decoded[step - 1]
            logits = model(x, active)
            candidates = x == mask_id
            candidates[:, :start], candidates[:, start + block_length :] = False, False
            count = block_length // steps + (step < block_length % steps)
            commit(x, logits, candidates, logits.double().softmax(-1).amax(-1), [count] * len(x))
            decoded.append(x != mask_id)
            yield x.clone(), active


def decode_dream(
    model: CachedModel,
    x: Tensor,
    valid: Tensor,
    *,
    mask_id: int,
    steps: int,
    refresh_interval: int,
    remasking: str = "entropy",
    shift: str = "un_right",
    eps: float = 1e-3,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Dream's loop: one block, its schedule of time steps, and the output at column j - 1 predicts column j.

    valid (batch, seqlen) is False for padding. Yields as `decode_llada` does.
    """
    x, decoded = x.clone(), [x != mask_id]
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
        best = probs.topk(2).values
        confidence = {
            "maskgit_plus": best[..., 0],
            "topk_margin": best[..., 0] - best[..., 1],
            "entropy": (probs * (probs + 1e-10).log()).sum(-1),
        }[remasking]
        candidates = x == mask_id
        masks = candidates.sum(1)
        counts = masks if step == steps - 1 else masks * (1 - times[step + 1] / times[step])
        commit(x, logits, candidates, confidence, counts.int().tolist())
        decoded.append(x != mask_id)
        yield x.clone(), active


def stable(decoded: Tensor, shift: str) -> Tensor:
    """Which columns Dream reads from the cache: "right": decoded; "un": the next one is; "un_right": both are."""
    if shift == "right":
        return decoded
    following = torch.cat((decoded[:, 1:], decoded[:, :1]), dim=1)
    if shift == "un":
        return following
    both = decoded & following
    return torch.cat((both[:, :-1], both[:, -2:-1]), dim=1)


def random_weights(names: dict[str, str], *, layers: int, dim: int, mlp: int, vocab: int) -> dict[str, Tensor]:
    """Weights of a model of `layers` layers, by the names of the family's checkpoints."""
    sizes = [(dim,), (dim, dim), (dim, dim), (dim, dim), (dim, dim), (dim,), (mlp, dim), (mlp, dim), (dim, mlp)]
    embed, final_norm, head = names["ends"].split()
    shapes = {embed: (vocab, dim), final_norm: (dim,), head: (vocab, dim)}
    for layer in range(layers):
        prefix = names["layer"].format(layer)
        shapes |= {prefix + part: size for part, size in zip(names["parts"].split(), sizes, strict=True)}
    return {
        f"{name}.weight": torch.ones(shape) if len(shape) == 1 else 0.1 * torch.randn(shape)
        for name, shape in shapes.items()
    }


@torch.no_grad()
def main() -> None:
    """Decodes with and without a cache, and prints how much was computed and how many tokens are the same."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers, vocab, mask_id, gen_length, block_length = 3, 1000, 999, 64, 32
    prompt = torch.randint(0, mask_id, (2, 48))
    x = F.pad(prompt, (0, gen_length), value=mask_id).to(device)
    valid, first_column = torch.ones_like(x, dtype=torch.bool), torch.zeros(len(x), dtype=torch.long, device=device)

    for family, names in (("LLaDA", LLADA), ("Dream", DREAM)):
        weights = random_weights(names, layers=layers, dim=64, mlp=128, vocab=vocab)
        weights = {name: weight.to(device) for name, weight in weights.items()}
        weights[names["ends"].split()[2] + ".weight"][mask_id] = 0  # the mask is never predicted
        answers = []
        for refresh_interval in (1, 8):
            model = CachedModel(
                names, weights, first_column, x.shape[1], layers=layers, headdim=16, rope_theta=10000.0, eps=1e-5
            )
            options = {"mask_id": mask_id, "steps": gen_length, "refresh_interval": refresh_interval}
            if family == "LLaDA":
                run = decode_llada(model, x, gen_length=gen_length, block_length=block_length, **options)
            else:
                run = decode_dream(model, x, valid, **options)
            xs, actives = zip(*run, strict=True)
            answers.append(xs[-1][:, -gen_length:])
        share = torch.stack(actives).float().mean().item()
        same = (answers[0] == answers[1]).sum().item()
        print(
            f"{family}: {share:.0%} of the positions computed, {same} of {answers[0].numel()} tokens "
            "as without a cache (random weights)"
        )


if __name__ == "__main__":
    main()
