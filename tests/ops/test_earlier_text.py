"""What a text says against tokens that would repeat it, against the naive penalties of `reference/fsd.py`."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from simctg_fast.ops import _backends
from simctg_fast.ops.earlier_text import follower_scan, ngram_penalty, token_counts
from simctg_fast.reference import fsd as reference

from ..processes import run_child
from ..repository import WITH_TESTS

needs_extension = pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")
IMPLS = [pytest.param("cpu", marks=needs_extension), "torch"]
LENGTHS, STARTS, ROOM, WIDTH = (40, 33, 7, 1, 3, 2, 0), (0, 4, 2, 0, 1, 2, 0), 45, 9


def text(seed: int = 0, alphabet: int = 4):
    """Tokens of a tiny alphabet, lengths, where the texts begin, and picks, one of which is nowhere."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, alphabet, (len(LENGTHS), ROOM), generator=generator)
    lengths, starts = torch.tensor(LENGTHS), torch.tensor(STARTS)
    picks = torch.stack([torch.randperm(alphabet + 1, generator=generator)[:3] for _ in LENGTHS])
    return tokens, picks, lengths, starts


def states_of(tokens: torch.Tensor, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Raw states, the same of unit length, and their lengths; what is beyond a text's end or before it is NaN."""
    generator = torch.Generator().manual_seed(1)
    raw = torch.randn(*tokens.shape, WIDTH, generator=generator, dtype=torch.float64)
    raw *= 1 + 5 * torch.rand(*tokens.shape, 1, generator=generator, dtype=torch.float64)
    unit, norms = torch.nn.functional.normalize(raw, dim=-1).to(dtype), raw.norm(dim=-1).float()
    for row, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        for x in (unit, norms):
            x[row, :start] = float("nan")
            x[row, length:] = float("nan")
    return raw, unit, norms


def check_vectors(order: int, scan, tolerance: float = 2e-6, dtype=torch.float32) -> None:
    """`scan` of the operator's arguments against the definition, a text at a time; texts of any order go together."""
    tokens, picks, lengths, starts = text(order)
    raw, unit, norms = states_of(tokens, dtype)
    if dtype != torch.float32:  # the truth is of the states as they are kept
        raw = unit.double() * norms.double()[..., None]
    orders = torch.full_like(lengths, order)
    orders[1] = 2
    penalty, position = scan(unit, tokens, picks, lengths, starts, orders, norms if order > 2 else None, order)
    for row, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        inside, n = tokens[row, start:length].tolist(), int(orders[row])
        for column, pick in enumerate(picks[row].tolist()):
            truth = reference.vector_penalty(raw[row, start:length], inside, pick, n) if len(inside) >= n else 0.0
            assert abs(float(penalty[row, column]) - truth) < tolerance, (row, column)
            at = int(position[row, column])
            stands = [start + j for j in range(n - 1, len(inside)) if inside[j] == pick]
            assert at in stands if stands else at == -1
            if truth > 0:
                newest = raw[row, length - n + 1 : length].flatten()
                cosine = torch.cosine_similarity(newest, raw[row, at - n + 1 : at].flatten(), dim=0)
                assert abs(float(cosine) - truth) < tolerance


def interpreted(unit, tokens, picks, lengths, starts, orders, norms, longest):
    from simctg_fast.kernels import earlier_text as kernels

    return kernels.follower_scan(unit, tokens, picks, lengths, starts, orders, norms, longest)


def through(impl: str):
    return lambda unit, tokens, picks, lengths, starts, orders, norms, longest: follower_scan(
        unit, tokens, picks, lengths, starts, orders, norms, impl=impl, longest=longest
    )


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("order", [2, 3, 5])
def test_vectors(impl, order):
    check_vectors(order, through(impl))


@needs_extension
def test_vectors_in_cpp_on_every_instruction_set(isa):
    for order in (2, 3):
        check_vectors(order, through("cpu"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_vectors_of_other_types(dtype, tolerance):
    check_vectors(2, through("auto"), tolerance, dtype)


def test_vectors_in_triton():
    """In the interpreter, which has to be chosen before triton is imported."""
    pytest.importorskip("triton")
    code = "from tests.ops.test_earlier_text import *; in_the_interpreter()"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": WITH_TESTS}
    done = run_child([sys.executable, "-W", "ignore", "-c", code], env=environment, cwd="/")
    assert done.returncode == 0, done.stderr


def in_the_interpreter() -> None:
    torch.utils.deterministic.fill_uninitialized_memory = True
    from simctg_fast.kernels import earlier_text as kernels

    kernels.BLOCK_T = 8  # several tiles, and several shares of them
    for order in (2, 3, 5):
        check_vectors(order, interpreted)
    check_vectors(2, interpreted, 2e-3, torch.float16)  # of length 1 up to rounding
    _long(interpreted)
    _nan(interpreted)


def _long(scan) -> None:
    """Many of one token: all of them count, the earliest of equals is named."""
    count, width = 5000, 16
    states = torch.nn.functional.normalize(torch.randn(1, count, width), dim=-1)
    tokens = torch.zeros(1, count, dtype=torch.long)
    states[0, 4321] = states[0, count - 1]
    states[0, 4500] = states[0, count - 1]
    picks, lengths = torch.tensor([[0, 1]]), torch.tensor([count])
    penalty, position = scan(states, tokens, picks, lengths, None, torch.tensor([2]), None, 2)
    assert abs(float(penalty[0, 0]) - 1) < 1e-6
    assert position.tolist() == [[4322, -1]]
    assert float(penalty[0, 1]) == 0


def _nan(scan) -> None:
    """A state that overflowed says so, to the tokens that it concerns alone."""
    tokens, picks = torch.tensor([[1, 2, 1, 3, 3]]), torch.tensor([[1, 2, 3]])
    states = torch.nn.functional.normalize(torch.ones(1, 5, 4), dim=-1)
    states[0, 1] = float("nan")
    penalty, _ = scan(states, tokens, picks, torch.tensor([5]), None, torch.tensor([2]), None, 2)
    assert penalty[0].isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("check", [_long, _nan])
def test_many_and_none(impl, check):
    check(through(impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("alphabet", [1, 2, 4])
@pytest.mark.parametrize("beta", [0.0, 0.6, 1.0])
def test_ngrams(impl, alphabet, beta):
    tokens, picks, lengths, starts = text(alphabet)
    tokens %= alphabet
    orders = torch.tensor([3, 4, 3, 2, 1, 3, 5])
    betas = torch.full(orders.shape, beta, dtype=torch.float64)
    betas[0] = 0.9
    penalty, position = ngram_penalty(tokens, picks, lengths, starts, orders=orders, betas=betas, impl=impl, longest=5)
    for row, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        inside, n = tokens[row, start:length].tolist(), int(orders[row])
        for column, pick in enumerate(picks[row].tolist()):
            truth = reference.ngram_penalty(inside, pick, n, float(betas[row])) if inside else 0.0
            assert abs(float(penalty[row, column]) - truth) < 1e-6, (row, column)
            assert int(position[row, column]) == last_behind_longest(inside, pick, n, start), (row, column)


def last_behind_longest(inside: list[int], pick: int, n: int, start: int) -> int:
    if len(inside) < n - 1:
        return -1
    for size in range(n - 1, -1, -1):
        context = inside[len(inside) - size :]
        places = [j for j in range(size, len(inside)) if inside[j] == pick and inside[j - size : j] == context]
        if places:
            return start + places[-1]
    return -1


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_no_token_is_not_counted(impl):
    """Positions of images and learned prompts, and padding in a text's midst: −1, wherever they stand."""
    tokens = torch.tensor([[-1, -1, 5, 6, 5, 6, 5, 9]])
    picks, lengths, one = torch.tensor([[6, 5, -1]]), torch.tensor([7]), torch.tensor([3])
    options = {"orders": one, "betas": torch.tensor([0.9], dtype=torch.float64), "longest": 3, "impl": impl}
    penalty, position = ngram_penalty(tokens, picks, lengths, **options)
    truth = [reference.ngram_penalty([5, 6, 5, 6, 5], v, 3, 0.9) for v in (6, 5)]
    torch.testing.assert_close(penalty[0, :2].double(), torch.tensor(truth, dtype=torch.float64))
    assert (float(penalty[0, 2]), position.tolist()) == (0.0, [[5, 6, -1]])
    states = torch.nn.functional.normalize(torch.randn(1, 8, 4), dim=-1)
    states[0, 1] = states[0, 6]  # before the first token, and no token's
    found, at = follower_scan(states, tokens, picks, lengths, impl=impl)
    truth = max(0.0, *(float(states[0, j] @ states[0, 6]) for j in (3, 5)))
    assert abs(float(found[0, 1]) - truth) < 1e-6
    assert at[0, 2] == -1


def test_counts():
    tokens, picks, lengths, starts = text(5)
    found = token_counts(tokens, picks, lengths, starts)
    for row, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        inside = tokens[row, start:length].tolist()
        assert found[row].tolist() == [inside.count(v) for v in picks[row].tolist()]


@needs_extension
def test_rows_and_threads_change_nothing():
    tokens, picks, lengths, starts = text(2)
    _, unit, norms = states_of(tokens)
    orders, betas = torch.full_like(lengths, 3), torch.full(lengths.shape, 0.9, dtype=torch.float64)
    threads = torch.get_num_threads()

    def run(rows: slice) -> list[torch.Tensor]:
        part = [x[rows] for x in (tokens, picks, lengths, starts)]
        vectors = follower_scan(unit[rows], *part, orders[rows], norms[rows], impl="cpu", longest=3)
        grams = ngram_penalty(*part, orders=orders[rows], betas=betas[rows], impl="cpu", longest=3)
        return [*vectors, *grams]

    together = run(slice(None))
    try:
        torch.set_num_threads(1)
        alone = [torch.cat(parts) for parts in zip(*(run(slice(r, r + 1)) for r in range(len(LENGTHS))), strict=True)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lengths": torch.tensor([9])}, r"lengths\[0\]"),
        ({"starts": torch.tensor([7])}, r"starts\[0\]"),
        ({"orders": torch.tensor([1])}, "orders"),
        ({"tokens": torch.zeros(1, 8, dtype=torch.int32)}, "tokens is torch.int32"),
        ({"history": torch.zeros(1, 8, 4, dtype=torch.float64)}, "history is torch.float64"),
        ({"lengths": torch.tensor([5, 5])}, "lengths"),
        ({"longest": 3}, "norms is None"),
    ],
)
@needs_extension
def test_what_is_refused(changed, message):
    arguments = {
        "history": torch.zeros(1, 8, 4),
        "tokens": torch.zeros(1, 8, dtype=torch.long),
        "picks": torch.tensor([[0, 1]]),
        "lengths": torch.tensor([6]),
        "starts": torch.tensor([0]),
        "orders": torch.tensor([2]),
    }
    with pytest.raises(ValueError, match=message):
        follower_scan(**arguments | changed, impl="cpu")


def test_opcheck():
    tokens, picks, lengths, starts = text(2)
    unit, orders = states_of(tokens)[1].nan_to_num(nan=0.5), torch.full_like(lengths, 2)
    betas = torch.full(lengths.shape, 0.9, dtype=torch.float64)
    ops = torch.ops.simctg_fast
    for states in (unit, unit.mT.contiguous().mT):
        torch.library.opcheck(ops.follower_scan, (states, tokens, picks, lengths, starts, orders, None))
    torch.library.opcheck(ops.ngram_penalty, (tokens, picks, lengths, starts, orders, betas), {"longest": 2})
