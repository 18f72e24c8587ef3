"""Compiles what benchmarks launch on a GPU into Triton's cache, in parallel, without touching the GPU.

    python benchmarks/warm.py                                       the steps of step_speed.py
    python benchmarks/warm.py --steps POINTS --generation POINTS --policies LABELS --attention POINTS
                                                                    what step_speed.py, generate_speed.py and
                                                                    attn_speed.py launch for the same arguments
    python benchmarks/warm.py --sweep [ROWS]                        what product_sweep.py launches
    python benchmarks/warm.py ... --unpack FILE --pack FILE         begin with a packed cache, and pack it in the end

A job is done on fake tensors (fake_gpu.py), which shows every specialisation that it will launch, and these are
compiled in parallel; what is in the cache already takes no time. The cache is Triton's own: TRITON_CACHE_DIR, or
~/.triton/cache. The exit status is 1 if a kernel does not compile.
"""

import argparse
import multiprocessing
import os
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import attn_speed  # noqa: E402
import common  # noqa: E402
import generate_speed  # noqa: E402
import kernel_lint  # noqa: E402
import linear_speed  # noqa: E402
import product_cases  # noqa: E402
import providers  # noqa: E402
import step_points  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from checkpoints import BLOCK, FAMILIES, TRUE_SIZE, with_layers  # noqa: E402
from fake_gpu import Launch, fake_gpu, fake_model, fake_run  # noqa: E402
from study import policy_of  # noqa: E402
from triton.backends.nvidia import driver  # noqa: E402

MAX_PROCESSES = 14


def launches(arch, steps, generation, labels, attention, sweep=None):
    """Launches of the jobs, one of each specialisation, by `kernel_lint.key_of`."""
    counts = {point: point.counts for (point,) in attention}
    with fake_gpu(arch) as found, torch.no_grad():
        for family in FAMILIES:
            # the first layer and the last
            config = with_layers(TRUE_SIZE[family][1], 2)
            model = fake_model(config)
            for point in steps:
                if point[0] == family:
                    do_step(model, arch, *point)
            points = [point for name, point in generation if name == family]
            if points:
                # what comes before the first point, to merge the weights
                do_run(model, step_points.DECODE, 1, 1, 1, None)
            for point in points:
                for label in labels:
                    policy, in_blocks = policy_of(family, label) or (None, False)
                    if policy:
                        block_length = min(BLOCK, point.gen_length) if in_blocks else point.gen_length
                        do_run(model, policy, point.batch, point.prompt, point.gen_length, block_length)
        for point in counts:
            do_attention(point, counts[point])
        if sweep is not None:
            product_cases.launch_all(sweep)
    kept = {}
    for launch in found:
        if isinstance(launch, Launch):
            source, _, options = kernel_lint.specialised(launch, arch)
            kept.setdefault(kernel_lint.key_of(source, options), launch)
    return kept


def do_step(model, arch, family, batch, length, active):
    """The step of a point of step_speed.py in all ways, and those that lead to it."""
    current, steps = step_points.fake_at_step(model, family, batch, length, active)
    for step in range(steps + 1):
        current.steps = step
        for way in step_points.ways(arch) if step == steps else (step_points.LIBRARY,):
            with way.of(current):
                current.compute(current.next_room())


def do_run(model, policy, batch, prompt, gen_length, block_length):
    """A step of every size that a run can have."""
    current = fake_run(model, policy, batch=batch, prompt=prompt, gen_length=gen_length, block_length=block_length)
    rooms = set(current.rooms.every()) if current.late else set()
    for step in range(len(current.forecasts)):
        current.steps = step
        rooms.add(current.next_room())
    for room in sorted(rooms):
        current.compute(room)


def do_attention(point, counts):
    """Our part of a point of attn_speed.py; counts: active positions of each row."""
    model = providers.MODELS[point.model]
    total, batch, headdim = sum(counts), point.batch, model.headdim

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="cuda")

    def ints(*shape, dtype=torch.int64):
        return empty(*shape, dtype=dtype)

    heads_last = empty(batch, model.nheads_k, point.seqlen, headdim).transpose(1, 2)
    angles = empty(point.seqlen, headdim // 2, dtype=torch.float32)
    bounds = ints(batch, dtype=torch.int32) if point.ragged else None
    canvas = SimpleNamespace(
        k_memory=[heads_last],
        v_memory=[heads_last],
        heads_last=lambda memory: memory,
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
    providers.ours(case).run(0)


def compile_one(index):
    """(name, seconds, error) of a launch of FOUND, in a process of its own."""
    launch, begin = FOUND[index], time.monotonic()
    try:
        compiled = kernel_lint.compile_launch(launch, ARCH)
        build_launcher(compiled)
        return launch.name, time.monotonic() - begin, ""
    except Exception as error:
        return launch.name, time.monotonic() - begin, common.described(error)


def build_launcher(compiled):
    """Triton also compiles, by a C compiler, what loads kernels, and before 3.7 how each signature is called."""
    if has_driver():
        driver.CudaUtils()
        if hasattr(driver, "make_launcher"):
            driver.CudaLauncher(compiled.src, compiled.metadata)


def has_driver():
    """Whether the GPU's driver is there to link with."""
    try:
        return bool(driver.library_dirs())
    except AssertionError:
        return False


def capability():
    """Compute capability of the first GPU, by a program of its own; without one that of an H100."""
    found = common.output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0")
    return int(found.replace(".", "")) if found.replace(".", "").isdecimal() else 90


def cache_folder():
    return Path(triton.knobs.cache.dir)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = step_points.parse_points(step_points.POINTS)
    parser.add_argument("--steps", type=step_points.parse_points, nargs="?", const=default, metavar="POINT,...")
    parser.add_argument("--generation", type=generate_speed.parse_points, default=[], metavar="POINT,...")
    parser.add_argument("--policies", type=generate_speed.parse_labels, metavar="LABEL,...", default=["Decode"])
    parser.add_argument("--attention", type=attn_speed.parse_points, default=[], metavar="POINT,...")
    parser.add_argument("--sweep", type=linear_speed.parse_rows, nargs="?", const=(), metavar="N,...")
    parser.add_argument("--unpack", type=Path, metavar="FILE", help="a packed cache; none is no error")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="where to pack the cache, .tgz")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first so many kernels")
    arguments = parser.parse_args(argv)
    if arguments.steps is None:
        others = arguments.generation or arguments.attention or arguments.sweep is not None
        arguments.steps = [] if others else default
    return arguments


def main(argv=None):
    global FOUND, ARCH
    arguments, begin = parse_arguments(argv), time.monotonic()
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.unpack and arguments.unpack.exists():
        with tarfile.open(arguments.unpack) as archive:
            archive.extractall(folder, filter="data")
    ARCH = capability()
    # what forks must not have CUDA, which even asking for a GPU would begin
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    jobs = arguments.steps, arguments.generation, arguments.policies, arguments.attention, arguments.sweep
    FOUND = list(launches(ARCH, *jobs).values())
    # the heavy ones first
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
