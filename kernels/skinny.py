"""Shared parts of the products of few rows: walking over the weight, splits, the deferred norm, dependent launches.

A product of few rows and a large weight is bound by reading the weight once. So the weight's rows are the long side of
the matrix product, and a program multiplies a tile of them by a block of token rows. If there are too few tiles to keep
the GPU busy, several programs split the channels of a tile: each leaves its sum in float32, and the last one to arrive
adds them up in a fixed order, so the result does not depend on which one is last. Square sums, slots, positions and the
residual stream are needed at the end of a program, but are loaded ahead of the weights, which hide their latency.

RMSNorm is deferred: scaling a row commutes with the product, so the rows come multiplied by the norm's weight alone,
and rsqrt(mean of squares + eps) multiplies the result (Graef et al., FlashNorm, arXiv 2407.09577).

With PDL (CUDA's programmatic dependent launch) a kernel starts while the previous one still runs. It begins to load its
weights into the L2, and waits before it reads or writes anything else. Every kernel of such a chain must wait: the next
one waits for this one alone, so a kernel that this one did not wait for could still be running then.
"""

from typing import Any

import torch
from torch import Tensor

from dkv.kernels import reference
from dkv.kernels.configs import ProductConfig, uses_pdl
from dkv.kernels.language import tl, triton

PART = tl.constexpr(reference.PART)
# how much of a weight row is prefetched into the L2
LINE_BYTES, PREFETCHED_LINES = tl.constexpr(128), tl.constexpr(4)


@triton.jit
def share_of(tiles, row_blocks, in_features, SPLITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The work of a program of the flat grid: (tile, row block, output, split, first, last).

    `output` numbers the pairs of a tile and a row block, whose channels are split. The program does the steps first ..
    last - 1, each of BLOCK_K channels. The row blocks of a tile are neighbours, so all but the first find it in the L2.
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
    """(rows, BLOCK_K): one step's channels of the rows at ptrs (rows,)."""
    channels = step * BLOCK_K + tl.arange(0, BLOCK_K)
    if MASK_K:
        return tl.load(ptrs[:, None] + channels[None, :], mask=(channels < in_features)[None, :], other=0.0)
    else:
        return tl.load(ptrs[:, None] + channels[None, :])


@triton.jit
def prefetch_into_l2(weight_ptrs, step, in_features, BLOCK_K: tl.constexpr):
    """Begins to load the first channels of some weight rows into the L2; they depend on no kernel."""
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
):
    """Two tiles of weight rows times the same block of token rows: (BLOCK_N, BLOCK_R) float32 each."""
    a = tl.zeros([a_ptrs.shape[0], x_ptrs.shape[0]], dtype=tl.float32)
    b = tl.zeros([b_ptrs.shape[0], x_ptrs.shape[0]], dtype=tl.float32)
    for step in range(first, last):
        x = load_tile(x_ptrs, step, in_features, BLOCK_K, MASK_K).T
        a = tl.dot(load_tile(a_ptrs, step, in_features, BLOCK_K, MASK_K), x, a, input_precision="ieee")
        b = tl.dot(load_tile(b_ptrs, step, in_features, BLOCK_K, MASK_K), x, b, input_precision="ieee")
    return a, b


@triton.jit
def keep_partial(partial_ptr, index, part):
    """Writes one of the tiles to be summed up later; they lie one after the other."""
    offs_n = tl.arange(0, part.shape[0]).to(tl.int64)[:, None]
    offs = offs_n * part.shape[1] + tl.arange(0, part.shape[1])[None, :]
    tl.store(partial_ptr + index.to(tl.int64) * part.numel + offs, part)


@triton.jit
def is_last_to_arrive(semaphore_ptr, SPLITS: tl.constexpr):
    """Whether the other programs of a tile have written their partial sums; the last one resets the semaphore."""
    # all threads must have written before one of them reports it
    tl.debug_barrier()
    is_last = tl.atomic_add(semaphore_ptr, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if is_last:
        tl.store(semaphore_ptr, 0)
    return is_last


@triton.jit
def sum_of_partials(partial_ptr, first, like, SPLITS: tl.constexpr, STEP: tl.constexpr):
    """The sum of SPLITS tiles in a fixed order: the one at `first`, and every STEP-th one after it."""
    offs = tl.arange(0, like.shape[0]).to(tl.int64)[:, None] * like.shape[1] + tl.arange(0, like.shape[1])[None, :]
    ptrs = partial_ptr + first.to(tl.int64) * like.numel + offs
    # bypasses the L1, which does not see the writes of other programs
    total = tl.load(ptrs, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(ptrs + split * STEP * like.numel, cache_modifier=".cg")
    return total


@triton.jit
def load_square_sums(square_sums_ptr, offs_r, rows, parts, PARTS: tl.constexpr):
    """[PARTS, BLOCK_R]: the square sums of some rows; to be loaded ahead of the weights and used after them."""
    offs_p = tl.arange(0, PARTS)
    ptrs = square_sums_ptr + offs_p[:, None] * rows + offs_r[None, :]
    return tl.load(ptrs, mask=(offs_p < parts)[:, None], other=0.0)


@triton.jit
def row_scales(square_sums, size, eps):
    """[BLOCK_R]: rsqrt(mean of squares + eps) of each row; adds the parts in a fixed order."""
    return tl.rsqrt(tl.sum(square_sums, 0) / size + eps)


def scratch(
    like: Tensor, outputs: int, splits: int, elements: int, semaphores: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(partial sums, semaphores) of `outputs` tiles of `elements`, each the sum of `splits`; None, None for 1 split.

    semaphores: int32 zeros, which the kernels leave as zeros; None: new ones, which cost another launch.
    """
    if splits == 1:
        return None, None
    if semaphores is None:
        semaphores = torch.zeros(outputs, dtype=torch.int32, device=like.device)
    elif semaphores.shape[0] < outputs:
        raise ValueError(
            f"semaphores must have an element for each of {outputs} tiles, got {semaphores.shape[0]}; pass more."
        )
    return torch.empty(outputs * splits * elements, dtype=torch.float32, device=like.device), semaphores


def empty_deferred(like: Tensor) -> reference.DeferredNorm:
    """An unwritten `DeferredNorm` of rows like these."""
    rows, size = like.shape
    shape, dtype = (-(-size // reference.PART), rows), torch.promote_types(like.dtype, torch.float32)
    weighted = torch.empty((rows, size), dtype=like.dtype, device=like.device)
    return reference.DeferredNorm(weighted, torch.empty(shape, dtype=dtype, device=like.device))


def options_of(config: ProductConfig, in_features: int, device: torch.device) -> dict[str, Any]:
    """The constants and options with which each of these products is launched."""
    pdl = uses_pdl(device)
    return {
        "BLOCK_R": config.block_r,
        "BLOCK_K": config.block_k,
        "MASK_K": in_features % config.block_k != 0,
        "SPLITS": config.splits_of(in_features),
        "PDL": pdl,
        "launch_pdl": pdl,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
