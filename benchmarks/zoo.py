"""Every generating class of the installed transformers, small, through contrastive search, judged step by step.

    python benchmarks/zoo.py --jobs 2                # everything; results/zoo_<version>.jsonl, where it goes on from
    python benchmarks/zoo.py --only 'Gemma|T5'       # these classes
    python benchmarks/zoo.py --ci                    # some forty that cover every kind; exit status 1 on a fault
    python benchmarks/zoo.py --write                 # the table, benchmarks/zoo.md, from the results

The judge (`zoo_sweep/judge.py`) is transformers' own step in float64. "agrees": each of our tokens is the best by it, or
as good up to rounding, on every path that opens. "refused": we raise ValueError and say why. "not reached": our generic
inputs do not get through transformers' own greedy search. "rough": float32 itself is too far from float64 to tell.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

LIMIT = 600  # seconds a class
MEMORY = 12 << 30
HERE = Path(__file__).resolve().parent

# One or two of each kind, none of them slow.
CI = (
    *(
        "GPT2LMHeadModel",
        "LlamaForCausalLM",
        "OPTForCausalLM",
        "BloomForCausalLM",
        "GPTNeoForCausalLM",
        "FalconForCausalLM",
    ),
    *("MptForCausalLM", "BertLMHeadModel", "XLMWithLMHeadModel", "BioGptForCausalLM", "GPTNeoXJapaneseForCausalLM"),
    *("MistralForCausalLM", "Gemma2ForCausalLM", "Gemma3nForCausalLM", "GptOssForCausalLM", "DogeForCausalLM"),
    *("Cohere2ForCausalLM", "Llama4ForCausalLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM", "Qwen2MoeForCausalLM"),
    *("MambaForCausalLM", "Mamba2ForCausalLM", "JambaForCausalLM", "Qwen3NextForCausalLM", "Lfm2ForCausalLM"),
    *("RwkvForCausalLM", "RecurrentGemmaForCausalLM", "BartForConditionalGeneration", "T5ForConditionalGeneration"),
    *(
        "MarianMTModel",
        "T5GemmaForConditionalGeneration",
        "FSMTForConditionalGeneration",
        "LEDForConditionalGeneration",
    ),
    *("ProphetNetForConditionalGeneration", "BartForCausalLM", "WhisperForConditionalGeneration"),
    *("Speech2TextForConditionalGeneration", "LlavaForConditionalGeneration", "BlipForConditionalGeneration"),
    *("PaliGemmaForConditionalGeneration", "Qwen2VLForConditionalGeneration", "GitForCausalLM"),
)


def _child(name: str, pipe) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    from zoo_sweep.run import one_class

    pipe.send(one_class(name))
    pipe.close()


def sweep(names: list[str], jobs: int, done):
    """``done(record)`` for every class, each in a process of its own that was forked from this one."""
    import torch
    import transformers
    from zoo_sweep import classes, run  # noqa: F401  imported before the fork, once for all

    import simctg_fast.decoding  # noqa: F401

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, theirs), daemon=True)
            process.start()
            theirs.close()
            running[name] = (process, ours, time.monotonic())
        multiprocessing.connection.wait([pipe for _, pipe, _ in running.values()], timeout=1.0)
        for name, (process, pipe, began) in list(running.items()):
            record = None
            if pipe.poll():
                try:
                    record = pipe.recv()
                except EOFError:
                    process.join()
                    record = _lost(classes, name, f"the process ended with {process.exitcode}")
            elif time.monotonic() - began > LIMIT:
                process.kill()
                record = _lost(classes, name, f"not finished after {LIMIT} s")
            if record is not None:
                process.join()
                pipe.close()
                del running[name]
                done(record)


def _lost(classes, name: str, what: str) -> dict:
    folder = classes.generating_classes()[name][1]
    return {"class": name, "architecture": folder, "status": "fault", "path": "", "reason": what, "faults": [what]}


def table(records: list[dict], version: str) -> str:
    """The Markdown page."""
    counts: dict[str, int] = {}
    for record in records:
        counts[record["status"]] = counts.get(record["status"], 0) + 1
    lines = [
        "# Architectures",
        "",
        f"Every generating class of transformers {version}, small and with random weights, decoded by `ContrastiveSearch` and",
        "judged by transformers' own step in float64 (`python benchmarks/zoo.py --jobs 2`, then `--write`). One row and two",
        'padded ones; text, images and sound where generic inputs reach the class. "own differs": the class itself computes',
        "something else with its cache than without; the cached step is what `generate` means, and is what counts.",
        "",
        ", ".join(f"{count} {status}" for status, count in sorted(counts.items(), key=lambda item: -item[1])) + ".",
        "",
        "| architecture | class | inputs | path | verdict | reason |",
        "|---|---|---|---|---|---|",
    ]
    for record in sorted(records, key=lambda r: (r["architecture"], r["class"])):
        if record["status"] == "does not generate":
            continue
        reached = [name for name, case in record.get("cases", {}).items() if case["status"] != "not reached"]
        kinds = ", ".join(dict.fromkeys(name.split()[0] for name in reached))
        reason = "; ".join(record["faults"]) if record["status"] == "fault" else record["reason"]
        if record.get("own_differs"):
            reason = f"own differs; {reason}"
        reason = reason.replace("|", "\\|").replace("<", "&lt;")
        reason = reason if len(reason) <= 220 else reason[:217] + "…"
        lines.append(
            f"| {record['architecture']} | {record['class']} | {kinds} | {record['path']} | {record['status']} | {reason} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="classes whose name this regular expression finds")
    parser.add_argument("--ci", action="store_true", help="some forty classes that cover every kind")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="do not go on from earlier results")
    parser.add_argument("--output", type=Path, help="results, a JSON line a class")
    parser.add_argument("--write", action="store_true", help="write benchmarks/zoo.md from the results")
    options = parser.parse_args(arguments)
    import transformers
    from zoo_sweep.classes import generating_classes

    output = options.output or HERE / "results" / f"zoo_{transformers.__version__}.jsonl"
    names = [name for name in generating_classes() if not options.only or re.search(options.only, name)]
    if options.ci:
        names = [name for name in CI if name in names]
    keep = not options.ci or options.output is not None
    known: dict[str, dict] = {}
    if output.exists() and not options.ci:
        known = {r["class"]: r for line in output.read_text().splitlines() if (r := json.loads(line))}
    began, fresh = time.monotonic(), []

    def done(record: dict) -> None:
        fresh.append(record)
        line = f"{record['class']}: {record['status']} {record['path']}"
        print(line, *[f"\n    {fault}" for fault in record["faults"]], sep="", flush=True)
        if keep:
            with output.open("a") as file:
                file.write(json.dumps(record) + "\n")

    if not options.write or options.only or not known:
        sweep([n for n in names if options.again or options.only or n not in known], options.jobs, done)
    known |= {record["class"]: record for record in fresh}
    faulty = [record["class"] for record in fresh if record["status"] == "fault"]
    print(f"{len(fresh)} classes in {time.monotonic() - began:.0f} s, {len(faulty)} with faults: {' '.join(faulty)}")
    if options.write:
        output.write_text("".join(json.dumps(known[name]) + "\n" for name in sorted(known)))
        (HERE / "zoo.md").write_text(table(list(known.values()), transformers.__version__))
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
