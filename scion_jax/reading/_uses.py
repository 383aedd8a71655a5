"""Uses: what a program does with its parameters, noted down as it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from scion_jax.reading._letters import MATRIX, Pairs, complete, letters_of
from scion_jax.reading._steps import Step
from scion_jax.reading._values import Data, Weight
from scion_jax.reading._views import Part, View

# What a use makes of a parameter, beside `MATRIX`. A weak one (a statistic, a factor of another
# weight) counts only where there is no other; so does one in the transposed half of a derivative,
# whose sides swap.
EMBEDDING, VECTOR, WEAK, UNKNOWN = "embedding", "vector", "weak", "unknown"

_MET = "it meets another parameter before it meets data"
_ONE_BY_ONE = "data is multiplied with its rows or columns one by one"
_BENT = "data scales it before an operation that is not linear"
_CLOSED_OVER = "it is multiplied with a constant, and inputs must be arguments"
_CONTRADICTION = "one of its axes is input and output, or several parameters"

_SWAPPED_FACTORS = {"I": "O", "O": "I"}
_SWAPPED_SIDES = {"i": "o", "o": "i"}
_USED_AS = {"p": "b", "I": "i", "O": "o"}
_SETTLED_AS = {"p": "i", "I": "i", "O": "o"}


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """One use of a parameter: the same object whenever an equation is read again, as loops are.

    Attributes:
        view: The parameter, as it was used.
        kind: One of the words above.
        letters: The role of each axis of the parameter; None where the use does not tell.
        groups: Into how many equal matrices each axis falls.
        spans: The entries of each axis that were used, as ranges.
        fresh: Whether no product with a parameter came before.
        transposed: Whether it is in the transposed half of a derivative.
        equations: The equation, and those that it is inside of, outwards.
        problem: For `UNKNOWN`, what is not known.
    """

    view: View
    kind: str
    letters: tuple[str | None, ...]
    groups: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    fresh: bool
    transposed: bool
    equations: tuple[Any, ...]
    problem: str


class Uses:
    """The uses found so far, and what became of their results.

    Attributes:
        found: The uses, each with the steps that it is at.
        notes: What became of their results, each a word, a use, and perhaps more: `"followed"` by a
            product, `"reached"` the outputs, `"demoted"` since it only measured the weight,
            `"suspected"` of being part of a weight that data made, `"whole"` since it is not cut;
            `"piece"` of a result that goes its own way, with the ranges, and `"used"` without;
            `"stack"`, with an axis along which a later weight has a matrix for each entry.
        equation: The equation that is read now.
        callers: Those that it is inside of, inwards.
        looked_up: Where a parameter was looked up last.
        step: Its step; a use counts if a gradient of the outputs reaches it.
        transposed: Whether it is in the transposed half of a derivative.
        inside_custom: Whether it is inside of a function with a derivative of its own.
    """

    def __init__(self) -> None:
        self.found: dict[Use, list[Step]] = {}
        self.notes: dict[tuple[Any, ...], None] = {}
        self.equation: Any = None
        self.callers: list[Any] = []
        self.looked_up: dict[Hashable, tuple[Any, ...]] = {}
        self.step = Step([])
        self.transposed = False
        self.inside_custom = False
        self._known: dict[tuple[Any, ...], Use] = {}

    def place(self) -> tuple[Any, ...]:
        """The equation that is read now, and those that it is inside of, outwards."""
        return (self.equation, *self.callers[::-1])

    def forget(self, uses: int, notes: int) -> None:
        """Keeps the first so many only: a loop is read again, with other values."""
        while len(self.found) > uses:
            self.found.popitem()
        while len(self.notes) > notes:
            self.notes.popitem()

    def note(self, word: str, uses: Iterable[Hashable], *more: Any) -> None:
        """Notes what became of results."""
        self.notes.update(dict.fromkeys([(word, use, *more) for use in uses]))

    def unfollowed(self, uses: frozenset[Any]) -> frozenset[Any]:
        """Keeps those of whose results no product took yet."""
        return frozenset([use for use in uses if ("followed", use) not in self.notes])

    def record(
        self,
        kind: str,
        view: View,
        pairs: Pairs = (),
        fresh: bool = False,
        problem: str = "",
        where: tuple[Any, ...] = (),
    ) -> Use:
        """Notes a use, and returns it.

        Args:
            kind: What the use makes of the parameter.
            view: The parameter, as it is used.
            pairs: Its factors in the array, each with its role.
            fresh: Whether no product with a parameter came before.
            problem: For `UNKNOWN`, what is not known.
            where: The place, if it is not here.
        """
        pairs = [*pairs, *view.gone]
        if self.transposed:
            pairs = [(factor, _SWAPPED_SIDES.get(role, role)) for factor, role in pairs]
        letters, groups = letters_of(pairs, view.shape)
        if "!" in letters and kind in (MATRIX, EMBEDDING):
            kind, problem = UNKNOWN, _CONTRADICTION
        if kind == MATRIX and not complete(letters, view.shape):
            kind = VECTOR
            one = [f for f, r in view.gone if r == "b" and view.shape[f.axis] > 1]
            if "i" in letters and any(f.size == 1 or "i" in letters[: f.axis] for f in one):
                kind, problem = UNKNOWN, _ONE_BY_ONE
        if kind == VECTOR:
            letters = [letter if letter == "b" else "o" for letter in letters]
        spans, equations = view.spans(), where or self.place()
        # The letters, since a function that was traced once may be called with W and with Wᵀ.
        key = (
            id(equations[0]), view.source, kind, spans, problem, self.transposed, fresh, *letters
        )  # fmt: skip
        use = self._known.get(key) or Use(
            view, kind, tuple(letters), groups, spans, fresh, self.transposed, equations, problem
        )
        self._known[key] = use
        if view.part != Part.STOPPED:
            self.found.setdefault(use, []).append(self.step)
        return use

    def refuse(self, weight: Weight, problem: str) -> None:
        """Notes that it is not known what the parameters of a weight are."""
        for view in weight.views:
            self.record(UNKNOWN, view, problem=problem)

    def entrywise(self, weight: Weight, data: Data | None = None, added: bool = True) -> Data:
        """Notes that a weight meets data entry by entry: vectors. Returns it as data.

        Args:
            weight: Added to, multiplied with, or put in the place of data.
            data: That data; None if only parameters meet.
            added: Whether it is added, so that it has the parts of what it is added to.

        Returns:
            Data with the weight's axes, as the part of it in the result.
        """
        made = {}
        axes = range(len(weight.views[0].axes))
        for view in weight.views:
            stacked = data.stacked if data and view.dims() - data.stacked else frozenset()
            pairs = [
                (factor, "i" if factor.stride < 0 else "b" if dim in stacked else "o")
                for dim in axes
                for factor in view.own(dim)
            ]
            kind, problem, goes_on = _of_entries(weight, view, {role for _, role in pairs})
            use = self.record(kind, view, () if kind == UNKNOWN else pairs, problem=problem)
            if goes_on:
                made[use] = view._replace(source=use, gone=())
        if not added:
            self.note("whole", made)
        return Data(
            fresh=bool(data and data.fresh),
            learned=data is None,
            views=frozenset(made.values()),
            flat=frozenset(axes) - weight.dims(),
            pending=frozenset(made),
        )

    def settle(self, weight: Weight) -> Data:
        """Makes data of a weight that data picked or scaled, where it is no weight any more."""
        data = weight.data
        if data is None or not weight.picked:
            part = self.entrywise(weight, data)
            return (data or part)._replace(views=part.views, flat=frozenset())
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
            view = view.relabelled(_SETTLED_AS)
            pairs = [(factor, "o") for factor in view.own()]
            where = self.looked_up.get(view.source, ())
            use = self.record(kind, view, pairs, data.fresh, problem, where)
            views.append(view._replace(source=use, gone=()))
        return data._replace(
            fresh=False,
            onehot=frozenset(),
            views=frozenset(views),
            pending=frozenset(view.source for view in views),
            flat=data.flat - weight.dims(),
        )

    def product(
        self, weight: Weight, pairs: Sequence[Pairs], data: Data, kind: str = MATRIX
    ) -> list[Use]:
        """Notes a product of a weight with data.

        Args:
            weight: The weight.
            pairs: For each of its views the role of each factor.
            data: The data.
            kind: `VECTOR` for a product without inputs or without outputs.

        Returns:
            The uses, one for each view.
        """
        if data.learned:
            self._confirm_positions(data)
        made = []
        for view, factors in zip(weight.views, pairs, strict=True):
            turned = any(role in "io" and role.upper() in view.past for _, role in factors)
            if turned and not weight.plain:
                view = view.as_part(Part.LOST)
            if turned and weight.plain:
                view = view.relabelled(_SWAPPED_FACTORS)
            image = {factor.axis for factor, role in view.gone if role == "c"}
            if any(factor.axis in image and role == "o" for factor, role in factors):
                view = view.as_part(Part.LOST)  # a constant may be the data here
            is_first = "O" in view.past  # of two factors
            view = view.relabelled(_USED_AS)
            if view.part == Part.SCALE:
                use = self.record(WEAK, view, [(factor, "o") for factor, _ in factors])
            elif view.part in (Part.MIXED, Part.LOST) or view.is_statistic:
                use = self.record(UNKNOWN, view, problem=_MET)
            else:
                use = self.record(kind, view, factors, data.fresh)
            made.append(use)
            if is_first:
                self.note("followed", [use])
        if not self.transposed:
            self.note("followed", data.pending)
        self.consume(data.views)
        return made

    def _confirm_positions(self, data: Data) -> None:
        """A weight times a constant, then with parameters alone: a network of positions."""
        for use in {view.source for view in data.views}:
            if use.kind == WEAK and use.problem == _CLOSED_OVER:
                inner = {factor.axis for factor, role in use.view.gone if role == "c"}
                own = use.view.own()
                pairs = [(factor, "i" if factor.axis in inner else "o") for factor in own]
                gone = tuple(entry for entry in use.view.gone if entry[1] != "c")
                view = use.view._replace(gone=gone)
                self.record(MATRIX, view, pairs, where=use.equations)

    def is_mixed(self, views: Iterable[View], dim: int) -> bool:
        """Whether a sum along an axis mixes the results of a stack, as of experts; notes that."""
        before = [(use, axis) for use, axis in self._axes(views, dim) if use.kind == MATRIX]
        if not before or any("i" in use.letters[:axis] for use, axis in before):
            return False
        inputs = all("i" in use.letters[axis:] for use, axis in before)
        if inputs:
            self.stack(views, dim)
        return inputs

    def stack(self, views: Iterable[View], dim: int) -> None:
        """Notes that a later weight has a matrix for each entry along an axis of a result."""
        axes = self._axes(views, dim)
        found = [(use, axis) for use, axis in axes if use.kind == MATRIX]
        if found and not any("i" in use.letters[:axis] for use, axis in found):  # stacks lead
            for use, axis in axes:
                self.note("stack", [use], axis)

    def _axes(self, views: Iterable[View], dim: int) -> list[tuple[Any, int]]:
        return [(view.source, factor.axis) for view in views for factor in view.own(dim)]

    def demote(self, weight: Weight, uses: Iterable[Use]) -> None:
        """Notes that products only measured a weight, which their result then scales."""
        sources = {view.source for view in weight.views}
        own = [use for use in uses if use.kind == MATRIX and use.view.source in sources]
        self.note("demoted", own)

    def consume(self, views: Iterable[View]) -> None:
        """Notes that pieces of results are used as they are."""
        for view in views:
            self.note("piece", [view.source], view.spans())
            self.note("used", [view.source])

    def consumed(self, view: View) -> bool:
        """Tells whether all that a view shows was used as it is already."""
        if ("used", view.source) not in self.notes:
            return False
        return ("piece", view.source, view.spans()) in self.notes


def is_table(view: View) -> bool:
    """Whether a view is of something added that has several axes, and might be a weight."""
    several = len(view.shape) > 1 and view.source.kind == VECTOR  # pyright: ignore
    return several and len(view.dims()) > 1


def _of_entries(weight: Weight, view: View, roles: set[str]) -> tuple[str, str, bool]:
    """What meeting data entry by entry makes of a view: a kind, a problem, and if it goes on."""
    several = sum(other.source == view.source for other in weight.views) > 1
    if several and weight.data is not None and not weight.picked:
        return UNKNOWN, _ONE_BY_ONE, False
    if view.part == Part.LOST and view.is_statistic:
        return WEAK, _BENT, False
    if view.part == Part.LOST and weight.data is not None:
        return VECTOR, "", False
    if view.part == Part.LOST or view.is_factor:
        return UNKNOWN, _MET, True
    if "c" in view.past:
        return WEAK, _CLOSED_OVER, True
    if view.part == Part.SCALE or view.is_statistic:
        return WEAK, "", False
    return EMBEDDING if "i" in roles and len(roles) > 1 else VECTOR, "", True
