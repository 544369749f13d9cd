"""Lines of input: what is taken, what is refused and in which words, and how answers are written."""

from __future__ import annotations

import base64
import json
import re
import struct

import pytest

from simctg_fast.engine.parameters import NAMES, Parameters, check, defaults
from simctg_fast.engine.requests import RequestError, decode_line, digest_of, parse_request
from simctg_fast.engine.results import Choice, error_result, from_choices, from_embeddings, from_request_error
from simctg_fast.text.texts import short

from ..repository import repository

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
        ({"id": "a", "prompt": "x", "n": 2}, "invalid_value", "n is not used by strategy 'contrastive'"),
        ({"id": "a", "prompt": "x", "temperature": 0.5}, "invalid_value", "0 is the value that changes nothing"),
        ({"id": "a", "prompt": "x", "penalty_alpha": 10**399}, "invalid_value", "penalty_alpha must be a number in"),
        ({"id": "a", "prompt": "x", "max_new_tokens": 2**63}, "invalid_value", "an integer from 1 to 2**31 - 1, got 9"),
        ({"id": "a", "prompt": "x", "seed": -1}, "invalid_value", "seed must be an integer from 0"),
        ({"id": "a", "prompt": "x", "stop": ""}, "invalid_value", "stop must be a string or a list of strings, none"),
        (
            {"id": "a", "prompt": "x", "stop_token_ids": ["a"]},
            "invalid_value",
            "stop_token_ids must be a list of token",
        ),
        ({"id": "a", "prompt": "x", "skip_special_tokens": 1}, "invalid_value", "must be true or false, got 1"),
        ({"id": "a", "prompt": "x", "top_logprobs": 3}, "invalid_value", "but logprobs is false"),
        ({"id": "a", "prompt": "x", "truncate_prompt_tokens": 0}, "invalid_value", "at least 1, or -1"),
        ({"id": 2**200, "prompt": "x"}, "invalid_id", "id must be a string with text or an integer"),
        ({"id": "a", "prompt": ["x"]}, "invalid_type", "prompt must be a string or a list of token ids, got a list"),
        ({"custom_id": None, "body": {"prompt": "x"}}, "invalid_id", "custom_id must be"),
        ({"custom_id": "a", "body": []}, "invalid_type", "body must be an object, got a list"),
        ({"custom_id": "a", "body": {"prompt": "x", "stream": True}}, "unsupported_value", "body.stream must be null"),
        ({"custom_id": "a", "url": "/v1/images", "body": {"prompt": "x"}}, "invalid_value", "url must be"),
        ({"custom_id": "a", "url": "/v1/embeddings", "body": {"prompt": "x"}}, "unknown_key", "body.prompt"),
        ({"custom_id": "a", "url": "/v1/embeddings", "body": {}}, "no_prompt", "body.input is missing"),
        ({"custom_id": "a", "url": "/v1/completions", "body": {"messages": []}}, "invalid_type", "body.messages"),
        ({"custom_id": "a", "url": "/v1/chat/completions", "body": {"prompt": "x"}}, "wrong_content", "messages"),
        (
            {"custom_id": "a", "body": {"prompt": "x", "best_of": 2}},
            "unsupported_value",
            "body.best_of must be null or 1",
        ),
        (
            {"custom_id": "a", "body": {"prompt": "x", "max_tokens": 0}},
            "invalid_value",
            "body.max_tokens must be an int",
        ),
        ({"custom_id": "a", "body": {"prompt": "x", "model": 7}}, "invalid_type", "body.model must be a string"),
        ({"custom_id": "a", "method": "GET", "body": {"prompt": "x"}}, "invalid_value", "method must be POST"),
        ({"custom_id": "a", "body": {"prompt": ["x", 7]}}, "invalid_type", "body.prompt must be a string, a list of"),
        ({"custom_id": "a", "body": {"prompt": ["x", " "]}}, "empty_prompt", "body.prompt[1] must hold text"),
    ],
)
def test_refusals(given, kind, words):
    error = refused(given)
    assert error.kind == kind
    assert words in str(error)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("{not json", "invalid_json"),
        ('{"id": NaN}', "invalid_json"),
        ('{"id": 1' + "0" * 5000 + "}", "invalid_json"),
        ("\udcff\udcfe", "invalid_utf8"),
        ("[1]", "not_an_object"),
        ('"text"', "not_an_object"),
        ("[" * 100000, "invalid_json"),
        ('{"a":' * 101 + "1" + "}" * 101, "invalid_json"),
    ],
)
def test_lines_that_are_no_objects(line, kind):
    with pytest.raises(RequestError) as caught:
        decode_line(line)
    assert caught.value.kind == kind


def test_nesting_is_counted_outside_strings():
    deep = {"id": "[" * 200, "prompt": '\\"' + "{" * 200, "a": [[[1]]], "b": [{}] * 200}
    assert decode_line(json.dumps(deep)) == deep
    nested = '{"a":' * 100 + "1" + "}" * 100
    assert decode_line(nested)["a"]["a"]


@pytest.mark.parametrize("strategy", ["contrastive", "greedy", "sample", "stochastic-contrastive"])
def test_values_that_change_nothing_are_taken_by_every_strategy(strategy):
    neutral = {"temperature": 0, "top_p": 1, "n": 1, "seed": 7, "min_p": 0, "typical_p": 1.0}
    request = parse({"id": "a", "prompt": "x", **neutral}, strategy)
    assert request.parameters.n == 1
    body = neutral | {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": None,
        "best_of": 1,
        "echo": False,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "stream": False,
        "stream_options": None,
        "top_k": -1,
        "user": "u",
        "metadata": {"a": "b"},
        "stop": None,
        "suffix": None,
    }
    for line in ({"prompt": ["one prompt"]}, {"messages": [{"role": "user", "content": "Hi"}], "logprobs": False}):
        request = parse({"custom_id": "a", "body": body | line}, strategy)
        assert request.parameters.logprobs is False
    assert request.parameters.top_k == (None if strategy == "sample" else defaults(strategy).top_k)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("logit_bias", {"5": 1}),
        ("best_of", 3),
        ("echo", True),
        ("tools", [{"type": "function"}]),
        ("functions", [{"name": "f"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("stream_options", {"include_usage": True}),
        ("suffix", "x"),
        ("min_tokens", 3),
        ("repetition_penalty", 1.1),
        ("ignore_eos", True),
        ("modalities", ["text", "audio"]),
    ],
)
def test_what_would_change_the_text_and_is_not_served_is_refused(name, value):
    error = refused({"custom_id": "a", "body": {"prompt": "x", name: value}})
    assert error.kind == "unsupported_value"
    assert f"body.{name} must be null" in str(error)


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 2, "max_completion_tokens": 5},
        {"max_new_tokens": 3, "max_tokens": 2},
        {"logprobs": 1, "top_logprobs": 5},
        {"continue_final_message": True, "add_generation_prompt": True},
        {"add_generation_prompt": False},
    ],
)
def test_settings_that_contradict_each_other(body):
    error = refused({"custom_id": "a", "body": {"prompt": "x"} | body})
    assert error.kind in ("invalid_value", "unsupported_value")
    assert all(f"body.{name}" in str(error) for name in body if name != "continue_final_message")


def test_settings_that_are_given_twice_alike():
    body = {"prompt": "x", "max_tokens": 2, "max_completion_tokens": 2, "logprobs": 2, "top_logprobs": 2, "best_of": 1}
    parameters = parse({"custom_id": "a", "body": body}).parameters
    assert (parameters.max_new_tokens, parameters.top_logprobs) == (2, 2)
    body = {"messages": [{"role": "user", "content": "x"}], "continue_final_message": True}
    assert parse({"custom_id": "a", "body": body | {"add_generation_prompt": False}}).parameters.continue_final_message


def test_no_limit_of_candidates():
    narrow = defaults("sample").with_overrides({"top_k": 1}, "sample")
    request = parse_request({"custom_id": "a", "body": {"prompt": "x", "top_k": -1}}, narrow, "sample")
    assert request.parameters.top_k is None


def test_prompts_of_openai_lines():
    def prompts(value):
        request = parse({"custom_id": "a", "body": {"prompt": value}})
        return [request.prompt, *request.more_prompts], request.count

    assert prompts("x") == (["x"], 1)
    assert prompts([1, 2]) == ([(1, 2)], 1)
    assert prompts(["x", "y"]) == (["x", "y"], 2)
    assert prompts([[1, 2], [3]]) == ([(1, 2), (3,)], 2)


def test_parts_of_a_message():
    def message(content, **more):
        given = [{"role": "user", "content": content, **more}]
        return parse({"custom_id": "a", "body": {"messages": given}}).messages[0]

    text = {"type": "text", "text": "Hel"}
    assert message([text, {"type": "text", "text": "lo"}])["content"] == "Hello"
    assert message(None, tool_calls=[{"id": "t"}])["content"] is None
    for part in ({"type": "image_url", "image_url": {"url": "u"}}, {"type": "text"}, "text", {"type": "input_audio"}):
        error = refused({"custom_id": "a", "body": {"messages": [{"role": "user", "content": [text, part]}]}})
        assert error.kind == "unsupported_content"
        assert "body.messages[0].content[1] must be a text part" in str(error)
    for content in (None, 7, {"a": 1}):
        error = refused({"id": "a", "messages": [{"role": "user", "content": content}]})
        assert "messages[0].content must be a string or a list of text parts" in str(error)


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
    assert list(answer)[:2] == ["id", "custom_id"]
    assert answer["response"]["request_id"].startswith("req_")
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "yes", "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def test_an_openai_error_is_answered_as_one():
    error = refused({"custom_id": "r1", "body": {"prompt": ""}})
    answer = json.loads(from_request_error(error, line=3).as_line())
    assert answer.pop("id").startswith("batch_req_")
    assert answer == {
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


def logprobs_of(*tokens):
    return [
        {"token_id": i, "token": t, "logprob": -0.5, "top_logprobs": [{"token_id": 9, "token": "?", "logprob": None}]}
        for i, t in enumerate(tokens)
    ]


def test_answers_are_what_the_openai_package_reads():
    types = pytest.importorskip("openai.types")
    chat = pytest.importorskip("openai.types.chat")
    choices = [Choice("né yes", [4, 5], "stop", logprobs_of("né", " yes")), Choice("", [], "length", [])]

    body = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 1, "n": 2}
    request = parse({"custom_id": "r", "url": "/v1/chat/completions", "body": body}, "sample")
    line = json.loads(from_choices(request, 3, choices, 1.0).as_line("folder", 1700000000))
    answer = chat.ChatCompletion.model_validate(line["response"]["body"], strict=True)
    assert (answer.created, answer.model, answer.usage.total_tokens) == (1700000000, "folder", 5)
    assert [choice.message.content for choice in answer.choices] == ["né yes", ""]
    first = answer.choices[0].logprobs.content[0]
    assert bytes(first.bytes).decode() == "né"
    assert first.top_logprobs[0].logprob == -9999.0

    body = {"prompt": ["a", "b"], "logprobs": 1, "model": "mine"}
    request = parse({"custom_id": "r", "url": "/v1/completions", "body": body})
    line = json.loads(from_choices(request, 3, choices, 1.0).as_line("folder", 1))
    answer = types.Completion.model_validate(line["response"]["body"], strict=True)
    assert answer.model == "mine"
    assert answer.choices[0].logprobs.text_offset == [0, 2]
    assert answer.choices[0].logprobs.tokens == ["né", " yes"]
    assert answer.choices[1].logprobs.tokens == []

    for encoding in ("float", "base64"):
        body = {"input": ["a", "b"], "encoding_format": encoding}
        request = parse({"custom_id": "r", "url": "/v1/embeddings", "body": body})
        line = json.loads(from_embeddings(request, 2, [[0.5, 1.0], [2.0, 3.0]]).as_line("folder"))
        if encoding == "float":
            answer = types.CreateEmbeddingResponse.model_validate(line["response"]["body"], strict=True)
            assert answer.data[1].embedding == [2.0, 3.0]
        else:
            packed = base64.b64decode(line["response"]["body"]["data"][1]["embedding"])
            assert struct.unpack("<2f", packed) == (2.0, 3.0)


def test_a_digest_tells_requests_apart():
    asked = {"id": "a", "prompt": "x"}
    assert digest_of(asked) == digest_of({"prompt": "x", "id": "a"}) != digest_of(asked | {"prompt": "y"})
    assert digest_of("{bad \n") == digest_of("{bad") != digest_of("{worse")
    request = parse(asked, digest="d")
    assert json.loads(from_choices(request, 2, [Choice("b", [1], "stop")], 0.0).as_line())["request_digest"] == "d"


def test_whatever_stands_in_a_message_is_short():
    for value in (10**6000, [[]] * 3, "x" * 900):
        assert len(short(value)) < 200


def test_the_page_names_every_kind_of_error():
    page = repository("docs/engine.md").read_text(encoding="utf-8")
    table = page[page.index("## Error records") : page.index("## Results depend")]
    named = {
        name
        for cell in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
        for name in re.findall(r"`(\w+)`", cell)
    }
    made = re.compile(r'(?:RequestError|fail|self|error_result|_error)\(\s*(?:request,\s*)?"(\w+)",')
    source = "".join(path.read_text(encoding="utf-8") for path in repository("simctg_fast/engine").rglob("*.py"))
    kinds = {*made.findall(source), *re.findall(r'"([a-z_]+_error)"', source)}
    assert kinds - named == set()
    assert named - {"type", "code", "two_prompts"} - kinds == set()
