"""The low-rank CRF against all its paths: probabilities, best paths, divergences, laws of the samplers."""

from __future__ import annotations

import pytest
import torch

from simctg_fast.ops import _backends

from .. import crf_cases as cases

needs_extension = pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")
IMPLS = ("torch", pytest.param("cpu", marks=needs_extension))
bans = pytest.mark.parametrize("banned", [False, True], ids=["free", "banned"])


@pytest.mark.parametrize("impl", IMPLS)
@bans
def test_laws(impl, banned):
    cases.check_laws(impl, banned=banned)


@pytest.mark.parametrize("impl", IMPLS)
@bans
def test_best_paths(impl, banned):
    cases.check_best_paths(impl, banned=banned)


@bans
def test_float64(banned):
    cases.check_laws(dtype=torch.float64, tolerance=1e-12, banned=banned)
    cases.check_best_paths(dtype=torch.float64, tolerance=1e-12, banned=banned)
    cases.check_divergence(dtype=torch.float64, tolerance=1e-12, banned=banned)


@bans
def test_divergence(banned):
    cases.check_divergence("auto", banned=banned)


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_beams(impl):
    cases.check_frozen_beams(impl)


@pytest.mark.parametrize("impl", IMPLS)
@bans
def test_exact_sampler(impl, banned):
    cases.check_sampler(impl, banned=banned)


@pytest.mark.parametrize("impl", IMPLS)
def test_published_sampler(impl):
    cases.check_published_law(impl)


def test_every_instruction_set(isa):
    cases.check_laws("cpu", banned=True)
    cases.check_best_paths("cpu")
    cases.check_sampler("cpu", draws=10_000)
    cases.check_published_law("cpu", draws=10_000)


def test_the_sampler_test_has_power():
    """A law at temperature 1.1 in place of 1 is told apart."""
    crf, emissions, lengths = cases.case()
    drawn = crf.sample(emissions, lengths, num_samples=40_000, temperature=1.1)
    law = cases.enumerated(crf, emissions, lengths)[0].log_probs.exp()
    assert cases.p_value(torch.bincount(cases.codes(drawn.slots[0], 4, 3), minlength=81), law) < 1e-6
