"""In-batch negatives over columns of embeddings: which pairs a softmax holds, and with which weights.

All of it is made of log-sum-exps over tiles (`ops/simcse.py`) and of cosines of single pairs, so memory is linear in
the rows: a row's own documents, which other weights apply to, are left out of the tiles and come in one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_real
from .distributed import gather_columns
from .ops.simcse import cosines, pair_loss, pair_lse

__all__ = [
    "DIRECTIONS",
    "HARDNESS_MODES",
    "PARTITION_MODES",
    "check_options",
    "ranking_loss",
]

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
PARTITION_MODES = ("joint", "per_direction")
HARDNESS_MODES = (None, "in_batch_negatives", "hard_negatives", "all_negatives")


def check_options(
    directions: Sequence[str], partition_mode: str, hardness_mode: str | None, hardness_strength: Any
) -> tuple[tuple[str, ...], float]:
    """The directions, each once, and the strength.

    Raises:
        TypeError, ValueError: as :func:`ranking_loss` documents.
    """
    if (
        not isinstance(directions, (tuple, list))
        or not directions
        or any(each not in DIRECTIONS for each in directions)
    ):
        raise ValueError(f"directions is {directions!r}, must be a tuple of {', '.join(map(repr, DIRECTIONS))}")
    directions = tuple(dict.fromkeys(directions))
    if "query_to_doc" not in directions:
        raise ValueError(f"directions is {directions!r}, must hold 'query_to_doc', which has the positives")
    if partition_mode not in PARTITION_MODES:
        raise ValueError(f"partition_mode is {partition_mode!r}, must be {' or '.join(map(repr, PARTITION_MODES))}")
    without = [each for each in directions if each in ("query_to_query", "doc_to_doc")]
    if partition_mode == "per_direction" and without:
        raise ValueError(
            f"partition_mode='per_direction' takes 'query_to_doc' and 'doc_to_query', got {without[0]!r}: it holds no "
            "positive; partition_mode='joint' takes every direction"
        )
    if hardness_mode not in HARDNESS_MODES:
        raise ValueError(f"hardness_mode is {hardness_mode!r}, must be one of {', '.join(map(repr, HARDNESS_MODES))}")
    check_real("hardness_strength", hardness_strength, "a number from 0 to 1e30")
    if not 0 <= hardness_strength <= 1e30:
        raise ValueError(f"hardness_strength is {hardness_strength}, must be a number from 0 to 1e30")
    return directions, float(hardness_strength)


def ranking_loss(
    anchors: Tensor,
    documents: Sequence[Tensor],
    scale: float,
    *,
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    hard_negative_weight: float = 0.0,
    gather_across_devices: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Mean over the anchors of minus the log-probability of the own positive, logits being ``scale * cosine``.

    Args:
        anchors: `(n, width)`.
        documents: columns of `(n, width)`: positives and, where there are any, hard negatives of the anchors in order.
        scale: 1 / temperature.
        directions: what the denominator holds: all documents for the anchor (``"query_to_doc"``), all other anchors for
            it (``"query_to_query"``), all anchors for the own positive (``"doc_to_query"``), all documents of other
            anchors for it (``"doc_to_doc"``).
        partition_mode: one denominator for all directions (``"joint"``), or the mean of the losses of each.
        hardness_mode: which logits of ``"query_to_doc"`` get ``hardness_strength * cosine``, as a constant, on top:
            those of documents of other anchors (``"in_batch_negatives"``), of the own hard negatives
            (``"hard_negatives"``), of both (``"all_negatives"``).
        hardness_strength: at least 0.
        hard_negative_weight: added to the logits of the own hard negatives in ``"query_to_doc"``.
        gather_across_devices, impl: as in :func:`simctg_fast.simcse_unsup_loss`.

    Returns:
        A scalar; float32, or float64 for float64. No anchors: 0.

    Source: Gao et al. 2021 (SimCSE); Li et al. 2023 (GTE) for the directions; Lan et al. 2025 (LLaVE), eq. 5, for the
    hardness.
    """
    for index, column in enumerate(documents):
        if column.shape != anchors.shape:
            raise ValueError(
                f"documents[{index}] has shape {tuple(column.shape)}, must be {tuple(anchors.shape)} as anchors has"
            )
    local = list(documents)
    documents, first, processes = gather_columns(local, gather_across_devices)
    everyone = anchors
    if "query_to_query" in directions or "doc_to_query" in directions:
        everyone = gather_columns([anchors], gather_across_devices)[0][0]
    targets = torch.arange(first, first + anchors.shape[0], device=anchors.device)
    positive = scale * cosines(anchors, local[0])

    def relative(queries: Tensor, keys: Tensor, itself: int = first, tilt: float = 0.0) -> Tensor:
        """Log-sum-exp of ``scale * cosine + tilt * cosine``, where only the first cosine has a gradient, less the logit
        of the positive, which is the numerator of every direction."""
        lse = pair_lse(queries, keys, scale + tilt, impl, itself)
        if tilt > 0:
            share = scale / (scale + tilt)
            lse = share * lse + (1.0 - share) * lse.detach()
        return lse - positive

    tilt = hardness_strength if hardness_mode in ("in_batch_negatives", "all_negatives") else 0.0
    own_harder = hardness_mode == "hard_negatives" and hardness_strength > 0
    own_apart = len(local) > 1 and (hard_negative_weight != 0.0 or own_harder)
    if tilt > 0:
        together = hardness_mode == "all_negatives" and not own_apart
        columns = [torch.cat(documents)] if together else documents
        # The positive is never tilted, and is exp(0) beside the others.
        sums = [torch.zeros_like(positive), *(relative(anchors, column, tilt=tilt) for column in columns)]
        own_apart = not together
    elif own_apart:
        # One diagonal can be left out of a call, and the positive stays in.
        sums = [relative(anchors, torch.cat(documents[:2]), documents[0].shape[0] + first)]
        sums += [relative(anchors, column) for column in documents[2:]]
    else:
        sums = [pair_loss(anchors, torch.cat(documents), targets, scale, impl)]
    for column in local[1:] if own_apart else ():
        cosine = cosines(anchors, column)
        harder = hardness_strength * cosine.detach() if hardness_mode in ("hard_negatives", "all_negatives") else 0.0
        sums.append(scale * cosine + harder + hard_negative_weight - positive)

    others: list[Tensor] = []
    if "query_to_query" in directions:
        others.append(relative(anchors, everyone))
    if "doc_to_query" in directions:
        others.append(pair_loss(local[0], everyone, targets, scale, impl))
    if "doc_to_doc" in directions:
        others += [relative(local[0], column) for column in documents]
    if partition_mode == "joint":
        losses = _log_sum([*sums, *others])
    else:
        losses = torch.stack([_log_sum(sums), *others]).mean(dim=0)
    return losses.sum() * (processes / max(1, documents[0].shape[0]))


def _log_sum(summands: list[Tensor]) -> Tensor:
    return summands[0] if len(summands) == 1 else torch.logsumexp(torch.stack(summands), dim=0)
