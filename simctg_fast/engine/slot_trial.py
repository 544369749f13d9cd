"""Whether slots serve a model: rows of different lengths against transformers' own steps for each of them alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..decoding.own_step import (
    OwnText,
    allowed_for_noise,
    draw_tokens,
    error_of,
    most_noise,
    moved_by_noise,
    own_text,
    wrong_head,
)
from ..decoding.strategies import Choice, Proposal, Strategy, View
from ..decoding.trial import FILLINGS, check_close
from ..decoding.truth import RELATIVE_ERROR
from ..decoding.unsupported import FAILURES, UnsupportedError
from .slot_decoder import SlotDecoder

_TRIAL_LENGTHS = (3, 17, 60)


@dataclass(frozen=True)
class SlotTrial:
    """Texts of different lengths, the tokens that are tried after them, and what transformers' own steps make of it.

    Attributes:
        tokens: of two rounds, ``(slots, k)`` each; the last of a row is kept.
        columns: those of them that transformers' own steps tried, too.
    """

    sources: list[list[int] | None]
    texts: list[OwnText]
    tokens: list[torch.Tensor]
    columns: list[int]


@torch.inference_mode()
def slot_trial(model: Any, slots: int, candidates: int, limit: int | None) -> SlotTrial:
    """The truth for :func:`verify`, to be made while nothing of ours is in place.

    Args:
        limit: positions that the model has, None for any number.

    Raises:
        UnsupportedError: the model cannot be run so, or its hidden states cannot be read.
    """
    longest = max(4, (limit or 1024) - 4)
    lengths = [min(length, longest) for length in _TRIAL_LENGTHS[-slots:]]
    draw = draw_tokens(model)
    tokens = [draw(slots, candidates) for _ in FILLINGS]
    columns = sorted({0, candidates - 1})
    sources: list[list[int] | None] = []
    texts: list[OwnText] = []
    for slot, length in enumerate(lengths):
        rounds = [tried[slot : slot + 1, columns].to(model.device) for tried in tokens]
        prompt = draw(1, length).to(model.device)
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        sources.append(None)
        if model.config.is_encoder_decoder:
            source = draw(1, lengths[-1 - slot]).to(model.device)
            inputs = {"input_ids": source, "attention_mask": torch.ones_like(source), "decoder_input_ids": prompt}
            sources[-1] = source[0].tolist()
        try:
            texts.append(own_text(model, inputs, rounds))
        except FAILURES as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UnsupportedError(f"its own step fails ({type(error).__name__}: {error})") from error
        for states, _ in itertools.chain(*texts[-1].rounds):
            if (reason := wrong_head(states)) is not None:
                raise UnsupportedError(reason)
    return SlotTrial(sources, texts, tokens, columns)


@torch.inference_mode()
def verify(decoder: SlotDecoder, trial: SlotTrial) -> None:
    """Fill slots to different lengths, take two steps, and compare candidates' hidden states and the winners' logits
    with transformers' own steps for each text alone. Leaves all slots free.

    Raises:
        UnsupportedError: they differ, or the model cannot be run so at all.
    """
    model = decoder.model
    normal = RELATIVE_ERROR.get(model.dtype, 1e-1)
    try:
        try:
            _verify(decoder, trial, normal)
        except UnsupportedError as error:
            if error.error > most_noise(normal):
                raise
            text = trial.texts[-1]
            moved = moved_by_noise(model, lambda: error_of(text.again(model).logits, text.logits))
            if not error.error < (allowed := allowed_for_noise(moved, normal)):
                raise
            _verify(decoder, trial, allowed)
    except FAILURES as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if decoder.forward.was_used is False:
            raise UnsupportedError("it does not use the attention interface") from error
        raise UnsupportedError(f"a trial step fails ({type(error).__name__}: {error})") from error
    finally:
        for slot in range(decoder.count):
            decoder.clear(slot)


def _verify(decoder: SlotDecoder, trial: SlotTrial, allowed: float) -> None:
    unequal = "of rows of different lengths"
    for slot, (source, text) in enumerate(zip(trial.sources, trial.texts, strict=True)):
        if source is not None:
            decoder.encode(source)
        prompt = text.ids[0].tolist()
        half = len(prompt) // 2  # in two chunks, as a long prompt is
        decoder.prefill(slot, prompt[:half] or prompt[:1], 0, last=False)
        if len(prompt) > 1:
            decoder.prefill(slot, prompt[half or 1 :], half or 1, last=True)
    forced = _Forced(decoder.strategy.needs_history)
    with _chosen_by(forced, decoder):
        decoder.slots.set_active([slot < len(trial.texts) for slot in range(decoder.count)])
        for number, filling in enumerate(FILLINGS):  # beyond the rows' ends: who reads it is far off
            decoder.slots.fill_unused(filling)
            forced.tokens = trial.tokens[number].to(decoder.device)
            decoder.proceed(decoder.propose(decoder.count))
            for slot, text in enumerate(trial.texts):
                for column, (states, _) in zip(trial.columns, text.rounds[number], strict=True):
                    expected = states[True]
                    assert expected is not None
                    check_close(f"hidden states {unequal}", forced.seen[slot, column], expected[0], allowed)
                check_close(f"logits {unequal}", decoder.logits[slot], text.rounds[number][-1][1][0], allowed)
    decoder.slots.fill_unused(0.0)


class _Forced(Strategy):
    """Tries ``tokens`` and keeps the last of each row; what states they lead to is ``seen (rows, k, D)``."""

    looks_ahead = True
    tokens: torch.Tensor
    seen: torch.Tensor

    def __init__(self, needs_history: bool):
        super().__init__()
        self.needs_history = needs_history

    def propose(self, logits: torch.Tensor, view: View) -> Proposal:
        tokens = self.tokens[: len(logits)]
        return Proposal(tokens, torch.ones(tokens.shape, device=tokens.device))

    def choose(self, states: torch.Tensor, proposal: Proposal, view: View) -> Choice:
        self.seen = states.clone()
        last = torch.full((len(states),), states.shape[1] - 1, device=states.device)
        return Choice(last, proposal.probs, proposal.probs, proposal.probs, proposal.tokens)


@contextmanager
def _chosen_by(strategy: Strategy, decoder: SlotDecoder) -> Iterator[None]:
    decoder.step.strategy, before = strategy, decoder.step.strategy
    try:
        yield
    finally:
        decoder.step.strategy = before


@torch.inference_mode()
def rows_are_independent(decoder: SlotDecoder) -> bool:
    """Whether a row's bits stay the same when fewer rows are computed with it, as far as a trial can tell."""
    forced, seen = _Forced(decoder.strategy.needs_history), []
    forced.tokens = draw_tokens(decoder.model)(decoder.count, decoder.strategy.candidates).to(decoder.device)
    with _chosen_by(forced, decoder):
        decoder.slots.set_active([True] * decoder.count)
        for rows in (decoder.count, max(1, decoder.count // 2), 1):
            for slot in range(decoder.count):  # what earlier trials have left there, or zeros
                decoder.slots.set_length(slot, 2 + slot % 2)
            decoder.proceed(decoder.propose(rows))
            seen.append((forced.seen[0], decoder.logits[0].clone()))
    for slot in range(decoder.count):
        decoder.clear(slot)
    return all(torch.equal(states, seen[0][0]) and torch.equal(row, seen[0][1]) for states, row in seen)
