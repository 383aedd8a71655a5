"""NNX: which embeddings are also used as an output layer.

Nothing is computed here, so calls are not seen; but the code that would make them is.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

Path = tuple[Any, ...]


def attended(modules: Mapping[Path, nnx.Module]) -> frozenset[Path]:
    """Finds the embeddings whose `attend` some module around them mentions.

    Args:
        modules: The modules of a model by their paths.

    Returns:
        Paths of those embeddings. Where the code does not say `….name.attend`, all that the module
        holds are meant.
    """
    embeddings = [path for path, module in modules.items() if isinstance(module, nnx.Embed)]
    found: set[Path] = set()
    for path, module in modules.items():
        names = set(_owners(type(module)))
        if names:
            below = [e for e in embeddings if e[: len(path)] == path and e != path]
            named = {e for e in below if e[-1] in names}
            found |= named or set(below)
    return frozenset(found)


def _owners(module: type) -> Iterator[str]:
    """Lists what stands before `.attend` in the code of a class."""
    for base in module.__mro__:
        if base.__module__.startswith("flax."):
            continue
        for method in vars(base).values():
            function = getattr(method, "__wrapped__", method)
            if isinstance(function, types.FunctionType):
                yield from _before_attend(function.__code__)


def _before_attend(code: types.CodeType) -> Iterator[str]:
    before = ""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if instruction.argval == "attend":
                yield before
            before = str(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _before_attend(constant)
