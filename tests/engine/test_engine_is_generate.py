"""The engine and ``generate`` run one step: the same bits where nothing but the caller differs."""

from __future__ import annotations

import pytest
import torch

from simctg_fast import ContrastiveSearch, Engine
from simctg_fast.cpu.modules import fast_linears
from simctg_fast.decoding.caches import CACHE_NAME, new_cache
from simctg_fast.decoding.hidden_states import HiddenStatesTap
from simctg_fast.decoding.slots_decoder import SlotsDecoder
from simctg_fast.decoding.strategies import Contrastive, RowSettings
from simctg_fast.engine import observe, scheduler
from simctg_fast.engine.slot_decoder import SlotDecoder

from ..decoding_models import PAD, build, prompt, tokenizer

NEW = 16
MODELS = ("gpt2", "llama", "mistral", "gemma2", "t5", "bart", "mbart")


@pytest.fixture
def seen(monkeypatch):
    """The logits that the engine chose by, of every token."""
    logits: list[torch.Tensor] = []
    write = observe.StepRecord._write

    def remember(self, row, token, sequence):
        logits.append(self.logits[row : row + 1].clone())
        return write(self, row, token, sequence)

    monkeypatch.setattr(observe.StepRecord, "_write", remember)
    return logits


@pytest.mark.parametrize("length", [9, 70, 200])
@pytest.mark.parametrize("name", MODELS)
def test_one_request(name, length, seen):
    """Prompts of fewer rows than the small-batch kernel takes, and of more."""
    model, text = build(name), tokenizer().decode(prompt(1, length)[0])
    is_encoder_decoder = model.config.is_encoder_decoder
    request = {"id": 0, "source" if is_encoder_decoder else "prompt": text}
    engine = Engine(model, tokenizer(), slots=1, batching="slots", max_new_tokens=NEW)
    seen.clear()
    (result,) = engine.generate([request])
    inputs = tokenizer()(text, return_tensors="pt")
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        custom_generate=ContrastiveSearch(0.6, 4),
        max_new_tokens=NEW,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert result.token_ids == out.sequences[0, -NEW:].tolist()
    assert len(seen) == len(out.logits) == NEW
    for ours, theirs in zip(seen, out.logits, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
@torch.inference_mode()
def test_a_batch_from_one_state(name, batch):
    """Both go on from the buffers that one prefill has left."""
    model, k, length, alpha = build(name), 4, 37, 0.6
    ids = prompt(batch, length)
    config = model.generation_config
    kwargs = {CACHE_NAME: new_cache(model, config, batch, None), "use_cache": True}
    with HiddenStatesTap(model) as tap, SlotDecoder(model, batch, Contrastive(k)) as engine, fast_linears(model):
        ours = SlotsDecoder(
            model, tap, head=True, generation_config=config, model_kwargs=kwargs, max_length=None, record={}
        )
        logits, states, _ = ours.prefill(ids)
        strategy = Contrastive(k)
        strategy.bind([RowSettings(alpha)] * batch, ids.device)
        ours.begin(strategy, states, None)
        for slot in range(batch):
            engine.prefill(slot, ids[slot].tolist(), 0, last=True)
        for mine, its in zip(ours.slots.layers, engine.slots.layers, strict=True):
            its.keys[:, :, :length] = mine.keys[:, :, :length]
            its.values[:, :, :length] = mine.values[:, :, :length]
        engine.slots.history.states[:, :length] = ours.history.states[:, :length]
        engine.slots.logits = logits.clone()
        engine.bind([RowSettings(alpha)] * batch)
        for _ in range(NEW):
            result, _ = ours.decide(ids, ours.propose(ids, logits))
            engine.proceed(engine.propose(batch))
            logits = result.logits
            ids = torch.cat([ids, result.tokens[:, None]], dim=1)
            assert torch.equal(engine.logits, logits)


def test_a_common_prefix_is_run_once(monkeypatch):
    """A system prompt's positions are copied; what is written is what each request writes alone, near ties aside."""
    model = build("llama")
    system = prompt(1, 150)[0].tolist()
    decode = tokenizer().decode
    requests = [{"id": i, "prompt": decode(system + prompt(1, 5 + i, seed=i + 1)[0].tolist())} for i in range(5)]
    requests += [{"id": 5, "prompt": decode(system)}, {"id": 6, "prompt": decode(system[:100])}]
    ran = []
    prefill = SlotDecoder.prefill
    monkeypatch.setattr(
        SlotDecoder,
        "prefill",
        lambda self, slot, ids, start, last: (ran.append((start, len(ids))), prefill(self, slot, ids, start, last))[1],
    )

    def run(slots, **options):
        engine = Engine(model, tokenizer(), slots=slots, batching="slots", max_new_tokens=NEW, **options)
        ran.clear()
        results = {result.id: result.token_ids for result in engine.generate(requests)}
        return results, engine

    alone, _ = run(1)
    assert all(start == 0 for start, _ in ran)
    together, engine = run(4)
    assert sum(start > 0 for start, _ in ran) >= 5
    assert {start for start, _ in ran} <= {0, 64, 128}
    assert engine.stats["shared_tokens"] == sum(start for start, _ in ran)
    assert together == alone
    apart, engine = run(4, share_prefixes=False)
    assert apart == alone
    assert engine.stats["shared_tokens"] == 0
    with pytest.raises(ValueError, match="share_prefixes must be True or False, got 1"):
        run(4, share_prefixes=1)


def test_prefixes_in_multiples():
    assert scheduler.common_prefix([1] * 200, [1] * 130) == 128
    assert scheduler.common_prefix([1] * 63, [1] * 63) == 0
    assert scheduler.common_prefix([1] * 64 + [2] * 64, [1] * 128) == 64
    assert scheduler.common_prefix([], [1]) == 0
