"""The engine's strategies by name, and how far a line may go beyond what its run has made room for."""

from __future__ import annotations

from collections.abc import Mapping

from ..decoding.adaptive import AdaptiveContrastive
from ..decoding.fsd import NgramFSD, VectorFSD
from ..decoding.guard import Guard
from ..decoding.mixed import Mixed
from ..decoding.sampling import Sample
from ..decoding.strategies import Contrastive, Greedy, Strategy
from ..strategy_names import CONTRASTIVE, FSD
from .parameters import Parameters


def make_strategy(defaults: Mapping[str, Parameters]) -> Strategy:
    """What chooses in a run of these strategies, of rows that go no further than the run's own settings, see
    `limits`."""
    parts = {name: _one(name, parameters) for name, parameters in defaults.items()}
    return next(iter(parts.values())) if len(parts) == 1 else Mixed(parts, lambda row: row.strategy)


def _one(name: str, parameters: Parameters) -> Strategy:
    strategy: Strategy
    top_k = parameters.top_k or 1
    if name == "greedy":
        strategy = Greedy()
    elif name == "sample":
        strategy = Sample()
    elif name in FSD:
        strategy = (NgramFSD if name == "fsd" else VectorFSD)(top_k, parameters.fsd_n or 2)
    elif name == "guard":
        strategy = Guard()
    elif name == "adaptive":
        strategy = AdaptiveContrastive(parameters.adaptive_k_range[1])
    else:
        strategy = Contrastive(top_k, random=name == "stochastic-contrastive", center=parameters.center)
    strategy.counts = True
    return strategy


def limits(name: str, parameters: Parameters) -> dict[str, int]:
    """The most that a line may ask for, by the name of the parameter, of which a pair's second number counts."""
    if name in CONTRASTIVE:
        return {"top_k": parameters.top_k or 1}
    if name in FSD:
        return {"top_k": parameters.top_k or 1, "fsd_n": parameters.fsd_n or 2}
    return {"adaptive_k_range": parameters.adaptive_k_range[1]} if name == "adaptive" else {}
