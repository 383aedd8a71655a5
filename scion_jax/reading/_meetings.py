"""Meetings of weights with data: each is a use, and what it makes is data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scion_jax.reading._heads import note_inputs
from scion_jax.reading._letters import Pairs
from scion_jax.reading._uses import EMBEDDING, MATRIX, UNKNOWN, VECTOR, WEAK, Use, Uses
from scion_jax.reading._values import NONE, Data, Weight, combined
from scion_jax.reading._views import Move, Part, View

_ONE_BY_ONE = "data is multiplied with its rows or columns one by one"
_MET = "it meets another parameter before it meets data"
_BENT = "data scales it before an operation that is not linear"
_CLOSED_OVER = "it is multiplied with a constant, and inputs must be arguments"


def entrywise(uses: Uses, weight: Weight, data: Data | None = None, added: bool = True) -> Data:
    """Notes that a weight meets data entry by entry: vectors. Returns it as data.

    Args:
        uses: Where to note it.
        weight: Added to, multiplied with, or put in the place of data.
        data: That data; None if only parameters meet.
        added: Whether it is added, so that it has the parts of what it is added to.

    Returns:
        Data with the weight's axes, as the part of it in the result.
    """
    made = {}
    axes = range(len(weight.views[0].axes))
    for view in weight.views:
        stacked = data.stacked if data and data.stacked else NONE
        stacked = stacked if view.dims() - stacked else NONE
        pairs = [
            (factor, "i" if factor.stride < 0 else "b" if dim in stacked else "o")
            for dim in view.dims()
            for factor in view.own(dim)
        ]
        kind, problem, goes_on = _of_entries(weight, view, {role for _, role in pairs})
        use = uses.record(kind, view, () if kind == UNKNOWN else pairs, problem=problem)
        if goes_on:
            made[use] = view._replace(source=use, gone=())
    if not added:
        uses.note("whole", made)
    views = frozenset(made.values())
    return Data(
        fresh=bool(data and data.fresh),
        learned=data is None,
        views=views,
        flat=frozenset(axes) - weight.dims(),
        pending=frozenset(made),
        traces=views if uses.apart else NONE,
    )


def _of_entries(weight: Weight, view: View, roles: set[str]) -> tuple[str, str, bool]:
    """What meeting data entry by entry makes of a view: a kind, a problem, and if it goes on."""
    several = sum(other.source == view.source for other in weight.views) > 1
    if several and weight.data is not None and not weight.picked:
        return UNKNOWN, _ONE_BY_ONE, False
    if view.part == Part.LOST and (view.is_statistic or weight.data is not None):
        return (WEAK, _BENT, False) if view.is_statistic else (VECTOR, "", False)
    if view.part == Part.LOST or view.is_factor:
        return UNKNOWN, _MET, True
    if "c" in view.past:
        return WEAK, _CLOSED_OVER, True
    if view.part == Part.SCALE or view.is_statistic:
        return WEAK, "", False
    return EMBEDDING if "i" in roles and len(roles) > 1 else VECTOR, "", True


def settle(uses: Uses, weight: Weight, among: Data | None = None) -> Data:
    """Makes data of a weight, as among data, where it is no weight any more."""
    data = weight.data
    if data is None:
        return entrywise(uses, weight, among)
    if not weight.picked:
        return data._replace(views=entrywise(uses, weight, data).views, flat=NONE)
    views = []
    for view in weight.views:
        kind, problem = MATRIX, ""  # the second factor of a low rank
        if "c" in view.past:
            kind, problem = WEAK, _CLOSED_OVER
        elif view.part in (Part.MIXED, Part.LOST):
            kind, problem = UNKNOWN, _MET
        elif not view.dims() and not {"o", "O"} & view.past:
            kind = VECTOR
        elif "p" in view.past:
            kind = EMBEDDING
        view = view.relabelled({"p": "i", "I": "i", "O": "o"})
        pairs = [(factor, "o") for factor in view.factors]
        where = uses.looked_up.get(view.source, ())
        use = uses.record(kind, view, pairs, data.fresh, problem, where)
        views.append(view._replace(source=use, gone=()))
    return data._replace(
        fresh=False,
        onehot=NONE,
        views=frozenset(views),
        pending=frozenset(view.source for view in views),
        flat=data.flat - weight.dims(),
    )


def product(
    uses: Uses,
    weight: Weight,
    pairs: Sequence[Pairs],
    data: Data,
    move: Move,
    heads: Mapping[int, int] = {},
) -> Data:
    """Notes a product of a weight with data.

    Args:
        uses: Where to note it.
        weight: The weight.
        pairs: For each of its views the role of each factor.
        data: The data.
        move: Where the axes of the weight are in the result.
        heads: How many attention heads there are on its axes.

    Returns:
        The result, with views of the axes of the weight that are in it.
    """
    if weight.data:
        data = combined([weight.data, data])
    if data.learned:
        _confirm_positions(uses, data)
    made: dict[Use, View] = {}
    factors: list[Use] = []
    for view, own in zip(weight.views, pairs, strict=True):
        use = _multiplied(uses, weight, view, own, data.fresh)
        made[use] = view.moved(move)._replace(source=use, gone=())
        note_inputs(uses, use, view, move.old, heads)
        if view.is_factor and not weight.plain:
            factors.append(use)
    if not uses.transposed:
        uses.note("followed", data.pending)
    uses.consume(data.views)
    uses.note("suspected", data.suspects)
    views = frozenset(made.values())
    return Data(
        learned=data.learned,
        pending=frozenset(made),
        factors=frozenset(factors),
        views=views,
        traces=views if uses.apart else NONE,
    )


def _multiplied(uses: Uses, weight: Weight, view: View, pairs: Pairs, fresh: bool) -> Use:
    """Notes the product of one view of a weight."""
    if any(role in "io" and role.upper() in view.past for _, role in pairs):
        view = view.relabelled({"I": "O", "O": "I"}) if weight.plain else view.as_part(Part.LOST)
    image = {factor.axis for factor, role in view.gone if role == "c"}
    if any(factor.axis in image and role == "o" for factor, role in pairs):
        view = view.as_part(Part.LOST)  # a constant may be the data here
    is_first = "O" in view.past  # of two factors
    view = view.relabelled({"p": "b", "I": "i", "O": "o"})
    if view.part == Part.SCALE:
        use = uses.record(WEAK, view, [(factor, "o") for factor, _ in pairs])
    elif view.part in (Part.MIXED, Part.LOST) or view.is_statistic:
        use = uses.record(UNKNOWN, view, problem=_MET)
    else:
        use = uses.record(MATRIX, view, pairs, fresh)
    if is_first:
        uses.note("followed", [use])
    return use


def _confirm_positions(uses: Uses, data: Data) -> None:
    """A weight times a constant, then with parameters alone: a network of positions."""
    for use in {view.source for view in data.views}:
        if use.problem == _CLOSED_OVER:
            inner = {factor.axis for factor, role in use.view.gone if role == "c"}
            pairs = [(f, "i" if f.axis in inner else "o") for f in use.view.factors]
            gone = tuple(entry for entry in use.view.gone if entry[1] != "c")
            uses.record(MATRIX, use.view._replace(gone=gone), pairs)
