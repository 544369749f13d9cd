"""Viterbi back-tracing as the textbook writes it."""

from __future__ import annotations

import torch


def viterbi_backtrace(
    backpointers: torch.Tensor, last: torch.Tensor, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """`simctg_fast.functional.viterbi_backtrace`, one sequence and one step at a time; trusts its arguments."""
    batch, length, _ = backpointers.shape
    path = torch.full((batch, length), -1, dtype=torch.int64)
    for b in range(batch):
        slot = int(last[b])
        for t in reversed(range(length if lengths is None else int(lengths[b]))):
            path[b, t] = slot
            slot = int(backpointers[b, t, slot])
    return path.to(backpointers.device)
