"""`dkv.generate` against the authors' own code: tokens after every step, and which positions every step recomputes."""

import oracle
import pytest
import torch
from utils import thinned


# a name says weights, batch, lengths, steps, rules and policy, with dots between them
@pytest.mark.parametrize(
    "family, name",
    thinned(
        [(family, name) for family in ("llada", "dream") for name in oracle.cases(family)],
        lambda case: [case[0], *case[1].split(".")],
    ),
)
def test_trajectory(family, name, device):
    output = oracle.run(family, name, device)
    oracle.assert_same_trajectory(family, name, output.history, output.active)
    assert torch.equal(output.history[-1], output.sequences)
