"""Linear layers with few rows on the CPU: our kernel in place and packed, PyTorch, oneDNN with packed weights.

    python benchmarks/linear.py                                   # the layers of GPT-2 small, M = 1, 4, 8, 16, 32
    python benchmarks/linear.py --layers 768x3072 --rows 4 --threads 1 --clock cpu

Each variant works through copies of the weight (300 MB of them by default), as a model works through its layers: no
weight is found in a cache. Rounds go through the variants in turn; the table shows the shortest round. On a machine
that others use too, `--threads 1 --clock cpu` times the processor time of one thread instead of the wall clock.
Results are checked against float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import RESULTS, Row, append_csv, interleaved, processor, quantiles, versions

from simctg_fast.ops import _backends
from simctg_fast.ops.linear import pack, run_kernel

# in x out, and how the weight lies; the last is GPT-2's lm_head.
LAYERS = (
    "768x2304:conv1d,768x768:conv1d,768x3072:conv1d,3072x768:conv1d,"
    "768x2304:linear,768x768:linear,768x3072:linear,3072x768:linear,768x50257:linear"
)
VARIANTS = ("ours", "ours packed", "torch", "oneDNN packed")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def make_calls(
    x: torch.Tensor, weights: list[torch.Tensor], bias: torch.Tensor, conv1d: bool
) -> dict[str, list[Callable[[], torch.Tensor]]]:
    """For every variant one call per weight."""
    rows = x.shape[0]
    calls: dict[str, list[Callable[[], torch.Tensor]]] = {name: [] for name in VARIANTS}
    for weight in weights:
        packed = pack(weight, conv1d)
        # oneDNN wants [out, in]; a Conv1D weight has to be turned around for it first.
        rows_are_outputs = weight.t().contiguous() if conv1d else weight
        reordered = torch.ops.mkldnn._reorder_linear_weight(rows_are_outputs, rows)
        calls["ours"].append(lambda w=weight: run_kernel(x, w, bias, conv1d))
        calls["ours packed"].append(lambda w=weight, p=packed: run_kernel(x, w, bias, conv1d, p))
        if conv1d:
            calls["torch"].append(lambda w=weight: torch.addmm(bias, x, w))
        else:
            calls["torch"].append(lambda w=weight: torch.nn.functional.linear(x, w, bias))
        calls["oneDNN packed"].append(
            lambda w=reordered: torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")
        )
    return calls


def check(calls: dict[str, list[Callable]], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, conv1d: bool):
    truth = x.double() @ (weight if conv1d else weight.t()).double() + bias.double()
    limit = 1e-5 * truth.abs().max()
    for name, variant in calls.items():
        error = (variant[0]().double() - truth).abs().max()
        if not error < limit:
            raise SystemExit(f"{name} is off by {error:.1e}, allowed are {limit:.1e}: nothing is timed")


def measure(layer: str, rows: int, args: argparse.Namespace) -> dict[str, list[float]]:
    size, kind = layer.split(":")
    in_features, out_features = map(int, size.split("x"))
    conv1d = kind == "conv1d"
    shape = (in_features, out_features) if conv1d else (out_features, in_features)
    copies = max(1, round(args.megabytes * 1e6 / (4 * in_features * out_features)))
    torch.manual_seed(0)
    first = torch.randn(shape)
    weights = [first, *(first.clone() for _ in range(copies - 1))]
    x, bias = torch.randn(rows, in_features), torch.randn(out_features)
    clock = CLOCKS[args.clock]

    def timed(variant: list[Callable[[], torch.Tensor]]) -> Callable[[], float]:
        def run() -> float:
            begin = clock()
            for call in variant:
                call()
            return (clock() - begin) / copies

        return run

    with torch.inference_mode():
        calls = make_calls(x, weights, bias, conv1d)
        check(calls, x, weights[0], bias, conv1d)
        return interleaved({name: timed(variant) for name, variant in calls.items()}, args.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", default=LAYERS, help="in x out : conv1d or linear, separated by commas")
    parser.add_argument("--rows", default="1,4,8,16,32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--megabytes", type=float, default=300, help="of weights a variant works through")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--isa", help="generic, avx2 or avx512; the best there is by default")
    parser.add_argument("--csv", type=Path, default=RESULTS / "linear.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    extension = _backends.require_extension()
    if args.isa:
        extension.set_isa(args.isa)

    config = {"threads": args.threads, "clock": args.clock, "isa": extension.active_isa(), "megabytes": args.megabytes}
    print(f"{processor()}, {json.dumps(config)}")
    print(f"{'layer':>18} {'M':>3} " + "".join(f"{name:>22}" for name in VARIANTS) + f"{'torch / ours':>14}")
    output = []
    for layer in args.layers.split(","):
        for rows in map(int, args.rows.split(",")):
            figures = measure(layer if ":" in layer else f"{layer}:conv1d", rows, args)
            in_features, out_features = map(int, layer.split(":")[0].split("x"))
            cells = ""
            for name in VARIANTS:
                best = min(figures[name])
                cells += f"{best * 1e6:8.0f} us {4e-9 * in_features * out_features / best:5.1f} GB/s"
                p20, p50, p80 = quantiles([value * 1e6 for value in figures[name]])
                output.append(
                    Row(
                        *("linear", name, "forward", "us", "rows", str(rows), p20, p50, p80),
                        config=json.dumps(config | {"layer": layer, "min": best * 1e6}),
                        gpu=processor(),
                        version=versions("simctg_fast"),
                    )
                )
            print(f"{layer:>18} {rows:>3} {cells}{min(figures['torch']) / min(figures['ours']):>13.2f}x", flush=True)
    append_csv(args.csv, output)


if __name__ == "__main__":
    main()
