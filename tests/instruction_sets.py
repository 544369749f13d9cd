"""The instruction sets that a test may ask for by the fixture `isa`, among them those that add to another."""

from __future__ import annotations

import platform

import pytest

BASE = ("neon",) if platform.machine() in ("aarch64", "arm64") else ("generic", "avx2", "avx512")
# Pairs of bfloat16 have a set of their own, with kernels for linear layers and attention.
EVERY = BASE if BASE == ("neon",) else (*BASE, "avx512_bf16")

# So have weights of 8 bits.
INT8 = BASE if BASE == ("neon",) else (*BASE, "avx2_vnni", "avx512_vnni", "avx512_bf16")

in_every_set = pytest.mark.parametrize("isa", EVERY, indirect=True)
