"""Products: where weights are multiplied with data, and so what their axes are.

A contracted axis of a weight is its input, an axis that it brings to the result its output, one that
both operands share a batch of independent matrices.

Data may itself serve as a weight, as the result of one product does in attention. Where an axis of
such a result is contracted while another one goes on, it may be that the parameter is not what it
seems: a matrix that data shifts, a mixture of matrices, a hypernetwork. Attention looks the same but
for what follows: scores go through an exponential and into another product of data. Any other end
makes the parameter unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from scion_jax.reading._elementwise import combined, foremost, merged
from scion_jax.reading._uses import MATRIX, VECTOR, Uses
from scion_jax.reading._views import (
    LOST,
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


def dot_general(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Follows a product over any axes."""
    contract, batch = equation.params["dimension_numbers"]
    return _dot(uses, equation, values, contract, batch)


def ragged_dot(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Follows a product of each row with the matrix of its group."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    left, right, *_ = values
    if not isinstance(right, Weight) or not isinstance(left, Data):
        return _of_data(uses, [value for value in values if not isinstance(value, Constant)])
    views = tuple(view.without(groups, "b") for view in right.views)
    moved = [[d - sum(g < d for g in groups) for d in dims] for dims in (contract[1], batch[1])]
    pair = [left, right._replace(views=views)]
    return _dot(uses, equation, pair, (contract[0], moved[0]), (batch[0], moved[1]))


def _dot(uses: Uses, equation: Any, values: Sequence[Value], contract: Any, batch: Any) -> Value:
    values = list(values)
    ranks = [len(atom.aval.shape) for atom in equation.invars[:2]]
    if any(isinstance(value, Weight) and value.data for value in values):
        both = all(isinstance(value, Weight) for value in values)
        for side, value in enumerate(values):
            if isinstance(value, Weight) and value.data:
                free = value.dims() - set(contract[side]) - set(batch[side])
                if both or (value.picked and not (free and value.dims() & set(contract[side]))):
                    values[side] = uses.settle(value)
    dims = [(contract[s], batch[s], _free(contract[s], batch[s], ranks[s])) for s in (0, 1)]
    for side in (0, 1):
        if isinstance(values[side], Weight):
            rank = len(values[side].views[0].axes)  # a ragged dot has lost the axis of its groups
            dims[side] = (contract[side], batch[side], _free(contract[side], batch[side], rank))
    kinds = {type(value) for value in values}
    if kinds == {Constant}:
        return Constant()
    if Weight not in kinds:
        return _of_data(uses, values, dims)
    if kinds == {Weight}:
        return _composed(values, dims, equation.outvars[0].aval.shape)
    side = 0 if isinstance(values[0], Weight) else 1
    weight, other = values[side], values[1 - side]
    assert isinstance(weight, Weight)
    if isinstance(other, Constant):
        return _with_constant(uses, weight, side, dims, equation.outvars[0].aval.shape)
    assert isinstance(other, Data)
    theirs = dims[1 - side]
    if other.onehot is not None and other.onehot in theirs[0]:
        picked = dims[side][0][list(theirs[0]).index(other.onehot)]
        if len(theirs[0]) == 1 and not weight.data:
            return _picked(weight, other, side, dims, equation.outvars[0].aval.shape)
        weight = weight._replace(views=tuple(_relabel(v, picked) for v in weight.views))
    return _with_data(uses, weight, other, side, dims, equation.outvars[0].aval.shape)


def _with_data(
    uses: Uses,
    weight: Weight,
    data: Data,
    side: int,
    dims: Sequence[tuple[Dims, Dims, Dims]],
    shape: Dims,
) -> Data:
    contract, batch, free = dims[side]
    theirs = dims[1 - side]
    stacked = {mine for mine, other in zip(batch, theirs[1], strict=True) if other in data.stacked}
    letters = {**dict.fromkeys(contract, "i"), **dict.fromkeys(free, "o")}
    alone = not weight.dims() & {*contract, *free}  # by batch axes alone: entry by entry
    letters |= {dim: "o" if alone and dim not in stacked else "b" for dim in batch}
    roles = [[(f, letters[d]) for d in letters for f in view.own(d)] for view in weight.views]
    data = combined([weight.data, data._replace(flat=frozenset())]) if weight.data else data
    for mine, other in zip(batch, theirs[1], strict=True):
        if not alone and any(view.own(mine) for view in weight.views):
            for view in data.views:
                for factor in view.own(other):
                    uses.note("stack", [view.source], factor.axis)
    keys = uses.product(weight, roles, data, VECTOR if alone else MATRIX)
    ours = [
        *([None] * len(batch) if not alone else batch),
        *(free if side == 0 else [None] * len(theirs[2])),
    ]
    ours += [None] * len(theirs[2]) if side == 0 else free
    passed = [*theirs[1], *(theirs[2] if side == 1 else [None] * len(free))]
    passed += theirs[2] if side == 0 else [None] * len(free)
    views = zip(weight.views, keys, strict=True)
    made = {n for n, d in enumerate(batch) if any(v.own(d) for v in weight.views)}
    stacked = {n for n, d in enumerate(passed) if d in data.stacked} | (set() if alone else made)
    return _result(uses, views, ours, shape, data, frozenset(stacked))


def _result(
    uses: Uses,
    views: Any,
    dims: Sequence[int | None],
    shape: Dims,
    data: Data,
    stacked: frozenset[int],
) -> Data:
    """The data that products make, with views of the weights that made it."""
    used = [(view, key) for view, key in views if key is not None]
    uses.note("suspected", data.suspects)
    made = tuple(view.moved(dims, shape)._replace(source=key, gone=()) for view, key in used)
    pending = frozenset(key for _, key in used) or uses.unfollowed(data.pending)
    return Data(pending=pending, views=made, stacked=stacked, learned=data.learned)


def _of_data(uses: Uses, values: Sequence[Value], dims: Any = None) -> Data:
    """A product of data with data or a constant."""
    parts = [uses.settle(v) if isinstance(v, Weight) else v for v in values]
    parts = [part for part in parts if isinstance(part, Data)]
    joined = combined([part._replace(flat=frozenset(), onehot=None) for part in parts])
    stacked: set[int] = set()
    suspects = joined.suspects
    if dims is not None:
        left, right = dims
        order = [(0, d) for d in left[1]] + [(0, d) for d in left[2]] + [(1, d) for d in right[2]]
        for side, value in enumerate(values):
            if isinstance(value, Data):
                suspects |= {v.source for v in value.views if _as_weight(v, *dims[side])}
                lifted = dict(zip(dims[side][1], range(len(left[1])), strict=True))
                lifted |= {d: n for n, (s, d) in enumerate(order) if s == side}
                stacked |= {lifted[d] for d in value.stacked if d in lifted}
    if len(parts) == 2 and joined.soft:
        suspects = frozenset()
    uses.consume(view for part in parts for view in part.views)
    return joined._replace(
        views=(), stacked=frozenset(stacked), suspects=frozenset(suspects), soft=False,
        pending=uses.unfollowed(joined.pending),
    )  # fmt: skip


def _as_weight(view: View, contract: Dims, batch: Dims, free: Dims) -> bool:
    """Whether a result serves as a weight: one axis is contracted, another one goes on."""
    inside = {f.axis for d in contract for f in view.own(d) if f.size > 1}
    outside = {f.axis for d in free for f in view.own(d) if f.size > 1}
    return any(a != b for a in inside for b in outside)


def _composed(
    values: Sequence[Value], dims: Sequence[tuple[Dims, Dims, Dims]], shape: Dims
) -> Value:
    """`A @ B`: the inner axis is the output of the first that data meets, so of the left one."""
    left, right = values
    assert isinstance(left, Weight) and isinstance(right, Weight)
    sources = [{view.source for view in weight.views} for weight in (left, right)]
    views: list[View] = []
    moved = []
    for side, weight in enumerate((left, right)):
        contract, batch, free = dims[side]
        order = [*batch, *([None] * len(dims[0][2]) if side else free)]
        order += free if side else [None] * len(dims[1][2])
        for view in weight.views:
            inner = any(view.own(d) for d in contract)
            outer = any(view.own(d) for d in free)
            sound = view.part == WHOLE and inner and outer and not sources[0] & sources[1]
            part = view.part if sound or view.part != WHOLE or not contract else LOST
            views.append(view.moved(order, shape, "OI"[side])._replace(part=part))
        moved.append(Weight(tuple(views[-len(weight.views) :])))
    if not dims[0][0]:  # nothing is contracted: entry by entry
        return merged("mul", moved) or moved[0]
    return Weight(foremost(views))


def _with_constant(
    uses: Uses, weight: Weight, side: int, dims: Sequence[tuple[Dims, Dims, Dims]], shape: Dims
) -> Weight | Data:
    """A constant matrix rearranges an axis, which keeps its role."""
    contract, batch, free = dims[side]
    others = len(dims[1 - side][2])
    ours = [*batch, *([None] * others if side else free)]
    ours += free if side else [None] * others
    if uses.transposed:  # the derivative of a sum of outputs
        roles = [
            [
                (f, role)
                for ds, role in ((contract, "i"), (free, "o"))
                for d in ds
                for f in view.own(d)
            ]
            for view in weight.views
        ]
        uses.product(weight, roles, Data())
        return Data()
    views = []
    for view in weight.views:
        inner = {f.axis: None for d in contract for f in view.own(d)}
        rearranged = any(d is None and shape[n] > 1 for n, d in enumerate(ours))
        moved = view.moved(ours, shape, "-")
        if rearranged:
            axes = tuple(
                tuple(Factor(a, 0, n) for a in inner) if d is None and n > 1 and inner else axis
                for d, n, axis in zip(ours, shape, moved.axes, strict=True)
            )
            moved = moved._replace(
                axes=axes, gone=view.gone + tuple((Factor(a, 0, 1), "c") for a in inner)
            )
        views.append(moved)
    return Weight(tuple(views), weight.data._replace(flat=frozenset()) if weight.data else None)


def _picked(weight: Weight, data: Data, side: int, dims: Any, shape: Dims) -> Weight:
    """A product with one-hot data looks rows up."""
    _, batch, free = dims[side]
    theirs = dims[1 - side][2]
    ours = [*batch, *([None] * len(theirs) if side else free)]
    ours += free if side else [None] * len(theirs)
    passed = [*dims[1 - side][1], *(theirs if side else [None] * len(free))]
    passed += [None] * len(free) if side else theirs
    views = tuple(view.moved(ours, shape, "p") for view in weight.views)
    flat = frozenset(n for n, d in enumerate(passed) if d is None)
    return Weight(views, data.moved(passed)._replace(views=(), onehot=None, flat=flat))


def _relabel(view: View, dim: int) -> View:
    """One of several contracted axes is picked by data: a stack."""
    gone = tuple((f, "b") for f in view.own(dim))
    axes = (*view.axes[:dim], (), *view.axes[dim + 1 :])
    return view._replace(axes=axes, gone=view.gone + gone)


def _free(contract: Dims, batch: Dims, rank: int) -> list[int]:
    return [d for d in range(rank) if d not in contract and d not in batch]


def convolution(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Follows a convolution: `rhs_spec` tells what is what in the kernel."""
    numbers, groups = equation.params["dimension_numbers"], equation.params["feature_group_count"]
    data, kernel = values
    out, inside, *window = numbers.rhs_spec
    if isinstance(data, Weight):
        if isinstance(kernel, Constant):  # a filter that does not learn
            shape = equation.outvars[0].aval.shape
            return data._replace(views=tuple(view.mixed(shape) for view in data.views))
        if any(view.dims() & {numbers.lhs_spec[0]} for view in data.views):
            uses.refuse(data, "it takes the place of the images in a convolution")
        data = uses.entrywise(data)  # a learned image
    if isinstance(kernel, Weight) and isinstance(data, Constant):
        uses.refuse(kernel, "a constant takes the place of the image in its convolution")
        return Data()
    if not isinstance(kernel, Weight):
        if isinstance(data, Constant) and isinstance(kernel, Constant):
            return Constant()
        parts = [part for part in (data, kernel) if isinstance(part, Data)]
        suspects = {
            v.source for v in parts[-1].views if _as_weight(v, [inside, *window], [], [out])
        }
        result = _of_data(uses, parts)
        return result._replace(suspects=result.suspects | suspects, stacked=frozenset())
    letters = {inside: "i", **dict.fromkeys(window, "s")}
    roles, tags = [], []
    if equation.params["batch_group_count"] != 1:
        uses.refuse(kernel, "its convolution has groups of images")
        return Data()
    for view in kernel.views:
        pairs = [(f, letters[d]) for d in letters for f in view.own(d)]
        roles.append(pairs + _grouped(view.axes[out], groups))
        tags.append(view)
    data = combined([kernel.data._replace(flat=frozenset()), data]) if kernel.data else data
    keys = uses.product(kernel, roles, data)
    rank = len(equation.outvars[0].aval.shape)
    ours: list[int | None] = [None] * rank
    ours[numbers.out_spec[1]] = out
    shape = equation.outvars[0].aval.shape
    return _result(uses, zip(tags, keys, strict=True), ours, shape, data, frozenset())


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
    keys = uses.product(weight, roles, data)
    return _result(uses, zip(weight.views, keys, strict=True), kept, shape, data, frozenset())
