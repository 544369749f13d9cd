"""The longest repeated suffix before each position, against its quadratic definition."""

import random

import pytest
import torch

from simctg_fast.ops import _backends
from simctg_fast.ops.repeated_suffix import repeated_suffix
from simctg_fast.reference import dry

needs_extension = pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")
IMPLS = ("auto", "torch", pytest.param("cpu", marks=needs_extension))


def texts(batch: int, length: int, alphabet: int, seed: int = 0) -> torch.Tensor:
    """Rows that repeat much, and at all distances: some tokens are drawn, others copied from earlier."""
    draw = random.Random(seed)
    rows = []
    for _ in range(batch):
        row = [draw.randrange(alphabet)]
        while len(row) < length:
            at, count = draw.randrange(len(row)), draw.randrange(1, 12)
            row += row[at : at + count] if draw.random() < 0.6 else [draw.randrange(alphabet)]
        rows.append(row[:length])
    return torch.tensor(rows)


def expected(tokens, starts=None, lengths=None, limits=None, longest=None) -> torch.Tensor:
    batch, length = tokens.shape
    result = torch.zeros_like(tokens)
    for b in range(batch):
        end = length if lengths is None else int(lengths[b])
        start = min(end, 0 if starts is None else int(starts[b]))
        most = min(length if limits is None else int(limits[b]), length if longest is None else longest)
        found = dry.repeated_suffix(tokens[b, start:end].tolist())
        result[b, start:end] = torch.tensor([min(n, most) for n in found], dtype=torch.int64)
    return result


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("alphabet", [1, 2, 3, 40])
@pytest.mark.parametrize("length", [1, 2, 3, 17, 128, 129, 300])
def test_equals_the_definition(impl, alphabet, length):
    """Lengths beside the blocks that PyTorch's code compares at a time, and repetitions longer than one."""
    tokens = texts(3, length, alphabet, seed=length)
    assert torch.equal(repeated_suffix(tokens, impl=impl), expected(tokens))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("seed", range(20))
def test_parts_of_rows_and_limits(impl, seed):
    draw = random.Random(seed)
    batch, length = draw.choice([(1, 30), (4, 30), (3, 200)])
    tokens = texts(batch, length, draw.choice([1, 2, 3]), seed)

    def numbers(most: int) -> torch.Tensor | None:
        return torch.tensor([draw.randint(0, most) for _ in range(batch)]) if draw.random() < 0.7 else None

    given = [numbers(length), numbers(length), numbers(9), draw.choice([None, 0, 1, 7, 1000])]
    found = repeated_suffix(tokens, *given, impl=impl)
    assert torch.equal(found, expected(tokens, *given))
    # What lies outside a row's text changes nothing.
    places = torch.arange(length)
    outside = torch.zeros_like(tokens, dtype=torch.bool)
    if given[0] is not None:
        outside |= places < given[0][:, None]
    if given[1] is not None:
        outside |= places >= given[1][:, None]
    assert torch.equal(repeated_suffix(tokens.masked_fill(outside, 7), *given, impl=impl), found)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_text_by_hand(impl):
    """a b c c b c y a b c: three, one and two tokens of its end stood before c, b and y."""
    tokens = torch.tensor([[1, 2, 3, 3, 2, 3, 9, 1, 2, 3]])
    assert repeated_suffix(tokens, impl=impl).tolist() == [[0, 0, 0, 3, 1, 0, 2, 0, 0, 0]]


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_rows_and_nothing(impl):
    wide = texts(4, 60, 2)
    starts = torch.tensor([[3, 5], [9, 1]])[:, 0]
    for tokens in (wide[:, 7:50], wide[::2], wide.mT.contiguous().mT):
        part = starts if len(tokens) == 2 else None
        assert torch.equal(repeated_suffix(tokens, part, impl=impl), expected(tokens, part))
    for shape in ((0, 5), (3, 0)):
        assert repeated_suffix(torch.zeros(shape, dtype=torch.int64), impl=impl).shape == shape


@needs_extension
@pytest.mark.parametrize("kind", ["all equal", "two in turn", "long period", "drawn"])
def test_work_is_linear(kind):
    """Comparisons are counted: each token is compared with success once, and ends a stretch once."""
    length = 5000
    places = torch.arange(length)
    tokens = {
        "all equal": torch.zeros(length, dtype=torch.int64),
        "two in turn": places % 2,
        "long period": (places % 1700 == 0).long(),
        "drawn": torch.randint(0, 2, (length,)),
    }[kind]
    repeats = torch.empty_like(tokens)
    numbers = (tokens.data_ptr(), length), 0, 0, 0, length, repeats.data_ptr(), 1
    compared = _backends.require_extension().repeated_suffix((1, length), *numbers)
    assert compared < 2 * length
    assert torch.equal(repeats[None], repeated_suffix(tokens[None], impl="torch"))
    if kind == "all equal":
        assert torch.equal(repeats, places)


@needs_extension
def test_rows_on_several_threads():
    tokens = texts(8, 4096, 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        found = repeated_suffix(tokens, impl="cpu")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, torch.cat([repeated_suffix(row[None], impl="cpu") for row in tokens]))


def test_refusals():
    tokens, two = texts(2, 9, 3), torch.tensor([1, 2])
    for bad, options, text in [
        (tokens[0], {}, r"tokens is torch.int64 of shape \(9,\), must be int64 of shape \(B, T\)"),
        (tokens.int(), {}, r"tokens is torch.int32 of shape \(2, 9\)"),
        (tokens, {"starts": two[:1]}, r"starts is torch.int64 of shape \(1,\), must be int64 of shape \(2,\)"),
        (tokens, {"lengths": two.float()}, r"lengths is torch.float32"),
        (tokens, {"limits": two[None]}, r"limits is torch.int64 of shape \(1, 2\)"),
        (tokens, {"longest": -1}, "longest is -1, must be 0 or more"),
        (tokens, {"impl": "mps"}, "impl is 'mps', must be one of"),
        (tokens, {"impl": "triton"}, "impl='triton' has no kernel"),
    ]:
        with pytest.raises(ValueError, match=text):
            repeated_suffix(bad, **options)


@needs_extension
def test_values_that_cpp_refuses():
    tokens, one = texts(2, 9, 3), torch.tensor([1, 1])
    for name, value, text in [
        ("starts", 10, r"starts\[1\] is 10, must be in 0\.\.9"),
        ("starts", -1, r"starts\[1\] is -1, must be in 0\.\.9"),
        ("lengths", 10, r"lengths\[1\] is 10, must be in 0\.\.9"),
        ("limits", -1, r"limits\[1\] is -1, must be 0 or more"),
    ]:
        with pytest.raises(ValueError, match=text):
            repeated_suffix(tokens, **{name: one.index_fill(0, torch.tensor([1]), value)}, impl="cpu")


def test_operator_and_compilation():
    tokens, starts = texts(2, 40, 2), torch.tensor([0, 7])
    operator = torch.ops.simctg_fast.repeated_suffix
    torch.library.opcheck(operator, (tokens, None, None, None, 40))
    torch.library.opcheck(operator, (tokens.mT.contiguous().mT, starts, starts + 20, starts + 1, 9))
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(repeated_suffix, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for part in (tokens, tokens[:, :23]):
            assert torch.equal(compiled(part, starts), repeated_suffix(part, starts))
