"""The training examples run small, and what they say they do happens."""

from __future__ import annotations

import json
import runpy
import sys

import pytest

from ..repository import repository

EXAMPLES = repository("examples")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script in this process; returns the JSON lines it printed."""

    def run_script(name: str, *arguments: object) -> list[dict]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"')]

    return run_script


def measures(lines):
    return {line["measure"]: (line["before"], line["after"]) for line in lines if "measure" in line}


def falls(lines, name="mle_loss"):
    curve = [line[name] for line in lines if name in line]
    third = len(curve) // 3
    return sum(curve[-third:]) < 0.99 * sum(curve[:third])


def test_gpt2_with_the_trainer(run):
    lines = run(
        "simctg_gpt2.py", "--steps", 6, "--batch-size", 4, "--max-length", 32, "--new-tokens", 8, "--margin", 1.0
    )  # fmt: skip
    before, after = measures(lines)["isotropy"]
    assert after > before, "the contrastive term moves hidden states apart"
    assert measures(lines)["written"][1].startswith("The return value of the function is")


@pytest.mark.parametrize("through", ["trainer", "lightning"])
def test_t5(run, through):
    lines = run("simctg_t5.py", "--through", through, "--cpu", "--steps", 40)
    assert falls(lines)
    assert falls(lines, "contrastive_loss")
    assert lines[-2]["of"] == 100
    assert set(lines[-1]["answer"].split()) <= set(" ".join(lines[-1]["text"].split() * 9).split()) | {
        "red", "blue", "green", "one", "two", "three", "four", "sun", "moon", "star", "tree", "house", "river", "stone"
    }  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("through", ["trainer", "lightning"])
def test_t5_learns_the_task(run, through):
    assert run("simctg_t5.py", "--through", through, "--cpu")[-2]["right"] >= 90


def test_bart_goes_on_from_its_checkpoint(run, tmp_path):
    arguments = ("--cpu", "--steps", 12, "--save-every", 3, "--max-length", 32)
    whole = run("simctg_bart.py", "--out", tmp_path / "whole", *arguments)
    assert falls(whole)
    stopped = run("simctg_bart.py", "--out", tmp_path / "parts", *arguments, "--stop-after", 5)
    assert stopped[-1] == {"stopped_at": 5}
    continued = run("simctg_bart.py", "--out", tmp_path / "parts", *arguments)
    assert continued[0] == {"continued_from": "checkpoint-3"}
    assert continued[-2]["weights"] == whole[-2]["weights"]
    assert continued[-1] == whole[-1]


@pytest.mark.full
def test_bart_writes_titles(run, tmp_path):
    first = run("simctg_bart.py", "--out", tmp_path / "short", "--cpu", "--steps", 3)[-2]["rouge_1"]
    assert run("simctg_bart.py", "--out", tmp_path / "long", "--cpu")[-2]["rouge_1"] > first + 0.05


@pytest.mark.parametrize("mode", ["unsupervised", "supervised"])
def test_simcse_improves_what_it_is_for(run, mode, tmp_path):
    steps = ("--steps", 30, "--batch-size", 32)
    lines = run("simcse_encoder.py", "--mode", mode, *steps, "--save", tmp_path / "encoder")
    found = measures(lines)
    for name in ("uniformity", "alignment_share"):
        assert found[name][1] < found[name][0], name
    assert found["spearman"][1] > found["spearman"][0] + (0.2 if mode == "supervised" else 0.0)
    if mode == "supervised":
        trained = run("classify_features.py", "--model", tmp_path / "encoder", "--sentences", 300)[0]
        assert trained["accuracy_known_words"] > 0.9
        assert trained["accuracy_unseen_words"] > 0.5 > 4 * trained["chance"]


def test_the_words_alone_do_not_classify(run):
    """What the figure above stands on: features that know no likeness fail on unseen words."""
    assert run("classify_features.py", "--sentences", 300)[0]["accuracy_unseen_words"] < 0.35


def test_data_of_the_standard_library():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import example_data
    finally:
        sys.path.remove(str(EXAMPLES))
    assert len(example_data.prose()) > 1000
    pairs = example_data.summaries()
    assert len(pairs) > 300
    assert all(title and body and title not in body for body, title in pairs[:50])
    assert example_data.graded_pairs(10, 0) == example_data.graded_pairs(10, 0)
