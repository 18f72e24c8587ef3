"""Launch parameters by architecture, dtype and size: tables, no autotuning, so runs are deterministic.

The tiles are those of headdim 128, the tuned one; smaller heads take the same and need less of everything.
The tables come from ahead-of-time compilation for each architecture (registers, spills, shared memory) and the rule
that a streaming multiprocessor needs 32 to 64 KiB of loads in flight to reach its share of the memory bandwidth.
"""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

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
class MergeConfig:
    """(query, head) rows per program and warps of the merge of key splits."""

    block_m: int
    num_warps: int


@dataclass(frozen=True)
class RopeConfig:
    """Tokens and heads per program and warps of `rope_cache_update`."""

    block_t: int
    block_h: int
    num_warps: int


@dataclass(frozen=True)
class PackConfig:
    """Columns at a time and warps of `pack_positions`."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class RowConfig:
    """Columns (a whole row) per program and warps of what keeps the books of a row."""

    columns: int
    num_warps: int


@dataclass(frozen=True)
class CommitConfig:
    """Entries per program, entries that they are compared with at a time, and warps of `commit_tokens`."""

    block_m: int
    block_n: int
    num_warps: int


@dataclass(frozen=True)
class NormConfig:
    """Elements (a whole row) per program and warps of `add_rms_norm`."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class SwigluConfig:
    """Columns of one row per program and warps of `swiglu`."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class LMHeadConfig:
    """Tile of rows by ids by channels, warps, pipeline stages, blocks that one processor holds of `lm_head_confidence`.

    The statistics of a tile are taken in `parts` pieces of its ids.
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
    """Rows per program, the most partial results that a row may have, and warps of the merge of the programs."""

    block_m: int
    max_slices: int
    num_warps: int


@dataclass(frozen=True)
class ProductConfig:
    """Tile of weight rows by rows by channels, warps, stages, and splits of the channels of a product of few rows.

    `linear_swiglu` multiplies two tiles at a time, of gate and up; so does `linear_rope_cache_update`, whose tiles are
    the halves of a head, whatever `block_n` says.
    """

    block_n: int
    block_r: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1

    def splits_of(self, in_features):
        """`splits`, or as many as have a channel each."""
        steps = triton.cdiv(in_features, self.block_k)
        return triton.cdiv(steps, triton.cdiv(steps, self.splits))


# rows are query heads of one K/V head: the first entry with block_m >= rows is used, else the last one
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
# the interpreter's time goes by tile, not by element
ATTENTION_INTERPRETER = (AttentionConfig(16, 64, 4, 1, full_tiles_first=True), AttentionConfig(64, 64, 4, 1))


PACK = PackConfig(block=1024, num_warps=4)


def attention_table(arch, dtype):
    """The tile sizes to choose from on compute capability `arch` (90 for 9.0); None: the interpreter."""
    if arch is None:
        return ATTENTION_INTERPRETER
    if dtype == torch.float32:
        return ATTENTION_FP32
    return ATTENTION[{80: 80, 90: 90, 100: 90}.get(arch, 86)]


def attention_config(device, dtype, rows):
    """The launch of `delayed_attention` for `rows` = queries per row times query heads per K/V head."""
    table = attention_table(architecture(device), dtype)
    return next((launch for launch in table if launch.block_m >= rows), table[-1])


MAX_SPLITS = 16
PARTIAL_BYTES_IN_L2 = 8 * 2**20
# Two guesses, to be measured. The first: how many keys a program walks, alone on its processor, while a merge would
# run. By the predictions, 0.4 to 0.9 us for 64 keys and 3 us for a merge, most of it the launch, that is 200 to 500;
# the low end is the safer one, for a merge too many costs little.
MERGE_KEYS = 256
# The second: from how many programs a processor on they only share the memory's bandwidth.
PROGRAMS_PER_SM = 1.0


# What they come to for 32 queries at batch 1 on 132 num_sms; in brackets the keys that a program is spared, less
# those of the merge:
#     columns    256    1024       2048        8192
#     LLaDA      1      4 (512)    4 (1280)    4 (5888)
#     Dream      1      8 (640)    8 (1536)    9 (6976)
def num_splits_heuristic(*, programs, keys, block_n, rows, row_groups, headdim, num_sms):
    """Splits of the keys: as few as make a program's walk the shortest, 1 where that spares less than a merge costs.

    There are never so many that the programs only share the bandwidth, nor that the partial results dominate.

    Args:
        programs: int, programs of the unsplit launch.
        keys: int, columns of the longest row; block_n: int, those of a tile.
        rows: int, tile rows per (batch row, K/V head) at most; row_groups: int, how many of those groups there are.
        headdim: int; num_sms: int, streaming multiprocessors of the GPU.
    """
    # float32 partial results are written and read once: against the K and V bytes, and free while they fit the L2
    partial_bytes = 2 * 4 * rows * row_groups * headdim
    kv_bytes = 2 * 2 * keys * row_groups * headdim
    most = min(
        MAX_SPLITS,
        int(PROGRAMS_PER_SM * num_sms) // max(programs, 1),
        max(kv_bytes // 2, PARTIAL_BYTES_IN_L2) // max(partial_bytes, 1),
    )
    if most < 2 or programs == 0:
        return 1
    tiles = -(-keys // block_n)
    tiles_of_a_split = -(-tiles // most)
    spared = (tiles - tiles_of_a_split) * block_n
    return -(-tiles // tiles_of_a_split) if spared > MERGE_KEYS else 1


@functools.cache
def _properties(index):
    return torch.cuda.get_device_properties(index)


def architecture(device):
    """Compute capability as an int, 90 for 9.0; None for CPU tensors, which only the interpreter runs."""
    if device.type != "cuda":
        return None
    properties = _properties(device.index if device.index is not None else torch.cuda.current_device())
    return 10 * properties.major + properties.minor


def num_sms(device):
    """Streaming multiprocessors of the GPU; 1 for the interpreter, which runs one program at a time."""
    if device.type != "cuda":
        return 1
    return _properties(device.index if device.index is not None else torch.cuda.current_device()).multi_processor_count


def rope_config(device, headdim):
    """One token a program, so that a few tokens still fill the GPU; every thread loads 16 bytes of 16-bit elements."""
    if architecture(device) is None:
        return RopeConfig(block_t=16, block_h=8, num_warps=4)
    return RopeConfig(block_t=1, block_h=max(8, 512 // headdim), num_warps=max(1, headdim // 64))


def row_config(seqlen):
    """Up to 8 columns a thread, so that all loads of a row are in flight at once; seqlen: int, columns."""
    columns = triton.next_power_of_2(seqlen)
    return RowConfig(columns, num_warps=min(32, max(4, columns // 256)))


def merge_config(device):
    """One row a program, in one warp: its loads are all in flight at a time, and no warp waits for another."""
    return MergeConfig(block_m=64 if architecture(device) is None else 1, num_warps=1)


def commit_config(device):
    """Few entries a program spread the n^2 comparisons of a long row over the GPU; each is compared with many others at
    a time, for every turn of the loop waits for its loads."""
    if architecture(device) is None:
        return CommitConfig(block_m=256, block_n=512, num_warps=4)
    return CommitConfig(block_m=16, block_n=512, num_warps=8)


def norm_config(dtype, size):
    """Two loads of 16 bytes a thread from each tensor, up to 16 warps: few rows wait for each load in turn."""
    block = triton.next_power_of_2(size)
    return NormConfig(block, num_warps=min(16, max(1, block * dtype.itemsize // (2 * 16 * 32))))


def swiglu_config(dtype):
    """One load of 16 bytes a thread from gate and up, so that a few rows still fill the GPU."""
    return SwigluConfig(block=4 * 32 * 16 // dtype.itemsize, num_warps=4)


# the first entry with block_r >= rows is used, else the last one; in tiles of up to 32 rows the ids are the long side
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
# in place of the last entry where noise is drawn, which needs registers
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


def lm_head_table(arch, dtype, noise):
    """The tile sizes to choose from, as in `attention_table`; noise: whether Gumbel noise is drawn."""
    if arch is None:
        return LM_HEAD_INTERPRETER
    if dtype == torch.float32:
        return LM_HEAD_FP32
    arch = arch if arch in LM_HEAD else 86
    return (*LM_HEAD[arch][:-1], LM_HEAD_NOISE[arch]) if noise else LM_HEAD[arch]


def lm_head_config(device, dtype, rows, noise):
    """The launch of `lm_head_confidence` for `rows` rows."""
    table = lm_head_table(architecture(device), dtype, noise)
    return next((launch for launch in table if launch.block_r >= rows), table[-1])


def lm_head_merge_config(device):
    """All partial results of a row at a time; more of them than programs run at once on any GPU of the tables."""
    if architecture(device) is None:
        return LMHeadMergeConfig(block_m=64, max_slices=8, num_warps=4)
    return LMHeadMergeConfig(block_m=1, max_slices=512, num_warps=4)


# by the number of weight tiles of a program, and rows: the first entry with block_r >= rows is used, else the last one
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
# one for each block of outputs whose channels are split; more than any launch of the tables has
SEMAPHORES = 4096
# channels are not split further than this
MAX_PRODUCT_SPLITS, MIN_STEPS_PER_SPLIT = 4, 8
WEIGHT_TILES = {"qkv": 2, "gate_up": 2, "residual": 1}


@dataclass(frozen=True)
class MeasuredProduct:
    """A launch of a product for up to so many rows, as a GPU has timed it.

    `us` are its microseconds, `library_us` those of what it stands for: the product by the GPU's own library, and the
    launches around it.
    """

    rows: int
    launch: ProductConfig
    us: float
    library_us: float


def read_products():
    """The rows of fused_products.json, as benchmarks/product_sweep.py writes them."""
    return json.loads(Path(__file__).with_name("fused_products.json").read_text())["products"]


@functools.cache
def _measured_products():
    """(compute capability, kind, out_features, in_features) -> [MeasuredProduct], by rising rows."""
    found = {}
    for row in read_products():
        key = row["arch"], row["kind"], row["out_features"], row["in_features"]
        measured = MeasuredProduct(row["rows"], ProductConfig(**row["launch"]), row["us"], row["library_us"])
        found.setdefault(key, []).append(measured)
    return {key: sorted(rows, key=lambda row: row.rows) for key, rows in found.items()}


def _measured_product(arch, dtype, kind, rows, shape):
    known = _measured_products().get((arch, kind, *shape), ()) if dtype != torch.float32 else ()
    return next((measured for measured in known if measured.rows >= rows), None)


def product_config(device, dtype, kind, rows, shape):
    """The launch of a product of `rows` rows and a weight: the fastest one that was measured, else one of the table.

    Args:
        kind: of WEIGHT_TILES.
        shape: (out_features, in_features) of the weight.
    """
    arch = architecture(device)
    measured = _measured_product(arch, dtype, kind, rows, shape)
    if measured is not None:
        return measured.launch
    if arch is None:
        table = PRODUCT_INTERPRETER
    elif dtype == torch.float32:
        table = PRODUCT_FP32
    else:
        table = PRODUCT[{80: 80, 90: 90, 100: 90}.get(arch, 86)][WEIGHT_TILES[kind]]
    launch = next((launch for launch in table if launch.block_r >= rows), table[-1])
    if arch is None:
        return launch
    out_features, in_features = shape
    tiles = triton.cdiv(out_features, launch.block_n * WEIGHT_TILES[kind])
    # two programs a processor keep the memory busy
    wanted = 2 * num_sms(device) // (tiles * triton.cdiv(rows, launch.block_r))
    steps = triton.cdiv(in_features, launch.block_k)
    return replace(launch, splits=max(1, min(wanted, MAX_PRODUCT_SPLITS, steps // MIN_STEPS_PER_SPLIT)))


def fused_products_pay(device, dtype, rows, products):
    """Whether the products of a layer are faster as kernels of ours than as the library's, as far as a GPU has shown.

    products: [(kind, (out_features, in_features))] of a layer.
    """
    # in float16 a row times the weight of its norm may pass 65504, where the library's way does not
    if dtype != torch.bfloat16:
        return False
    arch = architecture(device)
    found = [_measured_product(arch, dtype, kind, rows, shape) for kind, shape in products]
    return None not in found and sum(one.us for one in found) < sum(one.library_us for one in found)


# the one switch of programmatic dependent launch, see skinny.py
PDL = False


def uses_pdl(device):
    """Whether the kernels of a layer start before the one in front has ended; that takes compute capability 9.0."""
    return PDL and (architecture(device) or 0) >= 90
