"""The contrastive losses against what people run today: forward, backward, both, and peak memory.

    python benchmarks/losses.py                              # the CPU table: 8x256, 8x1024, 2x4096, fp32, width 768
    python benchmarks/losses.py --device cuda --dtype bf16   # the table of an H200
    python benchmarks/losses.py --simcse 1024,4096           # SimCSE instead
    python benchmarks/losses.py --tokens                     # ContraCLM's token loss and the mean cosine instead
    python benchmarks/losses.py --crossover                  # the length up to which eager is faster than ours
    python benchmarks/losses.py --shapes 2x128x64 --repeats 2 --kinds mixed

Peers of the contrastive loss: `eager` (vectorised), `compile` (torch.compile of it), `published` (the package's class,
whose mask is built row by row on the host) and `tutorial` (the T5 tutorial's two functions, its own mean over all
entries). Of SimCSE: `matmul` (normalise, one product, cross-entropy), `broadcast` (the usual code, (N, 1, d) against
(1, N, d)), and sentence-transformers' loss where it is installed, which compares anchors with positives only; `ours,
its loss` has the same value. Of ContraCLM's token loss: `eager` (both views in one matrix a sequence), `compile` of
it, and `published` (the arithmetic of the authors' code, sequence by sequence, exponentials without a maximum taken
out); of the mean cosine: `eager`, over the matrix.

Where a goal is set for a case it is printed beside what was reached.

Four kinds of hidden states: `isotropic` (no hinge active), `biased` by 1.5 (every hinge active, as at the start of
training), `mixed`, biased by 1.0 (about 60 % active, every tile mixed: the hard case), and `trained` (of the bundled
model, in its own width). Values and gradients are compared with float64 first: where ours is off nothing is reported.
Variants run in turn; ratios are of the minima over the rounds. Memory is the peak over a forward and backward pass
above what was held before; the gradient itself is in it, for all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import RESULTS, Row, append_csv, device_name, interleaved, quantiles, reset_peak_memory, resident_megabytes
from common import versions as module_versions
from published_simctg_loss import SimCTGLoss

from simctg_fast import contraclm_token_loss, contrastive_loss, cosine_regularization, simcse_unsup_loss
from simctg_fast.functional import simcse_loss_from_embeddings
from simctg_fast.reference import contraclm as contraclm_reference
from simctg_fast.reference.contrastive_loss import contrastive_loss as reference
from simctg_fast.reference.simcse import simcse_unsup_loss as simcse_reference

CPU_SHAPES, CUDA_SHAPES = "8x256x768,8x1024x768,2x4096x768", "32x256x768,16x1024x768,4x4096x768,1x16384x4096"
TOKEN_SHAPES = {"cpu": "1x1024x768,4x1024x768,2x2048x768", "cuda": "16x1024x768,4x4096x768"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BIAS = {"isotropic": 0.0, "mixed": 1.0, "biased": 1.5}
MODES = ("forward", "backward", "both")
MARGIN = 0.5
Loss = Callable[[Tensor], Tensor]

# (device, dtype): shape: {peer: (on mixed tiles, on tiles that are all or none)}, forward and backward together.
GOALS = {
    ("cpu", "fp32"): {
        "8x256x768": {"eager": (2.2, 4.0)},
        "8x1024x768": {"eager": (3.0, 6.0)},
        "2x4096x768": {"eager": (3.5, 8.0)},
    },
    ("cuda", "bf16"): {
        "32x256x768": {"eager": (2.5, 2.5), "compile": (1.3, 1.3)},
        "16x1024x768": {"eager": (3.3, 5.0), "compile": (1.7, 2.8)},
        "4x4096x768": {"eager": (3.7, 9.0), "compile": (1.9, 5.0)},
        "1x16384x4096": {"eager": (1.9, 6.0)},
    },
    ("cuda", "fp32"): {
        "32x256x768": {"eager": (3.0, None), "compile": (2.0, None)},
        "16x1024x768": {"eager": (7.0, None), "compile": (5.0, None)},
        "4x4096x768": {"eager": (8.0, None), "compile": (7.0, None)},
    },
}
HIGHEST_GOAL = 1.5  # at --precision highest, against eager
SIMCSE_GOALS = {
    ("cpu", "fp32"): {1024: {"broadcast": 5.0}, 4096: {"matmul": 1.2}},
    ("cuda", "bf16"): {1024: {"matmul": 1.0}, 2048: {"matmul": 1.0}, 32768: {"matmul": 1.5}},
    ("cuda", "fp32"): {1024: {"matmul": 1.0}, 2048: {"matmul": 1.0}, 32768: {"matmul": 3.5}},
}
TOKEN_GOALS = {
    ("cpu", "fp32"): {"1x1024x768": {"eager": 3.0}, "4x1024x768": {"eager": 3.0}},
    ("cuda", "bf16"): {"16x1024x768": {"eager": 3.0}},
}


# ---- providers -------------------------------------------------------------------------------------------------------


def eager(states: Tensor) -> Tensor:
    """Vectorised, with nothing computed that the value does not need."""
    unit = F.normalize(states, dim=-1)
    hinge = torch.relu(unit @ unit.mT - (1.0 - MARGIN))
    length = states.shape[1]
    own = torch.eye(length, dtype=torch.bool, device=states.device)
    return hinge.masked_fill(own, 0.0).sum() / (states.shape[0] * length * (length - 1))


def published(states: Tensor) -> Tensor:
    """The contrastive term of the published class; logits over one word make its likelihood free."""
    batch, length, _ = states.shape
    tokens = torch.ones(batch, length, dtype=torch.long, device=states.device)
    return SimCTGLoss(MARGIN, 1, 0)(states, states.new_zeros(batch, length, 1), tokens, tokens - 1)[1]


def tutorial(states: Tensor) -> Tensor:
    unit = states / states.norm(dim=2, keepdim=True)
    scores = torch.matmul(unit, unit.transpose(1, 2))
    own = torch.diagonal(scores, offset=0, dim1=-1, dim2=-2)
    return torch.relu(MARGIN - (own.unsqueeze(-1) - scores)).mean()


def contrastive_providers(names: list[str], impl: str, backend: str = "inductor") -> dict[str, Loss]:
    providers: dict[str, Loss] = {"ours": lambda states: contrastive_loss(states, MARGIN, impl=impl), "eager": eager}
    if "compile" in names:
        torch._dynamo.reset()  # each shape gets code of its own
        providers["compile"] = torch.compile(eager, dynamic=False, backend=backend)
    providers |= {"published": published, "tutorial": tutorial}
    return {name: providers[name] for name in names if name in providers}


def broadcast(embeddings: Tensor) -> Tensor:
    """The circulating SimCSE code: (N, 1, d) against (1, N, d), and eye * 1e12 off the diagonal."""
    rows = torch.arange(embeddings.shape[0], device=embeddings.device)
    targets = rows + 1 - rows % 2 * 2
    similarity = F.cosine_similarity(embeddings.unsqueeze(1), embeddings.unsqueeze(0), dim=-1)
    similarity = similarity - torch.eye(len(rows), device=embeddings.device) * 1e12
    return F.cross_entropy(similarity / 0.05, targets)


def simcse_providers(rows: int, device: str) -> dict[str, Loss]:
    providers: dict[str, Loss] = {"ours": simcse_unsup_loss, "matmul": simcse_reference}
    # Beyond that its (N, N, d) products take more than 4 GB, and several of them are alive at a time.
    if rows <= (1024 if device == "cpu" else 2048):
        providers["broadcast"] = broadcast
    peer = sentence_transformers_loss()
    if peer is not None:
        providers["sentence-transformers"] = peer
        providers["ours, its loss"] = lambda embeddings: simcse_loss_from_embeddings(embeddings[0::2], embeddings[1::2])
    return providers


def eager_contraclm(views: Tensor) -> Tensor:
    """Both views of each sequence in one matrix."""
    length = views.shape[2]
    unit = F.normalize(torch.cat([views[0], views[1]], dim=1), dim=-1)
    logits = unit @ unit.mT / 0.05
    twins = logits.diagonal(length, dim1=1, dim2=2)
    own = torch.eye(2 * length, dtype=torch.bool, device=views.device)
    return (logits.masked_fill(own, -torch.inf).logsumexp(dim=-1) - torch.cat([twins, twins], dim=1)).mean()


def published_contraclm(views: Tensor) -> Tensor:
    """The arithmetic of the authors' code: all but a state and its twin are negatives, the twin is added to them."""
    losses = []
    for first, second in zip(views[0], views[1], strict=True):
        first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
        both, length = torch.cat([first, second]), len(first)
        negatives = ~torch.eye(length, dtype=torch.bool, device=views.device).repeat(2, 2)
        positive = ((first * second).sum(dim=-1).float() / 0.05).exp().repeat(2)
        others = ((both @ both.T).float() / 0.05).exp().masked_select(negatives).view(2 * length, -1).sum(dim=-1)
        losses.append(-(positive / (others + positive)).log().mean())
    return torch.stack(losses).mean()


def eager_cosines(views: Tensor) -> Tensor:
    unit = F.normalize(views.flatten(0, 1), dim=-1)
    length = unit.shape[1]
    own = torch.eye(length, dtype=torch.bool, device=views.device)
    return (unit @ unit.mT).masked_fill(own, 0.0).sum() / (len(unit) * length * (length - 1))


def token_providers(names: list[str], impl: str, backend: str = "inductor") -> dict[str, dict[str, Loss]]:
    """Losses of two views ``(2, B, T, D)``: ContraCLM's, and the mean cosine of either view."""
    providers: dict[str, Loss] = {
        "ours": lambda views: contraclm_token_loss(views[0], views[1], impl=impl),
        "eager": eager_contraclm,
    }
    if "compile" in names:
        torch._dynamo.reset()
        providers["compile"] = torch.compile(eager_contraclm, dynamic=False, backend=backend)
    providers["published"] = published_contraclm
    cosines: dict[str, Loss] = {"ours": lambda v: cosine_regularization(v.flatten(0, 1)), "eager": eager_cosines}
    return {
        "contraclm_token_loss": {name: loss for name, loss in providers.items() if name in names},
        "cosine_regularization": {name: loss for name, loss in cosines.items() if name in names},
    }


def sentence_transformers_loss() -> Loss | None:
    try:
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    except ImportError:  # absent, or before version 6
        try:
            from sentence_transformers.losses import MultipleNegativesRankingLoss
        except ImportError:
            return None
    peer = MultipleNegativesRankingLoss(torch.nn.Identity())
    # Its rows are anchors against positives only: a quarter of the products that the other three have.
    return lambda embeddings: peer.compute_loss_from_embeddings([embeddings[0::2], embeddings[1::2]], None)


# ---- measuring -------------------------------------------------------------------------------------------------------


def stopwatch(device: str, clock: str) -> Callable[[], float]:
    if device == "cuda":

        def now() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return now
    return time.process_time if clock == "cpu" else time.perf_counter


def timed(loss: Loss, data: Tensor, now: Callable[[], float], split: dict[str, list[float]]) -> float:
    leaf = data.detach().requires_grad_()
    begin = now()
    value = loss(leaf)
    middle = now()
    value.backward()
    end = now()
    both = end - begin
    if data.device.type == "cuda":  # once more without the wait in between, as a training step does it
        leaf.grad = None
        start = now()
        loss(leaf).backward()
        both = now() - start
    for mode, seconds in zip(MODES, (middle - begin, end - middle, both), strict=True):
        split[mode].append(seconds)
    return both


def peak_megabytes(loss: Loss, data: Tensor) -> float:
    leaf = data.detach().requires_grad_()
    if data.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(leaf).backward()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    loss(data.detach().requires_grad_()).backward()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what is freed: hand it back first
        ctypes.CDLL(None).malloc_trim(0)
    reset_peak_memory()
    before = resident_megabytes()[0]
    loss(leaf).backward()
    return resident_megabytes()[1] - before


def gradient_of(loss: Loss, data: Tensor) -> tuple[Tensor, Tensor]:
    leaf = data.detach().requires_grad_()
    value = loss(leaf)
    value.backward()
    return value.detach().double(), leaf.grad.double()


def ties(states: Tensor) -> float:
    """How far the gradient may be off because a cosine equals the threshold to a float's rounding.

    Such a hinge may be taken either way; each moves the gradients of two tokens by 2 / pairs over their norms.
    """
    wide = states.double()
    unit = F.normalize(wide, dim=-1)
    near = int(((unit @ unit.mT - (1.0 - MARGIN)).abs() < 2e-6).sum())
    batch, length, _ = states.shape
    return 4 * near / max(1, batch * length * (length - 1)) / float(wide.norm(dim=-1).min())


def agrees(ours: Loss, plain: Loss, truth: Loss, data: Tensor) -> bool:
    """Ours against float64, allowed three times what plain torch errs in the same dtype."""
    value, gradient = gradient_of(truth, data.double())
    (got, got_gradient), (other, other_gradient) = gradient_of(ours, data), gradient_of(plain, data)
    allowed = 3 * (other_gradient - gradient).norm() + 1e-5 * gradient.norm()
    if data.dim() == 3:
        allowed += ties(data)
    return bool((got - value).abs() <= 3 * (other - value).abs() + 1e-5 * value.abs()) and bool(
        (got_gradient - gradient).norm() <= allowed
    )


def configuration(args: argparse.Namespace) -> str:
    return json.dumps(
        {
            "dtype": args.dtype,
            "precision": args.precision,
            "threads": torch.get_num_threads(),
            "clock": args.clock,
            "impl": args.impl,
        }
    )


def goals_of(shape: str, kind: str, args: argparse.Namespace) -> dict[str, float]:
    goals = GOALS.get((args.device, args.dtype), {}).get(shape, {})
    if kind not in BIAS:
        return {}
    if args.device == "cuda" and args.dtype == "fp32" and args.precision == "highest":
        return {"eager": HIGHEST_GOAL} if goals else {}
    found = {peer: pair[0 if kind == "mixed" else 1] for peer, pair in goals.items()}
    return {peer: goal for peer, goal in found.items() if goal is not None}


def compare(
    kernel: str,
    label: str,
    providers: dict[str, Loss],
    data: Tensor,
    args: argparse.Namespace,
    goals: dict[str, float],
) -> None:
    """Measures all providers, prints a table, appends the CSV."""
    now = stopwatch(args.device, args.clock)
    splits: dict[str, dict[str, list[float]]] = {name: {mode: [] for mode in MODES} for name in providers}
    for loss in providers.values():
        timed(loss, data, now, {mode: [] for mode in MODES})  # compiles, warms up
    interleaved(
        {name: lambda loss=loss, split=splits[name]: timed(loss, data, now, split) for name, loss in providers.items()},
        args.repeats,
    )
    memory = {name: peak_megabytes(loss, data) for name, loss in providers.items()}
    config = configuration(args)
    versions, rows = module_versions("triton"), []
    print(f"\n{label}")
    for name in providers:
        cells = []
        for mode in MODES:
            best, ours = min(splits[name][mode]), min(splits["ours"][mode])
            cells.append(f"{mode} {best * 1e3:9.2f} ms" + ("" if name == "ours" else f" ({best / ours:5.2f}x)"))
            p20, p50, p80 = (1e3 * q for q in quantiles(splits[name][mode]))
            rows.append(Row(kernel, name, mode, "ms", "case", label, p20, p50, p80, config, device_name(), versions))
        rows.append(
            Row(kernel, name, "both", "peak_mb", "case", label, *[memory[name]] * 3, config, device_name(), versions)
        )
        print(f"  {name:22s} {'  '.join(cells)}  peak {memory[name]:8.1f} MB", flush=True)
    for peer, goal in goals.items():
        if peer in splits:
            reached = min(splits[peer]["both"]) / min(splits["ours"]["both"])
            print(f"  goal over {peer}: {goal}x, {'met' if reached >= goal else 'MISSED'} ({reached:.2f}x)", flush=True)
    append_csv(Path(args.csv), rows)


# ---- cases -----------------------------------------------------------------------------------------------------------


def trained_states(batch: int) -> Tensor:
    """Last hidden states of the bundled model on text it has written itself, as long as its positions allow."""
    from transformers import AutoModelForCausalLM

    from simctg_fast import bundled_model_path

    model = AutoModelForCausalLM.from_pretrained(bundled_model_path()).eval()
    length = min(512, model.config.max_position_embeddings)
    start = torch.full((batch, 1), model.config.bos_token_id or 0)
    with torch.inference_mode():
        tokens = model.generate(start, do_sample=True, min_new_tokens=length - 1, max_new_tokens=length - 1)
        states = model(tokens, output_hidden_states=True).hidden_states[-1]
    return states.clone()


def contrastive_cases(args: argparse.Namespace):
    for shape in args.shapes.split(","):
        size = tuple(int(n) for n in shape.split("x"))
        for kind in args.kinds.split(","):
            if kind != "trained":
                torch.manual_seed(0)
                yield shape, kind, torch.randn(size) + BIAS[kind] * torch.randn(size[2])
    if "trained" in args.kinds.split(","):
        torch.manual_seed(0)
        states = trained_states(8)
        yield "x".join(map(str, states.shape)), "trained", states


def run_contrastive(args: argparse.Namespace) -> bool:
    passed = True
    for shape, kind, states in contrastive_cases(args):
        data = states.to(args.device, DTYPES[args.dtype])
        providers = contrastive_providers(args.peers.split(","), args.impl)
        truth = lambda s: reference(s, None, MARGIN)  # noqa: E731
        if data.shape[1] <= 4096 and not agrees(providers["ours"], eager, truth, data[:1]):
            print(f"\n{shape} {kind}: WRONG, not measured", flush=True)
            passed = False
            continue
        compare("contrastive_loss", f"{shape} {args.dtype} {kind}", providers, data, args, goals_of(shape, kind, args))
    return passed


def run_simcse(args: argparse.Namespace) -> bool:
    passed = True
    for rows in map(int, args.simcse.split(",")):
        torch.manual_seed(0)
        data = (torch.randn(rows, 768) + 0.5).to(args.device, DTYPES[args.dtype])
        providers = simcse_providers(rows, args.device)
        if "broadcast" not in args.peers:
            providers.pop("broadcast", None)
        small = data[: min(rows, 2050)]
        if not agrees(providers["ours"], simcse_reference, simcse_reference, small):
            print(f"\nsimcse {rows}: WRONG, not measured", flush=True)
            passed = False
            continue
        goals = SIMCSE_GOALS.get((args.device, args.dtype), {}).get(rows, {})
        compare("simcse", f"simcse {rows}x768 {args.dtype}", providers, data, args, goals)
    return passed


TOKEN_TRUTHS: dict[str, tuple[Loss, Loss]] = {
    "contraclm_token_loss": (lambda v: contraclm_reference.contraclm_token_loss(v[0], v[1]), eager_contraclm),
    "cosine_regularization": (lambda v: contraclm_reference.cosine_regularization(v.flatten(0, 1)), eager_cosines),
}


def tokens_agree(kernel: str, ours: Loss, views: Tensor) -> bool:
    """Against loops over pairs for a few tokens, which are held against the matrix in turn, and that for a sequence."""
    loops, matrix = TOKEN_TRUTHS[kernel]
    few, whole = views[:, :2, :24], views[:, :1, :2048]
    return agrees(ours, matrix, loops, few) and agrees(ours, matrix, matrix, whole)


def token_views(size: tuple[int, ...]) -> Tensor:
    """``(2, B, T, D)``: tokens in a cone, as those of a language model are, twins nearer than others."""
    torch.manual_seed(0)
    states = torch.randn(size) + BIAS["biased"] * torch.randn(size[-1])
    return torch.stack([states, states + 0.6 * torch.randn(size)])


def run_tokens(args: argparse.Namespace) -> bool:
    passed = True
    for shape in args.shapes.split(","):
        views = token_views(tuple(int(n) for n in shape.split("x"))).to(args.device, DTYPES[args.dtype])
        for kernel, providers in token_providers(args.peers.split(","), args.impl).items():
            if not tokens_agree(kernel, providers["ours"], views):
                print(f"\n{kernel} {shape}: WRONG, not measured", flush=True)
                passed = False
                continue
            goals = TOKEN_GOALS.get((args.device, args.dtype), {}).get(shape, {})
            goals = goals if kernel == "contraclm_token_loss" else {}
            compare(kernel, f"{kernel} {shape} {args.dtype}", providers, views, args, goals)
    return passed


def run_crossover(args: argparse.Namespace) -> bool:
    """Where eager stops being faster; rows of the CSV too."""
    now, width = stopwatch(args.device, args.clock), 768
    rows, versions = [], module_versions("triton")
    for batch, kind in ((1, "mixed"), (8, "mixed"), (8, "biased")):
        print(f"forward + backward, eager / ours, batch {batch}, width {width}, {kind}")
        for length in (2, 4, 8, 16, 32, 64, 128, 256):
            torch.manual_seed(0)
            data = torch.randn(batch, length, width) + BIAS[kind] * torch.randn(width)
            data = data.to(args.device, DTYPES[args.dtype])
            sink: dict[str, list[float]] = {mode: [] for mode in MODES}
            providers = contrastive_providers(["ours", "eager"], args.impl)
            figures = interleaved(
                {
                    n: lambda data=data, sink=sink, loss=loss: timed(loss, data, now, sink)
                    for n, loss in providers.items()
                },
                max(20, args.repeats),
            )
            best = {name: min(values[1:]) * 1e3 for name, values in figures.items()}
            print(f"  T={length:4d}  eager {best['eager']:7.3f} ms  ours {best['ours']:7.3f} ms  "
                  f"{best['eager'] / best['ours']:5.2f}x", flush=True)  # fmt: skip
            for name, values in figures.items():
                p20, p50, p80 = (1e3 * q for q in quantiles(values[1:]))
                label = f"{batch}x{length}x{width} {args.dtype} {kind}"
                rows.append(
                    Row("contrastive_loss_crossover", name, "both", "ms", "case", label, p20, p50, p80,
                        configuration(args), device_name(), versions)
                )  # fmt: skip
    append_csv(Path(args.csv), rows)
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    parser.add_argument("--shapes", help=f"batch x length x width, ...; default {CPU_SHAPES}, cuda {CUDA_SHAPES}")
    parser.add_argument("--kinds", default="mixed,biased,isotropic,trained")
    parser.add_argument("--peers", default="ours,eager,compile,published,tutorial,broadcast")
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--simcse", help="numbers of rows: measure SimCSE instead")
    parser.add_argument("--tokens", action="store_true", help="measure ContraCLM's token loss and the mean cosine")
    parser.add_argument("--crossover", action="store_true")
    parser.add_argument("--repeats", type=int, help="rounds; default 5, cuda 20")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: processor seconds")
    parser.add_argument("--precision", default="highest", choices=["highest", "high"], help="of float32 products")
    parser.add_argument("--csv", default=str(RESULTS / "losses.csv"))
    args = parser.parse_args(arguments)
    args.repeats = args.repeats or (20 if args.device == "cuda" else 5)
    if args.tokens:
        args.shapes = args.shapes or TOKEN_SHAPES[args.device]
    args.shapes = args.shapes or (CUDA_SHAPES if args.device == "cuda" else CPU_SHAPES)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no CUDA device")
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(args.precision)
    print(f"{device_name()}, {args.threads} threads, {module_versions('triton')}")
    chosen = {run_crossover: args.crossover, run_simcse: args.simcse, run_tokens: args.tokens, run_contrastive: True}
    run = next(run for run, wanted in chosen.items() if wanted)
    return 0 if run(args) else 1


if __name__ == "__main__":
    sys.exit(main())
