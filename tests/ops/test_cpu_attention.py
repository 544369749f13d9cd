"""Shared-prefix attention and the scan of candidates in C++ on every instruction set: against float64, and bit for
bit whatever the batch and the threads. What the public functions promise is in test_shared_prefix_attention.py and
test_candidate_select.py."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from simctg_fast import ContrastiveSearch
from simctg_fast.ops import _backends, shared_prefix_attention
from simctg_fast.ops import candidate_select as scan
from simctg_fast.reference.attention import shared_prefix_attention as reference
from simctg_fast.reference.candidate_select import candidate_scan as reference_scan

from ..decoding_models import build, prompt
from ..instruction_sets import in_every_set

extension = _backends.extension()
pytestmark = pytest.mark.skipif(extension is None, reason="the C++ extension is not built")


def attention(*arguments, scaling=1.0, **options):
    return shared_prefix_attention.shared_prefix_attention(*arguments, scaling=scaling, impl="cpu", **options)


def candidate_scan(*arguments, **options):
    return scan.candidate_scan(*arguments, impl="cpu", **options)


def taken(query, key, value, **options):
    """Whether it is C++ that serves an attention by default."""
    call = shared_prefix_attention.Call(query, key, value, 4, **options)
    return shared_prefix_attention.resolve("auto", call) == "cpu"


NARROW = [torch.bfloat16, torch.float16]
TYPES = [torch.float32, *NARROW]


def as_type(call, dtype, bias_dtype=None):
    """A call with its tensors in `dtype`, the bias in another where one is given."""
    tensors = ("query", "key", "value", "new_key", "new_value", "sinks", "bias")
    changed = {name: call[name].to(dtype) for name in tensors if call.get(name) is not None}
    if bias_dtype is not None and "bias" in changed:
        changed["bias"] = call["bias"].to(bias_dtype)
    return call | changed


def rms(errors):
    return torch.cat([error.flatten() for error in errors]).square().mean().sqrt().item()


# 64 is a block of positions, 512 a cut.
LENGTHS = (0, 1, 15, 16, 63, 64, 65, 127, 130, 300, 511, 512, 513, 700, 1090)
DIMS = (1, 3, 5, 16, 17, 24, 33, 40, 64, 65, 80, 128)


def draw_attention(choose: random.Random, length=None):
    batch, candidates = choose.choice((1, 2, 3)), choose.choice((1, 2, 3, 4, 5, 7))
    kv_heads, groups = choose.choice((1, 2)), choose.choice((1, 1, 2, 3))
    dim = choose.choice(DIMS)
    value_dim = choose.choice((dim, dim, *DIMS))
    length = choose.choice(LENGTHS) if length is None else length
    rows, heads, positions = batch * candidates, kv_heads * groups, length + choose.choice((0, 5))
    own = length == 0 or choose.random() < 0.7
    # Not in use, and not to be read: NaN.
    key = torch.full((batch, kv_heads, positions + 1, dim), torch.nan)
    value = torch.full((batch, positions + 1, kv_heads, value_dim), torch.nan).transpose(1, 2)
    lengths = starts = None
    if own and choose.random() < 0.4:
        lengths = torch.tensor([choose.randint(0, length) for _ in range(batch)])
        lengths[0] = length
    if own and choose.random() < 0.3:
        starts = torch.tensor([choose.randint(0, min(length, 70)) for _ in range(batch)])
    window_start = choose.randint(0, min(length, 600)) if own and choose.random() < 0.3 else 0
    for b in range(batch):
        begin = max(window_start, 0 if starts is None else int(starts[b]))
        end = length if lengths is None else int(lengths[b])
        key[b, :, begin:end] = torch.randn(kv_heads, max(0, end - begin), dim)
        value[b, :, begin:end] = torch.randn(kv_heads, max(0, end - begin), value_dim)
    width = length + own

    def extra():
        shape = (choose.choice((1, batch, rows)), choose.choice((1, heads)), 1, width)
        return torch.randn(shape)

    mask = bias = None
    if choose.random() < 0.5:
        mask = extra() > -0.6
        mask[..., : choose.choice((0, 0, length // 2))] = False  # whole blocks closed
        mask[..., -1] = True
        if not own:
            mask[..., window_start] = True
    if choose.random() < 0.4:
        bias = extra()
    return {
        "query": torch.randn(rows, 1, heads, dim).transpose(1, 2)
        if choose.random() < 0.5
        else torch.randn(rows, heads, 1, dim),
        "key": key,
        "value": value,
        "length": length,
        "new_key": torch.randn(rows, kv_heads, 1, dim) if own else None,
        "new_value": torch.randn(rows, 1, kv_heads, value_dim).transpose(1, 2) if own else None,
        "scaling": choose.choice((dim**-0.5, 1.0)),
        "mask": mask,
        "bias": bias,
        "softcap": choose.choice((None, None, 2.0, 30.0)),
        "sinks": torch.randn(heads) if choose.random() < 0.3 else None,
        "window_start": window_start,
        "lengths": lengths,
        "starts": starts,
    }


def one_sequence(call, b):
    """The part of a call that belongs to sequence b."""
    batch = call["key"].shape[0]
    k = call["query"].shape[0] // batch

    def pick(tensor):
        if tensor is None or tensor.shape[0] == 1:
            return tensor
        return tensor[b : b + 1] if tensor.shape[0] == batch else tensor[b * k : (b + 1) * k]

    part = dict(call)
    for name in ("query", "new_key", "new_value"):
        part[name] = None if call[name] is None else call[name][b * k : (b + 1) * k]
    for name in ("key", "value", "lengths", "starts"):
        part[name] = None if call[name] is None else call[name][b : b + 1]
    return part | {name: pick(call[name]) for name in ("mask", "bias")}


def test_attention_against_loops(isa, threads):
    choose = random.Random(5)
    for index in range(60):
        call = draw_attention(choose, LENGTHS[index % len(LENGTHS)])
        threads(1 + index % 3)
        y = attention(**call)
        truth = reference(**call)
        assert y.shape == truth.shape
        assert y.is_contiguous()
        # Scores of size s are off by about s · 2⁻²³ before the softmax: 1e-5 at scaling 1 and dim 128.
        error = (y.double() - truth).abs().max().item()
        assert error < 2e-5, {k: tuple(v.shape) if isinstance(v, torch.Tensor) else v for k, v in call.items()}


def test_attention_is_as_exact_as_pytorch(isa):
    """Against the plain float32 formula, both measured in float64."""
    for dim, length in [(64, 768), (128, 1000), (80, 300)]:
        query, key, value = torch.randn(8, 4, 1, dim), torch.randn(2, 4, length, dim), torch.randn(2, 4, length, dim)
        arguments = (query, key, value, length, torch.randn(8, 4, 1, dim), torch.randn(8, 4, 1, dim))
        truth = reference(*arguments, dim**-0.5)
        plain = shared_prefix_attention.shared_prefix_attention(*arguments, scaling=dim**-0.5, impl="torch")
        ours = attention(*arguments, scaling=dim**-0.5)
        assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max()


@in_every_set
@pytest.mark.parametrize("dtype", NARROW)
def test_attention_of_16_bits_is_rounded_once(isa, threads, dtype):
    """Against the truth of the same inputs: each output within a rounding, and all of them as near as its rounding."""
    choose = random.Random(9)
    errors, roundings = [], []
    for index in range(30):
        call = as_type(
            draw_attention(choose, LENGTHS[index % len(LENGTHS)]), dtype, choose.choice((dtype, torch.float32))
        )
        if call["new_key"] is not None and choose.random() < 0.3:
            call["window"] = choose.randint(1, 600)
        threads(1 + index % 3)
        y, truth = attention(**call), reference(**call)
        assert y.dtype == dtype
        assert y.shape == truth.shape
        errors.append(y.double() - truth)
        roundings.append(truth.to(dtype).double() - truth)
        most = truth.abs() * torch.finfo(dtype).eps / 2 + 2e-5  # and what float32 adds
        assert (errors[-1].abs() <= most).all(), {
            k: (v.dtype, tuple(v.shape)) if isinstance(v, torch.Tensor) else v for k, v in call.items()
        }
    assert rms(errors) <= 1.01 * rms(roundings)


@in_every_set
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": 3, "dim": 80, "value_dim": 33},
        {"dim": 33, "softcap": 5.0, "sinks": True},
        {"length": 1300, "own": False},
        {"length": 300, "bias": torch.float32, "mask": True},
        {"length": 700, "bias": "own", "groups": 2, "sinks": True},
    ],
    ids=str,
)
def test_attention_of_16_bits_is_better_than_pytorch(isa, dtype, options):
    length, dim, groups = options.get("length", 513), options.get("dim", 64), options.get("groups", 1)
    value_dim, width, own = options.get("value_dim", dim), length + options.get("own", True), options.get("own", True)
    bias = options.get("bias")
    call = {
        "query": torch.randn(8, 2 * groups, 1, dim),
        "key": torch.randn(2, 2, length, dim),
        "value": torch.randn(2, 2, length, value_dim),
        "length": length,
        "new_key": torch.randn(8, 2, 1, dim) if own else None,
        "new_value": torch.randn(8, 2, 1, value_dim) if own else None,
        "scaling": dim**-0.5,
        "mask": torch.rand(2, 1, 1, width) > 0.3 if options.get("mask") else None,
        "bias": None if bias is None else 3 * torch.randn(1, 2 * groups, 1, width),
        "softcap": options.get("softcap"),
        "sinks": torch.randn(2 * groups) if options.get("sinks") else None,
    }
    call = as_type(call, dtype, torch.float32 if bias is torch.float32 else None)
    truth = reference(**call)
    plain = shared_prefix_attention.shared_prefix_attention(**call, impl="torch")
    ours, rounding = rms([attention(**call) - truth]), rms([truth.to(dtype) - truth])
    assert ours <= 1.05 * rounding
    assert ours <= rms([plain - truth])


@in_every_set
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("own", [False, True])
def test_every_number_of_16_bits(isa, dtype, own):
    """The value of an only key is the output, bit for bit."""
    value = torch.arange(-(2**15), 2**15).short().view(dtype).view(1, 1, 1, -1)
    query = torch.zeros(1, 1, 1, 1, dtype=dtype)
    y = attention(query, query, value, 0, query, value) if own else attention(query, query, value, 1)
    assert torch.equal(y.isnan(), value.isnan())
    expected = value if own else value + 0.0  # −0 is added to 0
    assert torch.equal(y[~y.isnan()].view(torch.int16), expected[~y.isnan()].view(torch.int16))


def test_scores_beyond_float16(isa):
    query, key = torch.full((2, 1, 1, 64), 200.0), torch.randn(1, 1, 70, 64)
    key[0, 0, 3:5] = 300.0  # products of 3.8e6
    value = torch.randn(1, 1, 70, 8).half()
    y = attention(query.half(), key.half(), value, 70)
    assert torch.equal(y, value[:, :, 3:5].float().mean(2, keepdim=True).half().expand(2, 1, 1, 8))


def test_subnormal_float16(isa):
    """They count in queries, keys, values and outputs."""
    value = (torch.arange(1, 71) * 2.0**-24).view(1, 1, 70, 1).half()
    key, query = value.clone(), torch.full((1, 1, 1, 1), 4096.0).half()
    call = (query, key, value, 70)
    truth = reference(*call, scaling=4096.0)
    assert torch.equal(attention(*call, scaling=4096.0), truth.half())
    query, key = key[:, :, :1], torch.full((1, 1, 70, 1), 4096.0).half() * (torch.arange(70).view(1, 1, 70, 1) % 3)
    call = (query, key, value, 70)
    assert torch.equal(attention(*call, scaling=4096.0), reference(*call, scaling=4096.0).half())


@in_every_set
@pytest.mark.parametrize("dtype", TYPES)
def test_attention_bits_do_not_depend_on_batch_or_threads(isa, threads, dtype):
    choose = random.Random(6)
    for index in range(24):
        call = as_type(draw_attention(choose), dtype)
        threads(1)
        y = attention(**call)
        k = call["query"].shape[0] // call["key"].shape[0]
        for b in range(call["key"].shape[0]):
            assert torch.equal(attention(**one_sequence(call, b)), y[b * k : (b + 1) * k])
        for count, backend in [(2, "openmp"), (3, "std::thread"), (7, "openmp")][index % 3 :][:2]:
            threads(count)
            extension.set_parallel_backend(backend)
            try:
                assert torch.equal(attention(**call), y)
            finally:
                extension.set_parallel_backend("auto")


@in_every_set
@pytest.mark.parametrize("dtype", TYPES)
def test_sequences_with_candidates_in_numbers_of_their_own(isa, threads, dtype):
    """What each gets alone, bit by bit; PyTorch's code says the same."""
    choose = random.Random(8)
    for index in range(24):
        call = as_type(draw_attention(choose, LENGTHS[index % len(LENGTHS)]), dtype)
        batch = call["key"].shape[0]
        k = call["query"].shape[0] // batch
        for name in ("mask", "bias"):
            if call[name] is not None and call[name].shape[0] == batch * k:
                call[name] = call[name][::k]
        counts = [choose.randint(1, k) for _ in range(batch)]
        rows = [b * k + c for b, count in enumerate(counts) for c in range(count)]
        some = {n: None if call[n] is None else call[n][rows] for n in ("query", "new_key", "new_value")}
        offsets = torch.tensor([0, *itertools.accumulate(counts)])
        threads(1 + index % 3)
        y = attention(**(call | some), offsets=offsets)
        for b, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
            alone = one_sequence(call, b)
            alone |= {n: None if alone[n] is None else alone[n][: end - begin] for n in some}
            assert torch.equal(attention(**alone), y[begin:end])
        call = {n: x.nan_to_num() if n in ("key", "value") else x for n, x in call.items()}
        torchs = shared_prefix_attention.shared_prefix_attention(**(call | some), offsets=offsets, impl="torch")
        wide = shared_prefix_attention.shared_prefix_attention(**call, impl="torch")
        torch.testing.assert_close(torchs, wide[rows], equal_nan=True)


@in_every_set
@pytest.mark.parametrize("dtype", TYPES)
def test_one_head_and_many_cuts(isa, threads, dtype):
    """Few heads and a long sequence: the threads share the cuts of one head."""
    query, key, value = torch.randn(4, 1, 1, 64), torch.randn(1, 1, 5000, 64), torch.randn(1, 1, 5000, 64)
    query, key, value, *own = (
        x.to(dtype) for x in (query, key, value, torch.randn(query.shape), torch.randn(query.shape))
    )
    arguments = (query, key, value, 5000, *own)
    threads(1)
    y = attention(*arguments, scaling=0.125)
    threads(4)
    assert torch.equal(attention(*arguments, scaling=0.125), y)
    truth = reference(*arguments, 0.125)
    assert torch.allclose(y.double(), truth, atol=1e-6, rtol=max(1e-5, torch.finfo(dtype).eps / 2))


def test_scores_that_overflow_without_the_largest_taken_off(isa):
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([1000.0, 999.0, -1000.0]).view(1, 1, 3, 1)
    value = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)
    y = attention(query, key, value, 3)
    assert y.item() == pytest.approx((math.e * 1 + 2) / (math.e + 1), rel=1e-6)
    y = attention(query, key, value, 3, softcap=2.0)
    # Capped to 2, 2 and -2.
    weights = torch.softmax(torch.tensor([2.0, 2.0, -2.0]), 0)
    assert y.item() == pytest.approx((weights * value.flatten()).sum().item(), rel=1e-6)


@pytest.mark.parametrize("softcap", [0.01, 1.0, 50.0])
def test_softcap_over_its_whole_range(isa, softcap):
    """One key a row and a sink at 0: the output is the sigmoid of the capped score."""
    scores = torch.cat([torch.linspace(-4, 4, 201), torch.tensor([0.0, 1e-30, 1e-6, 30.0, -1e4, 1e30])]) * softcap
    rows = scores.numel()
    y = attention(
        scores.view(rows, 1, 1, 1),
        torch.ones(1, 1, 1, 1),
        torch.ones(1, 1, 1, 1),
        1,
        softcap=softcap,
        sinks=torch.zeros(1),
    )
    expected = torch.sigmoid(softcap * torch.tanh(scores.double() / softcap))
    assert torch.allclose(y.flatten().double(), expected, rtol=3e-7 * max(1, softcap), atol=1e-38)


def test_exponential_over_its_whole_range(isa):
    """One key a row against a sink at s: weight 1 / (1 + exp(s)) down to where exp is denormal and then 0."""
    s = torch.linspace(0, 103, 2000)
    y = attention(torch.zeros(1, 2000, 1, 1), torch.ones(1, 2000, 1, 1), torch.ones(1, 2000, 1, 1), 1, sinks=s)
    expected = 1 / (1 + torch.exp(s.double()))
    assert torch.allclose(y.flatten().double(), expected, rtol=5e-7, atol=2e-45)


@in_every_set
@pytest.mark.parametrize("dtype", TYPES)
def test_not_finite_attention(isa, dtype):
    shapes = ((4, 2, 1, 8), (2, 2, 70, 8), (2, 2, 70, 8))
    query, key, value = (torch.randn(shape).to(dtype) for shape in shapes)
    clean = attention(query, key, value, 70)
    key[1, 0, 66, 3] = torch.nan
    y = attention(query, key, value, 70)
    assert y[2:, 0, 0].isnan().all()
    assert torch.equal(y[:2], clean[:2])
    assert torch.equal(y[2:, 0, 1], clean[2:, 0, 1])
    value[0, 1, 5, 2] = torch.inf
    y = attention(query, key, value, 70)
    assert (y[:2, 0, 1, 2] == torch.inf).all()
    assert torch.equal(y[:2, 0, 0], clean[:2, 0, 0])


@in_every_set
@pytest.mark.parametrize("dtype", TYPES)
def test_nothing_to_see(isa, dtype):
    """NaN as softmax makes it, 0 with a sink, and what the mask closes for a whole block is not read."""
    shapes = ((2, 1, 1, 4), (1, 1, 130, 4), (1, 1, 130, 4))
    query, key, value = (torch.randn(shape).to(dtype) for shape in shapes)
    mask = torch.zeros(1, 1, 1, 130, dtype=torch.bool)
    assert attention(query, key, value, 130, mask=mask).isnan().all()
    assert attention(query, key, value, 0).isnan().all()
    assert (attention(query, key, value, 130, mask=mask, sinks=torch.zeros(1, dtype=dtype)) == 0).all()
    mask[..., 128:] = True
    expected = attention(query, key[:, :, 128:], value[:, :, 128:], 2)
    key[:, :, :128], value[:, :, :128] = torch.nan, torch.nan
    y = attention(query, key, value, 130, mask=mask)
    assert torch.allclose(y, expected, atol=1e-6, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_bias_that_lies_heads_last(dtype):
    """T5's, as its embedding makes it."""
    shapes = ((6, 4, 1, 8), (2, 4, 11, 8), (2, 4, 11, 8))
    query, key, value = (torch.randn(shape).to(dtype) for shape in shapes)
    bias = torch.randn(1, 1, 11, 4).to(dtype).permute(0, 3, 1, 2)
    call = (query, key, value, 11)
    assert bias.stride(-1) == 4
    assert taken(query, key, value, bias=bias)
    y = attention(*call, bias=bias)
    assert torch.equal(y, attention(*call, bias=bias.contiguous()))
    assert torch.equal(y, attention(*call, bias=bias.float()))
    assert not torch.equal(y, attention(*call))
    assert not taken(query, key, value, bias=bias.double())


@pytest.mark.parametrize("dtype", NARROW)
def test_sinks_of_float32_in_a_model_of_16_bits(dtype):
    """Flint keeps its own so: every bit of them counts."""
    shapes = ((6, 4, 1, 8), (2, 2, 11, 8), (2, 2, 11, 8))
    query, key, value = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    value += 1
    sinks = torch.tensor([-30.0, 2.001, 2.003, 2.997])
    assert taken(query, key, value, sinks=sinks)
    y = attention(query, key, value, 11, sinks=sinks)
    expected = 11 / (11 + sinks.double().exp())  # scores are 0
    assert torch.equal(y, expected.to(dtype)[None, None, :, None].expand(6, 1, 4, 8))
    assert not torch.equal(y, attention(query, key, value, 11, sinks=sinks.to(dtype)))
    assert not taken(query, key, value, sinks=sinks.double())


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_every_attention_of_a_step_is_taken(monkeypatch, kind):
    """None falls to plain torch, which is many times slower."""
    model = build(kind)
    inputs = {"input_ids": prompt(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    search = ContrastiveSearch(0.6, 4)
    model.generate(**inputs, custom_generate=search, max_new_tokens=4)  # its first steps run the model's own as well

    def refuse(*args):
        raise AssertionError("an attention in plain torch")

    monkeypatch.setattr(shared_prefix_attention, "_torch", refuse)
    assert model.generate(**inputs, custom_generate=search, max_new_tokens=4).numel()


def test_each_candidate_sees_its_own_key_only():
    query, key, value = torch.randn(3, 1, 1, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    new_key, new_value = torch.randn(3, 1, 1, 8), torch.randn(3, 1, 1, 8)
    y = attention(query, key, value, 5, new_key, new_value)
    for c in range(3):
        one = slice(c, c + 1)
        assert torch.equal(attention(query[one], key, value, 5, new_key[one], new_value[one]), y[one])
    other = attention(query, key, value, 5, new_key, new_value.flip(0))
    assert not torch.allclose(other[0], y[0], atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 12}, r"length is 12, key has shape \(2, 2, 11, 8\)"),
        ({"query": torch.zeros(5, 4, 1, 8)}, r"query has shape \(5, 4, 1, 8\)"),
        ({"query": torch.zeros(6, 3, 1, 8)}, r"query has shape \(6, 3, 1, 8\)"),
        (
            {"query": torch.zeros(6, 4, 1, 8, dtype=torch.float64)},
            "query is torch.float64 on cpu, must be float32 or bfloat16 or float16 on the CPU",
        ),
        (
            {"key": torch.zeros(2, 2, 11, 8).bfloat16()},
            "key is torch.bfloat16 on cpu, must be float32 on the CPU as query",
        ),
        ({"sinks": torch.zeros(4).half()}, "sinks is torch.float16 on cpu, must be float32 on the CPU"),
        ({"bias": torch.zeros(1, 1, 1, 12).half()}, "bias is torch.float16 on cpu, must be float32 on the CPU"),
        ({"key": torch.zeros(2, 2, 8, 11).mT}, "key has strides .* the last must be 1"),
        ({"new_value": None}, "new_key and new_value must come together"),
        ({"new_key": torch.zeros(6, 1, 1, 8)}, r"new_key has shape \(6, 1, 1, 8\), must be \(6, 2, 1, 8\)"),
        ({"mask": torch.ones(2, 1, 1, 11, dtype=torch.bool)}, r"mask has shape \(2, 1, 1, 11\), must be .* 1, 12\)"),
        ({"mask": torch.ones(2, 1, 1, 12)}, "mask is torch.float32 on cpu, must be bool"),
        ({"bias": torch.zeros(4, 1, 1, 12)}, r"bias has shape \(4, 1, 1, 12\), must be \(1, 2 or 6, 1 or 4, 1, 12\)"),
        ({"sinks": torch.zeros(3)}, r"sinks has shape \(3,\), must be \(4,\)"),
        ({"softcap": 0.0}, "softcap is 0.0, must be above 0"),
        (
            {"lengths": torch.tensor([1, 2, 3])},
            r"lengths is torch.int64 of shape \(3,\), must be int64 of shape \(2,\)",
        ),
        ({"lengths": torch.tensor([1, 12])}, r"lengths\[1\] is 12, must be in 0..11"),
        ({"starts": torch.tensor([0.0, 1.0])}, "starts is torch.float32"),
        ({"offsets": torch.tensor([0, 6])}, r"offsets is torch.int64 \(2,\) on cpu, must be int64 \(3,\)"),
        ({"offsets": torch.tensor([0.0, 2.0, 6.0])}, "offsets is torch.float32"),
        ({"offsets": torch.tensor([0, 2, 5])}, r"offsets is \[0, 2, 5\], must rise from 0 to the 6 rows of query"),
        ({"offsets": torch.tensor([0, 7, 6])}, r"offsets is \[0, 7, 6\], must rise from 0"),
        ({"offsets": torch.tensor([1, 2, 6])}, r"offsets is \[1, 2, 6\], must rise from 0"),
        (
            {"offsets": torch.tensor([0, 2, 6]), "mask": torch.ones(6, 1, 1, 12, dtype=torch.bool)},
            r"mask has shape \(6, 1, 1, 12\), must be \(1, 2, 1 or 4, 1, 12\)",
        ),
        ({"query": torch.zeros(6, 4, 1, 8, requires_grad=True)}, "query requires a gradient"),
    ],
)
def test_attention_says_what_is_wrong(change, message):
    call = {
        "query": torch.zeros(6, 4, 1, 8),
        "key": torch.zeros(2, 2, 11, 8),
        "value": torch.zeros(2, 2, 11, 8),
        "length": 11,
        "new_key": torch.zeros(6, 2, 1, 8),
        "new_value": torch.zeros(6, 2, 1, 8),
    }
    assert attention(**call).shape == (6, 1, 4, 8)
    with pytest.raises(ValueError, match=message):
        attention(**(call | change))


def test_torch_serves_what_the_kernel_does_not_take():
    def ask(tensor, mask=None):
        return taken(tensor, tensor, tensor, mask=mask)

    def ask_scan(tensor, mask=None):
        return scan.resolve("auto", tensor[0], tensor[1], mask) == "cpu"

    good = torch.zeros(2, 2, 4, 8)
    assert ask(good)
    assert ask(good, torch.ones(1, 1, 1, 4, dtype=torch.bool))
    assert not ask(good, torch.ones(1, 1, 1, 4))
    for narrow in (good.bfloat16(), good.half()):
        assert ask(narrow)
        assert not taken(narrow, narrow, good)
        assert not taken(good, good, narrow)
        assert not ask_scan(narrow)
    for bad in (good.double(), good.to("meta"), good.mT, torch.zeros(2, 2, 4, 8, requires_grad=True)):
        assert not ask(bad)
        assert not ask_scan(bad)
    with torch.no_grad():
        assert ask(torch.zeros(2, 2, 4, 8, requires_grad=True))
    assert ask_scan(good)
    assert not ask_scan(good, torch.ones(2, 4))


# ---- candidate_scan ---------------------------------------------------------------------------------------------


def draw_scan(choose: random.Random):
    batch, k, dim = choose.choice((1, 2, 3)), choose.choice((1, 2, 3, 4, 5, 9)), choose.choice((1, 3, 16, 65, 300, 770))
    length = choose.choice((1, 2, 15, 16, 17, 127, 128, 129, 300))
    wide = torch.randn(batch, k, dim + 3)
    history = torch.nn.functional.normalize(torch.randn(batch, length + 4, dim), dim=-1)
    history[:, length:] = torch.nan
    mask = torch.rand(batch, length + 4) > 0.4 if choose.random() < 0.5 else None
    if mask is not None:
        history[~mask] = torch.nan
    return wide[..., :dim] * 5, history, length, mask


def test_scan_against_loops(isa, threads):
    choose = random.Random(7)
    for index in range(60):
        states, history, length, mask = draw_scan(choose)
        threads(1 + index % 3)
        penalty, position = candidate_scan(states, history, length, mask)
        truth, _ = reference_scan(states, history, length, mask)
        assert torch.equal(penalty.isinf(), truth.isinf())
        assert (penalty.double() - truth)[truth.isfinite()].abs().max() < 5e-7
        unit = torch.nn.functional.normalize(states.double(), dim=-1)
        for b, c in truth.isfinite().nonzero().tolist():
            assert truth[b, c] - history[b, position[b, c]].double() @ unit[b, c] < 1e-6
        assert not position[truth.isinf()].any()


def test_scan_bits_do_not_depend_on_candidates_batch_or_threads(isa, threads):
    choose = random.Random(8)
    for _ in range(20):
        states, history, length, mask = draw_scan(choose)
        threads(1)
        penalty, position = candidate_scan(states, history, length, mask)
        threads(3)
        again = candidate_scan(states, history, length, mask)
        assert torch.equal(again[0], penalty)
        assert torch.equal(again[1], position)
        for b in range(states.shape[0]):
            one = slice(b, b + 1)
            alone = candidate_scan(states[one, :1], history[one], length, None if mask is None else mask[one])
            assert torch.equal(alone[0][:, 0], penalty[one, 0])
            assert torch.equal(alone[1][:, 0], position[one, 0])


@pytest.mark.parametrize("first", [0, 3, 130, 255])
def test_scan_takes_the_earliest_of_equals_and_the_first_nan(isa, first):
    state = torch.randn(1, 2, 20)
    history = torch.nn.functional.normalize(torch.randn(1, 260, 20), dim=-1)
    history[0, first::2] = torch.nn.functional.normalize(state[0, 1], dim=-1)
    penalty, position = candidate_scan(state, history, 260)
    assert position[0, 1] == first
    assert penalty[0, 1] == pytest.approx(1, abs=1e-6)
    history[0, first + 2], history[0, 258] = torch.nan, torch.nan
    penalty, position = candidate_scan(state, history, 260)
    assert penalty.isnan().all()
    assert position.tolist() == [[first + 2] * 2]


def test_scan_of_extreme_states(isa):
    history = torch.nn.functional.normalize(torch.randn(1, 9, 33), dim=-1)
    direction = torch.nn.functional.normalize(torch.randn(33), dim=-1)
    states = torch.stack([direction * 1e-9, direction * 1e15, torch.zeros(33), -direction])[None]
    penalty, _ = candidate_scan(states, history, 9)
    assert torch.allclose(penalty[0, 0], penalty[0, 1], atol=1e-6)
    assert penalty[0, 2] == 0
    assert torch.allclose(penalty[0, 3], -(history[0] @ direction).min(), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history": torch.zeros(2, 4, 6)}, r"history has shape \(2, 4, 6\), must be \(2, at least 5, 6\)"),
        ({"history": torch.zeros(2, 5, 7)}, r"history has shape \(2, 5, 7\)"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask has shape \(2, 4\), must be \(2, at least 5\)"),
        ({"mask": torch.ones(2, 5)}, "mask is torch.float32 on cpu, must be bool"),
        ({"hidden_states": torch.zeros(2, 3, 6).double()}, "hidden_states is torch.float64 on cpu"),
        ({"history": torch.zeros(2, 5, 6).half()}, "history is torch.float16 on cpu"),
    ],
)
def test_scan_says_what_is_wrong(change, message):
    call = {"hidden_states": torch.ones(2, 3, 6), "history": torch.zeros(2, 5, 6), "length": 5}
    assert candidate_scan(**call)[0].shape == (2, 3)
    with pytest.raises(ValueError, match=message):
        candidate_scan(**(call | change))
