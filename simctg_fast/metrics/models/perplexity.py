"""Perplexity of texts, pooled over their tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ...checks import is_integer
from ...loading import context_length
from .log_probabilities import log_probabilities
from .pairs import text_rows, window_length

__all__ = ["perplexity"]


def perplexity(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str | Sequence[int]],
    *,
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> float:
    """exp of the mean negative log-probability of all tokens of all texts: long texts weigh more. At least 1.

    The first token of a text, most often a special one, is given. A text of more than ``max_length`` tokens is read in
    windows of that length: the first scores all its tokens but the first, each later one ends ``stride`` tokens further
    (the last at the text's end) and scores those that no window before it has scored. So every token is scored once,
    given at least ``max_length - stride`` tokens before it, or all there are.

    Args:
        model: a causal model of transformers.
        tokenizer: its tokenizer, whose special tokens count as tokens. None: the texts are token ids, taken as they
            are.
        texts: strings, or lists of ids.
        max_length: tokens in a window, at least 2; None is what the model's positions hold, or the whole text.
        stride: 1 to ``max_length - 1``; None is half of ``max_length``. The smaller, the more context and time.
        batch_size: windows at a time.

    Raises:
        ValueError: an argument outside the above, an encoder-decoder, no text of two tokens.

    Source: Jelinek et al. 1977. Windows as in transformers' guide to perplexity of fixed-length models.
    """
    if model.config.is_encoder_decoder:
        raise ValueError("model must be causal; log_probabilities scores rows of an encoder-decoder given its prompts")
    length = window_length(context_length(model), max_length)
    if stride is None:
        stride = None if length is None else max(1, length // 2)
    elif length is None or not is_integer(stride, 1, length - 1):
        most = "max_length, which is not given" if length is None else f"max_length={length}"
        raise ValueError(f"stride must be an integer of at least 1 and below {most}, got {stride!r:.80}")
    contexts, scored = [], []
    for row in text_rows(tokenizer, texts):
        for begin, first, end in _windows(len(row), length, stride):
            contexts.append(row[begin:first])
            scored.append(row[first:end])
    if not scored:
        raise ValueError("texts must hold one of at least 2 tokens, got none")
    found = log_probabilities(model, scored, contexts, batch_size=batch_size)
    total, count = math.fsum(float(each.sum()) for each in found), sum(map(len, scored))
    return math.exp(-total / count)


def _windows(tokens: int, length: int | None, stride: int | None) -> list[tuple[int, int, int]]:
    """``(begin, first, end)``: a window reads from ``begin`` and scores ``first`` up to ``end``."""
    if tokens < 2:
        return []
    if length is None or stride is None or tokens <= length:
        return [(0, 1, tokens)]
    found = [(0, 1, length)]
    while (done := found[-1][2]) < tokens:
        end = min(tokens, done + stride)
        found.append((end - length, done, end))
    return found
