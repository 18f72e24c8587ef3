"""Several ways to compute one layer's attention from the same inputs, with an oracle and counts of bytes and flops.

A provider gets the unrotated q, k, v of the active tokens (a full recompute: of all tokens), their positions, and a
cache of the other positions. It returns the attention output of the active tokens, in the layout that the output
projection takes. Rotation and cache write are part of the job. Index tensors and masks depend on the positions alone:
all layers of a step share them, so they are made beforehand.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.models import MODELS
from dkv.kernels import delayed_attention, rope_cache_update
from dkv.models.layout import ModelConfig

# relative error of one query and head, in the Euclidean norm; bfloat16 keys are rounded once more after their rotation
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# length of the random pattern that fills all data: prime, so that no two keys are alike
NOISE = 1_000_003
# the oracle takes as many of the active queries as this pays for
ORACLE_FLOPS = 4e9


@dataclass(frozen=True)
class AttentionPoint:
    """One point of the grid: `active` positions in each of `batch` rows of `seqlen`; ragged: see lengths and counts."""

    model: str
    batch: int
    seqlen: int
    active: int
    ragged: bool = False

    @property
    def sizes(self) -> ModelConfig:
        return MODELS[self.model]

    @property
    def lengths(self) -> list[int]:
        """Valid keys of each row: all columns, or from a quarter of them to all in a ragged batch."""
        if not self.ragged:
            return [self.seqlen] * self.batch
        return [round(self.seqlen * (1 + 3 * b / (self.batch - 1)) / 4) for b in range(self.batch)]

    @property
    def leftpads(self) -> list[int]:
        """First valid column of each row. A ragged batch pads odd rows on the left, even rows on the right."""
        return [(self.seqlen - n) * (b % 2) * self.ragged for b, n in enumerate(self.lengths)]

    @property
    def counts(self) -> list[int]:
        """Active positions of each row; in a ragged batch from 1 to twice `active`, unrelated to the lengths."""
        if not self.ragged:
            return [self.active] * self.batch
        spread = [round(1 + (2 * self.active - 1) * b / (self.batch - 1)) for b in range(self.batch)]
        shuffled = [spread[i] for i in torch.randperm(self.batch, generator=torch.Generator().manual_seed(0)).tolist()]
        return [min(count, n) for count, n in zip(shuffled, self.lengths, strict=True)]

    def __str__(self):
        return f"{self.model} batch {self.batch} length {self.seqlen} active {self.active}{' ragged' * self.ragged}"


def parse_points(text: str) -> list[AttentionPoint]:
    """The points of "LLaDA-8B:8:2048:32,..."."""
    points = []
    for part in text.split(","):
        ragged = part.endswith(":ragged")
        model, *numbers = part.removesuffix(":ragged").split(":")
        if len(numbers) == 3 and numbers[2] == "all":
            numbers[2] = numbers[1]
        known = model in MODELS and len(numbers) == 3 and all(number.isdecimal() for number in numbers)
        batch, seqlen, active = map(int, numbers) if known else (0, 0, 0)
        if batch < 1 + ragged or not 1 <= active <= seqlen:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not MODEL:BATCH:LENGTH:ACTIVE[:ragged] with MODEL one of {', '.join(MODELS)}, ACTIVE "
                '"all" or at most LENGTH, and a batch of at least 2 if ragged'
            )
        points.append(AttentionPoint(model, batch, seqlen, active, ragged))
    return points


def necessary_bytes(point: AttentionPoint, element_size: int, *, attention_alone: bool = False) -> int:
    """Bytes that any implementation must move: each input once, each output once.

    Counted are K and V of every valid key (stable ones from the cache, active ones from the projection), the queries,
    the output, and the write of the active K and V into the cache unless `attention_alone`. Angles and index tensors
    are not.
    """
    model = point.sizes
    kv, q = 2 * model.nheads_k * model.headdim, model.nheads * model.headdim
    keys, active = sum(point.lengths), sum(point.counts)
    return element_size * (keys * kv + (0 if attention_alone else active * kv) + 2 * active * q)


def necessary_flops(point: AttentionPoint) -> int:
    """Two matrix products, a multiplication and an addition each; rotation and softmax are not counted."""
    model = point.sizes
    pairs = sum(a * n for a, n in zip(point.counts, point.lengths, strict=True))
    return 4 * pairs * model.nheads * model.headdim


def full_recompute_flops(point: AttentionPoint) -> int:
    model = point.sizes
    return 4 * sum(point.seqlen * n for n in point.lengths) * model.nheads * model.headdim


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split RoPE in float32, in plain PyTorch; cos and sin broadcast against the halves of x."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class Canvas:
    """Unrotated q, k, v of all positions and caches that hold them, in several sets so that timing can rotate them.

    Cache memory is ordered (batch, nheads_k, seqlen, headdim) for every provider: the fastest order for PyTorch's
    attention. Padding columns hold large values: a provider that attends to them fails the check.
    """

    def __init__(self, point: AttentionPoint, *, sets: int, device: torch.device | str, dtype: torch.dtype):
        self.model, self.point = point.sizes, point
        self.device, self.dtype = torch.device(device), dtype
        batch, seqlen, model = point.batch, point.seqlen, self.model
        frequencies = model.rope_theta ** -(torch.arange(0, model.headdim, 2, dtype=torch.float64) / model.headdim)
        angles = torch.arange(seqlen, dtype=torch.float64)[:, None] * frequencies
        self.cos, self.sin = angles.cos().float().to(device), angles.sin().float().to(device)

        column = torch.arange(seqlen)
        start = torch.tensor(point.leftpads)[:, None]
        end = start + torch.tensor(point.lengths)[:, None]
        valid = (column >= start) & (column < end)
        # (batch, seqlen): the RoPE position of each column
        self.positions = (column - start).clamp(0).to(device)
        self.row_cos, self.row_sin = self.cos[self.positions], self.sin[self.positions]
        self.leftpad = start[:, 0].int().to(device) if point.ragged else None
        self.seqlens = end[:, 0].int().to(device) if point.ragged else None
        # added to the scores, (batch, 1, 1, seqlen)
        self.mask = None
        if point.ragged:
            hidden = torch.zeros(valid.shape).masked_fill_(~valid, float("-inf"))
            self.mask = hidden[:, None, None].to(device, dtype)

        generator = torch.Generator(device).manual_seed(batch * seqlen)
        noise = torch.empty(NOISE, device=device, dtype=dtype)
        noise.uniform_(-(3**0.5), 3**0.5, generator=generator)  # unit variance
        padding = ~valid.to(device)[..., None, None]
        self.q, self.k, self.v, self.k_memory, self.v_memory = [], [], [], [], []
        for i in range(sets):
            shape = (batch, seqlen, model.nheads_k, model.headdim)
            q = torch.empty(batch, seqlen, model.nheads, model.headdim, device=device, dtype=dtype)
            k, v = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
            for j, x in enumerate((q, k, v)):
                repeat(noise.roll(12345 * (3 * i + j)), x)
            if point.ragged:
                k.masked_fill_(padding, 100.0)
                v.masked_fill_(padding, 100.0)
            # one more slot than the cache has, for the writes of padding entries
            memories = [torch.empty(batch * model.nheads_k * seqlen + 1, model.headdim, device=device, dtype=dtype)]
            memories.append(torch.empty_like(memories[0]))
            rotated = rotate(k.transpose(1, 2), self.row_cos[:, None], self.row_sin[:, None])
            for memory, x in zip(memories, (rotated, v.transpose(1, 2)), strict=True):
                self.heads_first(memory).copy_(x)
            for name, x in zip(("q", "k", "v", "k_memory", "v_memory"), (q, k, v, *memories), strict=True):
                getattr(self, name).append(x)

    def heads_first(self, memory: Tensor) -> Tensor:
        """The cache as (batch, nheads_k, seqlen, headdim)."""
        return memory[:-1].view(self.point.batch, self.model.nheads_k, self.point.seqlen, self.model.headdim)

    def caches(self, i: int) -> tuple[Tensor, Tensor]:
        """The caches of set i as (batch, seqlen, nheads_k, headdim), which dkv.kernels takes."""
        return tuple(self.heads_first(memory[i]).transpose(1, 2) for memory in (self.k_memory, self.v_memory))

    @staticmethod
    def bytes_per_set(point: AttentionPoint, element_size: int) -> int:
        model = point.sizes
        return element_size * point.batch * point.seqlen * model.headdim * (model.nheads + 4 * model.nheads_k)

    @staticmethod
    def cache_bytes(point: AttentionPoint, element_size: int) -> int:
        model = point.sizes
        return element_size * point.batch * point.seqlen * model.headdim * 2 * model.nheads_k


class LayerCase:
    """A canvas with a choice of active positions: their fresh q, k, v, packed and padded."""

    def __init__(self, canvas: Canvas, point: AttentionPoint):
        self.canvas, self.point = canvas, point
        device, batch, seqlen, nheads_k = canvas.device, point.batch, point.seqlen, canvas.model.nheads_k
        counts, lengths, leftpads = point.counts, point.lengths, point.leftpads
        self.total, self.max_active = sum(counts), max(counts)
        generator = torch.Generator().manual_seed(point.active)
        columns = [
            leftpad + torch.randperm(n, generator=generator)[:count].sort().values
            for leftpad, n, count in zip(leftpads, lengths, counts, strict=True)
        ]
        self.rows = torch.repeat_interleave(torch.arange(batch), torch.tensor(counts)).to(device)
        self.columns = torch.cat(columns).to(device)
        self.positions = canvas.positions[self.rows, self.columns]
        self.slots = self.rows * seqlen + self.columns
        self.cu_seqlens_q = torch.tensor([0, *counts]).cumsum(0).int().to(device)
        self.q, self.k, self.v = ([self.fresh(x) for x in xs] for xs in (canvas.q, canvas.k, canvas.v))

        # a rectangle of (batch, max_active) entries, for code that cannot take packed ones; -1 where a row has fewer
        entry = torch.arange(self.max_active)
        starts = torch.tensor([0, *counts]).cumsum(0)[:-1, None]
        rectangle = torch.where(entry < torch.tensor(counts)[:, None], starts + entry, -1).to(device)
        self.present = rectangle >= 0
        source = rectangle.clamp(0)
        if point.ragged:
            padded = [[x[source.flatten()] for x in xs] for xs in (self.q, self.k, self.v)]
        else:
            padded = [self.q, self.k, self.v]
        self.padded_q, self.padded_k, self.padded_v = padded
        self.padded_positions = self.positions[source]
        self.padded_slots = torch.where(self.present, self.slots[source], -1).flatten()
        # index into the cache memory of each (row, K/V head, entry); padding entries write behind the cache
        heads = torch.arange(nheads_k, device=device)[:, None]
        memory_index = (self.rows[source][:, None] * nheads_k + heads) * seqlen + self.columns[source][:, None]
        outside = batch * nheads_k * seqlen
        self.memory_index = torch.where(self.present[:, None], memory_index, outside).flatten()

    def fresh(self, x: Tensor) -> Tensor:
        """The active tokens of x (batch, seqlen, ...), packed; no copy where all are active."""
        everything = self.total == x.shape[0] * x.shape[1]
        return x.flatten(0, 1) if everything else x[self.rows, self.columns]

    def unpack_rectangle(self, out: Tensor) -> Tensor:
        """(batch * max_active, ...) -> (total, nheads, headdim)."""
        return self.unpack(out.unflatten(0, (self.point.batch, self.max_active))[self.present])

    def unpack_canvas(self, out: Tensor) -> Tensor:
        """(batch * seqlen, ...) -> (total, nheads, headdim)."""
        return self.unpack(out.unflatten(0, (self.point.batch, self.point.seqlen))[self.rows, self.columns])

    def unpack(self, out: Tensor) -> Tensor:
        return out.reshape(self.total, self.canvas.model.nheads, self.canvas.model.headdim)

    def poison(self) -> Callable[[], None]:
        """Fills the active slots of the first set's caches with NaN: a provider that does not write them fails.

        Returns a function that restores the right values.
        """
        canvas = self.canvas
        cos, sin = (x[self.positions, None] for x in (canvas.cos, canvas.sin))
        k_cache, v_cache = canvas.caches(0)
        k_cache[self.rows, self.columns] = v_cache[self.rows, self.columns] = float("nan")

        def restore():
            k_cache[self.rows, self.columns] = rotate(self.k[0], cos, sin)
            v_cache[self.rows, self.columns] = self.v[0]

        return restore

    def oracle(self) -> tuple[Tensor, Tensor]:
        """(indices of packed queries, their output in float64), from the unrotated inputs of the first set."""
        canvas, model = self.canvas, self.canvas.model
        affordable = ORACLE_FLOPS / (4 * max(self.point.lengths) * model.nheads * model.headdim)
        chosen = torch.linspace(0, self.total - 1, min(self.total, max(16, int(affordable)))).round().long().unique()
        chosen = chosen.to(canvas.device)
        outs = []
        for row in self.rows[chosen].unique().tolist():
            queries = chosen[self.rows[chosen] == row]
            keys = slice(self.point.leftpads[row], self.point.leftpads[row] + self.point.lengths[row])
            q = rotate_exactly(self.q[0][queries], self.positions[queries], model.rope_theta)
            k = rotate_exactly(canvas.k[0][row, keys], canvas.positions[row, keys], model.rope_theta)
            group = model.nheads // model.nheads_k
            q = q.unflatten(1, (model.nheads_k, group))
            scores = torch.einsum("ahgd,nhd->ahgn", q, k) * model.headdim**-0.5
            out = torch.einsum("ahgn,nhd->ahgd", scores.softmax(-1), canvas.v[0][row, keys].double())
            outs.append(out.flatten(1, 2))
        return chosen, torch.cat(outs)


def repeat(pattern: Tensor, x: Tensor) -> None:
    """Fills x with the pattern again and again: on a CPU much faster than drawing as many random numbers."""
    for part in x.view(-1).split(pattern.numel()):
        part.copy_(pattern[: part.numel()])


def rotate_exactly(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE in float64 by complex multiplication: it shares no code with the implementations that it checks."""
    half = x.shape[-1] // 2
    frequencies = theta ** -(torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angles = positions.double()[:, None, None] * frequencies
    turned = torch.complex(*x.double().chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def relative_error(out: Tensor, chosen: Tensor, expected: Tensor) -> float:
    """The largest relative error of any query and head; infinity if any output is not finite."""
    if not out.isfinite().all():
        return float("inf")
    error = (out[chosen].double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return error.max().item()


@dataclass(frozen=True)
class Provider:
    """One way to do the job. `run(i)` does it on set i; `unpack` turns its result into (total, nheads, headdim)."""

    name: str
    family: str
    impl: str
    run: Callable[[int], Tensor]
    unpack: Callable[[Tensor], Tensor]


def ours(case: LayerCase, *, attention_alone: bool = False) -> Provider:
    """`attention_alone`: without rotation and cache write, which is a part of the job and not a rival."""
    canvas = case.canvas
    options = {"max_seqlen_q": case.max_active, "cache_leftpad": canvas.leftpad, "cache_seqlens": canvas.seqlens}
    if attention_alone:
        cos, sin = (x[case.positions, None] for x in (canvas.cos, canvas.sin))
        rotated = [rotate(q, cos, sin) for q in case.q]

    def run(i):
        caches = canvas.caches(i)
        if attention_alone:
            q = rotated[i]
        else:
            tokens = canvas.cos, canvas.sin, case.positions, case.slots
            q = rope_cache_update(case.q[i], case.k[i], case.v[i], *tokens, *caches)
        return delayed_attention(q, *caches, case.cu_seqlens_q, **options)

    name, family = ("ours, attention alone", "part") if attention_alone else ("ours", "ours")
    return Provider(name, family, our_impl(canvas.device), run, case.unpack)


def our_impl(device: torch.device | str) -> str:
    return "triton" if torch.device(device).type == "cuda" else "reference (PyTorch)"


def full_recompute(case: LayerCase, attend: Callable, name: str, *, fused: bool = False) -> Provider:
    """No cache: rotates and attends to everything. `fused`: with our rotation, so that only the attentions differ."""
    canvas, model = case.canvas, case.canvas.model
    positions = canvas.positions.flatten()
    slots = torch.arange(positions.numel(), device=canvas.device)

    def run(i):
        if fused:
            k_cache, v_cache = canvas.caches(i)
            q, k, v = (x[i].flatten(0, 1) for x in (canvas.q, canvas.k, canvas.v))
            q = rope_cache_update(q, k, v, canvas.cos, canvas.sin, positions, slots, k_cache, v_cache)
            q = q.view(case.point.batch, case.point.seqlen, model.nheads, model.headdim).transpose(1, 2)
            k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        else:
            q, k, v = (x[i].transpose(1, 2) for x in (canvas.q, canvas.k, canvas.v))
            cos, sin = canvas.row_cos[:, None], canvas.row_sin[:, None]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return attend(q, k, v, canvas.mask).transpose(1, 2).flatten(2).flatten(0, 1)

    return Provider(name, "full recompute", "PyTorch", run, case.unpack_canvas)


def authors_way(case: LayerCase) -> Provider:
    """Concatenates, re-orders and re-rotates, as the dKV-Cache authors' models do in each layer by their description.

    Unrotated keys are kept in the order of their positions. A step gathers the stable ones, appends the fresh ones,
    gathers them back into the order of positions, rotates all keys, repeats K/V heads, and attends. It is faster than
    theirs: index tensors are made beforehand, where their boolean masks make the host wait, and nothing is scattered
    into zeros.
    """
    canvas, model, point = case.canvas, case.canvas.model, case.point
    batch, seqlen = point.batch, point.seqlen
    is_active = torch.zeros(batch, seqlen, dtype=torch.bool, device=canvas.device)
    is_active[case.rows, case.columns] = True
    # stable columns first, in order; the rows of a ragged batch are as wide as the widest needs to be
    width = seqlen - min(point.counts)
    stable = is_active.int().argsort(dim=1, stable=True)[:, :width]
    first = torch.arange(batch, device=canvas.device)[:, None]
    stable_index = (stable + first * seqlen).flatten()
    # where each column lies in the concatenation of `width` stable and `max_active` fresh entries
    place = is_active.logical_not().cumsum(1) - 1
    entry = is_active.cumsum(1) - 1 + width
    order_index = (torch.where(is_active, entry, place) + first * (width + case.max_active)).flatten()
    cos, sin = canvas.row_cos[:, None], canvas.row_sin[:, None]
    q_cos, q_sin = (x[case.padded_positions, None].transpose(1, 2) for x in (canvas.cos, canvas.sin))

    def in_order(cached, fresh):
        stable = cached.flatten(0, 1).flatten(1).index_select(0, stable_index)
        both = torch.cat((stable.unflatten(0, (batch, -1)), fresh.flatten(1).unflatten(0, (batch, -1))), dim=1)
        ordered = both.flatten(0, 1).index_select(0, order_index)
        return ordered.view(batch, seqlen, model.nheads_k, model.headdim).transpose(1, 2)

    def run(i):
        k, v = in_order(canvas.k[i], case.padded_k[i]), in_order(canvas.v[i], case.padded_v[i])
        q = case.padded_q[i].unflatten(0, (batch, case.max_active)).transpose(1, 2)
        q, k = rotate(q, q_cos, q_sin), rotate(k, cos, sin)
        k, v = repeat_heads(k, model), repeat_heads(v, model)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=canvas.mask)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    return Provider("authors' way", "authors' way", "PyTorch", run, case.unpack_rectangle)


def cheap_fix(case: LayerCase, attend: Callable, name: str, *, fused: bool = False) -> Provider:
    """A static cache of rotated keys, indexed by position, and PyTorch's attention over it.

    `fused`: rotation and cache write by our kernel, so that only the attentions differ; otherwise in plain PyTorch.
    """
    canvas, model = case.canvas, case.canvas.model
    rectangle = (case.point.batch, case.max_active)
    positions = case.padded_positions.flatten()

    def run(i):
        q, k, v = case.padded_q[i], case.padded_k[i], case.padded_v[i]
        if fused:
            k_cache, v_cache = canvas.caches(i)
            q = rope_cache_update(q, k, v, canvas.cos, canvas.sin, positions, case.padded_slots, k_cache, v_cache)
        else:
            cos, sin = canvas.cos[positions, None], canvas.sin[positions, None]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            for memory, x in ((canvas.k_memory[i], k), (canvas.v_memory[i], v)):
                x = x.unflatten(0, rectangle).transpose(1, 2)
                memory.index_copy_(0, case.memory_index, x.reshape(-1, model.headdim))
        q = q.unflatten(0, rectangle).transpose(1, 2)
        k, v = canvas.heads_first(canvas.k_memory[i]), canvas.heads_first(canvas.v_memory[i])
        return attend(q, k, v, canvas.mask).transpose(1, 2).flatten(2).flatten(0, 1)

    return Provider(name, "cheap fix", "PyTorch", run, case.unpack_rectangle)


def repeat_heads(x: Tensor, model: ModelConfig) -> Tensor:
    """K/V heads repeated for every query head: (batch, nheads_k, n, d) -> (batch, nheads, n, d)."""
    return x.repeat_interleave(model.nheads // model.nheads_k, dim=1) if model.nheads != model.nheads_k else x


def sdpa(model: ModelConfig, backend: object = None, *, repeat: bool = False) -> Callable:
    """PyTorch's attention, on the given backend if there is one; `repeat`: with repeated K/V heads."""
    masks = {}

    def attend(q, k, v, mask):
        if repeat:
            k, v = repeat_heads(k, model), repeat_heads(v, model)
        enable_gqa = q.shape[1] != k.shape[1]
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)
        if mask is not None:
            # expanded to one line per query at the first, untimed call: not every backend broadcasts
            if q.shape[2] not in masks:
                masks[q.shape[2]] = mask.expand(-1, -1, q.shape[2], -1).contiguous()
            mask = masks[q.shape[2]]
        with torch.nn.attention.sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)

    return attend


def flex_attention(case: LayerCase, queries: int) -> Callable:
    """FlexAttention, compiled for the shapes of this case; a block mask made beforehand hides padding."""
    from torch.nn.attention import flex_attention as module

    canvas = case.canvas
    compiled = torch.compile(module.flex_attention, dynamic=False)
    block_mask = None
    if case.point.ragged:

        def is_valid(b, h, query, key):
            return (key >= canvas.leftpad[b]) & (key < canvas.seqlens[b])

        block_mask = module.create_block_mask(
            is_valid, case.point.batch, None, queries, case.point.seqlen, device=canvas.device
        )

    def attend(q, k, v, mask):
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def rivals(case: LayerCase, *, with_full: bool, flex: dict[str, bool] | None = None) -> Iterator[Provider]:
    """Every other provider that makes sense at this point.

    Args:
        with_full: whether full recomputes take part.
        flex: whether FlexAttention takes part: {"cache": ..., "full": ...}. It compiles for seconds, on a GPU only.
    """
    model, seqlen, cached = case.canvas.model, case.point.seqlen, case.point.active < case.point.seqlen
    plain = sdpa(model)
    yield cheap_fix(case, plain, "cheap fix")
    if cached:
        yield authors_way(case)
    if case.canvas.device.type == "cpu":
        if with_full:
            yield full_recompute(case, plain, "full recompute")
        return

    from torch.nn.attention import SDPBackend

    attends = {
        "flash": sdpa(model, SDPBackend.FLASH_ATTENTION),
        "cuDNN": sdpa(model, SDPBackend.CUDNN_ATTENTION),
        "efficient": sdpa(model, SDPBackend.EFFICIENT_ATTENTION, repeat=True),
    }
    if case.point.ragged:
        # it takes no mask
        del attends["flash"]
    cache_attends, full_attends = dict(attends), dict(attends)
    if flex and flex["cache"]:
        cache_attends["flex"] = flex_attention(case, case.max_active)
    if flex and flex["full"]:
        full_attends["flex"] = flex_attention(case, seqlen)
    # where all positions are active, both families are one and the same
    for name, attend in cache_attends.items() if cached else ():
        yield cheap_fix(case, attend, f"cheap fix, our write + {name}", fused=True)
    for name, attend in full_attends.items() if with_full else ():
        yield full_recompute(case, attend, f"full recompute, our RoPE + {name}", fused=True)
