"""Blocks of GPT-2 and of Llama's kin in two native calls: their modules' results, and a step aside where something is
unusual. (What all families share is tested with T5's in `test_t5_blocks.py`.)"""

import copy
import threading

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama

from simctg_fast import ContrastiveSearch
from simctg_fast.cpu import decoder_blocks
from simctg_fast.cpu import fast_blocks as families
from simctg_fast.cpu.fast_blocks import fast_blocks
from simctg_fast.cpu.forwards import _held, here, uses_here
from simctg_fast.cpu.modules import fast_linears
from simctg_fast.decoding import trial
from simctg_fast.decoding.attention import current_step
from simctg_fast.decoding.slots import Extent, SlotLayer
from simctg_fast.engine import Engine
from simctg_fast.ops import _backends

from ..decoding_models import VOCABULARY, tokenizer
from ..near_ties import same_tokens

pytestmark = pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")

LAYERS = 3
LLAMA = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"n_embd": 24, "n_head": 3}
KINDS = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "gpt2-relu": (GPT2LMHeadModel, GPT2Config, GPT2 | {"activation_function": "relu", "n_inner": 40}),
    "llama": (LlamaForCausalLM, LlamaConfig, LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-gelu": (LlamaForCausalLM, LlamaConfig, LLAMA | {"hidden_act": "gelu_new"}),
    "mistral": (MistralForCausalLM, MistralConfig, LLAMA | {"sliding_window": 4}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, LLAMA),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind="gpt2"):
    torch.manual_seed(0)
    model_class, config_class, extra = KINDS[kind]
    tokens = {
        "vocab_size": 90,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    model = model_class(config_class(num_hidden_layers=LAYERS, **tokens, **extra))
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ln_" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.eval()


IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 0, 11, 12, 13]])
TEXTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


def write(model, new_tokens=9, k=4, texts=TEXTS, **settings):
    """Tokens and the logits of every step, of two texts of different length."""
    out = model.generate(
        **texts,
        custom_generate=ContrastiveSearch(0.6, k, **settings),
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.stack(out.logits)


@pytest.fixture
def taken(monkeypatch):
    """Grows by one with each block that took the short way, those of trials aside: by the number that one call ran,
    then by zeros."""
    calls, tried = [], trial._try

    def try_path(*args):
        before = len(calls)
        try:
            return tried(*args)
        finally:
            del calls[before:]

    def run(x, blocks, *args):
        calls.extend([len(blocks)] + [0] * (len(blocks) - 1))
        return original(x, blocks, *args)

    original = decoder_blocks.decoder_blocks
    monkeypatch.setattr(trial, "_try", try_path)
    monkeypatch.setattr(decoder_blocks, "decoder_blocks", run)
    return calls


def parts(model):
    """The second block's attention and its feed-forward part."""
    if hasattr(model, "transformer"):
        block = model.transformer.h[1]
        return block.attn, block.mlp
    block = model.model.layers[1]
    return block.self_attn, block.mlp


def blocks(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@kinds
@pytest.mark.parametrize("k", [1, 4])
def test_the_results_of_the_modules(kind, k, taken, monkeypatch):
    model = make(kind)
    tokens, logits = write(model, k=k)
    assert len(taken) in (8 * LAYERS, 9 * LAYERS), "every block of every step is ours"
    count = len(taken)
    monkeypatch.setattr(families, "_FAMILIES", {})
    plain_tokens, plain_logits = write(model, k=k)
    assert len(taken) == count
    if not same_tokens(tokens, plain_tokens, model, TEXTS):
        torch.testing.assert_close(logits, plain_logits, rtol=2e-4, atol=2e-4)
    slow_tokens, slow_logits = write(model, k=k, fast_linear=False)
    if not same_tokens(tokens, slow_tokens, model, TEXTS):
        torch.testing.assert_close(logits, slow_logits, rtol=2e-4, atol=2e-4)


@kinds
def test_no_further_from_float64_than_the_modules(kind, monkeypatch):
    """Logits of one text, in float32 with our blocks and with the modules."""
    model, ids = make(kind), torch.randint(2, 90, (1, 40))
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tokens, logits = write(model, 30, texts=texts)
    monkeypatch.setattr(families, "_FAMILIES", {})
    plain_tokens, plain_logits = write(model, 30, texts=texts)
    same = int((tokens == plain_tokens).all(dim=0).long().cumprod(0).sum()) - ids.shape[1]
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(tokens).logits[:, ids.shape[1] - 1 : -1].transpose(0, 1)
    ours, theirs = ((each[1:same] - exact[1:same]).square().mean().sqrt() for each in (logits, plain_logits))
    assert ours <= 1.3 * theirs + 1e-7


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_the_engine_takes_them_too(kind, taken):
    engine = Engine(make(kind), tokenizer(), slots=2, batching="slots", max_new_tokens=7, strategy="contrastive")
    results = list(engine.generate(["abc", "to be or not", "x"]))
    assert len(results) == 3
    assert len(taken) >= 12 * LAYERS


def hook(attention, mlp):
    mlp.register_forward_hook(lambda *args: None)


def own_forward(attention, mlp):
    attention.forward = attention.forward


def own_linear(attention, mlp):
    name = "c_attn" if hasattr(attention, "c_attn") else "q_proj"
    linear = getattr(attention, name)

    class Lora(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base = linear

        def forward(self, x):
            return self.base(x) * 1.5

    setattr(attention, name, Lora())


def own_act(attention, mlp):
    setattr(mlp, "act" if hasattr(mlp, "act") else "act_fn", torch.nn.Tanh())


def training(attention, mlp):
    mlp.train()


def a_weight_that_is_no_parameter(attention, mlp):
    linear = mlp.c_proj if hasattr(mlp, "c_proj") else mlp.down_proj
    weight = linear.weight.detach()
    del linear.weight
    linear.weight = weight


CHANGES = (hook, own_forward, own_linear, own_act, a_weight_that_is_no_parameter)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_block_that_is_not_as_it_was_made(kind, change, taken, monkeypatch):
    model = make(kind)
    change(*parts(model))
    tokens, logits = write(model)
    assert len(taken) in (8 * (LAYERS - 1), 9 * (LAYERS - 1)), "the other blocks go on"
    monkeypatch.setattr(families, "_FAMILIES", {})
    plain_tokens, plain_logits = write(model)
    if not same_tokens(tokens, plain_tokens, model, TEXTS):
        torch.testing.assert_close(logits, plain_logits, rtol=2e-4, atol=2e-4)


def begin(model):
    block = blocks(model)[1]
    return here(block).value.begin(torch.randn(4, 1, 24), {})


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_change_within_the_block(kind):
    for change in (hook, own_forward, own_linear, training, a_weight_that_is_no_parameter):
        model = make(kind)
        with torch.no_grad(), fast_linears(model), fast_blocks(model, current_step) as routed:
            assert routed == LAYERS
            assert begin(model) is not None
            change(*parts(model))
            assert begin(model) is None, change.__name__
    assert not _held


def test_calls_that_are_not_a_steps():
    model = make("llama")
    with fast_linears(model), fast_blocks(model, current_step):
        plan, x = here(blocks(model)[0]).value, torch.randn(4, 1, 24)
        assert plan.begin(x, {}) is None, "gradients"
        with torch.no_grad():
            assert plan.begin(x, {"position_ids": x, "use_cache": True}) is not None
            assert plan.begin(x, {"something": 1}) is None
            assert plan.begin(torch.randn(4, 2, 24), {}) is None
            assert plan.begin(torch.randn(4, 24), {}) is None
            assert plan.begin(x.double(), {}) is None
            assert plan.begin(torch.randn(4, 1, 25), {}) is None
            with torch.autocast("cpu"):
                assert plan.begin(x, {}) is None


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_data_that_is_replaced_in_place(kind):
    """The parameter is the same, what it holds is not."""
    model = make(kind)
    linear = parts(model)[0].c_proj if kind == "gpt2" else parts(model)[0].o_proj
    with torch.no_grad(), fast_blocks(model, current_step):
        before = begin(model)
        linear.weight.data = linear.weight.data.clone()
        after = begin(model)
        assert len([1 for one, other in zip(before.layers, after.layers, strict=True) if one is not other]) == 1
        linear.weight.data = linear.weight.data[:8]
        assert begin(model) is None


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("pack", [False, True])
def test_a_changed_weight_counts_at_once(kind, pack, taken):
    model, changed = make(kind), []

    def change(ids, scores, **kwargs):
        if ids.shape[1] == 5:
            with torch.no_grad():
                for block in blocks(model):
                    linear = block.mlp.c_proj if kind == "gpt2" else block.mlp.down_proj
                    linear.weight.mul_(-1)
                    linear = block.attn.c_attn if kind == "gpt2" else block.self_attn.q_proj
                    linear.weight = torch.nn.Parameter(linear.weight.flip(0))
            changed.append(1)
        return scores

    def run(**settings):
        strategy, ids = ContrastiveSearch(0.6, 4, **settings), torch.tensor([[5, 6, 7]])
        return model.generate(
            ids, custom_generate=strategy, logits_processor=[change], max_new_tokens=8, do_sample=False
        )

    state = copy.deepcopy(model.state_dict())
    ours = run(pack=pack)
    count = len(taken)
    model.load_state_dict(state)
    assert torch.equal(run(fast_linear=False), ours)
    assert len(changed) == 2
    assert count in (7 * LAYERS, 8 * LAYERS)
    assert len(taken) == count


def test_functions_that_were_replaced(monkeypatch, taken):
    """Other libraries put theirs in the place of a model's rotation, or of a class's forward."""
    original = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *args, **kwargs: original(*args, **kwargs))
    write(make("llama"))
    assert not taken
    forward = modeling_gpt2.GPT2MLP.forward
    monkeypatch.setattr(modeling_gpt2.GPT2MLP, "forward", lambda self, x: forward(self, x) * 1.5)
    write(make("gpt2"))
    assert not taken


def test_cross_attention_is_not_ours():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, vocab_size=VOCABULARY, add_cross_attention=True, **GPT2)).eval()
    with fast_blocks(model, current_step) as routed:
        assert routed == 0


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("output", ["output_attentions", "output_hidden_states"])
def test_what_is_recorded(kind, output):
    model, ids = make(kind), torch.tensor([[5, 6, 7]])
    write(model)
    common = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, output: True}
    ours = model.generate(ids, custom_generate=ContrastiveSearch(0.6, 4), **common)
    slow = model.generate(ids, custom_generate=ContrastiveSearch(0.6, 4, fast_linear=False), **common)
    name = output.replace("output_", "")
    for one, other in zip(getattr(ours, name), getattr(slow, name), strict=True):
        assert len(one) == len(other)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, taken):
    assert write(make("llama").to(dtype))[0].shape == (2, 15)
    assert bool(taken) == (dtype is not torch.float64)


def lengths(taken):
    """Of the calls."""
    return [count for count in taken if count]


@kinds
def test_one_call_a_step(kind, taken):
    write(make(kind))
    assert set(lengths(taken)) == {LAYERS}


def in_place(module, args, out):
    out.mul_(1.25)


def in_place_before(module, args):
    args[0].mul_(1.25)


def something_else(module, args, out):
    return out * 1.25


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("change", [in_place, in_place_before, something_else])
def test_a_block_s_own_hooks(kind, change, taken):
    """What they do counts for the blocks behind."""

    def run(fast, layer):
        model = make(kind)
        block = blocks(model)[layer]
        if change is in_place_before:
            block.register_forward_pre_hook(change)
        else:
            block.register_forward_hook(change)
        return write(model, fast_linear=fast), model

    for layer in range(LAYERS):
        taken.clear()
        (tokens, logits), model = run(True, layer)
        assert len(taken) in (8 * LAYERS, 9 * LAYERS)
        (slow_tokens, slow_logits), _ = run(False, layer)
        if not same_tokens(tokens, slow_tokens, model, TEXTS):
            torch.testing.assert_close(logits, slow_logits, rtol=2e-4, atol=2e-4)


def test_layers_that_see_different_masks(taken):
    """The first step learns where the mask is another one."""
    extra = LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=4, vocab_size=90, eos_token_id=None, **extra)).eval()
    assert len(set(model.config.layer_types)) == 2
    tokens, _ = write(model)
    calls = lengths(taken)
    assert calls[-2:] == [1, 3]
    assert sum(calls) <= 9 * 4 + 3
    same_tokens(tokens, write(model, fast_linear=False)[0], model, TEXTS)


def test_other_orders_of_blocks(taken):
    """A model that leaves the last layers out, or whose forward is not transformers' own."""
    model = make("llama")
    model.config.num_hidden_layers = 2
    tokens, _ = write(model)
    assert set(lengths(taken)) <= {2, 3}
    same_tokens(tokens, write(model, fast_linear=False)[0], model, TEXTS)

    class Scaled(modeling_gpt2.GPT2Model):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = make("gpt2")
    model.transformer.__class__ = Scaled
    taken.clear()
    write(model)
    assert set(lengths(taken)) == {1}, "what it does between blocks is not known"


def test_a_module_used_twice(taken):
    model = make("gpt2")
    model.transformer.h[2] = model.transformer.h[1]
    with fast_blocks(model, current_step) as routed:
        assert routed == 2
        assert all(len(here(block).value.stack.plans) == 1 for block in blocks(model))


@pytest.mark.parametrize("pruned", [("q_proj", "k_proj", "v_proj"), ("q_proj",)])
def test_pruned_heads_end_a_call(pruned, taken):
    """Blocks of another number of heads do not share one."""
    model = make("llama")
    attention = blocks(model)[1].self_attn
    for linear in (getattr(attention, name) for name in pruned):
        keep = 16 if linear is attention.q_proj and len(pruned) == 1 else len(linear.weight) // 2
        linear.weight = torch.nn.Parameter(linear.weight[:keep].clone())
        linear.bias = torch.nn.Parameter(linear.bias[:keep].clone())
    attention.num_key_value_groups = len(attention.q_proj.weight) // len(attention.k_proj.weight)
    heads = len(attention.q_proj.weight)
    attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight[:, :heads].clone())
    tokens, _ = write(model)
    assert set(lengths(taken)) == {1}
    same_tokens(tokens, write(model, fast_linear=False)[0], model, TEXTS)


def test_only_what_was_returned_goes_on():
    x, y, step = torch.zeros(2, 1, 3), torch.ones(2, 1, 3), object()
    layer = SlotLayer(Extent(2, 2))
    ahead = decoder_blocks._Ahead(0, x, (step, None, None), [y, y + 1], [(layer, x, x), (layer, y, y)])
    assert ahead.take() is y
    assert layer.pending == (x, x)
    assert layer.was_read
    assert ahead.is_for(1, y, (step, None, None))
    assert not ahead.is_for(1, y.clone(), (step, None, None))
    assert not ahead.is_for(2, y, (step, None, None))
    assert not ahead.is_for(1, y, (object(), None, None))
    assert not ahead.is_for(1, y, (step, x, None))


@pytest.mark.parametrize("name", ["scaling", "epsilon", "bias", "shape"])
def test_what_a_kept_block_would_miss(name):
    """Everything that goes into a native block is looked at in each step."""
    model = make("gpt2")
    block = blocks(model)[1]
    with torch.no_grad(), fast_linears(model), fast_blocks(model, current_step):
        plan = here(block).value

        def native():
            found = plan.native(4, torch.float32, uses_here())
            return found and found[0]

        before = native()
        assert native() is before
        if name == "scaling":
            block.attn.scaling *= 2
        elif name == "epsilon":
            block.ln_2.eps *= 2
        elif name == "bias":
            block.mlp.c_fc.bias = None
        else:
            block.mlp.c_fc.weight.data = block.mlp.c_fc.weight.data.t()
        after = native()
        assert after is not before
        assert (after is None) == (name == "shape")


def test_threads_share_a_model():
    model = make("llama")
    expected, wrong = write(model), []

    def use():
        for _ in range(3):
            tokens, logits = write(model)
            if not (torch.equal(tokens, expected[0]) and torch.allclose(logits, expected[1], atol=1e-5)):
                wrong.append(1)

    users = [threading.Thread(target=use) for _ in range(3)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert not wrong
    assert not _held
