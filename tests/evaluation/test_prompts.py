"""Files of prompts and human continuations, and the prompts that every Python carries."""

from __future__ import annotations

import json

import pytest

from simctg_fast import bundled_model_path
from simctg_fast.evaluation.console import notes
from simctg_fast.evaluation.prompts import PROMPT_TOKENS, Prompt, documentation_prompts, read_prompts
from simctg_fast.evaluation.writing import tokenize
from simctg_fast.loading import load_tokenizer

from ..decoding_models import build
from ..decoding_models import tokenizer as characters

HALF = {"reference": "bad \udfff x"}


def file(folder, name, lines):
    path = folder / name
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_lines_of_every_kind(tmp_path):
    lines = [
        {"prompt": "one", "reference": "more"},
        {"id": 7, "messages": [{"role": "user", "content": "two"}], "reference": None},
        {"id": "c", "source": "three"},
    ]
    found = read_prompts(file(tmp_path, "p.jsonl", lines))
    assert [(p.id, p.reference) for p in found] == [("line-1", "more"), (7, None), ("c", None)]
    assert [p.content for p in found] == [
        {"prompt": "one"}, {"messages": [{"role": "user", "content": "two"}]}, {"source": "three"},
    ]  # fmt: skip


def test_text_lines_and_references_in_order(tmp_path):
    prompts = file(tmp_path, "p.txt", ["first", "", "  second"])
    found = read_prompts(prompts, file(tmp_path, "r.txt", ["goes on", "so"]))
    assert [(p.id, p.content["prompt"], p.reference) for p in found] == [
        ("line-1", "first", "goes on"), ("line-3", "  second", "so"),
    ]  # fmt: skip


def test_references_by_id(tmp_path):
    prompts = file(tmp_path, "p.jsonl", [{"id": "a", "prompt": "x", "reference": "own"}, {"id": 2, "prompt": "y"}])
    found = read_prompts(prompts, file(tmp_path, "r.jsonl", [{"id": 2, "text": "second"}]))
    assert [p.reference for p in found] == ["own", "second"], "a prompt that the file does not name keeps its own"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"prompt": "a", "temperature": 1}], "line 1: key 'temperature' is not allowed here, only id, reference and"),
        ([{"id": 1}], "line 1: must have one of prompt, messages, source, got none"),
        ([{"prompt": "a", "source": "b"}], r"must have one of prompt, messages, source, got \['prompt', 'source'\]"),
        ([{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}], "line 2: id 'a' is that of a line before"),
        ([{"id": True, "prompt": "x"}], "line 1: id must be a string with text or an integer, got True"),
        ([{"id": "", "prompt": "x"}], "id must be a string with text"),
        ([{"prompt": "x", "reference": 3}], "reference must be a string, got 3"),
        ([HALF | {"prompt": "x"}], r"line 1: reference holds half of a surrogate pair, got 'bad \\udfff x'"),
        (["[1]"], "must be an object"),
        (["{"], "not JSON"),
        ([], "holds no prompt"),
    ],
)
def test_lines_that_are_no_prompts(lines, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_prompts(file(tmp_path, "p.jsonl", lines))


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("r.txt", ["one"], "has 1 references without id for 2 prompts"),
        ("r.txt", ["one", "two", "three"], "has 3 references without id for 2 prompts"),
        ("r.jsonl", [{"id": "z", "reference": "x"}], "line 1: id 'z' is that of no prompt"),
        ("r.jsonl", [{"id": "a", "reference": "x"}, {"id": "a", "reference": "y"}], "line 2: id 'a' comes twice"),
        ("r.jsonl", [{"id": "a", "reference": "x"}, {"reference": "y"}], "1 of its lines have no id, but others do"),
        ("r.jsonl", [{"id": "a"}], "line 1: reference must be a string, got None"),
        ("r.jsonl", [HALF, HALF], "line 1: reference holds half of a surrogate pair"),
        ("r.jsonl", [{"id": "a", "text": HALF["reference"]}], "line 1: reference holds half of a surrogate pair"),
        ("r.csv", ["x"], "must be a .txt or .jsonl file"),
    ],
)
def test_references_that_do_not_fit(name, lines, message, tmp_path):
    prompts = file(tmp_path, "p.jsonl", [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y"}])
    with pytest.raises(ValueError, match=message):
        read_prompts(prompts, file(tmp_path, name, lines))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("llama", {"prompt": "a \ud800 b"}),
        ("llama", {"messages": [{"role": "user", "content": "\udfff"}]}),
        ("t5", {"source": "\udfff"}),
    ],
)
def test_half_of_a_surrogate_pair_in_a_prompt(name, content):
    """That prompt alone cannot be continued, and why is no error of the tokenizer's."""
    prompts = [Prompt("half", content), Prompt("whole", {"prompt": "it is"})]
    ready, refused = tokenize(build(name), chatting(), prompts, 4)
    assert [each.prompt.id for each in ready] == ["whole"]
    assert list(refused) == ["half"]
    assert refused["half"].startswith("it holds half of a surrogate pair, got {'")
    assert refused["half"].isascii()


def test_prompts_that_are_too_long():
    """What is too long for what; not the engine's advice, on options that an evaluation has not."""
    long = "x" * 300
    refused = tokenize(build("gpt2", n_positions=64), characters(), [Prompt("a", {"prompt": long})], 8)[1]
    assert refused == {"a": "300 prompt tokens and max_new_tokens=8 are more than the model's 64"}
    refused = tokenize(build("bart"), characters(), [Prompt(0, {"source": long}), Prompt(1, {"prompt": long})], 8)[1]
    assert refused == dict.fromkeys((0, 1), "source has 300 tokens, the model takes 256")
    refused = tokenize(build("bart"), characters(), [Prompt("a", {"source": "x"})], 300)[1]
    assert refused == {"a": "1 prompt tokens and max_new_tokens=300 are more than the model's 256"}


def test_refused_prompts_on_a_terminal():
    """A line each, but not hundreds of them."""

    def said(count):
        refused = [{"id": number, "message": "too long"} for number in range(count)]
        return notes({"rows": [], "refused": refused})

    assert said(0) == []
    assert said(1) == ["prompt 0 cannot be continued: too long"]
    assert said(8) == [f"prompt {number} cannot be continued: too long" for number in range(8)]
    assert said(9)[:8] == said(8)
    assert said(9)[8:] == ["prompts that cannot be continued beside these: 1 (see evaluation.json)"]


def chatting():
    tokenizer = characters()
    tokenizer.chat_template = "{{ messages[0].content }}"
    return tokenizer


def test_documentation():
    tokenizer = load_tokenizer(bundled_model_path())
    found = documentation_prompts(tokenizer, 7, 20)
    assert len({tuple(p.content["prompt"]) for p in found}) == 7
    for prompt in found:
        ids = prompt.content["prompt"]
        assert len(ids) == PROMPT_TOKENS
        again = tokenizer(prompt.reference, add_special_tokens=False)["input_ids"]
        assert 15 <= len(again) <= 25, "a text cut between tokens may be cut into others"
    with pytest.raises(ValueError, match=r"count is 10000000, but Python's documentation has only \d+ tokens"):
        documentation_prompts(tokenizer, 10_000_000, 20)
