"""Token and confidence of each row from its final hidden state, without a tensor of logits.

With z = logit_scale * (hidden @ weight^T), -inf for excluded ids, and for each row the largest z (best), its id, and

    others = sum of exp(z - best) over all ids but that one        second = the second largest z
    weighted = sum of exp(z - best) * (z - best) over them

    log_prob = (z[token] - best) - log1p(others)                   margin = (1 - exp(second - best)) / (1 + others)
    entropy = log1p(others) - weighted / (1 + others)

`others` leaves out the largest term, which is exactly 1, so that nothing is lost where the rest is tiny. What holds for
disjoint sets of ids can be merged, as in the online softmax (Milakov and Gimelshein, arXiv 1805.02867); so can the
argmax of z + noise_scale * Gumbel, which samples from a softmax. Layouts: hidden (rows, hidden_size), weight (vocab,
hidden_size). Each program keeps a block of rows and walks over tiles of the vocabulary; a second kernel merges the
programs. Up to some hundred rows it is memory-bound, at one read of the weight. For few rows the vocabulary is the long
side of the matrix product, for many rows the rows are.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from dkv.kernels import checks, reference
from dkv.kernels.launch import head_launch, head_merge_launch, processors
from dkv.kernels.noise import draw, gumbel_of, log1p
from dkv.kernels.reference import Confidence

LOG2_E = tl.constexpr(1.4426950408889634)
# stands for -inf, without the NaN of inf - inf
LOWEST = tl.constexpr(-1e30)
NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _reduce(best, best_id, others, weighted, second, AXIS: tl.constexpr):
    """The statistics of all sets of ids along AXIS, merged; of single ids: z, id, 0, 0, LOWEST."""
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
    """The statistics of two sets of ids, merged; the ids of `other` are the higher ones."""
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
    keys,
    noise_scale,
    AXIS: tl.constexpr,
    PARTS: tl.constexpr,
    EXCLUDE_IDS: tl.constexpr,
    MASK_VOCAB: tl.constexpr,
    HAS_NOISE: tl.constexpr,
):
    """Merges a tile of z, whose vocabulary lies along AXIS, into the running statistics."""
    SIZE: tl.constexpr = z.shape[AXIS]
    ROWS: tl.constexpr = z.shape[1 - AXIS]
    if PARTS > 1:
        # one part after the other, or the temporaries of a large tile do not fit the registers
        if AXIS == 0:
            low, high = z.reshape(2, SIZE // 2, ROWS).permute(1, 2, 0).split()
        else:
            low, high = z.reshape(ROWS, 2, SIZE // 2).permute(0, 2, 1).split()
        state = _add_tile(
            state, low, first_id, vocab, keys, noise_scale, AXIS, PARTS // 2, EXCLUDE_IDS, MASK_VOCAB, HAS_NOISE
        )
        first_id += SIZE // 2
        return _add_tile(
            state, high, first_id, vocab, keys, noise_scale, AXIS, PARTS // 2, EXCLUDE_IDS, MASK_VOCAB, HAS_NOISE
        )
    else:
        ids = tl.expand_dims(tl.arange(0, SIZE) + first_id, 1 - AXIS)
        if MASK_VOCAB:
            z = tl.where(ids < vocab, z, LOWEST)
        for i in tl.static_range(len(EXCLUDE_IDS)):
            z = tl.where(ids == EXCLUDE_IDS[i], LOWEST, z)
        statistics, best_noisy = state
        statistics = _merge(statistics, _reduce(z, ids, 0.0, 0.0, LOWEST, AXIS))
        if HAS_NOISE:
            noise = gumbel_of(draw(keys, ids.to(tl.uint32)))
            noisy, noisy_id, noisy_z = _reduce_noisy(z + noise_scale * noise, ids, z, AXIS)
            higher = noisy > best_noisy[0]
            best_noisy = (
                tl.where(higher, noisy, best_noisy[0]),
                tl.where(higher, noisy_id, best_noisy[1]),
                tl.where(higher, noisy_z, best_noisy[2]),
            )
        return statistics, best_noisy


@triton.jit
def _load_tile(ptrs, channels, hidden_size, MASK: tl.constexpr):
    """Some channels of the rows that ptrs points at."""
    if MASK:
        return tl.load(ptrs[:, None] + channels[None, :], mask=(channels < hidden_size)[None, :], other=0.0)
    else:
        return tl.load(ptrs[:, None] + channels[None, :])


@triton.jit(do_not_specialize=["rows"])
def _lm_head_kernel(
    # pointers
    hidden_ptr,
    weight_ptr,
    noise_key_ptr,
    partial_values_ptr,
    partial_ids_ptr,
    # strides
    stride_hidden,
    stride_weight,
    # sizes
    rows,
    vocab,
    hidden_size,
    # scalars
    logit_scale,
    noise_scale,
    # constants
    EXCLUDE_IDS: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    ROUND_LOGITS: tl.constexpr,
    MASK_VOCAB: tl.constexpr,
    MASK_CHANNELS: tl.constexpr,
    VOCAB_FIRST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # the row blocks of one vocabulary tile run next to each other, so that the weight comes from the L2 after the first
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    program = tl.program_id(1)
    programs = tl.num_programs(1)
    AXIS: tl.constexpr = 0 if VOCAB_FIRST else 1
    # rows and ids beyond the last one repeat it: nothing of the rows is stored, and the ids are masked later
    row_ptrs = hidden_ptr + tl.minimum(offs_r, rows - 1).to(tl.int64) * stride_hidden

    lowest = tl.full([BLOCK_R], LOWEST, dtype=tl.float32)
    zeros = tl.zeros([BLOCK_R], dtype=tl.float32)
    no_id = tl.full([BLOCK_R], NO_ID, dtype=tl.int32)
    # the statistics of z; the largest noisy value, its id and its z
    state = ((lowest, no_id, zeros, zeros, lowest), (lowest, no_id, lowest))
    keys = 0
    if HAS_NOISE:
        keys = tl.load(noise_key_ptr + offs_r, mask=offs_r < rows, other=0)
        keys = tl.expand_dims(keys.to(tl.uint32), AXIS)

    for tile in range(program, tl.cdiv(vocab, BLOCK_V), programs):
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
                logits = tl.dot(weight, hidden.T, logits, input_precision=PRECISION)
            else:
                logits = tl.dot(hidden, weight.T, logits, input_precision=PRECISION)
        if ROUND_LOGITS:
            logits = logits.to(weight_ptr.dtype.element_ty).to(tl.float32)
        z = logits * logit_scale
        state = _add_tile(
            state, z, tile * BLOCK_V, vocab, keys, noise_scale, AXIS, PARTS, EXCLUDE_IDS, MASK_VOCAB, HAS_NOISE
        )

    # partial results are (fields, rows, programs)
    statistics, best_noisy = state
    best, best_id, others, weighted, second = statistics
    in_range = offs_r < rows
    field = rows.to(tl.int64) * programs
    values_ptrs = partial_values_ptr + offs_r.to(tl.int64) * programs + program
    ids_ptrs = partial_ids_ptr + offs_r.to(tl.int64) * programs + program
    tl.store(values_ptrs, best, mask=in_range)
    tl.store(values_ptrs + field, others, mask=in_range)
    tl.store(values_ptrs + 2 * field, weighted, mask=in_range)
    tl.store(values_ptrs + 3 * field, second, mask=in_range)
    tl.store(ids_ptrs, best_id, mask=in_range)
    if HAS_NOISE:
        noisy, noisy_id, noisy_z = best_noisy
        tl.store(values_ptrs + 4 * field, noisy, mask=in_range)
        tl.store(values_ptrs + 5 * field, noisy_z, mask=in_range)
        tl.store(ids_ptrs + field, noisy_id, mask=in_range)


@triton.jit(do_not_specialize=["rows", "programs"])
def _merge_confidence_kernel(
    # pointers
    partial_values_ptr,
    partial_ids_ptr,
    token_ptr,
    log_prob_ptr,
    margin_ptr,
    entropy_ptr,
    # sizes
    rows,
    vocab,
    programs,
    # constants
    HAS_NOISE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Merges what the programs found for each row."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_p = tl.arange(0, BLOCK_P)
    in_range = offs_r < rows
    # [BLOCK_R, BLOCK_P]
    written = in_range[:, None] & (offs_p < programs)[None, :]
    offs = offs_r.to(tl.int64)[:, None] * programs + offs_p[None, :]
    field = rows.to(tl.int64) * programs
    best, best_id, others, weighted, second = _reduce(
        tl.load(partial_values_ptr + offs, mask=written, other=LOWEST),
        tl.load(partial_ids_ptr + offs, mask=written, other=NO_ID),
        tl.load(partial_values_ptr + field + offs, mask=written, other=0.0),
        tl.load(partial_values_ptr + 2 * field + offs, mask=written, other=0.0),
        tl.load(partial_values_ptr + 3 * field + offs, mask=written, other=LOWEST),
        AXIS=1,
    )
    token = best_id
    token_z = best
    if HAS_NOISE:
        _, token, token_z = _reduce_noisy(
            tl.load(partial_values_ptr + 4 * field + offs, mask=written, other=LOWEST),
            tl.load(partial_ids_ptr + field + offs, mask=written, other=NO_ID),
            tl.load(partial_values_ptr + 5 * field + offs, mask=written, other=LOWEST),
            AXIS=1,
        )

    log_sum = log1p(others)
    top_prob = 1.0 / (1.0 + others)
    # a row of NaN has no largest id; its token must not lead anyone out of the vocabulary
    tl.store(token_ptr + offs_r, tl.minimum(token, vocab - 1).to(tl.int64), mask=in_range)
    tl.store(log_prob_ptr + offs_r, (token_z - best) - log_sum, mask=in_range)
    tl.store(margin_ptr + offs_r, (1.0 - tl.exp2((second - best) * LOG2_E)) * top_prob, mask=in_range)
    tl.store(entropy_ptr + offs_r, log_sum - weighted * top_prob, mask=in_range)


def _launch(hidden, weight, logit_scale, noise_scale, noise_key, exclude_ids, round_logits):
    rows, hidden_size = hidden.shape
    vocab = weight.shape[0]
    token = torch.empty(rows, dtype=torch.int64, device=hidden.device)
    log_prob, margin, entropy = (torch.empty(rows, dtype=torch.float32, device=hidden.device) for _ in range(3))
    if rows == 0:
        return token, log_prob, margin, entropy

    has_noise = noise_scale > 0
    launch = head_launch(hidden.device, hidden.dtype, rows, has_noise)
    row_blocks = triton.cdiv(rows, launch.block_r)
    tiles = triton.cdiv(vocab, launch.block_v)
    # as many as run at once, and no more than give each the same number of tiles
    programs = min(max(launch.blocks_per_processor * processors(hidden.device) // row_blocks, 1), tiles)
    programs = triton.cdiv(tiles, triton.cdiv(tiles, programs))
    partial_values = torch.empty((6 if has_noise else 4, rows, programs), dtype=torch.float32, device=hidden.device)
    partial_ids = torch.empty((2 if has_noise else 1, rows, programs), dtype=torch.int32, device=hidden.device)
    merge = head_merge_launch(programs)
    with checks.device_guard(hidden):
        _lm_head_kernel[(row_blocks, programs)](
            hidden_ptr=hidden,
            weight_ptr=weight,
            noise_key_ptr=noise_key if has_noise else None,
            partial_values_ptr=partial_values,
            partial_ids_ptr=partial_ids,
            stride_hidden=hidden.stride(0),
            stride_weight=weight.stride(0),
            rows=rows,
            vocab=vocab,
            hidden_size=hidden_size,
            logit_scale=logit_scale,
            noise_scale=noise_scale,
            EXCLUDE_IDS=tuple(exclude_ids),
            HAS_NOISE=has_noise,
            ROUND_LOGITS=round_logits and hidden.dtype != torch.float32,
            MASK_VOCAB=vocab % launch.block_v != 0,
            MASK_CHANNELS=hidden_size % launch.block_d != 0,
            VOCAB_FIRST=launch.block_r <= 32,
            BLOCK_R=launch.block_r,
            BLOCK_V=launch.block_v,
            BLOCK_D=launch.block_d,
            PARTS=launch.parts,
            PRECISION="ieee",
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        _merge_confidence_kernel[(triton.cdiv(rows, merge.block_r),)](
            partial_values_ptr=partial_values,
            partial_ids_ptr=partial_ids,
            token_ptr=token,
            log_prob_ptr=log_prob,
            margin_ptr=margin,
            entropy_ptr=entropy,
            rows=rows,
            vocab=vocab,
            programs=programs,
            HAS_NOISE=has_noise,
            BLOCK_R=merge.block_r,
            BLOCK_P=merge.block_p,
            num_warps=merge.num_warps,
        )
    return token, log_prob, margin, entropy


def _lm_head_confidence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    logit_scale: float,
    noise_scale: float,
    noise_key: torch.Tensor | None,
    exclude_ids: Sequence[int],
    round_logits: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if impl == "triton":
        return _launch(hidden, weight, logit_scale, noise_scale, noise_key, exclude_ids, round_logits)
    return tuple(
        reference.lm_head_confidence(
            hidden,
            weight,
            logit_scale=logit_scale,
            noise_scale=noise_scale,
            noise_key=noise_key,
            exclude_ids=exclude_ids,
            round_logits=round_logits,
        )
    )


_operator = torch.library.custom_op("dkv::lm_head_confidence", mutates_args=())(_lm_head_confidence)


@_operator.register_fake
def _(hidden, weight, *options):
    rows, dtype = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    token = hidden.new_empty(rows, dtype=torch.int64)
    log_prob, margin, entropy = (hidden.new_empty(rows, dtype=dtype) for _ in range(3))
    return token, log_prob, margin, entropy


def lm_head_confidence(
    hidden,
    weight,
    *,
    logit_scale=1.0,
    noise_scale=0.0,
    noise_key=None,
    exclude_ids=None,
    round_logits=False,
    impl="auto",
):
    """Predicts a token for each row and how confident the model is of it, without keeping the logits.

    Nothing is mutated. With z = logit_scale * (hidden @ weight.T) in float32, -inf for the excluded ids, the token is
    the argmax of z + noise_scale * Gumbel noise, which for a noise_scale of 1 samples from softmax(z).

    Args:
        hidden: (rows, hidden_size), float16, bfloat16 or float32 (float64: impl "reference" only), after the final
            norm; any row stride with the last dim contiguous.
        weight: (vocab, hidden_size), the dtype of hidden, of the head; any row stride with the last dim contiguous.
        logit_scale: a positive float.
        noise_scale: a float of at least 0; 0: the token is the most likely one.
        noise_key: (rows,) int64, keys of `dkv.kernels.noise.noise_key`; needed for noise_scale > 0. The noise of id v
            in a row depends on the row's key and on v alone.
        exclude_ids: ints, ids that can neither be the token nor have probability; some must be left. None: none.
        round_logits: round the product to the dtype of weight first, as code does that keeps the logits.
        impl: "auto" (Triton for CUDA tensors, PyTorch otherwise), "triton" or "reference".

    Returns:
        Confidence(token, log_prob, margin, entropy), each (rows,): token int64, ties go to the lowest id; under
        softmax(z), log_prob of the token, margin between the two largest probabilities, and entropy in nats, float32
        (float64 for float64). log_prob keeps the order of very confident rows, where a plain softmax ties at 1.

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
    if not 0 < logit_scale < float("inf"):
        raise ValueError(f"logit_scale must be positive and finite, got {logit_scale}.")
    if not 0 <= noise_scale < float("inf"):
        raise ValueError(f"noise_scale must be at least 0 and finite, got {noise_scale}.")
    if noise_scale > 0 and noise_key is None:
        raise ValueError("noise_scale > 0 needs noise_key; pass a key of dkv.kernels.noise.noise_key for each row.")
    checks.check_index("noise_key", noise_key, hidden, (rows,), "(rows,)", torch.int64)
    exclude_ids = _checked_ids(exclude_ids, weight.shape[0])
    impl = checks.resolve_impl(impl, _lm_head_kernel, hidden)
    # the operator is there for torch.compile; in eager mode its dispatch would cost a CPU as much as a small call
    run = torch.ops.dkv.lm_head_confidence
    if impl == "reference" and not torch.compiler.is_compiling():
        run = _lm_head_confidence
    options = float(logit_scale), float(noise_scale), noise_key, exclude_ids, bool(round_logits), impl
    return Confidence(*run(hidden, weight, *options))


def _checked_ids(exclude_ids, vocab):
    """The ids in order and without repetition, so that the kernel is not compiled anew for another spelling of them."""
    if exclude_ids is None:
        exclude_ids = ()
    if not isinstance(exclude_ids, list | tuple) or not all(type(i) is int for i in exclude_ids):
        raise TypeError(f"exclude_ids must be a list or tuple of ints, got {exclude_ids!r}; convert it once.")
    ids = sorted(set(exclude_ids))
    if ids and not 0 <= ids[0] <= ids[-1] < vocab:
        raise ValueError(f"exclude_ids must lie in 0 .. vocab - 1 = {vocab - 1}, got {exclude_ids}.")
    if len(ids) >= vocab:
        raise ValueError(f"at least one id must be left to predict, got vocab {vocab} and {len(ids)} excluded ids.")
    return ids
