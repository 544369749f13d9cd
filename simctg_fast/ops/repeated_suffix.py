"""How much of the end of a text has stood before each of its tokens: how long a repetition each would go on with."""

from __future__ import annotations

import torch

from . import _backends
from ._autograd import define, register
from .dispatch import NOT_TAKEN, addresses, choose, cpu_obstacle, is_deferred, lengths_obstacle, rows_contiguous

_BLOCK = 128  # lengths that PyTorch's code compares at a time


def repeated_suffix(
    tokens: torch.Tensor,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    limits: torch.Tensor | None = None,
    longest: int | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """For each position j, the length of the longest common suffix of the text before j and of the whole text.

    Args:
        tokens: ``(B, T)`` int64.
        starts: ``(B,)`` int64, where each row's text begins; ``None``: at 0.
        lengths: ``(B,)`` int64, where it ends; ``None``: at T.
        limits: ``(B,)`` int64, the longest suffix that counts in each row; ``None``: any.
        longest: the longest that counts in all of them.
        impl: ``"auto"``, ``"cpu"`` (C++: the Z function of the reversed text, linear in T), or ``"torch"`` (any device;
            nothing is read on the host; T · min(longest, T) comparisons, and memory for B · T · 128 of them).

    Returns:
        ``(B, T)`` int64; 0 outside the text and at its first position.

    Raises:
        ValueError: shapes or dtypes that do not fit, a ``longest`` below 0, an unknown ``impl``, or one that does not
            take these operands; in C++ also starts, lengths or limits outside their ranges.
        RuntimeError: an ``impl`` that this installation lacks.
    """
    if tokens.dim() != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens is {tokens.dtype} of shape {tuple(tokens.shape)}, must be int64 of shape (B, T)")
    for name, each in (("starts", starts), ("lengths", lengths), ("limits", limits)):
        if each is not None and (each.dtype != torch.int64 or each.shape != tokens.shape[:1]):
            wanted = f"int64 of shape ({tokens.shape[0]},)"
            raise ValueError(f"{name} is {each.dtype} of shape {tuple(each.shape)}, must be {wanted}")
    longest = tokens.shape[1] if longest is None else longest
    if longest < 0:
        raise ValueError(f"longest is {longest}, must be 0 or more")
    if is_deferred(impl):
        return torch.ops.simctg_fast.repeated_suffix(tokens, starts, lengths, limits, longest, impl=impl)
    return _run(tokens, starts, lengths, limits, longest, impl=impl)


def _run(tokens, starts, lengths, limits, longest, *, impl="auto"):
    def cpu() -> str | None:
        of_rows = {"starts": starts, "lengths": lengths, "limits": limits}
        problem = cpu_obstacle((torch.int64,), tokens=tokens) or lengths_obstacle(tokens.shape[0], **of_rows)
        return problem if problem is None or problem.startswith(NOT_TAKEN) else NOT_TAKEN + problem

    tokens = rows_contiguous(tokens)
    impl = choose(impl, tokens.device, cpu=cpu)
    return (_cpu if impl == "cpu" else _torch)(tokens, starts, lengths, limits, longest)


def _cpu(tokens, starts, lengths, limits, longest):
    repeats = tokens.new_empty(tokens.shape)
    of_rows = [each if each is None else each.contiguous() for each in (starts, lengths, limits)]
    _backends.require_extension().repeated_suffix(
        tuple(tokens.shape),
        (tokens.data_ptr(), tokens.stride(0)),
        *addresses(*of_rows),
        min(longest, tokens.shape[1]),
        repeats.data_ptr(),
        torch.get_num_threads(),
    )
    return repeats


def _torch(tokens, starts, lengths, limits, longest):
    """From the end: of the reversed text, what begins at place T − j is compared with what begins at its end."""
    length = tokens.shape[1]
    places = torch.arange(length, device=tokens.device)
    room = places if starts is None else places - starts[:, None]  # tokens before j
    room = room.expand(tokens.shape).clamp(0, longest)
    if lengths is not None:
        room = room.masked_fill(places >= lengths[:, None], 0)
    if limits is not None:
        room = torch.minimum(room, limits[:, None])
    most = max(0, min(longest, length - 1))
    backwards = torch.nn.functional.pad(tokens.flip(1), (0, most))
    ends = tokens.new_zeros(()) if lengths is None else length - lengths[:, None]
    repeats, going_on = torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool)
    for first in range(0, most, _BLOCK):
        count = min(_BLOCK, most - first)
        parts = backwards[:, 1 + first : first + length + count].unfold(1, count, 1)  # (B, T, count), places 1 … T
        offsets = torch.arange(first, first + count, device=tokens.device)
        suffix = backwards.gather(1, (ends + offsets).expand(tokens.shape[0], count))
        same = (parts == suffix[:, None]).cumprod(-1, dtype=torch.int8).sum(-1)
        repeats += same * going_on
        going_on &= same == count
    return torch.minimum(repeats.flip(1), room)


def _fake(tokens, starts, lengths, limits, longest, *, impl="auto"):
    return tokens.new_empty(tokens.shape)


define(
    "repeated_suffix(Tensor tokens, Tensor? starts, Tensor? lengths, Tensor? limits, SymInt longest, *, "
    'str impl="auto") -> Tensor',
    _run,
    _fake,
)
register("repeated_suffix")
