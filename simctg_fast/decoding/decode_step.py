"""``generate`` over static buffers: the rest of a call whose first step was made otherwise.

It goes on with the slots of a :class:`~.slots_decoder.SlotsDecoder`, and has to reproduce its step first. A token for
all rows is one :class:`~.slot_step.SlotStep`, on CUDA replayed as a graph (:mod:`.graph`), which is kept for calls that
follow. The host looks at the device now and then, to see whether all rows have ended.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from .caches import CACHE_NAME
from .decoder import padding_in_front
from .graph import MIN_CAPTURED, Graph, known_of
from .report import autocast_dtype
from .slot_step import SlotStep
from .slots import CrossSlots, on, round_up
from .slots_decoder import SlotsDecoder
from .step import StepResult
from .strategies import Proposal, Strategy
from .truth import RELATIVE_ERROR
from .unsupported import FAILURES, UnsupportedError

_KNOWN_KWARGS = frozenset(
    {CACHE_NAME, "attention_mask", "position_ids", "use_cache", "logits_to_keep", "encoder_outputs"}
    | {"decoder_attention_mask", "decoder_input_ids", "decoder_position_ids"}
)
_KNOWN_CRITERIA = frozenset({MaxLengthCriteria.__name__, EosTokenCriteria.__name__})
_ROUNDING = 4  # times what the winners' logits are off, candidates' states may be


class DecodeStep:
    """A token for every row with each call.

    Args:
        decoder: whose slots are taken over; it must not be stepped any more.
        strategy: bound to all rows.
        input_ids: ``(B, L)`` so far. All rows grow together; what a row is padded with on the left is not read.
        logits: ``(B, V)`` for the next token.
        processors: logits processors, run on the ids so far before each step.
        ends: ids ``(n,)`` that end a row, or None; pad ``(1,)``: what follows them.
        max_length: positions the sequences can reach, if that is known.

    Rows whose text has not ended are ``slots.active``; what is counted of them on the way is in ``step``.
    """

    def __init__(
        self,
        decoder: SlotsDecoder,
        strategy: Strategy,
        *,
        input_ids: Tensor,
        logits: Tensor,
        processors: LogitsProcessorList,
        ends: Tensor | None,
        pad: Tensor,
        max_length: int | None,
    ):
        assert decoder.forward is not None
        self.slots, self.processors, self.key = decoder.slots, processors, decoder.graph_key
        windows = known_of(decoder.model).windows
        self.step = SlotStep(decoder.forward, strategy, windows, ends=ends, pad=pad, all_grow=True)
        self.graph = Graph(self.step, decoder.obstacle, max_length)
        # Positions in front that are no tokens: images, prompts.
        self.offset = self.slots.length - 1 - input_ids.shape[1]
        self.slots.keep_logits(slice(None), logits)
        self.begin(input_ids, torch.ones_like(self.slots.active))

    def begin(self, input_ids: Tensor, unfinished: Tensor) -> None:
        """The ids ``(B, L)`` to go on from, and which rows are unfinished ``(B,)``."""
        self.end = self.offset + input_ids.shape[1]
        self.slots.keep_tokens(slice(None), self.offset, input_ids)
        assert self.slots.tokens is not None
        self.slots.tokens[:, : self.offset] = -1
        self.slots.active.copy_(unfinished)

    @property
    def input_ids(self) -> Tensor:
        """``(B, L)``, with all that was written since."""
        assert self.slots.tokens is not None
        return self.slots.tokens[:, self.offset : self.end]

    @torch.no_grad()
    def __call__(self) -> None:
        """One token for every row."""
        slots = self.slots
        if self.processors:
            assert slots.logits is not None
            slots.logits.copy_(self.processors(self.input_ids, slots.logits))
        self.graph([True] * slots.extent.rows)
        self.end += 1

    @torch.no_grad()
    def reproduces(self, proposal: Proposal, result: StepResult, scores: Tensor | None, weight: float) -> bool:
        """Run the decoder's last step, whose ``result`` is in the slots, again, keeping its winners. Returns whether
        their logits agree, and what would have been chosen has the best of the decoder's ``scores (B, k)``, up to what
        rounding makes of these (None: there is no choice), in which a cosine has this ``weight``."""
        slots, device = self.slots, self.slots.device
        slots.lengths -= 1
        with slots.extent.seen_whole(True):
            choice, ours = self.step.run(proposal, keep=on(result.hidden_states.device, result.selected))
        slots.lengths += 1
        logits = on(device, ours.logits)
        expected = result.logits.to(logits)
        finite = torch.isfinite(expected) & torch.isfinite(logits)
        difference = torch.where(finite, logits - expected, 0.0).norm(dim=-1)
        error = difference / torch.where(finite, expected, 0.0).norm(dim=-1).clamp_min(1e-12)
        dtype = autocast_dtype(device) or result.hidden_states.dtype
        near = error <= RELATIVE_ERROR.get(dtype, 1e-1)
        near &= (torch.isfinite(logits) == torch.isfinite(expected)).all(-1)
        if scores is not None and choice is not None:
            selected = on(device, choice.selected)
            regret = scores.amax(-1) - scores.gather(1, selected[:, None].to(scores.device))[:, 0]
            # Two cosines are compared, which move by about as much as states do, and these by as much as logits.
            allowed = 2 * weight * _ROUNDING * (error + torch.finfo(dtype).eps)
            near &= (selected == on(device, result.selected)) | (on(device, regret) <= allowed)
        return bool(near.all())


def graph_key(run: Any) -> tuple[Any, ...]:
    """Of calls that one graph serves."""
    mask, ends = run.arguments.prompt_mask, ends_of(run.criteria)
    padded = mask is not None and not bool(mask.all())
    size = (len(run.input_ids), padded, 0 if ends is None else len(ends))
    return ("generate", *size, type(run.chooser), run.chooser.key(), run.search.decode_step == "compiled")


def ends_of(criteria: Any) -> Tensor | None:
    return next((c.eos_token_id for c in criteria if isinstance(c, EosTokenCriteria)), None)


def open_decode_step(run: Any, proposal: Proposal, result: StepResult) -> DecodeStep:
    """Take over a `generate_loop.Run` after one of its steps.

    Raises:
        UnsupportedError: the call or the model does not allow it.
    """
    decoder = run.decoder
    odd = sorted({type(criterion).__name__ for criterion in run.criteria} - _KNOWN_CRITERIA)
    unknown = sorted(
        name for name, value in decoder.expanded.items() if value is not None and name not in _KNOWN_KWARGS
    )
    is_slots = isinstance(decoder, SlotsDecoder)
    left = math.inf if run.max_length is None or not is_slots else run.max_length - decoder.slots.length
    for problem in (
        run.search.decode_step == "auto" and left < MIN_CAPTURED and f"{left} tokens are left",
        not is_slots and f"it is decoded on path {decoder.name!r}",
        not decoder.head and "its output embedding does not get the last hidden state",
        (run.record.wanted or run.arguments.callers_cache is not None) and "more than the tokens is wanted",
        run.synced_gpus and "synced_gpus is set",
        bool(odd) and f"stopping criteria look at the tokens: {', '.join(odd)}",
        bool(unknown) and f"the model is given {', '.join(unknown)}",
    ):
        if problem:
            raise UnsupportedError(problem)
    compiles = run.search.decode_step == "compiled"
    kind, known = run.routes.kind, known_of(run.model).reproduced
    weight = run.row.penalty_alpha / run.row.temperature
    weight *= decoder.history.amplification() if run.chooser.needs_history else 1.0
    again = (proposal, result, None if run.choice is None else run.choice.ranked, weight)
    try:
        step = _over(run, decoder, on(run.input_ids.device, result.logits))
        if kind not in known and not step.reproduces(*again):
            raise UnsupportedError("its step over static buffers differs")
        if compiles:
            step.step.compile()
            untried = step.step.compiled and (kind, "compiled") not in known
            if untried and not step.reproduces(*again) and step.step.compiled:
                step.step.do_not_compile("its step differs when it is compiled")
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise UnsupportedError(f"a step over static buffers fails ({type(error).__name__}: {error})") from error
    if kind is not None:  # else the caller named a path, and nothing is remembered of such calls
        known.update([kind, (kind, "compiled")] if step.step.compiled else [kind])
    if decoder.recorded is not None:
        step.graph.adopt(decoder.recorded)
    return step


def _over(run: Any, decoder: SlotsDecoder, logits: Tensor) -> DecodeStep:
    """Steps over the decoder's slots, with all that these need."""
    slots, chooser, device = decoder.slots, run.chooser, logits.device
    starts = _starts(run, slots.length - 1)
    if starts is not None and slots.starts is not None:
        slots.starts.copy_(starts)
    else:
        slots.starts = None if starts is None else starts.to(device)
    if decoder.cross is not None:
        slots.cross = slots.cross or CrossSlots(slots.extent, device)
        slots.cross.fill(0, decoder.cross, _source_lengths(decoder))
        slots.cross.like = decoder.expanded["encoder_outputs"].last_hidden_state[:1, :1]
    # Whole blocks, so that a graph serves other lengths, too; but within a model's table of positions.
    slots.reserve(int(min(round_up(slots.length + 1), run.positions or math.inf)))
    before, chooser.static = chooser.settings, True
    if decoder.recorded is not None:
        chooser.settings = decoder.recorded.settings
        for name in before.keys() & chooser.settings.keys():  # buffers of a graph may have more room
            kept = chooser.settings[name]
            part = tuple(map(slice, map(min, kept.shape, before[name].shape)))
            kept[part] = before[name][part]
    run.bind(list(range(len(run.input_ids))), device)
    ends, pad = ends_of(run.criteria), run.config._pad_token_tensor
    return DecodeStep(
        decoder,
        chooser,
        input_ids=run.input_ids,
        logits=logits,
        processors=run.processors,
        ends=None if ends is None else ends.to(device),
        pad=torch.zeros(1, dtype=torch.long, device=device) if pad is None else pad.to(device).flatten()[:1],
        max_length=run.max_length,
    )


def _starts(run: Any, positions: int) -> Tensor | None:
    """``(B,)`` positions of padding in front of a prompt of so many; None where there is none."""
    mask = run.arguments.mask_of(positions)
    starts = padding_in_front(mask)
    if starts is not None and not bool((mask.sum(dim=-1) == positions - starts).all()):
        raise UnsupportedError("attention_mask has gaps")
    return starts


def _source_lengths(decoder: SlotsDecoder) -> list[int] | None:
    """Of each row's source, whose padding has to be behind it; None: no row is padded."""
    mask = decoder.kwargs.get("attention_mask")
    if mask is None or bool(mask.all()):
        return None
    lengths = mask.sum(dim=-1)
    if mask.ndim != 2 or not torch.equal(
        mask.bool(), torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    ):
        raise UnsupportedError("the source's attention_mask has zeros before its end")
    return lengths.tolist()
