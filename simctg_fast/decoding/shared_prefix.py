"""The attention function that lets k candidates read one copy of their prefix.

Registered with transformers' attention *and* mask interfaces under :data:`NAME`. A model's configuration names it only
while one of our steps runs; a forward that is not ours (another thread, a logits processor) meets it without a step in
its own thread and gets the attention the model was configured with.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ..ops.shared_prefix_attention import shared_prefix_attention
from .prefix_cache import PrefixCache, PrefixCacheLayer

NAME = "simctg_fast_shared_prefix"

# Arguments that carry nothing an attention over explicit masks needs. Any other one that is set makes us refuse.
_IGNORABLE = frozenset(
    {"position_ids", "cache_position", "use_cache", "is_causal", "output_attentions", "output_hidden_states"}
    | {"output_router_logits", "return_dict", "layer_idx", "logits_to_keep", "num_items_in_batch", "token_type_ids"}
    | {"position_embeddings", "mm_token_type_ids", "deterministic"}
)


class _Traced:
    """The step of a forward that is being traced by `torch.compile`; set within the trace, so no other sees it."""

    step: SharedPrefixStep | None = None


_step = threading.local()
traced = _Traced()
_switch_lock = threading.Lock()
_switched: dict[int, _Switched] = {}  # by id(config)


class SharedPrefixUnsupportedError(Exception):
    """The model did something the shared-prefix attention cannot honour; the message says what."""


class SharedPrefixStep:
    """What the attention function must know during one forward over ``candidates`` rows a sequence."""

    def __init__(self, cache: PrefixCache, cross_cache, candidates: int):
        self.cache = cache
        self.candidates = candidates
        # A decoder without cross-attention leaves them empty.
        cross = [] if cross_cache is None else [layer for layer in cross_cache.layers if layer.keys is not None]
        self.cross = {layer.keys.data_ptr(): layer for layer in cross}
        self.windows: dict[int, tuple[torch.Tensor, int]] = {}  # id(mask) -> the mask (kept alive), its window
        self.calls: set[int] = set()  # id(layer) of those that attention calls have read

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        self._check_arguments(module, dropout, kwargs)
        layer, new_key, new_value = self._find(module, query, key, value)
        self._mark_read(layer)
        prefix = self._read(module, layer, key, value, attention_mask, position_bias, has_own=new_key is not None)
        out = shared_prefix_attention(
            query,
            new_key=new_key,
            new_value=new_value,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=softcap,
            sinks=s_aux,
            **prefix,
        )
        return out, None

    def _read(
        self,
        module: torch.nn.Module,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_bias: torch.Tensor | None,
        has_own: bool,
    ) -> dict[str, Any]:
        """What a candidate sees besides itself (``has_own``: it has a key of its own, which cross-attention lacks), as
        arguments of `shared_prefix_attention`."""
        shared = key.shape[2] - has_own
        mask, bias = self._mask_and_bias(attention_mask, position_bias, key.shape[2])
        # A window is a matter of the mask alone: some models name one to their attention that their masks do not have.
        # Where the mask was made with it, what lies before need not even be read. It counts the candidate itself.
        window = self.windows.get(id(attention_mask), (None, None))[1]
        start = max(0, shared + 1 - window) if window is not None and has_own else 0
        prefix = {"key": layer.keys, "value": layer.values, "length": shared}
        return prefix | {"mask": mask, "bias": bias, "window_start": start}

    def _mark_read(self, layer: Any) -> None:
        self.calls.add(id(layer))

    def _was_read(self, layer: Any) -> bool:
        return id(layer) in self.calls

    @staticmethod
    def _check_arguments(module: torch.nn.Module, dropout: float, kwargs: dict) -> None:
        unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _IGNORABLE)
        if unknown or kwargs.get("output_attentions"):
            raise SharedPrefixUnsupportedError(
                f"{type(module).__name__} gives its attention arguments this path does not implement: "
                f"{', '.join(unknown) or 'output_attentions'}"
            )
        if dropout:
            raise SharedPrefixUnsupportedError(f"{type(module).__name__} asks for dropout={dropout} (training mode?)")

    def make_mask(self, *args, **kwargs) -> torch.Tensor | None:
        """What the model's masks are made by while this step runs."""
        mask = sdpa_mask(*args, **kwargs)
        if mask is not None and kwargs.get("local_size") is not None:
            self.windows[id(mask)] = (mask, kwargs["local_size"])
        return mask

    def _find(self, module, query, key, value):
        pointer = key.data_ptr()
        if (layer := self.cross.get(pointer)) is not None:
            if query.shape[0] != key.shape[0] * self.candidates:
                raise SharedPrefixUnsupportedError(f"{type(module).__name__}: unexpected number of query rows")
            return layer, None, None
        for layer in self._layers_at(module):
            if layer.pending is not None and layer.keys.data_ptr() == pointer:
                if layer.values.data_ptr() != value.data_ptr():
                    break
                return layer, *layer.pending
        raise SharedPrefixUnsupportedError(
            f"{type(module).__name__} attends to keys or values other than those its cache returned"
        )

    def _layers_at(self, module: torch.nn.Module) -> Iterator[PrefixCacheLayer]:
        """The layer the module names first, then all of them (layers that share another layer's keys)."""
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and index < len(self.cache.layers):
            yield self.cache.layers[index]
        yield from self.cache.layers

    def _mask_and_bias(
        self, attention_mask: torch.Tensor | None, position_bias: torch.Tensor | None, width: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        mask, bias = None, position_bias
        if attention_mask is not None:
            if attention_mask.ndim != 4 or attention_mask.shape[-2] != 1 or attention_mask.shape[-1] < width:
                raise SharedPrefixUnsupportedError(f"attention mask of shape {tuple(attention_mask.shape)}")
            attention_mask = attention_mask[..., :width]
            if attention_mask.dtype == torch.bool:
                mask = attention_mask
            else:
                bias = attention_mask if bias is None else bias + attention_mask
        if mask is not None and mask.shape[0] != 1 and self.candidates > 1:
            mask = mask[:: self.candidates]  # candidates of one sequence see the same prefix
        return mask, bias

    def check_all_called(self) -> None:
        """Raise unless every layer that was updated was also read through this attention, and none was left out."""
        for index, layer in enumerate(self.cache.layers):
            if layer.pending is None and layer.is_initialized:
                raise SharedPrefixUnsupportedError(f"layer {index} did not write to the cache")
            if layer.pending is not None and not self._was_read(layer):
                raise SharedPrefixUnsupportedError(
                    f"layer {index} computes its own attention and bypasses the attention interface"
                )
        if not any(self._was_read(layer) for layer in self.cache.layers):
            raise SharedPrefixUnsupportedError("the model bypasses the attention interface")
        missed = [index for index, layer in enumerate(self.cross.values()) if not self._was_read(layer)]
        if missed:
            raise SharedPrefixUnsupportedError(f"cross-attention of layer {missed[0]} bypasses the attention interface")


def _original_name(config) -> str:
    """The attention ``config`` was set to. Its entry may go while we look: by then the configuration has it back."""
    entry = _switched.get(id(config))
    name = entry.name if entry is not None else config._attn_implementation_internal
    return name if name != NAME else "sdpa"


def current_step() -> SharedPrefixStep | None:
    # `is_compiling` is true in every thread while one of them compiles; this is true in what is traced alone.
    return traced.step if torch.compiler.is_dynamo_compiling() else getattr(_step, "value", None)


def _attention(module, query, key, value, attention_mask, **kwargs):
    step = current_step()
    if step is not None:
        return step.attend(module, query, key, value, attention_mask, **kwargs)
    name = _original_name(module.config)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return function(module, query, key, value, attention_mask, **kwargs)


def _mask(*args, **kwargs):
    step = current_step()
    if step is not None:
        return step.make_mask(*args, **kwargs)
    name = _original_name(kwargs.get("config"))
    return AttentionMaskInterface._global_mapping.get(name, eager_mask)(*args, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


@dataclass
class _Switched:
    """A configuration that names our attention at the moment: what it named before, and how many steps need it."""

    config: object  # kept alive, so that its id stays its own
    name: str
    users: int = 0


class AttentionSwitch:
    """Points a model's configurations at our attention for the length of a ``with`` block, in any number of threads."""

    def __init__(self, model: torch.nn.Module):
        configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
        self.configs = [c for c in configs.values() if getattr(c, "_attn_implementation_internal", None) is not None]

    @contextmanager
    def __call__(self, step: SharedPrefixStep) -> Iterator[None]:
        with _switch_lock:
            for config in self.configs:
                entry = _switched.get(id(config))
                if entry is None:
                    entry = _switched[id(config)] = _Switched(config, str(config._attn_implementation_internal))
                    config._attn_implementation_internal = NAME
                entry.users += 1
        outer, _step.value = getattr(_step, "value", None), step
        try:
            yield
        finally:
            _step.value = outer
            with _switch_lock:
                for config in self.configs:
                    entry = _switched[id(config)]
                    entry.users -= 1
                    if not entry.users:
                        config._attn_implementation_internal = entry.name
                        del _switched[id(config)]
