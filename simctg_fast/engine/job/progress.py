"""What a person sees of a job while it runs: a bar on a terminal, JSON lines on request, nothing otherwise."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from typing import Any

from ..engine import Engine
from .inputs import InputLines
from .summary import Summary

BAR_SECONDS = 0.2  # between two looks at the bar
JSON_SECONDS = 5.0  # between two events


class Progress:
    """Shows how a job goes; ``update`` may be called as often as one likes.

    Args:
        lines, summary, engine: what is looked at; no engine where it is not in this process, or none was needed.
        log_json: events on standard error, one JSON object a line.
        quiet: show nothing.
    """

    def __init__(
        self,
        lines: InputLines,
        summary: Summary,
        engine: Engine | None,
        *,
        log_json: bool = False,
        quiet: bool = False,
    ):
        self.lines, self.engine, self.summary = lines, engine, summary
        self.bar: Any = None
        self.log_json = log_json and sys.stderr is not None
        self.shows_bar = sys.stderr is not None and sys.stderr.isatty() and not log_json and not quiet
        self.started = self.last = time.monotonic()

    def __enter__(self) -> Progress:
        self.started = time.monotonic()
        self.event("start")
        if self.shows_bar:
            from tqdm import tqdm

            self.bar = tqdm(
                unit="req", dynamic_ncols=True, bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {desc}"
            )
            self._show()
        if self.engine is not None and (self.shows_bar or self.log_json):
            self.engine.on_step = self.update
        return self

    def __exit__(self, *exc: object) -> None:
        if self.engine is not None:
            self.engine.on_step = None
        with suppress(OSError):
            if self.bar is not None:
                self._show()
                self.bar.close()
        self.event("end")

    def update(self) -> None:
        now = time.monotonic()
        if self.bar is not None and now - self.last >= BAR_SECONDS:
            self.last = now
            with suppress(OSError):  # a terminal that has gone is no reason to end
                self._show()
        elif self.log_json and now - self.last >= JSON_SECONDS:
            self.last = now
            self.event("progress")

    def snapshot(self) -> dict[str, Any]:
        """Requests, rates, slots in use, and the seconds that are left at this pace."""
        seconds = max(1e-9, time.monotonic() - self.started)
        counts = self.engine.stats if self.engine is not None else vars(self.summary)
        done = self.summary.completed + self.lines.skipped
        total = self._total()
        left = (total - done) * seconds / self.summary.completed if self.summary.completed else None
        return {
            "done": done,
            "total": total,
            "errors": self.summary.errors.total(),
            "active": counts.get("active"),
            "slots": counts.get("slots"),
            "prompt_tokens_per_second": round(counts["prompt_tokens"] / seconds, 1),
            "generated_tokens_per_second": round(counts["generated_tokens"] / seconds, 1),
            "seconds": round(seconds, 1),
            "eta_seconds": None if left is None else round(left, 1),
        }

    def _total(self) -> int:
        """Requests of this shard: known when the file is read to its end, before that by its size."""
        position, size = self.lines.lines.position, self.lines.lines.size
        if not position or size is None or position >= size:
            return self.lines.total
        return max(self.lines.total, round(self.lines.total * size / position))

    def _show(self) -> None:
        s = self.snapshot()
        eta = "" if s["eta_seconds"] is None else f", {_clock(s['eta_seconds'])} left"
        errors = f", {s['errors']} errors" if s["errors"] else ""
        slots = "" if s["slots"] is None else f", slots {s['active']}/{s['slots']}"
        self.bar.total, self.bar.n = max(s["total"], 1), s["done"]
        self.bar.set_description_str(
            f"in {s['prompt_tokens_per_second']:.0f} tok/s, out {s['generated_tokens_per_second']:.0f} tok/s"
            f"{slots}{errors}{eta}"
        )

    def event(self, name: str) -> None:
        if self.log_json:
            with suppress(OSError):
                print(json.dumps({"event": name, **self.snapshot()}), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
