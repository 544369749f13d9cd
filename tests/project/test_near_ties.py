"""The comparison of tokens: what it excuses, and that it does not excuse the rest."""

from __future__ import annotations

import copy

import pytest
import torch

from simctg_fast.reference.contrastive_search import ReferenceStep
from simctg_fast.reference.contrastive_search import contrastive_search as by_definition

from .. import near_ties
from ..decoding_models import decode, inputs_for, left_padded, prompt, shared
from ..near_ties import CEILING, FLOOR, compare, same_tokens, verdict_of


@pytest.fixture
def recorded(monkeypatch):
    texts = []
    monkeypatch.setattr(near_ties, "record", texts.append)
    return texts


def step(tokens, probabilities, scores) -> ReferenceStep:
    p, s = (torch.tensor([row], dtype=torch.float64) for row in (probabilities, scores))
    none = torch.zeros(1)
    return ReferenceStep(torch.tensor([tokens]), p, none, s, none, none, none, none)


P = [0.4, 0.3, 0.2, 0.05]
SCORES = [0.10, 0.30, 0.30 - 1e-7, 0.9]  # the fourth is no candidate of three


def judge(found, expected, scores=SCORES, p=P, error=0.0, top_k=3):
    single = step([5, 6, 7, 8], [x + error for x in p], [x + error for x in scores])
    return verdict_of(step([5, 6, 7, 8], p, scores), single, 0.6, top_k, found, expected)


class TestVerdict:
    def test_scores_within_rounding(self):
        verdict = judge(6, 7)
        assert verdict.near_tie
        assert verdict.lead == pytest.approx(1e-7)
        assert judge(7, 6).near_tie
        assert judge(7, 6).lead == pytest.approx(-1e-7)

    @pytest.mark.parametrize("pair", [(5, 6), (6, 5), (7, 5), (8, 6), (6, 8), (99, 6), (6, 99)])
    def test_errors(self, pair):
        """A worse candidate on either side; one that is none, however high its score; one nobody thought of."""
        verdict = judge(*pair)
        assert not verdict.near_tie
        assert f"found {pair[0]}" in verdict.text
        assert f"expected {pair[1]}" in verdict.text

    def test_two_that_tie_below_the_best_are_errors(self):
        assert not judge(5, 6, scores=[0.1, 0.1, 0.3, 0.0]).near_tie

    def test_rounding_is_measured_and_bounded(self):
        apart = [0.1, 0.3, 0.3 - 3e-6, 0.0]
        assert not judge(6, 7, scores=apart).near_tie
        assert judge(6, 7, scores=apart, error=1e-6).near_tie
        assert not judge(6, 7, scores=[0.1, 0.3, 0.3 - 2 * CEILING, 0.0], error=0.1).near_tie
        assert judge(6, 7, scores=[0.1, 0.3, 0.3 - 0.9 * FLOOR, 0.0]).near_tie

    def test_the_last_candidate_and_the_first_left_out(self):
        """Either may be the third of three; where the one let in has the best score, the other choice is the best of
        the rest, and only that."""
        close = [0.4, 0.3, 0.2, 0.2 - 1e-7]
        scores = [0.1, 0.3, 0.2, 0.9]
        assert judge(8, 6, p=close, scores=scores).near_tie
        assert judge(6, 8, p=close, scores=scores).near_tie
        assert not judge(5, 8, p=close, scores=scores).near_tie
        assert not judge(8, 6, p=[0.4, 0.3, 0.2, 0.2 - 1e-5], scores=scores).near_tie

    def test_small_probabilities_are_compared_by_their_ratio(self):
        tail = [4e-8, 3e-8, 2e-8, 1e-8]
        assert not judge(8, 6, p=tail, scores=[0.1, 0.3, 0.2, 0.9]).near_tie
        assert judge(8, 6, p=[4e-8, 3e-8, 2e-8, 2e-8], scores=[0.1, 0.3, 0.2, 0.9]).near_tie


class TestCompare:
    @staticmethod
    def always(near_tie):
        return lambda row, prefix, found, expected: near_ties.Verdict(
            near_tie, 0.0, f"{row} {prefix} {found} {expected}"
        )

    def test_equal_rows_ask_nobody(self, recorded):
        assert compare(torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]], judge=None) == 0
        assert recorded == []

    def test_a_tie_ends_the_comparison_of_its_row_only(self, recorded):
        assert compare([[1, 2, 3, 9], [5, 6]], [[1, 7, 8, 0], [5, 6]], self.always(True), "here") == 1
        assert recorded == ["here: row 0, position 1: 0 [1] 2 7"]
        with pytest.raises(AssertionError, match="row 1 has 1 tokens, expected 2"):
            compare([[1, 2], [5]], [[1, 7], [5, 6]], self.always(True))

    @pytest.mark.parametrize("rows", [([[1, 2]], [[1, 3]]), ([[1]], [[1, 2]]), ([[1]], [[1], [1]]), ([], [[1]])])
    def test_errors(self, rows):
        with pytest.raises(AssertionError):
            compare(*rows, self.always(False))

    def test_rows_that_end_together(self, recorded):
        """A row that took another turn later ends the batch elsewhere; without one, lengths count."""
        assert compare([[1, 2, 3], [4, 5, 0]], [[1, 9], [4, 5]], self.always(True)) == 1
        with pytest.raises(AssertionError, match="row 0 has 3 tokens"):
            compare([[1, 2, 3], [4, 5, 0]], [[1, 2], [4, 5]], self.always(True))


@pytest.mark.parametrize("name", ["llama", "t5", "bart", "bloom"])
class TestOnModels:
    def test_a_wrong_token_is_an_error(self, name, recorded):
        model = shared(name)
        inputs = inputs_for(model, 2)
        truth = decode(model, inputs)
        assert same_tokens(truth, truth.clone(), model, inputs) == 0
        for row, place in ((0, -1), (1, -7), (1, -12)):
            wrong = truth.clone()
            wrong[row, place] = (wrong[row, place] + 1) % 95 + 3
            for pair in ((wrong, truth), (truth, wrong)):
                with pytest.raises(AssertionError, match=f"row {row}, position {truth.shape[1] + place}: float64: "):
                    same_tokens(*pair, model, inputs)
        assert recorded == []

    def test_another_settings_tokens_are_an_error(self, name, recorded):
        model = shared(name)
        inputs = inputs_for(model, 2)
        with pytest.raises(AssertionError, match="float64: "):
            same_tokens(decode(model, inputs, penalty_alpha=0.1), decode(model, inputs), model, inputs)
        assert recorded == []

    def test_a_made_near_tie(self, name, recorded):
        """Two tokens with one embedding and one row of the head are equal to every computation."""
        model = copy.deepcopy(shared(name))
        inputs = inputs_for(model, 1)
        out = decode(model, inputs, new_tokens=4)
        place = out.shape[1] - 4
        token = int(out[0, place])
        twin = next(t for t in range(3, 98) if t not in out and t not in inputs["input_ids"])
        tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
        with torch.no_grad():
            for module in (*tables, model.get_output_embeddings()):
                if module.weight.shape[0] == 98:
                    module.weight[twin] = module.weight[token]
        one = decode(model, inputs, new_tokens=4)
        assert int(one[0, place]) in (token, twin)
        other = one.clone()
        other[0, place] = token + twin - int(one[0, place])
        other[0, place + 1 :] = 5  # not looked at
        assert same_tokens(other, one, model, inputs) == 1
        assert f"position {place}: float64: found {int(other[0, place])} scores" in recorded[0]


def test_the_judge_sees_padding_and_processors(recorded):
    """Its step is the one that the reference takes in the whole run."""
    model, inputs = shared("llama"), left_padded(9, 5)

    def ban(ids, scores):
        return scores.index_fill(1, torch.arange(3, 40), float("-inf"))

    truth = by_definition(model, **inputs, penalty_alpha=0.6, top_k=4, max_new_tokens=6, logits_processor=ban)
    wrong = truth.sequences.clone()
    wrong[1, -2] = 7
    with pytest.raises(AssertionError) as caught:
        same_tokens(wrong, truth.sequences, model, inputs, logits_processor=ban)
    best = truth.steps[4].scores[1].max().item()
    told = str(caught.value).split("the best score is ")[1].split()[0]
    assert float(told) == pytest.approx(best, abs=1e-5)
    assert "found 7 is none of the 4 most probable" in str(caught.value)


def test_greedy_search(recorded):
    model, inputs = shared("gpt2"), {"input_ids": prompt(1)}
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    wrong = out.clone()
    wrong[0, -2] = 4 + (wrong[0, -2] == 4)
    with pytest.raises(AssertionError, match="is none of the 1 most probable"):
        same_tokens(wrong, out, model, inputs, penalty_alpha=0.0, top_k=1)


def test_a_near_tie_reaches_the_report(request):
    before = list(request.node.user_properties)
    near_ties.record("one for show")
    assert request.node.user_properties == [*before, (near_ties.PROPERTY, "one for show")]
    request.node.user_properties[:] = before
