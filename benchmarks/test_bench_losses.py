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


@pytest.mark.parametrize("provider", ["ours", "eager", "compile", "published", "tutorial"])
@pytest.mark.parametrize("kind", ["isotropic", "mixed", "biased"])
def test_contrastive_loss(benchmark, kind, provider):
    torch.manual_seed(0)
    data = (torch.randn(2, 256, 256) + losses.BIAS[kind] * torch.randn(256)).to(DEVICE)
    providers = losses.contrastive_providers(["ours", provider], "auto")
    truth = lambda s: losses.reference(s, None, losses.MARGIN)  # noqa: E731
    assert losses.agrees(providers["ours"], losses.eager, truth, data[:1])
    if provider != "tutorial":  # its mean has the diagonal in it
        assert losses.agrees(providers[provider], losses.eager, truth, data[:1])
    benchmark.group = f"contrastive loss, {kind}"
    benchmark.pedantic(step, (providers[provider], data), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("provider", ["ours", "matmul", "broadcast", "sentence-transformers", "ours, its loss"])
def test_simcse(benchmark, provider):
    torch.manual_seed(0)
    data = (torch.randn(256, 128) + 0.5).to(DEVICE)
    providers = losses.simcse_providers(256, DEVICE)
    if provider not in providers:
        pytest.skip("sentence-transformers is not installed")
    assert losses.agrees(providers["ours"], losses.simcse_reference, losses.simcse_reference, data)
    benchmark.group = "SimCSE"
    benchmark.pedantic(step, (providers[provider], data), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("provider", ["ours", "eager", "compile", "published"])
def test_contraclm(benchmark, provider):
    data = losses.token_views((2, 128, 64)).to(DEVICE)
    providers = losses.token_providers(["ours", provider], "auto")["contraclm_token_loss"]
    assert losses.tokens_agree("contraclm_token_loss", providers["ours"], data)
    assert losses.agrees(providers[provider], losses.eager_contraclm, losses.eager_contraclm, data)
    benchmark.group = "ContraCLM, token level"
    benchmark.pedantic(step, (providers[provider], data), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("provider", ["ours", "eager"])
def test_cosine_regularization(benchmark, provider):
    data = losses.token_views((2, 128, 64)).to(DEVICE)
    providers = losses.token_providers(["ours", provider], "auto")["cosine_regularization"]
    assert losses.tokens_agree("cosine_regularization", providers["ours"], data)
    benchmark.group = "mean cosine"
    benchmark.pedantic(step, (providers[provider], data), rounds=5, warmup_rounds=1)
