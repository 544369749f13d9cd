"""The winners' keys and values of all layers into the prefix cache, each at its row's length: one launch.

Where to copy from and to stands in a table on the device, one row a tensor. In a CUDA graph the addresses stay the same
from replay to replay, so the table is filled once, after the capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import on

COLUMNS = 9
_ADDRESS_COLUMNS = (0, 4)
_UNITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_TRITON = {torch.int64: tl.int64, torch.int32: tl.int32, torch.int16: tl.int16, torch.int8: tl.int8}


@triton.jit(do_not_specialize=["position"])
def prefix_commit_kernel(
    table_ptr, winners_ptr, positions_ptr, position,  # [tensors, COLUMNS], [B], [B]
    HAS_POSITIONS: tl.constexpr, UNIT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program: (tensor, sequence). All strides and sizes count units."""
    entry = table_ptr + tl.program_id(0) * COLUMNS
    b = tl.program_id(1)
    if HAS_POSITIONS:
        at = tl.load(positions_ptr + b).to(tl.int64)
    else:
        at = tl.zeros([], tl.int64) + position
    winner = tl.load(winners_ptr + b)
    buffer = tl.load(entry).to(tl.pointer_type(UNIT))
    buffer += b * tl.load(entry + 1) + at * tl.load(entry + 3)
    stride_to = tl.load(entry + 2)
    rows = tl.load(entry + 4).to(tl.pointer_type(UNIT)) + winner * tl.load(entry + 5)
    stride_from = tl.load(entry + 6)
    head_units = tl.load(entry + 7)
    # A row at the end of its buffer keeps nothing: the caller's lengths decide what counts.
    units = tl.where((at >= 0) & (at < tl.load(entry + 8) >> 32), (tl.load(entry + 8) & 0xFFFFFFFF) * head_units, 0)
    for u0 in range(0, units, BLOCK):
        u = u0 + tl.arange(0, BLOCK).to(tl.int64)
        head = u // head_units
        unit = u - head * head_units
        copied = tl.load(rows + head * stride_from + unit, mask=u < units, other=0)
        tl.store(buffer + head * stride_to + unit, copied, mask=u < units)


def table_of(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[int], torch.dtype]:
    """The table of ``(buffer (B, H, T, D), rows (B·k, H, 1, D))`` pairs, row by row, and the unit it counts in."""
    rows: list[list[int]] = []
    unit = 8
    for buffer, new in pairs:
        size = buffer.element_size()
        rows.append(
            [
                buffer.data_ptr(), *(stride * size for stride in buffer.stride()[:3]),
                new.data_ptr(), new.stride(0) * size, new.stride(1) * size,
                buffer.shape[3] * size, buffer.shape[2] << 32 | buffer.shape[1],
            ]
        )  # fmt: skip
        unit = gcd(unit, *rows[-1][:8])
    for row in rows:
        row[:8] = [x if column in _ADDRESS_COLUMNS else x // unit for column, x in enumerate(row[:8])]
    return [number for row in rows for number in row], _UNITS[unit]


def launch(table: Tensor, unit: torch.dtype, winners: Tensor, position: int | Tensor) -> None:
    """Run the copies of `table` (on the device) for rows `winners (B,)` int64, at `position`, one for all or
    ``(B,)``."""
    if table.numel() == 0 or winners.numel() == 0:
        return
    each = position if isinstance(position, Tensor) else None
    with on(winners):
        prefix_commit_kernel[(table.numel() // COLUMNS, winners.numel())](
            table, winners.contiguous(), winners if each is None else each.contiguous(),
            position if each is None else 0,
            HAS_POSITIONS=each is not None, UNIT=_TRITON[unit], COLUMNS=COLUMNS, BLOCK=256, num_warps=4,
        )  # fmt: skip
