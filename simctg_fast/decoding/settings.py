"""What the settings of ``generate`` may be. transformers lets many values through that mean nothing: NaN compares as
false everywhere, 2.5 tokens are three, no sequences are one, and ``True`` is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..checks import is_integer, is_number

__all__ = ["TINY", "check_center", "check_penalty_alpha", "check_settings", "check_streamer", "check_top_k"]


TINY = torch.finfo(torch.float32).tiny


def _integer(low: int) -> tuple[Callable[[Any], bool], str]:
    def valid(value: Any) -> bool:
        # transformers takes integers of one element in a tensor as well
        if isinstance(value, torch.Tensor):
            value = value.item() if value.numel() == 1 else None
        return is_integer(value, low)

    return valid, f"an integer of at least {low}"


def _number(low: float, high: float | None, allowed: str, above: bool = False) -> tuple[Callable[[Any], bool], str]:
    bounds = (low,) if high is None else (low, high)
    return lambda value: is_number(value, *bounds, above=above), allowed


def _is_token(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype in (torch.int64, torch.int32) and value.numel() == 1
    return is_integer(value, -(2**63), 2**63 - 1)  # negative: one that never comes


def _are_tokens(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype in (torch.int64, torch.int32)
    if hasattr(value, "tolist"):  # an array of numpy
        value = value.tolist()
    return all(map(_is_token, value)) if isinstance(value, (list, tuple)) else _is_token(value)


def _is_duration(value: Any) -> bool:
    return is_number(value, 0) or (isinstance(value, float) and value == float("inf"))


# Setting -> whether a value is allowed, and in words what is. None is, everywhere: the default.
_READ = {
    "max_new_tokens": _integer(1),  # before the length that transformers makes of it
    "max_length": _integer(1),
    "min_new_tokens": _integer(0),
    "min_length": _integer(0),
    "num_return_sequences": _integer(1),
    "num_beams": _integer(1),
    "no_repeat_ngram_size": _integer(0),
    "encoder_no_repeat_ngram_size": _integer(0),
    "repetition_penalty": _number(0, None, "a finite number above 0", above=True),
    "encoder_repetition_penalty": _number(0, None, "a finite number above 0", above=True),
    "max_time": (_is_duration, "a number of seconds of at least 0"),
    "do_sample": (lambda value: type(value).__name__ in ("bool", "bool_", "int") and value in (0, 1), "True or False"),
    "eos_token_id": (_are_tokens, "a token id or a list of them"),
    "pad_token_id": (_is_token, "a token id"),
}
_SAMPLED = {  # read where do_sample is
    "temperature": _number(TINY, None, "a finite number above 0 that float32 can divide by"),
    "top_k": _integer(0),
    "top_p": _number(0, 1, "a number in [0, 1]"),
    "top_h": _number(0, 1, "a number in (0, 1]", above=True),
    "min_p": _number(0, 1, "a number in [0, 1]"),
    "typical_p": _number(0, 1, "a number in (0, 1]", above=True),
    "epsilon_cutoff": _number(0, 1, "a number in [0, 1)"),
    "eta_cutoff": _number(0, 1, "a number in [0, 1)"),
}


def check_settings(settings: Mapping[str, Any], *, sampled: bool = False) -> None:
    """``settings`` by name, of which others than those above are not looked at; ``sampled``: tokens are drawn.

    Raises:
        ValueError: a value that its setting cannot have.
    """
    for name, (valid, allowed) in (_READ | _SAMPLED if sampled else _READ).items():
        value = settings.get(name)
        if value is not None and not valid(value):
            raise ValueError(f"{name} must be {allowed}, got {value!r:.80}")


def check_penalty_alpha(value: Any) -> None:
    if not is_number(value, 0, 1):
        raise ValueError(f"penalty_alpha must be a number in [0, 1], got {value!r:.80}")


def check_top_k(value: Any, name: str = "top_k") -> None:
    if not is_integer(value, 1):
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r:.80}")


def check_center(value: Any, used: bool = True, by: str = "") -> None:
    """``used``: whether something looks at it, else ``by`` says what would."""
    if not isinstance(value, bool):
        raise ValueError(f"center must be True or False, got {value!r:.80}")
    if value and not used:
        raise ValueError(f"center=True is used by contrastive search alone: give {by}")


def check_streamer(value: Any) -> None:
    if value is not None and not all(callable(getattr(value, name, None)) for name in ("put", "end")):
        raise ValueError(f"streamer must have the methods put and end, got {value!r:.80}")
