"""Log-likelihoods of continuations: one forward a batch, and a softmax of the rows alone that are asked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..loading import fitting_threads
from ..text.batches import by_length, padded_rows

__all__ = ["Scored", "continuation_log_likelihoods"]

_LOGIT_BYTES = 256 * 2**20  # of a batch, unless a single row has more
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
    def end(self) -> int:
        """The positions that have logits, where all of them do."""
        return len(self.decoder or self.inputs)

    @property
    def asked(self) -> range:
        """The positions whose logits predict a token of a continuation."""
        return range(self.end - max(len(tokens) for _, tokens in self.continuations), self.end)


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
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    positions = max(1, _LOGIT_BYTES // (4 * vocabulary))
    with fitting_threads(model):
        for batch in _batches(rows, batch_rows, batch_tokens, positions, _keeps_rows(model)):
            logits, ends = _forward(model, batch)
            for number, row in enumerate(batch):
                yield from _scores(logits[number], ends[number], row, softmax_dtype)


def _keeps_rows(model: Any) -> bool:
    """Whether it can be asked for the logits of some positions."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _decoder_rows(pairs: Sequence[Pair], max_length: int) -> list[_Row]:
    rows: dict[tuple[int, ...], _Row] = {}
    for index, (context, continuation) in enumerate(pairs):
        inputs = tuple((context + continuation)[-(max_length + 1) :][:-1])
        rows.setdefault(inputs, _Row(inputs, (), [])).continuations.append((index, continuation))
    return list(rows.values())


def _encoder_decoder_rows(model: Any, pairs: Sequence[Pair], max_length: int) -> list[_Row]:
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        raise ValueError(
            f"{type(model).__name__} has no prepare_decoder_input_ids_from_labels: likelihoods of this "
            "encoder-decoder cannot be computed"
        )
    rows: dict[tuple[tuple[int, ...], tuple[int, ...]], _Row] = {}
    for index, (context, continuation) in enumerate(pairs):
        key = tuple(context[-max_length:]), tuple(continuation)
        if key not in rows:
            # Each alone: some models look for the end of a row, so its padding would matter.
            decoder = shift(labels=torch.tensor([continuation], device=model.device))[0].tolist()
            rows[key] = _Row(key[0], tuple(decoder), [])
        rows[key].continuations.append((index, continuation))
    return list(rows.values())


def _batches(
    rows: list[_Row], batch_rows: int, batch_tokens: int, positions: int, keeps_rows: bool
) -> Iterator[list[_Row]]:
    """``positions``: how many of them may have logits in a batch."""
    rows = sorted(rows, key=lambda row: (-len(row.inputs), -len(row.decoder), row.inputs))

    def is_full(batch: list[int], index: int) -> bool:
        together = [rows[place] for place in (*batch, index)]
        asked = len(set().union(*(row.asked for row in together))) if keeps_rows else max(row.end for row in together)
        longest = max(len(row.inputs) + len(row.decoder) for row in together)
        count = len(together)
        return count > batch_rows or count * longest > batch_tokens or count * asked > positions

    for batch in by_length([row.inputs for row in rows], is_full):
        yield [rows[index] for index in batch]


def _forward(model: Any, batch: list[_Row]) -> tuple[Tensor, list[int]]:
    """Logits ``(B, P, V)``, and for each row where in P its own end."""
    # On the right: positions are then those without padding, in every model.
    inputs = padded_rows(model, [row.inputs for row in batch], 0, left=False)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = padded_rows(model, [row.decoder for row in batch], 0, left=False)["input_ids"]
    elif bool(inputs["attention_mask"].all()):
        del inputs["attention_mask"]
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    asked = sorted(set().union(*(row.asked for row in batch)))
    if not _keeps_rows(model) or len(asked) == max(row.end for row in batch):
        return model(**inputs).logits, [row.end for row in batch]
    # Those that any row asks for; each row's own lie side by side among them.
    place = {position: number for number, position in enumerate(asked)}
    inputs["logits_to_keep"] = torch.tensor(asked, device=model.device)
    logits = model(**inputs).logits
    if logits.shape[1] != len(asked):
        raise ValueError(
            f"{type(model).__name__} was asked for the logits of {len(asked)} positions by logits_to_keep, and gave "
            f"{logits.shape[1]}"
        )
    return logits, [place[row.end - 1] + 1 for row in batch]


def _scores(logits: Tensor, end: int, row: _Row, dtype: torch.dtype | None) -> Iterator[Scored]:
    """``logits (P, V)``; position ``end - 1`` predicts the last token of each continuation of ``row``."""
    begin = end - len(row.asked)
    step = max(1, _SOFTMAX_VALUES // logits.shape[-1])
    picked: list[list[Tensor]] = [[] for _ in row.continuations]
    greedy = [True] * len(row.continuations)
    for start in range(begin, end, step):
        stop = min(start + step, end)
        part = logits[start:stop].log_softmax(dim=-1, dtype=dtype)
        best = part.argmax(dim=-1)
        for number, (_, tokens) in enumerate(row.continuations):
            begins = end - len(tokens)
            first = max(start, begins)
            there = tokens[first - begins : max(first, stop) - begins]
            wanted = torch.tensor(there, dtype=torch.long, device=logits.device)
            picked[number].append(part[first - start :].gather(-1, wanted[:, None]).squeeze(-1))
            greedy[number] &= bool((best[first - start :] == wanted).all())
    for number, (index, _) in enumerate(row.continuations):
        yield Scored(index, float(torch.cat(picked[number]).sum()), greedy[number])
