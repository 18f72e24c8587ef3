"""Chooses the predictions that become tokens at this step and writes them, in one launch without the host.

The entries of a row are ranked by score, ties by place; rank 0 is the most confident one:

    rank[i] = #{j in the row of i: score[j] > score[i], or score[j] = score[i] and j < i}

    counts     chosen[i] = rank[i] < counts[row]
    threshold  chosen[i] = score[i] >= threshold or rank[i] = 0
    factor     chosen[i] = score[i] >= 1 - factor / (rank[i] + 2) or rank[i] = 0

(threshold and factor: Wu et al., Fast-dLLM, arXiv 2505.22618.) Layouts: x (batch, seqlen) contiguous; the entries
(total,), packed by row as `cu_seqlens` says. Counting needs no sort and is exact: each program compares a few entries
with all of their row, then decides and writes, so no program waits for another. It is bound by latency, and by the n^2
comparisons if a row has thousands of entries.
"""

import torch
from torch import Tensor

from dkv.kernels import checks, reference
from dkv.kernels.configs import commit_config
from dkv.kernels.language import tl, triton
from dkv.kernels.operators import operator
from dkv.kernels.packing import load_bound
from dkv.kernels.rows import COUNTERS, NAN_STEP, STEP


@triton.jit
def _load_scores(scores_ptr, entries, end):
    """Scores of entries; -inf beyond the row."""
    return tl.load(scores_ptr + entries, mask=entries < end, other=float("-inf"))


@triton.jit
def _without_nan(scores):
    """The scores with -inf in place of NaN."""
    return tl.where(scores == scores, scores, float("-inf"))


@triton.jit(do_not_specialize=["batch", "total", "seqlen"], do_not_specialize_on_alignment=["limits_ptr"])
def _commit_tokens_kernel(
    # pointers
    x_ptr,
    tokens_ptr,
    scores_ptr,
    slots_ptr,
    cu_seqlens_ptr,
    counts_ptr,
    limits_ptr,
    chosen_ptr,
    counters_ptr,
    # sizes
    batch,
    total,
    seqlen,
    # scalars
    limit,
    # constants
    RULE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0)
    block = tl.program_id(1)

    # the programs of row `batch` clear the padding entries before the first row and after the last one
    if row == batch:
        in_front = load_bound(cu_seqlens_ptr, 0, total)
        end = load_bound(cu_seqlens_ptr, batch, total)
        count = in_front + total - end
        for first in range(block * BLOCK_N, count, tl.num_programs(1) * BLOCK_N):
            padding = first + tl.arange(0, BLOCK_N)
            places = tl.where(padding < in_front, padding, padding - in_front + end)
            tl.store(chosen_ptr + places, tl.zeros([BLOCK_N], dtype=tl.int1), mask=padding < count)
        return

    start = load_bound(cu_seqlens_ptr, row, total)
    row_end = load_bound(cu_seqlens_ptr, row + 1, total)
    # entries beyond the columns of a row are padding too
    end = tl.minimum(row_end, start + seqlen)
    if block == 0:
        for first in range(end, row_end, BLOCK_N):
            padding = first + tl.arange(0, BLOCK_N)
            tl.store(chosen_ptr + padding, tl.zeros([BLOCK_N], dtype=tl.int1), mask=padding < row_end)
    if start + block * BLOCK_M >= end:
        return

    # [BLOCK_M]
    entries = start + block * BLOCK_M + tl.arange(0, BLOCK_M)
    in_row = entries < end
    slots = tl.load(slots_ptr + entries, mask=in_row, other=-1)
    scores = _load_scores(scores_ptr, entries, end)
    if counters_ptr is not None:
        # several programs of the row may find one; all of them write the same step
        counters_ptr += row.to(tl.int64) * COUNTERS
        is_first = (tl.load(counters_ptr + NAN_STEP) < 0) & (tl.max((scores != scores).to(tl.int32), 0) > 0)
        tl.store(counters_ptr + NAN_STEP, tl.load(counters_ptr + STEP), mask=is_first)
    scores = _without_nan(scores)
    # [BLOCK_M, BLOCK_N]
    ahead = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    for first in range(start, end, BLOCK_N):
        others = first + tl.arange(0, BLOCK_N)
        other_scores = _without_nan(_load_scores(scores_ptr, others, end))[None, :]
        # entries beyond the row rank behind all others: their score is -inf, their place is later
        earlier = others[None, :] < entries[:, None]
        ahead += ((other_scores > scores[:, None]) | ((other_scores == scores[:, None]) & earlier)).to(tl.int32)
    # [BLOCK_M]
    rank = tl.sum(ahead, 1)

    if RULE == "counts":
        chosen = rank < tl.load(counts_ptr + row)
    else:
        if limits_ptr is not None:
            limit = tl.load(limits_ptr + row)
        min_score = tl.full([BLOCK_M], limit, dtype=tl.float32)
        if RULE == "factor":
            # scores fall and limits rise with the rank, so all entries before one that passes pass too
            min_score = 1.0 - tl.div_rn(min_score, (rank + 2).to(tl.float32))
        chosen = (scores >= min_score) | (rank == 0)
    chosen &= (slots >= 0) & (slots < batch.to(tl.int64) * seqlen)
    tl.store(chosen_ptr + entries, chosen, mask=in_row)
    tl.store(x_ptr + slots, tl.load(tokens_ptr + entries, mask=chosen, other=0), mask=chosen)


def _launch(
    x: Tensor,
    tokens: Tensor,
    scores: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    counts: Tensor | None,
    *,
    threshold: float | Tensor | None = None,
    factor: float | Tensor | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    batch, seqlen = x.shape
    (total,) = tokens.shape
    chosen = torch.empty((total,), dtype=torch.bool, device=x.device)
    if total == 0:
        return chosen
    rule, value = "counts", None
    if threshold is not None:
        rule, value = "threshold", threshold
    elif factor is not None:
        rule, value = "factor", factor
    limit, limits = checks.float_and_tensor(value)
    config = commit_config(x.device)
    # at least one block, for the padding; slots are distinct, so no row has more entries than columns
    blocks = max(triton.cdiv(min(total, seqlen), config.block_m), 1)
    with checks.device_guard(x):
        _commit_tokens_kernel[(batch + 1, blocks)](
            x_ptr=x,
            tokens_ptr=tokens,
            scores_ptr=scores,
            slots_ptr=slots,
            cu_seqlens_ptr=cu_seqlens,
            counts_ptr=counts if rule == "counts" else None,
            limits_ptr=limits,
            chosen_ptr=chosen,
            counters_ptr=counters,
            batch=batch,
            total=total,
            seqlen=seqlen,
            limit=limit,
            RULE=rule,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
        )
    return chosen


def _fake(tokens, **_):
    return tokens.new_empty(tokens.shape, dtype=torch.bool)


_operator = operator("commit_tokens", _launch, reference.commit_tokens, fake=_fake, mutates=("x",))


def commit_tokens(
    x: Tensor,
    tokens: Tensor,
    scores: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    counts: Tensor | None,
    *,
    threshold: float | Tensor | None = None,
    factor: float | Tensor | None = None,
    impl: checks.Impl = "auto",
) -> Tensor:
    """Commits the most confident predictions of each row: chooses them and writes them into the sequences.

    Mutates x in place, at the slots of the chosen entries only.

    Args:
        x: (batch, seqlen) int64, contiguous: the sequences.
        tokens: (total,) int64: the token that each entry would write.
        scores: (total,) float32 (float64: impl "reference" only): higher is committed first, the earlier entry on ties;
            NaN counts as -inf. Probabilities if threshold or factor is given.
        slots: (total,) int64: row * seqlen + column of each entry, distinct. An entry whose slot x does not have, such
            as -1, is ranked like the others and never chosen.
        cu_seqlens: (batch + 1,) int32 or int64, non-decreasing; values beyond total are clamped. The entries of row b
            are cu_seqlens[b] .. cu_seqlens[b + 1] - 1 (a row may be empty). Entries beyond the seqlen-th of a row and
            those of no row are padding, never chosen.
        counts: (batch,) int32 or int64: the number of entries to commit in each row, or all if it has fewer. May be
            None with threshold or factor, which replace it.
        threshold: a float, or (batch,) float32 (float64 too for float64 scores), one for each row: commits the entries
            whose score reaches it, and the highest of each row.
        factor: a positive float, or one for each row as above: commits the entry of rank r (0: the highest) if its
            score reaches 1 - factor / (r + 2), and the highest of each row. An entry is committed only if all entries
            that rank before it are.
        impl: "auto" (Triton for CUDA tensors, PyTorch otherwise), "triton" or "reference".

    Returns:
        chosen (total,) bool.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or strides that do not fit together; both threshold and factor,
            or neither and no counts; a factor that is not above 0.
        NotImplementedError: an implementation that cannot run here.

    Source: Wu et al., Fast-dLLM (arXiv 2505.22618), for threshold and factor.

    Example:
        >>> slots, cu_seqlens = pack_positions(candidates, capacity=32)
        >>> token, log_prob, _, _ = lm_head_confidence(hidden, weight)
        >>> chosen = commit_tokens(x, token, log_prob, slots, cu_seqlens, counts)
    """
    checks.check_no_grad(scores=scores)
    checks.check_tensor("x", x, x, (None, None), "(batch, seqlen)", torch.int64)
    if not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous, got strides {x.stride()} for shape {tuple(x.shape)}; "
            "pass x.contiguous() and keep that, because it is written in place."
        )
    checks.check_tensor("tokens", tokens, x, (None,), "(total,)", torch.int64)
    total = tokens.shape[0]
    checks.check_tensor("scores", scores, x, (total,), "(total,)", torch.float32, torch.float64)
    checks.check_tensor("slots", slots, x, (total,), "(total,)", torch.int64)
    checks.check_tensor("cu_seqlens", cu_seqlens, x, (x.shape[0] + 1,), "(batch + 1,)", torch.int32, torch.int64)
    checks.check_tensor("counts", counts, x, (x.shape[0],), "(batch,)", torch.int64, torch.int32)
    if threshold is not None and factor is not None:
        raise ValueError("threshold and factor exclude each other; pass one of them.")
    if threshold is None and factor is None and counts is None:
        raise ValueError("counts must be a tensor if neither threshold nor factor is given, got None.")
    limits = checks.float_and_tensor(threshold), checks.float_and_tensor(factor)
    dtypes = (torch.float32,) if scores.dtype == torch.float32 else (torch.float32, torch.float64)
    for name, (_, values) in zip(("threshold", "factor"), limits, strict=True):
        checks.check_no_grad(**{name: values})
        checks.check_tensor(name, values, x, (x.shape[0],), "(batch,)", *dtypes)
    if limits[1][0] is not None and not factor > 0:
        raise ValueError(f"factor must be positive, got {factor}.")
    return _operator(
        x=x,
        tokens=tokens,
        scores=scores,
        slots=slots,
        cu_seqlens=cu_seqlens,
        counts=counts,
        threshold=threshold,
        factor=factor,
        impl=checks.resolve_impl(impl, _commit_tokens_kernel, scores),
    )
