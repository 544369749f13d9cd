"""Candidates in numbers of their own: those that cannot win are not run, and the tokens are as if they were."""

from __future__ import annotations

import pytest
import torch

import simctg_fast
from simctg_fast import AdaptiveContrastiveSearch
from simctg_fast.decoding import adaptive
from simctg_fast.decoding.packing import Packing, by_sequence, first_places, owners_of, run_of
from simctg_fast.decoding.strategies import Proposal
from simctg_fast.engine import Engine

from ..decoding_models import PAD, build, inputs_for, left_padded, prompt, shared, tokenizer

NEW, Q, K_RANGE = 14, 8.0, (2, 9)
CPU = torch.device("cpu")


def test_places():
    packing = Packing([2, 1, 3])
    candidates = torch.arange(9).view(3, 3)
    assert run_of(candidates, packing).tolist() == [0, 1, 3, 6, 7, 8]
    assert owners_of(3, 3, packing, CPU).tolist() == [0, 0, 1, 2, 2, 2]
    assert first_places(3, 3, packing, CPU).tolist() == [0, 2, 3]
    states = torch.arange(6.0)[:, None]
    assert by_sequence(states, 3, 3, packing)[..., 0].tolist() == [[0, 1, 1], [2, 2, 2], [3, 4, 5]]
    assert run_of(candidates, None).tolist() == list(range(9))
    assert owners_of(3, 2, None, CPU).tolist() == [0, 0, 1, 1, 2, 2]
    assert first_places(3, 2, None, CPU).tolist() == [0, 2, 4]
    assert by_sequence(states, 3, 2, None)[..., 0].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_what_can_win():
    tokens, probs = torch.arange(8).view(2, 4), torch.rand(2, 4)
    proposal = Proposal(tokens, probs, counts=[3, 2]).narrowed()
    assert proposal.tokens.tolist() == [[0, 1, 2], [4, 5, 6]]
    assert proposal.packing.counts == [3, 2]
    assert Proposal(tokens, probs, counts=[3, 3]).narrowed().packing is None
    assert Proposal(tokens, probs).narrowed().packing is None


@pytest.fixture
def run_rows(monkeypatch):
    """Of every step how many rows the strategy asked for, and whether they are run one behind the other."""
    seen, original = [], adaptive.AdaptiveContrastive.propose

    def propose(self, logits, view):
        proposal = original(self, logits, view)
        seen.append(proposal.counts)
        return proposal

    monkeypatch.setattr(adaptive.AdaptiveContrastive, "propose", propose)
    return seen


def masked(monkeypatch):
    """From here on rows that cannot win are run."""
    monkeypatch.setattr(Proposal, "packing", None)


def rows_of_forwards(model):
    """Rows of the decoder's forwards, in order."""
    seen = []

    def look(module, args, kwargs, output):
        seen.append(len(kwargs["decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"]))

    return seen, model.register_forward_hook(look, with_kwargs=True)


def generate(model, inputs, **options):
    search = AdaptiveContrastiveSearch(Q, K_RANGE, **options)
    return model.generate(**inputs, custom_generate=search, max_new_tokens=NEW, pad_token_id=PAD, eos_token_id=None)


PATHS = [("llama", {}), ("gpt2", {}), ("t5", {}), ("mistral", {}), ("mamba", {}), ("llama", {"path": "reorder"})]
PATHS += [("llama", {"path": "uncached"}), ("gpt2", {"fast_linear": False}), ("bloom", {}), ("bart", {})]


@pytest.mark.parametrize(("name", "options"), PATHS)
def test_tokens_of_the_masked_step(name, options, run_rows, monkeypatch):
    """Padded rows: every forward has the rows that the strategy asks for, but for the first; the tokens stay."""
    model = build(name)
    inputs = inputs_for(model, 4, 9)
    generate(model, inputs, **options)  # with its trial
    run_rows.clear()
    ran, hook = rows_of_forwards(model)
    with hook:
        packed = generate(model, inputs, **options)
    asked = [sum(counts) for counts in run_rows]
    assert ran[-len(asked) + 1 :] == asked[1:]
    assert any(len(set(counts)) > 1 for counts in run_rows)
    masked(monkeypatch)
    assert torch.equal(generate(model, inputs, **options), packed)


def test_rows_that_leave(run_rows, monkeypatch):
    """Rows end at different times: the arguments of the others stay theirs."""
    model, inputs = shared("llama"), left_padded(9, 9, 6, 8, seed=3)
    settings = {"custom_generate": AdaptiveContrastiveSearch(Q, K_RANGE), "max_new_tokens": 24, "pad_token_id": PAD}
    free = model.generate(**inputs, **settings, eos_token_id=None)[:, 9:]
    end = max(range(98), key=lambda token: len({(row == token).nonzero()[:1].sum().item() for row in free}))
    run_rows.clear()
    packed = model.generate(**inputs, **settings, eos_token_id=end)
    assert len({len(counts) for counts in run_rows}) > 1, "some have left"
    masked(monkeypatch)
    assert torch.equal(model.generate(**inputs, **settings, eos_token_id=end), packed)


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("batching", ["slots", "static"])
def test_in_the_engine(name, batching, run_rows, monkeypatch):
    """Rows of other lengths, and places that stand empty."""
    model, key = build(name), "source" if name == "t5" else "prompt"
    lengths = (5, 23, 9, 14, 3) if batching == "slots" else (9, 9, 9, 9)
    lines = [{"id": i, key: tokenizer().decode(prompt(1, n, seed=i)[0])} for i, n in enumerate(lengths)]

    def written():
        engine = Engine(
            model, tokenizer(), strategy="adaptive", slots=3, batching=batching, max_new_tokens=NEW,
            adaptive_q=Q, adaptive_k_range=K_RANGE,
        )  # fmt: skip
        found = {result.id: result.token_ids for result in engine.generate(lines)}
        assert engine.stats["batching"] == batching
        return found

    packed = written()
    assert any(len(set(counts)) > 1 for counts in run_rows)
    masked(monkeypatch)
    assert written() == packed


def test_plain_models(run_rows, monkeypatch):
    model, inputs, ran = shared("llama"), left_padded(9, 6, 8), []

    def step(ids, attention_mask=None):
        ran.append(len(ids))
        out = model(ids, attention_mask=attention_mask, output_hidden_states=True)
        return out.logits, out.hidden_states[-1]

    settings = {"strategy": AdaptiveContrastiveSearch(Q, K_RANGE), "max_new_tokens": NEW, "protocol": "stateless"}
    packed = simctg_fast.generate(step, **inputs, **settings)
    assert ran[1:] == [sum(counts) for counts in run_rows]
    masked(monkeypatch)
    assert torch.equal(simctg_fast.generate(step, **inputs, **settings), packed)
