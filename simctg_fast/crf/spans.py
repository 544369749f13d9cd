"""Which positions of the items of a batch exist, from `lengths` or from a mask with padding on either side."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops.crf_checks import checked_lengths, span_of_mask
from .arguments import check_device, check_tensor


@dataclass(frozen=True)
class Span:
    """`lengths (B,)` positions of each item exist, from `starts (B,)` on. None: all of them, and from the first on.

    The recursions want items that begin at position 0: `front` brings them there, `back` takes results back.
    """

    lengths: torch.Tensor | None
    starts: torch.Tensor | None = None
    past: torch.Tensor | None = None  # (B, T): positions that do not exist, before `front`

    def past_in_front(self, length: int) -> torch.Tensor | None:
        """`past` of what `front` returns."""
        if self.starts is None or self.lengths is None:
            return self.past
        return torch.arange(length, device=self.lengths.device) >= self.lengths[:, None]

    def positions(self, emissions: torch.Tensor) -> torch.Tensor | int:
        """How many positions of `emissions (B, T, K)` exist in all."""
        return emissions.shape[0] * emissions.shape[1] if self.lengths is None else self.lengths.sum()

    def front(self, values: torch.Tensor) -> torch.Tensor:
        """`(B, T, …)` with every item moved to position 0; what comes behind an item is anything."""
        if self.starts is None:
            return values
        items, positions = self._places(values)
        return values[items, (positions + self.starts[:, None]).clamp(max=values.shape[1] - 1)]

    def back(self, values: torch.Tensor, fill: float) -> torch.Tensor:
        """The inverse of `front`, with `fill` where an item has no position."""
        if self.starts is None or self.lengths is None:
            return values
        items, positions = self._places(values)
        positions = positions - self.starts[:, None]
        outside = (positions < 0) | (positions >= self.lengths[:, None])
        moved = values[items, positions.clamp(0, values.shape[1] - 1)]
        return moved.masked_fill(outside.view(*outside.shape, *[1] * (values.dim() - 2)), fill)

    @staticmethod
    def _places(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length = values.shape[:2]
        items, positions = (torch.arange(n, device=values.device) for n in (batch, length))
        return items[:, None], positions[None]


def as_span(lengths: torch.Tensor | None, mask: torch.Tensor | None, emissions: torch.Tensor) -> Span:
    """From `lengths (B,)`, or from `mask (B, T)`, non-zero at one run of positions of each item, for checked emissions.

    Raises:
        TypeError, ValueError: one of the two is no tensor, of another shape or dtype, or on another device than the
            emissions; both are given; a length out of range; a mask with a hole (values are looked at on the CPU).
    """
    batch, length = emissions.shape[:2]
    if mask is None:
        if lengths is None:
            return Span(None)
        check_tensor("lengths", lengths, f"a tensor of shape ({batch},) or None")
        if lengths.shape != (batch,) or lengths.dtype.is_floating_point or lengths.dtype == torch.bool:
            hint = "; mask= takes a mask" if lengths.shape == (batch, length) else ""
            raise ValueError(
                f"lengths is {lengths.dtype} {tuple(lengths.shape)}, must be integers of shape ({batch},){hint}"
            )
        check_device("lengths", lengths, emissions.device)
        lengths = checked_lengths(lengths.to(torch.int64), length)
        return Span(lengths, None, torch.arange(length, device=lengths.device) >= lengths[:, None])
    if lengths is not None:
        raise ValueError("lengths and mask are both given; they say the same, pass one")
    check_tensor("mask", mask, f"a tensor of shape ({batch}, {length}) or None")
    if mask.shape != (batch, length) or mask.dtype.is_complex:
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}, must be of shape ({batch}, {length})")
    check_device("mask", mask, emissions.device)
    spans, starts = span_of_mask(mask)
    # Items that begin at 0 as they are need no move; a device, or a compiled graph, is not asked.
    unmoved = mask.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(starts.any())
    return Span(spans, None if unmoved else starts, mask == 0)
