"""`make gpu` where there is no GPU, and what it writes."""

from __future__ import annotations

import csv
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from .repository import repository

ROOT = repository("benchmarks").parent


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


def results(folder: Path) -> dict[str, dict]:
    """By part, what the JSON files in a folder hold; the CSV files have the same cases."""
    parts = {}
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        parts[found["part"]] = found
        rows = list(csv.DictReader(path.with_suffix(".csv").open()))
        assert [row["case"] for row in rows] == [case["case"] for case in found["cases"]]
    return parts


def test_results_of_a_part(gpu, capsys, monkeypatch, tmp_path):
    """A piece that raises is a failed case; the pieces after it run."""
    module, run = gpu
    monkeypatch.setenv("OUT", str(tmp_path / "out"))

    def cases(device):
        yield "one", True, "1 ms", {"share_of_floor": 0.5, "ms": 1.0, "goals": {"floor": 0.9}}
        raise RuntimeError("it broke")

    def more(device):
        yield "two", False, "error 3"

    monkeypatch.setitem(module.PARTS, "decode", [cases, more])
    assert run("decode", "--device", "cpu") == 1
    out = capsys.readouterr().out
    for line in ("ok   one: 1 ms", "FAIL cases raised: RuntimeError: it broke", "FAIL two: error 3"):
        assert line in out
    assert ["one", "1.000", "50%", "90%"] in [line.split() for line in out.splitlines()]
    assert "3 cases, 2 failed" in out
    found = results(tmp_path / "out")["decode"]
    numbers = {"share_of_floor": 0.5, "ms": 1.0, "goals": {"floor": 0.9}}
    assert found["cases"][0] == {"case": "one", "passed": True, "figures": "1 ms"} | numbers
    assert found["environment"]["torch"] == torch.__version__


def test_parts_run_in_processes_of_their_own(gpu, capfd, monkeypatch, tmp_path):
    module, run = gpu
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert run("memcheck", "offsets", "--device", "cpu") == 0
    out = capfd.readouterr().out
    assert out.strip().endswith("all passed")
    assert out.count("1 cases, 0 failed") == 2
    assert len(re.findall(r"^instruction_set ", out, re.MULTILINE)) == 1  # said once
    parts = results(tmp_path / "out")
    assert set(parts) == {"memcheck", "offsets"}
    assert "left out" in parts["memcheck"]["cases"][0]["figures"]
    monkeypatch.setattr(module, "PART_SECONDS", 0.01)
    assert run("memcheck", "offsets", "--device", "cpu") == 1
    assert "FAIL offsets: stopped after 0.01 s" in capfd.readouterr().out
    monkeypatch.setattr(module, "PART_SECONDS", 60)
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    assert run("memcheck", "offsets", "--device", "cpu") == 1
    assert "failed in 2 of 2 parts" in capfd.readouterr().out


def test_gpu_tests_are_found_without_plugins(gpu, monkeypatch):
    """The device's machine may have pytest alone: neither its plugins nor what other tests import."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:timeout -p no:xdist -p no:randomly --collect-only")
    (case,) = gpu[0].check_tests("cpu")
    assert "error" not in case[2]
    assert int(case[2].partition("/")[0]) >= 12, case


@pytest.fixture
def generation(gpu, monkeypatch, tmp_path):
    module = importlib.import_module("gpu_generate")
    monkeypatch.setattr(module, "ORACLE", tmp_path)
    monkeypatch.setattr(importlib.import_module("simctg_fast.decoding.compiled_decoder"), "BACKEND", "eager")
    monkeypatch.setattr(module, "NEW_TOKENS", (5, 15))
    return module


@pytest.mark.parametrize("part", ["gpt2", "llama"])
def test_runs_agree_with_the_plain_loop(generation, part):
    plain, compiled = generation.measure_models("cpu", part, None, rounds=1)
    for name, passed, figures, _ in (plain, compiled):
        assert passed, (name, figures)
        assert figures.startswith("100% of the new tokens as in the plain loop, the first 15 of 15; not timed on cpu")
    assert compiled[0] == f"{plain[0]}, decoder compiled"


def test_figures_of_a_run(generation):
    """Given a bandwidth the rows are those of a GPU, but for the graph that there is none."""
    run = generation.TRIALS["llama"][0]
    model = generation.make_model(run.shape, run.dtype, "cpu")
    rows = list(generation._measure(model, run, 1e9, 1))
    for name, passed, figures, numbers in rows:
        assert not passed, (name, figures)
        assert "not captured: it is on cpu" in figures
        assert "no oracle (make oracle-wheels fetches it)" in figures
        assert numbers["share_of_floor"] == pytest.approx(numbers["floor_ms"] / numbers["ms"])
    # two layers of 4/2 heads of 16, width 64, feed-forward 96, vocabulary 500, at 12 + 10 positions of 2 rows
    weights = 2 * (64 * (64 + 64 + 64) + 3 * 64 * 96 + 2 * 64) + 64 + 500 * 64
    moved = 4 * (weights + 2 * 22 * (2 * 2 * 32 + 64))
    assert rows[0][3]["floor_ms"] == pytest.approx(moved / 1e9 * 1e3)


def test_small_cases_of_the_decoding_step_hold_on_this_device(gpu):
    """The checks themselves, on the CPU: they pass where the operators are right, and fail where they are not."""
    module = importlib.import_module("gpu_decode")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for name, passed, figures, _ in module.check_commit(device):
        assert passed, (name, figures)
    checks = module.check_select(device, lambda result, plain, truth: (False, "always wrong"))
    assert not next(checks)[1]
