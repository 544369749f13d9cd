"""Models in local folders: nothing is looked for anywhere else."""

from __future__ import annotations

import os
from typing import Any

from ...checks import user_path
from ...loading import load_backbone

__all__ = ["folder_model", "local_folder"]


def local_folder(path: Any, name: str) -> str:
    """The folder's path.

    Raises:
        ValueError: no folder of a model.
    """
    found = user_path(path) if isinstance(path, str | os.PathLike) else None
    if found is None or (not (found / "config.json").is_file() and not (found / "modules.json").is_file()):
        raise ValueError(f"{name} must be a local folder of a model (nothing is downloaded), got {path!r:.80}")
    return str(found)


def folder_model(path: Any, name: str) -> tuple[Any, Any]:
    """``(model, tokenizer)`` without its output layer."""
    return load_backbone(local_folder(path, name))
