"""The page of metrics: its Python runs as it stands there, and its table has every public function."""

from __future__ import annotations

import inspect
import os
import re
import sys

import pytest
import transformers

import simctg_fast
from simctg_fast import metrics

from ..processes import run_child
from ..repository import INSTALLED, repository

PAGE = repository("docs/metrics.md").read_text(encoding="utf-8")


def test_the_blocks_run(capsys):
    folder = simctg_fast.bundled_model_path()
    names = {
        "model": transformers.AutoModelForCausalLM.from_pretrained(folder),
        "tokenizer": transformers.AutoTokenizer.from_pretrained(folder),
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "metrics.md", "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert all(value < 0 for value in names["coherence"])


def test_the_table_has_all_functions_and_their_arguments():
    calls = dict(re.findall(r"`(\w+)\(([^)]*)\)`", PAGE.partition('"Human\'s"')[0]))
    assert set(calls) == set(metrics.__all__)
    for name, arguments in calls.items():
        parameters = list(inspect.signature(getattr(metrics, name)).parameters)
        assert [each.strip() for each in arguments.split(",")] == parameters[: arguments.count(",") + 1], name
    takes = {
        name for name in metrics.__all__ if "paper_compatible" in inspect.signature(getattr(metrics, name)).parameters
    }
    section = PAGE.partition("## `paper_compatible=True`")[2].partition("\n## ")[0]
    assert takes == set(re.findall(r"`(\w+)`(?=[,:])", section)) & set(metrics.__all__)


def test_the_import_is_light():
    code = "import sys, simctg_fast.metrics as m; m.diversity('abc'); print({'torch', 'numpy'} & {*sys.modules})"
    result = run_child([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(INSTALLED)}, cwd="/")
    assert result.stdout.strip() == "set()", result.stderr


def test_names():
    assert set(metrics.__all__) <= set(dir(metrics))
    for name in metrics.__all__:
        assert getattr(metrics, name).__name__ == name
    with pytest.raises(AttributeError, match=r"module 'simctg_fast\.metrics' has no attribute 'divercity'"):
        _ = metrics.divercity
