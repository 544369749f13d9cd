"""Two checkouts of this library against each other: what a change did to the speed of what people call.

    git worktree add ../before <revision>; (cd ../before; python setup.py build_ext --inplace)
    python benchmarks/builds.py ../before
    python benchmarks/builds.py ../before --cases decode:1x32 engine --repeats 5
    python benchmarks/builds.py ../before --dtype-before float32 --dtype bfloat16 --cases decode:1x64 decode:8x64 engine

Either has a process of its own; rounds go through both in turn. Of a ``decode`` case the times of its tokens are taken,
the first one's aside, and their minima over the rounds are added up; of all others the minimum of the whole call.
Answers are compared first: where they differ nothing is reported. Of two dtypes the tokens are not compared, as random
weights make near ties of many of them; how many there are is. GPT-2-small (or `--model smollm2`) and T5-small shapes,
random weights.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Worker, processor
from decode import DTYPES, MODELS, OURS, make_model, provider_arguments

ROOT = Path(__file__).resolve().parent.parent
CASES = "decode:1x32 decode:1x512 decode:8x256 decode:8x768 engine plain text trial"
GOAL = 0.98  # of the speed before, on every row

# ---- worker: imports the library of one checkout ---------------------------------------------------------------------


def timed(function) -> tuple[list[float], object]:
    began = time.perf_counter()
    answer = function()
    return [time.perf_counter() - began], answer


def decode(model, size: str, new: int) -> dict:
    import torch
    from ragged import Ends

    batch, prompt = map(int, size.split("x"))
    ids = torch.randint(1, model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(1))
    found = {}
    for provider in OURS:
        arguments = provider_arguments(provider, 4, 0.6) | {"max_new_tokens": new, "attention_mask": ids > 0}
        clock = Ends([prompt + new + 1] * batch)  # which stops nothing
        out = model.generate(ids, do_sample=False, pad_token_id=0, stopping_criteria=[clock], **arguments)
        found[provider] = (clock.milliseconds()[1:] / 1e3).tolist(), out.tolist()
    return found


def engine(model, _: str, new: int) -> dict:
    from throughput import run_engine, workload

    requests = [r | {"new": min(r["new"], new)} for r in workload(48, model.config.vocab_size)]
    found = {}
    for strategy in ("contrastive", "greedy", "stochastic-contrastive", "sample"):
        answer = run_engine(model, requests, strategy, 16, penalty_alpha=0.6, top_k=4)
        tokens = sorted(answer["tokens"].items())
        if strategy == "sample":  # among so many tokens of like probability the last bit changes a draw now and then
            tokens = [len(ids) for _, ids in tokens]
        found[f"{strategy}, 16 slots"] = [answer["seconds"]], tokens
    return found


def plain(model, _: str, new: int) -> dict:
    import torch
    from transformers import DynamicCache

    from simctg_fast import generate

    cache = next(n for n in ("cache", "past_key_values") if n in inspect.signature(model.forward).parameters)

    def step(ids, state):
        output = model(ids, **{cache: DynamicCache() if state is None else state})
        return output.logits, output[cache]

    settings = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2}
    settings |= {"max_new_tokens": new, "eos_token_id": model.config.vocab_size - 1}
    found = {}
    for batch in (1, 4):
        ids = torch.randint(1, model.config.vocab_size, (batch, 32), generator=torch.Generator().manual_seed(1))
        torch.manual_seed(0)
        found[f"batch {batch}"] = timed(lambda ids=ids: generate(step, ids, **settings).tolist())
    return found


def text(_, folder: str, new: int) -> dict:
    import transformers

    from simctg_fast import ContrastiveGenerator

    lines = (Path(folder) / "texts.txt").read_text().splitlines()
    texts = [line.lower() for line in lines if 90 < len(line) < 130][:16]
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    generator = ContrastiveGenerator(model, transformers.AutoTokenizer.from_pretrained(folder))
    return {"16 texts": timed(lambda: generator(texts, max_length=new, top_k=3, penalty_alpha=0.5))}


def trial(model, _: str, new: int) -> dict:
    import torch

    from simctg_fast import ContrastiveSearch

    model = copy.deepcopy(model)  # nothing is known of it
    ids = torch.randint(1, model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(1))
    search = ContrastiveSearch(0.6, 4)
    return {
        "first call, 2 tokens": timed(lambda: model.generate(ids, custom_generate=search, max_new_tokens=2).tolist())
    }


def worker(root: Path, threads: int, model_name: str, dtype: str) -> None:
    """Reads one JSON request a line, answers one JSON line."""
    import torch
    import transformers

    import simctg_fast

    assert Path(simctg_fast.__file__).is_relative_to(root), simctg_fast.__file__
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    model = make_model(model_name, dtype)
    print(json.dumps({"ready": transformers.__version__, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        run = {"decode": decode, "engine": engine, "plain": plain, "text": text, "trial": trial}[request["kind"]]
        with torch.inference_mode():
            print(json.dumps(run(model, request["what"], request["new"])), flush=True)


# ---- the comparison --------------------------------------------------------------------------------------------------


def lengths(answer: object) -> object:
    """An answer without its numbers: what those of two dtypes have in common."""
    return [lengths(part) for part in answer] if isinstance(answer, list) else None


def compare(case: str, what: str, workers: dict[str, Worker], options: argparse.Namespace) -> bool:
    """Prints a row for each thing that the case times. Whether all reach the goal."""
    kind = case.partition(":")[0]
    best: dict[str, dict[str, list[float]]] = {name: {} for name in workers}
    answers: dict[str, list] = {}
    differ = set()
    mixed = options.dtype != options.dtype_before
    for _ in range(options.repeats + 1):  # the first one warms up
        for name, process in workers.items():
            for row, (seconds, answer) in process.ask(kind=kind, what=what, new=options.new_tokens).items():
                known = best[name].get(row, seconds)
                best[name][row] = [min(pair) for pair in zip(seconds, known, strict=True)]
                answer = lengths(answer) if mixed else answer
                if answers.setdefault(row, answer) != answer:
                    differ.add(row)
    reached = not differ
    for row in best["after"]:
        if row in differ:
            print(f"{case:14}{row:34} NOT REPORTED: the answers differ")
            continue
        before, after = (sum(best[name][row]) for name in ("before", "after"))
        reached &= mixed or before / after >= GOAL
        unit = 1e3 / len(best["after"][row])
        print(f"{case:14}{row:34}{before * unit:10.2f}{after * unit:10.2f} ms{before / after:8.3f}", flush=True)
    return reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout, with its extension built in place")
    parser.add_argument("--cases", nargs="*", default=CASES.split())
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--model", default="gpt2-small", choices=tuple(MODELS))
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--dtype-before", choices=DTYPES, help="of the other checkout; by default the same")
    parser.add_argument("--tiny", action="store_true", help="tiny models: does it run at all?")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.before, options.threads, options.model, options.dtype)
        return
    options.dtype_before = options.dtype_before or options.dtype
    from habits import make_folder

    roots = {"before": options.before.resolve(), "after": ROOT}
    dtypes = {"before": options.dtype_before, "after": options.dtype}
    model = "tiny" if options.tiny else options.model
    with tempfile.TemporaryDirectory() as folder:
        if "text" in options.cases:
            make_folder(Path(folder), "tiny" if options.tiny else "small")
        workers = {
            name: Worker(
                sys.executable, __file__, root, "--worker", "--threads", options.threads, "--model", model,
                "--dtype", dtypes[name], threads=options.threads, root=root,
            )
            for name, root in roots.items()
        }  # fmt: skip
        dtype, goal = options.dtype, f"before / after ≥ {GOAL}"
        if options.dtype_before != dtype:
            dtype, goal = f"{options.dtype_before} before and {dtype} after", "tokens are not compared, lengths are"
        print(f"{processor()}, {options.threads} threads, {model}, {dtype}, {workers['after'].ready}; {goal}")
        print(f"{'case':14}{'row':34}{'before':>10}{'after':>10}   {'ratio':>8}")
        try:
            whats = {case: folder if case == "text" else case.partition(":")[2] for case in options.cases}
            reached = [compare(case, what, workers, options) for case, what in whats.items()]
        finally:
            for process in workers.values():
                process.close()
    sys.exit(0 if all(reached) else "a row is below the goal")


if __name__ == "__main__":
    main()
