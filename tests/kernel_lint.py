"""Compiles the kernels ahead of time for every supported GPU, without one, and checks the result.

    python tests/kernel_lint.py                        the tuned cases, for sm_80 and sm_90
    python tests/kernel_lint.py --all                  every launch that the tables of dkv.kernels.configs can pick
    python tests/kernel_lint.py --all --baseline       and keeps their figures

Each case calls the real launcher with fake CUDA tensors of true model shapes. Its launch is recorded, and compiled with
the specialisation that Triton's JIT would give it. A case fails if

    registers spill inside the loop, or more than in the baseline (outside the loop spills cost little)
    shared memory exceeds the architecture's limit
    streamed tensors (K and V, weights, rows) are not loaded 16 bytes at a time
    a matrix product misses the tensor cores (on Hopper: wgmma, from 64 rows on), or uses them in float32
    the merge of key splits waits for some of its loads before it issues the others
    a kernel with PDL reads or writes memory before it has waited for the one in front

The baseline is in tests/data/compile/, for each Triton version, because registers and spills depend on it. The exit
status is 1 if a case fails.
"""

import argparse
import collections
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import models
from benchmarks.harness.launches import ARCHITECTURES, Architecture, Launch, compile_launch, on_gpu, recording
from dkv.kernels import (
    activation,
    active,
    advance,
    attention,
    checks,
    commit,
    configs,
    gate_up,
    lm_head,
    norm,
    packing,
    qkv,
    reference,
    residual,
    rope_cache,
)
from dkv.kernels.rows import Counter, Rule, Size
from dkv.models.layout import ModelConfig

BASELINES = Path(__file__).resolve().parent / "data" / "compile"
TUNED_ARCHS = (80, 90)
REGISTERS_PER_SM = 65536
# griddepcontrol.wait in machine code
WAIT = "ACQBULK"
# the tiles that each kernel streams in one turn of its loop: from these pointers, of these sizes
STREAMED_TILES = {
    "delayed_attention": [(("k_ptr", "v_ptr"), ("BLOCK_N", "HEADDIM"))],
    "merge_splits": [(("partial_out_ptr",), ("SPLITS", "BLOCK_M", "HEADDIM"))],
    # a tile is one half of a head
    "rope_cache": [(("q_ptr", "k_ptr", "v_ptr") * 2, ("BLOCK_T", "BLOCK_H", "HALF"))],
    "add_rms_norm": [(("x_ptr", "residual_ptr", "weight_ptr"), ("BLOCK",))],
    # one tile of gate, one of up
    "swiglu": [(("gate_up_ptr",) * 2, ("BLOCK",))],
    "lm_head": [(("weight_ptr",), ("BLOCK_V", "BLOCK_D")), (("hidden_ptr",), ("BLOCK_R", "BLOCK_D"))],
    "deferred_norm": [(("x_ptr", "weight_ptr"), ("BLOCK",))],
    "linear_rope_cache": [(("weight_ptr",) * 2, ("HALF", "BLOCK_K")), (("x_ptr",), ("BLOCK_R", "BLOCK_K"))],
    "linear_swiglu": [(("weight_ptr",) * 2, ("BLOCK_N", "BLOCK_K")), (("x_ptr",), ("BLOCK_R", "BLOCK_K"))],
    "linear_add_norm": [(("weight_ptr",), ("BLOCK_N", "BLOCK_K")), (("x_ptr",), ("BLOCK_R", "BLOCK_K"))],
}
PRODUCTS = ("linear_rope_cache", "linear_swiglu", "linear_add_norm")
# these kernels cost only latency: their loads must be in flight at the same time
ONE_TRIP_TO_MEMORY = ("merge_splits",)
# family -> dkv's ModelConfig
MODELS = {family: models.MODELS[name] for family, (name, _) in models.TRUE_SIZE.items()}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def streamed_bytes(launch: Launch) -> tuple[int, int]:
    """(bytes that each thread streams in one turn, bytes that one load can bring, at most 16).

    Tensors without elements do not count, nor tiles too small for loads of that many bytes.
    """
    threads = 32 * launch.arguments.get("num_warps", 4)
    tiles = []
    for pointers, sizes in STREAMED_TILES.get(launch.name, ()):
        elements = math.prod(launch.arguments[size] for size in sizes)
        given = [launch.arguments[name] for name in pointers if launch.arguments[name] is not None]
        tiles += [elements * pointer.dtype.itemsize // threads for pointer in given if pointer.elements]
    load_bytes = min(16, max(tiles, default=16))
    return sum(tile for tile in tiles if tile >= load_bytes), load_bytes


def matrix_rows(launch: Launch) -> int | None:
    """Rows of the left operand of its matrix products; None for a kernel without them."""
    if launch.name == "lm_head":
        return launch.arguments["BLOCK_V" if launch.arguments["VOCAB_FIRST"] else "BLOCK_R"]
    if launch.name in PRODUCTS:
        return launch.arguments["HALF" if launch.name == "linear_rope_cache" else "BLOCK_N"]
    return launch.arguments["BLOCK_M"] if launch.name == "delayed_attention" else None


def _call_attention(
    empty, *, d=128, heads=(32, 32), queries=8, splits=1, bounds=True, key_mask=False, key_index=False, pdl=False
):
    with _with_pdl(pdl):
        _launch_attention(empty, d, heads, queries, splits, bounds, key_mask, key_index)


def _launch_attention(empty, d, heads, queries, splits, bounds, key_mask, key_index):
    batch, seqlen_cache = 2, 1024
    k_cache, v_cache = (empty(batch, seqlen_cache, heads[1], d) for _ in "kv")
    attention._launch(
        q=empty(batch * queries, heads[0], d),
        k_cache=k_cache,
        v_cache=v_cache,
        cu_seqlens_q=empty(batch + 1, dtype=torch.int32),
        max_seqlen_q=queries,
        cache_leftpad=empty(batch, dtype=torch.int32) if bounds else None,
        cache_seqlens=empty(batch, dtype=torch.int32) if bounds else None,
        key_mask=empty(batch, seqlen_cache, dtype=torch.bool) if key_mask else None,
        key_index=empty(batch, seqlen_cache // 2, dtype=torch.int32) if key_index else None,
        softmax_scale=d**-0.5,
        num_splits=splits,
    )


def _call_rope(empty, *, d=128, heads=(32, 32)):
    total, nheads, nheads_k = 16, *heads
    # as one QKV product returns them
    q, k, v = empty(total, nheads + 2 * nheads_k, d).split([nheads, nheads_k, nheads_k], dim=1)
    k_cache, v_cache = (empty(2, 1024, nheads_k, d) for _ in "kv")
    cos, sin = (empty(1024, d // 2, dtype=torch.float32) for _ in "cs")
    positions, slots = (empty(total, dtype=torch.int64) for _ in "ps")
    rope_cache._launch(q, k, v, cos, sin, positions, slots, k_cache, v_cache)


def _call_norm(empty, *, d=4096, residual=True):
    norm._launch(empty(16, d), empty(16, d) if residual else None, empty(d), 1e-5)


def _call_swiglu(empty, *, d=12288):
    activation._launch(empty(16, 2 * d))


def _call_deferred_norm(empty, *, d=4096):
    norm._launch_deferred_norm(empty(16, d), empty(d))


def _deferred(empty, rows, d):
    return reference.DeferredNorm(empty(rows, d), empty(-(-d // reference.PART), rows, dtype=torch.float32))


def _call_linear_rope(empty, *, d=4096, heads=(32, 32), headdim=128, rows=16, splits=None, pdl=False):
    nheads, nheads_k = heads
    weight = empty((nheads + 2 * nheads_k) * headdim, d)
    k_cache, v_cache = (empty(2, 1024, nheads_k, headdim) for _ in "kv")
    cos, sin = (empty(1024, headdim // 2, dtype=torch.float32) for _ in "cs")
    places = [empty(rows, dtype=torch.int64) for _ in "ps"]
    # biases as Dream has them
    bias = empty(weight.shape[0]) if nheads != nheads_k else None
    with _with_pdl(pdl):
        config = _split("qkv", rows, weight, splits)
        qkv._launch(_deferred(empty, rows, d), 1e-5, weight, bias, cos, sin, *places, k_cache, v_cache, config=config)


def _call_linear_swiglu(empty, *, d=4096, mlp=12288, rows=16, splits=None, pdl=False):
    weight = empty(2 * mlp, d)
    with _with_pdl(pdl):
        gate_up._launch(_deferred(empty, rows, d), 1e-5, weight, config=_split("gate_up", rows, weight, splits))


def _call_linear_add(empty, *, d=4096, mlp=12288, rows=16, splits=None, pdl=False):
    weight = empty(d, mlp)
    with _with_pdl(pdl):
        config = _split("residual", rows, weight, splits)
        residual._launch(empty(rows, mlp), weight, empty(rows, d), empty(d), config=config)


def _split(kind, rows, weight, splits):
    """The config of the tables, with so many splits."""
    config = configs.product_config(weight.device, weight.dtype, kind, rows, weight.shape)
    return config if splits is None else replace(config, splits=splits)


def _with_pdl(pdl):
    return mock.patch.object(configs, "PDL", pdl)


def _call_lm_head(empty, *, d=4096, vocab=126464, rows=16, noise=False, round_logits=False, scales=False):
    lm_head._launch(
        empty(rows, d),
        empty(vocab, d),
        logit_scale=empty(rows, dtype=torch.float32) if scales else 1.0,
        noise_scale=empty(rows, dtype=torch.float32) if scales and noise else float(noise),
        noise_key=empty(rows, dtype=torch.int64) if noise else None,
        exclude_ids=(vocab - 1,),
        round_logits=round_logits,
        # compiles to the same kernel as None
        cu_seqlens=empty(3, dtype=torch.int32),
    )


def _call_commit(empty, *, rule="counts", limits=False):
    batch, seqlen, total = 2, 1024, 64
    tokens, slots = (empty(total, dtype=torch.int64) for _ in "ts")
    counts = empty(batch, dtype=torch.int64) if rule == "counts" else None
    limit = empty(batch) if limits else 0.9
    x, cu_seqlens = empty(batch, seqlen, dtype=torch.int64), empty(batch + 1, dtype=torch.int32)
    options = {"counters": empty(batch, len(Counter), dtype=torch.int64)} | ({} if rule == "counts" else {rule: limit})
    commit._launch(x, tokens, empty(total), slots, cu_seqlens, counts, **options)


def _call_packing(empty, *, step=False, noisy=False):
    if not step:
        packing._launch(empty(2, 1024, dtype=torch.bool), 64)
        return
    flags, ints = (empty(2, 1024, dtype=dtype) for dtype in (torch.bool, torch.int64))
    sizes, counters = empty(2, len(Size), dtype=torch.int32), empty(2, len(Counter), dtype=torch.int64)
    excess = empty(dtype=torch.int64)
    options = {"capacity": 64, "candidate_capacity": 32, "per_row": 32, "shifted": True, "noisy": noisy}
    packing._launch_pack_step(flags, flags, sizes, ints, ints, counters, excess, **options)


def _call_advance(empty, *, seqlen=1024, ends=False):
    x, flags = empty(2, seqlen, dtype=torch.int64), empty(2, seqlen, dtype=torch.bool)
    decoded_step, counters = empty(2, seqlen, dtype=torch.int32), empty(2, len(Counter), dtype=torch.int64)
    commits, counts = empty(2, 4, 32, dtype=torch.int64), empty(2, dtype=torch.int64)
    end_ids = empty(2, dtype=torch.int64) if ends else None
    advance._launch(
        x, decoded_step, counters, flags, mask_id=7, commits=commits, counts=counts, end_ids=end_ids, pad_id=7
    )


def _call_active(empty, *, seqlen=1024, stable="both", shifted=True):
    flags, decoded_step = empty(2, seqlen, dtype=torch.bool), empty(2, seqlen, dtype=torch.int32)
    sizes, totals = empty(2, len(Size), dtype=torch.int32), empty(2, 2, dtype=torch.int64)
    counters = empty(2, len(Counter), dtype=torch.int64)
    rule = Rule(warmup=1, interval=8, stable=stable, window=4, frozen_prompt=True, until_block_end=True)
    arguments = decoded_step, flags, flags, counters, flags, sizes, totals
    active._launch(*arguments, shifted=shifted, rule=rule, rank=decoded_step, foresee=stable != "others")


# how to call the launcher of a kernel; the keyword arguments are the options of a `LintCase`, d is the size of a row
CALLS = {
    "delayed_attention": _call_attention,
    "merge_splits": _call_attention,
    "rope_cache": _call_rope,
    "add_rms_norm": _call_norm,
    "swiglu": _call_swiglu,
    "deferred_norm": _call_deferred_norm,
    "linear_rope_cache": _call_linear_rope,
    "linear_swiglu": _call_linear_swiglu,
    "linear_add_norm": _call_linear_add,
    "lm_head": _call_lm_head,
    "merge_confidence": _call_lm_head,
    "commit_tokens": _call_commit,
    "pack_positions": _call_packing,
    "advance_rows": _call_advance,
    "active_positions": _call_active,
}


class LintCase:
    """One kernel of one call of a launcher; `str` gives its name in the baseline."""

    def __init__(self, kernel: str, arch: int, dtype: str = "bf16", **options: Any):
        self.kernel, self.arch, self.dtype = kernel, arch, dtype
        self.options = (CALLS[kernel].__kwdefaults__ or {}) | options

    def __str__(self):
        words = [self.dtype]
        for name, value in self.options.items():
            if isinstance(value, bool):
                words += [name] if value else []
            else:
                words.append(f"{name} {'/'.join(map(str, value)) if isinstance(value, tuple) else value}")
        return " ".join(words)

    @property
    def tensor_cores(self) -> bool:
        """Whether it multiplies matrices in 16 bits; float32 products must stay off the tensor cores (TF32)."""
        return self.kernel in ("delayed_attention", "lm_head", *PRODUCTS) and self.dtype != "fp32"

    def record(self) -> Launch:
        """The launch of this kernel, as its launcher makes it."""
        if not isinstance(attention._delayed_attention_kernel, JITFunction):
            raise RuntimeError("the kernels are interpreted in this process (TRITON_INTERPRET=1); use workers()")

        def empty(*shape, dtype=None):
            return torch.empty(shape, dtype=dtype or DTYPES[self.dtype], device="cuda:0")

        with recording(self.arch) as launches:
            CALLS[self.kernel](empty, **self.options)
        return next(launch for launch in launches if launch.name == self.kernel)


def max_rows(arch: int, pick: Callable, bound: int = 512) -> list[int]:
    """For every config that `pick(device, rows)` returns, the maximum of rows (up to `bound`) that it is picked for."""
    rows = {}
    with on_gpu(arch):
        for count in range(1, bound + 1):
            rows[pick(torch.device("cuda:0"), count)] = count
    return list(rows.values())


def tile_queries(arch: int, dtype: str, group: int) -> list[int]:
    """For every tile of attention that the table can pick, the maximum of queries (of `group` heads each)."""

    def pick(device, queries):
        return configs.attention_config(device, DTYPES[dtype], queries * group)

    return max_rows(arch, pick, 512 // group)


def heads_of(model: ModelConfig) -> tuple[int, int]:
    return model.nheads, model.nheads_k


def attention_cases(arch: int, model: str, dtype: str = "bf16", **options: Any) -> list[LintCase]:
    heads = heads_of(MODELS[model])
    return [
        LintCase("delayed_attention", arch, dtype, heads=heads, queries=queries, **options)
        for queries in tile_queries(arch, dtype, heads[0] // heads[1])
    ]


def product_cases(arch: int, model: str, dtype: str = "bf16", **options: Any) -> list[LintCase]:
    """Every tile of the products that the table can pick."""
    sizes, cases = MODELS[model], []
    for kernel, kind, own in (
        ("linear_rope_cache", "qkv", {"heads": heads_of(sizes)}),
        ("linear_swiglu", "gate_up", {"mlp": sizes.mlp_size}),
        ("linear_add_norm", "residual", {"mlp": sizes.mlp_size}),
    ):

        def pick(device, rows, kind=kind):
            # with so many features no channels are split
            return configs.product_config(device, DTYPES[dtype], kind, rows, (2**20, sizes.hidden_size))

        for rows in max_rows(arch, pick, configs.MAX_PRODUCT_ROWS):
            cases.append(LintCase(kernel, arch, dtype, d=sizes.hidden_size, rows=rows, **own, **options))
    return cases


def head_rows(arch: int, dtype: str, noise: bool) -> list[int]:
    """For every tile of the LM head that the table can pick, the maximum of rows."""
    return max_rows(arch, lambda device, rows: configs.lm_head_config(device, DTYPES[dtype], rows, noise))


def head_cases(arch: int, model: str, dtype: str = "bf16", noise: bool = False, **options: Any) -> list[LintCase]:
    sizes = {"d": MODELS[model].hidden_size, "vocab": MODELS[model].vocab_size, "noise": noise, **options}
    return [LintCase("lm_head", arch, dtype, rows=rows, **sizes) for rows in head_rows(arch, dtype, noise)]


def tuned_cases(archs: tuple[int, ...] = TUNED_ARCHS) -> list[LintCase]:
    """bfloat16, headdim 128: every tile, with splits and without noise for LLaDA, the other way round for Dream."""
    cases = []
    for arch in archs:
        for name, model in MODELS.items():
            llada = name == "LLaDA"
            cases += attention_cases(arch, name, splits=4 if llada else 1)
            cases.append(LintCase("merge_splits", arch, heads=heads_of(model), splits=4))
            cases.append(LintCase("rope_cache", arch, heads=heads_of(model)))
            cases.append(LintCase("add_rms_norm", arch, d=model.hidden_size))
            cases.append(LintCase("swiglu", arch, d=model.mlp_size))
            cases += product_cases(arch, name, splits=1 if llada else 4, pdl=arch >= 90 and llada)
            if arch >= 90:
                options = {"heads": heads_of(model), "queries": 32, "splits": 4, "pdl": True}
                cases += [LintCase(kernel, arch, **options) for kernel in ("delayed_attention", "merge_splits")]
            cases.append(LintCase("deferred_norm", arch, d=model.hidden_size))
            cases += head_cases(arch, name, noise=not llada)
            cases.append(
                LintCase("merge_confidence", arch, d=model.hidden_size, vocab=model.vocab_size, noise=not llada)
            )
        cases.append(LintCase("commit_tokens", arch, "fp32"))
        cases += [LintCase("pack_positions", arch, "bool", step=step) for step in (False, True)]
        cases += [LintCase(name, arch, "bool") for name in ("advance_rows", "active_positions")]
    return cases


def all_cases(archs: tuple[int, ...] = tuple(ARCHITECTURES)) -> list[LintCase]:
    """Every tile of every table, with every option, dtype and headdim, though not with all their combinations."""
    cases = tuned_cases(archs)
    for arch in archs:
        cases += attention_cases(arch, "LLaDA") + attention_cases(arch, "Dream", splits=4)
        for options in ({"bounds": False}, {"key_mask": True}, {"key_index": True}):
            cases += attention_cases(arch, "Dream", **options)
        cases += head_cases(arch, "LLaDA", noise=True) + head_cases(arch, "Dream", round_logits=True)
        cases += product_cases(arch, "LLaDA", splits=4, pdl=arch >= 90)
        cases += head_cases(arch, "LLaDA", scales=True) + head_cases(arch, "Dream", noise=True, scales=True)
        cases += [
            LintCase("commit_tokens", arch, "fp32", rule=rule, limits=limits)
            for rule in ("threshold", "factor")
            for limits in (False, True)
        ]
        cases.append(LintCase("pack_positions", arch, "bool", step=True, noisy=True))
        for seqlen in (256, 16384):
            cases.append(LintCase("advance_rows", arch, "bool", seqlen=seqlen, ends=True))
            for stable, shifted in (("decoded", False), ("next", True), ("others", True)):
                cases.append(LintCase("active_positions", arch, "bool", seqlen=seqlen, stable=stable, shifted=shifted))
        # keys and values alone, queries alone
        cases += [LintCase("rope_cache", arch, heads=heads) for heads in ((0, 4), (28, 0))]
        for dtype in DTYPES:
            cases.append(LintCase("add_rms_norm", arch, dtype, d=8192))
            cases.append(LintCase("add_rms_norm", arch, dtype, residual=False))
            if dtype != "bf16":
                cases += [LintCase("add_rms_norm", arch, dtype, d=model.hidden_size) for model in MODELS.values()]
                cases += [LintCase("swiglu", arch, dtype, d=model.mlp_size) for model in MODELS.values()]
                cases += product_cases(arch, "Dream", dtype, splits=4)
                cases.append(LintCase("deferred_norm", arch, dtype))
                cases += head_cases(arch, "LLaDA", dtype) + head_cases(arch, "Dream", dtype, noise=True)
            for d in checks.HEADDIMS:
                if (dtype, d) != ("bf16", 128):
                    cases += attention_cases(arch, "Dream", dtype, d=d)
                    cases += attention_cases(arch, "LLaDA", dtype, d=d, splits=4, key_mask=True, key_index=True)
                    cases.append(LintCase("merge_splits", arch, dtype, d=d, splits=4))
                    cases.append(LintCase("rope_cache", arch, dtype, d=d))
                    cases.append(LintCase("linear_rope_cache", arch, dtype, headdim=d))
    return cases


@dataclass
class LintRow:
    """The compiled kernel of one case for one architecture; sizes in bytes."""

    kernel: str
    case: str
    arch: int
    matrix_rows: int | None
    tile: str
    registers: int
    stack: int
    loop_spills: int
    shared: int
    blocks: int
    tensor_core_instructions: dict
    load_bytes: int
    wide_share: float
    instructions: int
    failures: list
    changes: list = field(default_factory=list)
    late_share: float = 0.0
    accesses_before_wait: int = 0

    @property
    def key(self) -> str:
        return f"{self.kernel} {self.case} sm_{self.arch}"


def inspect(launch: Launch, arch: int, *, case: str = "", tensor_cores: bool = False) -> LintRow:
    """Compiles a launch for `arch` and returns its checked `LintRow`; `tensor_cores` as in `LintCase`."""
    compiled = compile_launch(launch, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run_tool(triton.knobs.nvidia.cuobjdump, "-res-usage", cubin)
        sass = Sass(_run_tool(triton.knobs.nvidia.nvdisasm, "-c", "-ndf", cubin))
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    streamed, load_bytes = streamed_bytes(launch)
    sizes = [value for name, value in launch.arguments.items() if re.match("BLOCK|COLUMNS", name)]
    stages = f" st{launch.arguments['num_stages']}" if "num_stages" in launch.arguments else ""
    row = LintRow(
        kernel=launch.name,
        case=case,
        arch=arch,
        matrix_rows=matrix_rows(launch),
        tile="x".join(map(str, sizes)) + f" w{launch.arguments.get('num_warps', 4)}{stages}",
        registers=registers,
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        loop_spills=sass.loop_spills,
        shared=shared,
        blocks=resident_blocks(ARCHITECTURES[arch], registers, shared, warps),
        tensor_core_instructions=sass.tensor_core_instructions,
        load_bytes=load_bytes,
        wide_share=min(1.0, sass.wide_bytes(load_bytes) / streamed) if streamed else 1.0,
        instructions=len(sass.opcodes),
        failures=[],
        late_share=sass.late_loads / len(sass.loads) if sass.loads else 0.0,
        accesses_before_wait=sass.accesses_before_wait if launch.arguments.get("launch_pdl") else 0,
    )
    row.failures = check(row, tensor_cores)
    return row


def _run_tool(tool, *arguments):
    return subprocess.run([tool.path, *arguments], check=True, text=True, capture_output=True).stdout


class Sass:
    """The facts that the checks need about a kernel's machine code, as nvdisasm prints it."""

    def __init__(self, text: str):
        self.opcodes, registers, loops, labels = [], [], [], {}
        for line in text.splitlines():
            if label := re.match(r"(\.L\w+):", line):
                labels[label[1]] = len(self.opcodes)
            instruction = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*)", line)
            if instruction is None:
                continue
            registers.append([int(number) for number in re.findall(r"\bR(\d+)", instruction[2])])
            target = re.search(r"`\((\.L\w+)\)", line) if instruction[1].startswith("BRA") else None
            if target and target[1] in labels:
                loops.append(range(labels[target[1]], len(self.opcodes)))
            self.opcodes.append(instruction[1])
        # a wait laid out behind a loop jumps back into it: the code between is no loop
        loops = [loop for loop in loops if not any(o.start < loop.start < o.stop < loop.stop for o in loops)]
        # loops without a load at most clear outputs
        loops = [loop for loop in loops if any(_is_load(self.opcodes[i]) for i in loop)]
        in_loops = self._opcodes_in(loops)
        innermost = [loop for loop in loops if not any(loop.start < other.start < loop.stop for other in loops)]
        self.loads = [_load_bytes(op) for op in self._opcodes_in(innermost) or self.opcodes if _is_load(op)]
        self.late_loads = len(self.loads) if loops else _late_loads(self.opcodes, registers)
        self.accesses_before_wait = sum(map(_touches_memory, itertools.takewhile(WAIT.__ne__, self.opcodes)))
        self.loop_spills = sum(op.split(".")[0] in ("LDL", "STL") for op in in_loops)
        self.tensor_core_instructions = dict(
            collections.Counter(op.split(".")[0] for op in self.opcodes if re.match(r"(HMMA|HGMMA|UTC\w*MMA)\b", op))
        )

    def _opcodes_in(self, loops):
        return [self.opcodes[i] for i in sorted({i for loop in loops for i in loop})]

    def wide_bytes(self, load_bytes: int) -> int:
        """Bytes that a thread loads by instructions of at least `load_bytes`, in the innermost loops if there are any."""
        return sum(width for width in self.loads if width >= load_bytes)


def _late_loads(opcodes, registers):
    """How many loads of straight code are issued only after a wait for the result of another load.

    `registers` has the registers that each instruction names; it writes the first of them.
    """
    in_flight = set()
    for i, (opcode, named) in enumerate(zip(opcodes, registers, strict=True)):
        target = named[:1] if opcode.startswith("LDG.") else []
        if in_flight.intersection(named[len(target) :]):
            return sum(map(_is_load, opcodes[i:]))
        for first in target:
            in_flight.update(range(first, first + max(1, _load_bytes(opcode) // 4)))
    return 0


def _is_load(opcode):
    return opcode.split(".")[0] in ("LDG", "LDGSTS", "UTMALDG")


def _touches_memory(opcode):
    """Whether it reads or writes global memory; a prefetch (CCTL) does neither."""
    return _is_load(opcode) or opcode.split(".")[0] in ("LD", "ST", "STG", "ATOM", "ATOMG", "RED", "REDG", "UTMASTG")


def _load_bytes(opcode):
    """Bytes that a thread loads; a copy of the tensor memory accelerator counts as more than any tile."""
    name, *modifiers = opcode.split(".")
    widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return 4096 if name == "UTMALDG" else next((widths[m] for m in modifiers if m in widths), 4)


def resident_blocks(architecture: Architecture, registers: int, shared: int, warps: int) -> int:
    """Blocks that fit on one SM; a warp gets registers 256 at a time, a block needs 1 KiB more than it asks for."""
    warps_by_registers = REGISTERS_PER_SM // (-(-registers // 8) * 8 * 32) // 4 * 4
    return min(
        min(warps_by_registers, architecture.warps) // warps,
        architecture.shared_per_sm * 1024 // (shared + 1024),
        architecture.blocks,
    )


def check(row: LintRow, tensor_cores: bool) -> list[str]:
    """The defects of a row, in words."""
    failures = []
    if row.loop_spills:
        failures.append(f"{row.loop_spills} spills inside loops ({row.stack} B of stack)")
    limit = ARCHITECTURES[row.arch].shared_per_block
    if row.shared > limit * 1024:
        failures.append(f"{row.shared / 1024:.0f} KiB of shared memory, sm_{row.arch} has {limit}")
    if row.wide_share < 1.0:
        failures.append(f"only {row.wide_share:.0%} of the streamed bytes come in loads of {row.load_bytes}")
    # the compiler may interleave the last loads with the first waits
    if row.kernel in ONE_TRIP_TO_MEMORY and row.late_share > 0.1:
        failures.append(f"{row.late_share:.0%} of the loads are issued after a wait for others")
    if row.accesses_before_wait:
        failures.append(f"{row.accesses_before_wait} of its accesses to memory are before its wait")
    kinds = set(row.tensor_core_instructions)
    if tensor_cores and not kinds:
        failures.append("no tensor-core instruction")
    elif tensor_cores and row.arch == 90 and (row.matrix_rows or 0) >= 64 and kinds != {"HGMMA"}:
        failures.append(f"{' and '.join(sorted(kinds))} where wgmma is possible")
    elif kinds and not tensor_cores:
        failures.append(f"{' and '.join(sorted(kinds))} in a kernel that must be exact in float32")
    return failures


def compare(row: LintRow, baseline: dict[str, dict]) -> None:
    """Notes in a row what changed since the baseline; more spills, even outside loops, are a failure."""
    old = baseline.get(row.key)
    if old is None:
        row.changes = ["new"] if baseline else []
        return
    for name, unit in (("registers", ""), ("shared", " B")):
        if getattr(row, name) != old[name]:
            row.changes.append(f"{name} {getattr(row, name) - old[name]:+}{unit}")
    if row.stack > old["stack"]:
        row.failures.append(f"spills {row.stack} B, before {old['stack']} B")


def lint_case(case: LintCase) -> LintRow:
    """The checked row of a case; one that does not compile has a failure."""
    try:
        return inspect(case.record(), case.arch, case=str(case), tensor_cores=case.tensor_cores)
    except Exception as error:
        message = f"does not compile: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return LintRow(case.kernel, str(case), case.arch, None, "", 0, 0, 0, 0, 0, {}, 0, 0.0, 0, [message])


@contextlib.contextmanager
def workers(processes: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of fresh processes, in which Triton compiles with an empty cache, even if this one interprets kernels."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        with mock.patch.dict(os.environ, environment):
            with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
                yield pool


def lint(cases: list[LintCase], baseline: dict[str, dict], processes: int = 2) -> Iterator[LintRow]:
    """Compiles and checks the cases; yields their rows in order, compared with the baseline."""
    with workers(min(processes, len(cases))) as pool:
        for row in pool.map(lint_case, cases):
            compare(row, baseline)
            yield row


def baseline_path() -> Path:
    return BASELINES / f"triton-{triton.__version__}.json"


def load_baseline() -> dict[str, dict]:
    """The figures of the running Triton version by key; empty if there are none."""
    path = baseline_path()
    return json.loads(path.read_text()) if path.exists() else {}


def save_baseline(rows: list[LintRow], *, complete: bool) -> None:
    """Keeps the rows that compiled; entries of other cases stay unless the rows are `complete`."""
    kept = ("tile", "registers", "stack", "shared", "blocks", "tensor_core_instructions", "wide_share", "instructions")
    entries = {} if complete else load_baseline()
    entries.update({row.key: {name: getattr(row, name) for name in kept} for row in rows if row.registers})
    lines = [f"{json.dumps(key)}: {json.dumps(entries[key])}" for key in sorted(entries)]
    baseline_path().parent.mkdir(parents=True, exist_ok=True)
    baseline_path().write_text("{\n" + ",\n".join(lines) + "\n}\n")


HEADER = (
    f"{'kernel':18}{'case':60}{'arch':>7}{'tile':>18}{'regs':>6}{'stack':>6}{'KiB':>6}{'blocks':>7}"
    f"{'tensor-core':>13}{'wide':>6}{'instr':>7}  verdict"
)


def format_row(row: LintRow) -> str:
    mma = " ".join(f"{count} {name}" for name, count in row.tensor_core_instructions.items()) or "-"
    verdict = "FAIL: " + "; ".join(row.failures) if row.failures else "ok"
    if row.changes:
        verdict += f" ({', '.join(row.changes)})"
    return (
        f"{row.kernel:18}{row.case:60}{f'sm_{row.arch}':>7}{row.tile:>18}{row.registers:>6}{row.stack:>6}"
        f"{row.shared / 1024:>6.0f}{row.blocks:>7}{mma:>13}{row.wide_share:>6.0%}{row.instructions:>7}  {verdict}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every launch that the tables can pick")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=sorted(ARCHITECTURES), help="default: 80 90, with --all every one"
    )
    parser.add_argument("--baseline", action="store_true", help="keep the figures as the new baseline")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(argv)

    cases = all_cases(options.arch or tuple(ARCHITECTURES)) if options.all else tuned_cases(options.arch or TUNED_ARCHS)
    baseline = {} if options.baseline else load_baseline()
    print(f"triton {triton.__version__}, compared with {baseline_path().name if baseline else 'nothing'}")
    print(HEADER)
    rows = []
    for row in lint(cases, baseline, options.processes):
        print(format_row(row), flush=True)
        rows.append(row)
    failed = sum(bool(row.failures) for row in rows)
    print(f"{len(rows)} compiled, {failed} failed")
    if options.baseline:
        save_baseline(rows, complete=options.all and not options.arch)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
