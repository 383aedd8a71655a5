"""Trees that must fit each other: gradients, parameters and buffers."""

from __future__ import annotations

from typing import Any

import jax

from scion_jax.labels import differing_containers, leaf_path
from scion_jax.numerics import check_floating


def check_alike(tree: Any, other: Any, name: str, other_name: str) -> None:
    """Checks that two trees have the same structure, and arrays of the same shapes.

    Args:
        tree: Arrays.
        other: Arrays.
        name: What to call the first in error messages, such as `"the gradients"`.
        other_name: What to call the second.

    Raises:
        TypeError: If a leaf is no array of a floating dtype; the message names it.
        ValueError: If they differ; the message names the leaves.
    """
    shapes, others = _shapes(tree, name), _shapes(other, other_name)
    if shapes == others:
        _check_containers(tree, other, name, other_name)
        return
    differing = [
        f"leaf '{path}' has shape {shapes[path]} in {name} and {others[path]} in {other_name}"
        for path in shapes.keys() & others.keys()
        if shapes[path] != others[path]
    ]
    alone = [f"leaf '{path}' is in {name} only" for path in shapes.keys() - others.keys()]
    alone += [f"leaf '{path}' is in {other_name} only" for path in others.keys() - shapes.keys()]
    raise ValueError(
        f"{name} and {other_name} do not fit each other: {'; '.join(sorted(differing + alone))}"
    )


def only_where(tree: Any, other: Any) -> Any:
    """Keeps of `other` what stands where `tree` has leaves; None stands for the rest.

    Args:
        tree: Arrays, with None where there is none.
        other: The same structure, perhaps with something else where `tree` has None.

    Returns:
        A tree of the structure of `tree`, unless the two do not fit at all.
    """

    def is_none(x: Any) -> bool:
        return x is None

    try:
        return jax.tree.map(lambda t, o: None if t is None else o, tree, other, is_leaf=is_none)
    except (ValueError, TypeError):  # check_alike says where they differ
        return other


def check_leaves(tree: Any, name: str) -> None:
    """Raises `TypeError` for a leaf that is no array of a floating dtype; the message names it."""
    _shapes(tree, name)


def _shapes(tree: Any, name: str) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = leaf_path(keys)
        check_floating(leaf, f"leaf '{path}' of {name}")
        shapes[path] = tuple(leaf.shape)
    return shapes


def _check_containers(tree: Any, other: Any, name: str, other_name: str) -> None:
    try:
        jax.tree.map(lambda *_: None, tree, other)
    except (ValueError, TypeError) as error:  # which says where
        raise ValueError(
            f"{name} and {other_name} have the same leaves in other containers: "
            f"{differing_containers(tree, other, name, other_name)}; give both the same structure, "
            "as jax.grad does"
        ) from error
