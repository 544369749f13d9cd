"""MAUVE: how far the distribution of generated texts lies from that of human ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from ...checks import is_integer, is_number, require
from ...text.features import Features, extract_features
from ...text.texts import text_list
from .folders import folder_model
from .pairs import is_blank

__all__ = ["folder_features", "mauve"]

_PUBLISHED_LENGTH = 200  # tokens

# What `decode` put together by default when the script was written; transformers 5 leaves texts of BPE alone.
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def mauve(
    references: Any,
    texts: Any,
    model: str | os.PathLike[str] | None = None,
    *,
    max_length: int | None = 256,
    buckets: int | None = None,
    scaling_factor: float = 5.0,
    seed: int = 25,
    paper_compatible: bool = False,
) -> float:
    """The area under the divergence curve of two sets of texts, in [0, 1]: 1 where they cannot be told apart.

    Features of both are clustered together, and their histograms over the clusters compared. It is an estimate of
    many texts (thousands; never fewer than a few hundred), and depends on their number, their length and the features:
    compare figures of one setting only.

    Args:
        references: of people: strings, or their features ``(N, D)``, an array, a tensor or pooled `Features`.
        texts: generated: strings, or their features ``(M, D)``.
        model: the folder of the model that makes the features of strings: the last layer's state at the last token
            (GPT-2-large in the papers). Nothing is downloaded. Texts without any character are left out.
        max_length: tokens that a text is cut to; None cuts nothing.
        buckets: clusters, at least 2; None is a tenth of the smaller set, at least 2.
        scaling_factor: c of the paper, above 0.
        seed: of the clustering.
        paper_compatible: as the script of Su and Collier 2023, **in percent** and rounded to two decimals: a pair of
            texts is cut to the tokens of the shorter one and written out again, pairs whose generated text is blank are
            dropped, features are of 200 tokens. Needs strings, as many of both, and ``model``; ``max_length`` does not
            count. k-means magnifies rounding: on another device or release of its libraries the decimals can differ.

    Raises:
        ImportError: mauve-text is not installed.
        ValueError: an argument outside the above; fewer than two texts of either; features that are not finite.

    Source: Pillutla et al. 2021, "MAUVE: Measuring the Gap Between Neural Text and Human Text"; computed by mauve-text
    (settings other than these are its own), a package under the GPL that is not part of this one.
    """
    require(max_length is None or is_integer(max_length, 1), "max_length", max_length, "an integer of at least 1")
    require(buckets is None or is_integer(buckets, 2), "buckets", buckets, "an integer of at least 2")
    require(is_number(scaling_factor, 0, above=True), "scaling_factor", scaling_factor, "a number above 0")
    require(is_integer(seed, 0), "seed", seed, "an integer of at least 0")
    try:
        from mauve import compute_mauve
    except ImportError as error:
        raise ImportError("mauve() needs mauve-text: pip install 'simctg_fast[mauve]'") from error
    if paper_compatible:
        references, texts = _published(references, texts, model)
    else:
        loaded = cache(lambda: _loaded(model, "where references or texts are strings"))
        references = _features(references, "references", loaded, max_length)
        texts = _features(texts, "texts", loaded, max_length)
    if references.shape[1] != texts.shape[1]:
        raise ValueError(f"texts must have features of width {references.shape[1]}, got {texts.shape[1]}")
    out = compute_mauve(
        p_features=references,
        q_features=texts,
        num_buckets="auto" if buckets is None else int(buckets),
        mauve_scaling_factor=scaling_factor,
        seed=int(seed),
        verbose=False,
    )
    return round(float(out.mauve) * 100, 2) if paper_compatible else float(out.mauve)


def folder_features(path: str | os.PathLike[str], max_length: int | None = 256) -> Callable[[Sequence[str]], Any]:
    """What `mauve` makes features ``(N, D)`` of texts by, those without any character left out, for several calls."""
    loaded = folder_model(path, "model")
    return lambda texts: _made(loaded, [text for text in texts if text], max_length)


def _loaded(path: Any, why: str) -> tuple[Any, Any]:
    if path is None:
        raise ValueError(f"model must be a local folder {why}, got None")
    return folder_model(path, "model")


def _features(given: Any, name: str, loaded: Callable[[], tuple[Any, Any]], max_length: int | None) -> Any:
    """``(N, D)``, of numpy."""
    import numpy as np

    if isinstance(given, Features) or getattr(given, "ndim", 1) != 1:
        if isinstance(given, Features):
            require(given.pooling != "none", name, given, "one vector a text")
            given = given.values
        values = given.detach().float().cpu().numpy() if hasattr(given, "detach") else np.asarray(given)
        if values.ndim != 2 or values.dtype.kind not in "fiu":
            raise ValueError(f"{name} must be texts or features (N, D), got an array of shape {values.shape}")
    else:
        strings = [text for text in text_list(given, name) if text]
        _enough(len(strings), name)
        values = _made(loaded(), strings, max_length)
    _enough(len(values), name)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must have finite features, got NaN or infinity")
    return values


def _enough(count: int, name: str) -> None:
    if count < 2:
        raise ValueError(f"{name} must hold at least 2 texts, got {count}")


def _made(loaded: tuple[Any, Any], strings: list[str], max_length: int | None) -> Any:
    return extract_features(*loaded, strings, pooling="last", max_length=max_length).values.numpy()


def _published(references: Iterable[str], texts: Iterable[str], model: Any) -> tuple[Any, Any]:
    pairs = text_list(references, "references"), text_list(texts, "texts")
    if len(pairs[0]) != len(pairs[1]):
        raise ValueError(f"texts must be {len(pairs[0])}, as many as references, got {len(pairs[1])}")
    loaded = _loaded(model, "with paper_compatible=True")
    kept = [
        pair for pair in (_same_length(loaded[1], *each) for each in zip(*pairs, strict=True)) if not is_blank(pair[1])
    ]
    _enough(len(kept), "texts")
    left, right = ([text for text in side if text] for side in zip(*kept, strict=True))
    return _made(loaded, left, _PUBLISHED_LENGTH), _made(loaded, right, _PUBLISHED_LENGTH)


def _same_length(tokenizer: Any, reference: str, text: str) -> tuple[str, str]:
    """Both cut to the tokens of the shorter one and written out again."""
    rows = [tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"] for each in (reference, text)]
    count = min(map(len, rows))
    left, right = (_cleaned(tokenizer.decode(row[:count], clean_up_tokenization_spaces=False)) for row in rows)
    return left, right


def _cleaned(text: str) -> str:
    for part in _CLEANED:
        text = text.replace(part, part.strip())
    return text
