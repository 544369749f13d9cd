"""The claims of the papers in little: both kinds of model are trained, write, and get into the page."""

from __future__ import annotations

import json
import re
import runpy

import pytest

from ..repository import repository


@pytest.fixture
def claims(monkeypatch):
    monkeypatch.syspath_prepend(str(repository("benchmarks")))
    return runpy.run_path(str(repository("benchmarks/claims.py")))


def pages(claims, folder, **texts):
    """`docs/` with these pages alone, which is what is written to."""
    claims["main"].__globals__["DOCS"] = folder
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(text, "utf-8")
    return [folder / f"{name}.md" for name in texts]


def test_in_little(claims, tmp_path):
    (page,) = pages(claims, tmp_path, results="before\n<!-- trained -->\nold\n<!-- end trained -->\nafter\n")
    given = {"steps": 2, "batch-tokens": 512, "sources": 60, "seeds": 1, "prompts": 2, "new-tokens": 8}
    words = [f"--{name}={value}" for name, value in given.items()]
    claims["main"](["--work", str(tmp_path / "work"), *words, "--write"])
    written = page.read_text("utf-8")
    assert written.startswith("before\n<!-- trained -->")
    assert written.endswith("<!-- end trained -->\nafter\n")
    assert "old" not in written
    rows = re.findall(r"^\| (.*?) \|", written, flags=re.MULTILINE)
    assert len(rows) == 2 + 2 * 6
    recipes = {}
    for name in ("plain-0", "simctg-0"):
        card = (tmp_path / "work" / name / "README.md").read_text("utf-8")
        recipes[name] = re.search(r"\| contrastive_weight \| (\S+) \|", card)[1]
    assert recipes == {"plain-0": "0.0", "simctg-0": "1.0"}


def test_what_is_said_of_seeds(claims, tmp_path):
    """Mean, lowest and highest; what an earlier run has measured is not measured again."""
    work = tmp_path / "work"
    for kind, isotropy in (("plain", 0.25), ("simctg", 0.75)):
        for seed in range(2):
            (work / f"{kind}-{seed}").mkdir(parents=True)
            (work / f"{kind}-{seed}" / "README.md").write_text("a card")
            figures = {column: {"mean": 10.0 + 2 * seed} for column in claims["COLUMNS"]}
            kept = {"figures": {"greedy": figures}, "layers": [0.0, isotropy + seed / 100]}
            (work / f"{kind}-{seed}" / "claims-3-4.json").write_text(json.dumps(kept))
    (page,) = pages(claims, tmp_path, results="<!-- trained --><!-- end trained -->")
    claims["main"](["--work", str(work), "--seeds", "2", "--prompts", "3", "--new-tokens", "4", "--write"])
    rows = [line for line in page.read_text("utf-8").splitlines() if "greedy" in line]
    assert rows[0].startswith(
        "| likelihood | 0.26 (0.25 to 0.26) | greedy | 11.0 (10.0 to 12.0) | 11.0 (10.0 to 12.0) |"
    )
    assert rows[1].startswith("| likelihood + contrastive | 0.76 (0.75 to 0.76) | greedy |")


def test_mistakes(claims, tmp_path, capsys):
    with pytest.raises(SystemExit):
        claims["main"](["--work", str(tmp_path), "--seeds", "0"])
    assert "--seeds is 0, must be at least 1" in capsys.readouterr().err


def test_the_table_of_an_evaluation(claims, tmp_path):
    metrics = {
        "diversity": {"name": "diversity", "unit": "%", "digits": 1},
        "tokens_per_second": {"name": "tokens/s", "unit": "", "digits": 0},
        "rep_4": {"name": "rep-4", "unit": "%", "digits": 0},
    }
    figures = {"diversity": {"mean": 90.04, "low": 88.0, "high": 91.96}}
    rows = [
        {"label": "people", "figures": figures},
        {"label": "FSD", "figures": figures | {"tokens_per_second": {"mean": 99.6, "low": None, "high": None}}},
    ]
    found = {
        "model": "/some/where/model", "dtype": "bfloat16", "prompts": 3, "max_new_tokens": 4, "machine": "a machine",
        "versions": {"torch": "2", "transformers": "5"}, "metrics": metrics, "rows": rows, "conclusion": ["So it is."],
    }  # fmt: skip
    (tmp_path / "evaluation.json").write_text(json.dumps(found), "utf-8")
    page, strategies = pages(
        claims,
        tmp_path,
        results="a\n<!-- real -->\nold\n<!-- end real -->\nb\n",
        strategies="c\n<!-- means -->\n<!-- end means -->\nd\n",
    )
    claims["main"](["--evaluation", str(tmp_path), "--write"])
    assert page.read_text("utf-8").splitlines() == [
        "a", "<!-- real -->",
        "model, bfloat16, 3 prompts, 4 new tokens at most; a machine, torch 2, transformers 5. In brackets 95 % "
        "intervals.",
        "", "| strategy | diversity, % | tokens/s | rep-4, % |", "| --- | --- | --- | --- |",
        "| people | 90.0 (88.0 to 92.0) |  |  |", "| FSD | 90.0 (88.0 to 92.0) | 100 |  |", "", "* So it is.",
        "<!-- end real -->", "b",
    ]  # fmt: skip
    assert strategies.read_text("utf-8").splitlines() == [
        "c", "<!-- means -->", "model, bfloat16, 3 prompts, 4 new tokens at most; a machine, torch 2, transformers 5.",
        "", "| strategy | diversity, % | tokens/s |", "| --- | --- | --- |", "| people | 90.0 |  |",
        "| FSD | 90.0 | 100 |", "<!-- end means -->", "d",
    ]  # fmt: skip
