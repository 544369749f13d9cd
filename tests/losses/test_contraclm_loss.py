"""ContraCLM's token-level loss and the cosine regulariser against loops over pairs in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import simctg_fast
from simctg_fast import ContraCLMTokenLoss, CosReg, contraclm_token_loss, cosine_regularization
from simctg_fast.functional import contraclm_token_loss_items, contrastive_loss_items
from simctg_fast.metrics import isotropy
from simctg_fast.ops import contraclm as ops
from simctg_fast.reference import contraclm as reference

IMPLS = ("cpu", "torch")
# Left, right, both sides and the middle; one real token; none.
MASK = torch.tensor(
    [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0], [0] * 7, [1] * 7]
)


def views(shape=(6, 7, 5), dtype=torch.float64):
    """Two views that are alike, as dropout makes them, stacked."""
    generator = torch.Generator().manual_seed(5)
    first = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.4
    return torch.stack([first, first + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)]).to(dtype)


def with_junk(states, mask, value=float("nan")):
    return states.masked_fill(mask[..., None] == 0, value)


def gradient_of(function, data, upstream=1.0):
    leaf = data.detach().clone().requires_grad_()
    loss = function(leaf)
    (loss * upstream).backward()
    return loss.detach(), leaf.grad


def published(first, second, mask, temperature=0.05):
    """The arithmetic of the authors' code for sequences with real tokens: state and twin out of the negatives, and the
    twin once more in the denominator; sequences averaged."""
    losses = []
    for a, b, real in zip(first, second, mask.bool(), strict=True):
        unit = F.normalize(torch.cat([a[real], b[real]]), dim=1)
        n = int(real.sum())
        exponentials = (unit @ unit.T / temperature).exp()
        positive = torch.cat([exponentials.diagonal(n)] * 2)
        negatives = exponentials * ~torch.eye(n, dtype=torch.bool).repeat(2, 2)
        losses.append(-(positive / (negatives.sum(1) + positive)).log().mean())
    return torch.stack(losses).mean()


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [0.05, 1.0, 0.003])  # 0.003: logits whose exponentials overflow a float
@pytest.mark.parametrize("reduction", ["sequences", "tokens"])
def test_contraclm(reduction, temperature, impl):
    data = views()
    data[0, 5, 2] = 0.0

    def truth(x):
        return reference.contraclm_token_loss(x[0], x[1], MASK, temperature, reduction)

    def ours(x):
        return contraclm_token_loss(x[0], x[1], MASK, temperature, reduction, impl=impl)

    expected, gradient = gradient_of(truth, data)
    loss, got = gradient_of(ours, with_junk(data, MASK))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, gradient, rtol=1e-9, atol=1e-12)
    assert not got[:, MASK == 0].any()
    assert not got[:, 3].any(), "a single token has no pair"
    assert got[:, 0, 2:].abs().sum(-1).all()
    loss, got = gradient_of(ours, with_junk(data, MASK).float())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.double(), gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) / temperature)


def test_it_is_what_the_authors_compute():
    data, mask = views(), MASK.clone()
    mask[4] = MASK[0]  # theirs is NaN for a sequence without tokens
    expected, gradient = gradient_of(lambda x: published(x[0], x[1], mask), data)
    loss, got = gradient_of(lambda x: contraclm_token_loss(x[0], x[1], mask), data)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(got, gradient, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("length", [2, 255, 256, 257, 700])
@pytest.mark.parametrize("kept", [0, 3, 16])
def test_lengths_around_the_blocks(length, kept, monkeypatch):
    """One block, a block and a part, six; with all, some and none of them kept for the gradient."""
    monkeypatch.setattr(ops._tiled, "KEPT_BLOCKS", kept)
    data = views((2, length + 3, 12))
    mask = torch.ones(2, length + 3)
    mask[0, :3] = mask[1, 1] = mask[1, -2:] = 0

    def truth(x):
        return published(x[0], x[1], mask, 0.1)

    expected, gradient = gradient_of(truth, data, 3.0)
    for factor in (1.0, 40.0):  # beyond 32 the exponentials are not summed as they are

        def ours(x, factor=factor):
            return contraclm_token_loss(x[0], x[1], mask, 0.1 / factor)

        if factor == 1.0:
            loss, got = gradient_of(ours, data, 3.0)
            torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
            torch.testing.assert_close(got, gradient, rtol=1e-9, atol=1e-12)
            continue
        whole = gradient_of(ours, data)
        monkeypatch.setattr(ops._tiled, "KEPT_BLOCKS", 0)
        for mine, theirs in zip(gradient_of(ours, data), whole, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype):
    data, mask = views((3, 60, 32)).to(dtype), torch.ones(3, 60)
    mask[1, 40:] = 0
    expected, gradient = gradient_of(lambda x: published(x[0], x[1], mask), data.double(), 64.0)
    for impl in IMPLS:
        loss, got = gradient_of(lambda x, i=impl: contraclm_token_loss(x[0], x[1], mask, impl=i), data, 64.0)
        assert (loss.dtype, got.dtype) == (torch.float32, dtype)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
        assert (got.double() - gradient).norm() <= 2 * torch.finfo(dtype).eps * gradient.norm()


@pytest.mark.parametrize("mask", [None, MASK, MASK.bool(), MASK.double() * -0.5, MASK.to(torch.uint8)], ids=str)
def test_cosine_regularization(mask):
    data = views()[0]
    data[0, 3] = 0.0
    real = torch.ones_like(MASK) if mask is None else MASK
    expected, gradient = gradient_of(lambda x: reference.cosine_regularization(x, mask), data)
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        given = with_junk(data, real).to(dtype)
        loss, got = gradient_of(lambda x: cosine_regularization(x, mask), given)
        assert loss.dtype == dtype
        torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=rtol)
        torch.testing.assert_close(got.double(), gradient, rtol=100 * rtol, atol=rtol)
        assert not got[real == 0].any()
    long = MASK[[0, 1, 2, 5]]
    torch.testing.assert_close(
        cosine_regularization(data[[0, 1, 2, 5]], long).item(), 1 - isotropy(data[[0, 1, 2, 5]], long)
    )


def test_cosine_regularization_of_narrow_types():
    data = views((3, 40, 16))[0]
    for dtype in (torch.bfloat16, torch.float16):
        expected, gradient = gradient_of(cosine_regularization, data.to(dtype).double(), 64.0)
        loss, got = gradient_of(cosine_regularization, data.to(dtype), 64.0)
        assert (loss.dtype, got.dtype) == (torch.float32, dtype)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        assert (got.double() - gradient).norm() <= 2 * torch.finfo(dtype).eps * gradient.norm()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(cosine_regularization(data.to(dtype)), loss)


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 1, 3)])
def test_nothing_to_compare(shape, impl):
    for function in (lambda x: contraclm_token_loss(x, 2 * x, impl=impl), cosine_regularization):
        loss, gradient = gradient_of(function, torch.ones(shape))
        assert loss.item() == 0.0
        assert gradient.shape == shape
        assert not gradient.any()


def test_zero_vectors_and_width_zero():
    loss, gradient = gradient_of(lambda x: contraclm_token_loss(x, x), torch.zeros(2, 4, 3))
    torch.testing.assert_close(loss, torch.tensor(7.0).log())
    assert not gradient.any()
    torch.testing.assert_close(contraclm_token_loss(*torch.zeros(2, 2, 4, 0)), torch.tensor(7.0).log())
    assert cosine_regularization(torch.zeros(2, 4, 0)).item() == 0.0


def test_a_state_that_is_not_finite_shows():
    for value in (float("inf"), float("nan")):
        data = views()
        data[1, 5, 2, 3] = value
        assert contraclm_token_loss(*data, MASK).isnan()
        assert contraclm_token_loss(*data[:, :5], MASK[:5]).isfinite()
        data = data[1]
        assert cosine_regularization(data, MASK).isnan()
        assert cosine_regularization(data[:5], MASK[:5]).isfinite()


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_the_length_of_a_vector_does_not_matter(factor):
    data = views(dtype=torch.float32)
    for function in (lambda x: contraclm_token_loss(*x, MASK), lambda x: cosine_regularization(x[0], MASK)):
        scaled, gradient = gradient_of(lambda x, f=function: f(x * factor), data)
        torch.testing.assert_close(scaled, function(data))
        assert gradient.isfinite().all()


def test_sequences_do_not_see_each_other():
    """Alone, in another order, beside longer ones: the same bits."""
    data, mask = views((3, 9, 6), torch.float32), torch.ones(3, 9)
    mask[1, 6:] = 0
    whole = ops.contraclm_loss(*data, mask.bool(), 20.0, "torch")
    assert torch.equal(ops.contraclm_loss(*data.flip(1), mask.flip(0).bool(), 20.0, "torch"), whole.flip(0))
    alone = ops.contraclm_loss(*data[:, 1:2, :6], mask[1:2, :6].bool(), 20.0, "torch")
    assert torch.equal(alone, whole[1:2])


# ---- the normaliser --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sequences", "tokens"])
def test_pieces_of_a_batch_add_up(reduction):
    data = views()
    total = contraclm_token_loss_items(MASK, reduction)
    assert int(total) == {"sequences": 6, "tokens": int(MASK.sum())}[reduction]
    for count in (total, int(total), float(total), total.reshape(1)):
        parts = [
            contraclm_token_loss(*data[:, part], MASK[part], reduction=reduction, normalizer=count)
            for part in (slice(0, 1), slice(1, 4), slice(4, 6))
        ]
        torch.testing.assert_close(sum(parts), contraclm_token_loss(*data, MASK, reduction=reduction))
    sequences = contrastive_loss_items(MASK, "paper")
    parts = [cosine_regularization(data[0, i : i + 2], MASK[i : i + 2], normalizer=sequences) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), cosine_regularization(data[0], MASK))


def test_nothing_over_nothing_is_zero():
    data, none = views(), MASK * 0
    count = contraclm_token_loss_items(none, "tokens")
    loss, gradient = gradient_of(
        lambda x: contraclm_token_loss(*x, none, reduction="tokens", normalizer=count), with_junk(data, none)
    )
    assert loss.item() == 0.0
    assert not gradient.any()
    assert contraclm_token_loss(*data, MASK, normalizer=torch.tensor(float("nan"))).isnan()
    assert contraclm_token_loss(*data, MASK, normalizer=torch.tensor(0)).isinf()


# ---- derivatives, compilers ------------------------------------------------------------------------------------------


def test_gradcheck_of_both_orders():
    data, mask = views()[:, [0, 2, 3], :5, :3], MASK[[0, 2, 3], :5]
    leaves = [view.clone().requires_grad_() for view in data]
    for temperature in (0.3, 0.02):
        for reduction in ("sequences", "tokens"):

            def loss(a, b, t=temperature, r=reduction):
                return contraclm_token_loss(a, b, mask, t, r)

            assert torch.autograd.gradcheck(loss, leaves)
        assert torch.autograd.gradgradcheck(loss, leaves, atol=1e-4)
    assert torch.autograd.gradcheck(lambda a: cosine_regularization(a, mask), leaves[:1])
    assert torch.autograd.gradgradcheck(lambda a: cosine_regularization(a, mask), leaves[:1])


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_one_view_without_a_gradient(needs):
    a, b = (view.clone().requires_grad_(need) for view, need in zip(views(), needs, strict=True))
    want = [view.detach().clone().requires_grad_() for view in (a, b)]
    contraclm_token_loss(a, b, MASK).backward()
    reference.contraclm_token_loss(*want, MASK).backward()
    for got, truth, need in zip((a, b), want, needs, strict=True):
        assert (got.grad is not None) == need
        if need:
            torch.testing.assert_close(got.grad, truth.grad)


@pytest.mark.parametrize("keep", [True, False])
def test_upstream_gradients_of_any_strides(keep, monkeypatch):
    """Of each sequence its own, and stride 0; from the gradient that was kept, and computed again."""
    if not keep:
        monkeypatch.setattr(ops, "tracked", lambda tensor: False)
    data = views()
    real, weights = MASK.bool(), torch.arange(1.0, 7.0, dtype=torch.float64)

    def weighted(x):
        return (ops.contraclm_loss(*x, real, 5.0, "torch") * weights).sum()

    def truth(x):
        total = x[:0].sum()
        for b, weight in enumerate(weights):
            one = reference.contraclm_token_loss(x[0, b : b + 1], x[1, b : b + 1], MASK[b : b + 1], 0.2)
            total = total + weight * one * 2 * int(real[b].sum())
        return total

    expected, gradient = gradient_of(truth, data)
    loss, got = gradient_of(weighted, data)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, gradient)
    leaves = [data.clone().requires_grad_() for _ in range(2)]
    ops.contraclm_loss(*leaves[0], real, 5.0, "torch").sum().backward()  # stride 0
    ops.contraclm_loss(*leaves[1], real, 5.0, "torch").backward(torch.ones(6, dtype=torch.float64))
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("layout", ["compact", "permuted"])
def test_opcheck(layout):
    first, second = views((3, 4, 5), torch.float32)
    if layout == "permuted":
        first, second = (view.permute(1, 2, 0).contiguous().permute(2, 0, 1) for view in (first, second))
    real = MASK[[0, 2, 3], 1:5].bool()
    library = torch.ops.simctg_fast
    inputs = (first.requires_grad_(), second.requires_grad_(), real)
    for keep in (True, False):
        torch.library.opcheck(library.contraclm_loss.default, (*inputs, 20.0, keep, "auto"))
        plain = (first.detach(), second.detach(), real)
        saved = library.contraclm_loss(*plain, 20.0, keep, "auto")[1:]
        torch.library.opcheck(library.contraclm_loss_backward.default, (torch.ones(3), *plain, *saved, 20.0, "auto"))


def test_compile():
    def both(x, mask):
        return contraclm_token_loss(x[0], x[1], mask) + cosine_regularization(x[0], mask)

    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(both, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for batch in (6, 3) if dynamic else (6,):
            data, mask = views()[:, :batch], MASK[:batch]
            expected, gradient = gradient_of(lambda x, m=mask: both(x, m), data)
            loss, got = gradient_of(lambda x, m=mask, f=compiled: f(x, m), data)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(got, gradient)


def test_transforms():
    """Gradients of each sample, one after the other."""
    data, masks = views().transpose(0, 1), MASK
    for function in (
        lambda x, m: contraclm_token_loss(x[0][None], x[1][None], m[None]),
        lambda x, m: cosine_regularization(x[0][None], m[None]),
    ):
        found = torch.vmap(torch.func.grad(function))(data, masks)
        for sample, mask, got in zip(data, masks, found, strict=True):
            torch.testing.assert_close(got, gradient_of(lambda x, m=mask, f=function: f(x, m), sample)[1])
    with pytest.raises(RuntimeError, match="contraclm_loss has no forward-mode derivative"):
        torch.func.jvp(lambda x: contraclm_token_loss(x, x), (data[0],), (data[0],))


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [True, False])
def test_memory_is_linear(keep):
    """No tensor is larger than a block of 512 x 512 or what the states take."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple) else (result,):
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.numel())
            return result

    first, second, real = *torch.randn(2, 1, 2100, 16), torch.ones(1, 2100, dtype=torch.bool)
    with Watch():
        saved = ops._forward(first, second, real, 20.0, keep, "torch")[1:]
        ops._backward(torch.ones(1), first, second, real, *saved, 20.0, "torch")
    assert 0 < largest <= 512 * 512


# ---- modules, arguments ----------------------------------------------------------------------------------------------


def test_the_modules_are_the_functions():
    data = views()
    module = ContraCLMTokenLoss(0.1, "tokens")
    torch.testing.assert_close(module(*data, MASK), contraclm_token_loss(*data, MASK, 0.1, "tokens"))
    assert repr(module) == "ContraCLMTokenLoss(temperature=0.1, reduction='tokens')"
    torch.testing.assert_close(CosReg()(data[0], MASK), cosine_regularization(data[0], MASK))
    torch.testing.assert_close(CosReg()(data[0]), cosine_regularization(data[0]))
    assert {"ContraCLMTokenLoss", "CosReg", "contraclm_token_loss", "cosine_regularization"} <= set(simctg_fast.__all__)


X, Y = torch.ones(2, 3, 4), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: contraclm_token_loss(X, X[:, 1:]), ValueError, r"hidden_states_2 has shape \(2, 2, 4\).* must have"),
        (lambda: contraclm_token_loss(X, X.double()), ValueError, "hidden_states_2 has .*float64.*float32"),
        (lambda: contraclm_token_loss(X, None), TypeError, "hidden_states_2 is None, must be a tensor"),
        (lambda: contraclm_token_loss(X[0], X[0]), ValueError, r"hidden_states has shape \(3, 4\)"),
        (lambda: contraclm_token_loss(X.long(), X.long()), ValueError, "hidden_states has dtype torch.int64"),
        (lambda: contraclm_token_loss(X, X, Y[:, 1:]), ValueError, r"attention_mask has shape \(2, 2\), must be"),
        (lambda: contraclm_token_loss(X, X, Y * 1j), ValueError, "attention_mask has dtype torch.complex64"),
        (lambda: contraclm_token_loss(X, X, "all"), TypeError, "attention_mask is 'all', must be a tensor"),
        (lambda: contraclm_token_loss(X, X, Y, 0.0), ValueError, "temperature is 0.0, must be positive"),
        (lambda: contraclm_token_loss(X, X, Y, True), TypeError, "temperature is True"),
        (
            lambda: contraclm_token_loss(X, X, reduction="pairs"),
            ValueError,
            "reduction is 'pairs', must be one of 's",
        ),
        (lambda: contraclm_token_loss(X, X, impl="fast"), ValueError, "impl is 'fast', must be one of"),
        (lambda: contraclm_token_loss(X, X, impl="triton"), (ValueError, RuntimeError), "impl='triton'"),
        (lambda: contraclm_token_loss(X, X, normalizer=0), ValueError, "normalizer is 0, must be a number above 0"),
        (lambda: contraclm_token_loss_items(Y, "paper"), ValueError, "reduction is 'paper', must be one of"),
        (lambda: contraclm_token_loss_items(X, "tokens"), ValueError, r"attention_mask has shape \(2, 3, 4\)"),
        (lambda: ContraCLMTokenLoss(-1.0), ValueError, "temperature is -1.0, must be positive"),
        (lambda: ContraCLMTokenLoss(reduction="mean"), ValueError, "reduction is 'mean', must be one of"),
        (lambda: cosine_regularization(None), TypeError, "hidden_states is None, must be a tensor"),
        (lambda: cosine_regularization(Y), ValueError, r"hidden_states has shape \(2, 3\)"),
        (lambda: cosine_regularization(X, Y[1:]), ValueError, r"attention_mask has shape \(1, 3\), must be"),
        (lambda: cosine_regularization(X, normalizer=-1), ValueError, "normalizer is -1, must be a number above 0"),
    ],
)
def test_errors_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call()
