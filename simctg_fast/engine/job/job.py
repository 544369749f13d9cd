"""A job: prompts in a file, completions in a file, nothing lost. Start it again and it goes on."""

from __future__ import annotations

import itertools
import logging
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ...assets import resolve_model
from ...checks import require, user_path
from ...text.files import STDIN, ReadError
from ..engine import Engine, check_options
from ..parameters import NAMES, Parameters
from ..requests import Request, parse_request
from ..results import Record, from_request_error
from ..scheduler import DEFAULT_SLOTS
from ..sequence import IDLE
from .inputs import BadLine, Changed, InputLines, Reader, keys_of
from .journal import Journal, JournalError, Stream, WriteError
from .manifest import check_manifest, manifest_path, model_fingerprint, read_manifest, write_manifest
from .progress import Progress
from .summary import Summary

logger = logging.getLogger("simctg_fast")

Answers = Callable[[Iterator[Request]], Iterator[Record]]  # in the order of completion

STDOUT = "-"
CHANGED = ("refuse", "again", "keep")
MOST_AHEAD = 10_000  # bad lines that are gathered before a first good one
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
    trace: bool = False
    share_prefixes: bool = True
    num_shards: int = 1
    shard_id: int = 0
    device: str | None = None
    dtype: str = "auto"
    weights: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("input", "output", "model", "strategy", "batching", "processor", "device", "dtype"):
            value = getattr(self, name)
            may_miss = value is None and name in ("processor", "device")
            require(may_miss or isinstance(value, str | os.PathLike), name, value, "text")
        for name in ("trace", "share_prefixes", "trust_remote_code"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        self.defaults()
        for name in ("num_shards", "shard_id"):
            require(type(getattr(self, name)) is int, name, getattr(self, name), "an integer")
        require(self.num_shards >= 1, "num_shards", self.num_shards, "at least 1")
        is_shard = 0 <= self.shard_id < self.num_shards
        require(is_shard, "shard_id", self.shard_id, f"from 0 to {self.num_shards - 1} (num_shards - 1)")
        require(self.dtype in _DTYPES, "dtype", self.dtype, f"one of {', '.join(_DTYPES)}")

    def defaults(self) -> dict[str, Parameters]:
        """Of the requests, by strategy. Raises ValueError for an option outside its range."""
        return check_options(
            self.strategy, self.slots, self.memory, self.seed, self.batching, self.weights, self.parameters
        )

    def config(self) -> dict[str, Any]:
        """What decides the output: kept in the manifest and compared when a run goes on."""
        resolved, *others = self.defaults().values()
        config = asdict(self)
        for name in ("input", "output", "model", "parameters", "trust_remote_code"):
            del config[name]
        parameters = _plain(resolved) | {"seed": self.seed}
        if others:
            parameters["parameters_of_others"] = [_plain(each) for each in others]
        device = self.device or _default_device()
        return (
            config
            | parameters
            | {"device": device.split(":")[0], "model_fingerprint": model_fingerprint(resolve_model(self.model))}
        )


def _plain(parameters: Parameters) -> dict[str, Any]:
    """As JSON gives them back."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(parameters).items()}


OPTION_NAMES = tuple(f.name for f in fields(JobOptions) if f.name != "parameters") + tuple(
    name for name in NAMES if name != "seed"
)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Options from a YAML file.

    Raises:
        ValueError: no mapping, or a key that is no option.
    """
    import yaml

    what = f"the configuration {os.fspath(path)}"
    try:
        loaded = yaml.load(user_path(path).read_text(encoding="utf-8"), _without_repetition(yaml.SafeLoader))
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{what} is not YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{what} is nested too deeply") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(f"{what} must map options to values")
    options = {str(name).replace("-", "_"): value for name, value in loaded.items()}
    if len(options) < len(loaded):
        raise ValueError(f"{what} gives a key twice, once with - and once with _")
    unknown = sorted(set(options) - set(OPTION_NAMES))
    if unknown:
        raise ValueError(f"{what} has unknown keys {', '.join(unknown)}; allowed: {', '.join(OPTION_NAMES)}")
    return options


def _without_repetition(loader: Any) -> Any:
    """A YAML loader that does not let a second value of a key replace the first."""

    class Loader(loader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            mapping = super().construct_mapping(node, deep=deep)
            if len(mapping) < len(node.value):
                raise ValueError("a key stands there twice")
            return mapping

    return Loader


def make_options(settings: Mapping[str, Any]) -> JobOptions:
    """`JobOptions` of a flat mapping, parameters of requests among the rest.

    Raises:
        ValueError: a value outside its range, or a missing one.
    """
    missing = [name for name in ("input", "output", "model") if not settings.get(name)]
    if missing:
        raise ValueError(f"{missing[0]} is missing: give it as an option or in the configuration")
    settings = _with_shard(settings)
    parameters = {name: settings[name] for name in NAMES if name != "seed" and settings.get(name) is not None}
    rest = {n: v for n, v in settings.items() if n not in parameters and v is not None}
    unknown = [name for name in rest if name not in OPTION_NAMES]
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; allowed: {', '.join(OPTION_NAMES)}")
    return JobOptions(parameters=parameters, **rest)


def _with_shard(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Under torchrun every process takes the shard of its rank; ``{shard}`` in the output is the shard's number."""
    settings = dict(settings)
    launched = "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if launched and settings.get("num_shards") is None and settings.get("shard_id") is None:
        try:
            settings |= {"num_shards": int(os.environ["WORLD_SIZE"]), "shard_id": int(os.environ["RANK"])}
        except ValueError as error:
            found = f"RANK={os.environ['RANK']!r} and WORLD_SIZE={os.environ['WORLD_SIZE']!r}"
            raise ValueError(f"torchrun's {found} must be integers") from error
        if settings.get("device") is None and _default_device() == "cuda":
            settings["device"] = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        if settings["num_shards"] > 1 and "{shard}" not in str(settings["output"]):
            raise ValueError(
                f"output must hold {{shard}}, which becomes the number of each process, got {settings['output']!r}"
            )
    if isinstance(settings["output"], str | os.PathLike):
        output = os.fspath(settings["output"]).replace("{shard}", str(settings.get("shard_id") or 0))
        if output.endswith("/"):  # its end is what has to be seen of it
            raise ValueError(f"output must be the name of a file, got {output!r}")
        settings["output"] = output if output == STDOUT else str(user_path(output))
    return settings


class Job:
    """One run of `JobOptions`, from where the output ends.

    Args:
        options: what to do. An output of ``-`` is standard output, which nothing can go on from.
        changed: what becomes of requests that are not what was answered under their id: ``"refuse"`` to start,
            ``"again"`` answers them again, ``"keep"`` keeps the old answers.
        retry_errors: answer requests again that have error records; the records go.
        log_json: events as JSON lines on standard error in the place of a bar.
        quiet: neither.
        loading: entered while the model is loaded, which is only done where a request is left to answer.

    ``run`` returns a `Summary`, whose ``exit_code`` is 0 (all well), 1 (some requests have error records) or another
    (the job ended before its input).

    Raises, before anything is computed:
        JournalError, ManifestError: the output is locked, unwritable, not a run's, the input itself, of another
            configuration, or answers other requests.
        ValueError, FileNotFoundError: the model, the processor or the input cannot be had.
    """

    def __init__(
        self,
        options: JobOptions,
        *,
        changed: str = "refuse",
        retry_errors: bool = False,
        log_json: bool = False,
        quiet: bool = False,
        loading: AbstractContextManager[Any] | None = None,
    ):
        require(changed in CHANGED, "changed", changed, f"one of {', '.join(CHANGED)}")
        self.options, self.changed, self.retry_errors = options, changed, retry_errors
        self.log_json, self.quiet = log_json, quiet
        self.loading = nullcontext() if loading is None else loading
        self.created = int(time.time())
        self.signal: int | None = None
        self.aborted = False
        self.interrupted = self.writing = False
        self.engine: Engine | None = None

    def run(self) -> Summary:
        o = self.options
        if self._reads_once and (self.changed == "again" or self.retry_errors):
            option = "retry_errors" if self.retry_errors else "changed='again'"
            raise ValueError(f"{option} needs an input that can be read twice: a file, not a pipe")
        summary = Summary(output=o.output)
        try:
            with self._lines() as lines:
                self._check_apart(lines)
                with Stream() if o.output == STDOUT else Journal(o.output) as journal:
                    return self._run(lines, journal, summary)
        except WriteError as error:
            summary.fail(f"the output cannot be written: {error.strerror or error}")
            return summary

    def _run(self, lines: InputLines, journal: Journal | Stream, summary: Summary) -> Summary:
        o, config = self.options, self.options.config()
        if isinstance(journal, Journal):
            if journal.size or journal.torn:
                self.created = check_manifest(o.output, config)["about"].get("created", self.created)
                journal.repair()
            else:
                read_manifest(o.output)
        again = self._to_answer_again(journal)
        lines.done = {key: digest for key, digest in journal.done.items() if key not in again}
        items = self._refusing_changes(lines)
        if not lines.lines.is_regular:
            items = Reader(items, self._is_busy)
        items = _unbroken(items, summary)
        head, slots = self._begin(items, lines)
        is_left = len(head) == MOST_AHEAD or any(isinstance(item, Request) for item in head)
        with self._open(slots) if is_left else nullcontext(_no_answers) as answers:
            if isinstance(journal, Journal):
                journal.drop(again)
                if not journal.size:
                    self._write_manifest(config)
            summary.resumed, summary.errors_before = len(lines.done), len(journal.failed)
            return self._answer(journal, lines, itertools.chain(head, items), answers, summary)

    def _begin(
        self, items: Iterator[Request | BadLine], lines: InputLines
    ) -> tuple[list[Request | BadLine], int | None]:
        """Bad lines and the first request that is left, and the slots: of many, no more than there are requests."""
        slots = self.options.slots
        many = slots is not None and slots > DEFAULT_SLOTS
        head: list[Request | BadLine] = []
        asked = 0
        for item in items:
            if item is IDLE:
                continue
            head.append(item)
            asked += item.count if isinstance(item, Request) else 0
            is_enough = not (many and lines.lines.is_regular and asked + lines.skipped < (slots or 0))
            if (asked and is_enough) or len(head) == MOST_AHEAD:
                return head, slots
        return head, max(DEFAULT_SLOTS, asked + lines.skipped) if many else slots

    @property
    def _reads_once(self) -> bool:
        return os.fspath(self.options.input) == STDIN or not user_path(self.options.input).is_file()

    def _lines(self, done: Mapping[Any, str] | None = None) -> InputLines:
        o = self.options
        return InputLines(o.input, self._parser(), done or {}, o.num_shards, o.shard_id)

    def _check_apart(self, lines: InputLines) -> None:
        """Raise JournalError where the output, or its manifest, is the input or one of our streams."""
        taken: list[tuple[str, Any]] = [(f"the input {self.options.input}", lines.lines.stat())]
        if self.options.output != STDOUT:
            for number, name in ((1, "standard output: name it -"), (2, "standard error")):
                with suppress(OSError):
                    taken.append((name, os.fstat(number)))
        for path in self._written():
            with suppress(OSError):
                found = os.stat(path)
                for name, other in taken:
                    if other is not None and os.path.samestat(other, found):
                        raise JournalError(f"the output {path} is {name}; choose another output")

    def _written(self) -> tuple[str, ...]:
        output = self.options.output
        return ("/dev/stdout",) if output == STDOUT else (output, str(manifest_path(output)))

    def _write_manifest(self, config: Mapping[str, Any]) -> None:
        try:
            write_manifest(self.options.output, config, _about(self.options) | {"created": self.created})
        except OSError as error:
            raise WriteError(error.errno, error.strerror) from error

    def _to_answer_again(self, journal: Journal | Stream) -> set[Any]:
        """Keys of records that are no answers any more. Raises JournalError for changes that nobody has decided on."""
        if self._reads_once or not journal.done:
            return set()
        retried = set(journal.failed) if self.retry_errors else set()
        done = {key: digest for key, digest in journal.done.items() if key not in retried}
        again: set[Any] = set()
        changed: list[Changed] = []
        for item in _unbroken(iter(self._lines(done)), Summary()):
            if isinstance(item, Changed):
                changed.append(item)
            else:  # what has a record, but no line any more, keeps it
                number = item.number if isinstance(item, BadLine) else item.line
                again |= retried.intersection(keys_of(item, number))
        if changed and self.changed == "refuse":
            raise JournalError(self._says_changed(changed[0], len(changed)))
        return again | {item.key for item in changed} if self.changed == "again" else again

    def _says_changed(self, first: Changed, count: int | None = None) -> str:
        kind, value = first.key
        name = f"id {value}" if kind == "id" else "an error record"
        more = "" if count in (None, 1) else f" ({count} lines have changed)"
        retry = ", --retry-errors answers what has error records" if kind == "line" else ""
        line, output = f"line {first.number} of {self.options.input}", self.options.output
        return (
            f"{line} is not what {output} answers under {name}{more}: "
            f"--changed=again answers it again, --changed=keep keeps the old answer{retry}"
        )

    def _refusing_changes(self, lines: InputLines) -> Iterator[Request | BadLine]:
        """What is left to do."""
        for item in lines:
            if not isinstance(item, Changed):
                yield item
            elif self.changed == "refuse":  # of a pipe, which could not be read beforehand
                raise JournalError(self._says_changed(item))

    def _is_busy(self) -> bool:
        return self.engine is not None and self.engine.backend.active > 0

    def _parser(self) -> Callable[..., Request]:
        defaults = self.options.defaults()
        strategy = next(iter(defaults))
        return lambda record, line, digest: parse_request(record, defaults, strategy, line=line, digest=digest)

    @contextmanager
    def _open(self, slots: int | None) -> Iterator[Answers]:
        """Load what answers requests, for the length of a ``with`` block."""
        o = self.options
        with self.loading:
            self.engine = engine = Engine.from_pretrained(o.model, **engine_options(o) | {"slots": slots})
        yield lambda requests: (r.as_record(str(o.model), self.created) for r in engine.generate(requests))

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
        journal: Journal | Stream,
        lines: InputLines,
        items: Iterator[Request | BadLine],
        answers: Answers,
        summary: Summary,
    ) -> Summary:
        o = self.options
        progress = Progress(lines, summary, self.engine, log_json=self.log_json, quiet=self.quiet)

        def write(record: Record) -> None:
            self.writing = True
            try:
                journal.append(record.line)
                summary.add(record)
            finally:
                self.writing = False
            if self.interrupted:
                raise KeyboardInterrupt
            progress.update()

        def requests() -> Iterator[Any]:
            for item in items:
                if self.signal is not None:
                    return
                if item is IDLE or isinstance(item, Request):
                    yield item
                else:
                    error = from_request_error(item.error, line=item.number, digest=item.digest)
                    write(error.as_record(str(o.model), self.created))

        started = time.monotonic()
        with self._signals(), progress:
            try:
                try:
                    for record in answers(requests()):
                        write(record)
                finally:  # also when something else ends the job: what was written is to be on the disk
                    journal.sync()
                journal.check()
            except KeyboardInterrupt:
                self.aborted |= self.signal is None
            except WriteError as error:
                summary.fail(f"the output cannot be written: {error.strerror or error}")
            except BrokenPipeError:
                summary.closed_pipe = True
            if self.aborted:
                summary.fail("aborted")
            elif self.signal is not None:
                summary.fail(f"stopped by {signal.Signals(self.signal).name}")
            summary.signal = self.signal
        summary.unfinished_line = lines.unfinished
        summary.finish(time.monotonic() - started, lines, self._stats())
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


def _unbroken(items: Iterator[Any], summary: Summary) -> Iterator[Any]:
    """What can be read of an input that breaks off, which ``summary`` then says: it is answered."""
    try:
        yield from items
    except ReadError as error:
        summary.fail(f"the input {error}")


def _no_answers(requests: Iterator[Request]) -> Iterator[Record]:
    """Where only bad lines are left: reading them is all there is to do."""
    for _ in requests:
        raise AssertionError("a request is left")
    return iter(())


def engine_options(options: JobOptions) -> dict[str, Any]:
    """What `Engine.from_pretrained` takes of them, but for the model."""
    names = (
        *("strategy", "slots", "memory", "processor", "seed", "trace", "batching", "share_prefixes"),
        *("device", "dtype", "weights", "trust_remote_code"),
    )
    return {name: getattr(options, name) for name in names} | options.parameters


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _about(options: JobOptions) -> dict[str, Any]:
    import torch
    import transformers

    from ... import __version__

    return {
        "model": os.fspath(options.model),
        "input": os.fspath(options.input),
        "simctg_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


__all__ = ["OPTION_NAMES", "Job", "JobOptions", "make_options", "read_config"]
