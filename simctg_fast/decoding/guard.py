"""GUARD (2025, arXiv 2508.20757): how many tokens may come, and how much those pay that were there before, by how
uncertain the model is now, was lately, and has been all along. One row a token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import is_integer, is_number
from ..ops.earlier_text import token_counts
from ..ops.top_k import top_k_probs
from .entropies import bounded_atanh, entropy, lower_median_of_last
from .search import Options, Search, check_generator
from .strategies import Choice, Proposal, Row, RowSettings, Strategy, View, is_cold

if TYPE_CHECKING:
    from typing_extensions import Unpack

LOW, HIGH = 5, 15  # tokens that may come
WINDOW, DECAY = 7, 0.95
MOST_WINDOW = 64
_SMALL, _LIMIT, _INSIDE = 1e-4, 1 - 1e-4, 1e-5


class Guard(Strategy):
    """Among the k most probable tokens, by ``ln p`` plus ``ln alpha`` for every time that a token is in the text.

    Args:
        random: draws by these scores over the row's temperature; else the largest is taken, as at temperature 0.
        noise: as of `Contrastive`.
    """

    needs_tokens = True
    weighed, weighed_by = HIGH, ""  # of a smaller vocabulary all
    row_state = ("entropies", "steps", "sums")

    def __init__(self, random: bool = True, noise: Callable[[int, int], Tensor] | None = None):
        super().__init__()
        self.random, self.noise = random, noise

    def key(self) -> tuple:
        return ("guard", self.random, self.counts)

    def bind(self, rows: Sequence[Row | None], device: torch.device) -> None:
        super().bind(rows, device)
        settings = [RowSettings(0.0) if row is None else row.parameters for row in rows]
        self._set("window", torch.tensor([p.guard_window for p in settings]))
        self._set("decay", torch.tensor([p.guard_decay for p in settings], dtype=torch.float64))
        temperatures = [1.0 if is_cold(p) else p.temperature for p in settings]
        self._set("temperature", torch.tensor(temperatures)[:, None])
        # Of each row: the newest entropies, how many there were, and sums of them and of their weights.
        self._state("entropies", (len(rows), MOST_WINDOW))
        self._state("steps", (len(rows),), torch.long)
        self._state("sums", (len(rows), 2))
        self._state("now", (len(rows),))

    def draw(self, rows: int) -> None:
        if self.random:
            self._set("noise", (self.noise or self._noise_of_each)(rows, self.weighed))

    def propose(self, logits: Tensor, view: View) -> Proposal:
        rows = slice(0, len(logits))
        now = entropy(torch.softmax(logits.float(), dim=-1), _INSIDE)
        self.settings["now"][rows] = now
        share, alpha = self._schedule(now, math.log(logits.shape[-1]), rows)
        count = min(self.weighed, logits.shape[-1])
        probs, tokens = top_k_probs(logits, count)
        beyond = torch.arange(count, device=logits.device) >= share[:, None]
        probs = probs.masked_fill(beyond, 0.0)
        assert view.tokens is not None
        times = token_counts(view.tokens, tokens, view.lengths, view.starts)
        penalty = times * -alpha.log()[:, None]
        scores = ranked = probs.log() - penalty.to(probs.dtype)
        if self.random:
            noise = self.settings["noise"][rows, :count].to(scores)
            ranked = scores / self.settings["temperature"][rows].to(scores) + noise
        ranked = ranked.nan_to_num(nan=float("-inf"), neginf=float("-inf"))
        choice = Choice(ranked.argmax(dim=-1), scores, ranked, penalty, torch.full_like(tokens, -1), self._near(ranked))
        return self._chosen(Proposal(tokens, probs), choice)

    def _schedule(self, now: Tensor, most: float, rows: slice) -> tuple[Tensor, Tensor]:
        """``k (rows,)`` int64 and ``alpha (rows,)`` of a step whose entropies are ``now (rows,)``; ``most`` there can
        be."""
        window = self.settings["window"][rows]
        before, steps = self.settings["entropies"][rows], self.settings["steps"][rows] + 1
        entropies = torch.cat([before[:, 1:], now[:, None]], dim=1)
        is_long = steps >= window
        lately = lower_median_of_last(entropies, torch.minimum(steps, window))
        sums = self._sums(now, rows)
        without_first = lower_median_of_last(entropies, torch.where(is_long, window - 1, 1))
        drift = torch.where(is_long, without_first - sums[:, 0] / sums[:, 1], 0.0)
        last = before[:, -1]
        change = ((now - last).abs() / (last + _SMALL)).clamp(0.0, 1.0)
        change = torch.where(steps > 1, change, 0.0)
        change = change + (drift.abs() / (without_first + _SMALL)).clamp(0.0, 1.0)  # no drift: 0
        q = 0.9 + 0.1 * (1.0 + change)

        def share(unit: Tensor | float) -> Tensor:
            local, overall = (q * bounded_atanh(x / unit, _LIMIT) for x in (now - lately, drift))
            weight = local.abs() / (local.abs() + overall.abs() + _SMALL)
            return torch.sigmoid(weight * local + (1 - weight) * overall)

        k = LOW + (HIGH - LOW) * share(most)
        return k.floor().long(), share(torch.log(k + _SMALL))

    def _sums(self, now: Tensor, rows: slice) -> Tensor:
        """``(rows, 2)``: the entropies so far and their weights, each step's the decay of the next one's."""
        return self.settings["sums"][rows] * self.settings["decay"][rows, None] + torch.stack(
            [now, torch.ones_like(now)], dim=1
        )

    def advance(self, tokens: Tensor, view: View) -> None:
        rows = slice(0, len(tokens))
        now, entropies = self.settings["now"][rows], self.settings["entropies"]
        self.settings["sums"][rows] = self._sums(now, rows)
        entropies[rows] = torch.cat([entropies[rows, 1:], now[:, None]], dim=1)
        self.settings["steps"][rows] += 1


class GUARD(Search):
    """GUARD, to be handed to ``model.generate(custom_generate=...)`` (arXiv 2508.20757).

    From the entropy of the model's distribution, against its median of the last ``window`` steps and against all steps
    with weights that decay, follow how many of the most probable tokens may come (5 to 15) and a factor: the
    probability of a token that is in the text n times, prompt included, is multiplied with its nth power. A token
    costs one row, as in greedy search.

    Args:
        window: steps, 2 … 64.
        decay: weight of a step relative to the next one, in (0, 1].
        sample: draw by these probabilities; False: take the largest.
        generator: random numbers for ``sample``; the global generator of the device if None.
        options: how it is run, see `Search`.

    The authors' code draws from the whole vocabulary where all products vanish in float32; here they are sums of
    logarithms, which do not.

    Raises:
        ValueError: a value outside its range, named with the range, when the object is made or first used.
    """

    name = "GUARD"
    random_by = "GUARD(sample=True)"

    def __init__(
        self,
        window: int = WINDOW,
        decay: float = DECAY,
        sample: bool = True,
        *,
        generator: torch.Generator | None = None,
        **options: Unpack[Options],
    ):
        if not is_integer(window, 2, MOST_WINDOW):
            raise ValueError(f"window must be an integer from 2 to {MOST_WINDOW}, got {window!r:.80}")
        if not is_number(decay, 0, 1, above=True):
            raise ValueError(f"decay must be a number in (0, 1], got {decay!r:.80}")
        if not isinstance(sample, bool):
            raise ValueError(f"sample must be True or False, got {sample!r:.80}")
        check_generator(generator, sample, "sample=True")
        super().__init__(**options)
        self.window, self.decay, self.sample, self.generator = int(window), float(decay), sample, generator

    def _shown(self) -> Mapping[str, Any]:
        return {"window": self.window, "decay": self.decay, "sample": self.sample}

    @property
    def is_random(self) -> bool:
        return self.sample

    def own_settings(self) -> RowSettings:
        return RowSettings(1.0, guard_window=self.window, guard_decay=self.decay)

    def make_strategy(self, settings: Any, noise: Callable[[int, int], Tensor]) -> Strategy:
        return Guard(self.sample, noise if self.sample else None)
