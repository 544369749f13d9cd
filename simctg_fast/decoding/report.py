"""How a model is decoded, and why: the record, and what is remembered of earlier calls."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Check:
    """One thing that was tried on the model: what, whether it held, and what was seen."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True, repr=False)
class SupportReport:
    """How a model is decoded: ``path`` (``"shared_prefix"``, ``"reorder"``, ``"uncached"``; ``"none"``: not at all),
    ``reason`` in words, ``head`` (winners are chosen before the output embedding), and the ``checks`` that were run."""

    model: str
    path: str
    reason: str
    head: bool = True
    checks: tuple[Check, ...] = field(default=())

    def __repr__(self) -> str:
        passed = sum(check.passed for check in self.checks)
        return f"SupportReport({self.model}: {self.path}, {passed} of {len(self.checks)} checks passed)"

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.path} ({self.reason})"]
        lines += [
            f"  [{'ok' if c.passed else 'no'}] {c.name}{': ' + c.detail if c.detail else ''}" for c in self.checks
        ]
        return "\n".join(lines)


def refused_checks(refusals: list[str]) -> list[Check]:
    """Of reasons why paths are not taken, ``"path: reason"`` each."""
    parts = (refusal.partition(":") for refusal in refusals)
    return [Check(name, False, why.strip()) for name, _, why in parts]


# What trials have found, by model and by what it depends on beside: a `trial.Verdict`. The last used comes last.
_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, Any]] = weakref.WeakKeyDictionary()
_listening = threading.local()


def setting_of(model) -> tuple:
    """What a verdict depends on beside the module itself and the kind of call."""
    text_config = model.config.get_text_config(decoder=True)
    attention = (model.config._attn_implementation, text_config._attn_implementation)
    return (*attention, model.dtype, model.training, autocast_dtype(model.device))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on ``device``; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def recall(model: torch.nn.Module, kind: Any = None) -> Any:
    """What was found for calls of this ``kind`` on this very model, if its attention and dtype are still what they were
    then; with ``kind=None`` the report of the last call of any."""
    found, setting = _known.get(model, {}), setting_of(model)
    if kind is not None:
        verdict = found.pop((setting, kind), None)
        if verdict is not None:
            found[setting, kind] = verdict
        return verdict
    return next((found[key].report for key in reversed(found) if key[0] == setting), None)


def forget(model: torch.nn.Module, kind: Any) -> None:
    """Drop what was found: the model has changed since."""
    _known.get(model, {}).pop((setting_of(model), kind), None)


def remember(model: torch.nn.Module, kind: Any, verdict: Any) -> None:
    _known.setdefault(model, {})[setting_of(model), kind] = verdict


def announce(report: SupportReport) -> None:
    """Tell who is listening in this thread how the call under way is decoded."""
    reports = getattr(_listening, "reports", None)
    if reports is not None:
        reports.append(report)


@contextmanager
def reports_heard() -> Iterator[list[SupportReport]]:
    """The reports of the calls made within the block, those of a model inside the model among them."""
    outer, _listening.reports = getattr(_listening, "reports", None), []
    try:
        yield _listening.reports
    finally:
        _listening.reports = outer
