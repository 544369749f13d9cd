"""Nothing of a call stays behind it, without help of the cycle collector: caches, histories, graphs."""

from __future__ import annotations

import gc
import warnings
from contextlib import contextmanager, suppress

import pytest
import torch

from simctg_fast import Engine
from simctg_fast.decoding import graph
from simctg_fast.decoding.contrastive_search import ContrastiveSearch

from ..decoding_models import PAD, build, inputs_for, tokenizer
from ..emulated_cuda import emulated_cuda
from ..engine.test_engine_slots import lines
from .test_decode_step import prompts


class Stops(Exception):
    pass


class Raising:
    """A streamer that ends the call at its fourth token."""

    def __init__(self, error):
        self.error, self.count = error, 0

    def put(self, value):
        self.count += 1
        if self.count == 5:
            raise self.error

    def end(self):
        pass


def tensors() -> dict[int, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # isinstance reads deprecated attributes of modules
        return {id(x): x for x in gc.get_objects() if isinstance(x, torch.Tensor)}


@contextmanager
def nothing_stays():
    gc.collect()
    before = tensors()
    gc.disable()
    try:
        yield
        stayed = [tuple(x.shape) for key, x in tensors().items() if key not in before]
    finally:
        gc.enable()
    assert not stayed


def run(model, inputs, error=None, new_tokens=8, **options):
    strategy = ContrastiveSearch(0.6, 4, streamer=None if error is None else Raising(error), **options)
    raised = None
    try:
        model.generate(**inputs, custom_generate=strategy, max_new_tokens=new_tokens, pad_token_id=PAD)
    except (Stops, KeyboardInterrupt) as ended:
        raised = type(ended)
    assert raised is error


CALLS = [
    ("gpt2", {}), ("llama", {"decode_step": True}), ("llama", {"path": "reorder"}), ("llama", {"path": "uncached"}),
    ("t5", {}), ("mamba", {}),
]  # fmt: skip
MORE_CALLS = [("gemma2", {"temperature": 0.7}), ("bart", {}), ("bloom", {})]


@pytest.mark.parametrize("error", [None, Stops, pytest.param(KeyboardInterrupt, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("name", "options"), [*CALLS, *(pytest.param(*call, marks=pytest.mark.full) for call in MORE_CALLS)]
)
def test_a_call_leaves_nothing(name, options, error):
    model = build(name)
    inputs = inputs_for(model, 2)
    with nothing_stays():
        run(model, inputs, error, **options)
        run(model, inputs, error, **options)


@pytest.mark.parametrize("error", [None, Stops, KeyboardInterrupt])
def test_a_captured_call_leaves_nothing(error, monkeypatch):
    model, inputs = build("llama"), prompts(2)
    with emulated_cuda(monkeypatch) as driver, nothing_stays():
        run(model, inputs, decode_step=True, new_tokens=40)
        run(model, inputs, error, decode_step=True, new_tokens=40)
        assert driver.recorded == 1
        assert len(driver.held) == (error is None)  # kept for the next call, if this one came to its end
        graph.release()
        assert not driver.held


@pytest.mark.parametrize("name", ["llama", "bart", "bloom"])
@pytest.mark.parametrize("how", ["to the end", "left early", pytest.param("an interrupt", marks=pytest.mark.full)])
def test_an_engine_leaves_nothing(name, how):
    """bloom's requests go in static batches."""
    model, words = build(name), tokenizer()
    with nothing_stays():
        engine = Engine(model, words, slots=2, max_new_tokens=4)
        results = engine.generate(lines(model, (3, 9, 5, 4, 7)))
        with suppress(KeyboardInterrupt):
            for number, _ in enumerate(results):
                if how == "left early" and number == 1:
                    break
                if how == "an interrupt" and number == 1:
                    results.throw(KeyboardInterrupt)
        del engine, results


def test_an_engine_leaves_nothing_after_errors(monkeypatch):
    """A step that raises ends the run."""
    forward, calls = torch.nn.Embedding.forward, []

    def fails(self, x):
        calls.append(1)
        if len(calls) == 8:
            raise RuntimeError("it broke")
        return forward(self, x)

    model, words = build("llama"), tokenizer()
    list(Engine(model, words, slots=2, max_new_tokens=4).generate(lines(model, (3, 9))))
    with nothing_stays():
        engine = Engine(model, words, slots=2, max_new_tokens=4)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Embedding, "forward", fails)
            with suppress(RuntimeError):
                list(engine.generate(lines(model, (3, 9, 5, 4, 7))))
        assert len(calls) == 8
        del engine
