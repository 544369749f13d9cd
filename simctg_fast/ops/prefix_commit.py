"""Write the winners' keys and values of all layers into the prefix cache, in one call."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from . import _backends
from .dispatch import addresses, choose

Pair = tuple[torch.Tensor, torch.Tensor]  # buffer (B, H, T_max, D), candidates' rows (B·k, H, 1, D)


def prefix_commit(pairs: Sequence[Pair], position: int | torch.Tensor, winners: torch.Tensor) -> None:
    """``buffer[b, :, position] = rows[winners[b], :, 0]`` for every pair and every b, in one call or launch.

    Args:
        pairs: buffers ``(B, H, T_max, D)`` (written) and candidates' new entries ``(B·k, H, 1, D)``, of one dtype and
            device each; H and D may differ from pair to pair.
        position: where to write, below every buffer's ``T_max``; ``(B,)`` int64 for a place of each row's own.
        winners: ``(B,)`` int64 rows, one a sequence.

    On CUDA a position outside its buffer writes nothing; elsewhere it raises.
    """
    obstacle = functools.partial(_obstacle, pairs, winners)
    impl = choose("auto", winners.device, cpu=obstacle, triton=obstacle)
    if impl == "triton":
        if _backends.is_capturing():
            raise RuntimeError(
                "prefix_commit is being captured in a CUDA graph: make a CommitPlan before, and run that"
            )
        CommitPlan(len(pairs), winners.device).run(pairs, position, winners)
        return
    each = position if isinstance(position, torch.Tensor) else None
    if impl == "torch":
        for buffer, rows in pairs:
            chosen = rows.squeeze(2).index_select(0, winners.to(rows.device))
            if each is None:
                buffer[:, :, position] = chosen
            else:
                buffer[torch.arange(len(chosen), device=buffer.device), :, each.to(buffer.device)] = chosen
        return
    if each is not None and not all(bool(((each >= 0) & (each < buffer.shape[2])).all()) for buffer, _ in pairs[:1]):
        raise ValueError(f"position must be in 0..{pairs[0][0].shape[2] - 1}, got {each.tolist()}")
    each = None if each is None else each.to(torch.int64).contiguous()
    numbers: list[int] = []
    for buffer, rows in pairs:
        size = buffer.element_size()
        batch_stride, head_stride, step, _ = buffer.stride()
        row_stride, row_head_stride, _, _ = rows.stride()
        numbers += (
            buffer.data_ptr() + (0 if each is not None else int(position) * step * size),
            batch_stride * size,
            head_stride * size,
            step * size,
            rows.data_ptr(),
            row_stride * size,
            row_head_stride * size,
            buffer.shape[1],
            buffer.shape[3] * size,
        )
    winners = winners.contiguous()
    _backends.require_extension().prefix_commit(
        numbers, *addresses(winners, each), winners.shape[0], torch.get_num_threads()
    )


class CommitPlan:
    """Commits on CUDA by a table of addresses, on ``device`` for so many ``tensors``.

    In a CUDA graph the addresses are those of the capture. A plan for one is made *before* it (memory that a capture
    allocates is written over at every replay), and its table filled by :meth:`finish` once the capture has ended.
    """

    def __init__(self, tensors: int, device: torch.device) -> None:
        from simctg_fast.kernels import prefix_commit as kernels

        self.table = torch.empty(tensors * kernels.COLUMNS, dtype=torch.int64, device=device)
        self.numbers: list[int] = []
        self.pairs: Sequence[Pair] = ()

    def run(self, pairs: Sequence[Pair], position: int | torch.Tensor, winners: torch.Tensor) -> None:
        """As :func:`prefix_commit`, for as many pairs as the plan has tensors, on its device.

        Raises:
            ValueError: entries whose bytes cannot be copied as they are: of another dtype or device than their buffer.
        """
        if (problem := _obstacle(pairs, winners)) is not None:
            raise ValueError(problem)
        from simctg_fast.kernels import prefix_commit as kernels

        self.pairs = pairs  # a graph reads the tensors of its capture again
        self.numbers, unit = kernels.table_of(pairs)
        assert len(self.numbers) == self.table.numel()
        if not _backends.is_capturing():
            self.finish()
        kernels.launch(self.table, unit, winners, position)

    def finish(self) -> None:
        """Fill the table that the launch reads; the host does not wait."""
        host = torch.tensor(self.numbers, dtype=torch.int64)
        on_cuda = self.table.device.type == "cuda"
        self.table.copy_(host.pin_memory() if on_cuda else host, non_blocking=on_cuda)


def _obstacle(pairs: Sequence[Pair], winners: torch.Tensor) -> str | None:
    """Why the entries' bytes cannot be copied as they are."""
    device = winners.device
    for buffer, rows in pairs:
        if buffer.dtype != rows.dtype or buffer.device != device or rows.device != device:
            return "new keys or values have another dtype or device than their buffer"
        if buffer.stride(3) != 1 != buffer.shape[3] or rows.stride(3) != 1 != rows.shape[3]:
            return "the last dimension of keys or values is not contiguous"
    return None
