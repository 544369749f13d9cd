"""The command line: `simctg-fast generate | run | merge | features | demo | train | env`.

Arguments in, text out; the floors below do the work.

Only typer and rich are imported here, so that help and usage errors come at once; each command imports what it needs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

__all__ = ["app", "main"]

app = typer.Typer(
    name="simctg-fast",
    help="Contrastive search and contrastive training for Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Local folder, hub name, or `bundled`.")]
PenaltyAlpha = Annotated[
    float, typer.Option("--penalty-alpha", "-a", help="Weight of the degeneration penalty, 0 (greedy) to 1.")
]
TopK = Annotated[int, typer.Option("--top-k", "-k", help="Candidates a step, at least 1.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Longest continuation, in tokens.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; by default the first GPU if there is one.")]


@app.command()
def generate(
    model: ModelName,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Texts to continue; else stdin, one a line.")
    ] = None,
    top_k: TopK = 4,
    penalty_alpha: PenaltyAlpha = 0.6,
    max_new_tokens: MaxNewTokens = 128,
    stream: Annotated[bool, typer.Option("--stream", help="Show the text as it is written, prompt by prompt.")] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Draw among the candidates instead of taking the best; above 0.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws of --temperature.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop behind this text; may be repeated.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts continued together.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line: prompt, text, tokens.")] = False,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16, or auto: as the config says.")] = "auto",
) -> None:
    """Continue prompts by contrastive search."""
    _check_search(penalty_alpha, top_k, max_new_tokens)
    _check(batch_size >= 1, "--batch-size", batch_size, "at least 1")
    _check(temperature is None or temperature > 0, "--temperature", temperature, "above 0")
    _check(seed is None or seed >= 0, "--seed", seed, "at least 0")
    _check(seed is None or temperature is not None, "--seed", seed, "given together with --temperature")
    _check(dtype in ("auto", "float32", "float16", "bfloat16"), "--dtype", dtype, "float32, float16, bfloat16 or auto")
    if stream and as_json:
        raise typer.BadParameter("--stream shows text as it is written; it cannot be combined with --json")
    texts = _read_prompts(prompts)

    with _usage_errors():
        from .text_generation import TextGenerator

        _quiet_transformers()
        generator = TextGenerator(
            model,
            penalty_alpha=penalty_alpha,
            top_k=top_k,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop_strings=stop,
            device=device,
            dtype=dtype,
        )
        console = Console(highlight=False, markup=False)
        if stream:
            for number, text in enumerate(texts):
                if number:
                    print()
                generator.stream(text)
            return
        for start in range(0, len(texts), batch_size):
            for written in generator(texts[start : start + batch_size]):
                if as_json:
                    line = {"prompt": written.prompt, "text": written.text, "tokens": written.tokens}
                    print(json.dumps(line, ensure_ascii=False), flush=True)
                else:
                    _show(console, written.prompt, written.text, written.continues_prompt, len(texts) > 1)
    for note in generator.notes:
        Console(stderr=True, highlight=False, markup=False).print(f"note: {note}", soft_wrap=True)


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="Local folder, hub name, or `bundled`.")] = "bundled",
    top_k: TopK = 4,
    penalty_alpha: PenaltyAlpha = 0.6,
    max_new_tokens: MaxNewTokens = 128,
    seed: Annotated[int, typer.Option(help="Seed of nucleus sampling.")] = 0,
    device: Device = None,
) -> None:
    """Greedy search, nucleus sampling and contrastive search side by side, on a model that comes with the package."""
    _check_search(penalty_alpha, top_k, max_new_tokens)
    _check(seed >= 0, "--seed", seed, "at least 0")
    console = Console(highlight=False)
    with _usage_errors():
        with _progress("loading the model"):
            from .demo import METHODS, PROMPTS, compare, next_steps, render, verdict
            from .loading import load_model

            _quiet_transformers()
            loaded, tokenizer = load_model(model, device)
        with _progress("writing", total=len(PROMPTS) * len(METHODS)) as advance:
            comparisons = compare(
                loaded,
                tokenizer,
                penalty_alpha=penalty_alpha,
                top_k=top_k,
                max_new_tokens=max_new_tokens,
                seed=seed,
                on_progress=advance,
            )
    render(comparisons, console)
    console.print(verdict(comparisons), style="bold", markup=False, soft_wrap=True)
    console.print(next_steps(model), markup=False, soft_wrap=True)


@app.command()
def train(
    model: ModelName,
    data: Annotated[str, typer.Option(help="Texts: .txt, one a line; or .jsonl with text, or source and target.")],
    out: Annotated[str, typer.Option(help="Folder of the run; that of an unfinished run is continued.")],
    validation: Annotated[str | None, typer.Option(help="Held-out texts, as --data.")] = None,
    margin: Annotated[float, typer.Option(help="Of the contrastive loss, -1 to 1.")] = 0.5,
    reduction: Annotated[str, typer.Option(help="Of the contrastive loss: pairs, paper or dense.")] = "pairs",
    contrastive_weight: Annotated[
        float, typer.Option(help="Factor of the contrastive loss; 0: likelihood alone.")
    ] = 1.0,
    max_length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 256,
    pack: Annotated[bool, typer.Option("--pack", help="Join short texts into sequences of full length.")] = False,
    batch_size: Annotated[int, typer.Option(help="Sequences computed together.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches an optimizer step.")] = 1,
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
) -> None:
    """Fine-tune a model with likelihood and contrastive loss. A run that was killed goes on when started again."""
    console = Console(stderr=True, highlight=False, markup=False)
    with _usage_errors():
        from .training import TrainingOptions
        from .training import train as run

        options = TrainingOptions(
            margin=margin,
            reduction=reduction,
            contrastive_weight=contrastive_weight,
            max_length=max_length,
            pack=pack,
            batch_size=batch_size,
            accumulation=accumulate,
            epochs=epochs,
            steps=steps,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            seed=seed,
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
        )
        _quiet_transformers()
        try:
            summary = run(
                model,
                data,
                out,
                options,
                validation=validation,
                restart=restart,
                device=device,
                save_every=save_every,
                log_every=log_every,
                keep=keep,
                on_note=lambda text: console.print(text, soft_wrap=True),
            )
        except ImportError as error:
            raise typer.BadParameter(str(error)) from error
    before, after = summary.isotropy_before, summary.isotropy_after
    line = f"{summary.folder}: {summary.steps} steps, isotropy {before:.3f} before and {after:.3f} after"
    if "eval_loss" in summary.validation:
        line += f", validation loss {summary.validation['eval_loss']:.4f}"
    Console(highlight=False, markup=False).print(line, soft_wrap=True)


@app.command()
def run(
    prompts: Annotated[
        str | None, typer.Argument(metavar="[PROMPTS]", help="JSONL file: id and prompt, messages or source a line.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Local folder, hub name, or `bundled`.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="JSONL file, continued if it is there; {shard} is its shard.")
    ] = None,
    config: Annotated[str | None, typer.Option("--config", help="YAML file with these options; the line wins.")] = None,
    strategy: Annotated[
        str | None, typer.Option(help="contrastive (default), greedy, sample or stochastic-contrastive.")
    ] = None,
    penalty_alpha: Annotated[float | None, typer.Option("--penalty-alpha", "-a", help="0 (greedy) to 1.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", "-k", help="Candidates a step; of sample: tokens.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", "-n", help="Longest continuation.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the random strategies, above 0.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of sample, above 0, at most 1.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Of sample, 0 to 1.")] = None,
    typical_p: Annotated[float | None, typer.Option(help="Of sample, above 0, at most 1.")] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Continuations of each prompt (n of a line).")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random strategies.")] = None,
    slots: Annotated[int | None, typer.Option(help="Sequences written at a time.")] = None,
    memory: Annotated[float | None, typer.Option(help="Instead: share of the free memory for caches, 0 to 1.")] = None,
    batching: Annotated[str | None, typer.Option(help="auto (default), slots or static.")] = None,
    processor: Annotated[
        str | None, typer.Option(help="module:factory that makes the logits processors of a request.")
    ] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Log-probabilities of the tokens.")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="The candidates of every token, and why one won.")] = False,
    num_shards: Annotated[int | None, typer.Option(help="Answer only every num_shards-th line …")] = None,
    shard_id: Annotated[int | None, typer.Option(help="… beginning with this one, from 0.")] = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16, bfloat16, or auto: as the config says.")] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help=r"Spread over a Ray cluster (pip install 'simctg_fast\[ray]').")
    ] = False,
    ray_address: Annotated[
        str | None, typer.Option(help="Of a running cluster; by default one is started here.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Engines on the Ray cluster.")] = 1,
    log_json: Annotated[bool, typer.Option("--log-json", help="Progress as JSON lines on standard error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Answer the prompts of a file into a file. Killed, it goes on where it was when started again.

    Exit code: 0 all answered, 1 some lines have error records, 2 refused to start, 3 the output could not be written,
    130 or 143 stopped by SIGINT or SIGTERM.
    """
    given: dict[str, Any] = {
        "input": prompts,
        "model": model,
        "output": output,
        "strategy": strategy,
        "penalty_alpha": penalty_alpha,
        "top_k": top_k,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "min_p": min_p,
        "typical_p": typical_p,
        "n": samples,
        "stop": stop or None,
        "seed": seed,
        "slots": slots,
        "memory": memory,
        "batching": batching,
        "processor": processor,
        "logprobs": logprobs or None,
        "trace": trace or None,
        "num_shards": num_shards,
        "shard_id": shard_id,
        "device": device,
        "dtype": dtype,
    }
    _check(workers >= 1, "--workers", workers, "at least 1")
    with _usage_errors(), _progress("starting"):
        from .engine.job import Job, make_options, read_config
        from .engine.journal import JournalError
        from .engine.manifest import ManifestError

        _quiet_transformers()
        options = make_options(
            (read_config(config) if config else {}) | {n: v for n, v in given.items() if v is not None}
        )
    try:
        with _usage_errors():
            if ray:
                from .integrations.ray import run_on_ray

                summary = run_on_ray(options, workers=workers, address=ray_address, log_json=log_json, quiet=quiet)
            else:
                summary = Job(options, log_json=log_json, quiet=quiet, loading=_progress("loading the model")).run()
    except (JournalError, ManifestError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error
    if sys.stderr.isatty():
        Console(stderr=True, highlight=False, markup=False).print(summary.as_text(), soft_wrap=True)
    elif summary.stopped is not None:
        print(f"{summary.stopped}; the same command goes on from here", file=sys.stderr)
    if not sys.stdout.isatty():
        print(json.dumps(summary.as_dict()), flush=True)
    raise typer.Exit(summary.exit_code)


@app.command()
def merge(
    outputs: Annotated[list[str], typer.Argument(metavar="OUTPUT...", help="Files that the shards of a run wrote.")],
    into: Annotated[str, typer.Option("--into", "-o", help="The new file.")],
    order: Annotated[str | None, typer.Option(help="The input file, whose order to take; else sorted by id.")] = None,
) -> None:
    """Join the outputs of a run's shards into one file."""
    with _usage_errors():
        from .engine.merge import merge as join

        try:
            count = join(outputs, into, order)
        except FileExistsError as error:
            raise typer.BadParameter(f"--into {into} is there already") from error
    Console(highlight=False, markup=False).print(f"{into}: {count} records", soft_wrap=True)


@app.command()
def features(
    texts: Annotated[str, typer.Argument(metavar="IN", help="Texts: .jsonl with text, or .txt, one a line.")],
    out: Annotated[str, typer.Option("--out", "-o", help="The .safetensors file to write.")],
    model: Annotated[str, typer.Option(help="Local folder, hub name, or `bundled`.")] = "bundled",
    layer: Annotated[int, typer.Option(help="0: embeddings, 1: first layer, …, -1: last.")] = -1,
    pooling: Annotated[str, typer.Option(help="none (every token), mean, cls (first token) or last.")] = "none",
    max_length: Annotated[int | None, typer.Option(help="Cut longer texts to so many tokens.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens computed together, padding included.")] = 4096,
    dtype: Annotated[str, typer.Option(help="Of the file: float32, float16 or bfloat16.")] = "float32",
    device: Device = None,
) -> None:
    """Write hidden states of texts: `features` and `lengths` of a safetensors file."""
    _check(dtype in ("float32", "float16", "bfloat16"), "--dtype", dtype, "float32, float16 or bfloat16")
    with _usage_errors():
        import torch

        from .features import extract_features, load_backbone, read_texts

        lines = read_texts(texts)
        _quiet_transformers()
        loaded, tokenizer = load_backbone(model, device)
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
                metadata={"model": model},
                on_progress=lambda count: [advance() for _ in range(count)],
            )
    shape = "x".join(map(str, written.values.shape))
    line = f"{out}: {len(written)} texts, {int(written.lengths.sum())} tokens, features {shape} {dtype}"
    if written.truncated:
        line += f", {len(written.truncated)} texts cut to {max_length} tokens"
    Console(highlight=False, markup=False).print(line, soft_wrap=True)


@app.command()
def env() -> None:
    """Versions, processors and backends, and the real error of what did not load."""
    from .ops._backends import backend_info

    info = backend_info()
    console = Console(highlight=False, markup=False)
    width = max(map(len, info))
    for name, value in info.items():
        if name.endswith("_error") and value is None:
            continue
        console.print(f"{name:{width}}  {_describe(value)}", soft_wrap=True)


def main() -> None:
    """Entry point of `simctg-fast`."""
    app()


def _check(valid: bool, option: str, value: object, allowed: str) -> None:
    if not valid:
        raise typer.BadParameter(f"{option} must be {allowed}, got {value}")


def _check_search(penalty_alpha: float, top_k: int, max_new_tokens: int) -> None:
    _check(0.0 <= penalty_alpha <= 1.0, "--penalty-alpha", penalty_alpha, "between 0 and 1")
    _check(top_k >= 1, "--top-k", top_k, "at least 1")
    _check(max_new_tokens >= 1, "--max-new-tokens", max_new_tokens, "at least 1")


def _read_prompts(prompts: list[str] | None) -> list[str]:
    if prompts:
        texts = [prompt for prompt in prompts if prompt.strip()]
    elif sys.stdin is None or sys.stdin.isatty():
        raise typer.BadParameter("no prompt: give at least one behind MODEL, or pipe prompts in, one a line")
    else:
        texts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise typer.BadParameter("every prompt is empty; give at least one with text")
    return texts


@contextmanager
def _usage_errors() -> Iterator[None]:
    """What the user can put right (a name, a value, a missing file) becomes one line and exit code 2."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    except OSError as error:  # transformers: not on the hub, no connection, files that are not a model
        raise typer.BadParameter(f"the model cannot be loaded: {error}") from error


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
    from rich.text import Text

    shown = Text(prompt, style="bold") if continues_prompt or console.is_terminal else Text()
    shown.append("\n" if shown and not continues_prompt else "")
    shown.append(text, style="not bold")
    console.print(shown, soft_wrap=not console.is_terminal)
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
