"""Slots: rows of different lengths give what each gives alone; strategies; errors of single rows; memory."""

from __future__ import annotations

import collections
import copy
import math

import pytest
import torch
import transformers

import simctg_fast.engine.scheduler as scheduler_module
from simctg_fast import ContrastiveSearch
from simctg_fast.decoding.strategies import Contrastive
from simctg_fast.decoding.unsupported import UnsupportedError
from simctg_fast.engine import Engine
from simctg_fast.engine.scheduler import SlotScheduler
from simctg_fast.engine.slot_decoder import SlotDecoder
from simctg_fast.engine.slot_trial import slot_trial, verify
from simctg_fast.memory import free_bytes

from ..decoding_models import build, prompt, shared, tokenizer
from ..near_ties import same_tokens

LENGTHS = (3, 17, 60, 9, 31)
DECODERS = ("gpt2", "llama", "mistral", "gemma2")
ENCODER_DECODERS = ("bart", "t5")


def text(length: int, seed: int = 0) -> str:
    """A prompt of ``length`` tokens for the tokenizer of characters."""
    return tokenizer().decode(prompt(1, length, seed)[0])


def lines(model, lengths=LENGTHS, **more) -> list[dict]:
    key = "source" if model.config.is_encoder_decoder else "prompt"
    return [{"id": i, key: text(length, seed=i), **more} for i, length in enumerate(lengths)]


def run(model, requests, **options) -> dict:
    options = {"slots": 3, "batching": "slots", "max_new_tokens": 8} | options
    engine = Engine(model, tokenizer(), **options)
    results = {result.id: result for result in engine.generate(requests)}
    assert len(results) == len(requests)
    return results


def tokens(results: dict) -> dict:
    for result in results.values():
        assert result.error is None, result.error
    return {request_id: result.token_ids for request_id, result in results.items()}


def alone(model, line: dict, new_tokens=8, strategy=None, **kwargs) -> list[int]:
    """The same through ``generate``, without batch mates."""
    encoded = tokenizer()(line.get("prompt") or line["source"], return_tensors="pt")
    strategy = strategy or ContrastiveSearch(0.6, 4)
    ids = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    custom = {} if strategy == "greedy" else {"custom_generate": strategy}
    out = model.generate(**ids, **custom, max_new_tokens=new_tokens, do_sample=False, **kwargs)[0].tolist()
    return out[1:] if model.config.is_encoder_decoder else out[ids["input_ids"].shape[1] :]


def inputs_of(source: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": source, "attention_mask": torch.ones_like(source)}


def check(model, requests: list[dict], found: dict, expected: dict, **settings) -> None:
    """The tokens of each request are `expected`'s, but for near ties; `settings` are those of `same_tokens`."""
    assert found.keys() == expected.keys()
    for line in requests:
        ids = tokenizer()(line.get("prompt") or line["source"], return_tensors="pt")["input_ids"]
        start = [model.config.decoder_start_token_id] if model.config.is_encoder_decoder else ids[0].tolist()
        rows = ([start + tokens[line["id"]]] for tokens in (found, expected))
        same_tokens(*rows, model, inputs_of(ids), what=f"request {line['id']}", **settings)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_rows_of_different_lengths_give_what_each_gives_alone(name):
    """Outputs of different lengths as well: an encoder-decoder's rows all begin at one position."""
    model = shared(name)
    wanted = (20, 3, 9, 17, 6)
    requests = [line | {"max_new_tokens": new} for line, new in zip(lines(model), wanted, strict=True)]
    expected = {line["id"]: alone(model, line, line["max_new_tokens"]) for line in requests}
    results = run(model, requests)
    check(model, requests, tokens(results), expected)
    assert [len(results[i].token_ids) for i in range(5)] == list(wanted)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_decoder_rows_at_lengths_3_17_and_60(name):
    """An encoder-decoder's rows side by side at these lengths of their own, ten steps: as each goes on alone."""
    model = shared(name)
    engine = Engine(model, tokenizer(), slots=3, batching="slots", max_new_tokens=10)
    sequences = []
    for index, (length, line) in enumerate(zip((3, 17, 60), lines(model, (9, 31, 5)), strict=True)):
        (sequence,) = engine.prepare(engine.parse(line))
        sequence.prompt_ids += prompt(1, length - 1, seed=index + 10)[0].tolist()  # behind the start token
        sequences.append(sequence)
    assert {id(s) for s in engine.backend.run(iter(sequences))} == {id(s) for s in sequences}
    assert engine.stats["slots_busy"] == 1.0, "they ran side by side"
    for sequence in sequences:
        source = torch.tensor([sequence.source_ids])
        out = model.generate(
            source,
            attention_mask=torch.ones_like(source),
            decoder_input_ids=torch.tensor([sequence.prompt_ids]),
            custom_generate=ContrastiveSearch(0.6, 4),
            max_new_tokens=10,
            do_sample=False,
        )[0].tolist()
        same_tokens([sequence.prompt_ids + sequence.tokens], [out], model, inputs_of(source))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_greedy_is_transformers_greedy(name):
    model = shared(name)
    requests = lines(model)
    expected = {line["id"]: alone(model, line, strategy="greedy") for line in requests}
    check(model, requests, tokens(run(model, requests, strategy="greedy")), expected, penalty_alpha=0.0, top_k=1)


def test_prompts_are_run_in_chunks(monkeypatch):
    model = shared("mistral")  # its window crosses the borders of the chunks
    expected = tokens(run(model, lines(model)))
    monkeypatch.setattr(scheduler_module, "CHUNK", 7)
    monkeypatch.setattr(scheduler_module, "PREFILL_BUDGET", 7)
    check(model, lines(model), tokens(run(model, lines(model))), expected)


def test_lines_override_the_defaults():
    model = shared("gpt2")
    requests = lines(model, (9, 9, 9))
    requests[1] |= {"top_k": 2, "penalty_alpha": 0.2, "max_new_tokens": 5}
    requests[2] |= {"penalty_alpha": 0}
    expected = {
        0: alone(model, requests[0]),
        1: alone(model, requests[1], 5, ContrastiveSearch(0.2, 2)),
        2: alone(model, requests[2], strategy="greedy"),
    }
    found = tokens(run(model, requests))
    assert found.keys() == expected.keys()
    settings = ({}, {"penalty_alpha": 0.2, "top_k": 2}, {"penalty_alpha": 0.0, "top_k": 1})
    for line, own in zip(requests, settings, strict=True):
        check(model, [line], {line["id"]: found[line["id"]]}, {line["id"]: expected[line["id"]]}, **own)


def test_order_and_batch_mates_change_no_bit():
    """Log-probabilities as well: they would show the last bit."""
    model = shared("llama")
    requests = lines(model, (5, 40, 13, 22, 8, 30, 3, 6))
    together = run(model, requests, slots=4, logprobs=True)
    for variant in (requests[::-1], requests[3:] + requests[:3], requests[2:4], requests[:1]):
        for request_id, result in run(model, variant, slots=4, logprobs=True).items():
            assert result == together[request_id]
    for slots in (1, 2, 7):
        assert tokens(run(model, requests, slots=slots)) == tokens(together)


def test_seeds_belong_to_requests():
    model = shared("gpt2")
    requests = lines(model, (9, 12, 30), seed=5)
    for strategy, options in (("stochastic-contrastive", {"temperature": 0.5}), ("sample", {})):
        first = tokens(run(model, requests, strategy=strategy, **options))
        assert tokens(run(model, requests[::-1], strategy=strategy, slots=1, **options)) == first
        assert tokens(run(model, [requests[1]], strategy=strategy, seed=99, **options))[1] == first[1]
        other = [line | {"seed": 6} for line in requests]
        assert tokens(run(model, other, strategy=strategy, **options)) != first
        unseeded = [{k: v for k, v in line.items() if k != "seed"} for line in requests]
        by_run = [tokens(run(model, unseeded, strategy=strategy, seed=s, **options)) for s in (1, 1, 2)]
        assert by_run[0] == by_run[1] != by_run[2]


def test_n_samples_share_a_prompt(monkeypatch):
    model = shared("gpt2")
    fills = []
    prefill = SlotDecoder.prefill
    monkeypatch.setattr(
        SlotDecoder, "prefill", lambda self, slot, *a, **k: (fills.append(slot), prefill(self, slot, *a, **k))[1]
    )
    engine = Engine(model, tokenizer(), strategy="stochastic-contrastive", temperature=0.5, slots=4, max_new_tokens=8)
    fills.clear()
    (result,) = engine.generate([{"id": "a", "prompt": text(12), "n": 4, "seed": 1}])
    assert len(fills) == 1, "the prompt ran once"
    assert len({tuple(choice.token_ids) for choice in result.choices}) > 1
    assert result.usage == {"prompt_tokens": 12, "completion_tokens": 32}
    narrow = run(model, [{"id": "a", "prompt": text(12), "n": 4, "seed": 1}], strategy="stochastic-contrastive",
                 temperature=0.5, slots=3)  # fmt: skip
    assert narrow["a"].choices == result.choices, "whether or not all fit at once"


def test_sampling_draws_from_the_warped_distribution():
    """4,000 first tokens of one prompt, against what transformers' warpers leave of the model's distribution."""
    model = shared("gpt2")
    line = text(9)
    settings = {"temperature": 1.7, "top_k": 9, "top_p": 0.9}
    ids = torch.tensor([tokenizer()(line)["input_ids"]])
    logits = model(ids).logits[:, -1]
    for warper in (
        transformers.TemperatureLogitsWarper(1.7),
        transformers.TopKLogitsWarper(9),
        transformers.TopPLogitsWarper(0.9),
    ):
        logits = warper(ids, logits)
    expected = torch.softmax(logits, dim=-1)[0]
    draws = 4000
    requests = [{"id": i, "prompt": line, "n": 1000, "seed": i, **settings} for i in range(draws // 1000)]
    results = run(model, requests, strategy="sample", slots=100, max_new_tokens=1)
    counts = collections.Counter(c.token_ids[0] for r in results.values() for c in r.choices)
    assert sum(counts.values()) == draws
    for token, count in counts.items():
        p = expected[token].item()
        assert p > 0
        assert abs(count - draws * p) < 5 * math.sqrt(draws * p * (1 - p)) + 1


def test_stochastic_contrastive_search_follows_its_scores():
    """First tokens of one prompt: candidate i with probability ∝ exp(score_i / temperature)."""
    model = shared("gpt2")
    trace = run(model, [{"id": 0, "prompt": text(9)}], trace=True, max_new_tokens=1)[0].trace[0]["candidates"]
    scores = torch.tensor([candidate["score"] for candidate in trace])
    expected = torch.softmax(scores / 0.3, dim=0)
    request = [{"id": 0, "prompt": text(9), "n": 1000, "seed": 3}]
    result = run(model, request, strategy="stochastic-contrastive", temperature=0.3, slots=100, max_new_tokens=1)[0]
    counts = collections.Counter(choice.token_ids[0] for choice in result.choices)
    for candidate, p in zip(trace, expected.tolist(), strict=True):
        assert abs(counts[candidate["token_id"]] - 1000 * p) < 5 * math.sqrt(1000 * p * (1 - p)) + 1


def test_the_trace_explains_every_token():
    model = shared("llama")
    (result,) = run(model, [{"id": 0, "prompt": text(9)}], trace=True, logprobs=True).values()
    ids = tokenizer()(text(9))["input_ids"] + result.token_ids
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_hidden_states=True)
    states = torch.nn.functional.normalize(out.hidden_states[-1][0], dim=-1)
    log_probs = out.logits[0].log_softmax(dim=-1)
    for step, (entry, logprob) in enumerate(zip(result.trace, result.logprobs, strict=True)):
        place = 9 + step
        assert entry["token_id"] == logprob["token_id"] == ids[place]
        assert logprob["logprob"] == pytest.approx(log_probs[place - 1, ids[place]].item(), abs=1e-4)
        best = max(entry["candidates"], key=lambda candidate: candidate["score"])
        assert best["token_id"] == entry["token_id"]
        cosines = states[:place] @ states[place]
        assert best["penalty"] == pytest.approx(cosines.max().item(), abs=1e-4)
        assert cosines[best["because"]["position"]].item() == pytest.approx(best["penalty"], abs=1e-4)
        assert best["because"]["token_id"] == ids[best["because"]["position"]]
        assert best["score"] == pytest.approx(0.4 * best["probability"] - 0.6 * best["penalty"], abs=1e-5)


def test_ends_of_text_and_stop_strings():
    model = shared("gpt2")
    line = {"id": 0, "prompt": text(9)}
    written = tokens(run(model, [line], max_new_tokens=12))[0]
    words = tokenizer().decode(written)
    stopped = run(model, [line | {"stop": [words[4:6]]}], max_new_tokens=12)[0]
    end = words.index(words[4:6])
    assert stopped.text == words[:end]
    assert stopped.token_ids == written[: end + 2]
    assert stopped.finish_reason == "stop"
    ending = build("gpt2", eos_token_id=written[5])
    ended = run(ending, [line], max_new_tokens=12)[0]
    assert ended.token_ids == written[: written.index(written[5]) + 1]
    assert ended.finish_reason == "stop"
    assert run(model, [line], max_new_tokens=3)[0].finish_reason == "length"


class Ban(transformers.LogitsProcessor):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        assert input_ids.shape[0] == 1, "one request at a time"
        scores = scores.clone()
        scores[:, self.token] = -math.inf
        return scores


class StopAfter(transformers.StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= self.length])


class Raise(transformers.LogitsProcessor):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.length:
            raise KeyError("broken")
        return scores


def factory(request: dict, tokenizer) -> object:
    kind = str(request["id"]).split("-")[0]
    if kind == "ban":
        return Ban(int(str(request["id"]).split("-")[1]))
    if kind == "stop":
        return [StopAfter(13)]
    if kind == "raise":
        return Raise(int(str(request["id"]).split("-")[1]))
    if kind == "refuse":
        raise ValueError("not this one")
    return None


@pytest.mark.parametrize("batching", ["slots", "static"])
def test_processors_of_single_requests(batching):
    model = shared("gpt2")
    plain = tokens(run(model, [{"id": "x", "prompt": text(9)}]))["x"]
    names = ["x", f"ban-{plain[2]}", "stop-1", "raise-9", "raise-12", "refuse-1"]
    requests = [{"id": name, "prompt": text(9)} for name in names]
    results = run(model, requests, processor=factory, batching=batching)
    assert results["x"].token_ids == plain
    banned = results[names[1]].token_ids
    assert plain[2] not in banned
    expected = {names[1]: alone(model, requests[1], suppress_tokens=[plain[2]])}
    check(model, requests[1:2], {names[1]: banned}, expected, logits_processor=Ban(plain[2]))
    assert results["stop-1"].token_ids == plain[:4]
    assert results["stop-1"].finish_reason == "stop"
    for name in ("raise-9", "raise-12"):  # at the first token, before any step, and at a later one
        assert results[name].error["type"] == "processor_error"
        assert "KeyError: 'broken'" in results[name].error["message"]
    assert "ValueError: not this one" in results["refuse-1"].error["message"]


def test_what_the_models_configuration_asks_for():
    model = build("gpt2")
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.no_repeat_ngram_size = 2
    requests = lines(model)
    expected = {line["id"]: alone(model, line) for line in requests}
    processors = transformers.LogitsProcessorList(
        [transformers.RepetitionPenaltyLogitsProcessor(1.5), transformers.NoRepeatNGramLogitsProcessor(2)]
    )
    check(model, requests, tokens(run(model, requests)), expected, logits_processor=processors)


@pytest.mark.parametrize("batching", ["slots", "static"])
def test_nan_logits_of_one_row(batching, monkeypatch):
    """A row whose hidden states turn into NaN is an error record, the others are what they were."""
    model = build("gpt2")
    poison = 50
    with torch.no_grad():
        model.transformer.wte.weight[poison] = math.nan
        model.lm_head.weight[poison] = -1.0  # nobody writes it
    good = [{"id": i, "prompt": "hello world"[: 4 + i]} for i in range(4)]
    bad = {"id": "bad", "prompt": tokenizer().decode([10, poison, 11])}
    expected = tokens(run(model, good, batching=batching))
    results = run(model, [*good[:2], bad, *good[2:]], batching=batching)
    assert results["bad"].error["type"] == "nan_logits"
    check(model, good, {i: results[i].token_ids for i in range(4)}, expected)


def test_models_that_cannot_take_slots_run_in_static_batches():
    for name in ("bloom", "mamba"):
        model = shared(name)
        engine = Engine(model, tokenizer(), slots=3, max_new_tokens=6)
        assert engine.stats["batching"] == "static"
        requests = lines(model, (3, 17, 9, 9, 5, 4))
        engine.backend.lookahead = 4
        results = {result.id: result.token_ids for result in engine.generate(requests)}
        check(model, requests, results, {line["id"]: alone(model, line, 6) for line in requests})
        reason = {"bloom": "does not use the attention interface", "mamba": "not plain keys and values"}[name]
        with pytest.raises(ValueError, match=f"batching='slots' cannot serve .*{reason}"):
            Engine(model, tokenizer(), batching="slots")


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_static_batches_give_the_same(name):
    model = shared(name)
    requests = lines(model)
    check(model, requests, tokens(run(model, requests, batching="static")), tokens(run(model, requests)))


def test_the_trial_is_needed():
    """A model that is silently wrong with rows of different lengths does not pass."""
    model = build("llama")
    truth = slot_trial(model, 3, 2, None)
    rotary = model.model.rotary_emb
    plain = rotary.forward
    rotary.forward = lambda x, position_ids: plain(x, position_ids=position_ids.amax().expand_as(position_ids))
    decoder = SlotDecoder(model, 3, Contrastive(2))
    with decoder, pytest.raises(UnsupportedError, match="differ from those of transformers' own step"):
        verify(decoder, truth)


def test_too_long_requests_and_foreign_keys():
    model = shared("gpt2")
    requests = [
        {"id": 0, "prompt": text(9), "max_new_tokens": 1016},
        {"id": 1, "prompt": text(9), "top_k": 5},
        {"id": 2, "source": "x"},
        {"id": 3, "messages": [{"role": "user", "content": "x"}]},
        {"id": 4, "prompt": text(9)},
    ]
    results = run(model, requests)
    assert results[0].error["type"] == "too_long"
    assert "9 prompt tokens and max_new_tokens=1016 are more than the model's 1024" in results[0].error["message"]
    assert "top_k is 5, more than the 4 that this run computes" in results[1].error["message"]
    assert results[2].error["type"] == "wrong_content"
    assert results[3].error["type"] == "no_chat_template"
    assert results[4].error is None


def test_chat_templates():
    model = shared("gpt2")
    chat = copy.deepcopy(tokenizer())
    chat.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    engine = Engine(model, chat, slots=2, max_new_tokens=8)
    asked = [{"id": 0, "messages": [{"role": "user", "content": "Hi"}]}, {"id": 1, "prompt": "user: Hi\nassistant:"}]
    results = {result.id: result for result in engine.generate(asked)}
    assert results[0].token_ids == results[1].token_ids


@pytest.mark.parametrize("strategy", ["contrastive", "greedy"])
@pytest.mark.parametrize("where", ["proceed", "prefill"])
def test_out_of_memory_halves_the_slots_and_goes_on(where, strategy, monkeypatch, caplog):
    """Some rows have ended in the very step that fails: they are not written again, nor lost."""
    model = shared("gpt2")
    requests = lines(model, (5, 40, 13, 22, 8, 30, 3, 6))
    requests = [line | {"max_new_tokens": 2 + i} for i, line in enumerate(requests)]
    expected = tokens(run(model, requests, strategy=strategy))
    original = getattr(SlotDecoder, where)
    calls = []

    def fails(self, *args):
        calls.append(1)
        if self.count > 2 and len(calls) > 3:
            raise torch.OutOfMemoryError("injected")
        return original(self, *args)

    engine = Engine(model, tokenizer(), slots=8, strategy=strategy)
    monkeypatch.setattr(SlotDecoder, where, fails)
    results = {result.id: result for result in engine.generate(requests)}
    assert tokens(results) == expected
    assert engine.stats["out_of_memory"] == 2
    assert engine.stats["slots"] == 2
    assert "out of memory with 8 slots (injected): going on with 4" in caplog.text


def test_one_slot_that_does_not_fit_fails_alone(monkeypatch):
    model = shared("gpt2")
    original = SlotDecoder.prefill

    def fails(self, slot, ids, start, last):
        if len(ids) > 50:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return original(self, slot, ids, start, last)

    engine = Engine(model, tokenizer(), slots=2, max_new_tokens=8)
    monkeypatch.setattr(SlotDecoder, "prefill", fails)
    results = {result.id: result for result in engine.generate(lines(model, (5, 60, 9)))}
    assert results[1].error["type"] == "out_of_memory"
    assert results[0].error is None
    assert results[2].error is None


def test_a_share_of_the_memory_makes_the_slots(monkeypatch):
    model = shared("gpt2")
    monkeypatch.setattr(scheduler_module, "free_bytes", lambda device: 20 * 2**20)
    engine = Engine(model, tokenizer(), memory=0.5, max_new_tokens=8)
    per_position = 2 * 2 * 32 * 4 + 32 * 4  # two layers' keys and values, and the history
    assert engine.stats["slots"] == 10 * 2**20 // (per_position * 1024)
    results = {result.id: result.token_ids for result in engine.generate(lines(model))}
    assert results == tokens(run(model, lines(model)))


def test_the_model_is_left_as_it_was():
    model = build("bart")
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    run(model, lines(model))
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys(), name
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert model.config._attn_implementation != "simctg_fast_shared_prefix"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slots": 0}, "slots must be an integer of at least 1, got 0"),
        ({"memory": 1.5}, "memory must be a share above 0 and at most 1, got 1.5"),
        ({"slots": 4, "memory": 0.5}, "give one of them"),
        ({"strategy": "beam"}, "strategy must be one of"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"batching": "paged"}, "batching must be one of auto, slots, static, got 'paged'"),
        ({"top_k": 99}, "top_k must be at most the vocabulary size 98, got 99"),
        ({"temperature": 0.5}, "temperature is not used by strategy 'contrastive'"),
        ({"processor": "nowhere"}, "processor must be spelled module:factory"),
        ({"processor": "nowhere:f"}, "cannot be imported"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        Engine(shared("gpt2"), tokenizer(), **options)


def test_slots_stay_busy():
    model = shared("gpt2")
    engine = Engine(model, tokenizer(), slots=4, batching="slots")
    requests = [{"id": i, "prompt": "x", "max_new_tokens": 4 + 7 * i % 29} for i in range(60)]
    assert len(list(engine.generate(requests))) == 60
    assert engine.stats["slots_busy"] > 0.9


def test_stop_finishes_what_is_in_work():
    engine = Engine(shared("gpt2"), tokenizer(), slots=2, max_new_tokens=8)
    results = []
    for result in engine.generate([{"id": i, "prompt": "x"} for i in range(10)]):
        results.append(result)
        engine.stop()
    assert 1 <= len(results) <= 2
    assert all(result.finish_reason == "length" for result in results)
    assert isinstance(engine.backend, SlotScheduler)


def test_free_memory_on_a_gpu_counts_what_torch_holds(monkeypatch):
    """Blocks that torch keeps for later are not free for the driver."""
    sizes = {"mem_get_info": (100, 1000), "memory_reserved": 700, "memory_allocated": 400}
    for name, size in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"inactive_split_bytes.all.current": 50})
    assert free_bytes(torch.device("cuda")) == 350


def test_memory_is_reckoned_before_it_is_touched(monkeypatch, caplog):
    """No allocation fails where a system hands out memory on trust."""
    model = shared("gpt2")
    requests = lines(model, (5, 40, 13, 22, 8, 30, 3, 6))
    expected = tokens(run(model, requests))
    engine = Engine(model, tokenizer(), slots=8, max_new_tokens=8)
    monkeypatch.setattr(scheduler_module, "free_bytes", lambda device: 500_000)  # of slots of 256 positions
    assert tokens({result.id: result for result in engine.generate(requests)}) == expected
    assert engine.stats["slots"] == 2
    assert engine.stats["out_of_memory"] == 2
    assert "do not fit into the free memory" in caplog.text


def test_static_batches_fit_into_memory(monkeypatch):
    from simctg_fast.engine import static

    model = shared("gpt2")
    requests = lines(model, (10,) * 12)
    expected = tokens(run(model, requests, batching="static", slots=12))
    sizes = []
    original = static.StaticBatches._run_batch
    monkeypatch.setattr(
        static.StaticBatches, "_run_batch", lambda s, batch: sizes.append(len(batch)) or original(s, batch)
    )
    monkeypatch.setattr(static, "free_bytes", lambda device: 100_000)
    assert tokens(run(model, requests, batching="static", slots=12)) == expected
    one_row = 2 * 2 * 32 * 4 * 4 * (10 + 8) + 16 * 98 * 4
    assert max(sizes) == int(0.9 * 100_000 // one_row)
    assert sum(sizes) == 12
    monkeypatch.setattr(static, "free_bytes", lambda device: 1)
    sizes.clear()
    assert tokens(run(model, requests, batching="static", slots=12)) == expected
    assert sizes == [1] * 12


def test_what_is_reckoned_is_what_a_decoder_holds():
    model = shared("gpt2")
    engine = Engine(model, tokenizer(), slots=8, batching="slots", max_new_tokens=8)
    scheduler = engine.backend
    with scheduler._running():
        decoder = scheduler._decoder
        decoder.slots.reserve(256)
        decoder.prefill(0, [5, 6, 7], 0, last=True)
        held = sum(b.nbytes for layer in decoder.slots.layers for b in (layer.keys, layer.values))
        held += decoder.slots.history.states.nbytes + decoder.logits.nbytes
    reckoned = 8 * (scheduler.bytes_per_position * decoder.slots.extent.capacity + scheduler.bytes_per_slot)
    assert held <= reckoned <= 1.5 * held


def test_limits_of_control_groups_count(monkeypatch, tmp_path):
    from simctg_fast import memory

    monkeypatch.setattr(memory, "_available", lambda: 10**9)
    monkeypatch.setattr(memory, "_left_in_groups", lambda: iter([3 * 10**8, 10**12]))
    assert free_bytes(torch.device("cpu")) == 3 * 10**8
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 300\n")
    names = ("memory.max", "memory.current", "inactive_file")
    assert list(memory._left_in(tmp_path, *names)) == [400]
    (tmp_path / "memory.max").write_text("max\n")
    assert list(memory._left_in(tmp_path, *names)) == []
    assert list(memory._left_in(tmp_path / "none", *names)) == []


def test_a_request_that_no_slot_can_hold_fails_alone():
    model = shared("t5")  # which has no table of positions
    requests = [*lines(model), {"id": 9, "source": "x", "max_new_tokens": 2**31 - 1}]
    engine = Engine(model, tokenizer(), slots=4, batching="slots", max_new_tokens=8)
    results = {result.id: result for result in engine.generate(requests)}
    assert results[9].error["type"] == "out_of_memory"
    assert tokens({i: results[i] for i in range(5)}) == tokens(run(model, lines(model), slots=4))
    assert (engine.stats["slots"], engine.stats["out_of_memory"]) == (4, 0)


@pytest.mark.parametrize("batching", ["slots", "static"])
def test_no_more_slots_than_are_of_use(batching):
    model = shared("gpt2")
    engine = Engine(model, tokenizer(), slots=100_000, batching=batching, max_new_tokens=8)
    found = {result.id: result for result in engine.generate(lines(model))}
    assert tokens(found) == tokens(run(model, lines(model)))
    few = Engine(model, tokenizer(), slots=64, batching="slots", max_new_tokens=8)
    assert tokens({result.id: result for result in few.generate(lines(model))}) == tokens(found)
    assert few.stats["slots"] == len(LENGTHS)
    if batching == "slots":
        assert engine.stats["slots"] <= 256
