"""One ``generate`` call: the prompt, then a token a row at a time until all rows have ended."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from .caches import fill_cache
from .decode_step import DecodeStep, graph_key, open_decode_step
from .decoder import Decoder
from .generate_arguments import Arguments, check_call
from .outputs import Record
from .padding_warning import no_padding_warning
from .processors import without_sampling_warpers
from .routes import Routes
from .settings import check_settings
from .slots_decoder import SlotsDecoder
from .step import StepResult
from .strategies import Choice, Proposal, Strategy, gumbel
from .trial import Verdict
from .truth import known_tokens, unknown_token
from .unsupported import UnsupportedError

logger = logging.getLogger("simctg_fast")


class Run:
    """A call of ``search``, a :class:`~.search.Search`.

    Attributes:
        streamer, synced_gpus: of the call, to be set before it runs.
    """

    def __init__(
        self,
        search: Any,
        model: Any,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ):
        self.search, self.model, self.config = search, model, config
        self.streamer, self.synced_gpus = None, False
        check_settings(vars(config))  # also what comes from a configuration
        check_call(config, search.name)
        self.row = search.settings(config, model)
        self.noise = BatchNoise(len(input_ids), input_ids.device, search.generator)
        self.chooser: Strategy = search.make_strategy(self.row, self.noise)
        self.processors = without_sampling_warpers(processors, config, model.generation_config, search, self.row.top_k)
        self.criteria = criteria
        self.has_eos = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.input_ids = input_ids
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.arguments = Arguments(model, input_ids, config, criteria.max_length, model_kwargs)
        self.positions, self.max_length = self.arguments.positions, self.arguments.max_length
        self.longest_prompt = self.arguments.longest_prompt
        self.known_tokens: int | None = None  # those that the model can read, where it can write more
        if config.do_sample and not search.is_random and (config.num_return_sequences or 1) > 1:
            logger.warning(
                "num_return_sequences=%d gives equal texts: %s is deterministic%s.",
                config.num_return_sequences,
                search.name,
                f" unless {search.random_by} is given" if search.random_by else "",
            )
        self.record = Record(config, self.is_encoder_decoder)
        asked = search.decode_step
        self.wants_static = input_ids.device.type == "cuda" if asked == "auto" else bool(asked)
        self.choice: Choice | None = None  # of the last step; None where there was none
        self.streamed = 0  # steps whose tokens the streamer has
        self.routes = Routes(self.arguments, self.chooser.candidates, self.record.of_model, search)

    # ---- the loop -------------------------------------------------------------------------------------------------

    @no_padding_warning()
    def __call__(self) -> Any:
        self.routes.serve(self._run)
        return self._result()

    def _run(self, decoder: Decoder, verdict: Verdict) -> None:
        self.decoder, self.whole_steps = decoder, verdict.whole_steps
        self.record.cut(0)
        if self.wants_static and isinstance(decoder, SlotsDecoder):
            decoder.look_for_graph(graph_key(self))
        self.bind(list(range(len(self.input_ids))), self.input_ids.device)
        logits, self.prefill_outputs = self.routes.prefill(decoder, self.chooser)
        self.known_tokens = known_tokens(self.model, logits)
        with getattr(self.model, "_optimize_model_for_decode", nullcontext)():
            self._loop(logits)

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
        while self.model._has_unfinished_sequences(finished, self.synced_gpus, device=device):
            self._check_room(step)
            processed = self.processors(input_ids, logits)
            self.record.add(outputs, logits, processed, self.whole_steps)
            self.chooser.check_vocabulary(processed.shape[-1], "the model")
            rows = None if len(running) == len(every) else torch.tensor(running, device=device)
            running_ids = input_ids if rows is None else input_ids[rows]
            proposal = self.decoder.propose(running_ids, processed if rows is None else processed[rows])
            if self.known_tokens is not None:
                left = unfinished if rows is None else unfinished[rows]
                beyond = proposal.tokens.masked_fill(left[:, None] == 0, 0)
                if int(beyond.max()) >= self.known_tokens:
                    raise ValueError(unknown_token(self.model, int(beyond.max()), self.known_tokens))
                proposal.tokens.clamp_(max=self.known_tokens - 1)
            bad |= _scattered(proposal.bad, rows, None, len(every)) & unfinished.bool()
            if interval == 1:
                check_probabilities(bad, step)
            outputs, self.choice = self.decoder.decide(running_ids, proposal)
            tokens = _scattered(outputs.tokens, rows, None, len(every))
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
                    places = self.decoder.keep([bool(left[row]) for row in running])
                    if len(places) < len(running):  # rows that have ended cost nothing from here on
                        running = [running[place] for place in places]
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

    def _needs_all_rows(self) -> bool:
        """Whether rows that have ended are written on (as transformers does without an end-of-text token), wanted in
        what is returned, or run for others' sake."""
        return not self.has_eos or self.record.wanted or self.arguments.callers_cache is not None or self.synced_gpus

    # ---- steps over static buffers --------------------------------------------------------------------------------

    def _decode_step(self, proposal: Proposal, result: StepResult) -> DecodeStep | None:
        """What takes over from the step that has just been made; None where it cannot, unless it was insisted on."""
        asked = self.search.decode_step
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
        reason = decode.step.not_compiled
        if self.search.decode_step == "compiled" and reason is not None:
            raise ValueError(f"decode_step='compiled', but {reason}; allowed: True, False or 'auto'")

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
                check_probabilities(decode.step.bad, step - 1)
                finished = at_end or not bool(decode.slots.active.any())
        kept = needed + int(decode.step.steps_needed)
        self.input_ids = decode.input_ids[:, : decode.input_ids.shape[1] - (step - kept)].clone()
        self.surplus = step - kept
        self.not_captured, self.static_steps = decode.graph.reason, step - first
        decode.graph.keep(decode.key)

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


def stop_check_interval(device: torch.device) -> int:
    """Steps between two looks at the end-of-text flags: on a GPU each look makes the host wait for the device."""
    return 8 if device.type == "cuda" else 1
