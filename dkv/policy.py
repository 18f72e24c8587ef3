"""Policies: which positions are recomputed at a step. All others are read from the cache as they were last computed.

A policy is a function of the `State` before the step; the engine adds the positions whose outputs the step needs, and
takes away padding and finished rows. A policy of your own subclasses `Policy`:

    class EveryOther(dkv.Policy):
        def active(self, state):
            return (state.step % 2 == 0) | state.masked

        def max_active(self, forecast):  # optional: lets a GPU run without waiting for the host, and record its steps
            return forecast.length if forecast.step % 2 == 0 else forecast.masks_before(0) * (1 + forecast.shifted)
"""

import torch


class Policy:
    """Base class. `needs_order`: it must know beforehand what a step decodes; `needs_blocks`: it is about blocks."""

    needs_order = False
    needs_blocks = False

    def active(self, state):
        """(batch, seqlen) bool, or anything that broadcasts to it: the positions to recompute at this step."""
        raise NotImplementedError(f"{type(self).__name__} must define active(state)")

    def max_active(self, forecast):
        """An upper bound, known to the host, of the positions of a row that are active at a step.

        It counts those whose outputs the step needs too. None: the host reads the number at each step. A policy that
        defines it must compute `active` on the device alone (no `if` on a tensor), from the state and its own
        constants: the steps may be recorded once and replayed.

        Args:
            forecast: `dkv.schedule.Forecast`.
        """
        return None

    def check(self, shifted):
        """Raises ValueError where the policy does not fit the family; `shifted`: Dream's outputs, else LLaDA's."""

    def __eq__(self, other):
        # ours are what their settings are; of others nothing is known
        ours = type(self) is type(other) and type(self).__module__ == __name__
        return self is other or (ours and vars(self) == vars(other))

    def __hash__(self):
        return hash(type(self))

    def __repr__(self):
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


class NoCache(Policy):
    """Every step recomputes every position."""

    def active(self, state):
        return torch.ones_like(state.masked)

    def max_active(self, forecast):
        return forecast.length


class Decode(Policy):
    """dKV-Cache-Decode: a decoded token is read from the cache from the second step after its commit on.

    Its K/V are then those of the real token: the step after the commit still recomputes it (the one-step delay). Every
    `refresh_interval` steps of a block, and in its first `warmup_steps`, everything is recomputed. The state restarts
    in every block.

    Args:
        refresh_interval: steps between full steps; 1 is NoCache; None: no refresh within a block.
        delay: how many steps a token is recomputed after its commit; 0 is the paper's ablation.
        warmup_steps: full steps at the start of a block. None: 2 for LLaDA, 1 for Dream, as the authors' code has it.
        shift: Dream only: "un" (position j is stable once j + 1 is decoded), "right" (once j is), "un_right" (once both
            are; None: this one).
        scope: "all" recomputes the masks of later blocks, "block" reads them from the cache.

    Source: Ma et al., dKV-Cache (arXiv 2505.15781).
    """

    def __init__(self, refresh_interval=8, *, delay=1, warmup_steps=None, shift=None, scope="all"):
        self.refresh_interval = _positive("refresh_interval", refresh_interval, optional=True)
        self.delay = _positive("delay", delay, least=0)
        self.warmup_steps = _positive("warmup_steps", warmup_steps, optional=True)
        self.shift = _one_of("shift", shift, (None, "un", "right", "un_right"))
        self.scope = _one_of("scope", scope, ("all", "block"))

    @property
    def needs_blocks(self):
        return self.scope == "block"

    def check(self, shifted):
        if self.shift is not None and not shifted:
            raise ValueError(f"shift is about Dream's shifted outputs; it must be None for LLaDA, got {self.shift!r}.")

    def active(self, state):
        active = ~self.stable(state)
        if self.scope == "block":
            active = active & (state.columns < state.block_end)
        return self.full_step(state) | active

    def full_step(self, state):
        """(batch, 1) bool: whether this step of the row's block is a full one."""
        warmup_steps = self.warmup_steps or (1 if state.shifted else 2)
        full = state.block_step < warmup_steps
        return full if self.refresh_interval is None else full | (state.block_step % self.refresh_interval == 0)

    def max_active(self, forecast):
        return forecast.length if self.full_step(forecast) else self.max_unstable(forecast)

    def max_unstable(self, forecast):
        """The bound of a step that is not a full one."""
        # at the first cached step of a block, the delay is 1 whatever it is later
        unsettled = forecast.masks_before(max(self.delay, 1) if forecast.shifted else self.delay)
        if self.scope == "block":
            behind = forecast.gen_length - (forecast.block + 1) * forecast.block_length
            unsettled -= max(behind, 0)
        if not forecast.shifted:
            return unsettled
        # each of them, and the position before it
        return min(2 * unsettled if self.shift != "un" else unsettled, forecast.gen_length) + 1

    def stable(self, state):
        """(batch, seqlen) bool: the rule of a step that is not a full one."""
        if not state.shifted:
            return state.decoded_before(1 + self.delay)
        # the first cached step of a block knows only what was decoded before the block
        frozen = _following_is_set(state.decoded_before(2), last="same")
        decoded = state.decoded_before(1 + self.delay)
        if self.shift == "right":
            stable = decoded
        elif self.shift == "un":
            stable = _following_is_set(decoded, last=decoded.gather(1, state.first_column))
        else:
            both = decoded[:, :-1] & decoded[:, 1:]
            stable = torch.cat((both, both[:, -1:]), dim=1)
        return torch.where(state.block_step == 1, frozen, stable)


class Greedy(Policy):
    """dKV-Cache-Greedy: recomputes what was just decoded, what is about to be decoded, and a window around it.

    It must know the decoding order: `remasking` "random" (Dream also "origin"), or `order=`.

    Args:
        refresh_interval: steps of a block between full steps; 1 is NoCache.
        window: size of the window; 0: none.
        window_kind: "nearest_masked": for each token about to be decoded, the `window` nearest masks on both sides, as
            the authors' code does; "contiguous": the range centred on each token decoded before, as the paper says.
    """

    needs_order = True

    def __init__(self, refresh_interval=2, window=4, *, window_kind="nearest_masked"):
        self.refresh_interval = _positive("refresh_interval", refresh_interval)
        self.window = _positive("window", window, least=0)
        self.window_kind = _one_of("window_kind", window_kind, ("nearest_masked", "contiguous"))

    def active(self, state):
        just_decoded = state.decoded_step == state.step - 1
        active = just_decoded | state.to_decode
        if self.window and self.window_kind == "contiguous":
            active = active | self._contiguous(just_decoded)
        elif self.window:
            active = self._nearest_masked(state, active)
        return (state.block_step % self.refresh_interval == 0) | active

    def max_active(self, forecast):
        if forecast.block_step % self.refresh_interval == 0:
            return forecast.length
        centres = forecast.last_commits if self.window_kind == "contiguous" else forecast.commits
        predictors = forecast.commits if forecast.shifted else 0
        return forecast.last_commits + forecast.commits + predictors + self.window * centres

    def _contiguous(self, centres):
        window = torch.zeros_like(centres)
        for offset in range(-((self.window + 1) // 2), self.window // 2 + 1):
            window |= _shifted_columns(centres, offset)
        return window

    def _nearest_masked(self, state, active):
        """Scans outward from each token to be decoded, left first at each distance, over masks not yet active."""
        nearest = min(self.window, state.columns.shape[1])
        for n in range(state.to_decode_columns.shape[1]):
            centre = state.to_decode_columns[:, n : n + 1]
            distance = state.columns - centre
            order = 2 * distance.abs() - (distance < 0).long()
            free = state.masked & ~active & (centre >= 0)
            order = order.masked_fill(~free, torch.iinfo(torch.int64).max)
            chosen = order.topk(nearest, dim=1, largest=False).indices
            active = active.scatter(1, chosen, free.gather(1, chosen) | active.gather(1, chosen))
        return active


class Prefill(Policy):
    """dKV-Cache-Prefill: the prompt is computed once and never refreshed; everything else is recomputed."""

    def active(self, state):
        return ~self.frozen(state) | (state.step == 0)

    def max_active(self, forecast):
        return forecast.length if forecast.step == 0 else forecast.gen_length + forecast.shifted

    @staticmethod
    def frozen(state):
        """(batch, seqlen) bool: the prompt; under Dream but for its last token, whose output is needed."""
        return _following_is_set(state.prompt, last="same") if state.shifted else state.prompt


class PrefillDecode(Policy):
    """dKV-Cache-PD: the prompt is never refreshed, the rest follows `Decode`; a refresh leaves the prompt out.

    Args:
        refresh_interval, shift: as in `Decode`.
    """

    def __init__(self, refresh_interval=4, *, shift=None):
        rule = Decode(refresh_interval, shift=shift)
        self.refresh_interval, self.shift = rule.refresh_interval, rule.shift

    def check(self, shifted):
        Decode(self.refresh_interval, shift=self.shift).check(shifted)

    def active(self, state):
        return Prefill().active(state) & Decode(self.refresh_interval, shift=self.shift).active(state)

    def max_active(self, forecast):
        decode = Decode(self.refresh_interval, shift=self.shift)
        return min(Prefill().max_active(forecast), decode.max_active(forecast))


class PrefixCache(Policy):
    """Fast-dLLM's prefix cache: a full step at the start of each block, then the block and everything behind it.

    Source: Wu et al., Fast-dLLM (arXiv 2505.22618).
    """

    needs_blocks = True

    def active(self, state):
        # masks inside the prompt belong to the first block
        in_block_or_behind = (state.columns >= state.block_start) | ((state.block == 0) & ~state.prompt)
        return (state.block_step == 0) | in_block_or_behind

    def max_active(self, forecast):
        if forecast.block_step == 0:
            return forecast.length
        return forecast.gen_length - forecast.block * forecast.block_length + forecast.shifted


class DualCache(Policy):
    """Fast-dLLM's dual cache: a full step at the start of each block, then the block alone."""

    needs_blocks = True

    def active(self, state):
        return PrefixCache().active(state) & ((state.block_step == 0) | (state.columns < state.block_end))

    def max_active(self, forecast):
        if forecast.block_step == 0:
            return forecast.length
        return min(forecast.block_length + forecast.shifted, PrefixCache().max_active(forecast))


def _following_is_set(flags, last):
    """flags moved one column to the left; `last` fills the last column ("same": it keeps its own value)."""
    last = flags[:, -1:] if isinstance(last, str) else last
    return torch.cat((flags[:, 1:], last), dim=1)


def _shifted_columns(flags, offset):
    """flags moved `offset` columns to the right, False moving in."""
    moved = torch.zeros_like(flags)
    length = flags.shape[1]
    if abs(offset) < length:
        moved[:, max(offset, 0) : length + min(offset, 0)] = flags[:, max(-offset, 0) : length - max(offset, 0)]
    return moved


def _positive(name, value, *, least=1, optional=False):
    if value is None and optional:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int{' or None' if optional else ''}, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
    return value


def _one_of(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")
    return value
