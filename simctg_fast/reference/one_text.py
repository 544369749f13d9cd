"""What the naive searches of one text share: the whole model over the whole text for every token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .contrastive_search import _forward, true_float64

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Text:
    """A text that is being written: `ids` of the prompt and what follows it, and how clear each choice was.

    `margins`: of each new token, how much better it was than the next, or how far a number that was rounded on the way
    lay from where it would have been rounded otherwise.
    """

    model: Any
    ids: list[int]
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    processor: Processor | None = None
    margins: list[float] = field(default_factory=list)

    def look(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token's probabilities `(V,)`, and the states `(T, D)` of all positions, in the model's precision."""
        ids = torch.tensor([self.ids])
        exact = next(self.model.parameters()).dtype == torch.float64
        with torch.no_grad(), true_float64() if exact else contextlib.nullcontext():
            logits, states = _forward(self.model, ids, None, self.inputs)
            if self.processor is not None:
                logits = self.processor(ids, logits.clone())
            return torch.softmax(logits[0], dim=-1), states[0]

    def ahead(self, candidates: Sequence[int]) -> torch.Tensor:
        """The states `(k, T, D)` of the text with each of the candidates behind it."""
        ids = torch.tensor([[*self.ids, v] for v in candidates])
        inputs = {name: value.expand(len(ids), *value.shape[1:]) for name, value in self.inputs.items()}
        exact = next(self.model.parameters()).dtype == torch.float64
        with torch.no_grad(), true_float64() if exact else contextlib.nullcontext():
            return _forward(self.model, ids, None, inputs)[1]

    def write(self, token: int, margin: float) -> None:
        self.ids.append(token)
        self.margins.append(margin)

    def departure(self, found: Sequence[int], start: int) -> int | None:
        """The first place at which the new tokens `found` are others than those from `start` on, an end counting as
        one; None: they are the same."""
        expected = self.ids[start:]
        for place, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
            if ours != theirs:
                return place
        return None if len(found) == len(expected) else min(len(found), len(expected))


def lead(scores: Sequence[float]) -> float:
    """How far the best score is above the second."""
    ranked = sorted((s for s in scores if s > float("-inf")), reverse=True)
    return ranked[0] - ranked[1] if len(ranked) > 1 else float("inf")


def most_probable(p: torch.Tensor, k: int) -> tuple[list[int], float]:
    """The k most probable tokens, and by how much of its logarithm the last of them is ahead of the next."""
    ranked, order = p.sort(descending=True, stable=True)
    margin = float(ranked[k - 1].log() - ranked[k].log()) if k < len(p) and ranked[k - 1] > 0 else float("inf")
    return [int(token) for token in order[:k] if p[token] > 0], margin


def until_end(text: Text, max_new_tokens: int, eos_token_id: int | None, step: Callable[[], None]) -> Text:
    for _ in range(max_new_tokens):
        step()
        if text.ids[-1] == eos_token_id:
            break
    return text
