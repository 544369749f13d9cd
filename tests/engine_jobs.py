"""Jobs in processes of their own for the tests of the engine: started quickly, killed for real.

A server process imports everything once and forks a child for each job, so that a job starts in milliseconds and a
killed one leaves nothing behind. Run as a script this file is that server.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def save_model(folder: Path, **overrides) -> Path:
    """A tiny GPT-2 with random weights and its tokenizer of characters, as ``from_pretrained`` takes them."""
    from . import decoding_models

    decoding_models.build("gpt2", **overrides).save_pretrained(folder)
    decoding_models.tokenizer().save_pretrained(folder)
    return folder


def write_lines(path: Path, lines: list) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read_records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def sorted_lines(path: Path) -> list[bytes]:
    """Lines of an output in the order of their ids."""
    return sorted(path.read_bytes().splitlines(), key=lambda line: json.dumps(json.loads(line)["id"]))


class JobServer:
    """Starts jobs: ``start(args)`` returns a pid, ``wait(pid)`` its exit code (negative: the signal that ended it)."""

    def __init__(self, folder: Path, model: Path):
        from .repository import INSTALLED  # not in the server, which is this file as a script

        self.folder, self.count = folder, 0
        environment = os.environ | {"PYTHONPATH": str(INSTALLED), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # with the jobs, which it forks
        )
        assert self._ask(None) == "ready"

    def _ask(self, request) -> object:
        if request is not None:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the server of jobs has ended"
        return json.loads(line)

    def start(self, *args: object, **environment: str) -> int:
        self.count += 1
        self.output = self.folder / f"job-{self.count}"
        return self._ask({"args": [str(a) for a in args], "output": str(self.output), "environment": environment})

    def wait(self, pid: int) -> int:
        return self._ask({"wait": pid})

    def run(self, *args: object, **environment: str) -> int:
        return self.wait(self.start(*args, **environment))

    @property
    def stdout(self) -> str:
        """What the newest job has printed."""
        return self.output.with_suffix(".out").read_text()

    @property
    def stderr(self) -> str:
        return self.output.with_suffix(".err").read_text()

    @property
    def summary(self) -> dict:
        return json.loads(self.stdout.splitlines()[-1])

    def close(self) -> None:
        from .processes import LIMIT, end  # not in the server, which is this file as a script

        try:
            self.process.stdin.close()
            self.process.wait(timeout=LIMIT)
        finally:
            end(self.process)


def wait_for_records(path: Path, count: int, seconds: float = 1200.0) -> None:
    """Returns when ``path`` holds ``count`` whole lines."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)
    raise AssertionError(f"{path} has no {count} lines after {seconds} s")


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    import simctg_fast.engine.job.job
    from simctg_fast.cli import app

    # Everything that is imported on first use is, so that no job has to.
    engine = simctg_fast.engine.Engine.from_pretrained(sys.argv[1], slots=2, max_new_tokens=2)
    assert len(list(engine.generate(["a", "b", "c"]))) == 3
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            code = os.waitstatus_to_exitcode(status)
            print(json.dumps(code), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _job(app, request)
        print(json.dumps(pid), flush=True)


def _job(app, request: dict) -> None:
    for stream, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(request["output"] + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, stream)
    os.close(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(request["environment"])
    sys.path[:0] = os.environ.get("EXTRA_PATH", "").split(os.pathsep)
    code = 1
    try:
        app(request["args"])
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
