"""One class, from its name to its record."""

from __future__ import annotations

import copy
import logging
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from . import build, classes, engine, inputs, judge, rounding

NEW_TOKENS = 8
PATHS = ("shared_prefix", "reorder", "uncached")
ROUGH = 0.02  # float32 alone is further from float64 than this: nothing can be told from tokens
_MARGIN = 30  # times the error of transformers' own step in float32
_DIFFERS = "differ from those of transformers' own step"
_NO_PROBABILITIES = re.compile(r"logits of row (\d+) left no probabilities at new token (\d+)")
_FOLLOWS_WHOLE = "path='uncached' follows the recomputed text, from which the class's own cached step departs"


@contextmanager
def quiet() -> Iterator[None]:
    """What models, transformers and this library say of themselves is not what is asked."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


@quiet()
def one_class(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The record of class ``name`` in ``dtype``; whatever goes wrong is part of it."""
    began = time.perf_counter()
    _, folder = classes.generating_classes()[name]
    record: dict[str, Any] = {
        "class": name,
        "architecture": folder,
        "status": "",
        "path": "",
        "reason": "",
        "faults": [],
    }
    try:
        cls = classes.find(name)
        if cls is None:
            record["status"] = "does not generate"
            return record
        if not classes.enters_generate(cls):
            return record | {"status": "own loop", "reason": "its generate has a loop of its own"}
        model = build.build(cls, dtype=dtype)
        settle(model)
    except Exception as error:
        record |= {"status": "not built", "reason": short(error)}
        return record
    cases: dict[str, Any] = {}
    for kind in inputs.kinds(model):
        for rows in (1, 2):
            cases[f"{kind} {rows}"] = one_case(model, kind, rows)
    record["cases"] = cases
    if set((cases.get("text 1") or {}).get("inputs", ())) == {"input_ids", "attention_mask"}:
        record["engine"] = in_the_engine(model)
    summarise(record)
    record["seconds"] = round(time.perf_counter() - began, 1)
    return record


def settle(model: Any) -> None:
    """Nothing ends a text early, and nothing else than the call decides how it is decoded."""
    from transformers import GenerationConfig

    start = getattr(model.config, "decoder_start_token_id", None)
    config = GenerationConfig(pad_token_id=0, bos_token_id=1, decoder_start_token_id=1 if start is None else start)
    config.suppress_tokens = inputs.placeholders(model.config) or None
    for name, value in vars(model.generation_config).items():
        if not hasattr(config, name) or name.startswith(("lang", "task", "is_multi", "no_timestamps", "alignment")):
            setattr(config, name, value)
    model.generation_config = config


def summarise(record: dict[str, Any]) -> None:
    """The verdict on the class from those on its cases."""
    cases = record["cases"]
    reached = {name: case for name, case in cases.items() if case["status"] != "not reached"}
    record["faults"] = [f"{name}: {fault}" for name, case in cases.items() for fault in case["faults"]]
    record["faults"] += [f"engine: {fault}" for fault in record.get("engine", {}).pop("faults", ())]
    if not reached:
        record |= {"status": "not reached", "reason": next(iter(cases.values()))["reason"]}
        return
    paths = list(dict.fromkeys(case["path"] for case in reached.values()))
    record["path"] = ", ".join(paths)
    first = next((c for c in reached.values() if c["path"] == "none"), next(iter(reached.values())))
    record["reason"] = first["reason"]
    states = {case["status"] for case in reached.values()} | ({"fault"} if record["faults"] else set())
    for status in ("fault", "refused", "rough", "agrees"):
        if status in states:
            record["status"] = status
            break
    record["own_differs"] = sorted({case.get("own_differs", "") for case in reached.values()} - {""})


def one_case(model: Any, kind: str, rows: int) -> dict[str, Any]:
    """Our calls on inputs of ``kind`` with so many ``rows``, judged."""
    case: dict[str, Any] = {"status": "", "path": "", "reason": "", "faults": []}
    given, problem = accepted_inputs(model, kind, rows)
    if given is None:
        return case | {"status": "not reached", "reason": problem}
    from simctg_fast import support

    report = support(copy.deepcopy(model), given, top_k=judge.TOP_K)
    case |= {"path": report.path, "reason": report.reason, "inputs": {n: list(v.shape) for n, v in given.items()}}
    faults: list[str] = case["faults"]
    double, double_inputs = judge.double_of(model, given)
    if model.dtype != torch.float32:
        wrong = _slower_than_in_float32(model, given, report, double, double_inputs, case)
        faults += [wrong] if wrong else []

    results: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
    calls, overflows = copy.deepcopy(model), False
    for label, path in (("first", "auto"), ("second", "auto"), *((p, p) for p in PATHS)):
        try:
            results[label] = ours(calls, given, path)
        except Exception as error:  # noqa: PERF203
            if isinstance(error, ValueError) and is_ours(error):
                case.setdefault("refusals", {})[label] = short(error)
                if _overflows_itself(model, given, error, case):
                    overflows = True
                elif _NO_PROBABILITIES.search(str(error)) and model.dtype != torch.float32:
                    faults.append(f"{label}: no numbers where its own modules have some: {short(error)}")
            else:
                faults.append(f"{label}: raises {short(error)}")
    if overflows:
        case["status"] = "fault" if faults else "rough"
        return case
    if ("first" in results) != (report.path != "none") and not any(f.startswith("first:") for f in faults):
        faults.append(f"support says {report.path}, generate {'decodes' if 'first' in results else 'does not'}")
    if {"first", "second"} <= set(results) and not torch.equal(results["first"][0], results["second"][0]):
        faults.append("second call says something else than the first")
    if "first" in results and report.path not in results and report.path != "none":
        faults.append(f"path={report.path!r} by name does not open: {case.get('refusals', {}).get(report.path)}")
    if report.path == "none":
        # transformers' greedy search did run: what it is that we refuse is the reason.
        case["status"] = "fault" if faults else case["status"] or "refused"
        return case
    judged: dict[tuple, str] = {}
    for label, (tokens, logits) in results.items():
        key = tuple(map(tuple, tokens.tolist()))
        if key not in judged:
            judged[key] = verdict(model, given, double, double_inputs, tokens, logits, case, label)
        if judged[key]:
            faults.append(f"{label}: {judged[key]}")
    case["status"] = "fault" if faults else case["status"] or "agrees"
    return case


def verdict(model, given, double, double_inputs, tokens, logits, case, label) -> str:
    """What is wrong with these tokens; empty if nothing is."""
    whole = None
    try:
        steps = judge.trace(double, double_inputs, tokens)
    except Exception as error:
        try:
            case["truth"] = f"float32, because in float64 {short(error)}"
            double, double_inputs = single_of(model, given)
            steps = judge.trace(double, double_inputs, tokens)
        except Exception as again:
            case["status"] = "rough"
            case["truth"] = f"none: {short(again)}"
            return ""
    truth = rounding.stacked(steps)
    if model.dtype != torch.float32:
        try:
            found = _within_rounding(model, given, steps, tokens, logits, case)
        except Exception as error:
            return f"the judge failed: {short(error)}"
        if found and label == "uncached" and logits is not None:
            whole = judge.trace(double, double_inputs, tokens, cached=False)
            if not _within_rounding(model, given, whole, tokens, logits, {}, cached=False):
                _note(case, _FOLLOWS_WHOLE)
                return ""
        return found
    try:
        plain = judge.trace(copy.deepcopy(model), given, tokens, scored=False)
        own_error = judge.error(rounding.stacked(plain), truth)
    except Exception as error:
        return f"the judge failed: {short(error)}"
    case["own_error"] = max(case.get("own_error", 0.0), own_error)
    try:
        steps_whole = judge.trace(double, double_inputs, tokens, cached=False, scored=False)
        whole = rounding.stacked(steps_whole)
        apart = judge.error(whole, truth)
        if apart > (1e-3 if "truth" in case else 1e-6):
            case["own_differs"] = f"{apart:.2g}"
    except Exception as error:
        case["own_differs"] = f"uncached fails: {short(error)}"
    if own_error > ROUGH or not bool(truth.isfinite().any()):
        case["status"] = "rough"
        return ""
    allowed = max(1e-3, _MARGIN * own_error)
    lost = judge.regret(steps, tokens, tie=max(1e-5, _MARGIN * own_error))
    case["regret"] = max(case.get("regret", 0.0), float(lost.max()))
    case["scored"] = bool(steps[0].scores.isfinite().any())
    found = []
    if float(lost.max()) > allowed:
        row, column = divmod(int(lost.flatten().argmax()), lost.shape[1])
        where = (lost > allowed).nonzero().tolist()
        found.append(
            f"regret {float(lost.max()):.3g} (row {row}, step {column}; {len(where)} of {lost.numel()} tokens)"
        )
    if logits is not None:
        difference = judge.error(logits, truth)
        case["error"] = max(case.get("error", 0.0), difference)
        if difference > allowed:
            found.append(f"logits off by {difference:.2g} (transformers' own in float32: {own_error:.1g})")
    if not found or label != "uncached" or whole is None or logits is None:
        return ", ".join(found)
    if judge.error(logits, whole) <= allowed:
        # What was asked for by name: the text recomputed. The class's own cached step is what departs from it.
        _note(case, _FOLLOWS_WHOLE)
        return ""
    return ", ".join(found)


def _within_rounding(model, given, steps, tokens, logits, case, cached: bool = True) -> str:
    """What is wrong with these tokens of 16 bits, by what the model's own modules round away; empty if nothing is."""
    own, floor = rounding.Rounding(steps, cached), torch.finfo(model.dtype).eps / 2
    for draw in range(rounding.DRAWS + rounding.MORE):
        own.draw(model, given, tokens)
        if draw + 1 < rounding.DRAWS:
            continue
        case["own_error"] = max(case.get("own_error", 0.0), own.largest)
        case["scored"] = bool(steps[0].scores.isfinite().any())
        if own.largest > rounding.ROUGH or not own.finite:
            case["status"] = "rough"
            _note(case, f"its own modules are off by {own.largest:.2g}" if own.finite else "its own modules overflow")
            return ""
        allowed = max(1e-3, rounding.TIMES * own.scores)
        tie = rounding.TIMES * own.logarithms + floor
        lost = judge.regret(steps, tokens, tie=tie, of_logarithms=True)
        case["regret"], case["allowed"] = float(lost.max()), allowed
        found = []
        if float(lost.max()) > allowed:
            row, column = divmod(int(lost.flatten().argmax()), lost.shape[1])
            found.append(f"regret {float(lost.max()):.3g} of {allowed:.2g} allowed (row {row}, step {column})")
        if logits is not None:
            truth = rounding.stacked(steps)
            if not bool((logits.isfinite() | ~truth.isfinite()).all()):
                found.append("logits are not finite, which are in its own modules")
            apart = judge.errors(logits, truth)
            largest, mean = float(apart.max()), rounding.root_mean_square(apart)
            case["error"] = max(case.get("error", 0.0), largest)
            case["of_own"] = max(case.get("of_own", 0.0), mean / max(own.mean, 1e-12))
            if largest > rounding.TIMES * own.largest + floor or mean > rounding.MEAN * own.mean + floor:
                found.append(
                    f"logits off by {largest:.2g}, {mean:.2g} in the mean "
                    f"(its own modules by {own.largest:.2g}, {own.mean:.2g})"
                )
        if not found:
            break
    return ", ".join(found)


def single_of(model, given) -> tuple[Any, dict[str, torch.Tensor]]:
    """Both in float32, the model a copy."""
    return copy.deepcopy(model).float(), {n: v.float() if v.is_floating_point() else v for n, v in given.items()}


def _slower_than_in_float32(model, given, report, double, double_inputs, case) -> str:
    """What is wrong where a path opens to the same weights in float32 and not in 16 bits: that path, taken all the
    same, has to be as close as the model's own modules, and its trial was too close to call. Empty if it opens."""
    from simctg_fast import support
    from simctg_fast.decoding import trial

    single, single_inputs = single_of(model, given)
    path = support(single, single_inputs, top_k=judge.TOP_K).path
    order = (*PATHS, "none")
    if order.index(report.path) <= order.index(path):
        return ""
    _note(case, f"{path} in float32")
    try:
        with mock.patch.object(trial, "check_close"):
            tokens, logits = ours(copy.deepcopy(model), given, path)
        wrong = verdict(model, given, double, double_inputs, tokens, logits, case, path)
    except Exception as error:
        wrong = "" if _overflows_itself(model, given, error, case) else short(error)
    return f"{path} in float32, not here: {report.reason}; taken all the same: {wrong}" if wrong else ""


def _overflows_itself(model, given, error: Exception, case) -> bool:
    """Whether ``error`` says of a row that its logits are no numbers at a token where, by transformers' own greedy
    search on the same inputs with nothing of ours in place, they are none either; the case says so. (In float64 they
    may be: that is what an overflow is.)"""
    about = _NO_PROBABILITIES.search(str(error))
    if model.dtype == torch.float32 or about is None or not is_ours(error):
        return False
    row, step = map(int, about.groups())
    out = copy.deepcopy(model).generate(
        **given, max_new_tokens=step + 1, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    lost = bool(torch.stack(out.logits, dim=1)[row].isnan().any())
    if lost:
        _note(case, f"its own modules overflow (NaN in row {row} by greedy search)")
    return lost


def in_the_engine(model: Any) -> dict[str, Any]:
    """Three prompts of different lengths, two at a time and one by one: what each gets from ``generate`` alone."""
    found: dict[str, Any] = {"batching": "", "reason": "", "faults": []}
    from simctg_fast.decoding import trial

    alone: list[list[int] | None] = []
    calls = copy.deepcopy(model)
    for given in engine.prompts():
        try:
            alone.append(ours(calls, given, "auto", engine.NEW_TOKENS)[0][0].tolist())
        except Exception as error:  # noqa: PERF203
            if not (isinstance(error, ValueError) and is_ours(error)):
                found["faults"].append(f"generate raises {short(error)}")
                return found
            alone.append(None)
    judged: dict[tuple, str] = {}
    for slots in (2, 1):
        try:
            try:
                batching, written, reason = engine.written(model, slots)
            except ValueError as error:
                if model.dtype == torch.float32 or not is_ours(error) or _DIFFERS not in str(error):
                    raise
                with mock.patch.object(trial, "check_close"):  # too close to call: judged by its tokens
                    batching, written, reason = engine.written(model, slots)
        except Exception as error:
            if not (isinstance(error, ValueError) and is_ours(error)):
                found["faults"].append(f"slots={slots} raises {short(error)}")
            elif None not in alone:
                found["faults"].append(f"slots={slots} refuses what generate takes: {short(error)}")
            found["batching"], found["reason"] = "refused", short(error)
            continue
        if not found["batching"]:
            found["batching"], found["reason"] = batching, reason
        wrong = []
        for index, (given, tokens) in enumerate(zip(engine.prompts(), written, strict=True)):
            if tokens == alone[index]:
                continue
            key = (index, *tokens)
            if key not in judged:
                double, double_inputs = judge.double_of(model, given)
                judged[key] = verdict(model, given, double, double_inputs, torch.tensor([tokens]), None, {}, "engine")
            if judged[key]:
                wrong.append(f"prompt {index} has {tokens}, alone {alone[index]}: {judged[key]}")
        if wrong:
            found["faults"].append(f"slots={slots} ({batching}): {wrong[0]} ({len(wrong)} of {len(written)} prompts)")
    return found


def ours(model, given, path: str, new_tokens: int = NEW_TOKENS) -> tuple[torch.Tensor, torch.Tensor | None]:
    """New tokens ``(B, n)`` and the logits they were chosen by ``(B, n, V)``."""
    from simctg_fast import ContrastiveSearch

    out = model.generate(
        **given,
        custom_generate=ContrastiveSearch(judge.ALPHA, judge.TOP_K, path=path),
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.stack(out.logits, dim=1) if out.logits else None
    return out.sequences[:, -new_tokens:], logits


def accepted_inputs(model, kind: str, rows: int) -> tuple[dict[str, torch.Tensor] | None, str]:
    """The first guess that transformers' own greedy search takes, or how it refused the first of them."""
    problem = ""
    for guess in inputs.guesses(model, kind, rows):
        guess = {n: v.to(model.dtype) if v.is_floating_point() else v for n, v in guess.items()}
        for attempt in range(2):
            try:
                copied = copy.deepcopy(model)
                out = copied.generate(**guess, max_new_tokens=NEW_TOKENS, do_sample=False)
                if not isinstance(out, torch.Tensor) or out.ndim != 2 or out.is_floating_point():
                    return None, f"generate gives no tokens but {type(out).__name__}"
                return guess, ""
            except Exception as error:  # noqa: PERF203
                problem = problem or short(error)
                better = inputs.corrected(model, kind, guess, str(error)) if attempt == 0 else None
                if better is None:
                    break
                guess = better
    return None, f"transformers' own greedy search: {problem}"


def _note(case: dict[str, Any], text: str) -> None:
    notes = case.get("note", "").split("; ") if case.get("note") else []
    case["note"] = "; ".join(dict.fromkeys([*notes, text]))


def is_ours(error: BaseException) -> bool:
    """Whether it is a refusal of ours, raised by our code, and not something that went wrong deeper down."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and "simctg_fast" in place.tb_frame.f_code.co_filename


def short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
