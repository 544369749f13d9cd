"""Which decoder serves a call of ``generate``: what is known of the model, or what a trial finds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor

from ..cpu.fast_blocks import fast_blocks
from ..cpu.modules import MOST_EXACT, WeightCopies, fast_linears
from ..ops import _backends
from .attention import current_step
from .call import Call
from .compiled_decoder import as_written
from .decoder import Decoder
from .generate_arguments import Arguments
from .hidden_states import HiddenStatesTap
from .report import SupportReport, announce, forget, recall, refused_checks, remember
from .strategies import Strategy
from .trial import DECODERS, Route, Verdict, judge
from .unsupported import UnsupportedError

logger = logging.getLogger("simctg_fast")


class Routes:
    """The ways that are open to one call.

    Args:
        candidates: tokens tried a step; record: as in `Decoder`.
        search: a `ContrastiveSearch`, whose ``path``, ``decode_step``, ``fast_linear``, ``pack`` and ``weights`` are
            looked at.

    Attributes:
        kind: of the call, if what is found is remembered.
    """

    def __init__(self, arguments: Arguments, candidates: int, record: dict[str, bool], search: Any):
        self.arguments, self.candidates, self.record, self.search = arguments, candidates, record, search
        model, ids, config = arguments.model, arguments.input_ids, arguments.config
        self.tap = HiddenStatesTap(model)
        limits = (arguments.max_length, arguments.positions)
        self.call = Call(model, ids, arguments.kwargs, config, candidates, *limits)
        self.refused: dict[Route, str] = {}  # routes that gave up in the course of this call, and why
        self.kind: tuple | None = None

    def serve(self, decode: Callable[[Decoder, Verdict], None]) -> None:
        """Call ``decode`` with the decoder that serves; where it raises `UnsupportedError`, once more from the start
        with the next.

        Raises:
            ValueError: there is none.
        """
        _backends.extension()  # an instruction set that is not there is said as such, not as a path's failure
        model, call = self.call.model, self.call
        with nullcontext() if self.search.decode_step == "compiled" else as_written(model), self.tap:
            while True:
                verdict = self._verdict()
                name, head = verdict.route
                try:
                    with self._ours(self.search.weights):
                        return decode(
                            DECODERS[name](
                                model,
                                self.tap,
                                head=head,
                                generation_config=call.generation_config,
                                model_kwargs=call.model_kwargs,
                                max_length=call.max_length,
                                record=self.record,
                            ),
                            verdict,
                        )
                except UnsupportedError as error:
                    logger.info("%s does not take path %s: %s", type(model).__name__, name, error)
                    if self.kind is not None:
                        forget(model, self.kind)
                    self.refused |= {(name, each): str(error) for each in ([head] if error.head else [True, False])}
                    self.arguments.renew_cache()

    @contextmanager
    def _ours(self, weights: WeightCopies | None = None) -> Iterator[None]:
        """What stands in for the model's modules while a decoder runs. (A trial is of the model's own weights.)"""
        if not self.search.fast_linear:
            yield
            return
        model, rows = self.call.model, len(self.call.input_ids) * self.candidates
        exact = max(MOST_EXACT, self.candidates)
        with (
            fast_linears(model, rows, self.search.pack, weights=weights, exact=exact),
            fast_blocks(model, current_step),
        ):
            yield

    def prefill(self, decoder: Decoder, strategy: Strategy) -> tuple[Tensor, Any]:
        """Run the prompt, behind which ``strategy``, bound to the rows, is to choose. Returns its logits ``(B, V)`` and
        the model's output."""
        logits, states, outputs = decoder.prefill(self.call.input_ids)
        if strategy.needs_history and strategy.needs_tokens:
            self.arguments.check_states_of_tokens(states.shape[1])
        needs_mask = strategy.needs_history or strategy.needs_tokens
        decoder.begin(strategy, states, self.arguments.mask_of(states.shape[1]) if needs_mask else None)
        return logits.to(self.call.input_ids.device), outputs

    def _verdict(self) -> Verdict:
        """How this model serves this kind of call. Raises ValueError: in no way."""
        model, names = self.call.model, [name for name in DECODERS if self.search.path in ("auto", name)]
        if self.call.model_kwargs.get("use_cache") is False and self.search.path == "auto":
            names = ["uncached"]
        refusals = []
        if self.record.get("output_attentions") and "shared_prefix" in names:
            names.remove("shared_prefix")
            refusals.append("shared_prefix: output_attentions needs the model's own attention")
        for route, reason in self.refused.items():
            refusals += [f"{route[0]}: {reason}"] if route[0] in names and not route[1] else []
        routes = [(name, head) for name in names for head in (True, False)]
        routes = [(n, h) for n, h in routes if (n, h) not in self.refused and (self.tap.has_head or not h)]
        self.kind = (*self.call.kind(), *names) if self.search.path == "auto" else None
        verdict = None if self.kind is None or self.refused else recall(model, self.kind)
        if verdict is None:
            verdict = judge(self.call, self.tap, routes, refusals, self._ours)
            if self.kind is not None and verdict is not None:
                remember(model, self.kind, verdict)
        elif verdict.asks:
            self.tap.decoder = None
        if verdict is None:
            on = "" if self.search.path == "auto" else f" on path={self.search.path!r}"
            reason = f"{type(model).__name__} cannot be decoded by contrastive search{on}: {'; '.join(refusals)}"
            checks = tuple(refused_checks(refusals))
            announce(SupportReport(type(model).__name__, "none", reason, False, checks))
            raise ValueError(reason)
        announce(verdict.report)
        return verdict
