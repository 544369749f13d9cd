"""The engine's part of `gpu.py`: our slots against transformers' static batches and its continuous batching.

Providers and requests are those of `throughput.py`, without rounds in turn: each has the device to itself, one after
the other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import throughput
from gpu_case import Case, Piece, Where, case, measured

ON_CUDA = ["--dtype", "bfloat16", "--slots", "64", "--greedy-sizes", "32,64,128", "--concurrency", "64,128"]
TINY = ["--quick", "--requests", "6", "--slots", "2", "--greedy-sizes", "2", "--concurrency", "2"]


def measure_engine(where: Where) -> Iterator[Case]:
    """Milliseconds of a generated token, over all requests. What a peer cannot do here is said in its row."""
    every = ["--rounds", "1", "--thin", "1", "--thin-requests", "1"]
    options = throughput.parse(["--device", where.device, *(TINY if where.tiny else ON_CUDA), *every])
    slots, than = [options.slots], throughput.GOALS["cuda"][1]
    ours = {}
    for kind in ("contrastive", "greedy"):
        provider = throughput.Ours(f"{kind} search on slots", kind, None, slots, options)
        answer = answered(provider)
        if "failed" in answer:
            yield case(f"engine, {provider.label}", False, answer["failed"])
            continue
        ours[kind] = provider
        yield row(f"engine, {provider.label}", provider, {}, throughput.describe(answer))
    sizes, concurrency = throughput.numbers(options.greedy_sizes), throughput.numbers(options.concurrency)
    for peer in (
        throughput.Static("transformers' greedy search", "greedy", than, sizes, options),
        throughput.ContinuousBatching("transformers' generate_batch", "greedy", than, concurrency, options),
    ):
        answer = answered(peer)
        for kind, provider in ours.items():
            note = throughput.describe(answer)
            if kind == peer.kind and "failed" not in answer:
                mine, rows = provider.tokens(), peer.tokens()
                note += f", the same tokens in {sum(mine[i] == x for i, x in rows.items())} of {len(rows)} requests"
            name = f"engine, {provider.label}, against {peer.name}"
            found = 1e3 / peer.rate() if peer.rate() else f"{peer.name}: {answer['failed']}"
            yield row(name, provider, {peer.name: found}, note, {peer.name: than} if kind == "contrastive" else {})


def answered(provider: throughput.Provider) -> dict:
    """What it answers at its best size."""
    try:
        provider.start(sys.executable)
        requests = throughput.workload(provider.options.requests, provider.process.ready["vocabulary"])
        provider.scout(requests)
        provider.round(requests, 0)
    except RuntimeError as error:  # its process ended
        provider.rounds = [{"failed": str(error)}]
    finally:
        if provider.process is not None:
            provider.process.process.kill()
            provider.process.close()
    return provider.rounds[0]


def row(name: str, ours: throughput.Provider, others: dict, note: str, goals: dict | None = None) -> Case:
    return measured(name, 1e3 / ours.rate(), others=others, goals=goals, note=note, tokens_per_s=ours.rate())


PIECES: list[Piece] = [measure_engine]
