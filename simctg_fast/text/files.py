"""People's files of lines: plain or compressed, from a path or a pipe, with the marks and line ends of any system."""

from __future__ import annotations

import gzip
import io
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..checks import user_path

__all__ = ["COMPRESSED", "STDIN", "ReadError", "TextLines", "content_suffix", "is_utf8", "made_parent"]

STDIN = "-"
COMPRESSED = (".gz", ".zst")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class ReadError(ValueError):
    """A file that cannot be read, or not to its end; the message names it and says why."""


def made_parent(path: str | os.PathLike[str]) -> Path:
    """`user_path` of a file to be, with the folder that is to hold it made if it is missing.

    Raises:
        ValueError: it ends as folders do. OSError: the folder cannot be made.
    """
    if os.fspath(path).endswith("/"):
        raise ValueError(f"{os.fspath(path)!r} is the name of a folder; give that of a file")
    target = user_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def content_suffix(path: str | os.PathLike[str]) -> str:
    """The ending that says what is in a file, in lower case: ``.txt`` of ``notes.TXT.gz``."""
    name = Path(path)
    return (Path(name.stem) if name.suffix.lower() in COMPRESSED else name).suffix.lower()


def is_utf8(line: str) -> bool:
    """Whether a line of `TextLines` was UTF-8: bytes that were not stand in it as lone surrogates."""
    if line.isascii():
        return True
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


class TextLines:
    """The lines of a file as ``(number, text)``, from 1, each with the newline it ended in as ``\\n``.

    A byte order mark is passed over, ``\\r\\n`` and a bare ``\\r`` end a line, ``.gz`` and ``.zst`` are unpacked,
    ``-`` is standard input. Bytes that are not UTF-8 do not end the reading: see `is_utf8`. Used as a context manager,
    or iterated to the end.

    Args:
        path: a regular file, a pipe, or ``-``.

    Attributes:
        name: for messages; is_regular: no pipe, so it may be read again; size: its bytes, None of a pipe.

    Raises:
        FileNotFoundError: there is no such file.
        ReadError: a folder, a device, a terminal, UTF-16, or no right to read; while iterating: a file that is damaged.
        ImportError: ``.zst`` without the package `zstandard`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.number = 0
        self.size: int | None = None
        self.is_regular = False
        self._text: io.TextIOWrapper | None = None
        if os.fspath(path) == STDIN:
            self.name, self._raw = "standard input", _standard_input()
        else:
            target = user_path(path)
            self.name = str(target)
            self._raw = self._open(target)
        unpacked = self._unpack(Path(self.name).suffix.lower() if os.fspath(path) != STDIN else "")
        buffered = unpacked if isinstance(unpacked, io.BufferedReader) else io.BufferedReader(unpacked)
        try:
            if buffered.peek(2)[:2] in _UTF16:
                raise ReadError(f"{self.name} is UTF-16, not UTF-8: save it as UTF-8")
        except Exception as error:
            self.close()
            if isinstance(error, ReadError):
                raise
            raise self._failed(error) from error
        self._text = io.TextIOWrapper(buffered, encoding="utf-8-sig", errors="surrogateescape", newline=None)

    def _open(self, path: Path) -> BinaryIO:
        try:
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode):
                raise ReadError(f"{path} is a folder; give a file")
            if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
                raise ReadError(f"{path} is a device or socket; give a file, a pipe, or - for standard input")
            file = open(path, "rb")  # noqa: SIM115 - closed by close()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no file {str(path)!r}") from error
        except OSError as error:
            raise ReadError(f"{path} cannot be read: {error.strerror}") from error
        self.is_regular = stat.S_ISREG(mode)
        self.size = os.fstat(file.fileno()).st_size if self.is_regular else None
        return file

    def _unpack(self, suffix: str) -> Any:
        if suffix == ".gz":
            return gzip.GzipFile(fileobj=self._raw)
        if suffix == ".zst":
            try:
                import zstandard
            except ImportError as error:
                self.close()
                raise ImportError(f"{self.name} needs zstandard: pip install 'simctg_fast[zstd]' ({error})") from error
            return io.BufferedReader(_Frames(self._raw, zstandard.ZstdDecompressor().decompressobj))
        return self._raw

    def __iter__(self) -> Iterator[tuple[int, str]]:
        while self._text is not None:
            try:
                line = self._text.readline()
            except Exception as error:  # gzip, zlib and zstandard have their own
                raise self._failed(error) from error
            if not line:
                self.close()
                return
            self.number += 1
            yield self.number, line

    def _failed(self, error: Exception) -> ReadError:
        return ReadError(f"{self.name} cannot be read behind line {self.number}: {error}")

    def stat(self) -> os.stat_result | None:
        """Of the open file; None where it is none of the system's."""
        try:
            return os.fstat(self._raw.fileno())
        except (OSError, ValueError):
            return None

    @property
    def position(self) -> int:
        """Bytes of the file that have been read, a little ahead of the lines; 0 of a pipe."""
        return self._raw.tell() if self.is_regular and not self._raw.closed else self.size or 0

    def close(self) -> None:
        if self._raw is not getattr(sys.stdin, "buffer", None):
            self._raw.close()
        elif self._text is not None:
            self._text.detach()  # or it would close standard input when it is collected
            self._text = None

    def __enter__(self) -> TextLines:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Frames(io.RawIOBase):
    """What is packed in the zstd frames of a file. (zstandard's own reader passes over a last frame that is torn.)"""

    def __init__(self, raw: BinaryIO, new_frame: Callable[[], Any]):
        self._raw, self._new_frame = raw, new_frame
        self._frame: Any = None
        self._packed = self._unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            packed = self._packed or self._raw.read(1 << 16)
            self._packed = b""
            if not packed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("it ends within a frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._new_frame()
            self._unpacked = self._frame.decompress(packed)
            self._packed = self._frame.unused_data if self._frame.eof else b""
        count = min(len(buffer), len(self._unpacked))
        buffer[:count], self._unpacked = self._unpacked[:count], self._unpacked[count:]
        return count


def _standard_input() -> BinaryIO:
    if sys.stdin is None or sys.stdin.closed:
        raise ReadError("standard input is closed: pipe lines in, or name a file")
    if sys.stdin.isatty():
        raise ReadError("standard input is a terminal: pipe lines in, or name a file")
    try:  # a file of our own: closing it, or a thread that reads it to the last, is nobody else's affair
        return open(os.dup(sys.stdin.fileno()), "rb")
    except (OSError, ValueError, AttributeError):
        return sys.stdin.buffer
