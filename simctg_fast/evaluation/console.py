"""The table of an evaluation for a terminal, or as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..printable import printable
from .conclude import all_rows

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# What is shown where there is room, the most telling first.
_ORDER = (
    *("diversity", "tokens", "log_prob_per_byte", "tokens_per_second", "published_diversity", "mauve"),
    *("embedding_coherence", "rep_4", "coherence", "perplexity"),
)
_GAP, _EDGES = 3, 2  # blanks between columns, and beside the first and the last
_WIDE = 400  # of a file or a pipe
_REFUSED = 8  # prompts that are named


def show(evaluation: Mapping[str, Any], console: Console) -> None:
    """The table as wide as the console allows, then what it says, and what went wrong."""
    show_table(evaluation, console)
    for sentence in evaluation["conclusion"]:
        console.print(printable(sentence), soft_wrap=not console.is_terminal)


def show_table(evaluation: Mapping[str, Any], console: Console) -> None:
    """On a terminal as wide as that, elsewhere whole."""
    if console.is_terminal:
        console.print(table(evaluation, console.width))
    else:
        console.width, before = _WIDE, console.width
        console.print(table(evaluation))
        console.width = before


def table(evaluation: Mapping[str, Any], width: int | None = None) -> Table:
    """A row a strategy: means, and under each its 95 % interval. Columns that ``width`` has no room for are left out,
    the least telling first."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    names = ["strategy", *(printable(row["strategy"]) for row in evaluation["rows"])]
    room = None if width is None else width - _EDGES - max(map(len, names))
    columns = {}
    for name in sorted(evaluation["metrics"], key=_ORDER.index):
        metric = evaluation["metrics"][name]
        head = f"{metric['name']}\n{metric['unit']}".rstrip()
        cells = [_cell(row["figures"].get(name), metric["digits"]) for row in evaluation["rows"]]
        size = _GAP + max(len(line) for text in (head, *cells) for line in text.split("\n"))
        if room is not None and room < size:
            break
        room = None if room is None else room - size
        columns[name] = [head, *cells]
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, width=None)
    made.add_column("strategy", no_wrap=True)
    for name in (n for n in evaluation["metrics"] if n in columns):
        made.add_column(Text(columns[name][0]), justify="right", no_wrap=True)
    for number, name in enumerate(names[1:], start=1):
        made.add_row(Text(name), *(Text(columns[n][number]) for n in evaluation["metrics"] if n in columns))
    return made


def is_complete(evaluation: Mapping[str, Any]) -> bool:
    """Whether every prompt has a text of every strategy, and of every setting of the grid."""
    return not evaluation["refused"] and not any(row["missing"] for row in all_rows(evaluation))


def notes(evaluation: Mapping[str, Any]) -> list[str]:
    """What a reader has to know beside the table, a line each; what could not be done is part of it."""
    found = [f"{row['strategy']}: {row['note']}" for row in all_rows(evaluation) if row["note"]]
    refused: Sequence[Mapping[str, Any]] = evaluation["refused"]
    found += [f"prompt {each['id']!r} cannot be continued: {each['message']}" for each in refused[:_REFUSED]]
    if len(refused) > _REFUSED:
        found.append(f"prompts that cannot be continued beside these: {len(refused) - _REFUSED} (see evaluation.json)")
    return found


def _cell(figure: Mapping[str, Any] | None, digits: int) -> str:
    if figure is None:
        return ""
    mean = f"{figure['mean']:.{digits}f}"
    if figure["low"] is None or digits == 0:
        return mean
    return f"{mean}\n{figure['low']:.{digits}f}…{figure['high']:.{digits}f}"
