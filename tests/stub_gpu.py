"""Triton's own way to a launch, on a driver that launches nothing: shows what its JIT would compile.

    python tests/stub_gpu.py            prints `launches.key_of` of kernels as JSON: of those that warm.py compiles for
                                        GENERATIONS, that they launch, and that VARIATIONS add; and of those for STEPS,
                                        in each of the ways of step_speed.py

Tensors are on the CPU, and the tables take them for those of an H100. The models have the true width and two layers;
matrix products are left out. It runs in a process of its own, because the tests interpret the kernels.
"""

import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dkv
from benchmarks import warm
from benchmarks.harness import launches, step_points
from benchmarks.harness.fake_gpu import NothingLater, fake_model
from benchmarks.harness.generation import GenerationPoint, policy_of
from benchmarks.harness.models import TRUE_SIZE, with_layers
from dkv import run
from dkv.kernels import attention, checks, configs, cpu, lm_head, packing

ARCH = 90
# (family, batch, prompt, generated, policy), all in one block
GENERATIONS = (
    ("LLaDA", 1, 40, 12, "Decode"),
    ("LLaDA", 3, 300, 8, "DualCache"),
    ("Dream", 1, 40, 12, "Decode"),
    ("Dream", 2, 300, 8, "DualCache"),
    ("Dream", 2, 300, 8, "Decode un_right"),
)
STEPS = step_points.parse_points("LLaDA:1:1024:16,Dream:3:300:40")


class StubDriver:
    """Answers what Triton asks a driver; launches end in `StubKernel`."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", ARCH, 32)


class StubKernel:
    """Replaces a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments):
        return None

    def run(self, *arguments):
        pass


def compile_nothing(found, kernels):
    """Replaces `JITFunction._do_compile`: appends the key of a kernel to a list."""

    def do_compile(kernel, key, signature, device, constexprs, options, attrs, warmup):
        kernels.append(kernel)
        source = kernel.ASTSource(kernel, signature, constexprs, attrs)
        found.append(launches.key_of(source, options))
        kernel.device_caches[device][0][key] = StubKernel()
        return kernel.device_caches[device][0][key]

    return do_compile


def product_of(x, weight, bias=None):
    return x.new_empty(x.shape[0], weight.shape[0])


@contextlib.contextmanager
def stub_gpu():
    """Yields a list of the keys of what the JIT would compile, each kernel once, in order."""
    found, kernels = [], []
    triton.runtime.driver.set_active(StubDriver())
    with contextlib.ExitStack() as stack:
        for context in (
            mock.patch.object(JITFunction, "_do_compile", compile_nothing(found, kernels)),
            mock.patch.object(checks, "resolve_impl", lambda impl, kernel, tensor: "triton"),
            mock.patch.object(configs, "architecture", lambda device: ARCH),
            *(mock.patch.object(module, "num_sms", lambda device: 132) for module in (configs, attention, lm_head)),
            mock.patch.object(cpu, "linear", product_of),
            # nobody fills the lists
            mock.patch.object(packing, "_list", lambda active, capacity: torch.zeros(capacity, dtype=torch.int64)),
            mock.patch.object(run, "reads_sizes", lambda device: False),
            mock.patch.object(run, "check_answers", lambda steps: None),
            torch.no_grad(),
        ):
            stack.enter_context(context)
        yield found
    for kernel in kernels:
        kernel.device_caches.clear()


def prompts(batch, length):
    return torch.randint(100, 1000, (batch, length), generator=torch.Generator().manual_seed(0))


def main():
    points = [(family, GenerationPoint(*numbers)) for family, *numbers, _ in GENERATIONS]
    warmed = set(warm.launches(ARCH, [], points, ["Decode", "Decode un_right", "DualCache"]))
    with stub_gpu() as launched:
        for family, batch, prompt, gen_length, label in GENERATIONS:
            policy, _ = policy_of(family, label)
            model = fake_model(with_layers(TRUE_SIZE[family][1], 2), device="cpu")
            dkv.generate(model, prompts(batch, prompt), gen_length=gen_length, policy=policy)
        known = len(launched)
        # other ids, flags and numbers of rows, in tiles that came up already
        for options in VARIATIONS:
            options = {"batch": 2, "prompt": 300, "gen_length": 8} | options
            dkv.generate(model, prompts(options.pop("batch"), options.pop("prompt")), **options)
    found = {"warmed": sorted(warmed), "launched": launched[:known], "varied": launched[known:]}
    print(json.dumps(found | {"warmed_steps": sorted(warm.launches(ARCH, STEPS)), "steps": steps()}))


def steps():
    """{way: what STEPS launch beyond the ways before it}."""
    found = {}
    with stub_gpu() as launched, mock.patch.object(run, "LateSizes", NothingLater):
        runs = []
        for point in STEPS:
            model = fake_model(with_layers(TRUE_SIZE[point.family][1], 2), device="cpu")
            runs.append(step_points.at_step(model, point))
        for way in step_points.ways(ARCH):
            known = 0 if way is step_points.LIBRARY else len(launched)
            for current in runs:
                with way.of(current):
                    current.compute(current.next_room())
            found[way.name] = launched[known:]
    return found


VARIATIONS = (
    {"policy": dkv.Decode(4)},
    {"policy": dkv.Decode(2, delay=2, warmup_steps=16)},
    {"mask_id": 16, "batch": 1},
    {"mask_id": 1, "gen_length": 7},
    {"mask_id": 31, "prompt": 333, "gen_length": 5},
    {"logits_eos_inf": True},
    {"logits_eos_inf": True, "eos_token_id": [3, 16, 17, 50, 51, 99], "batch": 1},
)


if __name__ == "__main__":
    main()
