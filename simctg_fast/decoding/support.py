"""Which path a model takes through contrastive search, and why."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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


@torch.no_grad()
def support(model, inputs: dict[str, torch.Tensor] | None = None, *, top_k: int = 3) -> SupportReport:
    """Find out which path ``model`` takes, by a call of two tokens. The verdict is that of ``generate``, which compares
    a small copy of the call with transformers' own step before it begins.

    Args:
        model: a transformers model with ``generate``.
        inputs: keyword arguments for ``generate`` (for models whose inputs cannot be made up: images, sound).
            A padded batch of two of random token ids when None.
        top_k: candidates a step in the trial.

    Returns:
        A :class:`SupportReport`; ``print`` it. Its ``path`` is ``"none"`` where the model cannot be decoded, and
        ``reason`` says why: this function does not raise. The model is left as it was found.
    """
    from .contrastive_search import ContrastiveSearch

    name = type(model).__name__
    with reports_heard() as reports:
        try:
            inputs = _made_up_inputs(model) if inputs is None else dict(inputs)
            model.generate(
                **inputs,
                custom_generate=ContrastiveSearch(penalty_alpha=0.5, top_k=top_k),
                max_new_tokens=2,
                min_new_tokens=2,
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
            )
        except Exception as error:
            refused = [report for report in reports if report.path == "none"]
            reason = refused[-1].reason if refused else f"{type(error).__name__}: {error}"
            checks = refused[-1].checks if refused else (Check("a call of two tokens", False, reason),)
            return SupportReport(name, "none", reason, False, checks)
    if not reports:
        reason = f"{name}.generate did not come to contrastive search"
        return SupportReport(name, "none", reason, False, (Check("a call of two tokens", False, reason),))
    return replace(reports[-1], model=name)


def _made_up_inputs(model) -> dict[str, torch.Tensor]:
    config = model.config
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "input_features":  # speech
        frames = 2 * getattr(config, "max_source_positions", 1500)
        shape = (2, getattr(config, "num_mel_bins", 80), frames)
        return {"input_features": torch.randn(shape, generator=generator).to(model.device, model.dtype)}
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"support(inputs=None) can make up token ids and speech features; {type(model).__name__} wants "
            f"{model.main_input_name!r}: pass inputs={{...}} as for generate"
        )
    text_config = config.get_text_config(decoder=not config.is_encoder_decoder)
    size = getattr(text_config, "vocab_size", None) or getattr(getattr(config, "encoder", None), "vocab_size", None)
    if size is None:
        raise ValueError(f"{type(config).__name__} has no vocab_size to make up token ids from: pass inputs={{...}}")
    ids = torch.randint(3, max(4, min(size, 1000)), (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    if config.is_encoder_decoder:
        mask[0, 5:] = 0
    else:
        mask[0, :2] = 0
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
