"""The contrastive loss as written, against a loop over pairs and against cases counted by hand."""

from __future__ import annotations

import pytest
import torch

from simctg_fast.reference.contrastive_loss import REDUCTIONS, contrastive_loss

CORNERS = [0.5, -1.0, 0.0, 0.3, 1.0]


def by_loops(states: torch.Tensor, mask: torch.Tensor | None, margin: float, reduction: str) -> float:
    """Equation 2 pair by pair, in Python floats."""
    per_row, counts = [], []
    for b in range(states.shape[0]):
        kept = states[b] if mask is None else states[b][mask[b].bool()]
        hinges = []
        for i in range(len(kept)):
            for j in range(len(kept)):
                if i == j and reduction != "dense":
                    continue
                norms = kept[i].norm() * kept[j].norm()
                similarity = float(kept[i] @ kept[j] / norms) if norms > 0 else 0.0
                own = 1.0 if kept[i].norm() > 0 else 0.0
                if i == j:
                    similarity = own
                hinges.append(max(0.0, margin - own + similarity))
        per_row.append(sum(hinges))
        counts.append(len(hinges))
    if reduction == "paper":
        return sum(s / c if c else 0.0 for s, c in zip(per_row, counts, strict=True)) / len(counts)
    return sum(per_row) / max(1, sum(counts))


@pytest.fixture
def states() -> torch.Tensor:
    # A common part, so that some pairs are similar enough for the margin to bite and others are not.
    return torch.randn(4, 6, 5, dtype=torch.float64) + 0.8 * torch.randn(5, dtype=torch.float64)


MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]])


@pytest.mark.parametrize("margin", CORNERS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_the_loops(states: torch.Tensor, reduction: str, margin: float) -> None:
    states[2, 1] = 0.0
    masks = [None] if reduction == "dense" else [None, MASK, MASK.bool()]
    for mask in masks:
        loss = contrastive_loss(states, mask, margin, reduction)
        assert loss.shape == ()
        assert float(loss) == pytest.approx(by_loops(states, mask, margin, reduction), abs=1e-12)


def test_reductions_differ_on_ragged_rows(states: torch.Tensor) -> None:
    pairs, paper = (float(contrastive_loss(states, MASK, reduction=r)) for r in ("pairs", "paper"))
    assert abs(pairs - paper) > 1e-3


def test_two_identical_vectors() -> None:
    states = torch.ones(1, 2, 3)
    assert float(contrastive_loss(states)) == pytest.approx(0.5)  # both hinges are the margin itself
    assert float(contrastive_loss(states, margin=-0.5)) == 0.0
    assert float(contrastive_loss(torch.eye(2).unsqueeze(0), reduction="dense")) == pytest.approx(0.25)


def test_padding_is_not_seen(states: torch.Tensor) -> None:
    short = contrastive_loss(states[:, 2:], reduction="paper")
    mask = torch.ones(4, 6)
    mask[:, :2] = 0
    poisoned = states.clone()
    poisoned[:, :2] = float("nan")
    poisoned.requires_grad_()
    loss = contrastive_loss(poisoned, mask, reduction="paper")
    assert torch.equal(loss, short)
    (gradient,) = torch.autograd.grad(loss, poisoned)
    assert gradient[:, :2].eq(0).all()
    assert gradient[:, 2:].isfinite().all()


@pytest.mark.parametrize("reduction", ["pairs", "paper"])
def test_no_pair_at_all_is_zero_with_a_gradient(reduction: str) -> None:
    states = torch.randn(2, 3, 4, requires_grad=True)
    loss = contrastive_loss(states, torch.tensor([[1, 0, 0], [0, 0, 0]]), reduction=reduction)
    loss.backward()
    assert loss.item() == 0.0
    assert states.grad.eq(0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient(states: torch.Tensor, reduction: str) -> None:
    mask = None if reduction == "dense" else MASK
    states.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: contrastive_loss(x, mask, reduction=reduction), states)


def test_zero_vectors_have_a_finite_gradient(states: torch.Tensor) -> None:
    states[0, 0] = 0.0
    states.requires_grad_()
    contrastive_loss(states).backward()
    assert states.grad.isfinite().all()


def test_huge_and_tiny_vectors_have_a_direction(states: torch.Tensor) -> None:
    expected = contrastive_loss(states)
    for factor in (1e30, 1e-30):
        got = contrastive_loss((states * factor).float())
        assert float(got) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"margin": 1.5}, r"margin must lie in \[-1, 1\], got 1.5"),
        ({"margin": float("nan")}, "margin must lie in .*, got nan"),
        ({"reduction": "sum"}, "reduction must be one of pairs, paper, dense; got 'sum'"),
        ({"reduction": "dense", "attention_mask": torch.ones(2, 3)}, "dense.*no attention_mask"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must have shape \(2, 3\), got \(2, 4\)"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contrastive_loss(torch.randn(2, 3, 4), **arguments)


def test_refuses_a_matrix() -> None:
    with pytest.raises(ValueError, match=r"shape \(B, T, D\), got \(3, 4\)"):
        contrastive_loss(torch.randn(3, 4))
