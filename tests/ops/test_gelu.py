"""GELU in one pass against float64."""

import pytest
import torch

from simctg_fast.ops.gelu import run_kernel as gelu_tanh


@pytest.mark.parametrize("count", [1, 7, 16, 33, 4099, 40_000])
def test_matches_float64(isa, count):
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)) * 4
    truth = torch.nn.functional.gelu(x.double(), approximate="tanh")
    plain = (torch.nn.functional.gelu(x, approximate="tanh").double() - truth).abs()
    assert ((gelu_tanh(x).double() - truth).abs() <= 2 * plain + 1e-6 * truth.abs() + 1e-7).all()


def test_special_values(isa):
    x = torch.tensor([0.0, -0.0, 30.0, -30.0, float("inf"), float("nan"), 1e-30, 3e38])
    y, want = gelu_tanh(x), torch.nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(y, want, equal_nan=True)
