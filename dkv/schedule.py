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

    Attributes:
        remaining: (blocks, steps of a block) float32, the part of a block's masks that Dream's schedule leaves after a
            step; 0 from its last one on.
    """

    def __init__(self, *, steps, gen_length, block_length, time_steps, eps):
        self.gen_length, self.block_length, self.time_steps = gen_length, block_length, time_steps
        ends = [min(end, gen_length) for end in range(block_length, gen_length + block_length, block_length)]
        self.lengths = [end - start for start, end in itertools.pairwise([0, *ends])]
        others = max(steps - len(ends), 0)
        dealt = [-(-others * end // gen_length) for end in [0, *ends]]
        self._steps = torch.tensor([1 + after - before for before, after in itertools.pairwise(dealt)], device="cpu")
        self._before = torch.zeros(len(ends), int(self._steps.max()) + 1, device="cpu")
        for block, count in enumerate(self._steps.tolist()):
            self._before[block, :count] = torch.linspace(1, eps, count + 1, device="cpu")[:-1]
        self.remaining = self._before[:, 1:]

    def commits(self, prompt_masks):
        """How many tokens each step of each block commits, for rows with so many masks inside their prompts.

        Args:
            prompt_masks: a list of ints; they belong to the first block.

        Returns:
            (rows, blocks, steps of a block) int64 on the CPU: all masks, once.
        """
        masks = torch.tensor(self.lengths, device="cpu").repeat(len(prompt_masks), 1)
        masks[:, 0] += torch.tensor(prompt_masks, device="cpu")
        steps = torch.arange(self.remaining.shape[1], device="cpu")
        if not self.time_steps:
            each, more = masks // self._steps, masks % self._steps
            counts = each[..., None] + (steps < more[..., None]).long()
            return counts.masked_fill_(steps >= self._steps[:, None], 0)
        # in float32 as Dream does, which decides where the product is cut off
        shares = 1 - self.remaining / self._before[:, :-1]
        counts = torch.zeros(*masks.shape, len(steps), dtype=torch.int64, device="cpu")
        for step in steps.tolist():
            # behind a block's last step both are 0, and no mask is left
            counts[..., step] = (masks * shares[:, step].nan_to_num()).long()
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
