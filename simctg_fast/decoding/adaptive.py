"""Adaptive contrastive search (Garces Arias et al. 2024, arXiv 2407.18698): how many candidates are tried, and what
their penalty weighs, by how uncertain the model is against what it was before."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationConfig

from ..checks import is_integer, is_number
from .entropies import bounded_atanh, entropy, insert_sorted, middle
from .generate_arguments import check_vocabulary
from .search import Options, Search
from .slots import round_up
from .strategies import Contrastive, Proposal, Row, RowSettings, Strategy, View

if TYPE_CHECKING:
    from typing_extensions import Unpack

Q, K_RANGE = 1.0, (5, 15)
MODES = ("both", "alpha")
_LIMIT = 1 - 1e-6


class AdaptiveContrastive(Contrastive):
    """Contrastive search whose settings follow each row's entropies.

    Args:
        candidates: the most of any row.
    """

    weighed_by = "k_range"
    row_state = ("entropies", "steps")

    def key(self) -> tuple:
        return ("adaptive", self.candidates, self.counts)

    def bind(self, rows: Sequence[Row | None], device: torch.device) -> None:
        Strategy.bind(self, rows, device)
        self.beyond = None
        settings = [RowSettings(0.0) if row is None else row.parameters for row in rows]
        self._set("q", torch.tensor([p.adaptive_q for p in settings], dtype=torch.float64))
        self._set("range", torch.tensor([p.adaptive_k_range for p in settings], dtype=torch.float64))
        self._set("is_row", torch.tensor([row is not None for row in rows]))
        self._state("steps", (len(rows),), torch.long)
        self._state("now", (len(rows), 2))
        # Of each row the entropies of its earlier steps, sorted: of the distribution, and of the candidates.
        self._state("entropies", (len(rows), 2, 1))

    def reserve(self, positions: int) -> None:
        self._state("entropies", (len(self.settings["steps"]), 2, round_up(positions)))

    def propose(self, logits: Tensor, view: View) -> Proposal:
        rows = slice(0, len(logits))
        q, (low, high) = self.settings["q"][rows], self.settings["range"][rows].unbind(dim=1)
        now = entropy(torch.softmax(logits.float(), dim=-1))
        k = low + (high - low) * self._share(0, now, math.log(logits.shape[-1]), q)
        k = k.round().clamp(max=self.candidates).long()  # half to even
        proposal = super().propose(logits, view)
        place = torch.arange(self.candidates, device=logits.device)
        probs = proposal.probs.masked_fill((place >= k[:, None]) & ~proposal.bad[:, None], 0.0)
        among = entropy((probs / probs.sum(dim=-1, keepdim=True)).double())
        share = self._share(1, among, torch.log(k.double()), q)
        self.alpha = torch.round(share, decimals=2)[:, None]
        self.settings["now"][rows] = torch.stack([now, among], dim=1)
        counts = None
        if logits.device.type == "cpu":  # elsewhere the host would wait for it
            counts = torch.where(self.settings["is_row"][rows], k, 1).clamp(min=1).tolist()
        return Proposal(proposal.tokens, probs, counts=counts)

    def _share(self, kind: int, now: Tensor, most: Tensor | float, q: Tensor) -> Tensor:
        """Of an entropy, of ``most`` there can be, against the median of those before it, in (0, 1)."""
        rows = slice(0, len(now))
        steps = self.settings["steps"][rows]
        delta = (now - middle(self.settings["entropies"][rows, kind], steps)) / most
        delta = torch.where(steps > 0, delta, 0.0)
        return torch.sigmoid(q * bounded_atanh(delta, _LIMIT))

    def advance(self, tokens: Tensor, view: View) -> None:
        rows = slice(0, len(tokens))
        kept, steps, now = (self.settings[name] for name in ("entropies", "steps", "now"))
        for kind in (0, 1):
            kept[rows, kind] = insert_sorted(kept[rows, kind], steps[rows], now[rows, kind])
        steps[rows] += 1


class AdaptiveContrastiveSearch(Search):
    """Adaptive contrastive search, to be handed to ``model.generate(custom_generate=...)`` (Garces Arias et al. 2024).

    Contrastive search in which a step tries ``k`` candidates and weighs the penalty with ``alpha``: both lie in their
    range by how far the entropy of the model's distribution (for ``alpha`` that of the candidates' probabilities) is
    above or below the median of this text's earlier steps. Deterministic; every row of a batch goes by its own text.

    Args:
        q: how sharply they follow, above 0. (The paper's is 1, its code's example has 8.)
        k_range: the fewest and the most candidates, 2 ≤ fewest ≤ most ≤ vocabulary.
        adaptive: ``"both"``, or ``"alpha"``, which leaves k at ``top_k``, as a ``k_range`` of twice that does.
        top_k: of ``adaptive="alpha"``, 2 … vocabulary. Default: 4.
        options: how it is run, see `Search`.

    The authors' code keeps the entropies of all texts of a process in one list, and leaves the range of atanh where k
    falls; here they are each text's own, and its argument is brought into range.

    Raises:
        ValueError: a value outside its range, named with the range, when the object is made or first used.
    """

    name = "adaptive contrastive search"

    def __init__(
        self,
        q: float = Q,
        k_range: tuple[int, int] = K_RANGE,
        *,
        adaptive: str = "both",
        top_k: int | None = None,
        **options: Unpack[Options],
    ):
        if not is_number(q, 0, above=True):
            raise ValueError(f"q must be a finite number above 0, got {q!r:.80}")
        if adaptive not in MODES:
            raise ValueError(f"adaptive must be one of {MODES}, got {adaptive!r:.80}")
        if top_k is not None and adaptive != "alpha":
            raise ValueError(f"top_k is {top_k!r:.80}, but adaptive={adaptive!r} takes k from k_range")
        if adaptive == "alpha" and k_range != K_RANGE:
            raise ValueError(f"k_range is {k_range!r:.80}, but adaptive='alpha' takes k from top_k")
        if top_k is not None and not is_integer(top_k, 2):
            raise ValueError(f"top_k must be an integer of at least 2, got {top_k!r:.80}")
        super().__init__(**options)
        self.q, self.adaptive, self.top_k = float(q), adaptive, 4 if top_k is None else int(top_k)
        self.k_range = check_k_range("k_range", k_range) if adaptive == "both" else (self.top_k, self.top_k)

    def _shown(self) -> Mapping[str, Any]:
        fixed = {"adaptive": self.adaptive, "top_k": self.top_k}
        return {"q": self.q} | (fixed if self.adaptive == "alpha" else {"k_range": self.k_range})

    @property
    def _most_by(self) -> str:
        return "top_k" if self.adaptive == "alpha" else "k_range"

    def settings(self, config: GenerationConfig, model: Any) -> RowSettings:
        check_vocabulary(self._most_by, self.k_range[1], model)
        return self.own_settings()

    def own_settings(self) -> RowSettings:
        return RowSettings(1.0, top_k=self.k_range[1], adaptive_q=self.q, adaptive_k_range=self.k_range)

    def make_strategy(self, settings: Any, noise: Callable[[int, int], Tensor]) -> Strategy:
        strategy = AdaptiveContrastive(settings.top_k)
        strategy.weighed_by = self._most_by
        return strategy


def check_k_range(name: str, value: Any) -> tuple[int, int]:
    """``value`` as a pair of integers. Raises ValueError: it is none, or not 2 ≤ fewest ≤ most."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or not all(is_integer(k, 2) for k in pair) or pair[0] > pair[1]:
        raise ValueError(f"{name} must be two integers, 2 <= fewest <= most, got {value!r:.80}")
    return int(pair[0]), int(pair[1])
