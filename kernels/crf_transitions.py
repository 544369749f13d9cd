"""Tiles of transitions in memory, for the recursions that walk through the positions of an item one after another.

A recursion has one program an item, and forming the transitions, K² D multiplications a step, would take most of its
time while most of the device is idle. So they are formed for some steps at once by as many programs as there are tiles,
and the recursion only reads them: K² numbers a step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .crf_common import as_lengths, length_of, precision, transitions

MEMORY = 256 << 20  # bytes of transitions that exist at a time, at most
CACHE = 32 << 20  # what surely stays in the second cache until it is read
STEPS = 16  # below so many, launches would take longer than they do


@triton.jit(do_not_specialize=["first", "T", "item", "STEPS"])
def _transition_kernel(
    tokens_ptr, left_ptr, right_ptr, lengths_ptr,
    tiles_ptr,  # [items, STEPS, K, WIDE]
    scale, item, first, STEPS, T, K, WIDE, D,
    HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr, SIDE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """From positions first, first + 1, … of items item, item + 1, … to those after them."""
    row = tl.program_id(0).to(tl.int64)
    b, t = item + row // STEPS, first + row % STEPS
    length = length_of(lengths_ptr, b, T, HAS_LENGTHS)
    if t + 1 < length:
        k = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
        j = tl.program_id(2) * SIDE + tl.arange(0, SIDE)
        base = (b * T + t) * K
        tile = transitions(tokens_ptr, left_ptr, right_ptr, base, k, j, scale, K, D, BLOCK_D, PRECISION)
        mask = (k < K)[:, None] & (j < WIDE)[None, :]  # past the beam: zeros
        tl.store(tiles_ptr + (row * K + k[:, None]) * WIDE + j[None, :], tile, mask=mask)


def config() -> dict[str, int]:
    return {"SIDE": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 1, "maxnreg": 255}


def wide(beam: int) -> int:
    """Columns of a tile: rows begin at a multiple of 64 bytes, so that loads are wide for any beam."""
    return triton.cdiv(beam, 16) * 16


def pieces(batch: int, length: int, beam: int) -> tuple[int, int]:
    """How many items, and how many steps of them, have their transitions in memory at a time."""
    each = 4 * beam * wide(beam)
    items = max(1, min(batch, MEMORY // each))
    steps = min(MEMORY // (items * each), max(STEPS, CACHE // (items * each)))
    return items, max(1, min(steps, length - 1))


def formed(p, scale: float, *, last_first: bool = False) -> Iterator[tuple[torch.Tensor, int, tuple[int, int, int]]]:
    """Forms the transitions of potentials, of some items and some of their steps at a time.

    Yields the tiles [items, steps, K, columns], the number of items, and the first item, the first step and the number
    of steps: none where there is no second position.
    """
    batch, length, beam = p.scores.shape
    items, most = pieces(batch, length, beam)
    tiles = p.scores.new_empty((items, most, beam, wide(beam)))
    lengths, has_lengths = as_lengths(p.lengths, p.tokens)
    launch = config()
    rows, columns = (triton.cdiv(n, launch["SIDE"]) for n in (beam, wide(beam)))
    starts = range(0, length - 1, most) or range(1)
    for item in range(0, batch, items):
        count = min(items, batch - item)
        for first in reversed(starts) if last_first else starts:
            steps = min(most, length - 1 - first)
            if steps:
                _transition_kernel[(count * steps, rows, columns)](
                    p.tokens, p.left, p.right, lengths, tiles, scale, item, first, steps, length, beam, wide(beam),
                    p.left.shape[1], HAS_LENGTHS=has_lengths, PRECISION=precision(), **launch,
                )  # fmt: skip
            yield tiles, count, (item, first, steps)
