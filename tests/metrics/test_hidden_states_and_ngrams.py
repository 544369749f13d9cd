"""Figures of text, against cases small enough to count by hand."""

from __future__ import annotations

import math

import pytest
import torch

from simctg_fast.metrics import diversity, isotropy, repetition


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [
        ("abcd", 2, 0.0),  # ab bc cd
        ("abab", 2, 1 / 3),  # ab ba ab
        ("aaaaa", 2, 3 / 4),  # aa, four times
        ("aaaaa", 4, 1 / 2),  # aaaa, twice
        ("abcabcabc", 3, 4 / 7),  # abc bca cab abc bca cab abc
        ("abcab", 1, 2 / 5),
        ("abc", 4, 0.0),  # no four tokens, nothing repeats
        ("", 1, 0.0),
    ],
)
def test_repetition(tokens: str, n: int, expected: float) -> None:
    assert repetition(list(tokens), n) == pytest.approx(expected, abs=1e-15)


def test_repetition_takes_token_ids_and_words_alike() -> None:
    assert repetition([5, 6, 5, 6], 2) == repetition(["the", "cat", "the", "cat"], 2) == pytest.approx(1 / 3)


def test_repetition_refuses_an_impossible_n() -> None:
    with pytest.raises(ValueError, match="n must be an integer of at least 1, got 0"):
        repetition([1, 2], 0)


def test_diversity() -> None:
    assert diversity(list("abcdefg")) == 1.0
    # rep-2 = 1 - 2/7, rep-3 = 1 - 2/6, rep-4 = 1 - 2/5
    assert diversity(list("abababab")) == pytest.approx((2 / 7) * (2 / 6) * (2 / 5))
    assert diversity([1] * 100) == pytest.approx(1 / (99 * 98 * 97))


def test_isotropy_of_known_directions() -> None:
    same = torch.tensor([[[1.0, 2.0], [2.0, 4.0], [0.5, 1.0]]])
    assert isotropy(same) == pytest.approx(0.0, abs=1e-12)
    orthogonal = torch.eye(4).unsqueeze(0) * 3
    assert isotropy(orthogonal) == pytest.approx(1.0)
    sixty_degrees = torch.tensor([[[1.0, 0.0], [0.5, math.sqrt(3) / 2]]])
    assert isotropy(sixty_degrees) == pytest.approx(0.5)


def test_isotropy_equals_the_mean_over_pairs_and_leaves_padding_out() -> None:
    states = torch.randn(3, 7, 5, dtype=torch.float64)
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0]])
    states[1, :2] = float("nan")  # padding can hold anything
    means = []
    for row, real in zip(states[:2], mask[:2].bool(), strict=True):
        kept = row[real]
        cosine = torch.nn.functional.cosine_similarity(kept[:, None], kept[None], dim=-1)
        means.append(cosine[~torch.eye(len(kept), dtype=torch.bool)].mean())
    assert isotropy(states, mask) == pytest.approx(1 - float(sum(means)) / 2)


def test_isotropy_needs_two_tokens() -> None:
    with pytest.raises(ValueError, match=r"at least 2 real tokens, got lengths \[1\]"):
        isotropy(torch.randn(1, 1, 4))
