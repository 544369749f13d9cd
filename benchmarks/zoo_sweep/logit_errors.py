"""How far logits of 16 bits are from float64 with the same weights: ours, as a share of what the modules' own are.

Both are measured at the tokens that we chose, over many short texts: the modules step by step with their cache (the
whole text again at each step where our step has none either), which is how `generate` runs them.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch

from . import build, classes, inputs, judge, run
from .rounding import stacked

SEEDS, MORE_SEEDS = 3, 9  # of the weights; and so many more where the ratio is above `ALLOWED`
ROWS, BATCHES = 4, 9  # texts of a seed; `ROWS` so few that prompts as well go through kernels for few rows
ALLOWED = 1.05
HEAVY = 2.0  # the modules' root mean square is that many times their median: a few positions are all of it
FAR = 4.0  # times the modules' median: a position where something was chosen otherwise
_RESAMPLES = 2000


@run.quiet()
def one_class(name: str, dtype: torch.dtype, seeds: int = SEEDS) -> dict[str, Any]:
    """The record of class ``name`` in ``dtype``; whatever goes wrong is part of it."""
    began = time.perf_counter()
    record: dict[str, Any] = {"class": name, "architecture": classes.generating_classes()[name][1], "status": ""}
    record |= {"path": "", "reason": "", "faults": [], "cases": {}}
    try:
        cls = classes.find(name)
        if cls is None:
            return record | {"status": "does not generate"}
        if not classes.enters_generate(cls):
            return record | {"status": "own loop", "reason": "its generate has a loop of its own"}
        first = build.build(cls, dtype=dtype)
        run.settle(first)
    except Exception as error:
        return record | {"status": "not built", "reason": run.short(error)}
    for kind in inputs.kinds(first):
        given, problem = run.accepted_inputs(first, kind, ROWS)
        if given is None:
            record["cases"][kind] = {"status": "not reached", "reason": problem}
            continue
        errors = Errors()
        for seed in range(seeds):
            errors.add(cls, dtype, given, seed)
        if errors.case().get("ratio", 0.0) > ALLOWED:
            for seed in range(seeds, seeds + MORE_SEEDS):
                errors.add(cls, dtype, given, seed)
        record["cases"][kind] = errors.case()
    summarise(record)
    return record | {"seconds": round(time.perf_counter() - began, 1)}


def summarise(record: dict[str, Any]) -> None:
    """The class's status: the first in this order that one of its cases has."""
    cases = record["cases"].values()
    for status in ("fault", "above", "within", "same", "refused", "not reached"):
        found = [case for case in cases if case["status"] == status]
        if found:
            break
    record |= {"status": status, "reason": found[0].get("reason", "")}
    record["path"] = ", ".join(dict.fromkeys(path for case in cases for path in case.get("paths", ())))
    record["faults"] = [case["reason"] for case in cases if case["status"] == "fault"]


class Errors:
    """Of every text so far, by the seed of its weights: mean squares of what its logits are off by at each position."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.ours: list[torch.Tensor] = []  # (rows, new tokens) each, NaN behind a row's end
        self.modules: list[torch.Tensor] = []
        self.paths: dict[str, None] = {}
        self.refusals: list[str] = []
        self.fault = ""
        self.same = True

    def add(self, cls: Any, dtype: torch.dtype, given: inputs.Inputs, seed: int) -> None:
        model = build.build(cls, seed=seed, dtype=dtype)
        run.settle(model)
        for batch in range(BATCHES):
            texts = varied(given, inputs.placeholders(model.config), seed * BATCHES + batch)
            try:
                self._measure(model, texts, seed)
            except ValueError as error:
                if not run.is_ours(error):
                    self.fault = self.fault or run.short(error)
                self.refusals.append(run.short(error))
            except Exception as error:
                self.fault = self.fault or run.short(error)

    def _measure(self, model: Any, texts: inputs.Inputs, seed: int) -> None:
        from simctg_fast.decoding.report import reports_heard

        with reports_heard() as heard:
            tokens, logits = run.ours(model, texts, "auto")
        path = heard[-1].path if heard else "unknown"
        self.paths[path] = None
        cached = path != "uncached"
        modules = stacked(judge.trace(copy.deepcopy(model), texts, tokens, cached=cached, scored=False))
        exact = stacked(judge.trace(*judge.double_of(model, texts), tokens, cached=cached, scored=False))
        self.same &= torch.equal(logits.double(), modules.double())
        finite = exact.isfinite() & (exact.abs() < 1e30) & modules.isfinite()
        if bool((finite & ~logits.isfinite()).any()):
            self.fault = self.fault or "logits are not finite, which are in its own modules"
        # A row that has ended (some classes name a token for it themselves) is filled up, and nothing is computed.
        ended = (tokens == model.generation_config.pad_token_id).flip(1).cumprod(dim=1).flip(1).bool()
        for kept, values in ((self.ours, logits), (self.modules, modules)):
            difference = torch.where(finite, values.double() - exact, 0.0)
            kept.append(difference.square().mean(dim=-1).masked_fill(ended, torch.nan))
        self.seeds.append(seed)

    def case(self) -> dict[str, Any]:
        """What is recorded: ``ratio`` of the root mean squares of all positions; in 95 of 100 drawings of as many texts
        of these it lies between ``low`` and ``high``. Where ``heavy`` (experts chosen otherwise at a few positions),
        what counts is ``typical``, the ratio of the medians, and how many texts have positions ``far`` off, ours and
        the modules': no more than as many again would by chance."""
        case: dict[str, Any] = {"status": "fault", "paths": list(self.paths), "reason": self.fault}
        if not self.ours:
            return case if self.fault else case | {"status": "refused", "reason": self.refusals[0]}
        ours, modules = torch.cat(self.ours), torch.cat(self.modules)
        if not bool(ours.nansum() + modules.nansum()):  # XLM's states are 0 where its mask token is its padding
            return case | {"status": "not reached", "reason": self.fault or "its modules round nothing away"}
        seeds = torch.tensor(self.seeds).repeat_interleave(len(self.ours[0]))
        ratio, (low, high) = _ratio(ours, modules), interval(ours, modules)
        mean, middle = float(modules.nanmean().sqrt()), float(modules.nanmedian().sqrt())
        case |= {
            "positions": int((~ours.isnan()).sum()),
            "ratio": ratio,
            "low": low,
            "high": high,
            "seeds": [round(_ratio(ours[seeds == s], modules[seeds == s]), 4) for s in sorted(set(self.seeds))],
            "typical": float(ours.nanmedian().sqrt()) / max(middle, 1e-300),
            "modules": mean,
            "heavy": mean > HEAVY * middle,
            "far": [int((errors.sqrt() > FAR * middle).any(dim=1).sum()) for errors in (ours, modules)],
            "refused": len(self.refusals),
        }
        if self.refusals and not self.fault:
            case["reason"] = f"{len(self.refusals)} of {len(self.refusals) + len(self.ours)} calls: {self.refusals[0]}"
        if self.fault:
            return case
        far, own_far = case["far"]
        above = ratio > ALLOWED
        if case["heavy"]:
            above = case["typical"] > ALLOWED or far > own_far + 2 * (far + own_far) ** 0.5
        return case | {"status": "same" if self.same else "above" if above else "within"}


def _ratio(ours: torch.Tensor, modules: torch.Tensor) -> float:
    return float((ours.nanmean() / modules.nanmean().clamp_min(1e-300)).sqrt())


def interval(ours: torch.Tensor, modules: torch.Tensor) -> tuple[float, float]:
    """Where 95 of 100 ratios lie, of as many texts (rows) drawn from these with replacement."""
    ours, modules = ours.nansum(dim=1), modules.nansum(dim=1)
    drawn = torch.randint(len(ours), (_RESAMPLES, len(ours)), generator=torch.Generator().manual_seed(0))
    ratios = (ours[drawn].sum(dim=1) / modules[drawn].sum(dim=1).clamp_min(1e-300)).sqrt()
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=ratios.dtype)).tolist()
    return low, high


def varied(given: inputs.Inputs, marks: list[int], seed: int) -> inputs.Inputs:
    """The same kind of inputs with other words (but for ``marks``, of images), and other pixels or sounds: what is not
    a whole number. Every other seed has the padding of ``given``, the others none."""
    padded = seed % 2 == 1 and "attention_mask" in given
    random = torch.Generator().manual_seed(1000 + seed)
    found = dict(given)
    for name, values in given.items():
        if values.is_floating_point():
            noise = torch.randn(values.shape, generator=random).to(values.dtype)
            found[name] = torch.where(values == values.round(), values, noise)
        elif name == "input_ids":
            words = torch.randint(3, inputs.LONGEST_ID, values.shape, generator=random)
            named = torch.tensor(marks, dtype=values.dtype)
            kept = (values >= inputs.LONGEST_ID) | torch.isin(values, named) | torch.isin(words, named)
            found[name] = torch.where(kept, values, words)
            if padded:
                found[name] = found[name].masked_fill(given["attention_mask"] == 0, 0)
        elif name == "attention_mask" and not padded:
            found[name] = torch.ones_like(values)
    return found
