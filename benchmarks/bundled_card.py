"""The bundled model's card: what it was trained on, how, and what it does, all of it measured on the exported files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from simctg_fast.metrics import isotropy, mean_over_texts


@dataclass
class Progress:
    """How far training has come. Losses are means over the last logged interval, in nats per token."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    likelihood: float = float("nan")
    contrastive: float = float("nan")
    validation: float = float("nan")
    validation_long: float = float("nan")


@torch.no_grad()
def held_out_isotropy(model: Any, held_out: Tensor, length: int = 256) -> float:
    """Isotropy of the last layer's hidden states over up to 32 held-out windows of `length` tokens."""
    windows = held_out[: len(held_out) // length * length].view(-1, length)[:32]
    return isotropy(model.transformer(windows).last_hidden_state)


def decoding_figures(model: Any, tokenizer: Any, held_out: Tensor, prompts: int) -> list[tuple[str, float, float]]:
    """``(method, mean rep-4, mean diversity)`` of 128 new tokens after 32 held-out ones, over `prompts` windows."""
    from simctg_fast.evaluation.demo import compare
    from simctg_fast.evaluation.settings import parse_settings

    stride = max(32, len(held_out) // prompts)
    texts = [tokenizer.decode(held_out[i * stride : i * stride + 32], skip_special_tokens=True) for i in range(prompts)]
    settings = parse_settings("greedy,nucleus,contrastive")
    comparisons = compare(model, tokenizer, texts, settings=settings)
    figures = []
    for method in (setting.name for setting in settings):
        written = [comparison[method] for comparison in comparisons]
        values = ([text.repetition for text in written], [text.diversity for text in written])
        repetition, diversity = (mean_over_texts(each) or 0.0 for each in values)  # texts of a few tokens have none
        figures.append((method, repetition, diversity))
    return figures


def write_card(
    folder: Path, model: Any, tokenizer: Any, held_out: Tensor, facts: Mapping[str, Any], prompts: int
) -> None:
    """Writes ``README.md`` into the model's folder."""
    corpus, versions = facts["corpus"], facts["versions"]
    recipe = SimpleNamespace(**facts["recipe"])
    progress = Progress(**facts["progress"])
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name != "README.md")
    train_characters, train_tokens = corpus["train_characters"], corpus["train_tokens"]
    corpus_table = _table(
        {
            "Python version": corpus["python"],
            "corpus sha256": f"`{corpus['sha256']}`",
            "documents": f"{corpus['documents']:,}",
            "characters": f"training {train_characters:,}, held out {corpus['validation_characters']:,}",
            "tokens": f"training {train_tokens:,}, held out {corpus['validation_tokens']:,}",
        }
    )
    rate = progress.tokens / max(progress.seconds, 1e-9)
    threads = torch.get_num_threads()
    training_table = _table(
        {
            "steps": f"{progress.step:,}",
            "tokens seen": f"{progress.tokens:,} ({progress.tokens / train_tokens:.1f} epochs)",
            "time": f"{progress.seconds / 60:.0f} minutes with {threads} CPU threads, {rate:,.0f} tokens/s",
            "training loss": f"{progress.likelihood:.3f} nats per token",
            "contrastive loss": f"{progress.contrastive:.4f}",
            "validation loss": f"{progress.validation:.3f} nats per token at length {recipe.length}, "
            f"{progress.validation_long:.3f} at {recipe.context}",
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        }
    )
    text = f"""\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# The model in the box

A GPT-2 of {parameters / 1e6:.2f} million parameters, trained from scratch on Python's own documentation. It shows
what a decoding method does, without a download. It writes text that looks like documentation, and knows nothing: what
it says about Python is as often wrong as right.

* **Use**: demonstrations, tests and benchmarks of decoding, by the path `simctg_fast.bundled_model_path()` or the name
  `bundled` on the command line. Not for answering questions.
* **Architecture**: {recipe.layers} layers, width {recipe.width}, {recipe.heads} heads, tied embeddings;
  context {recipe.context} tokens; {len(tokenizer)} byte-level BPE tokens learned from the same text.
* **On disk**: {size / 1e6:.2f} MB, weights in fp16; they load as fp32.
* **Licence**: Apache-2.0, like the package. The text it learned from is part of Python, under the PSF licence.

## Corpus

Prose paragraphs of `pydoc_data.topics`, of the docstrings of the standard library's Python files (tests left out), and
of those of a few modules written in C. That text differs by Python version: the hash says which one this was.

{corpus_table}

## Training

From a fixed seed, on the CPU, by one command:
`python benchmarks/train_bundled.py --steps {recipe.steps}`. The loss is the likelihood plus the SimCTG contrastive loss
(weight {recipe.contrastive_weight:g}, margin {recipe.margin:g}; Su et al. 2022, eq. 2). \
Muon moves the matrices inside the blocks, AdamW everything else.

{training_table}

<details><summary>Every setting</summary>

{_table(vars(recipe))}

</details>

## Behaviour

Isotropy of the last layer's hidden states on held-out text (1: they point everywhere; 0: all one way): \
{held_out_isotropy(model, held_out):.3f}.

{_behaviour(model, tokenizer, held_out, prompts)}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _behaviour(model: Any, tokenizer: Any, held_out: Tensor, prompts: int) -> str:
    if not prompts:
        return "Repetition and diversity were not measured for this copy."
    rows = "\n".join(
        f"| {method} | {rep:.3f} | {diverse:.3f} |"
        for method, rep, diverse in decoding_figures(model, tokenizer, held_out, prompts)
    )
    return f"""\
{prompts} prompts of 32 held-out tokens, 128 new tokens each; nucleus p = 0.95, contrastive search k = 4, alpha = 0.6.

| method | rep-4 | diversity |
|---|---|---|
{rows}"""
