"""Axes of values of any kind: what puts them elsewhere, or takes a part of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from scion_jax.reading._values import NONE, Constant, Data, Value, Weight, foremost
from scion_jax.reading._views import Axes, Move, Places, Shape, View


def changed(value: Value, change: Callable[[View], View], places: Places, flat: Axes = NONE) -> Any:
    """Changes views, and puts all else that has axes elsewhere, as `Data.placed`."""
    if isinstance(value, Constant):
        return Constant()
    if isinstance(value, Data):
        views, traces = (frozenset(map(change, seen)) for seen in (value.views, value.traces))
        return value.placed(places, views, flat, traces)
    data = value.data and value.data.placed(places, value.data.views, flat)
    return Weight(foremost(map(change, value.views)), data)


def moved(value: Value, move: Move, role: str = "b") -> Any:
    """Puts axes elsewhere, drops some, which get a role, or repeats along new ones."""
    return changed(value, lambda view: view.moved(move, role), move.places, move.repeated())


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
