"""The model in the box, and the name `bundled` that means it wherever a model folder is expected."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["BUNDLED", "bundled_model_path", "resolve_model"]

BUNDLED = "bundled"

# What the Hugging Face hub accepts as a repository name, with or without its owner.
_HUB_NAME = re.compile(r"[\w.\-]+(/[\w.\-]+)?")


def bundled_model_path() -> Path:
    """Folder of the bundled model: a small GPT-2 and its tokenizer, for ``from_pretrained``.

    Raises:
        FileNotFoundError: the installation lacks the folder.
    """
    folder = Path(__file__).resolve().parent / "bundled"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"the bundled model is missing from {folder}; reinstall simctg_fast, or train it with "
            "`python benchmarks/train_bundled.py` in a checkout"
        )
    return folder


def resolve_model(name: str | os.PathLike[str]) -> str:
    """What ``from_pretrained`` takes: the bundled folder for ``"bundled"``, a local folder, or a hub name as it is.

    A folder of the user's own that is called `bundled` is reached as ``./bundled``.

    Raises:
        FileNotFoundError: `name` is a path (it is absolute, starts with ``.`` or ``~``, or has more than one separator)
            and there is no such folder, or the folder has no ``config.json``.
        ValueError: `name` is neither a path nor possible as a hub name.
    """
    name = os.fspath(name)
    if name == BUNDLED:
        return str(bundled_model_path())
    path = Path(name).expanduser()
    if path.is_dir():
        # A folder without a model beside a hub name of the same spelling: the hub name may still be meant.
        if (path / "config.json").is_file():
            return str(path)
        if _looks_like_path(name):
            raise FileNotFoundError(f"the folder {name!r} holds no model: it has no config.json")
    elif path.exists():
        raise FileNotFoundError(f"the model {name!r} is a file; give the folder that holds config.json")
    elif _looks_like_path(name):
        raise FileNotFoundError(f"there is no model folder {name!r}; give a local folder, a hub name or {BUNDLED!r}")
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(f"the model must be a local folder, a hub name (owner/name) or {BUNDLED!r}; got {name!r}")
    return name


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or os.path.isabs(name)
