"""What comes back for a request, and how it is written as a line of JSONL."""

from __future__ import annotations

import json
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import Any

from .requests import Request, RequestError


@dataclass(frozen=True)
class Choice:
    """One of the continuations of a request."""

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[dict[str, Any]] | None = None
    trace: list[dict[str, Any]] | None = None

    def as_dict(self) -> dict[str, Any]:
        record: dict[str, Any] = {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
        }
        for name in ("logprobs", "trace"):
            if getattr(self, name) is not None:
                record[name] = getattr(self, name)
        return record


@dataclass(frozen=True)
class Record:
    """A line of output, and what is counted of it. ``error``: its type, empty where there is none."""

    line: bytes
    finish_reason: str
    error: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """The answer to one request.

    Args:
        id: that of the request; None where it had none that could be used.
        text: the continuation without special tokens and without the stop string.
        token_ids: all tokens that were written, end-of-text included.
        finish_reason: ``"stop"`` (end of text, a stop string, a stopping criterion), ``"length"`` or ``"error"``.
        usage: ``prompt_tokens`` and ``completion_tokens``.
        error: ``type``, ``message`` and, where it came from a file, ``line``; None if all went well.
        logprobs: on request, for each token its id, text and natural log-probability.
        trace: on request, for each token the candidates it was chosen from.
        choices: all continuations where there is more than one; the fields above hold the first.
        request: what it answers; not part of the line.
        seconds: from admission to the end; not part of the line.
    """

    id: str | int | None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "error"
    usage: dict[str, int] = field(default_factory=lambda: {"prompt_tokens": 0, "completion_tokens": 0})
    error: dict[str, Any] | None = None
    logprobs: list[dict[str, Any]] | None = None
    trace: list[dict[str, Any]] | None = None
    choices: list[Choice] | None = None
    request: Request | None = field(default=None, compare=False, repr=False)
    openai: bool = field(default=False, compare=False, repr=False)
    seconds: float = field(default=0.0, compare=False, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The fields of a line, in their order. Nothing in it depends on the time or the machine."""
        record: dict[str, Any] = {
            "id": self.id,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "usage": self.usage,
            "error": self.error,
        }
        for name in ("logprobs", "trace"):
            if getattr(self, name) is not None:
                record[name] = getattr(self, name)
        if self.choices is not None:
            record["choices"] = [choice.as_dict() for choice in self.choices]
        return record

    def as_line(self) -> bytes:
        """The line of JSONL, newline included: an OpenAI batch line if the request was one."""
        record = self._openai() if self.openai else self.as_dict()
        return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")

    def as_record(self) -> Record:
        kind = "" if self.error is None else self.error["type"]
        return Record(self.as_line(), self.finish_reason, kind, **self.usage, seconds=self.seconds)

    def _openai(self) -> dict[str, Any]:
        if self.error is not None:
            error = {"code": self.error["type"], "message": self.error["message"]}
            if self.error.get("line") is not None:
                error["line"] = self.error["line"]
            return {"custom_id": self.id, "response": None, "error": error}
        request = self.request
        chat = request is not None and request.messages is not None
        only = Choice(self.text, self.token_ids, self.finish_reason, self.logprobs, self.trace)
        choices = [_openai_choice(i, choice, chat) for i, choice in enumerate(self.choices or [only])]
        usage = self.usage | {"total_tokens": sum(self.usage.values())}
        body = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.id}",
            "object": "chat.completion" if chat else "text_completion",
            "model": request.model if request is not None else None,
            "choices": choices,
            "usage": usage,
        }
        return {"custom_id": self.id, "response": {"status_code": 200, "body": body}, "error": None}


def _openai_choice(index: int, choice: Choice, chat: bool) -> dict[str, Any]:
    said: dict[str, Any] = {"message": {"role": "assistant", "content": choice.text}} if chat else {"text": choice.text}
    record: dict[str, Any] = {"index": index, **said, "finish_reason": choice.finish_reason, "logprobs": None}
    if choice.logprobs is not None:
        record["logprobs"] = {"content": [{"token": t["token"], "logprob": t["logprob"]} for t in choice.logprobs]}
    if choice.trace is not None:
        record["trace"] = choice.trace
    return record


def error_result(
    kind: str,
    message: str,
    *,
    request_id: str | int | None = None,
    line: int | None = None,
    request: Request | None = None,
    openai: bool = False,
) -> Result:
    """The record of a request that could not be answered."""
    if request is not None:
        request_id, line, openai = request.id, request.line, request.openai
    return Result(
        id=request_id,
        error={"type": kind, "message": message, "line": line},
        request=request,
        openai=openai,
    )


def from_request_error(error: RequestError, line: int | None) -> Result:
    return error_result(error.kind, str(error), request_id=error.request_id, line=line, openai=error.openai)


def from_choices(request: Request, prompt_tokens: int, choices: List[Choice], seconds: float) -> Result:
    """The result of a request whose continuations are all there."""
    first = choices[0]
    written = sum(len(choice.token_ids) for choice in choices)
    return Result(
        id=request.id,
        text=first.text,
        token_ids=first.token_ids,
        finish_reason=first.finish_reason,
        usage={"prompt_tokens": prompt_tokens, "completion_tokens": written},
        logprobs=first.logprobs,
        trace=first.trace,
        choices=list(choices) if len(choices) > 1 else None,
        request=request,
        openai=request.openai,
        seconds=seconds,
    )
