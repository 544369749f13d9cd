"""How far texts can be compressed: repetition of any kind and length in one number."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from ..checks import is_integer, require
from .texts import as_texts

__all__ = ["compression_ratio"]


def compression_ratio(texts: str | Iterable[str], level: int = 9) -> float:
    """Bytes of the texts in UTF-8 over their bytes compressed by zlib; the higher, the more redundant. 0.0 for none.

    Texts are joined by a space and compressed together, so what they share counts. zlib looks back 32 KiB, and its
    wrapper of 6 bytes brings texts of a few bytes below 1. Compare texts of similar length.

    Args:
        texts: a string, or several. Half of a surrogate pair counts as the three bytes it is written with.
        level: zlib's, 1 to 9.

    Raises:
        ValueError: something else.

    Source: Shaib et al. 2024, "Standardizing the Measurement of Text Diversity" (there by gzip, the same
    algorithm in a wrapper of 18 bytes).
    """
    require(is_integer(level, 1, 9), "level", level, "an integer from 1 to 9")
    data = " ".join(as_texts(texts)).encode("utf-8", errors="surrogatepass")
    return len(data) / len(zlib.compress(data, level))
