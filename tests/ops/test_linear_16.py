"""Linear layers with weights of 16 bits, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from simctg_fast.cpu.modules import at_most, fast_linears
from simctg_fast.ops import _backends
from simctg_fast.ops import linear as linear_op
from simctg_fast.ops.linear import MAX_ROWS, most_rows, run_kernel

from ..instruction_sets import in_every_set

TYPES = [torch.bfloat16, torch.float16]
LAYOUTS = pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
# Around vectors, register tiles, chunks of sums and cuts between threads; odd ones leave half a pair; 1100 is past two
# blocks of a tile that is widened once; 2048 elements are a page.
IN_FEATURES = (1, 2, 3, 31, 33, 383, 385, 770, 1025, 1100, 2048)
OUT_FEATURES = (1, 15, 17, 33, 65, 130, 193, 300)
ROWS = (1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 25, 33, 64, 100)


def draw(rows, in_features, out_features, transposed, dtype, x_dtype=None):
    x, weight = torch.randn(rows, in_features), torch.randn(out_features, in_features)
    weight = (weight.t().contiguous() if transposed else weight).to(dtype)
    return x.to(x_dtype or dtype), weight, torch.randn(out_features).to(x_dtype or dtype)


def truth(x, weight, bias, transposed):
    product = x.double() @ (weight.double() if transposed else weight.double().t())
    return product if bias is None else product + bias.double()


@in_every_set
@LAYOUTS
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_one_rounding(isa, dtype, transposed, threads):
    """The error is that of rounding the exact result, but for a hundredth."""
    threads(2)
    for index, in_features in enumerate(IN_FEATURES):
        for jndex, out_features in enumerate(OUT_FEATURES):
            rows = ROWS[(5 * index + jndex) % len(ROWS)]
            x, weight, bias = draw(rows, in_features, out_features, transposed, dtype)
            bias = bias if (index + jndex) % 3 else None
            y, exact = run_kernel(x, weight, bias, transposed), truth(x, weight, bias, transposed)
            assert y.dtype is dtype
            rounding = (exact.to(dtype).double() - exact).norm()
            allowed = 1.01 * rounding + 1e-6 * exact.norm()
            assert (y.double() - exact).norm() <= allowed, (rows, in_features, out_features)


@in_every_set
@LAYOUTS
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_row_depends_on_nothing_but_itself(isa, dtype, transposed, threads):
    for in_features, out_features in [(770, 300), (385, 65), (1101, 33)]:
        x, weight, bias = draw(MAX_ROWS, in_features, out_features, transposed, dtype)
        threads(1)
        alone = torch.cat([run_kernel(row, weight, bias, transposed) for row in x.split(1)])
        for rows in ROWS[:-1]:
            for count in (1, 2, 5):
                threads(count)
                assert torch.equal(run_kernel(x[:rows], weight, bias, transposed), alone[:rows]), (rows, count)


@in_every_set
@LAYOUTS
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_narrow_weights_of_float32_are_exact(isa, dtype, transposed):
    """x and y in float32: the bits of the same weight in float32."""
    for rows in (1, 4, 9, 33, 64):
        for in_features, out_features in [(770, 130), (1025, 47), (3, 5)]:
            x, weight, bias = draw(rows, in_features, out_features, transposed, dtype, torch.float32)
            y = run_kernel(x, weight, bias, transposed)
            assert y.dtype is torch.float32
            assert torch.equal(y, run_kernel(x, weight.float(), bias, transposed)), (rows, in_features)


@in_every_set
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_special_numbers(isa, dtype):
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 1.0]], dtype=dtype)
    large = torch.finfo(dtype).max
    x = torch.tensor([[float("inf"), 1.0], [float("nan"), 1.0], [large, large], [0.0, -0.0]], dtype=dtype)
    y = run_kernel(x, weight, None, False)
    infinite, nan = torch.inf, torch.nan
    want = torch.tensor([[infinite, nan, infinite, -infinite], [nan] * 4, [large, large, infinite, 0.0]], dtype=dtype)
    torch.testing.assert_close(y[:3], want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y[3], torch.zeros(4, dtype=dtype))


@LAYOUTS
def test_empty(transposed):
    weight = torch.zeros((3, 0) if not transposed else (0, 3), dtype=torch.bfloat16)
    bias = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    assert torch.equal(run_kernel(torch.zeros(2, 0, dtype=torch.bfloat16), weight, bias, transposed), bias.expand(2, 3))


def test_types_that_do_not_go_together():
    extension = _backends.require_extension()
    types, layout = extension.ElementType, extension.WeightLayout
    y = torch.zeros(4)
    arguments = (*[y.data_ptr()] * 1, 2, y.data_ptr(), 2, 0, y.data_ptr(), 2, 1, 2, 2, 1)
    with pytest.raises(ValueError, match="weight_type must be type"):
        extension.linear(layout.rows_are_outputs, *arguments, types.bfloat16, types.float16)
    with pytest.raises(ValueError, match="packed weights are float32"):
        extension.linear(layout.panels, *arguments, types.bfloat16, types.bfloat16)


def models(dtype):
    torch.manual_seed(0)
    gpt2 = GPT2Config(vocab_size=90, n_embd=48, n_layer=2, n_head=4, n_positions=64)
    llama = LlamaConfig(
        vocab_size=90, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=80, attention_bias=True,
    )  # fmt: skip
    return [GPT2LMHeadModel(gpt2).eval().to(dtype), LlamaForCausalLM(llama).eval().to(dtype)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_models_are_routed(dtype, monkeypatch):
    calls = []
    run = linear_op.run_kernel
    monkeypatch.setattr("simctg_fast.cpu.modules.run_kernel", lambda *a: calls.append(a[0].dtype) or run(*a))
    for model in models(dtype):
        ids, exact = torch.arange(1, 9).view(2, 4), model.double()
        with torch.no_grad():
            want = exact(ids).logits
        model = model.to(dtype)
        with torch.no_grad():
            plain = model(ids).logits
            layers = sum(type(m) in (torch.nn.Linear, Conv1D) for m in model.modules())
            with fast_linears(model, pack=True) as routed:
                assert routed >= layers
                ours = model(ids).logits
                assert calls == [dtype] * layers
                with at_most(4):
                    model(ids)
                assert len(calls) == layers, "8 rows are too many"
        calls.clear()
        assert (ours.double() - want).norm() <= 1.05 * (plain.double() - want).norm()


def test_gradients_and_mixed_types_are_left_to_pytorch():
    layer = torch.nn.Linear(16, 8).bfloat16()
    x = torch.randn(2, 16, dtype=torch.bfloat16, requires_grad=True)
    with fast_linears(layer):
        layer(x).sum().backward()
        assert x.grad is not None
        with torch.no_grad(), pytest.raises(RuntimeError):
            layer(x.float())
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(x.float()).dtype is torch.bfloat16


@in_every_set
def test_rows_up_to_which(isa):
    """PyTorch's product is asked where it is more than a loop."""
    assert (most_rows(torch.bfloat16) > 10**6) == (isa in ("generic", "avx2", "avx512"))
    assert most_rows(torch.float32) < 10**6
