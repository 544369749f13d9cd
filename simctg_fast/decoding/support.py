"""Which path a model takes through contrastive search, and why."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Check:
    """One thing that was tried on the model: what, whether it held, and what was seen."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class SupportReport:
    """How a model is decoded: ``path`` (``"shared_prefix"``, ``"reorder"`` or ``"uncached"``), ``reason`` in words,
    ``head`` (winners are chosen before the output embedding), and the ``checks`` that were run."""

    model: str
    path: str
    reason: str
    head: bool = True
    checks: tuple[Check, ...] = field(default=())

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.path} ({self.reason})"]
        lines += [
            f"  [{'ok' if c.passed else 'no'}] {c.name}{': ' + c.detail if c.detail else ''}" for c in self.checks
        ]
        return "\n".join(lines)


_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, SupportReport]] = weakref.WeakKeyDictionary()


def _key(model) -> tuple:
    """What a report depends on beside the module itself."""
    text_config = model.config.get_text_config(decoder=True)
    attention = (model.config._attn_implementation, text_config._attn_implementation)
    return (*attention, model.dtype, model.training, autocast_dtype(model.device))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on ``device``; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def recall(model: torch.nn.Module) -> SupportReport | None:
    """The report of an earlier call on this very model, if its attention and dtype are still what they were."""
    return _known.get(model, {}).get(_key(model))


def forget(model: torch.nn.Module) -> None:
    """Drop what was found out about ``model``: it has changed since."""
    _known.get(model, {}).pop(_key(model), None)


def remember(model: torch.nn.Module, report: SupportReport) -> None:
    _known.setdefault(model, {})[_key(model)] = report


_TRIALS = {
    "shared_prefix": "its first step agrees with the model's own attention",
    "reorder": "its first two steps agree with running whole sequences",
    "uncached": "its first step ran",
}
_REASONS = {
    "shared_prefix": "one copy of the prefix; its attention interface honours every argument it was given",
    "reorder": "cache expanded and selected through reorder_cache",
    "uncached": "every candidate recomputes its whole sequence",
}


def make_report(model: torch.nn.Module, path: str, head: bool, refusals: list[str]) -> SupportReport:
    """``refusals``: why the faster paths were not taken."""
    reason = "; ".join([_REASONS[path], *(f"not {refusal}" for refusal in refusals)])
    parts = [refusal.partition(":") for refusal in refusals]
    checks = [Check(name, False, why.strip()) for name, _, why in parts]
    checks.append(Check(path, True, _TRIALS[path]))
    checks.append(
        Check(
            "winner chosen before the output embedding",
            head,
            "" if head else "logits are computed for all candidates",
        )
    )
    return SupportReport(type(model).__name__, path, reason, head, tuple(checks))


@torch.no_grad()
def support(model, inputs: dict[str, torch.Tensor] | None = None, *, top_k: int = 3) -> SupportReport:
    """Find out which path ``model`` takes, by running it: a padded batch of two, a few tokens, against full recompute.

    Args:
        model: a transformers model with ``generate``.
        inputs: keyword arguments for ``generate`` (for models whose inputs cannot be made up: images, sound).
            Made up from random token ids when None.
        top_k: candidates a step in the trial.

    Returns:
        A :class:`SupportReport`; ``print`` it. The model is left as it was found.
    """
    from .contrastive_search import ContrastiveSearch

    inputs = _made_up_inputs(model) if inputs is None else dict(inputs)
    new_tokens = 4
    runs = {}
    for path in ("auto", "uncached"):
        strategy = ContrastiveSearch(penalty_alpha=0.5, top_k=top_k, path=path)
        try:
            runs[path] = model.generate(
                **inputs,
                custom_generate=strategy,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
                return_dict_in_generate=True,
                output_logits=True,
            )
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            if path == "auto":
                raise
            runs[path] = error
    report = recall(model)
    assert report is not None
    return SupportReport(
        report.model,
        report.path,
        report.reason,
        report.head,
        (*report.checks, _compare(runs["auto"], runs["uncached"], model.dtype)),
    )


def _compare(ours, truth, dtype: torch.dtype) -> Check:
    name = "same as recomputing every sequence in full"
    if isinstance(truth, Exception):
        return Check(name, False, f"could not be tried: {truth}")
    worst, scale, steps = 0.0, 1e-12, 0
    for step, (a, b) in enumerate(zip(ours.logits, truth.logits, strict=True)):
        finite = torch.isfinite(a) & torch.isfinite(b)
        worst = max(worst, (a - b)[finite].abs().max().item())
        scale = max(scale, b[finite].abs().max().item())
        steps = step + 1
        prompt = ours.sequences.shape[1] - len(ours.logits)
        if not torch.equal(ours.sequences[:, prompt + step], truth.sequences[:, prompt + step]):
            break
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(dtype, 2e-3)
    detail = f"largest difference of logits {worst:.2g} over {steps} steps (largest logit {scale:.3g})"
    return Check(name, worst <= tolerance * scale and steps == len(ours.logits), detail)


def _made_up_inputs(model) -> dict[str, torch.Tensor]:
    config = model.config
    text_config = config.get_text_config(decoder=not config.is_encoder_decoder)
    generator = torch.Generator().manual_seed(0)
    vocabulary = max(4, min(text_config.vocab_size, 1000))
    if model.main_input_name == "input_features":  # speech
        frames = 2 * getattr(config, "max_source_positions", 1500)
        shape = (2, getattr(config, "num_mel_bins", 80), frames)
        return {"input_features": torch.randn(shape, generator=generator).to(model.device, model.dtype)}
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"support(inputs=None) can make up token ids and speech features; {type(model).__name__} wants "
            f"{model.main_input_name!r}: pass inputs={{...}} as for generate"
        )
    ids = torch.randint(3, vocabulary, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    if config.is_encoder_decoder:
        mask[0, 5:] = 0
    else:
        mask[0, :2] = 0
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
