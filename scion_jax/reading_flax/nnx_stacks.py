"""NNX: which axes of a parameter belong to a stack of layers.

`nnx.vmap` puts a new axis into every parameter of a module and records nowhere where. The layer
still knows its own shape. Where that leaves a choice, the other parameters of the same stack and
the names of the axes decide, and otherwise the axis is the leading one, as in nearly all code.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from scion_jax.reading_flax import layouts
from scion_jax.reading_flax.layouts import Shape

Path = tuple[Any, ...]
Inner = tuple[int | None, ...]
# For each vmap, from the innermost outwards, the axis that it adds; -1 for one at the end.
Insertions = tuple[int, ...]

_STACK = re.compile(r"layer|stack|block|scan|repeat|depth|stage|expert|ensemble|vmap", re.I)


class Stacks:
    """The stacks of a model.

    Args:
        inner: The shapes of parameters inside of their layers, where the layers are known.
        shapes: The shapes of all parameters.
        names: The names of their axes, or empty.
    """

    def __init__(
        self,
        inner: Mapping[Path, Inner],
        shapes: Mapping[Path, Shape],
        names: Mapping[Path, tuple[Any, ...]],
    ) -> None:
        self.shapes = shapes
        self._names = names
        self._inner = inner

    def axes(self, path: Path, inner: Inner) -> tuple[int, ...]:
        """Finds the axes of the stack.

        Args:
            path: Path of a parameter.
            inner: Its shape inside of its layer.

        Returns:
            Their positions; empty if the layer is in no stack.

        Raises:
            ValueError: If the shape is not that of a stack, or it remains open of which.
        """
        shape = self.shapes[path]
        places = layouts.placements(inner, shape)
        if not places:
            sizes = ", ".join("?" if size is None else str(size) for size in inner)
            raise ValueError(f"its layer makes it of shape ({sizes})")
        if len(places) == 1:
            return places[0]
        ways = self._agreed(path, _ways(inner, shape))
        found = {_place(way, len(inner)) for way in ways}
        named = {axes for axes in found if self._named(path, axes)}
        if len(named) == 1:
            return named.pop()
        leading = (0,) * (len(shape) - len(inner))
        if leading in ways:
            return _place(leading, len(inner))
        if len(found) > 1:
            raise ValueError(f"the axes of its stack may be any of {sorted(found)}")
        return found.pop()

    def _agreed(self, path: Path, ways: dict[Insertions, Shape]) -> dict[Insertions, Shape]:
        """Keeps the ways of stacking that suit the other parameters of the stack, too."""
        for length in range(len(path), -1, -1):
            for other, inner in self._inner.items():
                if other[:length] != path[:length] or other == path:
                    continue
                shape = self.shapes[other]
                if len(shape) <= len(inner):
                    return ways  # we have left the stack
                theirs = _ways(inner, shape)
                both = {way: sizes for way, sizes in ways.items() if theirs.get(way) == sizes}
                ways = both or ways
        return ways

    def _named(self, path: Path, axes: tuple[int, ...]) -> bool:
        names = self._names[path]
        return bool(axes) and all(
            axis < len(names) and isinstance(names[axis], str) and _STACK.search(names[axis])
            for axis in axes
        )

    def inner_of_stranger(self, path: Path) -> Inner | None:
        """Finds the inner shape of a parameter whose layer is not known, if it is a vector.

        Args:
            path: Path of the parameter.

        Returns:
            Its shape in one entry of the stack around it, if it is in one; None for a matrix.
        """
        shape = self.shapes[path]
        extra = self._depth_of_surroundings(path)
        if len(shape) < 2:
            return () if len(shape) == extra else (None,) * len(shape)
        if len(shape) == extra + 1 and layouts.GAIN.search(str(path[-1])):
            return (None,)
        return None

    def _depth_of_surroundings(self, path: Path) -> int:
        """Counts the axes of the stack that all known parameters nearby are in."""
        for length in range(len(path), -1, -1):
            near = [
                len(self.shapes[other]) - len(inner)
                for other, inner in self._inner.items()
                if other[:length] == path[:length]
            ]
            if near:
                return near[0] if len(set(near)) == 1 else 0
        return 0


def _place(way: Insertions, rank: int) -> tuple[int, ...]:
    """Finds where inserted axes end up."""
    is_stack = [False] * rank
    for axis in way:
        is_stack.insert(axis if axis >= 0 else len(is_stack), True)
    return tuple(axis for axis, inserted in enumerate(is_stack) if inserted)


def _ways(inner: Inner, shape: Shape) -> dict[Insertions, Shape]:
    """Finds the ways of stacking that fit a shape, each with the sizes of the added axes."""
    count = len(shape) - len(inner)
    places = set(layouts.placements(inner, shape))
    found = {}
    for way in itertools.product(range(-1, len(shape)), repeat=count):
        if all(axis <= rank for rank, axis in enumerate(way, start=len(inner))):
            axes = _place(way, len(inner))
            if axes in places:
                found[way] = tuple(shape[axis] for axis in axes)
    return found
