"""What comes back for a request, and how it is written as a line of JSONL."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import Any

from ..printable import json_text
from .openai_lines import as_openai
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
        return _recorded(self, ("text", "token_ids", "finish_reason"))


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
        text: the continuation without special tokens and without the stop string, unless the request wants them.
        token_ids: all tokens that were written, end-of-text included.
        finish_reason: ``"stop"`` (end of text, a stop string or token, a stopping criterion), ``"length"`` or
            ``"error"``.
        usage: ``prompt_tokens`` and ``completion_tokens``.
        error: ``type``, ``message`` and, where it came from a file, ``line``; None if all went well.
        logprobs: on request, for each token its id, text and natural log-probability, and ``top_logprobs``.
        trace: on request, for each token the candidates it was chosen from.
        choices: all continuations where there is more than one; the fields above hold the first.
        embeddings: of a request for them, one vector a text.
        index: the place of the request among those of the call; not part of the line.
        request: what it answers; not part of the line.
        digest: of what a file asked, so that a later run sees whether it still does.
        seconds: from admission to the end; not part of the line.
    """

    id: str | int | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "error"
    usage: dict[str, int] = field(default_factory=lambda: {"prompt_tokens": 0, "completion_tokens": 0})
    error: dict[str, Any] | None = None
    logprobs: list[dict[str, Any]] | None = None
    trace: list[dict[str, Any]] | None = None
    choices: list[Choice] | None = None
    embeddings: list[list[float]] | None = None
    index: int = field(default=0, compare=False)
    request: Request | None = field(default=None, compare=False, repr=False)
    openai: bool = field(default=False, compare=False, repr=False)
    digest: str = field(default="", compare=False, repr=False)
    seconds: float = field(default=0.0, compare=False, repr=False)

    @property
    def all_choices(self) -> list[Choice]:
        """The continuations, also where there is one."""
        only = Choice(self.text, self.token_ids, self.finish_reason, self.logprobs, self.trace)
        return self.choices or [only]

    def as_dict(self) -> dict[str, Any]:
        """The fields of a line, in their order. Nothing in it depends on the time or the machine."""
        record = _recorded(self, ("id", "text", "token_ids", "finish_reason", "usage", "error"))
        if self.choices is not None:
            record["choices"] = [choice.as_dict() for choice in self.choices]
        if self.digest:
            record["request_digest"] = self.digest
        return record

    def as_line(self, model: str = "", created: int = 0) -> bytes:
        """The line of JSONL, newline included: an OpenAI batch line if the request was one.

        Args:
            model, created: what such a line says of the model where the request does not name it, and of the time, in
                seconds since 1970.
        """
        record = as_openai(self, model, created) if self.openai else self.as_dict()
        return (json_text(record, allow_nan=False) + "\n").encode()

    def as_record(self, model: str = "", created: int = 0) -> Record:
        kind = "" if self.error is None else self.error["type"]
        return Record(self.as_line(model, created), self.finish_reason, kind, **self.usage, seconds=self.seconds)


def error_result(
    kind: str, message: str, *, request: Request | None = None, line: int | None = None, **known: Any
) -> Result:
    """The record of a request that could not be answered, or of what did not become one; ``known``: fields of it, but
    for what the request says itself."""
    line = line if request is None else request.line
    return _result(request, error={"type": kind, "message": message, "line": line}, **known)


def from_request_error(
    error: RequestError, request: Request | None = None, *, line: int | None = None, digest: str = "", index: int = 0
) -> Result:
    """Of ``request``, or of a line that did not become one."""
    known: dict[str, Any] = {"id": error.request_id, "openai": error.openai, "digest": digest, "index": index}
    return error_result(error.kind, str(error), request=request, line=line, **known)


def from_choices(
    request: Request, prompt_tokens: int, choices: List[Choice], seconds: float, *, index: int = 0
) -> Result:
    """The result of a request whose continuations are all there."""
    written = sum(len(choice.token_ids) for choice in choices)
    return _result(
        request,
        **vars(choices[0]),
        usage={"prompt_tokens": prompt_tokens, "completion_tokens": written},
        choices=list(choices) if len(choices) > 1 else None,
        seconds=seconds,
        index=index,
    )


def from_embeddings(request: Request, tokens: int, vectors: list[list[float]], *, index: int = 0) -> Result:
    """The result of a request for embeddings."""
    usage = {"prompt_tokens": tokens, "completion_tokens": 0}
    return _result(request, finish_reason="stop", usage=usage, embeddings=vectors, index=index)


def _result(request: Request | None, **fields: Any) -> Result:
    """With what the request says of itself."""
    if request is not None:
        fields |= {"id": request.id, "openai": request.openai, "digest": request.digest}
    return Result(request=request, **fields)


def _recorded(item: Choice | Result, always: tuple[str, ...]) -> dict[str, Any]:
    """Fields of a record in their order: those that are always there, and those that were asked for."""
    record = {name: getattr(item, name) for name in always}
    return record | {name: found for name in ("logprobs", "trace") if (found := getattr(item, name)) is not None}
