"""The operator `simctg_fast::crf_stochastic_viterbi`: the published sampler, its law kept to the letter.

For t >= 1 every target slot j draws its own back-pointer k ~ softmax_k((s(k) + transition(k, j)) / temperature) and
carries the score of the one prefix that this makes, untempered: s'(j) = s(k) + transition(k, j) + scores[t, j]. The
last slot is the argmax of s. Samples are independent tables.
"""

from __future__ import annotations

import torch

from . import _backends
from ._accumulate import add_rows_
from ._autograd import define, register
from .crf_common import (
    Potentials,
    add_along_,
    check_draws,
    check_potentials,
    choose,
    inside,
    pick,
    product,
    uniforms_stochastic,
)
from .crf_viterbi import pointer_dtype
from .dispatch import addresses, contiguous

SCRATCH = 1 << 19  # candidates (source, target, sample) that the PyTorch path holds at a time; one sample at least


def crf_stochastic_viterbi(
    scores: torch.Tensor,
    tokens: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    lengths: torch.Tensor | None,
    temperature: float,
    samples: int,
    seed: int,
    uniforms: torch.Tensor | None = None,
    *,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws `samples` tables of back-pointers.

    Randomness: `uniforms (B, T - 1, K, N)`, inverse CDF in slot order, or Philox under `seed`.

    Returns:
        slots `(B, T, N)` int64, -1 beyond the lengths; prefix scores `(B, T, K, N)`, each position's largest one taken
        off (0 beyond the lengths), differentiable in `scores`, `left` and `right` with the back-pointers held fixed;
        back-pointers `(B, T, K, N)`, uint8 up to 256 slots, uint16 above, row 0 all zero.
    """
    return torch.ops.simctg_fast.crf_stochastic_viterbi(
        scores, tokens, left, right, lengths, temperature, samples, seed, uniforms, impl=impl
    )


def _fake(scores, tokens, left, right, lengths, temperature, samples, seed, uniforms=None, *, impl="auto"):
    check_potentials(scores, tokens, left, right, lengths)
    batch, length, size = scores.shape
    check_draws(scores, samples, uniforms, (batch, length - 1, size, samples))
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, must be positive")
    shape = (batch, length, size, samples)
    return (
        scores.new_empty((batch, length, samples), dtype=torch.int64),
        scores.new_empty(shape),
        scores.new_empty(shape, dtype=pointer_dtype(size)),
    )


def _sample(scores, tokens, left, right, lengths, temperature, samples, seed, uniforms=None, *, impl="auto"):
    results = _fake(scores, tokens, left, right, lengths, temperature, samples, seed, uniforms)
    p = Potentials(scores, tokens, left, right, lengths)
    backend = choose(impl, scores)
    if backend == "torch":
        return _torch(p, temperature, samples, seed, uniforms)
    p, (uniforms,) = p.contiguous(), contiguous(uniforms)
    if backend == "triton":
        from ..kernels import crf_sample as kernel

        kernel.stochastic_viterbi(p, temperature, seed, uniforms, *results)
        return results
    _backends.require_extension().crf_stochastic_viterbi(
        p.sizes,
        *addresses(*p),
        *(temperature, samples, seed),
        *addresses(uniforms, *results),
        torch.get_num_threads(),
    )
    return results


def _torch(p: Potentials, temperature: float, samples: int, seed: int, uniforms: torch.Tensor | None):
    scores, lengths = p.scores, p.lengths
    batch, length, size = scores.shape
    dtype = pointer_dtype(size)
    chunk = max(1, SCRATCH // max(1, batch * size * size))
    score = scores[:, 0, :, None].expand(-1, -1, samples)
    score = score - score.amax(1, keepdim=True)
    empty = inside(lengths, 0)
    if empty is not None:
        score = score.masked_fill(~empty[:, :, None], 0)
    prefixes = [score]
    pointers = [torch.zeros((batch, size, samples), dtype=dtype, device=scores.device)]
    last = score
    for t in range(1, length):
        step = p.step(t)
        if uniforms is None:
            uniform = uniforms_stochastic(seed, batch, t - 1, size, samples, scores.device, scores.dtype)
        else:
            uniform = uniforms[:, t - 1]
        chosen = torch.empty_like(uniform, dtype=torch.int64)
        following = torch.empty_like(uniform)
        for begin in range(0, samples, chunk):
            part = slice(begin, begin + chunk)
            candidates = last[:, :, None, part] + step[..., None]
            logits = candidates / temperature
            weights = (logits - logits.amax(1, keepdim=True)).exp()
            chosen[..., part] = pick(weights, uniform[..., part], dim=1)
            following[..., part] = candidates.gather(1, chosen[:, None, :, part])[:, 0]
        following = following + scores[:, t, :, None]
        following = following - following.amax(1, keepdim=True)
        here = inside(lengths, t)
        if here is None:
            last = following
        else:
            last = torch.where(here[:, :, None], following, last)
            following = following.masked_fill(~here[:, :, None], 0)
            chosen = chosen.masked_fill(~here[:, :, None], 0)
        prefixes.append(following)
        pointers.append(chosen.to(dtype))
    slot = last.argmax(1)  # (B, N)
    slots = p.tokens.new_full((batch, length, samples), -1)
    for t in range(length - 1, -1, -1):
        here = inside(lengths, t)
        slots[:, t] = slot if here is None else torch.where(here, slot, -1)
        if t > 0:
            previous = pointers[t].to(torch.int64).gather(1, slot[:, None])[:, 0]
            slot = previous if here is None else torch.where(here, previous, slot)
    return slots, torch.stack(prefixes, 1), torch.stack(pointers, 1)


def _setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    scores, tokens, left, right, lengths = inputs[:5]
    slots, _, backpointers = output
    ctx.mark_non_differentiable(slots, backpointers)
    ctx.save_for_backward(scores, tokens, left, right, lengths, backpointers)


def _autograd(ctx, grad_slots, grad, grad_backpointers):
    """Each score flows back along its own chain of pointers: K * N edges a step, never K * K.

    The largest score that every position has had taken off is a constant here, which is right for whatever depends on
    differences of the scores of one position (a softmax over slots does).
    """
    scores, tokens, left, right, lengths, backpointers = ctx.saved_tensors
    batch, length, size, _ = backpointers.shape
    grad_scores, grad_left, grad_right = (grad.new_zeros(x.shape) for x in (scores, left, right))
    rank = left.shape[1]
    flow = torch.zeros_like(grad[:, 0])
    for t in range(length - 1, -1, -1):
        flow = flow + grad[:, t]
        here = inside(lengths, t)
        if here is not None:
            flow = flow.masked_fill(~here[:, :, None], 0)
        grad_scores[:, t] = flow.sum(2)
        if t == 0:
            break
        pointer = backpointers[:, t].to(torch.int64)
        weight = grad.new_zeros((batch, size, size))  # weight[k, j]: what flows over the edge, all samples together
        add_along_(weight, 1, pointer.transpose(1, 2), flow.transpose(1, 2))
        source, target = tokens[:, t - 1], tokens[:, t]
        add_rows_(grad_left, source.reshape(-1), product(weight, right[target]).view(-1, rank))
        add_rows_(grad_right, target.reshape(-1), product(weight.transpose(1, 2), left[source]).view(-1, rank))
        before = torch.zeros_like(flow, memory_format=torch.contiguous_format)
        add_along_(before, 1, pointer, flow)
        flow = before
    return grad_scores, None, grad_left, grad_right, *[None] * 5


define(
    "crf_stochastic_viterbi(Tensor scores, Tensor tokens, Tensor left, Tensor right, Tensor? lengths, "
    "float temperature, int samples, int seed, Tensor? uniforms=None, *, "
    'str impl="auto") -> (Tensor, Tensor, Tensor)',
    _sample,
    _fake,
)
register("crf_stochastic_viterbi", _autograd, _setup_context, last=True)
