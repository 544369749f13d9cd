"""One request, from a dict or a line of JSONL, checked before anything is computed for it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

from ..text.files import is_utf8
from ..text.texts import short
from .parameters import NAMES, Parameters

CONTENT = ("prompt", "messages", "source")
_OPENAI_KEYS = ("custom_id", "method", "url", "body")
_COMPLETIONS, _CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
# Of the body of an OpenAI batch line: their names for our parameters, and what says nothing about the text.
_OPENAI_NAMES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
_OPENAI_IGNORED = (
    *("model", "user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
)
# What would change the text and is not supported, with the values that do not: null, and these.
_OPENAI_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("stream", "echo", "ignore_eos", "use_beam_search"), (False,)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_tokens"), (0,)),
    **dict.fromkeys(("repetition_penalty", "length_penalty", "best_of"), (1,)),
    **dict.fromkeys(("tools", "functions"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("add_generation_prompt", "spaces_between_special_tokens"), (True,)),
    **dict.fromkeys(("stream_options", "audio", "prediction", "web_search_options", "reasoning_effort"), ()),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "verbosity": ("medium",),
}
MAX_DEPTH = 100  # of a line's nesting: Python reads about a thousand, by the depth of its own stack at that moment


class RequestError(ValueError):
    """A request that cannot be run. ``kind`` is a short word for it, the same for all requests with this fault."""

    def __init__(self, kind: str, message: str, *, request_id: Any = None, openai: bool = False):
        super().__init__(message)
        self.kind, self.request_id, self.openai = kind, request_id, openai


@dataclass(frozen=True)
class Request:
    """A prompt (or chat, or source text) and how it is to be continued, or texts to be embedded."""

    id: str | int
    parameters: Parameters
    strategy: str = ""  # by which it is answered
    prompt: str | tuple[int, ...] | None = None  # a text, or its tokens
    more_prompts: tuple[str | tuple[int, ...], ...] = ()  # an OpenAI line may hold several
    messages: tuple[dict[str, Any], ...] | None = None
    source: str | None = None
    inputs: tuple[str | tuple[int, ...], ...] | None = None  # to be embedded
    line: int | None = None
    openai: bool = False  # it came as an OpenAI batch line, and is answered as one
    url: str | None = None  # of an OpenAI batch line
    model: str | None = None  # the name such a line used
    encoding: str = "float"  # of embeddings: float or base64
    digest: str = ""  # of what a file asked, see `digest_of`
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # what was given, for factories

    @property
    def count(self) -> int:
        """Continuations it asks for."""
        return self.parameters.n * (1 + len(self.more_prompts))

    @property
    def is_answered(self) -> bool:
        """Whether what is written is a text of its own, not the rest of the prompt."""
        return self.messages is not None and not self.parameters.continue_final_message


def decode_line(line: str) -> dict[str, Any]:
    """The object on one line of JSONL, as `TextLines` reads it.

    Raises:
        RequestError: not UTF-8, not JSON, nested too deeply, not an object.
    """
    check_utf8(line)
    if _depth(line) > MAX_DEPTH:
        raise RequestError("invalid_json", f"the line is nested more than {MAX_DEPTH} deep")
    try:
        value = json.loads(
            line, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_without_repetition
        )
    except ValueError as error:  # JSONDecodeError is one
        raise RequestError("invalid_json", f"the line is not JSON: {error}") from error
    if not isinstance(value, dict):
        hint = "; one object a line, not one array a file" if isinstance(value, list) else ""
        raise RequestError("not_an_object", f"a request must be a JSON object, got {_kind(value)}{hint}")
    return value


def check_utf8(line: str) -> None:
    """Raise RequestError for a line of `TextLines` that was not UTF-8."""
    if not is_utf8(line):
        place = next(index for index, character in enumerate(line) if "\ud800" <= character <= "\udfff")
        raise RequestError("invalid_utf8", f"the line is not UTF-8 (behind {place} characters)")


def _depth(line: str) -> int:
    """How deep brackets are nested, or a bound of it."""
    bound = line.count("[") + line.count("{")
    if bound <= MAX_DEPTH:
        return bound
    depth = deepest = 0
    for found in _BRACKETS.finditer(line):
        if (bracket := found[0]) in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif bracket in "]}":
            depth -= 1
    return deepest


_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]')


def digest_of(asked: Mapping[str, Any] | str) -> str:
    """What tells one request from another: its object, whatever the order of keys and the white space, or the text of a
    line that holds none."""
    if isinstance(asked, str):
        content = asked.strip().encode("utf-8", "surrogatepass")
    else:
        content = json.dumps(asked, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def line_id(record: Mapping[str, Any], number: int) -> Any:
    """The id by which line ``number`` is known, whatever it is: nothing is checked."""
    return record["custom_id"] if "custom_id" in record else record.get("id", f"line-{number}")


def parse_request(
    record: Mapping[str, Any],
    defaults: Parameters | Mapping[str, Parameters],
    strategy: str,
    *,
    line: int | None = None,
    number: int | None = None,
    digest: str = "",
) -> Request:
    """Check ``record`` (the keys of a JSONL line) and fill in ``defaults``, of ``strategy`` or by the strategies that a
    line may name.

    ``number`` names a request without an id; ``digest`` is kept beside its answer.

    Raises:
        RequestError: with its kind and a message that names the key, its value and what is allowed.
    """
    if isinstance(defaults, Parameters):
        defaults = {strategy: defaults}
    if "custom_id" in record or "body" in record:
        return _parse_openai(record, defaults, strategy, line, digest)
    request_id: Any = record.get("id")
    if "id" in record and not _is_id(request_id):
        raise RequestError("invalid_id", f"id must be a string with text or an integer, got {short(request_id)}")
    if "id" not in record:
        request_id = f"line-{line}" if line is not None else f"request-{number}"
    request_id = int(request_id) if isinstance(request_id, Integral) else request_id
    fail = _Failure(request_id, openai=False)
    fail.unless_known(record, ("id", *CONTENT, *NAMES, "strategy"))
    strategy = fail.strategy(record, strategy, defaults)
    content = fail.content(record, CONTENT)
    overrides = {name: value for name, value in record.items() if name in NAMES}
    return Request(
        id=request_id,
        parameters=fail.parameters(defaults[strategy], overrides, strategy),
        strategy=strategy,
        line=line,
        digest=digest,
        raw=record,
        **content,
    )


def _parse_openai(
    record: Mapping[str, Any], defaults: Mapping[str, Parameters], strategy: str, line: int | None, digest: str
) -> Request:
    request_id: Any = record.get("custom_id")
    if not _is_id(request_id):
        message = f"custom_id must be a string with text or an integer, got {short(request_id)}"
        raise RequestError("invalid_id", message, openai=True)
    fail = _Failure(request_id, openai=True)
    fail.unless_known(record, _OPENAI_KEYS)
    body: Any = record.get("body")
    if not isinstance(body, dict):
        raise fail("invalid_type", f"body must be an object, got {_kind(body)}")
    url = record.get("url")
    if url not in (None, _CHAT, _COMPLETIONS, EMBEDDINGS):
        raise fail("invalid_value", f"url must be {_CHAT}, {_COMPLETIONS} or {EMBEDDINGS}, got {short(url)}")
    if record.get("method", "POST") != "POST":
        raise fail("invalid_value", f"method must be POST, got {short(record['method'])}")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise fail("invalid_type", f"body.model must be a string, got {_kind(model)}")
    facts: dict[str, Any] = {"line": line, "openai": True, "model": model, "digest": digest, "raw": record}
    if url is None and "input" in body:
        url = EMBEDDINGS
    if url == EMBEDDINGS:
        return Request(id=request_id, parameters=defaults[strategy], url=url, **fail.embedding(body), **facts)
    known = ("prompt", "messages", *NAMES, "strategy", *_OPENAI_NAMES, *_OPENAI_NEUTRAL, *_OPENAI_IGNORED)
    fail.unless_known(body, known, "body.")
    strategy = fail.strategy(body, strategy, defaults, "body.")
    own = defaults[strategy]
    for name, neutral in _OPENAI_NEUTRAL.items():
        value = body.get(name)
        if name == "best_of":
            neutral = (*neutral, body.get("n"))
        elif name == "add_generation_prompt":
            neutral = (not body.get("continue_final_message", False),)
        if value is not None and not any(value == item for item in neutral):
            allowed = " or ".join(["null", *map(json.dumps, neutral)])
            raise fail("unsupported_value", f"body.{name} must be {allowed}: others are not served, got {short(value)}")
    content = fail.content(body, ("prompt", "messages"), "body.")
    url = url or (_CHAT if "messages" in content else _COMPLETIONS)
    if (url == _CHAT) != ("messages" in content):
        wanted = "messages" if url == _CHAT else "prompt"
        raise fail("wrong_content", f"body of {url} must have {wanted}, got {'prompt' if url == _CHAT else 'messages'}")
    overrides: dict[str, Any] = {}
    spellings: dict[str, str] = {}
    for spelled, value in body.items():
        setting = _OPENAI_NAMES.get(spelled, spelled)
        if setting not in NAMES or value is None:
            continue
        if setting in overrides and overrides[setting] != value:
            both = f"body.{spellings[setting]} is {short(overrides[setting])} and body.{spelled} {short(value)}"
            raise fail("invalid_value", f"{both}: they are the same setting")
        overrides[setting], spellings[setting] = value, spelled
    if url == _COMPLETIONS and not isinstance(overrides.get("logprobs", False), bool):
        count = overrides["logprobs"]  # there it is the number of alternatives
        if overrides.get("top_logprobs", count) != count:
            both = f"body.logprobs is {short(count)} and body.top_logprobs {short(overrides['top_logprobs'])}"
            raise fail("invalid_value", f"{both}: of {_COMPLETIONS} they are the same setting")
        overrides |= {"logprobs": True, "top_logprobs": count}
    if overrides.get("top_k") in (-1, 0):  # other servers' spelling of no limit, which is their default
        del overrides["top_k"]
        own = replace(own, top_k=None) if strategy == "sample" else own
    parameters = fail.parameters(own, overrides, strategy, spellings)
    return Request(id=request_id, parameters=parameters, strategy=strategy, url=url, **content, **facts)


class _Failure:
    """Makes the errors of one request, so that each carries its id."""

    def __init__(self, request_id: Any, *, openai: bool):
        self.request_id, self.openai = request_id, openai

    def __call__(self, kind: str, message: str) -> RequestError:
        return RequestError(kind, message, request_id=self.request_id, openai=self.openai)

    def unless_known(self, record: Mapping[str, Any], allowed: tuple[str, ...], prefix: str = "") -> None:
        unknown = [name for name in record if name not in allowed]
        if unknown:
            names = ", ".join(f"{prefix}{name}"[:80] for name in unknown[:10])
            raise self("unknown_key", f"unknown key {names}; allowed: {', '.join(dict.fromkeys(allowed))}")

    def strategy(self, record: Mapping[str, Any], strategy: str, defaults: Mapping[str, Any], prefix: str = "") -> str:
        """The one that a line names, or the run's first."""
        asked = record.get("strategy")
        if asked is None:
            return strategy
        if not isinstance(asked, str) or asked not in defaults:
            allowed = f"one of this run's, {', '.join(defaults)}"
            raise self("invalid_value", f"{prefix}strategy must be {allowed}, got {short(asked)}")
        return asked

    def content(self, record: Mapping[str, Any], names: tuple[str, ...], prefix: str = "") -> dict[str, Any]:
        present = [name for name in names if record.get(name) is not None]
        if len(present) != 1:
            wanted = " or ".join(prefix + name for name in names)
            raise self("no_prompt" if not present else "two_prompts", f"exactly one of {wanted}, got {len(present)}")
        name = present[0]
        value = record[name]
        if name == "messages":
            return {"messages": self.messages(value, prefix)}
        if name == "prompt":
            first, *more = self.texts(value, prefix + name)
            return {"prompt": first, "more_prompts": tuple(more)}
        if not isinstance(value, str):
            raise self("invalid_type", f"{prefix}{name} must be a string, got {_kind(value)}")
        return {name: self.text(value, prefix + name)}

    def texts(self, value: Any, name: str) -> list[str | tuple[int, ...]]:
        """A text, a list of token ids (in Python any array of them), or, of an OpenAI line, a list of these."""
        value = value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value
        if isinstance(value, str):
            return [self.text(value, name)]
        if isinstance(value, list) and value:
            if all(_is_token(item) for item in value):
                return [tuple(map(int, value))]
            if self.openai and all(isinstance(item, str) for item in value):
                return [self.text(item, f"{name}[{index}]") for index, item in enumerate(value)]
            if self.openai and all(isinstance(item, list) and item and all(map(_is_token, item)) for item in value):
                return [tuple(item) for item in value]
        allowed = (
            "a string, a list of token ids, or a list of these" if self.openai else "a string or a list of token ids"
        )
        raise self("invalid_type", f"{name} must be {allowed}, got {_kind(value)}")

    def text(self, value: str, name: str) -> str:
        if not value.strip():
            raise self("empty_prompt", f"{name} must hold text, got {short(value)}")
        return value

    def messages(self, value: Any, prefix: str) -> tuple[dict[str, Any], ...]:
        if not isinstance(value, list) or not value:
            raise self("invalid_type", f"{prefix}messages must be a list with at least one message, got {_kind(value)}")
        return tuple(self.message(item, f"{prefix}messages[{index}]") for index, item in enumerate(value))

    def message(self, value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not isinstance(value.get("role"), str) or "content" not in value:
            raise self("invalid_type", f"{name} must be an object with role and content, got {short(value)}")
        content = value["content"]
        if isinstance(content, str) or (content is None and value.get("tool_calls")):
            return value
        if not isinstance(content, list):
            allowed = "a string or a list of text parts"
            raise self("invalid_type", f"{name}.content must be {allowed}, got {_kind(content)}")
        for index, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                found = f"type {short(kind)}" if isinstance(kind, str) and kind != "text" else short(part)
                raise self("unsupported_content", f"{name}.content[{index}] must be a text part, got {found}")
        return value | {"content": "".join(part["text"] for part in content)}

    def embedding(self, body: Mapping[str, Any]) -> dict[str, Any]:
        self.unless_known(body, ("input", "encoding_format", "dimensions", *_OPENAI_IGNORED), "body.")
        encoding = body.get("encoding_format")
        if encoding not in (None, "float", "base64"):
            raise self("invalid_value", f"body.encoding_format must be float or base64, got {short(encoding)}")
        if body.get("dimensions") is not None:
            raise self("unsupported_value", f"body.dimensions must be null, got {short(body['dimensions'])}")
        if body.get("input") is None:
            raise self("no_prompt", "body.input is missing")
        return {"inputs": tuple(self.texts(body["input"], "body.input")), "encoding": encoding or "float"}

    def parameters(
        self,
        defaults: Parameters,
        overrides: Mapping[str, Any],
        strategy: str,
        spellings: Mapping[str, str] | None = None,
    ) -> Parameters:
        """``spellings``: how the line spells the names of parameters in its body."""
        try:
            return defaults.with_overrides(overrides, strategy)
        except ValueError as error:
            name, said, rest = str(error).partition(" ")
            name = f"body.{spellings[name]}" if spellings and name in spellings else name
            raise self("invalid_value", name + said + rest) from error


def _is_id(value: Any) -> bool:
    if isinstance(value, Integral):
        return not isinstance(value, bool) and int(value).bit_length() <= 128
    return isinstance(value, str) and bool(value.strip())


def _is_token(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is beyond what a number may be")
    return number


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {short(repeated)} stands there twice")
    return mapping


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
