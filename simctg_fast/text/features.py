"""Hidden states of texts: of every token, or one vector a text."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import is_integer, require, user_path
from ..cpu.modules import fast_linears
from ..loading import load_backbone
from .batches import by_length, cut_rows, pad_token, padded_rows
from .feature_file import POOLINGS, NewFile, SafetensorsWriter, check_metadata, free_target, read_features
from .files import is_utf8
from .texts import read_lines, short, text_list

__all__ = ["Features", "extract_features", "load_backbone", "load_features", "read_texts"]

_NARROW = (torch.float16, torch.bfloat16)
_DTYPES = (torch.float32, *_NARROW)


@dataclass(repr=False)
class Features:
    """Features of N texts, in their order.

    Attributes:
        values: ``(N, D)`` where they are pooled; else ``(sum of lengths, D)``, text after text, without padding.
        lengths: ``(N,)`` int64, tokens of each text, special tokens included.
        pooling: ``"none"``, ``"mean"``, ``"cls"`` or ``"last"``.
        truncated: indices of the texts that ``max_length`` cut.
    """

    values: Tensor
    lengths: Tensor
    pooling: str
    truncated: tuple[int, ...] = ()

    def __repr__(self) -> str:
        shape, dtype = tuple(self.values.shape), str(self.values.dtype).removeprefix("torch.")
        cut = f", {len(self.truncated)} truncated" if self.truncated else ""
        return f"Features({len(self)} texts, values {shape} {dtype}, pooling={self.pooling!r}{cut})"

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:
        """``(D,)``, or ``(T, D)`` of one text."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be in [{-len(self)}, {len(self)}), got {index}")
        if self.pooling != "none":
            return self.values[index]
        start = int(self.lengths[: index % len(self)].sum())
        return self.values[start : start + int(self.lengths[index])]

    def padded(self) -> tuple[Tensor, Tensor]:
        """``(N, T, D)``, zero after each text's end, and its mask ``(N, T)`` bool.

        Raises:
            ValueError: the features are pooled.
        """
        if self.pooling != "none":
            raise ValueError(f"padded() is for pooling='none', these features are pooled by {self.pooling!r}")
        longest = int(self.lengths.max()) if len(self) else 0
        mask = torch.arange(longest)[None] < self.lengths[:, None]
        values = self.values.new_zeros(len(self), longest, self.values.shape[-1])
        values[mask] = self.values
        return values, mask

    def save(self, path: str | os.PathLike[str]) -> None:
        """To ``.safetensors`` or ``.npz``: ``features`` and ``lengths`` (and ``pooling``).

        Folders that are missing are made. A file of features that is there already is replaced when the new one is
        whole, any other file is left alone.

        Raises:
            ValueError: another ending, bfloat16 to ``.npz``, or a file that holds something else.
            OSError: no space, no right to write.
        """
        path = user_path(path)
        values, lengths = self.values.detach().cpu(), self.lengths.cpu()
        if path.suffix == ".safetensors":
            tensors = {"features": values, "lengths": lengths}
            places = {name: (each.dtype, each.shape) for name, each in tensors.items()}
            with SafetensorsWriter(path, places, {"pooling": self.pooling}) as writer:
                for name, each in tensors.items():
                    writer[name].copy_(each)
        elif path.suffix == ".npz":
            import numpy as np

            if self.values.dtype == torch.bfloat16:
                raise ValueError("numpy has no bfloat16: give dtype=torch.float32 or torch.float16, or .safetensors")
            new = NewFile(path)
            try:
                np.savez(new.file, features=values.numpy(), lengths=lengths.numpy(), pooling=np.array(self.pooling))
                new.file.flush()
            except BaseException as error:
                new.discard()
                if isinstance(error, OSError):
                    raise OSError(error.errno, error.strerror, str(path)) from error
                raise
            new.commit()
        else:
            raise ValueError(f"path must end in .safetensors or .npz, got {str(path)!r}")


def load_features(path: str | os.PathLike[str]) -> Features:
    """What `Features.save`, ``extract_features(out=)`` and `simctg-fast features` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or is damaged.
    """
    return Features(*read_features(user_path(path)))


@torch.no_grad()
def extract_features(
    model: Any,
    tokenizer: Any,
    texts: str | Iterable[str],
    layer: int = -1,
    pooling: str = "none",
    *,
    max_length: int | None = None,
    max_tokens: int = 4096,
    dtype: torch.dtype = torch.float32,
    out: str | os.PathLike[str] | None = None,
    metadata: dict[str, str] | None = None,
    on_progress: Any = None,
) -> Features:
    """Hidden states of texts from an encoder, a decoder, or the encoder of an encoder-decoder.

    Texts of similar length run together, padding never reaches a result, and the order is that of ``texts``. Memory is
    bounded by ``max_tokens`` beside the results, which ``out`` keeps on disk.

    Args:
        model: a transformers model, with or without a head; run in evaluation mode and left in the mode it was in.
        tokenizer: its tokenizer, which needs no padding token.
        texts: strings, in a list or anything else that holds them in order. A string is one text.
        layer: which of the model's ``hidden_states``: 0 the embeddings, 1 the first layer, …, -1 the last one (behind
            the final norm, as in ``last_hidden_state``).
        pooling: ``"none"``, every token; ``"mean"`` over the tokens (in float32), ``"cls"``, the first one, or
            ``"last"``, the last one; special tokens are tokens.
        max_length: longer texts are cut to so many tokens, with a warning. None cuts nothing.
        max_tokens: tokens in a batch, padding included; a longer text runs alone.
        dtype: float32, float16 or bfloat16, of the results.
        out: a ``.safetensors`` file that the results go to as they come; the returned values then are read from it. As
            with `Features.save`, folders are made, and only a file of features is replaced.
        metadata: strings for the header of ``out``.
        on_progress: called with the number of texts finished, after each batch.

    Raises:
        ValueError: an argument outside the above, a text that the tokenizer cannot take or finds no token in, or one
            longer than the model's table of positions (the text says which); a file that holds something else.
        OSError: ``out`` cannot be written; the text says why, and nothing is left of it.
    """
    require(pooling in POOLINGS, "pooling", pooling, f"one of {POOLINGS}")
    require(dtype in _DTYPES, "dtype", dtype, f"one of {_DTYPES}")
    require(is_integer(max_tokens, 1), "max_tokens", max_tokens, "an integer of at least 1")
    require(is_integer(layer), "layer", layer, "an integer")
    require(on_progress is None or callable(on_progress), "on_progress", on_progress, "callable")
    if out is not None:
        if not isinstance(out, (str, os.PathLike)):
            raise TypeError(f"out must be a path, got {out!r:.80}")
        if Path(out).suffix != ".safetensors":
            raise ValueError(f"out must end in .safetensors, got {str(out)!r}")
        free_target(out)
    check_metadata(metadata)
    texts = text_list(texts)
    if not texts:
        raise ValueError("texts must hold at least one text, got none")
    is_length = max_length is None or is_integer(max_length, 1)
    require(is_length, "max_length", max_length, "an integer of at least 1")
    backbone = _backbone(model)
    room = _room(backbone)
    rows, truncated = cut_rows(tokenizer, texts, max_length, room, room=room)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    ends = lengths.cumsum(0)
    values: Tensor | None = None
    with ExitStack() as stack:
        stack.enter_context(_ready(backbone))
        for batch, states in _forwards(backbone, tokenizer, rows, layer, max_tokens):
            if values is None:
                count = len(rows) if pooling != "none" else int(ends[-1])
                shape = (count, states[0].shape[-1])
                if out is None:
                    values = torch.empty(shape, dtype=dtype)
                else:
                    places = {"features": (dtype, shape), "lengths": (torch.int64, lengths.shape)}
                    writer = stack.enter_context(
                        SafetensorsWriter(out, places, {**(metadata or {}), "pooling": pooling, "layer": str(layer)})
                    )
                    values = writer["features"]
                    writer["lengths"].copy_(lengths)
            for index, text in zip(batch, states, strict=True):
                if pooling == "none":
                    values[int(ends[index]) - len(text) : int(ends[index])].copy_(text)
                else:
                    values[index].copy_(_pool(text, pooling))
            if on_progress is not None:
                on_progress(len(batch))
        values = None if out is not None else values
    if out is not None:
        features = load_features(out)
        features.truncated = truncated
        return features
    assert values is not None
    return Features(values, lengths, pooling, truncated)


def _pool(states: Tensor, pooling: str) -> Tensor:
    if pooling == "mean":
        return states.float().mean(dim=0)
    return states[0 if pooling == "cls" else -1]


def _backbone(model: Any) -> Any:
    """The part of the model that makes hidden states: no output layer, and of an encoder-decoder the encoder."""
    if hasattr(model, "get_base_model"):  # PEFT: the model its adapters have been put into
        model = model.get_base_model()
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder()
    return getattr(model, "base_model", model)


def _room(backbone: Any) -> int | None:
    """Tokens that the table of positions holds; None for models that compute their positions."""
    from ..decoding.generate_arguments import position_embedding  # which imports generation: a model is there by now

    limit = getattr(backbone.config, "max_position_embeddings", None)
    table = None if limit is None else position_embedding(backbone, limit)
    if limit is None or table is None:
        return None
    # RoBERTa counts positions from behind its padding's.
    lost = table.padding_idx + 1 if table.padding_idx is not None and table.num_embeddings == limit else 0
    return limit - lost


def _forwards(
    backbone: Any, tokenizer: Any, rows: list[list[int]], layer: int, max_tokens: int
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Indices of the rows of each batch, and their hidden states ``(T, D)`` without padding."""
    pad = pad_token(tokenizer, backbone.config)
    for batch in by_length(rows, lambda batch, _: (len(batch) + 1) * len(rows[batch[0]]) > max_tokens):
        # On the right: positions of real tokens are then what they are without padding, in every model.
        states = _run(backbone, padded_rows(backbone, [rows[index] for index in batch], pad, left=False), layer)
        yield batch, [states[row, : len(rows[index])] for row, index in enumerate(batch)]


def _run(backbone: Any, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """``(B, T, D)``."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(backbone.forward).parameters else {}
    if layer == -1:
        return backbone(**inputs, **options).last_hidden_state
    layers = backbone(**inputs, **options, output_hidden_states=True).hidden_states
    if not -len(layers) <= layer < len(layers):
        raise ValueError(f"layer must be in [{-len(layers)}, {len(layers)}) for this model, got {layer}")
    return layers[layer]


@contextmanager
def _ready(backbone: torch.nn.Module) -> Iterator[None]:
    """In evaluation mode, and linear layers of 16 bits through our kernel up to where PyTorch's is faster: many rows of
    float32 are its own affair."""
    with evaluation_mode(backbone), ExitStack() as stack:
        if any(parameter.dtype in _NARROW for parameter in backbone.parameters()):
            stack.enter_context(fast_linears(backbone))
        yield


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Every module in evaluation mode within the block, and in the mode it was in again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """The texts of a ``.txt`` file, one a line, or of a ``.jsonl`` file, the ``text`` of one object a line.

    Either may be packed, as ``.gz`` or ``.zst``. ``-`` is standard input; it and other pipes hold such objects where
    the first line that is not blank is a JSON object, else plain text. Row i of the features is the i-th line that is
    not blank.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another ending, a file that cannot be read, a line that is not UTF-8 or not such an object (the text
            names it), or no text at all.
        ImportError: ``.zst`` without the package `zstandard`.
    """
    texts = []
    for place, line, record in read_lines(path, "texts"):
        text = line if record is None else record.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{place}: must be an object with a text, got {short(line.strip())}")
        if not is_utf8(text):
            raise ValueError(f"{place}: text holds half of a surrogate pair, got {short(text)}")
        texts.append(text)
    if not texts:
        raise ValueError(f"{os.fspath(path)!r} holds no text")
    return texts


@torch.no_grad()
def embed_tokens(model: Any, tokenizer: Any, rows: list[list[int]]) -> Tensor:
    """Mean hidden states ``(N, D)``, float32, of texts that are tokens already.

    On a CPU each runs alone, which costs little there and keeps its bits free of the others.
    """
    backbone = _backbone(model)
    most = 1 if backbone.device.type == "cpu" else 4096
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    with _ready(backbone):
        for batch, states in _forwards(backbone, tokenizer, rows, -1, most):
            for index, text in zip(batch, states, strict=True):
                found[index] = _pool(text, "mean").cpu()
    return torch.stack(found)
