"""Frustratingly simple decoding (Yang et al. 2023, arXiv 2305.12675): an n-gram model of the text so far speaks against
repeating it. One row a token: what it looks at is there before the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationConfig

from ..checks import is_integer, is_number
from ..ops.candidate_select import contrastive_scores
from ..ops.earlier_text import follower_scan, ngram_penalty
from ..ops.top_k import top_k_probs
from .generate_arguments import check_known, check_vocabulary
from .search import Options, Search
from .settings import check_top_k
from .slots import on
from .strategies import Choice, Proposal, Row, RowSettings, Strategy, View

if TYPE_CHECKING:
    from typing_extensions import Unpack

KINDS = ("ngram", "vector")
ALPHA = {"ngram": 0.65, "vector": 0.45}
ORDER = {"ngram": 3, "vector": 2}
TOP_K, BETA = 3, 0.9
MOST_ORDER, MOST_STOP_TOKENS = 16, 256


class FSDStrategy(Strategy):
    """Of the ``weighed`` most probable tokens the one with the largest ``(1 − alpha) p − alpha`` times its penalty.

    Args:
        weighed: at most; rows whose own ``top_k`` is smaller take of the first of them.
        order: the largest n of any row.
    """

    needs_tokens, weighed_by = True, "k"

    def __init__(self, weighed: int, order: int):
        super().__init__()
        self.weighed, self.order = weighed, order

    def key(self) -> tuple:
        return (self.weighed, self.order, self.counts)

    def bind(self, rows: Sequence[Row | None], device: torch.device) -> None:
        super().bind(rows, device)
        settings = [row.parameters if row is not None else None for row in rows]
        self.beyond = self._beyond(settings)
        first = next((p for p in settings if p is not None), RowSettings(0.0))
        settings = [first if p is None else p for p in settings]
        self._set("alpha", torch.tensor([p.penalty_alpha for p in settings], dtype=torch.float64)[:, None])
        self._set("order", torch.tensor([p.fsd_n or self.order for p in settings]))
        self._set("beta", torch.tensor([p.fsd_beta for p in settings], dtype=torch.float64))
        stops = [[*p.fsd_stop_tokens] + [-1] * (MOST_STOP_TOKENS - len(p.fsd_stop_tokens)) for p in settings]
        self._set("stops", torch.tensor(stops))
        self.has_stops = self.static or any(p.fsd_stop_tokens for p in settings)

    def propose(self, logits: Tensor, view: View) -> Proposal:
        rows = slice(0, len(logits))
        probs, tokens = top_k_probs(logits, self.weighed)
        if self.beyond is not None:
            probs = probs.masked_fill(self.beyond[rows], 0.0)
        penalty, position = (on(probs.device, x) for x in self._penalty(tokens, view))
        penalty = penalty.to(probs.dtype)
        if self.has_stops:
            free = (tokens[..., None] == self.settings["stops"][rows, None]).any(dim=-1)
            penalty = penalty.masked_fill(free, 0.0)
        scores = contrastive_scores(probs, penalty, self.settings["alpha"][rows])
        scores = scores.nan_to_num_(nan=float("-inf"), neginf=float("-inf"))
        choice = Choice(scores.argmax(dim=-1), scores, scores, penalty, position, self._near(scores))
        return self._chosen(Proposal(tokens, probs), choice)

    def _penalty(self, tokens: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Of ``tokens (rows, k)``, and where what says most against them stands, −1: nowhere; both ``(rows, k)``."""
        raise NotImplementedError


class NgramFSD(FSDStrategy):
    """Penalty: the token's probability by the smoothed n-gram model of the text."""

    def _penalty(self, tokens: Tensor, view: View) -> tuple[Tensor, Tensor]:
        assert view.tokens is not None
        rows = slice(0, len(tokens))
        order, beta = self.settings["order"][rows], self.settings["beta"][rows]
        return ngram_penalty(
            view.tokens, tokens, view.lengths, view.starts, orders=order, betas=beta, longest=self.order
        )


class VectorFSD(FSDStrategy):
    """Penalty: the largest cosine, at least 0, of the newest n − 1 states with those that the token has followed."""

    needs_history = True

    def __init__(self, weighed: int, order: int):
        super().__init__(weighed, order)
        self.needs_norms = order > 2

    def _penalty(self, tokens: Tensor, view: View) -> tuple[Tensor, Tensor]:
        history, rows = view.history, slice(0, len(tokens))
        assert view.tokens is not None
        assert history.states is not None
        there = history.states.device
        starts = None if view.starts is None else on(there, view.starts)
        return follower_scan(
            history.states[rows],
            on(there, view.tokens),
            on(there, tokens),
            on(there, view.lengths),
            starts,
            on(there, self.settings["order"][rows]),
            None if history.norms is None else history.norms[rows],
            longest=self.order,
        )


class FSD(Search):
    """Frustratingly simple decoding with these settings, to be handed to ``model.generate(custom_generate=...)``.

    Of the ``k`` most probable tokens the one with the largest ``(1 − alpha) · p − alpha · penalty`` is kept. The
    penalty is what the text so far, prompt included, says of the token: with ``kind="ngram"`` its probability by an
    n-gram model of the text, with ``"vector"`` the largest cosine, clipped to [0, 1], of the newest hidden states with
    those that the token has followed (Yang et al. 2023). Deterministic. A token costs one row, as in greedy search.

    Args:
        kind: ``"ngram"``, which looks at tokens alone, or ``"vector"``.
        n: of the n-grams: the last n − 1 tokens, or states, are the context; 1 … 16, for vectors at least 2. Default:
            3, vectors: 2.
        k: tokens that are weighed, 1 … vocabulary.
        alpha: weight of the penalty in [0, 1]. Default: 0.65, vectors: 0.45 (the paper's for English; for Chinese it
            has 0.55 and 0.4).
        beta: of ``kind="ngram"``: what the longest context takes of the penalty, in [0, 1].
        stop_tokens: ids that are never penalised, such as those of line breaks and punctuation; at most 256.
        options: how it is run, see `Search`.

    The authors' code hands a tuple of all layers' states to the vectors' model; it is the last layer's here. It bans
    the end of the text unless told not to; here it may come.

    Raises:
        ValueError: a value outside its range, named with the range, when the object is made or first used.
    """

    name = "FSD"

    def __init__(
        self,
        kind: str = "ngram",
        *,
        n: int | None = None,
        k: int = TOP_K,
        alpha: float | None = None,
        beta: float = BETA,
        stop_tokens: Iterable[int] = (),
        **options: Unpack[Options],
    ):
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r:.80}")
        least = 2 if kind == "vector" else 1
        if n is not None and not is_integer(n, least, MOST_ORDER):
            raise ValueError(f"n must be an integer from {least} to {MOST_ORDER} for kind={kind!r}, got {n!r:.80}")
        check_top_k(k, "k")
        if alpha is not None and not is_number(alpha, 0, 1):
            raise ValueError(f"alpha must be a number in [0, 1], got {alpha!r:.80}")
        if not is_number(beta, 0, 1):
            raise ValueError(f"beta must be a number in [0, 1], got {beta!r:.80}")
        super().__init__(**options)
        self.kind, self.k, self.beta = kind, int(k), float(beta)
        self.n = int(ORDER[kind] if n is None else n)
        self.alpha = float(ALPHA[kind] if alpha is None else alpha)
        self.stop_tokens = check_stop_tokens("stop_tokens", stop_tokens)

    def _shown(self) -> Mapping[str, Any]:
        shown = {"kind": self.kind, "n": self.n, "k": self.k, "alpha": self.alpha}
        return shown if self.kind == "vector" else shown | {"beta": self.beta}

    def settings(self, config: GenerationConfig, model: Any) -> RowSettings:
        check_vocabulary("k", self.k, model)
        check_known("stop_tokens", self.stop_tokens, model)
        return self.own_settings()

    def own_settings(self) -> RowSettings:
        return RowSettings(self.alpha, top_k=self.k, fsd_n=self.n, fsd_beta=self.beta, fsd_stop_tokens=self.stop_tokens)

    def make_strategy(self, settings: Any, noise: Callable[[int, int], Tensor]) -> Strategy:
        return (NgramFSD if self.kind == "ngram" else VectorFSD)(self.k, self.n)


def check_stop_tokens(name: str, tokens: Any) -> tuple[int, ...]:
    """``tokens`` as a tuple. Raises ValueError: no token ids, or too many."""
    found = tuple(tokens) if isinstance(tokens, Iterable) and not isinstance(tokens, (str, bytes)) else (None,)
    if len(found) > MOST_STOP_TOKENS or not all(is_integer(token, 0, 2**31 - 1) for token in found):
        raise ValueError(f"{name} must be token ids, {MOST_STOP_TOKENS} at most, got {tokens!r:.80}")
    return tuple(map(int, found))
