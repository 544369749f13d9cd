"""Shards' outputs into one file, in the order of the input."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from .journal import Key, id_key, record_key
from .manifest import digest, manifest_path
from .requests import line_id


def merge(outputs: Sequence[str | os.PathLike[str]], into: str | os.PathLike[str], order: str | None = None) -> int:
    """Join ``outputs`` into the new file ``into``; returns the number of records.

    Args:
        outputs: files that ``run`` wrote, whole.
        order: the input file; records then stand in its order, else sorted by id.

    Raises:
        ValueError: two records answer the same request, a torn last line, or runs of different settings.
        FileExistsError: ``into`` is there already.
    """
    _check_settings(outputs)
    records: dict[Key, bytes] = {}
    for output in outputs:
        with open(output, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    raise ValueError(f"the last line of {os.fspath(output)} is torn: start its run again, then merge")
                try:
                    key, _ = record_key(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(f"line {number} of {os.fspath(output)} is no record of a run") from error
                if key in records:
                    raise ValueError(f"{os.fspath(output)} repeats {key[0]} {key[1]}")
                records[key] = line
    keys = sorted(records, key=lambda key: (key[0], str(key[1]).zfill(20)))
    if order is not None:
        places = _places(order)
        keys.sort(key=lambda key: places.get(key, key[1] if key[0] == "line" else len(places) + 1))
    target = Path(into)
    with open(target, "xb") as file:
        file.writelines(records[key] for key in keys)
        file.flush()
        os.fsync(file.fileno())
    return len(keys)


def _check_settings(outputs: Sequence[str | os.PathLike[str]]) -> None:
    """Runs that have a manifest must agree in all but the number of their shard."""
    seen: dict[str, str] = {}
    for output in outputs:
        path = manifest_path(output)
        if not path.is_file():
            continue
        config = dict(json.loads(path.read_text(encoding="utf-8"))["config"])
        config.pop("shard_id", None)
        seen.setdefault(digest(config), os.fspath(output))
    if len(seen) > 1:
        raise ValueError(f"{' and '.join(list(seen.values())[:2])} were made with different settings")


def _places(path: str | os.PathLike[str]) -> dict[Key, int]:
    places: dict[Key, int] = {}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                given = json.loads(line)
                key = id_key(line_id(given, number))
            except (ValueError, TypeError, AttributeError):
                continue
            places.setdefault(key, number)
    return places
