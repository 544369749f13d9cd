"""DRY against its quadratic definition: alone, in every kind of search, and what its settings may be."""

import math
import random

import pytest
import torch
import transformers
from transformers import LogitsProcessor

import simctg_fast
from simctg_fast import ContrastiveSearch, DRYLogitsProcessor
from simctg_fast.assets import bundled_model_path
from simctg_fast.decoding.breakers import token_pieces
from simctg_fast.reference.contrastive_search import contrastive_search as by_definition
from simctg_fast.reference.dry import dry_penalties

from .. import near_ties
from ..decoding_models import PAD, VOCABULARY, build, left_padded, prompt, shared, tokenizer

STRONG = {"multiplier": 3.0, "base": 2.0, "allowed_length": 1}  # the tiny models repeat single tokens
PIECES = [b"\xff\xff", b"\xff\xff", b"\xff\xff", *(bytes([32 + i]) for i in range(VOCABULARY - 3))]


class Naive(LogitsProcessor):
    """DRY by its definition, row by row; the run of padding at a row's beginning is left out."""

    def __init__(self, pad: int | None = PAD, **settings) -> None:
        self.pad, self.settings = pad, settings

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, tokens in enumerate(input_ids.tolist()):
            while tokens and tokens[0] == self.pad:
                tokens = tokens[1:]
            for token, penalty in dry_penalties(tokens, **self.settings).items():
                if token < scores.shape[1]:
                    scores[row, token] -= penalty
        return scores


def both(breakers=(), **settings) -> tuple[DRYLogitsProcessor, Naive]:
    ours = DRYLogitsProcessor(sequence_breakers=breakers, tokenizer=tokenizer(), **settings)
    known = {breaker.encode() if isinstance(breaker, str) else breaker for breaker in breakers}
    return ours, Naive(breakers=known, pieces=PIECES, **settings)


def text(draw: random.Random, length: int, alphabet: str) -> list[int]:
    row = [ord(draw.choice(alphabet)) - 29]
    while len(row) < length:
        at, count = draw.randrange(len(row)), draw.randrange(1, 9)
        row += row[at : at + count] if draw.random() < 0.5 else [ord(draw.choice(alphabet)) - 29]
    return row[:length]


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_definition(seed):
    draw = random.Random(seed)
    settings = {
        "multiplier": draw.choice([0.8, 5.0, 1e-3]),
        "base": draw.choice([1.0, 1.01, 1.75, 4.0]),
        "allowed_length": draw.choice([1, 2, 3, 5]),
        "penalty_range": draw.choice([-1, 0, 1, 2, 9, 30, 1000]),
    }
    one = ord("a") - 29
    breakers = draw.choice([(), (one,), ("a",), ("ab",), ("aab", "ba"), ("abab",), ("ab", one + 2), ("aaaa", "b")])
    batch, length = draw.choice([(1, 1), (1, 2), (3, 12), (2, 60), (1, 200)])
    ids = torch.tensor([text(draw, length, draw.choice(["ab", "abc", "abcdefgh"])) for _ in range(batch)])
    if batch > 1:
        ids[0, : draw.randrange(length)] = PAD
        ids[1, draw.randrange(length)] = PAD  # inside the text, as a rule
    ours, naive = both(breakers, **settings)
    scores = torch.randn(batch, VOCABULARY)
    before = scores.clone()
    torch.testing.assert_close(ours(ids, scores), naive(ids, scores), rtol=1e-6, atol=1e-5)
    assert torch.equal(scores, before), "the scores that came are the caller's"


def penalties(tokens: str, breakers=(), **settings) -> dict[str, float]:
    """What each character loses behind a text of characters."""
    ours = DRYLogitsProcessor(sequence_breakers=breakers, tokenizer=tokenizer(), **settings)
    ids = torch.tensor([[ord(character) - 29 for character in tokens]])
    found = -ours(ids, torch.zeros(1, VOCABULARY, dtype=torch.float64))[0]
    return {chr(29 + int(token)): found[token].item() for token in found.nonzero()}


def test_by_hand():
    """Numbers that a sheet of paper gives, the default of the published sampler."""
    assert penalties("abcdabc") == {"d": pytest.approx(0.8 * 1.75)}
    assert penalties("abcdabc", allowed_length=3) == {"d": pytest.approx(0.8)}
    assert penalties("abcdabc", allowed_length=4) == {}
    assert penalties("abdxabyab") == {"d": pytest.approx(0.8), "y": pytest.approx(0.8)}
    # The longest of several counts, whichever was first.
    for repeated in ("zabcd.bcd.abc", "z.bcd.zabcd.abc"):
        assert penalties(repeated)["d"] == pytest.approx(0.8 * 1.75)
    # The range begins with the token that it ends with: of the last seven tokens "abcdabc", of six "bcdabc".
    assert penalties("abcdabc", penalty_range=7) == {"d": pytest.approx(0.8 * 1.75)}
    assert penalties("abcdabc", penalty_range=6) == {"d": pytest.approx(0.8)}
    assert penalties("abcdabc", penalty_range=5) == {}


def test_breakers():
    # A repetition begins behind the breaker, and the breaker itself is free.
    assert penalties("ab:cdeab:cd") == {"e": pytest.approx(0.8 * 1.75**3)}
    assert penalties("ab:cdeab:cd", (":",)) == {"e": pytest.approx(0.8)}
    assert penalties("ab:cdeab:cd", (":", "d")) == {}
    assert penalties("xab:yab", ("y",)) == {":": pytest.approx(0.8)}
    assert penalties("xab:yab", (":",)) == {}
    # Of a breaker that several tokens spell, parts break nothing; what would end it is free.
    assert penalties("abcdabc", ("cb", "dd")) == {"d": pytest.approx(0.8 * 1.75)}
    assert penalties("abcdabc", ("cd",)) == {}
    assert penalties("zabcdzabc", ("ab",)) == {}
    assert penalties("zabcdezabcd", ("ab",)) == {"e": pytest.approx(0.8)}
    # One that lies across the beginning of the range is none.
    assert penalties("zabcdezabcd", ("ab",), penalty_range=4) == {}
    assert penalties("abcbcbc", ("ab",), penalty_range=6) == {"b": pytest.approx(0.8 * 1.75**2)}


class TestBreakersOfVocabularies:
    """Texts that are breakers, in tokens that hold more than one character, or less."""

    def broken(self, tokenizer, ids: list[int], breakers) -> int:
        """How many tokens stand behind the last breaker."""
        ours = DRYLogitsProcessor(sequence_breakers=breakers, tokenizer=tokenizer)
        limits, _ = ours._breakers(torch.tensor([ids]), None, len(ids))
        return int(limits)

    def test_byte_level(self):
        known = transformers.AutoTokenizer.from_pretrained(bundled_model_path())

        def ids(text: str) -> list[int]:
            return known(text, add_special_tokens=False)["input_ids"]

        pieces = token_pieces(known)
        assert b"".join(pieces[token] for token in ids("naïve “q” 語\n x")) == "naïve “q” 語\n x".encode()
        assert all(len(pieces[token]) == 1 for token in ids("\n"))
        held = [token for token, piece in enumerate(pieces) if b":" in piece]
        assert len(held) > 1, "a colon and what holds one"
        assert all(self.broken(known, [*ids("one two"), token, *ids("x")], (":",)) == 1 for token in held)
        # Characters that are split into bytes, by any tokens.
        assert len(ids("語")) > 1
        assert self.broken(known, ids("one") + ids("語") + ids("x"), ("語",)) == 1
        cut = ids("one") + ids("語")[:-1] + ids("x")
        assert self.broken(known, cut, ("語",)) == len(cut)
        for breaker in ("one two", "e tw", "two"):
            assert self.broken(known, ids("say one two") + ids("x"), (breaker,)) == 1
        assert self.broken(known, ids("say one twenty") + ids("x"), ("one two",)) > 1
        assert self.broken(known, [*ids("a"), known.eos_token_id, *ids("x")], (known.eos_token,)) == 1

    def test_sentencepiece(self):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        words = ["<unk>", "<0x0A>", "<0xE8>", "<0xAA>", "<0x9E>", "▁a", "a", "▁b", "b", ":", "▁:", "▁"]
        vocabulary = {word: number for number, word in enumerate(words)}
        core = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        known = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
        pieces = token_pieces(known)
        assert pieces[1:] == [b"\n", b"\xe8", b"\xaa", b"\x9e", b" a", b"a", b" b", b"b", b":", b" :", b" "]
        assert self.broken(known, [6, 1, 6, 8], ("\n",)) == 2
        assert self.broken(known, [6, 10, 6, 6], (":",)) == 2
        assert self.broken(known, [6, 2, 3, 4, 6], ("語",)) == 1
        assert self.broken(known, [6, 2, 3, 6, 4, 6], ("語",)) == 6
        for ids in ([6, 7, 6], [6, 11, 8, 6], [5, 7, 6]):
            assert self.broken(known, ids, ("a b",)) == 1

    def test_added_tokens(self):
        """Pieces are kept with the tokenizer, and made anew where it grows."""
        known = transformers.AutoTokenizer.from_pretrained(bundled_model_path())
        count = len(token_pieces(known))
        known.add_tokens(["<|turn|>"])
        assert token_pieces(known)[count:] == [b"<|turn|>"]
        new = known.convert_tokens_to_ids("<|turn|>")
        for breaker in ("<|turn|>", "turn", new):
            assert self.broken(known, [5, new, 5, 6, 7], (breaker,)) == 3


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_minus_infinity_stays_and_penalties_end():
    ids = torch.full((1, 3000), 7)
    scores = torch.zeros(1, VOCABULARY)
    ours = DRYLogitsProcessor(sequence_breakers=(), base=10.0)
    found = ours(ids, scores)[0]
    # m · b^⌊ln(1e30 / m) / ln b⌋: 0.8e30.
    assert found[7].item() == pytest.approx(-0.8e30, rel=1e-6)
    assert not found[:7].any()
    assert not found[8:].any()
    scores[0, 7] = -math.inf
    assert ours(ids, scores)[0, 7] == -math.inf
    assert not ours(ids, scores).isnan().any()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        found = ours(ids, torch.zeros(1, VOCABULARY, dtype=dtype))
        assert found.dtype == dtype
        assert found.isfinite().all()
        assert found[0, 7] < -3e4
    for settings in ({"multiplier": 1e30}, {"multiplier": 1e-30}, {"base": 1e300}, {"base": 1.0000001}):
        found = DRYLogitsProcessor(sequence_breakers=(), **settings)(ids, torch.zeros(1, VOCABULARY))
        assert -1.0001e30 <= found[0, 7].item() <= 0


def test_a_base_of_one_costs_the_same_whatever_the_length():
    for length in (3, 4, 50):
        found = DRYLogitsProcessor(0.5, 1, 2, ())(torch.full((1, length), 7), torch.zeros(1, VOCABULARY))
        assert found[0, 7].item() == -0.5


def test_off():
    scores = torch.randn(1, VOCABULARY)
    assert torch.equal(DRYLogitsProcessor(0, tokenizer=tokenizer())(torch.full((1, 9), 7), scores), scores)


def test_tokens_that_outputs_have_not():
    """Of an image, say: they may repeat, but there is no score of theirs."""
    ids = torch.tensor([[5, 6, 200, 5, 6, 200, 5, 6]])
    ours = DRYLogitsProcessor(sequence_breakers=("x",), tokenizer=tokenizer())
    assert not ours(ids, torch.zeros(1, VOCABULARY)).any()
    assert ours(ids, torch.zeros(1, 201)).nonzero().tolist() == [[0, 200]]


# ---- searches --------------------------------------------------------------------------------------------------------

SEARCHES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 30},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "contrastive": {"custom_generate": ContrastiveSearch(0.4, 4)},
    "contrastive, drawn": {"custom_generate": ContrastiveSearch(0.4, 4, temperature=0.2)},
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_generate(name, search):
    """The same bits come out of the definition in its place, with padded rows."""
    model = build(name, std=0.2)
    inputs = left_padded(12, 7) if name == "gpt2" else {"input_ids": prompt(2, 9)}
    found = []
    for processor in both(("ab", "x"), **STRONG):
        torch.manual_seed(3)
        out = model.generate(**inputs, **SEARCHES[search], max_new_tokens=24, logits_processor=[processor])
        found.append(out)
    assert torch.equal(*found)
    if name == "gpt2":
        torch.manual_seed(3)
        without = model.generate(**inputs, **SEARCHES[search], max_new_tokens=24)
        assert not torch.equal(found[0], without), "it does a thing"


def test_greedy_search_by_a_naive_loop():
    model, ids = shared("gpt2"), prompt(1, 6)
    ours, naive = both((":",), **STRONG)
    expected = ids
    for _ in range(40):
        scores = naive(expected, model(expected).logits[:, -1].detach())
        expected = torch.cat([expected, scores.argmax(-1, keepdim=True)], dim=1)
    found = model.generate(ids, do_sample=False, max_new_tokens=40, logits_processor=[ours])
    near_ties.same_tokens(found, expected, model, {"input_ids": ids}, penalty_alpha=0, top_k=1, logits_processor=naive)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_contrastive_search_by_definition(name):
    model, inputs = shared(name), left_padded(9, 5)
    ours, naive = both((":",), **STRONG)
    options = {"penalty_alpha": 0.4, "top_k": 4}
    expected = by_definition(model, **inputs, **options, max_new_tokens=20, logits_processor=naive).sequences
    strategy = ContrastiveSearch(**options)
    found = model.generate(**inputs, custom_generate=strategy, max_new_tokens=20, logits_processor=[ours])
    near_ties.same_tokens(found, expected, model, inputs, **options, logits_processor=naive)


def test_padding_is_no_text():
    """The padding token in front of a row is none of its text; behind its first other token it is."""
    ours = DRYLogitsProcessor(sequence_breakers=(), tokenizer=tokenizer())
    assert ours.pad_token_id == PAD
    alone, scores = torch.tensor([[5, 6, 7, PAD, 5, 6]]), torch.zeros(1, VOCABULARY)
    assert ours(alone, scores).nonzero().tolist() == [[0, 7]]
    padded = torch.tensor([[PAD, 5, 6, 7, PAD, 5, 6]])
    assert torch.equal(ours(padded, scores), ours(alone, scores)), "<pad> 5 6 is no repetition of three"
    without = DRYLogitsProcessor(sequence_breakers=())
    assert without(padded, scores)[0, 7] < without(alone, scores)[0, 7]
    given = DRYLogitsProcessor(sequence_breakers=(), pad_token_id=PAD)
    assert torch.equal(given(padded, scores), ours(alone, scores))
    assert not ours(torch.full((1, 9), PAD), scores).any()
    # The range counts from the end, over padding as over text.
    short = DRYLogitsProcessor(sequence_breakers=(), tokenizer=tokenizer(), penalty_range=6)
    assert torch.equal(short(padded, scores), ours(alone, scores))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_is_read_on_the_host(device):
    """Tensors without values, which raise where somebody asks for one; also on a device that is not the CPU."""
    from torch._subclasses import FakeTensorMode

    ours = DRYLogitsProcessor(sequence_breakers=("a", "xyz"), tokenizer=tokenizer(), penalty_range=200)
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.empty((3, 300), dtype=torch.int64, device=device)
        found = ours(ids, torch.empty((3, VOCABULARY), device=device))
        assert (found.shape, found.device.type) == ((3, VOCABULARY), device)


def test_the_loop_over_plain_models():
    model, ids = build("gpt2", std=0.2), prompt(2, 9)
    ours, naive = both(("ab",), **STRONG)
    found = simctg_fast.generate(lambda ids: model(ids).logits, ids, max_new_tokens=20, logits_processor=[ours])
    expected = model.generate(ids, do_sample=False, max_new_tokens=20, logits_processor=[naive])
    assert torch.equal(found, expected)


# ---- settings --------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        (
            "multiplier",
            [NAN, INF, -0.1, 1e-31, 1e31, True, False, "x", None, torch.tensor(0.8)],
            r"0 \(off\) or a number from 1e-30 to 1e30",
        ),
        ("base", [NAN, INF, 0.99, 0, True, "x", None], "a finite number of at least 1"),
        ("allowed_length", [NAN, 0, -1, 2.5, True, "x", None, 2**31], r"an integer from 1 to 2\*\*31 - 1"),
        ("penalty_range", [NAN, -2, 2.5, True, "x", None], "an integer of at least 1, or 0 or -1 for the whole text"),
        ("pad_token_id", [NAN, -1, 2.5, True, "x"], "a token id or None"),
        (
            "sequence_breakers",
            ["\n", b"x", 7, None, [""], [True], [-1], [2.5], [None], ["x" * 64], [["x"]]],
            "a list of token ids and texts of 1 to 63 bytes",
        ),
    ],
)
def test_settings_that_mean_nothing(name, values, allowed):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} must be {allowed}.*, got ") as caught:
            DRYLogitsProcessor(**{"tokenizer": tokenizer(), name: value})
        assert repr(value)[:20] in str(caught.value)


def test_texts_need_a_tokenizer():
    with pytest.raises(ValueError, match=r"sequence_breakers has the text '\\n', for which tokenizer must be given"):
        DRYLogitsProcessor()
    assert DRYLogitsProcessor(sequence_breakers=[5, 7]).sequence_breakers == (5, 7)


def test_it_shows_its_settings():
    shown = "DRYLogitsProcessor(multiplier=0.8, base=1.75, allowed_length=2, sequence_breakers=(5,), penalty_range=-1)"
    assert repr(DRYLogitsProcessor(sequence_breakers=[5])) == shown
    defaults = DRYLogitsProcessor(tokenizer=tokenizer())
    assert defaults.sequence_breakers == ("\n", ":", '"', "*")
