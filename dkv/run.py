"""A denoising run: steps on static memory, which a GPU executes without waiting for the host, or as CUDA graphs."""

import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dkv.engine import active_positions, output_places
from dkv.forward import Forward, Packed
from dkv.graphs import LARGEST_GRAPH, StepGraphs, bucket
from dkv.kernels import commit_tokens, pack_positions
from dkv.kernels.noise import noise_key
from dkv.kernels.product import fast_rows
from dkv.policy import Policy
from dkv.sampling import descending_ranks
from dkv.schedule import Schedule
from dkv.state import State

CAPACITY_UNIT = 256  # columns are allocated in multiples, so that prompts of different lengths share memory and graphs
_IDLE = weakref.WeakKeyDictionary()  # model -> the run that was finished last, whose memory the next one can use


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
class Plan:
    """What is the same for every prompt: a run and its graphs serve all that have the same plan.

    Attributes:
        capacity: columns of the memory, of which a shorter batch uses the last ones.
        has_forecasts: whether no count depends on the tokens; else the host reads counts at each step.
        pad_id: what fills the masks of a row that ended early.
        The others are arguments of `dkv.generate`.
    """

    batch: int
    capacity: int
    policy: object
    sampler: object
    gen_length: int
    block_length: int
    steps: int
    eps: float
    mask_id: int
    pad_id: int
    eos_ids: tuple[int, ...]
    cfg_scale: float
    impl: str
    cuda_graphs: bool
    has_forecasts: bool


def take_idle(model, plan, decoder):
    """The last finished run of the model if it was of this plan and its weights are where they were, or None."""
    run = _IDLE.pop(model, None)
    return run if run is not None and run.plan == plan and run.forward.is_current(decoder) else None


def drop_idle(model):
    """Frees the memory that a finished run keeps for the next; returns whether there was any."""
    return _IDLE.pop(model, None) is not None


def reads_sizes(device):
    """Whether the sizes of a step are read rather than bounded: on a CPU that costs nothing, and little is padded."""
    return device.type == "cpu"


class Run:
    """Memory, graphs and counters of runs of one `Plan`, one at a time.

        run.start(...)
        while run.running():
            run.step()
        output = run.finish()

    Attributes:
        tokens: int, packed positions of the last step, padding included.
    """

    # outside of inference mode, so that the next run may be outside of it
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, decoder, plan):
        device, shape = decoder.weight.device, (plan.batch, plan.capacity)
        self.decoder, self.plan, self.sampler = decoder, plan, plan.sampler
        self.schedule = Schedule(
            steps=plan.steps,
            gen_length=plan.gen_length,
            block_length=plan.block_length,
            time_steps=decoder.family.time_steps,
            eps=plan.eps,
            device=device,
        )
        self.copies = 2 if plan.cfg_scale else 1  # rows of the model's batch per sequence
        self.forward = Forward(decoder, plan.capacity, plan.impl)
        x = torch.zeros(shape, dtype=torch.int64, device=device)
        self.state = State(
            x,
            mask_id=plan.mask_id,
            real=torch.ones(shape, dtype=torch.bool, device=device),
            first_generated=torch.zeros(plan.batch, 1, dtype=torch.int64, device=device),
            block_length=plan.block_length,
            shifted=decoder.family.shifted,
        )
        self.rows = torch.arange(plan.batch, device=device)[:, None]
        self.positions, self.keys = self._of_copies(torch.zeros_like(x)), torch.zeros_like(x)
        self.active, self.candidates = torch.zeros_like(self.state.real), torch.zeros_like(self.state.real)
        self.counts = torch.zeros_like(self.rows)
        self.seed = torch.zeros((), dtype=torch.int64, device=device)
        self.priority = torch.zeros(shape, dtype=torch.float64, device=device) if self.sampler.ordered else None
        self.eos_ids = torch.tensor(plan.eos_ids, device=device) if plan.eos_ids else None
        leftpad = torch.zeros(plan.batch * self.copies, dtype=torch.int32, device=device)
        self.cache = decoder.new_cache(plan.batch * self.copies, plan.capacity, leftpad)
        # active positions, the most of one row, candidates, rows with masks
        self.sizes = torch.zeros(4, dtype=torch.int64, device=device)
        # recomputed positions, all positions, positions beyond what the policy promised
        self.totals = torch.zeros(3, dtype=torch.int64, device=device)
        # of a policy without max_active nothing is known: it may read from the device, or change
        known = type(plan.policy).max_active is not Policy.max_active
        recorded = plan.cuda_graphs and self.forward.can_be_recorded and known
        self.graphs = StepGraphs(device) if recorded and (plan.has_forecasts or not self.sampler.ordered) else None

    @torch.no_grad()
    def start(self, model, x, real, *, lengths, forecasts, first_generated, seed, order):
        """Begins with a batch.

        Args:
            x, real: (batch, seqlen) int64 and bool, seqlen up to the capacity: the sequences, and what is not padding.
            lengths: list of ints, what is not padding in each row.
            forecasts: a list of `Forecast`, where the plan has them; else None.
            first_generated: int, the column.
            seed: int; order: as in `dkv.generate`.
        """
        self.model, self.forecasts = weakref.ref(model), forecasts
        self.longest, self.real_positions = max(lengths), sum(lengths)
        self.unused = self.plan.capacity - x.shape[1]
        state, pad = self.state, (self.unused, 0)
        state.start(
            F.pad(x, pad),
            F.pad(real, pad),
            torch.full_like(self.rows, first_generated + self.unused),
        )
        self.positions.copy_(self._of_copies((state.columns - state.first_column).clamp(min=0)))
        self.cache.leftpad.copy_(self._of_copies(state.first_column)[:, 0])
        self.seed.fill_(seed)
        if self.sampler.ordered:
            self.priority.copy_(self.sampler.priority(state, order, self.seed))
        self.most_commits = max(f.commits for f in self.forecasts) if self.forecasts else None
        self.steps, self.tokens, self.sizes_read = 0, 0, None
        self.totals.zero_()
        self.began = (self.graphs.captured, self.graphs.capture_seconds) if self.graphs else (0, 0.0)
        self._decide()

    def running(self):
        """Whether a step is left to do."""
        return self.steps < len(self.forecasts) if self.forecasts else self._read_sizes()[3] > 0

    @torch.no_grad()
    def step(self):
        """Predicts, commits, and decides what the next step does; in the model's dtype, under autocast too."""
        sizes = self._step_sizes()
        with torch.autocast(self.sizes.device.type, enabled=False):
            if self.graphs is not None and sizes[0] * self.copies <= LARGEST_GRAPH:
                self.graphs.run(sizes, lambda: self._step(*sizes))
            else:
                self._step(*sizes)
        self.sizes_read = None
        self.steps += 1
        self.tokens = sizes[0] * self.copies

    def finish(self):
        """The `GenerateOutput`; the memory is kept for the next run of the model."""
        recomputed, positions, excess = self.totals.tolist()
        if excess > 0:
            raise RuntimeError(
                f"{self.plan.policy!r}.max_active promised fewer positions than were active: {excess} were left out. "
                "It must be an upper bound, predictors included."
            )
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
        model = self.model()
        if model is not None:
            _IDLE[model] = self
        return GenerateOutput(self.trimmed(self.state.x), stats)

    def trimmed(self, tensor):
        """A copy of a (batch, capacity) tensor without the columns that this batch does not use."""
        return tensor[:, self.unused :].clone()

    def _read_sizes(self):
        if self.sizes_read is None:
            self.sizes_read = self.sizes.tolist()
        return self.sizes_read

    def _step_sizes(self):
        """(positions, positions of one row, candidates) that the step makes room for."""
        plan, shifted = self.plan, self.state.shifted
        if reads_sizes(self.sizes.device):
            total, most, candidates, _ = self._read_sizes()
            return fast_rows(total), most + shifted, fast_rows(candidates)
        forecast = self.forecasts[self.steps] if self.forecasts else None
        most = plan.policy.max_active(forecast) if forecast else None
        if most is None:
            total, most, candidates, _ = self._read_sizes()
            return bucket(total), bucket(most + shifted), bucket(candidates)
        most = min(most, self.longest) if forecast.step else self.longest
        if plan.batch * most * self.copies > LARGEST_GRAPH:
            candidates = forecast.commits if self.sampler.ordered else forecast.block_masks
            return min(plan.batch * most, self.real_positions), most + shifted, plan.batch * candidates
        # the same room for all numbers of candidates, or there would be more graphs
        candidates = bucket(min(self.plan.block_length, plan.gen_length))
        most = bucket(most)
        return plan.batch * most, most + shifted, plan.batch * min(candidates, most)

    def _step(self, positions, positions_of_a_row, candidates):
        state = self.state
        hidden, packed = self._hidden(positions, positions_of_a_row, candidates)
        keys = self.keys.flatten()[packed.slots.clamp(min=0)] if self.sampler.noisy else None
        tokens, scores = self.sampler.predict(self.decoder, hidden, keys, self.plan.impl)
        commit_tokens(
            state.x,
            tokens,
            self.sampler.ranking(scores, keys),
            packed.slots,
            packed.cu_seqlens,
            self.counts[:, 0],
            threshold=self.sampler.threshold,
            factor=self.sampler.factor,
            impl=self.plan.impl,
        )
        if self.eos_ids is not None:
            self._end_rows()
        state.advance(state.x)
        self._decide()

    def _hidden(self, positions, positions_of_a_row, candidates):
        """The final hidden states (candidates, hidden_size) that predict the candidates, and those as `Packed`."""
        state, plan, copies = self.state, self.plan, self.copies
        ids, active = state.x, self._of_copies(self.active)
        if copies > 1:
            # the unconditional rows see masks in place of the prompt, which count as prompt all the same
            ids = torch.cat((ids, torch.where(state.prompt & state.real, state.mask_id, ids)))
        packed = self._packed(active, positions * copies, positions_of_a_row)
        wanted = self._packed(self._of_copies(self.candidates), candidates * copies, positions_of_a_row)
        places = output_places(active, wanted.slots, state, positions * copies)
        hidden = self.forward(ids, self.positions, packed, self.cache, (wanted, places))
        if copies == 1:
            return hidden, wanted
        # the unconditional rows begin where the conditional ones end
        cond, behind = hidden[:candidates], wanted.cu_seqlens[plan.batch]
        uncond = hidden[(torch.arange(candidates, device=hidden.device) + behind).clamp(max=2 * candidates - 1)]
        guided = (plan.cfg_scale + 1) * cond.float() - plan.cfg_scale * uncond.float()
        return guided.to(cond.dtype), self._packed(self.candidates, candidates, positions_of_a_row)

    def _of_copies(self, tensor):
        """(batch, ...) for each of the model's rows: with guidance once more, for the unconditional ones."""
        return tensor if self.copies == 1 else torch.cat((tensor, tensor))

    def _packed(self, flags, capacity, most):
        slots, cu_seqlens = pack_positions(flags, capacity, impl=self.plan.impl)
        excess = self.totals[2]
        torch.maximum(excess, cu_seqlens[-1] - capacity, out=excess)
        return Packed(slots, cu_seqlens, most)

    def _decide(self):
        """Writes down what the next step recomputes and commits."""
        state = self.state
        self.candidates.copy_(state.in_block)
        if not self.sampler.by_probability:
            self.counts.copy_(self.schedule.counts(state))
        if self.sampler.ordered:
            self._decide_order()
            self.candidates.copy_(state.to_decode)
            self.counts.fill_(self.plan.capacity)
        self.active.copy_(active_positions(self.plan.policy, state, self.candidates))
        if self.sampler.noisy:
            self.keys.copy_(noise_key(self.seed, self.rows, state.step, self.positions[: self.plan.batch]))
        per_row = self.active.sum(1)
        total = per_row.sum()
        self.sizes.copy_(torch.stack((total, per_row.max(), self.candidates.sum(), state.running.sum())))
        self.totals[0].add_(total)
        self.totals[1].add_((state.real & state.running).sum())

    def _decide_order(self):
        """Writes down in the state what the next step decodes."""
        state = self.state
        priority = self.priority.masked_fill(~state.in_block, float("-inf"))
        ranks = descending_ranks(priority)
        if self.sampler.remasking == "origin":
            state.to_decode = state.in_block & (priority >= self.schedule.remaining_after(state))
        else:
            state.to_decode = state.in_block & (ranks < self.counts)
        ranks = torch.where(state.to_decode, ranks, ranks.shape[1])
        most = int(state.to_decode.sum(1).max()) if self.most_commits is None else self.most_commits
        ranks, columns = ranks.sort(dim=1)
        state.to_decode_columns = torch.where(ranks < ranks.shape[1], columns, -1)[:, :most]

    def _end_rows(self):
        """Fills with padding the masks behind an end of text that has no mask before it."""
        state = self.state
        masked = (state.x == state.mask_id) & state.real
        ends = torch.isin(state.x, self.eos_ids) & (state.columns >= state.first_generated)
        no_mask_before = masked.int().cumsum(1) == 0
        ended = (ends & no_mask_before).any(1, keepdim=True)
        state.x.masked_fill_(masked & ended, self.plan.pad_id)


def capacity_for(seqlen):
    return -(-seqlen // CAPACITY_UNIT) * CAPACITY_UNIT
