"""Lagged running sums: a task whose every token depends on earlier ones, and whose answers a line of code checks.

    prompt  x[0] .. x[31]   random digits
    answer  x[32] .. x[95]  x[i] = (x[i - 1] + x[i - 32]) mod 10

The first half of an answer are running sums over the prompt, the second half running sums over those. One wrong digit
makes all that follow wrong, so an error that a cache brings in cannot hide.
"""

import torch

LAG = 32
ANSWER = 64
LENGTH = LAG + ANSWER
# ten digits, the mask, the end of text; the other ids are never used
VOCABULARY, MASK, EOS = 16, 10, 11


def training_stream(seed, step):
    """The random numbers of a training step."""
    return torch.Generator().manual_seed(2 * (seed * 10**6 + step))


def held_out_stream(seed=0):
    """Random numbers that no training step draws: odd seeds (of which PyTorch's CPU generator reads 32 bits)."""
    return torch.Generator().manual_seed(2 * seed + 1)


def problems(count, generator, zeros=0.0):
    """Prompts with their answers, (count, 96) int64; zeros: the share of prompt digits that are made 0."""
    prompt = torch.randint(10, (count, LAG), generator=generator)
    prompt = prompt * (torch.rand(count, LAG, generator=generator) >= zeros)
    return solve(prompt)


def solve(prompt):
    """(batch, 32) digits with their right answers behind, (batch, 96)."""
    first = (prompt.cumsum(1) + prompt[:, -1:]) % 10
    second = (first.cumsum(1) + first[:, -1:]) % 10
    return torch.cat((prompt, first, second), dim=1)


def right(sequences):
    """(batch, 64) bool: which tokens of the answers are those of the right answer; `.all(1)` is exact match."""
    return sequences[:, LAG:] == solve(sequences[:, :LAG])[:, LAG:]


def slips(sequences):
    """(batch, 64) bool: which tokens break the rule, given the tokens that they follow, right or wrong."""
    expected = (sequences[:, LAG - 1 : -1] + sequences[:, :-LAG]) % 10
    return sequences[:, LAG:] != expected
