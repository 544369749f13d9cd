"""The n best paths: exact and in order where scores tie, in bounded memory whatever they are; low rank and dense."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from simctg_fast.ops import _backends
from simctg_fast.ops.crf_dense import dense_kbest
from simctg_fast.ops.crf_viterbi import crf_kbest

from ..processes import run_child
from ..repository import INSTALLED

needs_extension = pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")
IMPLS = ("torch", pytest.param("cpu", marks=needs_extension))
NEVER = float("-inf")


def by_enumeration(emissions, edges, paths):
    """`(score, path)` of the best `paths` of finite score; equals by the last slot, then the one before it, ...

    `emissions` is a list of T lists, `edges` of T - 1 tables of floats.
    """
    found = []
    if not emissions:
        return found
    for path in itertools.product(range(len(emissions[0])), repeat=len(emissions)):
        score = sum(row[k] for row, k in zip(emissions, path, strict=True))
        score += sum(table[a][b] for table, a, b in zip(edges, path, path[1:], strict=False))
        if score > NEVER:
            found.append((-score, path[::-1]))
    return [(-score, list(backwards[::-1])) for score, backwards in sorted(found)[:paths]]


def check(slots, emissions, edges, lengths, paths, *, near=None):
    """`near`: how much scores that are not exact may be off; paths of equal scores are then not told apart."""
    for b, length in enumerate(lengths.tolist()):
        expected = by_enumeration(emissions[b, :length].tolist(), [x.tolist() for x in edges[b]], paths)
        found = [path for path in slots[b, :length].T.tolist() if path and path[0] >= 0]
        assert (slots[b, length:] == -1).all()
        assert (slots[b, :, len(expected) :] == -1).all()
        if near is None:
            assert found == [path for _, path in expected]
            continue
        assert len({tuple(path) for path in found}) == len(expected)
        scores = {tuple(path): score for score, path in by_enumeration(emissions[b, :length].tolist(), edges[b], 10**9)}
        for path, (score, _) in zip(found, expected, strict=True):
            assert abs(float(scores[tuple(path)]) - float(score)) <= near


@pytest.mark.parametrize(  # the extension computes in float32
    ("impl", "dtype"),
    [("torch", torch.float32), ("torch", torch.float64), pytest.param("cpu", torch.float32, marks=needs_extension)],
)
def test_ties_of_one_matrix(impl, dtype):
    """Whole numbers: sums are exact, most paths tie, and some moves and whole columns are forbidden."""
    for _ in range(60):
        tags, length, paths = (int(torch.randint(low, high, ())) for low, high in ((1, 5), (1, 5), (1, 40)))
        emissions, transitions = torch.randint(0, 3, (3, length, tags)), torch.randint(0, 3, (tags, tags))
        emissions, transitions = emissions.to(dtype), transitions.to(dtype)
        emissions[torch.rand(emissions.shape) < 0.15] = NEVER
        transitions[torch.rand(transitions.shape) < 0.2] = NEVER
        transitions[:, torch.rand(tags) < 0.1] = NEVER
        lengths = torch.randint(0, length + 1, (3,))
        slots = dense_kbest(emissions, transitions, lengths, paths, impl=impl)
        check(slots, emissions, [[transitions] * (length - 1)] * 3, lengths, paths)


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_of_low_rank(impl):
    for _ in range(60):
        beam, length, paths = (int(torch.randint(low, high, ())) for low, high in ((1, 5), (1, 5), (1, 40)))
        tokens = torch.rand(3, length, 9).argsort(2)[..., :beam].contiguous()
        left, right = torch.randint(-1, 2, (2, 9, 2)).float()
        scores = torch.randint(0, 2, (3, length, beam)).float()
        scores[torch.rand(scores.shape) < 0.15] = NEVER
        lengths = torch.randint(0, length + 1, (3,))
        edges = [[left[tokens[b, t]] @ right[tokens[b, t + 1]].T for t in range(length - 1)] for b in range(3)]
        slots = crf_kbest(scores, tokens, left, right, lengths, paths, impl=impl)
        check(slots, scores, edges, lengths, paths)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1.0, 1e-6], ids=["apart", "near ties"])
def test_random_scores(impl, size):
    """Against float64; scores that rounding does not tell apart may come in any order."""
    for _ in range(20):
        emissions, transitions = torch.randn(2, 4, 4) * size, torch.randn(4, 4) * size
        if size < 1:
            emissions, transitions = emissions + 1, transitions + 0.3
        lengths = torch.tensor([4, 3])
        slots = dense_kbest(emissions, transitions, lengths, 50, impl=impl)
        edges = [[transitions.double()] * 3] * 2
        check(slots, emissions.double(), edges, lengths, 50, near=3e-6)


def test_instruction_sets(isa):
    test_ties_of_one_matrix("cpu", torch.float32)
    test_ties_of_low_rank("cpu")
    test_random_scores("cpu", 1.0)


@needs_extension
@pytest.mark.parametrize("kind", ["equal", "whole", "one good slot"])
def test_backends_agree_where_sums_are_exact(kind):
    scores = torch.zeros(2, 30, 20)
    if kind == "whole":
        scores = torch.randint(0, 2, scores.shape).float()
    elif kind == "one good slot":
        scores[:, :, 7] = 1
    transitions, lengths = torch.zeros(20, 20), torch.tensor([30, 17])
    first, second = (dense_kbest(scores, transitions, lengths, 100, impl=impl) for impl in ("cpu", "torch"))
    assert torch.equal(first, second)
    tokens, table = torch.arange(20).expand(2, 30, 20), torch.zeros(20, 3)
    for impl in ("cpu", "torch"):
        assert torch.equal(crf_kbest(scores, tokens, table, table, lengths, 100, impl=impl), first)


MEMORY = """
import resource, sys, torch
from simctg_fast.ops.crf_viterbi import crf_kbest
from simctg_fast.ops.crf_dense import dense_kbest

torch.set_num_threads(1)
impl, kind = sys.argv[1:3]
beam, length, paths = map(int, sys.argv[3:])
scores = torch.zeros(1, length, beam)
if kind == "near":
    scores += torch.rand(scores.shape) * 1e-6
tokens, table = torch.arange(beam).expand(1, length, beam), torch.zeros(beam, 4)

def both(scores, paths):
    first = crf_kbest(scores, tokens[:, : scores.shape[1]], table, table, None, paths, impl=impl)
    second = dense_kbest(scores, torch.zeros(beam, beam), None, paths, impl=impl)
    assert kind == "near" or torch.equal(first, second)
    assert all(len({tuple(path) for path in x[0].T.tolist()}) == paths and x.min() >= 0 for x in (first, second))

both(scores[:, :2], 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
both(scores, paths)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


LARGE = (256, 97, 64)


@pytest.mark.parametrize("kind", ["equal", "near"])
@pytest.mark.parametrize(
    ("impl", "size"),
    [
        ("torch", (64, 9, 8)),
        pytest.param("cpu", (64, 9, 8), marks=[needs_extension, pytest.mark.full]),
        pytest.param("cpu", LARGE, marks=needs_extension),
        pytest.param("torch", LARGE, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_memory(impl, kind, size):
    """Megabytes that the process has grown by: 16 bytes for each of the n T K entries, and what torch works in."""
    command = [sys.executable, "-c", MEMORY, impl, kind, *size]
    out = run_child(command, check=True, cwd=INSTALLED)
    beam, length, paths = size
    assert float(out.stdout) < 16 * beam * length * paths / 2**20 + (160 if impl == "torch" else 20)


def rank_of(emissions, edges, path):
    """How many paths beat `path`, counted in float64: by the number of better prefixes."""
    total = sum(emissions[t, k] for t, k in enumerate(path)) + sum(edges[a, b] for a, b in itertools.pairwise(path))
    scores = emissions[0][:, None]  # (K, prefixes)
    for row in emissions[1:]:
        scores = (scores[:, None, :] + edges[:, :, None]).transpose(0, 1).flatten(1) + row[:, None]
    return int((scores > total + 1e-4).sum())


@pytest.mark.parametrize("impl", IMPLS)
def test_the_last_of_many_paths(impl):
    emissions, transitions = torch.randn(1, 7, 6), torch.randn(6, 6)
    slots = dense_kbest(emissions, transitions, None, 2000, impl=impl)[0]
    assert len({tuple(path) for path in slots.T.tolist()}) == 2000
    for n in (0, 700, 1999):
        assert abs(rank_of(emissions[0].double(), transitions.double(), slots[:, n].tolist()) - n) <= 2


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_that_are_no_numbers_stay_inside(impl):
    """The operator itself checks no values: whatever comes, slots are slots."""
    for value in (float("nan"), float("inf")):
        for place in ((0, 0, 1), (0, 2, 0), (0, 3, 2)):
            emissions = torch.randn(1, 4, 3)
            emissions[place] = value
            slots = dense_kbest(emissions, torch.randn(3, 3), None, 9, impl=impl)
            assert slots.min() >= -1
            assert slots.max() < 3


@pytest.mark.parametrize("impl", IMPLS)
def test_operator(impl):
    emissions, transitions, lengths = torch.randn(3, 4, 5), torch.randn(5, 5), torch.tensor([4, 0, 2])
    operator = torch.ops.simctg_fast.dense_kbest
    for own in (emissions, emissions.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.library.opcheck(operator, (own, transitions.t(), lengths, 3), {"impl": impl})

    def call(emissions, transitions, lengths):
        return dense_kbest(emissions, transitions, lengths, 3, impl=impl) + 1

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (5, 3):
        arguments = (emissions[..., :size], transitions[:size, :size], lengths)
        assert torch.equal(compiled(*arguments), call(*arguments))
    assert dense_kbest(emissions[:0], transitions, None, 3, impl=impl).shape == (0, 4, 3)
    for message, arguments in (
        (r"emissions has shape \(4, 5\)", (emissions[0], transitions, None, 3)),
        (r"transitions is .* \(4, 4\), must be torch.float32 \(5, 5\)", (emissions, transitions[1:, 1:], None, 3)),
        ("n is 0, must be at least 1", (emissions, transitions, None, 0)),
        ("lengths is torch.int32", (emissions, transitions, lengths.int(), 1)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            dense_kbest(*arguments, impl=impl)
