"""Why each token was chosen, for a person to read: its candidates, and what spoke against them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from ..printable import printable

__all__ = ["explained"]

_HEAD = ("token", "p", "penalty", "score", "because of")
_WIDTHS = (18, 8, 8, 8)


def explained(trace: Sequence[Mapping[str, Any]]) -> Iterator[Text]:
    """Lines about the tokens of a continuation, whose ``trace`` the engine has recorded; a colour for what won, one for
    what was most probable and did not, and for what DRY held back. What a model wrote is shown with control characters
    escaped."""
    yield Text("     " + _columns(_HEAD), style="bold")
    for number, step in enumerate(trace, start=1):
        candidates = step["candidates"]
        most = max((c["probability"] for c in candidates), default=0.0)
        for place, candidate in enumerate(candidates):
            won = candidate["token_id"] == step["token_id"]
            held = not won and candidate["probability"] == most
            numbers = (_number(candidate[name]) if name in candidate else "" for name in ("penalty", "score"))
            cells = (_quoted(candidate["token"]), _number(candidate["probability"]), *numbers, _because(candidate))
            line = f"{number if place == 0 else '':>4}{'>' if won else ' '}{_columns(cells)}".rstrip()
            yield Text(line, style="bold green" if won else "red" if held else "")
        for token in step.get("dry", ()):
            cells = (_quoted(token["token"]), "", _number(token["penalty"]), "DRY", _because(token))
            yield Text(f"     {_columns(cells)}", style="red")


def _columns(cells: Sequence[str]) -> str:
    return "".join(f"{cell:<{width}} " for cell, width in zip(cells, _WIDTHS, strict=False)) + cells[-1]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _quoted(text: str) -> str:
    return printable(repr(text))


def _because(candidate: Mapping[str, Any]) -> str:
    because = candidate.get("because")
    if because is None or not candidate.get("penalty"):
        return ""
    return f"{_quoted(because.get('ngram', because['token']))} at {because['position']}"
