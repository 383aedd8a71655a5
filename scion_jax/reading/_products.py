"""Products: where weights are multiplied with data, and so what their axes are.

A contracted axis of a weight is its input, an axis that it brings to the result its output, one
that both operands share a batch of independent matrices.

Data may itself serve as a weight, as the result of one product does in attention. Where an axis of
such a result is contracted while another one goes on, it may be that the parameter is not what it
seems: a matrix that data shifts, a mixture of matrices, a hypernetwork. Attention looks the same
but for what follows: scores go through an exponential and into another product of data. Any other
end makes the parameter unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from scion_jax.reading._elementwise import combined, foremost, merged, unknown
from scion_jax.reading._uses import MATRIX, VECTOR, Uses, composed
from scion_jax.reading._views import (
    LOST,
    MIXED,
    PLAIN,
    WHOLE,
    Constant,
    Data,
    Factor,
    Value,
    View,
    Weight,
)  # fmt: skip

Dims = Sequence[int]


class _Sums(NamedTuple):
    """Which axes a product takes together, of its left and of its right operand.

    Attributes:
        contract: Axes that are summed over.
        batch: Axes that both share.
        free: All others.
        places: For each axis of the result the axis of the operand, or None.
        shape: Shape of the result.
    """

    contract: Sequence[Dims]
    batch: Sequence[Dims]
    free: Sequence[Dims]
    places: Sequence[Sequence[int | None]]
    shape: Dims


def dot_general(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Follows a product over any axes."""
    contract, batch = equation.params["dimension_numbers"]
    ranks = [len(atom.aval.shape) for atom in equation.invars]
    return _dot(uses, values, _sums(contract, batch, ranks, equation.outvars[0].aval.shape))


def ragged_dot(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Follows a product of each row with the matrix of its group."""
    numbers, shape = equation.params["ragged_dot_dimension_numbers"], equation.outvars[0].aval.shape
    groups, (left, right, *_) = numbers.rhs_group_dimensions, values
    left = uses.settle(left) if isinstance(left, Weight) and left.data else left
    if not isinstance(right, Weight) or not isinstance(left, Data):
        return unknown(uses, equation, values)[0]
    sizes = equation.invars[1].aval.shape
    kept = [d for d in range(len(sizes)) if d not in groups]
    views = tuple(view.moved(kept, [sizes[d] for d in kept]) for view in right.views)
    (left_sum, right_sum), (left_batch, right_batch) = numbers.dot_dimension_numbers
    contract = left_sum, [kept.index(d) for d in right_sum]
    batch = left_batch, [kept.index(d) for d in right_batch]
    ranks = len(equation.invars[0].aval.shape), len(kept)
    return _dot(uses, [left, right._replace(views=views)], _sums(contract, batch, ranks, shape))


def _sums(contract: Any, batch: Any, ranks: Dims, shape: Dims) -> _Sums:
    free = [
        [d for d in range(rank) if d not in c and d not in b]
        for c, b, rank in zip(contract, batch, ranks, strict=True)
    ]
    blanks = [[None] * len(dims) for dims in free]
    places = [*batch[0], *free[0], *blanks[1]], [*batch[1], *blanks[0], *free[1]]
    return _Sums(contract, batch, free, places, shape)


def _dot(uses: Uses, values: Sequence[Value], sums: _Sums) -> Value:
    weights = [value for value in values if isinstance(value, Weight)]
    sides = [isinstance(v, Weight) and _has_sides(v, n, sums) for n, v in enumerate(values)]
    both = len(weights) == 2 and (all(sides) or not all(weight.data for weight in weights))
    values = [  # a row that data looked up, say, is data, unless it serves as a weight
        uses.settle(v)
        if isinstance(v, Weight) and v.data and (both or (v.picked and not has_sides))
        else v
        for v, has_sides in zip(values, sides, strict=True)
    ]
    weights = [value for value in values if isinstance(value, Weight)]
    if len(weights) == 2:  # broadcast to a batch before, a learned token, and no weight
        values = [
            uses.entrywise(value)
            if isinstance(value, Weight) and _is_token(value, n, sums)
            else value
            for n, value in enumerate(values)
        ]
    match values:
        case Weight(), Weight():
            return _composed(values, sums)
        case Weight() as weight, Constant():
            return _rearranged(uses, weight, 0, sums)
        case Constant(), Weight() as weight:
            return _rearranged(uses, weight, 1, sums)
        case Weight() as weight, Data() as data:
            return _with_data(uses, weight, data, 0, sums)
        case Data() as data, Weight() as weight:
            return _with_data(uses, weight, data, 1, sums)
        case Constant(), Constant():
            return Constant()
    return _of_data(uses, values, sums)


def _has_sides(weight: Weight, side: int, sums: _Sums) -> bool:
    return all(weight.dims() & {*dims[side]} for dims in (sums.contract, sums.free))


def _is_token(weight: Weight, side: int, sums: _Sums) -> bool:
    sizes = {d: n for d, n in zip(sums.places[side], sums.shape, strict=True) if d is not None}
    return any(sizes[d] > 1 and d not in weight.dims() for d in sums.free[side])


def _with_data(uses: Uses, weight: Weight, data: Data, side: int, sums: _Sums) -> Value:
    contract, batch, free = sums.contract[side], sums.batch[side], sums.free[side]
    theirs, passed = sums.contract[1 - side], sums.places[1 - side]
    letters = {**dict.fromkeys(contract, "i"), **dict.fromkeys(free, "o")}
    if data.onehot is not None and data.onehot in theirs:  # it picks entries of an axis
        if len(theirs) == 1 and not weight.data:
            views = tuple(v.moved(sums.places[side], sums.shape, "p") for v in weight.views)
            flat = frozenset(n for n, d in enumerate(passed) if d is None)
            return Weight(views, data.moved(passed)._replace(views=(), onehot=None, flat=flat))
        letters[contract[list(theirs).index(data.onehot)]] = "b"
    alone = not weight.dims() & {*contract, *free}  # by batch axes alone: entry by entry
    for mine, other in zip(batch, sums.batch[1 - side], strict=True):
        letters[mine] = "o" if alone and other not in data.stacked else "b"
        if not alone and any(view.own(mine) for view in weight.views):
            data = data._replace(stacked=data.stacked | {other})
            uses.stack(data.views, other)
    outer = data.outer if data.onehot not in theirs else ()
    if outer and all(axes & {*theirs} for axes in outer):  # of inputs and gates, say
        weight = weight._replace(views=tuple(v._replace(part=LOST) for v in weight.views))
    ours = [d if alone or d not in batch else None for d in sums.places[side]]
    stacked = frozenset(n for n, d in enumerate(passed) if d in data.stacked)
    roles = [[(f, letters[d]) for d in letters for f in view.own(d)] for view in weight.views]
    kind = VECTOR if alone else MATRIX
    return _product(uses, weight, roles, data, ours, sums.shape, kind)._replace(stacked=stacked)


def _product(
    uses: Uses,
    weight: Weight,
    roles: Sequence[Sequence[tuple[Factor, str]]],
    data: Data,
    dims: Sequence[int | None],
    shape: Dims,
    kind: str = MATRIX,
) -> Data:
    """Notes a product; returns its result, with views of the axes of the weight that are in it."""
    if weight.data:
        data = combined([weight.data._replace(flat=frozenset()), data._replace(flat=frozenset())])
    keys = uses.product(weight, roles, data, kind)
    uses.note("suspected", data.suspects)
    made = tuple(
        view.moved(dims, shape)._replace(source=key, gone=())
        for view, key in zip(weight.views, keys, strict=True)
    )
    plain = any(view.part == WHOLE and not composed(view) for view in weight.views)
    pairs = () if plain else (k for v, k in zip(weight.views, keys, strict=True) if composed(v))
    return Data(
        pending=frozenset(keys), views=made, learned=data.learned, composed=frozenset(pairs)
    )


def _of_data(uses: Uses, values: Sequence[Value], sums: _Sums) -> Data:
    """A product of data with data or a constant."""
    parts = [(value, side) for side, value in enumerate(values) if isinstance(value, Data)]
    joined = combined([part._replace(flat=frozenset(), onehot=None) for part, _ in parts])
    stacked, suspects, onehot = set(), joined.suspects, None
    for part, side in parts:
        places = list(sums.places[side])
        onehot = places.index(part.onehot) if part.onehot in {*places} - {None} else onehot
        stacked |= {n for n, d in enumerate(sums.places[side]) if d in part.stacked}
        apart = [v for v in part.views if not v.dims() & {*sums.batch[side]}]
        contract = [d for d in sums.contract[side] if not uses.mixed(apart, d)]
        made = [v for v in part.views if _as_weight(v, contract, sums.free[side])]
        suspects |= {view.source for view in made}
        uses.consume(part.views)
    free = [
        frozenset(n for n, d in enumerate(places) if d in dims)
        for places, dims in zip(sums.places, sums.free, strict=False)
    ]
    is_outer = len(parts) == 2 and all(free) and len(free) == 2 and not sums.contract[0]
    return joined._replace(
        views=(), stacked=frozenset(stacked), soft=False, onehot=onehot, composed=frozenset(),
        outer=tuple(free) if is_outer else (), pending=uses.unfollowed(joined.pending),
        suspects=frozenset() if len(parts) == 2 and joined.soft else suspects,
    )  # fmt: skip


def _as_weight(view: View, contract: Dims, free: Dims) -> bool:
    """Whether a result serves as a weight: one axis is contracted, another one goes on."""
    inside = {f.axis for d in contract for f in view.own(d) if f.size > 1}
    outside = {f.axis for d in free for f in view.own(d) if f.size > 1}
    return any(a != b for a in inside for b in outside)


def _composed(values: Sequence[Any], sums: _Sums) -> Weight:
    """`A @ B`: the inner axis is the output of the first that data meets, so of the left one."""
    shared = {view.source for view in values[0].views} & {view.source for view in values[1].views}
    matrices = all(_has_sides(weight, side, sums) for side, weight in enumerate(values))
    moved = []
    for side, weight in enumerate(values):
        views = []
        for view in weight.views:
            part = view.part
            if part == WHOLE and sums.contract[side] and (shared or not matrices):
                part = LOST if matrices else MIXED
            role = "OI"[side] if matrices and not shared else "-"
            views.append(view.moved(sums.places[side], sums.shape, role)._replace(part=part))
        moved.append(Weight(tuple(views)))
    if not sums.contract[0]:  # entry by entry
        return merged("mul", moved) or moved[0]
    return Weight(foremost([*moved[0].views, *moved[1].views]))


def _rearranged(uses: Uses, weight: Weight, side: int, sums: _Sums) -> Weight | Data:
    """A product with a constant rearranges an axis, which keeps its role, or sums over it."""
    if uses.transposed:  # the derivative of a sum of outputs
        letters = {**dict.fromkeys(sums.contract[side], "i"), **dict.fromkeys(sums.free[side], "o")}
        roles = [[(f, letters[d]) for d in letters for f in v.own(d)] for v in weight.views]
        return _product(uses, weight, roles, Data(), sums.places[side], sums.shape)._replace(
            views=()
        )
    new = [d is None for d in sums.places[side]]
    views = []
    for view in weight.views:
        inner = {f.axis: None for d in sums.contract[side] for f in view.own(d)}
        moved = view.moved(sums.places[side], sums.shape, "-")
        if inner and any(new):
            gone = tuple((Factor(axis, 0, 1), "c") for axis in inner)
            rows = [tuple(Factor(axis, 0, n) for axis in inner if n > 1) for n in sums.shape]
            axes = tuple(
                r if is_new else axis for r, is_new, axis in zip(rows, new, moved.axes, strict=True)
            )
            moved = moved._replace(axes=axes, gone=view.gone + gone)
        views.append(moved)
    return Weight(tuple(views), weight.data and weight.data._replace(flat=frozenset()))


def convolution(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Follows a convolution: `rhs_spec` tells what is what in the kernel."""
    params, shape = equation.params, equation.outvars[0].aval.shape
    numbers, (image, kernel) = params["dimension_numbers"], values
    out, inside, *window = numbers.rhs_spec
    if isinstance(image, Weight) and isinstance(kernel, Constant):  # a filter that does not learn
        return image._replace(views=tuple(view.mixed(shape) for view in image.views))
    if isinstance(image, Weight) and image.data:
        image = uses.settle(image)
    if isinstance(image, Weight):
        if any(view.dims() & {numbers.lhs_spec[0]} for view in image.views):
            uses.refuse(image, "it takes the place of the images in a convolution")
        image = uses.entrywise(image)  # a learned image
    if isinstance(kernel, Weight):
        if isinstance(image, Constant) or params["batch_group_count"] != 1:
            return unknown(uses, equation, [image, kernel])[0]
        letters = {inside: "i", **dict.fromkeys(window, "s")}
        roles = [
            [(f, letters[d]) for d in letters for f in view.own(d)]
            + _grouped(view.axes[out], params["feature_group_count"])
            for view in kernel.views
        ]
        places = [out if d == numbers.out_spec[1] else None for d in range(len(shape))]
        return _product(uses, kernel, roles, image, places, shape)
    if isinstance(image, Constant) and isinstance(kernel, Constant):
        return Constant()
    ranks = len(numbers.lhs_spec)
    contract, free = ([], [inside, *window]), (list(range(ranks)), [out])
    return _of_data(uses, values, _Sums(contract, ([], []), free, ([], []), shape))


def _grouped(axis: Sequence[Factor], groups: int) -> list[tuple[Factor, str]]:
    """Gives the outermost `groups` of the output channels to groups, the rest to outputs."""
    roles = []
    for factor in axis:
        shared = math.gcd(groups, factor.size) if groups > 1 else 1
        inner = factor.size // shared
        if groups > 1 and factor.axis != PLAIN:
            roles.append((Factor(factor.axis, factor.stride * inner, shared), "g"))
            if inner > 1:
                roles.append((factor._replace(size=inner), "o"))
        elif factor.axis != PLAIN:
            roles.append((factor, "o"))
        groups //= shared
    return roles


def reduce_scaled(uses: Uses, weight: Weight, axes: Dims, shape: Dims) -> Data | None:
    """A sum of a weight that data scaled is a product written out; None if it is none."""
    data = weight.data
    if data is None or weight.picked or any(view.part != WHOLE for view in weight.views):
        return None
    kept = [d for d in range(len(weight.views[0].axes)) if d not in axes]
    roles = []
    for view in weight.views:
        letters = {d: "i" if d in axes else "b" for d in view.dims() - data.flat}
        letters |= {d: "-" if d in axes else "o" for d in view.dims() & data.flat}
        if not {"i", "o"} <= set(letters.values()):
            return None
        roles.append([(f, letters[d]) for d in letters for f in view.own(d)])
    return _product(uses, weight._replace(data=None), roles, data, kept, shape)
