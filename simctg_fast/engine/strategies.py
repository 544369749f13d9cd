"""How the next token is chosen: which candidates are tried, and which of them wins.

A strategy sees logits ``(rows, V)`` and the sequences in those rows (None where there is none). ``propose`` names
``candidates`` tokens a row. With one candidate that is the choice; with more, the engine runs all of them through the
model and ``choose`` picks by probability and degeneration penalty.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass

import torch
from transformers.generation import logits_process

from ..decoding.choice import Choice, choose_candidate, gumbel
from ..ops.top_k import top_k_probs
from .parameters import Parameters
from .sequence import Sequence

NEAR_TIE = 1e-6  # scores nearer than this may be ranked otherwise where sums are taken in another order

Rows = List[Sequence | None]


@dataclass
class Proposal:
    """Candidates ``tokens (rows, k)`` and their probabilities ``probs (rows, k)``, the most probable first."""

    tokens: torch.Tensor
    probs: torch.Tensor
    noise: torch.Tensor | None = None  # (rows, k), drawn once a step, however often ``choose`` has to be asked

    def first(self, rows: int) -> Proposal:
        """Those of the first ``rows``."""
        return Proposal(self.tokens[:rows], self.probs[:rows], None if self.noise is None else self.noise[:rows])


class Strategy:
    """What the engine asks of a strategy. ``candidates``: tokens tried a step."""

    candidates = 1
    needs_history = False

    def __init__(self) -> None:
        self.near_ties = 0

    def bind(self, rows: Rows, device: torch.device) -> None:
        """The rows have changed."""
        self.rows, self.device = rows, device

    def propose(self, logits: torch.Tensor) -> Proposal:
        raise NotImplementedError

    def choose(self, proposal: Proposal, similarity: tuple[torch.Tensor, torch.Tensor]) -> Choice:
        """Each row's winner, given the largest cosine of its candidates with the history, and its position, both
        ``(rows, k)``: of the first ``rows`` of those that are bound."""
        raise NotImplementedError

    def _count_near_ties(self, scores: torch.Tensor) -> None:
        """``scores (rows, k)`` in any order."""
        best = scores.topk(2, dim=-1).values
        near = (best[:, 0] - best[:, 1]) < NEAR_TIE
        if bool(near.any()):
            self.near_ties += sum(
                1 for row, hit in zip(self.rows, near.tolist(), strict=False) if hit and row is not None
            )

    def _column(self, values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)[:, None]


class Greedy(Strategy):
    """The most probable token."""

    def propose(self, logits: torch.Tensor) -> Proposal:
        probs, tokens = top_k_probs(logits, 2)
        self._count_near_ties(probs)
        return Proposal(tokens[:, :1], probs[:, :1])


class Contrastive(Strategy):
    """Contrastive search; with ``random``, a seeded draw among the candidates by ``exp(score / temperature)``."""

    needs_history = True

    def __init__(self, candidates: int, random: bool = False):
        super().__init__()
        self.candidates, self.random = candidates, random

    def bind(self, rows: Rows, device: torch.device) -> None:
        super().bind(rows, device)
        settings = [row.parameters if row is not None else None for row in rows]
        # In float64, as a number is: its difference from 1 is rounded once.
        self.alpha = self._column([0.0 if p is None else p.penalty_alpha for p in settings], torch.float64)
        narrow = [self.candidates if p is None or p.top_k is None else p.top_k for p in settings]
        self.beyond: torch.Tensor | None = None  # candidates a row with a smaller top_k must not take
        if min(narrow, default=self.candidates) < self.candidates:
            width = torch.tensor(narrow, device=device)[:, None]
            self.beyond = torch.arange(self.candidates, device=device)[None] >= width
        if self.random:
            self.temperature = self._column([1.0 if p is None or _is_cold(p) else p.temperature for p in settings])

    def propose(self, logits: torch.Tensor) -> Proposal:
        probs, tokens = top_k_probs(logits, self.candidates)
        if self.beyond is not None:
            probs = probs.masked_fill(self.beyond, 0.0)
        return Proposal(tokens, probs, self._noise(probs) if self.random else None)

    def choose(self, proposal: Proposal, similarity: tuple[torch.Tensor, torch.Tensor]) -> Choice:
        rows = slice(0, len(proposal.probs))
        temperature = self.temperature[rows] if self.random else None
        choice = choose_candidate(proposal.probs, similarity, self.alpha[rows], temperature, proposal.noise)
        if self.candidates > 1:
            self._count_near_ties(choice.ranked)
        return choice

    def _noise(self, probs: torch.Tensor) -> torch.Tensor:
        """Gumbel noise, each row's from its own generator, one draw a candidate whatever the row's ``top_k``; none at
        temperature 0."""
        noise = torch.ones(probs.shape, dtype=torch.float32)
        for index, row in enumerate(self.rows):
            if row is not None and not _is_cold(row.parameters):
                noise[index].exponential_(generator=row.generator)
        return gumbel(noise)


class Sample(Strategy):
    """Draws from the model's distribution as transformers' warpers leave it."""

    def bind(self, rows: Rows, device: torch.device) -> None:
        super().bind(rows, device)
        groups: dict[tuple, list[int]] = {}
        for index, row in enumerate(rows):
            if row is not None:
                p = row.parameters
                groups.setdefault((p.temperature, p.top_k, p.top_p, p.min_p, p.typical_p), []).append(index)
        self.groups = [(_warpers(rows[found[0]].parameters), found) for found in groups.values()]  # type: ignore[union-attr]
        self.cold = [index for index, row in enumerate(rows) if row is not None and _is_cold(row.parameters)]

    def propose(self, logits: torch.Tensor) -> Proposal:
        warped = logits.clone()
        for warpers, found in self.groups:
            part = logits if len(found) == len(logits) else logits[found]
            for warper in warpers:
                part = warper(None, part)
            warped[found] = part
        probs = torch.softmax(warped, dim=-1)
        draws = torch.tensor(
            [0.0 if row is None else torch.rand((), generator=row.generator, dtype=torch.float64) for row in self.rows],
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


def _is_cold(p: Parameters) -> bool:
    """Temperature 0, or so near to it that float32 cannot divide by it."""
    return p.temperature < torch.finfo(torch.float32).tiny


def _warpers(p: Parameters) -> list:
    """In the order in which ``generate`` applies them."""
    made: list = []
    if p.temperature != 1.0 and not _is_cold(p):
        made.append(logits_process.TemperatureLogitsWarper(float(p.temperature)))
    if p.top_k is not None:
        made.append(logits_process.TopKLogitsWarper(top_k=int(p.top_k)))
    if p.top_p is not None and p.top_p < 1.0:
        made.append(logits_process.TopPLogitsWarper(top_p=float(p.top_p)))
    if p.min_p is not None:
        made.append(logits_process.MinPLogitsWarper(min_p=float(p.min_p)))
    if p.typical_p is not None and p.typical_p < 1.0:
        made.append(logits_process.TypicalLogitsWarper(mass=float(p.typical_p)))
    return made


def make_strategy(name: str, parameters: Parameters) -> Strategy:
    """The strategy ``name`` for a run whose lines may go up to ``parameters.top_k`` candidates."""
    if name == "greedy":
        return Greedy()
    if name == "sample":
        return Sample()
    return Contrastive(int(parameters.top_k or 1), random=name == "stochastic-contrastive")
