"""No training step of the CRF meets an operator whose result differs from run to run on CUDA.

There is no CUDA device here, so steps run on the CPU with the choice of CUDA's operators patched in, while every
operator that reaches the dispatcher is looked up in torch's list of those that are not deterministic on CUDA. With the
Triton kernels that happens in the interpreter, in a process of its own.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from simctg_fast import LinearChainCRF, LowRankCRF, StochasticViterbiSamples
from simctg_fast.ops import _accumulate
from simctg_fast.ops._accumulate import add_rows_
from simctg_fast.ops.crf_common import add_along_, pick

from ..emulated_cuda import varies_on_cuda
from ..processes import run_child
from ..repository import WITH_TESTS


class SameInEveryRun(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "simctg_fast":  # and what our own operators are made of
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        if varies_on_cuda(func, args, kwargs):
            raise AssertionError(f"{func} is not deterministic on CUDA")
        return func(*args, **kwargs)


@contextmanager
def as_on_cuda():
    before = _accumulate._has_atomics
    _accumulate._has_atomics = lambda device: True
    try:
        with SameInEveryRun():
            yield
    finally:
        _accumulate._has_atomics = before


def training_steps(impl: str, device: str = "cpu", shape=(3, 4, 9, 4, 3), names=None):
    """What a training step can compute, with the gradients of all that has one. Slots are drawn again and again."""
    batch, length, vocabulary, beam, rank = shape
    torch.manual_seed(0)
    crf, other = (LowRankCRF(vocabulary, rank, beam, impl=impl).to(device) for _ in range(2))
    emissions = torch.randn(batch, length, vocabulary, device=device)
    targets = torch.randint(vocabulary, (batch, length), device=device)
    uniforms = torch.rand(batch, length - 1, beam, 9, device=device)

    def published(e, lengths):
        model = StochasticViterbiSamples(vocabulary, rank, beam, num_samples=9).to(device)
        model.load_state_dict(crf.state_dict())
        model.impl = impl
        masks = None if lengths is None else torch.arange(length, device=device) < lengths[:, None]
        probs = model(e, masks, uniforms=uniforms)[0]
        return (probs * probs.detach().sin()).sum(), model

    def sampled(e, lengths, **options):
        drawn = crf.sample(e, lengths, num_samples=9, generator=torch.Generator().manual_seed(1), **options)
        weights = torch.linspace(-1, 1, 9, device=device)
        return (drawn.log_prob * weights).sum(), crf

    def scored(e, lengths):
        with torch.no_grad():
            drawn = crf.sample(e, lengths, num_samples=9, generator=torch.Generator().manual_seed(1))
        return crf.log_prob(e, drawn.tokens, lengths, beam_tokens=drawn.beam_tokens).token_log_probs.sin().sum(), crf

    steps = {
        "nll": lambda e, n: (crf.nll(e, targets, n), crf),
        "log_prob": scored,
        "log_partition": lambda e, n: (crf.log_partition(e, n).sum(), crf),
        "sample": sampled,
        "sample, published law": lambda e, n: sampled(e, n, mode="stochastic_viterbi"),
        "marginals": lambda e, n: (crf.marginals(e, n).probs, crf),
        "entropy": lambda e, n: (crf.entropy(e, n).sum(), crf),
        "kl": lambda e, n: (crf.kl(other, e, e.flip(0), lengths=n).sum(), crf),
        "viterbi": lambda e, n: (crf.viterbi(e, n).position_scores.sin().sum(), crf),
        "kbest": lambda e, n: (crf.kbest(e, n, n=5).position_scores.sin().sum(), crf),
        "published classes": published,
    }
    tagger = LinearChainCRF(vocabulary, impl="auto" if impl == "triton" else impl).to(device)
    steps["tagger"] = lambda e, n: (tagger.nll(e, targets, n), tagger)
    if impl == "triton":
        del steps["kbest"]  # which has no kernel
    results = {}
    for name in steps if names is None else names:
        for ragged in (False, True):
            step = steps[name]
            lengths = torch.tensor([length, 2, 0], device=device)[:batch] if ragged else None
            own = emissions.clone().requires_grad_()
            value, model = step(own, lengths)
            model.zero_grad()
            if value.requires_grad:
                value.backward()
            gradients = [own.grad, *(p.grad for p in model.parameters())]
            results[name, ragged] = [value.detach(), *(g.clone() for g in gradients if g is not None)]
    return results


def check_steps(impl: str, shape=(3, 4, 9, 4, 3), names=None) -> None:
    """No operator of CUDA's list, and the values that PyTorch's path gives with the CPU's operators."""
    with as_on_cuda():
        ours = training_steps(impl, shape=shape, names=names)
    theirs = training_steps("torch", shape=shape, names=list(dict.fromkeys(name for name, _ in ours)))
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert len(values) == (1 if name[0] == "marginals" else 5 if name[0] == "tagger" else 4), name
        for a, b in zip(values, theirs[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


FAULTS = {
    "gather": lambda x, i: x.gather(1, i).sum().backward(),
    "index_add_": lambda x, i: torch.zeros(3, 4).index_add_(0, i[0], x.detach()[:2]),
    "index_select": lambda x, i: x.index_select(0, i[0]).sum().backward(),
    "cumsum": lambda x, i: x.cumsum(1),
    "scatter_": lambda x, i: torch.zeros(3, 4).scatter_(1, i, x.detach()),
    "index_put_": lambda x, i: torch.zeros(3, 4).index_put_((i[0],), x.detach()[:2]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_differs_is_noticed(fault):
    x, index = torch.randn(3, 4, requires_grad=True), torch.tensor([[0, 0], [1, 1], [2, 2]])
    with SameInEveryRun(), pytest.raises(AssertionError, match="not deterministic"):
        FAULTS[fault](x, index)


def test_training_steps_in_pytorch():
    check_steps("torch")


def run_interpreted(call: str) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": WITH_TESTS}
    code = f"from tests.crf import test_crf_determinism as t; t.{call}"
    done = run_child([sys.executable, "-W", "ignore", "-c", code], env=environment, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]


def test_training_steps_with_the_kernels():
    run_interpreted("check_steps('triton', (2, 3, 5, 2, 2), ['log_prob', 'published classes'])")


@pytest.mark.full
def test_all_training_steps_with_the_kernels():
    run_interpreted("check_steps('triton')")


def test_rows_on_a_cuda_tensor():
    """The real choice by device, on tensors without memory."""

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    for device, expected in (("cuda", "aten::index_put_"), ("cpu", "aten::index_add_")):
        seen: list[str] = []
        with FakeTensorMode():
            table, index, rows = (
                torch.empty(5, 3, device=device), torch.empty(7, dtype=torch.int64, device=device),
                torch.empty(7, 3, device=device),
            )  # fmt: skip
            with Record():
                add_rows_(table, index, rows)
        assert expected in seen, seen


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_sums_along_a_dimension(monkeypatch, dim):
    """The way that CUDA goes, on a table whose memory is in order and on views of index and values."""
    shape = [3, 4, 5]
    index = torch.randint(shape[dim], (5, 4, 3)).transpose(0, 2)
    values = torch.randn(5, 4, 3).transpose(0, 2)
    expected = torch.ones(shape).scatter_add_(dim, index, values)
    monkeypatch.setattr(_accumulate, "_has_atomics", lambda device: True)
    table = torch.ones(shape)
    add_along_(table, dim, index, values)
    torch.testing.assert_close(table, expected)


def test_a_slot_without_weight_is_never_drawn(monkeypatch):
    """Sums of floats in another order than the slots' can rise at a slot that adds nothing; sums of integers cannot."""

    def as_a_device_does(x, dim):
        step = 1
        while step < x.shape[dim]:
            x = torch.cat([x[:, :step], x[:, step:] + x[:, :-step]], dim)
            step *= 2
        return x

    weights = torch.rand(64, 300)
    weights[torch.rand(64, 300) < 0.5] = 0
    running = as_a_device_does(weights, 1)
    edges = (running / running[:, -1:]).clamp(max=1 - 2**-24)  # uniforms that fall on the edges
    monkeypatch.setattr(torch.Tensor, "cumsum", as_a_device_does)
    for k in range(300):
        assert (weights.gather(1, pick(weights, edges[:, k], dim=1)[:, None]) > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("strict", [False, True], ids=["plain", "strict"])
def test_two_runs_on_cuda_are_the_same(impl, strict):
    torch.use_deterministic_algorithms(strict)
    try:
        runs = [training_steps(impl, "cuda", (3, 40, 3000, 256, 32)) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for name, values in runs[0].items():
        assert all(torch.equal(a, b) for a, b in zip(values, runs[1][name], strict=True)), name
