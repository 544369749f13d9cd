"""The engine's step as a CUDA graph, by an emulation on the CPU: the same results, one step ahead of what is read."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from simctg_fast.decoding.slot_step import SlotStep
from simctg_fast.engine import Engine
from simctg_fast.engine.observe import StepRecord

from ..decoding.test_strategies import Opposite
from ..decoding_models import build, tokenizer
from .test_engine_slots import lines

HOST = {
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__bool__, torch.Tensor.__int__,
    torch.Tensor.__float__, torch.Tensor.nonzero, torch.Tensor.cpu, torch.Tensor.pin_memory, torch.nonzero,
    torch.tensor, torch.equal,
}  # fmt: skip


class NoHost(TorchFunctionMode):
    """Refuses what reads a tensor on the host, or brings one from there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in HOST, func
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _no_host_in_a_recording(driver, monkeypatch):
    call = SlotStep.__call__

    def watched(self):
        if driver.recording is None:
            return call(self)
        with NoHost():
            return call(self)

    monkeypatch.setattr(SlotStep, "__call__", watched)


def _rounded(logprobs):
    return None if logprobs is None else [(each["token_id"], round(each["logprob"], 4)) for each in logprobs]


def results(model, requests, captures=True, **options):
    engine = Engine(model, tokenizer(), **{"slots": 3, "batching": "slots", "max_new_tokens": 12} | options)
    engine.backend.no_graph = None if captures else "not to be"
    found = {r.id: (r.token_ids, r.finish_reason, r.error, _rounded(r.logprobs)) for r in engine.generate(requests)}
    return found, engine


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {}), ("llama", {}), ("mistral", {}), ("t5", {}), ("bart", {}), ("llama", {"strategy": "greedy"}),
        ("gpt2", {"strategy": "stochastic-contrastive", "temperature": 0.7}), ("llama", {"logprobs": True}),
        ("llama", {"stop": ["e"]}),
    ],
)  # fmt: skip
def test_the_same_results(name, options, driver):
    model = build(name)
    requests = lines(model, (5, 40, 13, 22, 8, 30, 3, 6))
    requests = [line | {"max_new_tokens": 4 + 3 * i, "penalty_alpha": 0.1 * i} if "strategy" not in options else line
                for i, line in enumerate(requests)]  # fmt: skip
    ours, engine = results(model, requests, **options)
    assert driver.recorded == 1
    assert driver.replayed >= 10
    assert ours == results(model, requests, False, **options)[0]
    assert engine.backend.generated == sum(len(tokens) for tokens, *_ in ours.values())
    assert results(model, requests, **options)[0] == ours
    assert driver.recorded == 1  # it was kept
    assert driver.as_before()


def test_a_strategy_of_somebodys_own(driver, monkeypatch):
    monkeypatch.setattr("simctg_fast.engine.engine.make_strategy", lambda *_: Opposite())
    requests = lines(build("llama"), (5, 23, 9, 14, 3, 31))
    ours = results(build("llama"), requests)[0]
    assert driver.recorded == 1
    assert ours == results(build("llama"), requests, False)[0]


def test_one_reading_a_step(driver, monkeypatch):
    read, write = [], StepRecord.write
    monkeypatch.setattr(StepRecord, "write", lambda *args: (read.append(1), write(*args))[1])
    _, engine = results(build("llama"), lines(build("llama"), (5, 9, 13)))
    assert len(read) in (engine.stats["steps"], engine.stats["steps"] - 1)  # nobody reads a surplus step


def test_sampling_is_not_captured(driver):
    model = build("llama")
    ours, engine = results(model, lines(model, (5, 9)), strategy="sample", temperature=0.8)
    assert not driver.recorded
    assert engine.stats["not_captured"] == "Sample asks the host"
    assert all(error is None for _, _, error, _ in ours.values())


def test_fresh_prompts_are_run_together(driver, monkeypatch):
    """Padded on the right, up to a chunk's length each: the same tokens as one by one."""
    model, batches = build("mistral"), []
    requests = lines(model, (5, 40, 13, 22, 8, 30, 3, 6))
    expected = results(model, requests)[0]
    engine = Engine(model, tokenizer(), slots=4, batching="slots", max_new_tokens=12)
    engine.backend.batches_prompts = True
    run = type(engine.backend)._fresh
    monkeypatch.setattr(type(engine.backend), "_fresh", lambda s, b: (batches.append(run(s, b)), batches[-1])[1])
    found = {r.id: r.token_ids for r in engine.generate(requests)}
    assert found == {key: value[0] for key, value in expected.items()}
    assert max(map(len, batches)) == 4
