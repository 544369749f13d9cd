"""Lines of the input file that are still to be answered."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...text.files import STDIN, TextLines, content_suffix, is_utf8
from ...text.texts import short
from ..requests import Request, RequestError, check_utf8, decode_line, digest_of, line_id
from ..sequence import IDLE
from .journal import Key, id_key

Parse = Callable[..., Request]

QUIET_SECONDS = 10.0  # a file that was not written for so long is complete
READ_AHEAD = 4096  # lines of a pipe
WAIT_SECONDS = 0.02  # for a line of a pipe, where nothing is in work


@dataclass(frozen=True)
class BadLine:
    """A line that is no request: why, which, and the digest of what it holds."""

    error: RequestError
    number: int
    digest: str


@dataclass(frozen=True)
class Changed:
    """A line that is not what was answered under its key."""

    key: Key
    number: int


class InputLines:
    """Reads requests a line at a time, so a file may be of any size and may still be growing.

    A ``.txt`` file holds one prompt a line, any other JSON objects; of standard input and pipes the first line says
    which. See `TextLines` for what else it may be.

    Args:
        path: the file, or ``-``.
        parse: makes a `Request` of the object on a line (``line=`` is its number, ``digest=`` what it asks).
        done: keys that have an answer already, with the digest of what was asked ("" where nobody knows).
        num_shards, shard_id: only lines whose number − 1 leaves ``shard_id`` when divided by ``num_shards``.

    Attributes:
        total: lines seen that belong to this shard; skipped: those of them that were done;
        unfinished: number of a last line that is not complete yet, left for the next run.

    Raises:
        FileNotFoundError, ReadError: see `TextLines`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        parse: Parse,
        done: Mapping[Key, str],
        num_shards: int = 1,
        shard_id: int = 0,
    ):
        self.path, self.parse, self.done = path, parse, done
        self.num_shards, self.shard_id = num_shards, shard_id
        self.total = self.skipped = 0
        self.unfinished: int | None = None
        self.lines = TextLines(path)
        self.is_pipe = os.fspath(path) == STDIN or not self.lines.is_regular
        self.is_text = not self.is_pipe and content_suffix(path) == ".txt"
        self._has_begun = not self.is_pipe
        self._seen: dict[Key, int] = {}

    def __enter__(self) -> InputLines:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.lines.is_regular:  # a pipe's may be waited for by a `Reader`, and then cannot be closed
            self.lines.close()

    def __iter__(self) -> Iterator[Request | BadLine | Changed]:
        """Requests, bad lines, and lines that have changed since they were answered."""
        for number, line in self.lines:
            if not line.strip():
                continue
            if not self._has_begun:
                self._has_begun, self.is_text = True, is_utf8(line) and not _looks_like_json(line)
            item = self._item(line, number)
            is_ours = (number - 1) % self.num_shards == self.shard_id
            if item is None:  # whatever comes after it by now belongs to it
                self.unfinished = number if is_ours else None
                return
            if not is_ours:
                if _key(item) in self.done:  # lines before it have come or gone
                    yield Changed(_key(item), number)
                continue
            self.total += 1
            for key in keys_of(item, number):
                before = self.done.get(key)
                if before is not None:
                    self.skipped += 1
                    if before not in ("", item.digest):
                        yield Changed(key, number)
                    break
            else:
                yield item

    def _item(self, line: str, number: int) -> Request | BadLine | None:
        """None: the line is not finished."""
        digest = ""
        if self.is_text and not line.endswith("\n") and self._grows():
            return None
        try:
            record = {"prompt": self._text(line)} if self.is_text else decode_line(line)
            digest = digest_of(record)
            request_id = line_id(record, number)
            if isinstance(request_id, str | int) and not isinstance(request_id, bool):
                first = self._seen.setdefault(id_key(request_id), number)
                if first != number:
                    message = f"id {short(request_id)} was used by line {first} before"
                    return BadLine(RequestError("duplicate_id", message, openai="custom_id" in record), number, digest)
            return self.parse(record, line=number, digest=digest)
        except RequestError as error:
            if not line.endswith("\n") and error.kind in ("invalid_json", "invalid_utf8") and self._may_grow():
                return None
            if not isinstance(error.request_id, str | int) or isinstance(error.request_id, bool):
                error.request_id = None
            return BadLine(error, number, digest or digest_of(line))

    def _text(self, line: str) -> str:
        """The prompt on a line of text. Raises `RequestError` where it is none."""
        check_utf8(line)
        if self.is_pipe and _looks_like_json(line):
            message = "a line of JSON in a pipe that began with plain text: is its beginning missing?"
            raise RequestError("wrong_content", message)
        return line.removesuffix("\n")

    def _may_grow(self) -> bool:
        """Whether somebody may still be writing the line that ends the file without a newline, and is no JSON."""
        found = self.lines.stat() if self.lines.is_regular else None
        return found is not None and (self._grows() or abs(time.time() - found.st_mtime) < QUIET_SECONDS)

    def _grows(self) -> bool:
        """Whether somebody was seen to write behind the line that ends the file without a newline. A file that was
        written just now is looked at for a second."""
        found = self.lines.stat() if self.lines.is_regular else None
        if found is not None and found.st_size == self.lines.position:
            time.sleep(min(1.0, max(0.0, 1.0 - (time.time() - found.st_mtime))))
            found = self.lines.stat()
        return found is not None and found.st_size != self.lines.position


class Reader:
    """Items of an iterator that another thread reads, with `IDLE` in between while there is none: a pipe whose writer
    waits for an answer holds up neither what is in work nor a signal.

    Args:
        is_busy: whether something is in work, so that no time is lost by waiting.
    """

    def __init__(self, items: Iterable[Any], is_busy: Callable[[], bool]):
        self._found: queue.Queue[Any] = queue.Queue(maxsize=READ_AHEAD)
        self._items, self._is_busy = items, is_busy
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for item in self._items:
                self._found.put(item)
            self._found.put(StopIteration())
        except BaseException as error:
            self._found.put(error)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            item = self._found.get_nowait() if self._is_busy() else self._found.get(timeout=WAIT_SECONDS)
        except queue.Empty:
            return IDLE
        if isinstance(item, BaseException):
            self._found.put(item)  # for whoever asks again
            raise item
        return item


def _looks_like_json(line: str) -> bool:
    return line.lstrip().startswith(("{", "["))


def keys_of(item: Request | BadLine, number: int) -> list[Key]:
    """Under which a line may have been answered: its id, or its number where it had none that could be used."""
    return list(dict.fromkeys((_key(item), ("line", number))))


def _key(item: Request | BadLine) -> Key:
    if isinstance(item, Request):
        return id_key(item.id)
    request_id = item.error.request_id
    return ("line", item.number) if request_id is None else id_key(request_id)
