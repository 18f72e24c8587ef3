"""The products of a layer, by the library and by our own kernels, and the launches that product_sweep.py tries."""

import argparse
import contextlib
import itertools
import math
from collections.abc import Iterator
from operator import itemgetter
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness.launches import ARCHITECTURES
from benchmarks.harness.models import MODELS
from dkv.kernels import configs, cpu, reference
from dkv.kernels.direct import direct
from dkv.models.layout import ModelConfig

# how PyTorch does products: name -> (library, whether partial sums may be rounded to bfloat16)
SETTINGS = {"default": ("default", True), "cublaslt": ("cublaslt", True), "float32 sums": ("default", False)}
# larger than any cache
COLD_BYTES = 2**28
KINDS = {"Q, K, V": "qkv", "output": "residual", "gate, up": "gate_up", "down": "residual"}
# powers of two first: if the budget ends early, the numbers between take the next power's launch
ROWS_GPU, ROWS_CPU = (16, 32, 64, 128, 256, 48, 96, 192), (16,)
STAGES, SPLITS = (3, 4, 5, 6), (1, 2, 3, 4, 6)
MAX_CANDIDATES = 8
# an SM with so many bytes of weights in flight has its share of the memory's bandwidth
BYTES_IN_FLIGHT = 64 * 1024
SEQLEN = 1024
# a kernel may be off its twin by so many roundings of the largest value
ROUNDINGS = 2


def shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """name -> (out_features, in_features) of the products of a layer, and of the head."""
    hidden, q = model.hidden_size, model.nheads * model.headdim
    return {
        "Q, K, V": (q + 2 * model.nheads_k * model.headdim, hidden),
        "output": (hidden, q),
        "gate, up": (2 * model.mlp_size, hidden),
        "down": (hidden, model.mlp_size),
        "head": (model.vocab_size, hidden),
    }


def cold_copies(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """The number of copies of a weight that products must rotate through to find it in memory, not in a cache."""
    return max(2, math.ceil(COLD_BYTES / (math.prod(shape) * dtype.itemsize)))


@contextlib.contextmanager
def library_setting(name: str) -> Iterator[None]:
    """A context in which products that are recorded use one of SETTINGS."""
    if not torch.cuda.is_available():
        yield
        return
    matmul, library = torch.backends.cuda.matmul, torch.backends.cuda.preferred_blas_library()
    rounded = matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.preferred_blas_library(SETTINGS[name][0])
    matmul.allow_bf16_reduced_precision_reduction = SETTINGS[name][1]
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(library)
        matmul.allow_bf16_reduced_precision_reduction = rounded


def parse_rows(text: str) -> list[int]:
    """The numbers of "16,32,..."."""
    rows = [int(part) for part in text.split(",") if part.isdecimal()]
    if not rows or min(rows) < 1 or len(rows) != text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers, such as 1,8,32")
    return rows


class Product:
    """A product of a layer with the operations around it, in both ways, on several copies of its weight."""

    def __init__(
        self, model: ModelConfig, name: str, rows: int, *, device: torch.device, dtype: torch.dtype, copies: int
    ):
        def random(*shape, dtype=dtype):
            return torch.randn(shape, dtype=dtype, device=device)

        self.kind, self.shape, self.model = KINDS[name], shapes(model)[name], model
        out_features, in_features = self.shape
        self.weights = random(copies, *self.shape).mul_(0.02)
        self.x, self.ops = random(rows, in_features), direct("auto", self.weights)
        self.semaphores = torch.zeros(configs.SEMAPHORES, dtype=torch.int32, device=device)
        self.residual = random(rows, out_features if self.kind == "residual" else 0)
        self.norm_weight = random(out_features if self.kind == "residual" else in_features)
        if self.kind != "residual":
            self.normed = self.ops.deferred_norm(self.x, self.norm_weight)
        self.bias = random(out_features) if self.kind == "qkv" and "q" in model.biased else None
        self.angles = [random(SEQLEN, model.headdim // 2, dtype=torch.float32) for _ in "cs"]
        self.slots = torch.randperm(SEQLEN, device=device)[:rows]
        self.caches = [random(1, model.nheads_k, SEQLEN, model.headdim).transpose(1, 2) for _ in "kv"]

    def library(self, i: int) -> Tensor:
        """The product by the library, and the launch behind it."""
        y = cpu.linear(self.x, self.weights[i], self.bias)
        if self.kind == "qkv":
            heads = self.model.nheads, self.model.nheads_k, self.model.nheads_k
            q, k, v = y.unflatten(1, (-1, self.model.headdim)).split(heads, dim=1)
            return self.ops.rope_cache_update(q, k, v, *self.angles, self.slots, self.slots, *self.caches)
        if self.kind == "gate_up":
            return self.ops.swiglu(y)
        return self.ops.add_rms_norm(y, self.residual, self.norm_weight, self.model.eps)

    def ours(self, i: int, config: configs.ProductConfig) -> Tensor:
        """One kernel of ours; without a GPU its twin."""
        return self._fused(self.ops, i, self.residual, self.caches, config)[0]

    def _fused(self, ops, i, residual, caches, config):
        """All outputs of a kernel of `ops`, or of its twin."""
        options = {} if ops is reference else {"semaphores": self.semaphores, "config": config}
        weight, eps = self.weights[i], self.model.eps
        if self.kind == "qkv":
            tokens = *self.angles, self.slots, self.slots
            q = ops.linear_rope_cache_update(self.normed, eps, weight, self.bias, *tokens, *caches, **options)
            return q, *caches
        if self.kind == "gate_up":
            return (ops.linear_swiglu(self.normed, eps, weight, **options),)
        return *ops.linear_add_norm(self.x, weight, residual, self.norm_weight, **options), residual

    def check(self, config: configs.ProductConfig) -> None:
        """Raises RuntimeError unless the kernel leaves what its twin does."""
        found = []
        # a launch that failed may not have reset them
        self.semaphores.zero_()
        for ops in (reference, self.ops):
            caches = [torch.zeros_like(cache) for cache in self.caches]
            with mock.patch.object(torch, "empty", poisoned):
                found.append(self._fused(ops, 0, self.residual.clone(), caches, config))
        for expected, got in zip(*found, strict=True):
            off = (got.float() - expected.float()).abs().max().item()
            tolerance = ROUNDINGS * torch.finfo(self.x.dtype).eps * expected.abs().max().item()
            if not off <= tolerance:  # NaN too
                raise RuntimeError(f"off its twin by {off:.3g}, more than {tolerance:.3g}")


def poisoned(*size, _empty=torch.empty, **options):
    """torch.empty filled with NaN: the memory may still hold the same result of another launch."""
    tensor = _empty(*size, **options)
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


def candidates(device: torch.device, kind: str, rows: int, shape: tuple[int, int]) -> list[configs.ProductConfig]:
    """The config of the tables, and the most promising ones: three of each tile, MAX_CANDIDATES of all.

    For 16-bit elements, the only ones that the tables have.
    """
    default = configs.product_config(device, torch.bfloat16, kind, rows, shape)
    if configs.architecture(device) is None:
        return [default]
    row_tile = max(16, 1 << (min(rows, 128) - 1).bit_length())
    found = []
    for block_n, block_r, block_k, warps in itertools.product(
        # the halves of a head
        (64,) if kind == "qkv" else (64, 128),
        (64, 128) if row_tile == 128 else (row_tile,),
        (64, 128),
        (4, 8),
    ):
        promises = []
        for splits in SPLITS:
            deeper = [configs.ProductConfig(block_n, block_r, block_k, warps, stages, splits) for stages in STAGES]
            # max takes the first: the fewest stages of those that promise as much
            promises.append(
                max(((promise(device, kind, rows, shape, config), config) for config in deeper), key=itemgetter(0))
            )
        found += sorted((each for each in promises if each[0] > 0), key=itemgetter(0), reverse=True)[:3]
    best = sorted(found, key=itemgetter(0), reverse=True)[:MAX_CANDIDATES]
    return list(dict.fromkeys((default, *(config for _, config in best))))


def promise(device: torch.device, kind: str, rows: int, shape: tuple[int, int], config: configs.ProductConfig) -> float:
    """A guess at the share of the bandwidth that a launch reaches; 0 if it does not fit or is known to be worse."""
    limits = ARCHITECTURES.get(configs.architecture(device), ARCHITECTURES[86])
    parallel, (out_features, in_features) = configs.WEIGHT_TILES[kind], shape
    weight_rows, threads = parallel * config.block_n, 32 * config.num_warps
    # bytes of a row of a tile, whose elements have 16 bits
    stage = 2 * config.block_k
    shared = config.num_stages * stage * (weight_rows + config.block_r)
    # float32 registers of a thread
    sums = weight_rows * config.block_r // threads
    steps = -(-in_features // config.block_k)
    too_short = config.splits > 1 and steps // config.splits < configs.MIN_STEPS_PER_SPLIT
    if shared > 1024 * (limits.shared_per_block - 1) or not 8 * config.num_warps // 4 <= sums <= 128 or too_short:
        return 0
    row_blocks = -(-rows // config.block_r)
    blocks_per_sm = -(-out_features // weight_rows) * row_blocks * config.splits / configs.num_sms(device)
    resident = min(limits.shared_per_sm * 1024 // (shared + 1024), limits.warps // config.num_warps)
    # some 64 registers beside the sums
    resident = min(resident, 65536 // ((sums + 64) * threads), math.ceil(blocks_per_sm))
    busy = blocks_per_sm / (resident * math.ceil(blocks_per_sm / resident))
    in_flight = resident * (config.num_stages - 1) * stage * weight_rows / row_blocks
    # the float32 sums of splits are written and read
    more = 4 * config.splits * rows / in_features if config.splits > 1 else 0
    # while some SMs wait, others get more of the bandwidth
    return math.sqrt(busy) * min(1, in_flight / BYTES_IN_FLIGHT) / (1 + more)


def cases(
    model: ModelConfig, rows: int, *, device: torch.device, dtype: torch.dtype, copies: int | None = None
) -> Iterator[tuple[str, Product, list[configs.ProductConfig]]]:
    """Yields (name, `Product`, its candidates) of the four products of a model's layer."""
    for name, kind in KINDS.items():
        shape = shapes(model)[name]
        case = Product(model, name, rows, device=device, dtype=dtype, copies=copies or cold_copies(shape, dtype))
        yield name, case, candidates(device, kind, rows, shape)


def launch_all(all_rows: list[int]) -> None:
    """Launches once, on the fake GPU, everything that a sweep launches, so that warm.py can compile it."""
    for rows, model in itertools.product(all_rows or ROWS_GPU, MODELS.values()):
        for _, case, candidates in cases(model, rows, device=torch.device("cuda", 0), dtype=torch.bfloat16, copies=1):
            case.library(0)
            for config in candidates:
                case.ours(0, config)
