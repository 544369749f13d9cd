"""Rows of all processes in one tensor: values, and gradients that reach the process a row came from."""

from __future__ import annotations

import pytest
import torch

from simctg_fast.distributed import gather_rows, sum_over_processes, world_size

from ..two_processes import run_two


def test_one_process():
    rows = torch.randn(3, 4, requires_grad=True)
    gathered, first = gather_rows(rows)
    assert gathered is rows
    assert first == 0
    assert world_size() == 1
    total = sum_over_processes(rows)
    assert not total.requires_grad
    assert torch.equal(total, rows)
    with pytest.raises(ValueError, match="at least one dimension, got a scalar"):
        gather_rows(torch.tensor(1.0))


GATHER = """
from simctg_fast.distributed import gather_rows, sum_over_processes, world_size
result = {}
for name, (parts, weights) in argument.items():
    rows = parts[rank].clone().requires_grad_()
    gathered, first = gather_rows(rows)
    # A different function on each process, so that a gradient counted once or left at home shows.
    (gathered.sin() * weights[rank]).sum().backward()
    result[name] = gathered.detach(), first, rows.grad
result["total"] = sum_over_processes(torch.tensor([rank + 1, 10 * rank])), world_size()
"""


def test_two_processes(tmp_path):
    shapes = {"even": (3, 3), "uneven": (2, 5), "empty": (0, 4), "matrices": (1, 2)}
    argument = {}
    for name, (left, right) in shapes.items():
        tail = (4, 3) if name == "matrices" else (6,)
        parts = [torch.randn(n, *tail, dtype=torch.float64) for n in (left, right)]
        argument[name] = parts, torch.randn(2, left + right, *tail, dtype=torch.float64)
    results = run_two(tmp_path, GATHER, argument)
    for name, (parts, weights) in argument.items():
        everything = torch.cat(parts)
        grad = everything.cos() * weights.sum(0)
        for rank, (begin, end) in enumerate([(0, len(parts[0])), (len(parts[0]), len(everything))]):
            gathered, first, own_grad = results[rank][name]
            assert torch.equal(gathered, everything), name
            assert first == begin
            torch.testing.assert_close(own_grad, grad[begin:end], rtol=1e-14, atol=1e-14)
    for result in results:
        assert result["total"][0].tolist() == [3, 10]
        assert result["total"][1] == 2
