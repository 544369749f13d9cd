"""The README's Python runs as it stands there, top to bottom, and its commands exist."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch

from ..processes import run_child
from ..repository import repository

README = repository("README.md")
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_python_blocks_run_in_order(capsys):
    from simctg_fast import unpatch_transformers

    names: dict = {}
    try:
        for block in BLOCKS:
            exec(compile(block, str(README), "exec"), names)
    finally:
        unpatch_transformers()
    assert names["several"].shape[0] == 3
    assert len({tuple(row) for row in names["several"].tolist()}) == 3
    assert isinstance(names["out"], torch.Tensor)
    assert "The return value of the function is" in capsys.readouterr().out


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z-]+)", README.read_text(encoding="utf-8")))))
def test_make_targets_exist(target):
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_commands_run_in_order(tmp_path):
    """In an empty folder, with the program of this environment: no command needs a file that nobody has."""
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    shown = [block for block in blocks if "simctg-fast" in block and "pip install" not in block]
    assert len(shown) == 3
    program = Path(sys.executable).with_name("simctg-fast")
    if not program.exists():
        pytest.skip("simctg-fast is not installed beside this Python")
    environment = os.environ | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for block in shown:
        done = run_child(["sh", "-e", "-c", block], cwd=tmp_path, env=environment, text=True)
        assert done.returncode == 0, done.stderr
    assert {"out.jsonl", "notes.safetensors", "tuned", "eval-bundled"} <= {path.name for path in tmp_path.iterdir()}
