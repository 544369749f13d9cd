"""The page of evaluations: its Python runs as it stands there, and its commands have the options that it names."""

from __future__ import annotations

import re

import typer.main

import simctg_fast
from simctg_fast.cli import app
from simctg_fast.evaluation.settings import KNOWN, parse_settings
from simctg_fast.loading import load_model

from ..repository import repository

PAGE = repository("docs/evaluation.md").read_text(encoding="utf-8")


def test_the_blocks_run(capsys):
    model, tokenizer = load_model(simctg_fast.bundled_model_path(), "cpu")
    names = {"model": model, "tokenizer": tokenizer}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "evaluation.md", "exec"), names)
    assert [line.rpartition(" ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "people", "greedy search", "contrastive search, top_k 6", "FSD by n-grams",
    ]  # fmt: skip


def test_options_and_names():
    commands = typer.main.get_command(app).commands
    known = {
        option for name in ("eval", "isotropy", "compare", "train") for p in commands[name].params for option in p.opts
    }
    known |= {option for p in commands["isotropy"].params for option in p.secondary_opts}
    named = set(re.findall(r"(?<![\w-])(--?[a-z][a-z-]*)", PAGE))
    assert named <= known
    row = next(line for line in PAGE.splitlines() if line.startswith("| `--strategies"))
    assert set(KNOWN) <= set(re.findall(r"`([^`]+)`", row))
    for spelled in re.findall(r"`(\w+:[^`]+=[^`]+)`", row):
        parse_settings(spelled)
