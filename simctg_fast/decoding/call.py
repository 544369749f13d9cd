"""What a trial runs: a call of ``generate``, and a small copy of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationConfig
from transformers.modeling_outputs import ModelOutput

from .caches import new_cache, without_caches
from .inputs import copy_outputs, grow_kwargs, has_rows, repeat_rows, take_rows
from .unsupported import FAILURES

PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")  # what PEFT learns as keys and values


@dataclass(frozen=True)
class Call:
    """What ``generate`` was called with, before anything of ours touched it. ``model_kwargs`` may hold the cache that
    transformers made for it, still empty; ``max_length`` the positions it can reach, or None; ``table`` the size of the
    model's table of positions, or None."""

    model: Any
    input_ids: torch.Tensor
    model_kwargs: dict[str, Any]
    generation_config: GenerationConfig
    top_k: int
    max_length: int | None
    table: int | None

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    @property
    def limit(self) -> int:
        """Positions that a trial may use, the candidates' and a continuation aside."""
        return (self.table or 1 << 30) - 4

    @property
    def mask_name(self) -> str:
        return "decoder_attention_mask" if self.is_encoder_decoder else "attention_mask"

    def new_cache(self) -> Any:
        """A cache as ``generate`` makes it for this model; None where it makes none."""
        return new_cache(self.model, self.generation_config, len(self.input_ids), self.max_length)

    def kind(self) -> tuple:
        """What a verdict on this call holds for: which arguments are given, and what of them models look at."""
        kind: list[Any] = [self.top_k == 1, len(self.input_ids) == 1, self.windows_reached()]
        if (wrapper := learned_prompt(self.model)) is not None:
            kind.append((id(wrapper), wrapper.active_adapter, wrapper.active_peft_config.peft_type))
        for name, value in sorted(self.model_kwargs.items()):
            if value is None or isinstance(value, Cache):
                continue
            if isinstance(value, torch.Tensor):
                padded = name.endswith("mask") and value.ndim == 2 and not bool(value.all())
                kind.append((name, value.ndim, value.dtype, padded))
            elif isinstance(value, dict):
                kind.append((name, tuple(key for key, part in value.items() if part is not None)))
            else:
                kind.append((name, value if isinstance(value, (bool, int, float, str)) else type(value).__name__))
        return tuple(kind)

    def windows_reached(self) -> tuple[int, ...]:
        """Sliding windows that the call's positions reach past."""
        return reached_windows(self.model.config, math.inf if self.max_length is None else self.max_length)


def reached_windows(config: Any, reach: float = math.inf) -> tuple[int, ...]:
    """Sliding windows of a decoder that texts of ``reach`` positions go beyond, in order."""
    found = {
        size
        for name, value in vars(config.get_text_config(decoder=True)).items()
        if "window" in name or name == "attention_chunk_size"
        for size in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(size, int) and not isinstance(size, bool) and 0 < size < reach
    }
    return tuple(sorted(found))


def learned_prompt(model: Any) -> Any:
    """The PEFT model that ``generate`` was called on, where it puts a learned prompt before the decoder's text."""
    wrapper = getattr(model.prepare_inputs_for_generation, "__self__", model)
    config = None if wrapper is model else getattr(wrapper, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return None
    if model.config.is_encoder_decoder and config.peft_type not in PREFIXES:
        return None  # it stands before the source, which is encoded by now
    return wrapper


@dataclass(frozen=True)
class Rows:
    ids: torch.Tensor  # (rows, n)
    kwargs: dict[str, Any]  # without caches


def _softer(name: str, value: Any, rows: int) -> Any:
    """What an encoder sees or has made, the second row by a tenth weaker than the first."""
    if isinstance(value, ModelOutput):
        softer = copy_outputs(value)
        for key in list(softer):
            softer[key] = _softer(key, softer[key], rows)
        return softer
    if type(value) is dict:
        return {key: _softer(key, part, rows) for key, part in value.items()}
    if isinstance(value, list) and value and len(value) % rows == 0:
        half = len(value) // rows
        return [*value[:half], *(0.9 * part if isinstance(part, torch.Tensor) else part for part in value[half:])]
    apart = ("mask", "position", "probs", "logits")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or any(word in name for word in apart):
        return value
    if value.ndim < 2 or value.shape[0] % rows:
        return value
    half = value.shape[0] // rows
    return torch.cat([value[:half], 0.9 * value[half:]])


def copy_of(call: Call) -> Rows:
    """The row of a call of one; two different ones of a larger call, or the whole where it cannot be taken apart."""
    ids, kwargs = call.input_ids, without_caches(call.model_kwargs)
    batch = len(ids)
    if batch == 1 or not all(has_rows(name, value, batch) for name, value in kwargs.items()):
        return Rows(ids, kwargs)
    masks = [kwargs.get(name) for name in ("attention_mask", "decoder_attention_mask")]
    masks = [mask for mask in masks if isinstance(mask, torch.Tensor) and mask.ndim == 2]
    real = sum((mask.sum(dim=-1).cpu() for mask in masks), torch.zeros(batch, dtype=torch.int64))
    first, second = int(real.argmax()), int(real.argmin())
    if first == second:  # rows of one length; those of num_return_sequences are one text
        others = (ids != ids[:1]).any(dim=-1).nonzero().flatten().tolist()
        if not others:
            return _two_of(call, *_rows(ids, kwargs, [0]))
        second = others[0]
    return Rows(*_rows(ids, kwargs, [first, second]))


def _rows(ids: torch.Tensor, kwargs: dict[str, Any], rows: list[int]) -> tuple[torch.Tensor, dict[str, Any]]:
    return take_rows(ids, rows), {name: take_rows(value, rows, name) for name, value in kwargs.items()}


def _two_of(call: Call, ids: torch.Tensor, kwargs: dict[str, Any]) -> Rows:
    """A row twice, the second time with its tokens turned around, and what its encoder has made a little weaker."""
    try:
        two_ids, doubled = repeat_rows(call.model, ids, kwargs, 2)
    except FAILURES:  # a model that cannot repeat its own inputs; its candidates will say so
        return Rows(ids, kwargs)
    if _is_text(call, kwargs):
        mask = kwargs.get(call.mask_name)
        real_places = torch.ones_like(two_ids[1], dtype=torch.bool) if mask is None else mask[0].bool()
        if len(real_places) == two_ids.shape[1]:
            two_ids = two_ids.clone()
            two_ids[1, real_places] = two_ids[1, real_places].roll(1)
    return Rows(two_ids, {name: _softer(name, value, 2) for name, value in doubled.items()})


def _is_text(call: Call, kwargs: dict[str, Any]) -> bool:
    """Whether the prompt is token ids alone, which may be cut and turned around."""
    allowed = {call.mask_name, "use_cache", "logits_to_keep", "position_ids", "token_type_ids"}
    if call.is_encoder_decoder:
        allowed |= {"attention_mask", "encoder_outputs", "decoder_position_ids"}
    return all(value is None or isinstance(value, bool) or name in allowed for name, value in kwargs.items())


def cut(call: Call, rows: Rows, width: int, reach: int) -> Rows:
    """``rows`` cut to ``width`` positions where that is possible, and then continued up to ``reach``."""
    ids, kwargs = rows.ids, rows.kwargs
    length, mask = ids.shape[1], kwargs.get(call.mask_name)
    if _is_text(call, kwargs) and length > width and (mask is None or mask.shape == ids.shape):
        start = length - width
        if mask is not None and not bool(mask.all()):  # some of the padding stays
            start = min(start, max(0, int((mask == 0).sum(dim=-1).max()) - width // 4))
        part = slice(start, start + width)
        if mask is None or bool(mask[:, part].any(dim=-1).all()):
            positions = "decoder_position_ids" if call.is_encoder_decoder else "position_ids"
            ids, kwargs = ids[:, part], _sliced(kwargs, [call.mask_name, "token_type_ids", positions], length, part)
    missing = reach - max(ids.shape[1], width_of(call, kwargs))
    if missing <= 0:
        return Rows(ids, kwargs)
    generator = torch.Generator().manual_seed(0)
    vocabulary = call.model.config.get_text_config(decoder=True).vocab_size
    new = torch.randint(min(3, vocabulary - 1), min(vocabulary, 1000), (len(ids), missing), generator=generator)
    new = new.to(ids.device)
    return Rows(torch.cat([ids, new], dim=1), grow_kwargs(call.model, kwargs, new))


def _sliced(kwargs: dict[str, Any], names: list[str], length: int, part: slice) -> dict[str, Any]:
    found = {name: kwargs[name] for name in names if isinstance(kwargs.get(name), torch.Tensor)}
    return kwargs | {name: value[..., part] for name, value in found.items() if value.shape[-1] == length}


def width_of(call: Call, kwargs: dict[str, Any]) -> int:
    embeds = None if call.is_encoder_decoder else kwargs.get("inputs_embeds")
    return 0 if embeds is None else embeds.shape[1]
