"""A denoising run: steps on static memory, which a GPU executes without waiting for the host, or as CUDA graphs.

The host must know the size of a step before it launches it. Each step therefore ends by deciding which positions the
next one recomputes, and `start` decides for the first one.

    start -> _decide -+-> next_room -> [ _hidden -> predict -> commit_tokens -> _decide ] -+-> finish
                      |    (host)         compute: on the device, as one CUDA graph        |
                      +-------------------------------- step ------------------------------+

`_hidden` packs the active positions (`pack_step`) and takes them through the layers (`ModelRunner`). `predict`
(`Sampler`) applies the LM head, chooses tokens and scores them. `_decide` updates the `State` (`advance`) and writes
the positions that the next step recomputes (`write_active`).
"""

import time
import weakref
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dkv.active import rule_of, write_active
from dkv.cuda_graphs import StepGraphs
from dkv.inputs import eos_ids_of
from dkv.kernels import cpu
from dkv.kernels.rows import Counter, Size
from dkv.memory import memory_of
from dkv.model_runner import ModelRunner
from dkv.models.view import ModelView
from dkv.policy import Policy
from dkv.rooms import LateSizes, Room, Rooms, round_up
from dkv.sampling import Sampler, write_order
from dkv.schedule import Forecast, Schedule
from dkv.state import State

CAPACITY_UNIT = 256  # columns are allocated in multiples, so that batches of different lengths share memory and graphs


@dataclass
class GenerateStats:
    """The work of a run.

    Attributes:
        steps: denoising steps.
        forward_passes: passes of the batch through the model: one per step, two with guidance.
        recomputed_tokens: positions put through the model, over all steps and rows.
        cache_ratio: the mean share of positions that were read from the cache instead.
        peak_cache_bytes: bytes of the K/V cache.
        graphs: CUDA graphs recorded during the run.
        graph_seconds: the time spent on recording them.
        tokens: masks that became tokens, of each row those before its first end of text.
        seconds: the time of the run, with what was done between its steps.
        tokens_per_second: of all rows together.
    """

    steps: int = 0
    forward_passes: int = 0
    recomputed_tokens: int = 0
    cache_ratio: float = 0.0
    peak_cache_bytes: int = 0
    graphs: int = 0
    graph_seconds: float = 0.0
    tokens: int = 0
    seconds: float = field(default=0.0, compare=False)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, eq=False)
class StreamStep:
    """What a step of a run left, as copies on the model's device: reading them waits for the step, dkv does not.

    Attributes:
        step: the number of the step, from 0.
        sequences: (batch, seqlen) int64, prompts (left-padded), tokens and masks.
        prefix: (batch,) int64, the number of generated tokens before the row's first generated mask. They are final.
    """

    step: int
    sequences: Tensor
    prefix: Tensor


@dataclass(frozen=True)
class RunKey:
    """Identifies the runs that can share memory and graphs: a `Run` serves every batch of the same key.

    Attributes:
        batch: sequences.
        capacity: columns of the memory, of which a shorter batch uses the last ones.
        sampler: with the `GenerateConfig`, whose remasking, mask_id and block_length are set.
        pad_id: the token for the remaining masks of a row that ended early.
        eos_ids: the tokens that end a row early; () if none does.
        has_forecasts: whether no count depends on the tokens; otherwise the host reads the counts at each step.
    """

    batch: int
    capacity: int
    sampler: Sampler
    pad_id: int
    eos_ids: tuple[int, ...]
    has_forecasts: bool


def take_run(model: nn.Module, key: RunKey, view: ModelView) -> "Run":
    """The `Run` kept for the model, if it has this key and the weights have not moved; otherwise a new one."""
    run = memory_of(model).take("run")
    if run is None or run.key != key or not run.runner.is_current(view):
        run = None  # frees its memory before the new run allocates its own
        run = Run(view, key)
    run.model = weakref.ref(model)
    return run


def reads_sizes(device: torch.device) -> bool:
    """Whether the host reads the sizes of a step instead of bounding them: free on a CPU, and it pads less."""
    return device.type == "cpu"


class Run:
    """Memory, graphs and counters of runs of one `RunKey`, one at a time.

        with take_run(model, key, view) as run:
            run.start(...)
            while run.running():
                run.step()
            output = run.finish()

    When the `with` ends, even by an error, the memory goes back to the model, and the next run may use it.

    Attributes:
        view, key, config, policy, sampler, shifted: the model and the options, for as long as the memory is kept.
        model: a weak reference to the model that gets the memory back.
        schedule: `Schedule`, the commits of each step.
        rows_per_sequence: int, rows of the model's batch for each sequence: 2 with guidance, otherwise 1.
        runner, ops: `ModelRunner`, and the operators of its `impl`.
        cache: `KVCache`.
        graphs: `StepGraphs`; None if steps are not recorded.
        late: `LateSizes`, which tighten the bounds; None if they would not.

    Attributes that are static tensors on the device:
        state: `State`.
        positions: (batch * rows_per_sequence, capacity) int64, for RoPE.
        active: (batch, capacity) bool, the positions that the next step recomputes.
        sizes: (batch, len(Size)) int32, their number and other sizes of the next step.
        totals: (batch, 2) int64, the sums over all steps of recomputed and of computable positions.
        excess: () int64, the maximum over the steps of the positions that did not fit the step's `Room`.
        commits: (batch, blocks, steps of a block) int64, the schedule's; None if no schedule counts commits.
        eos_ids: (n,) int64, as in the key; None if no row ends early.
        options: `RowOptions`.

    Attributes of the current batch, set by `start`:
        forecasts: a list with the `Forecast` of each step; None if the key has none.
        bounds: a list with the `Room` that each step needs at most, None where the policy has no bound; None without
            forecasts.
        rooms: `Rooms`, the sizes that steps are padded to.
        longest, valid_positions: ints, the positions of the longest row and of all rows, without padding.
        unused: int, columns of the memory in front of the batch.
        steps, max_steps: ints, the steps done, and the maximum number that a schedule takes.
        sizes_read: the `Room` that the next step needs and the masks that are left, or None if the host has not read
            them.
        masks_left: for threshold and factor, a list with the masks of each row when the host last read them.
        began: the number of graphs, and the seconds spent on them, before the run.
        began_at: the time when it began, of `time.perf_counter`.
        stream: the CUDA stream of the last step; None on a CPU.
        weights: the storages that recorded steps read, kept alive until the run ends, whatever happens to the model.
    """

    # inference tensors cannot be updated later outside inference mode, so allocate normal ones
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, view: ModelView, key: RunKey) -> None:
        device, batch, config = view.weight.device, key.batch, key.sampler.config
        self.view, self.key, self.config, self.sampler = view, key, config, key.sampler
        self.policy: Policy = config.policy
        self.shifted = view.family.shifted
        self.schedule = Schedule(
            steps=config.steps,
            gen_length=config.gen_length,
            block_length=config.block_length,
            time_steps=view.family.time_steps,
            eps=config.eps,
        )
        self.rows_per_sequence = 2 if config.cfg_scale else 1
        self.runner = ModelRunner(view, key.capacity, config.impl, config.fused_products)
        self.ops = self.runner.ops
        self.state = State(
            batch,
            key.capacity,
            mask_id=config.mask_id,
            shifted=self.shifted,
            ops=self.ops,
            device=device,
            ordered=config.ordered,
        )
        rows = batch * self.rows_per_sequence
        self.positions = torch.zeros(rows, key.capacity, dtype=torch.int64, device=device)
        self.active = torch.zeros_like(self.state.valid)
        self.commits = None
        if not (config.by_probability or config.ordered):
            # a row has at most as many masks as columns
            steps = self.schedule.block_steps or key.capacity
            self.commits = torch.zeros(batch, len(self.schedule.lengths), steps, dtype=torch.int64, device=device)
        self.eos_ids = torch.tensor(key.eos_ids, device=device) if key.eos_ids else None
        self.options = self.sampler.row_options(batch, view.weight)
        self.cache = view.new_cache(rows, key.capacity, torch.zeros(rows, dtype=torch.int32, device=device))
        self.sizes = torch.zeros(batch, len(Size), dtype=torch.int32, device=device)
        self.totals = torch.zeros(batch, 2, dtype=torch.int64, device=device)
        self.excess = torch.zeros((), dtype=torch.int64, device=device)
        rule = rule_of(self.policy, self.shifted)
        # a policy without max_active may read from the device or change between steps, and a window around the masks
        # that are decoded next does read, unless it is a rule
        known = type(self.policy).max_active is not Policy.max_active and not (rule is None and self.policy.needs_order)
        self.graphs = StepGraphs(device) if config.cuda_graphs and self.runner.can_be_recorded and known else None
        # late sizes help if the count of a rule depends on the tokens; in a known order they are no bound, because the
        # next step has other candidates
        no_help = not key.has_forecasts or rule is None or rule.is_foreseen(self.shifted) or config.ordered
        self.late = None if no_help or reads_sizes(device) else LateSizes(self.sizes)

    @torch.no_grad()
    def start(
        self,
        x: Tensor,
        valid: Tensor,
        *,
        lengths: list[int],
        prompt_masks: list[int],
        forecasts: list[Forecast] | None,
        first_generated: int,
        seed: int,
        order: Tensor | None,
    ) -> None:
        """Begins with a batch.

        Args:
            x: (batch, seqlen) int64, the sequences; seqlen is at most the capacity.
            valid: (batch, seqlen) bool, False for padding.
            lengths: the positions of each row that are not padding.
            prompt_masks: the masks inside each prompt.
            forecasts: one for each step if the key has forecasts, otherwise None.
            first_generated: the first column after the prompts.
            seed: of the noise.
            order: as in `dkv.generate`.
        """
        key, state = self.key, self.state
        self.forecasts, self.weights = forecasts, self.runner.storages()
        self.longest, self.valid_positions = max(lengths), sum(lengths)
        self.unused = key.capacity - x.shape[1]
        state.start(
            F.pad(x, (self.unused, 0)),
            F.pad(valid, (self.unused, 0)),
            first_generated=first_generated + self.unused,
            block_length=self.config.block_length,
            gen_length=self.config.gen_length,
            seed=seed,
        )
        positions = (state.columns - state.first_column).clamp(min=0)
        self.positions.copy_(positions.repeat(self.rows_per_sequence, 1))
        self.cache.leftpad.copy_(state.first_column[:, 0].repeat(self.rows_per_sequence))
        state.counts.fill_(key.capacity)
        if self.config.ordered:
            write_order(self.sampler, self.schedule, state, order, prompt_masks)
        elif self.commits is not None:
            commits = self.schedule.commits(prompt_masks)
            self.commits.copy_(F.pad(commits, (0, self.commits.shape[-1] - commits.shape[-1])))
        self.bounds = None if forecasts is None else [self._bound(forecast) for forecast in forecasts]
        self.rooms = self._rooms(max(prompt_masks))
        self.steps, self.sizes_read, self.masks_left = 0, None, [float("inf")] * key.batch
        self.max_steps = self.schedule.max_steps(prompt_masks)
        self.totals.zero_()
        self.excess.zero_()
        self.began = (self.graphs.captured, self.graphs.capture_seconds) if self.graphs else (0, 0.0)
        self.began_at = time.perf_counter()
        self.stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
        self._decide()
        self._post()

    def running(self) -> bool:
        """Whether a step is left to do. The current CUDA stream may be another one than before."""
        if self.stream is not None:
            before, self.stream = self.stream, torch.cuda.current_stream(self.sizes.device)
            if self.stream != before:
                self.stream.wait_stream(before)
        return self.steps < len(self.forecasts) if self.forecasts else self._read()[1] > 0

    @torch.no_grad()
    def step(self) -> None:
        """Predicts, commits, and decides for the next step; computes in the model's dtype, even under autocast."""
        room = self.next_room()
        with torch.autocast(self.sizes.device.type, enabled=False):
            if self.graphs is not None and self.rooms.records(room):
                self.graphs.run(room, lambda: self.compute(room))
            else:
                self.compute(room)
        self._post()
        self.sizes_read = None
        self.steps += 1

    @torch.no_grad()
    def last_step(self) -> StreamStep:
        """What the last step left."""
        masked = self.state.masked[:, self.key.capacity - self.config.gen_length :]
        return StreamStep(self.steps - 1, self.trimmed(self.state.x), (~masked).long().cumprod(1).sum(1))

    @torch.no_grad()
    def finish(self) -> tuple[Tensor, GenerateStats]:
        """The sequences (batch, seqlen) int64, in memory of their own, and the `GenerateStats` of the run.

        Raises:
            RuntimeError: a candidate had no answer, or the policy's `max_active` was too small.
        """
        state = self.state
        sequences = self.trimmed(state.x)
        end_ids = torch.tensor(eos_ids_of(self.config.eos_token_id, self.view), device=state.x.device)
        ends = torch.isin(state.x, end_ids) & (state.columns >= state.first_generated)
        tokens = (state.decoded & (state.decoded_step >= 0) & (ends.cumsum(1) == 0)).sum()
        nan_steps = state.counters[:, Counter.NAN_STEP]
        numbers = torch.cat((self.totals.sum(0), torch.stack((self.excess, tokens)), nan_steps))
        recomputed, positions, excess, tokens, *nan_steps = numbers.tolist()
        if excess > 0:
            raise RuntimeError(
                f"{self.policy!r}.max_active promised fewer positions of a row than were active: {excess} were "
                "left out. It must be an upper bound that includes predictors."
            )
        check_answers(nan_steps)
        stats = GenerateStats(
            steps=self.steps,
            forward_passes=self.steps * self.rows_per_sequence,
            recomputed_tokens=recomputed * self.rows_per_sequence,
            cache_ratio=1 - recomputed / positions if positions else 0.0,
            peak_cache_bytes=self.cache.nbytes,
            tokens=tokens,
            seconds=time.perf_counter() - self.began_at,
        )
        if self.graphs:
            stats.graphs = self.graphs.captured - self.began[0]
            stats.graph_seconds = self.graphs.capture_seconds - self.began[1]
        return sequences, stats

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        model = self.model()
        if model is not None:
            if self.stream is not None:
                # the next run may be on another stream
                self.stream.synchronize()
            memory_of(model).run = self
        self.weights = None

    def trimmed(self, tensor: Tensor) -> Tensor:
        """A copy of a (batch, capacity) tensor without the columns that this batch does not use."""
        return tensor[:, self.unused :].clone()

    def _read(self):
        """The `Room` that the next step needs, and the number of masks that are left."""
        if self.sizes_read is None:
            rows = self.sizes.tolist()
            check_answers([row[Size.NAN_STEP] for row in rows])
            masks = [row[Size.MASKS] for row in rows]
            if self.forecasts is None:
                self._check_progress(masks)
            self.sizes_read = needed(rows), sum(masks)
        return self.sizes_read

    def _check_progress(self, masks):
        """Raises RuntimeError if the run, which lasts until no mask is left, might never end.

        masks: a list of ints, the masks left in each row.
        """
        if self.config.by_probability:
            must = "decode a mask of each unfinished row"
            stuck = [row for row, left in enumerate(masks) if left and left >= self.masks_left[row]]
            self.masks_left = masks
        else:
            # a step of a schedule may decode no mask, but the last one leaves none
            must = "be the last one of the schedule"
            stuck = [row for row, left in enumerate(masks) if left and self.steps >= self.max_steps]
        if stuck:
            raise RuntimeError(
                f"step {self.steps - 1} must {must}, but {[masks[row] for row in stuck]} masks are left in rows "
                f"{stuck}. A policy must not change the state that it is given, got {self.policy!r}."
            )

    def next_room(self) -> Room:
        """The `Room` of the next step."""
        if reads_sizes(self.sizes.device):
            need, _ = self._read()
            return Room(cpu.padded_rows(need.positions), need.per_row + self.shifted, cpu.padded_rows(need.candidates))
        if self.bounds is None or self.bounds[self.steps] is None:
            need, _ = self._read()
            # the first two masks of a row can have the same predictor
            return self.rooms.of(need._replace(per_row=need.per_row + self.shifted))
        need = self.bounds[self.steps]
        if self.late and self.steps and self.forecasts[self.steps].block == self.forecasts[self.steps - 1].block:
            rows = self.late.take()
            check_answers([row[Size.NAN_STEP] for row in rows])
            late = needed(rows, Size.LATER)
            need = Room(min(need.positions, late.positions), min(need.per_row, late.per_row), need.candidates)
        return self.rooms.of(need)

    def _bound(self, forecast):
        """The `Room` that a step with this forecast needs at most; None: the policy has no bound."""
        per_row = self.policy.max_active(forecast)
        if per_row is None:
            return None
        per_row = min(per_row, self.longest) if forecast.step else self.longest
        candidates = forecast.commits if self.config.ordered else forecast.block_masks
        return Room(min(self.key.batch * per_row, self.valid_positions), per_row, self.key.batch * candidates)

    def _rooms(self, prompt_masks):
        """The `Rooms` of the run; prompt_masks: int, the maximum over the rows."""
        key = self.key
        if self.bounds is not None and None not in self.bounds:
            cached = [bound for bound in self.bounds if bound.positions < self.valid_positions]
            candidates = max(bound.candidates for bound in self.bounds)
            positions, per_row, _ = zip(*cached, strict=True) if cached else ([0], [0], [0])
            max_need = Room(max(positions), max(per_row), candidates)
            return Rooms(key.batch, max_need, positions, self.rows_per_sequence)
        masks = (self.config.gen_length + prompt_masks) * (1 + self.shifted)
        per_row = min(masks + self.shifted, self.longest)
        candidates = min(self.config.block_length, self.config.gen_length) + prompt_masks
        max_need = Room(key.batch * per_row, per_row, key.batch * candidates)
        return Rooms(key.batch, max_need, rows_per_sequence=self.rows_per_sequence)

    def compute(self, room: Room) -> None:
        """The part of a step on the device, which can be recorded."""
        state, options = self.state, self.options
        hidden, wanted = self._hidden(room)
        scales = None
        if self.config.temperature:
            # slots after the candidates are padding or of unconditional rows: their scales are not used
            rows = wanted.slots.clamp(min=0) // self.key.capacity % self.key.batch
            scales = options.logit_scale[rows], options.noise_scale[rows]
        tokens, scores = self.sampler.predict(
            self.view, hidden, wanted.keys, self.ops, scales, cu_seqlens=wanted.cu_seqlens
        )
        self.ops.commit_tokens(
            state.x,
            tokens,
            self.sampler.ranking(scores, wanted.keys),
            wanted.slots,
            wanted.cu_seqlens,
            state.counts,
            threshold=options.threshold,
            factor=options.factor,
            counters=state.counters,
        )
        self._decide()

    def _hidden(self, room):
        """The hidden states (candidates, hidden_size) that predict the candidates, and the candidates as `Packed`."""
        state, key = self.state, self.key
        ids = state.x
        if self.rows_per_sequence > 1:
            # the unconditional rows see masks in place of the prompt, which still count as prompt
            ids = torch.cat((ids, torch.where(state.prompt & state.valid, state.mask_id, ids)))
        packed, wanted = self.ops.pack_step(
            self.active,
            state.candidates,
            self.sizes,
            ids,
            self.positions,
            state.counters,
            self.excess,
            capacity=room.positions * self.rows_per_sequence,
            candidate_capacity=room.candidates * self.rows_per_sequence,
            per_row=room.per_row,
            shifted=self.shifted,
            noisy=self.config.noisy,
        )
        hidden = self.runner(packed, self.cache, room.per_row, wanted)
        if self.rows_per_sequence == 1:
            return hidden, wanted
        # the unconditional rows begin where the conditional ones end
        count = room.candidates
        cond, first_uncond = hidden[:count], wanted.cu_seqlens[key.batch]
        uncond = hidden[(torch.arange(count, device=hidden.device) + first_uncond).clamp(max=2 * count - 1)]
        guided = (self.config.cfg_scale + 1) * cond.float() - self.config.cfg_scale * uncond.float()
        keys = None if wanted.keys is None else wanted.keys[:count]
        slots, cu_seqlens = wanted.slots[:count], wanted.cu_seqlens[: key.batch + 1]
        return guided.to(cond.dtype), wanted._replace(slots=slots, cu_seqlens=cu_seqlens, keys=keys)

    def _decide(self):
        """Updates the state after the commits, and writes the positions that the next step recomputes."""
        self.state.advance(commits=self.commits, end_ids=self.eos_ids, pad_id=self.key.pad_id)
        write_active(self.policy, self.state, self.active, self.sizes, self.totals, foresee=self.late is not None)

    def _post(self):
        if self.late is not None:
            self.late.post(self.sizes)


def needed(rows: list[list[int]], size: Size = Size.ACTIVE) -> Room:
    """The `Room` that a step needs; rows: `Run.sizes` as lists, size: the column that counts positions."""
    active = [row[size] for row in rows]
    return Room(sum(active), max(active), sum(row[Size.CANDIDATES] for row in rows))


def check_answers(nan_steps: list[int]) -> None:
    """Raises RuntimeError if a candidate had no answer; nan_steps: `Counter.NAN_STEP` of each row."""
    first = min((step for step in nan_steps if step >= 0), default=None)
    if first is not None:
        rows = [row for row, step in enumerate(nan_steps) if step == first]
        raise RuntimeError(
            f"step {first}: the logits of rows {rows} give no answer (NaN, +inf, or nothing above -inf). Check the "
            "model's weights for NaN; a float16 model may overflow: try bfloat16 or float32."
        )


def capacity_for(seqlen: int) -> int:
    """The columns that are allocated for sequences of this length."""
    return round_up(seqlen, CAPACITY_UNIT)
