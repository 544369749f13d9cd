"""What a run, and every line of it, can set about how a continuation is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..checks import is_integer, is_number, require
from ..decoding import adaptive, fsd, guard
from ..decoding.breakers import BREAKERS_ALLOWED, is_breaker
from ..decoding.dry import DRY_ALLOWED, DRY_SEQUENCE_BREAKERS
from ..strategy_names import CONTRASTIVE, FSD, RANDOM, STRATEGIES, TOGETHER
from ..text.texts import short

DEFAULT_TOP_K = 4


@dataclass(frozen=True)
class Parameters:
    """Settings of one continuation.

    Args:
        max_new_tokens: the longest continuation.
        penalty_alpha: weight of the penalty, 0 … 1 (contrastive strategies, ``fsd`` and ``fsd-vec``).
        top_k: candidates a step (contrastive strategies); tokens that are weighed (``fsd``, ``fsd-vec``), or drawn
            from, None for all (``sample``).
        center: as of `ContrastiveSearch`, of a whole run: its requests can say nothing else (contrastive strategies).
        temperature: of the random strategies. ``sample`` divides logits by it, ``stochastic-contrastive`` and ``guard``
            scores; 0 takes the best of what the strategy allows.
        top_p, min_p, typical_p: the warpers of transformers by these names (``sample``).
        stop: strings that end a continuation; they are not part of its text. They may be or hold special tokens.
        stop_token_ids: tokens that end it besides the model's own; neither are these part of its text.
        include_stop_str_in_output: what stopped it, string or token, is part of its text.
        skip_special_tokens: leave special tokens out of the text.
        seed: of the random strategies. Without one it is made from the run's seed and the id of the request.
        n: continuations of one prompt, drawn independently (random strategies).
        logprobs: record the natural log-probability of every token, by the model's distribution as logits processors
            leave it; top_logprobs: and those of so many of the most probable ones, at most 20.
        truncate_prompt_tokens: keep so many tokens of a longer prompt, its last ones (of a source its first ones); -1:
            as many as ``max_new_tokens`` leave of the model's context.
        clamp_max_new_tokens: write less than ``max_new_tokens`` where the model's context ends before, instead of
            refusing the request. (Of ``truncate_prompt_tokens=-1`` they then reserve half the context at most.)
        continue_final_message: the continuation goes on in the last of the ``messages`` instead of answering it.
        fsd_n, fsd_beta, fsd_stop_tokens: ``n``, ``beta`` and ``stop_tokens`` of `FSD` (``fsd``; ``fsd-vec``, but for
            ``beta``).
        adaptive_q, adaptive_k_range: ``q`` and ``k_range`` of `AdaptiveContrastiveSearch` (``adaptive``); the range
            (k, k) leaves k there, as its ``adaptive="alpha"`` does.
        guard_window, guard_decay: ``window`` and ``decay`` of `GUARD` (``guard``).
        dry_multiplier, dry_base, dry_allowed_length, dry_sequence_breakers, dry_penalty_range: of `DRYLogitsProcessor`,
            by these names, for every strategy; a multiplier of 0 is off.

    Raises:
        ValueError: a value that is not allowed.
    """

    max_new_tokens: int = 128
    penalty_alpha: float = 0.6
    top_k: int | None = DEFAULT_TOP_K
    center: bool = False
    temperature: float = 1.0
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    n: int = 1
    logprobs: bool = False
    top_logprobs: int = 0
    truncate_prompt_tokens: int | None = None
    clamp_max_new_tokens: bool = False
    continue_final_message: bool = False
    fsd_n: int | None = None
    fsd_beta: float = fsd.BETA
    fsd_stop_tokens: tuple[int, ...] = ()
    adaptive_q: float = adaptive.Q
    adaptive_k_range: tuple[int, int] = adaptive.K_RANGE
    guard_window: int = guard.WINDOW
    guard_decay: float = guard.DECAY
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_sequence_breakers: tuple[str | int, ...] = DRY_SEQUENCE_BREAKERS
    dry_penalty_range: int = -1

    def __post_init__(self) -> None:
        for name in NAMES:
            check(name, getattr(self, name))

    def with_overrides(self, values: Mapping[str, Any], strategy: str) -> Parameters:
        """These, changed by ``values`` from a line, a file or an option.

        A value that says what ``strategy`` does anyway is accepted: ``temperature`` 0, ``top_p`` 1, any ``seed`` …

        Raises:
            ValueError: a value that is not allowed, or that ``strategy`` does not use.
        """
        checked = {name: check(name, value) for name, value in values.items()}
        for name, value in list(checked.items()):
            if strategy in USED_BY.get(name, STRATEGIES):
                continue
            if value is not None and name != "seed" and (name not in _NEUTRAL or value != _NEUTRAL[name]):
                only = " and ".join(USED_BY[name])
                neutral = f", and {_NEUTRAL[name]} is the value that changes nothing" if name in _NEUTRAL else ""
                raise ValueError(
                    f"{name} is not used by strategy {strategy!r}, only by {only}; got {short(value)}{neutral}"
                )
            del checked[name]
        changed = replace(self, **checked)
        if strategy == "fsd-vec" and (changed.fsd_n or 2) < 2:
            raise ValueError(f"fsd_n must be at least 2 for strategy 'fsd-vec', got {changed.fsd_n}")
        if changed.top_logprobs and not changed.logprobs:
            raise ValueError(f"top_logprobs is {changed.top_logprobs}, but logprobs is false: set that as well")
        return changed


def defaults(strategy: str) -> Parameters:
    """What a strategy uses where nothing is said."""
    require(strategy in STRATEGIES, "strategy", strategy, f"one of {', '.join(STRATEGIES)}")
    if strategy == "sample":
        return Parameters(top_k=None)
    if strategy in FSD:
        kind = fsd.KINDS[FSD.index(strategy)]
        return Parameters(penalty_alpha=fsd.ALPHA[kind], top_k=fsd.TOP_K, fsd_n=fsd.ORDER[kind])
    return Parameters(temperature=0.1) if strategy == "stochastic-contrastive" else Parameters()


def names_of(strategy: str) -> tuple[str, ...]:
    """The strategies that ``strategy`` names, separated by commas; of the first are lines that name none.

    Raises:
        ValueError: an unknown one, one named twice, or several that do not go together.
    """
    names = tuple(name.strip() for name in strategy.split(",")) if isinstance(strategy, str) else (strategy,)
    for name in names:
        require(name in STRATEGIES, "strategy", name, f"one of {', '.join(STRATEGIES)}")
        alone = len(names) > 1 and name not in TOGETHER
        if alone or names.count(name) > 1:
            allowed = f"several of {', '.join(TOGETHER)}, each once, or one strategy alone"
            raise ValueError(f"strategy is {short(strategy)}, must be {allowed}")
    return names


def run_defaults(strategy: str, named: Mapping[str, Any]) -> dict[str, Parameters]:
    """The defaults of each of a run's strategies, with what was ``named`` for the run as far as it uses that.

    Raises:
        ValueError: a value that is not allowed, or that no strategy of the run uses.
    """
    names = names_of(strategy)
    found = {}
    for name in names:
        unused = [n for n in named if name not in USED_BY.get(n, STRATEGIES)]
        others = [n for n in unused if any(other in USED_BY[n] for other in names)]
        found[name] = defaults(name).with_overrides({n: v for n, v in named.items() if n not in others}, name)
    return found


# What is not named here serves every strategy.
USED_BY: dict[str, tuple[str, ...]] = {
    "penalty_alpha": (*CONTRASTIVE, *FSD),
    "top_k": (*CONTRASTIVE, *FSD, "sample"),
    "center": CONTRASTIVE,
    "temperature": RANDOM,
    "top_p": ("sample",),
    "min_p": ("sample",),
    "typical_p": ("sample",),
    "seed": RANDOM,
    "n": RANDOM,
    "fsd_n": FSD,
    "fsd_beta": ("fsd",),
    "fsd_stop_tokens": FSD,
    "adaptive_q": ("adaptive",),
    "adaptive_k_range": ("adaptive",),
    "guard_window": ("guard",),
    "guard_decay": ("guard",),
}
# What a strategy that does not use the parameter does anyway.
_NEUTRAL: dict[str, int] = {
    "top_k": 1,
    "top_p": 1,
    "typical_p": 1,
    "n": 1,
    "penalty_alpha": 0,
    "center": False,
    "temperature": 0,
    "min_p": 0,
}
NAMES = tuple(field.name for field in fields(Parameters))
MAX_NEW_TOKENS = 2**31 - 1  # more than any model's context: what is beyond is a mistake


def _integer(low: int, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda v: is_integer(v, low, high)


def _number(low: float, *bounds: float, above: bool = False) -> Callable[[Any], bool]:
    return lambda v: is_number(v, low, *bounds, above=above)


_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (_integer(1, MAX_NEW_TOKENS), "an integer from 1 to 2**31 - 1"),
    "penalty_alpha": (_number(0, 1), "a number in [0, 1]"),
    "top_k": (lambda v: v is None or _integer(1)(v), "an integer of at least 1"),
    "temperature": (_number(0), "a finite number of at least 0"),
    "top_p": (lambda v: v is None or _number(0, 1, above=True)(v), "a number in (0, 1]"),
    "min_p": (lambda v: v is None or _number(0, 1)(v), "a number in [0, 1]"),
    "typical_p": (lambda v: v is None or _number(0, 1, above=True)(v), "a number in (0, 1]"),
    "seed": (lambda v: v is None or _integer(0, 2**63 - 1)(v), "an integer from 0 to 2**63 - 1"),
    "n": (_integer(1, 1024), "an integer from 1 to 1024"),
    "top_logprobs": (_integer(0, 20), "an integer from 0 to 20"),
    "fsd_n": (lambda v: v is None or _integer(1, fsd.MOST_ORDER)(v), f"an integer from 1 to {fsd.MOST_ORDER}"),
    "fsd_beta": (_number(0, 1), "a number in [0, 1]"),
    "adaptive_q": (_number(0, above=True), "a finite number above 0"),
    "guard_window": (_integer(2, guard.MOST_WINDOW), f"an integer from 2 to {guard.MOST_WINDOW}"),
    "guard_decay": (_number(0, 1, above=True), "a number in (0, 1]"),
    "truncate_prompt_tokens": (
        lambda v: v is None or (_integer(-1)(v) and v != 0),
        "an integer of at least 1, or -1 for the model's context",
    ),
    **{
        f.name: (lambda v: isinstance(v, bool), "true or false")
        for f in fields(Parameters)
        if isinstance(f.default, bool)
    },
    **{f"dry_{name}": allowed for name, allowed in DRY_ALLOWED.items()},
}
_LISTS: dict[str, tuple[type | tuple[type, ...], Callable[[Any], bool], str]] = {
    "stop": (str, lambda v: isinstance(v, str) and v != "", "a string or a list of strings, none of them empty"),
    "stop_token_ids": (int, _integer(0, 2**31 - 1), "a list of token ids"),
    "dry_sequence_breakers": ((str, int), is_breaker, BREAKERS_ALLOWED),
}


def check(name: str, value: Any) -> Any:
    """``value`` as :class:`Parameters` holds it.

    Raises:
        ValueError: an unknown name or a value outside its range.
    """
    if name == "fsd_stop_tokens":
        return fsd.check_stop_tokens(name, () if value is None else value)
    if name == "adaptive_k_range":
        return adaptive.check_k_range(name, adaptive.K_RANGE if value is None else value)
    if name in _LISTS:
        kind, valid, allowed = _LISTS[name]
        items = [value] if isinstance(value, kind) else [] if value is None else value
        if not isinstance(items, list | tuple) or not all(valid(item) for item in items):
            raise ValueError(f"{name} must be {allowed}, got {short(value)}")
        return tuple(items)
    if name not in _ALLOWED:
        raise ValueError(f"unknown parameter {name!r}; allowed: {', '.join(NAMES)}")
    valid, allowed = _ALLOWED[name]
    if not valid(value):
        raise ValueError(f"{name} must be {allowed}, got {short(value)}")
    return value
