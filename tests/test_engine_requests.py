"""Lines of input: what is taken, what is refused and in which words, and how answers are written."""

from __future__ import annotations

import json

import pytest

from simctg_fast.engine.parameters import NAMES, Parameters, check, defaults
from simctg_fast.engine.requests import RequestError, decode_line, parse_request
from simctg_fast.engine.results import Choice, error_result, from_choices, from_request_error

CONTRASTIVE = defaults("contrastive")


def parse(given, strategy="contrastive", **kwargs):
    return parse_request(given, defaults(strategy), strategy, **kwargs)


def refused(given, strategy="contrastive") -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(given, strategy, line=3)
    return caught.value


def test_a_plain_line():
    request = parse({"id": "a", "prompt": "Hello", "penalty_alpha": 0.3, "top_k": 2, "stop": "\n"}, line=1)
    assert (request.id, request.prompt, request.line) == ("a", "Hello", 1)
    assert request.parameters == Parameters(penalty_alpha=0.3, top_k=2, stop=("\n",))


def test_a_line_without_an_id_is_named_by_its_number():
    assert parse({"prompt": "Hello"}, line=12).id == "line-12"
    assert parse({"prompt": "Hello"}, number=3).id == "request-3"


def test_messages_and_source():
    messages = [{"role": "user", "content": "Hi"}]
    assert parse({"id": 1, "messages": messages}).messages == tuple(messages)
    assert parse({"id": 1, "source": "Hi"}).source == "Hi"


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"id": "a"}, "no_prompt", "exactly one of prompt or messages or source, got 0"),
        ({"id": "a", "prompt": "x", "source": "y"}, "two_prompts", "got 2"),
        ({"id": "a", "prompt": "  \n"}, "empty_prompt", "prompt must hold text"),
        ({"id": "a", "prompt": 7}, "invalid_type", "prompt must be a string or a list of token ids, got a number"),
        ({"id": "a", "messages": []}, "invalid_type", "messages must be a list with at least one message"),
        ({"id": "a", "messages": [{"content": "x"}]}, "invalid_type", r"messages[0] must be an object with role"),
        ({"id": "", "prompt": "x"}, "invalid_id", "id must be a string with text or an integer, got ''"),
        ({"id": 1.5, "prompt": "x"}, "invalid_id", "got 1.5"),
        ({"id": True, "prompt": "x"}, "invalid_id", "got True"),
        ({"id": "a", "prompt": "x", "topk": 4}, "unknown_key", "unknown key topk; allowed: id, prompt"),
        ({"id": "a", "prompt": "x", "top_k": 0}, "invalid_value", "top_k must be an integer of at least 1, got 0"),
        (
            {"id": "a", "prompt": "x", "penalty_alpha": 1.5},
            "invalid_value",
            r"penalty_alpha must be a number in [0, 1]",
        ),
        ({"id": "a", "prompt": "x", "max_new_tokens": "9"}, "invalid_value", "max_new_tokens must be an integer"),
        ({"id": "a", "prompt": "x", "stop": ["", "b"]}, "invalid_value", "stop must be"),
        ({"id": "a", "prompt": "x", "seed": 1}, "invalid_value", "seed is not used by strategy 'contrastive'"),
        ({"custom_id": None, "body": {"prompt": "x"}}, "invalid_id", "custom_id must be"),
        ({"custom_id": "a", "body": []}, "invalid_type", "body must be an object, got a list"),
        ({"custom_id": "a", "body": {"prompt": "x", "stream": True}}, "invalid_value", "body.stream must be false"),
        ({"custom_id": "a", "url": "/v1/embeddings", "body": {"prompt": "x"}}, "invalid_value", "url must be"),
        ({"custom_id": "a", "body": {"prompt": "x", "best_of": 2}}, "unknown_key", "body.best_of"),
    ],
)
def test_refusals(given, kind, words):
    error = refused(given)
    assert error.kind == kind
    assert words in str(error)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"{not json", "invalid_json"),
        (b'{"id": NaN}', "invalid_json"),
        (b"\xff\xfe", "invalid_utf8"),
        (b"[1]", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b"[" * 100000, "invalid_json"),
    ],
)
def test_lines_that_are_no_objects(line, kind):
    with pytest.raises(RequestError) as caught:
        decode_line(line)
    assert caught.value.kind == kind


def test_every_parameter_has_a_check_and_a_strategy_that_uses_it():
    for name in NAMES:
        with pytest.raises(ValueError, match=name):
            check(name, object())
    with pytest.raises(ValueError, match="strategy must be one of contrastive, greedy"):
        defaults("beam")


def test_an_openai_line_and_its_answer():
    given = {
        "custom_id": "r1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "m",
            "messages": [{"role": "user", "content": "Hi"}],
            "max_completion_tokens": 5,
            "user": "u",
        },
    }
    request = parse(given, line=1)
    assert request.openai
    assert request.parameters.max_new_tokens == 5
    result = from_choices(request, 3, [Choice("yes", [4, 5], "stop")], 1.0)
    answer = json.loads(result.as_line())
    assert answer["custom_id"] == "r1"
    assert answer["error"] is None
    body = answer["response"]["body"]
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "yes"}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def test_an_openai_error_is_answered_as_one():
    error = refused({"custom_id": "r1", "body": {"prompt": ""}})
    assert json.loads(from_request_error(error, 3).as_line()) == {
        "custom_id": "r1",
        "response": None,
        "error": {"code": "empty_prompt", "message": str(error), "line": 3},
    }


def test_a_result_line():
    request = parse({"id": "a", "prompt": "x"}, line=1)
    result = from_choices(request, 2, [Choice("né\ud800", [7], "length")], 9.0)
    record = json.loads(result.as_line())
    assert list(record) == ["id", "text", "token_ids", "finish_reason", "usage", "error"]
    assert record["text"] == "né\ud800", "what JSON can say survives, surrogates included"
    assert result.choices is None


def test_several_choices():
    request = parse({"id": "a", "prompt": "x", "n": 2, "seed": 1}, "sample")
    record = from_choices(request, 2, [Choice("b", [1], "stop"), Choice("c", [2, 3], "length")], 0.0).as_dict()
    assert record["text"] == "b"
    assert [choice["text"] for choice in record["choices"]] == ["b", "c"]
    assert record["usage"]["completion_tokens"] == 3


def test_an_error_record():
    record = error_result("invalid_json", "no", line=4).as_dict()
    assert record["id"] is None
    assert record["finish_reason"] == "error"
    assert record["error"] == {"type": "invalid_json", "message": "no", "line": 4}
