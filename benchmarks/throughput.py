"""Throughput of offline generation: our slots against static batches of transformers, in generated tokens per second.

    python benchmarks/throughput.py                    # the table of benchmarks/engine.md, GPT-2-small shape
    python benchmarks/throughput.py --sweep 1,4,16,64  # throughput against slots
    python benchmarks/throughput.py --workers 1,2      # throughput against workers on Ray
    python benchmarks/throughput.py --orders           # how full slots are, by the order of the requests

256 requests, prompts of 8-512 tokens and outputs of 8-256, drawn once from heavy-tailed distributions. Outputs end by
their own `max_new_tokens` (the weights are random): a static batch runs until its longest row has ended, and only what
the requests asked for counts. Static batches are sorted by prompt length, and run at several sizes; the best counts.
`--thin N` runs every N-th of these batches, which estimates the rate of all; our runs are always whole.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import RESULTS, Row, Worker, append_csv, device_name, processor

ROOT = Path(__file__).resolve().parent.parent
MODELS = {
    "gpt2-small": {},
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 500},
}
GOALS = {"cpu": (4.0, 1.5), "cuda": (20.0, 5.0)}  # faster than 4.55.4's contrastive search, than transformers' greedy


def workload(count: int, vocabulary: int) -> list[dict]:
    """Prompts as token ids, and how many tokens each wants: log-normal, medians 48 and 40, cut to their ranges."""
    draw = random.Random(2024)
    requests = []
    for index in range(count):
        prompt = min(512, max(8, round(math.exp(draw.gauss(math.log(48), 1.0)))))
        output = min(256, max(8, round(math.exp(draw.gauss(math.log(40), 0.9)))))
        ids = [draw.randrange(1, vocabulary) for _ in range(prompt)]
        requests.append({"id": index, "ids": ids, "new": output})
    return requests


def static_batches(requests: list[dict], size: int) -> list[list[dict]]:
    ordered = sorted(requests, key=lambda r: (len(r["ids"]), r["id"]))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


# ---- worker: runs in either environment ------------------------------------------------------------------------------


def make_model(name: str, device: str, dtype: str):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_positions=1024, initializer_range=0.1, bos_token_id=0, eos_token_id=None, pad_token_id=0, **MODELS[name]
    )
    config._attn_implementation = "sdpa"
    return GPT2LMHeadModel(config).eval().to(device, getattr(torch, dtype))


def worker(options: argparse.Namespace) -> None:
    """Reads one JSON request a line, answers one JSON line."""
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    model = make_model(options.model, options.device, options.dtype)
    requests = workload(options.requests, model.config.vocab_size)
    print(json.dumps({"ready": transformers.__version__, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        runners = {"static": run_static, "engine": run_engine, "generate_batch": run_generate_batch}
        try:
            answer = runners[asked.pop("run")](model, requests, **asked)
        except Exception as error:  # reported in the table
            answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
        print(json.dumps(answer), flush=True)


def run_static(model, requests, kind: str, size: int, thin: int, penalty_alpha: float, top_k: int) -> dict:
    import torch

    arguments = {"penalty_alpha": penalty_alpha, "top_k": top_k} if kind == "contrastive" else {}
    batches = static_batches(requests, size)[thin // 2 :: thin]
    tokens, useful = {}, 0
    began = time.perf_counter()
    for batch in batches:
        width = max(len(r["ids"]) for r in batch)
        ids = torch.tensor([[0] * (width - len(r["ids"])) + r["ids"] for r in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(r["ids"])) + [1] * len(r["ids"]) for r in batch], device=model.device)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max(r["new"] for r in batch),
                do_sample=False,
                pad_token_id=0,
                **arguments,
            ).tolist()
        for r, row in zip(batch, out, strict=True):
            tokens[r["id"]] = row[width : width + r["new"]]
            useful += r["new"]
    return {"seconds": time.perf_counter() - began, "useful": useful, "tokens": tokens}


def run_generate_batch(model, requests, thin: int) -> dict:
    """What `generate_batch` does inside, by its own manager: the method itself has one length for all requests."""
    from transformers import GenerationConfig

    chosen = requests[::thin]
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=256)
    tokens: dict[str, list[int]] = {}
    began = time.perf_counter()
    with model.continuous_batching_context_manager(generation_config=config, block=True, timeout=5) as manager:
        for r in chosen:
            manager.add_request(r["ids"], request_id=str(r["id"]), max_new_tokens=r["new"])
        while len(tokens) < len(chosen):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                tokens[result.request_id] = result.generated_tokens
            elif result is None and not manager.is_running():
                raise RuntimeError(f"it ended after {len(tokens)} of {len(chosen)} requests")
    seconds = time.perf_counter() - began
    short = sum(len(tokens[str(r["id"])]) < r["new"] for r in chosen)
    if short:
        raise RuntimeError(f"{short} of {len(chosen)} requests did not get their tokens")
    return {"seconds": seconds, "useful": sum(r["new"] for r in chosen), "tokens": tokens}


class Ids:
    """A tokenizer of numbers: the requests' token ids go in as text."""

    pad_token_id, chat_template = 0, None

    def __call__(self, text, **kwargs):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids, **kwargs):
        return " ".join(map(str, ids))


def run_engine(
    model, requests, strategy: str, slots: int, penalty_alpha: float, top_k: int, thin: int = 1, batching="slots"
) -> dict:
    from simctg_fast.engine import Engine

    parameters = {"penalty_alpha": penalty_alpha, "top_k": top_k} if strategy == "contrastive" else {}
    engine = Engine(model, Ids(), strategy=strategy, slots=slots, batching=batching, **parameters)
    lines = [
        {"id": r["id"], "prompt": " ".join(map(str, r["ids"])), "max_new_tokens": r["new"]} for r in requests[::thin]
    ]
    began = time.perf_counter()
    results = list(engine.generate(lines))
    seconds = time.perf_counter() - began
    errors = [r.error for r in results if r.error]
    if errors:
        raise RuntimeError(f"{len(errors)} errors, the first: {errors[0]}")
    backend = engine.backend
    return {
        "seconds": seconds,
        "useful": sum(len(r.token_ids) for r in results),
        "tokens": {r.id: r.token_ids for r in results},
        "overhead": 1 - backend.model_seconds / backend.seconds if batching == "slots" else None,
        **engine.stats,
    }


# ---- the comparison --------------------------------------------------------------------------------------------------


def start_worker(python: str, options: argparse.Namespace) -> Worker:
    arguments = [
        x for n in ("model", "threads", "device", "dtype", "requests") for x in (f"--{n}", getattr(options, n))
    ]
    return Worker(python, __file__, "--worker", *arguments, threads=options.threads)


def compare(options: argparse.Namespace, oracle: str | None) -> None:
    search = {"penalty_alpha": options.penalty_alpha, "top_k": options.top_k}
    engine = {"run": "engine", "slots": options.slots, **search}
    static = {"run": "static", "thin": options.thin, **search}
    asked = {
        "ours": [
            (f"contrastive, {options.slots} slots", engine | {"strategy": "contrastive"}),
            (f"greedy, {options.slots} slots", engine | {"strategy": "greedy"}),
        ],
        "oracle": [
            (f"4.55.4 contrastive, batches of {size}", static | {"kind": "contrastive", "size": size})
            for size in map(int, options.batch_sizes.split(","))
        ],
        "greedy": [
            (f"transformers greedy, batches of {size}", static | {"kind": "greedy", "size": size})
            for size in map(int, options.greedy_sizes.split(","))
        ],
        "generate_batch": [
            ("transformers generate_batch greedy", {"run": "generate_batch", "thin": max(1, options.thin // 2)})
        ],
    }
    parts = list(asked) if options.part == "all" else [part for part in options.part.split(",") if part in asked]
    answers: dict[str, dict] = {}
    if options.state is not None and options.state.exists():
        answers = json.loads(options.state.read_text())
    for part in parts:
        if part == "oracle" and oracle is None:
            continue
        process = start_worker(oracle if part == "oracle" else sys.executable, options)
        try:
            for name, request in asked[part] * options.repeats:
                answer = process.ask(**request) | {"version": process.ready}
                print(f"  {name}: {describe(answer)}", file=sys.stderr, flush=True)
                if name not in answers or rate(answer) >= rate(answers[name]):
                    answers[name] = answer
                if options.state is not None:
                    options.state.write_text(json.dumps(answers))
        finally:
            process.close()
    report(answers, options)


def rate(answer: dict) -> float:
    return 0.0 if "failed" in answer else answer["useful"] / answer["seconds"]


def describe(answer: dict) -> str:
    if "failed" in answer:
        return answer["failed"]
    text = f"{rate(answer):.1f} tokens/s ({answer['useful']} in {answer['seconds']:.1f} s)"
    if answer.get("slots_busy") is not None:
        text += f", slots {answer['slots_busy']:.1%} busy"
    if answer.get("overhead") is not None:
        text += f", scheduler {answer['overhead']:.2%} of the time, {answer['near_ties']} near ties"
    return text


def report(answers: dict[str, dict], options: argparse.Namespace) -> None:
    rates = {name: rate(answer) for name, answer in answers.items()}
    main = next((name for name in rates if name.startswith("contrastive")), None)
    if main is None:
        return
    print(f"\n{'':44}{'tokens/s':>10}{'ours faster by':>16}")
    for name, value in rates.items():
        ratio = f"{rates[main] / value:.2f}x" if value else "did not run"
        print(f"{name:44}{value:10.1f}{ratio:>16}")
    best = {
        kind: max((v for n, v in rates.items() if n.startswith(kind)), default=0.0)
        for kind in ("4.55.4 contrastive", "transformers greedy")
    }
    goals = GOALS["cuda" if options.device.startswith("cuda") else "cpu"]
    for (kind, value), goal in zip(best.items(), goals, strict=True):
        if value:
            print(f"against {kind} at its best batch size: {rates[main] / value:.2f}x (goal {goal}x)")
    print(describe(answers[main]))
    check_tokens(answers)
    config = {
        n: getattr(options, n) for n in ("model", "requests", "top_k", "penalty_alpha", "threads", "thin", "dtype")
    }
    append_csv(
        options.csv,
        [
            Row(
                kernel="engine",
                provider=name,
                mode="throughput",
                metric="tokens_per_second",
                x_name="requests",
                x_value=str(options.requests),
                p20=value,
                p50=value,
                p80=value,
                config=json.dumps(config),
                gpu=device_name() if options.device.startswith("cuda") else processor(),
                version=json.dumps(answers[name]["version"]),
            )
            for name, value in rates.items()
        ],
    )


def check_tokens(answers: dict[str, dict]) -> None:
    """Requests whose tokens are those of the other side, contrastive against contrastive, greedy against greedy."""
    for mine, other in (("contrastive", "4.55.4 contrastive"), ("greedy", "transformers g")):
        ours = next(({int(i): t for i, t in a["tokens"].items()} for n, a in answers.items() if n.startswith(mine)), {})
        for name, answer in answers.items():
            if name.startswith(other) and "tokens" in answer:
                same = sum(ours.get(int(i)) == tokens for i, tokens in answer["tokens"].items())
                print(f"same tokens as {name}: {same} of {len(answer['tokens'])} requests")


def sweep(options: argparse.Namespace) -> None:
    process = start_worker(sys.executable, options)
    search = {"penalty_alpha": options.penalty_alpha, "top_k": options.top_k}
    try:
        print(f"{'slots':>6}{'tokens/s':>10}{'busy':>8}{'scheduler':>11}")
        for slots in map(int, options.sweep.split(",")):
            thin = max(1, min(32, 64 // slots))  # few slots take long for all requests
            answer = process.ask(run="engine", strategy="contrastive", slots=slots, thin=thin, **search)
            if "failed" in answer:
                print(f"{slots:6}  {answer['failed']}")
                continue
            print(f"{slots:6}{rate(answer):10.1f}{answer['slots_busy']:8.1%}{answer['overhead']:11.2%}", flush=True)
    finally:
        process.close()


def scale(options: argparse.Namespace) -> None:
    """Tokens a second against workers, one thread each. Starting a cluster and loading models is taken out: it is the
    difference of two jobs, one of all requests and one of half of them."""
    import tempfile

    import torch
    from transformers import AutoTokenizer

    sys.path.insert(0, str(ROOT))
    from simctg_fast import bundled_model_path
    from simctg_fast.engine.job import make_options
    from simctg_fast.integrations.ray import run_on_ray

    with tempfile.TemporaryDirectory() as folder:
        model = make_model(options.model, "cpu", "float32")
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(bundled_model_path()).save_pretrained(folder)
        requests = workload(options.requests, model.config.vocab_size)
        del model
        torch.set_num_threads(1)
        print(f"{'workers':>8}{'tokens/s':>10}{'with start':>12}")
        for workers in map(int, options.workers.split(",")):
            figures = []
            for part in (requests[::2], requests):
                source, out = Path(folder, "in.jsonl"), Path(folder, f"out-{workers}-{len(part)}.jsonl")
                lines = [{"id": r["id"], "prompt": r["ids"], "max_new_tokens": r["new"]} for r in part]
                source.write_text("".join(json.dumps(line) + "\n" for line in lines))
                given = {"input": str(source), "output": str(out), "model": folder, "slots": options.slots}
                given |= {"top_k": options.top_k, "penalty_alpha": options.penalty_alpha, "dtype": "float32"}
                summary = run_on_ray(make_options(given), workers=workers, threads=1)
                assert summary.exit_code == 0, summary.as_dict()
                figures.append((summary.generated_tokens, summary.seconds))
            (half, first), (whole, second) = figures
            print(f"{workers:8}{(whole - half) / (second - first):10.1f}{whole / second:12.1f}", flush=True)


def orders(options: argparse.Namespace) -> None:
    """How full slots are, by the order in which sequences are begun; counted in steps, no model runs."""
    requests = workload(options.requests, 50257)
    keys = {
        "input order": lambda r: r["id"],
        "longest first": lambda r: -(r["new"] + len(r["ids"]) // 16),  # the scheduler's
        "shortest first": lambda r: r["new"],
    }
    print(f"{'slots':>6}" + "".join(f"{name:>16}" for name in keys))
    for slots in (4, 16, 64):
        shares = []
        for key in keys.values():
            ends = [0] * slots
            for r in sorted(requests, key=key):
                heapq.heapreplace(ends, ends[0] + r["new"])
            shares.append(sum(r["new"] for r in requests) / (max(ends) * slots))
        print(f"{slots:6}" + "".join(f"{share:16.1%}" for share in shares))
    for size in (4, 8, 16, 32):
        steps = sum(max(r["new"] for r in batch) * size for batch in static_batches(requests, size))
        print(f"static batches of {size}: {sum(r['new'] for r in requests) / steps:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--batch-sizes", default="4,8,16", help="of 4.55.4's contrastive search")
    parser.add_argument("--greedy-sizes", default="8,16,32", help="of transformers' greedy search")
    parser.add_argument("--thin", type=int, default=1, help="run every N-th static batch")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--penalty-alpha", type=float, default=0.6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model", default="gpt2-small", choices=tuple(MODELS))
    parser.add_argument("--sweep", help="slots, comma-separated: throughput against slots, ours alone")
    parser.add_argument("--workers", help="workers, comma-separated: throughput on Ray, ours alone")
    parser.add_argument(
        "--part",
        default="all",
        help="ours,oracle,greedy,generate_batch: run some of the rows; none: show those of --state",
    )
    parser.add_argument("--state", type=Path, help="JSON file in which rows are kept, for runs in several parts")
    parser.add_argument("--orders", action="store_true", help="how full slots are, by the order of the requests")
    parser.add_argument("--no-oracle", action="store_true", help="leave transformers 4.55.4 out")
    parser.add_argument("--csv", type=Path, default=RESULTS / "throughput.csv")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    print(
        f"{processor()}, {options.threads} threads, {options.dtype}, k = {options.top_k}, {options.requests} requests"
    )
    if options.orders:
        orders(options)
    elif options.sweep:
        sweep(options)
    elif options.workers:
        scale(options)
    else:
        from parity_zoo.environment import oracle_python  # not at the top: the oracle's worker runs this file too

        compare(options, None if options.no_oracle else oracle_python())


if __name__ == "__main__":
    main()
