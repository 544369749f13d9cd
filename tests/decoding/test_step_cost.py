"""What a step must not do: copy the prefix, run the head for losers, run anything twice."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from simctg_fast import ContrastiveSearch
from simctg_fast.cpu import modules
from simctg_fast.decoding import attention, slot_step, slots, strategies
from simctg_fast.decoding.slots import SlotLayer
from simctg_fast.ops import _backends

from ..decoding_models import build, decode, inputs_for, left_padded, prompt, shared

NEW, TOP_K = 6, 5


@pytest.fixture
def counted():
    """``counted(module)``: the shapes of the first input of every call of a module."""
    hooks = []

    def count(module):
        shapes = []
        hook = module.register_forward_pre_hook(
            lambda module, args, kwargs: shapes.append(tuple((args or tuple(kwargs.values()))[0].shape)),
            with_kwargs=True,
        )
        hooks.append(hook)
        return shapes

    yield count
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba", "t5"])
def test_head_runs_for_the_winners_alone(name):
    model, logits = build(name), []
    inputs = inputs_for(model, 2)
    decode(model, inputs)
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: logits.append(tuple(out.shape)))
    decode(model, inputs, new_tokens=NEW, top_k=TOP_K)
    assert logits == [(2, 1, 98)] * (1 + NEW)


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba"])
def test_a_prompt_and_a_forward_a_token(name, counted):
    model, inputs = build(name), left_padded(9, 7)
    decode(model, inputs)
    rows = counted(model)
    decode(model, inputs, new_tokens=NEW, top_k=TOP_K)
    assert rows == [(2, 9)] + [(2 * TOP_K, 1)] * NEW


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_encoder_and_cross_keys_are_computed_once(name, counted):
    model = build(name)
    inputs = inputs_for(model, 2)
    decode(model, inputs)
    encoder = counted(model.get_encoder())
    cross = model.decoder.block[1].layer[1].EncDecAttention.k if name == "t5" else None
    keys = counted(cross or model.model.decoder.layers[1].encoder_attn.k_proj)
    decode(model, inputs, new_tokens=NEW, top_k=TOP_K)
    assert len(encoder) == 1
    assert [shape[0] for shape in keys] == [2]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_keys_and_values_exist_once_a_sequence(name, monkeypatch):
    """Neither the caches nor what attention reads ever have a row a candidate."""
    model = shared(name)
    inputs = inputs_for(model, 2)
    decode(model, inputs)
    seen = set()
    original = attention.shared_prefix_attention

    def attend(query, key, value, *args, **kwargs):
        seen.add((query.shape[0], key.shape[0], value.shape[0]))
        return original(query, key, value, *args, **kwargs)

    monkeypatch.setattr(attention, "shared_prefix_attention", attend)
    decode(model, inputs, new_tokens=NEW, top_k=TOP_K)
    assert seen == {(2 * TOP_K, 2, 2)}


def test_cache_is_allocated_once_a_block(monkeypatch):
    model, inputs = shared("llama"), {"input_ids": prompt(1)}
    decode(model, inputs)
    reserved = []
    original = SlotLayer.update

    def update(self, *args, **kwargs):
        before = self.keys.data_ptr() if self.is_initialized else None
        out = original(self, *args, **kwargs)
        if self.keys.data_ptr() != before:
            reserved.append(tuple(self.keys.shape))
        return out

    monkeypatch.setattr(SlotLayer, "update", update)
    decode(model, inputs, new_tokens=30)
    assert reserved == [(1, 2, 39, 8)] * 2  # two layers, prompt and new tokens


def test_no_cache_or_history_is_concatenated(monkeypatch):
    """Growing by ``torch.cat`` is a copy of everything a token. Ids and masks are small."""
    model, inputs = shared("llama"), left_padded(9, 7)
    decode(model, inputs)
    sizes = []
    original = torch.cat

    def cat(tensors, *args, **kwargs):
        out = original(tensors, *args, **kwargs)
        if out.is_floating_point() and out.shape[-2:].numel() >= 9 * 32:
            sizes.append(tuple(out.shape))
        return out

    monkeypatch.setattr(torch, "cat", cat)
    decode(model, inputs, new_tokens=NEW)
    assert sizes == []


class Launches(TorchDispatchMode):
    """Counts operations that are a launch each on a GPU; ``one`` makes one of what is a kernel of ours there."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or "view" in func.name() or "empty" in func.name())
        return func(*args, **(kwargs or {}))

    def one(self, function):
        def counted(*args, **kwargs):
            self.count += 1
            with _disable_current_modes():
                return function(*args, **kwargs)

        return counted


@pytest.mark.parametrize(("name", "a_layer"), [("gpt2", 10), ("llama", 24)])
def test_launches_a_layer_on_a_gpu(name, a_layer, monkeypatch):
    """Of a step over static buffers, as many as the floors of `docs/measured.md` reckon with."""
    run, counts = slot_step.SlotStep.__call__, []

    def counted(self):
        with monkeypatch.context() as patch, Launches() as launches:
            for module, function in (
                (attention, "shared_prefix_attention"), (slot_step, "prefix_commit"),
                (strategies, "top_k_probs"), (slots, "candidate_scan"),
                (torch.nn.functional, "rms_norm"),  # one kernel of torch's on CUDA
            ):  # fmt: skip
                patch.setattr(module, function, launches.one(getattr(module, function)))
            run(self)
        counts.append(launches.count)

    monkeypatch.setattr(slot_step.SlotStep, "__call__", counted)
    monkeypatch.setattr(modules, "_on_cuda", lambda x: True)
    monkeypatch.setattr(modules, "_is_on_cuda", lambda model: True)
    monkeypatch.setattr(_backends, "extension", lambda: None)
    per_step = []
    for layers in (2, 4):
        model = build(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": layers})
        strategy = ContrastiveSearch(0.6, 4, decode_step=True)
        model.generate(prompt(2), custom_generate=strategy, max_new_tokens=4, do_sample=False)
        per_step.append(counts[-1])
    assert per_step[1] - per_step[0] == 2 * a_layer
    assert per_step[0] - 2 * a_layer <= 54
