"""The positions that a step recomputes, as one packed list: what `active.nonzero()` says, without asking the host.

    slots = row * seqlen + column of every active position, in order;  cu_seqlens[b] = active positions of rows before b

Layouts: active (batch, seqlen) bool, any strides; slots (capacity,), so that the shape does not depend on the values.
Each program packs one row, in order, by a prefix sum over its columns (compaction by scan: Blelloch, "Prefix sums and
their applications", 1990); it is bound by latency.
"""

import torch
import triton
import triton.language as tl

from dkv.kernels import checks, reference
from dkv.kernels.launch import PACK


@triton.jit(do_not_specialize=["batch", "seqlen", "capacity"])
def _pack_positions_kernel(
    # pointers
    active_ptr,
    counts_ptr,
    slots_ptr,
    cu_seqlens_ptr,
    # strides
    stride_row,
    stride_column,
    # sizes
    batch,
    seqlen,
    capacity,
    # constants
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)

    # the rows before this one; where there are many, so are the programs that each add them up, and they are few bytes
    before = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, row, BLOCK):
        before += tl.load(counts_ptr + start + offs, mask=start + offs < row, other=0)
    place = tl.sum(before)
    tl.store(cu_seqlens_ptr + row, place)

    # the program behind the last row fills the places that are left
    if row == batch:
        for start in range(place, capacity, BLOCK):
            places = start + offs
            tl.store(slots_ptr + places, tl.full([BLOCK], -1, dtype=tl.int64), mask=places < capacity)
        return

    row64 = row.to(tl.int64)
    for start in range(0, seqlen, BLOCK):
        columns = (start + offs).to(tl.int64)
        active_ptrs = active_ptr + row64 * stride_row + columns * stride_column
        active = tl.load(active_ptrs, mask=columns < seqlen, other=0) != 0
        places = place + tl.cumsum(active.to(tl.int32)) - 1
        tl.store(slots_ptr + places, row64 * seqlen + columns, mask=active & (places < capacity))
        place += tl.sum(active.to(tl.int32))


def _launch(active, capacity):
    batch, seqlen = active.shape
    slots = torch.empty((capacity,), dtype=torch.int64, device=active.device)
    cu_seqlens = torch.empty((batch + 1,), dtype=torch.int32, device=active.device)
    counts = active.sum(1, dtype=torch.int32)
    with checks.device_guard(active):
        _pack_positions_kernel[(batch + 1,)](
            active_ptr=active,
            counts_ptr=counts,
            slots_ptr=slots,
            cu_seqlens_ptr=cu_seqlens,
            stride_row=active.stride(0),
            stride_column=active.stride(1),
            batch=batch,
            seqlen=seqlen,
            capacity=capacity,
            BLOCK=PACK.block,
            num_warps=PACK.num_warps,
        )
    return slots, cu_seqlens


def _pack_positions(active: torch.Tensor, capacity: int, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    run = _launch if impl == "triton" else reference.pack_positions
    return run(active, capacity)


_operator = torch.library.custom_op("dkv::pack_positions", mutates_args=())(_pack_positions)


@_operator.register_fake
def _(active, capacity, impl):
    slots = active.new_empty((capacity,), dtype=torch.int64)
    return slots, active.new_empty((active.shape[0] + 1,), dtype=torch.int32)


def pack_positions(active, capacity=None, *, impl="auto"):
    """Lists the active positions of all rows, packed by row, as the other operators take them.

    Nothing is mutated. With a capacity nothing is read on the host, so that it can be captured in a CUDA graph.

    Args:
        active: (batch, seqlen) bool, any strides.
        capacity: the length of `slots`, at least 0. None: as many as are active, which takes one read on the host.
        impl: "auto" (Triton for CUDA tensors, PyTorch otherwise), "triton" or "reference".

    Returns:
        slots (capacity,) int64: row * seqlen + column of the active positions, ascending, -1 behind them. Positions
            beyond the capacity are left out.
        cu_seqlens (batch + 1,) int32: the active positions of row b are number cu_seqlens[b] .. cu_seqlens[b + 1] - 1.
            These are the true numbers, whatever the capacity: cu_seqlens[-1] > capacity says that some were left out.

    Raises:
        ValueError, TypeError: a tensor of another shape or dtype, a negative capacity.
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
    # the operator is there for torch.compile; in eager mode its dispatch would cost a CPU as much as a small call
    run = torch.ops.dkv.pack_positions
    if impl == "reference" and not torch.compiler.is_compiling():
        run = _pack_positions
    elif capacity is None:
        capacity = int(active.sum())
    return run(active, capacity, impl)
