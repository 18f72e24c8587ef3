"""Packs the active positions of all rows into one list: `active.nonzero()` without a synchronisation with the host.

    slots = row * seqlen + column of every active position, in order;  cu_seqlens[b] = active positions of rows before b

`pack_positions` does this for any flags. A step packs two lists in one launch: the active positions with their tokens
and RoPE positions, and the candidates for tokens with the indices of their predictors in the first list. Layouts: flags
(batch, seqlen) bool, with any strides for `pack_positions`; lists (capacity,), so that no shape depends on the values.
Each program packs one row, in order, by a prefix sum over its columns (compaction by scan: Blelloch, "Prefix sums and
their applications", 1990); it is bound by latency.
"""

import torch
from torch import Tensor

from dkv.kernels import checks, reference
from dkv.kernels.configs import PACK
from dkv.kernels.language import tl, triton
from dkv.kernels.noise import key_of
from dkv.kernels.operators import operator
from dkv.kernels.rows import COUNTERS, FIRST_COLUMN, REQUEST, SEED, SIZE_CANDIDATES, STEP


@triton.jit
def load_bound(cu_seqlens_ptr, row, total):
    """An element of cu_seqlens, the first entry of a row, clamped to 0 .. total."""
    # cu_seqlens may be int64; a clamped element fits the type of total
    return tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + row), 0), total).to(total.dtype)


@triton.jit
def _rows_before(counts_ptr, stride, row, flag_rows, BLOCK: tl.constexpr):
    """The sum of the counts of all rows before this one, and [BLOCK] maxima of them.

    Every program sums for itself, because none waits for another.
    """
    offs = tl.arange(0, BLOCK)
    before, largest = tl.zeros([BLOCK], dtype=tl.int32), tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, row, BLOCK):
        rows = start + offs
        counts = tl.load(counts_ptr + (rows % flag_rows).to(tl.int64) * stride, mask=rows < row, other=0)
        before += counts
        largest = tl.maximum(largest, counts)
    return tl.sum(before), largest


@triton.jit
def _fill(list_ptr, start, end, value, BLOCK: tl.constexpr):
    for first in range(tl.maximum(start, 0), end, BLOCK):
        places = first + tl.arange(0, BLOCK)
        tl.store(list_ptr + places, tl.full([BLOCK], value, dtype=tl.int64), mask=places < end)


@triton.jit(do_not_specialize=["rows", "flag_rows", "seqlen", "capacity", "candidate_capacity", "per_row"])
def _pack_positions_kernel(
    # pointers
    active_ptr,
    counts_ptr,
    slots_ptr,
    cu_seqlens_ptr,
    # strides
    stride_row,
    stride_column,
    stride_counts,
    # sizes
    rows,
    flag_rows,
    seqlen,
    capacity,
    # constants
    BLOCK: tl.constexpr,
    # for a step
    ids_ptr=None,
    positions_ptr=None,
    packed_ids_ptr=None,
    packed_positions_ptr=None,
    excess_ptr=None,
    candidates_ptr=None,
    counters_ptr=None,
    candidate_slots_ptr=None,
    candidate_cu_seqlens_ptr=None,
    candidate_positions_ptr=None,
    logits_indices_ptr=None,
    keys_ptr=None,
    candidate_capacity=0,
    per_row=0,
    SHIFTED: tl.constexpr = False,
):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    place, largest = _rows_before(counts_ptr, stride_counts, row, flag_rows, BLOCK)
    tl.store(cu_seqlens_ptr + row, place)
    candidate_place = 0
    if ids_ptr is not None:
        candidate_place, candidates_largest = _rows_before(
            counts_ptr + SIZE_CANDIDATES, stride_counts, row, flag_rows, BLOCK
        )
        largest = tl.maximum(largest, candidates_largest)
        tl.store(candidate_cu_seqlens_ptr + row, candidate_place)

    # the program after the last row fills the remaining places
    if row == rows:
        _fill(slots_ptr, place, capacity, -1, BLOCK)
        if ids_ptr is not None:
            _fill(packed_ids_ptr, place, capacity, 0, BLOCK)
            _fill(packed_positions_ptr, place, capacity, 0, BLOCK)
            _fill(candidate_slots_ptr, candidate_place, candidate_capacity, -1, BLOCK)
            _fill(candidate_positions_ptr, candidate_place, candidate_capacity, 0, BLOCK)
            _fill(logits_indices_ptr, candidate_place, candidate_capacity, 0, BLOCK)
            if keys_ptr is not None:
                _fill(keys_ptr, candidate_place, candidate_capacity, 0, BLOCK)
            if excess_ptr is not None:
                excess = tl.maximum(place - capacity, candidate_place - candidate_capacity)
                excess = tl.maximum(excess, tl.max(largest) - per_row)
                tl.store(excess_ptr, tl.maximum(tl.load(excess_ptr), excess))
        return

    # with wrong counts nothing may be written before the lists; places behind them are masked anyway
    place = tl.minimum(tl.maximum(place, 0), capacity)
    candidate_place = tl.minimum(tl.maximum(candidate_place, 0), candidate_capacity)
    row64, flag_row = row.to(tl.int64), (row % flag_rows).to(tl.int64)
    first_column = 0
    if ids_ptr is not None:
        counters_ptr += flag_row * COUNTERS
        first_column = tl.load(counters_ptr + FIRST_COLUMN)
    for start in range(0, seqlen, BLOCK):
        columns = (start + offs).to(tl.int64)
        in_row = columns < seqlen
        flags = flag_row * stride_row + columns * stride_column
        active = (tl.load(active_ptr + flags, mask=in_row, other=0) != 0).to(tl.int32)
        # the place of the last active position up to here, this one included
        places = place + tl.cumsum(active) - 1
        written = (active > 0) & (places < capacity)
        slots = row64 * seqlen + columns
        tl.store(slots_ptr + places, slots, mask=written)
        if ids_ptr is not None:
            tl.store(packed_ids_ptr + places, tl.load(ids_ptr + slots, mask=written, other=0), mask=written)
            positions = tl.load(positions_ptr + slots, mask=written, other=0)
            tl.store(packed_positions_ptr + places, positions, mask=written)
            candidate = (tl.load(candidates_ptr + flags, mask=in_row, other=0) != 0).to(tl.int32)
            candidate_places = candidate_place + tl.cumsum(candidate) - 1
            candidate_place += tl.sum(candidate)
            written = (candidate > 0) & (candidate_places < candidate_capacity)
            tl.store(candidate_slots_ptr + candidate_places, slots, mask=written)
            if keys_ptr is not None:
                seed, request = tl.load(counters_ptr + SEED), tl.load(counters_ptr + REQUEST)
                key = key_of(seed.to(tl.uint32), request.to(tl.uint32))
                key = key_of(key, tl.load(counters_ptr + STEP).to(tl.uint32))
                keys = key_of(key, (columns - first_column).to(tl.uint32))
                tl.store(keys_ptr + candidate_places, keys.to(tl.int64), mask=written)
            if SHIFTED:
                # a mask in the first column is predicted by its own output
                before = (columns > tl.maximum(first_column, 0)).to(tl.int32)
                places -= active * before
                slots -= before
            # a predictor is always active, but may not have fitted into the list
            places = tl.minimum(tl.maximum(places, 0), tl.maximum(capacity - 1, 0))
            tl.store(logits_indices_ptr + candidate_places, places.to(tl.int64), mask=written)
            positions = tl.load(positions_ptr + slots, mask=written, other=0)
            tl.store(candidate_positions_ptr + candidate_places, positions, mask=written)
        place += tl.sum(active)


def _launch(active: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    slots, cu_seqlens = _list(active, capacity), _ends(active, active.shape[0])
    _pack(active, active.sum(1, dtype=torch.int32)[:, None], slots, cu_seqlens)
    return slots, cu_seqlens


def _launch_pack_step(
    active: Tensor,
    candidates: Tensor,
    sizes: Tensor,
    ids: Tensor,
    positions: Tensor,
    counters: Tensor,
    excess: Tensor | None = None,
    *,
    capacity: int,
    candidate_capacity: int,
    per_row: int,
    shifted: bool,
    noisy: bool = False,
) -> tuple[reference.Packed, reference.Packed]:
    slots, packed_ids, packed_positions = (_list(active, capacity) for _ in range(3))
    packed = reference.Packed(slots, _ends(active, ids.shape[0]), packed_positions, ids=packed_ids)
    candidate_slots, candidate_positions, logits_indices = (_list(active, candidate_capacity) for _ in range(3))
    keys = _list(active, candidate_capacity) if noisy else None
    wanted = reference.Packed(
        candidate_slots, _ends(active, ids.shape[0]), candidate_positions, logits_indices=logits_indices, keys=keys
    )
    _pack(
        active,
        sizes,
        slots,
        packed.cu_seqlens,
        ids_ptr=ids,
        positions_ptr=positions,
        packed_ids_ptr=packed_ids,
        packed_positions_ptr=packed_positions,
        excess_ptr=excess,
        candidates_ptr=candidates,
        counters_ptr=counters,
        candidate_slots_ptr=candidate_slots,
        candidate_cu_seqlens_ptr=wanted.cu_seqlens,
        candidate_positions_ptr=candidate_positions,
        logits_indices_ptr=logits_indices,
        keys_ptr=keys,
        candidate_capacity=candidate_capacity,
        per_row=per_row,
        SHIFTED=shifted,
    )
    return packed, wanted


def _list(active, capacity):
    # a tensor of its own, not a part of a larger one, so that it is aligned for any capacity
    return torch.empty((capacity,), dtype=torch.int64, device=active.device)


def _ends(active, rows):
    return torch.empty((rows + 1,), dtype=torch.int32, device=active.device)


def _pack(active, counts, slots, cu_seqlens, **for_a_step):
    rows = cu_seqlens.shape[0] - 1
    with checks.device_guard(active):
        _pack_positions_kernel[(rows + 1,)](
            active_ptr=active,
            counts_ptr=counts,
            slots_ptr=slots,
            cu_seqlens_ptr=cu_seqlens,
            stride_row=active.stride(0),
            stride_column=active.stride(1),
            stride_counts=counts.stride(0),
            rows=rows,
            flag_rows=active.shape[0],
            seqlen=active.shape[1],
            capacity=slots.shape[0],
            BLOCK=PACK.block,
            num_warps=PACK.num_warps,
            **for_a_step,
        )


def _fake(active, capacity):
    slots = active.new_empty((capacity,), dtype=torch.int64)
    return slots, active.new_empty((active.shape[0] + 1,), dtype=torch.int32)


_operator = operator("pack_positions", _launch, reference.pack_positions, fake=_fake)


def pack_positions(active: Tensor, capacity: int | None = None, *, impl: checks.Impl = "auto") -> tuple[Tensor, Tensor]:
    """Lists the active positions of all rows, packed by row, for the other operators.

    Mutates nothing. With a capacity it does not synchronise with the host, so it can be captured in a CUDA graph.

    Args:
        active: (batch, seqlen) bool, any strides.
        capacity: the length of `slots`, at least 0. None: the number of active positions, which the host must read.
        impl: "auto" (Triton for CUDA tensors, PyTorch otherwise), "triton" or "reference".

    Returns:
        slots (capacity,) int64: row * seqlen + column of the active positions, ascending, then -1. Positions beyond the
            capacity are left out.
        cu_seqlens (batch + 1,) int32: the active positions of row b have the indices cu_seqlens[b] ..
            cu_seqlens[b + 1] - 1. The capacity does not limit them: cu_seqlens[-1] > capacity if some were left out.

    Raises:
        ValueError, TypeError: a wrong shape or dtype, a negative capacity.
        NotImplementedError: an implementation that cannot run here.

    Source: Blelloch, "Prefix sums and their applications" (1990).

    Example:
        >>> slots, cu_seqlens = pack_positions(active, capacity=32)
        >>> q = rope_cache_update(q, k, v, cos, sin, positions, slots, k_cache, v_cache)
        >>> out = delayed_attention(q, k_cache, v_cache, cu_seqlens)
    """
    if active.dtype != torch.bool:
        raise TypeError(f"active must be bool, got {active.dtype}; cast it with .to(torch.bool).")
    checks.check_shape("active", active, (None, None), "(batch, seqlen)")
    if capacity is not None:
        checks.check_count("capacity", capacity, 0)
    impl = checks.resolve_impl(impl, _pack_positions_kernel, active)
    if capacity is None and (impl == "triton" or torch.compiler.is_compiling()):
        capacity = int(active.sum())
    return _operator(active=active, capacity=capacity, impl=impl)
