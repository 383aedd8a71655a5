"""Axes of values of any kind: what puts them elsewhere, or takes a part of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from scion_jax.reading._values import Constant, Data, Value, Weight, foremost
from scion_jax.reading._views import Move, Shape, View


def changed(value: Value, change: Callable[[View], View], places: Sequence[int | None]) -> Any:
    """Changes views, and puts all else that has axes elsewhere, as `Data.placed`."""
    if isinstance(value, Weight):
        data = value.data and value.data.placed(places)
        return Weight(foremost(map(change, value.views)), data)
    if isinstance(value, Data):
        views, value = value.views, value.placed(places)
        return value._replace(views=frozenset(map(change, views))) if views else value
    return Constant()


def moved(value: Value, move: Move, role: str = "b") -> Any:
    """Puts axes elsewhere, drops some, which get a role, or repeats along new ones."""
    value = changed(value, lambda view: view.moved(move, role), move.places)
    data = value.data if isinstance(value, Weight) else value
    flat = move.repeated() if isinstance(data, Data) else None
    if not flat or not isinstance(data, Data):
        return value
    data = data._replace(flat=data.flat | flat)
    return value._replace(data=data) if isinstance(value, Weight) else data


def cut(value: Value, old: Shape, bounds: Iterable[tuple[int, int, int]]) -> Any:
    """Takes a part along each axis: from, to, in steps of."""
    parts = [
        (dim, *bound)
        for dim, (size, bound) in enumerate(zip(old, bounds, strict=True))
        if bound != (0, size, 1)
    ]

    def change(view: View) -> View:
        for part in parts:
            view = view.sliced(*part)
        return view

    return changed(value, change, range(len(old)))
