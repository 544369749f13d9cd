"""The Triton kernels of the decoding step in the interpreter, against float64.

The interpreter has to be chosen before triton is imported, so the checks run in a process of their own, where memory
that nobody has written reads as NaN.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

from simctg_fast.reference.attention import shared_prefix_attention as attention_truth
from simctg_fast.reference.candidate_select import candidate_scan as reference_scan

from ..processes import run_child
from ..repository import WITH_TESTS

pytest.importorskip("triton")

ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3}


def scan_operands(batch, k, lengths, capacity, width, dtype, history_dtype=None):
    states = (3 * torch.randn(batch, k, width)).to(dtype)
    history = torch.nn.functional.normalize(torch.randn(batch, capacity, width), dim=-1).to(history_dtype or dtype)
    for row, length in enumerate(lengths):
        history[row, length:] = float("nan")  # not in use
    return states, history


def check_scan(batch, k, lengths, capacity, width, dtype, history_dtype=None, masked=False, precision="highest"):
    from simctg_fast.kernels import candidate_select as kernels

    torch.set_float32_matmul_precision(precision)
    states, history = scan_operands(batch, k, lengths, capacity, width, dtype, history_dtype)
    mask = None
    if masked:
        mask = torch.rand(batch, capacity) > 0.4
        history[~mask] = float("nan")
    truth, where = reference_scan(states, history, capacity, mask, torch.tensor(lengths))
    tolerance = ROUNDING[torch.float32]  # the operands are exact, the products accumulate in float32
    same = [lengths] if len(set(lengths)) > 1 else [lengths, None]
    for rows in same:
        given = None if rows is None else torch.tensor(rows)
        penalty, position = kernels.candidate_scan(states, history, 0 if given is not None else lengths[0], mask, given)
        torch.testing.assert_close(penalty.double(), truth, atol=tolerance, rtol=0)
        assert torch.equal(position, where)
    if min(lengths) and not masked:
        check_select(states, history, lengths, truth, where)


def check_select(states, history, lengths, penalty, position, alpha=0.6):
    """Choice, appending and copies of the winner; the rest of the history stays."""
    from simctg_fast.kernels import candidate_select as kernels

    batch, k, _ = states.shape
    probs = torch.rand(batch, k).sort(dim=-1, descending=True).values
    probs[:, -1] = 0 if k > 1 else 1  # banned
    score = ((1 - alpha) * probs.double() - alpha * penalty).masked_fill(probs == 0, -torch.inf)
    before = history.clone()
    selected, winner, got, where = kernels.candidate_select(
        states, probs, history, torch.tensor(lengths), None, alpha, True
    )
    assert torch.equal(selected, score.argmax(dim=-1))
    rows = torch.arange(batch)
    assert torch.equal(winner, states[rows, selected])
    assert torch.equal(where, position)
    torch.testing.assert_close(got.double(), penalty, atol=2e-6, rtol=0)
    for row, length in enumerate(lengths):
        if length < history.shape[1]:
            unit = torch.nn.functional.normalize(winner[row].double(), dim=-1)
            eps = torch.finfo(history.dtype).eps
            torch.testing.assert_close(history[row, length].double(), unit, atol=eps, rtol=0)
            before[row, length] = history[row, length]
    torch.testing.assert_close(history, before, rtol=0, atol=0, equal_nan=True)


def check_scan_edges() -> None:
    from simctg_fast.kernels import candidate_select as kernels

    # ties go to the earliest position, in whatever tile or share it is
    history = torch.eye(4)[[0, 1, 0, 1, 1] * 60][None]
    states = torch.tensor([[[0.0, 5, 0, 0], [2.0, 0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 0]]])
    penalty, position = kernels.candidate_scan(states, history, 300, None, None)
    assert penalty.tolist() == [[1, 1, 0, 0]]
    assert position.tolist() == [[1, 0, 0, 0]]
    # NaN stays in its candidate and says where it was first met; a row without a real position has −inf
    states, history = scan_operands(2, 4, [90, 90], 90, 24, torch.float32)
    states[0, 2, 3], states[1, 1] = float("nan"), float("inf")
    clean, _ = reference_scan(states.nan_to_num(posinf=0), history, 90)
    penalty, position = kernels.candidate_scan(states, history, 90, None, None)
    bad = torch.zeros(2, 4, dtype=torch.bool)
    bad[0, 2] = bad[1, 1] = True
    assert torch.equal(penalty.isnan(), bad)
    assert not position[bad].any()
    torch.testing.assert_close(penalty.double()[~bad], clean[~bad], atol=2e-6, rtol=0)
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[1] = False
    penalty, position = kernels.candidate_scan(states, history, 90, mask, None)
    assert (penalty[1] == -torch.inf).all()
    assert not position[1].any()
    # equal scores: the more probable, then the first; NaN is never chosen; at the end of its room nothing is appended
    states = torch.tensor([[[1.0, 0], [1, 0], [1, 0], [float("nan"), 0]]])
    history = torch.tensor([[[1.0, 0], [float("nan"), 0]]])
    for probs, best in (([0.25, 0.5, 0.5, 0.9], 1), ([0.25, 0.25, 0.25, 0.25], 0)):
        chosen = kernels.candidate_select(
            states, torch.tensor([probs]), history[:, :1], torch.tensor([1]), None, 0.5, False
        )
        assert chosen[0].tolist() == [best]
    assert history[0, 1].isnan().any()
    # the penalty decides even where the less probable would win
    states, history = torch.tensor([[[1.0, 0], [0.0, 2]]]), torch.tensor([[[1.0, 0], [9.0, 9]]])
    chosen = kernels.candidate_select(states, torch.tensor([[0.6, 0.4]]), history, torch.tensor([1]), None, 0.6, False)
    assert chosen[0].tolist() == [1]
    assert history.tolist() == [[[1, 0], [0, 1]]]


def check_strided_scan() -> None:
    from simctg_fast.kernels import candidate_select as kernels

    states, history = scan_operands(2, 4, [9, 9], 14, 24, torch.float32)
    wide = torch.full((2, 14, 3, 24), float("nan"))[:, :, 1].copy_(history)
    strided = torch.empty(4, 2, 48).transpose(0, 1)[..., ::2].copy_(states)
    for ours, theirs in zip(
        kernels.candidate_scan(strided, wide, 9, None, None),
        kernels.candidate_scan(states, history, 9, None, None),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


SCANS = (
    {"batch": 1, "k": 1, "lengths": [1], "capacity": 1, "width": 1, "dtype": torch.float32},
    {"batch": 3, "k": 5, "lengths": [33, 1, 140], "capacity": 150, "width": 200, "dtype": torch.float32},
    {"batch": 2, "k": 17, "lengths": [70, 70], "capacity": 75, "width": 31, "dtype": torch.float16},
    {"batch": 1, "k": 4, "lengths": [300], "capacity": 300, "width": 128, "dtype": torch.float16},
    {
        "batch": 2,
        "k": 3,
        "lengths": [40, 65],
        "capacity": 70,
        "width": 40,
        "dtype": torch.float16,
        "history_dtype": torch.float32,
    },
    {
        "batch": 2,
        "k": 4,
        "lengths": [90, 50],
        "capacity": 100,
        "width": 64,
        "dtype": torch.float32,
        "masked": True,
        "precision": "high",
    },
)
MORE_SCANS = [
    {
        "batch": batch,
        "k": k,
        "lengths": lengths[:batch],
        "capacity": 300,
        "width": width,
        "dtype": dtype,
        "masked": masked,
    }
    for batch, k, width in ((1, 64, 513), (5, 8, 1000))
    for lengths in ([257] * 5, [300, 0, 31, 32, 33])
    for dtype in ROUNDING
    for masked in (False, True)
]
MORE_SCANS += [
    {"batch": 2, "k": k, "lengths": [70, 33], "capacity": 80, "width": 16384, "dtype": dtype}
    for k, dtype in ((4, torch.float16), (20, torch.float32))
]


def attention_operands(
    batch, k, heads, kv_heads, length, dim, value_dim, dtype, own=True, mask=None, bias=None, lengths=None,
    starts=None, window=None, window_start=0, sinks=False, softcap=None,
):  # fmt: skip
    rows, capacity = batch * k, length + 6
    sizes = {"1": 1, "batch": batch, "rows": rows, "heads": heads}

    def draw(*shape):
        return torch.randn(shape).to(dtype)

    arguments = {
        "query": draw(rows, 1, heads, dim).transpose(1, 2),
        "key": draw(batch, kv_heads, capacity, dim),
        "value": draw(batch, kv_heads, capacity, value_dim),
        "length": length, "new_key": None, "new_value": None, "scaling": 1.3 * dim**-0.5, "mask": None, "bias": None,
        "softcap": softcap, "sinks": draw(heads) if sinks else None, "window_start": window_start,
        "lengths": None if lengths is None else torch.tensor(lengths),
        "starts": None if starts is None else torch.tensor(starts), "window": window,
    }  # fmt: skip
    if own:
        arguments["new_key"] = draw(rows, 1, kv_heads, dim).transpose(1, 2)
        arguments["new_value"] = draw(rows, 1, kv_heads, value_dim).transpose(1, 2)
    if mask:
        arguments["mask"] = torch.rand(sizes[mask[0]], sizes[mask[1]], 1, length + own) > 0.4
        arguments["mask"][..., -1] = True
    if bias:
        arguments["bias"] = 2 * draw(sizes[bias[0]], sizes[bias[1]], 1, length + own)
    for b in range(batch):  # what a row may not see is not read
        end = length if lengths is None else lengths[b]
        first = max(window_start, starts[b] if starts else 0, end + 1 - window if window else 0)
        for name in ("key", "value"):
            arguments[name][b, :, :first] = float("nan")
            arguments[name][b, :, end:] = float("nan")
    return arguments


def check_attention(precision="highest", **case) -> None:
    from simctg_fast.kernels import shared_prefix_attention as kernels

    torch.set_float32_matmul_precision(precision)
    arguments = attention_operands(**case)
    out = kernels.shared_prefix_attention(**arguments)
    assert out.dtype == case["dtype"]
    torch.testing.assert_close(out.double(), attention_truth(**arguments), atol=ROUNDING[case["dtype"]], rtol=0)


PLAIN = {
    "batch": 2,
    "k": 4,
    "heads": 4,
    "kv_heads": 4,
    "length": 11,
    "dim": 16,
    "value_dim": 16,
    "dtype": torch.float32,
}
ATTENTIONS = [
    PLAIN | changes
    for changes in (
        {},
        {"length": 700, "batch": 1, "kv_heads": 1, "dtype": torch.float16, "dim": 64},  # several shares
        {"length": 600, "batch": 2, "kv_heads": 2, "lengths": [590, 3], "starts": [300, 1], "dim": 80, "value_dim": 24},
        {"lengths": [11, 0], "k": 1, "heads": 6, "kv_heads": 2, "dim": 96, "value_dim": 96, "dtype": torch.float16},
        {"kv_heads": 1, "heads": 20, "k": 5, "mask": ("rows", "heads"), "bias": ("1", "heads"), "softcap": 0.7},
        {"own": False, "mask": ("batch", "1"), "bias": ("rows", "1"), "sinks": True},
        {"window": 5, "lengths": [11, 3], "sinks": True, "kv_heads": 2, "softcap": 1.5},
        {"window": 1, "starts": [2, 0], "mask": ("1", "1")},
        {"window_start": 4, "bias": ("batch", "heads"), "dtype": torch.float16, "precision": "high"},
        {"length": 530, "batch": 1, "window": 300, "sinks": True, "precision": "high", "mask": ("batch", "1")},
    )
]
MORE_ATTENTIONS = [
    PLAIN
    | {"dtype": dtype, "k": k, "heads": heads, "kv_heads": kv_heads, "dim": dim, "value_dim": value_dim, "length": 300}
    | extra
    for dtype in ROUNDING
    for k, heads, kv_heads, dim, value_dim in (
        (1, 8, 2, 32, 32),
        (8, 12, 12, 72, 72),
        (3, 4, 1, 256, 128),
        (5, 14, 2, 112, 112),
    )
    for extra in (
        {"lengths": [299, 257], "starts": [256, 0]},
        {"window": 100, "softcap": 2.0, "sinks": True},
        {"mask": ("rows", "heads"), "bias": ("rows", "heads")},
        {"own": False, "bias": ("1", "heads")},
    )
]


def check_attention_sees_nothing() -> None:
    """A row that may see nothing is NaN, as softmax makes it; with a sink it is zero. The others stay."""
    from simctg_fast.kernels import shared_prefix_attention as kernels

    arguments = attention_operands(**PLAIN | {"own": False, "mask": ("batch", "1")})
    arguments["mask"][0] = False
    arguments["mask"][1, ..., 3] = True
    out = kernels.shared_prefix_attention(**arguments)
    assert out[:4].isnan().all()
    torch.testing.assert_close(out[4:].double(), attention_truth(**arguments)[4:], atol=2e-6, rtol=0)
    arguments["sinks"] = torch.zeros(4)
    assert not kernels.shared_prefix_attention(**arguments)[:4].any()


def check_rows_are_their_own() -> None:
    """Bit for bit the same whatever stands in the other rows."""
    from simctg_fast.kernels import shared_prefix_attention as kernels

    arguments = attention_operands(**PLAIN | {"length": 600, "lengths": [600, 580]})
    before = kernels.shared_prefix_attention(**arguments)
    arguments["key"][1] = torch.randn_like(arguments["key"][1])
    arguments["lengths"][1] = 5
    after = kernels.shared_prefix_attention(**arguments)
    assert torch.equal(before[:4], after[:4])
    assert not torch.equal(before[4:], after[4:])


def check_same_bits_each_time() -> None:
    """A launch that is split leaves its counters as it found them, and merges in the same order."""
    from simctg_fast.kernels import candidate_select, shared_prefix_attention, top_k

    arguments = attention_operands(**PLAIN | {"length": 520, "kv_heads": 1, "heads": 2, "lengths": [520, 311]})
    states, history = scan_operands(2, 4, [140, 70], 140, 16, torch.float32)
    logits = torch.randn(1, 4200)
    for run in (
        lambda: (shared_prefix_attention.shared_prefix_attention(**arguments),),
        lambda: candidate_select.candidate_scan(states, history, 0, None, torch.tensor([140, 70])),
        lambda: top_k.top_k_probs(logits, 2),
    ):
        for one, other in zip(run(), run(), strict=True):
            assert torch.equal(one, other)


def check_commit() -> None:
    from simctg_fast.kernels import prefix_commit as kernels

    for dtype, shapes in (
        (torch.float32, ((4, 16), (1, 7))),
        (torch.float16, ((3, 5), (2, 300), (1, 8))),
        (torch.float64, ((2, 2),)),
        (torch.uint8, ((2, 3),)),
    ):
        winners, positions = torch.tensor([2, 3, 8]), torch.tensor([5, 0, 9])
        for each in (True, False):
            pairs, expected = [], []
            for heads, dim in shapes:
                buffer = torch.randint(0, 99, (3, heads, 9, dim)).to(dtype)
                rows = torch.randint(0, 99, (9, 1, heads, dim)).to(dtype).transpose(1, 2)
                pairs.append((buffer, rows))
                expected.append(buffer.clone())
                for b, at in enumerate(positions.tolist() if each else [4] * 3):
                    if at < 9:  # the last row is full
                        expected[-1][b, :, at] = rows[winners[b], :, 0]
            table, unit = kernels.table_of(pairs)
            kernels.launch(torch.tensor(table), unit, winners, positions if each else 4)
            for (buffer, _), want in zip(pairs, expected, strict=True):
                assert torch.equal(buffer, want)


def check_top_k(batch, vocabulary, k, dtype=torch.float32) -> None:
    from simctg_fast.kernels import top_k as kernels

    logits = (3 * torch.randn(batch, vocabulary)).to(dtype)
    logits[:, ::5] = float("-inf")
    if batch > 1:
        logits[1] = logits[1].round()  # ties: the lower token first
    probs, tokens = kernels.top_k_probs(logits, k)
    order = logits.float().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(tokens, order.indices[:, :k])
    truth = torch.softmax(logits.double(), dim=-1).gather(1, tokens)
    torch.testing.assert_close(probs.double(), truth, atol=1e-6, rtol=2e-6)


def check_top_k_edges() -> None:
    from simctg_fast.kernels import top_k as kernels

    logits = torch.randn(3, 5000)
    logits[0, 4321], logits[1] = float("nan"), float("-inf")
    probs, _ = kernels.top_k_probs(logits, 3)
    assert probs[:2].isnan().all()
    assert probs[2].isfinite().all()
    strided = torch.randn(3, 100)[:, ::2]
    ours, tokens = kernels.top_k_probs(strided, 4)
    assert torch.equal(tokens, strided.topk(4).indices)
    torch.testing.assert_close(ours, strided.softmax(-1).topk(4).values)


def check_operators() -> None:
    """The same through the operators, by name."""
    from simctg_fast.ops.candidate_select import candidate_scan, candidate_select
    from simctg_fast.ops.prefix_commit import CommitPlan
    from simctg_fast.ops.shared_prefix_attention import shared_prefix_attention
    from simctg_fast.ops.top_k import top_k_probs

    states, history = scan_operands(2, 4, [14, 14], 14, 24, torch.float32)
    mask, lengths, probs = torch.rand(2, 14) > 0.3, torch.tensor([9, 5]), torch.rand(2, 4)
    copies = {impl: history.clone() for impl in ("triton", "torch")}
    results = [
        (
            *candidate_scan(states, history, 14, mask, impl, lengths),
            *candidate_select(states, probs, copies[impl], lengths, 0.6, mask, with_penalty=True, impl=impl),
            copies[impl],
            *top_k_probs(probs, 3, impl),
        )
        for impl in copies
    ]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)
    arguments = attention_operands(**PLAIN | {"window": 4, "lengths": [11, 7], "kv_heads": 2})
    for name in ("key", "value"):
        arguments[name] = arguments[name].nan_to_num(nan=1.0)
    triton, plain = (shared_prefix_attention(**arguments, impl=impl) for impl in ("triton", "torch"))
    torch.testing.assert_close(triton, plain, atol=2e-6, rtol=0)
    buffer, rows = torch.zeros(2, 3, 5, 4), torch.randn(6, 3, 1, 4)
    CommitPlan(1, buffer.device).run([(buffer, rows)], torch.tensor([1, 4]), torch.tensor([2, 3]))
    assert torch.equal(buffer[0, :, 1], rows[2, :, 0])
    assert torch.equal(buffer[1, :, 4], rows[3, :, 0])
    for call, message in (
        (lambda: candidate_scan(states.double(), history, 14, impl="triton"), "float64"),
        (lambda: top_k_probs(torch.randn(1, 90), 70, "triton"), "k=70"),
        (lambda: shared_prefix_attention(**arguments | {"query": arguments["query"].half()}, impl="triton"), "float16"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def run(code: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": WITH_TESTS}
    source = (
        f"import torch; from tests.ops import test_decode_triton as t; "
        f"torch.use_deterministic_algorithms(True); torch.manual_seed(0)\n{code}"
    )

    done = run_child([sys.executable, "-W", "ignore", "-c", source], env=environment, cwd="/", timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_candidate_select_interpreted():
    run("t.check_scan_edges(); t.check_strided_scan(); [t.check_scan(**case) for case in t.SCANS]")


def test_shared_prefix_attention_interpreted():
    run(
        "t.check_attention_sees_nothing(); t.check_rows_are_their_own(); t.check_same_bits_each_time()\n"
        "[t.check_attention(**c) for c in t.ATTENTIONS]"
    )


def test_prefix_commit_and_top_k_interpreted():
    run(
        "t.check_operators(); t.check_commit(); t.check_top_k_edges()"
        "\nt.check_top_k(2, 9000, 4); t.check_top_k(1, 50, 17, torch.float16)"
    )


@pytest.mark.full
@pytest.mark.timeout(3700)
@pytest.mark.parametrize(
    "code",
    [
        *(f"[t.check_scan(**case) for case in t.MORE_SCANS[{part}::3]]" for part in range(3)),
        *(f"[t.check_attention(**case) for case in t.MORE_ATTENTIONS[{part}::2]]" for part in range(2)),
        *(f"[t.check_top_k(b, v, {k}) for b, v in ((1, 64), (2, 9000))]" for k in (1, 2, 50, 64)),
    ],
)
def test_kernels_on_the_grid_interpreted(code):
    run(code)
