"""The operator `simctg_fast::crf_filter`: the log-sum-exp recursion, and its gradient in one reverse sweep.

    messages[b, t, j] = log sum_k exp(alpha[b, t-1, k] + transition(k, j)),  messages[b, 0] = 0
    alpha[b, t, k]    = messages[b, t, k] + scores[b, t, k] - norms[b, t]
    norms[b, t]       = max_k (messages[b, t, k] + scores[b, t, k])

So the largest alpha of a position is 0 and the log of the partition function is
``logsumexp_k alpha[b, last, k] + sum_t norms[b, t]``; the second sum is what has to be taken in fp64. Everything that
is differentiated (log-probabilities, the partition function, marginals) is a function of `messages`; `norms` are
constants to autograd, which changes no derivative since they cancel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from . import _backends
from ._accumulate import add_rows_
from ._autograd import define, register
from .crf_common import Potentials, check_potentials, choose, inside, product
from .dispatch import addresses, contiguous


def crf_filter(
    scores: torch.Tensor,
    tokens: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    lengths: torch.Tensor | None = None,
    scale: float = 1.0,
    *,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`messages (B, T, K)` and `norms (B, T)` as above, 0 beyond the lengths; arguments as in `crf_common`.

    Differentiable in `scores`, `left` and `right`, as often as one likes; the tables' gradients are dense, of their own
    size.
    """
    return torch.ops.simctg_fast.crf_filter(scores, tokens, left, right, lengths, scale, impl=impl)


def crf_filter_backward(grad, messages, norms, scores, tokens, left, right, lengths, scale, tables, *, impl="auto"):
    """The gradients of `scores`, `left` and `right` for a gradient of `messages`; two empty ones unless `tables`."""
    return torch.ops.simctg_fast.crf_filter_backward(
        grad, messages, norms, scores, tokens, left, right, lengths, scale, tables, impl=impl
    )


def _fake(scores, tokens, left, right, lengths, scale, *, impl="auto"):
    check_potentials(scores, tokens, left, right, lengths)
    return scores.new_empty(scores.shape), scores.new_empty(scores.shape[:2])


def _fake_backward(grad, messages, norms, scores, tokens, left, right, lengths, scale, tables, *, impl="auto"):
    size = left.shape if tables else (0,)
    return scores.new_empty(scores.shape), left.new_empty(size), right.new_empty(size)


def _forward(scores, tokens, left, right, lengths, scale, *, impl="auto"):
    p = check_potentials(scores, tokens, left, right, lengths)
    backend = choose(impl, scores)
    if backend == "torch":
        return _torch(p, scale)
    p = p.contiguous()
    if backend == "triton":
        from ..kernels import crf_filter as kernel

        return kernel.filter_forward(p, scale)
    messages, norms = _fake(*p, scale)
    _backends.require_extension().crf_filter(
        p.sizes, *addresses(*p), scale, *addresses(messages, norms), torch.get_num_threads()
    )
    return messages, norms


def _torch(p: Potentials, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    alpha = message = torch.zeros_like(p.scores[:, 0])
    messages, norms = [], []
    for t in range(p.scores.shape[1]):
        if t > 0:
            message = torch.logsumexp(alpha[:, :, None] + p.step(t, scale), dim=1)
        here = inside(p.lengths, t)
        if here is not None:
            message = message.masked_fill(~here, 0)
        total = message + p.scores[:, t]
        norm = total.detach().amax(1, keepdim=True)
        if here is not None:
            norm = norm.masked_fill(~here, 0)
            total = total.masked_fill(~here, 0)
        alpha = total - norm
        messages.append(message)
        norms.append(norm[:, 0])
    return torch.stack(messages, 1), torch.stack(norms, 1)


def _backward(grad, messages, norms, scores, tokens, left, right, lengths, scale, tables, *, impl="auto"):
    p = Potentials(scores, tokens, left, right, lengths)
    backend = choose(impl, scores)
    if backend == "torch":
        return _torch_backward(grad, messages, norms, p, scale, tables)
    grad, messages, norms = contiguous(grad, messages, norms)
    p = p.contiguous()
    if backend == "triton":
        from ..kernels import crf_backward as kernel

        return kernel.filter_backward(grad, messages, norms, p, scale, tables, add_rows_)
    grad_scores = scores.new_empty(scores.shape)
    size = left.shape if tables else (0,)
    grad_left, grad_right = left.new_zeros(size), right.new_zeros(size)
    _backends.require_extension().crf_filter_backward(
        p.sizes,
        *addresses(grad, messages, norms, *p),
        scale,
        *addresses(grad_scores, *((grad_left, grad_right) if tables else (None, None))),
        torch.get_num_threads(),
    )
    return grad_scores, grad_left, grad_right


def _torch_backward(grad, messages, norms, p: Potentials, scale: float, tables: bool):
    rank = p.left.shape[1]
    grad_left, grad_right = (torch.zeros_like(x) if tables else x.new_zeros((0,)) for x in (p.left, p.right))

    def take(t: int, share: torch.Tensor) -> None:
        source, target = p.tokens[:, t - 1], p.tokens[:, t]
        into_left = product(share, p.right[target]).view(-1, rank) * scale
        into_right = product(share.transpose(1, 2), p.left[source]).view(-1, rank) * scale
        add_rows_(grad_left, source.reshape(-1), into_left)
        add_rows_(grad_right, target.reshape(-1), into_right)

    step = functools.partial(p.step, scale=scale)
    grad_scores = reverse_sweep(grad, messages, norms, p.scores, step, p.lengths, take if tables else None)
    return grad_scores, grad_left, grad_right


def reverse_sweep(
    grad: torch.Tensor,
    messages: torch.Tensor,
    norms: torch.Tensor,
    scores: torch.Tensor,
    step: Callable[[int], torch.Tensor],
    lengths: torch.Tensor | None,
    take: Callable[[int, torch.Tensor], None] | None,
) -> torch.Tensor:
    """The gradient of the scores for one of the messages, `(B, T, K)` both; `step(t)`: transitions from t - 1 to t.

    `take(t, share)` gets the gradient of these transitions, `(B, K, K)`.
    """
    grad_scores = scores.new_zeros(scores.shape)
    flow = grad[:, -1]
    for t in range(scores.shape[1] - 1, 0, -1):
        message = messages[:, t, None]
        alpha = messages[:, t - 1] + scores[:, t - 1] - norms[:, t - 1, None]
        # alpha + transition never exceeds the message but for rounding; where it was -inf it stays without weight.
        share = (alpha[:, :, None] + step(t) - message).clamp(max=0).exp()
        live, here = message != float("-inf"), inside(lengths, t)  # NaN goes on
        share = torch.where(live if here is None else live & here[:, None], share * flow[:, None], 0)
        if take is not None:
            take(t, share)
        into = share.sum(2)
        grad_scores[:, t - 1] = into
        flow = grad[:, t - 1] + into
    return grad_scores


def _setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    scores, tokens, left, right, lengths, scale = inputs
    messages, norms = output
    ctx.mark_non_differentiable(norms)
    ctx.save_for_backward(messages, norms, scores, tokens, left, right, lengths)
    ctx.scale, ctx.impl = scale, keyword_only_inputs["impl"]


def _autograd(ctx, grad_messages, grad_norms):
    messages, norms, scores, tokens, left, right, lengths = ctx.saved_tensors
    tables = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    grads = crf_filter_backward(
        grad_messages, messages, norms, scores, tokens, left, right, lengths, ctx.scale, tables, impl=ctx.impl
    )
    wanted = [g if need else None for g, need in zip(grads, (ctx.needs_input_grad[i] for i in (0, 2, 3)), strict=True)]
    return wanted[0], None, wanted[1], wanted[2], None, None


def _second_setup(ctx, inputs, keyword_only_inputs, output) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors)


def _second(ctx, *directions):
    grad, _, _, scores, tokens, left, right, lengths = ctx.saved_tensors

    def recursion(scores, left, right):
        return _torch(Potentials(scores, tokens, left, right, lengths), ctx.scale)[0]

    by = second_derivative(recursion, directions, grad, scores, left, right)
    return by[0], None, None, by[1], None, by[2], by[3]


def second_derivative(
    recursion: Callable[..., torch.Tensor],
    directions: Sequence[torch.Tensor],
    grad: torch.Tensor,
    *potentials: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Of the messages that `recursion` makes of the potentials: the derivatives, with respect to `grad` and to the
    potentials, of the gradient's product with the directions.

    By the recursion in PyTorch, differentiated twice: memory of T K² numbers, whatever the implementation.
    """

    def along(grad, *potentials):
        gradients = torch.func.vjp(recursion, *potentials)[1](grad)
        # Without `tables` two of the operator's gradients, and so their directions, are empty.
        return sum((d * g).sum() for d, g in zip(directions, gradients, strict=True) if d.shape == g.shape)

    return torch.func.grad(along, argnums=tuple(range(1 + len(potentials))))(grad, *potentials)


define(
    "crf_filter(Tensor scores, Tensor tokens, Tensor left, Tensor right, Tensor? lengths, float scale, *, "
    'str impl="auto") -> (Tensor, Tensor)',
    _forward,
    _fake,
)
define(
    "crf_filter_backward(Tensor grad, Tensor messages, Tensor norms, Tensor scores, Tensor tokens, Tensor left, "
    'Tensor right, Tensor? lengths, float scale, bool tables, *, str impl="auto") -> (Tensor, Tensor, Tensor)',
    _backward,
    _fake_backward,
)
register("crf_filter", _autograd, _setup_context)
register("crf_filter_backward", _second, _second_setup)
