"""Tokens that continue a text, as text: with the space that stands before them, and one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["continuation_pieces", "continuation_text"]

# Tokens with text that are decoded along, so that what follows does not look like the beginning of a text.
_CONTEXT = 6
# A character has four bytes at most, each may be a token: so many can be waiting for its last one.
_WAITING = 3
# Tokens that each finish a character and begin the next wait together, but not for ever.
_LONGEST = 12
# Where so many tokens in front of the context begin no character, replacement characters are what the text is made of.
_REPLACED = 24
_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character (yet)


def continuation_text(
    tokenizer: Any, before: Sequence[int], tokens: Sequence[int], *, skip_special_tokens: bool = True
) -> str:
    """The text of ``tokens`` behind ``before``. Decoded alone, sentencepiece's would lose the space at their beginning.

    A character that ``before`` has begun and ``tokens`` finish is part of the text, whole. Finished characters stay
    where bytes of none stand beside them, for which the byte fallback of tokenizers gives up all of them.

    Args:
        tokenizer: of transformers, or another with ``decode(ids, skip_special_tokens=…)``.
        before: token ids that come before, of which the last few with text matter; empty where a text begins.
        tokens: the token ids of the continuation.
    """
    decoder = _Decoder(tokenizer, before, skip_special_tokens)
    ids = list(tokens)
    if not decoder.waiting:
        text = decoder.behind(ids)
        # With unfinished characters some decoders give up the finished ones beside them.
        if text is not None and _UNFINISHED not in text:
            return text
    return "".join(decoder.pieces(ids))


def continuation_pieces(
    tokenizer: Any, before: Sequence[int], tokens: Sequence[int], *, skip_special_tokens: bool = True
) -> Iterator[str]:
    """The text that each of ``tokens`` adds; a character that several of them spell comes with the last of these.

    Joined they are `continuation_text`, except where a token changes the text before it, as with
    ``clean_up_tokenization_spaces``, which takes back the space before a full stop.

    Args: as `continuation_text`.
    """
    return _Decoder(tokenizer, before, skip_special_tokens).pieces(list(tokens))


class _Decoder:
    """Decodes token after token, each behind a bounded number of those before it."""

    def __init__(self, tokenizer: Any, before: Sequence[int], skip_special_tokens: bool):
        self._tokenizer, self._options = tokenizer, {"skip_special_tokens": skip_special_tokens}
        self.waiting: list[int] = []  # of a character that is not finished
        self._marks = 0  # replacement characters in their text
        self._owed = ""  # what stands for it in the text before
        # Tokens that were decoded together, and whether they have text.
        self._groups: list[tuple[list[int], bool]] = []
        self._begin(before)

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, **self._options)) if ids else ""

    def behind(self, ids: list[int]) -> str | None:
        """The text of ``ids`` behind the context; None where they change that, so that nothing is known."""
        context = [token for group, _ in self._groups for token in group]
        head, both = self.decode(context), self.decode(context + ids)
        # Cleaning up takes spaces away at the end of what was there.
        for known in (head, head.rstrip()):
            if both.startswith(known):
                return both[len(known) :]
        return None

    def pieces(self, ids: list[int]) -> Iterator[str]:
        for number, token in enumerate(ids, 1):
            yield self._push(token, last=number == len(ids))

    def _push(self, token: int, last: bool = False) -> str:
        """The text that is certain with ``token``, or all there is."""
        self.waiting.append(token)
        text = self._text(self.waiting)
        marks, self._marks = self._marks, text.count(_UNFINISHED)
        # Fewer than before: the bytes of a replacement character that the model has written itself.
        if last or not text.endswith(_UNFINISHED) or self._marks < marks:
            done, self.waiting, self._marks = self.waiting, [], 0
            return self._settle(done, text)
        # Those before the last three are of no character that can still be finished; but one of them may have finished
        # a character and begun another.
        for count in range(1, len(self.waiting) - _WAITING + 1):
            first = self.waiting[:count]
            if text.startswith(certain := self._text(first)):
                self.waiting, self._marks = self.waiting[count:], 0
                return self._settle(first, certain)
        if len(self.waiting) < _LONGEST:
            return ""
        done, self.waiting, self._marks = self.waiting, [], 0
        return self._settle(done, text)

    def _text(self, ids: list[int]) -> str:
        text = self.behind(ids)
        return self.decode(ids) if text is None else text

    def _settle(self, ids: list[int], text: str) -> str:
        self._keep(ids, bool(text))
        if self._owed.startswith(text):
            self._owed, text = self._owed[len(text) :], ""
        elif text.startswith(self._owed):  # the character before was not finished after all
            text, self._owed = text[len(self._owed) :], ""
        else:
            self._owed = ""
        return text

    def _keep(self, ids: list[int], has_text: bool) -> None:
        """Adds a group to the context, and lets go of what is too far back to matter.

        Tokens without text stay for a while: some decoders write nothing for the first bytes of a character.
        """
        kept: list[tuple[list[int], bool]] = []
        seen = 0
        for age, (group, text) in enumerate(reversed([*self._groups, (list(ids), has_text)])):
            if seen >= _CONTEXT:
                break
            if text or age < _CONTEXT:
                kept.append((group, text))
            seen += len(group) if text else 0
        self._groups = kept[::-1]

    def _begin(self, before: Sequence[int]) -> None:
        for count in range(min(_WAITING, len(before)) + 1):
            end = len(before) - count
            context, head = self._context(before, end)
            if not head.endswith(_UNFINISHED):
                break
        else:  # no character that waits for its end: these are replacement characters, or no text at all
            context, head = self._context(before, end := len(before))
        self._groups = [(context, bool(head))] if context else []
        for token in before[end:]:
            self._push(token)
        if self.waiting:
            self._owed = self._text(self.waiting)

    def _context(self, before: Sequence[int], end: int) -> tuple[list[int], str]:
        """The last tokens before ``end`` that have a text and do not begin within a character, and their text."""
        size = _CONTEXT
        while True:
            for more in range(_WAITING + 1):  # one of these is where a character begins
                context = list(before[max(0, end - size - more) : end])
                head = self.decode(context)
                if size + more >= end or (head.strip() and not head.startswith(_UNFINISHED)):
                    return context, head
            if head.strip() and size > _REPLACED:
                return context, head
            size *= 2
