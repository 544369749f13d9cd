"""Rows of ``generate``'s batch that have ended cost nothing, and change nothing for the others."""

import pytest
import torch

from simctg_fast.decoding.contrastive_search import ContrastiveSearch
from simctg_fast.decoding.decoder import places_kept
from simctg_fast.decoding.step import Step

from ..decoding_models import PAD, build, inputs_for
from ..near_ties import same_tokens

ROWS = 6


def test_places_are_filled_from_the_end():
    assert places_kept([True] * 3) == [0, 1, 2]
    assert places_kept([False, True, False, True, True]) == [4, 1, 3]
    assert places_kept([True, False, False]) == [0]
    for pattern in range(64):
        kept = [bool(pattern >> bit & 1) for bit in range(6)]
        places = places_kept(kept)
        assert sorted(places) == [place for place in range(6) if kept[place]]
        assert all(places[place] == place for place in range(len(places)) if kept[place])


def ends_apart(model, inputs, strategy):
    """A token that ends rows at different steps."""
    free = model.generate(**inputs, custom_generate=strategy, max_new_tokens=24, pad_token_id=PAD, eos_token_id=None)
    new = free[:, -24:]

    def lengths(token):
        return [(row == token).nonzero()[0].item() if bool((row == token).any()) else 24 for row in new]

    return max(range(98), key=lambda token: (len(set(lengths(token))), -sum(lengths(token))))


@pytest.mark.parametrize("path", ["shared_prefix", "reorder", "uncached"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart", "mistral"])
def test_the_others_go_on(name, path, monkeypatch):
    model = build(name)
    inputs = inputs_for(model, ROWS)
    strategy = ContrastiveSearch(0.6, 4, path=path)
    end = ends_apart(model, inputs, strategy)
    options = {"max_new_tokens": 24, "pad_token_id": PAD, "eos_token_id": end}
    whole = model.generate(
        **inputs, custom_generate=strategy, return_dict_in_generate=True, output_scores=True, **options
    ).sequences
    rows, run = [], Step.run
    monkeypatch.setattr(Step, "run", lambda self, i, c, *x, **k: (rows.append(len(c)), run(self, i, c, *x, **k))[1])
    ours = model.generate(**inputs, custom_generate=strategy, **options)
    same_tokens(ours, whole, model, inputs)
    if path == "shared_prefix":
        new = whole[:, -(whole.shape[1] - (1 if model.config.is_encoder_decoder else 9)) :]
        unfinished = ((new == end).cumsum(dim=-1) == 0).sum(dim=0).tolist()  # after each step
        assert rows[-len(unfinished) :] == [ROWS, *unfinished[:-1]]
        assert len(set(unfinished)) > 2


def test_random_choices_are_those_of_the_whole_batch():
    """A row's noise does not depend on who has left."""
    model = build("llama")
    inputs = inputs_for(model, ROWS)
    end = ends_apart(model, inputs, ContrastiveSearch(0.6, 4))

    def run(**options):
        strategy = ContrastiveSearch(0.6, 4, temperature=0.5, generator=torch.Generator().manual_seed(3))
        out = model.generate(
            **inputs, custom_generate=strategy, max_new_tokens=24, pad_token_id=PAD, eos_token_id=end, **options
        )
        return out.sequences if options else out

    assert torch.equal(run(), run(return_dict_in_generate=True))
