"""A model and its tokenizer by name, ready for batched generation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .assets import resolve_model

if TYPE_CHECKING:
    import torch

__all__ = ["context_length", "fitting_threads", "load_model", "load_tokenizer", "tokenize"]

# Below this many parameters a token is too little work to share. On the bundled model a second thread is worth 10 % on
# an idle machine; on a busy one each of its many short waits costs a time slice, and it ran 50 times slower.
_ONE_THREAD_PARAMETERS = 20_000_000


def load_model(
    name: str | os.PathLike[str],
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    *,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """``(model, tokenizer)``, decoder-only or encoder-decoder as the config says, in evaluation mode.

    Args:
        name: ``"bundled"``, a local folder or a hub name.
        device: where the model goes; ``None`` is the first GPU if there is one, else the CPU.
        dtype: a torch dtype, its name, or ``"auto"`` for the one in the config.

    Raises:
        FileNotFoundError, ValueError: see `resolve_model`.
        ValueError: there is no such `device`, or see `load_tokenizer`.
        OSError: transformers cannot load it; its own text says why.
    """
    import transformers

    folder, target = resolve_model(name), _device(device)
    config = transformers.AutoConfig.from_pretrained(folder)
    loader = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    tokenizer = load_tokenizer(folder)
    model = loader.from_pretrained(folder, dtype=dtype).eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # The continuation is written behind the prompt, so the padding of a decoder's prompt must stand before it.
    tokenizer.padding_side = "right" if config.is_encoder_decoder else "left"
    return model.to(target), tokenizer


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """The tokenizer of a local folder or hub name: sentencepiece, ``tokenizer.json`` or vocabulary files.

    Raises:
        ValueError: a folder without the files of its tokenizer (transformers would make an empty one), or with files
            that cannot be read.
    """
    import transformers

    folder = resolve_model(name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # of many kinds: JSON, protobuf, the Rust tokenizers' own, advice to install tiktoken
        raise ValueError(f"the tokenizer in {folder!r} cannot be read: {error}") from error
    names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if tokenizer.vocab_files_names and os.path.isdir(folder) and names.isdisjoint(os.listdir(folder)):
        raise ValueError(
            f"the folder {folder!r} holds no tokenizer: a {type(tokenizer).__name__} needs one of {sorted(names)}"
        )
    return tokenizer


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch raises either, by build
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that this torch can use, got {name!r}: {reason}") from error


def tokenize(model: Any, tokenizer: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, ``(len(prompts), T)`` each, on the model's device.

    Raises:
        ValueError: a prompt has no token, or leaves no room in the model's context.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one text, got none")
    encoded = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1, verbose=False)
    lengths = encoded["attention_mask"].sum(dim=1).tolist()
    limit = context_length(model)
    for prompt, length in zip(prompts, lengths, strict=True):
        if length == 0:
            raise ValueError(f"a prompt must have at least one token, got {prompt!r}")
        if limit is not None and length >= limit and not model.config.is_encoder_decoder:
            raise ValueError(f"the prompt {prompt[:40]!r}… has {length} tokens; the model's context holds {limit}")
    return {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}


def context_length(model: Any) -> int | None:
    """How many tokens the model's position embedding holds; None where the config names no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


@contextmanager
def fitting_threads(model: Any) -> Iterator[None]:
    """One thread while a small model runs on the CPU; torch's own setting for every other, and again afterwards."""
    import torch

    before = torch.get_num_threads()
    if model.device.type == "cpu" and model.num_parameters() < _ONE_THREAD_PARAMETERS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
