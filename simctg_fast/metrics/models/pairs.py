"""Prompts and continuations, as texts or as token ids, made into rows of ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...checks import is_integer
from ...text.texts import text_list

__all__ = ["check_batch_size", "id_rows", "is_blank", "pair_rows", "text_pairs", "text_rows", "window_length"]

Rows = list[list[int]]


def check_batch_size(batch_size: Any) -> None:
    if not is_integer(batch_size, 1):
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r:.80}")


def window_length(limit: int | None, max_length: Any) -> int | None:
    """``max_length``, else ``limit``, what the model's positions hold; None where they have no limit.

    Raises:
        ValueError: no integer of at least 2, or more than the model holds.
    """
    if max_length is None:
        return limit
    if not is_integer(max_length, 2, *(() if limit is None else (limit,))):
        most = "" if limit is None else f" and at most {limit}, which the model holds"
        raise ValueError(f"max_length must be an integer of at least 2{most}, got {max_length!r:.80}")
    return int(max_length)


def id_rows(rows: Any, name: str) -> Rows:
    """Token ids as lists: of lists, arrays or tensors of one dimension.

    Raises:
        ValueError: anything else.
    """
    if isinstance(rows, str | bytes) or not isinstance(rows, Iterable):
        raise ValueError(f"{name} must be a list of lists of token ids, got {rows!r:.80}")
    found: Rows = []
    for index, row in enumerate(rows):
        row = row.tolist() if hasattr(row, "tolist") else row
        if isinstance(row, str) or not isinstance(row, Sequence) or not all(is_integer(token, 0) for token in row):
            raise ValueError(f"{name}[{index}] must be a list of token ids, got {row!r:.80}")
        found.append([int(token) for token in row])
    return found


def text_rows(tokenizer: Any, texts: Any, name: str = "texts", **options: Any) -> Rows:
    """Token ids of every text; with ``tokenizer=None`` the texts are ids already. A text may have no token."""
    if tokenizer is None:
        return id_rows(texts, name)
    texts = text_list(texts, name)
    return [list(row) for row in tokenizer(texts, verbose=False, **options)["input_ids"]] if texts else []


def text_pairs(prompts: Any, continuations: Any) -> tuple[list[Any], list[Any]]:
    """Both as lists of one length; a single string is a list of one.

    Raises:
        ValueError: their numbers differ.
    """
    lists = []
    for name, given in (("prompts", prompts), ("continuations", continuations)):
        if not isinstance(given, str) and not isinstance(given, Iterable):
            raise ValueError(f"{name} must be a list, got {given!r:.80}")
        lists.append([given] if isinstance(given, str) else list(given))
    if len(lists[0]) != len(lists[1]):
        raise ValueError(f"prompts must be {len(lists[1])}, as many as continuations, got {len(lists[0])}")
    return lists[0], lists[1]


def is_blank(text: str) -> bool:
    return not text.strip()


def pair_rows(
    model: Any, tokenizer: Any, prompts: Any, continuations: Any, *, paper_compatible: bool = False
) -> tuple[Rows, Rows]:
    """Ids of prompts and continuations, tokenized apart; with ``tokenizer=None`` both are ids already.

    A continuation gets no special tokens. A prompt gets those of its tokenizer, without the end that some put behind it
    (which a decoder would take for the end of the text); a decoder's prompt without any token becomes its beginning of
    text, or else its end of text. With ``paper_compatible`` a prompt is the beginning of text and its tokens.

    Raises:
        ValueError: the numbers differ; no such special token.
    """
    prompts, continuations = text_pairs(prompts, continuations)
    if tokenizer is None:
        if paper_compatible:
            raise ValueError("tokenizer must be given with paper_compatible=True, got None")
        return id_rows(prompts, "prompts"), id_rows(continuations, "continuations")
    written = text_rows(tokenizer, continuations, "continuations", add_special_tokens=False)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if model.config.is_encoder_decoder:
        if paper_compatible:
            raise ValueError("paper_compatible must be False for an encoder-decoder: the script is for decoders alone")
        return text_rows(tokenizer, prompts, "prompts"), written
    if paper_compatible:
        if bos is None:
            raise ValueError("tokenizer must have a bos_token for paper_compatible=True, got None")
        plain = text_rows(tokenizer, prompts, "prompts", add_special_tokens=False)
        return [[bos, *row] for row in plain], written
    read = text_rows(tokenizer, prompts, "prompts")
    plain = text_rows(tokenizer, prompts, "prompts", add_special_tokens=False)
    for index, (row, own) in enumerate(zip(read, plain, strict=True)):
        ends = (eos, tokenizer.sep_token_id)
        if len(row) > max(1, len(own)) and row[-1] in ends and row[-1:] != own[-1:]:
            row.pop()
        if not row:
            start = bos if bos is not None else eos
            if start is None:
                raise ValueError(
                    f"prompts[{index}] must have a token, and the tokenizer has no bos_token that could stand in for "
                    f"it, got {prompts[index]!r:.80}"
                )
            row.append(start)
    return read, written
