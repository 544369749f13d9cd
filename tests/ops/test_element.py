"""16-bit floats as the C++ kernels load and store them (`csrc/simd/element.h`), against PyTorch: every one of them
widened, and every border between two of them, from both sides, narrowed."""

from __future__ import annotations

import ctypes
import pathlib

import pytest
import torch

from ..compiling import compiler, setup_names
from ..processes import run_child
from ..repository import repository

SETUP = repository("setup.py")
TYPES = {torch.bfloat16: 1, torch.float16: 2}  # csrc/api/element_type.h
WAYS = ("whole arrays", "one by one", "ends of rows")
GUARD = 16  # elements behind the last, which nobody may touch


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """`element_check.cpp` with the flags that the build has for an instruction set."""
    command, build = compiler(), setup_names()
    folder, made = tmp_path_factory.mktemp("element"), {}

    def library(isa):
        if isa not in made:
            target = folder / f"{isa}.so"
            flags = [*build["CXX_FLAGS"], *build["instruction_sets"]()[isa], *build["SIMD_FLAGS"], "-Werror"]
            flags += [*build["ISA_WARNINGS"], f"-I{SETUP.parent / 'csrc'}", "-fvisibility=default"]
            source = pathlib.Path(__file__).with_name("element_check.cpp")
            done = run_child([*command, *flags, "-shared", source, "-o", target])
            assert done.returncode == 0, done.stderr
            made[isa] = ctypes.CDLL(str(target))
        return made[isa]

    return library


def convert(function, x, out_dtype, way):
    out = torch.full((x.numel() + GUARD,), 77.0, dtype=out_dtype)
    narrow = x.dtype if out_dtype == torch.float32 else out_dtype
    function(
        *(TYPES[narrow], WAYS.index(way), ctypes.c_void_p(x.data_ptr())),
        *(ctypes.c_int64(x.numel()), ctypes.c_void_p(out.data_ptr())),
    )
    assert (out[-GUARD:] == 77.0).all()
    return out[:-GUARD]


def every(dtype):
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def floats(dtype):
    """Every number of the type, every middle between neighbours, and the floats on both sides of these; what is too
    large, too small or none; and a million of any bits."""
    numbers = every(dtype).double()
    numbers = numbers[numbers.isfinite()].unique()
    top = numbers[-1:] + (numbers[-1] - numbers[-2])  # from the middle before it on all is infinite
    numbers = torch.cat([-top, numbers, top])
    exact = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2]).float()
    infinity = torch.tensor(torch.inf)
    near = [exact, torch.nextafter(exact, infinity), torch.nextafter(exact, -infinity), -torch.zeros(1)]
    tiny = torch.arange(1, 70, dtype=torch.int32).view(torch.float32)  # float32's own subnormals
    nan = torch.tensor([0x7F800001, 0x7F80FFFF, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF], dtype=torch.int32)
    drawn = torch.randint(-(1 << 31), 1 << 31, (1 << 20,), dtype=torch.int64).to(torch.int32)
    special = torch.stack([infinity, -infinity])
    return torch.cat([*near, tiny, -tiny, nan.view(torch.float32), drawn.view(torch.float32), special])


def assert_same(found, expected):
    """The same bits, of NaN any."""
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    bits = torch.int32 if found.dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(bits)[~nan], expected.view(bits)[~nan])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", TYPES)
def test_every_number_is_widened(isa, libraries, dtype, way):
    x = every(dtype)
    widen = libraries(isa).widen_all
    assert_same(convert(widen, x, torch.float32, way), x.float())
    for count in range(1, 2 * GUARD):
        assert torch.equal(convert(widen, x[:count], torch.float32, way), x[:count].float())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", TYPES)
def test_narrowing_rounds_once_to_nearest_even(isa, libraries, dtype, way):
    x = floats(dtype)
    assert_same(convert(libraries(isa).narrow_all, x, dtype, way), x.to(dtype))
