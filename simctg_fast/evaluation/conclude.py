"""What the figures of an evaluation say, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

LOOP = 100 / 3  # per cent of 4-grams that were there before: to a reader the text loops
SHORT = 0.75  # of the length of greedy search's texts: diversity comes easier to them


def all_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of the table, and behind them those of the grid."""
    return [*evaluation["rows"], *(evaluation.get("grid") or {}).get("rows", ())]


def conclusions(
    rows: Sequence[Row], recommended: str | None, reason: str, grid: Mapping[str, Any] | None = None
) -> list[str]:
    """Sentences about the ``rows`` of a table: who loops, who is nearest to people, at which price.

    Args:
        rows: of an evaluation, people's first where there are any.
        recommended: the name of a row, or None; ``reason``: as of `Recommendation`.
        grid: as in what an evaluation found.
    """
    found = list(_sentences([row for row in rows if row["figures"]], recommended, reason))
    return found if grid is None else [*found, _of_the_grid(grid)]


def _of_the_grid(grid: Mapping[str, Any]) -> str:
    best = grid["recommended"]
    if best is None:
        return f"No setting of the grid can be recommended: {grid['reason']}."
    return f"Of the grid begin with penalty_alpha {best['penalty_alpha']}, top_k {best['top_k']}: {grid['reason']}."


def _sentences(rows: Sequence[Row], recommended: str | None, reason: str) -> Iterator[str]:
    human = next((row for row in rows if row["strategy"] == "human"), None)
    ours = [row for row in rows if row is not human]
    if recommended is not None:
        label = next(row["label"] for row in ours if row["strategy"] == recommended)
        yield f"Begin with {label}: {reason}."
    elif human is not None and ours:
        yield f"No strategy can be recommended: {reason}."
    loops = [row for row in ours if (_of(row, "rep_4") or 0) > LOOP]
    if loops:
        shares = ", ".join(f"{row['label']} {_of(row, 'rep_4'):.0f} %" for row in loops)
        yield f"Texts loop: of their 4-grams they had so many before: {shares}."
    measured = [row for row in ours if _of(row, "diversity") is not None]
    if human is not None and measured and (target := _of(human, "diversity")) is not None:
        nearest = sorted(measured, key=lambda row: abs(_of(row, "diversity") - target))[:3]
        shares = ", ".join(f"{row['label']} {_of(row, 'diversity'):.1f}" for row in nearest)
        yield f"Nearest to people's diversity ({target:.1f}): {shares}{_overlaps(nearest)}."
    greedy = next((row for row in ours if row["strategy"] == "greedy"), None)
    if greedy is None:
        return
    short = [row for row in ours if (_of(row, "tokens") or 0) < SHORT * (_of(greedy, "tokens") or 0)]
    if short:
        lengths = ", ".join(f"{row['label']} {_of(row, 'tokens'):.0f}" for row in short)
        yield (
            f"Much shorter than greedy search's texts ({_of(greedy, 'tokens'):.0f} tokens), so that their diversity is "
            f"flattered: {lengths}."
        )
    speed = _of(greedy, "tokens_per_second")
    priced = [row for row in ours if row is not greedy and _of(row, "tokens_per_second")]
    if speed and priced:
        shares = ", ".join(f"{row['label']} {_of(row, 'tokens_per_second') / speed:.2f}" for row in priced)
        yield f"Tokens a second, relative to greedy search: {shares}."


def _of(row: Row, metric: str) -> Any:
    return row["figures"].get(metric, {}).get("mean")


def _overlaps(rows: Sequence[Row]) -> str:
    """Whether the first is told from the second by their intervals."""
    if len(rows) < 2:
        return ""
    first, second = (row["figures"]["diversity"] for row in rows[:2])
    if None in (first["low"], first["high"], second["low"], second["high"]):
        return ""
    apart = first["low"] > second["high"] or first["high"] < second["low"]
    return "" if apart else "; the intervals of the first two overlap"
