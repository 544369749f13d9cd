"""Sampling from the model's distribution as transformers' warpers leave it.

Two of the warpers sort the vocabulary. On the CPU, where that takes as long as a small model's step, only the tokens
are sorted that may be left. Sums are in float64; of equally probable tokens at the edge of top-p the later ones stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process

from .strategies import Proposal, Row, Strategy, View, is_cold

Warper = Callable[[Any, Tensor], Tensor]


class Sample(Strategy):
    """Draws from the model's distribution as transformers' warpers leave it."""

    asks_host = True

    def bind(self, rows: Sequence[Row | None], device: torch.device) -> None:
        super().bind(rows, device)
        groups: dict[tuple, list[int]] = {}
        for index, row in enumerate(rows):
            if row is not None:
                p = row.parameters
                groups.setdefault((p.temperature, p.top_k, p.top_p, p.min_p, p.typical_p), []).append(index)
        self.groups = [(_warpers(rows[found[0]].parameters, device), found) for found in groups.values()]
        self.cold = [index for index, row in enumerate(rows) if row is not None and is_cold(row.parameters)]

    def propose(self, logits: Tensor, view: View) -> Proposal:
        warped = logits.clone()
        for warpers, found in self.groups:
            part = logits if len(found) == len(logits) else logits[found]
            for warper in warpers:
                part = warper(None, part)
            warped[found] = part
        probs = torch.softmax(warped, dim=-1)
        draws = torch.tensor(
            [
                0.0 if row is None else torch.rand((), generator=row.generator, dtype=torch.float64)
                for row in self.rows[: len(logits)]
            ],
            dtype=torch.float64,
            device=logits.device,
        )
        # The inverse of the distribution function. Sums in float64: a token's share must not depend on its place.
        sums = probs.double().cumsum(dim=-1)
        tokens = torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True)
        tokens = tokens.clamp_(max=logits.shape[-1] - 1)
        if self.cold:
            tokens[self.cold] = probs[self.cold].argmax(dim=-1, keepdim=True)
        chosen = probs.gather(-1, tokens)
        impossible = (chosen == 0).squeeze(-1)  # rounding led past the last possible token
        if bool(impossible.any()):
            tokens[impossible] = probs[impossible].argmax(dim=-1, keepdim=True)
            chosen = probs.gather(-1, tokens)
        return Proposal(tokens, chosen)


def _warpers(p: Any, device: torch.device) -> list[Warper]:
    """In the order in which ``generate`` applies them."""
    warpers: list[Warper] = []
    cpu = device.type == "cpu"
    if p.temperature != 1.0 and not is_cold(p):
        warpers.append(logits_process.TemperatureLogitsWarper(float(p.temperature)))
    if p.top_k is not None:
        warpers.append(logits_process.TopKLogitsWarper(top_k=int(p.top_k)))
    if p.top_p is not None and p.top_p < 1.0:
        warpers.append(_on_cpu(top_p, p.top_p) if cpu else logits_process.TopPLogitsWarper(top_p=float(p.top_p)))
    if p.min_p is not None:
        warpers.append(logits_process.MinPLogitsWarper(min_p=float(p.min_p)))
    if p.typical_p is not None and p.typical_p < 1.0:
        warpers.append(
            _on_cpu(typical_p, p.typical_p) if cpu else logits_process.TypicalLogitsWarper(float(p.typical_p))
        )
    return warpers


def _on_cpu(leaves: Callable[[Tensor, float], Tensor], share: float) -> Warper:
    return lambda _, logits: leaves(logits, float(share))


def top_p(logits: Tensor, share: float) -> Tensor:
    """What ``TopPLogitsWarper`` leaves: the fewest most probable tokens that hold the share."""
    left, most = torch.full_like(logits, float("-inf")), 1.0 - share
    for row, probs in enumerate(logits.softmax(dim=-1)):
        tokens = _likely(probs, most)
        rising, order = probs[tokens].sort(stable=True)
        mass = rising.double().cumsum(0)
        stays = mass + (1.0 - mass[-1:]) > most
        stays[-1:] = True
        tokens = tokens[order[stays]]
        left[row, tokens] = logits[row, tokens]
    return left


def typical_p(logits: Tensor, share: float) -> Tensor:
    """What ``TypicalLogitsWarper`` leaves: the tokens that hold the share and whose surprise is nearest to the mean."""
    left = torch.full_like(logits, float("-inf"))
    log_probs = logits.log_softmax(dim=-1)
    every = log_probs.exp()
    distances = (every * log_probs).nansum(dim=-1, keepdim=True).sub(log_probs).abs_()
    for row, (probs, distance) in enumerate(zip(every, distances, strict=True)):
        tokens = _likely(probs, 1.0 - share)  # hold the share, so that whatever is further away than all of them goes
        if not len(tokens):
            continue  # NaN
        tokens = (distance <= distance[tokens].amax()).nonzero().squeeze(1)
        rising, order = distance[tokens].sort(stable=True)
        last = int((probs[tokens[order]].double().cumsum(0) < share).sum())
        tokens = tokens[distance[tokens] <= rising[min(last, len(rising) - 1)]]
        left[row, tokens] = logits[row, tokens]
    return left


def _likely(probs: Tensor, most: float) -> Tensor:
    """The tokens of a row but some that hold less than ``most`` together."""
    return (probs > 0.999 * most / len(probs)).nonzero().squeeze(1)
