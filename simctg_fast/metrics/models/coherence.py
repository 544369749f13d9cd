"""How probable a continuation is under a model that did not write it: by token, and by byte."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...text.texts import text_list
from .log_probabilities import log_probabilities
from .pairs import is_blank, pair_rows, text_pairs

__all__ = ["log_probability_coherence", "log_probability_per_byte"]


def log_probability_coherence(
    model: Any,
    tokenizer: Any,
    prompts: Iterable[str | Sequence[int]],
    continuations: Iterable[str | Sequence[int]],
    *,
    batch_size: int = 8,
    paper_compatible: bool = False,
) -> list[float | None]:
    """Coherence of Su and Collier 2023: the mean natural log-probability of a continuation's tokens given its prompt.

    One value a text, in nats a token, at most 0; nearer 0 is more coherent. It depends on the scoring model's
    tokenizer; `log_probability_per_byte` does not. Loops are very probable: read it beside a diversity.

    Args:
        model: the scoring model, causal or an encoder-decoder, whose encoder then reads the prompt.
        tokenizer: its tokenizer. Prompt and continuation are tokenized apart, the continuation without special tokens.
            None: both are token ids, taken as they are.
        prompts, continuations: one each a text.
        batch_size: rows at a time.
        paper_compatible: as the published script: the beginning of text and the prompt's tokens without the
            tokenizer's own special ones; a continuation of white space alone has no value, as one without tokens.
            Means over texts are then the script's, up to the rounding of its float32 softmax; a probability that
            vanishes there is -inf in the script, and finite here.

    Returns:
        A value for each continuation, None for one without tokens. `mean_over_texts` leaves these out.

    Raises:
        ValueError: as `log_probabilities`; the numbers differ; no special token to begin an empty prompt with.

    Source: Su and Collier 2023, "Contrastive Search Is What You Need For Neural Text Generation" (OPT-2.7B there); the
    script is their ``open_ended_generation/english/compute_coherence.py``.
    """
    prompts, continuations = text_pairs(prompts, continuations)
    read, written = pair_rows(model, tokenizer, prompts, continuations, paper_compatible=paper_compatible)
    if paper_compatible:
        written = [[] if is_blank(str(text)) else row for row, text in zip(written, continuations, strict=True)]
    found = log_probabilities(model, written, read, batch_size=batch_size)
    return [float(each.mean()) if len(each) else None for each in found]


def log_probability_per_byte(
    model: Any, tokenizer: Any, prompts: Iterable[str], continuations: Iterable[str], *, batch_size: int = 8
) -> list[float | None]:
    """The natural log-probability of a continuation given its prompt, over the bytes of its UTF-8. Nats a byte.

    Models with different tokenizers can be compared by it. Divided by -ln 2 it is bits per byte.

    Args, Raises: as `log_probability_coherence`, of texts only.

    Returns:
        A value for each continuation, None for one without tokens.

    Source: bits per byte, as of Gao et al. 2020, "The Pile", less the sign and in nats.
    """
    if tokenizer is None:
        raise ValueError("tokenizer must be given: bytes are a text's, got None")
    prompts, continuations = text_pairs(prompts, continuations)
    texts = text_list(continuations, "continuations")
    read, written = pair_rows(model, tokenizer, prompts, texts)
    found = log_probabilities(model, written, read, batch_size=batch_size)
    return [
        float(each.sum()) / len(text.encode()) if len(each) else None for each, text in zip(found, texts, strict=True)
    ]
