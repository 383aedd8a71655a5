"""Entry by entry: what comes of weights and data that meet at equal places.

Data that is added to, or multiplied with, a weight that it varies along makes the weight a vector.
Data that is constant along some axis of the weight scales it, and it stays a weight. Weights alone
stay weights: their sum is one whose parts have equal roles, their product one that the smaller part
scales. A weight plus something smaller is no weight any more but a learned token, query or state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scion_jax.reading._uses import Uses
from scion_jax.reading._views import (
    LOST,
    MIXED,
    SCALE,
    STOPPED,
    WHOLE,
    Constant,
    Data,
    Value,
    View,
    Weight,
)  # fmt: skip

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


def elementwise(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Follows an operation entry by entry; scalars and axes of size one are broadcast."""
    name, shape = equation.primitive.name, equation.outvars[0].aval.shape
    known = [n for n, value in enumerate(values) if not isinstance(value, Constant)]
    data = values[known[0]]
    if len(known) == 1 and isinstance(data, Data) and name not in ("eq", "exp"):
        same = not data.flat and data.onehot is None
        if same and equation.invars[known[0]].aval.shape == shape:
            return data  # as most are: nothing about it changes
    shapes = [atom.aval.shape for atom in equation.invars]
    values = [aligned(v, old, shape) for v, old in zip(values, shapes, strict=True)]
    if name == "div" and isinstance(values[1], Weight) and isinstance(values[0], Data):
        values[1] = _as_data(uses, values[1], values[0])  # 1 / W, times data
    weights = [value for value in values if isinstance(value, Weight)]
    if weights and len(weights) < len(values):
        values = _patterned(values, shapes, shape)
        weights = [value for value in values if isinstance(value, Weight)]
    if weights:
        met = _meet(uses, name, values, weights)
        if isinstance(met, Weight):
            return met
        values = met
    return _data(uses, name, values, shapes, shape)


def _patterned(values: Sequence[Value], shapes: Sequence[Any], shape: Any) -> list[Value]:
    """A weight that a constant changes along an axis varies along it: a diagonal, say."""
    varying = {
        dim
        for value, old in zip(values, shapes, strict=True)
        if isinstance(value, Constant) and len(old) == len(shape)
        for dim, size in enumerate(old)
        if size > 1
    }
    patterned: list[Value] = []
    for value in values:
        if isinstance(value, Weight) and varying - value.dims():
            views = tuple(v.patterned(varying - v.dims(), shape) for v in value.views)
            value = value._replace(views=views)
        patterned.append(value)
    return patterned


def aligned(value: Value, old: Sequence[int], new: Sequence[int]) -> Value:
    """Broadcasts scalars and axes of size one."""
    if tuple(old) == tuple(new) or isinstance(value, Constant):
        return value
    dims = range(len(new)) if len(old) == len(new) else [None] * len(new)
    if isinstance(value, Weight):
        views = tuple(view.moved(dims, new) for view in value.views)
        data = aligned(value.data, old, new) if value.data else None
        return Weight(views, data)  # pyright: ignore[reportArgumentType]
    flat = {d for d, n in enumerate(new) if n > 1 and (dims[d] is None or old[d] == 1)}
    moved = value.moved(dims)
    if not flat and not value.views:
        return moved
    views = tuple(view.moved(dims, new) for view in value.views)
    return moved._replace(flat=moved.flat | flat, views=views)


_PLAIN = Data()


def combined(parts: Sequence[Data]) -> Data:
    """What comes of several data that meet."""
    if len(parts) == 1:
        return parts[0]
    rich = [part for part in parts if part[2:] != _PLAIN[2:]]
    if len(rich) < 2:  # as most are: of the others only two things are known
        return (rich or parts)[0]._replace(
            fresh=all(part.fresh for part in parts),
            pending=frozenset().union(*[part.pending for part in parts]),
            flat=frozenset(),
            cotangent=False,
            learned=False,
        )
    views = {view: None for part in parts for view in part.views}
    return Data(
        fresh=all(part.fresh for part in parts),
        pending=frozenset().union(*(part.pending for part in parts)),
        views=tuple(views),
        flat=parts[0].flat.intersection(*(part.flat for part in parts[1:])),
        stacked=frozenset().union(*(part.stacked for part in parts)),
        onehot=next((part.onehot for part in parts if part.onehot is not None), None),
        suspects=frozenset().union(*(part.suspects for part in parts)),
        soft=any(part.soft for part in parts),
        cotangent=all(part.cotangent for part in parts),
        learned=all(part.learned for part in parts),
        composed=frozenset().union(*(part.composed for part in parts)),
        outer=next((part.outer for part in parts if part.outer), ()),
        chosen=frozenset().union(*(part.chosen for part in parts)),
    )


def _data(
    uses: Uses, name: str, values: Sequence[Value], shapes: Sequence[Any], shape: Any
) -> Data:
    parts = [value for value in values if isinstance(value, Data)]
    data = combined(parts)
    if len(parts) > 1:
        live = [v for v in data.views if uses.is_table(v) or not uses.consumed(v)]
        if live and name in SUMS and name != "select_n":  # a residual stream is not cut into parts
            for view in live:
                if any(_alone(view, part, live) for part in parts if view not in part.views):
                    uses.consume([view])
            live = [v for v in live if uses.is_table(v) or not uses.consumed(v)]
        pending = uses.unfollowed(data.pending)
        if len(live) < len(data.views) or len(pending) < len(data.pending):
            data = data._replace(views=tuple(live), pending=pending)
    onehot = data.onehot if name in _KEEPS_ONEHOT else None
    if name == "select_n" and (len(parts) > 1 or not isinstance(values[0], Data)):
        onehot = None  # something else stands elsewhere
    if name == "eq" and len(values) == 2:
        for value, other in ((values[0], values[1]), (values[1], values[0])):
            if isinstance(value, Data) and isinstance(other, Constant) and len(other.iota) == 1:
                onehot = other.iota[0] if other.iota[0] in value.flat else None
    flat = data.flat
    for value, old in zip(values, shapes, strict=True):
        if flat and isinstance(value, Constant) and len(old) == len(shape) > 0:
            flat = frozenset(d for d in flat if old[d] == 1)
    if name == "mul" and len(parts) == 2 and _crossed(*parts):
        data = data._replace(outer=(parts[0].flat, parts[1].flat))
    if name == "exp" and data.composed:  # scores of a learned query
        uses.note("suspected", data.composed)
    soft = data.soft or (name == "exp" and bool(data.suspects))
    if (onehot, flat, soft) == (data.onehot, data.flat, data.soft):
        return data
    return data._replace(onehot=onehot, flat=flat, soft=soft)


def _crossed(one: Data, other: Data) -> bool:
    """Whether each varies along axes along which the other does not: an outer product."""
    return bool(one.flat - other.flat) and bool(other.flat - one.flat)


_KEEPS_ONEHOT = LINEAR | {"mul", "and", "select_n"}


def _alone(view: View, other: Data, live: Sequence[View]) -> bool:
    """Whether other data varies along an axis of a result, and is no result itself."""
    dims = view.dims() - other.flat
    return bool(dims) and not any(v in live and v.dims() & dims for v in other.views)


def _meet(
    uses: Uses, name: str, values: Sequence[Value], weights: Sequence[Weight]
) -> Weight | Sequence[Value]:
    """What weights become: a weight, or data in their place."""
    if len(weights) > 1 and any(weight.picked for weight in weights):
        values = [
            _as_data(uses, v, None) if isinstance(v, Weight) and v.picked else v for v in values
        ]
        weights = [value for value in values if isinstance(value, Weight)]
    if not weights:
        return values
    datas = [value for value in values if isinstance(value, Data)]
    if len(weights) == 1 and not datas:
        (weight,) = weights
        if weight.data is None or name in LINEAR or name in ("mul", "add", "sub", "select_n"):
            return stopped(weight) if name in FLAT and not uses.inside_custom else weight
        if name == "div" and values[0] is weight:
            return weight
        if weight.picked or len(weight.dims()) < 2:
            return [uses.settle(weight) if v is weight else v for v in values]
        return Weight(tuple(_part(view, LOST) for view in weight.views), weight.data)
    if not datas:
        weight = merged(name, weights)
        if weight is not None:
            return weight
    if len(weights) == 1 and len(datas) == 1:
        (weight,), (data,) = weights, datas
        if name in ("add", "sub") and data.cotangent and not uses.transposed:
            return weight  # a step along a gradient
        if name in ("mul", "div") and weight.dims() & data.flat:
            sources = {view.source for view in weight.views}
            uses.demote(sources, data.pending)
            uses.consume(data.views)
            data = data._replace(views=())
            if weight.data is None:
                return weight._replace(data=data)
            both = combined([weight.data, data])
            fresh = weight.data.fresh if weight.picked else both.fresh
            return weight._replace(data=both._replace(fresh=fresh))
    others = combined(datas) if datas else None
    added = name in SUMS
    return [_as_data(uses, v, others, added) if isinstance(v, Weight) else v for v in values]


def _as_data(uses: Uses, weight: Weight, data: Data | None, added: bool = True) -> Data:
    picked = weight.data
    if picked is None:
        return uses.entrywise(weight, data, added)
    itself = any(view.source in picked.chosen for view in weight.views)  # the nearest code, say
    if not weight.picked or itself or picked.fresh:
        return uses.settle(weight)
    role = "b" if weight.dims() else "o"  # rows that a router picked
    gone = [tuple((f, role if r == "p" else r) for f, r in v.gone) for v in weight.views]
    views = tuple(v._replace(gone=g) for v, g in zip(weight.views, gone, strict=True))
    part = uses.entrywise(Weight(views), data or picked)
    return combined([part, picked._replace(views=(), onehot=None)])


def merged(name: str, weights: Sequence[Weight]) -> Weight | None:
    """The weight that several weights make; None if they make a token."""
    dims = [weight.dims() for weight in weights]
    most = max(dims, key=len)
    data = [weight.data for weight in weights if weight.data is not None]
    views: list[View] = []
    for weight, own in zip(weights, dims, strict=True):
        others = [o for w, o in zip(weights, dims, strict=True) if w is not weight]
        if own == most and all(o <= own for o in others):
            equal = [w for w, o in zip(weights, dims, strict=True) if o == own]
            sources = {frozenset(v.source for v in w.views if v.part == WHOLE) for w in equal}
            blurred = name not in SUMS and len(sources) > 1
            views += [_part(v, MIXED) if blurred else v for v in weight.views]
        elif own < most and name in SUMS:
            largest = {
                v.source for w, o in zip(weights, dims, strict=True) if o == most for v in w.views
            }
            if not {v.source for v in weight.views} <= largest:
                return None
            views += [_part(v, SCALE) for v in weight.views]
        elif own < most and len(others) == 1 and not own & others[0] and own:
            views += weight.views
        elif own < most:
            views += [_part(v, SCALE) for v in weight.views]
        elif name in SUMS:
            return None
        else:
            disjoint = all(not own & o for o in others)
            views += [v if disjoint else _part(v, MIXED) for v in weight.views]
    return Weight(foremost(views), combined(data) if data else None)


def foremost(views: Sequence[View]) -> tuple[View, ...]:
    """Keeps the views that matter: beside a weight itself, not its statistics."""
    sources = {view.source for view in views if _is_weight(view)}
    kept: dict[Any, View] = {}
    for view in views:
        if _is_weight(view) or view.source not in sources:
            kept.setdefault((view.source, view.spans(), view.part), view)
    return tuple(kept.values())


def stopped(weight: Weight) -> Weight:
    """What no gradient goes through."""
    return weight._replace(views=tuple(view._replace(part=STOPPED) for view in weight.views))


def _is_weight(view: View) -> bool:
    return view.part == WHOLE and not any(r == "-" and f.size > 1 for f, r in view.gone)


def _part(view: View, part: str) -> View:
    return view if view.part in (STOPPED, LOST) else view._replace(part=part)


def unknown(uses: Uses, equation: Any, values: Sequence[Value]) -> list[Value]:
    """What no rule is known for: data goes on, and parameters are refused."""
    parts = []
    for value in values:
        if isinstance(value, Weight) and value.picked:
            parts.append(uses.settle(value))
        elif isinstance(value, Weight):
            uses.refuse(value, f"{equation.primitive.name} is no operation that reading follows")
            parts.append(value.data or Data())
        elif isinstance(value, Data):
            parts.append(value)
    uses.consume(view for part in parts for view in part.views)
    return [combined([part.bare() for part in parts])] * len(equation.outvars)
