"""The folder of an evaluation: what was written, its figures, and the report; and how an interrupted one goes on."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..checks import user_path
from .conclude import all_rows
from .report import render
from .settings import Setting
from .writing import Tokenized, Written

TEXTS, FIGURES, RESULTS, REPORT = "texts.jsonl", "figures.csv", "evaluation.json", "report.html"


def digest(model: str, prompts: Sequence[Tokenized], max_new_tokens: int, seed: int) -> str:
    """What texts of one folder have in common."""
    asked = json.dumps([model, [[p.prompt.id, p.ids, p.source] for p in prompts], max_new_tokens, seed])
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Folder:
    """Files of one evaluation. Texts are kept as soon as a setting is through; a folder that holds others is refused.

    Args:
        path: made where it is missing.
        overwrite: throw away what it holds of another evaluation.

    Raises:
        ValueError: the path is a file, or the folder holds the texts of an evaluation that cannot be read.
        OSError: it cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.path = user_path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{str(self.path)!r} must be a folder, or not there yet, and is a file")
        self.path.mkdir(parents=True, exist_ok=True)
        self.overwrite = overwrite

    def begin(self, run: str, prompts: Sequence[Tokenized]) -> dict[str, Written]:
        """What the folder holds of the run with this `digest`, by setting; from here on `add` goes on with it."""
        file = self.path / TEXTS
        lines = file.read_text("utf-8").splitlines() if file.exists() and not self.overwrite else []
        records = [record for line in lines if (record := _parsed(line)) is not None]
        if records and records[0].get("run") != run:
            raise ValueError(
                f"{str(file)!r} holds texts of another evaluation (other prompts, model, length or seed); give another "
                "folder, or overwrite it"
            )
        found = _complete(records, prompts)
        # A setting that was interrupted begins again, and with it the end of the file, which may be half a line.
        kept = [{"run": run}, *(record for record in records if record.get("strategy") in found)]
        self._write(TEXTS, "".join(map(_line, kept)))
        return found

    def add(
        self, setting: Setting, prompts: Sequence[Tokenized], written: Written, texts: Sequence[str | None]
    ) -> None:
        """The texts of a setting that is through, a line each, and a last line that says so."""
        lines = []
        for number, (prompt, ids) in enumerate(zip(prompts, written.token_ids, strict=True)):
            record: dict[str, Any] = {"strategy": setting.name, "id": prompt.prompt.id}
            if ids is None:
                record["error"] = written.errors.get(number, "")
            else:
                record |= {"text": texts[number], "token_ids": ids}
            lines.append(_line(record))
        lines.append(_line({"strategy": setting.name, "complete": len(lines), "seconds": round(written.seconds, 3)}))
        with (self.path / TEXTS).open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def finish(self, evaluation: Mapping[str, Any]) -> None:
        """Figures and report, each in place of an earlier one at once."""
        self._write(RESULTS, json.dumps(evaluation, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
        self._write(FIGURES, table_csv(evaluation))
        self._write(REPORT, render(dict(evaluation)))

    def _write(self, name: str, text: str) -> None:
        target = self.path / name
        fresh = target.with_name(f".{name}.part")
        fresh.write_text(text, "utf-8", errors="backslashreplace")
        os.replace(fresh, target)


def table_csv(evaluation: Mapping[str, Any]) -> str:
    """A line a strategy, then a setting of the grid: what it sets, then mean, low and high of each metric."""
    text = io.StringIO()
    metrics = list(evaluation["metrics"])
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["strategy", "settings", *(f"{m}{part}" for m in metrics for part in ("", "_low", "_high")), "note"]
    )
    for row in all_rows(evaluation):
        found = [row["figures"].get(metric, {}) for metric in metrics]
        cells = [_cell(each.get(part)) for each in found for part in ("mean", "low", "high")]
        writer.writerow([row["strategy"], json.dumps(row["settings"]), *cells, row["note"]])
    return text.getvalue()


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=True) + "\n"


def _parsed(line: str) -> dict[str, Any] | None:
    """None for a line that a run could not finish."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _complete(records: Sequence[Mapping[str, Any]], prompts: Sequence[Tokenized]) -> dict[str, Written]:
    """Of the settings that were through what they wrote, in the order of the prompts."""
    places = {prompt.prompt.id: number for number, prompt in enumerate(prompts)}
    found: dict[str, Written] = {}
    parts: dict[str, Written] = {}
    for record in records[1:]:
        name = str(record.get("strategy"))
        part = parts.setdefault(name, Written([None] * len(prompts)))
        if "complete" in record:
            part.seconds = float(record["seconds"])
            found[name] = parts.pop(name)
        elif (place := places.get(record.get("id", ""))) is not None:
            part.token_ids[place] = record.get("token_ids")
            if "error" in record:
                part.errors[place] = str(record["error"])
    return found
