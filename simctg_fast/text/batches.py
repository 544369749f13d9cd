"""Texts that are tokens already: cut to a length, put together by it, and padded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .texts import tokenized

__all__ = ["by_length", "cut_rows", "pad_token", "padded_rows", "stacked"]

logger = logging.getLogger("simctg_fast")


def cut_rows(
    tokenizer: Any,
    texts: list[str],
    max_length: int | None,
    table: int | None,
    *,
    room: int | None,
    side: str | None = None,
) -> tuple[list[list[int]], tuple[int, ...]]:
    """The tokens of each text, and the indices of those that were cut to ``max_length``, which a warning names.

    Args:
        table: positions that the model has; None where it computes them.
        room: how many of them a text may take.
        side: ``"left"`` or ``"right"``, where a text is cut; None leaves it to the tokenizer.

    Raises:
        ValueError: as `tokenized`, or a text that is longer than ``room``.
    """
    rows = tokenized(tokenizer, texts, verbose=False)["input_ids"]
    cut = tuple(index for index, row in enumerate(rows) if max_length is not None and len(row) > max_length)
    if cut:
        shown = ", ".join(map(str, cut[:10])) + (", …" if len(cut) > 10 else "")
        logger.warning(
            "%d of %d texts were cut to max_length=%d tokens: texts %s.", len(cut), len(rows), max_length, shown
        )
        before = tokenizer.truncation_side
        tokenizer.truncation_side = side or before
        try:
            for index in cut:  # not by slicing: special tokens stay
                rows[index] = tokenizer(texts[index], truncation=True, max_length=max_length)["input_ids"]
        finally:
            tokenizer.truncation_side = before
    for index, row in enumerate(rows):
        if room is not None and len(row) > room:
            raise ValueError(
                f"texts[{index}] has {len(row)} tokens, but the model's table of positions holds {table}; allowed: "
                f"max_length of at most {room}, which cuts the text"
            )
    return rows, cut


def by_length(rows: Sequence[Sequence[int]], is_full: Callable[[list[int], int], bool]) -> Iterator[list[int]]:
    """Indices of rows of similar length, longest first. ``is_full(batch, index)``: whether a batch is to go without
    that row, which begins the next one."""
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True):
        if batch and is_full(batch, index):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded_rows(model: Any, rows: Sequence[Sequence[int]], pad: int, *, left: bool | None = None) -> dict[str, Any]:
    """``input_ids`` and ``attention_mask`` ``(B, L)`` int64 of rows of any length, on the model's device.

    Padding is on the right for an encoder, on the left for a decoder, whose continuation is written behind the text, or
    where ``left`` says.
    """
    left = not model.config.is_encoder_decoder if left is None else left
    ids, mask = stacked(rows, pad, left=left), stacked([[1] * len(row) for row in rows], 0, left=left)
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def stacked(rows: Sequence[Sequence[int] | Tensor], filling: int, *, left: bool = False) -> Tensor:
    """``(rows, longest)`` int64, what is missing filled in on the right or the ``left``."""
    tensors = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, True, filling, padding_side="left" if left else "right")


def pad_token(tokenizer: Any, config: Any) -> int:
    """What is put where no text is: it is masked, and stands behind an end."""
    known = (tokenizer.pad_token_id, getattr(config, "pad_token_id", None), tokenizer.eos_token_id)
    return next((token for token in known if token is not None), 0)
