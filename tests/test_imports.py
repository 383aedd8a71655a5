"""Imports go down only: no package, and no module of one, imports what imports it."""

import ast
import graphlib
import pathlib

import pytest

import scion_jax

ROOT = pathlib.Path(scion_jax.__file__).parent
GROUND = ("_numerics", "_sharding")


def imports(path):
    """Lists the modules that a file names, as `scion_jax/…` without the first part."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1:] for name in names if name.split(".")[0] == "scion_jax")


def room(parts, depth):
    """The package or module at a depth that something named so is in."""
    known = parts
    while known and not (
        (ROOT.joinpath(*known)).is_dir() or ROOT.joinpath(*known).with_suffix(".py").exists()
    ):
        known = known[:-1]
    return "/".join(known[:depth])


@pytest.mark.parametrize("depth", [1, 2])
def test_no_circles(depth):
    """Between packages, and between modules; a package's `__init__` only gathers what is public."""
    graph = {}
    for path in ROOT.rglob("*.py"):
        if path.name == "__init__.py":
            continue
        here = room(path.relative_to(ROOT).with_suffix("").parts, depth)
        there = {room(parts, depth) for parts in imports(path)} - {here, ""}
        graph.setdefault(here, set()).update(there)
    assert len(graph) > 10
    list(graphlib.TopologicalSorter(graph).static_order())  # raises if there are any


@pytest.mark.parametrize("name", GROUND)
def test_the_ground_imports_nothing(name):
    assert not list(imports(ROOT / f"{name}.py"))
