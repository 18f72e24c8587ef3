"""Tile sizes, warps and stages by architecture, dtype and size. Tables, not autotuning: runs are deterministic.

The tiles are tuned for headdim 128; smaller heads use the same ones and need fewer resources. The tables come from
ahead-of-time compilation for each architecture (registers, spills, shared memory), and from the rule that an SM needs
32 to 64 KiB of loads in flight to reach its share of the memory bandwidth.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dkv.kernels.language import triton


@dataclass(frozen=True)
class AttentionConfig:
    """Tile of (query, head) rows by keys, warps and pipeline stages of `delayed_attention`."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    full_tiles_first: bool = False


@dataclass(frozen=True)
class BlockConfig:
    """Elements that a program takes at a time, and its warps: columns of a row, or rows where attention is merged."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class RopeConfig:
    """Tokens and heads per program and warps of `rope_cache_update`."""

    block_t: int
    block_h: int
    num_warps: int


@dataclass(frozen=True)
class CommitConfig:
    """Entries per program, entries compared with them at a time, and warps of `commit_tokens`."""

    block_m: int
    block_n: int
    num_warps: int


@dataclass(frozen=True)
class LMHeadConfig:
    """Tile of rows by ids by channels, warps, pipeline stages and programs per SM of `lm_head_confidence`.

    The ids of a tile are reduced in `parts` pieces.
    """

    block_r: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    blocks_per_sm: int
    parts: int = 1


@dataclass(frozen=True)
class LMHeadMergeConfig:
    """Rows per program, maximum number of partial results per row, and warps of the merge of the programs."""

    block_m: int
    max_slices: int
    num_warps: int


@dataclass(frozen=True)
class ProductConfig:
    """Tile of weight rows by rows by channels, warps, stages, and channel splits of a product of few rows.

    `linear_swiglu` multiplies two tiles at a time, gate and up. So does `linear_rope_cache_update`; its tiles are the
    halves of a head, and it ignores `block_n`.
    """

    block_n: int
    block_r: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1

    def splits_of(self, in_features: int) -> int:
        """`splits`, or fewer where some would have no channel."""
        steps = triton.cdiv(in_features, self.block_k)
        return triton.cdiv(steps, triton.cdiv(steps, self.splits))


# rows are the query heads of one K/V head: the first entry with block_m >= rows is used, otherwise the last one
ATTENTION = {
    90: (
        AttentionConfig(16, 64, num_warps=4, num_stages=4, full_tiles_first=True),
        AttentionConfig(32, 64, num_warps=4, num_stages=3, full_tiles_first=True),
        AttentionConfig(64, 64, num_warps=4, num_stages=3, full_tiles_first=True),
        AttentionConfig(128, 64, num_warps=8, num_stages=3, full_tiles_first=True),
    ),
    80: (
        AttentionConfig(16, 64, num_warps=4, num_stages=3),
        AttentionConfig(32, 64, num_warps=4, num_stages=3),
        AttentionConfig(64, 32, num_warps=4, num_stages=4),
        AttentionConfig(128, 32, num_warps=8, num_stages=3),
    ),
    # 99 KiB of shared memory
    86: (
        AttentionConfig(16, 64, num_warps=4, num_stages=2),
        AttentionConfig(32, 32, num_warps=4, num_stages=3),
        AttentionConfig(64, 32, num_warps=4, num_stages=2),
        AttentionConfig(128, 32, num_warps=8, num_stages=3),
    ),
}
# without tensor cores small tiles keep everything in registers
ATTENTION_FP32 = (
    AttentionConfig(16, 32, num_warps=8, num_stages=2),
    AttentionConfig(32, 16, num_warps=8, num_stages=2),
)
# the interpreter takes its time per tile, not per element
ATTENTION_INTERPRETER = (AttentionConfig(16, 64, 4, 1, full_tiles_first=True), AttentionConfig(64, 64, 4, 1))

PACK = BlockConfig(block=1024, num_warps=4)  # of `pack_positions`


def _table_arch(arch):
    """The architecture whose attention and product tables `arch` uses.

    sm_100 uses Hopper's: it has as much shared memory and as many registers per SM, so the same tiles fit. All others
    use those of sm_86, which need no more than 99 KiB.
    """
    return {80: 80, 90: 90, 100: 90}.get(arch, 86)


def attention_table(arch: int | None, dtype: torch.dtype) -> tuple[AttentionConfig, ...]:
    """The configs to choose from on compute capability `arch` (90 for 9.0); None: the interpreter."""
    if arch is None:
        return ATTENTION_INTERPRETER
    if dtype == torch.float32:
        return ATTENTION_FP32
    return ATTENTION[_table_arch(arch)]


def attention_config(device: torch.device, dtype: torch.dtype, rows: int) -> AttentionConfig:
    """The config of `delayed_attention` for `rows` = queries per row times query heads per K/V head."""
    table = attention_table(architecture(device), dtype)
    return next((config for config in table if config.block_m >= rows), table[-1])


MAX_SPLITS = 16
PARTIAL_BYTES_IN_L2 = 8 * 2**20
# Two guesses, to be measured. The first is the number of keys that a program alone on its SM walks while a merge runs.
# Predictions are 0.4 to 0.9 us for 64 keys and 3 us for a merge, most of it the launch: 200 to 500 keys. The low end is
# safer, because an unnecessary merge costs little.
MERGE_KEYS = 256
# The second is the number of programs per SM from which on they only share the memory bandwidth.
PROGRAMS_PER_SM = 1.0


# The resulting splits for 32 queries at batch 1 on 132 SMs; in brackets, the keys that a program is spared, less those
# of the merge:
#     columns    256    1024       2048        8192
#     LLaDA      1      4 (512)    4 (1280)    4 (5888)
#     Dream      1      8 (640)    8 (1536)    9 (6976)
def num_splits_heuristic(
    *, programs: int, keys: int, block_n: int, rows: int, row_groups: int, headdim: int, num_sms: int
) -> int:
    """The fewest splits of the keys with the shortest walk per program; 1 if a merge costs more than they save.

    The number is limited: programs must not merely share the bandwidth, and partial results must not dominate.

    Args:
        programs: programs of the unsplit launch.
        keys: columns of the longest row; block_n: those of a tile.
        rows: maximum number of tile rows per (batch row, K/V head); row_groups: the number of those groups.
        headdim: size of a head; num_sms: streaming multiprocessors of the GPU.
    """
    # float32 partial results are written and read once; compared with the bytes of K and V, and free if they fit the L2
    partial_bytes = 2 * 4 * rows * row_groups * headdim
    kv_bytes = 2 * 2 * keys * row_groups * headdim
    max_splits = min(
        MAX_SPLITS,
        int(PROGRAMS_PER_SM * num_sms) // max(programs, 1),
        max(kv_bytes // 2, PARTIAL_BYTES_IN_L2) // max(partial_bytes, 1),
    )
    if max_splits < 2 or programs == 0:
        return 1
    tiles = -(-keys // block_n)
    tiles_of_a_split = -(-tiles // max_splits)
    spared = (tiles - tiles_of_a_split) * block_n
    return -(-tiles // tiles_of_a_split) if spared > MERGE_KEYS else 1


@functools.cache
def _properties(index):
    return torch.cuda.get_device_properties(index)


def architecture(device: torch.device) -> int | None:
    """Compute capability as an int, 90 for 9.0; None for the CPU, where only the interpreter runs kernels."""
    if device.type != "cuda":
        return None
    properties = _properties(device.index if device.index is not None else torch.cuda.current_device())
    return 10 * properties.major + properties.minor


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of the GPU; 1 for the interpreter, which runs one program at a time."""
    if device.type != "cuda":
        return 1
    return _properties(device.index if device.index is not None else torch.cuda.current_device()).multi_processor_count


def rope_config(device: torch.device, headdim: int) -> RopeConfig:
    """One token per program, so that few tokens fill the GPU; each thread loads 16 bytes of 16-bit elements."""
    if architecture(device) is None:
        return RopeConfig(block_t=16, block_h=8, num_warps=4)
    return RopeConfig(block_t=1, block_h=max(8, 512 // headdim), num_warps=max(1, headdim // 64))


def row_config(seqlen: int) -> BlockConfig:
    """`active_positions` and `advance_rows`: a row per program, up to 8 columns per thread, loaded all at once."""
    columns = triton.next_power_of_2(seqlen)
    return BlockConfig(columns, num_warps=min(32, max(4, columns // 256)))


def merge_config(device: torch.device) -> BlockConfig:
    """One row per program, in one warp: all loads are in flight at once, and no warp waits for another."""
    return BlockConfig(block=64 if architecture(device) is None else 1, num_warps=1)


def commit_config(device: torch.device) -> CommitConfig:
    """Few entries per program spread the n^2 comparisons of a long row over the GPU.

    Each is compared with many others at a time, because every turn of the loop waits for its loads.
    """
    if architecture(device) is None:
        return CommitConfig(block_m=256, block_n=512, num_warps=4)
    return CommitConfig(block_m=16, block_n=512, num_warps=8)


def norm_config(dtype: torch.dtype, size: int) -> BlockConfig:
    """Two loads of 16 bytes per thread and tensor, up to 16 warps: with few rows, latency counts."""
    block = triton.next_power_of_2(size)
    return BlockConfig(block, num_warps=min(16, max(1, block * dtype.itemsize // (2 * 16 * 32))))


def swiglu_config(dtype: torch.dtype) -> BlockConfig:
    """One load of 16 bytes per thread from gate and from up, so that few rows fill the GPU."""
    return BlockConfig(block=4 * 32 * 16 // dtype.itemsize, num_warps=4)


# the first entry with block_r >= rows is used, otherwise the last; up to 32 rows the ids are the long side of the tile
LM_HEAD = {
    100: (
        LMHeadConfig(16, 128, 64, num_warps=4, num_stages=4, blocks_per_sm=2, parts=2),
        LMHeadConfig(32, 128, 64, num_warps=8, num_stages=4, blocks_per_sm=2, parts=2),
        LMHeadConfig(64, 64, 64, num_warps=4, num_stages=4, blocks_per_sm=3),
        LMHeadConfig(128, 128, 64, num_warps=8, num_stages=4, blocks_per_sm=1, parts=4),
    ),
    90: (
        LMHeadConfig(16, 128, 64, num_warps=4, num_stages=4, blocks_per_sm=2),
        LMHeadConfig(32, 128, 64, num_warps=4, num_stages=4, blocks_per_sm=2),
        LMHeadConfig(64, 128, 64, num_warps=4, num_stages=4, blocks_per_sm=2, parts=2),
        LMHeadConfig(128, 256, 64, num_warps=8, num_stages=3, blocks_per_sm=1, parts=8),
    ),
    80: (
        LMHeadConfig(16, 128, 64, num_warps=4, num_stages=4, blocks_per_sm=2),
        LMHeadConfig(32, 128, 64, num_warps=4, num_stages=4, blocks_per_sm=2),
        LMHeadConfig(64, 128, 64, num_warps=8, num_stages=4, blocks_per_sm=2, parts=2),
        LMHeadConfig(128, 128, 64, num_warps=8, num_stages=4, blocks_per_sm=1, parts=4),
    ),
    # 99 KiB of shared memory
    86: (
        LMHeadConfig(16, 128, 64, num_warps=4, num_stages=3, blocks_per_sm=2),
        LMHeadConfig(32, 128, 64, num_warps=4, num_stages=3, blocks_per_sm=2),
        LMHeadConfig(64, 128, 64, num_warps=8, num_stages=3, blocks_per_sm=2, parts=4),
        LMHeadConfig(128, 128, 64, num_warps=8, num_stages=3, blocks_per_sm=1, parts=4),
    ),
}
# replaces the last entry if noise is drawn, because that needs registers
LM_HEAD_NOISE = {
    100: LMHeadConfig(128, 64, 64, num_warps=8, num_stages=4, blocks_per_sm=1, parts=2),
    90: LMHeadConfig(128, 128, 64, num_warps=8, num_stages=4, blocks_per_sm=1, parts=4),
    80: LMHeadConfig(128, 64, 64, num_warps=8, num_stages=4, blocks_per_sm=1, parts=2),
    86: LMHeadConfig(128, 64, 64, num_warps=8, num_stages=3, blocks_per_sm=1, parts=2),
}
LM_HEAD_FP32 = (
    LMHeadConfig(16, 128, 32, num_warps=4, num_stages=3, blocks_per_sm=2),
    LMHeadConfig(64, 64, 32, num_warps=8, num_stages=3, blocks_per_sm=2),
)
LM_HEAD_INTERPRETER = (
    LMHeadConfig(32, 128, 64, 4, 1, blocks_per_sm=2),
    LMHeadConfig(64, 128, 64, 4, 1, blocks_per_sm=2),
)


def lm_head_table(arch: int | None, dtype: torch.dtype, noise: bool) -> tuple[LMHeadConfig, ...]:
    """The configs to choose from, as in `attention_table`; noise: whether Gumbel noise is drawn."""
    if arch is None:
        return LM_HEAD_INTERPRETER
    if dtype == torch.float32:
        return LM_HEAD_FP32
    arch = arch if arch in LM_HEAD else 86
    return (*LM_HEAD[arch][:-1], LM_HEAD_NOISE[arch]) if noise else LM_HEAD[arch]


def lm_head_config(device: torch.device, dtype: torch.dtype, rows: int, noise: bool) -> LMHeadConfig:
    """The config of `lm_head_confidence` for so many rows."""
    table = lm_head_table(architecture(device), dtype, noise)
    return next((config for config in table if config.block_r >= rows), table[-1])


def lm_head_merge_config(device: torch.device) -> LMHeadMergeConfig:
    """All partial results of a row at once; max_slices exceeds the resident programs of any GPU of the tables."""
    if architecture(device) is None:
        return LMHeadMergeConfig(block_m=64, max_slices=8, num_warps=4)
    return LMHeadMergeConfig(block_m=1, max_slices=512, num_warps=4)


# by weight tiles per program; then the first entry with block_r >= rows is used, otherwise the last one
PRODUCT = {
    90: {
        1: (
            ProductConfig(64, 16, 128, num_warps=4, num_stages=4),
            ProductConfig(64, 32, 128, num_warps=4, num_stages=4),
            ProductConfig(64, 64, 128, num_warps=8, num_stages=3),
            ProductConfig(64, 128, 64, num_warps=8, num_stages=4),
        ),
        2: (
            ProductConfig(64, 16, 64, num_warps=4, num_stages=5),
            ProductConfig(64, 32, 64, num_warps=4, num_stages=4),
            ProductConfig(64, 64, 64, num_warps=8, num_stages=4),
            ProductConfig(64, 128, 64, num_warps=8, num_stages=4),
        ),
    },
    80: {
        1: (
            ProductConfig(64, 16, 128, num_warps=4, num_stages=3),
            ProductConfig(64, 32, 128, num_warps=4, num_stages=3),
            ProductConfig(64, 64, 64, num_warps=4, num_stages=4),
            ProductConfig(64, 128, 64, num_warps=8, num_stages=3),
        ),
        2: (
            ProductConfig(64, 16, 64, num_warps=4, num_stages=4),
            ProductConfig(64, 32, 64, num_warps=4, num_stages=4),
            ProductConfig(64, 64, 64, num_warps=8, num_stages=3),
            ProductConfig(64, 128, 32, num_warps=8, num_stages=4),
        ),
    },
    # 99 KiB of shared memory
    86: {
        1: (
            ProductConfig(64, 16, 64, num_warps=4, num_stages=4),
            ProductConfig(64, 32, 64, num_warps=4, num_stages=4),
            ProductConfig(64, 64, 64, num_warps=4, num_stages=3),
            ProductConfig(64, 128, 64, num_warps=8, num_stages=2),
        ),
        2: (
            ProductConfig(64, 16, 64, num_warps=4, num_stages=3),
            ProductConfig(64, 32, 64, num_warps=4, num_stages=3),
            ProductConfig(64, 64, 64, num_warps=8, num_stages=2),
            ProductConfig(64, 128, 32, num_warps=8, num_stages=3),
        ),
    },
}
PRODUCT_FP32 = (ProductConfig(64, 16, 32, num_warps=8, num_stages=3),)
PRODUCT_INTERPRETER = (ProductConfig(64, 64, 256, num_warps=4, num_stages=1),)
# with more rows the GPU's own library is expected to be faster
MAX_PRODUCT_ROWS = 256
# one for each block of outputs whose channels are split; no launch of the tables has so many
SEMAPHORES = 4096
# limits of splitting the channels
MAX_PRODUCT_SPLITS, MIN_STEPS_PER_SPLIT = 4, 8
ProductKind = Literal["qkv", "gate_up", "residual"]
WEIGHT_TILES = {"qkv": 2, "gate_up": 2, "residual": 1}


@dataclass(frozen=True)
class MeasuredProduct:
    """The best config of a product for up to `rows` rows, as timed on a GPU.

    `us` is the time of our kernel in microseconds; `library_us` that of the library's product and the launches around
    it, which our kernel replaces.
    """

    rows: int
    config: ProductConfig
    us: float
    library_us: float


def read_products() -> list[dict[str, Any]]:
    """The rows of fused_products.json, as benchmarks/product_sweep.py writes them."""
    return json.loads(Path(__file__).with_name("fused_products.json").read_text())["products"]


@functools.cache
def _measured_products():
    """(compute capability, kind, out_features, in_features) -> [MeasuredProduct], sorted by rows."""
    found = {}
    for row in read_products():
        key = row["arch"], row["kind"], row["out_features"], row["in_features"]
        measured = MeasuredProduct(row["rows"], ProductConfig(**row["config"]), row["us"], row["library_us"])
        found.setdefault(key, []).append(measured)
    return {key: sorted(rows, key=lambda row: row.rows) for key, rows in found.items()}


def _measured_product(arch, dtype, kind, rows, shape):
    known = _measured_products().get((arch, kind, *shape), ()) if dtype != torch.float32 else ()
    return next((measured for measured in known if measured.rows >= rows), None)


def product_config(
    device: torch.device, dtype: torch.dtype, kind: ProductKind, rows: int, shape: tuple[int, int]
) -> ProductConfig:
    """The config of a product of `rows` rows and a weight: the fastest measured one, otherwise one of the table.

    shape: (out_features, in_features) of the weight.
    """
    arch = architecture(device)
    measured = _measured_product(arch, dtype, kind, rows, shape)
    if measured is not None:
        return measured.config
    if arch is None:
        table = PRODUCT_INTERPRETER
    elif dtype == torch.float32:
        table = PRODUCT_FP32
    else:
        table = PRODUCT[_table_arch(arch)][WEIGHT_TILES[kind]]
    config = next((config for config in table if config.block_r >= rows), table[-1])
    if arch is None:
        return config
    out_features, in_features = shape
    tiles = triton.cdiv(out_features, config.block_n * WEIGHT_TILES[kind])
    # two programs per SM keep the memory busy
    wanted = 2 * num_sms(device) // (tiles * triton.cdiv(rows, config.block_r))
    steps = triton.cdiv(in_features, config.block_k)
    return replace(config, splits=max(1, min(wanted, MAX_PRODUCT_SPLITS, steps // MIN_STEPS_PER_SPLIT)))


def fused_products_pay(
    device: torch.device, dtype: torch.dtype, rows: int, products: Sequence[tuple[ProductKind, tuple[int, int]]]
) -> bool:
    """Whether our kernels compute the products of a layer faster than the library, as measured on this GPU.

    products: [(kind, (out_features, in_features))] of a layer.
    """
    # in float16 a row times the weight of its norm can overflow; the library's way normalises first
    if dtype != torch.bfloat16:
        return False
    arch = architecture(device)
    found = [_measured_product(arch, dtype, kind, rows, shape) for kind, shape in products]
    return None not in found and sum(one.us for one in found) < sum(one.library_us for one in found)


# switches programmatic dependent launch on, see skinny.py
PDL = False


def uses_pdl(device: torch.device) -> bool:
    """Whether each kernel of a layer starts before the previous one has ended; needs compute capability 9.0."""
    return PDL and (architecture(device) or 0) >= 90
