"""Texts in, texts out: a T5 that has learned something, folders of every make, and transformers' own pipeline."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import shutil
import string

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline, set_seed

from simctg_fast import ContrastiveGenerator, ContrastiveSearch, bundled_model_path
from simctg_fast.compat import T5SimCTGGenerate
from simctg_fast.cpu import modules
from simctg_fast.cpu.forwards import _held
from simctg_fast.decoding.caches import CACHE_NAME
from simctg_fast.loading import load_tokenizer
from simctg_fast.ops import _backends
from simctg_fast.reference.t5_tutorial import TutorialT5Generate
from simctg_fast.text.batches import pad_token

from .. import toy_t5
from ..decoding_models import build, tokenizer


@pytest.fixture(scope="session")
def trained_t5(tmp_path_factory):
    return toy_t5.train(tmp_path_factory.mktemp("toy_t5"))


@pytest.fixture
def reverse(trained_t5):
    return ContrastiveGenerator.from_pretrained(trained_t5, device=-1)


# ---- what a trained model answers --------------------------------------------------------------------------------


def test_the_answers_are_right(reverse):
    texts = toy_t5.held_out(60)
    answers = reverse(texts, max_length=32, top_k=3, penalty_alpha=0.5)
    right = [toy_t5.answer(text) == answer for text, answer in zip(texts, answers, strict=True)]
    assert sum(right) >= 57
    assert len(set(texts)) > 50, "the texts differ"


@pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_16_bits_go_through_the_kernels(kind, dtype, request, monkeypatch):
    """No linear layer is left to PyTorch, and what float32 was trained to say is still said. (That every step is as
    close to float64 as the model's own modules are is tested in `decoding/test_16_bit.py`.)"""
    if kind == "t5":
        generator = ContrastiveGenerator.from_pretrained(request.getfixturevalue("trained_t5"), device=-1, dtype=dtype)
        texts, settings = toy_t5.held_out(20), {"top_k": 3, "penalty_alpha": 0.5}
    else:
        generator = ContrastiveGenerator(build("gpt2").to(dtype), tokenizer())
        texts, settings = ["Contrast", "ive search", "x"], {"max_length": 12}
    assert generator.model.dtype == dtype
    products, left, original = [], [], modules.run_kernel
    monkeypatch.setattr(modules, "run_kernel", lambda x, *args: products.append(x.dtype) or original(x, *args))
    for name in ("_LINEAR_FORWARD", "_CONV1D_FORWARD"):
        own = getattr(modules, name)
        monkeypatch.setattr(modules, name, lambda self, x, own=own: left.append(x.dtype) or own(self, x))
    answers = generator(texts, **settings)
    assert products.count(dtype) > 0
    assert not left
    if kind == "t5":
        right = [toy_t5.answer(text) == answer for text, answer in zip(texts, answers, strict=True)]
        assert sum(right) >= 18
    else:
        assert generator(texts[::-1], **settings) == answers[::-1]


def test_the_order_and_the_batch_size_do_not_matter(trained_t5, reverse):
    texts = toy_t5.held_out(21)
    answers = reverse(texts)
    assert reverse(texts[::-1]) == answers[::-1]
    one_by_one = ContrastiveGenerator.from_pretrained(trained_t5, device="cpu", batch_size=1)
    assert one_by_one(texts) == answers
    assert reverse([]) == []


@pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")
def test_the_decoder_is_packed_once_for_all_batches(trained_t5, monkeypatch):
    """Where that pays, by the size of a full batch: not the encoder, nor the output embedding, and gone afterwards."""
    packed, original = [], modules.pack_weight
    monkeypatch.setattr(modules, "pack_weight", lambda *args: packed.append(args[0]) or original(*args))
    texts = toy_t5.held_out(7)
    small = ContrastiveGenerator.from_pretrained(trained_t5, device="cpu", batch_size=3)
    answers = small(texts)
    assert not packed, "9 rows are too few"
    large = ContrastiveGenerator.from_pretrained(trained_t5, device="cpu", batch_size=4)
    assert large(texts) == answers
    if not modules.packing_pays(large.model, 12):
        assert not packed
        return
    names = {id(parameter): name for name, parameter in large.model.named_parameters()}
    found = [names[id(weight)] for weight in packed]
    linears = [name for name, module in large.model.decoder.named_modules() if type(module) is torch.nn.Linear]
    assert found == [f"decoder.{name}.weight" for name in linears]
    assert not _held
    monkeypatch.setattr(modules, "free_bytes", lambda device: 0)
    assert large(texts) == answers
    assert len(packed) == len(linears)


def test_the_published_class_answers_the_same(trained_t5, reverse):
    texts = toy_t5.held_out(8)
    assert T5SimCTGGenerate(trained_t5, gpu_id=-1, max_length=32)(texts) == reverse(texts, max_length=32)


def test_the_restated_tutorial_is_what_it_says(reverse):
    """With one candidate nothing can be chosen wrongly, and it is greedy search."""
    texts = toy_t5.held_out(8)
    restated = TutorialT5Generate(reverse.model, reverse.tokenizer, max_length=12, num_beams=1)
    encoded = reverse.tokenizer(texts, padding=True, return_tensors="pt")
    greedy = reverse.model.generate(**encoded, max_new_tokens=12, do_sample=False, num_beams=1)
    assert restated(texts) == reverse.tokenizer.batch_decode(greedy, skip_special_tokens=True)


def test_the_restated_tutorial_under_either_name_of_the_cache(reverse, monkeypatch):
    """transformers 5.24 renamed ``past_key_values``; 4.55.4, whose figures it is measured beside, has the old name."""
    texts = toy_t5.held_out(4)
    answers = TutorialT5Generate(reverse.model, reverse.tokenizer, max_length=12)(texts)
    other, forward = {"cache": "past_key_values", "past_key_values": "cache"}[CACHE_NAME], reverse.model.forward

    def renamed(**arguments):
        output = forward(**{CACHE_NAME if name == other else name: value for name, value in arguments.items()})
        return {other if name == CACHE_NAME else name: value for name, value in output.items()}

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("encoder_outputs", other)]
    renamed.__signature__ = inspect.Signature(parameters)

    class Output(dict):
        __getattr__ = dict.__getitem__

    monkeypatch.setattr(reverse.model, "forward", functools.wraps(renamed)(lambda **given: Output(renamed(**given))))
    restated = TutorialT5Generate(reverse.model, reverse.tokenizer, max_length=12)
    assert restated.cache_name == other
    assert restated(texts) == answers


def test_encoder_once_and_decoder_until_the_last_row_has_ended(trained_t5):
    generator = ContrastiveGenerator.from_pretrained(trained_t5, device=-1, batch_size=4)
    model, encoder, decoder = generator.model, [], []
    model.get_encoder().register_forward_hook(lambda *args: encoder.append(1))
    model.get_decoder().register_forward_hook(lambda *args: decoder.append(1))
    texts = toy_t5.held_out(40)
    short, long = [t for t in texts if len(t.split()) == 2][:4], [t for t in texts if len(t.split()) == 3][:4]
    generator(short + long)  # the first steps of a model are checked by running them twice
    encoder.clear()
    decoder.clear()
    answers = generator(short + long, max_length=64)
    assert len(encoder) == 2
    lengths = [max(len(generator.tokenizer(text).input_ids) for text in part) for part in (answers[:4], answers[4:])]
    assert len(decoder) <= sum(lengths) + 2
    assert generator(long, max_length=2) != answers[4:], "and never beyond max_length"


def test_nothing_but_the_model_is_kept(reverse):
    def tensors():
        gc.collect()
        return sum(each.numel() for each in gc.get_objects() if type(each) is torch.Tensor)

    texts = toy_t5.held_out(32)
    reverse(texts)
    before = tensors()
    reverse(texts)
    assert tensors() == before


def test_truncation_is_reported(reverse, caplog):
    long = " ".join(toy_t5.WORDS)
    with caplog.at_level(logging.WARNING, "simctg_fast"):
        answers = reverse(["red sun", long, "sun red"], max_length=5)
    assert reverse.truncated == [1]
    assert "1 of 3 texts were cut to max_length=5 tokens: texts 1" in caplog.text
    assert answers[1] == reverse([" ".join(toy_t5.WORDS[:4])], max_length=5)[0], "an end-of-sequence token is left"
    assert reverse.truncated == []


def test_random_choices(reverse):
    texts = toy_t5.held_out(8)
    wild = [reverse(texts, max_length=8, top_k=8, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert wild[0] == wild[1] != wild[2]


def test_texts_however_they_are_given(reverse):
    texts = toy_t5.held_out(3)
    answers = reverse(texts)
    assert reverse(texts[0]) == answers[:1], "a string is one text"
    assert reverse(tuple(texts)) == reverse(np.array(texts)) == reverse(text for text in texts) == answers
    published = T5SimCTGGenerate.__new__(T5SimCTGGenerate)
    published.model, published.tokenizer, published.device = reverse.model, reverse.tokenizer, reverse.device
    published.strategy, published.max_length = ContrastiveSearch(0.5, 3), 32
    assert published(texts[0]) == published(iter(texts[:1])) == answers[:1]
    for generate in (reverse, published):
        with pytest.raises(ValueError, match=r"texts\[1\] must be text, got half of a surrogate pair in 'x\\ud83d'"):
            generate(["x", "x\ud83d"])
        with pytest.raises(ValueError, match="got dict"):
            generate({"text": "a"})


def test_a_tokenizer_that_gives_nothing(reverse, monkeypatch):
    monkeypatch.setattr(reverse, "tokenizer", lambda texts, **options: None)
    with pytest.raises(ValueError, match=r"texts\[0\] cannot be tokenized \(the tokenizer returned None\), got 'a'"):
        reverse(["a", "b"])


# ---- folders of every make -----------------------------------------------------------------------------------------

TEXTS = ["the quick brown fox jumps over the lazy dog", "seven wizards", "over and over again the fox jumps"]


def bpe_tokenizer(kind):
    """A byte-level vocabulary of the letters, as BART's and GPT-2's files look."""
    vocabulary = {token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "Ġ"])}
    vocabulary |= {letter: index + 5 for index, letter in enumerate(string.ascii_lowercase)}
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    if kind is transformers.GPT2Tokenizer:
        del ends["pad_token"]  # as GPT-2 comes
    return kind(vocab=vocabulary, merges=[], **ends)


def write_folder(kind, folder):
    sizes = {
        "mt5": {"d_kv": 8},
        "bart": {"max_position_embeddings": 64, "eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0},
        "pegasus": {"max_position_embeddings": 64, "eos_token_id": 1, "pad_token_id": 0},
        "gpt2": {"n_positions": 64, "eos_token_id": 2, "bos_token_id": 0},
    }[kind]
    if kind in ("mt5", "pegasus"):
        toy_t5.train_sentencepiece(folder, TEXTS * 3)
    else:
        bpe_tokenizer(transformers.BartTokenizer if kind == "bart" else transformers.GPT2Tokenizer).save_pretrained(
            folder
        )
    base = {"mt5": "t5", "pegasus": "bart"}.get(kind, kind)
    options = {"vocab_size": 260} | sizes
    model = build(base, std=0.5, **options)
    names = {
        "mt5": ("MT5Config", "MT5ForConditionalGeneration"),
        "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration"),
    }
    if kind in names:
        config, cls = (getattr(transformers, name) for name in names[kind])
        own = config(
            **{
                key: value
                for key, value in model.config.to_dict().items()
                if key not in ("model_type", "architectures")
            }
        )
        torch.manual_seed(0)
        model = cls(own)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["mt5", "bart", "pegasus", "gpt2"])
def folder(request, tmp_path_factory):
    return write_folder(request.param, tmp_path_factory.mktemp(request.param))


def test_folders_of_every_make(folder, caplog):
    generator = ContrastiveGenerator.from_pretrained(folder, device="cpu", batch_size=2)
    with caplog.at_level(logging.WARNING):
        answers = generator(TEXTS, max_length=50, top_k=4, penalty_alpha=0.6)
    assert not caplog.records
    assert len(set(answers)) == 3
    model, own = generator.model, generator.tokenizer
    for text, answer in zip(TEXTS, answers, strict=True):
        inputs = own(text, return_tensors="pt")
        start = 1 if model.config.is_encoder_decoder else inputs.input_ids.shape[1]
        most = 50 if model.config.is_encoder_decoder else min(50, 64 - start)
        search = ContrastiveSearch(0.6, 4, path="uncached")
        out = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            custom_generate=search,
            max_new_tokens=most,
        )
        assert own.decode(out[0, start:], skip_special_tokens=True) == answer


def test_a_continuation_has_its_space(tmp_path):
    """Of a decoder with sentencepiece: prompt and answer are what the model has read and written."""
    toy_t5.train_sentencepiece(tmp_path, TEXTS * 3, model_type="bpe", bos_id=3)
    own = AutoTokenizer.from_pretrained(_as_llama(tmp_path))
    generator = ContrastiveGenerator(build("llama", std=0.5, vocab_size=len(own)), own, batch_size=2)
    answers = generator(TEXTS, max_length=60)
    spaces = 0
    for text, answer in zip(TEXTS, answers, strict=True):
        inputs = own(text, return_tensors="pt")
        pad = pad_token(own, generator.model.config)
        out = generator.model.generate(
            **inputs, custom_generate=ContrastiveSearch(0.5, 3), max_new_tokens=60, pad_token_id=pad
        )
        assert text + answer == own.decode(out[0], skip_special_tokens=True)
        spaces += answer.startswith(" ")
    assert spaces, "or nothing was tried"


def _as_llama(folder):
    shutil.move(folder / "spiece.model", folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": false}')
    return folder


def test_a_text_longer_than_the_model(folder):
    generator = ContrastiveGenerator.from_pretrained(folder, device=-1)
    text = " ".join(TEXTS * 6)
    if generator.model.config.model_type == "mt5":  # no table of positions
        assert len(generator([text], max_length=400)) == 1
        return
    with pytest.raises(
        ValueError, match=r"texts\[1\] has \d+ tokens, but the model's table of positions holds 64; .*max_length"
    ):
        generator(["seven", text], max_length=400)
    assert len(generator(["seven", text], max_length=40)) == 2
    assert generator.truncated == [1]


def test_a_decoders_prompt_keeps_its_end(tmp_path):
    generator = ContrastiveGenerator.from_pretrained(write_folder("gpt2", tmp_path), device=-1)
    prompt = "abcdefghijklmnopqrstuvwxyz"
    assert generator([prompt], max_length=10) == generator([prompt[-10:]], max_length=10)
    assert generator.tokenizer.truncation_side == "right", "as it was"
    with pytest.raises(ValueError, match=r"texts\[1\] must have at least one token, got ''"):
        generator(["a", ""])


def test_sentencepiece_and_its_json_are_the_same_tokenizer(trained_t5, tmp_path):
    own = load_tokenizer(trained_t5)
    assert not (trained_t5 / "tokenizer.json").exists()
    own.save_pretrained(tmp_path)
    shutil.copy(trained_t5 / "config.json", tmp_path)
    texts = toy_t5.held_out(5)
    assert load_tokenizer(tmp_path)(texts)["input_ids"] == own(texts)["input_ids"]


# ---- bad input -----------------------------------------------------------------------------------------------------


def copy_without_tokenizer(source, target):
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("spiece.model", "tokenizer*"))
    return target


def test_a_folder_without_its_tokenizer(trained_t5, tmp_path):
    bare = copy_without_tokenizer(trained_t5, tmp_path / "bare")
    (bare / "vocabulary.bin").write_text("what is this")
    with pytest.raises(ValueError, match=r"bare' holds no tokenizer: a T5Tokenizer needs one of \['spiece.model'"):
        ContrastiveGenerator.from_pretrained(bare)


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.json"])
def test_a_tokenizer_file_that_is_none(trained_t5, tmp_path, name):
    bare = copy_without_tokenizer(trained_t5, tmp_path / "bare")
    (bare / name).write_text("what is this")
    with pytest.raises(ValueError, match=r"the tokenizer in '.*bare' cannot be read"):
        ContrastiveGenerator.from_pretrained(bare)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (({"one": 1},), r"texts must be a string or a list of strings, got dict \{'one': 1\}"),
        ((["a", 3],), r"texts must be a string or a list of strings, but texts\[1\] is int 3"),
        ((["a"], 0), r"max_length must be an integer of at least 1, got 0"),
        ((["a"], 8, 0), r"top_k must be .* got 0"),
        ((["a"], 8, 3, 1.5), r"penalty_alpha must be .* got 1\.5"),
    ],
)
def test_bad_values(reverse, arguments, text):
    with pytest.raises(ValueError, match=text):
        reverse(*arguments)


def test_bad_settings(reverse, trained_t5):
    with pytest.raises(ValueError, match="seed=1 needs a temperature"):
        reverse(["a"], seed=1)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        ContrastiveGenerator(reverse.model, reverse.tokenizer, batch_size=0)
    with pytest.raises(FileNotFoundError, match="no model folder"):
        ContrastiveGenerator.from_pretrained("./nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device must be one that this torch can use, got 'cuda:0'"):
            ContrastiveGenerator.from_pretrained(trained_t5, device=0)


# ---- transformers' pipeline ------------------------------------------------------------------------------------------

PROMPT = "The return value of the function is"


@pytest.fixture(scope="module")
def pipe():
    folder = str(bundled_model_path())
    return pipeline("text-generation", model=folder, tokenizer=folder)


def texts_of(out):
    return [each["generated_text"] for each in out]


def test_the_pipeline_of_the_tutorials(pipe):
    """Seeds, several different texts, a bound on the whole length."""
    arguments = {"max_length": 24, "num_return_sequences": 3, "truncation": True, "do_sample": True}
    strategy = ContrastiveSearch(top_k=6, temperature=0.3)
    runs = []
    for seed in (123, 123, 7):
        set_seed(seed)
        runs.append(texts_of(pipe(PROMPT, custom_generate=strategy, max_new_tokens=None, **arguments)))
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) == 3
    assert all(text.startswith(PROMPT) for text in runs[0])
    assert {len(pipe.tokenizer(text).input_ids) for text in runs[0]} <= set(range(8, 25))


def test_pipeline_return_full_text_and_batches(pipe):
    arguments = {"custom_generate": ContrastiveSearch(0.6, 4), "max_new_tokens": 12}
    full = texts_of(pipe(PROMPT, **arguments))[0]
    assert texts_of(pipe(PROMPT, return_full_text=False, **arguments)) == [full[len(PROMPT) :]]
    several = pipe([PROMPT, "import"], batch_size=2, **arguments)
    assert texts_of(several[0]) == [full]
    assert texts_of(several[1]) == texts_of(pipe("import", **arguments))


def test_pipeline_streams(pipe):
    streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True)
    out = pipe(PROMPT, custom_generate=ContrastiveSearch(0.6, 4, streamer=streamer), max_new_tokens=12)
    assert PROMPT + "".join(streamer) == out[0]["generated_text"]


def test_pipeline_with_plain_sampling_still_differs(pipe):
    set_seed(123)
    out = texts_of(pipe(PROMPT, max_new_tokens=8, num_return_sequences=3, do_sample=True))
    assert len(set(out)) == 3


def test_generator_of_a_model_at_hand():
    model = build("llama")
    generator = ContrastiveGenerator(model, tokenizer(), batch_size=2)
    answers = generator(["Contrast", "x", "ive search"], max_length=10)
    assert len(set(answers)) == 3
    assert generator(["x"], max_length=10) == answers[1:2]


def test_the_bundled_model_continues_as_generate_does():
    model = AutoModelForCausalLM.from_pretrained(bundled_model_path()).eval()
    own = AutoTokenizer.from_pretrained(bundled_model_path())
    inputs = own(PROMPT, return_tensors="pt")
    out = model.generate(**inputs, custom_generate=ContrastiveSearch(0.5, 3), max_new_tokens=16, do_sample=False)
    expected = own.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert ContrastiveGenerator.from_pretrained("bundled", device=-1)([PROMPT], max_length=16) == [expected]
