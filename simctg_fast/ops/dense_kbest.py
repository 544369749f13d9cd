"""The operator `simctg_fast::dense_kbest`: the n best paths under one matrix of transitions for all steps."""

from __future__ import annotations

import torch

from . import _backends
from ._autograd import define
from .crf_common import choose
from .crf_dense import check_dense, check_on_host
from .crf_viterbi import list_viterbi
from .dispatch import addresses, contiguous


def dense_kbest(
    emissions: torch.Tensor,
    transitions: torch.Tensor,
    lengths: torch.Tensor | None,
    paths: int,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Tags of the `paths` best paths, best first: `(B, T, paths)` int64, -1 beyond the lengths.

    Args:
        emissions: `(B, T, K)`, float32 or float64. transitions: `(K, K)`, from row to column; -inf in either forbids.
        lengths: `(B,)` int64.

    Order, memory and paths that do not exist are as in `crf_kbest`.
    """
    return torch.ops.simctg_fast.dense_kbest(emissions, transitions, lengths, paths, impl=impl)


def _fake(emissions, transitions, lengths, paths, *, impl="auto"):
    check_dense(emissions, transitions, lengths)
    batch, length, _ = emissions.shape
    if paths < 1:
        raise ValueError(f"n is {paths}, must be at least 1")
    return emissions.new_empty((batch, length, paths), dtype=torch.int64)


def _kbest(emissions, transitions, lengths, paths, *, impl="auto"):
    result = _fake(emissions, transitions, lengths, paths)
    if choose(impl, emissions, triton=False) == "torch":
        check_on_host(transitions)
        return list_viterbi(emissions, lambda t: transitions, lengths, paths)
    emissions, transitions, lengths = contiguous(emissions, transitions, lengths)
    _backends.require_extension().dense_kbest(
        tuple(emissions.shape),
        *addresses(emissions, transitions, lengths),
        paths,
        result.data_ptr(),
        torch.get_num_threads(),
    )
    return result


define(
    'dense_kbest(Tensor emissions, Tensor transitions, Tensor? lengths, int paths, *, str impl="auto") -> Tensor',
    _kbest,
    _fake,
)
