"""Linear layers with weights of 8 bits, and the output layer that certifies its largest results."""

from __future__ import annotations

import ctypes
import pathlib
import platform

import pytest
import torch

from simctg_fast.ops import _backends
from simctg_fast.ops.linear import layout_of, run_kernel
from simctg_fast.ops.linear_int8 import certified, quantized

from ..compiling import compiler, setup_names
from ..instruction_sets import INT8
from ..processes import run_child
from ..repository import repository

TYPES = [torch.float32, torch.bfloat16, torch.float16]
in_every_set = pytest.mark.parametrize("isa", INT8, indirect=True)
# Around fours, groups of 64, panels of sixteen and the groups of them, and cuts between threads.
IN_FEATURES = (1, 3, 4, 5, 31, 64, 66, 130, 770)
OUT_FEATURES = (1, 15, 16, 17, 47, 49, 64, 65, 300)
ROWS = (1, 2, 3, 4, 5, 6, 7, 12, 13, 40)


def draw(rows, in_features, out_features, dtype=torch.float32, transposed=False, outlier=1.0):
    x, weight = torch.randn(rows, in_features), torch.randn(out_features, in_features)
    x[:, in_features // 2] *= outlier
    weight *= torch.rand(out_features, 1) * 3  # factors of their own
    return (
        x.to(dtype),
        (weight.t().contiguous() if transposed else weight).to(dtype),
        torch.randn(out_features).to(dtype),
    )


def rounded(values, group):
    """In 8 bits and back, each ``group`` elements of a row by the largest of them."""
    parts = []
    for part in values.float().split(group, dim=1):
        most = part.abs().amax(dim=1, keepdim=True)
        factor = torch.full_like(most, 127) / most  # (127 / most is a product with its reciprocal)
        parts.append((part * factor).round().double() * (most / 127).double())
    return torch.cat(parts, dim=1)


def by_definition(x, weight, bias, transposed):
    weight = weight.t() if transposed else weight
    y = rounded(x, 64) @ rounded(weight, weight.shape[1]).t()
    return y if bias is None else y + bias.double()


@in_every_set
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_definition(isa, dtype, transposed, threads):
    threads(2)
    for index, in_features in enumerate(IN_FEATURES):
        for jndex, out_features in enumerate(OUT_FEATURES):
            rows = ROWS[(5 * index + jndex) % len(ROWS)]
            x, weight, bias = draw(rows, in_features, out_features, dtype, transposed)
            bias = bias if (index + jndex) % 3 else None
            y = run_kernel(x, weight, bias, transposed, quantized(weight, transposed))
            exact = by_definition(x, weight, bias, transposed)
            assert y.dtype is dtype
            assert y.shape == exact.shape
            rounding = (exact.to(dtype).double() - exact).norm()
            assert (y.double() - exact).norm() <= 1.01 * rounding + 1e-6 * exact.norm(), (
                rows,
                in_features,
                out_features,
            )


@in_every_set
@pytest.mark.parametrize("digits", [1, 2])
def test_a_row_depends_on_nothing_but_itself(isa, digits, threads):
    for in_features, out_features in [(770, 300), (33, 65)]:
        x, weight, bias = draw(40, in_features, out_features)
        copy = quantized(weight, False)

        def run(x, weight=weight, bias=bias, copy=copy):
            return run_kernel(x, weight, bias, False, copy) if digits == 1 else certified(x, weight, bias, copy, 3)

        threads(1)
        alone = torch.cat([run(row) for row in x.split(1)])
        for number in (1, 2):
            threads(number)
            for start, rows in ((0, 40), (1, 7), (5, 6), (30, 3)):
                assert torch.equal(run(x[start : start + rows]), alone[start : start + rows])


@in_every_set
def test_the_same_on_every_set(isa):
    """Integers are; what they are multiplied with is rounded."""
    x, weight, bias = draw(5, 130, 65)
    copy = quantized(weight, False)
    y = run_kernel(x, weight, bias, False, copy)
    _backends.extension().set_isa("auto")
    assert torch.equal(quantized(weight, False), copy)
    torch.testing.assert_close(run_kernel(x, weight, bias, False, copy), y, rtol=1e-5, atol=1e-5)


@in_every_set
def test_extremes(isa):
    """The largest sums there are, a row of zeros, rows that are not finite, and of strides of its own."""
    weight, x = torch.full((17, 65536), -1.0), torch.full((3, 65536), 1.0)
    x[1] = -1
    y = run_kernel(x, weight, None, False, quantized(weight, False))
    torch.testing.assert_close(y, torch.tensor([-65536.0, 65536.0, -65536.0])[:, None].expand(3, 17))
    x, weight, bias = draw(5, 37, 19)
    x[1] = 0
    x[2, 3], x[3, 5] = float("nan"), float("inf")
    copy = quantized(weight, False)
    for y in (run_kernel(x, weight, bias, False, copy), certified(x, weight, bias, copy, 4)):
        assert torch.equal(y[1], bias)
        assert y[2:4].isnan().all()
        assert y[[0, 4]].isfinite().all()
    wide = torch.full((5, 50), float("nan"))
    wide[:, 4:41] = x
    rows = [0, 1, 4]
    expected = run_kernel(x[rows], weight, bias, False, copy)
    assert torch.equal(run_kernel(wide[:, 4:41], weight, bias, False, copy)[rows], expected)
    assert run_kernel(x[:0], weight, bias, False, copy).shape == (0, 19)


def test_what_has_no_copy():
    assert quantized(torch.ones(0, 3), False) is None
    assert quantized(torch.ones(3, 0), False) is None
    for value in (float("nan"), float("inf")):
        weight = torch.ones(20, 5)
        weight[18, 4] = value
        assert quantized(weight, False) is None
        assert quantized(weight.t().contiguous(), True) is None
    copy = quantized(torch.zeros(3, 5), False)
    assert torch.equal(run_kernel(torch.ones(2, 5), torch.zeros(3, 5), None, False, copy), torch.zeros(2, 3))


# ---- the output layer -----------------------------------------------------------------------------------------------


def hard_cases(dtype):
    """Hidden states and output layers on which choosing is not easy."""
    torch.manual_seed(3)
    yield "plain", *draw(7, 130, 3000, dtype)
    yield "outliers", *draw(7, 130, 3000, dtype, outlier=100.0)
    x, weight, bias = draw(4, 64, 2000, dtype)
    yield "equal rows", x, weight[torch.randint(0, 30, (2000,))], None
    close = weight[:1].float() + 1e-3 * torch.randn(2000, 64)
    yield "close rows", x, close.to(dtype), None
    yield "a large bias", x, weight, (bias.float() * 1000).to(dtype)
    yield "small", (x.float() * 1e-4).to(dtype), weight, None
    if dtype is torch.float32:
        yield "vanishing", x * 1e-33, weight, None
        yield "huge", x * 1e16, weight, None
    states = torch.zeros(3, 64, dtype=dtype)
    states[1, 5] = 1
    yield "zeros", states, weight, None


def is_certified(x, weight, bias, copy, top):
    """Whether the largest results are those of the weight itself, bit by bit, and nothing else is among them."""
    exact = run_kernel(x, weight, bias, False)
    y = certified(x, weight, bias, copy, top)
    largest = exact.topk(min(top, len(weight))).values
    reached = exact >= largest[:, -1:]
    return torch.equal(y.topk(largest.shape[1]).values, largest) and torch.equal(y[reached], exact[reached])


@in_every_set
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_largest_are_exact(isa, dtype, threads):
    threads(2)
    for name, x, weight, bias in hard_cases(dtype):
        copy = quantized(weight, False)
        for top in (1, 4, 64, len(weight)):
            assert is_certified(x, weight, bias, copy, top), (name, top)


def test_the_bounds_are_needed(threads):
    """Without them rounding decides, and wrongly: a copy whose bounds are zero is caught."""
    x, weight, bias = draw(40, 130, 3000)
    copy = quantized(weight, False)
    assert is_certified(x, weight, bias, copy, 4)
    broken = quantized(weight, False)
    broken[-4 * 3008 :] = 0
    assert not is_certified(x, weight, bias, broken, 4)


def test_few_are_computed_twice():
    """It is a choice: most results are those in 8 bits."""
    x, weight, _ = draw(3, 770, 20000)
    y, exact = certified(x, weight, None, quantized(weight, False), 4), run_kernel(x, weight, None, False)
    assert ((y == exact).sum(dim=1) < 400).all()
    assert (y - exact).abs().max() < 0.1 * exact.std()


def test_layouts_have_names():
    assert layout_of(False) != layout_of(True) != layout_of(True, torch.int8) == layout_of(False, torch.int8)
    assert layout_of(True, torch.bfloat16) == layout_of(True)


# ---- AVX-VNNI, where the processor has none -------------------------------------------------------------------------


def test_the_set_that_few_have(tmp_path):
    """The same source, with the one instruction that this processor may lack written out."""
    if platform.machine() not in ("x86_64", "AMD64") or "avx2" not in _backends.extension().supported_isas():
        pytest.skip("needs AVX2")
    build = setup_names()
    flags = [*build["CXX_FLAGS"], *build["instruction_sets"]()["avx2"], *build["ISA_WARNINGS"], "-fvisibility=default"]
    flags += [f"-I{repository('csrc')}", "-DSIMCTG_ISA=avx2_vnni", "-DSIMCTG_ISAS(DO,...)=DO(avx2,__VA_ARGS__)"]
    flags += ["-DSIMCTG_EXTENDED_ISAS(DO,...)=DO(avx2_vnni,avx2,__VA_ARGS__)", "-Wno-builtin-macro-redefined"]
    source, target = pathlib.Path(__file__).with_name("int8_check.cpp"), tmp_path / "check.so"
    done = run_child([*compiler(), *flags, "-shared", str(source), "-o", str(target)])
    assert done.returncode == 0, done.stderr
    product = ctypes.CDLL(str(target)).product
    for rows, in_features, out_features in [(1, 770, 300), (5, 130, 65), (7, 3, 17), (9, 66, 16)]:
        for digits in (1, 2):
            x, weight, _ = draw(rows, in_features, out_features)
            memory, y = torch.empty(1 << 20, dtype=torch.int8), torch.empty(rows, out_features)
            sizes = [ctypes.c_int64(size) for size in (rows, in_features, out_features)]
            addresses = [ctypes.c_void_p(each.data_ptr()) for each in (x, weight, memory, y)]
            product(*addresses[:2], *sizes, ctypes.c_int(digits), *addresses[2:])
            w = rounded(weight, in_features)
            exact = (rounded(x, 64) if digits == 1 else x.double()) @ w.t()
            assert (y.double() - exact).norm() <= (1e-6 if digits == 1 else 1e-4) * exact.norm()
