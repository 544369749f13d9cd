"""Inputs for a model nobody told it about: several guesses a kind, of which transformers' own greedy search decides."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch

from .build import AUDIO_TOKEN, IMAGE, IMAGE_TOKEN, PATCH

Inputs = dict[str, torch.Tensor]
LENGTH, LONGEST_ID = 11, 75  # longer than every window; the ids above are images and sounds
_PLACEHOLDER = re.compile(r"(.*_)?(image|img|video|vision|audio|speech|[be]o[ia])(_.*)?_token_(id|index)")


def _ids(rows: int, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, LONGEST_ID, (rows, length), generator=torch.Generator().manual_seed(seed))


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(rows: int, right: bool = False, length: int = LENGTH, seed: int = 0) -> Inputs:
    """Token ids, of which the second row has three fewer (padded on the left, or on the ``right``)."""
    ids = _ids(rows, length, seed)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, -3:] = 0
        if not right:
            mask = mask.flip(1)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def _with_marks(model: Any, kind: str, rows: int, count: int) -> Inputs:
    """Text in which ``count`` positions of every row stand for an image or a sound."""
    starts = (getattr(model.config, f"{name}_start_token_id", None) for name in ("vision", "image"))
    start = next((start for start in starts if start is not None), None) if kind == "image" else None
    inputs = text(rows)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    marks = torch.full((rows, count), _mark(model, kind))
    if isinstance(start, int):  # by which some count a row's images
        marks = torch.nn.functional.pad(marks, (1, 0), value=start)
    ids = torch.cat([ids[:, :5], marks, ids[:, 5:]], dim=1)
    mask = torch.cat([mask[:, :5], torch.ones_like(marks), mask[:, 5:]], dim=1)
    return {"input_ids": ids, "attention_mask": mask}


def _mark(model: Any, kind: str) -> int:
    names = ("image_token_id", "image_token_index") if kind == "image" else ("audio_token_id", "audio_token_index")
    found = next((v for n in names if isinstance(v := getattr(model.config, n, None), int)), None)
    return found if found is not None else (IMAGE_TOKEN if kind == "image" else AUDIO_TOKEN)


def placeholders(config: Any) -> list[int]:
    """Ids that stand for images and sounds, their beginnings and ends: a text that came to hold one would want another
    image. (Random weights choose any.)"""
    found = set()
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            found |= set(placeholders(value))
        elif type(value) is int and _PLACEHOLDER.fullmatch(name):
            found.add(value)
    return sorted(found)


def kinds(model: Any) -> list[str]:
    """What this model can be given: ``"text"``, ``"image"``, ``"audio"``."""
    names = set(inspect.signature(model.forward).parameters)
    found = []
    if "input_ids" in names and model.main_input_name == "input_ids":
        found.append("text")
    if {"pixel_values", "images"} & names or model.main_input_name in ("pixel_values", "flattened_patches"):
        found.append("image")
    if {"input_features", "input_values"} & names or model.main_input_name in ("input_features", "input_values"):
        found.append("audio")
    return found or ["text"]


def guesses(model: Any, kind: str, rows: int) -> Iterator[Inputs]:
    """Inputs of ``kind`` that this model may accept, the likeliest first."""
    names = set(inspect.signature(model.forward).parameters)
    encoder_decoder = bool(model.config.is_encoder_decoder)
    if kind == "text":
        plain = text(rows, right=encoder_decoder)
        yield plain
        if "mm_token_type_ids" in names or "token_type_ids" in names:
            name = "mm_token_type_ids" if "mm_token_type_ids" in names else "token_type_ids"
            yield plain | {name: torch.zeros_like(plain["input_ids"])}
        return
    features = _images(model, names, rows) if kind == "image" else _sounds(model, names, rows)
    for media in features:
        if "input_ids" not in names or (encoder_decoder and model.main_input_name != "input_ids"):
            yield media
            if "decoder_input_ids" not in names:
                yield media | text(rows)
            continue
        for count in (4, 1, 16, 2, 0, 64, 5):
            yield media | _with_marks(model, kind, rows, count)


def corrected(model: Any, kind: str, inputs: Inputs, error: str) -> Inputs | None:
    """``inputs`` with as many marks as the model says, in its error message, that it has features."""
    counts = [int(n) for n in re.findall(r"features:?\D{0,12}(\d+)", error)]
    if not counts or "input_ids" not in inputs:
        return None
    rows = len(inputs["input_ids"])
    for count in counts:
        per_row = count // rows
        if 0 < per_row <= 100:
            marks = _with_marks(model, kind, rows, per_row)
            return {n: v for n, v in inputs.items() if n not in marks} | marks
    return None


def _images(model: Any, names: set[str], rows: int) -> Iterator[Inputs]:
    if model.main_input_name == "flattened_patches":
        width = getattr(getattr(model.config, "vision_config", model.config), "patch_embed_hidden_size", 32)
        patches = _noise(rows, 6, 2 + width)
        patches[:, :, :2] = torch.arange(1, 7)[:, None].float()
        yield {"flattened_patches": patches, "attention_mask": torch.ones(rows, 6)}
        return
    vision = getattr(model.config, "vision_config", None)
    side = getattr(vision, "image_size", None) or getattr(model.config, "image_size", None) or IMAGE
    side = max(side) if isinstance(side, (list, tuple)) else side
    patch = getattr(vision, "patch_size", None) or PATCH
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    if "image_grid_thw" in names:
        temporal = getattr(vision, "temporal_patch_size", 1) or 1
        merge = getattr(vision, "spatial_merge_size", 2) or 2
        grid = torch.tensor([[1, 2 * merge, 2 * merge]] * rows)
        flat = _noise(int(grid.prod(dim=1).sum()), channels * temporal * patch * patch)
        for pixels in (flat, flat.view(len(flat), channels, patch, patch * temporal)[..., :patch]):
            yield {"pixel_values": pixels, "image_grid_thw": grid}
    pixels = _noise(rows, channels, side, side)
    if "image_sizes" in names:
        yield {"pixel_values": pixels[:, None].expand(-1, 3, -1, -1, -1).contiguous(),
               "image_sizes": torch.tensor([[side, 2 * side]] * rows)}  # fmt: skip
        yield {"pixel_values": pixels, "image_sizes": torch.tensor([[side, side]] * rows)}
    if "pixel_attention_mask" in names:
        yield {"pixel_values": pixels[:, None]}
        yield {"pixel_values": pixels[:, None],
               "pixel_attention_mask": torch.ones(rows, 1, side, side, dtype=torch.bool)}  # fmt: skip
    if "aspect_ratio_ids" in names:
        yield {"pixel_values": pixels[:, None, None], "aspect_ratio_ids": torch.ones(rows, 1, dtype=torch.long),
               "aspect_ratio_mask": torch.ones(rows, 1, 4, dtype=torch.long),
               "cross_attention_mask": torch.ones(rows, LENGTH, 1, 4, dtype=torch.long)}  # fmt: skip
    if "qformer_input_ids" in names:
        question = _ids(rows, 5, seed=2)
        yield {"pixel_values": pixels, "qformer_input_ids": question,
               "qformer_attention_mask": torch.ones_like(question)}  # fmt: skip
    if "image_attention_mask" in names:
        yield {"pixel_values": pixels[:, None], "image_attention_mask": torch.ones(rows, LENGTH, 1, dtype=torch.long)}
    if "pixel_values" in names or model.main_input_name == "pixel_values":
        yield {"pixel_values": pixels}
        yield {"pixel_values": pixels[:, None]}


def _sounds(model: Any, names: set[str], rows: int) -> Iterator[Inputs]:
    if "input_values" in names or model.main_input_name == "input_values":
        yield {"input_values": _noise(rows, 1600)}
        yield {"input_values": _noise(rows, 40, 16)}
    if "input_features" not in names and model.main_input_name != "input_features":
        return
    parts = (getattr(model.config, name, None) for name in ("audio_config", "encoder_config", "speech_config"))
    audio = next((part for part in parts if part), model.config)
    bins = next((v for n in ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim",
                             "input_dim", "n_mels") if isinstance(v := getattr(audio, n, None), int)), 16)  # fmt: skip
    frames = 2 * (getattr(audio, "max_source_positions", None) or 20)
    for shape in ((rows, bins, frames), (rows, frames, bins), (rows, 40, bins), (rows, bins, 40)):
        features = _noise(*shape)
        length = shape[1] if shape[2] == bins else shape[2]
        yield {"input_features": features}
        for name in ("feature_attention_mask", "input_features_mask", "features_mask", "attention_mask"):
            if name in names:
                yield {"input_features": features, name: torch.ones(rows, length, dtype=torch.long)}
