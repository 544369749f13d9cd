"""Files of features: safetensors that are filled in place, and nobody else's file in the way."""

from __future__ import annotations

import errno
import json
import mmap
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..checks import require, user_path
from .files import is_utf8, made_parent

__all__ = ["POOLINGS", "NewFile", "SafetensorsWriter", "check_metadata", "free_target", "read_features"]

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}
POOLINGS = ("none", "mean", "cls", "last")


def free_target(path: str | os.PathLike[str]) -> Path:
    """Where features are to be written: ``path`` without links, if nothing is there or only features of ours.

    Raises:
        ValueError: there is something else, which a file of features would have replaced.
    """
    target = Path(os.path.realpath(user_path(path)))
    if target.is_dir():
        raise ValueError(f"{os.fspath(path)!r} is a folder; name a file in it")
    if os.path.lexists(target):
        try:
            read_features(target, whole=False)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{os.fspath(path)!r} is there already and is no file of features, which alone are replaced ({error}); "
                "name another file"
            ) from error
    return target


def read_features(path: Path, *, whole: bool = True) -> tuple[Tensor, Tensor, str]:
    """Values, lengths and pooling of a file of ours; ``whole=False`` only looks whether it is one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or not all of it.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is not a file")
    try:
        values, lengths, pooling = _read_npz(path, whole) if path.suffix == ".npz" else _read_safetensors(path)
        rows = int(lengths.sum()) if pooling == "none" else len(lengths)
        require(pooling in POOLINGS, "pooling", pooling, f"one of {POOLINGS}")
        if whole and (values.ndim != 2 or len(values) != rows):
            raise ValueError(f"features must have shape ({rows}, D), got {tuple(values.shape)}")
    except OSError:
        raise
    except Exception as error:  # of many kinds: those of safetensors, zip, numpy; names that are not there
        raise ValueError(f"{str(path)!r} holds no features of this library ({error})") from error
    return values, lengths, pooling


def _read_npz(path: Path, whole: bool) -> tuple[Tensor, Tensor, str]:
    import numpy as np

    with np.load(path) as arrays:
        if missing := {"features", "lengths", "pooling"}.difference(arrays.files):
            raise ValueError(f"it has no {sorted(missing)}")
        values = torch.from_numpy(arrays["features"]) if whole else torch.empty(0, 0)
        return values, torch.from_numpy(arrays["lengths"]), str(arrays["pooling"])


def _read_safetensors(path: Path) -> tuple[Tensor, Tensor, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        pooling = (file.metadata() or {}).get("pooling")
        if pooling is None:
            raise ValueError("its header says nothing of a pooling")
        return file.get_tensor("features"), file.get_tensor("lengths"), pooling


class NewFile:
    """A file that appears under its name when it is whole; until then it has a name of its own beside it.

    Args:
        path: where; see `free_target`. Missing folders are made.

    Attributes:
        file: open for reading and writing.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = made_parent(free_target(path))
        # In the same folder, and not longer than a name may be.
        self._partial = self.path.with_name(f"{self.path.name[:40]}.{secrets.token_hex(4)}.partial")
        self.file: BinaryIO = self._partial.open("x+b")

    def commit(self) -> None:
        """Gives it its name.

        Raises:
            ValueError: something else has come there meanwhile; what was written is kept, and the message says where.
        """
        self.file.close()
        try:
            free_target(self.path)
        except ValueError as error:
            raise ValueError(f"{error}; what was written is in {str(self._partial)!r}") from error
        if self.path.exists():
            shutil.copymode(self.path, self._partial)
        self._partial.replace(self.path)

    def discard(self) -> None:
        with suppress(OSError):  # of what could not be written
            self.file.close()
        self._partial.unlink(missing_ok=True)


class SafetensorsWriter:
    """Tensors over a file: what is written to ``writer["name"]`` goes to disk as the system sees fit.

    The file appears under its name when the ``with`` block ends without an error; see `NewFile`. Its space is taken at
    the beginning: a disk that is full says so then, and not by a signal in the middle.

    Args:
        path: of the file.
        tensors: name → (dtype, shape).
        metadata: strings for the header.

    Raises:
        ValueError: the place is taken; a dtype other than float16, bfloat16, float32, float64 and int64; metadata that
            are not strings.
        OSError: no space, no right to write.

    Source: the safetensors format: 8 bytes of header length, a JSON header, the tensors' bytes one after the other.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
    ):
        check_metadata(metadata)
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        end, places = 0, {}
        # The widest first, so that each tensor begins at a multiple of its element size.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
            if dtype not in _NAMES:
                raise ValueError(f"{name} must be of one of {tuple(_NAMES)}, got {dtype}")
            count = 1
            for size in shape:
                count *= size
            places[name] = (dtype, tuple(shape), count, end)
            span = [end, end + count * dtype.itemsize]
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": span}
            end = span[1]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self._tensors: dict[str, Tensor] = {}
        self._new = NewFile(path)
        try:
            file = self._new.file
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            _reserve(file, start + end, self._new.path)
            self._map = mmap.mmap(file.fileno(), start + end)
            for name, (dtype, shape, count, offset) in places.items():
                if count:
                    flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=start + offset)
                else:
                    flat = torch.empty(0, dtype=dtype)
                self._tensors[name] = flat.view(shape)
        except BaseException:
            self._new.discard()
            raise

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._tensors.clear()  # the map itself lives as long as a tensor over it does
        if error is not None:
            self._new.discard()
            return
        try:
            self._map.flush()
        except BaseException:
            self._new.discard()
            raise
        self._new.commit()


def check_metadata(metadata: Mapping[str, str] | None) -> None:
    """Raises ValueError where they are not strings that UTF-8 can hold: the file could not be read again."""
    require(metadata is None or isinstance(metadata, Mapping), "metadata", metadata, "strings by name")
    for name, value in (metadata or {}).items():
        for each in (name, value):
            if not isinstance(each, str) or not is_utf8(each):
                raise ValueError(f"metadata must be strings of UTF-8, got {name!r}: {value!r}")


def _reserve(file: BinaryIO, size: int, path: Path) -> None:
    """Takes the space for ``size`` bytes, or raises OSError: writing to a map of space that is not there kills."""
    try:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        file.seek(0, os.SEEK_END)
        block = bytes(1 << 20)
        while (missing := size - file.tell()) > 0:  # a system that cannot reserve
            file.write(block[:missing])
        file.flush()
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({size:,} bytes are needed)", str(path)) from error
