"""Every generating class of the installed transformers, small, through contrastive search, judged step by step.

    python benchmarks/zoo.py --jobs 2                # everything; results/zoo_<version>.jsonl, where it goes on from
    python benchmarks/zoo.py --only 'Gemma|T5'       # these classes
    python benchmarks/zoo.py --ci                    # some forty that cover every kind; exit status 1 on a fault
    python benchmarks/zoo.py --dtype bfloat16        # results/zoo_<version>_bfloat16.jsonl; with --ci as well
    python benchmarks/zoo.py --strategy fsd,guard    # decoders of text by these instead: zoo_strategies_<version>.jsonl
    python benchmarks/zoo.py --rounding --dtype bfloat16  # logits alone, of many texts: zoo_rounding_<version>_….jsonl
    python benchmarks/zoo.py --write                 # the table, docs/zoo.md, from the results of each type

The judge (`zoo_sweep/judge.py`) is transformers' own step in float64. "agrees": each of our tokens is the best by it,
or as good up to rounding, on every path that opens. "refused": we raise ValueError and say why. "not reached": our
generic inputs do not get through transformers' own greedy search. "rough": float32 itself is too far from float64 to
tell. In 16 bits float64 begins with the same weights, and what the model's own modules round away, drawn a few times,
is the measure (`zoo_sweep/rounding.py`); a path that opens in float32 has to be as close even where its trial refuses.
`--rounding` measures how close, by the root mean square over many positions (`zoo_sweep/logit_errors.py`); a class that
is above what is allowed is no fault of the run.
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
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

LIMIT = 600  # seconds a class
MEMORY = 12 << 30
HERE = Path(__file__).resolve().parent
DTYPES = ("float32", "bfloat16", "float16")
JUDGED = ("agrees", "refused", "rough", "fault")

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


def _child(one_class, name: str, pipe) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    pipe.send(one_class(name))
    pipe.close()


def sweep(
    names: list[str],
    jobs: int,
    done,
    dtype: str = "float32",
    by: tuple[str, ...] = (),
    rounding: bool = False,
):
    """``done(record)`` for every class, each in a process of its own that was forked from this one; ``by``: of these
    strategies; ``rounding``: of its logits alone."""
    import torch
    import transformers
    from zoo_sweep import classes, logit_errors, run, strategies  # imported before the fork, once for all

    import simctg_fast.decoding  # noqa: F401

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)

    def one_class(name: str) -> dict:
        if by:
            return strategies.one_class(name, by)
        return (logit_errors if rounding else run).one_class(name, getattr(torch, dtype))

    context = multiprocessing.get_context("fork")
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(one_class, name, theirs), daemon=True)
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


def table(
    records: list[dict],
    version: str,
    narrow: dict[str, list[dict]] | None = None,
    rounding: dict[str, list[dict]] | None = None,
) -> str:
    """The Markdown page; ``narrow``: records of other types, by their names; ``rounding``: those of ``--rounding``."""
    records = sorted(records, key=lambda r: (r["architecture"], r["class"]))
    by_status: dict[str, list[dict]] = {}
    for record in records:
        by_status.setdefault(record["status"], []).append(record)
    decoded = [record for status in JUDGED for record in by_status.get(status, [])]
    counts = [f"{len(by_status[status])} {status}" for status in JUDGED if status in by_status]
    paths = Counter(path for record in decoded for path in record["path"].split(", ") if path != "none")
    engine = Counter(record["engine"]["batching"] for record in decoded if record.get("engine", {}).get("batching"))
    lines = [
        "# Architectures",
        "",
        f"Every generating class of transformers {version}, small and with random weights, decoded by",
        "`ContrastiveSearch` and judged by transformers' own step in float64 (`python benchmarks/zoo.py`, then",
        "`--write`). One row and two padded ones; text, images and sound where generic inputs reach the class. Windows",
        "are of 4 positions, layers of each kind there is. **agrees**: every token is the best there, or as good up to",
        "rounding, on each path that opens. **refused**: a `ValueError` says why. **rough**: float32 itself is too far",
        "from float64 to tell. *own differs*: the class itself computes something else with its cache than without, by",
        "so much of its logits; the cached step is what `generate` means, and is what counts. *engine*: how prompts of",
        "13, 4 and 9 tokens were batched, two at a time, each of which must get what `generate` gives it alone.",
        "",
        f"{len(decoded)} classes: {', '.join(counts)}. Paths: {_counted(paths)}. Engine: {_counted(engine)}.",
        "",
        "| architecture | classes | inputs | path | engine | verdict | reason |",
        "|---|---|---|---|---|---|---|",
    ]
    rows: dict[tuple[str, ...], list[str]] = {}
    for record in sorted(decoded, key=lambda r: (r["architecture"], r["class"])):
        reached = [name for name, case in record.get("cases", {}).items() if case["status"] != "not reached"]
        kinds = ", ".join(dict.fromkeys(name.split()[0] for name in reached))
        batching = record.get("engine", {}).get("batching", "")
        cells = (record["architecture"], kinds, record["path"], batching, record["status"], _why(record))
        rows.setdefault(cells, []).append(record["class"])
    for (architecture, *cells), names in rows.items():
        lines.append(f"| {' | '.join([architecture, ', '.join(names), *cells])} |")
    lines += in_16_bits(narrow) if narrow else []
    lines += of_the_modules_error(rounding) if rounding else []
    if "own loop" in by_status:
        names = ", ".join(record["class"] for record in by_status["own loop"])
        lines += [
            "",
            "## A loop of their own",
            "",
            "Their `generate` never comes to that of transformers:",
            names + ".",
        ]
    rest = [record for record in records if record["status"] in ("not built", "not reached")]
    if rest:
        lines += ["", "## Not judged", ""]
        lines += ["What the generic sizes and inputs of the sweep do not fit; nothing is said about them.", ""]
        lines += ["| architecture | class | how far | what was raised |", "|---|---|---|---|"]
        lines += [f"| {r['architecture']} | {r['class']} | {r['status']} | {_cut(r['reason'])} |" for r in rest]
    return "\n".join(lines) + "\n"


def in_16_bits(results: dict[str, list[dict]]) -> list[str]:
    """The page's section on types of 16 bits: counts of each, and the classes that do not agree in one of them."""
    lines = [
        "",
        "## 16 bits",
        "",
        "The same with `--dtype bfloat16` and `float16`, weights drawn smaller, judged in float64 from what the type",
        "makes of them: no further from it than twice what the class's own modules are on the same text. **rough**:",
        "these are too far themselves (experts, or keys of a sparse attention, chosen otherwise; an overflow).",
        "",
    ]
    rows = []
    for dtype, records in results.items():
        counts = Counter(record["status"] for record in records if record["status"] in JUDGED)
        lines.append(f"* {dtype}: {', '.join(f'{counts[status]} {status}' for status in JUDGED if counts[status])}.")
        for record in sorted(records, key=lambda r: (r["architecture"], r["class"])):
            if record["status"] in JUDGED[1:]:
                cells = (record["class"], dtype, record["path"], record["status"], _why(record))
                rows.append(f"| {' | '.join(cells)} |")
    head = ["", "| class | type | path | verdict | reason |", "|---|---|---|---|---|"]
    return [*lines, *head, *rows] if rows else lines


def of_the_modules_error(results: dict[str, list[dict]]) -> list[str]:
    """The page's section on how close logits of 16 bits are, with the classes that are above what is allowed."""
    from zoo_sweep.logit_errors import ALLOWED

    lines = [
        "",
        "### Logits of 16 bits",
        "",
        "How far they are from float64 with the same weights (`--rounding`): the root mean square over some 270",
        "positions for each of three draws of the weights (fewer where a call is refused), divided by that of the",
        "class's own modules, which decode the same tokens in the same type; twelve draws where three give more than",
        "1.05. Where the modules' error is that of a few positions (an expert, or keys of a sparse attention, chosen",
        "otherwise), such a ratio is chance: there that of the medians counts, and that no more texts go astray than",
        "would by chance.",
        "",
    ]
    rows = []
    for dtype, records in results.items():
        cases = {record["class"]: _measured(record) for record in records}
        cases = {name: found for name, found in cases.items() if found}
        worst = {name: max(case["ratio"] for case in found.values()) for name, found in cases.items()}
        above = [name for name, found in cases.items() if any(case["status"] == "above" for case in found.values())]
        medians = [name for name in cases if worst[name] > ALLOWED and name not in above]
        same = [name for name, found in cases.items() if all(case["status"] == "same" for case in found.values())]
        refused = [record["class"] for record in records if record["status"] == "refused"]
        astray = [case["far"] for found in cases.values() for case in found.values() if case["heavy"]]
        ours, own = (sum(each) for each in zip(*astray, strict=True)) if astray else (0, 0)
        lines.append(
            f"* {dtype}: of {len(cases)} classes {len(cases) - len(above) - len(medians)} are at most {ALLOWED} "
            f"({len(same)} with the modules' own bits; half at most "
            f"{sorted(worst.values())[len(worst) // 2]:.2f}), {len(medians)} by their medians, {len(above)} above. "
            f"{len(refused)} refused. Texts that went astray: {ours}, by the modules {own}."
        )
        for name in sorted({*above, *medians}):
            for kind, case in cases[name].items():
                if case["status"] == "above" or case["ratio"] > ALLOWED:
                    numbers = f"{case['ratio']:.3f} | {case['low']:.2f} to {case['high']:.2f} | {case['typical']:.3f}"
                    texts = " to ".join(map(str, case["far"])) if case["heavy"] else ""
                    why = "a few positions are all of the modules' error" if case["heavy"] else ""
                    rows.append(f"| {name} | {dtype} | {kind} | {numbers} | {texts} | {case['status']} | {why} |")
    head = [
        "",
        "| class | type | inputs | ratio | 95 of 100 draws | of medians | texts astray | verdict | reason |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return [*lines, *head, *rows] if rows else lines


def _measured(record: dict) -> dict[str, dict]:
    return {kind: case for kind, case in record["cases"].items() if "ratio" in case}


def _counted(counts: Counter) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def _why(record: dict) -> str:
    """Why it is no better than it is; empty where there is nothing to say."""
    parts = list(record["faults"])
    refused = {n: c["reason"] for n, c in record.get("cases", {}).items() if c["path"] == "none" and c["reason"]}
    for name, reason in list(refused.items())[:1]:
        reason = re.sub(r"^\w*Error: |^\w+ cannot be decoded by contrastive search: ", "", reason)
        parts.append(reason if len(refused) == len(record["cases"]) else f"{name}: {reason}")
    if not parts:
        parts += [part for part in record["reason"].split("; ") if part.startswith("not ")]
    if not parts and record.get("engine", {}).get("batching") == "static":
        parts.append(f"not slots: {record['engine']['reason']}")
    own = record.get("own_differs", [])
    numbers = [float(value) for value in own if ":" not in value]
    if numbers:
        parts.append(f"own differs by {max(numbers):.2g}")
    elif own:
        parts.append(f"own differs: {own[0]}")
    parts += dict.fromkeys(case["note"] for case in record.get("cases", {}).values() if case.get("note"))
    return "; ".join(_cut(part) for part in parts)


def _cut(text: str, limit: int = 160) -> str:
    """At most so long, cut between words, and safe in a cell."""
    text = " ".join(text.split())
    if len(text) > limit:
        text = text[: limit - 2].rsplit(" ", 1)[0].rstrip(",;:") + " …"
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _read(path: Path) -> dict[str, dict]:
    """Records by class, the last of each."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["class"]: record for record in map(json.loads, lines)}


def main(arguments: list[str] | None = None) -> int:
    from zoo_sweep.strategies import NAMES, summary

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="classes whose name this regular expression finds")
    parser.add_argument("--ci", action="store_true", help="some forty classes that cover every kind")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="16 bits: judged by the same weights")
    parser.add_argument("--strategy", default="contrastive", help=f"instead: some of {', '.join(NAMES)}, by commas")
    parser.add_argument("--rounding", action="store_true", help="how close logits of 16 bits are, over many positions")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="do not go on from earlier results")
    parser.add_argument("--output", type=Path, help="results, a JSON line a class")
    parser.add_argument("--write", action="store_true", help="write the page from the results")
    parser.add_argument("--page", type=Path, help="the page, instead of docs/zoo.md; may be of some classes")
    options = parser.parse_args(arguments)
    if options.write and options.dtype != "float32":
        parser.error("the page is written from float32's results")
    if options.rounding and (options.dtype == "float32" or options.write):
        parser.error("--rounding is of 16 bits (--dtype), and only kept for the page")
    if options.ci and options.write:
        parser.error("--ci keeps no results to write a page from")
    by = () if options.strategy == "contrastive" else tuple(options.strategy.split(","))
    if not set(by) <= set(NAMES):
        parser.error(f"--strategy is {options.strategy!r}, must be contrastive or some of {', '.join(NAMES)}")
    if by and (options.write or options.dtype != "float32"):
        parser.error("--strategy is of float32, and no part of the page")
    import transformers
    from zoo_sweep.classes import generating_classes

    kept = {
        dtype: HERE / "results" / f"zoo_{transformers.__version__}{'' if dtype == 'float32' else f'_{dtype}'}.jsonl"
        for dtype in DTYPES
    }
    kept_rounding = {
        dtype: HERE / "results" / f"zoo_rounding_{transformers.__version__}_{dtype}.jsonl" for dtype in DTYPES[1:]
    }
    output = options.output or (kept_rounding if options.rounding else kept)[options.dtype]
    if by and not options.output:
        output = HERE / "results" / f"zoo_strategies_{transformers.__version__}.jsonl"
    names = [name for name in generating_classes() if not options.only or re.search(options.only, name)]
    if options.ci:
        names = [name for name in CI if name in names]
    keep = not options.ci or options.output is not None
    known = {} if options.ci else _read(output)
    began, fresh = time.monotonic(), []

    def done(record: dict) -> None:
        fresh.append(record)
        line = f"{record['class']}: {record['status']} {record['path']}"
        line += "".join(f", {case['ratio']:.3f}" for case in record.get("cases", {}).values() if "ratio" in case)
        print(line, *[f"\n    {fault}" for fault in record["faults"]], sep="", flush=True)
        if keep:
            with output.open("a") as file:
                file.write(json.dumps(record) + "\n")

    if not options.write or options.only or not known:
        fresh_names = [n for n in names if options.again or options.only or n not in known]
        sweep(fresh_names, options.jobs, done, options.dtype, by, options.rounding)
    known |= {record["class"]: record for record in fresh}
    faulty = [record["class"] for record in fresh if record["status"] == "fault"]
    print(f"{len(fresh)} classes in {time.monotonic() - began:.0f} s, {len(faulty)} with faults: {' '.join(faulty)}")
    if by:
        print(summary(list(known.values())))
    if options.write:
        missing = generating_classes().keys() - known.keys()
        if missing and options.page is None:
            parser.error(f"{len(missing)} classes have no result yet, {min(missing)} for one: sweep them first")
        output.write_text("".join(json.dumps(known[name]) + "\n" for name in sorted(known)))
        narrow = {dtype: _read(kept[dtype]) for dtype in DTYPES[1:]}
        narrow = {dtype: list(found.values()) for dtype, found in narrow.items() if found.keys() >= known.keys()}
        rounding = {dtype: _read(path) for dtype, path in kept_rounding.items()}
        rounding = {dtype: list(found.values()) for dtype, found in rounding.items() if found.keys() >= known.keys()}
        page = table([known[name] for name in sorted(known)], transformers.__version__, narrow, rounding)
        (options.page or HERE.parent / "docs" / "zoo.md").write_text(page)
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
