"""Values that mean nothing, sizes of nothing and dtypes of somebody else's: an error that says which argument, or the
number that the documentation says, on every implementation the same."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from simctg_fast import (
    ContrastiveGenerator,
    ContrastiveSearch,
    DRYLogitsProcessor,
    Engine,
    contrastive_search,
    extract_features,
    generate,
    patch_transformers,
)
from simctg_fast.decoding.settings import check_settings
from simctg_fast.engine.parameters import Parameters
from simctg_fast.functional import (
    contraclm_token_loss,
    contraclm_token_loss_items,
    contrastive_loss,
    contrastive_loss_items,
    cosine_regularization,
    cosine_similarity_matrix,
    viterbi_backtrace,
)
from simctg_fast.integrations._batch import check_loss_settings
from simctg_fast.losses import ContraCLMTokenLoss, ContrastiveLoss, SimCTGLoss, padding_mask
from simctg_fast.metrics import diversity, isotropy, repetition
from simctg_fast.reference.contrastive_loss import contrastive_loss as reference
from simctg_fast.training import TrainingOptions

from ..decoding_models import prompt, shared, tokenizer

IMPLS = ("cpu", "torch")
REDUCTIONS = ("pairs", "paper", "dense")
NAN, INF = math.nan, math.inf


def naive(states, margin, reduction, mask=None, normalizer=None):
    """The reference in float64, `normalizer` in place of the count that it divides by."""
    loss = float(reference(states.double(), mask, margin, reduction))
    if normalizer is None:
        return loss
    tokens = torch.full((len(states),), states.shape[1]) if mask is None else (mask != 0).sum(1)
    count = int((tokens * (tokens - 1)).sum()) if reduction == "pairs" else len(states)
    return loss * max(1, count) / normalizer


def gradient_of(function, given):
    leaf = given.detach().clone().requires_grad_()
    loss = function(leaf)
    loss.sum().backward()
    return loss.detach(), leaf.grad


def states_with_zeros(dtype=torch.float32):
    states = torch.randn(3, 9, 5, dtype=torch.float32, generator=torch.Generator().manual_seed(3)) + 0.5
    states[0, 2] = states[1, 4:7] = states[2] = 0.0
    return states.to(dtype)


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


# ---- the normaliser --------------------------------------------------------------------------------------------------


NO_COUNTS = [NAN, INF, -INF, 0, 0.0, -0.0, -1, -2.5, 1e-320, 1e300, 10**400, True, False, "x", "3", [3], ()]
NO_COUNTS += [np.array([3.0]), torch.tensor(True), torch.tensor(1 + 1j), torch.tensor([1.0, 2.0]), torch.empty(0)]
NO_COUNTS += [torch.tensor(3.0, requires_grad=True), torch.tensor(3.0, device="meta")]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", NO_COUNTS, ids=lambda value: repr(value)[:24])
def test_a_normalizer_that_counts_nothing(value, impl):
    with pytest.raises(ValueError, match=r"normalizer (is|has|requires)"):
        contrastive_loss(states_with_zeros(), normalizer=value, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "value",
    [7, 7.0, np.float32(7), np.int64(7)]
    + [torch.full(shape, 7, dtype=dtype) for shape in ((), (1,), (1, 1)) for dtype in (torch.int64, torch.bfloat16)]
    + [torch.tensor(7, dtype=dtype) for dtype in (torch.uint8, torch.float16, torch.float64)],
    ids=repr,
)
def test_a_normalizer_of_any_kind(value, impl):
    got = contrastive_loss(states_with_zeros(), 0.9, normalizer=value, impl=impl)
    assert got.item() == pytest.approx(naive(states_with_zeros(), 0.9, "pairs", normalizer=7), rel=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("value", [NAN, INF, 0.0, -2.0])
def test_what_a_tensor_holds_is_divided_by(value, reduction):
    count = torch.tensor(value)
    found = [
        gradient_of(lambda s, i=impl: contrastive_loss(s, 0.9, None, reduction, normalizer=count, impl=i), states)
        for impl in IMPLS
        for states in [states_with_zeros()]
    ]
    for got, want in zip(*found, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
    loss = found[0][0].item()
    assert math.isnan(loss) if math.isnan(value) else loss == (0.0 if math.isinf(value) else loss)
    assert value != 0.0 or loss == INF


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["pairs", "paper"])
def test_no_pair_over_no_pairs_is_zero(impl, reduction):
    """What gradient accumulation counts in a batch of single tokens."""
    mask = torch.zeros(3, 9)
    mask[:2, 4] = 1
    count = contrastive_loss_items(mask, "pairs")
    assert count.item() == 0
    options = {"normalizer": count, "impl": impl}
    loss, gradient = gradient_of(lambda s: contrastive_loss(s, 0.9, mask, reduction, **options), states_with_zeros())
    assert loss.item() == 0.0
    assert torch.equal(gradient, torch.zeros(3, 9, 5))


# ---- the default dtype -----------------------------------------------------------------------------------------------


def everything(dtype):
    """Every public number of these rooms, on inputs that were made before."""
    states, mask = states_with_zeros(dtype), torch.ones(3, 9, dtype=torch.int64)
    mask[0, :2] = mask[1, 7:] = 0
    logits, ids = torch.linspace(-1, 1, 270, dtype=torch.float64).reshape(3, 9, 10).to(dtype), mask * 4
    weights = torch.linspace(-1, 1, 243, dtype=torch.float64).reshape(3, 9, 9)
    for impl in IMPLS:
        if impl == "cpu" and dtype == torch.float64:
            continue
        for reduction in REDUCTIONS:
            for real in (None, mask) if reduction != "dense" else (None,):
                for count in (None, 3.3, 7):
                    yield from gradient_of(
                        lambda s, r=reduction, m=real, n=count, i=impl: contrastive_loss(
                            s, 0.9, m, r, normalizer=n, impl=i
                        ),
                        states,
                    )
        yield from gradient_of(lambda s, i=impl: (cosine_similarity_matrix(s, impl=i).double() * weights).sum(), states)
    yield cosine_similarity_matrix(states)
    yield from gradient_of(lambda s: torch.stack(SimCTGLoss(0.9, 10, 0)(s, logits, ids, ids)), states)
    yield from gradient_of(lambda x: torch.stack(SimCTGLoss(0.9, 10, 0)(states, x, ids, ids)), logits)
    for reduction in REDUCTIONS:
        yield reference(states, None, 0.9, reduction)
    yield torch.tensor([isotropy(states, mask), isotropy(states)], dtype=torch.float64)
    yield contrastive_loss_items(mask)
    yield padding_mask(ids, 0)
    yield viterbi_backtrace(ids[..., None] % 1, ids[:, 0] % 1, impl="torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_default_dtype_changes_no_bit(dtype, default_dtype):
    want = list(everything(dtype))
    for default in (torch.float16, torch.bfloat16, torch.float64):
        default_dtype(default)
        for number, (got, expected) in enumerate(zip(everything(dtype), want, strict=True)):
            assert got.dtype == expected.dtype, (default, number)
            assert torch.equal(got, expected), (default, number)


def written():
    """Tokens, and their log-probabilities where they are to be had, by every way of writing."""
    model, ids = shared("llama"), prompt(2)
    for options in ({}, {"temperature": 0.3, "generator": torch.Generator().manual_seed(1)}, {"decode_step": True}):
        yield model.generate(ids, custom_generate=ContrastiveSearch(0.6, 4, **options), max_new_tokens=6).tolist()
    yield generate(lambda ids: model(ids).logits, ids, max_new_tokens=6).tolist()
    for strategy in ("contrastive", "greedy", "sample", "stochastic-contrastive"):
        for batching in ("slots", "static"):
            engine = Engine(model, tokenizer(), strategy=strategy, batching=batching, max_new_tokens=6, logprobs=True)
            yield [(each.text, each.logprobs) for each in engine.generate(["abc", "hello you"], ordered=True)]
    yield extract_features(model, tokenizer(), ["abc", "de fg"]).values.tolist()


def test_the_default_dtype_changes_no_text(default_dtype):
    want = list(written())
    for default in (torch.float16, torch.bfloat16, torch.float64):
        default_dtype(default)
        assert list(written()) == want, default


@pytest.mark.parametrize("default", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("margin", [0.9, 0.1, 1 / 3, -0.2])
def test_float64_is_good_to_float64(default, reduction, margin, default_dtype):
    states = states_with_zeros(torch.float64)
    default_dtype(default)
    for count in (None, 3.3):
        got = contrastive_loss(states, margin, None, reduction, normalizer=count, impl="torch")
        assert got.item() == pytest.approx(naive(states, margin, reduction, normalizer=count), rel=1e-13, abs=1e-15)


# ---- sizes of nothing ------------------------------------------------------------------------------------------------

EMPTY = [(0, 5, 8), (2, 0, 8), (2, 1, 8), (2, 5, 0), (2, 1, 0), (0, 0, 0)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_losses(shape, reduction, impl):
    states = torch.randn(shape)
    for mask in (None, torch.zeros(shape[:2])) if reduction != "dense" else (None,):
        loss, gradient = gradient_of(lambda s, m=mask: contrastive_loss(s, 0.5, m, reduction, impl=impl), states)
        assert loss.item() == naive(states, 0.5, reduction, mask)
        assert torch.equal(gradient, torch.zeros(shape))
        assert reference(states, mask, 0.5, reduction).item() == loss.item()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_similarities(shape, impl):
    matrix, gradient = gradient_of(lambda s: cosine_similarity_matrix(s, impl=impl), torch.randn(shape))
    assert matrix.shape == (*shape[:2], shape[1])
    assert torch.allclose(matrix, torch.ones_like(matrix) if shape == (2, 1, 8) else torch.zeros_like(matrix))
    assert gradient.shape == shape
    assert gradient.abs().sum() < 1e-5  # the derivative of a constant 1


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_training_losses(shape):
    states, logits = torch.randn(shape, requires_grad=True), torch.randn(*shape[:2], 10, requires_grad=True)
    ids = torch.full(shape[:2], 3)
    mle, contrastive = SimCTGLoss(0.5, 10, 0)(states, logits, ids, torch.full_like(ids, -100))
    (mle + contrastive).backward()
    assert mle.item() == 0.0
    assert contrastive.item() == naive(states.detach(), 0.5, "pairs")
    assert torch.equal(states.grad, torch.zeros(shape))
    assert torch.equal(logits.grad, torch.zeros(*shape[:2], 10))
    assert padding_mask(ids, 3).shape == shape[:2]
    assert contrastive_loss_items(padding_mask(ids, 3)).item() == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_paths(impl):
    for batch, length in ((0, 3), (2, 0), (0, 0)):
        pointers = torch.zeros(batch, length, 2, dtype=torch.int64)
        lengths = torch.zeros(batch, dtype=torch.int64)
        for known in (None, lengths):
            assert viterbi_backtrace(pointers, lengths, known, impl=impl).shape == (batch, length)
    got = viterbi_backtrace(
        torch.zeros(2, 3, 2, dtype=torch.int64), torch.tensor([9, 1]), torch.tensor([0, 3]), impl=impl
    )
    assert got.tolist() == [[-1, -1, -1], [0, 0, 1]]  # what an item of length 0 ends in is not read


@pytest.mark.parametrize("impl", IMPLS)
def test_a_single_token_that_is_not_finite(impl):
    states = torch.full((1, 1, 4), NAN)
    for reduction in REDUCTIONS:
        assert contrastive_loss(states, 0.5, None, reduction, impl=impl).isnan()
    assert contrastive_loss(states, 0.5, torch.zeros(1, 1), impl=impl).item() == 0.0


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["bool", "int64", "int8", "uint8", "float32", "float16", "bfloat16", "float64"])
def test_masks_of_every_dtype(kind, impl):
    states, real = states_with_zeros(), torch.ones(3, 9, dtype=torch.bool)
    real[0, :3] = real[1, 5:] = real[2] = False
    mask = real.to(getattr(torch, kind))
    if mask.is_floating_point():
        mask = torch.where(real, mask * 0.25, -0.0)
    for reduction in ("pairs", "paper"):
        want = naive(states, 0.9, reduction, real)
        for given in (mask, mask.T.contiguous().T, torch.stack([mask, mask], dim=-1)[..., 0]):
            got = contrastive_loss(states.masked_fill(~real[..., None], NAN), 0.9, given, reduction, impl=impl)
            assert got.item() == pytest.approx(want, rel=1e-6)
            assert contrastive_loss_items(given, reduction).item() == (6 * 5 + 5 * 4 if reduction == "pairs" else 3)
    assert isotropy(states, mask) == isotropy(states, real)


# ---- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_bit(dtype):
    want = list(everything(dtype))[: -3 - 1 - 3]  # not the reference, which is plain PyTorch
    for lower in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=lower):
            got = list(everything(dtype))[: len(want)]
        for number, (one, other) in enumerate(zip(got, want, strict=True)):
            assert one.dtype == other.dtype, number
            assert torch.equal(one, other), number


# ---- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-150, 1e-20, 1.0, 1e150])
def test_isotropy_does_not_depend_on_the_scale(factor):
    states = states_with_zeros(torch.float64)
    cosines = [
        [0.0 if not any(a) or not any(b) else torch.cosine_similarity(torch.tensor(a), torch.tensor(b), dim=0).item()
         for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        for rows in states.tolist()
    ]  # fmt: skip
    want = 1.0 - sum(math.fsum(each) / len(each) for each in cosines) / len(cosines)
    assert isotropy(states * factor) == pytest.approx(want, abs=1e-6)


def test_tokens_in_a_tensor_are_compared_by_value():
    tokens = [1, 2, 1, 2, 1, 2]
    for given in (torch.tensor(tokens), np.array(tokens), tuple(tokens), "121212"):
        assert repetition(given, 2) == repetition(tokens, 2) == pytest.approx(0.6)
        assert diversity(given) == diversity(tokens)


# ---- settings of generation ------------------------------------------------------------------------------------------

INTEGERS = [NAN, INF, 2.5, True, "x", [], [2], -1, np.float32(3), torch.tensor(2.5), torch.tensor([1, 2])]
REFUSED = {
    "max_new_tokens": [*INTEGERS, 0],
    "max_length": [*INTEGERS, 0],
    "min_new_tokens": INTEGERS,
    "min_length": INTEGERS,
    "num_return_sequences": [*INTEGERS, 0],
    "num_beams": [*INTEGERS, 0],
    "no_repeat_ngram_size": INTEGERS,
    "repetition_penalty": [NAN, INF, 0, -1.0, True, "x", []],
    "max_time": [NAN, -1, True, "x", []],
    "do_sample": [NAN, 2.5, "x", [], 2, torch.tensor(3)],
    "eos_token_id": [NAN, INF, 2.5, True, "x", [2.5], [True], ["x"], torch.tensor(2.5)],
    "pad_token_id": [NAN, INF, 2.5, True, "x", [0], torch.tensor(2.5)],
    "penalty_alpha": [NAN, INF, -0.1, 1.1, True, "x", [], torch.tensor(0.5)],
    "top_k": INTEGERS,
}
SAMPLED = {
    "temperature": [NAN, INF, -1.0, True, "x", [], 1e-320],
    "top_p": [NAN, INF, -0.1, 1.1, True, "x", []],
    "min_p": [NAN, -0.1, 1.1, True, "x", []],
    "typical_p": [NAN, 0, -0.1, 1.1, True, "x", []],
    "epsilon_cutoff": [NAN, -0.1, True, "x"],
    "eta_cutoff": [NAN, -0.1, True, "x"],
}


def cases(table):
    return [pytest.param(name, value, id=f"{name}={value!r:.30}") for name, values in table.items() for value in values]


def settings(name, value):
    given = {"do_sample": False} if name in ("max_length", "max_new_tokens") else {"max_new_tokens": 3}
    return {**given, name: value}


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_generate_refuses(name, value):
    model = shared("llama")
    for strategy in (ContrastiveSearch(), contrastive_search):
        with pytest.raises(ValueError, match=f"{name} must be"):
            model.generate(prompt(1), custom_generate=strategy, **settings(name, value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 2.5),
        ("max_length", 9.5),
        ("min_new_tokens", NAN),
        ("num_return_sequences", 0),
        ("num_return_sequences", -1),
        ("num_return_sequences", True),
        ("num_beams", True),
        ("no_repeat_ngram_size", -1),
        ("eos_token_id", 2.5),
        ("eos_token_id", [True]),
        ("pad_token_id", 2.5),
        ("max_time", NAN),
        ("penalty_alpha", NAN),
        ("top_k", 2.5),
    ],
)
def test_generate_refuses_it_in_a_configuration_too(name, value):
    config = GenerationConfig(**settings(name, value))
    with pytest.raises(ValueError, match=f"{name} must be"):
        shared("llama").generate(prompt(1), generation_config=config, custom_generate=ContrastiveSearch())


def test_generate_takes_what_is_a_number():
    model, ids = shared("llama"), prompt(1)
    want = model.generate(ids, custom_generate=ContrastiveSearch(), max_new_tokens=3)
    for value in (3, np.int64(3), torch.tensor(3)):
        assert torch.equal(model.generate(ids, custom_generate=ContrastiveSearch(), max_new_tokens=value), want)
    options = {"max_time": INF, "num_return_sequences": 1, "num_beams": 1, "temperature": 0.0, "do_sample": False}
    assert torch.equal(model.generate(ids, custom_generate=ContrastiveSearch(), max_new_tokens=3, **options), want)
    with pytest.raises(ValueError, match="max_new_tokens` must be greater than 0"):
        model.generate(ids, max_new_tokens=0)  # transformers' own calls are transformers' own affair


def test_a_patched_generate_refuses_a_bad_top_k():
    with patch_transformers():
        for value in (True, 1.0, "x"):
            with pytest.raises(ValueError, match="top_k must be an integer"):
                shared("llama").generate(prompt(1), penalty_alpha=0.6, top_k=value, max_new_tokens=2)


@pytest.mark.parametrize(("name", "value"), cases(REFUSED | SAMPLED))
def test_the_plain_loop_refuses(name, value):
    model = shared("llama")
    with pytest.raises(ValueError, match=rf"{name} must be|num_beams=.* asks for beam search"):
        generate(lambda ids: model(ids).logits, prompt(1), **settings(name, value))


def test_the_plain_loop_takes_temperature_0_for_greedy():
    model, ids = shared("llama"), prompt(1)
    want = generate(lambda ids: model(ids).logits, ids, max_new_tokens=3)
    assert torch.equal(
        generate(lambda ids: model(ids).logits, ids, max_new_tokens=3, temperature=0.0, do_sample=False), want
    )
    with pytest.raises(ValueError, match="temperature"):
        generate(lambda ids: model(ids).logits, ids, max_new_tokens=3, temperature=0.0, do_sample=True)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("penalty_alpha", [NAN, -1, 2, True, "x", [], torch.tensor(0.5)]),
        ("top_k", [NAN, 0, 2.5, True, "x", []]),
        ("temperature", [NAN, INF, 0, -1, True, "x", [], torch.tensor(1.0)]),
        ("generator", [0, "x"]),
        ("streamer", [0, "x"]),
        ("stop_strings", [0, "", [""], [3], b"x"]),
        ("decode_step", [0, 1, "x", None, []]),
        ("path", ["x", None, 0, []]),
        ("fast_linear", [0, "x", None]),
        ("pack", [0, "x", None]),
    ],
)
def test_contrastive_search_refuses(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} (must|is)"):
            ContrastiveSearch(**{name: value})


def test_a_temperature_near_zero_takes_the_best():
    model, ids = shared("llama"), prompt(2)
    want = model.generate(ids, custom_generate=ContrastiveSearch(0.6, 4), max_new_tokens=8)
    for temperature in (5e-324, 1e-320, 1e-40, 1e-30):
        strategy = ContrastiveSearch(0.6, 4, temperature=temperature, generator=torch.Generator().manual_seed(1))
        assert torch.equal(model.generate(ids, custom_generate=strategy, max_new_tokens=8), want)
    strategy = ContrastiveSearch(0.6, 4, temperature=1e300, generator=torch.Generator().manual_seed(1))
    assert model.generate(ids, custom_generate=strategy, max_new_tokens=8).shape == (2, ids.shape[1] + 8)


@pytest.mark.parametrize("value", [NAN, INF, -1, 0, 2.5, True, "x", [], torch.tensor(3)], ids=repr)
def test_texts_in_texts_out(value):
    model = shared("llama")
    generator = ContrastiveGenerator(model, tokenizer())
    for name, call in {
        "batch_size": lambda v: ContrastiveGenerator(model, tokenizer(), batch_size=v),
        "max_length": lambda v: generator(["a"], max_length=v),
        "top_k": lambda v: generator(["a"], 2, top_k=v),
        "max_tokens": lambda v: extract_features(model, tokenizer(), ["a"], max_tokens=v),
        "slots": lambda v: Engine(model, tokenizer(), slots=v),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got"):
            call(value)
    if value not in (0, -1):
        with pytest.raises(ValueError, match="layer must be an integer, got"):
            extract_features(model, tokenizer(), ["a"], layer=value)
    if value != 0:
        with pytest.raises(ValueError, match="penalty_alpha must be a number"):
            generator(["a"], 2, penalty_alpha=value)
        with pytest.raises(ValueError, match="seed must be an integer from 0"):
            generator(["a"], 2, temperature=1.0, seed=value)
    if value is not True:
        with pytest.raises(ValueError, match="trace must be True or False"):
            Engine(model, tokenizer(), trace=value)
    with pytest.raises(ValueError, match="on_progress must be callable"):
        extract_features(model, tokenizer(), ["a"], on_progress=value)


@pytest.mark.parametrize("name", ["max_new_tokens", "temperature", "n", "top_k", "seed", "stop"])
@pytest.mark.parametrize("value", [NAN, INF, -1, 2.5j, True, 7.5j, {}], ids=repr)
def test_parameters_of_a_request(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Parameters(**{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("margin", [NAN, 1.1, True, "x", [], torch.tensor(0.5)]),
        ("reduction", ["mean", "tokens", 1, []]),
        ("loss", ["x", None, 1, []]),
        ("temperature", [0.05]),
        ("contrastive_weight", [NAN, INF, -1, True, "x", None]),
        *((each, [NAN, INF, -1, 0, 2.5, True, "x", None]) for each in ("batch_size", "accumulation", "max_length")),
        ("epochs", [NAN, INF, -1, 0, True, "x", None]),
        ("steps", [NAN, INF, -1, 0, 2.5, True, "x"]),
        ("learning_rate", [NAN, INF, -1, 0, True, "x", None]),
        ("warmup_steps", [NAN, -1, 2.5, True, "x", None]),
        ("weight_decay", [NAN, INF, -1, True, "x", None]),
        ("seed", [NAN, -1, 2.5, 2**32, True, "x", None]),
        ("bf16", [0, "x", None]),
    ],
)
def test_training_options(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} (must be|is)"):
            TrainingOptions(**{name: value})


# ---- anything at all -------------------------------------------------------------------------------------------------

ODD = [NAN, INF, -1, 0, 2.5, True, None, "x", "", [], [[1]], {}, b"x", 1j, object(), 10**400]
ODD += [
    torch.tensor(value) for value in (NAN, 2, True, 1 + 1j)
] + [
    torch.randn(2, 3), torch.randn(2, 4, 3, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.int32), torch.empty(0),
    torch.randn(2, 4, 3, device="meta"), torch.zeros(2, 4, dtype=torch.bool), torch.randn(2, 4, 3).to_sparse(),
    torch.zeros(2, 4, 3, dtype=torch.complex64), torch.zeros(2, 4, 3, dtype=torch.int64), torch.full((2, 4), -7),
    torch.zeros(2, 4, 3, dtype=torch.int64).to_sparse(),
    torch.zeros(2, 4, device="meta"), torch.randn(2, 4, 3).transpose(0, 1), torch.zeros(2, 4, 3).to(torch.bfloat16),
]  # fmt: skip


def good():
    """Calls as they should be, anew each time."""
    states, ids = torch.randn(2, 4, 3), torch.randint(1, 9, (2, 4))
    pointers, logits = torch.randint(0, 3, (2, 4, 3)), torch.randn(2, 4, 9)
    loss = {"hidden_states": states, "margin": 0.5, "attention_mask": torch.ones(2, 4), "reduction": "pairs"}
    forward = {"last_hidden_states": states, "logits": logits, "input_ids": ids, "labels": ids, "attention_mask": None}
    made = {"margin": 0.5, "vocab_size": 9, "pad_token_id": 0, "impl": "auto"}
    search = {"penalty_alpha": 0.6, "top_k": 4, "temperature": None, "path": "auto", "decode_step": "auto"}
    return {
        contrastive_loss: {**loss, "normalizer": 3.0, "impl": "cpu"},
        contrastive_loss_items: {"attention_mask": torch.ones(2, 4), "reduction": "paper"},
        contraclm_token_loss: {
            "hidden_states": states,
            "hidden_states_2": states + 0.1,
            "attention_mask": torch.ones(2, 4),
            "temperature": 0.05,
            "reduction": "tokens",
            "normalizer": 3.0,
            "impl": "cpu",
        },
        contraclm_token_loss_items: {"attention_mask": torch.ones(2, 4), "reduction": "tokens"},
        cosine_regularization: {"hidden_states": states, "attention_mask": torch.ones(2, 4), "normalizer": 3.0},
        cosine_similarity_matrix: {"hidden_states": states, "impl": "torch"},
        viterbi_backtrace: {"backpointers": pointers, "last": pointers[:, 0, 0], "lengths": None, "impl": "auto"},
        padding_mask: {"tokens": ids, "pad_token_id": 0, "ignore_index": -100},
        isotropy: {"hidden_states": states, "attention_mask": None},
        repetition: {"tokens": [1, 2, 1], "n": 1},
        diversity: {"tokens": [1, 2, 1]},
        SimCTGLoss: made,
        ContrastiveLoss: {"margin": 0.5, "reduction": "pairs", "impl": "auto"},
        ContraCLMTokenLoss: {"temperature": 0.05, "reduction": "tokens", "impl": "auto"},
        SimCTGLoss(0.5, 9, 0).forward: forward,
        check_loss_settings: {"margin": 0.5, "reduction": "pairs", "contrastive_weight": 1.0},
        ContrastiveSearch: search,
        DRYLogitsProcessor: {"multiplier": 0.8, "base": 1.75, "allowed_length": 2, "sequence_breakers": [5]},
        TrainingOptions: {"batch_size": 8, "epochs": 1.0, "seed": 0},
    }


def finite(result):
    if isinstance(result, torch.Tensor):
        return result.is_meta or not result.is_floating_point() or bool(result.float().isfinite().all())
    if isinstance(result, tuple):
        return all(map(finite, result))
    return not isinstance(result, float) or math.isfinite(result)


def holds_nan(value):
    return isinstance(value, torch.Tensor) and not value.is_meta and value.is_floating_point() and value.isnan().any()


def outcome(function, arguments):
    """What comes back, and what was raised of the kinds that may be."""
    try:
        return function(**arguments), None
    except (TypeError, ValueError, RuntimeError) as error:
        return None, error


def test_anything_in_any_place():
    """A TypeError, ValueError or RuntimeError that names the argument, or a result that is finite."""
    some, tried = random.Random(0), 0
    for number, (function, arguments) in enumerate(good().items()):
        for name in arguments:
            for value in ODD:
                fresh = list(good().values())[number]
                told = f"{function.__qualname__}({name}={value!r:.60})"
                result, error = outcome(function, {**fresh, name: value})
                if error is None:
                    assert finite(result) or holds_nan(value), f"{told}: {result}"
                else:
                    assert not isinstance(error, NotImplementedError), f"{told}: {error}"
                    assert name in str(error), f"{told}: {error}"
                tried += 1
        for _ in range(40):  # two at a time
            fresh = list(good().values())[number]
            odd = {name: some.choice(ODD) for name in some.sample(list(fresh), min(2, len(fresh)))}
            _, error = outcome(function, {**fresh, **odd})
            assert error is None or any(name in str(error) for name in fresh), (
                f"{function.__qualname__}({odd}): {error}"
            )
    assert tried > 1000


def test_settings_of_any_kind():
    for name in [*REFUSED, *SAMPLED]:
        for value in ODD:
            _, error = outcome(check_settings, {"settings": {name: value}, "sampled": True})
            assert error is None or str(error).startswith(f"{name} must be"), (name, value)
