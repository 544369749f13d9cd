"""Correctness and speed of the operators on a CUDA device, part by part.

    python benchmarks/gpu.py [PART ...] [--device cuda]

Each part ends well inside ten minutes, prints a line a case and a short table last, and writes what it found to
``<gpu>-<date>-<part>.json`` and ``.csv`` in benchmarks/results, or in $OUT where that is set. Of several parts each
runs in a process of its own, and is stopped in time: what breaks one does not reach the others. A part is made of
pieces; a piece that raises is a failed case, and the others go on. Every case of correctness
draws fresh inputs, computes the truth in float64 from the inputs as the device sees them, and compares; the bound of a
floating-point case is a small multiple of the error that the plain formula makes in the same dtype on the same device.
Ends with status 1 if a case fails or if the device is not there.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_decode
from common import RESULTS, device_name
from gpu_crf import check_crf, check_crf_speed
from gpu_generate import measure_models
from gpu_losses import check_losses, measure_losses

from simctg_fast import backend_info, viterbi_backtrace
from simctg_fast.ops.candidate_select import candidate_scan
from simctg_fast.ops.shared_prefix_attention import shared_prefix_attention
from simctg_fast.reference.contrastive_search import degeneration_penalty
from simctg_fast.reference.viterbi import viterbi_backtrace as viterbi_reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TESTS = Path(__file__).resolve().parent.parent / "tests"

# A case: what it is, whether it passed, and the figures that show it; some add the same as numbers.
Case = tuple[str, bool, str] | tuple[str, bool, str, dict]


def within(result: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, factor: float = 2.0) -> tuple[bool, str]:
    """Whether the largest error is at most `factor` times the plain formula's, plus a few roundings of the dtype."""
    error = (result.double().cpu() - truth).abs().max().item()
    allowed = factor * (plain.double().cpu() - truth).abs().max().item()
    allowed += 4 * torch.finfo(plain.dtype).eps * truth.abs().max().item()
    return error <= allowed, f"error {error:.1e}, allowed {allowed:.1e}"  # NaN compares false


def check_candidate_scan(device: str) -> Iterator[Case]:
    for dtype, (batch, k, length, width), masked in itertools.product(
        FLOATS, [(1, 4, 1, 64), (3, 5, 129, 768), (8, 8, 1000, 1024)], (False, True)
    ):
        states = torch.randn(batch, k, width, device=device).to(dtype)
        history = torch.nn.functional.normalize(torch.randn(batch, length + 7, width, device=device), dim=-1).to(dtype)
        mask = None
        if masked:
            mask = torch.rand(batch, length + 7, device=device) > 0.3
            mask[:, 0] = True
        wide = history[:, :length].double().cpu().repeat_interleave(k, dim=0)
        real = None if mask is None else mask[:, :length].cpu().repeat_interleave(k, dim=0)
        truth = degeneration_penalty(wide, states.flatten(0, 1).double().cpu(), real).view(batch, k)
        cosine = torch.nn.functional.normalize(states.float(), dim=-1).to(dtype) @ history[:, :length].mT
        if mask is not None:
            cosine = cosine.masked_fill(~mask[:, None, :length], float("-inf"))
        penalty, position = candidate_scan(states, history, length, mask)
        passed, figures = within(penalty, cosine.amax(-1), truth)
        if mask is not None:
            passed = passed and bool(mask.gather(1, position).all())
        name = f"{dtype} batch {batch} k {k} length {length} width {width}{' masked' * masked}"
        yield name, passed and penalty.device.type == device, figures


def check_shared_prefix_attention(device: str) -> Iterator[Case]:
    shapes = [(1, 4, 12, 12, 64, 33), (3, 5, 8, 2, 80, 257), (2, 4, 16, 1, 128, 1000)]
    for dtype, shape, extra in itertools.product(FLOATS, shapes, ("", "mask", "softcap", "sinks", "window")):
        batch, k, heads, kv_heads, dim, length = shape

        def draw(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(*size, device=device).to(dtype)

        query = draw(batch * k, heads, 1, dim)
        key, value = draw(batch, kv_heads, length + 5, dim), draw(batch, kv_heads, length + 5, dim)
        own = {"new_key": draw(batch * k, kv_heads, 1, dim), "new_value": draw(batch * k, kv_heads, 1, dim)}
        options: dict[str, object] = {"scaling": dim**-0.5}
        if extra == "mask":
            options["mask"] = torch.rand(batch, 1, 1, length + 1, device=device) > 0.3
            options["mask"][..., -1] = True
        elif extra == "softcap":
            options["softcap"] = 1.5
        elif extra == "sinks":
            options["sinks"] = draw(heads)
        elif extra == "window":
            options["window_start"] = length // 2
        arguments = (query, key, value, length)
        result = shared_prefix_attention(*arguments, **own, **options)
        truth = attention(*(to_double(x) for x in arguments), **{n: to_double(x) for n, x in (own | options).items()})
        passed, figures = within(result, attention(*arguments, **own, **options), truth)
        name = f"{dtype} batch {batch} k {k} heads {heads}/{kv_heads} dim {dim} length {length} {extra}"
        yield name.rstrip(), passed and result.device.type == device and result.dtype == dtype, figures


def to_double(x):
    if not isinstance(x, torch.Tensor):
        return x
    return x.cpu() if x.dtype == torch.bool else x.double().cpu()


def attention(
    query, key, value, length, *, new_key, new_value, scaling, mask=None, softcap=None, sinks=None, window_start=0
):
    """The formula with one full copy of keys and values for every candidate; in the dtype of its arguments."""
    k, groups = query.shape[0] // key.shape[0], query.shape[1] // key.shape[1]
    key = torch.cat([key[:, :, :length].repeat_interleave(k, 0), new_key], dim=2).repeat_interleave(groups, 1)
    value = torch.cat([value[:, :, :length].repeat_interleave(k, 0), new_value], dim=2).repeat_interleave(groups, 1)
    scores = query @ key.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask.repeat_interleave(k, 0), float("-inf"))
    scores[..., :window_start] = float("-inf")
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(scores.shape[0], -1, -1, -1)], dim=-1)
    probs = torch.softmax(scores, dim=-1)[..., : length + 1]
    return (probs @ value).transpose(1, 2)


def check_viterbi_backtrace(device: str) -> Iterator[Case]:
    for dtype, (batch, length, slots), ragged in itertools.product(
        (torch.uint8, torch.uint16, torch.int32, torch.int64), [(1, 1, 1), (33, 65, 64), (128, 200, 256)], (False, True)
    ):
        backpointers = torch.randint(0, slots, (batch, length, slots), device=device).to(dtype)
        last = torch.randint(0, slots, (batch,), device=device)
        lengths = torch.randint(0, length + 1, (batch,), device=device) if ragged else None
        path = viterbi_backtrace(backpointers, last, lengths)
        expected = viterbi_reference(backpointers.cpu(), last.cpu(), None if lengths is None else lengths.cpu())
        different = int((path.cpu() != expected).sum())
        name = f"{dtype} batch {batch} length {length} slots {slots}{' ragged' * ragged}"
        yield name, different == 0 and path.device.type == device, f"{different} slots differ"


def check_tests(device: str) -> Iterator[Case]:
    """The tests marked `gpu`. Options of plugins that need not be there are left out, and files without such tests."""
    files = [str(path) for path in sorted(TESTS.glob("test_*.py")) if "mark.gpu" in path.read_text()]
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = result.stdout.strip().splitlines() or ["no output"]
    if result.returncode:
        print(result.stdout)
    yield "pytest -m gpu", result.returncode == 0 and "passed" in lines[-1], lines[-1]


Piece = Callable[[str], Iterator[Case]]


def against_float64(*checks: Callable[..., Iterator[Case]]) -> list[Piece]:
    return [lambda device, check=check: check(device, within) for check in checks]


# The most telling first.
PARTS: dict[str, list[Piece]] = {
    "decode": [
        *against_float64(gpu_decode.check_select, gpu_decode.check_attention_rows),
        check_candidate_scan,
        check_shared_prefix_attention,
        gpu_decode.check_commit,
        gpu_decode.check_top_k,
    ],
    "decode_speed": [
        gpu_decode.measure_ceilings,
        *(lambda device, kernel=kernel: gpu_decode.measure_kernel(device, kernel) for kernel in gpu_decode.MEASURED),
    ],
    "gpt2": [lambda device: measure_models(device, "gpt2", gpu_decode.copy_bandwidth)],
    "llama": [lambda device: measure_models(device, "llama", gpu_decode.copy_bandwidth)],
    "losses": [check_losses],
    "losses_speed": [measure_losses],
    "crf": [check_viterbi_backtrace, *against_float64(check_crf)],
    "crf_speed": [check_crf_speed],
    "tests": [check_tests],
    "offsets": [gpu_decode.check_offsets],
    "memcheck": [gpu_decode.check_sanitizer],
}
PART_SECONDS = 570  # then a part that runs in a process of its own is stopped


def cases_of(piece: Piece, device: str) -> Iterator[Case]:
    """What the piece yields; an exception is a failed case, and its last."""
    try:
        yield from piece(device)
    except Exception as error:
        traceback.print_exc()
        yield f"{getattr(piece, '__name__', 'piece')} raised", False, f"{type(error).__name__}: {error}".splitlines()[0]


def table(cases: list[Case]) -> Iterator[str]:
    """What was measured: milliseconds, share of the floor's rate, and the goal for it."""
    measured = [(case, more[0]) for case, _, _, *more in cases if more and "share_of_floor" in more[0]]
    if measured:
        yield f"  {'':58} {'ms':>9} {'of floor':>9} {'goal':>6}"
    for name, numbers in measured:
        goal = numbers["goals"].get("floor")
        wanted = "-" if goal is None else f"{goal:.0%}"
        yield f"  {name[:58]:58} {numbers['ms']:9.3f} {numbers['share_of_floor']:9.0%} {wanted:>6}"


def run_part(part: str, device: str) -> int:
    """Run a part; returns how many of its cases failed. The files are written after each piece."""
    torch.manual_seed(0)
    print(f"\n{part}")
    start, cases = time.monotonic(), []
    for piece in PARTS[part]:
        for case in cases_of(piece, device):
            cases.append(case)
            print(f"  {'ok  ' if case[1] else 'FAIL'} {case[0]}: {case[2]}", flush=True)
        seconds = time.monotonic() - start
        path = write_results(part, device, seconds, cases)
    for line in table(cases):
        print(line)
    failed = sum(not case[1] for case in cases)
    print(f"  {len(cases)} cases, {failed} failed, {seconds:.0f} s, {path}", flush=True)
    return failed


def run_apart(part: str, device: str) -> int:
    """Run a part in a process of its own; returns 0 if all of it passed."""
    command = [sys.executable, __file__, part, "--device", device, "--quiet"]
    try:
        return int(subprocess.run(command, timeout=PART_SECONDS).returncode != 0)
    except subprocess.TimeoutExpired:
        print(f"  FAIL {part}: stopped after {PART_SECONDS} s; the pieces that ended are in its files", flush=True)
        return 1


def write_results(part: str, device: str, seconds: float, cases: list[tuple]) -> Path:
    """One JSON file a part, and the same cases as CSV."""
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9]+", "-", device_name() if device == "cuda" else "cpu").strip("-")
    path = folder / f"{name}-{datetime.date.today().isoformat()}-{part}.json"
    found = [
        {"case": case, "passed": bool(passed), "figures": figures, **(more[0] if more else {})}
        for case, passed, figures, *more in cases
    ]
    info = {"part": part, "device": device, "seconds": round(seconds, 1), "environment": backend_info()}
    path.write_text(json.dumps(info | {"cases": found}, indent=1, default=str) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["part", "case", "passed", "figures", "numbers"])
        for case, passed, figures, *more in cases:
            writer.writerow([part, case, bool(passed), figures, json.dumps(more[0] if more else {}, default=str)])
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them by default")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the checks themselves")
    parser.add_argument("--look", action="store_true", help="only say whether the device is there")
    parser.add_argument("--quiet", action="store_true", help="do not begin with the versions")
    options = parser.parse_args()
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"PART is {part!r}, must be one of {', '.join(PARTS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"no CUDA device here (torch {torch.__version__}, CUDA {torch.version.cuda}): nothing was checked")
        return 1
    if options.look:
        return 0
    if not options.quiet:
        for name, value in backend_info().items():
            print(f"{name:16} {value}", flush=True)
    parts = options.parts or list(PARTS)
    run = run_part if len(parts) == 1 else run_apart
    failed = sum(run(part, options.device) > 0 for part in parts)
    if not options.quiet:
        print(f"\nfailed in {failed} of {len(parts)} parts" if failed else "\nall passed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
