"""Runs one case: with the library's decoder, and with the uncached reference."""

from __future__ import annotations

from typing import Any

import torch

from .architectures import ARCHITECTURES, PAD
from .cases import Case, options_for, processors_for, prompt_for


def ours(model: torch.nn.Module, name: str, case: Case, seed: int, **arguments: Any) -> torch.Tensor:
    """New tokens `(B, n)` of `ContrastiveSearch` under `generate`; `arguments` go to `generate` as well."""
    from simctg_fast import ContrastiveSearch

    entry = ARCHITECTURES[name]
    inputs = _inputs(model, name, case, seed)
    method = ContrastiveSearch(penalty_alpha=case.penalty_alpha, top_k=case.top_k)
    tokens = model.generate(**inputs, custom_generate=method, **options_for(entry, case), **arguments)
    # Whisper's own `generate` leaves the start token out of what it returns.
    return tokens if entry.kind == "speech" else tokens[:, prompt_length(name, case) :]


def reference(model: torch.nn.Module, name: str, case: Case, seed: int, **inputs: Any) -> Any:
    """`ReferenceOutput` of the uncached recomputation; `inputs` replace or add to those of the case."""
    from simctg_fast.reference.contrastive_search import contrastive_search

    entry = ARCHITECTURES[name]
    options = options_for(entry, case)
    inputs = _inputs(model, name, case, seed) | inputs
    return contrastive_search(
        model,
        inputs.pop("input_ids", None),
        inputs.pop("attention_mask", None),
        penalty_alpha=case.penalty_alpha,
        top_k=case.top_k,
        max_new_tokens=case.max_new_tokens,
        eos_token_id=options.get("eos_token_id"),
        pad_token_id=PAD,
        logits_processor=processors_for(entry, case, prompt_length(name, case)),
        **inputs,
    )


def prompt_length(name: str, case: Case) -> int:
    """Tokens in front of the generated ones."""
    return case.decoder_prompt if ARCHITECTURES[name].is_encoder_decoder else max(case.lengths)


def _inputs(model: torch.nn.Module, name: str, case: Case, seed: int) -> dict[str, torch.Tensor]:
    dtype = next(model.parameters()).dtype
    inputs = prompt_for(name, case, seed)
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
