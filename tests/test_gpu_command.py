"""`make gpu` where there is no GPU, and what it writes."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu(monkeypatch):
    """`benchmarks/gpu.py` as a module, and a function that runs it with arguments."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("gpu")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
        return module.main()

    return module, run


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("arguments", [(), ("decode",), ("--look",), ("llama", "gpt2")])
def test_without_a_device_it_says_so(gpu, capsys, arguments):
    assert gpu[1](*arguments) == 1
    assert "no CUDA device here" in capsys.readouterr().out


def test_unknown_part(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu[1]("fast", "--device", "cpu")
    assert "PART is 'fast', must be one of decode, decode_speed" in capsys.readouterr().err


def test_results_of_each_part(gpu, capsys, monkeypatch, tmp_path):
    module, run = gpu
    monkeypatch.setenv("OUT", str(tmp_path / "out"))

    def cases(device):
        yield "one", True, "1 ms", {"share_of_floor": 0.5}
        yield "two", False, "error 3"

    monkeypatch.setitem(module.PARTS, "decode", cases)
    assert run("decode", "memcheck", "--device", "cpu") == 1
    out = capsys.readouterr().out
    assert "ok   one: 1 ms" in out
    assert "FAIL two: error 3" in out
    assert out.strip().endswith("1 failed")
    parts = {}
    for path in sorted((tmp_path / "out").glob("*.json")):
        found = json.loads(path.read_text())
        parts[found["part"]] = found
        rows = list(csv.DictReader(path.with_suffix(".csv").open()))
        assert [row["case"] for row in rows] == [case["case"] for case in found["cases"]]
    assert set(parts) == {"decode", "memcheck"}
    assert parts["decode"]["cases"][0] == {"case": "one", "passed": True, "figures": "1 ms", "share_of_floor": 0.5}
    assert parts["decode"]["environment"]["torch"] == torch.__version__
    assert "left out" in parts["memcheck"]["cases"][0]["figures"]


def test_small_cases_of_the_decoding_step_hold_on_this_device(gpu):
    """The checks themselves, on the CPU: they pass where the operators are right, and fail where they are not."""
    module = importlib.import_module("gpu_decode")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for name, passed, figures, _ in module._check_commit(device):
        assert passed, (name, figures)
    checks = module._check_select(device, lambda result, plain, truth: (False, "always wrong"))
    assert not next(checks)[1]
