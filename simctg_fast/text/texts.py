"""Texts as people give them: one or many in Python, or the lines of a file; and their tokens."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..checks import user_path
from .files import STDIN, TextLines, content_suffix, is_utf8

__all__ = ["read_lines", "short", "text_list", "tokenized"]

_SUFFIXES = (".txt", ".jsonl")
_ALLOWED = "a string or a list of strings"


def text_list(texts: Any, name: str = "texts") -> list[str]:
    """The texts as a list: of one for a single string, else of all that a list, tuple, generator or column holds.

    Raises:
        ValueError: anything else, or an element that is no string or holds half of a surrogate pair; the message has
            its index.
    """
    if isinstance(texts, str):
        texts = [texts]
    # What can be iterated, but over names, bytes or rows, in no order, or with line ends.
    odd = isinstance(texts, Mapping | set | frozenset | bytes | bytearray | memoryview | io.IOBase)
    if odd or not isinstance(texts, Iterable) or getattr(texts, "ndim", 1) != 1:
        raise ValueError(f"{name} must be {_ALLOWED}, got {type(texts).__name__} {short(texts)}")
    found = []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name} must be {_ALLOWED}, but {name}[{index}] is {type(text).__name__} {short(text)}")
        if not is_utf8(text):
            raise ValueError(f"{name}[{index}] must be text, got half of a surrogate pair in {short(text)}")
        found.append(str.__str__(text))  # of a subclass the value, whatever it shows
    return found


def tokenized(tokenizer: Any, texts: list[str], **options: Any) -> Any:
    """What ``tokenizer(texts, **options)`` returns, with the ``input_ids`` of every text.

    Raises:
        ValueError: a text that the tokenizer cannot take or that has no token; the message has its index and the
            reason.
    """
    encoded, problem, error = _tried(tokenizer, texts, options)
    if problem:
        for index, text in enumerate(texts):
            _, alone, cause = _tried(tokenizer, [text], options)
            if alone:
                raise ValueError(f"texts[{index}] cannot be tokenized ({alone}), got {short(text)}") from cause
        together = f"for all together {problem}" if error is None else f"not all together: {error}"
        raise ValueError(f"the tokenizer takes each of the {len(texts)} texts, but {together}") from error
    for index, row in enumerate(encoded["input_ids"]):
        if not len(row):
            raise ValueError(f"texts[{index}] must have at least one token, got {short(texts[index])}")
    return encoded


def _tried(tokenizer: Any, texts: list[str], options: dict[str, Any]) -> tuple[Any, str, Exception | None]:
    """What the tokenizer returns; why that is none of what tokenizers return, empty where it is; and what it raised."""
    try:
        encoded = tokenizer(texts, **options)
        if encoded is None:
            return None, "the tokenizer returned None", None
        rows = encoded["input_ids"]
        if rows is None or len(rows) != len(texts):
            count = None if rows is None else len(rows)
            return None, f"the tokenizer returned input_ids of {count} in place of {len(texts)} texts", None
        if any(row is None or not hasattr(row, "__len__") for row in rows):
            return None, "the tokenizer returned no list of input_ids", None
    except Exception as error:  # of any kind, by tokenizer
        return None, f"{type(error).__name__}: {error}", error
    return encoded, "", None


def short(value: Any) -> str:
    """``repr`` in one line of 80 characters at most, for messages."""
    try:
        shown = repr(value) if isinstance(value, str) else " ".join(repr(value).split())
    except Exception as error:  # integers beyond the digits that Python converts, nesting beyond its stack
        return f"{type(value).__name__} ({error})"
    return shown if len(shown) <= 80 else shown[:79] + "…"


def read_lines(
    path: str | os.PathLike[str], what: str, *, only_files: str = ""
) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
    """``(place, line, record)`` of the lines that are not blank of a ``.txt`` file, where ``record`` is None, or of a
    ``.jsonl`` file, where it is the JSON object that the line is.

    `TextLines` says how they may be encoded and packed. Standard input (``-``) and pipes have no ending: they are JSON
    lines where the first line that is not blank is a JSON object, else text. ``place`` is file and line, for messages.

    Args:
        what: the file holds, for messages.
        only_files: why it has to be a file, where pipes will not do.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another ending, a file that cannot be read, a line that is not UTF-8 or not a JSON object.
        ImportError: as `TextLines`.
    """
    if only_files and (os.fspath(path) == STDIN or user_path(path).is_fifo()):
        raise ValueError(f"the {what} must be a .txt or .jsonl file, got the pipe {os.fspath(path)!r}: {only_files}")
    with TextLines(path) as lines:
        suffix = "" if os.fspath(path) == STDIN else content_suffix(lines.name)
        # Where standard input is a file, /dev/stdin is one.
        nameless = not lines.is_regular or lines.name.startswith(("/dev/", "/proc/"))
        if suffix not in _SUFFIXES and not nameless:
            raise ValueError(f"the {what} must be a .txt or .jsonl file, got {lines.name!r}")
        is_json = suffix == ".jsonl" if suffix in _SUFFIXES else None
        for number, line in lines:
            if not line.strip():
                continue
            place = f"{lines.name!r}, line {number}"
            if not is_utf8(line):
                raise ValueError(f"{place}: not UTF-8, got {short(line.strip().encode(errors='surrogateescape'))}")
            if is_json is None:
                is_json = _is_object(line, place)
            line = line.rstrip("\n")
            record = _parsed(line, place) if is_json else None
            if is_json and not isinstance(record, dict):
                raise ValueError(f"{place}: must be an object, got {short(line.strip())}")
            yield place, line, record


def _is_object(line: str, place: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):  # JSON, but beyond what can be read
        return line.lstrip().startswith("{")
    return isinstance(_parsed(line, place), dict)


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError as error:
        raise ValueError(f"{place}: JSON that is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
