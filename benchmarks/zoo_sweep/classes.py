"""The classes of the installed transformers that generate, found by looking rather than by a list of names."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import textwrap
from pathlib import Path
from typing import Any

__all__ = ["enters_generate", "find", "generating_classes"]


@functools.cache
def generating_classes() -> dict[str, tuple[str, str]]:
    """Module and architecture (folder) by the name of every class that inherits ``GenerationMixin``.

    Read from the sources: importing every model takes longer than running most of them.
    """
    import transformers.models

    places: dict[str, tuple[str, str]] = {}
    bases: dict[str, set[str]] = {}
    for path in sorted(Path(transformers.models.__file__).parent.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if "GenerationMixin" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                places[node.name] = (f"transformers.models.{path.parent.name}.{path.stem}", path.parent.name)
                bases[node.name] = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
    found = {parent for parents in bases.values() for parent in parents if parent.endswith("GenerationMixin")}
    while more := {name for name, parents in bases.items() if name not in found and parents & found}:
        found |= more
    return {name: places[name] for name in sorted(found & set(places))}


def find(name: str) -> Any | None:
    """The class called ``name`` if it generates, else None."""
    module, _ = generating_classes()[name]
    cls = getattr(importlib.import_module(module), name)
    return cls if getattr(cls, "config_class", None) is not None and cls.can_generate() else None


def enters_generate(cls: Any) -> bool:
    """Whether ``cls.generate`` comes to the one of ``GenerationMixin``, its own or that of a model inside: CTC classes
    and some that write sound have a loop of their own, which takes no ``custom_generate``."""
    from transformers import GenerationMixin

    if cls.generate is GenerationMixin.generate or "custom_generate" in inspect.signature(cls.generate).parameters:
        return True
    owner = next(base for base in cls.__mro__ if "generate" in vars(base))
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    return any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "generate"
        for node in ast.walk(tree)
    )
