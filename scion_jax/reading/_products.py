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

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scion_jax.reading._elementwise import merged, unknown
from scion_jax.reading._letters import MATRIX, Pairs
from scion_jax.reading._uses import VECTOR, Uses
from scion_jax.reading._values import Constant, Data, Value, Weight, changed, combined, foremost
from scion_jax.reading._views import Factor, Part, View, anywhere

Dims = Sequence[int]
_NONE: frozenset[Any] = frozenset()


class Side(NamedTuple):
    """What a product does with the axes of one of its operands.

    Attributes:
        contract: Axes that are summed over, in the order of those of the other operand.
        batch: Axes that both share, in the same order.
        free: All others.
        places: For each axis of the result the axis of the operand, or None.
    """

    contract: Dims
    batch: Dims
    free: Dims
    places: Sequence[int | None]

    def letters(self) -> dict[int, str]:
        """What the axes of a weight are, but those of a batch."""
        return {**dict.fromkeys(self.contract, "i"), **dict.fromkeys(self.free, "o")}

    def both(self, weight: Weight) -> bool:
        """Whether a weight has inputs and outputs here."""
        return all(weight.dims() & {*dims} for dims in (self.contract, self.free))


def dot_general(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Follows a product over any axes."""
    contract, batch = equation.params["dimension_numbers"]
    ranks = [len(atom.aval.shape) for atom in equation.invars]
    return _dot(uses, values, _sides(contract, batch, ranks), equation.outvars[0].aval.shape)


def ragged_dot(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Follows a product of each row with the matrix of its group."""
    numbers, shape = equation.params["ragged_dot_dimension_numbers"], equation.outvars[0].aval.shape
    groups, (left, right, *_) = numbers.rhs_group_dimensions, values
    left = uses.settle(left) if isinstance(left, Weight) and left.data else left
    if not isinstance(right, Weight) or not isinstance(left, Data):
        return unknown(uses, equation, values)[0]
    sizes = equation.invars[1].aval.shape
    kept = [d for d in range(len(sizes)) if d not in groups]
    right = changed(right, lambda view: view.moved(kept, [sizes[d] for d in kept]), kept)
    contract, batch = (
        (dims[0], [kept.index(d) for d in dims[1]]) for dims in numbers.dot_dimension_numbers
    )
    ranks = len(equation.invars[0].aval.shape), len(kept)
    return _dot(uses, [left, right], _sides(contract, batch, ranks), shape)


def _sides(contract: Any, batch: Any, ranks: Dims) -> tuple[Side, Side]:
    left, right = (
        [d for d in range(rank) if d not in c and d not in b]
        for c, b, rank in zip(contract, batch, ranks, strict=True)
    )
    places = [*batch[0], *left, *[None] * len(right)], [*batch[1], *[None] * len(left), *right]
    return (
        Side(contract[0], batch[0], left, places[0]),
        Side(contract[1], batch[1], right, places[1]),
    )


def _dot(uses: Uses, values: Sequence[Value], sides: tuple[Side, Side], shape: Dims) -> Value:
    pairs = list(zip(values, sides, strict=True))
    weights = [(value, side) for value, side in pairs if isinstance(value, Weight)]
    serve = all(side.both(weight) for weight, side in weights)
    both = len(weights) == 2 and (serve or not all(weight.data for weight, _ in weights))
    values = [  # a row that data looked up, say, is data, unless it serves as a weight
        uses.settle(v)
        if isinstance(v, Weight) and v.data and (both or (v.picked and not side.both(v)))
        else v
        for v, side in pairs
    ]
    if all(isinstance(value, Weight) for value in values):
        values = [  # broadcast to a batch before, a learned token, and no weight
            uses.entrywise(v) if isinstance(v, Weight) and _is_token(v, side, shape) else v
            for v, side in zip(values, sides, strict=True)
        ]
    match values:
        case Weight(), Weight():
            return _composed(values, sides, shape)
        case Weight() as weight, Constant():
            return _rearranged(uses, weight, sides[0], shape)
        case Constant(), Weight() as weight:
            return _rearranged(uses, weight, sides[1], shape)
        case Weight() as weight, Data() as data:
            return _with_data(uses, weight, data, *sides, shape)
        case Data() as data, Weight() as weight:
            return _with_data(uses, weight, data, sides[1], sides[0], shape)
    return of_data(uses, values, sides)


def _is_token(weight: Weight, side: Side, shape: Dims) -> bool:
    sizes = {d: n for d, n in zip(side.places, shape, strict=True) if d is not None}
    return any(sizes[d] > 1 and d not in weight.dims() for d in side.free)


def _with_data(
    uses: Uses, weight: Weight, data: Data, mine: Side, other: Side, shape: Dims
) -> Value:
    letters, result = mine.letters(), changed(data, lambda view: view, other.places)
    if data.onehot & {*other.contract}:  # it picks entries of an axis
        if len(other.contract) == 1 and not weight.data:
            views = tuple(view.moved(mine.places, shape, "p") for view in weight.views)
            flat = frozenset(n for n, d in enumerate(other.places) if d is None)
            return Weight(views, result._replace(onehot=_NONE, flat=flat))
        letters |= {a: "b" for a, b in _pairs(mine.contract, other.contract) if b in data.onehot}
    elif data.outer and all(axes & {*other.contract} for axes in data.outer):
        weight = weight.as_part(Part.LOST)  # of inputs and gates, say
    alone = not weight.dims() & {*letters}  # by batch axes alone: entry by entry
    for axis, theirs in _pairs(mine.batch, other.batch):
        letters[axis] = "o" if alone and theirs not in data.stacked else "b"
        if not alone and axis in weight.dims():
            data = data._replace(stacked=data.stacked | {theirs})
            uses.stack(data.views, theirs)
    stacked = frozenset(n for n, d in enumerate(other.places) if d in data.stacked)
    places = [d if alone or d not in mine.batch else None for d in mine.places]
    kind = VECTOR if alone else MATRIX
    return _product(uses, weight, letters, data, places, shape, kind)._replace(stacked=stacked)


def _pairs(mine: Dims, other: Dims) -> list[tuple[int, int]]:
    return list(zip(mine, other, strict=True))


def paired(view: View, letters: Mapping[int, str]) -> list[tuple[Factor, str]]:
    """Pairs the factors of a view with what the axes that they are on are."""
    return [(factor, letters[dim]) for dim in letters for factor in view.own(dim)]


def _product(
    uses: Uses,
    weight: Weight,
    letters: Mapping[int, str],
    data: Data,
    dims: Sequence[int | None],
    shape: Dims,
    kind: str = MATRIX,
) -> Data:
    pairs = [paired(view, letters) for view in weight.views]
    return product(uses, weight, pairs, data, dims, shape, kind)


def product(
    uses: Uses,
    weight: Weight,
    pairs: Sequence[Pairs],
    data: Data,
    dims: Sequence[int | None],
    shape: Dims,
    kind: str = MATRIX,
) -> Data:
    """Notes a product; returns its result, with views of the axes of the weight that are in it."""
    if weight.data:
        data = combined([weight.data, data])
    made = uses.product(weight, pairs, data, kind)
    uses.note("suspected", data.suspects)
    views = list(zip(weight.views, made, strict=True))
    return Data(
        learned=data.learned,
        pending=frozenset(made),
        factors=_NONE if weight.plain else frozenset(u for view, u in views if view.is_factor),
        views=frozenset(view.moved(dims, shape)._replace(source=u, gone=()) for view, u in views),
    )


def of_data(uses: Uses, values: Sequence[Value], sides: Sequence[Side]) -> Value:
    """Follows a product of data with data or a constant."""
    parts = [
        (value, side) for value, side in zip(values, sides, strict=True) if isinstance(value, Data)
    ]
    if not parts:
        return Constant()
    joined = combined([changed(part, lambda view: view, side.places) for part, side in parts])
    suspects = joined.suspects
    for part, side in parts:
        apart = [view for view in part.views if not view.dims() & {*side.batch}]
        contract = [d for d in side.contract if not uses.is_mixed(apart, d)]
        made = [view for view in part.views if _as_weight(view, contract, side.free)]
        suspects |= {view.source for view in made}
        uses.consume(part.views)
    free = [frozenset(n for n, d in enumerate(s.places) if d in s.free) for s in sides]
    is_outer = len(parts) == 2 and all(free) and not sides[0].contract
    return joined._replace(
        views=_NONE, flat=_NONE, soft=False, factors=_NONE, outer=tuple(free) if is_outer else (),
        pending=uses.unfollowed(joined.pending),
        suspects=_NONE if len(parts) == 2 and joined.soft else suspects,
    )  # fmt: skip


def _as_weight(view: View, contract: Dims, free: Dims) -> bool:
    """Whether a result serves as a weight: one axis is contracted, another one goes on."""
    inside = {f.axis for d in contract for f in view.own(d) if f.size > 1}
    outside = {f.axis for d in free for f in view.own(d) if f.size > 1}
    return any(a != b for a in inside for b in outside)


def _composed(weights: Sequence[Any], sides: Sequence[Side], shape: Dims) -> Weight:
    """`A @ B`: the inner axis is the output of the first that data meets, so of the left one."""
    shared = {view.source for view in weights[0].views} & {view.source for view in weights[1].views}
    matrices = all(side.both(weight) for weight, side in zip(weights, sides, strict=True))
    moved = []
    for weight, side, role in zip(weights, sides, "OI", strict=True):
        views = []
        for view in weight.views:
            if view.part == Part.WHOLE and side.contract and (shared or not matrices):
                view = view.as_part(Part.LOST if matrices else Part.MIXED)
            views.append(view.moved(side.places, shape, role if matrices and not shared else "-"))
        moved.append(Weight(tuple(views)))
    if not sides[0].contract:  # entry by entry
        return merged("mul", moved) or moved[0]
    return Weight(foremost([*moved[0].views, *moved[1].views]))


def _rearranged(uses: Uses, weight: Weight, side: Side, shape: Dims) -> Value:
    """A product with a constant rearranges an axis, which keeps its role, or sums over it."""
    if uses.transposed:  # the derivative of a sum of outputs
        made = _product(uses, weight, side.letters(), Data(), side.places, shape)
        return made._replace(views=_NONE)
    views = []
    for view in weight.views:
        inner = [factor for d in side.contract for factor in view.own(d)]
        placed = view.moved(side.places, shape, "-")
        if inner and None in side.places:
            axes = zip(side.places, shape, placed.axes, strict=True)
            placed = placed._replace(
                axes=tuple(anywhere(inner, n) if d is None else axis for d, n, axis in axes),
                gone=view.gone + tuple((factor, "c") for factor in anywhere(inner, 1)),
            )
        views.append(placed)
    return Weight(tuple(views), weight.data and weight.data._replace(flat=_NONE))
