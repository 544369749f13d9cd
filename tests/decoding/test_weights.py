"""``weights="int8"`` and ``"lossless"``: what linear layers read in the place of their weights."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch.nn import Linear
from transformers.pytorch_utils import Conv1D

from simctg_fast import ContrastiveSearch, Engine, support
from simctg_fast.cpu import modules
from simctg_fast.cpu.modules import MOST_EXACT, WeightCopies, fast_linears
from simctg_fast.ops import _backends
from simctg_fast.ops.linear import run_kernel

from ..decoding_models import build, inputs_for, prompt, shared, tokenizer

pytestmark = pytest.mark.csrc
NAMES = ("gpt2", "llama", "gemma2", "bloom", "t5", "bart")
NEW = 8


def write(model, inputs, search, new=NEW):
    return model.generate(
        **inputs,
        custom_generate=search,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def linears(model):
    return [module for module in model.modules() if type(module) in (Linear, Conv1D)]


def in_16_bits(model):
    """``model`` with weights that bfloat16 has, in float32."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


@pytest.mark.parametrize("name", NAMES)
def test_int8_is_near(name):
    """Every linear layer has a copy, and logits are off by what rounding to 8 bits explains, not more and not less."""
    model, search = shared(name), ContrastiveSearch(0.6, 4, weights="int8")
    inputs = inputs_for(model, 3)
    rounded = write(model, inputs, search)
    # The encoder runs before the strategy has the word.
    decoding = [
        m for m in linears(model) if not (model.config.is_encoder_decoder and m in linears(model.get_encoder()))
    ]
    copies = [search.weights._copies[module].data for module in decoding]
    assert copies
    assert all(copy.dtype is torch.int8 for copy in copies)
    plain = write(model, inputs, ContrastiveSearch(0.6, 4))
    ours, theirs = rounded.logits[0], plain.logits[0]  # after the same prompt
    error = (ours - theirs).norm() / theirs.norm()
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_the_most_probable_of_a_state_are_exact(name):
    model = shared(name)
    head, seen = model.get_output_embeddings(), []
    with head.register_forward_hook(lambda module, args, out: seen.append((args[0].clone(), out.clone()))):
        write(model, inputs_for(model, 2), ContrastiveSearch(0.6, 4, path="reorder", weights="int8"))
    assert len(seen) > NEW
    for states, logits in seen[-NEW + 1 :]:
        exact = run_kernel(states, head.weight, head.bias, False)
        reached = exact >= exact.topk(MOST_EXACT).values[..., -1:]
        assert torch.equal(logits[reached], exact[reached])
        assert torch.equal(logits.topk(MOST_EXACT).values, exact.topk(MOST_EXACT).values)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_of_16_bits(name, dtype):
    model = build(name, std=0.2).to(dtype)
    inputs = inputs_for(model, 2)
    ours = write(model, inputs, ContrastiveSearch(0.6, 4, weights="int8")).logits[0].float()
    theirs = write(model, inputs, ContrastiveSearch(0.6, 4)).logits[0].float()
    assert 1e-3 < (ours - theirs).norm() / theirs.norm() < 0.1


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_row_does_not_depend_on_its_mates(name):
    model, search = shared(name), ContrastiveSearch(0.6, 4, weights="int8")
    ids = prompt(5, 9)
    together = write(model, {"input_ids": ids}, search)
    for row in (0, 3):
        alone = write(model, {"input_ids": ids[row : row + 1]}, search)
        assert torch.equal(alone.sequences[0], together.sequences[row])
        assert all(torch.equal(a[0], t[row]) for a, t in zip(alone.logits, together.logits, strict=True))


def test_prompts_of_any_length():
    """What the weights are does not depend on how many rows there are."""
    layer = Linear(40, 24)
    x = torch.randn(1500, 40)
    with torch.no_grad(), fast_linears(layer, weights=WeightCopies("int8")):
        whole, alone = layer(x), torch.cat([layer(row) for row in x[:3].split(1)])
    assert torch.equal(whole[:3], alone)
    assert not torch.equal(alone, layer(x[:3]))


@pytest.mark.parametrize("name", NAMES)
def test_lossless_has_the_same_bits(name):
    model, search = in_16_bits(build(name)), ContrastiveSearch(0.6, 4, weights="lossless")
    inputs = inputs_for(model, 2)
    ours, plain = write(model, inputs, search), write(model, inputs, ContrastiveSearch(0.6, 4))
    copies = [copy.data for copy in search.weights._copies.values()]
    assert copies
    assert all(copy.dtype is torch.bfloat16 for copy in copies)
    assert torch.equal(ours.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, plain.logits, strict=True))


def test_lossless_copies_what_loses_nothing():
    """Weights of float16 as well; others stay where they are, those of 16 bits too."""
    model = build("gpt2")
    weights = [model.transformer.h[0].attn.c_attn, model.transformer.h[1].attn.c_attn]
    with torch.no_grad():
        weights[0].weight.copy_(weights[0].weight.half())
    copies, x = WeightCopies("lossless"), torch.randn(3, 32)
    with torch.no_grad(), fast_linears(model, weights=copies):
        products = [module(x) for module in weights]
        found = [copies._copies[module].data for module in weights]
    assert found[0].dtype is torch.float16
    assert found[1] is None
    for module, product in zip(weights, products, strict=True):
        assert torch.equal(product, run_kernel(x, module.weight, module.bias, True))
    search = ContrastiveSearch(0.6, 4, weights="lossless")
    write(build("gpt2").bfloat16(), inputs_for(model, 1), search)
    assert all(copy.data is None for copy in search.weights._copies.values())


def test_support_says_what_loses_nothing():
    """Most of GPT-2's linear layers and the output layer; nothing is said where there is nothing to say."""
    names = [check.name for check in support(build("gpt2")).checks]
    assert "weights='lossless'" not in names
    (check,) = [each for each in support(in_16_bits(build("gpt2"))).checks if each.name == "weights='lossless'"]
    assert "0 of 0 MiB of float32 weights are as good in half the bytes" in check.detail
    assert "weights='lossless'" not in [each.name for each in support(build("gpt2").bfloat16()).checks]


@pytest.mark.parametrize("kind", ["int8", "lossless"])
def test_copies_are_kept_and_follow_the_weights(kind, monkeypatch):
    model, made = in_16_bits(build("gpt2")), []
    name = "quantized" if kind == "int8" else "narrowed"
    make = getattr(modules, name)
    monkeypatch.setattr(modules, name, lambda weight, *args: made.append(weight) or make(weight, *args))
    search, inputs = ContrastiveSearch(0.6, 4, weights=kind), inputs_for(model, 1)
    first = write(model, inputs, search)
    assert len(made) == len(linears(model))
    again = write(model, inputs, search)
    assert len(made) == len(linears(model)), "they are made once"
    assert torch.equal(first.sequences, again.sequences)
    made.clear()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.mul_(2)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
    after = write(model, inputs, search)
    assert {id(weight) for weight in made} == {id(model.transformer.h[1].mlp.c_fc.weight), id(model.lm_head.weight)}
    fresh = write(copy.deepcopy(model), inputs, ContrastiveSearch(0.6, 4, weights=kind))
    assert torch.equal(after.sequences, fresh.sequences)
    assert all(torch.equal(a, b) for a, b in zip(after.logits, fresh.logits, strict=True))


def test_a_weight_that_changes_meanwhile_counts_at_once():
    layer, x = Linear(40, 24), torch.randn(3, 40)
    with torch.no_grad(), fast_linears(layer, weights=WeightCopies("int8")):
        before = layer(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias), rtol=1e-5, atol=1e-5)


def test_copies_go_with_the_strategy():
    model, search = build("gpt2"), ContrastiveSearch(0.6, 4, weights="int8")
    write(model, inputs_for(model, 1), search)
    data = weakref.ref(search.weights._copies[model.lm_head].data)
    assert data() is not None
    del search
    gc.collect()
    assert data() is None
    assert "forward" not in model.lm_head.__dict__


def test_weights_in_inference_mode():
    """Nobody counts their changes: they are copied anew for every call."""
    with torch.inference_mode():
        layer = Linear(40, 24)
        x, copies = torch.randn(3, 40), WeightCopies("int8")
        with fast_linears(layer, weights=copies):
            before = layer(x) - layer.bias
        layer.weight.mul_(2)
        with fast_linears(layer, weights=copies):
            after = layer(x) - layer.bias
    torch.testing.assert_close(after, 2 * before, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_rounded_keeps_its_weights():
    layer = Linear(40, 24)
    with torch.no_grad():
        layer.weight[3, 5] = float("nan")
        x = torch.randn(3, 40)
        with fast_linears(layer, weights=WeightCopies("int8")):
            torch.testing.assert_close(
                layer(x), run_kernel(x, layer.weight, layer.bias, False), rtol=0, atol=0, equal_nan=True
            )


def test_the_engine_reads_them():
    model, texts = shared("gpt2"), [tokenizer().decode(ids) for ids in prompt(3, 9)]
    search = ContrastiveSearch(0.6, 4, weights="int8")
    inputs = [{"input_ids": tokenizer()(text, return_tensors="pt")["input_ids"]} for text in texts]
    alone = [write(model, each, search).sequences[0, -NEW:].tolist() for each in inputs]
    for batching in ("slots", "static"):
        engine = Engine(model, tokenizer(), slots=3, batching=batching, weights="int8", max_new_tokens=NEW)
        assert [result.token_ids for result in engine.generate(texts, ordered=True)] == alone
    plain = Engine(model, tokenizer(), slots=3, max_new_tokens=NEW, logprobs=True)
    rounded = Engine(model, tokenizer(), slots=3, max_new_tokens=NEW, logprobs=True, weights="int8")
    (ours,), (theirs,) = (list(engine.generate([texts[0]])) for engine in (rounded, plain))
    assert ours.logprobs != theirs.logprobs


# ---- bad arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["int4", "", 8, True, ["int8"]])
def test_unknown_weights(value):
    told = "weights must be one of 'int8', 'lossless', got "
    for make in (
        lambda: ContrastiveSearch(weights=value),
        lambda: WeightCopies(value),
        lambda: Engine(shared("gpt2"), tokenizer(), weights=value),
    ):
        with pytest.raises(ValueError) as caught:
            make()
        assert str(caught.value) == told + repr(value)


@pytest.mark.parametrize("others", [{"pack": True}, {"fast_linear": False}])
def test_what_does_not_go_together(others):
    with pytest.raises(ValueError, match="weights='int8' goes with fast_linear=True and without pack=True"):
        ContrastiveSearch(weights="int8", **others)


def test_elsewhere_than_on_the_cpu():
    model = build("gpt2").to("meta")
    told = "weights='int8' is for models on the CPU, this one is on meta"
    with pytest.raises(ValueError, match=told):
        Engine(model, tokenizer(), weights="int8")
    with pytest.raises(ValueError, match=told), fast_linears(model, weights=WeightCopies("int8")):
        pass


def test_without_the_extension(monkeypatch):
    def missing():
        raise RuntimeError("the C++ extension is not built")

    monkeypatch.setattr(_backends, "require_extension", missing)
    with pytest.raises(RuntimeError, match="not built"):
        Engine(shared("gpt2"), tokenizer(), weights="int8")
    with pytest.raises(RuntimeError, match="not built"), fast_linears(shared("gpt2"), weights=WeightCopies("int8")):
        pass
