"""Shards' outputs into one file, in the order of the input."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from ...checks import user_path
from ...text.files import TextLines, content_suffix, made_parent
from ..requests import decode_line, line_id
from .journal import Key, id_key, record_of
from .manifest import digest, read_manifest


def merge(outputs: Sequence[str | os.PathLike[str]], into: str | os.PathLike[str], order: str | None = None) -> int:
    """Join ``outputs`` into the new file ``into``; returns the number of records.

    Args:
        outputs: files that ``run`` wrote, whole.
        order: the input file; records then stand in its order, else sorted by id.

    Raises:
        ValueError: two records answer the same request, a torn last line, or runs of different settings.
        ManifestError: a manifest beside one of them that is none.
        FileNotFoundError: one of them is not there. FileExistsError: ``into`` is there already.
    """
    files = [user_path(output) for output in outputs]
    for output in files:
        if not output.is_file():
            raise FileNotFoundError(f"there is no file {str(output)!r}")
    _check_settings(files)
    records: dict[Key, bytes] = {}
    for output in files:
        with open(output, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                if not line.endswith(b"\n"):
                    raise ValueError(f"the last line of {os.fspath(output)} is torn: start its run again, then merge")
                if (record := record_of(line)) is None:
                    raise ValueError(f"line {number} of {os.fspath(output)} is no record of a run")
                key = record[0]
                if key in records:
                    raise ValueError(f"{os.fspath(output)} repeats {key[0]} {key[1]}")
                records[key] = line
    keys = sorted(records, key=lambda key: (key[0], str(key[1]).zfill(20)))
    if order is not None:
        places = _places(order)
        keys.sort(key=lambda key: places.get(key, key[1] if key[0] == "line" else math.inf))
    target = made_parent(into)
    with open(target, "xb") as file:
        try:
            file.writelines(records[key] for key in keys)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            target.unlink()
            raise
    return len(keys)


def _check_settings(outputs: Sequence[str | os.PathLike[str]]) -> None:
    """Runs that have a manifest must agree in all but the number of their shard."""
    seen: dict[str, str] = {}
    for output in outputs:
        manifest = read_manifest(output)
        if manifest is None:
            continue
        config = dict(manifest["config"])
        config.pop("shard_id", None)
        seen.setdefault(digest(config), os.fspath(output))
    if len(seen) > 1:
        raise ValueError(f"{' and '.join(list(seen.values())[:2])} were made with different settings")


def _places(path: str | os.PathLike[str]) -> dict[Key, int]:
    places: dict[Key, int] = {}
    is_text = content_suffix(path) == ".txt"
    for number, line in TextLines(path):
        try:
            key = id_key(line_id({} if is_text else decode_line(line), number))
        except (ValueError, TypeError):
            continue
        places.setdefault(key, number)
    return places
