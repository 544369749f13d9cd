"""Second derivatives, forward mode and `torch.func`: right, or an error that names the operator.

Truth is a naive restatement in float64, differentiated by torch as often as is asked for.
"""

from __future__ import annotations

import itertools
import os
import sys
import textwrap
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import simctg_fast
from simctg_fast.crf import LowRankCRF, StochasticViterbiSample, StochasticViterbiSamples
from simctg_fast.functional import (
    contrastive_loss,
    cosine_similarity_matrix,
    info_nce,
    simcse_loss_from_embeddings,
    simcse_sup_loss,
    simcse_unsup_loss,
)
from simctg_fast.losses import ContrastiveLoss, SimCSELoss, SimCTGLoss
from simctg_fast.ops import (
    candidate_select,  # noqa: F401 - defines its operators
    centered_scan,  # noqa: F401 - as above
    simcse,
    top_k,  # noqa: F401 - as above
)

from ..processes import run_child
from ..repository import INSTALLED
from ..two_processes import run_two

MARGIN = 0.9  # many pairs are active, and many are not
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]])

# ---- the truth -------------------------------------------------------------------------------------------------------


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def hinges(states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Hinges of all pairs, and which pairs count."""
    vectors = unit(states)
    similarity = vectors @ vectors.mT
    own = similarity.diagonal(dim1=1, dim2=2).unsqueeze(2)
    pairs = torch.ones_like(similarity) if mask is None else (mask[:, :, None] * mask[:, None]).to(similarity.dtype)
    pairs = pairs * (1 - torch.eye(states.shape[1], dtype=pairs.dtype))
    return torch.relu(MARGIN - own + similarity), pairs


def by_pairs(states: Tensor, mask: Tensor | None = None) -> Tensor:
    hinge, pairs = hinges(states, mask)
    return (hinge * pairs).sum() / pairs.sum()


def by_paper(states: Tensor) -> Tensor:
    hinge, pairs = hinges(states, MASK)
    return ((hinge * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)).mean()


def by_entries(states: Tensor) -> Tensor:
    return hinges(states)[0].mean()


def cross_entropy(queries: Tensor, keys: Tensor, temperature: float = 0.05, first: int = 0) -> Tensor:
    logits = unit(queries) @ unit(keys).T / temperature
    return logits.logsumexp(1) - logits.diagonal(first)


def unsupervised(x: Tensor, temperature: float = 0.05) -> Tensor:
    logits = unit(x) @ unit(x).T / temperature
    logits = logits - torch.diag(torch.full((len(x),), torch.inf, dtype=x.dtype))
    return (logits.logsumexp(1) - logits[torch.arange(len(x)), torch.arange(len(x)) ^ 1]).mean()


def supervised(x: Tensor) -> Tensor:
    return cross_entropy(x[0::3], torch.cat([x[1::3], x[2::3]])).mean()


VOCABULARY, RANK, BEAM, STEPS = 6, 2, 3, 4
LENGTHS = torch.tensor([4, 2, 3])
BEAMS = torch.stack([torch.stack([torch.randperm(VOCABULARY)[:BEAM] for _ in range(STEPS)]) for _ in range(3)])
TAGS = BEAMS[:, :, 1]


def path_scores(x: Tensor, item: int) -> tuple[Tensor, list[tuple[int, ...]]]:
    """The score of every path of slots; `x` is emissions and, below them, both tables."""
    emissions, left, right = parts(x)
    length, scores = int(LENGTHS[item]), []
    paths = list(itertools.product(range(BEAM), repeat=length))
    for path in paths:
        tokens = [int(BEAMS[item, t, slot]) for t, slot in enumerate(path)]
        score = sum(emissions[item, t, token] for t, token in enumerate(tokens))
        scores.append(score + sum((left[a] * right[b]).sum() for a, b in itertools.pairwise(tokens)))
    return torch.stack(scores), paths


def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size = 3 * STEPS * VOCABULARY
    tables = x[size:].view(2, VOCABULARY, RANK)
    return x[:size].view(3, STEPS, VOCABULARY), tables[0], tables[1]


def log_partition(x: Tensor) -> Tensor:
    return torch.stack([path_scores(x, item)[0].logsumexp(0) for item in range(3)])


def log_prob(x: Tensor) -> Tensor:
    result = []
    for item in range(3):
        scores, paths = path_scores(x, item)
        result.append(scores.log_softmax(0)[paths.index((1,) * int(LENGTHS[item]))])
    return torch.stack(result)


def entropy(x: Tensor) -> Tensor:
    laws = [path_scores(x, item)[0].log_softmax(0) for item in range(3)]
    return torch.stack([-(law.exp() * law).sum() for law in laws])


def best(x: Tensor) -> Tensor:
    return torch.stack([path_scores(x, item)[0].max() for item in range(3)])


def through_crf(method: Callable[[LowRankCRF, Tensor], Tensor]) -> Callable[[Tensor, str], Tensor]:
    crf = LowRankCRF(VOCABULARY, RANK, BEAM)
    del crf.E1.weight, crf.E2.weight

    def function(x: Tensor, impl: str) -> Tensor:
        emissions, crf.E1.weight, crf.E2.weight = parts(x)
        crf.impl = impl
        return method(crf, emissions)

    return function


# ---- the cases -------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    operator: str
    ours: Callable[[Tensor, str], Tensor]
    naive: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]


STATES, ROWS, POTENTIALS = (3, 6, 4), (6, 5), (3 * STEPS * VOCABULARY + 2 * VOCABULARY * RANK,)


def simctg(x: Tensor, impl: str) -> Tensor:
    tokens = torch.arange(1, 19).view(3, 6)
    loss = SimCTGLoss(MARGIN, 5, 0, impl=impl)
    return loss(x, torch.zeros(3, 6, 5), tokens, tokens % 5, attention_mask=MASK)[1]


CASES = {
    "pairs": Case("contrastive_loss", lambda x, i: contrastive_loss(x, MARGIN, impl=i), by_pairs, STATES),
    "pairs, masked": Case(
        "contrastive_loss", lambda x, i: contrastive_loss(x, MARGIN, MASK, impl=i), lambda x: by_pairs(x, MASK), STATES
    ),
    "paper": Case(
        "contrastive_loss", lambda x, i: contrastive_loss(x, MARGIN, MASK, "paper", impl=i), by_paper, STATES
    ),
    "dense": Case(
        "contrastive_loss", lambda x, i: contrastive_loss(x, MARGIN, None, "dense", impl=i), by_entries, STATES
    ),
    "ContrastiveLoss": Case("contrastive_loss", lambda x, i: ContrastiveLoss(MARGIN, impl=i)(x), by_pairs, STATES),
    "SimCTGLoss": Case("contrastive_loss", simctg, lambda x: by_pairs(x, MASK), STATES),
    "cosines": Case(
        "cosine_similarity_matrix",
        lambda x, i: cosine_similarity_matrix(x, impl=i),
        lambda x: unit(x) @ unit(x).mT,
        STATES,
    ),
    "unsupervised": Case("self_loss", lambda x, i: simcse_unsup_loss(x, impl=i), unsupervised, ROWS),
    "unsupervised, sharp": Case(
        "self_loss", lambda x, i: simcse_unsup_loss(x, temp=0.02, impl=i), lambda x: unsupervised(x, 0.02), ROWS
    ),
    "supervised": Case("pair_loss", lambda x, i: SimCSELoss(supervised=True, impl=i)(x), supervised, ROWS),
    "symmetric": Case(
        "pair_loss",
        lambda x, i: simcse_sup_loss(x, symmetric=True, impl=i),
        lambda x: (supervised(x) + cross_entropy(x[1::3], x[0::3]).mean()) / 2,
        ROWS,
    ),
    "from embeddings": Case(
        "pair_loss",
        lambda x, i: simcse_loss_from_embeddings(x[:3], x[3:], impl=i),
        lambda x: cross_entropy(x[:3], x[3:]).mean(),
        ROWS,
    ),
    "info_nce": Case(
        "pair_loss",
        lambda x, i: info_nce(x[:2], x[2:], 0.3, targets=1, reduction="none", impl=i),
        lambda x: cross_entropy(x[:2], x[2:], 0.3, 1),
        ROWS,
    ),
    "log_partition": Case(
        "crf_filter",
        through_crf(lambda crf, e: crf.log_partition(e, LENGTHS, beam_tokens=BEAMS)),
        log_partition,
        POTENTIALS,
    ),
    "log_prob": Case(
        "crf_filter",
        through_crf(lambda crf, e: crf.log_prob(e, TAGS, LENGTHS, beam_tokens=BEAMS).log_prob),
        log_prob,
        POTENTIALS,
    ),
}
ENTROPY = through_crf(lambda crf, e: crf.entropy(e, LENGTHS, beam_tokens=BEAMS))
VITERBI = through_crf(lambda crf, e: crf.viterbi(e, LENGTHS, beam_tokens=BEAMS).score)
CPU_TOO = [(name, impl) for name in CASES for impl in ("torch", "cpu")]
cases = pytest.mark.parametrize("name", CASES)
cases_and_impls = pytest.mark.parametrize(("name", "impl"), CPU_TOO)


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A point and a direction."""
    return torch.randn(shape, dtype=torch.float64).to(dtype), torch.randn(shape, dtype=torch.float64).to(dtype)


def scalar(function: Callable[..., Tensor], *rest: str) -> Callable[[Tensor], Tensor]:
    """Of a result of any shape, a sum in which every part has a weight of its own and the second power matters."""

    def result(x: Tensor) -> Tensor:
        value = function(x, *rest)
        weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
        return (weights * (value + value * value)).sum()

    return result


def second(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    """The Hessian times the direction, by two backward passes."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
    return torch.autograd.grad((gradient * direction).sum(), x)[0]


def first(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert float((actual.double() - expected).norm()) <= tolerance * float(expected.norm()) + 1e-12


# ---- backward of the backward ----------------------------------------------------------------------------------------


@cases
def test_second_derivatives(name):
    case = CASES[name]
    x, direction = inputs(case.shape)
    close(second(scalar(case.ours, "torch"), x, direction), second(scalar(case.naive), x, direction), 1e-10)


@cases_and_impls
def test_second_derivatives_in_float32(name, impl):
    case = CASES[name]
    x, direction = inputs(case.shape, torch.float32)
    truth = second(scalar(case.naive), x.double(), direction.double())
    eager = second(scalar(case.naive), x, direction).double()
    found = second(scalar(case.ours, impl), x, direction)
    assert found.dtype == torch.float32
    close(found, truth, 4 * float((eager - truth).norm() / truth.norm()) + 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["pairs", "cosines", "unsupervised", "supervised"])
def test_second_derivatives_in_half_precision_are_those_of_its_numbers(name, dtype):
    case = CASES[name]
    x, direction = inputs(case.shape, dtype)
    truth = second(lambda x: case.naive(x).sum(), x.double(), direction.double())
    close(second(lambda x: case.ours(x, "auto").float().sum(), x, direction), truth, 0.03)


@pytest.mark.parametrize("name", ["entropy", "viterbi"])
def test_second_derivatives_of_what_is_made_of_torch(name):
    ours, naive = {"entropy": (ENTROPY, entropy), "viterbi": (VITERBI, best)}[name]
    x, direction = inputs(POTENTIALS)
    close(second(scalar(ours, "torch"), x, direction), second(scalar(naive), x, direction), 1e-9)


def test_with_respect_to_the_gradient_that_comes_in():
    """The loss is a factor in another: its gradient is differentiated by both."""
    for name in ("pairs", "unsupervised", "supervised", "log_partition"):
        case = CASES[name]
        x, direction = inputs(case.shape)
        ours, naive = (
            second(lambda x, f=f: (f(x).sum() ** 3) * x.square().sum(), x, direction)
            for f in (lambda x, case=case: case.ours(x, "torch"), case.naive)
        )
        close(ours, naive, 1e-10)


def test_a_gradient_penalty_trains():
    x, _ = inputs((2, 150, 8))

    def penalty(loss):
        leaf = x.clone().requires_grad_()
        value = loss(leaf)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        (value + gradient.square().sum()).backward()
        return leaf.grad

    close(penalty(lambda x: contrastive_loss(x, MARGIN)), penalty(by_pairs), 1e-10)


@pytest.mark.parametrize("name", ["unsupervised", "supervised", "info_nce"])
def test_blocks(name, monkeypatch):
    monkeypatch.setattr(simcse._tiled, "BLOCK", 2)
    case = CASES[name]
    x, direction = inputs((18, 5))
    close(second(scalar(case.ours, "torch"), x, direction), second(scalar(case.naive), x, direction), 1e-10)


def test_zero_vectors_and_padding_have_no_second_derivative():
    x, direction = inputs(STATES, torch.float32)
    x[0, 2] = 0.0
    mask = MASK.clone()
    x[1, 0], x[2, 3] = torch.nan, torch.inf
    found = second(lambda x: contrastive_loss(x, MARGIN, mask), x, direction)
    assert found.isfinite().all()
    assert not found[0, 2].any()
    assert not found[mask == 0].any()
    for function in (
        lambda x: cosine_similarity_matrix(x).square().sum(),
        lambda x: simcse_unsup_loss(x.flatten(0, 1)),
    ):
        x, direction = inputs(STATES, torch.float32)
        x[0, 2] = 0.0
        found = second(function, x, direction)
        assert found.isfinite().all()
        assert not found[0, 2].any()
        assert found[0, 1].any()


@pytest.mark.parametrize("size", [1e-15, 1e15])
@pytest.mark.parametrize("name", ["pairs", "cosines", "unsupervised", "supervised"])
def test_the_length_of_a_vector_does_not_overflow(name, size):
    case = CASES[name]
    x, direction = inputs(case.shape, torch.float32)
    truth = second(scalar(case.naive), x.double(), direction.double())
    close(second(lambda x: scalar(case.ours, "auto")(x * size), x, direction), truth, 1e-4)


@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_banned_tokens(impl):
    crf = LowRankCRF(VOCABULARY, RANK, BEAM, impl=impl)
    x, direction = inputs((3, STEPS, VOCABULARY), torch.float32)
    banned = torch.zeros_like(x, dtype=torch.bool)
    for item, step in itertools.product(range(3), range(STEPS)):
        banned[item, step, BEAMS[item, step, 2]] = True

    def through(value: float, dtype: torch.dtype):
        model = crf if dtype == torch.float32 else LowRankCRF(VOCABULARY, RANK, BEAM).double()
        model.load_state_dict(crf.state_dict())

        def function(x: Tensor) -> Tensor:
            return model.log_partition(x.masked_fill(banned, value), LENGTHS, beam_tokens=BEAMS).square().sum()

        return second(function, x.to(dtype), direction.to(dtype))

    found = through(-torch.inf, torch.float32)
    assert found.isfinite().all()
    close(found, through(-200.0, torch.float64), 1e-4)


@cases_and_impls
def test_the_gradient_is_the_same_bits_where_it_can_be_differentiated_again(name, impl):
    case = CASES[name]
    x, _ = inputs(case.shape, torch.float32)
    leaf = x.requires_grad_()
    (again,) = torch.autograd.grad(case.ours(leaf, impl).sum(), leaf, create_graph=True)
    assert torch.equal(again, first(lambda x: case.ours(x, impl).sum(), x))


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("SimCTGLoss",)])
def test_third_derivatives(name):
    case = CASES[name]
    x, direction = inputs(case.shape)

    def third(function):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        (h,) = torch.autograd.grad((g * direction).sum(), leaf, create_graph=True)
        return torch.autograd.grad((h * direction).sum() + leaf.square().sum(), leaf)[0]

    if case.operator in ("cosine_similarity_matrix", "crf_filter"):
        close(third(scalar(case.ours, "torch")), third(scalar(case.naive)), 1e-9)
        return
    with pytest.raises(RuntimeError, match=rf"simctg_fast::{case.operator} is differentiable twice"):
        third(scalar(case.ours, "torch"))


@pytest.mark.parametrize("kind", [StochasticViterbiSample, StochasticViterbiSamples])
def test_the_published_sampler_is_differentiable_once(kind):
    model = kind(VOCABULARY, RANK, BEAM)
    x, direction = inputs((2, STEPS, VOCABULARY), torch.float32)

    uniforms = torch.rand(2, STEPS - 1, BEAM, getattr(model, "num_samples", 1))

    def function(x: Tensor) -> Tensor:  # one that would have second derivatives without the sampler's too
        return model(x, uniforms=uniforms)[0].square().sum() + x.pow(3).sum()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    assert torch.equal(gradient, first(function, x))
    for other in (leaf, model.E1.weight):
        with pytest.raises(RuntimeError, match="simctg_fast::crf_stochastic_viterbi is differentiable once"):
            torch.autograd.grad((gradient * direction).sum(), other, retain_graph=True)
    close(torch.func.grad(function)(x), first(function, x).double(), 1e-7)
    close(torch.func.jacrev(function)(x), first(function, x).double(), 1e-7)
    with pytest.raises(RuntimeError, match="crf_stochastic_viterbi has no forward-mode derivative"):
        torch.func.jvp(function, (x,), (direction,))


def test_through_a_checkpoint():
    for name in ("pairs", "unsupervised", "log_prob"):
        case = CASES[name]
        x, direction = inputs(case.shape)
        ours = scalar(case.ours, "torch")
        found = second(lambda x, f=ours: checkpoint(f, x, use_reentrant=False), x, direction)
        close(found, second(scalar(case.naive), x, direction), 1e-10)


def test_every_process_gets_the_second_derivatives_of_gathered_rows(tmp_path):
    code = """
    from simctg_fast.functional import simcse_unsup_loss, simcse_loss_from_embeddings
    rows = (argument[:4] if rank == 0 else argument[4:]).clone().requires_grad_()
    result = []
    for loss in (
        lambda x: simcse_unsup_loss(x, gather_across_devices=True),
        lambda x: simcse_loss_from_embeddings(x[0::2], x[1::2], gather_across_devices=True),
    ):
        # Data-parallel training would average the two; a sum of halves is the loss of the whole batch.
        (gradient,) = torch.autograd.grad(loss(rows) / 2, rows, create_graph=True)
        result.append(torch.autograd.grad(gradient.square().sum(), rows)[0])
    """
    x, _ = inputs((10, 5))
    found = run_two(tmp_path, code, x)
    for index, loss in enumerate((unsupervised, lambda x: cross_entropy(x[0::2], x[1::2]).mean())):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        (truth,) = torch.autograd.grad(gradient.square().sum(), leaf)
        close(torch.cat([found[0][index], found[1][index]]), truth, 1e-10)


# ---- forward mode ----------------------------------------------------------------------------------------------------


@cases_and_impls
def test_forward_mode_raises(name, impl):
    case = CASES[name]
    dtype = torch.float64 if impl == "torch" else torch.float32
    x, direction = inputs(case.shape, dtype)
    ours = scalar(case.ours, impl)
    with pytest.raises(RuntimeError, match=rf"simctg_fast::{case.operator} has no forward-mode derivative"):
        torch.func.jvp(ours, (x,), (direction,))
    with pytest.raises(RuntimeError, match=rf"simctg_fast::{case.operator} has no forward-mode derivative"):
        torch.func.jacfwd(ours)(x)
    with pytest.raises(RuntimeError, match=rf"simctg_fast::{case.operator} has no forward-mode derivative"):
        torch.func.hessian(ours)(x)
    for needs in (False, True):
        with forward_ad.dual_level(), torch.set_grad_enabled(needs):
            dual = forward_ad.make_dual(x.detach().requires_grad_(needs), direction)
            with pytest.raises(RuntimeError, match=rf"simctg_fast::{case.operator} has no forward-mode derivative"):
                ours(dual)


@cases
def test_forward_mode_leaves_tensors_without_tangents_alone(name):
    case = CASES[name]
    x, _ = inputs(case.shape)
    with forward_ad.dual_level():
        other = forward_ad.make_dual(torch.ones((), dtype=x.dtype), torch.ones((), dtype=x.dtype))
        value = case.ours(x, "torch").sum() * other
        close(forward_ad.unpack_dual(value).tangent, case.naive(x).sum(), 1e-10)


def test_forward_mode_through_what_is_made_of_torch():
    x, direction = inputs(POTENTIALS)
    for ours, naive in ((VITERBI, best), (ENTROPY, entropy)):
        try:
            found = torch.func.jvp(lambda x, f=ours: f(x, "torch"), (x,), (direction,))[1]
        except NotImplementedError:
            assert ours is ENTROPY  # torch's checkpoint, before 2.13
            continue
        close(found, torch.func.jvp(naive, (x,), (direction,))[1], 1e-10)


# ---- torch.func ------------------------------------------------------------------------------------------------------


@cases
def test_transforms(name):
    case = CASES[name]
    x, direction = inputs(case.shape)
    ours, naive = scalar(case.ours, "torch"), scalar(case.naive)
    gradient, curvature = first(naive, x), second(naive, x, direction)
    close(torch.func.grad(ours)(x), gradient, 1e-10)
    close(torch.func.vjp(ours, x)[1](torch.ones((), dtype=x.dtype))[0], gradient, 1e-10)
    close(torch.func.jacrev(lambda x: case.ours(x, "torch"))(x), torch.func.jacrev(case.naive)(x), 1e-10)
    close(torch.func.grad(lambda x: (torch.func.grad(ours)(x) * direction).sum())(x), curvature, 1e-10)
    close(torch.func.vjp(torch.func.grad(ours), x)[1](direction)[0], curvature, 1e-10)
    # Two arguments, one a level: neither knows of the other's derivative.
    zero = torch.zeros((), dtype=x.dtype)
    mixed = torch.func.grad(lambda a: torch.func.grad(lambda b: ours(x + a * direction + b * direction))(zero))
    close(mixed(zero), (curvature * direction).sum(), 1e-9)
    # Inside a graph of the ordinary kind.
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad((torch.func.grad(ours)(leaf) * direction).sum(), leaf)
    close(found, curvature, 1e-10)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].shape != POTENTIALS])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_gradients_of_each_sample(name):
    case = CASES[name]
    x = torch.randn((3, *case.shape), dtype=torch.float64)
    ours, naive = scalar(case.ours, "torch"), scalar(case.naive)
    gradients = torch.stack([first(naive, one) for one in x])
    close(torch.vmap(ours)(x), torch.stack([naive(one) for one in x]), 1e-10)
    close(torch.vmap(torch.func.grad(ours))(x), gradients, 1e-10)
    close(torch.func.grad(lambda x: torch.vmap(ours)(x).sum())(x), gradients, 1e-10)
    leaf = x.clone().requires_grad_()
    close(torch.autograd.grad(torch.vmap(ours)(leaf).sum(), leaf)[0], gradients, 1e-10)
    hessian = torch.func.jacrev(torch.func.jacrev(ours))(x[0])
    close(hessian, torch.func.jacrev(torch.func.jacrev(naive))(x[0]), 1e-9)


def right_or_refused(function: Callable[[], Tensor], truth: Tensor, why: str) -> None:
    try:
        found = function()
    except RuntimeError as error:
        if why not in str(error):
            raise
        return
    close(found, truth, 1e-9)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_crf_has_hessians_and_vmap_is_right_or_says_why_not():
    x, direction = inputs(POTENTIALS)
    both = torch.stack([x, direction])
    control = "data-dependent control flow"  # checks look at numbers
    for case in (CASES["log_partition"], CASES["log_prob"]):
        ours, naive = scalar(case.ours, "torch"), scalar(case.naive)
        found = torch.func.jacrev(torch.func.jacrev(ours))(x)
        close(found, torch.func.jacrev(torch.func.jacrev(naive))(x), 1e-9)
        values, gradients = (torch.stack([f(one) for one in both]) for f in (naive, lambda x, f=naive: first(f, x)))
        right_or_refused(lambda f=ours: torch.vmap(f)(both), values, control)
        right_or_refused(lambda f=ours: torch.vmap(torch.func.grad(f))(both), gradients, control)
    for ours, naive in ((VITERBI, best), (ENTROPY, entropy)):
        ours, naive = scalar(ours, "torch"), scalar(naive)
        right_or_refused(lambda f=ours: torch.func.grad(f)(x), first(naive, x), "saved tensor hooks")
        right_or_refused(lambda f=ours: torch.vmap(f)(both), torch.stack([naive(one) for one in both]), control)


# ---- torch.compile, Triton, and what decodes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pairs", "cosines", "unsupervised", "supervised"])
def test_compiled(name):
    case = CASES[name]
    x, direction = inputs(case.shape, torch.float32)
    ours = scalar(case.ours, "auto")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    close(first(compiled, x), first(ours, x).double(), 1e-6)
    inside = torch.compile(torch.func.grad(ours), fullgraph=True, backend="aot_eager")
    close(inside(x), first(ours, x).double(), 1e-6)
    with pytest.raises(RuntimeError):  # torch's own: what AOTAutograd compiles is differentiable once
        second(compiled, x, direction)
    with pytest.raises(RuntimeError, match=r"has no forward-mode derivative|functorch|torch\.func"):
        torch.func.jvp(compiled, (x,), (direction,))


def test_kernels_keep_what_second_derivatives_need():
    pytest.importorskip("triton")
    code = """
    import torch
    from simctg_fast.crf import LowRankCRF
    from simctg_fast.functional import contrastive_loss, cosine_similarity_matrix, simcse_sup_loss, simcse_unsup_loss
    crf = {impl: LowRankCRF(6, 2, 3, impl=impl) for impl in ("torch", "triton")}
    crf["triton"].load_state_dict(crf["torch"].state_dict())
    functions = {
        (2, 140, 16): [lambda x, impl: contrastive_loss(x, 0.9, impl=impl),
                       lambda x, impl: cosine_similarity_matrix(x, impl=impl).square().mean()],
        (12, 8): [lambda x, impl: simcse_unsup_loss(x, impl=impl), lambda x, impl: simcse_sup_loss(x, impl=impl)],
        (2, 3, 6): [lambda x, impl: crf[impl].log_partition(x).square().sum()],
    }
    for shape, some in functions.items():
        x, direction = torch.randn(shape, requires_grad=True), torch.randn(shape)
        for function in some:
            found = []
            for impl in ("torch", "triton"):
                (g,) = torch.autograd.grad(function(x, impl), x, create_graph=True)
                found.append(torch.autograd.grad((g * direction).sum(), x)[0])
            assert float((found[0] - found[1]).norm()) < 1e-5 * float(found[0].norm()) and found[0].any(), shape
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(INSTALLED), "OMP_NUM_THREADS": "1"}
    run_child([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True)


def test_operators_that_only_decode_raise():
    states, history = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 4)
    lengths, probs = torch.tensor([5, 3]), torch.rand(2, 3)
    operators = torch.ops.simctg_fast
    results = {
        "candidate_scan": lambda x: operators.candidate_scan(x, history, 5, None)[0],
        "candidate_select": lambda x: operators.candidate_select(x, probs, history.clone(), lengths, None, 0.6, True)[
            1
        ],
        "centered_scan": lambda x: operators.centered_scan(
            x, history[:, 0], history, history[..., 0], history[:, 0], 5, None
        )[0],
        "top_k_probs": lambda x: operators.top_k_probs(x[:, 0], 2)[0],
        "crf_beam_select": lambda x: operators.crf_beam_select(x, 2)[1],
    }
    for name, function in results.items():
        with pytest.raises(RuntimeError, match=f"simctg_fast::{name} has no derivative"):
            torch.autograd.grad(function(states).sum() + states.sum(), states)
        with pytest.raises(RuntimeError, match=f"simctg_fast::{name} has no forward-mode derivative"):
            torch.func.jvp(function, (states.detach(),), (states.detach(),))


@pytest.mark.parametrize("product", [torch.autograd.functional.hvp, torch.autograd.functional.vhp])
@pytest.mark.parametrize("name", ["contrastive", "unsupervised", "info_nce"])
def test_products_with_the_hessian(product, name):
    """torch's `hvp` differentiates a second derivative with respect to its direction, of which it is linear."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def cosines(left, right):
        left, right = (torch.nn.functional.normalize(x, dim=-1) for x in (left, right))
        return left @ right.transpose(-1, -2)

    def contrastive(states):
        hinges = torch.relu(0.9 - 1 + cosines(states, states)) * (1 - torch.eye(7, dtype=torch.float64))
        return hinges.sum() / (2 * 7 * 6)

    def unsupervised(rows):
        logits = (cosines(rows, rows) / 0.05).masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf)
        return torch.nn.functional.cross_entropy(logits, torch.arange(6) ^ 1)

    def nce(queries, keys):
        return torch.nn.functional.cross_entropy(cosines(queries, keys) / 0.05, torch.arange(4))

    ours, naive, inputs = {
        "contrastive": (lambda x: simctg_fast.contrastive_loss(x, 0.9), contrastive, (random(2, 7, 5),)),
        "unsupervised": (simctg_fast.simcse_unsup_loss, unsupervised, (random(6, 5),)),
        "info_nce": (simctg_fast.functional.info_nce, nce, (random(4, 5), random(6, 5))),
    }[name]
    directions = tuple(random(*x.shape) for x in inputs)
    for got, want in zip(product(ours, inputs, directions)[1], product(naive, inputs, directions)[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    point, direction = inputs[0].clone().requires_grad_(), directions[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(ours(point, *inputs[1:]), point, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), point, create_graph=True)
    torch.autograd.grad(second.sum(), direction, retain_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable twice"):
        torch.autograd.grad(second.sum(), point)
