"""Correctness and speed on a CUDA device, in three calls of a few minutes each.

    python benchmarks/gpu.py [CALL | PART ...] [--budget SECONDS] [--device cuda]
    python benchmarks/gpu.py --plan              # the calls as command lines, with their expected seconds
    python benchmarks/gpu.py --page              # docs/gpu.md from the results in benchmarks/results

A call is a number (all three by default), or parts of them by name. It writes two files into benchmarks/results, or
into $OUT where that is set: ``<card>-<date>-call1.json``, anew after every case, so that a call that is ended at any
moment leaves all that it has found and says which parts had not ended, and ``….log`` with what its processes printed.

Every part is a process of its own: what breaks one does not reach the others. Those that check correctness run side by
side, those that take times run alone. A part may take what the budget leaves it; then it is stopped. What does not fit
into the rest of the budget is left out, and so are times whose correctness has just failed (`--anyway` takes them all
the same); both are said. Ends with status 1 if a case fails, a part does not end, or the device is not there.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import faulthandler
import functools
import importlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import RESULTS
from gpu_case import Case, Piece, Where, case, missed

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Part:
    """Where its pieces are, the seconds it is expected to take on an H100 with 16 cores, and why so many."""

    pieces: str
    seconds: int
    basis: str
    cut: bool = False  # by dtype, a process each
    needs: tuple[str, ...] = ()  # timed, and not while one of these has failed in this call


# A process: 10 s to import and to open the device. A kernel: 1.5 s to compile for each set of options.
PARTS = {
    "build": Part("gpu:BUILD", 35, "75 s of compiling here, the longest file 25 s"),
    "first": Part("gpu_first:PIECES", 40, "10 s, 15 kernels, 42 calls of a second or less with the CPU's"),
    "decode": Part("gpu_decode:CHECKS", 70, "10 s, 40 kernels a dtype", cut=True),
    "losses": Part("gpu_losses:CHECKS", 60, "10 s, 25 kernels a dtype, float64 on the device", cut=True),
    "crf": Part("gpu_crf:CHECKS", 70, "10 s, 25 kernels, float64 on the CPU 15 s"),
    "tests": Part("gpu:TESTS", 80, "10 s, 20 tests; Inductor for four tiny models, 10 s each"),
    "kernels": Part(
        "gpu_decode:SPEED", 60, "10 s, 15 kernels, 50 timings of 0.3 s, one of Inductor", needs=("first", "decode")
    ),
    "gpt2": Part(
        "gpu_generate:GPT2", 130, "15 s; 2 sizes × (900 steps of 2 ms, 520 of 10), 4.55.4 2 × 25 s, Inductor 45 s",
        needs=("first",),
    ),
    "strategies": Part("gpu_strategies:CHECKS", 60, "10 s, 20 kernels, 14 captures, float64 on the CPU 15 s"),
    "strategies_speed": Part(
        "gpu_strategies:SPEED", 75, "12 s; 2 sizes × 8 searches × (450 steps of 2 to 5 ms, a capture)",
        needs=("first", "strategies"),
    ),
    "engine": Part(
        "gpu_engine:PIECES", 145, "four processes of 14 s; ours 20 + 15 s, batches 20 s, generate_batch 35 s",
        needs=("first",),
    ),
    "losses_speed": Part(
        "gpu_losses:SPEED", 120, "10 s, 20 kernels, Inductor for six shapes, 12 s each", needs=("losses",)
    ),
    "llama": Part(
        "gpu_generate:LLAMA", 250, "25 s with the weights; B=1 30 s, B=32 70 s, 4.55.4 45 s, Inductor 80 s",
        needs=("first",),
    ),
    "crf_speed": Part("gpu_crf:SPEED", 50, "15 s, seven rows of at most 5 s", needs=("crf",)),
    "offsets": Part("gpu_decode:OFFSETS", 40, "10 s, six kernels over 4 GB each"),
    "memcheck": Part("gpu_decode:MEMCHECK", 100, "20 s, 35 kernels, watched"),
}  # fmt: skip
# Budget, and what runs at a time, the most telling first.
CALLS: dict[str, tuple[int, list[list[str]]]] = {
    "1": (240, [["build"], ["first"], ["decode", "losses", "crf", "tests"], ["kernels"]]),
    "2": (550, [["gpt2"], ["strategies"], ["strategies_speed"], ["engine"], ["losses_speed"]]),
    "3": (420, [["llama"], ["crf_speed"], ["offsets", "memcheck"]]),
}
START_SECONDS, LEASE_SECONDS, COMMAND_SECONDS, COMMAND_LETTERS = 80, 1450, 600, 2000
DTYPES = ("float32", "float16", "bfloat16")


# ---- in a process of its own ----------------------------------------------------------------------------------------


def build(where: Where) -> Iterator[Case]:
    """The C++ extension, with which the CPU's tokens are made. Without it PyTorch makes them."""
    if where.cuda:
        done = subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        print(done.stdout)
    try:
        yield case("the extension loads", True, importlib.import_module("simctg_fast._C").__file__)
    except ImportError as error:
        yield case("the extension loads", False, str(error))


def tests(where: Where) -> Iterator[Case]:
    """The tests marked `gpu`. Options of plugins that need not be there are left out, and files without such tests."""
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    options += ["--collect-only"] * where.tiny
    command = [sys.executable, "-m", "pytest", *options, *files]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout)
    lines = result.stdout.strip().splitlines() or ["no output"]
    told = "passed" in lines[-1] or (where.tiny and "collected" in lines[-1])
    yield case("pytest -m gpu", result.returncode == 0 and told, lines[-1])


BUILD: list[Piece] = [build]
TESTS: list[Piece] = [tests]


def name_of(piece: Any) -> str:
    if isinstance(piece, functools.partial):
        return " ".join([piece.func.__name__, *map(name_of, piece.keywords.values())])
    return getattr(piece, "__name__", str(piece))


def cases_of(part: str, where: Where) -> Iterator[Case]:
    """What its pieces yield. An exception is a failed case, the last of its piece."""
    module, _, name = PARTS[part].pieces.partition(":")
    pieces = getattr(importlib.import_module(module), name)
    if torch := sys.modules.get("torch"):  # the module has brought it where it needs it
        torch.manual_seed(0)
    for piece in pieces:
        try:
            yield from piece(where)
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            yield case(f"{name_of(piece)} raised", False, text)
        if where.cuda and torch:
            torch.cuda.empty_cache()


def run_part(part: str, where: Where, pipe: int) -> None:
    """The process of a part: its cases go to ``pipe``, a line each. Where it hangs is printed before it is stopped,
    and it does not outlive the call, whose end closes its standard input."""
    os.set_inheritable(pipe, False)
    faulthandler.dump_traceback_later(max(0.5, where.seconds - 2))
    watch = threading.Thread(target=lambda: (os.read(0, 1), os.killpg(0, signal.SIGKILL)), daemon=True)
    watch.start()
    with open(pipe, "w") as out:
        for found in cases_of(part, where):
            if not where.cuda:
                found["goals"] = {}  # they are a GPU's
            print(json.dumps(found, default=str), file=out, flush=True)
    faulthandler.cancel_dump_traceback_later()


# ---- a call ---------------------------------------------------------------------------------------------------------


class Report:
    """What a call has found so far: a JSON file, anew after each case, and the log beside it."""

    def __init__(self, name: str, options: argparse.Namespace, budget: float, parts: list[str]):
        import torch

        from simctg_fast import backend_info

        self.cuda = options.device == "cuda"
        card = torch.cuda.get_device_name() if self.cuda else "cpu"
        stem = "-".join([re.sub(r"[^A-Za-z0-9]+", "-", card).strip("-"), datetime.date.today().isoformat(), name])
        folder = Path(os.environ.get("OUT") or RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while (path := folder / f"{stem}{f'-{number}' * (number > 1)}.json").exists():
            number += 1
        self.path, self.log = path, path.with_suffix(".log").open("ab", buffering=0)
        self.found: dict[str, Any] = {"call": name, "card": card, "device": options.device, "tiny": options.tiny}
        self.found |= {"began": datetime.datetime.now().isoformat(timespec="seconds"), "budget_s": budget}
        self.found |= {"ended": False, "environment": backend_info()}
        self.parts = {part: {"state": "not begun", "seconds": 0.0, "cases": []} for part in parts}
        self.write()

    def write(self) -> None:
        text = json.dumps(self.found | {"parts": self.parts}, indent=1) + "\n"
        beside = self.path.with_suffix(".json.part")
        beside.write_text(text)
        beside.replace(self.path)

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(f"{text}\n".encode())

    def state(self, part: str, text: str, **more: Any) -> None:
        self.parts[part] |= {"state": text, **more}
        self.write()
        if text != "running":
            count = len(self.parts[part]["cases"])
            self.say(f"{part}: {text}, {count} cases, {self.parts[part]['seconds']} s")

    def add(self, part: str, found: Case) -> None:
        self.parts[part]["cases"].append(found)
        self.write()
        goals = f"; {'; '.join(missed(found))}" if missed(found) else ""
        self.say(f"  {'ok  ' if found['passed'] else 'FAIL'} {part}: {found['case']}: {found['figures']}{goals}")

    def red(self, part: str) -> bool:
        """Whether this part, or one of its dtypes, has not ended well in this call."""
        mine = [x for name, x in self.parts.items() if name.split()[0] == part]
        return any(x["state"] != "ended" or not all(c["passed"] for c in x["cases"]) for x in mine)

    def end(self) -> int:
        """Says what is wrong, once more and last; returns how many parts did not end well."""
        self.found["ended"] = True
        self.write()
        self.say("")
        for part, found in self.parts.items():
            bad = [c["case"] for c in found["cases"] if not c["passed"]]
            self.say(f"{part:18} {found['state']}, {len(found['cases'])} cases, {len(bad)} failed")
            for name in bad[:20]:
                self.say(f"{'':18} FAIL {name}")
        self.say(str(self.path))
        return sum(self.red(part) for part in self.parts)


class Child:
    """A part's process, which leads a group of its own."""

    def __init__(self, name: str, report: Report, options: argparse.Namespace, limit: float, threads: int):
        self.name, self.report, self.limit, self.began = name, report, limit, time.monotonic()
        self.pipe, theirs = os.pipe()
        part, _, dtype = name.partition(" ")
        command = [sys.executable, __file__, part, "--device", options.device, "--budget", f"{limit:.1f}"]
        command += ["--pipe", str(theirs), *(["--dtype", dtype] if dtype else []), *["--tiny"] * options.tiny]
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=report.log, stderr=subprocess.STDOUT, pass_fds=[theirs],
            env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        os.set_blocking(self.pipe, False)
        self.text = b""
        report.state(name, "running", limit_s=round(limit, 1))

    def read(self) -> bool:
        """Take over the cases that are there; False at the end of the pipe."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.pipe, 1 << 16):
                *lines, self.text = (self.text + data).split(b"\n")
                for line in lines:
                    self.report.add(self.name, json.loads(line))
            return False
        return True

    def late(self) -> bool:
        return time.monotonic() - self.began > self.limit

    def end(self, why: str = "") -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        self.read()
        os.close(self.pipe)
        self.process.stdin.close()
        if not why and code:
            why = f"died of {signal.Signals(-code).name}" if code < 0 else f"died with exit code {code}"
        self.report.state(self.name, why or "ended", seconds=round(time.monotonic() - self.began, 1))


def run_stage(children: list[Child]) -> None:
    """Until all have ended or are out of time."""
    running = list(children)
    try:
        with selectors.DefaultSelector() as selector:
            for child in running:
                selector.register(child.pipe, selectors.EVENT_READ, child)
            while running:
                for key, _ in selector.select(timeout=0.2):
                    if not key.data.read():
                        selector.unregister(key.fd)
                for child in list(running):
                    done = child.process.poll() is not None
                    if done or child.late():
                        if child.pipe in selector.get_map():
                            selector.unregister(child.pipe)
                        running.remove(child)
                        child.end("" if done else f"stopped after {child.limit:.0f} s")
    finally:
        for child in running:
            child.end("interrupted")


def processes(part: str, options: argparse.Namespace) -> list[str]:
    return [f"{part} {d}" for d in DTYPES[: 1 if options.tiny else None]] if PARTS[part].cut else [part]


def expected(stages: list[list[str]]) -> int:
    return sum(max(PARTS[part].seconds for part in stage) for stage in stages)


def run_call(name: str, stages: list[list[str]], budget: float, options: argparse.Namespace) -> int:
    began = time.monotonic()
    report = Report(name, options, budget, [x for stage in stages for part in stage for x in processes(part, options)])
    report.say(f"{report.found['card']}, {budget:.0f} s, {json.dumps(report.found['environment'])}")
    for number, stage in enumerate(stages):
        left = budget - (time.monotonic() - began)
        children, names = [], []
        for part in stage:
            seconds, red = PARTS[part].seconds, [need for need in PARTS[part].needs if report.red(need)]
            for process in processes(part, options):
                if red and not options.anyway:
                    report.state(process, f"left out: {' and '.join(red)} failed")
                elif left < seconds / (40 if options.tiny else 4):
                    report.state(process, f"left out: {max(0, left):.0f} s were left, about {seconds} are needed")
                else:
                    # Its own share, and a quarter more than it should need: what comes later matters less.
                    share = max(1.25 * seconds, left * seconds / expected(stages[number:]))
                    names.append((process, left if options.tiny else min(left, share)))
        threads = 1 if options.tiny else max(1, (os.cpu_count() or 1) // max(1, len(names)))
        try:
            for process, limit in names:
                children.append(Child(process, report, options, limit, threads))
        finally:
            run_stage(children)
    return report.end()


# ---- the plan -------------------------------------------------------------------------------------------------------


def plan() -> int:
    """The calls as command lines; 1 if they do not fit."""
    print("Before, with network: make oracle-wheels   (carry .oracle-wheels, 15 MB: git ignores it)\n")
    total = goes_over = 0
    for name, (budget, stages) in CALLS.items():
        command = f"python3 benchmarks/gpu.py {name} --budget {budget}"
        print(f"{command}\n  start {START_SECONDS} s, expected {expected(stages)} s of {budget}:")
        for stage in stages:
            for part in stage:
                print(f"    {PARTS[part].seconds:4} s  {part:13} {PARTS[part].basis}")
        goes_over |= expected(stages) > budget or budget > COMMAND_SECONDS or len(command) >= COMMAND_LETTERS
        total += START_SECONDS + budget
    print(f"\nIn all {total} s at most, {LEASE_SECONDS} allowed; to repeat a part: python3 benchmarks/gpu.py PART ...")
    return int(goes_over or total > LEASE_SECONDS)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="CALL|PART", help=f"of {', '.join([*CALLS, *PARTS])}; all calls")
    parser.add_argument("--budget", type=float, help="seconds for each call; default: the plan's, 570 for parts")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try the checks themselves")
    parser.add_argument("--tiny", action="store_true", help="one small case of each kind: does it run?")
    parser.add_argument("--anyway", action="store_true", help="take times although correctness has failed")
    parser.add_argument("--look", action="store_true", help="only say whether the device is there")
    parser.add_argument("--plan", action="store_true", help="print the calls, and the seconds they are to take")
    parser.add_argument("--page", nargs="*", metavar="JSON", help="write docs/gpu.md from results")
    parser.add_argument("--pipe", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in PARTS and name not in CALLS:
            parser.error(f"{name!r} is no call and no part, must be one of {', '.join([*CALLS, *PARTS])}")
    if options.plan:
        return plan()
    if options.page is not None:
        from gpu_page import write_page

        return write_page([Path(name) for name in options.page])
    if options.pipe is not None:
        where = Where(options.device, options.tiny, options.dtype, options.budget)
        run_part(options.names[0], where, options.pipe)
        return 0
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"no CUDA device here (torch {torch.__version__}, CUDA {torch.version.cuda}): nothing was checked")
        return 1
    if options.look:
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the parts as well
    calls = [(f"call{name}", *CALLS[name]) for name in options.names or CALLS if name in CALLS]
    if parts := [name for name in options.names if name in PARTS]:
        calls.append(("-".join(parts), 570, [[part] for part in parts]))
    wrong = sum(run_call(name, stages, options.budget or budget, options) for name, budget, stages in calls)
    print(f"\n{wrong} parts did not end well" if wrong else "\nall passed")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
