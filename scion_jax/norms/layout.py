"""Layouts: which axis of an array is fan-in, fan-out, spatial window or batch.

JAX frameworks disagree about the order of a weight's axes, and reading one the wrong way round
silently inverts the factor `√(d_out/d_in)` that most norms here contain. A layout states the order
with one letter per axis:

    `i`  input (fan-in); several are flattened in order
    `o`  output (fan-out); several are flattened in order
    `s`  spatial window of a convolution; `k` is the product of the `s` sizes
    `b`  batch: independent matrices (scanned layers, experts, heads kept apart)

Every array is thereby a batch of matrices, its *matrix view* `(batch, d_out, k·d_in)`.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

_LETTERS = {"i": "input", "o": "output", "s": "spatial window", "b": "batch"}

# Flax's order. Rank 3 is absent on purpose: a Conv1d kernel, an attention projection and a stack
# of matrices all have rank 3, and no guess is safe.
_DEFAULTS = {0: "o", 1: "o", 2: "io", 4: "ssio", 5: "sssio"}


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of one array, sorted by role.

    Attributes:
        shape: Shape of the array.
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

    def _size(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.shape[axis] for axis in axes)

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
        """Positions of the `i` and `s` axes, in the array's order."""
        return tuple(sorted(self.input + self.window))

    @property
    def matrix(self) -> tuple[int, ...]:
        """Positions of all axes but the batch axes."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.batch)

    @property
    def stored(self) -> Axes:
        """These axes, with inputs and outputs swapped if the inputs come first in the array.

        The matrix view is then `W` or `Wᵀ`, whichever does not move entries around.
        """
        if not (self.columns and self.output) or self.output[0] < self.columns[0]:
            return self
        return dataclasses.replace(self, output=self.columns, input=self.output, window=())

    @property
    def single(self) -> Axes:
        """The axes of one entry of the batch: these without the batch axes."""
        position = {axis: index for index, axis in enumerate(self.matrix)}
        roles = (self.output, self.input, self.window)
        output, inputs, window = (tuple(position[axis] for axis in role) for role in roles)
        return Axes(tuple(self.shape[axis] for axis in self.matrix), (), output, inputs, window)

    def batched(self, size: int) -> Axes:
        """The axes of a stack of such arrays, with one more batch axis in front."""
        roles = (self.batch, self.output, self.input, self.window)
        batch, output, inputs, window = (tuple(axis + 1 for axis in role) for role in roles)
        return Axes((size, *self.shape), (0, *batch), output, inputs, window)

    def to_entries(self, array: jax.Array) -> jax.Array:
        """Views `array` as a stack of the batch's entries, `(batch, *single.shape)`."""
        array = jnp.transpose(array, self.batch + self.matrix)
        return array.reshape(self._size(self.batch), *array.shape[len(self.batch) :])

    def from_entries(self, entries: jax.Array) -> jax.Array:
        """Undoes `to_entries`."""
        order = self.batch + self.matrix
        array = entries.reshape(tuple(self.shape[axis] for axis in order))
        return jnp.transpose(array, sorted(range(len(order)), key=order.__getitem__))

    @property
    def _order(self) -> tuple[int, ...]:
        return self.batch + self.output + self.columns

    def to_matrices(self, array: jax.Array) -> jax.Array:
        """Views `array` as a batch of matrices, `(batch, d_out, k·d_in)`."""
        array = jnp.transpose(array, self._order)
        return array.reshape(self._size(self.batch), self.d_out, self.fan_in)

    def from_matrices(self, matrices: jax.Array) -> jax.Array:
        """Undoes `to_matrices`."""
        array = matrices.reshape(tuple(self.shape[axis] for axis in self._order))
        inverse = sorted(range(len(self.shape)), key=self._order.__getitem__)
        return jnp.transpose(array, inverse)


def check_layout(layout: str | None) -> None:
    """Checks what can be known about a layout before an array is seen.

    Args:
        layout: One letter of `i`, `o`, `s`, `b` per axis, or None for the default.

    Raises:
        TypeError: If `layout` is neither None nor a string.
        ValueError: If it holds another letter, or no `o`.
    """
    if layout is None:
        return
    if not isinstance(layout, str):
        raise TypeError(f"a layout is a string such as 'io', or None; got {layout!r}")
    for letter in layout:
        if letter not in _LETTERS:
            meanings = ", ".join(f"'{key}' ({value})" for key, value in _LETTERS.items())
            raise ValueError(f"layout {layout!r} holds the letter {letter!r}; use {meanings}")
    if "o" not in layout:
        raise ValueError(f"layout {layout!r} has no output axis; mark at least one axis with 'o'")


def parse_layout(layout: str | None, shape: tuple[int, ...], path: str = "") -> Axes:
    """Reads a layout against the shape of an array.

    Without a layout the array's rank decides, in Flax's order: rank 0 and 1 `o`, 2 `io`, 4 `ssio`,
    5 `sssio`. A scalar counts as one output.

    Args:
        layout: One letter of `i`, `o`, `s`, `b` per axis, or None for the default of the rank.
        shape: Shape of the array.
        path: Where the array stands in its tree, for error messages.

    Returns:
        The array's axes by role.

    Raises:
        TypeError: If `layout` is neither None nor a string.
        ValueError: If the layout holds an unknown letter or no `o`, if its length differs from
            the rank, or if it is None and the rank has no default (rank 3 is ambiguous).

    Example:
        >>> axes = parse_layout("ssio", (3, 3, 16, 32))
        >>> axes.d_out, axes.d_in, axes.window_size
        (32, 16, 9)
    """
    check_layout(layout)
    rank = len(shape)
    array = f"leaf '{path}' of shape {shape}" if path else f"an array of shape {shape}"
    if layout is None:
        if rank == 3:
            raise ValueError(
                f"{array} has rank 3, which is ambiguous; give its norm a layout: 'sio' (Conv1d "
                "kernel), 'ioo' or 'iio' (attention projection), or 'bio' (stacked matrices)"
            )
        if rank not in _DEFAULTS:
            raise ValueError(
                f"{array} has rank {rank}, which has no default layout; give its norm a layout of "
                f"{rank} letters of 'i', 'o', 's' and 'b'"
            )
        layout = _DEFAULTS[rank]
    if rank == 0 and layout == "o":
        return Axes((), (), (), (), ())
    if len(layout) != rank:
        raise ValueError(
            f"layout {layout!r} has {len(layout)} letters, but {array} has rank {rank}; give one "
            "letter per axis"
        )
    batch, output, inputs, window = (
        tuple(axis for axis, letter in enumerate(layout) if letter == role) for role in "bois"
    )
    return Axes(tuple(shape), batch, output, inputs, window)
