"""The output file: append-only, one line a request, and the memory of what is done."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger("simctg_fast")

SYNC_LINES = 64  # lines, or
SYNC_SECONDS = 2.0  # seconds after which what was written is forced to the disk

Key = tuple[str, Any]  # ("id", its JSON text), or ("line", number) for a line without a usable id


class JournalError(Exception):
    """The output file cannot be used; the message says why and what to do."""


def id_key(request_id: Any) -> Key:
    return ("id", json.dumps(request_id))


class Journal:
    """Opens ``path`` for appending, locked against other runs until it is closed or its process dies.

    A last line without its newline (a run was killed while writing) is cut off. Each line is handed to the system at
    once, so that a killed process loses none; groups of them are forced to the disk.

    Attributes:
        done: keys of the records that are there; errors: how many of them are errors.

    Raises:
        JournalError: locked by another run, not writable, or a line that is no record.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise JournalError(f"the output {self.path} cannot be written: {error.strerror}") from error
        try:
            self._lock()
            self.done: set[Key] = set()
            self.errors = 0
            self.size = 0
            self.cut = 0
            self._read()
        except BaseException:
            os.close(self.file)
            raise
        self._unsynced, self._synced_at = 0, time.monotonic()

    def _lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(
                f"the output {self.path} is being written by another run; wait for it, or choose another output"
            ) from error
        except OSError as error:
            raise JournalError(f"the output {self.path} cannot be locked here: {error.strerror}") from error

    def _read(self) -> None:
        with open(os.dup(self.file), "rb") as lines:
            lines.seek(0)
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    self.cut = len(line)
                    break
                self._note(line, number)
                self.size += len(line)
        if self.cut:
            logger.warning("%s: cut off its last line, which a killed run had left unfinished", self.path)
            os.ftruncate(self.file, self.size)
            os.fsync(self.file)

    def _note(self, line: bytes, number: int) -> None:
        try:
            key, is_error = record_key(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JournalError(
                f"line {number} of the output {self.path} is no record of a run: {line[:60]!r}"
            ) from error
        if key in self.done:
            raise JournalError(f"line {number} of the output {self.path} repeats {key[0]} {key[1]}")
        self.done.add(key)
        self.errors += is_error

    def append(self, line: bytes) -> None:
        """Add one line, its newline included.

        Raises:
            OSError: it could not be written (a full disk). No part of it is left behind.
        """
        written = 0
        try:
            while written < len(line):
                written += os.write(self.file, line[written:])
        except OSError:
            os.ftruncate(self.file, self.size)
            raise
        self.size += len(line)
        self._unsynced += 1
        if self._unsynced >= SYNC_LINES or time.monotonic() - self._synced_at >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Force what was written to the disk."""
        if self._unsynced:
            os.fsync(self.file)
            self._unsynced = 0
        self._synced_at = time.monotonic()

    def close(self) -> None:
        try:
            self.sync()
        finally:
            os.close(self.file)  # and gives the lock back

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def record_key(record: dict[str, Any]) -> tuple[Key, bool]:
    """What a line of output answers, and whether with an error. Raises ValueError or KeyError for other objects."""
    error = record["error"]
    request_id = record["custom_id"] if "custom_id" in record else record["id"]
    if request_id is not None:
        return id_key(request_id), error is not None
    if error is None or not isinstance(error.get("line"), int):
        raise ValueError("a record without an id needs the line it answers")
    return ("line", error["line"]), True
