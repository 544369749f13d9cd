"""Short forms of losses.py for `pytest benchmarks --benchmark-only`: ours beside eager, small enough for seconds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import losses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def step(loss, data):
    leaf = data.detach().requires_grad_()
    loss(leaf).backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("provider", ["ours", "eager"])
@pytest.mark.parametrize("kind", ["isotropic", "mixed", "biased"])
def test_contrastive_loss(benchmark, kind, provider):
    torch.manual_seed(0)
    data = (torch.randn(4, 256, 768) + losses.BIAS[kind] * torch.randn(768)).to(DEVICE)
    providers = losses.contrastive_providers(["ours", "eager"], "auto")
    truth = lambda s: losses.reference(s, None, losses.MARGIN)  # noqa: E731
    assert losses.agrees(providers["ours"], losses.eager, truth, data[:1])
    benchmark(step, providers[provider], data)


@pytest.mark.parametrize("provider", ["ours", "matmul", "broadcast"])
def test_simcse(benchmark, provider):
    torch.manual_seed(0)
    data = (torch.randn(512, 256) + 0.5).to(DEVICE)
    benchmark(step, losses.simcse_providers(512, DEVICE)[provider], data)
