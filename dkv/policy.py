"""Policies: which positions are recomputed at a step. All others are read from the cache as they were last computed.

A policy is a function of the `State` before the step; the engine adds the positions whose outputs the step needs, and
takes away padding and finished rows. Those here are rules of one kernel; a policy of your own subclasses `Policy`:

    class EveryOther(dkv.Policy):
        def active(self, state):
            return (state.step % 2 == 0) | state.masked

        def max_active(self, forecast):  # optional: lets a GPU run without waiting for the host, and record its steps
            return forecast.length if forecast.step % 2 == 0 else forecast.masks_before(0) * (1 + forecast.shifted)
"""

import dataclasses

from dkv.inputs import one_of, whole
from dkv.kernels.rows import Rule

LARGEST = 2**30  # of a policy's numbers, which kernels take in 32 bits


class Policy:
    """Base class. `needs_order`: it must know beforehand what a step decodes; `needs_blocks`: it is about blocks."""

    needs_order = False
    needs_blocks = False

    def rule(self, shifted):
        """The policy as a `dkv.kernels.rows.Rule`, which one kernel carries out; None: `active` says it all."""
        return None

    def active(self, state):
        """(batch, seqlen) bool, or anything that broadcasts to it: the positions to recompute at this step."""
        rule = self.rule(state.shifted)
        if rule is None:
            raise NotImplementedError(f"{type(self).__name__} must define active(state)")
        return state.recomputed(rule)

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

    def rule(self, shifted):
        return Rule(interval=1)

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
        self.shift = None if shift is None else one_of("shift", shift, ("un", "right", "un_right"))
        self.scope = one_of("scope", scope, ("all", "block"))

    @property
    def needs_blocks(self):
        return self.scope == "block"

    def check(self, shifted):
        if self.shift is not None and not shifted:
            raise ValueError(f"shift is about Dream's shifted outputs; it must be None for LLaDA, got {self.shift!r}.")

    def rule(self, shifted):
        return Rule(
            warmup=self.warmup_steps or (1 if shifted else 2),
            interval=self.refresh_interval,
            stable={"un": "next", "right": "decoded"}.get(self.shift, "both") if shifted else "decoded",
            delay=self.delay,
            until_block_end=self.scope == "block",
        )

    def max_active(self, forecast):
        if self.rule(forecast.shifted).refreshes(forecast.block_step):
            return forecast.length
        # at the first cached step of a block, the delay is 1 whatever it is later
        unsettled = forecast.masks_before(max(self.delay, 1) if forecast.shifted else self.delay)
        if self.scope == "block":
            behind = forecast.gen_length - (forecast.block + 1) * forecast.block_length
            unsettled -= max(behind, 0)
        if not forecast.shifted:
            return unsettled
        # each of them, and the position before it
        return min(2 * unsettled if self.shift != "un" else unsettled, forecast.gen_length) + 1


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
        self.window_kind = one_of("window_kind", window_kind, ("nearest_masked", "contiguous"))

    def rule(self, shifted):
        contiguous = self.window_kind == "contiguous"
        return Rule(interval=self.refresh_interval, stable="others", window=self.window, contiguous=contiguous)

    def max_active(self, forecast):
        if forecast.block_step % self.refresh_interval == 0:
            return forecast.length
        centres = forecast.last_commits if self.window_kind == "contiguous" else forecast.commits
        predictors = forecast.commits if forecast.shifted else 0
        return forecast.last_commits + forecast.commits + predictors + self.window * centres


class Prefill(Policy):
    """dKV-Cache-Prefill: the prompt is computed once and never refreshed; everything else is recomputed."""

    def rule(self, shifted):
        return Rule(interval=1, frozen_prompt=True)

    def max_active(self, forecast):
        return forecast.length if forecast.step == 0 else forecast.gen_length + forecast.shifted


class PrefillDecode(Policy):
    """dKV-Cache-PD: the prompt is never refreshed, the rest follows `Decode`; a refresh leaves the prompt out.

    Args:
        refresh_interval, shift: as in `Decode`.
    """

    def __init__(self, refresh_interval=4, *, shift=None):
        rule = Decode(refresh_interval, shift=shift)
        self.refresh_interval, self.shift = rule.refresh_interval, rule.shift

    @property
    def _decode(self):
        return Decode(self.refresh_interval, shift=self.shift)

    def check(self, shifted):
        self._decode.check(shifted)

    def rule(self, shifted):
        return dataclasses.replace(self._decode.rule(shifted), frozen_prompt=True)

    def max_active(self, forecast):
        return min(Prefill().max_active(forecast), self._decode.max_active(forecast))


class PrefixCache(Policy):
    """Fast-dLLM's prefix cache: a full step at the start of each block, then the block and everything behind it.

    Source: Wu et al., Fast-dLLM (arXiv 2505.22618).
    """

    needs_blocks = True

    def rule(self, shifted):
        return Rule(warmup=1, from_block_start=True)

    def max_active(self, forecast):
        if forecast.block_step == 0:
            return forecast.length
        return forecast.gen_length - forecast.block * forecast.block_length + forecast.shifted


class DualCache(Policy):
    """Fast-dLLM's dual cache: a full step at the start of each block, then the block alone."""

    needs_blocks = True

    def rule(self, shifted):
        return Rule(warmup=1, from_block_start=True, until_block_end=True)

    def max_active(self, forecast):
        if forecast.block_step == 0:
            return forecast.length
        return min(forecast.block_length + forecast.shifted, PrefixCache().max_active(forecast))


def checked_policy(name, value):
    """`value`, a `Policy`."""
    if not isinstance(value, Policy):
        raise TypeError(f"{name} must be a dkv.Policy such as dkv.Decode(8), got {value!r}.")
    return value


def _positive(name, value, *, least=1, optional=False):
    return None if value is None and optional else whole(name, value, least=least, most=LARGEST)
