"""The CRF's Triton kernels in the interpreter, against the PyTorch path.

The interpreter has to be chosen before triton is imported, so the checks run in a process of their own.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

from ..processes import run_child
from ..repository import WITH_TESTS

pytest.importorskip("triton")

# Beam, rank and vocabulary that are no power of two; nothing but ones; an item of length 0; the whole vocabulary; none;
# a rank of several slices.
SMALL = ((2, 4, 20, 5, 3), (1, 1, 3, 1, 1), (2, 1, 6, 6, 2), (0, 3, 6, 2, 2), (1, 2, 9, 4, 70))
TILES = (2, 3, 200, 150, 20)  # several tiles a side


def check_operators(batch, length, vocabulary, beam, rank) -> None:
    from simctg_fast import LowRankCRF

    torch.manual_seed(0)
    emissions = torch.randn(batch, length, vocabulary)
    emissions[:1, length - 1, : vocabulary // 2] = float("-inf")
    lengths = torch.tensor([length, length - 1])[:batch]
    models = LowRankCRF(vocabulary, rank, beam, impl="triton"), LowRankCRF(vocabulary, rank, beam, impl="torch")
    models[1].load_state_dict(models[0].state_dict())
    results = []
    for crf in models:
        own = emissions.clone().requires_grad_()
        generator = torch.Generator().manual_seed(4)
        drawn = crf.sample(own, lengths, num_samples=5, generator=generator, temperature=0.8)
        weights = torch.randn(batch, 5, generator=torch.Generator().manual_seed(1))
        (drawn.log_prob * weights).sum().backward()
        noisy = crf.sample(emissions, lengths, num_samples=3, mode="stochastic_viterbi", generator=generator)
        given = crf.sample(
            emissions, lengths, num_samples=2, uniforms=torch.rand(batch, length, 2, generator=generator)
        )
        exact = [drawn.beam_tokens, drawn.slots, crf.viterbi(emissions, lengths).slots, noisy.slots, given.slots]
        near = [
            drawn.log_prob.detach(), own.grad, crf.E1.weight.grad, crf.E2.weight.grad,
            crf.log_partition(emissions, lengths).detach(), crf.marginals(emissions, lengths).probs,
        ]  # fmt: skip
        results.append((exact, near))
    for ours, theirs in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def check_ranges(scale: float, spread: float) -> None:
    """Messages and gradients against float64 where transitions and scores span far more than an exponential does, and
    where bans leave some positions one slot; in groups of steps of any size."""
    from simctg_fast.kernels import crf_filter, crf_transitions
    from simctg_fast.ops.crf_filter import crf_filter as operator
    from simctg_fast.ops.crf_filter import crf_filter_backward
    from simctg_fast.ops.crf_viterbi import crf_viterbi

    torch.manual_seed(int(scale + spread))
    batch, length, beam, vocabulary, rank = 3, 6, 19, 40, 3
    tokens = torch.rand(batch, length, vocabulary).argsort(2)[..., :beam].contiguous()
    left, right = (torch.randn(vocabulary, rank) for _ in range(2))
    left *= scale / (left @ right.T).abs().max()
    scores = spread * (2 * torch.rand(batch, length, beam) - 1)
    scores[torch.rand(scores.shape) < 0.3] = float("-inf")
    scores[0, 2, 1:] = float("-inf")
    scores[:, :, 0] = torch.rand(batch, length) * spread
    scores[1, 1, 0] = -spread
    lengths = torch.tensor([length, 4, length - 1])
    tables = [x.double() for x in (left, right)]
    before = crf_transitions.MEMORY, crf_transitions.STEPS, crf_transitions.CACHE
    results = []
    for memory, steps in ((before[0], before[1]), (4 * beam * 32 * 2, 2), (1, 1)):  # all at once; 2 items; one of each
        crf_transitions.MEMORY, crf_transitions.STEPS, crf_transitions.CACHE = memory, steps, 0
        try:
            messages, norms = operator(scores, tokens, left, right, lengths, 1.0, impl="triton")
            grad = torch.randn(messages.shape, generator=torch.Generator().manual_seed(1))
            back = crf_filter_backward(
                grad, messages, norms, scores, tokens, left, right, lengths, 1.0, True, impl="triton"
            )
            results.append((messages, norms, *back, crf_viterbi(scores, tokens, left, right, lengths, impl="triton")))
        finally:
            crf_transitions.MEMORY, crf_transitions.STEPS, crf_transitions.CACHE = before
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    exact, exact_norms = operator(scores.double(), tokens, *tables, lengths, 1.0, impl="torch")
    exact_back = crf_filter_backward(
        grad.double(), exact, exact_norms, scores.double(), tokens, *tables, lengths, 1.0, True, impl="torch"
    )
    messages, norms, *back, best = results[0]
    assert torch.equal(messages.isinf(), exact.isinf())
    magnitude = float(exact_norms.abs().max()) + scale
    torch.testing.assert_close(messages.double(), exact, rtol=1e-6, atol=4e-7 * magnitude)
    torch.testing.assert_close(norms.double(), exact_norms, rtol=1e-6, atol=4e-7 * magnitude)
    for ours, theirs in zip(back, exact_back, strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-6 * magnitude * float(theirs.abs().max()))
    assert torch.equal(best, crf_viterbi(scores.double(), tokens, *tables, lengths, impl="torch"))
    assert crf_filter.config(beam)["BLOCK_K"] >= beam


RANGES = ((60.0, 1000.0), (400.0, 30.0), (60.0, 1.0), (1.0, 1000.0))  # of transitions, of scores


def check_selection() -> None:
    from simctg_fast.ops.crf_beam import crf_beam_select

    ties, bans = torch.zeros(1, 2, 700), torch.randn(2, 2, 300)
    ties[:, :, ::3] = 1
    bans[:, :, 5:] = float("-inf")
    signed = torch.zeros(1, 1, 900)
    signed[:, :, 400:] = -0.0
    for emissions, beam, lengths in (
        (torch.randn(2, 3, 500), 7, None),
        (torch.randn(1, 2, 40), 40, None),
        (torch.randn(1, 2, 300).bfloat16(), 20, None),
        (torch.randn(1, 2, 300).half(), 20, None),
        (torch.randn(2, 3, 400).transpose(0, 1), 9, torch.tensor([2, 0, 1])),
        (ties, 20, None),
        (bans, 20, torch.tensor([2, 1])),
        (signed, 30, None),
    ):
        ours, theirs = (crf_beam_select(emissions, beam, lengths, impl=impl) for impl in ("triton", "torch"))
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def run(code: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": WITH_TESTS}
    source = f"from tests.crf import test_crf_triton as t; {code}"

    done = run_child([sys.executable, "-W", "ignore", "-c", source], env=environment, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_beam_that_fits_no_tile_is_refused_by_name():
    from simctg_fast.ops.crf_common import choose

    with pytest.raises(ValueError, match="at most 1024 tokens, got 1025; impl='torch' any"):
        choose("triton", torch.zeros(1, 1, 1025))


def test_interpreted():
    run("[t.check_operators(*shape) for shape in t.SMALL]; t.check_selection()")


@pytest.mark.full
def test_edges_interpreted():
    run("from tests import crf_cases; crf_cases.check_edges('triton')")


def test_any_range_and_any_group_of_steps_interpreted():
    run("[t.check_ranges(*r) for r in t.RANGES[:1]]")


@pytest.mark.full
def test_more_ranges_interpreted():
    run("[t.check_ranges(*r) for r in t.RANGES[1:]]")


@pytest.mark.full
def test_several_tiles_interpreted():
    run("t.check_operators(*t.TILES)")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 12, 3000, 256, 32), (3, 5, 700, 300, 33)])
def test_cuda_agrees_with_the_cpu(shape):
    from simctg_fast import LowRankCRF

    batch, length, vocabulary, beam, rank = shape
    torch.manual_seed(0)
    here = LowRankCRF(vocabulary, rank, beam).requires_grad_(False)
    there = LowRankCRF(vocabulary, rank, beam).requires_grad_(False).cuda()
    there.load_state_dict(here.state_dict())
    emissions, lengths = torch.randn(batch, length, vocabulary), torch.randint(0, length + 1, (batch,))
    for mode in ("ffbs", "stochastic_viterbi"):
        ours = here.sample(emissions, lengths, num_samples=9, mode=mode, generator=torch.Generator().manual_seed(1))
        theirs = there.sample(
            emissions.cuda(), lengths.cuda(), num_samples=9, mode=mode, generator=torch.Generator().manual_seed(1)
        )
        same = (ours.tokens == theirs.tokens.cpu()).all(1)  # an edge between two slots may move by a rounding error
        assert same.float().mean() > 0.9
        torch.testing.assert_close(ours.log_prob[same], theirs.log_prob.cpu()[same], rtol=1e-4, atol=1e-3)
    assert torch.equal(
        here.viterbi(emissions, lengths).tokens, there.viterbi(emissions.cuda(), lengths.cuda()).tokens.cpu()
    )
