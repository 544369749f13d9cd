"""Log-probabilities of token ids, batched: the softmax in float64, a few positions at a time."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...loading import context_length
from ...text.batches import by_length, padded_rows
from ...text.features import evaluation_mode
from .pairs import check_batch_size, id_rows

__all__ = ["log_probabilities"]

_LOGITS = 2**26  # of a batch, unless one row alone has more: 256 MiB in float32
_SOFTMAX = 2**22  # logits in float64 at a time: 32 MiB


@dataclass(frozen=True)
class _Row:
    """What the model reads, and what its last ``len(scored)`` positions predict."""

    index: int
    inputs: list[int]  # an encoder-decoder's prompt, else the text without its last token
    decoder: list[int]  # an encoder-decoder's, else empty
    scored: list[int]

    @property
    def end(self) -> int:
        return len(self.decoder or self.inputs)

    @property
    def begin(self) -> int:
        return self.end - len(self.scored)


@torch.no_grad()
def log_probabilities(
    model: Any, rows: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]] | None = None, *, batch_size: int = 8
) -> list[Tensor]:
    """The natural log-probability of every token of each row, given all before it and the row's prompt.

    Rows of similar length run together, padded on the right behind a mask, so each is what it is alone up to rounding.
    Logits are the model's, in its dtype; the softmax over them is in float64.

    Args:
        model: a causal model or an encoder-decoder of transformers; run in evaluation mode and left in its own.
        rows: token ids. They are taken as they are: special tokens are the caller's affair.
        prompts: ids that each row goes on from, at least one token each; of an encoder-decoder what its encoder reads.
            None, for causal models only: the first token of a row is then given, and not scored.
        batch_size: rows at a time at most; fewer where their logits would be more than 2²⁶ numbers.

    Returns:
        Float64 on the CPU: ``(len(row),)`` with prompts, ``(max(0, len(row) - 1),)`` without.

    Raises:
        ValueError: an argument outside the above, an id outside the vocabulary, a row that is longer with its prompt
            than the model's context, logits that are NaN.
    """
    check_batch_size(batch_size)
    rows = id_rows(rows, "rows")
    starts = None if prompts is None else id_rows(prompts, "prompts")
    found = [torch.empty(0, dtype=torch.float64) for _ in rows]
    asked = [row for row in _asked(model, rows, starts) if row.scored]
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    vocabulary = model.config.get_text_config(decoder=True).vocab_size

    def is_full(batch: list[int], index: int) -> bool:
        together = [asked[place] for place in (*batch, index)]
        first = min(row.begin for row in together) if keeps else 0
        positions = max(row.end for row in together) - first
        return len(batch) >= batch_size or len(together) * positions * vocabulary > _LOGITS

    with evaluation_mode(model):
        for batch in by_length([row.inputs + row.decoder for row in asked], is_full):
            together = [asked[place] for place in batch]
            logits, first = _forward(model, together, keeps)
            for number, row in enumerate(together):
                found[row.index] = _picked(logits[number, row.begin - first : row.end - first], row)
    return found


def _asked(model: Any, rows: list[list[int]], prompts: list[list[int]] | None) -> list[_Row]:
    is_pair, limit = model.config.is_encoder_decoder, context_length(model)
    if prompts is None and is_pair:
        raise ValueError("prompts must be given to an encoder-decoder, which scores a row given what it has read")
    if prompts is not None and len(prompts) != len(rows):
        raise ValueError(f"prompts must be {len(rows)}, as many as rows, got {len(prompts)}")
    sizes = {"rows": _size(model.get_output_embeddings()), "prompts": _size(model.get_input_embeddings())}
    for name, each in (("rows", rows), ("prompts", prompts or [])):
        for index, row in enumerate(each):
            size = sizes[name]
            if size is not None and row and max(row) >= size:
                raise ValueError(f"{name}[{index}] must be ids below {size}, the vocabulary, got {max(row)}")
    found = []
    for index, row in enumerate(rows):
        prompt = row[:1] if prompts is None else prompts[index]
        scored = row[1:] if prompts is None else row
        if prompts is not None and not prompt:
            raise ValueError(f"prompts[{index}] must have at least one token, got none")
        read = max(len(prompt), len(scored)) if is_pair else len(prompt) + len(scored)
        if limit is not None and read > limit:
            raise ValueError(f"rows[{index}] has {read} tokens with its prompt, must be at most {limit} for this model")
        if not is_pair:
            found.append(_Row(index, [*prompt, *scored][:-1], [], scored))
        else:
            found.append(_Row(index, prompt, _decoder_inputs(model, scored) if scored else [], scored))
    return found


def _size(embedding: Any) -> int | None:
    weight = getattr(embedding, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _decoder_inputs(model: Any, tokens: list[int]) -> list[int]:
    """Each row alone: some models look for the end of a row, where padding would matter."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        raise ValueError(f"model must have prepare_decoder_input_ids_from_labels, which {type(model).__name__} has not")
    return shift(labels=torch.tensor([tokens], device=model.device))[0].tolist()


def _forward(model: Any, batch: list[_Row], keeps: bool) -> tuple[Tensor, int]:
    """Logits ``(B, P, V)``, and the position of the first of them."""
    inputs = padded_rows(model, [row.inputs for row in batch], 0, left=False)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = padded_rows(model, [row.decoder for row in batch], 0, left=False)["input_ids"]
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    first, end = min(row.begin for row in batch), max(row.end for row in batch)
    if not keeps or not first:
        return model(**inputs).logits, 0
    logits = model(**inputs, logits_to_keep=torch.arange(first, end, device=model.device)).logits
    return logits, (first if logits.shape[1] == end - first else 0)


def _picked(logits: Tensor, row: _Row) -> Tensor:
    """``(P, V)`` logits to ``(P,)`` log-probabilities of the scored tokens."""
    tokens = torch.tensor(row.scored, device=logits.device)
    step = max(1, _SOFTMAX // logits.shape[-1])
    parts = []
    for some, wanted in zip(logits.split(step), tokens.split(step), strict=True):
        exact = some.double()
        parts.append(exact.gather(-1, wanted[:, None]).squeeze(-1) - exact.logsumexp(dim=-1))
    found = torch.cat(parts).cpu()
    if bool(found.isnan().any()):
        raise ValueError(f"rows[{row.index}] must have a probability, but the model's logits of it are not finite")
    return found
