"""The decoder compiled inside the step over static buffers: the same tokens, one whole graph, the model as it was.

The backend "eager" runs what was traced as it stands, which is what most tests are about; Inductor makes code of it.
"""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch._dynamo.utils import counters

from simctg_fast.decoding import compiled_decoder, slots
from simctg_fast.decoding.attention import Attention
from simctg_fast.decoding.contrastive_search import ContrastiveSearch
from simctg_fast.decoding.decode_step import DecodeStep
from simctg_fast.decoding.generate_loop import Run
from simctg_fast.decoding.report import recall
from simctg_fast.decoding.strategies import Contrastive
from simctg_fast.engine.scheduler import SlotScheduler

from ..decoding_models import PAD, build, left_padded, prompt
from ..near_ties import same_tokens
from .test_model_untouched import assert_untouched, snapshot


@pytest.fixture(autouse=True)
def _traced_only(monkeypatch, request):
    backend = "inductor" if "inductor" in request.node.name else "eager"
    if backend == "inductor":
        pytest.importorskip("setuptools", reason="torch compiles code with it")
    monkeypatch.setattr(compiled_decoder, "BACKEND", backend)
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def steps(monkeypatch):
    """The `DecodeStep` objects that were called, by a weak reference each."""
    seen = []
    original = DecodeStep.__call__

    def remember(self):
        if not any(reference() is self for reference in seen):
            seen.append(weakref.ref(self))
        return original(self)

    monkeypatch.setattr(DecodeStep, "__call__", remember)
    return seen


def graphs() -> int:
    """How many graphs were made so far; none may have been broken."""
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


def generate(model, inputs, decode_step="compiled", top_k=4, **options):
    strategy = ContrastiveSearch(0.6, top_k, decode_step=decode_step)
    options = {"max_new_tokens": 20, "pad_token_id": PAD, **options}
    return model.generate(**inputs, custom_generate=strategy, **options)


def plain(batch=3, length=7):
    ids = prompt(batch, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def check_same_tokens(name, **changes):
    model = build(name, **changes)
    before = snapshot(model)
    for made, inputs in ((1, plain()), (2, left_padded(7, 4, 2))):  # starts are an input more
        ours = generate(model, inputs)
        assert graphs() == made
        same_tokens(ours, generate(model, inputs, decode_step=False), model, inputs)
        assert_untouched(model, dict(before))


FULL = [pytest.param(name, marks=pytest.mark.full) for name in ("llama", "mistral")]


@pytest.mark.parametrize("name", ["gpt2", "gemma2", *FULL])
def test_same_tokens_and_one_graph(name):
    check_same_tokens(name)


def test_inductor_gives_the_same_tokens():
    check_same_tokens("llama", num_hidden_layers=1)


@pytest.mark.full
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
def test_inductor_on_more_models(name):
    check_same_tokens(name)


@pytest.mark.full
def test_sizes_share_code():
    """What varies is learnt: five graphs serve every batch (one row is a case of its own, and so is one candidate),
    number of candidates, length of prompt and capacity of the buffers."""
    model = build("mistral")
    for batch, length, top_k, tokens in (
        (3, 7, 4, 20), (2, 30, 4, 9), (1, 8, 4, 20), (1, 3, 1, 9), (6, 5, 7, 12), (5, 12, 2, 30), (1, 20, 9, 5),
    ):  # fmt: skip
        inputs = plain(batch, length)
        ours = generate(model, inputs, top_k=top_k, max_new_tokens=tokens)
        same_tokens(ours, generate(model, inputs, False, top_k, max_new_tokens=tokens), model, inputs, top_k=top_k)
    assert graphs() <= 5
    others = graphs()
    generate(build("mistral"), plain(5, 9))  # another model counts for itself
    assert graphs() == others + 1


def test_buffers_that_grow_run_the_same_code(monkeypatch, steps):
    monkeypatch.setattr(slots, "next_capacity", lambda needed, _: needed + 3)
    model, inputs = build("llama"), plain(2)
    buffers = []
    longer = slots.longer

    def keep(buffer, *args, **kwargs):
        buffers.append(weakref.ref(buffer))
        return longer(buffer, *args, **kwargs)

    monkeypatch.setattr(slots, "longer", keep)
    ours = generate(model, inputs, max_new_tokens=40)
    assert graphs() == 1
    same_tokens(ours, generate(model, inputs, False, max_new_tokens=40), model, inputs)
    gc.collect()
    assert len(buffers) > 30
    assert not [buffer for buffer in buffers if buffer() is not None], "old buffers are kept alive"
    assert steps[0]() is None


def test_many_kinds_of_calls():
    """Past the compiler's limit the code is made anew."""
    model = build("llama", num_hidden_layers=1)
    with torch._dynamo.config.patch(recompile_limit=1):
        for made, inputs in ((1, plain()), (2, left_padded(7, 4, 2)), (3, plain())):
            same_tokens(generate(model, inputs), generate(model, inputs, decode_step=False), model, inputs)
            assert graphs() == made


def break_the_trace(model):
    """A module that asks the host."""
    original = type(model.model.norm).forward
    model.model.norm.forward = lambda x: original(model.model.norm, x if x.sum().item() else 2 * x)
    return model


def test_what_cannot_be_compiled_says_why(monkeypatch):
    model, inputs = break_the_trace(build("llama")), plain()
    expected = generate(model, inputs, decode_step=False)
    with pytest.raises(ValueError, match="decode_step='compiled', but its decoder cannot be compiled"):
        generate(model, inputs)
    assert "forward" not in vars(model.model)
    # where it is not insisted on, the steps run eagerly
    monkeypatch.setattr(Run, "_check_compiled", lambda *_: None)
    kept, begin = [], DecodeStep.begin
    monkeypatch.setattr(DecodeStep, "begin", lambda self, *args: (kept.append(self), begin(self, *args)))
    same_tokens(generate(model, inputs), expected, model, inputs)
    assert kept[0].step.not_compiled.startswith("its decoder cannot be compiled (")
    assert not kept[0].step.compiled
    model = build("llama")
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    same_tokens(generate(model, inputs), generate(model, inputs, decode_step=False), model, inputs)
    assert kept[-1].step.not_compiled == "the forward of its LlamaModel was replaced"
    assert model.model.__dict__["forward"] is not forward


def test_failing_later_is_noticed_as_well(monkeypatch):
    """By name, a step that has to go on without compiled code raises."""
    begin = DecodeStep.begin
    monkeypatch.setattr(
        DecodeStep, "begin", lambda self, *args: (self.step.do_not_compile("it broke"), begin(self, *args))
    )
    with pytest.raises(ValueError, match="decode_step='compiled', but it broke; allowed: True, False or 'auto'"):
        generate(build("llama"), plain())


def test_compiled_code_that_differs_is_not_used(monkeypatch):
    attend = Attention.attend

    def wrong(self, module, query, *args, **kwargs):
        return attend(self, module, 1.5 * query if torch.compiler.is_compiling() else query, *args, **kwargs)

    monkeypatch.setattr(Attention, "attend", wrong)
    with pytest.raises(ValueError, match="decode_step='compiled', but its step differs when it is compiled"):
        generate(build("llama"), plain())


def test_what_has_no_static_buffers_is_not_compiled():
    with pytest.raises(ValueError, match="decode_step='compiled', but it is decoded on path 'reorder'"):
        generate(build("bloom"), plain())


def test_other_forwards_meanwhile():
    """Another thread's forward runs the model's own code while ours is in place; two compiled runs do not mix."""
    model = build("llama")
    inputs = [plain(3), plain(2, 9)]
    expected = [generate(model, x, decode_step=False) for x in inputs]
    logits = model(**inputs[0]).logits
    ours: list = [None, None]
    seen = []

    def run(index):
        ours[index] = generate(model, inputs[index])

    def look(module, args):
        if "forward" in vars(model.model) and not seen:
            seen.append(None)
            other = threading.Thread(target=lambda: seen.append(model(**inputs[0]).logits))
            other.start()
            other.join()

    hook = model.lm_head.register_forward_pre_hook(look)
    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert torch.equal(seen[1], logits)
    assert "forward" not in vars(model.model)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("decode_step", [True, False])
def test_while_another_thread_compiles(decode_step, monkeypatch):
    """torch says "compiling" in all threads then; nothing here may believe to be traced."""
    model, inputs = build("llama"), plain()
    expected = generate(model, inputs, decode_step)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    same_tokens(generate(model, inputs, decode_step), expected, model, inputs)


def test_an_exception_leaves_the_model_as_it_was():
    model = build("llama")
    before = snapshot(model)

    def stop(module, args):
        if "forward" in vars(model.model):
            raise KeyboardInterrupt

    hook = model.lm_head.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        generate(model, plain())
    hook.remove()
    assert_untouched(model, before)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
def test_captured_and_compiled_with_inductor(name, steps):
    """Compiled code inside the CUDA graph."""
    model = build(name).cuda()
    inputs = {key: x.cuda() for key, x in left_padded(7, 4, 2).items()}
    kept = []
    hook = model.lm_head.register_forward_pre_hook(lambda *_: kept.extend(step() for step in steps))
    ours = generate(model, inputs, max_new_tokens=60)
    hook.remove()
    assert kept[-1].graph.reason is kept[-1].step.not_compiled is None
    assert kept[-1].graph.recorded is not None
    same_tokens(
        ours.cpu(), generate(build(name), left_padded(7, 4, 2), decode_step=False, max_new_tokens=60), model, inputs
    )


# ---- models that their owner compiled -------------------------------------------------------------------------------


def _forward_replaced(model):
    model.forward = torch.compile(model.forward, backend="eager")


def _one_layer(model):
    model.model.layers[0].compile(backend="eager")


@pytest.mark.parametrize("compiled", [lambda model: model.compile(backend="eager"), _forward_replaced, _one_layer])
def test_a_compiled_model_is_decoded_as_it_was_written(compiled):
    model, inputs = build("llama"), plain()
    expected = generate(build("llama"), inputs, decode_step=False)
    compiled(model)
    same_tokens(generate(model, inputs, decode_step=False), expected, model, inputs)
    assert recall(model).path == "shared_prefix"
    assert not counters["stats"]["unique_graphs"]
    model(**inputs)  # compiled as ever
    assert counters["stats"]["unique_graphs"]


def test_the_engine_decodes_a_compiled_model_in_slots():
    model = build("llama")
    model.compile(backend="eager")
    assert isinstance(SlotScheduler.open(model, Contrastive(4), 2, None, 8), SlotScheduler)
    assert not counters["stats"]["unique_graphs"]
