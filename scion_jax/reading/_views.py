"""Views: where the axes of a parameter have gone in an array that is made of it.

Each axis of the array is a product of *factors*, outermost first: after `reshape(kernel, (768, 3,
256))` of a kernel of shape (768, 768), the second axis of the kernel is two factors on two axes of
the array. A factor that the parameter has no part in, such as a batch axis that it was broadcast
along, is plain. Slices move the view's `start` and shrink its factors; an axis that was indexed,
summed or contracted away is `gone`, with the role that it got. Where axes are mixed in a way that
factors cannot follow (a reshape across uneven sizes, a transform along an axis), a factor of stride
0 stands for "somewhere on that axis", so that two different roles of its parts are a contradiction,
never a guess.

The results of products carry views, too: of the output axes of the weight that made them. When a
result is cut into pieces that go separate ways, its views tell which part of the weight made each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

PLAIN = -1


class Part(IntEnum):
    """What a parameter is in an array; the later ones prevail."""

    WHOLE = 0  # the weight itself
    MIXED = 1  # one of several weights multiplied entry by entry
    SCALE = 2  # a factor that scales another weight
    LOST = 3  # bent by what data did before
    STOPPED = 4  # cut off from gradients


class Factor(NamedTuple):
    """A run of entries of one axis of a parameter, `size` of them, `stride` apart.

    Attributes:
        axis: Axis of the parameter, or `PLAIN`.
        stride: Distance between neighbours on that axis; 0 if they are anywhere on it.
        size: How many there are.
    """

    axis: int
    stride: int
    size: int


Axis = tuple[Factor, ...]
Axes = frozenset[int]
Shape = Sequence[int]
Places = Sequence[int | None]


class Move(NamedTuple):
    """Where the axes of an array go.

    Attributes:
        places: For each axis of the result the axis of the operand, or None for a new one.
        old: Shape of the operand.
        new: Shape of the result.
    """

    places: Places
    old: Shape
    new: Shape

    def repeated(self) -> frozenset[int]:
        """Finds the axes of the result along which the operand is repeated."""
        pairs = enumerate(zip(self.places, self.new, strict=True))
        return frozenset([n for n, (d, m) in pairs if m > 1 and (d is None or self.old[d] == 1)])


class View(NamedTuple):
    """Where the axes of a parameter have gone in an array.

    Attributes:
        source: Index of the parameter, or the use whose result the array is.
        shape: Shape of the parameter.
        axes: The factors on each axis of the array, outermost first.
        start: The first entry of each axis of the parameter.
        gone: Factors that are on no axis any more, each with its role.
        part: What the parameter is in the array; one of the words above.
    """

    source: Any
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    start: tuple[int, ...]
    gone: tuple[tuple[Factor, str], ...] = ()
    part: Part = Part.WHOLE

    def own(self, *dims: int) -> list[Factor]:
        """Lists the factors of the parameter on some axes of the array."""
        return [factor for dim in dims for factor in self.axes[dim] if factor.axis != PLAIN]

    @property
    def factors(self) -> list[Factor]:
        """The factors of the parameter on all axes of the array."""
        return [factor for axis in self.axes for factor in axis if factor.axis != PLAIN]

    def dims(self) -> frozenset[int]:
        """Finds the axes of the array along which the parameter varies."""
        pairs = enumerate(self.axes)
        return frozenset([d for d, axis in pairs for a, _, n in axis if a != PLAIN and n > 1])

    def paired(self, roles: Mapping[int, str]) -> list[tuple[Factor, str]]:
        """Pairs the factors on some axes of the array with the roles that those have."""
        return [(factor, roles[dim]) for dim in roles for factor in self.own(dim)]

    def moved(self, move: Move, role: str = "b") -> View:
        """Puts axes elsewhere; those that go, or are repeated, get a role."""
        axes = []
        lost = [f for d in range(len(self.axes)) if d not in move.places for f in self.own(d)]
        for dim, size in zip(move.places, move.new, strict=True):
            axis = () if dim is None else self.axes[dim]
            if size != 1 and _size(axis) == 1:  # broadcast
                lost += () if dim is None else self.own(dim)
                axis = (Factor(PLAIN, 0, size),)
            axes.append(axis)
        gone = self.gone + tuple([(factor, role) for factor in lost])
        return self._replace(axes=tuple(axes), gone=gone)

    def reshaped(self, shape: Shape) -> View:
        """Splits and merges axes."""
        factors = [f for axis in self.axes for f in axis if f.size != 1]
        scattered = self._replace(axes=tuple(anywhere(self.factors, size) for size in shape))
        if math.prod(f.size for f in factors) != math.prod(shape) or 0 in shape:
            return scattered
        single = tuple((f, "b") for f in self.factors if f.size == 1)
        pending, axes = factors[::-1], []
        for size in shape:
            axis: list[Factor] = []
            while size > 1:
                factor = pending.pop()
                if size % factor.size and factor.size % size:
                    return scattered
                if size % factor.size:  # the outer part of it
                    pending.append(factor._replace(size=factor.size // size))
                    factor = Factor(factor.axis, factor.stride * pending[-1].size, size)
                size //= factor.size
                axis.append(factor)
            axes.append(_joined(axis))
        return self._replace(axes=tuple(axes), gone=self.gone + single)

    def sliced(self, dim: int, start: int, stop: int, step: int) -> View:
        """Takes a part of an axis."""
        axis, size = self.axes[dim], -(-(stop - start) // step)
        if not axis or size == _size(axis):
            return self
        (outer, *rest), begin = axis, list(self.start)
        inner = _size(rest)
        unknown = outer.stride * step <= 0 and outer.axis != PLAIN
        if unknown or start % inner or size % inner or (rest and step != 1):
            return self.spread({dim: size})
        if outer.axis != PLAIN:
            begin[outer.axis] += start // inner * outer.stride
        cut = Factor(outer.axis, outer.stride * step, size // inner)
        axes = (*self.axes[:dim], (cut, *rest), *self.axes[dim + 1 :])
        return self._replace(axes=axes, start=tuple(begin))

    def spread(self, sizes: Mapping[int, int], everywhere: bool = False) -> View:
        """Forgets where on some axes what is: entries were mixed, padded, or joined by others.

        Args:
            sizes: The new size of each of these axes.
            everywhere: Whether what is on other axes is there, too.
        """
        axes, own = list(self.axes), self.factors if everywhere else []
        for dim, size in sizes.items():
            axes[dim] = anywhere(own or self.own(dim), size)
        return self._replace(axes=tuple(axes))

    def as_part(self, part: Part) -> View:
        """Views it as a part of something else."""
        return self._replace(part=max(self.part, part))

    def relabelled(self, roles: Mapping[str, str]) -> View:
        """Gives axes that are gone other roles."""
        return self._replace(gone=tuple((f, roles.get(role, role)) for f, role in self.gone))

    @property
    def past(self) -> set[str]:
        """The roles of the axes that are gone."""
        return {role for _, role in self.gone}

    @property
    def is_factor(self) -> bool:
        """Whether it is of a factor of a product of parameters."""
        return any(role in "IO" for _, role in self.gone)

    @property
    def is_statistic(self) -> bool:
        """Whether an axis of several entries was summed over."""
        return any(role == "-" and factor.size > 1 for factor, role in self.gone)

    def spans(self) -> tuple[tuple[int, int], ...]:
        """Finds the entries of each axis of the parameter that the array holds, as ranges."""
        spans = [[start, start + 1] for start in self.start]
        loose = []
        for axis, stride, size in itertools.chain(*self.axes, [f for f, _ in self.gone]):
            if axis != PLAIN:
                spans[axis][1] += (size - 1) * stride
                if stride <= 0:
                    loose.append(axis)
        for axis in loose:
            spans[axis] = [0, self.shape[axis]]
        return tuple([(start, stop) for start, stop in spans])


def whole(source: int, shape: Shape) -> View:
    """Views a parameter as it is."""
    axes = tuple((Factor(axis, 1, size),) for axis, size in enumerate(shape))
    return View(source, tuple(shape), axes, (0,) * len(shape))


def anywhere(factors: Iterable[Factor], size: int, stride: int = 0) -> Axis:
    """An axis that holds entries of several, in an order that is not known."""
    axes = dict.fromkeys(factor.axis for factor in factors)
    plain = (Factor(PLAIN, 0, size),) if size != 1 else ()
    return tuple(Factor(axis, stride, size) for axis in axes) or plain


def _size(axis: Sequence[Factor]) -> int:
    return math.prod([factor.size for factor in axis])


def _joined(axis: Sequence[Factor]) -> Axis:
    """Merges neighbours that lie one in the other."""
    joined: list[Factor] = []
    for factor in axis:
        last = joined[-1] if joined else None
        if last and last.axis == factor.axis and last.stride == factor.stride * factor.size:
            joined[-1] = factor._replace(size=last.size * factor.size)
        else:
            joined.append(factor)
    return tuple(joined)
