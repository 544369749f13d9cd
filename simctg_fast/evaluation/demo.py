"""Strategies side by side on a few prompts, with the figures that tell them apart."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..metrics import diversity, repeated_tokens, repetition
from ..printable import printable
from ..text.continuation import continuation_pieces
from .prompts import Prompt
from .settings import KNOWN, Setting, parse_settings
from .writing import Writer, tokenize

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "LOOP",
    "PROMPTS",
    "STRATEGIES",
    "Comparison",
    "Continuation",
    "compare",
    "legend",
    "next_steps",
    "render",
    "verdict",
]

PROMPTS = ("If the name is not found,", "This module provides", "A generator function")
STRATEGIES = "greedy,nucleus,contrastive,fsd,guard,dry"

# A text whose rep-4 is above this has seen a third of its four-token sequences before: to a reader it loops.
LOOP = 1 / 3
FEWEST = 8  # tokens of a text whose rep-4 and diversity say anything: one of 4 has a single 4-gram


@dataclass(frozen=True)
class Continuation:
    """What one strategy wrote after a prompt, without the prompt, and its figures."""

    strategy: str
    text: str
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]  # the text of each token; joined they are `text`
    seconds: float

    @property
    def repetition(self) -> float | None:
        """rep-4 of the tokens; None where they are too few."""
        return repetition(self.tokens, 4) if len(self.tokens) >= FEWEST else None

    @property
    def diversity(self) -> float | None:
        return diversity(self.tokens) if len(self.tokens) >= FEWEST else None

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds

    @property
    def loops(self) -> bool:
        return (self.repetition or 0) > LOOP

    def repeated(self) -> list[bool]:
        """For each token, whether it lies in a run of four that the text has had before."""
        return repeated_tokens(self.tokens, 4)


@dataclass(frozen=True)
class Comparison:
    """The continuations of one prompt, in the order of the strategies."""

    prompt: str
    continuations: tuple[Continuation, ...]

    def __getitem__(self, strategy: str) -> Continuation:
        return next(each for each in self.continuations if each.strategy == strategy)


def compare(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] = PROMPTS,
    *,
    settings: Sequence[Setting] | None = None,
    max_new_tokens: int = 128,
    seed: int = 0,
    on_progress: Callable[[], None] = lambda: None,
) -> list[Comparison]:
    """Continues every prompt by every setting (of `STRATEGIES`), one at a time, so that the times are those of a single
    text.

    Args:
        on_progress: called after each of the ``len(prompts) * len(settings)`` continuations.

    Raises:
        ValueError: a prompt that the model cannot continue, or a setting that it cannot be decoded by.
    """
    settings = parse_settings(STRATEGIES) if settings is None else settings
    given = [Prompt(number, {"prompt": prompt}) for number, prompt in enumerate(prompts)]
    ready, refused = tokenize(model, tokenizer, given, max_new_tokens)
    for number, message in refused.items():
        raise ValueError(f"prompts[{number}] cannot be continued: {message}")
    found: list[list[Continuation]] = [[] for _ in ready]
    for setting in settings:
        writer = Writer(model, tokenizer, setting, max_new_tokens=max_new_tokens, seed=seed, slots=1)
        for prompt, row in zip(ready, found, strict=True):
            written = writer([prompt])
            if written.errors:
                raise ValueError(f"{setting.name}: {written.errors[0]}")
            tokens = tuple(written.token_ids[0] or ())
            before = [] if prompt.source is not None else prompt.ids
            pieces = tuple(continuation_pieces(tokenizer, before, tokens))
            row.append(Continuation(setting.name, "".join(pieces), tokens, pieces, written.seconds))
            on_progress()
    return [Comparison(prompt, tuple(row)) for prompt, row in zip(prompts, found, strict=True)]


def verdict(comparisons: Sequence[Comparison]) -> str:
    """One sentence, from the figures alone: who loops, who does not, and who wrote too little to tell."""
    total = len(comparisons)
    loops: list[str] = []
    calm: list[str] = []
    brief: list[str] = []
    for name in (each.strategy for each in comparisons[0].continuations):
        texts = [comparison[name] for comparison in comparisons]
        measured = [text.repetition for text in texts if text.repetition is not None]
        if len(measured) < total:
            brief.append(
                f"{_called(name)} wrote fewer than {FEWEST} tokens in {total - len(measured)} of {total} texts"
            )
        if not measured:
            continue
        mean = sum(measured) / len(measured)
        count = sum(text.loops for text in texts)
        if count:
            loops.append(f"{_called(name)} loops in {count} of {total} texts (rep-4 {mean:.2f})")
        else:
            calm.append(f"{_called(name)} (rep-4 {mean:.2f})")
    said = ([_listed(loops)] if loops else []) + ([f"no loops by {_listed(calm)}"] if calm else [])
    said += [f"{_listed(brief)}, too few to tell"] if brief else []
    sentence = "; ".join(said)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _called(name: str) -> str:
    label = KNOWN[name.partition(":")[0]][0]
    return label + name[len(name.partition(":")[0]) :]


def _listed(parts: Sequence[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def legend() -> str:
    """What the two numbers of a text are."""
    return "rep-4: share of four-token runs seen before, best 0; diversity: share of short runs that are new, best 1."


def next_steps(model_name: str) -> str:
    """What to type after the demo."""
    name = shlex.quote(model_name)
    return f'Next: simctg-fast generate {name} "This function returns" --stream; simctg-fast eval {name}'


def render(comparisons: Sequence[Comparison], console: Console) -> None:
    """A row a strategy on a terminal, repeated passages in red; plain indented text elsewhere and below 80 columns.

    Both keep to the console's width. Control characters of the texts are escaped.
    """
    draw = _draw_rows if console.is_terminal and console.width >= 80 else _draw_plain
    for comparison in comparisons:
        draw(comparison, console)


def _figures(text: Continuation) -> tuple[str, str, str]:
    figures = _figure("rep-4", text.repetition), _figure("diversity", text.diversity)
    return (*figures, f"{text.tokens_per_second:.0f} tokens/s")


def _figure(name: str, value: float | None) -> str:
    return f"{name} -" if value is None else f"{name} {value:.2f}"


def _draw_rows(comparison: Comparison, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    title = Text(printable(f"{comparison.prompt} …"), style="bold")
    table = Table(title=title, title_justify="left", expand=True, show_header=False, show_lines=True)
    table.add_column()
    table.add_column(ratio=1)
    for text in comparison.continuations:
        head = Text(text.strategy, style="bold").append("\n" + "\n".join(_figures(text)), style="not bold dim")
        cell = Text()
        for piece, repeated in zip(text.pieces, text.repeated(), strict=True):
            # No empty lines between paragraphs.
            piece = "" if piece == "\n" and cell.plain.endswith("\n") else piece
            cell.append(printable(piece), style="red" if repeated else "")
        table.add_row(head, cell)
    console.print(table)


def _draw_plain(comparison: Comparison, console: Console) -> None:
    from rich.text import Text

    def write(text: str, indent: int = 0) -> None:
        for line in Text(printable(text)).wrap(console, max(console.width - indent, 1)):
            console.print(" " * indent + line.plain.rstrip(), markup=False, highlight=False, soft_wrap=True)

    write(f"{comparison.prompt} …")
    for text in comparison.continuations:
        write(f"{text.strategy:12} {'  '.join(_figures(text))}", 2)
        for paragraph in filter(str.strip, text.text.splitlines()):
            write(paragraph.strip(), 6)
    console.print()
