"""MAUVE: what mauve-text is given, by a stand-in for it; the figure itself where it is installed."""

from __future__ import annotations

import importlib.util
import math
import sys
import types

import numpy as np
import pytest
import torch
import transformers

from simctg_fast import bundled_model_path, extract_features
from simctg_fast.metrics import mauve
from simctg_fast.metrics.models.mauve_score import _cleaned
from simctg_fast.text.features import Features

FOLDER = bundled_model_path()
FEATURES = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def asked(monkeypatch):
    """The arguments of every call of a `compute_mauve` that returns 0.123456."""
    calls = []
    module = types.ModuleType("mauve")
    module.compute_mauve = lambda **arguments: calls.append(arguments) or types.SimpleNamespace(mauve=0.123456)
    monkeypatch.setitem(sys.modules, "mauve", module)
    return calls


@pytest.fixture(scope="module")
def loaded():
    return transformers.AutoModel.from_pretrained(FOLDER).eval(), transformers.AutoTokenizer.from_pretrained(FOLDER)


def by_hand(loaded, text, length):
    model, tokenizer = loaded
    with torch.no_grad():
        return model(input_ids=tokenizer(text, return_tensors="pt").input_ids[:, :length]).last_hidden_state[0, -1]


def test_features_are_passed_on(asked):
    assert mauve(FEATURES, FEATURES[:5].numpy(), buckets=3, scaling_factor=2, seed=9) == 0.123456
    (given,) = asked
    assert np.array_equal(given["p_features"], FEATURES)
    assert np.array_equal(given["q_features"], FEATURES[:5])
    assert (given["num_buckets"], given["mauve_scaling_factor"], given["seed"]) == (3, 2, 9)
    assert "featurize_model_name" not in given, "nothing that could be downloaded"
    mauve(FEATURES, FEATURES)
    assert (asked[1]["num_buckets"], asked[1]["mauve_scaling_factor"], asked[1]["seed"]) == ("auto", 5.0, 25)


def test_features_of_ours(asked, loaded):
    features = extract_features(*loaded, ["one text", "and another"], pooling="last")
    mauve(features, features)
    assert np.array_equal(asked[0]["q_features"], features.values)


def test_texts(asked, loaded):
    human, generated = ["Return a new list.", "When the file is open", ""], ["a longer text than those", "x"]
    mauve(human, generated, FOLDER, max_length=3)
    for given, texts in (("p_features", human[:2]), ("q_features", generated)):
        wanted = torch.stack([by_hand(loaded, text, 3) for text in texts])
        torch.testing.assert_close(torch.tensor(asked[0][given]), wanted, rtol=1e-4, atol=1e-4)


def test_the_script(asked, loaded):
    """Pairs are cut to the shorter one's tokens; those whose generated text is blank are dropped."""
    _, tokenizer = loaded
    human = ["Return a new list that holds the items.", "Never used", "When the file , it seems , cannot be opened"]
    generated = ["Return the old one", " ", "An exception is raised, and the original exception is available"]
    assert mauve(human, generated, FOLDER, paper_compatible=True) == 12.35
    pairs = []
    for left, right in ((human[0], generated[0]), (human[2], generated[2])):
        ids = [tokenizer(text).input_ids for text in (left, right)]
        count = min(map(len, ids))
        assert len(ids[0]) != len(ids[1])
        pairs.append([tokenizer.decode(row[:count]).replace(" ,", ",") for row in ids])
    for side, given in enumerate(("p_features", "q_features")):
        wanted = torch.stack([by_hand(loaded, pair[side], 200) for pair in pairs])
        torch.testing.assert_close(torch.tensor(asked[0][given]), wanted, rtol=1e-4, atol=1e-4)


def test_what_the_script_takes_at_most(asked, loaded):
    text = "word " * 300
    mauve([text] * 2, [text + "more"] * 2, FOLDER, paper_compatible=True)
    wanted = by_hand(loaded, text, 200)
    torch.testing.assert_close(torch.tensor(asked[0]["p_features"][0]), wanted, rtol=1e-4, atol=1e-4)


def test_spaces_that_decoding_took_out():
    assert _cleaned("It does n't , he 's here . I 'm ! We 've , you 're ? a ' b") == (
        "It doesn't, he's here. I'm! We've, you're? a'b"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"references": ["a", "b"]}, "model must be a local folder where references or texts are strings, got None"),
        (
            {"references": ["a", "b"], "model": "gpt2-large"},
            "model must be a local folder .*nothing is downloaded.*gpt2",
        ),
        ({"references": ["a"], "model": FOLDER}, "references must hold at least 2 texts, got 1"),
        ({"references": ["a", "", ""], "model": FOLDER}, "references must hold at least 2 texts, got 1"),
        ({"texts": FEATURES[:1]}, "texts must hold at least 2 texts, got 1"),
        ({"texts": FEATURES[:0]}, "texts must hold at least 2 texts, got 0"),
        ({"texts": FEATURES[0]}, r"texts must be .* but texts\[0\] is Tensor"),
        ({"texts": FEATURES[None]}, r"texts must be texts or features \(N, D\), got an array of shape \(1, 8, 4\)"),
        ({"texts": np.array([["a", "b"]])}, r"texts must be texts or features \(N, D\), got"),
        ({"texts": Features(FEATURES, torch.tensor([3, 5]), "none")}, "texts must be one vector a text, got Features"),
        ({"texts": FEATURES[:, :3]}, "texts must have features of width 4, got 3"),
        ({"texts": FEATURES * math.nan}, "texts must have finite features"),
        ({"texts": [1, 2]}, r"texts\[0\] is int 1"),
        ({"buckets": 1}, "buckets must be an integer of at least 2, got 1"),
        ({"scaling_factor": 0}, "scaling_factor must be a number above 0, got 0"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"max_length": 0}, "max_length must be an integer of at least 1"),
        ({"paper_compatible": True}, "references must be a string or a list of strings"),
        (
            {"references": ["a", "b"], "texts": ["a"], "model": FOLDER, "paper_compatible": True},
            "texts must be 2, as many as references, got 1",
        ),
        (
            {"references": ["a", "b"], "texts": ["a", "b"], "paper_compatible": True},
            "model must be a local folder with paper_compatible=True, got None",
        ),
        (
            {"references": ["a", "b"], "texts": ["a", " "], "model": FOLDER, "paper_compatible": True},
            "texts must hold at least 2 texts, got 1",
        ),
    ],
)
def test_refuses(asked, arguments, message):
    with pytest.raises(ValueError, match=message):
        mauve(**{"references": FEATURES, "texts": FEATURES} | arguments)
    assert not asked


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ImportError, match=r"mauve\(\) needs mauve-text: pip install 'simctg_fast\[mauve\]'"):
        mauve(FEATURES, FEATURES)


@pytest.mark.skipif(importlib.util.find_spec("mauve") is None, reason="needs mauve-text")
def test_the_figure():
    """Two clouds far apart share no cluster; one cloud has the curve of equal histograms, whose area is 1."""
    near = torch.randn(200, 6, generator=torch.Generator().manual_seed(1)) + 8 * torch.eye(6)[0]
    far = near - 16 * torch.eye(6)[0]
    assert mauve(near, near, buckets=2) == pytest.approx(1.0, abs=1e-6)
    # exp(-c * KL) along the mixtures w p + (1 - w) q of disjoint p and q: (w^c, (1 - w)^c), area c!^2 / (2c)!
    exact = math.factorial(5) ** 2 / math.factorial(10)
    assert mauve(near, far, buckets=2) == pytest.approx(exact, abs=2e-3)
