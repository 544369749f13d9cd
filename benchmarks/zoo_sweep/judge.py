"""Is a token the one that contrastive search chooses? Asked of transformers' own step in float64, at our own text.

Nothing here knows how we decode: ``generate`` hands its loop over to ``trace``, which runs the model as ``generate``
would, each candidate from a deep copy of the cache. Our tokens are forced, so that a near tie costs one step, no more.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
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
    model: Any,
    inputs: dict[str, torch.Tensor],
    tokens: torch.Tensor,
    *,
    cached: bool = True,
    scored: bool = True,
    like: list[Step] | None = None,
) -> list[Step]:
    """The steps of contrastive search along ``tokens (B, n)``.

    Args:
        model: in any dtype; a float64 one runs in float64 throughout. Its configuration may be changed.
        inputs: arguments of ``generate``, in the model's dtype.
        cached: over the cache that transformers makes, else the whole text again at each step.
        scored: try the candidates (else ``scores`` are NaN and only the logits are of use).
        like: try the tokens that these steps tried and not the most probable ones.
    """
    found: list[Step] = []
    if scored:
        show_hidden_states(model)

    def loop(model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **kwargs):
        kwargs.pop("synced_gpus", None)
        kwargs.pop("streamer", None)
        walk = Walk(model, input_ids, logits_processor, kwargs, scored, like)
        found.extend(walk.along(tokens))
        return torch.cat([input_ids, tokens], dim=1)

    exact = true_float64() if model.dtype == torch.float64 else nullcontext()
    with torch.no_grad(), exact:
        model.generate(
            **inputs, custom_generate=loop, max_new_tokens=tokens.shape[1], do_sample=False, use_cache=cached,
        )  # fmt: skip
    return found


def show_hidden_states(model: Any) -> None:
    configs = [model.config, model.config.get_text_config(decoder=True)]
    configs += [m.config for m in model.modules() if hasattr(getattr(m, "config", None), "output_hidden_states")]
    for config in configs:
        config.output_hidden_states = True


class Walk:
    """``generate``'s loop along given tokens."""

    def __init__(self, model, ids, logits_processor, kwargs, scored, like):
        self.model, self.ids, self.processor = model, ids, logits_processor
        self.kwargs, self.scored, self.like = dict(kwargs), scored, like
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        asked = scored and not getattr(model.config, "output_hidden_states", False)
        self.extra = {"output_hidden_states": True} if asked else {}
        self.modules = list(model.modules())

    def along(self, tokens: torch.Tensor) -> Iterator[Step]:
        hooks = [self.hear()] if self.scored and self.model.base_model is not self.model else []
        try:
            yield from self._steps(tokens)
        finally:
            for hook in hooks:
                hook.remove()

    def _steps(self, tokens):
        inputs = self.model.prepare_inputs_for_generation(self.ids, is_first_iteration=True, **self.kwargs)
        outputs, states = self.run(inputs)
        self.advance(outputs)
        logits, history = _wide(outputs.logits[:, -1]), states
        for index, chosen in enumerate(tokens.unbind(dim=1)):
            scores = logits if self.processor is None else self.processor(self.ids, logits.clone())
            probabilities = scores.softmax(dim=-1)
            if self.like is None:
                tried = torch.nan_to_num(scores, nan=-torch.inf).topk(TOP_K + _MORE, dim=-1).indices
            else:
                tried = self.like[index].ids[:, :-1]
            found = []
            if history is not None:
                found = [self._tried(candidate) for candidate in tried.unbind(dim=1)]
            outputs, states = self.run(self.inputs(self.kwargs, chosen))
            self.ids = torch.cat([self.ids, chosen[:, None]], dim=1)
            self.advance(outputs)
            all_ids = torch.cat([tried, chosen[:, None]], dim=1)
            p = probabilities.gather(1, all_ids)
            values = torch.full_like(p, torch.nan)
            if history is not None:
                found.append(states[:, -1])
                mask = self._mask(history.shape[1])
                penalties = torch.stack([degeneration_penalty(history, state, mask) for state in found], dim=1)
                values = (1 - ALPHA) * p - ALPHA * penalties
                history = torch.cat([history, states[:, -1:]], dim=1)
            yield Step(logits.reshape(len(all_ids), -1), all_ids, p, values)
            logits = _wide(outputs.logits[:, -1])

    def inputs(self, kwargs, token):
        ids = torch.cat([self.ids, token[:, None]], dim=1)
        length = 1 if kwargs.get("use_cache", True) else None
        return self.model.prepare_inputs_for_generation(ids, next_sequence_length=length, **kwargs)

    def run(self, inputs) -> tuple[Any, torch.Tensor | None]:
        self.heard: torch.Tensor | None = None
        outputs = self.model(**inputs | self.extra, return_dict=True)
        states = self._last_hidden(outputs) if self.scored else None
        return outputs, None if states is None else _wide(states)

    def _tried(self, candidate) -> torch.Tensor:
        """The candidate's hidden state; whatever holds a state is afterwards as it was before."""
        kwargs = {n: v if isinstance(v, torch.Tensor) else copy.deepcopy(v) for n, v in self.kwargs.items()}
        kept = self.held()
        _, states = self.run(self.inputs(kwargs, candidate))
        for attributes, name, value in kept:
            attributes[name] = value
        return states[:, -1]

    def held(self) -> list[tuple[dict[str, Any], str, torch.Tensor | None]]:
        """Tensors (and their absence) that modules hold outside parameters and buffers: RecurrentGemma's state."""
        return [
            (vars(module), name, None if value is None else value.clone())
            for module in self.modules
            for name, value in vars(module).items()
            if value is None or isinstance(value, torch.Tensor)
        ]

    def advance(self, outputs) -> None:
        self.kwargs = self.model._update_model_kwargs_for_generation(
            outputs, self.kwargs, is_encoder_decoder=self.encoder_decoder
        )

    def _mask(self, width: int) -> torch.Tensor | None:
        mask = self.kwargs.get("decoder_attention_mask" if self.encoder_decoder else "attention_mask")
        wide = isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] > width
        return mask[:, :width] if wide else None

    def hear(self):
        def hear(module, args, output):
            self.heard = getattr(output, "last_hidden_state", None)

        return self.model.base_model.register_forward_hook(hear)

    def _last_hidden(self, outputs: Any) -> torch.Tensor | None:
        """``hidden_states[-1]``, as transformers 4 read it. Reformer's is no such thing: one of the two streams of its
        reversible layers, padded to whole chunks; the head reads both, normalised. So where shapes differ, what the
        base model calls its last hidden state counts."""
        layers = getattr(outputs, "decoder_hidden_states", None)
        layers = getattr(outputs, "hidden_states", None) if layers is None else layers
        last = layers[-1] if isinstance(layers, (tuple, list)) and layers else layers
        if not isinstance(last, torch.Tensor) or last.ndim != 3:
            return None
        heard = self.heard
        if isinstance(heard, torch.Tensor) and heard.ndim == 3 and heard.shape != last.shape:
            return heard
        return last


def _wide(values: torch.Tensor) -> torch.Tensor:
    """What a step makes of its model's numbers rounds nothing away: scores are ours to compute, in any type."""
    return values.double() if values.dtype in (torch.bfloat16, torch.float16) else values


def regret(steps: list[Step], tokens: torch.Tensor, tie: float = 1e-6, *, of_logarithms: bool = False) -> torch.Tensor:
    """How far each of ``tokens (B, n)`` is from the best one ``(B, n)``: inf where it was no candidate, 0 where it is
    the choice. Probabilities (or their logarithms) nearer than ``tie`` are one. A step without hidden states is judged
    as candidate only."""
    columns = []
    for index, step in enumerate(steps):
        p, scores = step.probabilities, step.scores
        p = p.log() if of_logarithms else p
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
    return float(errors(ours, expected).max())


def errors(ours: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative error of each row (the last dimension), where both are finite."""
    ours, expected = ours.double(), expected.double()
    finite = ours.isfinite() & expected.isfinite() & (expected.abs() < 1e30)
    difference = torch.where(finite, ours - expected, 0.0).norm(dim=-1)
    return difference / torch.where(finite, expected, 0.0).norm(dim=-1).clamp_min(1e-12)
