"""Rows of different lengths in one batch: whether padding changes them."""

from __future__ import annotations

from typing import Any

import torch

from ..decoding.caches import new_cache, other_layers
from ..decoding.call import reached_windows
from ..decoding.generate_arguments import position_table
from ..decoding.own_step import MOST_NOISE, allowed_for_noise, draw_tokens, error_of, moved_by_noise, own_text
from ..decoding.unsupported import FAILURES
from ..text.batches import padded_rows

_SHORT, _BEYOND = 4, 3  # tokens of the short row; of texts that are to be longer than a window
_LONGEST = 64  # windows up to which texts are tried
# What two orders of a sum may make of logits, unless noise shows that it is more.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2}


@torch.no_grad()
def change_by_padding(model: Any, pad: int) -> str | None:
    """What padding changes about a row, found out with transformers' own steps; None if nothing.

    Several architectures look at padding, or do not shift their positions by it: what they write for a row depends on
    the rows beside it, in transformers itself.
    """
    if model.training:  # of dropout nothing can be told
        return None
    windows, table = reached_windows(model.config), position_table(model)
    odd = other_layers(new_cache(model, model.generation_config, 1, None))
    if odd and windows and windows[-1] > _LONGEST:
        return f"its windows are too long for a trial, and its cache has layers of its own ({', '.join(odd)})"
    longest = max([_SHORT, *(size for size in windows if size <= _LONGEST)]) + _BEYOND
    longest = longest if table is None else max(1, min(longest, (table - _SHORT) // 2 - 1))
    draw = draw_tokens(model)
    short, long = draw(_SHORT).tolist(), draw(_SHORT + longest).tolist()
    steps = draw(longest, 2, 1).to(model.device)

    def logits(rows: list[list[int]]) -> torch.Tensor:
        inputs, rounds = padded_rows(model, rows, pad), [tokens[: len(rows)] for tokens in steps]
        return own_text(model, inputs, rounds).logits[:, 0]

    try:
        alone = logits([short])
    except FAILURES:  # its first request will say what it is
        return None
    try:
        error = error_of(logits([short, long]), alone)
    except FAILURES as failure:
        return f"a padded row fails ({type(failure).__name__}: {failure})"
    if error <= _ROUNDING.get(model.dtype, 2e-2):
        return None
    exact = model.dtype in (torch.float32, torch.float64)  # in half precision noise explains anything
    explains = exact and error <= MOST_NOISE
    moved = moved_by_noise(model, lambda: error_of(logits([short]), alone)) if explains else 0.0
    if error <= allowed_for_noise(moved):
        return None
    return f"logits of a padded row differ from those of the row alone by {error:.2g}"
