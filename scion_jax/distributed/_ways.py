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
from scion_jax.distributed._places import Places
from scion_jax.distributed._stacks import Stacks


class Work(NamedTuple):
    """What is computed of every matrix, on one device.

    Attributes:
        function: Maps a stack in pieces to as much, or to numbers `(1, 1, batch, 1, 1)`.
        numbers: Which of the two.
        may_be_skipped: Whether devices without a matrix need not call it.
    """

    function: Callable[[jax.Array], jax.Array]
    numbers: bool
    may_be_skipped: bool


class Way(NamedTuple):
    """The axes over which a stack is split.

    Attributes:
        own: Those that split it along itself: these matrices stay where they are.
        shared: Those along which it is replicated: each device takes its share of the stack.
        rows: Those that split rows: devices send each other pieces of matrices.
        columns: Those that split columns.
        places: The device of each matrix, if stacks go at the same time (see `_places`).
    """

    own: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    places: Places = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All axes, in the order in which they number the devices."""
        return self.own + self.shared + self.rows + self.columns

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

    def run(members: list[int], compute: Callable[..., list[jax.Array]]) -> dict[int, jax.Array]:
        theirs = [ways[index] for index in members]
        done = compute(
            work.function, [_there(stacks[index], ways[index]) for index in members], theirs
        )
        back = _numbers if work.numbers else _back
        return {
            index: back(result, ways[index])[: stacks[index].shape[0]]
            for index, result in zip(members, done, strict=True)
        }

    results = run([index for index, way in enumerate(ways) if not way.places], _together)
    if members := [index for index, way in enumerate(ways) if way.places]:
        # After the others: a device that waits for these cannot do another's work meanwhile.
        stacks, _ = jax.lax.optimization_barrier((stacks, list(results.values())))
        results |= run(members, _at_the_same_time)
    return [results[index] for index in range(len(stacks))]


def _together(
    function: Callable[[jax.Array], jax.Array], grids: list[jax.Array], _: list[Way]
) -> list[jax.Array]:
    """Applies a function to what is in one form now, however it was split, as one stack."""
    kinds = [(x.shape[:2], x.shape[3:], x.dtype, sharding.varying(x)) for x in grids]
    here = Stacks(grids, kinds, axis=2)
    return here.split(list(map(function, here.joined)))


def _at_the_same_time(
    function: Callable[[jax.Array], jax.Array], grids: list[jax.Array], ways: list[Way]
) -> list[jax.Array]:
    """Applies a function where there is a matrix, after all have come and before any goes back."""

    def on_this_device(grid: jax.Array, way: Way) -> jax.Array:
        is_here = jnp.any(jnp.asarray(way.places) == jax.lax.axis_index(way.names))
        return jax.lax.cond(is_here, function, lambda zeros: zeros, grid)

    come = jax.lax.optimization_barrier(grids)
    return jax.lax.optimization_barrier(list(map(on_this_device, come, ways)))


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
