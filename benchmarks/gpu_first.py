"""The first part of `gpu.py`: tiny models give the CPU's tokens on the device, captured and not, call after call."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from decoding_models import PAD, build, inputs_for, left_padded
from gpu_case import Case, Piece, Where, case
from near_ties import compare, model_judge, same_tokens

NEW_TOKENS = 96
MODELS = ("gpt2", "llama", "mistral", "gemma2")


@contextlib.contextmanager
def watched() -> Iterator[list[tuple[str | None, bool]]]:
    """Of every `DecodeStep` that runs meanwhile: why it is not captured, and whether it has had a graph."""
    from simctg_fast.decoding.decode_step import DecodeStep

    seen: list[tuple[str | None, bool]] = []
    places: weakref.WeakKeyDictionary[DecodeStep, int] = weakref.WeakKeyDictionary()
    original = DecodeStep.__call__

    def call(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        place = places.setdefault(self, len(seen))
        had = place < len(seen) and seen[place][1]  # buffers that move near the end are not worth another capture
        seen[place : place + 1] = [(self.graph.reason, had or self.graph.recorded is not None)]
        return result

    DecodeStep.__call__ = call  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        DecodeStep.__call__ = original  # type: ignore[method-assign]


def uncaptured(where: Where, seen: list[tuple[str | None, bool]]) -> str:
    """What is wrong with the steps that were watched, or nothing."""
    if not seen:
        return "no step over static buffers was made"
    reasons = sorted({str(reason) for reason, graph in seen if not graph})
    return f"not captured: {'; '.join(reasons)}" if reasons and where.cuda else ""


def search(where: Where, model, inputs: dict, step: bool | str) -> torch.Tensor:
    from simctg_fast import ContrastiveSearch

    inputs = {name: x.to(model.device) for name, x in inputs.items()}
    tokens = 12 if where.tiny else NEW_TOKENS
    options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": PAD}
    return model.generate(**inputs, custom_generate=ContrastiveSearch(0.6, 4, decode_step=step), **options).cpu()


def check_model(where: Where, name: str) -> Iterator[Case]:
    """Padded rows: the step over static buffers, the plain loop and the CPU; then calls in a row, and another size."""
    here, inputs = build(name), left_padded(4, 7, 2)
    there = build(name).to(where.device)
    with watched() as seen:
        ours = search(where, there, inputs, True)
    plain, expected = search(where, there, inputs, False), search(where, here, inputs, False)
    ties = same_tokens(ours, plain, here, inputs, what="captured and uncaptured")
    ties += same_tokens(plain, expected, here, inputs, what="the device and the CPU")
    problem = uncaptured(where, seen)
    yield case(f"{name}: captured = uncaptured = CPU", not problem, problem or f"{ties} near ties")

    held, same = [], True
    gc.collect()
    gc.disable()  # what only a collection would free counts as a leak
    try:
        for _ in range(3):
            same &= torch.equal(search(where, there, inputs, True), ours)
            held.append(torch.cuda.memory_allocated() if where.cuda else 0)
    finally:
        gc.enable()
    figures = f"bytes held after each: {', '.join(map(str, held))}{'' if same else '; other tokens'}"
    yield case(f"{name}: three calls in a row", same and len(set(held)) == 1, figures)

    other = left_padded(11, 3, 8, 5, 9)
    with watched() as seen:
        ours = search(where, there, other, True)
    ties = same_tokens(ours, search(where, there, other, False), here, other)
    problem = uncaptured(where, seen)
    yield case(f"{name}: a second capture, of five rows", not problem, problem or f"{ties} near ties")


def check_t5(where: Where) -> Iterator[Case]:
    """Encoder-decoders run step by step."""
    here = build("t5")
    inputs = inputs_for(here, 3)
    ours = search(where, build("t5").to(where.device), inputs, "auto")
    ties = same_tokens(ours, search(where, here, inputs, "auto"), here, inputs)
    yield case("t5: the device = CPU", True, f"{ties} near ties")


def check_threads(where: Where) -> Iterator[Case]:
    """Two threads, each with a model of its own, decode and capture at a time."""
    names, inputs = MODELS[:2], left_padded(4, 7, 2)
    models = [build(name).to(where.device) for name in names]
    expected = [search(where, model, inputs, False) for model in models]
    found: dict[int, Any] = {}
    start = threading.Barrier(2)

    def run(index: int) -> None:
        try:
            start.wait(30)
            found[index] = [search(where, models[index], inputs, True) for _ in range(3)]
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(2)]
    with watched() as seen:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=min(60, where.left()))
    problems = [uncaptured(where, seen)] if len(found) == 2 else ["a thread hangs"]
    problems += [f"{type(x).__name__}: {x}" for x in found.values() if isinstance(x, Exception)]
    ties = 0
    for index, outs in found.items():
        for out in [] if isinstance(outs, Exception) else outs:
            ties += same_tokens(out, expected[index], models[index], inputs, what=names[index])
    problem = "; ".join(filter(None, problems))
    yield case("two threads, each with a model", not problem, problem or f"three calls each, {ties} near ties")


def check_engine(where: Where) -> Iterator[Case]:
    """Slots on the device and on the CPU."""
    from throughput import Ids

    from simctg_fast import Engine

    here, there = build("gpt2"), build("gpt2").to(where.device)
    prompts = [left_padded(length, seed=length)["input_ids"][0].tolist() for length in (9, 4, 17, 6, 2)]
    lines = [
        {"id": index, "prompt": " ".join(map(str, ids)), "max_new_tokens": 20 + 5 * index}
        for index, ids in enumerate(prompts)
    ]
    for strategy, parameters in (("contrastive", {"penalty_alpha": 0.6, "top_k": 4}), ("greedy", {})):
        rows = []
        for model in (there, here):
            results = Engine(model, Ids(), strategy=strategy, slots=3, batching="slots", **parameters).generate(lines)
            answers = {result.id: result.token_ids for result in results}
            rows.append([ids + answers[index] for index, ids in enumerate(prompts)])
        judge = model_judge(here, {}, 0.6, 4 if strategy == "contrastive" else 1)
        yield case(f"engine, {strategy}: the device = CPU", True, f"{compare(*rows, judge)} near ties")


PIECES: list[Piece] = [
    *(functools.partial(check_model, name=name) for name in MODELS),
    check_t5,
    check_threads,
    check_engine,
]
