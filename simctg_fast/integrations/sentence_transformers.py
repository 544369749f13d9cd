"""SimCSE as a loss of sentence-transformers, for its `SentenceTransformerTrainer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_positive, check_weight, is_integer
from ..functional import simcse_loss_from_embeddings
from ..ops.dispatch import IMPLS
from ..ranking import check_options, ranking_loss
from .grad_cache import Features, cached_loss, layers, mini_batches

__all__ = ["SimCSELoss"]

_SECOND_VIEW = "simctg_fast.second_view"
# What the model card prints.
_SETTINGS = (
    *("scale", "similarity_fct", "gather_across_devices", "directions", "partition_mode", "hardness_mode"),
    *("hardness_strength", "hard_negative_weight", "mini_batch_size", "mini_batch_num_tokens", "symmetric"),
    "in_view_negatives",
)
_COSINES = ("cos_sim", "pytorch_cos_sim")


class SimCSELoss(nn.Module):
    """Contrastive loss with in-batch negatives, without the matrix of similarities: memory is linear in the batch.

    The one for a `SentenceTransformer`, which encodes the sentences; `simctg_fast.SimCSELoss` is that of embeddings. It
    takes the arguments of `MultipleNegativesRankingLoss`, in its order, and has its value, so that it can replace it
    by name; with ``mini_batch_size`` it is `CachedMultipleNegativesRankingLoss`.

    Columns of the data set:

    * one: the sentences are encoded twice and dropout makes the two views (unsupervised SimCSE)
    * two: anchor, positive
    * three and more: anchor, positive, hard negatives

    Args:
        model: the `SentenceTransformer` that is trained.
        scale: 1 / temperature, from 1e-30 to 1e30; cosines are multiplied by it.
        similarity_fct: None or ``sentence_transformers.util.cos_sim``, which is what is computed: any other function
            would need the matrix.
        gather_across_devices: the negatives of all processes, with gradients. Processes may hold different numbers of
            rows, and each computes the terms of its own; see :func:`simctg_fast.simcse_unsup_loss`.
        directions, partition_mode, hardness_mode, hardness_strength: as :func:`simctg_fast.ranking.ranking_loss` has
            them.
        hard_negative_weight: see :func:`simctg_fast.simcse_sup_loss`; needs three columns or more.
        mini_batch_size: the sentences that are encoded at a time, with the gradient of the whole batch (GradCache).
            None: all at once. Value and gradient are the same, dropout included.
        mini_batch_num_tokens: as many sentences at a time as hold so many tokens, at least one, instead.
        show_progress_bar: of the mini-batches.
        symmetric: the directions ``("query_to_doc", "doc_to_query")``, ``"per_direction"``.
        in_view_negatives: for one or two columns: both columns are rows, and each has all others of both columns as
            negatives; the loss of :func:`simctg_fast.simcse_unsup_loss`. Symmetric as it is, without directions and
            weights.
        impl: as in :func:`simctg_fast.contrastive_loss`.

    Inside `MatryoshkaLoss` it may have a `mini_batch_size` where sentence-transformers asks losses for
    ``uses_gradient_cache``; inside `AdaptiveLayerLoss` and `Matryoshka2dLoss`, as theirs, it may not.

    Raises:
        TypeError: a number that is none.
        ValueError: an argument outside the above; ``symmetric`` or ``in_view_negatives`` beside what it excludes.

    Source: Gao et al. 2021, "SimCSE: Simple Contrastive Learning of Sentence Embeddings".
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_across_devices: bool = False,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        hard_negative_weight: float = 0.0,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        symmetric: bool = False,
        in_view_negatives: bool = False,
        impl: str = "auto",
    ):
        super().__init__()
        check_positive("scale", scale)
        _check_similarity(similarity_fct)
        directions, hardness_strength = check_options(directions, partition_mode, hardness_mode, hardness_strength)
        check_weight("hard_negative_weight", hard_negative_weight)
        if symmetric and in_view_negatives:
            raise ValueError("in_view_negatives=True is symmetric as it is; leave symmetric=False")
        chosen = [
            name
            for name, is_chosen in (
                ("directions", directions != ("query_to_doc",)),
                ("hardness_mode", hardness_mode is not None),
                ("hard_negative_weight", hard_negative_weight != 0.0),
            )
            if is_chosen
        ]
        if in_view_negatives and chosen:
            raise ValueError(f"in_view_negatives=True takes no {chosen[0]}: it is the unsupervised loss of all rows")
        if symmetric:
            if directions != ("query_to_doc",):
                raise ValueError(f"symmetric=True is directions of its own; leave them out, or it, got {directions!r}")
            directions, partition_mode = ("query_to_doc", "doc_to_query"), "per_direction"
        for name, value in (("mini_batch_size", mini_batch_size), ("mini_batch_num_tokens", mini_batch_num_tokens)):
            if value is not None and not is_integer(value, 1):
                raise ValueError(f"{name} is {value!r}, must be None or an integer from 1")
        for name, flag in (
            ("gather_across_devices", gather_across_devices),
            ("show_progress_bar", show_progress_bar),
            ("symmetric", symmetric),
            ("in_view_negatives", in_view_negatives),
        ):
            if not isinstance(flag, bool):
                raise ValueError(
                    f"{name} is {flag!r:.80}, must be True or False; what comes behind hardness_strength, as "
                    "mini_batch_size, is named"
                )
        check_choice("impl", impl, IMPLS)
        self.model, self.scale, self.similarity_fct, self.impl = model, scale, similarity_fct, impl
        self.gather_across_devices, self.show_progress_bar = gather_across_devices, show_progress_bar
        self.directions, self.partition_mode = directions, partition_mode
        self.hardness_mode, self.hardness_strength = hardness_mode, hardness_strength
        self.hard_negative_weight = hard_negative_weight
        self.mini_batch_size, self.mini_batch_num_tokens = mini_batch_size, mini_batch_num_tokens
        self.symmetric, self.in_view_negatives = symmetric, in_view_negatives

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """A scalar; ``labels`` are not read."""
        columns = list(sentence_features)
        if len(columns) == 1:
            columns = list(self._two_views(columns[0]))
        if not self.uses_gradient_cache:
            return self.compute_loss_from_embeddings(_embedded(self.model, columns), labels)
        size, tokens = self.mini_batch_size, self.mini_batch_num_tokens
        if wrapper := _wrapper(self.model):
            name, value = ("mini_batch_size", size) if tokens is None else ("mini_batch_num_tokens", tokens)
            raise ValueError(
                f"{name} is {value}, must be None inside a loss that replaces model.forward "
                f"({wrapper}): the model runs again in the backward pass, when that is over"
            )
        return cached_loss(
            self.model,
            [mini_batches(column, size, tokens) for column in columns],
            lambda embeddings: self.calculate_loss(embeddings, labels, with_backward=torch.is_grad_enabled()),
            self._progress,
        )

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of embeddings that are at hand: the second stage of GradCache.

        Args:
            embeddings: anchors, positives and, where there are any, hard negatives, each ``(n, width)``.
        """
        if len(embeddings) < 2:
            raise ValueError(f"embeddings must hold anchors and positives at least, got {len(embeddings)} tensor(s)")
        for index, column in enumerate(embeddings):
            if column.layout != torch.strided or column.dim() != 2 or column.shape != embeddings[0].shape:
                raise ValueError(
                    f"embeddings[{index}] is {tuple(column.shape)} {column.layout}, must be (n, width) torch.strided, "
                    f"as all; embeddings[0] has shape {tuple(embeddings[0].shape)}"
                )
        options: dict[str, Any] = {"gather_across_devices": self.gather_across_devices, "impl": self.impl}
        anchors, *documents = embeddings
        if self.in_view_negatives:
            if len(documents) > 1:
                raise ValueError(f"in_view_negatives=True takes one or two columns, got {len(embeddings)}")
            return simcse_loss_from_embeddings(
                anchors, documents[0], temperature=1.0 / self.scale, in_view_negatives=True, **options
            )
        if self.hard_negative_weight != 0.0 and len(documents) < 2:
            raise ValueError(
                f"hard_negative_weight={self.hard_negative_weight} takes three columns or more, got {len(embeddings)}"
            )
        return ranking_loss(
            anchors,
            documents,
            self.scale,
            directions=self.directions,
            partition_mode=self.partition_mode,
            hardness_mode=self.hardness_mode,
            hardness_strength=self.hardness_strength,
            hard_negative_weight=self.hard_negative_weight,
            **options,
        )

    def calculate_loss(
        self, reps: Sequence[Sequence[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of embeddings in mini-batches, as sentence-transformers' own cached losses have it.

        Args:
            reps: of each column, embeddings of ``(rows, width)``.
            with_backward: also their gradients; the loss then has none.
        """
        loss = self.compute_loss_from_embeddings([torch.cat(list(column)) for column in reps], labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    @property
    def uses_gradient_cache(self) -> bool:
        """What wrapper losses ask: whether the model runs again in the backward pass."""
        return self.mini_batch_size is not None or self.mini_batch_num_tokens is not None

    @property
    def temperature(self) -> float:
        return 1.0 / self.scale

    def _two_views(self, features: Features) -> tuple[Features, Features]:
        """One column as two: a model writes into what it is handed, so the second view gets features of its own.

        `AdaptiveLayerLoss` calls again with the same features and reads what the model wrote there the first time.
        """
        if not _wrapper(self.model):
            return features, dict(features)
        if _SECOND_VIEW not in features:  # kept with the features, and gone with them
            features[_SECOND_VIEW] = dict(features)
        return features, features[_SECOND_VIEW]

    def _progress(self, batches: Sequence[Features]) -> Iterator[Features]:
        if not self.show_progress_bar:
            return iter(batches)
        from tqdm.auto import tqdm

        return iter(tqdm(batches, desc="Mini-batches"))

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card prints."""
        return {name: getattr(self, name) for name in _SETTINGS} | {"similarity_fct": "cos_sim"}

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


def _embedded(model: nn.Module, columns: list[Features]) -> list[Tensor]:
    """One forward pass for all documents where sentence-transformers makes one, and where no wrapper forbids it."""
    try:
        from sentence_transformers.base.losses.merged_forward import embed_columns
    except ImportError:  # an older one makes a forward pass a column
        return [model(features)["sentence_embedding"] for features in columns]
    return embed_columns(model, columns)


def _check_similarity(function: Any) -> None:
    if function is None:
        return
    while isinstance(function, partial) and not function.args and not function.keywords:
        function = function.func
    name, module = getattr(function, "__name__", ""), str(getattr(function, "__module__", ""))
    if name not in _COSINES or module.partition(".")[0] != "sentence_transformers":
        raise ValueError(
            f"similarity_fct is {name or type(function).__name__}, must be None or sentence_transformers.util.cos_sim: "
            "without a matrix there are cosines only"
        )


def _wrapper(model: Any) -> str:
    """The module of sentence-transformers whose loss has put something in the place of `model.forward`, or nothing."""
    for layer in layers(model):
        module = type(layer.forward).__module__
        if module.startswith("sentence_transformers.") and ".losses" in module:
            return module
    return ""
