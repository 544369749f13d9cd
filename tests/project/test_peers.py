"""The comparison with other engines, without any of them: what it lists, refuses and writes."""

from __future__ import annotations

import csv
import math
import subprocess
import sys

import pytest

from ..processes import run_child
from ..repository import repository

BENCHMARKS = repository("benchmarks/peers.py").parent


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peer_engines
    import peer_page
    import peers

    for engine in {variant.engine for variant in peer_engines.VARIANTS}:
        if engine.module not in ("simctg_fast", "transformers"):
            monkeypatch.setattr(engine, "module", f"absent_{engine.module}")
    monkeypatch.setattr(peer_page, "instruction_set", lambda: "avx2; ours avx2")
    yield peers
    for name in ("peers", "peer_engines", "peer_exports", "peer_page", "decode", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def measured(peers):
    """All contenders, of which ours have figures, one has other tokens, and the peers are not there."""
    options = peers.parse(["--models", "tiny", "--requests", "4"])
    contenders = [peers.Contender(variant, "tiny") for variant in peers.chosen([])]
    for contender in contenders[:3]:
        contender.figures = {"1x64": [2.0, 1.5], "8x64": [4.0], "requests": [100.0]}
    contenders[0].figures = {"1x64": [1.0], "8x64": [8.0], "requests": [50.0]}
    contenders[2].wrong["8x64"] = "failed: other tokens"
    contenders[3].state = "failed: RuntimeError: no | room"
    return contenders, options


def test_every_variant_has_a_line_whatever_became_of_it(peers, measured):
    contenders, options = measured
    lines = peers.table(contenders, options).splitlines()
    assert len(lines) == 2 + len(peers.VARIANTS)
    assert len({line.count("|") for line in lines}) == 1
    for variant, line in zip(peers.VARIANTS, lines[2:], strict=True):
        assert line.startswith(f"| tiny | {variant.name} | {variant.weights} |")
        assert ("not installed" in line) == variant.missing()
    assert sum("not installed" in line for line in lines) == 12
    assert "| 1.5 | 4.0 | 100 (0) |" in lines[3]
    assert "| 1.5 | – | 100 (0) |" in lines[4]
    assert "8x64: failed: other tokens" in lines[4]
    assert "failed: RuntimeError: no / room" in lines[5]


def test_it_says_who_is_faster(peers, measured):
    lines = peers.verdicts(*measured)
    assert "* tiny, 1x64, float32: transformers, greedy is 1.50x as fast as ours, greedy" in lines
    assert "* tiny, 8x64, float32: ours, greedy is 2.00x as fast as transformers, greedy" in lines
    assert (
        "* tiny, 4 requests, any weights: ours, greedy float32 is 2.00x as fast as transformers, greedy float32"
        in lines
    )
    assert not any("bfloat16:" in line for line in lines)  # nobody else has it


def test_the_page_holds_the_table_and_the_command(peers, measured):
    text = peers.page(*measured)
    assert peers.table(*measured) in text
    assert "python benchmarks/peers.py --write" in text
    assert "1.50x" in text


def test_the_csv_names_processor_instructions_versions_and_state(peers, measured, tmp_path):
    peers.append_csv(tmp_path / "peers.csv", peers.rows_of(*measured))
    with (tmp_path / "peers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(peers.VARIANTS)
    assert {"kernel", "provider", "metric", "config", "gpu", "version", "instruction_set", "state"} <= rows[0].keys()
    found = {(row["provider"], row["x_value"]): row for row in rows}
    assert found["ours, greedy float32", "1x64"]["state"] == "measured"
    assert float(found["ours, greedy float32", "1x64"]["p20"]) == 1.5
    assert found["ours, greedy bfloat16", "8x64"]["state"] == "failed: other tokens"
    assert found["CTranslate2 int8", "8x64"]["state"] == "not installed"
    assert math.isnan(float(found["CTranslate2 int8", "8x64"]["p50"]))
    assert found["ours, greedy float32", "4"]["metric"] == "tokens_per_second"
    assert "torch" in found["ours, greedy float32", "4"]["version"]
    assert rows[0]["gpu"]
    assert rows[0]["instruction_set"] == "avx2; ours avx2"


class Answers:
    """A process that is no process."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def ask(self, **request):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def cpu_seconds(self):
        return 0.0


def contender(peers, label, *answers):
    made = peers.Contender(next(variant for variant in peers.VARIANTS if variant.label == label), "tiny")
    made.state, made.process = "", Answers(*answers)
    return made


def test_float32_that_writes_other_tokens_has_no_figure(peers):
    near, wrong = (True, "a near tie: …"), (False, "WRONG: …")
    judge = contender(peers, peers.REFERENCE.label, {"verdicts": [near]}, {"verdicts": [wrong]})
    one, other, rough = (contender(peers, f"CTranslate2 {kind}") for kind in ("float32", "float32", "int8"))
    theirs = {"tokens": [[5, 6, 8, 9]], "seconds": 1.0}
    answers = {judge: {"tokens": [[5, 6, 7, 9]], "seconds": 1.0}, one: theirs, other: theirs, rough: theirs}
    for each in (one, other, rough):
        each.figures["1x64"] = [1.0]
    peers.compare_tokens("1x64", [[1, 2]], answers)
    assert [each.figure("1x64") for each in (one, other, rough)] == [1.0, None, 1.0]
    assert "other tokens than transformers'" in other.note()
    assert one.alike == other.alike == rough.alike == [0.5]


def test_what_fails_is_kept_as_its_reason(peers):
    answer = {"failed": "failed: ValueError: no bfloat16 here"}
    says, dies = contender(peers, "CTranslate2 bfloat16", answer), contender(peers, "llama.cpp int8", RuntimeError("9"))
    assert says.ask(ids=[[1]], new=1) is dies.ask(ids=[[1]], new=1) is None
    assert (says.state, dies.state) == ("failed: ValueError: no bfloat16 here", "failed: 9")
    assert says.ask(ids=[[1]], new=1) is None  # and is not asked again
    dies.figures["1x64"] = [-0.1]
    assert dies.figure("1x64") is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--models", "gpt5"], "'gpt5' is none of gpt2-small, smollm2, tiny"),
        (["--cases", "8by64"], "--cases are like 1x64,8x64"),
        (["--request", "64"], "--request like 64,48"),
        (["--new-tokens", "1"], "--new-tokens must be at least 2"),
        (["--cases", "1x100"], "at most 128 together, got 132"),
        (["--sizes", "8,64"], "at most 48 rows"),
        (["--only", "vLLM"], "'vLLM' is in none of"),
    ],
)
def test_arguments_that_make_no_sense(peers, arguments, text, capsys):
    with pytest.raises(SystemExit):
        peers.parse(arguments)
    assert text in capsys.readouterr().err


def test_only_some_of_them(peers):
    labels = [variant.label for variant in peers.chosen(["ours", "openvino"])]
    assert labels[0] == peers.REFERENCE.label
    assert len(labels) == 1 + 6 + 3


@pytest.mark.full
def test_it_runs_with_ours_alone(tmp_path):
    """In little: a model that is saved, processes that answer, tokens that are compared."""
    arguments = ["--models", "tiny", "--only", "greedy float32", "--cases", "2x4", "--new-tokens", "3"]
    arguments += ["--repeats", "1", "--requests", "3", "--request", "4,3", "--slots", "2", "--sizes", "2"]
    command = [sys.executable, str(BENCHMARKS / "peers.py"), *arguments, "--threads", "1"]
    done = run_child([*command, "--csv", str(tmp_path / "peers.csv")], stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    assert "| tiny | ours, greedy | float32 |" in done.stdout
    assert "failed" not in done.stdout
    assert len((tmp_path / "peers.csv").read_text().splitlines()) == 5
