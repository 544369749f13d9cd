"""Log-probabilities of batches: those of each row alone, whatever it was padded with, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from simctg_fast.metrics import (
    log_probabilities,
    log_probability_coherence,
    log_probability_per_byte,
    perplexity,
)
from simctg_fast.metrics.models import pairs

from ..decoding_models import VOCABULARY, build, shared, tokenizer

DECODERS = ["gpt2", "llama", "bloom", "mamba"]
PAIRS = ["t5", "bart"]
LENGTHS = [(3, 5), (9, 1), (1, 7), (4, 0), (2, 12)]  # of prompts and rows


def rows_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


PROMPTS, ROWS = rows_of([a for a, _ in LENGTHS]), rows_of([b for _, b in LENGTHS], 1)


@torch.no_grad()
def alone(model, prompt, row):
    """One row, no mask, the whole softmax; a decoder's from the text, an encoder-decoder's behind its start token."""
    if not row:
        return []
    if model.config.is_encoder_decoder:
        start = [model.config.decoder_start_token_id, *row[:-1]]
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([start])).logits[0]
        begin = 0
    else:
        logits = model(input_ids=torch.tensor([prompt + row]), use_cache=False).logits[0]
        begin = len(prompt) - 1
    table = logits.double().softmax(dim=-1).log()
    return [float(table[begin + place, token]) for place, token in enumerate(row)]


def same(found, wanted, tolerance):
    assert [len(each) for each in found] == [len(each) for each in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float64
        assert ours.tolist() == pytest.approx(theirs, abs=tolerance)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("name", [*DECODERS, *PAIRS])
def test_rows_are_what_they_are_alone(name, batch_size):
    model = build(name).double()
    wanted = [alone(model, prompt, row) for prompt, row in zip(PROMPTS, ROWS, strict=True)]
    same(log_probabilities(model, ROWS, PROMPTS, batch_size=batch_size), wanted, 1e-9)


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_float32(name):
    model, exact = build(name), build(name).double()
    wanted = [alone(exact, prompt, row) for prompt, row in zip(PROMPTS, ROWS, strict=True)]
    same(log_probabilities(model, ROWS, PROMPTS), wanted, 2e-4)


def test_without_prompts_the_first_token_is_given():
    model = build("llama").double()
    rows = [*ROWS, [7]]
    wanted = [alone(model, row[:1], row[1:]) for row in rows]
    same(log_probabilities(model, [torch.tensor(row) for row in rows]), wanted, 1e-9)


PIECES = [
    ("metrics.models.log_probabilities._SOFTMAX", 1),
    ("metrics.models.log_probabilities._SOFTMAX", 2 * VOCABULARY),
    ("text.asked_logits._LOGITS", 1),
]


@pytest.mark.parametrize(("name", "value"), PIECES)
def test_pieces_change_nothing(name, value, monkeypatch):
    model = build("gpt2").double()
    wanted = log_probabilities(model, ROWS, PROMPTS)
    sizes = []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    monkeypatch.setattr(f"simctg_fast.{name}", value)
    same(log_probabilities(model, ROWS, PROMPTS), [each.tolist() for each in wanted], 1e-12)
    assert sizes == ([1] * 4 if name.endswith("_LOGITS") else [4]), "the row without tokens is not run"


def test_only_the_positions_that_are_scored_have_logits():
    model, shapes = shared("gpt2"), []
    hook = model.register_forward_hook(lambda _, args, out: shapes.append(out.logits.shape))
    try:
        log_probabilities(model, [[5, 6], [7]], [[3] * 20, [4] * 20])
    finally:
        hook.remove()
    assert shapes == [(2, 2, VOCABULARY)]


def test_the_mode_of_the_model_is_left():
    model = build("gpt2", resid_pdrop=0.5).train()
    first = log_probabilities(model, ROWS, PROMPTS)
    assert model.training
    same(log_probabilities(model, ROWS, PROMPTS), [each.tolist() for each in first], 0)
    assert not first[0].requires_grad


def test_nothing_to_score():
    assert log_probabilities(shared("gpt2"), [], []) == log_probabilities(shared("gpt2"), []) == []
    assert [len(each) for each in log_probabilities(shared("gpt2"), [[], [3]])] == [0, 0]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("gpt2", {"rows": [[3]], "prompts": [[]]}, r"prompts\[0\] must have at least one token"),
        ("gpt2", {"rows": [[3]], "prompts": []}, "prompts must be 1, as many as rows, got 0"),
        ("gpt2", {"rows": [[3, 98]]}, r"rows\[0\] must be ids below 98, the vocabulary, got 98"),
        ("gpt2", {"rows": [[3]], "prompts": [[100]]}, r"prompts\[0\] must be ids below 98"),
        ("gpt2", {"rows": [[3], [3, -1]]}, r"rows\[1\] must be a list of token ids"),
        ("gpt2", {"rows": [[3.0]]}, r"rows\[0\] must be a list of token ids"),
        ("gpt2", {"rows": "abc"}, "rows must be a list of lists"),
        ("gpt2", {"rows": ["abc"]}, r"rows\[0\] must be a list of token ids"),
        ("gpt2", {"rows": [[3] * 1025]}, r"rows\[0\] has 1025 tokens with its prompt, must be at most 1024"),
        ("gpt2", {"rows": [[3] * 1000], "prompts": [[3] * 25]}, r"rows\[0\] has 1025 tokens with its prompt"),
        ("bart", {"rows": [[3] * 3], "prompts": [[3] * 257]}, r"rows\[0\] has 257 tokens with its prompt, .* 256"),
        ("bart", {"rows": [[3]]}, "prompts must be given to an encoder-decoder"),
        ("gpt2", {"rows": [[3]], "batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ("gpt2", {"rows": [[3]], "batch_size": 2.0}, "batch_size must be an integer of at least 1, got 2.0"),
    ],
)
def test_refuses(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        log_probabilities(shared(name), **arguments)


def test_nan_is_not_handed_on():
    model = build("gpt2")
    torch.nn.init.constant_(model.transformer.h[0].mlp.c_proj.weight, math.nan)
    with pytest.raises(ValueError, match=r"rows\[1\] must have a probability, but the model's logits"):
        log_probabilities(model, [[], [3, 4]])


# ---- coherence -------------------------------------------------------------------------------------------------------

TEXTS = ["The sun", "x", "a longer prompt than the others"]
WRITTEN = [" rises.", "", "  "]


def encoded(text):
    return tokenizer()(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_coherence_is_the_mean_over_tokens(name):
    model = build(name).double()
    found = log_probability_coherence(model, tokenizer(), TEXTS, WRITTEN, batch_size=2)
    by_byte = log_probability_per_byte(model, tokenizer(), TEXTS, WRITTEN)
    for place, (prompt, text) in enumerate(zip(TEXTS, WRITTEN, strict=True)):
        wanted = alone(model, encoded(prompt), encoded(text))
        if not text:
            assert found[place] is None
            assert by_byte[place] is None
            continue
        assert found[place] == pytest.approx(sum(wanted) / len(wanted), abs=1e-9)
        assert by_byte[place] == pytest.approx(sum(wanted) / len(text.encode()), abs=1e-9)
    ids = log_probability_coherence(model, None, [*map(encoded, TEXTS)], [*map(encoded, WRITTEN)])
    assert ids[:2] == [pytest.approx(found[0]), None]


def test_coherence_of_the_script():
    """Beginning of text, the prompt, the continuation, each tokenized alone; blank continuations have no value."""
    model = build("gpt2").double()
    found = log_probability_coherence(model, tokenizer(), TEXTS, WRITTEN, paper_compatible=True)
    wanted = alone(model, [1, *encoded(TEXTS[0])], encoded(WRITTEN[0]))
    assert found == [pytest.approx(sum(wanted) / len(wanted), abs=1e-9), None, None]
    plain = log_probability_coherence(model, tokenizer(), TEXTS, WRITTEN)
    assert plain[2] is not None
    assert plain[0] != pytest.approx(found[0], abs=1e-6), "this tokenizer puts no beginning before a text"


def test_an_empty_prompt_is_the_beginning_of_text():
    model = build("gpt2").double()
    wanted = alone(model, [1], encoded("ab"))
    for paper_compatible in (False, True):
        found = log_probability_coherence(model, tokenizer(), [""], ["ab"], paper_compatible=paper_compatible)
        assert found == [pytest.approx(sum(wanted) / 2, abs=1e-9)]


class Bracketing:
    """As BERT's tokenizer: a token before a text and one behind it."""

    bos_token_id, eos_token_id, sep_token_id = None, None, 2

    def __call__(self, texts, add_special_tokens=True, **_):
        rows = [encoded(text) for text in texts]
        return {"input_ids": [[1, *row, 2] if add_special_tokens else row for row in rows]}


def test_the_end_behind_a_prompt_is_left_out():
    model = build("gpt2").double()
    assert pairs.pair_rows(model, Bracketing(), ["ab", ""], ["c", "d"])[0] == [[1, *encoded("ab")], [1]]
    assert pairs.pair_rows(build("t5"), Bracketing(), ["ab"], ["c"])[0] == [[1, *encoded("ab"), 2]]


def test_bytes_are_utf_8():
    class Bytes(Bracketing):
        bos_token_id = 1

        def __call__(self, texts, **_):
            return {"input_ids": [[3 + byte % 90 for byte in text.encode()[::2]] for text in texts]}

    model = build("gpt2").double()
    total = sum(alone(model, [3 + ord("a") % 90], Bytes()(["Zürich"])["input_ids"][0]))
    assert log_probability_per_byte(model, Bytes(), ["a"], ["Zürich"]) == [pytest.approx(total / 7, abs=1e-9)]


@pytest.mark.parametrize("function", [log_probability_coherence, log_probability_per_byte])
@pytest.mark.parametrize(
    ("prompts", "continuations", "message"),
    [
        (["a"], ["b", "c"], "prompts must be 2, as many as continuations, got 1"),
        ([3], ["b"], r"prompts must be a string or a list of strings, but prompts\[0\] is int 3"),
        (["a"], [None], r"continuations\[0\] is NoneType"),
        (None, ["a"], "prompts must be a list, got None"),
        (["a"], 5, "continuations must be a list, got 5"),
    ],
)
def test_coherence_refuses(function, prompts, continuations, message):
    with pytest.raises(ValueError, match=message):
        function(shared("gpt2"), tokenizer(), prompts, continuations)


def test_what_paper_compatible_cannot_be():
    with pytest.raises(ValueError, match="paper_compatible must be False for an encoder-decoder"):
        log_probability_coherence(shared("t5"), tokenizer(), ["a"], ["b"], paper_compatible=True)
    with pytest.raises(ValueError, match="tokenizer must be given with paper_compatible=True"):
        log_probability_coherence(shared("gpt2"), None, [[3]], [[4]], paper_compatible=True)
    with pytest.raises(ValueError, match="tokenizer must have a bos_token for paper_compatible=True"):
        log_probability_coherence(shared("gpt2"), Bracketing(), ["a"], ["b"], paper_compatible=True)
    with pytest.raises(ValueError, match="tokenizer must be given: bytes are a text's"):
        log_probability_per_byte(shared("gpt2"), None, ["a"], ["b"])


# ---- perplexity ------------------------------------------------------------------------------------------------------


def windows(tokens, length, stride):
    """For each token but the first, where the window that scores it begins: the first that reaches it."""
    begins = []
    for place in range(1, tokens):
        end = min(length, tokens)
        while end <= place:
            end = min(end + stride, tokens)
        begins.append(max(0, end - length))
    return begins


@pytest.mark.parametrize(("length", "stride"), [(8, 1), (8, 3), (8, 7), (2, 1), (5, None), (40, 20), (None, None)])
def test_perplexity_in_windows(length, stride):
    model = build("gpt2").double()
    rows = rows_of([23, 8, 9, 1, 0, 2, 16], 5)
    values = []
    for row in rows:
        step = stride or (length or 1024) // 2
        for place, begin in enumerate(windows(len(row), length or 1024, step), 1):
            values += alone(model, row[begin:place], row[place : place + 1])
    wanted = math.exp(-sum(values) / len(values))
    assert len(values) == 22 + 7 + 8 + 1 + 15
    found = perplexity(model, None, rows, max_length=length, stride=stride, batch_size=3)
    assert found == pytest.approx(wanted, rel=1e-9)


def test_perplexity_of_texts_is_pooled():
    model = build("llama").double()
    texts = ["ab", "a longer text than that"]
    values = [alone(model, encoded(text)[:1], encoded(text)[1:]) for text in texts]
    flat = [value for each in values for value in each]
    assert perplexity(model, tokenizer(), texts) == pytest.approx(math.exp(-sum(flat) / len(flat)), rel=1e-9)
    assert perplexity(model, tokenizer(), texts[0]) == pytest.approx(math.exp(-values[0][0]), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("gpt2", {"texts": []}, "texts must hold one of at least 2 tokens"),
        ("gpt2", {"texts": ["", "a"]}, "texts must hold one of at least 2 tokens"),
        ("gpt2", {"max_length": 1}, "max_length must be an integer of at least 2 and at most 1024.*, got 1"),
        ("gpt2", {"max_length": 1025}, "and at most 1024, which the model holds, got 1025"),
        ("gpt2", {"max_length": 8, "stride": 8}, "stride must be an integer of at least 1 and below max_length=8"),
        ("gpt2", {"max_length": 8, "stride": 0}, "stride must be an integer of at least 1 and below max_length=8"),
        ("gpt2", {"stride": 1.5}, "stride must be an integer of at least 1 and below max_length=1024, got 1.5"),
        ("bloom", {"stride": 4}, "below max_length, which is not given, got 4"),
        ("t5", {}, "model must be causal"),
        ("gpt2", {"batch_size": 0}, "batch_size must be"),
    ],
)
def test_perplexity_refuses(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        perplexity(shared(name), tokenizer(), **{"texts": ["abc"], **arguments})
