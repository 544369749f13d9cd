"""The C++ kernels of the decoding step, as plain functions over tensors.

They serve the eager inference path, where the price of an operator boundary would show: arguments are handed on as
addresses and strides. ``*_supported`` says whether a call may come here; ``*_cpu`` takes it or says what is in its way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _backends

_NONE = (0, 0, 0)
_NO_ARRAY = (0, 0, 0, 0)


def _obstacle(**tensors: Tensor | None) -> str | None:
    """What keeps tensors from the kernels, None if nothing does: float32 on the CPU, last dimension contiguous, no
    gradient wanted, and nothing that follows the computation."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return f"{name} is a {type(tensor).__name__}"
        if tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return f"{name} is {tensor.dtype} on {tensor.device}, must be float32 on the CPU"
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"{name} has strides {tensor.stride()}, the last must be 1"
        if tensor.requires_grad and torch.is_grad_enabled():
            return f"{name} requires a gradient"
    if torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack():
        return "the call is being traced"
    if forward_ad._current_level >= 0:
        return "the call is being differentiated in forward mode"
    return None


def _mask_obstacle(mask: Tensor | None) -> str | None:
    if mask is None or (mask.dtype is torch.bool and mask.is_cpu):
        return None
    return f"mask is {mask.dtype} on {mask.device}, must be bool on the CPU"


def _lengths_obstacle(name: str, lengths: Tensor, batch: int) -> str | None:
    if lengths.dtype is torch.int64 and lengths.shape == (batch,) and lengths.is_cpu:
        return None
    return f"{name} is {lengths.dtype} of shape {tuple(lengths.shape)}, must be int64 of shape ({batch},)"


def _has_kernels() -> bool:
    """To be asked last: where they are missing, it says so to a user who would have had them."""
    return _backends.wanted_extension() is not None


# ---- candidate_scan -------------------------------------------------------------------------------------------------


def candidate_scan_supported(hidden_states: Tensor, history: Tensor, mask: Tensor | None) -> bool:
    """Whether :func:`candidate_scan_cpu` takes these arguments."""
    return (
        _obstacle(hidden_states=hidden_states, history=history) is None
        and _mask_obstacle(mask) is None
        and _has_kernels()
    )


def candidate_scan_cpu(
    hidden_states: Tensor,
    history: Tensor,
    length: int,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Largest cosine of every candidate with the history, and where it is: one pass over the history in C++.

    Args:
        hidden_states: ``(B, k, D)`` raw states, float32. Norms below 1e-12 count as 1e-12.
        history: ``(B, T_max, D)`` float32 states of unit length; the first ``length`` positions count.
        length: positions in use, at most.
        lengths: ``(B,)`` int64, positions in use in each row, each at most ``length``.
        mask: ``(B, >= length)`` bool, True for real positions.

    Returns:
        ``penalty (B, k)`` float32 and ``position (B, k)`` int64, the earliest of equals. NaN propagates; a row with no
        real position has −inf at position 0.

    Raises:
        RuntimeError: no C++ extension. ValueError: arguments it does not take.
    """
    extension = _backends.require_extension()
    problem = _obstacle(hidden_states=hidden_states, history=history) or _mask_obstacle(mask)
    batch, candidates, dim = hidden_states.shape
    if problem is None and (history.shape[0] != batch or history.shape[2] != dim or history.shape[1] < length):
        problem = f"history has shape {tuple(history.shape)}, must be ({batch}, at least {length}, {dim})"
    if problem is None and mask is not None and (mask.shape[0] != batch or mask.shape[1] < length):
        problem = f"mask has shape {tuple(mask.shape)}, must be ({batch}, at least {length})"
    if problem is None and lengths is not None:
        problem = _lengths_obstacle("lengths", lengths, batch)
    if problem is not None:
        raise ValueError(f"impl='cpu' does not take this call: {problem}")
    lengths = None if lengths is None else lengths.contiguous()
    if mask is not None and mask.stride(1) != 1:
        mask = mask.contiguous()
    penalty = hidden_states.new_empty((batch, candidates))
    position = hidden_states.new_empty((batch, candidates), dtype=torch.int64)
    extension.candidate_scan(
        (batch, candidates, dim, length),
        (hidden_states.data_ptr(), hidden_states.stride(0), hidden_states.stride(1)),
        (history.data_ptr(), history.stride(0), history.stride(1)),
        0 if lengths is None else lengths.data_ptr(),
        (0, 0) if mask is None else (mask.data_ptr(), mask.stride(0)),
        penalty.data_ptr(),
        position.data_ptr(),
        torch.get_num_threads(),
    )
    return penalty, position


# ---- decode_attention -----------------------------------------------------------------------------------------------


def _attention_obstacle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
) -> str | None:
    if bias is not None and bias.stride(-1) != 1:
        bias = bias[..., :1]  # copied when it is read: T5 makes its bias heads last
    return _obstacle(
        query=query, key=key, value=value, new_key=new_key, new_value=new_value, bias=bias, sinks=sinks
    ) or _mask_obstacle(mask)


def decode_attention_supported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    length: int,
    new_key: Tensor | None,
    new_value: Tensor | None,
    scaling: float,
    mask: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    window_start: int,
) -> bool:
    """Whether :func:`decode_attention_cpu` takes these arguments."""
    return _attention_obstacle(query, key, value, new_key, new_value, mask, bias, sinks) is None and _has_kernels()


def _broadcast(
    name: str, tensor: Tensor | None, batch: int, candidates: int, heads: int, width: int
) -> tuple[int, ...]:
    """Address of a ``(1 | B | B·k, 1 | H, 1, width)`` tensor and its strides over sequences, candidates and heads."""
    if tensor is None:
        return _NO_ARRAY
    rows = tensor.shape[0] if tensor.dim() == 4 else -1
    if (
        rows not in (1, batch, batch * candidates)
        or tensor.shape[1] not in (1, heads)
        or tensor.shape[2] != 1
        or tensor.shape[3] != width
    ):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, must be "
            f"(1, {batch} or {batch * candidates}, 1 or {heads}, 1, {width})"
        )
    row = 0 if rows == 1 else tensor.stride(0)
    head = 0 if tensor.shape[1] == 1 else tensor.stride(1)
    if rows == batch * candidates:
        return tensor.data_ptr(), row * candidates, row, head
    return tensor.data_ptr(), row, 0, head


def decode_attention_cpu(
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
    *,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    checked: bool = False,
) -> Tensor:
    """Attention of ``B·k`` one-token queries over ``B`` shared prefixes, in C++: keys and values are read once.

    The arguments of `simctg_fast.ops.shared_prefix_attention`, float32 on the CPU, and two more.

    Args:
        query: ``(B·k, H, 1, D)``; rows ``b·k … b·k + k − 1`` belong to sequence b.
        key, value: ``(B, H_kv, >= length, D)`` and ``(…, D_v)``; any strides but for the last dimension.
        length: positions of the prefix in use, at most.
        new_key, new_value: ``(B·k, H_kv, 1, D)`` and ``(…, D_v)``, or None.
        scaling, softcap: ``softcap · tanh(scaling · q·k / softcap)``.
        mask, bias: ``(1 | B | B·k, 1 | H, 1, length (+ 1 with new_key))``, bool (True: may be seen) and float32. The
            last entry belongs to the new key. Blocks that the mask closes for a whole sequence are not read.
        sinks: ``(H,)``.
        window_start: positions before it are not read.
        lengths: ``(B,)`` int64, positions in use in each row, each at most ``length``.
        starts: ``(B,)`` int64, a ``window_start`` of each row's own.
        checked: :func:`decode_attention_supported` has just said yes.

    Returns:
        ``(B·k, 1, H, D_v)``, contiguous. A row that may see nothing is NaN, as softmax makes it.

    Raises:
        RuntimeError: no C++ extension. ValueError: arguments it does not take, with their values.
    """
    extension = _backends.require_extension()
    problem = None if checked else _attention_obstacle(query, key, value, new_key, new_value, mask, bias, sinks)
    rows, heads, queries, dim = query.shape
    batch, kv_heads, positions, key_dim = key.shape
    value_dim = value.shape[-1]
    if problem is None:
        if queries != 1 or batch == 0 or rows % batch or kv_heads == 0 or heads % kv_heads or key_dim != dim:
            problem = f"query has shape {tuple(query.shape)}, key {tuple(key.shape)}"
        elif value.shape[:2] != key.shape[:2] or not 0 <= length <= min(positions, value.shape[2]):
            problem = f"length is {length}, key has shape {tuple(key.shape)}, value {tuple(value.shape)}"
        elif (new_key is None) != (new_value is None):
            problem = "new_key and new_value must come together"
        elif new_key is not None and (
            new_key.shape != (rows, kv_heads, 1, dim) or new_value.shape != (rows, kv_heads, 1, value_dim)  # type: ignore[union-attr]
        ):
            problem = f"new_key has shape {tuple(new_key.shape)}, must be {(rows, kv_heads, 1, dim)}"
        elif sinks is not None and sinks.shape != (heads,):
            problem = f"sinks has shape {tuple(sinks.shape)}, must be ({heads},)"
        elif softcap is not None and not softcap > 0:
            problem = f"softcap is {softcap}, must be above 0"
    for name, tensor in (("lengths", lengths), ("starts", starts)):
        if tensor is not None:
            problem = problem or _lengths_obstacle(name, tensor, batch)
    if problem is not None:
        raise ValueError(f"impl='cpu' does not take this call: {problem}")
    candidates = rows // batch
    if mask is not None and mask.stride(-1) != 1:
        mask = mask.contiguous()
    if bias is not None and bias.stride(-1) != 1:
        bias = bias.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    starts = None if starts is None else starts.contiguous()
    width = length + (new_key is not None)
    out = query.new_empty((rows, 1, heads, value_dim))
    extension.decode_attention(
        (batch, candidates, kv_heads, heads // kv_heads, dim, value_dim),
        (query.data_ptr(), query.stride(0), query.stride(1)),
        (key.data_ptr(), *key.stride()[:3]),
        (value.data_ptr(), *value.stride()[:3]),
        length,
        0 if lengths is None else lengths.data_ptr(),
        0 if starts is None else starts.data_ptr(),
        window_start,
        _NONE if new_key is None else (new_key.data_ptr(), new_key.stride(0), new_key.stride(1)),
        _NONE if new_value is None else (new_value.data_ptr(), new_value.stride(0), new_value.stride(1)),
        scaling,
        0.0 if softcap is None else softcap,
        _broadcast("mask", mask, batch, candidates, heads, width),
        _broadcast("bias", bias, batch, candidates, heads, width),
        0 if sinks is None else sinks.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


# ---- top_k_probs ----------------------------------------------------------------------------------------------------

_MOST_CANDIDATES = 64  # the list they are kept in is searched from its end


def _top_k_obstacle(logits: Tensor, k: int) -> str | None:
    if k > _MOST_CANDIDATES:
        return f"k is {k}, must be at most {_MOST_CANDIDATES}"
    if logits.dim() != 2:
        return f"logits has shape {tuple(logits.shape)}, must be (B, V)"
    return _obstacle(logits=logits)


def top_k_supported(logits: Tensor, k: int) -> bool:
    """Whether :func:`top_k_cpu` takes these arguments."""
    return _top_k_obstacle(logits, k) is None and _has_kernels()


def top_k_cpu(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most probable of ``logits (B, V)`` float32: ``probs (B, k)`` float32, falling, and ``tokens (B, k)`` int64,
    of equals the lower first. A row without probabilities is NaN.

    Raises:
        RuntimeError: no C++ extension. ValueError: arguments it does not take.
    """
    extension = _backends.require_extension()
    problem = _top_k_obstacle(logits, k)
    if problem is not None:
        raise ValueError(f"impl='cpu' does not take this call: {problem}")
    logits = logits.contiguous()
    rows, count = logits.shape
    probs, tokens = logits.new_empty((rows, k)), logits.new_empty((rows, k), dtype=torch.int64)
    extension.top_k_probs(
        logits.data_ptr(), rows, count, k, probs.data_ptr(), tokens.data_ptr(), torch.get_num_threads()
    )
    return probs, tokens
