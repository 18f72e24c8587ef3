"""`Session`: the cache and the state of one sequence (or batch of them) that a foreign loop decodes."""

from typing import NamedTuple

import torch
from torch import Tensor

from dkv.active import rule_of, write_active
from dkv.cuda_graphs import StepGraphs
from dkv.first_call import FirstCall
from dkv.guard import UNKNOWN, Fingerprint, version_of
from dkv.inputs import eos_ids_of
from dkv.kernels import checks, cpu, reference
from dkv.kernels.rows import Size
from dkv.model_runner import ModelRunner
from dkv.models.view import ModelView
from dkv.policy import Policy
from dkv.rooms import Room, Rooms
from dkv.state import State


class Trace(NamedTuple):
    """What a session knows of its sequence.

    Attributes:
        x: (batch, seqlen) int64, the last input.
        first_generated: () int64, the column that blocks are counted from.
    """

    x: Tensor
    first_generated: Tensor


class Match(NamedTuple):
    """What the device says about a session and a call.

    Attributes:
        unseen_before: masks of the session's last input that are 0 now, although their logits were not computed.
        left_before: masks that the last input has now; 1 if it cannot tell.
        same: whether the call is the session's next step. The following are about the call.
        decoded: masks that became tokens.
        left: masks that are left of those to generate.
        unseen: masks that became 0, although their logits were not computed.
        outside: tokens behind the current block of their row, which still has masks.
    """

    unseen_before: int
    left_before: int
    same: int = 0
    decoded: int = 0
    left: int = 0
    unseen: int = 0
    outside: int = 0

    def is_next_step(self, is_last: bool) -> bool:
        """Whether the call is the session's next step, or a mistake of its loop; is_last: it was used last."""
        return bool(self.same and (is_last or self.unseen >= self.outside))


class Session:
    """The cache and the state of one sequence or batch of a foreign loop; another of the same shape reuses the memory.

    Attributes:
        longest, masking: as in `FirstCall`; the next session needs no more positions, and the same kind of mask.
        mask, given_positions: the first call's arguments; later steps must have the same.
        fingerprint: of the model, which must not change either.
        last_input, version: the tensor that the last call was given, and its version then. If the loop updates it in
            place, it shows what the loop made of the answer. None: it is used for another sequence by now.
        has_masked_prompt: () bool, whether it is another sequence with its prompt masked, as guidance has it.
        stays_in_block: whether the policy leaves out masks behind the current block.
        is_over: whether the last call probably was the last step: no masks are left, or as few as a step decodes.
        active, positions, sizes: as in `dkv.run.Run`.
        count, longest_row: ints, the active positions of all rows, and an upper bound for one row.
        computable: int, the positions of rows with masks, without padding; at the first call those of all rows.
        home: the CUDA stream that allocated the memory; None on a CPU.
        stream, done: the CUDA stream of the last call, and an event behind it; None on a CPU.
    """

    # inference tensors cannot be updated later outside inference mode, so allocate normal ones
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self, view: ModelView, first_call: FirstCall, policy: Policy, block_length: int | None, impl: checks.Impl
    ) -> None:
        x, masking = first_call.x, first_call.masking
        self.view, self.policy, self.masking = view, policy, masking
        self.runner, self.longest = ModelRunner(view, first_call.longest, impl), first_call.longest
        self.block_length = block_length or x.shape[1]
        end_ids = [*eos_ids_of(None, view), view.pad_token_id]
        # argmax of NaN logits gives token 0; where that ends a text or is padding, it says nothing
        self.zero_is_end, self.end_ids = 0 in end_ids, torch.tensor(end_ids, device=x.device)
        self.state = State(
            *x.shape,
            mask_id=view.mask_id,
            shifted=view.family.shifted,
            ops=self.runner.ops,
            device=x.device,
            prompt_masks_wait=False,
        )
        leftpad = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device) if masking == "left" else None
        key_mask = torch.empty_like(first_call.valid) if masking == "columns" else None
        self.cache = view.new_cache(*x.shape, leftpad=leftpad, key_mask=key_mask)
        self.active, self.positions = torch.empty_like(first_call.valid), torch.empty_like(x)
        self.sizes = torch.zeros(len(x), len(Size), dtype=torch.int32, device=x.device)
        self.rooms = Rooms(len(x), Room(x.numel(), x.shape[1], 0))
        self.graphs = StepGraphs(x.device) if self.runner.can_be_recorded else None
        self.done = torch.cuda.Event() if x.is_cuda else None
        self.home = torch.cuda.current_stream(x.device) if x.is_cuda else None
        self.stream = None
        self.shows_nothing = torch.tensor([0, 1], device=x.device)
        rule = rule_of(policy, view.family.shifted)
        self.stays_in_block = rule is not None and rule.until_block_end

    def settle(self) -> None:
        """Waits for the last call if several streams take part, so that the memory may be used here, or freed."""
        last = self.stream
        if last is not None and not self.home == last == torch.cuda.current_stream(last.device):
            self.done.synchronize()

    def can_serve(self, view: ModelView, first_call: FirstCall) -> bool:
        """Whether a new session can use this one's memory and recorded graphs."""
        same_kind = (self.state.x.shape, self.masking) == (first_call.x.shape, first_call.masking)
        return same_kind and self.longest >= first_call.longest and self.runner.is_current(view)

    def start(self, first_call: FirstCall, fingerprint: Fingerprint, traces: list[Trace]) -> None:
        """Begins anew with a full step: everything valid is active. traces: of other sessions."""
        self.fingerprint, self.is_over = fingerprint, False
        self.last_input, self.version = first_call.x, version_of(first_call.x)
        self.mask, self.given_positions = first_call.mask, first_call.given_positions
        # the latest of the rows' first masks: other rows may have masks inside their prompts or, like the unconditional
        # rows of guidance, in place of them
        masked = (first_call.x == self.view.mask_id) & first_call.valid
        first_generated = masked.int().argmax(1).amax()
        self.has_masked_prompt = torch.zeros((), dtype=torch.bool, device=first_call.x.device)
        for trace in traces if self.block_length < first_call.x.shape[1] else ():
            if (trace.x.shape, trace.x.device) == (first_call.x.shape, first_call.x.device):
                first_generated = self._start_of_blocks(first_call, masked, first_generated, trace)
        self.state.start(
            first_call.x,
            first_call.valid,
            first_generated=first_generated,
            block_length=self.block_length,
            gen_length=first_call.x.shape[1] - first_generated,
        )
        self._decide()
        self.positions.copy_(first_call.positions)
        if self.cache.leftpad is not None:
            self.cache.leftpad.copy_(self.state.first_column[:, 0])
        if self.cache.key_mask is not None:
            self.cache.key_mask.copy_(first_call.valid)
        # even in finished rows, which a policy would leave out
        self.active.copy_(first_call.valid)
        self.sizes[:, Size.ACTIVE] = first_call.valid.sum(1)
        self.count, self.longest_row = first_call.valid_count, first_call.x.shape[1]
        self.computable = first_call.valid_count

    def _start_of_blocks(self, first_call, masked, first_generated, trace):
        """The trace's if the prompt is the trace's, or masks in its place as in guidance; otherwise first_generated."""
        equal, in_prompt = (first_call.x == trace.x) | ~first_call.valid, self.state.columns < trace.first_generated
        has_prompt = (first_call.valid & in_prompt).any()
        has_same_prompt = (equal | ~in_prompt).all() & has_prompt
        has_masked_prompt = (equal | (masked & in_prompt)).all() & ~has_same_prompt & has_prompt
        self.has_masked_prompt = self.has_masked_prompt | has_masked_prompt
        return torch.where(has_same_prompt | has_masked_prompt, trace.first_generated, first_generated)

    def trace(self) -> Trace:
        return Trace(self.state.x.clone(), self.state.first_generated.amax())

    def compare(self, x: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """The fields of `Match`, int64 on the device; the first two if shapes tell that it is another sequence."""
        state, looked_back = self.state, self.look_back(x)
        if x.shape != state.x.shape:
            return looked_back
        same = ((x == state.x) | state.masked).all() & (x == state.mask_id).any()
        if self.view.honours_attention_mask:
            same = _and_equal(same, mask, self.mask)
        same = _and_equal(same, positions, self.given_positions)
        if same is None:
            return looked_back
        committed, in_prompt = state.masked & (x != state.mask_id), state.columns < state.first_generated
        left, outside = state.masked & ~committed & ~in_prompt, torch.zeros_like(state.x[0, 0])
        if self.stays_in_block:
            # an end of text may be put anywhere, and what is behind one may be filled with anything
            is_end = torch.isin(x, self.end_ids) & ~in_prompt
            behind = committed & (state.columns >= state.block_end) & (is_end.cumsum(1) == 0)
            in_block = (state.columns >= state.block_start) & (state.columns < state.block_end)
            # without a prompt it may be the unconditional part of guidance, and the start of its blocks is unknown
            has_prompt = state.first_generated > state.first_column
            is_unfinished = (left & in_block).any(1, keepdim=True) & has_prompt
            outside = (behind & is_unfinished).sum()
            # tokens behind a finished block, unless they are zeros, which may be answers of NaN
            is_other = (behind & (x != 0)).any(1, keepdim=True) & ~is_unfinished
            # tokens in place of a prompt that guidance has masked
            is_other = is_other | (committed & in_prompt & self.has_masked_prompt)
            same = same & ~is_other.any()
        flags = torch.stack((same, committed.sum(), left.sum(), self._unseen(x), outside))
        return torch.cat((looked_back, flags))

    def look_back(self, x: Tensor | None = None) -> Tensor:
        """The first two fields of `Match`, int64 on the device; x: the input of the next call, if there is one."""
        last, state = self.last_input, self.state
        if last is None or last is x or last.shape != state.x.shape or self.version == version_of(last) != UNKNOWN:
            return self.shows_nothing
        same = ((last == state.x) | state.masked).all()
        return torch.stack((self._unseen(last) * same, (last == state.mask_id).sum()))

    def _unseen(self, x):
        """The number of masks that became token 0 in x, although their logits were not computed."""
        state = self.state
        if self.zero_is_end:
            return torch.zeros_like(state.x[0, 0])
        # other tokens may come from elsewhere
        zeros = state.masked & (x == 0) & (x != state.mask_id)
        return (reference.predictors(zeros, state.first_column, shifted=state.shifted) & ~self.active).sum()

    def step(self, x: Tensor) -> None:
        """Takes x as the next step. Reads its sizes from the device."""
        state = self.state
        self.last_input, self.version = x, version_of(x)
        state.x.copy_(x)
        self._decide()
        computable = (state.valid & state.running).sum()[None]
        self.computable, *rows = torch.cat((computable, self.sizes[:, Size.ACTIVE])).tolist()
        self.count, self.longest_row = sum(rows), max(rows)

    def _decide(self):
        self.state.advance()
        write_active(self.policy, self.state, self.active, self.sizes)

    def logits(self) -> Tensor:
        """(batch, seqlen, vocab): logits of the recomputed positions, NaN elsewhere."""
        state, view = self.state, self.view
        room = Room(cpu.padded_rows(self.count) if state.x.device.type == "cpu" else self.count, self.longest_row, 0)
        if self.graphs is not None and self.rooms.records(room):
            room = self.rooms.of(room)
            hidden, slots = self.graphs.run(room, lambda: self._hidden(room))
        else:
            hidden, slots = self._hidden(room)
        values = view.logits(hidden[: self.count])
        if self.count < state.x.numel():
            logits = values.new_full((state.x.numel(), values.shape[-1]), float("nan"))
            values = logits.index_copy_(0, slots[: self.count], values)
        if self.done is not None:
            self.stream = torch.cuda.current_stream(state.x.device)
            self.done.record(self.stream)
        return values.reshape(*state.x.shape, -1)

    def _hidden(self, room):
        state = self.state
        packed, _ = self.runner.ops.pack_step(
            self.active,
            state.candidates,
            self.sizes,
            state.x,
            self.positions,
            state.counters,
            capacity=room.positions,
            candidate_capacity=0,
            per_row=room.per_row,
            shifted=state.shifted,
        )
        return self.runner(packed, self.cache, room.per_row), packed.slots


def _and_equal(flag, new, old):
    """flag & (new == old) on the device; None if their shapes, dtypes or devices already differ."""
    if new is None or old is None:
        return flag if new is None and old is None else None
    if flag is None or (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
        return None
    return flag & (new == old).all()
