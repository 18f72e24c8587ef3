"""A denoising run: steps on static memory, which a GPU executes without waiting for the host, or as CUDA graphs."""

import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dkv.active import rule_of, write_active
from dkv.config import GenerateConfig
from dkv.cuda_graphs import StepGraphs
from dkv.kernels.cpu import padded_rows
from dkv.kernels.rows import Counter, Size
from dkv.memory import memory_of
from dkv.model_runner import ModelRunner
from dkv.policy import Policy
from dkv.rooms import LateSizes, Room, Rooms
from dkv.sampling import Sampler, write_order
from dkv.schedule import Schedule
from dkv.state import State

CAPACITY_UNIT = 256  # columns are allocated in multiples, so that prompts of different lengths share memory and graphs


@dataclass
class GenerateStats:
    """What a run did.

    Attributes:
        steps: denoising steps.
        forward_passes: passes of a sequence batch through the model: one a step, two with guidance.
        recomputed_tokens: positions put through the model, over all steps and rows.
        cache_ratio: the mean share of positions read from the cache instead.
        peak_cache_bytes: bytes of the K/V cache.
        graphs: CUDA graphs recorded during the run; graph_seconds: the time that took.
    """

    steps: int = 0
    forward_passes: int = 0
    recomputed_tokens: int = 0
    cache_ratio: float = 0.0
    peak_cache_bytes: int = 0
    graphs: int = 0
    graph_seconds: float = 0.0


@dataclass
class GenerateOutput:
    """The result of `generate`.

    Attributes:
        sequences: (batch, seqlen) int64, prompts (left-padded) and generated tokens.
        stats: `GenerateStats`.
        history: (steps, batch, seqlen) int64, the sequence after every step, or None.
        active: (steps, batch, seqlen) bool, the positions recomputed at every step, or None.
        decoded_step: (batch, seqlen) int64, the step that committed each position, -1 for the prompt; or None.
    """

    sequences: torch.Tensor
    stats: GenerateStats
    history: torch.Tensor | None = None
    active: torch.Tensor | None = None
    decoded_step: torch.Tensor | None = None


@dataclass(frozen=True)
class RunKey:
    """What is the same for every prompt: a run and its graphs serve all that have the same key.

    Attributes:
        capacity: columns of the memory, of which a shorter batch uses the last ones.
        sampler: with the `GenerateConfig`, whose mask_id and block_length are set.
        pad_id: what fills the masks of a row that ended early; eos_ids: by what it ends, () if it does not.
        has_forecasts: whether no count depends on the tokens; else the host reads counts at each step.
    """

    batch: int
    capacity: int
    sampler: Sampler
    pad_id: int
    eos_ids: tuple[int, ...]
    has_forecasts: bool

    @property
    def config(self) -> GenerateConfig:
        return self.sampler.config


def take_run(model, key, view):
    """A `Run` of this key: the one that the model keeps, if it is of this key and the weights are where they were."""
    run = memory_of(model).take("run")
    if run is None or run.key != key or not run.runner.is_current(view):
        run = None  # frees its memory before the next one's is allocated
        run = Run(view, key)
    run.model = weakref.ref(model)
    return run


def reads_sizes(device):
    """Whether the sizes of a step are read rather than bounded: on a CPU that costs nothing, and little is padded."""
    return device.type == "cpu"


class Run:
    """Memory, graphs and counters of runs of one `RunKey`, one at a time.

        with take_run(model, key, view) as run:
            run.start(...)
            while run.running():
                run.step()
            output = run.finish()

    At the end of the `with`, however it comes, the memory goes back to the model. From then on it may be another run's.

    Attributes:
        active: (batch, capacity) bool, what the next step recomputes.
        sizes: (batch, len(Size)) int32, how much that is.
        rooms: `Rooms`, the sizes of this run's steps.
        weights: the storages that recorded steps read; kept alive until the run ends, whatever becomes of the model.
    """

    # outside of inference mode, so that the next run may be outside of it
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, view, key):
        device, batch, config = view.weight.device, key.batch, key.config
        self.view, self.key, self.config, self.sampler = view, key, config, key.sampler
        self.shifted = view.family.shifted
        self.schedule = Schedule(
            steps=config.steps,
            gen_length=config.gen_length,
            block_length=config.block_length,
            time_steps=view.family.time_steps,
            eps=config.eps,
        )
        self.copies = 2 if config.cfg_scale else 1  # rows of the model's batch per sequence
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
        self.positions = torch.zeros(batch * self.copies, key.capacity, dtype=torch.int64, device=device)
        self.active = torch.zeros_like(self.state.valid)
        self.commits = None
        if not (config.by_probability or config.ordered):
            # no row has more masks than columns
            steps = self.schedule.block_steps or key.capacity
            self.commits = torch.zeros(batch, len(self.schedule.lengths), steps, dtype=torch.int64, device=device)
        self.eos_ids = torch.tensor(key.eos_ids, device=device) if key.eos_ids else None
        self.options = self.sampler.row_options(batch, view.weight)
        leftpad = torch.zeros(batch * self.copies, dtype=torch.int32, device=device)
        self.cache = view.new_cache(batch * self.copies, key.capacity, leftpad)
        self.sizes = torch.zeros(batch, len(Size), dtype=torch.int32, device=device)
        # recomputed positions of each row, and all that it had to compute
        self.totals = torch.zeros(batch, 2, dtype=torch.int64, device=device)
        # positions beyond what the policy promised
        self.excess = torch.zeros((), dtype=torch.int64, device=device)
        rule = rule_of(config.policy, self.shifted)
        # of a policy without max_active nothing is known: it may read from the device, or change; a window around what
        # is decoded next does read
        policy = config.policy
        known = type(policy).max_active is not Policy.max_active and not (rule is None and policy.needs_order)
        self.graphs = StepGraphs(device) if config.cuda_graphs and self.runner.can_be_recorded and known else None
        # in a known order the next step's candidates are other ones
        foreseen = not key.has_forecasts or rule is None or rule.is_foreseen(self.shifted) or config.ordered
        self.late = None if foreseen or reads_sizes(device) else LateSizes(self.sizes)

    @torch.no_grad()
    def start(self, x, valid, *, lengths, prompt_masks, forecasts, first_generated, seed, order):
        """Begins with a batch.

        Args:
            x, valid: (batch, seqlen) int64 and bool, seqlen up to the capacity: the sequences, and what is not padding.
            lengths, prompt_masks: lists of ints, what is not padding in each row, and masks inside its prompt.
            forecasts: a list of `Forecast`, where the key has them; else None.
            first_generated: int, the column.
            seed: int; order: as in `dkv.generate`.
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
        self.positions.copy_(positions.repeat(self.copies, 1))
        self.cache.leftpad.copy_(state.first_column[:, 0].repeat(self.copies))
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
        self._decide()
        self._post()

    def running(self):
        """Whether a step is left to do."""
        return self.steps < len(self.forecasts) if self.forecasts else self._read()[1] > 0

    @torch.no_grad()
    def step(self):
        """Predicts, commits, and decides what the next step does; in the model's dtype, under autocast too."""
        room = self.next_room()
        with torch.autocast(self.sizes.device.type, enabled=False):
            if self.graphs is not None and self.rooms.records(room):
                self.graphs.run(room, lambda: self.compute(room))
            else:
                self.compute(room)
        self._post()
        self.sizes_read = None
        self.steps += 1

    def finish(self):
        """The `GenerateOutput`, which shares no memory with the run."""
        sequences = self.trimmed(self.state.x)
        nan_steps = self.state.counters[:, Counter.NAN_STEP]
        numbers = torch.cat((self.totals.sum(0), self.excess[None], nan_steps)).tolist()
        recomputed, positions, excess, *nan_steps = numbers
        if excess > 0:
            raise RuntimeError(
                f"{self.config.policy!r}.max_active promised fewer positions of a row than were active: {excess} were "
                "left out. It must be an upper bound, predictors included."
            )
        check_answers(nan_steps)
        stats = GenerateStats(
            steps=self.steps,
            forward_passes=self.steps * self.copies,
            recomputed_tokens=recomputed * self.copies,
            cache_ratio=1 - recomputed / positions if positions else 0.0,
            peak_cache_bytes=self.cache.nbytes,
        )
        if self.graphs:
            stats.graphs = self.graphs.captured - self.began[0]
            stats.graph_seconds = self.graphs.capture_seconds - self.began[1]
        return GenerateOutput(sequences, stats)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        model = self.model()
        if model is not None:
            if self.sizes.is_cuda:
                # the next one may be on another stream
                torch.cuda.current_stream(self.sizes.device).synchronize()
            memory_of(model).run = self
        self.weights = None

    def trimmed(self, tensor):
        """A copy of a (batch, capacity) tensor without the columns that this batch does not use."""
        return tensor[:, self.unused :].clone()

    def _read(self):
        """What the next step needs, as a `Room`, and the masks that are left."""
        if self.sizes_read is None:
            rows = self.sizes.tolist()
            check_answers([row[Size.NAN_STEP] for row in rows])
            masks = [row[Size.MASKS] for row in rows]
            if self.forecasts is None:
                self._check_progress(masks)
            self.sizes_read = needed(rows), sum(masks)
        return self.sizes_read

    def _check_progress(self, masks):
        """Raises RuntimeError where a run that lasts until no mask is left might never end.

        masks: a list of ints, those that are left of each row.
        """
        if self.config.by_probability:
            must = "decode a mask of each unfinished row"
            stuck = [row for row, left in enumerate(masks) if left and left >= self.masks_left[row]]
            self.masks_left = masks
        else:
            # a step of a schedule may decode none, but the last one leaves none
            must = "be the last one of the schedule"
            stuck = [row for row, left in enumerate(masks) if left and self.steps >= self.max_steps]
        if stuck:
            raise RuntimeError(
                f"step {self.steps - 1} must {must}, but {[masks[row] for row in stuck]} masks are left in rows "
                f"{stuck}. A policy must not change the state that it is given, got {self.config.policy!r}."
            )

    def next_room(self):
        """The `Room` of the next step."""
        if reads_sizes(self.sizes.device):
            need, _ = self._read()
            return Room(padded_rows(need.positions), need.per_row + self.shifted, padded_rows(need.candidates))
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
        """A `Room` that a step with this forecast does not need more than; None: the policy does not say."""
        most = self.config.policy.max_active(forecast)
        if most is None:
            return None
        most = min(most, self.longest) if forecast.step else self.longest
        candidates = forecast.commits if self.config.ordered else forecast.block_masks
        return Room(min(self.key.batch * most, self.valid_positions), most, self.key.batch * candidates)

    def _rooms(self, prompt_masks):
        """The `Rooms` of the run; prompt_masks: the most of a row."""
        key = self.key
        if self.bounds is not None and None not in self.bounds:
            cached = [bound for bound in self.bounds if bound.positions < self.valid_positions]
            candidates = max(bound.candidates for bound in self.bounds)
            positions, per_row, _ = zip(*cached, strict=True) if cached else ([0], [0], [0])
            return Rooms(key.batch, Room(max(positions), max(per_row), candidates), positions, self.copies)
        masks = (self.config.gen_length + prompt_masks) * (1 + self.shifted)
        per_row = min(masks + self.shifted, self.longest)
        candidates = min(self.config.block_length, self.config.gen_length) + prompt_masks
        return Rooms(key.batch, Room(key.batch * per_row, per_row, key.batch * candidates), copies=self.copies)

    def compute(self, room):
        """What a step does on the device; it can be recorded."""
        state, options = self.state, self.options
        hidden, wanted = self._hidden(room)
        scales = None
        if self.config.temperature:
            # behind the candidates lie those of the unconditional rows, which are not looked at
            scales = options.scales(wanted.slots.clamp(min=0) // self.key.capacity % self.key.batch)
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
        """The final hidden states (candidates, hidden_size) that predict the candidates, and those as `Packed`."""
        state, key = self.state, self.key
        ids = state.x
        if self.copies > 1:
            # the unconditional rows see masks in place of the prompt, which count as prompt all the same
            ids = torch.cat((ids, torch.where(state.prompt & state.valid, state.mask_id, ids)))
        packed, wanted = self.ops.pack_step(
            self.active,
            state.candidates,
            self.sizes,
            ids,
            self.positions,
            state.counters,
            self.excess,
            capacity=room.positions * self.copies,
            candidate_capacity=room.candidates * self.copies,
            per_row=room.per_row,
            shifted=self.shifted,
            noisy=self.config.noisy,
        )
        hidden = self.runner(packed, self.cache, room.per_row, wanted)
        if self.copies == 1:
            return hidden, wanted
        # the unconditional rows begin where the conditional ones end
        count = room.candidates
        cond, behind = hidden[:count], wanted.cu_seqlens[key.batch]
        uncond = hidden[(torch.arange(count, device=hidden.device) + behind).clamp(max=2 * count - 1)]
        guided = (self.config.cfg_scale + 1) * cond.float() - self.config.cfg_scale * uncond.float()
        keys = None if wanted.keys is None else wanted.keys[:count]
        slots, cu_seqlens = wanted.slots[:count], wanted.cu_seqlens[: key.batch + 1]
        return guided.to(cond.dtype), wanted._replace(slots=slots, cu_seqlens=cu_seqlens, keys=keys)

    def _decide(self):
        """Takes what was committed, and writes down what the next step recomputes and may commit."""
        self.state.advance(commits=self.commits, end_ids=self.eos_ids, pad_id=self.key.pad_id)
        write_active(
            self.config.policy, self.state, self.active, self.sizes, self.totals, foresee=self.late is not None
        )

    def _post(self):
        if self.late is not None:
            self.late.post(self.sizes)


def needed(rows, size=Size.ACTIVE):
    """The `Room` that a step needs by `Run.sizes`, as lists."""
    active = [row[size] for row in rows]
    return Room(sum(active), max(active), sum(row[Size.CANDIDATES] for row in rows))


def check_answers(nan_steps):
    """Raises RuntimeError where candidates had no answer; nan_steps: a list, `Counter.NAN_STEP` of each row."""
    first = min((step for step in nan_steps if step >= 0), default=None)
    if first is not None:
        rows = [row for row, step in enumerate(nan_steps) if step == first]
        raise RuntimeError(
            f"step {first}: the logits of rows {rows} give no answer (NaN, +inf, or nothing above -inf). Check the "
            "model's weights for NaN; if it is float16 it may overflow: try bfloat16 or float32."
        )


def capacity_for(seqlen):
    return -(-seqlen // CAPACITY_UNIT) * CAPACITY_UNIT
