"""The operators `simctg_fast::crf_viterbi` and `simctg_fast::crf_kbest`: the best path, and the n best."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import _backends
from ._autograd import define
from .crf_beam import topk_in_order
from .crf_common import check_potentials, choose, inside
from .dispatch import addresses
from .viterbi_backtrace import viterbi_backtrace

SCRATCH = 1 << 20  # candidates that the PyTorch path of `crf_kbest` holds at a time

_POTENTIALS = "Tensor scores, Tensor tokens, Tensor left, Tensor right, Tensor? lengths"


def crf_viterbi(scores, tokens, left, right, lengths=None, *, impl: str = "auto") -> torch.Tensor:
    """Slots of the best path, `(B, T)` int64, -1 beyond the lengths; of equal paths one with low slots."""
    return torch.ops.simctg_fast.crf_viterbi(scores, tokens, left, right, lengths, impl=impl)


def crf_kbest(scores, tokens, left, right, lengths, paths: int, *, impl: str = "auto") -> torch.Tensor:
    """Slots of the `paths` best paths, best first: `(B, T, paths)` int64, -1 beyond the lengths.

    Where an item has fewer paths of finite score, the rest is -1 throughout. Of paths whose scores are equal the one
    with the lower last slot comes first, then the one with the lower slot before it, and so on. Memory is that of
    `min(paths, K) T K` numbers an item in C++, `paths T K` in PyTorch, whatever the scores are.
    """
    return torch.ops.simctg_fast.crf_kbest(scores, tokens, left, right, lengths, paths, impl=impl)


def _fake(scores, tokens, left, right, lengths, *, impl="auto"):
    check_potentials(scores, tokens, left, right, lengths)
    return scores.new_empty(scores.shape[:2], dtype=torch.int64)


def _fake_kbest(scores, tokens, left, right, lengths, paths, *, impl="auto"):
    check_potentials(scores, tokens, left, right, lengths)
    return scores.new_empty((*scores.shape[:2], paths), dtype=torch.int64)


def _viterbi(scores, tokens, left, right, lengths, *, impl="auto"):
    p = check_potentials(scores, tokens, left, right, lengths)
    backend = choose(impl, scores)
    if backend == "torch":
        backpointers, best = best_prefixes(scores, p.step, lengths)
        return viterbi_backtrace(backpointers, best.argmax(1), lengths, impl="torch")
    p = p.contiguous()
    if backend == "triton":
        from ..kernels import crf_filter as kernel

        return kernel.backtrace(*kernel.max_forward(p), p.lengths)
    slots = scores.new_empty(scores.shape[:2], dtype=torch.int64)
    _backends.require_extension().crf_viterbi(p.sizes, *addresses(*p, slots), torch.get_num_threads())
    return slots


def pointer_dtype(slots: int) -> torch.dtype:
    return torch.uint8 if slots <= 256 else torch.uint16


def best_prefixes(
    scores: torch.Tensor, step: Callable[[int], torch.Tensor], lengths: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Back-pointers `(B, T, K)`, and the score of the best prefix into each item's last slots, `(B, K)`, whose largest
    value is 0 or -inf. `step(t)`: transitions from t - 1 to t, `(B, K, K)` or `(K, K)`."""
    best, pointers = scores[:, 0], [torch.zeros_like(scores[:, 0], dtype=torch.int64)]
    for t in range(1, scores.shape[1]):
        value, pointer = (best[:, :, None] + step(t)).max(dim=1)
        value = value + scores[:, t]
        top = value.amax(1, keepdim=True)
        value = torch.where(top > float("-inf"), value - top, value)
        here = inside(lengths, t)
        best = value if here is None else torch.where(here, value, best)
        pointers.append(pointer)
    return torch.stack(pointers, 1).to(pointer_dtype(scores.shape[2])), best


def _kbest(scores, tokens, left, right, lengths, paths, *, impl="auto"):
    p = check_potentials(scores, tokens, left, right, lengths)
    if paths < 1:
        raise ValueError(f"n is {paths}, must be at least 1")
    if choose(impl, scores, triton=False) == "torch":
        return list_viterbi(scores, p.step, lengths, paths)
    p = p.contiguous()
    slots = scores.new_empty((*scores.shape[:2], paths), dtype=torch.int64)
    _backends.require_extension().crf_kbest(p.sizes, *addresses(*p), paths, slots.data_ptr(), torch.get_num_threads())
    return slots


def list_viterbi(
    scores: torch.Tensor, step: Callable[[int], torch.Tensor], lengths: torch.Tensor | None, paths: int
) -> torch.Tensor:
    """The `paths` best prefixes into every slot; a pointer names a slot and a rank in its list.

    `step(t)`: transitions from t - 1 to t, `(B, K, K)` or `(K, K)`. Candidates are in the order of their slots and
    ranks, and the first of equals is taken: the order of paths is that of `csrc/host/best_paths.h`.
    """
    batch, length, slots = scores.shape
    nothing = float("-inf")
    chunk = max(1, SCRATCH // max(1, batch * slots * paths))
    best = scores.new_full((batch, slots, paths), nothing)
    best[:, :, 0] = scores[:, 0]
    pointers = [torch.zeros_like(best, dtype=torch.int64)]
    for t in range(1, length):
        edges = step(t).expand(batch, -1, -1)
        here = inside(lengths, t)
        value, pointer = torch.empty_like(best), torch.empty_like(pointers[0])
        for j in range(0, slots, chunk):  # (B, targets, K * paths) candidates at a time
            candidates = best[:, None] + edges[:, :, j : j + chunk].transpose(1, 2).contiguous()[..., None]
            top, place = topk_in_order(candidates.flatten(2).flatten(0, 1), paths)
            value[:, j : j + chunk] = top.unflatten(0, candidates.shape[:2])
            pointer[:, j : j + chunk] = place.unflatten(0, candidates.shape[:2])
        value = value + scores[:, t, :, None]
        top = value.amax((1, 2), keepdim=True)
        value = torch.where(top > nothing, value - top, value)
        best = value if here is None else torch.where(here[:, :, None], value, best)
        pointers.append(pointer)
    final, entry = topk_in_order(best.flatten(1), paths)
    result = torch.full((batch, length, paths), -1, device=scores.device)
    for t in range(length - 1, -1, -1):
        here = inside(lengths, t)
        here = torch.ones_like(entry[:, :1], dtype=torch.bool) if here is None else here
        result[:, t] = torch.where(here & (final > nothing), entry // paths, -1)
        entry = torch.where(here, pointers[t].flatten(1).gather(1, entry), entry)
    return result


define(f'crf_viterbi({_POTENTIALS}, *, str impl="auto") -> Tensor', _viterbi, _fake)
define(f'crf_kbest({_POTENTIALS}, int paths, *, str impl="auto") -> Tensor', _kbest, _fake_kbest)
