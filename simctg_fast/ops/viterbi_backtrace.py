"""The operator `simctg_fast::viterbi_backtrace`: from back-pointers and last slots to paths.

C++ on the CPU (`csrc/api/viterbi.h`), PyTorch elsewhere and where the extension is absent. Both read the same strided
views, raise the same errors, and look only at slots that the paths run through.
"""

from __future__ import annotations

import torch

from ..checks import check_choice, check_devices
from . import _backends
from ._autograd import define
from .dispatch import addresses, choose, contiguous

IMPLS = ("auto", "cpu", "torch")
DTYPES = {torch.uint8: "uint8", torch.uint16: "uint16", torch.int32: "int32", torch.int64: "int64"}


def viterbi_backtrace(
    backpointers: torch.Tensor, last: torch.Tensor, lengths: torch.Tensor | None = None, *, impl: str = "auto"
) -> torch.Tensor:
    """See `simctg_fast.functional.viterbi_backtrace`."""
    path: torch.Tensor = torch.ops.simctg_fast.viterbi_backtrace(backpointers, last, lengths, impl=impl)
    return path


def _check(backpointers: torch.Tensor, last: torch.Tensor, lengths: torch.Tensor | None, impl: str) -> None:
    check_choice("impl", impl, IMPLS)
    if backpointers.dim() != 3 or backpointers.shape[2] < 1:
        raise ValueError(
            f"backpointers has shape {tuple(backpointers.shape)}, must be (batch, length, slots) with slots >= 1"
        )
    batch = backpointers.shape[0]
    for name, tensor in (("backpointers", backpointers), ("last", last), ("lengths", lengths)):
        if tensor is None:
            continue
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} has layout {tensor.layout}, must be {torch.strided}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}, must be one of {', '.join(map(str, DTYPES))}")
        check_devices("backpointers", backpointers, **{name: tensor})
        if name != "backpointers" and (tensor.dim() != 1 or tensor.shape[0] != batch):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be ({batch},) as backpointers has")


def _fake(
    backpointers: torch.Tensor, last: torch.Tensor, lengths: torch.Tensor | None = None, *, impl: str = "auto"
) -> torch.Tensor:
    _check(backpointers, last, lengths, impl)
    return backpointers.new_empty(backpointers.shape[:2], dtype=torch.int64)


def _backtrace(
    backpointers: torch.Tensor, last: torch.Tensor, lengths: torch.Tensor | None = None, *, impl: str = "auto"
) -> torch.Tensor:
    path = _fake(backpointers, last, lengths, impl=impl)
    if choose(impl, backpointers.device, cpu=lambda: None, impls=IMPLS) == "torch":
        return _trace(backpointers, last, lengths)
    last, lengths = contiguous(last.to(torch.int64), None if lengths is None else lengths.to(torch.int64))
    _backends.require_extension().viterbi_backtrace(
        DTYPES[backpointers.dtype],
        backpointers.data_ptr(),
        tuple(backpointers.shape),
        backpointers.stride(),
        *addresses(last, lengths, path),
        torch.get_num_threads(),
    )
    return path


def _trace(backpointers: torch.Tensor, last: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """The whole batch one step at a time, with a single look at the result from the host."""
    batch, length, slots = backpointers.shape
    last = last.to(torch.int64)
    if batch == 0 or length == 0:
        return _finish(last.new_empty((batch, length)), backpointers, last, lengths)
    # Few operators know uint16: read the same bits as int16 and take the sign off again.
    wide = backpointers.dtype == torch.uint16
    rows = backpointers.view(torch.int16) if wide else backpointers
    slot, steps = last, []
    for t in range(length - 1, -1, -1):
        steps.append(slot)
        if t == 0:
            break
        inside = slot.clamp(0, slots - 1)  # a wrong slot must not become a wild read; _finish reports it
        slot = rows[:, t].gather(1, inside[:, None])[:, 0].to(torch.int64)
        if wide:
            slot = slot & 0xFFFF
        if lengths is not None:
            slot = torch.where(lengths > t, slot, last)  # not in the sequence yet: it still has to start from `last`
    return _finish(torch.stack(steps[::-1], dim=1), backpointers, last, lengths)


def _finish(
    path: torch.Tensor, backpointers: torch.Tensor, last: torch.Tensor, lengths: torch.Tensor | None
) -> torch.Tensor:
    """Puts -1 beyond the lengths and raises if a slot on a path, or a length, is out of range."""
    batch, length, slots = backpointers.shape
    wrong = (path < 0) | (path >= slots)
    if lengths is None:
        wrong_item = wrong.any(dim=1)
    else:
        lengths = lengths.to(torch.int64)
        beyond = torch.arange(length, device=path.device) >= lengths[:, None]
        wrong &= ~beyond
        wrong_item = wrong.any(dim=1) | (lengths < 0) | (lengths > length)
        path = path.masked_fill(beyond, -1)
    if batch > 0 and bool(wrong_item.any()):
        _raise(int(wrong_item.to(torch.uint8).argmax()), path, wrong, last, lengths, slots)
    return path


def _raise(
    b: int, path: torch.Tensor, wrong: torch.Tensor, last: torch.Tensor, lengths: torch.Tensor | None, slots: int
) -> None:
    length = path.shape[1] if lengths is None else int(lengths[b])
    if not 0 <= length <= path.shape[1]:
        raise ValueError(f"lengths[{b}] is {length}, must be in 0..{path.shape[1]}")
    t = int(wrong[b].nonzero().max())  # the walk goes backwards, so the last wrong step came first
    name = f"last[{b}]" if t == length - 1 else f"backpointers[{b}, {t + 1}, {int(path[b, t + 1])}]"
    raise ValueError(f"{name} is {int(path[b, t])}, must be in 0..{slots - 1}")


define(
    'viterbi_backtrace(Tensor backpointers, Tensor last, Tensor? lengths=None, *, str impl="auto") -> Tensor',
    _backtrace,
    _fake,
)
