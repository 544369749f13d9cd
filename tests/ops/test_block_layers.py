"""What stands between a block's attentions, in one call each: the bits of the single kernels, whatever is skipped."""

import pytest
import torch

from simctg_fast.ops.block_layers import feed_forward, linear_residual, native_layer, norm_linears
from simctg_fast.ops.gelu import run_kernel as gelu
from simctg_fast.ops.linear import pack, run_kernel
from simctg_fast.ops.rms_norm import run_kernel as rms_norm

EPSILON = 1e-6
layouts = pytest.mark.parametrize("layout", ["linear", "conv1d", "packed"])


class Layer:
    """A weight in one of the layouts, as the single kernel and as `native_layer` take it."""

    def __init__(self, in_features, out_features, layout, bias=False):
        self.weight = torch.randn(out_features, in_features) * in_features**-0.5
        self.transposed = layout == "conv1d"
        if self.transposed:
            self.weight = self.weight.t().contiguous()
        self.bias = torch.randn(out_features) if bias else None
        self.packed = pack(self.weight, self.transposed) if layout == "packed" else None
        self.native = native_layer(self.weight, self.bias, self.transposed, self.packed)

    def __call__(self, x):
        return run_kernel(x, self.weight, self.bias, self.transposed, self.packed)


@layouts
def test_norm_and_projections(isa, layout, threads):
    threads(2)
    for rows, width in ((1, 7), (5, 64), (30, 513)):
        x, norm = torch.randn(rows, width), (torch.randn(width), EPSILON)
        layers = [Layer(width, out, layout, bias=out == 33) for out in (33, 16, 200)]
        results = [torch.full((rows, len(layer(x)[0])), torch.nan) for layer in layers]
        norm_linears(x, norm, [layer.native for layer in layers], results)
        normed = rms_norm(x, *norm)
        for layer, result in zip(layers, results, strict=True):
            assert torch.equal(result, layer(normed))


@layouts
def test_projection_and_residual(isa, layout):
    layer, x, residual = Layer(40, 23, layout), torch.randn(6, 40), torch.randn(6, 1, 23)
    y = linear_residual(x, layer.native, residual)
    assert y.shape == residual.shape
    assert torch.equal(y, layer(x)[:, None] + residual)


@layouts
@pytest.mark.parametrize("act", ["relu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward(isa, layout, act, gated, threads):
    threads(2)
    for rows, width, between in ((1, 16, 20), (4, 40, 90), (33, 65, 130)):
        x, norm = torch.randn(rows, width), (torch.randn(width), EPSILON)
        inner, gate, outer = Layer(width, between, layout), Layer(width, between, layout), Layer(between, width, layout)
        normed = rms_norm(x, *norm)
        middle = torch.relu(inner(normed)) if act == "relu" else gelu(inner(normed))
        if gated:
            middle = middle * gate(normed)
        y = feed_forward(x, norm, inner.native, gate.native if gated else None, act, outer.native)
        assert torch.equal(y, outer(middle) + x)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("out_features", [1, 16, 40, 64, 130, 192])
def test_what_a_relu_closes_is_not_missed(isa, share, out_features, threads):
    """The same bits, whether zeros are multiplied or not: past blocks of 64, chunks of 384, and their remains."""
    threads(2)
    for rows, between in ((1, 64), (3, 63), (5, 400), (7, 1153)):
        norm = torch.ones(out_features), EPSILON
        inner, outer = Layer(out_features, between, "linear"), Layer(between, out_features, "packed", bias=True)
        inner.bias = torch.where(torch.rand(between) < share, 100.0, -100.0)
        inner.native = native_layer(inner.weight, inner.bias, False, None)
        x = torch.randn(rows, out_features)
        middle = torch.relu(inner(rms_norm(x, *norm)))
        y = feed_forward(x, norm, inner.native, None, "relu", outer.native)
        assert torch.equal(y, outer(middle) + x), (rows, between)


def test_a_relu_keeps_nan_and_infinity(isa):
    """Among so few others that the zeros are left out."""
    inner, outer = Layer(16, 128, "linear"), Layer(128, 16, "packed")
    x, norm = torch.randn(4, 16), (torch.ones(16), EPSILON)
    inner.weight.zero_()
    bias = torch.full((128,), -1.0)
    bias[7] = 1.0
    inner.native = native_layer(inner.weight, bias, False, None)
    x[1, 3] = torch.nan
    y = feed_forward(x, norm, inner.native, None, "relu", outer.native)
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()
    bias[7] = torch.inf
    y = feed_forward(x, norm, inner.native, None, "relu", outer.native)
    assert not y.isfinite().any()


def test_sizes_that_do_not_fit(isa):
    x, norm = torch.randn(2, 8), (torch.ones(8), EPSILON)
    good, bad = Layer(8, 12, "linear"), Layer(9, 8, "linear")
    with pytest.raises(ValueError, match="in_features is 9, must be 8"):
        norm_linears(x, norm, [good.native, bad.native], [torch.empty(2, 12), torch.empty(2, 8)])
    with pytest.raises(ValueError, match="number of results is 1, must be 2"):
        norm_linears(x, norm, [good.native, good.native], [torch.empty(2, 12)])
    with pytest.raises(ValueError, match=r"outer.in_features is 9, must be 12"):
        feed_forward(x, norm, good.native, None, "relu", bad.native)
