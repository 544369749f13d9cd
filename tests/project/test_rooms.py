"""The rooms of the package: imports point down, as CONTRIBUTING's table says, and never round in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from ..repository import INSTALLED

# Each room and what else it may import, all of it further up here. Nothing but tests and benchmarks has `reference`.
EVERYBODYS = {"checks", "memory", "printable", "strategy_names"}
ROOMS = {
    "checks": "",
    "memory": "",
    "printable": "",
    "strategy_names": "",
    "distributed": "",
    "kernels": "",
    "reference": "",
    "ops": "kernels",
    "cpu": "ops",
    "ranking": "distributed ops",
    "functional": "distributed ops ranking",
    "losses": "ops functional",
    "metrics": "",
    "crf": "ops",
    "assets": "",
    "loading": "assets",
    "decoding": "kernels ops cpu",
    "plain": "ops decoding",
    "text": "metrics loading ops cpu decoding",
    "metrics.models": "metrics loading text",
    "engine": "loading ops cpu decoding text",
    "engine.job": "assets text engine",
    "compat": "functional loading decoding text",
    "integrations": "distributed ops ranking functional assets loading decoding text engine engine.job",
    "training": "loading text integrations",
    "evaluation": "ops loading metrics metrics.models text engine",
    "terminal": "",
    "cli": "ops loading text engine engine.job integrations training evaluation terminal",
}


def modules() -> dict[str, tuple[bool, ast.Module]]:
    """Every module by its name behind ``simctg_fast.``: whether it is a package, and its syntax tree."""
    folder, found = INSTALLED / "simctg_fast", {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        found[".".join(parts[:-1] if is_package else parts)] = is_package, ast.parse(path.read_text("utf-8"))
    return found


MODULES = modules()


def imports(name: str) -> Iterator[tuple[str, bool]]:
    """Modules of the package that ``name`` imports, and whether within a function; not those for type checkers."""
    is_package, tree = MODULES[name]
    places = ["simctg_fast", *filter(None, name.split("."))]

    def visit(node: ast.AST, late: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, late) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = places[: len(places) - child.level + is_package] if child.level else []
                source = ".".join([*base, *filter(None, [child.module])])
                for alias in child.names:
                    inner = f"{source}.{alias.name}"
                    yield (inner if inner.partition(".")[2] in MODULES else source), late
            yield from visit(child, late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    for found, late in visit(tree, False):
        if found.startswith("simctg_fast."):
            yield found.partition(".")[2], late


EDGES = {name: set(imports(name)) for name in MODULES}


def room(module: str) -> str:
    return max((name for name in ROOMS if f"{module}.".startswith(f"{name}.")), key=len)


def leads_to(start: str, end: str, *, late: bool) -> bool:
    """Whether imports lead from one module to the other, with or without those within functions."""
    found, waiting = set(), [start]
    while waiting:
        nexts = {module for module, is_late in EDGES.get(waiting.pop(), ()) if late or not is_late}
        waiting += nexts - found
        found |= nexts
    return end in found


def test_arrows_point_down():
    order = list(ROOMS)
    for name, allowed in ROOMS.items():
        assert set(allowed.split()) <= set(order[: order.index(name)]), name
    for name in filter(None, MODULES):
        reached = {room(module) for module, _ in EDGES[name]}
        assert reached <= {room(name), *EVERYBODYS, *ROOMS[room(name)].split()}, name


def test_no_circles():
    edges = [(module, name, late) for name in MODULES for module, late in EDGES[name] if module != name]
    assert [edge for edge in edges if not edge[2] and leads_to(*edge[:2], late=False)] == []
    assert [edge for edge in edges if edge[2] and leads_to(*edge[:2], late=True)] == []
