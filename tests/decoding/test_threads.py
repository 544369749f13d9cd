"""Two threads on one model, or on two: each computes what it computes alone, however their forwards interleave."""

from __future__ import annotations

import copy
import inspect
import random
import threading
import types

import pytest
import torch

from simctg_fast import ContrastiveSearch
from simctg_fast.cpu import forwards
from simctg_fast.engine import Engine

from ..decoding_models import build, inputs_for, prompt, tokenizer
from .test_model_untouched import assert_untouched, snapshot

MODELS = ("gpt2", "llama", "bart", "mbart", "t5")
SECONDS = 300


class Turns:
    """Threads of which one runs at a time: at each :meth:`switch` a seed says who goes on."""

    def __init__(self, seed: int):
        self.random, self.condition = random.Random(seed), threading.Condition()
        self.running: list[threading.Thread] = []
        self.next: threading.Thread | None = None
        self.switches = 0

    def run(self, *functions):
        """What the functions return, each run in a thread of its own."""
        outs = [None] * len(functions)

        def work(index):
            me = self.running_at_first[index]
            with self.condition:
                self._wait(me)
            try:
                outs[index] = functions[index]()
            except BaseException as error:
                outs[index] = error
            finally:
                with self.condition:
                    self.running.remove(me)
                    self._choose()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(functions))]
        self.running, self.running_at_first = list(threads), threads
        self._choose()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        for out in outs:
            if isinstance(out, BaseException):
                raise out
        return outs

    def switch(self, *_):
        me = threading.current_thread()
        with self.condition:
            if me in self.running:
                self._choose()
                self.switches += self.next is not me
                self._wait(me)

    def _choose(self):
        with self.condition:
            self.next = self.random.choice(self.running) if self.running else None
            self.condition.notify_all()

    def _wait(self, me):
        assert self.condition.wait_for(lambda: self.next is me, SECONDS)


def places(model):
    """Modules inside a forward. (Not those inside of blocks that have a forward of ours: hooks would switch it off.)"""
    ours = not model.config.is_encoder_decoder or hasattr(model.get_decoder(), "block")
    inner = ("embed", "wpe") if ours else ("attn", "embed", "wpe")
    decoder = [
        module
        for name, module in model.get_decoder().named_modules()
        if name.rstrip("0123456789") in ("layers.", "h.", "block.") or any(part in name for part in inner)
    ]
    encoder = [model.get_encoder()] if model.config.is_encoder_decoder else []
    return [*decoder, *encoder, model.get_input_embeddings(), model.get_output_embeddings()]


def switch_at(turns, *models):
    return [
        module.register_forward_pre_hook(turns.switch)
        for module in {id(module): module for model in models for module in places(model)}.values()
    ]


# What a thread does, made for a model; each returns tensors.


def forward(model, seed=0):
    inputs = inputs_for(model, 2, length=8)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = prompt(2, 6, seed=seed + 5)

    @torch.no_grad()
    def run():
        return [model(**inputs).logits for _ in range(4)]

    return run


def generate(model, seed=0, **settings):
    ids = prompt(2, 5 + 4 * seed, seed=seed)
    outputs = {} if settings.get("decode_step") else {"return_dict_in_generate": True, "output_logits": True}

    def run():
        strategy = ContrastiveSearch(0.6, 4, **settings)
        out = model.generate(ids, custom_generate=strategy, max_new_tokens=6 - seed, **outputs)
        return [out] if settings.get("decode_step") else [out.sequences, *out.logits]

    return run


def reorder(model, seed=0):
    return generate(model, seed, path="reorder")


def packed(model, seed=0):
    return generate(model, seed, pack=True)


def static_buffers(model, seed=0):
    return generate(model, seed, decode_step=True)


def engine(model, seed=0):
    key = "source" if model.config.is_encoder_decoder else "prompt"
    lengths = (3, 17, 9, 30)[seed:]
    requests = [{"id": i, key: tokenizer().decode(prompt(1, n, seed=i)[0])} for i, n in enumerate(lengths)]
    ours = Engine(model, tokenizer(), slots=2, batching="slots", max_new_tokens=4, trace=True)

    def run():
        results = sorted(ours.generate(requests), key=lambda result: result.id)
        assert not any(result.error for result in results)
        return [torch.tensor(result.token_ids) for result in results] + [repr(result.trace) for result in results]

    return run


def equal(ours, expected):
    return len(ours) == len(expected) and all(
        one == other if isinstance(one, str) else torch.equal(one, other)
        for one, other in zip(ours, expected, strict=True)
    )


def interleaved(runs, models, seeds):
    """How often the threads changed, and whether all that came out is what each run gives alone."""
    expected = [run() for run in runs]
    before = [snapshot(model) for model in models]
    switches, right = 0, True
    for seed in seeds:
        turns = Turns(seed)
        hooks = switch_at(turns, *models)
        try:
            outs = turns.run(*runs)
        finally:
            for hook in hooks:
                hook.remove()
        switches += turns.switches
        right = right and all(map(equal, outs, expected))
    for model, state in zip(models, before, strict=True):
        assert_untouched(model, state)
    assert not forwards._held
    return switches, right


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("step", [engine, generate, reorder])
def test_a_step_and_a_plain_forward(name, step):
    model = build(name)
    switches, right = interleaved([step(model), forward(model)], [model], range(3))
    assert right
    assert switches > 30


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pair", [(generate, generate), (engine, engine), (engine, packed), (packed, generate)])
def test_two_at_once_on_one_model(name, pair):
    model = build(name)
    first, second = pair
    switches, right = interleaved([first(model), second(model, seed=1)], [model], range(2))
    assert right
    assert switches > 30


@pytest.mark.parametrize("other", [forward, static_buffers, engine])
def test_a_step_over_static_buffers(other):
    model = build("llama")
    assert interleaved([static_buffers(model), other(model, seed=1)], [model], range(2))[1]


@pytest.mark.parametrize("names", [("gpt2", "llama"), ("bart", "mbart"), ("t5", "bart")])
@pytest.mark.parametrize("step", [engine, generate])
def test_two_at_once_on_two_models(names, step):
    models = [build(name) for name in names]
    _, right = interleaved([step(model, seed) for seed, model in enumerate(models)], models, range(2))
    assert right


def within(model, outer, inner, at):
    """What ``outer`` gives, and ``inner``, of which another thread does the whole each time the outer thread comes to
    one of the modules ``at`` while something of ours is in place."""
    owner, outs = threading.get_ident(), []

    def meanwhile(module, args):
        if threading.get_ident() == owner and forwards._held and len(outs) < 8:
            outs.append(Turns(0).run(inner)[0])

    hooks = [module.register_forward_pre_hook(meanwhile) for module in at]
    try:
        return outer(), outs
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("make", [forward, generate, engine])
@pytest.mark.parametrize("where", [0, pytest.param(-1, marks=pytest.mark.full)])
def test_all_of_it_within_a_step(name, make, where):
    """In front of the first and of the last layer. An engine is opened there, too: what it finds in the modules then is
    not the models'."""
    model = build(name)
    outer, inner = engine(model), make(model, 1)
    expected, expected_inside, before = outer(), inner(), snapshot(model)
    blocks = next(part for part in model.get_decoder().children() if isinstance(part, torch.nn.ModuleList))
    out, inside = within(model, outer, lambda: make(model, 1)(), [blocks[where]])
    assert equal(out, expected)
    assert len(inside) == 8
    assert all(equal(one, expected_inside) for one in inside)
    assert_untouched(model, before)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("make", [generate, engine])
@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()], ids=type)
def test_nothing_stays_after_an_exception_in_a_step(name, make, error):
    model = build(name)
    run, before, layers = make(model), snapshot(model), places(model)
    expected = run()

    def stop(module, args):
        if forwards._thread.uses:
            raise error

    for layer in (layers[0], layers[-1]):
        hook = layer.register_forward_pre_hook(stop)
        with pytest.raises(type(error)):
            run()
        hook.remove()
        assert_untouched(model, dict(before))
        assert not forwards._held
        assert not forwards._thread.uses
    assert equal(run(), expected)


@pytest.mark.parametrize("name", MODELS)
def test_without_the_thread_check_the_others_forward_is_wrong(name, monkeypatch):
    """One store of what is in place for all threads instead of one for each: these tests see it."""
    model = build(name)
    steps, others = engine(model), forward(model)
    expected = others()
    blocks = next(part for part in model.get_decoder().children() if isinstance(part, torch.nn.ModuleList))
    monkeypatch.setattr(forwards, "_thread", types.SimpleNamespace(uses={}, suspended=False))
    found = []

    def look():
        try:
            found.append(equal(others(), expected))
        except RuntimeError as error:  # positions of another number of rows
            found.append(f"{error}")

    within(model, steps, look, [blocks[0]])
    assert True not in found


# ---- the registry ---------------------------------------------------------------------------------------------------


def plus(self, input):
    use = forwards.here(self)
    out = type(self).forward(self, input)
    return out if use is None else out + use.value


def minus(self, input):
    return plus(self, input)


X = torch.zeros(2)


def test_a_forward_is_its_threads_and_the_innermost_counts():
    layer, calls = torch.nn.Identity(), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    with forwards.Forwards() as outer, forwards.Forwards() as inner:
        outer.put(layer, plus, 1)
        assert layer(X).tolist() == [1, 1]
        assert inspect.signature(layer.forward) == inspect.signature(torch.nn.Identity().forward)
        inner.put(layer, plus, 2)
        assert layer(X).tolist() == [2, 2]
        assert Turns(0).run(lambda: layer(X))[0].tolist() == [0, 0]
        assert len(calls) == 3
        assert copy.deepcopy(layer)(X).tolist() == [0, 0]
    assert layer(X).tolist() == [0, 0]
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_blocks_end_in_any_order_and_thread(order, elsewhere):
    """As generators do that are run in turn, or left to the collector."""
    layer = torch.nn.Identity()
    blocks = [forwards.Forwards(), forwards.Forwards()]
    for value, block in enumerate(blocks):
        assert block.put(layer, plus, value) is not None
    for index, left in zip(order, ([1 - order[0]] * 2, None), strict=True):
        end = blocks[index].__exit__
        Turns(0).run(end) if elsewhere else end()
        assert left is None or layer(X).tolist() == left
    assert "forward" not in vars(layer)
    assert not forwards._held
    assert not forwards._thread.uses


def test_somebody_elses_forward_is_left_alone():
    layer, theirs = torch.nn.Identity(), lambda x: x + 5
    with forwards.Forwards() as block:
        layer.forward = theirs
        assert block.put(layer, plus, 1) is None
        assert not forwards.has_own_forward(layer)
        del layer.forward
        assert block.put(layer, plus, 1) is not None
        assert forwards.has_own_forward(layer)
        assert block.put(layer, minus, 1) is None, "another of ours"
        layer.forward = theirs
        assert not forwards.has_own_forward(layer)
        assert block.put(layer, plus, 1) is None
    assert layer.__dict__["forward"] is theirs
    hooked = torch.nn.Identity()
    hooked._hf_hook = object()
    with forwards.Forwards() as block:
        assert block.put(hooked, plus, 1) is None


def test_what_was_left_in_a_copy_is_taken_over():
    layer = torch.nn.Identity()
    with forwards.Forwards() as block:
        block.put(layer, plus, 1)
        copied = copy.deepcopy(layer)
    with forwards.Forwards() as block:
        assert block.put(copied, plus, 3) is not None
        assert copied(X).tolist() == [3, 3]
    assert "forward" not in vars(copied)
