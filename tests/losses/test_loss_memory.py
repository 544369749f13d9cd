"""Peak memory of the losses on the CPU: the gradient, a bit a pair, and a working set that does not grow."""

from __future__ import annotations

import ctypes
import pathlib
import sys

import pytest
import torch

from simctg_fast import contraclm_token_loss, contrastive_loss, cosine_regularization, simcse_unsup_loss
from simctg_fast.reference.contrastive_loss import contrastive_loss as reference
from simctg_fast.reference.simcse import simcse_unsup_loss as simcse_reference

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads and resets the peak in /proc")


@pytest.fixture(autouse=True)
def _large_blocks_go_back_at_once():
    """In a process that has run many tests glibc keeps large blocks and finds no room among them for the next."""
    mmap_threshold = -3  # M_MMAP_THRESHOLD
    ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 20)
    yield
    ctypes.CDLL(None).mallopt(mmap_threshold, 32 << 20)  # where its own adjustment ends


def added_bytes(loss_function, data: torch.Tensor, rounds: int = 3) -> int:
    """Peak of the resident size over one forward and backward pass above what was resident before; the least of a few
    rounds, since pages of others that the system brings back meanwhile count as well."""
    loss_function(data.detach().requires_grad_()).backward()  # what is loaded on first use stays
    return min(one_round(loss_function, data.detach().requires_grad_()) for _ in range(rounds))


def one_round(loss_function, leaf: torch.Tensor) -> int:
    ctypes.CDLL(None).malloc_trim(0)  # the allocator would serve us from what was freed
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    loss_function(leaf).backward()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 4096, 64), torch.float32),
        ((8, 1024, 128), torch.float32),
        ((1, 1024, 4096), torch.float32),
        ((2, 1100, 1024), torch.bfloat16),
        pytest.param((2, 4096, 768), torch.float32, marks=pytest.mark.full),
        pytest.param((1, 8192, 512), torch.bfloat16, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_contrastive_loss(shape, dtype, impl):
    batch, length, _ = shape
    states = (torch.randn(shape) + torch.randn(shape[2])).to(dtype)
    gradient = states.numel() * states.element_size()
    added = added_bytes(lambda s: contrastive_loss(s, impl=impl), states)
    assert added - gradient <= batch * length**2 / 8 + 30e6


def test_the_measure_sees_a_matrix():
    states = torch.randn(1, 2048, 64)
    assert added_bytes(reference, states) > 2 * 4 * 2048**2


def test_simcse():
    """At most a quarter of what one product and one cross-entropy take."""
    embeddings = torch.randn(4096, 64) + 0.5
    plain = added_bytes(simcse_reference, embeddings)
    assert plain > 2 * 4 * 4096**2
    assert added_bytes(simcse_unsup_loss, embeddings) <= plain / 4


def test_contraclm():
    """What a longer text adds is what its states take: twice the length, less than three times the memory."""
    added = {}
    for length in (2048, 4096):
        views = torch.randn(2, 1, length, 64) + 0.5
        added[length] = added_bytes(lambda v: contraclm_token_loss(*v), views) - views.numel() * 4
    assert added[2048] <= 40e6 < 4 * (2 * 2048) ** 2
    assert added[4096] - added[2048] <= 15e6


def test_cosine_regularization():
    states = torch.randn(1, 4096, 64)
    assert added_bytes(cosine_regularization, states) <= 20 * states.numel() * 4 < 4 * 4096**2
