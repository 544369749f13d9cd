"""The corpus of the bundled model: the English that every Python installation carries, cleaned to prose.

Sources, all of them read and none of them executed: the language reference behind ``help()`` (``pydoc_data.topics``),
the docstrings of the standard library's ``.py`` files (by ``ast``), and those of a fixed list of modules written in C.
A document is one file, one topic or one C module; its docstrings follow one another in source order, a blank line
between paragraphs. Everything is sorted and deduplicated, so one Python version gives one corpus, byte for byte.

    python benchmarks/bundled_corpus.py            # sizes and the hash; with a path, writes the text there
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
C_MODULES = ("_collections", "_functools", "_io", "builtins", "itertools", "math", "sys", "time")
VALIDATION_SHARE = 20  # one document in this many

_RULER = re.compile(r"^[\s=\-~*^#+_.|]{3,}$")
_LIST_ITEM = re.compile(r"^\s*([*\-+•]|\d+[.)]|\([a-z0-9]\))\s+")
_WORD = re.compile(r"""^["'(*`\[]*[A-Za-z][A-Za-z'’\-/]*["')*`\]]*[.,;:!?]*["')]*$""")
_NOT_PROSE = re.compile(r"copyright|all rights reserved|licen[cs]e|::=|<[\w.]+@|https?://\S+\s*$|\$Id", re.IGNORECASE)


@dataclass(frozen=True)
class Corpus:
    """Documents by name, split by the hash of the name into training and validation."""

    documents: dict[str, str]

    def split(self) -> tuple[list[str], list[str]]:
        """Training and validation documents; a name decides, so neither order nor size moves a document over."""
        parts: tuple[list[str], list[str]] = ([], [])
        for name, text in self.documents.items():
            held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % VALIDATION_SHARE == 0
            parts[held_out].append(text)
        return parts

    @cached_property
    def text(self) -> str:
        return "\n\n\n".join(self.documents.values()) + "\n"

    def describe(self) -> dict[str, int | str]:
        """What a model card needs: hash, sizes, Python version."""
        train, validation = self.split()
        return {
            "sha256": hashlib.sha256(self.text.encode()).hexdigest(),
            "python": platform.python_version(),
            "documents": len(self.documents),
            "characters": len(self.text),
            "train_characters": sum(map(len, train)),
            "validation_characters": sum(map(len, validation)),
        }


def build_corpus(sources: int | None = None) -> Corpus:
    """Read, clean, deduplicate. A few seconds. ``sources``: the first so many only."""
    seen: set[str] = set()
    documents = {}
    for name, docstrings in islice(_sources(), sources):
        fresh = []
        for paragraph in (paragraph for text in docstrings for paragraph in clean(text)):
            if paragraph not in seen:
                seen.add(paragraph)
                fresh.append(paragraph)
        text = "\n\n".join(fresh)
        if len(text) >= 80:  # shorter leftovers teach nothing but how to stop
            documents[name] = text
    return Corpus(documents)


def clean(docstring: str) -> list[str]:
    """The prose paragraphs of a docstring, unwrapped: doctests, tables, grammars, code and legal text left out."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = [line.rstrip() for line in block.split("\n") if line.strip() and not _RULER.match(line)]
        if not lines or any(line.lstrip().startswith((">>>", "...", "$ ", "% ")) for line in lines):
            continue
        paragraphs += [paragraph for paragraph in _unwrap(lines) if _is_prose(paragraph)]
    return paragraphs


def _unwrap(lines: list[str]) -> Iterator[str]:
    """Join hard-wrapped lines; a list item and a line indented less than the one before start anew."""
    current: list[str] = []
    indent = 0
    for line in lines:
        line_indent = len(line) - len(line.lstrip())
        if current and (_LIST_ITEM.match(line) or line_indent < indent):
            yield _join(current)
            current = []
        current.append(line)
        indent = line_indent
    if current:
        yield _join(current)


def _join(lines: list[str]) -> str:
    return re.sub(r"\s+", " ", " ".join(lines)).strip()


def _is_prose(paragraph: str) -> bool:
    """At least three words, most of them plain English words rather than code, and nothing legal or grammatical."""
    words = _LIST_ITEM.sub("", paragraph).split()
    plain = sum(bool(_WORD.match(word)) for word in words)
    return len(words) >= 3 and plain >= 0.62 * len(words) and not _NOT_PROSE.search(paragraph)


def _sources() -> Iterator[tuple[str, list[str]]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic/{name}", [topics[name]]
    for name in C_MODULES:
        yield f"c/{name}", _c_docstrings(name)
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts):
            yield relative.as_posix(), _file_docstrings(path)


def _file_docstrings(path: Path) -> list[str]:
    """Docstrings of a module, its classes and its functions, in source order; none if it does not parse."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # some templates of the standard library are not Python
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [doc for node in nodes if (doc := ast.get_docstring(node))]


def _c_docstrings(module_name: str) -> list[str]:
    """Docstrings of a C module, its public functions and classes and their methods, sorted by name."""
    module = importlib.import_module(module_name)
    docs = [module.__doc__ or ""]
    for name, member in sorted(vars(module).items()):
        if name.startswith("_") or getattr(member, "__module__", module_name) not in (module_name, "io", "functools"):
            continue
        # Only functions and classes document themselves; a plain value shows the docstring of its type.
        if inspect.isclass(member):
            docs.append(_own_doc(member))
            docs += [_own_doc(value) for key, value in sorted(vars(member).items()) if key != "__doc__"]
        elif inspect.isroutine(member):
            docs.append(_own_doc(member))
    return docs


def _own_doc(member: object) -> str:
    doc = getattr(member, "__doc__", None)
    return doc if isinstance(doc, str) and doc != type(member).__doc__ else ""


def main() -> None:
    corpus = build_corpus()
    for key, value in corpus.describe().items():
        print(f"{key:22} {value}")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(corpus.text, encoding="utf-8")


if __name__ == "__main__":
    main()
