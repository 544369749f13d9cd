"""Logits of the positions that predict given tokens: of rows of similar length together, and of no others."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..loading import fitting_threads
from .batches import by_length, padded_rows

__all__ = ["AskedRow", "asked_logits", "decoder_inputs"]

_LOGITS = 2**26  # of a batch, unless one row alone has more: 256 MiB in float32


@dataclass(frozen=True)
class AskedRow:
    """What a model reads, and of how many positions, its last ones, the logits are asked for: at least one."""

    inputs: Sequence[int]
    decoder: Sequence[int]  # an encoder-decoder's, else empty
    count: int

    @property
    def end(self) -> int:
        """The positions that have logits, where all of them do."""
        return len(self.decoder or self.inputs)

    @property
    def asked(self) -> range:
        return range(self.end - self.count, self.end)


def decoder_inputs(model: Any, tokens: list[int]) -> list[int]:
    """What an encoder-decoder reads to predict ``tokens``. Each row alone: some models look for the end of a row, where
    padding would matter.

    Raises:
        ValueError: the model does not say.
    """
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        raise ValueError(f"model must have prepare_decoder_input_ids_from_labels, which {type(model).__name__} has not")
    return list(shift(labels=torch.tensor([tokens], device=model.device))[0].tolist())


@torch.no_grad()
def asked_logits(
    model: Any, rows: Sequence[AskedRow], *, batch_rows: int, batch_tokens: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """``(index of a row, its logits (count, V))``, longest rows first.

    A batch is padded on the right behind a mask, so that each row is what it is alone, up to rounding.

    Args:
        model: a causal model or an encoder-decoder of transformers, in evaluation mode.
        batch_rows, batch_tokens: what a batch may hold, padding included, and at most 2²⁶ logits; a longer row goes
            alone.

    Raises:
        ValueError: a model that takes ``logits_to_keep``, and gives neither those nor all.
    """
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].inputs), -len(rows[i].decoder), rows[i].inputs))

    def is_full(batch: list[int], place: int) -> bool:
        together = [rows[order[each]] for each in (*batch, place)]
        count, longest = len(together), max(len(row.inputs) + len(row.decoder) for row in together)
        positions = len(_asked(together)) if keeps else max(row.end for row in together)
        too_long = batch_tokens is not None and count * longest > batch_tokens
        return count > batch_rows or too_long or count * positions * vocabulary > _LOGITS

    with fitting_threads(model):
        for batch in by_length([rows[index].inputs for index in order], is_full):
            together = [rows[order[place]] for place in batch]
            logits, ends = _forward(model, together, keeps)
            for number, (place, row) in enumerate(zip(batch, together, strict=True)):
                yield order[place], logits[number, ends[number] - row.count : ends[number]]


def _asked(batch: Sequence[AskedRow]) -> list[int]:
    return sorted(set().union(*(row.asked for row in batch)))


def _forward(model: Any, batch: Sequence[AskedRow], keeps: bool) -> tuple[Tensor, list[int]]:
    """Logits ``(B, P, V)``, and for each row where in P its own end."""
    # On the right: positions are then those without padding, in every model.
    inputs = padded_rows(model, [row.inputs for row in batch], 0, left=False)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = padded_rows(model, [row.decoder for row in batch], 0, left=False)["input_ids"]
    elif bool(inputs["attention_mask"].all()):
        del inputs["attention_mask"]
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    asked, every = _asked(batch), max(row.end for row in batch)
    if not keeps or len(asked) == every:
        return model(**inputs).logits, [row.end for row in batch]
    # Those that any row asks for; each row's own lie side by side among them.
    place = {position: number for number, position in enumerate(asked)}
    logits = model(**inputs, logits_to_keep=torch.tensor(asked, device=model.device)).logits
    if logits.shape[1] == every:  # it takes the argument, and does not heed it
        return logits, [row.end for row in batch]
    if logits.shape[1] != len(asked):
        raise ValueError(
            f"{type(model).__name__} was asked for the logits of {len(asked)} positions by logits_to_keep, and gave "
            f"{logits.shape[1]}"
        )
    return logits, [place[row.end - 1] + 1 for row in batch]
