"""Where a text that is made of tokens is broken by other texts: DRY's sequence breakers."""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import is_integer, require

__all__ = ["BREAKERS_ALLOWED", "Breakers", "check_breakers", "is_breaker", "token_pieces"]

_MOST_BYTES = 63  # of a breaker: a bit each of an int64
BREAKERS_ALLOWED = f"a list of token ids and texts of 1 to {_MOST_BYTES} bytes"
_WITHOUT_TEXT = b"\xff"  # in no text


def is_breaker(value: Any) -> bool:
    if isinstance(value, str):
        return 1 <= len(value.encode("utf-8", "surrogatepass")) <= _MOST_BYTES
    return is_integer(value, 0, 2**31 - 1)


def check_breakers(name: str, values: Any, tokenizer: Any) -> tuple[str | int, ...]:
    """The breakers as texts and ints. Raises ValueError for others, and for texts without a tokenizer."""
    valid = isinstance(values, Sequence | set | frozenset) and not isinstance(values, str | bytes)
    require(valid and all(map(is_breaker, values)), name, values, BREAKERS_ALLOWED)
    texts = [value for value in values if isinstance(value, str)]
    if texts and tokenizer is None:
        raise ValueError(f"{name} has the text {texts[0]!r}, for which tokenizer must be given; token ids need none")
    return tuple(value if isinstance(value, str) else int(value) for value in values)


class Breakers:
    """Finds the breakers in rows of tokens, by tables over the vocabulary.

    A text that a single token holds breaks there. One that several tokens spell is followed byte by byte: bit p of a
    state says that what was read ends in the breaker's first p bytes, and a token maps states to states.

    Args:
        breakers: token ids and texts; tokenizer: of transformers, needed for texts.
    """

    def __init__(self, breakers: Sequence[str | int], tokenizer: Any = None) -> None:
        texts = sorted({value.encode("utf-8", "surrogatepass") for value in breakers if isinstance(value, str)})
        ids = {value for value in breakers if not isinstance(value, str)}
        pieces = token_pieces(tokenizer) if texts else []
        size = max([len(pieces) - 1, *ids]) + 2  # the last one stands for all tokens beyond
        single = torch.zeros(size, dtype=torch.bool)
        single[list(ids)] = True
        for text in texts:
            single[[token for token, piece in enumerate(pieces) if text in piece]] = True
        self._single = single
        # Of texts that several tokens may spell, (texts, tokens): bits p of the states that a token leaves whatever was
        # before it, that it goes on from, and that it completes the breaker from.
        longer = [text for text in texts if len(text) > 1]
        nothing = [(0, 0, 0)] * (size - len(pieces))
        states = [[*(_states(text, piece) for piece in pieces), *nothing] for text in longer]
        self._tables = (
            torch.tensor(states, dtype=torch.int64).reshape(len(longer), size, 3).permute(2, 0, 1).contiguous()
        )
        widths = [min(len(piece), _MOST_BYTES) for piece in pieces]
        self._widths = torch.tensor([*widths, *[0] * (size - len(pieces))], dtype=torch.int64)
        self._joins = max((len(text) - 2 for text in longer), default=0)  # tokens between the first and the last one
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, tokens: Tensor, starts: Tensor | None, longest: int) -> tuple[Tensor | None, Tensor]:
        """Of each row of ``tokens (B, T)`` int64, from ``starts (B,)`` on.

        Returns:
            ``(B,)`` int64, how many tokens stand behind its last breaker, right up to ``longest``; None: no limit.
            ``(B, T)`` bool, whether each token would end a breaker were it the next one.
        """
        single, tables, widths = self._tables_on(tokens.device)
        tokens = tokens.clamp(0, len(single) - 1)
        next_breaks = single[tokens]
        spelled = tables.shape[1] > 0
        seen = min(tokens.shape[1], longest + (_MOST_BYTES if spelled else 0))
        broken = next_breaks[:, tokens.shape[1] - seen :]
        if spelled:
            recent = tokens[:, tokens.shape[1] - seen :]
            alone, through, last = tables[:, :, recent]  # (texts, B, seen)
            if starts is not None:  # padding spells nothing
                places = torch.arange(tokens.shape[1] - seen, tokens.shape[1], device=tokens.device)
                alone = alone.masked_fill(places < starts[:, None], 0)
            state, width = alone, widths[recent]
            for _ in range(min(self._joins, seen)):
                state = alone | ((_behind(state) & through) << width)
            broken = broken | ((_behind(state) & last) != 0).any(0)
            next_breaks = next_breaks | ((state[:, :, -1:] & tables[2][:, tokens]) != 0).any(0)
        places = torch.arange(1, seen + 1, device=tokens.device)
        return seen - (broken * places).amax(1), next_breaks

    def _tables_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._on:
            self._on[device] = tuple(table.to(device) for table in (self._single, self._tables, self._widths))  # type: ignore[assignment]
        return self._on[device]


def _behind(state: Tensor) -> Tensor:
    """The state in front of each token: that behind the one before it."""
    return pad(state[..., :-1], (1, 0))


def _states(text: bytes, piece: bytes) -> tuple[int, int, int]:
    """What a token with this piece makes of the states of ``text``, see `Breakers`."""
    if piece[-1] not in text[:-1] and piece[0] not in text[1:]:  # most
        return 0, 0, 0
    inner = range(1, len(text))
    alone = sum(1 << p for p in inner if piece.endswith(text[:p]))
    through = sum(1 << p for p in inner if p + len(piece) < len(text) and text.startswith(piece, p))
    return alone, through, sum(1 << p for p in inner if piece.startswith(text[p:]))


_known: weakref.WeakKeyDictionary[Any, tuple[int, list[bytes]]] = weakref.WeakKeyDictionary()


def token_pieces(tokenizer: Any) -> list[bytes]:
    """What each token of the vocabulary writes behind a text, as UTF-8; of parts of a character their bytes, where the
    tokenizer says which. Kept for as long as the tokenizer is there, and made anew where tokens were added to it."""
    size = len(tokenizer)
    known = _known.get(tokenizer)
    if known is None or known[0] != size:
        known = _known[tokenizer] = (size, _pieces(tokenizer, size))
    return known[1]


def _pieces(tokenizer: Any, size: int) -> list[bytes]:
    count = max([size, *(token + 1 for token in tokenizer.get_vocab().values())])
    decode = getattr(tokenizer, "batch_decode", None)

    def texts(rows: list[list[int]]) -> list[str]:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return [] if decode is None else decode(rows, **options)

    # Behind a letter: at the beginning of a text some decoders write no space.
    before = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    head = texts([before])[0] if before else ""
    behind = texts([[*before, token] for token in range(count)])
    names = tokenizer.convert_ids_to_tokens(list(range(count)))
    pieces = []
    for token, (text, name) in enumerate(zip(behind, names, strict=True)):
        piece = text[len(head) :] if text.startswith(head) else texts([[token]])[0]
        if "\ufffd" in piece or not piece:
            written = _bytes_of(name)
            if written is not None and not written.isascii():
                pieces.append(written)
                continue
        pieces.append(piece.encode("utf-8", "surrogatepass") or _WITHOUT_TEXT)
    return pieces


def _bytes_of(name: Any) -> bytes | None:
    """The bytes of a token that is part of a character, by its name: sentencepiece's ``<0x0A>``, or the alphabet of
    byte-level BPE (printable bytes stand for themselves, the others for the characters from 256 on)."""
    if not isinstance(name, str) or not name:
        return None
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", name):
        return bytes([int(name[3:5], 16)])
    try:
        return bytes(_BYTES[character] for character in name)
    except KeyError:
        return None


_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
