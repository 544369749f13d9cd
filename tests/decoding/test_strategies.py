"""A strategy of somebody's own runs wherever ours do: one row a token, by the history and the newest state."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import StoppingCriteria

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
    assert greedy.propose(logits, View(None, None)).near is None
    greedy.counts = True
    near = greedy.propose(logits, View(None, None)).near.tolist()
    assert near == [True, False]
    greedy.count([RowSettings(0.0)] * 2, near)
    assert greedy.near_ties == 1
    greedy.count([None, RowSettings(0.0)], near)  # nobody's row
    assert greedy.near_ties == 1


# ---- one that reads the text, and keeps a state a row ----------------------------------------------------------------

ENDS = (4, 12, 7)  # new tokens of the rows


class Balanced(Strategy):
    """Of the four most probable tokens the one whose number is, modulo four, the sum of the text's first and last token
    and of the class, by ids modulo eight, that has been written least."""

    needs_tokens = True

    def key(self):
        return ("balanced",)

    def bind(self, rows, device):
        super().bind(rows, device)
        if len(self.settings.get("written", ())) < len(rows):
            self.settings["written"] = torch.zeros(len(rows), 8, dtype=torch.long, device=device)

    def propose(self, logits: torch.Tensor, view: View) -> Proposal:
        probs, tokens = top_k_probs(logits, K)
        starts = torch.zeros_like(view.lengths) if view.starts is None else view.starts
        ends = torch.stack([starts, (view.lengths - 1).clamp(min=0)], dim=1)
        index = view.tokens.gather(1, ends).sum(-1) + self.settings["written"][: len(logits)].argmin(-1)
        index = index[:, None] % K
        return Proposal(tokens.gather(1, index), probs.gather(1, index))

    def advance(self, tokens: torch.Tensor, view: View) -> None:
        newest = view.tokens.gather(1, view.lengths[:, None])  # the same tokens: they are in place
        written = self.settings["written"][: len(tokens)]
        written.scatter_add_(1, newest % 8, torch.ones_like(newest))

    def copy(self, source: int, target: int) -> None:
        self.settings["written"][target] = self.settings["written"][source]

    def clear(self, row: int) -> None:
        self.settings["written"][row] = 0


class BalancedSearch(ContrastiveSearch):
    def make_strategy(self, candidates, noise):
        return Balanced()


def balanced_by_definition(model, ids: list[int], new: int, banned: int | None = None) -> list[int]:
    """In float64, everything anew for every token."""
    model, text, written = model.double(), list(ids), [0] * 8
    for _ in range(new):
        logits = model(torch.tensor([text])).logits[0, -1]
        if banned is not None:
            logits[banned] = float("-inf")
        index = text[0] + text[-1] + min(range(8), key=written.__getitem__)
        text.append(int(logits.topk(K).indices[index % K]))
        written[text[-1] % 8] += 1
    return text[len(ids) :]


class Ends(StoppingCriteria):
    def __init__(self, width: int):
        self.width = width

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - self.width >= torch.tensor(ENDS)


def balanced_in_generate(model, new: int = NEW, pads=(3, 0, 5), **options) -> None:
    width = 11
    rows, mask = prompt(3, width), torch.ones(3, width, dtype=torch.long)
    for row, pad in enumerate(pads):
        rows[row, :pad], mask[row, :pad] = PAD, 0
    last = model.config.vocab_size - 1
    out = model.generate(
        rows,
        attention_mask=mask,
        custom_generate=BalancedSearch(1.0, K, **options),
        max_new_tokens=new,
        pad_token_id=PAD,
        eos_token_id=last,
        suppress_tokens=[last],
        stopping_criteria=[Ends(width)] if not options.get("decode_step") else None,
    )
    texts = [row[pad:].tolist() for row, pad in zip(rows, pads, strict=True)]
    expected = [balanced_by_definition(copy.deepcopy(model), text, new, last) for text in texts]
    if not options.get("decode_step"):
        expected = [row[:end] + [PAD] * (NEW - end) for row, end in zip(expected, ENDS, strict=True)]
    assert out[:, width:].tolist() == expected


@pytest.mark.parametrize("path", ["shared_prefix", "reorder", "uncached"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_text_and_state_in_generate(name, path):
    """Rows are padded, and leave at different lengths: their states follow them."""
    balanced_in_generate(build(name), path=path)


@torch.no_grad()
def test_text_and_state_over_static_buffers():
    balanced_in_generate(build("llama"), decode_step=True)


@torch.no_grad()
def test_text_and_state_in_a_graph(driver):
    model = build("llama")
    for _ in range(2):  # the second goes on with the first one's graph
        balanced_in_generate(model, 32, decode_step=True)
    assert driver.recorded == 1
    assert driver.replayed > 32


@pytest.mark.parametrize("batching", ["slots", "static"])
@torch.no_grad()
def test_text_and_state_in_the_engine(batching, monkeypatch):
    monkeypatch.setattr("simctg_fast.engine.engine.make_strategy", lambda *_: Balanced())
    texts = [tokenizer().decode(prompt(1, length, seed=i)[0]) for i, length in enumerate((5, 23, 9, 14, 3, 31))]
    engine = Engine(build("llama"), tokenizer(), slots=2, batching=batching)
    lines = [{"id": i, "prompt": x, "max_new_tokens": 4 + 3 * i % 7} for i, x in enumerate(texts)]
    found = {r.id: r.token_ids for r in engine.generate(lines)}
    for line in lines:
        ids = tokenizer()(line["prompt"])["input_ids"]
        assert found[line["id"]] == balanced_by_definition(build("llama"), ids, line["max_new_tokens"]), line
