"""Coherence by sentence embeddings: how much a continuation is about what its prompt is about."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checks import check_choice, is_integer, require
from ...text.batches import by_length, pad_token, padded_rows
from ...text.feature_file import POOLINGS
from ...text.features import evaluation_mode, extract_features
from ...text.texts import text_list
from .folders import folder_model, local_folder
from .pairs import check_batch_size, is_blank, text_pairs

__all__ = ["embedding_coherence", "folder_embedder"]

_PUBLISHED_LENGTH = 128  # tokens that SimCSE's own class cuts a text to

Embedder = Callable[[list[str]], Any]


def embedding_coherence(
    prompts: Iterable[str],
    continuations: Iterable[str],
    embedder: Embedder | str | os.PathLike[str],
    *,
    pooling: str = "mean",
    max_length: int | None = None,
    batch_size: int = 32,
    paper_compatible: bool = False,
) -> list[float | None]:
    """Coherence of Su et al. 2022: the cosine of the sentence embeddings of prompt and continuation, in [-1, 1].

    Args:
        prompts, continuations: one each a text.
        embedder: a callable that takes a list of strings to ``(N, D)``, an array or tensor; a folder of
            sentence-transformers (needs the extra ``sentence-transformers``), used as it is; or a folder of a
            transformers model, whose hidden states are pooled.
        pooling: of the last: ``"mean"``, ``"cls"`` or ``"last"``.
        max_length: of the last: tokens that a text is cut to.
        batch_size: texts at a time, of either folder.
        paper_compatible: of a transformers folder: as SimCSE's own class, the pooler's output at the first token, of at
            most 128 tokens; ``pooling`` and ``max_length`` do not count.

    Returns:
        A value for each pair, None where one of the two is blank. A zero vector has cosine 0 to everything.

    Raises:
        ValueError: an argument outside the above; another number of prompts; embeddings of another shape, or not
            finite; with ``paper_compatible`` a model without a pooler.
        ImportError: a folder of sentence-transformers, which is not installed.

    Source: Su et al. 2022, section 4.2, with SimCSE (Gao et al. 2021, ``princeton-nlp/sup-simcse-bert-base-uncased``),
    as Li et al. 2023 have it too.
    """
    prompts, continuations = text_pairs(prompts, continuations)
    left, right = text_list(prompts, "prompts"), text_list(continuations, "continuations")
    check_choice("pooling", pooling, tuple(each for each in POOLINGS if each != "none"))
    check_batch_size(batch_size)
    require(max_length is None or is_integer(max_length, 1), "max_length", max_length, "an integer of at least 1")
    if callable(embedder):
        embed = embedder
    else:
        embed = folder_embedder(embedder, pooling, max_length, batch_size, paper_compatible)
    known = [place for place, pair in enumerate(zip(left, right, strict=True)) if not any(map(is_blank, pair))]
    found: list[float | None] = [None] * len(left)
    if not known:
        return found
    sides = [_checked(embed([texts[place] for place in known]), len(known)) for texts in (left, right)]
    if sides[0].shape != sides[1].shape:
        raise ValueError(f"embedder must give one width, got {sides[0].shape[1]} and {sides[1].shape[1]}")
    for place, cosine in zip(known, (sides[0] * sides[1]).sum(dim=-1).clamp(-1, 1).tolist(), strict=True):
        found[place] = cosine
    return found


def _checked(values: Any, count: int) -> Tensor:
    """Unit vectors ``(N, D)``, float64 on the CPU."""
    vectors = torch.as_tensor(values).detach().double().cpu()
    if vectors.dim() != 2 or len(vectors) != count:
        raise ValueError(f"embedder must give a vector for each of {count} texts, got shape {tuple(vectors.shape)}")
    if not bool(vectors.isfinite().all()):
        raise ValueError("embedder must give finite vectors, got NaN or infinity")
    return torch.nn.functional.normalize(vectors, dim=-1, eps=1e-300)


def folder_embedder(
    path: str | os.PathLike[str],
    pooling: str = "mean",
    max_length: int | None = None,
    batch_size: int = 32,
    paper_compatible: bool = False,
) -> Embedder:
    """The callable that `embedding_coherence` makes of a folder, for several calls."""
    folder = local_folder(path, "embedder")
    if Path(folder, "modules.json").is_file() and not paper_compatible:
        return _sentence_transformer(folder, batch_size)
    model, tokenizer = folder_model(folder, "embedder")
    if paper_compatible:
        return lambda texts: _pooler_outputs(model, tokenizer, texts, batch_size)
    tokens = 512 * batch_size
    return lambda texts: (
        extract_features(model, tokenizer, texts, pooling=pooling, max_length=max_length, max_tokens=tokens).values
    )


def _sentence_transformer(folder: str, batch_size: int) -> Embedder:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"embedder {folder!r} is of sentence-transformers: pip install 'simctg_fast[sentence-transformers]'"
        ) from error
    model = SentenceTransformer(folder, local_files_only=True)
    return lambda texts: model.encode(texts, batch_size=batch_size, show_progress_bar=False)


@torch.no_grad()
def _pooler_outputs(model: Any, tokenizer: Any, texts: list[str], batch_size: int) -> Tensor:
    rows = tokenizer(texts, truncation=True, max_length=_PUBLISHED_LENGTH)["input_ids"]
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    pad = pad_token(tokenizer, model.config)
    with evaluation_mode(model):
        for batch in by_length(rows, lambda batch, _: len(batch) >= batch_size):
            out = model(**padded_rows(model, [rows[index] for index in batch], pad, left=False))
            if getattr(out, "pooler_output", None) is None:
                raise ValueError(
                    f"embedder must have a pooler for paper_compatible=True, {type(model).__name__} has none"
                )
            for index, vector in zip(batch, out.pooler_output, strict=True):
                found[index] = vector
    return torch.stack(found)
