"""Adding rows to a table where several rows may have one target."""

from __future__ import annotations

from torch import Tensor


def add_rows_(table: Tensor, index: Tensor, rows: Tensor) -> None:
    """``table[index[i]] += rows[i]``, the same sum in every run.

    Which operator keeps an order depends on the device: `index_add_` is sequential on the CPU and a float atomic on
    CUDA; `index_put_` with ``accumulate=True`` sorts the index on CUDA, and may use atomics between threads on the CPU.

    Args:
        table: ``(M, …)``, changed in place.
        index: ``(N,)`` int64, each in ``0..M - 1``, with repetitions.
        rows: ``(N, …)``, of the table's dtype and device.
    """
    if table.device.type == "cpu":
        table.index_add_(0, index, rows)
    else:
        table.index_put_((index,), rows, accumulate=True)
