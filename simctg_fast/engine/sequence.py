"""One continuation while it is being written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from ..text.continuation import continuation_pieces, continuation_text
from .requests import Request
from .results import Choice

_BEHIND = 32  # tokens that a token's text may depend on, and more
IDLE: Any = object()  # in the place of a sequence or a request: there is none at present, but more may come


class Sequence:
    """A prompt, the tokens written so far, and what decides that they are enough.

    Args:
        request: what it belongs to; ``index``: which of its ``n`` continuations this is.
        prompt_ids: tokens the decoder is given (an encoder-decoder's start tokens).
        source_ids: tokens of an encoder-decoder's input, else None.
        seed: of the run.
        processors, criteria: called with this sequence alone, ``(1, length)``.
        ends: token ids that end a text; tokenizer: for stop strings and texts.
        special: ids and texts of the tokens that decoding leaves out.
        on_text: called with what is new of the text as it is written.
    """

    _generator: torch.Generator | None

    def __init__(
        self,
        request: Request,
        index: int,
        prompt_ids: list[int],
        source_ids: list[int] | None,
        *,
        seed: int,
        processors: list[Any],
        criteria: list[Any],
        ends: frozenset[int],
        tokenizer: Any,
        special: Mapping[int, str] = MappingProxyType({}),
        record_trace: bool = False,
        on_text: Callable[[str], None] | None = None,
    ):
        self.request, self.parameters, self.index = request, request.parameters, index
        self.strategy = request.strategy
        self.prompt_ids, self.source_ids = prompt_ids, source_ids
        self.processors, self.criteria = processors, criteria
        self.stop_ids = frozenset(self.parameters.stop_token_ids)
        self.ends, self.tokenizer = ends, tokenizer
        # What is written is read as the text goes on: behind a prompt, but an answer is a text of its own.
        self.before = prompt_ids if source_ids is None and not request.is_answered else []
        self.on_text, self._shown = on_text, ""
        self.failure: tuple[str, str] | None = None  # kind, message
        self.started = 0.0
        self._seed, self._record_trace = seed, record_trace
        self.restart()
        # A token may stand for a single byte, a character takes four at most.
        self._tail = max((4 * len(s) + 8 for s in self.parameters.stop), default=0)
        self._hidden = special if self.parameters.skip_special_tokens else {}
        self._special_stops = [s for s in self.parameters.stop if any(text in s for text in self._hidden.values())]

    @property
    def total_length(self) -> int:
        """Positions it can reach."""
        return len(self.prompt_ids) + self.parameters.max_new_tokens

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None or self.failure is not None

    @property
    def needs_each_step(self) -> bool:
        """Whether its next token waits for this one, or for what is recorded of it."""
        return bool(self.processors or self.criteria) or self.logprobs is not None or self.trace is not None

    @property
    def generator(self) -> torch.Generator:
        """Random numbers of its own, on the CPU: neither batch mates nor the device change them."""
        if self._generator is None:
            chosen = self.parameters.seed
            key = (
                f"request {chosen} {self.index}"
                if chosen is not None
                else f"run {self._seed} {self.request.id!r} {self.index}"
            )
            seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") & (2**63 - 1)
            self._generator = torch.Generator().manual_seed(seed)
        return self._generator

    def restart(self) -> None:
        """Forget what was written, to write it again from the prompt."""
        self.tokens: list[int] = []
        self._visible: list[int] = []
        self._generator = None
        self.finish_reason: str | None = None
        self._text: str | None = None
        self._settled, self._settled_tokens = "", 0  # text that no later token changes
        self.logprobs: list[dict[str, Any]] | None = [] if self.parameters.logprobs else None
        self.trace: list[dict[str, Any]] | None = [] if self._record_trace else None

    def input_ids(self, device: torch.device) -> torch.Tensor:
        return torch.tensor([self.prompt_ids + self.tokens], dtype=torch.long, device=device)

    def token_at(self, position: int) -> int:
        prompt = len(self.prompt_ids)
        return self.prompt_ids[position] if position < prompt else self.tokens[position - prompt]

    def piece(self, token: int) -> str:
        """The text of ``token`` were it the next one."""
        return continuation_text(self.tokenizer, self._ahead_of(len(self.tokens)), [token], skip_special_tokens=False)

    def _ahead_of(self, count: int) -> list[int]:
        """What tokens from place ``count`` on are read behind."""
        written = self.tokens[max(0, count - _BEHIND) : count]
        return written if len(written) == _BEHIND else [*self.before[-_BEHIND:], *written]

    def accept(self, token: int, scores: torch.Tensor | None = None) -> None:
        """Write one more token, and decide whether it was the last. ``scores (1, V)`` are for the criteria."""
        self.tokens.append(token)
        if token not in self._hidden:
            self._visible.append(token)
        ended = token in self.ends or token in self.stop_ids or (self._tail > 0 and self._is_stopped())
        if ended or (self.criteria and self._criteria_stop(scores)):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.parameters.max_new_tokens:
            self.finish_reason = "length"
        if self.on_text is not None and self.failure is None:
            self._show()

    def fail(self, kind: str, message: str) -> None:
        self.failure = (kind, message)

    def _criteria_stop(self, scores: torch.Tensor | None) -> bool:
        device = scores.device if scores is not None else torch.device("cpu")
        ids = self.input_ids(device)
        try:
            return any(bool(torch.as_tensor(criterion(ids, scores)).any()) for criterion in self.criteria)
        except Exception as error:  # the user's code: one request pays for it
            self.fail("criterion_error", f"a stopping criterion raised {type(error).__name__}: {error}")
            return False

    # ---- text -----------------------------------------------------------------------------------------------------

    def _decode(self, count: int, *, special: bool = False) -> str:
        """The text of the first ``count`` tokens, with all special ones or as the request wants them."""
        skip = self.parameters.skip_special_tokens and not special
        return continuation_text(self.tokenizer, self.before, self.tokens[:count], skip_special_tokens=skip)

    def _is_stopped(self) -> bool:
        """Whether the newest tokens complete a stop string; if so the text is cut there."""
        if len(self.tokens) <= self._tail:
            tails = [self._decode(len(self.tokens))]
            tails += [self._decode(len(self.tokens), special=True)] if self._special_stops else []
        else:
            newest = [self._visible] + ([self.tokens] if self._special_stops else [])
            tails = [self.tokenizer.decode(tokens[-self._tail :], skip_special_tokens=False) for tokens in newest]
        if not any(s in tail for tail in tails for s in self.parameters.stop):
            return False
        text = self._decode(len(self.tokens))
        found = _first(text, self.parameters.stop)
        if found is not None:
            self._text = text[: found[1] if self.parameters.include_stop_str_in_output else found[0]]
            return True
        found = _first(self._decode(len(self.tokens), special=True), self._special_stops)
        if found is not None:
            self._text = self._cut(*found)
        return found is not None

    def _cut(self, start: int, end: int) -> str:
        """The text up to a stop string with special tokens in it, at ``start`` to ``end`` of the text with all of them;
        where it is included, as it stands there."""
        raw = self._decode(len(self.tokens), special=True)
        whole = at = 0
        pieces = continuation_pieces(self.tokenizer, self.before, self.tokens, skip_special_tokens=False)
        for number, piece in enumerate(pieces, start=1):
            if at + len(piece) > start:
                break
            at += len(piece)
            if piece:  # else the character that it begins is not finished
                whole = number
        rest = "" if self.tokens[whole] in self._hidden else raw[at:start]
        included = raw[start:end] if self.parameters.include_stop_str_in_output else ""
        return self._decode(whole) + rest + included

    @property
    def text(self) -> str:
        """What was written, up to what stopped it."""
        if self._text is not None:
            return self._text
        stopped = bool(self.tokens) and self.tokens[-1] in self.stop_ids and self.tokens[-1] not in self.ends
        cut = stopped and not self.parameters.include_stop_str_in_output
        return self._decode(len(self.tokens) - cut)

    def _show(self) -> None:
        """Hand on what is new. What may yet become a stop string, half a character, and spaces that some tokenizers
        take back, wait."""
        behind, skip = self._ahead_of(self._settled_tokens), self.parameters.skip_special_tokens
        new = self.tokens[self._settled_tokens :]
        piece = continuation_text(self.tokenizer, behind, new, skip_special_tokens=skip)
        text = self._settled + piece.rstrip("\ufffd")
        if not piece.endswith("\ufffd"):
            self._settled, self._settled_tokens = text, len(self.tokens)
        known = len(self._shown)
        if not self.finished:
            text = text[: max(0, len(text) - max((len(s) - 1 for s in self.parameters.stop), default=0))].rstrip()
        elif self.text.startswith(self._shown):
            text = self.text
        elif self._text is not None:  # what was shown cannot be taken back
            return
        if self.on_text is not None and len(text) > known:
            self.on_text(text[known:])
            self._shown = text

    def choice(self) -> Choice:
        assert self.finish_reason is not None
        if self.logprobs is not None:  # a character of several tokens stands with the last of them
            pieces = continuation_pieces(self.tokenizer, self.before, self.tokens, skip_special_tokens=False)
            for record, piece in zip(self.logprobs, pieces, strict=True):
                record["token"] = piece
        return Choice(self.text, list(self.tokens), self.finish_reason, self.logprobs, self.trace)


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Ids and texts of the tokens that decoding leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    named = zip(getattr(tokenizer, "all_special_ids", ()), getattr(tokenizer, "all_special_tokens", ()), strict=False)
    return dict(named) | {token_id: token.content for token_id, token in added if token.special}


def _first(text: str, stops: Iterable[str]) -> tuple[int, int] | None:
    """Where the first stop string begins and ends; of several at one place the shortest, which was complete first."""
    found = [(at, at + len(s)) for s in stops if (at := text.find(s)) >= 0]
    return min(found, default=None)
