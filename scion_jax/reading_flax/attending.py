"""NNX: which embeddings are also used as an output layer.

An NNX model is read without calling it, so calls are not seen; but the code that makes them is.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

Path = tuple[Any, ...]


def attended(modules: Mapping[Path, nnx.Module]) -> frozenset[Path]:
    """Finds the embeddings that a module around them uses for more than looking up.

    Args:
        modules: The modules of a model by their paths.

    Returns:
        Paths of the embeddings for which there is `….name.attend` or `….name.embedding` in the
        code of a module that holds them. Where an `attend` has no such name before it, all that
        the module holds are meant.
    """
    embeddings = [path for path, module in modules.items() if isinstance(module, nnx.Embed)]
    found: set[Path] = set()
    for path, module in modules.items():
        mentioned = set(_mentioned(type(module)))
        held = [e for e in embeddings if e[: len(path)] == path and e != path]
        named = {e for e in held if (e[-1], "attend") in mentioned}
        found |= {e for e in held if (e[-1], "embedding") in mentioned}
        if any(attribute == "attend" for _, attribute in mentioned):
            found |= named or set(held)
    return frozenset(found)


def _mentioned(module: type) -> Iterator[tuple[str, str]]:
    """Lists pairs of attributes that follow each other in the code of a class."""
    for base in module.__mro__:
        if not base.__module__.startswith("flax."):
            for method in vars(base).values():
                function = getattr(method, "__wrapped__", method)
                if isinstance(function, types.FunctionType):
                    yield from _pairs(function.__code__)


def _pairs(code: types.CodeType) -> Iterator[tuple[str, str]]:
    before = ""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            yield before, (before := str(instruction.argval))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _pairs(constant)
