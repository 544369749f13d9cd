"""One request, from a dict or a line of JSONL, checked before anything is computed for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .parameters import NAMES, Parameters

CONTENT = ("prompt", "messages", "source")
_OPENAI_KEYS = ("custom_id", "method", "url", "body")
# Of the body of an OpenAI batch line: their names for our parameters, and what says nothing about the text.
_OPENAI_NAMES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
_OPENAI_IGNORED = ("model", "user", "metadata", "store", "stream", "logprobs", "top_logprobs")


class RequestError(ValueError):
    """A request that cannot be run. ``kind`` is a short word for it, the same for all requests with this fault."""

    def __init__(self, kind: str, message: str, *, request_id: Any = None, openai: bool = False):
        super().__init__(message)
        self.kind, self.request_id, self.openai = kind, request_id, openai


@dataclass(frozen=True)
class Request:
    """A prompt (or chat, or source text) and how it is to be continued."""

    id: str | int
    parameters: Parameters
    prompt: str | tuple[int, ...] | None = None  # a text, or its tokens
    messages: tuple[dict[str, Any], ...] | None = None
    source: str | None = None
    line: int | None = None
    openai: bool = False  # it came as an OpenAI batch line, and is answered as one
    url: str | None = None  # of an OpenAI batch line
    model: str | None = None  # the name such a line used
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # what was given, for factories


def decode_line(line: bytes) -> dict[str, Any]:
    """The object on one line of JSONL.

    Raises:
        RequestError: not UTF-8, not JSON, not an object.
    """
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RequestError("invalid_utf8", f"the line is not UTF-8 (byte {error.start})") from error
    except ValueError as error:  # JSONDecodeError is one
        raise RequestError("invalid_json", f"the line is not JSON: {error}") from error
    except RecursionError as error:
        raise RequestError("invalid_json", "the line is nested too deeply") from error
    if not isinstance(value, dict):
        raise RequestError("not_an_object", f"a request must be a JSON object, got {_kind(value)}")
    return value


def line_id(given: Mapping[str, Any], number: int) -> Any:
    """The id by which line ``number`` is known, whatever it is: nothing is checked."""
    return given["custom_id"] if "custom_id" in given else given.get("id", f"line-{number}")


def parse_request(
    given: Mapping[str, Any], defaults: Parameters, strategy: str, *, line: int | None = None, number: int | None = None
) -> Request:
    """Check ``given`` (the keys of a JSONL line) and fill in ``defaults``.

    ``number`` names a request without an id.

    Raises:
        RequestError: with its kind and a message that names the key, its value and what is allowed.
    """
    if "custom_id" in given or "body" in given:
        return _parse_openai(given, defaults, strategy, line)
    request_id: Any = given.get("id")
    if "id" in given and not _is_id(request_id):
        raise RequestError("invalid_id", f"id must be a string with text or an integer, got {_shown(request_id)}")
    if "id" not in given:
        request_id = f"line-{line}" if line is not None else f"request-{number}"
    fail = _Failure(request_id, openai=False)
    fail.unless_known(given, ("id", *CONTENT, *NAMES))
    content = fail.content(given, CONTENT)
    overrides = {name: value for name, value in given.items() if name in NAMES}
    return Request(
        id=request_id,
        parameters=fail.parameters(defaults, overrides, strategy),
        line=line,
        raw=given,
        **content,
    )


def _parse_openai(given: Mapping[str, Any], defaults: Parameters, strategy: str, line: int | None) -> Request:
    request_id: Any = given.get("custom_id")
    if not _is_id(request_id):
        raise RequestError("invalid_id", f"custom_id must be a string with text, got {_shown(request_id)}", openai=True)
    fail = _Failure(request_id, openai=True)
    fail.unless_known(given, _OPENAI_KEYS)
    body: Any = given.get("body")
    if not isinstance(body, dict):
        raise fail("invalid_type", f"body must be an object, got {_kind(body)}")
    url = given.get("url")
    if url is not None and url not in ("/v1/chat/completions", "/v1/completions"):
        raise fail("invalid_value", f"url must be /v1/chat/completions or /v1/completions, got {url!r}")
    if given.get("method", "POST") != "POST":
        raise fail("invalid_value", f"method must be POST, got {given['method']!r}")
    fail.unless_known(body, ("prompt", "messages", *NAMES, *_OPENAI_NAMES, *_OPENAI_IGNORED), "body.")
    if body.get("stream"):
        raise fail("invalid_value", f"body.stream must be false, got {body['stream']!r}")
    content = fail.content(body, ("prompt", "messages"), "body.")
    named = {_OPENAI_NAMES.get(name, name): value for name, value in body.items() if value is not None}
    overrides = {name: value for name, value in named.items() if name in NAMES}
    return Request(
        id=request_id,
        parameters=fail.parameters(defaults, overrides, strategy),
        line=line,
        openai=True,
        url=url or ("/v1/chat/completions" if content.get("messages") is not None else "/v1/completions"),
        model=body.get("model"),
        raw=given,
        **content,
    )


class _Failure:
    """Makes the errors of one request, so that each carries its id."""

    def __init__(self, request_id: Any, *, openai: bool):
        self.request_id, self.openai = request_id, openai

    def __call__(self, kind: str, message: str) -> RequestError:
        return RequestError(kind, message, request_id=self.request_id, openai=self.openai)

    def unless_known(self, given: Mapping[str, Any], allowed: tuple[str, ...], prefix: str = "") -> None:
        unknown = [name for name in given if name not in allowed]
        if unknown:
            names = ", ".join(prefix + str(name) for name in unknown)
            raise self("unknown_key", f"unknown key {names}; allowed: {', '.join(dict.fromkeys(allowed))}")

    def content(self, given: Mapping[str, Any], names: tuple[str, ...], prefix: str = "") -> dict[str, Any]:
        present = [name for name in names if given.get(name) is not None]
        if len(present) != 1:
            wanted = " or ".join(prefix + name for name in names)
            raise self("no_prompt" if not present else "two_prompts", f"exactly one of {wanted}, got {len(present)}")
        name = present[0]
        value = given[name]
        if name == "messages":
            return {"messages": self.messages(value, prefix)}
        if name == "prompt" and isinstance(value, list) and value and all(_is_token(item) for item in value):
            return {"prompt": tuple(value)}
        if not isinstance(value, str):
            allowed = "a string or a list of token ids" if name == "prompt" else "a string"
            raise self("invalid_type", f"{prefix}{name} must be {allowed}, got {_kind(value)}")
        if not value.strip():
            raise self("empty_prompt", f"{prefix}{name} must hold text, got {_shown(value)}")
        return {name: value}

    def messages(self, value: Any, prefix: str) -> tuple[dict[str, Any], ...]:
        if not isinstance(value, list) or not value:
            raise self("invalid_type", f"{prefix}messages must be a list with at least one message, got {_kind(value)}")
        for index, message in enumerate(value):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
                raise self(
                    "invalid_type",
                    f"{prefix}messages[{index}] must be an object with role and content, got {message!r:.80}",
                )
        return tuple(value)

    def parameters(self, defaults: Parameters, overrides: Mapping[str, Any], strategy: str) -> Parameters:
        try:
            return defaults.with_overrides(overrides, strategy)
        except ValueError as error:
            raise self("invalid_value", str(error)) from error


def _is_id(value: Any) -> bool:
    return (isinstance(value, str) and bool(value.strip())) or (isinstance(value, int) and not isinstance(value, bool))


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
