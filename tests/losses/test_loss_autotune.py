"""Autotuning of the losses' kernels: off unless asked for, once a kind of problem, never in deterministic mode."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from simctg_fast.kernels import _launch
from simctg_fast.kernels._launch import Config, launch, set_autotune, size_class

FROZEN = Config(32, 8, 3)
CPU = torch.device("cpu")


@pytest.fixture
def tuning(monkeypatch):
    """Autotuning on, with a clock that only launches move: `cost` says how far."""
    now = itertools.count()
    state = {"time": 0.0}
    monkeypatch.setattr(_launch.time, "perf_counter", lambda: state["time"] + 0.0 * next(now))
    set_autotune(True)
    yield state
    set_autotune(False)


def recorder(state, cost, limit=None):
    launched = []

    def run(config: Config) -> None:
        launched.append(config)
        if limit is not None and config.num_stages > limit:
            from triton.runtime.errors import OutOfResources

            raise OutOfResources(300_000, 232_448, "shared memory")
        state["time"] += cost(config)

    return launched, run


def test_off_unless_asked_for():
    launched, run = recorder({"time": 0.0}, lambda config: 1.0)
    launch("kind", FROZEN, run, CPU)
    assert launched == [FROZEN]


def test_the_fastest_is_kept_for_its_kind(tuning):
    launched, run = recorder(tuning, lambda config: 1.0 if config.num_stages == 2 else 2.0)
    launch("kind", FROZEN, run, CPU)
    assert len(set(launched)) > 4
    assert launched[-1] == Config(32, 8, 2)
    launched.clear()
    launch("kind", FROZEN, run, CPU)
    assert launched == [Config(32, 8, 2)]
    launched.clear()
    launch("another", FROZEN, run, CPU)
    assert len(launched) > 1


def test_the_frozen_one_wins_a_tie_and_what_does_not_fit_is_passed_over(tuning):
    launched, run = recorder(tuning, lambda config: 1.0)
    launch("tie", FROZEN, run, CPU)
    assert launched[-1] == FROZEN
    launched, run = recorder(tuning, lambda config: 1.0 / config.num_stages, limit=2)
    launch("fits", FROZEN, run, CPU)
    assert launched[-1] == Config(32, 8, 2)


def test_never_in_deterministic_mode(tuning):
    launched, run = recorder(tuning, lambda config: 1.0 / config.num_stages)
    torch.use_deterministic_algorithms(True)
    try:
        launch("kind", FROZEN, run, CPU)
    finally:
        torch.use_deterministic_algorithms(False)
    assert launched == [FROZEN]


def test_lengths_of_one_class_share_a_configuration():
    assert [size_class(n) for n in (0, 1, 2, 3, 128, 129, 1024)] == [1, 1, 2, 4, 128, 256, 1024]
