"""Static batches: for models whose cache cannot hold rows of different lengths, or not one copy of the prefix.

Rows of similar length go together, of one length where padding changes a row, and a batch is over when its longest
continuation is. Everything that :mod:`..decoding` knows about paths and their trial applies; only the choice of tokens
is the engine's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from ..decoding.decoder import Decoder
from ..decoding.generate_arguments import Arguments, position_table
from ..decoding.own_step import PLAIN
from ..decoding.padding_warning import no_padding_warning
from ..decoding.routes import Routes
from ..decoding.search import Search
from ..decoding.strategies import Strategy, decision
from ..decoding.trial import Verdict
from ..decoding.truth import known_tokens, unknown_token
from ..memory import SPARE_MEMORY, free_bytes, is_out_of_memory, release
from ..text.batches import padded_rows
from .observe import StepRecord
from .padding import change_by_padding
from .prepare import apply_processors
from .sequence import IDLE, Sequence

logger = logging.getLogger("simctg_fast")

LOOKAHEAD = 8  # batches that are sorted by length together


class StaticBatches:
    """Runs sequences in batches of at most ``slots`` rows.

    Attributes:
        slots: rows a batch; halved when memory runs out.
        one_length: why only rows of one length go together; None where any do.
        steps, row_steps, busy_row_steps: forwards, rows in them, and rows that were still being written.
        generated: tokens written; active: sequences in work; halvings: how often memory ran out.
    """

    kind = "static"

    def __init__(self, model: Any, tokenizer: Any, strategy: Strategy, slots: int, weights: str | None = None):
        self.model, self.tokenizer, self.strategy, self.slots = model, tokenizer, strategy, slots
        self.search = Search(weights=weights)
        self.pad = tokenizer.pad_token_id or 0
        self.one_length = None if slots == 1 else change_by_padding(model, self.pad)
        self.steps = self.row_steps = self.busy_row_steps = 0
        self.halvings = self.active = self.generated = self.shared_tokens = 0
        self.not_captured = "static batches are decoded step by step"
        self.on_step: Callable[[], None] | None = None
        self.lookahead = LOOKAHEAD * slots
        self.positions = position_table(model)
        # What a cache takes if every layer keeps keys and values of every candidate, and logits and their like.
        config, k = model.config.get_text_config(decoder=True), strategy.candidates
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
        found = (getattr(config, name, 0) for name in names)
        layers, size, heads, kept, vocabulary = (value if isinstance(value, int) else 0 for value in found)
        width = layers * size * kept // heads if kept and heads else layers * size
        self.bytes_per_position = 2 * width * k * model.dtype.itemsize
        self.free = free_bytes(model.device)  # asked once: who runs beside whom must not depend on the moment
        self.bytes_per_row = 16 * vocabulary * k
        self.stopping = False

    def run(self, sequences: Iterable[Sequence]) -> Iterator[Sequence]:
        """Yields every sequence when it is finished or has failed, and `IDLE` where the source did."""
        source = iter(sequences)
        while True:
            waiting: list[Sequence] = []
            for sequence in source:
                if sequence is not IDLE:
                    waiting.append(sequence)
                if len(waiting) == self.lookahead or (waiting and sequence is IDLE) or self.stopping:
                    break
                if sequence is IDLE:
                    yield IDLE
            if not waiting or self.stopping:
                return
            waiting.sort(key=lambda s: (len(_prompt(s)), s.parameters.max_new_tokens))
            while waiting and not self.stopping:
                size = self._fitting(waiting)
                batch, waiting = waiting[:size], waiting[size:]
                yield from self._run_batch(batch)

    def _fitting(self, waiting: list[Sequence]) -> int:
        """Rows for the next batch: rows that are done run on with it, and must not leave a table of positions. It has
        to fit into memory, too, which a CPU hands out on trust."""
        longest = source = steps = size = 0
        for sequence in waiting[: self.slots]:
            if self.one_length is not None and len(_prompt(sequence)) != len(_prompt(waiting[0])):
                break
            longest = max(longest, len(sequence.prompt_ids))
            source = max(source, len(sequence.source_ids or ()))
            steps = max(steps, sequence.parameters.max_new_tokens)
            if size and self.positions is not None and longest + steps > self.positions:
                break
            wanted = (size + 1) * (self.bytes_per_position * (source + longest + steps) + self.bytes_per_row)
            if size and self.free is not None and wanted > SPARE_MEMORY * self.free:
                break
            size += 1
        return size

    def _run_batch(self, batch: list[Sequence]) -> Iterator[Sequence]:
        for sequence in batch:
            sequence.started = time.monotonic()
        self.active = len(batch)
        try:
            self._generate(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            release()
            if len(batch) == 1:
                batch[0].fail("out_of_memory", f"one row alone does not fit into memory: {error}".splitlines()[0])
                yield batch[0]
                return
            self.halvings += 1
            self.slots = max(1, len(batch) // 2)
            logger.warning("out of memory with %d rows: going on with %d", len(batch), self.slots)
            for start in range(0, len(batch), self.slots):
                yield from self._run_batch(batch[start : start + self.slots])
            return
        finally:
            self.active = 0
        yield from batch

    @torch.inference_mode()
    @no_padding_warning()
    def _generate(self, batch: list[Sequence]) -> None:
        inputs = padded_rows(self.model, [_prompt(sequence) for sequence in batch], self.pad)
        if self.model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.tensor([s.prompt_ids for s in batch], device=self.model.device)

        def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
            arguments = Arguments(model, input_ids, generation_config, stopping_criteria.max_length, kwargs)
            routes = Routes(arguments, self.strategy.candidates, {}, self.search)

            def run(decoder: Decoder, _: Verdict) -> None:
                for sequence in batch:
                    sequence.restart()
                self.strategy.bind(batch, input_ids.device)
                logits = routes.prefill(decoder, self.strategy)[0]
                with getattr(model, "_optimize_model_for_decode", nullcontext)():
                    self._decode(batch, decoder, input_ids, logits)

            routes.serve(run)
            return input_ids

        # Masks, positions, the encoder's states and a cache, as transformers and PEFT prepare them for a decoding loop.
        self.model.generate(
            **inputs,
            **PLAIN,
            custom_generate=decode,
            max_new_tokens=max(s.parameters.max_new_tokens for s in batch),
            pad_token_id=self.pad,
        )

    def _decode(self, batch: list[Sequence], decoder: Decoder, input_ids: torch.Tensor, logits: torch.Tensor) -> None:
        """Continue ``input_ids (B, L)``, whose ``logits (B, V)`` are given, until all of ``batch`` have ended."""
        everyone, strategy, known = batch, self.strategy, known_tokens(decoder.model, logits)
        padding = [input_ids.shape[1] - len(s.prompt_ids) for s in batch]
        bound: list[Sequence | None] = list(batch)
        while True:
            for index, one in enumerate(batch):
                if one.processors and not one.finished:
                    logits[index] = apply_processors(one, logits[index : index + 1])[0]
            if all(s.finished for s in batch):
                break
            places = decoder.keep([not s.finished for s in batch])
            if len(places) < len(batch):
                input_ids, logits = input_ids[places], logits[places]
                batch, padding = [batch[p] for p in places], [padding[p] for p in places]
            rows = [None if s.finished else s for s in batch]
            if rows != bound:
                strategy.bind(rows, logits.device)
                bound = rows
            proposal = decoder.propose(input_ids, logits)
            if known is not None:
                for index, token in enumerate(proposal.tokens.amax(dim=-1).tolist()):
                    if (sequence := rows[index]) is not None and token >= known:
                        sequence.fail("unknown_token", unknown_token(decoder.model, token, known))
                proposal.tokens.clamp_(max=known - 1)
            result, choice = decoder.decide(input_ids, proposal)
            decided = decision(proposal, choice)
            written = StepRecord(rows, proposal, choice, decided, logits, padding).write(strategy)
            self.steps += 1
            self.generated += written
            self.row_steps += len(batch)
            self.busy_row_steps += written
            self.active = sum(not s.finished for s in everyone)
            input_ids = torch.cat([input_ids, result.tokens[:, None]], dim=-1)
            logits = result.logits.to(input_ids.device, copy=True)
            if self.on_step is not None:
                self.on_step()


def _prompt(sequence: Sequence) -> list[int]:
    return sequence.prompt_ids if sequence.source_ids is None else sequence.source_ids
