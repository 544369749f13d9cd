"""One token for rows that stand at lengths of their own: the step of the engine, and of static buffers.

The strategy proposes, the model runs the candidates, the strategy chooses, and the winners' keys, values, hidden states
and tokens are put behind each row's text. The host decides nothing on the way: what it has to know afterwards is in
:attr:`SlotStep.outcome`. So the same launches serve every step, and may be recorded (:mod:`.graph`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

from ..ops.prefix_commit import CommitPlan, prefix_commit
from .compiled_decoder import compiled_decoder, obstacle
from .inputs import DirectInputs, stand_in_states
from .packing import run_of
from .slots import on
from .step import Step, StepResult, the_first
from .strategies import Choice, Proposal, Strategy, View, decision

logger = logging.getLogger("simctg_fast")


@dataclass
class Outcome:
    """What a step has decided, and by what: ``decision (rows, 3)`` as `strategies.decision` makes it."""

    proposal: Proposal
    choice: Choice | None
    decision: Tensor


class SlotStep:
    """A token for each of the first rows of ``forward.slots``.

    Args:
        strategy: bound to the rows.
        windows: which of the model's masks are windows, see `Attention`.
        ends: ids ``(n,)`` after which a row is active no more, and gets ``pad (1,)``. None: the caller says who is.
        all_grow: active or not; else those that are.

    Attributes:
        outcome: of the last step.
        plan: how keys and values are committed while a graph is recorded.
        bad: ``(slots,)`` rows whose logits left no probabilities while they were active, steps_needed: steps that began
            with an active row; where all grow.
        not_compiled: why the decoder is not compiled, or None.
    """

    outcome: Outcome | None = None

    def __init__(
        self,
        forward: Step,
        strategy: Strategy,
        windows: dict[int, bool],
        *,
        ends: Tensor | None = None,
        pad: Tensor | None = None,
        all_grow: bool = False,
    ):
        self.forward, self.slots, self.strategy, self.windows = forward, forward.slots, strategy, windows
        self.inputs = DirectInputs(forward.model)
        self.ends, self.pad, self.all_grow = ends, pad, all_grow
        self.bad = torch.zeros_like(self.slots.active)
        self.steps_needed = torch.zeros((), dtype=torch.long, device=self.slots.device)
        self.plan: CommitPlan | None = None
        self.compiled = False
        self.not_compiled: str | None = "compile_decoder=False"

    def __call__(self) -> None:
        self.proceed(self.propose())

    def propose(self) -> Proposal:
        assert self.slots.logits is not None
        rows = self.slots.extent.rows
        proposal = self.strategy.propose(self.slots.logits[:rows], self._view(rows))
        if not self.strategy.looks_ahead:
            self.outcome = Outcome(proposal, None, decision(proposal, None))
        return proposal

    def proceed(self, proposal: Proposal) -> None:
        """Run what was proposed, and put the winners behind the rows' texts."""
        slots, rows = self.slots, len(proposal.tokens)
        choice, result = self.run(proposal)
        if choice is not None or self.outcome is None:
            self.outcome = Outcome(proposal, choice, decision(proposal, choice))
        active, lengths, view = slots.active[:rows], slots.lengths[:rows], self._view(rows)
        tokens = self.outcome.decision[:, 0]
        if self.all_grow:
            self.bad[:rows] |= (self.outcome.decision[:, 1] > 0) & active
            self.steps_needed += active.any()
        if self.ends is not None:
            assert self.pad is not None
            tokens = torch.where(active, tokens, self.pad)
        if slots.tokens is not None:
            slots.tokens[:rows].scatter_(1, lengths[:, None], tokens[:, None])
        if self.strategy.needs_history:
            slots.history.append(result.hidden_states, lengths)
        self.strategy.advance(tokens, view)
        self._keep_logits(result.logits)
        slots.lengths[:rows] += 1 if self.all_grow else active
        if self.ends is not None:
            active &= ~(tokens[:, None] == self.ends).any(dim=-1)

    def run(self, proposal: Proposal, keep: Tensor | None = None) -> tuple[Choice | None, StepResult]:
        """Try what was proposed and commit the winners' keys and values, or those at the places ``keep (rows,)``."""
        slots, strategy = self.slots, self.strategy
        proposal = proposal if slots.extent.static else proposal.narrowed()
        packing = None if slots.extent.static else proposal.packing
        rows, k = proposal.tokens.shape
        lengths, view, choices = slots.lengths[:rows], self._view(rows), []

        def choose(states: Tensor) -> Tensor:
            if strategy.looks_ahead:
                choices.append(strategy.choose(states, proposal, view))
            if keep is not None:
                return keep
            return choices[0].selected if choices else the_first(states)

        places = lengths if view.starts is None else lengths - view.starts
        each = places[:, None].expand(-1, k).reshape(-1) if packing is None else places[packing.owners]
        cache: Any = slots.cache
        known: dict[str, Any] = {}
        encoder_outputs = None
        if slots.cross is not None:
            cross = slots.cross.as_cache(rows)
            known = {"cross": cross, "cross_lengths": slots.cross.lengths[:rows]}
            cache = EncoderDecoderCache(cache, cross)
            cache.is_updated = dict.fromkeys(range(len(slots.layers)), True)
            encoder_outputs = stand_in_states(slots.cross.like, len(each), cross.layers[0].keys.shape[2])
        commit = prefix_commit if self.plan is None else self.plan.run
        run = partial(
            self.forward.run,
            self.inputs(run_of(proposal.tokens, packing)[:, None], each[:, None], cache, encoder_outputs),
            proposal.tokens,
            choose,
            commit=lambda winners: slots.commit(on(slots.device, winners), lengths, commit),
            lengths=lengths,
            starts=view.starts,
            windows=self.windows,
            packing=packing,
            **known,
        )
        with self.inputs.placed(each):
            result = self._compiled(run) if self.compiled else run()
        return (choices[0] if choices else None), result

    def _view(self, rows: int) -> View:
        slots = self.slots
        tokens = slots.tokens if self.strategy.needs_tokens else None
        return View(
            slots.history,
            slots.lengths[:rows],
            None if tokens is None else tokens[:rows],
            None if slots.starts is None else slots.starts[:rows],
        )

    def _keep_logits(self, logits: Tensor) -> None:
        slots = self.slots
        assert slots.logits is not None
        logits = on(slots.logits.device, logits)
        if slots.extent.static:
            slots.logits[: len(logits)] = logits
        else:  # what was there before is still asked for by those who record the step
            rest = slots.logits[len(logits) :]
            slots.logits = torch.cat([logits, rest]) if len(rest) else logits

    # ---- a compiled decoder ---------------------------------------------------------------------------------------

    def compile(self) -> None:
        """Compile the decoder from now on. The same code serves other buffers, lengths and sizes: what a process has
        compiled for a model is compiled once."""
        self.not_compiled = obstacle(self.forward.tap.decoder)
        if self.slots.cross is not None:
            self.not_compiled = "decoders with an encoder are not compiled"
        self.compiled = self.not_compiled is None
        if self.compiled:
            self.let_capacity_vary()

    def do_not_compile(self, reason: str) -> None:
        self.compiled, self.not_compiled = False, reason
        logger.info("%s: %s", type(self.forward.model).__name__, reason)

    def let_capacity_vary(self) -> None:
        """Tell the compiler that buffers come in all lengths, so that it does not learn it by compiling twice."""
        for layer in self.slots.layers:
            torch._dynamo.maybe_mark_dynamic(layer.keys, 2)
            torch._dynamo.maybe_mark_dynamic(layer.values, 2)

    def _compiled(self, run: Callable[..., StepResult]) -> StepResult:
        assert self.forward.tap.decoder is not None
        try:
            return run(around=partial(compiled_decoder, self.forward.tap.decoder))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers raise all kinds; what is wrong with the model comes again
            reason = str(error).strip().partition("\n")[0]
            self.do_not_compile(f"its decoder cannot be compiled ({type(error).__name__}: {reason})")
        return run()
