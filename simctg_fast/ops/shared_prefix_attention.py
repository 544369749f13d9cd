"""Decode attention of k candidates a row against one copy of the row's prefix.

Rows ``b·k … b·k + k − 1`` of the query are the candidates of sequence b. All stand at position ``length``; each sees
the prefix (stored once per sequence) and itself, never the other candidates. Grouped-query heads are packed with the
candidates, so keys and values are read once however many query rows share them.
"""

from __future__ import annotations

import torch

from . import _backends, _cpu
from ._autograd import register

_LIBRARY = torch.library.Library("simctg_fast", "FRAGMENT")
_LIBRARY.define(
    "shared_prefix_attention(Tensor query, Tensor key, Tensor value, SymInt length, Tensor? new_key, "
    "Tensor? new_value, float scaling, Tensor? mask, Tensor? bias, float? softcap, Tensor? sinks, SymInt window_start, "
    "Tensor? lengths, Tensor? starts, int? window) -> Tensor"
)

IMPLS = ("auto", "cpu", "torch", "triton")


def shared_prefix_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    length: int,
    new_key: torch.Tensor | None = None,
    new_value: torch.Tensor | None = None,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    window_start: int = 0,
    lengths: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    window: int | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Softmax attention of ``B·k`` single-token queries over ``length`` shared keys, plus one key of their own.

    Args:
        query: ``(B·k, H, 1, D)``.
        key, value: ``(B, H_kv, T_max, D)`` and ``(B, H_kv, T_max, D_v)``; the first ``length`` positions count.
        new_key, new_value: ``(B·k, H_kv, 1, D)`` and ``(…, D_v)``: what each candidate adds; ``None`` for
            cross-attention, where candidates see the shared keys only.
        scaling: factor on the query-key products.
        mask: bool, True = may be seen, ``(B or 1 or B·k, 1 or H, 1, length + 1)`` (``length`` for cross-attention).
        bias: float, added to the scaled (and capped) scores; shape as ``mask``. T5's relative positions, or an
            additive mask.
        softcap: ``softcap · tanh(score / softcap)`` before mask and bias.
        sinks: ``(H,)`` logits that take part in the softmax and carry no value.
        window_start: shared keys before this position are not read.
        lengths: ``(B,)`` int64, shared keys in use in each row, each at most ``length``; the buffer must be finite
            beyond them. Entry ``length`` of ``mask`` and ``bias`` stays the new key's.
        starts: ``(B,)`` int64, a ``window_start`` of each row's own.
        window: each row sees itself and the ``window − 1`` keys before it; needs a ``new_key``.
        impl: ``"auto"``, ``"cpu"`` (C++, float32), ``"triton"`` (CUDA) or ``"torch"`` (any device and dtype).

    Returns:
        ``(B·k, 1, H, D_v)`` in the query's dtype; the softmax is taken in float32 at least.

    Raises:
        ValueError: an unknown ``impl``, or one that does not take these operands. RuntimeError: an ``impl`` that this
            installation lacks.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")
    if window is not None and (window < 1 or new_key is None):
        raise ValueError(f"window must be at least 1 and come with a new_key, got {window}")
    arguments = (query, key, value, length, new_key, new_value, scaling, mask, bias, softcap, sinks, window_start)
    if impl == "auto" and torch.compiler.is_dynamo_compiling():
        return torch.ops.simctg_fast.shared_prefix_attention(*arguments, lengths, starts, window)
    return _attention(*arguments, lengths, starts, window, impl)


def _attention(
    query, key, value, length, new_key, new_value, scaling, mask, bias, softcap, sinks, window_start, lengths, starts,
    window, impl="auto",
):  # fmt: skip
    arguments = (query, key, value, length, new_key, new_value, scaling, mask, bias, softcap, sinks, window_start)
    if _takes_triton(query, key, value, new_key, new_value, impl):
        from simctg_fast.kernels import shared_prefix_attention as kernels

        return kernels.shared_prefix_attention(*arguments, lengths, starts, window)
    if window is not None and lengths is None:
        window_start = max(window_start, length + 1 - window)
        arguments = (*arguments[:-1], window_start)
    elif window is not None:
        first = lengths + (1 - window)
        starts = first.clamp(min=0) if starts is None else torch.maximum(starts, first)
    if impl == "auto" and _cpu.decode_attention_supported(*arguments):
        return _cpu.decode_attention_cpu(*arguments, lengths=lengths, starts=starts, checked=True)
    if impl == "cpu":
        return _cpu.decode_attention_cpu(*arguments, lengths=lengths, starts=starts)
    if lengths is not None or starts is not None:
        seen = _seen(key.shape[0], length, new_key is not None, lengths, starts, key.device)
        if mask is not None:
            candidates = query.shape[0] // key.shape[0]
            per_candidate = candidates > 1 and mask.shape[0] == query.shape[0]
            seen = mask & (seen.repeat_interleave(candidates, dim=0) if per_candidate else seen)
        mask = seen
        arguments = (*arguments[:7], mask, *arguments[8:])
    return _attention_torch(*arguments)


torch.library.impl(_LIBRARY, "shared_prefix_attention", "CompositeExplicitAutograd")(_attention)
register(_LIBRARY, "shared_prefix_attention")


@torch.library.register_fake("simctg_fast::shared_prefix_attention")
def _(query, key, value, *_):
    return query.new_empty((query.shape[0], 1, query.shape[1], value.shape[-1]))


def _takes_triton(query, key, value, new_key, new_value, impl: str) -> bool:
    """Whether the Triton kernel serves the call; raises where it was asked for by name and cannot."""
    if impl == "triton":
        _backends.require_triton(query.device)
    elif impl != "auto" or query.device.type != "cuda" or not _backends.has_triton():
        return False
    from simctg_fast.kernels import shared_prefix_attention as kernels

    taken = kernels.supports(query, key, value, new_key, new_value)
    if impl == "triton" and not taken:
        raise ValueError(
            f"impl='triton' takes heads of up to {kernels.DIM_LIMIT} in one dtype of "
            f"{', '.join(map(str, kernels.DTYPES))}, last dimension contiguous; got query {tuple(query.shape)} of "
            f"{query.dtype}, key {tuple(key.shape)} of {key.dtype}, value {tuple(value.shape)} of {value.dtype}"
        )
    return taken


def _seen(
    batch: int,
    length: int,
    has_new_key: bool,
    lengths: torch.Tensor | None,
    starts: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """``(B, 1, 1, length (+ 1))``: True within each row's own range, and for the new key."""
    positions = torch.arange(length, device=device)
    seen = torch.ones(batch, length, dtype=torch.bool, device=device)
    if lengths is not None:
        seen &= positions < lengths[:, None]
    if starts is not None:
        seen &= positions >= starts[:, None]
    if has_new_key:
        seen = torch.nn.functional.pad(seen, (0, 1), value=True)
    return seen[:, None, None]


def _attention_torch(query, key, value, length, new_key, new_value, scaling, mask, bias, softcap, sinks, window_start):
    rows, heads, _, dim = query.shape
    batch, kv_heads = key.shape[:2]
    k, groups = rows // batch, heads // kv_heads
    key, value = key[:, :, window_start:length], value[:, :, window_start:length]
    shared = length - window_start
    # (B·k, H, 1, D) -> (B, H_kv, k·groups, D): every query row that reads one key/value head, side by side.
    packed = query.view(batch, k, kv_heads, groups, dim).permute(0, 2, 1, 3, 4)
    scores = torch.matmul(packed.reshape(batch, kv_heads, k * groups, dim), key.mT)
    scores = scores.view(batch, kv_heads, k, groups, shared)
    if new_key is not None:
        own = new_key.view(batch, k, kv_heads, 1, dim).permute(0, 2, 1, 3, 4)
        scores = torch.cat([scores, (packed * own).sum(-1, keepdim=True)], dim=-1)
    accumulate = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(accumulate) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + _pack(bias, batch, k, kv_heads, groups)[..., window_start:]
    if mask is not None:
        scores = scores.masked_fill(~_pack(mask, batch, k, kv_heads, groups)[..., window_start:], float("-inf"))
    if sinks is not None:
        sink = sinks.to(accumulate).view(1, kv_heads, 1, groups, 1).expand(batch, -1, k, -1, 1)
        scores = torch.cat([scores, sink], dim=-1)
    probs = torch.softmax(scores, dim=-1).to(query.dtype)
    out = torch.matmul(probs[..., :shared].reshape(batch, kv_heads, k * groups, shared), value)
    out = out.view(batch, kv_heads, k, groups, -1)
    if new_value is not None:
        out = out + probs[..., shared : shared + 1] * new_value.view(batch, k, kv_heads, 1, -1).permute(0, 2, 1, 3, 4)
    return out.permute(0, 2, 1, 3, 4).reshape(rows, 1, heads, -1)


def _pack(x: torch.Tensor, batch: int, k: int, kv_heads: int, groups: int) -> torch.Tensor:
    """``(1 | B | B·k, 1 | H, 1, S)`` -> broadcastable to ``(B, H_kv, k, groups, S)``."""
    rows, heads, _, width = x.shape
    if heads == 1:
        x = x.view(rows, 1, 1, width)
    else:
        x = x.reshape(rows, kv_heads, groups, width)
    if rows == batch * k and k > 1:
        return x.view(batch, k, *x.shape[1:]).transpose(1, 2)
    return x[:, :, None]
