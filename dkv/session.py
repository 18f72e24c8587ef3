"""`Sessions`: the caches of a patched model, one for each sequence that a foreign loop decodes.

A call `model(x)` is the next step of a `Session` if nothing changed but masks that became tokens. To find it each
session takes the call as its next step; one read from the device shows whose step it is, and the others take it back.
"""

import threading
from collections import Counter as Tally
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dkv.active import write_active
from dkv.cuda_graphs import StepGraphs
from dkv.first_call import FirstCall
from dkv.guard import UNKNOWN, Fingerprint, version_of
from dkv.inputs import eos_ids_of
from dkv.kernels import checks, cpu, reference
from dkv.kernels.rows import Size
from dkv.memory import free_memory, memory_of, setting_up
from dkv.model_runner import ModelRunner
from dkv.models.view import ModelView
from dkv.policy import Policy
from dkv.rooms import Room, Rooms
from dkv.state import State

MAX_SESSIONS = 4


def sessions_of(model: nn.Module) -> "Sessions":
    """The `Sessions` of a patched model."""
    memory = memory_of(model)
    with setting_up():
        if memory.sessions is None:
            memory.sessions = Sessions()
        return memory.sessions


class Sessions:
    """At most `MAX_SESSIONS` sessions, for loops that call a model for several sequences in turn; and what calls did.

    A session is taken out while it serves a call: no other thread gets it, nor the next call if this one fails.

    Attributes:
        kept: a list of sessions; the one that was used last is at the end.
        fingerprint: of the model when the first of them began; None without sessions.
        tally: the calls by "full" and "cached", and sums over them: "recomputed" of all "positions", "seconds".
        original: reason -> number of calls that ran the model's own forward for it.
    """

    def __init__(self) -> None:
        self.kept: list[Session] = []
        self.fingerprint: Fingerprint | None = None
        self.tally: Tally[str] = Tally()
        self.original: Tally[str] = Tally()
        self._lock = threading.RLock()

    def next_step(self, x: Tensor, mask: Tensor | None, positions: Tensor | None) -> "Session | None":
        """Takes out the session whose next step this call is; None: it begins a new one. Reads once from the device.

        Raises:
            RuntimeError: the loop has taken tokens that it must not take, see `Proposal`.
        """
        with self._lock:
            if self.fingerprint is not None and not self.fingerprint.unchanged():
                self.end()
            if not self.kept or self.kept[0].state.x.device != x.device:
                return None
            # none of them goes on if this fails in between
            kept, self.kept = self.kept, []
            for session in kept:
                session.settle()
            found = [session.propose(x, mask, positions) for session in kept]
            numbers = iter(torch.cat(found).tolist())
            proposals = [Proposal.of([next(numbers) for _ in range(len(each))]) for each in found]
            matching = [index for index, each in enumerate(proposals) if each.same]
            # the one with fewest masks has come closest
            best = min(matching, key=lambda index: proposals[index].decoded, default=None)
            for index, (session, proposal) in enumerate(zip(kept, proposals, strict=True)):
                if index != best:
                    session.withdraw()
                    session.is_over = session.is_over or not proposal.masks
                    if not proposal.unseen_before:
                        self.kept.append(session)
            _check_unseen(sum(proposal.unseen_before for proposal in proposals))
            if best is None:
                return None
            session, proposal = kept[best], proposals[best]
            _check_unseen(proposal.unseen)
            if proposal.outside:
                raise RuntimeError(
                    f"the loop put {proposal.outside} tokens behind a block that still has masks: the block_length of "
                    f"replace_attention, {session.block_length}, must be the loop's."
                )
            session.accept(x, proposal)
            return session

    def room_for(self, view: ModelView, first_call: FirstCall) -> "Session | None":
        """Makes room for a new session, and takes out one whose memory it can use, or None.

        Sessions that are over go, and the oldest ones while all caches take more than a quarter of the free memory.
        """
        with self._lock:
            dropped = [session for session in self.kept if session.is_over]
            kept = [session for session in self.kept if not session.is_over]
            if len(kept) == MAX_SESSIONS:
                dropped.append(kept.pop(0))
            needed = view.cache_bytes(*first_call.x.shape)
            while kept:
                held = sum(session.cache.nbytes for session in kept)
                free = free_memory(first_call.x.device) + sum(session.cache.nbytes for session in dropped)
                if 4 * (held + needed) <= free + held:
                    break
                dropped.append(kept.pop(0))
            self.kept = kept
            for session in dropped:
                session.settle()
            return next((session for session in dropped if session.can_serve(view, first_call)), None)

    def fingerprint_of(self, model: nn.Module) -> Fingerprint:
        """The fingerprint that all sessions share; made for the first one, after its weights were merged."""
        with self._lock:
            if self.fingerprint is None:
                self.fingerprint = Fingerprint(list(model.modules()), values=True)
            return self.fingerprint

    def put(self, session: "Session") -> None:
        """Keeps a session that has served a call, unless all sessions were ended meanwhile."""
        kind = "full" if session.count == session.valid_count else "cached"
        with self._lock:
            self.tally.update({kind: 1, "recomputed": session.count, "positions": session.valid_count})
            if session.fingerprint is self.fingerprint:
                self.kept = [*self.kept, session][-MAX_SESSIONS:]

    def count(self, seconds: float, reason: str | None = None) -> int:
        """Adds up the time of a call and, if it ran the model's own forward, its reason; how often that was so."""
        with self._lock:
            self.tally["seconds"] += seconds
            self.original.update([reason] if reason else [])
            return self.original[reason]

    def check(self) -> None:
        """Raises RuntimeError if a loop has taken tokens from NaN logits, as far as its last inputs show; told once."""
        with self._lock:
            for session in self.kept:
                session.settle()
            unseen = [int(session.look_back()[0]) for session in self.kept]
            self.kept = [session for session, number in zip(self.kept, unseen, strict=True) if not number]
        _check_unseen(sum(unseen))

    def end(self) -> None:
        """Ends all sessions; raises as `check`."""
        with self._lock:
            try:
                self.check()
            finally:
                self.kept, self.fingerprint = [], None


def _check_unseen(number):
    if number:
        raise RuntimeError(
            f"the loop put token 0 in place of {number} masks whose logits were not computed, and are NaN: its "
            "block_length must be the one that replace_attention was given, and it must take tokens of the current "
            "block only."
        )


class Proposal(NamedTuple):
    """What the device says about a session and a call.

    Attributes:
        unseen_before: masks of the session's last input that are 0 now, although their logits were not computed.
        masks: the masks that are left in the last input.
        same: whether the call is the session's next step. The following are about the call.
        decoded: masks that became tokens.
        left: masks that are left of those to generate.
        unseen: masks that became 0, although their logits were not computed.
        outside: tokens behind the current block of their row, which still has masks.
        active: a list of ints, the active positions of each row.
    """

    unseen_before: int
    masks: int
    same: int = 0
    decoded: int = 0
    left: int = 0
    unseen: int = 0
    outside: int = 0
    active: list[int] = []

    @classmethod
    def of(cls, numbers: list[int]) -> "Proposal":
        return cls(*numbers[:7], *([numbers[7:]] if len(numbers) > 7 else ()))


class Session:
    """The cache and the state of one sequence or batch of a foreign loop; another of the same shape reuses the memory.

    Attributes:
        longest, masking: as in `FirstCall`; the next session needs no more positions, and the same kind of mask.
        mask, given_positions: the first call's arguments; later steps must have the same.
        fingerprint: of the model, which must not change either.
        last_input, version: the tensor that the last call was given, and its version then. If the loop updates it in
            place, it shows what the loop made of the answer.
        is_over: whether the last call probably was the last step: no masks are left, or as few as a step decodes.
        active, positions, sizes: as in `dkv.run.Run`.
        count, longest_row: ints, the active positions of all rows, and an upper bound for one row.
        valid_count: int, the positions of all rows that are not padding.
        home: the CUDA stream that allocated the memory; None on a CPU.
        stream, done: the CUDA stream of the last work on it, and an event behind that; None on a CPU.
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
        self.end_ids = torch.tensor([*eos_ids_of(None, view), view.pad_token_id], device=x.device)
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
        self.stream = self._before = None
        self.unchanged = torch.tensor([0, 1], device=x.device)  # look_back of an input that shows nothing

    def _mark(self):
        """Notes what `settle` waits for."""
        if self.done is not None:
            self.stream = torch.cuda.current_stream(self.state.x.device)
            self.done.record(self.stream)

    def settle(self) -> None:
        """Waits for the last work if several streams take part, so that the memory may be used here, or freed."""
        last = self.stream
        if last is not None and not self.home == last == torch.cuda.current_stream(last.device):
            self.done.synchronize()

    def can_serve(self, view: ModelView, first_call: FirstCall) -> bool:
        """Whether a new session can use this one's memory and recorded graphs."""
        same_kind = (self.state.x.shape, self.masking) == (first_call.x.shape, first_call.masking)
        return same_kind and self.longest >= first_call.longest and self.runner.is_current(view)

    def start(self, first_call: FirstCall, fingerprint: Fingerprint, others: "list[Session]") -> None:
        """Begins anew with a full step: everything valid is active. others: the sessions that are kept."""
        self.fingerprint, self.is_over = fingerprint, False
        self.last_input, self.version = first_call.x, version_of(first_call.x)
        self.mask, self.given_positions = first_call.mask, first_call.given_positions
        # the latest of the rows' first masks: other rows may have masks inside their prompts or, like the unconditional
        # rows of guidance, in place of them
        masked = (first_call.x == self.view.mask_id) & first_call.valid
        first_generated = masked.int().argmax(1).amax()
        has_prompt = (first_call.valid & ~masked & (self.state.columns < first_generated)).any()
        for state in (other.state for other in others if other.state.x.shape == first_call.x.shape):
            # another session's sequence with its prompt masked, as for guidance: the blocks are that session's
            is_blanked = ~has_prompt & ((first_call.x == state.x) | masked | ~first_call.valid).all()
            first_generated = torch.where(is_blanked, state.first_generated.amax(), first_generated)
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
        self.valid_count = first_call.valid_count

    def propose(self, x: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """Takes the call as the next step, unless its shapes already tell that it is not; `withdraw` takes that back.

        Returns:
            The fields of `Proposal`, int64 on the device; the first two alone if the call is not taken.
        """
        state, self._before = self.state, None
        looked_back = self.look_back(x)
        if x.shape != state.x.shape:
            return looked_back
        same = ((x == state.x) | state.masked).all() & (x == state.mask_id).any()
        if self.view.honours_attention_mask:
            same = _and_equal(same, mask, self.mask)
        same = _and_equal(same, positions, self.given_positions)
        if same is None:
            return looked_back
        outside = torch.zeros_like(state.x[0, 0])
        if self.block_length < x.shape[1]:
            # an end of text or padding may be put anywhere behind a text that has ended
            is_end = torch.isin(x, self.end_ids)
            behind = state.masked & (x != state.mask_id) & (state.columns >= state.block_end) & ~is_end
            in_block = state.candidates & (x == state.mask_id) & (state.columns >= state.block_start)
            # without a prompt it may be the unconditional part of guidance, whose blocks begin nobody knows where
            unfinished = in_block.any(1, keepdim=True) & (state.first_generated > state.first_column)
            outside = (behind & unfinished).sum()
            if self.policy.needs_blocks:
                # another sequence, some blocks ahead of this one, unless all that is token 0 of NaN logits
                same = same & ~((behind & (x != 0)).any(1, keepdim=True) & ~unfinished).any()
        left = (state.masked & (x == state.mask_id) & (state.columns >= state.first_generated)).sum()
        flags = torch.stack((same, (x != state.x).sum(), left, self._unseen(x), outside))
        self._before = [tensor.clone() for tensor in self._changing]
        state.x.copy_(x)
        self._decide()
        return torch.cat((looked_back, flags, self.sizes[:, Size.ACTIVE]))

    def look_back(self, x: Tensor | None = None) -> Tensor:
        """The first two fields of `Proposal`, int64 on the device; x: the input of the next call, if there is one."""
        last, state = self.last_input, self.state
        if last is x or last.shape != state.x.shape or self.version == version_of(last) != UNKNOWN:
            return self.unchanged
        same = ((last == state.x) | state.masked).all()
        return torch.stack((self._unseen(last) * same, (last == state.mask_id).sum()))

    def _unseen(self, x):
        """The number of tokens that were taken from logits that were not computed."""
        # argmax of NaN logits gives token 0; other tokens may come from elsewhere, such as padding after an end of text
        state = self.state
        zeros = state.masked & (x == 0) & (x != state.mask_id)
        return (reference.predictors(zeros, state.first_column, shifted=state.shifted) & ~self.active).sum()

    @property
    def _changing(self):
        """The tensors that a step changes."""
        state = self.state
        return state.x, state.decoded_step, state.candidates, state.counters, self.active, self.sizes

    def withdraw(self) -> None:
        """The call is another session's step, or the first of a new one."""
        if self._before is not None:
            for tensor, before in zip(self._changing, self._before, strict=True):
                tensor.copy_(before)
            self._mark()

    def accept(self, x: Tensor, proposal: "Proposal") -> None:
        """The call is the next step."""
        self.last_input, self.version = x, version_of(x)
        self.is_over = proposal.left <= proposal.decoded
        self._before = None
        self.count, self.longest_row = sum(proposal.active), max(proposal.active)

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
        self._mark()
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
