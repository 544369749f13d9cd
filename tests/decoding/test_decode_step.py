"""The step over static buffers against the plain loop: the same tokens, whatever the model, padding and ends."""

from __future__ import annotations

import functools
import importlib
import threading

import pytest
import torch
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList, SuppressTokensLogitsProcessor

from simctg_fast import Engine
from simctg_fast.decoding import attention, decode_step, graph
from simctg_fast.decoding.contrastive_search import ContrastiveSearch
from simctg_fast.decoding.decode_step import DecodeStep
from simctg_fast.decoding.padding_warning import no_padding_warning
from simctg_fast.decoding.slot_step import SlotStep
from simctg_fast.decoding.strategies import Choice, Contrastive

from ..decoding_models import PAD, build, tokenizer
from ..near_ties import same_tokens

model_of = functools.cache(build)


@pytest.fixture
def calls(monkeypatch):
    """How many steps were made over static buffers, and the last object that made them."""
    seen = {"steps": 0, "object": None}
    original = DecodeStep.__call__

    def count(self):
        seen["steps"] += 1
        seen["object"] = self
        return original(self)

    monkeypatch.setattr(DecodeStep, "__call__", count)
    return seen


def prompts(batch, width=7, pads=()):
    ids = torch.randint(3, 98, (batch, width), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def both(model, inputs, *, top_k=4, penalty_alpha=0.6, strategy=None, **options):
    """Tokens with and without static buffers."""
    options = {"max_new_tokens": 24, "pad_token_id": PAD, **options}
    return [
        model.generate(
            **inputs,
            custom_generate=ContrastiveSearch(penalty_alpha, top_k, decode_step=on, **(strategy or {})),
            **options,
        )
        for on in (True, False)
    ]


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
@pytest.mark.parametrize("pads", [(), (3, 0, 5)])
def test_same_tokens(name, pads, calls):
    ours, plain = both(model_of(name), prompts(3, pads=pads))
    same_tokens(ours, plain, model_of(name), prompts(3, pads=pads))
    assert calls["steps"] >= 22  # all but the first, which is compared
    assert calls["object"].graph.reason == "it is on cpu"


@pytest.mark.parametrize(("top_k", "penalty_alpha"), [(1, 0.6), (4, 0.0), (7, 1.0)])
def test_other_settings(top_k, penalty_alpha, calls):
    ours, plain = both(model_of("llama"), prompts(2), top_k=top_k, penalty_alpha=penalty_alpha)
    same_tokens(ours, plain, model_of("llama"), prompts(2), top_k=top_k, penalty_alpha=penalty_alpha)
    assert calls["steps"]


@pytest.mark.parametrize("interval", [1, 8])
def test_rows_that_end(interval, calls, monkeypatch):
    """Ends come at any step; looking for them late cuts what was written meanwhile."""
    module = importlib.import_module("simctg_fast.decoding.generate_loop")
    monkeypatch.setattr(module, "stop_check_interval", lambda device: interval)
    model = model_of("llama")
    free = both(model, prompts(3))[1]
    for ends in ([int(free[0, 12])], [int(free[row, 10 + 3 * row]) for row in range(3)], [97]):
        ours, plain = both(model, prompts(3), eos_token_id=ends)
        same_tokens(ours, plain, model, prompts(3))
    assert calls["steps"]


def test_buffers_grow(calls, monkeypatch):
    monkeypatch.setattr("simctg_fast.decoding.slots.next_capacity", lambda needed, _: needed + 3)
    monkeypatch.setattr(decode_step, "round_up", lambda positions: positions)
    for name in ("llama", "mistral"):
        ours, plain = both(model_of(name), prompts(2, pads=(2, 0)), max_new_tokens=40)
        same_tokens(ours, plain, model_of(name), prompts(2, pads=(2, 0)))
    assert calls["object"].slots.extent.capacity >= 46


class Backwards(LogitsProcessor):
    """Looks at the ids so far: bans the last token and prefers what the sum of all says."""

    def __call__(self, input_ids, scores):
        scores = scores.scatter(1, input_ids[:, -1:], float("-inf"))
        return scores.scatter_add(1, input_ids.sum(dim=1, keepdim=True) % scores.shape[1], torch.full_like(scores, 2.0))


def test_processors(calls):
    processors = [SuppressTokensLogitsProcessor(list(range(20, 60))), Backwards()]
    ours, plain = both(model_of("llama"), prompts(2), logits_processor=processors)
    same_tokens(ours, plain, model_of("llama"), prompts(2), logits_processor=LogitsProcessorList(processors))
    assert not set(range(20, 60)) & set(ours[:, 7:].flatten().tolist())
    assert calls["steps"]


def test_streamer_gets_every_token(calls):
    class Keep:
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got.append(value.tolist())

        def end(self):
            self.got.append("end")

    streamers = Keep(), Keep()
    for on, streamer in zip((True, False), streamers, strict=True):
        model_of("llama").generate(
            **prompts(1), custom_generate=ContrastiveSearch(0.6, 4, decode_step=on, streamer=streamer), max_new_tokens=9
        )
    for streamer in streamers:
        assert [torch.tensor(tokens).shape for tokens in streamer.got[:-1]] == [(1, 7), *[(1,)] * 9]
        assert streamer.got[-1] == "end"
    rows = ([[token for tokens in streamer.got[:-1] for token in torch.tensor(tokens).flatten().tolist()]]
            for streamer in streamers)  # fmt: skip
    same_tokens(*rows, model_of("llama"), prompts(1))
    assert calls["steps"]


def test_what_does_not_fit_says_why(calls):
    inputs = prompts(1)
    for name, options, strategy, message in (
        ("bloom", {}, {}, "decoded on path 'reorder'"),
        ("llama", {"return_dict_in_generate": True}, {}, "more than the tokens is wanted"),
        ("llama", {"max_time": 100.0}, {}, "MaxTimeCriteria"),
    ):
        with pytest.raises(ValueError, match=f"decode_step=True, but .*{message}"):
            both(model_of(name), inputs, strategy=strategy, **options)
    assert not calls["steps"]
    gaps = prompts(1)
    gaps["attention_mask"][0, 3] = 0
    with pytest.raises(ValueError, match="attention_mask has gaps"):
        both(model_of("llama"), gaps)
    with pytest.raises(ValueError, match="decode_step must be True, False, 'auto' or 'compiled', got 'graph'"):
        ContrastiveSearch(decode_step="graph")


def test_padded_greedy_search_on_other_paths_goes_on_as_it_was():
    """``"auto"`` on a GPU asks every call, whatever its path."""
    strategy = ContrastiveSearch(0.0, 1, decode_step="auto")
    for name in ("bloom", "mamba"):
        inputs = prompts(2, pads=(3, 0))
        with pytest.raises(ValueError, match="decoded on path 'reorder'"):
            both(model_of(name), inputs, top_k=1, penalty_alpha=0.0)
        out = model_of(name).generate(**inputs, custom_generate=strategy, max_new_tokens=4, pad_token_id=PAD)
        assert out.shape == (2, 11)


def test_a_step_that_differs_is_not_used(calls, monkeypatch):
    """A model that takes positions from its cache is served by the plain loop."""
    original = attention.Attention.attend

    def wrong(self, module, query, key, value, *args, **kwargs):
        static = self.slots.extent.static
        return original(self, module, 1.5 * query if static else query, key, value, *args, **kwargs)

    monkeypatch.setattr(attention.Attention, "attend", wrong)
    monkeypatch.setattr(attention, "native_call", lambda **_: None)  # the other way
    with pytest.raises(ValueError, match="differs"):
        both(build("llama"), prompts(2))
    assert not calls["steps"]


@pytest.mark.parametrize(("gap", "serves"), [(0.0, True), (1e-8, True), (1e-2, False)])
def test_a_near_tie_may_fall_either_way(gap, serves, monkeypatch, calls):
    """The step is judged by what the path's own scores say of its choice, and not by the place of that."""
    run, reproduces = SlotStep.run, DecodeStep.reproduces

    def the_other(self, proposal, result, scores, weight):
        other = ((result.selected + 1) % 4)[:, None]
        scores = scores.scatter(1, other, scores.gather(1, result.selected[:, None]) - gap)
        with monkeypatch.context() as patch:
            choice = Choice(other[:, 0], *[None] * 4)
            patch.setattr(SlotStep, "run", lambda *x, **more: (choice, run(*x, **more)[1]))
            return reproduces(self, proposal, result, scores, weight)

    monkeypatch.setattr(DecodeStep, "reproduces", the_other)
    model, inputs = build("llama"), prompts(3)
    if serves:
        same_tokens(*both(model, inputs), model, inputs)
        assert calls["steps"]
    else:
        with pytest.raises(ValueError, match="its step over static buffers differs"):
            both(model, inputs)


def test_a_wrong_choice_is_not_used(monkeypatch, calls):
    """In half precision too."""
    choose = Contrastive.choose

    def second(self, states, proposal, view):
        choice = choose(self, states, proposal, view)
        if view.positions is None:
            choice.selected = (choice.selected + 1) % 4
        return choice

    monkeypatch.setattr(Contrastive, "choose", second)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="its step over static buffers differs"):
            both(build("llama").to(dtype), prompts(3))
    assert not calls["steps"]


class Force(LogitsProcessor):
    """Every other token is the model's padding token."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 5] = scores.amax() + 1 if input_ids.shape[1] % 2 else float("-inf")
        return scores


def test_generated_tokens_are_not_taken_for_padding(monkeypatch):
    """GPT-2 looks for padding where it gets no mask; other threads' forwards and later ones do as ever."""
    warned = []
    monkeypatch.setattr("transformers.modeling_utils.logger.warning_once", lambda text, *_: warned.append(text))
    model = build("gpt2")
    model.config.pad_token_id = 5
    inputs = {key: x.clamp(min=6) if key == "input_ids" else x for key, x in prompts(2).items()}
    both(model, inputs, logits_processor=[Force()])
    requests = [{"prompt": tokenizer().decode(row)} for row in inputs["input_ids"]]
    assert len(list(Engine(model, tokenizer(), slots=2, max_new_tokens=4, batching="slots").generate(requests))) == 2
    assert not warned
    with no_padding_warning():
        model(torch.tensor([[5, 7]]))
        assert not warned
        thread = threading.Thread(target=lambda: model(torch.tensor([[5, 7]])))
        thread.start()
        thread.join()
    assert len(warned) == 1
    model(torch.tensor([[5, 7]]))
    assert len(warned) == 2


def test_what_is_not_captured_says_why():
    class Spread(torch.nn.Module):
        def __init__(self, **attributes):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1, device="meta"))
            vars(self).update(attributes)

    cuda = torch.device("cuda", 0)
    assert graph.obstacle(Spread(), torch.device("cpu")) == "it is on cpu"
    assert graph.obstacle(Spread(hf_device_map={"a": "meta", "b": "meta"}), cuda) is None
    assert "spread over 0, 1" in graph.obstacle(Spread(hf_device_map={"a": 0, "b": 1}), cuda)
    assert "tensor-parallel over 2" in graph.obstacle(Spread(_tp_size=2), cuda)


def test_windows_are_told_from_chunks():
    from transformers.masking_utils import chunked_overlay, sliding_window_overlay

    cpu = torch.device("cpu")
    window, chunk = sliding_window_overlay(4), chunked_overlay(4, torch.zeros(1, dtype=torch.long))

    def causal(function):
        return lambda b, h, q, kv: (kv <= q) & function(b, h, q, kv)

    assert attention.is_window(causal(window), 4, cpu)
    assert not attention.is_window(causal(window), 5, cpu)
    assert not attention.is_window(causal(chunk), 4, cpu)


def test_masks_that_are_no_window(calls, monkeypatch):
    """Where a mask is not known to be a window, the model's own function makes it from the lengths on the device."""
    monkeypatch.setattr(attention, "is_window", lambda *_: False)
    ours, plain = both(model_of("mistral"), prompts(3, pads=(3, 0, 5)))
    same_tokens(ours, plain, model_of("mistral"), prompts(3, pads=(3, 0, 5)))
    assert calls["steps"]


def test_logits_without_probabilities(calls):
    class Ban(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.fill_(float("-inf")) if input_ids.shape[1] == 12 else scores

    with pytest.raises(ValueError, match="left no probabilities at new token 5"):
        both(model_of("llama"), prompts(2), logits_processor=[Ban()])
    assert calls["steps"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
@pytest.mark.parametrize("pads", [(), (3, 0, 5)])
def test_captured_step_gives_the_same_tokens(name, pads, calls):
    model = build(name).cuda()
    inputs = {key: x.cuda() for key, x in prompts(3, pads=pads).items()}
    ours, plain = both(model, inputs, max_new_tokens=60)
    assert calls["object"].graph.reason is None
    assert calls["object"].graph.recorded is not None
    same_tokens(ours, plain, model, inputs)
    there = both(build(name), prompts(3, pads=pads), max_new_tokens=60)[1]
    same_tokens(ours.cpu(), there, model, inputs)
