"""A job: prompts in a file, completions in a file, nothing lost. Start it again and it goes on."""

from __future__ import annotations

import itertools
import logging
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..assets import resolve_model
from .engine import Engine, check_options
from .inputs import InputLines
from .journal import Journal
from .manifest import check_manifest, model_fingerprint, write_manifest
from .parameters import NAMES, Parameters
from .progress import Progress
from .requests import Request, RequestError, parse_request
from .results import Record, from_request_error
from .summary import Summary

logger = logging.getLogger("simctg_fast")

Answers = Callable[[Iterator[Request]], Iterator[Record]]  # in the order of completion

_DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class JobOptions:
    """Everything a job can be told; the names are those of the command line and of a configuration file.

    ``parameters`` are the defaults of the requests (`Parameters`).
    """

    input: str
    output: str
    model: str
    strategy: str = "contrastive"
    parameters: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    slots: int | None = None
    memory: float | None = None
    batching: str = "auto"
    processor: str | None = None
    logprobs: bool = False
    trace: bool = False
    num_shards: int = 1
    shard_id: int = 0
    device: str | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        self.defaults()
        for name in ("num_shards", "shard_id"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an integer, got {value!r}")
        if self.num_shards < 1:
            raise ValueError(f"num_shards must be at least 1, got {self.num_shards}")
        if not 0 <= self.shard_id < self.num_shards:
            raise ValueError(f"shard_id must be from 0 to {self.num_shards - 1} (num_shards - 1), got {self.shard_id}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")

    def defaults(self) -> Parameters:
        """Of the requests. Raises ValueError for an option outside its range."""
        return check_options(self.strategy, self.slots, self.memory, self.seed, self.batching, self.parameters)

    def config(self) -> dict[str, Any]:
        """What decides the output: kept in the manifest and compared when a run goes on."""
        resolved = self.defaults()
        config = asdict(self)
        for name in ("input", "output", "model", "parameters"):
            del config[name]
        parameters = asdict(resolved) | {"stop": list(resolved.stop), "seed": self.seed}
        device = self.device or _default_device()
        return (
            config
            | parameters
            | {"device": device.split(":")[0], "model_fingerprint": model_fingerprint(resolve_model(self.model))}
        )


OPTION_NAMES = tuple(f.name for f in fields(JobOptions) if f.name != "parameters") + tuple(
    name for name in NAMES if name != "seed"
)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Options from a YAML file.

    Raises:
        ValueError: no mapping, or a key that is no option.
    """
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the configuration {os.fspath(path)} is not YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(f"the configuration {os.fspath(path)} must map options to values")
    options = {str(name).replace("-", "_"): value for name, value in loaded.items()}
    unknown = sorted(set(options) - set(OPTION_NAMES))
    if unknown:
        raise ValueError(
            f"the configuration {os.fspath(path)} has unknown keys {', '.join(unknown)}; allowed: "
            + ", ".join(OPTION_NAMES)
        )
    return options


def make_options(given: Mapping[str, Any]) -> JobOptions:
    """`JobOptions` of a flat mapping, parameters of requests among the rest.

    Raises:
        ValueError: a value outside its range, or a missing one.
    """
    missing = [name for name in ("input", "output", "model") if not given.get(name)]
    if missing:
        raise ValueError(f"{missing[0]} is missing: give it as an option or in the configuration")
    given = _with_shard(given)
    parameters = {name: given[name] for name in NAMES if name != "seed" and given.get(name) is not None}
    rest = {n: v for n, v in given.items() if n not in parameters and v is not None}
    unknown = [name for name in rest if name not in OPTION_NAMES]
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; allowed: {', '.join(OPTION_NAMES)}")
    return JobOptions(parameters=parameters, **rest)


def _with_shard(given: Mapping[str, Any]) -> dict[str, Any]:
    """Under torchrun every process takes the shard of its rank; ``{shard}`` in the output is the shard's number."""
    given = dict(given)
    launched = "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if launched and given.get("num_shards") is None and given.get("shard_id") is None:
        given |= {"num_shards": int(os.environ["WORLD_SIZE"]), "shard_id": int(os.environ["RANK"])}
        if given.get("device") is None and _default_device() == "cuda":
            given["device"] = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        if given["num_shards"] > 1 and "{shard}" not in str(given["output"]):
            raise ValueError(
                f"output must hold {{shard}}, which becomes the number of each process, got {given['output']!r}"
            )
    given["output"] = str(given["output"]).replace("{shard}", str(given.get("shard_id") or 0))
    return given


class Job:
    """One run of `JobOptions`, from where the output ends.

    Args:
        options: what to do.
        log_json: events as JSON lines on standard error in the place of a bar.
        quiet: neither.
        loading: entered while the model is loaded, which is only done where a request is left to answer.

    ``run`` returns a `Summary`, whose ``exit_code`` is 0 (all well), 1 (some requests have error records) or another
    (the job ended before its input).

    Raises, before anything is computed:
        JournalError, ManifestError: the output is locked, unwritable, or of another configuration.
        ValueError: the model, the processor or the input cannot be had.
    """

    def __init__(
        self,
        options: JobOptions,
        *,
        log_json: bool = False,
        quiet: bool = False,
        loading: AbstractContextManager[Any] | None = None,
    ):
        self.options, self.log_json, self.quiet = options, log_json, quiet
        self.loading = nullcontext() if loading is None else loading
        self.signal: int | None = None
        self.aborted = False
        self.interrupted = self.writing = False
        self.engine: Engine | None = None

    def run(self) -> Summary:
        o = self.options
        try:
            size = os.path.getsize(o.input)
            with open(o.input, "rb"):
                pass
        except OSError as error:
            raise ValueError(f"the input {o.input} cannot be read: {error.strerror}") from error
        config = o.config()
        with Journal(o.output) as journal:
            if journal.size:
                check_manifest(o.output, config)
            lines = InputLines(o.input, self._parser(), journal.done, o.num_shards, o.shard_id)
            items = iter(lines)
            head = []  # bad lines, and the first request that is left
            for item in items:
                head.append(item)
                if isinstance(item, Request):
                    break
            is_left = bool(head) and isinstance(head[-1], Request)
            with self._open() if is_left else nullcontext(_no_answers) as answers:
                if not journal.size:
                    write_manifest(o.output, config, _about(o))
                return self._answer(journal, lines, itertools.chain(head, items), answers, size)

    def _parser(self) -> Callable[..., Request]:
        defaults, strategy = self.options.defaults(), self.options.strategy
        return lambda given, line: parse_request(given, defaults, strategy, line=line)

    @contextmanager
    def _open(self) -> Iterator[Answers]:
        """Load what answers requests, for the length of a ``with`` block."""
        o = self.options
        with self.loading:
            try:
                self.engine = engine = Engine.from_pretrained(
                    o.model, device=o.device, dtype=o.dtype, **engine_options(o)
                )
            except OSError as error:  # transformers: not on the hub, no connection, files that are not a model
                raise ValueError(f"the model {o.model} cannot be loaded: {error}") from error
        yield lambda requests: (result.as_record() for result in engine.generate(requests))

    def _stop(self) -> None:
        """Begin nothing new; what is in work is finished. Called in a handler of signals."""
        if self.engine is not None:
            self.engine.stop()
        again = " (again to stop at once)" if self.signal == signal.SIGINT else ""
        logger.warning("%s: finishing what is in work%s", signal.Signals(self.signal or 0).name, again)

    def _interrupt(self) -> None:
        """End the job at once, from a handler of signals; a record that is being written is still finished."""
        self.interrupted = True
        if not self.writing:
            raise KeyboardInterrupt

    def _stats(self) -> dict[str, Any]:
        """Of the engine, for the summary."""
        return {} if self.engine is None else self.engine.stats

    def _answer(
        self,
        journal: Journal,
        lines: InputLines,
        items: Iterator[Request | tuple[RequestError, int]],
        answers: Answers,
        size: int,
    ) -> Summary:
        o = self.options
        summary = Summary(resumed=len(journal.done), errors_before=journal.errors)
        progress = Progress(lines, summary, self.engine, size, log_json=self.log_json, quiet=self.quiet)

        def write(record: Record) -> None:
            self.writing = True
            journal.append(record.line)
            summary.add(record)
            self.writing = False
            if self.interrupted:
                raise KeyboardInterrupt
            progress.update()

        def requests() -> Iterator[Request]:
            for item in items:
                if isinstance(item, Request):
                    yield item
                else:
                    write(from_request_error(*item).as_record())

        started = time.monotonic()
        with self._signals(), progress:
            try:
                for record in answers(requests()):
                    write(record)
            except KeyboardInterrupt:
                self.aborted |= self.signal is None
            except OSError as error:
                summary.stopped = f"the output cannot be written: {error.strerror or error}"
            if self.aborted:
                summary.stopped = "aborted"
            elif self.signal is not None and summary.stopped is None:
                summary.stopped = f"stopped by {signal.Signals(self.signal).name}"
            summary.signal = self.signal
        summary.unfinished_line = lines.unfinished
        summary.finish(time.monotonic() - started, lines, self._stats(), output=o.output)
        return summary

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM ends the job when what is in work is finished; a second SIGINT at once."""
        before = {}

        def handle(number: int, frame: Any) -> None:
            if self.signal is not None and number == signal.SIGINT:
                self.aborted = True
                self._interrupt()
            else:
                self.signal = number
                self._stop()

        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, handle)
        except ValueError:  # not the main thread: whoever runs us there minds the signals
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _no_answers(requests: Iterator[Request]) -> Iterator[Record]:
    """Where only bad lines are left: reading them is all there is to do."""
    for _ in requests:
        raise AssertionError("a request is left")
    return iter(())


def engine_options(options: JobOptions) -> dict[str, Any]:
    """What `Engine` takes of them."""
    names = ("strategy", "slots", "memory", "processor", "seed", "logprobs", "trace", "batching")
    return {name: getattr(options, name) for name in names} | options.parameters


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _about(options: JobOptions) -> dict[str, Any]:
    import torch
    import transformers

    from .. import __version__

    return {
        "model": os.fspath(options.model),
        "input": os.fspath(options.input),
        "simctg_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


__all__ = ["OPTION_NAMES", "Job", "JobOptions", "make_options", "read_config"]
