"""Structure: operations that put entries elsewhere, pick some, or take several together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from scion_jax.reading._elementwise import combined, foremost, stopped, unknown
from scion_jax.reading._products import reduce_scaled
from scion_jax.reading._uses import Uses
from scion_jax.reading._views import PLAIN, Constant, Data, Factor, Value, View, Weight

Dims = Sequence[int | None]


def restructured(value: Value, change: Callable[[View], View], dims: Dims) -> Value:
    """Moves axes; `dims` names the old axis of every new one."""
    if isinstance(value, Constant):
        iota = tuple(new for new, old in enumerate(dims) if old in value.iota)
        return Constant(None, iota if len(iota) == len(value.iota) else ())
    if not value.views:
        return value.moved(dims)  # pyright: ignore[reportAttributeAccessIssue]
    views = tuple(change(view) for view in value.views)
    if isinstance(value, Weight):
        return Weight(foremost(views), value.data.moved(dims) if value.data else None)
    return value.moved(dims)._replace(views=views)


def _shapes(equation: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return equation.invars[0].aval.shape, equation.outvars[0].aval.shape


def reshape(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Splits and merges axes."""
    old, new = _shapes(equation)
    if isinstance(values[0], Constant) and values[0].value is not None:
        return Constant(np.reshape(values[0].value, new))
    ends = {(math.prod(old[:d]), n): d for d, n in enumerate(old)}
    dims = [ends.get((math.prod(new[:d]), n)) if n > 1 else None for d, n in enumerate(new)]
    return restructured(values[0], lambda view: view.reshaped(new), dims)


def broadcast_in_dim(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Adds axes, or repeats along them."""
    old, new = _shapes(equation)
    places = equation.params["broadcast_dimensions"]
    if isinstance(values[0], Constant) and values[0].value is not None and math.prod(new) <= 64:
        value = np.reshape(
            values[0].value, [old[places.index(d)] if d in places else 1 for d in range(len(new))]
        )
        return Constant(np.broadcast_to(value, new), ())
    dims = [places.index(d) if d in places else None for d in range(len(new))]
    value = restructured(values[0], lambda view: view.moved(dims, new), dims)
    if isinstance(value, Constant):
        return value
    flat = {d for d, n in enumerate(new) if n > 1 and (dims[d] is None or old[dims[d]] == 1)}
    if isinstance(value, Data):
        return value._replace(flat=value.flat | flat) if flat else value
    return (
        value._replace(data=value.data._replace(flat=value.data.flat | flat))
        if value.data
        else value
    )


def transpose(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Permutes axes."""
    order, (_, new) = equation.params["permutation"], _shapes(equation)
    return restructured(values[0], lambda view: view.moved(order, new), order)


def squeeze(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Drops axes of size one."""
    dropped, (old, new) = equation.params["dimensions"], _shapes(equation)
    if isinstance(values[0], Constant) and values[0].value is not None:
        return Constant(np.reshape(values[0].value, new))
    dims = [d for d in range(len(old)) if d not in dropped]
    return restructured(values[0], lambda view: view.moved(dims, new), dims)


def same_axes(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Changes the order, or the number, of entries along axes: a flip, a transform."""
    old, new = _shapes(equation)
    changed = [d for d, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    changed += [equation.params["axis"]] if "axis" in equation.params else []
    if equation.primitive.name == "fft":
        changed = list(range(len(old) - len(equation.params["fft_lengths"]), len(old)))

    def change(view: View) -> View:
        for dim in changed:
            view = view.spread(dim, new[dim])
        return view

    if changed and isinstance(values[0], Data):
        uses.consume(view for view in values[0].views if any(view.own(d) for d in changed))
    return restructured(values[0], change, range(len(old)))


def cut(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Takes a part along each axis."""
    (old, new), params = _shapes(equation), equation.params
    steps = params["strides"] or (1,) * len(old)
    bounds = list(zip(params["start_indices"], params["limit_indices"], steps, strict=True))
    if isinstance(values[0], Constant) and values[0].value is not None:
        return Constant(values[0].value[tuple(slice(*b) for b in bounds)])
    return _cut(values[0], old, new, bounds)


def _cut(value: Value, old: Sequence[int], new: Sequence[int], bounds: Sequence[Any]) -> Value:
    def change(view: View) -> View:
        for dim, (start, stop, step) in enumerate(bounds):
            view = view.sliced(dim, start, stop, step) if old[dim] != new[dim] else view
        return view

    return restructured(value, change, range(len(old)))


def split(uses: Uses, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Cuts along one axis."""
    axis, start, parts = equation.params["axis"], 0, []
    old = equation.invars[0].aval.shape
    for size in equation.params["sizes"]:
        bounds = [(0, n, 1) for n in old]
        bounds[axis] = (start, start + int(size), 1)
        parts.append(_cut(values[0], old, [b - a for a, b, _ in bounds], bounds))
        start += int(size)
    return parts


def unstack(uses: Uses, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Takes the arrays along one axis apart."""
    axis, old = equation.params["axis"], equation.invars[0].aval.shape
    dims = [d for d in range(len(old)) if d != axis]
    parts = []
    for place in range(old[axis]):
        bounds = [(0, n, 1) for n in old]
        bounds[axis] = (place, place + 1, 1)
        part = _cut(values[0], old, [b - a for a, b, _ in bounds], bounds)
        parts.append(restructured(part, lambda v: v.moved(dims, [old[d] for d in dims]), dims))
    return parts


def stack(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Puts arrays side by side on a new axis."""
    axis, (old, new) = equation.params["axis"], _shapes(equation)
    dims: list[int | None] = [d if d < axis else d - 1 for d in range(len(old) + 1)]
    dims[axis] = None
    values = [restructured(v, lambda view: view.moved(dims, new), dims) for v in values]
    return _together(uses, values, axis, new)


def concatenate(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Puts arrays side by side."""
    axis, new = equation.params["dimension"], equation.outvars[0].aval.shape
    if all(isinstance(v, Constant) and v.value is not None for v in values):
        return Constant(np.concatenate([v.value for v in values], axis))  # pyright: ignore
    return _together(uses, values, axis, new)


def _together(uses: Uses, values: Sequence[Value], axis: int, new: Sequence[int]) -> Value:
    datas = [value for value in values if isinstance(value, Data)]
    weights = [value for value in values if isinstance(value, Weight)]
    if not datas and not weights:
        return Constant()
    if not datas:
        views = [view.spread(axis, new[axis]) for weight in weights for view in weight.views]
        data = [weight.data for weight in weights if weight.data]
        if not data:
            return Weight(foremost(views))
    datas += [
        uses.settle(w) if w.data else uses.entrywise(w, datas[0] if datas else None)
        for w in weights
    ]
    along = [[view for view in data.views if view.own(axis)] for data in datas]
    for source in {view.source for views in along for view in views}:
        spans = [[v.spans() for v in views if v.source == source] for views in along]
        flat = [span for part in spans for span in part]
        if sum(map(bool, spans)) > 1:  # pieces put together again are one
            ends = [list(zip(*ranges, strict=True)) for ranges in zip(*flat, strict=True)]
            flat = [tuple((min(starts), max(stops)) for starts, stops in ends)]
        for span in flat:
            uses.note("piece", [source], span)
    joined = combined(datas)
    kept = tuple(v.spread(axis, new[axis]) for v in joined.views if not v.own(axis))
    return joined._replace(views=kept, flat=joined.flat - {axis}, onehot=None)


def pad(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Puts constants around, between, or takes away at the ends."""
    value, (old, new) = values[0], _shapes(equation)
    if isinstance(value, Constant) or not isinstance(values[1], Constant):
        return unknown(uses, equation, values)
    config = equation.params["padding_config"]

    def change(view: View) -> View:
        for dim, (low, high, inner) in enumerate(config):
            if low <= 0 and high <= 0 and not inner:
                view = view.sliced(dim, -low, old[dim] + high, 1)
            elif (low, high, inner) != (0, 0, 0):
                view = view.spread(dim, new[dim])
        return view

    return restructured(value, change, range(len(old)))


def reduce(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Takes axes together: a statistic of a weight, or a sum of a product that is written out."""
    axes = equation.params.get("axes", equation.params.get("dimensions", ()))
    (old, new), value = _shapes(equation), values[0]
    dims = [d for d in range(len(old)) if d not in axes]
    if isinstance(value, Constant):
        return Constant()
    if isinstance(value, Weight) and value.data and axes:
        if equation.primitive.name == "reduce_sum":
            product = reduce_scaled(uses, value, axes, new)
            if product is not None:
                return product
        if value.picked:
            value = uses.settle(value)
    if isinstance(value, Weight):
        value = restructured(value, lambda view: view.moved(dims, new, "-"), dims)
        return stopped(value) if "arg" in equation.primitive.name else value  # pyright: ignore
    if equation.primitive.name in ("argmax", "argmin"):  # which no gradient goes through
        chosen = {key[1] for key in value.pending}
        value = value._replace(pending=frozenset(), chosen=value.chosen | chosen)
    if value.soft:  # the sum that scores are divided by
        value = value._replace(suspects=frozenset(), soft=False)
    for dim in axes:  # a sum over a stack, as of an ensemble
        apart = [view for view in value.views if view.dims() - {*axes}]
        if equation.primitive.name == "reduce_sum" and apart:
            uses.mixed(apart, dim)
    whole = [view for view in value.views if any(view.own(d) for d in axes)]
    if whole:
        uses.consume(whole)
        value = value._replace(views=tuple(view for view in value.views if view not in whole))
    return restructured(value, lambda view: view.moved(dims, new), dims)


def dynamic_slice(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Takes a part at a place that is computed: a lookup, if data says where."""
    value, *starts = values
    (old, new) = _shapes(equation)
    cuts = [d for d, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    known = [s.value if isinstance(s, Constant) else None for s in starts]
    if all(known[d] is not None for d in cuts):
        bounds = [
            (int(k) if d in cuts else 0, (int(k) if d in cuts else 0) + n, 1)
            for d, (k, n) in enumerate(zip(known, new, strict=True))
        ]
        return _cut(value, old, new, bounds)
    return _looked_up(uses, value, starts, cuts, range(len(old)), old, new)


def gather(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Takes entries at places that are given: a lookup, if data says where."""
    value, index = values
    numbers, (old, new) = equation.params["dimension_numbers"], _shapes(equation)
    sizes = equation.params["slice_sizes"]
    batching = list(getattr(numbers, "operand_batching_dims", ()))
    gone = {*numbers.collapsed_slice_dims, *batching}
    rest = iter([d for d in range(len(old)) if d not in gone])
    batch = iter(range(len(new)))
    dims: list[int | None] = []
    for d in range(len(new)):
        place = None if d in numbers.offset_dims else next(batch)
        if place is None:
            dims.append(next(rest))
        else:  # an axis of the indices, which may go along with one of the operand
            paired = list(getattr(numbers, "start_indices_batching_dims", ()))
            dims.append(batching[paired.index(place)] if place in paired else None)
    cuts = [d for d in numbers.start_index_map if sizes[d] != old[d] or d in gone]
    known = index.value if isinstance(index, Constant) else None
    if known is not None and np.size(known) == len(numbers.start_index_map):  # a slice
        bounds = [(0, n, 1) for n in old]
        for d, place in zip(numbers.start_index_map, np.ravel(known), strict=True):
            start = max(0, min(int(place), old[d] - sizes[d]))
            bounds[d] = (start, start + sizes[d], 1)
        part = _cut(value, old, sizes, bounds)
        return restructured(part, lambda view: view.moved(dims, new), dims)
    if isinstance(value, Weight) and isinstance(index, Constant):
        rows = [d for d, n in enumerate(dims) if n is None and new[d] > 1]
        if rows:  # entries rearranged by a constant: along these axes, each at its place
            views = [_rearranged(view, cuts, dims, new) for view in value.views]
            return Weight(foremost(views), value.data)
    if isinstance(value, Constant) and len(value.iota) == 2 and isinstance(index, Data):
        onehot = next((d for d, n in enumerate(dims) if n is not None), None)
        return index._replace(views=(), flat=frozenset(), stacked=frozenset(), onehot=onehot)
    if isinstance(value, Weight):  # tables that go along with the indices are a stack
        views = [_relabel(view, batching) for view in value.views]
        value = value._replace(views=tuple(views))
    return _looked_up(uses, value, [index], cuts, dims, old, new)


def _relabel(view: View, dims: Sequence[int]) -> View:
    sizes = [math.prod(f.size for f in axis) for axis in view.axes]
    axes = (
        ((Factor(PLAIN, 0, n),) if n > 1 else ()) if d in dims else axis
        for d, (axis, n) in enumerate(zip(view.axes, sizes, strict=True))
    )
    gone = tuple((f, "b") for d in dims for f in view.own(d))
    return view._replace(axes=tuple(axes), gone=view.gone + gone)


def _rearranged(view: View, cuts: Sequence[int], dims: Dims, new: Sequence[int]) -> View:
    own = {f.axis: None for d in cuts for f in view.own(d)}
    moved = view.moved(dims, new)
    axes = tuple(
        tuple(Factor(a, -1, n) for a in own) if d is None and n > 1 and own else axis
        for d, n, axis in zip(dims, new, moved.axes, strict=True)
    )
    lost = [
        f for d in range(len(view.axes)) if d not in dims and d not in cuts for f in view.own(d)
    ]
    return view._replace(axes=axes, gone=view.gone + tuple((f, "b") for f in lost))


def _looked_up(
    uses: Uses,
    value: Value,
    index: Sequence[Value],
    cuts: Sequence[int],
    dims: Dims,
    old: Any,
    new: Any,
) -> Value:
    picks = [i for i in index if isinstance(i, Data)]
    for part in index:
        if isinstance(part, Weight):
            picks.append(Data())
    if isinstance(value, Constant):
        return (
            combined(picks)._replace(views=(), flat=frozenset(), onehot=None)
            if picks
            else Constant()
        )
    if isinstance(value, Data):
        parts = [value, *picks]
        views = [view for view in value.views if any(view.own(d) for d in cuts)]
        uses.consume(views)
        kept = () if picks else tuple(v for v in value.views if v not in views)
        value = restructured(value._replace(views=kept), lambda v: v.moved(dims, new), dims)
        parts = [
            value,
            *(p._replace(views=(), flat=frozenset(), stacked=frozenset()) for p in picks),
        ]
        return combined(parts)._replace(flat=frozenset(), onehot=None)  # pyright: ignore
    role = "p" if picks else "b"
    views = []
    for view in value.views:
        taken = tuple((f, role) for d in cuts for f in view.own(d))
        for d in cuts:
            if d in dims:
                plain = (Factor(-1, 0, new[dims.index(d)]),)
                view = view._replace(axes=(*view.axes[:d], plain, *view.axes[d + 1 :]))
            else:
                view = view._replace(axes=(*view.axes[:d], (), *view.axes[d + 1 :]))
        view = view.moved(dims, new)
        views.append(view._replace(gone=view.gone + taken))
    data = value.data.moved(dims) if value.data else None
    if picks:
        uses.looked_up |= dict.fromkeys((view.source for view in views), uses.place())
        own = frozenset().union(*(view.dims() for view in views))
        found = combined(picks)._replace(views=(), flat=own, onehot=None, stacked=frozenset())
        data = combined([data, found]) if data else found
    return Weight(tuple(views), data)


def update(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Puts entries into an array."""
    operand, updates = (
        values[0],
        values[{"dynamic_update_slice": 1}.get(equation.primitive.name, 2)],
    )
    placed = [v for v in values if v is not operand and v is not updates]
    if (
        isinstance(operand, Weight)
        and isinstance(updates, Constant)
        and all(isinstance(v, Constant) for v in placed)
    ):
        return operand  # some entries set to constants
    if isinstance(operand, Constant) and isinstance(updates, Weight) and not updates.data:
        shape = equation.outvars[0].aval.shape
        if len(shape) == len(updates.views[0].axes) and all(
            isinstance(v, Constant) for v in placed
        ):
            return Weight(tuple(_placed(view, shape) for view in updates.views))
    for token, data in ((updates, operand), (operand, updates)):  # a token among data
        if isinstance(token, Weight) and isinstance(data, Data) and not token.data:
            return unknown(uses, equation, [uses.entrywise(token, data), data, *placed])
    return unknown(uses, equation, values)


def _placed(view: View, shape: Sequence[int]) -> View:
    for dim, size in enumerate(shape):
        view = view.spread(dim, size)
    return view
