"""`dkv.generate` beyond the recorded trajectories: batches, schedules, guidance, ends of text, dtypes, bad input."""

import copy
import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
from tiny import EOS_ID as EOS
from tiny import FAMILIES, POLICIES, generate, model, prompts
from tiny import MASK_ID as MASK
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from utils import pairwise

import dkv
from dkv.config import RULES
from dkv.generation import prepare
from dkv.kernels import cpu
from dkv.models import view_of
from dkv.schedule import Schedule


@pairwise(
    "family, decoding, policy",
    FAMILIES,
    ["fixed", "threshold", "eos"],
    list(POLICIES),
    # Greedy needs a known order
    where=lambda family, decoding, policy: decoding != "threshold" or not policy.startswith("Greedy"),
)
def test_row_of_a_ragged_batch_is_the_row_alone(family, decoding, policy, device):
    """Unequal prompts, unequal commits, rows that end early: tokens and active positions of each row are its own."""
    policy = POLICIES[policy](family)
    ids, real = prompts(7, 3, 5, device=device)
    options = {"gen_length": 12, "block_length": 6, "policy": policy}
    if isinstance(policy, dkv.Greedy):
        order = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i)) for i in range(3)])
        options |= {"remasking": "random", "order": order.to(device)}
    if decoding == "threshold":
        options |= {"threshold": 0.3}
    if decoding == "eos":
        ends = generate(family, ids, real, device=device, **options).sequences[:, ids.shape[1] + 5].tolist()
        options |= {"eos_early_stop": True, "eos_token_id": ends[1]}
    together = generate(family, ids, real, device=device, **options)
    assert not (together.sequences == MASK).any()
    for row in range(3):
        start = int((~real[row]).sum())
        if "order" in options:
            options["order"] = order[row : row + 1].to(device)
        alone = generate(family, ids[row : row + 1, start:], device=device, **options)
        assert torch.equal(together.sequences[row, start:], alone.sequences[0])
        for step, (x, active) in enumerate(zip(alone.history, alone.active, strict=True)):
            assert torch.equal(together.history[step, row, start:], x[0]), f"row {row}, step {step}"
            assert torch.equal(together.active[step, row, start:], active[0]), f"row {row}, step {step}"
        assert not together.active[len(alone.history) :, row].any(), "a finished row is still computed"
        assert not together.active[:, row, :start].any(), "padding is computed"


@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_is_left_padding(family, device):
    ids, real = prompts(9, 3, 6, device=device)
    lengths = real.sum(1).tolist()
    right = torch.stack([torch.cat((row[9 - n :], row[: 9 - n])) for row, n in zip(ids, lengths, strict=True)])
    right_mask = torch.arange(9, device=device) < real.sum(1, keepdim=True)
    options = {"gen_length": 8, "device": device, "policy": dkv.Decode(2)}
    expected = generate(family, ids, real, **options)
    for mask in (right_mask, right_mask.long(), right_mask.float()):
        assert torch.equal(generate(family, right, mask, **options).sequences, expected.sequences)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", [dkv.Decode(1), dkv.Greedy(1)], ids=repr)
def test_interval_one_is_no_cache(family, policy, device):
    ids, real = prompts(9, 5, device=device)
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(2)]).to(device)
    options = {"gen_length": 16, "block_length": 8, "steps": 8, "remasking": "random", "order": order, "device": device}
    cached = generate(family, ids, real, policy=policy, **options)
    assert torch.equal(cached.history, generate(family, ids, real, policy=dkv.NoCache(), **options).history)
    assert cached.stats.cache_ratio == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_decode_with_interval_one_is_prefill(family, device):
    ids, real = prompts(9, 5, device=device)
    runs = [
        generate(family, ids, real, gen_length=12, policy=p, device=device)
        for p in (dkv.Prefill(), dkv.PrefillDecode(1))
    ]
    assert torch.equal(runs[0].history, runs[1].history) and torch.equal(runs[0].active, runs[1].active)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["Decode", "Decode right", "Greedy", "PrefillDecode", "DualCache"])
def test_cached_outputs_by_the_definition(family, policy, device):
    """Recompute everything, then overwrite K/V of stable positions by their recorded values: the same tokens.

    An independent, slow implementation in float64 of what a delayed cache means.
    """
    ids, _ = prompts(9, device=device)
    options = {"gen_length": 16, "block_length": 8, "steps": 8, "policy": POLICIES[policy](family), "device": device}
    if policy == "Greedy":
        order = torch.randperm(16, generator=torch.Generator().manual_seed(0))[None].to(device)
        options |= {"remasking": "random", "order": order}
    run = generate(family, ids, **options)
    assert_by_the_definition(model(family, device), ids, run)


def assert_by_the_definition(llm, ids, run, tolerance=0.0):
    """Every committed token has the largest logit; tolerance: how far below the largest one it may be."""
    view = view_of(llm)
    x = F.pad(ids, (0, run.sequences.shape[1] - ids.shape[1]), value=MASK)
    recorded = None
    for after, active in zip(run.history, run.active, strict=True):
        outputs, recorded = slow_step(view, x[0], active[0], recorded)
        (columns,) = (x != after)[0].nonzero(as_tuple=True)
        predicted_by = (columns - 1).clamp(min=0) if view.family.shifted else columns
        logits = outputs[predicted_by]
        logits[:, MASK] = float("-inf")
        assert active[0, predicted_by].all(), "a commit rests on an output that was not recomputed"
        assert (logits.amax(-1) - logits.gather(1, after[0, columns, None])[:, 0] <= tolerance).all()
        x = after


def slow_step(view, x, active, recorded):
    """Logits (seqlen, vocab) of one sequence, and K, V of every layer; stable positions keep their recorded K, V."""
    cos, sin = (t[: len(x), None].double() for t in view.rope_tables(len(x), x.device))

    def norm(module, h):
        return (
            h
            / (h.square().mean(-1, keepdim=True) + (1e-5 if view.family.name == "LLaDA" else 1e-6)).sqrt()
            * module.weight.double()
        )

    def linear(module, h):
        bias = getattr(module, "bias", None)
        return h @ module.weight.double().T + (0 if bias is None else bias.double())

    def rotate(h):
        a, b = h.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    hidden, kv = view.embed(x).double(), []
    for index, layer in enumerate(view.layers):
        h = norm(layer.attn_norm, hidden)
        q, k, v = (linear(m, h).unflatten(-1, (-1, view.headdim)) for m in (layer.q, layer.k, layer.v))
        q, k = rotate(q), rotate(k)
        if recorded is not None:
            k, v = (
                torch.where(active[:, None, None], new, old) for new, old in zip((k, v), recorded[index], strict=True)
            )
        kv.append((k, v))
        group = view.nheads // view.nheads_k
        scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, 1)) * view.headdim**-0.5
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v.repeat_interleave(group, 1))
        hidden = hidden + linear(layer.o, mixed.flatten(1))
        h = norm(layer.mlp_norm, hidden)
        hidden = hidden + linear(layer.down, F.silu(linear(layer.gate, h)) * linear(layer.up, h))
    return linear(view.head, norm(view.final_norm, hidden)), kv


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_and_layouts_give_the_same_tokens(family, device, monkeypatch):
    """The Triton path on a whole short run (in the interpreter without a GPU), and every CPU's layout of products."""
    ids, real = prompts(5, 3, device=device)
    options = {"gen_length": 3, "block_length": 2, "policy": dkv.Decode(2, warmup_steps=1), "device": device}
    expected = generate(family, ids, real, impl="reference", **options)
    for weight_first, unit in ((range(0), 1), (range(2, 513), 8)):
        monkeypatch.setattr(cpu, "WEIGHT_FIRST_ROWS", weight_first)
        monkeypatch.setattr(cpu, "ROW_MULTIPLE", unit)
        assert torch.equal(generate(family, ids, real, impl="reference", **options).history, expected.history)
    assert torch.equal(generate(family, ids, real, impl="triton", **options).history, expected.history)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "gen_length, block_length, steps",
    [(10, 4, 10), (10, 4, 3), (10, 4, 7), (7, 7, 20), (9, 20, 4), (5, 1, 5), (1, 1, 1), (6, 2, 1)],
)
def test_lengths_and_steps_that_do_not_divide(family, gen_length, block_length, steps, device):
    """Blocks from left to right, the last one shorter; every block gets a step, and every mask is filled."""
    ids, _ = prompts(6, device=device)
    run = generate(family, ids, gen_length=gen_length, block_length=block_length, steps=steps, device=device)
    assert run.sequences.shape == (1, 6 + gen_length) and not (run.sequences == MASK).any()
    blocks = -(-gen_length // min(block_length, gen_length))
    assert run.stats.steps <= max(steps, blocks)
    for x in run.history:
        masks = (x[0, 6:] == MASK).nonzero()[:, 0]
        decoded = (x[0, 6:] != MASK).nonzero()[:, 0]
        if len(masks) and len(decoded):
            assert decoded.max() // block_length <= masks.min() // block_length, "a later block was begun too early"


def test_llada_commits_evenly(device):
    ids, _ = prompts(6, device=device)
    run = generate("llada", ids, gen_length=20, block_length=10, steps=8, device=device)
    left = [20] + (run.history == MASK).sum((1, 2)).tolist()
    assert [before - after for before, after in zip(left, left[1:], strict=False)] == [3, 3, 2, 2, 3, 3, 2, 2]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", [dkv.NoCache(), dkv.Decode(3), dkv.DualCache()], ids=repr)
def test_masks_inside_the_prompt_are_filled_with_the_first_block(family, policy, device):
    ids, real = prompts(9, 6, device=device)
    ids[0, 0] = ids[0, 4] = ids[1, 7] = MASK
    run = generate(family, ids, real, gen_length=8, block_length=4, policy=policy, device=device)
    assert not (run.sequences == MASK).any()
    kept = ids != MASK
    assert torch.equal(run.sequences[:, :9][kept], ids[kept])
    for x in run.history:
        second_block_begun = (x[:, 13:] != MASK).any(1)
        assert not ((x[:, :13] == MASK).any(1) & second_block_begun).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_threshold_and_factor(family, device):
    ids, _ = prompts(8, device=device)
    one_by_one = generate(family, ids, gen_length=16, threshold=1.0, device=device)
    assert one_by_one.stats.steps == 16
    at_once = generate(family, ids, gen_length=16, threshold=1e-6, device=device)
    assert at_once.stats.steps == 1
    steps = [generate(family, ids, gen_length=16, factor=f, device=device).stats.steps for f in (0.01, 2.0, 100.0)]
    assert steps[0] == 16 and steps[-1] == 1 and steps == sorted(steps, reverse=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_ends_at_its_first_end_of_text(family, device):
    ids, _ = prompts(6, 6, device=device)
    plain = generate(family, ids, gen_length=12, block_length=4, device=device)
    end = int(plain.sequences[0, 8])
    run = generate(family, ids, gen_length=12, block_length=4, eos_early_stop=True, eos_token_id=[end], device=device)
    row = run.sequences[0, 6:]
    first = (row == end).nonzero()[0, 0]
    assert first <= 2 and (row[4:] == EOS).all() and run.stats.steps <= plain.stats.steps
    assert not (run.sequences == MASK).any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", [dkv.NoCache(), dkv.Decode(4)], ids=repr)
def test_guidance_changes_the_tokens_of_each_row_alone(family, policy, device):
    """Scale 0 is no guidance; a scale changes tokens; each row of a ragged batch is its own."""
    ids, real = prompts(9, 5, device=device)
    options = {"gen_length": 12, "block_length": 6, "policy": policy, "device": device}
    plain = generate(family, ids, real, **options)
    guided = generate(family, ids, real, cfg_scale=1.5, **options)
    assert not torch.equal(guided.sequences, plain.sequences)
    assert guided.stats.forward_passes == 2 * guided.stats.steps
    for row, start in ((0, 0), (1, 4)):
        alone = generate(family, ids[row : row + 1, start:], cfg_scale=1.5, **options)
        assert torch.equal(guided.sequences[row, start:], alone.sequences[0])


def test_guidance_by_the_formula(device):
    """First commit of an uncached run against un + (s + 1) (cond - un) on the model's own logits."""
    ids, _ = prompts(9, device=device)
    run = generate("llada", ids, gen_length=4, cfg_scale=0.7, policy=dkv.NoCache(), device=device)
    x = F.pad(ids, (0, 4), value=MASK)
    with torch.no_grad():
        cond = model("llada", device)(x).logits
        uncond = model("llada", device)(torch.full_like(x, MASK)).logits
    logits = (uncond + 1.7 * (cond - uncond))[0, 9:]
    logits[:, MASK] = float("-inf")
    best = logits.softmax(-1).amax(-1).argmax()
    assert run.history[0, 0, 9 + best] == logits[best].argmax()


@pytest.mark.parametrize("family", FAMILIES)
def test_excluded_ends_are_never_generated(family, device):
    ids, _ = prompts(6, device=device)
    run = generate(family, ids, gen_length=24, logits_eos_inf=True, device=device)
    assert not (run.sequences[:, 6:] == EOS).any()
    # and of ends that the caller names
    common = int(generate(family, ids, gen_length=24, device=device).sequences[0, 6:].mode().values)
    options = {"gen_length": 24, "logits_eos_inf": True, "confidence_eos_eot_inf": True, "eos_token_id": [common, 7]}
    assert not torch.isin(
        generate(family, ids, device=device, **options).sequences[:, 6:], torch.tensor([common, 7], device=device)
    ).any()
    sampler = prepare(model(family, device), ids, **options).sampler
    assert sampler.unconfident_ids == (common, 7) and set(sampler.excluded_ids) == {MASK, common, 7}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_unconfident_ends_are_committed_last(family, device):
    """With half the vocabulary as ends: only after all masks that predict something else, by the model's own forward."""
    llm, (ids, _), ends = model(family, device), prompts(6, device=device), torch.arange(0, 250, 2, device=device)
    options = {"gen_length": 12, "policy": dkv.NoCache(), "device": device}
    run = generate(family, ids, confidence_eos_eot_inf=True, eos_token_id=ends.tolist(), **options)
    assert not torch.equal(run.history, generate(family, ids, **options).history)
    x, steps_with_ends = F.pad(ids, (0, 12), value=MASK), 0
    for after in run.history:
        logits = llm(x).logits
        logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1) if view_of(llm).family.shifted else logits
        logits[..., MASK] = float("-inf")
        predicted, committed = logits.argmax(-1)[x == MASK], after[x != after]
        if torch.isin(committed, ends).any():
            assert (~torch.isin(committed, ends)).sum() == (~torch.isin(predicted, ends)).sum()
            steps_with_ends += 1
        x = after
    assert 0 < steps_with_ends < len(run.history)


def test_only_noise_draws_from_the_generator(device):
    ids, _ = prompts(6, device=device)
    generator = torch.Generator()
    before = generator.get_state()
    for options, draws in (({}, False), ({"remasking": "random"}, True), ({"temperature": 0.5}, True)):
        dkv.generate(model("llada", device), ids, gen_length=4, generator=generator, **options)
        assert torch.equal(generator.get_state(), before) != draws


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
        {"temperature": 0.8, "cfg_scale": 1.5},
        {"temperature": 0.8, "alg_temp": 0.5, "confidence_eos_eot_inf": True},
        {"alg_temp": 0.5},
        {"remasking": "random"},
        {"remasking": "origin"},
    ],
    ids=str,
)
def test_noise_depends_on_the_generator_alone(family, options, device):
    """The same seed: the same run, whatever padding or other rows there are; another seed: another run."""
    ids, real = prompts(9, 5, device=device)
    options = options | {"gen_length": 8, "policy": dkv.NoCache(), "device": device}

    def run(seed, *inputs):
        return generate(family, *inputs, generator=torch.Generator().manual_seed(seed), **options)

    both = run(0, ids, real)
    assert torch.equal(both.history, run(0, ids, real).history)
    assert not torch.equal(both.history, run(1, ids, real).history)
    padded = F.pad(ids, (3, 0), value=EOS), F.pad(real, (3, 0), value=False)
    assert torch.equal(run(0, *padded).history[:, :, 3:], both.history)
    first = run(0, ids[:1], real[:1]).history
    assert torch.equal(first[:, 0], both.history[: len(first), 0])


@pytest.mark.parametrize("remasking", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rule_fills_every_mask(family, remasking, device):
    ids, real = prompts(9, 5, device=device)
    run = generate(
        family, ids, real, gen_length=16, block_length=8, steps=6, remasking=remasking, top_p=0.9, device=device
    )
    assert not (run.sequences == MASK).any()
    if RULES[remasking].ordered:
        greedy = generate(family, ids, real, gen_length=16, remasking=remasking, policy=dkv.Greedy(2, 2), device=device)
        assert not (greedy.sequences == MASK).any() and greedy.stats.cache_ratio > 0


def test_stats_count_what_the_history_shows(device):
    ids, real = prompts(9, 5, device=device)
    run = generate("llada", ids, real, gen_length=8, policy=dkv.Decode(4), device=device)
    assert run.stats.steps == run.stats.forward_passes == len(run.history) == 8
    assert run.stats.recomputed_tokens == int(run.active.sum())
    assert run.stats.cache_ratio == pytest.approx(1 - int(run.active.sum()) / (8 * (17 + 13)))
    # 17 columns are rounded up to 256
    assert run.stats.peak_cache_bytes == 2 * 3 * 2 * 256 * 4 * 16 * 4
    assert generate("llada", ids, real, gen_length=8, policy=dkv.NoCache(), device=device).stats.cache_ratio == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family, dtype, device):
    """A cached run decodes by logits that are the definition's in float64 but for roundings."""
    half, (ids, _) = copy.deepcopy(model(family, device)).to(dtype), prompts(9, device=device)
    run = dkv.generate(half, ids, gen_length=12, policy=dkv.Decode(4), output_history=True)
    assert run.stats.cache_ratio > 0
    with torch.no_grad():
        largest = half(ids).logits.abs().max().item()
    assert_by_the_definition(half, ids, run, tolerance=4 * torch.finfo(dtype).eps * largest)


def test_the_model_is_left_as_it_was(device):
    ids, _ = prompts(6, device=device)
    before = {name: (p, p.clone()) for name, p in model("llada", device).named_parameters()}
    input_before = ids.clone()
    generate("llada", ids, gen_length=4, device=device)
    for name, p in model("llada", device).named_parameters():
        assert p is before[name][0] and torch.equal(p, before[name][1])
    assert torch.equal(ids, input_before)


IDS = prompts(6, 4)[0]
ORDER = torch.arange(8).repeat(2, 1)
BAD_INPUT = [
    ("list", dict(input_ids=[1, 2]), TypeError, r"input_ids must be an int64 tensor, got list; pass torch.tensor\(\["),
    ("lists", dict(input_ids=([1, 2],)), TypeError, 'tensor, got tuple; pass .* or return_tensors="pt" to the tokeni'),
    ("array", dict(input_ids=IDS.numpy()), TypeError, "input_ids must be an int64 tensor, got ndarray; pass torch.ten"),
    ("text", dict(input_ids="Hi"), TypeError, r"must be an int64 tensor, got str; tokenize first: tokenizer\("),
    ("texts", dict(input_ids=["Hi"]), TypeError, 'got list; tokenize first: .*"pt", padding=True, padding_side="left"'),
    ("float ids", dict(input_ids=IDS.float()), TypeError, "input_ids must be an int64 tensor, got torch.float32"),
    (
        "one dimension",
        dict(input_ids=IDS[0]),
        ValueError,
        r"shape \(batch, prompt_length\).*got \(6,\); pass input_ids\[",
    ),
    ("no row", dict(input_ids=IDS[:0]), ValueError, r"batch not 0, got \(0, 6\)\.$"),
    ("negative id", dict(input_ids=IDS - 300), ValueError, r"input_ids must be in 0 \.\. 255, got -"),
    ("large id", dict(input_ids=IDS + 200), ValueError, r"input_ids must be in 0 \.\. 255"),
    ("device", dict(input_ids=IDS.to("meta")), ValueError, "input_ids must be on the model's device, cpu, got meta"),
    ("mask shape", dict(attention_mask=torch.ones(2, 5)), ValueError, r"shape of input_ids, \(2, 6\), got \(2, 5\)"),
    ("mask values", dict(attention_mask=torch.full((2, 6), 2)), ValueError, "must hold 0 and 1"),
    ("mask list", dict(attention_mask=[[1] * 6] * 2), TypeError, "attention_mask must be a tensor or None, got list"),
    ("mask device", dict(attention_mask=torch.ones(2, 6, device="meta")), ValueError, "attention_mask must be on cpu"),
    ("all padding", dict(attention_mask=torch.tensor([[1] * 6, [0] * 6])), ValueError, r"rows \[1\] are all padding"),
    (
        "zeros inside",
        dict(attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1]] * 2)),
        ValueError,
        r"rows \[0, 1\] have zeros inside",
    ),
    (
        "both sides",
        dict(attention_mask=torch.tensor([[1] * 6, [0, 1, 1, 1, 1, 0]])),
        ValueError,
        r"rows \[1\] have zeros",
    ),
    ("nothing to do", dict(gen_length=0), ValueError, "with gen_length=0 the prompts must hold masks .* no token 255"),
    ("gen_length type", dict(gen_length=8.0), TypeError, "gen_length must be an int, got 8.0"),
    ("too long", dict(gen_length=507), ValueError, r"512 positions, got 6 \+ 507"),
    ("steps 0", dict(steps=0), ValueError, "steps must be at least 1, got 0"),
    ("steps negative", dict(steps=-4), ValueError, "steps must be at least 1, got -4"),
    ("steps type", dict(steps="8"), TypeError, "steps must be an int, got '8'"),
    ("block_length 0", dict(block_length=0), ValueError, "block_length must be at least 1, got 0"),
    (
        "policy type",
        dict(policy=8),
        TypeError,
        r"policy must be a dkv.Policy such as dkv.Decode\(8\), or the name of one, got 8",
    ),
    ("policy name", dict(policy="decode"), ValueError, "policy must be one of .*'NoCache', 'Decode',.* got 'decode'"),
    ("policy class", dict(policy=dkv.Decode), TypeError, "policy must be a dkv.Policy"),
    ("shift for LLaDA", dict(policy=dkv.Decode(4, shift="un")), ValueError, "shift is about Dream's shifted outputs"),
    ("pd shift for LLaDA", dict(policy=dkv.PrefillDecode(4, shift="un")), ValueError, "shift is about Dream's"),
    (
        "greedy by confidence",
        dict(policy=dkv.Greedy()),
        ValueError,
        "must know which masks a step will decode.*'low_confidence'",
    ),
    ("rule", dict(remasking="lowest"), ValueError, "remasking must be one of .*got 'lowest'"),
    ("temperature", dict(temperature=-0.1), ValueError, "temperature must be at least 0, got -0.1"),
    ("temperature nan", dict(temperature=float("nan")), ValueError, "temperature must be at least 0, got nan"),
    ("top_p", dict(top_p=0.0), ValueError, "top_p must be above 0 and at most 1, got 0.0"),
    ("top_p above", dict(top_p=1.5), ValueError, "top_p must be above 0 and at most 1, got 1.5"),
    ("top_k", dict(top_k=-1), ValueError, "top_k must be at least 0, got -1"),
    ("alg_temp", dict(alg_temp=-1.0), ValueError, "alg_temp must be at least 0"),
    ("alg_temp random", dict(alg_temp=1.0, remasking="random"), ValueError, "alg_temp needs a fixed number of commits"),
    ("eps", dict(eps=1.0), ValueError, "eps must be above 0 and below 1, got 1.0"),
    ("cfg_scale", dict(cfg_scale=-1), ValueError, "cfg_scale must be at least 0, got -1"),
    ("threshold", dict(threshold=1.1), ValueError, "threshold must be above 0 and at most 1, got 1.1"),
    ("factor", dict(factor=0), ValueError, "factor must be positive, got 0"),
    ("both", dict(threshold=0.5, factor=1.0), ValueError, "exclude each other"),
    ("threshold and steps", dict(threshold=0.5, steps=4), ValueError, "steps must be None with threshold or factor"),
    (
        "threshold by entropy",
        dict(threshold=0.5, remasking="entropy"),
        ValueError,
        "threshold and factor need remasking",
    ),
    ("mask_id", dict(mask_id=256), ValueError, r"mask_id must be in the vocabulary, 0 \.\. 255, got 256"),
    ("mask_id type", dict(mask_id="[MASK]"), TypeError, "mask_id must be an int"),
    ("generator", dict(generator=3), TypeError, "generator must be a torch.Generator or None, got 3"),
    ("eos_token_id type", dict(eos_token_id=1.5), TypeError, "eos_token_id must be an int"),
    ("no eos_token_id", dict(eos_token_id=[]), ValueError, "a list of at least one, got an empty list"),
    ("eos_token_id", dict(eos_token_id=[3, -1]), ValueError, "eos_token_id must be in the vocabulary"),
    (
        "order shape",
        dict(order=ORDER[:1], remasking="random"),
        ValueError,
        r"\(batch, gen_length\) = \(2, 8\), got \(1, 8\)",
    ),
    ("order type", dict(order=[1], remasking="random"), ValueError, "order must be a tensor.*got list"),
    ("order values", dict(order=ORDER * 0, remasking="random"), ValueError, r"permutation of 0 \.\. 7"),
    (
        "order by confidence",
        dict(order=ORDER),
        ValueError,
        "order is for remasking='random', got remasking='low_confidence'",
    ),
    (
        "order and infilling",
        dict(order=ORDER, remasking="random", input_ids=torch.full((2, 6), MASK)),
        ValueError,
        "inside the prompt",
    ),
    ("impl", dict(impl="cuda"), ValueError, "impl must be one of .*got 'cuda'"),
]


@pytest.mark.parametrize("changes, error, message", [pytest.param(*case[1:], id=case[0]) for case in BAD_INPUT])
def test_bad_input_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        dkv.generate(model("llada"), **(dict(input_ids=IDS, gen_length=8) | changes))


def test_training_mode_and_other_models():
    training = dkv.from_pretrained(oracle.weights_path("llada_mha_s0"), device="cpu").train()
    with pytest.raises(ValueError, match=r"eval mode, got training mode; call model.eval\(\)"):
        dkv.generate(training, IDS)
    with pytest.raises(ValueError, match="Linear is not supported: dkv runs LLaDA"):
        dkv.generate(torch.nn.Linear(2, 2), IDS)


class NoTensorOf(TorchDispatchMode):
    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.made = dtype, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        assert self.dtype not in {t.dtype for t in tensors}, f"{func} made a tensor of the default dtype"
        self.made += len(tensors)
        return result


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"steps": 3, "policy": dkv.Decode(3)},
        {"steps": 3, "remasking": "origin", "policy": dkv.Greedy(3, 2), "cfg_scale": 1.0},
        {"threshold": 0.3, "temperature": 0.7, "top_p": 0.9, "top_k": 40},
        {"steps": 2, "temperature": 0.7, "alg_temp": 0.5, "confidence_eos_eot_inf": True, "eos_early_stop": True},
    ],
    ids=["Decode", "Greedy and guidance", "threshold", "noise"],
)
def test_the_default_dtype_changes_nothing(family, options, default_dtype):
    ids, real = prompts(5, 4)
    want = generate(family, ids, real, gen_length=4, block_length=2, **options)
    dkv.reset(model(family))
    # a kind of its own, which nothing of a float32 model has
    default_dtype(torch.bfloat16)
    with NoTensorOf(torch.bfloat16) as mode:
        found = generate(family, ids, real, gen_length=4, block_length=2, **options)
    assert torch.equal(found.history, want.history) and torch.equal(found.active, want.active) and mode.made > 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_default_dtype_and_schedules(dtype, default_dtype):
    def commits():
        options = {"gen_length": 256, "block_length": 128, "eps": 1e-3}
        return [
            Schedule(steps=256, time_steps=time_steps, **options).commits([0, 3]) for time_steps in (True, False)
        ] + [
            Schedule(steps=None, time_steps=True, gen_length=0, block_length=1, eps=1e-3).commits([40, 100])
        ]  # fmt: skip

    want = commits()
    default_dtype(dtype)
    assert all(map(torch.equal, commits(), want))


@pytest.mark.parametrize(
    "row, masked, warns",
    [
        ([EOS, EOS, 1, 2], False, True),
        ([1, 2, 3, EOS], False, True),
        ([EOS], False, True),
        ([1, EOS, EOS, 2], False, False),
        ([EOS, EOS, 1, 2], True, False),
        ([], False, False),
    ],
    ids=["left", "right", "only", "inside", "with a mask", "empty"],
)
def test_pad_tokens_without_an_attention_mask(row, masked, warns):
    ids = torch.tensor([[1] * len(row), row], dtype=torch.int64)
    mask = ids != EOS if masked else None
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        dkv.generate(model("llada"), ids, mask, gen_length=1)
    assert [w.category for w in found] == [UserWarning] * warns
    message = f"begins or ends with the pad token, {EOS}, in some row and there is no attention_mask"
    assert all(message in str(w.message) and w.filename == __file__ for w in found)


def test_what_a_call_is_given_stays_as_it_is():
    """Also where a policy raises in the middle of it."""

    class FailingInTheMiddle(dkv.Policy):
        def active(self, state):
            if int(state.step[0]) == 2:
                raise KeyError("mine")
            return torch.ones_like(state.masked)

    ids, real = prompts(9, 5, masks=[(0, 1), (0, 5), (0, 9), (1, 3)])
    before = ids.clone(), real.clone()
    for gen_length in (0, 4):
        with pytest.raises(KeyError, match="mine"):
            dkv.generate(model("llada"), ids, real, gen_length=gen_length, policy=FailingInTheMiddle())
    assert torch.equal(ids, before[0]) and torch.equal(real, before[1])
