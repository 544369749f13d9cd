"""The decoding step's Triton kernels compiled ahead of time, as shipped, for GPUs that need not be there."""

from __future__ import annotations

import importlib.util
import os
import re
import sys

import pytest

from .repository import repository

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on, nothing is compiled", allow_module_level=True)

_spec = importlib.util.spec_from_file_location("benchmark_aot", repository("benchmarks/aot.py"))
assert _spec is not None
aot = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = aot
_spec.loader.exec_module(aot)

TENSOR_CORE = {80: r"HMMA", 90: r"HG?MMA", 100: r"HMMA|UTC\w*MMA"}
# The telling ones for the fast set: what a model in bfloat16 with grouped heads runs on a Hopper GPU.
FAST = {"scoring-bf16-k4-even-sm90", "attention-bf16-d128-m16-plain-sm90", "commit-int64-sm90", "top_k-fp32-k4-sm90"}


def marks(case):
    return () if str(case) in FAST else pytest.mark.full


CASES = [pytest.param(case, id=str(case), marks=marks(case)) for case in aot.cases()]


@pytest.mark.parametrize("case", CASES)
def test_aot_decode_kernels(case):
    report = aot.report(case)
    assert report.spilled_bytes == 0, report
    assert report.registers <= 255
    assert report.shared_bytes <= aot.SHARED_LIMIT[case.arch]
    assert report.blocks >= 1
    exact = case.variant.startswith("fp32-")  # "highest": products on the plain units
    if case.kernel == "attention" or (case.kernel == "scoring" and not exact):
        assert bool(re.search(TENSOR_CORE[case.arch], report.matrix)) != exact, report
    if case.kernel in ("scoring", "attention", "top_k") and not case.variant.endswith("odd"):
        wide = re.search(r"128×(\d+)", report.loads)
        assert wide, report
        assert int(wide[1]) >= (1 if case.kernel == "top_k" else 12), report


def test_every_configuration_is_compiled():
    """What the launchers can pick is what the cases hold."""
    from simctg_fast.kernels import candidate_select, shared_prefix_attention

    for table in (candidate_select.CONFIGS, candidate_select.WIDE):
        assert {arch for arch, _ in table} == set(aot.ARCHITECTURES)
    scoring = {case.variant.split("-")[:2][i] for case in aot.cases(["scoring"]) for i in (0, 1)}
    assert scoring == {*aot.SIZES, "fp32high", "mixed", "k4", "k20", "k64"}  # tiles of 16, 32 and 64 candidates
    compiled: dict[int, set] = {16: set(), 32: set(), 64: set()}
    for case in aot.cases(["attention"]):
        kind, dim, rows, _ = case.variant.split("-")
        compiled[int(rows[1:])].add((case.arch, aot.SIZES[kind.removesuffix("high")], int(dim[1:])))
    assert set(shared_prefix_attention.CONFIGS) <= compiled[16]
    assert set(shared_prefix_attention.MIDDLE) <= compiled[32]
    assert set(shared_prefix_attention.TALL) <= compiled[64]
