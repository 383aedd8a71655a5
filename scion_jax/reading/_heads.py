"""Heads: the axes of projections that attention never sums over together.

It is a product of data with data that tells. Where it sums over an axis that a projection brought,
that is the inside of a head (of queries, of keys), and the other axes of the same projection tell
one head from the next, be they shared (batch axes) or of one side alone (the groups of queries that
share a key). Where the inside goes on and positions are summed over (values), the shared axes do.
A product without positions, or whose operands share all that a projection brought, is something
else: bilinear, or entry by entry.

Views follow the outputs of projections there, whatever else becomes of them, and from there on the
heads, until the output projection takes them as inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from scion_jax.reading._uses import MATRIX, VECTOR, Use, Uses
from scion_jax.reading._values import NONE, Data, Views
from scion_jax.reading._views import Axes, Move, Part, Shape, View, anywhere


def attended(uses: Uses, parts: Sequence[tuple[Data, Any]]) -> Views:
    """Notes the heads in a product of data with data.

    Args:
        uses: Where to note them.
        parts: Both operands, each with its `Side`.

    Returns:
        Views of the heads in the result.
    """
    if not any(part.traces for part, _ in parts):
        return NONE
    traces = [
        view.moved(side.move)._replace(gone=())
        for part, side in parts
        for view in part.traces
        if view.source is None
    ]
    for part, side in parts if _has_positions(parts) else ():
        found: Axes = NONE
        for kind in (MATRIX, VECTOR):  # a bias has the heads of what it is added to
            for view in part.traces:
                if view.source is None or view.source.kind != kind:
                    continue
                dims = _heads(view, side) if kind == MATRIX else view.dims() & found
                if dims and view.dims() - dims:
                    found |= dims
                    note(uses, view.source, view, dims)
                    traces.append(_only(view, dims, side.move))
    return frozenset(traces)


def _has_positions(parts: Sequence[tuple[Data, Any]]) -> bool:
    """Whether both are data, and an axis that no projection brought is summed over, or goes on."""
    if len(parts) != 2:
        return False
    brought: list[Axes] = [
        NONE.union(*[view.dims() for view in part.traces if view.source is not None])
        for part, _ in parts
    ]
    (_, left), (_, right) = parts
    summed = [
        left.move.old[one] > 1 and one not in brought[0] and other not in brought[1]
        for one, other in zip(left.contract, right.contract, strict=True)
    ]
    going_on = [
        side.move.old[dim] > 1 and dim not in own
        for (_, side), own in zip(parts, brought, strict=True)
        for dim in side.free
    ]
    return any(summed) or any(going_on)


def _heads(view: View, side: Any) -> Axes:
    own = view.dims()
    inside = own & {*side.contract}
    if inside:
        return own - inside
    return own & {*side.batch} if own & {*side.free} else NONE


def _only(view: View, dims: Axes, move: Move) -> View:
    """Views heads alone, in the result."""
    pairs = enumerate(zip(view.axes, move.old, strict=True))
    axes = tuple(axis if dim in dims else anywhere((), size) for dim, (axis, size) in pairs)
    heads = view._replace(source=None, axes=axes, gone=(), part=Part.WHOLE)
    return heads.moved(move)._replace(gone=())


def count(traces: Views, dim: int, size: int) -> int:
    """Counts the heads that lie one after the other on an axis; 1 if there are none."""
    runs = []
    for view in traces:
        inner = 1
        for factor in reversed(view.axes[dim] if view.source is None else ()):
            if factor.stride > 0:
                runs.append((inner, inner * factor.size))
            inner *= factor.size
    end = size
    while outer := [start for start, stop in runs if start < end <= stop]:
        end = min(outer)
    return size // end


def note_inputs(uses: Uses, use: Use, view: View, shape: Shape, heads: Mapping[int, int]) -> None:
    """Notes that an output projection takes several heads.

    Args:
        uses: Where to note it.
        use: The product.
        view: The weight in it.
        shape: The shape of the array that is a view of it.
        heads: How many there are on its axes.
    """
    for dim, number in heads.items():
        split = view.reshaped((*shape[:dim], number, shape[dim] // number, *shape[dim + 1 :]))
        note(uses, use, split, frozenset([dim]))


def note(uses: Uses, use: Use, view: View, dims: Axes) -> None:
    """Notes which entries of each axis of a parameter are a head, if some axes of a view tell."""
    for axis in {factor.axis for factor in view.own(*dims)}:
        for span in _spans(view, axis, dims):
            uses.note("head", [use], axis, span)


def _spans(view: View, axis: int, dims: Axes) -> list[tuple[int, int]]:
    """Finds the range of each head on an axis of a parameter; none where that is not known."""
    outer = [f for f in view.own(*dims) if f.axis == axis and f.size > 1]
    inner = [f for f in view.own(*view.dims() - dims) if f.axis == axis and f.size > 1]
    length = min(factor.stride for factor in outer)
    if length <= 0 and not inner:
        return [(entry, entry + 1) for entry in range(view.shape[axis])]
    if length <= 0 or any(factor.stride >= length for factor in inner):
        return []
    start = view.start[axis]
    ends = [(factor.size - 1) * factor.stride for factor in inner]
    fills = sum(ends) + 1 == length
    start -= 0 if fills else start % length  # a piece of a head stands for the whole of it
    steps = itertools.product(*([n * f.stride for n in range(f.size)] for f in outer))
    return [(start + sum(step), start + sum(step) + length) for step in steps]
