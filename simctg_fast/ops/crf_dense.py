"""The operators `simctg_fast::dense_log_partition` and `simctg_fast::dense_viterbi`: one matrix of transitions for all
steps, as a tagger has.

With shared transitions a step is a product of matrices in the space of exponentials: the exponentials of the matrix are
taken once, and those of the states are `B K` a step instead of `B K K`. It is used where the transitions span at most
60 nats, which no underflow can then spoil; beyond (hard constraints) the recursion runs in logarithms.
"""

from __future__ import annotations

import torch

from . import _backends
from .crf_common import address, choose, inside
from .crf_viterbi import pointer_dtype
from .viterbi_backtrace import viterbi_backtrace

SPAN = 60.0

_library = torch.library.Library("simctg_fast", "FRAGMENT")
for _name in ("dense_log_partition", "dense_viterbi"):
    _library.define(
        f'{_name}(Tensor emissions, Tensor transitions, Tensor? lengths=None, *, str impl="auto") -> Tensor',
        tags=(torch.Tag.pt2_compliant_tag,),
    )
_library.define(
    "dense_log_partition_backward(Tensor emissions, Tensor transitions, Tensor? lengths, Tensor grad) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def dense_log_partition(emissions, transitions, lengths=None, *, impl: str = "auto") -> torch.Tensor:
    """`(B,)` for `emissions (B, T, K)` and `transitions (K, K)` from row to column; fp32 or fp64, differentiable
    once."""
    return torch.ops.simctg_fast.dense_log_partition(emissions, transitions, lengths, impl=impl)


def dense_viterbi(emissions, transitions, lengths=None, *, impl: str = "auto") -> torch.Tensor:
    """The best path, `(B, T)` int64, -1 beyond the lengths."""
    return torch.ops.simctg_fast.dense_viterbi(emissions, transitions, lengths, impl=impl)


def _check(emissions: torch.Tensor, transitions: torch.Tensor, lengths: torch.Tensor | None) -> None:
    if emissions.dim() != 3 or emissions.shape[1] < 1 or emissions.shape[2] < 1:
        raise ValueError(f"emissions has shape {tuple(emissions.shape)}, must be (batch, length >= 1, tags >= 1)")
    tags = emissions.shape[2]
    if emissions.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"emissions has dtype {emissions.dtype}, must be float32 or float64")
    if transitions.shape != (tags, tags) or transitions.dtype != emissions.dtype:
        raise ValueError(
            f"transitions is {transitions.dtype} {tuple(transitions.shape)}, must be {emissions.dtype} ({tags}, {tags})"
        )
    if lengths is not None and (lengths.shape != emissions.shape[:1] or lengths.dtype != torch.int64):
        raise ValueError(f"lengths is {lengths.dtype} {tuple(lengths.shape)}, must be int64 ({emissions.shape[0]},)")
    for name, other in (("transitions", transitions), ("lengths", lengths)):
        if other is not None and other.device != emissions.device:
            raise ValueError(f"{name} is on {other.device}, emissions on {emissions.device}; one device is needed")


def _call(function, emissions, transitions, lengths, out):
    emissions, transitions = emissions.contiguous(), transitions.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    function(
        tuple(emissions.shape),
        emissions.data_ptr(),
        transitions.data_ptr(),
        address(lengths),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _fake_partition(emissions, transitions, lengths=None, *, impl="auto"):
    _check(emissions, transitions, lengths)
    return emissions.new_empty(emissions.shape[:1])


def _fake_viterbi(emissions, transitions, lengths=None, *, impl="auto"):
    _check(emissions, transitions, lengths)
    return emissions.new_empty(emissions.shape[:2], dtype=torch.int64)


def _partition(emissions, transitions, lengths=None, *, impl="auto"):
    _check(emissions, transitions, lengths)
    if choose(impl, emissions, triton=False) == "cpu":
        out = emissions.new_empty(emissions.shape[:1], dtype=torch.float64)
        function = _backends.require_extension().dense_log_partition
        return _call(function, emissions, transitions, lengths, out).to(emissions.dtype)
    alphas, _, norms, _ = _forward(emissions, transitions, lengths)
    result = alphas[-1].double().logsumexp(1) + torch.stack(norms, 1).double().sum(1)
    if lengths is not None:
        result = result.masked_fill(lengths == 0, 0)
    return result.to(emissions.dtype)


def _exponential_space(transitions: torch.Tensor) -> bool:
    low, high = transitions.aminmax()
    return bool(high - low <= SPAN)


def _forward(emissions, transitions, lengths):
    """Lists over t: alpha, normalised to a largest value of 0; the message into it; its normaliser. And the matrix of
    exponentials, None where the span is too wide."""
    table = transitions.amax() if _exponential_space(transitions) else None
    factors = None if table is None else (transitions - table).exp()
    alphas: list[torch.Tensor] = []
    messages, norms = [torch.zeros_like(emissions[:, 0])], []
    for t in range(emissions.shape[1]):
        if t > 0:
            if factors is None:
                messages.append(torch.logsumexp(alphas[-1][:, :, None] + transitions, 1))
            else:
                messages.append((alphas[-1].exp() @ factors).log() + table)
        alpha = messages[-1] + emissions[:, t]
        norm = alpha.amax(1)
        alpha = alpha - norm[:, None]
        here = inside(lengths, t)
        if here is not None:
            alpha = torch.where(here, alpha, alphas[-1] if alphas else torch.zeros_like(alpha))
            norm = torch.where(here[:, 0], norm, 0)
        alphas.append(alpha)
        norms.append(norm)
    return alphas, messages, norms, factors


def _fake_gradient(emissions, transitions, lengths, grad):
    return emissions.new_empty(emissions.shape), transitions.new_empty(transitions.shape)


def _gradient(emissions, transitions, lengths, grad):
    """One reverse sweep: d log Z / d emissions are the marginals, d / d transitions the expected counts."""
    alphas, messages, _, factors = _forward(emissions, transitions, lengths)
    grad_emissions = emissions.new_zeros(emissions.shape)
    grad_transitions = transitions.new_zeros(transitions.shape)
    flow = alphas[-1].softmax(1) * grad[:, None]
    table = transitions.amax()
    for t in range(emissions.shape[1] - 1, -1, -1):
        here = inside(lengths, t)
        active = flow if here is None else torch.where(here, flow, 0)
        grad_emissions[:, t] = active
        if t == 0:
            break
        before, message = alphas[t - 1], messages[t]
        if factors is None:
            share = (before[:, :, None] + transitions - message[:, None]).clamp(max=0).exp()
            share = torch.where(message[:, None] > float("-inf"), share, 0) * active[:, None]
            grad_transitions += share.sum(0)
            into = share.sum(2)
        else:
            weight, ratio = before.exp(), active / (message - table).exp()
            grad_transitions += (weight.t() @ ratio) * factors
            into = weight * (ratio @ factors.t())
        flow = into if here is None else torch.where(here, into, flow)
    return grad_emissions, grad_transitions


def _viterbi(emissions, transitions, lengths=None, *, impl="auto"):
    _check(emissions, transitions, lengths)
    if choose(impl, emissions, triton=False) == "cpu":
        out = emissions.new_empty(emissions.shape[:2], dtype=torch.int64)
        return _call(_backends.require_extension().dense_viterbi, emissions, transitions, lengths, out)
    best, pointers = emissions[:, 0], [torch.zeros(emissions[:, 0].shape, dtype=torch.int64, device=emissions.device)]
    for t in range(1, emissions.shape[1]):
        value, pointer = (best[:, :, None] + transitions).max(1)
        value = value + emissions[:, t]
        value = value - value.amax(1, keepdim=True)
        here = inside(lengths, t)
        best = value if here is None else torch.where(here, value, best)
        pointers.append(pointer)
    backpointers = torch.stack(pointers, 1).to(pointer_dtype(emissions.shape[2]))
    return viterbi_backtrace(backpointers, best.argmax(1), lengths, impl="torch")


def _setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad):
    emissions, transitions, lengths = ctx.saved_tensors
    return *torch.ops.simctg_fast.dense_log_partition_backward(emissions, transitions, lengths, grad), None


_library.impl("dense_log_partition", _partition, "CompositeExplicitAutograd")
_library.impl("dense_log_partition_backward", _gradient, "CompositeExplicitAutograd")
_library.impl("dense_viterbi", _viterbi, "CompositeExplicitAutograd")
torch.library.register_fake("simctg_fast::dense_log_partition", _fake_partition, lib=_library)
torch.library.register_fake("simctg_fast::dense_log_partition_backward", _fake_gradient, lib=_library)
torch.library.register_fake("simctg_fast::dense_viterbi", _fake_viterbi, lib=_library)
torch.library.register_autograd(
    "simctg_fast::dense_log_partition", _autograd, setup_context=_setup_context, lib=_library
)
