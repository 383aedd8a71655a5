"""Axes: what each axis of a block is for, and the block as a batch of matrices."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from scion_jax import _sharding as sharding


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of one block, sorted by role.

    Attributes:
        shape: Shape of the block.
        batch: Positions of the `b` axes.
        output: Positions of the `o` axes.
        input: Positions of the `i` axes.
        window: Positions of the `s` axes.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    output: tuple[int, ...]
    input: tuple[int, ...]
    window: tuple[int, ...]

    def stacked(self, count: int) -> Axes:
        """Returns the axes of `count` such blocks along a new batch axis in front."""

        def shifted(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(axis + 1 for axis in axes)

        groups = map(shifted, (self.output, self.input, self.window))
        return Axes((count, *self.shape), (0, *shifted(self.batch)), *groups)

    def _size(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.shape[axis] for axis in axes)

    @property
    def count(self) -> int:
        """Number of matrices: the product of the `b` sizes."""
        return self._size(self.batch)

    @property
    def d_out(self) -> int:
        """Fan-out: the product of the `o` sizes."""
        return self._size(self.output)

    @property
    def d_in(self) -> int:
        """Fan-in of one window position: the product of the `i` sizes."""
        return self._size(self.input)

    @property
    def window_size(self) -> int:
        """`k`: the product of the `s` sizes, 1 without a window."""
        return self._size(self.window)

    @property
    def fan_in(self) -> int:
        """`k·d_in`: the number of columns of the matrix view."""
        return self.d_in * self.window_size

    @property
    def columns(self) -> tuple[int, ...]:
        """Positions of the `i` and `s` axes, in the block's order."""
        return tuple(sorted(self.input + self.window))

    @property
    def matrix(self) -> tuple[int, ...]:
        """Positions of all axes but the batch axes."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.batch)

    @property
    def _groups(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The axes that become the batch, the rows and the columns of `to_matrices`."""
        columns_first = self.columns and self.output and self.columns[0] < self.output[0]
        rows, columns = self.output, self.columns
        return (self.batch, columns, rows) if columns_first else (self.batch, rows, columns)

    def to_matrices(self, array: jax.Array) -> jax.Array:
        """Views a block as a batch of matrices `W` or `Wᵀ`, whichever is closer to how it lies.

        Args:
            array: The block, of shape `shape`.

        Returns:
            Shape `(batch, d_out, k·d_in)` or `(batch, k·d_in, d_out)`.
        """
        groups = self._groups
        # Axes can be merged where at most the first of them is split over devices.
        array = sharding.unsplit(array, [axis for group in groups for axis in group[1:]])
        order = [axis for group in groups for axis in group]
        firsts = [order.index(group[0]) if group else None for group in groups]
        shape = [self._size(group) for group in groups]
        return sharding.reshape(jnp.transpose(array, order), shape, firsts)

    def from_matrices(self, matrices: jax.Array) -> jax.Array:
        """Undoes `to_matrices`."""
        groups = self._groups
        order = [axis for group in groups for axis in group]
        firsts = {group[0]: position for position, group in enumerate(groups) if group}
        shape = [self.shape[axis] for axis in order]
        array = sharding.reshape(matrices, shape, [firsts.get(axis) for axis in order])
        return jnp.transpose(array, sorted(range(len(order)), key=order.__getitem__))
