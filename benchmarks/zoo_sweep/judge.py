"""Is a token the one that contrastive search chooses? Asked of transformers' own step in float64, at our own text.

Nothing here knows how we decode: ``generate`` hands its loop over to ``trace``, which runs the model as ``generate``
would, each candidate from a deep copy of the cache. Our tokens are forced, so that a near tie costs one step, no more.
"""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from simctg_fast.reference.contrastive_search import degeneration_penalty, true_float64

ALPHA, TOP_K = 0.6, 4
_MORE = 2  # candidates beyond the k best that are tried too: a near tie may put them among the k


@dataclass
class Step:
    """What a step could choose from: for B rows ``ids (B, m)`` by falling probability, the token of ours last."""

    logits: torch.Tensor  # (B, V)
    ids: torch.Tensor
    probabilities: torch.Tensor
    scores: torch.Tensor  # NaN where no hidden state can be read


def double_of(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Both in float64, the model a copy."""
    double = copy.deepcopy(model).double()
    for module in double.modules():  # grouped matrix products know no float64
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
    return double, {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}


def trace(
    model: Any, inputs: dict[str, torch.Tensor], tokens: torch.Tensor, *, cached: bool = True, scored: bool = True
) -> list[Step]:
    """The steps of contrastive search along ``tokens (B, n)``.

    Args:
        model: in any dtype; a float64 one runs in float64 throughout. Its configuration may be changed.
        inputs: arguments of ``generate``, in the model's dtype.
        cached: over the cache that transformers makes, else the whole text again at each step.
        scored: try the candidates (else ``scores`` are NaN and only the logits are of use).
    """
    found: list[Step] = []
    if scored:
        _show_hidden_states(model)

    def loop(model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **kwargs):
        kwargs.pop("synced_gpus", None)
        kwargs.pop("streamer", None)
        found.extend(_steps(model, input_ids, generation_config, kwargs, tokens, scored))
        return torch.cat([input_ids, tokens], dim=1)

    exact = true_float64() if model.dtype == torch.float64 else nullcontext()
    with torch.no_grad(), exact:
        model.generate(
            **inputs, custom_generate=loop, max_new_tokens=tokens.shape[1], do_sample=False, use_cache=cached,
        )  # fmt: skip
    return found


def _show_hidden_states(model: Any) -> None:
    configs = [model.config, model.config.get_text_config(decoder=True)]
    configs += [m.config for m in model.modules() if hasattr(getattr(m, "config", None), "output_hidden_states")]
    for config in configs:
        config.output_hidden_states = True


def _last_hidden(outputs: Any) -> torch.Tensor | None:
    layers = getattr(outputs, "decoder_hidden_states", None)
    layers = getattr(outputs, "hidden_states", None) if layers is None else layers
    last = layers[-1] if isinstance(layers, (tuple, list)) and layers else layers
    return last if isinstance(last, torch.Tensor) and last.ndim == 3 else None


def _steps(model, ids, generation_config, kwargs, tokens, scored):
    encoder_decoder = bool(model.config.is_encoder_decoder)
    batch = len(ids)
    kwargs = dict(kwargs)
    extra = {"output_hidden_states": True} if scored else {}
    outputs = _prefill(model, ids, generation_config, kwargs, extra)
    kwargs = model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=encoder_decoder)
    logits, history = outputs.logits[:, -1], _last_hidden(outputs) if scored else None
    for column in range(tokens.shape[1]):
        chosen = tokens[:, column]
        probabilities = logits.softmax(dim=-1)
        tried = torch.nan_to_num(logits, nan=-torch.inf).topk(TOP_K + _MORE, dim=-1).indices
        states = []
        if scored and history is not None:
            for candidate in tried.unbind(dim=1):
                out, _ = _forward(model, ids, _copied(kwargs), candidate, extra)
                states.append(_last_hidden(out)[:, -1])
        outputs, ids = _forward(model, ids, kwargs, chosen, extra)
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=encoder_decoder)
        all_ids = torch.cat([tried, chosen[:, None]], dim=1)
        p = probabilities.gather(1, all_ids)
        scores = torch.full_like(p, torch.nan)
        if scored and history is not None:
            last = _last_hidden(outputs)
            states.append(last[:, -1])
            width = history.shape[1]
            mask = kwargs.get("decoder_attention_mask" if encoder_decoder else "attention_mask")
            mask = (
                mask[:, :width] if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] > width else None
            )
            penalties = torch.stack([degeneration_penalty(history, s, mask) for s in states], dim=1)
            scores = (1 - ALPHA) * p - ALPHA * penalties
            history = torch.cat([history, last[:, -1:]], dim=1)
        yield Step(logits.reshape(batch, -1), all_ids, p, scores)
        logits = outputs.logits[:, -1]


def _prefill(model, ids, generation_config, kwargs, extra):
    inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **kwargs)
    return model(**inputs | _accepted(model, inputs, extra), return_dict=True)


def _forward(model, ids, kwargs, token, extra):
    ids = torch.cat([ids, token[:, None]], dim=1)
    inputs = model.prepare_inputs_for_generation(
        ids, next_sequence_length=1 if kwargs.get("use_cache", True) else None, **kwargs
    )
    return model(**inputs | _accepted(model, inputs, extra), return_dict=True), ids


def _accepted(model, inputs, extra):
    return {} if getattr(model.config, "output_hidden_states", False) else extra


def _copied(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {
        n: v if isinstance(v, torch.Tensor) or n == "encoder_outputs" else copy.deepcopy(v) for n, v in kwargs.items()
    }


def regret(steps: list[Step], tokens: torch.Tensor, tie: float = 1e-6) -> torch.Tensor:
    """How far each of ``tokens (B, n)`` is from the best one ``(B, n)``: inf where it was no candidate, 0 where it is
    the choice. Probabilities nearer than ``tie`` are one. A step without hidden states is judged as candidate only."""
    columns = []
    for index, step in enumerate(steps):
        p, scores = step.probabilities, step.scores
        own = p[:, -1]
        chosen = scores[:, -1]
        edge, beyond = p[:, TOP_K - 1], p[:, TOP_K]
        sure = p[:, :TOP_K] > beyond[:, None] + tie
        best = scores[:, :TOP_K].masked_fill(~sure, -torch.inf).nan_to_num(nan=-torch.inf).amax(dim=-1)
        lost = (best - chosen).clamp_min(0).nan_to_num(nan=0.0)
        assert torch.equal(step.ids[:, -1], tokens[:, index])
        columns.append(torch.where(own < edge - tie, torch.inf, lost))
    return torch.stack(columns, dim=1)


def error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative error of a row, where both are finite."""
    ours, expected = ours.double(), expected.double()
    finite = ours.isfinite() & expected.isfinite() & (expected.abs() < 1e30)
    if not bool(finite.any()):
        return 0.0
    difference = torch.where(finite, ours - expected, 0.0).norm(dim=-1)
    return float((difference / torch.where(finite, expected, 0.0).norm(dim=-1).clamp_min(1e-12)).max())
