"""SimCSE as a loss of sentence-transformers, for its `SentenceTransformerTrainer`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import simcse_loss_from_embeddings

__all__ = ["SimCSELoss"]


class SimCSELoss(nn.Module):
    """Contrastive loss with in-batch negatives, without the matrix of similarities: memory is linear in the batch.

    Its value is that of `MultipleNegativesRankingLoss` of the same ``scale``, which it can replace by name; with
    ``symmetric`` that of its directions ``("query_to_doc", "doc_to_query")``, averaged.

    Columns of the data set:

    * one: the sentences are encoded twice and dropout makes the two views (unsupervised SimCSE)
    * two: anchor, positive
    * three and more: anchor, positive, hard negatives

    Args:
        model: the `SentenceTransformer` that is trained.
        scale: 1 / temperature, above 0; cosines are multiplied by it.
        symmetric: also each positive against all anchors, the two averaged.
        in_view_negatives: for one or two columns: both columns are rows, and each has all others of both columns as
            negatives; the loss of :func:`simctg_fast.simcse_unsup_loss`. Symmetric as it is.
        gather_across_devices: the negatives of all processes, with gradients. Processes may hold different numbers of
            rows, and each computes the terms of its own; see :func:`simctg_fast.simcse_unsup_loss`.
        impl: as in :func:`simctg_fast.contrastive_loss`.

    Raises:
        ValueError: a `scale` that is not positive; ``symmetric`` with ``in_view_negatives``; ``in_view_negatives`` with
            three columns or more.

    Source: Gao et al. 2021, "SimCSE: Simple Contrastive Learning of Sentence Embeddings".
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        *,
        symmetric: bool = False,
        in_view_negatives: bool = False,
        gather_across_devices: bool = False,
        impl: str = "auto",
    ):
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale is {scale}, must be above 0")
        if symmetric and in_view_negatives:
            raise ValueError("in_view_negatives=True is symmetric as it is; leave symmetric=False")
        self.model = model
        self.scale = scale
        self.symmetric = symmetric
        self.in_view_negatives = in_view_negatives
        self.gather_across_devices = gather_across_devices
        self.impl = impl

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """A scalar; ``labels`` are not read."""
        features = list(sentence_features)
        if len(features) == 1:
            features = features * 2
        # A model may write into what it is handed, and the one column is handed over twice.
        return self.compute_loss_from_embeddings([self.model(dict(each))["sentence_embedding"] for each in features])

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of embeddings that are at hand: the second stage of GradCache.

        Args:
            embeddings: anchors, positives and, where there are any, hard negatives, each ``(n, width)``.
        """
        if len(embeddings) < 2:
            raise ValueError(f"embeddings must hold anchors and positives at least, got {len(embeddings)} tensor(s)")
        if self.in_view_negatives and len(embeddings) > 2:
            raise ValueError(f"in_view_negatives=True takes one or two columns, got {len(embeddings)}")
        anchors, positives, *negatives = embeddings
        return simcse_loss_from_embeddings(
            anchors,
            positives,
            torch.cat(negatives) if negatives else None,
            temperature=1.0 / self.scale,
            symmetric=self.symmetric,
            in_view_negatives=self.in_view_negatives,
            gather_across_devices=self.gather_across_devices,
            impl=self.impl,
        )

    @property
    def temperature(self) -> float:
        return 1.0 / self.scale

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card prints."""
        return {
            "scale": self.scale,
            "symmetric": self.symmetric,
            "in_view_negatives": self.in_view_negatives,
            "gather_across_devices": self.gather_across_devices,
        }

    @property
    def citation(self) -> str:
        return """
@inproceedings{gao2021simcse,
    title = "{SimCSE}: Simple Contrastive Learning of Sentence Embeddings",
    author = "Gao, Tianyu and Yao, Xingcheng and Chen, Danqi",
    booktitle = "Proceedings of the 2021 Conference on Empirical Methods in Natural Language Processing",
    year = "2021",
}
"""
