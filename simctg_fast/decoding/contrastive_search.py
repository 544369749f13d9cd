"""Contrastive search as a decoding method for ``generate`` (Su et al. 2022, arXiv 2202.06417)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.configuration_utils import GenerationConfig

from ..checks import is_number
from .generate_arguments import call_settings
from .search import Options, Search, check_generator
from .settings import TINY, check_center, check_penalty_alpha, check_top_k
from .strategies import Contrastive, Greedy, RowSettings, Strategy

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ContrastiveSearch(Search):
    """Contrastive search with these settings, to be handed to ``model.generate(custom_generate=...)``.

    At each step the ``top_k`` most probable tokens are tried, and the one with the largest
    ``(1 − penalty_alpha) · p − penalty_alpha · max_j cos(h, h_j)`` is kept, where h is its last-layer hidden state and
    h_j those of all real positions before it (Su et al. 2022, eq. 5). Deterministic, unless ``temperature`` is given.

    Args:
        penalty_alpha: weight of the penalty in [0, 1]; 0 is greedy search. Default: what ``generate`` got, else 0.6.
        top_k: number of candidates, 1 … vocabulary; 1 is greedy search. Default: what ``generate`` got, else 4.
            (Not a 50, which is transformers' default, nor a checkpoint's own value for sampling: say those here.)
        temperature: makes the choice random: candidate i with probability ∝ exp(score_i / temperature).
        generator: random numbers for ``temperature``; the global generator of the device if None.
        center: take the mean of the history out of the states before cosines are taken: cos(h − μ, h_j − μ), μ the mean
            of the h_j, or 0 where these are fewer than 3. For models whose states point much the same way.
        options: how it is run, see `Search`: ``streamer``, ``tokenizer``, ``stop_strings``, ``decode_step``, ``path``,
            ``fast_linear``, ``pack``, ``weights``.

    Raises:
        ValueError: a value outside its range, named with the range, when the object is made or first used.
    """

    name = "contrastive search"
    random_by = "ContrastiveSearch(temperature=..., generator=...)"

    def __init__(
        self,
        penalty_alpha: float | None = None,
        top_k: int | None = None,
        *,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
        center: bool = False,
        **options: Unpack[Options],
    ):
        if penalty_alpha is not None:
            check_penalty_alpha(penalty_alpha)
        if top_k is not None:
            check_top_k(top_k)
        if temperature is not None and not is_number(temperature, 0, above=True):
            raise ValueError(f"temperature must be a finite number above 0, got {temperature!r:.80}")
        check_generator(generator, temperature is not None, "a temperature")
        check_center(center)
        super().__init__(**options)
        self.penalty_alpha, self.top_k = penalty_alpha, top_k
        self.temperature, self.generator, self.center = temperature, generator, center

    def _shown(self) -> Mapping[str, Any]:
        named = {name: getattr(self, name) for name in ("penalty_alpha", "top_k", "temperature")}
        named |= {"center": True} if self.center else {}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def is_random(self) -> bool:
        return self.temperature is not None

    def looked_at(self, settings: Mapping[str, Any]) -> None:
        for name, check in (("penalty_alpha", check_penalty_alpha), ("top_k", check_top_k)):
            if getattr(self, name) is None and settings.get(name) is not None:
                check(settings[name])

    def settings(self, config: GenerationConfig, model: Any) -> RowSettings:
        alpha, top_k = call_settings(self.penalty_alpha, self.top_k, config, model)
        temperature = 1.0 if self.temperature is None else max(self.temperature, TINY)
        return RowSettings(alpha, temperature, 1 if alpha == 0 and not self.is_random else top_k)

    def make_strategy(self, settings: Any, noise: Callable[[int, int], torch.Tensor]) -> Strategy:
        if settings.top_k == 1:
            return Greedy()
        return Contrastive(settings.top_k, self.is_random, noise if self.is_random else None, self.center)


def contrastive_search(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """``ContrastiveSearch()`` as a plain function: ``model.generate(custom_generate=contrastive_search,
    penalty_alpha=0.6, top_k=4)``. For a random choice use the class."""
    return ContrastiveSearch()(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)


contrastive_search.search = ContrastiveSearch()  # type: ignore[attr-defined]  # whose settings are looked at
