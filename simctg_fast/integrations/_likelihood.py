"""Log-likelihoods of continuations: one forward a batch, and a softmax of the rows alone that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..text.asked_logits import AskedRow, asked_logits, decoder_inputs

__all__ = ["Scored", "continuation_log_likelihoods"]

_SOFTMAX_VALUES = 2**24  # at a time

Pair = tuple[list[int], list[int]]  # tokens of the context, tokens of the continuation


@dataclass(frozen=True)
class Scored:
    """The continuation ``index``: its natural log-probability, and whether greedy search would write it."""

    index: int
    total: float
    is_greedy: bool


@dataclass(frozen=True)
class _Row:
    """What the model reads, and the continuations ``(index, tokens)`` that its last positions predict."""

    inputs: tuple[int, ...]
    decoder: tuple[int, ...]  # an encoder-decoder's, else empty
    continuations: list[tuple[int, list[int]]]

    @property
    def asks(self) -> AskedRow:
        return AskedRow(self.inputs, self.decoder, max(len(tokens) for _, tokens in self.continuations))


@torch.no_grad()
def continuation_log_likelihoods(
    model: Any,
    pairs: Sequence[Pair],
    *,
    max_length: int,
    batch_rows: int = 16,
    batch_tokens: int = 4096,
    softmax_dtype: torch.dtype | None = None,
) -> Iterator[Scored]:
    """The log-probability of each continuation behind its context, rows of similar length together, longest first.

    Pairs of the same tokens but the last (the answers of a question, often) are one row. A decoder reads the last
    ``max_length`` tokens of both but the very last; an encoder-decoder's encoder the last ``max_length`` of the
    context.

    Args:
        model: a causal model or an encoder-decoder of transformers, in evaluation mode.
        pairs: token ids of contexts and continuations, neither empty, continuations of at most ``max_length``.
        batch_rows, batch_tokens: what a batch may hold, padding included; a longer row goes alone.
        softmax_dtype: of the softmax and the sums; None is that of the logits.

    Raises:
        ValueError: an encoder-decoder that does not say how its decoder's input is made.
    """
    rows = (
        _decoder_rows(pairs, max_length)
        if not model.config.is_encoder_decoder
        else _encoder_decoder_rows(model, pairs, max_length)
    )
    asks = [row.asks for row in rows]
    for index, logits in asked_logits(model, asks, batch_rows=batch_rows, batch_tokens=batch_tokens):
        yield from _scores(logits, rows[index].continuations, softmax_dtype)


def _decoder_rows(pairs: Sequence[Pair], max_length: int) -> list[_Row]:
    rows: dict[tuple[int, ...], _Row] = {}
    for index, (context, continuation) in enumerate(pairs):
        inputs = tuple((context + continuation)[-(max_length + 1) :][:-1])
        rows.setdefault(inputs, _Row(inputs, (), [])).continuations.append((index, continuation))
    return list(rows.values())


def _encoder_decoder_rows(model: Any, pairs: Sequence[Pair], max_length: int) -> list[_Row]:
    rows: dict[tuple[tuple[int, ...], tuple[int, ...]], _Row] = {}
    for index, (context, continuation) in enumerate(pairs):
        key = tuple(context[-max_length:]), tuple(continuation)
        if key not in rows:
            rows[key] = _Row(key[0], tuple(decoder_inputs(model, continuation)), [])
        rows[key].continuations.append((index, continuation))
    return list(rows.values())


def _scores(
    logits: Tensor, continuations: Sequence[tuple[int, list[int]]], dtype: torch.dtype | None
) -> Iterator[Scored]:
    """``logits (P, V)``, of whose positions the last predicts the last token of each continuation."""
    end = len(logits)
    step = max(1, _SOFTMAX_VALUES // logits.shape[-1])
    picked: list[list[Tensor]] = [[] for _ in continuations]
    greedy = [True] * len(continuations)
    for start in range(0, end, step):
        stop = min(start + step, end)
        part = logits[start:stop].log_softmax(dim=-1, dtype=dtype)
        best = part.argmax(dim=-1)
        for number, (_, tokens) in enumerate(continuations):
            begins = end - len(tokens)
            first = max(start, begins)
            there = tokens[first - begins : max(first, stop) - begins]
            wanted = torch.tensor(there, dtype=torch.long, device=logits.device)
            picked[number].append(part[first - start :].gather(-1, wanted[:, None]).squeeze(-1))
            greedy[number] &= bool((best[first - start :] == wanted).all())
    for number, (index, _) in enumerate(continuations):
        yield Scored(index, float(torch.cat(picked[number]).sum()), greedy[number])
