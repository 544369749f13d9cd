"""What the losses do on CUDA, as far as it shows without a GPU: fake CUDA tensors have shapes and run every branch of
the operators' implementations, a dispatch mode sees each ATen operator, and reading a value on the host raises.

Autograd needs a real device, so what it adds around our operators (the same operators on every device) is watched on
the CPU, and our operators' own backward implementations are called.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass, field

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from simctg_fast import SimCTGLoss, contrastive_loss, functional, simcse_sup_loss, simcse_unsup_loss
from simctg_fast.functional import (
    contrastive_loss_items,
    cosine_similarity_matrix,
    info_nce,
    simcse_loss_from_embeddings,
)
from simctg_fast.integrations._batch import isotropy_sums
from simctg_fast.losses import padding_mask
from simctg_fast.ops import _accumulate
from simctg_fast.ops import contraclm as contraclm_ops
from simctg_fast.ops import contrastive_loss as contrastive_ops
from simctg_fast.ops import cosine_similarity as cosine_ops
from simctg_fast.ops import simcse as simcse_ops

from .. import conftest
from ..emulated_cuda import device_guard, varies_on_cuda
from ..processes import run_child
from ..repository import INSTALLED

aten = torch.ops.aten


@dataclass
class Watch(TorchDispatchMode):
    """Refuses sums in no fixed order; notes what is at least one kernel, and the size of the largest new tensor."""

    names: list[str] = field(default_factory=list)
    largest: int = 0

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert not varies_on_cuda(func, args, kwargs), f"{func} depends on the order of float atomics on CUDA"
        result = func(*args, **kwargs)
        if func is aten._to_copy.default:
            assert args[0].device.type == result.device.type, "a copy between host and device makes the host wait"
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        name = func._schema.name
        if not view and name.startswith(("aten::", "simctg_fast::")) and "empty" not in name:
            self.names.append(str(func))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and not view:
                self.largest = max(self.largest, value.numel())
        return result


class Launches(list):
    """In place of `start_kernel`: the names of the kernels, and what they may assume of their arguments."""

    def __call__(self, kernel, grid, *args, **options):
        assert all(size > 0 for size in grid)
        assert len(args) + sum(name in kernel.arg_names for name in options) == len(kernel.arg_names)
        self.append(kernel.__name__)


@pytest.fixture
def launches(monkeypatch):
    """The Triton kernels are noted and not run."""
    pytest.importorskip("triton")
    from simctg_fast.kernels import contraclm, contrastive_loss, cosine_similarity, simcse

    noted = Launches()
    for module in (contraclm, contrastive_loss, cosine_similarity, simcse):
        monkeypatch.setattr(module, "start_kernel", noted)
        monkeypatch.setattr(module, "architecture", lambda device: 90)
        monkeypatch.setattr(module, "on", lambda tensor: contextlib.nullcontext())
    return noted


@pytest.fixture
def cuda(monkeypatch):
    """A function that makes fake CUDA tensors; the mode is on, and what is allocated is not filled with NaN."""
    monkeypatch.setattr(conftest, "_poison", lambda tensor: tensor)
    with device_guard(), FakeTensorMode():

        def make(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="cuda")

        yield make


def test_the_watch_bites(cuda):
    table, index, rows = cuda(4, 3), cuda(9, dtype=torch.int64), cuda(9, 3)
    for call in (
        lambda: table.index_add_(0, index, rows),
        lambda: table.index_put_((index,), rows),
        lambda: table.scatter_add_(0, index[:, None], rows),
        lambda: rows.cumsum(0),
    ):
        with pytest.raises(AssertionError, match="float atomics"), Watch():
            call()
    with pytest.raises(DataDependentOutputException), Watch():
        bool((rows > 0).all())
    with pytest.raises(AssertionError, match="between host and device"), Watch():
        torch.tensor([1, 2], device="cuda")
    with Watch() as watch:
        table.index_put_((index,), rows, accumulate=True)
        (index > 0).cumsum(0)
        (table[:2] + 1).sum()
    assert len(watch.names) == 5
    assert watch.largest == 12


def test_rows_that_share_a_target(cuda):
    with Watch() as watch:
        _accumulate.add_rows_(cuda(4, 3), cuda(9, dtype=torch.int64), cuda(9, 3))
    assert watch.names == ["aten.index_put_.default"]


def test_rows_that_share_a_target_on_the_cpu():
    table, index, rows = torch.randn(4, 3), torch.tensor([3, 0, 3, 3, 1]), torch.randn(5, 3)
    expected = table.clone()
    for target, row in zip(index.tolist(), rows, strict=True):
        expected[target] += row
    _accumulate.add_rows_(table, index, rows)
    assert torch.equal(table, expected)


IMPLS = ["torch", "triton"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["pairs", "paper", "dense"])
def test_contrastive_loss(cuda, launches, reduction, dtype, impl):
    length = 300 if impl == "torch" else 520
    states, mask = cuda(3, length, 64, dtype=dtype), cuda(3, length, dtype=torch.bool)
    for own_mask in (None, mask) if reduction != "dense" else (None,):
        for normalizer in (None, cuda(dtype=torch.int64)):
            with Watch() as watch:
                _, *saved = contrastive_ops._forward(states, own_mask, normalizer, 0.5, reduction, True, impl)
                gradient = contrastive_ops._backward(cuda(), states, *saved, impl)
            assert (gradient.shape, gradient.dtype, gradient.device) == (states.shape, dtype, states.device)
            if impl == "triton":
                assert watch.names == []  # nothing but our own launches
    if impl == "triton":
        assert launches[:3] == ["norms_kernel", "hinge_kernel", "sums_kernel"]
        assert launches[-1] == "gradient_kernel"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launches_of_the_contrastive_loss(cuda, launches, monkeypatch, dtype):
    """32 x 256 x 768: three launches forward, whatever the arguments, and one or two backward."""
    from simctg_fast.kernels import contrastive_loss

    monkeypatch.setattr(contrastive_loss, "precise", lambda: False)
    states, mask = cuda(32, 256, 768, dtype=dtype), cuda(32, 256, dtype=torch.bool)
    with Watch() as watch:
        _, *saved = contrastive_ops._forward(states, mask, cuda(dtype=torch.int64), 0.5, "pairs", True, "triton")
        assert len(launches) == 3
        contrastive_ops._backward(cuda(), states, *saved, "triton")
    assert launches[3:] == ["norms_kernel"] * (dtype == torch.float32) + ["gradient_kernel"]
    assert watch.names == []


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_simcse(cuda, launches, scale, dtype, impl):
    vectors, keys, grad = cuda(600, 32, dtype=dtype), cuda(900, 32, dtype=dtype), cuda(600)
    targets = cuda(600, dtype=torch.int64)
    with Watch():
        _, *saved = simcse_ops._self_forward(vectors, scale, impl)
        gradient = simcse_ops._self_backward(grad, vectors, *saved, scale, impl)
        assert (gradient.shape, gradient.dtype, gradient.device) == (vectors.shape, dtype, vectors.device)
        for itself in (-1, 5):
            _, *saved = simcse_ops._pair_forward(vectors, keys, targets, itself, scale, impl)
            gradients = simcse_ops._pair_backward(grad, vectors, keys, targets, *saved, itself, scale, impl)
            assert [g.shape for g in gradients] == [vectors.shape, keys.shape]
            assert [g.dtype for g in gradients] == [dtype] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "launched"), [((40, 300, 32), 1), ((200, 300, 32), 3), ((3, 3000, 32), 6)])
def test_contraclm(cuda, launches, shape, launched, dtype):
    """The host never asks how long a sequence is, nor starts kernels for each: backward a kernel and a product for
    2^25 weights, so for several sequences or for a strip of a long one."""
    first, second, real = cuda(*shape, dtype=dtype), cuda(*shape, dtype=dtype), cuda(*shape[:2], dtype=torch.bool)
    with Watch() as watch:
        _, *saved = contraclm_ops._forward(first, second, real, 20.0, True, "triton")
        assert launches == ["norms_kernel", "norms_kernel", "token_lse_kernel"]
        gradients = contraclm_ops._backward(cuda(shape[0]), first, second, real, *saved, 20.0, "triton")
    assert [(g.shape, g.dtype, g.device) for g in gradients] == [(first.shape, dtype, first.device)] * 2
    assert launches[3:] == ["token_weights_kernel"] * launched
    assert watch.names.count("aten.bmm.out") == launched
    assert len(watch.names) <= 50 + 2 * launched
    assert watch.largest <= max(1 << 25, 2 * first.numel())


@pytest.mark.parametrize("impl", IMPLS)
def test_the_rest(cuda, launches, impl, monkeypatch):
    states, tokens = cuda(2, 70, 32, dtype=torch.bfloat16), cuda(2, 70, dtype=torch.int64)
    with Watch():
        matrix, inverse = cosine_ops._forward(states, impl)
        cosine_ops._backward(matrix, states, inverse)
        mask = padding_mask(tokens, 0)
        contrastive_loss_items(mask)
        isotropy_sums(states, mask)
        functional.cosine_regularization(states, mask, normalizer=cuda())
        functional.contraclm_token_loss_items(mask, "tokens")
        simcse_ops._dense_pair_loss(states[0], states[1], tokens[0], 20.0, 0)
        seen = []
        monkeypatch.setattr(functional, "_contrastive_loss", lambda *args: seen.append(args))
        monkeypatch.setattr(functional, "_pair_loss", lambda *args: args[0].sum(dim=1))
        for normalizer in (7, 7.5, cuda(1)):
            functional.contrastive_loss(states, 0.5, mask, normalizer=normalizer, impl=impl)
        functional.info_nce(states[0], states[1], targets=0)
    assert all(args[2].dtype == torch.float32 for args in seen)
    assert all(args[2].shape == () and args[2].device == states.device for args in seen)


ROWS, WIDTH = 32768, 768


def counted(cuda, launches, name: str, impl: str, rows: int) -> tuple[Watch, Watch]:
    """Forward and backward of a SimCSE operator."""
    vectors, grad = cuda(rows, WIDTH, dtype=torch.bfloat16), cuda(rows)
    if name == "self":
        forward, backward, arguments = simcse_ops._self_forward, simcse_ops._self_backward, (vectors,)
        tail = (20.0, impl)
    else:
        forward, backward = simcse_ops._pair_forward, simcse_ops._pair_backward
        arguments, tail = (vectors, cuda(rows, WIDTH, dtype=torch.bfloat16), cuda(rows, dtype=torch.int64)), ()
        tail = (-1, 20.0, impl)
    launches.clear()
    with Watch() as first:
        _, *saved = forward(*arguments, *tail)
    first.names += launches
    launches.clear()
    with Watch() as second:
        backward(grad, *arguments, *saved, *tail)
    second.names += launches
    return first, second


@pytest.mark.parametrize("name", ["self", "pair"])
@pytest.mark.parametrize("rows", [2048, 8192, ROWS])
def test_launches_of_simcse_in_triton(cuda, launches, name, rows):
    """One launch forward beside the sum of its shares; backward a kernel and a product for each strip of 2^25."""
    strips = (1 if name == "self" else 2) * max(1, rows * rows >> 25)
    first, second = counted(cuda, launches, name, "triton", rows)
    assert second.names.count("weights_kernel") == second.names.count("aten.mm.out") == strips
    assert len(first.names) <= 40
    assert len(second.names) - 2 * strips <= 40
    assert max(first.largest, second.largest) <= max(1 << 25, rows * WIDTH)


@pytest.mark.parametrize("name", ["self", "pair"])
def test_launches_of_simcse_in_torch(cuda, launches, name):
    """A strip of 2^25 elements costs a dozen launches, not each block of a CPU's cache."""
    first, second = counted(cuda, launches, name, "torch", ROWS)
    limit = 1 << 25
    blocks = first.names.count("aten.addmm.out")
    assert 0 < blocks <= {"self": 40, "pair": 32}[name]  # of the symmetric matrix a half, a square and a rest at a time
    assert len(first.names) - 6 * blocks <= 40
    assert len(second.names) - 10 * blocks <= 40
    assert limit // 2 < max(first.largest, second.largest) <= limit


def public_losses():
    """Public functions and modules with a training step's arguments, on the CPU."""
    states = torch.randn(2, 9, 8)
    mask = torch.ones(2, 9, dtype=torch.bool)
    ids = torch.randint(0, 5, (2, 9))
    rows = torch.randn(12, 8)
    repeated = torch.tensor([2, 2, 0, 2])
    for reduction in ("pairs", "paper", "dense"):
        own = None if reduction == "dense" else mask
        yield states, lambda s, r=reduction, m=own: contrastive_loss(s, 0.5, m, r, normalizer=torch.tensor(7))
    yield states, lambda s: sum(SimCTGLoss(0.5, 8, 0)(s, s, ids, ids))
    yield states, lambda s: cosine_similarity_matrix([s, s]).sum()
    for reduction in ("sequences", "tokens"):
        yield states, lambda s, r=reduction: functional.contraclm_token_loss(s, 2 - s, mask, reduction=r)
    yield states, lambda s: functional.cosine_regularization(s, mask, normalizer=torch.tensor(7))
    yield rows, simcse_unsup_loss
    for symmetric in (False, True):
        yield rows, lambda e, s=symmetric: simcse_sup_loss(e, symmetric=s)
        yield rows, lambda e, s=symmetric: simcse_loss_from_embeddings(e[:4], e[4:8], e[8:], symmetric=s)
    yield rows, lambda e: simcse_loss_from_embeddings(e[:6], e[6:], in_view_negatives=True)
    for targets in (1, repeated):
        yield rows, lambda e, t=targets: info_nce(e[:4], e[4:], targets=t)


@pytest.mark.parametrize("delegated", [False, True])
def test_autograd_around_our_operators(monkeypatch, delegated):
    """Forward and backward of all public losses, with SimCSE in our operators or, as small ones on CUDA, in torch's."""
    monkeypatch.setattr(simcse_ops, "_delegates", lambda impl, queries, columns: delegated)
    for leaf, loss_function in public_losses():
        leaf = leaf.detach().requires_grad_()
        with Watch() as watch:
            loss_function(leaf).backward()
        assert leaf.grad.isfinite().all()
        assert watch.names
    assert any("pair_loss" in name for name in watch.names) != delegated


SCRIPT = """
import torch
from simctg_fast import contrastive_loss, simcse_unsup_loss
from simctg_fast.functional import contraclm_token_loss, cosine_similarity_matrix, info_nce

def bits(function, leaf, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    leaf = leaf.detach().requires_grad_()
    loss = function(leaf)
    loss.backward()
    return loss.detach(), leaf.grad

torch.manual_seed(0)
targets = torch.randint(0, 5, (3000,), device="cuda")  # hundreds of rows a target
mask = torch.rand(4, 700, device="cuda") > 0.1
for impl in ("torch", "triton"):
    for dtype in (torch.float32, torch.bfloat16):
        states = torch.randn(4, 700, 64, device="cuda", dtype=dtype)
        rows = torch.randn(6000, 64, device="cuda", dtype=dtype)
        cases = {
            "pairs": (states, lambda s: contrastive_loss(s, 0.5, mask, impl=impl)),
            "paper": (states, lambda s: contrastive_loss(s, 0.5, mask, "paper", impl=impl)),
            "dense": (states, lambda s: contrastive_loss(s, 0.5, None, "dense", impl=impl)),
            "cosine": (states, lambda s: cosine_similarity_matrix(s, impl=impl).float().square().sum()),
            "contraclm": (states, lambda s: contraclm_token_loss(s, s * s + 1, mask, impl=impl)),
            "unsupervised": (rows, lambda e: simcse_unsup_loss(e, impl=impl)),
            "repeated targets": (rows, lambda e: info_nce(e[:3000], e[3000:], targets=targets, impl=impl)),
            "small": (rows[:512], lambda e: simcse_unsup_loss(e)),
        }
        for name, (leaf, function) in cases.items():
            first = bits(function, leaf, False)
            for again in (bits(function, leaf, False), bits(function, leaf, True)):
                assert all(map(torch.equal, first, again)), (name, impl, dtype)
"""


@pytest.mark.gpu
def test_the_same_bits_in_every_run():
    """Twice, and in torch's deterministic mode, which has no other algorithm for what we call."""
    environment = {**os.environ, "PYTHONPATH": str(INSTALLED), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = run_child([sys.executable, "-c", SCRIPT], env=environment, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]
