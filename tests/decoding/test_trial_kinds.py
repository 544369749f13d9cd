"""Models that are served, or refused by name, for what they do besides reading a text: learned prompts, 8-bit
activations, states that are written into, positions and tokens of their own."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
import transformers

from simctg_fast import support
from simctg_fast.decoding import attention
from simctg_fast.decoding.attention import Attention
from simctg_fast.decoding.caches import CACHE_NAME
from simctg_fast.decoding.own_step import error_of, moved_by_noise
from simctg_fast.decoding.report import recall
from simctg_fast.engine import Engine
from simctg_fast.engine.padding import change_by_padding
from simctg_fast.reference.contrastive_search import degeneration_penalty, true_float64

from ..decoding_models import VOCABULARY, build, decode, draw, greedy, inputs_for, prompt, tokenizer

TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


# ---- prompts that PEFT has learned -----------------------------------------------------------------------------------


def with_learned_prompt(base: str, kind: str):
    peft = pytest.importorskip("peft")
    task = "SEQ_2_SEQ_LM" if base in ("t5", "bart") else "CAUSAL_LM"
    model = peft.get_peft_model(build(base), getattr(peft, kind)(task_type=task, num_virtual_tokens=4))
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=random))
    return model.eval()


@torch.no_grad()
def by_its_own_forward(model, ids, mask, source=None, new_tokens=8, alpha=0.6, k=4):
    """Contrastive search over one row by PEFT's forward of the whole text, in float64: how the prompt was trained."""
    model = copy.deepcopy(model).double()

    def forward(ids):
        seen = torch.cat([mask, mask.new_ones(1, ids.shape[1] - mask.shape[1])], dim=1)
        text = {"input_ids": ids, "attention_mask": seen}
        if source is not None:
            text = {"input_ids": source, "attention_mask": torch.ones_like(source), "decoder_input_ids": ids}
        out = model(**text, use_cache=False, output_hidden_states=True)
        states = (out.hidden_states if source is None else out.decoder_hidden_states)[-1]
        learned = seen.new_ones(1, states.shape[1] - ids.shape[1])
        return out.logits[0, -1], states[:, torch.cat([learned, seen], dim=1)[0].bool()]

    for _ in range(new_tokens):
        probabilities, candidates = forward(ids)[0].softmax(dim=-1).topk(k)
        scores = []
        for p, token in zip(probabilities, candidates, strict=True):
            _, states = forward(torch.cat([ids, token.view(1, 1)], dim=1))
            scores.append((1 - alpha) * p - alpha * degeneration_penalty(states[:, :-1], states[:, -1])[0])
        ids = torch.cat([ids, candidates[torch.stack(scores).argmax()].view(1, 1)], dim=1)
    return ids


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"])
@pytest.mark.parametrize("base", ["llama", "gpt2", "t5"])
def test_a_learned_prompt_is_read_at_every_step(base, kind):
    """Under transformers 5.24 PEFT's ``generate`` loses a prefix, and reads a prompt once a step."""
    model = with_learned_prompt(base, kind)
    inputs = inputs_for(build(base), 2)
    rows = [tuple(value[row : row + 1] for value in inputs.values()) for row in (0, 1)]
    if base == "t5":
        start = torch.tensor([[model.config.decoder_start_token_id]])
        rows = [(start, torch.ones_like(start), ids[mask.bool()][None]) for ids, mask in rows]
    elif kind == "PrefixTuningConfig":  # else PEFT counts positions from the padding on
        rows = [(ids[mask.bool()][None], mask[mask.bool()][None]) for ids, mask in rows]
    with true_float64():
        expected = [by_its_own_forward(model, *row)[0, -8:].tolist() for row in rows]
    for path in ("auto", "uncached"):
        assert decode(model, inputs, path=path, new_tokens=8)[:, -8:].tolist() == expected
    one = {name: value[:1] for name, value in inputs.items()}
    for _ in range(2):
        assert decode(model, one, new_tokens=8)[0, -8:].tolist() == expected[0]


@pytest.mark.filterwarnings("ignore")
def test_a_learned_prompt_whose_cached_step_fails():
    """Bloom's cached step raises behind a prompt of PEFT's; without a cache it reads it."""
    model = with_learned_prompt("bloom", "PromptTuningConfig")
    inputs = inputs_for(build("bloom"), 2)
    row = {name: value[:1] for name, value in inputs.items()}
    with true_float64():
        expected = by_its_own_forward(model, *row.values())[0, -8:].tolist()
    assert decode(model, inputs, new_tokens=8)[0, -8:].tolist() == expected


@pytest.mark.filterwarnings("ignore")
def test_a_learned_prompt_and_the_model_without_it_have_a_verdict_each():
    model, inputs = with_learned_prompt("llama", "PrefixTuningConfig"), inputs_for(build("llama"), 2)
    base = model.get_base_model()
    without = decode(build("llama"), inputs)
    assert torch.equal(decode(base, inputs), without)
    assert recall(base).path == "shared_prefix"
    prompted = decode(model, inputs)
    assert not torch.equal(prompted, without)
    assert torch.equal(decode(base, inputs), without)
    assert torch.equal(decode(model, inputs), prompted)


@pytest.mark.filterwarnings("ignore")
def test_a_learned_prompt_that_does_not_arrive_is_refused(monkeypatch):
    model = with_learned_prompt("llama", "PrefixTuningConfig")
    own = type(model).prepare_inputs_for_generation

    def without(self, *args, **kwargs):
        inputs = own(self, *args, **kwargs)
        for layer in inputs["past_key_values"].layers:
            layer.values.zero_()
        return inputs

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", without)
    with pytest.raises(ValueError, match="PeftModelForCausalLM: the prompt that PEFT has learned does not reach it"):
        decode(model, inputs_for(build("llama"), 2))


# ---- noise -----------------------------------------------------------------------------------------------------------


class Sensitive(torch.nn.Linear):
    """Makes 1 % of the last bit, as the rounding of activations to 8 bits does: always the same for the same bits, but
    no two orders of a sum agree."""

    def forward(self, x):
        return super().forward(x) * (1 + 0.01 * torch.sin(1e7 * x.sum(dim=-1, keepdim=True)))


def test_noise_of_the_models_own_is_allowed():
    model = build("llama")
    for module in model.model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Sensitive
    inputs = inputs_for(model, 2)
    out = decode(model, inputs)
    assert recall(model).path == "shared_prefix"
    assert torch.equal(decode(model, inputs), out)


class Rounded(torch.nn.Linear):
    """Rounds its inputs, as bitsandbytes' layers do: most changes in the last bit are swallowed."""

    def forward(self, x):
        return super().forward(x.bfloat16().float())


@pytest.mark.parametrize(
    ("layer", "quantised", "least", "most"),
    [
        (torch.nn.Linear, False, 0, 1e-4),
        (torch.nn.Linear, True, 0, 1e-4),
        (Rounded, True, 1e-3, 1),
        (Rounded, False, 0, 1e-3),
        (Sensitive, False, 1e-3, 1),
    ],
)
def test_noise_that_is_swallowed_most_of_the_time(layer, quantised, least, most):
    model, ids = build("llama"), prompt(2)
    model.hf_quantizer = object() if quantised else None
    for module in model.model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = layer
    with torch.no_grad():
        expected = model(ids).logits
        moved = moved_by_noise(model, lambda: error_of(model(ids).logits, expected))
    assert least < moved < most


def test_noise_is_for_this_thread_alone():
    model, ids = build("llama"), prompt(2)
    expected, seen = model(ids).logits, []

    def run():
        thread = threading.Thread(target=lambda: seen.append(model(ids).logits))
        thread.start()
        thread.join()
        return error_of(model(ids).logits, expected)

    with torch.no_grad():
        assert moved_by_noise(model, run) > 0
    assert all(torch.equal(logits, expected) for logits in seen)
    assert moved_by_noise(torch.nn.Linear(2, 2), lambda: 0.0) == 0  # with no embedding to be found


@pytest.mark.parametrize("quantised", [False, True])
def test_what_is_allowed_to_noise_is_not_allowed_to_an_error(monkeypatch, quantised):
    """An error of 2 % on a model that is not sensitive, whatever it calls itself."""
    own = Attention.attend

    def bent(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        return (1.02 * out[0], *out[1:])

    monkeypatch.setattr(Attention, "attend", bent)
    monkeypatch.setattr(attention, "native_call", lambda **_: None)
    model, inputs = build("llama"), inputs_for(build("llama"), 2)
    model.hf_quantizer = object() if quantised else None
    report = support(model, inputs)
    assert report.path == "reorder"
    assert "(allowed 0.001)" in report.reason


# ---- states, positions and tokens of their own -----------------------------------------------------------------------


def test_encoder_states_that_a_forward_writes_into():
    """Moonshine's streaming decoder adds its positions to the encoder's states in place, at every forward."""
    make = getattr(transformers, "MoonshineStreamingForConditionalGeneration", None)
    if make is None:
        pytest.skip("no Moonshine streaming in this transformers")
    encoder = SMALL | {"num_key_value_heads": 4, "head_dim": 8, "sliding_windows": [[16, 4], [16, 0]]}
    config = transformers.MoonshineStreamingConfig(
        **TOKENS, **SMALL, num_key_value_heads=4, head_dim=8, encoder_config=encoder, decoder_start_token_id=2
    )
    model = draw(make(config), std=0.35)
    inputs = {"input_values": torch.randn(1, 640, generator=torch.Generator().manual_seed(0))}
    first = decode(model, inputs)
    assert torch.equal(decode(model, inputs), first)
    assert torch.equal(decode(model, inputs, path="uncached"), first)
    assert torch.equal(decode(model, inputs, penalty_alpha=0.0), greedy(model, inputs))
    report = support(model, inputs)
    assert report.path == "reorder"
    assert all(check.passed for check in report.checks if check.name != "shared_prefix")


@pytest.mark.parametrize("rows", [1, 2])
def test_a_state_that_is_not_selected_with_the_cache(rows):
    """MiniMax's cache holds the states of its linear attention beside its layers, where `reorder_cache` leaves them."""
    sizes = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "num_local_experts": 2}
    sizes |= {"layer_types": ["linear_attention", "full_attention"]}
    model = draw(transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(**TOKENS, **sizes)), 0.35)
    inputs = {"input_ids": prompt(rows)}
    out = decode(model, inputs)
    assert recall(model).path == "uncached"
    assert torch.equal(decode(model, inputs, path="uncached"), out)
    with pytest.raises(ValueError, match="path='reorder': reorder: "):
        decode(model, inputs, path="reorder")


def test_a_forward_that_cannot_be_repeated_is_refused():
    model, random = build("llama"), torch.Generator().manual_seed(0)
    model.model.norm.register_forward_hook(lambda m, a, out: out + torch.randn(out.shape, generator=random))
    with pytest.raises(ValueError, match="its forward gives something else each time"):
        decode(model, inputs_for(model, 1))


def test_a_decoder_that_does_not_look_at_its_source():
    side = TOKENS | SMALL | {"model_type": "bert", "max_position_embeddings": 64}
    sides = {"encoder": side, "decoder": dict(side)}
    config = transformers.EncoderDecoderConfig(**sides, decoder_start_token_id=1, pad_token_id=0)
    model = draw(transformers.EncoderDecoderModel(config), std=0.35)
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 1, 0
    inputs = inputs_for(build("t5"), 2)
    out = decode(model, inputs)
    assert recall(model).path == "shared_prefix"
    assert torch.equal(decode(model, inputs, path="reorder"), out)


def test_images_in_the_uncached_path_of_idefics():
    vision = {"embed_dim": 32, "image_size": 8, "patch_size": 4, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.IdeficsConfig(
        **TOKENS, **SMALL, max_position_embeddings=128, cross_layer_interval=1, additional_vocab_size=2,
        freeze_text_layers=False, freeze_vision_layers=False, alpha_initializer="ones", alpha_type="float",
        use_resampler=False, vision_config=vision | {"intermediate_size": 48},
    )  # fmt: skip
    model = draw(transformers.IdeficsForVisionText2Text(config), std=0.35)
    pixels = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": prompt(2, 6), "pixel_values": pixels, "image_attention_mask": torch.ones(2, 6, 1).long()}
    report = support(model, inputs)
    assert report.path == "reorder"
    if CACHE_NAME != "cache":
        pytest.skip("before transformers 5.24 it could not be run without a cache")
    assert report.checks[-1].passed
    assert torch.equal(decode(model, inputs, path="uncached"), decode(model, inputs))


def test_positions_of_its_own_before_the_text():
    """GIT puts an image's positions before the text, which its mask does not know of."""
    vision = SMALL | {"image_size": 8, "patch_size": 4, "num_hidden_layers": 1}
    config = transformers.GitConfig(**TOKENS, **SMALL, max_position_embeddings=64, vision_config=vision)
    model = draw(transformers.GitForCausalLM(config), std=0.35)
    inputs = inputs_for(model, 2) | {
        "pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    }
    whole = inputs | {"input_ids": prompt(2), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    out = decode(model, whole)
    assert torch.equal(decode(model, whole), out)
    assert torch.equal(decode(model, whole, penalty_alpha=0.0), greedy(model, whole))
    with pytest.raises(ValueError, match="attention_mask covers 9 positions, but GitForCausalLM made hidden"):
        decode(model, inputs)


def test_tokens_that_it_writes_and_cannot_read():
    """Some write codes of sounds, more than their input embedding has tokens."""
    model = build("llama")
    model.lm_head = torch.nn.Linear(32, 4 * VOCABULARY, bias=False)
    draw(model)
    inputs = inputs_for(model, 1)
    with pytest.raises(ValueError, match=rf"would go on with token \d+, but its input embedding has {VOCABULARY}"):
        decode(model, inputs)
    readable = decode(model, inputs, suppress_tokens=list(range(VOCABULARY, 4 * VOCABULARY)))
    assert int(readable.max()) < VOCABULARY


def with_one_token_more(boosted_after, end):
    """A model that writes a token which it cannot read, from a length on, and a processor that has the first row end
    just before it."""
    model = build("llama")
    model.lm_head = torch.nn.Linear(32, VOCABULARY + 1, bias=False)
    draw(model)

    def processor(ids, scores):
        scores = scores.clone()
        scores[:, VOCABULARY] = -torch.inf
        if ids.shape[1] >= boosted_after:
            scores[0, VOCABULARY] = 100.0
        if ids.shape[1] == boosted_after - 1:
            scores[0, end] = 1000.0
        return scores

    return model, processor


def test_what_a_finished_row_would_write_is_nobodys_concern():
    model, processor = with_one_token_more(12, end=5)
    inputs = {"input_ids": prompt(2), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    out = decode(model, inputs, logits_processor=[processor], eos_token_id=5, pad_token_id=0)
    assert out[0, 11] == 5
    assert not out[0, 12:].any()
    with pytest.raises(ValueError, match=f"would go on with token {VOCABULARY}, "):
        decode(model, inputs, logits_processor=[processor])


def test_the_request_that_cannot_be_gone_on_with_fails_alone():
    model, processor = with_one_token_more(12, end=5)

    def readable(ids, scores):
        return scores.index_fill(-1, torch.tensor([VOCABULARY]), -torch.inf)

    def factory(request, tokenizer):
        return processor if request["id"] == 1 else readable

    requests = [{"id": i, "prompt": tokenizer().decode(prompt(1, 9, seed=i)[0])} for i in range(3)]
    engine = Engine(model, tokenizer(), slots=3, max_new_tokens=8, processor=factory)
    results = {result.id: result for result in engine.generate(requests)}
    assert results[1].error["type"] == "unknown_token"
    assert len(results[0].token_ids) == len(results[2].token_ids) == 8


# ---- batch mates -----------------------------------------------------------------------------------------------------


def roformer():
    sizes = SMALL | {"embedding_size": 32, "max_position_embeddings": 64}
    return draw(transformers.RoFormerForCausalLM(transformers.RoFormerConfig(**TOKENS, **sizes, is_decoder=True)), 0.35)


@pytest.mark.parametrize(("make", "batches"), [(lambda: build("bloom"), 2), (roformer, 3)], ids=["bloom", "roformer"])
def test_rows_of_a_batch_are_what_they_are_alone(make, batches):
    """RoFormer reads padding; rows of one length are what is left to put together."""
    model = make()
    prompts = [prompt(1, length, seed=length) for length in (13, 4, 9, 4, 9)]
    engine = Engine(model, tokenizer(), slots=3, max_new_tokens=8)
    assert ("only prompts of one length go together" in engine.reason) == (batches == 3)
    requests = [{"id": i, "prompt": tokenizer().decode(ids[0])} for i, ids in enumerate(prompts)]
    results = {result.id: result for result in engine.generate(requests)}
    for index, ids in enumerate(prompts):
        alone = decode(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, new_tokens=8)
        assert results[index].token_ids == alone[0, -8:].tolist()
    assert engine.stats["steps"] == 8 * batches


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_padding_that_shows_in_half_precision(dtype):
    sizes = SMALL | {"embedding_size": 32, "max_position_embeddings": 64}
    model = draw(transformers.RoFormerForCausalLM(transformers.RoFormerConfig(**TOKENS, **sizes, is_decoder=True)), 0.2)
    assert change_by_padding(model, 0) is not None
    assert change_by_padding(model.to(dtype), 0) is not None
    assert change_by_padding(build("bloom").to(dtype), 0) is None


def test_the_trial_with_padding_stays_in_a_table_of_positions():
    config = transformers.GPTNeoConfig(
        **TOKENS, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=16, window_size=12,
        attention_types=[[["global", "local"], 1]],
    )  # fmt: skip
    assert change_by_padding(draw(transformers.GPTNeoForCausalLM(config)), 0) is None


@pytest.mark.parametrize(
    "setting", [{"stop_strings": ["zz"]}, {"token_healing": True}, {"cache_implementation": "quantized"}], ids=str
)
@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_checkpoints_settings_of_generate_do_not_keep_the_engine(name, setting):
    requests = [{"id": i, "prompt": tokenizer().decode(prompt(1, 5 + i)[0])} for i in range(3)]
    written = []
    for settings in ({}, setting):
        model = build(name)
        for key, value in settings.items():
            setattr(model.generation_config, key, value)
        engine = Engine(model, tokenizer(), slots=2, max_new_tokens=6)
        written.append((engine.stats["batching"], [result.token_ids for result in engine.generate(requests)]))
    assert written[0] == written[1]


def test_slots_obey_the_step_that_generate_means():
    """A model whose cached step is not what recomputing gives: the engine follows the same one as ``generate``."""
    config = transformers.MoshiConfig(**TOKENS, **SMALL, head_dim=8, max_position_embeddings=128, sliding_window=4)
    model = draw(transformers.MoshiForCausalLM(config), std=0.35)
    ids = prompt(1, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = decode(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, new_tokens=8)
        engine = Engine(model, tokenizer(), slots=2, max_new_tokens=8)
        result = next(iter(engine.generate([{"prompt": tokenizer().decode(ids[0])}])))
    assert result.token_ids == alone[0, -8:].tolist()
    assert recall(model).path == "reorder"
