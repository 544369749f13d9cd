"""Committing winners: the C++ copy against the tensor formula."""

import pytest
import torch

from simctg_fast.ops import _backends
from simctg_fast.ops.prefix_commit import prefix_commit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("extension", [True, False])
def test_winners_are_written_and_nothing_else(dtype, extension, monkeypatch):
    if not extension:
        monkeypatch.setattr(_backends, "extension", lambda: None)
    generator = torch.Generator().manual_seed(0)
    winners = torch.tensor([2, 3, 8])  # rows of B = 3 sequences with k = 3 candidates
    pairs, expected = [], []
    for heads, dim in ((4, 16), (1, 7)):
        buffer = torch.randn(3, heads, 10, dim, generator=generator).to(dtype)
        # heads and rows as models leave them: a transposed view of (rows, 1, heads, dim)
        rows = torch.randn(9, 1, heads, dim, generator=generator).to(dtype).transpose(1, 2)
        pairs.append((buffer, rows))
        expected.append(buffer.clone())
        expected[-1][:, :, 5] = rows[winners, :, 0]
    prefix_commit(pairs, 5, winners)
    for (buffer, _), want in zip(pairs, expected, strict=True):
        assert torch.equal(buffer, want)


def test_rows_of_another_layout_take_the_tensor_path():
    buffer = torch.zeros(2, 3, 4, 5)
    rows = torch.randn(2, 5, 1, 3).transpose(1, 3)  # last dimension strided
    prefix_commit([(buffer, rows)], 1, torch.tensor([1, 0]))
    assert torch.equal(buffer[:, :, 1], rows[[1, 0], :, 0])
    assert not buffer[:, :, [0, 2, 3]].any()
