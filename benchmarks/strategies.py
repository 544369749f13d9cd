"""What the strategies write on a real model: how diverse it is, how probable the model finds it, and what it costs.

    python benchmarks/strategies.py MODEL_DIR              # any folder of a decoder-only model and its tokenizer
    python benchmarks/strategies.py MODEL_DIR --write      # and the table of docs/strategies.md
    python benchmarks/strategies.py MODEL_DIR --text book.txt --prompts 40 --new-tokens 128

Prompts are cut from all over a text, whose own continuation is the first row. All strategies have their defaults, and
go through the engine; log-probabilities are the model's own, by its modules in float32. No judgement of quality: that
needs other models.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import ROOT, processor, versions
from precision import note, prose

from simctg_fast.engine import Engine
from simctg_fast.loading import load_model
from simctg_fast.metrics import diversity

PAGE = ROOT / "docs" / "strategies.md"
BEGIN, END = "<!-- measured -->", "<!-- end -->"
PROMPT = 32  # tokens
ROWS: dict[str, dict[str, Any]] = {
    "greedy": {"strategy": "greedy"},
    "sample, top_p 0.95": {"strategy": "sample", "top_p": 0.95},
    "contrastive": {"strategy": "contrastive"},
    "contrastive, center": {"strategy": "contrastive", "center": True},
    "adaptive": {"strategy": "adaptive"},
    "fsd": {"strategy": "fsd"},
    "fsd-vec": {"strategy": "fsd-vec"},
    "guard": {"strategy": "guard"},
    "greedy, dry 0.8": {"strategy": "greedy", "dry_multiplier": 0.8},
}


@torch.no_grad()
def log_prob(model: Any, prompt: list[int], written: list[int]) -> float:
    """Natural logarithm of the probability of a text behind its prompt."""
    logits = model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1]
    return float(logits.double().log_softmax(-1).gather(1, torch.tensor(written)[:, None]).sum())


def measure(options: argparse.Namespace) -> list[list[str]]:
    model, tokenizer = load_model(options.model, "cpu", "float32")
    text = prose() if options.text is None else options.text.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: options.tokens]
    last = len(ids) - PROMPT - options.new_tokens
    if last < options.prompts:
        raise SystemExit(f"the text has {len(ids)} tokens, too few for {options.prompts} prompts")
    starts = [i * last // options.prompts for i in range(options.prompts)]
    prompts = [ids[start : start + PROMPT] for start in starts]
    found = {"the text itself": ([ids[s + PROMPT : s + PROMPT + options.new_tokens] for s in starts], 0.0)}
    for name, settings in ROWS.items():
        note(name)
        engine = Engine(model, tokenizer, slots=options.slots, max_new_tokens=options.new_tokens, **settings)
        requests = [{"id": i, "prompt": prompt, "seed": i} for i, prompt in enumerate(prompts)]
        began = time.perf_counter()
        results = {r.id: r for r in engine.generate(requests)}
        seconds = time.perf_counter() - began
        written = [results[i].token_ids for i in range(len(prompts))]
        found[name] = (written, sum(map(len, written)) / seconds)
    rows = []
    for name, (written, speed) in found.items():
        each = [100 * diversity(tokens) for tokens in written]
        logs = [log_prob(model, prompt, tokens) for prompt, tokens in zip(prompts, written, strict=True)]
        bytes_ = sum(len(tokenizer.decode(tokens).encode()) for tokens in written)
        cells = (
            f"{statistics.mean(each):.1f}",
            f"{min(each):.1f}",
            f"{statistics.mean(map(len, written)):.0f}",
            f"{sum(logs) / bytes_:.3f}",
            f"{speed:.0f}" if speed else "",
        )
        rows.append([name, *cells])
        note("  ".join(rows[-1]))
    return rows


def table(rows: list[list[str]], options: argparse.Namespace) -> str:
    source = "docstrings of Python" if options.text is None else options.text.name
    about = (
        f"{Path(options.model).resolve().name}, float32, {options.prompts} prompts of {PROMPT} tokens from {source}, "
        f"{options.new_tokens} new ones at most, {options.slots} slots; {processor()}, {options.threads} threads, "
        f"{versions('transformers')}."
    )
    head = ["strategy", "diversity", "worst text", "tokens", "log p a byte", "tokens/s"]
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join([BEGIN, about, "", *lines, END])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of a decoder-only model and its tokenizer")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8; by default documentation that Python carries")
    parser.add_argument("--tokens", type=int, default=20000, help="of the text, from its beginning")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true", help="write the table of docs/strategies.md as well")
    options = parser.parse_args(arguments)
    for name in ("prompts", "new_tokens", "slots", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, must be at least 1")
    torch.set_num_threads(options.threads)
    made = table(measure(options), options)
    print(made)
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        PAGE.write_text(before + made + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
