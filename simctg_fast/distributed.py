"""What the losses ask of `torch.distributed`: rows of every process in one tensor, with gradients, and sums of counts.

For a loss over the rows of all processes::

    rows, first = gather_rows(embeddings)              # (sum of n, d), and where this process's own rows begin
    loss = sum_over(rows[first : first + n]) * world_size() / len(rows)

Each process computes the terms of its own rows against all rows. Data-parallel training averages the gradients of the
processes, so the sum over the own rows is divided by the rows of all and multiplied by the number of processes: then
the average is the gradient of the one loss over the whole batch, also where processes hold different numbers of rows.
Where all hold the same number this is simply the mean over the own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather_columns", "gather_rows", "sum_over_processes", "world_size"]


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """The number of processes; 1 where `torch.distributed` is absent or not initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of ``value`` over all processes, a new tensor of the same shape and dtype, without gradient."""
    total = value.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, int]:
    """The rows of all processes in the order of their ranks, and the place of this process's first row among them.

    Args:
        rows: ``(n, …)``, any dtype that the backend moves; ``n`` may differ between processes and may be 0, the other
            sizes and the dtype must be the same everywhere.
        group: the process group; None is the default group.

    Returns:
        ``(sum of n, …)`` and an int. With one process, or without `torch.distributed`: ``rows`` itself and 0.

    The gradient that reaches a row is the sum of the gradients that all processes have for it. Forward and backward,
    and a backward of the backward, are collective calls: every process of the group has to make them, in the same
    order.
    """
    if rows.dim() == 0:
        raise ValueError("rows must have at least one dimension, got a scalar")
    size = world_size(group)
    if size == 1:
        return rows, 0
    rank = dist.get_rank(group)
    count = torch.tensor([rows.shape[0]], dtype=torch.int64, device=rows.device)
    everyone = [torch.empty_like(count) for _ in range(size)]
    dist.all_gather(everyone, count, group=group)
    counts: list[int] = torch.cat(everyone).tolist()
    return _GatherRows.apply(rows, counts, rank, group), sum(counts[:rank])


def gather_columns(columns: Sequence[Tensor], across_devices: bool) -> tuple[list[Tensor], int, int]:
    """Each of the columns with the rows of all processes, the place of this process's first row in the first of them,
    and the number of processes. The columns themselves, 0 and 1 unless `across_devices`."""
    if not across_devices or world_size() == 1:
        return list(columns), 0, 1
    gathered = [gather_rows(column) for column in columns]
    return [rows for rows, _ in gathered], gathered[0][1], world_size()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, counts: list[int], rank: int, group: dist.ProcessGroup | None) -> Tensor:
        longest = max(counts)
        # Backends move equal shapes only: the short ones are filled up and cut again.
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.place = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _SumOfRows.apply(grad, *ctx.place), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _GatherRows.apply(tangent, *ctx.place)


class _SumOfRows(torch.autograd.Function):
    """The own rows of the sum over all processes: the derivative of `_GatherRows`, as that is its."""

    @staticmethod
    def forward(rows: Tensor, counts: list[int], rank: int, group: dist.ProcessGroup | None) -> Tensor:
        # All-reduce, not reduce-scatter: gloo has no such call, and the rows are few beside a model's gradients.
        total = rows.contiguous().clone()
        dist.all_reduce(total, group=group)
        first = sum(counts[:rank])
        return total[first : first + counts[rank]].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.place = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _GatherRows.apply(grad, *ctx.place), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _SumOfRows.apply(tangent, *ctx.place)
