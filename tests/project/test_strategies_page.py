"""The page of strategies: its Python runs as it stands there, its names and defaults are the library's."""

from __future__ import annotations

import inspect
import re

import torch
import transformers

import simctg_fast
from simctg_fast.engine.parameters import NAMES
from simctg_fast.strategy_names import STRATEGIES

from ..repository import repository

PAGE = repository("docs/strategies.md").read_text(encoding="utf-8")


def test_the_blocks_run(capsys):
    folder = simctg_fast.bundled_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    names = {"model": model, "tokenizer": tokenizer, "inputs": tokenizer("The city of", return_tensors="pt")}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 3
    torch.manual_seed(0)
    for block in blocks:
        calls = [line for line in block.splitlines() if line.startswith("texts = ")]
        names["found"] = found = []
        for line in calls:
            block = block.replace(line, f"{line}\nfound.append(texts)", 1)
        exec(compile(block, "strategies.md", "exec"), names)
        assert len({tuple(ids[0].tolist()) for ids in found}) == len(calls), "every strategy writes its own text"
    assert len(capsys.readouterr().out.strip()) > 20


def test_names_and_defaults():
    table = [line for line in PAGE.splitlines() if line.startswith("| `")]
    for name in ("contrastive", "adaptive", "fsd", "fsd-vec", "guard"):
        assert name in STRATEGIES
        assert any(f"`{name}`" in row for row in table), name
    for name in re.findall(r"`((?:fsd|adaptive|guard|dry)_[a-z_]+)`", PAGE):
        assert name in NAMES, name
    guard, adaptive, fsd, dry = (
        inspect.signature(getattr(simctg_fast, name)).parameters
        for name in ("GUARD", "AdaptiveContrastiveSearch", "FSD", "DRYLogitsProcessor")
    )
    assert (guard["window"].default, guard["decay"].default, guard["sample"].default) == (7, 0.95, True)
    assert (adaptive["q"].default, adaptive["k_range"].default) == (1, (5, 15))
    assert (fsd["k"].default, fsd["beta"].default, simctg_fast.FSD().alpha, simctg_fast.FSD("vector").alpha) == (
        *(3, 0.9, 0.65, 0.45),
    )
    assert (dry["multiplier"].default, dry["base"].default, dry["allowed_length"].default) == (0.8, 1.75, 2)
