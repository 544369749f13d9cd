"""The decoding step's part of `gpu.py`: its kernels on a device against float64, and their speed.

python benchmarks/gpu_decode.py             # every kernel once or twice on CUDA, small: for compute-sanitizer
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_case import Case, Piece, Where, case, copy_bandwidth, measured, milliseconds, spread, tried, within

ROOT = Path(__file__).resolve().parent.parent


# ---- correctness ----------------------------------------------------------------------------------------------------


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def check_select(where: Where) -> Iterator[Case]:
    from simctg_fast.ops.candidate_select import candidate_select

    dtype, device = getattr(torch, where.dtype), where.device
    shapes = [(3, 5, 301, 769), (1, 1, 5, 1), (5, 64, 130, 1600), (2, 8, 2000, 4096)]
    for batch, k, capacity, width in where.few(shapes):
        states = torch.randn(batch, k, width, device=device).to(dtype)
        history = unit_rows(torch.randn(batch, capacity, width, device=device)).to(dtype)
        lengths = torch.randint(1, capacity + 1, (batch,), device=device)
        lengths[0] = capacity - 1
        probs = torch.rand(batch, k, device=device).sort(dim=-1, descending=True).values
        cosine = unit_rows(states.double().cpu()) @ history.double().cpu().mT
        seen = torch.arange(capacity) < lengths.cpu()[:, None]
        truth = cosine.masked_fill(~seen[:, None], -torch.inf).amax(-1)
        plain = unit_rows(states.float()).to(dtype) @ history.mT
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
        fits = lengths < capacity
        passed &= bool(((history != before).any(-1).sum(-1) <= fits).all())
        written = history[rows[fits], lengths[fits]].float() - unit_rows(winner.float())[fits]
        passed &= bool((written.abs() <= torch.finfo(dtype).eps).all())
        yield case(f"select {where.dtype} batch {batch} k {k} capacity {capacity} width {width}", passed, figures)


def check_scan(where: Where) -> Iterator[Case]:
    from simctg_fast.ops.candidate_select import candidate_scan
    from simctg_fast.reference.contrastive_search import degeneration_penalty

    dtype, device = getattr(torch, where.dtype), where.device
    shapes = itertools.product([(3, 5, 129, 768), (1, 4, 1, 64), (8, 8, 1000, 1024)], (True, False))
    for (batch, k, length, width), masked in where.few(list(shapes)):
        states = torch.randn(batch, k, width, device=device).to(dtype)
        history = unit_rows(torch.randn(batch, length + 7, width, device=device)).to(dtype)
        mask = None
        if masked:
            mask = torch.rand(batch, length + 7, device=device) > 0.3
            mask[:, 0] = True
        wide = history[:, :length].double().cpu().repeat_interleave(k, dim=0)
        real = None if mask is None else mask[:, :length].cpu().repeat_interleave(k, dim=0)
        truth = degeneration_penalty(wide, states.flatten(0, 1).double().cpu(), real).view(batch, k)
        cosine = unit_rows(states.float()).to(dtype) @ history[:, :length].mT
        if mask is not None:
            cosine = cosine.masked_fill(~mask[:, None, :length], float("-inf"))
        penalty, position = candidate_scan(states, history, length, mask)
        passed, figures = within(penalty, cosine.amax(-1), truth)
        if mask is not None:
            passed = passed and bool(mask.gather(1, position).all())
        name = f"scan {where.dtype} batch {batch} k {k} length {length} width {width}{' masked' * masked}"
        yield case(name, passed and penalty.device.type == device, figures)


def check_attention(where: Where) -> Iterator[Case]:
    """One length for all rows, with every option."""
    from simctg_fast.ops.shared_prefix_attention import shared_prefix_attention

    shapes = [(3, 5, 8, 2, 80, 257), (1, 4, 12, 12, 64, 33), (2, 4, 16, 1, 128, 1000)]
    extras = ("mask", "", "softcap", "sinks", "window")
    for shape, extra in where.few(list(itertools.product(shapes, extras))):
        batch, k, heads, kv_heads, dim, length = shape

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(*size, device=where.device).to(getattr(torch, where.dtype))

        query = draw(batch * k, heads, 1, dim)
        key, value = draw(batch, kv_heads, length + 5, dim), draw(batch, kv_heads, length + 5, dim)
        own = {"new_key": draw(batch * k, kv_heads, 1, dim), "new_value": draw(batch * k, kv_heads, 1, dim)}
        options: dict[str, object] = {"scaling": dim**-0.5}
        if extra == "mask":
            options["mask"] = torch.rand(batch, 1, 1, length + 1, device=where.device) > 0.3
            options["mask"][..., -1] = True
        elif extra == "softcap":
            options["softcap"] = 1.5
        elif extra == "sinks":
            options["sinks"] = draw(heads)
        elif extra == "window":
            options["window_start"] = length // 2
        arguments = (query, key, value, length)
        result = shared_prefix_attention(*arguments, **own, **options)
        wide = {name: to_double(x) for name, x in (own | options).items()}
        truth = attention(*(to_double(x) for x in arguments), **wide)
        passed, figures = within(result, attention(*arguments, **own, **options), truth)
        passed &= result.device.type == where.device and result.dtype == query.dtype
        name = f"attention {where.dtype} batch {batch} k {k} heads {heads}/{kv_heads} dim {dim} length {length} {extra}"
        yield case(name.rstrip(), passed, figures)


def to_double(x):
    if not isinstance(x, torch.Tensor):
        return x
    return x.double().cpu() if x.is_floating_point() else x.cpu()


def attention(
    query, key, value, length, *, new_key, new_value, scaling, mask=None, softcap=None, sinks=None, window_start=0
):
    """The formula with one full copy of keys and values for every candidate; in the dtype of its arguments."""
    k, groups = query.shape[0] // key.shape[0], query.shape[1] // key.shape[1]
    key = torch.cat([key[:, :, :length].repeat_interleave(k, 0), new_key], dim=2).repeat_interleave(groups, 1)
    value = torch.cat([value[:, :, :length].repeat_interleave(k, 0), new_value], dim=2).repeat_interleave(groups, 1)
    scores = query @ key.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask.repeat_interleave(k, 0), float("-inf"))
    scores[..., :window_start] = float("-inf")
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(scores.shape[0], -1, -1, -1)], dim=-1)
    probs = torch.softmax(scores, dim=-1)[..., : length + 1]
    return (probs @ value).transpose(1, 2)


def check_attention_rows(where: Where) -> Iterator[Case]:
    """Every row with a length of its own, as in slots and in a captured step."""
    from simctg_fast.ops.shared_prefix_attention import shared_prefix_attention

    shapes = [(3, 5, 8, 2, 80, 257), (2, 4, 12, 12, 64, 513), (2, 1, 32, 8, 128, 1100), (1, 8, 8, 1, 256, 700)]
    for shape, window in where.few(list(itertools.product(shapes, (100, None)))):
        batch, k, heads, kv_heads, dim, capacity = shape

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(*size, device=where.device).to(getattr(torch, where.dtype))

        query = draw(batch * k, heads, 1, dim)
        key, value = draw(batch, kv_heads, capacity, dim), draw(batch, kv_heads, capacity, dim)
        new_key, new_value = draw(batch * k, kv_heads, 1, dim), draw(batch * k, kv_heads, 1, dim)
        lengths = torch.randint(1, capacity + 1, (batch,), device=where.device)
        starts = (torch.rand(batch, device=where.device) * lengths).long()
        rows = {"lengths": lengths, "starts": starts, "window": window, "scaling": dim**-0.5}
        arguments = (query, key, value, capacity, new_key, new_value)
        out = shared_prefix_attention(*arguments, **rows)
        plain = shared_prefix_attention(*arguments, **rows, impl="torch")
        wide = {name: to_double(x) for name, x in rows.items()}
        truth = shared_prefix_attention(*(to_double(x) for x in arguments), **wide, impl="torch")
        passed, figures = within(out, plain, truth)
        name = f"attention rows {where.dtype} batch {batch} k {k} heads {heads}/{kv_heads} dim {dim} window {window}"
        yield case(name, passed and out.dtype == query.dtype, figures)


def check_commit(where: Where) -> Iterator[Case]:
    from simctg_fast.ops.prefix_commit import prefix_commit

    dtype, device = getattr(torch, where.dtype), where.device
    for batch, k, heads, dim in where.few([(3, 4, 5, 80), (1, 1, 1, 1), (8, 8, 8, 128)]):
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
        yield case(f"commit {where.dtype} batch {batch} k {k} heads {heads} dim {dim}", wrong == 0, f"{wrong} differ")


def check_top_k(where: Where) -> Iterator[Case]:
    from simctg_fast.ops.top_k import top_k_probs

    for batch, vocabulary, k in where.few([(3, 50257, 4), (1, 7, 3), (32, 128256, 64)]):
        logits = (4 * torch.randn(batch, vocabulary, device=where.device)).to(getattr(torch, where.dtype))
        logits[:, ::7] = float("-inf")
        probs, tokens = top_k_probs(logits, k)
        truth = logits.double().softmax(-1)
        error = (probs.double() - truth.topk(k).values).abs().max().item()
        passed = torch.equal(truth.gather(1, tokens), truth.topk(k).values) and error <= 2e-6
        passed &= all(len(set(row)) == k for row in tokens.tolist())
        yield case(f"top_k {where.dtype} batch {batch} vocabulary {vocabulary} k {k}", passed, f"error {error:.1e}")


def check_offsets(where: Where) -> Iterator[Case]:
    """Tensors of more than 2³¹ elements: what stands behind the limit of 32 bits is found."""
    from simctg_fast.ops.candidate_select import candidate_scan, candidate_select
    from simctg_fast.ops.prefix_commit import prefix_commit
    from simctg_fast.ops.shared_prefix_attention import shared_prefix_attention
    from simctg_fast.ops.top_k import top_k_probs

    device = where.device
    free = torch.cuda.mem_get_info()[0] if where.cuda else 0
    if free < 24e9:
        yield case("offsets", True, f"left out: {free / 1e9:.0f} GB free, 24 are needed")
        return
    kind = {"device": device, "dtype": torch.bfloat16}
    for batch, length, width in ((1, 1 << 20, 2304), (3, 190_000, 4096)):
        history = torch.zeros(batch, length, width, **kind)
        history[..., 0] = 1
        states = torch.randn(batch, 4, width, **kind)
        history[-1, length - 2] = unit_rows(states[-1, 2].float())
        penalty, position = candidate_scan(states, history, length)
        passed = position[-1, 2].item() == length - 2 and abs(penalty[-1, 2].item() - 1) < 1e-2
        lengths = torch.full((batch,), length - 1, device=device)
        _, winner, _, _ = candidate_select(states, torch.rand(batch, 4, device=device), history, lengths, 0.6)
        passed &= bool((history[-1, -1].float() - unit_rows(winner[-1].float())).abs().max() <= 0.01)
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
    passed = torch.allclose(probs[-1], expected.topk(4).values)
    passed &= torch.equal(expected[tokens[-1]], expected.topk(4).values)
    yield case(f"top_k of {logits.numel() / 2**31:.2f} · 2³¹ logits", passed, "")


CHECKS: list[Piece] = [check_select, check_attention_rows, check_scan, check_attention, check_commit, check_top_k]


def check_sanitizer(where: Where) -> Iterator[Case]:
    """`compute-sanitizer memcheck` over the checks in bfloat16, where it attaches; else the reason."""
    tool = shutil.which("compute-sanitizer") or next(
        (str(path) for path in Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None
    )
    if tool is None or not where.cuda:
        reason = "no compute-sanitizer" if tool is None else f"device {where.device}"
        yield case("memcheck", True, f"left out: {reason}")
        return
    options = ["--tool", "memcheck", "--target-processes", "application-only", "--error-exitcode", "99"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    command = [tool, *options, sys.executable, __file__]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=where.left() - 5)
    except subprocess.TimeoutExpired as slow:
        yield case("memcheck", True, f"left out: it took over {slow.timeout:.0f} s")
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


def measure_ceilings(where: Where) -> Iterator[Case]:
    """Copy bandwidth and products of bf16 matrices."""
    copy, size = copy_bandwidth(where), 8192 if where.cuda else 256
    a, b = (torch.randn(size, size, device=where.device, dtype=torch.bfloat16) for _ in range(2))
    flop = 2 * size**3 / (milliseconds(lambda: a @ b, where) / 1e3)
    figures = f"copy {copy / 1e12:.2f} TB/s, bf16 {flop / 1e12:.0f} TFLOP/s"
    yield case("ceilings", True, figures, copy_bytes_per_s=copy, bf16_flop_per_s=flop)


def measure_kernels(where: Where, rows) -> Iterator[Case]:
    """Time of a kernel beside its floor (the bytes it has to move, at copy bandwidth) and of its alternatives."""
    copy = copy_bandwidth(where)
    for name, variants, bytes_moved, goals in rows(where):
        run = variants.pop("ours")
        ours = tried(lambda run=run: spread(run, where))
        if isinstance(ours, str):
            yield case(name, False, ours)
            continue
        others = {
            peer: tried(lambda run=run, peer=peer: milliseconds(run, where, peer not in _NOT_CAPTURED))
            for peer, run in variants.items()
        }
        floor = bytes_moved / copy * 1e3
        yield measured(name, ours[1], floor_ms=floor, others=others, goals=goals, spread_ms=ours)


def scoring(where: Where):
    from simctg_fast.ops.candidate_select import candidate_scan, candidate_select

    shapes = [(32, 4096, 4096), (8, 4096, 4096), (1, 4096, 4096), (32, 1024, 768)]
    for batch, length, width in [(2, 40, 32)] if where.tiny else shapes:
        kind = {"device": where.device, "dtype": torch.bfloat16}
        states, raw = torch.randn(batch, 4, width, **kind), torch.randn(batch, length, width, **kind)
        history, lengths = unit_rows(raw), torch.full((batch,), length - 1, device=where.device)
        probs = torch.rand(batch, 4, device=where.device)

        def renormalised(states=states, raw=raw):
            return (unit_rows(states) @ unit_rows(raw).mT).amax(-1)

        def copies(states=states, raw=raw):  # what transformers 4.55.4 does each step
            context = raw.repeat_interleave(4, dim=0)
            context = context / context.norm(dim=2, keepdim=True)
            new = states.flatten(0, 1)[:, None]
            new = new / new.norm(dim=2, keepdim=True)
            return torch.matmul(context, new.transpose(1, 2)).squeeze(-1).max(dim=-1).values

        variants = {
            "ours": lambda s=states, p=probs, h=history, n=lengths: candidate_select(s, p, h, n, 0.6),
            "ours, scan alone": lambda s=states, h=history, n=length: candidate_scan(s, h, n),
            "4.55.4's code": copies,
            "one copy renormalised": renormalised,
            "bmm on a normalised history": lambda s=states, h=history: (unit_rows(s) @ h.mT).amax(-1),
        }
        goals: dict[str, float] = {}
        if (batch, width) == (32, 4096):
            variants["one copy renormalised, torch.compile"] = torch.compile(renormalised)
            goals = {
                "floor": 0.9, "4.55.4's code": 15, "one copy renormalised": 3.3,
                "one copy renormalised, torch.compile": 3.3, "bmm on a normalised history": 1.2,
            }  # fmt: skip
        yield f"scoring B={batch} T={length} D={width} k=4 bf16", variants, history.numel() * 2, goals


def attention_speed(where: Where):
    from simctg_fast.ops.shared_prefix_attention import shared_prefix_attention

    sdpa = torch.nn.functional.scaled_dot_product_attention
    shapes = [
        (32, 4, 32, 8, 4096, 128), (8, 4, 32, 8, 4096, 128), (1, 4, 32, 8, 4096, 128), (32, 1, 32, 8, 4096, 128),
        (32, 4, 12, 12, 1024, 64),
    ]  # fmt: skip
    for batch, k, heads, kv_heads, length, dim in [(2, 2, 4, 2, 9, 16)] if where.tiny else shapes:
        kind = {"device": where.device, "dtype": torch.bfloat16}
        query = torch.randn(batch * k, heads, 1, dim, **kind)
        key, value = (torch.randn(batch, kv_heads, length + 1, dim, **kind) for _ in range(2))
        new_key, new_value = (torch.randn(batch * k, kv_heads, 1, dim, **kind) for _ in range(2))
        lengths = torch.full((batch,), length, device=where.device)
        keys, values = (x.repeat_interleave(k, dim=0) for x in (key, value))
        mask, groups = torch.zeros(batch * k, 1, 1, length + 1, **kind), heads // kv_heads

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


def commit(where: Where):
    from simctg_fast.ops.prefix_commit import CommitPlan, prefix_commit

    batch, k, layers, heads, dim = (2, 4, 3, 2, 16) if where.tiny else (32, 4, 32, 8, 128)
    kind = {"device": where.device, "dtype": torch.bfloat16}
    pairs = [
        (torch.randn(batch, heads, 256, dim, **kind), torch.randn(batch * k, heads, 1, dim, **kind))
        for _ in range(2 * layers)
    ]
    winners, positions = (
        torch.arange(batch, device=where.device) * k,
        torch.full((batch,), 100, device=where.device),
    )

    def plain():
        for buffer, rows in pairs:
            buffer[:, :, 100] = rows.squeeze(2).index_select(0, winners)

    def anew():  # as outside of a graph
        prefix_commit(pairs, positions, winners)

    variants = {"ours": anew, "ours, table made anew": anew, "a copy a tensor": plain}
    if where.cuda:
        from simctg_fast.kernels import prefix_commit as kernels

        plan = CommitPlan(len(pairs), winners.device)
        plan.run(pairs, positions, winners)
        unit = kernels.table_of(pairs)[1]
        variants["ours"] = lambda: kernels.launch(plan.table, unit, winners, positions)
    yield f"commit of {layers} layers B={batch}", variants, 2 * 2 * layers * batch * heads * dim * 2, {}


def top_k(where: Where):
    from simctg_fast.ops.top_k import top_k_probs

    for batch, k in where.few([(1, 4), (32, 4), (32, 64)]):
        logits = torch.randn(batch, 500 if where.tiny else 128_256, device=where.device)
        variants = {
            "ours": lambda x=logits, k=k: top_k_probs(x, k),
            "softmax and topk": lambda x=logits, k=k: x.softmax(-1).topk(k),
            "topk and logsumexp": lambda x=logits, k=k: top_k_probs(x, k, "torch"),
        }
        yield f"top_k of {logits.shape[1]} B={batch} k={k} fp32", variants, logits.numel() * 4, {}


_NOT_CAPTURED = {"ours, table made anew"}
SPEED: list[Piece] = [
    measure_ceilings,
    *(functools.partial(measure_kernels, rows=rows) for rows in (scoring, attention_speed, commit, top_k)),
]

OFFSETS: list[Piece] = [check_offsets]
MEMCHECK: list[Piece] = [check_sanitizer]


def main() -> int:
    torch.manual_seed(0)
    passed = True
    for check in CHECKS:
        for found in check(Where("cuda", dtype="bfloat16")):
            passed &= found["passed"]
            print("ok  " if found["passed"] else "FAIL", found["case"], found["figures"], flush=True)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
