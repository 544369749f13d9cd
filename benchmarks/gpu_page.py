"""`docs/gpu.md`, generated from the results of `gpu.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from common import RESULTS
from gpu_case import missed

PAGE = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
INTRO = """# On a GPU

`make gpu CALL=1` (then 2 and 3) checks and measures everything that needs a CUDA device, with the system's own python3
and torch and without network; `python benchmarks/gpu.py --plan` says what each call does and how long it may take. This
page is generated from the results (`python benchmarks/gpu.py --page`), but for its last section.
"""
NOTHING = """
No GPU was at hand: nothing has been measured yet.
"""
WHY = "\n## Why\n"
TITLES = {
    "kernels": "Kernels of the decoding step",
    "gpt2": "Decoding, GPT-2-small shape",
    "llama": "Decoding, Llama-3-8B shape",
    "engine": "Offline generation, milliseconds a token over all requests",
    "losses_speed": "Losses, forward and backward",
    "crf_speed": "CRF",
}


def results(paths: list[Path]) -> dict[str, list[dict]]:
    """Calls on a CUDA device by card, the oldest first. Trials on the CPU are no results."""
    cards: dict[str, list[dict]] = {}
    found = [json.loads(path.read_text()) | {"file": path.name} for path in paths]
    for call in sorted(found, key=lambda call: call.get("began", "")):
        if call.get("device") == "cuda" and not call["tiny"]:
            cards.setdefault(call["card"], []).append(call)
    return cards


def page(paths: list[Path], why: str = "") -> str:
    lines, cards = [INTRO], results(paths)
    for card, calls in cards.items():
        lines += card_lines(card, calls)
    return "\n".join(lines) + (WHY + why if cards else NOTHING)


def card_lines(card: str, calls: list[dict]) -> Iterator[str]:
    parts = {name: part for call in calls for name, part in call["parts"].items()}  # of a repeated part the last
    environment = calls[-1]["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "cuda", "triton", "transformers"))
    files = ", ".join(f"[{call['began'][:10]}](results/{call['file']})" for call in calls)
    yield f"## {card}\n\n{versions}; {files}."
    for found in parts.get("kernels", {}).get("cases", []):
        if "copy_bytes_per_s" in found:
            yield f"Measured ceilings: {found['figures']}. Floors are bytes over this copy."
    yield "\n| part | state | cases | failed |\n|---|---|---|---|"
    for name, part in parts.items():
        bad = sum(not found["passed"] for found in part["cases"])
        yield f"| {name} | {part['state']} | {len(part['cases'])} | {bad} |"
    for name, title in TITLES.items():
        timed = [found for found in parts.get(name, {}).get("cases", []) if found["passed"] and "ms" in found]
        if timed:
            yield f"\n### {title}\n\n| | ms | of the floor's rate | ours faster by | whole call | by |"
            yield "|---|---|---|---|---|---|"
            yield from map(row, timed)
    short = [text for name, part in parts.items() for text in fell_short(name, part)]
    yield "\n### What fell short\n"
    yield from short or ["Nothing."]


def row(found: dict) -> str:
    ms, floor, call = found["ms"], found["floor_ms"], found["call_ms"]
    others = [x if isinstance(x, str) else f"{x / ms:.2f}x {peer}" for peer, x in found["others"].items()]
    calls = [f"{x / call:.2f}x {peer}" for peer, x in found["calls"].items()]
    cells = [found["case"], f"{ms:.3f}", "" if floor is None else f"{floor / ms:.0%}", ", ".join(others)]
    cells += ["" if call is None else f"{call:.0f} ms", ", ".join(calls)]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def fell_short(name: str, part: dict) -> Iterator[str]:
    if part["state"] != "ended":
        yield f"* {name}: {part['state']}"
    for found in part["cases"]:
        if not found["passed"]:
            yield f"* {name}: **failed**: {found['case']}: {found['figures']}"
        for text in missed(found):
            yield f"* {found['case']}: {text}"


def write_page(paths: list[Path]) -> int:
    """From these results, or from all that are there."""
    before = PAGE.read_text() if PAGE.exists() else ""
    PAGE.write_text(page(paths or sorted(RESULTS.glob("*.json")), before.partition(WHY)[2]))
    print(PAGE)
    return 0
