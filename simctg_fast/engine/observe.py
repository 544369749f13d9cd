"""What a step leaves behind in a sequence: the token, log-probabilities, and why it was chosen."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..decoding.dry import DRYLogitsProcessor
from ..decoding.strategies import Choice, Proposal, Strategy
from .sequence import Sequence


class StepRecord:
    """One step's decision for ``rows`` (None: nobody's), on its way to the host, which does not wait until it writes.

    Args:
        decided: as `strategies.decision` makes it, of ``proposal`` and ``choice``.
        logits: ``(rows, V)``, by which the tokens are chosen.
        padding: of each row, positions of the history before its first.
    """

    def __init__(
        self,
        rows: list[Sequence | None],
        proposal: Proposal,
        choice: Choice | None,
        decided: torch.Tensor,
        logits: torch.Tensor,
        padding: list[int] | None = None,
    ):
        self.rows, self.proposal, self.choice, self.logits = rows, proposal, choice, logits
        self.padding = padding or [0] * len(rows)
        is_cuda = decided.device.type == "cuda"
        host = torch.empty(decided.shape, dtype=decided.dtype, device="cpu")
        self.host = host.pin_memory() if is_cuda else host
        self.host.copy_(decided, non_blocking=is_cuda)
        self.event = torch.cuda.Event() if is_cuda else None
        if self.event is not None:
            self.event.record(torch.cuda.current_stream(decided.device))  # the current device may be another

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()

    def write(self, strategy: Strategy) -> int:
        """Give every row that has not ended its token, or say why there is none; ``strategy`` is told of near ties.
        Returns how many got one."""
        self.wait()
        decided: list[list[int]] = self.host.tolist()
        rows = [None if row is None or row.finished else row for row in self.rows]
        strategy.count(rows, [near for _, _, near in decided])
        if any(row is not None and row.trace is not None for row in rows):
            self._read_details()
        written = 0
        for place, sequence in enumerate(rows):
            if sequence is None:
                continue
            token, is_bad, _ = decided[place]
            if is_bad:
                sequence.fail("nan_logits", f"the logits left no probabilities at new token {len(sequence.tokens)}")
            else:
                self._write(place, token, sequence)
                written += 1
        return written

    def _read_details(self) -> None:
        proposal, choice = self.proposal.among or (self.proposal, self.choice)
        self.candidates: list[list[int]] = proposal.tokens.tolist()
        self.probs: list[list[float]] = proposal.probs.tolist()
        parts = ("scores", "penalty", "position")
        self.why = None if choice is None else {part: getattr(choice, part).tolist() for part in parts}

    def _write(self, row: int, token: int, sequence: Sequence) -> None:
        logits = self.logits[row : row + 1]
        if sequence.logprobs is not None:
            sequence.logprobs.append(_logprobs(sequence, token, logits[0]))
        if sequence.trace is not None:
            columns = [column for column, probability in enumerate(self.probs[row]) if probability > 0]
            candidates = [self._candidate(row, column, sequence) for column in columns]
            piece = sequence.piece(token)
            step = {"token_id": token, "token": piece, "candidates": candidates}
            held = self._held_back(row, token, sequence)
            sequence.trace.append(step | ({"dry": held} if held else {}))
        sequence.accept(token, logits)

    def _candidate(self, row: int, column: int, sequence: Sequence) -> dict[str, Any]:
        token = self.candidates[row][column]
        record: dict[str, Any] = {
            "token_id": token,
            "token": sequence.piece(token),
            "probability": self.probs[row][column],
        }
        if self.why is not None:
            position = self.why["position"][row][column] - self.padding[row]
            record["penalty"] = _finite(self.why["penalty"][row][column])
            record["score"] = _finite(self.why["scores"][row][column])
            if sequence.strategy == "guard" and record["penalty"]:
                position = _last_place(token, sequence)
            if position >= 0:
                record["because"] = self._because(position, sequence)
        return record

    def _because(self, position: int, sequence: Sequence) -> dict[str, Any]:
        """The earlier token that says most against a candidate; of FSD, the n-gram whose end it is."""
        if self.proposal.among is None or sequence.parameters.fsd_n is None:
            return _earlier(position, sequence)
        count, end = 0, len(sequence.prompt_ids) + len(sequence.tokens)
        while count < min(sequence.parameters.fsd_n - 1, position) and (
            sequence.strategy == "fsd-vec"
            or sequence.token_at(position - 1 - count) == sequence.token_at(end - 1 - count)
        ):
            count += 1
        return _earlier(position, sequence, count)

    def _held_back(self, row: int, chosen: int, sequence: Sequence) -> list[dict[str, Any]]:
        """Tokens whose logit would be above the chosen one's without the penalty of DRY, the dearest first."""
        found: list[dict[str, Any]] = []
        for processor in sequence.processors:
            if not isinstance(processor, DRYLogitsProcessor):
                continue
            logits, causes = self.logits[row].tolist(), processor.causes(sequence.prompt_ids + sequence.tokens)
            for token, (penalty, position, count) in causes.items():
                if token < len(logits) and token != chosen and logits[token] + penalty > logits[chosen]:
                    why = {"penalty": penalty, "because": _earlier(position, sequence, count)}
                    found.append({"token_id": token, "token": sequence.piece(token)} | why)
        return sorted(found, key=lambda each: -each["penalty"])


def _last_place(token: int, sequence: Sequence) -> int:
    length = len(sequence.prompt_ids) + len(sequence.tokens)
    return next(place for place in range(length - 1, -1, -1) if sequence.token_at(place) == token)


def _earlier(position: int, sequence: Sequence, before: int | None = None) -> dict[str, Any]:
    """The token at a position of the text; where ``before`` is given, the n-gram with as many tokens before it."""
    token, decode = sequence.token_at(position), sequence.tokenizer.decode
    found = {"position": position, "token_id": token, "token": decode([token])}
    if before is not None:
        found["ngram"] = decode([sequence.token_at(place) for place in range(position - before, position + 1)])
    return found


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
