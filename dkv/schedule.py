"""How many tokens a step commits: LLaDA's even split of a block's masks, or Dream's time steps."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Forecast:
    """The counts of a step that are known before the run, the same for every row. `Policy.max_active` reads them.

    Attributes:
        step, block_step: as in `State`, but ints.
        masks: the masks of a row before each step of the run; index `step` is this step.
        block_masks: the masks of the current block before this step.
        commits: the tokens that a row commits at this step.
        block: the current block.
        block_length, gen_length, length: the number of positions in a block, in the generated part, and in the longest
            row.
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

    def masks_before(self, steps: int) -> int:
        """The masks of a row `steps` steps ago."""
        return self.masks[max(self.step - steps, 0)]

    @property
    def last_commits(self) -> int:
        """The tokens that a row committed at the previous step."""
        return self.masks_before(1) - self.masks_before(0)


class Schedule:
    """Commits per step of a block, for a run of `steps` steps over blocks of `block_length` columns.

    Every block gets one step. The remaining steps are shared in proportion to the lengths of the blocks, earlier blocks
    first; if they divide evenly, that is LLaDA's rule. A block with more steps than masks ends when its masks do.

    Args:
        steps: None means gen_length steps or, if that is 0, one step for each mask of a row.
        gen_length: 0 makes one block of length 0.
        block_length: the last block may be shorter.
        time_steps: True is Dream's schedule: step i commits m * (1 - t[i + 1] / t[i]) of m masks, t from 1 to eps.
            False is LLaDA's: each step commits the same number, and the first steps one more if that does not divide.

    Attributes:
        lengths: a list of ints, the length of each block.
        block_steps: int, the maximum number of steps in a block; None: a row has as many as it has masks.
    """

    def __init__(self, *, steps: int | None, gen_length: int, block_length: int, time_steps: bool, eps: float) -> None:
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

    def max_steps(self, prompt_masks: list[int]) -> int:
        """The maximum number of steps of a row; prompt_masks: the masks inside each prompt."""
        return max(prompt_masks) if self.block_steps is None else self._steps

    def table(self, prompt_masks: list[int]) -> tuple[Tensor, Tensor]:
        """The steps of each block, (rows or 1, blocks) int64, and the times before each step, on the CPU.

        Times are (rows or 1, blocks, steps of a block + 1) float32. The time before step i + 1 is the share of masks
        that Dream's schedule leaves after step i: 0 from the last step on.
        """
        if self.block_steps is not None:
            return self._table
        steps, times = self._timed([max(masks, 1) for masks in prompt_masks])
        return steps.T, times.transpose(0, 1)

    def _timed(self, steps):
        """`table` of one row; steps: a list of ints, the steps of each block."""
        times = torch.zeros(1, len(steps), max(steps) + 1, dtype=torch.float32, device="cpu")
        for block, count in enumerate(steps):
            # float32 as in Dream: it decides how the number of commits is truncated
            linear = torch.linspace(1, self.eps, count + 1, dtype=torch.float32, device="cpu")
            times[0, block, :count] = linear[:-1]
        return torch.tensor([steps], device="cpu"), times

    def commits(self, prompt_masks: list[int]) -> Tensor:
        """The number of tokens that each step of each block commits.

        Args:
            prompt_masks: the masks inside each prompt; they belong to the first block.

        Returns:
            (rows, blocks, steps of a block) int64 on the CPU; over a row they sum to all its masks.
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
            # after the last step of a block both times are 0, and no mask is left
            counts[..., step] = (masks * shares[..., step].nan_to_num()).long()
            masks = masks - counts[..., step]
        return counts

    def forecasts(self, length: int, shifted: bool) -> list[Forecast]:
        """The `Forecast` of every step, for prompts without masks; length: the positions of the longest row."""
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
