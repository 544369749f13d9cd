"""On a GPU the end of the text is looked for every few steps. The steps run past it must leave no trace.

Everything here runs on the CPU with the interval set by hand.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria

from simctg_fast import ContrastiveSearch
from simctg_fast.decoding.caches import CACHE_NAME

from ..decoding_models import build, decode, left_padded, prompt, shared
from .test_outputs import assert_same_cache, assert_same_structure, check_going_on
from .test_streaming import Recorder

module = importlib.import_module("simctg_fast.decoding.generate_loop")

ROUTES = [
    ("llama", "shared_prefix"),
    ("llama", "reorder"),
    ("llama", "uncached"),
    ("mistral", "shared_prefix"),
    ("mamba", "reorder"),
]
EVERYTHING = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
}


@pytest.fixture(params=[2, 5, 8])
def interval(request, monkeypatch):
    """A function that runs another with the end looked for every few steps."""

    def every_few_steps(function):
        with monkeypatch.context() as patch:
            patch.setattr(module, "stop_check_interval", lambda device: request.param)
            return function()

    return every_few_steps


def ends_of(model, inputs, *positions):
    """The tokens that contrastive search has at these positions, a row each."""
    plain = decode(model, inputs, new_tokens=20)
    return [plain[row, position].item() for row, position in enumerate(positions)]


def test_interval_of_a_device():
    assert module.stop_check_interval(torch.device("cpu")) == 1
    assert module.stop_check_interval(torch.device("cuda", 0)) == 8


@pytest.mark.parametrize(("name", "path"), ROUTES)
def test_outputs_are_those_of_looking_at_every_step(name, path, interval):
    model, inputs = shared(name), left_padded(9, 7)
    ends = ends_of(model, inputs, 11, 15)
    arguments = {"path": path, "new_tokens": 20, "eos_token_id": ends} | EVERYTHING
    expected = decode(model, inputs, **arguments)
    out = interval(lambda: decode(model, inputs, **arguments))
    assert 9 < expected.sequences.shape[1] < 20
    assert torch.equal(out.sequences, expected.sequences)
    for key in ("scores", "logits", "hidden_states"):
        assert_same_structure(out[key], expected[key])
    if path == "uncached":
        assert getattr(out, CACHE_NAME) is None
        return
    if name != "mamba":
        assert_same_cache(getattr(out, CACHE_NAME), getattr(expected, CACHE_NAME))
    last = int(out.sequences[1, -1] in ends)
    check_going_on(model, inputs, out.sequences, getattr(out, CACHE_NAME), row=last)


@pytest.mark.parametrize("new_tokens", [1, 2, 7, 16, 17])
def test_length_limits(new_tokens, interval):
    model, inputs = shared("llama"), left_padded(9, 7)
    expected = decode(model, inputs, new_tokens=new_tokens)
    out = interval(lambda: decode(model, inputs, new_tokens=new_tokens, return_dict_in_generate=True))
    assert torch.equal(out.sequences, expected)
    assert getattr(out, CACHE_NAME).get_seq_length() == 8 + new_tokens


def test_callers_cache(interval):
    model, inputs = shared("llama"), {"input_ids": prompt(1)}
    (end,) = ends_of(model, inputs, 11)
    cache = DynamicCache(config=model.config)
    out = interval(lambda: decode(model, inputs, eos_token_id=end, **{CACHE_NAME: cache}))
    assert out[0, -1] == end
    assert cache.get_seq_length() == out.shape[1] - 1


def test_random_choices(interval):
    model, inputs = shared("llama"), left_padded(9, 7)

    def run():
        generator = torch.Generator().manual_seed(3)
        strategy = ContrastiveSearch(temperature=0.2, generator=generator)
        return model.generate(**inputs, custom_generate=strategy, max_new_tokens=20, eos_token_id=list(range(3, 20)))

    expected = run()
    assert expected.shape[1] < 29
    assert torch.equal(interval(run), expected)


class Flags(StoppingCriteria):
    def __init__(self, *lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.lengths


@pytest.mark.parametrize("eos", [None, 96])
def test_criteria(eos, interval):
    model, inputs = shared("llama"), left_padded(9, 7)
    arguments = {"new_tokens": 20, "stopping_criteria": [Flags(12, 15)], "eos_token_id": eos}
    expected = decode(model, inputs, **arguments)
    assert expected.shape[1] == 15
    assert torch.equal(interval(lambda: decode(model, inputs, **arguments)), expected)


class NanFrom(LogitsProcessor):
    """Makes every logit NaN once the text has a certain length."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        return scores * float("nan") if input_ids.shape[1] >= self.length else scores


def test_nan_after_the_end_does_not_matter(interval):
    model, inputs = shared("llama"), {"input_ids": prompt(1)}
    (end,) = ends_of(model, inputs, 11)
    expected = decode(model, inputs, eos_token_id=end)
    arguments = {"eos_token_id": end, "logits_processor": [NanFrom(expected.shape[1])], "new_tokens": 20}
    assert torch.equal(interval(lambda: decode(model, inputs, **arguments)), expected)


def test_nan_before_the_end_is_reported(interval):
    model, inputs = shared("llama"), left_padded(9, 7)
    with pytest.raises(ValueError, match="NaN, or every token banned"):
        interval(lambda: decode(model, inputs, logits_processor=[NanFrom(11)], new_tokens=20))


def test_nan_that_hides_behind_the_end_is_reported(interval):
    """A row of NaN chooses some token, and that may be one that ends it."""
    arguments = {"logits_processor": [NanFrom(9)], "eos_token_id": list(range(98)), "new_tokens": 20}
    with pytest.raises(ValueError, match="NaN, or every token banned"):
        interval(lambda: decode(shared("llama"), {"input_ids": prompt(1)}, **arguments))


def test_streamers_see_no_token_too_many(interval):
    model, inputs = shared("llama"), {"input_ids": prompt(1)}
    (end,) = ends_of(model, inputs, 11)
    recorder = Recorder()
    strategy = ContrastiveSearch(0.6, 4, streamer=recorder)
    out = interval(lambda: model.generate(**inputs, custom_generate=strategy, max_new_tokens=20, eos_token_id=end))
    assert torch.equal(torch.cat(recorder.chunks[1:]), out[0, 9:])


@pytest.mark.parametrize("by", ["ids", "embeddings"])
def test_table_of_positions_is_not_left(by, interval):
    """A text that ends just before the last position: the surplus steps have none left."""
    model, inputs = build("gpt2", n_positions=16), {"input_ids": prompt(1)}
    plain = decode(model, inputs, new_tokens=7)
    if by == "embeddings":
        inputs = {"inputs_embeds": model.get_input_embeddings()(prompt(1)).detach()}
    for position in (13, 14, 15):
        end = plain[0, position].item()
        expected = decode(model, {"input_ids": prompt(1)}, new_tokens=7, eos_token_id=end)
        out = interval(lambda end=end: decode(model, inputs, new_tokens=40, eos_token_id=end))
        assert torch.equal(out, expected if by == "ids" else expected[:, 9:])
