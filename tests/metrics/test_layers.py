"""Self-similarity of every layer: the mean over all pairs of all texts, one pair after the other in float64."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from simctg_fast.metrics import isotropy, isotropy_by_layer, self_similarity_by_layer

from ..decoding_models import VOCABULARY, build, draw, shared, tokenizer

TEXTS = ["Contrast", "x", "a longer text than the others", "", "xy"]


def rows(lengths):
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def by_pairs(model, texts):
    """For each layer the sum over pairs of positions of each text, the text alone in the model, over their number."""
    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    sums, count = None, 0
    for ids in texts:
        if len(ids) < 2:
            continue
        layers = body(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        sums = sums or [0.0] * len(layers)
        for layer, states in enumerate(layers):
            for i, a in enumerate(states[0].tolist()):
                for j, b in enumerate(states[0].tolist()):
                    if i != j:
                        dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
                        sums[layer] += dot / (math.hypot(*a) * math.hypot(*b))
        count += len(ids) * (len(ids) - 1)
    return [each / count for each in sums]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba", "t5"])
def test_pairs(name, batch_size):
    model, ids = build(name).double(), rows([7, 2, 1, 0, 4])
    found = self_similarity_by_layer(model, None, ids, batch_size=batch_size)
    assert found == pytest.approx(by_pairs(model, ids), abs=1e-9)
    assert isotropy_by_layer(model, None, ids) == pytest.approx([1 - each for each in found])
    assert len(found) == 3, "embeddings and two layers"


def test_texts_and_the_cut():
    model = build("gpt2").double()
    ids = [tokenizer()(text).input_ids[:5] for text in TEXTS]
    found = self_similarity_by_layer(model, tokenizer(), TEXTS, max_length=5)
    assert found == pytest.approx(by_pairs(model, ids), abs=1e-9)
    assert found == pytest.approx(self_similarity_by_layer(model, None, ids))


@torch.no_grad()
def test_pairs_are_weighted_and_not_texts():
    """One text: as `isotropy`. Two of different length: the other mean."""
    model = build("gpt2").double()
    one, two = rows([9, 3])
    states = [model.base_model(input_ids=torch.tensor([each])).last_hidden_state for each in (one, two)]
    values = [isotropy(each) for each in states]
    assert isotropy_by_layer(model, None, [one])[-1] == pytest.approx(values[0], abs=1e-9)
    both = isotropy_by_layer(model, None, [one, two])[-1]
    assert both == pytest.approx((72 * values[0] + 6 * values[1]) / 78, abs=1e-9)
    assert both != pytest.approx(sum(values) / 2, abs=1e-3)


def test_a_table_that_counts_from_behind_its_padding():
    """RoBERTa's table of 40 rows holds 38 positions behind padding token 1's."""
    options = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    options |= {"vocab_size": VOCABULARY, "pad_token_id": 1, "max_position_embeddings": 40}
    model = draw(transformers.RobertaModel(transformers.RobertaConfig(**options))).double()
    long, short = rows([60, 5])
    found = self_similarity_by_layer(model, None, [long, short])
    assert found == pytest.approx(by_pairs(model, [long[:38], short]), abs=1e-9)
    with pytest.raises(ValueError, match="max_length must be an integer of at least 2 and at most 38"):
        self_similarity_by_layer(model, None, [long], max_length=39)


def test_the_mode_of_the_model_is_left():
    model = build("gpt2", resid_pdrop=0.5).train()
    assert self_similarity_by_layer(model, None, rows([6])) == self_similarity_by_layer(model, None, rows([6]))
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": []}, "texts must hold one of at least 2 tokens, got none"),
        ({"texts": ["x", ""]}, "texts must hold one of at least 2 tokens, got none"),
        ({"texts": ["abc"], "batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"texts": ["abc"], "max_length": 1}, "max_length must be an integer of at least 2 and at most 1024"),
        ({"texts": ["abc"], "max_length": True}, "max_length must be an integer of at least 2"),
        ({"texts": [3]}, r"texts\[0\] is int 3"),
    ],
)
def test_refuses(arguments, message):
    for function in (self_similarity_by_layer, isotropy_by_layer):
        with pytest.raises(ValueError, match=message):
            function(shared("gpt2"), tokenizer(), **arguments)


def test_states_that_are_not_finite():
    model = build("gpt2")
    torch.nn.init.constant_(model.transformer.h[1].mlp.c_proj.bias, math.inf)
    with pytest.raises(ValueError, match="texts must have finite hidden states, but those of layer 2 are not"):
        isotropy_by_layer(model, tokenizer(), ["abc"])
