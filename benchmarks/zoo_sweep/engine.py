"""Requests of different lengths through the engine: each must get what ``generate`` gives it alone."""

from __future__ import annotations

import copy
from typing import Any

import torch

from . import inputs, judge

LENGTHS = (13, 4, 9)  # most of them longer than a window; none as long as its neighbour
NEW_TOKENS = 6


class Numbers:
    """Stands for a tokenizer: a text is its ids, written out."""

    pad_token_id = 0
    chat_template = None

    def __call__(self, text: str, **kwargs) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: Any, **kwargs) -> str:
        return " ".join(map(str, torch.as_tensor(ids).flatten().tolist()))


def prompts() -> list[inputs.Inputs]:
    return [inputs.text(1, length=length, seed=length) for length in LENGTHS]


def written(model: Any, slots: int) -> tuple[str, list[list[int]], str]:
    """How the engine batches, its tokens by request, and why.

    Raises:
        ValueError: also where a request got an error instead of tokens.
    """
    from simctg_fast.engine import Engine

    settings = {"penalty_alpha": judge.ALPHA, "top_k": judge.TOP_K, "max_new_tokens": NEW_TOKENS}
    engine = Engine(copy.deepcopy(model), Numbers(), slots=slots, **settings)
    name = "source" if model.config.is_encoder_decoder else "prompt"
    requests = [{"id": i, name: Numbers().decode(given["input_ids"])} for i, given in enumerate(prompts())]
    results = {result.id: result for result in engine.generate(requests)}
    for result in results.values():
        if result.error is not None:
            raise ValueError(f"{result.error['type']}: {result.error['message']}")
    return engine.stats["batching"], [results[i].token_ids for i in range(len(requests))], engine.reason
