"""Checks of the values that a CRF is given, in a form that a compiled graph keeps.

A check has to look at numbers, which a graph cannot: there each of them is an operator whose result the computation
needs, so that nothing is left out as unused. It raises a ValueError when the graph runs. Outside of a graph the same
function is called as it is. Checks are made on the CPU; on another device they would have to wait for it.

Names as in `crf_common`; positions from ``lengths[b]`` on are not looked at.
"""

from __future__ import annotations

import math

import torch

_library = torch.library.Library("simctg_fast", "FRAGMENT")
for _schema in (
    "crf_checked_lengths(Tensor lengths, int limit) -> Tensor",
    "crf_checked_tokens(Tensor tokens, int vocabulary, Tensor? lengths, str name) -> Tensor",
    "crf_checked_scores(Tensor scores, Tensor? lengths, str what) -> Tensor",
    "crf_checked_slots(Tensor slots, Tensor beam_tokens, Tensor tokens, Tensor? lengths) -> Tensor",
    "crf_slots_of(Tensor beam_tokens, Tensor tokens, Tensor? lengths) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def checked_lengths(lengths: torch.Tensor, limit: int) -> torch.Tensor:
    """`lengths (B,)`.

    Raises:
        ValueError: one is not in 0..limit.
    """
    if lengths.device.type != "cpu":
        return lengths
    if _traced():
        return torch.ops.simctg_fast.crf_checked_lengths(lengths, limit)
    _check_lengths(lengths, limit)
    return lengths


def checked_tokens(name: str, tokens: torch.Tensor, vocabulary: int, lengths: torch.Tensor | None) -> torch.Tensor:
    """`tokens (B, T)` or `(B, T, N)` int64, which are called `name`.

    Raises:
        ValueError: one is not in 0..vocabulary - 1.
    """
    if tokens.device.type != "cpu":
        return tokens
    if _traced():
        return torch.ops.simctg_fast.crf_checked_tokens(tokens, vocabulary, lengths, name)
    _check_tokens(tokens, vocabulary, lengths, name)
    return tokens


def checked_scores(scores: torch.Tensor, lengths: torch.Tensor | None, what: str = "token of the beam") -> torch.Tensor:
    """`scores (B, T, K)` of the beams, or of all tags: differentiable as they are.

    Raises:
        ValueError: a position holds NaN or +inf, or every `what` of it is banned (-inf).
    """
    if scores.device.type != "cpu":
        return scores
    if _traced():
        # Only zero comes back, and the scores pass by the operator: derivatives of every kind are theirs.
        return scores + torch.ops.simctg_fast.crf_checked_scores(scores.detach(), lengths, what)
    _check_scores(scores.detach(), lengths, what)
    return scores


def checked_slots(
    slots: torch.Tensor, beam_tokens: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor | None
) -> torch.Tensor:
    """`slots (B, T, N)` int64.

    Raises:
        ValueError: one does not hold the token of `tokens (B, T, N)` in `beam_tokens (B, T, K)`.
    """
    if slots.device.type != "cpu":
        return slots
    if _traced():
        return torch.ops.simctg_fast.crf_checked_slots(slots, beam_tokens, tokens, lengths)
    _check_slots(slots, beam_tokens, tokens, lengths)
    return slots


def slots_of(beam_tokens: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Where `tokens (B, T, N)` are in `beam_tokens (B, T, K)`: `(B, T, N)` int64.

    Raises:
        ValueError: one is not there; on every device, as a path outside the beams has no probability.
    """
    return torch.ops.simctg_fast.crf_slots_of(beam_tokens, tokens, lengths)


def _traced() -> bool:
    """Whether the call is being recorded or transformed, so that no number can be looked at."""
    return (
        torch.compiler.is_dynamo_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def _first(wrong: torch.Tensor, lengths: torch.Tensor | None) -> list[int] | None:
    """Indices of the first true element of `wrong (B, T, ...)` within the lengths, or None; waits for the device."""
    if lengths is not None:
        past = torch.arange(wrong.shape[1], device=wrong.device) >= lengths[:, None]
        wrong = wrong & ~past.view(*past.shape, *[1] * (wrong.dim() - 2))
    if wrong.numel() == 0 or not bool(wrong.any()):
        return None
    return wrong.nonzero()[0].tolist()


def _place(where: list[int]) -> str:
    return ", ".join(map(str, where))


def _check_lengths(lengths: torch.Tensor, limit: int) -> None:
    for b, length in enumerate(lengths.tolist()):
        if not 0 <= length <= limit:
            raise ValueError(f"lengths[{b}] is {length}, must be in 0..{limit}")


def _check_tokens(tokens: torch.Tensor, vocabulary: int, lengths: torch.Tensor | None, name: str) -> None:
    where = _first((tokens < 0) | (tokens >= vocabulary), lengths)
    if where is not None:
        raise ValueError(f"{name}[{_place(where)}] is {int(tokens[tuple(where)])}, must be in 0..{vocabulary - 1}")


def _check_scores(scores: torch.Tensor, lengths: torch.Tensor | None, what: str) -> None:
    top = scores.amax(2)  # a NaN carries through
    where = _first(~torch.isfinite(top), lengths)
    if where is None:
        return
    value = float(top[tuple(where)])
    problem = "holds NaN" if math.isnan(value) else "holds +inf" if value > 0 else f"bans every {what} (-inf)"
    raise ValueError(f"emissions[{_place(where)}] {problem}; a position needs one finite emission and no NaN or +inf")


def _check_slots(
    slots: torch.Tensor, beam_tokens: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor | None
) -> None:
    size = beam_tokens.shape[2]
    wrong = (slots < 0) | (slots >= size) | (beam_tokens.gather(2, slots.clamp(0, size - 1)) != tokens)
    where = _first(wrong, lengths)
    if where is not None:
        raise ValueError(
            f"slots[{_place(where)}] is {int(slots[tuple(where)])}, which does not hold the token "
            f"{int(tokens[tuple(where)])} in beam_tokens[{where[0]}, {where[1]}]"
        )


def _lengths(lengths, limit):
    _check_lengths(lengths, limit)
    return lengths.clone()


def _tokens(tokens, vocabulary, lengths, name):
    _check_tokens(tokens, vocabulary, lengths, name)
    return tokens.clone()


def _scores(scores, lengths, what):
    _check_scores(scores, lengths, what)
    return scores.new_zeros(())


def _slots(slots, beam_tokens, tokens, lengths):
    _check_slots(slots, beam_tokens, tokens, lengths)
    return slots.clone()


def _slots_of(beam_tokens, tokens, lengths):
    ordered, order = beam_tokens.sort(dim=2)
    place = torch.searchsorted(ordered, tokens.contiguous()).clamp(max=ordered.shape[2] - 1)
    where = _first(ordered.gather(2, place) != tokens, lengths)
    if where is not None:
        raise ValueError(
            f"tokens[{_place(where)}] is {int(tokens[tuple(where)])}, which is not in "
            f"beam_tokens[{where[0]}, {where[1]}]; a path outside the beams has no probability"
        )
    return order.gather(2, place)


def _fake_scores(scores, lengths, what):
    return scores.new_empty(())


def _fake_slots_of(beam_tokens, tokens, lengths):
    return tokens.new_empty(tokens.shape)


def _same(checked, *arguments):
    return torch.empty_like(checked)


for _name, _function, _fake in (
    ("crf_checked_lengths", _lengths, _same),
    ("crf_checked_tokens", _tokens, _same),
    ("crf_checked_scores", _scores, _fake_scores),
    ("crf_checked_slots", _slots, _same),
    ("crf_slots_of", _slots_of, _fake_slots_of),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"simctg_fast::{_name}", _fake, lib=_library)
