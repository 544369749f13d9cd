"""Answers to OpenAI batch lines, in the shapes that the `openai` package reads."""

from __future__ import annotations

import base64
import hashlib
import itertools
import struct
from typing import TYPE_CHECKING, Any

from .requests import EMBEDDINGS

if TYPE_CHECKING:
    from .results import Choice, Result


def as_openai(result: Result, model: str, created: int) -> dict[str, Any]:
    """A line of a batch's output. ``model``: where the request names none; ``created``: seconds since 1970.

    Its ids are made from the request's, so that the same request gives the same line.
    """
    name = hashlib.sha256(repr(result.id).encode("utf-8", "surrogatepass")).hexdigest()[:24]
    line: dict[str, Any] = {"id": f"batch_req_{name}", "custom_id": result.id, "response": None, "error": None}
    if result.error is not None:
        line["error"] = {"code": result.error["type"], "message": result.error["message"]}
        if result.error.get("line") is not None:
            line["error"]["line"] = result.error["line"]
    else:
        line["response"] = {"status_code": 200, "request_id": f"req_{name}", "body": _body(result, model, created)}
    if result.digest:
        line["request_digest"] = result.digest
    return line


def _body(result: Result, model: str, created: int) -> dict[str, Any]:
    request = result.request
    model = model if request is None or request.model is None else request.model
    usage = {"prompt_tokens": result.usage["prompt_tokens"], "total_tokens": sum(result.usage.values())}
    if request is not None and request.url == EMBEDDINGS:
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(vector, request.encoding)}
            for index, vector in enumerate(result.embeddings or [])
        ]
        return {"object": "list", "data": data, "model": model, "usage": usage}
    chat = request is not None and request.messages is not None
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{result.id}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [(_chat if chat else _completion)(i, choice) for i, choice in enumerate(result.all_choices)],
        "usage": usage | {"completion_tokens": result.usage["completion_tokens"]},
    }


def _chat(index: int, choice: Choice) -> dict[str, Any]:
    logprobs = None
    if choice.logprobs is not None:
        tokens = [_token(record) | {"top_logprobs": [*map(_token, _top(record))]} for record in choice.logprobs]
        logprobs = {"content": tokens, "refusal": None}
    message = {"role": "assistant", "content": choice.text, "refusal": None}
    return _choice(index, choice, {"message": message, "logprobs": logprobs})


def _completion(index: int, choice: Choice) -> dict[str, Any]:
    """The older shape: one list a property."""
    logprobs = None
    if choice.logprobs is not None:
        tokens = [record["token"] for record in choice.logprobs]
        logprobs = {
            "tokens": tokens,
            "token_logprobs": [_value(record) for record in choice.logprobs],
            "top_logprobs": [{each["token"]: _value(each) for each in _top(record)} for record in choice.logprobs],
            "text_offset": [0, *itertools.accumulate(map(len, tokens[:-1]))] if tokens else [],
        }
    return _choice(index, choice, {"text": choice.text, "logprobs": logprobs})


def _choice(index: int, choice: Choice, said: dict[str, Any]) -> dict[str, Any]:
    record = {"index": index, **said, "finish_reason": choice.finish_reason}
    return record if choice.trace is None else record | {"trace": choice.trace}


def _token(record: dict[str, Any]) -> dict[str, Any]:
    text = record["token"]
    return {"token": text, "bytes": list(text.encode("utf-8", "surrogatepass")), "logprob": _value(record)}


def _top(record: dict[str, Any]) -> list[dict[str, Any]]:
    return record.get("top_logprobs", [])


def _value(record: dict[str, Any]) -> float:
    """-9999 stands for what is impossible, as in that API."""
    value = record["logprob"]
    return -9999.0 if value is None else float(value)


def _encoded(vector: list[float], encoding: str) -> list[float] | str:
    return vector if encoding == "float" else base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
