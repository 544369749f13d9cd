"""Candidates against the history of hidden states, both less the history's mean: what the definition says in float64 of
the raw states."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from simctg_fast.ops.centered_scan import centered_scan
from simctg_fast.reference.centered import centered_scan as reference

from ..processes import run_child
from ..repository import WITH_TESTS

IMPLS = ("cpu", "torch")  # "triton" in a process of its own, below
MEAN_COSINE, OUTLIERS, TIMES = 0.998, 3, 30.0


@dataclass
class Operands:
    """What the operator gets, and what the definition says of the same raw states."""

    call: tuple[Tensor, ...]  # hidden_states, shift, history, squares, sums
    mask: Tensor | None
    lengths: Tensor
    penalty: Tensor
    position: Tensor

    def __call__(self, impl: str, **changes) -> tuple[Tensor, Tensor]:
        capacity = self.call[2].shape[1]
        return centered_scan(*self.call, capacity, self.mask, impl, self.lengths, **changes)


def raw_states(batch: int, count: int, dim: int, outliers: str = "", seed: int = 0) -> Tensor:
    """States of a mean cosine of .998, with three channels 30 times as large as the others: in what states share, or in
    what they do not as well."""
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(batch, 1, dim, generator=random, dtype=torch.float64)
    own = torch.randn(batch, count, dim, generator=random, dtype=torch.float64)
    if outliers:
        common[..., :OUTLIERS] *= TIMES
    if outliers == "varying":
        own[..., :OUTLIERS] *= TIMES
    ratio = own.square().sum(dim=-1).mean(dim=1)[:, None, None] / common.square().sum(dim=-1, keepdim=True)
    return (ratio * MEAN_COSINE / (1 - MEAN_COSINE)).sqrt() * common + own


def kept(states: Tensor, prompt: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of the real ``states (n, D)`` of a row, whose first ``prompt`` were there at once."""
    shift = states[:prompt].double().mean(dim=0).to(dtype)
    history = (states.float() - shift.float()).to(dtype)
    return shift, history, history.float().square().sum(dim=-1), history.double().sum(dim=0).float()


def operands(
    batch, k, lengths, dim, dtype=torch.float32, *, masked=False, outliers="", raw=None, model=None, seed=0
) -> Operands:
    """What is not in use, and padding, is NaN. ``model``: the dtype of states, where the history's is another."""
    capacity = max(lengths) + 5
    random = torch.Generator().manual_seed(seed + 1)
    raw = raw_states(batch, capacity + k, dim, outliers, seed) if raw is None else raw
    raw = raw.clone()
    raw[:, capacity] = raw[:, 0] + 0.2 * (raw[:, capacity] - raw[:, 1])  # a near repeat
    raw = raw.to(model or dtype).to(dtype)
    mask = torch.rand(batch, capacity, generator=random) > 0.3 if masked else None
    shift, sums = torch.zeros(batch, dim, dtype=dtype), torch.zeros(batch, dim)
    history = torch.full((batch, capacity, dim), torch.nan, dtype=dtype)
    squares = torch.full((batch, capacity), torch.nan)
    found = []
    for row, length in enumerate(lengths):
        places = torch.arange(length) if mask is None else mask[row, :length].nonzero().flatten()
        states = raw[row, places]
        if len(places):
            shift[row], history[row, places], squares[row, places], sums[row] = kept(
                states, 2 + len(places) // 3, dtype
            )
        penalty, position = reference(raw[row, capacity:], states)
        found.append((penalty, places[position] if len(places) >= 3 else position))
    penalty, position = (torch.stack(each) for each in zip(*found, strict=True))
    call = (raw[:, capacity:].contiguous(), shift, history, squares, sums)
    return Operands(call, mask, torch.tensor(lengths), penalty, position)


def check(given: Operands, impl: str, allowed: float) -> None:
    penalty, position = given(impl)
    assert penalty.dtype == torch.float32
    assert position.dtype == torch.int64
    assert (penalty.double() - given.penalty).abs().max() <= allowed
    # Where two positions are as near to each other as rounding goes, either may be it.
    assert torch.equal(position, given.position)


SHAPES = (
    {"batch": 1, "k": 1, "lengths": [3], "dim": 2},
    {"batch": 1, "k": 4, "lengths": [7], "dim": 64},
    {"batch": 2, "k": 3, "lengths": [33, 20], "dim": 31},
    {"batch": 3, "k": 8, "lengths": [130, 3, 129], "dim": 48},
    {"batch": 2, "k": 5, "lengths": [257, 128], "dim": 17},
    {"batch": 1, "k": 16, "lengths": [40], "dim": 100},
    {"batch": 4, "k": 2, "lengths": [0, 1, 2, 3], "dim": 9},
)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_largest_cosine(impl, shape, masked):
    check(operands(**shape, masked=masked), impl, 5e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpp_on_every_instruction_set(isa, shape):
    check(operands(**shape), "cpu", 5e-6)


ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 5e-4, torch.float16: 1e-4}


@pytest.mark.parametrize("outliers", ["", "common", "varying"])
@pytest.mark.parametrize(("impl", "dtype"), [("cpu", torch.float32), *(("torch", dtype) for dtype in ALLOWED)])
def test_states_that_are_all_alike(impl, dtype, outliers):
    """A mean cosine of .998, and three outlier channels of 30 times the others: the shift keeps what tells them apart,
    which the type has no room for."""
    raw = raw_states(1, 409, 256, outliers, seed=3)[0]
    unit = torch.nn.functional.normalize(raw, dim=-1)
    assert ((unit @ unit.T).sum() - 409) / (409 * 408) == pytest.approx(MEAN_COSINE, abs=5e-4)
    given = operands(1, 4, [400], 256, dtype, outliers=outliers, seed=3)
    penalty, _ = given(impl)
    assert (penalty.double() - given.penalty).abs().max() <= ALLOWED[dtype]
    assert given.penalty.max() > 0.9  # of the near repeat
    assert given.penalty.min() < 0.7


@pytest.mark.parametrize("impl", IMPLS)
def test_the_mean_moves_on(impl):
    """Far from the prompt's, whose mean the shift is: what it leaves is in the sum."""
    raw = raw_states(1, 49, 24)
    raw[:, 14:] += 60 * torch.randn(24, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    given = operands(1, 4, [40], 24, raw=raw)
    assert given.call[4].norm() / 40 > 10 * (raw[0, 20] - raw[0, 21]).norm()
    check(given, impl, 1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision_states_against_a_float32_history(impl):
    """What a half-precision model on a CPU does."""
    given = operands(2, 4, [21, 20], 32, model=torch.float16)
    states, *others = given.call
    given.call = (states.half(), *others)
    assert torch.equal(given.call[0].float(), states)
    check(given, impl, 5e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_float64(impl):
    given = operands(2, 4, [21, 20], 32)
    raw = raw_states(1, 24, 16)[0]
    shift = raw[:9].mean(dim=0)
    history = raw[:20] - shift
    call = (raw[20:], shift, history, history.square().sum(dim=-1), history.sum(dim=0))
    if impl == "cpu":
        with pytest.raises(ValueError, match="float64"):
            centered_scan(*(x[None] for x in call), 20, impl=impl)
        return
    penalty, position = centered_scan(*(x[None] for x in call), 20, impl=impl)
    truth, where = reference(raw[20:], raw[:20])
    torch.testing.assert_close(penalty[0], truth, atol=1e-13, rtol=0)
    assert torch.equal(position[0], where)
    assert given("torch")[0].dtype == torch.float32


# ---- where there is nothing to compare -----------------------------------------------------------------------------


def degenerate(impl: str) -> None:
    same = raw_states(1, 1, 20)[0].float()
    other = raw_states(1, 3, 20, seed=4)[0].float()
    # all states of the history are one: whatever comes next, and that one again, has nothing to be near to
    history = same.expand(9, -1)
    call = (torch.cat([other, same]), *kept(history, 4, torch.float32))
    penalty, position = centered_scan(*(x[None] for x in call), 9, impl=impl)
    assert penalty.tolist() == [[0, 0, 0, 0]]
    assert position.tolist() == [[0, 0, 0, 0]]
    # one of them is the mean
    history = torch.cat([other[:2], other[:2].mean(dim=0, keepdim=True), other[:2].mean(dim=0, keepdim=True)])
    call = (torch.stack([history[2], other[0], 2 * other[0] - history[2]]), *kept(history, 1, torch.float32))
    penalty, position = centered_scan(*(x[None] for x in call), 4, impl=impl)
    assert penalty[0, 0] == 0
    torch.testing.assert_close(penalty[0, 1:], torch.ones(2), atol=1e-5, rtol=0)
    assert penalty.max() <= 1
    assert position[0].tolist() == [0, 0, 0]
    # no states at all
    call = [torch.zeros(1, 2, 20), torch.zeros(1, 20), torch.zeros(1, 5, 20), torch.zeros(1, 5), torch.zeros(1, 20)]
    assert centered_scan(*call, 5, impl=impl)[0].tolist() == [[0, 0]]
    # 0, 1, 2 and 3 real positions, by lengths, by a mask, and by both
    states = raw_states(4, 8, 20).float()
    shift, history, squares, sums = (
        torch.stack(x) for x in zip(*(kept(s[:3], 3, torch.float32) for s in states), strict=True)
    )
    call = (states[:, 4:], shift, history, squares, sums)
    few = torch.arange(4)
    mask = few[:, None] > torch.arange(3)
    for options in ({"lengths": few}, {"mask": mask}, {"mask": mask.flip(1)}, {"lengths": few, "mask": mask}):
        penalty, position = centered_scan(*call, 3, impl=impl, **options)
        assert not penalty[:3].any()
        assert not position[:3].any()
        assert penalty[3].all()


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_compare(impl):
    degenerate(impl)


def nan_spreads(impl: str) -> None:
    given = operands(2, 4, [9, 9], 24)
    expected = given(impl)[0]
    given.call[0][0, 2, 3] = torch.nan
    given.call[0][1, 1, 0], given.call[0][1, 3] = torch.inf, -torch.inf
    bad = torch.zeros(2, 4, dtype=torch.bool)
    bad[0, 2] = bad[1, 1] = bad[1, 3] = True
    penalty, position = given(impl)
    assert torch.equal(penalty.isnan(), bad)
    assert torch.equal(penalty[~bad], expected[~bad])
    assert not position[bad].any()
    # so does a length that float32 does not hold, of numbers that it does
    given.call[0][1, 0] = 1e25
    bad[1, 0] = True
    assert torch.equal(given(impl)[0].isnan(), bad)
    given.lengths = torch.tensor([2, 1])
    assert torch.equal(given(impl)[0].isnan(), bad)
    assert not given(impl)[0][~bad].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_spreads_within_its_row_alone(impl):
    nan_spreads(impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1e-9, 1e15])
def test_of_any_size(impl, size):
    check(operands(1, 4, [40], 24, raw=size * raw_states(1, 49, 24)), impl, 5e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("repeats", [1, 60])
def test_earliest_position_wins_a_tie(impl, repeats):
    """The states are ±1 in turn, with mean 0."""
    history = torch.eye(4)[[0, 1, 0, 1] * repeats] * torch.tensor([1.0, 1, -1, -1] * repeats)[:, None]
    candidates = torch.tensor([[[0.0, 5, 0, 0], [-2.0, 0, 0, 0], [0, 0, 1.0, 0]]])
    call = (candidates, torch.zeros(1, 4), history[None], torch.ones(1, 4 * repeats), torch.zeros(1, 4))
    penalty, position = centered_scan(*call, 4 * repeats, impl=impl)
    assert penalty.tolist() == [[1, 1, 0]]
    assert position.tolist() == [[1, 2, 0]]


# ---- how it is called ----------------------------------------------------------------------------------------------


def test_bits_do_not_depend_on_candidates_batch_or_threads(isa, threads):
    for number, shape in enumerate(SHAPES):
        given = operands(**shape, masked=number % 2 == 1, seed=number)
        threads(1)
        penalty, position = given("cpu")
        threads(3)
        again = given("cpu")
        assert torch.equal(again[0], penalty)
        assert torch.equal(again[1], position)
        for row in range(len(penalty)):
            one = slice(row, row + 1)
            states, *others = (x[one] for x in given.call)
            mask, length = None if given.mask is None else given.mask[one], shape["lengths"][row]
            alone = centered_scan(states[:, :1], *others, length, mask, "cpu")
            assert torch.equal(alone[0][:, 0], penalty[one, 0])
            assert torch.equal(alone[1][:, 0], position[one, 0])


def strided(impl: str) -> None:
    given = operands(2, 4, [9, 7], 24)
    expected = given(impl)
    states, shift, history, squares, sums = given.call
    given.call = (
        torch.empty(4, 2, 48).transpose(0, 1)[..., ::2].copy_(states),
        torch.empty(2, 2, 24)[:, 1].copy_(shift),
        torch.empty(2, history.shape[1], 3, 24)[:, :, 1].copy_(history),
        torch.empty(2, 2, squares.shape[1])[:, 1].copy_(squares),
        torch.empty(2, 2, 24)[:, 1].copy_(sums),
    )
    if impl == "cpu":
        given.call = (given.call[0].contiguous(), *given.call[1:])
    for ours, theirs in zip(given(impl), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_operands(impl):
    strided(impl)


def test_arguments_are_not_written_to():
    given = operands(2, 4, [9, 7], 24, masked=True)
    copies = [x.clone() for x in given.call]
    given("auto")
    for now, before in zip(given.call, copies, strict=True):
        torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("masked", [False, True])
def test_operator(masked):
    given = operands(2, 4, [9, 9], 24, masked=masked)
    # opcheck compares results, and NaN with nothing
    states, shift, history, squares, sums = (x.nan_to_num(nan=0.5) for x in given.call)
    for hidden_states in (states, states.mT.contiguous().mT):
        call = (hidden_states, shift, history, squares, sums, 9, given.mask)
        torch.library.opcheck(torch.ops.simctg_fast.centered_scan, call)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    def scan(states, shift, history, squares, sums):
        return centered_scan(states, shift, history, squares, sums, 9)[0] * 2

    given = operands(2, 4, [9, 9], 24)
    compiled = torch.compile(scan, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert torch.equal(compiled(*given.call), scan(*given.call))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history": torch.zeros(2, 4, 6)}, r"history has shape \(2, 4, 6\), must be \(2, at least 5, 6\)"),
        ({"squares": torch.zeros(2, 4)}, r"squares has shape \(2, 4\), must be \(2, at least 5\)"),
        ({"mask": torch.ones(1, 5, dtype=torch.bool)}, r"mask has shape \(1, 5\), must be \(2, at least 5\)"),
        ({"shift": torch.zeros(2, 5)}, r"shift has shape \(2, 5\), must be \(2, 6\)"),
        ({"sums": torch.zeros(1, 6)}, r"sums has shape \(1, 6\), must be \(2, 6\)"),
        ({"sums": torch.zeros(2, 6).double()}, "sums is torch.float64 on cpu, must be float32"),
        ({"history": torch.zeros(2, 5, 6).half()}, "history is torch.float16 on cpu"),
        ({"mask": torch.ones(2, 5)}, "mask is torch.float32 on cpu, must be bool"),
        ({"lengths": torch.zeros(2)}, "lengths is torch.float32"),
        ({"lengths": torch.tensor([5, 6])}, r"lengths\[1\] is 6, must be in 0..5"),
        ({"impl": "gpu"}, "impl is 'gpu', must be one of"),
    ],
)
def test_says_what_is_wrong(change, message):
    call = {
        "hidden_states": torch.ones(2, 3, 6),
        "shift": torch.zeros(2, 6),
        "history": torch.zeros(2, 5, 6),
        "squares": torch.zeros(2, 5),
        "sums": torch.zeros(2, 6),
        "length": 5,
        "impl": "cpu",
    }
    assert centered_scan(**call)[0].shape == (2, 3)
    with pytest.raises(ValueError, match=message):
        centered_scan(**(call | change))


# ---- Triton --------------------------------------------------------------------------------------------------------


def check_kernel(shape: dict, dtype: torch.dtype = torch.float32, masked: bool = False, precision="highest") -> None:
    torch.set_float32_matmul_precision(precision)
    check(operands(**shape, dtype=dtype, masked=masked), "triton", 5e-6 if dtype == torch.float32 else 2e-4)


def check_kernel_edges() -> None:
    degenerate("triton")
    nan_spreads("triton")
    strided("triton")
    for outliers in ("common", "varying"):
        for dtype in (torch.float32, torch.float16):
            given = operands(1, 4, [100], 256, dtype, outliers=outliers, seed=3)
            assert (given("triton")[0].double() - given.penalty).abs().max() <= ALLOWED[dtype]
    given = operands(3, 4, [140, 3, 70], 16, masked=True)
    penalty, position = given("triton")
    again = given("triton")  # split in another order of arrival, and counters as they were
    assert torch.equal(again[0], penalty)
    assert torch.equal(again[1], position)
    for row in range(3):  # its own bits beside any others
        one = slice(row, row + 1)
        alone = centered_scan(*(x[one] for x in given.call), 145, given.mask[one], "triton", given.lengths[one])
        torch.testing.assert_close(alone[0], penalty[one], atol=5e-7, rtol=0)
    for call, message in (
        (
            lambda: centered_scan(given.call[0].repeat(1, 16, 1), *given.call[1:], 9, impl="triton"),
            "up to 63 candidates",
        ),
        (lambda: centered_scan(given.call[0].double(), *given.call[1:], 9, impl="triton"), "float64"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


MORE_SHAPES = [
    {"batch": batch, "k": k, "lengths": lengths[:batch], "dim": dim}
    for batch, k, dim in ((1, 63, 513), (5, 8, 1000), (2, 31, 128))
    for lengths in ([257] * 5, [300, 0, 31, 32, 33])
]


def interpreted(code: str) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": WITH_TESTS}
    source = f"import torch; from tests.ops import test_centered_scan as t; torch.manual_seed(0)\n{code}"
    done = run_child([sys.executable, "-W", "ignore", "-c", source], env=environment, cwd="/", timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_kernel_interpreted():
    interpreted(
        "t.check_kernel_edges(); [t.check_kernel(shape, masked=m) for shape in t.SHAPES for m in (False, True)]\n"
        "t.check_kernel(t.SHAPES[3], torch.float16); t.check_kernel(t.SHAPES[2], masked=True, precision='high')"
    )


@pytest.mark.full
@pytest.mark.timeout(3700)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_on_the_grid_interpreted(dtype):
    interpreted(f"[t.check_kernel(shape, {dtype}, masked) for shape in t.MORE_SHAPES for masked in (False, True)]")
