"""Log-probabilities of token ids, batched: the softmax in float64, a few positions at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...loading import context_length
from ...text.asked_logits import AskedRow, asked_logits, decoder_inputs
from ...text.features import evaluation_mode
from .pairs import check_batch_size, id_rows

__all__ = ["log_probabilities"]

_SOFTMAX = 2**22  # logits in float64 at a time: 32 MiB


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
    asked = list(_asked(model, rows, starts))
    with evaluation_mode(model):
        for place, logits in asked_logits(model, [row for _, row in asked], batch_rows=batch_size):
            index, row = asked[place]
            found[index] = _picked(logits, rows[index][-row.count :], index)
    return found


def _asked(model: Any, rows: list[list[int]], prompts: list[list[int]] | None) -> Iterator[tuple[int, AskedRow]]:
    """Index and row of those that have a token to score."""
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
    for index, row in enumerate(rows):
        prompt = row[:1] if prompts is None else prompts[index]
        scored = row[1:] if prompts is None else row
        if prompts is not None and not prompt:
            raise ValueError(f"prompts[{index}] must have at least one token, got none")
        read = max(len(prompt), len(scored)) if is_pair else len(prompt) + len(scored)
        if limit is not None and read > limit:
            raise ValueError(f"rows[{index}] has {read} tokens with its prompt, must be at most {limit} for this model")
        if scored and is_pair:
            yield index, AskedRow(prompt, decoder_inputs(model, scored), len(scored))
        elif scored:
            yield index, AskedRow([*prompt, *scored][:-1], [], len(scored))


def _size(embedding: Any) -> int | None:
    weight = getattr(embedding, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _picked(logits: Tensor, scored: list[int], index: int) -> Tensor:
    """``(P, V)`` logits to ``(P,)`` log-probabilities of the tokens."""
    tokens = torch.tensor(scored, device=logits.device)
    step = max(1, _SOFTMAX // logits.shape[-1])
    parts = []
    for some, wanted in zip(logits.split(step), tokens.split(step), strict=True):
        exact = some.double()
        parts.append(exact.gather(-1, wanted[:, None]).squeeze(-1) - exact.logsumexp(dim=-1))
    found = torch.cat(parts).cpu()
    if bool(found.isnan().any()):
        raise ValueError(f"rows[{index}] must have a probability, but the model's logits of it are not finite")
    return found
