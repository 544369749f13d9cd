"""The caller's model comes back as it was, and is an ordinary model for everybody else meanwhile."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import AttentionInterface, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from simctg_fast import ContrastiveSearch, patch_transformers, support
from simctg_fast.decoding import attention as our_attention
from simctg_fast.decoding.slots import Slots

from ..decoding_models import build, decode, inputs_for, prompt, shared

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


def snapshot(model):
    """Everything about a model that somebody could notice."""
    modules, configs = {}, {}
    for name, module in model.named_modules():
        modules[name] = {
            "class": type(module),
            "attributes": {key: id(value) for key, value in vars(module).items()},
            "hooks": {hook: list(getattr(module, hook)) for hook in HOOKS},
            "parameters": {key: id(value) for key, value in module._parameters.items()},
            "training": module.training,
        }
        if hasattr(module, "config"):
            attributes = {key: repr(value) for key, value in vars(module.config).items()}
            configs[name] = (id(module.config), module.config._attn_implementation, attributes)
    tensors = {
        name: (value.data_ptr(), value._version, value.dtype, value.requires_grad, value.clone())
        for name, value in [*model.named_parameters(), *model.named_buffers()]
    }
    return {
        "modules": modules,
        "configs": configs,
        "config": copy.deepcopy(model.config.to_dict()),
        "generation_config": copy.deepcopy(model.generation_config.to_dict()),
        "generate": GenerationMixin.generate,
        "tensors": tensors,
    }


def assert_untouched(model, before):
    after = snapshot(model)
    tensors_before, tensors_after = before.pop("tensors"), after.pop("tensors")
    assert after == before
    assert tensors_after.keys() == tensors_before.keys()
    for name, (*facts, values) in tensors_before.items():
        assert tensors_after[name][:-1] == tuple(facts), name
        assert torch.equal(tensors_after[name][-1], values), name
    assert not our_attention._switched
    assert getattr(our_attention._step, "value", None) is None


ROUTES = [
    ("llama", "shared_prefix"),
    ("llama", "reorder"),
    ("llama", "uncached"),
    ("gemma2", "shared_prefix"),
    ("gpt2", "shared_prefix"),
    ("bloom", "auto"),
    ("mamba", "auto"),
    ("t5", "shared_prefix"),
    ("bart", "reorder"),
]


@pytest.mark.parametrize(("name", "path"), ROUTES)
def test_after_generate(name, path):
    model = build(name)
    inputs = inputs_for(model, 2)
    before = snapshot(model)
    for _ in range(2):  # the first call tries paths out
        decode(model, inputs, path=path, return_dict_in_generate=True, output_scores=True)
        assert_untouched(model, dict(before))


def test_after_support_and_patch():
    model = build("bloom")
    before = snapshot(model)
    support(model)
    with patch_transformers():
        model.generate(prompt(1), penalty_alpha=0.6, top_k=4, max_new_tokens=4)
    assert_untouched(model, before)


class Saboteur(LogitsProcessor, StoppingCriteria, BaseStreamer):
    """Raises at call number ``after``, in whatever role."""

    def __init__(self, error, after):
        self.error, self.left = error, after

    def __call__(self, input_ids, scores):
        self.put(None)
        return scores if scores is not None else torch.zeros(len(input_ids), dtype=torch.bool)

    def put(self, value):
        self.left -= 1
        if self.left < 0:
            raise self.error

    def end(self):
        pass


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), KeyboardInterrupt(), pytest.param(SystemExit(), marks=pytest.mark.full)], ids=type
)
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("place", ["processor", "criterion", "streamer", "embedding", "layer", "head"])
@pytest.mark.parametrize(("name", "path"), [("llama", "shared_prefix"), ("llama", "reorder"), ("llama", "uncached")])
def test_after_an_exception(name, path, place, after, error):
    """``embedding``, ``layer``, ``head``: Ctrl-C arrives in the middle of a forward."""
    model, saboteur = build(name), Saboteur(error, after)
    kwargs, streamer, hooks = {"max_new_tokens": 6}, None, []
    if place == "processor":
        kwargs["logits_processor"] = [saboteur]
    elif place == "criterion":
        kwargs["stopping_criteria"] = [saboteur]
    elif place == "streamer":
        streamer = saboteur
    else:
        module = {"embedding": model.model.embed_tokens, "layer": model.model.layers[1], "head": model.lm_head}[place]
        hooks = [module.register_forward_hook(lambda *_: saboteur.put(None))]
    before = snapshot(model)
    strategy = ContrastiveSearch(0.6, 4, path=path, streamer=streamer)
    with pytest.raises(type(error)):
        model.generate(prompt(2), custom_generate=strategy, **kwargs)
    assert_untouched(model, before)
    for hook in hooks:
        hook.remove()
    out = model.generate(prompt(2), custom_generate=ContrastiveSearch(0.6, 4), max_new_tokens=6)
    assert torch.equal(out, decode(shared(name), {"input_ids": prompt(2)}, new_tokens=6))


def test_users_hooks_run_and_stay():
    model, calls = build("llama"), []
    model.lm_head.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    model.register_forward_hook(lambda module, args, kwargs, out: None, with_kwargs=True)
    before = snapshot(model)
    decode(model, {"input_ids": prompt(2)}, new_tokens=3)
    assert_untouched(model, before)
    assert calls


# ---- whose attention runs ------------------------------------------------------------------------------------------


@pytest.fixture
def spied_attention():
    """An attention of the model's own choice that records the number of queries of every call."""
    lengths = []

    def attention(module, query, *args, **kwargs):
        lengths.append(query.shape[2])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *args, **kwargs)

    AttentionInterface.register("spied", attention)
    AttentionMaskInterface.register("spied", sdpa_mask)
    yield lengths
    AttentionInterface._global_mapping.pop("spied", None)
    AttentionMaskInterface._global_mapping.pop("spied", None)


def test_prompt_runs_the_models_own_attention(spied_attention):
    model = build("llama")
    model.config._attn_implementation = "spied"
    inputs = inputs_for(model, 2)
    first = decode(model, inputs)
    assert spied_attention[-2:] == [9, 9]  # two layers; before that the trial
    assert set(spied_attention) == {9, 1, 11}  # the prompt, transformers' own steps, and the whole without a cache
    spied_attention.clear()
    assert torch.equal(decode(model, inputs), first)
    assert spied_attention == [9, 9]
    assert torch.equal(first, decode(shared("llama"), inputs))


def exactly(model, ids, new_tokens=12, **kwargs):
    """Contrastive search without our linear kernel, whose sums round differently from the model's own."""
    strategy = ContrastiveSearch(0.6, 4, fast_linear=False)
    return model.generate(ids, custom_generate=strategy, max_new_tokens=new_tokens, **kwargs)


class Forward(LogitsProcessor):
    """Runs the model from inside the loop, as classifier-free guidance does."""

    def __init__(self, model, ids):
        self.model, self.ids, self.logits = model, ids, []

    def __call__(self, input_ids, scores):
        self.logits.append(self.model(self.ids).logits)
        return scores


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_forward_from_inside_a_processor(name):
    model, ids = shared(name), prompt(3, 5, seed=8)
    with torch.no_grad():
        expected = model(ids).logits
    forward = Forward(model, ids)
    out = exactly(model, prompt(2), logits_processor=[forward])
    assert len(forward.logits) == 12
    assert all(torch.equal(logits, expected) for logits in forward.logits)
    assert torch.equal(out, exactly(model, prompt(2)))


def test_generation_from_inside_a_processor():
    model, ids = shared("llama"), prompt(1, 5, seed=8)
    expected, texts = decode(model, {"input_ids": ids}, new_tokens=5), []

    class Nested(LogitsProcessor):
        def __call__(self, input_ids, scores):
            texts.append(decode(model, {"input_ids": ids}, new_tokens=5))
            return scores

    out = decode(model, {"input_ids": prompt(2)}, new_tokens=4, logits_processor=[Nested()])
    assert torch.equal(out, decode(model, {"input_ids": prompt(2)}, new_tokens=4))
    assert len(texts) == 4
    assert all(torch.equal(text, expected) for text in texts)


# ---- threads -------------------------------------------------------------------------------------------------------


def in_thread(function):
    """The result of ``function()`` run to its end in another thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(timeout=1200)
    return results[0]


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5"])
@pytest.mark.parametrize("padded", [False, True])
def test_forward_in_another_thread_in_the_middle_of_a_step(name, padded):
    """While our step runs, the configuration names our attention; others must still get the model's own."""
    model = build(name)
    inputs = inputs_for(model, 2 if padded else 1, length=8)
    if name == "t5":
        inputs["decoder_input_ids"] = torch.full((len(inputs["input_ids"]), 3), 7)
    with torch.no_grad():
        expected = model(**inputs).logits
    seen, names, owner = [], set(), threading.get_ident()

    def meanwhile(module, args, kwargs, out):
        if threading.get_ident() == owner:
            names.add(model.config._attn_implementation)
            seen.append(in_thread(torch.no_grad()(lambda: model(**inputs).logits)))

    layer = model.decoder.block[0] if name == "t5" else model.model.layers[0]
    layer.register_forward_hook(meanwhile, with_kwargs=True)
    exactly(model, prompt(1), new_tokens=4)
    assert our_attention.NAME in names
    assert len(seen) >= 5
    assert all(torch.equal(logits, expected) for logits in seen)
    decode(model, {"input_ids": prompt(1)}, new_tokens=4)
    for logits in seen[-4:]:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_function_that_outlives_its_step(name):
    """Another thread may look our functions up during a step and call them when it is over."""
    model, ids = build(name), prompt(2)
    with torch.no_grad():
        expected = model(ids).logits
    own = model.config._attn_implementation
    with our_attention.AttentionSwitch(model)(our_attention.Attention(Slots(2, 0, ids.device), 2)):
        switched = model.config._attn_implementation
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(switched, None)
        mask = AttentionMaskInterface._global_mapping[switched]
    assert switched == our_attention.NAME
    assert model.config._attn_implementation == own
    places = [(AttentionInterface._global_mapping, attention), (AttentionMaskInterface._global_mapping, mask)]
    kept = [(mapping, mapping.get(own)) for mapping, _ in places]
    calls = []

    def once(mapping, late):
        """Stands under the model's own name for one call, which is then ours; after that the name means its own."""

        def function(*args, **kwargs):
            restore(mapping)
            calls.append(mapping)
            out = late(*args, **kwargs)
            mapping[own] = function
            return out

        return function

    def restore(mapping):
        before = next(value for kept_mapping, value in kept if kept_mapping is mapping)
        if before is None:
            mapping.pop(own, None)
        else:
            mapping[own] = before

    try:
        for mapping, late in places:
            mapping[own] = once(mapping, late)
        with torch.no_grad():
            out = model(ids).logits
    finally:
        for mapping, _ in places:
            restore(mapping)
    assert calls
    assert torch.equal(out, expected)


@pytest.mark.parametrize("names", [("llama", "llama"), ("gemma2", "gemma2"), ("llama", "bloom")])
def test_two_threads_generate(names):
    """On one model, and on two."""
    models = [build(names[0])]
    models.append(models[0] if names[1] == names[0] else build(names[1]))
    inputs = [{"input_ids": prompt(2, 9, seed=1)}, {"input_ids": prompt(3, 7, seed=2)}]
    expected = [decode(model, given, new_tokens=20) for model, given in zip(models, inputs, strict=True)]
    outs: dict[int, list] = {0: [], 1: []}
    start = threading.Barrier(2)

    def run(index):
        start.wait(timeout=1200)
        for _ in range(3):
            outs[index].append(decode(models[index], inputs[index], new_tokens=20))

    before = snapshot(models[0])
    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=1200)
    for index in (0, 1):
        assert len(outs[index]) == 3
        assert all(torch.equal(out, expected[index]) for out in outs[index])
    assert_untouched(models[0], before)


def test_two_threads_generate_in_lockstep():
    """Every step of one thread begins while a step of the other is under way."""
    model, meet = build("llama"), threading.Barrier(2)

    def hold(module, args, out):
        meet.wait(timeout=1200)

    inputs = [{"input_ids": prompt(2, 9, seed=1)}, {"input_ids": prompt(3, 7, seed=2)}]
    expected = [decode(model, given, new_tokens=10) for given in inputs]
    model.model.layers[0].register_forward_hook(hold)
    outs = {}
    threads = [
        threading.Thread(target=lambda i=i: outs.update({i: decode(model, inputs[i], new_tokens=10)})) for i in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=1200)
    assert all(torch.equal(outs[index], expected[index]) for index in (0, 1))
