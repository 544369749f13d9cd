"""The k most probable tokens and their probabilities, without the softmax over the vocabulary."""

from __future__ import annotations

import torch

from . import _backends
from ._autograd import define, register
from .dispatch import NOT_TAKEN, choose, float32_obstacle, is_deferred, widened

_MOST_CANDIDATES = 64  # of the C++ code, which searches the list that it keeps them in from its end


def top_k_probs(logits: torch.Tensor, k: int, impl: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest probabilities of ``softmax(logits)``, falling, and their tokens.

    Args:
        logits: ``(B, V)`` of any float dtype; −inf for banned tokens.
        k: 1 … V.
        impl: ``"auto"``, ``"torch"``, ``"cpu"`` (C++, no float64, k up to 64) or ``"triton"`` (CUDA, k up to 64); the
            last two look for the tokens only where they can be.

    Returns:
        ``probs (B, k)`` in float32 (float64 for float64), and ``tokens (B, k)`` int64. ``"cpu"`` and ``"triton"`` put
        the lower of equal tokens first. A row without probabilities (NaN, +inf, or every token banned) has NaN among
        its own.

    Raises:
        ValueError: an unknown ``impl``, k outside its range, or operands that ``"cpu"`` or ``"triton"`` does not take.
        RuntimeError: an ``impl`` that this installation lacks.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must be in 1..{logits.shape[-1]}, got {k}")
    if is_deferred(impl) or (impl == "auto" and logits.device.type == "cuda"):
        return torch.ops.simctg_fast.top_k_probs(logits, k, impl=impl)
    return _run(logits, k, impl=impl)


def _run(logits, k, *, impl="auto"):
    def triton() -> str | None:
        from simctg_fast.kernels import top_k as kernels

        return kernels.obstacle(logits, k)

    def cpu() -> str | None:
        if k > _MOST_CANDIDATES:
            return f"{NOT_TAKEN}k is {k}, must be at most {_MOST_CANDIDATES}"
        if logits.dim() != 2:
            return f"{NOT_TAKEN}logits has shape {tuple(logits.shape)}, must be (B, V)"
        return float32_obstacle(logits=logits)

    if impl in ("auto", "cpu"):
        logits = widened(logits)
    impl = choose(impl, logits.device, cpu=cpu, triton=triton)
    if impl == "triton":
        from simctg_fast.kernels import top_k as kernels

        return kernels.top_k_probs(logits, k)
    return (_cpu if impl == "cpu" else _torch)(logits, k)


def _cpu(logits, k):
    logits = logits.contiguous()
    rows, count = logits.shape
    probs, tokens = logits.new_empty((rows, k)), logits.new_empty((rows, k), dtype=torch.int64)
    _backends.require_extension().top_k_probs(
        logits.data_ptr(), rows, count, k, probs.data_ptr(), tokens.data_ptr(), torch.get_num_threads()
    )
    return probs, tokens


def _torch(logits, k):
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top, tokens = torch.topk(wide, k, dim=-1)
    return torch.exp(top - torch.logsumexp(wide, dim=-1, keepdim=True)), tokens


def _fake(logits, k, *, impl="auto"):
    shape, dtype = (logits.shape[0], k), torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=torch.int64)


define('top_k_probs(Tensor logits, int k, *, str impl="auto") -> (Tensor, Tensor)', _run, _fake)
register("top_k_probs")
