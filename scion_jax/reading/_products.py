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

from collections.abc import Sequence
from typing import Any, NamedTuple

from scion_jax.reading import _heads as heads
from scion_jax.reading._axes import changed
from scion_jax.reading._elementwise import merged, unknown
from scion_jax.reading._meetings import product, settle
from scion_jax.reading._uses import Operation, Uses
from scion_jax.reading._values import NONE, Constant, Data, Value, Weight, combined, foremost
from scion_jax.reading._views import Move, Part, Shape, View, anywhere


class Side(NamedTuple):
    """What a product does with the axes of one of its operands.

    Attributes:
        contract: Axes that are summed over, in the order of those of the other operand.
        batch: Axes that both share, in the same order.
        free: All others.
        move: Where they are in the result.
    """

    contract: Sequence[int]
    batch: Sequence[int]
    free: Sequence[int]
    move: Move

    def letters(self) -> dict[int, str]:
        """What the axes of a weight are, but those of a batch."""
        return {**dict.fromkeys(self.contract, "i"), **dict.fromkeys(self.free, "o")}

    def has_both(self, weight: Weight) -> bool:
        """Whether a weight has inputs and outputs here."""
        return all(weight.dims() & {*dims} for dims in (self.contract, self.free))

    def is_token(self, weight: Weight) -> bool:
        """Whether a weight was broadcast to a batch before: a learned token, and no weight."""
        return any(self.move.old[d] > 1 and d not in weight.dims() for d in self.free)


def dot_general(uses: Uses, operation: Operation, values: Sequence[Value]) -> Value:
    """Follows a product over any axes."""
    contract, batch = operation.params["dimension_numbers"]
    return _dot(uses, values, _sides(contract, batch, operation.shapes, operation.shape))


def ragged_dot(uses: Uses, operation: Operation, values: Sequence[Value]) -> Value:
    """Follows a product of each row with the matrix of its group."""
    numbers, (left, right, *_) = operation.params["ragged_dot_dimension_numbers"], values
    left = settle(uses, left) if isinstance(left, Weight) and left.data else left
    if not isinstance(right, Weight) or not isinstance(left, Data):
        return unknown(uses, operation, values)[0]
    shapes, groups = operation.shapes, numbers.rhs_group_dimensions
    kept = [d for d in range(len(shapes[1])) if d not in groups]
    move = Move(kept, shapes[1], [shapes[1][d] for d in kept])
    right = changed(right, lambda view: view.moved(move), kept)
    contract, batch = (
        (dims[0], [kept.index(d) for d in dims[1]]) for dims in numbers.dot_dimension_numbers
    )
    return _dot(
        uses, [left, right], _sides(contract, batch, [shapes[0], move.new], operation.shape)
    )


def _sides(contract: Any, batch: Any, shapes: Sequence[Shape], shape: Shape) -> tuple[Side, Side]:
    left, right = (
        [d for d in range(len(n)) if d not in c and d not in b]
        for c, b, n in zip(contract, batch, shapes, strict=False)
    )
    places = [*batch[0], *left, *[None] * len(right)], [*batch[1], *[None] * len(left), *right]
    return (
        Side(contract[0], batch[0], left, Move(places[0], shapes[0], shape)),
        Side(contract[1], batch[1], right, Move(places[1], shapes[1], shape)),
    )


def _dot(uses: Uses, values: Sequence[Value], sides: tuple[Side, Side]) -> Value:
    pairs = list(zip(values, sides, strict=True))
    weights = [(value, side) for value, side in pairs if isinstance(value, Weight)]
    serve = all(side.has_both(weight) for weight, side in weights)
    both = len(weights) == 2 and (serve or not all(weight.data for weight, _ in weights))
    values = [  # a row that data looked up, say, is data, unless it serves as a weight
        settle(uses, v)
        if isinstance(v, Weight) and v.data and (both or (v.picked and not side.has_both(v)))
        else v
        for v, side in pairs
    ]
    if all(isinstance(value, Weight) for value in values):
        values = [
            settle(uses, v) if isinstance(v, Weight) and side.is_token(v) else v
            for v, side in zip(values, sides, strict=True)
        ]
    left, right = values
    if isinstance(left, Weight) and isinstance(right, Weight):
        return _composed([left, right], sides)
    for weight, other, (mine, theirs) in ((left, right, sides), (right, left, sides[::-1])):
        if isinstance(weight, Weight) and isinstance(other, Data):
            return _with_data(uses, weight, other, mine, theirs)
        if isinstance(weight, Weight):
            return _rearranged(uses, weight, mine)
    return of_data(uses, [left, right], sides)


def _with_data(uses: Uses, weight: Weight, data: Data, mine: Side, other: Side) -> Value:
    letters = mine.letters()
    if data.onehot & {*other.contract}:  # it picks entries of an axis
        if len(other.contract) == 1 and not weight.data:
            views = tuple(view.moved(mine.move, "p") for view in weight.views)
            picks = data.placed(other.move.places)
            flat = other.move.repeated()
            return Weight(views, picks._replace(views=NONE, onehot=NONE, flat=flat))
        pairs = zip(mine.contract, other.contract, strict=True)
        letters |= {axis: "b" for axis, theirs in pairs if theirs in data.onehot}
    elif data.rows & {*other.contract} and data.columns & {*other.contract}:
        weight = weight.as_part(Part.LOST)  # of inputs and gates, say
    alone = not weight.dims() & {*letters}  # by batch axes alone: entry by entry
    for axis, theirs in zip(mine.batch, other.batch, strict=True):
        letters[axis] = "o" if alone and theirs not in data.stacked else "b"
        if not alone and axis in weight.dims():
            data = data._replace(stacked=data.stacked | {theirs})
            uses.stack(data.views, theirs)
    places = [d if alone or d not in mine.batch else None for d in mine.move.places]
    pairs = [view.paired(letters) for view in weight.views]
    counts = [heads.count(data.traces, dim, other.move.old[dim]) for dim in other.contract]
    numbers = {axis: n for axis, n in zip(mine.contract, counts, strict=True) if n > 1}
    made = product(uses, weight, pairs, data, mine.move._replace(places=places), numbers)
    stacked = frozenset(n for n, d in enumerate(other.move.places) if d in data.stacked)
    return made._replace(stacked=stacked)


def of_data(uses: Uses, values: Sequence[Value], sides: Sequence[Side]) -> Value:
    """Follows a product of data with data or a constant."""
    pairs = list(zip(values, sides, strict=True))
    parts = [(value, side) for value, side in pairs if isinstance(value, Data)]
    if not parts:
        return Constant()
    joined = combined([part.placed(side.move.places) for part, side in parts])
    suspects = joined.suspects
    for part, side in parts:
        apart = [view for view in part.views if not view.dims() & {*side.batch}]
        contract = [d for d in side.contract if not uses.stack(apart, d, summed=True)]
        made = [view for view in part.views if _as_weight(view, contract, side.free)]
        suspects |= {view.source for view in made}
        uses.consume(part.views)
    rows, columns = (
        frozenset(n for n, d in enumerate(s.move.places) if d in s.free) for s in sides
    )
    is_outer = len(parts) == 2 and rows and columns and not sides[0].contract
    return joined._replace(
        views=NONE, flat=NONE, hard=True, factors=NONE, pending=uses.unfollowed(joined.pending),
        rows=rows if is_outer else NONE, columns=columns if is_outer else NONE,
        suspects=suspects if len(parts) == 1 or joined.hard else NONE,
        traces=heads.attended(uses, parts),
    )  # fmt: skip


def _as_weight(view: View, contract: Sequence[int], free: Sequence[int]) -> bool:
    """Whether a result serves as a weight: one axis is contracted, another one goes on."""
    inside = {f.axis for d in contract for f in view.own(d) if f.size > 1}
    outside = {f.axis for d in free for f in view.own(d) if f.size > 1}
    return any(a != b for a in inside for b in outside)


def _composed(weights: Sequence[Any], sides: Sequence[Side]) -> Weight:
    """`A @ B`: the inner axis is the output of the first that data meets, so of the left one."""
    shared = {view.source for view in weights[0].views} & {view.source for view in weights[1].views}
    matrices = all(side.has_both(weight) for weight, side in zip(weights, sides, strict=True))
    moved = []
    for weight, side, role in zip(weights, sides, "OI", strict=True):
        views = []
        for view in weight.views:
            if view.part == Part.WHOLE and side.contract and (shared or not matrices):
                view = view.as_part(Part.LOST if matrices else Part.MIXED)
            views.append(view.moved(side.move, role if matrices and not shared else "-"))
        moved.append(Weight(tuple(views)))
    if not sides[0].contract:  # entry by entry
        return merged("mul", moved) or moved[0]
    return Weight(foremost([*moved[0].views, *moved[1].views]))


def _rearranged(uses: Uses, weight: Weight, side: Side) -> Value:
    """A product with a constant rearranges an axis, which keeps its role, or sums over it."""
    move = side.move
    if uses.transposed:  # the derivative of a sum of outputs
        pairs = [view.paired(side.letters()) for view in weight.views]
        return product(uses, weight, pairs, Data(), move)._replace(views=NONE)
    views = []
    for view in weight.views:
        inner = view.own(*side.contract)
        placed = view.moved(move, "-")
        if inner and None in move.places:
            axes = zip(move.places, move.new, placed.axes, strict=True)
            placed = placed._replace(
                axes=tuple(anywhere(inner, n) if d is None else axis for d, n, axis in axes),
                gone=view.gone + tuple((factor, "c") for factor in anywhere(inner, 1)),
            )
        views.append(placed)
    return Weight(tuple(views), weight.data and weight.data._replace(flat=NONE))
