"""T5's decoder blocks in five calls: the bits of their modules, and a step aside wherever something is unusual."""

import copy
import gc
import pickle
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration
from transformers.models.t5 import modeling_t5

from simctg_fast import ContrastiveSearch
from simctg_fast.cpu import fast_blocks as families
from simctg_fast.cpu import t5_blocks
from simctg_fast.cpu.fast_blocks import fast_blocks
from simctg_fast.cpu.forwards import _held, here
from simctg_fast.cpu.modules import fast_linears
from simctg_fast.decoding import trial
from simctg_fast.decoding.attention import current_step
from simctg_fast.ops import _backends
from simctg_fast.ops.linear import most_rows

from ..near_ties import same_tokens

pytestmark = pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")

LAYERS = 3
KINDS = {
    "t5": (T5ForConditionalGeneration, T5Config, {"feed_forward_proj": "relu"}),
    "t5-gated": (T5ForConditionalGeneration, T5Config, {"feed_forward_proj": "gated-gelu"}),
    "mt5": (MT5ForConditionalGeneration, MT5Config, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}


def make(kind="t5", **sizes):
    torch.manual_seed(0)
    model_class, config_class, extra = KINDS[kind]
    sizes = {"vocab_size": 90, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": LAYERS, "num_heads": 3} | sizes
    model = model_class(config_class(decoder_start_token_id=0, pad_token_id=0, eos_token_id=None, **sizes, **extra))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 1.0)
    model.generation_config.eos_token_id = None
    return model.eval()


IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 0, 0, 0]])
TEXTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


def write(model, new_tokens=9, **settings):
    """Tokens and the logits of every step, of two texts of different length."""
    out = model.generate(
        **TEXTS,
        custom_generate=ContrastiveSearch(0.6, 4, **settings),
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.stack(out.logits)


@pytest.fixture
def taken(monkeypatch):
    """Grows by one with each block that took the short way, those of trials aside."""
    calls, original, tried = [], t5_blocks.linear_feed_forward, trial._try

    def try_path(*args):
        before = len(calls)
        try:
            return tried(*args)
        finally:
            del calls[before:]

    monkeypatch.setattr(trial, "_try", try_path)
    monkeypatch.setattr(t5_blocks, "linear_feed_forward", lambda *args: calls.append(1) or original(*args))
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_the_modules(kind, taken, monkeypatch):
    model = make(kind)
    tokens, logits = write(model)
    # Every block of every step is ours.
    assert len(taken) == 9 * LAYERS
    monkeypatch.setattr(families, "_FAMILIES", {})
    plain_tokens, plain_logits = write(model)
    assert len(taken) == 9 * LAYERS
    assert torch.equal(tokens, plain_tokens)
    assert torch.equal(logits, plain_logits)
    slow_tokens, slow_logits = write(model, fast_linear=False)
    if not same_tokens(tokens, slow_tokens, model, TEXTS):
        torch.testing.assert_close(logits, slow_logits, rtol=1e-4, atol=1e-4)


def test_the_bias_of_a_distance_is_kept_until_its_weight_changes(taken, monkeypatch):
    model = make()
    made, original = [], modeling_t5.T5Attention.compute_bias

    def compute_bias(self, *args, **kwargs):
        made.append(args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(modeling_t5.T5Attention, "compute_bias", compute_bias)
    with fast_blocks(model, current_step):
        plan = here(model.decoder.block[0]).value
        attention = plan.self_attention
        for seen in (0, 3, 40, 700, 2):
            expected = original(attention, 1, seen + 1, past_seen_tokens=seen)
            assert torch.equal(plan.relative_bias(seen + 1, seen), expected)
        assert len(made) == 2, "once for the first 513, once for what is longer"
        attention.relative_attention_bias.weight.data.add_(1)
        assert torch.equal(plan.relative_bias(9, 8), original(attention, 1, 9, past_seen_tokens=8))
        assert torch.equal(plan.relative_bias(5, 8), original(attention, 1, 5, past_seen_tokens=8))


def hook(model):
    model.decoder.block[1].layer[2].DenseReluDense.wi.register_forward_hook(lambda *args: None)


def own_forward(model):
    layer = model.decoder.block[1].layer[0].SelfAttention
    layer.forward = layer.forward


def own_linear(model):
    class Mine(torch.nn.Linear):
        pass

    model.decoder.block[1].layer[0].SelfAttention.q.__class__ = Mine


def own_act(model):
    model.decoder.block[1].layer[2].DenseReluDense.act = torch.nn.SiLU()


def act_with_its_own_forward(model):
    model.decoder.block[1].layer[2].DenseReluDense.act.forward = torch.tanh


def a_weight_that_is_no_parameter(model):
    layer = model.decoder.block[1].layer[1].EncDecAttention.q
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight


def an_expanded_norm(model):
    model.decoder.block[1].layer[0].layer_norm.weight = torch.nn.Parameter(torch.full((1,), 0.5).expand(24))


def a_bias(model):
    model.decoder.block[1].layer[1].EncDecAttention.o.bias = torch.nn.Parameter(torch.ones(24))


CHANGES = (hook, own_forward, own_linear, own_act, act_with_its_own_forward, a_weight_that_is_no_parameter)


@pytest.mark.parametrize("change", [*CHANGES, an_expanded_norm, a_bias])
def test_a_block_that_is_not_as_it_was_made(change, taken, monkeypatch):
    model = make()
    change(model)
    tokens, logits = write(model)
    assert len(taken) == 9 * (LAYERS - 1), "the other blocks go on"
    monkeypatch.setattr(families, "_FAMILIES", {})
    assert torch.equal(write(model)[1], logits)
    assert torch.equal(write(model)[0], tokens)


def test_hooks_on_a_block_itself_run(taken):
    model, seen = make(), []
    write(model, 1)  # the trial
    taken.clear()
    model.decoder.block[2].register_forward_hook(lambda module, args, out: seen.append(out[0].shape))
    write(model, 5)
    assert len(taken) == 5 * LAYERS
    assert seen.count((8, 1, 24)) == 5


def test_a_class_that_was_changed(monkeypatch, taken):
    original = modeling_t5.T5LayerFF.forward
    monkeypatch.setattr(modeling_t5.T5LayerFF, "forward", lambda self, x: original(self, x) * 1.5)
    changed = write(make())
    assert not taken
    monkeypatch.undo()
    assert not torch.equal(write(make())[1], changed[1])


@pytest.mark.parametrize("output", ["output_attentions", "output_hidden_states"])
def test_what_is_recorded(output, taken):
    model = make()
    ids = torch.tensor([[5, 6, 7]])
    write(model)
    before = len(taken)
    common = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, output: True}
    ours = model.generate(ids, custom_generate=ContrastiveSearch(0.6, 4), **common)
    slow = model.generate(ids, custom_generate=ContrastiveSearch(0.6, 4, fast_linear=False), **common)
    name = output.replace("output_", "decoder_")
    assert len(getattr(ours, name)) == len(getattr(slow, name)) == 4
    for one, other in zip(getattr(ours, name), getattr(slow, name), strict=True):
        assert len(one) == len(other)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert len(taken) == before, "every output has to be seen"


@contextmanager
def stepping(model):
    """A step in which blocks may be called one by one, and what to call them with."""
    with torch.no_grad(), fast_linears(model), fast_blocks(model, current_step):
        yield lambda: here(model.decoder.block[0]).value.begin(torch.randn(4, 1, 24), {})


def a_transposed_view(attention):
    attention.q.weight = torch.nn.Parameter(attention.q.weight.t())


def some_rows(attention):
    attention.q.weight = torch.nn.Parameter(attention.q.weight[:8])


def another_layer(attention):
    attention.q = torch.nn.Linear(24, 24, bias=False)


def a_forward(attention):
    attention.k.forward = lambda x: x


def training(attention):
    attention.v.train()


@pytest.mark.parametrize("change", [a_transposed_view, some_rows, another_layer, a_forward, training])
def test_a_change_within_the_block(change):
    model = make(d_kv=8, num_heads=3)
    with stepping(model) as begin:
        assert begin() is not None
        change(model.decoder.block[0].layer[0].SelfAttention)
        assert begin() is None


def test_hooks_of_all_modules_run():
    model, seen = make(), []
    with stepping(model) as begin:
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: seen.append(1))
        try:
            assert begin() is None
        finally:
            handle.remove()
        assert begin() is not None


def test_a_packed_copy_that_goes_outlives_the_call_that_reads_it():
    model = make()
    linear, x = model.decoder.block[0].layer[0].SelfAttention.q, torch.randn(4, 1, 24)
    with torch.no_grad(), fast_blocks(model, current_step):
        plan = here(model.decoder.block[0]).value
        with fast_linears(model.decoder, pack=True):
            call = plan.begin(x, {})
            copy_of_q = weakref.ref(here(linear).value.copy.data)
        assert copy_of_q() is not None, "the call holds it"
        assert plan.begin(x, {}).layers[0] is not call.layers[0], "the weight in place again"
        del call
        gc.collect()
        assert copy_of_q() is None


def test_weights_of_inference_mode(taken):
    with torch.inference_mode():
        model = make()
        ids = torch.tensor([[5, 6, 7]])
        settings = {"max_new_tokens": 4, "do_sample": False}
        ours = model.generate(ids, custom_generate=ContrastiveSearch(0.6, 4), **settings)
        assert len(taken) == 4 * LAYERS
        slow = model.generate(ids, custom_generate=ContrastiveSearch(0.6, 4, fast_linear=False), **settings)
        same_tokens(ours, slow, model, {"input_ids": ids})


def test_few_entries_behind_the_relu(taken):
    """So few that the zeros are left out where the layers are packed (AVX2)."""
    model = make(d_ff=200)
    for block in model.decoder.block:
        dense = block.layer[2].DenseReluDense
        with torch.no_grad():  # most rows of wi point away from every normed state
            dense.wi.weight.abs_().mul_(torch.where(torch.rand(200, 1) < 0.1, 1.0, -1.0))
            block.layer[2].layer_norm.weight.abs_()
    tokens, logits = write(model)
    packed_tokens, packed_logits = write(model, pack=True)
    if not same_tokens(tokens, packed_tokens, model, TEXTS):
        torch.testing.assert_close(logits, packed_logits, rtol=1e-4, atol=1e-4)
    assert len(taken) == 2 * 9 * LAYERS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, taken):
    """In float16 a block keeps infinite numbers out, which is its own to do."""
    tokens, _ = write(make().to(dtype))
    assert tokens.shape == (2, 10)
    assert bool(taken) == (dtype is torch.bfloat16)


def test_more_rows_than_the_kernels_are_for(taken):
    ids = torch.randint(1, 90, (most_rows() // 4 + 1, 4))
    settings = {"max_new_tokens": 3, "do_sample": False, "custom_generate": ContrastiveSearch(0.6, 4)}
    model = make()
    expected = model.generate(ids, **settings)
    assert not taken, "four candidates each go through a general matrix product"
    with fast_linears(model.decoder, pack=True):
        same_tokens(
            model.generate(ids, **settings), expected, model, {"input_ids": ids, "attention_mask": (ids != 0).long()}
        )
    packed_win = _backends.extension().active_isa() == "avx2"
    assert len(taken) == (3 * LAYERS if packed_win else 0), "packed layers take more"


def test_everything_is_as_it_was_found():
    model = make()
    blocks = model.decoder.block
    with fast_blocks(model, current_step) as routed:
        assert routed == LAYERS
        with fast_blocks(model.decoder, current_step) as again:
            assert again == LAYERS
        assert "forward" in blocks[0].__dict__
        twin = copy.deepcopy(model)
        thawed = pickle.loads(pickle.dumps(model))
    for each in (model, model.encoder):
        assert not any("forward" in module.__dict__ for module in each.modules())
    assert not _held
    assert torch.equal(write(thawed)[0], write(model)[0])
    assert torch.equal(write(twin)[0], write(model)[0])
    with pytest.raises(KeyboardInterrupt), fast_blocks(model, current_step):
        raise KeyboardInterrupt
    assert not _held
    with fast_blocks(make("mt5").encoder, current_step) as routed:
        assert routed == 0


def test_a_changed_weight_counts_at_once(taken):
    model, changed = make(), []

    def change(ids, scores, **kwargs):
        if ids.shape[1] == 4:
            with torch.no_grad():
                for block in model.decoder.block:
                    block.layer[2].DenseReluDense.wo.weight.mul_(-1)
                    wi = block.layer[2].DenseReluDense.wi
                    wi.weight = torch.nn.Parameter(wi.weight.flip(0))
            changed.append(1)
        return scores

    def run(**settings):
        strategy = ContrastiveSearch(0.6, 4, **settings)
        ids = torch.tensor([[5, 6, 7]])
        return model.generate(
            ids, custom_generate=strategy, logits_processor=[change], max_new_tokens=8, do_sample=False
        )

    for pack in (True, False):
        state = copy.deepcopy(model.state_dict())
        ours = run(pack=pack)
        model.load_state_dict(state)
        assert torch.equal(run(fast_linear=False), ours)
        model.load_state_dict(state)
    assert len(changed) == 4
    assert len(taken) == 2 * 8 * LAYERS


def test_threads_share_a_model():
    model = make()
    expected, wrong = write(model), []

    def use():
        for _ in range(5):
            tokens, logits = write(model)
            # A prompt that is read while another thread has the attention switched meets other kernels: a rounding.
            if not (torch.equal(tokens, expected[0]) and torch.allclose(logits, expected[1], atol=1e-5)):
                wrong.append(1)

    users = [threading.Thread(target=use) for _ in range(3)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert not wrong
    assert not _held
