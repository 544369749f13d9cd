"""Which decoder serves a call of ``generate``: what is known of the model, or what a trial finds."""

from __future__ import annotations

import logging

from .call import Call
from .hidden_states import HiddenStatesTap
from .report import SupportReport, announce, forget, recall, refused_checks, remember
from .trial import DECODERS, Ours, Route, Verdict, judge
from .unsupported import UnsupportedError

logger = logging.getLogger("simctg_fast")


class Routes:
    """The ways that are open to one call.

    Args:
        path: ``"auto"``, or the name of the only one.
        attentions: whether the model's own attention is wanted.
    """

    def __init__(self, call: Call, tap: HiddenStatesTap, path: str, attentions: bool):
        self.call, self.tap, self.path, self.attentions = call, tap, path, attentions
        self.refused: dict[Route, str] = {}  # routes that gave up in the course of this call, and why
        self.kind: tuple | None = None  # of the call, if what is found is remembered

    def verdict(self, ours: Ours) -> Verdict:
        """How this model serves this kind of call; ``ours`` makes the block that decoders run in.

        Raises:
            ValueError: in no way.
        """
        model, names = self.call.model, [name for name in DECODERS if self.path in ("auto", name)]
        if self.call.model_kwargs.get("use_cache") is False and self.path == "auto":
            names = ["uncached"]
        refusals = []
        if self.attentions and "shared_prefix" in names:
            names.remove("shared_prefix")
            refusals.append("shared_prefix: output_attentions needs the model's own attention")
        for route, reason in self.refused.items():
            refusals += [f"{route[0]}: {reason}"] if route[0] in names and not route[1] else []
        routes = [(name, head) for name in names for head in (True, False)]
        routes = [(n, h) for n, h in routes if (n, h) not in self.refused and (self.tap.has_head or not h)]
        self.kind = (*self.call.kind(), *names) if self.path == "auto" else None
        verdict = None if self.kind is None or self.refused else recall(model, self.kind)
        if verdict is None:
            verdict = judge(self.call, self.tap, routes, refusals, ours)
            if self.kind is not None and verdict is not None:
                remember(model, self.kind, verdict)
        elif verdict.asks:
            self.tap.decoder = None
        if verdict is None:
            on = "" if self.path == "auto" else f" on path={self.path!r}"
            reason = f"{type(model).__name__} cannot be decoded by contrastive search{on}: {'; '.join(refusals)}"
            checks = tuple(refused_checks(refusals))
            announce(SupportReport(type(model).__name__, "none", reason, False, checks))
            raise ValueError(reason)
        announce(verdict.report)
        return verdict

    def refuse(self, verdict: Verdict, error: UnsupportedError) -> None:
        """The route that was found to serve does not serve this call after all."""
        name, head = verdict.route
        logger.info("%s does not take path %s: %s", type(self.call.model).__name__, name, error)
        if self.kind is not None:
            forget(self.call.model, self.kind)
        for route in [(name, head)] if error.head else [(name, True), (name, False)]:
            self.refused[route] = str(error)
