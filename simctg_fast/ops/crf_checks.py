"""Checks of values that the CRFs are handed: operators that return what they were given, so that a compiled graph keeps
them and a wrong value raises when the graph runs.

Values are looked at on the CPU; a CUDA device would have to be waited for, so there they pass. Outside of compiled
graphs and of `torch.func` the argument itself comes back, no copy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._autograd import define


def _operator(schema: str) -> Callable[[Callable[..., None]], Callable[..., Tensor]]:
    """Makes of a check a function that returns the first of its arguments, once it has passed.

    In a graph it is the operator of the schema, which returns a zero that is added to the argument: derivatives of
    every kind pass by it.
    """

    def make(check: Callable[..., None]) -> Callable[..., Tensor]:
        def checked(value: Tensor, *others):
            if value.device.type == "cpu":
                check(value, *others)
            return value.new_zeros(())

        define(f"{schema} -> Tensor", checked, lambda value, *_: value.new_empty(()))
        operator = getattr(torch.ops.simctg_fast, schema.partition("(")[0])

        @functools.wraps(check)
        def call(value: Tensor, *others) -> Tensor:
            if _recorded():
                zero = operator(value.detach(), *others)
                return value | zero if value.dtype == torch.bool else value + zero
            if value.device.type == "cpu":
                check(value.detach(), *others)
            return value

        call.__annotations__["return"] = Tensor
        return call

    return make


def _recorded() -> bool:
    """Whether the call becomes part of a graph or is transformed, so that its numbers cannot be looked at now."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def first_wrong(wrong: Tensor, past: Tensor | None = None) -> list[int] | None:
    """Indices of the first true element outside of `past (B, T)`, or None; waits for the device."""
    if past is not None:
        wrong = wrong & ~past.view(*past.shape, *[1] * (wrong.dim() - 2))
    if wrong.numel() == 0 or not bool(wrong.any()):
        return None
    return wrong.nonzero()[0].tolist()


@_operator("crf_checked_lengths(Tensor lengths, int limit)")
def checked_lengths(lengths: Tensor, limit: int) -> None:
    """`lengths (B,)`, each in 0..limit."""
    where = first_wrong((lengths < 0) | (lengths > limit))
    if where is not None:
        raise ValueError(f"lengths[{where[0]}] is {int(lengths[where[0]])}, must be in 0..{limit}")


@_operator("crf_checked_tokens(Tensor tokens, int vocabulary, Tensor? past, str name)")
def checked_tokens(tokens: Tensor, vocabulary: int, past: Tensor | None, name: str) -> None:
    """`tokens (B, T)` or `(B, T, N)`, each outside of `past (B, T)` in 0..vocabulary - 1."""
    where = first_wrong((tokens < 0) | (tokens >= vocabulary), past)
    if where is not None:
        value = int(tokens[tuple(where)])
        raise ValueError(f"{name}[{', '.join(map(str, where))}] is {value}, must be in 0..{vocabulary - 1}")


@_operator('crf_checked_scores(Tensor scores, Tensor? past, str what="token of the beam")')
def checked_scores(scores: Tensor, past: Tensor | None, what: str = "token of the beam") -> None:
    """Emissions `(B, T, K)` without NaN and +inf, one above -inf at every position outside of `past (B, T)`."""
    top = scores.amax(2)  # a NaN carries through
    where = first_wrong(~torch.isfinite(top), past)
    if where is not None:
        value = float(top[tuple(where)])
        problem = "holds NaN" if math.isnan(value) else "holds +inf" if value > 0 else f"bans every {what} (-inf)"
        raise ValueError(
            f"emissions[{where[0]}, {where[1]}] {problem}; a position needs one finite emission and no NaN or +inf"
        )


@_operator("crf_checked_rows(Tensor allowed, Tensor? past, str name)")
def checked_rows(allowed: Tensor, past: Tensor | None, name: str) -> None:
    """`allowed (B, T, K)` bool, with one true value at every position outside of `past (B, T)`."""
    where = first_wrong(~allowed.any(2), past)
    if where is not None:
        raise ValueError(f"{name}[{where[0]}, {where[1]}] allows nothing; a position needs one tag that is allowed")


def check_parameter(parameter: Tensor, name: str) -> None:
    """Raises for scores, of any shape, that are neither finite nor -inf."""
    if not bool(parameter.amax() < math.inf):  # a NaN carries through
        where = (parameter.isnan() | (parameter == math.inf)).nonzero()[0].tolist()
        raise ValueError(
            f"{name}[{', '.join(map(str, where))}] is {float(parameter[tuple(where)])}, must be finite or -inf"
        )


@_operator("crf_checked_slots(Tensor slots, Tensor beam_tokens, Tensor tokens, Tensor? past)")
def checked_slots(slots: Tensor, beam_tokens: Tensor, tokens: Tensor, past: Tensor | None) -> None:
    """`slots (B, T, N)` that hold `tokens (B, T, N)` in `beam_tokens (B, T, K)` outside of `past (B, T)`."""
    size = beam_tokens.shape[2]
    wrong = (slots < 0) | (slots >= size) | (beam_tokens.gather(2, slots.clamp(0, size - 1)) != tokens)
    where = first_wrong(wrong, past)
    if where is not None:
        raise ValueError(
            f"slots[{', '.join(map(str, where))}] is {int(slots[tuple(where)])}, which does not hold the token "
            f"{int(tokens[tuple(where)])} in beam_tokens[{where[0]}, {where[1]}]"
        )


def check_paths(slots: Tensor, lengths: Tensor | None) -> None:
    """Raises for the first item that has a position and no path: -1 at the first place of `slots (B, T, N)`."""
    missing = slots[:, 0, 0] < 0
    require_paths(missing if lengths is None else missing & (lengths > 0))


def require_paths(missing: Tensor) -> None:
    """Raises for the first item of `missing (B,)`."""
    where = first_wrong(missing)
    if where is not None:
        raise ValueError(
            f"item {where[0]} has no allowed path: -inf in its emissions or in the start, end and other transitions "
            "forbids every one"
        )


@_operator("crf_checked_expectations(Tensor values)")
def checked_expectations(values: Tensor) -> None:
    """Expectations over the paths of each item, `(B,)`, which are NaN where there is none."""
    require_paths(values.isnan())


@_operator("crf_checked_ends(Tensor ends)")
def checked_ends(ends: Tensor) -> None:
    """`(N, K)`, start transitions first and end transitions last, that are finite or -inf."""
    if not bool(ends.amax() < math.inf):
        check_parameter(ends[0], "start_transitions")
        check_parameter(ends[-1], "end_transitions")


checked_parameter = _operator("crf_checked_parameter(Tensor parameter, str name)")(check_parameter)
checked_paths = _operator("crf_checked_paths(Tensor slots, Tensor? lengths)")(check_paths)


# ---- places in a beam ------------------------------------------------------------------------------------------------


def slots_of(beam_tokens: Tensor, tokens: Tensor, past: Tensor | None) -> Tensor:
    """Where `tokens (B, T, N)` are in `beam_tokens (B, T, K)`: `(B, T, N)` int64.

    Raises:
        ValueError: one outside of `past (B, T)` is not there; on every device, as it could not be told from another.
    """
    result: Tensor = torch.ops.simctg_fast.crf_slots_of(beam_tokens, tokens, past)
    return result


def _slots_of(beam_tokens: Tensor, tokens: Tensor, past: Tensor | None) -> Tensor:
    ordered, order = beam_tokens.sort(dim=2)
    place = torch.searchsorted(ordered, tokens.contiguous()).clamp(max=ordered.shape[2] - 1)
    where = first_wrong(ordered.gather(2, place) != tokens, past)
    if where is not None:
        raise ValueError(
            f"tokens[{', '.join(map(str, where))}] is {int(tokens[tuple(where)])}, which is not in "
            f"beam_tokens[{where[0]}, {where[1]}]; a path outside the beams has no probability"
        )
    return order.gather(2, place)


define(
    "crf_slots_of(Tensor beam_tokens, Tensor tokens, Tensor? past) -> Tensor",
    _slots_of,
    lambda beam_tokens, tokens, past: tokens.new_empty(tokens.shape),
)


# ---- masks -----------------------------------------------------------------------------------------------------------


def span_of_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths and first positions `(B,)` int64 of the runs in `mask (B, T)`; 0 and 0 for an empty one.

    Raises:
        ValueError: on the CPU, a row of more than one run.
    """
    lengths, starts = torch.ops.simctg_fast.crf_span_of_mask(mask)
    return lengths, starts


def _span_of_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    on = mask != 0
    lengths = on.sum(1)
    position = torch.arange(on.shape[1], device=on.device)
    starts = torch.where(on, position, on.shape[1]).amin(1) if on.shape[1] else torch.zeros_like(lengths)
    starts = starts.masked_fill(lengths == 0, 0)
    if on.device.type == "cpu":
        run = (position >= starts[:, None]) & (position < (starts + lengths)[:, None])
        where = first_wrong(run & ~on)
        if where is not None:
            raise ValueError(
                f"mask has a hole in item {where[0]}, at position {where[1]}; it must be non-zero at one run of "
                "positions of an item, and zero before and behind it"
            )
    return lengths, starts


define(
    "crf_span_of_mask(Tensor mask) -> (Tensor, Tensor)",
    _span_of_mask,
    lambda mask: (mask.new_empty(mask.shape[:1], dtype=torch.int64), mask.new_empty(mask.shape[:1], dtype=torch.int64)),
)
