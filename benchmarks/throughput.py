"""Throughput of offline generation: our slots against static batches of transformers, in generated tokens per second.

    python benchmarks/throughput.py                    # the table of docs/engine.md, GPT-2-small shape
    python benchmarks/throughput.py --quick            # the same in little: a tiny model, seconds
    python benchmarks/throughput.py --device cuda --dtype bfloat16 --slots 64 --greedy-sizes 32,64,128
    python benchmarks/throughput.py --dtype bfloat16 --model smollm2 --no-oracle
    python benchmarks/throughput.py --sweep 1,4,16,64  # throughput against slots
    python benchmarks/throughput.py --growth 64,128,256 # throughput against requests
    python benchmarks/throughput.py --workers 1,2      # throughput against workers on Ray
    python benchmarks/throughput.py --orders           # how full slots are, by the order of the requests

256 requests, prompts of 8-512 tokens and outputs of 8-256, drawn once from heavy-tailed distributions. Outputs end by
their own `max_new_tokens` (the weights are random), and only what the requests asked for counts.

Every provider has a process of its own and its best batch size: a few decoding steps at each size say which
(`--batch-sizes`, `--greedy-sizes`, `--concurrency`). Then rounds go through the providers in turn. Ours answer all
requests in each round. Static batches are sorted by prompt length and run until their longest row has ended; of them
every `--thin`-th runs, others in each round, and their seconds a step, times the steps that all batches take, are the
time of all. `generate_batch` answers every `--thin-requests`-th request.
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
from decode import DTYPES, MODELS, make_model

ROOT = Path(__file__).resolve().parent.parent
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = time.perf_counter  # of this worker
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


def worker(options: argparse.Namespace) -> None:
    """Reads one JSON request a line, answers one JSON line."""
    import torch
    import transformers

    global clock
    clock = CLOCKS[options.clock]
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    model = make_model(options.model, options.dtype).to(options.device)
    requests = workload(options.requests, model.config.vocab_size)
    ready = {"ready": transformers.__version__, "torch": torch.__version__, "vocabulary": model.config.vocab_size}
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        runners = {"static": run_static, "engine": run_engine, "generate_batch": run_generate_batch}
        try:
            answer = runners[asked.pop("run")](model, requests, **asked)
        except Exception as error:  # reported in the table
            answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
        print(json.dumps(answer), flush=True)


def run_static(
    model,
    requests,
    kind: str,
    size: int,
    batches: list[int],
    penalty_alpha: float,
    top_k: int,
    steps: int | None = None,
) -> dict:
    """The static ``batches`` (their numbers); ``steps``: no more of them than that, whatever was asked for."""
    import torch

    arguments = {"penalty_alpha": penalty_alpha, "top_k": top_k} if kind == "contrastive" else {}
    all_batches = static_batches(requests, size)
    tokens, taken = {}, 0
    began = clock()
    for batch in [all_batches[index] for index in batches]:
        width = max(len(r["ids"]) for r in batch)
        longest = max(r["new"] for r in batch) if steps is None else steps
        ids = torch.tensor([[0] * (width - len(r["ids"])) + r["ids"] for r in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(r["ids"])) + [1] * len(r["ids"]) for r in batch], device=model.device)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=longest, do_sample=False, pad_token_id=0, **arguments
            ).tolist()
        taken += longest
        for r, row in zip(batch, out, strict=True):
            tokens[r["id"]] = row[width : width + r["new"]]
    return {"seconds": clock() - began, "steps": taken, "tokens": tokens}


def run_generate_batch(model, requests, size: int, chosen: list[int], steps: int | None = None) -> dict:
    """What `generate_batch` does inside, by its own manager: the method itself has one length for all requests.

    ``size`` requests at a time. Its cache has room for so many of the longest: by default it takes 0.6 of the memory,
    and warming that up takes longer than the work.
    """
    import inspect

    from transformers import ContinuousBatchingConfig, GenerationConfig

    asked = [r | {"new": r["new"] if steps is None else steps} for r in (requests[index] for index in chosen)]
    page = 32
    longest = max(len(r["ids"]) + r["new"] for r in asked)
    known = inspect.signature(ContinuousBatchingConfig).parameters
    cache = ContinuousBatchingConfig(
        **{"page_size" if "page_size" in known else "block_size": page},  # transformers 5.17 has the old name
        num_blocks=size * (longest // page + 2),
        max_batch_tokens=max(512, size),
        max_requests_per_batch=size,
    )
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=256)
    tokens: dict[str, list[int]] = {}
    manager = model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=cache, block=True, timeout=5
    )
    with manager as running:
        began = clock()  # its warm-up is behind it
        for r in asked:
            running.add_request(r["ids"], request_id=str(r["id"]), max_new_tokens=r["new"])
        while len(tokens) < len(asked):
            result = running.get_result(timeout=1)
            if result is not None and result.is_finished():
                tokens[result.request_id] = result.generated_tokens
            elif result is None and not running.is_running():
                raise RuntimeError(f"it ended after {len(tokens)} of {len(asked)} requests")
        seconds = clock() - began
    short = sum(len(tokens[str(r["id"])]) < r["new"] for r in asked)
    if short:
        raise RuntimeError(f"{short} of {len(asked)} requests did not get their tokens")
    return {"seconds": seconds, "useful": sum(r["new"] for r in asked), "tokens": tokens}


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
    began = clock()
    results = list(engine.generate(lines))
    seconds = clock() - began
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

SCOUT_STEPS = 10  # by which batch sizes are compared


class Provider:
    """One side of the comparison: its process, its sizes, and what it has answered."""

    def __init__(self, name: str, kind: str, goal: float | None, sizes: list[int], options: argparse.Namespace):
        self.name, self.kind, self.goal, self.sizes, self.options = name, kind, goal, sizes, options
        self.size: int | None = sizes[0] if len(sizes) == 1 else None
        self.process: Worker | None = None
        self.rounds: list[dict] = []

    def start(self, python: str) -> None:
        self.process = start_worker(python, self.options)

    def ask(self, **request) -> dict:
        return self.process.ask(**request)

    def scout(self, requests: list[dict]) -> None:
        """Choose the size. Tokens a second in steps that are as full as the batches of that size are on average."""
        rates = {}
        for size in self.sizes if self.size is None else []:
            seconds = [self._few_steps(requests, size, steps) for steps in (1, 1 + SCOUT_STEPS)]
            if None in seconds:
                continue
            rates[size] = size * self._full(requests, size) * SCOUT_STEPS / (seconds[1] - seconds[0])
            note(f"  {self.name}, {size} at a time: about {rates[size]:.1f} tokens/s")
        if rates:
            self.size = max(rates, key=rates.get)

    def _few_steps(self, requests: list[dict], size: int, steps: int) -> float | None:
        answer = self._run(requests, size, steps=steps)
        if "failed" in answer:
            note(f"  {self.name}, {size} at a time: {answer['failed']}")
            return None
        return answer["seconds"]

    def round(self, requests: list[dict], number: int) -> None:
        if self.size is None:
            self.rounds.append({"failed": "no size worked"})
            return
        answer = self._run(requests, self.size, number=number)
        note(f"  {self.label}: {describe(answer)}")
        self.rounds.append(answer)

    def rate(self) -> float:
        """Tokens a second over all rounds; 0 where it did not run."""
        done = [answer for answer in self.rounds if "failed" not in answer]
        seconds = sum(answer["seconds"] for answer in done)
        return sum(answer["useful"] for answer in done) / seconds if seconds else 0.0

    @property
    def label(self) -> str:
        return f"{self.name}, {self.size} at a time"

    def tokens(self) -> dict[int, list[int]]:
        return {int(i): row for answer in self.rounds for i, row in answer.get("tokens", {}).items()}

    def _full(self, requests: list[dict], size: int) -> float:
        return 1.0

    def _run(self, requests: list[dict], size: int, number: int = 0, steps: int | None = None) -> dict:
        raise NotImplementedError


class Ours(Provider):
    def scout(self, requests: list[dict]) -> None:
        super().scout(requests)
        if self.options.device.startswith("cuda"):  # kernels are compiled once, as trying sizes does for the others
            self.ask(run="engine", strategy=self.kind, slots=self.size, thin=8, **search(self.options))

    def _run(self, requests: list[dict], size: int, number: int = 0, steps: int | None = None) -> dict:
        return self.ask(run="engine", strategy=self.kind, slots=size, **search(self.options))


class Static(Provider):
    def _run(self, requests: list[dict], size: int, number: int = 0, steps: int | None = None) -> dict:
        batches = static_batches(requests, size)
        thin, rounds = max(1, self.options.thin * 8 // size), self.options.rounds
        first = thin * (2 * number + 1) // (2 * rounds)
        chosen = list(range(len(batches)))[first::thin] or [len(batches) // 2]
        if steps is not None:
            chosen = [self._typical(batches)]
        answer = self.ask(run="static", kind=self.kind, size=size, batches=chosen, steps=steps, **search(self.options))
        if "failed" not in answer:
            # Of the batches that ran their seconds a step, of all batches the steps.
            answer["useful"] = answer["steps"] * size * self._full(requests, size)
        return answer

    @staticmethod
    def _typical(batches: list[list[dict]]) -> int:
        """The batch whose prompts are as long as rows are in the average step: longer rows cost more."""
        widths = [max(len(r["ids"]) for r in batch) for batch in batches]
        steps = [max(r["new"] for r in batch) for batch in batches]
        length = sum(n * (width + n / 2) for n, width in zip(steps, widths, strict=True)) / sum(steps)
        return min(range(len(batches)), key=lambda index: abs(widths[index] - length))

    def _full(self, requests: list[dict], size: int) -> float:
        """Tokens that were asked for, of all that the static batches' rows compute."""
        steps = sum(max(r["new"] for r in batch) for batch in static_batches(requests, size))
        return sum(r["new"] for r in requests) / (steps * size)


class ContinuousBatching(Provider):
    def _run(self, requests: list[dict], size: int, number: int = 0, steps: int | None = None) -> dict:
        thin = self.options.thin_requests
        chosen = list(range(len(requests)))[number % thin :: thin] if steps is None else list(range(size))
        return self.ask(run="generate_batch", size=size, chosen=chosen, steps=steps)


def search(options: argparse.Namespace) -> dict:
    return {"penalty_alpha": options.penalty_alpha, "top_k": options.top_k}


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def start_worker(python: str, options: argparse.Namespace) -> Worker:
    arguments = [
        x for n in ("model", "threads", "clock", "device", "dtype", "requests") for x in (f"--{n}", getattr(options, n))
    ]
    return Worker(python, __file__, "--worker", *arguments, threads=options.threads)


def compare(options: argparse.Namespace, oracle: str | None) -> None:
    against, than = GOALS["cuda" if options.device.startswith("cuda") else "cpu"]
    ours = Ours("contrastive search on slots", "contrastive", None, [options.slots], options)
    providers: list[Provider] = [
        ours,
        Static("4.55.4's contrastive search", "contrastive", against, numbers(options.batch_sizes), options),
        Static("transformers' greedy search", "greedy", than, numbers(options.greedy_sizes), options),
        ContinuousBatching(
            "transformers' generate_batch, greedy", "greedy", than, numbers(options.concurrency), options
        ),
    ]
    names = [name for name in options.ours.split(",") if name]
    others = [Ours(f"{name} on slots", name, None, [options.slots], options) for name in names]
    providers = [ours, *others, *([] if options.no_peers else providers[1:])]
    if oracle is None:
        providers = [provider for provider in providers if "4.55.4" not in provider.name]
    restore(options.state, providers)
    try:
        for provider in providers:
            provider.start(oracle if "4.55.4" in provider.name else sys.executable)
        requests = workload(options.requests, providers[0].process.ready["vocabulary"])
        for provider in providers:
            provider.scout(requests)
            save(options.state, providers)
        for number in range(0 if options.scout else options.rounds):
            note(f"round {number + 1} of {options.rounds}")
            for provider in providers:
                if len(provider.rounds) > number:  # in an earlier call
                    continue
                waiting = {other: other.process.cpu_seconds() for other in providers if other is not provider}
                provider.round(requests, number)
                for other, before in waiting.items():
                    check_idle(other, before, provider.rounds[-1:])
                save(options.state, providers)
    finally:
        for provider in providers:
            if provider.process is not None:
                provider.process.close()
    report(ours, providers, options)


def check_idle(provider: Provider, before: float, running: list[dict]) -> None:
    """A process that only waits must not take the processors from the one that is measured."""
    used = provider.process.cpu_seconds() - before
    if running and used > 0.1 + 0.01 * running[0].get("seconds", 0.0):
        raise SystemExit(f"{provider.name} used {used:.1f} s of processor time while it waited: nothing is reported")


def save(path: Path | None, providers: list[Provider]) -> None:
    if path is not None:
        path.write_text(json.dumps({p.name: {"size": p.size, "rounds": p.rounds} for p in providers}))


def restore(path: Path | None, providers: list[Provider]) -> None:
    """Take over what an earlier call of this run has kept."""
    if path is None or not path.exists():
        return
    kept = json.loads(path.read_text())
    for provider in providers:
        if provider.name in kept:
            provider.size, provider.rounds = kept[provider.name]["size"], kept[provider.name]["rounds"]


def describe(answer: dict) -> str:
    if "failed" in answer:
        return answer["failed"]
    text = f"{answer['useful'] / answer['seconds']:.1f} tokens/s ({answer['seconds']:.1f} s)"
    if answer.get("slots_busy") is not None:
        text += f", slots {answer['slots_busy']:.1%} busy"
    if answer.get("overhead") is not None:
        text += f", scheduler {answer['overhead']:.2%} of the time, {answer['near_ties']} near ties"
    return text


def report(ours: Provider, providers: list[Provider], options: argparse.Namespace) -> None:
    if not ours.rounds:
        return
    reference = ours.rate()
    print(f"\n{'':60}{'tokens/s':>10}{'ours faster by':>16}{'by round':>16}{'goal':>7}")
    for provider in providers:
        rate = provider.rate()
        if not rate:
            print(f"{provider.name:60}did not run: {provider.rounds[0]['failed']}")
            continue
        ratios = [
            (mine["useful"] / mine["seconds"]) / (other["useful"] / other["seconds"])
            for mine, other in zip(ours.rounds, provider.rounds, strict=False)
            if "failed" not in mine and "failed" not in other
        ]
        line = f"{provider.label:60}{rate:10.1f}"
        if provider is not ours:
            goal = "" if provider.goal is None else f"{provider.goal:g}x"
            line += f"{reference / rate:15.2f}x{f'{min(ratios):.2f}-{max(ratios):.2f}':>16}{goal:>7}"
        print(line)
    busy = min(answer["slots_busy"] for answer in ours.rounds)
    overhead = max(answer["overhead"] for answer in ours.rounds)
    ties = ours.rounds[0]["near_ties"]
    print(f"slots {busy:.1%} busy, scheduler {overhead:.2%} of the time, {ties} near ties")
    check_tokens(providers)
    names = (
        "model",
        "requests",
        "top_k",
        "penalty_alpha",
        "threads",
        "clock",
        "thin",
        "thin_requests",
        "rounds",
        "dtype",
    )
    config = {name: getattr(options, name) for name in names}
    append_csv(
        options.csv,
        [
            Row(
                kernel="engine",
                provider=provider.label,
                mode="throughput",
                metric="tokens_per_second",
                x_name="requests",
                x_value=str(options.requests),
                p20=provider.rate(),
                p50=provider.rate(),
                p80=provider.rate(),
                config=json.dumps(config),
                gpu=device_name() if options.device.startswith("cuda") else processor(),
                version=json.dumps(provider.process.ready),
            )
            for provider in providers
            if provider.rate()
        ],
    )


def check_tokens(providers: list[Provider]) -> None:
    """Requests whose tokens are those of our rows, contrastive against contrastive, greedy against greedy."""
    mine = {provider.kind: provider.tokens() for provider in providers if isinstance(provider, Ours)}
    for provider in providers:
        rows = provider.tokens()
        if isinstance(provider, Ours) or provider.kind not in mine or not rows:
            continue
        same = sum(mine[provider.kind].get(i) == row for i, row in rows.items())
        print(f"same tokens as {provider.name}: {same} of {len(rows)} requests")


def sweep(options: argparse.Namespace, cases: list[tuple[int, int]]) -> None:
    """Ours alone; ``cases``: slots, and that every so-many-th request is answered."""
    process = start_worker(sys.executable, options)
    try:
        print(f"{'slots':>6}{'requests':>10}{'tokens':>8}{'seconds':>9}{'tokens/s':>10}{'busy':>8}{'scheduler':>11}")
        for slots, thin in cases:
            answer = process.ask(run="engine", strategy="contrastive", slots=slots, thin=thin, **search(options))
            if "failed" in answer:
                print(f"{slots:6}  {answer['failed']}")
                continue
            tokens, seconds = answer["useful"], answer["seconds"]
            print(
                f"{slots:6}{len(answer['tokens']):10}{tokens:8}{seconds:9.1f}{tokens / seconds:10.1f}"
                f"{answer['slots_busy']:8.1%}{answer['overhead']:11.2%}",
                flush=True,
            )
    finally:
        process.close()


def scale(options: argparse.Namespace, counts: list[int]) -> None:
    """Tokens a second against workers, one thread each. Starting a cluster and loading models is taken out: it is the
    difference of two jobs, one of all requests and one of half of them."""
    import tempfile

    import torch
    from transformers import AutoTokenizer

    sys.path.insert(0, str(ROOT))
    from simctg_fast import bundled_model_path
    from simctg_fast.engine.job.job import make_options
    from simctg_fast.integrations.ray import run_on_ray

    with tempfile.TemporaryDirectory() as folder:
        model = make_model(options.model, options.dtype)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(bundled_model_path()).save_pretrained(folder)
        requests = workload(options.requests, model.config.vocab_size)
        del model
        torch.set_num_threads(1)
        print(f"{'workers':>8}{'tokens/s':>10}{'with start':>12}")
        for workers in counts:
            figures = []
            for part in (requests[::2], requests):
                source, out = Path(folder, "in.jsonl"), Path(folder, f"out-{workers}-{len(part)}.jsonl")
                lines = [{"id": r["id"], "prompt": r["ids"], "max_new_tokens": r["new"]} for r in part]
                source.write_text("".join(json.dumps(line) + "\n" for line in lines))
                given = {"input": str(source), "output": str(out), "model": folder, "slots": options.slots}
                given |= {"top_k": options.top_k, "penalty_alpha": options.penalty_alpha, "dtype": options.dtype}
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


QUICK = {
    "model": "tiny",
    "requests": 32,
    "slots": 8,
    "batch_sizes": "1,8",
    "greedy_sizes": "8,16",
    "concurrency": "8",
    "thin": 2,
    "thin_requests": 2,
    "threads": 1,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--batch-sizes", default="1,4,8,16,32", help="of 4.55.4's contrastive search")
    parser.add_argument("--greedy-sizes", default="8,16,32,64", help="of transformers' greedy search")
    parser.add_argument("--concurrency", default="16,32,64", help="requests at a time of generate_batch")
    parser.add_argument(
        "--thin", type=int, default=24, help="of static batches of 8 every N-th runs, of 16 twice as many"
    )
    parser.add_argument("--thin-requests", type=int, default=8, help="generate_batch answers every N-th request")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--scout", action="store_true", help="choose the sizes only")
    parser.add_argument("--state", type=Path, help="JSON file that keeps what is there: a run that was ended goes on")
    parser.add_argument("--ours", default="", help="rows for other strategies on slots, comma-separated: greedy, fsd …")
    parser.add_argument("--no-peers", action="store_true", help="leave transformers out as well")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few requests: does it run at all?")
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--penalty-alpha", type=float, default=0.6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: processor time of all threads, for a machine that others use too; with --threads 1",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--model", default="gpt2-small", choices=tuple(MODELS))
    parser.add_argument("--sweep", help="slots, comma-separated: throughput against slots, ours alone")
    parser.add_argument("--growth", help="requests, comma-separated: throughput against requests, ours alone")
    parser.add_argument("--workers", help="workers, comma-separated: throughput on Ray, ours alone")
    parser.add_argument("--orders", action="store_true", help="how full slots are, by the order of the requests")
    parser.add_argument("--no-oracle", action="store_true", help="leave transformers 4.55.4 out")
    parser.add_argument("--csv", type=Path, default=RESULTS / "throughput.csv")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args(arguments)
    return options


def main() -> None:
    options = parse()
    if options.worker:
        worker(options)
        return
    print(
        f"{processor()}, {options.threads} threads, {options.clock} clock, {options.dtype}, k = {options.top_k}, "
        f"{options.requests} requests"
    )
    if options.orders:
        orders(options)
    elif options.sweep:
        # Few slots take long for all requests.
        sweep(options, [(slots, max(1, min(32, 64 // slots))) for slots in numbers(options.sweep)])
    elif options.growth:
        sweep(options, [(options.slots, max(1, options.requests // count)) for count in numbers(options.growth)])
    elif options.workers:
        scale(options, numbers(options.workers))
    else:
        from parity_zoo.environment import oracle_python  # not at the top: the oracle's worker runs this file too

        compare(options, None if options.no_oracle else oracle_python())


if __name__ == "__main__":
    main()
