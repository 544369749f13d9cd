"""Which of several ways of writing to begin with, from their figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = 0.05  # nats a byte that a text may be less probable than people's


@dataclass(frozen=True)
class Candidate:
    """``diversity`` in percent and ``log_prob_per_byte`` in nats, means over texts."""

    name: str
    diversity: float
    log_prob_per_byte: float


@dataclass(frozen=True)
class Recommendation:
    """``best``: None where none is allowed. ``reason``: in a sentence, with the figures."""

    best: Candidate | None
    reason: str


NO_PEOPLE = "without human continuations there is no measure of it"


def recommend(candidates: Sequence[Candidate], human: Candidate | None, without: str = NO_PEOPLE) -> Recommendation:
    """The most diverse of the ``candidates`` whose texts are at most `MARGIN` nats a byte less probable than people's.

    Greedy search writes what is far more probable than human text, and a text that is far less probable is no better
    for being diverse: how far people are from greedy search says how much probability may be given up. More diverse
    than people is no better than as diverse; among those the more probable wins.

    Args:
        human: what people's continuations have; None where they have none, and then ``without`` is the reason.
    """
    if human is None:
        return Recommendation(None, without)
    floor = human.log_prob_per_byte - MARGIN
    allowed = [each for each in candidates if each.log_prob_per_byte >= floor]
    measure = f"human texts have diversity {human.diversity:.1f} and log p a byte {human.log_prob_per_byte:.3f}"
    if not allowed:
        none = f"none is within {MARGIN} of it" if candidates else "none has texts that can be measured"
        return Recommendation(None, f"{none}: {measure}")
    best = max(allowed, key=lambda each: (min(each.diversity, human.diversity), each.log_prob_per_byte))
    reason = (
        f"diversity {best.diversity:.1f} at log p a byte {best.log_prob_per_byte:.3f}, the best of {len(allowed)} "
        f"that are no more than {MARGIN} below people's; {measure}"
    )
    return Recommendation(best, reason)
