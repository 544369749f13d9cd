"""What a notebook shows of a result: its shape, in a line."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from simctg_fast.crf import results
from simctg_fast.decoding.report import Check, SupportReport

RESULTS = [each for each in vars(results).values() if dataclasses.is_dataclass(each)]


@pytest.mark.parametrize("kind", RESULTS)
def test_results_of_the_crf(kind):
    tensors = [
        torch.zeros(200, 30, dtype=torch.int64 if field.name in ("tokens", "slots", "tags") else torch.float32)
        for field in dataclasses.fields(kind)
    ]
    shown = repr(kind(*tensors))
    assert shown.startswith(f"{kind.__name__}(")
    for field, tensor in zip(dataclasses.fields(kind), tensors, strict=True):
        assert f"{field.name}=(200, 30) {str(tensor.dtype)[6:]}" in shown
    assert "tensor" not in shown
    assert len(shown) < 250


def test_a_path():
    path = results.TagPath(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2), torch.zeros(2, 3, dtype=torch.float64))
    assert repr(path) == "TagPath(tags=(2, 3) int64, score=(2,) float32, position_scores=(2, 3) float64)"


def test_support():
    report = SupportReport(
        "GPT2LMHeadModel", "shared_prefix", "a reason " * 40, True, (Check("a", True), Check("b", False))
    )
    assert repr(report) == "SupportReport(GPT2LMHeadModel: shared_prefix, 1 of 2 checks passed)"
    assert "a reason" in str(report), "print says more"
