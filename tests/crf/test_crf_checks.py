"""Checks of values: the same errors outside of a compiled graph and inside, nothing left out, derivatives untouched."""

from __future__ import annotations

import pytest
import torch

from simctg_fast.ops import crf_checks as checks

LENGTHS = torch.tensor([2, 0, 3])
PAST = torch.arange(3) >= LENGTHS[:, None]
NAN, NEVER = float("nan"), float("-inf")


def scores(*wrong):
    """`(3, 3, 2)` with values put in at (item, position, slot)."""
    result = torch.arange(18.0).view(3, 3, 2)
    for place, value in wrong:
        result[place] = value
    return result


def tokens(*wrong):
    result = torch.arange(18).view(3, 3, 2) % 5
    for place, value in wrong:
        result[place] = value
    return result


PADDED = [((0, 2), NAN), ((1, 0), float("inf")), ((1, 1), NEVER)]
BEAMS = torch.tensor([4, 0, 2]).expand(3, 3, 3)
HELD = torch.tensor([2, 0]).expand(3, 3, 2)
CASES = {
    "lengths": (
        checks.checked_lengths,
        (LENGTHS, 3),
        (torch.tensor([2, 4, -1]), 3),
        r"lengths\[1\] is 4, must be in 0..3",
    ),
    "tokens": (
        checks.checked_tokens,
        (tokens(((0, 2), -7), ((1, 0), 99)), 5, PAST, "targets"),
        (tokens(((2, 1, 1), 5)), 5, PAST, "targets"),
        r"targets\[2, 1, 1\] is 5, must be in 0..4",
    ),
    "tokens of one path": (
        checks.checked_tokens,
        (tokens()[..., 0], 5, None, "tags"),
        (tokens(((2, 1), -1))[..., 0], 5, None, "tags"),
        r"tags\[2, 1\] is -1, must be in 0..4",
    ),
    "NaN": (
        checks.checked_scores,
        (scores(*PADDED), PAST),
        (scores(((0, 1, 1), NAN)), PAST),
        r"emissions\[0, 1\] holds NaN",
    ),
    "inf": (
        checks.checked_scores,
        (scores(), None),
        (scores(((1, 2, 0), -NEVER)), None),
        r"emissions\[1, 2\] holds \+inf",
    ),
    "banned": (
        checks.checked_scores,
        (scores(((0, 1, 1), NEVER)), PAST, "tag"),
        (scores(((2, 2), NEVER)), PAST, "tag"),
        r"emissions\[2, 2\] bans every tag \(-inf\)",
    ),
    "slots": (
        checks.checked_slots,
        (torch.tensor([2, 1]).expand(3, 3, 2), BEAMS, HELD, PAST),
        (torch.tensor([2, 0]).expand(3, 3, 2), BEAMS, HELD, PAST),
        r"slots\[0, 0, 1\] is 0, which does not hold the token 0 in beam_tokens\[0, 0\]",
    ),
    "slots of": (
        checks.slots_of,
        (BEAMS, HELD, PAST),
        (BEAMS, HELD + 1, PAST),
        r"tokens\[0, 0, 0\] is 3, which is not in beam_tokens\[0, 0\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dynamic", [None, False, True], ids=["eager", "static", "dynamic"])
def test_checks(name, dynamic):
    function, good, bad, message = CASES[name]
    call = function
    if dynamic is not None:
        torch._dynamo.reset()
        call = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    result = call(*good)
    if name == "slots of":
        assert torch.equal(result, torch.tensor([2, 1]).expand(3, 3, 2))
    else:
        assert torch.equal(result.nan_to_num(), good[0].nan_to_num())
    with pytest.raises(ValueError, match=message):
        call(*bad)
    with pytest.raises(ValueError, match=message):  # the graph was not given up for another
        call(*bad)


def test_a_check_survives_a_graph_that_needs_little_of_it():
    """Inductor drops what nobody needs: what the checks return is needed."""

    def use(values, lengths, targets):
        values = checks.checked_scores(values, PAST)
        targets = checks.checked_tokens(targets, 5, PAST, "targets")
        return values[..., 0].sum() + targets[0, 0, 0], checks.checked_lengths(lengths, 3) > 0

    compiled = torch.compile(use, fullgraph=True)
    expected = use(scores(), LENGTHS, tokens())
    for actual, wanted in zip(compiled(scores(), LENGTHS, tokens()), expected, strict=True):
        assert torch.equal(actual, wanted)
    for arguments, message in (
        ((scores(((2, 0, 1), NAN)), LENGTHS, tokens()), "holds NaN"),
        ((scores(), torch.tensor([0, 0, 4]), tokens()), r"lengths\[2\] is 4"),
        ((scores(), LENGTHS, tokens(((2, 2, 1), 5))), r"targets\[2, 2, 1\] is 5"),
    ):
        with pytest.raises(ValueError, match=message):
            compiled(*arguments)


def test_derivatives_pass_by():
    values = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)

    def total(values):
        return (checks.checked_scores(values, PAST) ** 3).sum()

    assert torch.autograd.gradcheck(total, values)
    assert torch.autograd.gradgradcheck(total, values)
    expected = 3 * values.detach() ** 2
    torch.testing.assert_close(torch.func.grad(total)(values.detach()), expected)
    many = torch.func.vmap(torch.func.grad(total))(values.detach().expand(4, -1, -1, -1))
    torch.testing.assert_close(many, expected.expand(4, -1, -1, -1))
    tangent = torch.func.jvp(total, (values.detach(),), (torch.ones_like(expected),))[1]
    torch.testing.assert_close(tangent, expected.sum())
    (gradient,) = torch.autograd.grad(torch.compile(total, fullgraph=True, backend="aot_eager")(values), values)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    function, good, _, _ = CASES[name]
    ops = torch.ops.simctg_fast
    operator = {
        checks.checked_lengths: ops.crf_checked_lengths,
        checks.checked_scores: ops.crf_checked_scores,
        checks.checked_slots: ops.crf_checked_slots,
        checks.slots_of: ops.crf_slots_of,
        checks.checked_tokens: ops.crf_checked_tokens,
    }[function]
    torch.library.opcheck(operator, good)
