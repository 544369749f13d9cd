"""The low-rank CRF against the codes that circulate: speed, memory, and how cost grows.

    python benchmarks/crf.py                         # every row, (8, 97, 30000), beam 256, rank 32; some minutes
    python benchmarks/crf.py --rows samples_8 select # some rows
    python benchmarks/crf.py --threads 2             # wall time on two threads instead of CPU time on one
    python benchmarks/crf.py --device cuda           # wall time on a GPU, synchronised
    python benchmarks/crf.py --curves                # cost against T and N

Results are compared before anything is timed. Providers take turns; reported is the least of the rounds. Beam
selection is included for everybody. pytorch-crf, torch-struct and torbi take part where they are installed:

    pip install pytorch-crf torch-struct
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))
from common import (
    RESULTS,
    Row,
    append_csv,
    device_name,
    interleaved,
    quantiles,
    reset_peak_memory,
    resident_megabytes,
    versions,
)

from simctg_fast import LinearChainCRF, LowRankCRF, StochasticViterbiSamples
from simctg_fast.ops.crf_beam import crf_beam_select
from simctg_fast.reference import crf as reference

B, T, V, K, D = 8, 97, 30000, 256, 32
OURS = "simctg_fast"
# Times faster than the peer named first in the row; megabytes for memory.
GOALS = {
    "samples_8": 90, "samples_64": 600, "select": 5, "published_8": 55, "viterbi": 5, "nll": 35, "nll_unbind": 3,
    "dense_log_partition": 30, "dense_viterbi": 20, "memory": 16,
}  # fmt: skip


class Sizes:
    def __init__(self, batch=B, length=T, vocabulary=V, beam=K, rank=D, device="cpu") -> None:
        torch.manual_seed(0)
        self.crf = LowRankCRF(vocabulary, rank, beam).to(device)
        self.beam, self.device = beam, torch.device(device)
        self.emissions = torch.randn(batch, length, vocabulary, device=device)
        self.targets = torch.randint(vocabulary, (batch, length), device=device)
        self.left, self.right = self.crf.E1.weight, self.crf.E2.weight
        self.published = StochasticViterbiSamples(vocabulary, rank, beam).to(device)
        self.published.load_state_dict(self.crf.state_dict())


def optional(name: str):
    try:
        return importlib.import_module(name)
    except Exception as error:  # an extension of another torch fails with all kinds of errors
        print(f"{name} is left out: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def no_grad(function: Callable[[], object]) -> Callable[[], object]:
    def run():
        with torch.no_grad():
            return function()

    return run


def backward(s: Sizes, loss: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], torch.Tensor]:
    def run():
        emissions = s.emissions.detach().requires_grad_()
        s.crf.zero_grad()
        value = loss(emissions)
        value.sum().backward()
        return value.detach()

    return run


# ---- rows: name -> providers, ours first -----------------------------------------------------------------------------


def samples(s: Sizes, count: int) -> dict[str, Callable]:
    def published():
        return reference.published_samples(s.emissions, s.left, s.right, s.beam, samples=count)[2]

    return {
        OURS: no_grad(lambda: s.crf.sample(s.emissions, num_samples=count)),
        "published": no_grad(published),
    }


def published_law(s: Sizes, count: int) -> dict[str, Callable]:
    s.published.num_samples = count
    return {OURS: no_grad(lambda: s.published(s.emissions)), "published": samples(s, count)["published"]}


def select(s: Sizes) -> dict[str, Callable]:
    ours, theirs = crf_beam_select(s.emissions, s.beam), s.emissions.topk(s.beam, 2)
    assert torch.equal(ours[1], theirs.values), "beams differ"
    return {
        OURS: no_grad(lambda: crf_beam_select(s.emissions, s.beam)),
        "torch.topk": no_grad(lambda: s.emissions.topk(s.beam, 2)),
    }


def viterbi(s: Sizes) -> dict[str, Callable]:
    ours = no_grad(lambda: s.crf.viterbi(s.emissions))
    fairseq = no_grad(lambda: reference.fairseq_viterbi(s.emissions, s.left, s.right, s.beam))
    torch.testing.assert_close(ours().score, fairseq()[1], rtol=1e-5, atol=1e-3)
    return {OURS: ours, "fairseq": fairseq}


def nll(s: Sizes, unbind: bool) -> dict[str, Callable]:
    def fairseq(emissions):
        return reference.fairseq_nll(emissions, s.left, s.right, s.targets, s.beam, unbind)

    ours = backward(s, lambda emissions: s.crf.nll(emissions, s.targets, reduction="none"))
    torch.testing.assert_close(ours(), no_grad(lambda: fairseq(s.emissions))(), rtol=1e-5, atol=1e-2)
    return {OURS: ours, "fairseq with .unbind(1)" if unbind else "fairseq": backward(s, fairseq)}


def dense(s: Sizes, decode: bool) -> dict[str, Callable]:
    """One matrix of transitions for all steps."""
    batch, length = s.emissions.shape[:2]
    crf = LinearChainCRF(s.beam).to(s.device)
    emissions = s.emissions[:, :, : s.beam].contiguous()
    rows = {OURS: no_grad(lambda: crf.viterbi(emissions) if decode else crf.log_partition(emissions))}
    transitions = crf.transitions.detach().unsqueeze(0).expand(batch, -1, -1)

    def plain():
        score = emissions[:, 0]
        for t in range(1, length):
            step = score[:, :, None] + transitions
            score = (step.max(1)[0] if decode else torch.logsumexp(step, 1)) + emissions[:, t]
        return score

    rows["plain torch loop"] = no_grad(plain)
    torchcrf = optional("torchcrf")
    if torchcrf is not None:
        peer = torchcrf.CRF(s.beam, batch_first=True).to(s.device)
        peer.load_state_dict(crf.state_dict())
        mask = torch.ones(batch, length, dtype=torch.bool, device=s.device)
        if decode:
            rows["pytorch-crf"] = no_grad(lambda: peer.decode(emissions, mask))
            assert rows["pytorch-crf"]() == rows[OURS]().tags.tolist(), "paths differ"
        else:
            rows["pytorch-crf"] = no_grad(lambda: peer._compute_normalizer(emissions.transpose(0, 1), mask.T))
            torch.testing.assert_close(rows["pytorch-crf"](), rows[OURS](), rtol=1e-5, atol=1e-3)
    torbi = optional("torbi") if decode else None
    if torbi is not None:
        shared, start = crf.transitions.detach().T.contiguous(), crf.start_transitions.detach()
        lengths = torch.full((batch,), length, dtype=torch.int32)
        rows["torbi"] = no_grad(lambda: torch.ops.torbi.viterbi_decode(emissions, lengths, shared, start))
    return rows


ROWS: dict[str, tuple[str, Callable[[Sizes], dict[str, Callable]]]] = {
    "samples_8": ("exact sampling, N = 8", lambda s: samples(s, 8)),
    "samples_64": ("exact sampling, N = 64", lambda s: samples(s, 64)),
    "select": ("beam selection", select),
    "published_8": ("published law, N = 8", lambda s: published_law(s, 8)),
    "viterbi": ("Viterbi", viterbi),
    "nll": ("nll, forward and backward", lambda s: nll(s, False)),
    "nll_unbind": ("nll, forward and backward", lambda s: nll(s, True)),
    "dense_log_partition": ("shared transitions, log Z", lambda s: dense(s, False)),
    "dense_viterbi": ("shared transitions, Viterbi", lambda s: dense(s, True)),
}
SLOW = {"samples_64"}  # a minute or more for the peer: one round


def timed(function: Callable[[], object], wall: bool, device: torch.device) -> Callable[[], float]:
    clock = time.perf_counter if wall else time.process_time

    def run() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = clock()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - begin

    return run


def measure(s: Sizes, names: list[str], repeats: int, wall: bool) -> list[Row]:
    rows = []
    print(f"{'':34}{'ms':>10}  {'against':28}{'ms':>10}{'ratio':>9}{'goal':>7}")
    for name in names:
        title, make = ROWS[name]
        providers = make(s)
        providers[OURS]()  # warm
        if s.device.type == "cuda":
            for run in providers.values():
                run()
        figures = interleaved(
            {who: timed(run, wall, s.device) for who, run in providers.items()}, 1 if name in SLOW else repeats
        )
        ours = min(figures[OURS])
        for who, seconds in figures.items():
            rows.append(row(name, who, "ms", [1e3 * x for x in seconds], s))
            if who != OURS:
                ratio = min(seconds) / ours
                print(f"{title:34}{1e3 * ours:10.1f}  {who:28}{1e3 * min(seconds):10.1f}{ratio:8.1f}x{GOALS[name]:6}x")
    return rows


def row(name: str, who: str, metric: str, values: list[float], s: Sizes, x: tuple[str, str] = ("", "")) -> Row:
    config = {
        "shape": list(s.emissions.shape), "beam": s.beam, "rank": s.left.shape[1], "threads": torch.get_num_threads(),
    }  # fmt: skip
    return Row(
        "crf", who, name, metric, *x, *quantiles(values), config=json.dumps(config), gpu=device_name(),
        version=versions("simctg_fast"),
    )  # fmt: skip


# ---- memory: a process for each figure, so that nothing else is resident ---------------------------------------------

MEMORY = {
    "samples_8": lambda s: samples(s, 8),
    "published_8": lambda s: published_law(s, 8),
    "viterbi": viterbi,
    "nll": lambda s: nll(s, False),
}


def memory_of(name: str, who: str) -> float:
    """Peak resident megabytes of one call over what was resident before, after a warm call at a small size."""
    small = MEMORY[name](Sizes(batch=2, length=3, vocabulary=500, beam=16, rank=8))
    small[who]()
    s = Sizes()
    if name == "nll":  # building the row would run both once to compare them
        loss = {
            OURS: lambda e: s.crf.nll(e, s.targets, reduction="none"),
            "fairseq": lambda e: reference.fairseq_nll(e, s.left, s.right, s.targets, s.beam),
        }[who]
        run = backward(s, loss)
    elif name == "viterbi":
        run = no_grad(
            (lambda: s.crf.viterbi(s.emissions))
            if who == OURS
            else (lambda: reference.fairseq_viterbi(s.emissions, s.left, s.right, s.beam))
        )
    else:
        run = MEMORY[name](s)[who]
    reset_peak_memory()
    before = resident_megabytes()[0]
    run()
    return resident_megabytes()[1] - before


def memory(s: Sizes) -> list[Row]:
    rows = []
    print("\npeak memory over the inputs, MB (the gradients of nll are 101 MB of it)")
    for name, peer in (
        ("samples_8", "published"),
        ("published_8", "published"),
        ("viterbi", "fairseq"),
        ("nll", "fairseq"),
    ):
        found = {}
        for who in (OURS, peer):
            command = [sys.executable, __file__, "--memory-of", name, who, "--threads", "1"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[who] = float(done.stdout.split()[-1])
            rows.append(row(name, who, "peak_mb", [found[who]], s))
        print(f"{ROWS[name][0]:34}{found[OURS]:10.1f}  {peer:28}{found[peer]:10.1f}")
    return rows


# ---- curves ----------------------------------------------------------------------------------------------------------


def curves(device: str, repeats: int, wall: bool) -> list[Row]:
    rows = []
    print("\ncost against T (N = 8) and N (T = 97), ms: sampling")
    for x, values in (("T", (25, 49, 97, 193)), ("N", (1, 8, 64, 256))):
        for value in values:
            s = Sizes(length=value if x == "T" else T, device=device)
            count = value if x == "N" else 8
            run = timed(samples(s, count)[OURS], wall, s.device)
            run()
            seconds = [run() for _ in range(repeats)]
            rows.append(row("samples", OURS, "ms", [1e3 * v for v in seconds], s, (x, str(value))))
            print(f"{x} = {value:4}{1e3 * min(seconds):10.1f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="1: CPU time; more: wall time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(memory_of(*arguments.memory_of))
        return
    wall = arguments.threads > 1 or arguments.device != "cpu"
    s = Sizes(device=arguments.device)
    print(
        f"{device_name()}, torch {torch.__version__}, {'wall' if wall else 'CPU'} time, {arguments.threads} thread(s)"
    )
    if arguments.curves:
        found = curves(arguments.device, arguments.repeats, wall)
    else:
        found = measure(s, arguments.rows, arguments.repeats, wall)
        if arguments.device == "cpu" and not arguments.no_memory and arguments.rows == list(ROWS):
            found += memory(s)
    append_csv(RESULTS / "crf.csv", found)


if __name__ == "__main__":
    main()
