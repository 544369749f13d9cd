"""What `peers.py` reports: rows of the CSV, the table, and `docs/peers.md`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import ROOT, Row, processor, quantiles
from peer_engines import GREEDY

if TYPE_CHECKING:
    from peers import Contender

PAGE = ROOT / "docs" / "peers.md"
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "bf16")


@dataclass
class PeerRow(Row):
    instruction_set: str = ""
    state: str = ""  # measured, not installed, or why it failed


def instruction_set() -> str:
    """Of the processor, what engines choose their code by; and what ours chose."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = []
    from simctg_fast.ops._backends import backend_info

    return f"{' '.join(name for name in INSTRUCTIONS if name in flags)}; ours {backend_info()['instruction_set']}"


def columns(options: argparse.Namespace) -> list[str]:
    return [*options.cases, *(["requests"] if options.requests else [])]


def rows_of(contenders: list[Contender], options: argparse.Namespace) -> Iterator[PeerRow]:
    names = ("new_tokens", "repeats", "threads", "requests", "request", "slots", "sizes")
    config = {name: getattr(options, name) for name in names}
    instructions = instruction_set()
    for contender in contenders:
        for case in columns(options):
            values = contender.figures.get(case, []) if contender.figure(case) is not None else []
            low, middle, high = quantiles(values) if values else (math.nan,) * 3
            yield PeerRow(
                kernel="peers",
                provider=contender.variant.label,
                mode="throughput" if case == "requests" else "decode",
                metric="tokens_per_second" if case == "requests" else "ms_per_step",
                x_name="requests" if case == "requests" else "batch x prompt",
                x_value=str(options.requests) if case == "requests" else case,
                p20=low,
                p50=middle,
                p80=high,
                config=json.dumps(config | {"model": contender.model, "size": contender.size}),
                gpu=processor(),
                version=json.dumps(contender.variant.versions()),
                instruction_set=instructions,
                state="measured" if values else contender.wrong.get(case) or contender.state or "too short to time",
            )


def table(contenders: list[Contender], options: argparse.Namespace) -> str:
    heads = ["shape", "engine", "weights"]
    heads += [f"{case}, ms a step" for case in options.cases]
    heads += [f"{options.requests} requests, tokens/s (at a time)"] if options.requests else []
    heads += ["tokens as float32's", ""]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for contender in contenders:
        cells = [contender.model, contender.variant.name, contender.variant.weights]
        for case in columns(options):
            value = contender.figure(case)
            text = "–" if value is None else f"{value:.0f} ({contender.size})" if "x" not in case else f"{value:.1f}"
            cells.append(text)
        alike = contender.alike
        cells += [f"{sum(alike) / len(alike):.0%}" if alike else ""]
        cells += [contender.note()]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def verdicts(contenders: list[Contender], options: argparse.Namespace) -> list[str]:
    """By shape, case and weights, and whatever the weights: our greedy search against the best of the others."""
    lines = []
    for model in options.models:
        for case in columns(options):
            for weights in ("float32", "bfloat16", "int8", "any weights"):
                ours, others = {}, {}
                for contender in contenders:
                    variant, figure = contender.variant, contender.figure(case)
                    if contender.model == model and variant.greedy and figure is not None:
                        side = ours if variant.name == GREEDY[0] else others
                        if weights == "any weights":
                            side[variant.label] = figure
                        elif variant.weights == weights:
                            side[variant.name] = figure
                if ours and others:
                    what = f"{options.requests} requests" if case == "requests" else case
                    lines.append(f"* {model}, {what}, {weights}: {verdict(case, ours, others)}")
    return lines


def verdict(case: str, ours: dict[str, float], others: dict[str, float]) -> str:
    time = "x" in case
    mine, best = ((min if time else max)(side, key=side.get) for side in (ours, others))
    ratio = others[best] / ours[mine] if time else ours[mine] / others[best]
    first, second = (mine, best) if ratio >= 1 else (best, mine)
    return f"{first} is {max(ratio, 1 / ratio):.2f}x as fast as {second}"


def page(contenders: list[Contender], options: argparse.Namespace) -> str:
    versions = {name: text for contender in contenders for name, text in contender.variant.versions().items()}
    prompt, new = options.request
    sizes = ", ".join(map(str, options.sizes))
    only = f" --only {','.join(options.only)}" if options.only else ""
    return f"""# Beside other engines

Decoding on the CPU against engines that were made for it, on random weights of the shapes {", ".join(options.models)}:
`python benchmarks/peers.py --write{only}` writes this page. The others search greedily; contrastive search they do not
have.

{processor()}, {instruction_set()}, {options.threads} threads. {", ".join(f"{n} {v}" for n, v in versions.items())}.

A case is batch x prompt: the time of one step of the whole batch over {options.new_tokens} new tokens without prefill,
the minimum of {options.repeats} rounds that go through all engines in turn. Requests have {prompt} + {new} tokens,
all of them, so batches lose nothing to rows that end early. Ours has {options.slots} slots, others the best of {sizes}
at a time. Each engine's float32 had to write the tokens of transformers' greedy search in float32, near ties excepted,
for its figures to count. *Tokens as float32's* is the share of tokens before the first that differs: with random
weights it says that an engine works, not how well it rounds.

* llama.cpp's batches go through its Python binding, which costs it a little at each step. Its 8 bits are Q8_0.
* OpenVINO keeps its own defaults in bfloat16 and int8: a cache of 8 bits, and with int8 the arithmetic that it thinks
  best.
* ONNX Runtime's builder and CTranslate2 know some shapes and types only: the last column says what they answered.

{table(contenders, options)}

## Our greedy search and the best of the others

{chr(10).join(verdicts(contenders, options)) or "Nothing to compare."}
"""
