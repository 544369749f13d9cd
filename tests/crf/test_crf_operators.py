"""The CRF's operators and classes: gradients, agreement of the backends, randomness, edges, errors, compilation."""

from __future__ import annotations

import pytest
import torch

from simctg_fast import LinearChainCRF, LowRankCRF, StochasticViterbiSample, StochasticViterbiSamples
from simctg_fast.ops import _backends
from simctg_fast.ops.crf_beam import crf_beam_select
from simctg_fast.ops.crf_common import philox, uniforms_ffbs
from simctg_fast.ops.crf_filter import crf_filter
from simctg_fast.reference import crf as reference

from .. import crf_cases as cases

needs_extension = pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")
IMPLS = ("torch", pytest.param("cpu", marks=needs_extension))
NEVER = float("-inf")


def small(impl="torch", dtype=torch.float32, *, grad=True):
    crf = cases.build(9, 3, 4, impl, dtype=dtype).requires_grad_(grad)
    return crf, torch.randn(3, 4, 9, dtype=dtype), torch.tensor([4, 2, 0])


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", ["log_prob", "log_partition", "entropy", "kl", "nll", "viterbi", "tagger"])
def test_gradcheck(quantity):
    crf = cases.build(6, 2, 3, dtype=torch.float64).requires_grad_()
    emissions, lengths = torch.randn(2, 3, 6, dtype=torch.float64), torch.tensor([3, 2])
    other = cases.build(6, 2, 3, dtype=torch.float64, seed=5)
    beam_tokens = crf.beam(emissions, lengths).tokens
    drawn = crf.sample(emissions, lengths, num_samples=3, generator=torch.Generator().manual_seed(1))

    def value(emissions, left, right):
        with torch.nn.utils.stateless._reparametrize_module(crf, {"E1.weight": left, "E2.weight": right}):
            if quantity == "log_prob":
                result = crf.log_prob(emissions, drawn.tokens, lengths, beam_tokens=beam_tokens, temperature=0.7)
                return result.token_log_probs
            if quantity == "nll":
                return crf.nll(emissions, drawn.tokens[:, :, 0], lengths, reduction="none")
            if quantity == "kl":
                return crf.kl(other, emissions, emissions.flip(0), lengths=lengths, beam_tokens=beam_tokens)
            if quantity == "viterbi":
                return crf.viterbi(emissions, lengths, beam_tokens=beam_tokens).position_scores
            return getattr(crf, quantity)(emissions, lengths, beam_tokens=beam_tokens, temperature=0.7)

    if quantity == "tagger":
        tagger = LinearChainCRF(6, impl="torch").double()
        tags = torch.randint(6, (2, 3))
        names = [name for name, _ in tagger.named_parameters()]

        def likelihood(emissions, *parameters):
            with torch.nn.utils.stateless._reparametrize_module(tagger, dict(zip(names, parameters, strict=True))):
                return tagger.nll(emissions, tags, lengths, reduction="none")

        inputs = (emissions.requires_grad_(), *[p.detach().requires_grad_() for p in tagger.parameters()])
        assert torch.autograd.gradcheck(likelihood, inputs)
        return
    inputs = (emissions, crf.E1.weight.detach().clone(), crf.E2.weight.detach().clone())
    assert torch.autograd.gradcheck(value, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("banned", [False, True], ids=["free", "banned"])
def test_gradients_of_the_enumeration(impl, banned):
    """Weighted log-probabilities and the log-partition, against autograd through every path, in float64."""
    crf, emissions, lengths = cases.case(impl, banned=banned)
    crf.requires_grad_()
    drawn = crf.sample(emissions, lengths, num_samples=6, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(5, 6)

    ours = emissions.clone().requires_grad_()
    result = crf.log_prob(ours, drawn.tokens, lengths, beam_tokens=drawn.beam_tokens)
    (result.log_prob * weights).sum().backward()

    theirs = emissions.double().requires_grad_()
    left, right = (e.weight.detach().double().requires_grad_() for e in (crf.E1, crf.E2))
    scores = theirs.gather(2, drawn.beam_tokens)
    total = 0.0
    for b in range(4):
        length = int(lengths[b])
        law = reference.enumerate_paths(scores[b], drawn.beam_tokens[b], left, right, length)
        for n in range(6):
            same = (law.slots == drawn.slots[b, :length, n]).all(1)
            total = total + weights[b, n] * law.log_probs[same][0]
    total.backward()
    for actual, expected in (
        (ours.grad, theirs.grad),
        (crf.E1.weight.grad, left.grad),
        (crf.E2.weight.grad, right.grad),
    ):
        expected = expected.nan_to_num(0.0)  # padding is NaN here; its gradient has to be 0 in ours
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_upstream_gradients_of_any_layout(impl):
    crf, emissions, _ = small(impl)
    drawn = crf.sample(emissions, num_samples=3)
    gradients = []
    for weights in (torch.ones(3, 4, 3), torch.ones(()).expand(3, 4, 3), torch.ones(3, 3, 4).transpose(1, 2)):
        own = emissions.clone().requires_grad_()
        crf.log_prob(own, drawn.tokens, beam_tokens=drawn.beam_tokens).token_log_probs.backward(weights)
        gradients.append(own.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


# ---- the backends ----------------------------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize(
    "shape",  # 256 slots are the most that a byte holds, 300 the least that need two
    [(3, 6, 50, 10, 5), (2, 9, 900, 70, 32), (2, 4, 400, 256, 8), (2, 5, 700, 300, 33), (1, 1, 5, 5, 1)],
)
def test_cpp_agrees_with_torch(shape):
    batch, length, vocabulary, beam, rank = shape
    models = [cases.build(vocabulary, rank, beam, impl, seed=7).requires_grad_() for impl in ("cpu", "torch")]
    emissions = torch.randn(batch, length, vocabulary)
    emissions[torch.rand(emissions.shape) < 0.2] = NEVER
    emissions[:, :, 0] = 0.0
    lengths = torch.randint(length + 1, (batch,))
    exact, near = [], []
    for crf in models:
        own = emissions.clone().requires_grad_()
        generator = torch.Generator().manual_seed(5)
        drawn = crf.sample(own, lengths, num_samples=70, generator=generator, temperature=0.7)
        weights = torch.randn(batch, 70, generator=torch.Generator().manual_seed(3))
        ((drawn.log_prob * weights).sum() + crf.log_partition(own, lengths, temperature=1.3).sum()).backward()
        noisy = [
            crf.sample(emissions, lengths, num_samples=n, mode="stochastic_viterbi", generator=generator, temperature=t)
            for n, t in ((9, 0.8), (3, 0.03), (1, 50.0))
        ]
        exact.append([drawn.beam_tokens, drawn.slots, crf.viterbi(emissions, lengths).slots, *[x.slots for x in noisy]])
        scores = crf.kbest(emissions, lengths, n=7).score.detach().clamp(min=-1e4)
        near.append([drawn.log_prob.detach(), own.grad, crf.E1.weight.grad, crf.E2.weight.grad, scores])
    for ours, theirs in zip(*exact, strict=True):
        # Two ways to round may disagree at the edge between two slots, once in a very long while.
        assert (ours == theirs).float().mean() > 0.995
    for ours, theirs in zip(*near, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@needs_extension
def test_threads_and_batch_mates_change_nothing():
    crf = cases.build(400, 16, 40, "cpu").requires_grad_()
    emissions, lengths = torch.randn(6, 11, 400), torch.tensor([11, 4, 0, 7, 11, 1])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            own = emissions.clone().requires_grad_()
            crf.zero_grad()
            drawn = crf.sample(own, lengths, num_samples=130, generator=torch.Generator().manual_seed(1))
            drawn.log_prob.sum().backward()
            results.append((drawn.slots, drawn.log_prob, own.grad, crf.E1.weight.grad, crf.E2.weight.grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    few = crf.sample(emissions[:2], lengths[:2], num_samples=3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(few.slots, results[0][0][:2, :, :3])


@needs_extension
@pytest.mark.parametrize("mode", ["ffbs", "stochastic_viterbi"])
def test_threads_share_the_samples_of_one_item(mode):
    crf = cases.build(60, 5, 12, "cpu")
    emissions, lengths, threads = torch.randn(1, 7, 60), torch.tensor([5]), torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            generator = torch.Generator().manual_seed(2)
            results.append(crf.sample(emissions, lengths, num_samples=150, mode=mode, generator=generator))
            published = StochasticViterbiSamples(60, 5, 12, num_samples=150).requires_grad_(False)
            published.load_state_dict(crf.state_dict())
            probs = published(emissions, generator=torch.Generator().manual_seed(2))[0]
            results[-1] = (results[-1].slots, results[-1].log_prob, probs)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_probabilities_do_not_drift(impl):
    """Marginals of every position add up to 1; a bias of the exponential would show at the first positions."""
    crf = cases.build(400, 16, 120, impl)
    total = crf.marginals(torch.randn(1, 64, 400)).probs.double().sum(2)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


def test_philox_known_answers():
    """The vectors that come with Random123 for Philox4x32-10."""

    def words(seed, *counter):
        return [int(w) for w in philox(seed, tuple(torch.tensor([c]) for c in counter))]

    assert words(0, 0, 0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    full = 0xFFFFFFFF
    assert words(2**64 - 1, full, full, full, full) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(0x299F31D0_A4093822, *pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("impl", IMPLS)
def test_uniforms_take_the_place_of_the_seed(impl):
    crf, emissions, lengths = small(impl, grad=False)
    generator = torch.Generator().manual_seed(11)
    drawn = crf.sample(emissions, lengths, num_samples=5, generator=generator)
    seed = int(torch.randint(0, 2**63 - 1, (), generator=torch.Generator().manual_seed(11)))
    uniforms = uniforms_ffbs(seed, 3, 4, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(crf.sample(emissions, lengths, num_samples=5, uniforms=uniforms).slots, drawn.slots)
    lowest = crf.sample(emissions, lengths, num_samples=1, uniforms=torch.zeros(3, 4, 1))
    assert (lowest.slots[0] == 0).all()  # the first slot of every cumulative sum
    highest = crf.sample(emissions, lengths, num_samples=1, uniforms=torch.full((3, 4, 1), 1 - 2**-24))
    assert (highest.slots[0] == 3).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_banned_slots_are_never_drawn(impl):
    crf, emissions, _ = small(impl, grad=False)
    emissions[:, :, 2:] = NEVER  # two live tokens, two banned slots
    for uniform in (0.0, 0.5, 1 - 2**-24):
        drawn = crf.sample(emissions, num_samples=1, uniforms=torch.full((3, 4, 1), uniform))
        assert drawn.tokens.max() < 2
        drawn = crf.sample(
            emissions, num_samples=1, mode="stochastic_viterbi", uniforms=torch.full((3, 3, 4, 1), uniform)
        )
        assert drawn.tokens.max() < 2


# ---- beam selection --------------------------------------------------------------------------------------------------


def by_sorting(emissions, beam, forced=()):
    """Ranks by (forced, value, token) in Python."""
    result = []
    for row in emissions.double().flatten(0, 1).tolist():
        order = sorted(range(len(row)), key=lambda v: (v not in forced, 0.0 if v in forced else -row[v], v))
        result.append(order[:beam])
    return torch.tensor(result).view(*emissions.shape[:2], beam)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_selection(impl, dtype):
    bans = torch.randn(2, 2, 900)
    bans[..., 5:] = NEVER
    ties = torch.zeros(1, 2, 5000)
    ties[..., ::7] = 1
    signed = torch.zeros(1, 1, 800)
    signed[..., 300:] = -0.0
    subnormal = torch.randn(1, 2, 300) * 1e-6
    inputs = [
        (torch.randn(2, 3, 3000), 40), (torch.randn(1, 2, 50), 50), (bans, 20), (ties, 1000), (signed, 400),
        (subnormal, 30), (torch.randn(1, 1, 1), 1), (torch.randn(2, 1, 700), 1),
    ]  # fmt: skip
    for emissions, beam in inputs:
        emissions = emissions.to(dtype)
        for view in (
            emissions,
            emissions.transpose(0, 1),
            torch.cat([emissions, emissions], 2)[..., : emissions.shape[2]],
        ):
            tokens, values = crf_beam_select(view, beam, impl=impl)
            assert torch.equal(tokens, by_sorting(view, beam))
            assert torch.equal(values, view.float().gather(2, tokens))


@pytest.mark.parametrize("impl", IMPLS)
def test_forced_tokens(impl):
    emissions = torch.randn(2, 3, 40)
    emissions[..., 7] = NEVER
    forced = torch.tensor([7, 3, -1, 7, 39]).expand(2, 3, 5).contiguous()
    tokens, values = crf_beam_select(emissions, 9, None, forced, impl=impl)
    assert torch.equal(tokens, by_sorting(emissions, 9, {3, 7, 39}))
    assert torch.equal(values, emissions.gather(2, tokens))
    full, _ = crf_beam_select(emissions, 3, None, torch.tensor([7, 3, 39]).expand(2, 3, 3).contiguous(), impl=impl)
    assert (full == torch.tensor([3, 7, 39])).all()


# ---- large sizes and invariances -------------------------------------------------------------------------------------


@needs_extension
def test_log_partition_at_length_97():
    """Scores near 2,000: the renormalised fp32 filter stays within 1e-3 of float64."""
    crf, exact = cases.build(2000, 32, 256, "cpu"), cases.build(2000, 32, 256, "torch", dtype=torch.float64)
    exact.load_state_dict(crf.state_dict())
    emissions = torch.randn(1, 97, 2000)
    partition = exact.log_partition(emissions.double())
    assert partition > 1000
    torch.testing.assert_close(crf.log_partition(emissions).double(), partition, rtol=0, atol=1e-3)
    drawn = crf.sample(emissions, num_samples=4)
    there = exact.log_prob(emissions.double(), drawn.tokens, beam_tokens=drawn.beam_tokens)
    torch.testing.assert_close(drawn.log_prob.double(), there.log_prob, rtol=0, atol=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_invariances(impl):
    crf, emissions, lengths = small(impl, grad=False)
    partition = crf.log_partition(emissions, lengths)
    shifted = emissions.clone()
    shifted[:, 1] += 3.5
    expected = partition + torch.tensor([3.5, 3.5, 0.0])
    torch.testing.assert_close(crf.log_partition(shifted, lengths), expected, rtol=0, atol=1e-5)
    beam_tokens = crf.beam(emissions, lengths).tokens
    permuted = beam_tokens[..., torch.tensor([2, 0, 3, 1])]
    torch.testing.assert_close(crf.log_partition(emissions, lengths, beam_tokens=permuted), partition)
    # The full beam is the dense CRF.
    whole = crf.log_partition(emissions, lengths, beam_size=9)
    dense = reference.dense_log_partition(emissions.double(), (crf.E1.weight @ crf.E2.weight.T).double(), lengths)
    torch.testing.assert_close(whole.double(), dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_edges(impl):
    for shape, beam in (((2, 1, 6), 3), ((2, 5, 6), 1), ((2, 4, 6), 6), ((0, 3, 6), 2), ((2, 3, 6), 99)):
        crf = cases.build(6, 2, beam, impl).requires_grad_()
        emissions = torch.randn(shape, requires_grad=True)
        lengths = torch.zeros(shape[0], dtype=torch.int64)
        for given in (None, lengths):
            assert crf.viterbi(emissions, given).tokens.shape == shape[:2]
            assert crf.kbest(emissions, given, n=3).score.shape == (shape[0], 3)
            for mode in ("ffbs", "stochastic_viterbi"):
                drawn = crf.sample(emissions, given, num_samples=2, mode=mode)
                assert drawn.tokens.shape == (*shape[:2], 2)
                drawn.log_prob.sum().backward()
            nll = crf.nll(emissions, torch.zeros(shape[:2], dtype=torch.int64), given, reduction="none")
            assert torch.isfinite(nll).all()
            assert torch.isfinite(crf.entropy(emissions, given)).all()
            assert torch.isfinite(crf.marginals(emissions, given).probs).all()
        if shape[0]:
            assert torch.isfinite(emissions.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision_emissions(impl, dtype):
    """Computed in fp32 throughout; the gradient comes back in the emissions' dtype."""
    crf, emissions, lengths = small(impl)
    half = emissions.to(dtype)
    torch.testing.assert_close(crf.log_partition(half, lengths), crf.log_partition(half.float(), lengths))
    own = half.clone().requires_grad_()
    crf.nll(own, torch.zeros(3, 4, dtype=torch.int64), lengths).backward()
    assert own.grad.dtype == dtype


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_errors_name_what_is_wrong(impl):
    crf, emissions, _ = small(impl, grad=False)
    targets = torch.zeros(3, 4, dtype=torch.int64)

    def fails(message, function, *args, **kwargs):
        with pytest.raises((ValueError, TypeError), match=message):
            function(*args, **kwargs)

    nan, banned, infinite = emissions.clone(), emissions.clone(), emissions.clone()
    nan[1, 2, 3], banned[2, 1], infinite[0, 3, 1] = float("nan"), NEVER, float("inf")
    fails(r"emissions\[1, 2\] holds NaN", crf.viterbi, nan)
    fails(r"emissions\[2, 1\] bans every token", crf.sample, banned)
    fails(r"emissions\[0, 3\] holds \+inf", crf.log_partition, infinite)
    fails(r"emissions has shape \(3, 4, 8\)", crf.viterbi, emissions[..., :8])
    fails("emissions has dtype torch.int64", crf.viterbi, emissions.long())
    fails("emissions is on meta", crf.viterbi, emissions.to("meta"))
    fails(r"lengths\[1\] is 5, must be in 0..4", crf.viterbi, emissions, torch.tensor([1, 5, 2]))
    fails(r"lengths is torch.float32", crf.viterbi, emissions, torch.ones(3))
    fails("lengths is list", crf.viterbi, emissions, [1, 2, 3])
    fails("temperature is 0, must be positive", crf.sample, emissions, temperature=0)
    fails("mode is 'greedy'", crf.sample, emissions, mode="greedy")
    fails("num_samples is 0", crf.sample, emissions, num_samples=0)
    fails("uniforms is torch.float32", crf.sample, emissions, num_samples=2, uniforms=torch.zeros(3, 4, 3))
    fails(r"outside \[0, 1\)", crf.sample, emissions, num_samples=1, uniforms=torch.ones(3, 4, 1))
    fails("beam_size is 0", crf.viterbi, emissions, beam_size=0)
    fails(r"beam_tokens\[0, 0, 0\] is 9, must be in 0..8", crf.viterbi, emissions, beam_tokens=torch.full((3, 4, 2), 9))
    fails(r"targets\[0, 0\] is -1", crf.nll, emissions, targets - 1)
    fails("reduction is 'max'", crf.nll, emissions, targets, reduction="max")
    beam = crf.beam(emissions, include=targets).tokens
    outside = torch.tensor([v for v in range(9) if v not in beam[0, 0].tolist()])[0].expand(3, 4)
    fails(r"tokens\[0, 0, 0\] is \d, which is not in beam_tokens", crf.log_prob, emissions, outside, beam_tokens=beam)
    fails(r"slots\[0, 0, 0\] is 9", crf.log_prob, emissions, targets, beam_tokens=beam, slots=targets + 9)
    fails("n is 0", crf.kbest, emissions, n=0)
    fails("other is int", crf.kl, 3, emissions)
    fails("num_embeddings is 0", LowRankCRF, 0)
    fails("impl is .gpu., must be one of", LowRankCRF, 9, 3, 4, impl="gpu")


@needs_extension
def test_float64_is_not_narrowed_silently():
    crf = cases.build(9, 3, 4, "cpu")
    with pytest.raises(ValueError, match="float64 needs impl='torch'"):
        crf.log_partition(torch.randn(1, 2, 9, dtype=torch.float64))


# ---- the published classes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_published_classes_step_by_step(impl, temperature):
    """Fed with our uniforms, the re-stated published code draws the same tables; fed with our pointers it carries the
    same scores and their gradients are the same."""
    torch.manual_seed(0)
    ours = StochasticViterbiSamples(40, 5, 6, temp=temperature, num_samples=4)
    ours.impl = impl
    emissions = torch.randn(2, 5, 40, requires_grad=True)
    uniforms = torch.rand(2, 4, 6, 4)
    probs, slots, tokens = ours(emissions, uniforms=uniforms)
    left, right = ours.E1.weight, ours.E2.weight
    theirs = reference.published_samples(emissions, left, right, 6, temperature, 4, uniforms=uniforms)
    assert torch.equal(slots, theirs[1])
    assert torch.equal(tokens, theirs[2])
    torch.testing.assert_close(probs, theirs[0], rtol=1e-4, atol=1e-5)
    again = reference.published_samples(emissions, left, right, 6, temperature, 4, pointers=theirs[3])
    weights = torch.randn_like(probs)
    inputs = (emissions, left, right)
    gradients = torch.autograd.grad((probs * weights).sum(), inputs)
    expected = torch.autograd.grad((again[0] * weights).sum(), inputs)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_published_shapes_and_names():
    emissions = torch.randn(2, 5, 40)
    one = StochasticViterbiSample(40)
    assert (one.rank, one.beam, one.temp) == (32, 256, 1.0)
    probs, slots, tokens = one._compute_stochastic_viterbi_sample(emissions, 8)
    assert (probs.shape, slots.shape, tokens.shape) == ((2, 5, 8), (2, 5, 1), (2, 5))
    assert probs.gather(2, slots).shape == (2, 5, 1)
    torch.testing.assert_close(probs.sum(2), torch.ones(2, 5))
    values, top = emissions.topk(8, 2)
    assert torch.equal(top.gather(2, slots).squeeze(2), tokens)
    torch.testing.assert_close(probs[:, 0], values[:, 0].softmax(1))
    many = StochasticViterbiSamples(40, beam_size=8)
    probs, slots, tokens = many._compute_grpo_samples(emissions, masks=torch.ones(2, 5))
    assert (probs.shape, slots.shape, tokens.shape) == ((2, 5, 8, 8), (2, 5, 8), (2, 5, 8))
    short = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert (many(emissions, short)[2][0, 3:] == 0).all()
    with pytest.raises(ValueError, match="hole"):
        many(emissions, torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_cold_published_sampler_is_viterbi(impl):
    torch.manual_seed(0)
    crf = LowRankCRF(40, 5, 8, impl=impl)
    emissions = torch.randn(3, 7, 40)
    cold = crf.sample(emissions, num_samples=2, mode="stochastic_viterbi", temperature=1e-4)
    assert torch.equal(cold.tokens, crf.viterbi(emissions).tokens[..., None].expand(-1, -1, 2))


# ---- operators and compilation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    crf, emissions, lengths = small(impl)
    tokens, scores = crf_beam_select(emissions, 4, lengths)
    left, right = crf.E1.weight, crf.E2.weight
    ops = torch.ops.simctg_fast
    permuted = scores.detach().transpose(0, 1).contiguous().transpose(0, 1)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    for own in (scores.detach().requires_grad_(), permuted.requires_grad_()):
        if own is permuted:  # the layout of what comes out is the fake's to promise; the rest is the same graph
            checks = ["test_faketensor"]
        arguments = (own, tokens, left, right, lengths)
        torch.library.opcheck(ops.crf_filter, (*arguments, 0.8), {"impl": impl}, test_utils=checks)
        messages, norms = (x.detach() for x in ops.crf_filter(*arguments, 0.8, impl=impl))
        plain = tuple(x.detach() for x in arguments)
        torch.library.opcheck(ops.crf_viterbi, plain, {"impl": impl}, test_utils=checks)
        torch.library.opcheck(ops.crf_kbest, (*plain, 2), {"impl": impl}, test_utils=checks)
        torch.library.opcheck(ops.crf_ffbs, (messages, norms, *plain, 0.8, 3, 5), {"impl": impl}, test_utils=checks)
        torch.library.opcheck(ops.crf_stochastic_viterbi, (*plain, 0.8, 2, 5), {"impl": impl}, test_utils=checks)
        torch.library.opcheck(
            ops.crf_filter_backward,
            (messages, messages, norms, *plain, 0.8, True), {"impl": impl}, test_utils=checks,
        )  # fmt: skip
    torch.library.opcheck(ops.crf_beam_select, (emissions, 4, lengths), {"impl": impl}, test_utils=checks)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_without_a_break(impl):
    crf, _, _ = small(impl)
    tokens = torch.randint(9, (2, 3, 4))

    def loss(scores, left, right):
        messages, _ = crf_filter(scores, tokens[: scores.shape[0]], left, right, impl=impl)
        return torch.logsumexp(messages[:, -1] + scores[:, -1], 1).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        scores = torch.ones(2, 3, 4, requires_grad=True)
        value = function(scores, crf.E1.weight, crf.E2.weight)
        results.append((value, *torch.autograd.grad(value, (scores, crf.E1.weight))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
