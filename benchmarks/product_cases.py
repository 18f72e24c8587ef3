"""What product_sweep.py measures: the products of a layer in both ways, and the launches that it tries for ours."""

import itertools
import math
import sys
from operator import itemgetter
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch  # noqa: E402
from checkpoints import TRUE_SIZE, settings_of  # noqa: E402
from fake_gpu import ARCHITECTURES  # noqa: E402
from linear_speed import COLD_BYTES, shapes  # noqa: E402

from dkv.kernels import (  # noqa: E402
    configs,  # noqa: E402
    cpu,
    reference,
)
from dkv.kernels.direct import direct  # noqa: E402

KINDS = {"Q, K, V": "qkv", "output": "residual", "gate, up": "gate_up", "down": "residual"}
# powers of two first: where a budget ends early, rows in between take the next power's launch
ROWS_GPU, ROWS_CPU = (16, 32, 64, 128, 256, 48, 96, 192), (16,)
STAGES, SPLITS = (3, 4, 5, 6), (1, 2, 3, 4, 6)
MAX_CANDIDATES = 8
# a processor with so many bytes of weights on their way has its share of the memory's bandwidth
BYTES_IN_FLIGHT = 64 * 1024
SEQLEN = 1024
# of the largest value: one rounding more or less
ROUNDINGS = 2


class Product:
    """A product of a layer with what is around it, in both ways: its inputs, and several copies of its weight."""

    def __init__(self, settings, name, rows, *, device, dtype, copies):
        def random(*shape, dtype=dtype):
            return torch.randn(shape, dtype=dtype, device=device)

        self.kind, self.shape, self.settings = KINDS[name], shapes(settings)[name], settings
        out_features, in_features = self.shape
        self.weights = random(copies, *self.shape).mul_(0.02)
        self.x, self.ops = random(rows, in_features), direct("auto", self.weights)
        self.semaphores = torch.zeros(configs.SEMAPHORES, dtype=torch.int32, device=device)
        self.residual = random(rows, out_features if self.kind == "residual" else 0)
        self.norm_weight = random(out_features if self.kind == "residual" else in_features)
        if self.kind != "residual":
            self.normed = self.ops.deferred_norm(self.x, self.norm_weight)
        self.bias = random(out_features) if self.kind == "qkv" and "q" in settings.biased else None
        self.angles = [random(SEQLEN, settings.headdim // 2, dtype=torch.float32) for _ in "cs"]
        self.slots = torch.randperm(SEQLEN, device=device)[:rows]
        self.caches = [random(1, settings.nheads_k, SEQLEN, settings.headdim).transpose(1, 2) for _ in "kv"]

    def library(self, i):
        """The product by the library, and the launch behind it."""
        y = cpu.linear(self.x, self.weights[i], self.bias)
        if self.kind == "qkv":
            heads = self.settings.nheads, self.settings.nheads_k, self.settings.nheads_k
            q, k, v = y.unflatten(1, (-1, self.settings.headdim)).split(heads, dim=1)
            return self.ops.rope_cache_update(q, k, v, *self.angles, self.slots, self.slots, *self.caches)
        if self.kind == "gate_up":
            return self.ops.swiglu(y)
        return self.ops.add_rms_norm(y, self.residual, self.norm_weight, self.settings.eps)

    def ours(self, i, launch):
        """One kernel of ours; without a GPU its twin."""
        return self._fused(self.ops, i, self.residual, self.caches, launch)[0]

    def _fused(self, ops, i, residual, caches, launch):
        """All outputs of a kernel of `ops`, or of its twin."""
        options = {} if ops is reference else {"semaphores": self.semaphores, "config": launch}
        weight, eps = self.weights[i], self.settings.eps
        if self.kind == "qkv":
            tokens = *self.angles, self.slots, self.slots
            q = ops.linear_rope_cache_update(self.normed, eps, weight, self.bias, *tokens, *caches, **options)
            return q, *caches
        if self.kind == "gate_up":
            return (ops.linear_swiglu(self.normed, eps, weight, **options),)
        return *ops.linear_add_norm(self.x, weight, residual, self.norm_weight, **options), residual

    def check(self, launch):
        """Raises RuntimeError unless the kernel leaves what its twin does."""
        found = []
        # one that failed may have left them as they were
        self.semaphores.zero_()
        for ops in (reference, self.ops):
            caches = [torch.zeros_like(cache) for cache in self.caches]
            with mock.patch.object(torch, "empty", poisoned):
                found.append(self._fused(ops, 0, self.residual.clone(), caches, launch))
        for expected, got in zip(*found, strict=True):
            off = (got.float() - expected.float()).abs().max().item()
            most = ROUNDINGS * torch.finfo(self.x.dtype).eps * expected.abs().max().item()
            # NaN is no less than anything
            if not off <= most:
                raise RuntimeError(f"off its twin by {off:.3g}, more than {most:.3g}")


def poisoned(*size, _empty=torch.empty, **options):
    """torch.empty without what was in that memory before, such as the same result of another launch."""
    tensor = _empty(*size, **options)
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


def candidates(device, kind, rows, shape):
    """The launch that the tables have, and those that promise most: three of a tile, MAX_CANDIDATES of all.

    Of 16-bit elements: the tables have no others.
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
            # of the stages the fewest that promise as much
            promises.append(
                max(((promise(device, kind, rows, shape, launch), launch) for launch in deeper), key=itemgetter(0))
            )
        found += sorted((each for each in promises if each[0] > 0), key=itemgetter(0), reverse=True)[:3]
    best = sorted(found, key=itemgetter(0), reverse=True)[:MAX_CANDIDATES]
    return list(dict.fromkeys((default, *(launch for _, launch in best))))


def promise(device, kind, rows, shape, launch):
    """A guess at the share of the bandwidth that a launch reaches; 0 where it does not fit, or is known to be worse."""
    limits = ARCHITECTURES.get(configs.architecture(device), ARCHITECTURES[86])
    parallel, (out_features, in_features) = configs.WEIGHT_TILES[kind], shape
    weight_rows, threads = parallel * launch.block_n, 32 * launch.num_warps
    # of 16-bit elements
    stage = 2 * launch.block_k
    shared = launch.num_stages * stage * (weight_rows + launch.block_r)
    # float32 registers of a thread
    sums = weight_rows * launch.block_r // threads
    steps = -(-in_features // launch.block_k)
    too_short = launch.splits > 1 and steps // launch.splits < configs.MIN_STEPS_PER_SPLIT
    if shared > 1024 * (limits.shared_per_block - 1) or not 8 * launch.num_warps // 4 <= sums <= 128 or too_short:
        return 0
    row_blocks = -(-rows // launch.block_r)
    of_a_processor = -(-out_features // weight_rows) * row_blocks * launch.splits / configs.num_sms(device)
    resident = min(limits.shared_per_processor * 1024 // (shared + 1024), limits.warps // launch.num_warps)
    # some 64 registers beside the sums
    resident = min(resident, 65536 // ((sums + 64) * threads), math.ceil(of_a_processor))
    busy = of_a_processor / (resident * math.ceil(of_a_processor / resident))
    in_flight = resident * (launch.num_stages - 1) * stage * weight_rows / row_blocks
    # sums of splits, float32, are written and read
    more = 4 * launch.splits * rows / in_features if launch.splits > 1 else 0
    # while some processors wait, others get more of the bandwidth
    return math.sqrt(busy) * min(1, in_flight / BYTES_IN_FLIGHT) / (1 + more)


def launch_all(all_rows):
    """Launches on the fake GPU, once, what a sweep launches, so that warm.py can compile it."""
    for rows, (_, config) in itertools.product(all_rows or ROWS_GPU, TRUE_SIZE.values()):
        for _, case, launches in cases(config, rows, device=torch.device("cuda", 0), dtype=torch.bfloat16, copies=1):
            case.library(0)
            for launch in launches:
                case.ours(0, launch)


def cases(config, rows, *, device, dtype, copies=None):
    """Yields (name, `Product`, its launches) of the four products of a model's layer."""
    settings = settings_of(config)
    for name, kind in KINDS.items():
        shape = shapes(settings)[name]
        many = copies or max(2, math.ceil(COLD_BYTES / (math.prod(shape) * dtype.itemsize)))
        case = Product(settings, name, rows, device=device, dtype=dtype, copies=many)
        yield name, case, candidates(device, kind, rows, shape)
