"""A safetensors file that is filled in place: its size is known before its contents are."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

__all__ = ["SafetensorsWriter"]

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}


class SafetensorsWriter:
    """Tensors over a file: what is written to ``writer["name"]`` goes to disk as the system sees fit.

    The file appears under its name when the ``with`` block ends without an error; until then it is ``path`` plus
    ``.partial``, which an error removes.

    Args:
        path: of the file.
        tensors: name → (dtype, shape).
        metadata: strings for the header.

    Source: the safetensors format: 8 bytes of header length, a JSON header, the tensors' bytes one after the other.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
    ):
        self.path = Path(path)
        self._partial = self.path.with_name(self.path.name + ".partial")
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        end, places = 0, {}
        # The widest first, so that each tensor begins at a multiple of its element size.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
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
        self._file = self._partial.open("w+b")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(start + end)
        self._file.flush()
        self._map = mmap.mmap(self._file.fileno(), start + end)
        self._tensors: dict[str, Tensor] = {}
        for name, (dtype, shape, count, offset) in places.items():
            if count:
                flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=start + offset)
            else:
                flat = torch.empty(0, dtype=dtype)
            self._tensors[name] = flat.view(shape)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._map.flush()
        self._tensors.clear()  # the map itself lives as long as a tensor over it does
        self._file.close()
        if error is None:
            self._partial.replace(self.path)
        else:
            self._partial.unlink(missing_ok=True)
