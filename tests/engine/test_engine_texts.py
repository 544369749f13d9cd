"""Texts of the engine: where they stop, what they hold, how they are cut, streamed, ordered and embedded."""

from __future__ import annotations

import base64
import copy
import json
import struct

import numpy as np
import pytest
import torch
import transformers

from simctg_fast import extract_features
from simctg_fast.engine import Engine, RequestError
from simctg_fast.engine.sequence import Sequence
from simctg_fast.engine.text_generation import TextGenerator

from .. import toy_t5
from ..decoding_models import build, draw, shared, tokenizer

PROMPT = "what is written next"


def engine(model=None, made_of=None, **options) -> Engine:
    settings = {"slots": 4, "max_new_tokens": 24, "strategy": "greedy"} | options
    return Engine(model or shared("gpt2"), made_of or tokenizer(), **settings)


def one(line, **options):
    (result,) = engine(**options).generate(line)
    assert result.error is None, result.error
    return result


def refusal(line, **options) -> dict:
    (result,) = engine(**options).generate(line)
    assert result.error is not None
    return result.error


# ---- stops -----------------------------------------------------------------------------------------------------------


def test_stop_strings_and_what_is_kept_of_them():
    whole = one({"prompt": PROMPT}).text
    stop = whole[5:8]
    at = whole.index(stop)
    stopped = one({"prompt": PROMPT, "stop": stop})
    assert (stopped.text, stopped.finish_reason) == (whole[:at], "stop")
    assert one({"prompt": PROMPT, "stop": [stop], "include_stop_str_in_output": True}).text == whole[: at + 3]
    assert one({"prompt": PROMPT, "stop": whole[0]}).text == "", "at the very first token"


def test_stop_tokens_are_no_part_of_the_text():
    whole = one({"prompt": PROMPT})
    stop = whole.token_ids[6]
    place = whole.token_ids.index(stop)
    stopped = one({"prompt": PROMPT, "stop_token_ids": [stop]})
    assert stopped.token_ids == whole.token_ids[: place + 1]
    assert (stopped.text, stopped.finish_reason) == (whole.text[:place], "stop")
    included = one({"prompt": PROMPT, "stop_token_ids": [stop, 5], "include_stop_str_in_output": True})
    assert included.text == whole.text[: place + 1]
    error = refusal({"prompt": PROMPT, "stop_token_ids": [98]})
    assert "stop_token_ids has token 98, the model knows 0 … 97" in error["message"]


def test_the_model_s_own_end_is_no_stop_token():
    ids = one({"prompt": PROMPT}).token_ids
    model = build("gpt2", eos_token_id=ids[4])
    expected = one({"prompt": PROMPT}, model=model)
    assert expected.finish_reason == "stop"
    assert one({"prompt": PROMPT, "stop_token_ids": [ids[4]]}, model=model).text == expected.text


class Forced:
    """A processor that lets one sequence of tokens be written."""

    def __init__(self, tokens):
        self.tokens, self.at = tokens, 0

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -1e4)
        forced[:, self.tokens[self.at]] = 0.0
        self.at += 1
        return forced


@pytest.fixture(scope="module")
def chat():
    """A tokenizer with a special token of a chat format."""
    made = copy.deepcopy(tokenizer())
    made.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    return made


@pytest.fixture(scope="module")
def wide(chat):
    return build("gpt2", vocab_size=len(chat))


def written(model, made_of, text, **line):
    """A sequence in which the model has written the tokens of ``text``."""
    ids = made_of(text, add_special_tokens=False)["input_ids"]
    settings = {"max_new_tokens": len(ids), "strategy": "greedy", "slots": 2}
    made = Engine(model, made_of, processor=lambda request, _: Forced(ids), **settings)
    (result,) = made.generate({"prompt": "x", **line})
    assert result.error is None, result.error
    return result


@pytest.mark.parametrize(
    ("stop", "more", "expected"),
    [
        ("<|im_end|>", {}, "ab"),
        ("<|im_end|>", {"include_stop_str_in_output": True}, "ab<|im_end|>"),
        ("<|im_end|>", {"skip_special_tokens": False}, "ab"),
        ("b<|im_end|>c", {}, "a"),
        ("b<|im_end|>c", {"include_stop_str_in_output": True}, "ab<|im_end|>c"),
        ("<|im_end|>\n", {}, "abcd"),
        ("bc", {}, "a"),
        ("bc", {"skip_special_tokens": False}, "ab<|im_end|>cd"),
        (["zz", "d", "<|im_end|>c"], {}, "ab"),
    ],
)
def test_stops_that_are_or_hold_special_tokens(wide, chat, stop, more, expected):
    assert written(wide, chat, "ab<|im_end|>cd", stop=stop, **more).text == expected


def test_a_stop_that_begins_within_a_character_of_several_tokens():
    made = TextGenerator("bundled", max_new_tokens=8)
    made_of = made.engine.tokenizer
    ids = made_of("a 😀")["input_ids"] + [made_of.eos_token_id] + made_of("x")["input_ids"]
    made.engine.prepare.factory = lambda request, _: Forced((ids * 8)[:8])
    made.engine.prepare.ends = frozenset()
    line = {"prompt": "x", "stop": f"😀{made_of.eos_token}x"}
    (result,) = made.engine.generate(line)
    assert (result.text, result.finish_reason) == ("a ", "stop")


def test_special_tokens_in_the_text_on_request(wide, chat):
    assert written(wide, chat, "ab<|im_end|>cd").text == "abcd"
    assert written(wide, chat, "ab<|im_end|>cd", skip_special_tokens=False).text == "ab<|im_end|>cd"


# ---- sentencepiece ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A Llama with a sentencepiece tokenizer, whose pieces carry the space before them."""
    folder = tmp_path_factory.mktemp("pieces")
    lines = ["the cat sat on the mat and the dog sat on the log while the cat ran"] * 40
    toy_t5.train_sentencepiece(folder, lines, model_type="bpe", bos_id=1, eos_id=2, unk_id=0, pad_id=-1)
    (folder / "spiece.model").rename(folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "legacy": false, "add_bos_token": true}'
    )
    made_of = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(made_of),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        eos_token_id=None,
    )
    return draw(transformers.LlamaForCausalLM(config)), made_of


def test_a_continuation_keeps_the_space_before_it(pieces):
    model, made_of = pieces
    prompt = made_of("the cat")["input_ids"]
    for seed in range(6):
        sampled = {"strategy": "sample", "max_new_tokens": 12, "seed": seed, "logprobs": True}
        result = one({"prompt": "the cat"}, model=model, made_of=made_of, **sampled)
        whole = made_of.decode(prompt + result.token_ids, skip_special_tokens=True)
        assert "the cat" + result.text == whole
        raw = made_of.decode(prompt[1:] + result.token_ids)
        assert "the cat" + "".join(record["token"] for record in result.logprobs) == raw


def test_an_answer_is_a_text_of_its_own(pieces):
    model, made_of = pieces
    made_of = copy.deepcopy(made_of)
    made_of.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    asked = [{"role": "user", "content": "the cat"}]
    new = {"max_new_tokens": 12, "model": model, "made_of": made_of, "strategy": "sample", "seed": 3}
    result = one({"id": 1, "messages": asked}, **new)
    assert result.text == made_of.decode(result.token_ids, skip_special_tokens=True)
    going_on = one({"id": 1, "messages": asked, "continue_final_message": True}, **new)
    assert going_on.text.lstrip() == result.text.lstrip()


# ---- the context -----------------------------------------------------------------------------------------------------


def test_prompts_are_cut_on_request():
    model = shared("gpt2")
    text = "".join(chr(97 + i % 26) for i in range(60))
    expected = one({"prompt": text[-10:]})
    assert one({"prompt": text, "truncate_prompt_tokens": 10}).token_ids == expected.token_ids
    assert one({"prompt": text[-10:], "truncate_prompt_tokens": 11}).token_ids == expected.token_ids
    long = "x" * 2000
    error = refusal({"prompt": long})
    assert error["type"] == "too_long"
    assert "truncate_prompt_tokens and clamp_max_new_tokens make them fit" in error["message"]
    result = one({"prompt": long, "truncate_prompt_tokens": -1})
    assert result.usage["prompt_tokens"] == model.config.n_positions - 24
    made = engine()
    greedy = made.parse(
        {"prompt": long, "truncate_prompt_tokens": -1, "clamp_max_new_tokens": True, "max_new_tokens": 5000}
    )
    (sequence,) = made.prepare(greedy)
    assert (len(sequence.prompt_ids), sequence.parameters.max_new_tokens) == (512, 512)


def test_the_beginning_of_text_stays_when_a_prompt_is_cut(pieces):
    model, made_of = pieces
    made = Engine(model, made_of, strategy="greedy", slots=2, max_new_tokens=4)
    request = made.parse({"prompt": "the cat sat on the mat", "truncate_prompt_tokens": 4})
    (sequence,) = made.prepare(request)
    whole = made_of("the cat sat on the mat")["input_ids"]
    assert sequence.prompt_ids == [made_of.bos_token_id, *whole[-3:]]


def test_sources_are_cut_before_their_end():
    model = shared("t5")
    made_of = copy.deepcopy(tokenizer())
    made = Engine(model, made_of, strategy="greedy", slots=2, max_new_tokens=4)
    (sequence,) = made.prepare(made.parse({"source": "abcdefghij", "truncate_prompt_tokens": 4}))
    assert sequence.source_ids == made_of("abcd")["input_ids"]
    made_of.eos_token = "j"
    (sequence,) = made.prepare(made.parse({"source": "abcdefghij", "truncate_prompt_tokens": 4}))
    assert sequence.source_ids == made_of("abcj")["input_ids"], "what ends a source stays"


def test_continuations_end_with_the_context_on_request():
    result = one({"prompt": "x" * 1020, "clamp_max_new_tokens": True})
    assert (len(result.token_ids), result.finish_reason) == (4, "length")
    whole = one({"prompt": "x" * 1000})
    assert one({"prompt": "x" * 1000, "clamp_max_new_tokens": True}).token_ids == whole.token_ids
    error = refusal({"prompt": "x" * 1024, "clamp_max_new_tokens": True})
    assert error["type"] == "too_long"


# ---- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["greedy", "contrastive", "sample"])
@pytest.mark.parametrize("batching", ["slots", "static"])
def test_log_probabilities_are_those_of_a_plain_forward(strategy, batching):
    model = shared("gpt2")
    options = {"strategy": strategy, "batching": batching, "slots": 3}
    options |= {"top_p": 0.9, "temperature": 0.5} if strategy == "sample" else {}
    lines = [{"id": i, "prompt": PROMPT[: 5 + i], "logprobs": i != 1, "top_logprobs": (3, 0, 20)[i]} for i in range(3)]
    for result in engine(model, **options).generate(lines):
        if result.id == 1:
            assert result.logprobs is None
            continue
        prompt = tokenizer()(PROMPT[: 5 + result.id])["input_ids"]
        ids = torch.tensor([prompt + result.token_ids])
        with torch.no_grad():
            truth = model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        for place, record in enumerate(result.logprobs):
            assert record["token_id"] == result.token_ids[place]
            assert record["logprob"] == pytest.approx(truth[place, record["token_id"]].item(), abs=1e-4)
            best = truth[place].topk((3, 0, 20)[result.id])
            found = [each["logprob"] for each in record["top_logprobs"]]
            assert found == pytest.approx(best.values.tolist(), abs=1e-4)
            assert "".join(each["token"] for each in result.logprobs) == result.text


def test_temperature_zero_is_the_best_of_what_the_strategy_allows():
    line = {"id": 1, "prompt": PROMPT}
    greedy, contrastive = one(line), one(line, strategy="contrastive")
    assert one(line | {"temperature": 0, "seed": 5}, strategy="sample").token_ids == greedy.token_ids
    assert one(line | {"temperature": 1e-320}, strategy="sample", top_p=0.5).token_ids == greedy.token_ids
    cold = one(line | {"temperature": 0}, strategy="stochastic-contrastive")
    assert cold.token_ids == contrastive.token_ids


# ---- requests --------------------------------------------------------------------------------------------------------


def test_a_bare_string_is_one_prompt_and_a_bare_dict_one_request():
    expected = one({"prompt": PROMPT}).token_ids
    assert [result.token_ids for result in engine().generate(PROMPT)] == [expected]
    assert [result.token_ids for result in engine().generate({"prompt": PROMPT})] == [expected]
    made = engine()
    assert [result.token_ids for result in made.generate(made.parse(PROMPT, number=1))] == [expected]
    request = made.parse(PROMPT, number=1)
    assert [result.token_ids for result in made.generate([request, request])] == [expected, expected]
    for bad in (b"bytes", None, 7):
        with pytest.raises(TypeError, match="requests must be a string, a dict, a Request or an iterable"):
            made.generate(bad)
    mixed = list(made.generate([PROMPT, None, 7, ["x"], {"prompt": "x", 5: 6}], ordered=True))
    assert [None if result.error is None else result.error["type"] for result in mixed] == [
        None,
        "not_an_object",
        "not_an_object",
        "not_an_object",
        "unknown_key",
    ]


def test_results_in_the_order_of_the_requests():
    lines = [{"id": i, "prompt": "ab", "max_new_tokens": 1 + 17 * i % 13} for i in range(30)]
    lines[4] = {"id": 4, "prompt": ""}
    lines[9] = {"id": 9, "prompt": "x", "nonsense": 1}
    free = list(engine(slots=3).generate(lines))
    assert [result.id for result in free] != list(range(30))
    assert {result.index: result.id for result in free} == {i: i for i in range(30)}
    ordered = list(engine(slots=3).generate(iter(lines), ordered=True))
    assert [result.id for result in ordered] == list(range(30))
    assert sorted(free, key=lambda result: result.id) == ordered


def test_an_openai_line_with_several_prompts():
    body = {"prompt": ["ab", "cde"], "max_tokens": 5, "n": 2, "seed": 3}
    result = one({"custom_id": "a", "body": body}, strategy="sample")
    assert len(result.choices) == 4
    assert result.usage == {"prompt_tokens": 5, "completion_tokens": 20}
    single = one({"custom_id": "a", "body": body | {"prompt": "ab"}}, strategy="sample")
    assert [choice.text for choice in single.choices] == [choice.text for choice in result.choices[:2]]
    greedy = one({"custom_id": "a", "body": {"prompt": ["ab", "cde"], "max_tokens": 5}})
    assert [choice.text for choice in greedy.choices] == [
        one({"prompt": prompt, "max_new_tokens": 5}).text for prompt in ("ab", "cde")
    ]


class Refusing:
    """A tokenizer that does what tokenizers do to texts they do not like."""

    def __init__(self, how):
        self._made_of, self._how = tokenizer(), how

    def __getattr__(self, name):
        return getattr(self._made_of, name)

    def __call__(self, text, **options):
        if "bad" in str(text):
            if self._how == "panic":
                raise type("PanicException", (BaseException,), {})("a Rust panic")
            if self._how == "raises":
                raise KeyError("no such token")
            made: dict = {"nothing": None, "none": {"input_ids": None}}
            return (made | {"empty": {"input_ids": []}, "text": {"input_ids": "ab"}})[self._how]
        return self._made_of(text, **options)


@pytest.mark.parametrize("how", ["raises", "panic", "nothing", "none", "empty", "text"])
def test_what_a_tokenizer_does_to_one_text_is_that_request_s_affair(how):
    lines = [{"id": 0, "prompt": "good"}, {"id": 1, "prompt": "bad"}, {"id": 2, "prompt": "good"}]
    results = list(engine(made_of=Refusing(how)).generate(lines, ordered=True))
    assert results[1].error["type"] in ("tokenizer_error", "empty_prompt")
    assert results[0].error is results[2].error is None
    assert results[0].token_ids == results[2].token_ids


def test_lone_surrogates_and_templates_that_raise():
    made_of = copy.deepcopy(tokenizer())
    made_of.chat_template = "{{ raise_exception('roles must alternate') }}"
    lines = [
        {"id": 0, "prompt": "x\ud83d"},
        {"id": "\ud83d", "prompt": "fine"},
        {"id": 2, "messages": [{"role": "user", "content": "x"}]},
        {"id": 3, "prompt": "fine", "stop": "\ud83d"},
    ]
    results = list(engine(made_of=made_of).generate(lines, ordered=True))
    assert "roles must alternate" in results[2].error["message"]
    assert results[2].error["type"] == "chat_template_error"
    assert results[1].error is results[3].error is None
    assert json.loads(results[1].as_line())["id"] == "\ud83d"


# ---- as it is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["slots", "static"])
def test_texts_arrive_as_they_are_written(batching):
    whole = one({"prompt": PROMPT}).text
    arrived: dict = {}

    def on_text(request, index, new):
        assert index == 0
        arrived.setdefault(request.id, []).append(new)

    lines = [{"id": 0, "prompt": PROMPT}, {"id": 1, "prompt": PROMPT, "stop": whole[6:9]}]
    results = {result.id: result for result in engine(batching=batching).generate(lines, on_text=on_text)}
    for request_id, result in results.items():
        assert "".join(arrived[request_id]) == result.text
    assert len(arrived[0]) > 20
    assert results[1].text == whole[: whole.index(whole[6:9])], "nothing of the stop string was shown"


def test_half_characters_are_held_back(tmp_path):
    made = TextGenerator("bundled", max_new_tokens=12)
    ids = (made.engine.tokenizer("naïve 😀 text")["input_ids"] * 3)[:12]
    made.engine.prepare.factory = lambda request, _: Forced(ids)
    arrived = []
    (result,) = made(["x"], lambda request, index, new: arrived.append(new))
    assert "".join(arrived) == result.text
    assert any(new.endswith("😀") for new in arrived)
    assert not any("\ufffd" in new for new in arrived)


def test_a_sequence_that_begins_again_does_not_show_its_text_twice():
    made = engine()
    arrived = []
    (sequence,) = made.prepare(made.parse({"prompt": "x"}), lambda index, new: arrived.append(new))
    assert isinstance(sequence, Sequence)
    for token in tokenizer()("abc")["input_ids"]:
        sequence.accept(token)
    sequence.restart()
    for token in tokenizer()("abcd")["input_ids"]:
        sequence.accept(token)
    assert arrived == ["a", "b", "c", "d"]


# ---- embeddings ------------------------------------------------------------------------------------------------------


def embedding(request_id, value, **more):
    return {"custom_id": request_id, "url": "/v1/embeddings", "body": {"model": "m", "input": value, **more}}


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_embeddings_between_other_requests(name):
    model = shared(name)
    texts = ["abc", "a longer text", "x"]
    lines: list = [{"id": i, "prompt": PROMPT[: 3 + i]} for i in range(5)]
    expected = {result.id: result for result in engine(model).generate(lines)}
    lines[1:1] = [embedding("one", texts[0]), embedding("two", texts[1:]), embedding("tokens", [5, 6])]
    lines += [embedding("bad", "x\ud83d"), embedding("long", "x" * 5000), embedding("empty", [""])]
    results = {result.id: result for result in engine(model).generate(lines)}
    assert len(results) == 11
    for request_id, result in expected.items():
        assert results[request_id] == result
    truth = extract_features(model, tokenizer(), texts, pooling="mean", max_tokens=1).values
    found = results["one"].embeddings + results["two"].embeddings
    torch.testing.assert_close(torch.tensor(found), truth, rtol=0, atol=1e-5)
    assert results["two"].usage == {"prompt_tokens": 14, "completion_tokens": 0}
    assert results["bad"].error["type"] == "tokenizer_error"
    assert results["empty"].error["type"] == "empty_prompt"
    if name == "gpt2":
        assert results["long"].error["type"] == "too_long"
    alone = one(embedding("two", texts[1:], encoding_format="base64"), model=model)
    assert alone.embeddings == results["two"].embeddings, "the same bits alone"
    packed = json.loads(alone.as_line())["response"]["body"]["data"][0]["embedding"]
    assert list(struct.unpack(f"<{len(found[1])}f", base64.b64decode(packed))) == found[1]


def test_many_embeddings_empty_the_slots_now_and_then(monkeypatch):
    from simctg_fast.engine import embeddings

    monkeypatch.setattr(embeddings, "MOST", 3)
    lines: list = []
    for i in range(8):
        lines += [{"id": i, "prompt": "ab"}, embedding(f"e{i}", "abc")]
    results = list(engine().generate(lines, ordered=True))
    assert [result.id for result in results] == [line.get("id", line.get("custom_id")) for line in lines]
    assert all(result.error is None for result in results)


def test_an_embedding_that_fails_fails_alone(monkeypatch):
    from simctg_fast.engine import embeddings

    original = embeddings.embed_tokens

    def fails(model, made_of, rows):
        if any(len(row) == 3 for row in rows):
            raise RuntimeError("injected")
        return original(model, made_of, rows)

    monkeypatch.setattr(embeddings, "embed_tokens", fails)
    results = list(engine().generate([embedding(i, "x" * i) for i in range(1, 5)], ordered=True))
    assert [result.error and result.error["type"] for result in results] == [None, None, "model_error", None]


def test_parse_raises_for_a_request_that_cannot_be_run():
    with pytest.raises(RequestError, match="a request must be a dict or a string, got int"):
        engine().parse(7)


def test_one_call_at_a_time():
    made = engine()
    first = made.generate([PROMPT, PROMPT])
    next(first)
    with pytest.raises(RuntimeError, match="still writing results of another call"):
        next(made.generate(PROMPT))
    first.close()
    assert len(list(made.generate(PROMPT))) == 1


def test_stop_before_the_first_result():
    made = engine()
    results = made.generate([PROMPT] * 3)
    made.stop()
    assert list(results) == []
    assert len(list(made.generate([PROMPT] * 3))) == 3


def test_prompts_and_ids_as_python_has_them():
    ids = tokenizer()(PROMPT)["input_ids"]
    expected = one({"prompt": ids}).token_ids
    for given in (tuple(ids), np.array(ids), torch.tensor(ids), [np.int64(token) for token in ids]):
        result = one({"id": np.int64(7), "prompt": given})
        assert (result.id, result.token_ids) == (7, expected)
        assert json.loads(result.as_line())["id"] == 7


def test_several_continuations_as_they_are_written():
    arrived: dict = {}
    line = {"id": 0, "prompt": PROMPT, "n": 3, "seed": 2}
    (result,) = engine(strategy="sample").generate(
        line, on_text=lambda r, i, new: arrived.setdefault(i, []).append(new)
    )
    assert ["".join(arrived[index]) for index in range(3)] == [choice.text for choice in result.choices]


def test_stop_strings_across_many_hidden_tokens(wide, chat):
    text = "a" + "<|im_end|>" * 40 + "bcd"
    assert written(wide, chat, text, stop="ab").text == ""
    assert written(wide, chat, text, stop="bc").text == "a"


def test_a_tokenizer_that_takes_spaces_back_shows_the_rest():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", ",", ".", "do", "n't"]
    made_of = transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)}, clean_up_tokenization_spaces=True)
    model = build("gpt2", vocab_size=len(words))
    ids = [5, 6, 7, 5, 9, 10, 8, 5]
    made = Engine(model, made_of, processor=lambda r, t: Forced(ids), strategy="greedy", max_new_tokens=8, slots=2)
    arrived: list = []
    (result,) = made.generate({"prompt": [5]}, on_text=lambda request, index, new: arrived.append(new))
    assert "".join(arrived) == result.text
    assert len(arrived) > 3
