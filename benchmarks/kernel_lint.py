"""Compiles the kernels ahead of time for every supported GPU, without one, and checks what came out.

    python benchmarks/kernel_lint.py                        the tuned cases, for sm_80 and sm_90
    python benchmarks/kernel_lint.py --all                  every launch that the tables of dkv.kernels.launch can pick
    python benchmarks/kernel_lint.py --all --baseline       and keeps their figures

Each case calls the real launcher with fake CUDA tensors of true model shapes; what it launches is recorded instead, and
compiled with the specialisation that Triton's JIT would give it. A case fails if registers spill inside the loop, if
shared memory passes the architecture's limit, if K and V are not loaded 16 bytes at a time, or if a matrix product
misses the tensor cores (on Hopper: wgmma, from 64 rows on). The figures are compared with those kept, by --baseline, in
benchmarks/results/compile/ for the Triton version at hand, on which registers and spills depend: spills that grow fail
even outside the loop, where they cost little. The exit status is 1 if a case fails.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import triton  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from dkv.kernels import attention, checks, rope_cache  # noqa: E402
from dkv.kernels import launch as tables  # noqa: E402

BASELINES = ROOT / "benchmarks" / "results" / "compile"


@dataclass(frozen=True)
class Architecture:
    """What bounds the blocks that one streaming multiprocessor holds; shared memory in KiB."""

    processors: int
    shared_per_block: int
    shared_per_processor: int
    warps: int
    blocks: int


ARCHITECTURES = {
    80: Architecture(108, 163, 164, 64, 32),
    86: Architecture(84, 99, 100, 48, 16),
    89: Architecture(128, 99, 100, 48, 24),
    90: Architecture(132, 227, 228, 64, 32),
    100: Architecture(148, 227, 228, 64, 32),
    120: Architecture(170, 99, 100, 48, 24),
}
TUNED_ARCHS = (80, 90)
REGISTERS_PER_PROCESSOR = 65536
# what each kernel streams, in one turn of its loop if it has one: how many tiles of which size
STREAMED_TILES = {
    "delayed_attention": (2, ("BLOCK_N", "HEADDIM")),
    "merge_splits": (1, ("BLOCK_M", "HEADDIM")),
    "rope_cache": (6, ("BLOCK_T", "BLOCK_H", "HALF")),
}
MODELS = {"LLaDA": (32, 32), "Dream": (28, 4)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class PointerArgument:
    """Stands for a tensor where Triton specialises: its dtype, and its address in an allocation aligned by 16 bytes."""

    dtype: torch.dtype
    address: int

    def data_ptr(self):
        return self.address


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch; tensors among the arguments have become PointerArguments."""

    kernel: JITFunction
    grid: tuple
    arguments: dict

    @property
    def name(self):
        """The name of the kernel function without its marks."""
        return self.kernel.fn.__name__.strip("_").removesuffix("_kernel")

    @property
    def streamed_bytes(self):
        """Bytes that each thread streams in one turn, and how many of them, 16 at most, one load can bring."""
        tiles, sizes = STREAMED_TILES.get(self.name, (0, ()))
        first_pointer = next(value for value in self.arguments.values() if isinstance(value, PointerArgument))
        threads = 32 * self.arguments.get("num_warps", 4)
        tile_bytes = math.prod(self.arguments[size] for size in sizes) * first_pointer.dtype.itemsize // threads
        return tiles * tile_bytes, min(16, tile_bytes)


class _RefuseHostReads(TorchDispatchMode):
    """FakeTensorMode refuses item() and the like by itself, but not a copy from one device to another."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{func} moves data between {' and '.join(sorted(devices))} inside a launcher.")
        return result


def on_gpu(arch):
    """A context in which the tables of dkv.kernels.launch take every CUDA device for one of `arch`."""
    properties = types.SimpleNamespace(
        major=arch // 10, minor=arch % 10, multi_processor_count=ARCHITECTURES[arch].processors
    )
    return mock.patch.object(tables, "_properties", lambda index: properties)


@contextlib.contextmanager
def recording(arch):
    """Makes tensors fake and Triton's launches a list of `Launch`, which is yielded, as on a GPU of `arch`.

    A launcher that runs in here without an exception never waits for the GPU: there is none, and fake tensors hold no
    values to read.
    """
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        arguments = kernel.signature.bind_partial(*args).arguments | kwargs
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                arguments[name] = PointerArgument(value.dtype, value.storage_offset() * value.element_size())
        launches.append(Launch(kernel, grid, arguments))

    with (
        mock.patch.object(JITFunction, "run", record),
        on_gpu(arch),
        mock.patch.object(checks, "device_guard", lambda tensor: contextlib.nullcontext()),
        FakeTensorMode(),
        _RefuseHostReads(),
    ):
        yield launches


def compile_launch(launch, arch):
    """Compiles a recorded launch as Triton's JIT would at run time; returns Triton's CompiledKernel."""
    kernel = launch.kernel
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    arguments = dict(launch.arguments, debug=False, instrumentation_mode="")
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(**arguments)
    options, signature, constexprs, attrs = kernel._pack_args(backend, arguments, bound, specialization, options)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=target, options=dict(options.__dict__))


@dataclass(frozen=True)
class Case:
    """One kernel of one call of a launcher: what is compiled, and the name under which the baseline keeps it."""

    kernel: str
    arch: int
    dtype: str = "bf16"
    headdim: int = 128
    nheads: int = 32
    nheads_k: int = 32
    queries: int = 8
    splits: int = 1
    bounds: bool = True
    key_mask: bool = False
    key_index: bool = False

    @property
    def rows(self):
        return self.queries * self.nheads // self.nheads_k

    def __str__(self):
        words = [f"{self.dtype} d{self.headdim} heads {self.nheads}/{self.nheads_k}"]
        if self.kernel == "delayed_attention":
            words.append(f"rows {self.rows}")
        if self.kernel != "rope_cache":
            words.append(f"splits {self.splits}")
        options = [name for name in ("bounds", "key_mask", "key_index") if getattr(self, name)]
        return " ".join(words + (options if self.kernel == "delayed_attention" else []))

    @property
    def tensor_cores(self):
        """Whether it multiplies matrices in 16 bits; float32 products must stay off the tensor cores (TF32)."""
        return self.kernel == "delayed_attention" and self.dtype != "fp32"

    def record(self):
        """The launch of this kernel, as its launcher makes it."""
        if not isinstance(attention._delayed_attention_kernel, JITFunction):
            raise RuntimeError("the kernels are interpreted in this process (TRITON_INTERPRET=1); use workers()")
        with recording(self.arch) as launches:
            self._call_launcher()
        return next(launch for launch in launches if launch.name == self.kernel)

    def _call_launcher(self, batch=2, seqlen_cache=1024):
        def empty(*shape, dtype=DTYPES[self.dtype]):
            return torch.empty(shape, dtype=dtype, device="cuda:0")

        total = batch * self.queries
        q = empty(total, self.nheads, self.headdim)
        k_cache, v_cache = (empty(batch, seqlen_cache, self.nheads_k, self.headdim) for _ in "kv")
        if self.kernel == "rope_cache":
            # as they come out of one QKV product
            qkv = empty(total, self.nheads + 2 * self.nheads_k, self.headdim)
            q, k, v = qkv.split([self.nheads, self.nheads_k, self.nheads_k], dim=1)
            cos, sin = (empty(seqlen_cache, self.headdim // 2, dtype=torch.float32) for _ in "cs")
            positions, slots = (empty(total, dtype=torch.int64) for _ in "ps")
            rope_cache._launch(q, k, v, cos, sin, positions, slots, k_cache, v_cache)
            return
        attention._launch(
            q=q,
            k_cache=k_cache,
            v_cache=v_cache,
            cu_seqlens_q=empty(batch + 1, dtype=torch.int32),
            max_seqlen_q=self.queries,
            cache_leftpad=empty(batch, dtype=torch.int32) if self.bounds else None,
            cache_seqlens=empty(batch, dtype=torch.int32) if self.bounds else None,
            key_mask=empty(batch, seqlen_cache, dtype=torch.bool) if self.key_mask else None,
            key_index=empty(batch, seqlen_cache // 2, dtype=torch.int32) if self.key_index else None,
            softmax_scale=self.headdim**-0.5,
            num_splits=self.splits,
        )


def tile_queries(arch, dtype, headdim, group, most_rows=512):
    """For every tile that the table can pick, the most queries (of `group` heads each) that it is picked for."""
    queries = {}
    with on_gpu(arch):
        for count in range(1, most_rows // group + 1):
            queries[tables.attention_launch(torch.device("cuda:0"), DTYPES[dtype], count * group)] = count
    return list(queries.values())


def attention_cases(arch, model, dtype="bf16", headdim=128, **options):
    nheads, nheads_k = MODELS[model]
    return [
        Case("delayed_attention", arch, dtype, headdim, nheads, nheads_k, queries, **options)
        for queries in tile_queries(arch, dtype, headdim, nheads // nheads_k)
    ]


def tuned_cases(archs=TUNED_ARCHS, models=tuple(MODELS)):
    """bfloat16, headdim 128: every tile, split for LLaDA and unsplit for Dream, and the merge and RoPE kernels."""
    cases = []
    for arch in archs:
        for model in models:
            nheads, nheads_k = MODELS[model]
            cases += attention_cases(arch, model, splits=4 if model == "LLaDA" else 1)
            cases.append(Case("merge_splits", arch, nheads=nheads, nheads_k=nheads_k, splits=4))
            cases.append(Case("rope_cache", arch, nheads=nheads, nheads_k=nheads_k))
    return cases


def all_cases(archs=tuple(ARCHITECTURES)):
    """Every tile of every table, with every option, dtype and headdim, though not with all combinations of these."""
    cases = tuned_cases(archs)
    for arch in archs:
        cases += attention_cases(arch, "LLaDA") + attention_cases(arch, "Dream", splits=4)
        for options in ({"bounds": False}, {"key_mask": True}, {"key_index": True}):
            cases += attention_cases(arch, "Dream", **options)
        for dtype in DTYPES:
            for headdim in checks.HEADDIMS:
                if (dtype, headdim) != ("bf16", 128):
                    cases += attention_cases(arch, "Dream", dtype, headdim)
                    cases += attention_cases(arch, "LLaDA", dtype, headdim, splits=4, key_mask=True, key_index=True)
                    cases.append(Case("merge_splits", arch, dtype, headdim, splits=4))
                    cases.append(Case("rope_cache", arch, dtype, headdim))
    return cases


@dataclass
class Row:
    """What the compiler made of one kernel for one architecture; sizes in bytes."""

    kernel: str
    case: str
    arch: int
    block_m: int | None
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

    @property
    def key(self):
        return f"{self.kernel} {self.case} sm_{self.arch}"


def inspect(launch, arch, *, case="", tensor_cores=False):
    """Compiles a launch for `arch` and returns its checked Row; `tensor_cores` as in `Case`."""
    compiled = compile_launch(launch, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run_tool(triton.knobs.nvidia.cuobjdump, "-res-usage", cubin)
        sass = Sass(_run_tool(triton.knobs.nvidia.nvdisasm, "-c", "-ndf", cubin))
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    streamed, load_bytes = launch.streamed_bytes
    sizes = [
        launch.arguments[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_T", "BLOCK_H") if name in launch.arguments
    ]
    stages = f" st{launch.arguments['num_stages']}" if "num_stages" in launch.arguments else ""
    row = Row(
        kernel=launch.name,
        case=case,
        arch=arch,
        block_m=launch.arguments.get("BLOCK_M"),
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
    )
    row.failures = check(row, tensor_cores)
    return row


def _run_tool(tool, *arguments):
    return subprocess.run([tool.path, *arguments], check=True, text=True, capture_output=True).stdout


class Sass:
    """What the checks need of a kernel's machine code, as nvdisasm prints it."""

    def __init__(self, text):
        self.opcodes, loops, labels = [], [], {}
        for line in text.splitlines():
            if label := re.match(r"(\.L\w+):", line):
                labels[label[1]] = len(self.opcodes)
            instruction = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", line)
            if instruction is None:
                continue
            target = re.search(r"`\((\.L\w+)\)", line) if instruction[1].startswith("BRA") else None
            if target and target[1] in labels:
                loops.append(range(labels[target[1]], len(self.opcodes)))
            self.opcodes.append(instruction[1])
        # loops without a load only clear what has no result, if anything
        loops = [loop for loop in loops if any(_is_load(self.opcodes[i]) for i in loop)]
        in_loops = [self.opcodes[i] for i in sorted({i for loop in loops for i in loop})]
        self.loads = [_load_bytes(op) for op in in_loops or self.opcodes if _is_load(op)]
        self.loop_spills = sum(op.split(".")[0] in ("LDL", "STL") for op in in_loops)
        self.tensor_core_instructions = dict(
            Counter(op.split(".")[0] for op in self.opcodes if re.match(r"(HMMA|HGMMA|UTC\w*MMA)\b", op))
        )

    def wide_bytes(self, load_bytes):
        """Bytes that a thread loads in the loops (without one: at all) by instructions of `load_bytes` or more."""
        return sum(width for width in self.loads if width >= load_bytes)


def _is_load(opcode):
    return opcode.split(".")[0] in ("LDG", "LDGSTS", "UTMALDG")


def _load_bytes(opcode):
    """Bytes that a thread loads; one copy of the tensor memory accelerator counts as more than any tile."""
    name, *modifiers = opcode.split(".")
    widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return 4096 if name == "UTMALDG" else next((widths[m] for m in modifiers if m in widths), 4)


def resident_blocks(architecture, registers, shared, warps):
    """Blocks that fit one streaming multiprocessor; warps get 256 registers at a time, blocks 1 KiB on top."""
    warps_by_registers = REGISTERS_PER_PROCESSOR // (-(-registers // 8) * 8 * 32) // 4 * 4
    return min(
        min(warps_by_registers, architecture.warps) // warps,
        architecture.shared_per_processor * 1024 // (shared + 1024),
        architecture.blocks,
    )


def check(row, tensor_cores):
    """What is wrong with a Row, in words."""
    failures = []
    if row.loop_spills:
        failures.append(f"{row.loop_spills} spills inside loops ({row.stack} B of stack)")
    limit = ARCHITECTURES[row.arch].shared_per_block
    if row.shared > limit * 1024:
        failures.append(f"{row.shared / 1024:.0f} KiB of shared memory, sm_{row.arch} has {limit}")
    if row.wide_share < 1.0:
        failures.append(f"only {row.wide_share:.0%} of the streamed bytes come in loads of {row.load_bytes}")
    kinds = set(row.tensor_core_instructions)
    if tensor_cores and not kinds:
        failures.append("no tensor-core instruction")
    elif tensor_cores and row.arch == 90 and row.block_m >= 64 and kinds != {"HGMMA"}:
        failures.append(f"{' and '.join(sorted(kinds))} where wgmma is possible")
    elif kinds and not tensor_cores:
        failures.append(f"{' and '.join(sorted(kinds))} in a kernel that must be exact in float32")
    return failures


def compare(row, baseline):
    """Notes in a Row what changed against its entry of the baseline; more spills, even outside loops, are a failure."""
    old = baseline.get(row.key)
    if old is None:
        row.changes = ["new"] if baseline else []
        return
    for name, unit in (("registers", ""), ("shared", " B")):
        if getattr(row, name) != old[name]:
            row.changes.append(f"{name} {getattr(row, name) - old[name]:+}{unit}")
    if row.stack > old["stack"]:
        row.failures.append(f"spills {row.stack} B, before {old['stack']} B")


def lint_case(case):
    try:
        return inspect(case.record(), case.arch, case=str(case), tensor_cores=case.tensor_cores)
    except Exception as error:
        message = f"does not compile: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return Row(case.kernel, str(case), case.arch, None, "", 0, 0, 0, 0, 0, {}, 0, 0.0, 0, [message])


@contextlib.contextmanager
def workers(processes):
    """A pool of fresh Python processes, in which Triton compiles and its cache is empty, whatever holds in this one."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        with mock.patch.dict(os.environ, environment):
            with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
                yield pool


def lint(cases, baseline, processes=2):
    """Compiles and checks the cases; yields their Rows, compared with the baseline, in their order as they are done."""
    with workers(min(processes, len(cases))) as pool:
        for row in pool.map(lint_case, cases):
            compare(row, baseline)
            yield row


def run_cases(cases=None, processes=2):
    """The Rows of some cases as dictionaries, for JSON and `table`; by default LLaDA's tuned ones on Hopper (15 s)."""
    cases = tuned_cases((90,), ("LLaDA",)) if cases is None else cases
    return [asdict(row) for row in lint(cases, load_baseline(), processes)]


def baseline_path():
    return BASELINES / f"triton-{triton.__version__}.json"


def load_baseline():
    """The figures by key, as kept for the running Triton version; empty if there are none."""
    path = baseline_path()
    return json.loads(path.read_text()) if path.exists() else {}


def save_baseline(rows, *, complete):
    """Keeps the rows that compiled; entries of other cases stay unless the rows are `complete`."""
    kept = ("tile", "registers", "stack", "shared", "blocks", "tensor_core_instructions", "wide_share", "instructions")
    entries = {} if complete else load_baseline()
    entries.update({row.key: {name: getattr(row, name) for name in kept} for row in rows if row.registers})
    lines = [f"{json.dumps(key)}: {json.dumps(entries[key])}" for key in sorted(entries)]
    baseline_path().parent.mkdir(parents=True, exist_ok=True)
    baseline_path().write_text("{\n" + ",\n".join(lines) + "\n}\n")


HEADER = (
    f"{'kernel':18}{'case':46}{'arch':>7}{'tile':>18}{'regs':>6}{'stack':>6}{'KiB':>6}{'blocks':>7}"
    f"{'tensor-core':>13}{'wide':>6}{'instr':>7}  verdict"
)


def table(rows):
    """The rows of `run_cases` as text."""
    return "\n".join([HEADER, *(format_row(Row(**row)) for row in rows)])


def format_row(row):
    mma = " ".join(f"{count} {name}" for name, count in row.tensor_core_instructions.items()) or "-"
    verdict = "FAIL: " + "; ".join(row.failures) if row.failures else "ok"
    if row.changes:
        verdict += f" ({', '.join(row.changes)})"
    return (
        f"{row.kernel:18}{row.case:46}{f'sm_{row.arch}':>7}{row.tile:>18}{row.registers:>6}{row.stack:>6}"
        f"{row.shared / 1024:>6.0f}{row.blocks:>7}{mma:>13}{row.wide_share:>6.0%}{row.instructions:>7}  {verdict}"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Compiles the kernels ahead of time for every supported GPU, without one, and checks what came out."
    )
    parser.add_argument("--all", action="store_true", help="every launch that the tables can pick, not the tuned ones")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=sorted(ARCHITECTURES), help="default: 80 90, with --all every one"
    )
    parser.add_argument("--baseline", action="store_true", help="keep the figures as those to compare with from now on")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows there")
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
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.baseline:
        save_baseline(rows, complete=options.all and not options.arch)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
