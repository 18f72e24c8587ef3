"""Compiles the kernels that benchmarks launch on a GPU into Triton's cache, in parallel, without touching the GPU.

    python benchmarks/warm.py                                       the steps of step_speed.py
    python benchmarks/warm.py --steps POINTS --generation POINTS --policies LABELS --attention POINTS
                                                                    the launches of step_speed.py, generate_speed.py and
                                                                    attn_speed.py for the same arguments
    python benchmarks/warm.py --sweep [ROWS]                        the launches of product_sweep.py
    python benchmarks/warm.py ... --unpack FILE --pack FILE         begins with a packed cache, and packs it in the end

Each job runs on fake tensors (harness/fake_gpu.py), which shows every specialisation that it will launch. These are
compiled in parallel; kernels that are in the cache take no time. The cache is Triton's own: TRITON_CACHE_DIR, or
~/.triton/cache. The exit status is 1 if a kernel does not compile.
"""

import multiprocessing
import os
import sys
import tarfile
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from torch import nn
from triton.backends.nvidia import driver

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dkv
from benchmarks.harness import attention, common, generation, products, step_points
from benchmarks.harness.attention import AttentionPoint
from benchmarks.harness.fake_gpu import fake_gpu, fake_model, fake_run
from benchmarks.harness.generation import GenerationPoint
from benchmarks.harness.launches import Launch, compile_launch, key_of, specialised
from benchmarks.harness.models import BLOCK, FAMILIES, TRUE_SIZE, with_layers
from benchmarks.harness.step_points import StepPoint

MAX_PROCESSES = 14


def launches(
    arch: int,
    steps: list[StepPoint] = (),
    generations: list[tuple[str, GenerationPoint]] = (),
    labels: list[str] = (),
    attentions: list[AttentionPoint] = (),
    sweep: list[int] | None = None,
) -> dict[str, Launch]:
    """The launches of the jobs, one of each specialisation, by `key_of`."""
    # their random numbers must not be drawn on the fake GPU
    counts = {point: point.counts for point in attentions}
    with fake_gpu(arch) as found, torch.no_grad():
        for family in FAMILIES:
            # two layers: the first and the last
            model = fake_model(with_layers(TRUE_SIZE[family][1], 2))
            for point in steps:
                if point.family == family:
                    do_step(model, arch, point)
            points = [point for name, point in generations if name == family]
            if points:
                # generate_speed.py merges the weights by a first run
                do_run(model, step_points.DECODE, GenerationPoint(1, 1, 1), None)
            for point in points:
                for label in labels:
                    policy, in_blocks = generation.policy_of(family, label) or (None, False)
                    if policy:
                        block_length = min(BLOCK, point.gen_length) if in_blocks else point.gen_length
                        do_run(model, policy, point, block_length)
        for point in counts:
            do_attention(point, counts[point])
        if sweep is not None:
            products.launch_all(sweep)
    kept = {}
    for launch in found:
        if isinstance(launch, Launch):
            source, _, options = specialised(launch, arch)
            kept.setdefault(key_of(source, options), launch)
    return kept


def do_step(model: nn.Module, arch: int, point: StepPoint) -> None:
    """The step of a point of step_speed.py in all ways, and those that lead to it."""
    current, steps = step_points.fake_at_step(model, point)
    for step in range(steps + 1):
        current.steps = step
        for way in step_points.ways(arch) if step == steps else (step_points.LIBRARY,):
            with way.of(current):
                current.compute(current.next_room())


def do_run(model: nn.Module, policy: dkv.Policy, point: GenerationPoint, block_length: int | None) -> None:
    """A step of every size that a run can have."""
    sizes = {"batch": point.batch, "prompt": point.prompt, "gen_length": point.gen_length}
    current = fake_run(model, policy, **sizes, block_length=block_length)
    rooms = set(current.rooms.every()) if current.late else set()
    for step in range(len(current.forecasts)):
        current.steps = step
        rooms.add(current.next_room())
    for room in sorted(rooms):
        current.compute(room)


def do_attention(point: AttentionPoint, counts: list[int]) -> None:
    """Our part of a point of attn_speed.py; counts: active positions of each row."""
    model, total, batch, headdim = point.sizes, sum(counts), point.batch, point.sizes.headdim

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="cuda")

    def ints(*shape, dtype=torch.int64):
        return empty(*shape, dtype=dtype)

    cache = empty(batch, model.nheads_k, point.seqlen, headdim).transpose(1, 2)
    angles = empty(point.seqlen, headdim // 2, dtype=torch.float32)
    bounds = ints(batch, dtype=torch.int32) if point.ragged else None
    canvas = SimpleNamespace(
        caches=lambda i: (cache, cache),
        cos=angles,
        sin=angles,
        leftpad=bounds,
        seqlens=bounds,
        device="cuda",
    )
    case = SimpleNamespace(
        canvas=canvas,
        q=[empty(total, model.nheads, headdim)],
        k=[empty(total, model.nheads_k, headdim)],
        v=[empty(total, model.nheads_k, headdim)],
        positions=ints(total),
        slots=ints(total),
        cu_seqlens_q=ints(batch + 1, dtype=torch.int32),
        max_active=max(counts),
        unpack=None,
    )
    attention.ours(case).run(0)


def compile_one(index: int) -> tuple[str, float, str]:
    """(name, seconds, error) of a launch of FOUND, in a process of its own."""
    launch, begin = FOUND[index], time.monotonic()
    try:
        compiled = compile_launch(launch, ARCH)
        build_launcher(compiled)
        return launch.name, time.monotonic() - begin, ""
    except Exception as error:
        return launch.name, time.monotonic() - begin, common.described(error)


def build_launcher(compiled: triton.compiler.CompiledKernel) -> None:
    """Builds Triton's C extensions: the loader of kernels, and before 3.7 a launcher for each signature."""
    if has_driver():
        driver.CudaUtils()
        if hasattr(driver, "make_launcher"):
            driver.CudaLauncher(compiled.src, compiled.metadata)


def has_driver() -> bool:
    """Whether the GPU's driver is installed, to link with."""
    try:
        return bool(driver.library_dirs())
    except AssertionError:
        return False


def capability() -> int:
    """The first GPU's compute capability, from nvidia-smi; 90 without a GPU."""
    found = common.output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0")
    return int(found.replace(".", "")) if found.replace(".", "").isdecimal() else 90


def parse_arguments(argv: list[str] | None) -> Namespace:
    parser = common.argument_parser(__doc__)
    default = step_points.parse_points(step_points.POINTS)
    parser.add_argument("--steps", type=step_points.parse_points, nargs="?", const=default, metavar="POINT,...")
    parser.add_argument("--generation", type=generation.parse_points, default=[], metavar="POINT,...")
    parser.add_argument("--policies", type=generation.parse_labels, metavar="LABEL,...", default=["Decode"])
    parser.add_argument("--attention", type=attention.parse_points, default=[], metavar="POINT,...")
    parser.add_argument("--sweep", type=products.parse_rows, nargs="?", const=(), metavar="N,...")
    parser.add_argument("--unpack", type=Path, metavar="FILE", help="a packed cache; none is no error")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="where to pack the cache, .tgz")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first so many kernels")
    arguments = parser.parse_args(argv)
    if arguments.steps is None:
        others = arguments.generation or arguments.attention or arguments.sweep is not None
        arguments.steps = [] if others else default
    return arguments


def main(argv: list[str] | None = None) -> int:
    global FOUND, ARCH
    arguments, begin = parse_arguments(argv), time.monotonic()
    folder = Path(triton.knobs.cache.dir)
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.unpack and arguments.unpack.exists():
        with tarfile.open(arguments.unpack) as archive:
            archive.extractall(folder, filter="data")
    ARCH = capability()
    # a process that forks must not initialise CUDA, not even by asking for a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    jobs = arguments.steps, arguments.generation, arguments.policies, arguments.attention, arguments.sweep
    FOUND = list(launches(ARCH, *jobs).values())
    # the slowest first
    order = sorted(range(len(FOUND)), key=lambda i: FOUND[i].name not in ("lm_head", "delayed_attention"))
    order = order[: arguments.limit]
    print(f"{len(FOUND)} kernels to compile for sm_{ARCH}, found in {time.monotonic() - begin:.0f} s", flush=True)
    # forked, so that PyTorch is imported once
    with multiprocessing.get_context("fork").Pool(min(MAX_PROCESSES, os.cpu_count())) as pool:
        done = list(pool.imap_unordered(compile_one, order))
    seconds, failed = sum(s for _, s, _ in done), [(name, error) for name, _, error in done if error]
    launchers = "" if has_driver() else "; no driver is installed, so launchers were not built"
    print(
        f"{len(done)} compiled, {len(failed)} failed, in {time.monotonic() - begin:.0f} s of {seconds:.0f} s{launchers}"
    )
    for name, error in failed:
        print(f"failed: {name}: {error}")
    if arguments.pack:
        arguments.pack.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(arguments.pack, "w:gz", compresslevel=6) as archive:
            archive.add(folder, arcname=".")
        print(f"packed: {arguments.pack}, {arguments.pack.stat().st_size / 1e6:.1f} MB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
