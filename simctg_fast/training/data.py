"""Text files to token sequences for training: what `simctg-fast train --data` reads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..text.files import is_utf8
from ..text.texts import read_lines, short

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Collator", "Example", "encode", "read_examples"]

IGNORE_INDEX = -100
_PAIRS = (("source", "target"), ("prompt", "completion"))


@dataclass(frozen=True)
class Example:
    """A text to be learned, and for a pair the text it follows."""

    text: str
    source: str | None = None


def read_examples(path: str | os.PathLike[str]) -> list[Example]:
    """The texts of a file, empty ones left out.

    * ``.txt``: one text a line
    * ``.jsonl``: one object a line, with ``text``, or ``source`` and ``target``, or ``prompt`` and ``completion``

    Either may be packed, as ``.gz`` or ``.zst``. Not from a pipe: training looks at its data again when it goes on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another ending, a pipe, a line that is not UTF-8 or not one of these objects (the text names it), or
            no text at all.
        ImportError: ``.zst`` without the package `zstandard`.
    """
    examples = []
    for place, line, record in read_lines(path, "data", only_files="training reads its data more than once"):
        example = Example(line.strip()) if record is None else _parse(record, place, line)
        if example.text.strip():
            examples.append(example)
    if not examples:
        raise ValueError(f"{os.fspath(path)!r} holds no text")
    return examples


def _parse(record: dict[str, Any], place: str, line: str) -> Example:
    for names in (*_PAIRS, ("text",)):
        texts = [text for name in names if isinstance(text := record.get(name), str)]
        if len(texts) < len(names):
            continue
        for name, text in zip(names, texts, strict=True):
            if not is_utf8(text):
                raise ValueError(f"{place}: {name} holds half of a surrogate pair, got {short(text)}")
        return Example(texts[-1], texts[0] if len(texts) > 1 else None)
    raise ValueError(
        f"{place}: must be an object with text, source and target, or prompt and completion, got {short(line.strip())}"
    )


def encode(
    examples: Sequence[Example], tokenizer: Any, max_length: int, *, is_encoder_decoder: bool, pack: bool = False
) -> list[dict[str, list[int]]]:
    """``input_ids`` and ``labels`` of each sequence, at most ``max_length`` tokens each.

    A decoder's text is cut into consecutive pieces, so that nothing is lost; of a pair the source loses its beginning,
    and its labels are -100. An encoder-decoder's source and target are each cut at the end.

    Args:
        pack: join a decoder's texts, each with its end-of-sequence token, and cut the whole into pieces of
            ``max_length``. Faster on short texts, but the contrastive loss then compares tokens of neighbouring texts.

    Raises:
        ValueError: an encoder-decoder without pairs, packing of pairs, or nothing of at least two tokens.
    """
    pairs = [example for example in examples if example.source is not None]
    if is_encoder_decoder:
        if len(pairs) < len(examples):
            raise ValueError(
                "an encoder-decoder is trained on pairs: a .jsonl file with source and target on every line"
            )
        rows = _encode_for_encoder_decoder(pairs, tokenizer, max_length)
    elif pack:
        if pairs:
            raise ValueError("pairs cannot be packed: their sources are not learned, and lines would share a row")
        stream = [token for example in examples for token in _ended(tokenizer, example.text)]
        rows = [{"input_ids": piece, "labels": piece} for piece in _pieces(stream, max_length)]
    else:
        rows = [row for example in examples for row in _encode_for_decoder(example, tokenizer, max_length)]
    if not rows:
        raise ValueError("no text has at least two tokens")
    return rows


def _ended(tokenizer: Any, text: str, special_tokens: bool = True) -> list[int]:
    ids = tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _pieces(ids: list[int], max_length: int) -> Iterator[list[int]]:
    for start in range(0, len(ids), max_length):
        if len(piece := ids[start : start + max_length]) > 1:  # a single token predicts nothing
            yield piece


def _encode_for_decoder(example: Example, tokenizer: Any, max_length: int) -> Iterable[dict[str, list[int]]]:
    if example.source is None:
        return [{"input_ids": piece, "labels": piece} for piece in _pieces(_ended(tokenizer, example.text), max_length)]
    target = _ended(tokenizer, example.text, special_tokens=False)[: max_length - 1]
    source = tokenizer(example.source, verbose=False)["input_ids"]
    source = source[max(0, len(source) + len(target) - max_length) :]
    if not source and len(target) < 2:
        return []
    return [{"input_ids": source + target, "labels": [IGNORE_INDEX] * len(source) + target}]


def _encode_for_encoder_decoder(pairs: list[Example], tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    options = {"truncation": True, "max_length": max_length, "verbose": False}
    sources = tokenizer([example.source for example in pairs], **options)["input_ids"]
    targets = tokenizer(text_target=[example.text for example in pairs], **options)["input_ids"]
    return [{"input_ids": source, "labels": target} for source, target in zip(sources, targets, strict=True)]


@dataclass(frozen=True)
class Collator:
    """Rows of `encode` to tensors ``(B, T)``, padded on the right: ``input_ids``, ``attention_mask``, ``labels``."""

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        from ..text.batches import stacked  # with torch, which options and their checks do without

        inputs, labels = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
        return {
            "input_ids": stacked(inputs, self.pad_token_id),
            "attention_mask": stacked([[1] * len(row) for row in inputs], 0),
            "labels": stacked(labels, IGNORE_INDEX),
        }
