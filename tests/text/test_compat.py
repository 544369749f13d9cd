"""Published classes under their published names."""

import unicodedata

import pytest
import sentencepiece
import torch
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

import simctg_fast
from simctg_fast import ContrastiveSearch, compat
from simctg_fast.compat import T5SimCTGGenerate

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Seven WIZARDS", "over and over and over again the fox jumps"]


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(text.lower() for text in TEXTS) * 3)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spiece"), vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def test_batch_equals_one_at_a_time_and_the_decoder(t5_folder):
    generate = T5SimCTGGenerate(t5_folder, gpu_id=-1, max_length=20, num_beams=3, simctg_alpha=0.5)
    together = generate(TEXTS)
    assert [generate([text])[0] for text in TEXTS] == together
    assert len(set(together)) == len(TEXTS)
    encoded = generate.tokenizer([TEXTS[1].lower()], return_tensors="pt")
    tokens = generate.model.generate(
        **encoded, custom_generate=ContrastiveSearch(0.5, 3, path="uncached"), max_new_tokens=20
    )
    assert generate.tokenizer.batch_decode(tokens, skip_special_tokens=True) == [together[1]]


def test_inputs_are_lower_cased_and_truncated(t5_folder):
    generate = T5SimCTGGenerate(t5_folder, gpu_id=-1, max_length=6)
    assert generate([TEXTS[1]]) == generate([TEXTS[1].lower()])
    assert generate([TEXTS[0]]) == generate([TEXTS[0] + " the fox again"])
    assert generate([]) == []


def test_published_defaults_and_bad_values(t5_folder):
    generate = T5SimCTGGenerate(t5_folder, gpu_id=-1)
    assert (generate.max_length, generate.strategy.top_k, generate.strategy.penalty_alpha) == (512, 3, 0.5)
    with pytest.raises(ValueError, match=r"penalty_alpha .* 1\.5"):
        T5SimCTGGenerate(t5_folder, simctg_alpha=1.5)
    with pytest.raises(ValueError, match=r"list of strings, but texts\[1\] is int 3"):
        generate(["a", 3])
    with pytest.raises(ValueError, match="model_dir must be an encoder-decoder, got a GPT2LMHeadModel in 'bundled'"):
        T5SimCTGGenerate("bundled", gpu_id=-1)
    with pytest.raises(FileNotFoundError, match="no model folder"):
        T5SimCTGGenerate("./nowhere", gpu_id=-1)


PUBLISHED = ("T5SimCTGGenerate", "compute_contrastive_loss", "t5_cosine_simirality", "t5_cosine_similarity")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_are_importable_as_they_are_spelt(name):
    assert getattr(simctg_fast, name) is getattr(compat, name)


def test_the_tutorials_spelling_computes_the_same():
    states = torch.randn(2, 5, 8)
    outputs = type("Outputs", (), {"decoder_hidden_states": (states,)})
    scores = simctg_fast.t5_cosine_simirality(outputs)
    assert torch.equal(scores, compat.t5_cosine_similarity(outputs))
    torch.testing.assert_close(
        simctg_fast.compute_contrastive_loss(scores, 0.5), simctg_fast.contrastive_loss(states, 0.5, reduction="dense")
    )


class Normalising(T5SimCTGGenerate):
    """What the tutorial asks its readers to add."""

    def preprocess(self, text):
        return super().preprocess(unicodedata.normalize("NFKC", text))


class Padded(T5SimCTGGenerate):
    """The tutorial's own way: one row, padded to the end."""

    def preprocess(self, text):
        return self.tokenizer(
            [text.lower()], max_length=self.max_length, truncation=True, padding="max_length", return_tensors="pt"
        )


class Bare(T5SimCTGGenerate):
    def preprocess(self, text):
        tokens = super().preprocess(text)
        return {name: tokens[name].squeeze(0) for name in ("input_ids", "attention_mask")}


class Shouting(T5SimCTGGenerate):
    def preprocess(self, text):
        return text.upper()


def test_an_overridden_preprocess_is_honoured(t5_folder):
    settings = {"gpu_id": -1, "max_length": 20}
    plain = T5SimCTGGenerate(t5_folder, **settings)
    full_width = ["".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in text) for text in TEXTS]
    assert Normalising(t5_folder, **settings)(full_width) == plain(TEXTS)
    assert plain(full_width) != plain(TEXTS)
    assert Padded(t5_folder, **settings)(TEXTS) == plain(TEXTS)
    assert Bare(t5_folder, **settings)(TEXTS) == plain(TEXTS)
    shouted = Shouting(t5_folder, **settings)(TEXTS)  # a string is tokenized as it is
    encoded = plain.tokenizer([TEXTS[0].upper()], return_tensors="pt")
    tokens = plain.forward(encoded.input_ids, encoded.attention_mask)
    assert shouted[:1] == plain.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert shouted != plain(TEXTS)
    plain.preprocess = lambda text: T5SimCTGGenerate.preprocess(plain, text[::-1])  # on the object itself
    assert plain(TEXTS) == T5SimCTGGenerate(t5_folder, **settings)([text[::-1] for text in TEXTS])


def test_an_overridden_forward_and_changed_settings_are_honoured(t5_folder):
    class Silent(T5SimCTGGenerate):
        def forward(self, batch_input_ids, batch_attention_mask):
            assert batch_input_ids.shape == batch_attention_mask.shape == (3, int(batch_attention_mask.sum(1).max()))
            return torch.zeros(len(batch_input_ids), 2, dtype=torch.long)

    assert Silent(t5_folder, gpu_id=-1)(TEXTS) == [""] * 3
    one, other = (T5SimCTGGenerate(t5_folder, -1, 20, k, alpha) for k, alpha in ((3, 0.5), (5, 0.9)))
    one.num_beams, one.simctg_alpha = 5, 0.9
    assert (one.num_beams, one.simctg_alpha, one.strategy.top_k, one.strategy.penalty_alpha) == (5, 0.9, 5, 0.9)
    assert one(TEXTS) == other(TEXTS)
    one.max_length = 3
    assert one(TEXTS) == T5SimCTGGenerate(t5_folder, -1, 3, 5, 0.9)(TEXTS)
    with pytest.raises(ValueError, match="penalty_alpha"):
        one.simctg_alpha = 2.0


@pytest.mark.parametrize(
    ("result", "match"),
    [
        (None, "preprocess must return a string or a mapping .*, got NoneType None for texts\\[1\\]"),
        ([1, 2], "preprocess must return a string or a mapping"),
        ({"input_ids": torch.ones(1, 3)}, "with input_ids and attention_mask, got dict"),
        ({"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}, r"must return \(1, length\) .*\(2, 3\)"),
        ({"input_ids": torch.ones(1, 3), "attention_mask": torch.zeros(1, 3)}, "with a real token"),
        ({"input_ids": torch.ones(1, 0), "attention_mask": torch.ones(1, 0)}, "with a real token"),
    ],
)
def test_what_preprocess_must_return(t5_folder, result, match):
    generate = T5SimCTGGenerate(t5_folder, gpu_id=-1, max_length=4)
    generate.preprocess = lambda text: text if text == "a" else result
    with pytest.raises(ValueError, match=match):
        generate(["a", "b"])


def test_an_error_of_preprocess_names_the_text(t5_folder):
    generate = T5SimCTGGenerate(t5_folder, gpu_id=-1, max_length=4)
    generate.preprocess = lambda text: {}[text] if text == "b" else text
    with pytest.raises(ValueError, match=r"texts\[1\] cannot be preprocessed \(KeyError: 'b'\), got 'b'"):
        generate(["a", "b"])


@pytest.mark.parametrize("wrong", [2.5, 0, True, float("nan"), "5"])
def test_a_length_that_is_none_is_refused_before_the_model_is_read(wrong):
    with pytest.raises(ValueError, match="max_length must be an integer of at least 1, got"):
        T5SimCTGGenerate("nowhere", gpu_id=-1, max_length=wrong)


@pytest.mark.parametrize("wrong", ["cpu", None, True, 0.0])
def test_a_device_that_is_no_number_is_refused(wrong):
    with pytest.raises(ValueError, match="gpu_id must be an integer, negative for the CPU, got"):
        T5SimCTGGenerate("nowhere", gpu_id=wrong)
