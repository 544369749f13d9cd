"""How the next token is chosen: what is tried, and which of it wins. ``generate`` and the engine ask alike.

A strategy sees the logits ``(rows, V)`` of the rows that are decoded, in their order, and may look at their hidden
states (:class:`View`). ``propose`` names ``candidates`` tokens a row. With one candidate that is the choice; with more,
all of them run through the model, and ``choose`` picks by what they lead to. Settings of rows are tensors, made when
the rows change; nothing in ``propose`` and ``choose`` needs the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.generation import logits_process

from ..ops.candidate_select import contrastive_scores
from ..ops.top_k import top_k_probs
from .slots import History

NEAR_TIE = 1e-6  # scores nearer than this may be ranked otherwise where sums are taken in another order


class Row(Protocol):
    """What is decoded in a row: its settings, and random numbers of its own."""

    @property
    def parameters(self) -> Any: ...

    @property
    def generator(self) -> torch.Generator: ...


@dataclass(frozen=True)
class RowSettings:
    """A row of a batch whose rows are all alike: the `Row` of a caller that has no requests."""

    penalty_alpha: float
    temperature: float = 1.0
    top_k: int | None = None
    generator: Any = None

    @property
    def parameters(self) -> RowSettings:
        return self


@dataclass
class View:
    """Hidden states of the rows that are decoded: the first rows of ``history``, of which ``lengths (rows,)`` positions
    are in use; None: as many as were written to all."""

    history: History
    lengths: Tensor | None = None

    def similarity(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Largest cosine of ``states (rows, k, D)`` with the rows' histories, and its position, both ``(rows, k)``."""
        return self.history.penalty(states, self.lengths)

    def last(self, rows: int) -> Tensor:
        """The state ``(rows, D)`` of each row's newest token, as the model made it."""
        assert self.history.last is not None
        return self.history.last[:rows]


@dataclass
class Proposal:
    """Candidates ``tokens (rows, k)`` and their probabilities ``probs (rows, k)``, the most probable first."""

    tokens: Tensor
    probs: Tensor
    noise: Tensor | None = None  # (rows, k), drawn once a step, however often ``choose`` has to be asked

    def first(self, rows: int) -> Proposal:
        """Those of the first ``rows``."""
        return Proposal(self.tokens[:rows], self.probs[:rows], None if self.noise is None else self.noise[:rows])


@dataclass
class Choice:
    """``selected (rows,)``: index of each row's winner; ``scores (rows, k)``, −inf for what cannot be chosen, and what
    they became with noise, ``ranked``; ``penalty`` and the ``position`` it comes from, both ``(rows, k)``."""

    selected: Tensor
    scores: Tensor
    ranked: Tensor
    penalty: Tensor
    position: Tensor


class Strategy:
    """What every strategy is asked.

    Attributes:
        candidates: tokens tried a step, the rows of a forward for each row that is decoded.
        needs_history: whether hidden states are kept for it.
        looks_ahead: whether candidates are run before one of them is chosen; else the first is the choice.
        near_ties: choices that rounding may make otherwise, where they are counted (``counts``).
    """

    candidates = 1
    needs_history = False
    looks_ahead = False
    counts = False

    def __init__(self) -> None:
        self.near_ties = 0

    def bind(self, rows: Sequence[Row | None], device: torch.device) -> None:
        """These rows are decoded from now on; None: a place where there is none."""
        self.rows, self.device = rows, device

    def propose(self, logits: Tensor, view: View) -> Proposal:
        """Candidates of all rows that are bound."""
        raise NotImplementedError

    def choose(self, states: Tensor, proposal: Proposal, view: View) -> Choice:
        """Each row's winner, given the candidates' last-layer ``states (rows, k, D)``; of the first ``rows`` of those
        that are bound."""
        raise NotImplementedError

    def _count_near_ties(self, scores: Tensor) -> None:
        """``scores (rows, k)`` in any order."""
        if not self.counts or scores.shape[1] < 2:
            return
        best = scores.topk(2, dim=-1).values
        near = (best[:, 0] - best[:, 1]) < NEAR_TIE
        if bool(near.any()):
            self.near_ties += sum(
                1 for row, hit in zip(self.rows, near.tolist(), strict=False) if hit and row is not None
            )

    def _column(self, values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)[:, None]


class Greedy(Strategy):
    """The most probable token."""

    def propose(self, logits: Tensor, view: View) -> Proposal:
        probs, tokens = top_k_probs(logits, min(1 + self.counts, logits.shape[-1]))
        self._count_near_ties(probs)
        return Proposal(tokens[:, :1], probs[:, :1])


class Contrastive(Strategy):
    """Contrastive search (Su et al. 2022, arXiv 2202.06417, equation 5): the largest ``(1 − alpha) p − alpha`` times
    the largest cosine with the history; of equal scores the more probable, which comes first.

    Args:
        candidates: tried a step; rows whose own ``top_k`` is smaller take of the first of them.
        random: draws among them by ``exp(score / temperature)``.
        draw: makes Gumbel noise ``(rows, k)`` like the probabilities it is given; None: each row's from its own
            generator.
    """

    needs_history = looks_ahead = True

    def __init__(self, candidates: int, random: bool = False, draw: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.candidates, self.random, self.draw = candidates, random, draw

    def bind(self, rows: Sequence[Row | None], device: torch.device) -> None:
        super().bind(rows, device)
        settings = [row.parameters if row is not None else None for row in rows]
        # One number where rows have one; else in float64, as a number is: its difference from 1 is rounded once.
        self.alpha: float | Tensor = next((p.penalty_alpha for p in settings if p is not None), 0.0)
        if any(p is not None and p.penalty_alpha != self.alpha for p in settings):
            self.alpha = self._column([0.0 if p is None else p.penalty_alpha for p in settings], torch.float64)
        narrow = [self.candidates if p is None or p.top_k is None else p.top_k for p in settings]
        self.beyond: Tensor | None = None  # candidates a row with a smaller top_k must not take
        if min(narrow, default=self.candidates) < self.candidates:
            width = torch.tensor(narrow, device=device)[:, None]
            self.beyond = torch.arange(self.candidates, device=device)[None] >= width
        if self.random:
            self.temperature = self._column([1.0 if p is None or _is_cold(p) else p.temperature for p in settings])

    def propose(self, logits: Tensor, view: View) -> Proposal:
        probs, tokens = top_k_probs(logits, self.candidates)
        if self.beyond is not None:
            probs = probs.masked_fill(self.beyond, 0.0)
        draw = self.draw or self._draw_each
        return Proposal(tokens, probs, draw(probs) if self.random else None)

    def choose(self, states: Tensor, proposal: Proposal, view: View) -> Choice:
        penalty, position = view.similarity(states)
        rows = slice(0, len(states))
        alpha = self.alpha[rows] if isinstance(self.alpha, Tensor) else self.alpha
        scores = contrastive_scores(proposal.probs.to(penalty.device), penalty, alpha)
        scores = ranked = scores.nan_to_num_(nan=float("-inf"), neginf=float("-inf"))  # a state that overflowed loses
        if proposal.noise is not None:
            ranked = scores / self.temperature[rows].to(scores) + proposal.noise.to(scores.device)
        self._count_near_ties(ranked)
        return Choice(ranked.argmax(dim=-1), scores, ranked, penalty, position)

    def _draw_each(self, probs: Tensor) -> Tensor:
        """One draw a candidate whatever the row's ``top_k``; none at temperature 0."""
        noise = torch.ones(probs.shape, dtype=torch.float32)
        for index, row in enumerate(self.rows):
            if row is not None and not _is_cold(row.parameters):
                noise[index].exponential_(generator=row.generator)
        return gumbel(noise)


def gumbel(noise: Tensor) -> Tensor:
    """Gumbel noise of exponential noise, in place."""
    return noise.log_().neg_()


class Sample(Strategy):
    """Draws from the model's distribution as transformers' warpers leave it."""

    def bind(self, rows: Sequence[Row | None], device: torch.device) -> None:
        super().bind(rows, device)
        groups: dict[tuple, list[int]] = {}
        for index, row in enumerate(rows):
            if row is not None:
                p = row.parameters
                groups.setdefault((p.temperature, p.top_k, p.top_p, p.min_p, p.typical_p), []).append(index)
        self.groups = [(_warpers(rows[found[0]].parameters), found) for found in groups.values()]
        self.cold = [index for index, row in enumerate(rows) if row is not None and _is_cold(row.parameters)]

    def propose(self, logits: Tensor, view: View) -> Proposal:
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


def _is_cold(p: Any) -> bool:
    """Temperature 0, or so near to it that float32 cannot divide by it."""
    return p.temperature < torch.finfo(torch.float32).tiny


def _warpers(p: Any) -> list:
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


def make_strategy(name: str, top_k: int | None) -> Strategy:
    """The engine's strategy ``name``, for rows of up to ``top_k`` candidates."""
    strategy: Strategy
    if name == "greedy":
        strategy = Greedy()
    elif name == "sample":
        strategy = Sample()
    else:
        strategy = Contrastive(top_k or 1, random=name == "stochastic-contrastive")
    strategy.counts = True
    return strategy
