"""The README's Python runs as it stands there, top to bottom, and its commands exist."""

import re

import pytest
import torch

from .repository import repository

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
