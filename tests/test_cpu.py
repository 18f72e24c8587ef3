"""`dkv.kernels.cpu`: products are the same in either order of the factors; padded numbers of rows are fast ones."""

import pytest
import torch
from utils import assert_within_error_budget

from dkv.kernels import cpu

ROWS = (0, 1, 2, 7, 15, 16, 17, 48, 49, 64, 255, 256, 257, 512, 513)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_any_number_of_rows(rows, transposed, biased):
    x = torch.randn(24, rows).T if transposed else torch.randn(rows, 24)
    weight, bias = torch.randn(40, 24), torch.randn(40) if biased else None
    oracle = x.double() @ weight.double().T + (bias.double() if biased else 0)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = cpu.linear(x, weight, bias)
        assert y.shape == (rows, 40)
        assert_within_error_budget(y, oracle, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("rows", ROWS)
def test_layout_of_products(rows):
    x = torch.randn(rows, 24)
    with torch.no_grad():
        found = cpu.feature_major(x)
        assert torch.equal(found, x)
        assert found.stride() == cpu.linear(x, torch.randn(24, 24)).stride()


def test_other_dtypes_and_dimensions_are_left_to_pytorch():
    weight = torch.randn(40, 24)
    with torch.no_grad():
        for x, w in ((torch.randn(20, 24).half(), weight.half()), (torch.randn(2, 20, 24), weight)):
            assert torch.equal(cpu.linear(x, w), torch.nn.functional.linear(x, w))
            assert cpu.feature_major(x) is x


def test_padding_leads_to_the_next_multiple():
    for count in range(600):
        rows = cpu.padded_rows(count)
        assert count <= rows < count + cpu.ROW_MULTIPLE
        assert rows == count or rows % cpu.ROW_MULTIPLE == 0
        assert cpu.padded_rows(rows) == rows
