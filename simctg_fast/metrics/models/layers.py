"""Isotropy and self-similarity of every layer of a model on texts."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...text.batches import by_length, padded_rows
from ...text.features import _backbone, _room, evaluation_mode
from .pairs import check_batch_size, text_rows, window_length

__all__ = ["isotropy_by_layer", "self_similarity_by_layer"]


def isotropy_by_layer(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str | Sequence[int]],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
) -> list[float]:
    """``1 - self_similarity`` of each layer: near 1 its states spread over all directions, near 0 they share a cone.

    Arguments, order and errors as `self_similarity_by_layer`.

    Source: Su and Collier 2023, section 3; their ``compute_language_model_isotropy.py`` (the last layer, two decimals)
    sums over all pairs of all texts before it divides, as here.
    """
    found = self_similarity_by_layer(model, tokenizer, texts, batch_size=batch_size, max_length=max_length)
    return [1.0 - each for each in found]


@torch.no_grad()
def self_similarity_by_layer(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str | Sequence[int]],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
) -> list[float]:
    """The mean cosine of two different positions of one text, for each layer, in [-1, 1]; in float64.

    Every pair counts once, so a text of n tokens has a weight of n(n - 1), and one of fewer than two none;
    `simctg_fast.metrics.isotropy` averages over sequences instead. The pair of a position with itself does not count.
    (Ethayarajh 2019 calls self-similarity the cosine of one *word* in different contexts, and this intra-sentence
    likeness of all words; the name here is Su and Collier's.)

    Args:
        model: a transformers model, with or without a head; of an encoder-decoder the encoder.
        tokenizer: its tokenizer, special tokens included. None: the texts are token ids.
        texts: strings, or lists of ids.
        batch_size: texts at a time.
        max_length: tokens that a text is cut to, at least 2; None is what the model's table of positions holds, or the
            whole text.

    Returns:
        As many values as the model's ``hidden_states``: 0 the embeddings, -1 the last layer behind the final norm. A
        zero vector has cosine 0 to everything.

    Raises:
        ValueError: an argument outside the above, no text of two tokens, states that are not finite.

    Source: Su and Collier 2023, section 3; Ethayarajh 2019, "How Contextual are Contextualized Word Representations?".
    """
    check_batch_size(batch_size)
    backbone = _backbone(model)
    length = window_length(_room(backbone), max_length)
    rows = [row for row in (each[:length] for each in text_rows(tokenizer, texts)) if len(row) > 1]
    if not rows:
        raise ValueError("texts must hold one of at least 2 tokens, got none")
    options = {"use_cache": False} if "use_cache" in inspect.signature(backbone.forward).parameters else {}
    cosines: list[float] = []
    with evaluation_mode(backbone):
        for batch in by_length(rows, lambda batch, _: len(batch) >= batch_size):
            inputs = padded_rows(backbone, [rows[index] for index in batch], 0, left=False)
            layers = backbone(**inputs, **options, output_hidden_states=True).hidden_states
            cosines = cosines or [0.0] * len(layers)
            for place, states in enumerate(layers):
                cosines[place] += _pair_sum(states, inputs["attention_mask"], place)
    pairs = sum(len(row) * (len(row) - 1) for row in rows)
    return [each / pairs for each in cosines]


def _pair_sum(states: Tensor, mask: Tensor, layer: int) -> float:
    """The cosines of all ordered pairs of different real positions of each row, summed."""
    states = states.double().masked_fill(mask.eq(0).unsqueeze(-1), 0.0)
    if not bool(states.isfinite().all()):
        raise ValueError(f"texts must have finite hidden states, but those of layer {layer} are not")
    largest = states.abs().amax(dim=-1, keepdim=True)  # divided out, no square overflows or vanishes
    unit = torch.nn.functional.normalize(states / torch.where(largest > 0, largest, 1.0), dim=-1)
    # All pairs are the squared length of the sum of the unit vectors; the diagonal is taken off again.
    return float(unit.sum(dim=1).square().sum() - unit.square().sum())
