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
        steps: int, or None: as many as gen_length or, where that is 0, as many as a row has masks.
        gen_length, block_length: ints; the last block may be shorter. A gen_length of 0 makes one block of length 0.
        time_steps: Dream's schedule: of m masks, step i commits m * (1 - t[i + 1] / t[i]), t from 1 to eps. Else
            LLaDA's: as many at each step, and one more at the first ones where that does not divide.

    Attributes:
        lengths: a list of ints, of the blocks.
        block_steps: int, the most steps of a block; None: a row has as many as masks.
    """

    def __init__(self, *, steps, gen_length, block_length, time_steps, eps):
        self.gen_length, self.block_length, self.time_steps, self.eps = gen_length, block_length, time_steps, eps
        columns = max(gen_length, 1)
        starts = range(0, columns, block_length)
        self.lengths = [min(block_length, gen_length - start) for start in starts]
        if steps is None and gen_length == 0:
            self.block_steps = None
            return
        others = max((gen_length if steps is None else steps) - len(starts), 0)
        dealt = [-(-others * edge // columns) for edge in (*starts, columns)]
        steps = [1 + after - before for before, after in itertools.pairwise(dealt)]
        self._table, self.block_steps, self._steps = self._timed(steps), max(steps), sum(steps)

    def max_steps(self, prompt_masks):
        """How many steps a row takes at most: an int, for a list of ints, masks inside the prompts."""
        return max(prompt_masks) if self.block_steps is None else self._steps

    def table(self, prompt_masks):
        """The steps of each block, (rows or 1, blocks) int64, and the times before each of them, on the CPU.

        Times are (rows or 1, blocks, steps of a block + 1) float32; that before step i + 1 is the part of the masks
        that Dream's schedule leaves after step i: 0 from the last one on.
        """
        if self.block_steps is not None:
            return self._table
        steps, times = self._timed([max(masks, 1) for masks in prompt_masks])
        return steps.T, times.transpose(0, 1)

    def _timed(self, steps):
        """`table` of one row, whose blocks have so many steps."""
        times = torch.zeros(1, len(steps), max(steps) + 1, dtype=torch.float32, device="cpu")
        for block, count in enumerate(steps):
            # in float32 as Dream does, which decides where a number of commits is cut off
            linear = torch.linspace(1, self.eps, count + 1, dtype=torch.float32, device="cpu")
            times[0, block, :count] = linear[:-1]
        return torch.tensor([steps], device="cpu"), times

    def commits(self, prompt_masks):
        """How many tokens each step of each block commits, for rows with so many masks inside their prompts.

        Args:
            prompt_masks: a list of ints; they belong to the first block.

        Returns:
            (rows, blocks, steps of a block) int64 on the CPU: all masks, once.
        """
        masks = torch.tensor(self.lengths, device="cpu").repeat(len(prompt_masks), 1)
        masks[:, 0] += torch.tensor(prompt_masks, device="cpu")
        steps_of_block, times = self.table(prompt_masks)
        steps = torch.arange(times.shape[-1] - 1, device="cpu")
        if not self.time_steps:
            each, more = masks // steps_of_block, masks % steps_of_block
            counts = each[..., None] + (steps < more[..., None]).long()
            return counts.masked_fill_(steps >= steps_of_block[..., None], 0)
        shares = 1 - times[..., 1:] / times[..., :-1]
        counts = torch.zeros(*masks.shape, len(steps), dtype=torch.int64, device="cpu")
        for step in steps.tolist():
            # behind a block's last step both are 0, and no mask is left
            counts[..., step] = (masks * shares[..., step].nan_to_num()).long()
            masks = masks - counts[..., step]
        return counts

    def forecasts(self, length, shifted):
        """A `Forecast` of every step, for prompts without masks; length: positions of the longest row."""
        found, masks = [], [self.gen_length]
        for block, counts in enumerate(self.commits([0])[0].tolist()):
            in_block = self.lengths[block]
            for block_step, commits in enumerate(counts):
                if in_block == 0:
                    break
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
        return found
