"""What the products of few rows share: the walk over the weight, its splits, the deferred norm, dependent launches.

Few rows times a large weight is bound by reading the weight once. So its rows are the long side of the matrix product,
and a tile of them times a block of token rows is a program; where the tiles are too few to keep the GPU busy, their
channels are split among several programs: each leaves its sum in float32, and the last one to arrive adds them up in a
fixed order. Who is last depends on the run, what comes out does not. Square sums, slots, positions and the residual
stream, which the end of a program needs, are loaded ahead of the weights: behind them each trip to memory would cost.

RMSNorm is deferred: scaling a row commutes with the product, so the rows come multiplied by the norm's weight alone,
and rsqrt(mean of squares + eps) multiplies the result (Graef et al., FlashNorm, arXiv 2407.09577).

With PDL a kernel starts while the one in front still runs (CUDA's programmatic dependent launch): it begins to bring
its weights into the L2, and waits before it reads or writes anything else. Every kernel of such a chain must wait: the
next one waits for this one alone, so what this one did not wait for might still be running.
"""

import torch

from dkv.kernels import reference
from dkv.kernels.configs import uses_pdl
from dkv.kernels.language import tl, triton

PART = tl.constexpr(reference.PART)
# what is prefetched into the L2 of a weight row
LINE_BYTES, PREFETCHED_LINES = tl.constexpr(128), tl.constexpr(4)


@triton.jit
def share_of(tiles, row_blocks, in_features, SPLITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """What a program of the flat grid does: (tile, row block, output, split, first, last).

    `output` counts the pairs of tile and row block, whose channels are split; the program has the steps of BLOCK_K
    channels first .. last - 1. Blocks of rows run next to each other, so that a tile comes from the L2 after the first.
    """
    program = tl.program_id(0)
    output = program % (tiles * row_blocks)
    steps = tl.cdiv(in_features, BLOCK_K)
    steps_of_a_split = tl.cdiv(steps, SPLITS)
    split = program // (tiles * row_blocks)
    first = split * steps_of_a_split
    last = tl.minimum(first + steps_of_a_split, steps)
    return output // row_blocks, output % row_blocks, output, split, first, last


@triton.jit
def load_tile(ptrs, step, in_features, BLOCK_K: tl.constexpr, MASK_K: tl.constexpr):
    """(rows, BLOCK_K): the channels of one step of the rows that ptrs (rows,) point at."""
    channels = step * BLOCK_K + tl.arange(0, BLOCK_K)
    if MASK_K:
        return tl.load(ptrs[:, None] + channels[None, :], mask=(channels < in_features)[None, :], other=0.0)
    else:
        return tl.load(ptrs[:, None] + channels[None, :])


@triton.jit
def prefetch_into_l2(weight_ptrs, step, in_features, BLOCK_K: tl.constexpr):
    """Begins to load the first channels of some weight rows, which depend on no kernel, into the L2."""
    ELEMENTS: tl.constexpr = LINE_BYTES * 8 // weight_ptrs.dtype.element_ty.primitive_bitwidth
    channels = tl.minimum(step * BLOCK_K + tl.arange(0, PREFETCHED_LINES) * ELEMENTS, in_features - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [weight_ptrs[:, None] + channels[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def two_products(
    x_ptrs,
    a_ptrs,
    b_ptrs,
    first,
    last,
    in_features,
    BLOCK_K: tl.constexpr,
    MASK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Two tiles of weight rows times the same block of token rows: (BLOCK_N, BLOCK_R) float32 each."""
    a = tl.zeros([a_ptrs.shape[0], x_ptrs.shape[0]], dtype=tl.float32)
    b = tl.zeros([b_ptrs.shape[0], x_ptrs.shape[0]], dtype=tl.float32)
    for step in range(first, last):
        x = load_tile(x_ptrs, step, in_features, BLOCK_K, MASK_K).T
        a = tl.dot(load_tile(a_ptrs, step, in_features, BLOCK_K, MASK_K), x, a, input_precision=PRECISION)
        b = tl.dot(load_tile(b_ptrs, step, in_features, BLOCK_K, MASK_K), x, b, input_precision=PRECISION)
    return a, b


@triton.jit
def keep_partial(partial_ptr, index, part):
    """Writes one of the tiles that are summed up later; they lie one behind the other."""
    offs_n = tl.arange(0, part.shape[0]).to(tl.int64)[:, None]
    offs = offs_n * part.shape[1] + tl.arange(0, part.shape[1])[None, :]
    tl.store(partial_ptr + index.to(tl.int64) * part.numel + offs, part)


@triton.jit
def is_last_to_arrive(semaphore_ptr, SPLITS: tl.constexpr):
    """Whether the other programs of a tile have written all their partial sums; the last one resets the semaphore."""
    # every thread has written before one of them says so
    tl.debug_barrier()
    is_last = tl.atomic_add(semaphore_ptr, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if is_last:
        tl.store(semaphore_ptr, 0)
    return is_last


@triton.jit
def sum_of_partials(partial_ptr, first, like, SPLITS: tl.constexpr, STEP: tl.constexpr):
    """The sum of SPLITS tiles, in their order: the one at `first`, and every STEP-th one behind it."""
    offs = tl.arange(0, like.shape[0]).to(tl.int64)[:, None] * like.shape[1] + tl.arange(0, like.shape[1])[None, :]
    ptrs = partial_ptr + first.to(tl.int64) * like.numel + offs
    # not from the L1, which does not see what other programs write
    total = tl.load(ptrs, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(ptrs + split * STEP * like.numel, cache_modifier=".cg")
    return total


@triton.jit
def load_square_sums(square_sums_ptr, offs_r, rows, parts, PARTS: tl.constexpr):
    """[PARTS, BLOCK_R]: those of some rows; to be loaded ahead of the weights, and used behind them."""
    offs_p = tl.arange(0, PARTS)
    ptrs = square_sums_ptr + offs_p[:, None] * rows + offs_r[None, :]
    return tl.load(ptrs, mask=(offs_p < parts)[:, None], other=0.0)


@triton.jit
def row_scales(square_sums, size, eps):
    """[BLOCK_R]: rsqrt(mean of squares + eps) of each row; the parts are added in a fixed order."""
    return tl.rsqrt(tl.sum(square_sums, 0) / size + eps)


def scratch(like, outputs, splits, elements, semaphores):
    """(partial sums, semaphores) of `outputs` tiles of `elements`, each the sum of `splits`; None, None if that is 1.

    semaphores: int32 zeros, which the kernels leave as zeros; None: new ones, at the price of another launch.
    """
    if splits == 1:
        return None, None
    if semaphores is None:
        semaphores = torch.zeros(outputs, dtype=torch.int32, device=like.device)
    elif semaphores.shape[0] < outputs:
        raise ValueError(f"there must be a semaphore for each of {outputs} tiles, got {semaphores.shape[0]}.")
    return torch.empty(outputs * splits * elements, dtype=torch.float32, device=like.device), semaphores


def empty_deferred(like):
    """A `DeferredNorm` to be filled, of rows like these."""
    rows, size = like.shape
    shape, dtype = (-(-size // reference.PART), rows), torch.promote_types(like.dtype, torch.float32)
    weighted = torch.empty((rows, size), dtype=like.dtype, device=like.device)
    return reference.DeferredNorm(weighted, torch.empty(shape, dtype=dtype, device=like.device))


def options_of(launch, in_features, device):
    """The constants and options that each of these products is launched with; launch: `ProductConfig`."""
    pdl = uses_pdl(device)
    return {
        "BLOCK_R": launch.block_r,
        "BLOCK_K": launch.block_k,
        "MASK_K": in_features % launch.block_k != 0,
        "SPLITS": launch.splits_of(in_features),
        "PRECISION": "ieee",
        "PDL": pdl,
        "launch_pdl": pdl,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
