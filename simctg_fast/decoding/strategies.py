"""How the next token is chosen: what is tried, and which of it wins. ``generate`` and the engine ask alike.

A strategy sees the logits ``(rows, V)`` of the rows that are decoded, in their order, and may look at their tokens and
hidden states (:class:`View`). ``propose`` names ``candidates`` tokens a row. With one candidate that is the choice;
with more, all of them run through the model, and ``choose`` picks by what they lead to. Then ``advance`` may take note
of the winners. Settings of rows are tensors, made when the rows change, random numbers are drawn before a step; where
nothing else asks the host (``asks_host``), steps can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.candidate_select import contrastive_scores
from ..ops.top_k import top_k_probs
from .packing import Packing
from .slots import History, on, upload

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
    fsd_n: int | None = None
    fsd_beta: float = 0.9
    fsd_stop_tokens: tuple[int, ...] = ()
    adaptive_q: float = 1.0
    adaptive_k_range: tuple[int, int] = (5, 15)
    guard_window: int = 7
    guard_decay: float = 0.95

    @property
    def parameters(self) -> RowSettings:
        return self


@dataclass
class View:
    """What is there of the rows that are decoded, the first ones of all: of ``history`` and ``tokens (rows, T)`` int64,
    the prompt's among them, ``lengths (rows,)`` positions are in use (0 where there is no row), those from
    ``starts (rows,)`` on (None: 0); what lies before is padding. ``tokens`` is None unless `Strategy.needs_tokens`;
    positions that are no tokens (images, learned prompts, gaps) hold −1. ``positions``: how many all rows have
    alike, None: they may differ."""

    history: History
    lengths: Tensor
    tokens: Tensor | None = None
    starts: Tensor | None = None
    positions: int | None = None

    def similarity(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Largest cosine of ``states (rows, k, D)`` with the rows' histories, or of both less the histories' means, and
        its position, both ``(rows, k)``."""
        return self.history.penalty(states, self.lengths if self.positions is None else self.positions)

    def last(self, rows: int) -> Tensor:
        """The state ``(rows, D)`` of each row's newest token, as the model made it."""
        assert self.history.last is not None
        return self.history.last[:rows]


@dataclass
class Proposal:
    """Candidates ``tokens (rows, k)`` and their probabilities ``probs (rows, k)``, the most probable first. ``among``:
    of a strategy that has chosen one already, those it was chosen from, and why. ``counts``: of each row how many
    columns can win, at least one, where the host knows that others cannot."""

    tokens: Tensor
    probs: Tensor
    near: Tensor | None = None  # (rows,) where rounding may choose otherwise, if that is counted
    among: tuple[Proposal, Choice] | None = None
    counts: list[int] | None = None

    def narrowed(self) -> Proposal:
        """The columns that can win in any row."""
        if self.counts is None:
            return self
        needed = max(self.counts)
        return Proposal(self.tokens[:, :needed], self.probs[:, :needed], counts=self.counts)

    @property
    def packing(self) -> Packing | None:
        """What of it can win, where that is fewer in some rows than in others."""
        return None if self.counts is None or min(self.counts) == self.tokens.shape[1] else Packing(self.counts)

    @property
    def bad(self) -> Tensor:
        """``(rows,)`` where there were no probabilities to choose by."""
        return (self.probs if self.among is None else self.among[0].probs).isnan().any(dim=-1)


@dataclass
class Choice:
    """``selected (rows,)``: index of each row's winner; ``scores (rows, k)``, −inf for what cannot be chosen, and what
    they became with noise, ``ranked``; ``penalty`` and the ``position`` it comes from, both ``(rows, k)``; ``near``:
    as in `Proposal`."""

    selected: Tensor
    scores: Tensor
    ranked: Tensor
    penalty: Tensor
    position: Tensor
    near: Tensor | None = None


def decision(proposal: Proposal, choice: Choice | None) -> Tensor:
    """``(rows, 3)`` int64 on the device of the proposal: the token, whether there were no probabilities to choose it
    by, and whether it was a near tie."""
    tokens = proposal.tokens[:, 0]
    if choice is not None:
        tokens = proposal.tokens.gather(1, on(tokens.device, choice.selected)[:, None])[:, 0]
    near = proposal.near if choice is None else choice.near
    near = torch.zeros_like(tokens) if near is None else near.to(tokens)
    return torch.stack([tokens, proposal.bad.to(tokens), near], dim=1)


class Strategy:
    """What every strategy is asked.

    Attributes:
        candidates: tokens tried a step, the rows of a forward for each row that is decoded; weighed: tokens that one
            is chosen from, and ``weighed_by`` the setting that says so, or "" if smaller vocabularies will do.
        needs_history, needs_tokens: whether hidden states, and the text's tokens, are kept for it; needs_norms: and the
            states' lengths.
        centers: whether hidden states are kept to be compared less their mean, a `CenteredHistory`.
        looks_ahead: whether candidates are run before one of them is chosen; else the first is the choice.
        asks_host: whether ``propose``, ``choose`` or ``advance`` read tensors on the host.
        near_ties: choices that rounding may make otherwise, where they are counted (``counts``).
        static: settings stay in the tensors they were first put into, one for each that there may be.
        settings: tensors that a captured step reads.
        row_state: names of those that hold what is known of each row's text, zero where it begins.
    """

    candidates = weighed = 1
    weighed_by = "top_k"
    needs_history = needs_tokens = needs_norms = False
    centers = False
    looks_ahead = False
    asks_host = False
    counts = False
    static = False
    row_state: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.near_ties = 0
        self.settings: dict[str, Tensor] = {}

    def check_vocabulary(self, count: int, whose: str) -> None:
        """Raise ValueError where ``count`` logits, of what ``whose`` says, are fewer than are weighed."""
        if self.weighed > count and self.weighed_by:
            raise ValueError(f"{self.weighed_by} must be at most the {count} logits of {whose}, got {self.weighed}")

    def key(self) -> tuple | None:
        """What its steps do beside what is in the settings: a graph that was captured with one strategy serves another
        of the same key. None: no other."""
        return None

    def bind(self, rows: Sequence[Row | None], device: torch.device) -> None:
        """These rows are decoded from now on; None: a place where there is none."""
        self.rows, self.device = rows, device

    def reserve(self, positions: int) -> None:
        """Texts may reach so many positions: what grows with them makes room, outside of what is captured."""

    def draw(self, rows: int) -> None:
        """Random numbers for the next step of the first ``rows``."""

    def propose(self, logits: Tensor, view: View) -> Proposal:
        """Candidates of the first rows that are bound, as many as there are logits."""
        raise NotImplementedError

    def choose(self, states: Tensor, proposal: Proposal, view: View) -> Choice:
        """Each row's winner, given the candidates' last-layer ``states (rows, k, D)``."""
        raise NotImplementedError

    def advance(self, tokens: Tensor, view: View) -> None:
        """``tokens (rows,)`` were chosen: once a step, when they, keys and hidden states are in place and lengths are
        still those before. For state of its own a row, which :meth:`copy` and :meth:`clear` follow."""

    def copy(self, source: int, target: int) -> None:
        """Row ``target`` goes on from what ``source`` holds."""
        for name in self.row_state:
            self.settings[name][target] = self.settings[name][source]

    def clear(self, row: int) -> None:
        """The row begins with another text."""
        for name in self.row_state:
            self.settings[name][row] = 0

    def count(self, rows: Sequence[Row | None], near: Sequence[Any]) -> None:
        """Add what were near ties in ``rows`` that there are."""
        self.near_ties += sum(bool(hit) for row, hit in zip(rows, near, strict=False) if row is not None)

    def _chosen(self, proposal: Proposal, choice: Choice) -> Proposal:
        """What was weighed, as a proposal of the one that won."""
        index = choice.selected[:, None]
        tokens, probs = proposal.tokens.gather(1, index), proposal.probs.gather(1, index)
        return Proposal(tokens, probs, choice.near, (proposal, choice))

    def _beyond(self, settings: Sequence[Any]) -> Tensor | None:
        """``(rows, weighed)``: what a row with a smaller ``top_k`` must not take; None: all may take all."""
        narrow = [self.weighed if p is None or p.top_k is None else p.top_k for p in settings]
        if not self.static and min(narrow, default=self.weighed) >= self.weighed:
            return None
        return self._set("beyond", torch.arange(self.weighed)[None] >= torch.tensor(narrow)[:, None])

    def _noise_of_each(self, rows: int, candidates: int) -> Tensor:
        """Gumbel noise from each row's own numbers: one draw a candidate whatever its ``top_k``; none at temperature
        0."""
        noise = torch.ones(rows, candidates)
        for index, row in enumerate(self.rows[:rows]):
            if row is not None and not is_cold(row.parameters):
                noise[index].exponential_(generator=row.generator)
        return gumbel(noise)

    def _state(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        """What the strategy knows of its rows, ``shape`` or more of it, in one place as long as that suffices."""
        kept = self.settings.get(name)
        if kept is None or any(have < want for have, want in zip(kept.shape, shape, strict=True)):
            grown = torch.zeros(tuple(shape), dtype=dtype, device=self.device)
            if kept is not None:
                grown = torch.zeros(tuple(map(max, shape, kept.shape)), dtype=dtype, device=self.device)
                grown[tuple(map(slice, kept.shape))] = kept
            self.settings[name] = grown
        return self.settings[name]

    def _near(self, scores: Tensor) -> Tensor | None:
        """``scores (rows, k)`` in any order."""
        if not self.counts or scores.shape[1] < 2:
            return None
        best = scores.topk(2, dim=-1).values
        return (best[:, 0] - best[:, 1]) < NEAR_TIE

    def _set(self, name: str, values: Tensor) -> Tensor:
        """A setting, made on the host: in the tensor that it was in before, if that has to stay."""
        kept = self.settings.get(name)
        if self.static and kept is not None:
            upload(values, kept)
        else:
            self.settings[name] = values.to(self.device)
        return self.settings[name]


class Greedy(Strategy):
    """The most probable token."""

    def key(self) -> tuple:
        return ("greedy", self.counts)

    def propose(self, logits: Tensor, view: View) -> Proposal:
        probs, tokens = top_k_probs(logits, min(1 + self.counts, logits.shape[-1]))
        return Proposal(tokens[:, :1], probs[:, :1], self._near(probs))


class Contrastive(Strategy):
    """Contrastive search (Su et al. 2022, arXiv 2202.06417, equation 5): the largest ``(1 − alpha) p − alpha`` times
    the largest cosine with the history; of equal scores the more probable, which comes first.

    Args:
        candidates: tried a step; rows whose own ``top_k`` is smaller take of the first of them.
        random: draws among them by ``exp(score / temperature)``.
        noise: makes Gumbel noise ``(rows, k)`` of so many rows and candidates; None: each row's from its own generator.
        center: cosines are between states less the mean of the history.
    """

    needs_history = looks_ahead = True

    def __init__(
        self,
        candidates: int,
        random: bool = False,
        noise: Callable[[int, int], Tensor] | None = None,
        center: bool = False,
    ):
        super().__init__()
        self.candidates = self.weighed = candidates
        self.random, self.noise, self.centers = random, noise, center

    def key(self) -> tuple:
        return ("contrastive", self.candidates, self.random, self.counts, self.centers)

    def bind(self, rows: Sequence[Row | None], device: torch.device) -> None:
        super().bind(rows, device)
        settings = [row.parameters if row is not None else None for row in rows]
        # One number where rows have one; else in float64, as a number is: its difference from 1 is rounded once.
        self.alpha: float | Tensor = next((p.penalty_alpha for p in settings if p is not None), 0.0)
        if self.static or any(p is not None and p.penalty_alpha != self.alpha for p in settings):
            alpha = [0.0 if p is None else p.penalty_alpha for p in settings]
            self.alpha = self._set("alpha", torch.tensor(alpha, dtype=torch.float64)[:, None])
        self.beyond = self._beyond(settings)
        if self.random:
            temperature = [1.0 if p is None or is_cold(p) else p.temperature for p in settings]
            self._set("temperature", torch.tensor(temperature)[:, None])

    def draw(self, rows: int) -> None:
        if self.random:
            self._set("noise", (self.noise or self._noise_of_each)(rows, self.candidates))

    def propose(self, logits: Tensor, view: View) -> Proposal:
        probs, tokens = top_k_probs(logits, self.candidates)
        if self.beyond is not None:
            probs = probs.masked_fill(self.beyond[: len(probs)], 0.0)
        return Proposal(tokens, probs)

    def choose(self, states: Tensor, proposal: Proposal, view: View) -> Choice:
        penalty, position = view.similarity(states)
        rows = slice(0, len(states))
        alpha = on(penalty.device, self.alpha[rows]) if isinstance(self.alpha, Tensor) else self.alpha
        scores = contrastive_scores(on(penalty.device, proposal.probs), penalty, alpha)
        scores = ranked = scores.nan_to_num_(nan=float("-inf"), neginf=float("-inf"))  # a state that overflowed loses
        if self.random:
            ranked = scores / self.settings["temperature"][rows].to(scores) + self.settings["noise"][rows].to(scores)
        return Choice(ranked.argmax(dim=-1), scores, ranked, penalty, position, self._near(ranked))


def gumbel(noise: Tensor) -> Tensor:
    """Gumbel noise of exponential noise, in place."""
    return noise.log_().neg_()


def is_cold(p: Any) -> bool:
    """Temperature 0, or so near to it that float32 cannot divide by it."""
    return p.temperature < torch.finfo(torch.float32).tiny
