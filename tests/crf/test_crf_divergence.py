"""Entropy and divergence where moves are forbidden: exact against all paths in float64, no gradient of what is."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from simctg_fast.crf.divergence import entropy, kl

NEVER = float("-inf")


@dataclass
class Dense:
    scores: torch.Tensor
    transitions: torch.Tensor
    lengths: torch.Tensor | None

    def step(self, t):
        return self.transitions


@dataclass
class Stepwise(Dense):
    """The same, with a matrix for each item."""

    def step(self, t):
        return self.transitions.expand(len(self.scores), -1, -1)


def log_law(scores, transitions, length):
    """Log-probabilities of all paths of finite score, by name."""
    paths = list(itertools.product(range(scores.shape[1]), repeat=length))
    totals = []
    for path in paths:
        total = sum((scores[t, k] for t, k in enumerate(path)), torch.zeros((), dtype=scores.dtype))
        totals.append(total + sum(transitions[a, b] for a, b in itertools.pairwise(path)))
    live = [n for n, total in enumerate(totals) if total > NEVER]
    law = torch.stack([totals[n] for n in live]).log_softmax(0)
    return {paths[n]: law[i] for i, n in enumerate(live)}


def expected_entropy(p):
    return torch.stack(
        [
            sum((-x * x.exp() for x in log_law(p.scores[b], p.transitions, int(n)).values()), p.scores.new_zeros(()))
            for b, n in enumerate(p.lengths)
        ]
    )


def expected_kl(p, q):
    result = []
    for b, n in enumerate(p.lengths):
        ours, theirs = (log_law(x.scores[b], x.transitions, int(n)) for x in (p, q))
        never = p.scores.new_tensor(NEVER)
        result.append(sum(((x - theirs.get(y, never)) * x.exp() for y, x in ours.items()), p.scores.new_zeros(())))
    return torch.stack(result)


def chain(seed, *, forbidden=0.25, dtype=torch.float64, kind=Dense):
    """Four items of lengths 4..1 with 3 tags, each with a path: tag 0 is allowed throughout."""
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(4, 4, 3, generator=generator, dtype=torch.float64)
    transitions = 2 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
    never = torch.rand(scores.shape, generator=generator) < forbidden
    never[:, :, 0] = False
    table = torch.rand(3, 3, generator=generator) < forbidden
    if seed % 3 == 0:
        table[:, 2] = True  # nothing leads to tag 2
    if seed % 3 == 1:
        table[1, :] = True  # nothing follows tag 1
    table[0, 0] = False
    scores, transitions = scores.masked_fill(never, NEVER), transitions.masked_fill(table, NEVER)
    return kind(scores.to(dtype), transitions.to(dtype), torch.tensor([4, 3, 2, 1]))


def leaves(*chains):
    return [x.requires_grad_() for p in chains for x in (p.scores, p.transitions)]


def check_gradients(actual, expected, inputs, tolerance):
    ours, theirs = (torch.autograd.grad(x.sum(), inputs) for x in (actual, expected))
    for a, b, value in zip(ours, theirs, inputs, strict=True):
        assert (a[value.detach() == NEVER] == 0).all()
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b.nan_to_num(0.0).masked_fill(value == NEVER, 0), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", [Dense, Stepwise])
@pytest.mark.parametrize("seed", range(12))
def test_entropy(seed, kind):
    p = chain(seed, kind=kind)
    inputs = leaves(p)
    actual, expected = entropy(p), expected_entropy(p)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    check_gradients(actual, expected, inputs, 1e-11)
    single = chain(seed, dtype=torch.float32, kind=kind)
    torch.testing.assert_close(entropy(single).double(), expected.detach(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("seed", range(12))
def test_kl(seed):
    p, q = chain(seed), chain(seed + 50)
    # What p allows q allows too, in the main; for odd seeds it forbids things of its own.
    if seed % 2 == 0:
        q.scores = torch.where(q.scores == NEVER, 0.3, q.scores)
        q.transitions = torch.where(q.transitions == NEVER, -0.2, q.transitions)
    inputs = leaves(p, q)
    actual, expected = kl(p, q), expected_kl(p, q)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)
    if seed % 2 == 0:
        assert torch.isfinite(actual).all()
        check_gradients(actual, expected, inputs, 1e-10)
    torch.testing.assert_close(kl(p, p), torch.zeros_like(actual), rtol=0, atol=1e-12)
    single = kl(chain(seed, dtype=torch.float32), Dense(q.scores.float(), q.transitions.float(), q.lengths))
    torch.testing.assert_close(single.double(), expected.detach(), rtol=1e-5, atol=1e-5)


def test_infinite_where_another_forbids():
    p, q = chain(1, forbidden=0), chain(2, forbidden=0)
    q.transitions = q.transitions.clone()
    q.transitions[:, 1] = NEVER
    actual = kl(p, q)
    assert actual[:3].tolist() == [float("inf")] * 3
    assert torch.isfinite(actual[3])  # of length 1
    p.transitions = p.transitions.clone()
    p.transitions[:, 1] = NEVER
    torch.testing.assert_close(kl(p, q), expected_kl(p, q), rtol=0, atol=1e-12)


def test_an_item_without_a_path_is_nan_and_its_mates_are_not():
    p = chain(5, forbidden=0)
    p.scores[1, 1] = NEVER
    result = entropy(p)
    assert torch.isnan(result).tolist() == [False, True, False, False]
    assert torch.isnan(kl(p, p)).tolist() == [False, True, False, False]
    p.scores[1, 1, 0], p.scores[2, 2:] = 0.0, NEVER  # beyond the length
    torch.testing.assert_close(entropy(p), expected_entropy(p), rtol=0, atol=1e-12)


def test_far_apart():
    """Chances that underflow count for nothing, and lengths of 0 and None are lengths."""
    p = chain(7, forbidden=0)
    p.scores = p.scores * 1e5
    torch.testing.assert_close(entropy(p), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    p.lengths = torch.tensor([0, 4, 0, 4])
    assert entropy(p)[::2].tolist() == [0, 0]
    whole = chain(8)
    whole.lengths = torch.full((4,), 4)
    expected, whole.lengths = entropy(whole), None
    assert torch.equal(entropy(whole), expected)


def test_derivatives_of_every_kind():
    lengths = torch.tensor([3, 2])
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 3, 2), (2, 2)) * 2]

    def both(a, b, c, d):
        return torch.cat([entropy(Dense(a, b, lengths)), kl(Dense(a, b, lengths), Dense(c, d, lengths))])

    assert torch.autograd.gradcheck(both, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(both, inputs)
    expected = torch.autograd.grad(both(*inputs).sum(), inputs)
    plain = [x.detach() for x in inputs]
    for actual, wanted in zip(torch.func.grad(lambda *x: both(*x).sum(), (0, 1, 2, 3))(*plain), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
