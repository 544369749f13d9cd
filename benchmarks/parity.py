"""Token for token: the library's contrastive search against transformers 4.55.4's, and against an uncached reference.

    python benchmarks/parity.py                                    # everything, three seeds (make parity)
    python benchmarks/parity.py --architectures llama,t5 --cases padded,eos --seeds 1
    python benchmarks/parity.py --support                          # which path every model of the zoo takes
    python benchmarks/parity.py --write-golden                     # renew the tokens that the tests compare with

Both sides run the same tiny random models (`parity_zoo`) in float32 with eager attention; transformers 4.55.4 does so
in an environment of its own, made on first use. What it cannot do (soft caps, attention sinks, state-space models,
static caches, images, …) is compared with `simctg_fast.reference`, which recomputes everything in float64.

Where tokens differ, the reference says how close the choice was at the first token that does, in each row. A lead below
2e-6, of the best score over the next or of the last candidate over the first token that is none, is within the rounding
of float32: that run is a near tie, and counted. Exits with 1 on any other difference, and when a cell's tokens are too
few to show one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import parity_zoo as zoo
import torch
import transformers
from parity_zoo.environment import VERSION, oracle_python
from rich.console import Console
from rich.table import Table

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "data" / "oracle_tokens.json"
GOLDEN_CASES = "single,padded,eos,min_length,processors_eos,alpha_0.1,alpha_0.9,k=1,k=8,decoder_prompt,long"
CLOSE = 2e-6
# Golden tokens have to hold on any machine, with any kernel: their choices are clearer by far.
CLEAR = 5e-5
DISTINCT = 15
ALTERNATIVE_SEEDS = 8

# (architecture, seed) -> the cases to run on that model
Wanted = dict[tuple[str, int], list[zoo.Case]]

ORACLE = f"against transformers {VERSION}"
REFERENCE = "against the float64 reference"


@dataclass(frozen=True)
class Result:
    """One run: an architecture, a case and a seed."""

    table: str
    architecture: str
    case: str
    seed: int
    verdict: str  # identical, near tie or different
    distinct: int
    detail: str = ""


# ---- one run -------------------------------------------------------------------------------------------------------


def our_tokens(model: torch.nn.Module, name: str, case: zoo.Case, seed: int) -> list[list[int]]:
    return zoo.ours(model, name, case, seed).tolist()


def lead(found: list[int], expected: list[int], row: int, truth) -> float:
    """How clear the choice was where two rows part: the smaller of its two margins in float64.

    Infinite where it excuses nothing: the rows do not part but end, or the truth took another turn before.
    """
    place = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
    if place is None or place >= len(truth.steps) or truth.new_tokens()[row, :place].tolist() != expected[:place]:
        return float("inf")
    step = truth.steps[place]
    return min(float(step.score_margin[row]), float(step.candidate_margin[row]))


def judge(table: str, name: str, case: zoo.Case, seed: int, expected: list[list[int]], model, truth=None) -> Result:
    """Runs our side and compares; the float64 `truth` is asked, and made if need be, only where tokens differ."""
    distinct = len({token for row in expected for token in row})
    try:
        found = our_tokens(model, name, case, seed)
    except Exception as error:  # a crash of ours is a difference, and the other models are still to be compared
        return Result(table, name, case.name, seed, "different", distinct, f"{type(error).__name__}: {error}")
    if found == expected:
        return Result(table, name, case.name, seed, "identical", distinct)
    if truth is None:
        truth = zoo.reference(zoo.build(name, seed, torch.float64), name, case, seed)
    pairs = enumerate(zip(found, expected, strict=False))
    leads = {row: lead(*pair, row, truth) for row, pair in pairs if pair[0] != pair[1]}
    row, close = max(leads.items(), key=lambda item: item[1], default=(0, float("inf")))
    verdict = "near tie" if close < CLOSE else "different"
    detail = f"lead {close:.1e} where row {row} parts: ours {found[row]}, expected {expected[row]}"
    return Result(table, name, case.name, seed, verdict, distinct, detail)


# ---- the oracle's side ---------------------------------------------------------------------------------------------


def probe_inputs(entry: zoo.Architecture, seed: int) -> dict[str, torch.Tensor]:
    inputs = zoo.prompt_for(entry, zoo.CASES["single"], seed)
    if entry.is_encoder_decoder:
        inputs["decoder_input_ids"] = zoo.prompt_for(entry, zoo.CASES["decoder_prompt"], seed)["decoder_input_ids"][:1]
    return inputs


def lists(inputs: dict[str, torch.Tensor]) -> dict[str, list]:
    return {name: value.tolist() for name, value in inputs.items()}


def write_jobs(folder: Path, wanted: Wanted) -> None:
    """Weights and runs for the oracle. transformers 5 saves weights in the layout of the hub, which version 4 reads."""
    jobs = []
    for (name, seed), cases in wanted.items():
        entry, model = zoo.ARCHITECTURES[name], zoo.build(name, seed)
        model.save_pretrained(folder / f"{name}-{seed}")
        search = {case.name: {"penalty_alpha": case.penalty_alpha, "top_k": case.top_k} for case in cases}
        runs = [
            {
                "case": case.name,
                "inputs": lists(zoo.prompt_for(entry, case, seed)),
                "prompt_length": zoo.prompt_length(name, case),
                "arguments": {"do_sample": False} | search[case.name] | zoo.options_for(entry, case),
            }
            for case in cases
        ]
        special = ("pad_token_id", "bos_token_id", "decoder_start_token_id")
        jobs.append(
            {
                "name": name,
                "seed": seed,
                "folder": f"{name}-{seed}",
                "config_class": entry.config[0],
                "config": entry.config[1],
                "model_class": entry.model,
                "generation_config": {key: getattr(model.generation_config, key) for key in special},
                "probe": lists(probe_inputs(entry, seed)),
                "runs": runs,
            }
        )
    (folder / "jobs.json").write_text(json.dumps(jobs))


def oracle_lines(wanted: Wanted) -> Iterator[dict]:
    """What the oracle reports, run by run, while it goes on with the next ones."""
    python = oracle_python()
    script = Path(zoo.__file__).with_name("oracle.py")
    with tempfile.TemporaryDirectory(prefix="parity-") as folder, tempfile.TemporaryFile("w+") as errors:
        write_jobs(Path(folder), wanted)
        command = [python, str(script), folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder) as process:
            for line in process.stdout:
                yield json.loads(line)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"the oracle failed:\n{errors.read()[-4000:]}")


def same_model(line: dict, model: torch.nn.Module) -> None:
    """Raises unless both versions of transformers compute the same logits from the weights they share."""
    inputs = probe_inputs(zoo.ARCHITECTURES[line["model"]], line["seed"])
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0, -1]
    difference = float((logits - torch.tensor(line["logits"])).abs().max())
    if not difference < 1e-4:
        raise RuntimeError(
            f"{line['model']}, seed {line['seed']}: logits of transformers {VERSION} and {transformers.__version__} "
            f"differ by {difference:.1e} before any search: the two do not hold the same model"
        )


def against_oracle(wanted: Wanted, say: Callable[[str], None]) -> Iterator[Result]:
    model = None
    for line in oracle_lines(wanted):
        name, seed = line["model"], line["seed"]
        if "logits" in line:
            say(f"{name}, seed {seed}")
            model = zoo.build(name, seed)
            same_model(line, model)
        else:
            yield judge(ORACLE, name, zoo.CASES[line["case"]], seed, line["tokens"], model)


def against_reference(wanted: Wanted, say: Callable[[str], None]) -> Iterator[Result]:
    for (name, seed), cases in wanted.items():
        say(f"{name}, seed {seed}")
        model, exact = zoo.build(name, seed), zoo.build(name, seed, torch.float64)
        for case in cases:
            truth = zoo.reference(exact, name, case, seed)
            yield judge(REFERENCE, name, case, seed, truth.new_tokens().tolist(), model, truth)


# ---- what is printed -----------------------------------------------------------------------------------------------


def verdict_of_cell(results: list[Result]) -> str:
    """`3`: identical on three seeds; `2~1`: and one near tie; `✗`: different; `dull`: too few tokens to tell."""
    count = {verdict: sum(result.verdict == verdict for result in results) for verdict in ("identical", "near tie")}
    wrong = len(results) - count["identical"] - count["near tie"]
    if wrong:
        return f"[bold red]✗{wrong}[/]"
    if max(result.distinct for result in results) < DISTINCT:
        return "[bold red]dull[/]"
    return f"{count['identical']}" + (f"[yellow]~{count['near tie']}[/]" if count["near tie"] else "")


def print_table(console: Console, title: str, results: list[Result], cases: list[zoo.Case]) -> None:
    names = list(dict.fromkeys(result.architecture for result in results))
    columns = [case.name for case in cases if any(result.case == case.name for result in results)]
    table = Table(title=title, title_justify="left", show_lines=False, pad_edge=False)
    table.add_column("architecture", no_wrap=True)
    for column in columns:
        table.add_column(column.replace("processors", "proc.").replace("_", "\n"), justify="center")
    for name in names:
        cells = {
            case: [result for result in results if (result.architecture, result.case) == (name, case)]
            for case in columns
        }
        table.add_row(name, *(verdict_of_cell(cells[case]) if cells[case] else "" for case in columns))
    console.print(table)


def summary(console: Console, results: list[Result], seconds: float) -> bool:
    """Prints totals and every difference; whether all is well."""
    well = True
    for table in dict.fromkeys(result.table for result in results):
        ours = [result for result in results if result.table == table]
        count = {v: sum(result.verdict == v for result in ours) for v in ("identical", "near tie", "different")}
        console.print(
            f"{table}: {len(ours)} runs, {count['identical']} identical, {count['near tie']} near ties "
            f"(two best within {CLOSE:g}), {count['different']} different"
        )
        cells = {(result.architecture, result.case): 0 for result in ours}
        for result in ours:
            key = (result.architecture, result.case)
            cells[key] = max(cells[key], result.distinct)
        dull = [f"{name} {case} ({distinct})" for (name, case), distinct in cells.items() if distinct < DISTINCT]
        if dull:
            console.print(f"  fewer than {DISTINCT} distinct tokens: {', '.join(dull)}", style="red")
        well = well and not count["different"] and not dull
    for result in results:
        if result.verdict != "identical":
            style = "yellow" if result.verdict == "near tie" else "red"
            console.print(f"{result.verdict}: {result.architecture} {result.case} seed {result.seed}", style=style)
            console.print(f"  {result.detail}", markup=False)
    console.print(f"{seconds:.0f} s, torch {torch.__version__}, transformers {transformers.__version__}")
    return well


# ---- golden tokens and support -------------------------------------------------------------------------------------


def golden_runs(names: list[str], cases: list[zoo.Case]) -> Wanted:
    """For each architecture and case the first seed whose choices are all clear and whose tokens are many."""
    wanted: Wanted = {}
    for name in names:
        for case in (case for case in cases if case.suits(zoo.ARCHITECTURES[name])):
            for seed in range(ALTERNATIVE_SEEDS):
                truth = zoo.reference(zoo.build(name, seed, torch.float64), name, case, seed)
                distinct = len(set(truth.new_tokens().flatten().tolist()))
                if min(truth.score_margin, truth.candidate_margin) > CLEAR and distinct >= DISTINCT:
                    wanted.setdefault((name, seed), []).append(case)
                    break
            else:
                raise RuntimeError(f"{name} {case.name}: no seed below {ALTERNATIVE_SEEDS} makes a clear case")
    return wanted


def write_golden(console: Console, names: list[str], cases: list[zoo.Case]) -> None:
    """Tokens of the oracle, two hexadecimal digits each, one string a row."""
    tokens: dict[str, dict[str, dict]] = {name: {} for name in names}
    for line in oracle_lines(golden_runs(names, cases)):
        if "logits" in line:
            same_model(line, zoo.build(line["model"], line["seed"]))
        else:
            rows = [bytes(row).hex() for row in line["tokens"]]
            tokens[line["model"]][line["case"]] = {"seed": line["seed"], "rows": rows}
    GOLDEN.parent.mkdir(exist_ok=True)
    about = f"New tokens of transformers {VERSION}'s contrastive search on the models of benchmarks/parity_zoo"
    golden = {"about": about, "made_by": "python benchmarks/parity.py --write-golden", "tokens": tokens}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    console.print(f"{GOLDEN.relative_to(GOLDEN.parents[2])}: {sum(map(len, tokens.values()))} runs")


def print_support(console: Console, names: list[str]) -> None:
    from simctg_fast import support

    for name in names:
        entry = zoo.ARCHITECTURES[name]
        inputs = None
        if entry.kind in ("speech", "image-text"):
            case = zoo.CASES["padded"]
            inputs = zoo.prompt_for(entry, case, 0)
            if entry.kind == "image-text":
                inputs["suppress_tokens"] = zoo.options_for(entry, case)["suppress_tokens"]
        console.print(f"{name}: {support(zoo.build(name), inputs)}", highlight=False, markup=False, soft_wrap=True)


# ---- command line --------------------------------------------------------------------------------------------------


def chosen(text: str | None, known: dict, what: str) -> list[str]:
    if text is None:
        return list(known)
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"{what}: {', '.join(unknown)} not known; there are {', '.join(known)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", help="comma-separated, default all")
    parser.add_argument("--cases", help="comma-separated, default all")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, … of weights and prompts (default 3)")
    parser.add_argument("--json", type=Path, help="also write every result there")
    parser.add_argument("--support", action="store_true", help="print which path every model takes, and stop")
    parser.add_argument("--write-golden", action="store_true", help=f"renew {GOLDEN.name} of the tests, and stop")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds is {options.seeds}, has to be 1 or more")

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 170)
    names = chosen(options.architectures, zoo.ARCHITECTURES, "--architectures")
    with_oracle = [name for name in names if zoo.ARCHITECTURES[name].oracle]
    if options.support:
        print_support(console, names)
        return 0
    if options.write_golden:
        wanted = options.cases or GOLDEN_CASES
        write_golden(console, with_oracle, [zoo.CASES[case] for case in chosen(wanted, zoo.CASES, "--cases")])
        return 0

    cases = [zoo.CASES[case] for case in chosen(options.cases, zoo.CASES, "--cases")]
    rest = [name for name in names if name not in with_oracle]
    results: list[Result] = []
    start = time.monotonic()
    with console.status("") as status:
        for table, members, compare in ((ORACLE, with_oracle, against_oracle), (REFERENCE, rest, against_reference)):
            wanted = {
                (name, seed): [case for case in cases if case.suits(zoo.ARCHITECTURES[name])]
                for name in members
                for seed in range(options.seeds)
            }

            def say(text: str, table: str = table) -> None:
                if terminal:
                    status.update(f"{table}: {text}")
                else:
                    print(f"{table}: {text}", file=sys.stderr, flush=True)

            if wanted:
                results += compare(wanted, say)
    for table in dict.fromkeys(result.table for result in results):
        title = f"{table}: seeds identical; ~ near ties; ✗ seeds different"
        print_table(console, title, [result for result in results if result.table == table], cases)
    well = summary(console, results, time.monotonic() - start)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    return 0 if well else 1


if __name__ == "__main__":
    raise SystemExit(main())
