"""Children that find torch and transformers imported: forks of one process that has done nothing but that.

Half of what a short child does is to import these. What has to begin as a user's process does is started as one
(`processes.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .processes import run_child, started

SERVER = """
import json, os, sys, traceback, warnings
import torch, typer, rich.console
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.generation import utils

torch.set_num_threads(1)
before = set(sys.modules)
assert not any(name.partition(".")[0] == "simctg_fast" for name in before)

def serve(request):
    for number, name in enumerate(("in", "out", "err")):
        flags = os.O_RDONLY if name == "in" else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(request[name], flags), number)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[:0] = [request["cwd"], *request["env"].get("PYTHONPATH", "").split(os.pathsep)]
    warnings.simplefilter("ignore" if request["quiet"] else "default")
    sys.argv[:] = ["-c"]
    exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 0
        try:
            serve(request)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """`run` is like `processes.run_child` on ``python -c code``, which it is where forks are not to be trusted."""

    def __init__(self, server: subprocess.Popen | None, folder: Path):
        self.server, self.folder = server, folder

    def run(self, code: str, *, cwd: Path | str, env: dict[str, str], quiet: bool = False):
        if self.server is None:
            options = ["-W", "ignore"] if quiet else []
            return run_child([sys.executable, *options, "-c", code], cwd=cwd, env=env)
        files = {"in": os.devnull} | {name: str(self.folder / name) for name in ("out", "err")}
        request = files | {"code": code, "cwd": str(cwd), "env": {"OMP_NUM_THREADS": "1"} | env, "quiet": quiet}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        returned = int(self.server.stdout.readline())
        out, errors = (Path(files[name]).read_text(encoding="utf-8") for name in ("out", "err"))
        return subprocess.CompletedProcess(["-c", code], returned, out, errors)


@contextlib.contextmanager
def forking() -> Iterator[Forks]:
    """Its forks end with the block, as children of `started` do."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("SIMCTG_FAST_")}
    if not sys.platform.startswith("linux"):
        yield Forks(None, Path())
        return
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with (
        tempfile.TemporaryDirectory() as folder,
        started([sys.executable, "-c", SERVER], env=environment, cwd=folder, **pipes) as server,
    ):
        yield Forks(server, Path(folder))
