"""`LinearChainCRF` against all paths in float64: forbidden moves everywhere, every length, masks with padding on either
side, gradients, compiled graphs, modules around it, and pytorch-crf's class."""

from __future__ import annotations

import itertools

import pytest
import torch

from simctg_fast import LinearChainCRF, LowRankCRF
from simctg_fast.crf import CRF
from simctg_fast.crf.constraints import bio
from simctg_fast.ops import _backends
from simctg_fast.ops.crf_dense import dense_filter
from simctg_fast.reference import crf as reference

from .. import tagger_cases as cases
from ..crf_cases import p_value
from ..two_processes import run_two

NEVER = float("-inf")
needs_extension = pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")
IMPLS = ("torch", pytest.param("cpu", marks=needs_extension))
BACKENDS = [
    pytest.param("torch", torch.float32, 2e-5, id="torch"),
    pytest.param("cpu", torch.float32, 2e-5, id="cpu", marks=needs_extension),
    pytest.param("torch", torch.float64, 1e-12, id="float64"),
]


def tagger(seed: int, impl: str, dtype=torch.float32, *, tags: int = 3, banned: bool = True, scale: float = 1.0):
    """A CRF with about a quarter of its moves forbidden, and which of them."""
    generator = torch.Generator().manual_seed(seed)
    crf = LinearChainCRF(tags, impl=impl).to(dtype)
    with torch.no_grad():
        for parameter in crf.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=dtype))
            if banned:
                parameter[torch.rand(parameter.shape, generator=generator) < 0.25] = NEVER
    return crf, generator


def solvable(seed: int, impl: str, dtype=torch.float32, length: int = 4, **options):
    """The first CRF and emissions `(1, length, K)` from `seed` on that leave a path."""
    for attempt in itertools.count(1000 * seed):
        crf, generator = tagger(attempt, impl, dtype, **options)
        emissions = torch.randn(1, length, crf.num_tags, generator=generator, dtype=dtype)
        if options.get("banned", True):
            emissions[torch.rand(emissions.shape, generator=generator) < 0.15] = NEVER
        try:
            cases.law(crf, emissions[0].detach())
        except AssertionError:
            continue
        return crf, emissions


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected.detach().double(), rtol=tolerance, atol=tolerance)


# ---- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("impl", "dtype", "tolerance"), BACKENDS)
@pytest.mark.parametrize("banned", [False, True], ids=["free", "banned"])
@pytest.mark.parametrize("scale", [1.0, 15.0])
def test_against_every_path(impl, dtype, tolerance, banned, scale):
    tolerance *= scale
    for seed in range(6):
        length = 1 + seed % 4
        crf, emissions = solvable(seed, impl, dtype, length, banned=banned, scale=scale)
        crf.requires_grad_(False)
        for temperature in (1.0, 0.5, 3.0):
            law = cases.law(crf, emissions[0], temperature)
            close(crf.log_partition(emissions, temperature=temperature)[0], law.log_partition, tolerance)
            close(crf.marginals(emissions, temperature=temperature)[0], law.unary_marginals(3), tolerance)
            close(crf.entropy(emissions, temperature=temperature)[0], law.entropy(), tolerance)
            scored = crf.log_prob(emissions, law.slots.T[None], temperature=temperature)
            close(scored.log_prob[0], law.log_probs, tolerance)
            for n in range(0, len(law.slots), 5):
                path = law.slots[n].tolist()
                expected = torch.stack([law.given_next(path, t) for t in range(length)])
                close(scored.token_log_probs[0, :, n], expected, tolerance)
        law = cases.law(crf, emissions[0])
        best = crf.viterbi(emissions)
        close(best.score[0], law.scores[0], tolerance)
        close(best.position_scores.sum(), law.scores[0], tolerance)
        assert best.tags[0].tolist() == law.slots[0].tolist()
        several = crf.kbest(emissions, n=7)
        live = min(7, len(law.slots))
        close(several.score[0, :live], law.scores[:live], tolerance)
        assert several.tags[0, :, :live].T.tolist() == law.slots[:live].tolist()
        assert (several.score[0, live:] == NEVER).all()
        assert (several.tags[0, :, live:] == -1).all()
        close(crf.nll(emissions, law.slots[-1:]), -law.log_probs[-1], tolerance)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_issue_of_a_forbidden_start(impl):
    crf = LinearChainCRF(2, impl=impl).requires_grad_(False)
    crf.transitions.zero_(), crf.end_transitions.zero_(), crf.start_transitions.copy_(torch.tensor([0.0, NEVER]))
    emissions = torch.tensor([[[1.0, 0.0], [0.0, 5.0]]])
    best = crf.viterbi(emissions)
    assert best.tags.tolist() == [[0, 1]]
    assert float(best.score) == 6.0
    assert float(crf.log_partition(emissions)) == pytest.approx(6.0067, abs=1e-4)
    assert float(crf.nll(emissions, best.tags)) == pytest.approx(0.0067, abs=1e-4)
    assert float(crf.nll(emissions, torch.tensor([[1, 1]]))) == float("inf")
    assert float(crf.log_prob(emissions, torch.tensor([[1, 1]])).log_prob) == NEVER


@pytest.mark.parametrize(("impl", "dtype", "tolerance"), BACKENDS)
def test_gradients_of_every_path(impl, dtype, tolerance):
    """Of a likelihood and log Z, to emissions and parameters: exact, 0 where a score is -inf, finite everywhere."""
    for seed in range(8):
        crf, emissions = solvable(seed, impl, dtype)
        values, exact = emissions.clone().requires_grad_(), emissions.double().requires_grad_()
        inputs = list(crf.parameters())
        law = cases.law(crf, exact[0])
        path = law.slots[len(law.slots) // 2]
        ours = crf.nll(values, path[None]) + 0.3 * crf.log_partition(values).sum() + crf.viterbi(values).score.sum()
        truth = -law.log_probs[len(law.slots) // 2] + 0.3 * law.log_partition + law.scores[0]
        close(ours, truth, 20 * tolerance)
        expected = torch.autograd.grad(truth, [exact, *inputs], allow_unused=True)
        for leaf, got, want in zip(
            [values, *inputs], torch.autograd.grad(ours, [values, *inputs]), expected, strict=True
        ):
            assert got.isfinite().all()
            assert (got[leaf == NEVER] == 0).all()
            close(got, torch.zeros_like(got) if want is None else want.nan_to_num(0.0), 20 * tolerance)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_forbidden_path_has_a_finite_gradient(impl):
    crf, emissions = solvable(3, impl)
    emissions = emissions.requires_grad_()
    loss = crf.nll(emissions, torch.zeros(1, 4, dtype=torch.int64), reduction="sum")
    loss = loss + crf.log_prob(emissions, torch.arange(4)[None] % 3).token_log_probs.sum()
    for gradient in torch.autograd.grad(loss, [emissions, *crf.parameters()]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gap", [20.0, 85.0, 95.0, 300.0])
def test_only_an_unlikely_state_may_go_on(impl, gap):
    """What underflows beside the best state is all that later positions can come from."""
    crf = LinearChainCRF(3, impl=impl)
    with torch.no_grad():
        crf.transitions.zero_()
        crf.transitions[0] = -20.0
        crf.transitions[0, 1:] = NEVER
        crf.transitions[2, 1] = NEVER
    emissions = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    emissions[0, 1, 0] += gap
    emissions[0, 4, 0] = NEVER
    values = emissions.clone().requires_grad_()
    expected = emissions.double().requires_grad_()
    laws = [cases.law(crf, item) for item in expected]
    expected_sums = torch.stack([x.log_partition for x in laws])
    torch.testing.assert_close(crf.log_partition(values).double(), expected_sums, rtol=1e-6, atol=2e-7 * gap)
    ours = torch.autograd.grad(crf.log_partition(values).sum(), [values, crf.transitions])
    truth = torch.autograd.grad(expected_sums.sum(), [expected, crf.transitions])
    for got, want in zip(ours, truth, strict=True):
        torch.testing.assert_close(got.double(), want.nan_to_num(0.0).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("span", [1.0, 45.0, 200.0])
@pytest.mark.parametrize("tags", [1, 5, 40])
def test_many_tags(impl, span, tags):
    """Against the recursion in float64; spans on either side of what a step in exponentials can hold."""
    crf, generator = tagger(tags, impl, tags=tags, banned=False)
    crf.requires_grad_(False).transitions.clamp_(-1, 1).mul_(span / 2)
    emissions, lengths = torch.randn(9, 6, tags, generator=generator), torch.tensor([6, 5, 4, 3, 2, 1, 0, 6, 6])
    emissions[3, 3:] = float("nan")  # padding is not looked at
    emissions[2] *= 60
    scores = emissions.double()
    scores[:, 0] += crf.start_transitions.double()
    for b, length in enumerate(lengths.tolist()):
        scores[b, max(0, length - 1)] += crf.end_transitions.double()
    expected = reference.dense_log_partition(scores, crf.transitions.double(), lengths)
    torch.testing.assert_close(crf.log_partition(emissions, lengths).double(), expected, rtol=2e-6, atol=2e-5)
    best = crf.viterbi(emissions, lengths)
    assert torch.equal(best.tags, reference.dense_viterbi(scores, crf.transitions.double(), lengths))
    assert (crf.nll(emissions, best.tags, lengths, reduction="none") >= -1e-4).all()


def test_every_instruction_set(isa):
    for banned, scale in ((False, 1.0), (True, 15.0)):
        test_against_every_path("cpu", torch.float32, 2e-5, banned, scale)
    test_gradients_of_every_path("cpu", torch.float32, 2e-5)
    for gap in (20.0, 95.0):
        test_only_an_unlikely_state_may_go_on("cpu", gap)
    for tags, span in ((5, 45.0), (40, 1.0), (40, 200.0)):
        test_many_tags("cpu", span, tags)


@needs_extension
def test_threads_and_batch_mates_change_nothing():
    crf, generator = tagger(1, "cpu", tags=20)
    emissions = torch.randn(11, 7, 20, generator=generator)
    lengths = torch.tensor([7, 1, 3, 7, 0, 2, 7, 6, 5, 7, 7])
    grad = torch.randn(11, 7, 20, generator=generator)

    def run(threads):
        torch.set_num_threads(threads)
        values = emissions.clone().requires_grad_()
        _, messages, _ = dense_filter(values, crf.transitions, lengths)
        return messages.detach(), *torch.autograd.grad(messages, (values, crf.transitions), grad)

    threads = torch.get_num_threads()
    try:
        first = run(1)
        for several in (2, 3):
            for a, b in zip(run(several), first, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)
    for b in (0, 3, 7):
        alone = dense_filter(emissions[b : b + 1], crf.transitions.detach(), lengths[b : b + 1])
        assert torch.equal(alone[1][0], first[0][b])


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_samples_follow_the_law(impl):
    crf, emissions = solvable(2, impl)
    crf.requires_grad_(False)
    for temperature in (1.0, 0.5):
        law = cases.law(crf, emissions[0], temperature)
        generator = torch.Generator().manual_seed(0)
        drawn = crf.sample(emissions, num_samples=20_000, temperature=temperature, generator=generator)
        weights = 3 ** torch.arange(3, -1, -1)
        codes = (drawn.tags[0] * weights[:, None]).sum(0)
        probabilities = torch.zeros(81, dtype=torch.float64)
        probabilities[(law.slots * weights).sum(1)] = law.log_probs.exp()
        assert p_value(torch.bincount(codes, minlength=81), probabilities) > 1e-6
        close(drawn.log_prob[0].exp(), probabilities[codes], 1e-5)
    uniforms = torch.rand(1, 4, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        crf.sample(emissions, num_samples=3, uniforms=uniforms).tags,
        crf.sample(emissions, num_samples=3, uniforms=uniforms.double()).tags,
    )


# ---- divergence ------------------------------------------------------------------------------------------------------


def test_divergence():
    crf, emissions = solvable(4, "torch", torch.float64)
    other, _ = tagger(9, "torch", torch.float64, banned=False)
    others = torch.randn(1, 4, 3, dtype=torch.float64)
    ours, theirs = cases.law(crf, emissions[0]), cases.law(other, others[0])
    rows = [theirs.slots.tolist().index(path) for path in ours.slots.tolist()]
    expected = (ours.log_probs.exp() * (ours.log_probs - theirs.log_probs[rows])).sum()
    close(crf.kl(other, emissions, others)[0], expected, 1e-12)
    assert float(crf.kl(crf, emissions)) == pytest.approx(0, abs=1e-12)
    assert float(other.kl(crf, others, emissions)) == float("inf")
    values = emissions.clone().requires_grad_()
    for gradient in torch.autograd.grad(crf.entropy(values).sum() + crf.kl(other, values, others).sum(),
                                        [values, *crf.parameters()]):  # fmt: skip
        assert gradient.isfinite().all()


def test_divergence_has_a_gradient_where_only_impossible_prefixes_are_forbidden():
    """What q forbids and p allows, but behind or before what p forbids itself, adds nothing."""
    rules = bio(["O", "B-X", "I-X"])
    p, q = LinearChainCRF(3, impl="torch").double(), LinearChainCRF(3, impl="torch", **rules).double()
    emissions = torch.randn(2, 4, 3, dtype=torch.float64)
    emissions[0, :, 2] = NEVER
    emissions[1, 2:, 2] = NEVER
    with torch.no_grad():
        p.transitions[1, 2], p.start_transitions[2] = NEVER, NEVER
        p.transitions[0, 2] = NEVER
    values = emissions.clone().requires_grad_()
    ours = p.kl(q, values)
    gradients = torch.autograd.grad(ours.sum(), [values, *p.parameters(), *q.parameters()])
    exact = emissions.clone().requires_grad_()
    truth = []
    for item in exact:
        one, two = cases.law(p, item), cases.law(q, item)
        rows = [two.slots.tolist().index(path) for path in one.slots.tolist()]
        truth.append((one.log_probs.exp() * (one.log_probs - two.log_probs[rows])).sum())
    close(ours, torch.stack(truth), 1e-12)
    expected = torch.autograd.grad(sum(truth), [exact, *p.parameters(), *q.parameters()], allow_unused=True)
    for got, want in zip(gradients, expected, strict=True):
        assert got.isfinite().all()
        close(got, want.nan_to_num(0.0), 1e-10)


def test_divergence_between_layouts():
    p, q = LinearChainCRF(3), CRF(3)
    emissions, lengths = torch.randn(4, 4, 3), torch.tensor([4, 2, 3, 1])
    same = LinearChainCRF(3)
    same.load_state_dict(q.state_dict())
    others = torch.randn(4, 4, 3)
    torch.testing.assert_close(
        p.kl(q, emissions, others, lengths=lengths), p.kl(same, emissions, others, lengths=lengths)
    )


# ---- partial labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("impl", "dtype", "tolerance"), BACKENDS)
def test_partial_labels(impl, dtype, tolerance):
    for seed in range(5):
        crf, emissions = solvable(seed, impl, dtype)
        exact = emissions.double().requires_grad_()
        law = cases.law(crf, exact[0])
        allowed = torch.rand(1, 4, 3, generator=torch.Generator().manual_seed(seed)) < 0.5
        allowed[0, torch.arange(4), law.slots[0]] = True
        inside = allowed[0, torch.arange(4), law.slots].all(1)
        truth = law.log_partition - torch.logsumexp(law.scores[inside], 0)
        values = emissions.clone().requires_grad_()
        ours = crf.partial_nll(values, allowed)
        close(ours, truth, 5 * tolerance)
        inputs = [values, *crf.parameters()]
        expected = torch.autograd.grad(truth, [exact, *inputs[1:]], allow_unused=True)
        for got, want in zip(torch.autograd.grad(ours, inputs), expected, strict=True):
            close(got, torch.zeros_like(got) if want is None else want.nan_to_num(0.0), 20 * tolerance)
        path = torch.nn.functional.one_hot(law.slots[:1], 3).bool()
        close(crf.partial_nll(emissions, path), crf.nll(emissions, law.slots[:1]), 5 * tolerance)
        everything = torch.ones(1, 4, 3, dtype=torch.bool)
        assert float(crf.partial_nll(emissions, everything)) == pytest.approx(0, abs=tolerance)


# ---- masks and layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_masks(impl, batch_first):
    """Every run of positions of every item gives what the cut-out item gives on its own."""
    crf, generator = tagger(5, impl, tags=4, banned=False)
    turned = LinearChainCRF(4, batch_first=batch_first, impl=impl)
    turned.load_state_dict(crf.state_dict())
    runs = [(start, length) for length in range(6) for start in range(6 - length if length else 1)]
    emissions = torch.full((len(runs), 5, 4), float("nan"))
    mask = torch.zeros(len(runs), 5)
    allowed = torch.zeros(len(runs), 5, 4, dtype=torch.bool)
    tags = torch.full((len(runs), 5), -100)
    for b, (start, length) in enumerate(runs):
        own = slice(start, start + length)
        mask[b, own] = 1
        emissions[b, own] = torch.randn(length, 4, generator=generator)
        tags[b, own] = torch.randint(4, (length,), generator=generator)
        allowed[b, own] = torch.rand(length, 4, generator=generator) < 0.5
        allowed[b, range(start, start + length), tags[b, own]] = True

    def turn(x):
        return x if batch_first else x.transpose(0, 1)

    uniforms = torch.rand(len(runs), 5, 3, generator=generator)
    given, masks = turn(emissions), turn(mask)
    best, several = turned.viterbi(given, mask=masks), turned.kbest(given, n=2, mask=masks)
    drawn = turned.sample(given, num_samples=3, mask=masks, uniforms=uniforms)
    scored = turned.log_prob(given, turn(tags), mask=masks)
    per_item = {
        "log_partition": turned.log_partition(given, mask=masks),
        "entropy": turned.entropy(given, mask=masks),
        "nll": turned.nll(given, turn(tags), mask=masks, reduction="none"),
        "partial_nll": turned.partial_nll(given, turn(allowed), mask=masks, reduction="none"),
    }
    marginals = turn(turned.marginals(given, mask=masks))
    for b, (start, length) in enumerate(runs):
        if length == 0:
            assert all(float(value[b]) == 0 for value in per_item.values())
            assert (turn(best.tags)[b] == -1).all()
            continue
        own = slice(start, start + length)
        alone = emissions[b : b + 1, own]
        path = tags[b : b + 1, own]
        expected = {
            "log_partition": crf.log_partition(alone),
            "entropy": crf.entropy(alone),
            "nll": crf.nll(alone, path),
            "partial_nll": crf.partial_nll(alone, allowed[b : b + 1, own]),
        }
        for name, value in expected.items():
            torch.testing.assert_close(per_item[name][b], value.squeeze(), rtol=1e-5, atol=1e-5)
        rest = mask[b] == 0
        for whole, part, fill in (
            (turn(best.tags)[b], crf.viterbi(alone).tags[0], -1),
            (turn(best.position_scores)[b], crf.viterbi(alone).position_scores[0], 0),
            (turn(several.tags)[b], crf.kbest(alone, n=2).tags[0], -1),
            (turn(scored.token_log_probs)[b], crf.log_prob(alone, path).token_log_probs[0], 0),
            (marginals[b], crf.marginals(alone)[0], 0),
            (turn(drawn.tags)[b],
             crf.sample(alone, num_samples=3, uniforms=uniforms[b : b + 1, :length]).tags[0], -1),
        ):  # fmt: skip
            torch.testing.assert_close(whole[own], part, rtol=1e-5, atol=1e-5)
            assert (whole[rest] == fill).all()
    lengths = torch.tensor([3, 5, 1])
    prefix = torch.arange(5) < lengths[:, None]
    some = torch.randn(3, 5, 4, generator=generator)
    for of in (prefix, prefix.int(), prefix.double()):
        assert torch.equal(crf.log_partition(some, mask=of), crf.log_partition(some, lengths))
    per_token = crf.nll(some, tags[:3].clamp(min=0), lengths, reduction="token_mean")
    torch.testing.assert_close(per_token, crf.nll(some, tags[:3].clamp(min=0), lengths, reduction="sum") / 9)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_errors_name_what_is_wrong(impl):
    crf = LinearChainCRF(3, impl=impl)
    emissions, tags = torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64)

    def refuses(pattern, error=ValueError, method="nll", *arguments, **options):
        with pytest.raises(error, match=pattern):
            getattr(crf, method)(*(arguments or (emissions, tags)), **options)

    refuses(r"tags is torch.int64 \(2, 4, 1\), must be integers of shape \(2, 4\)", ValueError, "nll",
            emissions, tags[..., None])  # fmt: skip
    refuses(r"tags is torch.float32 \(2, 4\)", ValueError, "nll", emissions, tags.float())
    refuses(r"tags is list", TypeError, "nll", emissions, [[0]])
    refuses(r"tags\[1, 2\] is 3, must be in 0..2", ValueError, "nll", emissions, tags.index_put(
        (torch.tensor(1), torch.tensor(2)), torch.tensor(3)))  # fmt: skip
    refuses(r"lengths is int, must be a tensor", TypeError, "viterbi", emissions, 3)
    refuses(r"lengths\[1\] is 5, must be in 0..4", lengths=torch.tensor([4, 5]))
    refuses(r"lengths is torch.bool \(2, 4\).*mask= takes a mask", lengths=torch.ones(2, 4, dtype=torch.bool))
    refuses(r"lengths and mask are both given", lengths=torch.tensor([4, 4]), mask=torch.ones(2, 4))
    refuses(r"mask has a hole in item 1, at position 1", mask=torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]]))
    refuses(r"mask has shape \(2, 3\), must be \(2, 4\)", mask=torch.ones(2, 3))
    refuses(r"mask is list", TypeError, mask=[[1]])
    refuses(r"reduction is 'avg', must be one of 'mean', 'sum', 'none', 'token_mean'", reduction="avg")
    refuses(r"emissions has shape \(2, 3\), must be \(batch, length, 3\)", ValueError, "viterbi", emissions[0, :2])
    refuses(r"emissions has dtype torch.int64", ValueError, "viterbi", emissions.long())
    refuses(r"n is 0", ValueError, "kbest", emissions, n=0)
    refuses(r"num_samples is 2.5, must be an integer", ValueError, "sample", emissions, num_samples=2.5)
    refuses(r"temperature is 1e-320, must be positive and finite, at least 1e-20", ValueError, "entropy", emissions,
            temperature=1e-320)  # fmt: skip
    refuses(r"uniforms is torch.float32 \(2, 4\), must be floating point \(2, 4, 1\)", ValueError, "sample", emissions,
            uniforms=torch.rand(2, 4))  # fmt: skip
    refuses(r"allowed_tags\[0, 1\] allows nothing", ValueError, "partial_nll", emissions,
            torch.tensor([1, 0, 1, 1]).bool()[None, :, None].expand(2, 4, 3))  # fmt: skip
    refuses(r"allowed_tags is torch.float32", ValueError, "partial_nll", emissions, emissions)
    for value, problem in ((float("nan"), "holds NaN"), (float("inf"), r"holds \+inf")):
        bad = emissions.clone()
        bad[1, 2, 0] = value
        for method in ("viterbi", "log_partition", "marginals", "entropy", "kbest", "sample"):
            refuses(rf"emissions\[1, 2\] {problem}", ValueError, method, bad)
    left = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    bad[1, 2, 0] = float("nan")
    refuses(r"emissions\[1, 2\] holds NaN", ValueError, "viterbi", bad, mask=left)
    emissions[1, 3] = NEVER
    refuses(r"emissions\[1, 3\] bans every tag", ValueError, "viterbi", emissions)
    emissions[1, 3] = 0
    with torch.no_grad():
        crf.transitions[:, 1] = NEVER
    emissions[1, 3, [0, 2]] = NEVER
    for method in ("viterbi", "log_partition", "marginals", "entropy", "kbest", "sample"):
        refuses(r"item 1 has no allowed path", ValueError, method, emissions)
    with torch.no_grad():
        crf.end_transitions[2] = float("nan")
    refuses(r"end_transitions\[2\] is nan, must be finite or -inf")
    with torch.no_grad():
        crf.end_transitions[2], crf.transitions[2, 1] = 0.0, float("inf")
    emissions[:] = 0
    for method in ("viterbi", "log_partition", "marginals", "entropy", "kbest", "sample"):
        refuses(r"transitions\[2, 1\] is inf, must be finite or -inf", ValueError, method, emissions)
    with pytest.raises(ValueError, match="num_tags is 0, must be an integer of at least 1"):
        LinearChainCRF(0)
    with pytest.raises(ValueError, match=r"allowed_start is torch.bool \(2,\), must be a bool tensor of shape \(3,\)"):
        crf.constrain(allowed_start=torch.ones(2).bool())
    with pytest.raises(ValueError, match="allowed_transitions is list, must be a bool tensor"):
        LinearChainCRF(3, allowed_transitions=[[1]])
    with pytest.raises(TypeError, match="other is a LowRankCRF of no tags, must be a LinearChainCRF of 3"):
        crf.kl(LowRankCRF(3, 1, 2), emissions)


def test_errors_of_sequences_first_name_places_as_they_were_handed_over():
    crf = CRF(3)
    emissions, tags = torch.zeros(5, 2, 3), torch.zeros(5, 2, dtype=torch.int64)
    emissions[4, 1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"emissions\[4, 1\] holds NaN"):
        crf.decode(emissions)
    emissions[4, 1, 0], tags[4, 1] = 0.0, 7
    with pytest.raises(ValueError, match=r"tags\[4, 1\] is 7"):
        crf(emissions, tags)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 5\), must be \(5, 2\)"):
        crf.decode(emissions, torch.ones(2, 5))
    allowed = torch.ones(5, 2, 3, dtype=torch.bool)
    allowed[3, 1] = False
    with pytest.raises(ValueError, match=r"allowed_tags\[3, 1\] allows nothing"):
        crf.partial_nll(emissions, allowed)


def test_numbers_and_lengths_are_named():
    crf, emissions = LinearChainCRF(3), torch.zeros(2, 4, 3)
    with pytest.raises(TypeError, match=r"numbers are named: kbest\(emissions, n=3\)"):
        crf.kbest(emissions, 3)
    with pytest.raises(TypeError, match=r"numbers are named: sample\(emissions, num_samples=3\)"):
        crf.sample(emissions, 3)
    with pytest.raises(TypeError, match="generator is int"):
        crf.sample(emissions, generator=1)
    with pytest.raises(ValueError, match=r"n is 9223372036854775808, must be"):
        crf.kbest(emissions, n=2**63)
    for wrong, pattern in (
        (emissions[:1], r"other_emissions has shape \(1, 4, 3\), must be \(2, 4, 3\) as emissions has"),
        (torch.tensor([4, 2]), r"other_emissions has shape \(2,\).*lengths are named: lengths="),
    ):
        with pytest.raises(ValueError, match=pattern):
            crf.kl(LinearChainCRF(3), emissions, wrong)
    with pytest.raises(ValueError, match="allowed_tags is on meta"):
        crf.partial_nll(emissions, torch.ones(2, 4, 3, dtype=torch.bool, device="meta"))


def test_empty_batches():
    crf = LinearChainCRF(3)
    none, tags = torch.zeros(0, 4, 3, requires_grad=True), torch.zeros(0, 4, dtype=torch.int64)
    assert crf.viterbi(none).tags.shape == (0, 4)
    assert crf.marginals(none).shape == (0, 4, 3)
    for reduction in ("mean", "sum", "token_mean"):
        loss = crf.nll(none, tags, reduction=reduction)
        assert float(loss.detach()) == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, list(crf.parameters())))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(low):
    crf, generator = tagger(1, "auto", tags=5, banned=False)
    emissions = torch.randn(3, 6, 5, generator=generator).to(low)
    tags, lengths = torch.randint(5, (3, 6), generator=generator), torch.tensor([6, 4, 1])
    calls = {
        "nll": lambda e: crf.nll(e, tags, lengths),
        "log_partition": lambda e: crf.log_partition(e, lengths),
        "entropy": lambda e: crf.entropy(e, lengths),
        "marginals": lambda e: crf.marginals(e, lengths),
        "viterbi": lambda e: crf.viterbi(e, lengths).score,
        "kl": lambda e: crf.kl(crf, e, e.flip(0), lengths=lengths),
    }
    for impl in ("auto", "torch"):
        crf.impl = impl
        for call in calls.values():
            expected = call(emissions.float())
            assert expected.dtype == torch.float32
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(call(emissions), expected)


# ---- modules and graphs ----------------------------------------------------------------------------------------------


def test_sequential_and_forward():
    crf = LinearChainCRF(3)
    head = torch.nn.Sequential(torch.nn.Linear(5, 3), crf)
    states, tags = torch.randn(2, 4, 5), torch.randint(3, (2, 4))
    assert torch.equal(head(states).tags, crf.viterbi(head[0](states)).tags)
    emissions = head[0](states)
    assert torch.equal(crf(emissions, tags, reduction="sum"), crf.nll(emissions, tags, reduction="sum"))


def test_data_parallel_training(tmp_path):
    code = """
    from simctg_fast import LinearChainCRF
    torch.manual_seed(0)
    crf = LinearChainCRF(3)
    wrapped = torch.nn.parallel.DistributedDataParallel(crf)
    emissions, tags, lengths = (x[rank::2] for x in argument)
    wrapped(emissions, tags, lengths).backward()
    result = [p.grad for p in crf.parameters()]
    """
    argument = torch.randn(4, 5, 3), torch.randint(3, (4, 5)), torch.tensor([5, 2, 1, 4])
    both = run_two(tmp_path, code, argument)
    torch.manual_seed(0)
    crf = LinearChainCRF(3)
    crf(*argument).backward()
    for a, b, whole in zip(*both, [p.grad for p in crf.parameters()], strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, whole)


@pytest.mark.parametrize(
    ("impl", "dynamic"),
    [
        pytest.param("cpu", True, marks=needs_extension),
        pytest.param("torch", False, marks=pytest.mark.full),
        pytest.param("cpu", False, marks=[needs_extension, pytest.mark.full]),
        pytest.param("torch", True, marks=pytest.mark.full),
    ],
)
def test_compiles_without_a_break(impl, dynamic):
    crf = LinearChainCRF(4, impl=impl, **bio(["O", "B-x", "I-x", "B-y"]))
    torch._dynamo.reset()

    def step(emissions, tags, lengths, mask):
        loss = crf.nll(emissions, tags, lengths) + crf.partial_nll(emissions, emissions > -9.0, mask=mask)
        return loss + crf.log_partition(emissions, lengths).sum(), crf.viterbi(emissions, mask=mask).tags

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, length in ((3, 5), (2, 7)):
        emissions = torch.randn(batch, length, 4, requires_grad=True)
        lengths = torch.full((batch,), length - 1)
        tags = crf.viterbi(emissions, lengths).tags.clamp(min=0)
        mask = torch.arange(length) >= torch.arange(batch)[:, None]
        results = []
        for run in (step, compiled):
            loss, path = run(emissions, tags, lengths, mask)
            results.append((loss, path, *torch.autograd.grad(loss, [emissions, *crf.parameters()])))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    lengths[1] = length + 1
    with pytest.raises(ValueError, match=rf"lengths\[1\] is {length + 1}"):
        compiled(emissions, tags, lengths, mask)
    lengths[1] = length
    mask[1, 3] = False
    with pytest.raises(ValueError, match="mask has a hole in item 1, at position 3"):
        compiled(emissions, tags, lengths, mask)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    emissions, transitions = torch.randn(3, 4, 5, requires_grad=True), torch.randn(5, 5, requires_grad=True)
    lengths, ops, options = torch.tensor([4, 2, 0]), torch.ops.simctg_fast, {"impl": impl}
    for own in (emissions, emissions.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()):
        torch.library.opcheck(ops.dense_filter, (own, transitions, lengths), options)
        plain = own.detach(), transitions.detach(), lengths
        torch.library.opcheck(ops.dense_viterbi, plain, options)
        _, messages, norms = ops.dense_filter(*plain, impl=impl)
        torch.library.opcheck(ops.dense_filter_backward, (torch.randn(3, 4, 5), messages, norms, *plain), options)
    torch.library.opcheck(ops.crf_checked_scores, (emissions, None, "tag"))
    torch.library.opcheck(ops.crf_checked_lengths, (lengths, 4))
    torch.library.opcheck(ops.crf_span_of_mask, (torch.ones(2, 3),))


# ---- pytorch-crf -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_class_of_pytorch_crf(batch_first):
    """Its signature, its sign and its sums, against all paths."""
    crf = CRF(3, batch_first)
    assert {name: tuple(p.shape) for name, p in crf.named_parameters()} == {
        "start_transitions": (3,), "end_transitions": (3,), "transitions": (3, 3),
    }  # fmt: skip
    emissions, tags = torch.randn(2, 4, 3), torch.randint(3, (2, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.uint8)
    lengths = (4, 2)
    laws = [cases.law(crf, emissions[b, :n].detach()) for b, n in enumerate(lengths)]
    likelihoods = torch.stack([
        x.log_probs[x.slots.tolist().index(tags[b, :n].tolist())]
        for b, (n, x) in enumerate(zip(lengths, laws, strict=True))
    ])  # fmt: skip
    given = [x if batch_first else x.transpose(0, 1) for x in (emissions, tags, mask)]
    sums = {
        "none": likelihoods, "sum": likelihoods.sum(), "mean": likelihoods.mean(), "token_mean": likelihoods.sum() / 6,
    }  # fmt: skip
    for reduction, expected in sums.items():
        close(crf(*given, reduction=reduction), expected, 1e-5)
    close(crf(*given), sums["sum"], 1e-5)
    assert crf.decode(given[0], given[2]) == [x.slots[0].tolist() for x in laws]
    assert [len(path) for path in crf.decode(given[0])] == [4, 4]


@pytest.mark.parametrize("batch_first", [False, True])
def test_beside_pytorch_crf(batch_first):
    torchcrf = pytest.importorskip("torchcrf", reason="pytorch-crf is not installed")
    theirs, ours = torchcrf.CRF(5, batch_first), CRF(5, batch_first)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    shape = (3, 6) if batch_first else (6, 3)
    emissions, tags = torch.randn(*shape, 5), torch.randint(5, shape)
    mask = torch.arange(6) < torch.tensor([6, 4, 1])[:, None]
    mask = mask if batch_first else mask.T
    for reduction in ("sum", "mean", "token_mean", "none"):
        results = []
        for crf in (ours, theirs):
            value = crf(emissions, tags, mask, reduction)
            results.append((value, *torch.autograd.grad(value.sum(), list(crf.parameters()))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert ours.decode(emissions, mask) == theirs.decode(emissions, mask)
    assert ours.decode(emissions) == theirs.decode(emissions)
