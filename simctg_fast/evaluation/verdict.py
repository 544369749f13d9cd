"""Does contrastive search suit a model as it stands? From its isotropy and a pilot, in plain words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .conclude import SHORT
from .recommend import MARGIN

PILOT = "greedy,contrastive,centered,fsd,fsd-vec,dry"
PILOT_PROMPTS = 16

# 1 - the mean cosine of the last layer's states, as Su and Collier 2023 (section 3) and Su et al. published it.
PUBLISHED = "gpt2 0.10, gpt2-medium 0.25, gpt2-large 0.70, gpt2-xl 0.72, OPT 0.66 to 0.75"
_NARROW = 0.5  # between the published models for which contrastive search works untrained, and those for which not
_CLOSE = 5.0  # of diversity: as good as the best
_NEEDED = {"diversity", "log_prob_per_byte"}  # which texts of fewer than 4 tokens, or without characters, lack

_WHAT = {
    "contrastive": "contrastive search (--strategy contrastive)",
    "centered": "contrastive search with centred states (--center)",
    "fsd": "FSD by n-grams (--strategy fsd)",
    "fsd-vec": "FSD by vectors (--strategy fsd-vec)",
    "dry": "greedy search with DRY (--strategy greedy --dry-multiplier 0.8)",
    "greedy": "greedy search (--strategy greedy), which does not repeat itself here",
}


@dataclass(frozen=True)
class Verdict:
    """``best``: the name of the strategy to begin with, or None; ``sentences``: what to do, and why."""

    best: str | None
    sentences: tuple[str, ...]


def verdict(isotropy: float, evaluation: Mapping[str, Any]) -> Verdict:
    """From the last layer's ``isotropy`` and what an `Evaluation` of the pilot's strategies found.

    The rule is `recommend`'s: the most diverse strategy whose texts are at most 0.05 nats a byte less probable than
    people's, where more diverse than people is no better. Where that is another than contrastive search, training is
    worth it if contrastive search falls behind as it stands and the states share a narrow cone.
    """
    rows = {row["strategy"]: row for row in evaluation["rows"] if row["figures"].keys() >= _NEEDED}
    best = evaluation["recommended"]["strategy"]
    sentences = [f"Isotropy of the last layer: {isotropy:.2f} (published: {PUBLISHED})."]
    ours, human = rows.get("contrastive"), rows.get("human")
    suits = ours is not None and human is not None and best is not None and _as_good(ours, rows[best], human)
    if suits:
        sentences.append("Contrastive search suits this model as it stands.")
    if best is None and human is not None:
        what = "about as probable as people's" if len(rows) > 1 else "of 4 tokens"
        sentences.append(f"None of the pilot's strategies writes texts {what}.")
    elif best not in (None, "contrastive"):
        sentences.append(f"{'Better still' if suits else 'The better start'}: {_WHAT[best]}.")
    sentences.extend(_pilot(evaluation))
    if not suits:
        sentences.append(_training(isotropy, ours, human))
    return Verdict(best, tuple(sentences))


def _pilot(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """What decided, and how far it is to be trusted."""
    lengths = {row["strategy"]: _mean(row, "tokens") for row in evaluation["rows"] if row["figures"]}
    people, longest = lengths.pop("human", 0.0), max(lengths.values(), default=0.0)
    what = f"prompts: {evaluation['prompts']}; people's continuations: {people:.0f} tokens on average"
    yield f"The pilot ({what}): {evaluation['recommended']['reason']}."
    if people < SHORT * longest:
        yield (
            "With caution: short texts, as people's here, repeat less, and the model wrote up to "
            f"{longest:.0f} tokens on average; longer ones (--text) tell more."
        )


def _as_good(ours: Mapping[str, Any], best: Mapping[str, Any], human: Mapping[str, Any]) -> bool:
    """Whether contrastive search is allowed by `recommend`'s rule, and close to the best."""
    people = _mean(human, "diversity")
    allowed = _mean(ours, "log_prob_per_byte") >= _mean(human, "log_prob_per_byte") - MARGIN
    return allowed and min(_mean(ours, "diversity"), people) >= min(_mean(best, "diversity"), people) - _CLOSE


def _training(isotropy: float, ours: Mapping[str, Any] | None, human: Mapping[str, Any] | None) -> str:
    how = "simctg-fast train MODEL --data texts.txt --out trained"
    if ours is None or human is None:
        return f"Whether SimCTG training is worth it, the pilot cannot say ({how} does it)."
    figures = f"diversity {_mean(ours, 'diversity'):.1f} where people's is {_mean(human, 'diversity'):.1f}"
    if isotropy < _NARROW:
        return f"SimCTG training may be worth it: contrastive search has {figures}, and states share a cone ({how})."
    return f"SimCTG training promises little: contrastive search has {figures}, but states lie wide apart already."


def _mean(row: Mapping[str, Any], metric: str) -> float:
    return float(row["figures"][metric]["mean"])


def layers_table(layers: Mapping[str, Sequence[float]]) -> list[str]:
    """Lines: a layer each, a column for each model."""
    names = list(layers)
    width = max(8, *map(len, names))
    lines = ["layer  " + "  ".join(f"{name:>{width}}" for name in names)]
    for number in range(max(map(len, layers.values()))):
        cells = (f"{layers[n][number]:.3f}" if number < len(layers[n]) else "" for n in names)
        lines.append(f"{number:>5}  " + "  ".join(f"{cell:>{width}}" for cell in cells))
    return lines
