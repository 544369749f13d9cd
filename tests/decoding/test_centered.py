"""Contrastive search of states less their mean: token for token what the definition says, however a text is run."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import DynamicCache

import simctg_fast
import simctg_fast.engine.scheduler as scheduler_module
from simctg_fast import AdaptiveContrastiveSearch, ContrastiveGenerator, ContrastiveSearch
from simctg_fast.decoding.caches import CACHE_NAME
from simctg_fast.decoding.decode_step import DecodeStep
from simctg_fast.decoding.slots import CenteredHistory, Extent, History
from simctg_fast.engine import Engine
from simctg_fast.reference.centered import centered_penalty, centered_scan
from simctg_fast.reference.contrastive_search import contrastive_search

from ..decoding_models import PAD, build, inputs_for, prompt, tokenizer
from ..near_ties import MORE, compare, verdict_of

NEW = 16


@functools.cache
def alike(name: str) -> torch.nn.Module:
    """A model; GPT-2's states share most of their direction, three channels of it by far, which its output embedding
    does not look at."""
    model = build(name)
    if name == "gpt2":
        common = 12 * torch.randn(32, generator=torch.Generator().manual_seed(1))
        common[:3] *= 30
        with torch.no_grad():
            model.transformer.ln_f.bias += common
            weight, unit = model.lm_head.weight, torch.nn.functional.normalize(common, dim=0)
            weight -= torch.outer(weight @ unit, unit)
    return model


def generate(model, inputs, new_tokens=NEW, end=None, **options):
    search = ContrastiveSearch(0.6, 4, **{"center": True, **options})
    return model.generate(
        **inputs, custom_generate=search, max_new_tokens=new_tokens, pad_token_id=PAD, eos_token_id=end
    )


def truth(model, inputs, new_tokens=NEW, end=None):
    return contrastive_search(
        model, **inputs, penalty_alpha=0.6, top_k=4, max_new_tokens=new_tokens, eos_token_id=end, pad_token_id=PAD,
        penalty=centered_penalty,
    ).sequences  # fmt: skip


def same_tokens(found, expected, model, inputs) -> int:
    """As `near_ties.same_tokens`, by the definition of centred search."""

    def judge(row, prefix, ours, theirs):
        steps = []
        for dtype in (torch.float64, torch.float32):
            mine = {name: value[row : row + 1] for name, value in inputs.items()}
            which = "decoder_" if model.config.is_encoder_decoder else ""
            mine[f"{which}input_ids"] = ids = torch.tensor([prefix])
            if not which:
                grown = mine["attention_mask"].new_ones(1, ids.shape[1] - mine["attention_mask"].shape[1])
                mine["attention_mask"] = torch.cat([mine["attention_mask"], grown], dim=1)
            one = copy.deepcopy(model).to(dtype)
            settings = {"penalty_alpha": 0.6, "top_k": 4 + MORE, "max_new_tokens": 1, "penalty": centered_penalty}
            steps.append(contrastive_search(one, **mine, **settings).steps[0])
        return verdict_of(*steps, 0.6, 4, ours, theirs)

    return compare(found, expected, judge)


WAYS = ({}, {"path": "reorder"}, {"path": "uncached"}, {"decode_step": True})


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart", "t5"])
def test_tokens_of_the_reference(name):
    """Rows of a padded batch on every path."""
    model, inputs = alike(name), inputs_for(alike(name), 3)
    expected = truth(model, inputs)
    for way in WAYS:
        same_tokens(generate(model, inputs, **way), expected, model, inputs)
    assert not torch.equal(generate(model, inputs, center=False), expected)


def test_states_that_are_all_alike():
    """Of plain cosines next to nothing is left, and the text repeats itself."""
    model, inputs = alike("gpt2"), inputs_for(alike("gpt2"))
    states = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
    unit = torch.nn.functional.normalize(states, dim=-1)
    assert (unit @ unit.T).min() > 0.998
    ids = generate(model, inputs, 40)[0, -40:].tolist()
    assert len(set(ids)) > len(set(generate(model, inputs, 40, center=False)[0, -40:].tolist()))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_rows_that_end_and_leave(name):
    model, inputs = build(name), inputs_for(build(name), 5)
    free = generate(model, inputs, 24)[:, -24:]
    end = max(range(98), key=lambda token: len({(row == token).nonzero()[:1].sum().item() for row in free}))
    expected = truth(model, inputs, 24, end)
    assert len({(row == end).int().argmax().item() for row in expected[:, -24:]}) > 2
    for way in WAYS:
        same_tokens(generate(model, inputs, 24, end, **way), expected, model, inputs)


def test_random_choices():
    """Near temperature 0 they are the best; above, they are those of a seed, on every path."""
    model, inputs = build("llama"), inputs_for(build("llama"), 3)
    expected = truth(model, inputs)
    same_tokens(generate(model, inputs, temperature=1e-6), expected, model, inputs)
    drawn = [
        generate(model, inputs, temperature=0.5, generator=torch.Generator().manual_seed(7), **way) for way in WAYS
    ]
    assert not torch.equal(drawn[0], expected)
    assert all(torch.equal(each, drawn[0]) for each in drawn)


@pytest.mark.parametrize("pads", [(), (3, 0, 5)])
def test_static_buffers_and_their_graphs(pads, driver, monkeypatch):
    """What a replay reads and writes stays in place, and a graph serves searches of its own kind."""
    made, init = [], DecodeStep.__init__
    monkeypatch.setattr(DecodeStep, "__init__", lambda self, *a, **k: (init(self, *a, **k), made.append(self))[0])
    model = build("gpt2")
    inputs = inputs_for(model, 3) if pads else {"input_ids": prompt(3), "attention_mask": torch.ones(3, 9).long()}
    expected = {center: generate(model, inputs, 40, center=center) for center in (True, False)}
    for center in (True, False, True, False):
        found = generate(model, inputs, 40, center=center, decode_step=True)
        assert torch.equal(found, expected[center])
        assert isinstance(made[-1].slots.history, CenteredHistory) == center
        assert made[-1].graph.reason is None
    assert driver.recorded == 2
    assert driver.replayed >= 4 * 36
    assert driver.as_before()


# ---- the history ----------------------------------------------------------------------------------------------------


def states_of(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random) + 20 * torch.randn(shape[-1], generator=random)


def kept(history: CenteredHistory, row: int, length: int) -> list[torch.Tensor]:
    return [history.states[row, :length], history.squares[row, :length], history.shift[row], history.sums[row]]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, ours, theirs))


def alone(states: torch.Tensor, prompt_length: int) -> CenteredHistory:
    history = CenteredHistory(Extent(1, 1))
    history.write([0], 0, states[None, :prompt_length])
    for each in states[prompt_length:]:
        history.append(each[None])
    return history


def test_pieces_of_a_prompt_and_batch_mates_change_no_bit():
    texts = [states_of(length, 33, seed=length) for length in (1500, 700, 5)]
    expected = [alone(states, len(states)) for states in texts]
    history = CenteredHistory(Extent(4, 4))
    history.write([3], 0, states_of(1, 40, 33))  # what was there before
    history.extent.reserve(1600)
    for start in range(0, 1500, 512):
        piece, whole = texts[0][start : start + 512], start + 512 >= 1500
        history.write([3], start, piece[None], whole=whole)
        if not whole:
            end = start + len(piece)
            assert torch.equal(history.states[3, :end], texts[0][:end]), "until it ends it stays as it came"
            history.append(states_of(4, 33), torch.tensor([1, 1, 1, end]))  # a step, of other rows
    assert equal(kept(history, 3, 1500), kept(expected[0], 0, 1500))
    right = torch.zeros(2, 700, 33)  # a batch of prompts that are padded on the right
    right[0], right[1, :5] = texts[1], texts[2]
    history.write([0, 2], 0, right, lengths=[700, 5])
    assert equal(kept(history, 0, 700), kept(expected[1], 0, 700))
    assert equal(kept(history, 2, 5), kept(expected[2], 0, 5))


def test_padding_in_front_counts_for_nothing():
    states = states_of(2, 20, 33)
    expected = [alone(states[row, first:], 12 - first) for row, first in enumerate((0, 5))]
    mask = torch.arange(12)[None] >= torch.tensor([[0], [5]])
    prompts = states[:, :12].masked_fill(~mask[..., None], torch.nan)
    history = CenteredHistory(Extent(2, 2))
    history.write(slice(0, 2), 0, prompts, mask)
    for place in range(12, 20):
        history.append(states[:, place])
    for row, first in enumerate((0, 5)):
        ours = [x[first:] for x in kept(history, row, 20)[:2]] + kept(history, row, 20)[2:]
        assert equal(ours, kept(expected[row], 0, 20 - first))
    candidates = states_of(2, 3, 33, seed=1)
    penalty, position = history.penalty(candidates)
    for row, first in enumerate((0, 5)):
        want, where = centered_scan(candidates[row], states[row, first:20])
        torch.testing.assert_close(penalty[row].double(), want, atol=1e-5, rtol=0)
        assert torch.equal(position[row], where + first)


def test_a_copy_goes_on_as_its_source_does():
    states, history = states_of(30, 24), CenteredHistory(Extent(3, 3))
    history.write([1], 0, states[None, :20])
    history.write([2], 0, states_of(1, 25, 24, seed=5))
    history.copy(1, 2, 20)
    for place in range(20, 30):
        history.append(states[place].expand(3, -1), torch.tensor([0, place, place]))
    expected = alone(states, 20)
    for row in (1, 2):
        assert equal(kept(history, row, 30), kept(expected, 0, 30))


def test_buffers_that_grow_keep_what_they_hold():
    states = states_of(900, 8)
    history = alone(states, 300)
    assert history.states.shape[1] == history.squares.shape[1] >= 900
    candidates = states_of(1, 4, 8, seed=1)
    want, where = centered_scan(candidates[0], states)
    penalty, position = history.penalty(candidates)
    torch.testing.assert_close(penalty[0].double(), want, atol=1e-5, rtol=0)
    assert torch.equal(position[0], where)


def test_how_much_more_cosines_move_than_states():
    """By which a step over static buffers is judged where its choice is another."""
    states = states_of(2, 10, 64)
    assert History(Extent(2, 2)).amplification() == 1
    history = CenteredHistory(Extent(2, 2))
    history.write(slice(0, 2), 0, states)
    ratios = [(row[-1].norm() / (row[-1] - row.mean(dim=0)).norm()).item() for row in states]
    assert history.amplification() == pytest.approx(max(ratios), rel=1e-4)
    assert history.amplification() > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_are_kept_in_single_on_the_cpu(dtype):
    states = states_of(40, 48).to(dtype)
    history = alone(states, 30)
    assert history.states.dtype == history.shift.dtype == torch.float32
    candidates = states_of(1, 4, 48, seed=1).to(dtype)
    want, _ = centered_scan(candidates[0], states)
    torch.testing.assert_close(history.penalty(candidates)[0][0].double(), want, atol=1e-5, rtol=0)


def test_what_is_rounded_is_rounded_behind_the_shift(monkeypatch):
    """Where half precision is kept, as on CUDA."""
    monkeypatch.setattr(History, "_allocate", _allocate_as_it_comes)
    states = states_of(60, 48).bfloat16()
    history = alone(states, 40)
    assert history.states.dtype == history.shift.dtype == torch.bfloat16
    assert history.squares.dtype == history.sums.dtype == torch.float32
    candidates = states_of(1, 4, 48, seed=1).bfloat16()
    want, _ = centered_scan(candidates[0], states)
    torch.testing.assert_close(history.penalty(candidates)[0][0].double(), want, atol=5e-4, rtol=0)


def _allocate_as_it_comes(self, hidden_states):
    shape = (self.extent.slots, self.extent.capacity, hidden_states.shape[2])
    self.states, self.last = hidden_states.new_zeros(shape), hidden_states.new_zeros(shape[0], shape[2])


# ---- the engine -----------------------------------------------------------------------------------------------------


def requests_of(model, lengths, **more) -> list[dict]:
    key = "source" if model.config.is_encoder_decoder else "prompt"
    return [{"id": i, key: tokenizer().decode(prompt(1, n, seed=i)[0]), **more} for i, n in enumerate(lengths)]


def run(model, requests, **options):
    engine = Engine(model, tokenizer(), **{"slots": 3, "center": True, "max_new_tokens": 12, **options})
    results = {result.id: result for result in engine.generate(requests)}
    assert not [result.error for result in results.values() if result.error is not None]
    return {number: results[number].token_ids for number in sorted(results)}, engine


def check_engine(model, requests, found) -> None:
    for line in requests:
        ids = tokenizer()(line.get("prompt") or line["source"], return_tensors="pt")["input_ids"]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected = generate(model, inputs, 12)[0].tolist()
        before = expected[: len(expected) - 12]
        same_tokens([before + found[line["id"]]], [expected], model, inputs)


@pytest.mark.parametrize("batching", ["slots", "static"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_the_engine_writes_what_generate_does(name, batching, monkeypatch):
    """More requests than slots, prompts in pieces."""
    model = alike(name)
    monkeypatch.setattr(scheduler_module, "CHUNK", 7)
    monkeypatch.setattr(scheduler_module, "PREFILL_BUDGET", 7)
    requests = requests_of(model, (3, 17, 60, 9, 31, 1, 2))
    found, engine = run(model, requests, batching=batching)
    assert engine.stats["batching"] == batching
    check_engine(model, requests, found)
    plain = run(model, requests, batching=batching, center=False)[0]
    assert plain != found
    explicit, _ = run(model, [line | {"center": True} for line in requests], batching=batching)
    assert explicit == found


def test_the_engine_replays_its_steps(driver):
    model = build("llama")
    requests = requests_of(model, (5, 40, 13, 22, 8, 30, 3, 6))
    found, _ = run(model, requests, batching="slots")
    assert driver.recorded == 1
    assert driver.replayed >= 10
    check_engine(model, requests, found)
    plain, _ = run(model, requests, batching="slots", center=False)
    assert driver.recorded == 2, "a graph of the one kind serves no other"
    assert plain != found
    assert run(model, requests, batching="slots")[0] == found
    assert driver.recorded == 2
    assert driver.as_before()


def test_no_prefix_is_copied():
    model = build("llama")
    system = prompt(1, 150)[0].tolist()
    lines = [
        {"id": i, "prompt": tokenizer().decode(system + prompt(1, 5 + i, seed=i + 1)[0].tolist())} for i in range(5)
    ]
    found, engine = run(model, lines, batching="slots")
    assert engine.stats["shared_tokens"] == 0
    assert run(model, lines, batching="slots", center=False)[1].stats["shared_tokens"] > 0
    check_engine(model, lines, found)


def test_siblings_share_the_mean_of_their_prompt():
    model = build("llama")
    lines = requests_of(model, (9, 30), n=3, seed=5)
    options = {"strategy": "stochastic-contrastive", "temperature": 0.5}

    def texts(slots):
        engine = Engine(model, tokenizer(), slots=slots, center=True, max_new_tokens=12, batching="slots", **options)
        return {r.id: [choice.token_ids for choice in r.choices] for r in engine.generate(lines)}

    together = texts(6)
    assert together == texts(1)
    assert all(len({tuple(ids) for ids in found}) == 3 for found in together.values())


def test_memory_of_a_position():
    model = build("gpt2")
    sizes = [
        run(model, requests_of(model, (5,)), center=center)[1].backend.bytes_per_position for center in (0 > 1, True)
    ]
    assert sizes[1] == sizes[0] + 4


# ---- beyond transformers' generate -----------------------------------------------------------------------------------


def whole_texts(model):
    """A stateless step."""

    def step(ids, attention_mask=None):
        positions = None if attention_mask is None else (attention_mask.cumsum(dim=1) - 1).clamp_min(0)
        out = model(ids, attention_mask=attention_mask, position_ids=positions, output_hidden_states=True)
        return out.logits, out.hidden_states[-1]

    return step


def with_a_cache(model):
    """A stateful step; the state is transformers' cache."""

    def step(ids, state, attention_mask=None):
        state = DynamicCache(config=model.config) if state is None else state
        positions = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        how = {"attention_mask": attention_mask, "position_ids": positions, CACHE_NAME: state}
        out = model(ids, output_hidden_states=True, **how)
        return out.logits, state, out.hidden_states[-1]

    return step


def branch(state, index):
    state = copy.deepcopy(state)
    state.reorder_cache(index)
    return state


@pytest.mark.parametrize(("make", "more"), [(whole_texts, {}), (with_a_cache, {"select": branch})])
def test_plain_models(make, more):
    """Padded rows of one that says little by its plain states; again when rows end."""
    model, inputs = alike("gpt2"), inputs_for(alike("gpt2"), 3)
    settings = {**inputs, "penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": NEW, "pad_token_id": PAD, **more}
    expected = truth(model, inputs)
    found = simctg_fast.generate(make(model), **settings, center=True)
    same_tokens(found, expected, model, inputs)
    same_tokens(found, generate(model, inputs), model, inputs)
    assert not torch.equal(simctg_fast.generate(make(model), **settings), found)
    end = int(expected[0, -NEW // 2])
    ended = simctg_fast.generate(make(model), **settings, center=True, eos_token_id=end)
    same_tokens(ended, truth(model, inputs, end=end), model, inputs)


def test_lists_of_texts():
    model = alike("gpt2")
    texts = [tokenizer().decode(prompt(1, length, seed=length)[0]) for length in (9, 5)]
    answers = ContrastiveGenerator(model, tokenizer())(texts, NEW, 4, 0.6, center=True)
    for text, answer in zip(texts, answers, strict=True):
        inputs = dict(tokenizer()([text], return_tensors="pt"))
        start = inputs["input_ids"].shape[1]
        (expected,) = truth(model, inputs)
        assert answer == tokenizer().decode(expected[start:], skip_special_tokens=True)
    assert answers != ContrastiveGenerator(model, tokenizer())(texts, NEW, 4, 0.6)


# ---- what may be said -----------------------------------------------------------------------------------------------


def test_option():
    assert repr(ContrastiveSearch(0.6, 4)) == "ContrastiveSearch(penalty_alpha=0.6, top_k=4)"
    assert repr(ContrastiveSearch(0.6, 4, center=True)) == "ContrastiveSearch(penalty_alpha=0.6, top_k=4, center=True)"
    for value in (1, "yes", None):
        with pytest.raises(ValueError, match=f"center must be True or False, got {value!r}"):
            ContrastiveSearch(center=value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"center": 1, "penalty_alpha": 0.6}, "center must be True or False, got 1"),
        ({"center": None}, "center must be True or False, got None"),
        ({"center": True}, "center=True is used by contrastive search alone: give penalty_alpha=..., without"),
        ({"center": True, "do_sample": True}, "center=True is used by contrastive search alone"),
        ({"center": True, "strategy": "fsd"}, "center=True is used by contrastive search alone"),
        ({"center": True, "strategy": "contrastive"}, "center=True is used by contrastive search alone"),
    ],
)
def test_what_plain_models_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        simctg_fast.generate(whole_texts(build("gpt2")), prompt(), max_new_tokens=2, **settings)


def test_what_lists_of_texts_are_refused():
    generator = ContrastiveGenerator(build("gpt2"), tokenizer())
    for settings, message in (
        ({"center": "yes"}, "center must be True or False, got 'yes'"),
        ({"center": True, "strategy": "guard"}, "center=True is used by contrastive search alone: give strategy='con"),
        ({"center": True, "strategy": AdaptiveContrastiveSearch()}, "center=True is used by contrastive search alone"),
    ):
        with pytest.raises(ValueError, match=message):
            generator(["abc"], 2, **settings)
    assert generator(["abc"], 2, center=False, strategy="fsd")


def test_of_a_whole_run():
    model = build("gpt2")
    with pytest.raises(ValueError, match="center must be true or false, got 1"):
        Engine(model, tokenizer(), center=1)
    with pytest.raises(ValueError, match="center is not used by strategy 'greedy', only by contrastive and"):
        Engine(model, tokenizer(), strategy="greedy", center=True)
    Engine(model, tokenizer(), strategy="greedy", center=False)
    engine = Engine(model, tokenizer(), slots=2, center=True, max_new_tokens=4)
    lines = [{"prompt": "abc"}, {"prompt": "abc", "center": False}, {"prompt": "abc", "center": "no"}]
    fine, other, bad = (result.error for result in engine.generate(lines, ordered=True))
    assert fine is None
    assert other["message"] == "center is false, but true in this run: it is of all its requests alike"
    assert "center must be true or false" in bad["message"]


def test_greedy_search_is_what_it_was():
    model, inputs = build("gpt2"), inputs_for(build("gpt2"), 2)
    for settings in ({"penalty_alpha": 0.0}, {"top_k": 1}):
        options = {"max_new_tokens": NEW, "pad_token_id": PAD, "eos_token_id": None}
        found = model.generate(**inputs, custom_generate=ContrastiveSearch(**settings, center=True), **options)
        assert torch.equal(found, model.generate(**inputs, do_sample=False, **options))
    settings = {"max_new_tokens": NEW, "pad_token_id": PAD}
    plain = simctg_fast.generate(whole_texts(model), **inputs, **settings, penalty_alpha=0.0, center=True)
    assert torch.equal(plain, model.generate(**inputs, do_sample=False, **options))
