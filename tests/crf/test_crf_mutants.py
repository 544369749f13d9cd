"""Faults that have been made, or nearly, in code like this: each is put in, and a check has to notice."""

from __future__ import annotations

import pytest
import torch

from simctg_fast import LowRankCRF
from simctg_fast.crf import divergence, low_rank
from simctg_fast.ops import crf_common, crf_filter, crf_sample, crf_stochastic, crf_viterbi

from .. import crf_cases as cases

STEPS = (crf_common, low_rank)
LENGTHS = (crf_filter, crf_viterbi, crf_stochastic, divergence)
transition, inside, pick = crf_common.transition, crf_common.inside, crf_common.pick


def noticed(check, *args, **kwargs) -> None:
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        check(*args, **kwargs)


@pytest.fixture
def everywhere(monkeypatch):
    def patch(name, value, modules=STEPS):
        for module in modules:
            monkeypatch.setattr(module, name, value)

    return patch


def test_nothing_is_noticed_without_a_fault():
    cases.check_laws()
    cases.check_best_paths()
    cases.check_divergence()
    cases.check_frozen_beams()
    cases.check_sampler(draws=10_000)


@pytest.mark.parametrize("check", [cases.check_laws, cases.check_best_paths, cases.check_divergence])
def test_transitions_transposed(everywhere, check):
    everywhere("transition", lambda *args: transition(*args).transpose(1, 2))
    noticed(check)


@pytest.mark.parametrize("check", [cases.check_laws, cases.check_best_paths, cases.check_divergence])
def test_tables_swapped(everywhere, check):
    everywhere("transition", lambda tokens, t, left, right, scale: transition(tokens, t, right, left, scale))
    noticed(check)


@pytest.mark.parametrize("check", [cases.check_laws, cases.check_best_paths, cases.check_divergence])
@pytest.mark.parametrize("shift", [-1, 1])
def test_length_off_by_one(everywhere, check, shift):
    everywhere("inside", lambda lengths, t: inside(lengths, t + shift), LENGTHS)
    noticed(check)


def test_last_slot_by_argmax(monkeypatch):
    calls = []

    def greedy(weights, uniform, dim):
        calls.append(0)
        return weights.argmax(dim) if len(calls) % 4 == 1 else pick(weights, uniform, dim)

    monkeypatch.setattr(crf_sample, "pick", greedy)
    noticed(cases.check_sampler, draws=10_000)


def test_best_score_in_place_of_alpha(monkeypatch):
    def best(tensor, dim):
        return tensor.amax(dim)

    crf, emissions, lengths = cases.case()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "logsumexp", best)
        drawn = crf.sample(emissions, lengths, num_samples=10_000, generator=torch.Generator().manual_seed(0))
    law = cases.enumerated(crf, emissions, lengths)[0].log_probs.exp()
    assert cases.p_value(torch.bincount(cases.codes(drawn.slots[0], 4, 3), minlength=81), law) < 1e-6


def test_temperature_on_emissions_only(everywhere):
    everywhere("transition", lambda tokens, t, left, right, scale: transition(tokens, t, left, right, 1.0))
    noticed(cases.check_laws)
    noticed(cases.check_divergence)


def test_one_uniform_for_all_samples(monkeypatch):
    original = crf_sample.uniforms_ffbs
    monkeypatch.setattr(crf_sample, "uniforms_ffbs", lambda *args: original(*args)[:, :, :1].expand(-1, -1, args[3]))
    noticed(cases.check_sampler, draws=10_000)


def test_one_uniform_for_all_items(monkeypatch):
    original = crf_sample.uniforms_ffbs
    monkeypatch.setattr(crf_sample, "uniforms_ffbs", lambda *args: original(*args)[:1].expand(args[1], -1, -1))
    noticed(cases.check_sampler, draws=10_000)


def test_signed_pointers(monkeypatch):
    """uint8 is needed in full at K = 256."""
    crf = cases.build(256, 8, 256)
    emissions = torch.randn(2, 6, 256)
    expected = crf.viterbi(emissions).slots
    assert int(expected.max()) > 127
    monkeypatch.setattr(crf_viterbi, "pointer_dtype", lambda slots: torch.int8)
    noticed(lambda: torch.testing.assert_close(crf.viterbi(emissions).slots, expected))


@pytest.mark.parametrize("check", [cases.check_laws, cases.check_divergence])
def test_infinity_times_nothing(monkeypatch, check):
    monkeypatch.setattr(divergence, "_lowest", lambda like: float("-inf"))
    monkeypatch.setattr(divergence, "_mean", lambda probability, value: (probability * value).sum(1))
    noticed(check, banned=True)


def test_beams_ranked_again(monkeypatch):
    original = LowRankCRF._potentials

    def again(self, emissions, lengths, mask, beam_tokens, beam_size, temperature=1.0, forced=None):
        return original(self, emissions, lengths, mask, None, beam_size, temperature, forced)

    monkeypatch.setattr(low_rank.LowRankCRF, "_potentials", again)
    noticed(cases.check_frozen_beams)
