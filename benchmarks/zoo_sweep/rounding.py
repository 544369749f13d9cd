"""What 16 bits round away: the model's own modules, in its type, along a text of which the steps in float64 are known.

One forward is one draw of its rounding. Noise below the last bit of what the embeddings say draws again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from . import judge

TIMES = 2.0  # what is allowed, of the largest that was drawn
MEAN = 1.5  # the same of the root of the mean square of a draw
DRAWS, MORE = 2, 8  # and so many more before anything is called wrong
ROUGH = 0.5  # its own logits are further from float64 than this: nothing can be told from tokens
_SHARE = 0.3  # of the last bit: the standard deviation of a rounding


@dataclass
class Rounding:
    """Of ``draws`` forwards: relative errors of logits, and the largest difference between the errors of two tokens of
    a row, of the logarithms of their probabilities and of their scores."""

    steps: list[judge.Step]
    cached: bool = True
    logits: list[torch.Tensor] = field(default_factory=list)
    logarithms: float = 0.0
    scores: float = 0.0
    finite: bool = True

    def draw(self, model: Any, inputs: dict[str, torch.Tensor], tokens: torch.Tensor) -> None:
        """Once more; the first draw is of the model as it is."""
        model = copy.deepcopy(model)
        with _noise(model, len(self.logits)) if self.logits else nullcontext():
            found = judge.trace(model, inputs, tokens, cached=self.cached, like=self.steps)
        truth = stacked(self.steps)
        self.finite &= bool((stacked(found).isfinite() | ~truth.isfinite()).all())
        self.logits.append(judge.errors(stacked(found), truth))
        for ours, exact in zip(found, self.steps, strict=True):
            self.logarithms = max(self.logarithms, _apart(ours.probabilities.log() - exact.probabilities.log()))
            self.scores = max(self.scores, _apart(ours.scores - exact.scores))

    @property
    def largest(self) -> float:
        return float(torch.stack(self.logits).max())

    @property
    def mean(self) -> float:
        return max(map(root_mean_square, self.logits))  # experts that are chosen otherwise make some draws far worse


def root_mean_square(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def stacked(steps: list[judge.Step]) -> torch.Tensor:
    """Logits ``(B, n, V)``."""
    return torch.stack([step.logits for step in steps], dim=1)


def _apart(errors: torch.Tensor) -> float:
    finite = errors.isfinite()
    high = errors.masked_fill(~finite, -torch.inf).amax(dim=-1)
    low = errors.masked_fill(~finite, torch.inf).amin(dim=-1)
    return float((high - low).clamp_min(0).nan_to_num(nan=0.0).max())


@contextmanager
def _noise(model: Any, seed: int) -> Iterator[None]:
    random = torch.Generator().manual_seed(seed)

    def shake(module, args, states):
        if not isinstance(states, torch.Tensor) or not states.is_floating_point():
            return None
        noise = torch.randn(states.shape, generator=random, dtype=torch.float32)
        # Rounded to nearest, what is smaller than half the last bit may or may not be lost.
        return (states * (1 + _SHARE * torch.finfo(states.dtype).eps * noise)).to(states.dtype)

    modules = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    hooks = [module.register_forward_hook(shake) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
