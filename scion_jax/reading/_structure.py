"""Structure: operations that put entries elsewhere, or take several arrays or axes together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from scion_jax.reading._elementwise import combined, foremost, stopped, unknown
from scion_jax.reading._products import reduce_scaled
from scion_jax.reading._uses import Uses
from scion_jax.reading._views import Constant, Data, Value, View, Weight

Dims = Sequence[int | None]


def changed(value: Value, change: Callable[[View], View], dims: Dims) -> Any:
    """Changes views; `dims` names the old axis of every new one, for all else that has axes."""
    if isinstance(value, Constant):
        return Constant()
    views = tuple(change(view) for view in value.views)
    if isinstance(value, Weight):
        return Weight(foremost(views), value.data and value.data.moved(dims))
    return value.moved(dims)._replace(views=views) if views else value.moved(dims)


def moved(value: Value, dims: Dims, old: Sequence[int], new: Sequence[int], role: str = "b") -> Any:
    """Puts axes elsewhere, drops some, which get a role, or repeats along new ones."""
    value = changed(value, lambda view: view.moved(dims, new, role), dims)
    places = zip(range(len(new)), dims, new, strict=True)
    flat = {n for n, d, size in places if size > 1 and (d is None or old[d] == 1)}
    if flat and isinstance(value, Data):
        return value._replace(flat=value.flat | flat)
    if flat and isinstance(value, Weight) and value.data:
        return value._replace(data=value.data._replace(flat=value.data.flat | flat))
    return value


def cut(value: Value, old: Sequence[int], bounds: Sequence[tuple[int, int, int]]) -> Any:
    """Takes a part along each axis: from, to, in steps of."""

    def change(view: View) -> View:
        for dim, (size, (start, stop, step)) in enumerate(zip(old, bounds, strict=True)):
            if (start, stop, step) != (0, size, 1):
                view = view.sliced(dim, start, stop, step)
        return view

    return changed(value, change, range(len(old)))


def shapes(equation: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the first operand and of the first result."""
    return equation.invars[0].aval.shape, equation.outvars[0].aval.shape


def reshape(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Splits and merges axes."""
    (old, new), (value, *_), order = shapes(equation), values, equation.params["dimensions"]
    if order is not None:  # permutes them first
        value = moved(value, order, old, [old[d] for d in order])
        old = tuple(old[d] for d in order)
    ends = {(math.prod(old[:d]), n): d for d, n in enumerate(old)}
    dims = [ends.get((math.prod(new[:d]), n)) if n > 1 else None for d, n in enumerate(new)]
    return changed(value, lambda view: view.reshaped(new), dims)


def broadcast_in_dim(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Adds axes, or repeats along them."""
    old, new = shapes(equation)
    places = list(equation.params["broadcast_dimensions"])
    dims = [places.index(d) if d in places else None for d in range(len(new))]
    return moved(values[0], dims, old, new)


def transpose(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Permutes axes."""
    return moved(values[0], equation.params["permutation"], *shapes(equation))


def squeeze(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Drops axes of size one."""
    old, new = shapes(equation)
    dims = [d for d in range(len(old)) if d not in equation.params["dimensions"]]
    return moved(values[0], dims, old, new)


def along_axes(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Changes order, number or values along axes: a flip, a repetition, a sum so far."""
    (old, new), params = shapes(equation), equation.params
    axes = [d for d, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    axes += [params["axis"]] if "axis" in params else []
    axes += range(len(old) - len(params.get("fft_lengths", ())), len(old))

    def change(view: View) -> View:
        for dim in axes:
            view = view.spread(dim, new[dim])
        return view

    if isinstance(values[0], Data):
        uses.consume(view for view in values[0].views if any(view.own(d) for d in axes))
    return changed(values[0], change, range(len(old)))


def slice_(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Takes a part along each axis."""
    old, params = equation.invars[0].aval.shape, equation.params
    steps = params["strides"] or (1,) * len(old)
    bounds = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    return cut(values[0], old, list(bounds))


def split(uses: Uses, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Cuts along one axis."""
    axis, start, parts = equation.params["axis"], 0, []
    old = equation.invars[0].aval.shape
    for size in map(int, equation.params["sizes"]):
        bounds = [(0, n, 1) if d != axis else (start, start + size, 1) for d, n in enumerate(old)]
        parts.append(cut(values[0], old, bounds))
        start += size
    return parts


def unstack(uses: Uses, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Takes the arrays along one axis apart."""
    axis, (old, new) = equation.params["axis"], shapes(equation)
    dims, parts = [d for d in range(len(old)) if d != axis], []
    for place in range(old[axis]):
        bounds = [(0, n, 1) if d != axis else (place, place + 1, 1) for d, n in enumerate(old)]
        parts.append(moved(cut(values[0], old, bounds), dims, old, new))
    return parts


def stack(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Puts arrays side by side on a new axis."""
    axis, (old, new) = equation.params["axis"], shapes(equation)
    dims = [*range(axis), None, *range(axis, len(old))]
    return _together(uses, [moved(value, dims, old, new) for value in values], axis, new)


def concatenate(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Puts arrays side by side."""
    return _together(uses, values, equation.params["dimension"], equation.outvars[0].aval.shape)


def _together(uses: Uses, values: Sequence[Value], axis: int, new: Sequence[int]) -> Value:
    weights = [value for value in values if isinstance(value, Weight)]
    datas = [value for value in values if isinstance(value, Data)]
    if not datas and not any(weight.data for weight in weights):
        views = [view.spread(axis, new[axis]) for weight in weights for view in weight.views]
        return Weight(foremost(views))
    among = datas[0] if datas else None
    datas += [uses.settle(w) if w.data else uses.entrywise(w, among) for w in weights]
    along = [[view for view in data.views if view.own(axis)] for data in datas]
    for source in {view.source for views in along for view in views}:
        spans = [[v.spans() for v in views if v.source == source] for views in along]
        pieces = [span for part in spans for span in part]
        if sum(map(bool, spans)) > 1:  # pieces put together again are one
            ends = [list(zip(*ranges, strict=True)) for ranges in zip(*pieces, strict=True)]
            pieces = [tuple((min(starts), max(stops)) for starts, stops in ends)]
        for span in pieces:
            uses.note("piece", [source], span)
    joined = combined(datas)
    kept = tuple(v.spread(axis, new[axis]) for v in joined.views if not v.own(axis))
    return joined._replace(views=kept, flat=joined.flat - {axis}, onehot=None)


def pad(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Puts constants around and between, or takes away at the ends."""
    old, new = shapes(equation)
    if not isinstance(values[1], Constant):
        return unknown(uses, equation, values)[0]

    def change(view: View) -> View:
        for dim, (low, high, inner) in enumerate(equation.params["padding_config"]):
            if low <= 0 and high <= 0 and not inner:
                view = view.sliced(dim, -low, old[dim] + high, 1)
            elif (low, high, inner) != (0, 0, 0):
                view = view.spread(dim, new[dim])
        return view

    return changed(values[0], change, range(len(old)))


def reduce(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Takes axes together: a statistic of a weight, or a sum of a product that is written out."""
    axes, name = equation.params["axes"], equation.primitive.name
    (old, new), value = shapes(equation), values[0]
    dims = [d for d in range(len(old)) if d not in axes]
    if isinstance(value, Weight) and value.data and axes:
        product = reduce_scaled(uses, value, axes, new) if name == "reduce_sum" else None
        if product is not None:
            return product
        value = uses.settle(value) if value.picked else value
    if isinstance(value, Data):
        return moved(_reduced(uses, name, value, axes), dims, old, new)
    value = moved(value, dims, old, new, "-")
    return stopped(value) if name.startswith("arg") else value


def _reduced(uses: Uses, name: str, data: Data, axes: Sequence[int]) -> Data:
    """What a reduction says of data, before its axes go."""
    if name.startswith("arg"):  # no gradient goes on
        chosen = {key[1] for key in data.pending}  # pyright: ignore[reportIndexIssue]
        data = data._replace(pending=frozenset(), chosen=data.chosen | chosen)
    if data.soft:  # the sum that scores are divided by
        data = data._replace(suspects=frozenset(), soft=False)
    for dim in axes if name == "reduce_sum" else ():  # the sum over a stack, as of an ensemble
        uses.mixed([view for view in data.views if view.dims() - {*axes}], dim)
    whole = [view for view in data.views if any(view.own(d) for d in axes)]
    uses.consume(whole)
    return data._replace(views=tuple(v for v in data.views if v not in whole)) if whole else data
