"""Lines of the input file that are still to be answered."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from .journal import Key, id_key
from .requests import Request, RequestError, decode_line, line_id

Parse = Callable[..., Request]


class InputLines:
    """Reads JSONL a line at a time, so a file may be of any size and may still be growing.

    Args:
        path: the file.
        parse: makes a `Request` of the object on a line (``line=`` is its number).
        done: keys that have an answer already.
        num_shards, shard_id: only lines whose number − 1 leaves ``shard_id`` when divided by ``num_shards``.

    Attributes:
        total: lines seen that belong to this shard; skipped: those of them that were done;
        unfinished: number of a last line that is not complete yet, left for the next run.
    """

    def __init__(
        self, path: str | os.PathLike[str], parse: Parse, done: set[Key], num_shards: int = 1, shard_id: int = 0
    ):
        self.path, self.parse, self.done = path, parse, done
        self.num_shards, self.shard_id = num_shards, shard_id
        self.total = self.skipped = 0
        self.unfinished: int | None = None
        self.position = 0  # bytes read, for an estimate of what is left
        self._seen: dict[Key, int] = {}

    def __iter__(self) -> Iterator[Request | tuple[RequestError, int]]:
        """Requests, and for bad lines their error and number."""
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                self.position += len(line)
                if not line.strip():
                    continue
                item = self._item(line, number)
                if (number - 1) % self.num_shards != self.shard_id or self.unfinished is not None:
                    continue
                self.total += 1
                if self._is_done(item):
                    self.skipped += 1
                    continue
                yield item

    def _item(self, line: bytes, number: int) -> Request | tuple[RequestError, int]:
        try:
            given = decode_line(line)
            request_id = line_id(given, number)
            if isinstance(request_id, str | int) and not isinstance(request_id, bool):
                first = self._seen.setdefault(id_key(request_id), number)
                if first != number:
                    message = f"id {request_id!r} was used by line {first} before"
                    return RequestError("duplicate_id", message, openai="custom_id" in given), number
            return self.parse(given, line=number)
        except RequestError as error:
            if not line.endswith(b"\n") and error.kind in ("invalid_json", "invalid_utf8"):
                self.unfinished = number
            if error.request_id is not None and not isinstance(error.request_id, str | int):
                error.request_id = None
            return error, number

    def _is_done(self, item: Request | tuple[RequestError, int]) -> bool:
        if isinstance(item, Request):
            return id_key(item.id) in self.done
        error, number = item
        if error.request_id is not None and id_key(error.request_id) in self.done:
            return True
        return ("line", number) in self.done
