"""The pages of habits and training: their Python runs as it stands there, and what their commands name exists."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch

import simctg_fast

ROOT = pathlib.Path(simctg_fast.__file__).resolve().parents[1]
PAGE = (ROOT / "benchmarks" / "habits.md").read_text(encoding="utf-8")


def test_the_blocks_run_in_order(capsys):
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        assert len(block.strip().splitlines()) <= 12, "short enough to read at a glance"
        exec(compile(block, "habits.md", "exec"), names)
    assert names["ids"].shape == (11,)
    assert len({each["generated_text"] for each in names["several"]}) == 3
    assert len(names["texts"]) == 2
    assert names["vectors"].shape == (2, names["states"].values.shape[1])
    assert names["states"][1].ndim == 2
    assert isinstance(names["texts"][0], str)
    assert torch.isfinite(names["vectors"]).all()


@pytest.mark.parametrize("script", sorted(set(re.findall(r"benchmarks/examples/\w+\.py", PAGE))))
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
