"""`patch_transformers`: contrastive search as it was spelled in transformers 4."""

from __future__ import annotations

import logging
import re
import threading

import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer, pipeline
from transformers.generation.utils import GenerationMixin

from simctg_fast import ContrastiveSearch, contrastive_search, patch_transformers, unpatch_transformers
from simctg_fast.decoding.caches import CACHE_NAME

from ..decoding_models import build, decode, greedy, inputs_for, left_padded, prompt, shared, tokenizer

ORIGINAL = GenerationMixin.generate


@pytest.fixture
def patched():
    with patch_transformers():
        yield
    assert GenerationMixin.generate is ORIGINAL


def generate(inputs, name="llama", **kwargs):
    return shared(name).generate(**inputs, **({"max_new_tokens": 12} | kwargs))


# ---- putting it in place and taking it away ------------------------------------------------------------------------


def test_without_the_patch_the_old_spelling_is_refused():
    with pytest.raises(ValueError, match="trust_remote_code"):
        generate({"input_ids": prompt(1)}, penalty_alpha=0.6, top_k=4)


def test_patch_and_unpatch():
    patch_transformers()
    try:
        assert GenerationMixin.generate is not ORIGINAL
        first = GenerationMixin.generate
        patch_transformers()
        assert GenerationMixin.generate is first
    finally:
        unpatch_transformers()
    assert GenerationMixin.generate is ORIGINAL
    unpatch_transformers()
    assert GenerationMixin.generate is ORIGINAL


def test_context_manager():
    with patch_transformers():
        assert GenerationMixin.generate is not ORIGINAL
    assert GenerationMixin.generate is ORIGINAL
    with pytest.raises(ZeroDivisionError), patch_transformers():
        raise ZeroDivisionError
    assert GenerationMixin.generate is ORIGINAL


def test_inner_block_leaves_the_outer_patch():
    with patch_transformers():
        with patch_transformers():
            pass
        assert GenerationMixin.generate is not ORIGINAL
    assert GenerationMixin.generate is ORIGINAL


def test_signature_and_documentation_stay(patched):
    assert GenerationMixin.generate.__doc__ == ORIGINAL.__doc__
    assert GenerationMixin.generate.__name__ == "generate"


# ---- the old spelling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
def test_old_spelling(patched, name):
    inputs = inputs_for(shared(name), 2)
    out = generate(inputs, name, penalty_alpha=0.6, top_k=4)
    assert torch.equal(out, decode(shared(name), inputs))
    assert torch.equal(generate(inputs, name, penalty_alpha=0.6, top_k=4, trust_remote_code=True), out)
    assert torch.equal(generate(inputs, name, penalty_alpha=0.6, top_k=4, low_memory=True), out)


def test_old_spelling_in_a_generation_config(patched):
    inputs = left_padded(9, 7)
    config = GenerationConfig(penalty_alpha=0.3, top_k=7, max_new_tokens=12, pad_token_id=0)
    expected = decode(shared("llama"), inputs, penalty_alpha=0.3, top_k=7)
    assert torch.equal(shared("llama").generate(**inputs, generation_config=config), expected)
    assert torch.equal(shared("llama").generate(inputs["input_ids"][:1], config), expected[:1])
    assert config.penalty_alpha == 0.3
    assert config.top_k == 7


def test_old_spelling_in_the_models_generation_config(patched):
    model, inputs = build("llama"), left_padded(9, 7)
    model.generation_config.penalty_alpha, model.generation_config.top_k = 0.3, 7
    expected = decode(shared("llama"), inputs, penalty_alpha=0.3, top_k=7)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12), expected)
    assert model.generation_config.penalty_alpha == 0.3


def test_a_top_k_of_fifty_counts_where_it_is_typed(patched):
    inputs = left_padded(9, 7)
    typed = generate(inputs, penalty_alpha=0.6, top_k=50)
    assert torch.equal(typed, decode(shared("llama"), inputs, top_k=50))
    assert torch.equal(generate(inputs, penalty_alpha=0.6), decode(shared("llama"), inputs))
    assert not torch.equal(typed, generate(inputs, penalty_alpha=0.6))


@pytest.mark.parametrize(
    "arguments", [{}, {"penalty_alpha": 0.0, "top_k": 4}, {"penalty_alpha": 0.6, "top_k": 1}, {"top_k": 4}], ids=str
)
def test_everything_else_passes_through(patched, arguments):
    inputs = left_padded(9, 7)
    assert torch.equal(generate(inputs, **arguments), greedy(shared("llama"), inputs))


def test_beam_search_passes_through(patched):
    inputs = left_padded(9, 7)
    expected = ORIGINAL(shared("llama"), **inputs, num_beams=3, max_new_tokens=12)
    assert torch.equal(generate(inputs, num_beams=3), expected)


# ---- settings that would run another mode --------------------------------------------------------------------------

OTHER_MODES = {
    "num_beams": (4, "num_beams must be 1 for contrastive search, got 4"),
    "num_beam_groups": (2, "num_beam_groups must be 1 for contrastive search, got 2"),
    "constraints": (["a constraint"], "constraints must be None for contrastive search, got ['a constraint']"),
    "force_words_ids": ([[5]], "force_words_ids must be None for contrastive search, got [[5]]"),
    "prompt_lookup_num_tokens": (3, "prompt_lookup_num_tokens must be None for contrastive search, got 3"),
    "assistant_early_exit": (1, "assistant_early_exit must be None for contrastive search, got 1"),
    "use_mtp": (True, "use_mtp must be None for contrastive search, got True"),
    "dola_layers": ("low", "dola_layers must be None for contrastive search, got 'low'"),
}


@pytest.mark.parametrize("name", OTHER_MODES)
def test_another_mode_beside_penalty_alpha_is_refused(patched, name):
    value, message = OTHER_MODES[name]
    inputs = {"input_ids": prompt(1)}
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        generate(inputs, penalty_alpha=0.6, top_k=4, **{name: value})
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        generate(inputs, generation_config=GenerationConfig(penalty_alpha=0.6, top_k=4, **{name: value}))
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        generate(inputs, custom_generate=ContrastiveSearch(0.6, 4), **{name: value})


@pytest.mark.parametrize("name", OTHER_MODES)
@pytest.mark.parametrize("typed", [True, False])
def test_another_mode_in_the_checkpoint_is_refused(patched, name, typed):
    model, (value, message) = build("llama"), OTHER_MODES[name]
    setattr(model.generation_config, name, value)
    asked = {"penalty_alpha": 0.6, "top_k": 4}
    if not typed:
        model.generation_config.penalty_alpha, model.generation_config.top_k = 0.6, 4
    allowed = message.partition("must be ")[2].partition(" ")[0]
    source = f" (from the model's generation_config: pass {name}={allowed})"
    with pytest.raises(ValueError, match=re.escape(message + source)):
        model.generate(prompt(1), max_new_tokens=4, **asked if typed else {})


@pytest.mark.parametrize("name", ["num_beams", "prompt_lookup_num_tokens", "dola_layers"])
def test_a_call_undoes_the_checkpoints_mode(patched, name):
    model = build("llama")
    setattr(model.generation_config, name, OTHER_MODES[name][0])
    undo = {name: 1 if name == "num_beams" else None}
    out = model.generate(prompt(1), penalty_alpha=0.6, top_k=4, max_new_tokens=12, **undo)
    assert torch.equal(out, decode(shared("llama"), {"input_ids": prompt(1)}))


def test_an_assistant_beside_penalty_alpha_is_refused(patched):
    message = "assistant_model must be None for contrastive search, got LlamaForCausalLM"
    for spelling in SPELLINGS.values():
        with pytest.raises(ValueError, match=message):
            generate({"input_ids": prompt(1)}, **spelling, assistant_model=shared("llama"))


WISHES = [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}, {"penalty_alpha": None}]


# A configuration cannot say None.
@pytest.mark.parametrize(
    ("wish", "as_config"), [*((wish, False) for wish in WISHES), *((wish, True) for wish in WISHES[:-1])], ids=str
)
def test_the_calls_wish_wins_over_the_checkpoints_penalty_alpha(patched, wish, as_config, caplog):
    model = build("llama")
    model.generation_config.penalty_alpha, model.generation_config.top_k = 0.6, 4
    plain = build("llama")
    plain.generation_config.top_k = 4
    arguments = {"generation_config": GenerationConfig(**wish, max_new_tokens=12)} if as_config else wish
    length = {} if as_config else {"max_new_tokens": 12}
    torch.manual_seed(3)
    out = model.generate(prompt(1), **arguments, **length)
    torch.manual_seed(3)
    assert torch.equal(out, ORIGINAL(plain, prompt(1), **wish, max_new_tokens=12))
    assert not [record for record in caplog.records if record.name == "simctg_fast"]
    assert model.generation_config.penalty_alpha == 0.6


def test_a_top_k_of_zero_is_refused(patched):
    """It once meant "all" to sampling, and here it silently meant greedy search."""
    with pytest.raises(ValueError, match="top_k must be an integer of at least 1, got 0"):
        generate({"input_ids": prompt(1)}, penalty_alpha=0.6, top_k=0)


def test_a_callable_of_somebody_else_passes_through(patched):
    assert generate({"input_ids": prompt(1)}, custom_generate=lambda model, input_ids, **_: input_ids + 1)[0, 0] == (
        prompt(1)[0, 0] + 1
    )


@pytest.mark.parametrize("value", [-0.5, 1.5])
def test_penalty_alpha_outside_its_range(patched, value):
    with pytest.raises(ValueError, match=rf"penalty_alpha must be a number in \[0, 1\], got {value}"):
        generate({"input_ids": prompt(1)}, penalty_alpha=value, top_k=4)


def test_sampling_wins_over_the_old_spelling_and_says_so(patched, caplog):
    inputs = left_padded(9, 7)
    with caplog.at_level(logging.WARNING, "simctg_fast"):
        torch.manual_seed(5)
        out = generate(inputs, penalty_alpha=0.6, top_k=4, do_sample=True)
    assert "penalty_alpha=0.6 is ignored: do_sample=True samples" in caplog.text
    torch.manual_seed(5)
    assert torch.equal(out, ORIGINAL(shared("llama"), **inputs, top_k=4, do_sample=True, max_new_tokens=12))


def test_sampling_does_not_stop_a_strategy_that_was_named(patched, caplog):
    inputs = left_padded(9, 7)
    with caplog.at_level(logging.WARNING, "simctg_fast"):
        out = generate(inputs, custom_generate=contrastive_search, do_sample=True, temperature=0.7)
    assert torch.equal(out, decode(shared("llama"), inputs))
    assert "is ignored" not in caplog.text


def test_pipeline_by_the_old_spelling(patched):
    pipe = pipeline("text-generation", model=build("llama"), tokenizer=tokenizer())
    arguments = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 12, "do_sample": False}
    expected = pipe("Contrast", custom_generate=ContrastiveSearch(0.6, 4), max_new_tokens=12, do_sample=False)
    assert pipe("Contrast", **arguments) == expected


# ---- the settings of a strategy ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "given", "expected"),
    [
        (contrastive_search, {}, (0.6, 4)),
        (contrastive_search, {"penalty_alpha": 0.3, "top_k": 7}, (0.3, 7)),
        (ContrastiveSearch(), {"penalty_alpha": 0.3, "top_k": 7}, (0.3, 7)),
        (ContrastiveSearch(0.9), {"penalty_alpha": 0.3, "top_k": 7}, (0.9, 7)),
        (ContrastiveSearch(0.9, 3), {"penalty_alpha": 0.3, "top_k": 7}, (0.9, 3)),
        (contrastive_search, {"penalty_alpha": 0.0, "top_k": 4}, (0.0, 4)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # an address would differ between workers
)
def test_settings_are_those_of_the_unpatched_call(strategy, given, expected):
    inputs = left_padded(9, 7)
    truth = decode(shared("llama"), inputs, penalty_alpha=expected[0], top_k=expected[1])
    assert torch.equal(generate(inputs, custom_generate=strategy, **given), truth)
    with patch_transformers():
        assert torch.equal(generate(inputs, custom_generate=strategy, **given), truth)


@pytest.mark.parametrize("given", [{"top_k": 0}, {"top_k": -1}, {"penalty_alpha": 2.0}], ids=str)
def test_refusals_are_those_of_the_unpatched_call(given):
    inputs = {"input_ids": prompt(1)}
    with pytest.raises(ValueError, match="must be") as unpatched:
        generate(inputs, custom_generate=contrastive_search, **given)
    with patch_transformers(), pytest.raises(ValueError, match="must be") as patched:
        generate(inputs, custom_generate=contrastive_search, **given)
    assert str(patched.value) == str(unpatched.value)


def test_strategy_of_the_caller_is_not_written_to(patched):
    strategy = ContrastiveSearch(0.9, 3)
    before = vars(strategy).copy()
    generate({"input_ids": prompt(1)}, custom_generate=strategy, stop_strings="~", tokenizer=tokenizer())
    assert vars(strategy) == before


# ---- streamer, tokenizer and stop strings arrive -------------------------------------------------------------------

SPELLINGS = {
    "old": {"penalty_alpha": 0.6, "top_k": 4},
    "function": {"custom_generate": contrastive_search},
    "class": {"custom_generate": ContrastiveSearch(0.6, 4)},
}


@pytest.mark.parametrize("skip_prompt", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_streamer_arrives(patched, spelling, skip_prompt, capsys):
    inputs = {"input_ids": prompt(1)}
    out = generate(inputs, **SPELLINGS[spelling], streamer=TextStreamer(tokenizer(), skip_prompt=skip_prompt))
    expected = decode(shared("llama"), inputs)
    assert torch.equal(out, expected)
    assert capsys.readouterr().out == tokenizer().decode(expected[0, 9 if skip_prompt else 0 :]) + "\n"


def test_iterator_ends(patched):
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=1200)
    arguments = SPELLINGS["old"] | {"streamer": streamer}
    thread = threading.Thread(target=lambda: generate({"input_ids": prompt(1)}, **arguments))
    thread.start()
    text = "".join(streamer)
    thread.join(timeout=1200)
    assert text == tokenizer().decode(decode(shared("llama"), {"input_ids": prompt(1)})[0, 9:])


def text_of(out):
    return tokenizer().decode(out[0, 9:])


@pytest.fixture
def words():
    """The text contrastive search writes, and two strings that occur in it, the second after the first."""
    text = text_of(decode(shared("llama"), {"input_ids": prompt(1)}))
    early, late = text[2:4], text[6:8]
    assert text.index(early) == 2
    assert text.index(late) == 6
    return text, early, late


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_stop_strings_arrive(patched, spelling, words):
    text, early, _ = words
    inputs = {"input_ids": prompt(1)}
    arguments = SPELLINGS[spelling] | {"tokenizer": tokenizer()}
    assert text_of(generate(inputs, **arguments, stop_strings=early)) == text[:4]
    assert text_of(generate(inputs, **arguments, stop_strings=[early, "?!?!"])) == text[:4]
    assert text_of(generate(inputs, **arguments)) == text
    config = GenerationConfig(stop_strings=early, max_new_tokens=12, pad_token_id=0)
    out = shared("llama").generate(**inputs, **arguments, generation_config=config)
    assert text_of(out) == text[:4]
    assert config.stop_strings == early


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_stop_sequence_of_a_pipeline(patched, spelling):
    pipe = pipeline("text-generation", model=build("llama"), tokenizer=tokenizer())
    arguments = SPELLINGS[spelling] | {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    text = pipe("Contrast", **arguments)[0]["generated_text"]
    assert text.index(text[3]) == 3
    assert len(text) > 4
    assert pipe("Contrast", **arguments, stop_sequence=text[3])[0]["generated_text"] == text[:4]
    if CACHE_NAME == "cache":  # before transformers 5.24 a pipeline stopped at the first of several tokens
        assert text.index(text[2:4]) == 2
        assert pipe("Contrast", **arguments, stop_sequence=text[2:4])[0]["generated_text"] == text[:4]


@pytest.mark.parametrize("strategy", [ContrastiveSearch(0.6, 4), contrastive_search], ids=["class", "function"])
def test_stop_sequence_of_a_pipeline_without_the_patch(strategy):
    pipe = pipeline("text-generation", model=build("llama"), tokenizer=tokenizer())
    arguments = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False, "custom_generate": strategy}
    text = pipe("Contrast", **arguments)[0]["generated_text"]
    assert len(text) > 4
    assert pipe("Contrast", **arguments, stop_sequence=text[3])[0]["generated_text"] == text[:4]
    if CACHE_NAME == "cache":
        assert pipe("Contrast", **arguments, stop_sequence=text[2:4])[0]["generated_text"] == text[:4]
    both = arguments | {"custom_generate": ContrastiveSearch(0.6, 4, tokenizer=tokenizer(), stop_strings=text[4:6])}
    assert pipe("Contrast", **both)[0]["generated_text"] == text[:6]
    assert pipe("Contrast", **both, stop_sequence=text[3])[0]["generated_text"] == text[:4]


@pytest.mark.parametrize("strategy", [ContrastiveSearch(0.6, 4), contrastive_search], ids=["class", "function"])
def test_streamer_arrives_without_the_patch(strategy, capsys):
    inputs = {"input_ids": prompt(1)}
    out = generate(inputs, custom_generate=strategy, streamer=TextStreamer(tokenizer(), skip_prompt=True))
    assert capsys.readouterr().out == text_of(out) + "\n"


def test_of_two_streamers_both_end():
    class Recorder(list):
        def put(self, value):
            self.append(value)

        def end(self):
            self.append("end")

    own, given = Recorder(), Recorder()
    generate({"input_ids": prompt(1)}, custom_generate=ContrastiveSearch(0.6, 4, streamer=own), streamer=given)
    assert len(own) == 14
    assert own[-1] == given[-1] == "end"
    assert len(given) == 2


def test_other_callables_get_what_they_got():
    """What is kept is kept for contrastive search alone."""

    def other(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        assert not {"tokenizer", "streamer"} & set(kwargs)
        return input_ids

    build("llama").generate(prompt(1), custom_generate=other, tokenizer=tokenizer(), streamer=TextStreamer(tokenizer()))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_stop_strings_of_the_models_generation_config(patched, spelling, words):
    text, early, _ = words
    model = build("llama")
    model.generation_config.stop_strings = early
    arguments = SPELLINGS[spelling] | {"tokenizer": tokenizer(), "max_new_tokens": 12}
    assert text_of(model.generate(prompt(1), **arguments)) == text[:4]
    assert model.generation_config.stop_strings == early


def test_stop_strings_of_the_strategy_and_of_the_call(patched, words):
    """The strategy's tokenizer serves both, and the first of them ends the text."""
    text, early, late = words
    inputs = {"input_ids": prompt(1)}
    carrying = ContrastiveSearch(0.6, 4, tokenizer=tokenizer())
    assert text_of(generate(inputs, custom_generate=carrying, stop_strings=early)) == text[:4]
    both = ContrastiveSearch(0.6, 4, tokenizer=tokenizer(), stop_strings=late)
    assert text_of(generate(inputs, custom_generate=both)) == text[:8]
    assert text_of(generate(inputs, custom_generate=both, stop_strings=early)) == text[:4]


def test_stop_strings_without_a_tokenizer(patched):
    with pytest.raises(ValueError, match="pass the model's tokenizer to the `tokenizer` argument"):
        generate({"input_ids": prompt(1)}, **SPELLINGS["old"], stop_strings="x")
