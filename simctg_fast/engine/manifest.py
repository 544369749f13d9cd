"""What a run's output depends on, kept beside it, so that it is never continued under another configuration."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


class ManifestError(Exception):
    """The output belongs to another configuration, or to none; the message names the difference."""


def manifest_path(output: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(output)}.manifest.json")


def digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def write_manifest(output: str | os.PathLike[str], config: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Put the manifest of a new run beside ``output``; it is there whole or not at all.

    Args:
        config: everything that decides what is written, as JSON types.
        about: versions, names and so on, which do not.
    """
    path = manifest_path(output)
    record = {"format": FORMAT, "hash": digest(config), "config": config, "about": about}
    draft = path.with_name(path.name + ".tmp")
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def check_manifest(output: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Raise ManifestError unless ``output``, which holds records, was begun under ``config``."""
    path = manifest_path(output)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        before = record["config"]
    except FileNotFoundError as error:
        raise ManifestError(
            f"{os.fspath(output)} holds records, but {path.name}, which says how they were made, is not there; choose "
            "another output or move this one away"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error
    names = sorted(set(before) | set(config))
    nothing = object()
    changed = [name for name in names if before.get(name, nothing) != config.get(name, nothing)]
    if changed:
        lines = [
            f"  {name}: {json.dumps(before.get(name))} then, {json.dumps(config.get(name))} now" for name in changed
        ]
        raise ManifestError(
            f"{os.fspath(output)} was begun with other settings; use those again, or choose another output:\n"
            + "\n".join(lines)
        )


def model_fingerprint(name: str | os.PathLike[str]) -> str:
    """What tells a model folder from another: its configuration, and names and sizes of its weights. A hub name stands
    for itself."""
    folder = Path(name)
    if not folder.is_dir():
        return os.fspath(name)
    sums = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name in ("config.json", "generation_config.json"):
            sums.update(file.name.encode() + file.read_bytes())
        elif file.suffix in _WEIGHTS or file.name.startswith(("tokenizer", "spiece", "vocab", "merges")):
            sums.update(f"{file.name} {file.stat().st_size}".encode())
    return sums.hexdigest()[:16]
