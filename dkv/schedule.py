"""How many tokens a step commits: LLaDA's even split of a block's masks, or Dream's time steps."""

import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Forecast:
    """What is known of a step before the run: counts, the same in every row. `Policy.max_active` reads it.

    Attributes:
        step, block_step: as in `State`, ints.
        masks: masks of a row before each step of the run, this one's at index `step`.
        block_masks: those of the current block before this step.
        commits: tokens a row commits at this step.
        block, block_length, gen_length, length: the current block, and positions of a block, of the generated part, and
            of the longest row.
        shifted: as in `State`.
    """

    step: int
    block_step: int
    masks: list[int]
    block_masks: int
    commits: int
    block: int
    block_length: int
    gen_length: int
    length: int
    shifted: bool

    def masks_before(self, steps):
        """Masks of a row `steps` steps ago."""
        return self.masks[max(self.step - steps, 0)]

    @property
    def last_commits(self):
        """Tokens a row committed at the step before."""
        return self.masks_before(1) - self.masks_before(0)


class Schedule:
    """Commits per step of a block, for a run of `steps` steps over blocks of `block_length` columns.

    Every block gets one step, and the others are dealt in proportion to the lengths, earlier blocks first; where they
    divide, that is LLaDA's rule. A block of more steps than masks ends when its masks do.

    Args:
        steps, gen_length, block_length: ints; the last block may be shorter.
        time_steps: Dream's schedule: of m masks, step i commits m * (1 - t[i + 1] / t[i]), t from 1 to eps. Else
            LLaDA's: as many at each step, and one more at the first ones where that does not divide.
    """

    def __init__(self, *, steps, gen_length, block_length, time_steps, eps, device):
        self.gen_length, self.block_length, self.time_steps = gen_length, block_length, time_steps
        self.ends = [min(end, gen_length) for end in range(block_length, gen_length + block_length, block_length)]
        others = max(steps - len(self.ends), 0)
        dealt = [-(-others * end // gen_length) for end in [0, *self.ends]]
        per_block = [1 + after - before for before, after in itertools.pairwise(dealt)]
        # remaining[b, i]: the part of block b's masks that is left before its step i
        remaining = torch.zeros(len(per_block), max(per_block) + 1, device="cpu")
        for block, count in enumerate(per_block):
            remaining[block, :count] = torch.linspace(1, eps, count + 1, device="cpu")[:-1]
        # by device: the forecast must divide as the run does
        self._tables = {d: (torch.tensor(per_block, device=d), remaining.to(d)) for d in {"cpu", device}}
        self.device = device

    def remaining_after(self, state):
        """(batch, 1) float32 in [0, 1): the part of the block's masks that Dream's schedule leaves after this step."""
        _, remaining = self._tables[self.device]
        return remaining[state.block, (state.block_step + 1).clamp(max=remaining.shape[1] - 1)]

    def counts(self, state):
        """(batch, 1) int64: commits of this step, for each row by its own masks."""
        in_block = state.in_block.sum(1, keepdim=True)
        return self._counts(self.device, state.block, state.block_step, in_block, state.block_masks)

    def _counts(self, device, block, block_step, in_block, block_masks):
        steps, remaining = self._tables[device]
        if self.time_steps:
            last = remaining.shape[1] - 1
            after = remaining[block, (block_step + 1).clamp(max=last)]
            share = 1 - after / remaining[block, block_step.clamp(max=last - 1)]
            return (in_block * share).long()
        steps = steps[block]
        return block_masks // steps + (block_step < block_masks % steps).long()

    def forecasts(self, length, shifted):
        """A `Forecast` of every step, for prompts without masks; length: positions of the longest row."""
        found, masks = [], [self.gen_length]
        for block, (start, end) in enumerate(itertools.pairwise([0, *self.ends])):
            in_block = end - start
            for block_step in itertools.count():
                counters = (torch.tensor([[n]], device="cpu") for n in (block, block_step, in_block, end - start))
                commits = min(int(self._counts("cpu", *counters)), in_block)
                found.append(
                    Forecast(
                        step=len(found),
                        block_step=block_step,
                        masks=masks,
                        block_masks=in_block,
                        commits=commits,
                        block=block,
                        block_length=self.block_length,
                        gen_length=self.gen_length,
                        length=length,
                        shifted=shifted,
                    )
                )
                in_block -= commits
                masks.append(masks[-1] - commits)
                if in_block == 0:
                    break
        return found
