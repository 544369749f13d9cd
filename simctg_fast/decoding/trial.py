"""Which path serves a call, found out on a small copy of it before the call itself begins.

The truth is what ``generate`` means: transformers' own step, from the caller's arguments, over a cache that the model
makes for itself and with nothing of ours in place. A path has to reproduce its logits of the prompt and, over two
steps, the hidden state of every candidate and the winners' logits: of one row for a call of one, of two for any other.
Keys and values beyond the text hold large numbers meanwhile, in two versions that must give the same bits: who reads
them is found out.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .caches import CACHE_NAME
from .call import Call, copy_of, cut, learned_prompt, width_of
from .decoder import Decoder
from .hidden_states import HiddenStatesTap
from .own_step import allowed_for_noise, error_of, most_noise
from .reorder import ReorderDecoder, UncachedDecoder
from .report import Check, SupportReport, refused_checks
from .slots_decoder import SlotsDecoder
from .truth import RELATIVE_ERROR, Truth, sensitivity
from .unsupported import FAILURES, UnsupportedError

logger = logging.getLogger("simctg_fast")

# From the fastest to the most general.
DECODERS: dict[str, type[Decoder]] = {kind.name: kind for kind in (SlotsDecoder, ReorderDecoder, UncachedDecoder)}
FILLINGS = (3e3, -7e3)

_PROMPT = 24  # positions of the prompt that are tried, where nothing asks for more
_BEYOND = 8  # positions of a text that is to be longer than a window
_MOST_CANDIDATES = 8
# A trial past a large window may take so long, or this share of the call: a token costs as much as a dozen positions of
# a prompt, and a trial's truth as some four hundred.
_SECONDS, _SHARE, _STEP, _POSITIONS = 1.0, 0.1, 12, 400


def check_close(what: str, ours: torch.Tensor, expected: torch.Tensor, allowed: float) -> None:
    """Raise UnsupportedError unless the relative error of ``ours`` is ``allowed``."""
    error = error_of(ours, expected)
    if not error <= allowed:
        raise UnsupportedError(
            f"{what} differ from those of transformers' own step by {error:.2g} (allowed {allowed:.2g})", error=error
        )


def _try(tap: HiddenStatesTap, truth: Truth, name: str, head: bool) -> None:
    """Run the truth's two steps by the decoder ``name``.

    Raises:
        UnsupportedError: it cannot, or the outcome differs; the message says how.
    """
    call, ids, kwargs = truth.call, truth.ids, dict(truth.own_step.rows.kwargs)
    if kwargs.get("use_cache", True) and (cache := call.new_cache()) is not None:
        kwargs[CACHE_NAME] = cache
    config = copy.deepcopy(call.generation_config)
    if config.prefill_chunk_size is not None:
        config.prefill_chunk_size = max(1, min(config.prefill_chunk_size, ids.shape[1] // 2))
    width = max(ids.shape[1], width_of(call, kwargs))
    decoder = DECODERS[name](
        call.model, tap, head=head, generation_config=config, model_kwargs=kwargs, max_length=width + 4, record={}
    )
    if head and truth.head is not None:
        raise UnsupportedError(truth.head, head=True)

    try:
        _two_steps(decoder, truth, head)
    except FAILURES as error:
        step = decoder.forward if isinstance(decoder, SlotsDecoder) else None
        if step is None or step.was_used is not False or isinstance(error, torch.OutOfMemoryError):
            raise
        raise UnsupportedError("it does not use the attention interface") from error
    if isinstance(decoder, UncachedDecoder) and truth.sees_ahead():
        raise UnsupportedError(
            "in a whole text its positions see later ones, which transformers' own cached step does not let them"
        )


def _two_steps(decoder: Decoder, truth: Truth, head: bool) -> None:
    ids = truth.ids
    logits, _, _ = decoder.prefill(ids)
    check_close("logits of the prompt", logits, truth.prefill_logits, truth.allowed)
    for step in truth.rounds:
        candidates, winners = step.candidates, step.winners
        if head not in step.states:
            raise UnsupportedError("hidden states cannot be read", head=True)
        seen: list[torch.Tensor] = []

        def choose(states: torch.Tensor, winners=winners, seen=seen) -> torch.Tensor:
            seen.append(states.clone())
            return winners.to(states.device)

        filled = None
        if isinstance(decoder, SlotsDecoder) and step is truth.rounds[0]:
            with decoder.undone(FILLINGS[0]):
                filled = decoder.step(ids, candidates, choose)
            decoder.slots.fill_unused(FILLINGS[1])
        result = decoder.step(ids, candidates, choose)
        if filled is not None and not (_same_bits(seen[0], seen[1]) and _same_bits(filled.logits, result.logits)):
            raise UnsupportedError("it reads keys or values beyond the end of its text")
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        check_close("hidden states", seen[-1][rows, step.columns], step.states[head], truth.allowed)
        check_close("logits", result.logits, step.logits, truth.allowed)
        ids = torch.cat([ids, result.tokens[:, None]], dim=1)


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


@dataclass
class _Outcome:
    """``route``: the first that serves, if any; why those before it do not; how near the nearest of them comes."""

    route: Route | None = None
    refusals: list[str] = field(default_factory=list)
    nearest: float = math.inf


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
    began, checks = time.perf_counter(), []
    try:
        if learned_prompt(call.model) is not None:
            reached = _with_learned_prompt(call, tap, k, refusals)
            if reached is None:
                return None
            call = reached
        truths = _truths(call, tap, k)
        seconds = time.perf_counter() - began
        found = _first_that_serves(call, tap, routes, truths, ours)
        if found.route is None and truths[0].again(tap, k).differs_from(truths[0]):
            trains = any(module.training for module in call.model.modules())
            exact = [route for route in routes if route[0] == "uncached" and trains]
            refusals += [reason for reason in found.refusals if not (exact and reason.startswith("uncached:"))]
            detail = "its forward gives something else each time"
            if not exact:
                refusals.append(f"trial: {detail}")
                return None
            check = Check("trial", False, f"not tried: {detail} (model.eval() ends dropout)")
            return Verdict(make_report(call.model, *exact[-1], refusals, [check]), truths[0].asks)
        if found.route is None:
            # A model that keeps a state in itself has to run its text anew for each candidate.
            replayed = [truth.again(tap, k, replay=True) for truth in truths]
            if any(other.differs_from(truth) for other, truth in zip(replayed, truths, strict=True)):
                truths, found = replayed, _first_that_serves(call, tap, routes, replayed, ours)
        # Perhaps no fault but noise: 8-bit activations make much of little.
        if found.nearest <= most_noise(truths[0].allowed):
            moved = sensitivity(truths[0], tap, k)
            allowed = allowed_for_noise(moved, truths[0].allowed)
            if allowed > max(found.nearest, truths[0].allowed):
                detail = f"noise moves its own logits by {moved:.2g}; allowed {allowed:.2g}"
                checks.append(Check("agrees within what the model makes of rounding", True, detail))
                for truth in truths:
                    truth.allowed = allowed
                found = _first_that_serves(call, tap, routes, truths, ours)
        route = found.route
        checks.append(truths[-1].compare_whole())
        windows = _windows(call)
        if route is not None and windows and windows[-1] > 2 * _PROMPT:
            beyond = _beyond_window(call, tap, windows[-1], seconds, k, route, ours, truths[0].allowed)
            checks.insert(0, beyond)
            if beyond.detail.startswith("differs"):
                refusals += [*found.refusals, f"{route[0]}: {beyond.name}: {beyond.detail}"]
                return judge(call, tap, [other for other in routes if other[0] != route[0]], refusals, ours)
    except torch.OutOfMemoryError as error:
        check = Check("trial", False, f"not tried: out of memory ({error})")
        return Verdict(make_report(call.model, *routes[0], refusals, [check]), bool(tap.arguments)) if routes else None
    refusals += found.refusals
    if not checks[-1].passed:
        logger.warning(
            "%s: transformers' own step with its cache, which is followed, differs from a forward over the whole text "
            "(%s).",
            type(call.model).__name__,
            checks[-1].detail,
        )
    if route is None:
        return None
    asks = any(truth.asks for truth in truths)
    return Verdict(make_report(call.model, *route, refusals, checks), asks, truths[0].whole_steps)


def _windows(call: Call) -> list[int]:
    """Lengths of texts that reach beyond the call's windows."""
    return [size + _BEYOND for size in call.windows_reached() if size + _BEYOND <= call.limit]


def _truths(call: Call, tap: HiddenStatesTap, k: int) -> list[Truth]:
    """What transformers' own step makes of a small copy of the call, and of one beyond a small window."""
    rows = copy_of(call)
    truths = [Truth(call, tap, cut(call, rows, _PROMPT, 0), k)]
    near = [width for width in _windows(call) if width <= 2 * _PROMPT]
    if near and near[-1] > truths[0].ids.shape[1]:
        truths.append(Truth(call, tap, cut(call, rows, near[-1], near[-1]), k))
    return truths


def _with_learned_prompt(call: Call, tap: HiddenStatesTap, k: int, refusals: list[str]) -> Call | None:
    """The call as a prompt that PEFT has learned reaches the model: with a cache, or without; None if in neither way.
    PEFT's own forward says what it does."""
    wrapper = learned_prompt(call.model)
    reason = ""
    for use_cache in (True, False):
        if use_cache and call.model_kwargs.get("use_cache") is False:
            continue
        tried = replace(call, model_kwargs=call.model_kwargs | {"use_cache": use_cache})
        try:
            truth = Truth(tried, tap, cut(tried, copy_of(tried), _PROMPT, 0), k)
            error = truth.compare_learned_prompt(wrapper)
            if error <= truth.allowed:
                return tried
            what = f"logits differ by {error:.2g}"
        except FAILURES as failure:
            what = f"{type(failure).__name__}: {failure}"
        how = "with" if use_cache else "without"
        reason = (
            reason or f"the prompt that PEFT has learned does not reach it {how} a cache as in its forward ({what})"
        )
    refusals.append(f"{type(wrapper).__name__}: {reason}")
    return None


def _first_that_serves(
    call: Call, tap: HiddenStatesTap, routes: list[Route], truths: list[Truth], ours: Ours
) -> _Outcome:
    """The first route that agrees with all of ``truths``."""
    outcome = _Outcome()
    for name in dict.fromkeys(name for name, _ in routes):
        reason: str | None = None
        for head in (head for other, head in routes if other == name):
            try:
                with ours():
                    for truth in truths:
                        _try(tap, truth, name, head)
                outcome.route = (name, head)
                return outcome
            except torch.OutOfMemoryError:
                raise
            except UnsupportedError as error:
                reason = str(error)
                if error.head:
                    continue
                outcome.nearest = min(outcome.nearest, error.error)
            except FAILURES as error:
                reason = f"its trial fails ({type(error).__name__}: {error})"
            break
        outcome.refusals.append(f"{name}: {reason}")
        logger.info("%s does not take path %s: %s", type(call.model).__name__, name, reason)
    return outcome


def _beyond_window(
    call: Call, tap: HiddenStatesTap, width: int, seconds: float, k: int, route: Route, ours: Ours, allowed: float
) -> Check:
    """The trial once more, with a text that is longer than a large window, where the call pays for it."""
    name = f"agrees beyond its window as well (a text of {width})"
    cost = seconds * width / _PROMPT
    positions = len(call.input_ids) * (
        call.input_ids.shape[1] + _STEP * ((call.max_length or 0) - call.input_ids.shape[1])
    )
    if cost > max(_SECONDS, _SHARE * seconds * positions / _POSITIONS):
        return Check(name, False, f"not tried: it would take about {cost:.0f} s")
    try:
        truth = Truth(call, tap, cut(call, copy_of(call), width, width), k)
        truth.allowed = allowed
        with ours():
            _try(tap, truth, *route)
    except torch.OutOfMemoryError as error:
        return Check(name, False, f"not tried: out of memory ({error})")
    except (UnsupportedError, *FAILURES) as error:
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
    found = refused_checks(refusals)
    untried = any(check.name == "trial" for check in checks)
    if not untried:
        found.append(Check(path, True, _TRIED))
    detail = "" if head else "logits are computed for all candidates"
    found.append(Check("winner chosen before the output embedding", head, detail))
    return SupportReport(type(model).__name__, path, reason, head, (*found, *checks))
