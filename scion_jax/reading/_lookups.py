"""Lookups: entries at places that are computed.

Where data says which entries, the axis is looked up: a row of an embedding, a matrix of an expert.
Where a constant says it, it is an index, and where it names several, a rearrangement.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from scion_jax.reading._axes import changed, cut, moved
from scion_jax.reading._elementwise import unknown
from scion_jax.reading._meetings import entrywise
from scion_jax.reading._uses import Operation, Uses
from scion_jax.reading._values import NONE, Constant, Data, Value, Weight, combined
from scion_jax.reading._views import Move, Shape, View, anywhere


def dynamic_slice(uses: Uses, operation: Operation, values: Sequence[Value]) -> Value:
    """Takes a part at a place that is computed."""
    (value, *starts), (old, *_), new = values, operation.shapes, operation.shape
    cuts = [d for d, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    indices = _known([starts[d] for d in cuts])
    if indices is not None:
        return _cut_at(value, old, new, zip(cuts, indices, strict=True))
    return _looked_up(uses, value, starts, cuts, Move(range(len(old)), old, new))


def gather(uses: Uses, operation: Operation, values: Sequence[Value]) -> Value:
    """Takes entries at places that are given."""
    (value, index), (old, _), new = values, operation.shapes, operation.shape
    numbers, sizes = operation.params["dimension_numbers"], operation.params["slice_sizes"]
    indexed, stacks = numbers.start_index_map, numbers.operand_batching_dims
    along = dict(zip(numbers.start_indices_batching_dims, stacks, strict=True))
    gone = {*numbers.collapsed_slice_dims, *stacks}
    rest, batch = iter([d for d in range(len(old)) if d not in gone]), iter(range(len(new)))
    places = [
        next(rest) if d in numbers.offset_dims else along.get(next(batch)) for d in range(len(new))
    ]
    cuts = [d for d in indexed if sizes[d] != old[d] or d in gone]
    indices = _known([index])
    if indices is not None and len(indices) == len(indexed):
        part = _cut_at(value, old, sizes, zip(indexed, indices, strict=True))
        return moved(part, Move(places, sizes, new))
    if isinstance(value, Constant) and len(value.iota) == 2 and isinstance(index, Data):
        axis = next(n for n, d in enumerate(places) if d is not None)
        return index.bare()._replace(onehot=frozenset([axis]))
    if isinstance(value, Weight):  # tables that go along with the indices are a stack
        value = _off_axes(value, stacks, old)
        several = [n for n, d in enumerate(places) if d is None and new[n] > 1]
        if isinstance(index, Constant) and several:
            move = Move(places, old, new)
            return changed(value, lambda view: _reordered(view, cuts, several, move), places)
    return _looked_up(uses, value, [index], cuts, Move(places, old, new))


def _known(index: Sequence[Value]) -> list[int] | None:
    values = [part.value if isinstance(part, Constant) else None for part in index]
    return None if any(v is None for v in values) else [int(n) for v in values for n in np.ravel(v)]


def _cut_at(value: Value, old: Shape, sizes: Shape, indices: Iterable[tuple[int, int]]) -> Any:
    starts = dict.fromkeys(range(len(old)), 0)
    starts |= {d: max(0, min(index, old[d] - sizes[d])) for d, index in indices}
    return cut(value, old, [(starts[d], starts[d] + n, 1) for d, n in enumerate(sizes)])


def _off_axes(weight: Weight, axes: Sequence[int], sizes: Shape, role: str = "b") -> Weight:
    """Takes the parameters off axes, which stay."""
    move = Move([None if d in axes else d for d in range(len(sizes))], sizes, sizes)
    return weight._replace(views=tuple(view.moved(move, role) for view in weight.views))


def _reordered(view: View, cuts: Sequence[int], several: Sequence[int], move: Move) -> View:
    """Entries of an axis at places that a constant names: along the axes of the indices."""
    own, axes = view.own(*cuts), list(view.moved(move).axes)
    for dim in several if own else ():
        axes[dim] = anywhere(own, move.new[dim], stride=-1)
    return view._replace(axes=tuple(axes))


def _looked_up(
    uses: Uses, value: Value, index: Sequence[Value], cuts: Sequence[int], move: Move
) -> Value:
    indices = [part for part in index if not isinstance(part, Constant)]
    picks = [part.bare() if isinstance(part, Data) else Data() for part in indices]
    if isinstance(value, Constant):
        return combined(picks) if picks else Constant()
    if isinstance(value, Data):
        through = frozenset(v for v in value.views if picks or v.own(*cuts))
        uses.consume(through)
        found = moved(value._replace(views=value.views - through), move)
        return combined([found, *picks])._replace(flat=NONE, onehot=NONE)
    places = list(move.places)
    sizes = [move.new[places.index(d)] if d in places else 1 for d in range(len(move.old))]
    weight = _off_axes(value, cuts, sizes, "p" if picks else "b")
    weight = Weight(*changed(weight, lambda view: view.moved(move), places))
    if not picks:
        return weight
    uses.looked_up |= dict.fromkeys((view.source for view in weight.views), uses.place())
    found = combined(picks)._replace(flat=weight.dims())
    return weight._replace(data=combined([weight.data, found]) if weight.data else found)


def update(uses: Uses, operation: Operation, values: Sequence[Value]) -> Any:
    """Puts entries into an array."""
    place = 1 if operation.name == "dynamic_update_slice" else 2
    operand, updates, shape = values[0], values[place], operation.shape
    others = [value for n, value in enumerate(values) if n not in (0, place)]
    if all(isinstance(value, Constant) for value in others):
        if isinstance(operand, Weight) and isinstance(updates, Constant):
            return operand
        same_rank = len(shape) == len(operation.shapes[place])
        if isinstance(operand, Constant) and isinstance(updates, Weight) and same_rank:
            sizes = dict(enumerate(shape))
            return changed(updates, lambda view: view.spread(sizes), range(len(shape)))
    for token, data in ((updates, operand), (operand, updates)):  # a token among data
        if isinstance(token, Weight) and isinstance(data, Data) and not token.data:
            return unknown(uses, operation, [entrywise(uses, token, data), data, *others])
    return unknown(uses, operation, values)
