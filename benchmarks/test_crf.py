"""Short forms of `benchmarks/crf.py`: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")

_spec = importlib.util.spec_from_file_location("benchmark_crf", Path(__file__).resolve().parent / "crf.py")
_module = importlib.util.module_from_spec(_spec)
sys.modules["benchmark_crf"] = _module
_spec.loader.exec_module(_module)

SMALL = {"batch": 2, "length": 9, "vocabulary": 4000, "beam": 64, "rank": 16}
PROVIDERS = [
    (name, who)
    for name, peers in {
        "samples_8": ("published",), "select": ("torch.topk",), "published_8": ("published",), "viterbi": ("fairseq",),
        "nll": ("fairseq",), "nll_unbind": ("fairseq with .unbind(1)",), "dense_log_partition": ("plain torch loop",),
        "dense_viterbi": ("plain torch loop",),
    }.items()
    for who in (_module.OURS, *peers)
]  # fmt: skip


@pytest.mark.parametrize(("name", "who"), PROVIDERS, ids=[f"{name}-{who}" for name, who in PROVIDERS])
def test_crf(benchmark, name, who):
    benchmark.group = name
    benchmark(_module.ROWS[name][1](_module.Sizes(**SMALL))[who])
