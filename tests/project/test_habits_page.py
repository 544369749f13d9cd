"""The pages of habits and training: their Python runs as it stands there, and what their commands name exists."""

from __future__ import annotations

import re

import pytest
import torch

import simctg_fast

from .. import toy_t5
from ..repository import repository

ROOT = repository("benchmarks").parent
PAGE = repository("docs/habits.md").read_text(encoding="utf-8")


def test_the_blocks_run_in_order(tmp_path, monkeypatch):
    (tmp_path / "t5_folder").mkdir()
    toy_t5.train(tmp_path / "t5_folder", steps=2)
    (tmp_path / "simctg_folder").symlink_to(simctg_fast.bundled_model_path())
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    written = []
    for block in blocks:
        lines = [line for line in block.splitlines() if line.strip()]
        assert len(lines) <= 5
        exec(compile(block, "habits.md", "exec"), names)
        if "ids" in lines[-1]:
            written.append(tuple(names["ids"].shape))
    assert len(blocks) == 8
    assert written == [(11,), (1, 11), (11,), (11,)]
    assert len({each["generated_text"] for each in names["several"]}) == 3
    assert len(names["texts"]) == len(names["answers"]) == 2
    assert names["vectors"].shape == (2, names["states"].values.shape[1])
    assert names["states"][1].ndim == 2
    assert isinstance(names["texts"][0], str)
    assert torch.isfinite(names["vectors"]).all()


@pytest.mark.parametrize("script", sorted(set(re.findall(r"examples/\w+\.py", PAGE))))
def test_scripts_exist_with_the_options_the_page_names(script):
    text = (ROOT / script).read_text(encoding="utf-8")
    for line in PAGE.splitlines():
        if script in line:
            for option in re.findall(r"(--[a-z-]+)", line):
                assert f'"{option}"' in text, option


def test_the_pages_commands_exist():
    from simctg_fast.cli import app

    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"^simctg-fast (\w+)", PAGE, flags=re.MULTILINE)) <= commands


def test_the_benchmark_of_dry_compares_with_the_definition(monkeypatch, tmp_path, capsys):
    import runpy
    import sys

    arguments = ["dry", "--model", "tiny", "--new-tokens", "4", "--repeats", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["habits.py", *arguments, "--csv", str(tmp_path / "habits.csv")])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    runpy.run_path(str(ROOT / "benchmarks" / "habits.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "NOT REPORTED" not in out
    assert out.count("DRY behind 256 tokens") == 2


def test_the_benchmark_of_the_loop_compares_equal_tokens(monkeypatch, tmp_path, capsys):
    """It reports nothing where the bare loop, ours and transformers' write different tokens."""
    import runpy
    import sys

    arguments = ["loop", "--model", "tiny", "--new-tokens", "4", "--repeats", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["habits.py", *arguments, "--csv", str(tmp_path / "habits.csv")])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    runpy.run_path(str(ROOT / "benchmarks" / "habits.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "NOT REPORTED" not in out
    assert out.count("simctg_fast.generate") == 2
    assert len((tmp_path / "habits.csv").read_text().splitlines()) == 7
