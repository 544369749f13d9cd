"""What a step leaves behind in a sequence: the token, log-probabilities, and why it was chosen."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..decoding.strategies import Choice, Proposal, decision
from .sequence import Sequence


class Reading:
    """A tensor on its way to the host, which does not wait until it asks for it."""

    def __init__(self, tensor: torch.Tensor):
        self.event = None
        if tensor.device.type != "cuda":
            self.host = tensor.clone()
            return
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").pin_memory()
        self.host.copy_(tensor, non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record()

    def tolist(self) -> list:
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()


class StepRecord:
    """One step's decision for all rows, read off the device once: ``tokens``, whether there were no probabilities
    (``bad``), and near ties (``near``)."""

    def __init__(self, proposal: Proposal, choice: Choice | None = None, *, details: bool, reading: Any = None):
        """``choice``: None if there was none; ``details``: whether any row wants a trace; ``reading``: of the decision,
        where that is under way."""
        decided = (decision(proposal, choice) if reading is None else reading).tolist()
        self.tokens = [token for token, _, _ in decided]
        self.bad = [bool(bad) for _, bad, _ in decided]
        self.near = [bool(near) for _, _, near in decided]
        self.candidates: list[list[int]] = proposal.tokens.tolist() if details else []
        self.probs: list[list[float]] = proposal.probs.tolist() if details else []
        self.scores = choice.scores.tolist() if details and choice is not None else None
        self.penalty = choice.penalty.tolist() if details and choice is not None else None
        self.position = choice.position.tolist() if details and choice is not None else None

    def write(self, row: int, sequence: Sequence, logits: torch.Tensor, padding: int = 0) -> None:
        """Give ``sequence`` the token of ``row``. ``logits (1, V)``: what it was chosen by; ``padding``: positions of
        the history before its first."""
        token = self.tokens[row]
        if sequence.logprobs is not None:
            sequence.logprobs.append(_logprobs(sequence, token, logits[0]))
        if sequence.trace is not None:
            sequence.trace.append(
                {
                    "token_id": token,
                    "token": sequence.piece(token),
                    "candidates": [
                        self._candidate(row, column, sequence, padding)
                        for column in range(len(self.candidates[row]))
                        if self.probs[row][column] > 0
                    ],
                }
            )
        sequence.accept(token, logits)

    def _candidate(self, row: int, column: int, sequence: Sequence, padding: int) -> dict[str, Any]:
        token = self.candidates[row][column]
        record: dict[str, Any] = {
            "token_id": token,
            "token": sequence.piece(token),
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


def _logprobs(sequence: Sequence, token: int, logits: torch.Tensor) -> dict[str, Any]:
    """Of ``token``, and of the most probable ones that the sequence asks for; an impossible one's is None."""
    values = torch.log_softmax(logits.float(), dim=-1)
    record: dict[str, Any] = {
        "token_id": token,
        "token": sequence.piece(token),
        "logprob": _finite(values[token].item()),
    }
    if sequence.parameters.top_logprobs:
        best = values.topk(min(sequence.parameters.top_logprobs, len(values)))
        record["top_logprobs"] = [
            {"token_id": other, "token": sequence.piece(other), "logprob": value}
            for other, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            if math.isfinite(value)
        ]
    return record


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
