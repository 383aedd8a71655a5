"""Paths of leaves, and what can be told by them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax


def leaf_path(keys: Sequence[Any]) -> str:
    """Joins a JAX key path with `/`.

    Flax wraps arrays in variables and boxes, whose attribute `value` is left out, so that a state,
    a module and plain arrays have the same paths.

    Args:
        keys: A key path, as `jax.tree_util.tree_flatten_with_path` gives it.

    Returns:
        For example `"layers/0/kernel"`.
    """
    keys = tuple(keys)
    attributes = [i for i, key in enumerate(keys) if isinstance(key, jax.tree_util.GetAttrKey)]
    # The last attribute only, behind which a variable may hold containers of arrays: a layer that
    # is called `value`, as attention's, has attributes of its own.
    last = attributes[-1] if attributes else 0
    if last and keys[last] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:last] + keys[last + 1 :]
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def leaf_paths(tree: Any) -> list[str]:
    """Lists the paths of a tree's leaves."""
    return [leaf_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


def without_collection(path: str) -> str:
    """Drops the `params/` that Linen's variables begin with, so that `^head` finds the head."""
    return path.removeprefix("params/")


# What biases and gains are called: of one layer, `o`; of rank 2 and more stacks, or of several
# axes, never `io`. Single letters are Haiku's and those of plain JAX, `D` and `A_log` Mamba's.
_VECTOR = re.compile(
    r"""
    (?P<shift> (?i: (^|_)(bias|beta|offset)(es|s)? (_|\d|$) ) | ^b(_?([a-z]|\d+))?$ )
    | (?i: (^|_)(scale|gain|gamma)s? (_|\d|$) ) | ^g(_?\d+)?$ | ^D$ | ^A_log$
    """,
    re.VERBOSE,
)


def kind_of_vector(path: str) -> Literal["shift", "gain"] | None:
    """Tells by a leaf's name whether it is a vector, and of which kind.

    Args:
        path: Its path. The name is the last component that is no number.

    Returns:
        `"shift"` for biases, which start at zero in every framework; `"gain"` for what may not;
        None for what may be a matrix.

    Example:
        >>> [kind_of_vector(path) for path in ("linear/b", "norm/scale", "lora_b", "weight")]
        ['shift', 'gain', None, None]
    """
    names = [name for name in path.split("/") if not name.isdecimal()]
    match = _VECTOR.search(names[-1]) if names else None
    if match is None:
        return None
    return "gain" if match["shift"] is None else "shift"


def nearest(text: str, choices: Iterable[str]) -> str | None:
    """Finds the path that looks most like a text, which may be a pattern, as a whole or in part.

    Args:
        text: A path, a pattern or a label.
        choices: Paths.

    Returns:
        One of them; None if nothing in them looks like the text.
    """
    letters = re.sub(r"[\^$.*+?()\[\]|\\]", "", text)
    path_of: dict[str, str] = {}
    for path in choices:
        for part in (path, *path.split("/")):
            path_of.setdefault(part, path)
    found = difflib.get_close_matches(letters, path_of, n=1)
    return path_of[found[0]] if found else None
