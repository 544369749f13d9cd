"""`benchmarks/precision.py` on a tiny model: its table, its perplexity, and what it says of bad arguments."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from simctg_fast import bundled_model_path
from simctg_fast.ops import _backends

from ..repository import repository

ROOT = repository("benchmarks").parent
CONTEXT = 48
LAYERS = 15  # linear ones, of two blocks and the output embedding

pytestmark = pytest.mark.skipif(_backends.extension() is None, reason="needs the C++ extension")


@pytest.fixture
def precision(monkeypatch, tmp_path):
    """The benchmark as a module, on one thread."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("precision")
    monkeypatch.setattr(module, "PROMPT", 8)
    monkeypatch.setattr(module, "PAGE", tmp_path / "precision.md")
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def arguments(folder, tmp_path, *more):
    small = ["--tokens", "120", "--prompts", "2", "--new-tokens", "4", "--threads", "1", "--repeats", "0"]
    return [folder, *small, "--csv", str(tmp_path / "precision.csv"), *more]


def scores_of_whole_windows(folder, text):
    """In float64, every window in one forward."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    scored = []
    for start in range(0, len(text) - CONTEXT + 1, CONTEXT // 2):
        window = text[start : start + CONTEXT]
        with torch.no_grad():
            log_probs = model(window[None]).logits[0, :-1].log_softmax(dim=-1)
        own = log_probs.gather(1, window[1:, None])[:, 0]
        scored.append(own[-(CONTEXT // 2) :] if start else own)
    return torch.cat(scored)


def test_the_table_is_complete_and_right(precision, folder, tmp_path, capsys):
    found = precision.main(arguments(folder, tmp_path, "--write"))
    assert list(found) == sorted(found, key=lambda v: v != precision.REFERENCE)
    available = [variant for variant in precision.VARIANTS if not variant.missing]
    assert set(found) == set(available)
    assert len(available) >= 9

    options = precision.parse(arguments(folder, tmp_path))
    text, prompts, texts, _ = precision.prepare(options)
    windows = (len(text) - CONTEXT) // (CONTEXT // 2) + 1
    assert (options.window, len(text), prompts.shape, len(texts)) == (CONTEXT, 120, (2, 8), 2)
    truth = scores_of_whole_windows(folder, text)
    torch.testing.assert_close(found[precision.TRUTH].log_probs, truth, rtol=0, atol=1e-5)
    for variant, row in found.items():
        allowed = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2, "int8": 2e-1}[variant.weights]
        assert row.perplexity == pytest.approx(math.exp(-truth.mean()), rel=allowed), variant
        if variant.by != precision.OURS:
            assert row.products == 0
        elif variant.weights != "int8":
            assert windows <= precision.WINDOWS  # one batch: the prompt, and a step for each token
            assert row.products == CONTEXT * LAYERS
    ours, theirs = (found[precision.Variant("float32", by)] for by in (precision.OURS, precision.TORCH))
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-4)
    assert {name: (each.same, each.alike) for name, each in ours.agreements.items()} == {
        "greedy": (1.0, 4),
        "contrastive": (1.0, 4),
    }

    out, page = capsys.readouterr().out, precision.PAGE.read_text()
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(precision.VARIANTS)
    assert {line.count("|") for line in table} == {len(precision.HEAD) + 1}
    assert "\n".join(table) in page
    for line in ("MODEL_DIR --write --tokens 120 --prompts 2", "tiny (llama", "How to read it"):
        assert line in page
    assert folder not in page
    assert {variant.by for variant, row in found.items() if not row.agreements} == {precision.FLOAT64}
    assert len((tmp_path / "precision.csv").read_text().splitlines()) == 1 + sum(
        1 + 2 * len(row.agreements) for row in found.values()
    )


def test_a_row_of_ours_that_the_kernels_did_not_make_is_refused(precision, folder, monkeypatch):
    monkeypatch.setattr(precision.Variant, "settings", {"fast_linear": False})
    model, _ = precision.load(folder, precision.REFERENCE)
    with pytest.raises(RuntimeError, match=f"our kernels made 0 of {(CONTEXT - 1) * LAYERS} products"):
        precision.score(model, precision.REFERENCE, torch.arange(CONTEXT) + 5, CONTEXT)


def test_another_token_takes_the_last_candidates_place(precision):
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]]).log_softmax(dim=-1)
    for token, expected in ((4, [0, 4]), (1, [0, 1]), (0, [0, 1])):
        follow = precision.Follow(torch.tensor([[token]]), top_k=2)
        followed = follow(torch.zeros(1, 3, dtype=torch.long), scores)
        assert followed.topk(2).indices.tolist() == [expected]
        torch.testing.assert_close(followed.topk(2).values, scores.topk(2).values)
        assert follow.log_probs.item() == pytest.approx(scores[0, token].item())
        assert follow.same.item() == (token in (0, 1))


def test_a_command_says_its_tokens_and_seconds(precision, folder, capsys):
    precision.command(["generate", folder, "It returns", "-n", "3", "--dtype", "bfloat16"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["tokens"] == 3
    assert found["seconds"] > 0
    assert found["peak_mb"] > 0


def test_arguments(precision, folder, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.touch()
    for more, said in {
        ("no_such_folder",): "MODEL_DIR is 'no_such_folder', must be a folder",
        (str(tmp_path),): f"MODEL_DIR is {str(tmp_path)!r}: ",
        (folder, "--text", str(tmp_path / "none.txt")): "none.txt cannot be read: ",
        (folder, "--text", str(empty)): "empty.txt has 0 tokens (--tokens 4352), needs 48",
        (folder, "--tokens", "47"): "the text has 47 tokens (--tokens 47), needs 48",
        (folder, "--new-tokens", "41"): "--new-tokens is 41, must be at most 40 with this model",
        (folder, "--prompts", "0"): "--prompts is 0, must be at least 1",
        (folder, "--repeats", "-1"): "--repeats is -1, must be at least 0",
    }.items():
        with pytest.raises(SystemExit):
            precision.main(["--new-tokens", "4", "--threads", "1", *more])
        assert said in capsys.readouterr().err
