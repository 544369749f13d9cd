"""Greedy search, nucleus sampling and contrastive search side by side, with the figures that tell them apart."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..metrics import diversity, repetition
from ..printable import printable
from .continuation import continuation_pieces

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "LOOP",
    "METHODS",
    "PROMPTS",
    "Comparison",
    "Continuation",
    "compare",
    "legend",
    "next_steps",
    "render",
    "verdict",
]

PROMPTS = ("If the name is not found,", "This module provides", "A generator function")
METHODS = ("greedy", "nucleus", "contrastive")

# A text whose rep-4 is above this has seen a third of its four-token sequences before: to a reader it loops.
LOOP = 1 / 3


@dataclass(frozen=True)
class Continuation:
    """What one method wrote after a prompt, without the prompt, and its figures."""

    method: str
    text: str
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]  # the text of each token; joined they are `text`
    seconds: float

    @property
    def repetition(self) -> float:
        """rep-4 of the tokens."""
        return repetition(self.tokens, 4)

    @property
    def diversity(self) -> float:
        return diversity(self.tokens)

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds

    @property
    def loops(self) -> bool:
        return self.repetition > LOOP

    def repeated(self) -> list[bool]:
        """For each token, whether it lies in a run of four that the text has had before."""
        seen: set[tuple[int, ...]] = set()
        marks = [False] * len(self.tokens)
        for i in range(len(self.tokens) - 3):
            gram = self.tokens[i : i + 4]
            if gram in seen:
                marks[i : i + 4] = [True] * 4
            seen.add(gram)
        return marks


@dataclass(frozen=True)
class Comparison:
    """The continuations of one prompt, in the order of `METHODS`."""

    prompt: str
    continuations: tuple[Continuation, ...]

    def __getitem__(self, method: str) -> Continuation:
        return self.continuations[METHODS.index(method)]


def compare(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] = PROMPTS,
    *,
    penalty_alpha: float = 0.6,
    top_k: int = 4,
    top_p: float = 0.95,
    max_new_tokens: int = 128,
    seed: int = 0,
    on_progress: Callable[[], None] = lambda: None,
) -> list[Comparison]:
    """Continues every prompt by every method, one at a time, so that the times are those of a single text.

    All methods run on the same number of threads (see `fitting_threads`).

    Args:
        on_progress: called after each of the ``len(prompts) * len(METHODS)`` continuations.
    """
    import torch

    from ..decoding import ContrastiveSearch
    from ..loading import context_length, fitting_threads
    from .batches import cut_rows, pad_token, padded_rows

    def options(method: str) -> dict[str, Any]:
        if method == "nucleus":
            return {"do_sample": True, "top_p": top_p, "top_k": 0, "temperature": 1.0}
        if method == "contrastive":
            # An object of its own for every call: it may keep state of the text it writes.
            return {"custom_generate": ContrastiveSearch(penalty_alpha=penalty_alpha, top_k=top_k)}
        return {"do_sample": False}

    def run(method: str, inputs: dict[str, torch.Tensor], count: int) -> tuple[list[int], float]:
        torch.manual_seed(seed)
        started = time.perf_counter()
        with torch.inference_mode(), fitting_threads(model):
            output = model.generate(**inputs, **options(method), max_new_tokens=count)
        seconds = time.perf_counter() - started
        return output[0, inputs["input_ids"].shape[1] :].tolist(), seconds

    limit, pad = context_length(model), pad_token(tokenizer, model.config)
    room = None if limit is None or model.config.is_encoder_decoder else limit - 1
    rows, _ = cut_rows(tokenizer, list(prompts), None, limit, room=room)
    encoded = [padded_rows(model, [row], pad) for row in rows]
    for method in METHODS:
        run(method, encoded[0], 2)  # first calls build things that later ones reuse: not part of anybody's time
    comparisons = []
    for prompt, inputs in zip(prompts, encoded, strict=True):
        continuations = []
        for method in METHODS:
            tokens, seconds = run(method, inputs, max_new_tokens)
            pieces = tuple(continuation_pieces(tokenizer, [], tokens))
            continuations.append(Continuation(method, "".join(pieces), tuple(tokens), pieces, seconds))
            on_progress()
        comparisons.append(Comparison(prompt, tuple(continuations)))
    return comparisons


def verdict(comparisons: Sequence[Comparison]) -> str:
    """One sentence, from the figures alone: who loops, and whether that is the expected picture."""
    total = len(comparisons)

    def of(method: str) -> tuple[int, float]:
        texts = [comparison[method] for comparison in comparisons]
        return sum(text.loops for text in texts), sum(text.repetition for text in texts) / total

    (greedy_loops, greedy_rep), (ours_loops, ours_rep) = of("greedy"), of("contrastive")
    figures = (
        f"greedy search loops in {greedy_loops} of {total} texts (rep-4 {greedy_rep:.2f}), "
        f"contrastive search in {ours_loops} of {total} (rep-4 {ours_rep:.2f})"
    )
    if greedy_loops and not ours_loops:
        return f"Greedy loops, contrastive search does not: {figures}."
    return f"Not the expected picture: {figures}."


def legend() -> str:
    """What the two numbers of a text are."""
    return "rep-4: share of four-token runs seen before, best 0; diversity: share of short runs that are new, best 1."


def next_steps(model_name: str) -> str:
    """What to type after the demo."""
    return f'Next: simctg-fast generate {shlex.quote(model_name)} "This function returns" --stream'


def render(comparisons: Sequence[Comparison], console: Console) -> None:
    """Columns on a terminal, repeated passages in red; plain indented text elsewhere and below 80 columns.

    Both keep to the console's width. Control characters of the texts are escaped.
    """
    draw = _draw_columns if console.is_terminal and console.width >= 80 else _draw_plain
    for comparison in comparisons:
        draw(comparison, console)


def _figures(text: Continuation) -> str:
    return f"rep-4 {text.repetition:.2f}  diversity {text.diversity:.2f}  {text.tokens_per_second:.0f} tokens/s"


def _draw_columns(comparison: Comparison, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(f"{comparison.prompt} …"), style="bold"), title_justify="left", expand=True)
    cells = []
    for text in comparison.continuations:
        table.add_column(Text(text.method, style="bold"), footer=Text(_figures(text), style="dim"), ratio=1)
        cell = Text()
        for piece, repeated in zip(text.pieces, text.repeated(), strict=True):
            # Columns are narrow: no empty lines between paragraphs.
            piece = "" if piece == "\n" and cell.plain.endswith("\n") else piece
            cell.append(printable(piece), style="red" if repeated else "")
        cells.append(cell)
    table.show_footer = True
    table.add_row(*cells)
    console.print(table)


def _draw_plain(comparison: Comparison, console: Console) -> None:
    from rich.text import Text

    def write(text: str, indent: int = 0) -> None:
        for line in Text(printable(text)).wrap(console, max(console.width - indent, 1)):
            console.print(" " * indent + line.plain.rstrip(), markup=False, highlight=False, soft_wrap=True)

    write(f"{comparison.prompt} …")
    for text in comparison.continuations:
        write(f"{text.method:12} {_figures(text)}", 2)
        for paragraph in filter(str.strip, text.text.splitlines()):
            write(paragraph.strip(), 6)
    console.print()
