"""Whole decoding runs in `gpu.py`: time a token beside the bandwidth floor, our greedy search, and transformers 4.55.4.

python benchmarks/gpu_generate.py JSON       # one measurement in an environment with transformers 4.55.4
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_case import Case, Piece, Where, case, copy_bandwidth, measured

ROOT = Path(__file__).resolve().parent.parent
ORACLE = ROOT / ".oracle-wheels"
# The time of a token is the difference of two calls, the time of a call that of the longer. Both are long enough to be
# captured, and the shorter comes once before, to compile and to warm up.
NEW_TOKENS, TINY_TOKENS = (65, 129), (5, 15)


@dataclass(frozen=True)
class Run:
    """What is measured, and goals: over 4.55.4's contrastive search (also with the decoder compiled), share of the
    floor's rate, over our greedy search."""

    shape: str
    dtype: str
    batch: int
    prompt: int
    goals: dict[str, float] = field(default_factory=dict)
    compiled_goals: dict[str, float] | None = None  # None: not compiled

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype} B={self.batch} prompt {self.prompt} k=4"


RUNS = {
    "gpt2": [
        Run("gpt2-small", "bfloat16", 1, 512, {"4.55.4": 14}, {"4.55.4": 22}),
        Run("gpt2-small", "bfloat16", 32, 512, {"4.55.4": 11}, {"4.55.4": 16}),
    ],
    "llama": [
        Run("llama-8b", "bfloat16", 1, 1024, {"4.55.4": 7}, {"4.55.4": 7, "floor": 0.76}),
        Run("llama-8b", "bfloat16", 32, 1024),  # 4.55.4 and the compiler would take as long as all the rest
    ],
}
TRIALS = {
    name: [Run(f"{name}-tiny", "float32", 2, 12, {"4.55.4": 1}, {"4.55.4": 1}), Run(f"{name}-tiny", "float32", 1, 12)]
    for name in RUNS
}


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


@dataclass(frozen=True)
class Timing:
    """Milliseconds a new token and of the longer call, the ids, and the peak of memory beyond what was held."""

    ms: float
    call_ms: float
    ids: torch.Tensor
    peak_mb: float


def timing(model, ids: torch.Tensor, lengths: tuple[int, int], rounds: int, **options: Any) -> Timing:
    """The fastest of some rounds."""
    cuda = ids.device.type == "cuda"

    def call(tokens: int) -> tuple[float, torch.Tensor]:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0,
            **{n: make() if callable(make) else make for n, make in options.items()},
        )  # fmt: skip
        if cuda:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start), out

    call(lengths[0])
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    best = dict.fromkeys(lengths, float("inf"))
    for _ in range(rounds):
        for tokens in lengths:
            seconds, out = call(tokens)
            best[tokens] = min(best[tokens], seconds)
    peak = (torch.cuda.max_memory_allocated() - held) / 1e6 if cuda else 0.0
    short, long = lengths
    return Timing((best[long] - best[short]) / (long - short), best[long], out, peak)


@functools.cache
def the_model(part: str, where: Where):
    run = runs_of(part, where)[0]
    return make_model(run.shape, run.dtype, where.device)


@functools.cache
def bandwidth(where: Where) -> float:
    return copy_bandwidth(where)


def runs_of(part: str, where: Where) -> list[Run]:
    return (TRIALS if where.tiny else RUNS)[part]


def search(where: Where, part: str, run: Run, k: int, step: bool | str, rounds: int) -> Timing:
    from simctg_fast import ContrastiveSearch

    lengths = TINY_TOKENS if where.tiny else NEW_TOKENS
    strategy = None if k == 0 else lambda: ContrastiveSearch(0.6, k, decode_step=step)
    return timing(the_model(part, where), prompt(where, part, run), lengths, rounds, custom_generate=strategy)


def prompt(where: Where, part: str, run: Run) -> torch.Tensor:
    draw = torch.Generator().manual_seed(run.batch)
    vocabulary = the_model(part, where).config.vocab_size
    return torch.randint(1, vocabulary, (run.batch, run.prompt), generator=draw).to(where.device)


_ours: dict[str, tuple[Timing, Timing]] = {}  # captured, and the plain loop, of the runs that passed
_oracle: dict[str, Timing | str] = {}


def measure_run(where: Where, part: str, run: Run) -> Iterator[Case]:
    """Contrastive search captured, beside the plain loop, our greedy search and transformers' greedy search."""
    from gpu_first import uncaptured, watched

    with watched() as steps:
        ours, greedy = (search(where, part, run, k, True, 2) for k in (4, 1))
    plain, theirs = search(where, part, run, 4, False, 1), search(where, part, run, 0, False, 1)
    problem = uncaptured(where, steps)
    same, text = agreement(run, ours.ids, plain.ids)
    if problem or not same:
        yield case(str(run), False, problem or f"{text}: not reported")
        return
    _ours[str(run)] = (ours, plain)
    text += f"; peak {ours.peak_mb:.0f} MB, greedy {greedy.peak_mb:.0f}"
    found = {"our greedy": greedy, "the plain loop": plain, "transformers' greedy": theirs}
    yield row(where, part, run, str(run), ours, found, {n: g for n, g in run.goals.items() if n != "4.55.4"}, text)


def measure_oracle(where: Where, part: str, run: Run) -> Iterator[Case]:
    """Against transformers 4.55.4's contrastive search, in a process of its own."""
    if str(run) not in _ours or "4.55.4" not in run.goals:
        return
    _oracle[str(run)] = oracle_of(run, where)
    goals = {n: g for n, g in run.goals.items() if n == "4.55.4"}
    yield row(where, part, run, f"{run}, against 4.55.4", _ours[str(run)][0], {"4.55.4": _oracle[str(run)]}, goals)


def measure_compiled(where: Where, part: str, run: Run) -> Iterator[Case]:
    from gpu_first import uncaptured, watched

    if str(run) not in _ours or run.compiled_goals is None:
        return
    if where.tiny:
        from simctg_fast.decoding import compiled_decoder

        compiled_decoder.BACKEND = "eager"
    name, start = f"{run}, decoder compiled", time.perf_counter()
    with watched() as steps:
        compiled = search(where, part, run, 4, "compiled", 2)
    problem = uncaptured(where, steps)
    same, text = agreement(run, compiled.ids, _ours[str(run)][1].ids)
    if problem or not same:
        yield case(name, False, problem or f"{text}: not reported")
        return
    text += f"; compiling and {len(steps)} calls {time.perf_counter() - start:.0f} s"
    found = {"not compiled": _ours[str(run)][0], "4.55.4": _oracle.get(str(run), "4.55.4 was not measured")}
    yield row(where, part, run, name, compiled, found, run.compiled_goals, text)


def agreement(run: Run, ours: torch.Tensor, plain: torch.Tensor) -> tuple[bool, str]:
    """New tokens beside those of the plain loop. In half precision near ties fall either way, and a sequence goes its
    own way from there on; the step itself was compared with the plain loop's, score by score, before it was used."""
    same = (ours[:, run.prompt :] == plain[:, run.prompt :]).float()
    first = same.cumprod(dim=1).sum(dim=1).mean().item()
    text = f"{same.mean().item():.0%} of the new tokens as in the plain loop, the first {first:.0f} of {same.shape[1]}"
    return run.dtype != "float32" or bool((same == 1).all()), text


def row(where: Where, part: str, run: Run, name: str, ours: Timing, found: dict, goals: dict, note: str = "") -> Case:
    others = {peer: x.ms if isinstance(x, Timing) else f"{peer}: {x}" for peer, x in found.items()}
    calls = {peer: x.call_ms for peer, x in found.items() if isinstance(x, Timing)}
    lengths = TINY_TOKENS if where.tiny else NEW_TOKENS
    floor = moved(the_model(part, where), run, run.prompt + sum(lengths) / 2) / bandwidth(where) * 1e3
    return measured(
        name, ours.ms, floor_ms=floor, others=others, call_ms=ours.call_ms, calls=calls, goals=goals, note=note,
        tokens_per_s=1e3 * run.batch / ours.ms, peak_mb=ours.peak_mb, new_tokens=lengths[1],
    )  # fmt: skip


def moved(model, run: Run, length: float) -> float:
    """Bytes a token: weights, one copy of keys and values, and the history, read once."""
    config, size = model.config, model.dtype.itemsize
    weights = sum(p.numel() * size for p in {id(p): p for p in model.parameters()}.values())
    embedding = model.get_input_embeddings().weight
    if embedding is not model.get_output_embeddings().weight:  # a few of its rows are read
        weights -= embedding.numel() * size
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * config.num_hidden_layers * kv_heads * (config.hidden_size // config.num_attention_heads) * size
    return weights + run.batch * length * (cache + config.hidden_size * size)


def pieces(part: str) -> list[Piece]:
    """What tells most comes first: every run, then the oracle, then the compiler."""

    steps = itertools.product((measure_run, measure_oracle, measure_compiled), range(len(RUNS[part])))
    return [functools.partial(one, measure=measure, part=part, index=index) for measure, index in steps]


def one(where: Where, measure: Any, part: str, index: int) -> Iterator[Case]:
    return measure(where, part, runs_of(part, where)[index])


GPT2, LLAMA = pieces("gpt2"), pieces("llama")


# ---- transformers 4.55.4 --------------------------------------------------------------------------------------------


def oracle_of(run: Run, where: Where) -> Timing | str:
    """Transformers 4.55.4's contrastive search, or why it was not measured."""
    wheels = sorted(ORACLE.glob("*.whl"))
    if not wheels:
        return "`make oracle-wheels` fetches it"
    if where.cuda:
        torch.cuda.empty_cache()
    lengths = TINY_TOKENS if where.tiny else NEW_TOKENS
    asked = [run.shape, run.dtype, run.batch, run.prompt, where.device, lengths]
    environment = os.environ | {"PYTHONPATH": unpacked(*wheels).name, "HF_HUB_OFFLINE": "1"}
    command, limit = [sys.executable, __file__, json.dumps(asked)], min(120.0, where.left() - 5)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"it took over {limit:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it failed"])[-1][:160]
    ms, call_ms = json.loads(done.stdout.strip().splitlines()[-1])
    return Timing(ms, call_ms, torch.empty(0), 0.0)


@functools.cache
def unpacked(*wheels: Path) -> tempfile.TemporaryDirectory:
    site = tempfile.TemporaryDirectory()
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site.name)
    return site


def oracle(shape: str, dtype: str, batch: int, prompt: int, device: str, lengths: list[int]) -> None:
    """Runs under transformers 4.55.4, without this library."""
    model = make_model(shape, dtype, device)
    ids = torch.randint(1, model.config.vocab_size, (batch, prompt), device=device)
    found = timing(model, ids, tuple(lengths), 1, penalty_alpha=0.6, top_k=4)
    print(json.dumps([found.ms, found.call_ms]))


if __name__ == "__main__":
    oracle(*json.loads(sys.argv[1]))
