"""Token for token in float32: against transformers 4.55.4, and against the uncached reference in float64.

The fast part of `benchmarks/parity.py`. Tokens of transformers 4.55.4 are kept in a file, since it needs an environment
of its own; the models that made them are built here from the same seeds.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

from ..near_ties import same_tokens
from ..repository import repository

sys.path.append(str(repository("benchmarks")))
import parity_zoo as zoo

from simctg_fast.reference.contrastive_search import contrastive_search, degeneration_penalty, true_float64

GOLDEN = json.loads(Path(__file__).parents[1].joinpath("data/oracle_tokens.json").read_text())["tokens"]
# Models that transformers 4.55.4 runs by contrastive search, as the README names them.
NAMED = {
    "gpt2",
    "opt",
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "mistral_window",
    "mixtral",
    "gpt_neox",
    "phi",
    "phi3",
    "gemma",
    "olmo2",
    "bloom",
    "falcon",
    "gptj",
    "gpt_neo",
    "t5",
    "mt5",
    "bart",
    "mbart",
    "pegasus",
}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()


@functools.lru_cache(maxsize=4)
def model_of(name: str, seed: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return zoo.build(name, seed, dtype)


def check(found: list[list[int]], expected: list[list[int]], name: str, case: zoo.Case, seed: int) -> None:
    """New tokens are the same, but for near ties."""
    entry, model, inputs = zoo.ARCHITECTURES[name], model_of(name, seed), zoo.prompt_for(name, case, seed)
    if entry.is_encoder_decoder:
        start = inputs.get("decoder_input_ids", torch.full((len(found), 1), model.config.decoder_start_token_id))
    else:
        start = inputs["input_ids"]
    same_tokens(
        *([prompt + row for prompt, row in zip(start.tolist(), rows, strict=True)] for rows in (found, expected)),
        model,
        inputs,
        penalty_alpha=case.penalty_alpha,
        top_k=case.top_k,
        logits_processor=zoo.processors_for(entry, case, zoo.prompt_length(name, case)),
        what=f"{name}, {case.name}",
    )


def test_every_named_architecture_has_golden_tokens() -> None:
    assert set(GOLDEN) >= NAMED
    assert set(GOLDEN) == {name for name, entry in zoo.ARCHITECTURES.items() if entry.oracle}
    needed = {"single", "padded", "eos", "min_length", "processors_eos", "alpha_0.1", "alpha_0.9", "k=1", "k=8"}
    for name, cases in GOLDEN.items():
        assert needed <= set(cases), f"{name}: {needed - set(cases)}"


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, case, id=f"{name}-{case}") for name, cases in GOLDEN.items() for case in cases],
)
def test_same_tokens_as_transformers_4(name: str, case: str) -> None:
    golden = GOLDEN[name][case]
    expected = [list(bytes.fromhex(row)) for row in golden["rows"]]
    found = zoo.ours(model_of(name, golden["seed"]), name, zoo.CASES[case], golden["seed"]).tolist()
    check(found, expected, name, zoo.CASES[case], golden["seed"])
    assert len({token for row in found for token in row}) >= 15


def _beyond_transformers_4() -> list:
    """Architectures and cases; one where images make the reference run candidate by candidate. What has no architecture
    of its own (one row, more candidates) is tried with one of them in the fast set."""
    entries = {name: entry for name, entry in zoo.ARCHITECTURES.items() if not entry.oracle}
    whole = next(name for name, entry in entries.items() if entry.kind != "image-text")
    fast = ("padded", "processors_eos")
    return [
        pytest.param(name, case, id=f"{name}-{case}", marks=() if name == whole or case in fast else pytest.mark.full)
        for name, entry in entries.items()
        for case in (["padded"] if entry.kind == "image-text" else ["single", "padded", "processors_eos", "k=8"])
    ]


@pytest.mark.parametrize(("name", "case"), _beyond_transformers_4())
def test_same_tokens_as_the_float64_reference(name: str, case: str) -> None:
    """What transformers 4.55.4 cannot do, or refuses."""
    truth = zoo.reference(model_of(name, 0, torch.float64), name, zoo.CASES[case], 0).new_tokens().tolist()
    assert len({token for row in truth for token in row}) >= 15
    check(zoo.ours(model_of(name, 0), name, zoo.CASES[case], 0).tolist(), truth, name, zoo.CASES[case], 0)


@pytest.mark.parametrize(("name", "case"), [("gpt2", "padded"), ("t5", "processors_eos"), ("bart", "single")])
def test_a_wrong_token_is_noticed(name: str, case: str) -> None:
    expected = [list(bytes.fromhex(row)) for row in GOLDEN[name][case]["rows"]]
    seed = GOLDEN[name][case]["seed"]
    wrong = [[*row[:5], row[5] % 90 + 4, *row[6:]] for row in expected]
    with pytest.raises(AssertionError, match=f"{name}, {case}: row 0, position .*: float64: "):
        check(wrong, expected, name, zoo.CASES[case], seed)


@pytest.mark.parametrize("name", ["gpt2", "mistral_window", "bloom", "t5", "pegasus"])
def test_reference_agrees_with_transformers_4(name: str) -> None:
    """The other side of the comparison: the reference and the golden tokens know nothing of each other."""
    golden = GOLDEN[name]["processors_eos"]
    model = model_of(name, golden["seed"], torch.float64)
    truth = zoo.reference(model, name, zoo.CASES["processors_eos"], golden["seed"])
    assert [bytes(row).hex() for row in truth.new_tokens().tolist()] == golden["rows"]


# ---- the reference itself ------------------------------------------------------------------------------------------


def test_penalty_is_the_largest_cosine_of_a_real_position() -> None:
    history = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]]).double()
    candidate = torch.tensor([[1.0, 1.0]]).double()
    half = 0.5**0.5
    torch.testing.assert_close(degeneration_penalty(history, candidate), torch.tensor([half]).double())
    mask = torch.tensor([[0, 0, 1]])
    torch.testing.assert_close(degeneration_penalty(history, candidate, mask), torch.tensor([-half]).double())


def test_steps_of_the_reference_follow_equation_5() -> None:
    model = model_of("llama", 0, torch.float64)
    ids = zoo.prompt_for("llama", zoo.CASES["batch"], 0)["input_ids"]
    out = contrastive_search(model, ids, penalty_alpha=0.7, top_k=5, max_new_tokens=3)
    for index, step in enumerate(out.steps):
        text = out.sequences[:, : ids.shape[1] + index]
        with torch.no_grad(), true_float64():
            probabilities = model(text).logits[:, -1].softmax(-1)
        torch.testing.assert_close(step.probabilities, probabilities.topk(5).values)
        torch.testing.assert_close(step.scores, 0.3 * step.probabilities - 0.7 * step.penalties)
        best = step.candidates.gather(1, step.scores.argmax(1, keepdim=True)).squeeze(1)
        assert torch.equal(step.tokens, best)
        assert torch.equal(out.sequences[:, text.shape[1]], best)


def test_reference_does_not_mind_padding() -> None:
    """Each row of a padded batch comes out as it does alone."""
    name, case = "gpt2", zoo.CASES["padded"]
    model = model_of(name, 1, torch.float64)
    together = zoo.reference(model, name, case, 1).new_tokens()
    inputs = zoo.prompt_for(name, case, 1)
    for row, length in enumerate(case.lengths):
        ids = inputs["input_ids"][row : row + 1, -length:]
        alone = contrastive_search(model, ids, penalty_alpha=0.6, top_k=4, max_new_tokens=case.max_new_tokens)
        assert alone.new_tokens().tolist() == together[row : row + 1].tolist()


def test_reference_in_float64_differs_from_float32_by_rounding_only() -> None:
    """And it is float64: probabilities in a model that upcasts to float32 keep more than seven digits."""
    name, case = "llama", zoo.Case("exact", (12,), max_new_tokens=2)
    exact = zoo.reference(model_of(name, 0, torch.float64), name, case, 0).steps[0]
    single = zoo.reference(model_of(name, 0), name, case, 0).steps[0]
    assert exact.probabilities.dtype == torch.float64
    torch.testing.assert_close(exact.probabilities.float(), single.probabilities, rtol=1e-4, atol=1e-6)
    assert bool((exact.probabilities.float().double() != exact.probabilities).all())
