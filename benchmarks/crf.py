"""The low-rank CRF against the codes that circulate: speed, memory, and how cost grows.

    python benchmarks/crf.py                             # everything at (8, 97, 30000), beam 256, rank 32: a quarter of
                                                         # an hour, most of it the published sampler's 64 samples
    python benchmarks/crf.py speed --rows select viterbi # some rows; sections: speed, memory, curves, law
    python benchmarks/crf.py --device cuda               # on a GPU: wall time, synchronised

Results are compared before anything is timed. Providers take turns; reported is the least of the rounds, as CPU time on
one thread, by which the goals are judged, and as wall time on two. Ratios above 1 say that this library is faster. The
figures are appended to `results/crf.csv`. Peers take part where they are installed (torbi as a source package, which
compiles for the torch at hand):

    pip install pytorch-crf torch-struct
    pip install --no-build-isolation --no-deps --no-binary torbi torbi==1.3.3
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
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
from crf_rows import ON_CUDA, OURS, ROWS, Sizes, T, backward, nll, no_grad, published_law, samples, viterbi

from simctg_fast import LowRankCRF
from simctg_fast.reference import crf as reference

SECONDS = 6.0  # a row is repeated for about as long, from 1 to ROUNDS times
ROUNDS = 15
MEMORY_GOAL = 16  # megabytes
SELECT_GOAL_ON_CUDA = 0.1  # milliseconds
PICTURE = RESULTS / "crf_cost.png"


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


def rounds_of(providers: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """All take turns. What needs long runs once: a second time, and warming up, would tell little more."""
    once = {who: run() for who, run in providers.items()}
    slow = {who: [seconds] for who, seconds in once.items() if seconds > SECONDS / 2}
    quick = {who: run for who, run in providers.items() if who not in slow}
    each = sum(once[who] for who in quick)
    return interleaved(quick, max(3, min(ROUNDS, int(SECONDS / max(each, 1e-9))))) | slow


def record(name: str, who: str, metric: str, values: list[float], s: Sizes, x: tuple[str, str] = ("", "")) -> Row:
    config = {
        "shape": list(s.emissions.shape), "beam": s.beam, "rank": s.left.shape[1], "threads": torch.get_num_threads(),
        "device": s.device.type,
    }  # fmt: skip
    return Row(
        "crf", who, name, metric, *x, *quantiles(values), config=json.dumps(config), gpu=device_name(),
        version=versions("simctg_fast"),
    )  # fmt: skip


# ---- speed -----------------------------------------------------------------------------------------------------------


def speed(s: Sizes, names: list[str]) -> tuple[list[Row], list[str]]:
    """The figures, and the goals that were missed."""
    cuda = s.device.type == "cuda"
    table, rows, missed = ON_CUDA if cuda else ROWS, [], []
    threads = [torch.get_num_threads()] if cuda else [1, 2]
    heads = "wall time" if cuda else f"{'CPU time, 1 thread':^28}{'wall time, 2 threads':^28}"
    print(f"{'':36}{'':20}{heads}")
    print(f"{'':36}{'against':20}" + f"{'ours':>9}{'theirs':>10}{'ratio':>9}" * len(threads) + f"{'goal':>8}")
    for name in names:
        title, goals, make = table[name]
        torch.set_num_threads(threads[-1])
        providers, least = make(s), []
        for count in threads:
            torch.set_num_threads(count)
            wall = cuda or count > 1
            figures = rounds_of({who: timed(run, wall, s.device) for who, run in providers.items()})
            for who, seconds in figures.items():
                metric = "wall_ms" if wall else "cpu_ms"
                rows.append(record(name, who, metric, [1e3 * x for x in seconds], s))
            least.append({who: 1e3 * min(seconds) for who, seconds in figures.items()})
        for who in providers:
            if who == OURS:
                continue
            line = "".join(f"{found[OURS]:9.2f}{found[who]:10.1f}{found[who] / found[OURS]:8.1f}x" for found in least)
            goal, ratio = goals.get(who), least[0][who] / least[0][OURS]
            if goal and ratio < goal:
                missed.append(f"{title} against {who}: {ratio:.1f}x, goal {goal}x")
            print(f"{title:36}{who:20}{line}" + (f"{goal:7.0f}x" if goal else f"{'—':>8}"), flush=True)
        if cuda and name == "select" and least[0][OURS] > SELECT_GOAL_ON_CUDA:
            missed.append(f"{title}: {least[0][OURS]:.3f} ms, goal {SELECT_GOAL_ON_CUDA} ms")
    return rows, missed


# ---- memory: a process for each figure, so that nothing else is resident ---------------------------------------------

MEMORY = {"samples_8": "published", "published_8": "published", "viterbi": "fairseq", "nll": "fairseq"}


def memory_of(name: str, who: str) -> float:
    """Peak resident megabytes of one call over what was resident before, after a warm call at a small size. What the
    caller is given to keep, the gradients of `nll`, is not counted."""
    make = {
        "samples_8": lambda s: samples(s, 8),
        "published_8": lambda s: published_law(s, 8),
        "viterbi": viterbi,
        "nll": lambda s: nll(s, False),
    }[name]
    make(Sizes(batch=2, length=12, vocabulary=500, beam=16, rank=8))[who]()
    s = Sizes()

    def published():
        return reference.published_samples(s.emissions, s.left, s.right, s.beam, samples=8)

    def fairseq_loss(emissions):
        return reference.fairseq_nll(emissions, s.left, s.right, s.targets, s.beam)

    s.published.num_samples = 8
    run = {  # not from `make`, which would run everything once to compare
        ("samples_8", OURS): no_grad(lambda: s.crf.sample(s.emissions, num_samples=8)),
        ("published_8", OURS): no_grad(lambda: s.published(s.emissions)),
        ("viterbi", OURS): no_grad(lambda: s.crf.viterbi(s.emissions)),
        ("nll", OURS): backward(s, lambda e: s.crf.nll(e, s.targets, reduction="none")),
        ("viterbi", "fairseq"): no_grad(lambda: reference.fairseq_viterbi(s.emissions, s.left, s.right, s.beam)),
        ("nll", "fairseq"): backward(s, fairseq_loss),
    }.get((name, who), no_grad(published))
    reset_peak_memory()
    before = resident_megabytes()[0]
    run()
    peak = resident_megabytes()[1] - before
    return peak - (4e-6 * (s.emissions.numel() + s.left.numel() + s.right.numel()) if name == "nll" else 0)


def memory(s: Sizes) -> tuple[list[Row], list[str]]:
    rows, missed = [], []
    print(f"\n{'peak memory over the inputs, MB':36}{'against':20}{'ours':>9}{'theirs':>10}{'':9}{'goal':>8}")
    for name, peer in MEMORY.items():
        found = {}
        for who in (OURS, peer):
            command = [sys.executable, __file__, "--memory-of", name, who]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[who] = float(done.stdout.split()[-1])
            rows.append(record(name, who, "peak_mb", [found[who]], s))
        title = ROWS[name][0] + (" (+ gradients)" if name == "nll" else "")
        print(f"{title:36}{peer:20}{found[OURS]:9.1f}{found[peer]:10.0f}{'':9}{MEMORY_GOAL:8}", flush=True)
        if found[OURS] > MEMORY_GOAL:
            missed.append(f"memory of {title}: {found[OURS]:.1f} MB, goal {MEMORY_GOAL} MB")
    return rows, missed


# ---- the law of the published sampler --------------------------------------------------------------------------------


@torch.no_grad()
def law(s: Sizes) -> tuple[list[Row], list[str]]:
    """How far the published sampler is from the CRF: exactly, by enumeration on small CRFs; in nats at full size."""
    distances = []
    for seed in range(20):
        torch.manual_seed(seed)
        crf, emissions = LowRankCRF(7, 4, 3, impl="torch"), torch.randn(1, 3, 7)
        beam = crf.beam(emissions)
        tokens, scores = beam.tokens[0], beam.emissions[0]
        paths = reference.enumerate_paths(scores, tokens, crf.E1.weight, crf.E2.weight, 3)
        edges = [crf.E1.weight[tokens[t]] @ crf.E2.weight[tokens[t + 1]].T for t in range(2)]
        published = reference.stochastic_viterbi_law(paths, edges, scores, 1.0)
        distances.append(float((published - paths.log_probs.exp()).abs().sum() / 2))
    mean = sum(distances) / len(distances)
    print("\nthe published law against the CRF's, temperature 1")
    print(f"total variation over {len(distances)} CRFs of 3 slots and 3 positions: mean {mean:.2f}, ", end="")
    print(f"{min(distances):.2f} to {max(distances):.2f}")
    generator = torch.Generator(s.device).manual_seed(0)
    exact, noisy = (
        s.crf.sample(s.emissions, num_samples=8, mode=mode, generator=generator).log_prob.mean()
        for mode in ("ffbs", "stochastic_viterbi")
    )
    print(f"mean log-probability of a path: exact samples {exact:.1f}, published sampler {noisy:.1f} nats")
    return [], []


# ---- curves ----------------------------------------------------------------------------------------------------------

LENGTHS, COUNTS = (25, 49, 97, 193, 385), (1, 8, 64, 128, 256, 512)


def curves(device: str) -> tuple[list[Row], list[str]]:
    """Cost of sampling against T and N, with the straight line through them (from N = 64 on: fewer share one tile)."""
    rows, points = [], {}
    wall = device != "cpu"
    torch.set_num_threads(1)
    print("\ncost of exact sampling, ms" + ("" if wall else " of CPU time, 1 thread"))
    for x, values in (("T", LENGTHS), ("N", COUNTS)):
        found = []
        for value in values:
            s = Sizes(length=value if x == "T" else T, device=device)
            count = value if x == "N" else 8
            run = timed(no_grad(lambda s=s, count=count: s.crf.sample(s.emissions, num_samples=count)), wall, s.device)
            run()
            seconds = [run() for _ in range(5)]
            rows.append(record("samples", OURS, "wall_ms" if wall else "cpu_ms", [1e3 * v for v in seconds], s,
                               (x, str(value))))  # fmt: skip
            found.append(1e3 * min(seconds))
        points[x] = (values, found)
        start = 0 if x == "T" else COUNTS.index(64)
        at = torch.tensor(values[start:], dtype=torch.float64)
        line = torch.linalg.lstsq(torch.stack([torch.ones_like(at), at], 1), torch.tensor(found[start:]).double())
        base, slope = line.solution.tolist()
        off = max(abs((base + slope * v) / f - 1) for v, f in zip(at.tolist(), found[start:], strict=True))
        print(f"{x} = " + "  ".join(f"{v}: {f:.1f}" for v, f in zip(values, found, strict=True)))
        print(f"    {base:.1f} + {slope:.3f} {x}, off by at most {off:.0%}")
    if not wall:
        draw(points)
    return rows, []


def draw(points: dict[str, tuple[tuple[int, ...], list[float]]]) -> None:
    try:
        import matplotlib
    except ImportError as error:
        print(f"no picture: {error}; pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    for axis, (x, fixed) in zip(axes, (("T", "8 samples"), ("N", f"{T} positions")), strict=True):
        axis.plot(*points[x], marker="o", markersize=4)
        axis.set(xlabel={"T": "positions", "N": "samples"}[x], ylabel="ms, one thread", title=fixed, ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=120)
    print(f"the curves are in {PICTURE}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ("speed", "memory", "curves", "law")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(sections)}; all by default")
    parser.add_argument("--rows", nargs="+", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        torch.set_num_threads(1)
        print(memory_of(*arguments.memory_of))
        return 0
    table = ROWS if arguments.device == "cpu" else ON_CUDA
    for kind, given, allowed in (("SECTION", arguments.sections, sections), ("--rows", arguments.rows or [], table)):
        for value in given:
            if value not in allowed:
                parser.error(f"{kind} is {value!r}, must be one of {', '.join(allowed)}")
    s = Sizes(device=arguments.device)
    print(f"{device_name()}, torch {torch.__version__}; emissions {tuple(s.emissions.shape)}, beam {s.beam}, rank 32")
    wanted, missed = arguments.sections or sections, []
    for section in wanted:
        if section == "speed":
            rows, below = speed(s, arguments.rows or list(table))
        elif section == "memory":
            if arguments.device != "cpu":
                continue
            rows, below = memory(s)
        elif section == "law":
            rows, below = law(s)
        else:
            rows, below = curves(arguments.device)
        append_csv(RESULTS / "crf.csv", rows)
        missed += below
    print("\n" + ("missed: " + "; ".join(missed) if missed else "every goal is met"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
