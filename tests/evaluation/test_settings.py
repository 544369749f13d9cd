"""Strategies by name: what they set, and that the forms to copy do what the evaluation did."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch
from typer.testing import CliRunner

import simctg_fast
from simctg_fast import bundled_model_path
from simctg_fast.cli import app
from simctg_fast.evaluation.prompts import Prompt
from simctg_fast.evaluation.settings import KNOWN, parse_settings
from simctg_fast.evaluation.writing import Writer, tokenize
from simctg_fast.loading import load_model

PROMPTS = ["If the name is not found,", "This module provides"]
NEW = 12
DRAWN = ("nucleus", "typical", "guard")
SAMPLES = [
    *KNOWN,
    "contrastive:penalty_alpha=0.4:top_k=6",
    "adaptive:adaptive_k_range=[2,5]",
    "fsd-vec:fsd_n=3:fsd_stop_tokens=[5,6]",
    "beam:num_beams=3",
    'dry:dry_base=2:dry_sequence_breakers=[".","\\n"]',
    "guard:temperature=0",
]


@pytest.fixture(scope="module")
def loaded():
    return load_model("bundled", "cpu")


def written(loaded, setting):
    model, tokenizer = loaded
    ready, _ = tokenize(model, tokenizer, [Prompt(n, {"prompt": text}) for n, text in enumerate(PROMPTS)], NEW)
    return Writer(model, tokenizer, setting, max_new_tokens=NEW, slots=2)(ready).token_ids


@pytest.mark.parametrize("name", SAMPLES)
def test_the_python_to_copy(name, loaded):
    """Run as it stands, it writes the same tokens."""
    (setting,) = parse_settings(name)
    model, tokenizer = loaded
    names = {key: getattr(simctg_fast, key) for key in simctg_fast.__all__} | {"torch": torch}
    *before, code = setting.python(NEW).splitlines()
    assert bool(before) == (name in DRAWN)
    found = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        given = {"model": model, "inputs": inputs, "tokenizer": tokenizer}
        texts = []
        for _ in range(2):
            exec("\n".join(before), names)
            texts.append(eval(code, names, given)[0, inputs["input_ids"].shape[1] :].tolist())
        assert texts[0] == texts[1]
        found.append(texts[0])
    if name in DRAWN:
        assert setting.python(NEW, seed=1) != setting.python(NEW)
        return  # what the engine draws is drawn in another way
    if name == "guard:temperature=0":
        assert "GUARD(window=7, decay=0.95, sample=False)" in code
    assert written(loaded, setting) == found


@pytest.mark.parametrize("name", [name for name in SAMPLES if not name.startswith("beam")])
def test_the_command_to_copy(name, loaded, tmp_path, monkeypatch):
    (setting,) = parse_settings(name)
    monkeypatch.chdir(tmp_path)
    with open("prompts.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": n, "prompt": prompt}) + "\n" for n, prompt in enumerate(PROMPTS))
    program, *words = shlex.split(setting.command(str(bundled_model_path()), NEW))
    assert program == "simctg-fast"
    result = CliRunner().invoke(app, [*words, "--slots", "2"])
    assert result.exit_code == 0, result.output
    with open(words[words.index("-o") + 1], encoding="utf-8") as file:
        records = sorted(map(json.loads, file), key=lambda record: record["id"])
    assert ("--seed" in words) == (name in DRAWN)
    assert [record["token_ids"] for record in records] == written(loaded, setting)


def test_commands_write_into_files_of_their_own():
    settings = parse_settings(",".join(SAMPLES))
    files = [shlex.split(s.command("m", 8))[5] for s in settings if s.command("m", 8)]
    assert len(set(files)) == len(files)
    assert all(re.fullmatch(r"[\w.=-]+\.jsonl", name) for name in files)


@pytest.mark.parametrize("name", ["beam", "dry:dry_sequence_breakers=[]"])
def test_what_has_no_command(name):
    """Beam search is not the engine's, and an option cannot be given no value."""
    assert parse_settings(name)[0].command("m", 8) == ""


def test_draws_differ_between_settings(loaded):
    """Of one seed, two ways to sample that both leave nearly everything."""
    first, second = parse_settings("nucleus:top_p=1.0,typical:typical_p=1.0")
    assert written(loaded, first) != written(loaded, second)
    assert written(loaded, first) == written(loaded, first)


def test_what_a_row_shows():
    found = {setting.name: setting.shown for setting in parse_settings("contrastive:top_k=6,greedy,fsd,centered,dry")}
    assert found["contrastive:top_k=6"] == {"penalty_alpha": 0.6, "top_k": 6}
    assert found["greedy"] == {}
    assert found["fsd"] == {"penalty_alpha": 0.65, "top_k": 3, "fsd_n": 3, "fsd_beta": 0.9}
    assert found["centered"] == {"penalty_alpha": 0.6, "top_k": 4, "center": True}
    assert found["dry"] == {"dry_multiplier": 0.8}
    with_defaults = parse_settings("contrastive,contrastive:top_k=2", contrastive={"penalty_alpha": 0.3, "top_k": 5})
    assert [setting.shown["top_k"] for setting in with_defaults] == [5, 2]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("", "strategies must be some of greedy, beam"),
        ("greedy,", "strategies must be some of greedy, beam.*got ''"),
        ("loud", "strategies must be some of greedy, beam.*got 'loud'"),
        ("greedy,greedy", "strategies names 'greedy' twice"),
        ("contrastive:top_k", r"has 'top_k' in 'contrastive:top_k', must be NAME=VALUE, one of penalty_alpha"),
        ("contrastive:seed=1", "has 'seed=1' in .*, must be NAME=VALUE"),
        ("contrastive:max_new_tokens=4", "must be NAME=VALUE"),
        ("contrastive:penalty_alpha=2", r"penalty_alpha must be a number in \[0, 1\]"),
        ("contrastive:penalty_alpha=high", "penalty_alpha must be a number"),
        ("greedy:penalty_alpha=0.5", "penalty_alpha is not used by strategy 'greedy'"),
        ("contrastive:fsd_n=2", "fsd_n is not used by strategy 'contrastive'"),
        ("beam:num_beams=1", "num_beams must be an integer from 2 to 64, got 1"),
        ("beam:num_beams=2.5", "num_beams must be an integer"),
        ("beam:top_k=3", "must be NAME=VALUE, one of num_beams"),
        ("adaptive:adaptive_k_range=[5]", "adaptive_k_range"),
    ],
)
def test_mistakes(names, message):
    with pytest.raises(ValueError, match=message):
        parse_settings(names)


def test_labels_tell_settings_apart():
    labels = [setting.label for setting in parse_settings("contrastive,contrastive:penalty_alpha=0.4:top_k=6")]
    assert labels == ["contrastive search", "contrastive search, penalty_alpha 0.4, top_k 6"]
    assert not any(re.search("[=:]", label) for label in labels)
