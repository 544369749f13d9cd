"""Candidates against the history of hidden states, and the score they are ranked by."""

import pytest
import torch

from simctg_fast.ops.candidate_select import candidate_scan, candidate_select, contrastive_scores, resolve
from simctg_fast.reference.candidate_select import candidate_scan as reference

IMPLS = ("auto", "cpu", "torch")  # "triton" is tested in test_decode_triton.py


def operands(batch, k, length, dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden_states = 3 * torch.randn(batch, k, dim, generator=generator, dtype=torch.float64)
    history = torch.randn(batch, length + 5, dim, generator=generator, dtype=torch.float64)
    history = torch.nn.functional.normalize(history, dim=-1)
    history[:, length:] = float("nan")  # not in use
    return hidden_states.to(dtype), history.to(dtype)


def skip_unless_supported(impl, *arguments):
    if impl == "cpu" and resolve("auto", *arguments) != "cpu":
        pytest.skip("the C++ kernel does not run here")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("batch", "k", "length", "dim"),
    [(1, 1, 1, 1), (1, 4, 7, 64), (2, 3, 33, 31), (3, 8, 130, 48), (2, 5, 257, 17), (1, 16, 40, 100)],
)
@pytest.mark.parametrize("padded", [False, True])
def test_largest_cosine(impl, batch, k, length, dim, padded):
    hidden_states, history = operands(batch, k, length, dim)
    mask = None
    if padded:
        mask = torch.ones(batch, history.shape[1], dtype=torch.bool)
        for row in range(batch):
            mask[row, : min(row + 1, length - 1)] = False
            history[row, : min(row + 1, length - 1)] = float("nan")  # what stands at padding must not matter
    skip_unless_supported(impl, hidden_states, history, mask)
    penalty, position = candidate_scan(hidden_states, history, length, mask, impl)
    truth, where = reference(hidden_states, history, length, mask)
    assert penalty.dtype == torch.float32
    assert position.dtype == torch.int64
    assert penalty.shape == position.shape == (batch, k)
    torch.testing.assert_close(penalty.double(), truth, atol=1e-6, rtol=0)
    assert torch.equal(position, where)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(impl, dtype):
    hidden_states, history = operands(2, 4, 19, 32, dtype)
    skip_unless_supported(impl, hidden_states, history, None)
    penalty, _ = candidate_scan(hidden_states, history, 19, None, impl)
    error = (reference(hidden_states, history, 19)[0] - penalty.double()).abs().max()
    assert penalty.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error <= {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float64: 1e-14}[dtype]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_against_a_float32_history(impl, dtype):
    """What a half-precision model on a CPU does: its history is kept in float32."""
    hidden_states, history = operands(2, 4, 19, 32)
    hidden_states = hidden_states.to(dtype)
    skip_unless_supported(impl, hidden_states, history, None)
    penalty, _ = candidate_scan(hidden_states, history, 19, None, impl)
    truth = reference(hidden_states, history, 19)[0]
    torch.testing.assert_close(penalty.double(), truth, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_in_cpp(isa, dtype):
    """They are widened; the history of rows that come from such states stays float32, and the winner keeps its type."""
    hidden_states, history = operands(2, 4, 19, 33)
    hidden_states, probs, lengths = hidden_states.to(dtype), torch.rand(2, 4), torch.tensor([19, 7])
    assert resolve("auto", hidden_states, history, None) == "cpu"
    assert resolve("auto", hidden_states, history.to(dtype), None) == "torch"
    expected = candidate_scan(hidden_states.float(), history, 19, None, "cpu")
    for impl in ("auto", "cpu"):
        assert all(map(torch.equal, candidate_scan(hidden_states, history, 19, None, impl), expected))
    history, twin = history.nan_to_num(), history.nan_to_num()
    found = candidate_select(hidden_states, probs, history, lengths, 0.6, with_penalty=True)
    wide = candidate_select(hidden_states.float(), probs, twin, lengths, 0.6, with_penalty=True, impl="cpu")
    assert found[1].dtype == dtype
    assert all(torch.equal(one.float(), other.float()) for one, other in zip(found, wide, strict=True))
    assert torch.equal(history, twin)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("repeats", [1, 60])
def test_earliest_position_wins_a_tie(impl, repeats):
    history = torch.eye(4)[[0, 1, 0, 1, 1] * repeats][None]
    hidden_states = torch.tensor([[[0.0, 5.0, 0, 0], [2.0, 0, 0, 0], [0, 0, 1.0, 0]]])
    skip_unless_supported(impl, hidden_states, history, None)
    penalty, position = candidate_scan(hidden_states, history, 5 * repeats, None, impl)
    assert penalty.tolist() == [[1, 1, 0]]
    assert position.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_spreads_within_its_row_alone(impl):
    hidden_states, history = operands(2, 4, 9, 24)
    skip_unless_supported(impl, hidden_states, history, None)
    expected, _ = candidate_scan(hidden_states, history, 9, None, impl)
    hidden_states[0, 2, 3] = float("nan")
    hidden_states[1, 1] = float("inf")
    penalty, _ = candidate_scan(hidden_states, history, 9, None, impl)
    bad = torch.zeros(2, 4, dtype=torch.bool)
    bad[0, 2] = bad[1, 1] = True
    assert torch.equal(penalty.isnan(), bad)
    assert torch.equal(penalty[~bad], expected[~bad])


@pytest.mark.parametrize("impl", IMPLS)
def test_row_without_real_position(impl):
    hidden_states, history = operands(2, 3, 6, 8)
    mask = torch.ones(2, history.shape[1], dtype=torch.bool)
    mask[1] = False
    skip_unless_supported(impl, hidden_states, history, mask)
    penalty, _ = candidate_scan(hidden_states, history, 6, mask, impl)
    assert torch.isfinite(penalty[0]).all()
    assert (penalty[1] == -torch.inf).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_state_has_cosine_zero(impl):
    hidden_states, history = operands(1, 3, 6, 8)
    hidden_states[0, 1] = 0
    skip_unless_supported(impl, hidden_states, history, None)
    penalty, _ = candidate_scan(hidden_states, history, 6, None, impl)
    assert penalty[0, 1] == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_operands(impl):
    hidden_states, history = operands(2, 4, 9, 24)
    strided = torch.randn(4, 2, 48).transpose(0, 1)[..., ::2].copy_(hidden_states)
    wide = torch.randn(2, history.shape[1], 3, 24)[:, :, 1].copy_(history)
    skip_unless_supported(impl, strided, wide, None)
    expected = candidate_scan(hidden_states, history, 9, None, "torch")
    penalty, position = candidate_scan(strided, wide, 9, None, impl)
    torch.testing.assert_close(penalty, expected[0], atol=1e-6, rtol=0)
    assert torch.equal(position, expected[1])


def test_arguments_are_not_written_to():
    hidden_states, history = operands(2, 4, 9, 24)
    mask = torch.ones(2, history.shape[1], dtype=torch.bool)
    copies = [x.clone() for x in (hidden_states, history, mask)]
    candidate_scan(hidden_states, history, 9, mask)
    for now, before in zip((hidden_states, history, mask), copies, strict=True):
        torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)


def test_unknown_impl():
    with pytest.raises(ValueError, match="impl is 'gpu', must be one of"):
        candidate_scan(*operands(1, 1, 1, 4), 1, impl="gpu")


@pytest.mark.parametrize("padded", [False, True])
def test_operator(padded):
    hidden_states, history = operands(2, 4, 9, 24)
    history = history.nan_to_num(nan=0.5)  # opcheck compares results, and NaN with nothing
    mask = torch.rand(2, history.shape[1]) > 0.3 if padded else None
    if padded:
        mask[:, 0] = True
    torch.library.opcheck(torch.ops.simctg_fast.candidate_scan, (hidden_states, history, 9, mask))
    torch.library.opcheck(torch.ops.simctg_fast.candidate_scan, (hidden_states.mT.contiguous().mT, history, 9, mask))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    def select(hidden_states, history, probs):
        penalty, _ = candidate_scan(hidden_states, history, 9)
        return contrastive_scores(probs, penalty, 0.6).argmax(dim=-1)

    hidden_states, history = operands(2, 4, 9, 24)
    probs = torch.rand(2, 4)
    compiled = torch.compile(select, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert torch.equal(compiled(hidden_states, history, probs), select(hidden_states, history, probs))


def test_score_is_equation_five():
    probs = torch.tensor([[0.5, 0.25, 0.125]])
    penalty = torch.tensor([[0.75, -0.5, 0.0]])
    expected = 0.75 * probs - 0.25 * penalty
    assert torch.equal(contrastive_scores(probs, penalty, 0.25), expected)


def test_impossible_candidate_scores_minus_infinity():
    probs = torch.tensor([[0.9, 0.0]])
    penalty = torch.tensor([[1.0, -1.0]])  # the penalty would favour the second
    assert contrastive_scores(probs, penalty, 1.0).argmax(dim=-1).item() == 0
    assert contrastive_scores(probs, penalty, 0.6)[0, 1] == -torch.inf


def test_scores_are_float32():
    scores = contrastive_scores(torch.rand(2, 3), torch.rand(2, 3), 0.6)
    assert scores.dtype == torch.float32


def test_named_impl_that_cannot_run_raises():
    hidden_states, history = (x.to("meta") for x in operands(1, 2, 3, 4))
    with pytest.raises((RuntimeError, ValueError), match="cpu"):
        candidate_scan(hidden_states, history, 3, impl="cpu")


def select_operands(dtype=torch.float32):
    hidden_states, history = operands(3, 4, 9, 24, dtype)
    probs = torch.rand(3, 4).sort(dim=-1, descending=True).values
    return hidden_states, probs, history, torch.tensor([9, 4, 14])  # the last row is full


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("padded", [False, True])
def test_select_chooses_and_appends(impl, padded):
    hidden_states, probs, history, lengths = select_operands()
    probs[1, 0] = 0  # banned
    history = history.nan_to_num(nan=0.25)
    mask = torch.rand(3, 14) > 0.3 if padded else None
    skip_unless_supported(impl, hidden_states, history, mask)
    before = history.clone()
    truth, where = reference(hidden_states, history, 14, mask, lengths)
    score = (0.4 * probs.double() - 0.6 * truth).masked_fill(probs == 0, -torch.inf)
    selected, winner, penalty, position = candidate_select(
        hidden_states, probs, history, lengths, 0.6, mask, with_penalty=True, impl=impl
    )
    assert torch.equal(selected, score.argmax(dim=-1))
    assert torch.equal(winner, hidden_states[torch.arange(3), selected])
    torch.testing.assert_close(penalty.double(), truth, atol=1e-6, rtol=0)
    assert torch.equal(position, where)
    for row in (0, 1):
        before[row, lengths[row]] = torch.nn.functional.normalize(winner[row], dim=-1)
    torch.testing.assert_close(history, before)


def test_select_ties_nan_and_nothing_more_than_asked():
    states = torch.tensor([[[1.0, 0], [1, 0], [1, 0], [float("nan"), 0]]]).expand(2, -1, -1).contiguous()
    history = torch.tensor([[[1.0, 0], [5, 5]]]).repeat(2, 1, 1)
    probs = torch.tensor([[0.25, 0.5, 0.5, 0.9], [0.25] * 4])
    selected, _, penalty, position = candidate_select(states, probs, history, torch.tensor([1, 1]), 0.5)
    assert selected.tolist() == [1, 0]  # the more probable, then the first; NaN never
    assert penalty.numel() == position.numel() == 0
    assert history[:, 1].tolist() == [[1, 0], [1, 0]]


def test_select_names_what_does_not_fit():
    hidden_states, probs, history, lengths = select_operands()
    with pytest.raises(ValueError, match=r"probs has shape \(3, 3\).*must be \(3, 4\)"):
        candidate_select(hidden_states, probs[:, :3], history, lengths, 0.6)
    with pytest.raises(ValueError, match=r"lengths has shape \(2,\)"):
        candidate_select(hidden_states, probs, history, lengths[:2], 0.6)
    with pytest.raises(ValueError, match="impl is 'gpu', must be one of"):
        candidate_select(hidden_states, probs, history, lengths, 0.6, impl="gpu")
    with pytest.raises((RuntimeError, ValueError), match="triton"):
        candidate_select(hidden_states, probs, history, lengths, 0.6, impl="triton")
    with pytest.raises((RuntimeError, ValueError), match="triton"):
        candidate_scan(hidden_states, history, 9, impl="triton")


@pytest.mark.parametrize("with_penalty", [False, True])
def test_select_operator(with_penalty):
    hidden_states, probs, history, lengths = select_operands()
    history = history.nan_to_num(nan=0.5)
    mask = torch.ones(3, 14, dtype=torch.bool)
    for states in (hidden_states, hidden_states.mT.contiguous().mT):
        arguments = (states, probs, history, lengths, mask, 0.6, with_penalty)
        torch.library.opcheck(torch.ops.simctg_fast.candidate_select, arguments)


def test_select_compiles_as_one_graph():
    def select(hidden_states, probs, history, lengths):
        return candidate_select(hidden_states, probs, history, lengths, 0.6)[0]

    hidden_states, probs, history, lengths = select_operands()
    history = history.nan_to_num(nan=0.5)
    twin = history.clone()
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden_states, probs, twin, lengths), select(hidden_states, probs, history, lengths))
    assert torch.equal(twin, history)
