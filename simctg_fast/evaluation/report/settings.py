"""The strategies' settings as one types them, the definitions, and the command that makes the page anew."""

from __future__ import annotations

import re
from typing import Any

from .markup import escaped, isolated
from .table import HUMAN, goal

__all__ = ["definitions_section", "rerun_section", "settings_section"]


def settings_section(evaluation: dict[str, Any]) -> str:
    parts = []
    for i, row in enumerate(evaluation["rows"]):
        if row["strategy"] == HUMAN:
            continue
        pairs = "".join(
            f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>"
            for name, value in (row.get("settings") or {}).items()
        )
        kinds = (("command", "On the command line"), ("python", "In Python"))
        blocks = [code(row[key], name) for key, name in kinds if row.get(key)]
        facts = f'<dl class="pairs">{pairs}</dl>' if pairs else '<p class="facts">no settings</p>'
        head = f"<h3>{isolated(row['label'])}</h3>"
        parts.append(f'<section class="setting" id="s-{i}">{head}{facts}{"".join(blocks)}</section>')
    return f'<div class="settings">{"".join(parts)}</div>'


def code(text: str, name: str) -> str:
    """What one copies; the script puts a button beside. Lines may end at white space, not at the hyphens of options."""
    words = (f'<span class="word">{escaped(word)}</span>' if "-" in word else escaped(word) for word in _parts(text))
    return f'<div class="code"><p>{name}</p><pre dir="ltr"><code>{"".join(words)}</code></pre></div>'


def _parts(text: str) -> list[str]:
    """Words, and the white space between them."""
    return re.split(r"(\s+)", text)


def definitions_section(evaluation: dict[str, Any]) -> str:
    rows = evaluation["rows"]
    parts = []
    for i, (key, metric) in enumerate(evaluation["metrics"].items()):
        unit = f' <span class="unit">{escaped(metric["unit"])}</span>' if metric.get("unit") else ""
        words = goal(metric, rows, key)[1]
        text = escaped(metric.get("about") or "")
        direction = f' <span class="facts">{words[0].upper()}{words[1:]}.</span>' if words else ""
        parts.append(f'<div id="m-{i}"><dt>{isolated(metric["name"])}{unit}</dt><dd>{text}{direction}</dd></div>')
    return f'<dl class="definitions">{"".join(parts)}</dl>'


def rerun_section(evaluation: dict[str, Any]) -> str:
    return code(evaluation["command"], "On the command line")
