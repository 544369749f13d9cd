"""DRY: a logits processor against repetition that goes on, the dearer the longer it has been going on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..checks import is_integer, is_number, require
from ..ops.repeated_suffix import repeated_suffix
from .breakers import Breakers, check_breakers

__all__ = ["DRY_ALLOWED", "DRY_SEQUENCE_BREAKERS", "DRYLogitsProcessor"]

DRY_SEQUENCE_BREAKERS = ("\n", ":", '"', "*")  # the sampler's own
_LARGEST = 1e30  # a penalty at most

# What each setting may be, for whoever takes them.
DRY_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "multiplier": (
        lambda v: is_number(v, 0, 0) or is_number(v, 1 / _LARGEST, _LARGEST),
        "0 (off) or a number from 1e-30 to 1e30",
    ),
    "base": (lambda v: is_number(v, 1), "a finite number of at least 1 (1: every length costs the same)"),
    "allowed_length": (lambda v: is_integer(v, 1, 2**31 - 1), "an integer from 1 to 2**31 - 1"),
    "penalty_range": (
        lambda v: is_integer(v, -1, 2**31 - 1),
        "an integer of at least 1, or 0 or -1 for the whole text",
    ),
}


class DRYLogitsProcessor(LogitsProcessor):
    """Takes ``multiplier · base^(n − allowed_length)`` from the score of a token that would make a repetition of n
    tokens, n ≥ ``allowed_length``, one longer ("Don't Repeat Yourself", the sampler that p-e-w published in
    text-generation-webui, https://github.com/oobabooga/text-generation-webui/pull/5677).

    Of token v, n is the longest end of the text that stood directly before v somewhere in it. The text is the last
    ``penalty_range`` tokens, prompt included, padding on the left left out. A repetition begins behind the text's last
    sequence breaker, and a token that ends a breaker is never penalised. A penalty is at most 1e30, and a score of −inf
    stays so. It keeps no state: rows may change places, as beams do, and any strategy may call it.

    Args:
        multiplier: from 1e-30 to 1e30; or 0, which switches it off.
        base: at least 1. With 1 every repetition costs ``multiplier``, however long.
        allowed_length: repetitions shorter than this are free; at least 1.
        sequence_breakers: token ids, and texts that need ``tokenizer``. A text of up to 63 bytes breaks where a token
            completes it: one that holds it whole, or the last of several that spell it together, in any way the
            vocabulary has; some of those alone do not.
        penalty_range: how many tokens back it looks; 0 or −1: at all of them. (As published. To llama.cpp 0 is off, for
            which ``multiplier`` is here.)
        tokenizer: of transformers; for breakers that are texts, and for its padding token.
        pad_token_id: the run of this token at a row's beginning is padding, elsewhere it is text, as a processor sees
            no attention mask. None: the tokenizer's, or without a tokenizer nothing is padding. Where it is the
            beginning-of-text token as well, that one does not count either.

    Raises:
        ValueError: a setting outside its range; texts among the breakers without a tokenizer.
    """

    def __init__(
        self,
        multiplier: float = 0.8,
        base: float = 1.75,
        allowed_length: int = 2,
        sequence_breakers: Sequence[str | int] = DRY_SEQUENCE_BREAKERS,
        penalty_range: int = -1,
        *,
        tokenizer: Any = None,
        pad_token_id: int | None = None,
    ) -> None:
        given = {"multiplier": multiplier, "base": base, "allowed_length": allowed_length}
        for name, value in (given | {"penalty_range": penalty_range}).items():
            valid, allowed = DRY_ALLOWED[name]
            require(valid(value), name, value, allowed)
        valid_pad = pad_token_id is None or is_integer(pad_token_id, 0, 2**63 - 1)
        require(valid_pad, "pad_token_id", pad_token_id, "a token id or None")
        self.multiplier, self.base = float(multiplier), float(base)
        self.allowed_length, self.penalty_range = int(allowed_length), int(penalty_range)
        self.sequence_breakers = check_breakers("sequence_breakers", sequence_breakers, tokenizer)
        self.pad_token_id = getattr(tokenizer, "pad_token_id", None) if pad_token_id is None else int(pad_token_id)
        self._breakers = Breakers(self.sequence_breakers, tokenizer) if self.multiplier else None
        # The exponent from which on a penalty grows no more.
        self._most = 0
        if self.multiplier and self.base > 1:
            self._most = math.floor(math.log(_LARGEST / self.multiplier) / math.log(self.base))
        self._longest = self.allowed_length + self._most

    def __repr__(self) -> str:
        names = ("multiplier", "base", "allowed_length", "sequence_breakers", "penalty_range")
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores (B, V)`` less the penalties, new, for ``input_ids (B, T)``. Nothing is read on the host."""
        if self._breakers is None or input_ids.shape[1] <= self.allowed_length:
            return scores
        tokens, penalties, _ = self._penalties(self._breakers, input_ids)
        known = tokens < scores.shape[1]  # inputs may have tokens that outputs have not
        penalties = penalties.clamp_(max=torch.finfo(scores.dtype).max / 2).to(scores.dtype).masked_fill_(~known, 0)
        places = torch.where(known, tokens, 0)
        # Of several penalties of a token the largest: the smallest of the scores that they leave.
        return scores.scatter_reduce(1, places, scores.gather(1, places) - penalties, "amin")

    def causes(self, ids: Sequence[int]) -> dict[int, tuple[float, int, int]]:
        """Of a text, without padding, the tokens that are penalised as its next one: the penalty, where the token stood
        before (the place in ``ids``), and how many tokens in front of it are those at the end of the text."""
        found: dict[int, tuple[float, int, int]] = {}
        if self._breakers is None or len(ids) <= self.allowed_length:
            return found
        tokens, penalties, repeats = self._penalties(self._breakers, torch.tensor([ids]))
        cut = len(ids) - tokens.shape[1]
        for place in penalties[0].nonzero().flatten().tolist():
            cause = float(penalties[0, place]), cut + place, int(repeats[0, place])
            found[ids[cut + place]] = max(cause, found.get(ids[cut + place], cause))
        return found

    def _penalties(self, breakers: Breakers, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that count ``(B, T)``, and for each what it costs to write it again, in float64, and how long a
        repetition that would prolong."""
        starts = None
        if self.pad_token_id is not None:
            starts = ((input_ids != self.pad_token_id).cumsum(1) == 0).sum(1)
        cut = max(0, input_ids.shape[1] - self.penalty_range) if self.penalty_range > 0 else 0
        tokens = input_ids[:, cut:].to(torch.int64)
        starts = None if starts is None else (starts - cut).clamp(min=0)

        longest = min(self._longest, tokens.shape[1])
        limits, breaks = breakers(tokens, starts, longest)
        repeats = repeated_suffix(tokens, starts, None, limits, longest)
        exponents = (repeats - self.allowed_length).clamp(max=self._most).double()
        penalties = self.multiplier * self.base**exponents
        return tokens, penalties.masked_fill((repeats < self.allowed_length) | breaks, 0), repeats
