"""The operator `simctg_fast::crf_ffbs`: exact samples by filtering forward and sampling backward."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import _backends
from ._autograd import define
from .crf_common import Potentials, check_draws, check_potentials, choose, inside, pick, uniforms_ffbs
from .dispatch import address, addresses, contiguous


def crf_ffbs(
    messages: torch.Tensor,
    norms: torch.Tensor,
    scores: torch.Tensor,
    tokens: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    lengths: torch.Tensor | None,
    scale: float,
    samples: int,
    seed: int,
    uniforms: torch.Tensor | None = None,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Slots of `samples` independent paths, `(B, T, N)` int64, -1 beyond the lengths.

    The last slot is drawn from softmax(alpha), slot k before a chosen slot j from softmax_k(alpha(k) + transition(k,
    j)), each by inverse CDF in slot order with the uniform of (b, t, n): `uniforms (B, T, N)` where given, else Philox
    under `seed`, so that a draw depends on its own indices only.
    """
    return torch.ops.simctg_fast.crf_ffbs(
        messages, norms, scores, tokens, left, right, lengths, scale, samples, seed, uniforms, impl=impl
    )


def _fake(messages, norms, scores, tokens, left, right, lengths, scale, samples, seed, uniforms=None, *, impl="auto"):
    check_potentials(scores, tokens, left, right, lengths)
    shape = (*scores.shape[:2], samples)
    check_draws(scores, samples, uniforms, shape)
    return scores.new_empty(shape, dtype=torch.int64)


def _sample(messages, norms, scores, tokens, left, right, lengths, scale, samples, seed, uniforms=None, *, impl="auto"):
    slots = _fake(messages, norms, scores, tokens, left, right, lengths, scale, samples, seed, uniforms)
    p = Potentials(scores, tokens, left, right, lengths)
    backend = choose(impl, scores)
    if backend == "torch":

        def into(t: int, slot: torch.Tensor) -> torch.Tensor:
            chosen = right[tokens[:, t + 1].gather(1, slot)]  # (B, N, D)
            return torch.matmul(left[tokens[:, t]] * scale, chosen.transpose(1, 2))

        alpha = messages + scores - norms[:, :, None]
        return sample_backward(alpha, into, lengths, uniforms_of(scores, samples, seed, uniforms))
    messages, norms, uniforms = contiguous(messages, norms, uniforms)
    p = p.contiguous()
    if backend == "triton":
        from ..kernels import crf_sample as kernel

        return kernel.ffbs(messages, norms, p, scale, samples, seed, uniforms)
    _backends.require_extension().crf_ffbs(
        p.sizes,
        *addresses(messages, norms, *p),
        *(scale, samples, seed, address(uniforms), address(slots)),
        torch.get_num_threads(),
    )
    return slots


def uniforms_of(scores: torch.Tensor, samples: int, seed: int, uniforms: torch.Tensor | None) -> torch.Tensor:
    """`(B, T, N)`: those given, else those of the seed."""
    if uniforms is not None:
        return uniforms
    return uniforms_ffbs(seed, scores.shape[0], scores.shape[1], samples, scores.device, scores.dtype)


def sample_backward(
    alpha: torch.Tensor,
    into: Callable[[int, torch.Tensor], torch.Tensor],
    lengths: torch.Tensor | None,
    uniforms: torch.Tensor,
) -> torch.Tensor:
    """`(B, T, N)` slots for `alpha (B, T, K)`; `into(t, slot)` are the transitions from all slots at t to `slot (B, N)`
    at t + 1, `(B, K, N)`."""
    batch, length, _ = alpha.shape
    samples = uniforms.shape[2]
    result = torch.full((batch, length, samples), -1, dtype=torch.int64, device=alpha.device)
    slot = torch.zeros((batch, samples), dtype=torch.int64, device=alpha.device)
    for t in range(length - 1, -1, -1):
        logits = alpha[:, t, :, None]
        if t < length - 1:
            step = into(t, slot)
            follows = inside(lengths, t + 1)
            if follows is not None:
                step = torch.where(follows[:, :, None], step, 0)
            logits = logits + step
        logits = logits.expand(-1, -1, samples)
        slot = pick((logits - logits.amax(1, keepdim=True)).exp(), uniforms[:, t], dim=1)
        here = inside(lengths, t)
        result[:, t] = slot if here is None else torch.where(here, slot, -1)
    return result


define(
    "crf_ffbs(Tensor messages, Tensor norms, Tensor scores, Tensor tokens, Tensor left, Tensor right, "
    'Tensor? lengths, float scale, int samples, int seed, Tensor? uniforms=None, *, str impl="auto") -> Tensor',
    _sample,
    _fake,
)
