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
class AttentionLaunch:
    """Tile of (query, head) rows by keys, warps and pipeline stages of `delayed_attention`."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    full_tiles_first: bool = False


@dataclass(frozen=True)
class MergeLaunch:
    """(query, head) rows per program and warps of the merge of key splits."""

    block_m: int
    num_warps: int


@dataclass(frozen=True)
class RopeLaunch:
    """Tokens and heads per program and warps of `rope_cache_update`."""

    block_t: int
    block_h: int
    num_warps: int


@dataclass(frozen=True)
class PackLaunch:
    """Columns at a time and warps of `pack_positions`."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class RowLaunch:
    """Columns (a whole row) per program and warps of what keeps the books of a row."""

    columns: int
    num_warps: int


@dataclass(frozen=True)
class CommitLaunch:
    """Entries per program, entries that they are compared with at a time, and warps of `commit_tokens`."""

    block_m: int
    block_n: int
    num_warps: int


@dataclass(frozen=True)
class NormLaunch:
    """Elements (a whole row) per program and warps of `add_rms_norm`."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class SwigluLaunch:
    """Columns of one row per program and warps of `swiglu`."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class HeadLaunch:
    """Tile of rows by ids by channels, warps, pipeline stages, blocks that one processor holds of `lm_head_confidence`.

    The statistics of a tile are taken in `parts` pieces of its ids.
    """

    block_r: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    blocks_per_processor: int
    parts: int = 1


@dataclass(frozen=True)
class HeadMergeLaunch:
    """Rows per program, the most partial results that a row may have, and warps of the merge of the programs."""

    block_m: int
    most_slices: int
    num_warps: int


@dataclass(frozen=True)
class ProductLaunch:
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
HALF_PRECISION = {
    90: (
        AttentionLaunch(16, 64, num_warps=4, num_stages=4, full_tiles_first=True),
        AttentionLaunch(32, 64, num_warps=4, num_stages=3, full_tiles_first=True),
        AttentionLaunch(64, 64, num_warps=4, num_stages=3, full_tiles_first=True),
        AttentionLaunch(128, 64, num_warps=8, num_stages=3, full_tiles_first=True),
    ),
    80: (
        AttentionLaunch(16, 64, num_warps=4, num_stages=3),
        AttentionLaunch(32, 64, num_warps=4, num_stages=3),
        AttentionLaunch(64, 32, num_warps=4, num_stages=4),
        AttentionLaunch(128, 32, num_warps=8, num_stages=3),
    ),
    # 99 KiB of shared memory
    86: (
        AttentionLaunch(16, 64, num_warps=4, num_stages=2),
        AttentionLaunch(32, 32, num_warps=4, num_stages=3),
        AttentionLaunch(64, 32, num_warps=4, num_stages=2),
        AttentionLaunch(128, 32, num_warps=8, num_stages=3),
    ),
}
# without tensor cores small tiles keep everything in registers
FULL_PRECISION = (
    AttentionLaunch(16, 32, num_warps=8, num_stages=2),
    AttentionLaunch(32, 16, num_warps=8, num_stages=2),
)
# the interpreter's time goes by tile, not by element
INTERPRETER = (AttentionLaunch(16, 64, 4, 1, full_tiles_first=True), AttentionLaunch(64, 64, 4, 1))


PACK = PackLaunch(block=1024, num_warps=4)


def attention_table(arch, dtype):
    """The tile sizes to choose from on compute capability `arch` (90 for 9.0); None: the interpreter."""
    if arch is None:
        return INTERPRETER
    if dtype == torch.float32:
        return FULL_PRECISION
    return HALF_PRECISION[{80: 80, 90: 90, 100: 90}.get(arch, 86)]


def attention_launch(device, dtype, rows):
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
PROGRAMS_PER_PROCESSOR = 1.0


# What they come to for 32 queries at batch 1 on 132 processors; in brackets the keys that a program is spared, less
# those of the merge:
#     columns    256    1024       2048        8192
#     LLaDA      1      4 (512)    4 (1280)    4 (5888)
#     Dream      1      8 (640)    8 (1536)    9 (6976)
def num_splits_heuristic(*, programs, keys, block_n, rows, row_groups, headdim, processors):
    """Splits of the keys: as few as make a program's walk the shortest, 1 where that spares less than a merge costs.

    There are never so many that the programs only share the bandwidth, nor that the partial results dominate.

    Args:
        programs: int, programs of the unsplit launch.
        keys: int, columns of the longest row; block_n: int, those of a tile.
        rows: int, tile rows per (batch row, K/V head) at most; row_groups: int, how many of those groups there are.
        headdim: int; processors: int, streaming multiprocessors of the GPU.
    """
    # float32 partial results are written and read once: against the K and V bytes, and free while they fit the L2
    partial_bytes = 2 * 4 * rows * row_groups * headdim
    kv_bytes = 2 * 2 * keys * row_groups * headdim
    most = min(
        MAX_SPLITS,
        int(PROGRAMS_PER_PROCESSOR * processors) // max(programs, 1),
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


def processors(device):
    """Streaming multiprocessors of the GPU; 1 for the interpreter, which runs one program at a time."""
    if device.type != "cuda":
        return 1
    return _properties(device.index if device.index is not None else torch.cuda.current_device()).multi_processor_count


def rope_launch(device, headdim):
    """One token a program, so that a few tokens still fill the GPU; every thread loads 16 bytes of 16-bit elements."""
    if architecture(device) is None:
        return RopeLaunch(block_t=16, block_h=8, num_warps=4)
    return RopeLaunch(block_t=1, block_h=max(8, 512 // headdim), num_warps=max(1, headdim // 64))


def row_launch(seqlen):
    """Up to 8 columns a thread, so that all loads of a row are in flight at once; seqlen: int, columns."""
    columns = triton.next_power_of_2(seqlen)
    return RowLaunch(columns, num_warps=min(32, max(4, columns // 256)))


def merge_launch(device):
    """One row a program, in one warp: its loads are all in flight at a time, and no warp waits for another."""
    return MergeLaunch(block_m=64 if architecture(device) is None else 1, num_warps=1)


def commit_launch(device):
    """Few entries a program spread the n^2 comparisons of a long row over the GPU; each is compared with many others at
    a time, for every turn of the loop waits for its loads."""
    if architecture(device) is None:
        return CommitLaunch(block_m=256, block_n=512, num_warps=4)
    return CommitLaunch(block_m=16, block_n=512, num_warps=8)


def norm_launch(dtype, size):
    """Two loads of 16 bytes a thread from each tensor, up to 16 warps: few rows wait for each load in turn."""
    block = triton.next_power_of_2(size)
    return NormLaunch(block, num_warps=min(16, max(1, block * dtype.itemsize // (2 * 16 * 32))))


def swiglu_launch(dtype):
    """One load of 16 bytes a thread from gate and up, so that a few rows still fill the GPU."""
    return SwigluLaunch(block=4 * 32 * 16 // dtype.itemsize, num_warps=4)


# the first entry with block_r >= rows is used, else the last one; in tiles of up to 32 rows the ids are the long side
HEAD = {
    100: (
        HeadLaunch(16, 128, 64, num_warps=4, num_stages=4, blocks_per_processor=2, parts=2),
        HeadLaunch(32, 128, 64, num_warps=8, num_stages=4, blocks_per_processor=2, parts=2),
        HeadLaunch(64, 64, 64, num_warps=4, num_stages=4, blocks_per_processor=3),
        HeadLaunch(128, 128, 64, num_warps=8, num_stages=4, blocks_per_processor=1, parts=4),
    ),
    90: (
        HeadLaunch(16, 128, 64, num_warps=4, num_stages=4, blocks_per_processor=2),
        HeadLaunch(32, 128, 64, num_warps=4, num_stages=4, blocks_per_processor=2),
        HeadLaunch(64, 128, 64, num_warps=4, num_stages=4, blocks_per_processor=2, parts=2),
        HeadLaunch(128, 256, 64, num_warps=8, num_stages=3, blocks_per_processor=1, parts=8),
    ),
    80: (
        HeadLaunch(16, 128, 64, num_warps=4, num_stages=4, blocks_per_processor=2),
        HeadLaunch(32, 128, 64, num_warps=4, num_stages=4, blocks_per_processor=2),
        HeadLaunch(64, 128, 64, num_warps=8, num_stages=4, blocks_per_processor=2, parts=2),
        HeadLaunch(128, 128, 64, num_warps=8, num_stages=4, blocks_per_processor=1, parts=4),
    ),
    # 99 KiB of shared memory
    86: (
        HeadLaunch(16, 128, 64, num_warps=4, num_stages=3, blocks_per_processor=2),
        HeadLaunch(32, 128, 64, num_warps=4, num_stages=3, blocks_per_processor=2),
        HeadLaunch(64, 128, 64, num_warps=8, num_stages=3, blocks_per_processor=2, parts=4),
        HeadLaunch(128, 128, 64, num_warps=8, num_stages=3, blocks_per_processor=1, parts=4),
    ),
}
# in place of the last entry where noise is drawn, which needs registers
HEAD_NOISE = {
    100: HeadLaunch(128, 64, 64, num_warps=8, num_stages=4, blocks_per_processor=1, parts=2),
    90: HeadLaunch(128, 128, 64, num_warps=8, num_stages=4, blocks_per_processor=1, parts=4),
    80: HeadLaunch(128, 64, 64, num_warps=8, num_stages=4, blocks_per_processor=1, parts=2),
    86: HeadLaunch(128, 64, 64, num_warps=8, num_stages=3, blocks_per_processor=1, parts=2),
}
HEAD_FULL_PRECISION = (
    HeadLaunch(16, 128, 32, num_warps=4, num_stages=3, blocks_per_processor=2),
    HeadLaunch(64, 64, 32, num_warps=8, num_stages=3, blocks_per_processor=2),
)
HEAD_INTERPRETER = (
    HeadLaunch(32, 128, 64, 4, 1, blocks_per_processor=2),
    HeadLaunch(64, 128, 64, 4, 1, blocks_per_processor=2),
)


def head_table(arch, dtype, noise):
    """The tile sizes to choose from, as in `attention_table`; noise: whether Gumbel noise is drawn."""
    if arch is None:
        return HEAD_INTERPRETER
    if dtype == torch.float32:
        return HEAD_FULL_PRECISION
    arch = arch if arch in HEAD else 86
    return (*HEAD[arch][:-1], HEAD_NOISE[arch]) if noise else HEAD[arch]


def head_launch(device, dtype, rows, noise):
    """The launch of `lm_head_confidence` for `rows` rows."""
    table = head_table(architecture(device), dtype, noise)
    return next((launch for launch in table if launch.block_r >= rows), table[-1])


def head_merge_launch(device):
    """All partial results of a row at a time; more of them than programs run at once on any GPU of the tables."""
    if architecture(device) is None:
        return HeadMergeLaunch(block_m=64, most_slices=8, num_warps=4)
    return HeadMergeLaunch(block_m=1, most_slices=512, num_warps=4)


# by the number of weight tiles of a program, and rows: the first entry with block_r >= rows is used, else the last one
PRODUCT = {
    90: {
        1: (
            ProductLaunch(64, 16, 128, num_warps=4, num_stages=4),
            ProductLaunch(64, 32, 128, num_warps=4, num_stages=4),
            ProductLaunch(64, 64, 128, num_warps=8, num_stages=3),
            ProductLaunch(64, 128, 64, num_warps=8, num_stages=4),
        ),
        2: (
            ProductLaunch(64, 16, 64, num_warps=4, num_stages=5),
            ProductLaunch(64, 32, 64, num_warps=4, num_stages=4),
            ProductLaunch(64, 64, 64, num_warps=8, num_stages=4),
            ProductLaunch(64, 128, 64, num_warps=8, num_stages=4),
        ),
    },
    80: {
        1: (
            ProductLaunch(64, 16, 128, num_warps=4, num_stages=3),
            ProductLaunch(64, 32, 128, num_warps=4, num_stages=3),
            ProductLaunch(64, 64, 64, num_warps=4, num_stages=4),
            ProductLaunch(64, 128, 64, num_warps=8, num_stages=3),
        ),
        2: (
            ProductLaunch(64, 16, 64, num_warps=4, num_stages=4),
            ProductLaunch(64, 32, 64, num_warps=4, num_stages=4),
            ProductLaunch(64, 64, 64, num_warps=8, num_stages=3),
            ProductLaunch(64, 128, 32, num_warps=8, num_stages=4),
        ),
    },
    # 99 KiB of shared memory
    86: {
        1: (
            ProductLaunch(64, 16, 64, num_warps=4, num_stages=4),
            ProductLaunch(64, 32, 64, num_warps=4, num_stages=4),
            ProductLaunch(64, 64, 64, num_warps=4, num_stages=3),
            ProductLaunch(64, 128, 64, num_warps=8, num_stages=2),
        ),
        2: (
            ProductLaunch(64, 16, 64, num_warps=4, num_stages=3),
            ProductLaunch(64, 32, 64, num_warps=4, num_stages=3),
            ProductLaunch(64, 64, 64, num_warps=8, num_stages=2),
            ProductLaunch(64, 128, 32, num_warps=8, num_stages=3),
        ),
    },
}
PRODUCT_FULL_PRECISION = (ProductLaunch(64, 16, 32, num_warps=8, num_stages=3),)
PRODUCT_INTERPRETER = (ProductLaunch(64, 64, 256, num_warps=4, num_stages=1),)
# with more rows the GPU's own library is expected to be faster
MOST_PRODUCT_ROWS = 256
# one for each block of outputs whose channels are split; more than any launch of the tables has
SEMAPHORES = 4096
# channels are not split further than this
MOST_PRODUCT_SPLITS, LEAST_STEPS_OF_A_SPLIT = 4, 8
WEIGHT_TILES = {"qkv": 2, "gate_up": 2, "residual": 1}


@dataclass(frozen=True)
class MeasuredProduct:
    """A launch of a product for up to so many rows, as a GPU has timed it.

    `us` are its microseconds, `library_us` those of what it stands for: the product by the GPU's own library, and the
    launches around it.
    """

    rows: int
    launch: ProductLaunch
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
        measured = MeasuredProduct(row["rows"], ProductLaunch(**row["launch"]), row["us"], row["library_us"])
        found.setdefault(key, []).append(measured)
    return {key: sorted(rows, key=lambda row: row.rows) for key, rows in found.items()}


def _measured_product(arch, dtype, kind, rows, shape):
    known = _measured_products().get((arch, kind, *shape), ()) if dtype != torch.float32 else ()
    return next((measured for measured in known if measured.rows >= rows), None)


def product_launch(device, dtype, kind, rows, shape):
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
        table = PRODUCT_FULL_PRECISION
    else:
        table = PRODUCT[{80: 80, 90: 90, 100: 90}.get(arch, 86)][WEIGHT_TILES[kind]]
    launch = next((launch for launch in table if launch.block_r >= rows), table[-1])
    if arch is None:
        return launch
    out_features, in_features = shape
    tiles = triton.cdiv(out_features, launch.block_n * WEIGHT_TILES[kind])
    # two programs a processor keep the memory busy
    wanted = 2 * processors(device) // (tiles * triton.cdiv(rows, launch.block_r))
    steps = triton.cdiv(in_features, launch.block_k)
    return replace(launch, splits=max(1, min(wanted, MOST_PRODUCT_SPLITS, steps // LEAST_STEPS_OF_A_SPLIT)))


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
