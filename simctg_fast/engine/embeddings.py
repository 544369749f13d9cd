"""Requests for embeddings: gathered while sequences are written, run when the model is free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..text.features import embed_tokens
from .prepare import Preparer
from .requests import Request
from .results import Result, error_result, from_embeddings

Waiting = tuple[Request, int, list[list[int]]]  # its place among all, and the tokens of its texts

MOST = 256  # requests that wait: then the slots are emptied for them


class Embeddings:
    """Mean hidden states of texts, as `extract_features` makes them with ``pooling="mean"``.

    On a CPU each text runs alone, so that its bits depend on no other; a GPU takes texts of similar length together.
    """

    def __init__(self, model: Any, tokenizer: Any, prepare: Preparer):
        self.model, self.tokenizer, self.prepare = model, tokenizer, prepare
        self.waiting: list[Waiting] = []
        self.is_wanted = False  # nothing else is to do

    @property
    def is_due(self) -> bool:
        return len(self.waiting) >= MOST or (self.is_wanted and bool(self.waiting))

    def add(self, request: Request, place: int) -> None:
        """Raises `RequestError` for a text that the model does not take."""
        self.waiting.append((request, place, self.prepare.embedded(request)))

    def run(self) -> Iterator[Result]:
        waiting, self.waiting, self.is_wanted = self.waiting, [], False
        results = self._embedded(waiting)
        if len(waiting) > 1 and results[0].error is not None:  # one of them pays for it alone
            results = [result for each in waiting for result in self._embedded([each])]
        yield from results

    def _embedded(self, waiting: list[Waiting]) -> list[Result]:
        rows = [row for _, _, found in waiting for row in found]
        try:
            values = iter(embed_tokens(self.model, self.tokenizer, rows).tolist())
        except Exception as error:
            message = f"the model's forward raised {type(error).__name__}: {error}"
            return [error_result("model_error", message, request=each[0], index=each[1]) for each in waiting]
        return [
            from_embeddings(request, sum(map(len, found)), [next(values) for _ in found], index=place)
            for request, place, found in waiting
        ]
