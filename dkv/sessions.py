"""`Sessions`: the caches of a patched model, one for each sequence (or batch of them) that a foreign loop decodes.

A call `model(x)` is the next step of a `Session` if nothing changed but masks that became tokens. `Sessions.next_step`
compares it with all sessions and reads once from the device whose step it is; `Session.step` takes it, and reads sizes.
"""

import threading
from collections import Counter, deque
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dkv.first_call import FirstCall
from dkv.guard import Fingerprint
from dkv.kernels import checks
from dkv.memory import free_memory, memory_of, setting_up
from dkv.models.view import ModelView
from dkv.policy import Policy
from dkv.session import Match, Session, Trace

MAX_SESSIONS = 4
MAX_TRACES = 16


@dataclass
class PatchStats:
    """What the calls of a patched model did, since `replace_attention`.

    Attributes:
        calls: all of them; each is one of the following.
        full: calls that recomputed every position, such as the first one of each sequence.
        cached: calls that read positions from the cache.
        original: reason -> number of calls that ran the model's own forward for it, without a cache.
        cache_ratio: the mean share of positions, over the full and cached calls, that were read from the cache.
        seconds: the host's time in all calls. On a GPU a call ends before its work; the next one waits for that.
    """

    full: int = 0
    cached: int = 0
    original: dict[str, int] = field(default_factory=dict)
    cache_ratio: float = 0.0
    seconds: float = field(default=0.0, compare=False)

    @property
    def calls(self) -> int:
        return self.full + self.cached + sum(self.original.values())


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
        past: the `Trace` of sessions that are gone although their sequences may go on.
        fingerprint: of the model when the first of them began; None if none has begun since all were ended.
    """

    def __init__(self) -> None:
        self.kept: list[Session] = []
        self.past: deque[Trace] = deque(maxlen=MAX_TRACES)
        self.fingerprint: Fingerprint | None = None
        self._lock = threading.RLock()
        self._full = self._cached = self._recomputed = self._positions = 0
        self._original: Counter[str] = Counter()
        self._seconds = 0.0

    def next_step(self, x: Tensor, mask: Tensor | None, positions: Tensor | None) -> Session | None:
        """Takes out the session whose next step this call is; None: it begins a new one. Reads once from the device.

        Raises:
            RuntimeError: the loop has taken tokens that it must not take, see `Match`.
        """
        with self._lock:
            if self.fingerprint is not None and not self.fingerprint.unchanged():
                self.end()
            if not self.kept or self.kept[0].state.x.device != x.device:
                return None
            for session in self.kept:
                session.settle()
            found = [session.compare(x, mask, positions) for session in self.kept]
            numbers = torch.cat(found).cpu().split([len(each) for each in found])
            matches = {session: Match(*n.tolist()) for session, n in zip(self.kept, numbers, strict=True)}
            for session, match in matches.items():
                session.is_over = session.is_over or not match.left_before
            # a token behind an unfinished block may also mean that an older session is not this sequence's any more
            same = [session for session in self.kept if matches[session].is_next_step(session is self.kept[-1])]
            # of several, the one with fewest masks has come closest
            session = min(same, key=lambda session: matches[session].decoded, default=None)
            if session is None:
                self._tell([match.unseen_before for match in matches.values()])
                return None
            self.kept.remove(session)
            for other in self.kept:
                if shares_memory(other.last_input, x):  # it shows this sequence from now on
                    other.last_input = None
            match = matches[session]
            _check_unseen(match.unseen)
            if match.outside:
                raise RuntimeError(
                    f"the loop put {match.outside} tokens behind a block that still has masks: the block_length of "
                    f"replace_attention, {session.block_length}, must be the loop's, and the loop's blocks must begin "
                    "at the first mask of the row where that comes last."
                )
            session.is_over = match.left <= match.decoded
            return session

    def begin(
        self,
        model: nn.Module,
        view: ModelView,
        first_call: FirstCall,
        policy: Policy,
        block_length: int | None,
        impl: checks.Impl,
    ) -> Session:
        """A new session, in the memory of one that has ended if that fits."""
        with self._lock:
            session = self._make_room(view, first_call)
            if session is None:
                session = Session(view, first_call, policy, block_length, impl)
            if self.fingerprint is None:  # now that the weights are merged
                self.fingerprint = Fingerprint(list(model.modules()), values=True)
            for other in self.kept:  # another thread may have put it back since this call was compared
                other.settle()
            traces = [*self.past, *(other.trace() for other in self.kept)]
            session.start(first_call, self.fingerprint, traces)
            return session

    def _make_room(self, view, first_call):
        """Drops sessions that are over, and the oldest ones while all caches take more than a quarter of free memory.

        Returns one of those whose memory the new session can use, or None.
        """
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
            if not session.is_over:
                self.past.append(session.trace())
        return next((session for session in dropped if session.can_serve(view, first_call)), None)

    def put(self, session: Session) -> None:
        """Keeps a session that has served a call, unless all sessions were ended meanwhile."""
        with self._lock:
            is_full = session.count == session.computable
            self._full, self._cached = self._full + is_full, self._cached + (not is_full)
            self._recomputed, self._positions = self._recomputed + session.count, self._positions + session.computable
            if session.fingerprint is self.fingerprint:
                self.kept.append(session)
            while len(self.kept) > MAX_SESSIONS:
                self.kept.pop(0).settle()

    def count(self, seconds: float, reason: str | None = None) -> int:
        """Adds the time of a call and, if it ran the model's own forward, its reason; returns how many had that."""
        with self._lock:
            self._seconds += seconds
            if reason is not None:
                self._original[reason] += 1
            return self._original[reason]

    def stats(self) -> PatchStats:
        with self._lock:
            ratio = 1 - self._recomputed / self._positions if self._positions else 0.0
            return PatchStats(self._full, self._cached, dict(self._original), ratio, self._seconds)

    def check(self) -> None:
        """Raises RuntimeError if a loop has taken tokens from NaN logits, as far as its last inputs show; told once."""
        with self._lock:
            for session in self.kept:
                session.settle()
            self._tell([int(session.look_back()[0]) for session in self.kept])

    def _tell(self, unseen):
        """unseen: `Match.unseen_before` of each session."""
        self.kept = [session for session, number in zip(self.kept, unseen, strict=True) if not number]
        _check_unseen(sum(unseen))

    def end(self) -> None:
        """Ends all sessions; raises as `check`. Their sequences may go on in new ones."""
        with self._lock:
            try:
                self.check()
            finally:
                self.past += [session.trace() for session in self.kept if not session.is_over]
                self.kept, self.fingerprint = [], None


def shares_memory(one: Tensor | None, other: Tensor) -> bool:
    """Whether two tensors lie in the same storage."""
    return one is not None and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _check_unseen(number):
    if number:
        raise RuntimeError(
            f"the loop put token 0 in place of {number} masks whose logits were not computed, and are NaN: its "
            "block_length must be the one that replace_attention was given, and it must take tokens of the current "
            "block only."
        )
