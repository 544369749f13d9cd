"""Streamers: the prompt first, every token, and always an end."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from simctg_fast import ContrastiveSearch

from ..decoding_models import decode, left_padded, prompt, shared, tokenizer


class Recorder(BaseStreamer):
    """Keeps what it is given; raises ``error`` at call number ``fail_at``."""

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None):
        self.chunks, self.ends, self.fail_at, self.error = [], 0, fail_at, error

    def put(self, value):
        if len(self.chunks) == self.fail_at:
            raise self.error
        self.chunks.append(value.clone())

    def end(self):
        self.ends += 1


def stream(streamer, inputs, name="llama", *, penalty_alpha=0.6, top_k=4, path="auto", **kwargs):
    strategy = ContrastiveSearch(penalty_alpha, top_k, streamer=streamer, path=path)
    return shared(name).generate(**inputs, custom_generate=strategy, **({"max_new_tokens": 8} | kwargs))


@pytest.mark.parametrize(
    ("name", "path"), [("llama", "auto"), ("llama", "uncached"), ("bloom", "auto"), ("t5", "auto")]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_prompt_then_every_token_then_the_end(name, path, batch):
    recorder, inputs = Recorder(), {"input_ids": prompt(batch)}
    out = stream(recorder, inputs, name, path=path)
    start = out.shape[1] - 8
    assert torch.equal(recorder.chunks[0], out[:, :start])
    assert [chunk.shape for chunk in recorder.chunks[1:]] == [(batch,)] * 8
    assert torch.equal(torch.stack(recorder.chunks[1:], dim=1), out[:, start:])
    assert recorder.ends == 1


def test_end_of_text_is_streamed_and_padding_of_finished_rows():
    inputs = left_padded(9, 7)
    ends = [decode(shared("llama"), inputs, new_tokens=8)[0, 11].item()]
    recorder = Recorder()
    out = stream(recorder, inputs, eos_token_id=ends)
    assert torch.equal(torch.stack(recorder.chunks[1:], dim=1), out[:, 9:])


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_text_streamer(skip_prompt, capsys):
    inputs = {"input_ids": prompt(1)}
    out = stream(TextStreamer(tokenizer(), skip_prompt=skip_prompt), inputs)
    expected = tokenizer().decode(out[0, 9 if skip_prompt else 0 :])
    assert capsys.readouterr().out == expected + "\n"


def test_streamed_embeddings_lose_no_token(capsys):
    """Without prompt ids there is an empty prompt, and ``skip_prompt`` drops that."""
    embeddings = shared("llama").get_input_embeddings()(prompt(1)).detach()
    out = stream(TextStreamer(tokenizer(), skip_prompt=True), {"inputs_embeds": embeddings})
    assert capsys.readouterr().out == tokenizer().decode(out[0]) + "\n"


def test_iterator_in_a_thread():
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=1200)
    outs = []
    thread = threading.Thread(target=lambda: outs.append(stream(streamer, {"input_ids": prompt(1)})))
    thread.start()
    text = "".join(streamer)
    thread.join(timeout=1200)
    assert text == tokenizer().decode(outs[0][0, 9:])


def test_iterator_does_not_hang_when_generation_fails():
    streamer, errors = TextIteratorStreamer(tokenizer(), timeout=1200), []

    def run():
        try:
            stream(streamer, {"input_ids": prompt(1)}, logits_processor=[Raise(ZeroDivisionError(), after=3)])
        except ZeroDivisionError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert "".join(streamer)  # what came before the error
    thread.join(timeout=1200)
    assert len(errors) == 1


class Raise(LogitsProcessor, StoppingCriteria):
    """Raises at call number ``after``, as a logits processor or as a stopping criterion."""

    def __init__(self, error: BaseException, after: int = 0):
        self.error, self.left = error, after

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return scores if scores is not None else torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()], ids=type)
@pytest.mark.parametrize("place", ["processor", "criterion", "streamer", "prompt"])
def test_end_comes_after_any_exception(place, error):
    recorder, kwargs = Recorder(), {}
    if place == "processor":
        kwargs["logits_processor"] = [Raise(error, after=2)]
    elif place == "criterion":
        kwargs["stopping_criteria"] = [Raise(error, after=2)]
    else:
        recorder = Recorder(fail_at=3 if place == "streamer" else 0, error=error)
    with pytest.raises(type(error)):
        stream(recorder, {"input_ids": prompt(1)}, **kwargs)
    assert recorder.ends == 1


@pytest.mark.parametrize("wrong", [{"top_k": 1000}, {"num_beams": 2}, {"path": "reorder", "use_cache": False}], ids=str)
def test_end_comes_after_a_refusal(wrong):
    recorder = Recorder()
    with pytest.raises(ValueError, match=r"must be|cannot be decoded"):
        stream(recorder, {"input_ids": prompt(1)}, **wrong)
    assert recorder.ends == 1


def test_text_streamer_takes_one_sequence():
    streamer = TextStreamer(tokenizer())
    with pytest.raises(ValueError, match="batch size 1"):
        stream(streamer, left_padded(9, 7))


def test_streamer_is_used_again():
    recorder, inputs = Recorder(), {"input_ids": prompt(1)}
    strategy = ContrastiveSearch(streamer=recorder)
    for _ in range(2):
        shared("llama").generate(**inputs, custom_generate=strategy, max_new_tokens=3)
    assert len(recorder.chunks) == 8
    assert recorder.ends == 2
