"""The output file: append-only, one line a request, and the memory of what is done."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ...text.files import COMPRESSED, made_parent

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("simctg_fast")

SYNC_LINES = 64  # lines, or
SYNC_SECONDS = 2.0  # seconds after which what was written is forced to the disk
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_BEGIN = b'{"id": '  # how each of our lines begins

Key = tuple[str, Any]  # ("id", its JSON text), or ("line", number) for a line without a usable id


class JournalError(ValueError):
    """The output file cannot be used; the message says why and what to do."""


class WriteError(OSError):
    """The output cannot be written any more, or what was written is no longer there; the message says which."""


def id_key(request_id: Any) -> Key:
    return ("id", json.dumps(request_id))


class Journal:
    """Opens ``path`` for appending, locked against other runs until it is closed or its process dies.

    Missing folders are made. Each line is handed to the system at once, so that a killed process loses none; groups of
    them are forced to the disk. Nothing of a file that is there is changed before `repair`, or the first line.

    Attributes:
        done: keys of the records that are there, each with the digest of the request it answers ("" of older files);
        failed: those of them that are errors; records: how many there are by now; size: bytes of whole records; torn:
        bytes of a last line without its newline behind them.

    Raises:
        JournalError: locked by another run, not writable, no regular file, or a line that is no record.
        WriteError: the disk is full.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = _output_path(path)
        self.done: dict[Key, str] = {}
        self.failed: set[Key] = set()
        self.size = self.torn = self.records = 0
        self._is_unended = False
        self._unsynced, self._synced_at = 0, time.monotonic()
        try:
            made_parent(self.path)
            self.is_new = not self.path.exists()
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _PLAIN, 0o644)
        except OSError as error:
            if error.errno in FULL:
                raise WriteError(error.errno, error.strerror) from error
            raise JournalError(f"the output {self.path} cannot be written: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise JournalError(f"the output {self.path} is no regular file; name one, or - for standard output")
            self._lock()
            self._read()
        except BaseException:
            os.close(self._file)
            raise

    def _lock(self) -> None:
        if fcntl is None:
            return
        busy = f"the output {self.path} is being written by another run; wait for it, or choose another output"
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(busy) from error
        except OSError as error:
            raise JournalError(f"the output {self.path} cannot be locked here: {error.strerror}") from error
        if not self._is_in_place():  # the other run has put a new file there in the meantime
            raise JournalError(busy)

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def _read(self) -> None:
        with open(os.dup(self._file), "rb") as lines:
            lines.seek(0)
            for number, line in enumerate(lines, start=1):
                if line.endswith(b"\n") or record_of(line) is not None:
                    if line.strip():  # an editor may leave an empty one
                        self._note(line, number)
                    self.size += len(line)
                    self._is_unended = not line.endswith(b"\n")
                    continue
                self.torn = len(line)
                # Of a record that was cut short, or the zeros that a lost machine leaves in its place.
                if not self.size and line[: len(_BEGIN)] != _BEGIN[: len(line)] and line.strip(b"\0"):
                    raise JournalError(f"the output {self.path} is no file of a run: it begins with {line[:60]!r}")

    def _note(self, line: bytes, number: int) -> None:
        if (record := record_of(line)) is None:
            raise JournalError(f"line {number} of the output {self.path} is no record of a run: {line[:60]!r}")
        key, is_error, digest = record
        if key in self.done:
            raise JournalError(f"line {number} of the output {self.path} repeats {key[0]} {key[1]}")
        self.done[key] = digest
        self.records += 1
        if is_error:
            self.failed.add(key)

    def repair(self) -> None:
        """Cut off a last line that a killed run had left unfinished, end one that is whole but for its newline. The
        caller knows that the file is a run's."""
        if self._is_unended:
            self._write(b"\n")
            self._is_unended = False
        if self.torn:
            logger.warning("%s: cut off its last line, which a killed run had left unfinished", self.path)
            os.ftruncate(self._file, self.size)
            os.fsync(self._file)
            self.torn = 0

    def drop(self, keys: Collection[Key]) -> None:
        """Take the records of ``keys`` out, in one step: whoever is killed here leaves the old file or the new one."""
        if not keys:
            return
        draft, name = tempfile.mkstemp(prefix=".simctg-", dir=self.path.parent)
        try:
            os.chmod(name, stat.S_IMODE(os.fstat(self._file).st_mode))
            with open(os.dup(self._file), "rb") as old, open(draft, "wb", closefd=False) as new:
                old.seek(0)
                new.writelines(line for line in old if (record := record_of(line)) is None or record[0] not in keys)
            os.fsync(draft)
            os.close(draft)
            kept = os.open(name, os.O_RDWR | os.O_APPEND | _PLAIN)
            if fcntl is not None:
                fcntl.flock(kept, fcntl.LOCK_EX)
            os.replace(name, self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        os.close(self._file)
        self._file = kept
        self.size = os.fstat(kept).st_size
        self.records -= len(keys)
        for key in keys:
            self.done.pop(key, None)
            self.failed.discard(key)

    def append(self, line: bytes) -> None:
        """Add one line, its newline included.

        Raises:
            WriteError: it could not be written (a full disk), and no part of it is left behind; or the file is no
                longer what this run has written.
        """
        self.repair()
        self.check()
        self._write(line)
        self.records += 1
        self._unsynced += 1
        if self._unsynced >= SYNC_LINES or time.monotonic() - self._synced_at >= SYNC_SECONDS:
            self.sync()

    def _write(self, line: bytes) -> None:
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            os.ftruncate(self._file, self.size)
            raise WriteError(error.errno, error.strerror) from error
        self.size += len(line)

    def check(self) -> None:
        """Raise WriteError unless the file is still where and what it was."""
        size = os.fstat(self._file).st_size
        if not self._is_in_place():
            where = "was replaced by another file" if self.path.exists() else "was deleted"
            raise WriteError(f"{self.path} {where} while the run was writing it: {self._missing(0)}")
        if size < self.size:
            raise WriteError(
                f"{self.path} was cut from {self.size} to {size} bytes while the run was writing it: "
                f"{self._missing(size)}"
            )
        if size > self.size + self.torn:
            raise WriteError(f"{self.path} was written by something else: {size - self.size} bytes behind this run's")

    def _missing(self, size: int) -> str:
        with open(os.dup(self._file), "rb") as lines:
            lines.seek(0)
            left = lines.read(size).count(b"\n")
        return f"{self.records - left} of {self.records} records are missing there"

    def sync(self) -> None:
        """Force what was written to the disk. Raises WriteError."""
        try:
            if self._unsynced:
                os.fsync(self._file)
                self._unsynced = 0
        except OSError as error:
            raise WriteError(error.errno, error.strerror) from error
        self._synced_at = time.monotonic()

    def close(self) -> None:
        os.close(self._file)  # and gives the lock back

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None and self.is_new and not self.size and self._is_in_place():
            self.path.unlink()  # what was refused leaves no empty file behind
        self.close()


class Stream:
    """Standard output in the place of a journal: nothing is known of what was written before."""

    def __init__(self) -> None:
        self.done: Mapping[Key, str] = {}
        self.failed: Collection[Key] = ()
        self.size = self.torn = 0

    def append(self, line: bytes) -> None:
        """Raises BrokenPipeError where nobody reads any more, else WriteError."""
        try:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise WriteError(error.errno, error.strerror) from error

    def check(self) -> None:
        pass

    def sync(self) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def record_of(line: bytes) -> tuple[Key, bool, str] | None:
    """What a line of output answers, whether with an error, and the digest of the request; None if it is no record."""
    try:
        record = json.loads(line)
        error, digest = record["error"], record.get("request_digest", "")
        request_id = record["custom_id"] if "custom_id" in record else record["id"]
        key = ("line", error["line"]) if request_id is None else id_key(request_id)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    is_whole = isinstance(digest, str) and (key[0] == "id" or isinstance(key[1], int))
    return (key, error is not None, digest) if is_whole else None


def _output_path(path: str | os.PathLike[str]) -> Path:
    target = Path(os.path.realpath(path))  # a link stays one, also where the file is replaced
    if target.suffix.lower() in COMPRESSED:
        raise JournalError(f"the output {target} is written as plain lines: choose a name without {target.suffix}")
    return target


_PLAIN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
