"""What an evaluation continues: the prompts of a file, or passages of documentation, with what people wrote."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..text.files import is_utf8
from ..text.texts import read_lines, short

PROMPT_TOKENS = 32  # of a passage of documentation
_KEYS = ("prompt", "messages", "source")  # of which a line has one
_RULER = re.compile(r"^\W{3,}$", re.MULTILINE)  # below a heading
_WORD = re.compile(r"[A-Za-z][a-z'’-]*[.,:;]?")


@dataclass(frozen=True)
class Prompt:
    """``content``: what the engine is to continue, under its key; ``reference``: how a person went on, if known."""

    id: str | int
    content: dict[str, Any]
    reference: str | None = None

    def reference_ids(self, tokenizer: Any, most: int) -> list[int]:
        """The tokens of ``reference``, at most so many; none where it is not known."""
        if self.reference is None:
            return []
        return list(tokenizer(self.reference, add_special_tokens=False, verbose=False)["input_ids"][:most])


def read_prompts(path: str | os.PathLike[str], references: str | os.PathLike[str] | None = None) -> list[Prompt]:
    """The prompts of a ``.txt`` file, one a line, or a ``.jsonl`` one: ``prompt``, ``messages`` or ``source``, ``id``
    and ``reference``, the human continuation. What else a line says is not allowed: settings are the evaluation's.

    Args:
        references: the continuations in a file of their own: ``.jsonl`` lines of ``reference`` (or ``text``), by ``id``
            where they have one, else in the order of the prompts, as ``.txt`` lines are.

    Raises:
        FileNotFoundError, ImportError: as `read_lines`.
        ValueError: a file or a line that is none of that, an id that comes twice, another number of references.
    """
    found: dict[str | int, Prompt] = {}
    for place, line, record in read_lines(path, "prompts"):
        record = {"prompt": line} if record is None else record
        content = {key: record[key] for key in _KEYS if record.get(key) is not None}
        unknown = record.keys() - {"id", "reference", *_KEYS}
        if unknown:
            allowed = f"id, reference and one of {', '.join(_KEYS)}"
            raise ValueError(f"{place}: key {short(min(unknown, key=str))} is not allowed here, only {allowed}")
        if len(content) != 1:
            raise ValueError(f"{place}: must have one of {', '.join(_KEYS)}, got {sorted(content) or 'none'}")
        key = _id(record.get("id", f"line-{place.rpartition(' ')[2]}"), place)
        if key in found:
            raise ValueError(f"{place}: id {short(key)} is that of a line before")
        reference = record.get("reference")
        found[key] = Prompt(key, content, None if reference is None else _text(reference, place))
    if not found:
        raise ValueError(f"{os.fspath(path)!r} holds no prompt")
    if references is None:
        return list(found.values())
    return list(_with_references(found, references))


def _with_references(prompts: Mapping[str | int, Prompt], path: str | os.PathLike[str]) -> Iterator[Prompt]:
    by_id: dict[str | int, str] = {}
    in_order: list[str] = []
    for place, line, record in read_lines(path, "references"):
        text = _text(line if record is None else record.get("reference", record.get("text")), place)
        if record is None or "id" not in record:
            in_order.append(text)
            continue
        key = _id(record["id"], place)
        if key in by_id or key not in prompts:
            what = "comes twice" if key in by_id else "is that of no prompt"
            raise ValueError(f"{place}: id {short(key)} {what}")
        by_id[key] = text
    if by_id and in_order:
        raise ValueError(f"{os.fspath(path)!r}: {len(in_order)} of its lines have no id, but others do")
    if not by_id and len(in_order) != len(prompts):
        raise ValueError(f"{os.fspath(path)!r} has {len(in_order)} references without id for {len(prompts)} prompts")
    for index, prompt in enumerate(prompts.values()):
        reference = by_id.get(prompt.id) if by_id else in_order[index]
        yield Prompt(prompt.id, prompt.content, prompt.reference if reference is None else reference)


def _id(value: Any, place: str) -> str | int:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"{place}: id must be a string with text or an integer, got {short(value)}")
    return value


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: reference must be a string, got {short(value)}")
    if not is_utf8(value):
        raise ValueError(f"{place}: reference holds half of a surrogate pair, got {short(value)}")
    return value


def documentation_prompts(tokenizer: Any, count: int, new_tokens: int) -> list[Prompt]:
    """Passages of the language reference that every Python carries: ``count`` prompts of `PROMPT_TOKENS` tokens from
    all over it, with what follows, ``new_tokens`` tokens of it, as references.

    Raises:
        ValueError: it has too few tokens for so many.
    """
    ids = tokenizer(documentation(), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) - PROMPT_TOKENS - new_tokens < count:
        raise ValueError(f"count is {count}, but Python's documentation has only {len(ids)} tokens; give a file")
    return prompts_of(tokenizer, ids, count, new_tokens, "documentation")


def prompts_of(tokenizer: Any, ids: list[int], count: int, new_tokens: int, name: str) -> list[Prompt]:
    """From all over a text's tokens ``count`` prompts, which have ``name`` and a number as id, with what follows."""
    length = PROMPT_TOKENS + new_tokens
    starts = [index * (len(ids) - length) // count for index in range(count)]
    return [
        split(tokenizer, ids[start : start + length], PROMPT_TOKENS, new_tokens, f"{name}-{index}")
        for index, start in enumerate(starts)
    ]


def split(tokenizer: Any, ids: list[int], at: int, new_tokens: int, name: str) -> Prompt:
    """The first ``at`` tokens as a prompt, and the text of at most ``new_tokens`` that follow as its reference."""
    reference = tokenizer.decode(ids[at : at + new_tokens], skip_special_tokens=True)
    return Prompt(name, {"prompt": list(ids[:at])}, reference)


def documentation() -> str:
    """The prose of Python's language reference, a line a paragraph; what it says depends on Python's version."""
    from pydoc_data.topics import topics

    blocks = (block for name in sorted(topics) for block in re.split(r"\n\s*\n", topics[name]))
    paragraphs = (" ".join(block.split()) for block in blocks if not _RULER.search(block))
    return "\n".join(dict.fromkeys(filter(_is_prose, paragraphs)))


def _is_prose(text: str) -> bool:
    """A sentence, and mostly of plain words: no heading, grammar, table or code."""
    words = text.split()
    plain = sum(_WORD.fullmatch(word) is not None for word in words)
    return len(words) >= 8 and text[0].isupper() and text.endswith((".", ":")) and plain >= 0.7 * len(words)
