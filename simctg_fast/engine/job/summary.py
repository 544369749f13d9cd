"""What a job did, in figures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..results import Record
from .inputs import InputLines

_OF_ENGINE = ("slots", "slots_busy", "batching", "shared_tokens", "near_ties", "out_of_memory")  # of `Engine.stats`
INTERRUPTED = 3  # the exit code of a job that ended before its input for another reason than a signal


@dataclass
class Summary:
    """Counts and times of a job; ``as_dict`` is what is printed."""

    resumed: int = 0
    errors_before: int = 0
    completed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    stopped: str | None = None
    closed_pipe: bool = False  # whoever read standard output has had enough
    signal: int | None = None
    unfinished_line: int | None = None
    seconds: float = 0.0
    total: int = 0
    output: str = ""
    engine: dict[str, Any] = field(default_factory=dict)
    _latencies: list[float] = field(default_factory=list)

    def add(self, record: Record) -> None:
        self.completed += 1
        self.finish_reasons[record.finish_reason] += 1
        if record.error:
            self.errors[record.error] += 1
            return
        self.prompt_tokens += int(record.prompt_tokens)
        self.generated_tokens += int(record.completion_tokens)
        self._latencies.append(float(record.seconds))

    def fail(self, reason: str) -> None:
        """The job has ended before its input; of several reasons the first counts."""
        self.stopped = self.stopped or reason

    def finish(self, seconds: float, lines: InputLines, engine: dict[str, Any]) -> None:
        self.seconds, self.total, self.engine = seconds, lines.total, engine

    @property
    def exit_code(self) -> int:
        if self.signal is not None:
            return 128 + self.signal
        if self.closed_pipe:
            return 128 + 13  # as a program that SIGPIPE ends
        if self.stopped is not None:
            return INTERRUPTED
        return 1 if self.errors or self.errors_before or self.unfinished_line is not None else 0

    @property
    def way_on(self) -> str:
        """What to do about a job that has stopped."""
        return "standard output cannot be gone on from" if self.output == "-" else "the same command goes on from here"

    def latency(self) -> dict[str, float]:
        """Percentiles of the seconds from admission to the last token."""
        ordered = sorted(self._latencies)
        if not ordered:
            return {}
        return {f"p{q}": round(ordered[min(len(ordered) - 1, q * len(ordered) // 100)], 3) for q in (50, 90, 99)}

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "requests": self.completed,
            "resumed": self.resumed,
            "errors": dict(sorted(self.errors.items())),
            "errors_before": self.errors_before,
            "finish_reasons": dict(sorted(self.finish_reasons.items())),
            "seconds": round(self.seconds, 3),
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "generated_tokens_per_second": round(self.rate, 2),
            "latency_seconds": self.latency(),
            **{name: self.engine.get(name) for name in _OF_ENGINE},
            "stopped": self.stopped,
            "unfinished_line": self.unfinished_line,
            "exit_code": self.exit_code,
        }

    def as_text(self) -> str:
        """For a person."""
        if self.completed:
            lines = [
                f"{self.output}: {self.completed} requests in {self.seconds:.1f} s, {self.generated_tokens} tokens "
                f"({self.rate:.0f} a second)" + (f"; {self.resumed} were there before" if self.resumed else "")
            ]
        else:
            lines = [f"{self.output}: nothing new; {self.resumed} requests were answered before"]
        latency = self.latency()
        if latency:
            shown = ", ".join(f"{name} {value:.2f}" for name, value in latency.items())
            busy = self.engine.get("slots_busy")
            slots = "" if busy is None else f"; {self.engine['slots']} slots, {busy:.0%} busy"
            lines.append(f"seconds a request: {shown}{slots}")
        if self.errors:
            shown = ", ".join(f"{count} {kind}" for kind, count in self.errors.most_common())
            lines.append(f"error records: {shown}")
        if self.errors_before:
            lines.append(f"error records of earlier runs: {self.errors_before}")
        if shared := self.engine.get("shared_tokens"):
            lines.append(f"{shared} prompt tokens were copied from prompts that begin alike")
        if self.engine.get("out_of_memory"):
            lines.append(
                f"memory ran out {self.engine['out_of_memory']} times: ended with {self.engine['slots']} slots"
            )
        if self.unfinished_line is not None:
            lines.append(f"line {self.unfinished_line} of the input is unfinished and was left for the next run")
        if self.stopped is not None:
            lines.append(f"{self.stopped}; {self.way_on}")
        return "\n".join(lines)
