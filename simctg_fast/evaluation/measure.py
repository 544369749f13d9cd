"""Figures of what was written: of each text, their means with intervals, and what they say in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..metrics import bootstrap_interval, diversity, log_probabilities, mean_over_texts, repetition
from .writing import Tokenized


@dataclass(frozen=True)
class Metric:
    """A column of the table. ``better``: higher, lower, human (nearest to people's) or None."""

    name: str
    unit: str
    digits: int
    better: str | None
    about: str


METRICS = {
    "tokens": Metric(
        "length", "tokens", 0, None, "Tokens of a continuation, its end left out; short texts repeat less."
    ),
    "diversity": Metric(
        "diversity", "%", 1, "human", "Product over n = 2, 3, 4 of the share of n-grams of tokens that are new."
    ),
    "rep_4": Metric("rep-4", "%", 1, "human", "Share of the 4-grams of tokens that the text had before."),
    "published_diversity": Metric(
        *("diversity, published", "%", 2, "human"),
        "Diversity as the published script has it: of words, counts summed over all texts (Su et al. 2022).",
    ),
    "log_prob_per_byte": Metric(
        *("log p a byte", "nats", 3, "human"),
        "Log-probability of the continuation behind its prompt, over the bytes of its UTF-8.",
    ),
    "coherence": Metric(
        *("coherence", "nats", 2, "human"),
        "Mean log-probability of a continuation's tokens behind the prompt (Su and Collier 2023).",
    ),
    "perplexity": Metric(
        "perplexity", "", 1, "human", "exp of minus the mean log-probability of the tokens of all continuations."
    ),
    "embedding_coherence": Metric(
        "coherence, cosine",
        "",
        3,
        "human",
        "Cosine of sentence embeddings of prompt and continuation (Su et al. 2022).",
    ),
    "mauve": Metric(
        *("MAUVE", "", 3, "higher"),
        "How alike the distributions of these texts and of people's are, 0 to 1 (Pillutla et al. 2021).",
    ),
    "tokens_per_second": Metric(
        "tokens/s", "", 0, "higher", "Tokens over the seconds that all texts took together, prompts included."
    ),
}


@dataclass(frozen=True)
class Scorer:
    """A model that says how probable continuations are: ``tokenizer`` None where it is the one that wrote them. By its
    ``name`` people know it."""

    model: Any
    tokenizer: Any = None
    name: str = "the model itself"
    batch_size: int = 8

    def __call__(
        self, prompts: Sequence[Tokenized], ids: Sequence[Sequence[int]], before: Sequence[str], texts: Sequence[str]
    ) -> tuple[list[list[float]], dict[int, str]]:
        """The log-probability of each token, in nats, of the continuations ``ids``, or of their ``texts`` behind the
        prompts' texts, ``before``. Those that the model cannot score have none, and a message by their place."""
        given: list[Sequence[int]] = [prompt.given for prompt in prompts]
        if self.tokenizer is not None:
            given = [self.tokenizer(text)["input_ids"] for text in before]
            ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        found = self._scored(ids, given)
        messages = {place: row for place, row in enumerate(found) if isinstance(row, str)}
        return [[] if isinstance(row, str) else row for row in found], messages

    def _scored(self, ids: Sequence[Sequence[int]], given: Sequence[Sequence[int]]) -> list[list[float] | str]:
        """Of each its log-probabilities, or why it has none: found by halves, so that the others keep their batches."""
        try:
            found = log_probabilities(self.model, ids, given, batch_size=self.batch_size)
        except ValueError as error:
            if len(ids) == 1:
                return [str(error).replace("rows[0]", "it").replace("prompts[0]", "its prompt")]
            half = len(ids) // 2
            return [*self._scored(ids[:half], given[:half]), *self._scored(ids[half:], given[half:])]
        return [row.tolist() if row.isfinite().all() else "it has a token of probability 0" for row in found]


def of_texts(
    ids: Sequence[Sequence[int]], texts: Sequence[str], log_probs: Sequence[Sequence[float]]
) -> dict[str, list[float | None]]:
    """Values of each text; None where it is too short to have one, as the diversity of an empty text."""
    values: dict[str, list[float | None]] = {"tokens": [float(len(row)) for row in ids]}
    values["diversity"] = [100 * diversity(row) if len(row) >= 4 else None for row in ids]
    values["rep_4"] = [100 * repetition(row, 4) if len(row) >= 4 else None for row in ids]
    sums = [math.fsum(row) for row in log_probs]
    bytes_ = [len(text.encode("utf-8", "replace")) for text in texts]
    scored = list(zip(sums, log_probs, bytes_, strict=True))
    values["log_prob_per_byte"] = [total / n if row and n else None for total, row, n in scored]
    values["coherence"] = [total / len(row) if row else None for total, row, _ in scored]
    return values


def figures(values: dict[str, list[float | None]], seed: int = 0) -> dict[str, dict[str, float | None]]:
    """Means over the texts that have a value, with their 95 % intervals by the bootstrap."""
    found: dict[str, dict[str, float | None]] = {}
    for name, of_each in values.items():
        mean = mean_over_texts(of_each)
        if mean is not None:
            low, high = bootstrap_interval(of_each, seed=seed) or (None, None)
            found[name] = {"mean": mean, "low": low, "high": high}
    return found


def single(value: float) -> dict[str, float | None]:
    """A figure of all texts together, without an interval."""
    return {"mean": value, "low": None, "high": None}
