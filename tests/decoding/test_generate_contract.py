"""Everything else `generate` promises: arguments and defaults, logits processors, stopping criteria, pipelines."""

from __future__ import annotations

import logging
import time

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    WatermarkingConfig,
    pipeline,
)

from simctg_fast import ContrastiveSearch, contrastive_search
from simctg_fast.reference.contrastive_search import contrastive_search as by_definition

from ..decoding_models import VOCABULARY, build, decode, greedy, inputs_for, left_padded, prompt, shared, tokenizer
from ..near_ties import same_tokens


def generate(model, inputs, custom_generate=contrastive_search, **kwargs):
    return model.generate(**inputs, custom_generate=custom_generate, **({"max_new_tokens": 12} | kwargs))


# ---- which settings count ------------------------------------------------------------------------------------------


def truth(model, inputs, penalty_alpha, top_k):
    return by_definition(model, **inputs, penalty_alpha=penalty_alpha, top_k=top_k, max_new_tokens=12).sequences


@pytest.mark.parametrize(
    ("made_with", "given", "expected"),
    [
        ({}, {}, (0.6, 4)),
        ({}, {"penalty_alpha": 0.3, "top_k": 7}, (0.3, 7)),
        ({"penalty_alpha": 0.9, "top_k": 3}, {}, (0.9, 3)),
        ({"penalty_alpha": 0.9, "top_k": 3}, {"penalty_alpha": 0.3, "top_k": 7}, (0.9, 3)),
        ({"penalty_alpha": 0.9}, {"penalty_alpha": 0.3, "top_k": 7}, (0.9, 7)),
        ({"top_k": 3}, {"penalty_alpha": 0.3}, (0.3, 3)),
        ({}, {"top_k": 50}, (0.6, 4)),
        ({"top_k": 50}, {}, (0.6, 50)),
        ({}, {"penalty_alpha": 0.0}, (0.0, 4)),
        ({}, {"generation_config": GenerationConfig(penalty_alpha=0.3, top_k=7, max_new_tokens=12)}, (0.3, 7)),
    ],
)
def test_settings(made_with, given, expected):
    model, inputs = shared("llama"), left_padded(9, 7)
    given = given if "generation_config" in given else given | {"max_new_tokens": 12}
    out = model.generate(**inputs, custom_generate=ContrastiveSearch(**made_with), pad_token_id=0, **given)
    same_tokens(out, truth(model, inputs, *expected), model, inputs, penalty_alpha=expected[0], top_k=expected[1])


def test_settings_that_differ_give_different_texts():
    """What the comparison above stands on."""
    model, inputs = shared("llama"), left_padded(9, 7)
    settings = [(0.6, 4), (0.3, 7), (0.9, 3), (0.9, 7), (0.3, 3), (0.6, 50), (0.0, 4)]
    assert len({str(truth(model, inputs, *each)) for each in settings}) == len(settings)


def test_settings_of_the_models_generation_config():
    model, inputs = build("llama"), left_padded(9, 7)
    model.generation_config.penalty_alpha, model.generation_config.top_k = 0.3, 7
    same_tokens(generate(model, inputs), truth(model, inputs, 0.3, 7), model, inputs, penalty_alpha=0.3, top_k=7)


def test_a_checkpoints_top_k_for_sampling_was_not_typed_for_this():
    model, inputs = build("llama"), left_padded(9, 7)
    model.generation_config.update(do_sample=True, top_k=20, temperature=0.7)
    same_tokens(generate(model, inputs), truth(model, inputs, 0.6, 4), model, inputs)
    same_tokens(generate(model, inputs, top_k=7), truth(model, inputs, 0.6, 7), model, inputs, top_k=7)
    same_tokens(
        generate(model, inputs, ContrastiveSearch(top_k=20)), truth(model, inputs, 0.6, 20), model, inputs, top_k=20
    )


def test_function_and_class_agree():
    model, inputs = shared("llama"), left_padded(9, 7)
    assert torch.equal(generate(model, inputs), generate(model, inputs, ContrastiveSearch()))


def test_strategy_can_be_used_again():
    strategy, inputs = ContrastiveSearch(0.3, 5), left_padded(9, 7)
    before = vars(strategy).copy()
    first = generate(shared("llama"), inputs, strategy)
    generate(shared("bloom"), inputs, strategy)
    assert torch.equal(generate(shared("llama"), inputs, strategy), first)
    assert vars(strategy) == before


def test_strategy_shows_its_settings():
    assert repr(ContrastiveSearch(0.6, 4)) == "ContrastiveSearch(penalty_alpha=0.6, top_k=4)"
    assert repr(ContrastiveSearch(temperature=0.5)) == "ContrastiveSearch(temperature=0.5)"


def test_several_sequences_need_sampling():
    with pytest.raises(ValueError, match="num_return_sequences"):
        generate(shared("llama"), {"input_ids": prompt(1)}, num_return_sequences=3)


# ---- sampling settings ---------------------------------------------------------------------------------------------


def warnings_of(caplog, text):
    return [record for record in caplog.records if record.name == "simctg_fast" and text in record.getMessage()]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.3},
        {"temperature": 1.7, "top_k": 50, "top_p": 0.8},
        {"top_p": 0.5, "min_p": 0.2, "typical_p": 0.6},
        {"epsilon_cutoff": 0.02, "eta_cutoff": 0.02},
        {"top_h": 0.4},
    ],
    ids=str,
)
def test_sampling_warpers_are_removed_with_one_warning(settings, caplog):
    model, inputs = shared("llama"), left_padded(9, 7)
    with caplog.at_level(logging.WARNING, "simctg_fast"):
        out = generate(model, inputs, do_sample=True, **settings)
    assert torch.equal(out, decode(model, inputs))
    (record,) = warnings_of(caplog, "sampling settings of do_sample=True")
    for name in settings:
        assert f"{name}=" in record.getMessage()


def test_without_sampling_there_is_no_warning(caplog):
    with caplog.at_level(logging.WARNING, "simctg_fast"):
        generate(shared("llama"), left_padded(9, 7), do_sample=False)
    assert not caplog.records


def test_warpers_of_the_callers_own_stay():
    model, inputs = shared("llama"), left_padded(9, 7)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(3.0), TopKLogitsWarper(2)])
    out = generate(model, inputs, do_sample=True, temperature=0.7, logits_processor=LogitsProcessorList(warpers))
    arguments = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 12}
    ours = by_definition(model, **inputs, **arguments, logits_processor=warpers).sequences
    # In the definition a candidate of probability 0 may win; here it cannot, so top-k 2 leaves two candidates.
    arguments["top_k"] = 2
    narrowed = by_definition(model, **inputs, **arguments, logits_processor=warpers).sequences
    same_tokens(out, narrowed, model, inputs, top_k=2, logits_processor=warpers)
    assert not torch.equal(out, decode(model, inputs))
    assert ours.shape == narrowed.shape


def test_equal_texts_are_announced(caplog):
    model, inputs = shared("llama"), {"input_ids": prompt(1)}
    with caplog.at_level(logging.WARNING, "simctg_fast"):
        out = generate(model, inputs, do_sample=True, num_return_sequences=3)
    assert warnings_of(caplog, "num_return_sequences=3 gives equal texts")
    assert torch.equal(out, decode(model, inputs).expand(3, -1))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "simctg_fast"):
        generate(model, inputs, ContrastiveSearch(temperature=0.3), do_sample=True, num_return_sequences=3)
    assert not warnings_of(caplog, "equal texts")


# ---- pipelines -----------------------------------------------------------------------------------------------------

TEXT = "Contrast"


def text_pipeline(**generation_settings):
    model = build("llama")
    model.generation_config.update(**generation_settings)
    return pipeline("text-generation", model=model, tokenizer=tokenizer())


def test_pipeline_that_samples_by_default(caplog):
    pipe = text_pipeline(do_sample=True, temperature=0.7)
    expected = decode(shared("llama"), tokenizer()(TEXT, return_tensors="pt", return_token_type_ids=False))
    with caplog.at_level(logging.WARNING, "simctg_fast"):
        out = pipe(TEXT, custom_generate=ContrastiveSearch(0.6, 4), max_new_tokens=12)
    assert out[0]["generated_text"] == tokenizer().decode(expected[0], skip_special_tokens=True)
    assert not warnings_of(caplog, "sampling settings")  # nobody typed them


def test_a_warning_of_what_somebody_typed_and_of_nothing_else(caplog):
    """A random choice that was asked for is one: only what it leaves out is worth a word."""
    with caplog.at_level(logging.WARNING, "simctg_fast"):
        generate(shared("llama"), {"input_ids": prompt(1)}, ContrastiveSearch(temperature=0.3), do_sample=True)
        pipe = text_pipeline()
        pipe(TEXT, custom_generate=ContrastiveSearch(0.6, 4), max_new_tokens=3)
        pipe(TEXT, custom_generate=ContrastiveSearch(0.6, 4, temperature=0.5), max_new_tokens=3)
    assert not warnings_of(caplog, "sampling settings")
    with caplog.at_level(logging.WARNING, "simctg_fast"):
        strategy = ContrastiveSearch(temperature=0.3)
        generate(shared("llama"), {"input_ids": prompt(1)}, strategy, do_sample=True, top_p=0.8)
    (record,) = warnings_of(caplog, "sampling settings of do_sample=True (top_p=0.8) are not applied")
    assert "ContrastiveSearch(temperature" not in record.getMessage()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "simctg_fast"):
        generate(shared("llama"), {"input_ids": prompt(1)}, do_sample=True)
    assert warnings_of(caplog, "pass ContrastiveSearch(temperature=..., generator=...)")


@pytest.mark.parametrize("strategy", [ContrastiveSearch(temperature=0.3), ContrastiveSearch(0.6, 7, temperature=0.3)])
def test_a_top_k_that_counts_candidates_is_not_ignored(strategy, caplog):
    with caplog.at_level(logging.WARNING, "simctg_fast"):
        generate(shared("llama"), {"input_ids": prompt(1)}, strategy, do_sample=True, top_k=7)
    assert not warnings_of(caplog, "sampling settings")
    with caplog.at_level(logging.WARNING, "simctg_fast"):
        other = ContrastiveSearch(0.6, 3, temperature=0.3)
        generate(shared("llama"), {"input_ids": prompt(1)}, other, do_sample=True, top_k=7)
    assert warnings_of(caplog, "sampling settings of do_sample=True (top_k=7) are not applied")


def test_pipeline_ignores_a_top_k_nobody_chose():
    pipe = text_pipeline()
    assert pipe(TEXT, custom_generate=contrastive_search, max_new_tokens=12) == pipe(
        TEXT, custom_generate=ContrastiveSearch(0.6, 4), max_new_tokens=12
    )


def test_pipeline_in_batches():
    pipe = text_pipeline(do_sample=True, temperature=0.7)
    texts = [TEXT, "ive search", "x"]
    together = pipe(texts, custom_generate=ContrastiveSearch(0.6, 4), max_new_tokens=12, batch_size=3)
    alone = [pipe(text, custom_generate=ContrastiveSearch(0.6, 4), max_new_tokens=12) for text in texts]
    assert together == alone


def test_pipeline_with_random_choices():
    pipe = text_pipeline(do_sample=True)

    def texts(seed):
        strategy = ContrastiveSearch(temperature=0.3, generator=torch.Generator().manual_seed(seed))
        out = pipe(TEXT, custom_generate=strategy, max_new_tokens=12, num_return_sequences=3)
        return [each["generated_text"] for each in out]

    assert len(set(texts(1))) == 3
    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


# ---- logits processors ---------------------------------------------------------------------------------------------


def processors_of(model, inputs, **kwargs):
    """The logits processors that `generate` makes of these arguments."""
    caught = {}

    def catch(model, input_ids, logits_processor, **kwargs):
        caught["processors"] = logits_processor
        return input_ids

    model.generate(**inputs, custom_generate=catch, max_new_tokens=12, **kwargs)
    assert len(caught["processors"])
    return caught["processors"]


class Favour(LogitsProcessor):
    """A processor of the caller's own, which depends on the text so far."""

    def __call__(self, input_ids, scores):
        assert scores.dtype == torch.float32
        assert scores.shape == (len(input_ids), VOCABULARY)
        scores = scores.clone()
        scores.scatter_add_(1, (input_ids[:, -2:] + 1) % VOCABULARY, torch.full((len(scores), 2), 3.0))
        return scores


ARGUMENTS = {
    "repetition_penalty": {"repetition_penalty": 1.6},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(3, 60)] + [[70, 71]]},
    "suppress_tokens": {"suppress_tokens": list(range(40, 98))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(30, 98))},
    "forced_eos": {"forced_eos_token_id": 2},
    "sequence_bias": {"sequence_bias": [[[20], 6.0], [[21], -6.0], [[30, 31], 9.0]]},
    "length_decay": {"exponential_decay_length_penalty": (3, 2.0), "eos_token_id": 2},
    "renormalize": {"renormalize_logits": True},
    "invalid_values": {"remove_invalid_values": True},
    "encoder_repetition": {"encoder_repetition_penalty": 2.0},
    "encoder_ngrams": {"encoder_no_repeat_ngram_size": 1},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="lefthash")},
    "guidance": {"guidance_scale": 1.7},
    "prefix_allowed": {"prefix_allowed_tokens_fn": lambda batch, ids: list(range(int(ids[-1]) % 5 + 3, 98, 5))},
    "custom": {"logits_processor": LogitsProcessorList([Favour()])},
}
CHANGES_NOTHING = {"renormalize", "invalid_values"}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_logits_processors(name):
    model, inputs, arguments = shared("llama"), left_padded(9, 7), ARGUMENTS[name]
    processors = processors_of(model, inputs, **arguments)
    expected = by_definition(
        model,
        **inputs,
        penalty_alpha=0.6,
        top_k=4,
        max_new_tokens=12,
        logits_processor=processors,
        eos_token_id=arguments.get("eos_token_id"),
    ).sequences
    out = decode(model, inputs, **arguments)
    same_tokens(out, expected, model, inputs, logits_processor=processors)
    assert torch.equal(out, decode(model, inputs)) == (name in CHANGES_NOTHING)


@pytest.mark.parametrize("arguments", [{"forced_bos_token_id": 33}, {"encoder_no_repeat_ngram_size": 1}], ids=str)
def test_logits_processors_of_an_encoder_decoder(arguments):
    model = shared("bart")
    inputs = inputs_for(model, 2)
    processors = processors_of(model, inputs, **arguments)
    settings = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 12, "logits_processor": processors}
    same_tokens(
        decode(model, inputs, **arguments),
        by_definition(model, **inputs, **settings).sequences,
        model,
        inputs,
        logits_processor=processors,
    )


def test_guidance_with_a_negative_prompt():
    model, inputs = shared("llama"), {"input_ids": prompt(1)}
    arguments = {"guidance_scale": 2.0, "negative_prompt_ids": prompt(1, 5, seed=3)}
    processors = processors_of(model, inputs, **arguments)
    settings = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 12, "logits_processor": processors}
    assert torch.equal(decode(model, inputs, **arguments), by_definition(model, **inputs, **settings).sequences)


def test_banned_words_never_appear_whatever_the_penalty():
    model, inputs = shared("llama"), left_padded(9, 7)
    banned = sorted(set(range(3, VOCABULARY)) - {10, 11, 12})
    out = decode(model, inputs, penalty_alpha=1.0, top_k=8, bad_words_ids=[[token] for token in (0, 1, 2, *banned)])
    assert set(out[:, 9:].flatten().tolist()) <= {10, 11, 12}


# ---- stopping ------------------------------------------------------------------------------------------------------


def test_end_of_text_pads_the_row_and_ends_the_batch():
    model, inputs = shared("llama"), left_padded(9, 7, 8)
    plain = decode(model, inputs)
    ends = [plain[0, 11].item(), plain[1, 13].item(), plain[2, 12].item()]
    out = decode(model, inputs, eos_token_id=ends)
    expected = by_definition(
        model, **inputs, penalty_alpha=0.6, top_k=4, max_new_tokens=12, eos_token_id=ends
    ).sequences
    same_tokens(out, expected, model, inputs)
    assert out.shape[1] < plain.shape[1]
    assert (out[:, -1] == 0).any()


def test_one_end_of_text_token():
    model, inputs = shared("llama"), left_padded(9, 7)
    plain = decode(model, inputs)
    out = decode(model, inputs, eos_token_id=plain[0, 11].item(), pad_token_id=1)
    row = plain[0].tolist()
    assert out[0, :12].tolist() == row[:12]
    assert set(out[0, 12:].tolist()) <= {1}


def test_min_new_tokens_forbids_the_end():
    model, inputs = shared("llama"), {"input_ids": prompt(1)}
    end = decode(model, inputs)[0, 11].item()
    assert decode(model, inputs, eos_token_id=end).shape[1] == 12
    out = decode(model, inputs, eos_token_id=end, min_new_tokens=7)
    assert out.shape[1] >= 16
    assert end not in out[0, 9:16].tolist()


def test_max_length_and_one_token():
    model, inputs = shared("llama"), {"input_ids": prompt(1)}
    out = model.generate(**inputs, custom_generate=contrastive_search, max_length=14)
    assert torch.equal(out, decode(model, inputs, new_tokens=5))
    assert torch.equal(decode(model, inputs, new_tokens=1), out[:, :10])


class Flags(StoppingCriteria):
    """Ends row i of the batch when the text is ``lengths[i]`` long; keeps what it was called with."""

    def __init__(self, *lengths):
        self.lengths, self.scores = torch.tensor(lengths), []

    def __call__(self, input_ids, scores, **kwargs):
        self.scores.append(scores)
        return input_ids.shape[1] >= self.lengths


def test_criterion_that_ends_rows_one_by_one():
    model, inputs = shared("llama"), left_padded(9, 7)
    plain, unused = decode(model, inputs), 96
    assert unused not in plain
    out = decode(model, inputs, stopping_criteria=[Flags(12, 15)], eos_token_id=unused)
    assert out.shape[1] == 15
    assert out[0].tolist() == [*plain[0, :12].tolist(), 0, 0, 0]
    assert out[1].tolist() == plain[1, :15].tolist()
    # As in greedy search, rows are filled up only where there is an end-of-text token.
    assert torch.equal(decode(model, inputs, stopping_criteria=[Flags(12, 15)]), plain[:, :15])
    theirs = greedy(model, inputs, stopping_criteria=[Flags(12, 15)], eos_token_id=unused)
    ours = decode(model, inputs, penalty_alpha=0.0, stopping_criteria=[Flags(12, 15)], eos_token_id=unused)
    same_tokens(ours, theirs, model, inputs, penalty_alpha=0.0, top_k=1)


def test_criteria_get_the_scores():
    model, inputs = shared("llama"), left_padded(9, 7)
    flags = Flags(12, 12)
    decode(model, inputs, stopping_criteria=[flags], return_dict_in_generate=True, output_scores=True)
    assert [len(scores) for scores in flags.scores] == [1, 2, 3]
    flags = Flags(12, 12)
    decode(model, inputs, stopping_criteria=[flags])
    assert flags.scores == [None] * 3


def test_criterion_that_returns_one_flag_for_all():
    class Once(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids.shape[1] >= 13

    model, inputs = shared("llama"), left_padded(9, 7)
    assert torch.equal(decode(model, inputs, stopping_criteria=[Once()]), decode(model, inputs, new_tokens=4))


def test_length_criterion_of_the_callers_own():
    model, inputs = shared("llama"), left_padded(9, 7)
    out = decode(model, inputs, new_tokens=500, stopping_criteria=[MaxLengthCriteria(max_length=13)])
    assert torch.equal(out, decode(model, inputs, new_tokens=4))


def test_max_time():
    model, inputs = shared("llama"), {"input_ids": prompt(1)}
    assert torch.equal(decode(model, inputs, max_time=0.0), decode(model, inputs, new_tokens=1))
    started = time.monotonic()
    out = decode(model, inputs, new_tokens=900, max_time=0.2)
    assert time.monotonic() - started < 10
    assert 10 <= out.shape[1] < 909


# ---- stop strings --------------------------------------------------------------------------------------------------


def first_words(count):
    text = tokenizer().decode(decode(shared("llama"), {"input_ids": prompt(1)})[0, 9:])
    assert text[:count] not in text[1:]
    return text[:count]


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_strings(as_list):
    model, inputs, stop = shared("llama"), {"input_ids": prompt(1)}, first_words(4)[2:]
    strategy = ContrastiveSearch(tokenizer=tokenizer(), stop_strings=[stop, "no such text"] if as_list else stop)
    out = generate(model, inputs, strategy)
    assert tokenizer().decode(out[0, 9:]) == first_words(4)


def test_stop_strings_end_rows_of_a_batch():
    model, inputs = shared("llama"), left_padded(9, 7)
    plain = decode(model, inputs)
    stops = [tokenizer().decode(plain[0, 10:12]), tokenizer().decode(plain[1, 13:15])]
    strategy = ContrastiveSearch(tokenizer=tokenizer(), stop_strings=stops)
    out = generate(model, inputs, strategy, eos_token_id=96)
    assert out.shape[1] == 15
    assert out[0].tolist() == [*plain[0, :12].tolist(), 0, 0, 0]
    assert out[1].tolist() == plain[1, :15].tolist()


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match="stop_strings='x' needs the tokenizer"):
        ContrastiveSearch(stop_strings="x")
