"""What stands between a block's attentions, in one call each: the bits of the single kernels, whatever is skipped."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from simctg_fast.ops.block_layers import (
    decoder_blocks,
    linear_feed_forward,
    linear_residual,
    native_activation,
    native_block,
    native_layer,
    native_norm,
    norm_linears,
)
from simctg_fast.ops.gelu import run_kernel as gelu
from simctg_fast.ops.linear import pack, run_kernel
from simctg_fast.ops.rms_norm import run_kernel as rms_norm
from simctg_fast.ops.shared_prefix_attention import native_call, shared_prefix_attention

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


def feed_forward(x, norm, inner, gate, act, outer, layer=None):
    """Behind nothing, or behind a layer of x's own."""
    nothing = Layer(1, x.shape[-1], "linear")
    nothing.weight.zero_()
    before = (torch.zeros(len(x), 1), nothing.native) if layer is None else (x, layer)
    native = native_norm(norm[0], None, norm[1], False)
    return linear_feed_forward(*before, x, native, inner, gate, native_activation(act), outer)


def unit(width):
    """A layer that changes nothing."""
    layer = Layer(width, width, "linear")
    layer.weight.copy_(torch.eye(width))
    return layer


def silu(x):
    """The kernel's, of values that a bias makes of nothing."""
    rows, width = [], x.shape[-1]
    for row in x:
        inner, outer, nothing = Layer(width, width, "linear"), unit(width), torch.zeros(1, width)
        inner.weight.zero_()
        inner.native = native_layer(inner.weight, row, False, None)
        norm = torch.ones(width), EPSILON
        rows.append(feed_forward(nothing, norm, inner.native, None, "silu", outer.native))
    return torch.cat(rows)


@layouts
def test_norm_and_projections(isa, layout, threads):
    threads(2)
    for rows, width in ((1, 7), (5, 64), (30, 513)):
        x, norm = torch.randn(rows, width), (torch.randn(width), EPSILON)
        layers = [Layer(width, out, layout, bias=out == 33) for out in (33, 16, 200)]
        results = [torch.full((rows, len(layer(x)[0])), torch.nan) for layer in layers]
        norm_linears(x, native_norm(norm[0], None, norm[1], False), [layer.native for layer in layers], results)
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
@pytest.mark.parametrize("act", ["relu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("gated", [False, True])
def test_feed_forward(isa, layout, act, gated, threads):
    threads(2)
    for rows, width, between in ((1, 16, 20), (4, 40, 90), (33, 65, 130)):
        x, norm = torch.randn(rows, width), (torch.randn(width), EPSILON)
        inner, gate, outer = Layer(width, between, layout), Layer(width, between, layout), Layer(between, width, layout)
        normed = rms_norm(x, *norm)
        middle = {"relu": torch.relu, "gelu_tanh": gelu, "silu": silu}[act](inner(normed))
        if gated:
            middle = middle * gate(normed)
        y = feed_forward(x, norm, inner.native, gate.native if gated else None, act, outer.native)
        assert torch.equal(y, outer(middle) + x)


@layouts
def test_projection_and_feed_forward(isa, layout):
    x, norm = torch.randn(5, 40), (torch.randn(40), EPSILON)
    before, inner, outer = Layer(40, 40, layout, bias=True), Layer(40, 90, layout), Layer(90, 40, layout)
    summed = before(x) + x
    y = feed_forward(x, norm, inner.native, None, "gelu_tanh", outer.native, before.native)
    assert torch.equal(y, outer(gelu(inner(rms_norm(summed, *norm)))) + summed)


def test_silu_is_as_exact_as_pytorchs(isa):
    for scale in (0.1, 1.0, 8.0, 40.0):
        x = torch.randn(20, 513).mul(scale).clamp(min=-85)
        exact = torch.nn.functional.silu(x.double())
        ours, theirs = (((each - exact) / exact).abs() for each in (silu(x), torch.nn.functional.silu(x)))
        assert ours.square().mean() <= 1.2 * theirs.square().mean()
        assert ours.max() <= 1.5 * theirs.max()
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -89.0, -100.0, -200.0, 1e30, -1e30, 90.0])[:, None]
    torch.testing.assert_close(silu(x), torch.nn.functional.silu(x.double()).float(), equal_nan=True)


def layer_normed(x, weight, bias, epsilon=EPSILON):
    y = torch.empty_like(x)
    layer = unit(x.shape[-1])
    norm_linears(x, native_norm(weight, bias, epsilon, True), [layer.native], [y])
    return y


def test_layer_norm_is_as_exact_as_pytorchs(isa, threads):
    threads(2)
    for rows, width, shift in ((70, 3, 0.0), (50, 64, 1.0), (60, 768, 0.0), (9, 1031, 20.0)):
        x, weight, bias = torch.randn(rows, width) + shift, torch.randn(width), torch.randn(width)
        for each in (bias, None):
            exact = torch.nn.functional.layer_norm(
                x.double(), (width,), weight.double(), None if each is None else each.double(), EPSILON
            )
            ours, theirs = (
                layer_normed(x, weight, each),
                torch.nn.functional.layer_norm(x, (width,), weight, each, EPSILON),
            )
            assert (ours - exact).square().mean() <= 1.4 * (theirs - exact).square().mean(), (
                "the generic set has no fused product"
            )
        assert torch.equal(layer_normed(x[-1:].clone(), weight, None), ours[-1:]), "whatever the other rows are"


@pytest.mark.parametrize("shared", [False, True])
def test_rotation(isa, shared, threads):
    """Of queries and keys, not of values; as Llama's own, up to a rounding."""
    threads(2)
    for rows, heads, dim in ((1, 2, 6), (5, 3, 64), (7, 4, 90)):
        x, norm = torch.randn(rows, 33), torch.ones(33)
        layers = [Layer(33, dim * each, "linear") for each in (heads, 1, 1)]
        results = [torch.full((rows, each, 1, dim), torch.nan) for each in (heads, 1, 1)]
        angle = torch.randn(1 if shared else rows, 1, dim)
        rotation = angle.cos(), angle.sin()
        norm_linears(x, native_norm(norm, None, EPSILON, False), [layer.native for layer in layers], results, rotation)
        plain = [layer(rms_norm(x, norm, EPSILON)).view(rows, -1, 1, dim) for layer in layers]
        query, key = apply_rotary_pos_emb(*plain[:2], *rotation)
        torch.testing.assert_close(results[0], query, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(results[1], key, rtol=1e-6, atol=1e-6)
        assert torch.equal(results[2], plain[2])
        if not shared:
            last = [torch.empty(1, each, 1, dim) for each in (heads, 1, 1)]
            own = tuple(each[-1:].contiguous() for each in rotation)
            native = native_norm(norm, None, EPSILON, False)
            norm_linears(x[-1:].clone(), native, [layer.native for layer in layers], last, own)
            assert all(torch.equal(one, other[-1:]) for one, other in zip(last, results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_16_bit(isa, dtype, centred, transposed):
    """Rounded where a module ends: no further from float64 than PyTorch's modules are."""
    width, between, rows = 80, 150, 5
    x, residual = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    scale, shift = torch.randn(width).to(dtype), torch.randn(width).to(dtype) if centred else None
    sizes = {"before": (width, width), "inner": (width, between), "gate": (width, between), "outer": (between, width)}
    weights = {name: (torch.randn(*size) * size[0] ** -0.5).to(dtype) for name, size in sizes.items()}
    laid = {name: weight if transposed else weight.t().contiguous() for name, weight in weights.items()}
    native = {name: native_layer(weight, None, transposed, None) for name, weight in laid.items()}
    norm = native_norm(scale, shift, EPSILON, centred)

    def modules(kind):
        z = x.to(kind) @ weights["before"].to(kind) + residual.to(kind)
        if centred:
            y = torch.nn.functional.layer_norm(z, (width,), scale.to(kind), shift.to(kind), EPSILON)
        else:
            y = torch.nn.functional.rms_norm(z, (width,), scale.to(kind), EPSILON)
        y = torch.nn.functional.silu(y @ weights["inner"].to(kind)) * (y @ weights["gate"].to(kind))
        return y @ weights["outer"].to(kind) + z

    y = linear_feed_forward(
        x, native["before"], residual, norm, native["inner"], native["gate"], native_activation("silu"), native["outer"]
    )
    assert y.dtype is dtype
    exact = modules(torch.float64)
    assert (y - exact).square().mean() <= 1.3 * (modules(dtype) - exact).square().mean()


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
    good, bad, native = Layer(8, 12, "linear"), Layer(9, 8, "linear"), native_norm(norm[0], None, norm[1], False)
    with pytest.raises(ValueError, match="in_features is 9, must be 8"):
        norm_linears(x, native, [good.native, bad.native], [torch.empty(2, 12), torch.empty(2, 8)])
    with pytest.raises(ValueError, match="number of results is 1, must be 2"):
        norm_linears(x, native, [good.native, good.native], [torch.empty(2, 12)])
    with pytest.raises(ValueError, match=r"outer.in_features is 9, must be 12"):
        feed_forward(x, norm, good.native, None, "relu", bad.native)


def turns(rows, width):
    angles = torch.rand(rows, 1, width // 2).repeat(1, 1, 2) * 6
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("joined", [False, True])
def test_blocks_in_turn(isa, joined, threads):
    """The bits of their parts, called one after the other."""
    threads(2)
    heads, kv_heads, dim, between, length = (3, 3, 8, 50, 11) if joined else (4, 2, 8, 50, 11)
    for batch, k in ((1, 1), (3, 4)):
        rows, width = batch * k, heads * dim
        x, rotation = torch.randn(rows, 1, width), None if joined else turns(rows, dim)
        blocks, arrays, expected, kept, y = [], [], [], [], x
        for _ in range(3):
            sizes = [3 * width] if joined else [width, kv_heads * dim, kv_heads * dim]
            projections = [Layer(width, size, "conv1d" if joined else "linear", bias=joined) for size in sizes]
            output, inner = Layer(width, width, "linear"), Layer(width, between, "linear")
            gate = None if joined else Layer(width, between, "linear")
            outer = Layer(between, width, "conv1d")
            weights = torch.randn(2, width)
            norms = [native_norm(weight, None, EPSILON, False) for weight in weights]
            act, scaling = native_activation("silu"), float(torch.rand(())) + 0.1
            keys, values = torch.randn(2, batch, kv_heads, length + 2, dim).unbind()
            gate_native = None if gate is None else gate.native
            rest = norms[1], inner.native, gate_native, act, outer.native
            natives = [layer.native for layer in projections]
            blocks.append(native_block(norms[0], natives, scaling, output.native, *rest))

            def new(joined=joined, rows=rows):
                if joined:
                    states = torch.full((rows, 3, heads, 1, dim), torch.nan)
                    return states.unbind(1), [states]
                parts = [torch.full((rows, n, 1, dim), torch.nan) for n in (heads, kv_heads, kv_heads)]
                return parts, parts

            (query, new_key, new_value), results = new()
            norm_linears(y, norms[0], natives, results, rotation)
            call = {"length": length, "new_key": new_key, "new_value": new_value, "scaling": scaling}
            attended = shared_prefix_attention(query, keys, values, **call, impl="cpu")
            y = linear_feed_forward(attended.view(rows, width), output.native, y, *rest)
            expected.append((new_key, new_value, y))

            own, _ = new()
            result = torch.full_like(x, torch.nan)
            arrays.append(tuple(tensor.data_ptr() for tensor in (*own, keys, values, result)))
            kept.append((own, result, keys, values, projections, output, inner, gate, outer, weights))
        first = kept[0]
        (query, new_key, new_value), _, keys, values = first[:4]
        native, _ = native_call(
            query=query, key=keys, value=values, length=length, new_key=new_key, new_value=new_value, scaling=1.0
        )
        decoder_blocks(x, blocks, arrays, native, rotation)
        for (key, value, y), (own, result, *_) in zip(expected, kept, strict=True):
            assert torch.equal(own[1], key)
            assert torch.equal(own[2], value)
            assert torch.equal(result, y)


def test_blocks_of_other_sizes():
    linear, norm = Layer(8, 8, "linear").native, native_norm(torch.ones(8), None, EPSILON, False)
    wide = Layer(8, 16, "linear").native
    act = native_activation("relu")
    query, new = torch.randn(2, 1, 1, 8), torch.randn(2, 1, 1, 8)
    cache = torch.randn(2, 1, 4, 8)
    native, _ = native_call(
        query=query, key=cache, value=cache, length=3, new_key=new, new_value=new.clone(), scaling=1.0
    )
    address = (query.data_ptr(),) * 6
    for rows, block, arrays, message in (
        (2, (linear, linear), [address] * 2, "number of arrays is 2, must be 1"),
        (3, (linear, linear), [address], "rows of the attention is 2, must be 3"),
        (2, (linear, linear), [address], "out_features of the projections is 32, must be 24"),
        (2, (wide, linear), [address], "output.out_features is 16, must be 8"),
        (2, (Layer(16, 8, "linear").native, linear), [address], "output.in_features is 16, must be 8"),
    ):
        projections = [linear, linear, wide if "projections" in message else linear]
        made = native_block(norm, projections, 1.0, block[0], norm, block[1], None, act, linear)
        with pytest.raises(ValueError, match=message):
            decoder_blocks(torch.randn(rows, 1, 8), [made], arrays, native)
