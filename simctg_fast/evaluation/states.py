"""Hidden states of texts that a model has written or read: how alike they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..metrics import isotropy
from .writing import Tokenized


@torch.inference_mode()
def hidden_states(model: Any, prompt: Tokenized, ids: Sequence[int]) -> tuple[Tensor, ...]:
    """``(1, T, D)`` of the embeddings and each layer, of the prompt and a continuation; of an encoder-decoder those of
    its decoder.

    Raises:
        ValueError: the model returns none, or states that are not finite.
    """
    text = torch.tensor([[*prompt.ids, *ids]], device=model.device)
    if prompt.source is None:
        found = model(input_ids=text, use_cache=False, output_hidden_states=True).hidden_states
    else:
        source = torch.tensor([prompt.source], device=model.device)
        out = model(input_ids=source, decoder_input_ids=text, use_cache=False, output_hidden_states=True)
        found = out.decoder_hidden_states
    if found is None or not all(bool(layer.isfinite().all()) for layer in found):
        what = "no hidden states" if found is None else "hidden states that are not finite"
        raise ValueError(f"{type(model).__name__} returns {what}")
    return tuple(found)


def cosines(states: Tensor) -> Tensor:
    """``(T, T)`` float64, in [-1, 1], of ``(1, T, D)``."""
    unit = torch.nn.functional.normalize(states[0].double(), dim=-1)
    return (unit @ unit.T).clamp(-1, 1)


def similarity(model: Any, prompt: Tokenized, ids: Sequence[int]) -> dict[str, Any]:
    """The cosines of the last layer's states, how many are the prompt's, and the text's isotropy."""
    last = hidden_states(model, prompt, ids)[-1]
    values = [[round(value, 3) for value in row] for row in cosines(last).tolist()]
    return {"prompt_tokens": len(prompt.ids), "cosines": values, "isotropy": isotropy(last)}


def isotropy_of_layers(model: Any, texts: Sequence[tuple[Tokenized, Sequence[int]]]) -> list[float]:
    """Of the embeddings and each layer of what decodes; texts count by their pairs of positions."""
    values, pairs = [], []
    for prompt, ids in texts:
        count = len(prompt.ids) + len(ids)
        if count > 1:
            values.append([isotropy(layer) for layer in hidden_states(model, prompt, ids)])
            pairs.append(count * (count - 1))
    layers = zip(*values, strict=True)
    return [sum(v * n for v, n in zip(layer, pairs, strict=True)) / sum(pairs) for layer in layers]
