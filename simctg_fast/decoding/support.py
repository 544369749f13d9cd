"""Which path a model takes through contrastive search, found out by a call of two tokens."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..cpu.modules import lossless_bytes
from .contrastive_search import ContrastiveSearch
from .report import Check, SupportReport, reports_heard


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
        ``reason`` says why: this function does not raise. The model is left as it was found. Where float32 weights on
        the CPU would lose nothing in 16 bits, a check says so: ``ContrastiveSearch(weights="lossless")`` reads those.
    """
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
    report = replace(reports[-1], model=name)
    as_good, whole = lossless_bytes(model)
    if as_good:
        detail = f"{as_good / 2**20:.0f} of {whole / 2**20:.0f} MiB of float32 weights are as good in half the bytes"
        report = replace(report, checks=(*report.checks, Check("weights='lossless'", True, detail)))
    return report


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
