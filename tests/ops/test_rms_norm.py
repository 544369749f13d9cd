"""Root mean square normalisation in one pass, against float64 and against the modules it stands in for."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.activations import NewGELUActivation
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from simctg_fast.cpu import modules
from simctg_fast.cpu.modules import fast_linears
from simctg_fast.ops import _backends
from simctg_fast.ops.gelu import run_kernel as gelu_tanh
from simctg_fast.ops.rms_norm import run_kernel as rms_norm

EPSILON = 1e-6
HALVES = (torch.bfloat16, torch.float16)
TYPES = (torch.float32, *HALVES)


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


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [1, 5, 8, 33, 63, 512, 577, 40_000])
def test_half_precision_is_rounded_once(isa, dtype, width):
    generator = torch.Generator().manual_seed(width)
    for rows, size in ((1, 1.0), (7, 1e-3), (130, 3e2)):
        x = (size * torch.randn(rows if width < 10_000 else 3, width, generator=generator)).to(dtype)
        weight = torch.randn(width, generator=generator).to(dtype)
        y = rms_norm(x, weight, EPSILON)
        assert y.dtype == dtype
        assert torch.equal(y, rms_norm(x.float(), weight.float(), EPSILON).to(dtype))
        for kind in (LlamaRMSNorm, T5LayerNorm):
            module = kind(width, EPSILON).to(dtype)
            module.weight.data.copy_(weight)
            ours, own = (z.double() - truth(x, weight) for z in (y, module(x).detach()))
            assert ours.norm() <= 1.05 * own.norm() or width == 1


def test_special_values(isa):
    x = torch.ones(4, 19)
    x[0], x[1, 18], x[2, 3] = 0.0, torch.nan, torch.inf
    y = rms_norm(x, torch.ones(19), EPSILON)
    assert not y[0].any()
    assert y[1].isnan().all()
    assert torch.equal(y[2].isnan(), torch.arange(19) == 3)
    torch.testing.assert_close(y[3], torch.ones(19))


@pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_modules_are_routed_through_it(kind, monkeypatch):
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
    monkeypatch.setattr(modules, "run_rms_norm", lambda *args: calls.append(1) or rms_norm(*args))
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


@pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", [LlamaRMSNorm, T5LayerNorm, NewGELUActivation])
def test_modules_in_half_precision(kind, dtype, monkeypatch):
    """Where all is of one type; Gemma's norm, another formula, is left alone."""
    norm = kind is not NewGELUActivation
    module = (kind(48) if norm else kind()).to(dtype)
    if norm:
        torch.nn.init.normal_(module.weight)
    function, calls = (rms_norm if norm else gelu_tanh), []
    name = f"run_{'rms_norm' if norm else 'gelu'}"
    monkeypatch.setattr(modules, name, lambda *args: calls.append(1) or function(*args))
    x = 3 * torch.randn(300, 48).to(dtype)
    wanted = truth(x, module.weight) if norm else torch.nn.functional.gelu(x.double(), approximate="tanh")
    with torch.no_grad():
        own = module(x)
        with fast_linears(module):
            ours = module(x)
            assert (ours.dtype, calls) == (dtype, [1])
            module(x.repeat(1, 2)[:, ::2])  # not contiguous
            for other in {torch.float64, *(TYPES if norm else ())} - {dtype}:
                module(x.to(other))
            assert calls == [1]
    assert (ours.double() - wanted).norm() <= 1.05 * (own.double() - wanted).norm()
    with fast_linears(module):
        module(x.requires_grad_()).sum().backward()
    assert calls == [1]


def test_which_norms_are_known():
    """Those with the code of T5's or Llama's, which round once before the weight; others round elsewhere, or add 1."""
    for kind in (LlamaRMSNorm, T5LayerNorm, Qwen2RMSNorm, MistralRMSNorm):
        assert modules._is_rms_norm(kind)
    for kind in (GemmaRMSNorm, GptOssRMSNorm, Olmo2RMSNorm, torch.nn.LayerNorm):
        assert not modules._is_rms_norm(kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, T5LayerNorm, NewGELUActivation])
def test_on_cuda_modules_become_one_operation(kind, dtype, monkeypatch):
    """As exact as the module itself; everywhere else than on CUDA, and in float64, the module is left alone."""
    norm = kind is not NewGELUActivation
    module = (kind(48) if norm else kind()).to(dtype)
    x = 3 * torch.randn(5, 1, 48, generator=torch.Generator().manual_seed(0))
    if norm:
        torch.nn.init.normal_(module.weight)
        exact = x.to(dtype).double()
        wanted = truth(exact, module.weight)
    else:
        wanted = torch.nn.functional.gelu(x.to(dtype).double(), approximate="tanh")
    x, own, called = x.to(dtype), module(x.to(dtype)), []
    name = "rms_norm" if norm else "gelu"
    function = getattr(torch.nn.functional, name)
    monkeypatch.setattr(torch.nn.functional, name, lambda *args, **more: called.append(1) or function(*args, **more))
    monkeypatch.setattr(_backends, "extension", lambda: None)  # a GPU does not need it
    with fast_linears(module), torch.no_grad():
        assert torch.equal(module(x), own)
    assert not called
    monkeypatch.setattr(modules, "_is_on_cuda", lambda model: True)
    monkeypatch.setattr(modules, "_on_cuda", lambda x: x.dtype in modules._CUDA_DTYPES)
    with fast_linears(module), torch.no_grad():
        ours = module(x)
        assert called == [1]
        module.double()(x.double())
        assert called == [1]
    assert ours.dtype == dtype
    assert (ours.double() - wanted).norm() <= 1.05 * (own.double() - wanted).norm() + 1e-6 * wanted.norm()


def test_what_is_on_cuda(monkeypatch):
    torch._C._ensureCUDADeviceGuardSet()
    with FakeTensorMode():
        x = torch.empty(2, 3, device="cuda", dtype=torch.bfloat16)
        assert modules._on_cuda(x)
        assert not modules._on_cuda(x.double())
        assert not modules._on_cuda(torch.empty(2))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
            assert not modules._on_cuda(x)
        assert modules._is_on_cuda(torch.nn.ParameterList([torch.nn.Parameter(x)]))
    assert not modules._is_on_cuda(torch.nn.Linear(2, 3))
