"""Ways: how matrices get to the devices that work on them, and back.

What stands here runs on every device, inside of `shard_map`: what is split is what this device has.
A matrix that comes from several devices stays in the pieces that they send, `(down, across, batch,
rows, columns)`, since putting them together would copy every matrix, before and after.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from scion_jax import _sharding as sharding


class Work(NamedTuple):
    """What is computed of every matrix, on one device.

    Attributes:
        compute: Maps stacks in pieces to as many, or to numbers `(1, 1, batch, 1, 1)`.
        numbers: Which of the two.
    """

    compute: Callable[[Sequence[jax.Array]], list[jax.Array]]
    numbers: bool


class Way(NamedTuple):
    """The axes over which a stack is split.

    Attributes:
        own: Those that split it along itself: these matrices stay where they are.
        shared: Those along which it is replicated: each device takes its share of the stack.
        rows: Those that split rows: devices send each other pieces of matrices.
        columns: Those that split columns.
    """

    own: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    @property
    def spec(self) -> PartitionSpec:
        """How the stack is split, before and after."""
        return PartitionSpec(*(names or None for names in (self.own, self.rows, self.columns)))


def there_and_back(work: Work, stacks: Sequence[jax.Array], ways: Sequence[Way]) -> list[jax.Array]:
    """Moves stacks, computes, and moves the results back.

    Args:
        work: What is computed.
        stacks: What this device has of each, `(batch, rows, columns)`.
        ways: Where each has to go.

    Returns:
        What belongs to this device of each result. Numbers, `(batch, 1, 1)`, are those of all
        matrices that this device has a part of.
    """
    there = [_there(stack, way) for stack, way in zip(stacks, ways, strict=True)]
    back = _numbers if work.numbers else _back
    return [
        back(result, way)[: stack.shape[0]]
        for result, way, stack in zip(work.compute(there), ways, stacks, strict=True)
    ]


def padded(stack: jax.Array, multiple: int) -> jax.Array:
    """Appends matrices of zeros until a number divides the length."""
    missing = -stack.shape[0] % multiple
    if not missing:
        return stack
    # XLA makes one copy of this and of what joined the stack; of `pad` it would make another.
    zeros = jnp.zeros_like(jax.lax.slice_in_dim(stack, 0, 1))
    return jnp.concatenate([stack, *[zeros] * missing])


def _there(stack: jax.Array, way: Way) -> jax.Array:
    """Takes this device's share, and from the others their pieces of it."""
    shares, down, across = map(_size, (way.shared, way.rows, way.columns))
    stack = padded(stack, shares * down * across)
    batch, rows, columns = stack.shape
    if way.shared:
        start = jax.lax.axis_index(way.shared) * (batch // shares)
        stack = jax.lax.dynamic_slice_in_dim(stack, start, batch // shares)
    pieces = _exchanged(stack.reshape(down * across, -1, rows, columns), way)
    return pieces.reshape(down, across, -1, rows, columns)


def _back(grid: jax.Array, way: Way) -> jax.Array:
    down, across, _, rows, columns = grid.shape
    pieces = _exchanged(grid.reshape(down * across, -1, rows, columns), way)
    return _gathered(pieces.reshape(-1, rows, columns), way.shared)


def _numbers(grid: jax.Array, way: Way) -> jax.Array:
    return _gathered(grid[0, 0], way.shared + way.rows + way.columns)


def _exchanged(pieces: jax.Array, way: Way) -> jax.Array:
    """Sends piece i to the i-th device, from which another one comes in its place."""
    names = way.rows + way.columns
    return jax.lax.all_to_all(pieces, names, 0, 0, tiled=True) if names else pieces


def _gathered(array: jax.Array, names: tuple[str, ...]) -> jax.Array:
    if not names:
        return array
    # Under shard_map's checks the result is the same on all devices by type, too.
    by_type = bool(sharding.varying(jax.lax.axis_index(names)))
    return sharding.gather_mapped(array, names, by_type)


def _size(names: tuple[str, ...]) -> int:
    return math.prod(jax.lax.axis_size(name) for name in names)
