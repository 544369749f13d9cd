"""Graphs that are kept from call to call, by an emulation on the CPU: who gets one, and when it is dropped."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from simctg_fast.decoding import graph
from simctg_fast.decoding.contrastive_search import ContrastiveSearch

from ..decoding_models import PAD, build, inputs_for
from ..near_ties import same_tokens
from .test_decode_step import prompts

NEW = 40


def search(model, inputs, step=True, alpha=0.6, k=4, new=NEW, options=None, **more):
    strategy = ContrastiveSearch(alpha, k, decode_step=step, **(options or {}))
    return model.generate(**inputs, custom_generate=strategy, max_new_tokens=new, pad_token_id=PAD, **more)


def test_calls_that_follow_replay_the_same_graph(driver):
    """Other prompts and lengths, another weight, another end of text: none of them is part of the graph."""
    model = build("llama")
    search(model, prompts(3))
    ends = [int(search(model, prompts(3), False)[0, 20])]
    for inputs, more in (
        (prompts(3, width=30), {}),
        (prompts(3, width=5), {"alpha": 0.3, "new": 60}),
        (prompts(3), {"alpha": 1.0}),
        (prompts(3), {"logits_processor": [lambda ids, scores: scores.scatter(1, ids[:, -1:], float("-inf"))]}),
    ):
        ours, plain = search(model, inputs, **more), search(model, inputs, False, **more)
        assert torch.equal(ours, plain)
    assert driver.recorded == 1
    for end in (ends, [int(search(model, prompts(3))[0, 12])]):
        assert torch.equal(
            search(model, prompts(3), eos_token_id=end), search(model, prompts(3), False, eos_token_id=end)
        )
    assert driver.recorded == 2  # one of a call that may end before its length


@pytest.mark.parametrize(
    ("other", "more"),
    [
        ({"inputs": prompts(2)}, {}),
        ({"inputs": prompts(3, pads=(2, 0, 0))}, {}),
        ({"inputs": prompts(3), "k": 5}, {}),
        ({"inputs": prompts(3), "options": {"temperature": 0.5}}, {}),
        ({"inputs": prompts(3, width=300)}, {}),
    ],
    ids=["rows", "padding", "candidates", "random", "capacity"],
)
def test_calls_of_another_kind_have_their_own(other, more, driver):
    model = build("llama")
    search(model, prompts(3))
    inputs = other.pop("inputs")
    if "options" in other:
        other["options"]["generator"] = torch.Generator().manual_seed(1)
    ours = search(model, inputs, **other, **more)
    assert driver.recorded == 2
    if "options" in other:
        other["options"]["generator"].manual_seed(1)
    assert torch.equal(ours, search(model, inputs, False, **other, **more))


@pytest.mark.parametrize("name", ["gpt2", "mistral", "t5", "bart", "mbart"])
def test_with_an_encoder_and_padding(name, driver):
    model = build(name)
    for length in (9, 14):
        inputs = inputs_for(model, 3, length)
        ours, plain = search(model, inputs), search(model, inputs, False)
        same_tokens(ours, plain, model, inputs)
    assert driver.recorded == 1
    assert driver.replayed > NEW


def changed(model, how):
    if how == "weights":
        weight = model.model.layers[0].mlp.up_proj.weight
        model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(1.5 * weight.detach())
    elif how == "hook":
        model.model.layers[0].register_forward_hook(lambda module, args, output: 1.01 * output)
    elif how == "forward":
        layer = model.model.layers[0].mlp
        plain = layer.forward
        layer.forward = lambda x: 1.5 * plain(x)
    elif how == "attribute":
        model.model.layers[0].self_attn.scaling *= 1.5
    else:
        model.model.layers[0].mlp = torch.nn.Identity()


@pytest.mark.parametrize("how", ["weights", "hook", "forward", "attribute", "module"])
def test_a_model_that_has_changed_is_captured_again(how, driver):
    model, inputs = build("llama"), prompts(3)
    before = search(model, inputs)
    with torch.no_grad():
        changed(model, how)
    assert torch.equal(search(model, inputs), search(model, inputs, False))
    assert driver.recorded == 2
    assert not torch.equal(search(model, inputs), before)


def test_a_hook_in_all_modules_is_heard(driver):
    model, inputs, heard = build("llama"), prompts(3), []
    search(model, inputs)
    with torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: heard.append(module)):
        search(model, inputs)
    assert driver.recorded == 2
    assert model.model.layers[0].mlp in heard


def test_weights_that_are_written_to_in_place_are_read(driver):
    model, inputs = build("llama"), prompts(3)
    before = search(model, inputs)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    ours = search(model, inputs)
    assert driver.recorded == 1
    assert not torch.equal(ours, before)
    assert torch.equal(ours, search(model, inputs, False))


def test_no_more_than_two_the_last_used(driver):
    model = build("llama")
    for rows in (1, 2, 1, 3):
        search(model, prompts(rows))
    assert [entry[1][1] for entry in graph._kept] == [1, 3]
    assert driver.recorded == 3
    assert len(driver.held) == 2
    graph.release()
    gc.collect()
    assert not driver.held


def test_no_more_than_a_share_of_the_memory(driver, monkeypatch):
    model = build("llama")
    search(model, prompts(1))
    size = graph._kept[0][2].bytes
    monkeypatch.setattr(graph, "free_bytes", lambda device: 4 * (size - 1))
    search(model, prompts(1))
    assert not graph._kept


def test_nothing_is_left_of_a_model_that_is_gone(driver):
    model = build("llama")
    search(model, prompts(2))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert not graph._kept
    assert not driver.held


def test_a_call_that_fails_keeps_nothing(driver):
    def fails(ids, scores):
        if ids.shape[1] > 20:
            raise RuntimeError("no")
        return scores

    model = build("llama")
    search(model, prompts(2))
    with pytest.raises(RuntimeError, match="no"):
        search(model, prompts(2), logits_processor=[fails])
    assert not graph._kept
    assert torch.equal(search(model, prompts(2)), search(model, prompts(2), False))


def test_a_graph_is_nobody_elses_meanwhile(driver):
    """A call within a call, of the same kind."""
    model, inner = build("llama"), []
    expected = search(model, prompts(2), False)

    def calls(ids, scores):
        if ids.shape[1] == 20:
            inner.append(search(model, prompts(2)))
        return scores

    search(model, prompts(2))
    assert torch.equal(search(model, prompts(2), logits_processor=[calls]), expected)
    assert torch.equal(inner[0], expected)
    assert driver.recorded == 2
