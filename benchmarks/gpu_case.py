"""What the parts of `gpu.py` share: where they run, what a case is, and how it is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch  # the parent of the parts does without

# What it is ("case"), whether it "passed", the "figures" that show it, and the same as numbers.
Case = dict[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Where:
    """The device a part runs on, the dtype of its share where a part is cut by dtype, and the seconds it may take."""

    device: str = "cuda"
    tiny: bool = False  # one case of each kind, small: does it run at all?
    dtype: str = "float32"
    seconds: float = 570.0
    began: float = field(default_factory=time.monotonic)

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def few(self, items: Sequence[Item]) -> Sequence[Item]:
        return items[:1] if self.tiny else items

    def left(self) -> float:
        return self.began + self.seconds - time.monotonic()


Piece = Callable[[Where], Iterator[Case]]  # of a part: where it raises, the others go on


def case(name: str, passed: bool, figures: str, **numbers: Any) -> Case:
    return {"case": name, "passed": bool(passed), "figures": figures, **numbers}


def measured(
    name: str,
    ms: float,
    *,
    floor_ms: float | None = None,
    others: Mapping[str, float | str] | None = None,
    call_ms: float | None = None,
    calls: Mapping[str, float] | None = None,
    goals: Mapping[str, float] | None = None,
    passed: bool = True,
    note: str = "",
    **numbers: Any,
) -> Case:
    """A case that was timed. ``others``: milliseconds of those it is compared with, or why there are none; ``call_ms``
    and ``calls``: of the whole call; ``goals``: how many times faster than each, "floor": share of the floor's rate,
    "ms": at most."""
    numbers |= {"ms": ms, "floor_ms": floor_ms, "call_ms": call_ms, "note": note}
    numbers |= {"others": dict(others or {}), "calls": dict(calls or {}), "goals": dict(goals or {})}
    figures = [f"{ms:.3f} ms"]
    if floor_ms is not None:
        figures.append(f"{floor_ms / ms:.0%} of the floor's rate")
    figures += [x if isinstance(x, str) else f"{x / ms:.2f}x {peer}" for peer, x in numbers["others"].items()]
    if call_ms is not None:
        times = ", ".join(f"{other / call_ms:.2f}x {peer}" for peer, other in numbers["calls"].items())
        figures.append(f"whole call {call_ms:.0f} ms{f' ({times})' * bool(times)}")
    return case(name, passed, "; ".join([*figures, *filter(None, [note])]), **numbers)


def missed(found: Case) -> list[str]:
    """The goals that a timed case does not reach, a sentence each."""
    texts = []
    for name, goal in found.get("goals", {}).items():
        if name == "floor":
            reached = found["floor_ms"] / found["ms"]
            if reached < goal:
                texts.append(f"MISSED {goal:.0%} of the floor's rate ({reached:.0%})")
        elif name == "ms":
            if found["ms"] > goal:
                texts.append(f"MISSED {goal:g} ms ({found['ms']:.3f})")
        elif not isinstance(other := found["others"].get(name), float):
            texts.append(f"not measured against {name}, goal {goal:g}x")
        elif other / found["ms"] < goal:
            texts.append(f"MISSED {goal:g}x {name} ({other / found['ms']:.2f}x)")
    return texts


def tried(run: Callable[[], Item]) -> Item | str:
    """What it returns, or how it failed: a peer may lack memory or a compiler."""
    import torch

    try:
        return run()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:160]
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def within(result: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, factor: float = 2.0) -> tuple[bool, str]:
    """Whether the largest error is at most `factor` times the plain formula's, plus a few roundings of the dtype."""
    import torch

    error = (result.double().cpu() - truth).abs().max().item()
    allowed = factor * (plain.double().cpu() - truth).abs().max().item()
    allowed += 4 * torch.finfo(plain.dtype).eps * truth.abs().max().item()
    return error <= allowed, f"error {error:.1e}, allowed {allowed:.1e}"  # NaN compares false


def spread(run: Callable[[], Any], where: Where, captured: bool = True) -> list[float]:
    """20th, 50th and 80th percentile in milliseconds; the cache is flushed before each run. ``captured``: of a CUDA
    graph of it, so that the device does not wait for Python; a decoding step is one as well."""
    if not where.cuda:
        start = time.perf_counter()
        run()
        return [1e3 * (time.perf_counter() - start)] * 3
    import torch
    from triton.testing import do_bench

    if captured:
        from simctg_fast.kernels._decode import own_counters

        for _ in range(3):  # compiles
            run()
        torch.cuda.synchronize()
        graph, counters = torch.cuda.CUDAGraph(), torch.zeros(1 << 16, dtype=torch.int32, device="cuda")
        with own_counters(counters), torch.cuda.graph(graph):
            run()
        run = graph.replay
    return do_bench(run, warmup=25, rep=100, quantiles=[0.2, 0.5, 0.8])


def milliseconds(run: Callable[[], Any], where: Where, captured: bool = True) -> float:
    return spread(run, where, captured)[1]


def copy_bandwidth(where: Where) -> float:
    """Bytes read and written a second by a copy, measured."""
    import torch

    source = torch.empty(1 << (32 if where.cuda else 24), dtype=torch.uint8, device=where.device).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source), where) / 1e3)
