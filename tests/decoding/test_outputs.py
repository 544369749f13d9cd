"""What generate returns besides the tokens: scores, logits, hidden states, attentions, and a cache to go on from."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from simctg_fast.decoding.caches import CACHE_NAME
from simctg_fast.decoding.report import recall

from ..decoding_models import build, decode, greedy, inputs_for, left_padded, prompt, shared
from ..near_ties import same_tokens

PROMPT, NEW = 9, 8
ROUTES = [
    ("llama", "shared_prefix"),
    ("llama", "reorder"),
    ("llama", "uncached"),
    ("mistral", "shared_prefix"),
    ("mistral", "reorder"),
    ("gemma2", "shared_prefix"),
    ("bloom", "reorder"),
    ("mamba", "reorder"),
    ("bart", "shared_prefix"),
    ("bart", "reorder"),
    ("t5", "shared_prefix"),
    ("t5", "reorder"),
]
EVERYTHING = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
}


def full_forward(model, inputs, sequences):
    """The model's output for whole sequences, without a cache."""
    if model.config.is_encoder_decoder:
        return model(**inputs, decoder_input_ids=sequences, output_hidden_states=True, use_cache=False)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, sequences.shape[1] - PROMPT), value=1)
    arguments = {"input_ids": sequences, "attention_mask": mask}
    if type(model).__name__ not in ("BloomForCausalLM", "MambaForCausalLM"):
        arguments["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**arguments, output_hidden_states=True, use_cache=False)


@pytest.mark.parametrize(("name", "path"), ROUTES)
def test_scores_logits_and_hidden_states_are_the_models(name, path):
    model = shared(name)
    inputs = inputs_for(model, 2)
    out = decode(model, inputs, path=path, new_tokens=NEW, suppress_tokens=[5, 6], **EVERYTHING)
    is_encoder_decoder = model.config.is_encoder_decoder
    assert isinstance(out, GenerateEncoderDecoderOutput if is_encoder_decoder else GenerateDecoderOnlyOutput)
    truth = full_forward(model, inputs, out.sequences)
    layers = truth.decoder_hidden_states if is_encoder_decoder else truth.hidden_states
    given = out.decoder_hidden_states if is_encoder_decoder else out.hidden_states
    start = out.sequences.shape[1] - NEW
    assert len(out.logits) == len(out.scores) == len(given) == NEW
    for step in range(NEW):
        logits = truth.logits[:, start + step - 1]
        torch.testing.assert_close(out.logits[step], logits, atol=1e-4, rtol=1e-4)
        banned = torch.isinf(out.scores[step])
        assert banned.nonzero()[:, 1].tolist() == [5, 6, 5, 6]
        assert torch.equal(out.scores[step][~banned], out.logits[step][~banned])
        if path == "uncached":
            continue  # its states are those of whole sequences
        assert len(given[step]) == len(layers)
        positions = slice(0, start) if step == 0 else slice(start + step - 1, start + step)
        for ours, theirs in zip(given[step], layers, strict=True):
            real = torch.ones(2, start, dtype=torch.bool) if is_encoder_decoder else inputs["attention_mask"].bool()
            real = real if step == 0 else torch.ones(2, 1, dtype=torch.bool)
            torch.testing.assert_close(ours[real], theirs[:, positions][real], atol=1e-4, rtol=1e-4)


def assert_same_structure(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    elif isinstance(theirs, (tuple, list)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same_structure(a, b)
    else:
        assert theirs is None
        assert ours is None


@pytest.mark.parametrize("attentions", [False, True])
@pytest.mark.parametrize("name", ["llama", "bloom", "bart", "t5"])
def test_without_penalty_everything_is_what_greedy_search_returns(name, attentions):
    model = build(name, attn_implementation="eager")
    inputs = inputs_for(model, 2)
    options = EVERYTHING | {"output_attentions": attentions}
    ours = decode(model, inputs, penalty_alpha=0.0, new_tokens=NEW, **options)
    theirs = greedy(model, inputs, new_tokens=NEW, **options)
    assert ours.keys() == theirs.keys()
    for key in set(ours) - {CACHE_NAME}:
        assert_same_structure(ours[key], theirs[key])
    assert_same_cache(getattr(ours, CACHE_NAME), getattr(theirs, CACHE_NAME))


def test_attentions_take_another_path_for_this_call_only():
    model = build("llama", attn_implementation="eager")
    inputs = inputs_for(model, 2)
    plain = decode(model, inputs, new_tokens=NEW)
    out = decode(model, inputs, new_tokens=NEW, return_dict_in_generate=True, output_attentions=True)
    same_tokens(out.sequences, plain, model, inputs)
    assert recall(model).path == "reorder"
    assert torch.equal(decode(model, inputs, new_tokens=NEW), plain)
    assert recall(model).path == "shared_prefix"
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW), value=1)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    truth = model(out.sequences, attention_mask=mask, position_ids=positions, output_attentions=True).attentions
    assert len(out.attentions) == NEW
    for step in range(1, NEW):
        for ours, theirs in zip(out.attentions[step], truth, strict=True):
            position = PROMPT + step - 1
            torch.testing.assert_close(ours, theirs[:, :, position : position + 1, : position + 1], atol=1e-5, rtol=0)


def test_attentions_need_the_models_own_attention():
    with pytest.raises(ValueError, match="output_attentions needs the model's own attention"):
        decode(
            build("llama", attn_implementation="eager"),
            {"input_ids": prompt(1)},
            path="shared_prefix",
            return_dict_in_generate=True,
            output_attentions=True,
        )


def test_plain_call_returns_a_tensor():
    assert type(decode(shared("llama"), {"input_ids": prompt(1)})) is torch.Tensor


# ---- the cache -----------------------------------------------------------------------------------------------------


def assert_same_cache(ours, theirs):
    if isinstance(theirs, EncoderDecoderCache):
        assert isinstance(ours, EncoderDecoderCache)
        assert_same_cache(ours.self_attention_cache, theirs.self_attention_cache)
        assert_same_cache(ours.cross_attention_cache, theirs.cross_attention_cache)
        return
    assert type(ours) is type(theirs)
    assert ours.get_seq_length() == theirs.get_seq_length()
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert type(a) is type(b)
        if getattr(b, "keys", None) is not None:
            torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(a.values, b.values, atol=1e-4, rtol=1e-4)


def go_on(model, inputs, sequences, cache, tokens=6):
    """``sequences`` and six tokens of greedy search after them: on ``cache``, and from scratch."""
    ones = torch.ones_like(sequences)
    if model.config.is_encoder_decoder:
        again = inputs | {"decoder_input_ids": sequences, "decoder_attention_mask": ones}
    else:
        mask = inputs["attention_mask"]
        again = {"input_ids": sequences, "attention_mask": torch.cat([mask, ones[:, mask.shape[1] :]], dim=1)}
    on_cache, name = again, CACHE_NAME
    if type(model).__name__ == "MambaForCausalLM":  # generate takes its states, and then new tokens alone
        on_cache = {"input_ids": sequences[:, -1:]}
        name = "cache_params" if CACHE_NAME == "past_key_values" else CACHE_NAME  # before transformers 5.24
    on_cache = greedy(model, on_cache, new_tokens=tokens, **{name: cache})
    on_cache, from_scratch = on_cache[:, -tokens:], greedy(model, again, new_tokens=tokens)[:, -tokens:]
    return torch.cat([sequences, on_cache], dim=1), torch.cat([sequences, from_scratch], dim=1)


def check_going_on(model, inputs, sequences, cache, row=None):
    """Of all rows, or of one."""
    on_cache, from_scratch = go_on(model, inputs, sequences, cache)
    rows = slice(None) if row is None else slice(row, row + 1)
    mine = {name: value[rows] for name, value in inputs.items()}
    same_tokens(on_cache[rows], from_scratch[rows], model, mine, penalty_alpha=0.0, top_k=1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("name", "path"), [route for route in ROUTES if route[1] != "uncached"])
def test_cache_holds_the_winners_and_greedy_search_goes_on_from_it(name, path, batch):
    model = shared(name)
    inputs = inputs_for(model, batch)
    out = decode(model, inputs, path=path, new_tokens=NEW, return_dict_in_generate=True)
    length = out.sequences.shape[1] - 1
    if name != "mamba":
        assert getattr(out, CACHE_NAME).get_seq_length() == length
    check_going_on(model, inputs, out.sequences, getattr(out, CACHE_NAME))


@pytest.mark.parametrize("name", ["llama", "mistral", "bart", "bloom"])
def test_cache_is_of_the_kind_generate_returns(name):
    model = shared(name)
    inputs = inputs_for(model, 2)
    ours = getattr(decode(model, inputs, top_k=1, return_dict_in_generate=True), CACHE_NAME)
    theirs = getattr(greedy(model, inputs, return_dict_in_generate=True), CACHE_NAME)
    assert_same_cache(ours, theirs)


@pytest.mark.parametrize(("name", "path"), [("llama", "shared_prefix"), ("llama", "reorder"), ("mamba", "reorder")])
def test_cache_after_every_row_has_ended(name, path):
    model = shared(name)
    inputs = inputs_for(model, 2)
    plain = decode(model, inputs, path=path)
    ends = [plain[0, PROMPT + 2].item(), plain[1, PROMPT + 4].item()]
    out = decode(model, inputs, path=path, eos_token_id=ends, return_dict_in_generate=True)
    assert PROMPT < out.sequences.shape[1] <= PROMPT + 5
    if name != "mamba":
        assert getattr(out, CACHE_NAME).get_seq_length() == out.sequences.shape[1] - 1
    last = int(out.sequences[1, -1] in ends)  # the row that ended last: the other's text is over
    check_going_on(model, inputs, out.sequences, getattr(out, CACHE_NAME), row=last)


@pytest.mark.parametrize(("name", "path"), [("llama", "shared_prefix"), ("mistral", "reorder"), ("mamba", "reorder")])
def test_cache_of_a_prompt_given_as_embeddings(name, path):
    model, ids = shared(name), prompt(2)
    embeddings = model.get_input_embeddings()(ids).detach()
    out = decode(model, {"inputs_embeds": embeddings}, path=path, return_dict_in_generate=True)
    sequences, mask = torch.cat([ids, out.sequences], dim=1), torch.ones_like(ids)
    check_going_on(model, {"attention_mask": mask}, sequences, getattr(out, CACHE_NAME))


def test_cache_of_one_new_token():
    model, inputs = shared("llama"), inputs_for(shared("llama"), 2)
    out = decode(model, inputs, new_tokens=1, return_dict_in_generate=True)
    assert getattr(out, CACHE_NAME).get_seq_length() == PROMPT
    check_going_on(model, inputs, out.sequences, getattr(out, CACHE_NAME))


def test_uncached_path_returns_no_cache():
    out = decode(shared("llama"), {"input_ids": prompt(1)}, path="uncached", return_dict_in_generate=True)
    assert getattr(out, CACHE_NAME) is None


# ---- a cache of the caller's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path"), [("llama", "auto"), ("llama", "reorder"), ("mistral", "auto"), ("bloom", "auto")]
)
def test_callers_empty_cache_is_filled(name, path):
    """As plain generate does: what is passed in holds the text afterwards, also where no dictionary is returned."""
    model = shared(name)
    inputs = inputs_for(model, 2)
    expected = decode(model, inputs, path=path)
    for options in ({}, {"return_dict_in_generate": True}):
        cache = DynamicCache(config=model.config)
        out = decode(model, inputs, path=path, **{CACHE_NAME: cache}, **options)
        sequences = out.sequences if options else out
        same_tokens(sequences, expected, model, inputs)
        if options:
            assert getattr(out, CACHE_NAME) is cache
        assert cache.get_seq_length() == sequences.shape[1] - 1
        check_going_on(model, inputs, sequences, cache)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_callers_static_cache_is_filled(name):
    model = shared(name)
    inputs = inputs_for(model, 2)
    cache = StaticCache(config=model.config, max_cache_len=64)
    out = decode(model, inputs, **{CACHE_NAME: cache})
    same_tokens(out, decode(model, inputs), model, inputs)
    assert int(cache.get_seq_length()) == out.shape[1] - 1
    check_going_on(model, inputs, out, cache)


def test_callers_static_cache_with_windows_is_refused():
    model = shared("mistral")
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ValueError, match=rf"{CACHE_NAME} must not be a StaticCache .*sliding window"):
        decode(model, {"input_ids": prompt(1)}, **{CACHE_NAME: cache})


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_callers_encoder_decoder_cache_is_filled(name):
    model = shared(name)
    inputs = inputs_for(model, 2)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    out = decode(model, inputs, **{CACHE_NAME: cache})
    same_tokens(out, decode(model, inputs), model, inputs)
    assert cache.get_seq_length() == out.shape[1] - 1
    check_going_on(model, inputs, out, cache)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_callers_cache_in_use_is_run_again_and_says_so(cache_class, caplog):
    model, inputs = shared("llama"), left_padded(9, 7)
    options = {"max_cache_len": 64} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config, **options)
    mask = inputs["attention_mask"][:, :5]
    model(inputs["input_ids"][:, :5], attention_mask=mask, **{CACHE_NAME: cache})
    with caplog.at_level(logging.WARNING, "simctg_fast"):
        out = decode(model, inputs, **{CACHE_NAME: cache})
    assert f"{CACHE_NAME} holds 5 tokens" in caplog.text
    same_tokens(out, decode(model, inputs), model, inputs)


def test_second_turn_of_a_conversation():
    """Contrastive search on the cache of contrastive search, with the new words appended."""
    model, first = shared("llama"), {"input_ids": prompt(1)}
    cache = DynamicCache(config=model.config)
    out = decode(model, first, **{CACHE_NAME: cache})
    more = torch.cat([out, prompt(1, 4, seed=9)], dim=1)
    second = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    same_tokens(decode(model, second, **{CACHE_NAME: cache}), decode(model, second), model, second)


def test_encoder_decoder_cache_in_use():
    model, inputs = shared("t5"), inputs_for(shared("t5"), 1)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    first = greedy(model, inputs, new_tokens=5, **{CACHE_NAME: cache})
    again = inputs | {"decoder_input_ids": first}
    same_tokens(decode(model, again, **{CACHE_NAME: cache}), decode(model, again), model, again)


def test_cache_in_use_without_its_prompt_is_refused():
    model, ids = shared("llama"), prompt(1)
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match=rf"{CACHE_NAME} holds 5 tokens .*pass the whole prompt .*got 4 tokens"):
        decode(model, {"input_ids": ids[:, 5:], "attention_mask": torch.ones_like(ids)}, **{CACHE_NAME: cache})


def test_cache_of_another_kind_is_refused_by_name():
    cache = QuantizedCache.__new__(QuantizedCache)  # making one in earnest needs a quantization library
    Cache.__init__(cache, layers=[DynamicLayer(), DynamicLayer()])
    with pytest.raises(ValueError, match=rf"{CACHE_NAME} must be a DynamicCache, StaticCache .*got QuantizedCache"):
        decode(shared("llama"), {"input_ids": prompt(1)}, **{CACHE_NAME: cache})
