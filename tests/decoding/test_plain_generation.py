"""`generate` over plain models: the tokens of `model.generate`, in all three protocols, and clear refusals."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    WatermarkingConfig,
)

from simctg_fast import generate
from simctg_fast.decoding.caches import CACHE_NAME
from simctg_fast.plain.protocols import detect_protocol
from simctg_fast.reference.contrastive_search import contrastive_search as by_definition

from ..decoding_models import VOCABULARY, build, left_padded, prompt, shared, tokenizer
from ..near_ties import same_tokens
from ..plain_models import NanoGPT, RecurrentNet, nano_gpt_from


def stateless(model):
    def step(ids, attention_mask=None):
        positions = None if attention_mask is None else (attention_mask.cumsum(dim=1) - 1).clamp_min(0)
        out = model(ids, attention_mask=attention_mask, position_ids=positions, output_hidden_states=True)
        return out.logits, out.hidden_states[-1]

    return step


def stateful(model):
    def step(ids, state, attention_mask=None):
        state = DynamicCache(config=model.config) if state is None else state
        positions = None
        if attention_mask is not None:
            positions = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        out = model(
            ids,
            attention_mask=attention_mask,
            position_ids=positions,
            **{CACHE_NAME: state},
            output_hidden_states=True,
        )
        return out.logits, state, out.hidden_states[-1]

    return step


def select(state, index):
    state = copy.deepcopy(state)
    state.reorder_cache(index)
    return state


def positional(model):
    nano = nano_gpt_from(model)
    nano.setup_cache(8, 64)
    return nano


STEPS = {"stateless": stateless, "stateful": stateful, "positional": positional}


@functools.cache
def the_model():
    return shared("gpt2")


@functools.cache
def the_step(protocol: str):
    with torch.random.fork_rng():  # whichever test builds it first has seeded what it draws from
        return STEPS[protocol](the_model())


class Ban(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([5, 6, 7]), float("-inf"))


class StopAtRepeat(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, :-1] == input_ids[:, -1:]).any(dim=1)


SETTINGS = {
    "greedy": {},
    "defaults of the lengths": {"max_new_tokens": None},
    "max_length": {"max_new_tokens": None, "max_length": 17},
    "repetition and n-grams": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    "bans": {"bad_words_ids": [[12], [14, 15], [31, 40]], "suppress_tokens": [20, 21], "begin_suppress_tokens": [30]},
    "sequence_bias": {"sequence_bias": [[[50], 9.0], [[60, 61], -3.0]]},
    "forced": {"forced_bos_token_id": 9, "forced_eos_token_id": 11},
    "ends": {"eos_token_id": list(range(3, 40)), "pad_token_id": 0, "min_new_tokens": 3},
    "length penalty": {"eos_token_id": [7, 8], "exponential_decay_length_penalty": (2, 1.5), "pad_token_id": 0},
    "own": {"logits_processor": LogitsProcessorList([Ban()]), "stopping_criteria": [StopAtRepeat()]},
    "sampling": {"do_sample": True},
    "sampling, all of it": {"do_sample": True, "top_k": 0, "temperature": 3.0},
    "temperature, top-k, top-p": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "min-p": {"do_sample": True, "min_p": 0.05, "temperature": 1.4},
    "typical, epsilon, eta": {"do_sample": True, "typical_p": 0.9, "epsilon_cutoff": 2e-3, "eta_cutoff": 1e-3},
    "top-h": {"do_sample": True, "top_h": 0.6},
    "several": {"do_sample": True, "num_return_sequences": 3, "repetition_penalty": 1.2},
    "sampling to an end": {"do_sample": True, "eos_token_id": list(range(3, 30)), "pad_token_id": 0},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=3.0, seeding_scheme="selfhash")},
    "renormalised": {"do_sample": True, "renormalize_logits": True, "remove_invalid_values": True},
    "config": {"generation_config": GenerationConfig(do_sample=True, top_p=0.7, max_new_tokens=9, pad_token_id=0)},
}


def expected(ids, mask=None, seed=3, **settings):
    torch.manual_seed(seed)
    mask = torch.ones_like(ids) if mask is None else mask
    settings = copy.deepcopy(settings)
    for name, kind in (("logits_processor", LogitsProcessorList), ("stopping_criteria", StoppingCriteriaList)):
        if name in settings:
            settings[name] = kind(settings[name])
    return the_model().generate(ids, attention_mask=mask, **settings)


def same_as_greedy(found, truth, ids):
    same_tokens(found, truth, the_model(), {"input_ids": ids}, penalty_alpha=0.0, top_k=1)


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_of_transformers(name):
    settings = {"max_new_tokens": 12} | SETTINGS[name]
    if "generation_config" in settings:
        del settings["max_new_tokens"]
    settings = {key: value for key, value in settings.items() if value is not None}
    ids = prompt(2, 7)
    truth = expected(ids, **settings)
    assert truth.shape[1] > 7
    torch.manual_seed(3)
    assert torch.equal(generate(the_step("stateful"), ids, **settings), truth)


def test_the_settings_above_matter():
    """What the comparisons stand on: no two settings of a kind write the same."""
    ids = prompt(2, 7)
    truths = {}
    for name, settings in SETTINGS.items():
        settings = settings if "generation_config" in settings else {"max_new_tokens": 12} | settings
        settings = {key: value for key, value in settings.items() if value is not None}
        truths[name] = str(expected(ids, **settings).tolist())
    same = [[name for name, truth in truths.items() if truth == each] for each in set(truths.values())]
    # Renormalising changes nothing about a draw.
    assert [each for each in same if len(each) > 1] == [["sampling", "renormalised"]]


@pytest.mark.parametrize("protocol", STEPS)
@pytest.mark.parametrize("sampled", [False, True])
def test_every_protocol_with_left_padding(protocol, sampled):
    inputs = left_padded(9, 4, 7)
    settings = {"max_new_tokens": 12, "do_sample": sampled, "repetition_penalty": 1.3, "pad_token_id": 0}
    truth = expected(inputs["input_ids"], inputs["attention_mask"], **settings)
    torch.manual_seed(3)
    out = generate(the_step(protocol), inputs["input_ids"], attention_mask=inputs["attention_mask"], **settings)
    assert torch.equal(out, truth)
    torch.manual_seed(3)
    assert torch.equal(generate(the_step(protocol), inputs["input_ids"], **settings), truth), "padding by pad_token_id"


@pytest.mark.parametrize("protocol", STEPS)
def test_shapes_in_and_out(protocol):
    ids = prompt(1, 7)
    truth = expected(ids, max_new_tokens=8)
    out = generate(the_step(protocol), ids[0], max_new_tokens=8)
    assert out.ndim == 1
    same_as_greedy(out[None], truth, ids)
    same_as_greedy(generate(the_step(protocol), ids.int(), max_new_tokens=8), truth, ids)
    several = generate(the_step(protocol), ids[0], max_new_tokens=8, do_sample=True, num_return_sequences=2)
    assert several.shape == (2, 15)


def test_logits_of_the_last_position_only():
    model, ids = the_model(), prompt(2, 7)

    def last(ids):
        return model(ids).logits[:, -1]

    def last_kept(ids):
        return model(ids).logits[:, -1:]

    truth = expected(ids, max_new_tokens=8)
    same_tokens(generate(last, ids, max_new_tokens=8), truth, model, {"input_ids": ids}, penalty_alpha=0.0, top_k=1)
    same_tokens(
        generate(last_kept, ids, max_new_tokens=8), truth, model, {"input_ids": ids}, penalty_alpha=0.0, top_k=1
    )


def test_a_generator_of_ones_own():
    ids, step = prompt(2, 7), the_step("stateful")
    truth = expected(ids, seed=5, do_sample=True, max_new_tokens=8)
    before = torch.random.get_rng_state()
    out = generate(step, ids, do_sample=True, max_new_tokens=8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(out, truth)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_stop_strings_and_streamer():
    ids = prompt(1, 7)
    settings = {"max_new_tokens": 16, "stop_strings": ["a", "b", "c", "d", "e", "f"], "tokenizer": tokenizer()}
    truth = expected(ids, **settings)
    assert truth.shape[1] < 23, "the stop strings end it"
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True)
    out = generate(the_step("stateful"), ids, streamer=streamer, **settings)
    assert torch.equal(out, truth)
    assert "".join(streamer) == tokenizer().decode(truth[0, 7:])


def test_a_streamer_is_ended_when_the_step_fails():
    class Streamer:
        ended = False

        def put(self, tokens):
            pass

        def end(self):
            self.ended = True

    streamer = Streamer()
    with pytest.raises(RuntimeError, match="broken"):
        generate(fails, prompt(), streamer=streamer)
    assert streamer.ended


def fails(ids):
    raise RuntimeError("broken")


def test_logits_that_the_step_keeps_are_not_written_to():
    buffer = torch.randn(1, VOCABULARY)
    before = buffer.clone()

    def step(ids):
        return buffer

    generate(step, prompt(), max_new_tokens=4, logits_processor=lambda ids, scores: scores.zero_(), do_sample=True)
    assert torch.equal(buffer, before)


def test_half_precision_logits_are_ranked_in_float32():
    logits = torch.zeros(1, VOCABULARY, dtype=torch.bfloat16)
    seen = []

    def step(ids):
        return logits

    def look(ids, scores):
        seen.append(scores.dtype)
        return scores

    generate(step, prompt(), max_new_tokens=2, logits_processor=look)
    assert set(seen) == {torch.float32}


# ---- the two examples ------------------------------------------------------------------------------------------------


def test_a_nano_gpt_with_its_own_cache():
    """Prefill with arange(L), then one position a call, and no gradients."""
    torch.manual_seed(0)
    model, calls = NanoGPT(VOCABULARY, 32, 4, 2, 64).eval(), []
    model.register_forward_pre_hook(lambda module, args: calls.append([each.tolist() for each in args]))
    ids = prompt(2, 5)
    model.setup_cache(2, 64)
    out = generate(model, ids, max_new_tokens=6)
    assert calls[0] == [ids.tolist(), [0, 1, 2, 3, 4]]
    assert [positions for _, positions in calls[1:]] == [[5], [6], [7], [8], [9]]
    assert [[row[0] for row in tokens] for tokens, _ in calls[1:]] == out[:, 5:10].T.tolist()
    model.setup_cache(2, 64)
    assert torch.equal(generate(model, ids, max_new_tokens=6), out)


def recurrent():
    torch.manual_seed(1)
    model = RecurrentNet(VOCABULARY, 24).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.8)
    return model


def test_a_recurrent_network():
    model, ids = recurrent(), prompt(3, 5)
    out = generate(model, ids, max_new_tokens=10)
    with torch.no_grad():
        for step in range(10):
            assert torch.equal(model(out[:, : 5 + step], None)[0][:, -1].argmax(-1), out[:, 5 + step])


def contrastive_by_hand(model, ids, alpha, k, steps):
    """Su et al. 2022, equation 5, one row at a time with whole sequences."""
    rows = []
    for row in ids:
        for _ in range(steps):
            probs, tokens = model(row[None], None)[0][0, -1].softmax(-1).topk(k)
            scores = []
            for p, token in zip(probs, tokens, strict=True):
                hidden = torch.nn.functional.normalize(model(torch.cat([row, token[None]])[None], None)[2][0], dim=-1)
                scores.append((1 - alpha) * p - alpha * (hidden[:-1] @ hidden[-1]).max())
            row = torch.cat([row, tokens[torch.stack(scores).argmax()][None]])
        rows.append(row)
    return torch.stack(rows)


def test_contrastive_search_over_a_recurrent_network():
    model, ids = recurrent(), prompt(2, 5)
    with torch.no_grad():
        truth = contrastive_by_hand(model, ids, 0.6, 5, 12)
    out = generate(model, ids, max_new_tokens=12, penalty_alpha=0.6, top_k=5, select=model.select)
    assert torch.equal(out, truth)
    assert not torch.equal(out, generate(model, ids, max_new_tokens=12))


@pytest.mark.parametrize("protocol", ["stateless", "stateful"])
def test_contrastive_search_is_that_of_the_reference(protocol):
    inputs = left_padded(9, 6)
    truth = by_definition(the_model(), **inputs, penalty_alpha=0.6, top_k=4, max_new_tokens=12).sequences
    out = generate(
        the_step(protocol),
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        penalty_alpha=0.6,
        max_new_tokens=12,
        select=select if protocol == "stateful" else None,
    )
    same_tokens(out, truth, the_model(), inputs)


# ---- protocols -------------------------------------------------------------------------------------------------------


class Positional(torch.nn.Module):
    def forward(self, x, input_pos=None, mask=None):
        pass


@pytest.mark.parametrize(
    ("step", "protocol"),
    [
        (lambda ids: ids, "stateless"),
        (lambda ids, attention_mask=None: ids, "stateless"),
        (lambda ids, input_pos: ids, "positional"),
        (Positional(), "positional"),
        (lambda ids, state: ids, "stateful"),
        (lambda ids, state, attention_mask: ids, "stateful"),
        (functools.partial(lambda scale, ids: ids, 2), "stateless"),
        (torch.compile(Positional()), "positional"),
    ],
)
def test_protocols_by_parameter_names(step, protocol):
    assert detect_protocol(step) == protocol


@pytest.mark.parametrize(
    "step",
    [
        lambda ids, targets=None: ids,
        lambda *args: args,
        lambda ids, **options: ids,
        lambda: None,
        lambda ids, cache: ids,
        lambda ids, *, state: ids,
        lambda ids, state, more: ids,
        the_model,
    ],
)
def test_what_the_names_do_not_tell_is_asked(step):
    with pytest.raises(ValueError, match="pass protocol="):
        generate(step, prompt())


def test_a_protocol_that_is_named():
    model, ids = the_model(), prompt(2, 7)

    def step(*args):
        return model(*args).logits

    same_as_greedy(generate(step, ids, protocol="stateless", max_new_tokens=8), expected(ids, max_new_tokens=8), ids)


# ---- refusals --------------------------------------------------------------------------------------------------------


def flat(ids):
    return torch.zeros(len(ids), VOCABULARY)


def shaped(*shape, dtype=torch.float32):
    def step(ids):
        return torch.zeros(*shape, dtype=dtype)

    return step


def no_state(ids, state):
    return torch.zeros(len(ids), VOCABULARY)


def no_hidden(ids, state):
    return torch.zeros(len(ids), VOCABULARY), state


def flat_hidden(ids, state):
    return torch.zeros(len(ids), VOCABULARY), state, torch.zeros(len(ids), 8)


def shrinking(ids):
    return torch.zeros(len(ids), VOCABULARY + ids.shape[1])


def hopeless(ids):
    return torch.full((len(ids), VOCABULARY), float("nan"))


class Output:
    logits = torch.zeros(1, VOCABULARY)


def model_output(ids):
    return Output()


GIVEN = prompt(2, 7)
MASK = torch.ones_like(GIVEN)


@pytest.mark.parametrize(
    ("step", "arguments", "text"),
    [
        ("no step", {}, r"step must be callable, got str"),
        (flat, {"protocol": "static"}, r"protocol must be 'auto' or one of .* got 'static'"),
        (shaped(3, VOCABULARY), {}, r"logits of shape \(3, 98\) for ids of shape \(2, 7\).*\(2, V\)"),
        (shaped(2, 5, VOCABULARY), {}, r"shape \(2, 5, 98\)"),
        (shaped(VOCABULARY), {}, r"shape \(98,\)"),
        (shaped(2, 0), {}, r"shape \(2, 0\)"),
        (shaped(2, VOCABULARY, dtype=torch.int64), {}, r"floating-point logits .* torch.int64"),
        (shrinking, {}, r"logits over 106 tokens, in its first call over 105"),
        (model_output, {}, r"return its \.logits"),
        (no_state, {}, r"stateful step must return \(logits, state\)"),
        (hopeless, {}, r"row 0 left no probabilities at new token 0 .*NaN"),
        (hopeless, {"do_sample": True}, r"row 0 left no probabilities .*NaN"),
        (flat, {"suppress_tokens": list(range(VOCABULARY))}, r"every token banned"),
        (flat, {"suppress_tokens": list(range(VOCABULARY)), "do_sample": True}, r"every token banned"),
        (flat, {"attention_mask": torch.tensor([[1] * 7, [0] + [1] * 6])}, r"step takes no attention_mask"),
        (flat, {"attention_mask": MASK[:, 1:]}, r"attention_mask must have the shape of input_ids \(2, 7\)"),
        (flat, {"attention_mask": 2 * MASK}, r"attention_mask must be 0 at padding and 1"),
        (flat, {"attention_mask": MASK.tril(5)}, r"ends with padding in row 0; .* on the left"),
        (flat, {"num_beams": 4}, r"num_beams=4 asks for beam search"),
        (flat, {"guidance_scale": 0}, r"guidance_scale=0 asks for classifier-free guidance"),
        (flat, {"num_return_sequences": 2}, r"num_return_sequences"),
        (flat, {"max_new_tokens": 0}, r"max_new_tokens must be .* got 0"),
        (flat, {"max_length": 7}, r"max_length must be above the prompt's 7 tokens, got 7"),
        (flat, {"eos_token_id": -1}, r"eos_token_id .* got -1"),
        (flat, {"stop_strings": "."}, r"stop_strings='\.' needs the tokenizer"),
        (flat, {"temperature": -1.0, "do_sample": True}, r"temperature"),
        (flat, {"logits_processor": ["x"]}, r"logits_processor must be callables, got 'x'"),
        (flat, {"generation_config": {"top_k": 5}}, r"generation_config must be a GenerationConfig, got dict"),
        (flat, {"penalty_alpha": 1.5}, r"penalty_alpha must be a number in \[0, 1\], got 1\.5"),
        (flat, {"penalty_alpha": 0.6}, r"needs a step that returns \(logits, hidden\)"),
        (flat, {"penalty_alpha": 0.6, "do_sample": True}, r"leave do_sample=True out"),
        (lambda ids, input_pos: flat(ids), {"penalty_alpha": 0.6}, r"a positional step keeps its own cache"),
        (no_hidden, {"penalty_alpha": 0.6}, r"pass select="),
        (no_hidden, {"penalty_alpha": 0.6, "select": select}, r"needs a step that returns \(logits, state, hidden\)"),
        (flat_hidden, {"penalty_alpha": 0.6, "select": select}, r"shape \(2, 8\), must be \(2, 7, D\)"),
    ],
)
def test_refused_with_the_reason(step, arguments, text):
    with pytest.raises(ValueError, match=text):
        generate(step, GIVEN, **arguments)


@pytest.mark.parametrize("ids", [torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 3), torch.zeros(1, 2, 3).long()])
def test_input_ids_of_another_shape(ids):
    with pytest.raises(ValueError, match=r"input_ids must be"):
        generate(flat, ids)


def test_a_setting_nobody_knows():
    with pytest.raises(TypeError, match="top_q, which GenerationConfig does not have"):
        generate(flat, GIVEN, top_q=0.3)


def test_candidates_beyond_the_vocabulary():
    model = recurrent()
    with pytest.raises(ValueError, match="top_k must be at most the 98 logits of the step, got 99"):
        generate(model, GIVEN, penalty_alpha=0.6, top_k=99, select=model.select)


def test_one_bad_row_is_named():
    def step(ids):
        logits = torch.zeros(len(ids), VOCABULARY)
        if ids.shape[1] > 8:
            logits[1, 4] = float("nan")
        return logits

    with pytest.raises(ValueError, match="row 1 left no probabilities at new token 2"):
        generate(step, GIVEN, max_new_tokens=6)


def test_the_callers_processors_go_where_transformers_puts_them():
    """Before the sampling filters, and in place of one of the same class."""
    ids, model = prompt(2, 7), the_model()
    for own in (Ban(), TemperatureLogitsWarper(0.2)):
        settings = {"do_sample": True, "temperature": 1.3, "top_k": 6, "max_new_tokens": 10}
        torch.manual_seed(2)
        truth = model.generate(
            ids, attention_mask=torch.ones_like(ids), logits_processor=LogitsProcessorList([own]), **settings
        )
        torch.manual_seed(2)
        assert torch.equal(generate(the_step("stateful"), ids, logits_processor=own, **settings), truth)


def test_modules_are_left_in_their_mode_and_parameters_without_gradients():
    model = build("gpt2").train()
    step = stateless(model)
    generate(step, prompt(), max_new_tokens=2)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_top_k_of_contrastive_search_is_not_said_to_be_ignored(monkeypatch):
    said = []
    monkeypatch.setattr("transformers.generation.configuration_utils.logger.warning_once", said.append)
    contrastive = [
        generate(the_step("stateless"), prompt(), penalty_alpha=0.6, top_k=k, max_new_tokens=12) for k in (2, 40)
    ]
    assert not torch.equal(*contrastive)
    assert not said
    generate(the_step("stateless"), prompt(), top_k=2, max_new_tokens=2)
    assert "top_k" in said[0]
