"""The trial before a call: what it has to find out, on models where a step of ours went wrong without a word."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
import transformers

from simctg_fast import ContrastiveSearch, support
from simctg_fast.decoding import slots, trial
from simctg_fast.decoding.caches import CACHE_NAME
from simctg_fast.decoding.report import recall
from simctg_fast.decoding.slots import SlotLayer
from simctg_fast.engine import Engine
from simctg_fast.reference.contrastive_search import contrastive_search, true_float64

from ..decoding_models import VOCABULARY, build, decode, draw, greedy, inputs_for, left_padded, prompt, tokenizer
from ..near_ties import same_tokens

TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
}
ALONE = {"is_decoder": True, "is_encoder_decoder": False}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}


def drawn(model, seed=0):
    return draw(model, std=0.35, seed=seed)


def t5gemma(window=4):
    side = TOKENS | SIZES | {"sliding_window": window, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.T5GemmaConfig(
        encoder=dict(side), decoder=dict(side, cross_attention_hidden_size=32), tie_word_embeddings=False, **TOKENS
    )
    config.decoder_start_token_id = 1
    model = drawn(transformers.T5GemmaForConditionalGeneration(config))
    model.generation_config.decoder_start_token_id = 1
    return model


def blip(seed=0):
    text = TOKENS | {"sep_token_id": 2, "hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "projection_dim": 32}
    config = transformers.BlipConfig(text_config=text, vision_config=VISION | {"projection_dim": 32})
    return drawn(transformers.BlipForConditionalGeneration(config), seed=seed)


def doge():
    sizes = SIZES | {"keep_window_size": 4}
    config = transformers.DogeConfig(**TOKENS, **sizes, tie_word_embeddings=False)
    return drawn(transformers.DogeForCausalLM(config))


def truth(model, inputs, new_tokens=12, banned=()):
    """The definition in float64, without a cache."""
    double = copy.deepcopy(model).double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask", None)
    with true_float64(), torch.no_grad():
        return contrastive_search(
            double,
            ids,
            mask,
            **inputs,
            penalty_alpha=0.6,
            top_k=4,
            max_new_tokens=new_tokens,
            logits_processor=without(banned),
        ).sequences


def without(banned):
    def processor(ids, scores):
        return scores.index_fill(-1, torch.tensor(banned, dtype=torch.long), -torch.inf)

    return processor


def test_t5gemma_reads_all_of_a_source_longer_than_its_window():
    """Its cross-attention cache has no window, other than its own ``config`` says."""
    model, ids = t5gemma(), prompt(2, 11)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    # Without a cache it takes a pad token in its own text for padding.
    expected = truth(model, inputs, banned=[0])
    for path in ("auto", "shared_prefix", "reorder", "uncached"):
        out = decode(model, inputs, path=path, suppress_tokens=[0])
        same_tokens(out, expected, model, inputs, logits_processor=without([0]))
    assert recall(model).path == "shared_prefix"
    assert support(model).path == "shared_prefix"


def test_t5gemma_in_the_engine():
    model = t5gemma()
    engine = Engine(model, tokenizer(), slots=2, max_new_tokens=12)
    sources = [tokenizer().decode(prompt(1, length, seed=length)[0]) for length in (11, 17)]
    results = {r.id: r for r in engine.generate([{"id": i, "source": s} for i, s in enumerate(sources)])}
    for index, source in enumerate(sources):
        inputs = {"input_ids": tokenizer()(source, return_tensors="pt")["input_ids"]}
        expected = truth(model, inputs)
        assert results[index].error is None
        same_tokens([expected[0, :1].tolist() + results[index].token_ids], expected, model, inputs)


@pytest.mark.parametrize("seed", range(4))
def test_blip_says_the_same_at_every_call(seed):
    """Its prompt splits caches of one class only: a path of ours began with the wrong words, once."""
    model = blip(seed)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    ids = prompt(2, 3, seed)
    calls = [
        model.generate(pixel_values=images, input_ids=ids, custom_generate=ContrastiveSearch(0.6, 4), max_new_tokens=8)
        for _ in range(3)
    ]
    assert torch.equal(calls[0], calls[1])
    assert torch.equal(calls[0], calls[2])
    plain = model.generate(pixel_values=images, input_ids=ids, max_new_tokens=8, do_sample=False)
    ours = model.generate(
        pixel_values=images, input_ids=ids, custom_generate=ContrastiveSearch(0.0, 4), max_new_tokens=8
    )
    assert torch.equal(plain, ours)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("BartForCausalLM", lambda: transformers.BartConfig(**TOKENS, **BART, **ALONE)),
        ("MBartForCausalLM", lambda: transformers.MBartConfig(**TOKENS, **BART, **ALONE)),
        (
            "TrOCRForCausalLM",
            lambda: transformers.TrOCRConfig(
                **TOKENS, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
                max_position_embeddings=128, cross_attention_hidden_size=32,
            ),
        ),
        (
            "GPT2LMHeadModel",
            lambda: transformers.GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True),
        ),
    ],
)  # fmt: skip
def test_decoders_given_encoder_states(kind, config):
    """First call, second call, and greedy search as the model's own."""
    model = drawn(getattr(transformers, kind)(config()))
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(5))
    inputs = {"input_ids": prompt(2, 7), "encoder_hidden_states": states}
    first = decode(model, inputs)
    assert torch.equal(decode(model, inputs), first)
    assert torch.equal(decode(model, inputs, penalty_alpha=0.0), greedy(model, inputs))


def test_whisper_decoder_given_a_tuple_of_states():
    sizes = {name: value for name, value in BART.items() if name != "max_position_embeddings"}
    config = transformers.WhisperConfig(
        **TOKENS, **sizes, max_target_positions=128, max_source_positions=16, decoder_start_token_id=2
    )
    model = drawn(transformers.WhisperForCausalLM(config))
    states = (torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(5)),)
    inputs = {"input_ids": prompt(2, 7), "encoder_outputs": states}
    first = decode(model, inputs)
    assert torch.equal(decode(model, inputs), first)
    assert torch.equal(decode(model, inputs, penalty_alpha=0.0), greedy(model, inputs))


@pytest.mark.parametrize("inputs", [{"input_ids": prompt(1, 9)}, left_padded(9, 6)], ids=["one", "padded"])
def test_doge_reads_its_values_outside_of_attention(inputs):
    model = doge()
    out = decode(model, inputs)
    assert recall(model).path != "shared_prefix"
    assert torch.equal(decode(model, inputs), out)
    assert torch.equal(decode(model, inputs, penalty_alpha=0.0), greedy(model, inputs))
    if CACHE_NAME == "cache":  # before transformers 5.24 its own cached step was another one
        same_tokens(out, truth(model, inputs), model, inputs)


def test_a_reader_beyond_the_end_is_found_out(monkeypatch):
    """Of the keys and values that the cache hands out, the last are the candidates' to be: nobody may read them."""
    from transformers.models.llama import modeling_llama

    class Peeping(modeling_llama.LlamaAttention):
        def forward(self, hidden_states, **kwargs):
            cache = kwargs.get(CACHE_NAME)
            layer = cache.layers[self.layer_idx] if cache is not None else None
            peeped = 0.0
            if isinstance(layer, SlotLayer) and layer.extent.filling is None:
                peeped = 1e-9 * layer.values[:, :, layer.extent.length :].float().mean()  # far below any tolerance
            out, weights = super().forward(hidden_states, **kwargs)
            return out + peeped, weights

    model, inputs = build("llama"), {"input_ids": prompt(2)}
    expected = decode(build("llama"), inputs)
    model.model.layers[0].self_attn.__class__ = Peeping
    monkeypatch.setattr(trial, "FILLINGS", (3e3, -7e6))
    monkeypatch.setattr(slots, "fill_alternating", lambda buffer, value: buffer.fill_(value))
    assert torch.equal(decode(model, inputs), expected)
    assert recall(model).path == "reorder"
    assert "it reads keys or values beyond the end of its text" in recall(model).reason


@pytest.mark.parametrize("rows", [1, 2])
def test_every_candidate_of_every_row_is_compared(monkeypatch, rows):
    """A path that is wrong for one candidate of the last row alone is not taken."""
    from simctg_fast.decoding.step import Step

    original = Step.run

    def wrong(self, inputs, candidates, choose, **known):
        def bent(states):
            if states.shape[:2] == (rows, 4):
                states = states.clone()
                states[-1, 2] *= 1.1
            return choose(states)

        return original(self, inputs, candidates, bent, **known)

    model, inputs = build("llama"), {"input_ids": prompt(rows)}
    expected = decode(build("llama"), inputs)
    monkeypatch.setattr(Step, "run", wrong)
    assert torch.equal(decode(model, inputs), expected)
    assert recall(model).path == "reorder"


def test_the_prompts_logits_are_compared(monkeypatch):
    original = SlotLayer.update

    def update(self, keys, values, *args, **kwargs):
        out = original(self, keys, values, *args, **kwargs)
        return out if self.extent.filling is None else (out[0], 1.01 * out[1])

    model, inputs = build("llama"), {"input_ids": prompt(1)}
    expected = decode(build("llama"), inputs)
    monkeypatch.setattr(SlotLayer, "update", update)
    assert torch.equal(decode(model, inputs), expected)
    assert "logits of the prompt differ" in recall(model).reason


def test_a_kind_of_call_is_tried_once(monkeypatch):
    tried, original = [], trial.Truth.__init__

    def init(self, *args):
        tried.append(1)
        original(self, *args)

    monkeypatch.setattr(trial.Truth, "__init__", init)
    model = build("llama")
    for inputs in ({"input_ids": prompt(2)}, left_padded(9, 5), {"inputs_embeds": torch.randn(2, 5, 32)}):
        before = len(tried)
        decode(model, inputs)
        assert len(tried) == before + 1
        decode(model, inputs)
        decode(model, inputs, new_tokens=5)
        assert len(tried) == before + 1


def test_a_path_that_gives_up_in_the_middle_begins_again_from_the_prompt():
    """Tokens, scores and what a streamer heard are those of a call that took the other path from its start."""
    from transformers.generation.streamers import BaseStreamer

    class Kept(BaseStreamer):
        def __init__(self):
            self.heard = []

        def put(self, value):
            self.heard.append(value.flatten().tolist())

        def end(self):
            self.heard.append("end")

    model, inputs = build("llama"), {"input_ids": prompt(1)}
    options = {"return_dict_in_generate": True, "output_scores": True}
    expected = decode(build("llama"), inputs, path="reorder", **options)
    decode(model, inputs)
    calls = []

    def mystery(module, args, kwargs):
        calls.append(1)
        return (args, kwargs | {"mystery": 1.0}) if len(calls) > 5 else None

    model.model.layers[1].self_attn.register_forward_pre_hook(mystery, with_kwargs=True)
    streamer = Kept()
    out = model.generate(
        **inputs,
        custom_generate=ContrastiveSearch(0.6, 4, streamer=streamer),
        max_new_tokens=12,
        do_sample=False,
        **options,
    )
    same_tokens(out.sequences, expected.sequences, model, inputs)
    assert len(out.scores) == 12
    assert streamer.heard == [prompt(1)[0].tolist(), *([token] for token in out.sequences[0, 9:].tolist()), "end"]
    assert recall(model).path == "reorder"


# ---- refused by name -------------------------------------------------------------------------------------------------


def test_right_padding_of_a_decoder():
    padded = left_padded(9, 5)
    inputs = {name: value.flip(1) for name, value in padded.items()}
    with pytest.raises(ValueError, match=r"attention_mask is 0 at the end of row 1.*padding_side='left'"):
        decode(build("llama"), inputs)
    decode(build("bart"), inputs, new_tokens=2)  # a source may be


@pytest.mark.parametrize(
    "make",
    [
        lambda: transformers.DistilBertForMaskedLM(
            transformers.DistilBertConfig(vocab_size=98, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
        ),
        lambda: transformers.Blip2ForConditionalGeneration(
            transformers.Blip2Config(
                vision_config=VISION,
                qformer_config={"vocab_size": 98, "encoder_hidden_size": 32} | VISION,
                text_config=transformers.OPTConfig(
                    **TOKENS,
                    hidden_size=32,
                    word_embed_proj_dim=32,
                    ffn_dim=48,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                ).to_dict(),
                num_query_tokens=3,
                image_token_index=97,
            )
        ),
    ],
    ids=["distilbert", "blip2"],
)
def test_support_reports_and_never_raises(make):
    report = support(make().eval())
    assert report.path == "none"
    assert report.reason
    assert not report.head
    assert not any(check.passed for check in report.checks)


# ---- served, what was refused or went to the slowest path ------------------------------------------------------------


def test_an_embedding_that_serves_as_head_is_told_from_one_at_the_input():
    config = transformers.FSMTConfig(
        src_vocab_size=98, tgt_vocab_size=98, langs=["en", "de"], **BART, pad_token_id=0, bos_token_id=1,
        eos_token_id=None, decoder_start_token_id=2, forced_eos_token_id=None, num_beams=1,
    )  # fmt: skip
    model = drawn(transformers.FSMTForConditionalGeneration(config))
    model.generation_config.update(eos_token_id=None, forced_eos_token_id=None)
    ids = prompt(2, 7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    out = decode(model, inputs, new_tokens=6)
    assert recall(model).path == "reorder"
    # Given ids, its whole forward has the mask that it lacks beside encoder_outputs. (Before 5.24 its cached step was
    # another one.)
    if CACHE_NAME == "cache":
        same_tokens(out, truth(model, inputs, new_tokens=6), model, inputs)
    assert torch.equal(decode(model, inputs, penalty_alpha=0.0, new_tokens=6), greedy(model, inputs, new_tokens=6))
    assert torch.equal(decode(model, inputs, new_tokens=6), out)


def test_what_an_encoder_hands_on_besides_its_states():
    config = transformers.SwitchTransformersConfig(
        **TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, num_heads=4, num_experts=4, expert_capacity=64, decoder_start_token_id=0,
        dropout_rate=0.0, tie_word_embeddings=False,
    )  # fmt: skip
    model = drawn(transformers.SwitchTransformersForConditionalGeneration(config))
    inputs = inputs_for(model, 2)
    out = decode(model, inputs)
    assert recall(model).path == "shared_prefix"
    same_tokens(out, truth(model, inputs), model, inputs)


@pytest.mark.parametrize("name", ["llama", "bart"])
@pytest.mark.parametrize("what", ["output_hidden_states", "output_attentions"])
def test_the_uncached_path_hands_back_a_step_and_not_the_whole(name, what):
    model = build(name, attn_implementation="eager")
    inputs = inputs_for(model, 2)
    options = {"return_dict_in_generate": True, what: True}
    ours = decode(model, inputs, path="uncached", penalty_alpha=0.0, new_tokens=4, **options)
    theirs = greedy(model, inputs, new_tokens=4, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    field = ("decoder_" if name == "bart" else "") + ("hidden_states" if "hidden" in what else "attentions")
    for mine, own in zip(getattr(ours, field), getattr(theirs, field), strict=True):
        for a, b in zip(mine, own, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_layers_that_are_stacked_in_front_of_the_rows(batch):
    config = transformers.Gemma3nTextConfig(
        **TOKENS, **SIZES | {"num_hidden_layers": 4}, tie_word_embeddings=False, vocab_size_per_layer_input=98,
        hidden_size_per_layer_input=8, sliding_window=4, num_kv_shared_layers=0, laurel_rank=4, altup_num_inputs=4,
        activation_sparsity_pattern=[0.0] * 4, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model = drawn(transformers.Gemma3nForCausalLM(config))
    inputs = {"input_ids": prompt(batch, 7)}
    options = {"return_dict_in_generate": True, "output_hidden_states": True}
    ours = decode(model, inputs, penalty_alpha=0.0, new_tokens=4, **options)
    theirs = greedy(model, inputs, new_tokens=4, **options)
    for mine, own in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        for a, b in zip(mine, own, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_state_that_the_model_keeps_in_itself():
    """No copy of a cache holds it: transformers' own step has to run the text anew for each candidate."""
    config = transformers.RecurrentGemmaConfig(
        **TOKENS, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, lru_width=32, attention_window_size=4,
    )  # fmt: skip
    model, inputs = drawn(transformers.RecurrentGemmaForCausalLM(config)), {"input_ids": prompt(2)}
    out = decode(model, inputs)
    assert recall(model).path == "uncached"
    same_tokens(out, truth(model, inputs), model, inputs)
    assert torch.equal(decode(model, inputs, penalty_alpha=0.0), greedy(model, inputs))


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bart", "t5", "gpt2"])
def test_forwards_beside_an_engine(name):
    """Another thread's plain forwards of the model are its own, and the engine's texts do not change for them."""
    model = build(name)
    key = "source" if model.config.is_encoder_decoder else "prompt"
    requests = [
        {"id": i, key: tokenizer().decode(prompt(1, length, seed=i)[0])} for i, length in enumerate((5, 9, 13) * 3)
    ]

    def run():
        engine = Engine(model, tokenizer(), slots=3, batching="slots", max_new_tokens=8)
        return {result.id: result.token_ids for result in engine.generate(requests)}

    expected = run()
    inputs = inputs_for(model, 2)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = prompt(2, 5, seed=3)
    with torch.no_grad():
        logits = model(**inputs).logits
    stop, wrong, done = threading.Event(), [], []

    def forwards():
        with torch.no_grad():
            while not stop.is_set():
                try:
                    found = model(**inputs).logits
                    if found.shape != logits.shape or float((found - logits).abs().max()) > 1e-3:
                        wrong.append("other logits")
                except Exception as error:
                    wrong.append(repr(error))
                done.append(1)

    thread = threading.Thread(target=forwards)
    thread.start()
    try:
        for _ in range(3):
            assert run() == expected
    finally:
        stop.set()
        thread.join()
    assert done
    assert not wrong, wrong[:3]
    assert "forward" not in {key for module in model.modules() for key in vars(module)}


# ---- nothing outlives a call -----------------------------------------------------------------------------------------


@pytest.fixture
def layers_made(monkeypatch):
    """Weak references to all cache layers that were made, with the cycle collector off."""
    made = []
    for kind in (SlotLayer, transformers.cache_utils.DynamicLayer):
        original = kind.__init__

        def init(self, *args, original=original, **kwargs):
            original(self, *args, **kwargs)
            made.append(weakref.ref(self))

        monkeypatch.setattr(kind, "__init__", init)
    gc.collect()
    gc.disable()
    yield lambda: [kept for kept in (reference() for reference in made) if kept is not None]
    gc.enable()


@pytest.mark.parametrize("path", ["shared_prefix", "reorder", "uncached", "auto"])
@pytest.mark.parametrize("name", ["llama", "bart", "bloom", "mamba"])
@pytest.mark.parametrize("step", ["auto", True])
def test_no_buffer_outlives_a_call(name, path, step, layers_made):
    model = build(name)
    inputs = inputs_for(model, 2)
    for _ in range(2):
        try:
            model.generate(
                **inputs, custom_generate=ContrastiveSearch(0.6, 4, path=path, decode_step=step), max_new_tokens=6
            )
        except ValueError as error:
            assert "cannot be decoded" in str(error) or "decode_step=True" in str(error)  # noqa: PT017
            error.__traceback__ = None
            error.__cause__ = error.__context__ = None
        assert not layers_made()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_no_buffer_outlives_a_call_that_fails(error, layers_made):
    model, calls = build("llama"), []

    def fail(*args):
        calls.append(1)
        if len(calls) == fail.at:
            raise error

    model.model.layers[1].register_forward_hook(fail)
    for fail.at in (2, 60, 130):  # in the trial, in the call
        calls.clear()
        try:
            decode(model, inputs_for(model, 2), new_tokens=200)
        except error:
            pass
        else:
            pytest.fail("nothing was raised")
        assert not layers_made()


@pytest.mark.parametrize("name", ["llama", "bart", "bloom"])
def test_no_buffer_outlives_an_engine(name, layers_made):
    model = build(name)
    key = "source" if model.config.is_encoder_decoder else "prompt"
    requests = [{"id": i, key: tokenizer().decode(prompt(1, 5 + i)[0])} for i in range(3)]
    engine = Engine(model, tokenizer(), slots=2, max_new_tokens=5)
    assert len(list(engine.generate(requests))) == 3
    del engine
    assert not layers_made()
