"""Whole decoding runs in `gpu.py`: time a token beside the bandwidth floor, our greedy search, and transformers 4.55.4.

python benchmarks/gpu_generate.py JSON       # one measurement in an environment with transformers 4.55.4
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
ORACLE = ROOT / ".oracle-wheels"
NEW_TOKENS = (17, 81)  # the time of a token is the difference
ORACLE_SECONDS = 120


@dataclass(frozen=True)
class Run:
    """What is measured, and goals: over 4.55.4's contrastive search (also with the decoder compiled), share of the
    floor's rate, over our greedy search."""

    shape: str
    dtype: str
    batch: int
    prompt: int
    goals: dict[str, float] = field(default_factory=dict)
    compiled_goals: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype} B={self.batch} prompt {self.prompt} k=4"


_LLAMA = [
    Run("llama-8b", "bfloat16", batch, 1024, {"oracle": 7, "greedy": greedy}, {"oracle": 7, "floor": floor})
    for batch, floor, greedy in ((1, 0.76, 1.06), (8, 0.75, 1.08), (32, 0.68, 1.2))
]
RUNS = {
    "gpt2": [
        Run("gpt2-small", "bfloat16", 1, 512, {"oracle": 14}, {"oracle": 22}),
        Run("gpt2-small", "bfloat16", 32, 512, {"oracle": 11}, {"oracle": 16}),
    ],
    "llama": _LLAMA,
}
# The same on a device that is there to try this file only.
TRIALS = {"gpt2": [Run("gpt2-tiny", "float32", 2, 12)], "llama": [Run("llama-tiny", "float32", 2, 12)]}


def make_model(shape: str, dtype: str, device: str):
    """A random model; runs under transformers 4.55.4 as well."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    common = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.1}
    config: Any
    if shape.startswith("llama"):
        sizes = (500, 64, 96, 2, 4, 2) if shape == "llama-tiny" else (128_256, 4096, 14_336, 32, 32, 8)
        names = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads",
        )  # fmt: skip
        common["initializer_range"] = 0.1 if shape == "llama-tiny" else 0.02
        config = LlamaConfig(
            **dict(zip(names, sizes, strict=True)), max_position_embeddings=8192, tie_word_embeddings=False, **common
        )
        kind = LlamaForCausalLM
    else:
        small = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 500} if shape == "gpt2-tiny" else {}
        config, kind = GPT2Config(n_positions=1024, **small, **common), GPT2LMHeadModel
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


def token_time(model, ids: torch.Tensor, rounds: int, **options: Any) -> tuple[float, torch.Tensor, float]:
    """Milliseconds a new token (the fastest of some rounds), the ids, and the peak of memory beyond what was held."""
    cuda = ids.device.type == "cuda"
    best = dict.fromkeys(NEW_TOKENS, float("inf"))
    out, peak = ids, 0.0
    for _ in range(rounds):
        for tokens in NEW_TOKENS:
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            start = time.perf_counter()
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
                **{n: make() if callable(make) else make for n, make in options.items()},
            )  # fmt: skip
            if cuda:
                torch.cuda.synchronize()
                peak = (torch.cuda.max_memory_allocated() - held) / 1e6
            best[tokens] = min(best[tokens], 1e3 * (time.perf_counter() - start))
    return (best[NEW_TOKENS[1]] - best[NEW_TOKENS[0]]) / (NEW_TOKENS[1] - NEW_TOKENS[0]), out, peak


@contextlib.contextmanager
def watched() -> Iterator[list]:
    """The `DecodeStep` of every run meanwhile, by what it says of itself: (not_captured, not_compiled)."""
    from simctg_fast.decoding.decode_step import DecodeStep

    seen: list[tuple[str | None, str | None]] = []
    step = DecodeStep.__call__

    def call(self):
        step(self)
        seen[-1:] = [(self.not_captured, self.not_compiled)]

    begin = DecodeStep.begin
    DecodeStep.begin = lambda self, *args: (seen.append((None, None)), begin(self, *args))[1]  # type: ignore
    DecodeStep.__call__ = call  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        DecodeStep.begin, DecodeStep.__call__ = begin, step  # type: ignore[method-assign]


def measure_models(device: str, part: str, copy: Callable[[], float], rounds: int = 2) -> Iterator[tuple]:
    """Tokens a second of contrastive search, its share of the bandwidth floor, and its ratios; a row for the step as it
    is, and one for the step with its decoder compiled. ``copy`` measures the bandwidth, bytes a second."""
    logging.basicConfig(format="  %(message)s")  # a run that is not captured says why
    logging.getLogger("simctg_fast").setLevel(logging.INFO)
    runs = (RUNS if device == "cuda" else TRIALS)[part]
    bandwidth = copy() if device == "cuda" else None
    model = make_model(runs[0].shape, runs[0].dtype, device)
    for run in runs:
        yield from _measure(model, run, bandwidth, rounds)


def _measure(model, run: Run, bandwidth: float | None, rounds: int) -> Iterator[tuple]:
    from simctg_fast import ContrastiveSearch

    ids = torch.randint(1, model.config.vocab_size, (run.batch, run.prompt), device=model.device)

    def search(k: int, step: bool | str) -> tuple[float, torch.Tensor, float]:
        return token_time(model, ids, rounds, custom_generate=lambda: ContrastiveSearch(0.6, k, decode_step=step))

    uncaptured, theirs = search(4, False), token_time(model, ids, rounds)
    with watched() as steps:
        ours, greedy = search(4, True), search(1, True)
    reasons = {captured for captured, _ in steps}
    passed, same = _agree(run, ours[1], uncaptured[1])
    if bandwidth is None:
        yield str(run), passed, f"{same}; not timed on {model.device}", {}
    else:
        oracle = _oracle(run)
        greedy_over = ours[0] / greedy[0]
        text = f"{greedy_over:.2f} of our greedy, {uncaptured[0] / ours[0]:.2f}x uncaptured, {same}; "
        text += f"peak {ours[2]:.0f} MB, greedy {greedy[2]:.0f}, history {_history(model, run) / 1e6:.0f}"
        numbers = {
            "greedy_ms": greedy[0], "uncaptured_ms": uncaptured[0], "transformers_greedy_ms": theirs[0],
            "over_greedy": greedy_over, "peak_mb": ours[2], "greedy_peak_mb": greedy[2],
        }  # fmt: skip
        if reasons != {None}:
            passed, text = False, f"not captured: {'; '.join(map(str, reasons - {None}))}; {text}"
        yield _row(model, run, str(run), passed, ours[0], bandwidth, oracle, run.goals, text, numbers)
    yield from _measure_compiled(model, run, bandwidth, search, uncaptured, ours, None if bandwidth is None else oracle)


def _measure_compiled(model, run: Run, bandwidth, search, uncaptured, ours, oracle) -> Iterator[tuple]:
    """The fastest of some rounds, the first of which compiles: what that took is said beside."""
    name, start = f"{run}, decoder compiled", time.perf_counter()
    try:
        with watched() as steps:
            compiled = search(4, "compiled")
    except ValueError as error:
        yield name, False, str(error), {"seconds": time.perf_counter() - start}
        return
    passed, same = _agree(run, compiled[1], uncaptured[1])
    if bandwidth is None:
        yield name, passed, f"{same}; not timed on {model.device}", {}
        return
    seconds = time.perf_counter() - start
    text = f"{ours[0] / compiled[0]:.2f}x not compiled, {same}; compiling and {len(steps)} runs {seconds:.0f} s"
    if any(captured is not None for captured, _ in steps):
        passed, text = False, f"not captured: {steps[-1][0]}; {text}"
    numbers = {"not_compiled_ms": ours[0], "peak_mb": compiled[2], "seconds": seconds}
    yield _row(model, run, name, passed, compiled[0], bandwidth, oracle, run.compiled_goals, text, numbers)


def _agree(run: Run, ours: torch.Tensor, plain: torch.Tensor) -> tuple[bool, str]:
    """New tokens beside those of the plain loop. In half precision near ties fall either way, and a sequence goes its
    own way from there on; the step itself was compared with the plain loop's, score by score, before it was used."""
    same = (ours[:, run.prompt :] == plain[:, run.prompt :]).float()
    text = f"{same.mean().item():.0%} of the new tokens as in the plain loop"
    first = same.cumprod(dim=1).sum(dim=1)
    return (
        run.dtype != "float32" or bool((same == 1).all()),
        f"{text}, the first {first.mean().item():.0f} of {same.shape[1]}",
    )


def _history(model, run: Run) -> float:
    return run.batch * (run.prompt + NEW_TOKENS[1]) * model.config.hidden_size * model.dtype.itemsize


def _floor(model, run: Run, bandwidth: float) -> float:
    """Milliseconds a token: weights, one copy of keys and values, and the history, read once."""
    config, size = model.config, model.dtype.itemsize
    weights = sum(p.numel() * size for p in {id(p): p for p in model.parameters()}.values())
    embedding = model.get_input_embeddings().weight
    if embedding is not model.get_output_embeddings().weight:  # a few of its rows are read
        weights -= embedding.numel() * size
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * config.num_hidden_layers * kv_heads * (config.hidden_size // config.num_attention_heads) * size
    length = run.prompt + sum(NEW_TOKENS) // 2
    return (weights + run.batch * length * (cache + config.hidden_size * size)) / bandwidth * 1e3


def _row(model, run: Run, name, passed, milliseconds, bandwidth, oracle, goals, text, numbers) -> tuple:
    floor = _floor(model, run, bandwidth)
    ratio = f"{oracle / milliseconds:.1f}x 4.55.4" if isinstance(oracle, float) else f"no oracle ({oracle})"
    text = f"{milliseconds:.3f} ms a token, {floor / milliseconds:.0%} of the floor's rate, {ratio}, {text}"
    numbers = numbers | {
        "ms": milliseconds, "tokens_per_s": 1e3 * run.batch / milliseconds, "floor_ms": floor,
        "share_of_floor": floor / milliseconds, "oracle_ms": oracle if isinstance(oracle, float) else None,
        "over_oracle": oracle / milliseconds if isinstance(oracle, float) else None, "goals": goals,
    }  # fmt: skip
    return name, passed, f"{text}; goals {goals}", numbers


# ---- transformers 4.55.4 --------------------------------------------------------------------------------------------


def _oracle(run: Run) -> float | str:
    """Milliseconds a token of transformers 4.55.4's contrastive search, or why there are none."""
    wheels = sorted(ORACLE.glob("*.whl"))
    if not wheels:
        return "make oracle-wheels fetches it"
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as site:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        command = [sys.executable, __file__, json.dumps([run.shape, run.dtype, run.batch, run.prompt])]
        environment = os.environ | {"PYTHONPATH": site, "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=ORACLE_SECONDS)
        except subprocess.TimeoutExpired:
            return f"it took over {ORACLE_SECONDS} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it failed"])[-1]
    return float(done.stdout.strip().splitlines()[-1])


def oracle(shape: str, dtype: str, batch: int, prompt: int) -> None:
    """Runs under transformers 4.55.4, without this library."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(shape, dtype, device)
    ids = torch.randint(1, model.config.vocab_size, (batch, prompt), device=device)
    print(token_time(model, ids, 1, penalty_alpha=0.6, top_k=4)[0])


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    oracle(*json.loads(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
