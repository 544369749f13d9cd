"""What a run's output depends on, kept beside it, so that it is never continued under another configuration."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...assets import ADAPTER

FORMAT = 2
# Settings that came later, as runs were before.
_LATER: dict[str, Any] = {
    "share_prefixes": True,
    "weights": None,
    "center": False,
    "fsd_n": None,
    "fsd_beta": 0.9,
    "fsd_stop_tokens": [],
    "adaptive_q": 1.0,
    "adaptive_k_range": [5, 15],
    "guard_window": 7,
    "guard_decay": 0.95,
    "dry_multiplier": 0.0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_sequence_breakers": ["\n", ":", '"', "*"],
    "dry_penalty_range": -1,
}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_SMALL = (".json", ".jinja", ".model", ".py", ".spm")
_TOKENIZERS = ("tokenizer", "spiece", "vocab", "merges", "chat_template")


class ManifestError(ValueError):
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

    Raises:
        ManifestError: a file of somebody else's is there.
        OSError: it cannot be written.
    """
    path = manifest_path(output)
    read_manifest(output)
    record = {"format": FORMAT, "hash": digest(config), "config": config, "about": about}
    draft, name = tempfile.mkstemp(prefix=".simctg-", dir=path.parent)
    try:
        with open(draft, "w", encoding="utf-8") as file:
            os.chmod(name, 0o644)
            json.dump(record, file, indent=1, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(draft)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_manifest(output: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest beside ``output``, None where there is none. Raises ManifestError for a file that is none."""
    path = manifest_path(output)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is no manifest of a run: {str(error) or type(error).__name__}") from error
    parts = [record.get(name) for name in ("config", "about")] if isinstance(record, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise ManifestError(f"{path} is no manifest of a run: it has no config and about")
    return dict(record) | {"config": _LATER | record["config"]}


def check_manifest(output: str | os.PathLike[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of ``output``, which is not empty. Raises ManifestError unless it was begun under ``config``."""
    record = read_manifest(output)
    if record is None:
        raise ManifestError(
            f"{os.fspath(output)} is not empty, but {manifest_path(output).name}, which says how a run made it, is not "
            "there; choose another output or move this one away"
        )
    if record.get("format") != FORMAT:
        raise ManifestError(
            f"{os.fspath(output)} was begun by another version of simctg_fast ({record['about'].get('simctg_fast')}), "
            "which may answer otherwise; go on with that, or choose another output"
        )
    before, config = record["config"], _LATER | dict(config)
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
    return record


def model_fingerprint(name: str | os.PathLike[str]) -> str:
    """What tells a model folder from another: its configuration, its tokenizer, and sizes and samples of its weights. A
    hub name stands for itself."""
    folder = Path(name)
    if not folder.is_dir():
        return os.fspath(name)
    sums = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        if file.suffix in _WEIGHTS:
            sums.update(f"{file.name} {file.stat().st_size}".encode() + _samples(file))
        elif file.suffix in _SMALL or file.name.startswith(_TOKENIZERS):
            sums.update(file.name.encode() + file.read_bytes())
    with suppress(OSError, ValueError, KeyError, TypeError):  # an adapter's: its base model counts as well
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
        sums.update(model_fingerprint(base).encode())
    return sums.hexdigest()[:16]


def _samples(file: Path) -> bytes:
    """Blocks from all over a file: weights of the same shapes, but trained otherwise, differ in every one."""
    size, parts = file.stat().st_size, []
    with open(file, "rb") as data:
        for index in range(16):
            data.seek(max(0, size - 4096) * index // 15)
            parts.append(data.read(4096))
    return b"".join(parts)
