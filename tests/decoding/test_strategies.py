"""A strategy of somebody's own runs wherever ours do: one row a token, by the history and the newest state."""

from __future__ import annotations

import pytest
import torch

from simctg_fast.decoding.contrastive_search import ContrastiveSearch
from simctg_fast.decoding.strategies import Contrastive, Greedy, Proposal, RowSettings, Strategy, View
from simctg_fast.engine import Engine
from simctg_fast.ops.top_k import top_k_probs

from ..decoding_models import PAD, build, prompt, tokenizer

NEW, K = 12, 4


class Opposite(Strategy):
    """Of the four most probable tokens the one whose number is, modulo four, the place of the earlier state that points
    furthest away from the newest."""

    needs_history = True

    def propose(self, logits: torch.Tensor, view: View) -> Proposal:
        probs, tokens = top_k_probs(logits, K)
        _, position = view.similarity(-view.last(len(logits))[:, None])
        index = position % K
        return Proposal(tokens.gather(1, index), probs.gather(1, index))


class OppositeSearch(ContrastiveSearch):
    def make_strategy(self, candidates, noise):
        return Opposite()


def by_definition(model, ids: list[int]) -> list[int]:
    """In float64, everything anew for every token."""
    model = model.double()
    new = []
    for _ in range(NEW):
        out = model(torch.tensor([ids + new]), output_hidden_states=True)
        states = torch.nn.functional.normalize(out.hidden_states[-1][0], dim=-1)
        index = int((states @ -states[-1]).argmax()) % K
        new.append(int(out.logits[0, -1].topk(K).indices[index]))
    return new


@pytest.mark.parametrize("path", ["shared_prefix", "reorder", "uncached"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_in_generate(name, path):
    rows = prompt(3, 11)
    search = OppositeSearch(1.0, K, path=path)
    out = build(name).generate(
        rows, attention_mask=torch.ones_like(rows), custom_generate=search, max_new_tokens=NEW, pad_token_id=PAD
    )
    assert out[:, 11:].tolist() == [by_definition(build(name), row.tolist()) for row in rows]


@pytest.mark.parametrize("batching", ["slots", "static"])
@torch.no_grad()
def test_in_the_engine(batching, monkeypatch):
    """More requests than slots, of different lengths: nothing is left of those before."""
    monkeypatch.setattr("simctg_fast.engine.engine.make_strategy", lambda *_: Opposite())
    lengths = (5, 23, 9, 14, 3, 31) if batching == "slots" else (9,) * 5  # padding moves places
    texts = [tokenizer().decode(prompt(1, length, seed=i)[0]) for i, length in enumerate(lengths)]
    engine = Engine(build("llama"), tokenizer(), slots=2, batching=batching, max_new_tokens=NEW)
    found = {r.id: r.token_ids for r in engine.generate({"id": i, "prompt": x} for i, x in enumerate(texts))}
    expected = [by_definition(build("llama"), tokenizer()(x)["input_ids"]) for x in texts]
    assert [found[i] for i in range(len(texts))] == expected


def test_what_the_engine_counts():
    greedy, contrastive = Greedy(), Contrastive(2)
    logits = torch.tensor([[1.0, 1.0, 0.0], [3.0, 1.0, 0.0]])
    for strategy in (greedy, contrastive):
        strategy.bind([RowSettings(0.0)] * 2, logits.device)
    assert greedy.propose(logits, View(None)).near is None
    greedy.counts = True
    near = greedy.propose(logits, View(None)).near.tolist()
    assert near == [True, False]
    greedy.count([RowSettings(0.0)] * 2, near)
    assert greedy.near_ties == 1
    greedy.count([None, RowSettings(0.0)], near)  # nobody's row
    assert greedy.near_ties == 1
