"""Attention of candidates over a shared prefix, one query row and one head after the other."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def shared_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    length: int,
    new_key: Tensor | None = None,
    new_value: Tensor | None = None,
    scaling: float = 1.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window_start: int = 0,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    window: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`simctg_fast.ops.shared_prefix_attention`, with its arguments: ``(B·k, 1, H, D_v)``, computed in `dtype`; trusts
    its arguments. Positions that a row may not see are not read."""
    rows, heads = query.shape[:2]
    batch, kv_heads = key.shape[:2]
    out = torch.zeros(rows, 1, heads, value.shape[-1], dtype=dtype)
    for row, head in itertools.product(range(rows), range(heads)):
        b, kv_head = row // (rows // batch), head // (heads // kv_heads)
        end = length if lengths is None else int(lengths[b])
        start = max(
            window_start,
            0 if starts is None else int(starts[b]),
            0 if window is None else end + 1 - window,  # the window counts the row itself
        )
        seen = list(range(start, end))
        keys, values = key[b, kv_head, seen], value[b, kv_head, seen]
        if new_key is not None and new_value is not None:
            keys, values = torch.cat([keys, new_key[row, kv_head]]), torch.cat([values, new_value[row, kv_head]])
            seen.append(length)  # the new key's entry in mask and bias

        def entries(x: Tensor, row: int = row, b: int = b, head: int = head, seen: list[int] = seen) -> Tensor:
            """Of a ``(1 | B | B·k, 1 | H, 1, length (+ 1))`` tensor those of this row and head."""
            first = {1: 0, rows: row}.get(x.shape[0], b)
            return x[first, head if x.shape[1] > 1 else 0, 0, seen]

        scores = keys.to(dtype) @ query[row, head, 0].to(dtype) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + entries(bias).to(dtype)
        if mask is not None:
            scores = scores.masked_fill(~entries(mask), -torch.inf)
        if sinks is not None:  # a logit that takes part in the softmax and carries no value
            scores = torch.cat([scores, sinks[head : head + 1].to(dtype)])
        out[row, 0, head] = torch.softmax(scores, dim=0)[: len(values)] @ values.to(dtype)
    return out
