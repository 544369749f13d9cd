"""From one value a text to a figure of all of them, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..checks import is_integer, is_number, require

__all__ = ["bootstrap_interval", "mean_over_texts"]

_DRAWS = 2**20  # at a time


def mean_over_texts(values: Iterable[float | None]) -> float | None:
    """The mean of the texts that have a value; None where no text has one.

    Raises:
        ValueError: a value that is neither a finite number nor None.
    """
    known = _known(values)
    return math.fsum(known) / len(known) if known else None


def bootstrap_interval(
    values: Iterable[float | None], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """The percentile interval ``(low, high)`` of the mean over texts, in the unit of the values.

    The texts are drawn again, as many and with replacement, ``resamples`` times; the interval lies between the
    quantiles (1 - confidence) / 2 and (1 + confidence) / 2 of the means (linear interpolation). The same arguments give
    the same interval. It covers the choice of texts, not that of sampling seeds or of the model.

    Args:
        values: one a text; None, a text without a value, is left out.
        confidence: in (0, 1).
        resamples: at least 1.
        seed: of the draws, at least 0.

    Returns:
        None for fewer than two values, which say nothing about their spread.

    Raises:
        ValueError: an argument outside the above, or a value that is neither a finite number nor None.

    Source: Efron 1979, "Bootstrap Methods: Another Look at the Jackknife"; the percentile method.
    """
    require(is_number(confidence, 0, 1) and 0 < confidence < 1, "confidence", confidence, "a number in (0, 1)")
    require(is_integer(resamples, 1), "resamples", resamples, "an integer of at least 1")
    require(is_integer(seed, 0), "seed", seed, "an integer of at least 0")
    known = _known(values)
    if len(known) < 2:
        return None
    import numpy as np

    array, generator = np.array(known, dtype=np.float64), np.random.default_rng(int(seed))
    means = np.empty(int(resamples))
    rows = max(1, _DRAWS // len(array))
    for start in range(0, len(means), rows):
        part = means[start : start + rows]
        part[:] = array[generator.integers(len(array), size=(len(part), len(array)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _known(values: Iterable[float | None]) -> list[float]:
    if not isinstance(values, Iterable) or isinstance(values, str | bytes) or getattr(values, "ndim", 1) != 1:
        raise ValueError(f"values must be numbers, one a text, got {values!r:.80}")
    found = values.tolist() if hasattr(values, "tolist") else list(values)
    for index, value in enumerate(found):
        require(value is None or is_number(value), f"values[{index}]", value, "a finite number, or None for no value")
    return [float(value) for value in found if value is not None]
