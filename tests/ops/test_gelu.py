"""GELU in one pass against float64."""

import pytest
import torch
from transformers.activations import NewGELUActivation

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number(isa, dtype):
    """What float32 gives, rounded once; closer to float64 than the module, which rounds after each operation."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    y = gelu_tanh(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, gelu_tanh(x.float()).to(dtype), rtol=0, atol=0, equal_nan=True)
    want = torch.nn.functional.gelu(x.float(), approximate="tanh").to(dtype)
    torch.testing.assert_close(y, want, atol=1e-6, rtol=2 * torch.finfo(dtype).eps, equal_nan=True)
    for count in (1, 7, 17, 33, 20_001):
        assert torch.equal(gelu_tanh(x[-count:]).nan_to_num(), y[-count:].nan_to_num())
    kept = x[x.double().abs() < 100]
    truth = torch.nn.functional.gelu(kept.double(), approximate="tanh")
    ours, own = (f(kept).double() - truth for f in (gelu_tanh, NewGELUActivation()))
    best = truth.to(dtype).double() - truth
    assert ours.norm() <= 1.001 * best.norm() < own.norm()
