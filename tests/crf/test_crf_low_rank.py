"""`LowRankCRF` as people call it: by name, as a module, in wrappers, compiled, under autocast, with bad arguments."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from torch import nn

from simctg_fast import LowRankCRF, StochasticViterbiSample, StochasticViterbiSamples
from simctg_fast.crf import LogProb, ViterbiPath
from simctg_fast.ops import _backends

from .. import crf_cases as cases
from ..two_processes import run_two

needs_extension = pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")
IMPLS = ("torch", pytest.param("cpu", marks=needs_extension))
BAD_COUNTS = (0, -1, 2.5, 2.0, True, "3", float("nan"), None, torch.tensor(2))


def small(impl="torch", dtype=torch.float32):
    crf = cases.build(50, 16, 8, impl, dtype=dtype).requires_grad_()
    return crf, torch.randn(3, 7, 50, dtype=dtype), torch.randint(50, (3, 7)), torch.tensor([7, 3, 0])


@pytest.mark.parametrize("impl", IMPLS)
def test_edges(impl):
    cases.check_edges(impl)


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_a_number_in_the_place_of_lengths():
    crf, emissions, _, lengths = small()
    for method, hint in ((crf.kbest, "kbest(emissions, n=3)"), (crf.sample, "sample(emissions, num_samples=3)")):
        with pytest.raises(TypeError, match=f"lengths is int, .*{re.escape(hint)}"):
            method(emissions, 3)
    with pytest.raises(TypeError, match=re.escape("beam(emissions, beam_size=3)")):
        crf.beam(emissions, 3)
    for method in (crf.viterbi, crf.log_partition, crf.marginals, crf.entropy):
        with pytest.raises(TypeError, match="lengths is int, must be a tensor"):
            method(emissions, 3)
    with pytest.raises(ValueError, match=r"other_emissions has shape .*; lengths are named: lengths="):
        crf.kl(crf, emissions, lengths)
    for call in (lambda: crf.kbest(emissions, lengths, 3), lambda: crf.kl(crf, emissions, None, lengths)):
        with pytest.raises(TypeError, match="positional"):
            call()


def test_what_comes_after_lengths_is_named():
    for name, method in inspect.getmembers(LowRankCRF, inspect.isfunction):
        if name.startswith("_") or name == "extra_repr" or method.__qualname__.split(".")[0] != "LowRankCRF":
            continue
        positional = [p.name for p in inspect.signature(method).parameters.values() if p.kind != p.KEYWORD_ONLY]
        tensors = {"self", "emissions", "targets", "tokens", "lengths", "other", "other_emissions"}
        assert set(positional) <= tensors, name


@pytest.mark.parametrize("value", BAD_COUNTS, ids=repr)
def test_counts(value):
    crf, emissions, _, _ = small()
    published = StochasticViterbiSamples(50, 16, 8)

    def fails(name, call):
        with pytest.raises(ValueError, match=f"{name} is .*, must be an integer of at least 1"):
            call()

    fails("n", lambda: crf.kbest(emissions, n=value))
    fails("num_samples", lambda: crf.sample(emissions, num_samples=value))
    for name in ("num_embeddings", "low_rank", "beam_size"):
        fails(name, lambda name=name: LowRankCRF(**{"num_embeddings": 9} | {name: value}))
    for name in ("num_embedding", "low_rank", "beam_size"):
        fails(name, lambda name=name: StochasticViterbiSample(**{"num_embedding": 9} | {name: value}))
    if value is not None:  # which means the beam of the model
        fails("beam_size", lambda: crf.viterbi(emissions, beam_size=value))
        fails("beam", lambda: published(emissions, beam=value))
    published.num_samples = value
    fails("num_samples", lambda: published(emissions))


@pytest.mark.parametrize("impl", IMPLS)
def test_errors_call_things_by_the_callers_names(impl):
    crf, emissions, targets, lengths = small(impl)
    for call, message in (
        (lambda: crf.nll(emissions, targets - 60, lengths), r"targets\[0, 0\] is -\d+, must be in 0..49"),
        (lambda: crf(emissions, targets + 50, lengths), r"targets\[0, 0\] is \d+, must be in 0..49"),
        (lambda: crf.log_prob(emissions, targets + 50), r"tokens\[0, 0\] is \d+, must be in 0..49"),
        (lambda: crf.log_prob(emissions, targets[..., None] + 50), r"tokens\[0, 0, 0\] is \d+, must be in 0..49"),
        (lambda: crf.beam(emissions, include=targets + 50), r"include\[0, 0\] is \d+, must be in 0..49"),
        (lambda: crf(emissions, lengths), r"targets is torch.int64 \(3,\), must be integers of shape \(3, 7\)"),
        (
            lambda: crf.log_prob(emissions, targets[..., None].expand(-1, -1, 9)),
            "tokens holds 9 tokens a position, must be at most the 8 of a beam",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    inside = targets.clone()
    inside[1, 3:], inside[2] = 99, -5  # beyond the lengths
    assert torch.equal(crf.nll(emissions, inside, lengths), crf.nll(emissions, targets, lengths))


def test_tables_that_are_not_finite():
    """Never looked at: probabilities are NaN."""
    for impl in ("auto", "torch"):
        for value in (float("nan"), float("inf"), -float("inf")):
            crf, emissions, targets, _ = small(impl)
            with torch.no_grad():
                crf.E1.weight[crf.beam(emissions[:1]).tokens[0, 2], 1] = value
            for result in (
                crf.log_partition(emissions),
                crf.nll(emissions, targets, reduction="none"),
                crf.entropy(emissions),
            ):
                assert torch.isnan(result[0]), (impl, value)


# ---- as a module -----------------------------------------------------------------------------------------------------


def test_forward():
    crf, emissions, targets, lengths = small()
    assert isinstance(crf(emissions), ViterbiPath)
    assert torch.equal(crf(emissions, lengths=lengths).tokens, crf.viterbi(emissions, lengths).tokens)
    assert torch.equal(crf(emissions, beam_size=3).tokens, crf.viterbi(emissions, beam_size=3).tokens)
    assert torch.equal(crf(emissions, targets, lengths), crf.nll(emissions, targets, lengths))
    every = crf(emissions, targets, lengths, reduction="none", beam_size=3)
    assert torch.equal(every, crf.nll(emissions, targets, lengths, reduction="none", beam_size=3))
    result = crf.log_prob(emissions, targets, lengths)
    assert isinstance(result, LogProb)
    assert torch.equal(-result.log_prob.mean(), crf(emissions, targets, lengths))


def test_the_end_of_a_sequential():
    crf, _, _, _ = small()
    head = nn.Linear(6, 50)
    model, states = nn.Sequential(head, crf), torch.randn(3, 7, 6)
    path = model(states)
    assert torch.equal(path.tokens, crf.viterbi(head(states)).tokens)
    path.score.sum().backward()
    assert head.weight.grad.abs().sum() > 0


def test_two_processes_train_one_model(tmp_path):
    """Each has half of a batch; DistributedDataParallel averages what `forward` gives, and nothing else would be."""
    torch.manual_seed(0)
    head, crf = nn.Linear(6, 50), cases.build(50, 4, 8, "auto").requires_grad_()
    states, targets, lengths = torch.randn(4, 7, 6), torch.randint(50, (4, 7)), torch.tensor([7, 3, 5, 7])
    crf(head(states), targets, lengths).backward()
    expected = [p.grad for p in (*head.parameters(), *crf.parameters())]
    code = """
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    class Tagger(nn.Module):
        def __init__(self, head, crf):
            super().__init__()
            self.head, self.crf = head, crf

        def forward(self, states, targets, lengths):
            return self.crf(self.head(states), targets, lengths)

    head, crf, states, targets, lengths = argument
    own = slice(2 * rank, 2 * rank + 2)
    model = DistributedDataParallel(Tagger(head, crf))
    model(states[own], targets[own], lengths[own]).backward()
    result = [p.grad.clone() for p in (*head.parameters(), *crf.parameters())]
    crf.zero_grad()
    alone = DistributedDataParallel(crf)
    alone(head(states[own]).detach(), targets[own], lengths[own]).backward()
    result += [p.grad for p in crf.parameters()]
    """
    head.zero_grad()
    crf.zero_grad()
    for result in run_two(tmp_path, code, (head, crf, states, targets, lengths)):
        for actual, wanted in zip(result, expected + expected[2:], strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


# ---- compiled --------------------------------------------------------------------------------------------------------

METHODS = {
    "nll": lambda crf, e, t, n: crf.nll(e, t, n),
    "log_partition": lambda crf, e, t, n: crf.log_partition(e, n),
    "viterbi": lambda crf, e, t, n: crf.viterbi(e, n).score,
    "marginals": lambda crf, e, t, n: crf.marginals(e, n).probs,
    "frozen": lambda crf, e, t, n: crf.log_prob(e, t, n, beam_tokens=crf.beam(e, n, include=t).tokens).log_prob,
    "kbest": lambda crf, e, t, n: crf.kbest(e, n, n=3).position_scores,
    "entropy": lambda crf, e, t, n: crf.entropy(e, n),
}
REST = ("kbest", "frozen", "entropy")


@pytest.mark.parametrize(
    ("impl", "dynamic"),
    [
        pytest.param("torch", False, id="torch-static"),
        pytest.param("cpu", True, id="cpu-dynamic", marks=needs_extension),
        pytest.param("torch", True, id="torch-dynamic", marks=pytest.mark.full),
        pytest.param("cpu", False, id="cpu-static", marks=[needs_extension, pytest.mark.full]),
    ],
)
@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.full if m in REST else ()) for m in METHODS])
def test_compiled_whole(impl, method, dynamic):
    """The same numbers and gradients from one graph; what is wrong with a value is said when it runs."""
    crf, emissions, targets, lengths = small(impl)

    def call(emissions, targets, lengths):
        return METHODS[method](crf, emissions, targets, lengths)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (7, 5):
        own = emissions[:, :size].clone().requires_grad_()
        given = targets[:, :size], lengths.clamp(max=size)
        expected, actual = call(own, *given), compiled(own, *given)
        torch.testing.assert_close(actual, expected)
        if expected.requires_grad:
            torch.testing.assert_close(*(torch.autograd.grad(x.sum(), own)[0] for x in (actual, expected)))
    bad = {
        "lengths": lengths.clone(),
        "NaN": emissions.clone(),
        "banned": emissions.clone(),
        "targets": targets.clone(),
    }
    bad["lengths"][1], bad["NaN"][0, 3, 2] = 8, float("nan")
    bad["banned"][0, 3], bad["targets"][1, 2] = -float("inf"), 50
    wrong = [
        ((emissions, targets, bad["lengths"]), r"lengths\[1\] is 8, must be in 0..7"),
        ((bad["NaN"], targets, lengths), r"emissions\[0, 3\] holds NaN"),
        ((bad["banned"], targets, lengths), r"emissions\[0, 3\] bans every token"),
    ]
    if method in ("nll", "frozen"):
        wrong.append(((emissions, bad["targets"], lengths), r"(targets|include)\[1, 2\] is 50, must be in 0..49"))
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            compiled(*arguments)


def test_compiled_by_inductor():
    crf, emissions, targets, lengths = small("auto")
    torch._dynamo.reset()
    compiled = torch.compile(crf, fullgraph=True)
    torch.testing.assert_close(compiled(emissions, targets, lengths), crf(emissions, targets, lengths))
    with pytest.raises(ValueError, match=r"lengths\[0\] is 9"):
        compiled(emissions, targets, lengths + 2)


# ---- autocast --------------------------------------------------------------------------------------------------------


def everything(impl, dtype, autocast, inside):
    """Every public method's numbers and gradients; the backward pass `inside` of autocast or behind it."""
    torch.manual_seed(1)
    crf, other = (cases.build(50, 16, 8, impl, dtype=dtype, seed=seed).requires_grad_() for seed in (1, 2))
    published = StochasticViterbiSamples(50, 16, 8, num_samples=3).to(dtype)
    published.impl = impl
    published.load_state_dict(crf.state_dict())
    emissions, targets = torch.randn(3, 7, 50, dtype=dtype), torch.randint(50, (3, 7))
    lengths = torch.tensor([7, 3, 0])

    def seeded():
        return torch.Generator().manual_seed(3)

    methods = {
        "nll": lambda e: crf.nll(e, targets, lengths),
        "forward": lambda e: crf(e, targets, lengths),
        "path": lambda e: crf(e, lengths=lengths).score,
        "log_partition": lambda e: crf.log_partition(e, lengths, temperature=0.7),
        "entropy": lambda e: crf.entropy(e, lengths),
        "kl": lambda e: crf.kl(other, e, e.flip(0), lengths=lengths),
        "viterbi": lambda e: crf.viterbi(e, lengths).position_scores,
        "kbest": lambda e: crf.kbest(e, lengths, n=5).position_scores,
        "log_prob": lambda e: crf.log_prob(e, targets, lengths).token_log_probs,
        "sample": lambda e: crf.sample(e, lengths, num_samples=4, generator=seeded()).token_log_probs,
        "noisy": lambda e: crf.sample(e, lengths, generator=seeded(), mode="stochastic_viterbi").log_prob,
        "published": lambda e: published(e, generator=seeded())[0] ** 2,
        "beam": lambda e: crf.beam(e, lengths).emissions,
    }
    results = {}
    for name, method in methods.items():
        own = emissions.clone().requires_grad_()
        models = (crf, other, published)
        for model in models:
            model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = method(own)
            if inside:
                value.sum().backward()
        if not inside:
            value.sum().backward()
        grads = [p.grad for model in models for p in model.parameters() if p.grad is not None]
        results[name] = [value.detach(), own.grad, *grads]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results["marginals"] = [crf.marginals(emissions, lengths).probs]
    return results


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("torch", torch.float32), ("torch", torch.float64), pytest.param("cpu", torch.float32, marks=needs_extension)],
    ids=str,
)
@pytest.mark.parametrize("inside", [False, True], ids=["backward behind", "backward inside"])
def test_autocast_changes_nothing(impl, dtype, inside):
    expected = everything(impl, dtype, False, False)
    for name, tensors in everything(impl, dtype, True, inside).items():
        for actual, wanted in zip(tensors, expected[name], strict=True):
            assert actual.dtype == wanted.dtype, name
            assert torch.equal(actual, wanted), name


def test_products_are_differentiable_in_every_way():
    from simctg_fast.ops.crf_common import product

    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 3, 4), (2, 4, 5))]
    assert torch.autograd.gradcheck(product, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(product, inputs)
    a, b = (x.detach() for x in inputs)
    many = torch.func.vmap(torch.func.grad(lambda a: product(a, b).sin().sum()))(a.expand(3, -1, -1, -1))
    torch.testing.assert_close(many[1], torch.func.grad(lambda a: (a @ b).sin().sum())(a))


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_masks_with_padding_on_either_side(impl):
    """Every run of positions of every item gives what the cut-out item gives on its own."""
    crf = cases.build(9, 3, 4, impl)
    other = cases.build(9, 3, 4, impl, seed=5)
    runs = [(start, length) for length in range(5) for start in range(5 - length if length else 1)]
    emissions = torch.full((len(runs), 4, 9), float("nan"))
    targets = torch.full((len(runs), 4), -100)
    mask = torch.zeros(len(runs), 4, dtype=torch.bool)
    for b, (start, length) in enumerate(runs):
        own = slice(start, start + length)
        mask[b, own] = True
        emissions[b, own] = torch.randn(length, 9)
        targets[b, own] = torch.randint(9, (length,))
    uniforms = torch.rand(len(runs), 4, 3)
    values = emissions.clone().requires_grad_()

    def everything(emissions, targets, uniforms, **span):
        best, several = crf.viterbi(emissions, **span), crf.kbest(emissions, n=3, **span)
        drawn = crf.sample(emissions, num_samples=3, uniforms=uniforms, **span)
        frozen = crf.log_prob(emissions, drawn.tokens, beam_tokens=drawn.beam_tokens, slots=drawn.slots, **span)
        scored = crf.log_prob(emissions, targets, **span)
        beam = crf.beam(emissions, include=targets, **span)
        along = {
            "tokens": (best.tokens, 0), "slots": (best.slots, -1), "scores": (best.position_scores, 0),
            "several": (several.tokens, 0), "several slots": (several.slots, -1), "drawn": (drawn.tokens, 0),
            "drawn slots": (drawn.slots, -1), "drawn log p": (drawn.token_log_probs, 0),
            "frozen": (frozen.token_log_probs, 0), "scored": (scored.token_log_probs, 0),
            "marginals": (crf.marginals(emissions, **span).probs, 0), "beam": (beam.emissions, 0),
        }  # fmt: skip
        whole = {
            "nll": crf.nll(emissions, targets, reduction="none", **span), "log Z": crf.log_partition(emissions, **span),
            "entropy": crf.entropy(emissions, **span), "kl": crf.kl(other, emissions, **span),
            "score": best.score, "called": crf(emissions, targets, reduction="sum", **span).view(1),
        }  # fmt: skip
        return along, whole

    along, whole = everything(values, targets, uniforms, mask=mask)
    (gradient,) = torch.autograd.grad(whole["nll"].sum() + whole["log Z"].sum(), values)
    total = 0.0
    for b, (start, length) in enumerate(runs):
        assert (gradient[b][~mask[b]] == 0).all()
        if length == 0:
            assert all(float(value[b]) == 0 for name, value in whole.items() if name != "called")
            continue
        own = slice(start, start + length)
        alone = emissions[b : b + 1, own].clone().requires_grad_()
        parts, sums = everything(alone, targets[b : b + 1, own], uniforms[b : b + 1, :length])
        for name, (value, fill) in along.items():
            torch.testing.assert_close(value[b, own], parts[name][0][0], rtol=1e-5, atol=1e-5)
            assert (value[b][~mask[b]] == fill).all(), name
        for name in whole.keys() - {"called"}:
            torch.testing.assert_close(whole[name][b], sums[name][0], rtol=1e-5, atol=1e-5)
        (expected,) = torch.autograd.grad(sums["nll"] + sums["log Z"], alone)
        torch.testing.assert_close(gradient[b, own], expected[0], rtol=1e-4, atol=1e-5)
        total += float(sums["called"].detach())
    assert float(whole["called"].detach()) == pytest.approx(total, rel=1e-5)
    per_token = crf.nll(emissions, targets, mask=mask, reduction="token_mean")
    torch.testing.assert_close(per_token, whole["called"][0] / mask.sum())


@pytest.mark.parametrize("impl", IMPLS)
def test_errors_name_the_callers_positions(impl):
    crf = cases.build(9, 3, 4, impl)
    emissions, mask = torch.randn(2, 4, 9), torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    bad = emissions.clone()
    bad[1, 2] = float("-inf")
    with pytest.raises(ValueError, match=r"emissions\[1, 2\] bans every token of the beam"):
        crf.viterbi(bad, mask=mask)
    targets = torch.zeros(2, 4, dtype=torch.int64)
    targets[1, 3] = 9
    with pytest.raises(ValueError, match=r"targets\[1, 3\] is 9, must be in 0..8"):
        crf.nll(emissions, targets, mask=mask)
    beam = crf.beam(emissions, mask=mask).tokens
    outside = next(v for v in range(9) if v not in beam[1, 3])
    targets = beam[..., 0].clone()
    targets[1, 3] = outside
    with pytest.raises(ValueError, match=rf"tokens\[1, 3, 0\] is {outside}, which is not in beam_tokens\[1, 3\]"):
        crf.log_prob(emissions, targets, mask=mask, beam_tokens=beam)
    with pytest.raises(ValueError, match="lengths and mask are both given"):
        crf.viterbi(emissions, torch.tensor([2, 3]), mask=mask)
