"""Contrastive search against transformers 4.55.4's contrastive search and against greedy search: time and memory.

    python benchmarks/decode.py                      # the four cases of the README, GPT-2-small shape, random weights
    python benchmarks/decode.py --cases 1x32 --new-tokens 32 --repeats 2
    python benchmarks/decode.py --dtype bfloat16 --model smollm2 --cases 1x64,8x64
    python benchmarks/decode.py --strategy fsd,fsd-vec,guard,adaptive,center --cases 1x64,8x256 --no-oracle

Every provider lives in a worker process of its own; rounds go through all workers in turn. Reported is the time per
new token, prefill subtracted (a run with one new token), minimum over the rounds; the ratios are of these minima.
Tokens are compared first: where two that should agree do not, nothing is reported for the case. Greedy search need not
agree with transformers' where a row first differs at a near tie: both tokens are the best, by the model in float64,
within what its own modules' rounding does to a logit. Other strategies, asked for by `--strategy`, are compared with
themselves by the model's own modules and cache. In 16 bits, which 4.55.4 is not asked for, transformers' greedy
search in float32 is a second peer. `SIMCTG_FAST_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2` holds both
sides to AVX2.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import RESULTS, Row, Worker, append_csv, processor, quantiles, reset_peak_memory, resident_megabytes

ROOT = Path(__file__).resolve().parent.parent
CASES = "1x32,1x512,8x256,8x768"
# (faster than 4.55.4's contrastive search, time over transformers 5's greedy): what this benchmark is to reach
GOALS = {"1x32": (1.9, 1.05), "1x512": (2.5, 0.95), "8x256": (3.5, 0.85), "8x768": (6.0, 0.75)}
HALF_GOALS = {"1x64": (0.5, 0.6), "8x64": (0.75, 0.9)}  # time over its greedy with AVX-512, over the faster with AVX2
DTYPES = ("float32", "bfloat16", "float16")
STRATEGIES = ("fsd", "fsd-vec", "guard", "adaptive", "center")
OURS = ("contrastive packed", "contrastive unpacked", "greedy packed", "greedy unpacked")
GREEDY_FLOAT32 = "transformers greedy float32"
MODELS = {
    "gpt2-small": {},
    "smollm2": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 500},
}


# ---- worker: runs in either environment ------------------------------------------------------------------------------


def make_model(name: str, dtype: str = "float32"):
    """Random weights, wide enough that greedy search does not repeat one token. 30 layers as wide as GPT-2's would make
    more of bfloat16's rounding than there is between two tokens."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    common = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0, **MODELS[name]}
    if name == "smollm2":
        kind, config = LlamaForCausalLM, LlamaConfig(initializer_range=0.04, **common)
    else:
        kind, config = GPT2LMHeadModel, GPT2Config(n_positions=1024, initializer_range=0.1, **common)
    # eager, the oracle's own default for contrastive search, is slower than sdpa on both sides: take the faster
    config._attn_implementation = "sdpa"
    return kind(config).eval().to(getattr(torch, dtype))


def near_ties(model, prefixes: list[list[int]], pairs: list[list[int]]) -> list[tuple[bool, str]]:
    """Whether two tokens that were chosen after each prefix are both the best within rounding, and by what numbers."""
    import torch

    exact, found = copy.deepcopy(model).double(), []
    for prefix, pair in zip(prefixes, pairs, strict=True):
        ids = torch.tensor([prefix])
        logits, truth = (one(ids).logits[0, -1].double() for one in (model, exact))
        rounding, behind = (logits - truth).abs().max(), truth.max() - truth[pair].min()
        near = bool(behind <= 2 * rounding)
        text = f"{behind:.1e} behind float64's best, rounding is {rounding:.1e}"
        found.append((near, f"{'a near tie' if near else 'WRONG'}: {text}"))
    return found


def worker(model_name: str, dtype: str, threads: int) -> None:
    """Reads one JSON request a line, answers one JSON line."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    model = make_model(model_name, dtype)
    print(json.dumps({"ready": transformers.__version__, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        generator = torch.Generator().manual_seed(1)
        shape = (request["batch"], request["prompt"])
        ids = torch.randint(1, model.config.vocab_size, shape, generator=generator)
        if "judge" in request:
            prefixes = [ids[row].tolist() + new for row, new, _ in request["judge"]]
            with torch.inference_mode():
                verdicts = near_ties(model, prefixes, [pair for *_, pair in request["judge"]])
            print(json.dumps({"verdicts": verdicts}), flush=True)
            continue
        arguments = provider_arguments(request["provider"], request["top_k"], request["penalty_alpha"])
        arguments |= {"max_new_tokens": request["new_tokens"], "do_sample": False, "pad_token_id": 0}
        arguments["attention_mask"] = torch.ones_like(ids)
        reset_peak_memory()
        before, _ = resident_megabytes()
        cpu, start = time.process_time(), time.perf_counter()
        with torch.inference_mode():
            out = model.generate(ids, **arguments)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        _, peak = resident_megabytes()
        answer = {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak - before}
        if request.get("tokens"):
            answer["tokens"] = out[:, request["prompt"] :].tolist()
        print(json.dumps(answer), flush=True)


def provider_arguments(provider: str, top_k: int, penalty_alpha: float) -> dict:
    if provider in ("transformers greedy", GREEDY_FLOAT32):
        return {}
    if provider == "4.55.4 contrastive":
        return {"penalty_alpha": penalty_alpha, "top_k": top_k}
    from simctg_fast import FSD, GUARD, AdaptiveContrastiveSearch, ContrastiveSearch

    name, _, how = provider.partition(", ")
    if name in STRATEGIES:
        own = {"path": "reorder", "fast_linear": False} if how else {"pack": False}
        searches = {
            "fsd": lambda: FSD(**own),
            "fsd-vec": lambda: FSD("vector", **own),
            "guard": lambda: GUARD(sample=False, **own),
            "adaptive": lambda: AdaptiveContrastiveSearch(**own),
            "center": lambda: ContrastiveSearch(penalty_alpha, top_k, center=True, **own),
        }
        return {"custom_generate": searches[name]()}
    if provider.startswith("k = "):
        return {"custom_generate": ContrastiveSearch(penalty_alpha, int(provider[4:]), pack=False)}
    kind, packing = provider.split()
    k = {"contrastive": top_k, "greedy": 1}[kind]
    return {"custom_generate": ContrastiveSearch(penalty_alpha, k, pack={"packed": True, "unpacked": False}[packing])}


# ---- the comparison --------------------------------------------------------------------------------------------------


def first_differences(found: list[list[int]], expected: list[list[int]]) -> list[tuple[int, list[int], list[int]]]:
    """Of rows that differ the number, the tokens before, and the two that differ first."""
    apart = []
    for row, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for place, pair in enumerate(zip(ours, theirs, strict=True)):
            if pair[0] != pair[1]:
                apart.append((row, theirs[:place], list(pair)))
                break
    return apart


def measure_case(case: str, options: argparse.Namespace, oracle: str | None) -> list[Row]:
    batch, prompt = map(int, case.split("x"))
    settings = {"batch": batch, "prompt": prompt, "top_k": options.top_k, "penalty_alpha": options.penalty_alpha}
    providers = [*OURS, "transformers greedy"]
    providers += ["4.55.4 contrastive"] if oracle else []
    providers += options.strategy
    providers += [] if options.dtype == "float32" else [GREEDY_FLOAT32]
    workers = {}
    for name in providers:
        python = oracle if name == "4.55.4 contrastive" else sys.executable
        dtype = "float32" if name == GREEDY_FLOAT32 else options.dtype
        arguments = ("--worker", "--model", options.model, "--dtype", dtype, "--threads", options.threads)
        workers[name] = Worker(python, __file__, *arguments, threads=options.threads)
    try:
        # Memory first: a fresh process each, one run.
        peaks, tokens = {}, {}
        for name, process in workers.items():
            answer = process.ask(provider=name, new_tokens=options.new_tokens, tokens=True, **settings)
            peaks[name], tokens[name] = answer["peak_mb"], answer["tokens"]
        checks = [("contrastive packed", "contrastive unpacked"), ("greedy packed", "transformers greedy")]
        if oracle:
            checks.append(("4.55.4 contrastive", "contrastive unpacked"))
        for name in set(options.strategy) & set(STRATEGIES):
            own = f"{name}, own modules"
            tokens[own] = workers[name].ask(provider=own, new_tokens=options.new_tokens, tokens=True, **settings)[
                "tokens"
            ]
            checks.append((name, own))
        for one, other in checks:
            apart = first_differences(tokens[one], tokens[other])
            verdicts = [(False, "WRONG: they must be equal")] * len(apart)
            if apart and other == "transformers greedy":
                verdicts = workers[other].ask(judge=apart, **settings)["verdicts"]
            for (row, before, pair), (_, text) in zip(apart, verdicts, strict=True):
                print(f"{case}: {one} and {other}, row {row}, new token {len(before)}: {pair}, {text}")
            if not all(near for near, _ in verdicts):
                print(f"{case}: NOT REPORTED")
                return []
        seconds = {name: ([], []) for name in providers}
        for round_ in range(options.repeats):
            for name, process in workers.items():
                for which, count in enumerate((1, options.new_tokens)):
                    seconds[name][which].append(process.ask(provider=name, new_tokens=count, **settings)["seconds"])
            print(f"  {case}: round {round_ + 1} of {options.repeats}", file=sys.stderr)
    finally:
        for process in workers.values():
            process.close()
    rows, best = [], {}
    for name, (one, many) in seconds.items():
        milliseconds = [(m - min(one)) * 1e3 / (options.new_tokens - 1) for m in many]
        best[name] = min(milliseconds)
        version = json.dumps(workers[name].ready)
        common = {"kernel": "decode", "provider": name, "mode": "decode", "x_name": "batch x prompt", "x_value": case}
        common |= {
            "config": json.dumps(
                {
                    n: getattr(options, n)
                    for n in ("model", "dtype", "top_k", "penalty_alpha", "new_tokens", "threads", "repeats")
                }
            ),
            "gpu": processor(),
            "version": version,
        }
        rows.append(Row(metric="ms_per_token", p20=0, p50=0, p80=0, **common))
        rows[-1].p20, rows[-1].p50, rows[-1].p80 = quantiles(milliseconds)
        rows.append(Row(metric="peak_mb", p20=peaks[name], p50=peaks[name], p80=peaks[name], **common))
    print_case(case, best, peaks)
    return rows


def print_case(case: str, best: dict[str, float], peaks: dict[str, float]) -> None:
    half = GREEDY_FLOAT32 in best
    goals, text = GOALS, "≥ {}x 4.55.4, ≤ {} of greedy"
    if half:
        goals, text = HALF_GOALS, "≤ {} of greedy with AVX-512, ≤ {} of the faster greedy with AVX2"
    print(f"\n{case} (batch x prompt)" + (f"   goals: {text.format(*goals[case])}" if case in goals else ""))
    first = "/ faster" if half else "4.55.4 /"
    print(f"  {'provider':28}{'ms/token':>10}{first:>10}{'/ greedy 5':>12}{'/ our greedy':>14}{'peak +MB':>10}")
    for name, milliseconds in best.items():
        peer = best.get("4.55.4 contrastive", float("nan")) / milliseconds
        if half:
            peer = milliseconds / min(best["transformers greedy"], best[GREEDY_FLOAT32])
        greedy = milliseconds / best["transformers greedy"]
        packing = name.split()[-1] if name in OURS else "unpacked"
        own = milliseconds / best[f"greedy {packing}"]
        print(f"  {name:28}{milliseconds:10.2f}{peer:9.2f}x{greedy:12.2f}{own:14.2f}{peaks[name]:10.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help="batch x prompt, comma-separated")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--penalty-alpha", type=float, default=0.6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--model", default="gpt2-small", choices=tuple(MODELS))
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument(
        "--strategy",
        type=lambda names: names.split(","),
        default=[],
        help=f"beside them, comma-separated: {', '.join(STRATEGIES)}, or 'k = 10' (contrastive search of so many)",
    )
    parser.add_argument("--no-oracle", action="store_true", help="leave transformers 4.55.4 out")
    parser.add_argument("--csv", type=Path, default=RESULTS / "decode.csv")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [name for name in options.strategy if name not in STRATEGIES and not name.startswith("k = ")]
    if unknown:
        parser.error(f"--strategy is {unknown[0]!r}, must be of {', '.join(STRATEGIES)}, or 'k = 10'")
    if options.worker:
        worker(options.model, options.dtype, options.threads)
        return
    from parity_zoo.environment import oracle_python  # not at the top: the oracle's worker runs this file too

    oracle = None if options.no_oracle or options.dtype != "float32" else oracle_python()
    print(
        f"{processor()}, {options.threads} threads, {options.model}, {options.dtype}, k = {options.top_k}, "
        f"{options.new_tokens} new tokens"
    )
    for case in options.cases.split(","):
        append_csv(options.csv, measure_case(case, options, oracle))


if __name__ == "__main__":
    main()
