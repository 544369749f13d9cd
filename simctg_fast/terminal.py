"""How a command ends: with a word, an exit code, and nothing lost on the way; on terminals, pipes and full disks."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from .printable import printable

__all__ = [
    "FAULT",
    "REFUSED",
    "OutputError",
    "Stopped",
    "explained",
    "guarded",
    "interruption",
    "shown",
    "signal_code",
    "was_closed",
]

REFUSED = 2  # what was asked for cannot be done
OUTPUT = 3  # the disk is full, or an output cannot be written for another reason
FAULT = 70  # an error that nobody has foreseen
PIPE = 141  # whoever read standard output has had enough: 128 + SIGPIPE, as of any other program

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EPIPE)
# safetensors and tokenizers write by themselves and raise errors of their own, with the system's number in the text.
_SYSTEM_ERROR = re.compile(r"os error (\d+)|Os \{ code: (\d+)")
_TORCH_WRITER = re.compile(r"PytorchStreamWriter failed|unexpected pos \d+ vs")  # torch.save, which keeps no number


class OutputError(Exception):
    """Standard output cannot be written. No OSError, which other hands would take for a fault of their own files."""

    def __init__(self, cause: OSError):
        super().__init__(cause.strerror or str(cause))
        self.is_pipe = cause.errno == errno.EPIPE


class Stopped(KeyboardInterrupt):
    """SIGTERM, which leaves a command by the same way as Ctrl-C."""


_received: list[KeyboardInterrupt] = []


class _Output:
    """Standard output: what it cannot write is an `OutputError`, also for those who would pass over an OSError."""

    def __init__(self, stream: Any, was_closed: bool):
        self._stream, self.was_closed = stream, was_closed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if self.was_closed:
            raise OutputError(OSError(errno.EBADF, "it is closed"))
        try:
            return self._stream.write(text)
        except OSError as error:
            raise OutputError(error) from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise OutputError(error) from error


class _Notes:
    """Standard error: that nobody can read it must not end the work, and cannot be said anywhere."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return


class _Escaped(logging.Formatter):
    """Warnings name files and texts of others, too."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def shown(text: str, stream: Any = None) -> str:
    """``text`` for ``stream`` (standard output): its control characters escaped on a terminal, else as it is."""
    return printable(text) if (stream or sys.stdout).isatty() else text


def was_closed() -> bool:
    """Whether the command was started without a standard output (``>&-``)."""
    return getattr(sys.stdout, "was_closed", False)


def explained(error: BaseException) -> tuple[int, str]:
    """Exit code and one line about an error that a command could not help."""
    number = _system_error(error)
    if number in _UNWRITABLE:
        name = getattr(error, "filename", None)
        return OUTPUT, f"the output{'' if name is None else f' {str(name)!r}'} cannot be written: {os.strerror(number)}"
    if isinstance(error, RuntimeError) and _TORCH_WRITER.search(str(error)):
        return OUTPUT, f"the output cannot be written: {str(error).splitlines()[0]}; is the disk full?"
    if isinstance(error, OSError) and error.strerror:
        return REFUSED, error.strerror if error.filename is None else f"{str(error.filename)!r}: {error.strerror}"
    if isinstance(error, OSError | ValueError | ImportError):
        return REFUSED, str(error) or type(error).__name__
    text = " ".join(str(error).split())
    return FAULT, f"{type(error).__name__}: {text}" if text else type(error).__name__


def _system_error(error: BaseException) -> int:
    """The number of the system's error that this is, or that it came of; 0 of none."""
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            break
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.errno
        if found := _SYSTEM_ERROR.search(str(seen)):
            return int(found[1] or found[2])
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return 0


@contextmanager
def guarded() -> Iterator[None]:
    """Streams and signals for the length of a command, which ends in SystemExit at worst.

    Missing streams are opened, so that no file gets their numbers; a failure of standard output is said and counted,
    one of standard error passed over; SIGTERM is `Stopped`. Text that a stream's encoding lacks is escaped.
    """
    for number in range(3):
        if not _is_open(number):
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    before = sys.stdout, sys.stderr
    out, errors = (stream or open(os.devnull, "w") for stream in before)  # noqa: SIM115 - as long as the process
    for stream in (out, errors):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = _Output(out, before[0] is None), _Notes(errors)
    if logging.lastResort is not None:  # where nobody has set up logging
        logging.lastResort.setFormatter(_Escaped())
    try:
        with _signals():
            try:
                yield
            finally:
                sys.stdout.flush()
    except OutputError as error:
        _end_output(out, error)
    except KeyboardInterrupt as error:
        sys.exit(signal_code(error))
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def signal_code(error: KeyboardInterrupt) -> int:
    """The exit code of a command that a signal ended."""
    return 128 + (signal.SIGTERM if isinstance(error, Stopped) else signal.SIGINT)


def _end_output(out: Any, error: OutputError) -> NoReturn:
    if out is sys.__stdout__:
        # What is left in the buffer would be tried again, and complained of, when Python ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
    if error.is_pipe:
        sys.exit(PIPE)
    print(f"Error: standard output cannot be written: {error}", file=sys.stderr)
    sys.exit(OUTPUT)


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM as `Stopped`; both signals are remembered. One that is ignored or that others mind is left as it is."""
    usual: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    ours = [number for number, handler in usual.items() if signal.getsignal(number) == handler]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    _received.clear()
    for number in ours:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, usual[number])


def _stop(number: int, frame: Any) -> NoReturn:
    _received.append(Stopped() if number == signal.SIGTERM else KeyboardInterrupt())
    raise _received[-1]


def interruption() -> KeyboardInterrupt | None:
    """The signal that has come, if one has: where it came during an import, another error may be what is left of it."""
    return _received[-1] if _received else None
