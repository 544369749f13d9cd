"""`benchmarks/zoo.py --rounding`: what it says of logits of 16 bits is right, and kernels that round more are found."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from simctg_fast.cpu import modules
from simctg_fast.decoding import trial
from simctg_fast.ops import _backends

from ..processes import run_child
from ..repository import repository

BENCHMARKS = repository("benchmarks")
sys.path.insert(0, str(BENCHMARKS))

import zoo  # noqa: E402
from zoo_sweep import inputs, logit_errors  # noqa: E402

needs_extension = pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")


def errors_of(ours, theirs, seeds=3):
    """Of texts ``(B, n)`` whose positions are off by so much."""
    errors = logit_errors.Errors()
    for seed in range(seeds):
        errors.ours.append(ours.double().square())
        errors.modules.append(theirs.double().square())
        errors.seeds.append(seed)
    errors.same = False
    return errors


def test_the_ratio_is_of_root_mean_squares():
    ours, theirs = torch.tensor([[3.0, 0.0], [4.0, torch.nan]]), torch.tensor([[1.0, 2.0], [2.0, torch.nan]])
    case = errors_of(ours, theirs).case()
    assert case["ratio"] == pytest.approx((25 / 9) ** 0.5)
    assert case["seeds"] == [round((25 / 9) ** 0.5, 4)] * 3
    assert case["modules"] == pytest.approx(3**0.5)
    assert case["positions"] == 9  # behind a row's end nothing counts
    assert case["low"] < case["ratio"] < case["high"]
    assert case["status"] == "above"
    assert errors_of(theirs, theirs * 1.01).case()["status"] == "within"


def test_a_few_positions_that_are_all_of_the_error():
    """Experts chosen otherwise, by us in another text than by the modules, and ten times as far off."""
    ours, theirs = torch.rand(40, 8) + 1, torch.rand(40, 8) + 1
    theirs[3], ours[5] = 100.0, 1000.0
    case = errors_of(ours, theirs).case()
    assert case["ratio"] > 5
    assert (case["heavy"], case["far"], case["status"]) == (True, [3, 3], "within")
    ours[10:30] = 1000.0
    assert errors_of(ours, theirs).case()["status"] == "above"
    ours[5:30] = 1.5
    assert errors_of(1.2 * ours, theirs).case()["status"] == "above"


def test_refusals_and_faults_are_no_measurement():
    errors = logit_errors.Errors()
    errors.refusals.append("ValueError: no")
    assert errors.case()["status"] == "refused"
    errors.fault = "RuntimeError: oh"
    assert errors.case()["status"] == "fault"
    nothing = torch.zeros(4, 8)
    assert errors_of(nothing, nothing).case()["status"] == "not reached"


def test_other_words_around_the_same_marks():
    given = inputs.text(2, length=9) | {"pixel_values": torch.tensor([[0.5, 1.0, -0.25]])}
    given["input_ids"][:, 2] = inputs.IMAGE_TOKEN
    given["input_ids"][:, 3] = 7
    full, padded = (logit_errors.varied(given, [7], seed) for seed in (0, 1))
    assert full["attention_mask"].all()
    assert torch.equal(padded["attention_mask"], given["attention_mask"])
    assert (padded["input_ids"][given["attention_mask"] == 0] == 0).all()
    assert (full["input_ids"][:, 2:4] == torch.tensor([inputs.IMAGE_TOKEN, 7]))[0].all()
    assert not torch.equal(full["input_ids"], padded["input_ids"])
    assert (full["input_ids"] == 7).sum() == 2
    assert full["pixel_values"][0, 1] == 1
    assert not (full["pixel_values"] == given["pixel_values"])[0, [0, 2]].any()


@pytest.mark.csrc
@needs_extension
def test_a_kernel_that_rounds_too_much_is_found(monkeypatch):
    """Every product is rounded once more than it has to be, to one bit less than the type has."""
    fine = logit_errors.one_class("OPTForCausalLM", torch.bfloat16, seeds=1)
    assert fine["status"] == "within"
    assert 256 <= fine["cases"]["text"]["positions"] <= 288
    original = modules.run_kernel

    def run_kernel(x, weight, *rest):
        y = original(x, weight, *rest)
        return y if weight.dtype != torch.bfloat16 else (y.view(torch.int16) // 2 * 2).view(torch.bfloat16)

    monkeypatch.setattr(modules, "run_kernel", run_kernel)
    monkeypatch.setattr(trial, "check_close", lambda *args: None)
    monkeypatch.setattr(logit_errors, "MORE_SEEDS", 0)
    coarse = logit_errors.one_class("OPTForCausalLM", torch.bfloat16, seeds=1)
    assert coarse["status"] == "above"
    assert coarse["cases"]["text"]["ratio"] > 1.1


@pytest.mark.csrc
@needs_extension
def test_sinks_of_float32_go_through_the_kernel(monkeypatch):
    """Flint's: plain torch, which took them before, rounds the scores, as the modules do not (1.06)."""
    monkeypatch.setattr(logit_errors, "MORE_SEEDS", 0)
    record = logit_errors.one_class("FlintForCausalLM", torch.bfloat16)
    assert record["path"] == "shared_prefix"
    assert record["cases"]["text"]["ratio"] < 1.03


def test_a_row_that_has_ended_says_nothing(monkeypatch):
    """BLIP's text ends at a token of its own, behind which we compute nothing."""
    monkeypatch.setattr(logit_errors, "MORE_SEEDS", 0)
    record = logit_errors.one_class("BlipForConditionalGeneration", torch.bfloat16, seeds=1)
    assert record["status"] == "within"
    assert 200 < record["cases"]["image"]["positions"] < 280


@pytest.mark.full
def test_the_command(tmp_path):
    output = tmp_path / "rounding.jsonl"
    command = [sys.executable, str(BENCHMARKS / "zoo.py"), "--rounding", "--dtype", "float16", "--output", str(output)]
    out = run_child([*command, "--only", "^(GPT2LMHeadModel|ParakeetForCTC)$"], check=True)
    records = {record["class"]: record for record in map(json.loads, output.read_text().splitlines())}
    assert records["ParakeetForCTC"]["status"] == "own loop"
    assert records["GPT2LMHeadModel"]["status"] in ("within", "same")
    case = records["GPT2LMHeadModel"]["cases"]["text"]
    assert 3 * 256 <= case["positions"] <= 3 * 288
    assert f"GPT2LMHeadModel: {records['GPT2LMHeadModel']['status']} shared_prefix, {case['ratio']:.3f}" in out.stdout
    for wrong in (["--rounding"], ["--rounding", "--dtype", "float16", "--write"]):
        assert run_child([*command[:2], *wrong]).returncode == 2


def test_the_page_counts_them():
    ours = torch.rand(40, 8) + 1
    fine, coarse = (errors_of(ours * factor, ours).case() for factor in (0.9, 1.2))
    heavy = ours.clone()
    heavy[3] = 100.0
    heavy = errors_of(1.2 * heavy, heavy).case() | {"typical": 1.0, "status": "within"}
    blank = {"architecture": "a", "path": "shared_prefix", "reason": "", "faults": []}
    records = [
        blank | {"class": "A", "status": "within", "cases": {"text": fine, "image": {"status": "not reached"}}},
        blank | {"class": "B", "status": "above", "cases": {"text": coarse}},
        blank | {"class": "C", "status": "within", "cases": {"text": heavy}},
        blank | {"class": "D", "status": "refused", "cases": {"text": {"status": "refused", "reason": "no"}}},
        blank | {"class": "E", "status": "not built", "cases": {}},
    ]
    lines = zoo.of_the_modules_error({"bfloat16": records})
    expected = (
        "* bfloat16: of 3 classes 1 are at most 1.05 (0 with the modules' own bits; half at most 1.20), 1 by "
        "their medians, 1 above. 1 refused. Texts that went astray: 3, by the modules 3."
    )
    assert expected in lines
    assert lines[-2] == "| B | bfloat16 | text | 1.200 | 1.20 to 1.20 | 1.200 |  | above |  |"
    few = "a few positions are all of the modules' error"
    assert lines[-1] == f"| C | bfloat16 | text | 1.200 | 1.20 to 1.20 | 1.000 | 3 to 3 | within | {few} |"
    assert zoo.of_the_modules_error({"bfloat16": records[:1]})[-1].startswith("* bfloat16: of 1 classes 1")
