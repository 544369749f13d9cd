"""`support`: which path a model takes, why, and that a path that does not serve is found out."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
import transformers

from ..repository import repository

sys.path.append(str(repository("benchmarks")))
import parity_zoo as zoo

from simctg_fast import SupportReport, support
from simctg_fast.decoding import attention
from simctg_fast.decoding.caches import CACHE_NAME
from simctg_fast.decoding.report import recall

from ..decoding_models import build, decode, inputs_for, left_padded, prompt, shared
from ..near_ties import same_tokens


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gpt2", "shared_prefix"),
        ("llama", "shared_prefix"),
        ("gemma2", "shared_prefix"),
        ("bart", "shared_prefix"),
        ("t5", "shared_prefix"),
        ("bloom", "reorder"),
        ("mamba", "reorder"),
    ],
)
def test_path_reason_and_checks(name, path):
    model = build(name)
    report = support(model)
    assert isinstance(report, SupportReport)
    assert report.model == type(model).__name__
    assert report.path == path
    assert report.head
    *_, last = report.checks
    assert last.name == "same as recomputing every sequence in full"
    assert last.passed, report
    refused = [check for check in report.checks if not check.passed]
    assert [check.name for check in refused] == ([] if path == "shared_prefix" else ["shared_prefix"])
    assert all(check.detail in report.reason for check in refused)


def test_prints_well():
    lines = str(support(build("bloom"))).splitlines()
    assert lines[0].startswith(
        "BloomForCausalLM: reorder (cache expanded and selected through reorder_cache; not shared_"
    )
    assert lines[1].startswith("  [no] shared_prefix: ")
    assert lines[2].startswith("  [ok] reorder: ")
    assert lines[-1].startswith("  [ok] same as recomputing every sequence in full: largest difference of logits")


def test_model_without_a_cache_takes_the_slow_path_by_name():
    config = transformers.RwkvConfig(
        vocab_size=98,
        hidden_size=32,
        num_hidden_layers=2,
        attention_hidden_size=32,
        context_length=64,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.RwkvForCausalLM(config).eval()
    report = support(model, {"input_ids": prompt(1)})
    assert report.path == "uncached"
    assert "every candidate recomputes its whole sequence" in report.reason
    assert [check.name for check in report.checks if not check.passed] == ["shared_prefix", "reorder"]
    # transformers' own steps over its state go wrong with two rows: there is nothing to agree with.
    assert support(model).path == "none"
    with pytest.raises(ValueError, match="differ from those of transformers' own step"):
        decode(model, {"input_ids": prompt(2)})


def test_inputs_of_the_callers_own():
    inputs = left_padded(9, 4, 6)
    assert support(build("llama"), inputs).path == "shared_prefix"
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert support(build("llama"), {"inputs_embeds": torch.randn(1, 5, 32)}, top_k=5).path == "shared_prefix"


def test_speech():
    config = transformers.WhisperConfig(
        vocab_size=98,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=20,
        max_target_positions=32,
        decoder_start_token_id=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(0)
    report = support(transformers.WhisperForConditionalGeneration(config).eval())
    assert report.path == "shared_prefix"
    assert report.checks[-1].passed, report


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_images(name):
    """Recomputing has to hand every candidate its own images, which these models find by the ids of the prompt."""
    case = zoo.CASES["padded"]
    suppressed = zoo.options_for(zoo.ARCHITECTURES[name], case)["suppress_tokens"]
    report = support(zoo.build(name), {**zoo.prompt_for(name, case, 0), "suppress_tokens": suppressed})
    assert report.path == "shared_prefix"
    assert all(check.passed for check in report.checks), report


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_images_on_every_path(name, rows):
    """`generate` hands on features of images that models expand in place: nobody's but a copy's may be."""
    case, model = zoo.CASES["padded"], zoo.build(name)
    given = zoo.prompt_for(name, case, 0)
    patches = len(given["pixel_values"]) // len(given["input_ids"])
    inputs = {key: value[: rows * (patches if key == "pixel_values" else 1)] for key, value in given.items()}
    suppressed = zoo.options_for(zoo.ARCHITECTURES[name], case)["suppress_tokens"]
    first = decode(model, inputs, suppress_tokens=suppressed)
    for path in ("shared_prefix", "reorder", "uncached"):
        assert torch.equal(decode(model, inputs, path=path, suppress_tokens=suppressed), first), path


def test_inputs_it_cannot_make_up_are_asked_for():
    model = build("llama")
    model.main_input_name = "pixel_values"
    report = support(model)
    assert report.path == "none"
    assert "LlamaForCausalLM wants 'pixel_values': pass inputs=" in report.reason


def test_generation_settings_of_a_checkpoint_do_not_matter():
    model = build("bart")
    model.generation_config.update(
        num_beams=4, early_stopping=True, no_repeat_ngram_size=3, max_length=142, min_length=56
    )
    assert support(model).path == "shared_prefix"
    model = build("llama")
    model.generation_config.update(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=20, use_cache=False, eos_token_id=2
    )
    assert support(model).path == "shared_prefix"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precisions(dtype):
    report = support(build("llama").to(dtype))
    assert report.path == "shared_prefix"
    assert report.checks[-1].passed, report


def test_is_found_out_once_a_setting():
    model, inputs = build("llama"), {"input_ids": prompt(1)}
    assert recall(model) is None
    decode(model, inputs)
    report = recall(model)
    assert report.path == "shared_prefix"
    decode(model, inputs)
    assert recall(model) is report
    model.set_attn_implementation("eager")
    assert recall(model) is None
    decode(model, inputs)
    assert recall(model).path == "shared_prefix"
    model.double()
    assert recall(model) is None


def test_a_path_that_was_asked_for_teaches_nothing():
    model = build("llama")
    decode(model, {"input_ids": prompt(1)}, path="uncached")
    assert recall(model) is None


# ---- sabotage: a path that goes wrong is not taken -----------------------------------------------------------------


def without(monkeypatch, name):
    """Have our attention ignore one of its arguments."""
    neutral = 0 if name == "window_start" else None

    def change(function):
        @functools.wraps(function)
        def attend(*args, **kwargs):
            assert name in kwargs
            return function(*args, **kwargs | {name: neutral})

        return attend

    for function in (attention.shared_prefix_attention, attention.native_call):
        monkeypatch.setattr(attention, function.__name__, change(function))


@pytest.mark.parametrize(
    ("name", "argument"), [("llama", "mask"), ("mistral", "mask"), ("gemma2", "softcap"), ("t5", "bias")]
)
def test_attention_that_drops_an_argument_is_found_out(name, argument, monkeypatch):
    model = build(name)
    inputs = left_padded(3, 9) if name != "t5" else inputs_for(model, 2)
    truth = decode(model, inputs, path="uncached")
    without(monkeypatch, argument)
    same_tokens(decode(model, inputs), truth, model, inputs)
    assert recall(model).path == "reorder"
    assert "shared_prefix: hidden states differ from those of transformers' own step" in recall(model).reason


def test_cache_that_does_not_reorder_is_found_out(monkeypatch):
    model, inputs = build("bloom"), left_padded(9, 7)
    truth = decode(model, inputs, path="uncached")
    original = transformers.cache_utils.DynamicLayer.reorder_cache

    def reorder(self, beam_idx):
        wrong = beam_idx if len(beam_idx) > self.keys.shape[0] else torch.arange(len(beam_idx)) * 4 % self.keys.shape[0]
        original(self, wrong)

    monkeypatch.setattr(transformers.cache_utils.DynamicLayer, "reorder_cache", reorder)
    same_tokens(decode(model, inputs), truth, model, inputs)
    assert recall(model).path == "uncached"
    assert "reorder: hidden states differ from those of transformers' own step" in recall(model).reason


def test_attention_arguments_nobody_implements_are_refused_by_name():
    model, inputs = build("llama"), {"input_ids": prompt(2)}
    module = model.model.layers[1].self_attn
    module.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs | {"mystery": 1.0}), with_kwargs=True)
    same_tokens(decode(model, inputs), decode(shared("llama"), inputs), model, inputs)
    assert recall(model).path == "reorder"
    assert "LlamaAttention gives its attention arguments this path does not implement: mystery" in recall(model).reason


def test_keys_that_are_not_the_caches_are_refused():
    """A layer that changes its keys after the cache has handed them out must not be read from the cache."""
    from transformers.models.llama import modeling_llama

    class Louder(modeling_llama.LlamaAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs | {CACHE_NAME: Doubling(kwargs.get(CACHE_NAME))})

    class Doubling:
        def __init__(self, cache):
            self.cache = cache

        def update(self, keys, values, *args, **kwargs):
            pair = (keys, values) if self.cache is None else self.cache.update(keys, values, *args, **kwargs)
            return tuple(2 * x for x in pair)

    model, inputs = build("llama"), {"input_ids": prompt(2)}
    model.model.layers[0].self_attn.__class__ = Louder
    out = decode(model, inputs)
    assert recall(model).path == "reorder"
    assert "other than those its cache returned" in recall(model).reason
    assert not torch.equal(out, decode(shared("llama"), inputs))


def test_window_that_the_mask_does_not_have():
    """OLMoE hands its window to every attention and to its cache, but its masks have none. What ``generate`` means is
    a cache cut to the window, and that its whole sequence gives something else is said."""
    config = transformers.OlmoeConfig(
        vocab_size=98,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        eos_token_id=None,
        pad_token_id=0,
        sliding_window=4,
    )
    torch.manual_seed(0)
    model = transformers.OlmoeForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    decode(model, {"input_ids": prompt(1, 2)}, new_tokens=1)  # found fit where the window covers everything
    assert recall(model).path == "shared_prefix"
    inputs = left_padded(9, 7)
    assert torch.equal(decode(model, inputs), decode(model, inputs, path="reorder"))
    assert recall(model).path == "reorder"
    *_, last = recall(model).checks
    assert not last.passed
    assert "by transformers' own cached step" in last.detail
    with pytest.raises(ValueError, match=r"path='uncached': uncached: .* differ from those of transformers' own step"):
        decode(model, inputs, path="uncached")


def test_autocast():
    model, inputs = build("llama"), left_padded(9, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decode(model, inputs)
        assert recall(model).path == "shared_prefix"
    same_tokens(decode(model, inputs), decode(shared("llama"), inputs), model, inputs)
    assert recall(model).path == "shared_prefix"
