"""How fast are whole generations: every policy of `dkv.generate` against no cache, on random models.

    python benchmarks/generate_speed.py             LLaDA and Dream of a middle size: every policy at batch 1, and
                                                    NoCache and Decode at batch 4
    python benchmarks/generate_speed.py --quick     batch 1, fewer policies and tokens, one sample each

Random weights, so the tokens mean nothing; what a step costs does not depend on them. In a row, `speedup` is the time
of NoCache over this policy's, in the same run; `cap` is what the operation counts allow: multiplications of the
uncached run over those of the cached one, counted from the positions that each step really recomputed. Pairs of
policies that are the same thing by definition must give the same tokens, or nothing is timed and the exit status is 1.

A table goes to stdout, with one JSON object as its last line; JSON and CSV go to benchmarks/results/<device>/.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import common  # noqa: E402
import torch  # noqa: E402
from common import say  # noqa: E402

import dkv  # noqa: E402
from dkv.decoder import find_decoder  # noqa: E402
from dkv.state import State  # noqa: E402

HIDDEN, MLP, LAYERS, HEADS, VOCABULARY = 512, 1536, 4, 8, 8192
PROMPT, BLOCK, INTERVAL = 256, 32, 8
SPECIAL_TOKENS = {"mask_token_id": VOCABULARY - 1, "eos_token_id": VOCABULARY - 2, "pad_token_id": VOCABULARY - 2}
CONFIGS = {
    "LLaDA": {
        "model_type": "llada",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "activation_type": "silu",
        "rope": True,
        "weight_tying": False,
        "d_model": HIDDEN,
        "mlp_hidden_size": MLP,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "n_kv_heads": HEADS,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "max_sequence_length": 4096,
        "embedding_size": VOCABULARY,
        "vocab_size": VOCABULARY,
        **SPECIAL_TOKENS,
    },
    "Dream": {
        "model_type": "Dream",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        **SPECIAL_TOKENS,
    },
}
POLICIES = {
    "NoCache": dkv.NoCache(),
    "Decode": dkv.Decode(INTERVAL),
    "Decode, block": dkv.Decode(INTERVAL, scope="block"),
    "Greedy": dkv.Greedy(2, 4),
    "Prefill": dkv.Prefill(),
    "PrefillDecode": dkv.PrefillDecode(4),
    "PrefixCache": dkv.PrefixCache(),
    "DualCache": dkv.DualCache(),
}
QUICK = ("NoCache", "Decode", "DualCache")
# the same thing by definition: the same tokens, or the run is worth nothing
EXACT_PAIRS = [(dkv.NoCache(), dkv.Decode(1)), (dkv.Prefill(), dkv.PrefillDecode(1))]


def operations(decoder, output, block_length):
    """Multiply-adds times two of the run, for the positions and candidates that its steps really had."""
    x = torch.cat((output.sequences[:, :PROMPT], torch.full_like(output.sequences[:, PROMPT:], decoder.mask_id)), dim=1)
    state = State(
        x,
        mask_id=decoder.mask_id,
        real=torch.ones_like(x, dtype=torch.bool),
        first_generated=torch.full((len(x), 1), PROMPT, device=x.device),
        block_length=block_length,
        shifted=decoder.family.shifted,
    )
    kv_size = decoder.nheads_k * decoder.headdim
    per_token = 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * kv_size + 3 * HIDDEN * MLP)
    per_token += 4 * x.shape[1] * HIDDEN
    total = 0
    for after, active in zip(output.history, output.active, strict=True):
        total += LAYERS * per_token * int(active.sum()) + 2 * HIDDEN * VOCABULARY * int(state.in_block.sum())
        state.advance(after)
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--budget", type=float, default=600, help="seconds; no new sample or model is begun after them")
    parser.add_argument("--out", type=Path, help="folder for the files; default benchmarks/results/<device>")
    arguments = parser.parse_args()
    plan = {1: QUICK} if arguments.quick else {1: tuple(POLICIES), 4: ("NoCache", "Decode")}
    generated, samples = (64, 1) if arguments.quick else (128, 2)
    environment, device = common.environment(), common.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    impl = "Triton kernels" if device.type == "cuda" else "PyTorch implementation"
    say(f"{environment['device']}, {impl}, {str(dtype).removeprefix('torch.')}, commit {environment['commit']}")
    say(
        f"hidden {HIDDEN}, {LAYERS} layers, {HEADS} heads, vocabulary {VOCABULARY}; prompt "
        f"{PROMPT} + {generated} tokens, one a step; LLaDA in blocks of {BLOCK}, Dream in one"
    )
    heads = ("seconds", 9), ("tokens/s", 10), ("from cache", 12), ("speedup", 9), ("cap", 8), ("of cap", 8)
    say(f"\n{'model':7}{'batch':>5}  {'policy':16}" + "".join(f"{head:>{width}}" for head, width in heads))
    rows, clock = [], common.Clock(arguments.budget)
    models = {f: dkv.models.from_config(c, dtype=dtype, device=device).eval() for f, c in CONFIGS.items()}
    for batch, names in plan.items():
        for family, model in models.items():
            if clock.left < 0:
                say(f"{family}, batch {batch}: not run, the budget is used up")
            else:
                rows += measure(model, family, batch, generated, names, samples, clock)
    record = {**environment, "impl": impl, "dtype": str(dtype).removeprefix("torch."), "rows": rows}
    if not arguments.quick:
        out = arguments.out or common.RESULTS / common.device_slug()
        common.write_json(out / "generate_speed.json", record)
        common.write_csv(out / "generate_speed.csv", rows)
    print(json.dumps(common.rounded({k: record[k] for k in ("device", "impl", "torch", "triton", "commit", "rows")})))


def measure(model, family, batch, generated, names, samples, clock):
    """Runs every policy once to warm up and count, then times them in turn; returns the rows and prints them."""
    prompt = torch.randint(0, VOCABULARY - 2, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    prompt, block_length = prompt.to(common.device()), BLOCK if family == "LLaDA" else None

    def run(policy, gen_length=generated, **options):
        return dkv.generate(
            model,
            prompt,
            gen_length=gen_length,
            block_length=block_length,
            policy=policy,
            remasking="random" if policy.needs_order else None,
            generator=torch.Generator().manual_seed(0),
            **options,
        )

    for one, other in EXACT_PAIRS if model.dtype == torch.float32 else ():
        if not torch.equal(run(one, 8).sequences, run(other, 8).sequences):
            sys.exit(f"{family}: {one!r} and {other!r} must give the same tokens and do not; nothing is timed")
    counts, ratios, seconds = {}, {}, {name: [] for name in names}
    for name in names:
        output = run(POLICIES[name], output_history=True)
        counts[name] = operations(find_decoder(model), output, block_length)
        ratios[name] = output.stats.cache_ratio
    for sample in common.progress(range(samples), family):
        if sample and clock.left < 0:
            break
        for name in names:
            begin = time.perf_counter()
            run(POLICIES[name])
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = []
    for name in names:
        speedup, cap = medians["NoCache"] / medians[name], counts["NoCache"] / counts[name]
        rows.append(
            {
                "model": family,
                "system": "dkv",
                "policy": repr(POLICIES[name]),
                "batch": batch,
                "prompt": PROMPT,
                "gen_length": generated,
                "seconds": medians[name],
                "seconds_min": min(seconds[name]),
                "seconds_max": max(seconds[name]),
                "tokens_per_s": batch * generated / medians[name],
                "cache_ratio": ratios[name],
                "speedup": speedup,
                "cap": cap,
                "fraction_of_cap": speedup / cap,
                "device": common.device_name(),
            }
        )
        say(
            f"{family:7}{batch:5}  {name:16}{medians[name]:9.3f}{batch * generated / medians[name]:10.1f}"
            f"{ratios[name]:12.0%}"
            f"{speedup:8.2f}x{cap:7.2f}x{speedup / cap:8.0%}"
        )
    return rows


if __name__ == "__main__":
    main()
