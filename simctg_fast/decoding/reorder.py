"""``generate`` on models that do not share a prefix: candidates' caches, or no cache at all."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .caches import self_attention_cache, without_caches
from .decoder import Decoder
from .inputs import encoder_rows, expand_kwargs, grow_kwargs, with_own_states
from .packing import Packing, owners_of, run_of
from .step import Choose, StepResult
from .unsupported import UnsupportedError


class ReorderDecoder(Decoder):
    """``cache.reorder_cache`` expands each sequence to k rows before a step and selects the winners after it."""

    name = "reorder"

    def prefill(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Any]:
        if not self.kwargs.get("use_cache"):
            raise UnsupportedError("use_cache is False")
        # The prompt's own arguments, with caches that stay empty, for running whole sequences again.
        self.initial, self.prompt_ids = self.kwargs, input_ids.shape[1]
        self.kwargs = {n: copy.deepcopy(v) if isinstance(v, Cache) else v for n, v in self.kwargs.items()}
        self.rows = torch.arange(len(input_ids), device=input_ids.device)  # of the cache, that hold the sequences
        self.stepped = False
        return super().prefill(input_ids)

    def _after_prefill(self, outputs: Any) -> None:
        self.kwargs = self._advance(outputs, self.kwargs)
        found = [n for n, v in self.kwargs.items() if isinstance(v, Cache) and hasattr(v, "reorder_cache")]
        if not found:
            raise UnsupportedError("the model returns no cache that can be reordered")
        self.cache_name = found[0]

    def step(self, input_ids: Tensor, candidates: Tensor, choose: Choose, packing: Packing | None = None) -> StepResult:
        k = candidates.shape[1]
        self.kwargs[self.cache_name].reorder_cache(self.rows[owners_of(len(candidates), k, packing, self.rows.device)])
        if not self.expanded:
            self.counts = [k] * len(candidates)
            self.expanded = expand_kwargs(self.model, self.kwargs, k, input_ids)
            if self.expanded.get("encoder_outputs") is not None:
                outputs = self.expanded["encoder_outputs"]
                states = outputs.last_hidden_state.repeat_interleave(k, dim=0)
                self.expanded["encoder_outputs"] = encoder_rows(outputs, k, states)
        result = self._try(self._next_inputs(candidates, packing), candidates, choose, packing)
        self.rows, self.stepped = result.rows, True
        self.expanded = self._advance(result.outputs, self.expanded)
        return result

    def _keep(self, places: list[int]) -> None:
        self.rows = self.rows[places]

    def result_cache(self, input_ids: Tensor, surplus: int) -> Cache:
        cache = self.kwargs[self.cache_name]
        layers = self_attention_cache(cache).layers
        plain = all(type(layer).__name__ == "DynamicLayer" for layer in layers)
        if self.stepped and plain and getattr(cache, "is_croppable", True):
            cache.reorder_cache(self.rows)
            cache.crop(-1 - surplus)
            return cache
        # States and windows cannot be cut back by a token: run the winners once more, up to the last but one.
        kwargs = grow_kwargs(self.model, self.initial, input_ids[:, self.prompt_ids : -1])
        outputs = self.model._prefill(input_ids[:, :-1], self.generation_config, kwargs)
        return self._advance(outputs, kwargs)[self.cache_name]


class UncachedDecoder(Decoder):
    """Every candidate's whole sequence again at every step: slow, exact."""

    name = "uncached"

    def prefill(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Any]:
        self.prompt_ids = input_ids.shape[1]
        self.kwargs = without_caches(self.kwargs) | {"use_cache": False}
        return super().prefill(input_ids)

    def _after_prefill(self, outputs: Any) -> None:
        pass

    def step(self, input_ids: Tensor, candidates: Tensor, choose: Choose, packing: Packing | None = None) -> StepResult:
        k = candidates.shape[1]
        if not self.expanded:
            self.counts = [k] * len(candidates)
            prompt = input_ids[:, : self.prompt_ids]
            self.expanded = expand_kwargs(self.model, self.kwargs, k, prompt, keep_all=True)
        owners = owners_of(len(candidates), k, packing, input_ids.device)
        rows = torch.cat([input_ids[owners], run_of(candidates, packing)[:, None]], dim=1)
        kwargs = with_own_states(grow_kwargs(self.model, self.expanded, rows[:, self.prompt_ids :]))
        inputs = self.model.prepare_inputs_for_generation(rows, is_first_iteration=True, **kwargs)
        return self._try(inputs | self.record, candidates, choose, packing)
