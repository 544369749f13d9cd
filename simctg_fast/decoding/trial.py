"""Which path serves a call, found out on a small copy of it before the call itself begins.

The truth is what ``generate`` means: transformers' own step, from the caller's arguments, over a cache that the model
makes for itself and with nothing of ours in place. A path has to reproduce its logits of the prompt and, over two
steps, the hidden state of every candidate and the winners' logits, with one row and with two. Keys and values beyond
the text hold large numbers meanwhile, in two versions that must give the same bits: who reads them is found out.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.modeling_outputs import ModelOutput

from .hidden_states import HiddenStatesTap
from .paths import (
    PATHS,
    HeadUnsupportedError,
    Path,
    PathUnsupportedError,
    SharedPrefixPath,
    copy_outputs,
    grow_kwargs,
    repeat_rows,
    without_caches,
)
from .prefix_cache import CACHE_NAME
from .support import Check, SupportReport, autocast_dtype

logger = logging.getLogger("simctg_fast")

RELATIVE_ERROR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
# What a model that cannot do something raises; anything else is somebody's own, and goes on.
FAILURES = (
    AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
FILLINGS = (3e3, -7e3)

_PROMPT = 32  # positions of the prompt that are tried, where nothing asks for more
_BEYOND = 8  # positions of a text that is to be longer than a window
_MOST_CANDIDATES = 8
# A trial past a large window may take so long, or this share of the call: a token costs as much as a dozen positions of
# a prompt, and a trial's truth as some four hundred.
_SECONDS, _SHARE, _STEP, _POSITIONS = 1.0, 0.1, 12, 400


# ---- what is tried ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """What ``generate`` was called with, before anything of ours touched it. ``model_kwargs`` may hold the cache that
    transformers made for it, still empty; ``max_length`` the positions it can reach, or None; ``table`` the size of the
    model's table of positions, or None."""

    model: Any
    input_ids: torch.Tensor
    model_kwargs: dict[str, Any]
    generation_config: GenerationConfig
    top_k: int
    max_length: int | None
    table: int | None

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    @property
    def limit(self) -> int:
        """Positions that a trial may use, the candidates' and a continuation aside."""
        return (self.table or 1 << 30) - 4

    @property
    def mask_name(self) -> str:
        return "decoder_attention_mask" if self.is_encoder_decoder else "attention_mask"

    def new_cache(self) -> Any:
        """A cache as ``generate`` makes it for this model; None where it makes none."""
        return own_cache(self.model, self.generation_config, len(self.input_ids), self.max_length)

    def kind(self) -> tuple:
        """What a verdict on this call holds for: which arguments are given, and what of them models look at."""
        kind: list[Any] = [self.top_k == 1, len(self.input_ids) == 1, self.windows_reached()]
        for name, value in sorted(self.model_kwargs.items()):
            if value is None or isinstance(value, Cache):
                continue
            if isinstance(value, torch.Tensor):
                padded = name.endswith("mask") and value.ndim == 2 and not bool(value.all())
                kind.append((name, value.ndim, value.dtype, padded))
            elif isinstance(value, dict):
                kind.append((name, tuple(key for key, given in value.items() if given is not None)))
            else:
                kind.append((name, value if isinstance(value, (bool, int, float, str)) else type(value).__name__))
        return tuple(kind)

    def windows_reached(self) -> tuple[int, ...]:
        """Sliding windows that the call's positions reach past."""
        config = self.model.config.get_text_config(decoder=True)
        reach = math.inf if self.max_length is None else self.max_length
        found = {
            size
            for name, value in vars(config).items()
            if "window" in name or name == "attention_chunk_size"
            for size in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(size, int) and not isinstance(size, bool) and 0 < size < reach
        }
        return tuple(sorted(found))


def own_cache(model: Any, config: GenerationConfig, batch: int, max_length: int | None) -> Any:
    """The cache that ``generate`` makes for ``model``; None where it leaves that to the model, or has none."""
    made: dict[str, Any] = {}
    config = copy.copy(config)
    config.use_cache, config.cache_implementation = True, None
    model._prepare_cache_for_generation(config, made, GenerationMode.GREEDY_SEARCH, batch, max_length or 1)
    return made.get(CACHE_NAME)


@dataclass(frozen=True)
class _Rows:
    ids: torch.Tensor  # (rows, n)
    kwargs: dict[str, Any]  # without caches


def _batch_dim(name: str, value: torch.Tensor) -> int:
    return 1 if "position_ids" in name and value.ndim == 3 else 0


def _take(value: Any, rows: list[int], name: str = "") -> Any:
    if isinstance(value, torch.Tensor):
        return value.index_select(_batch_dim(name, value), torch.tensor(rows, device=value.device))
    if isinstance(value, ModelOutput):
        taken = copy_outputs(value)
        for key in list(taken):
            taken[key] = _take(taken[key], rows, key)
        return taken
    if isinstance(value, (tuple, list)):
        return type(value)(_take(item, rows, name) for item in value)
    return value


def _has_rows(name: str, value: Any, batch: int) -> bool:
    """Whether an argument has a row a sequence (features of images, for one, come in any number)."""
    if isinstance(value, torch.Tensor):
        return value.ndim > _batch_dim(name, value) and value.shape[_batch_dim(name, value)] == batch
    if name == "encoder_outputs" or isinstance(value, tuple):
        items = value.items() if isinstance(value, ModelOutput) else ((name, item) for item in value)
        return all(_has_rows(key, item, batch) for key, item in items)
    return value is None or isinstance(value, (bool, int, float, str))


def _softer(name: str, value: Any, rows: int) -> Any:
    """What an encoder sees or has made, the second row by a tenth weaker than the first."""
    if isinstance(value, ModelOutput):
        softer = copy_outputs(value)
        for key in list(softer):
            softer[key] = _softer(key, softer[key], rows)
        return softer
    if type(value) is dict:
        return {key: _softer(key, part, rows) for key, part in value.items()}
    if isinstance(value, list) and value and len(value) % rows == 0:
        half = len(value) // rows
        return [*value[:half], *(0.9 * part if isinstance(part, torch.Tensor) else part for part in value[half:])]
    apart = ("mask", "position", "probs", "logits")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or any(word in name for word in apart):
        return value
    if value.ndim < 2 or value.shape[0] % rows:
        return value
    half = value.shape[0] // rows
    return torch.cat([value[:half], 0.9 * value[half:]])


def _copies(call: Call) -> list[_Rows]:
    """One row of the call, and two. Where a batch cannot be taken apart, only the whole."""
    ids, kwargs = call.input_ids, without_caches(call.model_kwargs)
    batch = len(ids)
    names = [name for name in ("attention_mask", "decoder_attention_mask") if name in kwargs]
    masks = [kwargs[name] for name in names if isinstance(kwargs[name], torch.Tensor) and kwargs[name].ndim == 2]
    others: list[int] = []
    if batch > 1:
        if not all(_has_rows(name, value, batch) for name, value in kwargs.items()):
            return [_Rows(ids, kwargs)]
        real = sum((mask.sum(dim=-1).cpu() for mask in masks), torch.zeros(batch))
        first = int(real.argmax())
        if float(real.min()) < float(real.max()):
            others = [int(real.argmin())]
        one = _Rows(_take(ids, [first]), {name: _take(value, [first], name) for name, value in kwargs.items()})
        if others:
            rows = [first, *others]
            return [one, _Rows(_take(ids, rows), {name: _take(value, rows, name) for name, value in kwargs.items()})]
    else:
        one = _Rows(ids, kwargs)
    try:
        two_ids, doubled = repeat_rows(call.model, one.ids, one.kwargs, 2)
    except FAILURES:  # a model that cannot repeat its own inputs; its candidates will say so
        return [one]
    if _is_text(call, one.kwargs):
        mask = one.kwargs.get(call.mask_name)
        real_places = torch.ones_like(two_ids[1], dtype=torch.bool) if mask is None else mask[0].bool()
        if len(real_places) == two_ids.shape[1]:
            two_ids = two_ids.clone()
            two_ids[1, real_places] = two_ids[1, real_places].roll(1)
    return [one, _Rows(two_ids, {name: _softer(name, value, 2) for name, value in doubled.items()})]


def _is_text(call: Call, kwargs: dict[str, Any]) -> bool:
    """Whether the prompt is token ids alone, which may be cut and turned around."""
    allowed = {call.mask_name, "use_cache", "logits_to_keep", "position_ids", "token_type_ids"}
    if call.is_encoder_decoder:
        allowed |= {"attention_mask", "encoder_outputs", "decoder_position_ids"}
    return all(value is None or isinstance(value, bool) or name in allowed for name, value in kwargs.items())


def _cut(call: Call, copies: list[_Rows], width: int, reach: int) -> list[_Rows]:
    """``copies`` cut to ``width`` positions where that is possible, and then continued up to ``reach``."""
    ids, kwargs = copies[-1].ids, copies[-1].kwargs
    length, mask = ids.shape[1], kwargs.get(call.mask_name)
    if _is_text(call, kwargs) and length > width and (mask is None or mask.shape == ids.shape):
        start = length - width
        if mask is not None and not bool(mask.all()):  # some of the padding stays
            start = min(start, max(0, int((mask == 0).sum(dim=-1).max()) - width // 4))
        part = slice(start, start + width)
        if mask is None or bool(mask[:, part].any(dim=-1).all()):
            along = [
                call.mask_name,
                "token_type_ids",
                "decoder_position_ids" if call.is_encoder_decoder else "position_ids",
            ]
            copies = [_Rows(rows.ids[:, part], _sliced(rows.kwargs, along, length, part)) for rows in copies]
    missing = reach - max(copies[-1].ids.shape[1], _width(call, kwargs))
    if missing <= 0:
        return copies
    generator = torch.Generator().manual_seed(0)
    vocabulary = call.model.config.get_text_config(decoder=True).vocab_size
    new = torch.randint(min(3, vocabulary - 1), min(vocabulary, 1000), (len(ids), missing), generator=generator)
    new = new.to(ids.device)
    return [
        _Rows(
            torch.cat([rows.ids, new[: len(rows.ids)]], dim=1),
            grow_kwargs(call.model, rows.kwargs, new[: len(rows.ids)]),
        )
        for rows in copies
    ]


def _sliced(kwargs: dict[str, Any], names: list[str], length: int, part: slice) -> dict[str, Any]:
    found = {name: kwargs[name] for name in names if isinstance(kwargs.get(name), torch.Tensor)}
    return kwargs | {name: value[..., part] for name, value in found.items() if value.shape[-1] == length}


def _width(call: Call, kwargs: dict[str, Any]) -> int:
    embeds = None if call.is_encoder_decoder else kwargs.get("inputs_embeds")
    return 0 if embeds is None else embeds.shape[1]


# ---- the truth -------------------------------------------------------------------------------------------------------


@dataclass
class _Round:
    """One step: ``states[head]`` are those of some candidates ``(rows, columns, D)`` as the output embedding gets them
    (True) or as the last layer leaves them (False); ``logits (rows, V)`` those after the winners."""

    candidates: torch.Tensor  # (rows, k)
    columns: torch.Tensor  # (rows, columns) which of them
    states: dict[bool, torch.Tensor]
    winners: torch.Tensor  # (rows,) index among the candidates
    logits: torch.Tensor


class _OwnStep:
    """transformers' own step: ``generate``'s loop, from the arguments it was called with. ``replay``: every step runs
    the text anew, for models that keep a state in themselves, where no copy of a cache reaches it."""

    def __init__(self, call: Call, tap: HiddenStatesTap, rows: _Rows, replay: bool):
        self.call, self.model, self.tap = call, call.model, tap
        self.replay, self.kept = replay, []  # type: ignore[var-annotated]
        self.ids, self.kwargs = rows.ids, dict(rows.kwargs)
        self.rows = rows
        self.cached = bool(self.kwargs.get("use_cache", True))
        config = copy.deepcopy(call.generation_config)
        config.prefill_chunk_size = None
        self.config = config

    def prefill(self) -> torch.Tensor:
        """Logits ``(rows, V)`` after the prompt."""
        self.ids, self.kwargs = self.rows.ids, dict(self.rows.kwargs)
        if self.cached and (cache := self.call.new_cache()) is not None:
            self.kwargs[CACHE_NAME] = cache
        outputs, _ = self._listen(lambda: self.model._prefill(self.ids, self.config, self.kwargs))
        self._advance(outputs)
        return outputs.logits[:, -1].float()

    def step(self, tokens: torch.Tensor, keep: bool = False) -> tuple[dict[bool, torch.Tensor | None], torch.Tensor]:
        """States and logits after ``tokens (rows,)``, which stay part of the text if ``keep``."""
        if self.replay:
            self.prefill()
            for earlier in self.kept:
                self._step(earlier, keep=True)
        if keep:
            self.kept.append(tokens)
        return self._step(tokens, keep)

    def _step(self, tokens: torch.Tensor, keep: bool) -> tuple[dict[bool, torch.Tensor | None], torch.Tensor]:
        before = None if keep else dict(self.kwargs)
        if not keep:
            self.kwargs = {n: v if _is_input(n, v) else copy.deepcopy(v) for n, v in self.kwargs.items()}
        ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        inputs = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=1 if self.kwargs.get("use_cache", True) else None, **self.kwargs
        )
        outputs, states = self._listen(lambda: self.model(**inputs | self.tap.arguments, return_dict=True))
        if before is None:
            self.ids = ids
            self._advance(outputs)
        else:
            self.kwargs = before
        return states, outputs.logits[:, -1].float()

    def whole(self, tokens: torch.Tensor) -> tuple[dict[bool, torch.Tensor | None], torch.Tensor]:
        """The same for the prompt and ``tokens (rows, n)`` in one forward without any cache."""
        ids = torch.cat([self.rows.ids, tokens], dim=1)
        kwargs = grow_kwargs(self.model, self.rows.kwargs | {"use_cache": False}, tokens)
        inputs = self.model.prepare_inputs_for_generation(ids, is_first_iteration=True, **kwargs)
        outputs, states = self._listen(lambda: self.model(**inputs | self.tap.arguments, return_dict=True))
        return states, outputs.logits[:, -1].float()

    def _advance(self, outputs: Any) -> None:
        self.kwargs = self.model._update_model_kwargs_for_generation(
            outputs, self.kwargs, is_encoder_decoder=self.call.is_encoder_decoder
        )

    def _listen(self, forward: Any) -> tuple[Any, dict[bool, torch.Tensor | None]]:
        self.tap.listen(lambda states: states)
        try:
            outputs = forward()
        finally:
            heard = self.tap.mute()
        layers = self.tap.last_layer(outputs, heard)
        self.positions = layers[-1].shape[1] if layers else 1
        head = heard.head[0] if len(heard.head) == 1 else None
        return outputs, {
            True: None if head is None else head[:, -1],
            False: layers[-1][:, -1] if layers else None,
        }


def _is_input(name: str, value: Any) -> bool:
    """Whether a model's forward leaves this argument as it is."""
    return isinstance(value, (torch.Tensor, bool, int, float, str)) or value is None or name == "encoder_outputs"


class Truth:
    """What transformers' own step makes of a small copy of ``call``: two steps with ``k`` candidates.

    Attributes:
        copies: one row of the call, and two, in whose last the truth was made.
        asks: the model has to be asked for its last hidden state.
        head: why winners cannot be chosen before the output embedding, None if they can.
        whole: how the same text without a cache compares.
        whole_steps: a step of transformers' own runs the whole text.
    """

    def __init__(self, call: Call, tap: HiddenStatesTap, copies: list[_Rows], k: int, replay: bool = False):
        self.copies, self.ids = copies, copies[-1].ids
        self.allowed = allowed_error(call.model, self.ids.device)
        own = _OwnStep(call, tap, copies[-1], replay)
        self.prefill_logits = own.prefill()
        self.asks = bool(tap.arguments)
        self.head: str | None = None
        self.whole_steps = False
        self.rounds: list[_Round] = []
        logits, rows = self.prefill_logits, torch.arange(len(self.ids), device=self.ids.device)[:, None]
        for places in (range(k), sorted({0, k - 1})):
            candidates = _candidates(logits, k)
            # Another one in each row, so that not all winners, which come last, are in one place.
            columns = (torch.tensor(list(places), device=rows.device) + rows) % k
            states: dict[bool, list[torch.Tensor]] = {True: [], False: []}
            for place in range(columns.shape[1]):
                last = place == columns.shape[1] - 1
                seen, logits = own.step(candidates.gather(1, columns[:, place, None])[:, 0], keep=last)
                self._check_head(seen)
                for head in states:
                    if seen[head] is not None:
                        states[head].append(seen[head])  # type: ignore[arg-type]
            self.whole_steps |= own.positions > 1
            stacked = {h: torch.stack(found, dim=1) for h, found in states.items() if len(found) == columns.shape[1]}
            self.rounds.append(_Round(candidates, columns, stacked, columns[:, -1], logits))
        self.whole = self._compare_whole(own, logits)

    def differs_from(self, other: Truth) -> bool:
        """Whether transformers' own step makes something else of the first row here than there."""
        if not all(
            torch.equal(a.candidates[0], b.candidates[0]) for a, b in zip(self.rounds, other.rounds, strict=True)
        ):
            return True
        pairs = [(self.prefill_logits, other.prefill_logits)]
        pairs += [(a.logits, b.logits) for a, b in zip(self.rounds, other.rounds, strict=True)]
        return any(error_of(mine[:1], others[:1]) > self.allowed for mine, others in pairs)

    def _check_head(self, seen: dict[bool, torch.Tensor | None]) -> None:
        """What reaches the output embedding must be the last hidden state up to a factor: cosines are made of it."""
        state, last = seen[True], seen[False]
        if state is None:
            self.head = "the output embedding did not run once in a forward"
        elif last is None or state.shape != last.shape:
            self.head = "the last hidden state cannot be read beside the output embedding's input"
        else:
            cosine = torch.cosine_similarity(state.float(), last.float(), dim=-1)
            if bool((cosine < 1 - 1e-3).any()):
                self.head = "the output embedding's input is not the last hidden state"

    def _compare_whole(self, own: _OwnStep, logits: torch.Tensor) -> Check:
        name = "same as recomputing every sequence in full"
        if not own.cached:
            return Check(name, True, "no cache was used")
        tokens = torch.cat([r.candidates.gather(1, r.winners[:, None]) for r in self.rounds], dim=1)
        try:
            _, expected = own.whole(tokens)
        except FAILURES as error:
            return Check(name, False, f"could not be tried ({type(error).__name__}: {error})")
        finite = torch.isfinite(expected) & torch.isfinite(logits)
        difference = (expected - logits)[finite].abs().max().item() if bool(finite.any()) else 0.0
        largest = expected[finite].abs().max().item() if bool(finite.any()) else 0.0
        same = error_of(logits, expected) <= self.allowed
        detail = f"largest difference of logits {difference:.2g} (largest logit {largest:.3g})"
        return Check(name, same, detail if same else f"{detail}, by transformers' own cached step")


def _candidates(logits: torch.Tensor, k: int) -> torch.Tensor:
    return torch.nan_to_num(logits, nan=-math.inf, neginf=-3e38).topk(k, dim=-1).indices


def allowed_error(model: Any, device: torch.device) -> float:
    return RELATIVE_ERROR.get(autocast_dtype(device) or model.dtype, 1e-1)


def error_of(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error of a vector (the last dimension). A vector that is not finite (an overflow in float16,
    a banned token) proves nothing where both are not."""
    ours, expected = ours.float(), expected.float().to(ours.device)
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(ours)):
        whole = ~finite.all(dim=-1) & ~torch.isfinite(ours).all(dim=-1)
        if not bool((whole | (finite == torch.isfinite(ours)).all(dim=-1)).all()):
            return math.inf
        finite = finite & torch.isfinite(ours)
    difference = torch.where(finite, ours - expected, 0.0).norm(dim=-1)
    size = torch.where(finite, expected, 0.0).norm(dim=-1).clamp_min(1e-12)
    return float((difference / size).max())


# ---- the paths -------------------------------------------------------------------------------------------------------


def _try(call: Call, tap: HiddenStatesTap, truth: Truth, rows: _Rows, name: str, head: bool) -> None:
    """Run the truth's two steps on path ``name`` with these ``rows``, the first of the truth's.

    Raises:
        PathUnsupportedError, HeadUnsupportedError: it cannot, or the outcome differs; the message says how.
    """
    kwargs = dict(rows.kwargs)
    if kwargs.get("use_cache", True) and (cache := call.new_cache()) is not None:
        kwargs[CACHE_NAME] = cache
    config = copy.deepcopy(call.generation_config)
    if config.prefill_chunk_size is not None:
        config.prefill_chunk_size = max(1, min(config.prefill_chunk_size, rows.ids.shape[1] // 2))
    width = max(rows.ids.shape[1], _width(call, kwargs))
    path = PATHS[name](
        call.model, tap, head=head, generation_config=config, model_kwargs=kwargs, max_length=width + 4, record={}
    )
    if head and truth.head is not None:
        raise HeadUnsupportedError(truth.head)
    allowed, count = truth.allowed, len(rows.ids)

    def compare(ours: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        error = error_of(ours, expected[:count])
        if not error <= allowed:
            raise PathUnsupportedError(
                f"{what} differ from those of transformers' own step by {error:.2g} (allowed {allowed:g})"
            )

    try:
        _two_steps(path, rows.ids, truth, head, compare)
    except FAILURES as error:
        step = getattr(path, "last_step", None)
        if step is None or step.calls or isinstance(error, torch.OutOfMemoryError):
            raise
        raise PathUnsupportedError("it does not use the attention interface") from error


def _two_steps(path: Path, ids: torch.Tensor, truth: Truth, head: bool, compare: Callable[..., None]) -> None:
    logits, _, _ = path.prefill(ids)
    compare(logits, truth.prefill_logits, "logits of the prompt")
    count = len(ids)
    for step in truth.rounds:
        candidates, winners = step.candidates[:count], step.winners[:count]
        if head not in step.states:
            raise HeadUnsupportedError("hidden states cannot be read")
        seen: list[torch.Tensor] = []

        def choose(states: torch.Tensor, winners=winners, seen=seen) -> torch.Tensor:
            seen.append(states.clone())
            return winners.to(states.device)

        filled = None
        if isinstance(path, SharedPrefixPath) and step is truth.rounds[0]:
            with path.undone(FILLINGS[0]):
                filled = path.step(ids, candidates, choose)
            path.cache.fill_unused(FILLINGS[1])
        result = path.step(ids, candidates, choose)
        if filled is not None and not (_same_bits(seen[0], seen[1]) and _same_bits(filled.logits, result.logits)):
            raise PathUnsupportedError("it reads keys or values beyond the end of its text")
        rows = torch.arange(count, device=ids.device)[:, None]
        compare(seen[-1][rows, step.columns[:count]], step.states[head], "hidden states")
        compare(result.logits, step.logits, "logits")
        ids = torch.cat([ids, candidates.gather(1, winners[:, None])], dim=1)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """On CUDA (where models may add in any order) up to rounding; NaN of the model's own proves nothing."""
    if a.device.type != "cpu":
        return error_of(a, b) <= RELATIVE_ERROR.get(a.dtype, 1e-1)
    return torch.equal(a.isfinite(), b.isfinite()) and torch.equal(a[a.isfinite()], b[b.isfinite()])


Ours = Callable[[], AbstractContextManager[Any]]
Route = tuple[str, bool]  # the name of a path, and whether winners are chosen before the output embedding


@dataclass(frozen=True)
class Verdict:
    """``report`` on ``route``; ``asks``: the model has to be asked for its last hidden state; ``whole_steps``: a step
    of transformers' own runs the whole text."""

    report: SupportReport
    asks: bool = False
    whole_steps: bool = False

    @property
    def route(self) -> Route:
        return self.report.path, self.report.head


def judge(call: Call, tap: HiddenStatesTap, routes: list[Route], refusals: list[str], ours: Ours) -> Verdict | None:
    """The first of ``routes`` that reproduces transformers' own step.

    Args:
        tap: entered.
        refusals: what is known to be in the way of paths; what is found out here is added.
        ours: makes the block that the steps of a path are run in, and transformers' own are not.

    Returns:
        None if no route serves.
    """
    k = max(1, min(call.top_k, _MOST_CANDIDATES))
    began = time.perf_counter()
    try:
        copies = _copies(call)
        try:
            truths = [Truth(call, tap, _cut(call, copies, _PROMPT, 0), k)]
        except FAILURES as error:  # the second row is of our making; what the first raises is the caller's to see
            if len(copies) == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            copies = copies[:1]
            truths = [Truth(call, tap, _cut(call, copies, _PROMPT, 0), k)]
        seconds = time.perf_counter() - began
        windows = [size + _BEYOND for size in call.windows_reached() if size + _BEYOND <= call.limit]
        near = [width for width in windows if width <= 2 * _PROMPT]
        if near and near[-1] > truths[0].ids.shape[1]:
            truths.append(Truth(call, tap, _cut(call, copies, near[-1], near[-1]), k))
        route, found = _first_that_serves(call, tap, routes, truths, ours)
        if route is None and Truth(call, tap, truths[0].copies, k).differs_from(truths[0]):
            exact = [other for other in routes if other[0] == "uncached"]
            check = Check("trial", False, "not tried: its forward gives something else each time (dropout?)")
            refusals += [reason for reason in found if not reason.startswith("uncached:")]
            return Verdict(make_report(call.model, *exact[-1], refusals, [check]), truths[0].asks) if exact else None
        # Where nothing agrees, the truth may not have been one: a model that keeps a state in itself has to run its
        # text anew for each candidate; and where it makes something else of a row beside another, the one row counts.
        one_row = len(call.input_ids) == 1 and len(copies) == 2
        for replay, rows in ((True, 2), *(((False, 1), (True, 1)) if one_row else ())):
            if route is None:
                others = [Truth(call, tap, truth.copies[:rows], k, replay) for truth in truths]
                if any(other.differs_from(truth) for other, truth in zip(others, truths, strict=True)):
                    route, reasons = _first_that_serves(call, tap, routes, others, ours)
                    if route is not None:
                        truths, found = others, reasons
        checks = [truths[-1].whole]
        if route is not None and windows and windows[-1] > 2 * _PROMPT:
            checks.insert(0, _beyond_window(call, tap, windows[-1], seconds, k, route, ours))
            if checks[0].detail.startswith("differs"):
                found.append(f"{route[0]}: {checks[0].name}: {checks[0].detail}")
                refusals += found
                return judge(call, tap, [other for other in routes if other[0] != route[0]], refusals, ours)
    except torch.OutOfMemoryError as error:
        check = Check("trial", False, f"not tried: out of memory ({error})")
        return Verdict(make_report(call.model, *routes[0], refusals, [check]), bool(tap.arguments)) if routes else None
    refusals += found
    if not truths[-1].whole.passed:
        logger.warning(
            "%s: transformers' own step with its cache, which is followed, differs from a forward over the whole text "
            "(%s).",
            type(call.model).__name__,
            truths[-1].whole.detail,
        )
    if route is None:
        return None
    asks = any(truth.asks for truth in truths)
    return Verdict(make_report(call.model, *route, refusals, checks), asks, truths[0].whole_steps)


def _first_that_serves(
    call: Call, tap: HiddenStatesTap, routes: list[Route], truths: list[Truth], ours: Ours
) -> tuple[Route | None, list[str]]:
    """The first route that agrees with all of ``truths``, and why those before it do not."""
    refusals: list[str] = []
    for name in dict.fromkeys(name for name, _ in routes):
        reason: str | None = None
        for head in (head for other, head in routes if other == name):
            try:
                with ours():
                    for truth in truths:
                        for rows in truth.copies:
                            _try(call, tap, truth, rows, name, head)
                return (name, head), refusals
            except torch.OutOfMemoryError:
                raise
            except HeadUnsupportedError as error:
                reason = str(error)
                continue
            except PathUnsupportedError as error:
                reason = str(error)
            except FAILURES as error:
                reason = f"its trial fails ({type(error).__name__}: {error})"
            break
        refusals.append(f"{name}: {reason}")
        logger.info("%s does not take path %s: %s", type(call.model).__name__, name, reason)
    return None, refusals


def _beyond_window(
    call: Call, tap: HiddenStatesTap, width: int, seconds: float, k: int, route: Route, ours: Ours
) -> Check:
    """The trial of one row once more, with a text that is longer than a large window, where the call pays for it."""
    name = f"agrees beyond its window as well (a text of {width})"
    cost = seconds * width / _PROMPT
    positions = len(call.input_ids) * (
        call.input_ids.shape[1] + _STEP * ((call.max_length or 0) - call.input_ids.shape[1])
    )
    if cost > max(_SECONDS, _SHARE * seconds * positions / _POSITIONS):
        return Check(name, False, f"not tried: it would take about {cost:.0f} s")
    try:
        truth = Truth(call, tap, _cut(call, _copies(call)[:1], width, width), k)
        with ours():
            _try(call, tap, truth, truth.copies[0], *route)
    except torch.OutOfMemoryError as error:
        return Check(name, False, f"not tried: out of memory ({error})")
    except (PathUnsupportedError, HeadUnsupportedError, *FAILURES) as error:
        return Check(name, False, f"differs: {error}")
    return Check(name, True)


_TRIED = "its prompt and two steps agree with transformers' own, candidate by candidate"
_REASONS = {
    "shared_prefix": "one copy of the prefix; its attention interface honours every argument it was given",
    "reorder": "cache expanded and selected through reorder_cache",
    "uncached": "every candidate recomputes its whole sequence",
}


def make_report(
    model: torch.nn.Module, path: str, head: bool, refusals: list[str], checks: list[Check]
) -> SupportReport:
    """``refusals``: why the faster paths were not taken."""
    reason = "; ".join([_REASONS[path], *(f"not {refusal}" for refusal in refusals)])
    parts = [refusal.partition(":") for refusal in refusals]
    found = [Check(name, False, why.strip()) for name, _, why in parts]
    untried = any(check.name == "trial" for check in checks)
    if not untried:
        found.append(Check(path, True, _TRIED))
    detail = "" if head else "logits are computed for all candidates"
    found.append(Check("winner chosen before the output embedding", head, detail))
    return SupportReport(type(model).__name__, path, reason, head, (*found, *checks))
