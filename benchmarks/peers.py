"""Our decoding against other engines on the CPU: milliseconds a step, and tokens a second over many requests.

    pip install -e '.[peers]'                                # what is not installed is listed as such
    python benchmarks/peers.py                               # both shapes, random weights
    python benchmarks/peers.py --write                       # the same, and docs/peers.md
    python benchmarks/peers.py --models tiny --new-tokens 8 --requests 8 --repeats 1 --csv tiny.csv
    python benchmarks/peers.py --only ours,OpenVINO --cases 8x64 --requests 0

Every engine and type of weights has a process of its own, made from one Hugging Face folder; rounds go through all in
turn. A case is batch x prompt; its figure is the time of a step of the whole batch, prefill subtracted (a run with one
new token), minimum over the rounds. Requests are of one length; ours answers them on `--slots` slots, the others with
the best of `--sizes` at a time. Others search greedily. Their float32 tokens must be those of transformers' greedy
search in float32 but for near ties, as in decode.py; where they are not, there is no figure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import RESULTS, ROOT, Worker, append_csv, processor
from decode import MODELS, first_differences, make_model
from peer_engines import LENGTH, REFERENCE, ROWS, VARIANTS, Engine, Ours, Transformers, Variant
from peer_page import PAGE, instruction_set, page, rows_of, table, verdicts

SCOUT = (8, 5)  # prompt and new tokens by which sizes are compared


# ---- worker: one engine, one type of weights -------------------------------------------------------------------------


def worker(options: argparse.Namespace) -> None:
    """Make the folder, or files of variants of one engine, or answer one JSON request a line. The first line says how
    that went."""
    wanted = [variant for variant in VARIANTS if variant.label in json.loads(options.variants)]
    answer: dict = {}
    if options.worker == "convert":
        for variant in wanted:
            answer[variant.label] = made(variant, options.folder)
    else:
        try:
            if options.worker == "save":
                save(options.model, options.folder)
            else:
                engine = wanted[0].engine(options.folder, wanted[0].weights, options.threads, **wanted[0].search)
        except Exception as error:
            answer = reason(error, options.folder)
    print("\n" + json.dumps(answer), flush=True)
    if options.worker != "serve" or "failed" in answer:
        return
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = serve(engine, **asked)
        except Exception as error:
            answer = reason(error, options.folder)
        print("\n" + json.dumps(answer), flush=True)


def made(variant: Variant, folder: Path) -> str:
    """What failed."""
    try:
        variant.engine.convert(folder, variant.weights)
    except Exception as error:  # reported in the table
        return reason(error, folder)["failed"]
    return ""


def serve(engine: Engine, ids=(), new: int = 0, size: int | None = None, judge=()) -> dict:
    if judge:
        return {"verdicts": engine.judge([prefix for prefix, _ in judge], [pair for _, pair in judge])}
    start = time.perf_counter()
    tokens = engine.generate(ids, new) if size is None else engine.answer(ids, new, size)
    seconds = time.perf_counter() - start
    if short := [len(row) for row in tokens if len(row) != new]:
        raise RuntimeError(f"{short[0]} new tokens instead of {new}")
    return {"seconds": seconds, "tokens": [list(map(int, row)) for row in tokens]}


def reason(error: Exception, folder: Path) -> dict:
    lines = str(error).replace(str(folder), folder.name).strip().splitlines() or [""]
    return {"failed": f"failed: {type(error).__name__}: {lines[0]}"[:160]}


def save(name: str, folder: Path) -> None:
    """Weights, and a tokenizer of numbers; exporters insist on it and on an end."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = make_model(name)
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = 0
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(model.config.vocab_size)}, unk_token="<0>"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<0>")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


# ---- the comparison --------------------------------------------------------------------------------------------------


class Contender:
    """A variant on one model: its process, its figures by case, and what is wrong with it."""

    def __init__(self, variant: Variant, model: str):
        self.variant, self.model = variant, model
        self.state = "not installed" if variant.missing() else ""
        self.figures: dict[str, list[float]] = {}
        self.wrong: dict[str, str] = {}  # cases of which there is no figure
        self.alike: list[float] = []  # share of tokens before the first that is not float32's
        self.size = 0
        self.process: Worker | None = None
        self.busy = 0.0  # processor seconds of its own work

    def start(self, options: argparse.Namespace, folder: Path) -> None:
        if not self.state:
            self.process, ready = start_worker("serve", [self.variant.label], folder, options)
            self.state = ready.get("failed", "")

    def ask(self, **request) -> dict | None:
        """None where it failed, now or before."""
        if self.state:
            return None
        before = self.process.cpu_seconds()
        try:
            answer = self.process.ask(**request)
        except (RuntimeError, OSError) as error:  # it has ended
            answer = {"failed": f"failed: {error}"}
        if "failed" in answer:
            self.state = answer["failed"]
            return None
        self.busy += self.process.cpu_seconds() - before
        return answer

    def waited(self) -> float:
        """Processor seconds it took while others were measured."""
        return self.process.cpu_seconds() - self.busy

    def close(self) -> None:
        if self.process is not None:
            self.process.close()

    def figure(self, case: str) -> float | None:
        """The best: the least time, or the highest rate."""
        values = [] if case in self.wrong else self.figures.get(case, [])
        best = (min if "x" in case else max)(values, default=0.0)
        return best if best > 0 else None  # where a step takes nothing, it was too short to time

    def note(self) -> str:
        """What is wrong with it, in all."""
        return "; ".join([*([self.state] if self.state else []), *(f"{c}: {why}" for c, why in self.wrong.items())])


def start_worker(mode: str, labels: list[str], folder: Path, options: argparse.Namespace) -> tuple[Worker | None, dict]:
    """The process, where it is one that serves and can, and what it says at first."""
    note(f"{folder.name}: {mode} {'; '.join(labels)}")
    arguments = ["--worker", mode, "--models", folder.name, "--folder", folder, "--threads", options.threads]
    arguments += ["--variants", json.dumps(labels)]
    try:
        process = Worker(sys.executable, __file__, *arguments, threads=options.threads)
    except RuntimeError as error:  # it ended without a word
        return None, {"failed": f"failed: {error}"}
    if mode == "serve" and "failed" not in process.ready:
        return process, process.ready
    process.close()
    return None, process.ready


def convert(contenders: list[Contender], folder: Path, options: argparse.Namespace) -> None:
    """In one process for all types of weights of an engine, for they begin alike."""
    for engine in dict.fromkeys(contender.variant.engine for contender in contenders):
        group = [contender for contender in contenders if contender.variant.engine is engine and not contender.state]
        if group and engine.converts:
            _, ready = start_worker("convert", [contender.variant.label for contender in group], folder, options)
            for contender in group:
                contender.state = ready.get("failed") or ready.get(contender.variant.label, "")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prompts(model: str, rows: int, length: int) -> list[list[int]]:
    draw = random.Random(1)
    vocabulary = MODELS[model].get("vocab_size", 50257)
    return [[draw.randrange(1, vocabulary) for _ in range(length)] for _ in range(rows)]


def measure_model(model: str, options: argparse.Namespace) -> list[Contender]:
    contenders = [Contender(variant, model) for variant in chosen(options.only)]
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, model)
        if "failed" in (ready := start_worker("save", [], folder, options)[1]):
            raise SystemExit(f"{model}: {ready['failed']}")
        convert(contenders, folder, options)
        try:
            for contender in contenders:
                contender.start(options, folder)
            running = [contender for contender in contenders if not contender.state]
            idle = {contender: contender.waited() for contender in running}
            for case in options.cases:
                measure_case(case, running, options)
            if options.requests:
                measure_requests(running, options)
            for contender in running:
                waited = 0.0 if contender.state else contender.waited() - idle[contender]
                if waited > 1.0:
                    note(f"{model}: {contender.variant.label} used {waited:.1f} s of processor time while it waited")
        finally:
            for contender in contenders:
                contender.close()
    return contenders


def measure_case(case: str, running: list[Contender], options: argparse.Namespace) -> None:
    """Tokens are compared after the first round, which also warms what an engine makes at its first call."""
    rows, prompt = map(int, case.split("x"))
    ids, new = prompts(running[0].model, rows, prompt), options.new_tokens
    firsts: dict[Contender, list[float]] = {contender: [] for contender in running}
    manys: dict[Contender, list[float]] = {contender: [] for contender in running}
    for round_ in range(options.repeats):
        answers = {}
        for contender in running:
            for count, seconds in ((1, firsts), (new, manys)):
                answer = None if case in contender.wrong else contender.ask(ids=ids, new=count)
                if answer is not None:
                    seconds[contender].append(answer["seconds"])
            answers[contender] = answer
        if round_ == 0:
            compare_tokens(case, ids, answers)
        note(f"{running[0].model}: {case}: round {round_ + 1} of {options.repeats}")
    for contender in running:
        first = min(firsts[contender], default=0.0)
        contender.figures[case] = [(many - first) * 1e3 / (new - 1) for many in manys[contender]]


def measure_requests(running: list[Contender], options: argparse.Namespace) -> None:
    """Tokens a second; the first answers are what is compared, and warm what an engine makes at its first call."""
    case, (prompt, new) = "requests", options.request
    ids = prompts(running[0].model, options.requests, prompt)
    answers = {}
    for contender in running:
        sizes = {Ours: (options.slots,), Transformers: options.sizes[:1]}.get(contender.variant.engine, options.sizes)
        contender.size = scout(contender, sizes, options)
        answers[contender] = contender.ask(ids=ids, new=new, size=contender.size)
        note(f"{contender.model}: {contender.variant.label}: {contender.size} at a time {contender.state}")
    compare_tokens(case, ids, answers)
    for contender, answer in answers.items():
        if answer is not None:
            contender.figures[case] = [options.requests * new / answer["seconds"]]


def scout(contender: Contender, sizes: tuple[int, ...], options: argparse.Namespace) -> int:
    """The size of the most rows a second in a few steps after short prompts; and all is warm."""
    prompt, new = SCOUT
    rates = {}
    for size in sizes:
        ids = prompts(contender.model, size, prompt)
        answers = [contender.ask(ids=ids, new=count, size=size) for count in ((1, new) if len(sizes) > 1 else (new,))]
        if None in answers:
            break
        rates[size] = size / max(answers[-1]["seconds"] - answers[0]["seconds"], 1e-9)
    return max(rates, key=rates.get, default=sizes[0])


def compare_tokens(case: str, ids: list[list[int]], answers: dict[Contender, dict | None]) -> None:
    """Against float32's greedy search by transformers: what has the same weights must agree but for near ties."""
    reference = next(contender for contender in answers if contender.variant is REFERENCE)
    expected = answers[reference]
    if expected is None:
        raise SystemExit(f"transformers' own tokens are wanting: {reference.state}")
    for contender, answer in answers.items():
        if answer is None or contender is reference or not contender.variant.greedy:
            continue
        apart = first_differences(answer["tokens"], expected["tokens"])
        new = len(expected["tokens"][0])
        lost = sum(new - len(before) for _, before, _ in apart)
        contender.alike.append(1 - lost / (new * len(ids)))
        if contender.variant.weights != "float32" or not apart:
            continue
        judged = reference.ask(judge=[[ids[row] + before, pair] for row, before, pair in apart])
        if judged is None:
            raise SystemExit(f"transformers cannot judge: {reference.state}")
        for (row, before, _), (near, text) in zip(apart, judged["verdicts"], strict=True):
            note(f"{case}: {contender.variant.label}, row {row}, new token {len(before)}: {text}")
            if not near:
                contender.wrong[case] = f"failed: other tokens than transformers', {text}"


def chosen(only: list[str]) -> list[Variant]:
    """The reference always, and the variants whose label holds one of these words."""
    return [
        variant
        for variant in VARIANTS
        if variant is REFERENCE or not only or any(word.lower() in variant.label.lower() for word in only)
    ]


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gpt2-small,smollm2", help=f"of {', '.join(MODELS)}, comma-separated")
    parser.add_argument("--cases", default="1x64,8x64", help="batch x prompt, comma-separated")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--requests", type=int, default=48, help="how many; 0 leaves them out")
    parser.add_argument("--request", default="64,48", help="tokens of each: prompt, new")
    parser.add_argument("--slots", type=int, default=16, help="ours")
    parser.add_argument("--sizes", default="8,16,48", help="how many requests others may take at a time")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="parts of names, comma-separated: ours,CTranslate2,int8")
    parser.add_argument("--csv", type=Path, default=RESULTS / "peers.csv")
    parser.add_argument("--write", action="store_true", help="write docs/peers.md")
    for name in ("--worker", "--variants", "--folder"):
        parser.add_argument(name, type=Path if name == "--folder" else str, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.models, options.cases = options.models.split(","), options.cases.split(",")
    options.only = [word.strip() for word in options.only.split(",") if word.strip()]
    for model in options.models:
        if model not in MODELS:
            parser.error(f"--models: {model!r} is none of {', '.join(MODELS)}")
    try:
        options.request, options.sizes = numbers(options.request), numbers(options.sizes)
        cases = [tuple(map(int, case.split("x"))) for case in options.cases]
        prompt, new = options.request
        lengths = [length + options.new_tokens for _, length in cases]
    except ValueError:
        parser.error("--cases are like 1x64,8x64, --sizes like 8,16,48, --request like 64,48")
    if options.new_tokens < 2 or new < 1 or options.repeats < 1 or options.requests < 0 or options.slots < 1:
        parser.error("--new-tokens must be at least 2, --repeats and --slots at least 1, --requests at least 0")
    if max(*lengths, prompt + new) > LENGTH:
        parser.error(f"prompt and new tokens must be at most {LENGTH} together, got {max(*lengths, prompt + new)}")
    if max(*(rows for rows, _ in cases), *options.sizes) > ROWS:
        parser.error(f"at most {ROWS} rows at a time")
    if len(chosen(options.only)) < 2:
        parser.error(f"--only: {','.join(options.only)!r} is in none of {', '.join(v.label for v in VARIANTS)}")
    options.model = options.models[0]
    return options


def main() -> None:
    options = parse()
    if options.worker:
        worker(options)
        return
    sys.path.insert(0, str(ROOT))
    # what converters say is not the table
    os.environ.update(TQDM_DISABLE="1", PYTHONWARNINGS="ignore", TRANSFORMERS_VERBOSITY="error")
    print(f"{processor()}, {instruction_set()}, {options.threads} threads", flush=True)
    contenders = []
    for model in options.models:
        contenders += measure_model(model, options)
        append_csv(options.csv, rows_of([one for one in contenders if one.model == model], options))
    print(table(contenders, options))
    print("\n".join(verdicts(contenders, options)))
    if options.write:
        PAGE.write_text(page(contenders, options), encoding="utf-8")


if __name__ == "__main__":
    main()
