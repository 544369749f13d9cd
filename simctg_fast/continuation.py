"""Tokens that continue a text, as text: with the space that stands before them, and one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["CONTEXT", "continuation_pieces", "continuation_text"]

# Tokens of the text before that are decoded along: a character takes four bytes at most, each may be a token.
CONTEXT = 6
_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character (yet)


def continuation_text(
    tokenizer: Any, before: Sequence[int], tokens: Sequence[int], *, skip_special_tokens: bool = True
) -> str:
    """The text of ``tokens`` behind ``before``. Decoded alone, sentencepiece's would lose the space at their beginning.

    Args:
        before: token ids that come before, of which the last few matter; empty where a text begins.
        tokens: the token ids of the continuation.
    """
    head, both = _decoded(tokenizer, before, tokens, skip_special_tokens)
    if head is None:
        return both
    # A text that ends within a character is continued in it; where decoding changes more than that, nothing is known.
    for known in (head, head.rstrip(_UNFINISHED)):
        if both.startswith(known):
            return both[len(known) :]
    return str(tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))


def _decoded(
    tokenizer: Any, before: Sequence[int], tokens: Sequence[int], skip_special_tokens: bool
) -> tuple[str | None, str]:
    context = list(before[-CONTEXT:])
    both = str(tokenizer.decode(context + list(tokens), skip_special_tokens=skip_special_tokens))
    if not context:
        return None, both
    return str(tokenizer.decode(context, skip_special_tokens=skip_special_tokens)), both


def continuation_pieces(
    tokenizer: Any, before: Sequence[int], tokens: Sequence[int], *, skip_special_tokens: bool = True
) -> Iterator[str]:
    """The text that each of ``tokens`` adds; a character that several of them spell comes with the last of these.

    Joined they are `continuation_text`, but for the bytes of a character that is never finished.
    """
    context = list(before[-CONTEXT:])
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        piece = continuation_text(tokenizer, context, pending, skip_special_tokens=skip_special_tokens)
        if piece.endswith(_UNFINISHED) and len(pending) < CONTEXT:
            yield ""
            continue
        yield piece
        context, pending = (context + pending)[-CONTEXT:], []
