"""What flows through a program: constants, weights and data.

Reading runs a program on abstract values, one of three for every array:

- `Constant`: it comes of neither parameters nor inputs.
- `Weight`: it comes of parameters alone (or is a parameter that data picked from, or scaled). It
  holds one `View` for each parameter that is in it.
- `Data`: it comes of the inputs. What a parameter does to data is a use of it; see `_uses`.

A `View` says where the axes of a parameter have gone. Each axis of the array is a product of
*factors*, outermost first: after `reshape(kernel, (768, 3, 256))` of a kernel of shape (768, 768),
the second axis of the kernel is two factors on two axes of the array. A factor that the parameter
has no part in, such as a batch axis that it was broadcast along, is plain. Slices move the view's
`start` and shrink its factors; an axis that was indexed, summed or contracted away is `gone`, with
the role that it got. Where axes are mixed in a way that factors cannot follow (a reshape across
uneven sizes, a transform along an axis), a factor of stride 0 stands for "somewhere on that axis",
so that two different roles of its parts are a contradiction, never a guess.

The results of products carry views, too: of the output axes of the weight that made them. When a
result is cut into pieces that go separate ways, its views tell which part of the weight made each.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

PLAIN = -1

# What a view is in its array: the weight itself; a factor that scales another weight; one of
# several weights multiplied entry by entry; bent by what data did before; cut off from gradients.
WHOLE, SCALE, MIXED, LOST, STOPPED = "whole", "scale", "mixed", "lost", "stopped"


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


class View(NamedTuple):
    """Where the axes of a parameter have gone in an array.

    Attributes:
        source: Index of the parameter, or key of the use whose result the array is.
        shape: Shape of the parameter.
        axes: The factors on each axis of the array, outermost first.
        start: The first entry of each axis of the parameter.
        gone: Factors that are on no axis any more, each with its role.
        part: What the parameter is in the array; one of the words above.
    """

    source: Hashable
    shape: tuple[int, ...]
    axes: tuple[tuple[Factor, ...], ...]
    start: tuple[int, ...]
    gone: tuple[tuple[Factor, str], ...] = ()
    part: str = WHOLE

    def own(self, dim: int) -> list[Factor]:
        """Lists the factors of the parameter on an axis of the array."""
        return [factor for factor in self.axes[dim] if factor.axis != PLAIN]

    def dims(self) -> frozenset[int]:
        """Finds the axes of the array along which the parameter varies."""
        return frozenset(
            d for d, axis in enumerate(self.axes) if any(a != PLAIN and n > 1 for a, _, n in axis)
        )

    def moved(self, dims: Sequence[int | None], sizes: Sequence[int], role: str = "b") -> View:
        """Puts axes elsewhere: `dims` names the old axis of every new one, None for a new one.

        Those that are not named are gone, with a role; so are those that are broadcast.
        """
        axes = []
        lost = [f for d in range(len(self.axes)) if d not in dims for f in self.own(d)]
        for dim, size in zip(dims, sizes, strict=True):
            kept = self.axes[dim] if dim is not None else ()
            if dim is None or (size != 1 and _size(kept) == 1):  # broadcast
                lost += [f for f in kept if f.axis != PLAIN]
                kept = () if size == 1 else (Factor(PLAIN, 0, size),)
            axes.append(kept)
        return self._replace(axes=tuple(axes), gone=self.gone + tuple((f, role) for f in lost))

    def plain(self, dims: Sequence[int], sizes: Sequence[int], role: str) -> View:
        """Takes the parameter off axes, which gives it a role there."""
        lost = tuple((f, role) for d in dims for f in self.own(d))
        axes = (
            axis if d not in dims else (Factor(PLAIN, 0, n),) if n != 1 else ()
            for d, (axis, n) in enumerate(zip(self.axes, sizes, strict=True))
        )
        return self._replace(axes=tuple(axes), gone=self.gone + lost)

    def reshaped(self, shape: Sequence[int]) -> View:
        """Splits and merges axes."""
        factors = [f for axis in self.axes for f in axis if f.size != 1]
        gone = tuple((f, "b") for d in range(len(self.axes)) for f in self.own(d) if f.size == 1)
        pending, axes = factors[::-1], []
        if math.prod(f.size for f in factors) != math.prod(shape) or 0 in shape:
            return self.mixed(shape)
        for size in shape:
            axis: list[Factor] = []
            while size > 1:
                factor = pending.pop()
                if size % factor.size == 0:
                    size //= factor.size
                elif factor.size % size == 0:
                    inner = factor._replace(size=factor.size // size)
                    pending.append(inner)
                    factor = Factor(factor.axis, factor.stride * inner.size, size)
                    size = 1
                else:
                    return self.mixed(shape)
                axis.append(factor)
            axes.append(_joined(axis))
        return self._replace(axes=tuple(axes), gone=self.gone + gone)

    def sliced(self, dim: int, start: int, stop: int, step: int) -> View:
        """Takes a part of an axis."""
        axis, size = self.axes[dim], -(-(stop - start) // step)
        if not axis or size == _size(axis):
            return self
        outer, inner = axis[0], _size(axis[1:])
        if (outer.stride * step <= 0 and outer.axis != PLAIN) or (start % inner or size % inner):
            return self.spread(dim, size)
        begin = list(self.start)
        if outer.axis != PLAIN:
            begin[outer.axis] += start // inner * outer.stride
        cut = Factor(outer.axis, outer.stride * step, size // inner)
        if len(axis) > 1 and step != 1:
            return self.spread(dim, size)
        axes = (*self.axes[:dim], (cut, *axis[1:]), *self.axes[dim + 1 :])
        return self._replace(axes=axes, start=tuple(begin))

    def spread(self, dim: int, size: int) -> View:
        """Forgets where on an axis what is: its entries were mixed, padded, or joined by others."""
        own = tuple(Factor(axis, 0, size) for axis in {f.axis: None for f in self.own(dim)})
        axis = own or ((Factor(PLAIN, 0, size),) if size != 1 else ())
        return self._replace(axes=(*self.axes[:dim], axis, *self.axes[dim + 1 :]))

    def patterned(self, dims: Iterable[int], shape: Sequence[int]) -> View:
        """Varies along more axes, in a way that only a constant knows."""
        own = {f.axis: None for d in range(len(self.axes)) for f in self.own(d)}
        axes = list(self.axes)
        for dim in dims:
            axes[dim] = tuple(Factor(axis, 0, shape[dim]) for axis in own) or axes[dim]
        return self._replace(axes=tuple(axes))

    def mixed(self, shape: Sequence[int]) -> View:
        """Forgets which axis is where."""
        own = {f.axis: None for d in range(len(self.axes)) for f in self.own(d)}
        axes = tuple(tuple(Factor(axis, 0, n) for axis in own if n > 1) for n in shape)
        return self._replace(axes=axes)

    def spans(self) -> tuple[tuple[int, int], ...]:
        """Finds the entries of each axis of the parameter that the array holds, as ranges."""
        extents, loose = [1] * len(self.shape), set()
        for axis, stride, size in [f for factors in self.axes for f in factors]:
            if axis != PLAIN:
                extents[axis] += (size - 1) * stride
                if stride <= 0:
                    loose.add(axis)
        for (axis, stride, size), _ in self.gone:
            extents[axis] += (size - 1) * stride
            if stride <= 0:
                loose.add(axis)
        return tuple(
            (0, size) if axis in loose else (start, start + extent)
            for axis, (start, extent, size) in enumerate(
                zip(self.start, extents, self.shape, strict=True)
            )
        )


def whole(source: Hashable, shape: Sequence[int]) -> View:
    """Views a parameter as it is."""
    axes = tuple((Factor(axis, 1, size),) for axis, size in enumerate(shape))
    return View(source, tuple(shape), axes, (0,) * len(shape))


class Constant(NamedTuple):
    """An array that comes of neither parameters nor inputs.

    Attributes:
        value: Its value, where it is a small whole number or a few, such as an index.
        iota: The axis along which it counts, if it does; two for an identity matrix.
    """

    value: Any = None
    iota: tuple[int, ...] = ()


class Data(NamedTuple):
    """An array that comes of the inputs.

    Attributes:
        fresh: Whether no parameter was multiplied or looked up before.
        pending: Keys of the uses that it comes of, with no later product in between.
        views: Of the output axes of the weights that made it.
        flat: Axes along which it is constant, since it was broadcast.
        stacked: Axes that are stacks of independent weights.
        onehot: Axis along which it is one-hot, if it is.
        suspects: Keys of uses that may have been of weights made from data; see `_products`.
        soft: Whether it went through an exponential since they came under suspicion.
        cotangent: Whether it is a derivative that was taken inside the program.
        learned: Whether it comes of parameters alone, such as learned tokens.
        composed: Keys of uses of the factors of a low rank, if they are that: a learned query times
            a kernel looks the same, but for the exponential that scores go through.
        outer: Two sets of axes, if it is an outer product along them.
        chosen: Parameters that an index was chosen by.
    """

    fresh: bool = False
    pending: frozenset[Hashable] = frozenset()
    views: tuple[View, ...] = ()
    flat: frozenset[int] = frozenset()
    stacked: frozenset[int] = frozenset()
    onehot: int | None = None
    suspects: frozenset[Hashable] = frozenset()
    soft: bool = False
    cotangent: bool = False
    learned: bool = False
    composed: frozenset[Hashable] = frozenset()
    outer: tuple[frozenset[int], ...] = ()
    chosen: frozenset[Hashable] = frozenset()

    def bare(self) -> Data:
        """Forgets all that has axes."""
        none = frozenset()
        return self._replace(views=(), flat=none, stacked=none, onehot=None, outer=())

    def moved(self, dims: Sequence[int | None]) -> Data:
        """Puts its axes elsewhere; `dims` names the old axis of every new one. Not its views."""
        if not (self.flat or self.stacked or self.outer) and self.onehot is None:
            return self
        flat = frozenset(new for new, old in enumerate(dims) if old in self.flat)
        stacked = frozenset(new for new, old in enumerate(dims) if old in self.stacked)
        onehot = next((n for n, old in enumerate(dims) if old == self.onehot), None)
        onehot = None if self.onehot is None else onehot
        outer = tuple(frozenset(n for n, d in enumerate(dims) if d in axes) for axes in self.outer)
        return self._replace(flat=flat, stacked=stacked, onehot=onehot, outer=outer)


class Weight(NamedTuple):
    """An array that comes of parameters alone, or is picked from or scaled by data.

    Attributes:
        views: One for each parameter in it, or more where it holds several parts of one.
        data: What picked or scaled it; its axes are the array's.
    """

    views: tuple[View, ...]
    data: Data | None = None

    @property
    def picked(self) -> bool:
        """Whether data chose which entries of an axis it holds."""
        return any(role == "p" for view in self.views for _, role in view.gone)

    def dims(self) -> frozenset[int]:
        """Finds the axes along which a parameter varies."""
        return frozenset().union(*(view.dims() for view in self.views))


Value = Constant | Weight | Data


def _size(axis: Sequence[Factor]) -> int:
    return math.prod([f.size for f in axis])


def _joined(axis: Sequence[Factor]) -> tuple[Factor, ...]:
    """Merges neighbours that lie one in the other."""
    joined: list[Factor] = []
    for factor in axis:
        last = joined[-1] if joined else None
        if last and last.axis == factor.axis and last.stride == factor.stride * factor.size:
            joined[-1] = factor._replace(size=last.size * factor.size)
        else:
            joined.append(factor)
    return tuple(joined)
