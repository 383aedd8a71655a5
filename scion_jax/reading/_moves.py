"""Moves: operations that put entries elsewhere, or take several arrays or axes together."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scion_jax.reading._axes import changed, cut, moved
from scion_jax.reading._elementwise import stopped, unknown
from scion_jax.reading._meetings import product, settle
from scion_jax.reading._uses import Operation, Uses
from scion_jax.reading._values import NONE, Constant, Data, Value, Weight, combined, foremost
from scion_jax.reading._views import Move, Part, Shape


def without(shape: Shape, axes: Sequence[int]) -> list[int]:
    """Lists the axes that stay."""
    return [dim for dim in range(len(shape)) if dim not in axes]


def broadcast_in_dim(uses: Uses, operation: Operation, values: Sequence[Value]) -> Value:
    """Adds axes, or repeats along them."""
    places = list(operation.params["broadcast_dimensions"])
    dims = [places.index(d) if d in places else None for d in range(len(operation.shape))]
    return moved(values[0], Move(dims, operation.shapes[0], operation.shape))


def transpose(uses: Uses, operation: Operation, values: Sequence[Value]) -> Value:
    """Permutes axes."""
    order = operation.params["permutation"]
    return moved(values[0], Move(order, operation.shapes[0], operation.shape))


def squeeze(uses: Uses, operation: Operation, values: Sequence[Value]) -> Value:
    """Drops axes of size one."""
    kept = without(operation.shapes[0], operation.params["dimensions"])
    return moved(values[0], Move(kept, operation.shapes[0], operation.shape))


def reshape(uses: Uses, operation: Operation, values: Sequence[Value]) -> Value:
    """Splits and merges axes."""
    value, old, new = values[0], operation.shapes[0], operation.shape
    order = operation.params["dimensions"]
    if order is not None:  # permutes them first
        move = Move(order, old, [old[d] for d in order])
        value, old = moved(value, move), move.new
    ends = {(math.prod(old[:d]), n): d for d, n in enumerate(old)}
    dims = [ends.get((math.prod(new[:d]), n)) if n > 1 else None for d, n in enumerate(new)]
    return changed(value, lambda view: view.reshaped(new), dims)


def along_axes(uses: Uses, operation: Operation, values: Sequence[Value]) -> Value:
    """Changes order, number or values along axes: a flip, a repetition, a sum so far."""
    (old, *_), new, params = operation.shapes, operation.shape, operation.params
    axes = [d for d, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    axes += [params["axis"]] if "axis" in params else []
    axes += range(len(old) - len(params.get("fft_lengths", ())), len(old))
    if isinstance(values[0], Data):
        uses.consume(view for view in values[0].views if view.own(*axes))
    sizes = {dim: new[dim] for dim in axes}
    return changed(values[0], lambda view: view.spread(sizes), range(len(old)))


def slice_(uses: Uses, operation: Operation, values: Sequence[Value]) -> Value:
    """Takes a part along each axis."""
    old, params = operation.shapes[0], operation.params
    steps = params["strides"] or (1,) * len(old)
    bounds = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    return cut(values[0], old, bounds)


def split(uses: Uses, operation: Operation, values: Sequence[Value]) -> list[Value]:
    """Cuts along one axis."""
    return _cut_along(values[0], operation.shapes[0], **operation.params)


def _cut_along(value: Value, shape: Shape, sizes: Sequence[int], axis: int) -> list[Value]:
    parts, bounds, start = [], [(0, size, 1) for size in shape], 0
    for size in map(int, sizes):
        bounds[axis] = start, start + size, 1
        parts.append(cut(value, shape, bounds))
        start += size
    return parts


def unstack(uses: Uses, operation: Operation, values: Sequence[Value]) -> list[Value]:
    """Takes the arrays along one axis apart."""
    axis, old = operation.params["axis"], operation.shapes[0]
    parts, move = _cut_along(values[0], old, [1] * old[axis], axis), without(old, [axis])
    return [moved(part, Move(move, old, operation.shape)) for part in parts]


def stack(uses: Uses, operation: Operation, values: Sequence[Value]) -> Value:
    """Puts arrays side by side on a new axis."""
    axis, old, new = operation.params["axis"], operation.shapes[0], operation.shape
    move = Move([*range(axis), None, *range(axis, len(old))], old, new)
    return _together(uses, [moved(value, move) for value in values], axis, new)


def concatenate(uses: Uses, operation: Operation, values: Sequence[Value]) -> Value:
    """Puts arrays side by side."""
    return _together(uses, values, operation.params["dimension"], operation.shape)


def _together(uses: Uses, values: Sequence[Value], axis: int, new: Shape) -> Value:
    weights = [value for value in values if isinstance(value, Weight)]
    datas = [value for value in values if isinstance(value, Data)]
    sizes = {axis: new[axis]}
    if not datas and not any(weight.data for weight in weights):
        return Weight(foremost(view.spread(sizes) for weight in weights for view in weight.views))
    among = datas[0] if datas else None
    datas += [settle(uses, weight, among) for weight in weights]
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
    kept = frozenset(view.spread(sizes) for view in joined.views if not view.own(axis))
    traces = frozenset(view.spread(sizes) for view in joined.traces)
    return joined._replace(views=kept, flat=joined.flat - {axis}, onehot=NONE, traces=traces)


def pad(uses: Uses, operation: Operation, values: Sequence[Value]) -> Value:
    """Puts constants around and between, or takes away at the ends."""
    old, config = operation.shapes[0], operation.params["padding_config"]
    if not isinstance(values[1], Constant):
        return unknown(uses, operation, values)[0]
    less = [low <= 0 and high <= 0 and not inner for low, high, inner in config]
    ends = [(-low, n + high, 1) for (low, high, _), n in zip(config, old, strict=True)]
    bounds = [end if a else (0, n, 1) for a, end, n in zip(less, ends, old, strict=True)]
    sizes = {dim: operation.shape[dim] for dim, is_less in enumerate(less) if not is_less}
    value = cut(values[0], old, bounds)
    return changed(value, lambda view: view.spread(sizes), range(len(old)))


def reduce(uses: Uses, operation: Operation, values: Sequence[Value]) -> Value:
    """Takes axes together: a statistic of a weight, or a sum of a product that is written out."""
    axes, old, value = operation.params["axes"], operation.shapes[0], values[0]
    move, name = Move(without(old, axes), old, operation.shape), operation.name
    if isinstance(value, Weight) and value.data and axes:
        made = _summed(uses, value, axes, move) if name == "reduce_sum" else None
        if made is not None:
            return made
        value = settle(uses, value) if value.picked else value
    if isinstance(value, Data):
        return moved(_reduced(uses, name, value, axes), move)
    value = moved(value, move, "-")
    return stopped(value) if name.startswith("arg") else value


def _reduced(uses: Uses, name: str, data: Data, axes: Sequence[int]) -> Data:
    """What a reduction says of data, before its axes go."""
    if name.startswith("arg"):  # no gradient goes on
        chosen = frozenset(use.view.source for use in data.pending)
        data = data._replace(pending=NONE, chosen=data.chosen | chosen)
    if not data.hard:  # the sum that scores are divided by
        data = data._replace(suspects=NONE, hard=True)
    for dim in axes if name == "reduce_sum" else ():  # the sum over a stack, as of an ensemble
        uses.stack([view for view in data.views if view.dims() - {*axes}], dim, summed=True)
    whole = frozenset(view for view in data.views if view.own(*axes))
    uses.consume(whole)
    traces = frozenset(view for view in data.traces if not view.own(*axes))  # no statistics
    return data._replace(views=data.views - whole, traces=traces)


def _summed(uses: Uses, weight: Weight, axes: Sequence[int], move: Move) -> Data | None:
    """A sum of a weight that data scaled is a product written out; None if it is none."""
    data = weight.data
    if data is None or weight.picked or any(view.part != Part.WHOLE for view in weight.views):
        return None
    pairs = []
    for view in weight.views:
        letters = {d: "i" if d in axes else "b" for d in view.dims() - data.flat}
        letters |= {d: "-" if d in axes else "o" for d in view.dims() & data.flat}
        if not {"i", "o"} <= set(letters.values()):
            return None
        pairs.append(view.paired(letters))
    return product(uses, weight._replace(data=None), pairs, data, move)
