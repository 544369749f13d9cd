"""What a step leaves behind in a sequence: the token, its log-probability, and why it was chosen."""

from __future__ import annotations

import math
from typing import Any

import torch

from .sequence import Sequence
from .strategies import Proposal


class StepRecord:
    """One step's decision for all rows, read off the device once."""

    def __init__(
        self,
        proposal: Proposal,
        selected: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
        penalty: torch.Tensor | None = None,
        position: torch.Tensor | None = None,
        *,
        details: bool,
    ):
        """``details``: whether any row wants log-probabilities or a trace."""
        if selected is None:
            self.chosen = [0] * len(proposal.tokens)
            self.tokens = proposal.tokens[:, 0].tolist()
        else:
            chosen = selected.to(proposal.tokens.device)
            self.chosen = chosen.tolist()
            self.tokens = proposal.tokens.gather(1, chosen[:, None]).squeeze(1).tolist()
        self.candidates: list[list[int]] = proposal.tokens.tolist() if details else []
        self.probs: list[list[float]] = proposal.probs.tolist() if details else []
        self.scores = scores.tolist() if details and scores is not None else None
        self.penalty = penalty.tolist() if details and penalty is not None else None
        self.position = position.tolist() if details and position is not None else None

    def write(self, row: int, sequence: Sequence, scores: torch.Tensor | None = None, padding: int = 0) -> None:
        """Give ``sequence`` the token of ``row``. ``scores (1, V)`` are for its stopping criteria; ``padding``:
        positions of the history before its first."""
        token, chosen = self.tokens[row], self.chosen[row]
        if sequence.logprobs is not None:
            sequence.logprobs.append(
                {
                    "token_id": token,
                    "token": sequence.tokenizer.decode([token]),
                    "logprob": _log(self.probs[row][chosen]),
                }
            )
        if sequence.trace is not None:
            sequence.trace.append(
                {
                    "token_id": token,
                    "token": sequence.tokenizer.decode([token]),
                    "candidates": [
                        self._candidate(row, column, sequence, padding)
                        for column in range(len(self.candidates[row]))
                        if self.probs[row][column] > 0
                    ],
                }
            )
        sequence.accept(token, scores)

    def _candidate(self, row: int, column: int, sequence: Sequence, padding: int) -> dict[str, Any]:
        token = self.candidates[row][column]
        record: dict[str, Any] = {
            "token_id": token,
            "token": sequence.tokenizer.decode([token]),
            "probability": self.probs[row][column],
        }
        if self.penalty is not None and self.position is not None and self.scores is not None:
            position = self.position[row][column] - padding
            earlier = sequence.token_at(position)
            record |= {
                "penalty": _finite(self.penalty[row][column]),
                "score": _finite(self.scores[row][column]),
                "because": {
                    "position": position,
                    "token_id": earlier,
                    "token": sequence.tokenizer.decode([earlier]),
                },
            }
        return record


def _log(probability: float) -> float | None:
    return math.log(probability) if probability > 0 else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
