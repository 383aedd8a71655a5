"""What flows through a program: constants, weights and data.

Reading runs a program on abstract values, one of three for every array:

- `Constant`: it comes of neither parameters nor inputs.
- `Weight`: it comes of parameters alone (or is a parameter that data picked from, or scaled). It
  holds one `View` for each parameter that is in it.
- `Data`: it comes of the inputs. What a parameter does to data is a use of it; see `_uses`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

from scion_jax.reading._views import Axes, Part, Places, View

NONE: frozenset[Any] = frozenset()
Views = frozenset[View]


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

    What comes of several has all that any of them has. Only the first four hold for it if they hold
    for each, and so does `flat`.

    Attributes:
        fresh: Whether no parameter was multiplied or looked up before.
        learned: Whether it comes of parameters alone, such as learned tokens.
        cotangent: Whether it is a derivative that was taken inside the program.
        hard: Whether it went through no exponential since its uses came under suspicion.
        pending: The uses that it comes of, with no later product in between.
        suspects: Uses that may have been of weights made from data; see `_products`.
        factors: Uses of the factors of a low rank, if they are that: a learned query times a kernel
            looks the same, but for the exponential that scores go through.
        chosen: Parameters that an index was chosen by.
        views: Of the output axes of the weights that made it.
        flat: Axes along which it is constant, since it was broadcast.
        stacked: Axes that are stacks of independent weights.
        onehot: The axis along which it is one-hot, if it is.
        rows: The axes of one factor, if it is an outer product.
        columns: Those of the other factor.
        traces: Views of what projections brought, also where they are of no use as `views` any
            more, and of heads (without a source); see `_heads`.
    """

    fresh: bool = False
    learned: bool = False
    cotangent: bool = False
    hard: bool = True
    pending: frozenset[Any] = NONE
    suspects: frozenset[Any] = NONE
    factors: frozenset[Any] = NONE
    chosen: frozenset[Any] = NONE
    views: Views = NONE
    flat: Axes = NONE
    stacked: Axes = NONE
    onehot: Axes = NONE
    rows: Axes = NONE
    columns: Axes = NONE
    traces: Views = NONE

    def bare(self) -> Data:
        """Forgets all that has axes."""
        return Data._make([*self[:_FIRST_WITH_AXES], *[NONE] * (len(self) - _FIRST_WITH_AXES)])

    def placed(
        self, places: Places, views: Views = NONE, flat: Axes = NONE, traces: Views = NONE
    ) -> Data:
        """Puts its axes elsewhere: for each new one the old one, or None. Its views are others."""
        others, fields = self[:_FIRST_WITH_AXES], self[_FIRST_WITH_AXES + 1 : -1]
        pairs, axes = list(enumerate(places)), []
        for old in cast(Sequence[Axes], fields):
            axes.append(frozenset([n for n, dim in pairs if dim in old]) if old else old)
        axes[0] |= flat
        return Data._make([*others, views, *axes, traces])


_FIRST_WITH_AXES: int = Data._fields.index("views")


def combined(parts: Sequence[Data]) -> Data:
    """What comes of several data that meet."""
    return functools.reduce(_both, parts)


def _both(one: Data, other: Data) -> Data:
    fields: list[Any] = [
        a if a is b else a & b if isinstance(a, bool) else a | b  # pyright: ignore
        for a, b in zip(one, other, strict=True)
    ]
    fields[_FIRST_WITH_AXES + 1] = one.flat & other.flat
    return Data._make(fields)


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

    def dims(self) -> Axes:
        """Finds the axes along which a parameter varies."""
        return NONE.union(*[view.dims() for view in self.views])

    def as_part(self, part: Part) -> Weight:
        """Views it as a part of something else."""
        return self._replace(views=tuple(view.as_part(part) for view in self.views))


Value = Constant | Weight | Data


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
