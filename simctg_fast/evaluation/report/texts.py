"""What the strategies wrote, side by side, with what they wrote twice underlined."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from ...checks import require
from .markup import escaped, isolated, number, shown

__all__ = ["texts_section"]


def texts_section(evaluation: dict[str, Any]) -> str:
    """One article a prompt, all of them there; the script shows one at a time."""
    labels = {row["strategy"]: row["label"] for row in evaluation["rows"]}
    order = list(labels)
    unit = (evaluation["metrics"].get("diversity") or {}).get("unit") or ""
    texts = evaluation["texts"]
    parts = []
    for i, text in enumerate(texts):
        written = sorted(text["written"].items(), key=lambda item: order.index(item[0]) if item[0] in order else 99)
        columns = "".join(_column(name, labels.get(name, name), one, unit) for name, one in written)
        name = f'<span class="id">{isolated(text["id"])}</span>' if text.get("id") not in (None, "") else ""
        parts.append(
            f'<article class="prompt" id="t-{i}" aria-labelledby="t-{i}-head">'
            f'<h3 id="t-{i}-head">Prompt {i + 1} of {len(texts)} {name}</h3>'
            f'<blockquote class="text" dir="auto">{escaped(text["prompt"])}</blockquote>'
            f'<div class="columns">{columns}</div></article>'
        )
    return (
        "<p>What each strategy wrote behind the same prompt. <mark>Marked and underlined</mark> is what repeats: a "
        "token in a sequence of four that the text had before. A text in a loop is underlined nearly everywhere.</p>"
        f'<div id="choose-text" class="controls"></div><div id="prompts">{"".join(parts)}</div>'
    )


def _column(strategy: str, label: str, one: dict[str, Any], unit: str) -> str:
    tokens, marks = len(one["pieces"]), len(one["repeated"])
    require(marks == tokens, f"repeated of {strategy!r}", marks, f"as long as its pieces, {tokens}")
    facts = []
    if shown(one.get("tokens")):
        facts.append(f"{number(one['tokens'], 0)} {'token' if one['tokens'] == 1 else 'tokens'}")
    if shown(one.get("diversity")):
        facts.append(" ".join(filter(None, ["diversity", number(one["diversity"], 1), escaped(unit)])))
    facts.append(f"{_share(one['repeated'])}\u00a0% repeated")
    return (
        f'<section class="written" data-strategy="{escaped(strategy)}"><h4>{isolated(label)}</h4>'
        f'<p class="facts">{" · ".join(facts)}</p>'
        f'<div class="text" dir="auto">{_marked(one["pieces"], one["repeated"]) or _NOTHING}</div></section>'
    )


_NOTHING = '<span class="nothing">nothing was written</span>'


def _share(repeated: list[bool]) -> str:
    return number(100 * sum(map(bool, repeated)) / max(1, len(repeated)), 0)


def _marked(pieces: list[str], repeated: list[bool]) -> str:
    """Runs of repeated tokens in one ``<mark>`` each; a space before the first word is there, but takes no room."""
    parts: list[str] = []
    for again, run in groupby(zip(pieces, repeated, strict=True), key=lambda pair: bool(pair[1])):
        text = escaped("".join(piece for piece, _ in run))
        if not parts and text.startswith(" ") and text.strip():
            text = f'<span class="gap"> </span>{text[1:]}'
        parts.append(f"<mark>{text}</mark>" if again and text else text)
    return "".join(parts)
