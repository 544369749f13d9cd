"""Contrastive search's successors, token for token against the naive ones of `reference/` in float64."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from transformers import LogitsProcessor

import simctg_fast
from simctg_fast import FSD, GUARD, AdaptiveContrastiveSearch, ContrastiveGenerator
from simctg_fast.engine import Engine
from simctg_fast.reference.adaptive import adaptive_contrastive_search
from simctg_fast.reference.fsd import fsd
from simctg_fast.reference.guard import guard

from .. import near_ties
from ..decoding_models import PAD, build, inputs_for, left_padded, prompt, shared, tokenizer

NEW, CLEAR = 14, 2e-5  # a choice that is less clear than this may be another's in float32
MODELS = ["gpt2", "llama", "mistral", "gemma2", "bloom", "mamba", "bart", "t5"]

# By name: how `generate` is told, the naive search, and the engine's strategy with its settings.
SEARCHES = {
    "ngram": (lambda: FSD(), functools.partial(fsd, kind="ngram", n=3, k=3, alpha=0.65), ("fsd", {})),
    "ngram-5": (
        lambda: FSD(n=5, k=6, alpha=0.9, beta=0.5, stop_tokens=range(3, 30)),
        functools.partial(fsd, kind="ngram", n=5, k=6, alpha=0.9, beta=0.5, stop_tokens=range(3, 30)),
        ("fsd", {"fsd_n": 5, "top_k": 6, "penalty_alpha": 0.9, "fsd_beta": 0.5, "fsd_stop_tokens": list(range(3, 30))}),
    ),
    "vector": (lambda: FSD("vector"), functools.partial(fsd, kind="vector", n=2, k=3, alpha=0.45), ("fsd-vec", {})),
    "vector-3": (
        lambda: FSD("vector", n=3, k=6, alpha=0.9),
        functools.partial(fsd, kind="vector", n=3, k=6, alpha=0.9),
        ("fsd-vec", {"fsd_n": 3, "top_k": 6, "penalty_alpha": 0.9}),
    ),
    "guard": (lambda: GUARD(sample=False), guard, ("guard", {"temperature": 0})),
    "guard-3": (
        lambda: GUARD(3, 0.5, sample=False),
        functools.partial(guard, window=3, decay=0.5),
        ("guard", {"temperature": 0, "guard_window": 3, "guard_decay": 0.5}),
    ),
    "adaptive": (lambda: AdaptiveContrastiveSearch(), adaptive_contrastive_search, ("adaptive", {})),
    "adaptive-8": (
        lambda: AdaptiveContrastiveSearch(8.0, (2, 7)),
        functools.partial(adaptive_contrastive_search, q=8.0, k_range=(2, 7)),
        ("adaptive", {"adaptive_q": 8.0, "adaptive_k_range": [2, 7]}),
    ),
}
FEW = ["ngram", "vector-3", "guard-3", "adaptive-8"]


@functools.cache
def double(name: str):
    return copy.deepcopy(shared(name)).double()


def truth(search: str, name: str, ids: list[int], **options):
    return SEARCHES[search][1](double(name), ids, max_new_tokens=options.pop("new", NEW), **options)


def same(found: list[int], text, start: int) -> None:
    """New tokens `found` are those of the reference, up to a choice that rounding may make otherwise."""
    place, expected = text.departure(found, start), text.ids[start:]
    if place is not None:
        assert place < min(len(found), len(expected)), (found, expected)
        assert text.margins[place] < CLEAR, (place, text.margins[place], found, expected)
        near_ties.record(f"new token {place}: clear by {text.margins[place]:.1e}")


def check(search: str, name: str, inputs: dict, rows: list[list[int]], eos: int | None = None, **options) -> None:
    model = shared(name)
    out = model.generate(
        **inputs,
        custom_generate=SEARCHES[search][0](),
        max_new_tokens=NEW,
        pad_token_id=PAD,
        eos_token_id=eos,
        **options,
    )
    processor = options.get("logits_processor")
    processor = None if processor is None else processor[0]
    for row, ids in enumerate(rows):
        more = {"eos_token_id": eos, "processor": processor}
        if model.config.is_encoder_decoder:
            mask = inputs["attention_mask"][row].bool()
            more["inputs"] = {"input_ids": inputs["input_ids"][row][mask][None]}
            ids = [model.config.decoder_start_token_id]
        text = truth(search, name, ids, **more)
        start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        found = out[row, start:].tolist()
        if eos is not None and eos in found:
            assert set(found[found.index(eos) + 1 :]) <= {PAD}
            found = found[: found.index(eos) + 1]
        same(found, text, len(ids))


def real_rows(inputs: dict) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_one_text(search, name):
    inputs = inputs_for(shared(name), 1, 11)
    check(search, name, inputs, real_rows(inputs))


@pytest.mark.parametrize("search", FEW)
@pytest.mark.parametrize(
    "name", [n if n in ("llama", "t5") else pytest.param(n, marks=pytest.mark.full) for n in MODELS]
)
def test_a_padded_batch(search, name):
    inputs = inputs_for(shared(name), 3, 9)
    check(search, name, inputs, real_rows(inputs))


def run_with(monkeypatch, search: str, **options) -> None:
    """The search is run with these `Options` meanwhile."""
    make = SEARCHES[search][0]

    def made():
        found = make()
        vars(found).update(options)
        return found

    monkeypatch.setitem(SEARCHES, search, (made, *SEARCHES[search][1:]))


@pytest.mark.parametrize("path", ["reorder", "uncached"])
@pytest.mark.parametrize("search", FEW)
def test_other_paths(search, path, monkeypatch):
    run_with(monkeypatch, search, path=path)
    inputs = left_padded(7, 4)
    check(search, "llama", inputs, real_rows(inputs))


@pytest.mark.parametrize("search", FEW)
def test_buffers_that_stay_in_place(search, monkeypatch):
    """The step that a CUDA graph would hold."""
    run_with(monkeypatch, search, decode_step=True)
    inputs = left_padded(11, 5)
    check(search, "gpt2", inputs, real_rows(inputs))


class Banned(LogitsProcessor):
    """The ten tokens whose number is the text's last token, modulo eight, and up, cannot come."""

    def __call__(self, input_ids, scores):
        first = input_ids[:, -1:] % 8
        place = torch.arange(scores.shape[1])
        return scores.masked_fill((place >= first) & (place < first + 30), -math.inf)


@pytest.mark.parametrize("search", FEW)
def test_ends_and_processors(search):
    """Rows end at different times, and leave; processors come first."""
    inputs = left_padded(9, 9, 6, 8, seed=3)
    check(search, "llama", inputs, real_rows(inputs), logits_processor=[Banned()])
    first = truth(search, "llama", real_rows(inputs)[1])
    check(search, "llama", inputs, real_rows(inputs), eos=first.ids[9 + 4])


@pytest.mark.parametrize("batching", ["slots", "static"])
@pytest.mark.parametrize("search", [*FEW, "vector"])
def test_in_the_engine(search, batching):
    """More requests than slots, of different lengths: nothing is left of those before."""
    name, settings = SEARCHES[search][2]
    lengths = (5, 23, 9, 14, 3) if batching == "slots" else (9, 9, 7, 9, 9)
    texts = [tokenizer().decode(prompt(1, length, seed=i)[0]) for i, length in enumerate(lengths)]
    engine = Engine(
        build("llama"), tokenizer(), strategy=name, slots=2, batching=batching, max_new_tokens=NEW, **settings
    )
    found = {r.id: r.token_ids for r in engine.generate({"id": i, "prompt": x} for i, x in enumerate(texts))}
    for i, x in enumerate(texts):
        ids = tokenizer()(x)["input_ids"]
        same(found[i], truth(search, "llama", ids), len(ids))


def test_lines_with_settings_of_their_own():
    prompts = [tokenizer().decode(prompt(1, 9, seed=i)[0]) for i in range(3)]
    engine = Engine(build("llama"), tokenizer(), strategy="fsd", slots=3, max_new_tokens=NEW, fsd_n=5, top_k=6)
    own = [
        {"strategy": "fsd"},
        {"fsd_n": 2, "penalty_alpha": 0.9, "top_k": 4},
        {"fsd_beta": 0.1, "fsd_stop_tokens": [5, 6, 7, 80, 81]},
    ]
    lines = [{"id": i, "prompt": x} | more for i, (x, more) in enumerate(zip(prompts, own, strict=True))]
    names = {"fsd_n": "n", "penalty_alpha": "alpha", "top_k": "k", "fsd_beta": "beta", "fsd_stop_tokens": "stop_tokens"}
    for result in engine.generate(lines):
        settings = {"n": 5, "k": 6, "alpha": 0.65, "beta": 0.9} | {
            names[n]: v for n, v in own[result.id].items() if n in names
        }
        ids = tokenizer()(prompts[result.id])["input_ids"]
        text = fsd(double("llama"), ids, kind="ngram", max_new_tokens=NEW, **settings)
        same(result.token_ids, text, len(ids))
    for bad, message in (
        ({"fsd_n": 6}, "fsd_n is 6, more than the 5"),
        ({"top_k": 7}, "top_k is 7, more than the 6"),
        ({"adaptive_q": 2.0}, "adaptive_q is not used by strategy 'fsd', only by adaptive"),
        ({"fsd_beta": 2}, r"fsd_beta must be a number in \[0, 1\], got 2"),
        ({"fsd_stop_tokens": "abc"}, "fsd_stop_tokens must be token ids"),
        ({"strategy": "greedy"}, "strategy must be one of this run's, fsd, got 'greedy'"),
    ):
        (answer,) = engine.generate([{"id": 0, "prompt": "abc"} | bad])
        with pytest.raises(ValueError, match=message):
            raise ValueError(answer.error["message"])


@pytest.mark.parametrize("batching", ["slots", "static"])
def test_lines_with_strategies_of_their_own(batching):
    """In fewer slots than lines: who stands where before makes no difference."""
    names = ["guard", "fsd-vec", "fsd", "greedy", "guard", "fsd", "sample", "fsd-vec"]
    searches = {"guard": "guard", "fsd-vec": "vector", "fsd": "ngram"}
    texts = [tokenizer().decode(prompt(1, 9, seed=i)[0]) for i in range(len(names))]
    engine = Engine(
        build("llama"), tokenizer(), strategy="fsd,guard,fsd-vec,greedy,sample", slots=3, batching=batching,
        max_new_tokens=NEW, temperature=0, trace=True,
    )  # fmt: skip
    lines = [{"id": i, "prompt": x, "strategy": name} for i, (x, name) in enumerate(zip(texts, names, strict=True))]
    del lines[2]["strategy"]  # the run's first
    for result in engine.generate(lines):
        assert result.error is None
        ids, name = tokenizer()(texts[result.id])["input_ids"], names[result.id]
        if name in searches:
            same(result.token_ids, truth(searches[name], "llama", ids), len(ids))
        else:
            expected = build("llama").generate(
                torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, pad_token_id=PAD
            )
            assert result.token_ids == expected[0, len(ids) :].tolist()
        assert [step["token_id"] for step in result.trace] == result.token_ids
        weighed = {"fsd": 3, "fsd-vec": 3, "greedy": 1, "sample": 1}
        assert name == "guard" or len(result.trace[0]["candidates"]) == weighed[name]


def test_strategies_that_go_together():
    for strategy, message in (
        ("fsd,contrastive", "strategy is 'fsd,contrastive', must be several of greedy, sample, fsd, fsd-vec, guard"),
        ("fsd,fsd", "each once"),
        ("fsd,dry", "strategy must be one of .*, got 'dry'"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(build("llama"), tokenizer(), strategy=strategy)
    engine = Engine(build("llama"), tokenizer(), strategy="greedy,fsd", fsd_n=2, max_new_tokens=3)
    assert (engine.parameters.fsd_n, engine.defaults["fsd"].fsd_n) == (None, 2)
    with pytest.raises(ValueError, match="guard_window is not used by strategy 'greedy'"):
        Engine(build("llama"), tokenizer(), strategy="greedy,fsd", guard_window=3)
    for bad, message in (
        ({"strategy": "guard"}, "strategy must be one of this run's, greedy, fsd, got 'guard'"),
        ({"strategy": "fsd", "fsd_n": 3}, "fsd_n is 3, more than the 2"),
        ({"penalty_alpha": 0.5}, "penalty_alpha is not used by strategy 'greedy'"),
    ):
        (answer,) = engine.generate([{"id": 0, "prompt": "abc"} | bad])
        assert message in answer.error["message"]


def test_the_trace_says_why():
    engine = Engine(build("llama"), tokenizer(), strategy="fsd", max_new_tokens=3, trace=True)
    (result,) = engine.generate([{"id": 0, "prompt": "abcabcabcab"}])
    ids = tokenizer()("abcabcabcab")["input_ids"]
    for step in result.trace:
        assert len(step["candidates"]) == 3
        best = max(step["candidates"], key=lambda c: c["score"])
        assert best["token_id"] == step["token_id"]
        for candidate in step["candidates"]:
            assert abs(candidate["score"] - 0.35 * candidate["probability"] + 0.65 * candidate["penalty"]) < 1e-6
            assert ("because" in candidate) == (candidate["token_id"] in ids)
        ids.append(step["token_id"])


@pytest.mark.parametrize("batching", ["slots", "static"])
def test_the_trace_says_why_of_guard(batching):
    """Where a token stood last, of prompts of two lengths; one that was not there pays nothing, nor less than that."""
    texts = [tokenizer().decode(prompt(1, length)[0]) for length in (30, 5)]
    engine = Engine(
        build("llama"), tokenizer(), strategy="guard", temperature=0, max_new_tokens=6, trace=True, batching=batching
    )
    penalised = 0
    for result in engine.generate([{"id": i, "prompt": text} for i, text in enumerate(texts)]):
        ids = tokenizer()(texts[result.id])["input_ids"]
        for step in result.trace:
            for candidate in step["candidates"]:
                if candidate["token_id"] in ids:
                    position = len(ids) - 1 - ids[::-1].index(candidate["token_id"])
                    assert candidate["because"]["position"] == position
                    assert candidate["because"]["token_id"] == candidate["token_id"]
                    assert candidate["penalty"] > 0
                    penalised += 1
                else:
                    assert math.copysign(1, candidate["penalty"]) == 1
                    assert candidate["penalty"] == 0
                    assert "because" not in candidate
            ids.append(step["token_id"])
    assert penalised > 10


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def test_guard_draws_by_its_probabilities():
    """Many draws of one step, against the products that the reference computes."""
    model, ids = shared("gpt2"), prompt(1, 9)
    generator = torch.Generator().manual_seed(0)
    draws = 4000
    out = model.generate(
        ids.expand(draws, -1), custom_generate=GUARD(generator=generator), max_new_tokens=1, pad_token_id=PAD
    )
    from simctg_fast.reference.guard import schedule
    from simctg_fast.reference.one_text import Text

    p, _ = Text(double("gpt2"), ids[0].tolist()).look()
    k, alpha = schedule([-sum(x * math.log(x + 1e-5) for x in p.tolist())], math.log(len(p)), 7, 0.95)
    top = p.topk(int(k))
    weights = torch.tensor([float(x) * alpha ** ids[0].tolist().count(int(v)) for x, v in zip(*top, strict=True)])
    expected = draws * weights / weights.sum()
    counts = torch.tensor([(out[:, -1] == v).sum() for v in top.indices])
    assert int(counts.sum()) == draws
    assert (
        float(((counts - expected) ** 2 / expected).sum()) < 45
    )  # chi squared of 9 degrees of freedom: 1 in a million


def test_seeds_of_requests():
    engine = Engine(build("llama"), tokenizer(), strategy="guard", max_new_tokens=NEW)
    lines = [{"id": i, "prompt": "abcd", "seed": 5} for i in range(2)] + [{"id": 2, "prompt": "abcd", "seed": 6}]
    found = {r.id: r.token_ids for r in engine.generate(lines)}
    assert found[0] == found[1] != found[2]


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FSD("vec"), r"kind must be one of \('ngram', 'vector'\), got 'vec'"),
        (lambda: FSD(n=0), "n must be an integer from 1 to 16 for kind='ngram', got 0"),
        (lambda: FSD("vector", n=1), "n must be an integer from 2 to 16 for kind='vector', got 1"),
        (lambda: FSD(k=0), "k must be an integer of at least 1, got 0"),
        (lambda: FSD(alpha=1.5), r"alpha must be a number in \[0, 1\], got 1.5"),
        (lambda: FSD(beta=float("nan")), "beta must be a number"),
        (lambda: FSD(stop_tokens=[-1]), "stop_tokens must be token ids, 256 at most"),
        (lambda: FSD(stop_tokens=range(257)), "stop_tokens must be token ids, 256 at most"),
        (lambda: FSD(path="fast"), "path must be"),
        (lambda: GUARD(1), "window must be an integer from 2 to 64, got 1"),
        (lambda: GUARD(decay=0), r"decay must be a number in \(0, 1\], got 0"),
        (lambda: GUARD(sample=1), "sample must be True or False, got 1"),
        (lambda: GUARD(sample=False, generator=torch.Generator()), "generator is given, but without sample=True"),
        (lambda: AdaptiveContrastiveSearch(0), "q must be a finite number above 0, got 0"),
        (lambda: AdaptiveContrastiveSearch(k_range=(7, 5)), "k_range must be two integers"),
        (lambda: AdaptiveContrastiveSearch(k_range=(1, 5)), "k_range must be two integers"),
        (lambda: AdaptiveContrastiveSearch(adaptive="k"), "adaptive must be one of"),
        (lambda: AdaptiveContrastiveSearch(top_k=4), "top_k is 4, but adaptive='both' takes k from k_range"),
        (lambda: AdaptiveContrastiveSearch(adaptive="alpha", top_k=1), "top_k must be an integer of at least 2, got 1"),
        (
            lambda: AdaptiveContrastiveSearch(adaptive="alpha", k_range=(2, 3)),
            "but adaptive='alpha' takes k from top_k",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (FSD(k=99), "k must be at most the vocabulary size 98, got 99"),
        (AdaptiveContrastiveSearch(k_range=(2, 99)), "k_range must be at most the vocabulary size 98, got 99"),
        (AdaptiveContrastiveSearch(adaptive="alpha", top_k=99), "top_k must be at most the vocabulary size 98, got 99"),
        (FSD(stop_tokens=[4, 98]), "stop_tokens must be token ids below 98, of the model's vocabulary, got 98"),
        (GUARD(), "num_beams must be 1 for GUARD, got 2"),
    ],
)
def test_what_a_call_is_refused(search, message):
    beams = {"num_beams": 2} if isinstance(search, GUARD) else {}
    with pytest.raises(ValueError, match=message):
        shared("llama").generate(prompt(), custom_generate=search, max_new_tokens=2, pad_token_id=PAD, **beams)


def test_fixed_k_of_adaptive_search():
    ids = prompt(1, 9)
    search = AdaptiveContrastiveSearch(4.0, adaptive="alpha", top_k=5)
    out = shared("llama").generate(ids, custom_generate=search, max_new_tokens=NEW, pad_token_id=PAD)
    text = adaptive_contrastive_search(double("llama"), ids[0].tolist(), q=4.0, top_k=5, max_new_tokens=NEW)
    same(out[0, 9:].tolist(), text, 9)
    engine = Engine(shared("llama"), tokenizer(), strategy="adaptive", adaptive_k_range=(5, 9), max_new_tokens=NEW)
    (result,) = engine.generate([{"prompt": ids[0].tolist(), "adaptive_q": 4.0, "adaptive_k_range": [5, 5]}])
    same(result.token_ids, text, 9)


def test_guard_with_few_tokens():
    """A vocabulary of fewer than it may take: all of it, wherever it is asked."""
    model = build("llama", vocab_size=9, eos_token_id=None, bos_token_id=0, pad_token_id=0)
    ids = torch.tensor([[1, 2, 3, 1]])
    out = model.generate(ids, custom_generate=GUARD(sample=False), max_new_tokens=8, pad_token_id=0)
    plain = simctg_fast.generate(lambda ids: model(ids).logits, ids, strategy=GUARD(sample=False), max_new_tokens=8)
    assert torch.equal(out, plain)
    same(out[0, 4:].tolist(), guard(model.double(), ids[0].tolist(), max_new_tokens=8), 4)


# ---- beyond transformers' generate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("search", FEW)
def test_plain_models(search, padded):
    """The same tokens from a step that returns logits (and hidden states where they are looked at)."""
    model, inputs = shared("llama"), left_padded(9, 6) if padded else left_padded(9, 9)

    def step(ids, attention_mask=None):
        out = model(ids, attention_mask=attention_mask, output_hidden_states=True)
        return (out.logits, out.hidden_states[-1]) if search in ("vector-3", "adaptive-8") else out.logits

    made, start = SEARCHES[search][0], 9
    found = simctg_fast.generate(step, **inputs, strategy=made(), max_new_tokens=NEW, protocol="stateless")
    for row, ids in enumerate(real_rows(inputs)):
        same(found[row, start:].tolist(), truth(search, "llama", ids), len(ids))


def test_names_for_plain_models():
    model, ids = shared("llama"), prompt(1, 9)

    def logits(ids):
        return model(ids).logits

    found = simctg_fast.generate(logits, ids, strategy="fsd", max_new_tokens=NEW)
    same(found[0, 9:].tolist(), truth("ngram", "llama", ids[0].tolist()), 9)
    for strategy, message in (
        ("fsd-vec", r"this strategy needs a step that returns \(logits, hidden\)"),
        ("dry", "strategy must be a search or one of contrastive, adaptive, fsd, fsd-vec, guard, got 'dry'"),
        ("contrastive", "contrastive search is penalty_alpha"),
    ):
        with pytest.raises(ValueError, match=message):
            simctg_fast.generate(logits, ids, strategy=strategy, max_new_tokens=2)
    for strategy, message in (
        (FSD(k=99), "k must be at most the 98 logits of the step, got 99"),
        (AdaptiveContrastiveSearch(k_range=(5, 99)), "k_range must be at most the 98 logits of the step, got 99"),
        (AdaptiveContrastiveSearch(adaptive="alpha", top_k=99), "top_k must be at most the 98 logits of the step"),
    ):
        with pytest.raises(ValueError, match=message):
            simctg_fast.generate(
                lambda ids, state: (logits(ids), state, torch.ones(*ids.shape, 4)), ids, strategy=strategy,
                max_new_tokens=2, select=lambda state, index: state,
            )  # fmt: skip
    for name, value in (("top_k", 9), ("temperature", 0.5), ("top_p", 0.9), ("min_p", 0.1), ("typical_p", 0.9)):
        with pytest.raises(ValueError, match=f"{name}={value} is not used by strategy='fsd'"):
            simctg_fast.generate(logits, ids, strategy="fsd", max_new_tokens=2, **{name: value})
    with pytest.raises(ValueError, match="leave do_sample=True out"):
        simctg_fast.generate(logits, ids, strategy="guard", do_sample=True, max_new_tokens=2)
    with pytest.raises(ValueError, match="a positional step keeps its own cache"):
        simctg_fast.generate(lambda ids, input_pos: logits(ids), ids, strategy="adaptive", max_new_tokens=2)


def test_lists_of_texts():
    texts = [tokenizer().decode(prompt(1, length, seed=length)[0]) for length in (9, 5)]
    generator = ContrastiveGenerator(build("llama"), tokenizer())
    for strategy, search in (("fsd", "ngram"), (FSD("vector"), "vector")):
        for text, answer in zip(texts, generator(texts, NEW, strategy=strategy), strict=True):
            ids = tokenizer()(text)["input_ids"]
            expected = truth(search, "llama", ids)
            assert answer == tokenizer().decode(expected.ids[len(ids) :], skip_special_tokens=True)
    with pytest.raises(ValueError, match=r"temperature=0.5 is of contrastive search, got strategy='fsd'"):
        generator(texts, strategy="fsd", temperature=0.5)
    for name, value in (("top_k", 9), ("penalty_alpha", 0.1)):
        with pytest.raises(ValueError, match=f"{name}={value} is of contrastive search, got strategy='fsd'"):
            generator(texts, strategy="fsd", **{name: value})
    with pytest.raises(ValueError, match="seed=3 needs a temperature"):
        generator(texts, strategy="fsd", seed=3)
    mine = GUARD()
    drawn = [generator(texts, NEW, strategy=mine, seed=seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert mine.generator is None
