"""What a run, and every line of it, can set about how a continuation is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

STRATEGIES = ("contrastive", "greedy", "sample", "stochastic-contrastive")
CONTRASTIVE = ("contrastive", "stochastic-contrastive")
RANDOM = ("sample", "stochastic-contrastive")

DEFAULT_TOP_K = 4


@dataclass(frozen=True)
class Parameters:
    """Settings of one continuation.

    Args:
        max_new_tokens: the longest continuation.
        penalty_alpha: weight of the degeneration penalty, 0 … 1 (contrastive strategies).
        top_k: candidates a step (contrastive strategies); tokens to draw from, None for all (``sample``).
        temperature: of the random strategies. ``sample`` divides logits by it, ``stochastic-contrastive`` scores.
        top_p, min_p, typical_p: the warpers of transformers by these names (``sample``).
        stop: strings that end a continuation; they are not part of its text.
        seed: of the random strategies. Without one it is made from the run's seed and the id of the request.
        n: continuations of one prompt, drawn independently (random strategies).
    """

    max_new_tokens: int = 128
    penalty_alpha: float = 0.6
    top_k: int | None = DEFAULT_TOP_K
    temperature: float = 1.0
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    n: int = 1

    def with_overrides(self, values: Mapping[str, Any], strategy: str) -> Parameters:
        """These, changed by ``values`` from a line, a file or an option.

        Raises:
            ValueError: a value that is not allowed, or that ``strategy`` does not use.
        """
        checked = {name: check(name, value) for name, value in values.items()}
        for name in checked:
            if strategy not in USED_BY[name]:
                raise ValueError(f"{name} is not used by strategy {strategy!r}, only by {' and '.join(USED_BY[name])}")
        return replace(self, **checked)


def defaults(strategy: str) -> Parameters:
    """What a strategy uses where nothing is said."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if strategy == "sample":
        return Parameters(top_k=None)
    return Parameters(temperature=0.1) if strategy == "stochastic-contrastive" else Parameters()


USED_BY: dict[str, tuple[str, ...]] = {
    "max_new_tokens": STRATEGIES,
    "penalty_alpha": CONTRASTIVE,
    "top_k": (*CONTRASTIVE, "sample"),
    "temperature": RANDOM,
    "top_p": ("sample",),
    "min_p": ("sample",),
    "typical_p": ("sample",),
    "stop": STRATEGIES,
    "seed": RANDOM,
    "n": RANDOM,
}
NAMES = tuple(field.name for field in fields(Parameters))


def _integer(low: int, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, Integral) and not isinstance(v, bool) and low <= int(v) <= high


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[Any], bool]:
    def valid(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            return False
        number = float(value)
        return (low < number if above else low <= number) and number <= high

    return valid


_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (_integer(1), "an integer of at least 1"),
    "penalty_alpha": (_number(0, 1), "a number in [0, 1]"),
    "top_k": (lambda v: v is None or _integer(1)(v), "an integer of at least 1"),
    "temperature": (_number(0, above=True), "a finite number above 0"),
    "top_p": (lambda v: v is None or _number(0, 1, above=True)(v), "a number in (0, 1]"),
    "min_p": (lambda v: v is None or _number(0, 1)(v), "a number in [0, 1]"),
    "typical_p": (lambda v: v is None or _number(0, 1, above=True)(v), "a number in (0, 1]"),
    "seed": (lambda v: v is None or _integer(0, 2**63 - 1)(v), "an integer from 0 to 2**63 - 1"),
    "n": (_integer(1, 1024), "an integer from 1 to 1024"),
}


def check(name: str, value: Any) -> Any:
    """``value`` as :class:`Parameters` holds it.

    Raises:
        ValueError: an unknown name or a value outside its range.
    """
    if name == "stop":
        strings = (value,) if isinstance(value, str) else value
        if strings is None:
            return ()
        if not isinstance(strings, list | tuple) or not all(isinstance(s, str) and s for s in strings):
            raise ValueError(f"stop must be a string or a list of strings, none of them empty, got {value!r}")
        return tuple(strings)
    if name not in _ALLOWED:
        raise ValueError(f"unknown parameter {name!r}; allowed: {', '.join(NAMES)}")
    valid, allowed = _ALLOWED[name]
    if not valid(value):
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return value
