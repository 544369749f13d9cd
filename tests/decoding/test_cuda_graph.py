"""A step that is captured as a CUDA graph, by an emulation on the CPU: the same tokens, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

from simctg_fast.decoding import cuda_graph, decode_step, graph
from simctg_fast.decoding.contrastive_search import ContrastiveSearch
from simctg_fast.decoding.cuda_graph import record
from simctg_fast.decoding.decode_step import DecodeStep
from simctg_fast.decoding.slot_step import SlotStep
from simctg_fast.decoding.strategies import Contrastive
from simctg_fast.ops.prefix_commit import CommitPlan

from ..decoding_models import PAD, build
from ..emulated_cuda import address
from ..near_ties import same_tokens
from .test_decode_step import prompts

NEW = 40


@pytest.fixture
def steps(monkeypatch):
    """Every `DecodeStep` that was made."""
    made, make = [], DecodeStep.__init__

    def init(self, *args, **kwargs):
        make(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(DecodeStep, "__init__", init)
    return made


def search(model, inputs, step=True, new_tokens=NEW, **options):
    strategy = ContrastiveSearch(0.6, 4, decode_step=step)
    return model.generate(**inputs, custom_generate=strategy, max_new_tokens=new_tokens, pad_token_id=PAD, **options)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
@pytest.mark.parametrize("pads", [(), (3, 0, 5)])
def test_replays_give_the_same_tokens(name, pads, driver, steps):
    model, inputs = build(name), prompts(3, pads=pads)
    ours = search(model, inputs)
    assert steps[0].graph.reason is None
    assert (driver.recorded, driver.rehearsed) == (1, 1)
    assert driver.replayed >= NEW - 3
    same_tokens(ours, search(model, inputs, False), model, inputs)
    assert driver.as_before()


def outliving(step: DecodeStep) -> dict[str, torch.Tensor]:
    """What is read after a replay, or by the next one."""
    slots, (plan, counters) = step.slots, step.graph.recorded.held
    found = {"table": plan.table, "counters": counters} | step.step.strategy.settings
    for owner in (step.step, slots, slots.history):
        found |= {name: x for name, x in vars(owner).items() if isinstance(x, torch.Tensor)}
    for number, layer in enumerate(slots.layers):
        found |= {f"keys {number}": layer.keys, f"values {number}": layer.values}
    return found


@pytest.mark.parametrize("pads", [(), (3, 0, 5)])
def test_nothing_that_outlives_a_capture_lies_in_its_memory(pads, driver, steps):
    """Memory that a capture allocates is used by several of its tensors in turn, in every replay."""
    search(build("llama"), prompts(3, pads=pads))
    (step,) = steps
    held = outliving(step)
    assert {"table", "counters", "logits", "lengths", "tokens", "active", "bad", "keys 0", "states", "alpha"} <= {*held}
    allocated = step.graph.recorded.graph.made
    assert allocated
    assert not [name for name, tensor in held.items() if address(tensor) in allocated]


def test_a_table_made_inside_the_capture_is_noticed(driver, monkeypatch):
    """The emulation itself: garbage is what a replay finds there."""
    run = CommitPlan.run

    def inside(self, pairs, position, winners):
        if driver.recording is not None:
            self.table = torch.empty(self.table.numel(), dtype=torch.int64)
        run(self, pairs, position, winners)

    monkeypatch.setattr(CommitPlan, "run", inside)
    with pytest.raises(AssertionError, match="an address of nothing"):
        search(build("llama"), prompts(1))


def test_commit_in_a_capture_takes_the_plan_it_was_given(driver):
    buffer, rows = torch.zeros(2, 3, 5, 4), torch.randn(6, 3, 1, 4)
    plan, positions, winners = CommitPlan(1, buffer.device), torch.tensor([1, 4]), torch.tensor([2, 3])
    table = plan.table

    def run():
        plan.run([(buffer, rows)], positions, winners)

    graph = record(run, buffer.device)
    assert plan.table is table
    assert not buffer.any()
    plan.finish()
    graph.replay()
    assert torch.equal(buffer[0, :, 1], rows[2, :, 0])
    assert torch.equal(buffer[1, :, 4], rows[3, :, 0])
    with pytest.raises(ValueError, match="another dtype"):
        plan.run([(buffer.half(), rows)], positions, winners)


def test_a_second_call_neither_compares_nor_rehearses(driver, steps, monkeypatch):
    compared, reproduces = [], DecodeStep.reproduces
    monkeypatch.setattr(DecodeStep, "reproduces", lambda self, *x: compared.append(1) or reproduces(self, *x))
    model, inputs = build("mistral"), prompts(2, pads=(2, 0))
    first = search(model, inputs)
    assert (len(compared), driver.rehearsed, driver.recorded) == (1, 1, 1)
    graph.release()
    assert torch.equal(search(model, inputs), first)
    assert (len(compared), driver.rehearsed, driver.recorded) == (1, 1, 2)
    search(model, prompts(3, pads=(2, 0)))  # another size: kernels may have to be compiled for it
    assert (len(compared), driver.rehearsed, driver.recorded) == (1, 2, 3)


def test_short_calls_are_not_captured(driver, steps):
    model, inputs = build("llama"), prompts(2)
    out = search(model, inputs, new_tokens=decode_step.MIN_CAPTURED)
    assert not driver.recorded
    assert steps[0].graph.reason == "23 tokens are left, a graph pays from 24 on"
    same_tokens(out, search(model, inputs, False, decode_step.MIN_CAPTURED), model, inputs)
    search(model, inputs, new_tokens=decode_step.MIN_CAPTURED + 1)
    assert driver.recorded == 1


def test_buffers_that_grow_are_captured_again(driver, steps, monkeypatch):
    monkeypatch.setattr("simctg_fast.decoding.slots.next_capacity", lambda needed, _: needed + 10)
    monkeypatch.setattr(decode_step, "round_up", lambda positions: positions)
    model, inputs = build("llama"), prompts(2)
    ours = search(model, inputs, new_tokens=60)
    assert driver.recorded >= 3
    same_tokens(ours, search(model, inputs, False, 60), model, inputs)
    assert len(driver.held) <= 1


class Reads(torch.nn.Module):
    """A layer's norm that asks the host, the first ``times``."""

    def __init__(self, inner, times):
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x):
        if x.shape[1] == 1 and self.times:
            self.times -= 1
            float(x.sum())
        return self.inner(x)


def test_a_step_that_makes_the_host_wait_is_refused_and_says_where(driver, steps, caplog):
    caplog.set_level("INFO")
    model, inputs = build("llama"), prompts(2)
    model.model.layers[0].input_layernorm = Reads(model.model.layers[0].input_layernorm, 10**6)
    ours = search(model, inputs)
    assert not driver.recorded
    assert driver.rehearsed == 2
    assert "makes the host wait for the device" in steps[0].graph.reason
    assert "test_cuda_graph.py:" in steps[0].graph.reason
    assert steps[0].graph.reason in caplog.text
    same_tokens(ours, search(model, inputs, False), model, inputs)


def test_waiting_once_is_no_reason(driver, steps, monkeypatch):
    """Something that is made on first use, and kept."""
    model, inputs = build("llama"), prompts(2)
    search(model, inputs, False)  # the trial
    rehearse = graph.rehearse
    waited = []

    def first(run, device):
        found = rehearse(run, device)
        waited.append(found)
        return "somewhere.py:1" if len(waited) == 1 else found

    monkeypatch.setattr(graph, "rehearse", first)
    search(model, inputs)
    assert (driver.rehearsed, driver.recorded) == (2, 1)
    assert steps[0].graph.reason is None


@pytest.mark.parametrize("how", ["it raises", "the host reads"])
def test_a_failed_capture_leaves_everything_as_it_was(how, driver, steps, monkeypatch):
    """The call goes on without a graph, the next one does not try again, and one of a sound model is captured."""
    run, broken = SlotStep.__call__, [True]

    def fails(self):
        run(self)
        if driver.recording is not None and broken[0]:
            if how == "it raises":
                raise RuntimeError("it broke")
            self.slots.lengths.sum().item()

    monkeypatch.setattr(SlotStep, "__call__", fails)
    model, inputs = build("llama"), prompts(2)
    ours = search(model, inputs)
    assert driver.as_before()
    assert not driver.held
    expected = "it broke" if how == "it raises" else "operation not permitted"
    assert "its step cannot be captured" in steps[0].graph.reason
    assert expected in steps[0].graph.reason
    same_tokens(ours, search(model, inputs, False), model, inputs)
    tried = driver.rehearsed
    assert torch.equal(search(model, inputs), ours)
    assert (steps[-1].graph.reason, driver.rehearsed) == (steps[0].graph.reason, tried)
    broken[0] = False
    search(build("gpt2"), inputs)
    assert steps[-1].graph.recorded is not None


@pytest.mark.parametrize("fails", [1, 2])
def test_a_capture_that_runs_out_of_memory(fails, driver, steps, monkeypatch):
    """It is tried again without what torch keeps for later; if that does not help, by the next call."""
    run, left = SlotStep.__call__, [fails]

    def short_of_memory(self):
        if driver.recording is not None and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("out of memory")
        run(self)

    monkeypatch.setattr(SlotStep, "__call__", short_of_memory)
    model, inputs = build("llama"), prompts(2)
    ours = search(model, inputs)
    assert driver.emptied == 1
    assert driver.as_before()
    assert (steps[0].graph.recorded is None) == (fails == 2)
    if fails == 2:
        assert "out of memory" in steps[0].graph.reason
        assert not driver.held
    assert torch.equal(search(model, inputs), ours)
    assert steps[-1].graph.reason is None


def test_memory_of_graphs_that_are_gone_is_given_back(driver):
    for _ in range(2 * cuda_graph._DEAD_POOLS + 1):
        record(lambda: None, torch.device("cpu"))
    assert driver.emptied == 2


def test_what_refuses_one_kind_of_call_says_nothing_of_others(driver, steps, monkeypatch):
    """A strategy that reads a tensor on the host, say."""

    class Asks(Contrastive):
        def propose(self, logits, view):
            float(logits.sum())
            return super().propose(logits, view)

    model, inputs = build("llama"), prompts(2)
    make = ContrastiveSearch.make_strategy
    for _ in range(2):
        monkeypatch.setattr(ContrastiveSearch, "make_strategy", lambda *_: Asks(4))
        search(model, inputs)
        assert "makes the host wait" in steps[-1].graph.reason
    assert driver.rehearsed == 2
    monkeypatch.setattr(ContrastiveSearch, "make_strategy", make)
    search(model, inputs)
    assert steps[-1].graph.recorded is not None


def test_each_size_has_its_own_rehearsals(driver, steps, monkeypatch):
    """A wait in the first of the second size is no more a reason than one in the first of all."""
    monkeypatch.setattr("simctg_fast.decoding.slots.next_capacity", lambda needed, _: needed + 20)
    monkeypatch.setattr(decode_step, "round_up", lambda positions: positions)
    rehearse, waits = graph.rehearse, ["somewhere.py:1", None, "somewhere.py:2", None]
    monkeypatch.setattr(
        graph, "rehearse", lambda run, device: (rehearse(run, device), waits.pop(0) if waits else None)[1]
    )
    search(build("llama"), prompts(2), new_tokens=70)
    assert driver.recorded >= 2
    assert not waits
    assert steps[0].graph.reason in (None, "too few tokens are left to capture it again")


def test_a_recording_of_which_no_graph_can_be_made(driver, monkeypatch):
    """It owns its memory by then, and gives it back itself, once."""
    end = torch.cuda.CUDAGraph.capture_end

    def fails(self):
        end(self)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", fails)
    with pytest.raises(cuda_graph.CaptureError, match="out of memory"):
        record(lambda: None, torch.device("cpu"))
    assert driver.as_before()
    assert not driver.held
    assert not cuda_graph._lost


def test_an_interrupt_during_a_capture_is_raised(driver, monkeypatch):
    run = SlotStep.__call__

    def interrupted(self):
        if driver.recording is not None:
            raise KeyboardInterrupt
        run(self)

    monkeypatch.setattr(SlotStep, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(build("llama"), prompts(1))
    assert driver.as_before()
    assert not driver.held


def test_no_collection_while_a_graph_is_recorded(driver):
    import gc

    seen = []
    record(lambda: seen.append(gc.isenabled()), torch.device("cpu"))
    assert seen == [False]
    assert gc.isenabled()
