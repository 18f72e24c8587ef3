"""Lagged running sums: a task whose every token depends on earlier ones, and whose answers a line of code checks.

    prompt  x[0] .. x[31]   random digits
    answer  x[32] .. x[95]  x[i] = (x[i - 1] + x[i - 32]) mod 10

The first half of an answer are running sums over the prompt, the second half running sums over those. One wrong digit
makes all that follow wrong, so an error that a cache brings in cannot hide.
"""

import torch
from torch import Generator, Tensor

LAG = 32
ANSWER = 64
LENGTH = LAG + ANSWER
# ten digits, the mask, the end of text; the other ids are never used
VOCABULARY, MASK, EOS = 16, 10, 11


def training_stream(seed: int, step: int) -> Generator:
    """The random numbers of a training step."""
    return torch.Generator().manual_seed(2 * (seed * 10**6 + step))


def held_out_stream() -> Generator:
    """Random numbers that no training step draws: their seed is odd (PyTorch's CPU generator reads 32 bits of it)."""
    return torch.Generator().manual_seed(1)


def problems(count: int, generator: Generator, zeros: float = 0.0) -> Tensor:
    """Prompts with their answers, (count, 96) int64; zeros: the share of prompt digits that become 0."""
    prompt = torch.randint(10, (count, LAG), generator=generator)
    prompt = prompt * (torch.rand(count, LAG, generator=generator) >= zeros)
    return solve(prompt)


def solve(prompt: Tensor) -> Tensor:
    """(batch, 32) digits followed by their right answers, (batch, 96)."""
    first = (prompt.cumsum(1) + prompt[:, -1:]) % 10
    second = (first.cumsum(1) + first[:, -1:]) % 10
    return torch.cat((prompt, first, second), dim=1)


def right(sequences: Tensor) -> Tensor:
    """(batch, 64) bool: the tokens that equal the right answer's; `.all(1)` is exact match."""
    return sequences[:, LAG:] == solve(sequences[:, :LAG])[:, LAG:]


def slips(sequences: Tensor) -> Tensor:
    """(batch, 64) bool: the tokens that break the rule, given the tokens before them, right or wrong."""
    expected = (sequences[:, LAG - 1 : -1] + sequences[:, :-LAG]) % 10
    return sequences[:, LAG:] != expected
