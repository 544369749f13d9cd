"""Every strategy on one class: the tokens of its naive search in `reference/`, asked of transformers' own step."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from simctg_fast.reference.adaptive import adaptive_contrastive_search
from simctg_fast.reference.centered import centered_penalty
from simctg_fast.reference.contrastive_search import contrastive_search
from simctg_fast.reference.dry import dry_penalties
from simctg_fast.reference.fsd import fsd
from simctg_fast.reference.guard import guard
from simctg_fast.reference.one_text import Text

from . import build, classes, judge, rounding, run
from .own_step import OwnStep

NEW_TOKENS = 10
CLEAR = 2e-5  # a choice that is less clear than this may be another's in float32
_TIMES = 30  # or than so many times the error of transformers' own step in float32
_DRY = {"multiplier": 3.0, "base": 1.75, "allowed_length": 1}
_REPEATED = (0, 1, 2, 3, 0, 1, 4, 0, 1, 2, 0)  # places of the prompt's tokens


def _centered(model: Any, ids: list[int], *, processor: Any, max_new_tokens: int) -> Text:
    settings = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": max_new_tokens, "penalty": centered_penalty}
    out = contrastive_search(model, torch.tensor([ids]), logits_processor=processor, **settings)
    margins = [float(torch.minimum(step.score_margin, step.candidate_margin)) for step in out.steps]
    return Text(model, out.sequences[0].tolist(), margins=margins)


def _dry(model: Any, ids: list[int], *, processor: Any, max_new_tokens: int) -> Text:
    def less(ids, logits):
        logits = processor(ids, logits)
        for token, penalty in dry_penalties(ids[0].tolist(), **_DRY).items():
            logits[0, token] -= penalty
        return logits

    # Of one token that is weighed, penalised or not, nothing is left to choose.
    greedy = {"kind": "ngram", "n": 1, "k": 1, "alpha": 0.0}
    return fsd(model, ids, processor=less, max_new_tokens=max_new_tokens, **greedy)


def searches() -> dict[str, tuple[Callable[[], dict[str, Any]], Callable[..., Text]]]:
    """By name: how ``generate`` is told, and the naive search."""
    from simctg_fast import FSD, GUARD, AdaptiveContrastiveSearch, ContrastiveSearch, DRYLogitsProcessor

    def dry() -> dict[str, Any]:
        processor = DRYLogitsProcessor(**_DRY, sequence_breakers=(), pad_token_id=0)
        return {"custom_generate": ContrastiveSearch(top_k=1), "logits_processor": [processor]}

    ngram, vector = {"n": 3, "k": 6, "alpha": 0.65}, {"n": 2, "k": 6, "alpha": 0.8}
    return {
        "fsd": (lambda: {"custom_generate": FSD(**ngram)}, partial(fsd, kind="ngram", **ngram)),
        "fsd-vec": (lambda: {"custom_generate": FSD("vector", **vector)}, partial(fsd, kind="vector", **vector)),
        "guard": (
            lambda: {"custom_generate": GUARD(3, 0.5, sample=False)},
            partial(guard, window=3, decay=0.5),
        ),
        "adaptive": (
            lambda: {"custom_generate": AdaptiveContrastiveSearch(8.0, (2, 7))},
            partial(adaptive_contrastive_search, q=8.0, k_range=(2, 7)),
        ),
        "center": (lambda: {"custom_generate": ContrastiveSearch(0.6, 4, center=True)}, _centered),
        "dry": (dry, _dry),
    }


NAMES = ("fsd", "fsd-vec", "guard", "adaptive", "center", "dry")
OF_STATES = ("fsd-vec", "adaptive", "center")


@run.quiet()
def one_class(name: str, strategies: tuple[str, ...]) -> dict[str, Any]:
    """The record of a class of decoders of text in float32; whatever goes wrong is part of it."""
    began = time.perf_counter()
    record: dict[str, Any] = {"class": name, "architecture": classes.generating_classes()[name][1], "path": ""}
    record |= {"status": "", "reason": "", "faults": [], "strategies": {}}
    try:
        cls = classes.find(name)
        if cls is None or not classes.enters_generate(cls):
            return record | {"status": "own loop" if cls is not None else "does not generate"}
        model = build.build(cls)
        run.settle(model)
    except Exception as error:
        return record | {"status": "not built", "reason": run.short(error)}
    if model.config.is_encoder_decoder or "text" not in run.inputs.kinds(model):
        return record | {"status": "no decoder of text"}
    given, problem = run.accepted_inputs(model, "text", 2)
    if given is None or not given.keys() >= {"input_ids", "attention_mask"}:
        return record | {"status": "not reached", "reason": problem}
    try:
        judged(model, *repeating(given), strategies, record)
    except Exception as error:
        record["faults"].append(f"the judge failed: {run.short(error)}")
    found = {each["status"] for each in record["strategies"].values()} | ({"fault"} if record["faults"] else set())
    record["status"] = record["status"] or next(s for s in ("fault", "refused", "rough", "agrees") if s in found)
    return record | {"seconds": round(time.perf_counter() - began, 1)}


def repeating(given: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """``given`` with prompts that repeat themselves, and a setting by which texts go on with their tokens alone: there
    is something to hold against a token."""
    ids, mask = given["input_ids"], given["attention_mask"]
    ids = ids.masked_fill(mask == 0, int(ids.max()))[:, list(_REPEATED)]
    others = sorted(set(range(build.VOCABULARY)) - set(ids.flatten().tolist()))
    return given | {"input_ids": ids.masked_fill(mask == 0, 0)}, {"suppress_tokens": others}


def judged(
    model: Any,
    given: dict[str, torch.Tensor],
    options: dict[str, Any],
    strategies: tuple[str, ...],
    record: dict[str, Any],
) -> None:
    """Fills ``record`` with what each strategy writes for the rows of ``given``, beside the truth; ``options``: of all
    calls of ``generate``."""
    from simctg_fast import support

    options = options | {"max_new_tokens": NEW_TOKENS, "do_sample": False}

    report = support(copy.deepcopy(model), given, top_k=judge.TOP_K)
    record |= {"path": report.path, "reason": report.reason}
    greedy = copy.deepcopy(model).generate(**given, **options)[:, -NEW_TOKENS:]
    double, wide = judge.double_of(model, given)
    try:
        truth = judge.trace(double, wide, greedy, scored=False)
    except Exception as error:
        record["truth"] = f"float32, because in float64 {run.short(error)}"
        double, wide = run.single_of(model, given)
        truth = judge.trace(double, wide, greedy, scored=False)
    own = judge.trace(copy.deepcopy(model), given, greedy, scored=False)
    record["own_error"] = judge.error(rounding.stacked(own), rounding.stacked(truth))
    calls, pairs = copy.deepcopy(model), searches()
    for name in strategies:
        made, naive = pairs[name]
        found: dict[str, Any] = {"status": "agrees", "near_ties": 0}
        record["strategies"][name] = found
        try:
            out = calls.generate(**given, **options, **made())[:, -NEW_TOKENS:]
        except Exception as error:
            ours = isinstance(error, ValueError) and run.is_ours(error)
            found |= {"status": "refused" if ours else "fault", "reason": run.short(error)}
            if not ours:
                record["faults"].append(f"{name}: raises {run.short(error)}")
            continue
        found["is_greedy"] = torch.equal(out, greedy)
        if record["own_error"] > run.ROUGH:
            found["status"] = "rough"
            continue
        clear = max(CLEAR, _TIMES * record["own_error"])
        for row, tokens in enumerate(out.tolist()):
            step = OwnStep(copy.deepcopy(double), wide, row, suppress_tokens=options["suppress_tokens"])
            ids = wide["input_ids"][row, wide["attention_mask"][row].bool()].tolist()
            if problem := unreadable(name, step, len(ids)):
                found |= {"status": "rough", "reason": problem}
                continue
            text = naive(step, ids, processor=step.processor, max_new_tokens=NEW_TOKENS)
            place = text.departure(tokens, len(ids))
            if place is None:
                continue
            if text.margins[place] < clear:
                found["near_ties"] += 1
                continue
            found["status"] = "fault"
            expected = text.ids[len(ids) :]
            clearly = f"clear by {text.margins[place]:.2g}, own error {record['own_error']:.1g}"
            record["faults"].append(f"{name}: row {row}, token {place}, {clearly}: {tokens}, must be {expected}")


def unreadable(name: str, step: OwnStep, tokens: int) -> str:
    """Why the naive search of this name cannot be asked; empty if it can."""
    positions = step.positions()
    if name in OF_STATES and not step.has_states:
        return "its last hidden states cannot be read"
    # XLM and its kin append a mask to the text.
    return (
        f"{positions} states of {tokens} tokens: which is whose?" if name == "fsd-vec" and positions != tokens else ""
    )


def summary(records: list[dict[str, Any]]) -> str:
    """One line a strategy: how many of the classes of decoders agree."""
    lines = []
    for name in NAMES:
        found = [r["strategies"][name] for r in records if name in r["strategies"]]
        counts = {s: sum(f["status"] == s for f in found) for s in ("agrees", "rough", "refused", "fault")}
        said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        ties, own = sum(f["near_ties"] for f in found), sum(not f.get("is_greedy", True) for f in found)
        if found:
            lines.append(f"{name}: {len(found)} classes: {said}; {ties} near ties; {own} are not greedy search's texts")
    return "\n".join(lines)
