"""How a model is called: its arguments for candidates' rows and longer texts, its inputs for rows of any length."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import utils as generation_utils
from transformers.modeling_outputs import BaseModelOutput, ModelOutput

from ..cpu.forwards import Forwards, here
from .caches import CACHE_NAME
from .unsupported import UnsupportedError

_PREFILL_ONLY = frozenset(getattr(generation_utils, "MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL", ())) | {
    "inputs_embeds",
    "pixel_values",
    "pixel_values_videos",
    "input_features",
}


def expand_kwargs(model, kwargs: dict[str, Any], k: int, prompt: Tensor, *, keep_all: bool = False) -> dict[str, Any]:
    """``kwargs`` of B sequences for ``B·k`` candidate rows. Caches stay at B rows; unless ``keep_all``, encoder outputs
    do too, and what only the prompt needs is dropped. Some models count a row's images in the ids of its ``prompt``."""
    aside = {n: v for n, v in kwargs.items() if isinstance(v, Cache) or (n == "encoder_outputs" and not keep_all)}
    rest = {n: v for n, v in kwargs.items() if n not in aside and (keep_all or n not in _PREFILL_ONLY)}
    return repeat_rows(model, prompt, rest, k)[1] | aside


def repeat_rows(model, input_ids: Tensor, kwargs: dict[str, Any], k: int) -> tuple[Tensor, dict[str, Any]]:
    """Each sequence of a call ``k`` times, as the model does it; the caller's own arguments stay as they are."""
    encoded, features = kwargs.get("encoder_outputs"), kwargs.get("mm_encoder_outputs")
    if features is not None:  # both are expanded in place
        kwargs = kwargs | {"mm_encoder_outputs": {name: copy_outputs(value) for name, value in features.items()}}
    if isinstance(encoded, ModelOutput):
        kwargs = kwargs | {"encoder_outputs": copy_outputs(encoded)}
    elif isinstance(encoded, (tuple, list)):  # what a decoder alone may be given
        kwargs = kwargs | {"encoder_outputs": type(encoded)(states.repeat_interleave(k, dim=0) for states in encoded)}
    return model._expand_inputs_for_generation(
        input_ids=input_ids, expand_size=k, is_encoder_decoder=isinstance(encoded, ModelOutput), **kwargs
    )


def copy_outputs(outputs: Any) -> Any:
    """A model's output of its own whose fields can be replaced."""
    return copy.copy(outputs)


def encoder_rows(outputs: Any, k: int, states: Tensor) -> Any:
    """An encoder's output for ``k`` rows a sequence, its last hidden state replaced. What else it holds (masks, router
    logits) some decoders look for."""
    rows = len(outputs.last_hidden_state)
    expanded = copy_outputs(outputs)
    for name, value in list(expanded.items()):
        if name == "last_hidden_state":
            expanded[name] = states
        elif isinstance(value, Tensor) and value.ndim and value.shape[0] == rows:
            expanded[name] = value.repeat_interleave(k, dim=0)
    return expanded


def with_own_states(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` for one forward, with encoder states of its own: some decoders write into them (Moonshine's streaming
    one adds positions)."""
    encoded = kwargs.get("encoder_outputs")
    if isinstance(encoded, ModelOutput):
        encoded = copy_outputs(encoded)
        encoded["last_hidden_state"] = encoded.last_hidden_state.clone()
        return kwargs | {"encoder_outputs": encoded}
    return kwargs


def grow_kwargs(model, kwargs: dict[str, Any], new_ids: Tensor) -> dict[str, Any]:
    """``kwargs`` of a prompt (masks, positions, embeddings) for that prompt followed by ``new_ids (rows, n)``."""
    kwargs = dict(kwargs)
    if not new_ids.shape[1]:
        return kwargs
    is_encoder_decoder = bool(model.config.is_encoder_decoder)
    if kwargs.get("inputs_embeds") is not None and not is_encoder_decoder:
        new = model.get_input_embeddings()(new_ids)
        kwargs["inputs_embeds"] = torch.cat([kwargs["inputs_embeds"], new.to(kwargs["inputs_embeds"])], dim=1)
    nothing = _NoOutputs()
    grown = model._update_model_kwargs_for_generation(
        nothing, kwargs, is_encoder_decoder=is_encoder_decoder, num_new_tokens=new_ids.shape[1]
    )
    return {name: value for name, value in grown.items() if value is not nothing}


class _NoOutputs(dict):
    """Stands where a forward's outputs belong when none has run; what a model takes from it is this very object."""

    def __getattr__(self, name: str) -> Any:
        return self


def batch_dim(name: str, value: Tensor) -> int:
    return 1 if "position_ids" in name and value.ndim == 3 else 0


def take_rows(value: Any, rows: list[int], name: str = "") -> Any:
    if isinstance(value, Tensor):
        dim = batch_dim(name, value)
        if value.ndim > dim and value.stride(dim) == 0:  # one row, seen many times
            return value.narrow(dim, 0, 1).expand(*(len(rows) if d == dim else -1 for d in range(value.ndim)))
        return value.index_select(dim, torch.tensor(rows, device=value.device))
    if isinstance(value, ModelOutput):
        taken = copy_outputs(value)
        for key in list(taken):
            taken[key] = take_rows(taken[key], rows, key)
        return taken
    if isinstance(value, (tuple, list)):
        return type(value)(take_rows(item, rows, name) for item in value)
    return value


def has_rows(name: str, value: Any, batch: int) -> bool:
    """Whether an argument has a row a sequence (features of images, for one, come in any number)."""
    if isinstance(value, Tensor):
        return value.ndim > batch_dim(name, value) and value.shape[batch_dim(name, value)] == batch
    if name == "encoder_outputs" or isinstance(value, tuple):
        items = value.items() if isinstance(value, ModelOutput) else ((name, item) for item in value)
        return all(has_rows(key, item, batch) for key, item in items)
    return value is None or isinstance(value, (bool, int, float, str))


class DirectInputs:
    """Calls a model with tokens, their positions and a cache, and nothing else: for rows of any lengths."""

    def __init__(self, model: Any):
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        parameters = inspect.signature(model.forward).parameters
        self.position_argument = next((n for n in ("decoder_position_ids", "position_ids") if n in parameters), None)
        self.position_modules = [] if self.position_argument else _position_modules(model)

    def __call__(self, tokens: Tensor, positions: Tensor, cache: Any, encoder_outputs: Any = None) -> dict[str, Any]:
        """For ``tokens (rows, T)`` at ``positions (rows, T)``."""
        inputs = {CACHE_NAME: cache, "use_cache": True}
        inputs["decoder_input_ids" if self.is_encoder_decoder else "input_ids"] = tokens
        if self.is_encoder_decoder:
            inputs["encoder_outputs"] = encoder_outputs
        if self.position_argument is not None:
            inputs[self.position_argument] = positions
        return inputs

    @contextmanager
    def placed(self, positions: Tensor) -> Iterator[None]:
        """Models that make positions of their cache's one length get each row's ``(rows,)`` at their position
        embedding within the block."""
        if not self.position_modules:
            yield
            return
        with Forwards() as forwards:
            for module in self.position_modules:
                if forwards.put(module, _positioned_forward, positions) is None:
                    raise UnsupportedError(f"the forward of its {type(module).__name__} was replaced")
            yield


def stand_in_states(states: Tensor, rows: int, width: int) -> BaseModelOutput:
    """An encoder's output whose keys and values are cached: what is left to read off it is shape, dtype and device."""
    return BaseModelOutput(last_hidden_state=states.new_zeros(()).expand(rows, width, states.shape[-1]))


def _position_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Position embeddings of the decoder that can be told positions."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else model
    return [
        module
        for name, module in decoder.named_modules()
        if "position" in name.rpartition(".")[2]
        and "position_ids" in inspect.signature(type(module).forward).parameters  # the instance's may be another step's
    ]


def _positioned_forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    use = here(self)
    if use is None:
        return type(self).forward(self, *args, **kwargs)
    out = type(self).forward(self, *args, **(kwargs | {"position_ids": use.value}))
    return out.reshape(len(use.value), 1, out.shape[-1])
