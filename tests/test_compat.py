"""Published classes under their published names."""

import pytest
import sentencepiece
import torch
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

from simctg_fast import ContrastiveSearch
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
