"""Linen: a model's parameters, as its layers see them while it is initialized abstractly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from scion_jax.labels import leaf_path
from scion_jax.reading_flax import layouts
from scion_jax.reading_flax.layouts import Leaf, Shape, Start
from scion_jax.reading_flax.linen_watching import Seen, axes_of_stacks, initialize


def leaves_of(model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Leaf]:
    """Reads the parameters of a Linen module.

    Args:
        model: The module.
        inputs: What its call takes, arrays or their shapes.
        kwargs: Keyword arguments of its call; `rngs`, `method` and `mutable` as in `init`.

    Returns:
        Its parameters, in the order in which they are made.
    """
    seen: dict[str, Seen] = {}
    attended: set[str] = set()
    final = _shapes(initialize(model, inputs, kwargs, seen, attended))
    places = {
        path: layouts.placements(seen[path].shape, shape)
        for path, shape in final.items()
        if path in seen
    }
    doubtful = {path for path, found in places.items() if len(found) > 1}
    if doubtful:
        boxed = initialize(model, inputs, kwargs, {}, set(), doubtful)
        places |= {path: [axes] for path, axes in axes_of_stacks(boxed).items()}
    order = [path for path in seen if path in final]
    order += [path for path in final if path not in seen]
    return [
        _leaf(path, final[path], seen.get(path), places.get(path, []), path in attended)
        for path in order
    ]


def _leaf(
    path: str, shape: Shape, seen: Seen | None, places: list[tuple[int, ...]], tied: bool
) -> Leaf:
    if seen is None:  # not made by nn.Module.param
        kind = "vector" if len(shape) < 2 else "unknown"
        return Leaf((path,), shape, kind, "o" * len(shape), "a module")
    leaf = Leaf(
        (path,), shape, "unknown", "", seen.module, tied, None, seen.starts_at_zero, seen.problem
    )
    if len(places) != 1:
        return dataclasses.replace(leaf, problem=f"its layer makes it of shape {seen.shape}")
    leaf = dataclasses.replace(leaf, start=_start(path, seen.draw, places[0]))
    if seen.kind == "unknown":
        stack = f"a stack of {seen.shape}" if places[0] else ""
        return dataclasses.replace(leaf, problem=seen.problem or stack)
    layout = layouts.stacked(seen.layout, places[0], shape)
    return dataclasses.replace(leaf, kind=seen.kind, layout=layout)


def _start(path: str, draw: Callable[[jax.Array], Any], axes: tuple[int, ...]) -> Start:
    def start(key: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
        sizes = tuple(shape[axis] for axis in axes)
        try:
            entries = jax.vmap(draw)(jax.random.split(key, math.prod(sizes)))
        except jax.errors.UnexpectedTracerError as error:
            raise ValueError(
                f"leaf '{path}' starts from the model's inputs; give its value, not its shape"
            ) from error
        value = entries.reshape(sizes + entries.shape[1:])
        return jnp.moveaxis(value, range(len(axes)), axes).astype(dtype)

    return start


def _shapes(tree: Any) -> dict[str, Shape]:
    return {
        leaf_path(keys): tuple(leaf.shape)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(tree))
    }
