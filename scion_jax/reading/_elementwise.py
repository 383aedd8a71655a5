"""Entry by entry: what comes of weights and data that meet at equal places.

Data that is added to, or multiplied with, a weight that it varies along makes the weight a vector.
Data that is constant along some axis of the weight scales it, and it stays a weight. Weights alone
stay weights: their sum is one whose parts have equal roles, their product one that the smaller part
scales. A weight plus something smaller is no weight any more but a learned token, query or state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scion_jax.reading._axes import moved
from scion_jax.reading._meetings import entrywise, settle
from scion_jax.reading._uses import MATRIX, Operation, Uses
from scion_jax.reading._values import NONE, Constant, Data, Value, Weight, combined, foremost
from scion_jax.reading._views import Move, Part, Shape, View

# Linear in its only operand, so that what data picked or scaled is still what it was.
LINEAR = frozenset(
    """neg convert_element_type copy copy_p real imag conj reduce_precision device_put
    sharding_constraint mesh_cast reshard layout_constraint name pvary pcast ppermute""".split()
)
UNARY = frozenset(
    """abs exp exp2 log log1p log2 expm1 tanh sin cos tan asin acos atan sinh cosh asinh acosh atanh
    sqrt rsqrt cbrt logistic erf erfc erf_inv integer_pow square one_minus_square not lgamma digamma
    bessel_i0e bessel_i1e is_finite round floor ceil sign population_count clz
    bitcast_convert_type""".split()
)
SUMS = frozenset("add sub add_any max min select_n complex".split())
SEVERAL = SUMS | frozenset(
    """mul div pow rem atan2 nextafter clamp eq ne lt le gt ge and or xor shift_left
    shift_right_logical shift_right_arithmetic igamma igammac polygamma""".split()
)
# No gradient goes through these.
FLAT = frozenset("stop_gradient round floor ceil sign is_finite".split())

_KEEP_SCALED = LINEAR | {"mul", "add", "sub", "select_n"}
_KEEP_ONEHOT = LINEAR | {"mul", "and", "select_n"}


def elementwise(uses: Uses, operation: Operation, values: Sequence[Value]) -> Value:
    """Follows an operation entry by entry; scalars and axes of size one are broadcast."""
    name, _, shapes, shape, _ = operation
    known = [n for n, value in enumerate(values) if not isinstance(value, Constant)]
    if len(known) == 1 and name not in ("eq", "exp") and shapes[known[0]] == shape:
        value = values[known[0]]
        if isinstance(value, Data) and not value.flat and not value.onehot:
            return value  # as most are: nothing about it changes
    constants = [n for n, value in zip(shapes, values, strict=True) if isinstance(value, Constant)]
    varying = frozenset(d for old in constants for d, size in enumerate(old) if size > 1)
    values = [_aligned(v, old, shape) for v, old in zip(values, shapes, strict=True)]
    if sum(isinstance(value, Weight) for value in values) > 1:
        values = [_as_data(uses, v) if isinstance(v, Weight) and v.picked else v for v in values]
    weights = [value for value in values if isinstance(value, Weight)]
    if varying:
        weights = [_patterned(w, varying, shape) if varying - w.dims() else w for w in weights]
    if weights:
        datas = [value for value in values if isinstance(value, Data)]
        met = _met(uses, name, weights, datas, isinstance(values[0], Weight))
        if isinstance(met, Weight):
            return met
        left = iter(met)
        values = [next(left) if isinstance(value, Weight) else value for value in values]
    return _of_data(uses, name, values, varying)


def _aligned(value: Value, old: Shape, new: Shape) -> Value:
    if old == new or isinstance(value, Constant):
        return value
    return moved(value, Move(range(len(new)) if old else [None] * len(new), old, new))


def _patterned(weight: Weight, varying: frozenset[int], shape: Shape) -> Weight:
    """A weight that a constant changes along an axis varies along it: a diagonal, say."""
    views = []
    for view in weight.views:
        sizes = {dim: shape[dim] for dim in varying - view.dims()}
        views.append(view.spread(sizes, everywhere=True) if sizes else view)
    return weight._replace(views=tuple(views))


def _met(
    uses: Uses, name: str, weights: Sequence[Weight], datas: Sequence[Data], is_left: bool
) -> Weight | list[Data]:
    """What weights become: a weight, or data, each for itself."""
    weight, *more = weights
    scales = name == "mul" or (name == "div" and is_left)
    if not datas and more:
        made = merged(name, weights)
        if made is not None:
            return made
    elif not datas:
        if weight.data is None or scales or name in _KEEP_SCALED:
            return stopped(weight) if name in FLAT and not uses.inside_custom else weight
        if weight.picked or len(weight.dims()) < 2:
            return [settle(uses, weight)]
        return weight.as_part(Part.LOST)
    elif not more and len(datas) == 1:
        if name in ("add", "sub") and datas[0].cotangent and not uses.transposed:
            return weight  # a step along a gradient
        if scales and weight.dims() & datas[0].flat:
            return _scaled(uses, weight, datas[0])
    others = combined(datas) if datas else None
    return [_as_data(uses, weight, others, name in SUMS) for weight in weights]


def _scaled(uses: Uses, weight: Weight, data: Data) -> Weight:
    """Data that is constant along some axis of a weight scales it."""
    sources = {view.source for view in weight.views}
    measured = [use for use in data.pending if use.kind == MATRIX and use.view.source in sources]
    uses.note("demoted", measured)  # as for a norm of it
    uses.consume(data.views)
    both = combined([weight.data, data._replace(views=NONE)] if weight.data else [data])
    fresh = weight.data.fresh if weight.data and weight.picked else both.fresh
    return weight._replace(data=both._replace(fresh=fresh, views=NONE, traces=NONE))


def _as_data(uses: Uses, weight: Weight, data: Data | None = None, added: bool = True) -> Data:
    if weight.data is None:
        return entrywise(uses, weight, data, added)
    itself = any(view.source in weight.data.chosen for view in weight.views)  # the nearest code
    if not weight.picked or itself or weight.data.fresh:
        return settle(uses, weight)
    role = "b" if weight.dims() else "o"  # rows that a router picked
    rows = Weight(tuple(view.relabelled({"p": role}) for view in weight.views))
    part = entrywise(uses, rows, data or weight.data)
    return combined([part, weight.data._replace(views=NONE, onehot=NONE)])


def merged(name: str, weights: Sequence[Weight]) -> Weight | None:
    """The weight that several weights make; None if they make a token."""
    dims = [weight.dims() for weight in weights]
    most = max(dims, key=len)
    largest = [w for w, own in zip(weights, dims, strict=True) if own == most]
    whole = {frozenset(v.source for v in w.views if v.part == Part.WHOLE) for w in largest}
    sources = {view.source for weight in largest for view in weight.views}
    views: list[View] = []
    for weight, own in zip(weights, dims, strict=True):
        inside = own < most and {view.source for view in weight.views} <= sources
        if all(dim <= own for dim in dims):
            part = Part.WHOLE if name in SUMS or len(whole) == 1 else Part.MIXED
        elif name in SUMS and not inside:
            return None
        elif own < most:
            part = Part.SCALE
        else:
            part = Part.WHOLE if sum(bool(own & dim) for dim in dims) == 1 else Part.MIXED
        views += weight.as_part(part).views
    data = [weight.data for weight in weights if weight.data is not None]
    return Weight(foremost(views), combined(data) if data else None)


def stopped(weight: Weight) -> Weight:
    """What no gradient goes through."""
    return weight.as_part(Part.STOPPED)


def _of_data(uses: Uses, name: str, values: Sequence[Value], varying: frozenset[int]) -> Data:
    parts = [value for value in values if isinstance(value, Data)]
    data = combined(parts)
    if len(parts) > 1 and data.pending:
        views = _uncut(uses, name, parts, data.views)
        data = data._replace(views=views, pending=uses.unfollowed(data.pending))
    if name == "mul" and len(parts) == 2:
        rows, columns = parts[1].flat - parts[0].flat, parts[0].flat - parts[1].flat
        data = data._replace(rows=rows, columns=columns) if rows and columns else data
    if name == "exp":
        uses.note("suspected", data.factors)  # scores of a learned query
        data = data._replace(hard=data.hard and not data.suspects)
    onehot = data.onehot if name in _KEEP_ONEHOT else NONE
    if name == "eq" and len(parts) == 1:
        (axes,) = (value.iota for value in values if isinstance(value, Constant))
        onehot = data.flat & {*axes} if len(axes) == 1 else NONE
    if name == "select_n" and not all(isinstance(value, Constant) for value in values[1:]):
        onehot = NONE  # something else stands elsewhere
    if onehot or data.onehot or varying & data.flat:
        return data._replace(flat=data.flat - varying, onehot=onehot)
    return data


def _uncut(uses: Uses, name: str, parts: Sequence[Data], views: Iterable[View]) -> frozenset[View]:
    """Finds the results that go on in a result of several; the others are not cut any more."""
    left = uses.unused(views)
    if left and name in SUMS and name != "select_n":  # a residual stream is not cut into parts
        dims = {view: view.dims() for view in left}
        for part in parts:
            moving = NONE.union(*[dims[view] for view in part.views if view in dims])
            axes = [(v, dims[v] - part.flat) for v in left if v not in part.views]
            uses.consume(view for view, own in axes if own and not own & moving)
        left = uses.unused(left)
    return frozenset(left)


def unknown(uses: Uses, operation: Operation, values: Sequence[Value]) -> list[Value]:
    """What no rule is known for: data goes on, and parameters are refused."""
    parts = []
    for value in values:
        if isinstance(value, Weight) and value.picked:
            parts.append(settle(uses, value))
        elif isinstance(value, Weight):
            uses.refuse(value.views, f"{operation.name} is no operation that reading follows")
            parts.append(value.data or Data())
        elif isinstance(value, Data):
            parts.append(value)
    uses.consume(view for part in parts for view in part.views)
    return [combined([part.bare() for part in parts])] * operation.results
