"""Short forms of crf.py for `pytest benchmarks --benchmark-only`: ours beside the peers, small enough for seconds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from crf_rows import OURS, ROWS, Sizes

PROVIDERS = [
    (name, who)
    for name, peer in {
        "samples_8": "published", "select": "torch.topk", "published_8": "published", "viterbi": "fairseq",
        "nll": "fairseq", "nll_unbind": "fairseq, .unbind(1)", "dense_log_partition": "plain torch loop",
        "dense_viterbi": "plain torch loop",
    }.items()
    for who in (OURS, peer)
]  # fmt: skip


@pytest.mark.parametrize(("name", "who"), PROVIDERS, ids=[f"{name}-{who}" for name, who in PROVIDERS])
def test_crf(benchmark, name, who):
    """Each row compares the results of its providers before they are timed."""
    benchmark.group = name
    device = "cuda" if torch.cuda.is_available() else "cpu"
    providers = ROWS[name][2](Sizes(batch=2, length=12, vocabulary=4000, beam=64, rank=16, device=device))

    def run():
        providers[who]()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
