"""Checks of the low-rank CRF against the enumeration of all paths; several test files and the mutants run them."""

from __future__ import annotations

import pytest
import torch

from simctg_fast import LowRankCRF
from simctg_fast.reference.crf import Paths, enumerate_paths, stochastic_viterbi_law

NEVER = float("-inf")
TEMPERATURES = (0.5, 1.0, 3.0)


def build(vocabulary, rank, beam, impl="torch", *, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    crf = LowRankCRF(vocabulary, rank, beam, impl=impl).to(dtype)
    return crf.requires_grad_(False)


def case(impl="torch", *, dtype=torch.float32, seed=0, banned=False):
    """Five items of lengths 4..0, K = 3 of V = 7, D = 4: 81 paths at most."""
    crf = build(7, 4, 3, impl, dtype=dtype, seed=seed)
    emissions = torch.randn(5, 4, 7, dtype=dtype)
    if banned:  # one live token at one position, two at another: bans reach the beam
        emissions[:, 1, 1:] = NEVER
        emissions[0, 2, :5] = NEVER
    lengths = torch.tensor([4, 3, 2, 1, 0])
    for b in range(5):
        emissions[b, int(lengths[b]) :] = float("nan")  # padding is not looked at
    return crf, emissions, lengths


def enumerated(crf, emissions, lengths, temperature=1.0, beam_tokens=None) -> list[Paths]:
    if beam_tokens is None:
        beam_tokens = crf.beam(emissions, lengths).tokens
    scores = emissions.gather(2, beam_tokens)
    return [
        enumerate_paths(scores[b], beam_tokens[b], crf.E1.weight, crf.E2.weight, int(lengths[b]), temperature)
        for b in range(len(emissions))
    ]


def close(actual, expected, tolerance):
    expected = expected.to(actual.dtype)
    both_never = (actual == NEVER) & (expected == NEVER)
    torch.testing.assert_close(actual[~both_never], expected[~both_never], rtol=0, atol=tolerance)


def check_laws(impl="torch", *, dtype=torch.float32, tolerance=1e-5, banned=False):
    """log Z, marginals, entropy, log-probabilities per path and per token, at every length and temperature."""
    crf, emissions, lengths = case(impl, dtype=dtype, banned=banned)
    beam_tokens = crf.beam(emissions, lengths).tokens
    for temperature in TEMPERATURES:
        laws = enumerated(crf, emissions, lengths, temperature)
        partition = crf.log_partition(emissions, lengths, temperature=temperature)
        marginals = crf.marginals(emissions, lengths, temperature=temperature).probs
        entropy = crf.entropy(emissions, lengths, temperature=temperature)
        for b, law in enumerate(laws):
            length = int(lengths[b])
            close(partition[b], law.log_partition, tolerance)
            close(entropy[b], law.entropy(), tolerance)
            assert (marginals[b, length:] == 0).all()
            if length == 0:
                continue
            close(marginals[b, :length], law.unary_marginals(3), tolerance)
            live = law.log_probs > NEVER
            slots = torch.zeros(4, int(live.sum()), dtype=torch.int64)
            slots[:length] = law.slots[live].T
            tokens = beam_tokens[b : b + 1].gather(2, slots[None])
            result = crf.log_prob(
                emissions[b : b + 1], tokens, lengths[b : b + 1], beam_tokens=beam_tokens[b : b + 1],
                temperature=temperature,
            )  # fmt: skip
            close(result.log_prob[0], law.log_probs[live], tolerance)
            close(result.token_log_probs.sum(1), result.log_prob, tolerance)
            close(result.log_prob.exp().sum(), torch.ones(()), tolerance)
            assert (result.token_log_probs[0, length:] == 0).all()
            for n in range(0, slots.shape[1], 7):
                path = slots[:length, n].tolist()
                expected = torch.stack([law.given_next(path, t) for t in range(length)])
                close(result.token_log_probs[0, :length, n], expected, tolerance)


def check_best_paths(impl="torch", *, dtype=torch.float32, tolerance=1e-5, banned=False):
    """Viterbi and the n best, at every length."""
    crf, emissions, lengths = case(impl, dtype=dtype, banned=banned)
    best = crf.viterbi(emissions, lengths)
    several = crf.kbest(emissions, lengths, n=12)
    for b, law in enumerate(enumerated(crf, emissions, lengths)):
        length = int(lengths[b])
        order = law.scores.sort(descending=True, stable=True)
        live = int((order.values[:12] > NEVER).sum())
        close(best.score[b], order.values[0], tolerance)
        close(best.position_scores[b].sum(), best.score[b], tolerance)
        assert best.slots[b, :length].tolist() == law.slots[order.indices[0]].tolist()
        assert (best.slots[b, length:] == -1).all()
        assert (best.tokens[b, length:] == 0).all()
        assert (best.position_scores[b, length:] == 0).all()
        close(several.score[b, :live], order.values[:live], tolerance)
        assert (several.score[b, live:] == NEVER).all()
        assert several.slots[b, :length, :live].T.tolist() == law.slots[order.indices[:live]].tolist()
        assert (several.slots[b, :, live:] == -1).all()


def check_divergence(impl="torch", *, dtype=torch.float32, tolerance=1e-5, banned=False):
    """KL to another model with other emissions, on shared beams."""
    crf, emissions, lengths = case(impl, dtype=dtype, banned=banned)
    other, more, _ = case(impl, dtype=dtype, seed=1)
    beam_tokens = crf.beam(emissions, lengths).tokens
    for temperature in TEMPERATURES:
        actual = crf.kl(other, emissions, more, lengths=lengths, temperature=temperature)
        ours = enumerated(crf, emissions, lengths, temperature)
        theirs = enumerated(other, more, lengths, temperature, beam_tokens)
        for b in range(5):
            weight = ours[b].log_probs.exp()
            difference = torch.where(weight > 0, ours[b].log_probs - theirs[b].log_probs, 0)
            close(actual[b], (weight * difference).sum(), tolerance)


def check_frozen_beams(impl="torch", *, tolerance=1e-5):
    """Log-probabilities under new emissions on the old beams, though the new best tokens are others."""
    crf, emissions, lengths = case(impl)
    drawn = crf.sample(emissions, lengths, num_samples=6, generator=torch.Generator().manual_seed(1))
    moved = torch.where(emissions.isnan(), emissions, -emissions)
    assert not torch.equal(crf.beam(moved, lengths).tokens[0], drawn.beam_tokens[0])
    result = crf.log_prob(moved, drawn.tokens, lengths, beam_tokens=drawn.beam_tokens)
    for b, law in enumerate(enumerated(crf, moved, lengths, beam_tokens=drawn.beam_tokens)):
        length = int(lengths[b])
        for n in range(6):
            same = (law.slots == drawn.slots[b, :length, n]).all(1)
            close(result.log_prob[b, n], law.log_probs[same][0], tolerance)


def check_edges(impl="torch"):
    """What is at the edge of what is allowed, the same on every backend."""
    crf, emissions, lengths = case(impl)
    crf.requires_grad_()
    emissions = emissions.nan_to_num(0.0)
    with pytest.raises(ValueError, match=r"emissions has shape \(5, 0, 7\), must be \(batch, length >= 1, 7\)"):
        crf.viterbi(emissions[:, :0])

    # An empty batch, and items of length 0: their one path is the empty one.
    targets = torch.zeros(5, 4, dtype=torch.int64)
    for own, n in ((emissions[:0], None), (emissions[:0], lengths[:0]), (emissions[:2], lengths[:2] * 0)):
        batch = len(own)
        assert crf.nll(own, targets[:batch], n).item() == 0
        assert (crf.nll(own, targets[:batch], n, reduction="none") == 0).all()
        for method in (crf.log_partition, crf.entropy):
            assert torch.equal(method(own, n), torch.zeros(batch))
        assert torch.equal(crf.kl(crf, own, lengths=n), torch.zeros(batch))
        assert torch.equal(crf.marginals(own, n).probs, torch.zeros(batch, 4, 3))
        best = crf.viterbi(own, n)
        assert torch.equal(best.score, torch.zeros(batch))
        assert torch.equal(best.slots, torch.full((batch, 4), -1))
        for mode in ("ffbs", "stochastic_viterbi"):
            assert torch.equal(crf.sample(own, n, num_samples=2, mode=mode).log_prob, torch.zeros(batch, 2))
        if impl != "triton":
            assert torch.equal(crf.kbest(own, n, n=2).score, torch.tensor([[0.0, NEVER]]).expand(batch, -1))

    # A banned target: no probability, and in a beam of one nothing else is there.
    banned = emissions.clone()
    banned[1, 2, 0] = NEVER
    with pytest.raises(ValueError, match=r"emissions\[1, 2\] bans every token of the beam"):
        crf.nll(banned, targets, beam_size=1)
    own = banned.clone().requires_grad_()
    nll = crf.nll(own, targets, reduction="none")
    assert torch.isinf(nll).tolist() == [False, True, False, False, False]
    assert torch.isfinite(torch.autograd.grad(nll[torch.tensor([0, 2, 3, 4])].sum(), own)[0]).all()
    assert crf.nll(banned, targets).item() == float("inf")

    # A beam wider than the vocabulary is the vocabulary.
    whole, wide = (crf.beam(emissions, lengths, beam_size=size) for size in (7, 1000))
    assert torch.equal(whole.tokens, wide.tokens)
    assert torch.equal(
        crf.log_partition(emissions, lengths, beam_size=7), crf.log_partition(emissions, lengths, beam_size=1000)
    )

    # Temperatures are divided by.
    for temperature in (1e-320, 0.0, -1.0, float("nan"), float("inf")):
        for method in (crf.log_partition, crf.entropy, crf.marginals, crf.sample):
            with pytest.raises(ValueError, match=r"temperature is .*, must be positive and finite, at least 1e-20"):
                method(emissions, lengths, temperature=temperature)
        with pytest.raises(ValueError, match=r"temperature is .*, must be positive and finite, at least 1e-20"):
            crf.sample(emissions, lengths, mode="stochastic_viterbi", temperature=temperature)
    best = crf.viterbi(emissions, lengths).tokens
    for mode in ("ffbs", "stochastic_viterbi"):
        cold = crf.sample(emissions, lengths, temperature=1e-20, mode=mode)
        assert torch.equal(cold.tokens.squeeze(2), best)
        assert torch.isfinite(cold.log_prob).all()
    assert torch.equal(crf.entropy(emissions, lengths, temperature=1e-20), torch.zeros(5))


# ---- samplers --------------------------------------------------------------------------------------------------------


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's chi-square test; cells too rare to count on their own are taken together."""
    counts, expected = counts.double(), probabilities.double() * counts.sum()
    assert counts[expected == 0].sum() == 0, "drew what cannot be drawn"
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(counts) < 2:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


def codes(slots: torch.Tensor, length: int, size: int) -> torch.Tensor:
    """Number of each path `(T, N)` in the order of `enumerate_paths`."""
    weights = size ** torch.arange(length - 1, -1, -1)
    return (slots[:length] * weights[:, None]).sum(0)


def check_sampler(impl="torch", *, draws=40_000, banned=False):
    """The law of exact samples, at two temperatures and every length; pairs of samples and of items are independent."""
    crf, emissions, lengths = case(impl, banned=banned)
    for seed, temperature in enumerate((1.0, 0.5)):
        generator = torch.Generator().manual_seed(seed)
        drawn = crf.sample(emissions, lengths, num_samples=draws, temperature=temperature, generator=generator)
        for b, law in enumerate(enumerated(crf, emissions, lengths, temperature)):
            length = int(lengths[b])
            assert (drawn.slots[b, length:] == -1).all()
            if length == 0:
                continue
            code = codes(drawn.slots[b], length, 3)
            counts = torch.bincount(code, minlength=len(law.scores))
            probabilities = law.log_probs.exp()
            assert p_value(counts, probabilities) > 1e-6
            variation = (counts / draws - probabilities).abs().sum() / 2
            assert variation < 2 * (probabilities.clamp(min=1e-12) / draws).sqrt().sum() * 0.4 + 1e-3
            close(drawn.log_prob[b], law.log_probs[code], 1e-5)
            pairs = code[0::2] * len(law.scores) + code[1::2]
            joint = (probabilities[:, None] * probabilities[None]).flatten()
            assert p_value(torch.bincount(pairs, minlength=len(joint)), joint) > 1e-6
    twins = emissions[:1].expand(2, -1, -1)
    drawn = crf.sample(twins, num_samples=draws, generator=torch.Generator().manual_seed(9))
    probabilities = enumerated(crf, twins[:1], torch.tensor([4]))[0].log_probs.exp()
    pairs = codes(drawn.slots[0], 4, 3) * 81 + codes(drawn.slots[1], 4, 3)
    assert p_value(torch.bincount(pairs, minlength=81 * 81), (probabilities[:, None] * probabilities).flatten()) > 1e-6


def check_published_law(impl="torch", *, draws=40_000):
    """The law of the published sampler, by enumeration of its tables of back-pointers."""
    for size, length, temperature in ((2, 5, 1.0), (2, 3, 0.5), (3, 3, 1.0)):
        crf = build(6, 3, size, impl, seed=size + length)
        emissions = torch.randn(1, length, 6)
        beam = crf.beam(emissions)
        law = enumerated(crf, emissions, torch.tensor([length]))[0]
        tokens = beam.tokens[0]
        edges = [crf.E1.weight[tokens[t]] @ crf.E2.weight[tokens[t + 1]].T for t in range(length - 1)]
        probabilities = stochastic_viterbi_law(law, edges, beam.emissions[0], temperature)
        drawn = crf.sample(
            emissions, num_samples=draws, mode="stochastic_viterbi", temperature=temperature,
            generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
        code = codes(drawn.slots[0], length, size)
        assert p_value(torch.bincount(code, minlength=len(probabilities)), probabilities) > 1e-6
        close(drawn.log_prob[0], law.log_probs[code], 1e-5)
