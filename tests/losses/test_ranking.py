"""In-batch negatives over columns: directions, hardness and the weight of own hard negatives, against the definition
written out pair by pair in float64; and what bad arguments of the SimCSE functions do."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from simctg_fast import SimCSELoss, simcse_sup_loss, simcse_unsup_loss
from simctg_fast.functional import info_nce, simcse_loss_from_embeddings
from simctg_fast.ops import simcse as ops
from simctg_fast.ranking import ranking_loss
from simctg_fast.reference import simcse as reference

from ..two_processes import run_two

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
EVERY_DIRECTION = [("query_to_doc", *rest) for n in range(4) for rest in itertools.combinations(DIRECTIONS[1:], n)]


def cosine(left, right):
    """Of two vectors; 0 where one is zero."""
    length = left.norm() * right.norm()
    return (left * right).sum() / length if float(length.detach()) > 0 else (left * right).sum() * 0


def by_hand(
    anchors, documents, scale, directions=("query_to_doc",), mode="joint", hardness=None, strength=0.0, weight=0.0
):
    """One anchor, one pair at a time, as the definition has it."""
    total, n = 0.0, len(anchors)
    for i in range(n):
        sums = {direction: [] for direction in directions}
        positive = scale * cosine(anchors[i], documents[0][i])
        for c, column in enumerate(documents):
            for j in range(n):
                similarity = cosine(anchors[i], column[j])
                own_positive, own_hard = j == i and c == 0, j == i and c > 0
                harder = {
                    None: False,
                    "in_batch_negatives": j != i,
                    "hard_negatives": own_hard,
                    "all_negatives": not own_positive,
                }[hardness]
                logit = scale * similarity + (strength * similarity.detach() if harder else 0.0)
                sums["query_to_doc"].append(logit + (weight if own_hard else 0.0))
                if j != i and "doc_to_doc" in sums:
                    sums["doc_to_doc"].append(scale * cosine(documents[0][i], column[j]))
        for j in range(n):
            if j != i and "query_to_query" in sums:
                sums["query_to_query"].append(scale * cosine(anchors[i], anchors[j]))
            if "doc_to_query" in sums:
                sums["doc_to_query"].append(scale * cosine(documents[0][i], anchors[j]))
        if mode == "joint":
            total = total + torch.stack([x for xs in sums.values() for x in xs]).logsumexp(0) - positive
        else:
            total = total + torch.stack([torch.stack(x).logsumexp(0) for x in sums.values()]).mean() - positive
    return total / n


def columns_of(count, rows=5, width=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for _ in range(count)
    ]


def value_and_gradients(function, columns):
    leaves = [column.detach().clone().requires_grad_() for column in columns]
    loss = function(leaves[0], leaves[1:])
    return loss.detach(), torch.autograd.grad(loss, leaves)


def agree(got, expected, **tolerance):
    torch.testing.assert_close(got[0].to(expected[0].dtype), expected[0], **tolerance)
    for left, right in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(left.to(right.dtype), right, **tolerance)


@pytest.fixture(params=["operator", "matrix"])
def path(request, monkeypatch):
    """The operators, and the whole matrix that small problems on CUDA get."""
    if request.param == "matrix":
        monkeypatch.setattr(ops, "_delegates", lambda impl, queries, columns: True)
    return request.param


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("directions", EVERY_DIRECTION)
def test_directions_and_hardness(directions, columns, path):
    modes = ["joint"] if {"query_to_query", "doc_to_doc"} & set(directions) else ["joint", "per_direction"]
    hardness = [None, "in_batch_negatives", "hard_negatives", "all_negatives"]
    for mode, hard, scale in itertools.product(modes, hardness, (20.0, 3.0)):
        rule, options = (directions, mode, hard, 4.0), {"partition_mode": mode, "hardness_mode": hard}
        leaves = columns_of(columns, rows=3)
        expected = value_and_gradients(lambda a, d, s=scale, r=rule: by_hand(a, d, s, *r), leaves)
        got = value_and_gradients(
            lambda a, d, s=scale, o=options: ranking_loss(a, d, s, directions=directions, hardness_strength=4.0, **o),
            leaves,
        )
        agree(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weight", [-math.inf, -3.0, math.log(2), 5.0, 800.0])
@pytest.mark.parametrize("columns", [3, 4])
def test_weight_of_hard_negatives(columns, weight, path):
    """Added to the logit of the anchor's own; the supervised loss, from embeddings, with `symmetric` and hardness."""
    leaves = columns_of(columns)
    expected = value_and_gradients(lambda a, d: by_hand(a, d, 20.0, weight=weight), leaves)
    for impl in ("auto", "torch"):
        got = value_and_gradients(
            lambda a, d, impl=impl: simcse_loss_from_embeddings(
                a, d[0], torch.cat(d[1:]), hard_negative_weight=weight, impl=impl
            ),
            leaves,
        )
        agree(got, expected, rtol=1e-10, atol=1e-12)
    both = value_and_gradients(
        lambda a, d: by_hand(a, d, 20.0, weight=weight) / 2 + by_hand(d[0], [a], 20.0) / 2, leaves
    )
    got = value_and_gradients(
        lambda a, d: simcse_loss_from_embeddings(
            a, d[0], torch.cat(d[1:]), symmetric=True, hard_negative_weight=weight
        ),
        leaves,
    )
    agree(got, both, rtol=1e-10, atol=1e-12)
    for hardness in ("in_batch_negatives", "hard_negatives", "all_negatives"):
        options = {"hardness_mode": hardness, "hardness_strength": 2.0}
        expected = value_and_gradients(
            lambda a, d, h=hardness: by_hand(a, d, 20.0, hardness=h, strength=2.0, weight=weight), leaves
        )
        got = value_and_gradients(
            lambda a, d, o=options: ranking_loss(a, d, 20.0, hard_negative_weight=weight, **o), leaves
        )
        agree(got, expected, rtol=1e-10, atol=1e-12)


def test_weight_in_triples():
    triples = torch.randn(15, 8, dtype=torch.float64, requires_grad=True)
    expected = by_hand(triples[0::3], [triples[1::3], triples[2::3]], 10.0, weight=1.5)
    loss = simcse_sup_loss(triples, lamda=0.1, hard_negative_weight=1.5)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(loss, reference.simcse_sup_loss(triples, 0.1, hard_negative_weight=1.5))
    torch.testing.assert_close(torch.autograd.grad(loss, triples), torch.autograd.grad(expected, triples))
    module = SimCSELoss(0.1, supervised=True, hard_negative_weight=1.5)
    assert torch.equal(module(triples), loss)
    assert "hard_negative_weight=1.5" in repr(module)
    # 0 is the loss without a weight, log 2 the hard negative counted twice, -inf left out.
    assert torch.equal(simcse_sup_loss(triples, hard_negative_weight=0.0), simcse_sup_loss(triples))
    one = triples[:3].detach()
    twice = simcse_loss_from_embeddings(one[0:1], one[1:2], one[2:].repeat(2, 1))
    torch.testing.assert_close(simcse_sup_loss(one, hard_negative_weight=math.log(2)), twice)
    assert float(simcse_sup_loss(one, hard_negative_weight=-math.inf)) == pytest.approx(0.0, abs=1e-12)


def test_the_reference_is_the_definition():
    for columns, directions in itertools.product((2, 4), EVERY_DIRECTION):
        for hardness in (None, "in_batch_negatives", "hard_negatives", "all_negatives"):
            mode = "joint" if {"query_to_query", "doc_to_doc"} & set(directions) else "per_direction"
            rule = (7.0, directions, mode, hardness, 2.0, 0.5)
            leaves = columns_of(columns, rows=3)
            agree(
                value_and_gradients(lambda a, d, r=rule: reference.ranking_loss(a, d, *r), leaves),
                value_and_gradients(lambda a, d, r=rule: by_hand(a, d, *r), leaves),
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types(dtype, path):
    """Not worse than a few roundings of logits, over blocks that do not divide the rows."""
    leaves = [column.detach() for column in columns_of(3, rows=700, width=32, dtype=dtype)]
    options = {"directions": DIRECTIONS, "hardness_mode": "in_batch_negatives", "hardness_strength": 5.0}
    wide = [column.double() for column in leaves]
    options["hard_negative_weight"] = 1.0
    expected = value_and_gradients(lambda a, d: reference.ranking_loss(a, d, 20.0, **options), wide)
    got = value_and_gradients(lambda a, d: ranking_loss(a, d, 20.0, **options), leaves)
    assert got[0].dtype == torch.float32
    unit = torch.finfo(dtype).eps
    assert float(got[0]) == pytest.approx(float(expected[0]), rel=50 * unit + 1e-5)
    for left, right in zip(got[1], expected[1], strict=True):
        assert left.dtype == dtype
        assert float((left.double() - right).norm()) <= (20 * unit + 1e-5) * float(right.norm())


def test_zero_vectors_and_one_row(path):
    """A zero vector has cosine 0 and gradient 0, whatever the path; a batch of one has no others."""
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        leaves = [column.detach().to(dtype) for column in columns_of(3)]
        leaves[0][1] = leaves[1][2] = leaves[2][0] = 0.0
        options = {"directions": DIRECTIONS, "hardness_mode": "all_negatives", "hardness_strength": 2.0}
        wide = [column.double() for column in leaves]
        expected = value_and_gradients(
            lambda a, d: by_hand(a, d, 20.0, DIRECTIONS, "joint", "all_negatives", 2.0), wide
        )
        got = value_and_gradients(lambda a, d, o=options: ranking_loss(a, d, 20.0, **o), leaves)
        assert float(got[0]) == pytest.approx(float(expected[0]), rel=20 * torch.finfo(dtype).eps)
        for column, row in ((0, 1), (1, 2), (2, 0)):
            assert not got[1][column][row].any()
        for gradient in got[1]:
            assert gradient.isfinite().all()
    one = columns_of(3, rows=1)
    for hardness in (None, "in_batch_negatives", "hard_negatives", "all_negatives"):
        options = {"directions": DIRECTIONS, "hardness_mode": hardness, "hardness_strength": 2.0}
        expected = value_and_gradients(lambda a, d, h=hardness: by_hand(a, d, 20.0, DIRECTIONS, "joint", h, 2.0), one)
        agree(value_and_gradients(lambda a, d, o=options: ranking_loss(a, d, 20.0, **o), one), expected)


def test_memory_is_linear():
    """No tensor is larger than a block of 512 x 512, or than the rows."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple) else (result,):
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.numel())
            return result

    columns = [column.detach().float().requires_grad_() for column in columns_of(4, rows=2048, width=16)]
    for hardness in ("in_batch_negatives", "hard_negatives", "all_negatives"):
        with Watch():
            ranking_loss(
                columns[0],
                columns[1:],
                20.0,
                directions=DIRECTIONS,
                hardness_mode=hardness,
                hardness_strength=5.0,
                hard_negative_weight=1.0,
            ).backward()
    assert 0 < largest <= 512 * 512


GATHERED = """
from simctg_fast.functional import simcse_loss_from_embeddings
from simctg_fast.ranking import ranking_loss
from simctg_fast.reference import simcse as reference
result = {}
for name, (options, columns, cut) in argument.items():
    own = [c[:cut] if rank == 0 else c[cut:] for c in columns]
    own = [c.clone().requires_grad_() for c in own]
    if name.startswith("weighted"):
        loss = simcse_loss_from_embeddings(own[0], own[1], torch.cat(own[2:]), gather_across_devices=True, **options)
    else:
        loss = ranking_loss(own[0], own[1:], 20.0, gather_across_devices=True, **options)
    loss.backward()
    result[name] = loss.item(), [c.grad for c in own]
"""


def test_gather_across_devices(tmp_path):
    """The average over two processes, of values and of gradients, is the loss of all rows in one."""
    cases = {
        "every direction": ({"directions": DIRECTIONS}, 3),
        "hardness": ({"hardness_mode": "in_batch_negatives", "hardness_strength": 3.0}, 4),
        "hard ones": ({"hardness_mode": "hard_negatives", "hardness_strength": 3.0}, 4),
        "all": ({"hardness_mode": "all_negatives", "hardness_strength": 3.0}, 3),
        "weighted": ({"hard_negative_weight": 1.0, "symmetric": True}, 4),
    }
    argument = {
        f"{name}, {cut} rows in the first": (options, [c.detach() for c in columns_of(count, rows=7)], cut)
        for name, (options, count) in cases.items()
        for cut in (3, 0)
    }
    results = run_two(tmp_path, GATHERED, argument)
    for name, (options, columns, _) in argument.items():
        if name.startswith("weighted"):
            expected = value_and_gradients(
                lambda a, d, o=options: simcse_loss_from_embeddings(a, d[0], torch.cat(d[1:]), **o), columns
            )
        else:
            expected = value_and_gradients(lambda a, d, o=options: ranking_loss(a, d, 20.0, **o), columns)
        value = torch.tensor(sum(result[name][0] for result in results) / 2, dtype=torch.float64)
        gradients = [torch.cat([r[name][1][i] for r in results]) / 2 for i in range(len(columns))]
        agree((value, gradients), expected, rtol=1e-9, atol=1e-12)


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_targets_of_every_kind():
    queries, keys = torch.randn(3, 8), torch.randn(5, 8)
    expected = info_nce(queries, keys, targets=torch.tensor([1, 2, 3]))

    class Number(int):
        pass

    for targets in (1, Number(1), np.int64(1), np.uint8(1), torch.tensor(1)[None].expand(1)[0].item()):
        assert torch.equal(info_nce(queries, keys, targets=targets), expected)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(info_nce(queries, keys, targets=torch.tensor([1, 2, 3], dtype=dtype)), expected)
    shared = info_nce(keys, queries, targets=torch.tensor([0, 0, 1, 2, 2]), reduction="none")  # more queries than keys
    assert shared.shape == (5,)


@pytest.mark.parametrize(
    ("targets", "kind", "match"),
    [
        (torch.tensor([0, -1, 2]), ValueError, r"targets holds -1, must be in 0\.\.4: keys has 5 rows"),
        (torch.tensor([0, 5, 2]), ValueError, r"targets holds 5, must be in 0\.\.4"),
        (torch.tensor([True, False, True]), ValueError, r"targets has dtype torch\.bool, must be an integer one"),
        (torch.tensor([0.0, 1.0, 2.0]), ValueError, r"targets has dtype torch\.float32, must be an integer one"),
        (torch.tensor([0, 1, 2], device="meta"), ValueError, "targets is on meta, must be on cpu as queries is"),
        (torch.tensor(1), ValueError, r"targets has shape \(\), must be \(3,\)"),
        (torch.tensor([[0, 1, 2]]), ValueError, r"targets has shape \(1, 3\)"),
        (3, ValueError, r"targets is 3, must be in 0\.\.2: 3 queries, 5 keys"),
        (-1, ValueError, r"targets is -1, must be in 0\.\.2"),
        (np.int64(-1), ValueError, r"targets is -1, must be in 0\.\.2"),
        (True, TypeError, "targets is True, must be an int or a tensor of 3 indices"),
        (np.bool_(True), TypeError, "must be an int or a tensor"),
        (1.0, TypeError, r"targets is 1\.0, must be an int or a tensor"),
        (None, TypeError, "targets is None, must be an int or a tensor"),
        ([0, 1, 2], TypeError, r"targets is \[0, 1, 2\], must be an int or a tensor"),
    ],
)
def test_targets_that_are_none(targets, kind, match):
    with pytest.raises(kind, match=match):
        info_nce(torch.randn(3, 8), torch.randn(5, 8), targets=targets)


def test_a_wrong_target_shows_in_compiled_code():
    compiled = torch.compile(lambda q, k, t: info_nce(q, k, targets=t), fullgraph=True, backend="aot_eager")
    queries, keys = torch.randn(3, 8), torch.randn(5, 8)
    assert compiled(queries, keys, torch.tensor([0, 4, 2])).isfinite()
    with pytest.raises(ValueError, match=r"targets holds -2, must be in 0\.\.4"):
        compiled(queries, keys, torch.tensor([0, -2, 2]))


CALLS = {
    "temperature": lambda t: info_nce(torch.ones(2, 4), torch.ones(2, 4), t),
    "temp": lambda t: simcse_unsup_loss(torch.ones(2, 4), temp=t),
    "lamda": lambda t: simcse_sup_loss(torch.ones(3, 4), lamda=t),
    "of embeddings": lambda t: simcse_loss_from_embeddings(torch.ones(2, 4), torch.ones(2, 4), temperature=t),
    "module": lambda t: SimCSELoss(t),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_temperatures(call):
    for value in (1e-320, 0.0, -1, math.nan, math.inf, np.float64("nan"), 1e31):
        with pytest.raises(ValueError, match=r"(temperature|temp|lamda) is .*, must be positive, from 1e-30 to 1e30"):
            call(value)
    for value in ("0.1", torch.tensor(0.1), True, 1j, [0.1]):
        with pytest.raises(TypeError, match=r"(temperature|temp|lamda) is .*, must be a positive number"):
            call(value)
    for value in (1, 0.5, np.float32(0.5), np.int64(2)):
        call(value)


@pytest.mark.parametrize("temperature", [1e-30, 1e-10, 1e30])
def test_the_ends_of_the_range_are_numbers(temperature, path):
    embeddings = torch.randn(8, 4, requires_grad=True)
    loss = simcse_unsup_loss(embeddings, temperature=temperature)
    loss.backward()
    assert loss.isfinite()
    assert embeddings.grad.isfinite().all()


def test_weights_and_their_negatives():
    a, p, n = torch.randn(3, 2, 4)
    for value in (math.nan, math.inf, 1e31):
        with pytest.raises(ValueError, match=r"hard_negative_weight is .*, must be a number up to 1e30 or -inf"):
            simcse_loss_from_embeddings(a, p, n, hard_negative_weight=value)
        with pytest.raises(ValueError, match="hard_negative_weight is"):
            SimCSELoss(supervised=True, hard_negative_weight=value)
    with pytest.raises(TypeError, match="hard_negative_weight is '1', must be a number"):
        simcse_sup_loss(torch.ones(3, 4), hard_negative_weight="1")
    with pytest.raises(ValueError, match="negatives is None, must have a multiple of 2 as anchors has rows"):
        simcse_loss_from_embeddings(a, p, hard_negative_weight=1.0)
    with pytest.raises(ValueError, match="negatives is 3 rows, must have a multiple of 2"):
        simcse_loss_from_embeddings(a, p, torch.ones(3, 4), hard_negative_weight=1.0)
    with pytest.raises(ValueError, match="takes no negatives and no hard_negative_weight"):
        simcse_loss_from_embeddings(a, p, in_view_negatives=True, hard_negative_weight=1.0)
    with pytest.raises(ValueError, match=r"hard_negative_weight=1\.0 is for supervised=True"):
        SimCSELoss(hard_negative_weight=1.0)


def test_reduction_is_checked_before_anything_is_computed(monkeypatch):
    def never(*_):
        raise AssertionError("computed")

    monkeypatch.setattr("simctg_fast.functional._pair_loss", never)
    with pytest.raises(ValueError, match="reduction is 'avg', must be 'mean', 'sum' or 'none'"):
        info_nce(torch.ones(2, 4), torch.ones(2, 4), reduction="avg")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_no_width_and_no_rows(dtype, path):
    queries, keys = torch.zeros(3, 0, dtype=dtype, requires_grad=True), torch.zeros(5, 0, dtype=dtype)
    loss = info_nce(queries, keys)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.log(5))
    assert queries.grad.shape == (3, 0)
    assert float(simcse_unsup_loss(torch.zeros(4, 0, dtype=dtype))) == pytest.approx(math.log(3))
    assert float(simcse_sup_loss(torch.zeros(6, 0, dtype=dtype), hard_negative_weight=1.0)) == pytest.approx(
        math.log(3 + math.e)
    )
    rows = torch.zeros(0, 4, dtype=dtype, requires_grad=True)
    for loss in (
        info_nce(rows, torch.ones(5, 4, dtype=dtype)),
        info_nce(rows, torch.ones(5, 4, dtype=dtype), reduction="sum", targets=5),
        info_nce(rows, rows),
        simcse_unsup_loss(rows),
        simcse_sup_loss(rows),
        simcse_sup_loss(rows, hard_negative_weight=1.0),
        simcse_loss_from_embeddings(rows, rows, in_view_negatives=True),
        ranking_loss(rows, [rows, rows], 20.0, directions=DIRECTIONS),
    ):
        assert loss.shape == ()
        (gradient,) = torch.autograd.grad(loss, rows)
        assert gradient.shape == (0, 4)
        assert float(loss.detach()) == 0.0
    assert info_nce(rows, rows, reduction="none").shape == (0,)
    with pytest.raises(ValueError, match=r"targets is 0, must be in 0\.\.-3: 3 queries, 0 keys; where queries share"):
        info_nce(torch.ones(3, 4, dtype=dtype), rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_zero_vectors_of_the_simcse_losses(dtype, path):
    embeddings = torch.randn(6, 4).to(dtype)
    embeddings[1] = 0.0
    embeddings[4] = torch.finfo(dtype).tiny if dtype != torch.float16 else 0.0
    embeddings.requires_grad_()
    loss = simcse_unsup_loss(embeddings)
    loss.backward()
    unit = torch.stack([r / r.norm() if float(r.norm()) > 1e-30 else r * 0 for r in embeddings.detach().double()])
    logits = (20.0 * unit @ unit.T).fill_diagonal_(-math.inf)
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(6) ^ 1)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=8 * torch.finfo(dtype).eps + 1e-12)
    assert not embeddings.grad[1].any()
    assert not embeddings.grad[4].any()
    assert embeddings.grad.isfinite().all()


def test_autocast_does_not_reach_the_loss(path):
    embeddings = torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        within = simcse_sup_loss(embeddings, hard_negative_weight=1.0), simcse_unsup_loss(embeddings)
    assert torch.equal(within[0], simcse_sup_loss(embeddings, hard_negative_weight=1.0))
    assert torch.equal(within[1], simcse_unsup_loss(embeddings))


def test_compile():
    def loss(a, p, n, temperature):
        return simcse_loss_from_embeddings(a, p, n, temperature=temperature, symmetric=True, hard_negative_weight=2.0)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, temperature in ((4, 0.05), (9, 0.1)):
        columns = [column.detach() for column in columns_of(3, rows=rows)]
        got, expected = (
            value_and_gradients(lambda a, d, f=f, t=temperature: f(a, *d, t), columns) for f in (compiled, loss)
        )
        agree(got, expected)


def test_negatives_are_like_anchors():
    anchors = torch.randn(3, 4)
    for weight in (0.0, 1.0):
        for negatives in (torch.randn(3, 7), torch.randn(3, 4, dtype=torch.float64)):
            with pytest.raises(
                ValueError, match=r"negatives is torch.float\d\d of width \d, must be torch.float32 of width 4"
            ):
                simcse_loss_from_embeddings(anchors, anchors, negatives, hard_negative_weight=weight)
