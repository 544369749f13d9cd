"""Sums over repeated indices that come out the same in every run."""

from __future__ import annotations

import torch
from torch import Tensor


def _has_atomics(device: torch.device) -> bool:
    """Whether torch's `index_add_` adds in whatever order threads arrive."""
    return device.type == "cuda"


def add_rows_(table: Tensor, index: Tensor, rows: Tensor) -> None:
    """table[index[i]] += rows[i], the same sum in every run.

    Args:
        table: `(V, …)`, changed in place. index: `(M,)` int64, any index as often as it comes. rows: `(M, …)` of the
            table's dtype.

    On CUDA an accumulating `index_put_` sorts the indices and adds in that order, where `index_add_` uses atomics; on
    the CPU `index_add_` is the sequential one of the two.
    """
    if _has_atomics(table.device):
        table.index_put_((index,), rows, accumulate=True)
    else:
        table.index_add_(0, index, rows)


def add_rows(table: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """:func:`add_rows_` to a new table."""
    if _has_atomics(table.device):
        return table.index_put((index,), rows, accumulate=True)
    return table.index_add(0, index, rows)
