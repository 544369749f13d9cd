"""The command line: `simctg-fast generate | run | merge | features | demo | train | eval | isotropy | compare | env`.

Arguments in, text out; the floors below do the work, and `terminal.py` knows how a command ends. Exit codes: 0 done, 1
some requests have error records, 2 refused, 3 the disk is full or an output cannot be written, 70 an error that nobody
has foreseen, 130 and 143 stopped by SIGINT and SIGTERM, 141 the reader of standard output has had enough.

Only typer and rich are imported here, so that help and usage errors come at once; each command imports what it needs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from typer.core import TyperGroup
except KeyboardInterrupt:  # a fifth of a second in which nobody else would catch it
    if sys.stderr is not None:
        print("stopped", file=sys.stderr)
    raise SystemExit(130) from None

from .printable import json_text, printable
from .strategy_names import RANDOM, STRATEGIES, TOGETHER
from .terminal import FAULT, REFUSED, OutputError, explained, guarded, interruption, shown, signal_code, was_closed

__all__ = ["app", "main"]

_TRACEBACK = "SIMCTG_FAST_TRACEBACK"  # set, an error that nobody has foreseen is shown whole


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


# What typer raises for usage, in a module that depends on its version.
_CLICK_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class _Commands(TyperGroup):
    """The commands, none of which ends in a traceback: see `_endings` and `guarded`."""

    def main(self, *args: Any, **extra: Any) -> Any:
        with guarded():
            return super().main(*args, **extra)

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with _endings():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _endings():
            return super().invoke(ctx)


@contextmanager
def _endings() -> Iterator[None]:
    """Every error as one line and an exit code; control characters in it, as of a file's name, escaped."""
    try:
        yield
    except (typer.Exit, typer.Abort, OutputError):
        raise
    except _CLICK_ERROR as error:
        error.message = printable(str(error.message))
        raise
    except KeyboardInterrupt as error:
        _note("stopped")
        raise typer.Exit(signal_code(error)) from error
    except Exception as error:
        if (signalled := interruption()) is not None:
            _note("stopped")
            raise typer.Exit(signal_code(signalled)) from error
        code, text = explained(error)
        if code == REFUSED:
            raise typer.BadParameter(printable(text)) from error
        if code == FAULT:
            if os.environ.get(_TRACEBACK):
                raise
            text += f" ({_TRACEBACK}=1 shows where)"
        _note(f"Error: {text}")
        raise typer.Exit(code) from error


app = typer.Typer(
    name="simctg-fast",
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Contrastive search and contrastive training for Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Local folder, hub name, or `bundled`.")]
ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Local folder, hub name, or `bundled`; or give --model.")
]
ModelOption = Annotated[str | None, typer.Option("--model", "-m", help="Local folder, hub name, or `bundled`.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model's folder brings along.")
]
PenaltyAlpha = Annotated[
    float, typer.Option("--penalty-alpha", "-a", help="Weight of the degeneration penalty, 0 (greedy) to 1.")
]
TopK = Annotated[int, typer.Option("--top-k", "-k", help="Candidates a step, at least 1.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Longest continuation, in tokens.")]
Center = Annotated[
    bool, typer.Option("--center", help="Compare hidden states less their mean: for models whose states are all alike.")
]
Weights = Annotated[
    str | None, typer.Option(help="On the CPU: int8 (rounded further), or lossless (16 bits where these are as good).")
]
FsdN = Annotated[int | None, typer.Option("--fsd-n", help="Of fsd, fsd-vec: the n of the n-grams.")]
FsdBeta = Annotated[float | None, typer.Option(help="Of fsd: share of the longest context, 0 to 1.")]
FsdStopTokens = Annotated[
    list[int] | None,
    typer.Option("--fsd-stop-token", help="Of fsd, fsd-vec: id that is not penalised; may be repeated."),
]
AdaptiveQ = Annotated[float | None, typer.Option(help="Of adaptive: how sharply it follows, above 0.")]
AdaptiveKRange = Annotated[
    tuple[int, int] | None, typer.Option("--adaptive-k", help="Of adaptive: the fewest and the most candidates.")
]
GuardWindow = Annotated[int | None, typer.Option(help="Of guard: steps, 2 to 64.")]
GuardDecay = Annotated[float | None, typer.Option(help="Of guard: weight of a step relative to the next, to 1.")]
# Of `DRYLogitsProcessor`; the engine has their defaults.
DryMultiplier = Annotated[
    float | None, typer.Option(help="DRY, a penalty on repetitions that grows with their length; 0 (default): off.")
]
DryBase = Annotated[float | None, typer.Option(help="Of DRY: growth a token, at least 1.")]
DryAllowedLength = Annotated[int | None, typer.Option(help="Of DRY: repetitions shorter than this are free.")]
DrySequenceBreakers = Annotated[
    list[str] | None,
    typer.Option(
        "--dry-sequence-breaker",
        help="Of DRY: repetitions begin behind this text ($'\\n': a new line); may be repeated.",
    ),
]
DryPenaltyRange = Annotated[int | None, typer.Option(help="Of DRY: tokens that it looks back; -1 (default): all.")]
_DRY = ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_sequence_breakers", "dry_penalty_range")
Dtype = Annotated[str, typer.Option(help="float32, float16, bfloat16, or auto: as the config says.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; by default the first GPU if there is one.")]


def _print_version(asked: bool) -> None:
    if asked:
        from . import __version__

        print(f"simctg-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    ctx: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL] [PROMPT]...", help="Texts to continue; else standard input, one a line."),
    ] = None,
    model: ModelOption = None,
    strategy: Annotated[str | None, typer.Option(help=f"{_listed(STRATEGIES)}; by default contrastive.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", "-k", help="Candidates a step; contrastive: 4.")] = None,
    penalty_alpha: Annotated[
        float | None, typer.Option("--penalty-alpha", "-a", help="Weight of the penalty, 0 to 1; contrastive: 0.6.")
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    fsd_n: FsdN = None,
    fsd_beta: FsdBeta = None,
    fsd_stop_tokens: FsdStopTokens = None,
    adaptive_q: AdaptiveQ = None,
    adaptive_k_range: AdaptiveKRange = None,
    guard_window: GuardWindow = None,
    guard_decay: GuardDecay = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show for every token its candidates, and what spoke against them.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Show the text as it is written, prompt by prompt.")] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Draw among the candidates instead of taking the best; 0: the best.")
    ] = None,
    center: Center = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws of --temperature.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    dry_multiplier: DryMultiplier = None,
    dry_base: DryBase = None,
    dry_allowed_length: DryAllowedLength = None,
    dry_sequence_breakers: DrySequenceBreakers = None,
    dry_penalty_range: DryPenaltyRange = None,
    batch_size: Annotated[int, typer.Option(help="Prompts continued together.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line: prompt, text, tokens.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    weights: Weights = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue prompts by contrastive search, or by --strategy.

    The first argument is the model, unless --model names it. Files of requests are for `simctg-fast run`. Exit code 1:
    some prompts could not be continued.
    """
    words = list(arguments or ())
    name = _the_model(words.pop(0) if model is None and words else None, model)
    _check_search(penalty_alpha, top_k, max_new_tokens)
    _check(batch_size >= 1, "--batch-size", batch_size, "at least 1")
    _check(temperature is None or temperature >= 0, "--temperature", temperature, "at least 0")
    _check(seed is None or 0 <= seed < 2**63, "--seed", seed, "from 0 to 2**63 - 1")
    draws = temperature is not None or (strategy or "").split(",")[0].strip() in RANDOM
    _check(seed is None or draws, "--seed", seed, f"given together with --temperature or --strategy {_listed(RANDOM)}")
    _check_dtype(dtype)
    _check(weights in (None, "int8", "lossless"), "--weights", weights, "int8 or lossless")
    _check(all(stop or ()), "--stop", "''", "a text")
    if stream and as_json:
        raise typer.BadParameter("--stream shows text as it is written; it cannot be combined with --json")
    if stream and explain:
        raise typer.BadParameter("--stream shows text as it is written; it cannot be combined with --explain")
    texts, failed = _read_prompts(words)

    with _progress("loading the model"):
        from .engine.parameters import check as check_parameter
        from .engine.text_generation import TextGenerator
        from .text.explain import explained

        given = {option: value for option, value in _chosen(ctx, *_DRY).items() if value not in (None, [])}
        dry = {option: check_parameter(option, value) for option, value in given.items()}
        _quiet_transformers()
        generator = TextGenerator(
            name,
            stop=stop,
            batch_size=1 if stream else min(batch_size, len(texts) or 1),
            trace=explain,
            **_chosen(ctx, "strategy", "penalty_alpha", "top_k", "center", "max_new_tokens", "temperature", "seed"),
            **_chosen(ctx, "fsd_n", "fsd_beta", "adaptive_q", "adaptive_k_range", "guard_window", "guard_decay"),
            fsd_stop_tokens=list(fsd_stop_tokens or ()),
            **_chosen(ctx, "device", "dtype", "weights", "trust_remote_code"),
            **dry,
        )

    def show_new(request: Any, index: int, text: str) -> None:
        print(shown(text), end="", flush=True)

    console = Console(highlight=False, markup=False)
    for number, text in enumerate(texts if stream else ()):
        print("\n" * bool(number) + shown(text), end="", flush=True)
        for written in generator([text], show_new):
            failed += _report(written.error, f"prompt {number + 1}")
        print()
    for number, written in enumerate(() if stream else generator(texts)):
        failed += _report(written.error, f"prompt {number + 1}")
        if as_json:
            line = {"prompt": written.prompt, "text": written.text, "tokens": written.tokens}
            line |= {} if written.trace is None else {"trace": written.trace}
            print(_as_json(line | ({} if written.error is None else {"error": written.error})), flush=True)
        elif written.error is None:
            _show(console, written.prompt, written.text, written.continues_prompt, len(texts) > 1)
            for row in explained(written.trace) if written.trace else ():
                console.print(row, soft_wrap=True)
    for note in generator.notes:
        _note(f"note: {note}")
    if failed:
        raise typer.Exit(1)


@app.command()
def demo(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    strategies: Annotated[str | None, typer.Option("--strategies", "-s", help="By commas, as of eval.")] = None,
    top_k: TopK = 4,
    penalty_alpha: PenaltyAlpha = 0.6,
    max_new_tokens: MaxNewTokens = 128,
    seed: Annotated[int, typer.Option(help="Seed of the strategies that draw.")] = 0,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Greedy search, nucleus sampling, contrastive search and its successors side by side, on a model that comes with
    the package."""
    _check_search(penalty_alpha, top_k, max_new_tokens)
    _check(0 <= seed < 2**63, "--seed", seed, "from 0 to 2**63 - 1")
    name = _the_model(model, model_option, default="bundled")
    with _progress("loading the model"):
        from .evaluation.demo import PROMPTS, STRATEGIES, compare, legend, next_steps, render, verdict
        from .evaluation.settings import parse_settings
        from .loading import load_model

        _quiet_transformers()
        settings = parse_settings(
            strategies or STRATEGIES, contrastive={"penalty_alpha": penalty_alpha, "top_k": top_k}
        )
        loaded, tokenizer = load_model(name, device, trust_remote_code=trust_remote_code)
    with _progress("writing", total=len(PROMPTS) * len(settings)) as advance:
        comparisons = compare(
            loaded, tokenizer, settings=settings, max_new_tokens=max_new_tokens, seed=seed, on_progress=advance
        )
    console = Console(highlight=False, markup=False)
    render(comparisons, console)
    console.print(legend())
    console.print(verdict(comparisons), style="bold")
    console.print(shown(next_steps(name)), soft_wrap=True)


@app.command()
def train(
    ctx: typer.Context,
    data: Annotated[str, typer.Option(help="Texts: .txt, one a line; or .jsonl with text, or source and target.")],
    out: Annotated[str, typer.Option(help="Folder of the run; that of an unfinished run is continued.")],
    model: ModelArgument = None,
    model_option: ModelOption = None,
    validation: Annotated[str | None, typer.Option(help="Held-out texts, as --data.")] = None,
    loss: Annotated[
        str, typer.Option(help="Beside the likelihood: simctg (contrastive), contraclm (token level) or cosreg.")
    ] = "simctg",
    margin: Annotated[float | None, typer.Option(help="Of simctg, -1 to 1; by default 0.5.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of contraclm; by default 0.05.")] = None,
    reduction: Annotated[
        str | None,
        typer.Option(help="Of simctg: pairs (default), paper or dense; of contraclm: sequences (default) or tokens."),
    ] = None,
    contrastive_weight: Annotated[
        float, typer.Option(help="Factor of the loss beside the likelihood; 0: likelihood alone.")
    ] = 1.0,
    max_length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 256,
    pack: Annotated[bool, typer.Option("--pack", help="Join short texts into sequences of full length.")] = False,
    batch_size: Annotated[int, typer.Option(help="Sequences computed together.")] = 8,
    accumulation: Annotated[int, typer.Option("--accumulate", help="Batches an optimizer step.")] = 1,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of --epochs.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Highest; falls linearly to zero.")] = 5e-5,
    warmup_steps: Annotated[int, typer.Option(help="Steps over which the learning rate rises.")] = 0,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    log_every: Annotated[int, typer.Option(help="Steps between log lines.")] = 10,
    keep: Annotated[int, typer.Option(help="Checkpoints kept.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the order of the data and of dropout.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default the GPU if there is one.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what the folder holds of a run.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Fine-tune a model with likelihood and a contrastive loss. A run that was killed goes on when started again."""
    name = _the_model(model, model_option)
    with _progress("loading"):  # torch, transformers and accelerate: seconds
        from .training.run import TrainingOptions, last_checkpoint
        from .training.run import train as run

        options = TrainingOptions(**_chosen(ctx, *(field.name for field in fields(TrainingOptions))))
        _quiet_transformers()
    try:
        summary = run(
            name,
            data,
            out,
            options,
            on_note=_note,
            loading=_progress("loading the model"),
            **_chosen(ctx, "validation", "restart", "device", "save_every", "log_every", "keep", "trust_remote_code"),
        )
    except KeyboardInterrupt as error:
        checkpoint = last_checkpoint(out)
        where = "begins again" if checkpoint is None else f"goes on from step {checkpoint.name.rpartition('-')[2]}"
        _note(f"stopped; the same command {'without --restart ' if restart and checkpoint else ''}{where}")
        raise typer.Exit(signal_code(error)) from error
    before, after = summary.isotropy_before, summary.isotropy_after
    line = f"{summary.folder}: {summary.steps} steps, isotropy {before:.3f} before and {after:.3f} after"
    if "eval_loss" in summary.validation:
        line += f", validation loss {summary.validation['eval_loss']:.4f}"
    _say(line)


@app.command()
def run(
    ctx: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] PROMPTS",
            help="JSONL file: id and prompt, messages or source a line; or .txt, a prompt a line; .gz, .zst; -: stdin.",
        ),
    ] = None,
    model: ModelOption = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="JSONL file, continued if it is there; {shard} is its shard; - for stdout."
        ),
    ] = None,
    config: Annotated[str | None, typer.Option("--config", help="YAML file with these options; the line wins.")] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help=f"{_listed(STRATEGIES)}; by default contrastive. Or several of {', '.join(TOGETHER)}, by commas: "
            "lines may name theirs, others have the first."
        ),
    ] = None,
    penalty_alpha: Annotated[float | None, typer.Option("--penalty-alpha", "-a", help="0 (greedy) to 1.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", "-k", help="Candidates a step; of sample: tokens.")] = None,
    center: Center = False,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", "-n", help="Longest continuation.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the random strategies; 0: the best.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of sample, above 0, at most 1.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Of sample, 0 to 1.")] = None,
    typical_p: Annotated[float | None, typer.Option(help="Of sample, above 0, at most 1.")] = None,
    fsd_n: FsdN = None,
    fsd_beta: FsdBeta = None,
    fsd_stop_tokens: FsdStopTokens = None,
    adaptive_q: AdaptiveQ = None,
    adaptive_k_range: AdaptiveKRange = None,
    guard_window: GuardWindow = None,
    guard_decay: GuardDecay = None,
    n: Annotated[int | None, typer.Option("--samples", help="Continuations of each prompt (n of a line).")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    dry_multiplier: DryMultiplier = None,
    dry_base: DryBase = None,
    dry_allowed_length: DryAllowedLength = None,
    dry_sequence_breakers: DrySequenceBreakers = None,
    dry_penalty_range: DryPenaltyRange = None,
    truncate_prompt_tokens: Annotated[
        int | None, typer.Option(help="Keep so many tokens of longer prompts; -1: what the context leaves.")
    ] = None,
    clamp_max_new_tokens: Annotated[
        bool, typer.Option("--clamp-max-new-tokens", help="Write less where the context ends, instead of refusing.")
    ] = False,
    changed: Annotated[
        str, typer.Option(help="Lines that are not what was answered: refuse (default), again or keep.")
    ] = "refuse",
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Answer what has error records again.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of the random strategies.")] = None,
    slots: Annotated[int | None, typer.Option(help="Sequences written at a time.")] = None,
    memory: Annotated[float | None, typer.Option(help="Instead: share of the free memory for caches, 0 to 1.")] = None,
    batching: Annotated[str | None, typer.Option(help="auto (default), slots or static.")] = None,
    share_prefixes: Annotated[
        bool, typer.Option(help="Copy what prompts have in common, 64 tokens or more, or run each one whole.")
    ] = True,
    processor: Annotated[
        str | None, typer.Option(help="module:factory that makes the logits processors of a request.")
    ] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Log-probabilities of the tokens.")] = False,
    top_logprobs: Annotated[int | None, typer.Option(help="And of so many of the most probable ones, to 20.")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="The candidates of every token, and why one won.")] = False,
    num_shards: Annotated[int | None, typer.Option(help="Answer only every num_shards-th line …")] = None,
    shard_id: Annotated[int | None, typer.Option(help="… beginning with this one, from 0.")] = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16, bfloat16, or auto: as the config says.")] = None,
    weights: Weights = None,
    ray: Annotated[
        bool, typer.Option("--ray", help=r"Spread over a Ray cluster (pip install 'simctg_fast\[ray]').")
    ] = False,
    ray_address: Annotated[
        str | None, typer.Option(help="Of a running cluster; by default one is started here.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Engines on the Ray cluster.")] = 1,
    log_json: Annotated[bool, typer.Option("--log-json", help="Progress as JSON lines on standard error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer the prompts of a file into a file. Killed, it goes on where it was when started again.

    Exit code: 0 all answered, 1 some lines have error records, 2 refused to start, 3 the output could not be written,
    130 or 143 stopped by SIGINT or SIGTERM, 141 nobody reads standard output any more.
    """
    name, prompts = _model_before(arguments, model, config and "") if arguments else (model, None)
    _check(workers >= 1, "--workers", workers, "at least 1")
    with _progress("starting"):
        from .engine.job.job import OPTION_NAMES, Job, make_options, read_config
        from .engine.job.journal import JournalError
        from .engine.job.manifest import ManifestError

        _quiet_transformers()
        flags = _chosen(ctx, *(option for option in OPTION_NAMES if _is_on_the_line(ctx, option)))
        flags |= {"model": name} if name else {}
        flags |= {} if prompts is None else {"input": prompts}
        options = make_options((read_config(config) if config else {}) | flags)
    settings = _chosen(ctx, "changed", "retry_errors", "log_json", "quiet")
    if options.output == "-" and was_closed():
        raise typer.BadParameter("--output is -, but standard output is closed")
    try:
        if ray:
            from .integrations.ray import run_on_ray

            summary = run_on_ray(options, workers=workers, address=ray_address, **settings)
        else:
            summary = Job(options, **settings, loading=_progress("loading the model")).run()
    except (JournalError, ManifestError) as error:  # refused, whatever the system said
        raise typer.BadParameter(str(error)) from error
    _show_summary(summary)
    raise typer.Exit(summary.exit_code)


@app.command()
def merge(
    outputs: Annotated[list[str], typer.Argument(metavar="OUTPUT...", help="Files that the shards of a run wrote.")],
    into: Annotated[str, typer.Option("--into", "-o", help="The new file.")],
    order: Annotated[str | None, typer.Option(help="The input file, whose order to take; else sorted by id.")] = None,
) -> None:
    """Join the outputs of a run's shards into one file."""
    from .checks import user_path
    from .engine.job.merge import merge as join

    target = user_path(into)
    try:
        count = join(outputs, into, order)
    except FileExistsError as error:
        raise typer.BadParameter(f"--into {target} is there already") from error
    _say(f"{target}: {count} records")


@app.command()
def features(
    texts: Annotated[
        list[str],
        typer.Argument(metavar="[MODEL] IN", help="Texts: .jsonl with text, or .txt, one a line; - is standard input."),
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="The .safetensors file to write.")],
    model_option: ModelOption = None,
    layer: Annotated[int, typer.Option(help="0: embeddings, 1: first layer, …, -1: last.")] = -1,
    pooling: Annotated[str, typer.Option(help="none (every token), mean, cls (first token) or last.")] = "none",
    max_length: Annotated[int | None, typer.Option(help="Cut longer texts to so many tokens.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens computed together, padding included.")] = 4096,
    dtype: Annotated[str, typer.Option(help="Of the file: float32, float16 or bfloat16.")] = "float32",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write hidden states of texts: `features` and `lengths` of a safetensors file."""
    _check(dtype in ("float32", "float16", "bfloat16"), "--dtype", dtype, "float32, float16 or bfloat16")
    model, source = _model_before(texts, model_option, default="bundled")
    with _progress("loading the model"):
        import torch

        from .text.feature_file import free_target
        from .text.features import extract_features, load_backbone, read_texts

        lines = read_texts(source)
        free_target(out)
        _quiet_transformers()
        loaded, tokenizer = load_backbone(model, device, trust_remote_code=trust_remote_code)
    with _progress("reading", total=len(lines)) as advance:
        written = extract_features(
            loaded,
            tokenizer,
            lines,
            layer,
            pooling,
            max_length=max_length,
            max_tokens=batch_tokens,
            dtype=getattr(torch, dtype),
            out=out,
            metadata={"model": printable(model)},
            on_progress=lambda count: [advance() for _ in range(count)],
        )
    shape = "x".join(map(str, written.values.shape))
    line = f"{out}: {len(written)} texts, {int(written.lengths.sum())} tokens, features {shape} {dtype}"
    if written.truncated:
        line += f", {len(written.truncated)} texts cut to {max_length} tokens"
    _say(line)


@app.command("eval")
def evaluate(
    ctx: typer.Context,
    model: ModelArgument = None,
    model_option: ModelOption = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="JSONL: prompt, messages or source, and reference; or .txt; by default Python's own manual."),
    ] = None,
    references: Annotated[
        str | None, typer.Option(help="Human continuations: JSONL of reference, by id or in order; or .txt.")
    ] = None,
    strategies: Annotated[
        str | None,
        typer.Option(
            "--strategies",
            "-s",
            help="Some of greedy, beam, nucleus, typical, contrastive, centered, adaptive, fsd, fsd-vec, guard, dry "
            "(default: all), by commas; with settings as in contrastive:penalty_alpha=0.4:top_k=6.",
        ),
    ] = None,
    alpha_grid: Annotated[
        str | None, typer.Option(help="Values of penalty_alpha that contrastive search is tried with, by commas …")
    ] = None,
    k_grid: Annotated[str | None, typer.Option(help="… each with each of these values of top_k.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    limit: Annotated[int | None, typer.Option(help="Only so many prompts; of the manual: 100.")] = None,
    scorer: Annotated[
        str | None, typer.Option(help="Model that says how probable texts are; by default the one that wrote them.")
    ] = None,
    embedder: Annotated[
        str | None, typer.Option(help="Folder of a sentence encoder, for coherence as a cosine.")
    ] = None,
    mauve: Annotated[
        str | None, typer.Option(help=r"Folder of the model whose features MAUVE takes (simctg_fast\[mauve]).")
    ] = None,
    paper_compatible: Annotated[
        bool, typer.Option("--paper-compatible", help="Also the diversity of the papers' script, quirks included.")
    ] = False,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Folder; by default eval-MODEL.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away what the folder holds.")] = False,
    seed: Annotated[int, typer.Option(help="Of the strategies that draw.")] = 0,
    slots: Annotated[int, typer.Option(help="Texts written at a time.")] = 16,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare strategies on one model: diversity, coherence, speed; a table, JSON, CSV and an HTML report.

    Stopped, the same command goes on with the strategies that are missing. Exit code 1: some texts are missing.
    """
    _check(max_new_tokens >= 1, "--max-new-tokens", max_new_tokens, "at least 1")
    _check(limit is None or limit >= 1, "--limit", limit, "at least 1")
    _check(0 <= seed < 2**63, "--seed", seed, "from 0 to 2**63 - 1")
    _check(slots >= 1, "--slots", slots, "at least 1")
    _check_dtype(dtype)
    name = _the_model(model, model_option, default="bundled")
    with _progress("starting"):
        from .evaluation.console import is_complete, notes, show
        from .evaluation.output import FILES
        from .evaluation.run import Request, run

        _quiet_transformers()
        chosen = _chosen(ctx, *(field.name for field in fields(Request) if field.name in ctx.params))
        request = Request(**{k: v for k, v in chosen.items() if v is not None} | {"model": name})
    found, folder = run(request, _progress("loading the model"), lambda total: _progress("writing", total=total))
    show(found, Console(highlight=False, markup=False))
    for note in notes(found):
        _note(f"note: {note}")
    _say(f"{folder}: {', '.join(FILES)}")
    if not is_complete(found):
        raise typer.Exit(1)


@app.command()
def isotropy(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    text: Annotated[
        str | None, typer.Option(help="Texts: .txt, one a line, or .jsonl with text; by default Python's own manual.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Picture of the cosines, .svg or .png; by default none.")
    ] = None,
    pilot: Annotated[bool, typer.Option(help="Let the model write with several strategies, for a verdict.")] = True,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """How alike a model's hidden states are, layer by layer, and whether contrastive search suits it as it stands."""
    _check_dtype(dtype)
    name = _the_model(model, model_option, default="bundled")
    with _states([name], text, out, pilot, device, dtype, trust_remote_code) as (found,):
        if found.pilot is not None and found.verdict is not None:
            from .evaluation.console import show

            show(found.pilot | {"conclusion": found.verdict.sentences}, Console(highlight=False, markup=False))


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(metavar="BEFORE AFTER", help="Local folders, hub names, `bundled`.")],
    text: Annotated[
        str | None, typer.Option(help="Texts: .txt, one a line, or .jsonl with text; by default Python's own manual.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Picture of both models' cosines, side by side, .svg.")
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """The hidden states of two models on the same texts, as before and after contrastive training."""
    _check(len(models) == 2, "BEFORE AFTER", " ".join(models), "two models")
    _check(out is None or out.lower().endswith(".svg"), "--out", out, "a file that ends in .svg")
    _check_dtype(dtype)
    with _states(models, text, out, False, device, dtype, trust_remote_code) as (before, after):
        console = Console(highlight=False, markup=False)
        line = f"isotropy of the last layer: {before.layers[-1]:.3f} before, {after.layers[-1]:.3f} after"
        console.print(line, soft_wrap=not console.is_terminal)


@contextmanager
def _states(models: list[str], text: str | None, out: str | None, pilot: bool, *loaded: Any) -> Iterator[list[Any]]:
    """What `measure` finds of each model, printed layer by layer; drawn when the rest has been said: of picture and
    text neither is lost where the other cannot be written."""
    device, dtype, trust_remote_code = loaded
    with _progress("starting"):
        from .evaluation.isotropy import checked_picture, draw, measure
        from .evaluation.verdict import layers_table

        _quiet_transformers()
        picture = None if out is None else checked_picture(out)
    found = [
        measure(
            name,
            text,
            pilot=pilot,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            loading=_progress("loading the model"),
            writing=lambda total: _progress("writing", total=total),
        )
        for name in models
    ]
    try:
        for line in layers_table({each.name: each.layers for each in found}):
            _say(line)
        yield found
    finally:
        if picture is not None:
            draw(found, picture)
    if picture is not None:
        _say(f"{picture}: cosines of the last layer's states, one text of {len(found[0].cosines)} tokens")


@app.command()
def env() -> None:
    """Versions, processors and backends, and the real error of what did not load."""
    from .ops._backends import backend_info

    info = backend_info(probe=True)
    console = Console(highlight=False, markup=False)
    width = max(map(len, info))
    for name, value in info.items():
        if name.endswith("_error") and value is None:
            continue
        text = printable(_describe(value)).replace("\n", "\n" + " " * (width + 2))
        console.print(f"{name:{width}}  {text}", soft_wrap=True)


def main() -> None:
    """Entry point of `simctg-fast`."""
    try:
        app()
    finally:  # another Ctrl-C, while Python takes itself down, ends it without a traceback
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _chosen(ctx: typer.Context, *names: str) -> dict[str, Any]:
    """What a command was told of these options, by their names in Python."""
    return {name: ctx.params[name] for name in names}


def _is_on_the_line(ctx: typer.Context, name: str) -> bool:
    """Whether somebody wrote this option, and its value is no default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _the_model(argument: str | None, option: str | None, default: str | None = None) -> str:
    """The model's name, which every command takes behind its own name or by --model."""
    if argument is not None and option is not None and argument != option:
        raise typer.BadParameter(f"MODEL is {argument!r}, --model is {option!r}: give one of them")
    chosen = next((name for name in (option, argument, default) if name is not None), None)
    if chosen is None:
        raise typer.BadParameter("no model: name one as MODEL or by --model; 'bundled' comes with the package")
    return chosen


def _model_before(arguments: list[str], option: str | None, default: str | None = None) -> tuple[str, str]:
    """``(model, file)`` of a command that takes ``[MODEL] FILE``: of one argument alone, that is the file."""
    if len(arguments) > 2:
        raise typer.BadParameter(f"one model and one file at most, got {len(arguments)} arguments: {arguments}")
    model = arguments[0] if len(arguments) == 2 else None
    return _the_model(model, option, default), arguments[-1]


def _check(valid: bool, option: str, value: object, allowed: str) -> None:
    if not valid:
        raise typer.BadParameter(f"{option} must be {allowed}, got {value}")


def _check_dtype(dtype: str) -> None:
    _check(dtype in ("auto", "float32", "float16", "bfloat16"), "--dtype", dtype, "float32, float16, bfloat16 or auto")


def _check_search(penalty_alpha: float | None, top_k: int | None, max_new_tokens: int) -> None:
    alpha_is_right = penalty_alpha is None or 0.0 <= penalty_alpha <= 1.0
    _check(alpha_is_right, "--penalty-alpha", penalty_alpha, "between 0 and 1")
    _check(top_k is None or top_k >= 1, "--top-k", top_k, "at least 1")
    _check(max_new_tokens >= 1, "--max-new-tokens", max_new_tokens, "at least 1")


def _show_summary(summary: Any) -> None:
    """For a person on a terminal, as JSON to a program; nothing to one that has stopped reading."""
    if summary.closed_pipe:
        return
    if sys.stderr.isatty():
        _note(summary.as_text())
    else:
        if summary.stopped is not None:
            _note(f"{summary.stopped}; {summary.way_on}")
        if summary.unfinished_line is not None:
            _note(f"line {summary.unfinished_line} of the input is unfinished and was left for the next run")
    if summary.output == "-":
        if not sys.stderr.isatty():
            _note(json.dumps(summary.as_dict()))
    elif not sys.stdout.isatty():
        _say(json.dumps(summary.as_dict()))


def _read_prompts(prompts: list[str]) -> tuple[list[str], int]:
    """Prompts that can be continued, and how many lines of standard input were none."""
    if prompts:
        texts, failed = [_from_shell(prompt) for prompt in prompts if prompt.strip()], 0
    elif sys.stdin is None or sys.stdin.isatty():
        raise typer.BadParameter("no prompt: give at least one behind MODEL, or pipe prompts in, one a line")
    else:
        from .text.files import STDIN, TextLines, is_utf8

        texts, failed = [], 0
        for number, line in TextLines(STDIN):
            if not is_utf8(line):
                failed += _report("it is not UTF-8", f"line {number} of standard input")
            elif line.strip():
                texts.append(line.removesuffix("\n"))
    if not texts and not failed:
        raise typer.BadParameter("every prompt is empty; give at least one with text")
    return texts, failed


def _from_shell(argument: str) -> str:
    """An argument as UTF-8, also where the locale is another and Python has put surrogates in the place of bytes."""
    try:
        return os.fsencode(argument).decode(errors="surrogateescape")
    except UnicodeEncodeError:
        return argument


def _as_json(record: dict[str, Any]) -> str:
    """One line of JSON, with the characters that standard output has and escapes for the others."""
    text = json_text(record)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return json.dumps(record)
    return text


def _report(error: str | None, what: str) -> int:
    """One line on standard error for what could not be done; how many that are."""
    if error is None:
        return 0
    _note(f"{what}: {error}")
    return 1


def _say(line: str) -> None:
    """A line on standard output about work that is done and lies in a file: no loss where that was closed."""
    if not was_closed():
        print(shown(line))


def _note(line: str) -> None:
    """A line on standard error."""
    print(printable(line), file=sys.stderr, flush=True)


@contextmanager
def _progress(what: str, total: int | None = None) -> Iterator[Any]:
    """A bar on standard error while something runs, where that is a terminal."""
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def _quiet_transformers() -> None:
    """Progress bars of loading, retries and advice to developers do not belong between the user's lines."""
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _show(console: Console, prompt: str, text: str, continues_prompt: bool, rule: bool) -> None:
    """The prompt in bold and its continuation on a terminal; elsewhere plain text, an empty line between answers."""
    if console.is_terminal:
        from rich.text import Text

        line = Text(printable(prompt), style="bold")
        line.append("" if continues_prompt else "\n").append(printable(text), style="not bold")
        console.print(line)
    else:  # not by rich, which drops some characters
        print(prompt + text if continues_prompt else text, file=console.file)
    if rule:
        console.print()


def _describe(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


if __name__ == "__main__":
    main()
