"""The two operators alone carry a delayed cache: LLaDA and Dream in 100 lines, token for token as the authors' code.

Deliberately plain, and independent of the rest of the package: it proves the operators' contract by use.
"""

import itertools
import json

import oracle
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from utils import thinned

from dkv.kernels import delayed_attention, rope_cache_update

LLADA = {
    "path": "llada_mha_s0",
    "layer": "model.transformer.blocks.{}.",
    "names": "attn_norm q_proj k_proj v_proj attn_out ff_norm ff_proj up_proj ff_out",
    "ends": "model.transformer.wte model.transformer.ln_f model.transformer.ff_out",
}
DREAM = {
    "path": "dream_gqa_s0",
    "layer": "model.layers.{}.",
    "names": "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    "post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj",
    "ends": "model.embed_tokens model.norm lm_head",
}
HEADDIM, LAYERS = 16, 3


class TinyModel:
    """A transformer over a position-indexed cache: logits of the active positions, everything else from the cache."""

    def __init__(self, family, batch, seqlen, impl, device):
        path = oracle.weights_path(family["path"])
        config = json.loads((path / "config.json").read_text())
        self.weights = {name: w.to(device) for name, w in load_file(path / "model.safetensors").items()}
        self.family, self.impl, self.eps = family, impl, config["rms_norm_eps"]
        frequency = config["rope_theta"] ** (-torch.arange(0, HEADDIM, 2) / HEADDIM)
        angles = torch.outer(torch.arange(seqlen), frequency)
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)
        nheads_k = self.weights[family["layer"].format(0) + family["names"].split()[2] + ".weight"].shape[0] // HEADDIM
        self.caches = [
            [torch.full((batch, seqlen, nheads_k, HEADDIM), float("nan"), device=device) for _ in range(2)]
            for _ in range(LAYERS)
        ]

    def linear(self, x, name):
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def norm(self, x, name):
        return F.rms_norm(x, x.shape[-1:], self.weights[name + ".weight"], self.eps)

    def __call__(self, x, active, first_column):
        """x, active: (batch, seqlen); first_column (batch,): where the row begins. Returns (total_active, vocab)."""
        rows, columns = active.nonzero(as_tuple=True)
        positions, slots = columns - first_column[rows], rows * x.shape[1] + columns
        cu_seqlens_q = F.pad(active.sum(1).cumsum(0), (1, 0)).int()
        embed, final_norm, head = self.family["ends"].split()
        hidden = self.weights[embed + ".weight"][x[active]]
        for layer, (k_cache, v_cache) in enumerate(self.caches):
            prefix = self.family["layer"].format(layer)
            norm1, q, k, v, out, norm2, gate, up, down = (prefix + name for name in self.family["names"].split())
            inner = self.norm(hidden, norm1)
            q, k, v = (self.linear(inner, name).unflatten(-1, (-1, HEADDIM)) for name in (q, k, v))
            q = rope_cache_update(q, k, v, self.cos, self.sin, positions, slots, k_cache, v_cache, impl=self.impl)
            attended = delayed_attention(
                q, k_cache, v_cache, cu_seqlens_q, cache_leftpad=first_column.int(), impl=self.impl
            )
            hidden = hidden + self.linear(attended.flatten(1), out)
            inner = self.norm(hidden, norm2)
            hidden = hidden + self.linear(F.silu(self.linear(inner, gate)) * self.linear(inner, up), down)
        return self.linear(self.norm(hidden, final_norm), head)


def commit(x, logits, candidates, confidence, counts):
    """Writes the most likely tokens at the `counts` most confident candidates of each row."""
    confidence = confidence.masked_fill(~candidates, float("-inf"))
    for row, count in enumerate(counts):
        chosen = confidence[row].topk(count).indices
        x[row, chosen] = logits[row, chosen].argmax(-1)


def run_llada(case, prompt, impl, device):
    """LLaDA's semi-autoregressive loop with the paper's Decode policy; interval 1 is no cache."""
    x = F.pad(prompt, (0, case["gen_length"]), value=oracle.MASK_ID)
    model = TinyModel(LLADA, *x.shape, impl, device)
    interval, block = case.get("interval") or 1, case["block_length"]
    steps = case["steps"] * block // case["gen_length"]
    nothing = torch.zeros(len(x), dtype=torch.long, device=device)
    for start in range(prompt.shape[1], x.shape[1], block):
        history = [x != oracle.MASK_ID]
        for step in range(steps):
            full = step < 2 or step % interval == 0
            active = torch.ones_like(history[0]) if full else ~history[step - 1]
            logits = torch.full((*x.shape, 256), float("nan"), device=device)
            logits[active] = model(x, active, nothing)
            candidates = x == oracle.MASK_ID
            candidates[:, :start], candidates[:, start + block :] = False, False
            confidence = logits.double().softmax(-1).amax(-1)
            count = block // steps + (step < block % steps)
            commit(x, logits, candidates, confidence, [count] * len(x))
            history.append(x != oracle.MASK_ID)
            yield x.clone(), active


def dream_stable(shift, decoded):
    if shift == "right":
        return decoded
    following = torch.cat((decoded[:, 1:], decoded[:, :1]), dim=1)
    if shift == "un":
        return following
    both = decoded & following
    return torch.cat((both[:, :-1], both[:, -2:-1]), dim=1)


def run_dream(case, prompt, attention_mask, impl, device):
    """Dream's time-step schedule with the paper's Decode policy: the output at j - 1 predicts position j."""
    x = F.pad(prompt, (0, case["max_new_tokens"]), value=oracle.MASK_ID)
    model = TinyModel(DREAM, *x.shape, impl, device)
    real = torch.ones_like(x, dtype=torch.bool)
    if attention_mask is not None:
        real[:, : prompt.shape[1]] = attention_mask
    first_column = real.int().argmax(1)
    times = torch.linspace(1, case["eps"], case["steps"] + 1)
    history = [x != oracle.MASK_ID]
    for step in range(case["steps"]):
        if step % (case.get("interval") or 1) == 0:
            active = real
        elif step == 1:  # the prompt is cached at once, but for its last token
            active = ~torch.cat((history[0][:, 1:], history[0][:, -1:]), dim=1) & real
        else:
            active = ~dream_stable(case["shift_type"], history[step - 1]) & real
        outputs = torch.full((*x.shape, 256), float("nan"), device=device)
        outputs[active] = model(x, active, first_column)
        logits = torch.cat((outputs[:, :1], outputs[:, :-1]), dim=1)
        probs = logits.softmax(-1)
        top = probs.topk(2).values
        confidence = {
            "maskgit_plus": top[..., 0],
            "topk_margin": top[..., 0] - top[..., 1],
            "entropy": (probs * (probs + 1e-10).log()).sum(-1),
        }[case["alg"]]
        candidates = x == oracle.MASK_ID
        masked = candidates.sum(1)
        counts = masked if step == case["steps"] - 1 else masked * (1 - times[step + 1] / times[step])
        commit(x, logits, candidates, confidence, counts.int().tolist())
        history.append(x != oracle.MASK_ID)
        yield x.clone(), active


def check(family, name, impl, device, first_steps=None):
    case, prompt = oracle.cases(family)[name], oracle.recorded(family, name, "prompt").to(device)
    with torch.no_grad():
        if family == "llada":
            run = run_llada(case, prompt, impl, device)
        else:
            run = run_dream(case, prompt, oracle.recorded(family, name, "attention_mask"), impl, device)
        run = list(itertools.islice(run, first_steps))
    oracle.assert_same_trajectory(family, name, *zip(*run, strict=True), first_steps)


def names(family, *kinds):
    chosen = [name for name, case in oracle.cases(family).items() if case["kind"] in kinds]
    chosen = [(name,) for name in chosen if not name.endswith("topk50")]
    return thinned(chosen, lambda case: case[0].split("."))


@pytest.mark.parametrize("name", names("llada", "vanilla", "dkv-decode"))
def test_llada(name, device):
    check("llada", name, "auto", device)


@pytest.mark.parametrize("name", names("dream", "vanilla", "dkv-decoded"))
def test_dream(name, device):
    check("dream", name, "auto", device)


# in the interpreter a step takes a third of a second: two full and two cached ones, then the next block or refresh
@pytest.mark.parametrize(
    "family, name",
    [
        ("llada", "w0.B1.g24.b8.s12.decode.i4"),
        ("dream", "w0.B1.g24.s12.topk_margin.decoded.un_right.i4"),
        ("dream", "w0.B2p.g24.s12.topk_margin.decoded.un.i4"),
    ],
)
def test_on_the_kernels(family, name, device):
    check(family, name, "triton", device, first_steps=None if device == "cuda" else 5)
