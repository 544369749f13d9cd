"""The operators `simctg_fast::dense_filter`, `dense_viterbi` and `dense_kbest`: one matrix of transitions, all steps.

A score of -inf, in emissions or transitions, is a forbidden move: it has no weight and no gradient.

    messages[b, t, j] = log sum_k exp(alpha[b, t-1, k] + transitions[k, j]),  messages[b, 0] = 0
    alpha[b, t, k]    = messages[b, t, k] + emissions[b, t, k] - norms[b, t], whose largest value is 0
    log_partition[b]  = logsumexp_k alpha[b, last, k] + sum_t norms[b, t], summed in fp64

`norms` are constants to autograd, as in `crf_filter`. With shared transitions a step is a product of matrices in the
space of exponentials: `B K` exponentials a step instead of `B K K`. `csrc/host/crf_dense.cpp` says when that is exact;
otherwise the recursion runs in logarithms.
"""

from __future__ import annotations

import torch

from . import _backends
from ._autograd import define, register, tracked
from ._contrastive_loss_torch import full_precision
from .crf_checks import check_parameter, check_paths, require_paths
from .crf_common import check_beside, choose, inside, last_law
from .crf_filter import reverse_sweep, second_derivative
from .crf_sample import sample_backward, uniforms_of
from .crf_viterbi import best_prefixes, list_viterbi
from .dispatch import addresses, contiguous
from .viterbi_backtrace import viterbi_backtrace

SPAN = 30.0  # nats that transitions may span for a step in the space of exponentials without a look at the sums
NEVER = float("-inf")


def dense_filter(
    emissions: torch.Tensor, transitions: torch.Tensor, lengths: torch.Tensor | None = None, *, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`log_partition (B,)` in fp64, `messages (B, T, K)` and `norms (B, T)`, the latter two 0 beyond the lengths.

    `emissions (B, T, K)` and `transitions (K, K)`, from row to column, are fp32 or fp64; `lengths (B,)` int64.
    Differentiable in both.

    Raises:
        ValueError: a wrong shape, dtype or device; on the CPU, an item without a path of finite score.
    """
    return torch.ops.simctg_fast.dense_filter(emissions, transitions, lengths, True, impl=impl)


def dense_log_partition(emissions, transitions, lengths=None, *, impl: str = "auto") -> torch.Tensor:
    """The first of `dense_filter`'s results; the others are kept only where there is a gradient to be taken."""
    keep = tracked(emissions) or tracked(transitions)
    return torch.ops.simctg_fast.dense_filter(emissions, transitions, lengths, keep, impl=impl)[0]


def dense_viterbi(emissions, transitions, lengths=None, *, impl: str = "auto") -> torch.Tensor:
    """The best path, `(B, T)` int64, -1 beyond the lengths. Raises as `dense_filter`."""
    return torch.ops.simctg_fast.dense_viterbi(emissions, transitions, lengths, impl=impl)


def dense_kbest(
    emissions: torch.Tensor,
    transitions: torch.Tensor,
    lengths: torch.Tensor | None,
    paths: int,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Tags of the `paths` best paths, best first: `(B, T, paths)` int64, -1 beyond the lengths.

    Args:
        emissions: `(B, T, K)`, float32 or float64. transitions: `(K, K)`, from row to column; -inf in either forbids.
        lengths: `(B,)` int64.

    Order, memory and paths that do not exist are as in `crf_kbest`.
    """
    return torch.ops.simctg_fast.dense_kbest(emissions, transitions, lengths, paths, impl=impl)


def dense_marginals(messages, norms, emissions, transitions, lengths, *, impl: str = "auto") -> torch.Tensor:
    """`(B, T, K)`, 0 beyond the lengths: the gradient of the log-partition. No gradient of its own."""
    seed = last_law(messages, emissions, lengths)
    backward = torch.ops.simctg_fast.dense_filter_backward
    return backward(seed, messages, norms, emissions, transitions, lengths, impl=impl)[0] + seed


def dense_ffbs(
    messages: torch.Tensor,
    norms: torch.Tensor,
    emissions: torch.Tensor,
    transitions: torch.Tensor,
    lengths: torch.Tensor | None,
    samples: int,
    seed: int,
    uniforms: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact samples `(B, T, N)` int64, -1 beyond the lengths: see `crf_sample.crf_ffbs`. In PyTorch on every device."""
    into = transitions.t().contiguous()
    return sample_backward(
        messages + emissions - norms[:, :, None],
        lambda t, tags: into[tags].transpose(1, 2),
        lengths,
        uniforms_of(emissions, samples, seed, uniforms),
    )


def check_dense(emissions: torch.Tensor, transitions: torch.Tensor, lengths: torch.Tensor | None) -> None:
    if emissions.dim() != 3 or emissions.shape[1] < 1 or emissions.shape[2] < 1:
        raise ValueError(f"emissions has shape {tuple(emissions.shape)}, must be (batch, length >= 1, tags >= 1)")
    tags = emissions.shape[2]
    if emissions.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"emissions has dtype {emissions.dtype}, must be float32 or float64")
    if transitions.shape != (tags, tags) or transitions.dtype != emissions.dtype:
        raise ValueError(
            f"transitions is {transitions.dtype} {tuple(transitions.shape)}, must be {emissions.dtype} ({tags}, {tags})"
        )
    check_beside("emissions", emissions, lengths, transitions=transitions)


def check_on_host(transitions: torch.Tensor) -> None:
    """What the C++ code does itself."""
    if transitions.device.type == "cpu":
        check_parameter(transitions, "transitions")


# ---- the filter ------------------------------------------------------------------------------------------------------


def _fake(emissions, transitions, lengths=None, keep=True, *, impl="auto"):
    check_dense(emissions, transitions, lengths)
    return _results(emissions, keep)


def _results(emissions, keep):
    batch, length, tags = emissions.shape
    kept = (batch, length) if keep else (0, 0)
    total = emissions.new_empty((batch,), dtype=torch.float64)
    return total, emissions.new_empty((*kept, tags)), emissions.new_empty(kept)


def _forward(emissions, transitions, lengths=None, keep=True, *, impl="auto"):
    check_dense(emissions, transitions, lengths)
    if choose(impl, emissions, triton=False) == "cpu":
        emissions, transitions, lengths = contiguous(emissions, transitions, lengths)
        total, messages, norms = _results(emissions, keep)
        _backends.require_extension().dense_filter(
            tuple(emissions.shape),
            *addresses(emissions, transitions, lengths, *((messages, norms) if keep else (None, None)), total),
            torch.get_num_threads(),
        )
    else:
        check_on_host(transitions)
        with full_precision(emissions.device):
            total, messages, norms = _torch_filter(emissions, transitions, lengths)
        if not keep:
            messages, norms = messages.new_empty((0, 0, messages.shape[2])), norms.new_empty((0, 0))
    if total.device.type == "cpu":
        require_paths(total == NEVER)
    return total, messages, norms


def _torch_filter(emissions, transitions, lengths):
    factors = None
    if emissions.device.type == "cpu":
        low, high = transitions.aminmax()
        factors = (transitions - high).exp() if high - low <= SPAN else None
    message, alpha = torch.zeros_like(emissions[:, 0]), torch.zeros_like(emissions[:, 0])
    messages, norms = [], []
    for t in range(emissions.shape[1]):
        if t > 0 and factors is None:
            message = torch.logsumexp(alpha[:, :, None] + transitions, 1)
        elif t > 0 and factors is not None:
            message = (alpha.exp() @ factors).log() + high
        total = message + emissions[:, t]
        norm = total.amax(1)
        total = torch.where(norm[:, None] > NEVER, total - norm[:, None], total)
        here = inside(lengths, t)
        messages.append(message if here is None else message.masked_fill(~here, 0))
        norms.append(norm if here is None else norm.masked_fill(~here[:, 0], 0))
        alpha = total if here is None else torch.where(here, total, alpha)
    taken_off = torch.stack(norms, 1)
    result = alpha.double().logsumexp(1) + taken_off.double().sum(1)
    return result if lengths is None else result.masked_fill(lengths == 0, 0), torch.stack(messages, 1), taken_off


def _fake_backward(grad, messages, norms, emissions, transitions, lengths, *, impl="auto"):
    return emissions.new_empty(emissions.shape), transitions.new_empty(transitions.shape)


def _backward(grad, messages, norms, emissions, transitions, lengths, *, impl="auto"):
    """One reverse sweep for a gradient of the messages."""
    if choose(impl, emissions, triton=False) != "cpu":
        return _torch_backward(grad, messages, norms, emissions, transitions, lengths)
    grad, emissions, transitions, lengths = contiguous(grad, emissions, transitions, lengths)
    results = emissions.new_empty(emissions.shape), transitions.new_empty(transitions.shape)
    _backends.require_extension().dense_filter_backward(
        tuple(emissions.shape),
        *addresses(emissions, transitions, lengths, grad, messages, norms, *results),
        torch.get_num_threads(),
    )
    return results


def _torch_backward(grad, messages, norms, emissions, transitions, lengths):
    total = torch.zeros_like(transitions)

    def take(t: int, share: torch.Tensor) -> None:
        total.add_(share.sum(0))

    return reverse_sweep(grad, messages, norms, emissions, lambda t: transitions, lengths, take), total


def _setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    emissions, transitions, lengths, ctx.keep = inputs
    _, messages, norms = output
    ctx.impl = keyword_only_inputs["impl"]
    ctx.mark_non_differentiable(norms)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(messages, norms, emissions, transitions, lengths)


def _autograd(ctx, grad_partition, grad_messages, _grad_norms):
    if grad_partition is None and grad_messages is None:
        return None, None, None, None
    if not ctx.keep:
        raise RuntimeError("dense_filter was called with keep=False, so it has no gradient")
    messages, norms, emissions, transitions, lengths = ctx.saved_tensors
    seed = None
    if grad_partition is not None:
        weight = grad_partition.to(emissions.dtype)[:, None, None]
        seed = last_law(messages, emissions, lengths) * weight
    into = seed if grad_messages is None else grad_messages if seed is None else grad_messages + seed
    backward = torch.ops.simctg_fast.dense_filter_backward
    grad_emissions, grad_transitions = backward(into, messages, norms, emissions, transitions, lengths, impl=ctx.impl)
    return grad_emissions if seed is None else grad_emissions + seed, grad_transitions, None, None


def _second_setup(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _second(ctx, *directions):
    grad, _, _, emissions, transitions, lengths = ctx.saved_tensors
    by = second_derivative(lambda e, m: _messages(e, m, lengths), directions, grad, emissions, transitions)
    return by[0], None, None, by[1], by[2], None


def _messages(emissions, transitions, lengths):
    """The messages once more, differentiable: what is -inf passes no gradient, not even NaN."""
    alpha = message = torch.zeros_like(emissions[:, 0])
    messages = []
    for t in range(emissions.shape[1]):
        if t > 0:
            total = alpha[:, :, None] + transitions
            top = total.detach().amax(1, keepdim=True)
            live = top > NEVER
            weight = torch.where(live, total - torch.where(live, top, 0), NEVER).exp().sum(1)
            message = torch.where(live[:, 0], torch.where(live[:, 0], weight, 1).log() + top[:, 0], NEVER)
        here = inside(lengths, t)
        messages.append(message if here is None else torch.where(here, message, 0))
        total = message + emissions[:, t]
        total = torch.where(total > NEVER, total - total.detach().amax(1, keepdim=True), NEVER)
        alpha = total if here is None else torch.where(here, total, alpha)
    return torch.stack(messages, 1)


# ---- the best paths --------------------------------------------------------------------------------------------------


def _fake_viterbi(emissions, transitions, lengths=None, *, impl="auto"):
    check_dense(emissions, transitions, lengths)
    return emissions.new_empty(emissions.shape[:2], dtype=torch.int64)


def _viterbi(emissions, transitions, lengths=None, *, impl="auto"):
    path = _fake_viterbi(emissions, transitions, lengths)
    if choose(impl, emissions, triton=False) == "cpu":
        emissions, transitions, lengths = contiguous(emissions, transitions, lengths)
        _backends.require_extension().dense_viterbi(
            tuple(emissions.shape), *addresses(emissions, transitions, lengths, path), torch.get_num_threads()
        )
    else:
        check_on_host(transitions)
        backpointers, best = best_prefixes(emissions, lambda t: transitions, lengths)
        top, last = best.max(1)
        path = viterbi_backtrace(backpointers, last, lengths, impl="torch").masked_fill((top == NEVER)[:, None], -1)
    if path.device.type == "cpu":
        check_paths(path[:, :, None], lengths)
    return path


def _fake_kbest(emissions, transitions, lengths, paths, *, impl="auto"):
    check_dense(emissions, transitions, lengths)
    batch, length, _ = emissions.shape
    if paths < 1:
        raise ValueError(f"n is {paths}, must be at least 1")
    return emissions.new_empty((batch, length, paths), dtype=torch.int64)


def _kbest(emissions, transitions, lengths, paths, *, impl="auto"):
    result = _fake_kbest(emissions, transitions, lengths, paths)
    if choose(impl, emissions, triton=False) == "torch":
        check_on_host(transitions)
        return list_viterbi(emissions, lambda t: transitions, lengths, paths)
    emissions, transitions, lengths = contiguous(emissions, transitions, lengths)
    _backends.require_extension().dense_kbest(
        tuple(emissions.shape),
        *addresses(emissions, transitions, lengths),
        paths,
        result.data_ptr(),
        torch.get_num_threads(),
    )
    return result


define(
    "dense_filter(Tensor emissions, Tensor transitions, Tensor? lengths=None, bool keep=True, *, "
    'str impl="auto") -> (Tensor, Tensor, Tensor)',
    _forward,
    _fake,
)
define(
    "dense_filter_backward(Tensor grad, Tensor messages, Tensor norms, Tensor emissions, Tensor transitions, "
    'Tensor? lengths, *, str impl="auto") -> (Tensor, Tensor)',
    _backward,
    _fake_backward,
)
define(
    'dense_viterbi(Tensor emissions, Tensor transitions, Tensor? lengths=None, *, str impl="auto") -> Tensor',
    _viterbi,
    _fake_viterbi,
)
define(
    'dense_kbest(Tensor emissions, Tensor transitions, Tensor? lengths, int paths, *, str impl="auto") -> Tensor',
    _kbest,
    _fake_kbest,
)
register("dense_filter", _autograd, _setup_context)
register("dense_filter_backward", _second, _second_setup)
register("dense_viterbi")
