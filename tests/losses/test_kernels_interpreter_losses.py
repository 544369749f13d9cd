"""The losses' Triton kernels, run by Triton's interpreter in a process of its own, against float64."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from ..processes import run_child
from ..repository import INSTALLED

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "loss_interpreter_cases.py"
LIMITS = {  # relative errors: (loss, gradient)
    "fp32": (3e-6, 1e-5),
    "fp16": (3e-6, 2e-3),  # the gradient's one rounding to 11 bits, and the weights' in the product
}


def contrastive(shape, bias, dtype, reduction, precision="high", normalizer=None):
    arguments = {"shape": shape, "bias": bias, "dtype": dtype, "reduction": reduction, "precision": precision}
    return {"function": "contrastive", "arguments": {**arguments, "normalizer": normalizer}}


def simcse(rows, width, dtype, supervised, temperature):
    arguments = {"rows": rows, "width": width, "dtype": dtype, "supervised": supervised}
    return {"function": "simcse", "arguments": {**arguments, "temperature": temperature}}


def contraclm(shape, dtype, temperature, strip=None):
    return {
        "function": "contraclm",
        "arguments": {"shape": shape, "dtype": dtype, "temperature": temperature, "strip": strip},
    }


DIRECTIONS = ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]


def ranking(rows, width, dtype, options):
    return {"function": "ranking", "arguments": {"rows": rows, "width": width, "dtype": dtype, "options": options}}


# Two tiles, the second ragged, every reduction and both kinds of operands among them; a width of several slices.
FAST = [
    contrastive([2, 141, 40], 1.0, "fp32", "pairs", normalizer=3000),
    contrastive([1, 130, 72], 1.0, "fp16", "dense"),
    contrastive([2, 12, 16], 1.0, "fp32", "paper", "highest", None),
    contrastive([3, 9, 200], 1.0, "fp16", "pairs", normalizer=1000.0),
    {"function": "edges", "arguments": {}},
    {"function": "odd_arguments", "arguments": {}},
    {
        "function": "simcse",
        "arguments": {"rows": 140, "width": 24, "dtype": "fp32", "supervised": False, "temperature": 0.05},
    },
    {
        "function": "simcse",
        "arguments": {"rows": 150, "width": 40, "dtype": "fp16", "supervised": True, "temperature": 0.05},
    },
    contraclm([3, 70, 24], "fp32", 0.2, 140 * 140 * 2 + 1),  # two sequences, then one
    contraclm([2, 70, 40], "fp16", 0.2, 140),  # each sequence in two strips
    {"function": "left_out", "arguments": {"rows": 134, "width": 16, "dtype": "fp32"}},
    {"function": "cosine", "arguments": {"shape": [2, 70, 40], "dtype": "fp32"}},
    ranking(70, 24, "fp32", {"hardness_mode": "in_batch_negatives", "hardness_strength": 4.0}),
    ranking(33, 24, "fp16", {"directions": DIRECTIONS, "hard_negative_weight": 1.5}),
]
# Full and empty tiles beside mixed ones, lengths where full tiles are summed apart, widths over the launchers' limits.
SLOW = [
    contrastive([1, 530, 24], bias, dtype, reduction, precision)
    for bias in (0.0, 1.0, 3.0)
    for dtype in ("fp32", "fp16")
    for reduction in ("pairs", "dense")
    for precision in ("high", "highest")
    if not (dtype == "fp16" and precision == "highest")
]
SLOW += [contrastive([2, 128, 1100], 1.0, dtype, "paper") for dtype in ("fp32", "fp16")]
SLOW += [contrastive([1, 9, 8192], 1.5, dtype, "pairs") for dtype in ("fp32", "fp16")]
SLOW += [simcse(390, 70, d, s, t) for d in ("fp32", "fp16") for s in (False, True) for t in (1.0, 0.01)]
SLOW += [contraclm([2, 150, 70], d, t) for d in ("fp32", "fp16") for t in (1.0, 0.05)]
SLOW += [{"function": "cosine", "arguments": {"shape": [1, 140, 100], "dtype": "fp16"}}]


def run(cases):
    process = run_child(
        [sys.executable, str(SCRIPT)],
        input="".join(json.dumps(case) + "\n" for case in cases),
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(INSTALLED), "OMP_NUM_THREADS": "1"},
        cwd="/",
        timeout=3600,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    results = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(results) == len(cases)
    return results


def judge(case, result):
    dtype = case["arguments"].get("dtype")
    if case["function"] == "edges":
        assert result == {"one_token": 0.0, "not_finite": 1.0, "empty": 0.0}
        return
    if case["function"] == "odd_arguments":
        assert result == {"wrong": 0}
        return
    loss, gradient = LIMITS[dtype]
    assert result["loss"] <= (loss if case["function"] == "contrastive" else 50 * gradient), (case, result)
    assert result["gradient"] <= (gradient if case["function"] == "contrastive" else 20 * gradient), (case, result)
    if case["function"] == "contrastive":
        assert result["same"] == 1.0, case
    if case["function"] == "cosine":
        assert result["value"] <= {"fp32": 1e-6, "fp16": 1e-3}[dtype]
        assert result["zero"] == 0.0


def test_kernels():
    for entry in run(FAST):
        judge(**entry)


@pytest.mark.full
@pytest.mark.timeout(3700)
def test_kernels_on_the_grid():
    for entry in run(SLOW):
        judge(**entry)
