"""distinct-n, rep and wrep, the compression ratio and the bootstrap, by hand and against plain restatements."""

from __future__ import annotations

import itertools
import math
import random
import zlib

import numpy as np
import pytest
import torch

from simctg_fast.metrics import (
    bootstrap_interval,
    compression_ratio,
    corpus_distinct_n,
    distinct_n,
    mean_over_texts,
    repetition,
    token_repetition,
    wrong_token_repetition,
)

# ---- distinct-n ------------------------------------------------------------------------------------------------------


def test_distinct_by_hand():
    tokens = list("abab")  # ab ba ab: two of three pairs, over four tokens
    assert distinct_n(tokens, 2) == 2 / 4
    assert distinct_n(tokens, 2, per="ngrams") == 2 / 3
    assert distinct_n(tokens, 1) == distinct_n(tokens, 1, per="ngrams") == 2 / 4
    assert corpus_distinct_n([tokens, list("abc")], 2) == 3 / 7  # ab ba bc
    assert corpus_distinct_n([tokens, list("abc")], 2, per="ngrams") == 3 / 5


def test_no_ngram_spans_two_texts():
    assert corpus_distinct_n([["a"], ["b"]], 2) == 0.0
    assert corpus_distinct_n([list("ab"), list("ab")], 2) == 1 / 4


@pytest.mark.parametrize("seed", range(10))
def test_distinct_and_repetition_add_up_over_ngrams(seed):
    rng = random.Random(seed)
    tokens = rng.choices(range(5), k=rng.randint(4, 50))
    for n in (1, 2, 3, 4):
        assert distinct_n(tokens, n, per="ngrams") == pytest.approx(1 - repetition(tokens, n))
        grams = [tokens[i : i + n] for i in range(len(tokens) - n + 1)]
        assert distinct_n(torch.tensor(tokens), n) == len({str(each) for each in grams}) / len(tokens)


def test_distinct_of_little():
    assert distinct_n([], 1) == distinct_n([1], 2) == corpus_distinct_n([], 1) == corpus_distinct_n([[], []], 2) == 0.0
    assert corpus_distinct_n([[1, 2], []], 2) == 1 / 2


def test_distinct_refuses():
    for n in (0, 1.0, True, None):
        with pytest.raises(ValueError, match="n must be an integer of at least 1"):
            distinct_n([1, 2], n)
    with pytest.raises(ValueError, match="per is 'words', must be one of 'tokens', 'ngrams'"):
        distinct_n([1, 2], 1, per="words")
    with pytest.raises(TypeError, match="texts must be a list of token lists, got the string"):
        corpus_distinct_n("a b c", 1)
    with pytest.raises(TypeError, match="tokens must be a sequence"):
        corpus_distinct_n([1, 2], 1)


# ---- rep and wrep ----------------------------------------------------------------------------------------------------


def shares(predictions: list[int], targets: list[int], window: int) -> tuple[float, float]:
    """The paper's sums: I[ŷ_t in the ℓ targets before t], and with I[ŷ_t is not y_t] beside it."""
    rep = wrep = 0
    for place, token in enumerate(predictions):
        before = [targets[earlier] for earlier in range(place) if place - earlier <= window]
        rep += token in before
        wrep += token in before and token != targets[place]
    return rep / len(predictions), wrep / len(predictions)


@pytest.mark.parametrize("seed", range(20))
def test_token_repetition(seed):
    rng = random.Random(seed)
    count = rng.randint(1, 30)
    predictions, targets = (rng.choices(range(8), k=count) for _ in range(2))
    for window in (1, 2, 3, 7, 128):
        rep, wrep = shares(predictions, targets, window)
        assert token_repetition(predictions, window, targets) == pytest.approx(rep)
        assert wrong_token_repetition(predictions, targets, window) == pytest.approx(wrep)
        assert token_repetition(predictions, window) == pytest.approx(shares(predictions, predictions, window)[0])


def test_the_window_ends_where_it_says():
    tokens = [9, 1, 2, 3, 9]  # the 9s are four apart
    assert token_repetition(tokens, 3) == 0.0
    assert token_repetition(tokens, 4) == 1 / 5
    long = [0, *range(1, 129), 0]
    assert token_repetition([*long[:-2], 0]) == 1 / 129, "the default sees 128 back"
    assert token_repetition(long) == 0.0


def test_a_right_repetition_is_not_wrong():
    references = [1, 2, 1, 2]
    assert token_repetition(references, 128, references) == 1 / 2
    assert wrong_token_repetition(references, references) == 0.0
    # at the last two places 2 was read before: wrong at the third, right at the fourth
    assert wrong_token_repetition([5, 5, 2, 2], references) == 1 / 4
    # a model repeats what it has read, not what it would have said
    assert token_repetition([5, 5, 5, 5], 128, references) == 0.0


def test_token_repetition_refuses():
    assert token_repetition([]) == wrong_token_repetition([], []) == 0.0
    for window in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match="window must be an integer of at least 1"):
            token_repetition([1, 2], window)
        with pytest.raises(ValueError, match="window must be an integer of at least 1"):
            wrong_token_repetition([1], [1], window)
    with pytest.raises(ValueError, match="references must hold 2 tokens, one for each of tokens, got 3"):
        wrong_token_repetition([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="references must hold 2 tokens"):
        token_repetition([1, 2], 3, [])
    with pytest.raises(TypeError, match="references must be a sequence"):
        token_repetition([1, 2], 3, 5)


# ---- compression -----------------------------------------------------------------------------------------------------


def test_compression():
    text = "Zürich " * 50  # ü is two bytes
    assert compression_ratio(text) == (8 * 50) / len(zlib.compress(text.encode("utf-8"), 9))
    assert compression_ratio(["ab", "cd"]) == compression_ratio("ab cd")
    assert compression_ratio("x" * 1000) > 10 * compression_ratio("".join(map(chr, range(33, 120))))
    assert compression_ratio(text, 1) == 400 / len(zlib.compress(text.encode(), 1))
    assert compression_ratio("\ud800") == 3 / len(zlib.compress(b"\xed\xa0\x80", 9))


def test_compression_refuses():
    assert compression_ratio("") == compression_ratio([]) == 0.0
    for level in (0, 10, 1.5, True, -1):
        with pytest.raises(ValueError, match="level must be an integer from 1 to 9"):
            compression_ratio("abc", level)
    for texts in (None, 3, b"abc", ["a", None]):
        with pytest.raises(ValueError, match="texts must be a string or a list of strings"):
            compression_ratio(texts)


# ---- over texts ------------------------------------------------------------------------------------------------------


def test_the_mean_leaves_out_what_has_no_value():
    assert mean_over_texts([1.0, None, 3.0]) == 2.0
    assert mean_over_texts([]) is None
    assert mean_over_texts([None]) is None
    assert mean_over_texts(np.array([1, 2])) == mean_over_texts(torch.tensor([1.0, 2.0])) == 1.5


def test_the_interval_of_every_resample():
    """Two values: the mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4; quartiles of it are known."""
    assert bootstrap_interval([0.0, 1.0], 0.95) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], 0.4, resamples=100_000) == (0.5, 0.5)


def test_the_interval_is_that_of_all_samples():
    values = [0.0, 1.0, 5.0, 2.0]
    means = sorted(sum(each) / 4 for each in itertools.product(values, repeat=4))
    low, high = bootstrap_interval(values, 0.8, resamples=200_000, seed=3)
    assert low == pytest.approx(np.quantile(means, 0.1), abs=0.03)
    assert high == pytest.approx(np.quantile(means, 0.9), abs=0.03)


def test_the_interval_covers():
    rng = random.Random(0)
    hits = 0
    for trial in range(200):
        low, high = bootstrap_interval([rng.gauss(3, 2) for _ in range(40)], 0.9, resamples=400, seed=trial)
        hits += low <= 3 <= high
    assert 165 <= hits <= 195


def test_the_interval_is_deterministic_and_of_any_type(monkeypatch):
    values = [0.3, None, 0.9, 0.5, 0.1]
    first = bootstrap_interval(values, resamples=500, seed=7)
    assert bootstrap_interval(iter(values), resamples=500, seed=7) == first
    assert bootstrap_interval(np.array([0.3, 0.9, 0.5, 0.1]), resamples=500, seed=np.int64(7)) == first
    assert bootstrap_interval(values, resamples=500, seed=8) != first
    monkeypatch.setattr("simctg_fast.metrics.bootstrap._DRAWS", 9)  # two rows of four at a time
    assert bootstrap_interval(values, resamples=500, seed=7) == first


def test_one_value_has_no_interval():
    assert bootstrap_interval([]) is None
    assert bootstrap_interval([0.5]) is None
    assert bootstrap_interval([0.5, None]) is None
    assert bootstrap_interval([0.5, 0.5]) == (0.5, 0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, "x", True, [1.0]])
def test_values_that_cannot_be_averaged(value):
    for function in (bootstrap_interval, mean_over_texts):
        with pytest.raises(ValueError, match=r"values\[1\] must be a finite number, or None for no value"):
            function([1.0, value])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("confidence", [0, 1, -0.1, 95, math.nan, True, None]),
        ("resamples", [0, 1.5, True, None]),
        ("seed", [-1, 0.5, None]),
        ("values", ["abc", 3, None]),
    ],
)
def test_interval_refuses(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} must be"):
            bootstrap_interval(**{"values": [1.0, 2.0], name: value})
