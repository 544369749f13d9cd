"""The operator `simctg_fast::dense_kbest`: the n best paths under one matrix of transitions for all steps."""

from __future__ import annotations

import torch

from . import _backends
from .crf_common import address, choose
from .crf_viterbi import list_viterbi

_library = torch.library.Library("simctg_fast", "FRAGMENT")
_library.define(
    'dense_kbest(Tensor emissions, Tensor transitions, Tensor? lengths, int paths, *, str impl="auto") -> Tensor',
    tags=(torch.Tag.pt2_compliant_tag,),
)


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
    if emissions.dim() != 3 or emissions.shape[1] < 1 or emissions.shape[2] < 1:
        raise ValueError(f"emissions has shape {tuple(emissions.shape)}, must be (batch, length >= 1, tags >= 1)")
    batch, length, tags = emissions.shape
    if emissions.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"emissions has dtype {emissions.dtype}, must be float32 or float64")
    if transitions.shape != (tags, tags) or transitions.dtype != emissions.dtype:
        raise ValueError(
            f"transitions is {transitions.dtype} {tuple(transitions.shape)}, must be {emissions.dtype} ({tags}, {tags})"
        )
    if lengths is not None and (lengths.shape != (batch,) or lengths.dtype != torch.int64):
        raise ValueError(f"lengths is {lengths.dtype} {tuple(lengths.shape)}, must be int64 ({batch},)")
    for name, other in (("transitions", transitions), ("lengths", lengths)):
        if other is not None and other.device != emissions.device:
            raise ValueError(f"{name} is on {other.device}, emissions on {emissions.device}; one device is needed")
    if paths < 1:
        raise ValueError(f"n is {paths}, must be at least 1")
    return emissions.new_empty((batch, length, paths), dtype=torch.int64)


def _kbest(emissions, transitions, lengths, paths, *, impl="auto"):
    result = _fake(emissions, transitions, lengths, paths)
    if choose(impl, emissions, triton=False) == "torch":
        return list_viterbi(emissions, lambda t: transitions, lengths, paths)
    emissions, transitions = emissions.contiguous(), transitions.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    _backends.require_extension().dense_kbest(
        tuple(emissions.shape),
        emissions.data_ptr(),
        transitions.data_ptr(),
        address(lengths),
        paths,
        result.data_ptr(),
        torch.get_num_threads(),
    )
    return result


_library.impl("dense_kbest", _kbest, "CompositeExplicitAutograd")
torch.library.register_fake("simctg_fast::dense_kbest", _fake, lib=_library)
