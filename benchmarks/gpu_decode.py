"""The decoding step's part of `gpu.py`: its kernels on a device against float64, and their speed.

python benchmarks/gpu_decode.py small             # every kernel once, at sizes for compute-sanitizer
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

# What a case is, whether it passed, the figures that show it, and the same as numbers for the result file.
Case = tuple[str, bool, str, dict[str, Any]]
Within = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[bool, str]]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ROOT = Path(__file__).resolve().parent.parent


def case(name: str, passed: bool, figures: str, **numbers: Any) -> Case:
    return name, passed, figures, numbers


# ---- correctness ----------------------------------------------------------------------------------------------------


def check_select(device: str, within: Within) -> Iterator[Case]:
    from simctg_fast.ops.candidate_select import candidate_select

    for dtype, (batch, k, capacity, width) in itertools.product(
        FLOATS, [(1, 1, 5, 1), (3, 5, 301, 769), (5, 64, 130, 1600), (2, 8, 2000, 4096)]
    ):
        states = torch.randn(batch, k, width, device=device).to(dtype)
        history = torch.nn.functional.normalize(torch.randn(batch, capacity, width, device=device), dim=-1).to(dtype)
        lengths = torch.randint(1, capacity + 1, (batch,), device=device)
        lengths[0] = capacity - 1
        probs = torch.rand(batch, k, device=device).sort(dim=-1, descending=True).values
        unit = torch.nn.functional.normalize(states.double().cpu(), dim=-1)
        cosine = unit @ history.double().cpu().mT
        seen = torch.arange(capacity) < lengths.cpu()[:, None]
        truth = cosine.masked_fill(~seen[:, None], -torch.inf).amax(-1)
        plain = torch.nn.functional.normalize(states.float(), dim=-1).to(dtype) @ history.mT
        plain = plain.masked_fill(~seen[:, None].to(device), -torch.inf).amax(-1)
        before = history.clone()
        selected, winner, penalty, _ = candidate_select(states, probs, history, lengths, 0.6, with_penalty=True)
        passed, figures = within(penalty, plain, truth)
        rows = torch.arange(batch, device=device)
        score = 0.4 * probs - 0.6 * penalty
        passed &= torch.equal(selected, score.argmax(-1)) or bool(
            (score.max(-1).values - score[rows, selected] <= 1e-6).all()
        )
        passed &= torch.equal(winner, states[rows, selected])
        changed = (history != before).any(-1)
        passed &= bool((changed.sum(-1) <= (lengths < capacity)).all())
        fits = lengths < capacity
        unit = torch.nn.functional.normalize(winner.float(), dim=-1)[fits]
        passed &= bool(((history[rows[fits], lengths[fits]].float() - unit).abs() <= torch.finfo(dtype).eps).all())
        yield case(f"select {dtype} batch {batch} k {k} capacity {capacity} width {width}", passed, figures)


def check_attention_rows(device: str, within: Within) -> Iterator[Case]:
    from simctg_fast.ops.shared_prefix_attention import shared_prefix_attention

    shapes = [(2, 4, 12, 12, 64, 513), (3, 5, 8, 2, 80, 257), (2, 1, 32, 8, 128, 1100), (1, 8, 8, 1, 256, 700)]
    for dtype, shape, window in itertools.product(FLOATS, shapes, (None, 100)):
        batch, k, heads, kv_heads, dim, capacity = shape

        def draw(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(*size, device=device).to(dtype)

        query = draw(batch * k, heads, 1, dim)
        key, value = draw(batch, kv_heads, capacity, dim), draw(batch, kv_heads, capacity, dim)
        new_key, new_value = draw(batch * k, kv_heads, 1, dim), draw(batch * k, kv_heads, 1, dim)
        lengths = torch.randint(1, capacity + 1, (batch,), device=device)
        starts = (torch.rand(batch, device=device) * lengths).long()
        rows = {"lengths": lengths, "starts": starts, "window": window, "scaling": dim**-0.5}
        arguments = (query, key, value, capacity, new_key, new_value)
        out = shared_prefix_attention(*arguments, **rows)
        plain = shared_prefix_attention(*arguments, **rows, impl="torch")
        there = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in rows.items()}
        wide = [x.double().cpu() if isinstance(x, torch.Tensor) else x for x in arguments]
        truth = shared_prefix_attention(*wide, **there, impl="torch")
        passed, figures = within(out, plain, truth)
        name = f"attention rows {dtype} batch {batch} k {k} heads {heads}/{kv_heads} dim {dim} window {window}"
        yield case(name, passed and out.dtype == dtype, figures)


def check_commit(device: str) -> Iterator[Case]:
    from simctg_fast.ops.prefix_commit import prefix_commit

    for dtype, (batch, k, heads, dim) in itertools.product(FLOATS, [(1, 1, 1, 1), (3, 4, 5, 80), (8, 8, 8, 128)]):
        pairs = [
            (
                torch.randn(batch, heads, 33, dim, device=device).to(dtype),
                torch.randn(batch * k, 1, heads, dim, device=device).to(dtype).transpose(1, 2),
            )
            for _ in range(6)
        ]
        winners = torch.arange(batch, device=device) * k + torch.randint(k, (batch,), device=device)
        positions = torch.randint(33, (batch,), device=device)
        expected = [buffer.clone() for buffer, _ in pairs]
        for buffer, (_, rows) in zip(expected, pairs, strict=True):
            buffer[torch.arange(batch, device=device), :, positions] = rows[winners, :, 0]
        prefix_commit(pairs, positions, winners)
        wrong = sum(int((a != b).sum()) for a, (b, _) in zip(expected, pairs, strict=True))
        yield case(f"commit {dtype} batch {batch} k {k} heads {heads} dim {dim}", wrong == 0, f"{wrong} differ")


def check_top_k(device: str) -> Iterator[Case]:
    from simctg_fast.ops.top_k import top_k_probs

    for dtype, (batch, vocabulary, k) in itertools.product(FLOATS, [(1, 7, 3), (3, 50257, 4), (32, 128256, 64)]):
        logits = (4 * torch.randn(batch, vocabulary, device=device)).to(dtype)
        logits[:, ::7] = float("-inf")
        probs, tokens = top_k_probs(logits, k)
        truth = logits.double().softmax(-1)
        error = (probs.double() - truth.topk(k).values).abs().max().item()
        passed = torch.equal(truth.gather(1, tokens), truth.topk(k).values) and error <= 2e-6
        passed &= all(len(set(row)) == k for row in tokens.tolist())
        yield case(f"top_k {dtype} batch {batch} vocabulary {vocabulary} k {k}", passed, f"error {error:.1e}")


def check_offsets(device: str) -> Iterator[Case]:
    """Tensors of more than 2³¹ elements: what stands behind the limit of 32 bits is found."""
    from simctg_fast.ops.candidate_select import candidate_scan, candidate_select
    from simctg_fast.ops.prefix_commit import prefix_commit
    from simctg_fast.ops.shared_prefix_attention import shared_prefix_attention
    from simctg_fast.ops.top_k import top_k_probs

    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 0
    if free < 24e9:
        yield case("offsets", True, f"left out: {free / 1e9:.0f} GB free, 24 are needed")
        return
    kind = {"device": device, "dtype": torch.bfloat16}
    for batch, length, width in ((1, 1 << 20, 2304), (3, 190_000, 4096)):
        history = torch.zeros(batch, length, width, **kind)
        history[..., 0] = 1
        states = torch.randn(batch, 4, width, **kind)
        history[-1, length - 2] = torch.nn.functional.normalize(states[-1, 2].float(), dim=-1)
        penalty, position = candidate_scan(states, history, length)
        passed = position[-1, 2].item() == length - 2 and abs(penalty[-1, 2].item() - 1) < 1e-2
        lengths = torch.full((batch,), length - 1, device=device)
        _, winner, _, _ = candidate_select(states, torch.rand(batch, 4, device=device), history, lengths, 0.6)
        unit = torch.nn.functional.normalize(winner[-1].float(), dim=-1)
        passed &= bool((history[-1, -1].float() - unit).abs().max() <= 0.01)
        yield case(f"scoring of {history.numel() / 2**31:.2f} · 2³¹ elements", passed, f"at {position[-1, 2].item()}")
        del history
    batch, heads, length, dim, k = 2, 8, 1_060_000, 128, 4
    key = torch.randn(batch, heads, length, dim, **kind)
    query, own = torch.randn(batch * k, 32, 1, dim, **kind), torch.randn(batch * k, heads, 1, dim, **kind)
    whole = shared_prefix_attention(query, key, key, length, own, own, scaling=dim**-0.5)
    alone = shared_prefix_attention(query[k:], key[1:], key[1:], length, own[k:], own[k:], scaling=dim**-0.5)
    error = (whole[k:].float() - alone.float()).abs().max().item()
    yield case(f"attention over {key.numel() / 2**31:.2f} · 2³¹ elements", error <= 1e-2, f"error {error:.1e}")
    prefix_commit([(key, own)], torch.full((batch,), length - 1, device=device), torch.tensor([0, k], device=device))
    yield case("commit behind 2³¹ elements", torch.equal(key[1, :, -1], own[k, :, 0]), "")
    del key
    logits = torch.randn(17_000, 128_256, **kind)
    probs, tokens = top_k_probs(logits, 4)
    expected = logits[-1].float().softmax(-1)
    passed = torch.allclose(probs[-1], expected.topk(4).values) and torch.equal(
        expected[tokens[-1]], expected.topk(4).values
    )
    yield case(f"top_k of {logits.numel() / 2**31:.2f} · 2³¹ logits", passed, "")


def small(device: str = "cuda") -> bool:
    """Every kernel of the decoding step once or twice, at sizes a memory checker gets through."""

    def exact(result: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> tuple[bool, str]:
        error = (result.double().cpu() - truth).abs().max().item()
        return error <= 0.05, f"error {error:.1e}"

    torch.manual_seed(0)
    passed = True
    for name, ok, figures, _ in itertools.chain(
        check_select(device, exact), check_attention_rows(device, exact), check_commit(device)
    ):
        passed &= ok
        print("ok" if ok else "FAIL", name, figures, flush=True)
    return passed


def check_sanitizer(device: str) -> Iterator[Case]:
    """`compute-sanitizer memcheck` over the small sweep, where it attaches; else the reason."""
    tool = shutil.which("compute-sanitizer") or next(
        (str(path) for path in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )
    if tool is None or device != "cuda":
        yield case("memcheck", True, "left out: " + ("no compute-sanitizer" if tool is None else f"device {device}"))
        return
    command = [
        tool,
        "--tool",
        "memcheck",
        "--target-processes",
        "application-only",
        "--error-exitcode",
        "99",
        sys.executable,
        __file__,
        "small",
    ]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=420)
    except subprocess.TimeoutExpired:
        yield case("memcheck", True, "left out: it took over 420 s")
        return
    lines = (done.stdout + done.stderr).strip().splitlines()
    summary = next((line for line in lines if "ERROR SUMMARY" in line), lines[-1] if lines else "no output")
    if any(word in summary or word in done.stdout for word in ("Device not supported", "Unable to")):
        yield case("memcheck", True, f"left out, it does not attach: {summary}")
        return
    if done.returncode:
        print("\n".join(lines[-30:]))
    yield case("memcheck", done.returncode == 0 and "0 errors" in summary, summary)


# ---- speed of the kernels -------------------------------------------------------------------------------------------


def milliseconds(run: Callable[[], Any], captured: bool = True, rep: int = 100) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile; the cache is flushed before each run. ``captured``: of a CUDA graph of it, so
    that the device does not wait for Python; a decoding step is one as well."""
    from triton.testing import do_bench

    from simctg_fast.kernels._decode import own_counters

    if captured:
        counters = torch.zeros(1 << 16, dtype=torch.int32, device="cuda")
        for _ in range(3):  # compiles, and tunes where there is something to tune
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with own_counters(counters), torch.cuda.graph(graph):
            run()
        return tuple(do_bench(graph.replay, warmup=25, rep=rep, quantiles=[0.2, 0.5, 0.8]))
    return tuple(do_bench(run, warmup=25, rep=rep, quantiles=[0.2, 0.5, 0.8]))


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy, measured."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source))[1] / 1e3)


def measure_ceilings(device: str) -> Iterator[Case]:
    """Copy bandwidth and products of bf16 matrices."""
    if device != "cuda":
        yield case("ceilings", True, "left out: timings need a CUDA device")
        return
    copy = copy_bandwidth()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flop = 2 * 8192**3 / (milliseconds(lambda: a @ b)[1] / 1e3)
    found = {"copy_bytes_per_s": copy, "bf16_flop_per_s": flop}
    yield case("ceilings", True, f"copy {copy / 1e12:.2f} TB/s, bf16 {flop / 1e12:.0f} TFLOP/s", **found)


def measure_kernel(device: str, kernel: str) -> Iterator[Case]:
    """Time of a kernel beside its floor (the bytes it has to move, at copy bandwidth) and of its alternatives."""
    if device != "cuda":
        yield case(kernel, True, "left out: timings need a CUDA device")
        return
    copy = copy_bandwidth()
    for name, variants, bytes_moved, goals in MEASURED[kernel]():
        floor = bytes_moved / copy * 1e3
        times = {provider: milliseconds(run, provider not in _NOT_CAPTURED) for provider, run in variants.items()}
        ours = times.pop("ours")
        share = floor / ours[1]
        text = f"{ours[1]:.3f} ms, {share:.0%} of the floor's rate (goal {goals.get('floor', 0):.0%})"
        for provider, other in times.items():
            goal = f" (goal {goals[provider]}x)" if provider in goals else ""
            text += f"; {other[1] / ours[1]:.2f}x {provider}{goal}"
        numbers = {"floor_ms": floor, "share_of_floor": share, "ms": ours[1], "others": times, "goals": goals}
        numbers["quantiles"] = ours
        yield case(name, True, text, **numbers)


def _scoring():
    from simctg_fast.ops.candidate_select import candidate_scan, candidate_select

    for batch, length, width in ((32, 4096, 4096), (8, 4096, 4096), (1, 4096, 4096), (32, 1024, 768)):
        kind = {"device": "cuda", "dtype": torch.bfloat16}
        states, raw = torch.randn(batch, 4, width, **kind), torch.randn(batch, length, width, **kind)
        history = torch.nn.functional.normalize(raw, dim=-1)
        probs, lengths = torch.rand(batch, 4, device="cuda"), torch.full((batch,), length - 1, device="cuda")

        def renormalised(states=states, raw=raw):
            unit = torch.nn.functional.normalize(raw, dim=-1)
            return (torch.nn.functional.normalize(states, dim=-1) @ unit.mT).amax(-1)

        def copies(states=states, raw=raw):  # what transformers 4.55.4 does each step
            context = raw.repeat_interleave(4, dim=0)
            context = context / context.norm(dim=2, keepdim=True)
            new = states.flatten(0, 1)[:, None]
            new = new / new.norm(dim=2, keepdim=True)
            return torch.matmul(context, new.transpose(1, 2)).squeeze(-1).max(dim=-1).values

        def bmm(states=states, history=history):
            return (torch.nn.functional.normalize(states, dim=-1) @ history.mT).amax(-1)

        variants = {
            "ours": lambda s=states, p=probs, h=history, n=lengths: candidate_select(s, p, h, n, 0.6),
            "ours, scan alone": lambda s=states, h=history, n=length: candidate_scan(s, h, n),
            "4.55.4's code": copies,
            "one copy renormalised": renormalised,
            "bmm on a normalised history": bmm,
        }
        goals: dict[str, float] = {}
        if (batch, width) == (32, 4096):
            variants["one copy renormalised, torch.compile"] = torch.compile(renormalised)
            goals = {
                "floor": 0.9, "4.55.4's code": 15, "one copy renormalised": 3.3,
                "one copy renormalised, torch.compile": 3.3, "bmm on a normalised history": 1.2,
            }  # fmt: skip
        yield f"scoring B={batch} T={length} D={width} k=4 bf16", variants, history.numel() * 2, goals


def _attention():
    from simctg_fast.ops.shared_prefix_attention import shared_prefix_attention

    sdpa = torch.nn.functional.scaled_dot_product_attention
    for batch, k, heads, kv_heads, length, dim in (
        (32, 4, 32, 8, 4096, 128), (8, 4, 32, 8, 4096, 128), (1, 4, 32, 8, 4096, 128), (32, 1, 32, 8, 4096, 128),
        (32, 4, 12, 12, 1024, 64),
    ):  # fmt: skip
        kind = {"device": "cuda", "dtype": torch.bfloat16}
        query = torch.randn(batch * k, heads, 1, dim, **kind)
        key, value = (torch.randn(batch, kv_heads, length + 1, dim, **kind) for _ in range(2))
        new_key, new_value = (torch.randn(batch * k, kv_heads, 1, dim, **kind) for _ in range(2))
        lengths = torch.full((batch,), length, device="cuda")
        keys, values = (x.repeat_interleave(k, dim=0) for x in (key, value))
        mask = torch.zeros(batch * k, 1, 1, length + 1, **kind)
        groups = heads // kv_heads

        def ours(q=query, key=key, value=value, nk=new_key, nv=new_value, n=lengths, length=length, dim=dim):
            return shared_prefix_attention(q, key, value, length, nk, nv, scaling=dim**-0.5, lengths=n)

        def grouped(q=query, keys=keys, values=values):
            return sdpa(q, keys, values, enable_gqa=True)

        def repeated(q=query, keys=keys, values=values, mask=mask, groups=groups):  # transformers, with a mask
            return sdpa(q, keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1), attn_mask=mask)

        variants = {"ours": ours, "SDPA on k copies": grouped, "SDPA, mask and repeat_kv": repeated}
        goals = {}
        if (batch, k, dim) == (32, 4, 128):
            goals = {"floor": 0.85, "SDPA on k copies": 3.7, "SDPA, mask and repeat_kv": 8}
        name = f"attention B={batch} k={k} heads {heads}/{kv_heads} L={length} D={dim} bf16"
        yield name, variants, 2 * batch * kv_heads * length * dim * 2, goals


def _commit():
    from simctg_fast.kernels import prefix_commit as kernels
    from simctg_fast.ops.prefix_commit import CommitPlan, prefix_commit

    batch, k, layers, heads, dim = 32, 4, 32, 8, 128
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    pairs = [
        (torch.randn(batch, heads, 256, dim, **kind), torch.randn(batch * k, heads, 1, dim, **kind))
        for _ in range(2 * layers)
    ]
    winners, positions = torch.arange(batch, device="cuda") * k, torch.full((batch,), 100, device="cuda")
    plan = CommitPlan()
    plan.run(pairs, positions, winners)
    unit = kernels.table_of(pairs)[1]

    def plain():
        for buffer, rows in pairs:
            buffer[:, :, 100] = rows.squeeze(2).index_select(0, winners)

    variants = {
        "ours": lambda: kernels.launch(plan.table, unit, winners, positions),
        "ours, table made anew": lambda: prefix_commit(pairs, positions, winners),  # as outside of a graph
        "a copy a tensor": plain,
    }
    yield f"commit of {layers} layers B={batch}", variants, 2 * 2 * layers * batch * heads * dim * 2, {}


def _top_k():
    from simctg_fast.ops.top_k import top_k_probs

    for batch, k in ((1, 4), (32, 4), (32, 64)):
        logits = torch.randn(batch, 128_256, device="cuda")
        variants = {
            "ours": lambda x=logits, k=k: top_k_probs(x, k),
            "softmax and topk": lambda x=logits, k=k: x.softmax(-1).topk(k),
            "topk and logsumexp": lambda x=logits, k=k: top_k_probs(x, k, "torch"),
        }
        yield f"top_k of 128256 B={batch} k={k} fp32", variants, logits.numel() * 4, {}


MEASURED = {"scoring": _scoring, "attention": _attention, "commit": _commit, "top_k": _top_k}
_NOT_CAPTURED = {"ours, table made anew"}


def main() -> int:
    if sys.argv[1:2] == ["small"]:
        if not torch.cuda.is_available():
            print("no CUDA device here")
            return 1
        return int(not small())
    print(__doc__)
    return 2


if __name__ == "__main__":
    if importlib.util.find_spec("simctg_fast") is None:
        sys.path.insert(0, str(ROOT))
    sys.exit(main())
