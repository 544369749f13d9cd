"""``paper_compatible``: the published script's figures, from an independent restatement of it and by hand."""

from __future__ import annotations

import random

import pytest

from simctg_fast.metrics import diversity, repetition

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "or"]


def rates(texts: list[str]) -> tuple[float, float, float, float]:
    """rep-2, rep-3 and rep-4 in percent, and the diversity as a share, in the script's order of operations."""
    found = []
    for n in (2, 3, 4):
        unique = total = 0
        for text in texts:
            words = text.strip("\n").strip().split()
            seen = []
            start, end = 0, n
            while end < len(words):  # one n-gram short
                seen.append(" ".join(words[start:end]))
                start, end = start + 1, end + 1
            unique, total = unique + len(set(seen)), total + len(seen)
        found.append(round((1 - unique / total) * 100, 2))
    product = (1 - found[0] / 100) * (1 - found[1] / 100) * (1 - found[2] / 100)
    return found[0], found[1], found[2], product


def corpus(seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["  " + " \n".join(rng.choices(WORDS, k=rng.randint(5, 40))) + "\n" for _ in range(rng.randint(1, 12))]


@pytest.mark.parametrize("seed", range(40))
def test_the_script(seed):
    texts = corpus(seed)
    *reps, product = rates(texts)
    assert [repetition(texts, n, paper_compatible=True) for n in (2, 3, 4)] == reps
    assert diversity(texts, paper_compatible=True) == round(product * 100, 2)


def test_by_hand():
    """ "a b a b a b": of ab ba ab ba ab the last is left out, 2 of 4 differ; of aba bab aba bab 2 of 3; abab baba 2."""
    text = "a b a b a b"
    assert [repetition(text, n, paper_compatible=True) for n in (2, 3, 4)] == [50.0, 33.33, 0.0]
    assert diversity(text, paper_compatible=True) == 33.34  # 0.5 * 0.6667 * 1; of rates that are not rounded 33.33
    assert repetition(text.split(), 2) == pytest.approx(1 - 2 / 5)


def test_rates_are_rounded_before_they_are_multiplied():
    differ = 0
    for seed in range(40):
        texts = corpus(seed)
        product = 1.0
        for n in (2, 3, 4):
            grams = [[tuple(words[i : i + n]) for i in range(len(words) - n)] for words in map(str.split, texts)]
            product *= sum(len(set(each)) for each in grams) / sum(map(len, grams))
        differ += round(product * 100, 2) != diversity(texts, paper_compatible=True)
    assert differ > 0, "these corpora show the difference"


def test_counts_are_summed_over_texts_which_do_not_see_each_other():
    loop, other = "x x x x x x x x x", "a b c d"  # 7 pairs, one of them new; 2 pairs, both new
    assert repetition([loop, other], 2, paper_compatible=True) == round((1 - 3 / 9) * 100, 2)
    assert repetition([other, other], 2, paper_compatible=True) == 0.0


@pytest.mark.parametrize("texts", [[], "", [""], ["", "  \n "], "one two", ["one", "two"]])
def test_no_ngram_at_all(texts):
    assert repetition(texts, 2, paper_compatible=True) == 0.0
    assert diversity(texts, paper_compatible=True) == 100.0


def test_a_text_without_ngrams_changes_nothing():
    assert diversity(["a b a b a b a b", "", "a b"], paper_compatible=True) == diversity(
        "a b a b a b a b", paper_compatible=True
    )


@pytest.mark.parametrize("texts", [[1, 2, 3], None, 5, ["a", 3], [["a", "b"]], b"a b"])
def test_tokens_are_no_texts(texts):
    for call in (lambda: repetition(texts, 2, paper_compatible=True), lambda: diversity(texts, paper_compatible=True)):
        with pytest.raises(ValueError, match="texts must be a string or a list of strings"):
            call()


def test_n():
    for n in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match=f"n must be an integer of at least 1, got {n!r}"):
            repetition("a b c", n, paper_compatible=True)
