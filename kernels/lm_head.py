"""Token and confidence of each row from its final hidden state, without a tensor of logits.

With z = logit_scale * (hidden @ weight^T), -inf for excluded ids, and for each row the largest z (best), its id, and

    others = sum of exp(z - best) over all other ids        second = the second largest z
    weighted = sum of exp(z - best) * (z - best) over all other ids

    log_prob = (z[token] - best) - log1p(others)                   margin = (1 - exp(second - best)) / (1 + others)
    entropy = log1p(others) - weighted / (1 + others)

`others` leaves out the largest term, which is exactly 1, so that tiny terms are not lost. These statistics of disjoint
sets of ids can be merged, as in the online softmax (Milakov and Gimelshein, arXiv 1805.02867); so can the argmax of
z + noise_scale * Gumbel, which samples from a softmax. Layouts: hidden (rows, hidden_size), weight (vocab,
hidden_size). Each program keeps a block of rows and walks over tiles of the vocabulary; a second kernel merges the
programs. The number of blocks is read on the device, so padding costs no work, and all programs share the rest. Up to
a few hundred rows it is memory-bound, at one read of the weight. The long side of the matrix product is the vocabulary
for few rows, and the rows for many.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dkv.kernels import checks, reference
from dkv.kernels.configs import lm_head_config, lm_head_merge_config, num_sms
from dkv.kernels.language import tl, triton
from dkv.kernels.noise import draw, gumbel_of, log1p
from dkv.kernels.operators import operator

LOG2_E = tl.constexpr(1.4426950408889634)
# in place of -inf: inf - inf would be NaN
LOWEST = tl.constexpr(-1e30)
NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _reduce(best, best_id, others, weighted, second, AXIS: tl.constexpr):
    """Merges the statistics of the sets of ids along AXIS; those of a single id are z, id, 0, 0, LOWEST."""
    top = tl.max(best, AXIS)
    top_id = tl.min(tl.where(best == tl.expand_dims(top, AXIS), best_id, NO_ID), AXIS)
    wins = best_id == tl.expand_dims(top_id, AXIS)
    shift = best - tl.expand_dims(top, AXIS)
    weight = tl.exp2(shift * LOG2_E)
    merged_others = tl.sum(tl.where(wins, others, weight * (1.0 + others)), AXIS)
    merged_weighted = tl.sum(tl.where(wins, weighted, weight * (shift * (1.0 + others) + weighted)), AXIS)
    return top, top_id, merged_others, merged_weighted, tl.max(tl.where(wins, second, best), AXIS)


@triton.jit
def _merge(one, other):
    """Merges the statistics of two sets of ids; `other` has the higher ids."""
    best, best_id, others, weighted, second = one
    best_2, best_id_2, others_2, weighted_2, second_2 = other
    wins = best >= best_2
    top = tl.where(wins, best, best_2)
    low = tl.where(wins, best_2, best)
    shift = low - top
    weight = tl.exp2(shift * LOG2_E)
    low_mass = 1.0 + tl.where(wins, others_2, others)
    low_weighted = shift * low_mass + tl.where(wins, weighted_2, weighted)
    return (
        top,
        tl.where(wins, best_id, best_id_2),
        tl.where(wins, others, others_2) + weight * low_mass,
        tl.where(wins, weighted, weighted_2) + weight * low_weighted,
        tl.maximum(tl.where(wins, second, second_2), low),
    )


@triton.jit
def _reduce_noisy(noisy, noisy_id, z, AXIS: tl.constexpr):
    """The largest noisy value along AXIS, the lowest id that has it, and its z."""
    top = tl.max(noisy, AXIS)
    top_id = tl.min(tl.where(noisy == tl.expand_dims(top, AXIS), noisy_id, NO_ID), AXIS)
    return top, top_id, tl.max(tl.where(noisy_id == tl.expand_dims(top_id, AXIS), z, LOWEST), AXIS)


@triton.jit
def _add_tile(
    state,
    z,
    first_id,
    vocab,
    exclude_ids_ptr,
    num_excluded,
    keys,
    noise_scale,
    AXIS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_NOISE: tl.constexpr,
):
    """Merges a tile of z, whose vocabulary lies along AXIS, into the running statistics."""
    SIZE: tl.constexpr = z.shape[AXIS]
    ROWS: tl.constexpr = z.shape[1 - AXIS]
    if PARTS > 1:
        # one part after the other: the temporaries of a large tile would not fit the registers
        if AXIS == 0:
            low, high = z.reshape(2, SIZE // 2, ROWS).permute(1, 2, 0).split()
        else:
            low, high = z.reshape(ROWS, 2, SIZE // 2).permute(0, 2, 1).split()
        state = _add_tile(
            state, low, first_id, vocab, exclude_ids_ptr, num_excluded, keys, noise_scale, AXIS, PARTS // 2, HAS_NOISE
        )
        first_id += SIZE // 2
        return _add_tile(
            state, high, first_id, vocab, exclude_ids_ptr, num_excluded, keys, noise_scale, AXIS, PARTS // 2, HAS_NOISE
        )
    else:
        # [SIZE], so that the loop over excluded ids keeps no tile in registers
        ids = tl.arange(0, SIZE) + first_id
        allowed = ids < vocab
        for i in range(num_excluded):
            allowed = allowed & (ids != tl.load(exclude_ids_ptr + i))
        ids = tl.expand_dims(ids, 1 - AXIS)
        # no less than LOWEST; NaN stays
        z = tl.maximum(tl.where(tl.expand_dims(allowed, 1 - AXIS), z, LOWEST), LOWEST, tl.PropagateNan.ALL)
        statistics, best_noisy = state
        statistics = _merge(statistics, _reduce(z, ids, 0.0, 0.0, LOWEST, AXIS))
        if HAS_NOISE:
            noise = gumbel_of(draw(keys, ids.to(tl.uint32)))
            # a 64th of the sum, which no finite noise scale makes infinite
            noisy = tl.where(z > LOWEST, z * 0.015625 + (noise_scale * 0.015625) * noise, float("-inf"))
            noisy, noisy_id, noisy_z = _reduce_noisy(noisy, ids, z, AXIS)
            higher = noisy > best_noisy[0]
            best_noisy = (
                tl.where(higher, noisy, best_noisy[0]),
                tl.where(higher, noisy_id, best_noisy[1]),
                tl.where(higher, noisy_z, best_noisy[2]),
            )
        return statistics, best_noisy


@triton.jit
def _load_tile(ptrs, channels, hidden_size, MASK: tl.constexpr):
    """Some channels of the rows at ptrs."""
    if MASK:
        return tl.load(ptrs[:, None] + channels[None, :], mask=(channels < hidden_size)[None, :], other=0.0)
    else:
        return tl.load(ptrs[:, None] + channels[None, :])


@triton.jit
def _share_work(
    cu_seqlens_ptr,
    batch,
    rows,
    vocab,
    programs,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MAX_SLICES: tl.constexpr,
):
    """The number of rows that are not padding, of their blocks, and of slices of the vocabulary.

    Program i has block i % blocks and slice i // blocks: the blocks of a tile are neighbours, so all but the first find
    the weight in the L2. The remaining programs have nothing to do. batch is -1 if there is no cu_seqlens.
    """
    valid_rows = tl.load(cu_seqlens_ptr + batch, mask=batch >= 0, other=rows)
    valid_rows = tl.maximum(tl.minimum(valid_rows, rows), 0).to(rows.dtype)
    row_blocks = tl.cdiv(valid_rows, BLOCK_R)
    tiles = tl.cdiv(vocab, BLOCK_V)
    slices = tl.minimum(tl.minimum(programs // tl.maximum(row_blocks, 1), MAX_SLICES), tiles)
    # the fewest slices with so many tiles each
    return valid_rows, row_blocks, tl.cdiv(tiles, tl.cdiv(tiles, slices))


# values that differ from call to call must not recompile it
@triton.jit(
    do_not_specialize=["batch", "rows", "num_excluded"],
    do_not_specialize_on_alignment=["noise_key_ptr", "logit_scale_ptr", "noise_scale_ptr", "cu_seqlens_ptr"],
)
def _lm_head_kernel(
    # pointers
    hidden_ptr,
    weight_ptr,
    logit_scale_ptr,
    noise_scale_ptr,
    noise_key_ptr,
    exclude_ids_ptr,
    cu_seqlens_ptr,
    partial_values_ptr,
    partial_ids_ptr,
    # strides
    stride_hidden,
    stride_weight,
    # sizes
    batch,
    rows,
    vocab,
    hidden_size,
    num_excluded,
    # scalars
    logit_scale,
    noise_scale,
    # constants
    HAS_NOISE: tl.constexpr,
    ROUND_LOGITS: tl.constexpr,
    MASK_VOCAB: tl.constexpr,
    MASK_CHANNELS: tl.constexpr,
    VOCAB_FIRST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    MAX_SLICES: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    valid_rows, row_blocks, slices = _share_work(
        cu_seqlens_ptr, batch, rows, vocab, programs, BLOCK_R, BLOCK_V, MAX_SLICES
    )
    if program >= row_blocks * slices:
        return

    offs_r = (program % row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    AXIS: tl.constexpr = 0 if VOCAB_FIRST else 1
    # rows and ids beyond the last one repeat it: results of such rows are not read, and the ids are masked later
    offs_r = tl.minimum(offs_r, valid_rows - 1)
    row_ptrs = hidden_ptr + offs_r.to(tl.int64) * stride_hidden

    lowest = tl.full([BLOCK_R], LOWEST, dtype=tl.float32)
    zeros = tl.zeros([BLOCK_R], dtype=tl.float32)
    no_id = tl.full([BLOCK_R], NO_ID, dtype=tl.int32)
    # the statistics of z; the largest noisy value, its id and its z
    state = ((lowest, no_id, zeros, zeros, lowest), (zeros + float("-inf"), no_id, lowest))
    keys = 0
    if HAS_NOISE:
        keys = tl.expand_dims(tl.load(noise_key_ptr + offs_r).to(tl.uint32), AXIS)
        if noise_scale_ptr is not None:
            noise_scale = tl.expand_dims(tl.load(noise_scale_ptr + offs_r), AXIS)

    for tile in range(program // row_blocks, tl.cdiv(vocab, BLOCK_V), slices):
        ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        if MASK_VOCAB:
            ids = tl.minimum(ids, vocab - 1)
        id_ptrs = weight_ptr + ids.to(tl.int64) * stride_weight
        # [BLOCK_V, BLOCK_R] or [BLOCK_R, BLOCK_V]
        logits = tl.zeros([BLOCK_V, BLOCK_R] if VOCAB_FIRST else [BLOCK_R, BLOCK_V], dtype=tl.float32)
        for start in range(0, hidden_size, BLOCK_D):
            # [BLOCK_V, BLOCK_D] and [BLOCK_R, BLOCK_D]
            weight = _load_tile(id_ptrs, start + offs_d, hidden_size, MASK_CHANNELS)
            hidden = _load_tile(row_ptrs, start + offs_d, hidden_size, MASK_CHANNELS)
            if VOCAB_FIRST:
                logits = tl.dot(weight, hidden.T, logits, input_precision="ieee")
            else:
                logits = tl.dot(hidden, weight.T, logits, input_precision="ieee")
        if ROUND_LOGITS:
            logits = logits.to(weight_ptr.dtype.element_ty).to(tl.float32)
        if logit_scale_ptr is not None:
            # not before the products, which need the registers
            z = logits * tl.expand_dims(tl.load(logit_scale_ptr + offs_r), AXIS)
        else:
            z = logits * logit_scale
        state = _add_tile(
            state,
            z,
            tile * BLOCK_V,
            vocab,
            exclude_ids_ptr,
            num_excluded,
            keys,
            noise_scale,
            AXIS,
            PARTS,
            HAS_NOISE,
        )

    # partial results are (fields, BLOCK_R, programs), with room for the rows that are missing
    statistics, best_noisy = state
    best, best_id, others, weighted, second = statistics
    field = programs.to(tl.int64) * BLOCK_R
    values_ptrs = partial_values_ptr + tl.arange(0, BLOCK_R) * programs + program
    ids_ptrs = partial_ids_ptr + tl.arange(0, BLOCK_R) * programs + program
    tl.store(values_ptrs, best)
    tl.store(values_ptrs + field, others)
    tl.store(values_ptrs + 2 * field, weighted)
    tl.store(values_ptrs + 3 * field, second)
    tl.store(ids_ptrs, best_id)
    if HAS_NOISE:
        noisy, noisy_id, noisy_z = best_noisy
        tl.store(values_ptrs + 4 * field, noisy)
        tl.store(values_ptrs + 5 * field, noisy_z)
        tl.store(ids_ptrs + field, noisy_id)


@triton.jit(
    do_not_specialize=["batch", "rows", "programs", "first_id"], do_not_specialize_on_alignment=["cu_seqlens_ptr"]
)
def _merge_confidence_kernel(
    # pointers
    cu_seqlens_ptr,
    partial_values_ptr,
    partial_ids_ptr,
    token_ptr,
    log_prob_ptr,
    margin_ptr,
    entropy_ptr,
    # sizes
    batch,
    rows,
    vocab,
    programs,
    # scalars
    first_id,
    # constants
    HAS_NOISE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MAX_SLICES: tl.constexpr,
):
    """Merges the programs' results for BLOCK_M rows; BLOCK_R and BLOCK_V are the tile sizes of the programs."""
    valid_rows, row_blocks, slices = _share_work(
        cu_seqlens_ptr, batch, rows, vocab, programs, BLOCK_R, BLOCK_V, MAX_SLICES
    )
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_s = tl.arange(0, MAX_SLICES)
    in_range = offs_m < rows
    valid = offs_m < valid_rows
    # [BLOCK_M, MAX_SLICES]
    written = valid[:, None] & (offs_s < slices)[None, :]
    found_by = (offs_m // BLOCK_R)[:, None] + (offs_s * row_blocks)[None, :]
    offs = (offs_m % BLOCK_R * programs)[:, None] + found_by
    field = programs.to(tl.int64) * BLOCK_R
    best, best_id, others, weighted, second = _reduce(
        tl.load(partial_values_ptr + offs, mask=written, other=LOWEST),
        tl.load(partial_ids_ptr + offs, mask=written, other=NO_ID),
        tl.load(partial_values_ptr + field + offs, mask=written, other=0.0),
        tl.load(partial_values_ptr + 2 * field + offs, mask=written, other=0.0),
        tl.load(partial_values_ptr + 3 * field + offs, mask=written, other=LOWEST),
        AXIS=1,
    )
    # a NaN among the z makes `others` NaN, although a maximum may drop it
    answered = (tl.abs(best) < -LOWEST) & (others == others)
    token = best_id
    token_z = best
    if HAS_NOISE:
        noisy, token, token_z = _reduce_noisy(
            tl.load(partial_values_ptr + 4 * field + offs, mask=written, other=float("-inf")),
            tl.load(partial_ids_ptr + field + offs, mask=written, other=NO_ID),
            tl.load(partial_values_ptr + 5 * field + offs, mask=written, other=LOWEST),
            AXIS=1,
        )
        # a row whose scale is NaN has no noisy maximum
        answered &= noisy > float("-inf")

    others = tl.where(answered, others, float("nan"))
    log_sum = log1p(others)
    top_prob = 1.0 / (1.0 + others)
    token = tl.where(valid, tl.where(answered, token, first_id), 0)
    log_prob = tl.where(valid, (token_z - best) - log_sum, float("-inf"))
    margin = tl.where(valid, (1.0 - tl.exp2((second - best) * LOG2_E)) * top_prob, 0.0)
    entropy = tl.where(valid, log_sum - weighted * top_prob, 0.0)
    tl.store(token_ptr + offs_m, token.to(tl.int64), mask=in_range)
    tl.store(log_prob_ptr + offs_m, log_prob, mask=in_range)
    tl.store(margin_ptr + offs_m, margin, mask=in_range)
    tl.store(entropy_ptr + offs_m, entropy, mask=in_range)


_EXCLUDED = {}  # never freed: CUDA graphs keep the addresses


def _on_device(exclude_ids, device):
    """The ids as an int32 tensor, made once and without a copy from the host."""
    key = exclude_ids, device
    if key in _EXCLUDED:
        return _EXCLUDED[key]
    ids = torch.empty(len(exclude_ids), dtype=torch.int32, device=device)
    for place, excluded in enumerate(exclude_ids):
        ids.narrow(0, place, 1).fill_(excluded)
    if torch.cuda.is_available():
        # a tensor made during capture has its values only after a replay, so it is not kept
        if torch.cuda.is_current_stream_capturing():
            return ids
        # the next user may be on another stream
        torch.cuda.current_stream(device).synchronize()
    _EXCLUDED[key] = ids
    return ids


def _launch(
    hidden: Tensor,
    weight: Tensor,
    *,
    logit_scale: float | Tensor = 1.0,
    noise_scale: float | Tensor = 0.0,
    noise_key: Tensor | None = None,
    exclude_ids: Sequence[int] | None = None,
    round_logits: bool = False,
    cu_seqlens: Tensor | None = None,
) -> reference.Confidence:
    rows, hidden_size = hidden.shape
    vocab = weight.shape[0]
    token = torch.empty(rows, dtype=torch.int64, device=hidden.device)
    log_prob, margin, entropy = (torch.empty(rows, dtype=torch.float32, device=hidden.device) for _ in range(3))
    if rows == 0:
        return reference.Confidence(token, log_prob, margin, entropy)

    logit_scale, logit_scales = checks.float_and_tensor(logit_scale)
    noise_scale, noise_scales = checks.float_and_tensor(noise_scale)
    has_noise = noise_scales is not None or noise_scale > 0
    config = lm_head_config(hidden.device, hidden.dtype, rows, has_noise)
    merge = lm_head_merge_config(hidden.device)
    # as many as run at once, but enough for every block of rows
    programs = min(config.blocks_per_sm * num_sms(hidden.device), merge.max_slices)
    programs = max(programs, triton.cdiv(rows, config.block_r))
    values_shape, ids_shape = ((fields, config.block_r, programs) for fields in ((6, 2) if has_noise else (4, 1)))
    partial_values = torch.empty(values_shape, dtype=torch.float32, device=hidden.device)
    partial_ids = torch.empty(ids_shape, dtype=torch.int32, device=hidden.device)
    with checks.device_guard(hidden):
        excluded = _on_device(tuple(exclude_ids or ()), hidden.device)
        # without cu_seqlens nothing is read there; any int32 tensor saves a second compilation
        counts, batch = (excluded, -1) if cu_seqlens is None else (cu_seqlens, cu_seqlens.shape[0] - 1)
        shared = dict(
            cu_seqlens_ptr=counts,
            batch=batch,
            partial_values_ptr=partial_values,
            partial_ids_ptr=partial_ids,
            rows=rows,
            vocab=vocab,
            HAS_NOISE=has_noise,
            BLOCK_R=config.block_r,
            BLOCK_V=config.block_v,
            MAX_SLICES=merge.max_slices,
        )
        _lm_head_kernel[(programs,)](
            **shared,
            hidden_ptr=hidden,
            weight_ptr=weight,
            logit_scale_ptr=logit_scales,
            noise_scale_ptr=noise_scales,
            noise_key_ptr=noise_key if has_noise else None,
            exclude_ids_ptr=excluded,
            stride_hidden=hidden.stride(0),
            stride_weight=weight.stride(0),
            hidden_size=hidden_size,
            num_excluded=excluded.shape[0],
            logit_scale=logit_scale,
            noise_scale=noise_scale,
            ROUND_LOGITS=round_logits and hidden.dtype != torch.float32,
            MASK_VOCAB=vocab % config.block_v != 0,
            MASK_CHANNELS=hidden_size % config.block_d != 0,
            VOCAB_FIRST=config.block_r <= 32,
            BLOCK_D=config.block_d,
            PARTS=config.parts,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        _merge_confidence_kernel[(triton.cdiv(rows, merge.block_m),)](
            **shared,
            token_ptr=token,
            log_prob_ptr=log_prob,
            margin_ptr=margin,
            entropy_ptr=entropy,
            programs=programs,
            first_id=reference.first_allowed(exclude_ids),
            BLOCK_M=merge.block_m,
            num_warps=merge.num_warps,
        )
    return reference.Confidence(token, log_prob, margin, entropy)


def _fake(hidden, **_):
    rows, dtype = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    token = hidden.new_empty(rows, dtype=torch.int64)
    return reference.Confidence(token, *(hidden.new_empty(rows, dtype=dtype) for _ in range(3)))


_operator = operator("lm_head_confidence", _launch, reference.lm_head_confidence, fake=_fake)


def lm_head_confidence(
    hidden: Tensor,
    weight: Tensor,
    *,
    logit_scale: float | Tensor = 1.0,
    noise_scale: float | Tensor = 0.0,
    noise_key: Tensor | None = None,
    exclude_ids: Sequence[int] | None = None,
    round_logits: bool = False,
    cu_seqlens: Tensor | None = None,
    impl: checks.Impl = "auto",
) -> reference.Confidence:
    """Predicts a token for each row, and the model's confidence in it, without keeping the logits.

    Mutates nothing. With z = logit_scale * (hidden @ weight.T) in float32, -inf for the excluded ids, the token is
    the argmax of z + noise_scale * Gumbel noise, which for a noise_scale of 1 samples from softmax(z).

    Args:
        hidden: (rows, hidden_size), float16, bfloat16 or float32 (float64: impl "reference" only), after the final
            norm; any row stride with the last dim contiguous.
        weight: (vocab, hidden_size), the LM head's, the dtype of hidden; any row stride with the last dim contiguous.
        logit_scale: a positive float, or a tensor of them, (rows,) float32 (float64 too for float64 hidden).
        noise_scale: a float of at least 0, or a tensor as above; 0: the token is the most likely one.
        noise_key: (rows,) int64, keys of `dkv.kernels.noise.noise_key`; required if noise_scale is positive or a
            tensor. The noise of id v in a row depends on the row's key and on v alone.
        exclude_ids: ids that are never the token and have no probability; at least one id must be left. None: none.
        round_logits: whether to round the product to the dtype of weight first, like code that keeps the logits.
        cu_seqlens: (batch + 1,) int32 or int64, as for the other operators: rows from cu_seqlens[-1] on are padding and
            not computed. None: no padding.
        impl: "auto" (Triton for CUDA tensors, PyTorch otherwise), "triton" or "reference".

    Returns:
        Confidence(token, log_prob, margin, entropy), each (rows,). token is int64; ties go to the lowest id. The others
        are float32 (float64 for float64) and refer to softmax(z): log_prob of the token, margin between the two largest
        probabilities, entropy in nats. log_prob keeps the order of very confident rows, for which a plain softmax ties
        at 1. Padding has token 0, log_prob -inf, margin 0 and entropy 0.

        A z of -1e30 or less counts as -inf, one of 1e30 or more as +inf. A row with NaN or +inf among its z, or with
        all of them -inf, has no answer: its token is the lowest id that is not excluded, and its log_prob, margin and
        entropy are NaN.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or strides that do not fit together, scales or ids out of range.
        NotImplementedError: an implementation that cannot run here.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv 1805.02867).

    Example:
        >>> found = lm_head_confidence(final_norm(h), model.lm_head.weight, exclude_ids=[mask_id])
        >>> confident = found.log_prob > math.log(0.9)
        >>> x[confident] = found.token[confident]
    """
    checks.check_no_grad(hidden=hidden, weight=weight)
    checks.check_floating("hidden", hidden)
    checks.check_shape("hidden", hidden, (None, None), "(rows, hidden_size)")
    rows, hidden_size = hidden.shape
    checks.check_shape("weight", weight, (None, hidden_size), "(vocab, hidden_size)")
    checks.check_same("hidden", hidden, weight=weight)
    checks.check_last_dim_contiguous(hidden=hidden, weight=weight)
    _check_scale("logit_scale", logit_scale, hidden)
    _check_scale("noise_scale", noise_scale, hidden)
    if noise_key is None and (isinstance(noise_scale, Tensor) or noise_scale > 0):
        raise ValueError(
            "noise_scale > 0, or a tensor, needs noise_key; pass a key of dkv.kernels.noise.noise_key for each row."
        )
    checks.check_tensor("noise_key", noise_key, hidden, (rows,), "(rows,)", torch.int64)
    checks.check_tensor("cu_seqlens", cu_seqlens, hidden, (None,), "(batch + 1,)", torch.int32, torch.int64)
    if cu_seqlens is not None and cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens must have shape (batch + 1,), at least one element, got (0,).")
    exclude_ids = _checked_ids(exclude_ids, weight.shape[0])
    return _operator(
        hidden=hidden,
        weight=weight,
        logit_scale=logit_scale,
        noise_scale=noise_scale,
        noise_key=noise_key,
        exclude_ids=exclude_ids,
        round_logits=bool(round_logits),
        cu_seqlens=cu_seqlens,
        impl=checks.resolve_impl(impl, _lm_head_kernel, hidden),
    )


def _check_scale(name, scale, hidden):
    """Checks `logit_scale` or `noise_scale`; the values of a tensor are not read."""
    if isinstance(scale, Tensor):
        checks.check_no_grad(**{name: scale})
        dtypes = (torch.float32,) if hidden.dtype != torch.float64 else (torch.float32, torch.float64)
        checks.check_tensor(name, scale, hidden, (hidden.shape[0],), "(rows,)", *dtypes)
    elif name == "logit_scale" and not 0 < scale < float("inf"):
        raise ValueError(f"logit_scale must be positive and finite, got {scale}.")
    elif not 0 <= scale < float("inf"):
        raise ValueError(f"noise_scale must be at least 0 and finite, got {scale}.")


def _checked_ids(exclude_ids, vocab):
    """The ids, checked, sorted and without repetition."""
    if exclude_ids is None:
        exclude_ids = ()
    if not isinstance(exclude_ids, Sequence) or not all(type(i) is int for i in exclude_ids):
        raise TypeError(f"exclude_ids must be a sequence of ints, got {exclude_ids!r}; convert it once.")
    ids = sorted(set(exclude_ids))
    if ids and not 0 <= ids[0] <= ids[-1] < vocab:
        raise ValueError(f"exclude_ids must lie in 0 .. vocab - 1 = {vocab - 1}, got {exclude_ids}.")
    if len(ids) >= vocab:
        raise ValueError(f"at least one id must be left to predict, got vocab {vocab} and {len(ids)} excluded ids.")
    return ids
