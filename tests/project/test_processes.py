"""The children of tests end with them, and so do the children's children."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

import pytest

from ..processes import end, run_child, started

FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
print(child.pid, flush=True)
time.sleep(3600)
"""


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"  # nobody may be there to reap it
    except FileNotFoundError:
        return False


def ends(pid: int) -> bool:
    for _ in range(6000):
        if not is_running(pid):
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", ["leaves", "raises", "interrupted"])
def test_a_child_and_its_child_end_with_the_block(how):
    error = {"leaves": None, "raises": ZeroDivisionError, "interrupted": KeyboardInterrupt}[how]
    with pytest.raises(error) if error else contextlib.nullcontext():  # noqa: SIM117
        with started([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True) as process:
            grandchild = int(process.stdout.readline())
            assert is_running(process.pid)
            assert is_running(grandchild)
            if error:
                raise error
    assert process.returncode is not None
    assert ends(grandchild)
    end(process)  # once more does no harm


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_out_of_time(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired), (tmp_path / "pid").open("w") as out:
        run_child([sys.executable, "-c", FAMILY], stdout=out, timeout=3)
    written = (tmp_path / "pid").read_text()
    assert not written or ends(int(written))


def test_what_a_child_prints_and_gets():
    code = "import os, sys; print(sys.stdin.read() + os.environ['OMP_NUM_THREADS']); print('e', file=sys.stderr)"
    done = run_child([sys.executable, "-c", code], input="text ", env={**os.environ, "OMP_NUM_THREADS": "3"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "text 3\n", "e\n")
    with pytest.raises(subprocess.CalledProcessError):
        run_child([sys.executable, "-c", "raise SystemExit(3)"], check=True)
