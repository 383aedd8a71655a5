"""Lookups: entries at places that are computed.

Where data says which entries, the axis is looked up: a row of an embedding, a matrix of an expert.
Where a constant says it, it is an index, and where it names several, a rearrangement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scion_jax.reading._elementwise import combined, foremost, unknown
from scion_jax.reading._structure import Dims, changed, cut, moved, shapes
from scion_jax.reading._uses import Uses
from scion_jax.reading._views import Constant, Data, Factor, Value, View, Weight


def dynamic_slice(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Takes a part at a place that is computed."""
    (value, *starts), (old, new) = values, shapes(equation)
    cuts = [d for d, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    places = _known([starts[d] for d in cuts])
    if places is not None:
        return _cut_at(value, old, new, dict(zip(cuts, places, strict=True)))
    return _looked_up(uses, value, starts, cuts, range(len(old)), old, new)


def gather(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Takes entries at places that are given."""
    (value, index), (old, new) = values, shapes(equation)
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    along = dict(
        zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True)
    )
    gone = {*numbers.collapsed_slice_dims, *along.values()}
    rest, batch = iter([d for d in range(len(old)) if d not in gone]), iter(range(len(new)))
    dims = [
        next(rest) if d in numbers.offset_dims else along.get(next(batch)) for d in range(len(new))
    ]
    indexed = numbers.start_index_map
    cuts = [d for d in indexed if sizes[d] != old[d] or d in gone]
    places = _known([index])
    if places is not None and len(places) == len(indexed):
        part = _cut_at(value, old, sizes, dict(zip(indexed, places, strict=True)))
        return moved(part, dims, sizes, new)
    if isinstance(value, Constant) and len(value.iota) == 2 and isinstance(index, Data):
        return index.bare()._replace(onehot=next(n for n, d in enumerate(dims) if d is not None))
    if isinstance(value, Weight):  # tables that go along with the indices are a stack
        value = changed(value, lambda v: v.plain([*along.values()], old, "b"), range(len(old)))
        if isinstance(index, Constant) and any(
            d is None and new[n] > 1 for n, d in enumerate(dims)
        ):
            views = [_rearranged(view, cuts, dims, new) for view in value.views]
            return Weight(foremost(views), value.data)
    return _looked_up(uses, value, [index], cuts, dims, old, new)


def _known(index: Sequence[Value]) -> list[int] | None:
    values = [part.value if isinstance(part, Constant) else None for part in index]
    return None if any(v is None for v in values) else [int(n) for v in values for n in np.ravel(v)]


def _cut_at(value: Value, old: Sequence[int], sizes: Sequence[int], places: dict[int, int]) -> Any:
    starts = {d: max(0, min(place, old[d] - sizes[d])) for d, place in places.items()}
    ranges = ((starts.get(d, 0), n) for d, n in enumerate(sizes))
    return cut(value, old, [(start, start + n, 1) for start, n in ranges])


def _rearranged(view: View, cuts: Sequence[int], dims: Dims, new: Sequence[int]) -> View:
    """Entries of an axis at places that a constant names: along the axes of the indices."""
    own = {f.axis: None for d in cuts for f in view.own(d)}
    axes = tuple(
        tuple(Factor(a, -1, n) for a in own) if d is None and n > 1 and own else axis
        for d, n, axis in zip(dims, new, view.moved(dims, new).axes, strict=True)
    )
    return view._replace(axes=axes)


def _looked_up(
    uses: Uses,
    value: Value,
    index: Sequence[Value],
    cuts: Sequence[int],
    dims: Dims,
    old: Sequence[int],
    new: Sequence[int],
) -> Value:
    given = [part for part in index if not isinstance(part, Constant)]
    picks = [part.bare() if isinstance(part, Data) else Data() for part in given]
    if isinstance(value, Constant):
        return combined(picks) if picks else Constant()
    if isinstance(value, Data):
        through = [view for view in value.views if picks or any(view.own(d) for d in cuts)]
        uses.consume(through)
        kept = tuple(view for view in value.views if view not in through)
        found = moved(value._replace(views=kept), dims, old, new)
        return combined([found, *picks])._replace(flat=frozenset(), onehot=None)
    role = "p" if picks else "b"
    sizes = [new[dims.index(d)] if d in dims else 1 for d in range(len(old))]
    views = [view.plain(cuts, sizes, role).moved(dims, new) for view in value.views]
    data = value.data and value.data.moved(dims)
    if picks:
        uses.looked_up |= dict.fromkeys((view.source for view in views), uses.place())
        found = combined(picks)._replace(flat=frozenset().union(*(v.dims() for v in views)))
        data = combined([data, found]) if data else found
    return Weight(tuple(views), data)


def update(uses: Uses, equation: Any, values: Sequence[Value]) -> Any:
    """Puts entries into an array."""
    place = 1 if equation.primitive.name == "dynamic_update_slice" else 2
    operand, updates = values[0], values[place]
    others = [value for n, value in enumerate(values) if n not in (0, place)]
    shape = equation.outvars[0].aval.shape
    same_rank = len(shape) == len(equation.invars[place].aval.shape)
    if all(isinstance(value, Constant) for value in others):
        if isinstance(operand, Weight) and isinstance(updates, Constant):
            return operand
        if isinstance(operand, Constant) and isinstance(updates, Weight) and same_rank:
            return updates._replace(views=tuple(_placed(view, shape) for view in updates.views))
    for token, data in ((updates, operand), (operand, updates)):  # a token among data
        if isinstance(token, Weight) and isinstance(data, Data) and not token.data:
            return unknown(uses, equation, [uses.entrywise(token, data), data, *others])
    return unknown(uses, equation, values)


def _placed(view: View, shape: Sequence[int]) -> View:
    for dim, size in enumerate(shape):
        view = view.spread(dim, size)
    return view
