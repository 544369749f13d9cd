"""Root mean square normalisation in one pass, against float64 and against the modules it stands in for."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from simctg_fast.decoding.linear_swap import fast_linears
from simctg_fast.ops import _backends
from simctg_fast.ops.rms_norm import rms_norm

EPSILON = 1e-6


def truth(x, weight):
    return weight.double() * x.double() / (x.double().square().mean(dim=-1, keepdim=True) + EPSILON).sqrt()


@pytest.mark.parametrize("width", [1, 5, 8, 33, 512, 1000, 40_000])
def test_matches_float64(isa, width):
    generator = torch.Generator().manual_seed(width)
    for rows, size in ((1, 1.0), (7, 1e-3), (130, 1e3)):
        x = size * torch.randn(rows if width < 10_000 else 3, width, generator=generator)
        weight = torch.randn(width, generator=generator)
        plain = (weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON))).double()
        y, expected = rms_norm(x, weight, EPSILON), truth(x, weight)
        largest = expected.abs().max()
        assert (y - expected).abs().max() <= 2 * (plain - expected).abs().max() + 1e-7 * largest
        assert torch.equal(rms_norm(x[:1], weight, EPSILON), y[:1]), "a row depends on itself alone"


def test_special_values(isa):
    x = torch.ones(4, 19)
    x[0], x[1, 18], x[2, 3] = 0.0, torch.nan, torch.inf
    y = rms_norm(x, torch.ones(19), EPSILON)
    assert not y[0].any()
    assert y[1].isnan().all()
    assert torch.equal(y[2].isnan(), torch.arange(19) == 3)
    torch.testing.assert_close(y[3], torch.ones(19))


def test_other_layouts_dtypes_gradients_and_shapes():
    x, weight = torch.randn(6, 5), torch.randn(5)
    torch.testing.assert_close(rms_norm(x.t().contiguous().t(), weight, EPSILON), rms_norm(x, weight, EPSILON))
    wide = x.double().requires_grad_(), weight.double().requires_grad_(), EPSILON
    assert torch.autograd.gradcheck(rms_norm, wide)
    assert torch.autograd.gradcheck(rms_norm, (wide[0][0], *wide[1:]))
    torch.library.opcheck(torch.ops.simctg_fast.rms_norm.default, (x.requires_grad_(), weight, EPSILON))
    assert torch.equal(torch.compile(rms_norm, fullgraph=True, backend="aot_eager")(*wide), rms_norm(*wide))
    with pytest.raises(ValueError, match=r"weight has shape \(4,\), must be \(D,\) for x of shape \(6, 5\)"):
        rms_norm(x, weight[:4], EPSILON)


@pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_modules_are_routed_through_it(kind, monkeypatch):
    from simctg_fast.decoding import linear_swap

    torch.manual_seed(0)
    if kind == "t5":
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        )
        norm = model.encoder.block[0].layer[0].layer_norm
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
        norm = model.model.norm
    torch.nn.init.normal_(norm.weight)
    x, calls = torch.randn(3, 1, 16), []
    monkeypatch.setattr(linear_swap, "run_rms_norm", lambda *args: calls.append(1) or rms_norm(*args))
    with torch.no_grad():
        expected = norm(x)
        with fast_linears(model):
            torch.testing.assert_close(norm(x), expected)
            assert len(calls) == 1
            for other in (x.double(), x.bfloat16(), x.expand(3, 2, 16)):  # not contiguous
                norm(other)
            assert len(calls) == 1
        assert torch.equal(norm(x), expected)
    with fast_linears(model):
        norm(x).sum().backward()
    assert norm.weight.grad is not None
    assert len(calls) == 1
