"""The model in the box, and the name `bundled` that means it wherever a model folder is expected."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from ..checks import user_path

__all__ = ["ADAPTER", "BUNDLED", "ModelError", "bundled_model_path", "did_you_mean", "resolve_model"]

BUNDLED = "bundled"
ADAPTER = "adapter_config.json"  # what makes a folder one of PEFT's

# What the Hugging Face hub accepts as a repository name, with or without its owner.
_HUB_NAME = re.compile(r"[\w.\-]+(/[\w.\-]+)?")


class ModelError(FileNotFoundError, ValueError):
    """A model that cannot be had: not there, not to be reached, not a model, broken, or refused.

    The one error of everything that takes a model's name; its text is one line that names the model and the fault. A
    FileNotFoundError, so an OSError, and a ValueError, since a wrong name is all of these.
    """


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

    A folder of the user's own that is called `bundled` is reached as ``./bundled``. A folder with an adapter of PEFT's
    is a model too.

    Raises:
        ModelError: `name` is a path (it is absolute, starts with ``.`` or ``~``, or has more than one separator) and
            there is no such folder, the folder has neither ``config.json`` nor ``adapter_config.json``, or `name` is
            neither a path nor possible as a hub name.
    """
    name = os.fspath(name)
    if name == BUNDLED:
        return str(bundled_model_path())
    try:
        path = user_path(name)
        is_folder, exists = path.is_dir(), path.exists()
        is_model = is_folder and any((path / file).is_file() for file in ("config.json", ADAPTER))
    except OSError as error:
        raise ModelError(f"the model folder {name!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"the model cannot be found: {error}") from error
    if is_model:
        return str(path)
    if is_folder:
        # A folder without a model beside a hub name of the same spelling: the hub name may still be meant.
        if _looks_like_path(name):
            raise ModelError(f"the folder {name!r} holds no model: it has no config.json")
    elif exists:
        raise ModelError(f"the model {name!r} is a file; give the folder that holds config.json")
    elif _looks_like_path(name):
        raise ModelError(f"there is no model folder {name!r}; give a local folder, a hub name or {BUNDLED!r}")
    if not _HUB_NAME.fullmatch(name):
        raise ModelError(f"the model must be a local folder, a hub name (owner/name) or {BUNDLED!r}; got {name!r}")
    return name


def did_you_mean(name: str) -> str:
    """``"; did you mean 'bundled'?"`` behind a name that is nearly that, else nothing."""
    near = difflib.get_close_matches(name.lower(), [BUNDLED], cutoff=0.75)
    return f"; did you mean {BUNDLED!r}?" if near else ""


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or os.path.isabs(name)
