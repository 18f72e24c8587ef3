"""Policies: the positions that a step recomputes. All others are read from the cache as they were last computed.

A policy is a function of the `State` before the step. dkv adds the positions whose outputs the step needs, and removes
padding and finished rows. The policies of this module are rules that one kernel carries out; your own policy
subclasses `Policy`:

    class EveryOther(dkv.Policy):
        def active(self, state):
            return (state.step % 2 == 0) | state.masked

        def max_active(self, forecast):  # optional: without it a GPU waits for the host at each step
            return forecast.length if forecast.step % 2 == 0 else forecast.masks_before(0) * (1 + forecast.shifted)
"""

import dataclasses
from typing import Literal, get_args

from torch import Tensor

from dkv.inputs import one_of, whole
from dkv.kernels.rows import Rule
from dkv.schedule import Forecast
from dkv.state import State

MAX_SETTING = 2**30  # kernels take the numbers of a policy in 32 bits
Shift = Literal["un", "right", "un_right"]
Scope = Literal["all", "block"]
WindowKind = Literal["nearest_masked", "contiguous"]


class Policy:
    """Base class of all policies.

    Attributes:
        needs_order: whether the policy must know beforehand which masks a step decodes.
        needs_blocks: whether the policy depends on blocks.
    """

    needs_order: bool = False
    needs_blocks: bool = False

    def rule(self, shifted: bool) -> Rule | None:
        """The policy as a rule that one kernel carries out; None: `active` defines the policy."""
        return None

    def active(self, state: State) -> Tensor:
        """(batch, seqlen) bool, or a shape that broadcasts to it: the positions to recompute at this step."""
        rule = self.rule(state.shifted)
        if rule is None:
            raise NotImplementedError(f"{type(self).__name__} must define active(state)")
        return state.recomputed(rule)

    def max_active(self, forecast: Forecast) -> int | None:
        """An upper bound on the active positions of a row at a step, known to the host.

        It includes the positions whose outputs the step needs. None: the host reads the number at each step. A policy
        that defines `max_active` must compute `active` on the device alone (no `if` on a tensor), from the state and
        its own constants, because the steps may be recorded once and replayed.
        """
        return None

    def check(self, shifted: bool) -> None:
        """Raises ValueError if the policy does not fit the family: Dream if shifted, otherwise LLaDA."""

    def __eq__(self, other: object) -> bool:
        # equal policies share recorded graphs: a user's subclass may have state that we do not see, and its graphs must
        # not be reused, so only the classes of this module are compared by their settings
        ours = type(self) is type(other) and type(self).__module__ == __name__
        return self is other or (ours and vars(self) == vars(other))

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


class NoCache(Policy):
    """Every step recomputes every position."""

    def rule(self, shifted: bool) -> Rule:
        return Rule(interval=1)

    def max_active(self, forecast: Forecast) -> int:
        return forecast.length


class Decode(Policy):
    """dKV-Cache-Decode: a decoded token is read from the cache from the second step after its commit.

    The step after the commit still recomputes it (the one-step delay), so that the cached K/V are those of the token,
    not of the mask. Every `refresh_interval` steps of a block, and in its first `warmup_steps`, everything is
    recomputed. The counts start anew in every block.

    Args:
        refresh_interval: steps between full steps; 1 is `NoCache`; None: no refresh within a block.
        delay: the number of steps that recompute a token after its commit; 0 is the paper's ablation.
        warmup_steps: full steps at the start of a block. None: 2 for LLaDA, 1 for Dream, as in the authors' code.
        shift: for Dream only, when position j is stable: "un" (once j + 1 is decoded), "right" (once j is), "un_right"
            (once both are). None means "un_right".
        scope: "all" recomputes the masks of later blocks, "block" reads them from the cache.

    Source: Ma et al., dKV-Cache (arXiv 2505.15781).
    """

    def __init__(
        self,
        refresh_interval: int | None = 8,
        *,
        delay: int = 1,
        warmup_steps: int | None = None,
        shift: Shift | None = None,
        scope: Scope = "all",
    ) -> None:
        self.refresh_interval = _setting("refresh_interval", refresh_interval, optional=True)
        self.delay = _setting("delay", delay, minimum=0)
        self.warmup_steps = _setting("warmup_steps", warmup_steps, optional=True)
        self.shift = None if shift is None else one_of("shift", shift, get_args(Shift))
        self.scope = one_of("scope", scope, get_args(Scope))

    @property
    def needs_blocks(self) -> bool:
        return self.scope == "block"

    def check(self, shifted: bool) -> None:
        if self.shift is not None and not shifted:
            raise ValueError(f"shift is about Dream's shifted outputs; it must be None for LLaDA, got {self.shift!r}.")

    def rule(self, shifted: bool) -> Rule:
        return Rule(
            warmup=self.warmup_steps or (1 if shifted else 2),
            interval=self.refresh_interval,
            stable={"un": "next", "right": "decoded"}.get(self.shift, "both") if shifted else "decoded",
            delay=self.delay,
            until_block_end=self.scope == "block",
        )

    def max_active(self, forecast: Forecast) -> int:
        if self.rule(forecast.shifted).refreshes(forecast.block_step):
            return forecast.length
        # at the first cached step of a block the delay is at least 1
        unsettled = forecast.masks_before(max(self.delay, 1) if forecast.shifted else self.delay)
        if self.scope == "block":
            behind = forecast.gen_length - (forecast.block + 1) * forecast.block_length
            unsettled -= max(behind, 0)
        if not forecast.shifted:
            return unsettled
        # each unsettled position and the one before it
        return min(2 * unsettled if self.shift != "un" else unsettled, forecast.gen_length) + 1


class Greedy(Policy):
    """dKV-Cache-Greedy: recomputes the tokens just decoded, the masks decoded next, and a window.

    It must know the decoding order: use `remasking="random"`, with or without `order=`, or "origin".

    Args:
        refresh_interval: steps of a block between full steps; 1 is `NoCache`.
        window: size of the window; 0: none.
        window_kind: "nearest_masked": the `window` nearest masks on both sides of each mask decoded next, as in the
            authors' code; "contiguous": the range centred on each token just decoded, as in the paper.
    """

    needs_order = True

    def __init__(
        self, refresh_interval: int = 2, window: int = 4, *, window_kind: WindowKind = "nearest_masked"
    ) -> None:
        self.refresh_interval = _setting("refresh_interval", refresh_interval)
        self.window = _setting("window", window, minimum=0)
        self.window_kind = one_of("window_kind", window_kind, get_args(WindowKind))

    def rule(self, shifted: bool) -> Rule:
        contiguous = self.window_kind == "contiguous"
        return Rule(interval=self.refresh_interval, stable="others", window=self.window, contiguous=contiguous)

    def max_active(self, forecast: Forecast) -> int:
        if forecast.block_step % self.refresh_interval == 0:
            return forecast.length
        centres = forecast.last_commits if self.window_kind == "contiguous" else forecast.commits
        predictors = forecast.commits if forecast.shifted else 0
        return forecast.last_commits + forecast.commits + predictors + self.window * centres


class Prefill(Policy):
    """dKV-Cache-Prefill: the prompt is computed once and never refreshed; everything else is recomputed."""

    def rule(self, shifted: bool) -> Rule:
        return Rule(interval=1, frozen_prompt=True)

    def max_active(self, forecast: Forecast) -> int:
        return forecast.length if forecast.step == 0 else forecast.gen_length + forecast.shifted


class PrefillDecode(Policy):
    """dKV-Cache-PD: the prompt is computed once and never refreshed; the rest follows `Decode`.

    Args:
        refresh_interval, shift: as in `Decode`.
    """

    def __init__(self, refresh_interval: int | None = 4, *, shift: Shift | None = None) -> None:
        rule = Decode(refresh_interval, shift=shift)
        self.refresh_interval, self.shift = rule.refresh_interval, rule.shift

    @property
    def _decode(self) -> Decode:
        return Decode(self.refresh_interval, shift=self.shift)

    def check(self, shifted: bool) -> None:
        self._decode.check(shifted)

    def rule(self, shifted: bool) -> Rule:
        return dataclasses.replace(self._decode.rule(shifted), frozen_prompt=True)

    def max_active(self, forecast: Forecast) -> int:
        return min(Prefill().max_active(forecast), self._decode.max_active(forecast))


class PrefixCache(Policy):
    """Fast-dLLM's prefix cache: a full step at the start of each block, then the block and everything after it.

    Source: Wu et al., Fast-dLLM (arXiv 2505.22618).
    """

    needs_blocks = True

    def rule(self, shifted: bool) -> Rule:
        return Rule(warmup=1, from_block_start=True)

    def max_active(self, forecast: Forecast) -> int:
        if forecast.block_step == 0:
            return forecast.length
        return forecast.gen_length - forecast.block * forecast.block_length + forecast.shifted


class DualCache(Policy):
    """Fast-dLLM's dual cache: a full step at the start of each block, then the block alone."""

    needs_blocks = True

    def rule(self, shifted: bool) -> Rule:
        return Rule(warmup=1, from_block_start=True, until_block_end=True)

    def max_active(self, forecast: Forecast) -> int:
        if forecast.block_step == 0:
            return forecast.length
        return min(forecast.block_length + forecast.shifted, PrefixCache().max_active(forecast))


PolicyName = Literal["NoCache", "Decode", "Greedy", "Prefill", "PrefillDecode", "PrefixCache", "DualCache"]
POLICIES: dict[PolicyName, type[Policy]] = {
    "NoCache": NoCache,
    "Decode": Decode,
    "Greedy": Greedy,
    "Prefill": Prefill,
    "PrefillDecode": PrefillDecode,
    "PrefixCache": PrefixCache,
    "DualCache": DualCache,
}


def checked_policy(name: str, value: object) -> Policy:
    """`value`, a `Policy` or one of `POLICIES` by name, which gets its default settings."""
    if isinstance(value, str):
        return POLICIES[one_of(name, value, tuple(POLICIES))]()
    if not isinstance(value, Policy):
        raise TypeError(f"{name} must be a dkv.Policy such as dkv.Decode(8), or the name of one, got {value!r}.")
    return value


def _setting(name, value, *, minimum=1, optional=False):
    return None if value is None and optional else whole(name, value, minimum=minimum, maximum=MAX_SETTING)
