"""Pieces: matrices as devices send them to each other, `(down, across, batch, rows, columns)`.

Each matrix is a grid of `down · across` pieces, one from each device that had a part of it. The
iteration only sums over the longer side, so along it pieces need not be put together, which would
be a copy of every matrix, before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def is_tall(shape: Sequence[int]) -> bool:
    """Tells which side of the matrices is the longer one; of a square, the one that is cut."""
    down, across, _, rows, columns = shape
    return (down * rows, down) > (across * columns, 1)


def along_longer_side(grid: jax.Array) -> jax.Array:
    """Joins pieces but for those along the longer side: `(pieces, batch, rows, columns)`."""
    down, across, batch, rows, columns = grid.shape
    if is_tall(grid.shape):
        return jnp.moveaxis(grid, 1, 3).reshape(down, batch, rows, across * columns)
    return jnp.moveaxis(grid, 0, 2).reshape(across, batch, down * rows, columns)


def as_grid(pieces: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Undoes `along_longer_side`, for a grid of the given shape."""
    down, across, batch, rows, columns = shape
    if is_tall(shape):
        return jnp.moveaxis(pieces.reshape(down, batch, rows, across, columns), 3, 1)
    return jnp.moveaxis(pieces.reshape(across, batch, down, rows, columns), 2, 0)


def joined(grid: jax.Array) -> jax.Array:
    """Puts matrices together: `(batch, down · rows, across · columns)`."""
    down, across, batch, rows, columns = grid.shape
    whole = jnp.transpose(grid, (2, 0, 3, 1, 4))
    return whole.reshape(batch, down * rows, across * columns)


def cut(matrices: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Undoes `joined`, for a grid of the given shape."""
    down, across, batch, rows, columns = shape
    whole = matrices.reshape(batch, down, rows, across, columns)
    return jnp.transpose(whole, (1, 3, 0, 2, 4))


def one_by_one(function: Callable[[jax.Array], jax.Array], grid: jax.Array) -> jax.Array:
    """Replaces one matrix after the other by what a function makes of it, in place."""

    def replace(index: jax.Array, grid: jax.Array) -> jax.Array:
        one = jax.lax.dynamic_slice_in_dim(grid, index, 1, 2)
        return jax.lax.dynamic_update_slice_in_dim(grid, function(one), index, 2)

    return jax.lax.fori_loop(0, grid.shape[2], replace, grid)
