"""How many tokens a step commits: LLaDA's even split of a block's masks, or Dream's time steps."""

import itertools

import torch


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
        ends = [min(end, gen_length) for end in range(block_length, gen_length + block_length, block_length)]
        others = max(steps - len(ends), 0)
        dealt = [-(-others * end // gen_length) for end in [0, *ends]]
        per_block = [1 + after - before for before, after in itertools.pairwise(dealt)]
        self.steps = torch.tensor(per_block, device=device)
        # remaining[b, i]: the part of block b's masks that is left before its step i
        self.remaining = torch.zeros(len(per_block), max(per_block) + 1, device=device)
        for block, count in enumerate(per_block):
            self.remaining[block, :count] = torch.linspace(1, eps, count + 1, device=device)[:-1]
        self.time_steps = time_steps

    def remaining_after(self, state):
        """(batch, 1) float32 in [0, 1): the part of the block's masks that Dream's schedule leaves after this step."""
        return self.remaining[state.block, (state.block_step + 1).clamp(max=self.remaining.shape[1] - 1)]

    def counts(self, state):
        """(batch, 1) int64: commits of this step, for each row by its own masks."""
        if self.time_steps:
            before = self.remaining[state.block, state.block_step.clamp(max=self.remaining.shape[1] - 2)]
            share = 1 - self.remaining_after(state) / before
            return (state.in_block.sum(1, keepdim=True) * share).long()
        steps = self.steps[state.block]
        return state.block_masks // steps + (state.block_step < state.block_masks % steps).long()
