"""The page as a whole: one file with its style and script in it, which may ask for nothing and run nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from datetime import datetime
from importlib.resources import files
from typing import Any

from ...checks import require
from ..heat_map import heat_map_png
from .figures import grid_section, isotropy_section, similarity_section
from .markup import escaped, isolated, listed, number, shown
from .settings import definitions_section, rerun_section, settings_section
from .table import HUMAN, figures_table
from .texts import texts_section

__all__ = ["render"]

Section = Callable[[dict[str, Any]], str]
# Key of the section, its heading, its name in the list of contents, what has to be there, and what makes it.
_SECTIONS: tuple[tuple[str, str, str, str, Section], ...] = (
    ("figures", "Figures", "Figures", "rows", figures_table),
    ("texts", "Texts", "Texts", "texts", texts_section),
    ("similarity", "Similarity of the states", "Similarity", "similarity", similarity_section),
    ("isotropy", "Isotropy by layer", "Isotropy", "isotropy", isotropy_section),
    ("grid", "Which α and k", "α and k", "grid", grid_section),
    ("settings", "Settings to copy", "Settings", "rows", settings_section),
    ("definitions", "What the figures mean", "Definitions", "metrics", definitions_section),
    ("rerun", "This page again", "Rerun", "command", rerun_section),
)
_ICON = ((1.0, 0.3, 0.1, 0.6), (0.3, 1.0, 0.4, 0.2), (0.1, 0.4, 1.0, 0.5), (0.6, 0.2, 0.5, 1.0))


def render(evaluation: dict[str, Any]) -> str:
    """The page of an evaluation as HTML: self-contained, readable without a script, printable.

    Args:
        evaluation: what `simctg-fast eval` found, plain JSON values. ``model``, ``metrics`` and ``rows`` are needed;
            parts that are absent, None or empty are left out.

    Raises:
        ValueError: it is no dict, or lacks one of these.
    """
    require(isinstance(evaluation, dict), "evaluation", evaluation, "a dict")
    missing = [key for key in ("model", "metrics", "rows") if key not in evaluation]
    if missing:
        raise ValueError(f"evaluation must hold model, metrics and rows, but lacks {listed(missing)}")
    style, script = (files(__package__).joinpath(name).read_text("utf-8") for name in ("style.css", "script.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    icon = base64.b64encode(heat_map_png(_ICON)).decode()
    model = isolated(evaluation["model"])
    sections = [one for one in _SECTIONS if evaluation.get(one[3])]
    links = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, _, name, _, _ in sections)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-head"><h2 id="{key}-head">{head}</h2>{make(evaluation)}</section>'
        for key, head, _, _, make in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f'<link rel="icon" href="data:image/png;base64,{icon}">'
        f"<title>How {escaped(evaluation['model'])} writes</title><style>{style}</style></head><body>"
        '<a class="skip" href="#content">To the content</a>'
        f'<header><p class="eyebrow">simctg-fast eval</p><h1>How {model} writes</h1>{_lead(evaluation)}'
        f"{_facts(evaluation)}</header>"
        f'<nav aria-label="On this page"><ul>{links}</ul></nav>'
        f'<main id="content" tabindex="-1">{_conclusion(evaluation)}{body}</main>'
        f"<footer><p>Made by simctg_fast{_version(evaluation)}. One file, which loads and sends nothing.</p></footer>"
        f'<p id="said" class="unseen" role="status"></p><script>{script}</script></body></html>\n'
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _lead(evaluation: dict[str, Any]) -> str:
    names = [isolated(row["label"]) for row in evaluation["rows"] if row["strategy"] != HUMAN]
    beside = ", beside what people wrote" if len(names) < len(evaluation["rows"]) else ""
    return f'<p class="lead">With {listed(names)}{beside}.</p>' if names else ""


def _facts(evaluation: dict[str, Any]) -> str:
    """What was run, where and with what."""
    most = evaluation.get("max_new_tokens")
    facts = [
        ("date", _date(evaluation.get("created"))),
        ("machine", isolated(evaluation["machine"]) if evaluation.get("machine") else ""),
        ("prompts", number(evaluation["prompts"], 0) if shown(evaluation.get("prompts")) else ""),
        ("new tokens", f"{number(most, 0)} at most" if shown(most) else ""),
        ("precision", isolated(evaluation["dtype"]) if evaluation.get("dtype") else ""),
        ("seed", isolated(evaluation["seed"]) if evaluation.get("seed") is not None else ""),
        ("versions", ", ".join(isolated(f"{k} {v}") for k, v in (evaluation.get("versions") or {}).items())),
    ]
    return f'<dl class="facts-list">{"".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts if v)}</dl>'


def _date(text: Any) -> str:
    if not text:
        return ""
    try:
        when = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return isolated(text)
    zone = when.tzname() or ""
    return f'<time datetime="{escaped(text)}">{when.day} {when:%B %Y, %H:%M} {escaped(zone)}</time>'


def _conclusion(evaluation: dict[str, Any]) -> str:
    sentences = evaluation.get("conclusion") or []
    if not sentences:
        return ""
    items = "".join(f"<li>{escaped(sentence)}</li>" for sentence in sentences)
    head = '<section id="conclusion" aria-labelledby="conclusion-head"><h2 id="conclusion-head">In short</h2>'
    return f"{head}<ul>{items}</ul></section>"


def _version(evaluation: dict[str, Any]) -> str:
    version = (evaluation.get("versions") or {}).get("simctg_fast")
    return f" {isolated(version)}" if version else ""
