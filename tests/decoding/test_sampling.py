"""What is left of a distribution to draw from: what transformers' warpers leave, which sort the vocabulary."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import TopPLogitsWarper, TypicalLogitsWarper

from simctg_fast.decoding.sampling import top_p, typical_p

WARPERS = {top_p: TopPLogitsWarper, typical_p: TypicalLogitsWarper}
SHARES = [1e-20, 1e-12, 0.05, 0.5, 0.9, 0.95, 0.999, 1 - 1e-9]


def of_transformers(kind, logits, share):
    return WARPERS[kind](share)(None, logits)


def distributions(count):
    """Rows of logits: flat, peaked, with impossible tokens, one of which nothing else is possible."""
    rows = [torch.randn(count) * width for width in (0.01, 1.0, 4.0, 30.0)]
    holes = torch.randn(count) * 3
    holes[torch.rand(count) < 0.7] = float("-inf")
    holes[-1] = 1.0
    only = torch.full((count,), float("-inf"))
    only[count // 2] = -3.0
    return torch.stack([*rows, holes, only])


@pytest.mark.parametrize("kind", WARPERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("count", [1, 2, 7, 500, 50_000])
def test_as_transformers_leave_it(kind, count):
    torch.manual_seed(count)
    logits = distributions(count).double()  # sums of float32 would decide which token is the last
    for share in SHARES:
        assert torch.equal(kind(logits, share), of_transformers(kind, logits, share)), share


@pytest.mark.parametrize("kind", WARPERS, ids=lambda kind: kind.__name__)
def test_float32(kind):
    """The sums of 50,000 float32 go astray by some 1e-6, and with them the last token or two."""
    torch.manual_seed(0)
    logits = distributions(50_000)
    for share in SHARES[2:-1]:
        ours, theirs = kind(logits, share), of_transformers(kind, logits, share)
        differ = logits.softmax(-1) * (ours != theirs)
        assert float(differ.sum(dim=-1).max()) < 1e-5, share


@pytest.mark.parametrize("kind", WARPERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equally_probable_tokens(kind, dtype):
    """As many of them, of the same probabilities; which of equals is left is not said."""
    torch.manual_seed(1)
    logits = (torch.randn(3, 5000) * 3).to(dtype).double()
    for share in SHARES:
        ours, theirs = (f(logits, share).sort(dim=-1).values for f in (kind, lambda *a: of_transformers(kind, *a)))
        assert torch.equal(ours, theirs), share


def test_the_later_of_equals_stay():
    left = top_p(torch.zeros(1, 8), 0.5)
    assert left.isfinite().tolist() == [[False] * 4 + [True] * 4]


@pytest.mark.parametrize("kind", WARPERS, ids=lambda kind: kind.__name__)
def test_no_distribution(kind):
    """A row that has none leaves nothing, and the rows beside it are as they are alone."""
    logits = torch.randn(3, 50)
    logits[1, 7] = float("nan")
    left = kind(logits, 0.9)
    assert left[1].softmax(-1).isnan().all()
    assert torch.equal(left[::2], kind(logits[::2], 0.9))
