"""What ``generate`` returns beside the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from .caches import CACHE_NAME
from .step import StepResult


class Record:
    """Scores, logits, hidden states and attentions of a call, one entry a step, where they are wanted."""

    def __init__(self, config: GenerationConfig, is_encoder_decoder: bool):
        self.is_encoder_decoder = is_encoder_decoder
        self.wanted = wanted = bool(config.return_dict_in_generate)
        self.of_model = {
            "output_hidden_states": wanted and bool(config.output_hidden_states),
            "output_attentions": wanted and bool(config.output_attentions),
        }
        self.scores: list[torch.Tensor] | None = [] if wanted and config.output_scores else None
        self.logits: list[torch.Tensor] | None = [] if wanted and config.output_logits else None
        self.layers: list[tuple[torch.Tensor, ...]] = []
        self.attentions: list[tuple[torch.Tensor, ...]] = []
        self.cross_attentions: list[tuple[torch.Tensor, ...]] = []

    def _lists(self) -> list[list]:
        lists: list = [self.scores, self.logits, self.layers, self.attentions, self.cross_attentions]
        return [each for each in lists if each]

    def cut(self, steps: int) -> None:
        """Keep the first ``steps``."""
        for each in self._lists():
            del each[steps:]

    def add(self, outputs: Any, logits: torch.Tensor, processed: torch.Tensor, whole_steps: bool) -> None:
        """The step that made the current ``logits``: ``outputs`` are the model's of the prompt, or a `StepResult`.
        ``whole_steps``: a step of ``generate``'s own has all positions, and not the last alone."""
        if self.logits is not None:
            self.logits.append(logits)
        if self.scores is not None:
            self.scores.append(processed)
        if not any(self.of_model.values()):
            return
        rows = outputs.rows if isinstance(outputs, StepResult) else None
        outputs = outputs.outputs if isinstance(outputs, StepResult) else outputs

        def pick(layers: Any, batch: int, position: int) -> tuple:
            """The winners' rows. Dimensions are counted from the last: some models stack their layers in front."""
            if layers is None:
                return ()
            if rows is None:
                return tuple(layers)
            layers = [layer.index_select(layer.ndim + batch, rows) for layer in layers]
            return tuple(layers if whole_steps else (layer.narrow(position, -1, 1) for layer in layers))

        prefix = "decoder_" if self.is_encoder_decoder else ""
        if self.of_model["output_hidden_states"]:
            self.layers.append(pick(getattr(outputs, f"{prefix}hidden_states", None), -3, -2))
        if self.of_model["output_attentions"]:
            self.attentions.append(pick(getattr(outputs, f"{prefix}attentions", None), -4, -2))
            if self.is_encoder_decoder:
                self.cross_attentions.append(pick(outputs.cross_attentions, -4, -2))

    def result(self, sequences: torch.Tensor, cache: Cache | None, encoder: Callable[[], Any]) -> Any:
        """The output that ``generate`` returns with ``return_dict_in_generate``; ``encoder`` gives the encoder's."""
        with_states, with_attentions = self.of_model["output_hidden_states"], self.of_model["output_attentions"]
        attentions = tuple(self.attentions) if with_attentions else None
        layers = tuple(self.layers) if with_states else None
        common = {
            "sequences": sequences,
            "scores": None if self.scores is None else tuple(self.scores),
            "logits": None if self.logits is None else tuple(self.logits),
            CACHE_NAME: cache,
        }
        if not self.is_encoder_decoder:
            return GenerateDecoderOnlyOutput(**common, attentions=attentions, hidden_states=layers)
        encoded = encoder()
        return GenerateEncoderDecoderOutput(
            **common,
            encoder_attentions=encoded.get("attentions") if with_attentions else None,
            encoder_hidden_states=encoded.get("hidden_states") if with_states else None,
            decoder_attentions=attentions,
            cross_attentions=tuple(self.cross_attentions) if with_attentions else None,
            decoder_hidden_states=layers,
        )
