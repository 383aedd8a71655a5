"""Figures of the code: how much there is, how much of it only refuses, and what depends on what.

    python -m benchmarks.house

**Code** is a line with anything but a docstring, a comment or nothing. **Validation** is all of
`_checks.py` and, elsewhere, functions called `check…`, their calls that stand alone, branches
(`if`, `case`) whose last statement raises, `try` if its one handler does, and any other `raise`. An
**update** passes a file if a function of the file runs while `scion`'s update of two matrices with
`Spectral` is traced; the ground is left out, on which everything stands. **Imports** are all that
there are, also within functions and for type checkers only. Between the packages and modules of
`LAYERS` they may go to an earlier line or stay in theirs, but never in a circle.
"""

import ast
import io
import operator
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

import scion_jax
from benchmarks.reporting import markdown
from scion_jax import Spectral, scion

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / scion_jax.__name__
CHECKS, CHECK = "_checks.py", re.compile(r"_?check(_\w+)?").fullmatch
LAYERS = """
    _numerics _sharding _paths _checks
    _labels
    polar
    distributed
    norms
    _assignment _leaves
    transforms
    optimizers reading initialization description diagnostics activations
"""
GROUND, *_ = RANKS = [line.split() for line in LAYERS.strip().splitlines()]


def span(node: ast.stmt) -> range:
    """Returns the lines of a statement."""
    return range(node.lineno, node.end_lineno + 1)


def code_lines(text: str) -> set[int]:
    """Returns which lines hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.string.strip() and token.type != tokenize.COMMENT:
            lines |= {*range(token.start[0], token.end[0] + 1)}
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            lines -= {*span(node.body[0])}
    return lines


def validation(node: ast.AST) -> Iterator[int]:
    """Yields the lines that only refuse, below a node of a syntax tree."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef(name=name) | ast.Expr(
                ast.Call(func=ast.Name(name) | ast.Attribute(attr=name))
            ) if CHECK(name):
                yield from span(child)
            case ast.If(body=[*_, ast.Raise() as last]):
                yield from range(child.lineno, last.end_lineno + 1)
            case ast.match_case(pattern=first, body=[*_, ast.Raise() as last]):
                yield from range(first.lineno, last.end_lineno + 1)
            case ast.Try(handlers=[ast.ExceptHandler(body=[*_, ast.Raise()])]) | ast.Raise():
                yield from span(child)
        yield from validation(child)


def measure(path: Path) -> tuple[int, int]:
    """Counts the lines of a file that hold code, and those of them that only refuse."""
    text = path.read_text()
    code = code_lines(text)
    refusing = code if path.name == CHECKS else code & {*validation(ast.parse(text))}
    return len(code), len(refusing)


def unit(path: Path) -> str:
    """Names the package of a file, or the file itself if it stands beside the packages."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports() -> dict[str, set[str]]:
    """Returns what each package or module imports of the others."""
    found: dict[str, set[str]] = {unit(path): set() for path in sorted(PACKAGE.rglob("*.py"))}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                parts = [(start + name.name).split(".") for name in node.names]
                found[unit(path)] |= {p[1] for p in parts if p[0] == PACKAGE.name and p[1:]}
    del found["__init__"]
    return {name: (others - {name}) & found.keys() for name, others in found.items()}


def faults(found: dict[str, set[str]]) -> list[str]:
    """Lists the imports that go up, those in a circle, and what has no layer."""
    ranks = {name: rank for rank, names in enumerate(RANKS) for name in names}
    said = [f"{name} has no layer" for name in found if name not in ranks]
    for name, others in found.items():
        up = [other for other in others if ranks.get(other, 0) > ranks.get(name, len(ranks))]
        said += [f"{name} imports {other}, which is above it" for other in sorted(up)]
        reached, ahead = set(), set(others)
        while ahead:
            reached |= ahead
            ahead = {further for other in ahead for further in found[other]} - reached
        said += [f"{name} imports itself, by way of others"] if name in reached else []
    return said


def passed() -> list[str]:
    """Lists the files that an update of matrices passes, without the ground."""
    params = {"first": jnp.ones((4, 8)), "second": jnp.ones((8, 4))}
    optimizer = scion(0.1, {"a": Spectral(), "b": Spectral(2.0)}, {"first": "a", "second": "b"})
    state, files = optimizer.init(params), set()
    sys.setprofile(lambda frame, *_: files.add(frame.f_code.co_filename))
    jax.eval_shape(optimizer.update, params, state, params)
    sys.setprofile(None)
    paths = sorted(Path(file) for file in files if Path(file).is_relative_to(PACKAGE))
    return [str(path.relative_to(PACKAGE)) for path in paths if unit(path) not in GROUND]


def main() -> None:
    """Prints the figures."""
    sums: dict[str, list[int]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for group in {unit(path), "all", "all but reading" if unit(path) != "reading" else "all"}:
            sums[group] = [*map(operator.add, sums.get(group, (0, 0)), measure(path))]
    names = sorted(sums, key=lambda name: (name.startswith("all"), name))
    rows = [[n, *map(str, sums[n]), f"{sums[n][1] / max(sums[n][0], 1):.0%}"] for n in names]
    print(markdown(["scion_jax", "code", "validation", "share"], rows))
    tests = [*(ROOT / "tests").rglob("*.py")]
    lines = sum(len(path.read_text().splitlines()) for path in tests)
    code = sum(measure(path)[0] for path in tests)
    print(f"\ntests: {lines} lines, {code} of code: {code / sums['all'][0]:.2f} of the library's")
    print("\nfiles that an update of a matrix passes:", len(files := passed()), *files)
    print("\nimports:", *faults(imports()) or ["all go down"], sep="\n")


if __name__ == "__main__":
    main()
