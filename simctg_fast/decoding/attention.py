"""The attention function of a decoding step: k candidates read one copy of their prefix, each row its own length of it.

Registered with transformers' attention *and* mask interfaces under :data:`NAME`. A model's configuration names it only
while one of our steps runs; a forward that is not ours (another thread, a logits processor) meets it without a step in
its own thread and gets the attention the model was configured with.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ..ops.shared_prefix_attention import native_call, shared_prefix_attention
from .slots import SlotLayer, Slots, on
from .unsupported import UnsupportedError

NAME = "simctg_fast_shared_prefix"

# Arguments that carry nothing an attention over explicit masks needs. Any other one that is set makes us refuse.
_IGNORABLE = frozenset(
    {"position_ids", "cache_position", "use_cache", "is_causal", "output_attentions", "output_hidden_states"}
    | {"output_router_logits", "return_dict", "layer_idx", "logits_to_keep", "num_items_in_batch", "token_type_ids"}
    | {"position_embeddings", "mm_token_type_ids", "deterministic"}
)


class _Traced:
    """The attention of a forward that is being traced by `torch.compile`; set within the trace, so no other sees it."""

    step: Attention | None = None


_step = threading.local()
traced = _Traced()
_switch_lock = threading.Lock()
_switched: dict[int, _Switched] = {}  # by id(config)


class Attention:
    """What the attention function must know during one forward over the candidates of the first rows of ``slots``.

    Args:
        candidates: rows of the forward a slot; offsets: ``(rows + 1,)``, where slots have numbers of their own: the
            first row of each, and how many there are.
        lengths: ``(rows,)`` positions in use, where rows differ or the host is not to know: masks are then made from
            the model's own mask functions, position by position. None: all rows have the slots' length, and the
            model's masks are taken as it makes them.
        starts: ``(rows,)`` positions of padding in front, with ``lengths``.
        cross: a decoder's cross-attention cache; cross_lengths: ``(rows,)`` positions of it in use, None: all.
        windows: which masks are windows, by their size: found out once and kept by the caller.
    """

    def __init__(
        self,
        slots: Slots,
        candidates: int,
        *,
        offsets: Tensor | None = None,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        cross: Any = None,
        cross_lengths: Tensor | None = None,
        windows: dict[int, bool] | None = None,
    ):
        self.slots, self.candidates, self.offsets = slots, candidates, offsets
        self.lengths, self.starts = lengths, starts
        self.known_windows: dict[int, bool] = {} if windows is None else windows
        self.masks: list[tuple[Tensor, Tensor | None, int | None]] = []  # the model's, what we read it as, its window
        self.biases: list[tuple[Tensor, Tensor]] = []  # the model's, each row's own
        self.cross_lengths = cross_lengths
        # A decoder without cross-attention leaves them empty.
        layers = [] if cross is None else [layer for layer in cross.layers if layer.keys is not None]
        self.cross = {layer.keys.data_ptr(): layer for layer in layers}
        self.cross_read: set[int] = set()

    @property
    def width(self) -> int:
        """Positions of the prefix that rows may see: the longest row's, or all there is room for."""
        layer = self.slots.layers[0]
        return layer.get_seq_length()

    @property
    def was_used(self) -> bool:
        """Whether a layer was read through it."""
        return bool(self.cross_read) or any(layer.was_read for layer in self.slots.layers)

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        self._check_arguments(module, dropout, kwargs)
        new_key, new_value = self._find(module, query, key, value)
        call = self._arguments(module, query, key, value, new_key, new_value, attention_mask, position_bias)
        if scaling is not None:
            call["scaling"] = scaling
        return shared_prefix_attention(**call, softcap=softcap, sinks=s_aux), None

    def attend_natively(
        self,
        module: torch.nn.Module,
        layer: SlotLayer,
        query: Tensor,
        new_key: Tensor,
        new_value: Tensor,
        attention_mask: Tensor | None,
    ) -> tuple[Any, Any] | None:
        """What `attend` would do, for this layer and others of its layout, as `block_layers.decoder_blocks` takes it;
        and what has to be kept alive meanwhile. None: it is not for C++."""
        key, value = layer.seen
        return native_call(**self._arguments(module, query, key, value, new_key, new_value, attention_mask))

    def _arguments(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        new_key: Tensor | None,
        new_value: Tensor | None,
        attention_mask: Tensor | None,
        position_bias: Tensor | None = None,
    ) -> dict[str, Any]:
        """Those of `shared_prefix_attention`."""
        read = self._read_ragged if self.lengths is not None else self._read_even
        seen = read(module, key, attention_mask, position_bias, new_key is None)
        seen |= {name: self._of_sequences(seen[name]) for name in ("mask", "bias")}
        return {
            "query": query,
            "key": key,
            "value": value,
            "length": key.shape[2] - (new_key is not None),
            "new_key": new_key,
            "new_value": new_value,
            "scaling": query.shape[-1] ** -0.5,
            "offsets": self.offsets,
            **seen,
        }

    # ---- masks ----------------------------------------------------------------------------------------------------

    def make_mask(self, *args, **kwargs) -> Tensor | None:
        """What the model's masks are made by while this step runs."""
        size = kwargs.get("local_size")
        if self.lengths is None:
            mask = sdpa_mask(*args, **kwargs)
            if mask is not None and size is not None:
                self.masks.append((mask, mask, size))
            return mask
        padding = kwargs.get("attention_mask")  # BART and its kin make one of ones; where it is static, none is asked
        if padding is not None and not self.slots.extent.static and not bool(padding.all()):
            raise UnsupportedError("it makes an attention mask of its own")
        function = kwargs.get("mask_function", causal_mask_function)
        if function is causal_mask_function or kwargs.get("q_length") != 1:
            return None
        if kwargs.get("allow_is_bidirectional_skip"):
            return None
        device, width = self.lengths.device, self.width
        if size is not None:
            if size not in self.known_windows:
                self.known_windows[size] = is_window(function, size, device)
            if self.known_windows[size]:
                mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=device)
                self.masks.append((mask, None, size))
                return mask
        ends = self.lengths[:, None, None, None]
        place = torch.arange(width + 1, device=device)[None, None, None]
        place = torch.where(place == width, ends, place)  # the last column is the candidate itself
        rows = torch.arange(len(self.lengths), device=device)[:, None, None, None]
        offset = 0 if self.starts is None else self.starts[:, None, None, None]
        mask = function(rows, torch.zeros_like(rows), ends - offset, place - offset)
        mask = mask.expand(len(self.lengths), 1, 1, width + 1).contiguous()
        self.masks.append((mask, mask, None))
        return mask

    def _read_even(
        self, _: torch.nn.Module, key: Tensor, attention_mask: Tensor | None, bias: Tensor | None, is_cross: bool
    ) -> dict[str, Any]:
        """What a candidate sees besides itself, as arguments of `shared_prefix_attention`: as the model's mask says."""
        mask, width = None, key.shape[2]
        if attention_mask is not None:
            if attention_mask.ndim != 4 or attention_mask.shape[-2] != 1 or attention_mask.shape[-1] < width:
                raise UnsupportedError(f"attention mask of shape {tuple(attention_mask.shape)}")
            cut = attention_mask[..., :width]
            if cut.dtype == torch.bool:
                mask = cut
            else:
                bias = cut if bias is None else bias + cut
        if mask is not None and mask.shape[0] != 1 and self.candidates > 1 and self.offsets is None:
            mask = mask[:: self.candidates]  # candidates of one sequence see the same prefix
        # A window is a matter of the mask alone: some models name one to their attention that their masks do not have.
        # Where the mask was made with it, what lies before need not even be read. It counts the candidate itself.
        window = next((size for theirs, _, size in self.masks if theirs is attention_mask), None)
        start = 0 if window is None or is_cross else max(0, width - window)
        return {"mask": mask, "bias": bias, "window_start": start}

    def _of_sequences(self, x: Tensor | None) -> Tensor | None:
        """Of a mask or bias of all rows, where slots have numbers of their own, those of the slots: candidates of one
        see the same prefix."""
        if x is None or self.offsets is None or x.shape[0] != int(self.offsets[-1]):
            return x
        return x[self.offsets[:-1].to(x.device)]

    def _read_ragged(
        self, module: torch.nn.Module, key: Tensor, attention_mask: Tensor | None, bias: Tensor | None, is_cross: bool
    ) -> dict[str, Any]:
        """The same for rows of different lengths."""
        mask = window = None
        if attention_mask is not None:
            known = [(mask, size) for theirs, mask, size in self.masks if theirs is attention_mask]
            if not known and (self.slots.extent.static or attention_mask.dtype != torch.bool):
                raise UnsupportedError(f"{type(module).__name__} makes an attention mask of its own")
            mask, window = known[0] if known else (attention_mask, None)
        if bias is not None and not is_cross:
            bias = self._shifted(bias, key.shape[2] - 1)
        lengths, starts = (self.cross_lengths, None) if is_cross else (self.lengths, self.starts)
        return {
            "mask": mask,
            "bias": bias,
            "window": window,
            "lengths": None if lengths is None else on(key.device, lengths),
            "starts": None if starts is None else on(key.device, starts),
        }

    def _shifted(self, bias: Tensor, width: int) -> Tensor:
        """The model's bias ``(1, H, 1, width + 1)`` is that of a query at ``width``. A query at its row's length sees a
        position at the same distance as that one sees the position further back by the difference."""
        for theirs, shifted in self.biases:
            if theirs is bias:
                return shifted
        if bias.ndim != 4 or bias.shape[0] != 1 or bias.shape[2] != 1 or bias.shape[3] != width + 1:
            raise UnsupportedError(f"position bias of shape {tuple(bias.shape)}")
        assert self.lengths is not None
        positions = torch.arange(width + 1, device=bias.device)
        index = (positions + (width - on(bias.device, self.lengths)[:, None])).clamp_(max=width)
        shifted = bias[0, :, 0][:, index].transpose(0, 1)[:, :, None].contiguous()  # (rows, H, 1, width + 1)
        self.biases.append((bias, shifted))
        return shifted

    # ---- checks ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _check_arguments(module: torch.nn.Module, dropout: float, kwargs: dict) -> None:
        unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in _IGNORABLE)
        if unknown or kwargs.get("output_attentions"):
            raise UnsupportedError(
                f"{type(module).__name__} gives its attention arguments this path does not implement: "
                f"{', '.join(unknown) or 'output_attentions'}"
            )
        if dropout:
            raise UnsupportedError(f"{type(module).__name__} asks for dropout={dropout} (training mode?)")

    def _find(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The candidates' own keys and values of the layer whose cache returned ``key``; None for cross-attention."""
        if torch.compiler.is_dynamo_compiling():  # addresses are not known yet; an eager step has been checked by them
            for layer in self.slots.layers:
                if layer.pending is not None and layer.keys is key and layer.values is value:
                    layer.was_read = True
                    return layer.pending
            raise UnsupportedError(f"{type(module).__name__} attends to keys other than its cache's")
        pointer = key.data_ptr()
        if (cross := self.cross.get(pointer)) is not None:
            rows = key.shape[0] * self.candidates if self.offsets is None else int(self.offsets[-1])
            if query.shape[0] != rows:
                raise UnsupportedError(f"{type(module).__name__}: unexpected number of query rows")
            self.cross_read.add(id(cross))
            return None, None
        for layer in self._layers_at(module):
            if layer.pending is not None and layer.keys.data_ptr() == pointer:
                if layer.values.data_ptr() != value.data_ptr():
                    break
                layer.was_read = True
                return layer.pending
        raise UnsupportedError(f"{type(module).__name__} attends to keys or values other than those its cache returned")

    def _layers_at(self, module: torch.nn.Module) -> Iterator[SlotLayer]:
        """The layer the module names first, then all of them (layers that share another layer's keys)."""
        index, layers = getattr(module, "layer_idx", None), self.slots.layers
        if isinstance(index, int) and index < len(layers):
            yield layers[index]
        yield from layers

    def check_all_called(self) -> None:
        """Raise unless every layer that was updated was also read through this attention, and none was left out."""
        for index, layer in enumerate(self.slots.layers):
            if layer.pending is None and layer.is_initialized:
                raise UnsupportedError(f"layer {index} did not write to the cache")
            if layer.pending is not None and not layer.was_read:
                raise UnsupportedError(f"layer {index} computes its own attention and bypasses the attention interface")
        if not any(layer.was_read for layer in self.slots.layers):
            raise UnsupportedError("the model bypasses the attention interface")
        missed = [index for index, layer in enumerate(self.cross.values()) if id(layer) not in self.cross_read]
        if missed:
            raise UnsupportedError(f"cross-attention of layer {missed[0]} bypasses the attention interface")


def is_window(function: Callable, size: int, device: torch.device) -> bool:
    """Whether a mask function lets a query see itself and the ``size − 1`` positions before it, wherever it stands."""
    zero = torch.zeros((), dtype=torch.long, device=device)
    for query in (size - 1, size, size + 1, 2 * size - 1, 2 * size + 3, 3 * size):
        place = torch.arange(query + 1, device=device)
        seen = function(zero, zero, zero + query, place).expand(query + 1)
        if not torch.equal(seen, place > query - size):
            return False
    return True


def _original_name(config) -> str:
    """The attention ``config`` was set to. Its entry may go while we look: by then the configuration has it back."""
    entry = _switched.get(id(config))
    name = entry.name if entry is not None else config._attn_implementation_internal
    return name if name != NAME else "sdpa"


def current_step() -> Attention | None:
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
    def __call__(self, step: Attention) -> Iterator[None]:
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
