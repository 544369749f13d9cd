"""The text of new tokens behind a prompt: what is missing in the prompt's text, whatever the tokenizer."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from pathlib import Path

import pytest
import sentencepiece
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from simctg_fast.text.continuation import continuation_pieces, continuation_text

LINES = [
    "the cat sat on the mat",
    "seven wizards, over and over again",
    "naïve café – déjà vu",
    "it's what they don't say . he's  two  spaces",
    "数学は美しい",
    "x = [1, 2, 3]\n    return x\n",
]
TEXTS = [
    *LINES,
    "😀😀 the 😀👩‍👩‍👧",
    "the",
    "",
    "  the  cat ",
    "do n't ; I 'm , .",
    "日本語 and 😀é the cat",
    "a \ufffd b\ufffd\ufffd",
]
UNFINISHED = "\ufffd"
FOLDERS: list[tempfile.TemporaryDirectory] = []  # gone with the process


@functools.cache
def sentencepiece_folder(kind: str) -> Path:
    FOLDERS.append(tempfile.TemporaryDirectory())
    folder = Path(FOLDERS[-1].name)
    (folder / "lines.txt").write_text("\n".join(LINES * 20))
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} if kind == "unigram" else {"pad_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"), model_prefix=str(folder / "tokenizer"), model_type=kind, vocab_size=340,
        byte_fallback=kind == "bpe", hard_vocab_limit=False, minloglevel=2, remove_extra_whitespaces=False,
        normalization_rule_name="identity", **ids,
    )  # fmt: skip
    return folder


def from_folder(kind: str, name: str, **settings):
    folder = sentencepiece_folder(kind)
    (folder / "spiece.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, **settings}))
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        if "precompiled_charsmap" in str(error):
            pytest.skip("this tokenizers reads no sentencepiece model without a normalization")
        raise


class SlowSentencePiece:
    """The C++ library itself, as slow tokenizers ask it: bytes that are no character are replaced one by one."""

    def __init__(self):
        self.pieces = sentencepiece.SentencePieceProcessor(
            model_file=str(sentencepiece_folder("bpe") / "tokenizer.model")
        )

    def __call__(self, text, **_):
        return {"input_ids": self.pieces.encode(text)}

    def decode(self, ids, skip_special_tokens=False):
        return self.pieces.decode(list(ids))


def byte_level():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(LINES * 20, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")


def word_pieces(**settings):
    words = sorted({word for line in LINES for word in line.replace(",", " , ").replace("'", " ' ").split()})
    letters = sorted({letter for text in TEXTS for letter in text if not letter.isspace()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*words, *letters])]
    tokens += ["##" + letter for letter in letters]
    return transformers.BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, **settings)


MAKERS = {
    "llama": lambda: from_folder("bpe", "LlamaTokenizer", legacy=False),
    "llama legacy": lambda: from_folder("bpe", "LlamaTokenizer", legacy=True),
    "llama cleaned": lambda: from_folder("bpe", "LlamaTokenizer", clean_up_tokenization_spaces=True),
    "t5": lambda: from_folder("unigram", "T5Tokenizer"),
    "t5 cleaned": lambda: from_folder("unigram", "T5Tokenizer", clean_up_tokenization_spaces=True),
    "slow sentencepiece": SlowSentencePiece,
    "byte-level": byte_level,
    "word pieces": word_pieces,
    "word pieces cleaned": lambda: word_pieces(clean_up_tokenization_spaces=True),
    "bytes": transformers.ByT5Tokenizer,
}


@pytest.fixture(scope="module", params=list(MAKERS))
def made(request):
    return request.param, MAKERS[request.param]()


def ids_of(tokenizer, text, special=False):
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def check(name, tokenizer, ids, skip=True):
    """Every place at which ``ids`` can be cut into what was there and what came."""
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    for cut in range(len(ids) + 1):
        before = tokenizer.decode(ids[:cut], skip_special_tokens=skip) if cut else ""
        text = continuation_text(tokenizer, ids[:cut], ids[cut:], skip_special_tokens=skip)
        pieces = list(continuation_pieces(tokenizer, ids[:cut], ids[cut:], skip_special_tokens=skip))
        assert len(pieces) == len(ids) - cut
        if "cleaned" not in name:
            assert "".join(pieces) == text, (ids, cut)
        if whole.startswith(before) and UNFINISHED not in whole:
            assert before + text == whole, (ids, cut)


def test_prompt_and_continuation_are_the_whole(made):
    name, tokenizer = made
    for text in TEXTS:
        check(name, tokenizer, ids_of(tokenizer, text))
        check(name, tokenizer, ids_of(tokenizer, text, special=True))
        check(name, tokenizer, ids_of(tokenizer, text, special=True), skip=False)


def test_texts_put_together_at_random(made):
    name, tokenizer = made
    rng = random.Random(0)
    for _ in range(30):
        parts = [rng.choice(TEXTS)[rng.randrange(4) :] for _ in range(2)]
        check(name, tokenizer, [token for part in parts for token in ids_of(tokenizer, part)][:24])


def test_tokens_at_random(made):
    """Bytes of no character among them: nothing is known of the text but that the pieces are its parts."""
    name, tokenizer = made
    if "cleaned" in name:
        return
    rng, size = random.Random(1), len(getattr(tokenizer, "pieces", tokenizer))
    for _ in range(150):
        ids = [rng.randrange(size) for _ in range(12)]
        text = continuation_text(tokenizer, ids[:4], ids[4:])
        assert "".join(continuation_pieces(tokenizer, ids[:4], ids[4:])) == text


@pytest.mark.parametrize("name", ["llama", "llama legacy", "t5", "slow sentencepiece"])
def test_the_space_before_a_word(name):
    tokenizer = MAKERS[name]()
    cat, the = ids_of(tokenizer, "the cat"), ids_of(tokenizer, "the")
    assert tokenizer.decode(the) == "the"
    assert continuation_text(tokenizer, cat, the) == " the"
    assert continuation_text(tokenizer, [], the) == "the", "but not where a text begins"


@pytest.mark.parametrize("name", ["llama", "t5", "byte-level"])
@pytest.mark.parametrize("count", [1, 6, 7, 50])
def test_special_tokens_at_the_end_of_a_prompt(name, count):
    """Chat templates end in them: they have no text, and the text before them is what is continued."""
    tokenizer = MAKERS[name]()
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True, normalized=False)])
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    before = ids_of(tokenizer, "the cat") + [turn] * count
    new = ids_of(tokenizer, " the mat" if name == "byte-level" else "the mat")
    assert continuation_text(tokenizer, before, new) == " the mat"
    assert "".join(continuation_pieces(tokenizer, before, new)) == " the mat"
    between = [*new, *[turn] * count, *new]
    assert continuation_text(tokenizer, before, between) == " the mat the mat"
    assert "".join(continuation_pieces(tokenizer, before, between)) == " the mat the mat"


@pytest.mark.parametrize("name", ["llama", "slow sentencepiece", "byte-level", "bytes"])
@pytest.mark.parametrize("context", ["the cat ", "😀日😀", "日本語é😀", ""])
@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_prompt_that_ends_within_a_character(name, context, missing):
    """The character comes whole, with the tokens that finish it, and nothing of the prompt comes again."""
    tokenizer = MAKERS[name]()
    ids = ids_of(tokenizer, context + "👧")
    end = ids_of(tokenizer, "👧 cat")[len(ids_of(tokenizer, "👧")) :]
    before, new = ids[:-missing], ids[-missing:] + end
    assert continuation_text(tokenizer, before, new) == "👧 cat"
    pieces = list(continuation_pieces(tokenizer, before, new))
    assert pieces[:missing] == [""] * (missing - 1) + ["👧"]
    assert "".join(pieces) == "👧 cat"


@pytest.mark.parametrize("name", ["llama", "slow sentencepiece", "byte-level"])
def test_a_character_that_is_never_finished(name):
    tokenizer = MAKERS[name]()
    before, emoji = ids_of(tokenizer, "the cat"), ids_of(tokenizer, "the😀")[1:]
    start = emoji[:-1]
    # In the middle of a prompt: what stands for it there is not said again.
    assert continuation_text(tokenizer, before + start, ids_of(tokenizer, "x"))[-1] == "x"
    assert UNFINISHED not in continuation_text(tokenizer, before + start, ids_of(tokenizer, "x"))
    # At the end: the finished ones beside it stay.
    text = continuation_text(tokenizer, before, emoji + emoji + start)
    assert text.startswith("😀😀" + UNFINISHED)
    assert set(text[2:]) == {UNFINISHED}
    pieces = list(continuation_pieces(tokenizer, before, emoji + emoji + start))
    assert "".join(pieces) == text
    assert pieces[len(emoji) - 1] == "😀"


def test_replacement_characters_of_a_model_are_text(made):
    name, tokenizer = made
    ids = ids_of(tokenizer, "the \ufffd\ufffd\ufffd\ufffd 😀")
    if UNFINISHED not in tokenizer.decode(ids) or "word pieces" in name:
        return
    for cut in (2, len(ids) - 3):
        text = "".join(continuation_pieces(tokenizer, ids[:cut], ids[cut:]))
        assert text == continuation_text(tokenizer, ids[:cut], ids[cut:])
    assert continuation_text(tokenizer, ids[:2], ids[2:]).count(UNFINISHED) == tokenizer.decode(ids).count(UNFINISHED)


def test_cleaning_up():
    tokenizer = MAKERS["t5 cleaned"]()
    before, new = ids_of(tokenizer, "the cat sat "), ids_of(tokenizer, ".")
    assert tokenizer.decode(before + new).replace(" ", "") == "thecatsat."
    assert continuation_text(tokenizer, before, new).strip() == "."


def test_tokens_that_finish_a_character_and_begin_another():
    """A byte-level vocabulary has such pieces, where the corpus had them often."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    to_letter = {}
    rest = iter([letter for letter in letters if ord(letter) > 255])
    for byte in range(256):
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        to_letter[byte] = chr(byte) if printable else next(rest)
    spelled = [
        b"a",
        b"\xe2\x80",
        b"\xbe\xe2",
        b"\x80\xbe\xe2",
        b"\x80\xbe",
        b"\xbe\x8e",
        b"b",
        b"\xe2",
        b"\xf0\x9f",
        b"\xc9",
    ]
    vocabulary = {"".join(to_letter[byte] for byte in piece): index for index, piece in enumerate(spelled)}
    core = Tokenizer(models.BPE(vocabulary, merges=[]))
    core.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    for ids in (
        [0, 1, 2, 3, 3, 4, 6],
        [0, 1, *[2, 1] * 3, 6],
        [1, 5, 9, 9, 9, 6],
        [7, 8, 1, 2, 4, 0],
        [7, *[3] * 9, 4],
    ):
        whole = tokenizer.decode(ids)
        assert "".join(continuation_pieces(tokenizer, [], ids)) == continuation_text(tokenizer, [], ids) == whole
        assert "‾" in whole


class Counting:
    def __init__(self, tokenizer):
        self.tokenizer, self.seen = tokenizer, 0

    def decode(self, ids, skip_special_tokens=True):
        self.seen += len(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("name", ["llama", "byte-level", "bytes"])
@pytest.mark.parametrize("text", ["the cat sat on the mat ", "😀", "\ufffd", "special", "unfinished"])
def test_the_work_grows_with_the_tokens(name, text):
    tokenizer = MAKERS[name]()
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True, normalized=False)])

    def work(length):
        ids = ids_of(tokenizer, text * length)[:length]
        if text == "special":
            ids = [tokenizer.convert_tokens_to_ids("<|turn|>")] * length
        if text == "unfinished":
            ids = [token for token in ids_of(tokenizer, "😀") if token][-3:-1] * (length // 2)
        counting = Counting(tokenizer)
        list(continuation_pieces(counting, ids, ids))
        continuation_text(counting, ids, ids)
        return counting.seen

    assert work(2000) <= 2.5 * work(1000)
    assert work(2000) <= 2000 * 180
