"""What is recommended and said, from figures alone; and isotropy, whose pilot decides."""

from __future__ import annotations

import errno
import re

import pytest
import torch
from typer.testing import CliRunner

from simctg_fast import cli
from simctg_fast.cli import app
from simctg_fast.evaluation import isotropy
from simctg_fast.evaluation.conclude import conclusions
from simctg_fast.evaluation.console import table
from simctg_fast.evaluation.isotropy import measure, passages
from simctg_fast.evaluation.recommend import Candidate, recommend
from simctg_fast.evaluation.verdict import verdict
from simctg_fast.loading import load_model
from simctg_fast.terminal import OutputError

HUMAN = Candidate("human", 90.0, -0.7)


@pytest.mark.parametrize(
    ("candidates", "best"),
    [
        ([("greedy", 20, -0.3), ("a", 85, -0.74), ("b", 80, -0.4)], "a"),
        ([("greedy", 20, -0.3), ("a", 99, -0.751), ("b", 80, -0.4)], "b"),  # too improbable
        ([("greedy", 20, -0.3), ("a", 99, -0.75), ("b", 80, -0.4)], "a"),  # just not
        ([("a", 99, -0.6), ("b", 91, -0.5), ("c", 90, -0.55)], "b"),  # as diverse as people: the more probable
        ([("a", 99, -0.9)], None),
        ([], None),
    ],
)
def test_the_rule(candidates, best):
    found = recommend([Candidate(*each) for each in candidates], HUMAN)
    assert (found.best and found.best.name) == best
    assert "90.0" in found.reason
    assert "-0.700" in found.reason


def test_without_people_nothing_is_recommended():
    found = recommend([Candidate("a", 90, -0.5)], None)
    assert found.best is None
    assert "without human continuations" in found.reason


def row(name, diversity, log_prob=-0.5, tokens=100.0, rep_4=5.0, speed=100.0, spread=1.0):
    def figure(value, by=0.0):
        return {"mean": value, "low": value - by, "high": value + by}

    figures = {
        "diversity": figure(diversity, spread), "log_prob_per_byte": figure(log_prob), "tokens": figure(tokens),
        "rep_4": figure(rep_4), "tokens_per_second": figure(speed),
    }  # fmt: skip
    return {"strategy": name, "label": f"the {name}", "figures": figures, "note": ""}


def test_conclusions():
    rows = [
        row("human", 90), row("greedy", 20, rep_4=60.0, speed=200.0), row("fsd", 91),
        row("contrastive", 95, tokens=40.0),
    ]  # fmt: skip
    found = conclusions(rows, "fsd", "so it is")
    assert found == [
        "Begin with the fsd: so it is.",
        "Texts loop: of their 4-grams they had so many before: the greedy 60 %.",
        "Nearest to people's diversity (90.0): the fsd 91.0, the contrastive 95.0, the greedy 20.0.",
        "Much shorter than greedy search's texts (100 tokens), so that their diversity is flattered: the contrastive "
        "40.",
        "Tokens a second, relative to greedy search: the fsd 0.50, the contrastive 0.50.",
    ]
    close = [row("human", 90), row("a", 91), row("b", 92.5)]
    assert conclusions(close, None, "none")[-1].endswith(
        "the a 91.0, the b 92.5; the intervals of the first two overlap."
    )
    assert conclusions(close, None, "none")[0] == "No strategy can be recommended: none."
    assert conclusions([row("greedy", 20, rep_4=0.0)], None, "") == []
    assert conclusions([{**row("greedy", 20), "figures": {}}], None, "") == []


def pilot(best, *rows):
    reason = "for a reason"
    recommended = {"strategy": best, "reason": reason}
    return {"rows": [row("human", 90, -0.7), *rows], "recommended": recommended, "prompts": 16}


@pytest.mark.parametrize(
    ("isotropy", "found", "said"),
    [
        (0.8, pilot("contrastive", row("contrastive", 89)), ["suits this model as it stands", "!better", "!training"]),
        (0.8, pilot("fsd", row("contrastive", 86), row("fsd", 90)), ["suits", "Better still: FSD by n-grams (--str"]),
        (0.3, pilot("fsd", row("contrastive", 60), row("fsd", 90)), ["!suits", "better start: FSD", "may be worth it"]),
        (0.8, pilot("centered", row("contrastive", 60), row("centered", 88)), ["--center", "promises little"]),
        (0.3, pilot("fsd", row("contrastive", 89, -0.8), row("fsd", 80)), ["!suits", "FSD"]),  # too improbable
        (0.3, pilot(None, row("contrastive", 89, -0.8)), ["None of the pilot's", "may be worth it"]),
    ],
)
def test_verdicts(isotropy, found, said):
    text = " ".join(verdict(isotropy, found).sentences)
    assert f"{isotropy:.2f}" in text
    assert "gpt2-large 0.70" in text
    for each in said:
        assert (each.lstrip("!") in text) != each.startswith("!"), (each, text)


@pytest.mark.parametrize(("people", "caution"), [(7.0, True), (74.0, True), (75.0, False), (130.0, False)])
def test_how_many_texts_decided_and_how_long_they_are(people, caution):
    found = pilot("fsd", row("contrastive", 60, tokens=100.0), row("fsd", 90, tokens=40.0))
    found["rows"][0] = row("human", 90, -0.7, tokens=people)
    text = " ".join(verdict(0.3, found).sentences)
    said = f"The pilot (prompts: 16; people's continuations: {people:.0f} tokens on average): for a reason."
    assert said in text
    assert ("With caution: short texts, as people's here, repeat less" in text) == caution
    assert ("the model wrote up to 100 tokens on average" in text) == caution


def test_a_model_that_writes_as_briefly_as_people_needs_no_caution():
    found = pilot("fsd", row("fsd", 90, tokens=7.0), {**row("contrastive", 0), "figures": {}})
    found["rows"][0] = row("human", 90, -0.7, tokens=7.0)
    assert "With caution" not in " ".join(verdict(0.3, found).sentences)


def without(name, metric):
    found = row(name, 90)
    found["figures"].pop(metric)
    return found


@pytest.mark.parametrize("metric", ["diversity", "log_prob_per_byte"])
def test_a_verdict_on_texts_that_have_no_figures(metric):
    """Of fewer than 4 tokens, or without characters: people's, contrastive search's, everybody's."""
    found = pilot(None, row("contrastive", 89), row("fsd", 80))
    found["rows"][0] = without("human", metric)
    text = " ".join(verdict(0.5, found).sentences)
    assert "the pilot cannot say" in text
    assert "None of" not in text, "nobody knows how probable people's are"
    text = " ".join(verdict(0.5, pilot("fsd", without("contrastive", metric), row("fsd", 80))).sentences)
    assert "The better start: FSD by n-grams" in text
    assert "the pilot cannot say" in text
    text = " ".join(verdict(0.5, pilot(None, without("contrastive", metric))).sentences)
    assert "None of the pilot's strategies writes texts of 4 tokens." in text


def test_a_table_leaves_out_what_has_no_room():
    metrics = {
        name: {"name": name, "unit": "", "digits": 1, "better": None, "about": ""}
        for name in ("tokens", "diversity", "rep_4", "log_prob_per_byte", "tokens_per_second")
    }
    evaluation = {"rows": [row("greedy", 20), row("contrastive:top_k=8", 95)], "metrics": metrics}
    assert [str(column.header) for column in table(evaluation).columns] == ["strategy", *metrics]
    assert [str(column.header) for column in table(evaluation, 50).columns] == ["strategy", "tokens", "diversity"]
    assert len(table(evaluation, 20).columns) == 1


def test_layers_of_a_model():
    """Against the mean cosine over pairs of positions, one by one in float64."""
    model, tokenizer = load_model("bundled", "cpu")
    texts = ["This module provides a function. It returns nothing at all.", "Return a list of the lines of a file", "x"]
    from simctg_fast.evaluation.states import isotropy_of_layers
    from simctg_fast.evaluation.writing import tokenize

    prompts = passages(tokenizer, texts, 8)
    assert [prompt.id for prompt in prompts] == ["text-0", "text-1"], "one token has no way to go on"
    ready, _ = tokenize(model, tokenizer, prompts, 8)
    ids = [tokenizer(p.prompt.reference, add_special_tokens=False)["input_ids"] for p in ready]
    total, pairs = torch.zeros(8, dtype=torch.float64), 0
    for each, rest in zip(ready, ids, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([each.ids + rest]), output_hidden_states=True).hidden_states
        for i in range(len(each.ids) + len(rest)):
            for j in range(len(each.ids) + len(rest)):
                if i != j:
                    pairs += 1
                    total += torch.stack(
                        [torch.cosine_similarity(s[0, i].double(), s[0, j].double(), 0) for s in states]
                    )
    found = isotropy_of_layers(model, list(zip(ready, ids, strict=True)))
    assert torch.tensor(found, dtype=torch.float64).sub(1 - total / pairs).abs().max() < 1e-6


def test_the_commands(tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("This module provides a function. It returns nothing at all, or a list.\n" * 2, "utf-8")
    picture = tmp_path / "p.svg"
    runner = CliRunner()
    alone = runner.invoke(app, ["isotropy", "bundled", "--text", str(texts), "--no-pilot", "-o", str(picture)])
    assert alone.exit_code == 0, alone.output
    assert len([line for line in alone.stdout.splitlines() if line.strip()[:1].isdigit()]) == 8
    assert picture.read_text("utf-8").startswith("<svg")
    both = runner.invoke(app, ["compare", "bundled", "bundled", "--text", str(texts), "-o", str(picture)])
    assert both.exit_code == 0, both.output
    assert "isotropy of the last layer: 0." in both.stdout
    assert picture.read_text("utf-8").count("<image") == 3, "two maps and a scale"
    png = runner.invoke(app, ["isotropy", "--text", str(texts), "--no-pilot", "-o", str(tmp_path / "p.png")])
    assert png.exit_code == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    for given, message in (
        (["isotropy", "-o", "x.pdf", "--no-pilot"], "ends in .svg or .png"),
        (["compare", "bundled"], "two models"),
        (["compare", "bundled", "bundled", "-o", "x.png"], ".svg"),
        (["isotropy", "--text", "nowhere.txt"], "no file"),
        (["isotropy", "--dtype", "int8"], "--dtype"),
    ):
        refused = runner.invoke(app, given)
        assert refused.exit_code == 2, (given, refused.output)
        assert message in said(refused)


@pytest.fixture(scope="module")
def brief(tmp_path_factory):
    """What is found of a text whose second half is one token."""
    texts = tmp_path_factory.mktemp("texts") / "t.txt"
    texts.write_text("Hi\n", "utf-8")
    return measure("bundled", str(texts), new_tokens=16)


@pytest.mark.parametrize("command", [["isotropy", "bundled"], ["compare", "bundled", "bundled"]])
def test_a_picture_that_cannot_be_written(command, brief, tmp_path, monkeypatch):
    """Is refused before a model is loaded; what goes wrong later costs the picture alone."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.svg").mkdir()
    for name in ("nowhere/x.svg", "file/x.svg", "folder.svg"):
        refused = CliRunner().invoke(app, [*command, "-o", str(tmp_path / name), "--device", "nowhere"])
        assert refused.exit_code == 2
        assert "out must be a file that can be written, in a folder that exists" in said(refused)

    def full(found, out):
        raise OSError(errno.ENOSPC, "full", str(out))

    monkeypatch.setattr(isotropy, "draw", full)
    monkeypatch.setattr(isotropy, "measure", lambda *given, **options: brief)
    done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "x.svg")])
    assert done.exit_code == 3
    assert "sotropy of the last layer: 0." in done.stdout


@pytest.mark.parametrize("command", [["isotropy", "bundled"], ["compare", "bundled", "bundled"]])
def test_sentences_are_wrapped_on_a_narrow_terminal(command, brief, monkeypatch):
    monkeypatch.setattr(isotropy, "measure", lambda *given, **options: brief)
    narrow = CliRunner().invoke(app, command, env={"FORCE_COLOR": "1", "COLUMNS": "40"})
    assert narrow.exit_code == 0, narrow.output
    text = re.sub(r"\x1b\[[0-9;]*m", "", narrow.stdout)
    assert max(map(len, text.splitlines())) <= 40
    wide = CliRunner().invoke(app, command, env={"COLUMNS": "40"})
    assert " ".join(text.split())[-50:] == " ".join(wide.stdout.split())[-50:]
    assert max(map(len, wide.stdout.splitlines())) > 40


def test_a_reader_that_has_gone_does_not_cost_the_picture(tmp_path, monkeypatch):
    def gone(line):
        raise OutputError(OSError(errno.EPIPE, "gone"))

    monkeypatch.setattr(cli, "_say", gone)
    picture = tmp_path / "x.svg"
    done = CliRunner().invoke(app, ["isotropy", "--no-pilot", "-o", str(picture)])
    assert done.exit_code != 0
    assert picture.read_text("utf-8").startswith("<svg")


def said(result):
    return " ".join(result.output.replace("│", " ").split())


def test_the_pilot():
    found = measure("bundled", new_tokens=16)
    assert found.pilot is not None
    assert [each["strategy"] for each in found.pilot["rows"]] == [
        "human", "greedy", "contrastive", "centered", "fsd", "fsd-vec", "dry",
    ]  # fmt: skip
    assert found.verdict is not None
    assert found.verdict.best == found.pilot["recommended"]["strategy"]
    text = " ".join(found.verdict.sentences)
    assert re.search(r"The pilot \(prompts: 16; people's continuations: 1[5-7] tokens on average\): ", text)
    assert "With caution" not in text
    with pytest.raises(ValueError, match="new_tokens must be an integer of at least 16, got 4"):
        measure("bundled", new_tokens=4)


def test_a_model_whose_context_the_texts_exceed(monkeypatch):
    monkeypatch.setattr(isotropy, "context_length", lambda model: None)
    reason = r"none of the 16 texts can be continued; 'documentation-0': 32 prompt tokens and max_new_tokens=600 are"
    with pytest.raises(ValueError, match=reason):
        measure("bundled", new_tokens=600)


def test_a_pilot_on_a_short_text(brief):
    assert brief.verdict.best is None
    *_, length, caution, training = brief.verdict.sentences
    assert length.startswith("The pilot (prompts: 1; people's continuations: 1 tokens on average): ")
    assert caution.startswith("With caution: short texts, as people's here, repeat less, and the model wrote up to 16 ")
    assert "the pilot cannot say" in training
