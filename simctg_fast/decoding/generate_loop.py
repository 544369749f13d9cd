"""One ``generate`` call: the prompt, then a token a row at a time until all rows have ended."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from ..cpu.modules import fast_linears
from ..cpu.t5_blocks import fast_t5_blocks
from ..ops import _backends
from .attention import current_step
from .caches import fill_cache
from .call import Call, learned_prompt
from .compiled_decoder import as_written
from .decode_step import DecodeStep, graph_key, open_decode_step
from .decoder import Decoder
from .generate_arguments import Arguments, checked_settings, position_table
from .graph import obstacle, take
from .hidden_states import HiddenStatesTap
from .outputs import Record
from .padding_warning import no_padding_warning
from .processors import without_sampling_warpers
from .routes import Routes
from .settings import TINY
from .slots_decoder import SlotsDecoder
from .step import StepResult, the_first
from .strategies import Choice, Proposal, RowSettings, Strategy, View, gumbel
from .trial import DECODERS, Verdict
from .truth import known_tokens, unknown_token
from .unsupported import UnsupportedError

logger = logging.getLogger("simctg_fast")


class Run:
    """A call with the settings of ``strategy``, a :class:`~.contrastive_search.ContrastiveSearch`.

    Attributes:
        streamer, synced_gpus: of the call, to be set before it runs.
    """

    def __init__(
        self,
        strategy: Any,
        model: Any,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ):
        self.strategy, self.model, self.config = strategy, model, config
        self.streamer, self.synced_gpus = None, False
        self.penalty_alpha, self.top_k = checked_settings(strategy, config, model)
        is_random = strategy.temperature is not None
        self.k = 1 if self.penalty_alpha == 0 and not is_random else self.top_k
        self.noise = BatchNoise(len(input_ids), input_ids.device, strategy.generator)
        self.chooser: Strategy = strategy.make_strategy(self.k, self.noise)
        temperature = max(strategy.temperature, TINY) if is_random else 1.0
        self.row = RowSettings(self.penalty_alpha, temperature)
        self.processors = without_sampling_warpers(processors, config, model.generation_config, is_random, self.top_k)
        self.criteria = criteria
        self.has_eos = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.input_ids = input_ids
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.arguments = Arguments(model, input_ids, config, criteria.max_length, model_kwargs)
        self.positions = position_table(model)
        wrapper = learned_prompt(model)
        self.virtual = 0 if wrapper is None else wrapper.active_peft_config.num_virtual_tokens
        self.longest_prompt = self.virtual + self.arguments.longest_prompt
        self.known_tokens: int | None = None  # those that the model can read, where it can write more
        if config.do_sample and not is_random and (config.num_return_sequences or 1) > 1:
            logger.warning(
                "num_return_sequences=%d gives equal texts: contrastive search is deterministic unless "
                "ContrastiveSearch(temperature=...) is given.",
                config.num_return_sequences,
            )
        self.record = Record(config, self.is_encoder_decoder)
        asked = strategy.decode_step
        self.wants_static = input_ids.device.type == "cuda" if asked == "auto" else bool(asked)
        self.choice: Choice | None = None  # of the last step; None where there was none
        self.streamed = 0  # steps whose tokens the streamer has

    @property
    def max_length(self) -> int | None:
        """Positions the sequences can reach, where that is bounded."""
        bound = self.arguments.max_length
        return bound if bound is None else bound + self.virtual

    # ---- the loop -------------------------------------------------------------------------------------------------

    @no_padding_warning()
    def __call__(self) -> Any:
        _backends.extension()  # an instruction set that is not there is said as such, not as a path's failure
        with ExitStack() as stack:
            if self.strategy.decode_step != "compiled":
                stack.enter_context(as_written(self.model))
            self.tap = stack.enter_context(HiddenStatesTap(self.model))
            self.routes = self._routes()
            while True:
                verdict = self.routes.verdict(self._ours)
                try:
                    with self._ours():
                        self._run(verdict)
                    break
                except UnsupportedError as error:  # another one takes the call from its start
                    self.routes.refuse(verdict, error)
                    self.arguments.renew_cache()
                    self.record.clear()
                    self._begin_again()
        return self._result()

    def _routes(self) -> Routes:
        call = Call(
            model=self.model,
            input_ids=self.input_ids,
            model_kwargs=self.arguments.kwargs,
            generation_config=self.config,
            top_k=self.k,
            max_length=self.max_length,
            table=self.positions,
        )
        return Routes(call, self.tap, self.strategy.path, self.record.of_model["output_attentions"])

    def _begin_again(self) -> None:
        """A decoder gave up: what a subclass has kept of it is to be forgotten."""

    @contextmanager
    def _ours(self) -> Iterator[None]:
        """What stands in for the model's modules while a decoder runs."""
        with ExitStack() as stack:
            if self.strategy.fast_linear:
                rows = self.input_ids.shape[0] * self.k
                stack.enter_context(fast_linears(self.model, rows, pack=self.strategy.pack))
                stack.enter_context(fast_t5_blocks(self.model, current_step))
            yield

    def _run(self, verdict: Verdict) -> None:
        logits = self._open(verdict)
        with getattr(self.model, "_optimize_model_for_decode", nullcontext)():
            self._loop(logits)

    def _open(self, verdict: Verdict) -> Tensor:
        """Run the prompt by the decoder that was found to serve. Returns its logits."""
        name, head = verdict.route
        self.whole_steps = verdict.whole_steps
        self.decoder: Decoder = DECODERS[name](
            self.model,
            self.tap,
            head=head,
            generation_config=self.config,
            model_kwargs=self.arguments.kwargs,
            max_length=self.max_length,
            record=self.record.of_model,
        )
        self.graph_key = None
        if self.wants_static and isinstance(self.decoder, SlotsDecoder) and not obstacle(self.model, self.model.device):
            self.graph_key = graph_key(self)
            self.decoder.recorded = take(self.model, self.graph_key)
        logits, states, self.prefill_outputs = self.decoder.prefill(self.input_ids)
        self.known_tokens = known_tokens(self.model, logits)
        if self.chooser.needs_history:
            mask = self.arguments.mask_of(states, self.virtual)
            self.decoder.history.write(slice(0, len(states)), 0, states, mask)
        return logits.to(self.input_ids.device)

    def _loop(self, logits: Tensor) -> None:
        input_ids, device = self.input_ids, self.input_ids.device
        unfinished = torch.ones(input_ids.shape[0], dtype=torch.long, device=device)
        steps_needed = torch.zeros((), dtype=torch.long, device=device)
        pad_token = self.config._pad_token_tensor
        interval = 1 if self.streamer is not None else stop_check_interval(device)
        # Surplus steps must not leave a model's table of positions: from here on every step looks for the end.
        text_config = self.model.config.get_text_config(decoder=True)
        limit = self.positions or getattr(text_config, "max_position_embeddings", None) or math.inf
        closely = limit - interval - self.longest_prompt
        outputs, step, finished = self.prefill_outputs, 0, False
        self.prefill_outputs = None
        bad = torch.zeros_like(unfinished, dtype=torch.bool)  # rows whose logits left no probabilities
        static = self.wants_static
        every = list(range(len(input_ids)))
        running, may_leave = every, not self._needs_all_rows()  # the rows that the decoder still has, in its order
        self.bind(running, device)
        while self.model._has_unfinished_sequences(finished, self.synced_gpus, device=device):
            self._check_room(step)
            processed = self.processors(input_ids, logits)
            self.record.add(outputs, logits, processed, self.whole_steps)
            if self.k > processed.shape[-1]:
                raise ValueError(f"top_k must be at most the {processed.shape[-1]} logits of the model, got {self.k}")
            rows = None if len(running) == len(every) else torch.tensor(running, device=device)
            proposal = self._propose(processed if rows is None else processed[rows])
            if self.known_tokens is not None:
                left = unfinished if rows is None else unfinished[rows]
                beyond = proposal.tokens.masked_fill(left[:, None] == 0, 0)
                if int(beyond.max()) >= self.known_tokens:
                    raise ValueError(unknown_token(self.model, int(beyond.max()), self.known_tokens))
                proposal.tokens.clamp_(max=self.known_tokens - 1)
            without = proposal.probs.isnan().any(dim=-1)
            bad |= _scattered(without, rows, None, len(every)) & unfinished.bool()
            if interval == 1:
                check_probabilities(bad, step)
            outputs = self._step(input_ids if rows is None else input_ids[rows], proposal)
            tokens = proposal.tokens.gather(1, outputs.selected.to(device)[:, None]).squeeze(1)
            tokens = _scattered(tokens, rows, None, len(every))
            logits = _scattered(outputs.logits.to(device), rows, logits, len(every))
            if self.synced_gpus and finished:
                continue
            decode = None
            if static and not bool(bad.any()):
                static = False
                decode = self._decode_step(proposal, outputs)
            if self.has_eos:
                tokens = tokens * unfinished + pad_token.to(device) * (1 - unfinished)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            self._stream(tokens, step)
            steps_needed += unfinished.max()
            scores = None if self.record.scores is None else tuple(self.record.scores)
            unfinished = unfinished & ~self.criteria(input_ids, scores)
            step += 1
            if step % interval == 0 or step >= closely or input_ids.shape[1] == self.criteria.max_length:
                if interval > 1:
                    check_probabilities(bad, step - 1)
                left = unfinished.tolist()
                finished = not any(left)
                if may_leave and decode is None and not finished:
                    places = places_kept([bool(left[row]) for row in running])
                    if len(places) < len(running):  # rows that have ended cost nothing from here on
                        may_leave = self.decoder.keep(places)
                        running = [running[place] for place in places] if may_leave else running
                        self.bind(running, device)
            if decode is not None and not finished:
                return self._loop_static(decode, input_ids, unfinished, int(steps_needed), step, interval, closely)
        kept = int(steps_needed)
        self.input_ids = input_ids[:, : input_ids.shape[1] - (step - kept)]
        self.surplus = step - kept
        self.record.cut(kept)

    def bind(self, rows: list[int], device: torch.device) -> None:
        """The decoder has these rows of the batch."""
        self.chooser.bind([self.row] * len(rows), device)
        self.noise.rows = rows

    def _propose(self, logits: Tensor) -> Proposal:
        self.chooser.draw(len(logits))
        return self.chooser.propose(logits, View(self.decoder.history))

    def _step(self, input_ids: Tensor, proposal: Proposal) -> StepResult:
        """Try candidates after ``input_ids (rows, L)`` of the rows that the decoder has."""
        view = View(self.decoder.history)
        self.choice = None

        def choose(states: Tensor) -> Tensor:
            self.choice = self.chooser.choose(states, proposal, view)
            return self.choice.selected

        result = self.decoder.step(input_ids, proposal.tokens, choose if self.chooser.looks_ahead else the_first)
        if self.chooser.needs_history:
            self.decoder.history.append(result.hidden_states)
        return result

    def _needs_all_rows(self) -> bool:
        """Whether rows that have ended are written on (as transformers does without an end-of-text token), wanted in
        what is returned, or run for others' sake."""
        return not self.has_eos or self.record.wanted or self.arguments.callers_cache is not None or self.synced_gpus

    # ---- steps over static buffers --------------------------------------------------------------------------------

    def _decode_step(self, proposal: Proposal, result: StepResult) -> DecodeStep | None:
        """What takes over from the step that has just been made; None where it cannot, unless it was insisted on."""
        asked = self.strategy.decode_step
        try:
            if self.known_tokens is not None:
                raise UnsupportedError("its output embedding writes tokens that it cannot read")
            decode = open_decode_step(self, proposal, result)
        except UnsupportedError as error:
            if asked != "auto":
                raise ValueError(f"decode_step={asked!r}, but {error}; allowed: False or 'auto'") from error
            logger.info("%s is decoded without static buffers: %s", type(self.model).__name__, error)
            return None
        self._check_compiled(decode)
        return decode

    def _check_compiled(self, decode: DecodeStep) -> None:
        if self.strategy.decode_step == "compiled" and decode.not_compiled is not None:
            raise ValueError(f"decode_step='compiled', but {decode.not_compiled}; allowed: True, False or 'auto'")

    def _loop_static(self, decode: DecodeStep, input_ids, unfinished, needed, step, interval, closely) -> None:
        """The rest of the loop, with the host looking at the device every ``interval`` steps only."""
        decode.begin(input_ids, unfinished.bool())
        first, bound, finished = step, self.criteria.max_length, False
        while not finished:
            self._check_room(step)
            decode()
            self._check_compiled(decode)
            self._stream(decode.input_ids[:, -1], step)
            step += 1
            at_end = decode.input_ids.shape[1] == bound
            if step % interval == 0 or step >= closely or at_end:
                check_probabilities(decode.bad, step - 1)
                finished = at_end or not bool(decode.unfinished.any())
        kept = needed + int(decode.steps_needed)
        self.input_ids = decode.input_ids[:, : decode.input_ids.shape[1] - (step - kept)].clone()
        self.surplus = step - kept
        self.not_captured, self.static_steps = decode.not_captured, step - first
        if self.graph_key is not None:
            decode.graph.keep(self.graph_key)

    # ---- small parts ----------------------------------------------------------------------------------------------

    def _stream(self, tokens: Tensor, step: int) -> None:
        if self.streamer is not None and step >= self.streamed:  # a call that began again says nothing twice
            self.streamer.put(tokens.cpu())
            self.streamed = step + 1

    def _check_room(self, step: int) -> None:
        """The candidates of the last token are run as well, so a table of positions ends one token earlier than for
        greedy search."""
        if self.positions is not None and self.longest_prompt + step >= self.positions:
            raise ValueError(
                f"max_new_tokens is too large: with a prompt of {self.longest_prompt} tokens this model's table of "
                f"{self.positions} positions ends after {self.positions - self.longest_prompt} new ones"
            )

    def _result(self) -> Any:
        cache, callers = None, self.arguments.callers_cache
        if self.record.wanted or callers is not None:
            cache = self.decoder.result_cache(self.input_ids, self.surplus)
        if cache is not None and callers is not None:
            cache = fill_cache(callers, cache)
        if not self.record.wanted:
            return self.input_ids
        return self.record.result(self.input_ids, cache, lambda: self.arguments.kwargs["encoder_outputs"])


class BatchNoise:
    """Gumbel noise of a whole batch from one generator, whichever ``rows`` of it are still there."""

    def __init__(self, batch: int, device: torch.device, generator: torch.Generator | None):
        self.batch, self.device, self.generator, self.rows = batch, device, generator, list(range(batch))

    def __call__(self, rows: int, candidates: int) -> Tensor:
        noise = torch.empty(self.batch, candidates, device=self.device).exponential_(generator=self.generator)
        return gumbel(noise if rows == self.batch else noise[self.rows])


def _scattered(values: Tensor, rows: Tensor | None, others: Tensor | None, batch: int) -> Tensor:
    """``others`` of a ``batch``, None for zeros, with ``values`` at ``rows``; None: ``values``, of all of them."""
    if rows is None:
        return values
    others = values.new_zeros(batch, *values.shape[1:]) if others is None else others
    return others.index_copy(0, rows, values)


def check_probabilities(bad: Tensor, step: int) -> None:
    """Raise ValueError where a row of ``bad (B,)`` is true."""
    if bool(bad.any()):
        raise ValueError(
            f"the logits of row {int(bad.nonzero()[0])} left no probabilities at new token {step} or before (NaN, or "
            "every token banned); allowed: finite numbers, and −inf for banned tokens while one token is left"
        )


def places_kept(kept: list[bool]) -> list[int]:
    """For each of the first places, the one whose row it gets when those that are not ``kept`` leave: its own, or for a
    place that is free one from the end."""
    count = sum(kept)
    moved = [place for place in range(count, len(kept)) if kept[place]]
    return [place if kept[place] else moved.pop() for place in range(count)]


def stop_check_interval(device: torch.device) -> int:
    """Steps between two looks at the end-of-text flags: on a GPU each look makes the host wait for the device."""
    return 8 if device.type == "cuda" else 1
