"""Child processes of tests. Each leads a group of its own, which ends with the test: done, failed or interrupted."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

# What catches a child that hangs. It says nothing about speed: on a busy machine minutes of work become many.
LIMIT = 1200.0


@contextlib.contextmanager
def started(command: list[Any], **options: Any) -> Iterator[subprocess.Popen]:
    """A running child, as `subprocess.Popen` starts it. When the block ends, it and its own children are killed."""
    process = subprocess.Popen([str(part) for part in command], start_new_session=True, **options)
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """Kills a child that leads its own group, and the group: the group is there as long as one of them is."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError, ValueError):
                pipe.close()


def run_child(
    command: list[Any], *, input: str | None = None, check: bool = False, timeout: float = LIMIT, **options: Any
) -> subprocess.CompletedProcess:
    """`subprocess.run` with text, both streams captured unless told otherwise, one thread, and no child left behind.

    Raises:
        subprocess.TimeoutExpired: it took longer than `timeout` seconds. CalledProcessError: it failed, with `check`.
    """
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    options["env"] = {"OMP_NUM_THREADS": "1", **(os.environ if options.get("env") is None else options["env"])}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with started(command, **options) as process:
        out, errors = process.communicate(input, timeout=timeout)
    done = subprocess.CompletedProcess(process.args, process.returncode, out, errors)
    if check:
        done.check_returncode()
    return done
