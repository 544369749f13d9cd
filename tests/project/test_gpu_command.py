"""`make gpu` where there is no GPU: its parts on the CPU, how calls are run, and what they write."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ..processes import run_child, started
from ..repository import repository

ROOT = repository("benchmarks").parent
GPU = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """`benchmarks/gpu.py` as a module, and where it writes."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    return importlib.import_module("gpu")


def result(folder: Path, name: str) -> dict:
    """The only result of a call."""
    (path,) = folder.glob(f"*-{name}.json")
    assert path.with_suffix(".log").exists()
    return json.loads(path.read_text())


def states(found: dict) -> dict[str, str]:
    return {name: part["state"] for name, part in found["parts"].items()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("arguments", [[], ["1"], ["decode", "losses"], ["--look"]])
def test_without_a_device_it_says_so(gpu, capsys, arguments, tmp_path):
    assert gpu.main(arguments) == 1
    assert "no CUDA device here" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_unknown_part(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["fast", "--device", "cpu"])
    assert "'fast' is no call and no part, must be one of 1, 2, 3, build, first" in capsys.readouterr().err


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_plan(gpu, capsys):
    assert gpu.main(["--plan"]) == 0
    out = capsys.readouterr().out
    commands = [line for line in out.splitlines() if line.startswith("python3 ")]
    assert commands == [f"python3 benchmarks/gpu.py {n} --budget {b}" for n, (b, _) in gpu.CALLS.items()]
    assert "In all 1450 s at most, 1450 allowed" in out
    planned = [part for _, stages in gpu.CALLS.values() for stage in stages for part in stage]
    assert planned == list(gpu.PARTS)
    for number, (part, entry) in enumerate(gpu.PARTS.items()):
        module, _, name = entry.pieces.partition(":")
        assert getattr(importlib.import_module(module), name), part
        assert set(entry.needs) <= set(planned[:number]), part


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("START_SECONDS", 90),
        ("CALLS", {"1": (240, [["llama"]])}),  # expected to take more than its budget
        ("CALLS", {"1": (601, [["first"]])}),
        ("COMMAND_LETTERS", 20),
    ],
)
def test_plan_that_does_not_fit(gpu, monkeypatch, name, value):
    monkeypatch.setattr(gpu, name, value)
    assert gpu.main(["--plan"]) == 1


# ---- how a call is run: parts of our own ----------------------------------------------------------------------------

PARTS = """
import os, subprocess, sys, time
sys.path.insert(0, {benchmarks!r})
import gpu
from gpu_case import case, measured

def good(where):
    yield measured("one", 1.0, floor_ms=0.5, others={{"eager": 4.0}}, goals={{"floor": 0.9}})

def raises(where):
    yield case("two", True, "fine")
    raise RuntimeError("it broke")

def red(where):
    yield case("three", False, "error 3")

def dies(where):
    yield case("four", True, "fine")
    os.kill(os.getpid(), 11)

def hangs(where):
    child = subprocess.Popen(["sleep", "600"])
    yield case("five", True, f"{{os.getpid()}} {{child.pid}}")
    time.sleep(600)

GOOD, RAISES, DIES, HANGS = [good], [raises, red], [dies], [hangs]
gpu.PARTS = {{
    name: gpu.Part(f"stub:{{name.upper()}}", 4, "", needs=needs)
    for name, needs in {{"good": (), "raises": (), "dies": (), "hangs": ()}}.items()
}}
gpu.PARTS |= {{"timed": gpu.Part("stub:GOOD", 4, "", needs=("raises",)), "last": gpu.Part("stub:GOOD", 4, "")}}
gpu.CALLS = {{
    "1": (300, [["good", "raises", "dies"], ["timed"], ["last"]]), "2": (300, [["good"], ["hangs"], ["last"]]),
}}
gpu.__file__ = __file__
if __name__ == "__main__":
    sys.exit(gpu.main())
"""


@pytest.fixture
def stub(gpu, tmp_path, monkeypatch):
    """A command like `benchmarks/gpu.py`, with other parts."""
    path = tmp_path / "stub.py"
    path.write_text(PARTS.format(benchmarks=str(ROOT / "benchmarks")))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return [sys.executable, path, "--device", "cpu"]


def test_a_part_that_breaks_does_not_reach_the_others(stub, tmp_path):
    done = run_child([*stub, "1"])
    assert done.returncode == 1, done.stderr
    found = result(tmp_path / "out", "call1")
    assert states(found) == {
        "good": "ended",
        "raises": "ended",
        "dies": "died of SIGSEGV",
        "timed": "left out: raises failed",
        "last": "ended",
    }
    names = {part: [(c["case"], c["passed"]) for c in entry["cases"]] for part, entry in found["parts"].items()}
    assert names["raises"] == [("two", True), ("raises raised", False), ("three", False)]
    assert names["dies"] == [("four", True)]
    (one,) = found["parts"]["good"]["cases"]
    assert one["ms"] == 1.0
    assert one["figures"] == "1.000 ms; 50% of the floor's rate; 4.00x eager"
    assert found["ended"]
    assert found["environment"]["torch"] == torch.__version__
    lines = [
        "ok   good: one: 1.000 ms",
        "FAIL raises: raises raised: RuntimeError: it broke",
        "dies: died of SIGSEGV",
    ]
    for line in lines:
        assert line in done.stdout
    (log,) = (tmp_path / "out").glob("*.log")
    assert 'raise RuntimeError("it broke")' in log.read_text()
    assert "3 parts did not end well" in done.stdout


def test_times_anyway_and_nothing_is_written_over(stub, tmp_path):
    run_child([*stub, "raises", "timed", "--anyway"])
    run_child([*stub, "raises", "timed"])
    first, second = (json.loads(x.read_text()) for x in sorted((tmp_path / "out").glob("*.json"), reverse=True))
    assert states(first) == {"raises": "ended", "timed": "ended"}
    assert states(second) == {"raises": "ended", "timed": "left out: raises failed"}


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.full
def test_a_budget_that_runs_out(stub, tmp_path):
    done = run_child([*stub, "hangs", "last", "--budget", "12"])
    assert done.returncode == 1
    found = result(tmp_path / "out", "hangs-last")
    assert states(found)["hangs"].startswith("stopped after")
    (five,) = found["parts"]["hangs"]["cases"]
    assert all(gone(int(pid)) for pid in five["figures"].split())
    assert states(found)["last"] == "ended"
    (log,) = (tmp_path / "out").glob("*.log")
    assert "in hangs" in log.read_text()  # where it stood
    done = run_child([*stub, "hangs", "last", "--budget", "0.5"])
    assert done.stdout.count("left out: 0 s were left, about 4 are needed") == 4  # each when it is, and at the end


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_call_that_is_ended(stub, tmp_path, number):
    """What was found is there, and says what had not ended; nothing goes on."""
    with started([*stub, "2"], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "five" in line:
                break
        process.send_signal(number)
        process.wait()
    found = result(tmp_path / "out", "call2")
    state = "running" if number == signal.SIGKILL else "interrupted"
    assert states(found) == {"good": "ended", "hangs": state, "last": "not begun"}
    assert not found["ended"]
    (five,) = found["parts"]["hangs"]["cases"]
    deadline = time.monotonic() + 60
    while not all(gone(int(pid)) for pid in five["figures"].split()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


# ---- the parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["1", *(pytest.param(call, marks=pytest.mark.full) for call in "23")])
def test_dry_run(gpu, tmp_path, call):
    """A whole call in little. The device's machine has pytest without plugins."""
    environment = {**os.environ, "PYTEST_ADDOPTS": "-p no:timeout -p no:xdist -p no:randomly", "PYTHONPATH": str(ROOT)}
    done = run_child([sys.executable, GPU, call, "--device", "cpu", "--tiny", "--budget", "900"], env=environment)
    found = result(tmp_path / "out", f"call{call}")
    assert done.returncode == 0, done.stdout
    assert set(states(found).values()) == {"ended"}
    assert {name.split()[0] for name in found["parts"]} == {x for stage in gpu.CALLS[call][1] for x in stage}
    for name, part in found["parts"].items():
        assert part["cases"], name
        assert all(c["passed"] for c in part["cases"]), name
        if gpu.PARTS[name.split()[0]].needs:
            assert all(c["ms"] > 0 for c in part["cases"] if c["case"] != "ceilings"), name
    if call == "1":
        figures = found["parts"]["tests"]["cases"][0]["figures"]
        assert "error" not in figures
        assert int(figures.partition("/")[0]) >= 12, figures


def wrong_first(original):
    """Its first tensor a little off."""

    def run(*arguments, **options):
        out = original(*arguments, **options)
        if options.get("impl") == "torch":  # what it is compared with
            return out
        first, *others = out if isinstance(out, tuple) else (out,)
        first = 1.01 * first if first.is_floating_point() else torch.where(first > 0, first - 1, first + 1)
        return (first, *others) if isinstance(out, tuple) else first

    return run


def silent(original):
    return lambda *arguments, **options: None


@pytest.mark.parametrize(
    ("check", "operator", "mutant"),
    [
        ("gpu_decode:check_select", "simctg_fast.ops.candidate_select:candidate_select", wrong_first),
        ("gpu_decode:check_scan", "simctg_fast.ops.candidate_select:candidate_scan", wrong_first),
        ("gpu_decode:check_attention", "simctg_fast.ops.shared_prefix_attention:shared_prefix_attention", wrong_first),
        ("gpu_decode:check_commit", "simctg_fast.ops.prefix_commit:prefix_commit", silent),
        ("gpu_decode:check_top_k", "simctg_fast.ops.top_k:top_k_probs", wrong_first),
        ("gpu_strategies:check_centered", "gpu_strategies:centered_scan", wrong_first),
        ("gpu_strategies:check_followers", "gpu_strategies:follower_scan", wrong_first),
        ("gpu_strategies:check_contraclm", "gpu_strategies:contraclm_token_loss", wrong_first),
        ("gpu_losses:check_contrastive", "gpu_losses:contrastive_loss", wrong_first),
        ("gpu_losses:check_simcse", "gpu_losses:simcse_unsup_loss", wrong_first),
        ("gpu_crf:check_backtrace", "gpu_crf:viterbi_backtrace", wrong_first),
        ("gpu_crf:check_selection", "gpu_crf:crf_beam_select", wrong_first),
    ],
)
def test_a_wrong_kernel_is_found(gpu, monkeypatch, check, operator, mutant):
    module, _, name = check.partition(":")
    piece = getattr(importlib.import_module(module), name)
    where = gpu.Where("cpu", tiny=True)
    torch.manual_seed(0)
    assert all(found["passed"] for found in piece(where))
    owner, _, attribute = operator.partition(":")
    owner = importlib.import_module(owner)
    monkeypatch.setattr(owner, attribute, mutant(getattr(owner, attribute)))
    assert not all(found["passed"] for found in piece(where))


def test_no_time_of_a_wrong_loss(gpu, monkeypatch):
    module = importlib.import_module("gpu_losses")
    monkeypatch.setattr(module.losses, "contrastive_loss", wrong_first(module.contrastive_loss))
    for found in module.measure_contrastive(gpu.Where("cpu", tiny=True), "fp32", module.SHAPES[0]):
        assert not found["passed"]
        assert "ms" not in found


def test_a_peer_that_fails_is_named(gpu):
    module = importlib.import_module("gpu_losses")

    def broken(states):
        raise MemoryError("no room")

    providers = {"ours": module.contrastive_loss, "eager": broken}
    found = module.compared(gpu.Where("cpu", tiny=True), "a", providers, torch.randn(1, 4, 8), {"eager": 2.0})
    assert found["passed"]
    assert found["others"] == {"eager": "eager: MemoryError: no room"}
    assert gpu.missed(found) == ["not measured against eager, goal 2x"]


@pytest.fixture
def first(gpu):
    return importlib.import_module("gpu_first")


def test_other_tokens_on_the_device_are_found(gpu, first, monkeypatch):
    original = first.search

    def other(where, model, inputs, step):
        out = original(where, model, inputs, step)
        out[0, -1] += step is True
        return out

    monkeypatch.setattr(first, "search", other)
    with pytest.raises(AssertionError, match="captured and uncaptured: row 0"):
        next(first.check_model(gpu.Where("cpu", tiny=True), "gpt2"))


def test_other_tokens_of_a_strategy_are_found(gpu, monkeypatch):
    """Captured, though not in the plain loop."""
    module = importlib.import_module("gpu_strategies")
    where, original = gpu.Where("cpu", tiny=True), module.written

    def other(where, model, inputs, made, step):
        out = original(where, model, inputs, made, step)
        out[1, -1] += step
        return out

    assert all(found["passed"] for found in module.check_tokens(where, "gpt2"))
    monkeypatch.setattr(module, "written", other)
    for found in module.check_tokens(where, "gpt2"):
        assert not found["passed"]
        assert found["figures"].startswith("captured: row 1, token 11, clear by")
        assert "plain" not in found["figures"]


@pytest.mark.full
def test_the_price_of_adaptive_search(gpu):
    """Rows that are masked: at most 1.05 of the time of a search of as many."""
    module = importlib.import_module("gpu_strategies")
    where = gpu.Where("cpu", tiny=True)
    cases = {found["case"].rpartition(", ")[2]: found for found in module.measure_strategies(where, 0)}
    assert set(cases) == set(module.timed_searches())
    found = cases["adaptive"]
    assert found["others"] == {"contrastive k=15": cases["contrastive k=15"]["ms"]}
    met, missed = (found | {"ms": 1.0, "others": {"contrastive k=15": other}} for other in (0.96, 0.95))
    assert gpu.missed(met) == []
    assert gpu.missed(missed) == ["MISSED 0.952381x contrastive k=15 (0.95x)"]


def test_memory_that_grows_is_found(gpu, first, monkeypatch):
    """On the CPU nothing is captured, which is said before."""
    held = iter([10, 10, 20])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(held))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *arguments: self)
    captured, calls, second = first.check_model(gpu.Where("cuda", tiny=True), "gpt2")
    assert captured["figures"] == second["figures"] == "not captured: it is on cpu"
    assert not captured["passed"]
    assert not second["passed"]
    assert not calls["passed"]
    assert calls["figures"] == "bytes held after each: 10, 10, 20"


def test_figures_of_a_run(gpu, monkeypatch):
    module = importlib.import_module("gpu_generate")
    where, run = gpu.Where("cpu", tiny=True), module.TRIALS["llama"][0]
    monkeypatch.setattr(module, "bandwidth", lambda where: 1e9)
    (found,) = module.measure_run(where, "llama", run)
    assert found["passed"], found
    assert "100% of the new tokens as in the plain loop, the first 15 of 15" in found["figures"]
    assert set(found["others"]) == set(found["calls"]) == {"our greedy", "the plain loop", "transformers' greedy"}
    assert found["call_ms"] > found["ms"]
    # two layers of 4/2 heads of 16, width 64, feed-forward 96, vocabulary 500, at 12 + 10 positions of 2 rows
    weights = 2 * (64 * (64 + 64 + 64) + 3 * 64 * 96 + 2 * 64) + 64 + 500 * 64
    moved = 4 * (weights + 2 * 22 * (2 * 2 * 32 + 64))
    assert found["floor_ms"] == pytest.approx(moved / 1e9 * 1e3)
    monkeypatch.setattr(module, "ORACLE", ROOT / "nowhere")
    (found,) = module.measure_oracle(where, "llama", run)
    assert found["others"] == {"4.55.4": "4.55.4: `make oracle-wheels` fetches it"}


# ---- the page -------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(gpu):
    return importlib.import_module("gpu_page")


def call_of(gpu, folder: Path, device: str, *cases: dict) -> Path:
    environment = dict.fromkeys(("torch", "cuda", "triton", "transformers"), "1")
    parts = {"kernels": {"state": "ended", "cases": list(cases)}, "tests": {"state": "stopped after 9 s", "cases": []}}
    path = folder / f"{device}.json"
    found = {"card": "Card", "device": device, "tiny": False, "began": "2026-01-01T00:00:00"}
    path.write_text(json.dumps(found | {"environment": environment, "parts": parts}))
    return path


def test_page_of_results(gpu, page, tmp_path):
    goals = {"goals": {"floor": 0.9, "eager": 3.0}}
    cases = [
        gpu.case("ceilings", True, "copy 3.00 TB/s", copy_bytes_per_s=3e12),
        importlib.import_module("gpu_case").measured("scan", 2.0, floor_ms=1.0, others={"eager": 8.0}, **goals),
        gpu.case("commit", False, "error 3"),
    ]
    text = page.page([call_of(gpu, tmp_path, "cuda", *cases)], "\nBecause.\n")
    assert "## Card" in text
    assert "| scan | 2.000 | 50% | 4.00x eager |  |  |" in text
    assert "* scan: MISSED 90% of the floor's rate (50%)" in text
    assert "eager (" not in text  # a goal that was met
    assert "* kernels: **failed**: commit: error 3" in text
    assert "* tests: stopped after 9 s" in text
    assert "copy 3.00 TB/s" in text
    assert text.endswith("\n## Why\n\nBecause.\n")


def test_a_trial_on_the_cpu_is_no_result(gpu, page, tmp_path):
    text = page.page([call_of(gpu, tmp_path, "cpu", gpu.case("a", True, "1 ms", ms=1.0))])
    assert text == page.page([])
    assert "nothing has been measured yet" in text


def test_the_page_is_what_the_results_say(page):
    text = page.PAGE.read_text()
    assert text == page.page(sorted(page.RESULTS.glob("*.json")), text.partition(page.WHY)[2])
