"""Write the winners' keys and values of all layers into the prefix cache, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import _backends

Pair = tuple[torch.Tensor, torch.Tensor]  # buffer (B, H, T_max, D), candidates' rows (B·k, H, 1, D)


def prefix_commit(pairs: Sequence[Pair], position: int, winners: torch.Tensor) -> None:
    """``buffer[:, :, position] = rows[winners, :, 0]`` for every pair.

    Args:
        pairs: buffers ``(B, H, T_max, D)`` (written) and candidates' new entries ``(B·k, H, 1, D)``, of one dtype and
            device each; H and D may differ from pair to pair.
        position: where to write, below every buffer's ``T_max``.
        winners: ``(B,)`` int64 rows, one a sequence.
    """
    extension = _backends.extension()
    if extension is None or winners.device.type != "cpu" or not all(_copyable(*pair) for pair in pairs):
        for buffer, rows in pairs:
            buffer[:, :, position] = rows.squeeze(2).index_select(0, winners.to(rows.device))
        return
    numbers: list[int] = []
    for buffer, rows in pairs:
        size = buffer.element_size()
        batch_stride, head_stride, step, _ = buffer.stride()
        row_stride, row_head_stride, _, _ = rows.stride()
        numbers += (
            buffer.data_ptr() + position * step * size,
            batch_stride * size,
            head_stride * size,
            rows.data_ptr(),
            row_stride * size,
            row_head_stride * size,
            buffer.shape[1],
            buffer.shape[3] * size,
        )
    extension.prefix_commit(numbers, winners.contiguous().data_ptr(), winners.shape[0])


def _copyable(buffer: torch.Tensor, rows: torch.Tensor) -> bool:
    return (
        buffer.device.type == rows.device.type == "cpu"
        and buffer.dtype == rows.dtype
        and buffer.stride(3) == rows.stride(3) == 1
    )
