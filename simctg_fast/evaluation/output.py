"""The folder of an evaluation: what was written, its figures, and the report; and how an interrupted one goes on."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checks import is_integer, is_number, user_path
from .conclude import all_rows
from .report import render
from .settings import Setting
from .writing import Tokenized, Written

TEXTS, FIGURES, RESULTS, REPORT = "texts.jsonl", "figures.csv", "evaluation.json", "report.html"
PROMPTS = "prompts.jsonl"  # without the references: a file for `simctg-fast run`
FILES = (REPORT, RESULTS, FIGURES, TEXTS, PROMPTS)
_INSTEAD = "give another folder, or overwrite what this one holds (--overwrite)"


def digest(
    model: str, fingerprint: str, prompts: Sequence[Tokenized], max_new_tokens: int, seed: int, slots: int
) -> str:
    """What texts of one folder have in common. ``fingerprint``: of the ``model`` by this name, as it was loaded."""
    rows = [[prompt.prompt.id, prompt.ids, prompt.source] for prompt in prompts]
    asked = json.dumps([model, fingerprint, rows, max_new_tokens, seed, slots])
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Folder:
    """Files of one evaluation. Texts are kept as soon as a setting is through; a folder that holds others is refused.

    Args:
        path: made where it is missing.
        overwrite: throw away what it holds under the names of these files.

    Raises:
        ValueError: the path is a file; from `begin`, the folder holds the texts of another evaluation, or of one that
            cannot be read, or files by these names that are no evaluation's.
        OSError: it cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.path = user_path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{str(self.path)!r} must be a folder, or not there yet, and is a file")
        self.path.mkdir(parents=True, exist_ok=True)
        self.overwrite = overwrite

    def spare(self, **read: str | os.PathLike[str] | None) -> None:
        """Raises ValueError where a file that is read is one that will be written."""
        for name, path in read.items():
            if path is None or not user_path(path).exists():
                continue
            for target in (self.path / file for file in FILES):
                if target.exists() and target.samefile(user_path(path)):
                    raise ValueError(f"{name} is {str(path)!r}, which would be written over; give another folder")

    def begin(self, run: str, prompts: Sequence[Tokenized], vocabulary: int) -> dict[str, Written]:
        """What the folder holds of the run with this `digest`, by setting; from here on `add` goes on with it. The
        model knows ``vocabulary`` tokens."""
        file = self.path / TEXTS
        found: dict[str, Written] = {}
        kept: list[dict[str, Any]] = []
        if not self.overwrite:
            records = self._records(vocabulary)
            if records and records[0]["run"] != run:
                raise ValueError(
                    f"{str(file)!r} holds texts of another evaluation (other prompts, model, weights, dtype, device, "
                    f"length, seed or slots); {_INSTEAD}"
                )
            found = _complete(records, prompts, file)
            # A setting that was interrupted begins again, and with it the end of the file, which may be half a line.
            kept = [record for record in records if record.get("strategy") in found]
        self._write(TEXTS, "".join(map(_line, [{"run": run}, *kept])))
        return found

    def _records(self, vocabulary: int) -> list[dict[str, Any]]:
        """The lines of the file of texts; none where there is no evaluation yet. What is not ours is refused."""
        file = self.path / TEXTS
        lines = file.read_bytes().splitlines() if file.exists() else []
        if not lines:
            there = next((name for name in FILES if name != TEXTS and (self.path / name).exists()), None)
            if there is not None:
                raise ValueError(f"{str(self.path / there)!r} is there, but no texts of an evaluation; {_INSTEAD}")
            return []
        records = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if record is None and 1 < number == len(lines):  # which a run could not finish
                break
            if not (_is_record(record, vocabulary) if number > 1 else _is_first(record)):
                raise ValueError(f"{str(file)!r}, line {number}: is not what an evaluation writes; {_INSTEAD}")
            records.append(record)
        return records

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
        lines.append(_line({"strategy": setting.name, "complete": len(lines), "seconds": written.seconds}))
        with (self.path / TEXTS).open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def finish(self, evaluation: Mapping[str, Any], prompts: Sequence[Tokenized]) -> None:
        """Prompts, figures and report, each in place of an earlier one at once."""
        self._write(PROMPTS, "".join(_line({"id": each.prompt.id, **each.prompt.content}) for each in prompts))
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


def _is_first(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("run"), str)


def _is_record(record: Any, vocabulary: int) -> bool:
    """Whether it is a line of `Folder.add`."""
    if not isinstance(record, dict) or not isinstance(record.get("strategy"), str):
        return False
    if "complete" in record:
        return is_number(record.get("seconds"), 0)
    if not isinstance(record.get("id"), str | int) or isinstance(record["id"], bool):
        return False
    ids = record.get("token_ids")
    is_text = isinstance(ids, list) and all(is_integer(token, 0, vocabulary - 1) for token in ids)
    return is_text or (ids is None and isinstance(record.get("error"), str))


def _complete(records: Sequence[Mapping[str, Any]], prompts: Sequence[Tokenized], file: Path) -> dict[str, Written]:
    """Of the settings that were through what they wrote, in the order of the prompts."""
    places = {prompt.prompt.id: number for number, prompt in enumerate(prompts)}
    found: dict[str, Written] = {}
    parts: dict[str, dict[int, Mapping[str, Any]]] = {}
    for line, record in enumerate(records[1:], 2):
        part = parts.setdefault(record["strategy"], {})
        if "complete" not in record:
            part[places.get(record["id"], -1)] = record
            continue
        if part.keys() != set(places.values()):
            raise ValueError(f"{str(file)!r}, line {line}: is not behind all texts of its strategy; {_INSTEAD}")
        del parts[record["strategy"]]
        errors = {n: each["error"] for n, each in part.items() if "error" in each}
        ids = [part[number].get("token_ids") for number in range(len(prompts))]
        found[record["strategy"]] = Written(ids, errors, float(record["seconds"]))
    return found
