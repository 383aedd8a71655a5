"""Uses: what a program does with its parameters, noted down as it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jax.extend import source_info_util

from scion_jax.reading._letters import Pairs, complete, letters_of
from scion_jax.reading._steps import Step
from scion_jax.reading._views import Part, Shape, View

# What a use makes of a parameter. A weak one (a statistic, a factor of another weight) counts only
# where there is no other; so does one in the transposed half of a derivative, whose sides swap.
MATRIX, EMBEDDING, VECTOR, WEAK, UNKNOWN = "matrix", "embedding", "vector", "weak", "unknown"

ONE_BY_ONE = "data is multiplied with its rows or columns one by one"
_CONTRADICTION = "one of its axes is input and output, or several parameters"
_OTHER_SIDE = {"i": "o", "o": "i"}


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
        place: Where it is, such as `"dot_general model.py:41"`.
        problem: For `UNKNOWN`, what is not known.
    """

    view: View
    kind: str
    letters: tuple[str | None, ...]
    groups: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    fresh: bool
    transposed: bool
    place: str
    problem: str


class Operation(NamedTuple):
    """An equation of a program.

    Attributes:
        name: Name of its primitive.
        params: Its parameters.
        shapes: Shapes of its operands.
        shape: Shape of its result, or of the first of them.
        results: How many there are.
    """

    name: str
    params: Any
    shapes: Sequence[Shape]
    shape: Shape
    results: int = 1


class Uses:
    """The uses found so far, and what became of their results.

    Attributes:
        found: The uses, each with the steps that it is at.
        notes: What became of their results, each a word, a use, and perhaps more: `"followed"` by a
            product, `"reached"` the outputs, `"demoted"` since it only measured the weight,
            `"suspected"` of being part of a weight that data made, `"whole"` since it is not cut;
            `"used"` as it is, and a `"piece"` that goes its own way, each with the ranges of it;
            `"stack"`, with an axis along which a later weight has a matrix for each entry;
            `"head"`, with an axis and the range of an attention head on it.
        equation: The equation that is read now.
        callers: Those that it is inside of, inwards.
        looked_up: Where a parameter was looked up last.
        step: Its step; a use counts if a gradient of the outputs reaches it.
        transposed: Whether it is in the transposed half of a derivative.
        inside_custom: Whether it is inside of a function with a derivative of its own.
        apart: Whether attention heads are looked for.
    """

    def __init__(self, apart: bool = False) -> None:
        self.apart = apart
        self.found: dict[Use, list[Step]] = {}
        self.notes: dict[tuple[Any, ...], None] = {}
        self.equation: Any = None
        self.callers: list[Any] = []
        self.looked_up: dict[Any, tuple[Any, ...]] = {}
        self.step = Step([])
        self.transposed = False
        self.inside_custom = False
        self._known: dict[tuple[Any, ...], Use] = {}
        self._lines: dict[Any, str] = {}

    def place(self) -> tuple[Any, ...]:
        """The equation that is read now, and those that it is inside of, outwards."""
        return (self.equation, *self.callers[::-1])

    def forget(self, uses: int, notes: int) -> None:
        """Keeps the first so many only: a loop is read again, with other values."""
        while len(self.found) > uses:
            self.found.popitem()
        while len(self.notes) > notes:
            self.notes.popitem()

    def record(
        self, kind: str, view: View, pairs: Pairs = (), fresh: bool = False, problem: str = "",
        where: tuple[Any, ...] = (),
    ) -> Use:  # fmt: skip
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
            pairs = [(factor, _OTHER_SIDE.get(role, role)) for factor, role in pairs]
        letters, groups = letters_of(pairs, view.shape)
        if "!" in letters and kind in (MATRIX, EMBEDDING):
            kind, problem = UNKNOWN, _CONTRADICTION
        if kind == MATRIX and not complete(letters, view.shape):
            kind = VECTOR
            one = [f for f, r in view.gone if r == "b" and view.shape[f.axis] > 1]
            if "i" in letters and any(f.size == 1 or "i" in letters[: f.axis] for f in one):
                kind, problem = UNKNOWN, ONE_BY_ONE
        if kind == VECTOR:
            letters = [letter if letter == "b" else "o" for letter in letters]
        spans, where = view.spans(), where or self.place()
        # The letters, since a function that was traced once may be called with W and with Wᵀ.
        key = id(where[0]), view.source, kind, spans, problem, self.transposed, fresh, *letters
        use = self._known.get(key) or Use(
            view, kind, tuple(letters), groups, spans, fresh, self.transposed,
            self._text(where), problem,
        )  # fmt: skip
        self._known[key] = use
        if view.part != Part.STOPPED:
            self.found.setdefault(use, []).append(self.step)
        return use

    def _text(self, equations: Sequence[Any]) -> str:
        name = equations[0].primitive.name
        for equation in equations:  # those of library functions may have no place of their own
            trace = equation.source_info.traceback
            if trace not in self._lines:  # layers in a loop share theirs
                summary = source_info_util.summarize(equation.source_info).split(" ")[0]
                file, *line = summary.replace("\\", "/").rsplit("/", 1)[-1].split(":")
                self._lines[trace] = f" {file}:{line[0]}" if line else ""
            if self._lines[trace]:
                return name + self._lines[trace]
        return name

    def refuse(self, views: Iterable[View], problem: str) -> None:
        """Notes that it is not known what parameters are."""
        for view in views:
            self.record(UNKNOWN, view, problem=problem)

    def note(self, word: str, uses: Iterable[Use], *more: Any) -> None:
        """Notes what became of results."""
        for use in uses:
            self.notes[word, use, *more] = None

    def unfollowed(self, uses: frozenset[Use]) -> frozenset[Use]:
        """Keeps those of whose results no product took yet."""
        return frozenset([use for use in uses if ("followed", use) not in self.notes])

    def consume(self, views: Iterable[View]) -> None:
        """Notes that pieces of results are used as they are."""
        for view in views:
            self.notes["used", view.source, view.spans()] = None

    def unused(self, views: Iterable[View]) -> list[View]:
        """Keeps those that show something which was not used as it is yet."""
        return [
            view
            for view in views
            if is_table(view) or ("used", view.source, view.spans()) not in self.notes
        ]

    def stack(self, views: Iterable[View], dim: int, summed: bool = False) -> bool:
        """Tells if an axis of results is a stack, as of experts; notes which later ones have it.

        Args:
            views: What the results are of.
            dim: The axis.
            summed: Whether it is summed over; then each entry must be of a matrix of its own.
        """
        axes = [(view.source, factor.axis) for view in views for factor in view.own(dim)]
        matrices = [(use, axis) for use, axis in axes if use.kind == MATRIX]
        if not matrices or any("i" in use.letters[:axis] for use, axis in matrices):
            return False
        apart = all("i" in use.letters[axis:] for use, axis in matrices)
        for use, axis in axes if apart or not summed else ():
            self.note("stack", [use], axis)
        return apart


def is_table(view: View) -> bool:
    """Whether a view is of something added that has several axes, and might be a weight."""
    return view.source.kind == VECTOR and len(view.shape) > 1 and len(view.dims()) > 1
