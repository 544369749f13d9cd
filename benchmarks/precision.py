"""What 16-bit and int8 weights cost and bring on a real model: perplexity, tokens that stay the same, and speed.

    python benchmarks/precision.py MODEL_DIR              # any folder of a decoder-only model and its tokenizer
    python benchmarks/precision.py MODEL_DIR --write      # and docs/precision.md
    python benchmarks/precision.py MODEL_DIR --text book.txt --prompts 40 --new-tokens 128
    python benchmarks/precision.py MODEL_DIR --repeats 0  # no speed: figures that do not depend on the machine's load

Every row of the table is one set of weights, computed in float64, by the model's own modules, or by this library as
`generate` calls it. Nothing is measured beside what `generate` runs: a logits processor has it write the text, or
what float32 wrote, whatever the model would choose, and takes down the probabilities and the choices on the way. That
all products of our rows were made by our kernels is counted. Speed is that of the commands, each in a process of its
own, loading aside; rounds go through the rows in turn, the fastest counts.
"""

from __future__ import annotations

import argparse
import inspect
import io
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor
from transformers.pytorch_utils import Conv1D

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import (
    RESULTS,
    ROOT,
    Row,
    append_csv,
    interleaved,
    processor,
    reset_peak_memory,
    resident_megabytes,
    versions,
)

from simctg_fast import ContrastiveSearch
from simctg_fast.loading import context_length, load_model
from simctg_fast.ops import _backends, block_layers, linear
from simctg_fast.ops.top_k import top_k_probs

PAGE = ROOT / "docs" / "precision.md"
WINDOW = 512  # tokens, or the model's context; the first half of one is context only, but of the first window
WINDOWS, PROMPTS = 16, 8  # at a time: with k = 4 no more rows than our kernels take anywhere
PROMPT = 32  # tokens
SETTINGS = ("tokens", "prompts", "new_tokens", "top_k", "penalty_alpha", "repeats", "threads")
FLOAT64, TORCH, OURS = "float64", "PyTorch", "ours"


@dataclass(frozen=True)
class Variant:
    """``weights``, and what computes ``by`` them."""

    weights: str
    by: str

    @property
    def dtype(self) -> str:
        """The type that the model is loaded in."""
        return "float32" if self.weights == "int8" else self.weights

    @property
    def settings(self) -> dict[str, Any]:
        """Of `ContrastiveSearch`."""
        if self.by != OURS:
            return {"fast_linear": False, "path": "reorder"}
        return {"weights": "int8"} if self.weights == "int8" else {}

    @property
    def flags(self) -> list[str]:
        """Of the commands."""
        return ["--weights", "int8"] if self.weights == "int8" else ["--dtype", self.dtype]

    @property
    def missing(self) -> str | None:
        """Why it cannot be measured."""
        if self.weights == "int8" and "weights" not in inspect.signature(ContrastiveSearch).parameters:
            return "not available"
        return None


VARIANTS = [Variant(weights, by) for weights in ("float32", "bfloat16", "float16") for by in (FLOAT64, TORCH, OURS)]
VARIANTS.append(Variant("int8", OURS))
TRUTH, REFERENCE = Variant("float32", FLOAT64), Variant("float32", OURS)


@dataclass
class Agreement:
    """With the tokens that `REFERENCE` wrote."""

    same: float  # the share of its tokens that are chosen too, behind what it wrote before
    alike: float  # the median of the tokens before the first that differs, each writing on its own


@dataclass
class Measured:
    """A row of the table."""

    log_probs: Tensor = field(repr=False)  # of the text's tokens, in float64
    products: int  # of our kernels in measuring them
    agreements: dict[str, Agreement] = field(default_factory=dict)  # of greedy and contrastive search
    rates: dict[str, float] = field(default_factory=dict)  # tokens a second of the commands
    peak_mb: float | None = None  # of `simctg-fast generate`

    @property
    def perplexity(self) -> float:
        return math.exp(-self.log_probs.mean())

    def above(self, truth: Measured) -> tuple[float, float]:
        """How much larger the perplexity is, relatively, and the standard error of that: of the tokens' differences."""
        lost = truth.log_probs - self.log_probs
        return math.expm1(lost.mean()), float(lost.std() / math.sqrt(len(lost)))


# ---- a text that is written whatever the model would choose ----------------------------------------------------------


class Follow(LogitsProcessor):
    """Has ``generate`` write ``tokens (B, N)``: one that is not among the ``top_k`` most probable takes the last one's
    place.

    Attributes:
        log_probs: ``(B, N)`` float64, of each token.
        same: ``(B, N)`` whether it would have been chosen.
    """

    def __init__(self, tokens: Tensor, top_k: int = 1):
        self.tokens, self.top_k, self.step = tokens, top_k, 0
        self.log_probs = torch.full(tokens.shape, math.nan, dtype=torch.float64)
        self.same = torch.zeros(tokens.shape, dtype=torch.bool)
        self.prompt: int | None = None

    @property
    def token(self) -> Tensor:
        return self.tokens[:, self.step, None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.prompt = input_ids.shape[1] if self.prompt is None else self.prompt
        self.step = input_ids.shape[1] - self.prompt  # a call that begins again writes over what it has
        token = self.token
        self.log_probs[:, self.step] = scores.double().log_softmax(dim=-1).gather(1, token)[:, 0]
        best = top_k_probs(scores, self.top_k)[1]
        inside = (best == token).any(dim=-1, keepdim=True)
        self.same[:, self.step] = inside[:, 0]
        own, last = scores.gather(1, token), scores.gather(1, best[:, -1:])
        scores = scores.scatter(1, best[:, -1:], torch.where(inside, last, own))
        # A little more than what may be as probable.
        own = torch.nextafter(torch.where(inside, own, last), torch.tensor(math.inf))
        return scores.scatter(1, token, own)

    def choose(self, choice: Any, proposal: Any) -> Any:
        """The choice among candidates, made that of the token."""
        index = (proposal.tokens == self.token).int().argmax(dim=-1)
        self.same[:, self.step] &= choice.selected == index
        return replace(choice, selected=index)


class _Search(ContrastiveSearch):
    """Contrastive search that follows, if it is given what."""

    follow: Follow | None = None

    def make_strategy(self, *args: Any) -> Any:
        strategy, follow = super().make_strategy(*args), self.follow
        if follow is not None and strategy.looks_ahead:
            choose = strategy.choose
            strategy.choose = lambda states, proposal, view: follow.choose(choose(states, proposal, view), proposal)
        return strategy


def write(model: Any, variant: Variant, ids: Tensor, count: int, search: dict[str, Any], follow: Follow | None = None):
    """``count`` tokens behind ``ids (B, L)``. Greedy search by the model's own modules is transformers' own."""
    arguments: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": count}
    if variant.by == OURS or search["top_k"] > 1:
        arguments["custom_generate"] = _Search(**search, **variant.settings)
        arguments["custom_generate"].follow = follow
    if follow is not None:
        arguments["logits_processor"] = [follow]
    tokens = model.generate(ids, **arguments)[:, ids.shape[1] :]
    if tokens.shape[1] != count or (follow is not None and not torch.equal(tokens, follow.tokens)):
        raise RuntimeError(f"{variant}: generate did not write what it was to write")
    return tokens


# ---- perplexity and agreement ----------------------------------------------------------------------------------------


@contextmanager
def counted_products() -> Iterator[list[int]]:
    """How many products with a weight the C++ extension makes within the block."""
    extension, count = _backends.require_extension(), [0]

    def counting(function: Any) -> Any:
        def call(*args: Any) -> Any:
            values = [value for arg in args for value in (arg if isinstance(arg, list) else [arg])]
            count[0] += max(1, sum(getattr(value, "products", 0) for value in values))
            return function(*args)

        return call

    names = [n for n in vars(extension) if ("linear" in n and "pack" not in n) or n == "decoder_blocks"]
    kernels = {name: getattr(extension, name) for name in names}
    try:
        for name, function in kernels.items():
            setattr(extension, name, counting(function))
        _forget_kernels()
        yield count
    finally:
        for name, function in kernels.items():
            setattr(extension, name, function)
        _forget_kernels()


def _forget_kernels() -> None:
    for module in (linear, block_layers):
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def score(model: Any, variant: Variant, text: Tensor, window: int) -> tuple[Tensor, int]:
    """The log-probabilities of the tokens of ``text (N,)``, and the products that our kernels made for them.

    Raises:
        RuntimeError: not all of a row of ours.
    """
    windows, greedy, log_probs, steps = text.unfold(0, window, window // 2), {"top_k": 1}, [], 0
    for part in windows.split(WINDOWS):
        write(model, variant, part[:, :1], 2, greedy)  # the trial before a first call counts nowhere
    with counted_products() as products:
        for part in windows.split(WINDOWS):
            follow = Follow(part[:, 1:])
            write(model, variant, part[:, :1], window - 1, greedy, follow)
            log_probs.append(follow.log_probs)
            steps += window - 1
    layers = sum(type(module) in (torch.nn.Linear, Conv1D) for module in model.modules())
    if variant.by == OURS and products[0] < steps * layers:
        raise RuntimeError(f"{variant}: our kernels made {products[0]} of {steps * layers} products")
    first, *others = torch.cat(log_probs)
    return torch.cat([first, *(each[-(window // 2) :] for each in others)]), products[0]


def agreement(
    model: Any, variant: Variant, prompts: Tensor, search: dict[str, Any], expected: Tensor | None, count: int
) -> tuple[Agreement, Tensor]:
    """With the tokens ``expected (P, N)``, None: its own; and what it writes."""
    found = torch.cat([write(model, variant, part, count, search) for part in prompts.split(PROMPTS)])
    expected, same = found if expected is None else expected, []
    for part, tokens in zip(prompts.split(PROMPTS), expected.split(PROMPTS), strict=True):
        follow = Follow(tokens, search["top_k"])
        write(model, variant, part, count, search, follow)
        same.append(follow.same)
    alike = (found == expected).int().cumprod(dim=-1).sum(dim=-1).tolist()
    return Agreement(float(torch.cat(same).double().mean()), statistics.median(alike)), found


def load(folder: str, variant: Variant) -> tuple[Any, Any]:
    """Its model, which no token ends, and the tokenizer."""
    if variant.by != FLOAT64:
        model, tokenizer = load_model(folder, "cpu", variant.dtype)
    else:
        model, tokenizer = load_model(folder, "cpu", "float64")
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, variant.dtype)).double()
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model, tokenizer


def measure(options: argparse.Namespace, text: Tensor, prompts: Tensor) -> dict[Variant, Measured]:
    searches = {
        "greedy": {"penalty_alpha": options.penalty_alpha, "top_k": 1},
        "contrastive": {"penalty_alpha": options.penalty_alpha, "top_k": options.top_k},
    }
    found: dict[Variant, Measured] = {}
    expected: dict[str, Tensor] = {}
    for variant in [REFERENCE, *(each for each in VARIANTS if each != REFERENCE)]:
        if variant.missing:
            continue
        began = time.perf_counter()
        model, _ = load(options.model, variant)
        found[variant] = Measured(*score(model, variant, text, options.window))
        # What rounding the weights alone costs is told by the perplexity.
        for name, search in searches.items() if variant.by != FLOAT64 or variant == TRUTH else ():
            given = model, variant, prompts, search, expected.get(name), options.new_tokens
            found[variant].agreements[name], tokens = agreement(*given)
            expected.setdefault(name, tokens)
        row, seconds = found[variant], time.perf_counter() - began
        note(f"{variant.weights}, {variant.by}: perplexity {row.perplexity:.4f}, {row.agreements} ({seconds:.0f} s)")
    return found


# ---- the speed of the commands ---------------------------------------------------------------------------------------


def command(arguments: list[str]) -> None:
    """Runs a command of `simctg-fast` and prints a line of JSON: its tokens and seconds without loading, and the memory
    of `generate`."""
    from simctg_fast.cli import app
    from simctg_fast.engine.text_generation import TextGenerator

    figures, own = {}, TextGenerator.__call__

    def timed(self: Any, *args: Any) -> Any:
        reset_peak_memory()  # what loading took is not what writing takes
        start = time.perf_counter()
        written = list(own(self, *args))
        figures.update(tokens=sum(each.tokens for each in written), seconds=time.perf_counter() - start)
        figures["peak_mb"] = resident_megabytes()[1]
        return iter(written)

    TextGenerator.__call__ = timed  # type: ignore[method-assign]
    out = io.StringIO()
    with redirect_stdout(out), suppress(SystemExit):
        app(arguments)
    if arguments[0] == "run" and out.getvalue().strip():
        summary = json.loads(out.getvalue().splitlines()[-1])
        figures = {"tokens": summary["generated_tokens"], "seconds": summary["seconds"]}
    print(json.dumps(figures))


def timed_command(arguments: list[str], threads: int) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    line = [sys.executable, str(Path(__file__).resolve()), "--command", *arguments]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}
    if not found.get("tokens"):
        raise RuntimeError(f"simctg-fast {' '.join(arguments)} wrote nothing: {done.stderr}")
    return found


def measure_speed(options: argparse.Namespace, texts: list[str], found: dict[Variant, Measured]) -> None:
    """Into the rows of ours, tokens a second: one prompt of `generate`, all of `run`."""
    search = ["-k", str(options.top_k), "-a", str(options.penalty_alpha), "-n", str(options.new_tokens)]

    def run(name: str, variant: Variant) -> float:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "prompts.jsonl")
            source.write_text("".join(json.dumps({"id": i, "prompt": text}) + "\n" for i, text in enumerate(texts)))
            given = [texts[0]] if name == "generate" else [str(source), "-o", str(Path(folder, "out.jsonl")), "--quiet"]
            answer = timed_command([name, options.model, *given, *search, *variant.flags], options.threads)
        if name == "generate":
            found[variant].peak_mb = min(found[variant].peak_mb or math.inf, answer["peak_mb"])
        return answer["seconds"] / answer["tokens"]

    for name in ("generate", "run"):
        rows = {variant: lambda v=variant: run(name, v) for variant in found if variant.by == OURS}  # noqa: B023
        for variant, seconds in interleaved(rows, options.repeats).items():
            found[variant].rates[name] = 1 / min(seconds)
        note(f"{name}: {options.repeats} rounds")


# ---- the table -------------------------------------------------------------------------------------------------------

INTRO = """# 16-bit and int8 weights on a real model

What they cost in exactness and bring in speed. `{command}` writes this page, with any folder of a decoder-only model.

{table}

{subject}. {machine}, {threads} threads, instruction set {isa}; {versions}.

## How to read it

* **Perplexity** is that of {scored} tokens in windows of {window}, of which the first half is context only, written
  token by token as `generate` writes. *float64* rows compute the same rounded weights exactly: what they are above the
  first row is what rounding the weights costs, and what is beyond them is what the arithmetic adds. ± is
  the standard error over tokens: differences within two of it say nothing. *PyTorch* is the
  model's own modules in the weights' type, *ours* this library's kernels, which made every product of those rows.
* **Same next token**: behind each token that our float32 wrote ({prompts} prompts of {prompt} tokens, {new_tokens} new
  ones), how often the same next token is chosen, by greedy search and by contrastive search (k = {top_k},
  α = {penalty_alpha}). It says how much of a text rounding decides.
* **Alike until**: how many of {new_tokens} new tokens come before the first that differs, each on its own, the median.
  One near tie that falls the other way ends it: two texts may differ early and be equally good.
* **Tokens a second**: `simctg-fast generate` with one prompt and `simctg-fast run` with {prompts}, contrastive search,
  loading aside; the fastest of {repeats} rounds, which go through the rows in turn. Memory is the largest resident size
  of `generate` while it writes, Python and PyTorch included.
"""
HEAD = [
    *("weights", "computed by", "perplexity", "above float64's", "same next token, greedy", "contrastive"),
    *("alike until, greedy", "contrastive", "`generate`, tokens/s", "`run`, tokens/s", "memory, MB"),
]


def cells(variant: Variant, row: Measured | None, truth: Measured) -> list[str]:
    if row is None:
        return [variant.weights, variant.by, variant.missing or "not measured", *[""] * (len(HEAD) - 3)]
    agreements, (above, error) = row.agreements.values(), row.above(truth)
    texts = [variant.weights, variant.by, f"{row.perplexity:.4f}"]
    texts.append("" if row is truth else f"{100 * above:+.4f} ± {100 * error:.4f} %")
    texts += [f"{each.same:.2%}" for each in agreements] + [f"{each.alike:g}" for each in agreements] or [""] * 4
    texts += [f"{row.rates[name]:.1f}" if name in row.rates else "" for name in ("generate", "run")]
    return [*texts, "" if row.peak_mb is None else f"{row.peak_mb:.0f}"]


def table(found: dict[Variant, Measured]) -> str:
    """In Markdown."""
    lines = [HEAD, ["---"] * 2 + ["---:"] * (len(HEAD) - 2)]
    lines += [cells(variant, found.get(variant), found[TRUTH]) for variant in VARIANTS]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(found: dict[Variant, Measured], options: argparse.Namespace, subject: str, scored: int) -> str:
    names = json.loads(versions("transformers"))
    return INTRO.format(
        command=" ".join(["python benchmarks/precision.py MODEL_DIR --write", *options.said]),
        table=table(found),
        subject=subject,
        machine=processor(),
        isa=_backends.require_extension().active_isa(),
        versions=", ".join(f"{name} {version}" for name, version in names.items()),
        scored=scored,
        window=options.window,
        prompt=PROMPT,
        **{name: getattr(options, name) for name in SETTINGS},
    )


def csv_rows(found: dict[Variant, Measured], options: argparse.Namespace, subject: str) -> Iterator[Row]:
    config = json.dumps({"subject": subject} | {name: getattr(options, name) for name in ("window", *SETTINGS)})
    for variant, row in found.items():
        figures: dict[str, float | None] = {"perplexity": row.perplexity, "peak_mb": row.peak_mb}
        for name, each in row.agreements.items():
            figures |= {f"same_next_token_{name}": each.same, f"alike_until_{name}": each.alike}
        figures |= {f"tokens_per_second_{name}": rate for name, rate in row.rates.items()}
        for metric, value in figures.items():
            if value is not None:
                common = ("precision", variant.by, "decode", metric, "weights", variant.weights)
                yield Row(*common, value, value, value, config, processor(), versions("transformers"))


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prose() -> str:
    """Documentation that Python carries."""
    sys.path.insert(0, str(ROOT / "examples"))
    from example_data import prose as paragraphs

    with warnings.catch_warnings():  # of what Python is about to drop
        warnings.simplefilter("ignore", DeprecationWarning)
        return "\n\n".join(paragraphs())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of a decoder-only model and its tokenizer")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8; by default documentation that Python carries")
    parser.add_argument("--tokens", type=int, default=4352, help="of the text, from its beginning")
    parser.add_argument("--prompts", type=int, default=20, help=f"of {PROMPT} tokens, from all over these")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--penalty-alpha", type=float, default=0.6)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of the commands; 0: no speed")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--csv", type=Path, default=RESULTS / "precision.csv")
    parser.add_argument("--write", action="store_true", help="write docs/precision.md as well")
    options = parser.parse_args(arguments)
    if not Path(options.model).is_dir():
        parser.error(f"MODEL_DIR is {options.model!r}, must be a folder")
    for name, least in {"prompts": 1, "new_tokens": 1, "top_k": 2, "repeats": 0, "threads": 1}.items():
        if (value := getattr(options, name)) < least:
            parser.error(f"--{name.replace('_', '-')} is {value}, must be at least {least}")
    try:
        options.text_read = prose() if options.text is None else options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--text {options.text} cannot be read: {error}")
    options.parser = parser
    said = {name: getattr(options, name) for name in SETTINGS}
    options.said = [f"--{n.replace('_', '-')} {v}" for n, v in said.items() if v != parser.get_default(n)]
    options.said += [] if options.text is None else [f"--text {options.text.name}"]
    return options


def prepare(options: argparse.Namespace) -> tuple[Tensor, Tensor, list[str], str]:
    """The text's ids, the prompts ``(P, PROMPT)``, their texts, and what all this is in words."""
    try:
        model, tokenizer = load(options.model, REFERENCE)
    except (OSError, ValueError) as error:
        options.parser.error(f"MODEL_DIR is {options.model!r}: {error}")
    if model.config.is_encoder_decoder:
        options.parser.error(f"MODEL_DIR is {options.model!r}, an encoder-decoder; must be a decoder-only model")
    context = context_length(model) or WINDOW
    options.window = min(WINDOW, context) // 2 * 2
    if PROMPT + options.new_tokens > context:
        most = context - PROMPT
        options.parser.error(f"--new-tokens is {options.new_tokens}, must be at most {most} with this model")
    ids = tokenizer(options.text_read, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    ids = ids[: max(0, options.tokens)].long()
    source = "the text" if options.text is None else f"--text {options.text}"
    if len(ids) < options.window:
        options.parser.error(f"{source} has {len(ids)} tokens (--tokens {options.tokens}), needs {options.window}")
    starts = [i * (len(ids) - PROMPT) // options.prompts for i in range(options.prompts)]
    prompts = torch.stack([ids[start : start + PROMPT] for start in starts])
    name = Path(options.model).resolve().name
    subject = f"{name} ({model.config.model_type}, {model.num_parameters() / 1e6:.0f} million parameters)"
    text = "docstrings of Python " + platform.python_version() if options.text is None else options.text.name
    return ids, prompts, tokenizer.batch_decode(prompts), f"{subject}; the text is {text}"


def main(arguments: list[str] | None = None) -> dict[Variant, Measured]:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ids, prompts, texts, subject = prepare(options)
    found = measure(options, ids, prompts)
    if options.repeats:
        measure_speed(options, texts, found)
    scored = len(found[TRUTH].log_probs)
    print(f"{subject}\n{processor()}, {options.threads} threads, {scored} tokens scored\n\n{table(found)}")
    append_csv(options.csv, csv_rows(found, options, subject))
    if options.write:
        PAGE.write_text(page(found, options, subject, scored), encoding="utf-8")
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--command"]:
        command(sys.argv[2:])
    else:
        main()
