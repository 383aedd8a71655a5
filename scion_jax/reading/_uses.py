"""Uses: what a program does with its parameters, noted down as it is read."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from scion_jax.reading._views import LOST, MIXED, SCALE, STOPPED, WHOLE, Data, Factor, View, Weight

# What a use makes of a parameter. A weak one (a statistic, a factor of another weight) counts only
# where there is no other; so does one in the transposed half of a derivative, whose sides swap.
MATRIX, EMBEDDING, VECTOR, WEAK, UNKNOWN = "matrix", "embedding", "vector", "weak", "unknown"


class Use(NamedTuple):
    """One use of a parameter.

    Attributes:
        source: Index of the parameter.
        kind: One of the words above.
        letters: The role of each axis of the parameter; None where the use does not tell.
        groups: Into how many equal matrices each axis falls.
        spans: The entries of each axis that were used, as ranges.
        fresh: Whether no product with a parameter came before.
        transposed: Whether it is in the transposed half of a derivative.
        equations: The equation, and those that it is inside of, outwards.
        problem: For `UNKNOWN`, what is not known.
    """

    source: Hashable
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
        found: Uses by key. A key is the same whenever an equation is read again, as loops are.
        notes: What became of their results, each a word, a key, and perhaps more: `"followed"` by a
            product, `"reached"` the outputs, `"demoted"` since it only measured the weight,
            `"suspected"` of being part of a weight that data made, `"whole"` since it is not cut;
            `"piece"` of a result that goes its own way, with the ranges, and `"used"` without;
            `"stack"`, with an axis along which a later weight has a matrix for each entry.
        positional: Weights that were multiplied with a constant and then met only parameters: each
            the first layer of a network of positions, if what comes of it goes on into a product.
        equation: The equation that is read now.
        callers: Those that it is inside of, inwards.
        looked_up: Where a parameter was looked up last.
        live: Whether a gradient reaches the output through it.
        transposed: Whether it is in the transposed half of a derivative.
        inside_custom: Whether it is inside of a function with a derivative of its own.
    """

    def __init__(self) -> None:
        self.found: dict[Hashable, Use] = {}
        self.notes: dict[tuple[Any, ...], None] = {}
        self.positional: dict[Hashable, tuple[Any, View, list[tuple[Factor, str]]]] = {}
        self.equation: Any = None
        self.callers: list[Any] = []
        self.looked_up: dict[Hashable, tuple[Any, ...]] = {}
        self.live = True
        self.transposed = False
        self.inside_custom = False

    def place(self) -> tuple[Any, ...]:
        """The equation that is read now, and those that it is inside of, outwards."""
        return (self.equation, *self.callers[::-1])

    def forget(self, uses: int, notes: int) -> None:
        """Keeps the first so many only: a loop is read again, with other values."""
        while len(self.found) > uses:
            self.found.popitem()
        while len(self.notes) > notes:
            self.notes.popitem()

    def note(self, word: str, keys: Iterable[Hashable], *more: Any) -> None:
        """Notes what became of results."""
        self.notes.update(dict.fromkeys((word, key, *more) for key in keys))

    def unfollowed(self, keys: Iterable[Hashable]) -> frozenset[Hashable]:
        """Keeps the keys of results that no product took yet."""
        return frozenset(key for key in keys if ("followed", key) not in self.notes)

    def record(
        self,
        kind: str,
        view: View,
        roles: Iterable[tuple[Factor, str]],
        fresh: bool = False,
        problem: str = "",
        where: tuple[Any, ...] = (),
    ) -> Hashable:
        """Notes a use, if a gradient goes through it; returns its key."""
        roles = [*roles, *view.gone]
        if self.transposed:
            roles = [(f, {"i": "o", "o": "i"}.get(role, role)) for f, role in roles]
        read = [_axis_role(roles, axis, size) for axis, size in enumerate(view.shape)]
        letters, groups = [letter for letter, _ in read], tuple(count for _, count in read)
        if "!" in letters and kind in (MATRIX, EMBEDDING):
            kind, problem = UNKNOWN, "one of its axes is input and output, or several parameters"
        if kind == MATRIX:
            kind = _fill(letters, view.shape)
            one = [f for f, r in view.gone if r == "b" and view.shape[f.axis] > 1]
            if kind == VECTOR and any(f.size == 1 or "i" in letters[: f.axis] for f in one):
                kind, problem = (UNKNOWN, _ONE_BY_ONE) if "i" in letters else (kind, problem)
        if kind == VECTOR:
            letters = [letter if letter == "b" else "o" for letter in letters]
        spans = view.spans()
        where = where or self.place()
        # The letters, since a function that was traced once may be called with W and with Wᵀ.
        key = (id(where[0]), view.source, kind, spans, problem, self.transposed, tuple(letters))
        if not self.live or view.part == STOPPED:
            return key
        self.found[key] = Use(
            view.source, kind, tuple(letters), groups, spans, fresh, self.transposed,
            where, problem,
        )  # fmt: skip
        return key

    def refuse(self, weight: Weight, problem: str) -> None:
        """Notes that it is not known what the parameters of a weight are."""
        for view in weight.views:
            self.record(UNKNOWN, view, (), problem=problem)

    def entrywise(self, weight: Weight, data: Data | None = None, added: bool = True) -> Data:
        """Notes that a weight meets data entry by entry: vectors. Returns it as data.

        Args:
            weight: Added to, multiplied with, or put in the place of data.
            data: That data; None if only parameters meet.
            added: Whether it is added, so that it has the parts of what it is added to.

        Returns:
            Data with the weight's axes, as the part of it in the result.
        """
        keys = {}
        for view in weight.views:
            stacked = data.stacked if data and view.dims() - data.stacked else frozenset()
            roles = [
                (f, "i" if f.stride < 0 else "b" if dim in stacked else "o")
                for dim in range(len(view.axes))
                for f in view.own(dim)
            ]
            rows = len({role for _, role in roles}) > 1 and any(role == "i" for _, role in roles)
            statistic = any(role == "-" and f.size > 1 for f, role in view.gone)
            several = sum(v.source == view.source for v in weight.views) > 1
            if several and weight.data is not None and not weight.picked:
                self.record(UNKNOWN, view, (), problem=_ONE_BY_ONE)
            elif statistic and view.part == LOST:
                self.record(WEAK, view, roles, problem=_BENT)
            elif view.part == LOST and weight.data is not None:
                self.record(VECTOR, view, roles)
            elif view.part == LOST or any(role in "IO" for _, role in view.gone):
                keys[self.record(UNKNOWN, view, (), problem=_MET)] = view
            elif any(role == "c" for _, role in view.gone):
                keys[key := self.record(WEAK, view, roles, problem=_CLOSED_OVER)] = view
                self.positional[key] = self.place(), view, roles
            elif view.part == SCALE or statistic:
                self.record(WEAK, view, roles)
            else:
                keys[self.record(EMBEDDING if rows else VECTOR, view, roles)] = view
        if not added:
            self.note("whole", keys)
        rank = len(weight.views[0].axes)
        return Data(
            fresh=bool(data and data.fresh),
            learned=data is None,
            views=tuple(view._replace(source=key, gone=()) for key, view in keys.items()),
            flat=frozenset(range(rank)) - weight.dims(),
            pending=frozenset(keys),
        )

    def settle(self, weight: Weight) -> Data:
        """Makes data of a weight that data picked or scaled, where it is no weight any more."""
        if weight.data is None or not weight.picked:
            part = self.entrywise(weight, weight.data)
            return (weight.data or part)._replace(views=part.views, flat=frozenset())
        views = []
        for view in weight.views:
            picked = any(role == "p" for _, role in view.gone)
            gone = tuple((f, {"p": "i", "I": "i", "O": "o"}.get(r, r)) for f, r in view.gone)
            view = view._replace(gone=gone)
            roles = [(f, "o") for dim in range(len(view.axes)) for f in view.own(dim)]
            kind = EMBEDDING if picked else MATRIX  # the second factor of a low rank
            kind = VECTOR if not view.dims() and not any(r == "o" for _, r in gone) else kind
            kind, problem = (kind, "") if view.part in (WHOLE, SCALE) else (UNKNOWN, _MET)
            if any(role == "c" for _, role in gone):
                kind, problem = WEAK, _CLOSED_OVER
            where = self.looked_up.get(view.source, ())
            key = self.record(kind, view, roles, weight.data.fresh, problem, where)
            views.append(view._replace(source=key, gone=()))
        pending = frozenset(view.source for view in views)
        flat = weight.data.flat - weight.dims()
        return weight.data._replace(
            fresh=False, onehot=None, views=tuple(views), pending=pending, flat=flat
        )

    def product(
        self,
        weight: Weight,
        roles: Sequence[Sequence[tuple[Factor, str]]],
        data: Data,
        kind: str = MATRIX,
    ) -> list[Hashable]:
        """Notes a product of a weight with data.

        Args:
            weight: The weight.
            roles: For each of its views the role of each factor.
            data: The data.
            kind: `VECTOR` for a product without inputs or without outputs.

        Returns:
            The keys of the uses, one for each view.
        """
        if data.learned:
            self._confirm_positional(data)
        keys: list[Hashable] = []
        plain = any(not composed(view) for view in weight.views if view.part == WHOLE)
        for view, pairs in zip(weight.views, roles, strict=True):
            own = {role for _, role in pairs}
            for letter, role in (("i", "I"), ("o", "O")):
                swapped = letter in own and any(r == role for _, r in view.gone)
                if swapped and plain:
                    view = view._replace(gone=tuple((f, _SWAP.get(r, r)) for f, r in view.gone))
                elif swapped:
                    view = view._replace(part=LOST)
            gone = tuple((f, {"p": "b", "I": "i", "O": "o"}.get(r, r)) for f, r in view.gone)
            first = any(r == "O" for _, r in view.gone)
            image = {f.axis for f, r in gone if r == "c"}
            if any(f.axis in image and role == "o" for f, role in pairs):
                view = view._replace(part=LOST)  # a constant may be the data here
            view = view._replace(gone=gone)
            if view.part == SCALE:
                key = self.record(WEAK, view, [(f, "o") for f, _ in pairs])
            elif view.part in (MIXED, LOST) or any(r == "-" and f.size > 1 for f, r in gone):
                key = self.record(UNKNOWN, view, (), problem=_MET)
            else:
                key = self.record(kind, view, pairs, data.fresh)
            keys.append(key)
            if first:  # of two factors, not the last
                self.note("followed", [key])
        if not self.transposed:
            self.note("followed", data.pending)
        self.consume(data.views)
        return keys

    def _confirm_positional(self, data: Data) -> None:
        for key in {view.source for view in data.views} & set(self.positional):
            where, view, roles = self.positional[key]
            inner = {f.axis for f, role in view.gone if role == "c"}
            pairs = [(f, "i" if f.axis in inner else "o") for f, _ in roles]
            gone = tuple(entry for entry in view.gone if entry[1] != "c")
            self.record(MATRIX, view._replace(gone=gone), pairs, where=where)

    def mixed(self, views: Iterable[View], dim: int) -> bool:
        """Whether a sum along an axis mixes the results of a stack, as of experts; notes that."""
        found = [(view.source, f.axis) for view in views for f in view.own(dim)]
        found = [(self.found[key], axis) for key, axis in found if key in self.found]
        products = [(use, axis) for use, axis in found if use.kind == MATRIX]
        if not products or any("i" in use.letters[:axis] for use, axis in products):
            return False
        inputs = all("i" in use.letters[axis:] for use, axis in products)
        if inputs:
            self.stack(views, dim)
        return inputs

    def stack(self, views: Iterable[View], dim: int) -> None:
        """Notes that a later weight has a matrix for each entry along an axis of a result."""
        found = [(view.source, f.axis) for view in views for f in view.own(dim)]
        uses = [(self.found[key], axis) for key, axis in found if key in self.found]
        before = [use.letters[:axis] for use, axis in uses if use.kind == MATRIX]
        if before and not any("i" in letters for letters in before):  # stacks lead
            for key, axis in found:
                self.note("stack", [key], axis)

    def demote(self, sources: set[Hashable], keys: Iterable[Hashable]) -> None:
        """Notes that products only measured a weight, which their result then scales."""
        found = [(key, self.found[key]) for key in keys if key in self.found]
        products = [key for key, u in found if u.kind == MATRIX and u.source in sources]
        self.note("demoted", products)

    def consume(self, views: Iterable[View]) -> None:
        """Notes that pieces of results are used as they are."""
        for view in views:
            self.note("piece", [view.source], view.spans())
            self.note("used", [view.source])

    def is_table(self, view: View) -> bool:
        """Whether a view is of something added that has several axes, and might be a weight."""
        several = len(view.shape) > 1 and view.source[2] == VECTOR  # pyright: ignore
        return several and len(view.dims()) > 1

    def consumed(self, view: View) -> bool:
        """Tells whether all that a view shows was used as it is already."""
        if ("used", view.source) not in self.notes:
            return False
        return ("piece", view.source, view.spans()) in self.notes


_MET = "it meets another parameter before it meets data"
_ONE_BY_ONE = "data is multiplied with its rows or columns one by one"
_BENT = "data scales it before an operation that is not linear"
_CLOSED_OVER = "it is multiplied with a constant, and inputs must be arguments"
_SWAP = {"I": "O", "O": "I"}


def composed(view: View) -> bool:
    """Whether a view is a factor of a product of parameters."""
    return any(role in "IO" for _, role in view.gone)


def _axis_role(roles: Sequence[tuple[Factor, str]], axis: int, size: int) -> tuple[str | None, int]:
    """Finds the letter of an axis, and into how many equal matrices it falls."""
    found = [(f.stride, f.size, role) for f, role in roles if f.axis == axis]
    if any(n > 1 for _, n, _ in found):
        found = [entry for entry in found if entry[1] > 1]
    if not found:
        return None, 1
    letters = {role for _, _, role in found}
    if len(letters) == 1:
        return found[0][2], 1
    if letters == {"i", "s"}:
        return "i", 1
    ordered = sorted(found, reverse=True)  # outermost first
    inner = ordered[-1][2]
    outer = [entry for entry in ordered if entry[2] in "bg"]
    if inner in "io" and letters <= {"b", "g", inner} and ordered[: len(outer)] == outer:
        count = 1
        for _, n, _ in outer:
            count *= n
        return inner, count
    return "!", 1


def _fill(letters: list[str | None], shape: Sequence[int]) -> str:
    """Completes the letters of a product, with axes of size one; returns the kind."""
    spare = [
        a for a, (x, n) in enumerate(zip(letters, shape, strict=True)) if x in _FREE and n == 1
    ]
    if "g" in letters and ("o" in letters or spare):  # each channel is a matrix of its own
        if "o" not in letters:
            letters[spare.pop()] = "o"
        letters[:] = ["b" if x == "g" else x for x in letters]
    known = [x for x in letters if x in ("i", "o", "s", "g")]
    if spare and "i" in known and not {"o", "g"} & set(known):
        letters[spare[-1]] = "o"
    has_input = {"i", "s"} & set(letters) != set()
    has_output = {"o", "g"} & set(letters) != set()
    return MATRIX if has_input and has_output else VECTOR


_FREE = (None, "b")
