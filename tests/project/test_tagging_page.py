"""The page on tagging: its example runs and does what it says, its names exist."""

from __future__ import annotations

import re

from simctg_fast import LinearChainCRF
from simctg_fast.crf import CRF, constraints

from ..repository import repository

PAGE = repository("docs/tagging.md").read_text(encoding="utf-8")


def test_the_example(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    names: dict = {}
    exec(compile(code, "tagging.md", "exec"), names)
    expected = [["B-PER", "I-PER", "O", "O", "B-LOC"], ["B-PER", "I-PER", "O", "B-LOC", "I-LOC", "I-LOC"]]
    assert capsys.readouterr().out.strip() == str(expected)


def test_the_names():
    for name in re.findall(r"`crf\.(\w+)\(", PAGE):
        assert callable(getattr(LinearChainCRF, name)), name
    assert all(f"`{name}`" in PAGE for name in constraints.__all__)
    assert {"forward", "decode"} <= set(vars(CRF))
