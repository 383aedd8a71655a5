"""What flows through a program: constants, weights and data.

Reading runs a program on abstract values, one of three for every array:

- `Constant`: it comes of neither parameters nor inputs.
- `Weight`: it comes of parameters alone (or is a parameter that data picked from, or scaled). It
  holds one `View` for each parameter that is in it.
- `Data`: it comes of the inputs. What a parameter does to data is a use of it; see `_uses`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from scion_jax.reading._views import Move, Part, Shape, View

_NONE: frozenset[Any] = frozenset()


class Constant(NamedTuple):
    """An array that comes of neither parameters nor inputs.

    Attributes:
        value: Its value, where it is a small whole number or a few, such as an index.
        iota: The axis along which it counts, if it does; two for an identity matrix.
    """

    value: Any = None
    iota: tuple[int, ...] = ()


class Data(NamedTuple):
    """An array that comes of the inputs.

    Attributes:
        fresh: Whether no parameter was multiplied or looked up before.
        learned: Whether it comes of parameters alone, such as learned tokens.
        cotangent: Whether it is a derivative that was taken inside the program.
        soft: Whether it went through an exponential since its uses came under suspicion.
        pending: The uses that it comes of, with no later product in between.
        suspects: Uses that may have been of weights made from data; see `_products`.
        factors: Uses of the factors of a low rank, if they are that: a learned query times a kernel
            looks the same, but for the exponential that scores go through.
        chosen: Parameters that an index was chosen by.
        views: Of the output axes of the weights that made it.
        flat: Axes along which it is constant, since it was broadcast.
        stacked: Axes that are stacks of independent weights.
        onehot: The axis along which it is one-hot, if it is.
        outer: Two sets of axes, if it is an outer product along them.
    """

    fresh: bool = False
    learned: bool = False
    cotangent: bool = False
    soft: bool = False
    pending: frozenset[Any] = _NONE
    suspects: frozenset[Any] = _NONE
    factors: frozenset[Any] = _NONE
    chosen: frozenset[Any] = _NONE
    views: frozenset[View] = _NONE
    flat: frozenset[int] = _NONE
    stacked: frozenset[int] = _NONE
    onehot: frozenset[int] = _NONE
    outer: tuple[frozenset[int], ...] = ()

    def bare(self) -> Data:
        """Forgets all that has axes."""
        return self._replace(views=_NONE, flat=_NONE, stacked=_NONE, onehot=_NONE, outer=())


class Weight(NamedTuple):
    """An array that comes of parameters alone, or is picked from or scaled by data.

    Attributes:
        views: One for each parameter in it, or more where it holds several parts of one.
        data: What picked or scaled it; its axes are the array's.
    """

    views: tuple[View, ...]
    data: Data | None = None

    @property
    def picked(self) -> bool:
        """Whether data chose which entries of an axis it holds."""
        return any(role == "p" for view in self.views for _, role in view.gone)

    @property
    def plain(self) -> bool:
        """Whether one of its views is of a parameter itself, no factor of a product of several."""
        return any(view.part == Part.WHOLE and not view.is_factor for view in self.views)

    def dims(self) -> frozenset[int]:
        """Finds the axes along which a parameter varies."""
        return _NONE.union(*[view.dims() for view in self.views])

    def as_part(self, part: Part) -> Weight:
        """Views it as a part of something else."""
        return self._replace(views=tuple(view.as_part(part) for view in self.views))


Value = Constant | Weight | Data


class Operation(NamedTuple):
    """An equation of a program.

    Attributes:
        name: Name of its primitive.
        params: Its parameters.
        shapes: Shapes of its operands.
        shape: Shape of its result, or of the first of them.
        results: How many there are.
    """

    name: str
    params: Any
    shapes: Sequence[Shape]
    shape: Shape
    results: int = 1


def combined(parts: Sequence[Data]) -> Data:
    """What comes of several data that meet."""
    if len(parts) == 1:
        return parts[0]
    return Data(
        fresh=all(part.fresh for part in parts),
        learned=all(part.learned for part in parts),
        cotangent=all(part.cotangent for part in parts),
        soft=any(part.soft for part in parts),
        pending=_NONE.union(*[part.pending for part in parts]),
        suspects=_NONE.union(*[part.suspects for part in parts]),
        factors=_NONE.union(*[part.factors for part in parts]),
        chosen=_NONE.union(*[part.chosen for part in parts]),
        views=_NONE.union(*[part.views for part in parts]),
        flat=parts[0].flat.intersection(*[part.flat for part in parts]),
        stacked=_NONE.union(*[part.stacked for part in parts]),
        onehot=_NONE.union(*[part.onehot for part in parts]),
        outer=next((part.outer for part in parts if part.outer), ()),
    )


def foremost(views: Iterable[View]) -> tuple[View, ...]:
    """Keeps the views that matter: beside a weight itself, not its statistics."""
    views = tuple(views)
    if len(views) == 1:
        return views
    whole = {v: None for v in views if v.part == Part.WHOLE and not v.is_statistic}
    sources = {view.source for view in whole}
    kept: dict[Any, View] = {}
    for view in views:
        if view in whole or view.source not in sources:
            kept.setdefault((view.source, view.spans(), view.part), view)
    return tuple(kept.values())


def changed(value: Value, change: Callable[[View], View], dims: Sequence[int | None]) -> Any:
    """Changes views; `dims` names the old axis of every new one, for all else that has axes."""
    if isinstance(value, Constant):
        return Constant()
    if isinstance(value, Weight):
        data = value.data and changed(value.data, lambda view: view, dims)
        return Weight(foremost(map(change, value.views)), data)

    def placed(axes: frozenset[int]) -> frozenset[int]:
        return frozenset([n for n, old in enumerate(dims) if old in axes]) if axes else axes

    return value._replace(
        views=frozenset(map(change, value.views)),
        flat=placed(value.flat),
        stacked=placed(value.stacked),
        onehot=placed(value.onehot),
        outer=tuple(map(placed, value.outer)),
    )


def moved(value: Value, move: Move, role: str = "b") -> Any:
    """Puts axes elsewhere, drops some, which get a role, or repeats along new ones."""
    value, flat = changed(value, lambda view: view.moved(move, role), move.places), move.repeated()
    if isinstance(value, Weight) and value.data:
        return value._replace(data=value.data._replace(flat=value.data.flat | flat))
    return value._replace(flat=value.flat | flat) if isinstance(value, Data) else value


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
