"""Does SimCTG training make a small model write better? The bundled architecture, trained plainly and with the loss.

    python benchmarks/claims.py --work DIR          # three models of each kind; goes on where it was stopped
    python benchmarks/claims.py --work DIR --write  # and the table of docs/results.md
    python benchmarks/claims.py --evaluation eval-NAME --write  # the other tables, of what `simctg-fast eval` found
    python benchmarks/claims.py --work DIR --steps 2 --sources 60 --seeds 1 --prompts 2    # in little

Su et al. 2022 claim that the contrastive loss (margin 0.5) makes hidden states isotropic, and that contrastive search
on such a model repeats less and reads better than on a plain one. Both are trained from scratch on the same text, by
`train_bundled.py`, in the same order of batches for one seed; every strategy continues the same held-out passages. What
is reported is what comes out: the mean over seeds, and the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bundled_corpus import build_corpus
from common import ROOT, processor, versions

from simctg_fast.evaluation.evaluate import Evaluation, Options
from simctg_fast.evaluation.prompts import Prompt, prompts_of
from simctg_fast.evaluation.settings import parse_settings
from simctg_fast.loading import load_model

DOCS = ROOT / "docs"
PAGES = {"trained": "results.md", "real": "results.md", "means": "strategies.md"}  # where each table stands
OBJECTIVES = {"likelihood": 0.0, "likelihood + contrastive": 1.0}  # by the weight of the contrastive loss
STRATEGIES = "greedy,nucleus,contrastive,centered,fsd"
COLUMNS = {"diversity": 1, "rep_4": 1, "perplexity": 1, "log_prob_per_byte": 3}
IN_SHORT = ("tokens", "diversity", "log_prob_per_byte", "tokens_per_second")  # on the page of strategies
Figure = dict[str, Any]  # mean, low, high


def folder(options: argparse.Namespace, weight: float, seed: int) -> Path:
    return options.work / f"{'simctg' if weight else 'plain'}-{seed}"


def train(options: argparse.Namespace) -> None:
    """Every model that is not there, ``jobs`` at a time."""
    waiting = [(w, s) for s in range(options.seeds) for w in OBJECTIVES.values()]
    waiting = [each for each in waiting if not (folder(options, *each) / "README.md").exists()]
    running: list[subprocess.Popen] = []
    while waiting or running:
        while waiting and len(running) < options.jobs:
            weight, seed = waiting.pop(0)
            out = folder(options, weight, seed)
            given = {
                "--steps": options.steps, "--batch-tokens": options.batch_tokens, "--seed": seed,
                "--contrastive-weight": weight, "--out": out, "--work": out.with_name(f"{out.name}-work"),
                "--threads": options.threads, "--prompts": 0, "--sources": options.sources,
            }  # fmt: skip
            words = [str(word) for name, value in given.items() if value is not None for word in (name, value)]
            print(f"training {out.name}", file=sys.stderr, flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            log = out.with_name(f"{out.name}.log").open("a")
            command = [sys.executable, str(ROOT / "benchmarks" / "train_bundled.py"), *words, "--resume"]
            running.append(subprocess.Popen(command, stdout=log, stderr=log))
        running[0].wait()
        if running[0].returncode:
            raise SystemExit(f"a training failed with {running[0].returncode}; its log is in {options.work}")
        running.pop(0)


def held_out(tokenizer: Any, options: argparse.Namespace) -> list[Prompt]:
    """Passages of documents that no model was trained on, and how they go on."""
    _, texts = build_corpus(options.sources).split()
    ids = [token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]]
    return prompts_of(tokenizer, ids, options.prompts, options.new_tokens, "held-out")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What each model writes: its figures, by strategy; kept beside it."""
    found = []
    for objective, weight in OBJECTIVES.items():
        for seed in range(options.seeds):
            kept = folder(options, weight, seed) / f"claims-{options.prompts}-{options.new_tokens}.json"
            if not kept.exists():
                print(f"writing by {kept.parent.name}", file=sys.stderr, flush=True)
                model, tokenizer = load_model(kept.parent, "cpu", "float32")
                evaluation = Evaluation(
                    model, tokenizer, held_out(tokenizer, options), parse_settings(STRATEGIES),
                    Options(options.new_tokens, seed=seed),
                )  # fmt: skip
                result = evaluation.run()
                figures = {row["strategy"]: row["figures"] for row in result["rows"]}
                kept.write_text(json.dumps({"figures": figures, "layers": result["isotropy"]["layers"]}))
            found.append({"objective": objective, "seed": seed, **json.loads(kept.read_text())})
    return found


def table(found: list[dict[str, Any]], options: argparse.Namespace) -> str:
    about = (
        f"{options.steps} steps of {options.batch_tokens} tokens, {options.seeds} seeds, {options.prompts} held-out "
        f"passages, {options.new_tokens} new tokens at most; {processor()}, {versions('transformers')}."
    )
    head = ["trained by", "isotropy", "strategy", "diversity", "rep-4", "perplexity", "log p a byte"]
    return "\n".join([about, "", *map(_row, [head, ["---"] * len(head)]), *map(_row, _rows(found))])


def _rows(found: list[dict[str, Any]]) -> Iterator[list[str]]:
    for objective in OBJECTIVES:
        runs = [each for each in found if each["objective"] == objective]
        isotropy = _over_seeds([run["layers"][-1] for run in runs], 2)
        for number, strategy in enumerate(runs[0]["figures"]):
            cells = [
                _over_seeds([run["figures"][strategy][column]["mean"] for run in runs], digits)
                for column, digits in COLUMNS.items()
            ]
            yield [objective if not number else "", isotropy if not number else "", strategy, *cells]


def evaluation_tables(folder: Path) -> dict[str, str]:
    """What `simctg-fast eval` wrote into a folder: means, 95 % intervals, and what it concludes; and means in short."""
    found = json.loads((folder / "evaluation.json").read_text("utf-8"))
    about = (
        f"{Path(found['model']).name}, {found['dtype']}, {found['prompts']} prompts, {found['max_new_tokens']} new "
        f"tokens at most; {found['machine']}, torch {found['versions']['torch']}, transformers "
        f"{found['versions']['transformers']}."
    )
    said = [f"* {sentence}" for sentence in found["conclusion"]]
    whole = [f"{about} In brackets 95 % intervals.", "", *_table(found, list(found["metrics"]), _interval), "", *said]
    short = [about, "", *_table(found, [name for name in IN_SHORT if name in found["metrics"]], _mean)]
    return {"real": "\n".join(whole), "means": "\n".join(short)}


def _table(found: dict[str, Any], columns: Sequence[str], cell: Callable[[Figure, int], str]) -> list[str]:
    metrics = [found["metrics"][name] for name in columns]
    lines = [["strategy", *(f"{m['name']}, {m['unit']}" if m["unit"] else m["name"] for m in metrics)]]
    lines.append(["---"] * len(lines[0]))
    for row in found["rows"]:
        figures = [row["figures"].get(name) for name in columns]
        cells = [cell(f, m["digits"]) if f else "" for f, m in zip(figures, metrics, strict=True)]
        lines.append([row["label"], *cells])
    return list(map(_row, lines))


def _mean(figure: Figure, digits: int) -> str:
    return f"{figure['mean']:.{digits}f}"


def _interval(figure: Figure, digits: int) -> str:
    mean = _mean(figure, digits)
    if figure["low"] is None or digits == 0:
        return mean
    return f"{mean} ({figure['low']:.{digits}f} to {figure['high']:.{digits}f})"


def _over_seeds(values: list[float], digits: int) -> str:
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--work", type=Path, help="folder of the models")
    what.add_argument("--evaluation", type=Path, metavar="FOLDER", help="of `simctg-fast eval`: its table instead")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--sources", type=int, help="of the text to train on, the first so many (all of them)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/ as well")
    options = parser.parse_args(arguments)
    for name in ("steps", "batch_tokens", "seeds", "prompts", "new_tokens", "jobs", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, must be at least 1")
    if options.evaluation is not None:
        made = evaluation_tables(options.evaluation)
    else:
        train(options)
        torch.set_num_threads(options.threads)
        made = {"trained": table(measure(options), options)}
    print(next(iter(made.values())))
    for name in made if options.write else ():
        page, begin, end = DOCS / PAGES[name], f"<!-- {name} -->", f"<!-- end {name} -->"
        before, _, rest = page.read_text(encoding="utf-8").partition(begin)
        page.write_text(f"{before}{begin}\n{made[name]}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
