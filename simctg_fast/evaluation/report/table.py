"""The table of figures: a row a strategy, means with intervals and where they lie in their column."""

from __future__ import annotations

from typing import Any

from .markup import MISSING, escaped, interval, isolated, number, shown

__all__ = ["HUMAN", "best_rows", "figures_table", "goal"]

HUMAN = "human"  # the row of the references
_DIRECTIONS = {"higher": ("↑", "higher is better"), "lower": ("↓", "lower is better")}
_WIDTH, _HEIGHT, _EDGE = 88, 12, 5  # of the picture in a cell


def figures_table(evaluation: dict[str, Any]) -> str:
    rows, metrics = evaluation["rows"], evaluation["metrics"]
    heads: list[str] = []
    columns: list[_Column] = []
    for key, metric in metrics.items():
        heads.append(_head(f"m-{len(heads)}", metric, rows, key))
        columns.append(_Column(key, metric, rows))
    body = []
    for i, row in enumerate(rows):
        is_human = row["strategy"] == HUMAN
        name = isolated(row["label"]) if is_human else f'<a href="#s-{i}">{isolated(row["label"])}</a>'
        note = f'<span class="note">{escaped(row["note"])}</span>' if row.get("note") else ""
        cells = "".join(column.cell(row) for column in columns)
        kind = ' class="human"' if is_human else ""
        body.append(f'<tr{kind}><th scope="row">{name}{note}</th>{cells}</tr>')
    count = evaluation.get("prompts")
    over = f" over {number(count, 0)} {'prompt' if count == 1 else 'prompts'}" if shown(count) else ""
    marks = "the picture below shows both beside the other strategies’"
    if any(row["strategy"] == HUMAN for row in rows):
        marks += ", with a dashed line at the human texts"
    signs = dict(goal(metric, rows, key) for key, metric in metrics.items())
    meanings = "; ".join(f"{sign}\u00a0{words}" for sign, words in signs.items() if sign)
    legend = f" Beside the units: {meanings}." if meanings else ""
    return (
        f'<p id="table-about" class="about">Means{over}; below each its 95\u00a0% bootstrap interval where there is '
        f"one; {marks}. Where intervals overlap much, the difference may be chance.{legend}</p>"
        '<div class="wide" role="region" aria-labelledby="table-caption" aria-describedby="table-about" tabindex="0">'
        '<table class="figures"><caption id="table-caption" class="unseen">Figures of each strategy</caption>'
        f'<thead><tr><th scope="col">strategy</th>{"".join(heads)}</tr></thead><tbody>{"".join(body)}</tbody>'
        "</table></div>"
    )


def goal(metric: dict[str, Any], rows: list[dict[str, Any]], key: str) -> tuple[str, str]:
    """Sign and words of what is better; empty where nothing is."""
    better = metric.get("better")
    if better == HUMAN:
        return "≈", "nearest to the human texts is best" if _human(rows, key) is not None else "nearest to 100 is best"
    return _DIRECTIONS.get(better or "", ("", ""))


def best_rows(metric: dict[str, Any], rows: list[dict[str, Any]], key: str) -> list[int]:
    """The places of the best strategies among two or more: those that nothing shown tells from the best."""
    better, digits = metric.get("better"), metric.get("digits", 2)
    found = {i: row["figures"].get(key, {}).get("mean") for i, row in enumerate(rows) if row["strategy"] != HUMAN}
    means = {i: mean for i, mean in found.items() if shown(mean)}
    if len(means) < 2:
        return []
    human = _human(rows, key)
    aim = 100.0 if human is None else human
    ranks = {"higher": lambda mean: -mean, "lower": lambda mean: mean, HUMAN: lambda mean: abs(mean - aim)}
    if better not in ranks:
        return []
    best = means[min(means, key=lambda i: ranks[better](means[i]))]
    return [i for i, mean in means.items() if number(mean, digits) == number(best, digits)]


def _human(rows: list[dict[str, Any]], key: str) -> float | None:
    for row in rows:
        mean = row["figures"].get(key, {}).get("mean")
        if row["strategy"] == HUMAN and shown(mean):
            return mean
    return None


def _head(name: str, metric: dict[str, Any], rows: list[dict[str, Any]], key: str) -> str:
    sign, words = goal(metric, rows, key)
    unit = escaped(metric["unit"]) if metric.get("unit") else ""
    both = f'<span aria-hidden="true" title="{words}">{sign}</span><span class="unseen">, {words}</span>'
    arrow = both if sign else ""
    below = f'<span class="unit">{" ".join(filter(None, [unit, arrow]))}</span>' if unit or arrow else ""
    return f'<th scope="col"><a href="#{name}">{isolated(metric["name"])}</a>{below}</th>'


class _Column:
    """A metric's cells: they share the span of their pictures."""

    def __init__(self, key: str, metric: dict[str, Any], rows: list[dict[str, Any]]):
        self.key, self.digits, self.human = key, metric.get("digits", 2), _human(rows, key)
        self.word = "nearest" if metric.get("better") == HUMAN else "best"
        self.best = {id(rows[i]) for i in best_rows(metric, rows, key)}
        figures = [row["figures"].get(key, {}) for row in rows]
        values = [figure.get(name) for figure in figures for name in ("mean", "low", "high")]
        there = [value for value in values if shown(value)]
        self.low, self.high = min(there, default=0.0), max(there, default=0.0)

    def cell(self, row: dict[str, Any]) -> str:
        figure = row["figures"].get(self.key, {})
        mean = figure.get("mean")
        if not shown(mean):
            return f"<td>{MISSING}</td>"
        text = f'<span class="mean">{number(mean, self.digits)}</span>'
        if id(row) in self.best:
            text = f'<strong class="mean">{number(mean, self.digits)}</strong> <span class="best">{self.word}</span>'
        between = interval(figure.get("low"), figure.get("high"), self.digits)
        span = f'<span class="interval">{between}</span>' if between else ""
        return f"<td>{text}{span}{self._picture(figure)}</td>"

    def _at(self, value: float) -> str:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return f"{_EDGE + share * (_WIDTH - 2 * _EDGE):.1f}"

    def _picture(self, figure: dict[str, Any]) -> str:
        """Mean and interval on the span of the column. The numbers say the same, so readers aloud pass over it."""
        middle = _HEIGHT // 2
        parts = [f'<path class="span" d="M0 {middle}H{_WIDTH}"/>']
        if self.human is not None:
            parts.append(f'<path class="aim" d="M{self._at(self.human)} 0V{_HEIGHT}"/>')
        if shown(figure.get("low")) and shown(figure.get("high")):
            parts.append(f'<path class="whisker" d="M{self._at(figure["low"])} {middle}H{self._at(figure["high"])}"/>')
        parts.append(f'<circle class="dot" cx="{self._at(figure["mean"])}" cy="{middle}" r="3.2"/>')
        size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        return f'<svg class="cell" {size} aria-hidden="true" focusable="false">{"".join(parts)}</svg>'
