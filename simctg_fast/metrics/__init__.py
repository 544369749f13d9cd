"""Figures of text: how much of it repeats, how diverse it is, how probable, and how far apart its hidden states lie.

Those over tokens and strings are here and import nothing heavy; those that run a model (`simctg_fast.metrics.models`)
are loaded on first use. ``docs/metrics.md`` has them all in one table.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .bootstrap import bootstrap_interval, mean_over_texts
from .compression import compression_ratio
from .hidden_states import isotropy
from .ngrams import corpus_distinct_n, distinct_n, diversity, repeated_tokens, repetition
from .single_tokens import token_repetition, wrong_token_repetition

if TYPE_CHECKING:
    from .models.coherence import log_probability_coherence as log_probability_coherence
    from .models.coherence import log_probability_per_byte as log_probability_per_byte
    from .models.embeddings import embedding_coherence as embedding_coherence
    from .models.layers import isotropy_by_layer as isotropy_by_layer
    from .models.layers import self_similarity_by_layer as self_similarity_by_layer
    from .models.log_probabilities import log_probabilities as log_probabilities
    from .models.mauve_score import mauve as mauve
    from .models.perplexity import perplexity as perplexity

# Module of `models` -> its public names.
_MODULES = {
    "coherence": ("log_probability_coherence", "log_probability_per_byte"),
    "embeddings": ("embedding_coherence",),
    "layers": ("isotropy_by_layer", "self_similarity_by_layer"),
    "log_probabilities": ("log_probabilities",),
    "mauve_score": ("mauve",),
    "perplexity": ("perplexity",),
}
_WITH_MODELS = {name: f"{__name__}.models.{module}" for module, names in _MODULES.items() for name in names}

__all__ = [
    "bootstrap_interval",
    "compression_ratio",
    "corpus_distinct_n",
    "distinct_n",
    "diversity",
    "embedding_coherence",
    "isotropy",
    "isotropy_by_layer",
    "log_probabilities",
    "log_probability_coherence",
    "log_probability_per_byte",
    "mauve",
    "mean_over_texts",
    "perplexity",
    "repeated_tokens",
    "repetition",
    "self_similarity_by_layer",
    "token_repetition",
    "wrong_token_repetition",
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_WITH_MODELS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WITH_MODELS})
