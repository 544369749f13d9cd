"""Coherence by embeddings: of a callable by hand, of folders against the model's own forward."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
import transformers

from simctg_fast.metrics import embedding_coherence

from ..decoding_models import PAD, VOCABULARY, draw, tokenizer

PROMPTS = ["one", "two", "", "four", "five"]
WRITTEN = ["first", " \n", "third", "fourth", "fifth"]
VECTORS = {"one": [3, 0], "first": [1, 1], "four": [2, 0], "fourth": [-5, 0], "five": [0, 0], "fifth": [1, 2]}


def table(texts):
    return np.array([VECTORS[text] for text in texts], dtype=np.float32)


def test_the_cosine():
    """Length does not count, order does; a blank text has no value, and is not embedded."""
    wanted = [pytest.approx(math.sqrt(0.5)), None, None, pytest.approx(-1.0), 0.0]
    assert embedding_coherence(PROMPTS, WRITTEN, table) == wanted
    assert embedding_coherence(PROMPTS, WRITTEN, lambda texts: torch.tensor(table(texts)) * 1e-30) == wanted
    assert embedding_coherence([], [], table) == []
    assert embedding_coherence([""], ["a"], table) == [None]
    assert embedding_coherence("one", "first", table) == wanted[:1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    options |= {"vocab_size": VOCABULARY, "pad_token_id": PAD, "max_position_embeddings": 160}
    draw(transformers.BertModel(transformers.BertConfig(**options))).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@torch.no_grad()
def states(folder, text, length=None):
    model = transformers.AutoModel.from_pretrained(folder).eval()
    return model(input_ids=tokenizer()(text, return_tensors="pt").input_ids[:, :length])


def cosine(left, right):
    return pytest.approx(float(torch.cosine_similarity(left, right, dim=0)), abs=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_folder(folder, pooling):
    def vector(text):
        found = states(folder, text).last_hidden_state[0]
        return {"mean": found.mean(dim=0), "cls": found[0], "last": found[-1]}[pooling]

    found = embedding_coherence(PROMPTS, WRITTEN, folder, pooling=pooling, batch_size=2)
    for place, pair in enumerate(zip(PROMPTS, WRITTEN, strict=True)):
        assert found[place] == (None if not all(map(str.strip, pair)) else cosine(*map(vector, pair)))


def test_simcse(folder):
    """The pooler's output, of 128 tokens at most."""
    prompts, written = ["one", "x" * 20 + "y" * 130], ["first", "z"]
    found = embedding_coherence(prompts, written, str(folder), paper_compatible=True, batch_size=1)
    together = embedding_coherence(prompts, written, str(folder), paper_compatible=True)
    for place, pair in enumerate(zip(prompts, written, strict=True)):
        wanted = cosine(*(states(folder, text, 128).pooler_output[0] for text in pair))
        assert found[place] == wanted
        assert together[place] == wanted
    whole = cosine(*(states(folder, text).pooler_output[0] for text in (prompts[1], written[1])))
    assert found[1] != whole


def test_no_pooler(tmp_path):
    options = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": VOCABULARY}
    transformers.GPT2Model(transformers.GPT2Config(**options)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="embedder must have a pooler for paper_compatible=True, GPT2Model has none"):
        embedding_coherence(["a"], ["b"], tmp_path, paper_compatible=True)


def test_a_folder_of_sentence_transformers(folder, tmp_path, monkeypatch):
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    parts = [modules.Transformer(str(folder)), modules.Pooling(32, pooling_mode="cls")]
    library.SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path))
    found = embedding_coherence(["one"], ["first"], tmp_path)
    assert found == [cosine(*(states(folder, text).last_hidden_state[0, 0] for text in ("one", "first")))]
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'simctg_fast\[sentence-transformers\]'"):
        embedding_coherence(["one"], ["first"], tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embedder": "princeton-nlp/sup-simcse"}, "embedder must be a local folder of a model .*princeton-nlp"),
        ({"embedder": None}, "embedder must be a local folder of a model .*None"),
        ({"embedder": lambda texts: [[1.0]]}, "embedder must give a vector for each of 3 texts, got shape"),
        ({"embedder": lambda texts: [1.0] * len(texts)}, "embedder must give a vector for each of 3 texts"),
        ({"embedder": lambda texts: [[math.nan]] * len(texts)}, "embedder must give finite vectors"),
        ({"embedder": lambda texts: [[1.0] * len(texts[0])] * len(texts)}, "embedder must give one width, got 3 and 5"),
        ({"prompts": ["a"]}, "prompts must be 5, as many as continuations, got 1"),
        ({"prompts": [3] * 5}, r"prompts\[0\] is int 3"),
        ({"pooling": "none"}, "pooling is 'none', must be one of"),
        ({"max_length": 0}, "max_length must be an integer of at least 1"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        embedding_coherence(**{"prompts": PROMPTS, "continuations": WRITTEN, "embedder": table} | arguments)
