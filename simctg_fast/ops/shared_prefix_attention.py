"""Decode attention of k candidates a row against one copy of the row's prefix.

Rows ``b·k … b·k + k − 1`` of the query are the candidates of sequence b. All stand at position ``length``; each sees
the prefix (stored once per sequence) and itself, never the other candidates. Grouped-query heads are packed with the
candidates, so keys and values are read once however many query rows share them. Where sequences have candidates in
numbers of their own, ``offsets`` says where each one's rows begin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from . import _backends
from ._autograd import define, register
from .dispatch import (
    ELEMENT_TYPES,
    NOT_TAKEN,
    address,
    choose,
    contiguous,
    cpu_obstacle,
    element_type,
    is_deferred,
    lengths_obstacle,
)

_NONE = (0, 0, 0)
_NO_ARRAY = (0, 0, 0, 0)


@dataclass
class Call:
    """The arguments of :func:`shared_prefix_attention`; the operator and the kernel have the same names."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    length: int
    new_key: torch.Tensor | None = None
    new_value: torch.Tensor | None = None
    scaling: float = 1.0
    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    window_start: int = 0
    lengths: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    window: int | None = None
    offsets: torch.Tensor | None = None


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
    offsets: torch.Tensor | None = None,
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
        bias: float32 or the query's dtype, added to the scaled (and capped) scores; shape as ``mask``. T5's relative
            positions, or an additive mask.
        softcap: ``softcap · tanh(score / softcap)`` before mask and bias.
        sinks: ``(H,)`` logits that take part in the softmax and carry no value, float32 or the query's dtype.
        window_start: shared keys before this position are not read.
        lengths: ``(B,)`` int64, shared keys in use in each row, each at most ``length``; the buffer must be finite
            beyond them. Entry ``length`` of ``mask`` and ``bias`` stays the new key's.
        starts: ``(B,)`` int64, a ``window_start`` of each row's own.
        window: each row sees itself and the ``window − 1`` keys before it; needs a ``new_key``.
        offsets: ``(B + 1,)`` int64 on the CPU, the sequences' first rows of ``query``, and how many rows there are;
            None: k each. Not for ``"triton"``; masks and biases then have 1 or B rows.
        impl: ``"auto"``, ``"cpu"`` (C++; float32, bfloat16 or float16, all other tensors of the query's dtype),
            ``"triton"`` (CUDA) or ``"torch"`` (any device and dtype).

    Returns:
        ``(B·k, 1, H, D_v)`` in the query's dtype; the softmax is taken in float32 at least.

    Raises:
        ValueError: an unknown ``impl``, or one that does not take these operands. RuntimeError: an ``impl`` that this
            installation lacks.
    """
    if window is not None and (window < 1 or new_key is None):
        raise ValueError(f"window must be at least 1 and come with a new_key, got {window}")
    call = Call(
        query, key, value, length, new_key, new_value, scaling, mask, bias, softcap, sinks, window_start, lengths,
        starts, window, offsets,
    )  # fmt: skip
    if is_deferred(impl):
        return torch.ops.simctg_fast.shared_prefix_attention(**vars(call), impl=impl)
    return _attention(call, impl)


def resolve(impl: str, call: Call) -> str:
    """The implementation that serves a call, see `dispatch.choose`."""
    query, key, value = call.query, call.key, call.value

    def triton() -> str | None:
        from simctg_fast.kernels import shared_prefix_attention as kernels

        if call.offsets is not None:
            return "sequences have candidates in numbers of their own"
        return kernels.obstacle(query, key, value, call.new_key, call.new_value)

    def cpu() -> str | None:
        obstacle = cpu_obstacle(
            ELEMENT_TYPES, call.mask, query=query, key=key, value=value, new_key=call.new_key,
            new_value=call.new_value,
        )  # fmt: skip
        bias = call.bias
        if bias is not None and bias.stride(-1) != 1:
            bias = bias[..., :1]  # copied when it is read: T5 makes its bias heads last
        for name, tensor in (("sinks", call.sinks), ("bias", bias)):
            if obstacle is None and tensor is not None:  # of float32 in models of 16 bits that keep them so
                obstacle = cpu_obstacle(tuple(dict.fromkeys((query.dtype, torch.float32))), **{name: tensor})
        return obstacle

    return choose(impl, query.device, cpu=cpu, triton=triton)


def _attention(call: Call, impl: str) -> torch.Tensor:
    impl = resolve(impl, call)
    if impl == "triton":
        from simctg_fast.kernels import shared_prefix_attention as kernels

        arguments = dict(vars(call))
        del arguments["offsets"]
        return kernels.shared_prefix_attention(**arguments)
    return (_cpu if impl == "cpu" else _torch)(_without_window(call))


def _without_window(call: Call) -> Call:
    """The same, where each row begins to read instead."""
    if (window := call.window) is None:
        return call
    if call.lengths is None:
        return replace(call, window_start=max(call.window_start, call.length + 1 - window))
    first = call.lengths + (1 - window)
    starts = first.clamp(min=0) if call.starts is None else torch.maximum(call.starts, first)
    return replace(call, starts=starts)


def _broadcast(name: str, tensor: torch.Tensor | None, call: Call) -> tuple[int, ...]:
    """Address of a ``(1 | B | B·k, 1 | H, 1, width)`` tensor and its strides over sequences, candidates and heads."""
    if tensor is None:
        return _NO_ARRAY
    (all_rows, heads), batch = call.query.shape[:2], call.key.shape[0]
    width = call.length + (call.new_key is not None)
    rows = tensor.shape[0] if tensor.dim() == 4 else -1
    allowed = (1, batch) if call.offsets is not None else (1, batch, all_rows)
    if rows not in allowed or tensor.shape[1] not in (1, heads) or tensor.shape[2:] != (1, width):
        wanted = f"(1, {' or '.join(map(str, allowed[1:]))}, 1 or {heads}, 1, {width})"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {wanted}")
    row = 0 if rows == 1 else tensor.stride(0)
    head = 0 if tensor.shape[1] == 1 else tensor.stride(1)
    if rows == all_rows and call.offsets is None:
        return tensor.data_ptr(), row * (all_rows // batch), row, head
    return tensor.data_ptr(), row, 0, head


def _shape_problem(call: Call) -> str | None:
    query, key, value, new_key, new_value = call.query, call.key, call.value, call.new_key, call.new_value
    rows, heads, queries, dim = query.shape
    batch, kv_heads, positions, key_dim = key.shape
    if (
        queries != 1
        or batch == 0
        or (call.offsets is None and rows % batch)
        or kv_heads == 0
        or heads % kv_heads
        or key_dim != dim
    ):
        return f"query has shape {tuple(query.shape)}, key {tuple(key.shape)}"
    if value.shape[:2] != key.shape[:2] or not 0 <= call.length <= min(positions, value.shape[2]):
        return f"length is {call.length}, key has shape {tuple(key.shape)}, value {tuple(value.shape)}"
    if new_key is None or new_value is None:
        if new_key is not new_value:
            return "new_key and new_value must come together"
    elif new_key.shape != (rows, kv_heads, 1, dim) or new_value.shape != (rows, kv_heads, 1, value.shape[-1]):
        return f"new_key has shape {tuple(new_key.shape)}, must be {(rows, kv_heads, 1, dim)}"
    if call.sinks is not None and call.sinks.shape != (heads,):
        return f"sinks has shape {tuple(call.sinks.shape)}, must be ({heads},)"
    if call.softcap is not None and not call.softcap > 0:
        return f"softcap is {call.softcap}, must be above 0"
    return _offsets_problem(call) or lengths_obstacle(batch, lengths=call.lengths, starts=call.starts)


def _offsets_problem(call: Call) -> str | None:
    offsets, batch, rows = call.offsets, call.key.shape[0], call.query.shape[0]
    if offsets is None:
        return None
    if offsets.dtype != torch.int64 or not offsets.is_cpu or offsets.shape != (batch + 1,):
        return f"offsets is {offsets.dtype} {tuple(offsets.shape)} on {offsets.device}, must be int64 ({batch + 1},)"
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != rows or values != sorted(values):
        return f"offsets is {values}, must rise from 0 to the {rows} rows of query"
    return None


def _cpu(call: Call) -> torch.Tensor:
    """In C++: keys and values are read once, and not at all in blocks that the mask closes for a whole sequence. A row
    that may see nothing is NaN, as softmax makes it."""
    if (problem := _shape_problem(call)) is not None:
        raise ValueError(f"impl='cpu' {NOT_TAKEN}{problem}")
    out = call.query.new_empty((call.query.shape[0], 1, call.query.shape[1], call.value.shape[-1]))
    native, _kept = _native(call, out.data_ptr())
    _backends.require_extension().decode_attention(native, torch.get_num_threads())
    return out


def native_call(**arguments: Any) -> tuple[Any, list[torch.Tensor | None]] | None:
    """A call of :func:`shared_prefix_attention` as `block_layers.decoder_blocks` takes it, and what has to be kept
    alive meanwhile; None if it is not one for C++."""
    call = Call(**arguments)
    if resolve("auto", call) != "cpu" or _shape_problem(call) is not None:
        return None
    return _native(_without_window(call), 0)


def _native(call: Call, out: int) -> tuple[Any, list[torch.Tensor | None]]:
    """As C++ takes it, and the tensors whose addresses it holds."""
    query, key, value, new_key, new_value = call.query, call.key, call.value, call.new_key, call.new_value
    rows, heads, _, dim = query.shape
    batch, kv_heads = key.shape[:2]
    mask, bias, lengths, starts = call.mask, call.bias, call.lengths, call.starts
    sinks = None if call.sinks is None else call.sinks.float()
    if mask is not None and mask.stride(-1) != 1:
        mask = mask.contiguous()
    if bias is not None and bias.stride(-1) != 1:
        bias = bias.contiguous()
    if lengths is not None or starts is not None:
        lengths, starts = contiguous(lengths, starts)
    candidates, offsets = rows // batch, call.offsets
    if offsets is not None:
        offsets = offsets.contiguous()
        candidates = int(offsets.diff().max())
    native = _backends.require_extension().DecodeAttention(
        (batch, candidates, kv_heads, heads // kv_heads, dim, value.shape[-1]),
        (query.data_ptr(), query.stride(0), query.stride(1)),
        (key.data_ptr(), *key.stride()[:3]),
        (value.data_ptr(), *value.stride()[:3]),
        call.length,
        address(lengths),
        address(starts),
        call.window_start,
        _NONE if new_key is None else (new_key.data_ptr(), new_key.stride(0), new_key.stride(1)),
        _NONE if new_value is None else (new_value.data_ptr(), new_value.stride(0), new_value.stride(1)),
        call.scaling,
        0.0 if call.softcap is None else call.softcap,
        _broadcast("mask", mask, call),
        _broadcast("bias", bias, call),
        address(sinks),
        out,
        element_type(query.dtype),
        element_type(torch.float32 if bias is None else bias.dtype),
        address(offsets),
    )
    return native, [mask, bias, lengths, starts, sinks, offsets]


def _seen(call: Call) -> torch.Tensor | None:
    """The mask, ``(1 | B | B·k, 1 | H, 1, length (+ 1))``, and in each row what lies within its own range."""
    if call.lengths is None and call.starts is None:
        return call.mask
    batch, device = call.key.shape[0], call.key.device
    positions = torch.arange(call.length, device=device)
    seen = torch.ones(batch, call.length, dtype=torch.bool, device=device)
    if call.lengths is not None:
        seen &= positions < call.lengths[:, None]
    if call.starts is not None:
        seen &= positions >= call.starts[:, None]
    if call.new_key is not None:
        seen = torch.nn.functional.pad(seen, (0, 1), value=True)
    seen = seen[:, None, None]
    if call.mask is None:
        return seen
    rows = call.query.shape[0]
    return call.mask & (seen.repeat_interleave(rows // batch, dim=0) if call.mask.shape[0] == rows > batch else seen)


def _torch(call: Call) -> torch.Tensor:
    if call.offsets is not None:
        return _torch_packed(call)
    query, key, value, length, window_start = call.query, call.key, call.value, call.length, call.window_start
    rows, heads, _, dim = query.shape
    batch, kv_heads = key.shape[:2]
    k, groups = rows // batch, heads // kv_heads
    key, value = key[:, :, window_start:length], value[:, :, window_start:length]
    shared = length - window_start
    # (B·k, H, 1, D) -> (B, H_kv, k·groups, D): every query row that reads one key/value head, side by side.
    packed = query.view(batch, k, kv_heads, groups, dim).permute(0, 2, 1, 3, 4)
    scores = torch.matmul(packed.reshape(batch, kv_heads, k * groups, dim), key.mT)
    scores = scores.view(batch, kv_heads, k, groups, shared)
    if call.new_key is not None:
        keys = call.new_key.view(batch, k, kv_heads, 1, dim).permute(0, 2, 1, 3, 4)
        scores = torch.cat([scores, (packed * keys).sum(-1, keepdim=True)], dim=-1)
    accumulate = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(accumulate) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.bias is not None:
        scores = scores + _pack(call.bias, batch, k, kv_heads, groups)[..., window_start:]
    if (mask := _seen(call)) is not None:
        scores = scores.masked_fill(~_pack(mask, batch, k, kv_heads, groups)[..., window_start:], float("-inf"))
    if call.sinks is not None:
        sink = call.sinks.to(accumulate).view(1, kv_heads, 1, groups, 1).expand(batch, -1, k, -1, 1)
        scores = torch.cat([scores, sink], dim=-1)
    probs = torch.softmax(scores, dim=-1).to(query.dtype)
    out = torch.matmul(probs[..., :shared].reshape(batch, kv_heads, k * groups, shared), value)
    out = out.view(batch, kv_heads, k, groups, -1)
    if call.new_value is not None:
        values = call.new_value.view(batch, k, kv_heads, 1, -1).permute(0, 2, 1, 3, 4)
        out = out + probs[..., shared : shared + 1] * values
    return out.permute(0, 2, 1, 3, 4).reshape(rows, 1, heads, -1)


def _torch_packed(call: Call) -> torch.Tensor:
    """As many rows for every sequence, its last one standing for those that it has not."""
    if (problem := _offsets_problem(call)) is not None:
        raise ValueError(problem)
    offsets, device = call.offsets, call.query.device
    assert offsets is not None
    counts = offsets.diff()
    column = torch.arange(int(counts.max()))
    place = (offsets[:-1, None] + torch.minimum(column, counts[:, None] - 1)).clamp_(min=0).flatten().to(device)
    query, new_key, new_value = (None if x is None else x[place] for x in (call.query, call.new_key, call.new_value))
    assert query is not None
    wide = _torch(replace(call, query=query, new_key=new_key, new_value=new_value, offsets=None))
    return wide[(column < counts[:, None]).flatten().to(device)]


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


define(
    "shared_prefix_attention(Tensor query, Tensor key, Tensor value, SymInt length, Tensor? new_key, "
    "Tensor? new_value, float scaling, Tensor? mask, Tensor? bias, float? softcap, Tensor? sinks, SymInt window_start, "
    'Tensor? lengths, Tensor? starts, int? window, Tensor? offsets=None, *, str impl="auto") -> Tensor',
    lambda *arguments, impl="auto": _attention(Call(*arguments), impl),
    lambda query, key, value, *_, impl="auto": query.new_empty((query.shape[0], 1, query.shape[1], value.shape[-1])),
)
register("shared_prefix_attention")
