"""Rows of one batch that choose by strategies of their own, as long as each runs one row a token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .strategies import Choice, Proposal, Row, Strategy, View


class Mixed(Strategy):
    """Every row is ``name_of(row)``'s, one of ``parts``, none of which looks ahead."""

    def __init__(self, parts: Mapping[str, Strategy], name_of: Callable[[Any], str]):
        super().__init__()
        self.parts, self.name_of = dict(parts), name_of
        every = self.parts.values()
        self.weighed = max(part.weighed for part in every)
        self.needs_history, self.needs_tokens, self.needs_norms, self.asks_host = (
            any(getattr(part, name) for part in every)
            for name in ("needs_history", "needs_tokens", "needs_norms", "asks_host")
        )

    def key(self) -> tuple | None:
        keys = {name: part.key() for name, part in self.parts.items()}
        return None if None in keys.values() else ("mixed", *keys.items())

    def bind(self, rows: Sequence[Row | None], device: torch.device) -> None:
        super().bind(rows, device)
        names = [None if row is None else self.name_of(row) for row in rows]
        # A step that may be captured runs all of them, another one those that have rows.
        self.present = [name for name in self.parts if self.static or name in names]
        for name, part in self.parts.items():
            part.static, part.settings = self.static, self.settings.setdefault(name, {})  # type: ignore[assignment, arg-type]
            part.bind([row if mine == name else None for row, mine in zip(rows, names, strict=True)], device)
        places = {name: place for place, name in enumerate(self.present)}
        self._set("which", torch.tensor([0 if name is None else places[name] for name in names]))

    def reserve(self, positions: int) -> None:
        for name in self.present:
            self.parts[name].reserve(positions)

    def draw(self, rows: int) -> None:
        for name in self.present:
            self.parts[name].draw(rows)

    def propose(self, logits: Tensor, view: View) -> Proposal:
        found = [self.parts[name].propose(logits, view) for name in self.present]
        if len(found) == 1:
            return found[0]
        which = self.settings["which"][: len(logits)]

        def own(values: list[Tensor]) -> Tensor:
            """Of tensors ``(rows, …)``, one a part, each row's own."""
            stacked = torch.stack(values)
            index = which.view(1, -1, *[1] * (stacked.dim() - 2)).expand(1, *stacked.shape[1:])
            return stacked.gather(0, index)[0]

        width = max(1 if proposal.among is None else proposal.among[0].tokens.shape[1] for proposal in found)
        weighed = [_weighed(proposal, width) for proposal in found]
        near = [_near(proposal) for proposal in found]
        return Proposal(
            own([proposal.tokens for proposal in found]),
            own([proposal.probs for proposal in found]),
            own(near),
            (
                Proposal(own([each.tokens for each, _ in weighed]), own([each.probs for each, _ in weighed])),
                Choice(
                    *(
                        own([getattr(choice, part) for _, choice in weighed])
                        for part in ("selected", "scores", "ranked", "penalty", "position")
                    )
                ),
            ),
        )

    def advance(self, tokens: Tensor, view: View) -> None:
        for name in self.present:
            self.parts[name].advance(tokens, view)

    def copy(self, source: int, target: int) -> None:
        for part in self.parts.values():
            part.copy(source, target)

    def clear(self, row: int) -> None:
        for part in self.parts.values():
            part.clear(row)


def _near(proposal: Proposal) -> Tensor:
    if proposal.near is not None:
        return proposal.near
    return torch.zeros(len(proposal.tokens), dtype=torch.bool, device=proposal.tokens.device)


def _weighed(proposal: Proposal, width: int) -> tuple[Proposal, Choice]:
    """What a part weighed and why it chose, in ``width`` columns; those that it has not are of probability 0."""
    if proposal.among is None:
        zeros = torch.zeros_like(proposal.probs)
        none = torch.full_like(proposal.tokens, -1)
        choice = Choice(zeros[:, 0].long(), proposal.probs, proposal.probs, zeros, none)
        proposal = Proposal(proposal.tokens, proposal.probs)
    else:
        proposal, choice = proposal.among

    def wide(values: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)

    scores, ranked = (wide(values.float(), float("-inf")) for values in (choice.scores, choice.ranked))
    chosen = Choice(choice.selected, scores, ranked, wide(choice.penalty.float(), 0.0), wide(choice.position, -1))
    return Proposal(wide(proposal.tokens, 0), wide(proposal.probs.float(), 0.0)), chosen
