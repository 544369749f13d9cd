"""Heat maps of similarity, isotropy by layer, diversity against coherence: pictures, and their values as text."""

from __future__ import annotations

import base64
import statistics
from typing import Any

from ...checks import require
from ..heat_map import SIDE, Scale, axes, bar, panel, rows_of, scale_of
from .charts import Chart
from .markup import data, escaped, isolated, number, shown, visible
from .table import HUMAN

__all__ = ["grid_section", "isotropy_section", "similarity_section"]


def similarity_section(evaluation: dict[str, Any]) -> str:
    """Every map on one scale. The script reads the values below the picture from `similarity-data`, a byte each."""
    maps = evaluation["similarity"]
    labels = {row["strategy"]: row["label"] for row in evaluation["rows"]}
    matrices = [rows_of(one["cosines"]) for one in maps]
    scale = scale_of(matrices)
    for one, rows in zip(maps, matrices, strict=True):
        count, name = len(one["pieces"]), f"the number of pieces of {one['strategy']!r}"
        require(count == len(rows), name, count, f"that of rows of its cosines, {len(rows)}")
    figures = [
        _map(i, one, rows, scale, labels.get(one["strategy"], one["strategy"]), evaluation.get("texts") or [])
        for i, (one, rows) in enumerate(zip(maps, matrices, strict=True))
    ]
    low = number(scale.low, 1)
    each = [_values(one, rows, scale) for one, rows in zip(maps, matrices, strict=True)]
    values = {"low": scale.low, "high": scale.high, "maps": each}
    return (
        "<p>Cosines of the last layer’s hidden states of each text, token by token, the prompt first. A text that "
        "repeats itself shows light stripes beside the diagonal. Where even unlike tokens are light, the states share "
        "one direction, and contrastive search has little to tell them apart by. "
        '<span class="scripted" hidden>Point at a cell, or choose a map and use the arrow keys, to read it.</span></p>'
        f'<svg class="bar" viewBox="-10 -1 280 32" role="img" aria-label="Scale: from {low} (dark) to 1 (light)">'
        f"{bar(scale, 260, across=True)}</svg>"
        f'<div class="maps">{"".join(figures)}</div>'
        f'<script type="application/json" id="similarity-data">{data(values)}</script>'
    )


def _map(i: int, one: dict[str, Any], rows: list[list[float]], scale: Scale, label: str, texts: list[Any]) -> str:
    size, prompt = len(rows), one.get("prompt_tokens") or 0
    others = [value for r, row in enumerate(rows) for value in row[:r] if shown(value)]
    facts = []
    if shown(one.get("isotropy")):
        facts.append(f"isotropy {number(one['isotropy'], 2)}")
    place = one.get("text")
    if texts and isinstance(place, int) and 0 <= place < len(texts):
        facts.append(f"prompt {place + 1}")
    facts.append(f"{prompt} + {size - prompt} tokens")
    mean = f" Mean of different tokens: {number(statistics.fmean(others), 2)}." if others else ""
    ends = ""
    if 0 < prompt < size:
        cell = SIDE / size
        ends = (
            f'<text x="0" y="-7">prompt</text><text x="{max(52.0, prompt * cell + 4):.1f}" y="-7">continuation</text>'
        )
    about = f"{size} by {size} cells, {prompt} of them the prompt.{mean}"
    return (
        f'<figure class="map" data-map="{i}"><figcaption><strong>{isolated(label)}</strong> '
        f'<span class="facts">{" · ".join(facts)}</span></figcaption><div class="field">'
        f'<svg viewBox="-32 -22 400 404" role="img" aria-labelledby="map-{i}-name" aria-describedby="map-{i}-about">'
        f'<title id="map-{i}-name">Similarity of the tokens of {escaped(label)}</title>'
        f'<desc id="map-{i}-about">{about}</desc>{panel(rows, scale, prompt)}{axes(size, None)}'
        f'<g class="ends" font-size="11">{ends}</g></svg></div></figure>'
    )


def _values(one: dict[str, Any], rows: list[list[float]], scale: Scale) -> dict[str, Any]:
    """Cosines are symmetric: row r has the r + 1 values up to the diagonal."""
    below = scale.levels(value for r, row in enumerate(rows) for value in row[: r + 1])
    return {
        "pieces": [visible(piece) for piece in one["pieces"]],
        "prompt": one.get("prompt_tokens") or 0,
        "levels": base64.b64encode(below).decode(),
    }


def isotropy_section(evaluation: dict[str, Any]) -> str:
    found = evaluation["isotropy"]
    layers = [(i, value) for i, value in enumerate(found["layers"]) if shown(value)]
    source = escaped(found.get("of") or "texts")
    rows = "".join(
        f'<tr><th scope="row">{i}{" (embeddings)" if i == 0 else ""}</th><td>{number(value, 3)}</td></tr>'
        for i, value in enumerate(found["layers"])
    )
    picture, is_open = "", " open" if len(found["layers"]) <= 16 else ""
    if layers:
        values = [value for _, value in layers]
        chart = Chart((0, max(1, len(found["layers"]) - 1)), (min(0.0, *values), max(1.0, *values)), height=240)
        points = [(chart.x(i), chart.y(value)) for i, value in layers]
        dots = "".join(
            f'<circle class="point" cx="{x}" cy="{y}" r="3.4"><title>layer {i}: {number(value, 3)}</title></circle>'
            for (x, y), (i, value) in zip(points, layers, strict=True)
        )
        line = " ".join(f"{x},{y}" for x, y in points)
        inside = chart.frame("layer", "isotropy", whole_x=True) + f'<polyline class="line" points="{line}"/>{dots}'
        (start, first), (end, last) = layers[0], layers[-1]
        about = f"{len(layers)} values; {number(first, 2)} at layer {start}, {number(last, 2)} at layer {end}."
        picture = chart.drawn(inside, "Isotropy by layer", about, "isotropy-chart")
    return (
        f"<p>1 − the mean cosine between the hidden states of different tokens, over the {source}. Near 1 they point "
        "in all directions; near 0 they all point the same way, and the similarities that contrastive search weighs "
        "hardly differ. The last layer is the one it looks at.</p>"
        f'<div class="beside">{picture}<details{is_open}><summary>The values as a table</summary><table class="small">'
        '<caption class="unseen">Isotropy by layer</caption>'
        f'<thead><tr><th scope="col">layer</th><th scope="col">isotropy</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></details></div>"
    )


def grid_section(evaluation: dict[str, Any]) -> str:
    grid, metrics = evaluation["grid"], evaluation["metrics"]
    digits = {key: metrics.get(key, {}).get("digits", 2) for key in ("diversity", "coherence")}
    chosen = grid.get("recommended") or {}
    alphas, ks = grid["penalty_alpha"], grid["top_k"]
    for key in digits:
        fits = len(grid[key]) == len(alphas) and all(len(line) == len(ks) for line in grid[key])
        require(fits, f"{key} of the grid", grid[key], f"{len(alphas)} × {len(ks)} numbers, as its alphas and ks")
    reason = f"<p>{escaped(grid['reason'])}</p>" if grid.get("reason") else ""
    said = ""
    if chosen:
        setting = f"α = {escaped(chosen['penalty_alpha'])}, k = {escaped(chosen['top_k'])}"
        said = f'<p class="recommended"><strong>Recommended: {setting}</strong></p>'
    unit = escaped(metrics.get("diversity", {}).get("unit") or "")
    heads = "".join(f'<th scope="col">k = {escaped(k)}</th>' for k in ks)
    body = []
    for i, alpha in enumerate(alphas):
        cells = []
        for j, k in enumerate(ks):
            pair = [number(grid[key][i][j], digits[key]) for key in ("diversity", "coherence")]
            text = f'{pair[0]} <span class="second">{pair[1]}</span>'
            if alpha == chosen.get("penalty_alpha") and k == chosen.get("top_k"):
                text = (
                    f'<strong>{pair[0]} <span class="second">{pair[1]}</span></strong> <span class="best">chosen</span>'
                )
            cells.append(f"<td>{text}</td>")
        body.append(f'<tr><th scope="row">α = {escaped(alpha)}</th>{"".join(cells)}</tr>')
    table = (
        '<div class="wide" role="region" aria-labelledby="grid-caption" tabindex="0"><table class="small">'
        f'<caption id="grid-caption">Diversity{f" ({unit})" if unit else ""}, then coherence</caption>'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )
    failed = (f"{isolated(row['label'])}: {escaped(row['note'])}" for row in grid.get("rows", ()) if row["note"])
    notes = "".join(f'<p class="facts">{note}</p>' for note in failed)
    return (
        f"{said}{reason}{notes}<p>The penalty α holds similarity against a token, k is the number of candidates. "
        "More of either brings diversity up and, past some point, coherence down.</p>"
        f'<div class="beside">{_scatter(grid, chosen, evaluation["rows"], digits)}{table}</div>'
    )


_SHAPES = (  # circle, square, triangle, diamond, triangle upside down
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "M-3.6-3.6h7.2v7.2h-7.2z",
    "M0-4.6L4.4 3.4h-8.8z",
    "M0-5L4.6 0 0 5-4.6 0z",
    "M0 4.6L4.4-3.4h-8.8z",
)


def _scatter(grid: dict[str, Any], chosen: dict[str, Any], rows: list[dict[str, Any]], digits: dict[str, int]) -> str:
    """A line a k through its alphas."""
    lines: dict[int, list[tuple[float, float, float]]] = {}
    for j in range(len(grid["top_k"])):
        for i, alpha in enumerate(grid["penalty_alpha"]):
            across, up = grid["coherence"][i][j], grid["diversity"][i][j]
            if shown(across) and shown(up):
                lines.setdefault(j, []).append((across, up, alpha))
    if not lines:
        return ""
    points = [point for line in lines.values() for point in line]
    aim = _aim(rows, points)
    xs, ys = ([point[axis] for point in (*points, *aim)] for axis in (0, 1))
    chart = Chart.around(xs, ys, height=320, top=34)
    parts = [chart.frame("coherence →", "diversity →"), _key(grid["top_k"])]
    for x, y in aim:
        mark = '<path class="human-mark" d="M-6 0H6M0-6V6"/><text x="9" y="-6">human</text>'
        parts.append(f'<g transform="translate({chart.x(x)} {chart.y(y)})">{mark}</g>')
    for j, line in lines.items():
        k, places = grid["top_k"][j], [(chart.x(x), chart.y(y)) for x, y, _ in line]
        kind = "line" if k == chosen.get("top_k") else "line faint"
        parts.append(f'<polyline class="{kind}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>')
        for (x, y), (across, up, alpha) in zip(places, line, strict=True):
            values = f"diversity {number(up, digits['diversity'])}, coherence {number(across, digits['coherence'])}"
            name = f"α = {escaped(alpha)}, k = {escaped(k)}: {values}"
            shape = f'<path class="point" d="{_SHAPES[j % len(_SHAPES)]}"/>'
            parts.append(f'<g transform="translate({x} {y})">{_ring(alpha, k, chosen)}{shape}<title>{name}</title></g>')
    setting = f" Recommended: alpha {escaped(chosen['penalty_alpha'])}, k {escaped(chosen['top_k'])}." if chosen else ""
    about = f"A line for each k through its alphas, in rising order. The table beside has all values.{setting}"
    return chart.drawn("".join(parts), "Diversity against coherence", about, "grid-chart")


def _aim(rows: list[dict[str, Any]], points: list[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """Where the human texts lie, unless what shows them as well would leave the map a corner."""
    figures: dict[str, Any] = next((row["figures"] for row in rows if row["strategy"] == HUMAN), {})
    aim = [figures.get(key, {}).get("mean") for key in ("coherence", "diversity")]
    if not all(map(shown, aim)):
        return []
    for axis, value in enumerate(aim):
        low, high = min(p[axis] for p in points), max(p[axis] for p in points)
        if max(high, value) - min(low, value) > 1.6 * (high - low):
            return []
    return [(aim[0], aim[1])]


def _ring(alpha: Any, k: Any, chosen: dict[str, Any]) -> str:
    if alpha != chosen.get("penalty_alpha") or k != chosen.get("top_k"):
        return ""
    label = f'<text class="chosen" x="-9" y="20" text-anchor="end">α = {escaped(alpha)}, k = {escaped(k)}</text>'
    return f'<circle class="ring" r="9"/>{label}'


def _key(ks: list[Any]) -> str:
    """Which shape stands for which k."""
    parts = []
    for j, k in enumerate(ks):
        shape = f'<path class="point" d="{_SHAPES[j % len(_SHAPES)]}"/>'
        parts.append(f'<g transform="translate({52 + 64 * j} 10)">{shape}<text x="9" y="4">k = {escaped(k)}</text></g>')
    return "".join(parts)
